/* SPDX-License-Identifier: MIT */
/*
 * Areas: what cma.c (their life, requests, releases) and place.c (which window) share.
 */
#ifndef CTG_AREA_H
#define CTG_AREA_H

#include "bitmap.h"
#include "core.h"

/*
 * One range. A bit stands for 2^order_per_bit frames. Three maps, all under area->lock:
 *
 *   taken  with a tree: whom placement must leave alone. Set before a window is worked on, cleared
 *          when that has failed, or after a release has freed the frames: so two callers never
 *          work on the same frames.
 *   owned  given to a caller, who may release it. A subset of taken. The release clears it before
 *          it drops the first reference, so a second release of the same frames is refused.
 *   last   of owned: the last bit of an allocation, which a release may not cross. How many frames
 *          of that bit were asked for is in the index of its first frame.
 */
struct ctg_area_range {
	ctg_pfn_t base;
	uint64_t nr; /* frames */
	struct ctg_bitmap taken;
	uint64_t nr_owned; /* bits */
	uint64_t *owned;
	uint64_t *last;
};

struct ctg_cma {
	struct ctg *ctg;
	struct ctg_zone *zone;
	struct ctg_lock lock;
	char name[CTG_CMA_NAME_MAX];
	unsigned order_per_bit;
	uint64_t nr;  /* frames */
	size_t bytes; /* of this and the maps: one piece of memory */
	struct {
		struct ctg_word64 alloc_success, alloc_fail, frames_allocated, frames_released,
			frames_moved;
	} counters;
	size_t nr_ranges;
	struct ctg_area_range ranges[CTG_CMA_MAX_RANGES];
};

/* The range of the area that pfn lies in, or NULL. */
static inline struct ctg_area_range *ctg_area_range_of(struct ctg_cma *cma, ctg_pfn_t pfn)
{
	for (size_t i = 0; i < cma->nr_ranges; i++)
		if (pfn - cma->ranges[i].base < cma->ranges[i].nr)
			return &cma->ranges[i];
	return NULL;
}

/* ---- place.c --------------------------------------------------------------------------------- */

/* What a window has to be: checked, in frames, without defaults. */
struct ctg_want {
	uint64_t nr;       /* whole bits */
	uint64_t align;    /* of the pfn; a power of two, a whole bit at least */
	ctg_pfn_t limit;   /* the first frame that may not be used */
	uint64_t boundary; /* a power of two, at least nr; 0: none */
};

#define CTG_AVOID_MAX 48
/*
 * Frames that no window may contain, sorted, as disjoint extents. Two obstacles closer than the
 * length of a window become one extent, which excludes nothing more. Only when the array is full
 * are the nearest two joined although a window would fit between them: the search may then miss
 * windows there, but it always ends.
 */
struct ctg_avoid {
	unsigned nr;
	struct ctg_extent at[CTG_AVOID_MAX];
};
void ctg_avoid_add(struct ctg_avoid *avoid, ctg_pfn_t pfn, uint64_t nr, uint64_t window);

struct ctg_search {
	struct ctg_want want;
	bool first_fit;
	bool use_held;           /* windows with held frames are the last resort, and it has come */
	struct ctg_avoid failed; /* obstacles that were met */
	struct ctg_avoid held;   /* frames that were seen to be held, and not tried */
	/* of the last search: the first block that another allocation has isolated */
	ctg_pfn_t isolated;
};

/* Is there a window of unallocated bits, whoever uses the frames? area->lock held. */
bool ctg_place_fits(struct ctg_cma *cma, const struct ctg_want *want);
/*
 * Choose a window of unallocated bits that contains nothing to avoid: one that is free as a whole,
 * else the one with the fewest frames in use. area->lock held; takes zone->lock.
 * CTG_PFN_NONE: there is none.
 */
ctg_pfn_t ctg_place_window(struct ctg_cma *cma, struct ctg_search *search);

/* ---- cma.c ----------------------------------------------------------------------------------- */

/* Are any frames of the range allocated out of an area, or about to be? Takes areas' locks. */
bool ctg_areas_overlap(struct ctg *ctg, ctg_pfn_t start, uint64_t nr);

/* ---- contig.c -------------------------------------------------------------------------------- */

/* The mode's number of looks at what could not be moved. */
unsigned ctg_mode_rounds(const struct ctg_alloc_request *request);
/* mode, flags, alignment and boundary that make sense for nr frames: 0 or -EINVAL. */
int ctg_request_validate(const struct ctg_alloc_request *request, uint64_t nr);
void ctg_report_init(struct ctg_alloc_report *report);

/*
 * The first frame of [start, start + nr) that somebody holds otherwise than by mapping it, without
 * locks: a hint, to spare a window whose frames are pinned. CTG_PFN_NONE: none seen.
 * Fills the obstacle of the report if there is one.
 */
ctg_pfn_t ctg_contig_look(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report);

/*
 * Wait, in NORMAL for a few milliseconds, until nothing of the range is held, so that nothing is
 * moved in vain. 0; -EBUSY, -ETIMEDOUT, -EINTR.
 */
int ctg_contig_wait_unheld(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report);

/*
 * Drop one plain reference of each frame of a range whose frames are all CONTIG and free those that
 * nobody else holds, in runs. Returns the number of those that somebody does.
 */
uint64_t ctg_contig_put(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr);

/*
 * Blocks that an allocation had isolated are accessible again: wake those who wait for that. To be
 * called when nothing of the attempt is left, bits included.
 */
void ctg_isolation_ended(struct ctg_zone *zone);
/*
 * Sleep until some allocation in the zone ends, given the value of zone->isolation_ended before the
 * caller looked. *until: 0 at the first call, then when patience ends. 0: look again; -EBUSY:
 * waited long enough; -ETIMEDOUT, -EINTR: of the request.
 */
int ctg_isolation_wait(struct ctg_zone *zone, uint32_t seen, uint64_t *until,
	const struct ctg_alloc_request *request);

#endif
