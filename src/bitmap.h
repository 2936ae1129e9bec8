/* SPDX-License-Identifier: MIT */
/*
 * A bitmap that knows its runs of clear bits.
 *
 * Over its leaves (512 bits each) stands a segment tree of (prefix, suffix, best): the lengths of
 * the clear runs at the start, at the end, and of the longest one. So the longest run is known at
 * once, and the next run of a given length is found in O(log n), however full the map is.
 *
 * Beside it, functions on plain arrays of words, for maps that nobody searches.
 *
 * No locks: the owner of a map serialises.
 */
#ifndef CTG_BITMAP_H
#define CTG_BITMAP_H

#include "core.h"

#define CTG_BITMAP_LEAF_WORDS 8u
#define CTG_BITMAP_LEAF_BITS (64u * CTG_BITMAP_LEAF_WORDS)

struct ctg_bitmap_node {
	uint32_t prefix, suffix, best;
};

struct ctg_bitmap {
	uint64_t nr;        /* bits; what the words hold beyond them is set for ever */
	uint64_t nr_set;    /* of the nr bits */
	uint64_t nr_leaves; /* of the tree: a power of two */
	uint64_t *words;
	struct ctg_bitmap_node *tree; /* a heap: 1 is the root, children of i are 2i and 2i + 1 */
};

/* Bytes of memory for nr bits (1 to 2^31); 0 when nr is out of range. */
size_t ctg_bitmap_bytes(uint64_t nr);
/* All clear. memory: ctg_bitmap_bytes(nr), zeroed, aligned to 8. */
void ctg_bitmap_init(struct ctg_bitmap *map, void *memory, uint64_t nr);

/* The length of the longest clear run. */
static inline uint64_t ctg_bitmap_longest(const struct ctg_bitmap *map)
{
	return map->tree[1].best;
}

/*
 * The first clear run at or after `from` (what lies before does not count) that has at least nr
 * bits: its start, and its whole length in *len. map->nr when there is none. nr > 0.
 */
uint64_t ctg_bitmap_next_run(
	const struct ctg_bitmap *map, uint64_t from, uint64_t nr, uint64_t *len);
/* The first set bit at or after `from`; map->nr when there is none. */
uint64_t ctg_bitmap_next_set(const struct ctg_bitmap *map, uint64_t from);
/* Are all of [start, start + nr) clear? False too if the range is not inside the map. */
bool ctg_bitmap_all_clear(const struct ctg_bitmap *map, uint64_t start, uint64_t nr);

/* Set bits that are all clear; clear bits that are all set. O(nr / 64 + log n). */
void ctg_bitmap_set(struct ctg_bitmap *map, uint64_t start, uint64_t nr);
void ctg_bitmap_clear(struct ctg_bitmap *map, uint64_t start, uint64_t nr);

/* ---- plain words ----------------------------------------------------------------------------- */

static inline bool ctg_bits_test(const uint64_t *words, uint64_t bit)
{
	return (words[bit / 64] >> (bit % 64) & 1) != 0;
}
/* The first bit of [from, end) that is `value`; end when there is none. */
uint64_t ctg_bits_next(const uint64_t *words, uint64_t from, uint64_t end, bool value);
/* Make all of [start, start + nr) `value`. */
void ctg_bits_fill(uint64_t *words, uint64_t start, uint64_t nr, bool value);
static inline size_t ctg_bits_bytes(uint64_t nr)
{
	return (size_t)((nr + 63) / 64 * 8);
}

#endif
