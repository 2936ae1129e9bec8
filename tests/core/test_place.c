/* SPDX-License-Identifier: MIT */
#include "lend.h"

static struct ctg_search search_for(uint64_t nr)
{
	return (struct ctg_search){
		.want = {.nr = nr, .align = 1, .limit = CTG_PFN_NONE},
		.isolated = CTG_PFN_NONE,
	};
}

static ctg_pfn_t place(struct ctg_cma *cma, struct ctg_search *search)
{
	const struct ctg_port *port = &cma->ctg->port;
	ctg_pfn_t pfn;
	bool fits;

	ctg_lock(port, &cma->lock);
	fits = ctg_place_fits(cma, &search->want);
	pfn = ctg_place_window(cma, search);
	ctg_unlock(port, &cma->lock);
	if (pfn != CTG_PFN_NONE)
		assert_true(fits);
	return pfn;
}

static bool fits(struct ctg_cma *cma, const struct ctg_search *search)
{
	return ctg_place_fits(cma, &search->want);
}

static void take_bits(struct ctg_cma *cma, uint64_t bit, uint64_t nr)
{
	ctg_bitmap_set(&cma->ranges[0].taken, bit, nr);
}

/* ---- what to avoid --------------------------------------------------------------------------- */

static void check_extent(const struct ctg_avoid *avoid, unsigned i, ctg_pfn_t pfn, uint64_t nr)
{
	assert_in_range(i, 0, avoid->nr - 1);
	assert_int_equal(avoid->at[i].pfn, pfn);
	assert_int_equal(avoid->at[i].nr, nr);
}

static void test_avoid_keeps_windows_between(void **state)
{
	struct ctg_avoid avoid = {.nr = 0};

	(void)state;
	ctg_avoid_add(&avoid, 1000, 1, 10);
	ctg_avoid_add(&avoid, 1011, 1, 10); /* ten frames fit between */
	ctg_avoid_add(&avoid, 989, 1, 10);
	assert_int_equal(avoid.nr, 3);
	check_extent(&avoid, 0, 989, 1);
	check_extent(&avoid, 1, 1000, 1);
	check_extent(&avoid, 2, 1011, 1);
	ctg_avoid_add(&avoid, 1021, 4, 10); /* nine do not */
	assert_int_equal(avoid.nr, 3);
	check_extent(&avoid, 2, 1011, 14);
	ctg_avoid_add(&avoid, 1005, 1, 10); /* joins both neighbours */
	assert_int_equal(avoid.nr, 2);
	check_extent(&avoid, 1, 1000, 25);
	ctg_avoid_add(&avoid, 1003, 2, 10); /* known already */
	assert_int_equal(avoid.nr, 2);
	check_extent(&avoid, 1, 1000, 25);
	ctg_avoid_add(&avoid, 900, 500, 10); /* swallows all */
	assert_int_equal(avoid.nr, 1);
	check_extent(&avoid, 0, 900, 500);
}

static void test_avoid_when_full(void **state)
{
	struct ctg_avoid avoid = {.nr = 0};

	(void)state;
	for (unsigned i = 0; i < CTG_AVOID_MAX; i++)
		ctg_avoid_add(&avoid, 1000 + 100 * i + (i == 7 ? 50 : 0), 1, 2);
	assert_int_equal(avoid.nr, CTG_AVOID_MAX);
	/* The nearest two are 7 and 8; everything stays excluded, and sorted. */
	ctg_avoid_add(&avoid, 100, 1, 2);
	assert_int_equal(avoid.nr, CTG_AVOID_MAX);
	check_extent(&avoid, 0, 100, 1);
	check_extent(&avoid, 8, 1750, 51);
	for (unsigned i = 1; i < avoid.nr; i++)
		assert_true(avoid.at[i - 1].pfn + avoid.at[i - 1].nr < avoid.at[i].pfn);
}

/* ---- what may be a window -------------------------------------------------------------------- */

/* Alignment is of the pfn, not of the offset in the area. */
static void test_alignment_of_the_pfn(void **state)
{
	struct lend *l = lend_open(32, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 1, 31, 0);
	struct ctg_search search = search_for(3);

	(void)state;
	for (unsigned order = 0; order <= 13; order++) {
		search.want.align = (uint64_t)1 << order;
		assert_int_equal(place(cma, &search) % search.want.align, 0);
	}
	/* The zone begins at 8 blocks, so the area has one frame aligned to 16 blocks. */
	search.want.align = 16 * BLOCK;
	assert_int_equal(place(cma, &search), 16 * BLOCK);
	take_bits(cma, 7 * BLOCK, 1);
	assert_int_equal(place(cma, &search), 32 * BLOCK);
	search.want.align = 64 * BLOCK;
	assert_false(fits(cma, &search));
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	lend_close(l);
}

static void test_limit(void **state)
{
	struct lend *l = lend_open(8, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 2, 6, 0);
	struct ctg_search search = search_for(100);

	(void)state;
	search.want.limit = at(2 * BLOCK + 100);
	assert_int_equal(place(cma, &search), at(2 * BLOCK));
	search.want.limit--;
	assert_false(fits(cma, &search));
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	search.want.limit = 1; /* below the area */
	assert_false(fits(cma, &search));
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	/* The same when nothing is free. */
	fill(l, cma->nr);
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	search.want.limit = at(2 * BLOCK + 100);
	assert_int_equal(place(cma, &search), at(2 * BLOCK));
	search.want.limit = at(2 * BLOCK + 150);
	take_bits(cma, 0, 30);
	assert_in_range(place(cma, &search), at(2 * BLOCK + 30), at(2 * BLOCK + 50));
	lend_close(l);
}

static void check_boundary(ctg_pfn_t pfn, const struct ctg_want *want)
{
	assert_int_not_equal(pfn, CTG_PFN_NONE);
	assert_int_equal(pfn / want->boundary, (pfn + want->nr - 1) / want->boundary);
	assert_int_equal(pfn % want->align, 0);
}

static void test_boundary(void **state)
{
	struct lend *l = lend_open(16, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 16, 0);
	struct ctg_search search = search_for(700);

	(void)state;
	search.want.boundary = 1024;
	take_bits(cma, 0, 400); /* 624 frames are left before the first boundary */
	assert_int_equal(place(cma, &search), at(1024));
	fill(l, cma->nr);
	check_boundary(place(cma, &search), &search.want);
	/* A boundary that leaves no start but its own multiples. */
	search.want.nr = 1024;
	assert_int_equal(place(cma, &search) % 1024, 0);
	search.want.nr = 6;
	search.want.boundary = 8;
	search.want.align = 2;
	check_boundary(place(cma, &search), &search.want);
	/* Only one window: 16 frames free of bits, which begin at 5 and hold 8..13 and 10..15. */
	take_bits(cma, 400, 2 * BLOCK + 5 - 400);
	take_bits(cma, 2 * BLOCK + 21, 14 * BLOCK - 21);
	search.want.nr = 8;
	assert_int_equal(place(cma, &search), at(2 * BLOCK + 8));
	search.want.align = 16;
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	assert_false(fits(cma, &search));
	lend_close(l);
}

/* A window never crosses from one range to another, even if they are neighbours. */
static void test_ranges_are_not_crossed(void **state)
{
	struct lend *l = lend_open(8, 1, true);
	struct ctg_extent ranges[] = {
		{at(4 * BLOCK), 2 * BLOCK}, {at(0), BLOCK}, {at(BLOCK), BLOCK}};
	struct ctg_cma_config config = {.name = "three", .ranges = ranges, .nr_ranges = 3};
	struct ctg_search search = search_for(BLOCK + 1);
	struct ctg_cma *cma;

	(void)state;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	assert_in_range(place(cma, &search), at(4 * BLOCK), at(5 * BLOCK - 1));
	search.want.nr = 2 * BLOCK;
	assert_int_equal(place(cma, &search), at(4 * BLOCK));
	take_bits(cma, BLOCK, 1);
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	assert_false(fits(cma, &search));
	fill(l, cma->nr);
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	search.want.nr = BLOCK;
	assert_int_not_equal(place(cma, &search), CTG_PFN_NONE);
	lend_close(l);
}

/* ---- choice ---------------------------------------------------------------------------------- */

static void test_free_window_first(void **state)
{
	struct lend *l = lend_open(8, 4, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_search search = search_for(600);

	(void)state;
	fill(l, cma->nr);
	unlend(l, at(5 * BLOCK + 100), 600);
	unlend(l, at(BLOCK), 599);
	assert_int_equal(place(cma, &search), at(5 * BLOCK + 100));
	search.first_fit = true;
	assert_int_equal(place(cma, &search), at(0));
	search.first_fit = false;
	search.want.align = 4;
	assert_int_equal(place(cma, &search), at(5 * BLOCK + 100));
	/* Aligned to 128, the free run has room for less: one frame to copy is the least. */
	search.want.align = 512;
	assert_int_equal(place(cma, &search), at(BLOCK));
	/* Free, but about to be taken by somebody: not a window. */
	take_bits(cma, 5 * BLOCK + 300, 1);
	search.want.align = 1;
	assert_int_equal(place(cma, &search), at(BLOCK));
	lend_close(l);
}

static uint64_t used_in(struct lend *l, ctg_pfn_t pfn, uint64_t nr)
{
	uint64_t used = 0;
	uint32_t info;

	for (uint64_t i = 0; i < nr; i++)
		used += ctg_buddy_find(l->zone, pfn + i, &info) == CTG_PFN_NONE;
	return used;
}

/* The least cost of all windows, by looking at every one. UINT64_MAX: there is none. */
static uint64_t least_cost(struct lend *l, struct ctg_cma *cma, const struct ctg_want *want)
{
	const struct ctg_area_range *range = &cma->ranges[0];
	uint64_t least = UINT64_MAX;

	for (ctg_pfn_t pfn = range->base; pfn + want->nr <= range->base + range->nr; pfn++) {
		uint64_t cost;

		if (pfn % want->align != 0 || pfn + want->nr > want->limit)
			continue;
		if (want->boundary != 0 &&
			pfn / want->boundary != (pfn + want->nr - 1) / want->boundary)
			continue;
		if (!ctg_bitmap_all_clear(&range->taken, (pfn - range->base) >> cma->order_per_bit,
			    want->nr >> cma->order_per_bit))
			continue;
		cost = used_in(l, pfn, want->nr);
		if (cost < least)
			least = cost;
	}
	return least;
}

static void test_least_cost(void **state)
{
	static const uint64_t sizes[] = {
		1, 7, 51, 64, 101, 300, 511, 512, 513, 1000, 1024, 1500, 3000};
	static const uint64_t aligns[] = {1, 4, 64, 512, 1024};
	static const uint64_t bounds[] = {0, 64, 128, 2048};
	struct lend *l = lend_open(12, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 12, 0);
	uint64_t hole = 3;

	(void)state;
	fill(l, cma->nr);
	take_bits(cma, 7 * BLOCK + 77, 3);
	/* Holes of many sizes, none of which repeats. */
	for (uint64_t offset = 5; offset + hole < cma->nr; offset += 3 * hole + 11, hole += 7)
		unlend(l, at(offset), hole);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (size_t j = 0; j < sizeof(aligns) / sizeof(aligns[0]); j++)
			for (size_t k = 0; k < sizeof(bounds) / sizeof(bounds[0]); k++) {
				struct ctg_search search = search_for(sizes[i]);
				ctg_pfn_t pfn;

				search.want.align = aligns[j];
				search.want.boundary = bounds[k];
				if (bounds[k] != 0 && sizes[i] > bounds[k])
					continue;
				pfn = place(cma, &search);
				assert_int_not_equal(pfn, CTG_PFN_NONE);
				assert_int_equal(pfn % aligns[j], 0);
				assert_int_equal(used_in(l, pfn, sizes[i]),
					least_cost(l, cma, &search.want));
			}
	lend_close(l);
}

/* Boundaries inside a pageblock, and no hole that is large enough. */
static void test_least_cost_within_boundaries(void **state)
{
	static const uint64_t sizes[] = {51, 63, 100, 127, 200};
	struct lend *l = lend_open(6, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 6, 0);

	(void)state;
	fill(l, cma->nr);
	for (uint64_t offset = 5, i = 1; offset + 50 < cma->nr; offset += 61, i++)
		unlend(l, at(offset), 1 + i * 29 % 47);
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++)
		for (uint64_t boundary = 64; boundary <= 512; boundary *= 2)
			for (uint64_t align = 1; align <= 4; align *= 2) {
				struct ctg_search search = search_for(sizes[i]);
				ctg_pfn_t pfn;

				if (boundary < sizes[i])
					continue;
				search.want.align = align;
				search.want.boundary = boundary;
				pfn = place(cma, &search);
				check_boundary(pfn, &search.want);
				assert_int_equal(used_in(l, pfn, sizes[i]),
					least_cost(l, cma, &search.want));
			}
	lend_close(l);
}

/* The only good window is the last before a boundary. */
static void test_last_before_a_boundary(void **state)
{
	struct lend *l = lend_open(3, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 3, 0);
	struct ctg_search search = search_for(51);

	(void)state;
	fill(l, cma->nr);
	unlend(l, at(BLOCK + 462), 50);
	search.want.boundary = 512;
	assert_int_equal(place(cma, &search), at(BLOCK + 461));
	lend_close(l);
}

/* Of equals, the one that isolates the fewest pageblocks; of those, the lowest. */
static void test_ties(void **state)
{
	struct lend *l = lend_open(8, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_search search = search_for(2 * BLOCK);

	(void)state;
	fill(l, cma->nr);
	assert_int_equal(place(cma, &search), at(0));
	take_bits(cma, 10, 1);
	assert_int_equal(place(cma, &search), at(BLOCK));
	search.want.nr = 200;
	assert_int_equal(place(cma, &search), at(11));
	take_bits(cma, 100, 1);
	assert_int_equal(place(cma, &search), at(101));
	take_bits(cma, 300, 1);
	take_bits(cma, 400, 1);
	assert_int_equal(place(cma, &search), at(BLOCK));
	lend_close(l);
}

/* More groups tie than are looked into: still a window, and not a bad one. */
static void test_many_groups(void **state)
{
	struct lend *l = lend_open(80, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 80, 0);
	struct ctg_search search = search_for(BLOCK + 2);
	ctg_pfn_t pfn;

	(void)state;
	fill(l, cma->nr);
	for (uint64_t block = 0; block < 80; block++)
		unlend(l, at(block * BLOCK + 50 + block), 100 + (block * 37) % 80);
	pfn = place(cma, &search);
	assert_int_not_equal(pfn, CTG_PFN_NONE);
	assert_in_range(used_in(l, pfn, BLOCK + 2), least_cost(l, cma, &search.want),
		least_cost(l, cma, &search.want) + 80);
	lend_close(l);
}

static void test_avoids_what_failed(void **state)
{
	struct lend *l = lend_open(6, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 6, 0);
	struct ctg_search search = search_for(2 * BLOCK);

	(void)state;
	/* Also windows that are free. */
	ctg_avoid_add(&search.failed, at(700), 1, 2 * BLOCK);
	assert_in_range(place(cma, &search), at(701), at(4 * BLOCK));
	fill(l, cma->nr);
	assert_int_equal(place(cma, &search), at(2 * BLOCK));
	ctg_avoid_add(&search.held, at(2 * BLOCK + 600), 1, 2 * BLOCK);
	assert_in_range(place(cma, &search), at(3 * BLOCK + 89), at(4 * BLOCK));
	ctg_avoid_add(&search.held, at(5 * BLOCK), 1, 2 * BLOCK);
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	assert_int_equal(search.isolated, CTG_PFN_NONE);
	search.use_held = true;
	assert_int_equal(place(cma, &search), at(2 * BLOCK));
	search.first_fit = true;
	assert_int_equal(place(cma, &search), at(701));
	lend_close(l);
}

static void test_avoids_isolated_blocks(void **state)
{
	struct lend *l = lend_open(6, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 6, 0);
	struct ctg_search search = search_for(2 * BLOCK);
	int me;

	(void)state;
	assert_int_equal(ctg_block_isolate(l->zone, at(BLOCK), &me), 0);
	assert_int_equal(place(cma, &search), at(2 * BLOCK));
	assert_int_equal(ctg_block_isolate(l->zone, at(4 * BLOCK), &me), 0);
	take_bits(cma, 3 * BLOCK, 1);
	assert_int_equal(place(cma, &search), CTG_PFN_NONE);
	assert_int_equal(search.isolated, at(BLOCK));
	assert_true(fits(cma, &search));
	ctg_block_unisolate(l->zone, at(BLOCK), &me);
	assert_int_equal(place(cma, &search), at(0));
	ctg_block_unisolate(l->zone, at(4 * BLOCK), &me);
	lend_close(l);
}

/* With a granularity, windows begin and end with bits. */
static void test_granularity(void **state)
{
	struct lend *l = lend_open(6, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 6, 3);
	struct ctg_search search = search_for(BLOCK + 16);

	(void)state;
	search.want.align = 8;
	fill(l, cma->nr);
	unlend(l, at(BLOCK + 100), BLOCK + 22);
	/* 1124 is free from 612 to 1134: whole bits from 616 to 1128. */
	assert_int_equal(place(cma, &search) % 8, 0);
	assert_int_equal(
		used_in(l, place(cma, &search), search.want.nr), least_cost(l, cma, &search.want));
	search.want.nr = BLOCK;
	assert_int_equal(place(cma, &search), at(BLOCK + 104));
	take_bits(cma, (BLOCK + 104) / 8, 1);
	assert_int_equal(place(cma, &search) % 8, 0);
	assert_int_equal(
		used_in(l, place(cma, &search), search.want.nr), least_cost(l, cma, &search.want));
	lend_close(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_avoid_keeps_windows_between),
		cmocka_unit_test(test_avoid_when_full),
		cmocka_unit_test(test_alignment_of_the_pfn),
		cmocka_unit_test(test_limit),
		cmocka_unit_test(test_boundary),
		cmocka_unit_test(test_ranges_are_not_crossed),
		cmocka_unit_test(test_free_window_first),
		cmocka_unit_test(test_least_cost),
		cmocka_unit_test(test_least_cost_within_boundaries),
		cmocka_unit_test(test_last_before_a_boundary),
		cmocka_unit_test(test_ties),
		cmocka_unit_test(test_many_groups),
		cmocka_unit_test(test_avoids_what_failed),
		cmocka_unit_test(test_avoids_isolated_blocks),
		cmocka_unit_test(test_granularity),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
