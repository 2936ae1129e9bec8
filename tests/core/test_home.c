/* SPDX-License-Identifier: MIT */
/* ctg_migrate_home: what lies in spill zones goes back. */
#include "moving.h"

#define AREA_BASE (64 * PAGES)
#define SPILL_BASE (128 * PAGES)

/* Four pageblocks of ordinary memory, two that are lent as an area's are, eight to spill into. */
struct house {
	struct world w;
	struct ctg_zone *area, *spill;
	struct ctg_mm *mm;
};

static struct ctg_mm *space_with(struct house *h, unsigned gfp, unsigned map_order)
{
	struct ctg_mm_config config = {.owner = h, .gfp = gfp, .map_order = map_order};
	struct ctg_mm *mm = NULL;

	assert_int_equal(ctg_mm_create(h->w.ctg, &config, &mm), 0);
	return mm;
}

static void house_open(struct house *h, bool area)
{
	struct ctg_zone_config lent = {.base = AREA_BASE, .nr = 2 * PAGES};
	struct ctg_zone_config spill = {
		.base = SPILL_BASE, .nr = 8 * PAGES, .flags = CTG_ZONE_SPILL};

	memset(h, 0, sizeof(*h));
	world_open(&h->w, 4);
	if (area) {
		assert_int_equal(ctg_sim_add_zone(h->w.sim, &lent, true, &h->area), 0);
		assert_int_equal(
			ctg_zone_lend(h->area, lent.base, lent.nr, CTG_MIGRATE_CMA, false), 0);
	}
	assert_int_equal(ctg_sim_add_zone(h->w.sim, &spill, true, &h->spill), 0);
	assert_int_equal(ctg_zone_release(h->spill, spill.base, spill.nr, false), 0);
	h->mm = space_with(h, CTG_GFP_SPILL, 0);
	h->w.nr_free = world_free(&h->w);
}

static void house_close(struct house *h)
{
	ctg_mm_destroy(h->mm, false);
	for (unsigned i = 0; i < h->w.ctg->nr_zones; i++) {
		ctg_drain_caches(h->w.ctg);
		check_zone(h->w.ctg->zones[i]);
	}
	assert_int_equal(world_free(&h->w), h->w.nr_free);
	ctg_sim_destroy(h->w.sim);
}

static bool spilled(struct house *h, ctg_pfn_t pfn)
{
	return ctg_zone_of(h->w.ctg, pfn) == h->spill;
}

static uint64_t nr_spilled(struct ctg_mm *mm)
{
	struct ctg_mm_stat stat;

	ctg_mm_stat(mm, &stat);
	return stat.nr_spilled;
}

static uint64_t returned(struct house *h)
{
	struct ctg_counters counters;

	ctg_counters_read(h->w.ctg, &counters);
	return counters.frames_returned;
}

/* Everything but the spill zone is in use, until hoard_free_all. */
static struct hoard *fill_home(struct house *h)
{
	return hoard_orders(&h->w, 0, CTG_GFP_MOVABLE);
}

/* 40 small frames and two large ones, all spilled. */
static void spill_some(struct house *h)
{
	map_small(&h->w, h->mm, BASE, 40);
	map_large(&h->w, h->mm, BASE + PAGES);
	map_large(&h->w, h->mm, BASE + 2 * PAGES);
	assert_int_equal(nr_spilled(h->mm), 40 + 2 * PAGES);
}

static void check_some(struct house *h)
{
	check_stamp(&h->w, h->mm, BASE, 40);
	check_stamp(&h->w, h->mm, BASE + PAGES, 2 * PAGES);
}

/* ---- all of it --------------------------------------------------------------------------- */

static void test_all(void **state)
{
	struct house h;
	struct hoard *hoard;
	uint64_t moved = 99;
	unsigned level;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, 40 + 2 * PAGES);
	assert_int_equal(returned(&h), moved);
	assert_int_equal(nr_spilled(h.mm), 0);
	for (unsigned i = 1; i < 3; i++) {
		ctg_pte_read(h.mm, BASE + i * PAGES, &level);
		assert_int_equal(level, 1);
	}
	check_some(&h);
	/* And again: there is nothing, for which no memory is needed. */
	ctg_sim_fail(h.w.sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, 0);
	assert_int_equal(ctg_sim_fail(h.w.sim, CTG_SIM_META_ALLOC, 0), 0);
	house_close(&h);
}

static void test_arguments(void **state)
{
	struct house h;
	struct world w;
	struct hoard *hoard;
	uint64_t moved = 99;

	(void)state;
	assert_int_equal(ctg_migrate_home(NULL, 1, &moved), -CTG_EINVAL);
	assert_int_equal(moved, 0);
	/* No spill zone at all. */
	world_open(&w, 2);
	moved = 99;
	assert_int_equal(ctg_migrate_home(w.ctg, 1, &moved), 0);
	assert_int_equal(moved, 0);
	world_close(&w);
	house_open(&h, false);
	assert_int_equal(ctg_migrate_home(h.w.ctg, 0, NULL), 0);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(ctg_migrate_home(h.w.ctg, 0, NULL), -CTG_EAGAIN);
	assert_int_equal(nr_spilled(h.mm), 40 + 2 * PAGES);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, NULL), 0);
	assert_int_equal(nr_spilled(h.mm), 0);
	house_close(&h);
}

/* The largest first; a large frame is begun as long as any of the budget is left. */
static void test_budget(void **state)
{
	struct house h;
	struct hoard *hoard;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(ctg_migrate_home(h.w.ctg, 1, &moved), -CTG_EAGAIN);
	assert_int_equal(moved, PAGES);
	assert_int_equal(ctg_migrate_home(h.w.ctg, PAGES + 7, &moved), -CTG_EAGAIN);
	assert_int_equal(moved, PAGES + 7);
	assert_false(spilled(&h, pfn_of(h.mm, BASE + PAGES)));
	assert_false(spilled(&h, pfn_of(h.mm, BASE + 2 * PAGES)));
	assert_int_equal(nr_spilled(h.mm), 33);
	assert_int_equal(ctg_migrate_home(h.w.ctg, 32, &moved), -CTG_EAGAIN);
	assert_int_equal(moved, 32);
	assert_int_equal(ctg_migrate_home(h.w.ctg, 1, &moved), 0);
	assert_int_equal(moved, 1);
	assert_int_equal(returned(&h), 40 + 2 * PAGES);
	check_some(&h);
	house_close(&h);
}

/* ---- no room ----------------------------------------------------------------------------- */

/* Free memory in spill zones is not home. */
static void test_no_room(void **state)
{
	struct house h;
	struct hoard *hoard;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	assert_int_equal(moved, 0);
	assert_int_equal(nr_spilled(h.mm), 40 + 2 * PAGES);
	check_some(&h);
	hoard_free_all(&h.w, hoard);
	house_close(&h);
}

/* Then it does not try one frame after the other. */
static void test_no_room_ends(void **state)
{
	struct ctg_counters counters;
	struct house h;
	struct hoard *hoard;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	map_small(&h.w, h.mm, BASE, 2 * CTG_MIGRATE_BATCH_PAGES + 100);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	ctg_counters_read(h.w.ctg, &counters);
	assert_int_equal(counters.migrate_fail, CTG_MIGRATE_BATCH_PAGES);
	hoard_free_all(&h.w, hoard);
	house_close(&h);
}

/* Room for some small ones: those go. */
static void test_some_room(void **state)
{
	struct house h;
	struct hoard *hoard;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	hoard = fragment(&h.w, 25, SPILL_BASE);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	assert_int_equal(moved, 25);
	assert_int_equal(nr_spilled(h.mm), 15 + 2 * PAGES);
	check_some(&h);
	hoard_free_all(&h.w, hoard);
	house_close(&h);
}

/* Room for all the small ones and for one large one, but only in pieces. */
static void test_pieces_last(void **state)
{
	struct house h;
	struct hoard *hoard;
	uint64_t moved;
	unsigned level, whole = 0;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	hoard = fragment(&h.w, 40 + PAGES + 30, SPILL_BASE);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	assert_int_equal(moved, 40 + PAGES);
	for (unsigned i = 0; i < 40; i++)
		assert_false(spilled(&h, pfn_of(h.mm, BASE + i)));
	for (unsigned i = 1; i < 3; i++) {
		ctg_pte_read(h.mm, BASE + i * PAGES, &level);
		whole += level;
		assert_int_equal(level == 1, spilled(&h, pfn_of(h.mm, BASE + i * PAGES)));
	}
	assert_int_equal(whole, 1);
	check_some(&h);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, PAGES);
	check_some(&h);
	house_close(&h);
}

/* Pieces do not take the room of what is small anyway. */
static void test_small_before_pieces(void **state)
{
	struct house h;
	struct hoard *hoard;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	hoard = fragment(&h.w, PAGES + 20, SPILL_BASE);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	assert_int_equal(moved, 40);
	assert_int_equal(nr_spilled(h.mm), 2 * PAGES);
	check_some(&h);
	hoard_free_all(&h.w, hoard);
	house_close(&h);
}

/* A space that maps large frames only does not go in pieces. */
static void test_only_whole(void **state)
{
	struct house h;
	struct hoard *hoard;
	struct ctg_mm *mm;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	mm = space_with(&h, CTG_GFP_SPILL, CTG_PAGEBLOCK_ORDER);
	hoard = fill_home(&h);
	map_large(&h.w, mm, BASE);
	hoard_free_all(&h.w, hoard);
	hoard = fragment(&h.w, 2 * PAGES, SPILL_BASE);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	assert_int_equal(moved, 0);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, PAGES);
	check_stamp(&h.w, mm, BASE, PAGES);
	ctg_mm_destroy(mm, false);
	house_close(&h);
}

/* ---- held -------------------------------------------------------------------------------- */

static void test_held(void **state)
{
	struct house h;
	struct hoard *hoard;
	ctg_pfn_t small, large;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	spill_some(&h);
	hoard_free_all(&h.w, hoard);
	small = pfn_of(h.mm, BASE + 4);
	large = pfn_of(h.mm, BASE + PAGES);
	hold(&h.w, small, CTG_WORD_PIN1);
	hold(&h.w, large, CTG_WORD_REF1);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_EBUSY);
	assert_int_equal(moved, 39 + PAGES);
	assert_int_equal(pfn_of(h.mm, BASE + 4), small);
	assert_int_equal(pfn_of(h.mm, BASE + PAGES), large);
	hold(&h.w, small, -CTG_WORD_PIN1);
	hold(&h.w, large, -CTG_WORD_REF1);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, 1 + PAGES);
	check_some(&h);
	house_close(&h);
}

/* There was room for everything, in pieces: what is left is held. */
static void test_held_after_pieces(void **state)
{
	struct house h;
	struct hoard *hoard;
	ctg_pfn_t small;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	hoard = fill_home(&h);
	map_small(&h.w, h.mm, BASE, 40);
	map_large(&h.w, h.mm, BASE + PAGES);
	hoard_free_all(&h.w, hoard);
	hoard = fragment(&h.w, PAGES + 100, SPILL_BASE);
	small = pfn_of(h.mm, BASE + 4);
	hold(&h.w, small, CTG_WORD_PIN1);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_EBUSY);
	assert_int_equal(moved, 39 + PAGES);
	hold(&h.w, small, -CTG_WORD_PIN1);
	hoard_free_all(&h.w, hoard);
	house_close(&h);
}

/* One family finds no room, another is held: room is what lacks, whichever is looked at first. */
static void test_no_room_and_held(void **state)
{
	(void)state;
	for (unsigned turn = 0; turn < 2; turn++) {
		struct house h;
		struct hoard *all, *ordinary;
		struct ctg_mm *mm[2];
		ctg_pfn_t held;
		uint64_t moved;

		house_open(&h, true);
		for (unsigned s = 0; s < 2; s++)
			mm[s] = space_with(&h, CTG_GFP_SPILL | (s == turn ? CTG_GFP_NO_CMA : 0), 0);
		all = fill_home(&h);
		for (unsigned s = 0; s < 2; s++)
			map_small(&h.w, mm[s], BASE, 10);
		hoard_free_all(&h.w, all);
		ordinary = hoard_orders(&h.w, 0, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA);
		held = pfn_of(mm[1 - turn], BASE + 3);
		hold(&h.w, held, CTG_WORD_MAP1); /* found out when its family is walked */
		assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
		assert_int_equal(moved, 9);
		hold(&h.w, held, -CTG_WORD_MAP1);
		hoard_free_all(&h.w, ordinary);
		for (unsigned s = 0; s < 2; s++)
			ctg_mm_destroy(mm[s], false);
		house_close(&h);
	}
}

/* ---- where it may go --------------------------------------------------------------------- */

/* One space may not use areas, one nothing else. */
static void test_gfp(void **state)
{
	struct house h;
	struct hoard *hoard;
	struct ctg_mm *mm[2];
	struct ctg_migrate_stats stats;
	uint64_t moved;

	(void)state;
	house_open(&h, true);
	mm[0] = space_with(&h, CTG_GFP_SPILL | CTG_GFP_NO_CMA, 0);
	mm[1] = space_with(&h, CTG_GFP_NO_ORDINARY, 0);
	hoard = hoard_orders(&h.w, 0, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA);
	for (unsigned s = 0; s < 2; s++) {
		map_small(&h.w, mm[s], BASE, 30);
		map_large(&h.w, mm[s], BASE + PAGES);
	}
	assert_int_equal(evacuate(&h.w, AREA_BASE, 2 * PAGES, 1, NULL, &stats), 0);
	for (unsigned s = 0; s < 2; s++)
		assert_int_equal(nr_spilled(mm[s]), 30 + PAGES);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, 2 * (30 + PAGES));
	for (unsigned s = 0; s < 2; s++) {
		struct ctg_zone *home = s == 0 ? h.w.zone : h.area;

		for (unsigned i = 0; i < 30; i++)
			assert_ptr_equal(ctg_zone_of(h.w.ctg, pfn_of(mm[s], BASE + i)), home);
		assert_ptr_equal(ctg_zone_of(h.w.ctg, pfn_of(mm[s], BASE + PAGES)), home);
		check_stamp(&h.w, mm[s], BASE, 30);
		check_stamp(&h.w, mm[s], BASE + PAGES, PAGES);
		ctg_mm_destroy(mm[s], false);
	}
	house_close(&h);
}

/* There is room for the one only; a batch full of the other's frames is no reason to stop. */
static void test_room_for_one(void **state)
{
	struct house h;
	struct hoard *all, *ordinary;
	struct ctg_mm *mm[2];
	const uint64_t nr[2] = {CTG_MIGRATE_BATCH_PAGES + 300, 30};
	uint64_t moved;

	(void)state;
	house_open(&h, true);
	mm[0] = space_with(&h, CTG_GFP_SPILL | CTG_GFP_NO_CMA, 0);
	mm[1] = space_with(&h, CTG_GFP_SPILL, 0);
	all = fill_home(&h);
	/* The scan meets a batch of the first's before the second's, from whichever end it comes.
	 */
	map_small(&h.w, mm[0], BASE, nr[0]);
	map_small(&h.w, mm[1], BASE, nr[1]);
	map_small(&h.w, mm[0], BASE + 8 * PAGES, nr[0]);
	hoard_free_all(&h.w, all);
	ordinary = hoard_orders(&h.w, 0, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), -CTG_ENOMEM);
	assert_int_equal(moved, 30);
	assert_int_equal(nr_spilled(mm[0]), 2 * nr[0]);
	assert_int_equal(nr_spilled(mm[1]), 0);
	hoard_free_all(&h.w, ordinary);
	for (unsigned s = 0; s < 2; s++) {
		check_stamp(&h.w, mm[s], BASE, nr[s]);
		ctg_mm_destroy(mm[s], false);
	}
	house_close(&h);
}

/* Evacuation of an area honours NO_CMA too: a destination is not another area. */
static void test_evacuate_no_cma(void **state)
{
	struct ctg_migrate_stats stats;
	struct hoard *hoard;
	struct house h;
	struct ctg_mm *mm;
	ctg_pfn_t old;

	(void)state;
	house_open(&h, true);
	mm = space_with(&h, CTG_GFP_NO_CMA, 0);
	map_small(&h.w, mm, BASE, 30);
	old = pfn_of(mm, BASE);
	hoard = hoard_orders(&h.w, 0, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA | CTG_GFP_SPILL);
	assert_int_equal(evacuate(&h.w, old, 30, 1, NULL, &stats), -CTG_ENOMEM);
	hoard_free_all(&h.w, hoard);
	assert_int_equal(evacuate_block(&h.w, old), 30);
	for (unsigned i = 0; i < 30; i++)
		assert_ptr_equal(ctg_zone_of(h.w.ctg, pfn_of(mm, BASE + i)), h.w.zone);
	check_stamp(&h.w, mm, BASE, 30);
	ctg_mm_destroy(mm, false);
	house_close(&h);
}

/* What leaves an area when home is full goes to the spill zone, and comes back. */
static void test_there_and_back(void **state)
{
	struct house h;
	struct hoard *hoard;
	struct ctg_mm *mm;
	struct ctg_migrate_stats stats;
	uint64_t moved;

	(void)state;
	house_open(&h, true);
	mm = space_with(&h, CTG_GFP_NO_ORDINARY, 0);
	map_large(&h.w, mm, BASE);
	map_small(&h.w, mm, BASE + PAGES, 100);
	hoard = hoard_orders(&h.w, 0, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA);
	assert_int_equal(evacuate(&h.w, AREA_BASE, 2 * PAGES, 1, NULL, &stats), 0);
	assert_int_equal(stats.frames_moved, PAGES + 100);
	assert_int_equal(nr_spilled(mm), PAGES + 100);
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, PAGES + 100);
	assert_ptr_equal(ctg_zone_of(h.w.ctg, pfn_of(mm, BASE)), h.area);
	check_stamp(&h.w, mm, BASE, PAGES + 100);
	hoard_free_all(&h.w, hoard);
	ctg_mm_destroy(mm, false);
	house_close(&h);
}

static struct {
	struct ctg_port port;
	unsigned calls;
	uint64_t frames;
} discards;

static void count_discard(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	discards.calls++;
	discards.frames += nr;
	discards.port.discard(host, pfn, nr);
}

/* The memory behind what has come home is given back, in runs. */
static void test_discard(void **state)
{
	struct house h;
	struct hoard *hoard;
	ctg_pfn_t old;
	uint64_t moved;

	(void)state;
	house_open(&h, false);
	h.spill->flags |= CTG_ZONE_DISCARD;
	hoard = fill_home(&h);
	map_small(&h.w, h.mm, BASE, 200);
	map_large(&h.w, h.mm, BASE + PAGES);
	old = pfn_of(h.mm, BASE + PAGES);
	hoard_free_all(&h.w, hoard);
	memset(&discards, 0, sizeof(discards));
	discards.port = h.w.port;
	h.w.ctg->port.discard = count_discard;
	assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, 200 + PAGES);
	assert_int_equal(discards.frames, moved);
	assert_in_range(discards.calls, 1, 20);
	assert_int_equal(*(uint64_t *)ctg_sim_frame(h.w.sim, old), 0);
	check_stamp(&h.w, h.mm, BASE, 200);
	check_stamp(&h.w, h.mm, BASE + PAGES, PAGES);
	house_close(&h);
}

/* ---- failures ---------------------------------------------------------------------------- */

static void test_hooks_fail(void **state)
{
	static const enum ctg_sim_hook hooks[] = {
		CTG_SIM_META_ALLOC, CTG_SIM_COPY, CTG_SIM_RESTRICT, CTG_SIM_INSTALL};

	(void)state;
	for (unsigned i = 0; i < 4; i++)
		for (uint64_t nth = 1;; nth++) {
			struct house h;
			struct hoard *hoard;
			uint64_t moved, nr_free;
			bool failed;
			int ret;

			house_open(&h, false);
			hoard = fill_home(&h);
			spill_some(&h);
			hoard_free_all(&h.w, hoard);
			nr_free = world_free(&h.w);
			ctg_sim_fail(h.w.sim, hooks[i], nth);
			ret = ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved);
			failed = ctg_sim_fail(h.w.sim, hooks[i], 0) >= nth;
			assert_int_equal(nr_spilled(h.mm), 40 + 2 * PAGES - moved);
			assert_int_equal(world_free(&h.w), nr_free);
			check_some(&h);
			/* What failed for one batch of large frames is tried again in another way.
			 */
			assert_true(failed || ret == 0);
			if (nr_spilled(h.mm) != 0)
				assert_true(ret == -CTG_ENOMEM || ret == -CTG_EBUSY);
			assert_int_equal(ctg_migrate_home(h.w.ctg, UINT64_MAX, &moved), 0);
			check_some(&h);
			house_close(&h);
			if (!failed) {
				assert_true(nth > 1);
				break;
			}
		}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_all),
		cmocka_unit_test(test_arguments),
		cmocka_unit_test(test_budget),
		cmocka_unit_test(test_no_room),
		cmocka_unit_test(test_no_room_ends),
		cmocka_unit_test(test_some_room),
		cmocka_unit_test(test_small_before_pieces),
		cmocka_unit_test(test_pieces_last),
		cmocka_unit_test(test_only_whole),
		cmocka_unit_test(test_held),
		cmocka_unit_test(test_held_after_pieces),
		cmocka_unit_test(test_no_room_and_held),
		cmocka_unit_test(test_gfp),
		cmocka_unit_test(test_room_for_one),
		cmocka_unit_test(test_evacuate_no_cma),
		cmocka_unit_test(test_there_and_back),
		cmocka_unit_test(test_discard),
		cmocka_unit_test(test_hooks_fail),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
