/* SPDX-License-Identifier: MIT */
/* What else may happen while a frame moves: at each point of a migration, each thing in turn. */
#include "moving.h"

#include <pthread.h>
#include <sched.h>

/* ---- the stage: one space, and what each of its pages must be ---------------------------- */

#define STAGE_PAGES PAGES

enum content { ABSENT, OLD, ZERO }; /* not present, or what it holds */

static struct stage {
	struct world w;
	struct ctg_mm *mm;
	struct hoard *hoard;
	ctg_pfn_t frame; /* of the first page, before it moves */
	enum content content[STAGE_PAGES];
	unsigned prot[STAGE_PAGES];
	/* The one thing that happens, and when. */
	unsigned point;
	void (*act)(struct stage *);
	bool acted, acting;
	enum ctg_sim_hook fails; /* and the hook that fails then */
	/* A stranger's hold, to be let go. */
	ctg_pfn_t held;
	uint64_t one;
} stage;

static void expect(ctg_vpn_t first, uint64_t nr, enum content content, unsigned prot)
{
	for (uint64_t i = first; i < first + nr; i++) {
		stage.content[i] = content;
		stage.prot[i] = prot;
	}
}

static void stage_small(void)
{
	map_small(&stage.w, stage.mm, BASE, 20);
	expect(0, 20, OLD, RW);
}

static void stage_large(void)
{
	map_large(&stage.w, stage.mm, BASE);
	expect(0, PAGES, OLD, RW);
}

static void stage_split(void)
{
	stage_large();
	assert_int_equal(ctg_mprotect(stage.mm, BASE + 15, 2, CTG_PROT_READ), 0);
	expect(15, 2, OLD, CTG_PROT_READ);
}

static void stage_partly(void)
{
	stage_large();
	assert_int_equal(ctg_munmap(stage.mm, BASE + 30, PAGES - 40), 0);
	expect(30, PAGES - 40, ABSENT, 0);
}

static void stage_pieces(void)
{
	stage_large();
	stage.hoard = fragment(&stage.w, PAGES + 8, pfn_of(stage.mm, BASE));
}

static void (*const stages[])(void) = {
	stage_small, stage_large, stage_split, stage_partly, stage_pieces};

/* Every mapping is counted, and nothing else is; then all contents. */
static void stage_check(void)
{
	struct world *w = &stage.w;
	uint32_t *maps = calloc(w->zone->nr, sizeof(*maps));
	unsigned level;

	assert_non_null(maps);
	for (uint64_t i = 0; i < STAGE_PAGES; i++) {
		uint64_t entry = ctg_pte_read(stage.mm, BASE + i, &level);
		struct ctg_mapping m = lookup(stage.mm, BASE + i, 1);

		assert_int_equal(m.pfn != CTG_PFN_NONE, stage.content[i] != ABSENT);
		assert_false(m.moving);
		if (m.pfn == CTG_PFN_NONE)
			continue;
		assert_int_equal(m.prot, stage.prot[i]);
		if (stage.content[i] == OLD)
			check_stamp(w, stage.mm, BASE + i, 1);
		else
			assert_int_equal(*(uint64_t *)ctg_sim_frame(w->sim, m.pfn), 0);
		if (level == 0 || i == 0)
			maps[ctg_frame_head(w->ctg, ctg_pte_pfn(entry)) - w->zone->base]++;
	}
	for (uint64_t i = 0; i < w->zone->nr; i++) {
		uint64_t word = w->zone->frames[i].word.v & ~CTG_WORD_FLAGS;

		if (ctg_info_state(w->zone->frames[i].info.v) != CTG_FRAME_ANON)
			continue;
		assert_int_equal(ctg_word_map(word), maps[i]);
		if (w->zone->base + i == stage.held)
			word -= stage.one;
		assert_int_equal(word, maps[i] * CTG_WORD_MAP1);
	}
	free(maps);
}

/* ---- what happens ------------------------------------------------------------------------ */

static void act_nothing(struct stage *s)
{
	(void)s;
}

static void act_unmap_all(struct stage *s)
{
	assert_int_equal(ctg_munmap(s->mm, BASE, STAGE_PAGES), 0);
	expect(0, STAGE_PAGES, ABSENT, 0);
}

static void act_unmap_some(struct stage *s)
{
	assert_int_equal(ctg_munmap(s->mm, BASE + 4, 3), 0);
	expect(4, 3, ABSENT, 0);
}

static void act_drop_some(struct stage *s)
{
	assert_int_equal(ctg_madvise_dontneed(s->mm, BASE, 2), 0);
	expect(0, 2, ABSENT, 0);
}

static void act_replace_some(struct stage *s)
{
	assert_int_equal(ctg_munmap(s->mm, BASE, 5), 0);
	assert_int_equal(ctg_mmap(s->mm, BASE, 5, CTG_PROT_READ), 0);
	assert_int_equal(ctg_mm_populate(s->mm, BASE, 5, NULL), 0);
	expect(0, 5, ZERO, CTG_PROT_READ);
}

/* munmap on another CPU: entries cleared, the batch not flushed yet. */
static void act_unmap_unflushed(struct stage *s)
{
	struct ctg_batch *batch = &s->mm->batch;
	struct ctg_pte_ref ref;

	if (ctg_pte_split_to(s->mm, BASE + 8, 0) != 0)
		return;
	ctg_lock(&s->w.ctg->port, &batch->lock);
	for (unsigned i = 8; i < 12; i++) {
		ctg_pte_lock(s->mm, BASE + i, &ref);
		assert_int_equal(ref.level, 0);
		batch->run[batch->nr_runs++] = (struct ctg_batch_run){
			.vpn = BASE + i, .pfn = ctg_pte_pfn(ref.entry), .nr = 1};
		batch->nr_pages++;
		ctg_pte_set(&ref, 0);
		ctg_pte_unlock(s->mm, &ref);
		ctg_add64_relaxed(&s->mm->nr_present, -(uint64_t)1);
	}
	ctg_unlock(&s->w.ctg->port, &batch->lock);
	expect(8, 4, ABSENT, 0);
}

static void act_protect_all(struct stage *s)
{
	for (unsigned i = 0; i < STAGE_PAGES; i++) {
		if (s->content[i] == ABSENT)
			continue;
		if (s->content[0] == OLD && i == 0 && s->content[PAGES / 2] == OLD) {
			assert_int_equal(ctg_mprotect(s->mm, BASE, PAGES, CTG_PROT_READ), 0);
			expect(0, PAGES, OLD, CTG_PROT_READ);
			return;
		}
		assert_int_equal(ctg_mprotect(s->mm, BASE + i, 1, CTG_PROT_READ), 0);
		s->prot[i] = CTG_PROT_READ;
	}
}

static void act_protect_some(struct stage *s)
{
	assert_int_equal(ctg_mprotect(s->mm, BASE + 3, 4, CTG_PROT_NONE), 0);
	expect(3, 4, OLD, 0);
}

/* Rights that widen make another install, while the entries are MOVING. */
static void act_protect_twice(struct stage *s)
{
	assert_int_equal(ctg_mprotect(s->mm, BASE + 3, 4, CTG_PROT_NONE), 0);
	assert_int_equal(ctg_mprotect(s->mm, BASE + 2, 5, RW), 0);
}

static void act_hold(struct stage *s, uint64_t one)
{
	ctg_pfn_t pfn = ctg_frame_head(s->w.ctg, pfn_of(s->mm, BASE + 6));

	s->held = pfn;
	s->one = one;
	hold(&s->w, pfn, one);
}

static void act_pin(struct stage *s)
{
	act_hold(s, CTG_WORD_PIN1);
}

static void act_reference(struct stage *s)
{
	act_hold(s, CTG_WORD_REF1);
}

/* Readers go on, through the TLB, at any time. */
static void act_read(struct stage *s)
{
	for (unsigned i = 0; i < 20; i++) {
		uint64_t value;

		assert_int_equal(ctg_sim_read(s->w.sim, s->mm, (BASE + i) << CTG_PAGE_SHIFT, &value,
					 sizeof(value)),
			0);
		assert_int_equal(value, stamp_of(s->mm, BASE + i, 0));
	}
}

static void act_populate_elsewhere(struct stage *s)
{
	assert_int_equal(ctg_mmap(s->mm, BASE + 8 * PAGES, 3, RW), 0);
	assert_int_equal(ctg_mm_populate(s->mm, BASE + 8 * PAGES, 3, NULL), 0);
	assert_int_equal(ctg_munmap(s->mm, BASE + 8 * PAGES, 3), 0);
}

static void (*const acts[])(struct stage *) = {act_nothing, act_unmap_all, act_unmap_some,
	act_drop_some, act_replace_some, act_unmap_unflushed, act_protect_all, act_protect_some,
	act_protect_twice, act_pin, act_reference, act_read, act_populate_elsewhere};

/* ---- when ---------------------------------------------------------------------------------- */

enum point {
	BEFORE_RESTRICT,
	AFTER_RESTRICT,
	BEFORE_COPY,
	AFTER_COPY,
	BEFORE_INSTALL,
	AFTER_INSTALL,
	NR_POINTS
};

static void reach(enum point point)
{
	if (point != stage.point || stage.acted)
		return;
	stage.acted = true;
	stage.acting = true;
	stage.act(&stage);
	stage.acting = false;
}

/* The hook fails in the migration, not in what happens meanwhile. */
static void arm(enum ctg_sim_hook hook)
{
	if (stage.fails == hook)
		ctg_sim_fail(stage.w.sim, hook, 1);
}

static int stage_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how)
{
	int ret;

	if (how != CTG_TLB_WRPROTECT)
		return stage.w.port.tlb_restrict(host, mm, ranges, nr, how);
	reach(BEFORE_RESTRICT);
	arm(CTG_SIM_RESTRICT);
	ret = stage.w.port.tlb_restrict(host, mm, ranges, nr, how);
	reach(AFTER_RESTRICT);
	return ret;
}

static int stage_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	int ret;

	reach(BEFORE_COPY);
	arm(CTG_SIM_COPY);
	ret = stage.w.port.copy(host, runs, nr);
	reach(AFTER_COPY);
	return ret;
}

static int stage_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	static bool again;
	int ret;

	if (stage.acting)
		return stage.w.port.tlb_install(host, mm, ranges, nr);
	reach(BEFORE_INSTALL);
	if (!again)
		arm(CTG_SIM_INSTALL);
	ret = stage.w.port.tlb_install(host, mm, ranges, nr);
	again = ret != 0;
	reach(AFTER_INSTALL);
	return ret;
}

static void stage_open(void (*set)(void))
{
	memset(&stage, 0, sizeof(stage));
	stage.fails = CTG_SIM_NR_HOOKS;
	stage.held = CTG_PFN_NONE;
	world_open(&stage.w, 5);
	stage.mm = space_new(&stage.w, 0);
	set();
	stage.frame = pfn_of(stage.mm, BASE);
	stage.w.ctg->port.tlb_restrict = stage_restrict;
	stage.w.ctg->port.tlb_install = stage_install;
	stage.w.ctg->port.copy = stage_copy;
}

static void stage_close(void)
{
	ctg_batch_flush(&stage.mm->batch, false);
	if (stage.held != CTG_PFN_NONE) {
		ctg_frame_put(stage.w.ctg, stage.held, stage.one, 1);
		stage.held = CTG_PFN_NONE;
	}
	stage_check();
	if (stage.hoard != NULL)
		hoard_free_all(&stage.w, stage.hoard);
	ctg_mm_destroy(stage.mm, false);
	world_close(&stage.w);
}

static void run(unsigned set, unsigned point, unsigned act, enum ctg_sim_hook fails)
{
	struct ctg_migrate_stats stats;
	uint32_t moved;
	int ret;

	stage_open(stages[set]);
	stage.point = point;
	stage.act = acts[act];
	stage.fails = fails;
	moved = ctg_load32_acquire(&stage.mm->moved);
	ret = evacuate(&stage.w, stage.frame & ~(PAGES - 1), PAGES, 1, NULL, &stats);
	assert_true(stage.acted);
	stage.fails = CTG_SIM_NR_HOOKS;
	/* Writers who have begun to wait look again, whatever came of it. */
	assert_int_not_equal(ctg_load32_acquire(&stage.mm->moved), moved);
	/* Whatever stopped it is named; a stranger's hold stops it if it comes before the switch.
	 */
	assert_int_equal(ret == 0, stats.obstacle == CTG_OBSTACLE_NONE);
	if (fails == CTG_SIM_NR_HOOKS && stage.held != CTG_PFN_NONE && point < BEFORE_INSTALL) {
		assert_int_equal(ret, -CTG_EBUSY);
		assert_int_equal(stats.obstacle_pfn, stage.held);
		assert_int_equal(stats.obstacle,
			stage.one == CTG_WORD_PIN1 ? CTG_OBSTACLE_PIN : CTG_OBSTACLE_REF);
	} else if (fails == CTG_SIM_NR_HOOKS) {
		assert_int_equal(ret, 0);
	}
	ctg_batch_flush(&stage.mm->batch, false);
	stage_check();
	stage_close();
}

static void run_all(enum ctg_sim_hook fails, unsigned last_point)
{
	for (unsigned set = 0; set < sizeof(stages) / sizeof(*stages); set++)
		for (unsigned point = 0; point <= last_point; point++)
			for (unsigned act = 0; act < sizeof(acts) / sizeof(*acts); act++)
				run(set, point, act, fails);
}

static void test_meanwhile(void **state)
{
	(void)state;
	run_all(CTG_SIM_NR_HOOKS, AFTER_INSTALL);
}

/* The same, and the migration has to be undone. */
static void test_meanwhile_restrict_fails(void **state)
{
	(void)state;
	run_all(CTG_SIM_RESTRICT, AFTER_RESTRICT);
}

static void test_meanwhile_copy_fails(void **state)
{
	(void)state;
	run_all(CTG_SIM_COPY, AFTER_COPY);
}

static void test_meanwhile_install_fails(void **state)
{
	(void)state;
	run_all(CTG_SIM_INSTALL, BEFORE_INSTALL);
}

/* ---- one more ---------------------------------------------------------------------------- */

/* The batch that counts on a frame is flushed by the migration, and it moves all the same. */
static void test_helps_to_flush(void **state)
{
	struct ctg_counters counters;
	struct ctg_migrate_stats stats;

	(void)state;
	for (unsigned point = BEFORE_RESTRICT; point <= AFTER_COPY; point++) {
		stage_open(stage_split);
		stage.point = point;
		stage.act = act_unmap_unflushed;
		assert_int_equal(evacuate(&stage.w, stage.frame, PAGES, 1, NULL, &stats), 0);
		ctg_counters_read(stage.w.ctg, &counters);
		assert_int_equal(counters.batches_helped, 1);
		assert_int_equal(stage.mm->batch.nr_runs, 0);
		assert_int_not_equal(pfn_of(stage.mm, BASE), stage.frame);
		stage_close();
	}
	/* Not flushed before it began. */
	stage_open(stage_small);
	stage.act = act_nothing;
	act_unmap_unflushed(&stage);
	assert_int_equal(evacuate(&stage.w, stage.frame & ~(PAGES - 1), PAGES, 1, NULL, &stats), 0);
	assert_int_equal(stats.frames_moved, 20 - 4);
	assert_int_equal(stage.mm->batch.nr_runs, 0);
	stage_close();
}

static void act_pin_one(struct stage *s)
{
	s->held = pfn_of(s->mm, BASE + 6);
	s->one = CTG_WORD_PIN1;
	hold(&s->w, s->held, s->one);
}

/* The port cannot install, and one destination is pinned by then: that page alone has moved. */
static void test_put_back_but_pinned(void **state)
{
	struct ctg_migrate_stats stats;
	ctg_pfn_t old[20];

	(void)state;
	stage_open(stage_small);
	for (unsigned i = 0; i < 20; i++)
		old[i] = pfn_of(stage.mm, BASE + i);
	stage.point = BEFORE_INSTALL;
	stage.act = act_pin_one;
	stage.fails = CTG_SIM_INSTALL;
	assert_int_equal(
		evacuate(&stage.w, old[0] & ~(PAGES - 1), PAGES, 1, NULL, &stats), -CTG_ENOMEM);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_PORT);
	assert_int_equal(stats.frames_moved, 1);
	for (unsigned i = 0; i < 20; i++)
		assert_int_equal(pfn_of(stage.mm, BASE + i), i == 6 ? stage.held : old[i]);
	stage_check();
	stage_close();
}

/* Somebody sleeps until the old frame is free: he is woken when it is. */
static void act_sleep(struct stage *s)
{
	ctg_or64_acq_rel(&ctg_frame_of(s->w.ctg, s->frame)->word, CTG_WORD_WAITERS);
}

static void test_sleeper_on_source(void **state)
{
	(void)state;
	for (unsigned point = BEFORE_RESTRICT; point <= BEFORE_INSTALL; point++)
		for (unsigned fails = 0; fails < 2; fails++) {
			struct ctg_migrate_stats stats;
			struct ctg_word32 *wait;
			uint32_t ticket;

			stage_open(stage_small);
			wait = &stage.w.ctg->frame_wait[stage.frame % CTG_FRAME_WAITS];
			ticket = ctg_load32_acquire(wait);
			stage.point = point;
			stage.act = act_sleep;
			stage.fails = fails ? CTG_SIM_INSTALL : CTG_SIM_NR_HOOKS;
			assert_int_equal(evacuate(&stage.w, stage.frame & ~(PAGES - 1), PAGES, 1,
						 NULL, &stats),
				fails ? -CTG_ENOMEM : 0);
			assert_int_not_equal(ctg_load32_acquire(wait), ticket);
			assert_int_equal(word_of(&stage.w, stage.frame), fails ? CTG_WORD_MAP1 : 0);
			stage_close();
		}
}

/* ---- with threads ------------------------------------------------------------------------ */

static struct {
	pthread_t thread;
	bool started;
} other;

static uint64_t faults_waited(void)
{
	struct ctg_counters counters;

	ctg_counters_read(stage.w.ctg, &counters);
	return counters.faults_waited;
}

static uint64_t faults(void)
{
	struct ctg_counters counters;

	ctg_counters_read(stage.w.ctg, &counters);
	return counters.faults;
}

static void *write_page_six(void *arg)
{
	uint64_t value = 42;
	int *ret = arg;

	ctg_sim_set_cpu(1);
	*ret = ctg_sim_write(
		stage.w.sim, stage.mm, (BASE + 6) << CTG_PAGE_SHIFT, &value, sizeof(value));
	return NULL;
}

static int write_ret;

static void start_writer(void)
{
	write_ret = -1;
	assert_int_equal(pthread_create(&other.thread, NULL, write_page_six, &write_ret), 0);
	other.started = true;
}

static void act_write(struct stage *s)
{
	(void)s;
	start_writer();
	while (faults_waited() == 0)
		sched_yield();
}

static uint64_t value_of_page_six(void)
{
	return *(uint64_t *)ctg_sim_frame(stage.w.sim, pfn_of(stage.mm, BASE + 6));
}

static void check_written(void)
{
	uint64_t value = stamp_of(stage.mm, BASE + 6, 0);

	assert_int_equal(pthread_join(other.thread, NULL), 0);
	assert_int_equal(write_ret, 0);
	assert_int_equal(value_of_page_six(), 42);
	/* As it was, for the check of the contents. */
	assert_int_equal(ctg_sim_write(stage.w.sim, stage.mm, (BASE + 6) << CTG_PAGE_SHIFT, &value,
				 sizeof(value)),
		0);
}

/* A write during the move waits, and goes to where the page is then, moved or not. */
static void test_writer_waits(void **state)
{
	(void)state;
	for (unsigned set = 0; set < 5; set++)
		for (unsigned fails = 0; fails < 2; fails++) {
			struct ctg_migrate_stats stats;

			stage_open(stages[set]);
			stage.point = BEFORE_COPY;
			stage.act = act_write;
			stage.fails = fails ? CTG_SIM_COPY : CTG_SIM_NR_HOOKS;
			assert_int_equal(evacuate(&stage.w, stage.frame & ~(PAGES - 1), PAGES, 1,
						 NULL, &stats),
				fails ? -CTG_ENOMEM : 0);
			check_written();
			assert_int_equal(faults_waited(), 1);
			assert_int_equal(
				in_block(pfn_of(stage.mm, BASE + 6), stage.frame), fails != 0);
			stage_close();
		}
}

/* After the switch and before the install: the entry allows the write, the port does not. */
static void act_write_early(struct stage *s)
{
	uint64_t before = faults();

	(void)s;
	start_writer();
	while (faults() == before)
		sched_yield();
	for (unsigned i = 0; i < 100; i++)
		sched_yield();
	assert_int_equal(value_of_page_six(), stamp_of(stage.mm, BASE + 6, 0));
}

static void test_writer_waits_for_install(void **state)
{
	(void)state;
	for (unsigned fails = 0; fails < 2; fails++) {
		struct ctg_migrate_stats stats;

		stage_open(stage_small);
		stage.point = BEFORE_INSTALL;
		stage.act = act_write_early;
		stage.fails = fails ? CTG_SIM_INSTALL : CTG_SIM_NR_HOOKS;
		assert_int_equal(
			evacuate(&stage.w, stage.frame & ~(PAGES - 1), PAGES, 1, NULL, &stats),
			fails ? -CTG_ENOMEM : 0);
		check_written();
		stage_close();
	}
}

static void *destroy_space(void *arg)
{
	ctg_mm_destroy(arg, false);
	return NULL;
}

static void act_exit(struct stage *s)
{
	assert_int_equal(pthread_create(&other.thread, NULL, destroy_space, s->mm), 0);
	while (ctg_load64_relaxed(&s->mm->nr_present) != 0)
		sched_yield();
}

/* The space goes away: it waits for the walk to end, and nothing is left of it. */
static void test_exit(void **state)
{
	(void)state;
	for (unsigned set = 0; set < 5; set++)
		for (unsigned point = 0; point <= BEFORE_INSTALL; point++) {
			struct ctg_migrate_stats stats;
			struct ctg_zone *zone;

			stage_open(stages[set]);
			zone = stage.w.zone;
			stage.point = point;
			stage.act = act_exit;
			assert_int_equal(ctg_block_isolate(zone, stage.frame, &stage), 0);
			ctg_pcp_drain(zone);
			assert_int_equal(ctg_migrate_range(zone, stage.frame & ~(PAGES - 1), PAGES,
						 EVACUATE_GFP, 5, NULL, &stats),
				0);
			ctg_block_unisolate(zone, stage.frame, &stage);
			assert_int_equal(pthread_join(other.thread, NULL), 0);
			if (stage.hoard != NULL)
				hoard_free_all(&stage.w, stage.hoard);
			ctg_drain_caches(stage.w.ctg);
			check_zone(zone);
			world_close(&stage.w);
		}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_meanwhile),
		cmocka_unit_test(test_meanwhile_restrict_fails),
		cmocka_unit_test(test_meanwhile_copy_fails),
		cmocka_unit_test(test_meanwhile_install_fails),
		cmocka_unit_test(test_helps_to_flush),
		cmocka_unit_test(test_put_back_but_pinned),
		cmocka_unit_test(test_sleeper_on_source),
		cmocka_unit_test(test_writer_waits),
		cmocka_unit_test(test_writer_waits_for_install),
		cmocka_unit_test(test_exit),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
