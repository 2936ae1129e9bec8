/* SPDX-License-Identifier: MIT */
/*
 * Getting and pinning user pages: from addresses to frames that are held.
 *
 * Without a lock, for each page:
 *
 *   G1  read the entry: it must be PRESENT, with the rights, exclusive if the frame is to be pinned
 *       or written, not MOVING if it is to be written
 *   G2  one compare-and-swap on the frame's word adds the count, unless the frame is free, FROZEN,
 *       DRAINING, or the counter is full
 *   G3  read the entry again: if anything but YOUNG and DIRTY differs, let go and take the lock
 *
 * Whoever takes a frame away from an address space, or shares it, changes the entry first and then
 * the word, in a compare-and-swap that looks for pins (fork), for any holder (freezing), or by
 * dropping its own count (unmap). Both do an atomic on the same word, so one of them is second. If
 * it is the other, he sees our count. If it is us, G2 has synchronised with his, so G3 sees the
 * entry that he changed before. No fence is needed, and no lock.
 *
 * Between G2 and G3 the frame may be another's by now, who then sees a holder that is not his. He
 * has to live with that: see "traps" in the design. We are the one who frees it if he lets go
 * first.
 *
 * Where the head of a large frame is, is judged by the frames' infos. That may be out of date at
 * G1, so it is checked after G2: while the head has a count it stays a head, of as many frames.
 *
 * Under the table's lock an entry does not change and its frame is not frozen, so G2 is enough.
 */
#include "gup.h"

/* What is to be done about a page. */
enum verdict {
	HOLD,     /* hold it; or it is held */
	DENIED,   /* not mapped, or the rights forbid it */
	ABSENT,   /* fault it in */
	SHARED,   /* copy-on-write: it must be the mm's own first */
	MOVING,   /* to be written, and a migration copies it */
	LENDABLE, /* it may not stay where it is */
	DRAINING, /* the frame grants no new holds now */
	FULL,     /* its counter is at the end */
	CHANGED,  /* look again */
};

/* ---- frames ---------------------------------------------------------------------------------- */

/* The zone in which pfn is memory that has been released: only there are frames looked at. */
static struct ctg_zone *zone_of_memory(struct ctg *ctg, struct ctg_zone *guess, ctg_pfn_t pfn)
{
	struct ctg_zone *zone = guess;

	if (zone == NULL || pfn - zone->base >= zone->nr)
		zone = ctg_zone_of(ctg, pfn);
	if (zone == NULL || !ctg_hint_load(&ctg_zone_block(zone, pfn)->released))
		return NULL;
	return zone;
}

/* Only frames of order 0, 9 and 18 are mapped. */
static ctg_pfn_t head_in_zone(const struct ctg_zone *zone, ctg_pfn_t pfn, unsigned *order)
{
	for (unsigned at = 0; at <= CTG_MAX_ORDER; at += CTG_PAGEBLOCK_ORDER) {
		ctg_pfn_t head = pfn & ~(((uint64_t)1 << at) - 1);
		uint32_t info;

		if (head < zone->base || !ctg_hint_load(&ctg_zone_block(zone, head)->released))
			break;
		info = ctg_load32_acquire(&ctg_zone_frame(zone, head)->info);
		*order = ctg_info_order(info);
		if (ctg_info_state(info) == CTG_FRAME_ANON)
			return *order >= at ? head : CTG_PFN_NONE;
		if (ctg_info_state(info) != CTG_FRAME_TAIL)
			break;
	}
	return CTG_PFN_NONE;
}

ctg_pfn_t ctg_hold_head(struct ctg *ctg, ctg_pfn_t pfn, unsigned *order)
{
	const struct ctg_zone *zone = zone_of_memory(ctg, NULL, pfn);

	return zone == NULL ? CTG_PFN_NONE : head_in_zone(zone, pfn, order);
}

void ctg_drop_end(struct ctg_drop *drop)
{
	if (drop->owed != 0)
		ctg_pin_account_sub(drop->ctg, drop->account, drop->owed);
	drop->owed = 0;
}

uint32_t ctg_drop_some(struct ctg_drop *drop, ctg_pfn_t head, uint32_t nr)
{
	/* While the pin is there it is on that account; afterwards the frame may be anybody's. */
	uint16_t account = ctg_load16_relaxed(&ctg_frame_of(drop->ctg, head)->pin_account);

	nr = ctg_frame_put_some(drop->ctg, head, drop->one, nr);
	if (nr == 0 || drop->one != CTG_WORD_PIN1)
		return nr;
	if (account != drop->account)
		ctg_drop_end(drop);
	drop->account = account;
	drop->owed += nr;
	return nr;
}

/* G2. *nr: how many are wanted, then how many there was room for. */
static enum verdict add_counts(struct ctg_frame *frame, uint64_t one, uint64_t *nr, uint64_t *seen)
{
	bool pin = one == CTG_WORD_PIN1;
	uint64_t word = ctg_load64_relaxed(&frame->word), add;

	do {
		uint32_t has = pin ? ctg_word_pin(word) : ctg_word_ref(word);
		uint32_t max = pin ? CTG_WORD_PIN_MAX : CTG_WORD_REF_MAX;

		*seen = word;
		if ((word & ~CTG_WORD_FLAGS) == 0 || ctg_word_frozen(word))
			return CHANGED;
		if ((word & CTG_WORD_DRAINING) != 0)
			return DRAINING;
		if (has >= max)
			return FULL;
		add = *nr < max - has ? *nr : max - has;
	} while (!ctg_cas64_acq_rel(&frame->word, &word, word + add * one));
	*nr = add;
	return HOLD;
}

/* ---- one entry ------------------------------------------------------------------------------- */

static enum verdict judge_entry(const struct ctg_hold *h, uint64_t entry)
{
	bool write = (h->flags & CTG_FOLL_WRITE) != 0;

	if ((entry & (write ? CTG_PTE_WRITE : CTG_PTE_READ)) == 0)
		return DENIED;
	if ((entry & CTG_PTE_PRESENT) == 0)
		return ABSENT;
	if (write && (entry & CTG_PTE_MOVING) != 0)
		return MOVING;
	if ((entry & CTG_PTE_COW) != 0 && (write || h->one == CTG_WORD_PIN1))
		return SHARED;
	return HOLD;
}

/* A page on its way to be held: where it is, by the entry that was read. */
struct page {
	uint64_t entry;
	unsigned level;
	ctg_pfn_t pfn;  /* of vpn */
	ctg_pfn_t head; /* of its frame */
	uint64_t nr;    /* pages wanted of this entry, then those that are held */
	uint64_t taken; /* counts */
	uint64_t seen;  /* the word, if it was refused */
};

static struct page page_at(ctg_vpn_t vpn, uint64_t nr, uint64_t entry, unsigned level)
{
	uint64_t at = vpn & (ctg_level_pages(level) - 1), left = ctg_level_pages(level) - at;

	return (struct page){.entry = entry,
		.level = level,
		.pfn = ctg_pte_pfn(entry) + at,
		.nr = nr < left ? nr : left};
}

/*
 * Take the counts for a page whose entry has been judged. A frame that this call has just held,
 * with one count for all of it, has them already: that its next page's entry is read after that is
 * enough.
 */
static enum verdict hold_page(struct ctg_hold *h, struct page *page)
{
	enum verdict verdict;
	unsigned order;

	h->zone = zone_of_memory(h->mm->ctg, h->zone, page->pfn);
	page->head = h->zone == NULL ? CTG_PFN_NONE : head_in_zone(h->zone, page->pfn, &order);
	if (page->head == CTG_PFN_NONE)
		return CHANGED;
	if (h->per_frame && page->head == h->head && page->pfn == h->next)
		return HOLD;
	/* Before the count is taken, so that it does not stop somebody who is moving it. */
	if ((h->flags & CTG_FOLL_LONGTERM) != 0 && ctg_frame_lendable(h->zone, page->head, order))
		return LENDABLE;
	page->taken = h->per_frame ? 1 : page->nr;
	verdict =
		add_counts(ctg_zone_frame(h->zone, page->head), h->one, &page->taken, &page->seen);
	if (verdict != HOLD)
		page->taken = 0;
	else if (!h->per_frame)
		page->nr = page->taken;
	return verdict;
}

/* Is the head still the one that page->pfn has its counts in? It stays so while we hold it. */
static bool head_stands(const struct ctg_hold *h, const struct page *page)
{
	unsigned order;

	return page->head == page->pfn || head_in_zone(h->zone, page->pfn, &order) == page->head;
}

/* The counts are right: note them, and on which account the frame's pins are. */
static void note_held(struct ctg_hold *h, const struct page *page, struct ctg_extent *run)
{
	bool shared = (page->entry & CTG_PTE_SHARED) != 0;

	if (h->one == CTG_WORD_PIN1 && page->taken != 0) {
		ctg_store16_relaxed(&ctg_zone_frame(h->zone, page->head)->pin_account,
			shared ? CTG_ACCOUNT_SHARED : h->account);
		*(shared ? &h->shared : &h->own) += page->taken;
	}
	h->head = page->head;
	h->next = page->pfn + page->nr;
	*run = (struct ctg_extent){page->pfn, page->nr};
}

/* ---- without a lock -------------------------------------------------------------------------- */

/* CHANGED: or anything else that needs the lock. */
static bool hold_fast(struct ctg_hold *h, ctg_vpn_t vpn, uint64_t nr, struct ctg_extent *run)
{
	uint64_t marks = CTG_PTE_YOUNG | ((h->flags & CTG_FOLL_WRITE) != 0 ? CTG_PTE_DIRTY : 0);
	struct page page;

	ctg_pte_look(h->mm, vpn, &h->look);
	if (judge_entry(h, h->look.entry) != HOLD)
		return false;
	page = page_at(vpn, nr, h->look.entry, h->look.level);
	if (hold_page(h, &page) != HOLD)
		return false;
	if (!head_stands(h, &page) || !ctg_pte_look_again(h->mm, &h->look, marks)) {
		/* Not ctg_frame_put: somebody who unpins what is not his may have taken it. */
		if (page.taken != 0)
			ctg_frame_put_some(h->mm->ctg, page.head, h->one, (uint32_t)page.taken);
		return false;
	}
	note_held(h, &page, run);
	return true;
}

/* ---- under the table's lock ------------------------------------------------------------------ */

/* Make the entry say that it has been accessed. Its table is locked. */
static void mark_locked(struct ctg_hold *h, struct ctg_pte_ref *ref)
{
	uint64_t marks = CTG_PTE_YOUNG | ((h->flags & CTG_FOLL_WRITE) != 0 ? CTG_PTE_DIRTY : 0);

	if ((ref->entry & marks) != marks)
		ctg_pte_set(ref, ref->entry | marks);
}

static enum verdict hold_locked(
	struct ctg_hold *h, ctg_vpn_t vpn, uint64_t nr, struct page *page, struct ctg_extent *run)
{
	struct ctg_pte_ref ref;
	enum verdict verdict;

	ctg_pte_lock(h->mm, vpn, &ref);
	verdict = judge_entry(h, ref.entry);
	*page = page_at(vpn, nr, ref.entry, ref.level);
	if (verdict == HOLD)
		verdict = hold_page(h, page);
	if (verdict == HOLD) {
		mark_locked(h, &ref);
		note_held(h, page, run);
	}
	ctg_pte_unlock(h->mm, &ref);
	return verdict;
}

/* While a populate is undone nothing is allowed for a moment: mm->lock tells that from a refusal.
 */
static int deny(struct ctg_hold *h, ctg_vpn_t vpn)
{
	const struct ctg_port *port = &h->mm->ctg->port;
	unsigned level;
	enum verdict verdict;

	ctg_lock(port, &h->mm->lock);
	verdict = judge_entry(h, ctg_pte_read(h->mm, vpn, &level));
	ctg_unlock(port, &h->mm->lock);
	return verdict == DENIED ? -CTG_EFAULT : 0;
}

/* See to it that the page can be held. 0: look again. */
static int make_ready(struct ctg_hold *h, ctg_vpn_t vpn, uint64_t nr, enum verdict verdict,
	const struct page *page, uint32_t moved, struct ctg_patience *patience)
{
	struct ctg_mm *mm = h->mm;
	const struct ctg_port *port = &mm->ctg->port;
	bool longterm = (h->flags & CTG_FOLL_LONGTERM) != 0;
	bool nowait = (h->flags & CTG_FOLL_NOWAIT) != 0;
	int ret;

	switch (verdict) {
	case DENIED:
		return deny(h, vpn);
	case FULL:
		return -CTG_EOVERFLOW;
	case ABSENT:
		return ctg_fault_in(mm, vpn, longterm);
	case SHARED:
		return ctg_cow_unshare(mm, vpn, longterm);
	case LENDABLE:
		return ctg_longterm_move(mm, vpn, nr, h->flags, patience);
	case MOVING:
		if (nowait)
			return -CTG_EAGAIN;
		/* The migration clears MOVING, then raises mm->moved. */
		ret = port->wait(port->host, &mm->moved, moved, CTG_NO_DEADLINE, true);
		return ret == -CTG_EINTR ? ret : 0;
	case DRAINING:
		if (nowait)
			return -CTG_EAGAIN;
		ret = ctg_frame_wait(mm->ctg, page->head, page->seen, CTG_NO_DEADLINE, true);
		return ret == -CTG_EINTR ? ret : 0;
	default:
		return 0;
	}
}

static int hold_slow(struct ctg_hold *h, ctg_vpn_t vpn, uint64_t nr, struct ctg_extent *run)
{
	struct ctg_patience patience = {0};

	for (;;) {
		uint32_t moved = ctg_load32_acquire(&h->mm->moved);
		struct page page;
		enum verdict verdict = hold_locked(h, vpn, nr, &page, run);
		int ret;

		if (verdict == HOLD)
			return 0;
		ret = make_ready(h, vpn, nr, verdict, &page, moved, &patience);
		if (ret != 0)
			return ret;
	}
}

int ctg_hold_some(struct ctg_hold *h, ctg_vpn_t vpn, uint64_t nr, struct ctg_extent *run)
{
	if (h->fast && hold_fast(h, vpn, nr, run))
		return 0;
	return hold_slow(h, vpn, nr, run);
}

/* ---- calls ----------------------------------------------------------------------------------- */

static bool flags_valid(unsigned flags, unsigned kind)
{
	unsigned allowed = kind | CTG_FOLL_WRITE | CTG_FOLL_NOWAIT;

	if (kind == CTG_FOLL_PIN)
		allowed |= CTG_FOLL_LONGTERM;
	return (flags & ~allowed) == 0;
}

int ctg_hold_begin(struct ctg_hold *h, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr,
	unsigned flags, unsigned kind)
{
	if (mm == NULL || nr == 0 || vpn >= CTG_MM_MAX_VPN || nr > CTG_MM_MAX_VPN - vpn ||
		!flags_valid(flags, kind))
		return -CTG_EINVAL;
	*h = (struct ctg_hold){.mm = mm,
		.flags = flags | kind,
		.one = kind == CTG_FOLL_PIN ? CTG_WORD_PIN1 : CTG_WORD_REF1,
		.head = CTG_PFN_NONE,
		.next = CTG_PFN_NONE};
	return kind == CTG_FOLL_PIN ? ctg_pin_account_of(mm, &h->account) : 0;
}

void ctg_hold_end(struct ctg_hold *h)
{
	if (h->own != 0)
		ctg_pin_account_add(h->mm->ctg, h->account, h->own);
	if (h->shared != 0)
		ctg_pin_account_add(h->mm->ctg, CTG_ACCOUNT_SHARED, h->shared);
	h->own = 0;
	h->shared = 0;
}

static int64_t hold_pages(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags,
	unsigned kind, bool fast, ctg_pfn_t *pages)
{
	struct ctg_hold h;
	uint64_t done = 0;
	int ret = pages == NULL ? -CTG_EINVAL : ctg_hold_begin(&h, mm, vpn, nr, flags, kind);

	if (ret != 0)
		return ret;
	h.fast = fast;
	while (done < nr) {
		struct ctg_extent run;

		ret = ctg_hold_some(&h, vpn + done, nr - done, &run);
		if (ret != 0)
			break;
		for (uint64_t i = 0; i < run.nr; i++)
			pages[done++] = run.pfn + i;
	}
	ctg_hold_end(&h);
	if (ret == 0)
		return (int64_t)nr;
	if ((flags & CTG_FOLL_LONGTERM) != 0 && done != 0) {
		ctg_unpin_user_pages(mm->ctg, pages, done);
		done = 0;
	}
	return done != 0 ? (int64_t)done : ret;
}

int64_t ctg_get_user_pages(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages)
{
	return hold_pages(mm, vpn, nr, flags, CTG_FOLL_GET, false, pages);
}

int64_t ctg_pin_user_pages(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages)
{
	return hold_pages(mm, vpn, nr, flags, CTG_FOLL_PIN, false, pages);
}

int64_t ctg_get_user_pages_fast(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages)
{
	return hold_pages(mm, vpn, nr, flags, CTG_FOLL_GET, true, pages);
}

int64_t ctg_pin_user_pages_fast(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages)
{
	return hold_pages(mm, vpn, nr, flags, CTG_FOLL_PIN, true, pages);
}

/* ---- letting go ------------------------------------------------------------------------------ */

/* How many of the elements, from the first on, are pages that follow each other in one frame. */
static uint64_t alike(const ctg_pfn_t *pages, uint64_t nr, ctg_pfn_t head, unsigned order)
{
	uint64_t same = 1;

	while (same < nr && pages[same] == pages[0] + same &&
		pages[same] - head < (uint64_t)1 << order)
		same++;
	return same;
}

/*
 * The caller has a pin, or says so: a reference makes sure. Where there is no room for one, the
 * mark stays that a pin for writing has made.
 */
void ctg_hold_mark_dirty(struct ctg *ctg, ctg_pfn_t pfn, uint64_t nr)
{
	unsigned order;
	ctg_pfn_t head = ctg_hold_head(ctg, pfn, &order);

	if (head == CTG_PFN_NONE || ctg_frame_tryget(ctg_frame_of(ctg, head)) != 0)
		return;
	if (ctg_hold_head(ctg, pfn, &order) == head)
		ctg_anon_mark_dirty(ctg, pfn, nr);
	ctg_frame_put(ctg, head, CTG_WORD_REF1, 1);
}

static int drop_pages(
	struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr, uint64_t one, bool dirty)
{
	struct ctg_drop drop = {.ctg = ctg, .one = one};
	struct ctg_zone *zone = NULL;
	uint64_t done = 0, run;
	int ret = 0;

	if (ctg == NULL || pages == NULL || nr == 0)
		return -CTG_EINVAL;
	for (; done < nr; done += run) {
		ctg_pfn_t head = CTG_PFN_NONE;
		unsigned order;

		zone = zone_of_memory(ctg, zone, pages[done]);
		if (zone != NULL)
			head = head_in_zone(zone, pages[done], &order);
		run = 1;
		if (head == CTG_PFN_NONE) {
			ret = -CTG_EINVAL;
			continue;
		}
		if (order != 0)
			run = alike(pages + done, nr - done, head, order);
		if (dirty)
			ctg_hold_mark_dirty(ctg, pages[done], run);
		if (ctg_drop_some(&drop, head, (uint32_t)run) != run)
			ret = -CTG_EINVAL;
	}
	ctg_drop_end(&drop);
	return ret;
}

int ctg_put_user_pages(struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr)
{
	return drop_pages(ctg, pages, nr, CTG_WORD_REF1, false);
}

int ctg_unpin_user_pages(struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr)
{
	return drop_pages(ctg, pages, nr, CTG_WORD_PIN1, false);
}

int ctg_unpin_user_pages_dirty_lock(
	struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr, bool dirty)
{
	return drop_pages(ctg, pages, nr, CTG_WORD_PIN1, dirty);
}
