/* SPDX-License-Identifier: MIT */
/*
 * Taking an exact range of frames from whoever uses them, and giving it back.
 *
 *   take what is free as it is -> isolate the rest's pageblocks -> drain -> migrate -> take
 *
 * Frames are taken from the start up, so that the range is always [taken][not yet]. Each step has
 * one undo: what was taken is freed, the blocks that this call has isolated (its own address on the
 * stack says which) go back. The second runs after success too: it gives back the edges.
 */
#include "area.h"
#include "buddy.h"

#define NORMAL_ROUNDS 5
#define LOOK_AGAIN_NS 1000000u /* for a holder to leave */
#define BETWEEN_SPINS 4096
#define WAIT_SLICE_NS 1000000u /* between looks at a request's cancel word */
#define WAIT_NS 1000000000u    /* for other allocations to end, all in all */
#define ZERO_RUN 32768u        /* frames, between looks at the deadline */
#define DIRTY_RUNS 32

/* ---- requests -------------------------------------------------------------------------------- */

int ctg_request_check(struct ctg *ctg, const struct ctg_alloc_request *request)
{
	if (request == NULL)
		return 0;
	if (request->cancel != NULL && ctg_load32_acquire(request->cancel) != 0)
		return -CTG_EINTR;
	if (request->deadline != 0 && ctg->port.now(ctg->port.host) >= request->deadline)
		return -CTG_ETIMEDOUT;
	return 0;
}

static bool is_fast(const struct ctg_alloc_request *request)
{
	return request != NULL && request->mode == CTG_MODE_FAST;
}

unsigned ctg_mode_rounds(const struct ctg_alloc_request *request)
{
	return is_fast(request) ? 1 : NORMAL_ROUNDS;
}

int ctg_request_validate(const struct ctg_alloc_request *request, uint64_t nr)
{
	uint64_t boundary;

	if (request == NULL)
		return 0;
	boundary = request->boundary;
	if (request->mode != CTG_MODE_FAST && request->mode != CTG_MODE_NORMAL)
		return -CTG_EINVAL;
	if ((request->flags & ~(unsigned)(CTG_ALLOC_NO_ZERO | CTG_ALLOC_FIRST_FIT)) != 0)
		return -CTG_EINVAL;
	if (request->align_order >= 64 - CTG_PAGE_SHIFT)
		return -CTG_EINVAL;
	if (boundary != 0 && ((boundary & (boundary - 1)) != 0 || boundary < nr))
		return -CTG_EINVAL;
	return 0;
}

void ctg_report_init(struct ctg_alloc_report *report)
{
	*report = (struct ctg_alloc_report){.obstacle_pfn = CTG_PFN_NONE};
}

static void note_obstacle(
	struct ctg_alloc_report *report, enum ctg_obstacle_kind kind, ctg_pfn_t pfn, uint64_t word)
{
	report->obstacle = kind;
	report->obstacle_pfn = pfn;
	report->obstacle_word = word;
}

/* Until when a wait may last that should last ns. */
static uint64_t wait_until(const struct ctg_alloc_request *request, uint64_t now, uint64_t ns)
{
	uint64_t until = now + ns;

	if (request != NULL && request->deadline != 0 && request->deadline < until)
		until = request->deadline;
	return until;
}

/* ---- waiting for other allocations ----------------------------------------------------------- */

void ctg_isolation_ended(struct ctg_zone *zone)
{
	const struct ctg_port *port = &zone->ctg->port;

	ctg_add32_acq_rel(&zone->isolation_ended, 1);
	port->wake(port->host, &zone->isolation_ended, UINT32_MAX);
}

int ctg_isolation_wait(struct ctg_zone *zone, uint32_t seen, uint64_t *until,
	const struct ctg_alloc_request *request)
{
	const struct ctg_port *port = &zone->ctg->port;
	uint64_t now = port->now(port->host);
	/* Nobody wakes us when the cancel word changes: look at it in slices. */
	uint64_t slice = request != NULL && request->cancel != NULL ? WAIT_SLICE_NS : WAIT_NS;

	if (*until == 0)
		*until = now + WAIT_NS;
	else if (now >= *until)
		return -CTG_EBUSY;
	while (now < *until && ctg_load32_acquire(&zone->isolation_ended) == seen) {
		int ret = ctg_request_check(zone->ctg, request);

		if (ret != 0)
			return ret;
		if (slice > *until - now)
			slice = *until - now;
		ret = port->wait(port->host, &zone->isolation_ended, seen,
			wait_until(request, now, slice), true);
		if (ret == -CTG_EINTR)
			return ret;
		now = port->now(port->host);
	}
	return ctg_request_check(zone->ctg, request);
}

/* ---- looking at frames ----------------------------------------------------------------------- */

/* What keeps the frame from being taken, mappings apart; NONE if nothing does. */
static enum ctg_obstacle_kind frame_obstacle(uint32_t info, uint64_t word)
{
	switch (ctg_info_state(info)) {
	case CTG_FRAME_PCP:
		return CTG_OBSTACLE_CACHED;
	case CTG_FRAME_CONTIG:
		return (word & ~CTG_WORD_FLAGS) != 0 ? CTG_OBSTACLE_REF : CTG_OBSTACLE_NONE;
	case CTG_FRAME_USED:
		if ((ctg_info_flags(info) & CTG_FRAME_UNMOVABLE) != 0)
			return CTG_OBSTACLE_UNMOVABLE;
		return ctg_word_obstacle(word, 0, 0);
	case CTG_FRAME_ANON:
		return ctg_word_obstacle(word, ctg_word_map(word), 0);
	default:
		return CTG_OBSTACLE_NONE;
	}
}

/* The first frame of [pfn, end), in one pageblock, that is held; see ctg_contig_look. */
static ctg_pfn_t look_in_block(struct ctg_zone *zone, ctg_pfn_t pfn, ctg_pfn_t end, bool fast,
	struct ctg_alloc_report *report)
{
	while (pfn < end) {
		const struct ctg_frame *frame = ctg_zone_frame(zone, pfn);
		uint32_t info = ctg_load32_acquire(&frame->info);
		uint64_t word = ctg_load64_relaxed(&frame->word);
		enum ctg_obstacle_kind kind = frame_obstacle(info, word);

		if (kind != CTG_OBSTACLE_NONE && (kind != CTG_OBSTACLE_CACHED || fast)) {
			note_obstacle(report, kind, pfn, word);
			return pfn;
		}
		pfn += ctg_info_step(info);
	}
	return CTG_PFN_NONE;
}

ctg_pfn_t ctg_contig_look(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report)
{
	ctg_pfn_t pfn = ctg_used_head(zone, start), end = start + nr;

	/* A large frame that begins below: it is looked at where it begins. */
	if (pfn < start && look_in_block(zone, pfn, pfn + 1, false, report) != CTG_PFN_NONE)
		return start;
	for (pfn = start; pfn < end; pfn = ctg_block_start(pfn) + CTG_PAGEBLOCK_FRAMES) {
		ctg_pfn_t stop = ctg_block_start(pfn) + CTG_PAGEBLOCK_FRAMES, held;

		if (ctg_hint_load(&ctg_zone_block(zone, pfn)->nr_free) == CTG_PAGEBLOCK_FRAMES)
			continue;
		held = look_in_block(zone, pfn, stop < end ? stop : end, is_fast(request), report);
		if (held != CTG_PFN_NONE)
			return held;
	}
	return CTG_PFN_NONE;
}

int ctg_contig_wait_unheld(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report)
{
	struct ctg *ctg = zone->ctg;
	const struct ctg_port *port = &ctg->port;
	uint64_t now = port->now(port->host);
	uint64_t patience = is_fast(request) ? now : now + NORMAL_ROUNDS * LOOK_AGAIN_NS;

	while (ctg_contig_look(zone, start, nr, request, report) != CTG_PFN_NONE) {
		int ret;

		if (now >= patience || report->obstacle == CTG_OBSTACLE_UNMOVABLE)
			return -CTG_EBUSY;
		ret = ctg_frame_wait(ctg, report->obstacle_pfn, report->obstacle_word,
			wait_until(request, now, LOOK_AGAIN_NS), true);
		if (ret != -CTG_EINTR)
			ret = ctg_request_check(ctg, request);
		if (ret != 0)
			return ret;
		now = port->now(port->host);
	}
	return 0;
}

/* ---- putting --------------------------------------------------------------------------------- */

/*
 * Drop one reference. true: nobody else held the frame, nobody waits, and its word is 0: it is to
 * be freed by the caller. Otherwise it has been freed already, or *held counts it.
 */
static bool put_one(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t *held)
{
	struct ctg_frame *frame = ctg_zone_frame(zone, pfn);
	uint64_t word = CTG_WORD_REF1, counts;

	if (ctg_cas64_acq_rel(&frame->word, &word, 0))
		return true;
	do {
		/* Two threads give the same range back: what is gone is not taken twice. */
		if (ctg_word_ref(word) == 0 || ctg_word_frozen(word))
			return false;
	} while (!ctg_cas64_acq_rel(&frame->word, &word, word - CTG_WORD_REF1));
	counts = (word - CTG_WORD_REF1) & ~CTG_WORD_FLAGS;
	if (counts == 0) {
		ctg_frame_free(zone->ctg, pfn);
		return false;
	}
	++*held;
	if ((word & CTG_WORD_WAITERS) != 0) {
		ctg_and64_acq_rel(&frame->word, ~CTG_WORD_WAITERS);
		ctg_frame_wake(zone->ctg, pfn);
	}
	return false;
}

static uint64_t put_range(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr, bool zeroed)
{
	ctg_pfn_t run = start, end = start + nr;
	uint64_t held = 0;

	for (ctg_pfn_t pfn = start; pfn < end; pfn++) {
		if (put_one(zone, pfn, &held))
			continue;
		if (pfn > run)
			ctg_free_run(zone, run, pfn - run, zeroed);
		run = pfn + 1;
	}
	if (end > run)
		ctg_free_run(zone, run, end - run, zeroed);
	return held;
}

uint64_t ctg_contig_put(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr)
{
	return put_range(zone, start, nr, false);
}

/* ---- taking ---------------------------------------------------------------------------------- */

struct take {
	struct ctg_zone *zone;
	ctg_pfn_t start, end;
	ctg_pfn_t next; /* [start, next) is taken */
	ctg_pfn_t busy; /* what the last try met */
	uint64_t moved; /* frames */
	bool isolated;  /* this call had isolated something */
	const struct ctg_alloc_request *request;
	struct ctg_alloc_report *report;
	/* What of [start, next) is not known to be zero. When they are all in use the last grows.
	 */
	unsigned nr_dirty;
	struct ctg_extent dirty[DIRTY_RUNS];
};

static void note_dirty(struct take *take, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_extent *last = take->nr_dirty != 0 ? &take->dirty[take->nr_dirty - 1] : NULL;

	if (last != NULL && (last->pfn + last->nr == pfn || take->nr_dirty == DIRTY_RUNS))
		last->nr = pfn + nr - last->pfn;
	else
		take->dirty[take->nr_dirty++] = (struct ctg_extent){pfn, nr};
}

/*
 * Take on from take->next, in pieces of a pageblock so that what is known to be zero is known for
 * each. 0: all of it is taken.
 */
static int take_on(struct take *take, const void *owner)
{
	while (take->next < take->end) {
		ctg_pfn_t stop = ctg_block_start(take->next) + CTG_PAGEBLOCK_FRAMES;
		uint64_t nr = (stop < take->end ? stop : take->end) - take->next;
		bool zeroed;
		int ret = ctg_buddy_take_range(
			take->zone, take->next, nr, owner, &zeroed, &take->busy);

		if (ret != 0)
			return ret;
		if (!zeroed)
			note_dirty(take, take->next, nr);
		take->next += nr;
	}
	return 0;
}

/*
 * Undo take_on. Nobody was given the frames, but a stranger may have a reference for a moment (one
 * that looked at what was there before), so they are put like any others.
 */
static void untake(struct take *take)
{
	ctg_pfn_t pfn = take->start;

	for (unsigned i = 0; i < take->nr_dirty; i++) {
		const struct ctg_extent *dirty = &take->dirty[i];

		put_range(take->zone, pfn, dirty->pfn - pfn, true);
		put_range(take->zone, dirty->pfn, dirty->nr, false);
		pfn = dirty->pfn + dirty->nr;
	}
	put_range(take->zone, pfn, take->next - pfn, true);
	take->nr_dirty = 0;
	take->next = take->start;
}

/*
 * A frame that is neither free nor held is on its way from one to the other, on some CPU that is
 * between two steps; there is no event to wait for. When it has arrived, its word or its info has
 * changed, or, if it has become part of a larger free block, its pageblock's count.
 */
static void spin_while_between(struct ctg_zone *zone, ctg_pfn_t pfn)
{
	const struct ctg_port *port = &zone->ctg->port;
	const struct ctg_frame *frame = ctg_zone_frame(zone, pfn);
	const struct ctg_block *block = ctg_zone_block(zone, pfn);
	uint32_t info = ctg_load32_acquire(&frame->info);
	uint16_t nr_free = ctg_hint_load(&block->nr_free);

	for (unsigned i = 0; i < BETWEEN_SPINS; i++) {
		if ((ctg_load64_relaxed(&frame->word) & ~CTG_WORD_FLAGS) != 0 ||
			ctg_load32_acquire(&frame->info) != info ||
			ctg_hint_load(&block->nr_free) != nr_free)
			return;
		port->relax(port->host);
	}
}

/*
 * Migration has found nothing in the way, yet take->busy is not free: somebody has it half-way out
 * of the free lists, or FAST has met a cache. Name it, and wait until it may have changed. 0: look
 * again.
 */
static int wait_for_busy(struct take *take, bool last)
{
	struct ctg *ctg = take->zone->ctg;
	ctg_pfn_t pfn = ctg_used_head(take->zone, take->busy);
	const struct ctg_frame *frame = ctg_zone_frame(take->zone, pfn);
	uint64_t word = ctg_load64_relaxed(&frame->word), until;
	enum ctg_obstacle_kind kind = frame_obstacle(ctg_load32_acquire(&frame->info), word);
	int ret = 0;

	if (kind == CTG_OBSTACLE_NONE)
		kind = CTG_OBSTACLE_REF;
	note_obstacle(take->report, kind, take->busy, word);
	if (last)
		return -CTG_EBUSY;
	until = wait_until(take->request, ctg->port.now(ctg->port.host), LOOK_AGAIN_NS);
	if ((word & ~CTG_WORD_FLAGS) == 0)
		spin_while_between(take->zone, pfn);
	else
		ret = ctg_frame_wait(ctg, pfn, word, until, true);
	return ret == -CTG_EINTR ? ret : ctg_request_check(ctg, take->request);
}

static int migrate(struct take *take, unsigned rounds)
{
	struct ctg_migrate_stats stats = {.obstacle_pfn = CTG_PFN_NONE};
	struct ctg_alloc_report *report = take->report;
	int ret = ctg_migrate_range(take->zone, take->next, take->end - take->next,
		CTG_GFP_MOVABLE | CTG_GFP_SPILL, rounds, take->request, &stats);

	take->moved += stats.frames_moved;
	report->frames_moved += stats.frames_moved;
	report->ns_copy += stats.ns_copy;
	report->ns_install += stats.ns_install;
	if (ret != 0 && stats.obstacle_pfn != CTG_PFN_NONE)
		note_obstacle(report, stats.obstacle, stats.obstacle_pfn, stats.obstacle_word);
	return ret;
}

/* The blocks from take->next on are isolated: empty and take them. */
static int empty_and_take(struct take *take, const void *owner, unsigned rounds)
{
	struct ctg *ctg = take->zone->ctg;
	int ret;

	if (!is_fast(take->request)) {
		ctg_pcp_drain(take->zone);
		ctg_batches_flush(ctg, take->next, take->end - take->next);
	}
	for (unsigned round = 0;; round++) {
		ret = migrate(take, rounds);
		if (ret != 0)
			return ret;
		ret = take_on(take, owner);
		if (ret == 0)
			return 0;
		ret = wait_for_busy(take, round + 1 >= rounds);
		if (ret != 0)
			return ret;
	}
}

/* The first block of [pfn, end) that is isolated now; end if there is none. */
static ctg_pfn_t next_isolated(const struct ctg_zone *zone, ctg_pfn_t pfn, ctg_pfn_t end)
{
	for (; pfn < end; pfn += CTG_PAGEBLOCK_FRAMES)
		if (ctg_hint_load(&ctg_zone_block(zone, pfn)->isolated_by) != NULL)
			return pfn;
	return end;
}

/* Isolate the pageblocks of [take->next, take->end), empty and take them, undo the isolation. */
static int take_isolated(struct take *take, unsigned rounds)
{
	struct ctg_zone *zone = take->zone;
	const struct ctg_port *port = &zone->ctg->port;
	const void *owner = take;
	ctg_pfn_t first = ctg_block_start(take->next), pfn = first;
	uint64_t begun = port->now(port->host);
	/*
	 * Look before anything is isolated: otherwise two who wait for a third would wake each
	 * other by trying.
	 */
	ctg_pfn_t other = next_isolated(zone, first, take->end);
	int ret = other < take->end ? -CTG_EBUSY : 0;

	while (ret == 0 && pfn < take->end) {
		ret = ctg_block_isolate(zone, pfn, owner);
		if (ret == 0)
			pfn += CTG_PAGEBLOCK_FRAMES;
		else
			other = pfn;
	}
	take->isolated = pfn > first;
	take->report->ns_isolate += port->now(port->host) - begun;
	if (ret == 0)
		ret = empty_and_take(take, owner, rounds);
	else
		note_obstacle(take->report, CTG_OBSTACLE_ISOLATED,
			other < take->next ? take->next : other, 0);
	begun = port->now(port->host);
	while (pfn > first) {
		pfn -= CTG_PAGEBLOCK_FRAMES;
		ctg_block_unisolate(zone, pfn, owner);
	}
	take->report->ns_isolate += port->now(port->host) - begun;
	return ret;
}

static int zero_dirty(struct take *take)
{
	struct ctg *ctg = take->zone->ctg;

	while (take->nr_dirty != 0) {
		struct ctg_extent *last = &take->dirty[take->nr_dirty - 1];
		uint64_t nr = last->nr < ZERO_RUN ? last->nr : ZERO_RUN;
		int ret = ctg_request_check(ctg, take->request);

		if (ret == 0)
			ret = ctg->port.zero(ctg->port.host, last->pfn + last->nr - nr, nr);
		if (ret != 0)
			return ret;
		ctg_count(&ctg->counters.frames_zeroed, nr);
		last->nr -= nr;
		if (last->nr == 0)
			take->nr_dirty--;
	}
	return 0;
}

int ctg_contig_take(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr, unsigned rounds, bool zero,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report, bool *isolated)
{
	const struct ctg_port *port = &zone->ctg->port;
	struct take take = {
		.zone = zone,
		.start = start,
		.end = start + nr,
		.next = start,
		.request = request,
		.report = report,
	};
	int ret = ctg_request_check(zone->ctg, request);

	*isolated = false;
	if (ret != 0)
		return ret;
	ret = take_on(&take, NULL);
	if (ret != 0)
		ret = take_isolated(&take, rounds);
	if (ret == 0 && zero) {
		uint64_t begun = port->now(port->host);

		ret = zero_dirty(&take);
		report->ns_zero += port->now(port->host) - begun;
	}
	*isolated = take.isolated;
	if (ret != 0)
		untake(&take);
	else
		report->frames_free += take.moved < nr ? nr - take.moved : 0;
	return ret;
}

/* ---- the public range functions -------------------------------------------------------------- */

/* The zone that all of [start, start + nr) lies in, as memory that has been released; or NULL. */
static struct ctg_zone *zone_of_range(struct ctg *ctg, ctg_pfn_t start, uint64_t nr)
{
	struct ctg_zone *zone;

	if (ctg == NULL || nr == 0)
		return NULL;
	zone = ctg_zone_of(ctg, start);
	if (zone == NULL || nr > zone->nr - (start - zone->base))
		return NULL;
	for (ctg_pfn_t pfn = ctg_block_start(start); pfn < start + nr; pfn += CTG_PAGEBLOCK_FRAMES)
		if (!ctg_hint_load(&ctg_zone_block(zone, pfn)->released))
			return NULL;
	return zone;
}

/* Does the range satisfy what its own request asks for? */
static bool range_suits(ctg_pfn_t start, uint64_t nr, const struct ctg_alloc_request *request)
{
	if (request == NULL)
		return true;
	if ((start & (((uint64_t)1 << request->align_order) - 1)) != 0)
		return false;
	if (request->limit != 0 && start + nr > request->limit)
		return false;
	return request->boundary == 0 ||
	       ((start ^ (start + nr - 1)) & ~(request->boundary - 1)) == 0;
}

static int take_range(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report)
{
	bool zero = request == NULL || (request->flags & CTG_ALLOC_NO_ZERO) == 0;
	uint64_t until = 0;

	for (;;) {
		uint32_t seen = ctg_load32_acquire(&zone->isolation_ended);
		bool isolated;
		int ret;

		report->windows_tried++;
		ret = ctg_contig_wait_unheld(zone, start, nr, request, report);
		if (ret != 0)
			return ret;
		ret = ctg_contig_take(zone, start, nr, ctg_mode_rounds(request), zero, request,
			report, &isolated);
		if (isolated)
			ctg_isolation_ended(zone);
		if (ret != -CTG_EBUSY || report->obstacle != CTG_OBSTACLE_ISOLATED ||
			is_fast(request))
			return ret;
		ret = ctg_isolation_wait(zone, isolated ? seen + 1 : seen, &until, request);
		if (ret != 0)
			return ret;
	}
}

int ctg_alloc_contig_range(
	struct ctg *ctg, ctg_pfn_t start, uint64_t nr, const struct ctg_alloc_request *request)
{
	struct ctg_zone *zone = zone_of_range(ctg, start, nr);
	struct ctg_alloc_report report;
	int ret = -CTG_EINVAL;

	ctg_report_init(&report);
	if (zone != NULL && ctg_request_validate(request, nr) == 0 &&
		range_suits(start, nr, request)) {
		uint64_t begun = ctg->port.now(ctg->port.host);

		ret = take_range(zone, start, nr, request, &report);
		report.ns_total = ctg->port.now(ctg->port.host) - begun;
	}
	report.result = ret;
	if (ret == -CTG_EBUSY)
		ctg_pins_name(ctg, &report);
	if (request != NULL && request->report != NULL)
		*request->report = report;
	return ret;
}

/* ---- giving back ----------------------------------------------------------------------------- */

int ctg_free_contig_range(struct ctg *ctg, ctg_pfn_t start, uint64_t nr, uint64_t *held)
{
	struct ctg_zone *zone = zone_of_range(ctg, start, nr);
	uint64_t nr_held;

	if (zone == NULL)
		return -CTG_EINVAL;
	/* What an area has given out goes back to the area. */
	if (ctg_areas_overlap(ctg, start, nr))
		return -CTG_EINVAL;
	for (ctg_pfn_t pfn = start; pfn < start + nr; pfn++) {
		const struct ctg_frame *frame = ctg_zone_frame(zone, pfn);

		if (ctg_info_state(ctg_load32_acquire(&frame->info)) != CTG_FRAME_CONTIG ||
			ctg_word_ref(ctg_load64_relaxed(&frame->word)) == 0)
			return -CTG_EINVAL;
	}
	nr_held = ctg_contig_put(zone, start, nr);
	if (held != NULL)
		*held = nr_held;
	return 0;
}
