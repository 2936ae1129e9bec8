/* SPDX-License-Identifier: MIT */
/*
 * What the tests of fork and copy-on-write share: relatives, what they see, and a machine's state
 * that a failure must leave as it was.
 */
#ifndef TEST_FAMILY_H
#define TEST_FAMILY_H

#include "moving.h"

static inline struct ctg_mm *forked(struct world *w, struct ctg_mm *parent)
{
	struct ctg_mm_config config = {.owner = w};
	struct ctg_mm *child = NULL;

	assert_int_equal(ctg_mm_fork(parent, &config, &child), 0);
	assert_non_null(child);
	return child;
}

/* Each page of mm holds what `stamped` was stamped with. */
static inline void check_stamp_of(struct world *w, struct ctg_mm *mm, const struct ctg_mm *stamped,
	ctg_vpn_t vpn, uint64_t nr)
{
	for (; nr != 0; vpn++, nr--) {
		const unsigned char *page = ctg_sim_frame(w->sim, pfn_of(mm, vpn));

		for (unsigned i = 0; i < 3; i++) {
			uint64_t value;

			memcpy(&value, page + stamp_places[i], sizeof(value));
			assert_int_equal(value, stamp_of(stamped, vpn, i));
		}
	}
}

static inline bool is_cow(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	return (raw_entry(mm, vpn) & CTG_PTE_COW) != 0;
}

static inline unsigned level_of(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned level;

	ctg_pte_read(mm, vpn, &level);
	return level;
}

/* The word that counts a page's mappings, whatever its frame's order. */
static inline uint64_t head_word(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn)
{
	return word_of(w, ctg_frame_head(w->ctg, pfn_of(mm, vpn)));
}

static inline uint64_t counts(uint32_t map, uint32_t pin, uint32_t ref)
{
	return map * CTG_WORD_MAP1 + pin * CTG_WORD_PIN1 + ref * CTG_WORD_REF1;
}

static inline void unhold(const struct world *w, ctg_pfn_t pfn, uint64_t one)
{
	ctg_frame_put(w->ctg, pfn, one, 1);
}

/*
 * Invariants of a family, found out the slow way: each frame's mappings are counted, a frame that
 * is mapped by two spaces is COW in all of them, a pinned frame's entries are not COW.
 * Single-threaded, batches flushed; `refs` frames at most have references.
 */
static inline void check_family(
	struct world *w, struct ctg_mm *const *mms, unsigned nr_mms, ctg_vpn_t vpn, uint64_t nr)
{
	for (unsigned a = 0; a < nr_mms; a++) {
		if (mms[a] == NULL)
			continue;
		for (ctg_vpn_t at = vpn; at < vpn + nr;) {
			unsigned level;
			uint64_t entry = ctg_pte_read(mms[a], at, &level);
			uint64_t pages = ctg_level_pages(level), at_other;

			at_other = at;
			at = (at | (pages - 1)) + 1;
			if ((entry & CTG_PTE_PRESENT) == 0)
				continue;
			assert_int_equal(entry & CTG_PTE_MOVING, 0);
			for (unsigned b = 0; b < nr_mms; b++) {
				unsigned other_level;
				uint64_t other;

				if (b == a || mms[b] == NULL)
					continue;
				other = ctg_pte_read(mms[b], at_other, &other_level);
				if ((other & CTG_PTE_PRESENT) == 0 ||
					ctg_frame_head(w->ctg, ctg_pte_pfn(other)) !=
						ctg_frame_head(w->ctg, ctg_pte_pfn(entry)))
					continue;
				assert_int_not_equal(entry & CTG_PTE_COW, 0);
				assert_int_not_equal(other & CTG_PTE_COW, 0);
			}
		}
	}
}

#endif
