/* SPDX-License-Identifier: MIT */
/* Pages held by the array form: counts, rights, partial success, what is refused. */
#include "moving.h"

#include <pthread.h>

#define KINDS 4

typedef int64_t hold_fn(struct ctg_mm *, ctg_vpn_t, uint64_t, unsigned, ctg_pfn_t *);

/* All that there is, with what drops it again. */
static const struct kind {
	hold_fn *hold;
	int (*drop)(struct ctg *, const ctg_pfn_t *, uint64_t);
	uint64_t one;
	bool pin;
} kinds[KINDS] = {
	{ctg_get_user_pages, ctg_put_user_pages, CTG_WORD_REF1, false},
	{ctg_get_user_pages_fast, ctg_put_user_pages, CTG_WORD_REF1, false},
	{ctg_pin_user_pages, ctg_unpin_user_pages, CTG_WORD_PIN1, true},
	{ctg_pin_user_pages_fast, ctg_unpin_user_pages, CTG_WORD_PIN1, true},
};

/* ---- what is held ------------------------------------------------------------------------ */

static void test_holds_what_is_mapped(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		const struct kind *kind = &kinds[k];
		ctg_pfn_t pages[20];
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 3, 20);
		assert_int_equal(kind->hold(mm, BASE + 3, 20, CTG_FOLL_WRITE, pages), 20);
		for (unsigned i = 0; i < 20; i++) {
			assert_int_equal(pages[i], pfn_of(mm, BASE + 3 + i));
			assert_int_equal(word_of(&w, pages[i]), CTG_WORD_MAP1 + kind->one);
		}
		assert_int_equal(ctg_mm_nr_pins(mm), kind->pin ? 20 : 0);
		assert_int_equal(kind->drop(w.ctg, pages, 20), 0);
		for (unsigned i = 0; i < 20; i++)
			assert_int_equal(word_of(&w, pages[i]), CTG_WORD_MAP1);
		assert_int_equal(ctg_mm_nr_pins(mm), 0);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

static void test_faults_in_what_is_missing(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		ctg_pfn_t pages[3];
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		assert_int_equal(ctg_mmap(mm, BASE + 1, 3, RW), 0);
		assert_int_equal(
			kinds[k].hold(mm, BASE + 1, 3, k % 2 ? CTG_FOLL_WRITE : 0, pages), 3);
		for (unsigned i = 0; i < 3; i++) {
			assert_int_equal(pages[i], pfn_of(mm, BASE + 1 + i));
			assert_int_equal(get_byte(&w, mm, BASE + 1 + i), 0);
		}
		assert_int_equal(kinds[k].drop(w.ctg, pages, 3), 0);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

static void test_marks_what_will_be_accessed(void **state)
{
	const uint64_t marks = CTG_PTE_YOUNG | CTG_PTE_DIRTY;
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		ctg_pfn_t page;
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		mapped(mm, BASE + 1, 2, RW);
		assert_int_equal(entry_of(mm, BASE + 1) & marks, 0);
		assert_int_equal(kinds[k].hold(mm, BASE + 1, 1, 0, &page), 1);
		assert_int_equal(entry_of(mm, BASE + 1) & marks, CTG_PTE_YOUNG);
		assert_int_equal(kinds[k].drop(w.ctg, &page, 1), 0);
		assert_int_equal(kinds[k].hold(mm, BASE + 2, 1, CTG_FOLL_WRITE, &page), 1);
		assert_int_equal(entry_of(mm, BASE + 2) & marks, marks);
		assert_int_equal(kinds[k].drop(w.ctg, &page, 1), 0);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

static void test_unpin_marks_dirty_where_it_is_mapped(void **state)
{
	struct world w;
	ctg_pfn_t page, pages[PAGES];
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	mapped(mm, BASE + 1, 1, RW);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_unpin_user_pages_dirty_lock(w.ctg, &page, 1, false), 0);
	assert_int_equal(entry_of(mm, BASE + 1) & CTG_PTE_DIRTY, 0);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_unpin_user_pages_dirty_lock(w.ctg, &page, 1, true), 0);
	assert_int_equal(entry_of(mm, BASE + 1) & CTG_PTE_DIRTY, CTG_PTE_DIRTY);
	/* A large frame, some pages of it in pieces: those that were held are marked. */
	mapped(mm, BASE + PAGES, PAGES, RW);
	assert_int_equal(ctg_munmap(mm, BASE + PAGES, 1), 0);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + PAGES + 1, 3, 0, pages), 3);
	assert_int_equal(ctg_unpin_user_pages_dirty_lock(w.ctg, pages, 3, true), 0);
	for (unsigned i = 1; i < 8; i++)
		assert_int_equal(
			entry_of(mm, BASE + PAGES + i) & CTG_PTE_DIRTY, i < 4 ? CTG_PTE_DIRTY : 0);
	/* Not mapped any more, and then not even pinned: there is nothing to mark. */
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_munmap(mm, BASE + 1, 1), 0);
	assert_int_equal(ctg_unpin_user_pages_dirty_lock(w.ctg, &page, 1, true), 0);
	assert_int_equal(ctg_unpin_user_pages_dirty_lock(w.ctg, &page, 1, true), -CTG_EINVAL);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_rights_decide(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		hold_fn *take = kinds[k].hold;
		ctg_pfn_t pages[4];
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		mapped(mm, BASE, 4, RW);
		assert_int_equal(ctg_mprotect(mm, BASE + 1, 1, CTG_PROT_READ), 0);
		assert_int_equal(ctg_mprotect(mm, BASE + 2, 1, CTG_PROT_NONE), 0);
		assert_int_equal(take(mm, BASE + 1, 1, CTG_FOLL_WRITE, pages), -CTG_EFAULT);
		assert_int_equal(take(mm, BASE + 2, 1, 0, pages), -CTG_EFAULT);
		assert_int_equal(take(mm, BASE + 2, 1, CTG_FOLL_WRITE, pages), -CTG_EFAULT);
		assert_int_equal(take(mm, BASE + 4, 1, 0, pages), -CTG_EFAULT);
		/* Nothing is allocated for an access that is not allowed. */
		assert_int_equal(ctg_mmap(mm, BASE + PAGES, 1, CTG_PROT_READ), 0);
		assert_int_equal(take(mm, BASE + PAGES, 1, CTG_FOLL_WRITE, pages), -CTG_EFAULT);
		assert_true(lookup(mm, BASE + PAGES, 1).reserved);
		assert_int_equal(take(mm, BASE + 1, 1, 0, pages), 1);
		assert_int_equal(kinds[k].drop(w.ctg, pages, 1), 0);
		/* What comes before the first that is refused is held. */
		assert_int_equal(take(mm, BASE, 4, CTG_FOLL_WRITE, pages), 1);
		assert_int_equal(kinds[k].drop(w.ctg, pages, 1), 0);
		assert_int_equal(take(mm, BASE, 4, 0, pages), 2);
		assert_int_equal(kinds[k].drop(w.ctg, pages, 2), 0);
		for (unsigned i = 0; i < 4; i++)
			assert_int_equal(word_of(&w, pfn_of(mm, BASE + i)), CTG_WORD_MAP1);
		assert_int_equal(ctg_mm_nr_pins(mm), 0);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

static void test_no_memory_ends_it(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		ctg_pfn_t pages[8];
		struct hoard *hoard;
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		mapped(mm, BASE + 8, 1, RW); /* the tables, too */
		assert_int_equal(ctg_mmap(mm, BASE, 8, RW), 0);
		hoard = fragment(&w, 5, CTG_PFN_NONE);
		assert_int_equal(kinds[k].hold(mm, BASE, 8, 0, pages), 5);
		assert_int_equal(kinds[k].hold(mm, BASE + 5, 3, 0, pages + 5), -CTG_ENOMEM);
		assert_int_equal(kinds[k].drop(w.ctg, pages, 5), 0);
		hoard_free_all(&w, hoard);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

static void test_pins_add_up(void **state)
{
	struct world w;
	ctg_pfn_t page, again;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	mapped(mm, BASE + 1, 1, RW);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, CTG_FOLL_WRITE, &page), 1);
	assert_int_equal(ctg_pin_user_pages(mm, BASE + 1, 1, 0, &again), 1);
	assert_int_equal(page, again);
	assert_int_equal(ctg_word_pin(word_of(&w, page)), 2);
	assert_int_equal(ctg_mm_nr_pins(mm), 2);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
	assert_int_equal(ctg_mm_nr_pins(mm), 1);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
	assert_int_equal(word_of(&w, page), CTG_WORD_MAP1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_outlives_the_mapping(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		ctg_pfn_t page, other;
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		mapped(mm, BASE + 1, 1, RW);
		put_byte(&w, mm, BASE + 1, 0x5a);
		assert_int_equal(kinds[k].hold(mm, BASE + 1, 1, CTG_FOLL_WRITE, &page), 1);
		assert_int_equal(ctg_munmap(mm, BASE + 1, 1), 0);
		assert_int_equal(word_of(&w, page), kinds[k].one);
		assert_int_equal(*(unsigned char *)ctg_sim_frame(w.sim, page), 0x5a);
		assert_int_equal(world_free(&w), w.nr_free - 1);
		/* What is mapped there next is another frame. */
		mapped(mm, BASE + 1, 1, RW);
		other = pfn_of(mm, BASE + 1);
		assert_true(other != page);
		assert_int_equal(kinds[k].drop(w.ctg, &page, 1), 0);
		assert_int_equal(world_free(&w), w.nr_free - 1);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

static void test_a_pin_keeps_the_frame_where_it_is(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		struct ctg_migrate_stats stats;
		ctg_pfn_t page;
		struct ctg_mm *mm;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 1, 3);
		assert_int_equal(kinds[k].hold(mm, BASE + 2, 1, 0, &page), 1);
		assert_int_equal(
			evacuate(&w, page & ~(PAGES - 1), PAGES, 1, NULL, &stats), -CTG_EBUSY);
		assert_int_equal(stats.obstacle_pfn, page);
		assert_int_equal(
			stats.obstacle, kinds[k].pin ? CTG_OBSTACLE_PIN : CTG_OBSTACLE_REF);
		assert_int_equal(pfn_of(mm, BASE + 2), page);
		assert_int_equal(kinds[k].drop(w.ctg, &page, 1), 0);
		evacuate_block(&w, page);
		assert_false(in_block(pfn_of(mm, BASE + 2), page));
		check_stamp(&w, mm, BASE + 1, 3);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

/* ---- large frames ------------------------------------------------------------------------ */

static void test_large_frames_count_on_the_head(void **state)
{
	struct world w;
	ctg_pfn_t pages[PAGES], head;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	head = map_large(&w, mm, BASE + PAGES);
	for (unsigned k = 0; k < KINDS; k++) {
		const struct kind *kind = &kinds[k];

		assert_int_equal(
			kind->hold(mm, BASE + PAGES + 10, 100, CTG_FOLL_WRITE, pages), 100);
		for (unsigned i = 0; i < 100; i++)
			assert_int_equal(pages[i], head + 10 + i);
		assert_int_equal(word_of(&w, head), CTG_WORD_MAP1 + 100 * kind->one);
		/* One by one, in any order. */
		for (unsigned i = 0; i < 100; i++)
			assert_int_equal(kind->drop(w.ctg, &pages[i * 37 % 100], 1), 0);
		assert_int_equal(word_of(&w, head), CTG_WORD_MAP1);
		assert_int_equal(kind->drop(w.ctg, pages, 1), -CTG_EINVAL);
	}
	/* Split, then held by pieces, then unmapped in part. */
	assert_int_equal(ctg_munmap(mm, BASE + PAGES, 10), 0);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + PAGES + 10, 100, 0, pages), 100);
	assert_int_equal(word_of(&w, head), 502 * CTG_WORD_MAP1 + 100 * CTG_WORD_PIN1);
	assert_int_equal(ctg_munmap(mm, BASE + PAGES, PAGES), 0);
	assert_int_equal(word_of(&w, head), 100 * CTG_WORD_PIN1);
	assert_int_equal(world_free(&w), w.nr_free - PAGES);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, pages, 100), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Small frames, a large one, a piece of one: one call goes over all of it. */
static void test_goes_over_all_sizes(void **state)
{
	struct world w;
	ctg_pfn_t *pages = calloc(4 * PAGES, sizeof(*pages));

	(void)state;
	assert_non_null(pages);
	for (unsigned k = 0; k < KINDS; k++) {
		const uint64_t nr = 3 * PAGES - 7;
		struct ctg_mm *mm;

		world_open(&w, 16);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 2, PAGES - 2);
		map_large(&w, mm, BASE + PAGES);
		map_large(&w, mm, BASE + 2 * PAGES);
		assert_int_equal(ctg_munmap(mm, BASE + 3 * PAGES - 5, 5), 0);
		assert_int_equal(kinds[k].hold(mm, BASE + 2, nr, 0, pages), nr);
		for (uint64_t i = 0; i < nr; i++)
			assert_int_equal(pages[i], pfn_of(mm, BASE + 2 + i));
		assert_int_equal(ctg_mm_nr_pins(mm), kinds[k].pin ? nr : 0);
		assert_int_equal(kinds[k].drop(w.ctg, pages, nr), 0);
		assert_int_equal(ctg_mm_nr_pins(mm), 0);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
	free(pages);
}

/* ---- counters at their ends -------------------------------------------------------------- */

static void set_word(struct world *w, ctg_pfn_t pfn, uint64_t word)
{
	ctg_store64_release(&ctg_frame_of(w->ctg, pfn)->word, word);
}

static void test_full_counters_refuse(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		const struct kind *kind = &kinds[k];
		uint64_t max = kind->pin ? CTG_WORD_PIN_MAX : CTG_WORD_REF_MAX;
		ctg_pfn_t pages[PAGES], page, head;
		struct ctg_mm *mm;
		uint64_t full;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 1, 3);
		head = map_large(&w, mm, BASE + PAGES);
		page = pfn_of(mm, BASE + 2);
		full = CTG_WORD_MAP1 + max * kind->one;
		/* One fits, the next does not, and changes nothing. */
		set_word(&w, page, full - kind->one);
		assert_int_equal(kind->hold(mm, BASE + 2, 1, CTG_FOLL_WRITE, pages), 1);
		assert_int_equal(kind->hold(mm, BASE + 2, 1, 0, pages), -CTG_EOVERFLOW);
		assert_int_equal(word_of(&w, page), full);
		assert_int_equal(ctg_mm_nr_pins(mm), kind->pin ? 1 : 0);
		/* A call that meets it ends before it. */
		assert_int_equal(kind->hold(mm, BASE + 1, 3, 0, pages), 1);
		assert_int_equal(kind->drop(w.ctg, pages, 1), 0);
		assert_int_equal(kind->drop(w.ctg, &page, 1), 0);
		assert_int_equal(ctg_mm_nr_pins(mm), 0);
		set_word(&w, page, CTG_WORD_MAP1);
		/* The counts of a large frame's pages: as many as there is room for. */
		set_word(&w, head, full - 5 * kind->one);
		assert_int_equal(kind->hold(mm, BASE + PAGES, 9, 0, pages), 5);
		assert_int_equal(word_of(&w, head), full);
		assert_int_equal(kind->hold(mm, BASE + PAGES + 7, 1, 0, pages + 5), -CTG_EOVERFLOW);
		assert_int_equal(kind->drop(w.ctg, pages, 5), 0);
		assert_int_equal(word_of(&w, head), full - 5 * kind->one);
		set_word(&w, head, CTG_WORD_MAP1);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

/* A full count of one kind is no obstacle to the others, and none of them spills over. */
static void test_counters_do_not_touch(void **state)
{
	const uint64_t maps = CTG_WORD_MAP_MAX * CTG_WORD_MAP1;
	const uint64_t refs = (uint64_t)CTG_WORD_REF_MAX * CTG_WORD_REF1;
	const uint64_t pins = (uint64_t)CTG_WORD_PIN_MAX * CTG_WORD_PIN1;
	struct world w;
	ctg_pfn_t page;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 1);
	page = pfn_of(mm, BASE + 1);
	set_word(&w, page, maps + refs);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(word_of(&w, page), maps + refs + CTG_WORD_PIN1);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
	set_word(&w, page, maps + pins);
	assert_int_equal(ctg_get_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(word_of(&w, page), maps + pins + CTG_WORD_REF1);
	assert_int_equal(ctg_put_user_pages(w.ctg, &page, 1), 0);
	/* All of them full is one less than FROZEN, and can still be let go of. */
	set_word(&w, page, maps + pins + refs);
	assert_false(ctg_word_frozen(word_of(&w, page)));
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), -CTG_EOVERFLOW);
	assert_int_equal(ctg_get_user_pages_fast(mm, BASE + 1, 1, 0, &page), -CTG_EOVERFLOW);
	assert_int_equal(word_of(&w, page), maps + pins + refs);
	set_word(&w, page, CTG_WORD_MAP1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- what is on the move, or draining ---------------------------------------------------- */

static void test_moving_pages_are_read_but_not_written(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		const struct kind *kind = &kinds[k];
		struct ctg_mm *mm;
		ctg_pfn_t page;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 1, 1);
		change_entry(mm, BASE + 1, CTG_PTE_MOVING, 0);
		assert_int_equal(kind->hold(mm, BASE + 1, 1, CTG_FOLL_NOWAIT, &page), 1);
		assert_int_equal(kind->drop(w.ctg, &page, 1), 0);
		assert_int_equal(
			kind->hold(mm, BASE + 1, 1, CTG_FOLL_NOWAIT | CTG_FOLL_WRITE, &page),
			-CTG_EAGAIN);
		change_entry(mm, BASE + 1, 0, CTG_PTE_MOVING);
		assert_int_equal(
			kind->hold(mm, BASE + 1, 1, CTG_FOLL_NOWAIT | CTG_FOLL_WRITE, &page), 1);
		assert_int_equal(kind->drop(w.ctg, &page, 1), 0);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

struct waiting {
	const struct kind *kind;
	struct ctg_mm *mm;
	ctg_pfn_t page;
	int64_t ret;
	int done;
};

static void *wait_and_hold(void *arg)
{
	struct waiting *waiting = arg;

	waiting->ret =
		waiting->kind->hold(waiting->mm, BASE + 1, 1, CTG_FOLL_WRITE, &waiting->page);
	__atomic_store_n(&waiting->done, 1, __ATOMIC_RELEASE);
	return NULL;
}

static void sleep_ms(long ms)
{
	nanosleep(&(struct timespec){.tv_nsec = ms * 1000000}, NULL);
}

static void test_waits_for_a_migration(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		struct waiting waiting = {.kind = &kinds[k]};
		pthread_t thread;

		world_open(&w, 8);
		waiting.mm = space_new(&w, 0);
		map_small(&w, waiting.mm, BASE + 1, 1);
		change_entry(waiting.mm, BASE + 1, CTG_PTE_MOVING, 0);
		assert_int_equal(pthread_create(&thread, NULL, wait_and_hold, &waiting), 0);
		sleep_ms(5);
		assert_int_equal(__atomic_load_n(&waiting.done, __ATOMIC_ACQUIRE), 0);
		/* As the migration does. */
		change_entry(waiting.mm, BASE + 1, 0, CTG_PTE_MOVING);
		ctg_add32_acq_rel(&waiting.mm->moved, 1);
		w.port.wake(w.port.host, &waiting.mm->moved, UINT32_MAX);
		pthread_join(thread, NULL);
		assert_int_equal(waiting.ret, 1);
		assert_int_equal(kinds[k].drop(w.ctg, &waiting.page, 1), 0);
		ctg_mm_destroy(waiting.mm, false);
		world_close(&w);
	}
}

static void test_draining_frames_grant_nothing(void **state)
{
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		const struct kind *kind = &kinds[k];
		struct waiting waiting = {.kind = kind};
		pthread_t thread;
		ctg_pfn_t page, got;

		world_open(&w, 8);
		waiting.mm = space_new(&w, 0);
		map_small(&w, waiting.mm, BASE + 1, 1);
		page = pfn_of(waiting.mm, BASE + 1);
		set_word(&w, page, CTG_WORD_MAP1 | CTG_WORD_DRAINING);
		assert_int_equal(
			kind->hold(waiting.mm, BASE + 1, 1, CTG_FOLL_NOWAIT, &got), -CTG_EAGAIN);
		assert_int_equal(word_of(&w, page), CTG_WORD_MAP1 | CTG_WORD_DRAINING);
		assert_int_equal(pthread_create(&thread, NULL, wait_and_hold, &waiting), 0);
		while ((word_of(&w, page) & CTG_WORD_WAITERS) == 0)
			sched_yield();
		assert_int_equal(__atomic_load_n(&waiting.done, __ATOMIC_ACQUIRE), 0);
		/* As whoever ends the draining does. */
		set_word(&w, page, CTG_WORD_MAP1);
		ctg_frame_wake(w.ctg, page);
		pthread_join(thread, NULL);
		assert_int_equal(waiting.ret, 1);
		assert_int_equal(waiting.page, page);
		assert_int_equal(kind->drop(w.ctg, &page, 1), 0);
		ctg_mm_destroy(waiting.mm, false);
		world_close(&w);
	}
}

/* ---- bad input --------------------------------------------------------------------------- */

static void test_bad_input_is_refused(void **state)
{
	struct world w;
	struct before *before;
	ctg_pfn_t pages[2] = {7, 7};
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 2);
	before = before_take(&w, mm, BASE, 4);
	for (unsigned k = 0; k < KINDS; k++) {
		hold_fn *take = kinds[k].hold;
		unsigned own = kinds[k].pin ? CTG_FOLL_PIN : CTG_FOLL_GET;
		unsigned other = kinds[k].pin ? CTG_FOLL_GET : CTG_FOLL_PIN;

		assert_int_equal(take(NULL, BASE + 1, 1, 0, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, BASE + 1, 1, 0, NULL), -CTG_EINVAL);
		assert_int_equal(take(mm, BASE + 1, 0, 0, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, CTG_MM_MAX_VPN, 1, 0, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, CTG_MM_MAX_VPN - 1, 2, 0, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, BASE + 1, UINT64_MAX, 0, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, UINT64_MAX, 2, 0, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, BASE + 1, 1, other, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, BASE + 1, 1, own | other, pages), -CTG_EINVAL);
		for (unsigned bit = 5; bit < 32; bit++)
			assert_int_equal(take(mm, BASE + 1, 1, 1u << bit, pages), -CTG_EINVAL);
		if (!kinds[k].pin)
			assert_int_equal(
				take(mm, BASE + 1, 1, CTG_FOLL_LONGTERM, pages), -CTG_EINVAL);
		assert_int_equal(take(mm, BASE, 3, 0, pages), -CTG_EFAULT);
		/* The function's own flag may be said. */
		assert_int_equal(take(mm, BASE + 1, 1, own, pages), 1);
		assert_int_equal(kinds[k].drop(w.ctg, pages, 1), 0);
		assert_int_equal(kinds[k].drop(NULL, pages, 1), -CTG_EINVAL);
		assert_int_equal(kinds[k].drop(w.ctg, NULL, 1), -CTG_EINVAL);
		assert_int_equal(kinds[k].drop(w.ctg, pages, 0), -CTG_EINVAL);
	}
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	assert_int_equal(ctg_mm_nr_pins(NULL), 0);
	before_check(&w, mm, before, 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* What nobody holds cannot be dropped, whatever the frame is; the rest of the call is done. */
static void test_what_is_not_held_is_left_alone(void **state)
{
	struct ctg_zone_config hole = {.base = 64 * PAGES, .nr = 4 * PAGES};
	struct world w;

	(void)state;
	for (unsigned k = 0; k < KINDS; k++) {
		const struct kind *kind = &kinds[k];
		ctg_pfn_t used, own[2], bad[8];
		struct ctg_mm *mm;
		uint64_t *words, *now;

		world_open(&w, 8);
		assert_int_equal(ctg_sim_add_zone(w.sim, &hole, false, NULL), 0);
		w.meta_bytes = ctg_sim_meta_bytes(w.sim);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 1, 2);
		map_large(&w, mm, BASE + PAGES);
		assert_int_equal(ctg_alloc_frames(w.ctg, 3, CTG_GFP_MOVABLE, &used), 0);
		assert_int_equal(kind->hold(mm, BASE + 1, 2, 0, own), 2);
		assert_int_equal(kind->drop(w.ctg, own + 1, 1), 0);
		bad[0] = own[1];                        /* dropped already */
		bad[1] = pfn_of(mm, BASE + PAGES + 5);  /* never held */
		bad[2] = used + 1;                      /* inside a block that is nobody's page */
		bad[3] = w.zone->base + w.zone->nr - 1; /* free */
		bad[4] = CTG_PFN_NONE;
		bad[5] = hole.base + 3;
		bad[6] = w.zone->base - 1;
		bad[7] = 0;
		words = used_words(w.zone);
		for (unsigned i = 0; i < 8; i++)
			assert_int_equal(kind->drop(w.ctg, &bad[i], 1), -CTG_EINVAL);
		assert_int_equal(kind->drop(w.ctg, bad, 8), -CTG_EINVAL);
		now = used_words(w.zone);
		assert_memory_equal(now, words, 2 * w.zone->nr * sizeof(*words));
		assert_int_equal(ctg_mm_nr_pins(mm), kind->pin ? 1 : 0);
		/* More of the same than there are: as many as there are. */
		bad[2] = bad[1] = bad[0];
		bad[0] = own[0];
		assert_int_equal(kind->drop(w.ctg, bad, 3), -CTG_EINVAL);
		assert_int_equal(word_of(&w, own[0]), CTG_WORD_MAP1);
		assert_int_equal(ctg_mm_nr_pins(mm), 0);
		assert_int_equal(ctg_free_frames(w.ctg, used), 0);
		free(words);
		free(now);
		ctg_mm_destroy(mm, false);
		world_close(&w);
	}
}

/* A pin is not a reference and the reverse. */
static void test_kinds_are_not_mixed_up(void **state)
{
	struct world w;
	ctg_pfn_t page;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 1);
	assert_int_equal(ctg_get_user_pages(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), -CTG_EINVAL);
	assert_int_equal(ctg_put_user_pages(w.ctg, &page, 1), 0);
	assert_int_equal(ctg_pin_user_pages(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_put_user_pages(w.ctg, &page, 1), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(w.ctg, page), -CTG_EINVAL);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_holds_what_is_mapped),
		cmocka_unit_test(test_faults_in_what_is_missing),
		cmocka_unit_test(test_marks_what_will_be_accessed),
		cmocka_unit_test(test_unpin_marks_dirty_where_it_is_mapped),
		cmocka_unit_test(test_rights_decide),
		cmocka_unit_test(test_no_memory_ends_it),
		cmocka_unit_test(test_pins_add_up),
		cmocka_unit_test(test_outlives_the_mapping),
		cmocka_unit_test(test_a_pin_keeps_the_frame_where_it_is),
		cmocka_unit_test(test_large_frames_count_on_the_head),
		cmocka_unit_test(test_goes_over_all_sizes),
		cmocka_unit_test(test_full_counters_refuse),
		cmocka_unit_test(test_counters_do_not_touch),
		cmocka_unit_test(test_moving_pages_are_read_but_not_written),
		cmocka_unit_test(test_waits_for_a_migration),
		cmocka_unit_test(test_draining_frames_grant_nothing),
		cmocka_unit_test(test_bad_input_is_refused),
		cmocka_unit_test(test_what_is_not_held_is_left_alone),
		cmocka_unit_test(test_kinds_are_not_mixed_up),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
