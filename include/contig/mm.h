/* SPDX-License-Identifier: MIT */
/*
 * Address spaces with anonymous memory.
 *
 * The page table is the only record of an address space: an entry is EMPTY (nothing may be
 * here), RESERVED (mapped, no frame yet; whole 2 MiB or 1 GiB slots are one entry), or PRESENT.
 * Addresses are in pages (vpn), below CTG_MM_MAX_VPN.
 */
#ifndef CONTIG_MM_H
#define CONTIG_MM_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CTG_MM_MAX_VPN ((ctg_vpn_t)1 << 36) /* 48-bit addresses */

enum ctg_prot {
	CTG_PROT_NONE = 0,
	CTG_PROT_READ = 1 << 0,
	CTG_PROT_WRITE = 1 << 1, /* implies read */
};

struct ctg_mm_config {
	void *owner;  /* the port's or program's own; ctg_mm_owner returns it */
	unsigned gfp; /* where frames come from: CTG_GFP_NO_CMA, CTG_GFP_NO_ORDINARY, CTG_GFP_SPILL */
	/*
	 * Smallest order to map: 0, or CTG_PAGEBLOCK_ORDER when the port can map nothing smaller;
	 * every address and length must then be a multiple of it.
	 */
	unsigned map_order;
	/* Largest order to map: 0 for CTG_PAGEBLOCK_ORDER, or CTG_MAX_ORDER (frames of 1 GiB). */
	unsigned max_order;
	struct ctg_group *group; /* charged for its frames (group.h); NULL: nobody is */
};

/* What is at an address now; see ctg_mm_lookup. */
struct ctg_mapping {
	ctg_vpn_t vpn; /* start of the run */
	uint64_t nr;   /* pages that are alike: consecutive frames, the same rights; or empty */
	ctg_pfn_t pfn; /* frame of vpn; CTG_PFN_NONE when not present */
	unsigned prot; /* enum ctg_prot: what an access may do now without a fault */
	bool reserved; /* mapped, but no frame yet */
	bool moving;   /* a migration is copying it: writes wait */
};

/*
 * Make an empty address space, with its own anonymous memory (not shared with any other).
 * Ownership: the caller's, until ctg_mm_destroy. Context: may sleep.
 * Returns 0, -EINVAL (map_order, max_order, gfp, a group of another machine), -ENOMEM.
 */
int ctg_mm_create(struct ctg *ctg, const struct ctg_mm_config *config, struct ctg_mm **out);

/*
 * Fork: a new space of the parent's family with the same mappings. Anonymous frames are shared
 * copy-on-write; a frame that is pinned is copied now, after no CPU can write it any more, and the
 * parent keeps the original. New frames are charged to the child's group.
 * @config: of the child: owner, group; gfp, map_order and max_order are the parent's.
 * The port is told nothing about the child: its accesses fault. But a migration may have it restrict
 * and install pages of the child before this returns.
 * Context: may sleep; takes the parent's lock.
 * Returns 0; -EINVAL (NULL, a group of another machine); -ENOMEM; -ENOSPC: the child's group is at its limit; -EOVERFLOW: a frame is mapped too
 * often; what the port's copy returned. On failure there is no child and the parent is as before.
 */
int ctg_mm_fork(
	struct ctg_mm *parent, const struct ctg_mm_config *config, struct ctg_mm **child);

/*
 * Unmap everything, flush what is batched, free the address space. The port is told nothing about
 * the mappings if `dead` (the process is gone: no access can happen). Waits for reverse-map
 * walks that are looking at it. NULL is allowed. Context: may sleep.
 */
void ctg_mm_destroy(struct ctg_mm *mm, bool dead);

void *ctg_mm_owner(const struct ctg_mm *mm);
struct ctg *ctg_mm_machine(const struct ctg_mm *mm);

/*
 * Reserve [vpn, vpn + nr) for anonymous memory with rights prot. Nothing is allocated but page
 * tables. Context: may sleep; takes the mm's lock.
 * Returns 0; -EINVAL: empty, wrapping, unaligned to map_order, beyond CTG_MM_MAX_VPN, unknown
 * prot; -EEXIST: something is mapped there; -ENOMEM.
 */
int ctg_mmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot);

/*
 * Unmap [vpn, vpn + nr), holes allowed. Frames go to a batch and are free after a flush, which
 * happens here before the return, or by whoever needs them first.
 * Context: may sleep. Returns 0, -EINVAL, or -ENOMEM (a large entry had to be split and there was
 * no memory for the table) or -EOVERFLOW (or its frame is mapped too often): nothing unmapped.
 */
int ctg_munmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);

/* As ctg_munmap, but what was mapped becomes RESERVED: it reads as zero when touched next. */
int ctg_madvise_dontneed(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);

/*
 * Change the rights of what is mapped in [vpn, vpn + nr). Narrowing is in force when it returns.
 * Context: may sleep. Returns 0, -EINVAL, -ENOMEM (part of the range is not mapped, or no memory
 * to split a large entry), -EOVERFLOW as ctg_munmap, or what the port's tlb_install returned: then
 * nothing has changed.
 */
int ctg_mprotect(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot);

/*
 * Back every RESERVED page of [vpn, vpn + nr) with zeroed frames, the largest that are free first,
 * and install the mapping. Partial success is kept; a run that the port could not install is
 * RESERVED again, but for pages that have been written to or are held.
 * @nr_present: if not NULL, pages of the range that have a frame at the end.
 * Context: may sleep. Returns 0 when all of the range has frames; -ENOMEM; -ENOSPC: the group is at
 * its limit; -EFAULT: part is not mapped; -EINVAL.
 */
int ctg_mm_populate(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, uint64_t *nr_present);

/*
 * The fault handler: make an access to vpn possible (allocate a zeroed frame, the largest that
 * suits; wait for a migration to end if it is a write; end copy-on-write if it is a write, by a copy
 * unless nobody else has the frame). The port calls it when an access finds no
 * valid mapping, then looks the entry up again.
 * Context: may sleep; no lock held. killable waits.
 * Returns 0; -EFAULT: nothing mapped or the rights forbid it; -ENOMEM; -ENOSPC: the group is at its
 * limit; -EOVERFLOW: the frame is mapped or held too often; -EINTR.
 */
int ctg_handle_fault(struct ctg_mm *mm, ctg_vpn_t vpn, bool write);

/*
 * What is mapped at vpn, as a run of at most max_nr pages that are alike. Takes no lock: it is what
 * was true at some moment during the call, for each page.
 * Context: any. Returns 0 or -EINVAL (vpn out of range, max_nr 0).
 */
int ctg_mm_lookup(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t max_nr, struct ctg_mapping *out);

/* Mark accessed (and dirty) what an access has used; ports without hardware bits call this. */
void ctg_mm_mark_accessed(struct ctg_mm *mm, ctg_vpn_t vpn, bool dirty);

struct ctg_mm_stat {
	uint64_t nr_present; /* pages */
	uint64_t nr_lent;    /* of them in areas */
	uint64_t nr_spilled; /* of them in spill zones */
	uint64_t nr_tables;
};
void ctg_mm_stat(struct ctg_mm *mm, struct ctg_mm_stat *out);

/*
 * Move what lies in spill zones back into areas (or other ordinary memory), the largest frames
 * first, until `budget` frames have moved or no room is left. What cannot move stays.
 * @moved: frames that moved. Context: may sleep; any thread.
 * Returns 0 (nothing is left in spill zones), -EAGAIN (the budget ended it), -ENOMEM (no room),
 * -EBUSY (what is left is held).
 */
int ctg_migrate_home(struct ctg *ctg, uint64_t budget, uint64_t *moved);

#ifdef __cplusplus
}
#endif
#endif
