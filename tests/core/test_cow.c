/* SPDX-License-Identifier: MIT */
/* Copy-on-write: when a page is reused and when it is copied, and what a failure leaves. */
#include "family.h"

/* A parent with nr small stamped pages, and a child. */
struct pair {
	struct world w;
	struct ctg_mm *parent, *child;
};

static void pair_open(struct pair *p, uint64_t nr)
{
	world_open(&p->w, 12);
	p->parent = space_new(&p->w, 0);
	if (nr != 0)
		map_small(&p->w, p->parent, BASE, nr);
	else
		map_large(&p->w, p->parent, BASE);
	p->child = forked(&p->w, p->parent);
}

static void pair_close(struct pair *p)
{
	struct ctg_mm *const both[] = {p->parent, p->child};

	check_family(&p->w, both, 2, BASE, PAGES);
	ctg_mm_destroy(p->child, false);
	ctg_mm_destroy(p->parent, false);
	world_close(&p->w);
}

static void pair_lose_child(struct pair *p)
{
	ctg_mm_destroy(p->child, false);
	p->child = NULL;
}

/* ---- small pages ----------------------------------------------------------------------------- */

static void first_writer_copies_last_reuses(void **state)
{
	struct pair p;
	ctg_pfn_t pfn;
	uint64_t free;

	(void)state;
	pair_open(&p, 4);
	pfn = pfn_of(p.parent, BASE);
	free = world_free(&p.w);
	put_byte(&p.w, p.child, BASE, 0x11);
	assert_int_equal(world_free(&p.w), free - 1);
	assert_int_not_equal(pfn_of(p.child, BASE), pfn);
	assert_false(is_cow(p.child, BASE));
	assert_int_equal(head_word(&p.w, p.child, BASE), counts(1, 0, 0));
	assert_int_equal(word_of(&p.w, pfn), counts(1, 0, 0));
	check_stamp(&p.w, p.parent, BASE, 4);
	/* The parent does not know yet that it is alone. */
	assert_true(is_cow(p.parent, BASE));
	put_byte(&p.w, p.parent, BASE, 0x22);
	assert_int_equal(pfn_of(p.parent, BASE), pfn);
	assert_false(is_cow(p.parent, BASE));
	assert_int_equal(world_free(&p.w), free - 1);
	assert_int_equal(get_byte(&p.w, p.child, BASE), 0x11);
	assert_int_equal(get_byte(&p.w, p.parent, BASE), 0x22);
	/* Neighbours are as they were. */
	assert_int_equal(lookup(p.parent, BASE + 1, 3).prot, CTG_PROT_READ);
	assert_int_equal(lookup(p.parent, BASE, 3).nr, 1);
	assert_int_equal(lookup(p.parent, BASE, 1).prot, RW);
	assert_int_equal(stat_of(p.child).nr_present, 4);
	pair_close(&p);
}

static void reads_do_not_copy(void **state)
{
	struct pair p;
	uint64_t free;

	(void)state;
	pair_open(&p, 2);
	free = world_free(&p.w);
	get_byte(&p.w, p.child, BASE);
	assert_int_equal(ctg_handle_fault(p.child, BASE, false), 0);
	assert_int_equal(ctg_cow_break(p.parent, BASE + 5, 0), 0); /* nothing there */
	assert_int_equal(world_free(&p.w), free);
	assert_true(is_cow(p.child, BASE));
	pair_close(&p);
}

/* Pins of one's own do not prevent the reuse; a reference, which may be anybody's, does. */
static void who_prevents_the_reuse(void **state)
{
	struct pair p;
	ctg_pfn_t pinned, referred;

	(void)state;
	pair_open(&p, 2);
	pair_lose_child(&p);
	pinned = pfn_of(p.parent, BASE);
	referred = pfn_of(p.parent, BASE + 1);
	hold(&p.w, pinned, 3 * CTG_WORD_PIN1);
	hold(&p.w, referred, CTG_WORD_REF1);
	put_byte(&p.w, p.parent, BASE, 1);
	put_byte(&p.w, p.parent, BASE + 1, 1);
	assert_int_equal(pfn_of(p.parent, BASE), pinned);
	assert_int_equal(word_of(&p.w, pinned), counts(1, 3, 0));
	assert_int_not_equal(pfn_of(p.parent, BASE + 1), referred);
	assert_int_equal(word_of(&p.w, referred), counts(0, 0, 1));
	/* Who has the reference sees what was there. */
	assert_int_not_equal(*(unsigned char *)ctg_sim_frame(p.w.sim, referred), 1);
	for (unsigned i = 0; i < 3; i++)
		unhold(&p.w, pinned, CTG_WORD_PIN1);
	unhold(&p.w, referred, CTG_WORD_REF1);
	ctg_mm_destroy(p.parent, false);
	world_close(&p.w);
}

/* The child has the page, takes a reference, unmaps: it must not see what the parent writes. */
static void page_kept_after_unmap_stays(void **state)
{
	struct pair p;
	uint64_t before, after;
	ctg_pfn_t pfn;

	(void)state;
	pair_open(&p, 1);
	pfn = pfn_of(p.child, BASE);
	hold(&p.w, pfn, CTG_WORD_REF1);
	assert_int_equal(ctg_munmap(p.child, BASE, 1), 0);
	memcpy(&before, ctg_sim_frame(p.w.sim, pfn), sizeof(before));
	put_byte(&p.w, p.parent, BASE, 0x5a);
	put_byte(&p.w, p.parent, BASE, 0x5b);
	memcpy(&after, ctg_sim_frame(p.w.sim, pfn), sizeof(after));
	assert_int_equal(before, after);
	unhold(&p.w, pfn, CTG_WORD_REF1);
	pair_close(&p);
}

static void unshare_ignores_rights(void **state)
{
	struct pair p;
	ctg_pfn_t pfn;

	(void)state;
	pair_open(&p, 2);
	pfn = pfn_of(p.parent, BASE);
	assert_int_equal(ctg_mprotect(p.parent, BASE, 2, CTG_PROT_READ), 0);
	assert_int_equal(ctg_cow_unshare(p.parent, BASE, false), 0);
	assert_false(is_cow(p.parent, BASE));
	assert_int_not_equal(pfn_of(p.parent, BASE), pfn);
	assert_int_equal(lookup(p.parent, BASE, 1).prot, CTG_PROT_READ);
	check_stamp(&p.w, p.parent, BASE, 2);
	/* The frame that is kept by the other is that one's alone. */
	assert_int_equal(ctg_cow_unshare(p.child, BASE, true), 0);
	assert_int_equal(pfn_of(p.child, BASE), pfn);
	assert_int_equal(lookup(p.child, BASE, 1).prot, RW);
	/* Exclusive already: nothing happens. */
	assert_int_equal(ctg_cow_unshare(p.child, BASE, true), 0);
	assert_int_equal(pfn_of(p.child, BASE), pfn);
	/* The right to write comes back; the page that is still shared is copied then. */
	assert_int_equal(ctg_mprotect(p.parent, BASE, 2, RW), 0);
	put_byte(&p.w, p.parent, BASE, 1);
	put_byte(&p.w, p.parent, BASE + 1, 1);
	assert_int_not_equal(pfn_of(p.parent, BASE + 1), pfn_of(p.child, BASE + 1));
	pair_close(&p);
}

static void write_needs_the_right(void **state)
{
	struct pair p;

	(void)state;
	pair_open(&p, 1);
	assert_int_equal(ctg_mprotect(p.parent, BASE, 1, CTG_PROT_READ), 0);
	assert_int_equal(ctg_handle_fault(p.parent, BASE, true), -CTG_EFAULT);
	assert_true(is_cow(p.parent, BASE));
	pair_close(&p);
}

static void moving_page_waits(void **state)
{
	struct pair p;

	(void)state;
	pair_open(&p, 1);
	change_entry(p.parent, BASE, CTG_PTE_MOVING, 0);
	assert_int_equal(ctg_cow_break(p.parent, BASE, 0), -CTG_EAGAIN);
	change_entry(p.parent, BASE, 0, CTG_PTE_MOVING);
	assert_int_equal(ctg_cow_break(p.parent, BASE, 0), 0);
	assert_false(is_cow(p.parent, BASE));
	pair_close(&p);
}

static void marks_survive(void **state)
{
	struct pair p;

	(void)state;
	pair_open(&p, 1);
	ctg_mm_mark_accessed(p.child, BASE, true);
	assert_int_equal(ctg_cow_unshare(p.child, BASE, false), 0);
	assert_int_equal(raw_entry(p.child, BASE) & (CTG_PTE_YOUNG | CTG_PTE_DIRTY),
		CTG_PTE_YOUNG | CTG_PTE_DIRTY);
	pair_close(&p);
}

/* ---- what the port sees ---------------------------------------------------------------------- */

static struct {
	struct world *w;
	struct ctg_mm *mm;
	ctg_pfn_t old;
	unsigned invalidated, installed, copied;
} seen;

static int see_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	/* The source is held, cannot be written to, and is still what is mapped. */
	assert_int_equal(nr, 1);
	assert_int_equal(runs[0].src, seen.old);
	assert_int_equal(lookup(seen.mm, BASE, 1).pfn, seen.old);
	assert_int_equal(ctg_word_ref(word_of(seen.w, seen.old)), 1);
	assert_int_equal(seen.invalidated, 0);
	seen.copied++;
	return seen.w->port.copy(host, runs, nr);
}

static int see_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how)
{
	/* The entry says the copy, but nobody may write; the old frame has not been let go. */
	assert_int_equal(how, CTG_TLB_INVALIDATE);
	assert_int_equal(nr, 1);
	assert_int_equal(ranges[0].vpn, BASE);
	assert_int_equal(ranges[0].nr, 1);
	assert_int_not_equal(lookup(seen.mm, BASE, 1).pfn, seen.old);
	assert_int_equal(lookup(seen.mm, BASE, 1).prot, CTG_PROT_READ);
	assert_int_equal(ctg_word_map(word_of(seen.w, seen.old)), 2);
	assert_int_equal(seen.copied, 1);
	seen.invalidated++;
	return seen.w->port.tlb_restrict(host, mm, ranges, nr, how);
}

static int see_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	assert_int_equal(lookup(seen.mm, BASE, 1).prot, RW);
	assert_int_equal(seen.invalidated, 1);
	assert_int_equal(ctg_word_map(word_of(seen.w, seen.old)), 1);
	seen.installed++;
	return seen.w->port.tlb_install(host, mm, ranges, nr);
}

/* No write to the copy before the last reader of the old frame has gone. */
static void order_of_the_steps(void **state)
{
	struct pair p;

	(void)state;
	pair_open(&p, 3);
	memset(&seen, 0, sizeof(seen));
	seen.w = &p.w;
	seen.mm = p.child;
	seen.old = pfn_of(p.child, BASE);
	p.w.ctg->port.copy = see_copy;
	p.w.ctg->port.tlb_restrict = see_restrict;
	p.w.ctg->port.tlb_install = see_install;
	put_byte(&p.w, p.child, BASE, 9);
	assert_int_equal(seen.copied, 1);
	assert_int_equal(seen.installed, 1);
	p.w.ctg->port = p.w.port;
	pair_close(&p);
}

/* ---- large frames ---------------------------------------------------------------------------- */

static void large_is_copied_whole(void **state)
{
	struct pair p;
	ctg_pfn_t pfn;
	uint64_t free;

	(void)state;
	pair_open(&p, 0);
	pfn = pfn_of(p.parent, BASE);
	free = world_free(&p.w);
	put_byte(&p.w, p.parent, BASE + 300, 7);
	assert_int_equal(level_of(p.parent, BASE), 1);
	assert_int_equal(world_free(&p.w), free - PAGES);
	assert_int_equal(word_of(&p.w, pfn), counts(1, 0, 0));
	check_stamp_of(&p.w, p.parent, p.parent, BASE, 300);
	check_stamp_of(&p.w, p.child, p.parent, BASE, PAGES);
	put_byte(&p.w, p.child, BASE, 7);
	assert_int_equal(pfn_of(p.child, BASE), pfn);
	assert_int_equal(world_free(&p.w), free - PAGES);
	pair_close(&p);
}

static void large_without_room_is_split(void **state)
{
	struct pair p;
	struct hoard *hoard;
	ctg_pfn_t pfn;
	uint64_t free;

	(void)state;
	pair_open(&p, 0);
	pfn = pfn_of(p.parent, BASE);
	hoard = fragment(&p.w, 40, pfn);
	free = world_free(&p.w);
	put_byte(&p.w, p.parent, BASE + 300, 7);
	assert_int_equal(level_of(p.parent, BASE), 0);
	assert_int_equal(world_free(&p.w), free - 1);
	assert_int_equal(word_of(&p.w, pfn), counts(PAGES, 0, 0));
	assert_int_equal(pfn_of(p.parent, BASE + 299), pfn + 299);
	assert_int_not_equal(pfn_of(p.parent, BASE + 300), pfn + 300);
	check_stamp_of(&p.w, p.child, p.parent, BASE, PAGES);
	/* The child is not alone with its frame: the parent has 511 pages of it. */
	put_byte(&p.w, p.child, BASE + 5, 7);
	assert_int_equal(world_free(&p.w), free - 2);
	assert_int_equal(word_of(&p.w, pfn), counts(2 * PAGES - 2, 0, 0));
	/* Then it is. All of the table is the child's at once. */
	assert_int_equal(ctg_munmap(p.parent, BASE, PAGES), 0);
	put_byte(&p.w, p.child, BASE + 6, 8);
	assert_int_equal(pfn_of(p.child, BASE + 6), pfn + 6);
	for (unsigned i = 0; i < PAGES; i++)
		assert_false(is_cow(p.child, BASE + i));
	assert_int_equal(lookup(p.child, BASE + 6, PAGES - 6).nr, PAGES - 6);
	hoard_free_all(&p.w, hoard);
	pair_close(&p);
}

static void split_frame_with_a_reference_is_copied(void **state)
{
	struct pair p;
	ctg_pfn_t pfn;

	(void)state;
	pair_open(&p, 0);
	pair_lose_child(&p);
	pfn = pfn_of(p.parent, BASE);
	assert_int_equal(ctg_munmap(p.parent, BASE + 9, 2), 0);
	hold(&p.w, pfn, CTG_WORD_REF1);
	put_byte(&p.w, p.parent, BASE + 4, 1);
	assert_int_not_equal(pfn_of(p.parent, BASE + 4), pfn + 4);
	assert_true(is_cow(p.parent, BASE + 5));
	unhold(&p.w, pfn, CTG_WORD_REF1);
	hold(&p.w, pfn, CTG_WORD_PIN1);
	put_byte(&p.w, p.parent, BASE + 5, 1);
	assert_int_equal(pfn_of(p.parent, BASE + 5), pfn + 5);
	assert_false(is_cow(p.parent, BASE + PAGES - 1));
	unhold(&p.w, pfn, CTG_WORD_PIN1);
	ctg_mm_destroy(p.parent, false);
	world_close(&p.w);
}

static void large_only_space_copies_or_fails(void **state)
{
	struct world w;
	struct ctg_mm *parent, *child;
	struct hoard *hoard;
	uint64_t before;

	(void)state;
	world_open(&w, 12);
	parent = space_new(&w, CTG_PAGEBLOCK_ORDER);
	map_large(&w, parent, BASE);
	child = forked(&w, parent);
	before = raw_entry(parent, BASE);
	hoard = fragment(&w, 600, pfn_of(parent, BASE));
	assert_int_equal(ctg_handle_fault(parent, BASE + 3, true), -CTG_ENOMEM);
	assert_int_equal(raw_entry(parent, BASE), before);
	assert_int_equal(level_of(parent, BASE), 1);
	assert_int_equal(head_word(&w, parent, BASE), counts(2, 0, 0));
	hoard_free_all(&w, hoard);
	put_byte(&w, parent, BASE + 3, 3);
	assert_int_not_equal(pfn_of(parent, BASE), pfn_of(child, BASE));
	ctg_mm_destroy(parent, false);
	check_stamp_of(&w, child, parent, BASE, PAGES);
	ctg_mm_destroy(child, false);
	world_close(&w);
}

/* ---- failures -------------------------------------------------------------------------------- */

static void failures_leave_it_as_it_was(void **state)
{
	static const struct {
		enum ctg_sim_hook hook;
		int error;
	} fails[] = {{CTG_SIM_COPY, -CTG_ENOMEM}, {CTG_SIM_INSTALL, -CTG_ENOMEM}};

	(void)state;
	for (unsigned large = 0; large < 2; large++)
		for (unsigned i = 0; i < 2; i++) {
			struct pair p;
			uint64_t free, word;

			pair_open(&p, large != 0 ? 0 : 3);
			free = world_free(&p.w);
			word = head_word(&p.w, p.child, BASE);
			ctg_sim_fail(p.w.sim, fails[i].hook, 1);
			assert_int_equal(ctg_handle_fault(p.child, BASE + 1, true), fails[i].error);
			assert_true(is_cow(p.child, BASE + 1));
			assert_int_equal(lookup(p.child, BASE + 1, 1).prot, CTG_PROT_READ);
			check_stamp_of(&p.w, p.child, p.parent, BASE, 3);
			if (fails[i].hook == CTG_SIM_COPY) {
				assert_int_equal(world_free(&p.w), free);
				assert_int_equal(head_word(&p.w, p.child, BASE), word);
			}
			put_byte(&p.w, p.child, BASE + 1, 3);
			assert_false(is_cow(p.child, BASE + 1));
			check_stamp(&p.w, p.parent, BASE, 3);
			pair_close(&p);
		}
}

static void reuse_survives_a_failed_install(void **state)
{
	struct pair p;
	ctg_pfn_t pfn;

	(void)state;
	pair_open(&p, 0);
	pair_lose_child(&p);
	pfn = pfn_of(p.parent, BASE);
	/* As one entry, and in pieces of which one is another's. */
	ctg_sim_fail(p.w.sim, CTG_SIM_INSTALL, 1);
	assert_int_equal(ctg_handle_fault(p.parent, BASE, true), -CTG_ENOMEM);
	assert_true(is_cow(p.parent, BASE));
	assert_int_equal(ctg_madvise_dontneed(p.parent, BASE + 100, 1), 0);
	put_byte(&p.w, p.parent, BASE + 100, 1);
	ctg_sim_fail(p.w.sim, CTG_SIM_INSTALL, 1);
	assert_int_equal(ctg_handle_fault(p.parent, BASE, true), -CTG_ENOMEM);
	for (unsigned i = 0; i < PAGES; i++)
		assert_int_equal(is_cow(p.parent, BASE + i), i != 100);
	put_byte(&p.w, p.parent, BASE + 7, 1);
	assert_int_equal(pfn_of(p.parent, BASE + 7), pfn + 7);
	for (unsigned i = 0; i < PAGES; i++)
		assert_false(is_cow(p.parent, BASE + i));
	ctg_mm_destroy(p.parent, false);
	world_close(&p.w);
}

static void no_memory_and_no_room_in_the_group(void **state)
{
	struct world w;
	struct ctg_group *group;
	struct ctg_mm_config config = {.owner = &w};
	struct ctg_mm *parent, *child;
	struct hoard *hoard;
	uint64_t before;

	(void)state;
	world_open(&w, 6);
	assert_int_equal(ctg_group_create(w.ctg, NULL, 1, &group), 0);
	parent = space_new(&w, 0);
	map_small(&w, parent, BASE, 3);
	config.group = group;
	assert_int_equal(ctg_mm_fork(parent, &config, &child), 0);
	put_byte(&w, child, BASE, 1);
	before = raw_entry(child, BASE + 1);
	assert_int_equal(ctg_handle_fault(child, BASE + 1, true), -CTG_ENOSPC);
	assert_int_equal(raw_entry(child, BASE + 1), before);
	assert_int_equal(head_word(&w, child, BASE + 1), counts(2, 0, 0));
	/* What it gives up it may use again. */
	assert_int_equal(ctg_munmap(child, BASE, 1), 0);
	put_byte(&w, child, BASE + 1, 1);
	ctg_group_set_limit(group, CTG_NO_LIMIT);
	hoard = hoard_orders(&w, 0, CTG_GFP_MOVABLE);
	assert_int_equal(ctg_handle_fault(child, BASE + 2, true), -CTG_ENOMEM);
	assert_true(is_cow(child, BASE + 2));
	/* Alone, it needs none. */
	assert_int_equal(ctg_munmap(parent, BASE, 3), 0);
	put_byte(&w, child, BASE + 2, 1);
	hoard_free_all(&w, hoard);
	ctg_mm_destroy(parent, false);
	ctg_mm_destroy(child, false);
	assert_int_equal(ctg_group_destroy(group), 0);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(first_writer_copies_last_reuses),
		cmocka_unit_test(reads_do_not_copy),
		cmocka_unit_test(who_prevents_the_reuse),
		cmocka_unit_test(page_kept_after_unmap_stays),
		cmocka_unit_test(unshare_ignores_rights),
		cmocka_unit_test(write_needs_the_right),
		cmocka_unit_test(moving_page_waits),
		cmocka_unit_test(marks_survive),
		cmocka_unit_test(order_of_the_steps),
		cmocka_unit_test(large_is_copied_whole),
		cmocka_unit_test(large_without_room_is_split),
		cmocka_unit_test(split_frame_with_a_reference_is_copied),
		cmocka_unit_test(large_only_space_copies_or_fails),
		cmocka_unit_test(failures_leave_it_as_it_was),
		cmocka_unit_test(reuse_survives_a_failed_install),
		cmocka_unit_test(no_memory_and_no_room_in_the_group),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
