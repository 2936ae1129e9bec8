/* SPDX-License-Identifier: MIT */
/* Fork: what is shared, what is copied, in which order, and what a failure leaves. */
#include "family.h"

#include <pthread.h>
#include <semaphore.h>

#define GIB ((uint64_t)1 << CTG_MAX_ORDER)

static struct ctg_mm *space_with(struct world *w, struct ctg_group *group)
{
	struct ctg_mm_config config = {.owner = w, .group = group};
	struct ctg_mm *mm = NULL;

	assert_int_equal(ctg_mm_create(w->ctg, &config, &mm), 0);
	return mm;
}

static void close_both(struct world *w, struct ctg_mm *parent, struct ctg_mm *child)
{
	ctg_mm_destroy(child, false);
	ctg_mm_destroy(parent, false);
	world_close(w);
}

/* ---- sharing --------------------------------------------------------------------------------- */

static void small_pages_are_shared(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;
	uint64_t free;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	map_small(&w, parent, BASE - 40, 600);
	assert_int_equal(ctg_mprotect(parent, BASE + 10, 5, CTG_PROT_READ), 0);
	assert_int_equal(ctg_mprotect(parent, BASE + 20, 5, CTG_PROT_NONE), 0);
	free = world_free(&w);
	child = forked(&w, parent);
	assert_int_equal(world_free(&w), free);
	assert_ptr_equal(ctg_mm_owner(child), &w);
	assert_int_equal(stat_of(child).nr_present, 600);
	for (ctg_vpn_t vpn = BASE - 40; vpn < BASE + 560; vpn++) {
		uint64_t entry = raw_entry(parent, vpn);

		assert_true(is_cow(parent, vpn));
		assert_int_equal((raw_entry(child, vpn) ^ entry) & ~(uint64_t)CTG_PTE_YOUNG, 0);
		assert_int_equal(raw_entry(child, vpn) & CTG_PTE_YOUNG, 0);
		assert_int_equal(word_of(&w, pfn_of(child, vpn)), counts(2, 0, 0));
		assert_int_equal(lookup(parent, vpn, 1).prot & CTG_PROT_WRITE, 0);
	}
	check_stamp_of(&w, child, parent, BASE - 40, 600);
	/* Rights are the child's own from now on. */
	assert_int_equal(ctg_mprotect(child, BASE + 20, 5, RW), 0);
	put_byte(&w, child, BASE + 20, 1);
	assert_int_equal(ctg_handle_fault(parent, BASE + 20, false), -CTG_EFAULT);
	check_stamp(&w, parent, BASE - 40, 600);
	close_both(&w, parent, child);
}

/* What is mapped without frames, at every level, and what is not mapped. */
static void reserved_is_reserved(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	assert_int_equal(ctg_mmap(parent, BASE, 2 * GIB + 3 * PAGES + 7, RW), 0);
	assert_int_equal(ctg_mmap(parent, BASE + 4 * GIB, PAGES, CTG_PROT_READ), 0);
	put_byte(&w, parent, BASE + 2 * GIB + 5 * 3, 1);
	child = forked(&w, parent);
	assert_int_equal(level_of(child, BASE), 2);
	assert_int_equal(level_of(child, BASE + 2 * GIB + PAGES), 1);
	assert_int_equal(level_of(child, BASE + 2 * GIB + 3 * PAGES), 0);
	for (ctg_vpn_t vpn = BASE - 1; vpn < BASE + 5 * GIB;) {
		struct ctg_mapping a = lookup(parent, vpn, 5 * GIB),
				   b = lookup(child, vpn, 5 * GIB);

		assert_int_equal(a.nr, b.nr);
		assert_int_equal(a.reserved, b.reserved);
		assert_int_equal(a.pfn, b.pfn);
		assert_int_equal(raw_entry(parent, vpn) & CTG_PTE_RIGHTS,
			raw_entry(child, vpn) & CTG_PTE_RIGHTS);
		vpn += a.nr;
	}
	assert_int_equal(get_byte(&w, child, BASE + 7), 0);
	put_byte(&w, child, BASE + GIB, 3);
	assert_int_equal(get_byte(&w, parent, BASE + GIB), 0);
	assert_int_equal(ctg_handle_fault(child, BASE + 4 * GIB, true), -CTG_EFAULT);
	close_both(&w, parent, child);
}

static void large_frames_are_shared_whole(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child, *grandchild;
	uint64_t free;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	map_large(&w, parent, BASE);
	map_large(&w, parent, BASE + PAGES);
	assert_int_equal(ctg_munmap(parent, BASE + PAGES + 3, 1), 0);
	free = world_free(&w);
	child = forked(&w, parent);
	grandchild = forked(&w, child);
	assert_int_equal(world_free(&w), free);
	assert_int_equal(level_of(child, BASE), 1);
	assert_int_equal(head_word(&w, child, BASE), counts(3, 0, 0));
	assert_int_equal(head_word(&w, child, BASE + PAGES), counts(3 * (PAGES - 1), 0, 0));
	ctg_mm_destroy(parent, false);
	check_stamp_of(&w, grandchild, parent, BASE, PAGES);
	assert_int_equal(head_word(&w, child, BASE), counts(2, 0, 0));
	ctg_mm_destroy(grandchild, true);
	put_byte(&w, child, BASE + 4, 4);
	assert_int_equal(world_free(&w), free);
	ctg_mm_destroy(child, false);
	world_close(&w);
}

static void bad_arguments(void **state)
{
	struct world w, other;
	struct ctg_mm_config config = {.owner = &w};
	struct ctg_mm *mm, *out;

	(void)state;
	world_open(&w, 4);
	world_open(&other, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mm_fork(NULL, &config, &out), -CTG_EINVAL);
	assert_int_equal(ctg_mm_fork(mm, NULL, &out), -CTG_EINVAL);
	assert_int_equal(ctg_mm_fork(mm, &config, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_group_create(other.ctg, NULL, 1, &config.group), 0);
	assert_int_equal(ctg_mm_fork(mm, &config, &out), -CTG_EINVAL);
	ctg_mm_destroy(mm, false);
	assert_int_equal(ctg_group_destroy(config.group), 0);
	world_close(&other);
	world_close(&w);
}

/* The child is of the parent's kind, whatever the config says. */
static void child_inherits(void **state)
{
	struct world w;
	struct ctg_mm_config config = {.owner = &w, .gfp = CTG_GFP_NO_CMA, .map_order = 9};
	struct ctg_mm *parent, *child;

	(void)state;
	world_open(&w, 4);
	assert_int_equal(ctg_mm_create(w.ctg, &config, &parent), 0);
	config = (struct ctg_mm_config){.owner = &config, .max_order = 18};
	assert_int_equal(ctg_mm_fork(parent, &config, &child), 0);
	assert_int_equal(child->config.gfp, CTG_GFP_NO_CMA);
	assert_int_equal(child->config.map_order, 9);
	assert_int_equal(child->config.max_order, 0);
	assert_ptr_equal(ctg_mm_owner(child), &config);
	assert_ptr_equal(child->anon, parent->anon);
	assert_ptr_equal(ctg_mm_machine(child), w.ctg);
	close_both(&w, parent, child);
}

/* ---- pins ------------------------------------------------------------------------------------ */

static void pinned_page_is_copied(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;
	struct ctg_mapping m;
	ctg_pfn_t pfn;
	uint64_t faults;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	map_small(&w, parent, BASE, 10);
	pfn = pfn_of(parent, BASE + 4);
	hold(&w, pfn, 2 * CTG_WORD_PIN1);
	hold(&w, pfn, CTG_WORD_REF1);
	child = forked(&w, parent);
	assert_int_equal(word_of(&w, pfn), counts(1, 2, 1));
	assert_int_equal(pfn_of(parent, BASE + 4), pfn);
	assert_false(is_cow(parent, BASE + 4));
	assert_int_equal(lookup(parent, BASE + 4, 1).prot, RW);
	m = lookup(child, BASE + 4, 1);
	assert_int_not_equal(m.pfn, pfn);
	assert_int_equal(m.prot, RW);
	assert_int_equal(raw_entry(child, BASE + 4) & (CTG_PTE_DIRTY | CTG_PTE_COW), CTG_PTE_DIRTY);
	assert_int_equal(word_of(&w, m.pfn), counts(1, 0, 0));
	check_stamp_of(&w, child, parent, BASE, 10);
	/* The parent writes on without a fault, the device sees it, the child does not. */
	faults = counters_of(&w).faults;
	put_byte(&w, parent, BASE + 4, 0x77);
	assert_int_equal(counters_of(&w).faults, faults);
	assert_int_equal(*(unsigned char *)ctg_sim_frame(w.sim, pfn), 0x77);
	check_stamp_of(&w, child, parent, BASE + 4, 1);
	/* Neighbours are shared. */
	assert_true(is_cow(parent, BASE + 3));
	assert_int_equal(head_word(&w, parent, BASE + 5), counts(2, 0, 0));
	assert_int_equal(stat_of(child).nr_present, 10);
	unhold(&w, pfn, CTG_WORD_PIN1);
	unhold(&w, pfn, CTG_WORD_PIN1);
	unhold(&w, pfn, CTG_WORD_REF1);
	close_both(&w, parent, child);
}

static void pinned_read_only_page_is_copied(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	map_small(&w, parent, BASE, 2);
	assert_int_equal(ctg_mprotect(parent, BASE, 2, CTG_PROT_READ), 0);
	pfn = pfn_of(parent, BASE);
	hold(&w, pfn, CTG_WORD_PIN1);
	child = forked(&w, parent);
	assert_int_not_equal(pfn_of(child, BASE), pfn);
	assert_false(is_cow(parent, BASE));
	assert_int_equal(lookup(child, BASE, 1).prot, CTG_PROT_READ);
	/* The right to write comes later: still one's own. */
	assert_int_equal(ctg_mprotect(parent, BASE, 1, RW), 0);
	put_byte(&w, parent, BASE, 1);
	assert_int_equal(pfn_of(parent, BASE), pfn);
	unhold(&w, pfn, CTG_WORD_PIN1);
	close_both(&w, parent, child);
}

/* Whole if there is a large frame, else in pieces; the parent's entry stays one. */
static void pinned_large_frame_is_copied(void **state)
{
	(void)state;
	for (unsigned room = 0; room < 2; room++) {
		struct world w;
		struct ctg_mm *parent, *child;
		struct hoard *hoard = NULL;
		ctg_pfn_t pfn;
		uint64_t free;

		world_open(&w, 8);
		parent = space_new(&w, 0);
		pfn = map_large(&w, parent, BASE);
		hold(&w, pfn, CTG_WORD_PIN1);
		if (room == 0)
			hoard = fragment(&w, 600, pfn);
		free = world_free(&w);
		child = forked(&w, parent);
		assert_int_equal(world_free(&w), free - PAGES);
		assert_int_equal(level_of(child, BASE), room);
		assert_int_equal(level_of(parent, BASE), 1);
		assert_int_equal(word_of(&w, pfn), counts(1, 1, 0));
		assert_false(is_cow(parent, BASE));
		assert_int_equal(stat_of(child).nr_present, PAGES);
		check_stamp_of(&w, child, parent, BASE, PAGES);
		for (unsigned i = 0; i < PAGES; i += 50) {
			assert_int_equal(lookup(child, BASE + i, 1).prot, RW);
			put_byte(&w, child, BASE + i, 3);
		}
		check_stamp(&w, parent, BASE, PAGES);
		unhold(&w, pfn, CTG_WORD_PIN1);
		if (hoard != NULL)
			hoard_free_all(&w, hoard);
		close_both(&w, parent, child);
	}
}

/* A large frame in pieces is one frame: pinned anywhere, it is copied everywhere. */
static void pinned_pieces_are_copied(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	pfn = map_large(&w, parent, BASE);
	assert_int_equal(ctg_munmap(parent, BASE + 100, 2), 0);
	hold(&w, pfn, CTG_WORD_PIN1);
	child = forked(&w, parent);
	assert_int_equal(word_of(&w, pfn), counts(PAGES - 2, 1, 0));
	for (unsigned i = 0; i < PAGES; i++) {
		if (i == 100 || i == 101) {
			assert_int_equal(raw_entry(child, BASE + i), 0);
			continue;
		}
		assert_false(is_cow(parent, BASE + i));
		assert_int_equal(head_word(&w, child, BASE + i), counts(1, 0, 0));
	}
	check_stamp_of(&w, child, parent, BASE, 100);
	check_stamp_of(&w, child, parent, BASE + 102, PAGES - 102);
	unhold(&w, pfn, CTG_WORD_PIN1);
	close_both(&w, parent, child);
}

/*
 * An entry that is COW already may be another's too: a count of pins there is a stranger's glance,
 * and the page is not made exclusive.
 */
static void glance_at_a_shared_page_copies_nothing(void **state)
{
	struct world w;
	struct ctg_mm *parent, *first, *second;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	map_small(&w, parent, BASE, 2);
	pfn = pfn_of(parent, BASE);
	first = forked(&w, parent);
	hold(&w, pfn, CTG_WORD_PIN1);
	second = forked(&w, parent);
	assert_int_equal(word_of(&w, pfn), counts(3, 1, 0));
	assert_int_equal(pfn_of(second, BASE), pfn);
	assert_true(is_cow(parent, BASE));
	assert_true(is_cow(second, BASE));
	unhold(&w, pfn, CTG_WORD_PIN1);
	ctg_mm_destroy(first, false);
	close_both(&w, parent, second);
}

/* ---- what the port sees ---------------------------------------------------------------------- */

#define FAR_SLOTS 150 /* more than one batch */

static struct {
	struct world *w;
	struct ctg_mm *mm;
	uint64_t protected, copied, installed; /* pages */
	unsigned restricts;
} seen;

static int see_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how)
{
	assert_ptr_equal(mm, seen.mm);
	assert_int_equal(how, CTG_TLB_INVALIDATE);
	for (size_t i = 0; i < nr; i++) {
		assert_true(i == 0 || ranges[i - 1].vpn + ranges[i - 1].nr < ranges[i].vpn);
		for (uint64_t p = 0; p < ranges[i].nr; p++)
			assert_int_equal(lookup(mm, ranges[i].vpn + p, 1).prot, CTG_PROT_READ);
		seen.protected += ranges[i].nr;
	}
	seen.restricts++;
	return seen.w->port.tlb_restrict(host, mm, ranges, nr, how);
}

static int see_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	for (size_t i = 0; i < nr; i++) {
		/* Nobody can write to it, and no migration can move it. */
		const struct ctg_frame *frame = ctg_frame_of(seen.w->ctg, runs[i].src);
		struct ctg_mapping m = lookup(seen.mm, frame->index, 1);

		assert_int_equal(m.pfn, runs[i].src);
		assert_int_equal(m.prot, CTG_PROT_READ);
		assert_int_equal(ctg_word_ref(word_of(seen.w, runs[i].src)), 1);
		seen.copied += runs[i].nr;
	}
	assert_int_equal(seen.installed, 0);
	return seen.w->port.copy(host, runs, nr);
}

static int see_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	/* All of the space is protected before any of it is let go. */
	assert_int_equal(seen.protected, 2 * FAR_SLOTS);
	for (size_t i = 0; i < nr; i++)
		seen.installed += ranges[i].nr;
	return seen.w->port.tlb_install(host, mm, ranges, nr);
}

static void order_of_the_steps(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	for (unsigned i = 0; i < FAR_SLOTS; i++) {
		map_small(&w, parent, BASE + i * 2 * PAGES + 3, 2);
		if (i % 10 == 0)
			hold(&w, pfn_of(parent, BASE + i * 2 * PAGES + 4), CTG_WORD_PIN1);
	}
	memset(&seen, 0, sizeof(seen));
	seen.w = &w;
	seen.mm = parent;
	w.ctg->port.tlb_restrict = see_restrict;
	w.ctg->port.tlb_install = see_install;
	w.ctg->port.copy = see_copy;
	child = forked(&w, parent);
	assert_int_equal(seen.protected, 2 * FAR_SLOTS);
	assert_int_equal(seen.copied, FAR_SLOTS / 10);
	assert_int_equal(seen.installed, FAR_SLOTS / 10);
	w.ctg->port = w.port;
	for (unsigned i = 0; i < FAR_SLOTS; i++) {
		check_stamp_of(&w, child, parent, BASE + i * 2 * PAGES + 3, 2);
		assert_int_equal(is_cow(parent, BASE + i * 2 * PAGES + 4), i % 10 != 0);
	}
	/* What is COW already needs no protection, and what has no right to write neither. */
	seen.restricts = 0;
	seen.protected = 0;
	w.ctg->port.tlb_restrict = see_restrict;
	ctg_mm_destroy(child, true);
	assert_int_equal(ctg_mprotect(parent, BASE + 4, 1, CTG_PROT_READ), 0);
	seen.restricts = 0;
	seen.protected = 0;
	child = forked(&w, parent);
	assert_int_equal(seen.protected, FAR_SLOTS / 10 - 1);
	w.ctg->port = w.port;
	for (unsigned i = 0; i < FAR_SLOTS; i += 10)
		unhold(&w, pfn_of(parent, BASE + i * 2 * PAGES + 4), CTG_WORD_PIN1);
	close_both(&w, parent, child);
}

/* ---- failures -------------------------------------------------------------------------------- */

/*
 * A parent of every kind: pages shared with a sibling, exclusive ones, pinned ones, large frames,
 * one of them pinned, pieces, read-only and reserved ones, over more than one batch of slots.
 */
struct parent {
	struct world w;
	struct ctg_group *group;
	struct ctg_mm *mm, *sibling;
	ctg_pfn_t pinned[8], referred;
	unsigned nr_pinned;
	uint64_t nr;
	struct before *before;
};

static void parent_pin(struct parent *p, ctg_vpn_t vpn)
{
	p->pinned[p->nr_pinned] = ctg_frame_head(p->w.ctg, pfn_of(p->mm, vpn));
	hold(&p->w, p->pinned[p->nr_pinned++], CTG_WORD_PIN1);
}

static void parent_open(struct parent *p)
{
	memset(p, 0, sizeof(*p));
	world_open(&p->w, 16);
	assert_int_equal(ctg_group_create(p->w.ctg, NULL, CTG_NO_LIMIT, &p->group), 0);
	p->mm = space_new(&p->w, 0);
	p->nr = (FAR_SLOTS + 6) * PAGES;
	map_small(&p->w, p->mm, BASE, 12);
	map_large(&p->w, p->mm, BASE + PAGES);
	map_large(&p->w, p->mm, BASE + 2 * PAGES);
	map_large(&p->w, p->mm, BASE + 3 * PAGES);
	assert_int_equal(ctg_munmap(p->mm, BASE + 3 * PAGES, 20), 0);
	p->sibling = forked(&p->w, p->mm);
	/* Exclusive again. */
	assert_int_equal(ctg_munmap(p->sibling, BASE + 6, PAGES - 6), 0);
	for (unsigned i = 6; i < 12; i++)
		stamp(&p->w, p->mm, BASE + i, 1);
	assert_int_equal(ctg_munmap(p->sibling, BASE + 2 * PAGES, PAGES), 0);
	stamp(&p->w, p->mm, BASE + 2 * PAGES, 1);
	parent_pin(p, BASE + 7);
	parent_pin(p, BASE + 9);
	parent_pin(p, BASE + 2 * PAGES);
	p->referred = pfn_of(p->mm, BASE + 8);
	hold(&p->w, p->referred, CTG_WORD_REF1);
	assert_int_equal(ctg_mprotect(p->mm, BASE + 10, 1, CTG_PROT_READ), 0);
	assert_int_equal(ctg_mmap(p->mm, BASE + 5 * PAGES, PAGES, RW), 0);
	for (unsigned i = 0; i < FAR_SLOTS; i++)
		map_small(&p->w, p->mm, BASE + (6 + i) * PAGES + 3, 1);
	parent_pin(p, BASE + (6 + FAR_SLOTS - 2) * PAGES + 3);
	p->before = before_take(&p->w, p->mm, BASE, p->nr);
}

static void parent_check(struct parent *p)
{
	struct before *again;

	before_check(&p->w, p->mm, p->before, 0);
	again = before_take(&p->w, p->mm, BASE, p->nr);
	p->before = again;
	/* The whole family is the parent and its sibling again. */
	assert_ptr_equal(p->mm->anon->mms, p->sibling);
	assert_ptr_equal(p->sibling->family_next, p->mm);
	assert_null(p->mm->family_next);
}

/*
 * Writers go on as before: what the port has is what the table says. What was shared, and has a
 * reference, which might be the child's, is copied.
 */
static void parent_write(struct parent *p, bool was_shared)
{
	for (unsigned i = 6; i < 10; i++) {
		ctg_pfn_t pfn = pfn_of(p->mm, BASE + i);

		stamp(&p->w, p->mm, BASE + i, 1);
		assert_int_equal(pfn_of(p->mm, BASE + i) == pfn, !was_shared || i != 8);
	}
	stamp(&p->w, p->mm, BASE + 2 * PAGES, PAGES);
}

static void parent_close(struct parent *p)
{
	unhold(&p->w, p->referred, CTG_WORD_REF1);
	for (unsigned i = 0; i < p->nr_pinned; i++)
		unhold(&p->w, p->pinned[i], CTG_WORD_PIN1);
	before_free(p->before);
	ctg_mm_destroy(p->sibling, false);
	ctg_mm_destroy(p->mm, false);
	assert_int_equal(ctg_group_destroy(p->group), 0);
	world_close(&p->w);
}

static int parent_fork(struct parent *p, struct ctg_mm **child)
{
	struct ctg_mm_config config = {.owner = p, .group = p->group};

	*child = NULL;
	return ctg_mm_fork(p->mm, &config, child);
}

static void every_hook_failure_unwinds(void **state)
{
	static const enum ctg_sim_hook hooks[] = {CTG_SIM_META_ALLOC, CTG_SIM_COPY};
	struct parent p;
	struct ctg_mm *child;

	(void)state;
	parent_open(&p);
	for (unsigned h = 0; h < 2; h++) {
		uint64_t nth = 1;

		for (;; nth += h == 0 && nth > 12 ? 13 : 1) {
			int ret;

			ctg_sim_fail(p.w.sim, hooks[h], nth);
			ret = parent_fork(&p, &child);
			ctg_sim_fail(p.w.sim, hooks[h], 0);
			if (ret == 0)
				break;
			assert_int_equal(ret, -CTG_ENOMEM);
			assert_null(child);
			parent_check(&p);
		}
		assert_true(nth > 3);
		ctg_mm_destroy(child, false);
		/* After a success, sharing stays: the parent finds itself alone by faults. */
		parent_write(&p, h == 0);
		assert_int_equal(ctg_cow_unshare(p.mm, BASE + 10, false), 0);
		stamp(&p.w, p.mm, BASE + 11, 1);
		for (unsigned i = 0; i < FAR_SLOTS; i++)
			stamp(&p.w, p.mm, BASE + (6 + i) * PAGES + 3, 1);
		before_free(p.before);
		p.before = before_take(&p.w, p.mm, BASE, p.nr);
	}
	parent_close(&p);
}

static void group_limit_unwinds(void **state)
{
	struct parent p;
	struct ctg_group_stat stat;
	struct ctg_mm *child;
	uint64_t limit = 0;
	int ret;

	(void)state;
	parent_open(&p);
	for (;; limit += limit < 4 ? 1 : 101) {
		ctg_group_set_limit(p.group, limit);
		ret = parent_fork(&p, &child);
		ctg_group_stat(p.group, &stat);
		assert_true(stat.peak <= limit);
		if (ret == 0)
			break;
		assert_int_equal(ret, -CTG_ENOSPC);
		assert_int_equal(stat.charged, 0);
		parent_check(&p);
	}
	/* Two small pages, a large frame, and one more; those of the parent are not the child's. */
	assert_int_equal(stat.charged, PAGES + 3);
	ctg_mm_destroy(child, false);
	ctg_group_stat(p.group, &stat);
	assert_int_equal(stat.charged, 0);
	parent_write(&p, true);
	parent_close(&p);
}

static void no_memory_unwinds(void **state)
{
	struct parent p;
	struct ctg_mm *child;
	int ret;

	(void)state;
	parent_open(&p);
	for (unsigned room = 0;; room += room < 3 ? 1 : 170) {
		struct hoard *hoard = fragment(&p.w, room, CTG_PFN_NONE);

		/* What is in use now is not the snapshot's. */
		before_free(p.before);
		p.before = before_take(&p.w, p.mm, BASE, p.nr);
		ret = parent_fork(&p, &child);
		if (ret != 0) {
			assert_int_equal(ret, -CTG_ENOMEM);
			parent_check(&p);
		}
		hoard_free_all(&p.w, hoard);
		if (ret == 0)
			break;
		assert_true(room < PAGES + 3);
	}
	check_stamp_of(&p.w, child, p.mm, BASE + 2 * PAGES, PAGES);
	ctg_mm_destroy(child, true);
	parent_close(&p);
}

/* A frame that cannot be mapped once more ends the fork; all before it is undone. */
static void overflow_unwinds(void **state)
{
	struct parent p;
	struct ctg_mm *child;
	ctg_pfn_t pfn;
	uint64_t more;

	(void)state;
	parent_open(&p);
	pfn = pfn_of(p.mm, BASE + (6 + FAR_SLOTS - 1) * PAGES + 3);
	more = (CTG_WORD_MAP_MAX - 1) * CTG_WORD_MAP1;
	hold(&p.w, pfn, more);
	before_free(p.before);
	p.before = before_take(&p.w, p.mm, BASE, p.nr);
	assert_int_equal(parent_fork(&p, &child), -CTG_EOVERFLOW);
	parent_check(&p);
	hold(&p.w, pfn, -more);
	parent_write(&p, false);
	parent_close(&p);
	/* Or a pinned one with all the references that there can be. */
	parent_open(&p);
	more = CTG_WORD_REF_MAX * CTG_WORD_REF1;
	hold(&p.w, p.pinned[0], more);
	before_free(p.before);
	p.before = before_take(&p.w, p.mm, BASE, p.nr);
	assert_int_equal(parent_fork(&p, &child), -CTG_EOVERFLOW);
	parent_check(&p);
	hold(&p.w, p.pinned[0], -more);
	parent_close(&p);
}

/* The port cannot widen what was narrowed: the parent's writes fault and go on. */
static void failed_install_costs_a_fault(void **state)
{
	struct parent p;
	struct ctg_mm *child;

	(void)state;
	parent_open(&p);
	for (unsigned nth = 1; nth < 3; nth++) {
		ctg_sim_fail(p.w.sim, CTG_SIM_INSTALL, nth);
		assert_int_equal(parent_fork(&p, &child), 0);
		ctg_sim_fail(p.w.sim, CTG_SIM_INSTALL, 0);
		for (unsigned i = 0; i < p.nr_pinned; i++)
			assert_int_equal(ctg_word_pin(word_of(&p.w, p.pinned[i])), 1);
		put_byte(&p.w, p.mm, BASE + 7, 1);
		assert_int_equal(pfn_of(p.mm, BASE + 7), p.pinned[0]);
		ctg_mm_destroy(child, false);
	}
	parent_close(&p);
}

/* ---- during migrations ----------------------------------------------------------------------- */

/*
 * A fork has joined the family, and protected its entries, when a migration begins; it shares them
 * at some point of that. (Before it joins it waits for the migration to end.)
 */
static struct during {
	struct world w;
	struct ctg_mm *parent, *child;
	unsigned point, at;
	bool parent_leaves;
	pthread_t thread;
	sem_t protected, go;
} during;

static _Thread_local bool is_forker;

static void *during_fork(void *arg)
{
	(void)arg;
	is_forker = true;
	ctg_sim_set_cpu(1);
	during.child = forked(&during.w, during.parent);
	return NULL;
}

static void during_let_go(void)
{
	sem_post(&during.go);
	pthread_join(during.thread, NULL);
	if (during.parent_leaves)
		assert_int_equal(ctg_munmap(during.parent, BASE, 8 * PAGES), 0);
}

static void during_act(void)
{
	if (during.at++ == during.point)
		during_let_go();
}

static int during_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	int ret;

	if (how == CTG_TLB_INVALIDATE) {
		ret = during.w.port.tlb_restrict(host, mm, ranges, nr, how);
		if (is_forker) {
			sem_post(&during.protected);
			sem_wait(&during.go);
		}
		return ret;
	}
	during_act();
	ret = during.w.port.tlb_restrict(host, mm, ranges, nr, how);
	during_act();
	return ret;
}

static int during_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	int ret = during.w.port.copy(host, runs, nr);

	during_act();
	return ret;
}

static int during_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	int ret;

	during_act();
	ret = during.w.port.tlb_install(host, mm, ranges, nr);
	during_act();
	return ret;
}

/* Returns what the migration did. */
static int during_run(struct during *d, ctg_pfn_t pfn, bool fails)
{
	struct ctg_migrate_stats stats;
	int ret;

	sem_init(&d->protected, 0, 0);
	sem_init(&d->go, 0, 0);
	d->w.ctg->port.tlb_restrict = during_restrict;
	d->w.ctg->port.copy = during_copy;
	d->w.ctg->port.tlb_install = during_install;
	assert_int_equal(pthread_create(&d->thread, NULL, during_fork, NULL), 0);
	sem_wait(&d->protected);
	ctg_sim_fail(d->w.sim, CTG_SIM_INSTALL, fails ? 1 : 0);
	ret = evacuate(&d->w, pfn & ~(PAGES - 1), PAGES, 1, NULL, &stats);
	ctg_sim_fail(d->w.sim, CTG_SIM_INSTALL, 0);
	if (d->at <= d->point)
		during_let_go();
	d->w.ctg->port = d->w.port;
	sem_destroy(&d->protected);
	sem_destroy(&d->go);
	if (ret != 0)
		assert_true(
			stats.obstacle == CTG_OBSTACLE_MAP || stats.obstacle == CTG_OBSTACLE_PORT);
	return ret;
}

/* Small and large frames, with an install that may fail, and a parent that may unmap at once. */
static void fork_during_migration(void **state)
{
	unsigned moved = 0, stayed = 0;

	(void)state;
	for (unsigned run = 0; run < 2 * 2 * 2 * 6; run++) {
		struct during *d = &during;
		bool large = run % 2 != 0, fails = run / 2 % 2 != 0;
		uint64_t nr = large ? PAGES : 30;
		struct ctg_mm *both[2];
		ctg_pfn_t pfn;

		memset(d, 0, sizeof(*d));
		d->parent_leaves = run / 4 % 2 != 0;
		d->point = run / 8;
		world_open(&d->w, 8);
		d->parent = space_new(&d->w, 0);
		if (large)
			map_large(&d->w, d->parent, BASE);
		else
			map_small(&d->w, d->parent, BASE, nr);
		pfn = pfn_of(d->parent, BASE);
		if (during_run(d, pfn, fails) == 0)
			moved++;
		else
			stayed++;
		both[0] = d->parent;
		both[1] = d->child;
		check_family(&d->w, both, 2, BASE, PAGES);
		check_stamp_of(&d->w, d->child, d->parent, BASE, nr);
		if (!d->parent_leaves)
			check_stamp(&d->w, d->parent, BASE, nr);
		stamp(&d->w, d->child, BASE, nr);
		if (!d->parent_leaves) {
			check_stamp(&d->w, d->parent, BASE, nr);
			stamp(&d->w, d->parent, BASE, nr);
		}
		/* And nothing is in the way of the next. */
		evacuate_block(&d->w, pfn_of(d->child, BASE));
		check_stamp(&d->w, d->child, BASE, nr);
		close_both(&d->w, d->parent, d->child);
	}
	assert_true(moved > 8 && stayed > 8);
}

static void shared_frames_migrate(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;
	ctg_pfn_t small, large;

	(void)state;
	world_open(&w, 8);
	parent = space_new(&w, 0);
	map_small(&w, parent, BASE, 10);
	map_large(&w, parent, BASE + PAGES);
	child = forked(&w, parent);
	put_byte(&w, child, BASE + 3, 3);
	small = pfn_of(parent, BASE);
	large = pfn_of(parent, BASE + PAGES);
	evacuate_block(&w, small);
	evacuate_block(&w, large);
	assert_int_not_equal(pfn_of(parent, BASE), small);
	assert_int_equal(pfn_of(child, BASE), pfn_of(parent, BASE));
	assert_int_equal(pfn_of(child, BASE + PAGES), pfn_of(parent, BASE + PAGES));
	assert_true(is_cow(child, BASE) && is_cow(parent, BASE + PAGES));
	assert_int_equal(head_word(&w, child, BASE), counts(2, 0, 0));
	assert_int_not_equal(pfn_of(child, BASE + 3), pfn_of(parent, BASE + 3));
	assert_int_equal(get_byte(&w, child, BASE + 3), 3);
	check_stamp(&w, parent, BASE, 10);
	check_stamp_of(&w, child, parent, BASE + PAGES, PAGES);
	/* In pieces, because both have given up most of it. */
	assert_int_equal(ctg_munmap(parent, BASE + PAGES, 500), 0);
	assert_int_equal(ctg_munmap(child, BASE + PAGES + 12, 500), 0);
	evacuate_block(&w, pfn_of(child, BASE + PAGES));
	check_stamp_of(&w, child, parent, BASE + PAGES, 12);
	check_stamp(&w, parent, BASE + PAGES + 500, 12);
	close_both(&w, parent, child);
}

/* ---- order of writes ------------------------------------------------------------------------- */

static struct {
	struct world *w;
	struct ctg_mm *mm;
	struct ctg_word32 stop;
	uint64_t rounds;
} order;

/* Far enough apart for different batches of slots: early, late. */
static const ctg_vpn_t order_vpn[3] = {BASE, BASE + 80 * PAGES, BASE + 140 * PAGES};

static void write_number(ctg_vpn_t vpn, uint64_t value)
{
	assert_int_equal(
		ctg_sim_write(order.w->sim, order.mm, vpn << CTG_PAGE_SHIFT, &value, sizeof(value)),
		0);
}

static void *write_in_order(void *arg)
{
	(void)arg;
	ctg_sim_set_cpu(1);
	for (uint64_t i = 1; ctg_load32_relaxed(&order.stop) == 0; i++) {
		for (unsigned page = 0; page < 3; page++)
			write_number(order_vpn[page], i);
		order.rounds = i;
	}
	return NULL;
}

static uint64_t read_number(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	uint64_t value;

	assert_int_equal(
		ctg_sim_read(order.w->sim, mm, vpn << CTG_PAGE_SHIFT, &value, sizeof(value)), 0);
	return value;
}

/*
 * Another thread of the parent writes a number to one page after the other, over and over. In every
 * child a page has at least what the next one has, and at most one more; whether they are shared
 * or, being pinned, copied.
 */
static void child_sees_writes_in_order(void **state)
{
	struct world w;
	pthread_t thread;

	(void)state;
	world_open(&w, 8);
	memset(&order, 0, sizeof(order));
	order.w = &w;
	order.mm = space_new(&w, 0);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(ctg_mmap(order.mm, order_vpn[i], 1, RW), 0);
		write_number(order_vpn[i], 0);
	}
	for (unsigned i = 0; i < 140; i++)
		mapped(order.mm, BASE + 1 + i * PAGES, 1, RW);
	hold(&w, pfn_of(order.mm, order_vpn[0]), CTG_WORD_PIN1);
	hold(&w, pfn_of(order.mm, order_vpn[1]), CTG_WORD_PIN1);
	assert_int_equal(pthread_create(&thread, NULL, write_in_order, NULL), 0);
	for (unsigned i = 0; i < 300; i++) {
		struct ctg_mm *child = forked(&w, order.mm);
		uint64_t value[3];

		for (unsigned page = 0; page < 3; page++)
			value[page] = read_number(child, order_vpn[page]);
		assert_true(value[0] >= value[1] && value[1] >= value[2]);
		assert_true(value[0] - value[2] <= 1);
		ctg_mm_destroy(child, true);
	}
	ctg_store32_relaxed(&order.stop, 1);
	pthread_join(thread, NULL);
	unhold(&w, pfn_of(order.mm, order_vpn[0]), CTG_WORD_PIN1);
	unhold(&w, pfn_of(order.mm, order_vpn[1]), CTG_WORD_PIN1);
	ctg_mm_destroy(order.mm, false);
	world_close(&w);
}

/* ---- groups ---------------------------------------------------------------------------------- */

static void who_is_charged(void **state)
{
	struct world w;
	struct ctg_group *a, *b;
	struct ctg_group_stat stat;
	struct ctg_mm_config config = {.owner = &w};
	struct ctg_mm *parent, *child;

	(void)state;
	world_open(&w, 8);
	assert_int_equal(ctg_group_create(w.ctg, NULL, CTG_NO_LIMIT, &a), 0);
	assert_int_equal(ctg_group_create(w.ctg, NULL, CTG_NO_LIMIT, &b), 0);
	parent = space_with(&w, a);
	map_small(&w, parent, BASE, 10);
	config.group = b;
	assert_int_equal(ctg_mm_fork(parent, &config, &child), 0);
	ctg_group_stat(b, &stat);
	assert_int_equal(stat.charged, 0);
	put_byte(&w, child, BASE, 1);
	put_byte(&w, parent, BASE + 1, 1);
	ctg_group_stat(b, &stat);
	assert_int_equal(stat.charged, 1);
	ctg_group_stat(a, &stat);
	assert_int_equal(stat.charged, 11);
	/* Whoever has it last, it was charged to whom it was allocated for. */
	ctg_mm_destroy(parent, false);
	ctg_group_stat(a, &stat);
	assert_int_equal(stat.charged, 9);
	ctg_mm_destroy(child, false);
	assert_int_equal(ctg_group_destroy(a), 0);
	assert_int_equal(ctg_group_destroy(b), 0);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(small_pages_are_shared),
		cmocka_unit_test(reserved_is_reserved),
		cmocka_unit_test(large_frames_are_shared_whole),
		cmocka_unit_test(bad_arguments),
		cmocka_unit_test(child_inherits),
		cmocka_unit_test(pinned_page_is_copied),
		cmocka_unit_test(pinned_read_only_page_is_copied),
		cmocka_unit_test(pinned_large_frame_is_copied),
		cmocka_unit_test(pinned_pieces_are_copied),
		cmocka_unit_test(glance_at_a_shared_page_copies_nothing),
		cmocka_unit_test(order_of_the_steps),
		cmocka_unit_test(every_hook_failure_unwinds),
		cmocka_unit_test(group_limit_unwinds),
		cmocka_unit_test(no_memory_unwinds),
		cmocka_unit_test(overflow_unwinds),
		cmocka_unit_test(failed_install_costs_a_fault),
		cmocka_unit_test(fork_during_migration),
		cmocka_unit_test(shared_frames_migrate),
		cmocka_unit_test(child_sees_writes_in_order),
		cmocka_unit_test(who_is_charged),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
