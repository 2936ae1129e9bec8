/* SPDX-License-Identifier: MIT */
/* Allocation of frames: orders, types, zones, and what bad input does. */
#include "zone_check.h"

#include <pthread.h>

#define BASE (16 * BLOCK)
#define NR (16 * BLOCK)
#define ORDINARY 8 /* pageblocks; the other 8 are an area */
#define MOVABLE CTG_GFP_MOVABLE

struct fixture {
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
};

static void open_sim(struct fixture *f)
{
	struct ctg_sim_config sim = {.nr_cpus = 4};

	assert_int_equal(ctg_sim_create(&sim, &f->sim), 0);
	f->ctg = ctg_sim_machine(f->sim);
	ctg_sim_set_cpu(0);
}

static struct ctg_zone *add_zone(struct fixture *f, ctg_pfn_t base, uint64_t nr, unsigned flags,
	unsigned map_order, bool zeroed)
{
	struct ctg_zone_config config = {
		.base = base, .nr = nr, .flags = flags, .map_order = map_order};
	struct ctg_zone *zone = NULL;

	assert_int_equal(ctg_sim_add_zone(f->sim, &config, true, &zone), 0);
	assert_int_equal(ctg_zone_release(zone, base, nr, zeroed), 0);
	return zone;
}

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct ctg_zone_config config = {.base = BASE, .nr = NR};

	assert_non_null(f);
	open_sim(f);
	assert_int_equal(ctg_sim_add_zone(f->sim, &config, true, &f->zone), 0);
	assert_int_equal(ctg_zone_release(f->zone, BASE, ORDINARY * BLOCK, false), 0);
	assert_int_equal(ctg_zone_lend(f->zone, BASE + ORDINARY * BLOCK, NR - ORDINARY * BLOCK,
				 CTG_MIGRATE_CMA, true),
		0);
	*state = f;
	return 0;
}

/* Whatever a test did, all comes back as two blocks (of perhaps another ordinary type). */
static int teardown(void **state)
{
	struct fixture *f = *state;

	ctg_drain_caches(f->ctg);
	check_zone(f->zone);
	assert_int_equal(
		f->zone->nr_free[CTG_MIGRATE_MOVABLE] + f->zone->nr_free[CTG_MIGRATE_UNMOVABLE],
		ORDINARY * BLOCK);
	assert_int_equal(f->zone->free[12][CTG_MIGRATE_CMA].nr, 1);
	ctg_sim_destroy(f->sim);
	free(f);
	return 0;
}

static ctg_pfn_t get(struct fixture *f, unsigned order, unsigned gfp)
{
	ctg_pfn_t pfn = 0;

	assert_int_equal(ctg_alloc_frames(f->ctg, order, gfp, &pfn), 0);
	assert_int_equal(pfn % ((uint64_t)1 << order), 0);
	return pfn;
}

static void put(struct fixture *f, ctg_pfn_t pfn)
{
	assert_int_equal(ctg_free_frames(f->ctg, pfn), 0);
}

static bool in_area(ctg_pfn_t pfn)
{
	return pfn >= BASE + ORDINARY * BLOCK;
}

static enum ctg_migratetype type_of(const struct fixture *f, ctg_pfn_t pfn)
{
	return (enum ctg_migratetype)f->zone->blocks[(pfn - BASE) / BLOCK].migratetype;
}

static uint64_t blocks_of(const struct fixture *f, unsigned order, enum ctg_migratetype mt)
{
	return f->zone->free[order][mt].nr;
}

static void every_order_is_served(void **state)
{
	struct fixture f;
	ctg_pfn_t pfn[CTG_NR_ORDERS];

	(void)state;
	open_sim(&f);
	/* It begins half a GiB before a boundary, so its only block of 1 GiB is in the middle. */
	f.zone = add_zone(&f, 256 * BLOCK, 1024 * BLOCK, 0, 0, true);
	assert_int_equal(blocks_of(&f, 17, CTG_MIGRATE_MOVABLE), 2);
	assert_int_equal(blocks_of(&f, 18, CTG_MIGRATE_MOVABLE), 1);
	for (unsigned order = CTG_NR_ORDERS; order-- != 0;)
		pfn[order] = get(&f, order, MOVABLE);
	check_zone(f.zone);
	for (unsigned order = 0; order < CTG_NR_ORDERS; order++)
		put(&f, pfn[order]);
	ctg_drain_caches(f.ctg);
	assert_int_equal(blocks_of(&f, 17, CTG_MIGRATE_MOVABLE), 2);
	assert_int_equal(blocks_of(&f, 18, CTG_MIGRATE_MOVABLE), 1);
	/* The smallest block that suffices is broken, not the largest. */
	pfn[0] = get(&f, 16, MOVABLE);
	assert_int_equal(blocks_of(&f, 18, CTG_MIGRATE_MOVABLE), 1);
	assert_int_equal(blocks_of(&f, 16, CTG_MIGRATE_MOVABLE), 1);
	pfn[1] = get(&f, 16, MOVABLE);
	assert_int_equal(blocks_of(&f, 17, CTG_MIGRATE_MOVABLE), 1);
	put(&f, pfn[0]);
	put(&f, pfn[1]);
	check_zone(f.zone);
	ctg_sim_destroy(f.sim);
}

static void bad_requests_change_nothing(void **state)
{
	struct fixture *f = *state;
	const unsigned bad[] = {CTG_GFP_NO_ORDINARY, CTG_GFP_NO_ORDINARY | CTG_GFP_ZERO,
		MOVABLE | CTG_GFP_NO_ORDINARY | CTG_GFP_NO_CMA, 1u << 5, MOVABLE | 1u << 31};
	ctg_pfn_t pfn = 12345;
	unsigned order;

	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		assert_int_equal(ctg_alloc_frames(f->ctg, 0, bad[i], &pfn), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_frames(f->ctg, CTG_NR_ORDERS, MOVABLE, &pfn), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_frames(f->ctg, UINT32_MAX, MOVABLE, &pfn), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_frames(NULL, 0, MOVABLE, &pfn), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_frames(f->ctg, 0, MOVABLE, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_run(f->ctg, 3, 4, MOVABLE, &pfn, &order), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_frames(f->ctg, 13, MOVABLE, &pfn), -CTG_ENOMEM);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_CMA], 8 * BLOCK);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_MOVABLE], 8 * BLOCK);
}

static void only_heads_with_a_reference_are_freed(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn = get(f, 4, MOVABLE), single = get(f, 0, MOVABLE), busy;
	struct ctg_frame *head = frame_at(f->zone, pfn);
	bool zeroed;

	assert_int_equal(ctg_free_frames(NULL, pfn), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(f->ctg, BASE - 1), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(f->ctg, BASE + NR), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(f->ctg, UINT64_MAX), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(f->ctg, BASE), -CTG_EINVAL);
	for (unsigned i = 1; i < 16; i++)
		assert_int_equal(ctg_free_frames(f->ctg, pfn + i), -CTG_EINVAL);
	/* Held, but not by a plain reference. */
	head->word.v = CTG_WORD_PIN1 + 3 * CTG_WORD_MAP1;
	assert_int_equal(ctg_free_frames(f->ctg, pfn), -CTG_EINVAL);
	assert_int_equal(head->word.v, CTG_WORD_PIN1 + 3 * CTG_WORD_MAP1);
	head->word.v = CTG_WORD_REF1;
	/* Mapped memory is its mapper's to free, and so is what was taken as a range. */
	head->info.v = CTG_INFO(CTG_FRAME_ANON, 4, CTG_MIGRATE_CMA, 0);
	assert_int_equal(ctg_free_frames(f->ctg, pfn), -CTG_EINVAL);
	head->info.v = CTG_INFO(CTG_FRAME_USED, 4, CTG_MIGRATE_CMA, 0);
	assert_int_equal(ctg_buddy_take_range(f->zone, BASE + 5, 2, NULL, &zeroed, &busy), 0);
	assert_int_equal(ctg_free_frames(f->ctg, BASE + 5), -CTG_EINVAL);
	ctg_frame_put(f->ctg, BASE + 5, CTG_WORD_REF1, 1);
	ctg_frame_put(f->ctg, BASE + 6, CTG_WORD_REF1, 1);
	/* Another holder keeps it. */
	assert_int_equal(ctg_frame_tryget(head), 0);
	put(f, pfn);
	assert_int_equal(ctg_info_state(info_at(f->zone, pfn)), CTG_FRAME_USED);
	put(f, pfn);
	assert_int_equal(ctg_free_frames(f->ctg, pfn), -CTG_EINVAL);
	put(f, single);
	/* Cached, then on a list: a double free is noticed in both places. */
	assert_int_equal(ctg_info_state(info_at(f->zone, single)), CTG_FRAME_PCP);
	assert_int_equal(ctg_free_frames(f->ctg, single), -CTG_EINVAL);
	ctg_drain_caches(f->ctg);
	assert_int_equal(ctg_free_frames(f->ctg, single), -CTG_EINVAL);
}

static void areas_serve_movable_requests_only(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[3 * ORDINARY], none;
	unsigned nr = 0;

	/* The area first, then ordinary memory. */
	pfn[nr] = get(f, 11, MOVABLE);
	assert_true(in_area(pfn[nr++]));
	pfn[nr] = get(f, 11, MOVABLE);
	assert_true(in_area(pfn[nr++]));
	pfn[nr] = get(f, 11, MOVABLE);
	assert_false(in_area(pfn[nr++]));
	while (nr-- != 0)
		put(f, pfn[nr]);
	for (nr = 0; nr < ORDINARY; nr++) {
		pfn[nr] = get(f, 9, nr % 2 == 0 ? 0 : MOVABLE | CTG_GFP_NO_CMA);
		assert_false(in_area(pfn[nr]));
	}
	/* What is free in the area does not count for these. */
	for (unsigned order = 0; order <= 9; order++) {
		assert_int_equal(ctg_alloc_frames(f->ctg, order, 0, &none), -CTG_ENOMEM);
		assert_int_equal(ctg_alloc_frames(f->ctg, order, MOVABLE | CTG_GFP_NO_CMA, &none),
			-CTG_ENOMEM);
	}
	for (; nr < 2 * ORDINARY; nr++) {
		pfn[nr] = get(f, 9, MOVABLE | CTG_GFP_NO_ORDINARY);
		assert_true(in_area(pfn[nr]));
	}
	put(f, pfn[0]);
	assert_int_equal(
		ctg_alloc_frames(f->ctg, 0, MOVABLE | CTG_GFP_NO_ORDINARY, &none), -CTG_ENOMEM);
	pfn[0] = get(f, 9, MOVABLE);
	assert_false(in_area(pfn[0]));
	for (unsigned b = ORDINARY; b < 2 * ORDINARY; b++)
		assert_int_equal(f->zone->blocks[b].migratetype, CTG_MIGRATE_CMA);
	while (nr-- != 0)
		put(f, pfn[nr]);
}

static void unmovable_requests_gather(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t first = get(f, 3, 0), large, pfn[63];

	/* A whole pageblock changed sides, and the next ones come from there. */
	assert_int_equal(type_of(f, first), CTG_MIGRATE_UNMOVABLE);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_UNMOVABLE], BLOCK - 8);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_MOVABLE], 7 * BLOCK);
	for (unsigned i = 0; i < 63; i++) {
		pfn[i] = get(f, 3, 0);
		assert_int_equal(ctg_block_start(pfn[i]), ctg_block_start(first));
	}
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_UNMOVABLE], 0);
	/* More than a pageblock at once. */
	large = get(f, 11, 0);
	for (unsigned b = 0; b < 4; b++)
		assert_int_equal(type_of(f, large + b * BLOCK), CTG_MIGRATE_UNMOVABLE);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_MOVABLE], 3 * BLOCK);
	check_zone(f->zone);
	put(f, large);
	put(f, first);
	for (unsigned i = 0; i < 63; i++)
		put(f, pfn[i]);
}

static void unmovable_requests_take_a_used_block_last(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[ORDINARY], last;

	for (unsigned i = 0; i < ORDINARY; i++)
		pfn[i] = get(f, i == 3 ? 8 : 9, MOVABLE | CTG_GFP_NO_CMA);
	/* Half of one pageblock is left: it becomes unmovable with what is used of it. */
	last = get(f, 2, 0);
	assert_int_equal(ctg_block_start(last), ctg_block_start(pfn[3]));
	assert_int_equal(type_of(f, last), CTG_MIGRATE_UNMOVABLE);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_UNMOVABLE], BLOCK / 2 - 4);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_MOVABLE], 0);
	check_zone(f->zone);
	put(f, pfn[3]);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_UNMOVABLE], BLOCK - 4);
	put(f, last);
	for (unsigned i = 0; i < ORDINARY; i++)
		if (i != 3)
			put(f, pfn[i]);
}

static void unmovable_requests_take_the_most_promising_block(void **state)
{
	struct fixture *f = *state;
	const ctg_pfn_t little = BASE + 2 * BLOCK, much = BASE + 5 * BLOCK;
	const struct ctg_extent taken[] = {{BASE, 2 * BLOCK}, {little + 64, 3 * BLOCK - 64},
		{much, BLOCK / 2}, {much + BLOCK, 2 * BLOCK}};
	ctg_pfn_t pfn, busy;
	bool zeroed;

	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(ctg_buddy_take_range(
					 f->zone, taken[i].pfn, taken[i].nr, NULL, &zeroed, &busy),
			0);
	pfn = get(f, 0, 0);
	assert_int_equal(ctg_block_start(pfn), much);
	assert_int_equal(type_of(f, much), CTG_MIGRATE_UNMOVABLE);
	assert_int_equal(type_of(f, little), CTG_MIGRATE_MOVABLE);
	put(f, pfn);
	for (unsigned i = 0; i < 4; i++)
		for (ctg_pfn_t p = taken[i].pfn; p < taken[i].pfn + taken[i].nr; p++)
			ctg_frame_put(f->ctg, p, CTG_WORD_REF1, 1);
}

static void movable_requests_fall_back(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t unmovable = get(f, 12, 0), pfn;

	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_MOVABLE], 0);
	put(f, unmovable);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_UNMOVABLE], 8 * BLOCK);
	/* A free pageblock changes sides back. */
	pfn = get(f, 4, MOVABLE | CTG_GFP_NO_CMA);
	assert_int_equal(type_of(f, pfn), CTG_MIGRATE_MOVABLE);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_UNMOVABLE], 7 * BLOCK);
	put(f, pfn);
	put(f, get(f, 12 - 1, MOVABLE | CTG_GFP_NO_CMA));
	check_zone(f->zone);
}

static void movable_requests_leave_a_used_block_as_it_is(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[ORDINARY], movable;

	for (unsigned i = 0; i < ORDINARY; i++)
		pfn[i] = get(f, i == 5 ? 1 : 9, 0);
	movable = get(f, 4, MOVABLE | CTG_GFP_NO_CMA);
	assert_int_equal(ctg_block_start(movable), ctg_block_start(pfn[5]));
	assert_int_equal(type_of(f, movable), CTG_MIGRATE_UNMOVABLE);
	put(f, movable);
	for (unsigned i = 0; i < ORDINARY; i++)
		put(f, pfn[i]);
}

static void runs_are_the_largest_there_are(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn, rest[3];
	unsigned order = 0;

	assert_int_equal(ctg_alloc_run(f->ctg, 18, 0, MOVABLE, &pfn, &order), 0);
	assert_int_equal(order, 12);
	assert_true(in_area(pfn));
	put(f, pfn);
	rest[0] = get(f, 11, MOVABLE);
	rest[1] = get(f, 10, MOVABLE | CTG_GFP_NO_ORDINARY);
	rest[2] = get(f, 10, MOVABLE | CTG_GFP_NO_CMA);
	assert_int_equal(
		ctg_alloc_run(f->ctg, 12, 2, MOVABLE | CTG_GFP_NO_ORDINARY, &pfn, &order), 0);
	assert_int_equal(order, 10);
	put(f, pfn);
	assert_int_equal(ctg_alloc_run(f->ctg, 5, 2, MOVABLE, &pfn, &order), 0);
	assert_int_equal(order, 5);
	put(f, pfn);
	assert_int_equal(ctg_alloc_run(f->ctg, 18, 12, MOVABLE, &pfn, &order), -CTG_ENOMEM);
	for (unsigned i = 0; i < 3; i++)
		put(f, rest[i]);
}

static void a_used_block_splits_into_frames(void **state)
{
	struct fixture *f = *state;

	for (unsigned order = 0; order <= 10; order += 5) {
		ctg_pfn_t pfn = get(f, order, 0);
		uint64_t nr = (uint64_t)1 << order;

		ctg_split_used(f->ctg, pfn, order);
		for (ctg_pfn_t p = pfn; p < pfn + nr; p++) {
			assert_int_equal(word_at(f->zone, p), CTG_WORD_REF1);
			assert_int_equal(ctg_info_state(info_at(f->zone, p)), CTG_FRAME_USED);
			assert_int_equal(ctg_info_flags(info_at(f->zone, p)), CTG_FRAME_UNMOVABLE);
		}
		check_zone(f->zone);
		for (ctg_pfn_t p = pfn; p < pfn + nr; p++)
			put(f, nr > 8 ? p ^ 5 : p);
	}
}

static void ranges_are_taken_whole_or_not_at_all(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t hole = get(f, 0, MOVABLE), busy = 0, start = BASE + ORDINARY * BLOCK + 3;
	uint64_t nr = 8 * BLOCK - 5;
	bool zeroed = false;

	ctg_drain_caches(f->ctg);
	if (hole < start)
		start = hole + 1, nr -= 2;
	assert_int_equal(ctg_buddy_take_range(f->zone, BASE, NR, NULL, &zeroed, &busy), -CTG_EBUSY);
	assert_int_equal(busy, hole);
	check_zone(f->zone);
	assert_int_equal(ctg_buddy_take_range(f->zone, hole, 1, NULL, &zeroed, &busy), -CTG_EBUSY);
	put(f, hole);
	ctg_drain_caches(f->ctg);
	/* Nobody has written to the area but that one frame, which merging has spread. */
	assert_int_equal(ctg_buddy_take_range(f->zone, start, nr, NULL, &zeroed, &busy), 0);
	assert_false(zeroed);
	check_zone(f->zone);
	assert_int_equal(f->zone->blocks[ORDINARY + 2].nr_contig, BLOCK);
	assert_int_equal(f->zone->blocks[ORDINARY + 2].nr_free, 0);
	assert_int_equal(
		ctg_buddy_take_range(f->zone, start - 1, 2, NULL, &zeroed, &busy), -CTG_EBUSY);
	assert_int_equal(busy, start);
	/* Back again in one go, which takes the lock several times. */
	for (ctg_pfn_t p = start; p < start + nr; p++)
		frame_at(f->zone, p)->word.v = 0;
	ctg_free_run(f->zone, start, nr, true);
	assert_int_equal(f->zone->blocks[ORDINARY + 2].nr_contig, 0);
}

static void zeroed_is_known_and_counted(void **state)
{
	struct fixture f;
	struct ctg_counters counters;
	ctg_pfn_t pfn;

	(void)state;
	open_sim(&f);
	f.zone = add_zone(&f, 8 * BLOCK, 8 * BLOCK, 0, 0, true);
	pfn = get(&f, 10, MOVABLE | CTG_GFP_ZERO);
	ctg_counters_read(f.ctg, &counters);
	assert_int_equal(counters.frames_zeroed, 0);
	memset(ctg_sim_frame(f.sim, pfn + 700), 0xff, CTG_PAGE_SIZE);
	put(&f, pfn);
	/* What was cut off before is still zero; a block that merged with it is not. */
	for (uint64_t nth = 1;; nth++) {
		int ret;

		ctg_sim_fail(f.sim, CTG_SIM_ZERO, nth);
		ret = ctg_alloc_frames(f.ctg, 12, MOVABLE | CTG_GFP_ZERO, &pfn);
		check_zone(f.zone);
		if (ret == 0)
			break;
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_int_equal(blocks_of(&f, 12, CTG_MIGRATE_MOVABLE), 1);
		assert_true(nth < 3);
	}
	assert_int_equal(*(unsigned char *)ctg_sim_frame(f.sim, pfn + 700), 0);
	assert_int_equal(*(unsigned char *)ctg_sim_frame(f.sim, (pfn ^ BLOCK) + 700), 0);
	ctg_counters_read(f.ctg, &counters);
	assert_int_equal(counters.frames_zeroed, 4096);
	put(&f, pfn);
	ctg_sim_destroy(f.sim);
}

static void zones_are_tried_in_order(void **state)
{
	struct fixture f;
	struct ctg_zone *zone[4];
	ctg_pfn_t pfn[8], none;
	unsigned order;
	bool zeroed;

	(void)state;
	open_sim(&f);
	zone[0] = add_zone(&f, 40 * BLOCK, BLOCK, CTG_ZONE_SPILL, 0, true);
	zone[1] = add_zone(&f, 20 * BLOCK, BLOCK, 0, 0, true);
	zone[2] = add_zone(&f, 30 * BLOCK, BLOCK, 0, CTG_PAGEBLOCK_ORDER, true);
	zone[3] = add_zone(&f, 10 * BLOCK, BLOCK, 0, 0, true);
	/* In the order of adding, but spill zones last and only on request. */
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(ctg_alloc_frames(f.ctg, 9, MOVABLE | CTG_GFP_SPILL, &pfn[i]), 0);
	assert_int_equal(pfn[0], 20 * BLOCK);
	assert_int_equal(pfn[1], 30 * BLOCK);
	assert_int_equal(pfn[2], 10 * BLOCK);
	assert_int_equal(pfn[3], 40 * BLOCK);
	for (unsigned i = 0; i < 4; i++)
		put(&f, pfn[i]);
	for (unsigned i = 0; i < 3; i++)
		pfn[i] = get(&f, 9, 0);
	assert_int_equal(ctg_alloc_frames(f.ctg, 9, MOVABLE, &none), -CTG_ENOMEM);
	assert_int_equal(ctg_alloc_frames(f.ctg, 0, 0, &none), -CTG_ENOMEM);
	put(&f, pfn[1]);
	/* What can be mapped as a whole only is not broken up. */
	assert_int_equal(ctg_alloc_frames(f.ctg, 8, MOVABLE, &none), -CTG_ENOMEM);
	assert_int_equal(ctg_alloc_frames(f.ctg, 0, MOVABLE, &none), -CTG_ENOMEM);
	assert_int_equal(ctg_alloc_run(f.ctg, 8, 0, MOVABLE, &none, &order), -CTG_ENOMEM);
	assert_int_equal(ctg_alloc_run(f.ctg, 12, 0, MOVABLE, &none, &order), 0);
	assert_int_equal(order, 9);
	put(&f, none);
	/* Nor are the pieces that a range left of it given out. */
	assert_int_equal(ctg_buddy_take_range(zone[2], 30 * BLOCK, 1, NULL, &zeroed, &none), 0);
	assert_int_equal(ctg_alloc_run(f.ctg, 12, 0, MOVABLE, &none, &order), -CTG_ENOMEM);
	ctg_frame_put(f.ctg, 30 * BLOCK, CTG_WORD_REF1, 1);
	none = get(&f, 0, MOVABLE | CTG_GFP_SPILL);
	assert_int_equal(ctg_block_start(none), 40 * BLOCK);
	put(&f, none);
	put(&f, pfn[0]);
	put(&f, pfn[2]);
	ctg_drain_caches(f.ctg);
	for (unsigned i = 0; i < 4; i++)
		check_zone(zone[i]);
	ctg_sim_destroy(f.sim);
}

static void frames_come_back_without_caring_for_blocks(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn = get(f, 11, MOVABLE);

	/* The head is shortened, and the tail freed in odd pieces. */
	frame_at(f->zone, pfn)->info.v = CTG_INFO(CTG_FRAME_USED, 3, CTG_MIGRATE_CMA, 0);
	ctg_buddy_free_range(f->zone, pfn + 8, 93, false);
	ctg_buddy_free_range(f->zone, pfn + 101, 4 * BLOCK - 101, false);
	check_zone(f->zone);
	put(f, pfn);
	check_zone(f->zone);
}

struct churn {
	struct fixture *f;
	unsigned cpu;
	unsigned failures;
};

#define KEPT 24
#define TURNS 6000

/* Every frame carries the mark of its owner; nobody else's may ever be seen there. */
static void *churn(void *arg)
{
	static const unsigned gfps[] = {0, CTG_GFP_MOVABLE, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA,
		CTG_GFP_MOVABLE | CTG_GFP_ZERO};
	struct churn *c = arg;
	struct {
		ctg_pfn_t pfn;
		unsigned order;
	} kept[KEPT];
	unsigned nr = 0;
	uint64_t random = c->cpu + 1;

	ctg_sim_set_cpu(c->cpu);
	for (unsigned i = 0; i < TURNS || nr != 0; i++) {
		unsigned order, turn;

		random = random * 6364136223846793005u + 1442695040888963407u;
		turn = (unsigned)(random >> 40);
		order = turn % 16 == 0 ? 9 + turn / 16 % 2 : turn / 16 % 4;
		if (i < TURNS && nr < KEPT && turn % 7 < 4) {
			ctg_pfn_t pfn;

			if (ctg_alloc_frames(c->f->ctg, order, gfps[turn / 256 % 4], &pfn) != 0)
				continue;
			for (unsigned k = 0; k < 1u << order; k += 1 + k * 3)
				*(uint64_t *)ctg_sim_frame(c->f->sim, pfn + k) = c->cpu * 1000 + k;
			kept[nr].pfn = pfn;
			kept[nr++].order = order;
		} else if (nr != 0) {
			unsigned which = turn / 7 % nr;
			ctg_pfn_t pfn = kept[which].pfn;

			for (unsigned k = 0; k < 1u << kept[which].order; k += 1 + k * 3)
				c->failures += *(uint64_t *)ctg_sim_frame(c->f->sim, pfn + k) !=
					       c->cpu * 1000 + k;
			c->failures += ctg_free_frames(c->f->ctg, pfn) != 0;
			kept[which] = kept[--nr];
		}
		if (turn % 512 == 0)
			ctg_drain_caches(c->f->ctg);
	}
	return NULL;
}

static void threads_never_share_a_frame(void **state)
{
	struct fixture *f = *state;
	struct churn c[4];
	pthread_t thread[4];

	for (unsigned i = 0; i < 4; i++) {
		c[i] = (struct churn){f, i, 0};
		assert_int_equal(pthread_create(&thread[i], NULL, churn, &c[i]), 0);
	}
	for (unsigned i = 0; i < 4; i++) {
		pthread_join(thread[i], NULL);
		assert_int_equal(c[i].failures, 0);
	}
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(every_order_is_served),
		T(bad_requests_change_nothing),
		T(only_heads_with_a_reference_are_freed),
		T(areas_serve_movable_requests_only),
		T(unmovable_requests_gather),
		T(unmovable_requests_take_a_used_block_last),
		T(unmovable_requests_take_the_most_promising_block),
		T(movable_requests_fall_back),
		T(movable_requests_leave_a_used_block_as_it_is),
		T(runs_are_the_largest_there_are),
		T(a_used_block_splits_into_frames),
		T(ranges_are_taken_whole_or_not_at_all),
		cmocka_unit_test(zeroed_is_known_and_counted),
		cmocka_unit_test(zones_are_tried_in_order),
		T(frames_come_back_without_caring_for_blocks),
		T(threads_never_share_a_frame),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
