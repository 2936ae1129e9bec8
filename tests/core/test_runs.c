/* SPDX-License-Identifier: MIT */
/* The tree of free runs: exact against a walk over all frames, and cheap on large zones. */
#include "zone_check.h"

#include <sys/mman.h>

#define BASE (5 * BLOCK)

static uint64_t seed;

static uint64_t rnd(uint64_t below)
{
	seed = seed * 6364136223846793005u + 1442695040888963407u;
	return (seed >> 33) % below;
}

static struct ctg_zone *zone_of_blocks(struct ctg_sim **sim, ctg_pfn_t base, uint64_t blocks)
{
	struct ctg_zone_config config = {.base = base, .nr = blocks * BLOCK};
	struct ctg_zone *zone = NULL;

	assert_int_equal(ctg_sim_create(NULL, sim), 0);
	assert_int_equal(ctg_sim_add_zone(*sim, &config, true, &zone), 0);
	return zone;
}

static void take(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	ctg_pfn_t busy;
	bool zeroed;

	assert_int_equal(ctg_buddy_take_range(zone, pfn, nr, NULL, &zeroed, &busy), 0);
}

static void give(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	for (ctg_pfn_t p = pfn; p < pfn + nr; p++)
		frame_at(zone, p)->word.v = 0;
	ctg_buddy_free_range(zone, pfn, nr, false);
}

/* A few hundred queries at random places. */
static void compare(struct ctg_zone *zone)
{
	bool *map = calloc(zone->nr, sizeof(*map));

	assert_non_null(map);
	free_map(zone, map);
	check_longest(zone, map, 0, zone->nr);
	for (unsigned i = 0; i < 60; i++) {
		uint64_t from = rnd(zone->nr), to = from + rnd(zone->nr - from + 1);
		uint64_t nr = 1 + rnd(i % 2 == 0 ? 12 : 2 * BLOCK);
		uint64_t align = (uint64_t)1 << rnd(12);

		if (i % 4 == 0)
			from -= from % BLOCK;
		if (i % 8 < 2)
			to -= (to - from) % BLOCK;
		assert_int_equal(ctg_runs_find(zone, zone->base + from, zone->base + to, nr, align),
			slow_find(zone, map, from, to, nr, align));
		check_longest(zone, map, from, to);
	}
	free(map);
}

/* Trees of every shape, full, empty, and everything between. */
static void exact_for_every_number_of_blocks(void **state)
{
	static const int me;

	(void)state;
	for (uint64_t blocks = 1; blocks <= 19; blocks++) {
		struct ctg_sim *sim = NULL;
		struct ctg_zone *zone = zone_of_blocks(&sim, BASE, blocks);

		seed = blocks;
		compare(zone);
		assert_int_equal(ctg_zone_release(zone, BASE, blocks * BLOCK, false), 0);
		compare(zone);
		for (unsigned i = 0; i < 40; i++) {
			ctg_pfn_t pfn = BASE + rnd(zone->nr);
			uint64_t nr = 1 + rnd(i % 3 == 0 ? BLOCK : 9);
			ctg_pfn_t p;

			for (p = pfn; p < pfn + nr && p < BASE + zone->nr; p++)
				if (!frame_is_free(zone, p))
					break;
			if (p > pfn)
				take(zone, pfn, p - pfn);
			else if (ctg_info_state(info_at(zone, pfn)) == CTG_FRAME_CONTIG)
				give(zone, pfn, 1);
			if (i % 5 == 0)
				compare(zone);
		}
		assert_int_equal(ctg_block_isolate(zone, BASE + rnd(zone->nr), &me), 0);
		compare(zone);
		ctg_sim_destroy(sim);
	}
}

static void one_frame_makes_the_difference(void **state)
{
	struct ctg_sim *sim = NULL;
	struct ctg_zone *zone = zone_of_blocks(&sim, BASE, 11);
	struct ctg_extent run;

	(void)state;
	run = ctg_runs_longest(zone, BASE, zone->nr);
	assert_int_equal(run.nr, 0);
	assert_int_equal(run.pfn, CTG_PFN_NONE);
	assert_int_equal(ctg_zone_release(zone, BASE, zone->nr, false), 0);
	for (ctg_pfn_t p = BASE; p < BASE + zone->nr; p += 61) {
		uint64_t left = p - BASE, right = BASE + zone->nr - p - 1;

		take(zone, p, 1);
		run = ctg_runs_longest(zone, BASE, zone->nr);
		assert_int_equal(run.nr, left >= right ? left : right);
		assert_int_equal(run.pfn, left >= right ? BASE : p + 1);
		assert_int_equal(ctg_runs_find(zone, BASE, BASE + zone->nr, right, 1),
			right <= left ? BASE : p + 1);
		assert_int_equal(
			ctg_runs_find(zone, BASE, BASE + zone->nr, run.nr + 1, 1), CTG_PFN_NONE);
		give(zone, p, 1);
	}
	run = ctg_runs_longest(zone, BASE, zone->nr);
	assert_int_equal(run.nr, zone->nr);
	ctg_sim_destroy(sim);
}

static void bad_questions_have_no_answer(void **state)
{
	struct ctg_sim *sim = NULL;
	struct ctg_zone *zone = zone_of_blocks(&sim, BASE, 4);
	ctg_pfn_t end = BASE + 4 * BLOCK;

	(void)state;
	assert_int_equal(ctg_zone_release(zone, BASE, zone->nr, false), 0);
	assert_int_equal(ctg_runs_find(zone, BASE, end, 0, 1), CTG_PFN_NONE);
	assert_int_equal(ctg_runs_find(zone, BASE, end, 1, 0), CTG_PFN_NONE);
	assert_int_equal(ctg_runs_find(zone, BASE, end, 1, 3), CTG_PFN_NONE);
	assert_int_equal(ctg_runs_find(zone, BASE, BASE, 1, 1), CTG_PFN_NONE);
	assert_int_equal(ctg_runs_find(zone, end, BASE, 1, 1), CTG_PFN_NONE);
	assert_int_equal(ctg_runs_find(zone, BASE, end, UINT64_MAX, 1), CTG_PFN_NONE);
	assert_int_equal(ctg_runs_find(zone, BASE, end, 1, (uint64_t)1 << 63), CTG_PFN_NONE);
	/* A range that is larger than the zone is the zone. */
	assert_int_equal(ctg_runs_find(zone, 0, UINT64_MAX, 4 * BLOCK, 1), BASE);
	assert_int_equal(ctg_runs_longest(zone, BASE, 0).nr, 0);
	assert_int_equal(ctg_runs_longest(zone, BASE + 5, 1).nr, 1);
	ctg_sim_destroy(sim);
}

static uint64_t pages_touched(const struct ctg_zone *zone)
{
	size_t pages = (ctg_zone_metadata_bytes(zone->nr) + 4095) / 4096;
	unsigned char *map = malloc(pages);
	uint64_t touched = 0;

	assert_non_null(map);
	assert_int_equal(mincore(zone->frames, pages * 4096, map), 0);
	for (size_t i = 0; i < pages; i++)
		touched += map[i] & 1;
	free(map);
	return touched;
}

/* What taking 300 MiB touches, in pages of metadata, in a zone of so many GiB. */
static uint64_t cost_of_taking(uint64_t gib)
{
	const uint64_t nr = 300 << 8;
	struct ctg_sim *sim = NULL;
	struct ctg_zone *zone = zone_of_blocks(&sim, (uint64_t)1 << CTG_MAX_ORDER, gib << 9);
	uint64_t before, after;
	ctg_pfn_t pfn;

	madvise(zone->frames, ctg_zone_metadata_bytes(zone->nr), MADV_NOHUGEPAGE);
	assert_int_equal(ctg_zone_lend(zone, zone->base, zone->nr, CTG_MIGRATE_CMA, true), 0);
	assert_int_equal(zone->free[CTG_MAX_ORDER][CTG_MIGRATE_CMA].nr, gib);
	assert_int_equal(ctg_runs_longest(zone, zone->base, zone->nr).nr, zone->nr);
	before = pages_touched(zone);
	/* A head a GiB, and the summaries. */
	assert_true(before <= gib + 1 + 48 * zone->nr_blocks / 4096 + 2);
	pfn = ctg_runs_find(zone, zone->base + 77, zone->base + zone->nr, nr, 256);
	assert_int_equal(pfn, zone->base + 256);
	take(zone, pfn, nr);
	after = pages_touched(zone);
	assert_int_equal(ctg_runs_longest(zone, zone->base, zone->nr).nr, zone->nr - 256 - nr);
	give(zone, pfn, nr);
	assert_int_equal(zone->free[CTG_MAX_ORDER][CTG_MIGRATE_CMA].nr, gib);
	assert_int_equal(ctg_runs_longest(zone, zone->base, zone->nr).nr, zone->nr);
	assert_int_equal(pages_touched(zone), after);
	ctg_sim_destroy(sim);
	return after - before;
}

static void a_large_area_costs_no_more_than_a_small_one(void **state)
{
	uint64_t small = cost_of_taking(1);

	(void)state;
	/* The frames that were taken, and the heads of the pieces around them. */
	assert_in_range(small, (300u << 8) * sizeof(struct ctg_frame) / 4096,
		(300u << 8) * sizeof(struct ctg_frame) / 4096 + 2 * CTG_NR_ORDERS);
	assert_int_equal(cost_of_taking(16), small);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(exact_for_every_number_of_blocks),
		cmocka_unit_test(one_frame_makes_the_difference),
		cmocka_unit_test(bad_questions_have_no_answer),
		cmocka_unit_test(a_large_area_costs_no_more_than_a_small_one),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
