/* SPDX-License-Identifier: MIT */
/* What stands in the way of a migration, waiting for it to leave, and requests that end early. */
#include "moving.h"

/* ---- holders ----------------------------------------------------------------------------- */

static uint64_t counter_failed(struct world *w)
{
	struct ctg_counters counters;

	ctg_counters_read(w->ctg, &counters);
	return counters.migrate_fail;
}

static void check_obstacle(const struct ctg_migrate_stats *stats, enum ctg_obstacle_kind kind,
	ctg_pfn_t pfn, uint64_t word)
{
	assert_int_equal(stats->obstacle, kind);
	assert_int_equal(stats->obstacle_pfn, pfn);
	assert_int_equal(stats->obstacle_word & ~CTG_WORD_FLAGS, word);
}

static const struct holder {
	uint64_t one;
	enum ctg_obstacle_kind kind;
} holders[] = {
	{CTG_WORD_PIN1, CTG_OBSTACLE_PIN},
	{CTG_WORD_REF1, CTG_OBSTACLE_REF},
	{CTG_WORD_MAP1, CTG_OBSTACLE_MAP},
};

/* With one look, nothing is copied for nothing; with more, everything else has moved. */
static void test_held(void **state)
{
	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		struct ctg_migrate_stats stats;
		struct before *before;
		struct scene s;
		ctg_pfn_t held;

		scene_open(&s);
		held = pfn_of(s.mm, BASE + 11);
		hold(&s.w, held, holders[i].one);
		before = before_take(&s.w, s.mm, BASE, SCENE_PAGES);
		assert_int_equal(evacuate(&s.w, s.block, PAGES, 1, NULL, &stats), -CTG_EBUSY);
		check_obstacle(&stats, holders[i].kind, held,
			CTG_WORD_MAP1 + holders[i].one +
				(holders[i].kind == CTG_OBSTACLE_MAP ? CTG_WORD_REF1 : 0));
		assert_int_equal(stats.frames_moved, 0);
		assert_int_equal(counter_failed(&s.w), 1);
		before_check(&s.w, s.mm, before, 0);

		assert_int_equal(evacuate(&s.w, s.block, PAGES, 3, NULL, &stats), -CTG_EBUSY);
		check_obstacle(&stats, holders[i].kind, held,
			CTG_WORD_MAP1 + holders[i].one +
				(holders[i].kind == CTG_OBSTACLE_MAP ? CTG_WORD_REF1 : 0));
		assert_int_equal(stats.frames_moved, SCENE_PAGES - 1);
		assert_int_equal(counter_failed(&s.w), 1 + 3);
		assert_int_equal(pfn_of(s.mm, BASE + 11), held);
		assert_int_equal(
			word_of(&s.w, held) & ~CTG_WORD_FLAGS, CTG_WORD_MAP1 + holders[i].one);
		check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);

		hold(&s.w, held, -holders[i].one);
		assert_int_equal(evacuate_block(&s.w, s.block), 1);
		check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
		scene_close(&s);
	}
}

/* Somebody has it frozen. */
static void test_frozen(void **state)
{
	struct ctg_migrate_stats stats;
	struct scene s;
	ctg_pfn_t pfn;
	uint64_t seen;

	(void)state;
	scene_open(&s);
	pfn = pfn_of(s.mm, BASE + 3);
	assert_true(ctg_frame_freeze(ctg_frame_of(s.w.ctg, pfn), 1, 0, &seen));
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 2, NULL, &stats), -CTG_EBUSY);
	check_obstacle(&stats, CTG_OBSTACLE_MOVING, pfn, CTG_WORD_FROZEN);
	ctg_frame_unfreeze(s.w.ctg, ctg_frame_of(s.w.ctg, pfn), CTG_WORD_MAP1);
	assert_int_equal(evacuate_block(&s.w, s.block), 1);
	scene_close(&s);
}

/* Held by somebody all of whose references are taken: refused, never wrapped. */
static void test_references_full(void **state)
{
	struct ctg_migrate_stats stats;
	struct scene s;
	ctg_pfn_t pfn;
	uint64_t full = CTG_WORD_REF_MAX * CTG_WORD_REF1;

	(void)state;
	scene_open(&s);
	pfn = pfn_of(s.mm, BASE + 3);
	hold(&s.w, pfn, full);
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 1, NULL, &stats), -CTG_EBUSY);
	check_obstacle(&stats, CTG_OBSTACLE_REF, pfn, CTG_WORD_MAP1 + full);
	hold(&s.w, pfn, -full);
	scene_close(&s);
}

/* A large frame: all of it counts as failed, and the holder is named by the head. */
static void test_large_pinned(void **state)
{
	struct ctg_migrate_stats stats;
	struct before *before;
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	pfn = map_large(&w, mm, BASE);
	hold(&w, pfn, CTG_WORD_PIN1);
	before = before_take(&w, mm, BASE, PAGES);
	assert_int_equal(evacuate(&w, pfn + 77, 1, 2, NULL, &stats), -CTG_EBUSY);
	check_obstacle(&stats, CTG_OBSTACLE_PIN, pfn, CTG_WORD_MAP1 + CTG_WORD_PIN1);
	assert_int_equal(counter_failed(&w), 2 * PAGES);
	before_check(&w, mm, before, 0);
	hold(&w, pfn, -CTG_WORD_PIN1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Unmovable frames, and those of another contiguous allocation, end it before anything moves. */
static void test_unmovable(void **state)
{
	static const unsigned orders[] = {0, 3, 9, 10};

	(void)state;
	for (unsigned i = 0; i < 5; i++) {
		struct ctg_migrate_stats stats;
		struct scene s;
		struct before *before;
		ctg_pfn_t stone, start;
		uint64_t word = CTG_WORD_REF1;
		bool zeroed;

		scene_open(&s);
		if (i < 4) {
			assert_int_equal(ctg_alloc_frames(s.w.ctg, orders[i], 0, &stone), 0);
		} else {
			struct ctg_extent run = {0};

			ctg_drain_caches(s.w.ctg);
			ctg_lock(&s.w.ctg->port, &s.w.zone->lock);
			run = ctg_runs_longest(s.w.zone, s.block, PAGES);
			ctg_unlock(&s.w.ctg->port, &s.w.zone->lock);
			stone = run.pfn;
			assert_int_equal(
				ctg_buddy_take_range(s.w.zone, stone, 1, NULL, &zeroed, &start), 0);
		}
		before = before_take(&s.w, s.mm, BASE, SCENE_PAGES);
		/* From the movable frames up or down to the stone; of a large one its last frame.
		 */
		start = s.block < stone ? s.block : stone;
		if (i == 3 && start == stone)
			start += PAGES + 5;
		assert_int_equal(evacuate(&s.w, start,
					 (s.block < stone ? stone + 1 : s.block + PAGES) - start, 3,
					 NULL, &stats),
			-CTG_EBUSY);
		check_obstacle(
			&stats, i < 4 ? CTG_OBSTACLE_UNMOVABLE : CTG_OBSTACLE_REF, stone, word);
		assert_int_equal(stats.frames_moved, 0);
		before_check(&s.w, s.mm, before, 0);
		if (i < 4)
			assert_int_equal(ctg_free_frames(s.w.ctg, stone), 0);
		else
			ctg_frame_put(s.w.ctg, stone, CTG_WORD_REF1, 1);
		scene_close(&s);
	}
}

/* Movable frames that are not mapped: somebody has just allocated them, or holds them by pfn. */
static void test_not_mapped(void **state)
{
	struct ctg_migrate_stats stats;
	struct scene s;
	ctg_pfn_t pfn[64];
	unsigned nr = 0;

	(void)state;
	scene_open(&s);
	do
		assert_int_equal(ctg_alloc_frames(s.w.ctg, 0, CTG_GFP_MOVABLE, &pfn[nr]), 0);
	while (!in_block(pfn[nr++], s.block) && nr < 64);
	assert_true(in_block(pfn[nr - 1], s.block));
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 2, NULL, &stats), -CTG_EBUSY);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_REF);
	assert_true(stats.frames_moved >= SCENE_PAGES);
	while (nr > 0)
		assert_int_equal(ctg_free_frames(s.w.ctg, pfn[--nr]), 0);
	assert_int_equal(evacuate_block(&s.w, s.block), 0);
	check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
	scene_close(&s);
}

/* ---- waiting ----------------------------------------------------------------------------- */

static struct {
	struct world *w;
	ctg_pfn_t pfn;
	uint64_t one;      /* dropped while somebody waits */
	unsigned nr_waits; /* sleeps on a frame */
	int ret;           /* of the wait, if it does not let go */
	struct ctg_word32 *cancel;
	uint64_t time; /* if not 0, what the clock says; a wait sets it to the deadline */
} waits;

static int wait_and_let_go(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	waits.nr_waits++;
	assert_true(killable);
	assert_true(deadline != CTG_NO_DEADLINE);
	assert_true((word_of(waits.w, waits.pfn) & CTG_WORD_WAITERS) != 0);
	if (waits.cancel != NULL)
		ctg_store32_release(waits.cancel, 1);
	if (waits.time != 0)
		waits.time = deadline;
	if (waits.one != 0) {
		ctg_frame_put(waits.w->ctg, waits.pfn, waits.one, 1);
		/* That has raised what is waited on, and cleared the flag. */
		assert_int_not_equal(ctg_load32_acquire(word), expected);
		assert_int_equal(word_of(waits.w, waits.pfn) & CTG_WORD_WAITERS, 0);
		waits.one = 0;
		return waits.w->port.wait(host, word, expected, deadline, killable);
	}
	return waits.ret;
}

static uint64_t set_time(void *host)
{
	(void)host;
	return waits.time;
}

static void interpose_wait(struct scene *s, ctg_pfn_t pfn, uint64_t one, int ret)
{
	memset(&waits, 0, sizeof(waits));
	waits.w = &s->w;
	waits.pfn = pfn;
	waits.one = one;
	waits.ret = ret;
	s->w.ctg->port.wait = wait_and_let_go;
}

/* A holder leaves while the migration waits: it is woken, looks again, and has it. */
static void test_let_go_while_waiting(void **state)
{
	(void)state;
	for (unsigned i = 0; i < 2; i++) {
		struct ctg_migrate_stats stats;
		struct scene s;
		ctg_pfn_t held;

		scene_open(&s);
		held = pfn_of(s.mm, BASE + 5);
		hold(&s.w, held, holders[i].one);
		interpose_wait(&s, held, holders[i].one, 0);
		assert_int_equal(evacuate(&s.w, s.block, PAGES, 2, NULL, &stats), 0);
		assert_int_equal(waits.nr_waits, 1);
		assert_int_equal(stats.frames_moved, SCENE_PAGES);
		check_obstacle(&stats, holders[i].kind, held, CTG_WORD_MAP1 + holders[i].one);
		check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
		scene_close(&s);
	}
}

/* It is looked at as often as was asked, and waited for in between, not after the last. */
static void test_rounds(void **state)
{
	(void)state;
	for (unsigned rounds = 0; rounds < 5; rounds++) {
		struct ctg_migrate_stats stats;
		struct scene s;
		ctg_pfn_t held;

		scene_open(&s);
		held = pfn_of(s.mm, BASE + 5);
		hold(&s.w, held, CTG_WORD_PIN1);
		interpose_wait(&s, held, 0, -CTG_ETIMEDOUT);
		assert_int_equal(evacuate(&s.w, s.block, PAGES, rounds, NULL, &stats), -CTG_EBUSY);
		assert_int_equal(waits.nr_waits, rounds == 0 ? 0 : rounds - 1);
		assert_int_equal(counter_failed(&s.w), rounds == 0 ? 1 : rounds);
		hold(&s.w, held, -CTG_WORD_PIN1);
		scene_close(&s);
	}
}

static struct {
	struct world *w;
	ctg_pfn_t pfn;
	unsigned relaxed, until; /* after so many calls the holder is seen again */
	uint64_t time;
} freeing;

static void relax_and_arrive(void *host)
{
	(void)host;
	freeing.time += 1000;
	if (++freeing.relaxed == freeing.until)
		hold(freeing.w, freeing.pfn, CTG_WORD_MAP1);
}

static uint64_t freeing_time(void *host)
{
	(void)host;
	return freeing.time;
}

/* A frame that nobody holds and that is not free either is changing hands: look until it has. */
static void test_between_holders(void **state)
{
	(void)state;
	for (unsigned i = 0; i < 2; i++) {
		struct ctg_migrate_stats stats;
		struct scene s;
		int ret;

		scene_open(&s);
		memset(&freeing, 0, sizeof(freeing));
		freeing.w = &s.w;
		freeing.pfn = pfn_of(s.mm, BASE + 5);
		freeing.until = i == 0 ? 7 : UINT32_MAX;
		hold(&s.w, freeing.pfn, -CTG_WORD_MAP1);
		assert_int_equal(ctg_block_isolate(s.w.zone, s.block, &s), 0);
		ctg_pcp_drain(s.w.zone);
		s.w.ctg->port.relax = relax_and_arrive;
		s.w.ctg->port.now = freeing_time;
		ret = ctg_migrate_range(s.w.zone, s.block, PAGES, EVACUATE_GFP, 2, NULL, &stats);
		s.w.ctg->port.relax = s.w.port.relax;
		s.w.ctg->port.now = s.w.port.now;
		check_obstacle(&stats, CTG_OBSTACLE_REF, freeing.pfn, 0);
		if (i == 0) {
			assert_int_equal(ret, 0);
			assert_int_equal(freeing.relaxed, 7);
			assert_int_equal(stats.frames_moved, SCENE_PAGES);
		} else {
			/* Not for ever. */
			assert_int_equal(ret, -CTG_EBUSY);
			assert_int_equal(stats.frames_moved, SCENE_PAGES - 1);
			hold(&s.w, freeing.pfn, CTG_WORD_MAP1);
		}
		ctg_block_unisolate(s.w.zone, s.block, &s);
		check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
		scene_close(&s);
	}
}

/* ---- requests ---------------------------------------------------------------------------- */

static void test_request_before(void **state)
{
	struct ctg_migrate_stats stats;
	struct ctg_word32 cancel = {1};
	struct ctg_alloc_request request = {.cancel = &cancel};
	struct before *before;
	struct scene s;

	(void)state;
	scene_open(&s);
	before = before_take(&s.w, s.mm, BASE, SCENE_PAGES);
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 3, &request, &stats), -CTG_EINTR);
	request.cancel = NULL;
	request.deadline = 1;
	assert_int_equal(evacuate(&s.w, s.block, PAGES, 3, &request, &stats), -CTG_ETIMEDOUT);
	assert_int_equal(stats.frames_moved, 0);
	before_check(&s.w, s.mm, before, 0);
	scene_close(&s);
}

static void test_request_while_waiting(void **state)
{
	struct ctg_word32 cancel = {0};
	struct ctg_alloc_request request = {0};

	(void)state;
	for (unsigned i = 0; i < 3; i++) {
		static const int expected[] = {-CTG_EINTR, -CTG_ETIMEDOUT, -CTG_EINTR};
		struct ctg_migrate_stats stats;
		struct scene s;
		ctg_pfn_t held;

		scene_open(&s);
		held = pfn_of(s.mm, BASE + 5);
		hold(&s.w, held, CTG_WORD_PIN1);
		interpose_wait(&s, held, 0, i == 2 ? -CTG_EINTR : 0);
		request = (struct ctg_alloc_request){0};
		if (i == 0) {
			request.cancel = waits.cancel = &cancel;
		} else if (i == 1) {
			/* Earlier than the next look would be. */
			waits.time = 5000;
			request.deadline = 5010;
			s.w.ctg->port.now = set_time;
		}
		assert_int_equal(evacuate(&s.w, s.block, PAGES, 9, &request, &stats), expected[i]);
		assert_int_equal(waits.nr_waits, 1);
		if (i == 1)
			assert_int_equal(waits.time, request.deadline);
		assert_int_equal(stats.obstacle, CTG_OBSTACLE_PIN);
		/* What had moved by then stays moved. */
		assert_int_equal(stats.frames_moved, SCENE_PAGES - 1);
		check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
		s.w.ctg->port.now = s.w.port.now;
		hold(&s.w, held, -CTG_WORD_PIN1);
		scene_close(&s);
	}
}

static struct {
	struct ctg_port port;
	struct ctg_word32 cancel;
	unsigned copies;
} cancelling;

static int copy_and_cancel(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	cancelling.copies++;
	ctg_store32_release(&cancelling.cancel, 1);
	return cancelling.port.copy(host, runs, nr);
}

/* Cancelled during the first of several batches: that one ends, no other begins. */
static void test_request_between_batches(void **state)
{
	struct ctg_alloc_request request = {.cancel = &cancelling.cancel};
	struct ctg_migrate_stats stats;
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 12);
	mm = space_new(&w, CTG_PAGEBLOCK_ORDER);
	for (unsigned i = 0; i < 4; i++)
		map_large(&w, mm, BASE + i * PAGES);
	memset(&cancelling, 0, sizeof(cancelling));
	cancelling.port = w.port;
	w.ctg->port.copy = copy_and_cancel;
	assert_int_equal(evacuate(&w, w.zone->base, w.zone->nr, 1, &request, &stats), -CTG_ENOMEM);
	assert_int_equal(cancelling.copies, 0);
	for (unsigned i = 0; i < 4; i++)
		assert_false(lookup(mm, BASE + i * PAGES, 1).moving);
	{
		ctg_pfn_t low = CTG_PFN_NONE;

		for (unsigned i = 0; i < 4; i++)
			if (pfn_of(mm, BASE + i * PAGES) < low)
				low = pfn_of(mm, BASE + i * PAGES);
		for (unsigned i = 0; i < 4; i++)
			assert_in_range(pfn_of(mm, BASE + i * PAGES), low, low + 3 * PAGES);
		assert_int_equal(evacuate(&w, low, 4 * PAGES, 1, &request, &stats), -CTG_EINTR);
	}
	assert_int_equal(cancelling.copies, 1);
	assert_int_equal(stats.frames_moved, CTG_MIGRATE_BATCH_PAGES);
	for (unsigned i = 0; i < 4; i++)
		check_stamp(&w, mm, BASE + i * PAGES, PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* On the last look, what does not move decides: the batches that would follow are not copied. */
static void test_last_look_ends(void **state)
{
	struct ctg_migrate_stats stats;
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn[4], low = CTG_PFN_NONE;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	for (unsigned i = 0; i < 4; i++) {
		pfn[i] = map_large(&w, mm, BASE + i * PAGES);
		low = pfn[i] < low ? pfn[i] : low;
	}
	for (unsigned i = 0; i < 4; i++)
		assert_in_range(pfn[i], low, low + 3 * PAGES);
	hold(&w, low, CTG_WORD_PIN1);
	assert_int_equal(evacuate(&w, low, 4 * PAGES, 1, NULL, &stats), -CTG_EBUSY);
	assert_int_equal(stats.frames_moved, 0);
	assert_int_equal(evacuate(&w, low, 4 * PAGES, 2, NULL, &stats), -CTG_EBUSY);
	assert_int_equal(stats.frames_moved, 3 * PAGES);
	hold(&w, low, -CTG_WORD_PIN1);
	check_stamp(&w, mm, BASE, 4 * PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static struct {
	struct scene *s;
	bool done;
} growing;

static void *map_and_alloc(void *host, size_t bytes, size_t align)
{
	if (!growing.done) {
		growing.done = true;
		map_large(&growing.s->w, growing.s->mm, BASE + 4 * PAGES);
	}
	return growing.s->w.port.meta_alloc(host, bytes, align);
}

/* In a range that is not isolated, a frame appears that the batch was not made for. */
static void test_large_appears(void **state)
{
	struct ctg_migrate_stats stats;
	struct scene s;

	(void)state;
	scene_open(&s);
	growing.s = &s;
	growing.done = false;
	s.w.ctg->port.meta_alloc = map_and_alloc;
	assert_int_equal(ctg_migrate_range(s.w.zone, s.w.zone->base, s.w.zone->nr, EVACUATE_GFP, 1,
				 NULL, &stats),
		-CTG_EBUSY);
	assert_true(growing.done);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_REF);
	assert_int_equal(stats.obstacle_pfn, pfn_of(s.mm, BASE + 4 * PAGES));
	check_stamp(&s.w, s.mm, BASE, SCENE_PAGES);
	check_stamp(&s.w, s.mm, BASE + 4 * PAGES, PAGES);
	scene_close(&s);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_held),
		cmocka_unit_test(test_frozen),
		cmocka_unit_test(test_references_full),
		cmocka_unit_test(test_large_pinned),
		cmocka_unit_test(test_unmovable),
		cmocka_unit_test(test_not_mapped),
		cmocka_unit_test(test_let_go_while_waiting),
		cmocka_unit_test(test_rounds),
		cmocka_unit_test(test_between_holders),
		cmocka_unit_test(test_request_before),
		cmocka_unit_test(test_request_while_waiting),
		cmocka_unit_test(test_request_between_batches),
		cmocka_unit_test(test_last_look_ends),
		cmocka_unit_test(test_large_appears),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
