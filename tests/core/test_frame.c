/* SPDX-License-Identifier: MIT */
/* The word of a frame: holders, freezing, waiting. */
#include "zone_check.h"

#include <pthread.h>

struct fixture {
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
	ctg_pfn_t pfn; /* a frame with one reference */
	struct ctg_frame *frame;
};

static int setup(void **state)
{
	struct fixture *f = calloc(1, sizeof(*f));
	struct ctg_zone_config config = {.base = BLOCK, .nr = 4 * BLOCK};
	struct ctg_sim_config sim = {.nr_cpus = 2, .virtual_time = true};

	assert_non_null(f);
	assert_int_equal(ctg_sim_create(&sim, &f->sim), 0);
	f->ctg = ctg_sim_machine(f->sim);
	assert_int_equal(ctg_sim_add_zone(f->sim, &config, true, &f->zone), 0);
	assert_int_equal(ctg_zone_release(f->zone, BLOCK, 4 * BLOCK, false), 0);
	assert_int_equal(ctg_alloc_frames(f->ctg, 0, CTG_GFP_MOVABLE, &f->pfn), 0);
	f->frame = frame_at(f->zone, f->pfn);
	*state = f;
	return 0;
}

static int teardown(void **state)
{
	struct fixture *f = *state;

	check_zone(f->zone);
	ctg_sim_destroy(f->sim);
	free(f);
	return 0;
}

static uint64_t nr_free(struct fixture *f)
{
	struct ctg_zone_stat stat;

	ctg_zone_stat(f->zone, &stat);
	return stat.nr_free;
}

static void tryget_refuses_what_nobody_holds(void **state)
{
	struct fixture *f = *state;

	assert_int_equal(ctg_frame_tryget(f->frame), 0);
	assert_int_equal(ctg_word_ref(f->frame->word.v), 2);
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_REF1, 2);
	assert_int_equal(ctg_frame_tryget(f->frame), -CTG_EBUSY);
	assert_int_equal(f->frame->word.v, 0);
	assert_int_equal(nr_free(f), 4 * BLOCK);
}

static void tryget_never_overflows(void **state)
{
	struct fixture *f = *state;

	for (uint32_t i = 1; i < CTG_WORD_REF_MAX; i++)
		assert_int_equal(ctg_frame_tryget(f->frame), 0);
	for (unsigned i = 0; i < 3; i++)
		assert_int_equal(ctg_frame_tryget(f->frame), -CTG_EOVERFLOW);
	assert_int_equal(f->frame->word.v, CTG_WORD_REF_MAX * CTG_WORD_REF1);
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_REF1, CTG_WORD_REF_MAX);
	assert_int_equal(nr_free(f), 4 * BLOCK);
}

/* Whoever is last frees, of whatever kind. */
static void last_holder_of_any_kind_frees(void **state)
{
	struct fixture *f = *state;
	const uint64_t kinds[] = {CTG_WORD_MAP1, CTG_WORD_PIN1, CTG_WORD_REF1};

	for (unsigned last = 0; last < 3; last++) {
		ctg_pfn_t pfn;

		assert_int_equal(ctg_alloc_frames(f->ctg, 3, CTG_GFP_MOVABLE, &pfn), 0);
		frame_at(f->zone, pfn)->word.v =
			CTG_WORD_MAP1 * 5 + CTG_WORD_PIN1 * 5 + CTG_WORD_REF1 * 5;
		for (unsigned kind = 0; kind < 3; kind++)
			if (kind != last)
				ctg_frame_put(f->ctg, pfn, kinds[kind], 5);
		ctg_frame_put(f->ctg, pfn, kinds[last], 4);
		assert_int_equal(ctg_info_state(info_at(f->zone, pfn)), CTG_FRAME_USED);
		assert_int_equal(nr_free(f), 4 * BLOCK - 9);
		ctg_frame_put(f->ctg, pfn, kinds[last], 1);
		assert_int_equal(nr_free(f), 4 * BLOCK - 1);
	}
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_REF1, 1);
}

static void freeze_wants_the_exact_word(void **state)
{
	struct fixture *f = *state;
	const uint64_t held = 2 * CTG_WORD_MAP1 + CTG_WORD_REF1;
	const uint64_t others[] = {held + CTG_WORD_MAP1, held - CTG_WORD_MAP1, held + CTG_WORD_PIN1,
		held + CTG_WORD_REF1, held - CTG_WORD_REF1,
		held + CTG_WORD_PIN1 + CTG_WORD_WAITERS};
	uint64_t seen = 0;

	for (unsigned i = 0; i < sizeof(others) / sizeof(others[0]); i++) {
		f->frame->word.v = others[i];
		assert_false(ctg_frame_freeze(f->frame, 2, 1, &seen));
		assert_int_equal(seen, others[i]);
		assert_int_equal(f->frame->word.v, others[i]);
	}
	for (unsigned flags = 0; flags < 4; flags++) {
		uint64_t bits = (uint64_t)flags << 62;

		f->frame->word.v = held | bits;
		assert_true(ctg_frame_freeze(f->frame, 2, 1, &seen));
		assert_true(ctg_word_frozen(f->frame->word.v));
		assert_int_equal(f->frame->word.v & CTG_WORD_FLAGS, bits);
		assert_false(ctg_frame_freeze(f->frame, 2, 1, &seen));
		assert_true(ctg_word_frozen(seen));
		assert_int_equal(ctg_frame_tryget(f->frame), -CTG_EBUSY);
		assert_int_equal(ctg_free_frames(f->ctg, f->pfn), -CTG_EINVAL);
		ctg_frame_unfreeze(f->ctg, f->frame, held);
		/* Waiters have been woken; draining is not ours to end. */
		assert_int_equal(f->frame->word.v, held | (bits & CTG_WORD_DRAINING));
	}
	f->frame->word.v = CTG_WORD_REF1;
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_REF1, 1);
}

static void a_frozen_frame_can_be_freed(void **state)
{
	struct fixture *f = *state;
	uint32_t ticket = f->ctg->frame_wait[f->pfn % CTG_FRAME_WAITS].v;
	uint64_t seen;

	assert_true(ctg_frame_freeze(f->frame, 0, 1, &seen));
	ctg_or64_acq_rel(&f->frame->word, CTG_WORD_WAITERS);
	ctg_frame_unfreeze(f->ctg, f->frame, 0);
	assert_int_equal(f->frame->word.v, CTG_WORD_WAITERS);
	assert_int_equal(ctg_frame_tryget(f->frame), -CTG_EBUSY);
	ctg_frame_free(f->ctg, f->pfn);
	assert_int_equal(f->frame->word.v, 0);
	assert_int_not_equal(f->ctg->frame_wait[f->pfn % CTG_FRAME_WAITS].v, ticket);
	assert_int_equal(nr_free(f), 4 * BLOCK);
	assert_int_equal(ctg_alloc_frames(f->ctg, 0, CTG_GFP_MOVABLE, &f->pfn), 0);
	f->frame = frame_at(f->zone, f->pfn);
	assert_true(ctg_frame_freeze(f->frame, 0, 1, &seen));
	ctg_frame_free(f->ctg, f->pfn);
	assert_int_equal(nr_free(f), 4 * BLOCK);
}

static void obstacles_have_names(void **state)
{
	struct fixture *f = *state;
	const uint64_t m = CTG_WORD_MAP1, p = CTG_WORD_PIN1, r = CTG_WORD_REF1;

	assert_int_equal(ctg_word_obstacle(2 * m + r, 2, 1), CTG_OBSTACLE_NONE);
	assert_int_equal(ctg_word_obstacle((2 * m + r) | CTG_WORD_FLAGS, 2, 1), CTG_OBSTACLE_NONE);
	assert_int_equal(ctg_word_obstacle(3 * m + r, 2, 1), CTG_OBSTACLE_MAP);
	assert_int_equal(ctg_word_obstacle(2 * m + 2 * r, 2, 1), CTG_OBSTACLE_REF);
	assert_int_equal(ctg_word_obstacle(3 * m + p + 2 * r, 2, 1), CTG_OBSTACLE_PIN);
	assert_int_equal(ctg_word_obstacle(CTG_WORD_FROZEN, 2, 1), CTG_OBSTACLE_MOVING);
	assert_int_equal(
		ctg_word_obstacle(CTG_WORD_FROZEN | CTG_WORD_FLAGS, 2, 1), CTG_OBSTACLE_MOVING);
	assert_int_equal(ctg_free_frames(f->ctg, f->pfn), 0);
}

static void wait_looks_before_it_sleeps(void **state)
{
	struct fixture *f = *state;
	uint64_t seen = f->frame->word.v;

	/* Not what was seen: no sleep, no mark. */
	assert_int_equal(ctg_frame_wait(f->ctg, f->pfn, seen + CTG_WORD_PIN1, 5, false), 0);
	assert_int_equal(f->frame->word.v, seen);
	/* Nobody holds it: nothing to wait for. */
	assert_int_equal(ctg_frame_wait(f->ctg, f->pfn, 0, 5, false), 0);
	assert_int_equal(f->frame->word.v, seen);
	assert_int_equal(ctg_frame_wait(f->ctg, f->pfn, seen, 5, false), -CTG_ETIMEDOUT);
	assert_int_equal(f->frame->word.v, seen | CTG_WORD_WAITERS);
	/* Marked by somebody else: it sleeps all the same, from either word. */
	assert_int_equal(ctg_frame_wait(f->ctg, f->pfn, seen, 6, false), -CTG_ETIMEDOUT);
	assert_int_equal(
		ctg_frame_wait(f->ctg, f->pfn, f->frame->word.v, 7, false), -CTG_ETIMEDOUT);
	assert_int_equal(ctg_free_frames(f->ctg, f->pfn), 0);
	assert_int_equal(f->frame->word.v, 0);
}

static void every_departure_clears_and_wakes(void **state)
{
	struct fixture *f = *state;
	struct ctg_word32 *ticket = &f->ctg->frame_wait[f->pfn % CTG_FRAME_WAITS];
	uint32_t before = ticket->v;

	f->frame->word.v = (CTG_WORD_REF1 * 3 + CTG_WORD_PIN1) | CTG_WORD_WAITERS;
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_PIN1, 1);
	assert_int_equal(ticket->v, before + 1);
	assert_int_equal(f->frame->word.v, CTG_WORD_REF1 * 3);
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_REF1, 1);
	assert_int_equal(ticket->v, before + 1);
	f->frame->word.v |= CTG_WORD_WAITERS | CTG_WORD_DRAINING;
	assert_int_equal(ctg_free_frames(f->ctg, f->pfn), 0);
	assert_int_equal(ticket->v, before + 2);
	assert_int_equal(f->frame->word.v, CTG_WORD_REF1 | CTG_WORD_DRAINING);
	f->frame->word.v |= CTG_WORD_WAITERS;
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_REF1, 1);
	assert_int_equal(ticket->v, before + 3);
	assert_int_equal(f->frame->word.v, 0);
}

struct handover {
	struct fixture *f;
	struct ctg_word32 turn; /* frames handed over so far */
};

#define HANDOVERS 2000

/* Waits until the frame has no pin, then pins it again: a missed wake-up hangs the test. */
static void *waiter(void *arg)
{
	struct handover *h = arg;

	for (uint32_t i = 0; i < HANDOVERS; i++) {
		uint64_t w;

		while (ctg_word_pin(w = ctg_load64_acquire(&h->f->frame->word)) != 0)
			if (ctg_frame_wait(h->f->ctg, h->f->pfn, w, CTG_NO_DEADLINE, false) != 0)
				return h;
		ctg_add64_acq_rel(&h->f->frame->word, CTG_WORD_PIN1);
		ctg_add32_acq_rel(&h->turn, 1);
	}
	return NULL;
}

static void no_wakeup_is_missed(void **state)
{
	struct fixture *f = *state;
	struct handover h = {.f = f};
	pthread_t thread;
	void *result;

	f->frame->word.v = CTG_WORD_REF1 + CTG_WORD_PIN1;
	assert_int_equal(pthread_create(&thread, NULL, waiter, &h), 0);
	for (uint32_t i = 0; i < HANDOVERS; i++) {
		ctg_frame_put(f->ctg, f->pfn, CTG_WORD_PIN1, 1);
		while (ctg_load32_acquire(&h.turn) == i)
			f->ctg->port.relax(f->ctg->port.host);
	}
	pthread_join(thread, &result);
	assert_null(result);
	ctg_frame_put(f->ctg, f->pfn, CTG_WORD_PIN1, 1);
	assert_int_equal(ctg_free_frames(f->ctg, f->pfn), 0);
}

static void *thawed(void *arg)
{
	struct fixture *f = arg;
	uint64_t w;

	while (ctg_word_frozen(w = ctg_load64_acquire(&f->frame->word)))
		if (ctg_frame_wait(f->ctg, f->pfn, w, CTG_NO_DEADLINE, false) != 0)
			return f;
	return NULL;
}

static void unfreezing_wakes(void **state)
{
	struct fixture *f = *state;

	for (unsigned i = 0; i < 200; i++) {
		pthread_t thread;
		void *result;
		uint64_t seen;

		assert_true(ctg_frame_freeze(f->frame, 0, 1, &seen));
		assert_int_equal(pthread_create(&thread, NULL, thawed, f), 0);
		/* Every second time surely after the thread has set its mark. */
		while (i % 2 == 0 && (ctg_load64_acquire(&f->frame->word) & CTG_WORD_WAITERS) == 0)
			f->ctg->port.relax(f->ctg->port.host);
		ctg_frame_unfreeze(f->ctg, f->frame, CTG_WORD_REF1);
		pthread_join(thread, &result);
		assert_null(result);
		ctg_and64_acq_rel(&f->frame->word, ~CTG_WORD_WAITERS);
	}
	assert_int_equal(ctg_free_frames(f->ctg, f->pfn), 0);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
	const struct CMUnitTest tests[] = {
		T(tryget_refuses_what_nobody_holds),
		T(tryget_never_overflows),
		T(last_holder_of_any_kind_frees),
		T(freeze_wants_the_exact_word),
		T(a_frozen_frame_can_be_freed),
		T(obstacles_have_names),
		T(wait_looks_before_it_sleeps),
		T(every_departure_clears_and_wakes),
		T(no_wakeup_is_missed),
		T(unfreezing_wakes),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
