/* SPDX-License-Identifier: MIT */
/*
 * The tree of free runs: which runs of free, not isolated frames a zone has, exactly, without
 * looking at its frames.
 *
 * A node covers 2^level pageblocks (the last one of a level perhaps fewer) and knows the free run
 * at its beginning, the one at its end, and the longest, all in frames. A change of free state
 * marks the leaf and its ancestors dirty, nothing else; a query first brings up to date what is
 * dirty. A leaf is made from the heads in its pageblock, and without looking at them when none
 * or all of it is free: so a large free block costs nothing.
 */
#include "buddy.h"

#define LEAF_FRAMES ((uint32_t)CTG_PAGEBLOCK_FRAMES)

uint64_t ctg_runs_nodes(uint64_t nr_blocks)
{
	uint64_t nodes = nr_blocks;

	while (nr_blocks > 1) {
		nr_blocks = (nr_blocks + 1) / 2;
		nodes += nr_blocks;
	}
	return nodes;
}

void ctg_runs_init(struct ctg_zone *zone)
{
	uint64_t width = zone->nr_blocks;
	uint32_t first = 0;

	/* Zeroed nodes say that nothing is free, which is true of a zone that is all hole. */
	for (;;) {
		zone->run_level[zone->nr_run_levels++] = first;
		if (width == 1)
			break;
		first += (uint32_t)width;
		width = (width + 1) / 2;
	}
}

static struct ctg_run_node *node_at(const struct ctg_zone *zone, unsigned level, uint64_t i)
{
	return &zone->tree[zone->run_level[level] + i];
}

/* Pageblock after the last one that the node covers. */
static uint64_t node_end(const struct ctg_zone *zone, unsigned level, uint64_t i)
{
	uint64_t end = (i + 1) << level;

	return end < zone->nr_blocks ? end : zone->nr_blocks;
}

static uint32_t node_frames(const struct ctg_zone *zone, unsigned level, uint64_t i)
{
	return (uint32_t)((node_end(zone, level, i) - (i << level)) << CTG_PAGEBLOCK_ORDER);
}

void ctg_runs_mark(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	uint64_t first = (pfn - zone->base) >> CTG_PAGEBLOCK_ORDER;
	uint64_t last = (pfn - zone->base + nr - 1) >> CTG_PAGEBLOCK_ORDER;

	for (unsigned level = 0; level < zone->nr_run_levels; level++) {
		/* A dirty node has dirty ancestors. */
		if (first == last && node_at(zone, level, first)->dirty)
			break;
		for (uint64_t i = first; i <= last; i++)
			node_at(zone, level, i)->dirty = 1;
		first >>= 1;
		last >>= 1;
	}
}

/*
 * Go from *head, which is the head of something, to the first free block before end. Returns its
 * frames, or 0 if there is none. Adjacent free blocks come one by one.
 */
static uint64_t next_free(const struct ctg_zone *zone, ctg_pfn_t *head, ctg_pfn_t end)
{
	while (*head < end) {
		uint32_t info = ctg_load32_relaxed(&ctg_zone_frame(zone, *head)->info);
		uint64_t step = ctg_info_step(info);

		if (ctg_info_state(info) == CTG_FRAME_FREE)
			return step;
		*head += step;
	}
	return 0;
}

static void make_leaf(const struct ctg_zone *zone, uint64_t i, struct ctg_run_node *node)
{
	const struct ctg_block *block = &zone->blocks[i];
	ctg_pfn_t start = zone->base + (i << CTG_PAGEBLOCK_ORDER);
	ctg_pfn_t end = start + CTG_PAGEBLOCK_FRAMES;
	ctg_pfn_t run = start;  /* where the run under way began */
	ctg_pfn_t past = start; /* and where it ends so far */
	uint64_t step;

	*node = (struct ctg_run_node){0};
	if (block->isolated_by != NULL || block->nr_free == 0)
		return;
	if (block->nr_free == LEAF_FRAMES) {
		*node = (struct ctg_run_node){LEAF_FRAMES, LEAF_FRAMES, LEAF_FRAMES, 0};
		return;
	}
	for (ctg_pfn_t p = start; (step = next_free(zone, &p, end)) != 0; p = past) {
		if (p != past)
			run = p;
		past = p + step;
		if (past - run > node->best)
			node->best = (uint32_t)(past - run);
		if (run == start)
			node->prefix = (uint32_t)(past - run);
	}
	if (past == end)
		node->suffix = (uint32_t)(past - run);
}

static void combine(const struct ctg_zone *zone, unsigned level, uint64_t i)
{
	struct ctg_run_node *node = node_at(zone, level, i);
	const struct ctg_run_node *left = node_at(zone, level - 1, 2 * i);
	const struct ctg_run_node *right = left + 1;
	uint32_t middle;

	if (node_end(zone, level - 1, 2 * i) == zone->nr_blocks) {
		*node = *left;
		return;
	}
	middle = left->suffix + right->prefix;
	*node = *left;
	if (left->prefix == node_frames(zone, level - 1, 2 * i))
		node->prefix += right->prefix;
	node->suffix = right->suffix;
	if (right->suffix == node_frames(zone, level - 1, 2 * i + 1))
		node->suffix += left->suffix;
	if (right->best > node->best)
		node->best = right->best;
	if (middle > node->best)
		node->best = middle;
}

/* Bring a node up to date. */
static const struct ctg_run_node *clean(const struct ctg_zone *zone, unsigned level, uint64_t i)
{
	struct ctg_run_node *node = node_at(zone, level, i);

	if (!node->dirty)
		return node;
	if (level == 0) {
		make_leaf(zone, i, node);
		return node;
	}
	clean(zone, level - 1, 2 * i);
	if (((2 * i + 1) << (level - 1)) < zone->nr_blocks)
		clean(zone, level - 1, 2 * i + 1);
	combine(zone, level, i);
	return node;
}

/* A scan from left to right for the first run that is long enough. */
struct scan {
	const struct ctg_zone *zone;
	ctg_pfn_t start, end; /* look at nothing outside */
	uint64_t want;        /* frames */
	uint64_t align;
	ctg_pfn_t run;   /* where the run under way began */
	ctg_pfn_t past;  /* everything before this has been looked at */
	uint64_t best;   /* the longest run that was seen */
	ctg_pfn_t found; /* CTG_PFN_NONE so far */
};

/* [from, to) is free, and is what comes next apart from frames that are not. */
static void see_free(struct scan *scan, ctg_pfn_t from, ctg_pfn_t to)
{
	ctg_pfn_t at;

	if (from < scan->start)
		from = scan->start;
	if (to > scan->end)
		to = scan->end;
	if (from >= to)
		return;
	if (from != scan->past)
		scan->run = from;
	scan->past = to;
	if (to - scan->run > scan->best)
		scan->best = to - scan->run;
	at = (scan->run + scan->align - 1) & ~(scan->align - 1);
	if (scan->found == CTG_PFN_NONE && at < to && to - at >= scan->want)
		scan->found = at;
}

/* Look at one pageblock, or the part of it in [start, end). */
static void scan_leaf(struct scan *scan, uint64_t i)
{
	const struct ctg_zone *zone = scan->zone;
	const struct ctg_run_node *node = clean(zone, 0, i);
	ctg_pfn_t first = zone->base + (i << CTG_PAGEBLOCK_ORDER);
	ctg_pfn_t end = first + CTG_PAGEBLOCK_FRAMES;
	uint64_t step;

	if (node->best == 0)
		return;
	if (node->best == LEAF_FRAMES) {
		see_free(scan, first, end);
		return;
	}
	for (ctg_pfn_t p = first; (step = next_free(zone, &p, end)) != 0; p += step)
		see_free(scan, p, p + step);
}

static void scan_node(struct scan *scan, unsigned level, uint64_t i)
{
	const struct ctg_run_node *node = clean(scan->zone, level, i);
	ctg_pfn_t first = scan->zone->base + (i << level << CTG_PAGEBLOCK_ORDER);
	uint64_t frames = node_frames(scan->zone, level, i);

	if (node->best == frames) {
		see_free(scan, first, first + frames);
		return;
	}
	/* No run inside is long enough; only what joins its neighbours on either side matters. */
	if (node->best < scan->want) {
		if (node->prefix != 0)
			see_free(scan, first, first + node->prefix);
		if (node->best > scan->best)
			scan->best = node->best;
		if (node->suffix != 0)
			see_free(scan, first + frames - node->suffix, first + frames);
		return;
	}
	if (level == 0) {
		scan_leaf(scan, i);
		return;
	}
	scan_node(scan, level - 1, 2 * i);
	if (scan->found == CTG_PFN_NONE && ((2 * i + 1) << (level - 1)) < scan->zone->nr_blocks)
		scan_node(scan, level - 1, 2 * i + 1);
}

static void run_scan(struct scan *scan)
{
	const struct ctg_zone *zone = scan->zone;
	uint64_t first = (scan->start - zone->base) >> CTG_PAGEBLOCK_ORDER;
	uint64_t whole_from = (scan->start - zone->base + LEAF_FRAMES - 1) >> CTG_PAGEBLOCK_ORDER;
	uint64_t whole_to = (scan->end - zone->base) >> CTG_PAGEBLOCK_ORDER;

	scan->run = scan->past = scan->start;
	scan->found = CTG_PFN_NONE;
	if (first < whole_from)
		scan_leaf(scan, first);
	while (whole_from < whole_to && scan->found == CTG_PFN_NONE) {
		unsigned level = 0;

		while (level + 1 < zone->nr_run_levels && whole_from % (2u << level) == 0 &&
			whole_from + (2u << level) <= whole_to)
			level++;
		scan_node(scan, level, whole_from >> level);
		whole_from += (uint64_t)1 << level;
	}
	/* The pageblock that the range ends in, unless it is the one that it began in. */
	if (scan->found == CTG_PFN_NONE && (scan->end - zone->base) % LEAF_FRAMES != 0 &&
		(whole_to != first || first == whole_from))
		scan_leaf(scan, whole_to);
}

struct ctg_extent ctg_runs_longest(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr)
{
	/* Once to learn how long, wanting more than there can be; once to learn where. */
	struct scan scan = {
		.zone = zone, .start = start, .end = start + nr, .want = nr + 1, .align = 1};

	run_scan(&scan);
	if (scan.best == 0)
		return (struct ctg_extent){CTG_PFN_NONE, 0};
	scan.want = scan.best;
	run_scan(&scan);
	return (struct ctg_extent){scan.found, scan.want};
}

ctg_pfn_t ctg_runs_find(
	struct ctg_zone *zone, ctg_pfn_t start, ctg_pfn_t end, uint64_t nr, uint64_t align)
{
	struct scan scan = {.zone = zone, .start = start, .end = end, .want = nr, .align = align};

	if (nr == 0 || align == 0 || (align & (align - 1)) != 0)
		return CTG_PFN_NONE;
	if (start < zone->base)
		scan.start = start = zone->base;
	if (end > zone->base + zone->nr)
		scan.end = end = zone->base + zone->nr;
	if (start >= end || end - start < nr)
		return CTG_PFN_NONE;
	run_scan(&scan);
	return scan.found;
}
