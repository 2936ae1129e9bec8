/* SPDX-License-Identifier: MIT */
/*
 * A region: two stores of frames (the area's and the spill zone's), the machine over them, and what
 * the port's hooks need.
 *
 *   region.c   opens and closes; what is asked about a region
 *   memfd.c, hugetlb.c, file.c   stores; shmem.c: the files behind the first
 *   copy.c     contents: copy, zero, discard
 *   memory.c   how much there is
 *   host.c     the hooks that have nothing to do with memory: wait, wake, time, metadata
 *   port.c     mappings: tlb_restrict, tlb_install
 *   guard.c    keeping writers out, by uffd.c or stop.c
 *   space.c    address spaces; privatise and lend
 *   local.c    the space of the process that has the region
 */
#ifndef CONTIG_POSIX_REGION_H
#define CONTIG_POSIX_REGION_H

#include "space.h"

#define POSIX_CHUNK ((uint64_t)2 << 20) /* bytes of a pageblock, and of a huge page */
#define POSIX_CHUNK_FRAMES CTG_PAGEBLOCK_FRAMES
#define POSIX_NO_BLOCK UINT32_MAX
#define POSIX_MAX_COPY_THREADS 64

struct posix_store;

struct posix_store_ops {
	const char *name;
	/*
	 * Write whole frames of memory into frames of the store that may not exist yet, without
	 * making them exist twice (once zeroed, once written). NULL: memcpy into the direct map.
	 * 0 or -CTG_ENOMEM.
	 */
	int (*write)(struct posix_store *store, ctg_pfn_t pfn, const void *from, size_t bytes);
	/* Its kernel side takes turns: more threads would only wait for each other. */
	bool serial;
	/* Make frames of zeros where there is a hole that may not be touched. NULL: it may. */
	int (*ensure)(struct posix_store *store, ctg_pfn_t pfn, size_t bytes);
};

/*
 * Frames [base, base + nr), some of which may be holes, in one file, all mapped in the order of
 * their numbers.
 */
struct posix_store {
	const struct posix_store_ops *ops;
	const char *backing; /* "memfd", "hugetlb", "file" */
	bool large;          /* memfd: in pages of 2 MiB where the kernel has them (shmem.c) */
	int fd;
	ctg_pfn_t base;
	uint64_t nr;
	unsigned map_order;
	unsigned char *direct; /* of frame base; the whole span is reserved */
	uint32_t *block;       /* by pageblock of the span: its 2 MiB block of the file, or
				  POSIX_NO_BLOCK for a hole. NULL: as they come, no holes */
	size_t block_bytes;
	struct ctg_extent *ranges; /* what is memory */
	size_t nr_ranges;
	int physical; /* as in ctg_region_info */
	const char *physical_why;
	int uffd;        /* hugetlb spill: fills huge pages without clearing them; -1 */
	uint64_t raised; /* nr_overcommit_hugepages was raised by so many for this store */
	/* how much may come into being before /proc/meminfo is asked again, in bytes */
	uint64_t credit;
	void *metadata;
	size_t metadata_bytes;
};

struct posix_copier;
struct posix_meta;

struct ctg_region {
	struct ctg_port port;
	struct ctg *ctg;
	struct ctg_cma *area;
	struct ctg_zone *zone, *spill_zone;
	struct posix_store store[POSIX_NR_FILES]; /* nr == 0: there is none */
	struct ctg_region_config config;          /* strings are not kept */
	char name[CTG_CMA_NAME_MAX];
	uint64_t map_budget;
	enum posix_guard guard; /* of local spaces, and what info says */
	char guard_why[160];
	struct posix_copier *copier;
	struct posix_meta *meta;
	pthread_mutex_t stopper_lock;
	struct posix_stopper *stopper;

	/*
	 * The region is being closed while processes still map its memory and keep it, as after a
	 * kill of this one: what looks free may be theirs, so nothing is written or punched any
	 * more.
	 */
	bool orphaned;

	pthread_mutex_t local_lock;
	struct posix_space *local; /* made when first needed; local_lock */
	unsigned char *local_used; /* bitmap of the window's chunks; local_lock */

	/*
	 * The local space under POSIX_GUARD_STOP: between tlb_restrict and tlb_install every
	 * thread of this process but self_mover and the copy threads is stopped, perhaps while
	 * it holds a lock that self_mover needs. Before self_mover sleeps it lets them go on
	 * (posix_self_stop_break), and the batch fails: see port.c. What follows is changed by
	 * self_mover only.
	 */
	struct ctg_word32 self_mover; /* thread id; 0: nobody */
	bool self_broken;
	struct ctg_mapping *self_runs; /* the entries of the batch as they were when it began */
	size_t self_nr, self_bytes;
};

/* region.c */
void posix_error(struct ctg_error *error, int code, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
/* Reserve addresses for nr frames, 2 MiB aligned; NULL: none. posix_unreserve frees them. */
unsigned char *posix_reserve(uint64_t bytes);
void posix_unreserve(void *addr, uint64_t bytes);
/* The store that has pfn, or NULL. Holes are not looked at. */
struct posix_store *posix_store_of(struct ctg_region *region, ctg_pfn_t pfn);
/* Bytes into the file at which pfn lies, and how many of nr frames follow there. false: a hole. */
bool posix_store_offset(const struct posix_store *store, ctg_pfn_t pfn, uint64_t nr,
	uint64_t *offset, uint64_t *run);
/* Where offset is: the other way round. CTG_PFN_NONE: nowhere. */
static inline void *posix_store_address(const struct posix_store *store, ctg_pfn_t pfn)
{
	return store->direct + ((pfn - store->base) << CTG_PAGE_SHIFT);
}
/* memory.c */
/* A field of /proc/meminfo in bytes, UINT64_MAX if it is not there. */
uint64_t posix_meminfo(const char *field);
/* Bytes that this process may take before somebody has to be killed: of the machine, and of the
 * control groups it is in. */
uint64_t posix_memory_available(void);
/* The first number in a file, UINT64_MAX if there is none. 0 or negative errno for write. */
uint64_t posix_read_number(const char *path);
int posix_write_number(const char *path, uint64_t value);

/* stores: fill *store (fd -1, zero otherwise) or undo everything and say why */
int posix_memfd_open(struct ctg_region *region, struct posix_store *store, uint64_t bytes,
	struct ctg_error *error);
int posix_memfd_open_sparse(
	struct posix_store *store, ctg_pfn_t base, uint64_t bytes, struct ctg_error *error);
int posix_hugetlb_open(struct ctg_region *region, struct posix_store *store, uint64_t bytes,
	struct ctg_error *error);
/* -CTG_ENOMEM: such pages cannot be had on demand here. */
int posix_hugetlb_open_sparse(struct posix_store *store, ctg_pfn_t base, uint64_t bytes);
int posix_file_open(
	struct posix_store *store, const char *path, uint64_t bytes, struct ctg_error *error);
/* Any store; one that was never opened too. */
void posix_store_close(struct posix_store *store);
/* hugetlb.c: gives back what was raised. */
void posix_hugetlb_lower(struct posix_store *store);
/* shmem.c: a file of shared memory, sparse, in pages of 2 MiB if *large. A descriptor or negative
 * errno. */
int posix_shmem_open(const char *name, uint64_t bytes, bool *large);
/* memfd.c: one range, file order; maps [0, bytes) of store->fd. 0 or negative errno. */
int posix_store_map_linear(struct posix_store *store, ctg_pfn_t base, uint64_t bytes);
/* hugetlb.c: physical frame numbers of nr pages of `page` bytes from addr on, by
 * /proc/self/pagemap. 0; -CTG_EPERM: this process may not know. */
int posix_pagemap(const void *addr, uint64_t nr, uint64_t page, uint64_t *pfn);

/* copy.c */
int posix_copier_start(struct ctg_region *region, unsigned threads);
void posix_copier_end(struct ctg_region *region);
/* Thread ids of the copy threads, at most max. Returns how many. */
size_t posix_copier_tids(const struct ctg_region *region, pid_t *tids, size_t max);
/* Call fn for pieces 0 .. nr - 1 on the copy threads and this one; the first error, or 0. */
int posix_copier_run(
	struct ctg_region *region, int (*fn)(void *arg, size_t piece), void *arg, size_t nr);
int posix_copy(void *host, const struct ctg_copy_run *runs, size_t nr);
int posix_zero(void *host, ctg_pfn_t pfn, uint64_t nr);
void posix_discard(void *host, ctg_pfn_t pfn, uint64_t nr);

/* host.c */
void posix_host_hooks(struct ctg_port *port);
int posix_meta_init(struct ctg_region *region);
void posix_meta_end(struct ctg_region *region);
/* Memory that is safe to take while other threads of this process are stopped, zeroed. */
void *posix_meta_alloc(void *host, size_t bytes, size_t align);
void posix_meta_free(void *host, void *p, size_t bytes);
uint64_t posix_meta_bytes(const struct ctg_region *region);
pid_t posix_gettid(void);
uint64_t posix_now(void *host);

/* port.c */
/* Carry out operations however long it takes while the process lives. lock held. */
void posix_space_must(struct posix_space *space, const struct posix_op *ops, size_t nr);

/* guard.c: with space->lock held */
/* Keep writers out of all the ranges, or of none of them. */
int posix_space_protect(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr);
/* A mapping was replaced: let those go on who waited for it. */
void posix_space_wake(struct posix_space *space, uint64_t addr, uint64_t bytes);
/* Nothing moves any more, perhaps: then the threads go on. */
void posix_space_settle(struct posix_space *space);
/* Would tlb_install, called now by this thread, replace a mapping that writers may have used since
 * the copy, because they were let go on too early? */
bool posix_self_spoiled(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr);
/* The calling thread is about to sleep: let stopped threads go on, it may wait for one of them. */
void posix_self_stop_break(struct ctg_region *region);
/* Is a batch of this thread under way whose threads were let go on too early? */
bool posix_self_stop_broken(const struct ctg_region *region);

/* space.c, with space->lock held */
bool posix_ranges_overlap(const struct posix_range *list, uint64_t addr, uint64_t bytes);
/* Add; puts one by for a split. 0 or -CTG_ENOMEM. */
int posix_ranges_add(struct posix_space *space, struct posix_range **list, uint64_t addr,
	uint64_t bytes, uint64_t since);
/* Take [addr, addr + bytes) out of the list, wherever it overlaps. Returns the earliest `since` of
 * what was taken out, UINT64_MAX if nothing was. Cannot fail. */
uint64_t posix_ranges_remove(
	struct posix_space *space, struct posix_range **list, uint64_t addr, uint64_t bytes);
/* The number of the chunk of addr, which must be in the window. */
static inline uint64_t posix_chunk_of(const struct posix_space *space, uint64_t addr)
{
	return (addr - space->window) / POSIX_CHUNK;
}
static inline bool posix_chunk_private(const struct posix_space *space, uint64_t chunk)
{
	return (space->private_chunks[chunk / 8] >> (chunk % 8) & 1) != 0;
}

/* local.c */
void posix_local_end(struct ctg_region *region);

#endif
