/* SPDX-License-Identifier: MIT */
/*
 * A machine: the zones of memory that the core knows, and the port it runs on.
 *
 * Set-up is single-threaded: ctg_create, then ctg_zone_add and ctg_zone_populate for each stretch
 * of memory, then ctg_zone_release for what is ordinary memory and ctg_cma_create (cma.h) for
 * what is lent. After that everything may run concurrently.
 */
#ifndef CONTIG_MACHINE_H
#define CONTIG_MACHINE_H

#include <contig/port.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CTG_MAX_ZONES 8
#define CTG_MAX_AREAS 64
#define CTG_FRAME_METADATA_BYTES 32

/* What a zone is for. */
enum ctg_zone_flags {
	/* Takes only what has to leave an area (CTG_GFP_SPILL); see ctg_migrate_home. */
	CTG_ZONE_SPILL = 1 << 0,
	/* Tell the port (discard) when frames of the zone become free. */
	CTG_ZONE_DISCARD = 1 << 1,
};

struct ctg_zone_config {
	ctg_pfn_t base; /* first frame; a multiple of the pageblock */
	uint64_t nr;    /* frames that the zone spans, holes included; a multiple of the pageblock */
	unsigned flags; /* enum ctg_zone_flags */
	/* Smallest order that can be mapped (hugetlb: 9). 0 or CTG_PAGEBLOCK_ORDER. */
	unsigned map_order;
	/*
	 * Metadata: ctg_zone_metadata_bytes(nr) bytes, zeroed, aligned to 64, the caller's, to
	 * outlive the machine. What belongs to holes is never touched, so it may be sparse.
	 */
	void *metadata;
};

/*
 * Make a machine.
 * @port: copied; its host must outlive the machine. All hooks but discard and trace are required.
 * @out: the machine; ctg_destroy frees it.
 * Context: may sleep. Single-threaded.
 * Returns 0, -EINVAL (a hook is missing, nr_cpus or batch_pages out of range) or -ENOMEM.
 */
int ctg_create(const struct ctg_port *port, struct ctg **out);

/*
 * Destroy a machine: frees its areas and everything from meta_alloc. Address spaces must have been
 * destroyed. NULL is allowed. Context: nothing else may use the machine.
 */
void ctg_destroy(struct ctg *ctg);

/* The port that ctg_create copied: for ports that find their host from a machine. Never NULL. */
const struct ctg_port *ctg_port_of(const struct ctg *ctg);

/*
 * Bytes of metadata for a zone that spans nr frames: 32 a frame, and a summary a pageblock
 * (less than 0.4 % of that). 0 when nr is 0, not a multiple of the pageblock, or too large.
 */
size_t ctg_zone_metadata_bytes(uint64_t nr);

/*
 * Add a zone, all of it a hole at first.
 * Zones may not overlap. The order in which zones are added is the order in which allocations
 * try them.
 * Context: set-up (single-threaded). May sleep.
 * Returns 0; -EINVAL: unaligned, empty, wrapping, overlapping another zone, bad map_order;
 * -ENOSPC: CTG_MAX_ZONES.
 */
int ctg_zone_add(struct ctg *ctg, const struct ctg_zone_config *config, struct ctg_zone **out);

/*
 * Declare [pfn, pfn + nr) of a zone to be memory, reserved until released or made an area.
 * Multiples of the pageblock. Context: set-up.
 * Returns 0 or -EINVAL (unaligned, outside the zone, populated before).
 */
int ctg_zone_populate(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr);

/*
 * Free populated, reserved memory into the buddy allocator as ordinary movable memory.
 * Multiples of the pageblock. zeroed: the frames are known to read as zero.
 * Context: set-up or later. May take the zone's lock.
 * Returns 0 or -EINVAL (unaligned, outside, not populated, not reserved).
 */
int ctg_zone_release(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed);

struct ctg_zone_stat {
	ctg_pfn_t base;
	uint64_t nr_spanned; /* frames, holes included */
	uint64_t nr_present; /* frames that are memory */
	uint64_t nr_free;    /* in the buddy lists, isolated ones not counted */
	uint64_t nr_free_cma; /* of them in areas */
	uint64_t nr_isolated_free;
	uint64_t nr_pcp; /* in per-CPU caches */
	uint64_t free_blocks[CTG_NR_ORDERS][CTG_NR_MIGRATETYPES];
	uint64_t longest_free; /* longest run of free frames, exact; caches drained first */
	ctg_pfn_t longest_free_pfn;
};

/* A consistent snapshot (taken under the zone's lock). Drains the per-CPU caches. May sleep. */
void ctg_zone_stat(struct ctg_zone *zone, struct ctg_zone_stat *out);

/* What an allocation asks for; see ctg_alloc_frames. */
enum ctg_gfp {
	CTG_GFP_MOVABLE = 1 << 0, /* the frames will be reached through page tables only */
	CTG_GFP_ZERO = 1 << 1,    /* contents must read as zero */
	CTG_GFP_NO_CMA = 1 << 2,  /* not from an area (a long-term pin is coming) */
	CTG_GFP_NO_ORDINARY = 1 << 3, /* only from areas */
	CTG_GFP_SPILL = 1 << 4,   /* spill zones too, last */
};

/*
 * Allocate 2^order consecutive frames, aligned to their size, held by one plain reference on the
 * head.
 * @order: 0 to CTG_MAX_ORDER.
 * @gfp: enum ctg_gfp. Without CTG_GFP_MOVABLE the frames are unmovable and never from an area.
 * @pfn: the first frame.
 * Context: any that may take a short lock; sleeps only if the port's zero does (CTG_GFP_ZERO) or
 * a lock is contended.
 * Returns 0, -EINVAL (order, flags that exclude each other), or -ENOMEM; what zero returned.
 */
int ctg_alloc_frames(struct ctg *ctg, unsigned order, unsigned gfp, ctg_pfn_t *pfn);

/*
 * Drop the plain reference that ctg_alloc_frames gave; frees the block when it was the last holder.
 * Context: as ctg_alloc_frames.
 * Returns 0, or -EINVAL when pfn is not the head of such an allocation or nobody holds a
 * reference on it (a double free): reported, nothing changed.
 */
int ctg_free_frames(struct ctg *ctg, ctg_pfn_t pfn);

/* Empty the per-CPU caches of every CPU into the buddy lists. Any CPU may do it. */
void ctg_drain_caches(struct ctg *ctg);

#ifdef __cplusplus
}
#endif
#endif
