/* SPDX-License-Identifier: MIT */
#include "space.h"

/* ---- what the port sees ---------------------------------------------------------------------- */

#define CALLS_MAX 64
struct call {
	struct ctg_mm *mm;
	size_t nr;
	struct ctg_vrange range[CTG_BATCH_RUNS];
	enum ctg_tlb_how how;
};

/* Every call of tlb_restrict, and whether the frame in question was still counted then. */
static struct {
	struct world *w;
	size_t nr_calls;
	struct call call[CALLS_MAX];
	ctg_pfn_t watch;
	uint64_t watched_word;
	struct ctg_mapping watched_mapping;
} seen;

static int record_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	struct call *call = &seen.call[seen.nr_calls++];

	assert_true(seen.nr_calls <= CALLS_MAX);
	assert_in_range(nr, 1, CTG_BATCH_RUNS);
	call->mm = mm;
	call->nr = nr;
	call->how = how;
	memcpy(call->range, ranges, nr * sizeof(*ranges));
	if (seen.watch != 0) {
		seen.watched_word = word_of(seen.w, seen.watch);
		seen.watched_mapping = lookup(mm, ranges[0].vpn, 1);
	}
	return seen.w->port.tlb_restrict(host, mm, ranges, nr, how);
}

static void record(struct world *w)
{
	memset(&seen, 0, sizeof(seen));
	seen.w = w;
	w->ctg->port.tlb_restrict = record_restrict;
}

static uint64_t helped(struct world *w)
{
	struct ctg_counters counters;

	ctg_counters_read(w->ctg, &counters);
	return counters.batches_helped;
}

/* ---- order and bounds ------------------------------------------------------------------------ */

static void test_clear_invalidate_drop(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 8, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 8, NULL), 0);
	record(&w);
	seen.watch = lookup(mm, BASE + 2, 1).pfn;
	assert_int_equal(ctg_munmap(mm, BASE + 2, 3), 0);
	/* In the hook the entry is gone and the frame still mapped; afterwards it is free. */
	assert_int_equal(seen.nr_calls, 1);
	assert_int_equal(seen.call[0].how, CTG_TLB_INVALIDATE);
	assert_ptr_equal(seen.call[0].mm, mm);
	assert_int_equal(seen.call[0].nr, 1);
	assert_int_equal(seen.call[0].range[0].vpn, BASE + 2);
	assert_int_equal(seen.call[0].range[0].nr, 3);
	assert_int_equal(seen.watched_word, CTG_WORD_MAP1);
	assert_true(seen.watched_mapping.pfn == CTG_PFN_NONE);
	assert_false(seen.watched_mapping.reserved);
	assert_int_equal(word_of(&w, seen.watch), 0);
	assert_int_equal(world_free(&w), w.nr_free - 5);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_nothing_present_tells_nobody(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	record(&w);
	assert_int_equal(ctg_mmap(mm, BASE, 3 * PAGES, RW), 0);
	assert_int_equal(ctg_munmap(mm, BASE, 3 * PAGES), 0);
	assert_int_equal(ctg_munmap(mm, 0, CTG_MM_MAX_VPN), 0);
	assert_int_equal(seen.nr_calls, 0);
	ctg_mm_destroy(mm, false);
	assert_int_equal(seen.nr_calls, 0);
	world_close(&w);
}

/* The calls together name each PRESENT page of the range once, in order, in bounded batches. */
static void check_calls(ctg_vpn_t vpn, ctg_vpn_t end, uint64_t step)
{
	ctg_vpn_t next = vpn;

	for (size_t c = 0; c < seen.nr_calls; c++) {
		uint64_t pages = 0;

		for (size_t r = 0; r < seen.call[c].nr; r++) {
			const struct ctg_vrange *range = &seen.call[c].range[r];

			assert_int_equal(range->vpn, next);
			next = range->vpn + range->nr;
			if (step != 0) {
				assert_int_equal(range->nr, 1);
				next = range->vpn + step;
			}
			pages += range->nr;
		}
		assert_in_range(pages, 1, CTG_BATCH_PAGES);
	}
	assert_int_equal(next, end);
}

static void test_batches_are_bounded_in_pages(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	const uint64_t nr = 10 * PAGES;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, nr, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, nr, NULL), 0);
	record(&w);
	assert_int_equal(ctg_munmap(mm, BASE, nr), 0);
	assert_int_equal(seen.nr_calls, (nr + CTG_BATCH_PAGES - 1) / CTG_BATCH_PAGES);
	check_calls(BASE, BASE + nr, 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_batches_are_bounded_in_runs(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 400, RW), 0);
	for (uint64_t i = 0; i < 400; i += 2)
		assert_int_equal(ctg_mm_populate(mm, BASE + i, 1, NULL), 0);
	record(&w);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE, 400), 0);
	assert_int_equal(seen.nr_calls, (200 + CTG_BATCH_RUNS - 1) / CTG_BATCH_RUNS);
	check_calls(BASE, BASE + 400, 2);
	for (uint64_t i = 0; i < 400; i++)
		assert_true(lookup(mm, BASE + i, 1).reserved);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_the_dead_tell_nobody(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	for (unsigned dead = 0; dead < 2; dead++) {
		mm = space_new(&w, 0);
		assert_int_equal(ctg_mmap(mm, BASE + 5, 2 * PAGES, RW), 0);
		assert_int_equal(ctg_mm_populate(mm, BASE + 5, 2 * PAGES, NULL), 0);
		record(&w);
		ctg_mm_destroy(mm, dead != 0);
		assert_int_equal(seen.nr_calls != 0, dead == 0);
		world_check_clean(&w);
	}
	world_close(&w);
}

static void test_unmap_leaves_rights_in_reserve(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	unsigned level;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, PAGES, CTG_PROT_READ), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, PAGES, NULL), 0);
	ctg_lock(&w.port, &mm->lock);
	ctg_unmap_range(mm, BASE, PAGES, true);
	ctg_unlock(&w.port, &mm->lock);
	assert_int_equal(ctg_pte_read(mm, BASE, &level), CTG_PTE_RESERVED | CTG_PTE_READ);
	assert_int_equal(level, 1);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- helping --------------------------------------------------------------------------------- */

/* Clear the entry of vpn into the batch, and leave it there: as an munmap that was interrupted. */
static void clear_into_batch(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	struct ctg_batch *batch = &mm->batch;
	struct ctg_pte_ref ref;
	uint64_t nr;

	ctg_lock(&mm->ctg->port, &batch->lock);
	ctg_pte_lock(mm, vpn, &ref);
	assert_true((ref.entry & CTG_PTE_PRESENT) != 0);
	nr = ctg_level_pages(ref.level);
	batch->run[batch->nr_runs++] = (struct ctg_batch_run){
		.vpn = vpn, .pfn = ctg_pte_pfn(ref.entry), .nr = nr, .large = ref.level != 0};
	batch->nr_pages += nr;
	ctg_pte_set(&ref, 0);
	ctg_add64_relaxed(&mm->nr_present, -nr);
	ctg_pte_unlock(mm, &ref);
	ctg_unlock(&mm->ctg->port, &batch->lock);
}

static void test_anybody_flushes(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 5, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 5, NULL), 0);
	pfn = lookup(mm, BASE, 1).pfn;
	/* Out of order on purpose: the port gets them sorted and merged. */
	clear_into_batch(mm, BASE + 1);
	clear_into_batch(mm, BASE + 3);
	clear_into_batch(mm, BASE);
	assert_int_equal(word_of(&w, pfn), CTG_WORD_MAP1);
	record(&w);
	/* Not for frames elsewhere. */
	ctg_batches_flush(w.ctg, ctg_zone_of(w.ctg, pfn)->base + 3 * PAGES, PAGES);
	assert_int_equal(seen.nr_calls, 0);
	assert_int_equal(helped(&w), 0);
	ctg_batches_flush(w.ctg, pfn, 1);
	assert_int_equal(helped(&w), 1);
	assert_int_equal(word_of(&w, pfn), 0);
	assert_int_equal(world_free(&w), w.nr_free - 2);
	assert_int_equal(seen.nr_calls, 1);
	assert_int_equal(seen.call[0].nr, 2);
	assert_int_equal(seen.call[0].range[0].vpn, BASE);
	assert_int_equal(seen.call[0].range[0].nr, 2);
	assert_int_equal(seen.call[0].range[1].vpn, BASE + 3);
	assert_int_equal(seen.call[0].range[1].nr, 1);
	/* Empty now: nothing to help with. */
	ctg_batches_flush(w.ctg, 0, 0);
	ctg_batch_flush(&mm->batch, true);
	assert_int_equal(seen.nr_calls, 1);
	assert_int_equal(helped(&w), 1);
	/* Everything of everybody. */
	clear_into_batch(mm, BASE + 2);
	ctg_batches_flush(w.ctg, 0, 0);
	assert_int_equal(helped(&w), 2);
	assert_int_equal(world_free(&w), w.nr_free - 1);
	/* This one, for its owner or for somebody else. */
	clear_into_batch(mm, BASE + 4);
	ctg_batch_flush(&mm->batch, true);
	assert_int_equal(helped(&w), 3);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_pieces_count_on_the_head(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, PAGES, NULL), 0);
	pfn = lookup(mm, BASE, 1).pfn;
	assert_int_equal(ctg_pte_split_to(mm, BASE, 0), 0);
	clear_into_batch(mm, BASE + 100);
	assert_int_equal(word_of(&w, pfn), PAGES * CTG_WORD_MAP1);
	/* Whoever wants the head's count right asks for the head. */
	ctg_batches_flush(w.ctg, pfn, 1);
	assert_int_equal(word_of(&w, pfn), (PAGES - 1) * CTG_WORD_MAP1);
	clear_into_batch(mm, BASE + 200);
	ctg_batches_flush(w.ctg, pfn + 511, 1);
	assert_int_equal(word_of(&w, pfn), (PAGES - 2) * CTG_WORD_MAP1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_large_frames_count_once(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 2 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 2 * PAGES, NULL), 0);
	clear_into_batch(mm, BASE);
	clear_into_batch(mm, BASE + PAGES);
	record(&w);
	ctg_batches_flush(w.ctg, 0, 0);
	assert_int_equal(seen.nr_calls, 1);
	assert_int_equal(seen.call[0].nr, 1);
	assert_int_equal(seen.call[0].range[0].nr, 2 * PAGES);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_batches_come_and_go(void **state)
{
	struct world w;
	struct ctg_mm *mm[3];

	(void)state;
	world_open(&w, 4);
	for (unsigned i = 0; i < 3; i++)
		mm[i] = space_new(&w, 0);
	w.meta_bytes =
		ctg_sim_meta_bytes(w.sim) - 3 * (sizeof(struct ctg_mm) + sizeof(struct ctg_table));
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(ctg_mmap(mm[i], BASE, 1, RW), 0);
		assert_int_equal(ctg_mm_populate(mm[i], BASE, 1, NULL), 0);
		clear_into_batch(mm[i], BASE);
	}
	/* The middle one of the list leaves; its batch is flushed on the way. */
	ctg_mm_destroy(mm[1], false);
	assert_int_equal(world_free(&w), w.nr_free - 2);
	ctg_batches_flush(w.ctg, 0, 0);
	assert_int_equal(helped(&w), 2);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_mm_destroy(mm[2], false);
	ctg_mm_destroy(mm[0], false);
	world_close(&w);
}

static uint32_t woken;

static void count_wake(void *host, struct ctg_word32 *word, unsigned nr)
{
	(void)host;
	(void)word;
	(void)nr;
	woken++;
}

static void test_unmap_wakes_who_waits_for_the_frame(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 1, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 1, NULL), 0);
	pfn = lookup(mm, BASE, 1).pfn;
	ctg_or64_acq_rel(&ctg_frame_of(w.ctg, pfn)->word, CTG_WORD_WAITERS);
	woken = 0;
	w.ctg->port.wake = count_wake;
	assert_int_equal(ctg_munmap(mm, BASE, 1), 0);
	w.ctg->port.wake = w.port.wake;
	assert_int_equal(woken, 1);
	assert_int_equal(word_of(&w, pfn), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_clear_invalidate_drop),
		cmocka_unit_test(test_nothing_present_tells_nobody),
		cmocka_unit_test(test_batches_are_bounded_in_pages),
		cmocka_unit_test(test_batches_are_bounded_in_runs),
		cmocka_unit_test(test_the_dead_tell_nobody),
		cmocka_unit_test(test_unmap_leaves_rights_in_reserve),
		cmocka_unit_test(test_anybody_flushes),
		cmocka_unit_test(test_pieces_count_on_the_head),
		cmocka_unit_test(test_large_frames_count_once),
		cmocka_unit_test(test_batches_come_and_go),
		cmocka_unit_test(test_unmap_wakes_who_waits_for_the_frame),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
