/* SPDX-License-Identifier: MIT */
/*
 * Placement: which window of an area a request should have.
 *
 * A window that is free as a whole comes from the zone's tree of free runs, in O(log n). Otherwise
 * the cheapest is sought: fewest frames in use, and of equals the one that touches the fewest
 * pageblocks, then the lowest.
 *
 * What is possible is a list of segments: runs of clear bits, without what has failed before and
 * without blocks that others have isolated. Within a segment the windows are taken together by the
 * pageblock they start in. A sliding sum over the pageblocks' counts gives each such group a lower
 * bound: the frames in use in blocks that all of its windows contain, and those that cannot be free
 * in the two or three blocks at their ends. That is linear in pageblocks. Only for the groups with
 * the lowest bounds are the blocks at the ends looked into, frame by frame, to find the best start.
 *
 * So the choice is the best, unless more than RANKED groups have a bound below the best cost that
 * was found: then it is the best of RANKED groups. All of it is a guess about the future anyway.
 */
#include "area.h"
#include "buddy.h"

#define RANKED 32
#define FREE_TRIES 64

/* ---- what may be a window -------------------------------------------------------------------- */

static bool crosses(const struct ctg_want *want, ctg_pfn_t start)
{
	return want->boundary != 0 &&
	       ((start ^ (start + want->nr - 1)) & ~(want->boundary - 1)) != 0;
}

/* The first start at or after pfn that suits alignment and boundary. */
static ctg_pfn_t next_start(const struct ctg_want *want, ctg_pfn_t pfn)
{
	pfn = (pfn + want->align - 1) & ~(want->align - 1);
	/*
	 * What crosses a boundary is not at a multiple of one, as nr <= boundary, so align is less
	 * than boundary and divides it.
	 */
	if (crosses(want, pfn))
		pfn = (pfn + want->boundary - 1) & ~(want->boundary - 1);
	return pfn;
}

/* The last start at or before pfn that suits, if there is one not far below. */
static ctg_pfn_t prev_start(const struct ctg_want *want, ctg_pfn_t pfn)
{
	pfn &= ~(want->align - 1);
	if (crosses(want, pfn)) {
		ctg_pfn_t last = (pfn & ~(want->boundary - 1)) + want->boundary - want->nr;

		pfn = last & ~(want->align - 1);
	}
	return pfn;
}

static ctg_pfn_t range_end(const struct ctg_area_range *range, const struct ctg_want *want)
{
	ctg_pfn_t end = range->base + range->nr;

	return end < want->limit ? end : want->limit;
}

/* The first run of unallocated frames of the range, at or after *pfn, that is long enough. */
static bool next_clear(const struct ctg_cma *cma, const struct ctg_area_range *range,
	const struct ctg_want *want, ctg_pfn_t *pfn, ctg_pfn_t *end)
{
	unsigned order = cma->order_per_bit;
	ctg_pfn_t stop = range_end(range, want);
	uint64_t from = (*pfn - range->base + ((uint64_t)1 << order) - 1) >> order;
	uint64_t bit, len;

	bit = ctg_bitmap_next_run(&range->taken, from, want->nr >> order, &len);
	if (bit == range->taken.nr)
		return false;
	*pfn = range->base + (bit << order);
	*end = *pfn + (len << order);
	if (*end > stop)
		*end = stop;
	return *pfn < *end && *end - *pfn >= want->nr;
}

bool ctg_place_fits(struct ctg_cma *cma, const struct ctg_want *want)
{
	for (size_t i = 0; i < cma->nr_ranges; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];
		ctg_pfn_t pfn = range->base, end;

		while (next_clear(cma, range, want, &pfn, &end)) {
			if (next_start(want, pfn) + want->nr <= end)
				return true;
			pfn = end;
		}
	}
	return false;
}

/* ---- what is to be avoided ------------------------------------------------------------------- */

/* Join the two extents with the smallest gap. */
static void squeeze(struct ctg_avoid *avoid)
{
	uint64_t least = UINT64_MAX;
	unsigned at = 0;

	for (unsigned i = 0; i + 1 < avoid->nr; i++) {
		uint64_t gap = avoid->at[i + 1].pfn - (avoid->at[i].pfn + avoid->at[i].nr);

		if (gap < least) {
			least = gap;
			at = i;
		}
	}
	avoid->at[at].nr = avoid->at[at + 1].pfn + avoid->at[at + 1].nr - avoid->at[at].pfn;
	for (unsigned i = at + 1; i + 1 < avoid->nr; i++)
		avoid->at[i] = avoid->at[i + 1];
	avoid->nr--;
}

void ctg_avoid_add(struct ctg_avoid *avoid, ctg_pfn_t pfn, uint64_t nr, uint64_t window)
{
	ctg_pfn_t end = pfn + nr;
	unsigned first = 0, last;

	if (avoid->nr == CTG_AVOID_MAX)
		squeeze(avoid);
	while (first < avoid->nr && avoid->at[first].pfn + avoid->at[first].nr + window <= pfn)
		first++;
	/* Everything from first to last is so close that no window fits between. */
	for (last = first; last < avoid->nr && avoid->at[last].pfn < end + window; last++) {
		ctg_pfn_t old_end = avoid->at[last].pfn + avoid->at[last].nr;

		if (avoid->at[last].pfn < pfn)
			pfn = avoid->at[last].pfn;
		if (old_end > end)
			end = old_end;
	}
	if (last == first) {
		for (unsigned i = avoid->nr; i > first; i--)
			avoid->at[i] = avoid->at[i - 1];
		avoid->nr++;
	} else {
		unsigned gone = last - first - 1;

		for (unsigned i = last; i < avoid->nr; i++)
			avoid->at[i - gone] = avoid->at[i];
		avoid->nr -= gone;
	}
	avoid->at[first] = (struct ctg_extent){pfn, end - pfn};
}

/* Cut [*start, *end) down to its first part that contains nothing to avoid; perhaps to nothing. */
static void cut_avoided(const struct ctg_avoid *avoid, ctg_pfn_t *start, ctg_pfn_t *end)
{
	for (unsigned i = 0; i < avoid->nr && avoid->at[i].pfn < *end; i++) {
		ctg_pfn_t after = avoid->at[i].pfn + avoid->at[i].nr;

		if (after <= *start)
			continue;
		if (avoid->at[i].pfn > *start) {
			*end = avoid->at[i].pfn;
			return;
		}
		*start = after < *end ? after : *end;
	}
}

/* The same for pageblocks that somebody has isolated. zone->lock held. */
static void cut_isolated(
	struct ctg_zone *zone, struct ctg_search *search, ctg_pfn_t *start, ctg_pfn_t *end)
{
	for (ctg_pfn_t pfn = ctg_block_start(*start); pfn < *end; pfn += CTG_PAGEBLOCK_FRAMES) {
		if (ctg_zone_block(zone, pfn)->isolated_by == NULL)
			continue;
		if (search->isolated == CTG_PFN_NONE)
			search->isolated = pfn;
		if (pfn > *start) {
			*end = pfn;
			return;
		}
		*start = pfn + CTG_PAGEBLOCK_FRAMES < *end ? pfn + CTG_PAGEBLOCK_FRAMES : *end;
	}
}

/*
 * The next segment of the range, at or after *from, which moves to its end. Both kinds of locks
 * held.
 */
static bool next_segment(struct ctg_cma *cma, const struct ctg_area_range *range,
	struct ctg_search *search, ctg_pfn_t *from, struct ctg_extent *segment)
{
	ctg_pfn_t start = *from, end;

	while (next_clear(cma, range, &search->want, &start, &end)) {
		cut_avoided(&search->failed, &start, &end);
		if (!search->use_held)
			cut_avoided(&search->held, &start, &end);
		if (start < end)
			cut_isolated(cma->zone, search, &start, &end);
		if (end - start >= search->want.nr) {
			*segment = (struct ctg_extent){start, end - start};
			*from = end;
			return true;
		}
		start = end;
	}
	return false;
}

/* ---- windows that are free ------------------------------------------------------------------- */

static ctg_pfn_t free_window_from(struct ctg_cma *cma, const struct ctg_area_range *range,
	const struct ctg_search *search, ctg_pfn_t from, ctg_pfn_t *retry)
{
	const struct ctg_port *port = &cma->ctg->port;
	const struct ctg_want *want = &search->want;
	unsigned order = cma->order_per_bit;
	ctg_pfn_t stop = range_end(range, want), pfn, start, end;
	uint64_t bit, set;

	*retry = CTG_PFN_NONE;
	if (from >= stop || stop - from < want->nr)
		return CTG_PFN_NONE;
	ctg_lock(port, &cma->zone->lock);
	pfn = ctg_runs_find(cma->zone, from, stop, want->nr, want->align);
	ctg_unlock(port, &cma->zone->lock);
	if (pfn == CTG_PFN_NONE)
		return CTG_PFN_NONE;
	if (crosses(want, pfn)) {
		*retry = next_start(want, pfn);
		return CTG_PFN_NONE;
	}
	/* Free, but another caller is about to take it, or has just given it back. */
	bit = (pfn - range->base) >> order;
	set = ctg_bitmap_next_set(&range->taken, bit);
	if (set < bit + (want->nr >> order)) {
		set = ctg_bits_next(range->taken.words, set, range->taken.nr, false);
		*retry = range->base + (set << order);
		return CTG_PFN_NONE;
	}
	start = pfn;
	end = pfn + want->nr;
	cut_avoided(&search->failed, &start, &end);
	if (!search->use_held)
		cut_avoided(&search->held, &start, &end);
	if (end - start < want->nr) {
		*retry = start > pfn ? start : end + 1;
		return CTG_PFN_NONE;
	}
	return pfn;
}

static ctg_pfn_t free_window(struct ctg_cma *cma, const struct ctg_search *search)
{
	for (size_t i = 0; i < cma->nr_ranges; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];
		ctg_pfn_t from = range->base;

		for (unsigned n = 0; n < FREE_TRIES && from != CTG_PFN_NONE; n++) {
			ctg_pfn_t pfn = free_window_from(cma, range, search, from, &from);

			if (pfn != CTG_PFN_NONE)
				return pfn;
		}
	}
	return CTG_PFN_NONE;
}

/* ---- the cheapest window --------------------------------------------------------------------- */

/* The windows that start at lo, hi or between, all in one pageblock. */
struct group {
	uint64_t bound; /* no window of the group uses fewer frames */
	uint64_t inner; /* frames in use in the blocks strictly between those of lo and lo + nr - 1
			 */
	ctg_pfn_t lo, hi;
};

/* The groups with the lowest bounds, sorted; of equal ones those that came first. */
struct ranking {
	unsigned nr;
	struct group group[RANKED];
};

static void rank(struct ranking *ranking, const struct group *group)
{
	unsigned i = ranking->nr;

	if (i == RANKED) {
		if (group->bound >= ranking->group[i - 1].bound)
			return;
		i--;
	} else {
		ranking->nr++;
	}
	for (; i > 0 && ranking->group[i - 1].bound > group->bound; i--)
		ranking->group[i] = ranking->group[i - 1];
	ranking->group[i] = *group;
}

static uint64_t block_index(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	return (pfn - zone->base) >> CTG_PAGEBLOCK_ORDER;
}

static uint64_t block_used(const struct ctg_zone *zone, uint64_t index)
{
	return CTG_PAGEBLOCK_FRAMES - zone->blocks[index].nr_free;
}

/* A sum over the blocks [first, last), which only move up. */
struct sliding_sum {
	uint64_t first, last, used;
};

static void slide(
	const struct ctg_zone *zone, struct sliding_sum *sum, uint64_t first, uint64_t last)
{
	if (first >= sum->last)
		*sum = (struct sliding_sum){first, first, 0};
	while (sum->last < last)
		sum->used += block_used(zone, sum->last++);
	while (sum->first < first)
		sum->used -= block_used(zone, sum->first++);
}

/* zone->lock held */
static void rank_segment(const struct ctg_zone *zone, const struct ctg_want *want,
	const struct ctg_extent *segment, struct ranking *ranking)
{
	ctg_pfn_t last = segment->pfn + segment->nr - want->nr;
	struct sliding_sum sum = {0, 0, 0};
	struct group group;

	for (group.lo = next_start(want, segment->pfn); group.lo <= last;) {
		ctg_pfn_t next_block = ctg_block_start(group.lo) + CTG_PAGEBLOCK_FRAMES;
		uint64_t at = block_index(zone, group.lo), end_lo, end_hi, ends, free;

		group.hi = prev_start(want, last < next_block ? last : next_block - 1);
		CTG_ASSERT(group.hi >= group.lo);
		end_lo = block_index(zone, group.lo + want->nr - 1);
		end_hi = block_index(zone, group.hi + want->nr - 1);
		slide(zone, &sum, at + 1, end_lo > at ? end_lo : at + 1);
		group.inner = sum.used;
		ends = want->nr - (sum.last - sum.first) * CTG_PAGEBLOCK_FRAMES;
		free = zone->blocks[at].nr_free;
		if (end_lo != at)
			free += zone->blocks[end_lo].nr_free;
		if (end_hi != end_lo)
			free += zone->blocks[end_hi].nr_free;
		group.bound = group.inner + (ends > free ? ends - free : 0);
		rank(ranking, &group);
		group.lo = next_start(want, next_block);
	}
}

/* Which frames of a pageblock are in use. */
struct block_map {
	ctg_pfn_t start;
	uint64_t words[CTG_PAGEBLOCK_FRAMES / 64];
};

/* zone->lock held */
static void map_block(const struct ctg_zone *zone, ctg_pfn_t start, struct block_map *map)
{
	uint16_t nr_free = ctg_zone_block(zone, start)->nr_free;
	ctg_pfn_t pfn = start;

	map->start = start;
	ctg_bits_fill(map->words, 0, CTG_PAGEBLOCK_FRAMES, nr_free != CTG_PAGEBLOCK_FRAMES);
	/* Partly free: then no block of it is larger than it, and all heads are inside. */
	if (nr_free == 0 || nr_free == CTG_PAGEBLOCK_FRAMES)
		return;
	while (pfn < start + CTG_PAGEBLOCK_FRAMES) {
		uint32_t info = ctg_load32_relaxed(&ctg_zone_frame(zone, pfn)->info);
		uint64_t step = 1;

		if (ctg_info_state(info) == CTG_FRAME_FREE) {
			step = (uint64_t)1 << ctg_info_order(info);
			ctg_bits_fill(map->words, pfn - start, step, false);
		}
		pfn += step;
	}
}

static uint64_t map_count(const struct block_map *map, ctg_pfn_t from, ctg_pfn_t to)
{
	uint64_t n = 0;

	for (ctg_pfn_t pfn = from; pfn < to;) {
		uint64_t shift = pfn % 64, len = 64 - shift, word;

		if (len > to - pfn)
			len = to - pfn;
		word = map->words[(pfn - map->start) / 64] >> shift;
		if (len < 64)
			word &= ((uint64_t)1 << len) - 1;
		n += (uint64_t)__builtin_popcountll(word);
		pfn += len;
	}
	return n;
}

struct choice {
	ctg_pfn_t pfn;
	uint64_t cost;
	uint64_t blocks; /* that it touches */
};

static void consider(const struct ctg_want *want, ctg_pfn_t pfn, uint64_t cost, struct choice *best)
{
	uint64_t blocks = ((ctg_block_start(pfn + want->nr - 1) - ctg_block_start(pfn)) >>
				  CTG_PAGEBLOCK_ORDER) +
			  1;

	if (best->pfn != CTG_PFN_NONE &&
		(cost > best->cost || (cost == best->cost && blocks > best->blocks) ||
			(cost == best->cost && blocks == best->blocks && pfn > best->pfn)))
		return;
	*best = (struct choice){pfn, cost, blocks};
}

static bool map_used(const struct block_map map[3], ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < 2; i++)
		if (pfn - map[i].start < CTG_PAGEBLOCK_FRAMES)
			return ctg_bits_test(map[i].words, pfn - map[i].start);
	return ctg_bits_test(map[2].words, pfn - map[2].start);
}

/* Look at each window of a group. zone->lock held. */
static void refine(const struct ctg_zone *zone, const struct ctg_want *want,
	const struct group *group, struct choice *best)
{
	ctg_pfn_t start = ctg_block_start(group->lo), end = group->lo + want->nr;
	ctg_pfn_t end_block = ctg_block_start(end - 1);
	ctg_pfn_t last_block = ctg_block_start(group->hi + want->nr - 1);
	struct block_map map[3];
	uint64_t cost = group->inner;

	if (group->lo == group->hi && group->lo == start && end % CTG_PAGEBLOCK_FRAMES == 0) {
		consider(
			want, group->lo, group->bound, best); /* whole blocks: the bound is exact */
		return;
	}
	map_block(zone, start, &map[0]);
	map[1] = map[0];
	if (end_block != start)
		map_block(zone, end_block, &map[1]);
	map[2] = map[1];
	if (last_block != end_block)
		map_block(zone, last_block, &map[2]);
	if (end_block == start) {
		cost += map_count(&map[0], group->lo, end);
	} else {
		cost += map_count(&map[0], group->lo, start + CTG_PAGEBLOCK_FRAMES);
		cost += map_count(&map[1], end_block, end);
	}
	for (ctg_pfn_t pfn = group->lo;; pfn++) {
		if (pfn % want->align == 0 && !crosses(want, pfn))
			consider(want, pfn, cost, best);
		if (pfn == group->hi)
			break;
		cost += map_used(map, pfn + want->nr);
		cost -= map_used(map, pfn);
	}
}

static ctg_pfn_t cheapest(struct ctg_cma *cma, const struct ctg_want *want, struct ranking *ranking)
{
	const struct ctg_port *port = &cma->ctg->port;
	struct choice best = {.pfn = CTG_PFN_NONE};
	uint64_t blocks = (want->nr + CTG_PAGEBLOCK_FRAMES - 1) >> CTG_PAGEBLOCK_ORDER;

	for (unsigned i = 0; i < ranking->nr; i++) {
		uint64_t bound = ranking->group[i].bound;

		if (best.pfn != CTG_PFN_NONE &&
			(bound > best.cost || (bound == best.cost && best.blocks == blocks)))
			break;
		ctg_lock(port, &cma->zone->lock);
		refine(cma->zone, want, &ranking->group[i], &best);
		ctg_unlock(port, &cma->zone->lock);
	}
	return best.pfn;
}

ctg_pfn_t ctg_place_window(struct ctg_cma *cma, struct ctg_search *search)
{
	const struct ctg_port *port = &cma->ctg->port;
	const struct ctg_want *want = &search->want;
	struct ranking ranking = {.nr = 0};
	ctg_pfn_t found = CTG_PFN_NONE;

	search->isolated = CTG_PFN_NONE;
	if (!search->first_fit) {
		found = free_window(cma, search);
		if (found != CTG_PFN_NONE)
			return found;
	}
	ctg_lock(port, &cma->zone->lock);
	for (size_t i = 0; i < cma->nr_ranges && found == CTG_PFN_NONE; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];
		struct ctg_extent segment;
		ctg_pfn_t from = range->base;

		while (found == CTG_PFN_NONE && next_segment(cma, range, search, &from, &segment)) {
			ctg_pfn_t first = next_start(want, segment.pfn);

			if (!search->first_fit)
				rank_segment(cma->zone, want, &segment, &ranking);
			else if (first + want->nr <= segment.pfn + segment.nr)
				found = first;
		}
	}
	ctg_unlock(port, &cma->zone->lock);
	return search->first_fit ? found : cheapest(cma, want, &ranking);
}
