/* SPDX-License-Identifier: MIT */
/* Counters, trace events, and the picture of memory by pageblock. */
#include "core.h"

void ctg_counters_read(struct ctg *ctg, struct ctg_counters *out)
{
	if (ctg == NULL || out == NULL)
		return;
#define READ(name) out->name = ctg_load64_relaxed(&ctg->counters.name)
	READ(cma_alloc_success);
	READ(cma_alloc_fail);
	READ(cma_frames_allocated);
	READ(cma_frames_released);
	READ(frames_migrated);
	READ(migrate_fail);
	READ(frames_returned);
	READ(faults);
	READ(faults_waited);
	READ(frames_zeroed);
	READ(batches_helped);
	READ(cache_drains);
#undef READ
}

void ctg_trace(struct ctg *ctg, enum ctg_event_kind kind, ctg_pfn_t pfn, uint64_t nr,
	uint64_t value, const char *area)
{
	struct ctg_event event = {.kind = kind, .pfn = pfn, .nr = nr, .value = value, .area = area};

	if (ctg->port.trace == NULL)
		return;
	event.time = ctg->port.now(ctg->port.host);
	ctg->port.trace(ctg->port.host, &event);
}

static void describe(
	const struct ctg_zone *zone, const struct ctg_block *block, struct ctg_block_info *out)
{
	uint64_t index = (uint64_t)(block - zone->blocks);

	*out = (struct ctg_block_info){
		.pfn = zone->base + (index << CTG_PAGEBLOCK_ORDER),
		.present = block->present,
		.isolated = block->isolated_by != NULL,
		.migratetype = (enum ctg_migratetype)block->migratetype,
	};
	if (!block->present)
		return;
	out->nr_free = block->nr_free;
	out->nr_taken = block->nr_contig;
	out->nr_in_use = (uint32_t)CTG_PAGEBLOCK_FRAMES - out->nr_free - out->nr_taken;
}

/* Pageblocks that are described under one hold of the lock. */
#define READ_BATCH 64

size_t ctg_blocks_read(struct ctg *ctg, ctg_pfn_t pfn, struct ctg_block_info *out, size_t max)
{
	struct ctg_zone *zone;
	uint64_t first, nr;

	if (ctg == NULL || out == NULL)
		return 0;
	zone = ctg_zone_of(ctg, pfn);
	if (zone == NULL)
		return 0;
	first = (pfn - zone->base) >> CTG_PAGEBLOCK_ORDER;
	nr = zone->nr_blocks - first;
	if (nr > max)
		nr = max;
	for (uint64_t done = 0; done < nr;) {
		ctg_lock(&ctg->port, &zone->lock);
		for (unsigned i = 0; i < READ_BATCH && done < nr; i++, done++)
			describe(zone, &zone->blocks[first + done], &out[done]);
		ctg_unlock(&ctg->port, &zone->lock);
	}
	return (size_t)nr;
}
