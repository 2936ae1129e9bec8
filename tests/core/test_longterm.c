/* SPDX-License-Identifier: MIT */
/* Long-term pins: out of lendable memory first, all or nothing. */
#include "lend.h"

#include <pthread.h>

#define LONG (CTG_FOLL_WRITE | CTG_FOLL_LONGTERM)

typedef int64_t pin_fn(struct ctg_mm *, ctg_vpn_t, uint64_t, unsigned, ctg_pfn_t *);
static pin_fn *const forms[2] = {ctg_pin_user_pages, ctg_pin_user_pages_fast};

static bool is_lendable(struct lend *l, ctg_pfn_t pfn)
{
	const struct ctg_zone *zone = ctg_zone_of(l->ctg, pfn);

	return ctg_zone_block(zone, pfn)->migratetype == CTG_MIGRATE_CMA;
}

static uint64_t all_pins(const struct lend *l)
{
	uint64_t nr = 0;

	for (uint64_t i = 0; i < l->zone->nr; i++)
		nr += ctg_word_pin(l->zone->frames[i].word.v);
	return nr;
}

static void check_pinned_outside(struct lend *l, ctg_vpn_t vpn, uint64_t nr, const ctg_pfn_t *pages)
{
	for (uint64_t i = 0; i < nr; i++) {
		assert_int_equal(pages[i], page_at(l, vpn + i));
		assert_false(is_lendable(l, pages[i]));
	}
}

/* ---- where it goes ----------------------------------------------------------------------- */

static void test_moves_out_of_an_area(void **state)
{
	(void)state;
	for (unsigned form = 0; form < 2; form++) {
		struct lend *l = lend_open(4, 4, true);
		struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
		ctg_pfn_t pages[100], again[100], taken;

		assert_int_equal(lend_small(l, 200), 200);
		assert_true(is_lendable(l, page_at(l, BLOCK + 50)));
		assert_int_equal(forms[form](l->mm, BLOCK + 50, 100, LONG, pages), 100);
		check_pinned_outside(l, BLOCK + 50, 100, pages);
		assert_int_equal(ctg_mm_nr_pins(l->mm), 100);
		assert_int_equal(all_pins(l), 100);
		check_stamps(l);
		/* Nothing of it is in the area's way, but the pages stay where they are. */
		assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, NULL, &taken), 0);
		check_pinned_outside(l, BLOCK + 50, 100, pages);
		/* It is outside already. */
		assert_int_equal(forms[form](l->mm, BLOCK + 50, 100, LONG, again), 100);
		assert_memory_equal(pages, again, sizeof(pages));
		assert_int_equal(ctg_unpin_user_pages(l->ctg, again, 100), 0);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 100), 0);
		assert_int_equal(ctg_mm_nr_pins(l->mm), 0);
		assert_int_equal(ctg_cma_release(cma, taken, 4 * BLOCK, NULL), 0);
		check_stamps(l);
		lend_close(l);
	}
}

static void test_short_pins_stay_where_they_are(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	ctg_pfn_t pages[10];

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	assert_int_equal(lend_small(l, 20), 20);
	for (unsigned form = 0; form < 2; form++) {
		assert_int_equal(forms[form](l->mm, BLOCK, 10, CTG_FOLL_WRITE, pages), 10);
		assert_true(is_lendable(l, pages[0]) && is_lendable(l, pages[9]));
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 10), 0);
	}
	lend_close(l);
}

/* What is faulted in for it comes from elsewhere at once, though its space takes from areas only.
 */
static void test_faults_in_elsewhere(void **state)
{
	(void)state;
	for (unsigned form = 0; form < 2; form++) {
		struct lend *l = lend_open(4, 4, true);
		ctg_pfn_t pages[BLOCK];

		lend_area(l, "a", 0, 4, 0);
		assert_int_equal(ctg_mmap(l->mm, BLOCK, 5, RW), 0);
		assert_int_equal(forms[form](l->mm, BLOCK, 5, LONG, pages), 5);
		check_pinned_outside(l, BLOCK, 5, pages);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 5), 0);
		assert_int_equal(l->ctg->counters.frames_migrated.v, 0);
		/* A whole slot is one large frame. */
		assert_int_equal(ctg_mmap(l->mm, 2 * BLOCK, BLOCK, RW), 0);
		assert_int_equal(forms[form](l->mm, 2 * BLOCK, BLOCK, LONG, pages), BLOCK);
		check_pinned_outside(l, 2 * BLOCK, BLOCK, pages);
		assert_int_equal(
			ctg_info_order(lend_frame(l, pages[0])->info.v), CTG_PAGEBLOCK_ORDER);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, BLOCK), 0);
		assert_int_equal(l->ctg->counters.frames_migrated.v, 0);
		lend_close(l);
	}
}

static void test_large_frames_go_whole_or_in_pieces(void **state)
{
	(void)state;
	for (unsigned pieces = 0; pieces < 2; pieces++) {
		struct lend *l = lend_open(4, 2, true);
		ctg_pfn_t head, pages[2], hold[2];

		lend_area(l, "a", 0, 4, 0);
		head = lend_large(l);
		assert_true(is_lendable(l, head));
		if (pieces) { /* no large one is left, but enough small ones */
			assert_int_equal(ctg_alloc_frames(l->ctg, 0, 0, &hold[0]), 0);
			assert_int_equal(ctg_alloc_frames(l->ctg, 9, 0, &hold[1]), 0);
		}
		assert_int_equal(ctg_pin_user_pages_fast(l->mm, BLOCK + 7, 2, LONG, pages),
			pieces ? -CTG_ENOMEM : 2);
		if (pieces) {
			/* 511 frames for 512 pages: give one up, then it fits. */
			assert_int_equal(all_pins(l), 0);
			assert_int_equal(page_at(l, BLOCK), head);
			assert_int_equal(ctg_munmap(l->mm, BLOCK, 1), 0);
			assert_int_equal(
				ctg_pin_user_pages_fast(l->mm, BLOCK + 7, 2, LONG, pages), 2);
			assert_int_equal(ctg_free_frames(l->ctg, hold[0]), 0);
			assert_int_equal(ctg_free_frames(l->ctg, hold[1]), 0);
		}
		check_pinned_outside(l, BLOCK + 7, 2, pages);
		assert_int_equal(
			ctg_info_order(lend_frame(l, pages[0] & ~(BLOCK - 1))->info.v) != 0,
			!pieces);
		for (ctg_vpn_t vpn = BLOCK + 1; vpn < 2 * BLOCK; vpn++)
			check_stamp(l, vpn);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 2), 0);
		lend_close(l);
	}
}

/* An allocation is at work on ordinary memory: what it will want is not a place to stay either. */
static void test_moves_out_of_isolated_blocks(void **state)
{
	struct lend *l = lend_open(0, 4, true);
	struct ctg_mm_config config = {0};
	struct ctg_mm *mm;
	ctg_pfn_t was, page;

	(void)state;
	assert_int_equal(ctg_mm_create(l->ctg, &config, &mm), 0);
	assert_int_equal(ctg_mmap(mm, BLOCK + 1, 1, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BLOCK + 1, 1, NULL), 0);
	for (unsigned form = 0; form < 2; form++) {
		struct ctg_mapping m;

		assert_int_equal(ctg_mm_lookup(mm, BLOCK + 1, 1, &m), 0);
		was = m.pfn;
		assert_int_equal(ctg_block_isolate(l->zone, was, l), 0);
		assert_int_equal(forms[form](mm, BLOCK + 1, 1, LONG, &page), 1);
		assert_true((page ^ was) >> CTG_PAGEBLOCK_ORDER != 0);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, &page, 1), 0);
		ctg_block_unisolate(l->zone, was, l);
	}
	ctg_mm_destroy(mm, false);
	lend_close(l);
}

/* With no ordinary memory there is the spill zone, from where it goes home once it is released. */
static void test_spills_where_there_is_nothing_else(void **state)
{
	struct ctg_zone_config config = {.base = 64 * BLOCK, .nr = BLOCK, .flags = CTG_ZONE_SPILL};
	struct lend *l = lend_open(4, 0, true);
	struct ctg_zone *spill;
	ctg_pfn_t pages[10];
	uint64_t moved;

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	assert_int_equal(ctg_sim_add_zone(l->sim, &config, true, &spill), 0);
	assert_int_equal(ctg_zone_release(spill, config.base, config.nr, true), 0);
	assert_int_equal(lend_small(l, 10), 10);
	assert_int_equal(ctg_pin_user_pages_fast(l->mm, BLOCK, 8, LONG, pages), 8);
	check_pinned_outside(l, BLOCK, 8, pages);
	assert_int_equal(ctg_mmap(l->mm, 4 * BLOCK, 1, RW), 0);
	assert_int_equal(ctg_pin_user_pages_fast(l->mm, 4 * BLOCK, 1, LONG, pages + 8), 1);
	assert_true(pages[0] >= config.base && pages[8] >= config.base);
	assert_int_equal(ctg_migrate_home(l->ctg, UINT64_MAX, &moved), -CTG_EBUSY);
	assert_int_equal(moved, 0);
	assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 9), 0);
	assert_int_equal(ctg_migrate_home(l->ctg, UINT64_MAX, &moved), 0);
	assert_int_equal(moved, 9);
	assert_true(is_lendable(l, page_at(l, BLOCK)));
	check_stamps(l);
	lend_close(l);
}

/* Shared copy-on-write, in an area: its own, and elsewhere, in one go. */
static void test_shared_pages(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_mm_config config = {.gfp = CTG_GFP_NO_ORDINARY};
	struct ctg_mm *child;
	ctg_pfn_t pages[3];

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	assert_int_equal(lend_small(l, 3), 3);
	assert_int_equal(ctg_mm_fork(l->mm, &config, &child), 0);
	for (unsigned write = 0; write < 2; write++) {
		assert_int_equal(ctg_pin_user_pages_fast(l->mm, BLOCK + write, 2,
					 write ? LONG : CTG_FOLL_LONGTERM, pages),
			2);
		check_pinned_outside(l, BLOCK + write, 2, pages);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 2), 0);
	}
	for (unsigned i = 0; i < 3; i++) {
		struct ctg_mapping m;

		assert_int_equal(ctg_mm_lookup(child, BLOCK + i, 1, &m), 0);
		assert_true(m.pfn != page_at(l, BLOCK + i));
		assert_true(is_lendable(l, m.pfn));
	}
	check_stamps(l);
	ctg_mm_destroy(child, false);
	lend_close(l);
}

/* ---- all or nothing ---------------------------------------------------------------------- */

static void test_no_room_outside(void **state)
{
	(void)state;
	for (unsigned form = 0; form < 2; form++) {
		struct lend *l = lend_open(4, 0, true);
		ctg_pfn_t pages[20] = {0};
		struct ctg_pin *pin = NULL;
		struct snapshot *s;

		lend_area(l, "a", 0, 4, 0);
		assert_int_equal(lend_small(l, 100), 100);
		assert_int_equal(ctg_mmap(l->mm, 8 * BLOCK, 1, RW), 0);
		s = snapshot_take(l);
		assert_int_equal(forms[form](l->mm, BLOCK, 20, LONG, pages), -CTG_ENOMEM);
		assert_int_equal(ctg_pin_range(l->mm, BLOCK, 20, LONG, "x", &pin), -CTG_ENOMEM);
		/* Nor to fault in. */
		assert_int_equal(forms[form](l->mm, 8 * BLOCK, 1, LONG, pages), -CTG_ENOMEM);
		assert_null(pin);
		assert_int_equal(ctg_mm_nr_pins(l->mm), 0);
		snapshot_check(l, s, true);
		lend_close(l);
	}
}

/* Some of it can be pinned, and then one cannot: nothing is. */
static void test_nothing_stays_pinned_after_a_failure(void **state)
{
	(void)state;
	for (unsigned form = 0; form < 2; form++) {
		struct lend *l = lend_open(4, 4, true);
		ctg_pfn_t pages[20], held;
		struct ctg_pin *pin = NULL;
		struct snapshot *s;

		lend_area(l, "a", 0, 4, 0);
		assert_int_equal(lend_small(l, 20), 20);
		s = snapshot_take(l);
		assert_int_equal(ctg_get_user_pages(l->mm, BLOCK + 10, 1, 0, &held), 1);
		assert_int_equal(forms[form](l->mm, BLOCK, 20, LONG, pages), -CTG_EBUSY);
		assert_int_equal(ctg_pin_range(l->mm, BLOCK, 20, LONG, "x", &pin), -CTG_EBUSY);
		assert_int_equal(
			forms[form](l->mm, BLOCK, 20, LONG | CTG_FOLL_NOWAIT, pages), -CTG_EAGAIN);
		assert_null(pin);
		assert_int_equal(all_pins(l), 0);
		assert_int_equal(ctg_mm_nr_pins(l->mm), 0);
		assert_int_equal(page_at(l, BLOCK + 10), held);
		assert_int_equal(ctg_put_user_pages(l->ctg, &held, 1), 0);
		snapshot_check(l, s, false);
		/* A pin is as much in the way as a reference, whoever has it. */
		assert_int_equal(ctg_pin_user_pages(l->mm, BLOCK + 19, 1, 0, &held), 1);
		assert_int_equal(forms[form](l->mm, BLOCK, 20, LONG, pages), -CTG_EBUSY);
		assert_int_equal(all_pins(l), 1);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, &held, 1), 0);
		/* A hole, and a page that may not be written. */
		assert_int_equal(forms[form](l->mm, BLOCK, 21, LONG, pages), -CTG_EFAULT);
		assert_int_equal(ctg_mprotect(l->mm, BLOCK + 19, 1, CTG_PROT_READ), 0);
		assert_int_equal(forms[form](l->mm, BLOCK, 20, LONG, pages), -CTG_EFAULT);
		assert_int_equal(all_pins(l), 0);
		assert_int_equal(ctg_mm_nr_pins(l->mm), 0);
		check_stamps(l);
		lend_close(l);
	}
}

static void test_every_hook_failed_in_turn(void **state)
{
	(void)state;
	for (unsigned hook = 0; hook < CTG_SIM_NR_HOOKS; hook++) {
		unsigned failures = 0;
		int64_t ret = -1;

		for (uint64_t nth = 1; ret != 30; nth++) {
			struct lend *l = lend_open(4, 4, true);
			struct ctg_mm_config config = {.gfp = CTG_GFP_NO_ORDINARY};
			struct ctg_mm *child;
			ctg_pfn_t pages[30];

			lend_area(l, "a", 0, 4, 0);
			assert_int_equal(lend_small(l, 20), 20);
			assert_int_equal(ctg_mm_fork(l->mm, &config, &child), 0);
			assert_int_equal(ctg_handle_fault(l->mm, BLOCK + 3, true), 0);
			assert_int_equal(ctg_mmap(l->mm, BLOCK + 20, 10, RW), 0);
			ctg_sim_fail(l->sim, (enum ctg_sim_hook)hook, nth);
			ret = ctg_pin_user_pages_fast(l->mm, BLOCK, 30, LONG, pages);
			ctg_sim_fail(l->sim, (enum ctg_sim_hook)hook, 0);
			assert_true(ret == 30 || (ret < 0 && ret != -CTG_EFAULT));
			if (ret < 0) {
				assert_int_equal(all_pins(l), 0);
				assert_int_equal(ctg_mm_nr_pins(l->mm), 0);
				failures++;
				/* It was only that once. */
				assert_int_equal(
					ctg_pin_user_pages_fast(l->mm, BLOCK, 30, LONG, pages), 30);
			}
			check_pinned_outside(l, BLOCK, 30, pages);
			for (ctg_vpn_t vpn = BLOCK; vpn < BLOCK + 20; vpn++)
				check_stamp(l, vpn);
			assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 30), 0);
			ctg_mm_destroy(child, false);
			lend_close(l);
			if (ret == 30 && nth == 1)
				break;
			assert_in_range(nth, 1, 400);
		}
		if (hook == CTG_SIM_META_ALLOC || hook == CTG_SIM_COPY || hook == CTG_SIM_ZERO)
			assert_true(failures != 0);
	}
}

/* ---- with others ------------------------------------------------------------------------- */

struct pinner {
	struct lend *l;
	pthread_t thread;
	unsigned form;
	unsigned rounds;
	pthread_barrier_t *barrier;
};

/* Pin the same pages as the others do, out of an area each time. */
static void *pin_together(void *arg)
{
	struct pinner *p = arg;
	struct lend *l = p->l;

	ctg_sim_set_cpu(p->form);
	for (unsigned round = 0; round < p->rounds; round++) {
		ctg_pfn_t pages[24];

		pthread_barrier_wait(p->barrier);
		assert_int_equal(forms[p->form](l->mm, BLOCK, 24, LONG, pages), 24);
		check_pinned_outside(l, BLOCK, 24, pages);
		/* All have it now: nobody's pin has stopped another's. They are counted. */
		pthread_barrier_wait(p->barrier);
		pthread_barrier_wait(p->barrier);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 24), 0);
		pthread_barrier_wait(p->barrier);
	}
	return NULL;
}

static void test_two_at_once_both_succeed(void **state)
{
	struct lend *l = lend_open(4, 4, false);
	struct pinner pinners[2];
	pthread_barrier_t barrier;

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	assert_int_equal(lend_small(l, 24), 24);
	pthread_barrier_init(&barrier, NULL, 3);
	for (unsigned i = 0; i < 2; i++) {
		pinners[i] = (struct pinner){.l = l, .form = i, .rounds = 200, .barrier = &barrier};
		assert_int_equal(
			pthread_create(&pinners[i].thread, NULL, pin_together, &pinners[i]), 0);
	}
	for (unsigned round = 0; round < 200; round++) {
		pthread_barrier_wait(&barrier);
		pthread_barrier_wait(&barrier);
		assert_int_equal(ctg_mm_nr_pins(l->mm), 48);
		pthread_barrier_wait(&barrier);
		pthread_barrier_wait(&barrier);
		/* Back into the area: as new pages, between the rounds. */
		if (round + 1 < 200) {
			assert_int_equal(ctg_madvise_dontneed(l->mm, BLOCK, 24), 0);
			for (ctg_vpn_t vpn = BLOCK; vpn < BLOCK + 24; vpn++)
				stamp(l, vpn);
			assert_true(is_lendable(l, page_at(l, BLOCK)));
		}
	}
	for (unsigned i = 0; i < 2; i++)
		pthread_join(pinners[i].thread, NULL);
	pthread_barrier_destroy(&barrier);
	check_stamps(l);
	lend_close(l);
}

static void *let_go_soon(void *arg)
{
	struct pinner *p = arg;
	ctg_pfn_t page = page_at(p->l, BLOCK);

	/* Somebody waits for it, or will find it free. */
	for (unsigned i = 0; i < 1000 && (word_of(p->l, page) & CTG_WORD_WAITERS) == 0; i++)
		nanosleep(&(struct timespec){.tv_nsec = 10000}, NULL);
	assert_int_equal(ctg_put_user_pages(p->l->ctg, &page, 1), 0);
	return NULL;
}

static void test_waits_for_a_holder_that_leaves(void **state)
{
	struct lend *l = lend_open(4, 4, false);
	struct pinner p = {.l = l};
	ctg_pfn_t page, pinned;

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	assert_int_equal(lend_small(l, 1), 1);
	assert_int_equal(ctg_get_user_pages(l->mm, BLOCK, 1, 0, &page), 1);
	assert_int_equal(pthread_create(&p.thread, NULL, let_go_soon, &p), 0);
	assert_int_equal(ctg_pin_user_pages_fast(l->mm, BLOCK, 1, LONG, &pinned), 1);
	pthread_join(p.thread, NULL);
	assert_true(pinned != page);
	check_pinned_outside(l, BLOCK, 1, &pinned);
	assert_int_equal(ctg_unpin_user_pages(l->ctg, &pinned, 1), 0);
	lend_close(l);
}

/* The area is taken and given back while pages are pinned out of it: neither fails for the other.
 */
static void *take_all(void *arg)
{
	struct pinner *p = arg;

	ctg_sim_set_cpu(3);
	for (unsigned round = 0; round < p->rounds; round++) {
		struct ctg_cma *cma = p->l->ctg->areas[0];
		ctg_pfn_t pfn;

		assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, NULL, &pfn), 0);
		assert_int_equal(ctg_cma_release(cma, pfn, 4 * BLOCK, NULL), 0);
	}
	return NULL;
}

static void test_pins_while_the_area_is_taken(void **state)
{
	struct lend *l = lend_open(4, 6, false);
	struct pinner taker = {.l = l, .rounds = 40};

	(void)state;
	lend_area(l, "a", 0, 4, 0);
	assert_int_equal(lend_small(l, 200), 200);
	assert_int_equal(pthread_create(&taker.thread, NULL, take_all, &taker), 0);
	for (unsigned round = 0; round < 300; round++) {
		ctg_vpn_t vpn = BLOCK + round % 180;
		ctg_pfn_t pages[20];

		assert_int_equal(forms[round % 2](l->mm, vpn, 20, CTG_FOLL_LONGTERM, pages), 20);
		check_pinned_outside(l, vpn, 20, pages);
		assert_int_equal(ctg_unpin_user_pages(l->ctg, pages, 20), 0);
	}
	pthread_join(taker.thread, NULL);
	check_stamps(l);
	lend_close(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_moves_out_of_an_area),
		cmocka_unit_test(test_short_pins_stay_where_they_are),
		cmocka_unit_test(test_faults_in_elsewhere),
		cmocka_unit_test(test_large_frames_go_whole_or_in_pieces),
		cmocka_unit_test(test_moves_out_of_isolated_blocks),
		cmocka_unit_test(test_spills_where_there_is_nothing_else),
		cmocka_unit_test(test_shared_pages),
		cmocka_unit_test(test_no_room_outside),
		cmocka_unit_test(test_nothing_stays_pinned_after_a_failure),
		cmocka_unit_test(test_every_hook_failed_in_turn),
		cmocka_unit_test(test_two_at_once_both_succeed),
		cmocka_unit_test(test_waits_for_a_holder_that_leaves),
		cmocka_unit_test(test_pins_while_the_area_is_taken),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
