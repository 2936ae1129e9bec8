/* SPDX-License-Identifier: MIT */
/*
 * Areas: their creation, requests, releases and statistics.
 *
 * area->lock is held while a window is chosen and its bits are set, and for a moment at the end of
 * an attempt; never while frames are moved, zeroed or freed. So requests to one area run in
 * parallel. Bits that an attempt has set count as allocated for everybody else until it has ended.
 */
#include "area.h"
#include "buddy.h"

/* Lost races for a pageblock after which it is left to the others. */
#define COLLISIONS_MAX 32

/* ---- making areas ---------------------------------------------------------------------------- */

static bool name_valid(const char *name)
{
	if (name == NULL || name[0] == '\0')
		return false;
	for (unsigned i = 0; i < CTG_CMA_NAME_MAX; i++)
		if (name[i] == '\0')
			return true;
	return false;
}

static bool names_equal(const char *a, const char *b)
{
	while (*a != '\0' && *a == *b) {
		a++;
		b++;
	}
	return *a == *b;
}

static bool extents_overlap(const struct ctg_extent *a, const struct ctg_extent *b)
{
	return a->pfn < b->pfn + b->nr && b->pfn < a->pfn + a->nr;
}

/* The zone that all ranges lie in, in whole pageblocks and apart from each other; or NULL. */
static struct ctg_zone *ranges_zone(struct ctg *ctg, const struct ctg_cma_config *config)
{
	struct ctg_zone *zone;

	if (config->ranges == NULL || config->nr_ranges == 0 ||
		config->nr_ranges > CTG_CMA_MAX_RANGES)
		return NULL;
	zone = ctg_zone_of(ctg, config->ranges[0].pfn);
	for (size_t i = 0; zone != NULL && i < config->nr_ranges; i++) {
		const struct ctg_extent *range = &config->ranges[i];

		if (range->nr == 0 || (range->pfn | range->nr) % CTG_PAGEBLOCK_FRAMES != 0)
			return NULL;
		if (range->pfn - zone->base >= zone->nr ||
			range->nr > zone->nr - (range->pfn - zone->base))
			return NULL;
		for (size_t j = 0; j < i; j++)
			if (extents_overlap(range, &config->ranges[j]))
				return NULL;
	}
	return zone;
}

/* Bytes of an area's one piece of memory; 0 when a range is too large for a bitmap. */
static size_t area_bytes(const struct ctg_cma_config *config)
{
	size_t bytes = sizeof(struct ctg_cma);

	for (size_t i = 0; i < config->nr_ranges; i++) {
		uint64_t bits = config->ranges[i].nr >> config->order_per_bit;
		size_t map = ctg_bitmap_bytes(bits);

		if (map == 0)
			return 0;
		bytes += map + 2 * ctg_bits_bytes(bits);
	}
	return bytes;
}

static void area_init(struct ctg_cma *cma, struct ctg *ctg, struct ctg_zone *zone,
	const struct ctg_cma_config *config, size_t bytes)
{
	unsigned char *memory = (unsigned char *)(cma + 1);

	cma->ctg = ctg;
	cma->zone = zone;
	for (unsigned i = 0; config->name[i] != '\0'; i++)
		cma->name[i] = config->name[i];
	cma->order_per_bit = config->order_per_bit;
	cma->bytes = bytes;
	cma->nr_ranges = config->nr_ranges;
	for (size_t i = 0; i < config->nr_ranges; i++) {
		struct ctg_area_range *range = &cma->ranges[i];
		uint64_t bits = config->ranges[i].nr >> config->order_per_bit;

		range->base = config->ranges[i].pfn;
		range->nr = config->ranges[i].nr;
		cma->nr += range->nr;
		ctg_bitmap_init(&range->taken, memory, bits);
		memory += ctg_bitmap_bytes(bits);
		range->owned = (uint64_t *)(void *)memory;
		memory += ctg_bits_bytes(bits);
		range->last = (uint64_t *)(void *)memory;
		memory += ctg_bits_bytes(bits);
	}
	CTG_ASSERT(memory == (unsigned char *)cma + bytes);
}

/* Make the ranges' pageblocks the area's, all or none: they must be populated and reserved. */
static int claim_blocks(struct ctg_cma *cma)
{
	const struct ctg_port *port = &cma->ctg->port;
	struct ctg_zone *zone = cma->zone;
	int ret = 0;

	ctg_lock(port, &zone->lock);
	for (size_t i = 0; i < cma->nr_ranges; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];

		for (uint64_t at = 0; at < range->nr; at += CTG_PAGEBLOCK_FRAMES) {
			const struct ctg_block *block = ctg_zone_block(zone, range->base + at);

			if (!block->present || block->released)
				ret = -CTG_EINVAL;
		}
	}
	for (size_t i = 0; ret == 0 && i < cma->nr_ranges; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];

		for (uint64_t at = 0; at < range->nr; at += CTG_PAGEBLOCK_FRAMES) {
			struct ctg_block *block = ctg_zone_block(zone, range->base + at);

			ctg_hint_store(&block->migratetype, (uint8_t)CTG_MIGRATE_CMA);
			ctg_hint_store(&block->released, true);
		}
	}
	ctg_unlock(port, &zone->lock);
	return ret;
}

/* Enter the area into the machine's list, claim its memory and lend it. areas_lock held. */
static int publish(struct ctg *ctg, struct ctg_cma *cma, bool zeroed)
{
	int ret;

	for (unsigned i = 0; i < ctg->nr_areas; i++)
		if (names_equal(ctg->areas[i]->name, cma->name))
			return -CTG_EEXIST;
	if (ctg->nr_areas == CTG_MAX_AREAS)
		return -CTG_ENOSPC;
	ret = claim_blocks(cma);
	if (ret != 0)
		return ret;
	for (size_t i = 0; i < cma->nr_ranges; i++)
		ctg_buddy_free_range(cma->zone, cma->ranges[i].base, cma->ranges[i].nr, zeroed);
	ctg->areas[ctg->nr_areas++] = cma;
	return 0;
}

int ctg_cma_create(struct ctg *ctg, const struct ctg_cma_config *config, struct ctg_cma **out)
{
	const struct ctg_port *port;
	struct ctg_zone *zone;
	struct ctg_cma *cma;
	size_t bytes;
	int ret;

	if (ctg == NULL || config == NULL || !name_valid(config->name))
		return -CTG_EINVAL;
	zone = ranges_zone(ctg, config);
	if (zone == NULL || config->order_per_bit > CTG_PAGEBLOCK_ORDER)
		return -CTG_EINVAL;
	bytes = area_bytes(config);
	if (bytes == 0)
		return -CTG_EINVAL;
	port = &ctg->port;
	cma = port->meta_alloc(port->host, bytes, 64);
	if (cma == NULL)
		return -CTG_ENOMEM;
	area_init(cma, ctg, zone, config, bytes);
	ctg_lock(port, &ctg->areas_lock);
	ret = publish(ctg, cma, config->zeroed);
	ctg_unlock(port, &ctg->areas_lock);
	if (ret != 0) {
		port->meta_free(port->host, cma, bytes);
		return ret;
	}
	if (out != NULL)
		*out = cma;
	return 0;
}

void ctg_cma_destroy_all(struct ctg *ctg)
{
	for (unsigned i = 0; i < ctg->nr_areas; i++)
		ctg->port.meta_free(ctg->port.host, ctg->areas[i], ctg->areas[i]->bytes);
	ctg->nr_areas = 0;
}

/* The area with this index, or NULL. Areas stay until the machine goes. */
static struct ctg_cma *area_at(struct ctg *ctg, unsigned index)
{
	struct ctg_cma *cma;

	ctg_lock(&ctg->port, &ctg->areas_lock);
	cma = index < ctg->nr_areas ? ctg->areas[index] : NULL;
	ctg_unlock(&ctg->port, &ctg->areas_lock);
	return cma;
}

int ctg_cma_for_each(struct ctg *ctg, int (*fn)(struct ctg_cma *cma, void *arg), void *arg)
{
	struct ctg_cma *cma;
	int ret = 0;

	if (ctg == NULL || fn == NULL)
		return -CTG_EINVAL;
	for (unsigned i = 0; ret == 0 && (cma = area_at(ctg, i)) != NULL; i++)
		ret = fn(cma, arg);
	return ret;
}

const char *ctg_cma_name(const struct ctg_cma *cma)
{
	return cma == NULL ? NULL : cma->name;
}

static bool area_holds(struct ctg_cma *cma, const struct ctg_extent *extent)
{
	const struct ctg_port *port = &cma->ctg->port;
	bool holds = false;

	ctg_lock(port, &cma->lock);
	for (size_t i = 0; i < cma->nr_ranges; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];
		struct ctg_extent all = {range->base, range->nr};
		uint64_t from, to;

		if (!extents_overlap(extent, &all))
			continue;
		from = extent->pfn < range->base ? 0 : extent->pfn - range->base;
		to = extent->pfn + extent->nr - range->base;
		if (to > range->nr)
			to = range->nr;
		to = (to + ((uint64_t)1 << cma->order_per_bit) - 1) >> cma->order_per_bit;
		if (ctg_bitmap_next_set(&range->taken, from >> cma->order_per_bit) < to)
			holds = true;
	}
	ctg_unlock(port, &cma->lock);
	return holds;
}

bool ctg_areas_overlap(struct ctg *ctg, ctg_pfn_t start, uint64_t nr)
{
	struct ctg_extent extent = {start, nr};
	struct ctg_cma *cma;

	for (unsigned i = 0; (cma = area_at(ctg, i)) != NULL; i++)
		if (area_holds(cma, &extent))
			return true;
	return false;
}

/* ---- requests -------------------------------------------------------------------------------- */

/* One call of ctg_cma_alloc. */
struct call {
	struct ctg_cma *cma;
	const struct ctg_alloc_request *request;
	bool fast;
	bool met; /* an obstacle has stopped a window */
	unsigned collisions;
	uint64_t wait_until; /* for other allocations; 0: has not waited */
	struct ctg_alloc_report report;
	struct ctg_search search;
};

static void set_window(struct ctg_cma *cma, ctg_pfn_t pfn, uint64_t nr, bool taken)
{
	struct ctg_area_range *range = ctg_area_range_of(cma, pfn);
	uint64_t bit = (pfn - range->base) >> cma->order_per_bit;

	if (taken)
		ctg_bitmap_set(&range->taken, bit, nr >> cma->order_per_bit);
	else
		ctg_bitmap_clear(&range->taken, bit, nr >> cma->order_per_bit);
}

/*
 * Choose a window and set its bits. 0; -EBUSY: there are windows, but none that is worth a try now;
 * -ENOMEM: there is none.
 */
static int reserve_window(struct call *call, ctg_pfn_t *pfn)
{
	struct ctg_cma *cma = call->cma;
	const struct ctg_port *port = &cma->ctg->port;
	uint64_t begun = port->now(port->host);
	int ret = 0;

	ctg_lock(port, &cma->lock);
	if (!ctg_place_fits(cma, &call->search.want)) {
		ret = -CTG_ENOMEM;
	} else {
		*pfn = ctg_place_window(cma, &call->search);
		if (*pfn == CTG_PFN_NONE)
			ret = -CTG_EBUSY;
		else
			set_window(cma, *pfn, call->search.want.nr, true);
	}
	ctg_unlock(port, &cma->lock);
	call->report.ns_search += port->now(port->host) - begun;
	return ret;
}

/*
 * Remember the obstacle that the report names, so that no window with it is chosen again; a
 * pageblock that is isolated is seen by the search itself, as long as it is.
 */
static void remember(struct call *call, ctg_pfn_t start, struct ctg_avoid *avoid)
{
	const struct ctg_zone *zone = call->cma->zone;
	uint64_t nr = call->search.want.nr, step = 1;
	ctg_pfn_t pfn = call->report.obstacle_pfn;

	call->met = true;
	if (call->report.obstacle == CTG_OBSTACLE_ISOLATED && !call->fast &&
		call->collisions++ < COLLISIONS_MAX)
		return;
	/* All of a large frame, which may begin below the window. */
	if (pfn - zone->base < zone->nr)
		step = ctg_info_step(ctg_load32_acquire(&ctg_zone_frame(zone, pfn)->info));
	/* It has changed since, and no longer reaches the window: any frame of that will do. */
	if (pfn >= start + nr || pfn + step <= start) {
		pfn = start;
		step = 1;
	}
	ctg_avoid_add(avoid, pfn, step, nr);
}

/* Try the window whose bits are set. On failure they are clear again, and why is remembered. */
static int try_window(struct call *call, ctg_pfn_t pfn)
{
	struct ctg_cma *cma = call->cma;
	const struct ctg_port *port = &cma->ctg->port;
	const struct ctg_alloc_request *request = call->request;
	bool zero = request == NULL || (request->flags & CTG_ALLOC_NO_ZERO) == 0;
	struct ctg_avoid *avoid = &call->search.failed;
	uint64_t nr = call->search.want.nr, begun = port->now(port->host);
	bool isolated = false;
	int ret = 0;

	call->report.windows_tried++;
	if (call->search.use_held) {
		ret = ctg_contig_wait_unheld(cma->zone, pfn, nr, request, &call->report);
	} else if (ctg_contig_look(cma->zone, pfn, nr, request, &call->report) != CTG_PFN_NONE) {
		ret = -CTG_EBUSY;
		if (!call->fast)
			avoid = &call->search.held;
	}
	call->report.ns_search += port->now(port->host) - begun;
	if (ret == 0)
		ret = ctg_contig_take(cma->zone, pfn, nr, ctg_mode_rounds(request), zero, request,
			&call->report, &isolated);
	if (ret != 0) {
		ctg_lock(port, &cma->lock);
		set_window(cma, pfn, nr, false);
		ctg_unlock(port, &cma->lock);
	}
	/* After the bits: who is woken finds the window as it was. */
	if (isolated)
		ctg_isolation_ended(cma->zone);
	if (ret == -CTG_EBUSY) {
		ctg_trace(cma->ctg, CTG_EVENT_CMA_ALLOC_BUSY, call->report.obstacle_pfn, nr,
			call->report.obstacle_word, cma->name);
		remember(call, pfn, avoid);
	}
	return ret;
}

/* No window is worth a try now. 0: the search should be repeated. */
static int widen_or_wait(struct call *call, uint32_t seen)
{
	struct ctg_search *search = &call->search;

	if (!search->use_held && search->held.nr != 0) {
		search->use_held = true;
		return 0;
	}
	if (search->isolated == CTG_PFN_NONE)
		return -CTG_EBUSY;
	call->report.obstacle = CTG_OBSTACLE_ISOLATED;
	call->report.obstacle_pfn = search->isolated;
	call->report.obstacle_word = 0;
	if (call->fast)
		return -CTG_EBUSY;
	return ctg_isolation_wait(call->cma->zone, seen, &call->wait_until, call->request);
}

static int run_call(struct call *call, ctg_pfn_t *pfn)
{
	struct ctg_zone *zone = call->cma->zone;

	for (;;) {
		uint32_t seen = ctg_load32_acquire(&zone->isolation_ended);
		int ret = ctg_request_check(call->cma->ctg, call->request);

		if (ret == 0)
			ret = reserve_window(call, pfn);
		if (ret == 0) {
			ret = try_window(call, *pfn);
			if (ret != -CTG_EBUSY)
				return ret;
			continue;
		}
		/* The window that was busy has gone to somebody else: it was there, though. */
		if (ret == -CTG_ENOMEM)
			return call->met ? -CTG_EBUSY : ret;
		if (ret == -CTG_EBUSY)
			ret = widen_or_wait(call, seen);
		if (ret != 0)
			return ret;
	}
}

/* The frames are the caller's: let them be released. nr is as it was asked for. */
static void hand_over(struct ctg_cma *cma, ctg_pfn_t pfn, uint64_t nr, uint64_t nr_bits)
{
	const struct ctg_port *port = &cma->ctg->port;
	struct ctg_area_range *range = ctg_area_range_of(cma, pfn);
	uint64_t bit = (pfn - range->base) >> cma->order_per_bit;
	uint64_t before_last = (nr_bits - 1) << cma->order_per_bit;

	ctg_lock(port, &cma->lock);
	ctg_bits_fill(range->owned, bit, nr_bits, true);
	ctg_bits_fill(range->last, bit + nr_bits - 1, 1, true);
	range->nr_owned += nr_bits;
	ctg_zone_frame(cma->zone, pfn + before_last)->index = nr - before_last;
	ctg_unlock(port, &cma->lock);
}

static int alloc_validated(struct call *call, uint64_t nr, ctg_pfn_t *pfn)
{
	struct ctg_cma *cma = call->cma;
	struct ctg *ctg = cma->ctg;
	const struct ctg_want *want = &call->search.want;
	uint64_t begun = ctg->port.now(ctg->port.host);
	ctg_pfn_t found = CTG_PFN_NONE;
	int ret;

	ctg_trace(ctg, CTG_EVENT_CMA_ALLOC_START, CTG_PFN_NONE, want->nr,
		call->request == NULL ? 0 : call->request->align_order, cma->name);
	ret = want->nr > cma->nr ? -CTG_ENOMEM : run_call(call, &found);
	if (ret == 0) {
		hand_over(cma, found, nr, want->nr >> cma->order_per_bit);
		ctg_count(&cma->counters.alloc_success, 1);
		ctg_count(&cma->counters.frames_allocated, want->nr);
		ctg_count(&ctg->counters.cma_alloc_success, 1);
		ctg_count(&ctg->counters.cma_frames_allocated, want->nr);
		*pfn = found;
	} else {
		found = CTG_PFN_NONE;
		ctg_count(&cma->counters.alloc_fail, 1);
		ctg_count(&ctg->counters.cma_alloc_fail, 1);
	}
	ctg_count(&cma->counters.frames_moved, call->report.frames_moved);
	call->report.ns_total = ctg->port.now(ctg->port.host) - begun;
	ctg_trace(ctg, CTG_EVENT_CMA_ALLOC_FINISH, found, want->nr, (uint64_t)(int64_t)ret,
		cma->name);
	return ret;
}

int ctg_cma_alloc(
	struct ctg_cma *cma, uint64_t nr, const struct ctg_alloc_request *request, ctg_pfn_t *pfn)
{
	struct call call = {.cma = cma, .request = request};
	struct ctg_want *want = &call.search.want;
	int ret = -CTG_EINVAL;

	ctg_report_init(&call.report);
	if (cma != NULL && nr != 0 && pfn != NULL) {
		uint64_t bit = (uint64_t)1 << cma->order_per_bit;

		*want = (struct ctg_want){.align = bit, .limit = CTG_PFN_NONE};
		want->nr = nr > cma->nr ? nr : (nr + bit - 1) & ~(bit - 1);
		ret = ctg_request_validate(request, want->nr);
	}
	if (ret == 0 && request != NULL) {
		uint64_t align = (uint64_t)1 << request->align_order;

		if (align > want->align)
			want->align = align;
		if (request->limit != 0)
			want->limit = request->limit;
		want->boundary = request->boundary;
		call.fast = request->mode == CTG_MODE_FAST;
		call.search.first_fit = (request->flags & CTG_ALLOC_FIRST_FIT) != 0;
	}
	if (ret == 0)
		ret = alloc_validated(&call, nr, pfn);
	call.report.result = ret;
	if (ret == -CTG_EBUSY)
		ctg_pins_name(cma->ctg, &call.report);
	if (request != NULL && request->report != NULL)
		*request->report = call.report;
	return ret;
}

/* ---- releases -------------------------------------------------------------------------------- */

/* May [bit, bit + nr_bits) be released, of whose last bit `tail` frames are named? lock held. */
static bool may_release(const struct ctg_cma *cma, const struct ctg_area_range *range, uint64_t bit,
	uint64_t nr_bits, uint64_t tail)
{
	uint64_t last = bit + nr_bits - 1;
	ctg_pfn_t pfn = range->base + (last << cma->order_per_bit);

	if (ctg_bits_next(range->owned, bit, last + 1, false) != last + 1)
		return false;
	if (ctg_bits_next(range->last, bit, last, true) != last)
		return false;
	if (tail == (uint64_t)1 << cma->order_per_bit)
		return true;
	return ctg_bits_test(range->last, last) && ctg_zone_frame(cma->zone, pfn)->index == tail;
}

/* Nobody else can release these bits from here on. What is left below them ends there. */
static void disown(
	struct ctg_cma *cma, struct ctg_area_range *range, uint64_t bit, uint64_t nr_bits)
{
	ctg_bits_fill(range->owned, bit, nr_bits, false);
	ctg_bits_fill(range->last, bit, nr_bits, false);
	range->nr_owned -= nr_bits;
	if (bit != 0 && ctg_bits_test(range->owned, bit - 1) &&
		!ctg_bits_test(range->last, bit - 1)) {
		ctg_pfn_t pfn = range->base + ((bit - 1) << cma->order_per_bit);

		ctg_bits_fill(range->last, bit - 1, 1, true);
		ctg_zone_frame(cma->zone, pfn)->index = (uint64_t)1 << cma->order_per_bit;
	}
}

int ctg_cma_release(struct ctg_cma *cma, ctg_pfn_t pfn, uint64_t nr, uint64_t *held)
{
	struct ctg_area_range *range;
	const struct ctg_port *port;
	uint64_t granule, bit, nr_bits, nr_held;
	bool ok;

	if (cma == NULL || nr == 0)
		return -CTG_EINVAL;
	granule = (uint64_t)1 << cma->order_per_bit;
	range = ctg_area_range_of(cma, pfn);
	if (range == NULL || nr > range->nr - (pfn - range->base) ||
		(pfn - range->base) % granule != 0)
		return -CTG_EINVAL;
	port = &cma->ctg->port;
	bit = (pfn - range->base) >> cma->order_per_bit;
	nr_bits = (nr + granule - 1) >> cma->order_per_bit;
	ctg_lock(port, &cma->lock);
	ok = may_release(cma, range, bit, nr_bits, nr - (nr_bits - 1) * granule);
	if (ok)
		disown(cma, range, bit, nr_bits);
	ctg_unlock(port, &cma->lock);
	if (!ok)
		return -CTG_EINVAL;
	nr = nr_bits * granule;
	nr_held = ctg_contig_put(cma->zone, pfn, nr);
	ctg_lock(port, &cma->lock);
	ctg_bitmap_clear(&range->taken, bit, nr_bits);
	ctg_unlock(port, &cma->lock);
	ctg_count(&cma->counters.frames_released, nr);
	ctg_count(&cma->ctg->counters.cma_frames_released, nr);
	ctg_trace(cma->ctg, CTG_EVENT_CMA_RELEASE, pfn, nr, nr_held, cma->name);
	if (held != NULL)
		*held = nr_held;
	return 0;
}

/* ---- statistics ------------------------------------------------------------------------------ */

/* The longest run of whole bits that are free. zone->lock held. */
static uint64_t longest_free(const struct ctg_cma *cma, const struct ctg_area_range *range)
{
	uint64_t granule = (uint64_t)1 << cma->order_per_bit;
	uint64_t nr = ctg_runs_longest(cma->zone, range->base, range->nr).nr & ~(granule - 1);
	ctg_pfn_t end = range->base + range->nr;

	/* A run that does not begin with a bit is cut at both ends: it loses one bit at most. */
	if (nr != 0 && ctg_runs_find(cma->zone, range->base, end, nr, granule) == CTG_PFN_NONE)
		nr -= granule;
	return nr;
}

void ctg_cma_stat(struct ctg_cma *cma, struct ctg_cma_stat *out)
{
	const struct ctg_port *port;

	if (cma == NULL || out == NULL)
		return;
	port = &cma->ctg->port;
	*out = (struct ctg_cma_stat){
		.nr = cma->nr,
		.order_per_bit = cma->order_per_bit,
		.nr_ranges = cma->nr_ranges,
		.alloc_success = ctg_load64_relaxed(&cma->counters.alloc_success),
		.alloc_fail = ctg_load64_relaxed(&cma->counters.alloc_fail),
		.frames_allocated = ctg_load64_relaxed(&cma->counters.frames_allocated),
		.frames_released = ctg_load64_relaxed(&cma->counters.frames_released),
		.frames_moved = ctg_load64_relaxed(&cma->counters.frames_moved),
	};
	ctg_pcp_drain(cma->zone);
	/* Both locks: what is owned is not free, so the three numbers add up. */
	ctg_lock(port, &cma->lock);
	ctg_lock(port, &cma->zone->lock);
	for (size_t i = 0; i < cma->nr_ranges; i++) {
		const struct ctg_area_range *range = &cma->ranges[i];
		uint64_t unallocated = ctg_bitmap_longest(&range->taken) << cma->order_per_bit;
		uint64_t free = longest_free(cma, range);

		out->ranges[i] = (struct ctg_extent){range->base, range->nr};
		out->nr_allocated += range->nr_owned << cma->order_per_bit;
		for (uint64_t at = 0; at < range->nr; at += CTG_PAGEBLOCK_FRAMES)
			out->nr_free += ctg_zone_block(cma->zone, range->base + at)->nr_free;
		if (unallocated > out->longest_unallocated)
			out->longest_unallocated = unallocated;
		if (free > out->longest_free)
			out->longest_free = free;
	}
	ctg_unlock(port, &cma->zone->lock);
	ctg_unlock(port, &cma->lock);
	out->nr_lent = out->nr - out->nr_allocated - out->nr_free;
}
