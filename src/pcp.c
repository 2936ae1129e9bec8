/* SPDX-License-Identifier: MIT */
/*
 * Per-CPU caches of single frames. They save the zone's lock, not more: a cache belongs to a CPU
 * only in that this CPU prefers it, so any thread may use or drain any of them under its lock.
 * How this goes together with isolation is told in isolate.c.
 */
#include "buddy.h"

static struct ctg_pcp *this_pcp(struct ctg_zone *zone)
{
	const struct ctg_port *port = &zone->ctg->port;
	unsigned cpu = port->cpu(port->host);

	CTG_ASSERT(cpu < port->nr_cpus);
	return &zone->pcp[cpu % CTG_MAX_CPUS];
}

/* pcp->lock held. */
static void push(
	struct ctg_zone *zone, struct ctg_free_list *list, ctg_pfn_t pfn, unsigned mt, bool zeroed)
{
	struct ctg_frame *frame = ctg_zone_frame(zone, pfn);

	frame->link.prev = 0;
	frame->link.next = list->first;
	list->first = (uint32_t)(pfn - zone->base) + 1;
	list->nr++;
	ctg_store32_release(
		&frame->info, CTG_INFO(CTG_FRAME_PCP, 0, mt, zeroed ? CTG_FRAME_ZEROED : 0));
}

/* pcp->lock held; the list is not empty. */
static ctg_pfn_t pop(struct ctg_zone *zone, struct ctg_free_list *list, bool *zeroed)
{
	struct ctg_frame *frame = &zone->frames[list->first - 1];
	ctg_pfn_t pfn = zone->base + list->first - 1;
	uint32_t info = ctg_load32_relaxed(&frame->info);

	CTG_ASSERT(ctg_info_state(info) == CTG_FRAME_PCP);
	*zeroed = (ctg_info_flags(info) & CTG_FRAME_ZEROED) != 0;
	list->first = frame->link.next;
	list->nr--;
	return pfn;
}

/* Move a batch from the zone's lists into an empty cache. pcp->lock held. */
static void refill(struct ctg_zone *zone, struct ctg_free_list *list, enum ctg_migratetype mt)
{
	const struct ctg_port *port = &zone->ctg->port;
	ctg_pfn_t pfn[CTG_PCP_BATCH];
	bool zeroed[CTG_PCP_BATCH];
	unsigned nr = 0;

	if (ctg_hint_load(&zone->nr_free[mt]) == 0)
		return;
	ctg_lock(port, &zone->lock);
	while (nr < CTG_PCP_BATCH && ctg_buddy_take(zone, 0, mt, &pfn[nr], &zeroed[nr])) {
		ctg_buddy_account(zone, pfn[nr], 1, false);
		nr++;
	}
	ctg_unlock(port, &zone->lock);
	/* Backwards, so that they leave the cache in the order of their addresses. */
	while (nr-- != 0)
		push(zone, list, pfn[nr], mt, zeroed[nr]);
}

/*
 * Move at most a batch of frames from a cache to the zone's lists. pcp->lock held: a drain that
 * finds the cache empty must be able to rely on its frames being on the lists. Frames are discarded
 * here and not when they are freed: most are used again before they get this far.
 */
static void spill(struct ctg_zone *zone, struct ctg_free_list *list)
{
	const struct ctg_port *port = &zone->ctg->port;
	ctg_pfn_t pfn[CTG_PCP_BATCH];
	bool zeroed[CTG_PCP_BATCH];
	unsigned nr = 0;

	for (; nr < CTG_PCP_BATCH && list->nr != 0; nr++) {
		pfn[nr] = pop(zone, list, &zeroed[nr]);
		if ((zone->flags & CTG_ZONE_DISCARD) != 0 && !zeroed[nr]) {
			port->discard(port->host, pfn[nr], 1);
			zeroed[nr] = true;
		}
	}
	ctg_lock(port, &zone->lock);
	while (nr-- != 0) {
		ctg_store32_relaxed(&ctg_zone_frame(zone, pfn[nr])->info, CTG_FRAME_TAIL);
		ctg_buddy_free_locked(zone, pfn[nr], 1, zeroed[nr]);
	}
	ctg_unlock(port, &zone->lock);
}

int ctg_pcp_alloc(struct ctg_zone *zone, unsigned gfp, ctg_pfn_t *pfn, bool *zeroed)
{
	const struct ctg_port *port = &zone->ctg->port;
	struct ctg_pcp *pcp = this_pcp(zone);
	enum ctg_migratetype types[2];
	unsigned nr = ctg_gfp_types(gfp, types);
	unsigned order;

	ctg_lock(port, &pcp->lock);
	for (unsigned i = 0; i < nr; i++) {
		struct ctg_free_list *list = &pcp->list[types[i]];

		if (list->nr == 0)
			refill(zone, list, types[i]);
		if (list->nr == 0)
			continue;
		*pfn = pop(zone, list, zeroed);
		ctg_store32_release(
			&ctg_zone_frame(zone, *pfn)->info, ctg_used_info(zone, *pfn, 0, gfp));
		ctg_unlock(port, &pcp->lock);
		return 0;
	}
	ctg_unlock(port, &pcp->lock);
	/* Memory of another type may have to change sides. */
	return ctg_buddy_alloc(zone, 0, 0, gfp, pfn, &order, zeroed);
}

void ctg_pcp_free(struct ctg_zone *zone, ctg_pfn_t pfn)
{
	const struct ctg_port *port = &zone->ctg->port;
	const struct ctg_block *block = ctg_zone_block(zone, pfn);
	struct ctg_pcp *pcp = this_pcp(zone);
	bool isolated;

	ctg_lock(port, &pcp->lock);
	isolated = ctg_hint_load(&block->isolated_by) != NULL;
	if (!isolated) {
		unsigned mt = ctg_hint_load(&block->migratetype);
		struct ctg_free_list *list = &pcp->list[mt];

		push(zone, list, pfn, mt, false);
		if (list->nr > CTG_PCP_HIGH)
			spill(zone, list);
	}
	ctg_unlock(port, &pcp->lock);
	if (isolated)
		ctg_free_run(zone, pfn, 1, false);
}

void ctg_pcp_drain(struct ctg_zone *zone)
{
	const struct ctg_port *port = &zone->ctg->port;

	for (unsigned cpu = 0; cpu < port->nr_cpus; cpu++) {
		struct ctg_pcp *pcp = &zone->pcp[cpu];

		ctg_lock(port, &pcp->lock);
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			while (pcp->list[mt].nr != 0)
				spill(zone, &pcp->list[mt]);
		ctg_unlock(port, &pcp->lock);
	}
}

void ctg_drain_caches(struct ctg *ctg)
{
	if (ctg == NULL)
		return;
	for (unsigned i = 0; i < ctg->nr_zones; i++)
		ctg_pcp_drain(ctg->zones[i]);
	ctg_count(&ctg->counters.cache_drains, 1);
}
