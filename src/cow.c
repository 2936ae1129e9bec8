/* SPDX-License-Identifier: MIT */
/*
 * Copy-on-write: how a page becomes exclusive to one address space again.
 *
 * Who has a frame is in its word. If the mappings counted there are the space's own entries and
 * there is no plain reference, nobody else can reach it, and its entries stop being COW. Pins do
 * not matter: a page is exclusive before it is pinned, so a pin is the space's own, or a stranger's
 * that will be let go. A plain reference does: it may be a relative's who has unmapped the page and
 * must not see what is written from now on. Both are one look at one word under the table's lock.
 * What is not there then cannot come: a mapping comes of an entry, by a fork of the space that has
 * it (a fork of ours waits for mm->lock), and so does a reference, but for glances. An unflushed
 * batch keeps a mapping counted that is gone: then there is one copy too many.
 *
 * Otherwise the page is copied, without a tlb_restrict before: all who map the frame are COW, so
 * nobody can write to it. That lasts, because whoever else shares it cannot find itself alone
 * before our mapping is dropped, and that is dropped after the copy. A reference of ours keeps a
 * migration from moving the frame, and freeing it, meanwhile.
 *
 * The copy takes the frame's place in three steps. (1) The entry says the copy and is still COW:
 * other CPUs may read either frame, with the same contents. (2) The old mapping goes through the
 * batch: after its flush nobody reads the old frame. (3) COW is cleared, and writes begin. Were it
 * cleared at once, one CPU could write to the copy while another still reads the old frame.
 *
 * A frame mapped by several entries of the space (a large one that was split): the own entries are
 * counted exactly, by a walk. If they are all that the word counts, all of them in the faulting
 * entry's table are made exclusive, so that there is one walk a table, not one a page.
 */
#include "pgtable.h"

/* An entry that is COW, and what it says. */
struct cow {
	struct ctg_mm *mm;
	ctg_vpn_t vpn; /* first page of the entry */
	uint64_t nr;   /* pages of the entry */
	unsigned level;
	ctg_pfn_t pfn;
	/* Its frame. */
	ctg_pfn_t head;
	uint64_t frame_nr; /* pages */
	ctg_vpn_t index;   /* where its head is mapped */
};

/* Entries of one table, by index, that were COW. */
struct cow_bits {
	uint64_t word[CTG_TABLE_ENTRIES / 64];
};

/* Lock the entry that governs vpn, if it is COW. -ENOENT: it is not; -EAGAIN: it is MOVING. */
static int cow_lock(struct cow *c, struct ctg_mm *mm, ctg_vpn_t vpn, struct ctg_pte_ref *ref)
{
	const struct ctg_frame *frame;
	uint64_t entry;

	ctg_pte_lock(mm, vpn, ref);
	entry = ref->entry;
	if ((entry & CTG_PTE_PRESENT) == 0 || (entry & CTG_PTE_COW) == 0) {
		ctg_pte_unlock(mm, ref);
		return -CTG_ENOENT;
	}
	if ((entry & CTG_PTE_MOVING) != 0) {
		ctg_pte_unlock(mm, ref);
		return -CTG_EAGAIN;
	}
	c->mm = mm;
	c->level = ref->level;
	c->nr = ctg_level_pages(ref->level);
	c->vpn = vpn & ~(c->nr - 1);
	c->pfn = ctg_pte_pfn(entry);
	c->head = ctg_frame_head(mm->ctg, c->pfn);
	frame = ctg_frame_of(mm->ctg, c->head);
	c->frame_nr = (uint64_t)1 << ctg_info_order(ctg_load32_acquire(&frame->info));
	c->index = frame->index;
	return 0;
}

/* Lock the entry again. false: it does not say that frame any more (then it is not locked). */
static bool cow_relock(const struct cow *c, struct ctg_pte_ref *ref)
{
	ctg_pte_lock(c->mm, c->vpn, ref);
	if (ref->level == c->level && (ref->entry & CTG_PTE_PRESENT) != 0 &&
		(ref->entry & CTG_PTE_COW) != 0 && ctg_pte_pfn(ref->entry) == c->pfn)
		return true;
	ctg_pte_unlock(c->mm, ref);
	return false;
}

/* ---- the mapping ----------------------------------------------------------------------------- */

/* Set or clear COW of what is PRESENT in a range that one entry governed. */
static void set_cow(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, bool cow)
{
	struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, vpn + nr);

	while (ctg_pte_walk_next(&walk))
		if ((walk.ref.entry & CTG_PTE_PRESENT) != 0)
			ctg_pte_set(&walk.ref,
				cow ? walk.ref.entry | CTG_PTE_COW : walk.ref.entry & ~CTG_PTE_COW);
}

/* Let writers go on where COW has been cleared. If the port cannot, it is set again. */
static int install(struct ctg_mm *mm, ctg_vpn_t base, uint64_t unit, const struct cow_bits *bits)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_vrange range = {0};
	int ret;

	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++) {
		if ((bits->word[i / 64] >> (i % 64) & 1) == 0)
			continue;
		if (range.nr == 0)
			range.vpn = base + i * unit;
		range.nr = base + (i + 1) * unit - range.vpn;
	}
	ret = port->tlb_install(port->host, mm, &range, 1);
	if (ret == 0)
		return 0;
	/* Who has looked since may write: not any more. */
	ctg_notify_start(mm, &range, 1, CTG_NOTIFY_PROTECT, true);
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		if ((bits->word[i / 64] >> (i % 64) & 1) != 0)
			set_cow(mm, base + i * unit, unit, true);
	port->tlb_install(port->host, mm, &range, 1);
	ctg_notify_end(mm);
	return ret;
}

static int install_entry(const struct cow *c)
{
	const struct cow_bits first = {{1}};

	return install(c->mm, c->vpn, c->nr, &first);
}

/* ---- reuse ----------------------------------------------------------------------------------- */

/*
 * How many entries of the mm say the frame. mm->lock is held, so none is added; a migration that
 * takes them away changes the entry that was looked at first, too.
 */
static uint32_t own_entries(const struct cow *c)
{
	ctg_vpn_t vpn = c->index, end = vpn + c->frame_nr;
	uint32_t nr = 0;

	while (vpn < end) {
		unsigned level;
		uint64_t entry = ctg_pte_read(c->mm, vpn, &level);

		if ((entry & CTG_PTE_PRESENT) != 0 &&
			ctg_pte_pfn(entry) == c->head + (vpn - c->index))
			nr++;
		vpn = (vpn | (ctg_level_pages(level) - 1)) + 1;
	}
	return nr;
}

/* Is the frame mapped by so many entries and otherwise at most pinned? An entry of it is locked. */
static bool alone(const struct cow *c, uint32_t entries)
{
	uint64_t word = ctg_load64_acquire(&ctg_frame_of(c->mm->ctg, c->head)->word);

	CTG_ASSERT(!ctg_word_frozen(word));
	return ctg_word_map(word) == entries && ctg_word_ref(word) == 0;
}

/* Clear COW of all entries of the locked table that say the frame. */
static void clear_in_table(const struct cow *c, struct ctg_pte_ref *ref, struct cow_bits *bits)
{
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++) {
		struct ctg_pte_ref at = {
			ref->table, i, ref->level, ctg_load64_relaxed(&ref->table->entry[i])};
		ctg_vpn_t vpn = ref->table->base + i * c->nr;

		if ((at.entry & CTG_PTE_PRESENT) == 0 || (at.entry & CTG_PTE_COW) == 0 ||
			ctg_pte_pfn(at.entry) - c->head != vpn - c->index)
			continue;
		if (vpn - c->index >= c->frame_nr)
			continue;
		ctg_pte_set(&at, at.entry & ~CTG_PTE_COW);
		bits->word[i / 64] |= (uint64_t)1 << (i % 64);
	}
}

/* A piece of a large frame. -EBUSY: others have the frame too; -ENOENT: the entry has changed. */
static int reuse_piece(const struct cow *c)
{
	struct cow_bits bits = {{0}};
	uint32_t entries = own_entries(c);
	struct ctg_pte_ref ref;
	ctg_vpn_t base;

	if (!cow_relock(c, &ref))
		return -CTG_ENOENT;
	if (!alone(c, entries)) {
		ctg_pte_unlock(c->mm, &ref);
		return -CTG_EBUSY;
	}
	base = ref.table->base;
	clear_in_table(c, &ref, &bits);
	ctg_pte_unlock(c->mm, &ref);
	return install(c->mm, base, c->nr, &bits);
}

/* ---- copy ------------------------------------------------------------------------------------ */

/* Put the copy in the entry's place. -ENOENT: the entry has changed, and the copy is free again. */
static int replace(const struct cow *c, ctg_pfn_t copy)
{
	const uint64_t flags = ((uint64_t)1 << CTG_PTE_PFN_SHIFT) - 1;
	struct ctg_mm *mm = c->mm;
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_pte_ref ref;
	bool added;

	ctg_anon_own(mm->ctg, mm->anon, copy, c->vpn);
	ctg_lock(port, &mm->batch.lock);
	if (!cow_relock(c, &ref)) {
		ctg_unlock(port, &mm->batch.lock);
		ctg_frame_put(mm->ctg, copy, CTG_WORD_REF1, 1);
		return -CTG_ENOENT;
	}
	/* Whoever unmaps flushes before mm->lock is let go. */
	added = ctg_batch_add(&mm->batch, c->vpn, c->pfn, c->nr, c->level != 0);
	CTG_ASSERT(added);
	(void)added;
	ctg_anon_map(mm->ctg, copy);
	/* A migration that has marked the entry will not find it; our reference has stopped it. */
	ctg_pte_set(&ref, ctg_pte(copy, ref.entry & flags & ~CTG_PTE_MOVING));
	ctg_pte_unlock(mm, &ref);
	ctg_unlock(port, &mm->batch.lock);
	ctg_batch_flush(&mm->batch, false);
	/* It may have moved, and gone to pieces, since: but nobody shares it. */
	set_cow(mm, c->vpn, c->nr, false);
	return install_entry(c);
}

static int copy_to(const struct cow *c, ctg_pfn_t copy)
{
	const struct ctg_vrange range = {c->vpn, c->nr};
	const struct ctg_port *port = &c->mm->ctg->port;
	struct ctg_copy_run run = {copy, c->pfn, c->nr};
	int ret = port->copy(port->host, &run, 1);

	if (ret != 0) {
		ctg_frame_put(c->mm->ctg, copy, CTG_WORD_REF1, 1);
		return ret;
	}
	ctg_notify_start(c->mm, &range, 1, CTG_NOTIFY_COPY, true);
	ret = replace(c, copy);
	ctg_notify_end(c->mm);
	return ret;
}

/* No room for all of a large frame: then for as much as there is room for. */
static int copy_less(const struct cow *c, int error)
{
	int ret;

	if (c->level == 0 || (c->level == 1 && c->mm->config.map_order != 0))
		return error;
	ret = ctg_pte_split_to(c->mm, c->vpn, c->level - 1);
	return ret == 0 ? -CTG_ENOENT : ret;
}

/* The entry is locked, and is not on return. -ENOENT: look again. */
static int copy_locked(const struct cow *c, struct ctg_pte_ref *ref, unsigned gfp)
{
	unsigned order = c->level * CTG_PAGEBLOCK_ORDER;
	struct ctg *ctg = c->mm->ctg;
	int ret = ctg_frame_tryget(ctg_frame_of(ctg, c->head));
	ctg_pfn_t copy;

	ctg_pte_unlock(c->mm, ref);
	if (ret != 0)
		return ret;
	ret = ctg_anon_alloc(c->mm, order, order, gfp, &copy, &order);
	ret = ret == 0 ? copy_to(c, copy) : copy_less(c, ret);
	ctg_frame_put(ctg, c->head, CTG_WORD_REF1, 1);
	return ret;
}

/* ---- all of it ------------------------------------------------------------------------------- */

static int break_once(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned gfp)
{
	struct ctg_pte_ref ref;
	struct cow c;
	int ret = cow_lock(&c, mm, vpn, &ref);

	if (ret != 0)
		return ret == -CTG_ENOENT ? 0 : ret;
	if (c.frame_nr == c.nr) {
		if (!alone(&c, 1))
			return copy_locked(&c, &ref, gfp);
		ctg_pte_set(&ref, ref.entry & ~CTG_PTE_COW);
		ctg_pte_unlock(mm, &ref);
		return install_entry(&c);
	}
	ctg_pte_unlock(mm, &ref);
	ret = reuse_piece(&c);
	if (ret != -CTG_EBUSY)
		return ret;
	return cow_relock(&c, &ref) ? copy_locked(&c, &ref, gfp) : -CTG_ENOENT;
}

int ctg_cow_break(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned gfp)
{
	int ret;

	while ((ret = break_once(mm, vpn, gfp)) == -CTG_ENOENT)
		;
	return ret;
}

int ctg_cow_unshare(struct ctg_mm *mm, ctg_vpn_t vpn, bool longterm)
{
	const struct ctg_port *port = &mm->ctg->port;
	unsigned gfp = longterm ? CTG_GFP_NO_CMA | CTG_GFP_SPILL : 0;

	for (;;) {
		uint32_t moved;
		int ret;

		ctg_lock(port, &mm->lock);
		moved = ctg_load32_acquire(&mm->moved);
		ret = ctg_cow_break(mm, vpn, gfp);
		ctg_unlock(port, &mm->lock);
		if (ret != -CTG_EAGAIN)
			return ret;
		/* The migration clears MOVING, then raises mm->moved. */
		ret = port->wait(port->host, &mm->moved, moved, CTG_NO_DEADLINE, true);
		if (ret == -CTG_EINTR)
			return ret;
	}
}
