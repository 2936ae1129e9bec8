/* SPDX-License-Identifier: MIT */
/*
 * Moving a batch of frames under the eyes of those who use them.
 *
 *   tell      those who mirror the pages let go of them
 *   mark      every entry of a source becomes MOVING: writes through it will fault and wait
 *   get       destinations (and tables, for large frames that go in pieces)
 *   restrict  the port makes sure that no write is possible; reads go on
 *   copy
 *   switch    freeze the source, point its entries to the destination
 *   install   the port makes the mapping agree
 *   let go    the source is free, the writers go on
 *
 * One family at a time; its lock is held from mark to install, so the list of address spaces stays
 * as it is and MOVING belongs to one migration. Nothing else is held across a hook.
 *
 * Why freeze and switch are right. The counts of a source are, at any time: one for each entry that
 * says it, one for each entry that munmap has cleared and whose batch is not flushed, ours, and
 * those of strangers. munmap clears an entry under its table's lock and the batch drops the
 * count later, without any lock of ours: so a frame may not be frozen while a batch counts on it,
 * or the drop would hit FROZEN. Therefore the tables of ALL entries of a source are locked, the
 * entries that still say it are counted, and the source is frozen from exactly that count and
 * our one reference. If that succeeds no batch counts on it, and none can begin to, since no
 * entry can be cleared before it has been switched and says something else. If it fails because of
 * a batch, the batch is flushed (by us) and there is one more try. An entry that was cleared is
 * simply not there any more: it is not counted and not switched.
 *
 * All this happens within one stretch under the tables' locks. So nobody who has a table locked
 * ever sees an entry that says a frozen frame.
 *
 * Until the port has installed it, a destination is held by a reference of ours. No write goes
 * through its entries before (tlb_restrict: no write until tlb_install), so if the port cannot
 * install, the source still has the right contents and the entries can be put back.
 */
#include "move.h"

/* ---- entries ----------------------------------------------------------------------------- */

/* Lock, in every address space of the family, the table that governs a slot of 2 MiB. */
static void lock_slot(struct ctg_moves *b, ctg_vpn_t vpn)
{
	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next)
		ctg_pte_lock(mm, vpn & ~(CTG_PAGEBLOCK_FRAMES - 1), &mm->slot);
}

static void unlock_slot(struct ctg_moves *b)
{
	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next)
		if (mm->slot.table != NULL)
			ctg_pte_unlock(mm, &mm->slot);
}

/* Call fn for each move of the family in a state, with the tables of all its entries locked. */
static void each_move(struct ctg_moves *b, enum ctg_move_state state,
	void (*fn)(struct ctg_moves *, struct ctg_move *))
{
	const ctg_vpn_t none = CTG_MM_MAX_VPN;
	ctg_vpn_t locked = none;

	for (unsigned i = b->from; i < b->to; i++) {
		struct ctg_move *m = &b->move[i];
		ctg_vpn_t slot = m->vpn >> CTG_PAGEBLOCK_ORDER;

		if (m->state != state)
			continue;
		if (slot != locked) {
			if (locked != none)
				unlock_slot(b);
			lock_slot(b, m->vpn);
			locked = slot;
		}
		fn(b, m);
	}
	if (locked != none)
		unlock_slot(b);
}

/*
 * A walk over the entries that say the frame of a move, in every address space of the family. The
 * tables are locked.
 */
struct entries {
	const struct ctg_move *m;
	const ctg_pfn_t *dst; /* its destinations; NULL: look for its source */
	struct ctg_mm *mm;
	unsigned member; /* which of the family mm is */
	unsigned page;   /* of the entry in ref */
	unsigned next;
	struct ctg_pte_ref ref;
};

static struct entries entries_of(
	const struct ctg_moves *b, const struct ctg_move *m, const ctg_pfn_t *dst)
{
	return (struct entries){.m = m, .dst = dst, .mm = b->anon->mms};
}

/*
 * A large frame is one entry of level 1, or pieces of level 0; a small one is at level 0. A huge
 * one is one entry of level 2: where it is in pieces these are not looked for, so that it is never
 * frozen, and stays. The slot may be in other use by now: an entry is ours only if it says our
 * frame.
 */
static bool next_in_space(struct entries *e)
{
	const struct ctg_pte_ref *slot = &e->mm->slot;

	if (slot->table == NULL || (slot->level > 1) != e->m->huge)
		return false;
	while (e->next < ctg_move_pages(e->m)) {
		unsigned index = slot->index;
		uint64_t entry;
		ctg_pfn_t pfn;

		e->page = e->next;
		e->next = slot->level == 1 ? CTG_MOVE_LARGE : e->page + 1;
		if (slot->level == 0)
			index = (unsigned)(e->m->vpn + e->page) % CTG_TABLE_ENTRIES;
		pfn = e->dst != NULL ? e->dst[e->page] : e->m->src + e->page;
		entry = ctg_load64_relaxed(&slot->table->entry[index]);
		if ((entry & CTG_PTE_PRESENT) != 0 && ctg_pte_pfn(entry) == pfn) {
			e->ref = (struct ctg_pte_ref){slot->table, index, slot->level, entry};
			return true;
		}
	}
	return false;
}

static bool next_entry(struct entries *e)
{
	while (e->mm != NULL) {
		if (next_in_space(e))
			return true;
		e->mm = e->mm->family_next;
		e->member++;
		e->next = 0;
	}
	return false;
}

static uint64_t entry_flags(uint64_t entry)
{
	return entry & (((uint64_t)1 << CTG_PTE_PFN_SHIFT) - 1);
}

/* Add a range to nr that do not begin above it. Returns how many there are then; none overlap. */
static size_t add_range(struct ctg_vrange *range, size_t nr, ctg_vpn_t vpn, uint64_t pages)
{
	struct ctg_vrange *last = nr != 0 ? &range[nr - 1] : NULL;

	if (last == NULL || last->vpn + last->nr < vpn)
		range[nr++] = (struct ctg_vrange){vpn, pages};
	else if (last->vpn + last->nr < vpn + pages)
		last->nr = vpn + pages - last->vpn;
	return nr;
}

/* ---- tell -------------------------------------------------------------------------------- */

/*
 * Does an entry of mm say the frame? Looked up without a lock: entries for a frame that is mapped
 * do not come into being but by a fork, in a child that nobody can mirror before it is done.
 */
static bool space_says(struct ctg_mm *mm, const struct ctg_move *m)
{
	ctg_vpn_t vpn = m->vpn, end = m->vpn + ctg_move_frames(m);

	while (vpn < end) {
		unsigned level;
		uint64_t entry = ctg_pte_read(mm, vpn, &level);

		if ((entry & CTG_PTE_PRESENT) != 0 &&
			ctg_pte_pfn(entry) - m->src < ctg_move_frames(m))
			return true;
		vpn = (vpn | (ctg_level_pages(level) - 1)) + 1;
	}
	return false;
}

/*
 * Who has ever been asked to tell is told of the beginning and the end, whatever its pages are: the
 * family's lock keeps that as it is, and the list of address spaces too.
 */
static void notify_start(struct ctg_moves *b)
{
	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next) {
		size_t nr = 0;

		if (mm->notifiers == NULL)
			continue;
		for (unsigned i = b->from; i < b->to; i++) {
			const struct ctg_move *m = &b->move[i];

			if (space_says(mm, m))
				nr = add_range(b->range, nr, m->vpn, ctg_move_frames(m));
		}
		ctg_notify_start(mm, b->range, nr, CTG_NOTIFY_MIGRATE, true);
	}
}

static void notify_end(struct ctg_moves *b)
{
	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next)
		ctg_notify_end(mm);
}

/* ---- mark -------------------------------------------------------------------------------- */

/* Make the entries MOVING, and say in dst[] which pages have any. */
static void mark_one(struct ctg_moves *b, struct ctg_move *m)
{
	struct entries e = entries_of(b, m, NULL);

	m->entries = 0;
	m->members = 0;
	while (next_entry(&e)) {
		/* It is set under the family's lock and cleared before that is let go. */
		CTG_ASSERT((e.ref.entry & CTG_PTE_MOVING) == 0);
		ctg_pte_set(&e.ref, e.ref.entry | CTG_PTE_MOVING);
		m->entries++;
		m->members |= ctg_move_member(e.member);
		for (unsigned page = e.page; page < e.next; page++)
			b->dst[m->first + page] = CTG_MOVE_WANTED;
	}
	if (m->entries != 0)
		m->state = CTG_MOVE_MARKED;
}

static void unmark_one(struct ctg_moves *b, struct ctg_move *m)
{
	struct entries e = entries_of(b, m, NULL);

	while (next_entry(&e))
		ctg_pte_set(&e.ref, e.ref.entry & ~CTG_PTE_MOVING);
	m->state = CTG_MOVE_NONE;
}

/* Flush the batches that hold mappings of those moves which have more than their entries. */
static void flush_unaccounted(struct ctg_moves *b)
{
	ctg_pfn_t low = CTG_PFN_NONE, high = 0;

	for (unsigned i = b->from; i < b->to; i++) {
		const struct ctg_move *m = &b->move[i];
		uint64_t word = ctg_move_word(b, m);

		if (m->state == CTG_MOVE_SWITCHED || ctg_word_map(word) <= m->entries)
			continue;
		if (m->src < low)
			low = m->src;
		if (m->src + ctg_move_frames(m) > high)
			high = m->src + ctg_move_frames(m);
	}
	if (low < high)
		ctg_batches_flush(b->ctg, low, high - low);
}

/*
 * Leave out early what freezing would refuse. What is not mapped at all any more and held by us
 * alone is not in the way: it is free when we let go.
 */
static void account(struct ctg_moves *b)
{
	flush_unaccounted(b);
	for (unsigned i = b->from; i < b->to; i++) {
		struct ctg_move *m = &b->move[i];
		uint64_t word = ctg_move_word(b, m);
		enum ctg_obstacle_kind kind = ctg_word_obstacle(word, m->entries, 1);

		if (kind != CTG_OBSTACLE_NONE)
			ctg_move_fail(b, m, kind, word, -CTG_EBUSY);
	}
	each_move(b, CTG_MOVE_DOOMED, unmark_one);
}

/* ---- the port ---------------------------------------------------------------------------- */

/* The pages of a slot of 2 MiB, a bit each. */
struct slot {
	ctg_vpn_t vpn;
	uint64_t pages[CTG_PAGEBLOCK_FRAMES / 64];
};

/* Set the bits of a move's pages that were mapped when it was marked. */
static void slot_add(struct slot *slot, const struct ctg_moves *b, const struct ctg_move *m)
{
	for (unsigned page = 0; page < ctg_move_pages(m); page++) {
		uint64_t bit = m->vpn - slot->vpn + page;

		if (b->dst[m->first + page] != CTG_PFN_NONE)
			slot->pages[bit / 64] |= (uint64_t)1 << bit % 64;
	}
}

/* Append the runs of a slot to nr ranges, none of which begins above it. Returns how many then. */
static size_t slot_ranges(const struct slot *slot, struct ctg_vrange *range, size_t nr)
{
	for (unsigned bit = 0; bit < CTG_PAGEBLOCK_FRAMES; bit++) {
		uint64_t rest = slot->pages[bit / 64] >> bit % 64;

		if (rest == 0) {
			bit |= 63;
			continue;
		}
		bit += (unsigned)__builtin_ctzll(rest);
		nr = add_range(range, nr, slot->vpn + bit, 1);
	}
	return nr;
}

/*
 * Add a huge move, which is mapped whole. Only where a bit stands for many members does it share
 * pages with other moves; their ranges that do not begin below it lie within it.
 */
static size_t huge_range(const struct ctg_move *m, struct ctg_vrange *range, size_t nr)
{
	while (nr != 0 && range[nr - 1].vpn >= m->vpn)
		nr--;
	return add_range(range, nr, m->vpn, ctg_move_frames(m));
}

/*
 * The pages of one member on which the port holds writers back, or is to do so. Slot by slot,
 * because pages of a large frame that were given up may have been mapped anew, to frames that move
 * too: so the pages of several moves may alternate. After a fork several frames are at one address,
 * of different members: where a bit stands for many of these, pages in common are said once.
 */
static size_t collect_ranges(struct ctg_moves *b, unsigned member)
{
	struct slot slot = {.vpn = CTG_MM_MAX_VPN};
	size_t nr = 0;

	for (unsigned i = b->from; i < b->to; i++) {
		const struct ctg_move *m = &b->move[i];
		ctg_vpn_t vpn = m->vpn & ~(CTG_PAGEBLOCK_FRAMES - 1);

		if (!m->restricted || (m->members & ctg_move_member(member)) == 0)
			continue;
		if (vpn != slot.vpn || m->huge) {
			nr = slot_ranges(&slot, b->range, nr);
			slot = (struct slot){.vpn = vpn};
		}
		if (m->huge)
			nr = huge_range(m, b->range, nr);
		else
			slot_add(&slot, b, m);
	}
	return slot_ranges(&slot, b->range, nr);
}

static void doom(struct ctg_moves *b, enum ctg_obstacle_kind kind, int error)
{
	for (unsigned i = b->from; i < b->to; i++)
		if (b->move[i].state == CTG_MOVE_MARKED)
			ctg_move_fail(b, &b->move[i], kind, ctg_move_word(b, &b->move[i]), error);
}

static void restrict_writes(struct ctg_moves *b)
{
	const struct ctg_port *port = &b->ctg->port;
	struct ctg_mm *mm = b->anon->mms;
	int ret = 0;

	for (unsigned i = b->from; i < b->to; i++)
		b->move[i].restricted = b->move[i].state == CTG_MOVE_MARKED;
	for (b->nr_told = 0; ret == 0 && mm != NULL; mm = mm->family_next) {
		size_t nr = collect_ranges(b, b->nr_told++);

		if (nr != 0)
			ret = port->tlb_restrict(port->host, mm, b->range, nr, CTG_TLB_WRPROTECT);
	}
	if (ret != 0)
		doom(b, CTG_OBSTACLE_PORT, ret == -CTG_ENOMEM ? ret : -CTG_EBUSY);
}

/* Pages of moves in a state as the longest runs; *nr_pages is how many there are in all. */
static size_t collect_runs(struct ctg_moves *b, enum ctg_move_state state, uint64_t *nr_pages)
{
	size_t nr = 0;

	*nr_pages = 0;
	for (unsigned i = b->from; i < b->to; i++) {
		const struct ctg_move *m = &b->move[i];

		for (unsigned page = 0; m->state == state && page < ctg_move_pages(m); page++) {
			struct ctg_copy_run *last = nr != 0 ? &b->run[nr - 1] : NULL;
			ctg_pfn_t src = m->src + page, dst = b->dst[m->first + page];

			if (dst == CTG_PFN_NONE)
				continue;
			*nr_pages += ctg_move_step(m);
			if (last != NULL && last->src + last->nr == src &&
				last->dst + last->nr == dst)
				last->nr += ctg_move_step(m);
			else
				b->run[nr++] = (struct ctg_copy_run){dst, src, ctg_move_step(m)};
		}
	}
	return nr;
}

static void copy(struct ctg_moves *b)
{
	const struct ctg_port *port = &b->ctg->port;
	uint64_t begun = port->now(port->host), pages;
	size_t nr = collect_runs(b, CTG_MOVE_MARKED, &pages);

	if (nr == 0)
		return;
	if (port->copy(port->host, b->run, nr) != 0)
		doom(b, CTG_OBSTACLE_NO_MEMORY, -CTG_ENOMEM);
	b->stats->ns_copy += port->now(port->host) - begun;
}

/* ---- switch ------------------------------------------------------------------------------ */

/* Say whose the destinations are. We hold their only references, but for a stranger's glance. */
static void own_destinations(struct ctg_moves *b, const struct ctg_move *m)
{
	if (m->whole != CTG_PFN_NONE) {
		ctg_anon_own(b->ctg, m->anon, m->whole, m->vpn);
		return;
	}
	for (unsigned page = 0; page < ctg_move_pages(m); page++)
		if (b->dst[m->first + page] != CTG_PFN_NONE)
			ctg_anon_own(b->ctg, m->anon, b->dst[m->first + page], m->vpn + page);
}

/* The frame whose word counts the mappings of a page's destination. */
static struct ctg_frame *counting_frame(
	const struct ctg_moves *b, const struct ctg_move *m, unsigned page)
{
	return ctg_frame_of(b->ctg, m->whole != CTG_PFN_NONE ? m->whole : b->dst[m->first + page]);
}

/* One large entry becomes a table of pieces, each in its own frame. */
static void switch_to_pieces(struct ctg_moves *b, const struct ctg_move *m, struct entries *e)
{
	struct ctg_table *table = e->mm->pieces;
	uint64_t flags = entry_flags(e->ref.entry) & ~CTG_PTE_MOVING;

	CTG_ASSERT(table != NULL);
	e->mm->pieces = table->next;
	for (unsigned page = 0; page < CTG_MOVE_LARGE; page++) {
		ctg_pfn_t pfn = b->dst[m->first + page];

		CTG_ASSERT(pfn < CTG_MOVE_WANTED);
		ctg_add64_acq_rel(&ctg_frame_of(b->ctg, pfn)->word, CTG_WORD_MAP1);
		ctg_store64_release(&table->entry[page], ctg_pte(pfn, flags));
	}
	ctg_pte_set_table(e->mm, &e->ref, table);
	e->mm->slot.table = NULL; /* that has unlocked it */
}

static void switch_entry(struct ctg_moves *b, const struct ctg_move *m, struct entries *e)
{
	ctg_pfn_t pfn = b->dst[m->first + e->page];

	if (e->ref.level == 1 && m->whole == CTG_PFN_NONE) {
		switch_to_pieces(b, m, e);
		return;
	}
	/* The rights as they are by now, YOUNG and DIRTY. */
	ctg_add64_acq_rel(&counting_frame(b, m, e->page)->word, CTG_WORD_MAP1);
	ctg_pte_set(&e->ref, ctg_pte(pfn, entry_flags(e->ref.entry) & ~CTG_PTE_MOVING));
}

static void switch_one(struct ctg_moves *b, struct ctg_move *m)
{
	struct entries e = entries_of(b, m, NULL);
	bool shared = false;

	m->entries = 0;
	while (next_entry(&e)) {
		if ((e.ref.entry & CTG_PTE_MOVING) != 0)
			m->entries++;
		else
			shared = true;
	}
	if (shared) {
		/*
		 * A fork has come in between. Its child, whose entry is not MOVING and whose
		 * port has not been asked to hold writers back, keeps the frame where it is.
		 */
		m->seen = ctg_move_word(b, m);
		return;
	}
	if (m->entries == 0) { /* unmapped meanwhile: it is free when its last holder has gone */
		m->state = CTG_MOVE_NONE;
		return;
	}
	if (!ctg_frame_freeze(ctg_move_source(b, m), m->entries, 1, &m->seen))
		return; /* still MARKED */
	own_destinations(b, m);
	e = entries_of(b, m, NULL);
	while (next_entry(&e))
		switch_entry(b, m, &e);
	m->state = CTG_MOVE_SWITCHED;
}

/*
 * What cannot be frozen is held by somebody: by a batch, which we flush, or by a stranger, and then
 * it stays this time.
 */
static void switch_all(struct ctg_moves *b)
{
	each_move(b, CTG_MOVE_MARKED, switch_one);
	flush_unaccounted(b);
	each_move(b, CTG_MOVE_MARKED, switch_one);
	for (unsigned i = b->from; i < b->to; i++) {
		struct ctg_move *m = &b->move[i];

		if (m->state == CTG_MOVE_MARKED)
			ctg_move_fail(b, m, ctg_word_obstacle(m->seen, m->entries, 1), m->seen,
				-CTG_EBUSY);
	}
	each_move(b, CTG_MOVE_DOOMED, unmark_one);
}

/* ---- install ----------------------------------------------------------------------------- */

/* Drop a mapping of a frame that we hold a reference on, unless somebody else holds it, too. */
static bool drop_unheld(struct ctg_frame *frame)
{
	uint64_t word = ctg_load64_relaxed(&frame->word);

	do {
		CTG_ASSERT(!ctg_word_frozen(word) && ctg_word_map(word) != 0);
		if (ctg_word_pin(word) != 0 || ctg_word_ref(word) > 1)
			return false;
	} while (!ctg_cas64_acq_rel(&frame->word, &word, word - CTG_WORD_MAP1));
	return true;
}

/* Leave FROZEN under a table's lock: those who wait are woken when our reference is dropped. */
static void thaw(struct ctg_frame *frame, uint64_t counts)
{
	uint64_t word = ctg_load64_relaxed(&frame->word);

	do {
		CTG_ASSERT(ctg_word_frozen(word));
	} while (!ctg_cas64_acq_rel(&frame->word, &word, counts | (word & CTG_WORD_FLAGS)));
}

/*
 * The port could not install: point the entries back to the source. Not if they are installed in
 * another address space, where they may have been written to, not where somebody holds the
 * destination, and not those of a child that was forked since: it shares the destination, copy-on-
 * write, with entries that say the source again, which has the same contents.
 */
static void put_back_one(struct ctg_moves *b, struct ctg_move *m)
{
	struct entries e = entries_of(b, m, &b->dst[m->first]);
	uint32_t entries = 0;

	if ((m->members & b->installing) == 0 || (m->members & b->installed) != 0)
		return;
	while (next_entry(&e)) {
		ctg_pfn_t dst = ctg_pte_pfn(e.ref.entry);

		if ((m->members & ctg_move_member(e.member)) == 0)
			continue;
		/*
		 * The entry first: whoever pins without a lock after the drop has to look at the
		 * entry again. It says the source, which nobody can pin while it is frozen.
		 */
		ctg_pte_set(&e.ref, ctg_pte(m->src + e.page, entry_flags(e.ref.entry)));
		if (drop_unheld(counting_frame(b, m, e.page)))
			entries++;
		else
			ctg_pte_set(&e.ref, ctg_pte(dst, entry_flags(e.ref.entry)));
	}
	if (entries == 0)
		return;
	thaw(ctg_move_source(b, m), entries * CTG_WORD_MAP1 + CTG_WORD_REF1);
	m->state = CTG_MOVE_NONE;
	ctg_move_fail(b, m, CTG_OBSTACLE_PORT, ctg_move_word(b, m), b->port_error);
}

static void install(struct ctg_moves *b)
{
	const struct ctg_port *port = &b->ctg->port;
	struct ctg_mm *mm = b->anon->mms;

	b->installed = 0;
	for (unsigned member = 0; mm != NULL && member < b->nr_told; member++) {
		size_t nr = collect_ranges(b, member);
		int ret = nr == 0 ? 0 : port->tlb_install(port->host, mm, b->range, nr);

		b->installing = ctg_move_member(member);
		if (ret != 0) {
			b->port_error = ret == -CTG_ENOMEM ? ret : -CTG_EBUSY;
			each_move(b, CTG_MOVE_SWITCHED, put_back_one);
			/* The table says again what the port has: this call must not fail. */
			ret = port->tlb_install(port->host, mm, b->range, nr);
			CTG_ASSERT(ret == 0);
		}
		b->installed |= b->installing;
		mm = mm->family_next;
	}
}

/* ---- let go ------------------------------------------------------------------------------ */

static void wake_writers(struct ctg_moves *b)
{
	const struct ctg_port *port = &b->ctg->port;

	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next) {
		ctg_add32_acq_rel(&mm->moved, 1);
		port->wake(port->host, &mm->moved, UINT32_MAX);
	}
}

static void report(struct ctg_moves *b)
{
	uint64_t pages;
	size_t nr = collect_runs(b, CTG_MOVE_SWITCHED, &pages);

	for (size_t i = 0; i < nr; i++)
		ctg_trace(b->ctg, CTG_EVENT_MIGRATE, b->run[i].src, b->run[i].nr, b->run[i].dst,
			NULL);
	b->frames_moved += pages;
	b->stats->frames_moved += pages;
	ctg_count(&b->ctg->counters.frames_migrated, pages);
}

/*
 * The charge goes along. A large frame that goes in pieces has given up those that were not mapped
 * any more. (One that was put back but for pinned pieces stays charged for all of its size, and
 * they are not.)
 */
static void move_charge(struct ctg_moves *b, const struct ctg_move *m)
{
	struct ctg_frame *source = ctg_move_source(b, m);
	uint64_t nr = ctg_move_frames(m);
	uint16_t group = source->group;

	if (m->state != CTG_MOVE_SWITCHED || group == 0)
		return;
	source->group = 0;
	if (m->whole != CTG_PFN_NONE) {
		ctg_frame_of(b->ctg, m->whole)->group = group;
		return;
	}
	for (unsigned page = 0; page < ctg_move_pages(m); page++) {
		ctg_pfn_t pfn = b->dst[m->first + page];

		if (pfn == CTG_PFN_NONE)
			continue;
		ctg_frame_of(b->ctg, pfn)->group = group;
		nr--;
	}
	ctg_group_uncharge_index(b->ctg, group, nr);
}

/* Free what has moved: in runs, except what somebody waits for. */
static void free_sources(struct ctg_moves *b)
{
	struct ctg_extent run = {0};

	for (unsigned i = b->from; i < b->to; i++) {
		const struct ctg_move *m = &b->move[i];
		uint64_t word = CTG_WORD_FROZEN;

		if (m->state != CTG_MOVE_SWITCHED)
			continue;
		if (!ctg_cas64_acq_rel(&ctg_move_source(b, m)->word, &word, 0)) {
			ctg_frame_free(b->ctg, m->src);
			continue;
		}
		if (run.nr != 0 && run.pfn + run.nr != m->src) {
			ctg_free_run(b->zone, run.pfn, run.nr, false);
			run.nr = 0;
		}
		if (run.nr == 0)
			run.pfn = m->src;
		run.nr += ctg_move_frames(m);
	}
	if (run.nr != 0)
		ctg_free_run(b->zone, run.pfn, run.nr, false);
}

static void let_go(struct ctg_moves *b)
{
	report(b);
	for (unsigned i = b->from; i < b->to; i++)
		move_charge(b, &b->move[i]);
	free_sources(b);
	for (unsigned i = b->from; i < b->to; i++) {
		struct ctg_move *m = &b->move[i];

		ctg_move_put(b, m, false);
		if (m->state != CTG_MOVE_SWITCHED)
			ctg_frame_put(b->ctg, m->src, CTG_WORD_REF1, 1);
	}
}

/* ---- all of it --------------------------------------------------------------------------- */

/* Frames that are not mapped any more have no family to lock: any that is mapped will do. */
static bool lock_family(struct ctg_moves *b)
{
	b->anon = NULL;
	for (unsigned i = b->from; i < b->to && b->anon == NULL; i++)
		b->anon = ctg_anon_lock(b->ctg, b->move[i].src);
	CTG_ASSERT(b->anon == NULL || b->anon == b->move[b->from].anon);
	return b->anon != NULL;
}

static bool any_marked(const struct ctg_moves *b)
{
	for (unsigned i = b->from; i < b->to; i++)
		if (b->move[i].state == CTG_MOVE_MARKED)
			return true;
	return false;
}

static void move_family(struct ctg_moves *b)
{
	const struct ctg_port *port = &b->ctg->port;
	uint64_t begun, copied;

	if (!lock_family(b)) {
		account(b);
		return;
	}
	notify_start(b);
	each_move(b, CTG_MOVE_NONE, mark_one);
	account(b);
	ctg_moves_get(b);
	each_move(b, CTG_MOVE_DOOMED, unmark_one);
	if (any_marked(b)) {
		begun = port->now(port->host);
		copied = b->stats->ns_copy;
		restrict_writes(b);
		copy(b);
		switch_all(b);
		install(b);
		copied = b->stats->ns_copy - copied;
		b->stats->ns_install += port->now(port->host) - begun - copied;
	}
	notify_end(b);
	ctg_moves_put_tables(b);
	wake_writers(b);
	ctg_unlock(&b->ctg->port, &b->anon->lock);
}

void ctg_moves_run(struct ctg_moves *b)
{
	ctg_moves_sort(b);
	for (b->from = 0; b->from < b->nr; b->from = b->to) {
		for (b->to = b->from + 1; b->to < b->nr; b->to++)
			if (b->move[b->to].anon != b->move[b->from].anon)
				break;
		if (!ctg_moves_pointless(b))
			move_family(b);
		let_go(b);
	}
	b->nr = 0;
	b->nr_pages = 0;
	b->nr_frames = 0;
}
