/* SPDX-License-Identifier: MIT */
/*
 * A machine with lendable memory for the tests of areas: one zone whose first pageblocks are areas
 * or reserved, the rest ordinary memory, and a borrower whose pages carry their own address.
 */
#ifndef TEST_LEND_H
#define TEST_LEND_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../ports/sim/sim.h"
#include "area.h"
#include "pgtable.h"
#include "zone_check.h"

#define LEND_BASE (8 * BLOCK) /* pfn of the zone */
#define RW (CTG_PROT_READ | CTG_PROT_WRITE)
#define MAX_EVENTS 4096

struct lend {
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
	uint64_t nr;       /* frames of the zone */
	struct ctg_mm *mm; /* the borrower: takes from areas only */
	ctg_vpn_t next_vpn;
	/* The trace, of single-threaded tests; what does not fit is only counted. */
	unsigned nr_events;
	struct ctg_event events[MAX_EVENTS];
};

static inline void lend_trace(void *arg, const struct ctg_event *event)
{
	struct lend *l = arg;
	unsigned n = __atomic_fetch_add(&l->nr_events, 1, __ATOMIC_RELAXED);

	if (n < MAX_EVENTS)
		l->events[n] = *event;
}

/*
 * `reserved` pageblocks for areas, then `ordinary` ones, released. Virtual time: a wait whose
 * event does not come ends at once.
 */
static inline struct lend *lend_open(uint64_t reserved, uint64_t ordinary, bool virtual_time)
{
	struct lend *l = calloc(1, sizeof(*l));
	struct ctg_sim_config config = {
		.nr_cpus = 4, .virtual_time = virtual_time, .trace = lend_trace, .trace_arg = l};
	struct ctg_zone_config zone = {.base = LEND_BASE, .nr = (reserved + ordinary) * BLOCK};
	struct ctg_mm_config borrower = {.gfp = CTG_GFP_NO_ORDINARY};

	assert_non_null(l);
	assert_int_equal(ctg_sim_create(&config, &l->sim), 0);
	assert_int_equal(ctg_sim_add_zone(l->sim, &zone, true, &l->zone), 0);
	l->ctg = ctg_sim_machine(l->sim);
	l->nr = zone.nr;
	if (ordinary != 0)
		assert_int_equal(ctg_zone_release(l->zone, LEND_BASE + reserved * BLOCK,
					 ordinary * BLOCK, false),
			0);
	assert_int_equal(ctg_mm_create(l->ctg, &borrower, &l->mm), 0);
	l->next_vpn = BLOCK;
	return l;
}

static inline void lend_close(struct lend *l)
{
	ctg_mm_destroy(l->mm, false);
	check_zone(l->zone);
	ctg_sim_destroy(l->sim);
	free(l);
}

static inline ctg_pfn_t at(uint64_t offset)
{
	return LEND_BASE + offset;
}

/* An area of one range, in pageblocks of the zone. */
static inline struct ctg_cma *lend_area(
	struct lend *l, const char *name, uint64_t first, uint64_t blocks, unsigned order_per_bit)
{
	struct ctg_extent range = {LEND_BASE + first * BLOCK, blocks * BLOCK};
	struct ctg_cma_config config = {
		.name = name, .ranges = &range, .nr_ranges = 1, .order_per_bit = order_per_bit};
	struct ctg_cma *cma = NULL;

	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	assert_non_null(cma);
	return cma;
}

static inline struct ctg_frame *lend_frame(struct lend *l, ctg_pfn_t pfn)
{
	return ctg_zone_frame(l->zone, pfn);
}

static inline unsigned state_of(struct lend *l, ctg_pfn_t pfn)
{
	return ctg_info_state(ctg_load32_acquire(&lend_frame(l, pfn)->info));
}

static inline uint64_t word_of(struct lend *l, ctg_pfn_t pfn)
{
	return ctg_load64_acquire(&lend_frame(l, pfn)->word);
}

/* What a page of the borrower holds. */
static inline uint64_t stamp_of(ctg_vpn_t vpn)
{
	return (vpn + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

static inline void stamp(struct lend *l, ctg_vpn_t vpn)
{
	uint64_t value = stamp_of(vpn);

	assert_int_equal(
		ctg_sim_write(l->sim, l->mm, (vpn << CTG_PAGE_SHIFT) + 2048, &value, sizeof(value)),
		0);
}

static inline void check_stamp(struct lend *l, ctg_vpn_t vpn)
{
	uint64_t value = 0;

	assert_int_equal(
		ctg_sim_read(l->sim, l->mm, (vpn << CTG_PAGE_SHIFT) + 2048, &value, sizeof(value)),
		0);
	assert_int_equal(value, stamp_of(vpn));
}

/* Where the borrower's page is; CTG_PFN_NONE: nowhere. */
static inline ctg_pfn_t page_at(struct lend *l, ctg_vpn_t vpn)
{
	struct ctg_mapping m;

	assert_int_equal(ctg_mm_lookup(l->mm, vpn, 1, &m), 0);
	return m.pfn;
}

/*
 * Lend up to nr frames to the borrower as single pages (no slot is wholly mapped, so no large
 * frames), stamped. Returns how many.
 */
static inline uint64_t lend_small(struct lend *l, uint64_t nr)
{
	uint64_t done = 0;

	while (done < nr) {
		uint64_t part = BLOCK - 1 < nr - done ? BLOCK - 1 : nr - done, present;
		int ret;

		assert_int_equal(ctg_mmap(l->mm, l->next_vpn, part, RW), 0);
		ret = ctg_mm_populate(l->mm, l->next_vpn, part, &present);
		for (uint64_t i = 0; i < part; i++)
			if (page_at(l, l->next_vpn + i) != CTG_PFN_NONE) {
				stamp(l, l->next_vpn + i);
				done++;
			}
		l->next_vpn += BLOCK;
		if (ret != 0)
			break;
	}
	return done;
}

/* Lend one large frame. Returns its pfn. */
static inline ctg_pfn_t lend_large(struct lend *l)
{
	ctg_vpn_t vpn = l->next_vpn;

	assert_int_equal(ctg_mmap(l->mm, vpn, BLOCK, RW), 0);
	assert_int_equal(ctg_mm_populate(l->mm, vpn, BLOCK, NULL), 0);
	l->next_vpn += BLOCK;
	for (uint64_t i = 0; i < BLOCK; i++)
		stamp(l, vpn + i);
	assert_int_equal(
		ctg_info_order(lend_frame(l, page_at(l, vpn))->info.v), CTG_PAGEBLOCK_ORDER);
	return page_at(l, vpn);
}

/* The borrower gives back what it has at a frame. */
static inline void unlend(struct lend *l, ctg_pfn_t pfn, uint64_t nr)
{
	for (; nr != 0; pfn++, nr--) {
		assert_int_equal(state_of(l, pfn), CTG_FRAME_ANON);
		assert_int_equal(ctg_munmap(l->mm, lend_frame(l, pfn)->index, 1), 0);
	}
	ctg_drain_caches(l->ctg);
}

/* Every page of the borrower still holds its own address. */
static inline void check_stamps(struct lend *l)
{
	for (ctg_vpn_t vpn = BLOCK; vpn < l->next_vpn; vpn++)
		if (page_at(l, vpn) != CTG_PFN_NONE)
			check_stamp(l, vpn);
}

static inline uint64_t nr_lent_pages(struct lend *l)
{
	struct ctg_mm_stat stat;

	ctg_mm_stat(l->mm, &stat);
	return stat.nr_present;
}

/* Every frame of an allocation: taken, held once, and zero if it is to be. */
static inline void check_taken(struct lend *l, ctg_pfn_t pfn, uint64_t nr, bool zero)
{
	static const unsigned char zeros[CTG_PAGE_SIZE];

	for (uint64_t i = 0; i < nr; i++) {
		assert_int_equal(state_of(l, pfn + i), CTG_FRAME_CONTIG);
		assert_int_equal(word_of(l, pfn + i), CTG_WORD_REF1);
		if (zero)
			assert_memory_equal(ctg_sim_frame(l->sim, pfn + i), zeros, CTG_PAGE_SIZE);
	}
}

static inline void check_no_isolation(struct lend *l)
{
	for (uint64_t i = 0; i < l->zone->nr_blocks; i++)
		assert_null(l->zone->blocks[i].isolated_by);
}

/* Lend all that is left, which is nr frames, as single pages. */
static inline void fill(struct lend *l, uint64_t nr)
{
	assert_int_equal(lend_small(l, nr), nr);
	assert_int_equal(lend_small(l, 1), 0);
	ctg_drain_caches(l->ctg);
}

static inline void pin(struct lend *l, ctg_pfn_t pfn)
{
	ctg_add64_acq_rel(&lend_frame(l, pfn)->word, CTG_WORD_PIN1);
}

static inline void unpin(struct lend *l, ctg_pfn_t pfn)
{
	ctg_frame_put(l->ctg, pfn, CTG_WORD_PIN1, 1);
}

static inline ctg_pfn_t alloc_ok(
	struct ctg_cma *cma, uint64_t nr, const struct ctg_alloc_request *request)
{
	ctg_pfn_t pfn = CTG_PFN_NONE;

	assert_int_equal(ctg_cma_alloc(cma, nr, request, &pfn), 0);
	assert_int_not_equal(pfn, CTG_PFN_NONE);
	return pfn;
}

static inline void release_ok(struct ctg_cma *cma, ctg_pfn_t pfn, uint64_t nr)
{
	uint64_t held = UINT64_MAX;

	assert_int_equal(ctg_cma_release(cma, pfn, nr, &held), 0);
	assert_int_equal(held, 0);
}

static inline struct ctg_cma_stat stat_of(struct ctg_cma *cma)
{
	struct ctg_cma_stat stat;

	ctg_cma_stat(cma, &stat);
	assert_int_equal(stat.nr, stat.nr_allocated + stat.nr_free + stat.nr_lent);
	return stat;
}

/*
 * Everything that a failed call must leave as it was. Where frames may have moved meanwhile
 * (which their owners cannot see), the frames themselves are left out.
 */
struct snapshot {
	struct ctg_zone_stat zone;
	uint64_t nr_free; /* in lists and caches */
	uint64_t *words;  /* of the frames, info and word; NULL: not compared */
	struct ctg_block *blocks;
	ctg_pfn_t *pages; /* of the borrower, from vpn 0 on */
	unsigned *rights;
	ctg_vpn_t nr_pages;
	size_t nr_areas;
	struct ctg_cma_stat area[4];
	uint64_t *bits[4]; /* of the first range: taken, owned, last */
	uint64_t meta_bytes;
};

static inline uint64_t *copy_bits(const struct ctg_cma *cma)
{
	const struct ctg_area_range *range = &cma->ranges[0];
	size_t bytes = ctg_bits_bytes(range->taken.nr);
	unsigned char *copy = malloc(3 * bytes);

	assert_non_null(copy);
	memcpy(copy, range->taken.words, bytes);
	memcpy(copy + bytes, range->owned, bytes);
	memcpy(copy + 2 * bytes, range->last, bytes);
	return (uint64_t *)(void *)copy;
}

static inline struct snapshot *snapshot_take(struct lend *l)
{
	struct snapshot *s = calloc(1, sizeof(*s));

	assert_non_null(s);
	ctg_zone_stat(l->zone, &s->zone);
	s->nr_free = s->zone.nr_free + s->zone.nr_isolated_free + s->zone.nr_pcp;
	s->words = malloc(2 * l->nr * sizeof(*s->words));
	s->blocks = malloc(l->zone->nr_blocks * sizeof(*s->blocks));
	s->nr_pages = l->next_vpn;
	s->pages = malloc(s->nr_pages * sizeof(*s->pages));
	s->rights = malloc(s->nr_pages * sizeof(*s->rights));
	assert_true(s->words != NULL && s->blocks != NULL && s->pages != NULL && s->rights != NULL);
	for (uint64_t i = 0; i < l->nr; i++) {
		/* WAITERS stays until a holder leaves: it says that somebody may sleep. */
		s->words[2 * i] = l->zone->frames[i].word.v & ~CTG_WORD_WAITERS;
		s->words[2 * i + 1] = l->zone->frames[i].info.v;
	}
	memcpy(s->blocks, l->zone->blocks, l->zone->nr_blocks * sizeof(*s->blocks));
	for (ctg_vpn_t vpn = 0; vpn < s->nr_pages; vpn++) {
		struct ctg_mapping m;

		assert_int_equal(ctg_mm_lookup(l->mm, vpn, 1, &m), 0);
		s->pages[vpn] = m.pfn;
		s->rights[vpn] = m.prot;
		assert_false(m.moving);
	}
	s->nr_areas = l->ctg->nr_areas;
	assert_in_range(s->nr_areas, 0, 4);
	for (size_t i = 0; i < s->nr_areas; i++) {
		ctg_cma_stat(l->ctg->areas[i], &s->area[i]);
		s->bits[i] = copy_bits(l->ctg->areas[i]);
	}
	s->meta_bytes = ctg_sim_meta_bytes(l->sim);
	return s;
}

static inline void snapshot_free(struct snapshot *s)
{
	free(s->words);
	free(s->blocks);
	free(s->pages);
	free(s->rights);
	for (size_t i = 0; i < s->nr_areas; i++)
		free(s->bits[i]);
	free(s);
}

/* Compare with now, and free. frames: nothing has moved, so frames and blocks are the same too. */
static inline void snapshot_check(struct lend *l, struct snapshot *s, bool frames)
{
	struct snapshot *now = snapshot_take(l);

	check_zone(l->zone);
	assert_int_equal(now->nr_free, s->nr_free);
	assert_int_equal(now->zone.nr_isolated_free, s->zone.nr_isolated_free);
	assert_int_equal(now->nr_pages, s->nr_pages);
	assert_memory_equal(now->rights, s->rights, s->nr_pages * sizeof(*s->rights));
	assert_int_equal(now->nr_areas, s->nr_areas);
	assert_int_equal(now->meta_bytes, s->meta_bytes);
	for (size_t i = 0; i < s->nr_areas; i++) {
		size_t bytes = ctg_bits_bytes(l->ctg->areas[i]->ranges[0].taken.nr);

		assert_memory_equal(now->bits[i], s->bits[i], 3 * bytes);
		assert_int_equal(now->area[i].nr_allocated, s->area[i].nr_allocated);
		assert_int_equal(now->area[i].longest_unallocated, s->area[i].longest_unallocated);
	}
	for (ctg_vpn_t vpn = 0; vpn < s->nr_pages; vpn++)
		assert_int_equal(now->pages[vpn] == CTG_PFN_NONE, s->pages[vpn] == CTG_PFN_NONE);
	check_no_isolation(l);
	if (frames) {
		assert_memory_equal(&now->zone, &s->zone, sizeof(s->zone));
		assert_memory_equal(now->words, s->words, 2 * l->nr * sizeof(*s->words));
		assert_memory_equal(
			now->blocks, s->blocks, l->zone->nr_blocks * sizeof(*s->blocks));
		assert_memory_equal(now->pages, s->pages, s->nr_pages * sizeof(*s->pages));
	}
	check_stamps(l);
	snapshot_free(now);
	snapshot_free(s);
}

/* A release that must change nothing. */
static inline void refuse(struct lend *l, struct ctg_cma *cma, ctg_pfn_t pfn, uint64_t nr)
{
	struct snapshot *before = snapshot_take(l);
	unsigned events = l->nr_events;
	uint64_t held = 77;

	assert_int_equal(ctg_cma_release(cma, pfn, nr, &held), -CTG_EINVAL);
	assert_int_equal(held, 77);
	assert_int_equal(l->nr_events, events);
	snapshot_check(l, before, true);
}

#endif
