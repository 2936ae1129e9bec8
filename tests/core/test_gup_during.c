/* SPDX-License-Identifier: MIT */
/*
 * What happens in the middle of a hold without locks: each change of the address space, at each of
 * the steps of the core that another CPU can come in between. And what such a hold costs.
 *
 * The files that do it are compiled into this test with a hook in front of every atomic.
 */
#include <stdbool.h>
#include <stdint.h>

static void step(void);
static uint64_t nr_atomics;

#define CTG_SWITCH_POINT() step()
#define __atomic_compare_exchange_n(...) (nr_atomics++, __atomic_compare_exchange_n(__VA_ARGS__))
#define __atomic_fetch_add(...) (nr_atomics++, __atomic_fetch_add(__VA_ARGS__))
#define __atomic_fetch_or(...) (nr_atomics++, __atomic_fetch_or(__VA_ARGS__))
#define __atomic_fetch_and(...) (nr_atomics++, __atomic_fetch_and(__VA_ARGS__))
#define __atomic_exchange_n(...) (nr_atomics++, __atomic_exchange_n(__VA_ARGS__))

#include "moving.h"

#include "../../src/frame.c"
#include "../../src/gup.c"
#include "../../src/pgtable.c"
#include "../../src/pin.c"

/* ---- the hook ---------------------------------------------------------------------------- */

struct stage;

static struct {
	uint64_t steps; /* until act runs; 0: never */
	void (*act)(struct stage *);
	struct stage *stage;
	bool done;
} hook;

static void step(void)
{
	if (hook.steps == 0 || --hook.steps != 0)
		return;
	hook.done = true;
	hook.act(hook.stage);
}

/* ---- the stage --------------------------------------------------------------------------- */

#define AT (BASE + 2)

/* Where is one page of a space, in a frame of its own or in a large one. */
struct stage {
	struct world w;
	struct ctg_mm *mm, *other;
	ctg_vpn_t vpn;
	ctg_pfn_t pfn; /* at first */
	bool large;
	uint64_t frames; /* of the frame */
};

static void stage_open(struct stage *s, bool large)
{
	*s = (struct stage){.large = large, .frames = large ? PAGES : 1};
	world_open(&s->w, 16);
	s->mm = space_new(&s->w, 0);
	/* A second family stays, as the first does. */
	ctg_mm_destroy(space_new(&s->w, 0), false);
	s->w.meta_bytes += sizeof(struct ctg_anon);
	s->vpn = large ? BASE + PAGES + 7 : AT;
	if (large)
		map_large(&s->w, s->mm, BASE + PAGES);
	else
		map_small(&s->w, s->mm, AT, 1);
	s->pfn = pfn_of(s->mm, s->vpn);
	s->other = space_new(&s->w, 0);
}

static void stage_close(struct stage *s)
{
	ctg_mm_destroy(s->mm, false);
	if (s->other != NULL)
		ctg_mm_destroy(s->other, false);
	world_close(&s->w);
}

static ctg_pfn_t head_of(const struct stage *s)
{
	return s->large ? s->pfn & ~(PAGES - 1) : s->pfn;
}

/* ---- what others do ---------------------------------------------------------------------- */

static void do_unmap(struct stage *s)
{
	assert_int_equal(ctg_munmap(s->mm, s->large ? BASE + PAGES : AT, s->frames), 0);
}

static void do_dontneed(struct stage *s)
{
	assert_int_equal(ctg_madvise_dontneed(s->mm, s->vpn, 1), 0);
}

static void do_protect(struct stage *s)
{
	assert_int_equal(ctg_mprotect(s->mm, s->vpn, 1, CTG_PROT_READ), 0);
}

static void do_migrate(struct stage *s)
{
	struct ctg_migrate_stats stats;
	int ret = evacuate(&s->w, head_of(s), s->frames, 1, NULL, &stats);

	if (ret != 0)
		assert_int_equal(stats.obstacle, CTG_OBSTACLE_PIN);
}

static void do_fork(struct stage *s)
{
	struct ctg_mm_config config = {.owner = &s->w};

	ctg_mm_destroy(s->other, false);
	assert_int_equal(ctg_mm_fork(s->mm, &config, &s->other), 0);
}

/* The frame goes, and another space has it for its own at once. */
static void do_unmap_and_reuse(struct stage *s)
{
	struct hoard *hoard;

	do_unmap(s);
	ctg_drain_caches(s->w.ctg);
	hoard = hoard_orders(&s->w, 0, CTG_GFP_MOVABLE);
	hoard_free_all(&s->w, hoard);
	assert_int_equal(ctg_mmap(s->other, BASE + PAGES, 8 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(s->other, BASE + PAGES, 8 * PAGES, NULL), 0);
}

/* The frame moves away and back, so that the entry is the same again. */
static void do_move_twice(struct stage *s)
{
	ctg_pfn_t here = head_of(s), there;
	struct ctg_migrate_stats stats;
	struct hoard *hoard;

	if (evacuate(&s->w, here, s->frames, 1, NULL, &stats) != 0)
		return;
	there = pfn_of(s->mm, s->vpn) - (s->pfn - here);
	/* The only frames that are free are those that it came from. */
	ctg_drain_caches(s->w.ctg);
	assert_int_equal(ctg_block_isolate(s->w.zone, here, s), 0);
	hoard = hoard_orders(&s->w, 0, CTG_GFP_MOVABLE);
	ctg_block_unisolate(s->w.zone, here, s);
	assert_int_equal(evacuate(&s->w, there, s->frames, 1, NULL, &stats), 0);
	hoard_free_all(&s->w, hoard);
}

/* ---- what must be true afterwards -------------------------------------------------------- */

static uint64_t all_pins(const struct stage *s)
{
	uint64_t nr = 0;

	for (uint64_t i = 0; i < s->w.zone->nr; i++)
		nr += ctg_word_pin(s->w.zone->frames[i].word.v);
	return nr;
}

/* Held: the frame is not free, and the contents are what they were. */
static void check_held(const struct stage *s, struct ctg_extent run)
{
	uint64_t value;

	assert_int_equal(run.nr, 1);
	assert_int_equal(all_pins(s), 1);
	assert_int_equal(ctg_mm_nr_pins(s->mm), 1);
	memcpy(&value, ctg_sim_frame(s->w.sim, run.pfn), sizeof(value));
	assert_int_equal(value, stamp_of(s->mm, s->vpn, 0));
}

/* A pinned frame does not move, and is not shared: whoever forks has it for itself. */
static void check_stays(struct stage *s, struct ctg_extent run, void (*act)(struct stage *))
{
	uint64_t entry = entry_of(s->mm, s->vpn);

	if (act == do_migrate || act == do_fork || act == do_move_twice || act == do_protect)
		assert_int_equal(pfn_of(s->mm, s->vpn), run.pfn);
	if (act != do_fork || !hook.done)
		return;
	assert_int_equal(entry & CTG_PTE_COW, 0);
	assert_true(pfn_of(s->other, s->vpn) != run.pfn);
	put_byte(&s->w, s->mm, s->vpn, 0x77);
	assert_int_equal(*(unsigned char *)ctg_sim_frame(s->w.sim, run.pfn), 0x77);
	assert_int_not_equal(get_byte(&s->w, s->other, s->vpn), 0x77);
}

/* Let something happen at the nth step of a hold. Returns whether there is an nth step. */
static bool try_at(uint64_t nth, bool large, void (*act)(struct stage *), bool write, bool *held)
{
	struct stage s;
	struct ctg_hold h;
	struct ctg_extent run;

	stage_open(&s, large);
	assert_int_equal(
		ctg_hold_begin(&h, s.mm, s.vpn, 1, write ? CTG_FOLL_WRITE : 0, CTG_FOLL_PIN), 0);
	hook.act = act;
	hook.stage = &s;
	hook.done = false;
	hook.steps = nth;
	*held = hold_fast(&h, s.vpn, 1, &run);
	hook.steps = 0;
	ctg_hold_end(&h);
	if (*held) {
		check_held(&s, run);
		check_stays(&s, run, act);
		assert_int_equal(ctg_unpin_user_pages(s.w.ctg, &run.pfn, 1), 0);
	}
	assert_int_equal(all_pins(&s), 0);
	assert_int_equal(ctg_mm_nr_pins(s.mm), 0);
	stage_close(&s);
	return hook.done;
}

static void anything_at_any_step(void (*act)(struct stage *))
{
	for (unsigned variant = 0; variant < 4; variant++) {
		unsigned nr_held = 0, nr_not = 0;
		uint64_t nth = 1;
		bool held;

		while (try_at(nth, variant & 1, act, variant & 2, &held)) {
			held ? nr_held++ : nr_not++;
			nth++;
		}
		assert_true(held); /* the last one was not disturbed */
		/* Early enough it is always seen, late enough it comes too late. */
		assert_true(nr_not != 0 || (act == do_protect && (variant & 2) == 0) ||
			    act == do_move_twice);
		assert_true(nr_held != 0);
	}
}

static void test_unmap_at_any_step(void **state)
{
	(void)state;
	anything_at_any_step(do_unmap);
	anything_at_any_step(do_dontneed);
}

static void test_reuse_at_any_step(void **state)
{
	(void)state;
	anything_at_any_step(do_unmap_and_reuse);
}

static void test_protect_at_any_step(void **state)
{
	(void)state;
	anything_at_any_step(do_protect);
}

static void test_migrate_at_any_step(void **state)
{
	(void)state;
	anything_at_any_step(do_migrate);
	anything_at_any_step(do_move_twice);
}

static void test_fork_at_any_step(void **state)
{
	(void)state;
	anything_at_any_step(do_fork);
}

/* ---- the same page in another frame ------------------------------------------------------ */

static struct hoard *hoarded;

/*
 * The large frame that the page is a piece of is freed, and the page is mapped again: by the same
 * entry, in the same place, but in a frame of one page. What was its head is another's frame.
 */
static void do_make_small(struct stage *s)
{
	unsigned at = 0;
	ctg_pfn_t first;

	assert_int_equal(ctg_munmap(s->mm, BASE + PAGES + 1, PAGES - 1), 0);
	ctg_drain_caches(s->w.ctg);
	hoarded = hoard_orders(&s->w, 0, CTG_GFP_MOVABLE);
	while (at < hoarded->nr && (s->pfn ^ hoarded->pfn[at]) >> hoarded->order[at] != 0)
		at++;
	if (at == hoarded->nr) /* it is held by now, and not free */
		return;
	first = hoarded->pfn[at];
	ctg_split_used(s->w.ctg, first, hoarded->order[at]);
	for (uint64_t i = 1; i < (uint64_t)1 << hoarded->order[at]; i++)
		if (first + i != s->pfn) {
			assert_in_range(hoarded->nr, 0, 8191);
			hoarded->order[hoarded->nr] = 0;
			hoarded->pfn[hoarded->nr++] = first + i;
		}
	hoarded->order[at] = 0;
	assert_int_equal(ctg_free_frames(s->w.ctg, s->pfn), 0);
	assert_int_equal(ctg_mmap(s->mm, s->vpn, 1, RW), 0);
	assert_int_equal(ctg_mm_populate(s->mm, s->vpn, 1, NULL), 0);
	assert_int_equal(pfn_of(s->mm, s->vpn), s->pfn);
}

static void test_another_head_at_any_step(void **state)
{
	uint64_t nth = 0;
	struct stage s;

	(void)state;
	do {
		struct ctg_hold h;
		struct ctg_extent run;
		bool held;

		stage_open(&s, true);
		/* In pieces; and the table has another use, so that it stays. */
		assert_int_equal(ctg_munmap(s.mm, BASE + PAGES, 1), 0);
		mapped(s.mm, BASE + PAGES, 1, RW);
		assert_int_equal(ctg_hold_begin(&h, s.mm, s.vpn, 1, 0, CTG_FOLL_PIN), 0);
		hoarded = NULL;
		hook.act = do_make_small;
		hook.stage = &s;
		hook.done = false;
		hook.steps = ++nth;
		held = hold_fast(&h, s.vpn, 1, &run);
		hook.steps = 0;
		ctg_hold_end(&h);
		assert_int_equal(all_pins(&s), held);
		if (held) {
			/* One of the two frames that the page has had. */
			bool small = hook.done && ctg_word_pin(word_of(&s.w, s.pfn)) == 1;

			assert_int_equal(run.pfn, s.pfn);
			if (!small)
				assert_int_equal(
					ctg_word_pin(word_of(&s.w, s.pfn & ~(PAGES - 1))), 1);
			if (!small && hook.done)
				assert_int_equal(
					ctg_info_order(info_of(&s.w, s.pfn & ~(PAGES - 1))),
					CTG_PAGEBLOCK_ORDER);
			assert_int_equal(ctg_unpin_user_pages(s.w.ctg, &run.pfn, 1), 0);
		}
		if (hoarded != NULL)
			hoard_free_all(&s.w, hoarded);
		stage_close(&s);
	} while (hook.done);
	assert_true(nth > 5);
}

/* ---- the cost ---------------------------------------------------------------------------- */

static void test_one_atomic_a_frame_and_no_lock(void **state)
{
	ctg_pfn_t pages[PAGES];
	struct world w;
	struct ctg_mm *mm;
	struct ctg_pte_ref ref;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 64);
	map_large(&w, mm, BASE + PAGES);
	/* The first time there is an account to be made, and entries to be marked. */
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 64, CTG_FOLL_WRITE, pages), 64);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, pages, 64), 0);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + PAGES, 1, CTG_FOLL_WRITE, pages), 1);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, pages, 1), 0);
	/* Whoever asked for one of these would sleep for ever. */
	ctg_lock(&w.port, &mm->lock);
	ctg_lock(&w.port, &mm->anon->lock);
	ctg_lock(&w.port, &mm->batch.lock);
	ctg_pte_lock(mm, BASE + 1, &ref);
	ctg_lock(&w.port, &mm->spare_lock);
	ctg_lock(&w.port, &w.ctg->pins.lock);
	ctg_lock(&w.port, &w.zone->lock);
	nr_atomics = 0;
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 64, CTG_FOLL_WRITE, pages), 64);
	assert_int_equal(nr_atomics, 64 + 1); /* the account */
	nr_atomics = 0;
	assert_int_equal(ctg_unpin_user_pages(w.ctg, pages, 64), 0);
	assert_int_equal(nr_atomics, 64 + 1);
	/* All pages of a large frame at once. */
	nr_atomics = 0;
	assert_int_equal(
		ctg_pin_user_pages_fast(mm, BASE + PAGES, PAGES, CTG_FOLL_WRITE, pages), PAGES);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, pages, PAGES), 0);
	assert_int_equal(nr_atomics, 4);
	nr_atomics = 0;
	assert_int_equal(ctg_get_user_pages_fast(mm, BASE + 1, 64, 0, pages), 64);
	assert_int_equal(ctg_put_user_pages(w.ctg, pages, 64), 0);
	assert_int_equal(nr_atomics, 2 * 64);
	ctg_unlock(&w.port, &w.zone->lock);
	ctg_unlock(&w.port, &w.ctg->pins.lock);
	ctg_unlock(&w.port, &mm->spare_lock);
	ctg_pte_unlock(mm, &ref);
	ctg_unlock(&w.port, &mm->batch.lock);
	ctg_unlock(&w.port, &mm->anon->lock);
	ctg_unlock(&w.port, &mm->lock);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_unmap_at_any_step),
		cmocka_unit_test(test_reuse_at_any_step),
		cmocka_unit_test(test_protect_at_any_step),
		cmocka_unit_test(test_migrate_at_any_step),
		cmocka_unit_test(test_fork_at_any_step),
		cmocka_unit_test(test_another_head_at_any_step),
		cmocka_unit_test(test_one_atomic_a_frame_and_no_lock),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
