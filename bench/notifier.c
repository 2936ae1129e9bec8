/* SPDX-License-Identifier: MIT */
/*
 * One million interval notifiers in one address space: insert them, invalidate single pages, remove
 * them, in random order. One line of JSON a round and step; bench.py makes the table.
 *
 *	notifier ROUNDS
 */
#define _GNU_SOURCE
#include "../ports/sim/sim.h"

#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define NR 1000000u
#define GAP 4u /* pages from the start of one interval to the next's */

static uint64_t nr_calls;

static bool count(struct ctg_mmu_interval_notifier *n, const struct ctg_notify_range *range)
{
	(void)n;
	(void)range;
	nr_calls++;
	return true;
}

static const struct ctg_mmu_interval_ops ops = {.invalidate = count};

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static void say(const char *what, uint64_t began)
{
	printf("{\"what\": \"%s\", \"ns\": %.1f}\n", what, (double)(now_ns() - began) / NR);
}

static void shuffle(uint32_t *order, uint64_t seed)
{
	for (uint32_t i = 0; i < NR; i++) {
		uint32_t j, last = i;

		seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
		j = (uint32_t)((seed >> 33) % (i + 1));
		order[i] = order[j];
		order[j] = last;
	}
}

static void round_once(struct ctg_mm *mm, struct ctg_mmu_interval_notifier *n, uint32_t *order)
{
	uint64_t began;

	shuffle(order, 1);
	began = now_ns();
	for (uint32_t i = 0; i < NR; i++)
		if (ctg_mmu_interval_notifier_insert(
			    &n[order[i]], mm, order[i] * (uint64_t)GAP, GAP, &ops) != 0)
			errx(1, "insert");
	say("insert", began);
	shuffle(order, 2);
	nr_calls = 0;
	began = now_ns();
	for (uint32_t i = 0; i < NR; i++)
		ctg_mm_invalidate(mm, order[i] * (uint64_t)GAP + 1, 1, true);
	say("invalidate", began);
	if (nr_calls != NR)
		errx(1, "%llu calls for %u pages", (unsigned long long)nr_calls, NR);
	shuffle(order, 3);
	began = now_ns();
	for (uint32_t i = 0; i < NR; i++)
		ctg_mmu_interval_notifier_remove(&n[order[i]]);
	say("remove", began);
	/* None is left, but there have been some. */
	began = now_ns();
	for (uint32_t i = 0; i < NR; i++)
		ctg_mm_invalidate(mm, order[i] * (uint64_t)GAP + 1, 1, true);
	say("invalidate_none", began);
}

int main(int argc, char **argv)
{
	struct ctg_mmu_interval_notifier *n = calloc(NR, sizeof(*n));
	uint32_t *order = calloc(NR, sizeof(*order));
	int rounds = argc == 2 ? atoi(argv[1]) : 0;
	struct ctg_sim_config machine = {0};
	struct ctg_mm_config config = {0};
	struct ctg_sim *sim;
	struct ctg_mm *mm;

	if (rounds <= 0)
		errx(2, "usage: notifier ROUNDS");
	if (n == NULL || order == NULL || ctg_sim_create(&machine, &sim) != 0 ||
		ctg_mm_create(ctg_sim_machine(sim), &config, &mm) != 0)
		errx(1, "no memory");
	for (int i = 0; i < rounds; i++)
		round_once(mm, n, order);
	ctg_mm_destroy(mm, false);
	ctg_sim_destroy(sim);
	free(order);
	free(n);
	return 0;
}
