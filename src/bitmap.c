/* SPDX-License-Identifier: MIT */
#include "bitmap.h"

#define LEAF_BITS CTG_BITMAP_LEAF_BITS
#define LEAF_WORDS CTG_BITMAP_LEAF_WORDS
#define MAX_BITS ((uint64_t)1 << 31) /* a run's length fits a node */

/* ---- plain words ----------------------------------------------------------------------------- */

uint64_t ctg_bits_next(const uint64_t *words, uint64_t from, uint64_t end, bool value)
{
	uint64_t flip = value ? 0 : ~(uint64_t)0;

	while (from < end) {
		uint64_t word = (words[from / 64] ^ flip) >> (from % 64);

		if (word != 0) {
			from += (uint64_t)__builtin_ctzll(word);
			return from < end ? from : end;
		}
		from = (from / 64 + 1) * 64;
	}
	return end;
}

void ctg_bits_fill(uint64_t *words, uint64_t start, uint64_t nr, bool value)
{
	while (nr != 0) {
		uint64_t shift = start % 64, here = 64 - shift;
		uint64_t mask;

		if (here > nr)
			here = nr;
		mask = (here == 64 ? ~(uint64_t)0 : ((uint64_t)1 << here) - 1) << shift;
		if (value)
			words[start / 64] |= mask;
		else
			words[start / 64] &= ~mask;
		start += here;
		nr -= here;
	}
}

/* ---- the tree -------------------------------------------------------------------------------- */

static uint64_t leaves_for(uint64_t nr)
{
	uint64_t leaves = 1;

	while (leaves * LEAF_BITS < nr)
		leaves *= 2;
	return leaves;
}

/* Words exist for the leaves that hold bits, not for those that fill the tree up. */
static uint64_t words_for(uint64_t nr)
{
	return (nr + LEAF_BITS - 1) / LEAF_BITS * LEAF_WORDS;
}

size_t ctg_bitmap_bytes(uint64_t nr)
{
	if (nr == 0 || nr > MAX_BITS)
		return 0;
	return (size_t)(words_for(nr) * sizeof(uint64_t) +
			2 * leaves_for(nr) * sizeof(struct ctg_bitmap_node));
}

static struct ctg_bitmap_node leaf_node(const struct ctg_bitmap *map, uint64_t leaf)
{
	const uint64_t *words = &map->words[leaf * LEAF_WORDS];
	struct ctg_bitmap_node node = {0, 0, 0};
	uint64_t at = 0;

	while (at < LEAF_BITS) {
		uint64_t start = ctg_bits_next(words, at, LEAF_BITS, false);
		uint64_t end = ctg_bits_next(words, start, LEAF_BITS, true);
		uint32_t len = (uint32_t)(end - start);

		if (start == 0)
			node.prefix = len;
		if (end == LEAF_BITS)
			node.suffix = len;
		if (len > node.best)
			node.best = len;
		at = end;
	}
	return node;
}

/* half: bits that each of the two covers. */
static struct ctg_bitmap_node join(
	const struct ctg_bitmap_node *a, const struct ctg_bitmap_node *b, uint64_t half)
{
	struct ctg_bitmap_node node;

	node.prefix = a->prefix == half ? a->prefix + b->prefix : a->prefix;
	node.suffix = b->suffix == half ? b->suffix + a->suffix : b->suffix;
	node.best = a->suffix + b->prefix;
	if (a->best > node.best)
		node.best = a->best;
	if (b->best > node.best)
		node.best = b->best;
	return node;
}

/* The leaves of [start, start + nr) have changed: theirs and their ancestors' summaries. */
static void update(struct ctg_bitmap *map, uint64_t start, uint64_t nr)
{
	uint64_t first = start / LEAF_BITS + map->nr_leaves;
	uint64_t last = (start + nr - 1) / LEAF_BITS + map->nr_leaves;

	for (uint64_t i = first; i <= last; i++)
		map->tree[i] = leaf_node(map, i - map->nr_leaves);
	for (uint64_t half = LEAF_BITS; first > 1; half *= 2) {
		first /= 2;
		last /= 2;
		for (uint64_t i = first; i <= last; i++)
			map->tree[i] = join(&map->tree[2 * i], &map->tree[2 * i + 1], half);
	}
}

void ctg_bitmap_init(struct ctg_bitmap *map, void *memory, uint64_t nr)
{
	uint64_t nr_words = words_for(nr);

	CTG_ASSERT(nr != 0 && nr <= MAX_BITS);
	map->nr = nr;
	map->nr_set = 0;
	map->nr_leaves = leaves_for(nr);
	map->words = memory;
	map->tree = (struct ctg_bitmap_node *)(map->words + nr_words);
	ctg_bits_fill(map->words, nr, nr_words * 64 - nr, true);
	update(map, 0, nr);
}

void ctg_bitmap_set(struct ctg_bitmap *map, uint64_t start, uint64_t nr)
{
	CTG_ASSERT(nr != 0 && ctg_bitmap_all_clear(map, start, nr));
	ctg_bits_fill(map->words, start, nr, true);
	map->nr_set += nr;
	update(map, start, nr);
}

void ctg_bitmap_clear(struct ctg_bitmap *map, uint64_t start, uint64_t nr)
{
	CTG_ASSERT(nr != 0 && nr <= map->nr && start <= map->nr - nr);
	CTG_ASSERT(ctg_bits_next(map->words, start, start + nr, false) == start + nr);
	ctg_bits_fill(map->words, start, nr, false);
	map->nr_set -= nr;
	update(map, start, nr);
}

/* ---- searches -------------------------------------------------------------------------------- */

/*
 * Both searches finish the leaf they start in bit by bit, then step over whole subtrees from left
 * to right, each as large as its position allows, and descend into the one that holds the answer.
 */

uint64_t ctg_bitmap_next_set(const struct ctg_bitmap *map, uint64_t from)
{
	uint64_t at, node, len = LEAF_BITS;

	if (from >= map->nr)
		return map->nr;
	at = (from / LEAF_BITS + 1) * LEAF_BITS;
	from = ctg_bits_next(map->words, from, at, true);
	if (from < at)
		return from < map->nr ? from : map->nr;
	if (at >= map->nr)
		return map->nr;
	node = at / LEAF_BITS + map->nr_leaves;
	while (map->tree[node].prefix == len) {
		at += len;
		if (at >= map->nr)
			return map->nr;
		node++;
		for (; (node & 1) == 0; node /= 2)
			len *= 2;
	}
	/* The answer is where the clear prefix ends: no need to descend. */
	at += map->tree[node].prefix;
	return at < map->nr ? at : map->nr;
}

bool ctg_bitmap_all_clear(const struct ctg_bitmap *map, uint64_t start, uint64_t nr)
{
	if (nr > map->nr || start > map->nr - nr)
		return false;
	return ctg_bitmap_next_set(map, start) >= start + nr;
}

/*
 * Look through [at, end), inside one leaf, with a clear run of *carry bits ending at `at`. True:
 * the run (from at - *carry, wherever at was moved to) has reached nr. False: *carry is what ends
 * at `end`.
 */
static bool scan_leaf(
	const struct ctg_bitmap *map, uint64_t *at, uint64_t end, uint64_t nr, uint64_t *carry)
{
	while (*at < end) {
		uint64_t set = ctg_bits_next(map->words, *at, end, true);

		*carry += set - *at;
		*at = set;
		if (*carry >= nr)
			return true;
		if (set == end)
			return false;
		*carry = 0;
		*at = ctg_bits_next(map->words, set, end, false);
	}
	return false;
}

/*
 * The first run of nr that ends beyond `at`, the start of a leaf, given that a run of carry bits
 * ends at it. Returns its start, or map->nr.
 */
static uint64_t walk_runs(const struct ctg_bitmap *map, uint64_t at, uint64_t nr, uint64_t carry)
{
	uint64_t node = at / LEAF_BITS + map->nr_leaves, len = LEAF_BITS;

	for (; (node & 1) == 0; node /= 2)
		len *= 2;
	for (;;) {
		const struct ctg_bitmap_node *n = &map->tree[node];

		if (carry + n->prefix >= nr)
			return at - carry;
		if (n->best >= nr) {
			uint64_t end = at + LEAF_BITS;

			if (node < map->nr_leaves) {
				node *= 2;
				len /= 2;
				continue;
			}
			carry = 0;
			if (scan_leaf(map, &at, end, nr, &carry))
				return at - carry;
			CTG_ASSERT(false);
		}
		carry = n->prefix == len ? carry + len : n->suffix;
		at += len;
		if (at >= map->nr)
			return map->nr;
		/* The next subtree to the right, as large as it may be. */
		node++;
		for (; (node & 1) == 0; node /= 2)
			len *= 2;
	}
}

uint64_t ctg_bitmap_next_run(
	const struct ctg_bitmap *map, uint64_t from, uint64_t nr, uint64_t *len)
{
	uint64_t carry = 0, at = from, start;

	CTG_ASSERT(nr != 0);
	if (from >= map->nr || nr > map->nr - from)
		return map->nr;
	if (scan_leaf(map, &at, (from / LEAF_BITS + 1) * LEAF_BITS, nr, &carry))
		start = at - carry;
	else if (at >= map->nr)
		return map->nr;
	else
		start = walk_runs(map, at, nr, carry);
	if (start < map->nr)
		*len = ctg_bitmap_next_set(map, start) - start;
	return start;
}
