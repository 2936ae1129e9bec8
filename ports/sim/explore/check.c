/* SPDX-License-Identifier: MIT */
/* What must be true: at each store that frees or counts, and of everything when nobody is inside.
 */
#include "engine.h"
#include "pgtable.h"

#include <string.h>

typedef unsigned long long ull;

struct ctg_zone *xp_zone_of_metadata(const void *p, uint64_t *index)
{
	const struct ctg *ctg = xp_world->ctg;

	for (unsigned i = 0; ctg != NULL && i < ctg->nr_zones; i++) {
		struct ctg_zone *zone = ctg->zones[i];
		uintptr_t at = (uintptr_t)p - (uintptr_t)zone->frames;

		if (at < zone->nr * sizeof(struct ctg_frame)) {
			*index = at / sizeof(struct ctg_frame);
			return zone;
		}
	}
	return NULL;
}

/* ---- page tables ------------------------------------------------------------------------------
 */

/* Call fn for each PRESENT entry: its first page, its first frame, how many. */
static void each_entry(const struct ctg_mm *mm, const struct ctg_table *table, ctg_vpn_t base,
	void (*fn)(const struct ctg_mm *, ctg_vpn_t, uint64_t entry, uint64_t nr, void *),
	void *arg)
{
	for (unsigned i = 0; table != NULL && i < CTG_TABLE_ENTRIES; i++) {
		uint64_t entry = table->entry[i].v;
		ctg_vpn_t vpn = base + ((ctg_vpn_t)i << (9 * table->level));

		if ((entry & CTG_PTE_TABLE) != 0)
			each_entry(mm, (const void *)(uintptr_t)(entry & ~CTG_PTE_TABLE), vpn, fn,
				arg);
		else if ((entry & CTG_PTE_PRESENT) != 0)
			fn(mm, vpn, entry, ctg_level_pages(table->level), arg);
	}
}

struct range {
	ctg_pfn_t pfn;
	uint64_t nr;
};

static void not_mapped(
	const struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t entry, uint64_t nr, void *arg)
{
	const struct range *range = arg;
	ctg_pfn_t pfn = ctg_pte_pfn(entry);

	(void)mm;
	if (pfn < range->pfn + range->nr && range->pfn < pfn + nr)
		xp_violation("frame %llu becomes free and page %llu maps it",
			(ull)(pfn > range->pfn ? pfn : range->pfn), (ull)vpn);
}

static bool mm_lives(const struct ctg_mm *mm)
{
	const struct ctg_batch *batch = xp_world->ctg->batches;

	while (batch != NULL && batch->mm != mm)
		batch = batch->next;
	return batch != NULL && !batch->dead;
}

/* Frames become free: nothing maps them, and no TLB remembers that something did. */
static void check_freed(ctg_pfn_t pfn, uint64_t nr)
{
	struct range range = {pfn, nr};

	for (const struct ctg_batch *b = xp_world->ctg->batches; b != NULL; b = b->next)
		each_entry(b->mm, b->mm->root, 0, not_mapped, &range);
	for (unsigned f = 0; f < xp_run.nr; f++)
		for (unsigned i = 0; i < XP_TLB; i++) {
			const struct xp_tlb *entry = &xp_m->tlb[f][i];

			if (entry->mm != NULL && entry->pfn - pfn < nr && mm_lives(entry->mm))
				xp_violation("frame %llu becomes free and the TLB of fiber %u has "
					     "it for page %llu",
					(ull)entry->pfn, f, (ull)entry->vpn);
		}
}

void xp_watch(const void *p, uint64_t old, uint64_t now)
{
	uint64_t index;
	struct ctg_zone *zone = xp_zone_of_metadata(p, &index);
	const struct ctg_frame *frame;
	unsigned state;

	if (zone == NULL)
		return;
	frame = &zone->frames[index];
	if (p == &frame->info) {
		uint32_t info = (uint32_t)now;

		state = ctg_info_state(info);
		if (state == CTG_FRAME_FREE || state == CTG_FRAME_PCP) {
			if ((frame->word.v & ~CTG_WORD_FLAGS) != 0)
				xp_violation("frame %llu becomes free with holders",
					(ull)(zone->base + index));
			check_freed(zone->base + index, (uint64_t)1 << ctg_info_order(info));
		}
	} else if (p == &frame->word) {
		state = ctg_info_state(frame->info.v);
		if ((old & ~CTG_WORD_FLAGS) == 0 && (now & ~CTG_WORD_FLAGS) != 0 &&
			(state == CTG_FRAME_FREE || state == CTG_FRAME_PCP))
			xp_violation(
				"frame %llu is free and gets a holder", (ull)(zone->base + index));
	}
}

void xp_check_access(ctg_pfn_t pfn, const char *what)
{
	struct ctg_zone *zone = ctg_zone_of(xp_world->ctg, pfn);
	const struct ctg_frame *frame;

	if (zone == NULL)
		xp_violation("a TLB has frame %llu, which is in no zone", (ull)pfn);
	frame = &zone->frames[pfn - zone->base];
	if (ctg_info_state(frame->info.v) == CTG_FRAME_TAIL)
		frame = &zone->frames[(pfn & ~(CTG_PAGEBLOCK_FRAMES - 1)) - zone->base];
	if (ctg_info_state(frame->info.v) != CTG_FRAME_ANON ||
		(frame->word.v & ~CTG_WORD_FLAGS) == 0)
		xp_violation("frame %llu is %s through a stale TLB entry: it is not mapped memory",
			(ull)pfn, what);
}

/* ---- at rest ----------------------------------------------------------------------------------
 */

enum place { NOWHERE, IN_LIST, IN_CACHE };

/* By zone and frame: where it is free, and the mappings that entries explain. */
static unsigned char place[CTG_MAX_ZONES][8 * CTG_PAGEBLOCK_FRAMES];
static uint32_t mappings[CTG_MAX_ZONES][8 * CTG_PAGEBLOCK_FRAMES];

static unsigned zone_index(const struct ctg_zone *zone)
{
	unsigned i = 0;

	while (xp_world->ctg->zones[i] != zone)
		i++;
	return i;
}

static void put_in(const struct ctg_zone *zone, uint64_t index, uint64_t nr, enum place where)
{
	unsigned char *places = place[zone_index(zone)];

	if (index + nr > zone->nr)
		xp_violation("a list has a block beyond the zone, at index %llu", (ull)index);
	for (uint64_t i = index; i < index + nr; i++) {
		if (places[i] != NOWHERE)
			xp_violation("frame %llu is in two places", (ull)(zone->base + i));
		places[i] = (unsigned char)where;
	}
}

static uint64_t walk_list(const struct ctg_zone *zone, const struct ctg_free_list *list,
	unsigned order, unsigned mt, enum place where)
{
	unsigned state = where == IN_LIST ? CTG_FRAME_FREE : CTG_FRAME_PCP;
	uint64_t nr = 0;

	for (uint32_t at = list->first; at != 0; at = zone->frames[at - 1].link.next) {
		uint32_t info = zone->frames[at - 1].info.v;

		if (ctg_info_state(info) != state || ctg_info_order(info) != order ||
			ctg_info_mt(info) != mt)
			xp_violation("frame %llu is on a list that its info does not say",
				(ull)(zone->base + at - 1));
		put_in(zone, at - 1, (uint64_t)1 << order, where);
		nr++;
	}
	if (nr != list->nr)
		xp_violation("a list of order %u, type %u has %llu blocks and says %llu", order, mt,
			(ull)nr, (ull)list->nr);
	return nr << order;
}

static void check_lists(const struct ctg_zone *zone)
{
	for (unsigned mt = 0; mt < CTG_NR_MIGRATETYPES; mt++) {
		uint64_t nr = 0;

		for (unsigned order = 0; order < CTG_NR_ORDERS; order++)
			nr += walk_list(zone, &zone->free[order][mt], order, mt, IN_LIST);
		if (nr != zone->nr_free[mt])
			xp_violation("a zone has %llu free frames of type %u and says %llu",
				(ull)nr, mt, (ull)zone->nr_free[mt]);
		if (mt == CTG_MIGRATE_ISOLATE && nr != 0)
			xp_violation("%llu frames are isolated and nobody is at work", (ull)nr);
	}
	for (unsigned cpu = 0; cpu < XP_MAX_FIBERS; cpu++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			walk_list(zone, &zone->pcp[cpu].list[mt], 0, mt, IN_CACHE);
}

static void check_blocks(const struct ctg_zone *zone)
{
	const unsigned char *places = place[zone_index(zone)];

	for (uint64_t b = 0; b < zone->nr_blocks; b++) {
		const struct ctg_block *block = &zone->blocks[b];
		unsigned nr_free = 0, nr_contig = 0;

		for (uint64_t i = b << CTG_PAGEBLOCK_ORDER; i < (b + 1) << CTG_PAGEBLOCK_ORDER;
			i++) {
			nr_free += places[i] == IN_LIST;
			nr_contig += ctg_info_state(zone->frames[i].info.v) == CTG_FRAME_CONTIG;
		}
		if (block->isolated_by != NULL)
			xp_violation("block %llu stays isolated", (ull)b);
		if (nr_free != block->nr_free || nr_contig != block->nr_contig)
			xp_violation(
				"block %llu has %u free and %u taken frames and says %u and %u",
				(ull)b, nr_free, nr_contig, block->nr_free, block->nr_contig);
	}
}

static void count_entry(
	const struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t entry, uint64_t nr, void *arg)
{
	ctg_pfn_t pfn = ctg_pte_pfn(entry);
	struct ctg_zone *zone = ctg_zone_of(xp_world->ctg, pfn);
	const struct ctg_frame *frame;

	(void)arg;
	if (zone == NULL)
		xp_violation("page %llu maps frame %llu, which is in no zone", (ull)vpn, (ull)pfn);
	frame = &zone->frames[pfn - zone->base];
	if (nr == 1 && ctg_info_state(frame->info.v) == CTG_FRAME_TAIL)
		pfn &= ~(CTG_PAGEBLOCK_FRAMES - 1);
	frame = &zone->frames[pfn - zone->base];
	if (ctg_info_state(frame->info.v) != CTG_FRAME_ANON)
		xp_violation("page %llu maps frame %llu, which is not mapped memory", (ull)vpn,
			(ull)pfn);
	if ((entry & CTG_PTE_MOVING) != 0)
		xp_violation("page %llu stays MOVING", (ull)vpn);
	if (frame->anon != mm->anon || vpn < frame->index ||
		vpn - frame->index >= (uint64_t)1 << ctg_info_order(frame->info.v))
		xp_violation("frame %llu does not know that page %llu maps it", (ull)pfn, (ull)vpn);
	for (unsigned i = 0; i < XP_MAX_PAGES; i++)
		if (xp_m->page[i].mm == mm && xp_m->page[i].vpn - vpn < nr && xp_m->page[i].dirty &&
			(entry & CTG_PTE_DIRTY) == 0)
			xp_violation("page %llu was written and is not marked dirty",
				(ull)xp_m->page[i].vpn);
	mappings[zone_index(zone)][pfn - zone->base]++;
}

static int held_references(ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < 16; i++)
		if (xp_m->held[i].references != 0 && xp_m->held[i].pfn == pfn)
			return xp_m->held[i].references;
	return 0;
}

static void check_counts(const struct ctg_zone *zone)
{
	const unsigned char *places = place[zone_index(zone)];
	const uint32_t *mapped = mappings[zone_index(zone)];
	uint64_t inside = 0; /* frames of the last block's that are to come */

	for (uint64_t i = 0; i < zone->nr; i++) {
		uint32_t info = zone->frames[i].info.v;
		uint64_t word = zone->frames[i].word.v;
		ull pfn = zone->base + i;
		unsigned state = ctg_info_state(info);
		unsigned refs = (unsigned)held_references(pfn);

		if (inside != 0 && places[i] == NOWHERE && state != CTG_FRAME_TAIL)
			xp_violation("frame %llu is inside another and not its tail", pfn);
		inside -= inside != 0;
		if (places[i] != NOWHERE || state == CTG_FRAME_TAIL) {
			if (places[i] == NOWHERE && inside == 0 && refs == 0 && mapped[i] == 0 &&
				zone->blocks[i >> CTG_PAGEBLOCK_ORDER].released &&
				(i == 0 || ctg_info_state(zone->frames[i - 1].info.v) != 0))
				xp_violation("frame %llu is lost: neither free nor used", pfn);
			if ((word & ~CTG_WORD_FLAGS) != 0)
				xp_violation("frame %llu is nobody's and has holders", pfn);
			continue;
		}
		inside = ((uint64_t)1 << ctg_info_order(info)) - 1;
		if (state == CTG_FRAME_USED || state == CTG_FRAME_CONTIG)
			refs++;
		if (ctg_word_frozen(word) || ctg_word_map(word) != mapped[i] ||
			ctg_word_ref(word) != refs || ctg_word_pin(word) != 0)
			xp_violation("frame %llu counts map %u, pin %u, ref %u; there are %u "
				     "mappings and %u references",
				pfn, ctg_word_map(word), ctg_word_pin(word), ctg_word_ref(word),
				mapped[i], refs);
		if (mapped[i] == 0 && refs == 0)
			xp_violation("frame %llu is used by nobody and not free", pfn);
	}
}

void xp_check_rest(void)
{
	struct ctg *ctg = xp_world->ctg;

	memset(place, 0, sizeof(place));
	memset(mappings, 0, sizeof(mappings));
	for (const struct ctg_batch *b = ctg->batches; b != NULL; b = b->next) {
		if (b->nr_runs != 0)
			xp_violation("a batch is left unflushed");
		if (b->lock.state.v != 0 || b->mm->lock.state.v != 0)
			xp_violation("an address space stays locked");
		each_entry(b->mm, b->mm->root, 0, count_entry, NULL);
	}
	for (unsigned i = 0; i < ctg->nr_zones; i++) {
		const struct ctg_zone *zone = ctg->zones[i];

		if (zone->lock.state.v != 0)
			xp_violation("a zone stays locked");
		check_lists(zone);
		check_blocks(zone);
		check_counts(zone);
	}
	for (unsigned i = 0; i < XP_HOLDS; i++)
		if (xp_m->hold[i].mm != NULL && mm_lives(xp_m->hold[i].mm))
			xp_violation("writers to page %llu wait for an install that never comes",
				(ull)xp_m->hold[i].range[0].vpn);
}

bool xp_frame_free(ctg_pfn_t pfn)
{
	xp_check_rest();
	for (unsigned i = 0; i < xp_world->ctg->nr_zones; i++) {
		const struct ctg_zone *zone = xp_world->ctg->zones[i];

		if (pfn - zone->base < zone->nr)
			return place[i][pfn - zone->base] != NOWHERE;
	}
	return false;
}

uint64_t xp_nr_contig(void)
{
	uint64_t nr = 0;

	for (unsigned i = 0; i < xp_world->ctg->nr_zones; i++)
		for (uint64_t b = 0; b < xp_world->ctg->zones[i]->nr_blocks; b++)
			nr += xp_world->ctg->zones[i]->blocks[b].nr_contig;
	return nr;
}

void xp_check_end(void)
{
	for (unsigned i = 0; i < XP_MAX_PAGES; i++)
		if (xp_m->page[i].mm != NULL && mm_lives(xp_m->page[i].mm) &&
			xp_m->page[i].state == XP_MAPPED && (xp_m->page[i].prot & CTG_PROT_READ))
			xp_read(xp_m->page[i].mm, xp_m->page[i].vpn, NULL);
	for (unsigned i = 0; i < 4; i++)
		if (xp_world->mm[i] != NULL)
			xp_mm_destroy(xp_world->mm[i], false);
	xp_check_rest();
	for (unsigned i = 0; i < xp_world->ctg->nr_zones; i++) {
		const struct ctg_zone *zone = xp_world->ctg->zones[i];

		for (uint64_t f = 0; f < zone->nr; f++)
			if (place[i][f] == NOWHERE &&
				ctg_info_state(zone->frames[f].info.v) != CTG_FRAME_CONTIG)
				xp_violation(
					"frame %llu is not free at the end", (ull)(zone->base + f));
	}
	if (xp_nr_contig() != xp_m->nr_contig)
		xp_violation("%llu frames stay taken", (ull)(xp_nr_contig() - xp_m->nr_contig));
	for (unsigned i = 0; i < 16; i++)
		if (xp_m->held[i].references != 0)
			xp_violation("a scenario kept a reference");
}
