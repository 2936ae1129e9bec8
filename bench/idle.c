/* SPDX-License-Identifier: MIT */
/*
 * Take 300 MiB from an idle area of 1, 4 and 16 GiB of the sim's memory: the time may not depend on
 * the area's size. Also the metadata's size. One line of JSON a round.
 */
#include "sim.h"

#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define TAKE_FRAMES (((uint64_t)300 << 20) >> CTG_PAGE_SHIFT)

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

struct machine {
	struct ctg_sim *sim;
	struct ctg_cma *area;
	uint64_t gib;
};

static void machine_make(struct machine *m, uint64_t gib)
{
	struct ctg_zone_config zone = {.base = 0, .nr = gib << (30 - CTG_PAGE_SHIFT)};
	struct ctg_extent range = {zone.base, zone.nr};
	struct ctg_cma_config config = {
		.name = "idle", .ranges = &range, .nr_ranges = 1, .zeroed = true};

	m->gib = gib;
	if (ctg_sim_create(NULL, &m->sim) != 0 || ctg_sim_add_zone(m->sim, &zone, true, NULL) != 0 ||
		ctg_cma_create(ctg_sim_machine(m->sim), &config, &m->area) != 0)
		errx(1, "no area of %llu GiB", (unsigned long long)gib);
}

int main(int argc, char **argv)
{
	static const uint64_t sizes[] = {1, 4, 16};
	struct machine machines[3];
	int rounds = argc > 1 ? atoi(argv[1]) : 5;

	for (size_t i = 0; i < 3; i++)
		machine_make(&machines[i], sizes[i]);
	for (int round = 0; round < rounds; round++)
		for (size_t i = 0; i < 3; i++) {
			struct ctg_alloc_request request = {.flags = CTG_ALLOC_NO_ZERO};
			ctg_pfn_t pfn;
			uint64_t start = now_ns(), mid;

			if (ctg_cma_alloc(machines[i].area, TAKE_FRAMES, &request, &pfn) != 0)
				errx(1, "taking 300 MiB failed");
			mid = now_ns();
			if (ctg_cma_release(machines[i].area, pfn, TAKE_FRAMES, NULL) != 0)
				errx(1, "release failed");
			printf("{\"what\": \"idle_%llu\", \"ns\": %llu, \"release_ns\": %llu}\n",
				(unsigned long long)sizes[i], (unsigned long long)(mid - start),
				(unsigned long long)(now_ns() - mid));
		}
	printf("{\"what\": \"metadata\", \"frame\": %d, \"zone_per_frame\": %.3f}\n",
		CTG_FRAME_METADATA_BYTES,
		(double)ctg_zone_metadata_bytes((uint64_t)1 << 22) / (double)((uint64_t)1 << 22));
	for (size_t i = 0; i < 3; i++)
		ctg_sim_destroy(machines[i].sim);
	return 0;
}
