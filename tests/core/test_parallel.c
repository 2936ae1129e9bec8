/* SPDX-License-Identifier: MIT */
/* Real threads that take ranges back at once, from one area or several, while memory is lent. */
#include "lend.h"

#include <pthread.h>

#define TAKERS 2
#define ROUNDS 150

struct crowd {
	struct lend *l;
	struct ctg_cma *cma[TAKERS];              /* the same or different areas */
	uint8_t owner[16 * CTG_PAGEBLOCK_FRAMES]; /* by frame: 0, or the taker's number + 1 */
	uint32_t done;
};
struct taker {
	struct crowd *crowd;
	unsigned number;
	unsigned taken, failed;
};

static uint64_t next_random(uint64_t *seed)
{
	*seed = *seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
	return *seed >> 33;
}

static void own(struct crowd *crowd, ctg_pfn_t pfn, uint64_t nr, uint8_t from, uint8_t to)
{
	for (uint64_t i = 0; i < nr; i++)
		if (__atomic_exchange_n(&crowd->owner[pfn - LEND_BASE + i], to, __ATOMIC_RELAXED) !=
			from)
			abort();
}

static void *take_and_release(void *arg)
{
	struct taker *t = arg;
	struct crowd *crowd = t->crowd;
	uint64_t seed = t->number + 1;

	ctg_sim_set_cpu(t->number);
	for (unsigned i = 0; i < ROUNDS; i++) {
		uint64_t nr = 1 + next_random(&seed) % (3 * CTG_PAGEBLOCK_FRAMES), held;
		struct ctg_alloc_request request = {
			.mode = next_random(&seed) % 3 == 0 ? CTG_MODE_FAST : CTG_MODE_NORMAL,
			.flags = next_random(&seed) % 2 == 0 ? CTG_ALLOC_NO_ZERO : 0};
		ctg_pfn_t pfn;
		int ret = ctg_cma_alloc(crowd->cma[t->number], nr, &request, &pfn);

		if (ret != 0) {
			if (ret != -CTG_EBUSY && ret != -CTG_ENOMEM)
				abort();
			t->failed++;
			continue;
		}
		own(crowd, pfn, nr, 0, (uint8_t)(t->number + 1));
		for (uint64_t n = 0; n < nr; n += 97) {
			uint64_t *page = ctg_sim_frame(crowd->l->sim, pfn + n);

			if ((request.flags & CTG_ALLOC_NO_ZERO) == 0 && page[9] != 0)
				abort();
			page[9] = t->number;
		}
		own(crowd, pfn, nr, (uint8_t)(t->number + 1), 0);
		if (ctg_cma_release(crowd->cma[t->number], pfn, nr, &held) != 0)
			abort();
		t->taken++;
	}
	__atomic_add_fetch(&crowd->done, 1, __ATOMIC_RELEASE);
	return NULL;
}

/* The borrower: its pages come and go, and always hold what was written last. */
static void churn(struct crowd *crowd)
{
	struct lend *l = crowd->l;
	struct ctg_mm *mm;
	struct ctg_mm_config config = {.gfp = 0};
	uint64_t seed = 99;

	ctg_sim_set_cpu(TAKERS);
	assert_int_equal(ctg_mm_create(l->ctg, &config, &mm), 0);
	while (__atomic_load_n(&crowd->done, __ATOMIC_ACQUIRE) < TAKERS) {
		ctg_vpn_t vpn = BLOCK * (1 + next_random(&seed) % 20);
		uint64_t nr = next_random(&seed) % 4 == 0 ? BLOCK : 1 + next_random(&seed) % 300;
		uint64_t present;

		assert_int_equal(ctg_munmap(mm, vpn, BLOCK), 0);
		assert_int_equal(ctg_mmap(mm, vpn, nr, RW), 0);
		ctg_mm_populate(mm, vpn, nr, &present);
		for (uint64_t i = 0; i < nr; i += 1 + nr / 8) {
			uint64_t address = ((vpn + i) << CTG_PAGE_SHIFT) + 8 * i, got = 0;

			if (ctg_sim_write(l->sim, mm, address, &seed, sizeof(seed)) != 0)
				continue;
			assert_int_equal(ctg_sim_read(l->sim, mm, address, &got, sizeof(got)), 0);
			assert_int_equal(got, seed);
		}
	}
	ctg_mm_destroy(mm, false);
}

static void crowd_run(bool one_area)
{
	struct crowd *crowd = calloc(1, sizeof(*crowd));
	struct taker taker[TAKERS];
	pthread_t thread[TAKERS];
	struct lend *l = lend_open(16, 16, false);
	struct ctg_zone_stat stat;

	crowd->l = l;
	if (one_area) {
		crowd->cma[0] = crowd->cma[1] = lend_area(l, "one", 0, 16, 0);
	} else {
		crowd->cma[0] = lend_area(l, "one", 0, 8, 0);
		crowd->cma[1] = lend_area(l, "two", 8, 8, 1);
	}
	for (unsigned i = 0; i < TAKERS; i++) {
		taker[i] = (struct taker){.crowd = crowd, .number = i};
		assert_int_equal(pthread_create(&thread[i], NULL, take_and_release, &taker[i]), 0);
	}
	churn(crowd);
	for (unsigned i = 0; i < TAKERS; i++) {
		pthread_join(thread[i], NULL);
		/* Nobody pins: a failure comes of the other's work, and is the exception. */
		assert_in_range(taker[i].taken, ROUNDS / 2, ROUNDS);
	}
	check_no_isolation(l);
	ctg_zone_stat(l->zone, &stat);
	assert_int_equal(stat.nr_free, 32 * BLOCK);
	for (unsigned i = 0; i < TAKERS; i++)
		assert_int_equal(crowd->cma[i]->ranges[0].taken.nr_set, 0);
	lend_close(l);
	free(crowd);
}

static void test_two_callers_of_one_area(void **state)
{
	(void)state;
	crowd_run(true);
}

static void test_two_areas(void **state)
{
	(void)state;
	crowd_run(false);
}

struct half {
	struct lend *l;
	ctg_pfn_t pfn;
	unsigned taken, given_up, failed_early;
};

static void *take_half(void *arg)
{
	struct half *h = arg;

	ctg_sim_set_cpu(h->pfn == at(0) ? 0 : 1);
	for (unsigned i = 0; i < 100; i++) {
		struct ctg_alloc_report report;
		struct ctg_alloc_request request = {.report = &report};
		int ret = ctg_alloc_contig_range(h->l->ctg, h->pfn, BLOCK / 2, &request);

		if (ret == 0) {
			h->taken++;
			if (ctg_free_contig_range(h->l->ctg, h->pfn, BLOCK / 2, NULL) != 0)
				abort();
		} else if (report.obstacle == CTG_OBSTACLE_ISOLATED &&
			   report.ns_total >= 1000000000u) {
			h->given_up++; /* a machine so busy that the other did not get to its end */
		} else {
			h->failed_early++;
		}
	}
	return NULL;
}

/* Two exact ranges that share a pageblock: each waits for the other rather than fail. */
static void test_halves_of_a_pageblock(void **state)
{
	struct lend *l = lend_open(2, 4, false);
	struct half half[2] = {{.l = l, .pfn = at(0)}, {.l = l, .pfn = at(BLOCK / 2)}};
	pthread_t thread[2];

	(void)state;
	lend_area(l, "a", 0, 2, 0);
	assert_int_equal(lend_small(l, 2 * BLOCK), 2 * BLOCK);
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, take_half, &half[i]), 0);
	for (unsigned i = 0; i < 2; i++) {
		pthread_join(thread[i], NULL);
		assert_int_equal(half[i].failed_early, 0);
		assert_int_not_equal(half[i].taken, 0);
		assert_int_equal(half[i].taken + half[i].given_up, 100);
	}
	check_stamps(l);
	check_no_isolation(l);
	lend_close(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_two_callers_of_one_area),
		cmocka_unit_test(test_two_areas),
		cmocka_unit_test(test_halves_of_a_pageblock),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
