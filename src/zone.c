/* SPDX-License-Identifier: MIT */
/* Zones: where memory is, and what of it has been given to the allocator. */
#include "buddy.h"

/* A page-table entry has room for 52 bits of pfn. */
#define PFN_LIMIT ((ctg_pfn_t)1 << 52)
/* Free lists link frames by their index in the zone, plus one, in 32 bits. */
#define ZONE_FRAMES_MAX (((uint64_t)1 << 32) - CTG_PAGEBLOCK_FRAMES)

static uint64_t round_up(uint64_t bytes, uint64_t to)
{
	return (bytes + to - 1) / to * to;
}

size_t ctg_zone_metadata_bytes(uint64_t nr)
{
	uint64_t blocks = nr >> CTG_PAGEBLOCK_ORDER;
	uint64_t bytes;

	if (nr == 0 || nr % CTG_PAGEBLOCK_FRAMES != 0 || nr > ZONE_FRAMES_MAX)
		return 0;
	bytes = nr * sizeof(struct ctg_frame) + blocks * sizeof(struct ctg_block) +
		ctg_runs_nodes(blocks) * sizeof(struct ctg_run_node);
	bytes = round_up(bytes, 64);
	return bytes > SIZE_MAX ? 0 : (size_t)bytes;
}

struct ctg_zone *ctg_zone_of(struct ctg *ctg, ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < ctg->nr_zones; i++)
		if (pfn - ctg->zones[i]->base < ctg->zones[i]->nr)
			return ctg->zones[i];
	return NULL;
}

struct ctg_frame *ctg_frame_of(struct ctg *ctg, ctg_pfn_t pfn)
{
	struct ctg_zone *zone = ctg_zone_of(ctg, pfn);

	CTG_ASSERT(zone != NULL);
	return ctg_zone_frame(zone, pfn);
}

static bool config_valid(const struct ctg *ctg, const struct ctg_zone_config *config)
{
	ctg_pfn_t base = config->base;
	uint64_t nr = config->nr;

	if (base % CTG_PAGEBLOCK_FRAMES != 0 || ctg_zone_metadata_bytes(nr) == 0)
		return false;
	if (base >= PFN_LIMIT || nr > PFN_LIMIT - base)
		return false;
	if (config->map_order != 0 && config->map_order != CTG_PAGEBLOCK_ORDER)
		return false;
	if ((config->flags & ~(unsigned)(CTG_ZONE_SPILL | CTG_ZONE_DISCARD)) != 0)
		return false;
	if ((config->flags & CTG_ZONE_DISCARD) != 0 && ctg->port.discard == NULL)
		return false;
	if (config->metadata == NULL || (uintptr_t)config->metadata % 64 != 0)
		return false;
	for (unsigned i = 0; i < ctg->nr_zones; i++) {
		const struct ctg_zone *zone = ctg->zones[i];

		if (base < zone->base + zone->nr && zone->base < base + nr)
			return false;
	}
	return true;
}

int ctg_zone_add(struct ctg *ctg, const struct ctg_zone_config *config, struct ctg_zone **out)
{
	struct ctg_zone *zone;

	if (ctg == NULL || config == NULL || !config_valid(ctg, config))
		return -CTG_EINVAL;
	if (ctg->nr_zones == CTG_MAX_ZONES)
		return -CTG_ENOSPC;
	zone = ctg->port.meta_alloc(ctg->port.host, sizeof(*zone), 64);
	if (zone == NULL)
		return -CTG_ENOMEM;
	zone->ctg = ctg;
	zone->base = config->base;
	zone->nr = config->nr;
	zone->nr_blocks = config->nr >> CTG_PAGEBLOCK_ORDER;
	zone->flags = config->flags;
	zone->map_order = config->map_order;
	zone->frames = config->metadata;
	zone->blocks = (struct ctg_block *)(void *)(zone->frames + zone->nr);
	zone->tree = (struct ctg_run_node *)(void *)(zone->blocks + zone->nr_blocks);
	ctg_runs_init(zone);
	ctg->zones[ctg->nr_zones++] = zone;
	if (out != NULL)
		*out = zone;
	return 0;
}

/* Whole pageblocks of the zone, at least one. */
static bool range_valid(const struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	if (nr == 0 || pfn % CTG_PAGEBLOCK_FRAMES != 0 || nr % CTG_PAGEBLOCK_FRAMES != 0)
		return false;
	return pfn - zone->base < zone->nr && nr <= zone->nr - (pfn - zone->base);
}

int ctg_zone_populate(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	const struct ctg_port *port;
	int ret = 0;

	if (zone == NULL || !range_valid(zone, pfn, nr))
		return -CTG_EINVAL;
	port = &zone->ctg->port;
	ctg_lock(port, &zone->lock);
	for (ctg_pfn_t p = pfn; p < pfn + nr; p += CTG_PAGEBLOCK_FRAMES)
		if (ctg_zone_block(zone, p)->present)
			ret = -CTG_EINVAL;
	for (ctg_pfn_t p = pfn; ret == 0 && p < pfn + nr; p += CTG_PAGEBLOCK_FRAMES)
		ctg_hint_store(&ctg_zone_block(zone, p)->present, true);
	if (ret == 0)
		zone->nr_present += nr;
	ctg_unlock(port, &zone->lock);
	return ret;
}

int ctg_zone_lend(
	struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, enum ctg_migratetype mt, bool zeroed)
{
	const struct ctg_port *port = &zone->ctg->port;
	int ret = 0;

	if (!range_valid(zone, pfn, nr))
		return -CTG_EINVAL;
	ctg_lock(port, &zone->lock);
	for (ctg_pfn_t p = pfn; p < pfn + nr; p += CTG_PAGEBLOCK_FRAMES) {
		const struct ctg_block *block = ctg_zone_block(zone, p);

		if (!block->present || block->released)
			ret = -CTG_EINVAL;
	}
	for (ctg_pfn_t p = pfn; ret == 0 && p < pfn + nr; p += CTG_PAGEBLOCK_FRAMES) {
		struct ctg_block *block = ctg_zone_block(zone, p);

		ctg_hint_store(&block->migratetype, (uint8_t)mt);
		ctg_hint_store(&block->released, true);
	}
	ctg_unlock(port, &zone->lock);
	if (ret == 0)
		ctg_buddy_free_range(zone, pfn, nr, zeroed);
	return ret;
}

int ctg_zone_release(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed)
{
	if (zone == NULL)
		return -CTG_EINVAL;
	return ctg_zone_lend(zone, pfn, nr, CTG_MIGRATE_MOVABLE, zeroed);
}

void ctg_zone_stat(struct ctg_zone *zone, struct ctg_zone_stat *out)
{
	const struct ctg_port *port;
	struct ctg_extent longest;

	if (zone == NULL || out == NULL)
		return;
	port = &zone->ctg->port;
	*out = (struct ctg_zone_stat){.base = zone->base, .nr_spanned = zone->nr};
	ctg_pcp_drain(zone);
	/* What others have cached since: each cache's own moment, as zone->lock is inside. */
	for (unsigned cpu = 0; cpu < port->nr_cpus; cpu++) {
		struct ctg_pcp *pcp = &zone->pcp[cpu];

		ctg_lock(port, &pcp->lock);
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			out->nr_pcp += pcp->list[mt].nr;
		ctg_unlock(port, &pcp->lock);
	}
	ctg_lock(port, &zone->lock);
	out->nr_present = zone->nr_present;
	out->nr_free_cma = zone->nr_free[CTG_MIGRATE_CMA];
	out->nr_isolated_free = zone->nr_free[CTG_MIGRATE_ISOLATE];
	for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
		out->nr_free += zone->nr_free[mt];
	for (unsigned order = 0; order < CTG_NR_ORDERS; order++)
		for (unsigned mt = 0; mt < CTG_NR_MIGRATETYPES; mt++)
			out->free_blocks[order][mt] = zone->free[order][mt].nr;
	longest = ctg_runs_longest(zone, zone->base, zone->nr);
	ctg_unlock(port, &zone->lock);
	out->longest_free = longest.nr;
	out->longest_free_pfn = longest.pfn;
}

/* A head that does not reach as far as pfn ends the search: no other block could contain both. */
ctg_pfn_t ctg_used_head(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	for (unsigned order = 0; order <= CTG_MAX_ORDER; order++) {
		ctg_pfn_t head = pfn & ~(((uint64_t)1 << order) - 1);
		unsigned state;
		uint32_t info;

		if (head < zone->base)
			break;
		info = ctg_load32_acquire(&ctg_zone_frame(zone, head)->info);
		state = ctg_info_state(info);
		if (state == CTG_FRAME_USED || state == CTG_FRAME_ANON)
			return ctg_info_order(info) >= order ? head : pfn;
		if (state != CTG_FRAME_TAIL)
			break;
	}
	return pfn;
}
