/* SPDX-License-Identifier: MIT */
/*
 * Areas: memory that is lent to movable users and taken back, contiguous, on request.
 */
#ifndef CONTIG_CMA_H
#define CONTIG_CMA_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CTG_CMA_MAX_RANGES 64
#define CTG_CMA_NAME_MAX 32
/* Of a pin's owner in reports, with the zero at the end. */
#define CTG_PIN_OWNER_MAX 32

struct ctg_cma_config {
	const char *name;                /* copied; at most CTG_CMA_NAME_MAX - 1 bytes; not empty */
	const struct ctg_extent *ranges; /* populated, reserved memory of one zone */
	size_t nr_ranges;                /* 1 to CTG_CMA_MAX_RANGES */
	unsigned order_per_bit;          /* granularity of requests: 0 to CTG_PAGEBLOCK_ORDER */
	bool zeroed;                     /* the memory is known to read as zero */
};

/* How hard to try when a frame in the way is held. */
enum ctg_mode {
	CTG_MODE_NORMAL, /* drain, look again a bounded number of times, then the next window */
	CTG_MODE_FAST,   /* no drains, no second look: the next window at once */
};

enum ctg_alloc_flags {
	/* Contents may be whatever a borrower left there. Without it a buffer reads as zero. */
	CTG_ALLOC_NO_ZERO = 1 << 0,
	/* First fit instead of least cost, to compare with. */
	CTG_ALLOC_FIRST_FIT = 1 << 1,
};

/* What stood in the way. */
enum ctg_obstacle_kind {
	CTG_OBSTACLE_NONE,
	CTG_OBSTACLE_PIN,        /* a DMA pin */
	CTG_OBSTACLE_REF,        /* a plain reference */
	CTG_OBSTACLE_MAP,        /* a mapping that no reverse map accounts for */
	CTG_OBSTACLE_UNMOVABLE,  /* an unmovable allocation */
	CTG_OBSTACLE_ISOLATED,   /* another allocation is at work in the block */
	CTG_OBSTACLE_PORT,       /* the port refused to restrict or install */
	CTG_OBSTACLE_NO_MEMORY,  /* no destination */
	CTG_OBSTACLE_MOVING,     /* it is being migrated by somebody else */
	CTG_OBSTACLE_CACHED,     /* free, in a CPU's cache, which FAST does not drain */
};

/* The account of one allocation. */
struct ctg_alloc_report {
	int result;                 /* what the call returned */
	uint64_t windows_tried;
	uint64_t frames_moved;      /* copied, in all windows */
	uint64_t frames_free;       /* taken without a copy, in the window that was taken */
	uint64_t ns_search, ns_isolate, ns_copy, ns_install, ns_zero, ns_total;
	enum ctg_obstacle_kind obstacle; /* the last one met */
	ctg_pfn_t obstacle_pfn;     /* CTG_PFN_NONE when there was none */
	uint64_t obstacle_word;     /* the frame's word at that moment */
	/* Of a pin, if the call failed with -EBUSY and a handle (pin.h) is why: whose and since when.
	 * Empty and 0 otherwise. */
	char obstacle_owner[CTG_PIN_OWNER_MAX];
	uint64_t obstacle_since;
};

/* One request. Zero-initialise; zero fields are the defaults. */
struct ctg_alloc_request {
	enum ctg_mode mode;
	unsigned flags;       /* enum ctg_alloc_flags */
	unsigned align_order; /* of the pfn returned */
	ctg_pfn_t limit;      /* no frame at or above it (a DMA mask); 0: none */
	uint64_t boundary;    /* frames, a power of two that must not be crossed; 0: none */
	uint64_t deadline;    /* of the port's clock; 0: none */
	const struct ctg_word32 *cancel; /* becomes non-zero: give up with -EINTR; may be NULL */
	struct ctg_alloc_report *report; /* filled in any case; may be NULL */
};

/*
 * Make an area over populated, reserved memory, and lend it at once.
 * Context: may sleep; may run while other areas are in use.
 * Returns 0; -EINVAL: base or size not a multiple of the pageblock, zero, wrapping, outside every
 * zone or in a hole, spanning zones, ranges or areas that overlap, not reserved, bad
 * order_per_bit or name; -EEXIST: the name is taken; -ENOSPC: CTG_MAX_AREAS; -ENOMEM. On failure
 * nothing has changed.
 */
int ctg_cma_create(struct ctg *ctg, const struct ctg_cma_config *config, struct ctg_cma **out);

/*
 * Call fn for each area, in the order of creation, until it returns non-zero.
 * Returns that value, or 0. fn may allocate and release, not create.
 */
int ctg_cma_for_each(struct ctg *ctg, int (*fn)(struct ctg_cma *cma, void *arg), void *arg);

const char *ctg_cma_name(const struct ctg_cma *cma);

/*
 * Take nr frames (rounded up to the area's granularity), contiguous, out of the area: in the window
 * that costs least, moving what has been lent there.
 * @request: may be NULL: NORMAL, zeroed, no alignment beyond the granularity.
 * @pfn: first frame. Ownership: the caller's until ctg_cma_release; each frame has one plain
 * reference.
 * Context: may sleep; no lock held. Any number of callers; they do not wait for each other.
 * Returns 0; -EINVAL: NULL area, nr 0, unknown mode or flags, impossible alignment or boundary;
 * -ENOMEM: no run of unallocated frames fits, or no room for what has to move; -EBUSY: there
 * is one, and something held it; -ETIMEDOUT; -EINTR. On failure everything is as before.
 */
int ctg_cma_alloc(struct ctg_cma *cma, uint64_t nr, const struct ctg_alloc_request *request,
	ctg_pfn_t *pfn);

/*
 * Give back [pfn, pfn + nr), the whole of an allocation or a part, multiples of the granularity
 * (the last part of an allocation may be given as it was asked for).
 * Frames somebody else still holds stay in use until the last holder leaves; `held`, if not NULL,
 * gets their number.
 * Context: may take short locks; sleeps only if the port's discard does.
 * Returns 0, or -EINVAL (NULL area, zero, foreign, not allocated, crosses the end of an
 * allocation): nothing changed.
 */
int ctg_cma_release(struct ctg_cma *cma, ctg_pfn_t pfn, uint64_t nr, uint64_t *held);

struct ctg_cma_stat {
	uint64_t nr;           /* frames of the area */
	uint64_t nr_allocated; /* taken by ctg_cma_alloc, rounded to granularity */
	uint64_t nr_free;      /* nobody's */
	uint64_t nr_lent;      /* in use by movable memory: nr - allocated - free */
	uint64_t longest_unallocated; /* frames: the largest request that placement could grant */
	uint64_t longest_free;        /* frames: the largest request that needs no copy, exact */
	unsigned order_per_bit;
	size_t nr_ranges;
	struct ctg_extent ranges[CTG_CMA_MAX_RANGES];
	/* calls and frames since creation */
	uint64_t alloc_success, alloc_fail, frames_allocated, frames_released, frames_moved;
};
/* Context: takes the area's and the zone's lock for a moment each; drains caches. */
void ctg_cma_stat(struct ctg_cma *cma, struct ctg_cma_stat *out);

/*
 * Take exactly [start, start + nr), which may lie in any zone and need not be an area's: isolate,
 * drain, migrate, verify, take, give back the edges. Each frame then has one plain reference.
 * Inside an area use ctg_cma_alloc: this function does not look at the area's bitmap.
 * Undo covers what this call did and nothing else.
 * Context: may sleep; no lock held.
 * Returns 0; -EINVAL: zero, wrapping, outside a zone, a hole; -EBUSY, -ENOMEM, -ETIMEDOUT, -EINTR
 * as ctg_cma_alloc. On failure everything is as before.
 */
int ctg_alloc_contig_range(struct ctg *ctg, ctg_pfn_t start, uint64_t nr,
	const struct ctg_alloc_request *request);

/*
 * Drop the plain reference of each frame of [start, start + nr) taken by ctg_alloc_contig_range.
 * Frames somebody else holds stay until the last holder leaves; counted in `held` if not NULL.
 * Returns 0 or -EINVAL (a frame of the range was not taken so: nothing changed).
 */
int ctg_free_contig_range(struct ctg *ctg, ctg_pfn_t start, uint64_t nr, uint64_t *held);

#ifdef __cplusplus
}
#endif
#endif
