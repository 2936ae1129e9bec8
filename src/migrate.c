/* SPDX-License-Identifier: MIT */
/*
 * Migration: which frames move. How they move is in move.c.
 */
#include "buddy.h"
#include "move.h"

/* How long to wait for an obstacle to change before the next look. */
#define LOOK_AGAIN_NS 1000000u

static unsigned batch_pages(const struct ctg *ctg)
{
	return ctg->port.batch_pages != 0 ? ctg->port.batch_pages : CTG_MIGRATE_BATCH_PAGES;
}

/* ---- looking at frames ------------------------------------------------------------------------
 */

/* A pageblock of which nothing is in use: a hint, right for blocks that the caller has isolated. */
static bool block_idle(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	const struct ctg_block *block = ctg_zone_block(zone, pfn);

	return !ctg_hint_load(&block->released) ||
	       ctg_hint_load(&block->nr_free) == CTG_PAGEBLOCK_FRAMES;
}

/*
 * The next head at or after *pfn, not in an idle block: *info is what it says. false: none before
 * end.
 */
static bool next_head(const struct ctg_zone *zone, ctg_pfn_t *pfn, ctg_pfn_t end, uint32_t *info)
{
	while (*pfn < end) {
		if (block_idle(zone, *pfn)) {
			*pfn = ctg_block_start(*pfn) + CTG_PAGEBLOCK_FRAMES;
			continue;
		}
		*info = ctg_load32_acquire(&ctg_zone_frame(zone, *pfn)->info);
		if (ctg_info_state(*info) != CTG_FRAME_TAIL)
			return true;
		*pfn += 1;
	}
	return false;
}

/* ---- emptying a range -------------------------------------------------------------------------
 */

struct empty {
	struct ctg_zone *zone;
	ctg_pfn_t start, end;
	unsigned max_pages;
	const struct ctg_alloc_request *request;
	struct ctg_migrate_stats *stats;
};

/*
 * Before anything is moved: is there a frame that will not move at all, and how much is there to
 * move?
 */
static int survey(struct empty *empty)
{
	ctg_pfn_t pfn = ctg_used_head(empty->zone, empty->start);
	uint64_t pages = 0;
	uint32_t info;

	for (; next_head(empty->zone, &pfn, empty->end, &info); pfn += ctg_info_step(info)) {
		uint64_t word = ctg_load64_relaxed(&ctg_zone_frame(empty->zone, pfn)->word);
		unsigned state = ctg_info_state(info);
		enum ctg_obstacle_kind kind = CTG_OBSTACLE_NONE;

		if (state == CTG_FRAME_USED && (ctg_info_flags(info) & CTG_FRAME_UNMOVABLE) != 0)
			kind = CTG_OBSTACLE_UNMOVABLE;
		else if (state == CTG_FRAME_CONTIG && (word & ~CTG_WORD_FLAGS) != 0)
			kind = CTG_OBSTACLE_REF;
		if (kind != CTG_OBSTACLE_NONE) {
			empty->stats->obstacle = kind;
			empty->stats->obstacle_pfn = pfn;
			empty->stats->obstacle_word = word;
			return -CTG_EBUSY;
		}
		if (state == CTG_FRAME_USED || state == CTG_FRAME_ANON || state == CTG_FRAME_CONTIG)
			pages += (uint64_t)1 << ctg_info_order(info);
	}
	empty->max_pages = batch_pages(empty->zone->ctg);
	if (pages < empty->max_pages)
		empty->max_pages = (unsigned)pages;
	return 0;
}

/* Fill the batch from pfn on. Returns where to go on. */
static ctg_pfn_t gather(struct ctg_moves *moves, ctg_pfn_t pfn, ctg_pfn_t end)
{
	uint32_t info;

	for (; next_head(moves->zone, &pfn, end, &info); pfn += ctg_info_step(info)) {
		uint64_t word = ctg_load64_relaxed(&ctg_zone_frame(moves->zone, pfn)->word);
		uint64_t nr = (uint64_t)1 << ctg_info_order(info);
		int ret = 0;

		switch (ctg_info_state(info)) {
		case CTG_FRAME_ANON:
			ret = ctg_moves_add(moves, pfn, info);
			break;
		case CTG_FRAME_USED: /* about to be mapped, or held by pfn */
		case CTG_FRAME_CONTIG:
			ctg_moves_fail(moves, CTG_OBSTACLE_REF, pfn, nr, word, -CTG_EBUSY);
			break;
		default: /* free; or in a cache, which was the caller's to drain */
			break;
		}
		if (ret == -CTG_ENOSPC && moves->nr != 0)
			return pfn;
		/* A large frame that was not there when the batch was made: next time. */
		if (ret == -CTG_ENOSPC)
			ctg_moves_fail(moves, CTG_OBSTACLE_REF, pfn, nr, word, -CTG_EBUSY);
	}
	return end;
}

/* Move what can be moved, batch by batch. 0: all of it. */
static int empty_once(struct empty *empty, struct ctg_moves *moves)
{
	ctg_pfn_t pfn = ctg_used_head(empty->zone, empty->start);

	moves->error = 0;
	while (pfn < empty->end) {
		int ret = ctg_request_check(moves->ctg, empty->request);

		if (ret != 0)
			return ret;
		pfn = gather(moves, pfn, empty->end);
		ctg_moves_run(moves);
		if (moves->error == -CTG_ENOMEM || (moves->error != 0 && moves->last_look))
			break;
	}
	return moves->error;
}

/* Wait until the obstacle that was met may have gone. 0: look again. */
static int wait_for_obstacle(struct empty *empty)
{
	struct ctg *ctg = empty->zone->ctg;
	const struct ctg_port *port = &ctg->port;
	const struct ctg_alloc_request *request = empty->request;
	const struct ctg_migrate_stats *stats = empty->stats;
	const struct ctg_frame *frame = ctg_zone_frame(empty->zone, stats->obstacle_pfn);
	uint64_t until = port->now(port->host) + LOOK_AGAIN_NS;
	int ret = 0;

	if (request != NULL && request->deadline != 0 && request->deadline < until)
		until = request->deadline;
	if ((stats->obstacle_word & ~CTG_WORD_FLAGS) != 0) {
		ret = ctg_frame_wait(ctg, stats->obstacle_pfn, stats->obstacle_word, until, true);
	} else {
		/* Nobody holds it: whoever was last is freeing it, and no event says when. */
		uint32_t info = ctg_load32_acquire(&frame->info);

		while (ctg_load32_acquire(&frame->info) == info &&
			(ctg_load64_relaxed(&frame->word) & ~CTG_WORD_FLAGS) == 0 &&
			port->now(port->host) < until)
			port->relax(port->host);
	}
	return ret == -CTG_EINTR ? ret : ctg_request_check(ctg, request);
}

int ctg_migrate_range(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr, unsigned gfp,
	unsigned rounds, const struct ctg_alloc_request *request, struct ctg_migrate_stats *stats)
{
	struct empty empty = {.zone = zone,
		.start = start,
		.end = start + nr,
		.request = request,
		.stats = stats};
	struct ctg_moves *moves;
	int ret;

	CTG_ASSERT(nr != 0 && start - zone->base < zone->nr);
	*stats = (struct ctg_migrate_stats){.obstacle_pfn = CTG_PFN_NONE};
	ret = survey(&empty);
	if (ret != 0 || empty.max_pages == 0)
		return ret;
	moves = ctg_moves_alloc(zone, empty.max_pages, stats);
	if (moves == NULL) {
		stats->obstacle = CTG_OBSTACLE_NO_MEMORY;
		return -CTG_ENOMEM;
	}
	moves->gfp = gfp;
	moves->gfp_honoured = CTG_GFP_NO_CMA;
	for (unsigned round = 1;; round++) {
		moves->last_look = round >= rounds;
		ret = empty_once(&empty, moves);
		if (ret != -CTG_EBUSY || moves->last_look)
			break;
		ret = wait_for_obstacle(&empty);
		if (ret != 0)
			break;
	}
	ctg_moves_free(moves);
	return ret;
}

/* ---- home -------------------------------------------------------------------------------------
 */

struct home {
	struct ctg_moves *moves;
	uint64_t budget, moved; /* frames */
	bool no_room;
};

static bool is_spill(const struct ctg_zone *zone)
{
	return (zone->flags & CTG_ZONE_SPILL) != 0;
}

/* Fill the batch with frames of one size, up to the budget. Returns where to go on. */
static ctg_pfn_t gather_spilled(struct home *home, ctg_pfn_t pfn, ctg_pfn_t end, bool large)
{
	struct ctg_moves *moves = home->moves;
	uint32_t info;

	for (; next_head(moves->zone, &pfn, end, &info); pfn += ctg_info_step(info)) {
		if (home->moved + moves->nr_frames >= home->budget)
			return pfn;
		if (ctg_info_state(info) != CTG_FRAME_ANON || (ctg_info_order(info) != 0) != large)
			continue;
		if (ctg_moves_add(moves, pfn, info) == -CTG_ENOSPC)
			return pfn;
	}
	return end;
}

/* Is there room for one more, for a space that takes frames from anywhere? */
static bool any_room(const struct home *home, bool large)
{
	unsigned order = large && home->moves->whole ? CTG_PAGEBLOCK_ORDER : 0;
	struct ctg *ctg = home->moves->ctg;
	ctg_pfn_t pfn;

	if (ctg_alloc_run(ctg, order, order, home->moves->gfp, &pfn, &order) != 0)
		return false;
	ctg_frame_put(ctg, pfn, CTG_WORD_REF1, 1);
	return true;
}

/*
 * Move frames of one size out of a spill zone, until the budget is spent. Space for one family is
 * not space for another, so a batch without room is the end only if nobody would have any.
 */
static void empty_spilled(struct home *home, struct ctg_zone *zone, bool large)
{
	struct ctg_moves *moves = home->moves;
	ctg_pfn_t pfn = zone->base, end = zone->base + zone->nr;

	moves->zone = zone;
	while (pfn < end && home->moved < home->budget) {
		moves->error = 0;
		moves->frames_moved = 0;
		pfn = gather_spilled(home, pfn, end, large);
		ctg_moves_run(moves);
		home->moved += moves->frames_moved;
		if (moves->error != -CTG_ENOMEM)
			continue;
		home->no_room = true;
		if (moves->frames_moved == 0 && !any_room(home, large))
			break;
	}
}

/* Is anything in a spill zone that came there to be moved back? */
static bool any_spilled(struct ctg *ctg)
{
	for (unsigned i = 0; i < ctg->nr_zones; i++) {
		const struct ctg_zone *zone = ctg->zones[i];
		ctg_pfn_t pfn = zone->base;
		uint32_t info;

		if (!is_spill(zone))
			continue;
		for (; next_head(zone, &pfn, zone->base + zone->nr, &info);
			pfn += ctg_info_step(info))
			if (ctg_info_state(info) == CTG_FRAME_ANON)
				return true;
	}
	return false;
}

/*
 * Large frames as they are, then small ones, then what large ones there is room for in pieces: so
 * that pieces do not take the room of what can stay whole.
 */
static void empty_all_spilled(struct home *home)
{
	static const struct {
		bool large, whole;
	} passes[] = {{true, true}, {false, true}, {true, false}};
	struct ctg *ctg = home->moves->ctg;

	for (unsigned pass = 0; pass < 3; pass++) {
		home->moves->whole = passes[pass].whole;
		for (unsigned i = 0; i < ctg->nr_zones; i++)
			if (is_spill(ctg->zones[i]))
				empty_spilled(home, ctg->zones[i], passes[pass].large);
		/* What finds no room as a whole has not been tried in pieces yet. */
		if (pass == 0)
			home->no_room = false;
	}
}

static struct ctg_zone *first_spill_zone(struct ctg *ctg)
{
	for (unsigned i = 0; i < ctg->nr_zones; i++)
		if (is_spill(ctg->zones[i]))
			return ctg->zones[i];
	return NULL;
}

int ctg_migrate_home(struct ctg *ctg, uint64_t budget, uint64_t *moved)
{
	struct ctg_migrate_stats stats = {.obstacle_pfn = CTG_PFN_NONE};
	struct home home = {.budget = budget};
	struct ctg_zone *zone;

	if (moved != NULL)
		*moved = 0;
	if (ctg == NULL)
		return -CTG_EINVAL;
	zone = first_spill_zone(ctg);
	if (zone == NULL || !any_spilled(ctg))
		return 0;
	home.moves = ctg_moves_alloc(zone, batch_pages(ctg), &stats);
	if (home.moves == NULL)
		return -CTG_ENOMEM;
	home.moves->gfp = CTG_GFP_MOVABLE;
	home.moves->gfp_honoured = CTG_GFP_NO_CMA | CTG_GFP_NO_ORDINARY;
	home.moves->partial = true;
	empty_all_spilled(&home);
	ctg_moves_free(home.moves);
	ctg_count(&ctg->counters.frames_returned, home.moved);
	if (moved != NULL)
		*moved = home.moved;
	if (!any_spilled(ctg))
		return 0;
	if (home.moved >= budget)
		return -CTG_EAGAIN;
	return home.no_room ? -CTG_ENOMEM : -CTG_EBUSY;
}
