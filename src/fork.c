/* SPDX-License-Identifier: MIT */
/*
 * Fork: a relative with the same mappings, copy-on-write.
 *
 * Three steps:
 *
 *   protect   The entries of a batch of slots become COW, and the port sees to it that no CPU
 *             writes through them any more.
 *   share     For each entry, one compare-and-swap of its frame's word adds the child's mapping,
 *             or, if there is a pin, a reference of ours. What is pinned is then copied: the child
 *             gets the copy, and the reference goes.
 *   restore   Once the whole space is done, what was copied is exclusive to the parent again.
 *
 * The child is a snapshot of one moment. The parent's lock is held all the time, and a write to
 * what has been protected faults and waits for it. So of two writes of which one came after the
 * other, the child never has the later without the earlier: when the later one reaches a page that
 * is not protected yet, the earlier one was not held back either. For the same reason pinned pages
 * stay protected until the end. Only what a device writes meanwhile cannot be held back.
 *
 * Against pins without locks: such a pin takes its count, then reads the entry again and lets go if
 * that is COW. Both change the same word. If the pin was first, the word has it and the page is
 * copied; if the fork was first, the pin finds the entry COW. A glance that was no pin costs a copy
 * too many.
 *
 * Entries that were COW before the fork (`old`) are shared in any case: what is really pinned is
 * exclusive, so a pin there is a glance, and the frame may have other sharers, so that it could not
 * be made exclusive afterwards. In the child's entry YOUNG says that it was old. This claims an
 * access too much, and lets the undo find them: after a fork that failed, exactly those entries are
 * COW that were so before.
 *
 * An entry that is MOVING is shared like any other; the child's is not MOVING. The migration then
 * meets a mapping that it has not marked, does not move the frame, and undoes its mark. If it has
 * switched the entry before, parent and child share where it went.
 *
 * The tables of child and parent are locked together, the child's first: that is the order of the
 * family's list, in which a migration locks them. A count and its entry come to be under the lock
 * of the entry's table. Nothing is allocated, and no hook called, under these locks. The child's
 * own lock is not needed: but for migrations, nobody knows it yet.
 */
#include "pgtable.h"

#define FORK_SLOTS 64
#define FORK_RANGES 64
#define BITS_WORDS (CTG_TABLE_ENTRIES / 64)

/* What one table of level 0 covers, or one entry above it. */
struct fork_slot {
	ctg_vpn_t vpn;
	uint64_t nr;
	uint64_t old[BITS_WORDS]; /* pages (of nr / 512 each) that were COW before */
};

/* A page of the parent that is pinned: its frame is held by a reference. */
struct fork_pinned {
	ctg_vpn_t vpn;
	ctg_pfn_t src, dst;
	uint64_t flags; /* of the child's entry */
};

struct fork {
	struct ctg *ctg;
	struct ctg_mm *parent, *child;
	struct ctg_zone *zone; /* of the frame that was looked at last */
	bool copied;           /* something pinned has been */
	unsigned nr_slots, nr_ranges, nr_pinned;
	struct fork_slot slot[FORK_SLOTS];
	struct ctg_vrange range[FORK_RANGES];
	struct fork_pinned pinned[CTG_TABLE_ENTRIES];
	struct ctg_copy_run run[CTG_TABLE_ENTRIES];
};

static bool bit_of(const uint64_t *bits, unsigned i)
{
	return (bits[i / 64] >> (i % 64) & 1) != 0;
}

/* ---- the parent's mapping -------------------------------------------------------------------- */

/* Nobody may write through the ranges any more: their entries are COW. */
static void restrict_ranges(struct fork *f)
{
	const struct ctg_port *port = &f->ctg->port;

	if (f->nr_ranges != 0)
		port->tlb_restrict(
			port->host, f->parent, f->range, f->nr_ranges, CTG_TLB_INVALIDATE);
	f->nr_ranges = 0;
}

/*
 * Writers may go on in the ranges. A port that cannot now will when they fault: the entries allow
 * it. They say what they said before the fork, so its second try does not fail.
 */
static void install_ranges(struct fork *f)
{
	const struct ctg_port *port = &f->ctg->port;

	if (f->nr_ranges != 0 &&
		port->tlb_install(port->host, f->parent, f->range, f->nr_ranges) != 0)
		port->tlb_install(port->host, f->parent, f->range, f->nr_ranges);
	f->nr_ranges = 0;
}

/* Ascending. false: there is no room for another range. */
static bool add_range(struct fork *f, ctg_vpn_t vpn, uint64_t nr)
{
	struct ctg_vrange *last = f->nr_ranges != 0 ? &f->range[f->nr_ranges - 1] : NULL;

	if (last != NULL && last->vpn + last->nr == vpn) {
		last->nr += nr;
		return true;
	}
	if (f->nr_ranges == FORK_RANGES)
		return false;
	f->range[f->nr_ranges++] = (struct ctg_vrange){vpn, nr};
	return true;
}

/*
 * Tell those who mirror what is about to become copy-on-write. Under mm->lock nothing becomes
 * writable meanwhile, so a look at the entries before they are locked says which.
 */
static void notify_parent(struct fork *f)
{
	ctg_vpn_t vpn = 0;

	ctg_notify_start(f->parent, NULL, 0, CTG_NOTIFY_FORK, true);
	while (f->parent->notifiers != NULL && vpn < CTG_MM_MAX_VPN) {
		const uint64_t bits = CTG_PTE_PRESENT | CTG_PTE_WRITE;
		unsigned level;
		uint64_t entry = ctg_pte_read(f->parent, vpn, &level);
		uint64_t pages = ctg_level_pages(level);

		if ((entry & (bits | CTG_PTE_COW | CTG_PTE_SHARED)) == bits &&
			!add_range(f, vpn, pages)) {
			ctg_notify_more(f->parent, f->range, f->nr_ranges, CTG_NOTIFY_FORK);
			f->nr_ranges = 0;
			add_range(f, vpn, pages);
		}
		vpn += pages;
	}
	ctg_notify_more(f->parent, f->range, f->nr_ranges, CTG_NOTIFY_FORK);
	f->nr_ranges = 0;
}

/* ---- protect --------------------------------------------------------------------------------- */

/* Make entries of the locked table COW from index *i on. false: no room for the ranges. */
static bool protect_entries(
	struct fork *f, struct fork_slot *slot, const struct ctg_pte_ref *ref, unsigned *i)
{
	unsigned nr = ref->level == 0 ? CTG_TABLE_ENTRIES : 1;
	uint64_t pages = ctg_level_pages(ref->level);

	for (; *i < nr; ++*i) {
		struct ctg_word64 *word = &ref->table->entry[ref->index + *i];
		uint64_t entry = ctg_load64_relaxed(word);

		if ((entry & CTG_PTE_PRESENT) == 0 || (entry & CTG_PTE_SHARED) != 0)
			continue;
		if ((entry & CTG_PTE_COW) != 0) {
			if (nr != 1)
				slot->old[*i / 64] |= (uint64_t)1 << (*i % 64);
			for (unsigned w = 0; nr == 1 && w < BITS_WORDS; w++)
				slot->old[w] = UINT64_MAX;
			continue;
		}
		if ((entry & CTG_PTE_WRITE) != 0 && !add_range(f, slot->vpn + *i * pages, pages))
			return false;
		ctg_or64_acq_rel(word, CTG_PTE_COW);
	}
	return true;
}

static void protect(struct fork *f, struct fork_slot *slot)
{
	struct ctg_pte_ref ref;
	unsigned i = 0;
	bool done;

	do {
		ctg_pte_lock(f->parent, slot->vpn, &ref);
		done = protect_entries(f, slot, &ref, &i);
		ctg_pte_unlock(f->parent, &ref);
		if (!done)
			restrict_ranges(f);
	} while (!done);
}

/* ---- share ----------------------------------------------------------------------------------- */

static struct ctg_frame *frame_of(struct fork *f, ctg_pfn_t pfn)
{
	struct ctg_frame *frame;

	if (f->zone == NULL || pfn - f->zone->base >= f->zone->nr)
		f->zone = ctg_zone_of(f->ctg, pfn);
	frame = ctg_zone_frame(f->zone, pfn);
	if (ctg_info_state(ctg_load32_acquire(&frame->info)) == CTG_FRAME_ANON)
		return frame;
	return ctg_zone_frame(f->zone, ctg_frame_head(f->ctg, pfn));
}

/*
 * Count one mapping more, or, if the frame is pinned and that matters, a reference. The entry of it
 * is locked, so it is not frozen.
 */
static int count_child(struct ctg_frame *frame, bool may_share, bool *pinned)
{
	uint64_t word = ctg_load64_relaxed(&frame->word);
	uint64_t one;

	do {
		CTG_ASSERT(!ctg_word_frozen(word));
		*pinned = !may_share && ctg_word_pin(word) != 0;
		one = *pinned ? CTG_WORD_REF1 : CTG_WORD_MAP1;
		if (*pinned ? ctg_word_ref(word) >= CTG_WORD_REF_MAX
			    : ctg_word_map(word) >= CTG_WORD_MAP_MAX)
			return -CTG_EOVERFLOW;
	} while (!ctg_cas64_acq_rel(&frame->word, &word, word + one));
	return 0;
}

/* The child's tables are nobody else's but a migration's, which changes what is PRESENT only. */
static void set_child(struct ctg_pte_ref *ref, unsigned i, uint64_t entry)
{
	struct ctg_word64 *word = &ref->table->entry[ref->index + i];

	CTG_ASSERT(ctg_load64_relaxed(word) == 0);
	ctg_store64_release(word, entry);
	ref->table->used++;
}

/* Both tables are locked, and their entries at one level. */
static int share_entries(struct fork *f, const struct fork_slot *slot, struct ctg_pte_ref *to,
	const struct ctg_pte_ref *from)
{
	const uint64_t kept = CTG_PTE_PRESENT | CTG_PTE_RIGHTS | CTG_PTE_DIRTY;
	unsigned nr = from->level == 0 ? CTG_TABLE_ENTRIES : 1;
	uint64_t pages = ctg_level_pages(from->level), present = 0;
	int ret = 0;

	for (unsigned i = 0; i < nr; i++) {
		uint64_t entry = ctg_load64_relaxed(&from->table->entry[from->index + i]);
		bool shared = (entry & CTG_PTE_SHARED) != 0, old = bit_of(slot->old, i), pinned;
		ctg_pfn_t pfn = ctg_pte_pfn(entry);

		if (entry == 0)
			continue;
		if ((entry & CTG_PTE_PRESENT) == 0) {
			set_child(to, i, entry);
			continue;
		}
		CTG_ASSERT(shared || (entry & CTG_PTE_COW) != 0);
		ret = count_child(frame_of(f, pfn), shared || old, &pinned);
		if (ret != 0)
			break;
		if (pinned) {
			f->pinned[f->nr_pinned++] = (struct fork_pinned){
				slot->vpn + i * pages, pfn, CTG_PFN_NONE, entry & kept};
			continue;
		}
		set_child(to, i,
			ctg_pte(pfn, (entry & (kept | CTG_PTE_COW | CTG_PTE_SHARED)) |
					     (old ? CTG_PTE_YOUNG : 0)));
		present += pages;
	}
	ctg_add64_relaxed(&f->child->nr_present, present);
	return ret;
}

/* ---- pinned pages ---------------------------------------------------------------------------- */

/* Map the child's own copy, which is held by a reference. */
static void set_copy(struct fork *f, const struct fork_pinned *p, unsigned level)
{
	struct ctg_pte_ref ref;

	ctg_anon_own(f->ctg, f->child->anon, p->dst, p->vpn);
	ctg_pte_lock(f->child, p->vpn, &ref);
	CTG_ASSERT(ref.level == level);
	ctg_anon_map(f->ctg, p->dst);
	set_child(&ref, 0, ctg_pte(p->dst, p->flags | CTG_PTE_DIRTY));
	ctg_pte_unlock(f->child, &ref);
	ctg_add64_relaxed(&f->child->nr_present, ctg_level_pages(level));
}

/* Copy nr pages, each to a frame of order 0. */
static int copy_small(struct fork *f, struct fork_pinned *pinned, unsigned nr)
{
	const struct ctg_port *port = &f->ctg->port;
	unsigned got = 0, order;
	size_t runs = 0;
	int ret = 0;

	for (; got < nr; got++) {
		struct fork_pinned *p = &pinned[got];
		struct ctg_copy_run *last = runs != 0 ? &f->run[runs - 1] : NULL;

		ret = ctg_anon_alloc(f->child, 0, 0, 0, &p->dst, &order);
		if (ret != 0)
			break;
		if (last != NULL && last->src + last->nr == p->src &&
			last->dst + last->nr == p->dst)
			last->nr++;
		else
			f->run[runs++] = (struct ctg_copy_run){p->dst, p->src, 1};
	}
	if (ret == 0)
		ret = port->copy(port->host, f->run, runs);
	for (unsigned i = 0; i < got; i++) {
		if (ret == 0)
			set_copy(f, &pinned[i], 0);
		else
			ctg_frame_put(f->ctg, pinned[i].dst, CTG_WORD_REF1, 1);
	}
	return ret;
}

static int copy_large(struct fork *f, const struct fork_pinned *p, unsigned level);

/* There is no room for a copy in one piece. The child's entry is EMPTY. */
static int copy_pieces(struct fork *f, const struct fork_pinned *p, unsigned level)
{
	uint64_t pages = ctg_level_pages(level - 1);
	struct fork_pinned piece = *p;
	int ret = ctg_pte_split_to(f->child, p->vpn, level - 1);

	for (unsigned i = 0; ret == 0 && i < CTG_TABLE_ENTRIES; i++) {
		piece.vpn = p->vpn + i * pages;
		piece.src = p->src + i * pages;
		if (level == 1)
			f->pinned[i] = piece;
		else
			ret = copy_large(f, &piece, level - 1);
	}
	if (ret == 0 && level == 1)
		ret = copy_small(f, f->pinned, CTG_TABLE_ENTRIES);
	return ret;
}

/* Copy all that one entry of level 1 or 2 says: to one frame if there is one. */
static int copy_large(struct fork *f, const struct fork_pinned *p, unsigned level)
{
	const struct ctg_port *port = &f->ctg->port;
	struct ctg_copy_run run = {.src = p->src, .nr = ctg_level_pages(level)};
	unsigned order = level * CTG_PAGEBLOCK_ORDER;
	struct fork_pinned copy = *p;
	int ret = ctg_anon_alloc(f->child, order, order, 0, &run.dst, &order);

	if (ret != 0 && (level == 2 || f->child->config.map_order == 0))
		return copy_pieces(f, p, level);
	if (ret != 0)
		return ret;
	ret = port->copy(port->host, &run, 1);
	if (ret != 0) {
		ctg_frame_put(f->ctg, run.dst, CTG_WORD_REF1, 1);
		return ret;
	}
	copy.dst = run.dst;
	set_copy(f, &copy, level);
	return 0;
}

/* Copy what share_entries has found pinned, unless that failed, and drop the references. */
static int copy_pinned(struct fork *f, unsigned level, int ret)
{
	unsigned nr = f->nr_pinned;
	/* Above level 0 there is one, and f->pinned is needed for its pieces. */
	struct fork_pinned first = f->pinned[0];

	f->nr_pinned = 0;
	if (nr == 0)
		return ret;
	f->copied = true;
	if (ret == 0)
		ret = level == 0 ? copy_small(f, f->pinned, nr) : copy_large(f, &first, level);
	if (level != 0)
		f->pinned[0] = first;
	for (unsigned i = 0; i < nr; i++)
		ctg_frame_put(f->ctg, ctg_frame_head(f->ctg, f->pinned[i].src), CTG_WORD_REF1, 1);
	return ret;
}

/* Share a slot, or copy what is pinned in it. */
static int share(struct fork *f, const struct fork_slot *slot)
{
	struct ctg_pte_ref to, from;
	unsigned level;
	int ret;

	for (;;) {
		ctg_pte_read(f->parent, slot->vpn, &level);
		ret = ctg_pte_split_to(f->child, slot->vpn, level);
		if (ret != 0)
			return ret;
		ctg_pte_lock(f->child, slot->vpn, &to);
		ctg_pte_lock(f->parent, slot->vpn, &from);
		if (from.level == to.level)
			break;
		/* A migration has taken the parent's large entry to pieces. */
		ctg_pte_unlock(f->parent, &from);
		ctg_pte_unlock(f->child, &to);
	}
	CTG_ASSERT(level == 0 || (from.entry & CTG_PTE_PRESENT) != 0);
	ret = share_entries(f, slot, &to, &from);
	ctg_pte_unlock(f->parent, &from);
	ctg_pte_unlock(f->child, &to);
	return copy_pinned(f, level, ret);
}

/* ---- restore --------------------------------------------------------------------------------- */

/* Clear COW of the parent's pages in [vpn, vpn + nr), all of which the fork has set. */
static void restore_range(struct fork *f, ctg_vpn_t vpn, uint64_t nr)
{
	struct ctg_pte_walk walk = CTG_PTE_WALK(f->parent, vpn, vpn + nr);

	while (ctg_pte_walk_next(&walk))
		if ((walk.ref.entry & CTG_PTE_PRESENT) != 0)
			ctg_pte_set(&walk.ref, walk.ref.entry & ~CTG_PTE_COW);
	if (!add_range(f, vpn, nr)) {
		install_ranges(f);
		add_range(f, vpn, nr);
	}
}

/* What the child has a copy of, which is what is not COW there, is the parent's alone. */
static void restore_copied(struct fork *f)
{
	struct ctg_vrange run = {0};
	ctg_vpn_t vpn = 0;

	while (f->copied && vpn < CTG_MM_MAX_VPN) {
		unsigned level;
		uint64_t entry = ctg_pte_read(f->child, vpn, &level);
		uint64_t pages = ctg_level_pages(level);

		if ((entry & CTG_PTE_PRESENT) != 0 &&
			(entry & (CTG_PTE_COW | CTG_PTE_SHARED)) == 0) {
			if (run.nr != 0 && run.vpn + run.nr != vpn) {
				restore_range(f, run.vpn, run.nr);
				run.nr = 0;
			}
			run.vpn = run.nr == 0 ? vpn : run.vpn;
			run.nr += pages;
		}
		vpn += pages;
	}
	if (run.nr != 0)
		restore_range(f, run.vpn, run.nr);
	install_ranges(f);
}

/* ---- undo ------------------------------------------------------------------------------------ */

/*
 * Take back what is shared of one table from vpn on: the child's entries go to its batch, and the
 * parent's become what they were. Returns the page to go on with.
 */
static ctg_vpn_t unshare_some(struct fork *f, ctg_vpn_t vpn)
{
	struct ctg_pte_ref to, from;
	uint64_t pages;

	/* Both look at one frame, so a migration leaves them at one level. */
	ctg_pte_lock(f->child, vpn, &to);
	ctg_pte_lock(f->parent, vpn, &from);
	pages = ctg_level_pages(to.level);
	for (; to.index < CTG_TABLE_ENTRIES && f->nr_ranges < FORK_RANGES;
		to.index++, vpn += pages) {
		to.entry = ctg_load64_relaxed(&to.table->entry[to.index]);
		if ((to.entry & CTG_PTE_TABLE) != 0)
			break;
		if ((to.entry & CTG_PTE_PRESENT) == 0 || (to.entry & CTG_PTE_COW) == 0)
			continue;
		CTG_ASSERT(from.level == to.level);
		if (!ctg_batch_add(
			    &f->child->batch, vpn, ctg_pte_pfn(to.entry), pages, to.level != 0))
			break;
		from.index = to.index;
		from.entry = ctg_load64_relaxed(&from.table->entry[from.index]);
		CTG_ASSERT(ctg_pte_pfn(from.entry) == ctg_pte_pfn(to.entry));
		if ((to.entry & CTG_PTE_YOUNG) == 0) {
			ctg_pte_set(&from, from.entry & ~CTG_PTE_COW);
			add_range(f, vpn, pages);
		}
		ctg_pte_set(&to, 0);
		ctg_add64_relaxed(&f->child->nr_present, -pages);
	}
	ctg_pte_unlock(f->parent, &from);
	ctg_pte_unlock(f->child, &to);
	return vpn;
}

static void unshare(struct fork *f)
{
	const struct ctg_port *port = &f->ctg->port;
	ctg_vpn_t vpn = 0;

	ctg_lock(port, &f->child->batch.lock);
	f->child->batch.dead = true;
	ctg_unlock(port, &f->child->batch.lock);
	while (vpn < CTG_MM_MAX_VPN) {
		unsigned level;
		uint64_t entry = ctg_pte_read(f->child, vpn, &level);

		if ((entry & CTG_PTE_PRESENT) == 0 || (entry & CTG_PTE_COW) == 0) {
			vpn += ctg_level_pages(level);
			continue;
		}
		ctg_lock(port, &f->child->batch.lock);
		vpn = unshare_some(f, vpn);
		ctg_unlock(port, &f->child->batch.lock);
		ctg_batch_flush(&f->child->batch, false);
		install_ranges(f);
	}
}

/* The slots of the last batch that were protected and perhaps not shared. */
static void unprotect(struct fork *f)
{
	for (unsigned s = 0; s < f->nr_slots; s++) {
		const struct fork_slot *slot = &f->slot[s];
		uint64_t unit = slot->nr / CTG_TABLE_ENTRIES;
		struct ctg_pte_walk walk = CTG_PTE_WALK(f->parent, slot->vpn, slot->vpn + slot->nr);

		while (ctg_pte_walk_next(&walk))
			if ((walk.ref.entry & CTG_PTE_PRESENT) != 0 &&
				!bit_of(slot->old, (unsigned)((walk.vpn - slot->vpn) / unit)))
				ctg_pte_set(&walk.ref, walk.ref.entry & ~CTG_PTE_COW);
		add_range(f, slot->vpn, slot->nr);
		install_ranges(f);
	}
}

static void undo(struct fork *f)
{
	f->nr_ranges = 0;
	restore_copied(f);
	unshare(f);
	unprotect(f);
}

/* ---- all of it ------------------------------------------------------------------------------- */

static int share_slots(struct fork *f)
{
	int ret = 0;

	for (unsigned s = 0; ret == 0 && s < f->nr_slots; s++)
		ret = share(f, &f->slot[s]);
	if (ret == 0)
		f->nr_slots = 0;
	return ret;
}

/* One RESERVED entry of level 1 or 2. */
static int copy_reserved(struct fork *f, ctg_vpn_t vpn, unsigned level, uint64_t entry)
{
	struct ctg_pte_ref ref;
	int ret = ctg_pte_split_to(f->child, vpn, level);

	if (ret != 0)
		return ret;
	ctg_pte_lock(f->child, vpn, &ref);
	set_child(&ref, 0, entry);
	ctg_pte_unlock(f->child, &ref);
	return 0;
}

static int fork_all(struct fork *f)
{
	ctg_vpn_t vpn = 0;
	int ret = 0;

	while (ret == 0 && vpn < CTG_MM_MAX_VPN) {
		unsigned level;
		uint64_t entry = ctg_pte_read(f->parent, vpn, &level);
		uint64_t pages = ctg_level_pages(level != 0 ? level : 1);

		if (level == 0 || (entry & CTG_PTE_PRESENT) != 0) {
			struct fork_slot *slot = &f->slot[f->nr_slots++];

			*slot = (struct fork_slot){.vpn = vpn, .nr = pages};
			protect(f, slot);
		} else if (entry != 0) {
			ret = copy_reserved(f, vpn, level, entry);
		}
		vpn += pages;
		if (f->nr_slots == FORK_SLOTS || vpn >= CTG_MM_MAX_VPN) {
			restrict_ranges(f);
			if (ret == 0)
				ret = share_slots(f);
		}
	}
	return ret;
}

int ctg_mm_fork(struct ctg_mm *parent, const struct ctg_mm_config *config, struct ctg_mm **child)
{
	const struct ctg_port *port;
	struct ctg_mm_config inherited;
	struct fork *f;
	int ret;

	if (parent == NULL || config == NULL || child == NULL)
		return -CTG_EINVAL;
	port = &parent->ctg->port;
	f = port->meta_alloc(port->host, sizeof(*f), _Alignof(struct fork));
	if (f == NULL)
		return -CTG_ENOMEM;
	f->ctg = parent->ctg;
	f->parent = parent;
	inherited = parent->config;
	inherited.owner = config->owner;
	inherited.group = config->group;
	ret = ctg_mm_make(f->ctg, &inherited, parent, &f->child);
	if (ret == 0) {
		ctg_lock(port, &parent->lock);
		notify_parent(f);
		ret = fork_all(f);
		if (ret == 0)
			restore_copied(f);
		else
			undo(f);
		ctg_notify_end(parent);
		ctg_unlock(port, &parent->lock);
		if (ret == 0)
			*child = f->child;
		else
			ctg_mm_destroy(f->child, true);
	}
	port->meta_free(port->host, f, sizeof(*f));
	return ret;
}
