/* SPDX-License-Identifier: MIT */
/*
 * The buddy allocator of a zone. The invariants are in buddy.h.
 *
 * A request takes the smallest block that suffices from the lists of its own types. When they are
 * empty, ordinary memory changes sides: a whole free pageblock of the other type is retyped; if
 * there is none, an unmovable request retypes the pageblock it breaks into, so that the next one
 * finds its place there, and a movable one takes what it needs and changes nothing. Areas never
 * take part in that.
 */
#include "buddy.h"

static unsigned log2_floor(uint64_t n)
{
	return 63u - (unsigned)__builtin_clzll(n);
}

/* Order of the largest block that begins at pfn and has at most nr frames. */
static unsigned piece_order(ctg_pfn_t pfn, uint64_t nr, unsigned limit)
{
	unsigned order = log2_floor(nr);

	if (pfn != 0 && (unsigned)__builtin_ctzll(pfn) < order)
		order = (unsigned)__builtin_ctzll(pfn);
	return order < limit ? order : limit;
}

static void add_nr_free(struct ctg_zone *zone, unsigned mt, uint64_t nr)
{
	ctg_hint_store(&zone->nr_free[mt], zone->nr_free[mt] + nr);
}

void ctg_buddy_link(
	struct ctg_zone *zone, ctg_pfn_t pfn, unsigned order, enum ctg_migratetype mt, bool zeroed)
{
	struct ctg_free_list *list = &zone->free[order][mt];
	struct ctg_frame *frame = ctg_zone_frame(zone, pfn);
	uint32_t link = (uint32_t)(pfn - zone->base) + 1;

	CTG_ASSERT(pfn % ((uint64_t)1 << order) == 0);
	frame->link.prev = 0;
	frame->link.next = list->first;
	if (list->first != 0)
		zone->frames[list->first - 1].link.prev = link;
	list->first = link;
	list->nr++;
	add_nr_free(zone, mt, (uint64_t)1 << order);
	ctg_store32_release(
		&frame->info, CTG_INFO(CTG_FRAME_FREE, order, mt, zeroed ? CTG_FRAME_ZEROED : 0));
}

void ctg_buddy_unlink(struct ctg_zone *zone, ctg_pfn_t pfn, uint32_t info)
{
	unsigned order = ctg_info_order(info);
	struct ctg_free_list *list = &zone->free[order][ctg_info_mt(info)];
	struct ctg_frame *frame = ctg_zone_frame(zone, pfn);

	CTG_ASSERT(ctg_info_state(info) == CTG_FRAME_FREE);
	if (frame->link.prev != 0)
		zone->frames[frame->link.prev - 1].link.next = frame->link.next;
	else
		list->first = frame->link.next;
	if (frame->link.next != 0)
		zone->frames[frame->link.next - 1].link.prev = frame->link.prev;
	list->nr--;
	add_nr_free(zone, ctg_info_mt(info), -((uint64_t)1 << order));
	ctg_store32_relaxed(&frame->info, CTG_FRAME_TAIL);
}

void ctg_buddy_link_pieces(
	struct ctg_zone *zone, ctg_pfn_t from, ctg_pfn_t to, enum ctg_migratetype mt, bool zeroed)
{
	while (from < to) {
		unsigned order = piece_order(from, to - from, CTG_MAX_ORDER);

		ctg_buddy_link(zone, from, order, mt, zeroed);
		from += (uint64_t)1 << order;
	}
}

void ctg_buddy_merge(
	struct ctg_zone *zone, ctg_pfn_t pfn, unsigned order, enum ctg_migratetype mt, bool zeroed)
{
	unsigned limit = mt == CTG_MIGRATE_ISOLATE ? CTG_PAGEBLOCK_ORDER : CTG_MAX_ORDER;

	for (; order < limit; order++) {
		ctg_pfn_t buddy = pfn ^ (uint64_t)1 << order;
		uint32_t info;

		/* The metadata of a hole may not be there to be read. */
		if (buddy - zone->base >= zone->nr || !ctg_zone_block(zone, buddy)->released)
			break;
		info = ctg_load32_relaxed(&ctg_zone_frame(zone, buddy)->info);
		if (ctg_info_state(info) != CTG_FRAME_FREE || ctg_info_order(info) != order ||
			ctg_info_mt(info) != (unsigned)mt)
			break;
		if ((ctg_info_flags(info) & CTG_FRAME_ZEROED) == 0)
			zeroed = false;
		ctg_buddy_unlink(zone, buddy, info);
		pfn &= ~((uint64_t)1 << order);
	}
	ctg_buddy_link(zone, pfn, order, mt, zeroed);
}

void ctg_buddy_account(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool freed)
{
	ctg_pfn_t end = pfn + nr;

	ctg_runs_mark(zone, pfn, nr);
	while (pfn < end) {
		struct ctg_block *block = ctg_zone_block(zone, pfn);
		ctg_pfn_t next = ctg_block_start(pfn) + CTG_PAGEBLOCK_FRAMES;
		uint16_t part = (uint16_t)((next < end ? next : end) - pfn);
		uint16_t nr_free = block->nr_free;

		CTG_ASSERT(freed ? nr_free + part <= (int)CTG_PAGEBLOCK_FRAMES : nr_free >= part);
		nr_free = (uint16_t)(freed ? nr_free + part : nr_free - part);
		ctg_hint_store(&block->nr_free, nr_free);
		pfn = next;
	}
}

ctg_pfn_t ctg_buddy_find(const struct ctg_zone *zone, ctg_pfn_t pfn, uint32_t *info)
{
	for (unsigned order = 0; order <= CTG_MAX_ORDER; order++) {
		ctg_pfn_t head = pfn & ~(((uint64_t)1 << order) - 1);

		if (order != 0 && head == (pfn & ~(((uint64_t)1 << (order - 1)) - 1)))
			continue;
		if (head - zone->base >= zone->nr || !ctg_zone_block(zone, head)->released)
			break;
		*info = ctg_load32_relaxed(&ctg_zone_frame(zone, head)->info);
		if (ctg_info_state(*info) == CTG_FRAME_TAIL)
			continue;
		if (ctg_info_state(*info) == CTG_FRAME_FREE &&
			pfn - head < (uint64_t)1 << ctg_info_order(*info))
			return head;
		break;
	}
	return CTG_PFN_NONE;
}

bool ctg_buddy_take(struct ctg_zone *zone, unsigned order, enum ctg_migratetype mt, ctg_pfn_t *pfn,
	bool *zeroed)
{
	for (unsigned o = order; o <= CTG_MAX_ORDER; o++) {
		uint32_t first = zone->free[o][mt].first;
		uint32_t info;

		if (first == 0)
			continue;
		*pfn = zone->base + first - 1;
		info = ctg_load32_relaxed(&ctg_zone_frame(zone, *pfn)->info);
		*zeroed = (ctg_info_flags(info) & CTG_FRAME_ZEROED) != 0;
		ctg_buddy_unlink(zone, *pfn, info);
		ctg_buddy_link_pieces(zone, *pfn + ((uint64_t)1 << order),
			*pfn + ((uint64_t)1 << o), mt, *zeroed);
		return true;
	}
	return false;
}

unsigned ctg_gfp_types(unsigned gfp, enum ctg_migratetype types[2])
{
	unsigned nr = 0;

	if ((gfp & CTG_GFP_MOVABLE) == 0) {
		types[nr++] = CTG_MIGRATE_UNMOVABLE;
		return nr;
	}
	if ((gfp & CTG_GFP_NO_CMA) == 0)
		types[nr++] = CTG_MIGRATE_CMA;
	if ((gfp & CTG_GFP_NO_ORDINARY) == 0)
		types[nr++] = CTG_MIGRATE_MOVABLE;
	return nr;
}

static void set_type(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, enum ctg_migratetype mt)
{
	for (ctg_pfn_t p = pfn; p < pfn + nr; p += CTG_PAGEBLOCK_FRAMES) {
		CTG_ASSERT(ctg_zone_block(zone, p)->migratetype != CTG_MIGRATE_CMA);
		ctg_hint_store(&ctg_zone_block(zone, p)->migratetype, (uint8_t)mt);
	}
}

/* As ctg_buddy_take, for a request of type `to` that only the lists of `from` can serve. */
static bool steal(struct ctg_zone *zone, unsigned order, enum ctg_migratetype from,
	enum ctg_migratetype to, ctg_pfn_t *pfn, bool *zeroed)
{
	unsigned whole = order > CTG_PAGEBLOCK_ORDER ? order : CTG_PAGEBLOCK_ORDER;

	if (ctg_buddy_take(zone, whole, from, pfn, zeroed)) {
		set_type(zone, *pfn, (uint64_t)1 << whole, to);
		ctg_buddy_link_pieces(zone, *pfn + ((uint64_t)1 << order),
			*pfn + ((uint64_t)1 << whole), to, *zeroed);
		return true;
	}
	if (order >= CTG_PAGEBLOCK_ORDER)
		return false;
	if (to == CTG_MIGRATE_MOVABLE)
		return ctg_buddy_take(zone, order, from, pfn, zeroed);
	/* The largest piece: its pageblock has most to offer to the next of our kind. */
	for (unsigned o = CTG_PAGEBLOCK_ORDER; o-- > order;) {
		ctg_pfn_t start;

		if (zone->free[o][from].first == 0)
			continue;
		start = ctg_block_start(zone->base + zone->free[o][from].first - 1);
		ctg_block_move_free(zone, start, to);
		set_type(zone, start, CTG_PAGEBLOCK_FRAMES, to);
		return ctg_buddy_take(zone, order, to, pfn, zeroed);
	}
	return false;
}

static bool take_for(
	struct ctg_zone *zone, unsigned order, unsigned gfp, ctg_pfn_t *pfn, bool *zeroed)
{
	enum ctg_migratetype types[2];
	unsigned nr = ctg_gfp_types(gfp, types);

	for (unsigned i = 0; i < nr; i++)
		if (ctg_buddy_take(zone, order, types[i], pfn, zeroed))
			return true;
	if ((gfp & CTG_GFP_MOVABLE) == 0)
		return steal(zone, order, CTG_MIGRATE_MOVABLE, CTG_MIGRATE_UNMOVABLE, pfn, zeroed);
	if ((gfp & CTG_GFP_NO_ORDINARY) == 0)
		return steal(zone, order, CTG_MIGRATE_UNMOVABLE, CTG_MIGRATE_MOVABLE, pfn, zeroed);
	return false;
}

uint32_t ctg_used_info(const struct ctg_zone *zone, ctg_pfn_t pfn, unsigned order, unsigned gfp)
{
	unsigned mt = ctg_hint_load(&ctg_zone_block(zone, pfn)->migratetype);
	unsigned flags = (gfp & CTG_GFP_MOVABLE) != 0 ? 0 : CTG_FRAME_UNMOVABLE;

	return CTG_INFO(CTG_FRAME_USED, order, mt, flags);
}

int ctg_buddy_alloc(struct ctg_zone *zone, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order, bool *zeroed)
{
	const struct ctg_port *port = &zone->ctg->port;
	int ret = -CTG_ENOMEM;

	CTG_ASSERT(max_order <= CTG_MAX_ORDER);
	ctg_lock(port, &zone->lock);
	for (unsigned o = max_order + 1; ret != 0 && o-- > min_order;) {
		if (!take_for(zone, o, gfp, pfn, zeroed))
			continue;
		*order = o;
		ctg_buddy_account(zone, *pfn, (uint64_t)1 << o, false);
		ctg_store32_release(
			&ctg_zone_frame(zone, *pfn)->info, ctg_used_info(zone, *pfn, o, gfp));
		ret = 0;
	}
	ctg_unlock(port, &zone->lock);
	return ret;
}

/* Frames from pfn on, nr at most, of one type, within what blocks of that type may span. */
static uint64_t same_type(const struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	const struct ctg_block *block = ctg_zone_block(zone, pfn);
	uint64_t same = ctg_block_start(pfn) + CTG_PAGEBLOCK_FRAMES - pfn;
	enum ctg_migratetype mt = ctg_block_type(block);

	while (same < nr && mt != CTG_MIGRATE_ISOLATE && ctg_block_type(++block) == mt)
		same += CTG_PAGEBLOCK_FRAMES;
	return same < nr ? same : nr;
}

void ctg_buddy_free_locked(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed)
{
	ctg_buddy_account(zone, pfn, nr, true);
	while (nr != 0) {
		enum ctg_migratetype mt = ctg_block_type(ctg_zone_block(zone, pfn));
		uint64_t same = same_type(zone, pfn, nr);

		nr -= same;
		while (same != 0) {
			unsigned order = piece_order(pfn, same, CTG_MAX_ORDER);

			ctg_buddy_merge(zone, pfn, order, mt, zeroed);
			pfn += (uint64_t)1 << order;
			same -= (uint64_t)1 << order;
		}
	}
}

/* Infos that are cleared under one hold of the lock, if they do not end in mid-pageblock. */
#define CLEAR_BATCH 512

/*
 * Make TAIL of every head in [pfn, pfn + nr), or as far as one hold of the lock may go; returns how
 * far. Only heads are visited: a TAIL at an address with n low zero bits is inside a block that
 * begins before it (or never was part of one), and so is the rest of the 2^n frames.
 */
static uint64_t clear_heads(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr)
{
	ctg_pfn_t p = pfn;
	unsigned visited = 0;

	while (p - pfn < nr) {
		struct ctg_block *block = ctg_zone_block(zone, p);
		struct ctg_frame *frame = ctg_zone_frame(zone, p);
		uint32_t info = ctg_load32_relaxed(&frame->info);
		unsigned order = 0;

		if (visited++ >= CLEAR_BATCH && p % CTG_PAGEBLOCK_FRAMES == 0)
			break;
		CTG_ASSERT(ctg_info_state(info) != CTG_FRAME_FREE);
		CTG_ASSERT(ctg_load64_relaxed(&frame->word) == 0);
		if (ctg_info_state(info) == CTG_FRAME_TAIL) {
			order = piece_order(p, (uint64_t)1 << CTG_MAX_ORDER, CTG_MAX_ORDER);
		} else {
			ctg_store32_relaxed(&frame->info, CTG_FRAME_TAIL);
			if (ctg_info_state(info) == CTG_FRAME_CONTIG)
				ctg_hint_store(&block->nr_contig, (uint16_t)(block->nr_contig - 1));
			order = ctg_info_order(info);
		}
		p += (uint64_t)1 << order;
	}
	return p - pfn < nr ? p - pfn : nr;
}

void ctg_buddy_free_range(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed)
{
	const struct ctg_port *port = &zone->ctg->port;

	while (nr != 0) {
		uint64_t part;

		ctg_lock(port, &zone->lock);
		part = clear_heads(zone, pfn, nr);
		ctg_buddy_free_locked(zone, pfn, part, zeroed);
		ctg_unlock(port, &zone->lock);
		pfn += part;
		nr -= part;
	}
}

/* The first frame of [pfn, end) that may not be taken for owner; end: there is none. */
static ctg_pfn_t first_busy(
	const struct ctg_zone *zone, ctg_pfn_t pfn, ctg_pfn_t end, const void *owner, bool *zeroed)
{
	*zeroed = true;
	while (pfn < end) {
		const struct ctg_block *block = ctg_zone_block(zone, pfn);
		uint32_t info;
		ctg_pfn_t head;

		if (!block->released || block->isolated_by != owner)
			return pfn;
		head = ctg_buddy_find(zone, pfn, &info);
		if (head == CTG_PFN_NONE)
			return pfn;
		if ((ctg_info_flags(info) & CTG_FRAME_ZEROED) == 0)
			*zeroed = false;
		pfn = head + ((uint64_t)1 << ctg_info_order(info));
	}
	return end;
}

/* Take [pfn, end), all free, off the lists; what else the blocks had goes back. */
static void cut(struct ctg_zone *zone, ctg_pfn_t pfn, ctg_pfn_t end)
{
	ctg_buddy_account(zone, pfn, end - pfn, false);
	for (ctg_pfn_t p = pfn; p < end;) {
		struct ctg_block *block = ctg_zone_block(zone, p);
		ctg_pfn_t next = ctg_block_start(p) + CTG_PAGEBLOCK_FRAMES;
		uint64_t part = (next < end ? next : end) - p;

		ctg_hint_store(&block->nr_contig, (uint16_t)(block->nr_contig + part));
		p = next;
	}
	while (pfn < end) {
		uint32_t info = 0;
		ctg_pfn_t head = ctg_buddy_find(zone, pfn, &info);
		ctg_pfn_t past = head + ((uint64_t)1 << ctg_info_order(info));
		enum ctg_migratetype mt = (enum ctg_migratetype)ctg_info_mt(info);
		bool zeroed = (ctg_info_flags(info) & CTG_FRAME_ZEROED) != 0;

		ctg_buddy_unlink(zone, head, info);
		ctg_buddy_link_pieces(zone, head, pfn, mt, zeroed);
		ctg_buddy_link_pieces(zone, end, past, mt, zeroed);
		pfn = past;
	}
}

int ctg_buddy_take_range(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, const void *owner,
	bool *zeroed, ctg_pfn_t *busy)
{
	const struct ctg_port *port = &zone->ctg->port;
	ctg_pfn_t end = pfn + nr;

	CTG_ASSERT(nr != 0 && pfn - zone->base < zone->nr && end - zone->base <= zone->nr);
	ctg_lock(port, &zone->lock);
	*busy = first_busy(zone, pfn, end, owner, zeroed);
	if (*busy == end)
		cut(zone, pfn, end);
	ctg_unlock(port, &zone->lock);
	if (*busy != end)
		return -CTG_EBUSY;
	/*
	 * The frames are ours and their infos TAIL, so they need no lock: writing 300 MiB's worth
	 * of them takes longer than anybody should wait for one.
	 */
	for (ctg_pfn_t p = pfn; p < end; p++) {
		struct ctg_frame *frame = ctg_zone_frame(zone, p);
		unsigned mt = ctg_hint_load(&ctg_zone_block(zone, p)->migratetype);

		ctg_store32_relaxed(&frame->info, CTG_INFO(CTG_FRAME_CONTIG, 0, mt, 0));
		ctg_store64_release(&frame->word, CTG_WORD_REF1);
	}
	return 0;
}
