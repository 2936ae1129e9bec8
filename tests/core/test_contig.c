/* SPDX-License-Identifier: MIT */
#include "lend.h"

static void take_ok(struct lend *l, ctg_pfn_t pfn, uint64_t nr)
{
	assert_int_equal(ctg_alloc_contig_range(l->ctg, pfn, nr, NULL), 0);
	check_taken(l, pfn, nr, true);
	check_no_isolation(l);
	check_stamps(l);
}

static void free_ok(struct lend *l, ctg_pfn_t pfn, uint64_t nr)
{
	uint64_t held = UINT64_MAX;

	assert_int_equal(ctg_free_contig_range(l->ctg, pfn, nr, &held), 0);
	assert_int_equal(held, 0);
}

/* ---- a port whose hooks do something on the way ---------------------------------------------- */

struct script {
	struct lend *l;
	struct ctg_port sim; /* the hooks behind */
	unsigned copies, zeros, waits, spins;
	/* What to do at the nth call of a hook; 0: nothing. */
	unsigned cancel_at_copy, cancel_at_zero, cancel_at_wait, advance_at_copy, pin_at_copy,
		advance_at_zero, hold_at_zero, drop_at_wait;
	struct ctg_word32 cancel;
	ctg_pfn_t frame; /* to hold or to drop */
};
static struct script script;

static int script_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	script.copies++;
	if (script.copies == script.cancel_at_copy)
		__atomic_store_n(&script.cancel.v, 1, __ATOMIC_RELEASE);
	if (script.copies == script.pin_at_copy)
		ctg_add64_acq_rel(&lend_frame(script.l, script.frame)->word, CTG_WORD_PIN1);
	if (script.copies == script.advance_at_copy)
		ctg_sim_advance(script.l->sim, 1000000);
	return script.sim.copy(host, runs, nr);
}

static int script_zero(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	script.zeros++;
	if (script.zeros == script.cancel_at_zero)
		__atomic_store_n(&script.cancel.v, 1, __ATOMIC_RELEASE);
	if (script.zeros == script.advance_at_zero)
		ctg_sim_advance(script.l->sim, 3000);
	if (script.zeros == script.hold_at_zero)
		assert_int_equal(ctg_frame_tryget(lend_frame(script.l, script.frame)), 0);
	return script.sim.zero(host, pfn, nr);
}

static int script_wait(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	script.waits++;
	if (script.waits == script.cancel_at_wait)
		__atomic_store_n(&script.cancel.v, 1, __ATOMIC_RELEASE);
	if (script.waits == script.drop_at_wait)
		ctg_frame_put(script.l->ctg, script.frame, CTG_WORD_PIN1, 1);
	return script.sim.wait(host, word, expected, deadline, killable);
}

static void script_begin(struct lend *l)
{
	script = (struct script){.l = l, .sim = l->ctg->port};
	l->ctg->port.copy = script_copy;
	l->ctg->port.zero = script_zero;
	l->ctg->port.wait = script_wait;
}

/* ---- ranges ---------------------------------------------------------------------------------- */

static void test_bad_ranges(void **state)
{
	struct lend *l = lend_open(2, 4, true);
	struct ctg_zone_config holes = {.base = LEND_BASE + 6 * BLOCK, .nr = 3 * BLOCK};
	struct ctg_alloc_report report = {.result = 1};
	struct ctg_alloc_request request = {.report = &report};
	struct ctg_zone *zone;
	struct snapshot *before;

	(void)state;
	assert_int_equal(ctg_sim_add_zone(l->sim, &holes, false, &zone), 0);
	assert_int_equal(ctg_zone_populate(zone, holes.base, BLOCK), 0);
	assert_int_equal(ctg_zone_release(zone, holes.base, BLOCK, false), 0);
	before = snapshot_take(l);
	assert_int_equal(ctg_alloc_contig_range(NULL, at(2 * BLOCK), 1, &request), -CTG_EINVAL);
	assert_int_equal(report.result, -CTG_EINVAL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(2 * BLOCK), 0, NULL), -CTG_EINVAL);
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(2 * BLOCK), UINT64_MAX, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, UINT64_MAX, 2, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, LEND_BASE - 1, 1, NULL), -CTG_EINVAL);
	/* Reserved; from reserved to released; from one zone to the next; into a hole. */
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(0), 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(2 * BLOCK - 1), 2, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(6 * BLOCK - 1), 2, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, holes.base + BLOCK, 1, NULL), -CTG_EINVAL);
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, holes.base + BLOCK - 1, 2, NULL), -CTG_EINVAL);
	/* A range that its own request excludes. */
	request.align_order = 5;
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(2 * BLOCK + 16), 1, &request), -CTG_EINVAL);
	request = (struct ctg_alloc_request){.limit = at(2 * BLOCK + 1)};
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(2 * BLOCK), 2, &request), -CTG_EINVAL);
	request = (struct ctg_alloc_request){.boundary = 4};
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(2 * BLOCK + 3), 2, &request), -CTG_EINVAL);
	request = (struct ctg_alloc_request){.flags = 64};
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(2 * BLOCK), 2, &request), -CTG_EINVAL);
	snapshot_check(l, before, true);
	take_ok(l, at(2 * BLOCK), 1);
	free_ok(l, at(2 * BLOCK), 1);
	lend_close(l);
}

/* Any memory, any alignment; what the range does not need of its pageblocks stays or goes back. */
static void test_edges_are_given_back(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	uint64_t free_before, neighbours = 0;
	struct ctg_zone_stat stat;
	ctg_pfn_t *pages;

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	fill(l, 4 * BLOCK);
	unlend(l, at(BLOCK), 100);
	unlend(l, at(3 * BLOCK - 7), 7);
	pages = calloc(l->next_vpn, sizeof(*pages));
	for (ctg_vpn_t vpn = 0; vpn < l->next_vpn; vpn++)
		pages[vpn] = page_at(l, vpn);
	ctg_zone_stat(l->zone, &stat);
	free_before = stat.nr_free;
	take_ok(l, at(BLOCK + 50), 2 * BLOCK - 53);
	for (ctg_vpn_t vpn = 0; vpn < l->next_vpn; vpn++) {
		if (pages[vpn] == CTG_PFN_NONE ||
			(pages[vpn] >= at(BLOCK + 50) && pages[vpn] < at(3 * BLOCK - 3)))
			continue;
		assert_int_equal(page_at(l, vpn), pages[vpn]);
		neighbours++;
	}
	assert_int_equal(neighbours, 2 * BLOCK);
	free(pages);
	ctg_zone_stat(l->zone, &stat);
	assert_int_equal(stat.nr_isolated_free, 0);
	assert_int_equal(stat.nr_free, free_before - (2 * BLOCK - 53));
	assert_true(frame_is_free(l->zone, at(BLOCK + 49)));
	assert_true(frame_is_free(l->zone, at(3 * BLOCK - 1)));
	free_ok(l, at(BLOCK + 50), 2 * BLOCK - 53);
	/* Ordinary memory. */
	take_ok(l, at(5 * BLOCK + 1), 2 * BLOCK + 17);
	free_ok(l, at(5 * BLOCK + 1), 2 * BLOCK + 17);
	lend_close(l);
}

/* Large frames at the edges move whole. */
static void test_large_frames(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	ctg_pfn_t large[4];

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	for (unsigned i = 0; i < 4; i++)
		large[i] = lend_large(l);
	take_ok(l, at(BLOCK - 1), BLOCK + 2);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(
			page_at(l, (i + 1) * BLOCK) == large[i], large[i] == at(3 * BLOCK));
	assert_int_equal(nr_lent_pages(l), 4 * BLOCK);
	free_ok(l, at(BLOCK - 1), BLOCK + 2);
	lend_close(l);
}

/* In a window that begins in the middle of a large frame that cannot move. */
static void test_held_large_frame(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	struct snapshot *before;
	ctg_pfn_t pfn;

	(void)state;
	for (unsigned i = 0; i < 4; i++)
		ctg_add64_acq_rel(&lend_frame(l, lend_large(l))->word, CTG_WORD_PIN1);
	before = snapshot_take(l);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(BLOCK + 5), 10, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, at(BLOCK));
	for (unsigned mode = CTG_MODE_NORMAL; mode <= CTG_MODE_FAST; mode++) {
		request.mode = (enum ctg_mode)mode;
		assert_int_equal(ctg_cma_alloc(cma, 10, &request, &pfn), -CTG_EBUSY);
		assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
		assert_int_equal(report.obstacle_pfn % BLOCK, 0);
		assert_int_equal(ctg_cma_alloc(cma, BLOCK + 1, &request, &pfn), -CTG_EBUSY);
	}
	snapshot_check(l, before, true);
	for (unsigned i = 0; i < 4; i++)
		ctg_frame_put(l->ctg, at(i * BLOCK), CTG_WORD_PIN1, 1);
	assert_int_equal(ctg_cma_alloc(cma, 10, &request, &pfn), 0);
	check_stamps(l);
	lend_close(l);
}

/* The end of a pinned large frame looks cheap: it is seen to be held, and not waited for. */
static void test_window_behind_a_held_head(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .limit = at(3 * BLOCK + 290)};
	ctg_pfn_t pfn;

	(void)state;
	for (unsigned i = 0; i < 4; i++)
		lend_large(l);
	assert_int_equal(ctg_munmap(l->mm, lend_frame(l, at(3 * BLOCK))->index, BLOCK), 0);
	fill(l, BLOCK);
	unlend(l, at(3 * BLOCK), 290);
	ctg_add64_acq_rel(&lend_frame(l, at(2 * BLOCK))->word, CTG_WORD_PIN1);
	script_begin(l);
	assert_int_equal(ctg_cma_alloc(cma, 300, &request, &pfn), 0);
	assert_int_equal(report.windows_tried, 2);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, at(2 * BLOCK));
	assert_int_equal(script.waits, 0);
	assert_true(pfn + 300 <= at(2 * BLOCK));
	check_stamps(l);
	ctg_frame_put(l->ctg, at(2 * BLOCK), CTG_WORD_PIN1, 1);
	lend_close(l);
}

/* ---- what stands in the way ------------------------------------------------------------------ */

/* An unmovable frame: nothing is copied, in either mode. */
static void test_unmovable_fails_before_anything_moves(void **state)
{
	struct lend *l = lend_open(1, 4, true);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	ctg_pfn_t stuck, start;
	struct snapshot *before;

	(void)state;
	assert_int_equal(ctg_alloc_frames(l->ctg, 0, 0, &stuck), 0);
	start = ctg_block_start(stuck);
	ctg_mm_destroy(l->mm, false);
	assert_int_equal(ctg_mm_create(l->ctg, &(struct ctg_mm_config){0}, &l->mm), 0);
	fill(l, 4 * BLOCK - 1);
	before = snapshot_take(l);
	for (unsigned mode = CTG_MODE_NORMAL; mode <= CTG_MODE_FAST; mode++) {
		request.mode = (enum ctg_mode)mode;
		ctg_sim_fail(l->sim, CTG_SIM_COPY, 0);
		assert_int_equal(
			ctg_alloc_contig_range(l->ctg, start, BLOCK, &request), -CTG_EBUSY);
		assert_int_equal(report.obstacle, CTG_OBSTACLE_UNMOVABLE);
		assert_int_equal(report.obstacle_pfn, stuck);
		assert_int_equal(report.frames_moved, 0);
		assert_int_equal(ctg_sim_fail(l->sim, CTG_SIM_COPY, 0), 0);
	}
	snapshot_check(l, before, true);
	assert_int_equal(ctg_free_frames(l->ctg, stuck), 0);
	lend_close(l);
}

/* Another caller has isolated a block: go elsewhere, or say so; its isolation stays. */
static void test_isolated_by_another(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	uint64_t before;
	ctg_pfn_t pfn;
	int other;

	(void)state;
	fill(l, 4 * BLOCK);
	assert_int_equal(ctg_block_isolate(l->zone, at(2 * BLOCK), &other), 0);
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(BLOCK), 2 * BLOCK, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_ISOLATED);
	assert_int_equal(report.obstacle_pfn, at(2 * BLOCK));
	assert_int_equal(report.frames_moved, 0);
	/* Nothing was isolated in vain, so nobody was woken who waits for the other. */
	assert_int_equal(l->zone->isolation_ended.v, 0);
	assert_int_equal(ctg_cma_alloc(cma, 3 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_ISOLATED);
	assert_int_equal(report.obstacle_pfn, at(2 * BLOCK));
	/* NORMAL waits for the other to end, but not for ever. */
	before = l->ctg->port.now(l->ctg->port.host);
	request.mode = CTG_MODE_NORMAL;
	assert_int_equal(ctg_cma_alloc(cma, 3 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_true(l->ctg->port.now(l->ctg->port.host) > before);
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(BLOCK), 2 * BLOCK, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_ISOLATED);
	/* And not beyond its deadline. */
	request.deadline = l->ctg->port.now(l->ctg->port.host) + 100;
	assert_int_equal(ctg_cma_alloc(cma, 3 * BLOCK, &request, &pfn), -CTG_ETIMEDOUT);
	request.deadline += 100;
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(BLOCK), 2 * BLOCK, &request), -CTG_ETIMEDOUT);
	assert_int_equal(l->ctg->port.now(l->ctg->port.host), request.deadline);
	request.deadline = 0;
	/* Elsewhere there is room. */
	request.mode = CTG_MODE_FAST;
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, &request, &pfn), 0);
	assert_int_equal(pfn, at(0));
	assert_int_equal(l->zone->isolation_ended.v, 1);
	for (uint64_t i = 0; i < l->zone->nr_blocks; i++)
		assert_ptr_equal(l->zone->blocks[i].isolated_by, i == 2 ? &other : NULL);
	ctg_block_unisolate(l->zone, at(2 * BLOCK), &other);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, NULL, &pfn), 0);
	check_stamps(l);
	lend_close(l);
}

/* A pin that ends while NORMAL is at work: looked at again, and taken. FAST does not wait. */
static void test_looks_again(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 4 * BLOCK);
	script_begin(l);
	script.frame = at(1000);
	script.drop_at_wait = 2;
	ctg_add64_acq_rel(&lend_frame(l, at(1000))->word, CTG_WORD_PIN1);
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_int_equal(script.waits, 0);
	request.mode = CTG_MODE_NORMAL;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), 0);
	assert_int_equal(script.waits, 2);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	check_taken(l, pfn, 4 * BLOCK, true);
	check_stamps(l);
	lend_close(l);
}

static void test_cancelled_while_waiting(void **state)
{
	struct lend *l = lend_open(2, 2, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 0);
	struct ctg_alloc_request request = {.cancel = &script.cancel};
	ctg_pfn_t pfn;
	int other;

	(void)state;
	fill(l, 2 * BLOCK);
	assert_int_equal(ctg_block_isolate(l->zone, at(BLOCK), &other), 0);
	script_begin(l);
	script.cancel_at_wait = 3;
	assert_int_equal(ctg_cma_alloc(cma, BLOCK + 1, &request, &pfn), -CTG_EINTR);
	assert_int_equal(script.waits, 3);
	/* And before it has begun. */
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(0), BLOCK + 1, &request), -CTG_EINTR);
	script.cancel.v = 0;
	script.cancel_at_wait = script.waits + 2;
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(0), BLOCK + 1, &request), -CTG_EINTR);
	ctg_block_unisolate(l->zone, at(BLOCK), &other);
	check_stamps(l);
	lend_close(l);
}

/* A range, not an area: FAST meets a frame in a cache only when it takes. */
static void test_cached_frame_in_a_range(void **state)
{
	struct lend *l = lend_open(1, 2, true);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};

	(void)state;
	lend_area(l, "a", 0, 1, 0);
	fill(l, BLOCK);
	assert_int_equal(ctg_munmap(l->mm, lend_frame(l, at(9))->index, 1), 0);
	assert_int_equal(state_of(l, at(9)), CTG_FRAME_PCP);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(0), 10, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_CACHED);
	assert_int_equal(report.obstacle_pfn, at(9));
	check_no_isolation(l);
	take_ok(l, at(0), 10);
	lend_close(l);
}

static void script_relax(void *host)
{
	script.spins++;
	if (script.spins == 3) {
		/* The other is done with its two steps, and gives the frame back at once. */
		struct ctg_frame *frame = lend_frame(script.l, script.frame);

		ctg_store32_release(&frame->info, CTG_INFO(CTG_FRAME_CONTIG, 0, 0, 0));
		ctg_store64_release(&frame->word, CTG_WORD_REF1);
		assert_int_equal(ctg_contig_put(script.l->zone, script.frame, 1), 0);
	}
	script.sim.relax(host);
}

/* A frame that another taker has off the free lists and has not marked yet. */
static void test_frame_between_two_steps(void **state)
{
	struct lend *l = lend_open(1, 2, true);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	ctg_pfn_t busy;
	bool zeroed;

	(void)state;
	assert_int_equal(ctg_buddy_take_range(l->zone, at(BLOCK + 20), 1, NULL, &zeroed, &busy), 0);
	lend_frame(l, at(BLOCK + 20))->info.v = CTG_FRAME_TAIL;
	lend_frame(l, at(BLOCK + 20))->word.v = 0;
	script_begin(l);
	script.frame = at(BLOCK + 20);
	l->ctg->port.relax = script_relax;
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(BLOCK), 40, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_REF);
	assert_int_equal(report.obstacle_pfn, at(BLOCK + 20));
	assert_int_equal(script.spins, 0);
	take_ok(l, at(BLOCK), 40);
	assert_int_equal(script.spins, 3);
	free_ok(l, at(BLOCK), 40);
	lend_close(l);
}

/* ---- failures in the middle ------------------------------------------------------------------ */

/* Take and give back a lent area with the nth call of a hook failing. How the call ended. */
static int fail_once(enum ctg_sim_hook hook, uint64_t nth, enum ctg_mode mode, bool *reached)
{
	struct lend *l = lend_open(4, 5, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = mode};
	struct snapshot *before;
	ctg_pfn_t pfn = 42;
	int ret;

	lend_large(l);
	fill(l, 3 * BLOCK);
	assert_int_equal(ctg_mprotect(l->mm, 2 * BLOCK, 100, CTG_PROT_READ), 0);
	before = snapshot_take(l);
	ctg_sim_fail(l->sim, hook, nth);
	ret = ctg_cma_alloc(cma, 4 * BLOCK - 30, &request, &pfn);
	*reached = ctg_sim_fail(l->sim, hook, 0) >= nth;
	assert_int_equal(report.result, ret);
	if (ret == 0) {
		check_taken(l, pfn, 4 * BLOCK - 30, true);
		check_stamps(l);
		assert_int_equal(ctg_cma_release(cma, pfn, 4 * BLOCK - 30, NULL), 0);
	} else {
		assert_true(*reached);
		assert_int_equal(pfn, 42);
	}
	snapshot_check(l, before, false);
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, NULL, &pfn), 0);
	check_stamps(l);
	lend_close(l);
	return ret;
}

static void fail_each(enum ctg_sim_hook hook, int error)
{
	for (unsigned mode = CTG_MODE_NORMAL; mode <= CTG_MODE_FAST; mode++) {
		unsigned failed = 0;
		bool reached = true;

		for (uint64_t nth = 1; reached; nth++) {
			int ret = fail_once(hook, nth, (enum ctg_mode)mode, &reached);

			if (ret != 0) {
				assert_int_equal(ret, error);
				failed++;
			}
		}
		/* What NORMAL overcomes by a second look, FAST does not. */
		if (mode == CTG_MODE_FAST)
			assert_int_not_equal(failed, 0);
	}
}

static void test_metadata_fails(void **state)
{
	(void)state;
	fail_each(CTG_SIM_META_ALLOC, -CTG_ENOMEM);
}

static void test_copy_fails(void **state)
{
	(void)state;
	fail_each(CTG_SIM_COPY, -CTG_ENOMEM);
}

static void test_zero_fails(void **state)
{
	(void)state;
	fail_each(CTG_SIM_ZERO, -CTG_ENOMEM);
}

static void test_restrict_fails(void **state)
{
	(void)state;
	fail_each(CTG_SIM_RESTRICT, -CTG_EBUSY);
}

static void test_install_fails(void **state)
{
	(void)state;
	fail_each(CTG_SIM_INSTALL, -CTG_ENOMEM);
}

/* Zero fails where nothing was copied: the frames are free again, and known to be zero as before.
 */
static void test_zero_fails_in_idle_memory(void **state)
{
	struct lend *l = lend_open(4, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct snapshot *before = snapshot_take(l);
	ctg_pfn_t pfn;

	(void)state;
	ctg_sim_fail(l->sim, CTG_SIM_ZERO, 1);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK + 1, NULL, &pfn), -CTG_ENOMEM);
	snapshot_check(l, before, false);
	lend_close(l);
}

static void test_cancelled_while_copying(void **state)
{
	struct lend *l = lend_open(4, 5, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .cancel = &script.cancel};
	struct snapshot *before;
	ctg_pfn_t pfn = 42;

	(void)state;
	fill(l, 4 * BLOCK);
	before = snapshot_take(l);
	script_begin(l);
	script.cancel_at_copy = 1;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_EINTR);
	assert_int_equal(script.copies, 1);
	assert_in_range(report.frames_moved, 1, 4 * BLOCK - 1);
	assert_int_equal(pfn, 42);
	snapshot_check(l, before, false);
	lend_close(l);
}

static void test_late_while_copying(void **state)
{
	struct lend *l = lend_open(4, 5, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_request request = {.deadline = 1000};
	struct snapshot *before;
	ctg_pfn_t pfn = 42;

	(void)state;
	fill(l, 4 * BLOCK);
	before = snapshot_take(l);
	script_begin(l);
	script.advance_at_copy = 1;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_ETIMEDOUT);
	assert_int_equal(script.copies, 1);
	snapshot_check(l, before, false);
	lend_close(l);
}

/* A frame is pinned while others move: what has moved stays moved, everything else is undone. */
static void test_pinned_while_copying(void **state)
{
	struct lend *l = lend_open(4, 5, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct snapshot *before;
	ctg_pfn_t pfn = 42;

	(void)state;
	fill(l, 4 * BLOCK);
	before = snapshot_take(l);
	script_begin(l);
	script.pin_at_copy = 1;
	script.frame = at(4 * BLOCK - 1);
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, at(4 * BLOCK - 1));
	assert_int_equal(report.frames_moved, 4 * BLOCK - 1);
	assert_int_equal(page_at(l, lend_frame(l, at(4 * BLOCK - 1))->index), at(4 * BLOCK - 1));
	snapshot_check(l, before, false);
	/* The window that has become cheap is free but for that frame. */
	script.pin_at_copy = 0;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK - 1, &request, &pfn), 0);
	assert_int_equal(report.frames_moved, 0);
	ctg_frame_put(l->ctg, at(4 * BLOCK - 1), CTG_WORD_PIN1, 1);
	lend_close(l);
}

/* The report says where the time went. */
static void test_report_times(void **state)
{
	struct lend *l = lend_open(4, 5, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	ctg_pfn_t pfn;

	(void)state;
	assert_int_equal(lend_small(l, BLOCK), BLOCK);
	ctg_drain_caches(l->ctg);
	script_begin(l);
	script.advance_at_copy = 1;
	script.advance_at_zero = 1;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), 0);
	assert_int_equal(report.ns_copy, 1000000);
	assert_int_equal(report.ns_zero, 3000);
	assert_int_equal(report.ns_total, 1003000);
	assert_int_equal(report.ns_search + report.ns_isolate + report.ns_install, 0);
	assert_int_equal(report.frames_moved, BLOCK);
	assert_int_equal(report.frames_free, 3 * BLOCK);
	lend_close(l);
}

/* Two pieces have to be zeroed, and between them is one that has not. */
static void test_cancelled_while_zeroing(void **state)
{
	struct lend *l = lend_open(8, 1, true);
	struct ctg_extent range = {at(0), 8 * BLOCK};
	struct ctg_cma_config config = {
		.name = "a", .ranges = &range, .nr_ranges = 1, .zeroed = true};
	struct ctg_alloc_request request = {.cancel = &script.cancel};
	struct ctg_cma *cma;
	struct snapshot *before;

	(void)state;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	/* Frames of blocks 1 and 4 that are free and not zero, kept apart from what is. */
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(0), 8 * BLOCK, NULL), 0);
	memset(ctg_sim_frame(l->sim, at(BLOCK)), 0xff, BLOCK * CTG_PAGE_SIZE);
	memset(ctg_sim_frame(l->sim, at(4 * BLOCK)), 0xff, BLOCK * CTG_PAGE_SIZE);
	ctg_contig_put(l->zone, at(BLOCK), BLOCK);
	ctg_contig_put(l->zone, at(4 * BLOCK), BLOCK);
	for (unsigned i = 2; i < 4; i++)
		for (uint64_t n = 0; n < BLOCK; n++)
			ctg_store64_relaxed(&lend_frame(l, at(i * BLOCK + n))->word, 0);
	ctg_free_run(l->zone, at(2 * BLOCK), 2 * BLOCK, true);
	before = snapshot_take(l);
	script_begin(l);
	script.cancel_at_zero = 1;
	assert_int_equal(
		ctg_alloc_contig_range(l->ctg, at(BLOCK), 4 * BLOCK, &request), -CTG_EINTR);
	assert_int_equal(script.zeros, 1);
	/* The piece that was zeroed is known to be so now. */
	snapshot_check(l, before, false);
	script.cancel.v = 0;
	script.cancel_at_zero = 0;
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(BLOCK), 4 * BLOCK, &request), 0);
	assert_int_equal(script.zeros, 2);
	check_taken(l, at(BLOCK), 4 * BLOCK, true);
	lend_close(l);
}

/* While the frames are ours a stranger takes one for a moment; the undo leaves it to that one. */
static void test_undo_meets_a_stranger(void **state)
{
	struct lend *l = lend_open(2, 2, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 0);
	struct ctg_zone_stat stat;
	ctg_pfn_t pfn;

	(void)state;
	script_begin(l);
	script.hold_at_zero = 1;
	script.frame = at(77);
	ctg_sim_fail(l->sim, CTG_SIM_ZERO, 1);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, NULL, &pfn), -CTG_ENOMEM);
	assert_int_equal(word_of(l, at(77)), CTG_WORD_REF1);
	ctg_zone_stat(l->zone, &stat);
	assert_int_equal(stat.nr_free, 4 * BLOCK - 1);
	ctg_frame_put(l->ctg, at(77), CTG_WORD_REF1, 1);
	ctg_zone_stat(l->zone, &stat);
	assert_int_equal(stat.nr_free, 4 * BLOCK);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, NULL, &pfn), 0);
	lend_close(l);
}

/* ---- giving back ----------------------------------------------------------------------------- */

static void test_free_refuses(void **state)
{
	struct lend *l = lend_open(1, 4, true);
	struct snapshot *before;
	ctg_pfn_t pfn;

	(void)state;
	take_ok(l, at(2 * BLOCK + 10), 100);
	assert_int_equal(ctg_alloc_frames(l->ctg, 0, 0, &pfn), 0);
	before = snapshot_take(l);
	assert_int_equal(ctg_free_contig_range(NULL, at(2 * BLOCK + 10), 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK + 10), 0, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK + 10), 101, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK + 9), 10, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, pfn, 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(0), 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, UINT64_MAX, 1, NULL), -CTG_EINVAL);
	assert_int_equal(
		ctg_free_contig_range(l->ctg, at(2 * BLOCK + 10), UINT64_MAX, NULL), -CTG_EINVAL);
	snapshot_check(l, before, true);
	free_ok(l, at(2 * BLOCK + 30), 40); /* parts are fine */
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK + 10), 100, NULL), -CTG_EINVAL);
	free_ok(l, at(2 * BLOCK + 10), 20);
	free_ok(l, at(2 * BLOCK + 70), 40);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK + 10), 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(l->ctg, pfn), 0);
	lend_close(l);
}

static void test_free_while_held(void **state)
{
	struct lend *l = lend_open(1, 4, true);
	struct ctg_zone_stat stat;
	uint64_t held;
	uint32_t ticket;

	(void)state;
	take_ok(l, at(2 * BLOCK), 300);
	/* Held by another, and waited for: who waits is woken although a holder is left. */
	assert_int_equal(ctg_frame_tryget(lend_frame(l, at(2 * BLOCK + 5))), 0);
	ctg_or64_acq_rel(&lend_frame(l, at(2 * BLOCK + 5))->word, CTG_WORD_WAITERS);
	/* Waited for, but held by nobody else. */
	ctg_or64_acq_rel(&lend_frame(l, at(2 * BLOCK + 6))->word, CTG_WORD_WAITERS);
	ticket = l->ctg->frame_wait[at(2 * BLOCK + 5) % CTG_FRAME_WAITS].v;
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK), 300, &held), 0);
	assert_int_equal(held, 1);
	assert_int_not_equal(ticket, l->ctg->frame_wait[at(2 * BLOCK + 5) % CTG_FRAME_WAITS].v);
	assert_int_equal(l->ctg->frame_wait[at(2 * BLOCK + 6) % CTG_FRAME_WAITS].v, 1);
	assert_int_equal(word_of(l, at(2 * BLOCK + 5)), CTG_WORD_REF1);
	assert_int_equal(word_of(l, at(2 * BLOCK + 6)), 0);
	/* It was given back: not once more, though it is still of a taken range. */
	ctg_add64_acq_rel(&lend_frame(l, at(2 * BLOCK + 5))->word, CTG_WORD_PIN1 - CTG_WORD_REF1);
	assert_int_equal(state_of(l, at(2 * BLOCK + 5)), CTG_FRAME_CONTIG);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK + 5), 1, NULL), -CTG_EINVAL);
	ctg_add64_acq_rel(&lend_frame(l, at(2 * BLOCK + 5))->word, CTG_WORD_REF1 - CTG_WORD_PIN1);
	ctg_zone_stat(l->zone, &stat);
	assert_int_equal(stat.nr_free, 4 * BLOCK - 1);
	ctg_frame_put(l->ctg, at(2 * BLOCK + 5), CTG_WORD_REF1, 1);
	ctg_zone_stat(l->zone, &stat);
	assert_int_equal(stat.nr_free, 4 * BLOCK);
	lend_close(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_bad_ranges),
		cmocka_unit_test(test_edges_are_given_back),
		cmocka_unit_test(test_large_frames),
		cmocka_unit_test(test_held_large_frame),
		cmocka_unit_test(test_window_behind_a_held_head),
		cmocka_unit_test(test_unmovable_fails_before_anything_moves),
		cmocka_unit_test(test_isolated_by_another),
		cmocka_unit_test(test_looks_again),
		cmocka_unit_test(test_cancelled_while_waiting),
		cmocka_unit_test(test_cached_frame_in_a_range),
		cmocka_unit_test(test_frame_between_two_steps),
		cmocka_unit_test(test_metadata_fails),
		cmocka_unit_test(test_copy_fails),
		cmocka_unit_test(test_zero_fails),
		cmocka_unit_test(test_restrict_fails),
		cmocka_unit_test(test_install_fails),
		cmocka_unit_test(test_zero_fails_in_idle_memory),
		cmocka_unit_test(test_cancelled_while_copying),
		cmocka_unit_test(test_late_while_copying),
		cmocka_unit_test(test_cancelled_while_zeroing),
		cmocka_unit_test(test_pinned_while_copying),
		cmocka_unit_test(test_report_times),
		cmocka_unit_test(test_undo_meets_a_stranger),
		cmocka_unit_test(test_free_refuses),
		cmocka_unit_test(test_free_while_held),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
