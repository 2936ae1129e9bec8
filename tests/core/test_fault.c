/* SPDX-License-Identifier: MIT */
/* Frames for what is mapped: populate, faults, and installations that fail. */
#include "space.h"

#include <pthread.h>
#include <time.h>

/* ---- populate -------------------------------------------------------------------------------- */

static void test_populate_prefers_large_frames(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	uint64_t present;
	unsigned level;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE + 500, 3 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + 500, 3 * PAGES, &present), 0);
	assert_int_equal(present, 3 * PAGES);
	ctg_pte_read(mm, BASE + 511, &level);
	assert_int_equal(level, 0);
	ctg_pte_read(mm, BASE + PAGES, &level);
	assert_int_equal(level, 1);
	ctg_pte_read(mm, BASE + 2 * PAGES, &level);
	assert_int_equal(level, 1);
	ctg_pte_read(mm, BASE + 3 * PAGES, &level);
	assert_int_equal(level, 0);
	/* Part of a slot is backed with small frames, and no more than what was asked for. */
	assert_int_equal(ctg_mmap(mm, BASE + 8 * PAGES, PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + 8 * PAGES + 30, 40, &present), 0);
	assert_int_equal(present, 40);
	assert_int_equal(stat_of(mm).nr_present, 3 * PAGES + 40);
	assert_int_equal(w.nr_free - world_free(&w), 3 * PAGES + 40);
	/* Once more changes nothing. */
	assert_int_equal(ctg_mm_populate(mm, BASE + 500, 3 * PAGES, &present), 0);
	assert_int_equal(present, 3 * PAGES);
	assert_int_equal(stat_of(mm).nr_present, 3 * PAGES + 40);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_populate_zeroes(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	for (unsigned round = 0; round < 2; round++) {
		mapped(mm, BASE, 3 * PAGES + 7, RW);
		for (uint64_t i = 0; i < 3 * PAGES + 7; i++) {
			assert_int_equal(get_byte(&w, mm, BASE + i), 0);
			put_byte(&w, mm, BASE + i, 0x55);
		}
		assert_int_equal(ctg_munmap(mm, BASE, 3 * PAGES + 7), 0);
	}
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Take one frame out of every pageblock, so that no large frame is left. */
static void fragment(struct world *w, ctg_pfn_t *taken, unsigned blocks)
{
	ctg_pfn_t pfn[16];

	assert_true(blocks <= 16);
	for (unsigned i = 0; i < blocks; i++)
		assert_int_equal(
			ctg_alloc_frames(w->ctg, CTG_PAGEBLOCK_ORDER, CTG_GFP_MOVABLE, &pfn[i]), 0);
	for (unsigned i = 0; i < blocks; i++) {
		ctg_split_used(w->ctg, pfn[i], CTG_PAGEBLOCK_ORDER);
		for (uint64_t f = 0; f < PAGES; f++)
			if (f != 256)
				assert_int_equal(ctg_free_frames(w->ctg, pfn[i] + f), 0);
		taken[i] = pfn[i] + 256;
	}
	ctg_drain_caches(w->ctg);
}

static void test_populate_falls_back_to_runs(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	ctg_pfn_t taken[4];
	uint64_t present, tables, runs = 0;

	(void)state;
	world_open(&w, 4);
	fragment(&w, taken, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 2 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 2 * PAGES, &present), 0);
	assert_int_equal(present, 2 * PAGES);
	for (uint64_t i = 0; i < 2 * PAGES; runs++) {
		struct ctg_mapping m = lookup(mm, BASE + i, 2 * PAGES);

		assert_true(m.pfn != CTG_PFN_NONE);
		for (uint64_t f = 0; f < m.nr; f++) {
			assert_int_equal(word_of(&w, m.pfn + f), CTG_WORD_MAP1);
			assert_int_equal(ctg_frame_of(w.ctg, m.pfn + f)->index, BASE + i + f);
		}
		i += m.nr;
	}
	/* Four free blocks of order 8 are whole: they are taken as such. */
	assert_in_range(runs, 1, 4);
	/* All the rest of memory, down to single frames; then none is left. */
	assert_int_equal(ctg_mmap(mm, BASE + 2 * PAGES, 2 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + 2 * PAGES, 2 * PAGES, &present), -CTG_ENOMEM);
	assert_int_equal(present, 2 * PAGES - 4);
	assert_int_equal(world_free(&w), 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 4 * PAGES - 1, true), -CTG_ENOMEM);
	assert_true(lookup(mm, BASE + 4 * PAGES - 1, 1).reserved);
	/* Tables for frames that did not come are taken back, and the slot stays one entry. */
	assert_int_equal(ctg_mmap(mm, BASE + 8 * PAGES, 2 * PAGES, RW), 0);
	tables = stat_of(mm).nr_tables;
	assert_int_equal(ctg_mm_populate(mm, BASE + 8 * PAGES, PAGES + 7, &present), -CTG_ENOMEM);
	assert_int_equal(present, 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 9 * PAGES, false), -CTG_ENOMEM);
	assert_int_equal(stat_of(mm).nr_tables, tables);
	ctg_mm_destroy(mm, false);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(ctg_free_frames(w.ctg, taken[i]), 0);
	world_close(&w);
}

static void test_map_order_takes_large_frames_only(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	ctg_pfn_t taken[4];
	uint64_t present;

	(void)state;
	world_open(&w, 4);
	fragment(&w, taken, 4);
	mm = space_new(&w, CTG_PAGEBLOCK_ORDER);
	assert_int_equal(ctg_mmap(mm, BASE, 4 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 4 * PAGES, &present), -CTG_ENOMEM);
	assert_int_equal(present, 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 7, true), -CTG_ENOMEM);
	assert_int_equal(ctg_free_frames(w.ctg, taken[2]), 0);
	ctg_drain_caches(w.ctg);
	assert_int_equal(ctg_handle_fault(mm, BASE + PAGES + 7, true), 0);
	assert_int_equal(lookup(mm, BASE + PAGES, PAGES).nr, PAGES);
	assert_int_equal(stat_of(mm).nr_present, PAGES);
	assert_int_equal(ctg_mm_populate(mm, BASE, 4 * PAGES, &present), -CTG_ENOMEM);
	assert_int_equal(present, PAGES);
	assert_int_equal(ctg_mprotect(mm, BASE + PAGES, PAGES, CTG_PROT_READ), 0);
	assert_int_equal(ctg_munmap(mm, BASE + PAGES, PAGES), 0);
	ctg_mm_destroy(mm, false);
	for (unsigned i = 0; i < 4; i++)
		if (i != 2)
			assert_int_equal(ctg_free_frames(w.ctg, taken[i]), 0);
	world_close(&w);
}

static void test_populate_reports_holes(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	uint64_t present;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 10, RW), 0);
	assert_int_equal(ctg_mmap(mm, BASE + 20, 10, CTG_PROT_NONE), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 30, &present), -CTG_EFAULT);
	assert_int_equal(present, 20);
	assert_int_equal(ctg_mm_populate(mm, BASE + 10, 10, &present), -CTG_EFAULT);
	assert_int_equal(present, 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 10, NULL), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_frames_come_from_where_the_space_says(void **state)
{
	struct ctg_zone_config config = {.base = 64 * PAGES, .nr = 4 * PAGES};
	struct ctg_mm_config of = {.gfp = CTG_GFP_NO_CMA};
	struct ctg_zone *lent, *spill;
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 4);
	assert_int_equal(ctg_sim_add_zone(w.sim, &config, true, &lent), 0);
	assert_int_equal(ctg_zone_lend(lent, config.base, config.nr, CTG_MIGRATE_CMA, false), 0);
	config = (struct ctg_zone_config){
		.base = 128 * PAGES, .nr = 4 * PAGES, .flags = CTG_ZONE_SPILL};
	assert_int_equal(ctg_sim_add_zone(w.sim, &config, true, &spill), 0);
	assert_int_equal(ctg_zone_release(spill, config.base, config.nr, true), 0);
	w.nr_free = world_free(&w);
	w.meta_bytes = ctg_sim_meta_bytes(w.sim);

	assert_int_equal(ctg_mm_create(w.ctg, &of, &mm), 0);
	mapped(mm, BASE, PAGES + 1, RW);
	assert_int_equal(stat_of(mm).nr_lent, 0);
	ctg_mm_destroy(mm, false);
	of.gfp = CTG_GFP_NO_ORDINARY;
	assert_int_equal(ctg_mm_create(w.ctg, &of, &mm), 0);
	mapped(mm, BASE, PAGES + 1, RW);
	assert_int_equal(stat_of(mm).nr_lent, PAGES + 1);
	assert_int_equal(stat_of(mm).nr_spilled, 0);
	ctg_mm_destroy(mm, false);
	/* Spill zones last, and only if allowed. */
	of.gfp = 0;
	assert_int_equal(ctg_mm_create(w.ctg, &of, &mm), 0);
	assert_int_equal(ctg_mmap(mm, BASE, 9 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 9 * PAGES, NULL), -CTG_ENOMEM);
	assert_int_equal(stat_of(mm).nr_present, 8 * PAGES);
	assert_int_equal(stat_of(mm).nr_spilled, 0);
	ctg_mm_destroy(mm, false);
	of.gfp = CTG_GFP_SPILL;
	assert_int_equal(ctg_mm_create(w.ctg, &of, &mm), 0);
	mapped(mm, BASE, 9 * PAGES, RW);
	assert_int_equal(stat_of(mm).nr_lent, 4 * PAGES);
	assert_int_equal(stat_of(mm).nr_spilled, PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- faults ---------------------------------------------------------------------------------- */

static void test_faults(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	unsigned char byte = 1;
	uint64_t faults;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	/* A whole slot gets a large frame, part of one a page. */
	assert_int_equal(ctg_mmap(mm, BASE, PAGES + 20, RW), 0);
	assert_int_equal(get_byte(&w, mm, BASE + 77), 0);
	assert_int_equal(stat_of(mm).nr_present, PAGES);
	put_byte(&w, mm, BASE + PAGES + 3, 9);
	assert_int_equal(stat_of(mm).nr_present, PAGES + 1);
	assert_int_equal(get_byte(&w, mm, BASE + PAGES + 3), 9);
	assert_int_equal(get_byte(&w, mm, BASE + PAGES + 4), 0);
	/* Rights. */
	assert_int_equal(ctg_mmap(mm, BASE + 4 * PAGES, 1, CTG_PROT_READ), 0);
	assert_int_equal(ctg_mmap(mm, BASE + 5 * PAGES, 1, CTG_PROT_NONE), 0);
	assert_int_equal(ctg_mmap(mm, BASE + 6 * PAGES, 1, CTG_PROT_WRITE), 0);
	faults = counters_of(&w).faults;
	assert_int_equal(ctg_handle_fault(mm, BASE + 4 * PAGES, true), -CTG_EFAULT);
	assert_int_equal(ctg_handle_fault(mm, BASE + 4 * PAGES, false), 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 4 * PAGES, true), -CTG_EFAULT);
	assert_int_equal(ctg_handle_fault(mm, BASE + 5 * PAGES, false), -CTG_EFAULT);
	assert_int_equal(ctg_handle_fault(mm, BASE + 6 * PAGES, false), 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 7 * PAGES, false), -CTG_EFAULT);
	assert_int_equal(counters_of(&w).faults, faults + 6);
	assert_int_equal(counters_of(&w).faults_waited, 0);
	assert_int_equal(lookup(mm, BASE + 4 * PAGES, 1).prot, CTG_PROT_READ);
	assert_int_equal(lookup(mm, BASE + 6 * PAGES, 1).prot, RW);
	assert_true(lookup(mm, BASE + 5 * PAGES, 1).reserved);
	/* Backed, but still not to be touched. */
	assert_int_equal(ctg_mm_populate(mm, BASE + 5 * PAGES, 1, NULL), 0);
	assert_int_equal(lookup(mm, BASE + 5 * PAGES, 1).prot, CTG_PROT_NONE);
	assert_int_equal(ctg_sim_read(w.sim, mm, (BASE + 5 * PAGES) << CTG_PAGE_SHIFT, &byte, 1),
		-CTG_EFAULT);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static struct {
	struct ctg_mm *mm;
	ctg_vpn_t vpn;
	int waits, ret;
} moving;

/* The migration ends while a writer waits for it; the first wake is for nothing. */
static int wait_moves(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	(void)host;
	assert_ptr_equal(word, &moving.mm->moved);
	assert_int_equal(expected, ctg_load32_acquire(word));
	assert_true(deadline == CTG_NO_DEADLINE && killable);
	/* The mm's lock is not held meanwhile. */
	assert_int_equal(ctg_mmap(moving.mm, BASE + 99 * PAGES + (uint64_t)moving.waits, 1, RW), 0);
	if (moving.ret == 0 && moving.waits++ == 1) {
		change_entry(moving.mm, moving.vpn, 0, CTG_PTE_MOVING);
		ctg_add32_acq_rel(&moving.mm->moved, 1);
	}
	return moving.ret;
}

/* While the fault waits for mm->lock, somebody widens the page's rights and it begins to move. */
static void relax_and_widen(void *host)
{
	(void)host;
	change_entry(moving.mm, moving.vpn, CTG_PTE_RIGHTS | CTG_PTE_MOVING, 0);
	ctg_unlock(&moving.mm->ctg->port, &moving.mm->lock);
	moving.mm->ctg->port.wait = wait_moves;
}

static void test_writers_see_a_migration_that_begins(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	mapped(mm, BASE, 1, CTG_PROT_NONE);
	memset(&moving, 0, sizeof(moving));
	moving.mm = mm;
	moving.vpn = BASE;
	ctg_lock(&w.port, &mm->lock);
	w.ctg->port.relax = relax_and_widen;
	assert_int_equal(ctg_handle_fault(mm, BASE, true), 0);
	w.ctg->port = w.port;
	assert_int_equal(moving.waits, 2);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_writers_wait_for_a_migration(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	mapped(mm, BASE, 3, RW);
	put_byte(&w, mm, BASE + 1, 5);
	change_entry(mm, BASE + 1, CTG_PTE_MOVING, 0);
	assert_int_equal(lookup(mm, BASE, 3).nr, 1);
	assert_int_equal(lookup(mm, BASE + 1, 2).nr, 1);
	assert_true(lookup(mm, BASE + 1, 1).moving);
	assert_int_equal(lookup(mm, BASE + 1, 1).prot, CTG_PROT_READ);
	/* Readers go on. */
	moving.mm = mm;
	moving.vpn = BASE + 1;
	moving.waits = 0;
	moving.ret = 0;
	w.ctg->port.wait = wait_moves;
	assert_int_equal(get_byte(&w, mm, BASE + 1), 5);
	assert_int_equal(ctg_handle_fault(mm, BASE + 1, false), 0);
	assert_int_equal(moving.waits, 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 1, true), 0);
	assert_int_equal(moving.waits, 2);
	assert_int_equal(counters_of(&w).faults_waited, 1);
	/* A writer that is to give up. */
	change_entry(mm, BASE + 1, CTG_PTE_MOVING, 0);
	moving.ret = -CTG_EINTR;
	moving.waits = 5;
	assert_int_equal(ctg_handle_fault(mm, BASE + 1, true), -CTG_EINTR);
	/* Unmapped meanwhile: as any other page. */
	assert_int_equal(ctg_munmap(mm, BASE + 1, 1), 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 1, true), -CTG_EFAULT);
	w.ctg->port.wait = w.port.wait;
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/*
 * A stranger glances at a new frame and waits for the allocation's reference to leave: between the
 * allocation, where the table is locked, and the mapping, which then has to wait for the lock.
 */
static struct {
	struct world *w;
	struct ctg_mm *mm;
	struct ctg_pte_ref ref;
	ctg_pfn_t pfn;
	uint32_t wakes;
} stranger;

static int zero_and_lock(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	stranger.pfn = pfn;
	ctg_pte_lock(stranger.mm, BASE, &stranger.ref);
	return stranger.w->port.zero(host, pfn, nr);
}

static void relax_and_unlock(void *host)
{
	(void)host;
	ctg_or64_acq_rel(&ctg_frame_of(stranger.w->ctg, stranger.pfn)->word, CTG_WORD_WAITERS);
	ctg_pte_unlock(stranger.mm, &stranger.ref);
}

static void count_wake(void *host, struct ctg_word32 *word, unsigned nr)
{
	(void)host;
	(void)word;
	(void)nr;
	stranger.wakes++;
}

static void test_mapping_wakes_who_waits_for_the_reference(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, 1, RW), 0);
	memset(&stranger, 0, sizeof(stranger));
	stranger.w = &w;
	stranger.mm = mm;
	w.ctg->port.zero = zero_and_lock;
	w.ctg->port.relax = relax_and_unlock;
	w.ctg->port.wake = count_wake;
	assert_int_equal(ctg_mm_populate(mm, BASE, 1, NULL), 0);
	w.ctg->port = w.port;
	assert_int_equal(stranger.wakes, 1);
	assert_int_equal(lookup(mm, BASE, 1).pfn, stranger.pfn);
	assert_int_equal(word_of(&w, stranger.pfn), CTG_WORD_MAP1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- installations that fail ----------------------------------------------------------------- */

static struct {
	struct world *w;
	ctg_vpn_t written;
	unsigned fail_in;
	bool failed; /* until the installation that puts back */
	bool closed;
	struct ctg_vrange range; /* the one that failed */
	unsigned installs;
	/* Held by somebody before the failure, and by another while it is undone. */
	ctg_vpn_t held, late;
	ctg_pfn_t held_pfn, late_pfn;
	int64_t late_ret;
	bool get;
	pthread_t late_thread;
} installing;

static void *hold_late(void *mm)
{
	installing.late_ret =
		ctg_pin_user_pages_fast(mm, installing.late, 1, 0, &installing.late_pfn);
	return NULL;
}

/*
 * Populate installs run by run: consecutive frames with the same rights. One installation fails,
 * after another CPU has got through to one page.
 */
static int install_fails_late(
	void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	installing.installs++;
	assert_int_equal(nr, 1);
	if (installing.failed) {
		assert_true(installing.closed);
		installing.failed = false;
		return installing.w->port.tlb_install(host, mm, ranges, nr);
	}
	assert_int_equal(lookup(mm, ranges[0].vpn, ranges[0].nr + 1).nr, ranges[0].nr);
	if (installing.fail_in == 0 || --installing.fail_in != 0)
		return installing.w->port.tlb_install(host, mm, ranges, nr);
	installing.failed = true;
	installing.closed = false;
	installing.range = ranges[0];
	if (installing.written - ranges[0].vpn < ranges[0].nr) {
		ctg_sim_set_cpu(1);
		put_byte(installing.w, mm, installing.written, 0x42);
		ctg_sim_set_cpu(0);
	}
	if (installing.held - ranges[0].vpn < ranges[0].nr)
		assert_int_equal(
			(installing.get ? ctg_get_user_pages_fast : ctg_pin_user_pages_fast)(
				mm, installing.held, 1, 0, &installing.held_pfn),
			1);
	return -CTG_ENOMEM;
}

/*
 * Before anything of the run is taken back, no access to it is possible any more: else a write
 * could come between the look at DIRTY and the clearing.
 */
static int restrict_closes_first(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	if (installing.failed && !installing.closed) {
		installing.closed = true;
		assert_int_equal(nr, 1);
		assert_int_equal(how, CTG_TLB_INVALIDATE);
		assert_memory_equal(ranges, &installing.range, sizeof(*ranges));
		for (uint64_t i = 0; i < ranges[0].nr; i++) {
			struct ctg_mapping m = lookup(mm, ranges[0].vpn + i, 1);

			assert_true(m.pfn != CTG_PFN_NONE);
			assert_int_equal(m.prot, CTG_PROT_NONE);
		}
		if (installing.late != 0) {
			assert_int_equal(
				pthread_create(&installing.late_thread, NULL, hold_late, mm), 0);
			/* It does not get anywhere now; if it is not there yet, no harm. */
			nanosleep(&(struct timespec){.tv_nsec = 3000000}, NULL);
		}
	}
	return installing.w->port.tlb_restrict(host, mm, ranges, nr, how);
}

static void install_begin(struct world *w)
{
	memset(&installing, 0, sizeof(installing));
	installing.w = w;
	w->ctg->port.tlb_install = install_fails_late;
	w->ctg->port.tlb_restrict = restrict_closes_first;
}

/* Runs end where the frames are not consecutive, or the rights differ. */
static void test_populate_installs_runs(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	ctg_pfn_t taken[4];

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	for (uint64_t i = 0; i < 32; i++)
		assert_int_equal(ctg_mmap(mm, BASE + i, 1, i % 2 != 0 ? RW : CTG_PROT_READ), 0);
	install_begin(&w);
	assert_int_equal(ctg_mm_populate(mm, BASE, 32, NULL), 0);
	assert_int_equal(installing.installs, 32);
	assert_int_equal(ctg_munmap(mm, BASE, 32), 0);
	/* Twice as many at once: one run. */
	assert_int_equal(ctg_mmap(mm, BASE, 64, RW), 0);
	installing.installs = 0;
	assert_int_equal(ctg_mm_populate(mm, BASE, 64, NULL), 0);
	assert_in_range(installing.installs, 1, 3);
	assert_int_equal(ctg_munmap(mm, BASE, 64), 0);
	/* Memory in pieces. */
	fragment(&w, taken, 4);
	assert_int_equal(ctg_mmap(mm, BASE, 4 * PAGES, RW), 0);
	installing.installs = 0;
	assert_int_equal(ctg_mm_populate(mm, BASE, 4 * PAGES, NULL), -CTG_ENOMEM);
	assert_true(installing.installs > 4);
	ctg_mm_destroy(mm, false);
	w.ctg->port = w.port;
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(ctg_free_frames(w.ctg, taken[i]), 0);
	world_close(&w);
}

static struct {
	struct ctg_mm *mm;
	uint64_t present; /* when the lock was let go for the first time */
} contended;

/* Install, and claim that somebody sleeps on the space's lock. */
static int install_contended(
	void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	ctg_store32_release(&mm->lock.state, 2);
	return installing.w->port.tlb_install(host, mm, ranges, nr);
}

static void wake_contended(void *host, struct ctg_word32 *word, unsigned nr)
{
	(void)host;
	(void)nr;
	if (word != &contended.mm->lock.state || contended.present != 0)
		return;
	assert_int_equal(ctg_load32_acquire(word), 0);
	contended.present = ctg_load64_relaxed(&contended.mm->nr_present);
}

/* A long populate lets go of the space's lock between its parts. */
static void test_populate_in_parts(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	uint64_t present;

	(void)state;
	world_open(&w, 34);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE + 1, 33 * PAGES, RW), 0);
	memset(&contended, 0, sizeof(contended));
	contended.mm = mm;
	installing.w = &w;
	w.ctg->port.tlb_install = install_contended;
	w.ctg->port.wake = wake_contended;
	assert_int_equal(ctg_mm_populate(mm, BASE + 1, 33 * PAGES, &present), 0);
	w.ctg->port = w.port;
	assert_int_equal(present, 33 * PAGES);
	assert_in_range(contended.present, PAGES, 20 * PAGES);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_failed_install_takes_the_run_back(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	uint64_t present;

	(void)state;
	world_open(&w, 8);
	install_begin(&w);
	for (unsigned written = 0; written < 2; written++) {
		mm = space_new(&w, 0);
		/* The first run is of small frames, the second large: the second fails. */
		assert_int_equal(ctg_mmap(mm, BASE + 500, 12 + PAGES, RW), 0);
		assert_int_equal(ctg_mprotect(mm, BASE + PAGES, PAGES, CTG_PROT_WRITE), 0);
		assert_int_equal(ctg_mprotect(mm, BASE + 500, 12, CTG_PROT_READ), 0);
		installing.fail_in = 2;
		installing.written = written != 0 ? BASE + PAGES + 33 : 0;
		assert_int_equal(
			ctg_mm_populate(mm, BASE + 500, 12 + PAGES, &present), -CTG_ENOMEM);
		assert_int_equal(installing.fail_in, 0);
		/* One entry: it stays as a whole if it has been written to. */
		assert_int_equal(present, written != 0 ? 12 + PAGES : 12);
		assert_int_equal(stat_of(mm).nr_present, present);
		assert_int_equal(w.nr_free - world_free(&w), present);
		assert_int_equal(get_byte(&w, mm, BASE + PAGES + 33), written != 0 ? 0x42 : 0);
		put_byte(&w, mm, BASE + PAGES + 34, 1);
		assert_int_equal(lookup(mm, BASE + 500, 12).prot, CTG_PROT_READ);
		ctg_mm_destroy(mm, false);
		world_check_clean(&w);

		/* Small frames: page by page. */
		mm = space_new(&w, 0);
		assert_int_equal(ctg_mmap(mm, BASE, 64, RW), 0);
		installing.fail_in = 1;
		installing.written = written != 0 ? BASE + 33 : 0;
		assert_int_equal(ctg_mm_populate(mm, BASE, 64, &present), -CTG_ENOMEM);
		assert_int_equal(present, written);
		assert_true(lookup(mm, BASE, 64).reserved);
		assert_int_equal(lookup(mm, BASE, 64).nr, written != 0 ? 33 : 64);
		assert_int_equal(get_byte(&w, mm, BASE + 33), written != 0 ? 0x42 : 0);
		put_byte(&w, mm, BASE + 33, 1);
		put_byte(&w, mm, BASE + 34, 1);
		ctg_mm_destroy(mm, false);
		world_check_clean(&w);
	}
	/* A fault reports it too. */
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE, PAGES, RW), 0);
	installing.fail_in = 1;
	installing.written = 0;
	assert_int_equal(ctg_handle_fault(mm, BASE + 9, true), -CTG_ENOMEM);
	assert_int_equal(lookup(mm, BASE, PAGES).nr, PAGES);
	assert_true(lookup(mm, BASE, PAGES).reserved);
	assert_int_equal(ctg_handle_fault(mm, BASE + 9, true), 0);
	ctg_mm_destroy(mm, false);
	w.ctg->port = w.port;
	world_close(&w);
}

/* A page that somebody holds stays; who asks for one meanwhile waits, and gets the next frame. */
static void test_failed_install_leaves_what_is_held(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	uint64_t present;

	(void)state;
	world_open(&w, 8);
	for (unsigned get = 0; get < 2; get++) {
		install_begin(&w);
		mm = space_new(&w, 0);
		assert_int_equal(ctg_mmap(mm, BASE, 64, RW), 0);
		installing.fail_in = 1;
		installing.get = get;
		installing.held = BASE + 33;
		installing.late = BASE + 40;
		assert_int_equal(ctg_mm_populate(mm, BASE, 64, &present), -CTG_ENOMEM);
		pthread_join(installing.late_thread, NULL);
		assert_int_equal(present, 1);
		assert_int_equal(lookup(mm, BASE + 33, 1).pfn, installing.held_pfn);
		assert_int_equal(installing.late_ret, 1);
		assert_int_equal(lookup(mm, BASE + 40, 1).pfn, installing.late_pfn);
		/* What the process writes from now on is what the holder sees. */
		put_byte(&w, mm, BASE + 33, 0x42);
		assert_int_equal(*(unsigned char *)ctg_sim_frame(w.sim, installing.held_pfn), 0x42);
		assert_int_equal((get ? ctg_put_user_pages : ctg_unpin_user_pages)(
					 w.ctg, &installing.held_pfn, 1),
			0);
		assert_int_equal(ctg_unpin_user_pages(w.ctg, &installing.late_pfn, 1), 0);
		ctg_mm_destroy(mm, false);
		w.ctg->port = w.port;
		world_check_clean(&w);
	}
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_populate_prefers_large_frames),
		cmocka_unit_test(test_populate_zeroes),
		cmocka_unit_test(test_populate_falls_back_to_runs),
		cmocka_unit_test(test_map_order_takes_large_frames_only),
		cmocka_unit_test(test_populate_reports_holes),
		cmocka_unit_test(test_frames_come_from_where_the_space_says),
		cmocka_unit_test(test_faults),
		cmocka_unit_test(test_writers_see_a_migration_that_begins),
		cmocka_unit_test(test_writers_wait_for_a_migration),
		cmocka_unit_test(test_mapping_wakes_who_waits_for_the_reference),
		cmocka_unit_test(test_populate_installs_runs),
		cmocka_unit_test(test_populate_in_parts),
		cmocka_unit_test(test_failed_install_takes_the_run_back),
		cmocka_unit_test(test_failed_install_leaves_what_is_held),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
