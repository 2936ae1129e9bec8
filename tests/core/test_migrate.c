/* SPDX-License-Identifier: MIT */
#include "moving.h"

static uint64_t counter_migrated(struct world *w)
{
	struct ctg_counters counters;

	ctg_counters_read(w->ctg, &counters);
	return counters.frames_migrated;
}

static uint64_t counter_failed(struct world *w)
{
	struct ctg_counters counters;

	ctg_counters_read(w->ctg, &counters);
	return counters.migrate_fail;
}

/* ---- what the port is asked, and what is traced ------------------------------------------ */

static struct {
	unsigned nr;
	struct ctg_event event[2048];
} trace;

static void record_trace(void *host, const struct ctg_event *event)
{
	(void)host;
	assert_in_range(trace.nr, 0, 2047);
	trace.event[trace.nr++] = *event;
}

static struct {
	unsigned restricts, copies, installs;
	size_t ranges, runs;
	uint64_t pages;
	uint64_t copied, max_copied;
	struct ctg_port port;
} calls;

static int count_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how)
{
	for (size_t i = 1; i < nr; i++)
		assert_true(ranges[i - 1].vpn + ranges[i - 1].nr < ranges[i].vpn);
	if (how == CTG_TLB_WRPROTECT) {
		calls.restricts++;
		calls.ranges += nr;
		for (size_t i = 0; i < nr; i++)
			calls.pages += ranges[i].nr;
	}
	return calls.port.tlb_restrict(host, mm, ranges, nr, how);
}

static int count_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	calls.installs++;
	return calls.port.tlb_install(host, mm, ranges, nr);
}

static int count_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	uint64_t copied = 0;

	for (size_t i = 0; i < nr; i++)
		copied += runs[i].nr;
	calls.copies++;
	calls.runs += nr;
	calls.copied += copied;
	if (copied > calls.max_copied)
		calls.max_copied = copied;
	return calls.port.copy(host, runs, nr);
}

static void count_calls(struct world *w)
{
	memset(&calls, 0, sizeof(calls));
	memset(&trace, 0, sizeof(trace));
	calls.port = w->port;
	w->ctg->port.tlb_restrict = count_restrict;
	w->ctg->port.tlb_install = count_install;
	w->ctg->port.copy = count_copy;
	w->ctg->port.trace = record_trace;
}

/* ---- single moves ------------------------------------------------------------------------ */

static void test_small(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t old[5];

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE, 5);
	for (unsigned i = 0; i < 5; i++)
		old[i] = pfn_of(mm, BASE + i);
	assert_int_equal(evacuate_block(&w, old[0]), 5);
	assert_int_equal(counter_migrated(&w), 5);
	assert_int_equal(counter_failed(&w), 0);
	for (unsigned i = 0; i < 5; i++) {
		ctg_pfn_t pfn = pfn_of(mm, BASE + i);

		assert_false(in_block(pfn, old[0]));
		assert_int_equal(word_of(&w, pfn), CTG_WORD_MAP1);
		assert_int_equal(ctg_info_state(info_of(&w, pfn)), CTG_FRAME_ANON);
		assert_ptr_equal(ctg_frame_of(w.ctg, pfn)->anon, mm->anon);
		assert_int_equal(ctg_frame_of(w.ctg, pfn)->index, BASE + i);
		assert_true(frame_is_free(w.zone, old[i]));
	}
	check_stamp(&w, mm, BASE, 5);
	/* Writes go to where it is now. */
	put_byte(&w, mm, BASE + 3, 0x5a);
	assert_int_equal(*(unsigned char *)ctg_sim_frame(w.sim, pfn_of(mm, BASE + 3)), 0x5a);
	assert_int_equal(get_byte(&w, mm, BASE + 3), 0x5a);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_nothing_to_move(void **state)
{
	struct world w;
	struct ctg_migrate_stats stats;

	(void)state;
	world_open(&w, 4);
	/* Nothing is in use, so not even memory for a batch is needed. */
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(evacuate(&w, w.zone->base, 4 * PAGES, 1, NULL, &stats), 0);
	assert_int_equal(stats.frames_moved, 0);
	assert_int_equal(ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0), 0);
	world_close(&w);
}

static void test_large_whole(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t old, new;
	unsigned level;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	old = map_large(&w, mm, BASE);
	assert_int_equal(evacuate_block(&w, old), PAGES);
	new = pfn_of(mm, BASE);
	assert_int_not_equal(new, old);
	ctg_pte_read(mm, BASE, &level);
	assert_int_equal(level, 1);
	assert_int_equal(word_of(&w, new), CTG_WORD_MAP1);
	assert_int_equal(ctg_info_order(info_of(&w, new)), CTG_PAGEBLOCK_ORDER);
	check_stamp(&w, mm, BASE, PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* A range that begins or ends inside a large frame moves all of it. */
static void test_large_from_inside(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_migrate_stats stats;
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	for (unsigned i = 0; i < 3; i++) {
		old = i == 0 ? map_large(&w, mm, BASE) : pfn_of(mm, BASE);
		assert_int_equal(
			evacuate(&w, old + 200 * i, i == 1 ? 1 : 300 - 100 * i, 1, NULL, &stats),
			0);
		assert_int_equal(stats.frames_moved, PAGES);
		assert_int_not_equal(pfn_of(mm, BASE), old);
		check_stamp(&w, mm, BASE, PAGES);
	}
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_large_in_pieces(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct hoard *h;
	ctg_pfn_t old;
	unsigned level;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	old = map_large(&w, mm, BASE);
	ctg_pte_mark(mm, BASE, true);
	h = fragment(&w, 8192, old);
	assert_int_equal(evacuate_block(&w, old), PAGES);
	for (unsigned i = 0; i < PAGES; i++) {
		uint64_t entry = ctg_pte_read(mm, BASE + i, &level);

		assert_int_equal(level, 0);
		assert_int_equal(word_of(&w, ctg_pte_pfn(entry)), CTG_WORD_MAP1);
		assert_int_equal(ctg_frame_of(w.ctg, ctg_pte_pfn(entry))->index, BASE + i);
		assert_int_equal(entry & 0xfff,
			CTG_PTE_PRESENT | CTG_PTE_RIGHTS | CTG_PTE_YOUNG | CTG_PTE_DIRTY);
		assert_int_equal(ctg_pte_pfn(entry) % 2, 0);
	}
	check_stamp(&w, mm, BASE, PAGES);
	stamp(&w, mm, BASE, PAGES);
	hoard_free_all(&w, h);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* A space that maps nothing smaller than a large frame, and no large frame: it stays. */
static void test_large_only_whole(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct hoard *h;
	struct ctg_migrate_stats stats;
	struct before *before;
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, CTG_PAGEBLOCK_ORDER);
	old = map_large(&w, mm, BASE);
	h = fragment(&w, 8192, old);
	before = before_take(&w, mm, BASE, PAGES);
	assert_int_equal(evacuate(&w, old, PAGES, 3, NULL, &stats), -CTG_ENOMEM);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_NO_MEMORY);
	assert_int_equal(stats.obstacle_pfn, old);
	assert_int_equal(stats.frames_moved, 0);
	assert_int_equal(counter_failed(&w), PAGES);
	before_check(&w, mm, before, 0);
	hoard_free_all(&w, h);
	assert_int_equal(evacuate_block(&w, old), PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- large frames that are mapped page by page ------------------------------------------- */

static void test_split_whole(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t old, new;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	old = map_large(&w, mm, BASE);
	assert_int_equal(ctg_mprotect(mm, BASE + 7, 1, CTG_PROT_READ), 0);
	assert_int_equal(ctg_word_map(word_of(&w, old)), PAGES);
	assert_int_equal(evacuate_block(&w, old), PAGES);
	new = pfn_of(mm, BASE);
	assert_int_equal(ctg_info_order(info_of(&w, new)), CTG_PAGEBLOCK_ORDER);
	assert_int_equal(word_of(&w, new), PAGES * CTG_WORD_MAP1);
	for (unsigned i = 0; i < PAGES; i++) {
		struct ctg_mapping m = lookup(mm, BASE + i, 1);

		assert_int_equal(m.pfn, new + i);
		assert_int_equal(m.prot, i == 7 ? CTG_PROT_READ : RW);
	}
	check_stamp(&w, mm, BASE, PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* What is left of a large frame goes to small ones: the rest of it becomes free. */
static void test_split_partly(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	old = map_large(&w, mm, BASE);
	assert_int_equal(ctg_munmap(mm, BASE + 10, 490), 0);
	assert_int_equal(ctg_word_map(word_of(&w, old)), 22);
	assert_int_equal(world_free(&w), w.nr_free - PAGES);
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0);
	assert_int_equal(evacuate_block(&w, old), 22);
	/* The pages have their table: only the batch takes memory. */
	assert_int_equal(ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0), 1);
	assert_int_equal(world_free(&w), w.nr_free - 22);
	assert_int_equal(word_of(&w, pfn_of(mm, BASE)), CTG_WORD_MAP1);
	check_stamp(&w, mm, BASE, 10);
	check_stamp(&w, mm, BASE + 500, 12);
	assert_int_equal(pfn_of(mm, BASE + 10), CTG_PFN_NONE);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* The pages that were unmapped have other frames by now: those stay out of it. */
static void test_split_mixed(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct hoard *h;
	ctg_pfn_t old, other;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	old = map_large(&w, mm, BASE);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE + 100, 3), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + 100, 3, NULL), 0);
	stamp(&w, mm, BASE + 100, 3);
	other = pfn_of(mm, BASE + 101);
	assert_false(in_block(other, old));
	h = fragment(&w, 8192, old);
	assert_int_equal(evacuate_block(&w, old), PAGES - 3);
	assert_int_equal(pfn_of(mm, BASE + 101), other);
	check_stamp(&w, mm, BASE, PAGES);
	hoard_free_all(&w, h);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Those move too: pages of several frames alternate, and the port is told each just once. */
static void test_split_mixed_both(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_migrate_stats stats;
	ctg_pfn_t low = CTG_PFN_NONE, high = 0;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	map_large(&w, mm, BASE);
	assert_int_equal(ctg_munmap(mm, BASE + 3, 2), 0);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE + 100, 5), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + 100, 5, NULL), 0);
	stamp(&w, mm, BASE + 100, 5);
	assert_int_equal(ctg_munmap(mm, BASE + 102, 1), 0);
	for (unsigned i = 0; i < PAGES; i++) {
		ctg_pfn_t pfn = pfn_of(mm, BASE + i);

		low = pfn < low ? pfn : low;
		high = pfn != CTG_PFN_NONE && pfn > high ? pfn : high;
	}
	assert_true(high - low < 3 * PAGES);
	count_calls(&w);
	assert_int_equal(evacuate(&w, low, high - low + 1, 1, NULL, &stats), 0);
	assert_int_equal(stats.frames_moved, PAGES - 3);
	assert_int_equal(calls.restricts, 1);
	assert_int_equal(calls.ranges, 3); /* all but the two holes */
	assert_int_equal(calls.pages, PAGES - 3);
	check_stamp(&w, mm, BASE, 3);
	check_stamp(&w, mm, BASE + 5, 97);
	check_stamp(&w, mm, BASE + 103, PAGES - 103);
	stamp(&w, mm, BASE + 5, 97);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Partly mapped, and the only room is in memory that maps nothing smaller than a large frame. */
static void test_split_partly_to_large_memory(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct hoard *h;
	struct ctg_zone *large;
	struct ctg_zone_config config = {
		.base = 64 * PAGES, .nr = 2 * PAGES, .map_order = CTG_PAGEBLOCK_ORDER};
	ctg_pfn_t old, new;

	(void)state;
	world_open(&w, 4);
	assert_int_equal(ctg_sim_add_zone(w.sim, &config, true, &large), 0);
	mm = space_new(&w, 0);
	old = map_large(&w, mm, BASE);
	assert_int_equal(ctg_munmap(mm, BASE + 10, 490), 0);
	h = hoard_orders(&w, 0, CTG_GFP_MOVABLE);
	assert_int_equal(ctg_zone_release(large, config.base, config.nr, false), 0);
	assert_int_equal(evacuate_block(&w, old), 22);
	new = pfn_of(mm, BASE);
	assert_ptr_equal(ctg_zone_of(w.ctg, new), large);
	assert_int_equal(word_of(&w, new), 22 * CTG_WORD_MAP1);
	assert_int_equal(pfn_of(mm, BASE + 511), new + 511);
	check_stamp(&w, mm, BASE, 10);
	check_stamp(&w, mm, BASE + 500, 12);
	hoard_free_all(&w, h);
	ctg_mm_destroy(mm, false);
	assert_int_equal(world_free(&w), w.nr_free + config.nr);
	ctg_sim_destroy(w.sim);
}

/* ---- neighbours, order, many ------------------------------------------------------------- */

/* Pages of several spaces, mixed in one pageblock: each moves with its own family. */
static void test_neighbours(void **state)
{
	struct world w;
	struct ctg_mm *mm[3];
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	for (unsigned s = 0; s < 3; s++) {
		mm[s] = space_new(&w, 0);
		assert_int_equal(ctg_mmap(mm[s], BASE, 40, RW), 0);
	}
	for (unsigned i = 0; i < 40; i++)
		for (unsigned s = 0; s < 3; s++)
			stamp(&w, mm[s], BASE + (i * 7) % 40, 1);
	old = pfn_of(mm[0], BASE);
	assert_int_equal(evacuate_block(&w, old), 120);
	for (unsigned s = 0; s < 3; s++) {
		check_stamp(&w, mm[s], BASE, 40);
		for (unsigned i = 0; i < 40; i++) {
			ctg_pfn_t pfn = pfn_of(mm[s], BASE + i);

			assert_false(in_block(pfn, old));
			assert_ptr_equal(ctg_frame_of(w.ctg, pfn)->anon, mm[s]->anon);
		}
	}
	for (unsigned s = 0; s < 3; s++)
		ctg_mm_destroy(mm[s], false);
	w.meta_bytes = ctg_sim_meta_bytes(w.sim); /* families stay */
	world_close(&w);
}

/* One invalidation, one copy and one install for a batch, each in the longest runs. */
static void test_runs(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE, 256);
	old = pfn_of(mm, BASE);
	assert_int_equal(lookup(mm, BASE, 256).nr, 256);
	count_calls(&w);
	assert_int_equal(evacuate_block(&w, old), 256);
	assert_int_equal(calls.restricts, 1);
	assert_int_equal(calls.installs, 1);
	assert_int_equal(calls.copies, 1);
	assert_int_equal(calls.ranges, 1);
	assert_int_equal(calls.runs, 1);
	assert_int_equal(lookup(mm, BASE, 256).nr, 256);
	assert_int_equal(trace.nr, 1);
	assert_int_equal(trace.event[0].kind, CTG_EVENT_MIGRATE);
	assert_int_equal(trace.event[0].pfn, old);
	assert_int_equal(trace.event[0].nr, 256);
	assert_int_equal(trace.event[0].value, pfn_of(mm, BASE));
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* More than a batch, and frames that lie the other way round than their pages. */
static void test_batches(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_migrate_stats stats;
	uint64_t nr = 3 * PAGES - 60, traced = 0;
	ctg_pfn_t low = CTG_PFN_NONE;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, nr, RW), 0);
	/* One page keeps each slot from getting a large frame. */
	for (ctg_vpn_t vpn = BASE; vpn < BASE + nr; vpn += PAGES)
		assert_int_equal(ctg_mm_populate(mm, vpn, 1, NULL), 0);
	for (uint64_t i = nr; i-- > 0;)
		stamp(&w, mm, BASE + i, 1);
	for (uint64_t i = 0; i < nr; i++)
		low = pfn_of(mm, BASE + i) < low ? pfn_of(mm, BASE + i) : low;
	low &= ~(PAGES - 1);
	count_calls(&w);
	assert_int_equal(evacuate(&w, low, 3 * PAGES, 1, NULL, &stats), 0);
	assert_int_equal(stats.frames_moved, nr);
	assert_int_equal(calls.copied, nr);
	assert_int_equal(calls.pages, nr);
	assert_true(calls.copies >= 2);
	assert_true(calls.max_copied <= CTG_MIGRATE_BATCH_PAGES);
	assert_int_equal(calls.restricts, calls.copies);
	for (unsigned i = 0; i < trace.nr; i++)
		traced += trace.event[i].nr;
	assert_int_equal(traced, nr);
	assert_int_equal(counter_migrated(&w), nr);
	check_stamp(&w, mm, BASE, nr);
	/* Sorted by page, the destinations were given out in order: long runs. */
	assert_true(lookup(mm, BASE + PAGES, 256).nr > 16);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* A batch that has room for some small frames, but not for the large one that is next. */
static void test_batch_does_not_fit(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_migrate_stats stats;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE, 700);
	map_large(&w, mm, BASE + 2 * PAGES);
	map_small(&w, mm, BASE + 3 * PAGES, 700);
	count_calls(&w);
	for (ctg_pfn_t pfn = w.zone->base; pfn < w.zone->base + w.zone->nr; pfn += 4 * PAGES) {
		int ret = evacuate(&w, pfn, 4 * PAGES, 1, NULL, &stats);

		assert_true(ret == 0 || ret == -CTG_ENOMEM);
		assert_true(calls.max_copied <= CTG_MIGRATE_BATCH_PAGES);
		check_stamp(&w, mm, BASE, 700);
		check_stamp(&w, mm, BASE + 2 * PAGES, PAGES + 700);
	}
	assert_true(calls.copied >= 1400 + PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Small frames do not go to memory that maps nothing smaller than a large one. */
static void test_small_not_to_large_memory(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	struct ctg_zone *large;
	struct hoard *h;
	struct ctg_migrate_stats stats;
	struct ctg_zone_config config = {
		.base = 64 * PAGES, .nr = 4 * PAGES, .map_order = CTG_PAGEBLOCK_ORDER};

	(void)state;
	world_open(&w, 4);
	assert_int_equal(ctg_sim_add_zone(w.sim, &config, true, &large), 0);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE, 2 * PAGES);
	h = hoard_orders(&w, 0, CTG_GFP_MOVABLE);
	assert_int_equal(ctg_zone_release(large, config.base, config.nr, false), 0);
	/* A whole pageblock of them, which is just what is free there. */
	assert_int_equal(
		evacuate(&w, pfn_of(mm, BASE) & ~(PAGES - 1), PAGES, 1, NULL, &stats), -CTG_ENOMEM);
	assert_int_equal(counter_failed(&w), PAGES);
	check_stamp(&w, mm, BASE, 2 * PAGES);
	hoard_free_all(&w, h);
	ctg_mm_destroy(mm, false);
	assert_int_equal(world_free(&w), w.nr_free + config.nr);
	ctg_sim_destroy(w.sim);
}

/* ---- a family ---------------------------------------------------------------------------- */

/* Map the frame that `from` has at vpn in `to` as well, as fork would; both read-only. */
static void share(struct world *w, struct ctg_mm *from, struct ctg_mm *to, ctg_vpn_t vpn)
{
	struct ctg_pte_ref ref;
	uint64_t entry;
	unsigned level;

	ctg_pte_read(from, vpn, &level);
	ctg_pte_lock(from, vpn, &ref);
	entry = ref.entry & ~CTG_PTE_WRITE;
	ctg_pte_set(&ref, entry);
	ctg_pte_unlock(from, &ref);
	assert_int_equal(ctg_mmap(to, vpn, ctg_level_pages(level), CTG_PROT_READ), 0);
	assert_int_equal(ctg_pte_split_to(to, vpn, level), 0);
	hold(w, ctg_frame_head(w->ctg, ctg_pte_pfn(entry)), CTG_WORD_MAP1);
	ctg_pte_lock(to, vpn, &ref);
	assert_int_equal(ref.level, level);
	ctg_pte_set(&ref, entry);
	ctg_pte_unlock(to, &ref);
	ctg_add64_relaxed(&to->nr_present, ctg_level_pages(level));
}

static void relatives(struct world *w, struct ctg_mm *mm[2])
{
	mm[0] = space_new(w, 0);
	mm[1] = space_new(w, 0);
	ctg_anon_leave(mm[1]);
	assert_int_equal(ctg_anon_join(mm[1], mm[0]), 0);
	w->meta_bytes = ctg_sim_meta_bytes(w->sim); /* with one family that nobody uses */
}

static void relatives_close(struct world *w, struct ctg_mm *mm[2])
{
	uint64_t bytes;

	ctg_mm_destroy(mm[0], false);
	ctg_mm_destroy(mm[1], false);
	bytes = ctg_sim_meta_bytes(w->sim);
	assert_true(bytes < w->meta_bytes);
	w->meta_bytes = bytes;
	world_close(w);
}

static void test_family_small(void **state)
{
	struct world w;
	struct ctg_mm *mm[2];
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	relatives(&w, mm);
	map_small(&w, mm[0], BASE, 20);
	for (unsigned i = 0; i < 20; i += 2)
		share(&w, mm[0], mm[1], BASE + i);
	old = pfn_of(mm[0], BASE);
	count_calls(&w);
	assert_int_equal(evacuate_block(&w, old), 20);
	/* Each port is told what its own space maps: all of one, ten single pages of the other. */
	assert_int_equal(calls.restricts, 2);
	assert_int_equal(calls.ranges, 1 + 10);
	assert_int_equal(calls.installs, 2);
	for (unsigned i = 0; i < 20; i++) {
		ctg_pfn_t pfn = pfn_of(mm[0], BASE + i);

		assert_false(in_block(pfn, old));
		assert_int_equal(word_of(&w, pfn), (i % 2 == 0 ? 2 : 1) * CTG_WORD_MAP1);
		if (i % 2 == 0)
			assert_int_equal(pfn_of(mm[1], BASE + i), pfn);
	}
	check_stamp(&w, mm[0], BASE, 20);
	relatives_close(&w, mm);
}

/* Mapped as one in one space and page by page in the other. */
static void test_family_large(void **state)
{
	struct world w;
	struct ctg_mm *mm[2];
	ctg_pfn_t old, new;
	unsigned level;

	(void)state;
	world_open(&w, 4);
	relatives(&w, mm);
	old = map_large(&w, mm[0], BASE);
	share(&w, mm[0], mm[1], BASE);
	assert_int_equal(ctg_munmap(mm[1], BASE + 50, 100), 0);
	assert_int_equal(ctg_word_map(word_of(&w, old)), 1 + PAGES - 100);
	count_calls(&w);
	assert_int_equal(evacuate_block(&w, old), PAGES);
	new = pfn_of(mm[0], BASE);
	assert_int_equal(word_of(&w, new), (1 + PAGES - 100) * CTG_WORD_MAP1);
	ctg_pte_read(mm[0], BASE, &level);
	assert_int_equal(level, 1);
	assert_int_equal(pfn_of(mm[1], BASE + 49), new + 49);
	assert_int_equal(pfn_of(mm[1], BASE + 50), CTG_PFN_NONE);
	assert_int_equal(pfn_of(mm[1], BASE + 150), new + 150);
	check_stamp(&w, mm[0], BASE, PAGES);
	relatives_close(&w, mm);
}

static void test_family_pieces(void **state)
{
	struct world w;
	struct ctg_mm *mm[2];
	struct hoard *h;
	ctg_pfn_t old;

	(void)state;
	world_open(&w, 4);
	relatives(&w, mm);
	old = map_large(&w, mm[0], BASE);
	share(&w, mm[0], mm[1], BASE);
	h = fragment(&w, 8192, old);
	assert_int_equal(evacuate_block(&w, old), PAGES);
	for (unsigned i = 0; i < PAGES; i++) {
		ctg_pfn_t pfn = pfn_of(mm[0], BASE + i);

		assert_int_equal(word_of(&w, pfn), 2 * CTG_WORD_MAP1);
		assert_int_equal(pfn_of(mm[1], BASE + i), pfn);
	}
	check_stamp(&w, mm[0], BASE, PAGES);
	hoard_free_all(&w, h);
	relatives_close(&w, mm);
}

/* The port of one of them refuses: both are as before. */
static void test_family_failures(void **state)
{
	struct world w;
	struct ctg_mm *mm[2];
	struct ctg_migrate_stats stats;
	ctg_pfn_t old;
	static const enum ctg_sim_hook hooks[] = {CTG_SIM_RESTRICT, CTG_SIM_INSTALL};

	(void)state;
	world_open(&w, 4);
	relatives(&w, mm);
	map_small(&w, mm[0], BASE, 20);
	for (unsigned i = 0; i < 20; i += 2)
		share(&w, mm[0], mm[1], BASE + i);
	old = pfn_of(mm[0], BASE);
	for (unsigned i = 0; i < 2; i++) {
		struct before *before[2];

		for (unsigned s = 0; s < 2; s++)
			before[s] = before_take(&w, mm[s], BASE, 20);
		ctg_sim_fail(w.sim, hooks[i], 1);
		assert_int_not_equal(evacuate(&w, old, PAGES, 1, NULL, &stats), 0);
		assert_int_equal(stats.obstacle, CTG_OBSTACLE_PORT);
		for (unsigned i2 = 0; i2 < 20; i2++) {
			unsigned level;
			uint64_t entry = ctg_pte_read(mm[0], BASE + i2, &level);

			assert_int_equal(entry & CTG_PTE_MOVING, 0);
			/* The space that is asked first decides for what both map. */
			if (i2 % 2 == 0 || hooks[i] == CTG_SIM_RESTRICT)
				assert_int_equal(entry, before[0]->entry[i2]);
			if (i2 % 2 == 0)
				assert_int_equal(pfn_of(mm[1], BASE + i2), ctg_pte_pfn(entry));
		}
		for (unsigned s = 0; s < 2; s++)
			before_free(before[s]);
		check_stamp(&w, mm[0], BASE, 20);
		for (unsigned i2 = 0; i2 < 20; i2++)
			assert_int_equal(word_of(&w, pfn_of(mm[0], BASE + i2)),
				(i2 % 2 == 0 ? 2 : 1) * CTG_WORD_MAP1);
	}
	/* The second one refuses to install what the first has: then it stays moved. */
	ctg_sim_fail(w.sim, CTG_SIM_INSTALL, 2);
	assert_int_equal(evacuate(&w, old, PAGES, 1, NULL, &stats), 0);
	check_stamp(&w, mm[0], BASE, 20);
	relatives_close(&w, mm);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_small),
		cmocka_unit_test(test_nothing_to_move),
		cmocka_unit_test(test_large_whole),
		cmocka_unit_test(test_large_from_inside),
		cmocka_unit_test(test_large_in_pieces),
		cmocka_unit_test(test_large_only_whole),
		cmocka_unit_test(test_split_whole),
		cmocka_unit_test(test_split_partly),
		cmocka_unit_test(test_split_mixed),
		cmocka_unit_test(test_split_mixed_both),
		cmocka_unit_test(test_split_partly_to_large_memory),
		cmocka_unit_test(test_neighbours),
		cmocka_unit_test(test_runs),
		cmocka_unit_test(test_batches),
		cmocka_unit_test(test_batch_does_not_fit),
		cmocka_unit_test(test_small_not_to_large_memory),
		cmocka_unit_test(test_family_small),
		cmocka_unit_test(test_family_large),
		cmocka_unit_test(test_family_pieces),
		cmocka_unit_test(test_family_failures),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
