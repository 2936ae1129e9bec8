/* SPDX-License-Identifier: MIT */
/*
 * What the tests of migration share: pages that carry their address, frames emptied as an
 * allocation would, and what must be as before when that fails.
 */
#ifndef TEST_MOVING_H
#define TEST_MOVING_H

#include "space.h"
#include "zone_check.h"

#include "move.h"

#define EVACUATE_GFP (CTG_GFP_MOVABLE | CTG_GFP_SPILL)

/* ---- contents ---------------------------------------------------------------------------- */

/* What a page holds, at three places of it: depends on its space and its address. */
static inline uint64_t stamp_of(const struct ctg_mm *mm, ctg_vpn_t vpn, unsigned place)
{
	return ((uint64_t)(uintptr_t)mm + vpn * 4 + place) * UINT64_C(0x9e3779b97f4a7c15);
}

static const unsigned stamp_places[3] = {0, 2040, 4088};

static inline void stamp(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	for (; nr != 0; vpn++, nr--)
		for (unsigned i = 0; i < 3; i++) {
			uint64_t value = stamp_of(mm, vpn, i);

			assert_int_equal(
				ctg_sim_write(w->sim, mm, (vpn << CTG_PAGE_SHIFT) + stamp_places[i],
					&value, sizeof(value)),
				0);
		}
}

/* Through the table, whatever the rights are, and without marking anything accessed. */
static inline void check_stamp(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	for (; nr != 0; vpn++, nr--) {
		struct ctg_mapping m = lookup(mm, vpn, 1);
		const unsigned char *page;

		assert_true(m.pfn != CTG_PFN_NONE);
		assert_false(m.moving);
		page = ctg_sim_frame(w->sim, m.pfn);
		for (unsigned i = 0; i < 3; i++) {
			uint64_t value;

			memcpy(&value, page + stamp_places[i], sizeof(value));
			assert_int_equal(value, stamp_of(mm, vpn, i));
		}
	}
}

/* ---- mapping ----------------------------------------------------------------------------- */

/* Small frames for [vpn, vpn + nr), stamped: no slot is populated as a whole in one go. */
static inline void map_small(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	assert_int_equal(ctg_mmap(mm, vpn, nr, RW), 0);
	for (uint64_t done = 0; done < nr;) {
		uint64_t part = nr - done < 256 ? nr - done : 256;

		part = part < 256 ? part : 256 - (vpn + done) % 256;
		assert_int_equal(ctg_mm_populate(mm, vpn + done, part, NULL), 0);
		done += part;
	}
	stamp(w, mm, vpn, nr);
}

static inline ctg_pfn_t map_large(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned level;

	assert_int_equal(ctg_mmap(mm, vpn, PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, vpn, PAGES, NULL), 0);
	stamp(w, mm, vpn, PAGES);
	ctg_pte_read(mm, vpn, &level);
	assert_int_equal(level, 1);
	return lookup(mm, vpn, 1).pfn;
}

static inline ctg_pfn_t pfn_of(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	return lookup(mm, vpn, 1).pfn;
}

static inline uint64_t raw_entry(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned level;

	return ctg_pte_read(mm, vpn, &level);
}

static inline uint32_t info_of(const struct world *w, ctg_pfn_t pfn)
{
	return ctg_load32_acquire(&ctg_frame_of(w->ctg, pfn)->info);
}

/* Change a frame's word as a holder would that no code makes yet. */
static inline void hold(const struct world *w, ctg_pfn_t pfn, uint64_t one)
{
	ctg_add64_acq_rel(&ctg_frame_of(w->ctg, pfn)->word, one);
}

static inline bool in_block(ctg_pfn_t pfn, ctg_pfn_t block)
{
	return (pfn & ~(PAGES - 1)) == (block & ~(PAGES - 1));
}

/* ---- a few small pages in one pageblock -------------------------------------------------- */

struct scene {
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t block; /* the pageblock that all pages lie in */
};

#define SCENE_PAGES 30u

static inline void scene_open(struct scene *s)
{
	world_open(&s->w, 4);
	s->mm = space_new(&s->w, 0);
	map_small(&s->w, s->mm, BASE, SCENE_PAGES);
	s->block = pfn_of(s->mm, BASE) & ~(PAGES - 1);
	for (unsigned i = 0; i < SCENE_PAGES; i++)
		assert_true(in_block(pfn_of(s->mm, BASE + i), s->block));
}

static inline void scene_close(struct scene *s)
{
	ctg_mm_destroy(s->mm, false);
	world_close(&s->w);
}

/* ---- running out of memory --------------------------------------------------------------- */

struct hoard {
	unsigned nr;
	ctg_pfn_t pfn[8192];
	unsigned order[8192];
};

/* Allocate every free block of at least this order (that ordinary requests may have). */
static inline struct hoard *hoard_orders(struct world *w, unsigned min_order, unsigned gfp)
{
	struct hoard *h = calloc(1, sizeof(*h));

	assert_non_null(h);
	while (h->nr < 8192 && ctg_alloc_run(w->ctg, CTG_MAX_ORDER, min_order, gfp, &h->pfn[h->nr],
				       &h->order[h->nr]) == 0)
		h->nr++;
	return h;
}

static inline void hoard_free_all(struct world *w, struct hoard *h)
{
	for (unsigned i = 0; i < h->nr; i++)
		assert_int_equal(ctg_free_frames(w->ctg, h->pfn[i]), 0);
	free(h);
}

/*
 * Leave at most `room` frames free, none beside another so that they are of order 0, and none in
 * the pageblock of `but`.
 */
static inline struct hoard *fragment(struct world *w, unsigned room, ctg_pfn_t but)
{
	struct hoard *blocks = hoard_orders(w, 0, CTG_GFP_MOVABLE);
	struct hoard *h = calloc(1, sizeof(*h));

	assert_non_null(h);
	for (unsigned i = 0; i < blocks->nr; i++) {
		ctg_pfn_t pfn = blocks->pfn[i];

		ctg_split_used(w->ctg, pfn, blocks->order[i]);
		for (ctg_pfn_t p = pfn; p < pfn + ((ctg_pfn_t)1 << blocks->order[i]); p++) {
			assert_in_range(h->nr, 0, 8191);
			if (p % 2 == 0 && room != 0 && !in_block(p, but)) {
				assert_int_equal(ctg_free_frames(w->ctg, p), 0);
				room--;
			} else {
				h->pfn[h->nr++] = p;
			}
		}
	}
	free(blocks);
	return h;
}

/* ---- emptying ---------------------------------------------------------------------------- */

/* Isolate the pageblocks of [pfn, pfn + nr), drain, migrate, undo the isolation. */
static inline int evacuate(struct world *w, ctg_pfn_t pfn, uint64_t nr, unsigned rounds,
	const struct ctg_alloc_request *request, struct ctg_migrate_stats *stats)
{
	struct ctg_zone *zone = ctg_zone_of(w->ctg, pfn);
	ctg_pfn_t first = pfn & ~(PAGES - 1);
	int ret;

	for (ctg_pfn_t p = first; p < pfn + nr; p += PAGES)
		assert_int_equal(ctg_block_isolate(zone, p, w), 0);
	ctg_pcp_drain(zone);
	ret = ctg_migrate_range(zone, pfn, nr, EVACUATE_GFP, rounds, request, stats);
	if (ret == 0)
		for (ctg_pfn_t p = pfn; p < pfn + nr; p++)
			assert_true(frame_is_free(zone, p));
	for (ctg_pfn_t p = first; p < pfn + nr; p += PAGES)
		ctg_block_unisolate(zone, p, w);
	for (unsigned i = 0; i < w->ctg->nr_zones; i++) {
		ctg_drain_caches(w->ctg);
		check_zone(w->ctg->zones[i]);
	}
	return ret;
}

/* All of the pageblock of pfn; must succeed. Returns the frames that moved. */
static inline uint64_t evacuate_block(struct world *w, ctg_pfn_t pfn)
{
	struct ctg_migrate_stats stats;

	assert_int_equal(evacuate(w, pfn & ~(PAGES - 1), PAGES, 2, NULL, &stats), 0);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_NONE);
	assert_int_equal(stats.obstacle_pfn, CTG_PFN_NONE);
	return stats.frames_moved;
}

/* ---- what a failure must leave ----------------------------------------------------------- */

/* Entries of a range of one space, frames in use, and what is free. */
struct before {
	uint64_t nr_free, meta_bytes, nr_tables;
	ctg_vpn_t vpn;
	uint64_t nr;
	uint64_t *entry;
	uint64_t *words; /* of the first zone's frames in use: info, word */
};

static inline uint64_t *used_words(const struct ctg_zone *zone)
{
	uint64_t *words = calloc(2 * zone->nr, sizeof(*words));

	assert_non_null(words);
	for (uint64_t i = 0; i < zone->nr; i++) {
		unsigned state = ctg_info_state(zone->frames[i].info.v);

		if (state != CTG_FRAME_USED && state != CTG_FRAME_ANON && state != CTG_FRAME_CONTIG)
			continue;
		words[2 * i] = zone->frames[i].info.v;
		/* A wait that timed out leaves its flag. */
		words[2 * i + 1] = zone->frames[i].word.v & ~CTG_WORD_WAITERS;
	}
	return words;
}

static inline struct before *before_take(
	struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	struct before *b = calloc(1, sizeof(*b));

	assert_non_null(b);
	b->nr_free = world_free(w);
	b->meta_bytes = ctg_sim_meta_bytes(w->sim);
	b->nr_tables = ctg_load64_relaxed(&mm->nr_tables);
	b->vpn = vpn;
	b->nr = nr;
	b->entry = calloc(nr, sizeof(*b->entry));
	assert_non_null(b->entry);
	for (uint64_t i = 0; i < nr; i++)
		b->entry[i] = raw_entry(mm, vpn + i);
	b->words = used_words(w->zone);
	return b;
}

static inline void before_free(struct before *b)
{
	free(b->words);
	free(b->entry);
	free(b);
}

/* Nothing has moved. Tables that were made for nothing may be kept: spare_tables of them. */
static inline void before_check(
	struct world *w, struct ctg_mm *mm, struct before *b, unsigned spare_tables)
{
	uint64_t *words = used_words(w->zone);
	uint64_t more = ctg_sim_meta_bytes(w->sim) - b->meta_bytes;

	assert_int_equal(world_free(w), b->nr_free);
	assert_true(more <= spare_tables * sizeof(struct ctg_table));
	assert_int_equal(ctg_load64_relaxed(&mm->nr_tables), b->nr_tables);
	for (uint64_t i = 0; i < b->nr; i++)
		assert_int_equal(raw_entry(mm, b->vpn + i), b->entry[i]);
	assert_memory_equal(words, b->words, 2 * w->zone->nr * sizeof(*words));
	for (uint64_t i = 0; i < b->nr; i++)
		if ((b->entry[i] & CTG_PTE_PRESENT) != 0)
			check_stamp(w, mm, b->vpn + i, 1);
	free(words);
	before_free(b);
}

#endif
