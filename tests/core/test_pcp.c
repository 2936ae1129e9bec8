/* SPDX-License-Identifier: MIT */
/* Per-CPU caches: what goes in, what comes out, who may empty them. */
#include "zone_check.h"

#include <pthread.h>

#define BASE (8 * BLOCK)
#define NR (8 * BLOCK)
#define MOVABLE CTG_GFP_MOVABLE

struct fixture {
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
};

static const int me;

static void open_zone(struct fixture *f, unsigned flags)
{
	struct ctg_zone_config config = {.base = BASE, .nr = NR, .flags = flags};
	struct ctg_sim_config sim = {.nr_cpus = 3};

	assert_int_equal(ctg_sim_create(&sim, &f->sim), 0);
	f->ctg = ctg_sim_machine(f->sim);
	assert_int_equal(ctg_sim_add_zone(f->sim, &config, true, &f->zone), 0);
	ctg_sim_set_cpu(0);
}

/* Four blocks of ordinary memory, four of an area. */
static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));

	assert_non_null(f);
	open_zone(f, 0);
	assert_int_equal(ctg_zone_release(f->zone, BASE, 4 * BLOCK, true), 0);
	assert_int_equal(
		ctg_zone_lend(f->zone, BASE + 4 * BLOCK, 4 * BLOCK, CTG_MIGRATE_CMA, true), 0);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	check_zone(f->zone);
	ctg_drain_caches(f->ctg);
	assert_int_equal(f->zone->free[11][CTG_MIGRATE_CMA].nr, 1);
	ctg_sim_destroy(f->sim);
	free(f);
	return 0;
}

static uint64_t cached(const struct fixture *f, unsigned cpu, enum ctg_migratetype mt)
{
	return f->zone->pcp[cpu].list[mt].nr;
}

static ctg_pfn_t get(struct fixture *f, unsigned gfp)
{
	ctg_pfn_t pfn = 0;

	assert_int_equal(ctg_alloc_frames(f->ctg, 0, gfp, &pfn), 0);
	return pfn;
}

static void put(struct fixture *f, ctg_pfn_t pfn)
{
	assert_int_equal(ctg_free_frames(f->ctg, pfn), 0);
}

static void fills_in_batches_in_order(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[CTG_PCP_BATCH + 1];

	for (unsigned i = 0; i < CTG_PCP_BATCH; i++) {
		pfn[i] = get(f, MOVABLE);
		assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH - 1 - i);
		/* Neighbours are given out one after the other. */
		assert_int_equal(pfn[i], pfn[0] + i);
	}
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_CMA], 4 * BLOCK - CTG_PCP_BATCH);
	pfn[CTG_PCP_BATCH] = get(f, MOVABLE);
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH - 1);
	check_zone(f->zone);
	for (unsigned i = 0; i <= CTG_PCP_BATCH; i++)
		put(f, pfn[i]);
}

static void keeps_a_bounded_number(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[4 * CTG_PCP_HIGH];

	for (unsigned i = 0; i < 4 * CTG_PCP_HIGH; i++)
		pfn[i] = get(f, MOVABLE);
	ctg_pcp_drain(f->zone);
	for (unsigned i = 0; i < 4 * CTG_PCP_HIGH; i++) {
		put(f, pfn[i]);
		assert_int_equal(ctg_info_state(info_at(f->zone, pfn[i])) == CTG_FRAME_PCP ||
					 frame_is_free(f->zone, pfn[i]),
			true);
		assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA),
			i < CTG_PCP_HIGH ? i + 1
					 : CTG_PCP_HIGH + 1 - CTG_PCP_BATCH +
						   (i - CTG_PCP_HIGH) % CTG_PCP_BATCH);
	}
	check_zone(f->zone);
}

static void types_are_kept_apart(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t movable = get(f, MOVABLE), ordinary = get(f, MOVABLE | CTG_GFP_NO_CMA);
	ctg_pfn_t lent = get(f, MOVABLE | CTG_GFP_NO_ORDINARY), unmovable = get(f, 0);

	assert_true(movable >= BASE + 4 * BLOCK && lent >= BASE + 4 * BLOCK);
	assert_true(ordinary < BASE + 4 * BLOCK && unmovable < BASE + 4 * BLOCK);
	assert_int_equal(ctg_info_flags(info_at(f->zone, unmovable)), CTG_FRAME_UNMOVABLE);
	assert_int_equal(ctg_info_flags(info_at(f->zone, movable)), 0);
	put(f, movable);
	put(f, ordinary);
	put(f, unmovable);
	put(f, lent);
	/* With a full cache of the area's frames, an unmovable request still goes elsewhere. */
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH);
	unmovable = get(f, 0);
	assert_true(unmovable < BASE + 4 * BLOCK);
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH);
	put(f, unmovable);
}

static void any_cpu_drains(void **state)
{
	struct fixture *f = *state;
	struct ctg_counters counters;
	struct ctg_zone_stat stat;

	for (unsigned cpu = 0; cpu < 3; cpu++) {
		ctg_sim_set_cpu(cpu);
		put(f, get(f, MOVABLE));
		put(f, get(f, 0));
		assert_int_equal(cached(f, cpu, CTG_MIGRATE_CMA), CTG_PCP_BATCH);
	}
	ctg_drain_caches(f->ctg);
	for (unsigned cpu = 0; cpu < 3; cpu++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			assert_int_equal(cached(f, cpu, (enum ctg_migratetype)mt), 0);
	ctg_counters_read(f->ctg, &counters);
	assert_int_equal(counters.cache_drains, 1);
	put(f, get(f, MOVABLE));
	ctg_zone_stat(f->zone, &stat);
	assert_int_equal(stat.nr_pcp, 0);
	assert_int_equal(stat.nr_free, NR);
	ctg_counters_read(f->ctg, &counters);
	assert_int_equal(counters.cache_drains, 1);
	ctg_drain_caches(NULL);
}

/* No request fails for want of memory that lies in another CPU's cache. */
static void caches_do_not_hide_memory(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t *pfn = calloc(NR, sizeof(*pfn));
	uint64_t nr = 0;
	ctg_pfn_t block;

	assert_non_null(pfn);
	for (unsigned cpu = 0; cpu < 3; cpu++) {
		ctg_sim_set_cpu(cpu);
		put(f, get(f, MOVABLE));
		put(f, get(f, 0));
	}
	ctg_sim_set_cpu(1);
	while (nr < NR && ctg_alloc_frames(f->ctg, 0, MOVABLE, &pfn[nr]) == 0)
		nr++;
	assert_int_equal(nr, NR);
	assert_int_equal(ctg_alloc_frames(f->ctg, 0, MOVABLE, &block), -CTG_ENOMEM);
	for (nr = 0; nr < NR; nr++) {
		ctg_sim_set_cpu((unsigned)(nr % 3));
		put(f, pfn[nr]);
	}
	assert_int_equal(ctg_alloc_frames(f->ctg, 11, MOVABLE, &block), 0);
	put(f, block);
	free(pfn);
}

static void isolated_blocks_bypass(void **state)
{
	struct fixture *f = *state;
	ctg_pfn_t pfn[8];

	for (unsigned i = 0; i < 8; i++)
		pfn[i] = get(f, MOVABLE);
	assert_int_equal(ctg_block_isolate(f->zone, pfn[0], &me), 0);
	/* Not drained yet: what lies in a cache stays there, and what is freed does not join. */
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH - 8);
	put(f, pfn[0]);
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH - 8);
	assert_true(frame_is_free(f->zone, pfn[0]));
	check_zone(f->zone);
	ctg_pcp_drain(f->zone);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_ISOLATE], BLOCK - 7);
	for (unsigned i = 1; i < 8; i++)
		put(f, pfn[i]);
	assert_int_equal(f->zone->nr_free[CTG_MIGRATE_ISOLATE], BLOCK);
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), 0);
	ctg_block_unisolate(f->zone, pfn[0], &me);
}

static void knows_what_is_zero(void **state)
{
	struct fixture *f = *state;
	struct ctg_counters counters;
	ctg_pfn_t pfn = get(f, MOVABLE | CTG_GFP_ZERO);
	uint64_t *contents = ctg_sim_frame(f->sim, pfn);

	ctg_counters_read(f->ctg, &counters);
	assert_int_equal(counters.frames_zeroed, 0);
	contents[17] = 1;
	put(f, pfn);
	assert_int_equal(get(f, MOVABLE | CTG_GFP_ZERO), pfn);
	assert_int_equal(contents[17], 0);
	ctg_counters_read(f->ctg, &counters);
	assert_int_equal(counters.frames_zeroed, 1);
	/* A failure to zero gives the frame back. */
	contents[17] = 1;
	put(f, pfn);
	ctg_sim_fail(f->sim, CTG_SIM_ZERO, 1);
	assert_int_equal(ctg_alloc_frames(f->ctg, 0, MOVABLE | CTG_GFP_ZERO, &pfn), -CTG_ENOMEM);
	check_zone(f->zone);
	ctg_counters_read(f->ctg, &counters);
	assert_int_equal(counters.frames_zeroed, 1);
	assert_int_equal(cached(f, 0, CTG_MIGRATE_CMA), CTG_PCP_BATCH);
}

static struct {
	struct ctg_zone *zone;
	void (*discard)(void *host, ctg_pfn_t pfn, uint64_t nr);
	uint64_t frames;
} watched;

static void watch_discard(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	assert_int_equal(watched.zone->lock.state.v, 0);
	for (ctg_pfn_t p = pfn; p < pfn + nr; p++)
		assert_false(frame_is_free(watched.zone, p));
	watched.frames += nr;
	watched.discard(host, pfn, nr);
}

static void discards_before_it_frees(void **state)
{
	struct fixture f;
	ctg_pfn_t pfn[60], large;
	struct ctg_counters counters;

	(void)state;
	open_zone(&f, CTG_ZONE_DISCARD);
	watched.zone = f.zone;
	watched.discard = f.ctg->port.discard;
	watched.frames = 0;
	f.ctg->port.discard = watch_discard;
	assert_int_equal(ctg_zone_release(f.zone, BASE, NR, true), 0);
	for (unsigned i = 0; i < 60; i++) {
		pfn[i] = get(&f, MOVABLE);
		memset(ctg_sim_frame(f.sim, pfn[i]), 1, CTG_PAGE_SIZE);
	}
	assert_int_equal(ctg_alloc_frames(f.ctg, 10, MOVABLE, &large), 0);
	memset(ctg_sim_frame(f.sim, large + 1000), 1, CTG_PAGE_SIZE);
	for (unsigned i = 0; i < 60; i++)
		put(&f, pfn[i]);
	put(&f, large);
	/* What never left the cache dirty needs none. */
	ctg_drain_caches(f.ctg);
	assert_int_equal(watched.frames, 60 + 1024);
	check_zone(f.zone);
	for (unsigned i = 0; i < 60; i++)
		assert_int_equal(*(unsigned char *)ctg_sim_frame(f.sim, pfn[i]), 0);
	assert_int_equal(ctg_alloc_frames(f.ctg, 12, MOVABLE | CTG_GFP_ZERO, &large), 0);
	ctg_counters_read(f.ctg, &counters);
	assert_int_equal(counters.frames_zeroed, 0);
	put(&f, large);
	assert_int_equal(watched.frames, 60 + 1024 + 8 * BLOCK);
	ctg_sim_destroy(f.sim);
}

struct churn {
	struct fixture *f;
	unsigned cpu;
	struct ctg_word32 *stop;
	unsigned failures;
};

#define KEPT 300

/* Allocates and frees single frames as one CPU. */
static void *churn(void *arg)
{
	struct churn *c = arg;
	ctg_pfn_t kept[KEPT];
	unsigned nr = 0, turn = c->cpu;

	ctg_sim_set_cpu(c->cpu);
	while (ctg_load32_acquire(c->stop) == 0 || nr != 0) {
		bool more =
			ctg_load32_acquire(c->stop) == 0 && (turn++ * 2654435761u >> 20) % 5 < 3;

		if (more && nr < KEPT && ctg_alloc_frames(c->f->ctg, 0, MOVABLE, &kept[nr]) == 0)
			nr++;
		else if (nr != 0 && ctg_free_frames(c->f->ctg, kept[turn % nr]) == 0)
			kept[turn % nr] = kept[nr - 1], nr--;
		else
			c->failures += nr != 0;
	}
	return NULL;
}

static void isolation_and_drain_lose_nothing(void **state)
{
	struct fixture *f = *state;
	struct ctg_word32 stop = {0};
	struct churn c[2] = {{f, 0, &stop, 0}, {f, 1, &stop, 0}};
	pthread_t thread[2];
	unsigned in_cache = 0;

	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, churn, &c[i]), 0);
	ctg_sim_set_cpu(2);
	for (unsigned i = 0; i < 400; i++) {
		ctg_pfn_t start = BASE + (4 + i % 4) * BLOCK;

		if (ctg_block_isolate(f->zone, start, &me) != 0)
			break;
		ctg_pcp_drain(f->zone);
		for (unsigned look = 0; look < 3; look++)
			for (ctg_pfn_t p = start; p < start + BLOCK; p++)
				in_cache += ctg_info_state(ctg_load32_acquire(
						    &frame_at(f->zone, p)->info)) == CTG_FRAME_PCP;
		ctg_block_unisolate(f->zone, start, &me);
	}
	ctg_store32_release(&stop, 1);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	assert_int_equal(in_cache, 0);
	assert_int_equal(c[0].failures + c[1].failures, 0);
	ctg_drain_caches(f->ctg);
	assert_int_equal(
		f->zone->nr_free[CTG_MIGRATE_CMA] + f->zone->nr_free[CTG_MIGRATE_MOVABLE], NR);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(fills_in_batches_in_order),
		T(keeps_a_bounded_number),
		T(types_are_kept_apart),
		T(any_cpu_drains),
		T(caches_do_not_hide_memory),
		T(isolated_blocks_bypass),
		T(knows_what_is_zero),
		cmocka_unit_test(discards_before_it_frees),
		T(isolation_and_drain_lose_nothing),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
