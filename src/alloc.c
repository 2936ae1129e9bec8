/* SPDX-License-Identifier: MIT */
/* Allocation over the zones of a machine, and the way back of a block that nobody holds. */
#include "core.h"

#define GFP_ALL                                                                                    \
	((unsigned)(CTG_GFP_MOVABLE | CTG_GFP_ZERO | CTG_GFP_NO_CMA | CTG_GFP_NO_ORDINARY |        \
		    CTG_GFP_SPILL))

static bool gfp_valid(unsigned gfp)
{
	if ((gfp & ~GFP_ALL) != 0)
		return false;
	/* Areas serve movable requests only, so such a request could never be served. */
	if ((gfp & CTG_GFP_NO_ORDINARY) != 0)
		return (gfp & CTG_GFP_MOVABLE) != 0 && (gfp & CTG_GFP_NO_CMA) == 0;
	return true;
}

static int alloc_in_zone(struct ctg_zone *zone, unsigned max_order, unsigned min_order,
	unsigned gfp, ctg_pfn_t *pfn, unsigned *order, bool *zeroed)
{
	if (zone->map_order > max_order)
		return -CTG_ENOMEM;
	if (min_order < zone->map_order)
		min_order = zone->map_order;
	if (max_order == 0) {
		*order = 0;
		return ctg_pcp_alloc(zone, gfp, pfn, zeroed);
	}
	return ctg_buddy_alloc(zone, max_order, min_order, gfp, pfn, order, zeroed);
}

/* Try the zones in their order, spill zones after all others. A block is USED, its word 0. */
static int alloc_in_zones(struct ctg *ctg, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order, bool *zeroed)
{
	for (unsigned pass = 0; pass < 2; pass++) {
		if (pass == 1 && (gfp & CTG_GFP_SPILL) == 0)
			break;
		for (unsigned i = 0; i < ctg->nr_zones; i++) {
			struct ctg_zone *zone = ctg->zones[i];

			if (((zone->flags & CTG_ZONE_SPILL) != 0) != (pass == 1))
				continue;
			if (alloc_in_zone(zone, max_order, min_order, gfp, pfn, order, zeroed) == 0)
				return 0;
		}
	}
	return -CTG_ENOMEM;
}

int ctg_alloc_run(struct ctg *ctg, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order)
{
	struct ctg_frame *frame;
	bool zeroed = false;
	uint64_t nr;
	int ret;

	if (max_order > CTG_MAX_ORDER || min_order > max_order || !gfp_valid(gfp))
		return -CTG_EINVAL;
	ret = alloc_in_zones(ctg, max_order, min_order, gfp, pfn, order, &zeroed);
	if (ret != 0) {
		/* What is missing may lie, free, in the caches of other CPUs. */
		for (unsigned i = 0; i < ctg->nr_zones; i++)
			ctg_pcp_drain(ctg->zones[i]);
		ret = alloc_in_zones(ctg, max_order, min_order, gfp, pfn, order, &zeroed);
	}
	if (ret != 0)
		return ret;
	nr = (uint64_t)1 << *order;
	frame = ctg_frame_of(ctg, *pfn);
	if ((gfp & CTG_GFP_ZERO) != 0 && !zeroed) {
		ret = ctg->port.zero(ctg->port.host, *pfn, nr);
		if (ret != 0) {
			ctg_frame_free(ctg, *pfn);
			return ret;
		}
		ctg_count(&ctg->counters.frames_zeroed, nr);
	}
	ctg_store64_release(&frame->word, CTG_WORD_REF1);
	return 0;
}

int ctg_alloc_frames(struct ctg *ctg, unsigned order, unsigned gfp, ctg_pfn_t *pfn)
{
	unsigned got;

	if (ctg == NULL || pfn == NULL)
		return -CTG_EINVAL;
	return ctg_alloc_run(ctg, order, order, gfp, pfn, &got);
}

void ctg_split_used(struct ctg *ctg, ctg_pfn_t pfn, unsigned order)
{
	struct ctg_zone *zone = ctg_zone_of(ctg, pfn);
	struct ctg_frame *frame = ctg_zone_frame(zone, pfn);
	uint32_t info = ctg_load32_relaxed(&frame->info);
	uint32_t single =
		CTG_INFO(ctg_info_state(info), 0, ctg_info_mt(info), ctg_info_flags(info));

	CTG_ASSERT(ctg_info_state(info) == CTG_FRAME_USED && ctg_info_order(info) == order);
	for (uint64_t i = 1; i < (uint64_t)1 << order; i++) {
		ctg_store32_relaxed(&frame[i].info, single);
		ctg_store64_release(&frame[i].word, CTG_WORD_REF1);
	}
	ctg_store32_release(&frame->info, single);
}

void ctg_free_run(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed)
{
	const struct ctg_port *port = &zone->ctg->port;

	if ((zone->flags & CTG_ZONE_DISCARD) != 0 && !zeroed) {
		port->discard(port->host, pfn, nr);
		zeroed = true;
	}
	ctg_buddy_free_range(zone, pfn, nr, zeroed);
}

void ctg_frame_free(struct ctg *ctg, ctg_pfn_t pfn)
{
	struct ctg_zone *zone = ctg_zone_of(ctg, pfn);
	struct ctg_frame *frame = ctg_zone_frame(zone, pfn);
	uint32_t info = ctg_load32_acquire(&frame->info);
	uint64_t nr = (uint64_t)1 << ctg_info_order(info);
	uint64_t w = ctg_xchg64_acq_rel(&frame->word, 0);
	uint16_t group = frame->group;

	CTG_ASSERT((w & ~CTG_WORD_FLAGS) == 0 || ctg_word_frozen(w));
	CTG_ASSERT(ctg_info_state(info) == CTG_FRAME_USED ||
		   ctg_info_state(info) == CTG_FRAME_ANON ||
		   ctg_info_state(info) == CTG_FRAME_CONTIG);
	frame->group = 0;
	if (ctg_info_order(info) == 0 && ctg_info_state(info) != CTG_FRAME_CONTIG)
		ctg_pcp_free(zone, pfn);
	else
		ctg_free_run(zone, pfn, nr, false);
	/* Who is charged for it next will find it free. */
	ctg_group_uncharge_index(ctg, group, nr);
	/* Only now: whoever looks again is to find it free. */
	if ((w & CTG_WORD_WAITERS) != 0)
		ctg_frame_wake(ctg, pfn);
}
