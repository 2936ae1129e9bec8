/* SPDX-License-Identifier: MIT */
/* A migration that fails: every hook in turn, and for want of room. What it must leave. */
#include "moving.h"

/* ---- every failure in turn --------------------------------------------------------------- */

/* A large frame, a split one, one that is partly mapped, and small ones: one batch each. */
static void mixed_open(struct world *w, struct ctg_mm **mm, ctg_pfn_t pfn[4])
{
	world_open(w, 12);
	*mm = space_new(w, 0);
	pfn[0] = map_large(w, *mm, BASE);
	pfn[1] = map_large(w, *mm, BASE + PAGES);
	assert_int_equal(ctg_mprotect(*mm, BASE + PAGES + 9, 3, CTG_PROT_READ), 0);
	pfn[2] = map_large(w, *mm, BASE + 2 * PAGES);
	assert_int_equal(ctg_munmap(*mm, BASE + 2 * PAGES + 3, 400), 0);
	map_small(w, *mm, BASE + 3 * PAGES, 100);
	pfn[3] = pfn_of(*mm, BASE + 3 * PAGES);
}

static void fail_in_turn(enum ctg_sim_hook hook, bool pieces)
{
	struct world w;
	struct ctg_mm *mm;
	struct hoard *h = NULL;
	ctg_pfn_t pfn[4];
	unsigned failures = 0;

	mixed_open(&w, &mm, pfn);
	if (pieces)
		h = hoard_orders(&w, CTG_PAGEBLOCK_ORDER, CTG_GFP_MOVABLE);
	/* Large frames then find no large ones, but pieces where the others have been. */
	for (unsigned i = 4; i-- > 0;) {
		ctg_pfn_t block = pfn[i] & ~(PAGES - 1);
		struct ctg_migrate_stats stats;
		unsigned before_failures = failures;

		for (uint64_t nth = 1;; nth++) {
			struct before *before = before_take(&w, mm, BASE, 3 * PAGES + 100);
			int ret;

			ctg_sim_fail(w.sim, hook, nth);
			ret = evacuate(&w, block, PAGES, 1, NULL, &stats);
			if (ctg_sim_fail(w.sim, hook, 0) < nth) {
				/* No hook failed: now only room may lack. */
				assert_true(ret == 0 || (pieces && ret == -CTG_ENOMEM));
				before_free(before);
				break;
			}
			failures++;
			assert_int_equal(ret, hook == CTG_SIM_RESTRICT ? -CTG_EBUSY : -CTG_ENOMEM);
			assert_int_equal(stats.frames_moved, 0);
			assert_int_equal(
				stats.obstacle, hook == CTG_SIM_RESTRICT || hook == CTG_SIM_INSTALL
							? CTG_OBSTACLE_PORT
							: CTG_OBSTACLE_NO_MEMORY);
			before_check(&w, mm, before, 1);
		}
		assert_true(pieces || failures > before_failures);
	}
	assert_true(failures != 0);
	if (h != NULL)
		hoard_free_all(&w, h);
	check_stamp(&w, mm, BASE, 2 * PAGES + 3);
	check_stamp(&w, mm, BASE + 3 * PAGES, 100);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_hooks_fail(void **state)
{
	static const enum ctg_sim_hook hooks[] = {
		CTG_SIM_META_ALLOC, CTG_SIM_COPY, CTG_SIM_RESTRICT, CTG_SIM_INSTALL};

	(void)state;
	for (unsigned i = 0; i < 4; i++) {
		fail_in_turn(hooks[i], false);
		fail_in_turn(hooks[i], true);
	}
}

/* A large frame in pieces: a table that cannot be had, a copy that fails, an install... */
static void pieces_fail(enum ctg_sim_hook hook, uint64_t nth, bool *failed)
{
	struct ctg_migrate_stats stats;
	struct before *before;
	struct world w;
	struct ctg_mm *mm;
	struct hoard *h;
	ctg_pfn_t pfn;
	int ret;

	world_open(&w, 4);
	mm = space_new(&w, 0);
	pfn = map_large(&w, mm, BASE);
	h = fragment(&w, PAGES, pfn);
	before = before_take(&w, mm, BASE, PAGES);
	ctg_sim_fail(w.sim, hook, nth);
	ret = evacuate(&w, pfn, PAGES, 1, NULL, &stats);
	*failed = ctg_sim_fail(w.sim, hook, 0) >= nth;
	if (!*failed) {
		assert_int_equal(ret, 0);
		before_free(before);
	} else if (hook == CTG_SIM_INSTALL) {
		/* The table of pieces stays, and says the old frame. */
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_int_equal(word_of(&w, pfn), PAGES * CTG_WORD_MAP1);
		for (unsigned i = 0; i < PAGES; i++)
			assert_int_equal(pfn_of(mm, BASE + i), pfn + i);
		assert_int_equal(world_free(&w), before->nr_free);
		before_free(before);
	} else {
		assert_int_equal(ret, hook == CTG_SIM_RESTRICT ? -CTG_EBUSY : -CTG_ENOMEM);
		before_check(&w, mm, before, 1);
	}
	check_stamp(&w, mm, BASE, PAGES);
	stamp(&w, mm, BASE, PAGES);
	hoard_free_all(&w, h);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_pieces_fail(void **state)
{
	static const enum ctg_sim_hook hooks[] = {
		CTG_SIM_META_ALLOC, CTG_SIM_COPY, CTG_SIM_RESTRICT, CTG_SIM_INSTALL};
	/* The batch and the table; one call of each other hook. */
	static const uint64_t expected[] = {2, 1, 1, 1};

	(void)state;
	for (unsigned i = 0; i < 4; i++) {
		uint64_t failures = 0;
		bool failed = true;

		while (failed) {
			pieces_fail(hooks[i], failures + 1, &failed);
			failures += failed;
		}
		assert_int_equal(failures, expected[i]);
	}
}

/* No frame is free at all, or one too few. */
static void test_no_room(void **state)
{
	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		static const unsigned rooms[] = {0, SCENE_PAGES / 2, SCENE_PAGES - 1};
		unsigned room = rooms[i];
		struct ctg_migrate_stats stats;
		struct before *before;
		struct hoard *h;
		struct scene s;
		int ret;

		scene_open(&s);
		h = fragment(&s.w, room, s.block);
		before = before_take(&s.w, s.mm, BASE, SCENE_PAGES);
		assert_int_equal(before->nr_free, room);
		ret = evacuate(&s.w, pfn_of(s.mm, BASE), SCENE_PAGES, 4, NULL, &stats);
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_int_equal(stats.obstacle, CTG_OBSTACLE_NO_MEMORY);
		assert_int_equal(stats.frames_moved, 0);
		before_check(&s.w, s.mm, before, 0);
		/* One more is enough. */
		if (room == SCENE_PAGES - 1) {
			unsigned last = h->nr;

			while (in_block(h->pfn[--last], s.block))
				;
			assert_int_equal(ctg_free_frames(s.w.ctg, h->pfn[last]), 0);
			h->pfn[last] = h->pfn[--h->nr];
			assert_int_equal(
				evacuate(&s.w, pfn_of(s.mm, BASE), SCENE_PAGES, 1, NULL, &stats),
				0);
			check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
		}
		hoard_free_all(&s.w, h);
		scene_close(&s);
	}
}

static struct {
	struct ctg_port port;
	int ret;
	unsigned copies;
} refusing;

static int refuse_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	if (how == CTG_TLB_WRPROTECT)
		return refusing.ret;
	return refusing.port.tlb_restrict(host, mm, ranges, nr, how);
}

static int refuse_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	(void)host;
	(void)runs;
	(void)nr;
	refusing.copies++;
	return -CTG_ENOMEM;
}

/* A port may have no room for the mappings of a move, or not be able to stop the owner now. */
static void test_restrict_errors(void **state)
{
	static const int errors[] = {-CTG_ENOMEM, -CTG_EBUSY, -CTG_EAGAIN};

	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		struct ctg_migrate_stats stats;
		struct before *before;
		struct scene s;

		scene_open(&s);
		refusing.port = s.w.port;
		refusing.ret = errors[i];
		s.w.ctg->port.tlb_restrict = refuse_restrict;
		before = before_take(&s.w, s.mm, BASE, SCENE_PAGES);
		assert_int_equal(evacuate(&s.w, s.block, PAGES, 1, NULL, &stats),
			i == 0 ? -CTG_ENOMEM : -CTG_EBUSY);
		assert_int_equal(stats.obstacle, CTG_OBSTACLE_PORT);
		before_check(&s.w, s.mm, before, 0);
		scene_close(&s);
	}
}

/* One family cannot move for want of memory: the next is not copied any more. */
static void test_no_memory_ends(void **state)
{
	struct ctg_migrate_stats stats;
	struct ctg_mm *other;
	struct scene s;

	(void)state;
	scene_open(&s);
	other = space_new(&s.w, 0);
	map_small(&s.w, other, BASE, 3);
	assert_true(in_block(pfn_of(other, BASE), s.block));
	refusing.port = s.w.port;
	refusing.copies = 0;
	s.w.ctg->port.copy = refuse_copy;
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 3, NULL, &stats), -CTG_ENOMEM);
	assert_int_equal(refusing.copies, 1);
	check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
	check_stamp(&s.w, other, BASE, 3);
	ctg_mm_destroy(other, false);
	s.w.meta_bytes += sizeof(struct ctg_anon); /* families stay */
	scene_close(&s);
}

static struct {
	struct ctg_port port;
	struct ctg_mm *mm[2];
	struct ctg_mm *gone;
	struct world *w;
} leaving;

/* While one family's pages are copied, the other gives all of its own up. */
static int copy_and_unmap_other(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	const struct ctg_anon *anon = ctg_frame_of(leaving.w->ctg, runs[0].src)->anon;

	if (leaving.gone == NULL) {
		leaving.gone = leaving.mm[anon == leaving.mm[0]->anon];
		assert_int_equal(ctg_munmap(leaving.gone, BASE, SCENE_PAGES), 0);
	}
	return leaving.port.copy(host, runs, nr);
}

/* Frames that were gathered and are not mapped any more when their turn comes: they become free. */
static void test_unmapped_meanwhile(void **state)
{
	struct ctg_migrate_stats stats;
	struct ctg_mm *left;
	struct scene s;

	(void)state;
	scene_open(&s);
	memset(&leaving, 0, sizeof(leaving));
	leaving.w = &s.w;
	leaving.port = s.w.port;
	leaving.mm[0] = s.mm;
	leaving.mm[1] = space_new(&s.w, 0);
	map_small(&s.w, leaving.mm[1], BASE, SCENE_PAGES);
	assert_true(in_block(pfn_of(leaving.mm[1], BASE), s.block));
	s.w.ctg->port.copy = copy_and_unmap_other;
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 1, NULL, &stats), 0);
	assert_int_equal(stats.frames_moved, SCENE_PAGES);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_NONE);
	assert_non_null(leaving.gone);
	left = leaving.mm[leaving.gone == leaving.mm[0]];
	check_stamp(&s.w, left, BASE, SCENE_PAGES);
	assert_int_equal(world_free(&s.w), s.w.nr_free - SCENE_PAGES);
	ctg_mm_destroy(leaving.mm[1], false);
	s.w.meta_bytes += sizeof(struct ctg_anon); /* families stay */
	scene_close(&s);
}

/* Some families do, others do not: all is right with both. */
static void test_hooks_fail_families(void **state)
{
	static const enum ctg_sim_hook hooks[] = {
		CTG_SIM_META_ALLOC, CTG_SIM_COPY, CTG_SIM_RESTRICT, CTG_SIM_INSTALL};
	struct world w;
	struct ctg_mm *mm[3];
	ctg_pfn_t block;

	(void)state;
	world_open(&w, 4);
	for (unsigned s = 0; s < 3; s++) {
		mm[s] = space_new(&w, 0);
		assert_int_equal(ctg_mmap(mm[s], BASE, 20, RW), 0);
	}
	for (unsigned i = 0; i < 60; i++)
		stamp(&w, mm[i % 3], BASE + i / 3, 1);
	for (unsigned i = 0; i < 4; i++)
		for (uint64_t nth = 1;; nth++) {
			uint64_t nr_free = world_free(&w);
			struct ctg_migrate_stats stats;
			int ret;

			block = pfn_of(mm[0], BASE) & ~(PAGES - 1);
			ctg_sim_fail(w.sim, hooks[i], nth);
			ret = evacuate(&w, block, PAGES, 1, NULL, &stats);
			if (ctg_sim_fail(w.sim, hooks[i], 0) < nth) {
				assert_int_equal(ret, 0);
				break;
			}
			assert_int_not_equal(ret, 0);
			assert_int_equal(world_free(&w), nr_free);
			for (unsigned s = 0; s < 3; s++)
				check_stamp(&w, mm[s], BASE, 20);
			/* All together again. */
			for (unsigned s = 0; s < 3; s++)
				if (!in_block(pfn_of(mm[s], BASE), block))
					for (unsigned p = 0; p < 20; p++)
						assert_false(
							in_block(pfn_of(mm[s], BASE + p), block));
		}
	for (unsigned s = 0; s < 3; s++)
		ctg_mm_destroy(mm[s], false);
	w.meta_bytes = ctg_sim_meta_bytes(w.sim);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_hooks_fail),
		cmocka_unit_test(test_pieces_fail),
		cmocka_unit_test(test_no_room),
		cmocka_unit_test(test_restrict_errors),
		cmocka_unit_test(test_no_memory_ends),
		cmocka_unit_test(test_unmapped_meanwhile),
		cmocka_unit_test(test_hooks_fail_families),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
