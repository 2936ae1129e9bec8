/* SPDX-License-Identifier: MIT */
/*
 * The posix port's view of an address space: where it is (this process or another), how mappings
 * are made in it, and how writers are kept out of pages that move.
 *
 * port.c implements tlb_restrict and tlb_install on these. A space is the `owner` of its ctg_mm.
 *
 * Locks: space->lock is taken inside any lock of the core that a tlb hook may be called under,
 * protects everything in the space, and is held while mapping operations are carried out, so that
 * the last one leaves the mapping as the page table says.
 */
#ifndef CONTIG_POSIX_SPACE_H
#define CONTIG_POSIX_SPACE_H

#include <contig/posix.h>
#include <pthread.h>
#include <sys/types.h>

/* Descriptors that mapping operations refer to. */
enum posix_file {
	POSIX_FILE_REGION,
	POSIX_FILE_SPILL,
	POSIX_NR_FILES
};

enum posix_op_kind {
	POSIX_OP_MAP,       /* mmap(addr, bytes, prot, SHARED | FIXED, file, offset), MADV_DONTFORK */
	POSIX_OP_RESERVE,   /* mmap(addr, bytes, NONE, PRIVATE | ANONYMOUS | NORESERVE | FIXED) */
	POSIX_OP_PRIVATISE, /* copy what is at addr into anonymous memory, put that at addr */
	POSIX_OP_POPULATE,  /* make anonymous memory at addr present and writable */
	POSIX_OP_LEND,      /* copy what is at addr into file at offset, then POSIX_OP_MAP it */
	POSIX_OP_HINT,      /* no mapping: room has become free, private memory may be lent again */
};

/* One operation in the space's process. Fixed size: it is also what goes over the wire. */
struct posix_op {
	uint64_t addr;   /* bytes; multiple of the page size */
	uint64_t bytes;
	uint64_t offset; /* in the file */
	uint32_t kind;   /* enum posix_op_kind */
	uint32_t file;   /* enum posix_file */
	uint32_t prot;   /* PROT_* */
	uint32_t spare;  /* 0 */
};
#define POSIX_MAX_OPS 256 /* in one call */

/* How writers are kept out. */
enum posix_guard {
	POSIX_GUARD_UFFD, /* write-protect with the space's userfaultfd; kernel faults wait too */
	POSIX_GUARD_STOP, /* stop the threads of the space's process */
};

#define POSIX_MAX_UNSETTLED 4
struct posix_range {
	uint64_t addr, bytes;
	uint64_t since; /* ns: when writers were kept out */
	struct posix_range *next;
};

struct posix_space {
	struct ctg_region *region;
	struct ctg_mm *mm;
	pid_t pid;        /* whose address space */
	bool local;       /* it is this process's own */
	enum posix_guard guard;
	int uffd;         /* of that address space; -1 */
	pid_t keep[4];    /* threads that must go on while others are stopped (agents); 0 ends */
	uint64_t window, window_bytes; /* addresses that the region may map; 2 MiB aligned */

	/*
	 * Carry out operations in order, in the space's process; called with lock held. Returns how
	 * many were done (fewer than nr: the next one failed with *err, a negative errno), or
	 * -CTG_ENOENT: the process is gone (nothing it does matters any more).
	 */
	int (*ops)(struct posix_space *space, const struct posix_op *ops, size_t nr, int *err);
	/*
	 * Does the space's process carry out operations now? Asked before writers are kept out, with
	 * lock held. 0; -CTG_EBUSY: not within a short time (stopped, overloaded); -CTG_ENOENT: gone.
	 * NULL: always.
	 */
	int (*ping)(struct posix_space *space);
	void *link; /* the server's, for ops and ping */

	pthread_mutex_t lock;
	pthread_cond_t settled; /* a range left `moving` or `exclusive` */
	struct posix_range *moving;    /* between tlb_restrict(WRPROTECT) and tlb_install */
	struct posix_range *exclusive; /* between posix_space_begin and posix_space_end */
	unsigned char *private_chunks; /* bitmap: 2 MiB chunks of the window that hold ordinary
					  memory of the process; the port leaves them alone */
	uint64_t nr_maps;    /* estimate of mappings in use, never too low */
	uint64_t stall_max_ns; /* longest time writers were kept out; posix_space_stall resets it */
	bool stopped;     /* POSIX_GUARD_STOP: its threads are stopped now */
	unsigned guarded; /* POSIX_GUARD_STOP: posix_guard_protect without its release */
	/* Threads whose tlb_install has failed and is called again, and may not fail then; 0: free */
	pid_t unsettled[POSIX_MAX_UNSETTLED];
	pid_t refused_to; /* the thread whose batch tlb_restrict has refused, and which will call
			     tlb_install for it; 0: none */
	struct posix_range *spare; /* so that a range can be split without memory */
	/* Under lock. Whoever sets it broadcasts settled: posix_space_set_dead. Mapping operations are
	 * then left out; frames come back with posix_space_destroy. */
	bool dead;
};

/* region.c: what a borrower is given. The descriptors stay the region's; files[POSIX_FILE_SPILL] is
 * -1 without a spill zone. Returns how many there are (1 or 2). */
int posix_region_files(struct ctg_region *region, int files[POSIX_NR_FILES]);
/* The region's stopper, started when first asked for. 0 or negative errno. */
struct posix_stopper;
int posix_region_stopper(struct ctg_region *region, struct posix_stopper **out);

/* space.c */
/* Make a space and its mm over a region. The caller has filled pid, local, guard, uffd, keep, window*,
 * ops, ping and link, the rest is zero. 0, -ENOMEM, -EINVAL. */
int posix_space_init(struct posix_space *space, struct ctg_region *region);
/* Tear down: everything lent to it comes back. The process is gone or will not touch its window. */
void posix_space_destroy(struct posix_space *space, bool dead);
/* The process is gone or does not answer any more: nobody waits for it from now on. */
void posix_space_set_dead(struct posix_space *space);
/* stall_max_ns, and begin it anew if `reset`. */
uint64_t posix_space_stall(struct posix_space *space, bool reset);
/* Is the 2 MiB chunk of addr ordinary memory of the process? */
bool posix_space_is_private(struct posix_space *space, uint64_t addr);
/* Declare whole chunks ordinary memory without a conversion (a chunk that was never lent), or not. */
void posix_space_set_private(struct posix_space *space, uint64_t addr, uint64_t bytes, bool is_private);

/*
 * Keep migrations out of [addr, addr + bytes): waits for those under way, makes new ones fail with
 * -EBUSY, until posix_space_end. For privatise and lend. 0 or -EINTR when the space is dead.
 */
int posix_space_begin(struct posix_space *space, uint64_t addr, uint64_t bytes);
void posix_space_end(struct posix_space *space, uint64_t addr, uint64_t bytes);

/* Keep writers out of / let them into the range; between begin and end. 0 or negative errno. */
int posix_guard_protect(struct posix_space *space, uint64_t addr, uint64_t bytes);
void posix_guard_release(struct posix_space *space, uint64_t addr, uint64_t bytes);

/* The two conversions, whole chunks of 2 MiB. See docs/architecture.md, "Fork".
 * privatise: lent or spilled memory becomes ordinary memory of the process, frames are freed.
 * lend: the reverse; -ENOMEM: no room in the area. All or nothing a chunk; stops at the first error. */
int posix_space_privatise(struct posix_space *space, uint64_t addr, uint64_t bytes);
int posix_space_lend(struct posix_space *space, uint64_t addr, uint64_t bytes);

/* The operations as one process does them to itself (local spaces; the agent in the preload library
 * has the same code: ops.c must not use libc beyond raw system calls wrapped in ops.c itself). */
int posix_ops_execute(const int files[POSIX_NR_FILES], const struct posix_op *ops, size_t nr, int *err);

/* port.c: the hooks; region.c fills the memory part. */
int posix_tlb_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how);
int posix_tlb_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr);

/* stop.c: one process, forked while the caller is single-threaded or by clone with exec-safe code, that
 * stops threads of others with ptrace on command; its death resumes them. */
int posix_stopper_start(struct posix_stopper **out);
void posix_stopper_end(struct posix_stopper *stopper);
pid_t posix_stopper_pid(const struct posix_stopper *stopper); /* for PR_SET_PTRACER */
/* All threads of pid but keep[]. 0; -EPERM: may not; -ESRCH-like -CTG_ENOENT: gone; -EBUSY: traced by
 * somebody else or would not stop in time. Nests a pid once only. */
int posix_stopper_stop(struct posix_stopper *stopper, pid_t pid, const pid_t keep[4]);
void posix_stopper_resume(struct posix_stopper *stopper, pid_t pid);

/* uffd.c */
/* A userfaultfd of the calling process that can write-protect shared memory and hugetlb; kernel: it
 * also serves faults in system calls. -errno. Used by local spaces and, with raw system calls only, by
 * the agent. */
int posix_uffd_open(bool *kernel_faults);
int posix_uffd_protect(int uffd, uint64_t addr, uint64_t bytes);
int posix_uffd_wake(int uffd, uint64_t addr, uint64_t bytes);
/* Let writers in again without replacing the mapping. */
void posix_uffd_unprotect(int uffd, uint64_t addr, uint64_t bytes);

#endif
