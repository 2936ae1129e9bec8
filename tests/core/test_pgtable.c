/* SPDX-License-Identifier: MIT */
/*
 * pgtable.c is compiled into this test, with something that can happen before each of its atomics:
 * so every interleaving of a walk with a change of the tree is tried, one after the other.
 */
static void switch_point(void);
#define CTG_SWITCH_POINT() switch_point()

#include "space.h"

#include <pthread.h>

#include "../../src/pgtable.c"

/* Before the nth atomic from now on (of this thread), fn happens. */
static _Thread_local struct {
	unsigned nth;
	void (*fn)(struct ctg_mm *mm);
	struct ctg_mm *mm;
} other;

static void switch_point(void)
{
	if (other.nth != 0 && --other.nth == 0)
		other.fn(other.mm);
}

static unsigned level_of(const struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned level;

	ctg_pte_read(mm, vpn, &level);
	return level;
}

static uint64_t tables_of(struct ctg_mm *mm)
{
	struct ctg_mm_stat stat;

	ctg_mm_stat(mm, &stat);
	return stat.nr_tables;
}

/* Change one entry as migration would. */
static void set_entry(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t entry)
{
	struct ctg_pte_ref ref;

	ctg_pte_lock(mm, vpn, &ref);
	ctg_pte_set(&ref, entry);
	ctg_pte_unlock(mm, &ref);
}

static void test_empty_space_is_one_table(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	unsigned level;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_pte_read(mm, 0, &level), 0);
	assert_int_equal(level, 3);
	assert_int_equal(ctg_pte_read(mm, CTG_MM_MAX_VPN - 1, &level), 0);
	assert_int_equal(level, 3);
	assert_int_equal(tables_of(mm), 1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_reserved_uses_the_largest_entries(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	const uint64_t gib = ctg_level_pages(2);

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	/* One page, the rest of its slot of 2 MiB, the rest of 1 GiB, two of 1 GiB, 2 MiB, a page.
	 */
	assert_int_equal(
		ctg_mmap(mm, BASE + gib - PAGES - 1, PAGES + 1 + 2 * gib + PAGES + 1, RW), 0);
	assert_int_equal(level_of(mm, BASE + gib - PAGES - 1), 0);
	assert_int_equal(level_of(mm, BASE + gib - PAGES), 1);
	assert_int_equal(level_of(mm, BASE + gib), 2);
	assert_int_equal(level_of(mm, BASE + 2 * gib), 2);
	assert_int_equal(level_of(mm, BASE + 3 * gib), 1);
	assert_int_equal(level_of(mm, BASE + 3 * gib + PAGES), 0);
	assert_int_equal(entry_of(mm, BASE + gib - PAGES - 2), 0);
	assert_int_equal(entry_of(mm, BASE + 3 * gib + PAGES + 1), 0);
	/* root, one of level 2, two of level 1, two of level 0 */
	assert_int_equal(tables_of(mm), 6);
	assert_int_equal(ctg_munmap(mm, 0, CTG_MM_MAX_VPN), 0);
	assert_int_equal(tables_of(mm), 1);
	/* Nothing larger than 1 GiB. */
	assert_int_equal(ctg_mmap(mm, 0, ctg_level_pages(3), RW), 0);
	assert_int_equal(level_of(mm, 0), 2);
	assert_int_equal(tables_of(mm), 2);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_split_reserved(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, ctg_level_pages(2), CTG_PROT_READ), 0);
	assert_int_equal(level_of(mm, BASE + 7 * PAGES + 9), 2);
	assert_int_equal(ctg_pte_split_to(mm, BASE + 7 * PAGES + 9, 2), 0);
	assert_int_equal(tables_of(mm), 2);
	assert_int_equal(ctg_pte_split_to(mm, BASE + 7 * PAGES + 9, 0), 0);
	assert_int_equal(tables_of(mm), 4);
	for (uint64_t i = 0; i < ctg_level_pages(2); i++) {
		unsigned level;

		assert_int_equal(
			ctg_pte_read(mm, BASE + i, &level), CTG_PTE_RESERVED | CTG_PTE_READ);
		assert_int_equal(level, i / PAGES == 7 ? 0 : 1);
	}
	assert_int_equal(entry_of(mm, BASE - 1), 0);
	assert_int_equal(entry_of(mm, BASE + ctg_level_pages(2)), 0);
	/* What was split is fused again. */
	ctg_pte_prune(mm, BASE, BASE + ctg_level_pages(2));
	assert_int_equal(tables_of(mm), 2);
	assert_int_equal(level_of(mm, BASE), 2);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_split_empty(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_pte_split_to(mm, BASE, 0), 0);
	assert_int_equal(tables_of(mm), 4);
	assert_int_equal(level_of(mm, BASE + 511), 0);
	assert_int_equal(entry_of(mm, BASE + 511), 0);
	ctg_pte_prune(mm, BASE, BASE + 1);
	assert_int_equal(tables_of(mm), 1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_split_fails_without_memory(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	for (uint64_t nth = 1; nth <= 3; nth++) {
		mm = space_new(&w, 0);
		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, nth);
		assert_int_equal(ctg_pte_split_to(mm, BASE, 0), -CTG_ENOMEM);
		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0);
		assert_int_equal(entry_of(mm, BASE), 0);
		assert_int_equal(tables_of(mm), nth);
		assert_int_equal(ctg_pte_split_to(mm, BASE, 0), 0);
		ctg_mm_destroy(mm, false);
		world_check_clean(&w);
	}
	world_close(&w);
}

/* A space with one large frame at BASE. */
static struct ctg_mm *space_large(struct world *w, ctg_pfn_t *pfn)
{
	struct ctg_mm *mm = space_new(w, 0);

	assert_int_equal(ctg_mmap(mm, BASE, PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, PAGES, NULL), 0);
	assert_int_equal(level_of(mm, BASE), 1);
	*pfn = ctg_pte_pfn(entry_of(mm, BASE));
	assert_int_equal(word_of(w, *pfn), CTG_WORD_MAP1);
	return mm;
}

static void test_split_present_counts_pieces(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_large(&w, &pfn);
	set_entry(mm, BASE, entry_of(mm, BASE) | CTG_PTE_DIRTY | CTG_PTE_MOVING);
	assert_int_equal(ctg_pte_split_to(mm, BASE + 77, 0), 0);
	assert_int_equal(word_of(&w, pfn), PAGES * CTG_WORD_MAP1);
	for (uint64_t i = 0; i < PAGES; i++) {
		unsigned level;

		assert_int_equal(ctg_pte_read(mm, BASE + i, &level),
			ctg_pte(pfn + i,
				CTG_PTE_PRESENT | CTG_PTE_RIGHTS | CTG_PTE_DIRTY | CTG_PTE_MOVING));
		assert_int_equal(level, 0);
		assert_int_equal(ctg_frame_head(w.ctg, pfn + i), pfn);
	}
	/* Each page that goes drops one. */
	assert_int_equal(ctg_munmap(mm, BASE + 1, 100), 0);
	assert_int_equal(word_of(&w, pfn), (PAGES - 100) * CTG_WORD_MAP1);
	assert_int_equal(world_free(&w), w.nr_free - PAGES);
	assert_int_equal(ctg_munmap(mm, BASE, PAGES), 0);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_split_present_refuses_overflow(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_frame *frame;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_large(&w, &pfn);
	frame = ctg_frame_of(w.ctg, pfn);
	ctg_store64_release(&frame->word, CTG_WORD_MAP_MAX - 510);
	assert_int_equal(ctg_pte_split_to(mm, BASE, 0), -CTG_EOVERFLOW);
	assert_int_equal(word_of(&w, pfn), CTG_WORD_MAP_MAX - 510);
	assert_int_equal(level_of(mm, BASE), 1);
	/* munmap of a part reports it, and leaves all as it was. */
	assert_int_equal(ctg_munmap(mm, BASE, 1), -CTG_EOVERFLOW);
	assert_int_equal(lookup(mm, BASE, PAGES).nr, PAGES);
	ctg_store64_release(&frame->word, CTG_WORD_MAP_MAX - 511);
	assert_int_equal(ctg_pte_split_to(mm, BASE, 0), 0);
	assert_int_equal(word_of(&w, pfn), CTG_WORD_MAP_MAX);
	ctg_store64_release(&frame->word, PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static struct world *frozen_world;
static ctg_pfn_t frozen_pfn;

/* The migration that froze the frame gives up. */
static int wait_unfreezes(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	struct ctg_frame *frame = ctg_frame_of(frozen_world->ctg, frozen_pfn);

	(void)host;
	(void)word;
	(void)expected;
	(void)deadline;
	(void)killable;
	assert_true(ctg_word_frozen(ctg_load64_acquire(&frame->word)));
	ctg_frame_unfreeze(frozen_world->ctg, frame, CTG_WORD_MAP1);
	return 0;
}

static void test_split_waits_for_a_frozen_frame(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	uint64_t seen;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_large(&w, &pfn);
	assert_true(ctg_frame_freeze(ctg_frame_of(w.ctg, pfn), 1, 0, &seen));
	frozen_world = &w;
	frozen_pfn = pfn;
	w.ctg->port.wait = wait_unfreezes;
	assert_int_equal(ctg_pte_split_to(mm, BASE, 0), 0);
	w.ctg->port.wait = w.port.wait;
	assert_int_equal(word_of(&w, pfn), PAGES * CTG_WORD_MAP1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_set_keeps_marks_that_come_in(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_pte_ref ref;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_large(&w, &pfn);
	ctg_mm_mark_accessed(mm, BASE + 5, false);
	assert_int_equal(
		entry_of(mm, BASE), ctg_pte(pfn, CTG_PTE_PRESENT | CTG_PTE_RIGHTS | CTG_PTE_YOUNG));
	/* DIRTY comes after the look: kept. YOUNG was there before, so it may be cleared. */
	ctg_pte_lock(mm, BASE, &ref);
	ctg_mm_mark_accessed(mm, BASE, true);
	ctg_pte_set(&ref, ctg_pte(pfn, CTG_PTE_PRESENT | CTG_PTE_READ));
	assert_int_equal(ref.entry, ctg_pte(pfn, CTG_PTE_PRESENT | CTG_PTE_READ | CTG_PTE_DIRTY));
	ctg_pte_unlock(mm, &ref);
	assert_int_equal(entry_of(mm, BASE), ref.entry);
	/* Not when it goes. */
	assert_int_equal(ctg_madvise_dontneed(mm, BASE, PAGES), 0);
	assert_int_equal(entry_of(mm, BASE), CTG_PTE_RESERVED | CTG_PTE_READ);
	/* Nor are entries marked that are not PRESENT. */
	ctg_mm_mark_accessed(mm, BASE, true);
	ctg_mm_mark_accessed(mm, BASE + PAGES, true);
	ctg_mm_mark_accessed(mm, CTG_MM_MAX_VPN, true);
	assert_int_equal(entry_of(mm, BASE), CTG_PTE_RESERVED | CTG_PTE_READ);
	assert_int_equal(entry_of(mm, BASE + PAGES), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_set_table_moves_late_marks(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_pte_ref ref;
	struct ctg_table *table;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_large(&w, &pfn);
	table = ctg_table_alloc(mm, 0);
	assert_non_null(table);
	ctg_pte_lock(mm, BASE, &ref);
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		ctg_store64_release(&table->entry[i],
			i % 2 != 0 ? CTG_PTE_RESERVED | CTG_PTE_READ
				   : ctg_pte(pfn + i, CTG_PTE_PRESENT | CTG_PTE_READ));
	ctg_mm_mark_accessed(mm, BASE + 3, true);
	ctg_pte_set_table(mm, &ref, table);
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		assert_int_equal(entry_of(mm, BASE + i),
			i % 2 != 0 ? CTG_PTE_RESERVED | CTG_PTE_READ
				   : ctg_pte(pfn + i, CTG_PTE_PRESENT | CTG_PTE_READ |
							      CTG_PTE_YOUNG | CTG_PTE_DIRTY));
	assert_int_equal(table->used, CTG_TABLE_ENTRIES);
	/* Half of the pieces are mappings; tell the frame. */
	ctg_store64_release(&ctg_frame_of(w.ctg, pfn)->word, PAGES / 2 * CTG_WORD_MAP1);
	ctg_add64_relaxed(&mm->nr_present, -(PAGES / 2));
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_tables_are_used_again(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_table *table;
	uint64_t bytes;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	table = ctg_table_alloc(mm, 0);
	assert_non_null(table);
	bytes = ctg_sim_meta_bytes(w.sim);
	ctg_store64_release(&table->entry[3], CTG_PTE_RESERVED);
	ctg_table_free(mm, table);
	ctg_table_free(mm, NULL);
	assert_ptr_equal(ctg_table_alloc(mm, 1), table);
	assert_int_equal(table->level, 1);
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		assert_int_equal(ctg_load64_relaxed(&table->entry[i]), 0);
	assert_int_equal(ctg_sim_meta_bytes(w.sim), bytes);
	ctg_table_free(mm, table);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_prune(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	/* Neighbours with the same rights fuse, step by step, up to 2 MiB. */
	assert_int_equal(ctg_mmap(mm, BASE, 100, RW), 0);
	assert_int_equal(ctg_mmap(mm, BASE + 200, 312, RW), 0);
	assert_int_equal(tables_of(mm), 4);
	assert_int_equal(ctg_mmap(mm, BASE + 100, 100, RW), 0);
	assert_int_equal(tables_of(mm), 3);
	assert_int_equal(level_of(mm, BASE), 1);
	/* Other rights: not. */
	assert_int_equal(ctg_mprotect(mm, BASE, 1, CTG_PROT_READ), 0);
	assert_int_equal(level_of(mm, BASE), 0);
	assert_int_equal(ctg_mprotect(mm, BASE, 1, RW), 0);
	assert_int_equal(level_of(mm, BASE), 1);
	/* Nor with a frame. */
	assert_int_equal(ctg_mm_populate(mm, BASE + 9, 1, NULL), 0);
	ctg_pte_prune(mm, BASE, BASE + PAGES);
	assert_int_equal(level_of(mm, BASE), 0);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE + 9, 1), 0);
	assert_int_equal(level_of(mm, BASE), 1);
	/* The last page that goes takes the tables with it. */
	assert_int_equal(ctg_munmap(mm, BASE + 1, PAGES - 1), 0);
	assert_int_equal(tables_of(mm), 4);
	assert_int_equal(ctg_munmap(mm, BASE, 1), 0);
	assert_int_equal(tables_of(mm), 1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_walk_meets_every_page_once(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	const ctg_vpn_t first = BASE - 3, end = BASE + 2 * ctg_level_pages(2) + 5;
	struct ctg_pte_walk walk = CTG_PTE_WALK(NULL, first, end);
	ctg_vpn_t vpn = first;
	struct ctg_pte_ref ref;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE + 10, 3 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + 20, 2 * PAGES, NULL), 0);
	walk.mm = mm;
	while (ctg_pte_walk_next(&walk)) {
		unsigned level;

		assert_int_equal(walk.vpn, vpn);
		assert_int_equal(walk.ref.entry, ctg_pte_read(mm, vpn, &level));
		assert_int_equal(walk.ref.level, level);
		assert_true(walk.nr <= ctg_level_pages(level));
		vpn += walk.nr;
	}
	assert_int_equal(vpn, end);
	/* Leaving early leaves nothing locked. */
	walk = (struct ctg_pte_walk)CTG_PTE_WALK(mm, BASE + 10, end);
	assert_true(ctg_pte_walk_next(&walk));
	assert_true(ctg_pte_walk_next(&walk));
	ctg_pte_walk_stop(&walk);
	ctg_pte_lock(mm, BASE + 11, &ref);
	ctg_pte_unlock(mm, &ref);
	/* Nothing to visit. */
	walk = (struct ctg_pte_walk)CTG_PTE_WALK(mm, BASE, BASE);
	assert_false(ctg_pte_walk_next(&walk));
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- tables that move while others look ------------------------------------------------------ */

#define HERE (BASE + 3)
#define THERE (BASE + ctg_level_pages(3) + 3)

/* The tables that covered HERE serve another slot, where other rights are. */
static void recycle(struct ctg_mm *mm)
{
	assert_int_equal(ctg_munmap(mm, BASE, 10), 0);
	assert_int_equal(ctg_mmap(mm, THERE - 3, 10, RW), 0);
}

/* ... and back. */
static void recycle_twice(struct ctg_mm *mm)
{
	recycle(mm);
	assert_int_equal(ctg_munmap(mm, THERE - 3, 10), 0);
	assert_int_equal(ctg_mmap(mm, BASE, 10, CTG_PROT_READ), 0);
	assert_int_equal(ctg_mmap(mm, THERE - 3, 10, RW), 0);
}

/* The slot gets a table of another level. */
static void regrow(struct ctg_mm *mm)
{
	assert_int_equal(ctg_munmap(mm, BASE, 10), 0);
	assert_int_equal(ctg_mmap(mm, THERE - 3, PAGES * 4, RW), 0);
	assert_int_equal(ctg_mmap(mm, BASE - 3 * PAGES, 7 * PAGES, CTG_PROT_READ), 0);
}

static void (*const changes[])(struct ctg_mm *mm) = {recycle, recycle_twice, regrow};

/* Do one thing with HERE while the nth atomic of it is preceded by a change. false: it had fewer.
 */
static bool interleave(struct ctg_mm *mm, unsigned nth, void (*change)(struct ctg_mm *mm),
	uint64_t (*look)(struct ctg_mm *mm))
{
	uint64_t entry;

	assert_int_equal(ctg_mmap(mm, BASE, 10, CTG_PROT_READ), 0);
	other.fn = change;
	other.mm = mm;
	other.nth = nth;
	entry = look(mm);
	nth = other.nth;
	other.nth = 0;
	/* What was there before, after, or for a moment: never what belongs to the other slot. */
	if (entry != 0)
		assert_int_equal(entry, CTG_PTE_RESERVED | CTG_PTE_READ);
	assert_int_equal(ctg_munmap(mm, 0, CTG_MM_MAX_VPN), 0);
	return nth == 0;
}

static uint64_t look_read(struct ctg_mm *mm)
{
	return entry_of(mm, HERE);
}

static uint64_t look_lock(struct ctg_mm *mm)
{
	struct ctg_pte_ref ref;

	ctg_pte_lock(mm, HERE, &ref);
	other.nth = 0; /* nobody changes the tree under the lock */
	assert_true(ref.table->live);
	assert_int_equal(ref.level, ref.table->level);
	assert_true(HERE - ref.table->base < ctg_level_pages(ref.level + 1));
	assert_int_equal(ref.index, entry_index(HERE, ref.level));
	ctg_pte_unlock(mm, &ref);
	return ref.entry;
}

/* How many atomics a walk to HERE has before it locks a table. */
#define WALK_ATOMICS 4

static void test_walks_meet_changes_at_every_step(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	unsigned nth;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	for (unsigned c = 0; c < sizeof(changes) / sizeof(changes[0]); c++) {
		for (nth = 1; interleave(mm, nth, changes[c], look_read); nth++)
			;
		/* Four levels, and a look at `recycled` before and after. */
		assert_int_equal(nth, CTG_TABLE_LEVELS + 3);
		for (nth = 1; nth <= WALK_ATOMICS; nth++)
			interleave(mm, nth, changes[c], look_lock);
	}
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* A large frame goes, and its slot is RESERVED, or EMPTY, or split. */
static void give_up(struct ctg_mm *mm)
{
	assert_int_equal(ctg_madvise_dontneed(mm, BASE, PAGES), 0);
}
static void unmap_all(struct ctg_mm *mm)
{
	assert_int_equal(ctg_munmap(mm, BASE, PAGES), 0);
}
static void split_all(struct ctg_mm *mm)
{
	assert_int_equal(ctg_pte_split_to(mm, BASE, 0), 0);
}

static void test_marks_meet_changes_at_every_step(void **state)
{
	static void (*const fn[])(struct ctg_mm * mm) = {give_up, unmap_all, split_all};
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	for (unsigned c = 0; c < 3; c++) {
		for (unsigned nth = 1;; nth++) {
			ctg_pfn_t pfn;
			uint64_t entry;
			bool met;

			mm = space_large(&w, &pfn);
			other.fn = fn[c];
			other.mm = mm;
			other.nth = nth;
			ctg_mm_mark_accessed(mm, HERE, true);
			met = other.nth == 0;
			other.nth = 0;
			entry = entry_of(mm, HERE);
			/* No mark on what is not PRESENT, none lost on what is. */
			if (met && c == 0)
				assert_int_equal(entry, CTG_PTE_RESERVED | CTG_PTE_RIGHTS);
			else if (met && c == 1)
				assert_int_equal(entry, 0);
			else if (met)
				assert_int_equal(entry,
					ctg_pte(pfn + 3, CTG_PTE_PRESENT | CTG_PTE_RIGHTS |
								 CTG_PTE_YOUNG | CTG_PTE_DIRTY));
			ctg_mm_destroy(mm, false);
			world_check_clean(&w);
			if (!met)
				break;
			assert_true(nth < 20);
		}
	}
	world_close(&w);
}

static struct world *split_world;
static struct ctg_mm *split_mm;

static void *split_and_alloc(void *host, size_t bytes, size_t align)
{
	struct ctg_mm *mm = split_mm;

	split_mm = NULL;
	if (mm != NULL)
		split_all(mm);
	return split_world->port.meta_alloc(host, bytes, align);
}

/* Somebody else splits the large entry while we make the table to split it with. */
static void test_split_meets_a_split(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_large(&w, &pfn);
	split_world = &w;
	split_mm = mm;
	w.ctg->port.meta_alloc = split_and_alloc;
	assert_int_equal(ctg_pte_split_to(mm, BASE + 9, 0), 0);
	w.ctg->port = w.port;
	assert_null(split_mm);
	assert_int_equal(word_of(&w, pfn), PAGES * CTG_WORD_MAP1);
	assert_int_equal(tables_of(mm), 4);
	assert_int_equal(level_of(mm, BASE), 0);
	assert_non_null(mm->spare);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- with real threads ----------------------------------------------------------------------- */

struct reader {
	struct ctg_mm *mm;
	ctg_vpn_t vpn;
	uint64_t rights; /* the only ones that are ever there */
	bool locking;
	uint32_t stop;
	uint64_t wrong, mapped, empty;
};

static void *read_entries(void *arg)
{
	struct reader *r = arg;

	while (__atomic_load_n(&r->stop, __ATOMIC_ACQUIRE) == 0) {
		uint64_t entry;

		if (r->locking) {
			struct ctg_pte_ref ref;

			ctg_pte_lock(r->mm, r->vpn, &ref);
			entry = ref.entry;
			if (r->vpn - ref.table->base >= ctg_level_pages(ref.level + 1))
				r->wrong++;
			ctg_pte_unlock(r->mm, &ref);
		} else {
			entry = entry_of(r->mm, r->vpn);
		}
		if (entry == 0)
			r->empty++;
		else if (entry == (CTG_PTE_RESERVED | r->rights))
			r->mapped++;
		else
			r->wrong++;
	}
	return NULL;
}

/*
 * One table serves two slots in turn. Whoever looks at one slot never sees what belongs to the
 * other.
 */
static void test_readers_never_see_another_slot(void **state)
{
	struct world w;
	struct reader reader[2];
	pthread_t thread[2];
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	for (unsigned i = 0; i < 2; i++) {
		reader[i] = (struct reader){
			.mm = mm, .vpn = BASE + 3, .rights = CTG_PTE_READ, .locking = i != 0};
		assert_int_equal(pthread_create(&thread[i], NULL, read_entries, &reader[i]), 0);
	}
	for (unsigned i = 0; i < 20000; i++) {
		assert_int_equal(ctg_mmap(mm, BASE, 10, CTG_PROT_READ), 0);
		assert_int_equal(ctg_munmap(mm, BASE, 10), 0);
		assert_int_equal(ctg_mmap(mm, BASE + (1u << 20), 10, RW), 0);
		assert_int_equal(ctg_munmap(mm, BASE + (1u << 20), 10), 0);
	}
	for (unsigned i = 0; i < 2; i++) {
		__atomic_store_n(&reader[i].stop, 1, __ATOMIC_RELEASE);
		pthread_join(thread[i], NULL);
		assert_int_equal(reader[i].wrong, 0);
		assert_true(reader[i].mapped + reader[i].empty != 0);
	}
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_empty_space_is_one_table),
		cmocka_unit_test(test_reserved_uses_the_largest_entries),
		cmocka_unit_test(test_split_reserved),
		cmocka_unit_test(test_split_empty),
		cmocka_unit_test(test_split_fails_without_memory),
		cmocka_unit_test(test_split_present_counts_pieces),
		cmocka_unit_test(test_split_present_refuses_overflow),
		cmocka_unit_test(test_split_waits_for_a_frozen_frame),
		cmocka_unit_test(test_set_keeps_marks_that_come_in),
		cmocka_unit_test(test_set_table_moves_late_marks),
		cmocka_unit_test(test_tables_are_used_again),
		cmocka_unit_test(test_prune),
		cmocka_unit_test(test_walk_meets_every_page_once),
		cmocka_unit_test(test_walks_meet_changes_at_every_step),
		cmocka_unit_test(test_marks_meet_changes_at_every_step),
		cmocka_unit_test(test_split_meets_a_split),
		cmocka_unit_test(test_readers_never_see_another_slot),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
