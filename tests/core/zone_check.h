/* SPDX-License-Identifier: MIT */
/*
 * What must be true of a zone at rest, found out the slow way: by a walk over all its frames.
 * Single-threaded.
 */
#ifndef TEST_ZONE_CHECK_H
#define TEST_ZONE_CHECK_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../ports/sim/sim.h"
#include "buddy.h"

#define BLOCK CTG_PAGEBLOCK_FRAMES

static inline struct ctg_frame *frame_at(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	assert_true(pfn - zone->base < zone->nr);
	return &zone->frames[pfn - zone->base];
}

static inline uint32_t info_at(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	return frame_at(zone, pfn)->info.v;
}

static inline uint64_t word_at(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	return frame_at(zone, pfn)->word.v;
}

struct zone_sums {
	uint64_t free[CTG_NR_ORDERS][CTG_NR_MIGRATETYPES]; /* blocks */
	uint64_t nr_free[CTG_NR_MIGRATETYPES];             /* frames */
	uint64_t nr_pcp;
};

/* A free block: in one type, and not beside a buddy that it should have merged with. */
static inline void check_free_block(const struct ctg_zone *zone, ctg_pfn_t head)
{
	uint32_t info = info_at(zone, head);
	unsigned order = ctg_info_order(info);
	uint64_t nr = (uint64_t)1 << order;
	ctg_pfn_t buddy = head ^ nr;
	unsigned limit =
		ctg_info_mt(info) == CTG_MIGRATE_ISOLATE ? CTG_PAGEBLOCK_ORDER : CTG_MAX_ORDER;

	assert_true(order <= limit);
	for (ctg_pfn_t p = head; p < head + nr; p += BLOCK) {
		const struct ctg_block *block = &zone->blocks[(p - zone->base) / BLOCK];

		assert_true(block->released);
		assert_int_equal(ctg_block_type(block), ctg_info_mt(info));
	}
	for (ctg_pfn_t p = head; p < head + nr; p++)
		assert_int_equal(word_at(zone, p), 0);
	if (order < limit && buddy - zone->base < zone->nr &&
		zone->blocks[(buddy - zone->base) / BLOCK].released)
		assert_false((info_at(zone, buddy) & 0xffffff) == (info & 0xffffff));
}

/* One list: its links, and that everything on it is what it says. */
static inline void check_list(const struct ctg_zone *zone, const struct ctg_free_list *list,
	unsigned state, unsigned order, unsigned mt)
{
	uint64_t nr = 0;
	uint32_t prev = 0;

	for (uint32_t i = list->first; i != 0; i = zone->frames[i - 1].link.next) {
		uint32_t info = zone->frames[i - 1].info.v;

		assert_int_equal(ctg_info_state(info), state);
		assert_int_equal(ctg_info_order(info), order);
		assert_int_equal(ctg_info_mt(info), mt);
		if (state == CTG_FRAME_FREE)
			assert_int_equal(zone->frames[i - 1].link.prev, prev);
		prev = i;
		assert_true(++nr <= zone->nr);
	}
	assert_int_equal(nr, list->nr);
}

/* Every head of the zone, and what lies between them. */
static inline void sum_frames(const struct ctg_zone *zone, struct zone_sums *sums)
{
	ctg_pfn_t end = zone->base + zone->nr;
	uint64_t step;

	for (ctg_pfn_t p = zone->base; p < end; p += step) {
		uint32_t info;
		unsigned order;

		step = BLOCK;
		if (!zone->blocks[(p - zone->base) / BLOCK].released)
			continue;
		info = info_at(zone, p);
		order = ctg_info_order(info);
		step = (uint64_t)1 << order;
		assert_int_not_equal(ctg_info_state(info), CTG_FRAME_TAIL);
		assert_int_equal(p % step, 0);
		assert_true(step <= end - p);
		for (ctg_pfn_t q = p + 1; q < p + step; q++)
			assert_int_equal(ctg_info_state(info_at(zone, q)), CTG_FRAME_TAIL);
		if (ctg_info_state(info) == CTG_FRAME_FREE) {
			check_free_block(zone, p);
			sums->free[order][ctg_info_mt(info)]++;
			sums->nr_free[ctg_info_mt(info)] += step;
		} else if (ctg_info_state(info) == CTG_FRAME_PCP) {
			assert_int_equal(order, 0);
			assert_int_equal(word_at(zone, p), 0);
			sums->nr_pcp++;
		} else {
			assert_int_not_equal(word_at(zone, p) & ~CTG_WORD_FLAGS, 0);
		}
	}
}

static inline bool frame_is_free(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	for (unsigned order = 0; order <= CTG_MAX_ORDER; order++) {
		ctg_pfn_t head = pfn & ~(((uint64_t)1 << order) - 1);
		uint32_t info;

		if (head - zone->base >= zone->nr ||
			!zone->blocks[(head - zone->base) / BLOCK].released)
			return false;
		info = info_at(zone, head);
		if (ctg_info_state(info) == CTG_FRAME_FREE && ctg_info_order(info) >= order)
			return true;
	}
	return false;
}

/* Free and not isolated, for each frame: what the tree of free runs is about. */
static inline void free_map(const struct ctg_zone *zone, bool *map)
{
	uint64_t step;

	memset(map, 0, zone->nr * sizeof(*map));
	for (uint64_t i = 0; i < zone->nr; i += step) {
		const struct ctg_block *block = &zone->blocks[i / BLOCK];
		uint32_t info;
		bool is_free;

		step = BLOCK;
		if (!block->released)
			continue;
		info = zone->frames[i].info.v;
		is_free = ctg_info_state(info) == CTG_FRAME_FREE;

		step = is_free ? (uint64_t)1 << ctg_info_order(info) : 1;
		for (uint64_t k = 0; k < step; k++)
			map[i + k] = is_free && block->isolated_by == NULL;
	}
}

/* The first longest run of `true` in map[from..to). */
static inline uint64_t slow_longest(const bool *map, uint64_t from, uint64_t to, uint64_t *at)
{
	uint64_t best = 0, run = 0;

	for (uint64_t i = from; i < to; i++) {
		run = map[i] ? run + 1 : 0;
		if (run > best) {
			best = run;
			*at = i + 1 - run;
		}
	}
	return best;
}

/* The first aligned run of nr `true` in map[from..to), as a pfn. */
static inline ctg_pfn_t slow_find(const struct ctg_zone *zone, const bool *map, uint64_t from,
	uint64_t to, uint64_t nr, uint64_t align)
{
	for (uint64_t i = from; i + nr <= to; i++) {
		uint64_t run;

		if ((zone->base + i) % align != 0)
			continue;
		for (run = 0; run < nr && map[i + run]; run++)
			;
		if (run == nr)
			return zone->base + i;
	}
	return CTG_PFN_NONE;
}

static inline void check_longest(struct ctg_zone *zone, const bool *map, uint64_t from, uint64_t to)
{
	uint64_t at = 0;
	uint64_t best = slow_longest(map, from, to, &at);
	struct ctg_extent got = ctg_runs_longest(zone, zone->base + from, to - from);

	assert_int_equal(got.nr, best);
	assert_int_equal(got.pfn, best != 0 ? zone->base + at : CTG_PFN_NONE);
}

/* All of it. */
static inline void check_zone(struct ctg_zone *zone)
{
	struct zone_sums sums = {0};
	bool *map = calloc(zone->nr, sizeof(*map));
	uint64_t nr_pcp = 0;

	assert_non_null(map);
	sum_frames(zone, &sums);
	for (unsigned mt = 0; mt < CTG_NR_MIGRATETYPES; mt++) {
		assert_int_equal(sums.nr_free[mt], zone->nr_free[mt]);
		for (unsigned order = 0; order < CTG_NR_ORDERS; order++) {
			assert_int_equal(sums.free[order][mt], zone->free[order][mt].nr);
			check_list(zone, &zone->free[order][mt], CTG_FRAME_FREE, order, mt);
		}
	}
	for (unsigned cpu = 0; cpu < CTG_MAX_CPUS; cpu++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++) {
			check_list(zone, &zone->pcp[cpu].list[mt], CTG_FRAME_PCP, 0, mt);
			nr_pcp += zone->pcp[cpu].list[mt].nr;
		}
	assert_int_equal(sums.nr_pcp, nr_pcp);
	for (uint64_t b = 0; b < zone->nr_blocks; b++) {
		const struct ctg_block *block = &zone->blocks[b];
		unsigned nr_free = 0, nr_contig = 0;

		for (uint64_t i = b * BLOCK; block->released && i < (b + 1) * BLOCK; i++) {
			nr_free += frame_is_free(zone, zone->base + i);
			nr_contig += ctg_info_state(zone->frames[i].info.v) == CTG_FRAME_CONTIG;
		}
		assert_int_equal(block->nr_free, nr_free);
		assert_int_equal(block->nr_contig, nr_contig);
	}
	free_map(zone, map);
	check_longest(zone, map, 0, zone->nr);
	free(map);
}

#endif
