/* SPDX-License-Identifier: MIT */
/*
 * Isolation of pageblocks: what is free there leaves the lists that requests are served from, and
 * what is freed there stays.
 *
 * Per-CPU caches. ctg_pcp_free looks, under its pcp->lock, whether the frame's block is isolated.
 * A drain takes each pcp->lock once. So of a frame that is freed around an isolation followed by a
 * drain, one of two is true: the free held the lock before the drain took it, and the drain finds
 * the frame; or it took the lock after, hence after the isolation, sees it and bypasses the cache.
 * A refill holds the pcp->lock from before it takes frames off the lists until they are in the
 * cache, so the same holds for it. After ctg_block_isolate and ctg_pcp_drain no frame of the block
 * is in a cache or gets into one.
 */
#include "buddy.h"

void ctg_block_move_free(struct ctg_zone *zone, ctg_pfn_t start, enum ctg_migratetype mt)
{
	struct ctg_block *block = ctg_zone_block(zone, start);
	ctg_pfn_t end = start + CTG_PAGEBLOCK_FRAMES;
	uint32_t info = 0;

	if (block->nr_free == CTG_PAGEBLOCK_FRAMES) {
		ctg_pfn_t head = ctg_buddy_find(zone, start, &info);
		ctg_pfn_t past = head + ((uint64_t)1 << ctg_info_order(info));
		enum ctg_migratetype old = (enum ctg_migratetype)ctg_info_mt(info);
		bool zeroed = (ctg_info_flags(info) & CTG_FRAME_ZEROED) != 0;

		CTG_ASSERT(head != CTG_PFN_NONE && past >= end);
		ctg_buddy_unlink(zone, head, info);
		ctg_buddy_link_pieces(zone, head, start, old, zeroed);
		ctg_buddy_link(zone, start, CTG_PAGEBLOCK_ORDER, mt, zeroed);
		ctg_buddy_link_pieces(zone, end, past, old, zeroed);
		return;
	}
	if (block->nr_free == 0)
		return;
	for (ctg_pfn_t p = start; p < end; p += ctg_info_step(info)) {
		info = ctg_load32_relaxed(&ctg_zone_frame(zone, p)->info);
		if (ctg_info_state(info) != CTG_FRAME_FREE)
			continue;
		ctg_buddy_unlink(zone, p, info);
		ctg_buddy_link(zone, p, ctg_info_order(info), mt,
			(ctg_info_flags(info) & CTG_FRAME_ZEROED) != 0);
	}
}

int ctg_block_isolate(struct ctg_zone *zone, ctg_pfn_t pfn, const void *owner)
{
	const struct ctg_port *port = &zone->ctg->port;
	struct ctg_block *block;
	int ret = 0;

	CTG_ASSERT(owner != NULL);
	if (pfn - zone->base >= zone->nr)
		return -CTG_EINVAL;
	pfn = ctg_block_start(pfn);
	block = ctg_zone_block(zone, pfn);
	ctg_lock(port, &zone->lock);
	if (!block->released) {
		ret = -CTG_EINVAL;
	} else if (block->isolated_by != NULL) {
		ret = -CTG_EBUSY;
	} else {
		ctg_block_move_free(zone, pfn, CTG_MIGRATE_ISOLATE);
		ctg_hint_store(&block->isolated_by, owner);
		ctg_runs_mark(zone, pfn, CTG_PAGEBLOCK_FRAMES);
	}
	ctg_unlock(port, &zone->lock);
	return ret;
}

void ctg_block_unisolate(struct ctg_zone *zone, ctg_pfn_t pfn, const void *owner)
{
	const struct ctg_port *port = &zone->ctg->port;
	struct ctg_block *block = ctg_zone_block(zone, pfn);
	enum ctg_migratetype mt;
	uint32_t info;

	pfn = ctg_block_start(pfn);
	ctg_lock(port, &zone->lock);
	CTG_ASSERT(owner != NULL && block->isolated_by == owner);
	mt = (enum ctg_migratetype)block->migratetype;
	ctg_block_move_free(zone, pfn, mt);
	ctg_hint_store(&block->isolated_by, NULL);
	/* Only a wholly free block can have gained a buddy: inside, all had been merged. */
	if (block->nr_free == CTG_PAGEBLOCK_FRAMES) {
		info = ctg_load32_relaxed(&ctg_zone_frame(zone, pfn)->info);
		ctg_buddy_unlink(zone, pfn, info);
		ctg_buddy_merge(zone, pfn, CTG_PAGEBLOCK_ORDER, mt,
			(ctg_info_flags(info) & CTG_FRAME_ZEROED) != 0);
	}
	ctg_runs_mark(zone, pfn, CTG_PAGEBLOCK_FRAMES);
	ctg_unlock(port, &zone->lock);
}
