/* SPDX-License-Identifier: MIT */
/* Isolation of pageblocks. */
#include "zone_check.h"

#define BASE (16 * BLOCK)
#define NR (16 * BLOCK)

struct fixture {
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
};

static const int me, other;

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct ctg_zone_config config = {.base = BASE, .nr = NR};

	assert_non_null(f);
	assert_int_equal(ctg_sim_create(NULL, &f->sim), 0);
	f->ctg = ctg_sim_machine(f->sim);
	assert_int_equal(ctg_sim_add_zone(f->sim, &config, true, &f->zone), 0);
	assert_int_equal(ctg_zone_release(f->zone, BASE, 8 * BLOCK, true), 0);
	assert_int_equal(
		ctg_zone_lend(f->zone, BASE + 8 * BLOCK, 4 * BLOCK, CTG_MIGRATE_CMA, true), 0);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	check_zone(f->zone);
	ctg_sim_destroy(f->sim);
	free(f);
	return 0;
}

static uint64_t blocks_of(const struct fixture *f, unsigned order, enum ctg_migratetype mt)
{
	return f->zone->free[order][mt].nr;
}

static void splits_the_larger_free_block(void **state)
{
	struct fixture *f = *state;
	struct ctg_zone_stat stat;

	assert_int_equal(blocks_of(f, 12, CTG_MIGRATE_MOVABLE), 1);
	/* Any frame of the block names it. */
	assert_int_equal(ctg_block_isolate(f->zone, BASE + 3 * BLOCK + 77, &me), 0);
	check_zone(f->zone);
	ctg_zone_stat(f->zone, &stat);
	assert_int_equal(stat.nr_isolated_free, BLOCK);
	assert_int_equal(stat.nr_free, 11 * BLOCK);
	assert_int_equal(stat.free_blocks[9][CTG_MIGRATE_ISOLATE], 1);
	assert_int_equal(stat.free_blocks[9][CTG_MIGRATE_MOVABLE], 1);
	assert_int_equal(stat.free_blocks[10][CTG_MIGRATE_MOVABLE], 1);
	assert_int_equal(stat.free_blocks[11][CTG_MIGRATE_MOVABLE], 1);
	assert_int_equal(stat.longest_free, 8 * BLOCK);
	assert_int_equal(stat.longest_free_pfn, BASE + 4 * BLOCK);
	ctg_block_unisolate(f->zone, BASE + 3 * BLOCK, &me);
	assert_int_equal(blocks_of(f, 12, CTG_MIGRATE_MOVABLE), 1);
	ctg_zone_stat(f->zone, &stat);
	assert_int_equal(stat.longest_free, 12 * BLOCK);
	/* Nothing was written to the frames: all is still known to be zero. */
	assert_int_equal(ctg_info_flags(info_at(f->zone, BASE)), CTG_FRAME_ZEROED);
}

static void belongs_to_who_isolated_it(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(ctg_block_isolate(f->zone, BASE, &me), 0);
	assert_int_equal(ctg_block_isolate(f->zone, BASE, &other), -CTG_EBUSY);
	assert_int_equal(ctg_block_isolate(f->zone, BASE + 5, &me), -CTG_EBUSY);
	assert_int_equal(ctg_block_isolate(f->zone, BASE + BLOCK, &other), 0);
	ctg_block_unisolate(f->zone, BASE, &me);
	assert_int_equal(ctg_block_isolate(f->zone, BASE, &other), 0);
	ctg_block_unisolate(f->zone, BASE, &other);
	ctg_block_unisolate(f->zone, BASE + BLOCK, &other);
	assert_int_equal(blocks_of(f, 12, CTG_MIGRATE_MOVABLE), 1);
}

static void refuses_what_is_not_memory(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(ctg_block_isolate(f->zone, BASE - 1, &me), -CTG_EINVAL);
	assert_int_equal(ctg_block_isolate(f->zone, BASE + NR, &me), -CTG_EINVAL);
	assert_int_equal(ctg_block_isolate(f->zone, BASE + 12 * BLOCK, &me), -CTG_EINVAL);
}

static void nothing_is_allocated_there(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[7 * 512];
	unsigned nr = 0;

	for (unsigned b = 0; b < 12; b++)
		if (b != 2 && b != 9)
			assert_int_equal(ctg_block_isolate(f->zone, BASE + b * BLOCK, &me), 0);
	while (ctg_alloc_frames(f->ctg, 0, CTG_GFP_MOVABLE, &pfn[nr]) == 0) {
		ctg_pfn_t at = ctg_block_start(pfn[nr]);

		/* The area first. */
		assert_int_equal(at, BASE + (nr < BLOCK ? 9 : 2) * BLOCK);
		nr++;
	}
	assert_int_equal(nr, 2 * BLOCK);
	assert_int_equal(ctg_alloc_frames(f->ctg, 0, 0, &pfn[nr]), -CTG_ENOMEM);
	assert_int_equal(ctg_alloc_frames(f->ctg, 9, CTG_GFP_MOVABLE, &pfn[nr]), -CTG_ENOMEM);
	while (nr-- != 0)
		assert_int_equal(ctg_free_frames(f->ctg, pfn[nr]), 0);
	for (unsigned b = 0; b < 12; b++)
		if (b != 2 && b != 9)
			ctg_block_unisolate(f->zone, BASE + b * BLOCK, &me);
	ctg_drain_caches(f->ctg);
	assert_int_equal(blocks_of(f, 12, CTG_MIGRATE_MOVABLE), 1);
	assert_int_equal(blocks_of(f, 11, CTG_MIGRATE_CMA), 1);
}

static void what_is_freed_there_stays(void **state)
{
	struct fixture *f = *state;
	const unsigned orders[] = {0, 3, 9, 10};

	for (unsigned i = 0; i < 4; i++) {
		uint64_t nr = (uint64_t)1 << orders[i];
		struct ctg_zone_stat stat;
		ctg_pfn_t pfn, start;

		assert_int_equal(ctg_alloc_frames(f->ctg, orders[i], CTG_GFP_MOVABLE, &pfn), 0);
		start = ctg_block_start(pfn);
		assert_int_equal(ctg_block_isolate(f->zone, start, &me), 0);
		ctg_pcp_drain(f->zone);
		assert_int_equal(ctg_free_frames(f->ctg, pfn), 0);
		/* Not cached, and not counted as free: it lies on the list at once. */
		assert_true(frame_is_free(f->zone, pfn));
		assert_int_equal(f->zone->nr_free[CTG_MIGRATE_ISOLATE], BLOCK);
		ctg_zone_stat(f->zone, &stat);
		assert_int_equal(stat.nr_free, 11 * BLOCK);
		assert_int_equal(stat.free_blocks[9][CTG_MIGRATE_ISOLATE], 1);
		/* A free block that reached beyond the isolated one was cut at its edge. */
		if (nr > BLOCK)
			assert_int_equal(
				ctg_info_mt(info_at(f->zone, pfn + BLOCK)), CTG_MIGRATE_CMA);
		check_zone(f->zone);
		ctg_block_unisolate(f->zone, start, &me);
		ctg_pcp_drain(f->zone);
		assert_int_equal(blocks_of(f, 11, CTG_MIGRATE_CMA), 1);
	}
}

static void neighbours_do_not_merge_into_it(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn;

	assert_int_equal(ctg_alloc_frames(f->ctg, 9, CTG_GFP_MOVABLE, &pfn), 0);
	assert_int_equal(ctg_block_isolate(f->zone, pfn ^ BLOCK, &me), 0);
	assert_int_equal(ctg_free_frames(f->ctg, pfn), 0);
	check_zone(f->zone);
	assert_int_equal(ctg_block_isolate(f->zone, pfn, &other), 0);
	/* Two isolated neighbours are two blocks. */
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_ISOLATE), 2);
	check_zone(f->zone);
	ctg_block_unisolate(f->zone, pfn ^ BLOCK, &me);
	check_zone(f->zone);
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_ISOLATE), 1);
	ctg_block_unisolate(f->zone, pfn, &other);
	assert_int_equal(blocks_of(f, 11, CTG_MIGRATE_CMA), 1);
}

static void types_do_not_merge(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn;

	/* The area's 4 blocks and the 8 before them would make no buddies anyway; these two do. */
	assert_int_equal(
		ctg_zone_lend(f->zone, BASE + 12 * BLOCK, BLOCK, CTG_MIGRATE_CMA, true), 0);
	assert_int_equal(ctg_zone_release(f->zone, BASE + 13 * BLOCK, BLOCK, true), 0);
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_CMA), 1);
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_MOVABLE), 1);
	assert_int_equal(
		ctg_zone_lend(f->zone, BASE + 14 * BLOCK, 2 * BLOCK, CTG_MIGRATE_CMA, true), 0);
	assert_int_equal(blocks_of(f, 10, CTG_MIGRATE_CMA), 1);
	check_zone(f->zone);
	/* Through isolation and back. */
	for (unsigned b = 12; b < 16; b++)
		assert_int_equal(ctg_block_isolate(f->zone, BASE + b * BLOCK, &me), 0);
	for (unsigned b = 12; b < 16; b++)
		ctg_block_unisolate(f->zone, BASE + b * BLOCK, &me);
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_CMA), 1);
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_MOVABLE), 1);
	assert_int_equal(blocks_of(f, 10, CTG_MIGRATE_CMA), 1);
	assert_int_equal(ctg_alloc_frames(f->ctg, 9, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA, &pfn), 0);
	assert_int_equal(pfn, BASE + 13 * BLOCK);
	assert_int_equal(ctg_free_frames(f->ctg, pfn), 0);
}

static void a_partly_used_block_keeps_its_pieces(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[3], busy;
	bool zeroed;

	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(ctg_alloc_frames(f->ctg, 2 + 2 * i, CTG_GFP_MOVABLE, &pfn[i]), 0);
	assert_int_equal(ctg_block_isolate(f->zone, pfn[0], &me), 0);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_ISOLATE], BLOCK - 4 - 16 - 64);
	/* Ours to take, nobody else's. */
	busy = 0;
	assert_int_equal(
		ctg_buddy_take_range(f->zone, pfn[0] + 4, 4, NULL, &zeroed, &busy), -CTG_EBUSY);
	assert_int_equal(busy, pfn[0] + 4);
	assert_int_equal(
		ctg_buddy_take_range(f->zone, pfn[0] + 4, 4, &other, &zeroed, &busy), -CTG_EBUSY);
	assert_int_equal(ctg_buddy_take_range(f->zone, pfn[0] + 4, 4, &me, &zeroed, &busy), 0);
	assert_true(zeroed);
	check_zone(f->zone);
	for (unsigned i = 0; i < 4; i++)
		ctg_frame_put(f->ctg, pfn[0] + 4 + i, CTG_WORD_REF1, 1);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(ctg_free_frames(f->ctg, pfn[i]), 0);
	assert_int_equal(blocks_of(f, 9, CTG_MIGRATE_ISOLATE), 1);
	ctg_block_unisolate(f->zone, pfn[0], &me);
	assert_int_equal(blocks_of(f, 11, CTG_MIGRATE_CMA), 1);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(splits_the_larger_free_block),
		T(belongs_to_who_isolated_it),
		T(refuses_what_is_not_memory),
		T(nothing_is_allocated_there),
		T(what_is_freed_there_stays),
		T(neighbours_do_not_merge_into_it),
		T(types_do_not_merge),
		T(a_partly_used_block_keeps_its_pieces),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
