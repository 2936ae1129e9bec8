/* SPDX-License-Identifier: MIT */
/* Counters, trace events, and the picture of memory by pageblock. */
#ifndef CONTIG_STAT_H
#define CONTIG_STAT_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Since ctg_create; each is exact, and together they agree with the trace. */
struct ctg_counters {
	uint64_t cma_alloc_success, cma_alloc_fail; /* calls */
	uint64_t cma_frames_allocated, cma_frames_released;
	uint64_t frames_migrated;      /* frames that moved, for whatever reason */
	uint64_t migrate_fail;         /* frames that could not be moved when tried */
	uint64_t frames_returned;      /* of the migrated: from spill zones back home */
	uint64_t faults, faults_waited; /* faults that waited for a migration */
	uint64_t frames_zeroed;
	uint64_t batches_helped;       /* unmap batches flushed by somebody else */
	uint64_t cache_drains;
};
/* Context: any. Not a snapshot of one instant while others run. */
void ctg_counters_read(struct ctg *ctg, struct ctg_counters *out);

enum ctg_event_kind {
	CTG_EVENT_CMA_ALLOC_START,  /* pfn: none; nr; value: align_order */
	CTG_EVENT_CMA_ALLOC_BUSY,   /* pfn: obstacle; nr: window; value: the frame's word */
	CTG_EVENT_CMA_ALLOC_FINISH, /* pfn or none; nr; value: result as int64_t */
	CTG_EVENT_CMA_RELEASE,      /* pfn; nr; value: frames still held */
	CTG_EVENT_MIGRATE,          /* pfn: source; nr; value: destination */
};
struct ctg_event {
	enum ctg_event_kind kind;
	uint64_t time; /* ns */
	ctg_pfn_t pfn;
	uint64_t nr;
	uint64_t value;
	const char *area; /* name, or NULL */
};

/* One pageblock, for maps of memory. */
struct ctg_block_info {
	ctg_pfn_t pfn;
	bool present;
	bool isolated;
	enum ctg_migratetype migratetype; /* as it is when not isolated */
	uint32_t nr_free;   /* frames of the block that are free */
	uint32_t nr_taken;  /* frames taken by contiguous allocations */
	uint32_t nr_in_use; /* the rest: movable memory in an area is lent */
};
/*
 * Describe the pageblocks from pfn on, `max` of them at most, into an array of the caller's.
 * Returns how many were described (0: pfn outside every zone). Context: any; racy by nature.
 */
size_t ctg_blocks_read(struct ctg *ctg, ctg_pfn_t pfn, struct ctg_block_info *out, size_t max);

#ifdef __cplusplus
}
#endif
#endif
