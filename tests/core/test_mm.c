/* SPDX-License-Identifier: MIT */
#include "space.h"

/* ---- spaces ---------------------------------------------------------------------------------- */

static void test_create_refuses_bad_input(void **state)
{
	struct ctg_mm_config config = {.gfp = CTG_GFP_NO_CMA | CTG_GFP_SPILL};
	struct ctg_mm *mm = NULL;
	struct world w;

	(void)state;
	world_open(&w, 4);
	assert_int_equal(ctg_mm_create(NULL, &config, &mm), -CTG_EINVAL);
	assert_int_equal(ctg_mm_create(w.ctg, NULL, &mm), -CTG_EINVAL);
	assert_int_equal(ctg_mm_create(w.ctg, &config, NULL), -CTG_EINVAL);
	config.gfp = CTG_GFP_NO_CMA | CTG_GFP_NO_ORDINARY;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	config.gfp = CTG_GFP_MOVABLE;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	config.gfp = 1u << 20;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	config.gfp = 0;
	config.map_order = 1;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	config.map_order = 18;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	assert_null(mm);
	ctg_mm_destroy(NULL, false);
	ctg_mm_destroy(NULL, true);
	world_close(&w);
}

static void test_create_without_memory(void **state)
{
	struct ctg_mm_config config = {.owner = NULL};
	struct ctg_mm *mm = NULL, *first;
	struct world w;
	uint64_t nth, bytes;

	(void)state;
	world_open(&w, 4);
	/* The only family that exists is in use, so that one more has to be made. */
	first = space_new(&w, 0);
	bytes = ctg_sim_meta_bytes(w.sim);
	for (nth = 1;; nth++) {
		int ret;

		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, nth);
		ret = ctg_mm_create(w.ctg, &config, &mm);
		if (ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0) < nth)
			break;
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_null(mm);
		assert_int_equal(ctg_sim_meta_bytes(w.sim), bytes);
	}
	/* The space, its root, its family. */
	assert_int_equal(nth, 4);
	assert_non_null(mm);
	assert_ptr_equal(ctg_mm_machine(mm), w.ctg);
	assert_null(ctg_mm_owner(mm));
	assert_ptr_equal(ctg_mm_owner(first), &w);
	assert_ptr_not_equal(mm->anon, first->anon);
	ctg_mm_destroy(first, false);
	ctg_mm_destroy(mm, false);
	w.meta_bytes += sizeof(struct ctg_anon);
	world_close(&w);
}

static void test_families(void **state)
{
	struct ctg_mm *one, *two, *three;
	struct ctg_anon *anon;
	struct world w;
	ctg_pfn_t pfn, other;

	(void)state;
	world_open(&w, 4);
	one = space_new(&w, 0);
	anon = one->anon;
	mapped(one, BASE, 2 * PAGES, RW);
	pfn = lookup(one, BASE + PAGES, 1).pfn;
	/* A frame leads to its family, large or small. */
	assert_ptr_equal(ctg_anon_lock(w.ctg, pfn), anon);
	assert_ptr_equal(anon->mms, one);
	ctg_unlock(&w.port, &anon->lock);
	assert_int_equal(ctg_frame_of(w.ctg, pfn)->index, BASE + PAGES);
	/* Not the inside of one, nor memory that is not mapped. */
	assert_null(ctg_anon_lock(w.ctg, pfn + 1));
	assert_int_equal(ctg_alloc_frames(w.ctg, 0, CTG_GFP_MOVABLE, &other), 0);
	assert_null(ctg_anon_lock(w.ctg, other));
	assert_int_equal(ctg_free_frames(w.ctg, other), 0);
	/* A reference outlives the mapping. Then there is no family. */
	assert_int_equal(ctg_frame_tryget(ctg_frame_of(w.ctg, pfn)), 0);
	assert_int_equal(ctg_munmap(one, BASE, 2 * PAGES), 0);
	assert_null(ctg_anon_lock(w.ctg, pfn));
	ctg_frame_put(w.ctg, pfn, CTG_WORD_REF1, 1);
	/* A relative joins; the family is free once both have left. */
	two = space_new(&w, 0);
	assert_ptr_not_equal(two->anon, anon);
	ctg_anon_leave(two);
	assert_int_equal(ctg_anon_join(two, one), 0);
	assert_ptr_equal(two->anon, anon);
	ctg_mm_destroy(one, false);
	assert_true(anon->in_use);
	assert_ptr_equal(anon->mms, two);
	three = space_new(&w, 0);
	assert_ptr_not_equal(three->anon, anon);
	ctg_mm_destroy(two, false);
	assert_false(anon->in_use);
	ctg_mm_destroy(three, false);
	w.meta_bytes += sizeof(struct ctg_anon);
	world_close(&w);
}

/* ---- mmap, munmap ---------------------------------------------------------------------------- */

static void test_ranges_are_checked(void **state)
{
	static const struct ctg_vrange bad[] = {{BASE, 0}, {CTG_MM_MAX_VPN, 1},
		{CTG_MM_MAX_VPN - 1, 2}, {0, CTG_MM_MAX_VPN + 1}, {1, UINT64_MAX}, {UINT64_MAX, 2}};
	static const struct ctg_vrange unaligned[] = {
		{BASE + 1, PAGES}, {BASE, PAGES + 1}, {BASE, 1}};
	struct ctg_mm *mm, *huge;
	struct ctg_mapping m;
	struct world w;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	huge = space_new(&w, CTG_PAGEBLOCK_ORDER);
	w.meta_bytes += sizeof(struct ctg_anon);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]) + 3; i++) {
		bool fine = i >= sizeof(bad) / sizeof(bad[0]);
		struct ctg_vrange r = fine ? unaligned[i - sizeof(bad) / sizeof(bad[0])] : bad[i];
		struct ctg_mm *of = fine ? huge : mm;
		uint64_t present = 77;

		assert_int_equal(ctg_mmap(of, r.vpn, r.nr, RW), -CTG_EINVAL);
		assert_int_equal(ctg_munmap(of, r.vpn, r.nr), -CTG_EINVAL);
		assert_int_equal(ctg_madvise_dontneed(of, r.vpn, r.nr), -CTG_EINVAL);
		assert_int_equal(ctg_mprotect(of, r.vpn, r.nr, RW), -CTG_EINVAL);
		assert_int_equal(ctg_mm_populate(of, r.vpn, r.nr, &present), -CTG_EINVAL);
		assert_int_equal(present, 0);
	}
	assert_int_equal(ctg_mmap(mm, BASE, 1, 4), -CTG_EINVAL);
	assert_int_equal(ctg_mmap(NULL, BASE, 1, RW), -CTG_EINVAL);
	assert_int_equal(ctg_munmap(NULL, BASE, 1), -CTG_EINVAL);
	assert_int_equal(ctg_mprotect(NULL, BASE, 1, RW), -CTG_EINVAL);
	assert_int_equal(ctg_mm_populate(NULL, BASE, 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_handle_fault(NULL, BASE, false), -CTG_EFAULT);
	assert_int_equal(ctg_handle_fault(mm, CTG_MM_MAX_VPN, false), -CTG_EFAULT);
	assert_int_equal(ctg_mm_lookup(mm, CTG_MM_MAX_VPN, 1, &m), -CTG_EINVAL);
	assert_int_equal(ctg_mm_lookup(mm, BASE, 0, &m), -CTG_EINVAL);
	assert_int_equal(ctg_mm_lookup(mm, BASE, 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_mm_lookup(NULL, BASE, 1, &m), -CTG_EINVAL);
	assert_int_equal(lookup(mm, 0, CTG_MM_MAX_VPN).nr, CTG_MM_MAX_VPN);
	assert_int_equal(stat_of(huge).nr_tables, 1);
	ctg_mm_destroy(mm, false);
	ctg_mm_destroy(huge, false);
	world_close(&w);
}

static void test_mmap_refuses_what_is_mapped(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	assert_int_equal(ctg_mmap(mm, BASE + 10, 10, RW), 0);
	assert_int_equal(ctg_mmap(mm, BASE + 19, 1, RW), -CTG_EEXIST);
	assert_int_equal(ctg_mmap(mm, BASE, 11, RW), -CTG_EEXIST);
	assert_int_equal(ctg_mmap(mm, 0, CTG_MM_MAX_VPN, RW), -CTG_EEXIST);
	assert_int_equal(lookup(mm, BASE, 100).nr, 10);
	assert_int_equal(lookup(mm, BASE + 10, 100).nr, 10);
	assert_int_equal(ctg_mmap(mm, BASE + 20, 1, RW), 0);
	assert_int_equal(ctg_mmap(mm, BASE, 10, RW), 0);
	assert_int_equal(lookup(mm, BASE, 100).nr, 21);
	/* The last page there is, and the first. */
	assert_int_equal(ctg_mmap(mm, CTG_MM_MAX_VPN - 1, 1, RW), 0);
	assert_int_equal(ctg_mmap(mm, 0, 1, RW), 0);
	put_byte(&w, mm, CTG_MM_MAX_VPN - 1, 1);
	put_byte(&w, mm, 0, 2);
	assert_int_equal(get_byte(&w, mm, CTG_MM_MAX_VPN - 1), 1);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_munmap_part_of_a_large_frame(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	mm = space_new(&w, 0);
	mapped(mm, BASE, PAGES, RW);
	pfn = lookup(mm, BASE, 1).pfn;
	assert_int_equal(lookup(mm, BASE, PAGES).nr, PAGES);
	for (uint64_t i = 0; i < PAGES; i++)
		put_byte(&w, mm, BASE + i, (unsigned char)(i * 7 + 1));
	/* With holes before and after. */
	assert_int_equal(ctg_munmap(mm, BASE - 5, 15), 0);
	assert_int_equal(ctg_munmap(mm, BASE + 500, 100), 0);
	assert_int_equal(word_of(&w, pfn), 490 * CTG_WORD_MAP1);
	assert_int_equal(stat_of(mm).nr_present, 490);
	for (uint64_t i = 10; i < 500; i++)
		assert_int_equal(get_byte(&w, mm, BASE + i), (unsigned char)(i * 7 + 1));
	assert_int_equal(
		ctg_sim_read(w.sim, mm, (BASE + 9) << CTG_PAGE_SHIFT, &pfn, 1), -CTG_EFAULT);
	assert_int_equal(
		ctg_sim_read(w.sim, mm, (BASE + 500) << CTG_PAGE_SHIFT, &pfn, 1), -CTG_EFAULT);
	/* The frame is whole until its last page goes. */
	assert_int_equal(world_free(&w), w.nr_free - PAGES);
	assert_int_equal(ctg_munmap(mm, BASE, 499), 0);
	assert_int_equal(world_free(&w), w.nr_free - PAGES);
	assert_int_equal(ctg_munmap(mm, BASE, PAGES), 0);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_dontneed_reads_as_zero(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	mapped(mm, BASE, 2 * PAGES, RW);
	for (uint64_t i = 0; i < 2 * PAGES; i++)
		put_byte(&w, mm, BASE + i, 0xaa);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE + 100, PAGES), 0);
	assert_true(lookup(mm, BASE + 100, PAGES).reserved);
	for (uint64_t i = 0; i < 2 * PAGES; i++)
		assert_int_equal(
			get_byte(&w, mm, BASE + i), i >= 100 && i < 100 + PAGES ? 0 : 0xaa);
	/* A slot that is given up as a whole gets a large frame again. */
	assert_int_equal(ctg_madvise_dontneed(mm, BASE, PAGES), 0);
	assert_int_equal(get_byte(&w, mm, BASE + 9), 0);
	assert_int_equal(lookup(mm, BASE, PAGES).nr, PAGES);
	assert_int_equal(word_of(&w, lookup(mm, BASE, 1).pfn), CTG_WORD_MAP1);
	/* Holes stay holes. */
	assert_int_equal(ctg_madvise_dontneed(mm, BASE - 10, 20), 0);
	assert_int_equal(entry_of(mm, BASE - 1), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- mprotect -------------------------------------------------------------------------------- */

static void test_mprotect(void **state)
{
	struct ctg_mm *mm;
	struct world w;
	unsigned char byte = 3;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	mapped(mm, BASE, 2 * PAGES, RW);
	put_byte(&w, mm, BASE + 100, 7);
	/* Narrower: at once, although the TLB had it writable. */
	assert_int_equal(ctg_mprotect(mm, BASE + 100, PAGES, CTG_PROT_READ), 0);
	assert_int_equal(
		ctg_sim_write(w.sim, mm, (BASE + 100) << CTG_PAGE_SHIFT, &byte, 1), -CTG_EFAULT);
	assert_int_equal(get_byte(&w, mm, BASE + 100), 7);
	put_byte(&w, mm, BASE + 99, 8);
	put_byte(&w, mm, BASE + 100 + PAGES, 8);
	assert_int_equal(lookup(mm, BASE + 100, 2 * PAGES).prot, CTG_PROT_READ);
	assert_int_equal(stat_of(mm).nr_present, 2 * PAGES);
	/* Wider. */
	assert_int_equal(ctg_mprotect(mm, BASE + 100, 1, CTG_PROT_WRITE), 0);
	put_byte(&w, mm, BASE + 100, 9);
	/* None. */
	assert_int_equal(ctg_mprotect(mm, BASE, 2 * PAGES, CTG_PROT_NONE), 0);
	assert_int_equal(
		ctg_sim_read(w.sim, mm, (BASE + 100) << CTG_PAGE_SHIFT, &byte, 1), -CTG_EFAULT);
	assert_int_equal(ctg_mprotect(mm, BASE, 2 * PAGES, RW), 0);
	assert_int_equal(get_byte(&w, mm, BASE + 100), 9);
	/* A hole: nothing changes. */
	assert_int_equal(ctg_mprotect(mm, BASE + PAGES, PAGES + 1, CTG_PROT_NONE), -CTG_ENOMEM);
	assert_int_equal(ctg_mprotect(mm, BASE - 1, 2, CTG_PROT_NONE), -CTG_ENOMEM);
	put_byte(&w, mm, BASE, 1);
	put_byte(&w, mm, BASE + 2 * PAGES - 1, 1);
	assert_int_equal(ctg_mprotect(mm, BASE, 1, 8), -CTG_EINVAL);
	/* What a migration is copying stays so. */
	change_entry(mm, BASE, CTG_PTE_MOVING, 0);
	assert_int_equal(ctg_mprotect(mm, BASE, 1, CTG_PROT_READ), 0);
	assert_true(lookup(mm, BASE, 1).moving);
	assert_int_equal(ctg_mprotect(mm, BASE, 1, RW), 0);
	assert_true(lookup(mm, BASE, 1).moving);
	change_entry(mm, BASE, 0, CTG_PTE_MOVING);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Every page's rights, whether it has a frame or not, and what it holds. */
static void snapshot(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, uint64_t *out)
{
	for (uint64_t i = 0; i < nr; i++) {
		unsigned level;
		uint64_t entry = ctg_pte_read(mm, vpn + i, &level);

		out[i] = entry & (CTG_PTE_PRESENT | CTG_PTE_RESERVED | CTG_PTE_RIGHTS);
		if ((entry & CTG_PTE_PRESENT) != 0) {
			const unsigned char *p = ctg_sim_frame(w->sim, lookup(mm, vpn + i, 1).pfn);

			out[i] |= (uint64_t)p[0] << 32;
		}
	}
}

static void test_mprotect_fails_without_a_trace(void **state)
{
	static uint64_t before[3 * PAGES], after[3 * PAGES];
	static const enum ctg_sim_hook hooks[] = {CTG_SIM_META_ALLOC, CTG_SIM_INSTALL};
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 8);
	for (unsigned h = 0; h < 2; h++) {
		uint64_t nth;

		for (nth = 1;; nth++) {
			int ret;

			mm = space_new(&w, 0);
			mapped(mm, BASE, 3 * PAGES, CTG_PROT_WRITE);
			for (uint64_t i = 0; i < 3 * PAGES; i += 50)
				put_byte(&w, mm, BASE + i, (unsigned char)i);
			assert_int_equal(ctg_mprotect(mm, BASE + 20, 9, CTG_PROT_READ), 0);
			assert_int_equal(ctg_mprotect(mm, BASE + 40, 9, CTG_PROT_NONE), 0);
			assert_int_equal(ctg_madvise_dontneed(mm, BASE + PAGES, 300), 0);
			snapshot(&w, mm, BASE, 3 * PAGES, before);
			ctg_sim_fail(w.sim, hooks[h], nth);
			ret = ctg_mprotect(mm, BASE + 10, 2 * PAGES + 10, CTG_PROT_READ);
			if (ctg_sim_fail(w.sim, hooks[h], 0) < nth) {
				assert_int_equal(ret, 0);
				ctg_mm_destroy(mm, false);
				break;
			}
			assert_int_equal(ret, -CTG_ENOMEM);
			snapshot(&w, mm, BASE, 3 * PAGES, after);
			assert_memory_equal(before, after, sizeof(before));
			/* And the port agrees. */
			put_byte(&w, mm, BASE + 19, 1);
			assert_int_equal(get_byte(&w, mm, BASE + 20), 0);
			ctg_mm_destroy(mm, false);
			world_check_clean(&w);
		}
		/* A split and the list of old rights can fail; and the installation. */
		assert_int_equal(nth, h == 0 ? 3 : 2);
	}
	world_close(&w);
}

/* ---- failures, each in turn ------------------------------------------------------------------ */

/* All that a space does, in an order that needs tables, frames and installations of every kind. */
static int scenario(struct world *w, struct ctg_mm *mm)
{
	uint64_t present;
	unsigned char byte = 0x3c;
	int ret;

	if ((ret = ctg_mmap(mm, BASE + 300, 4 * PAGES, RW)) != 0)
		return ret;
	if ((ret = ctg_mmap(mm, BASE + (1u << 27) - 2, 4, CTG_PROT_READ)) != 0)
		return ret;
	if ((ret = ctg_mm_populate(mm, BASE + 300, 3 * PAGES, &present)) != 0)
		return ret;
	if ((ret = ctg_sim_write(w->sim, mm, (BASE + PAGES + 9) << CTG_PAGE_SHIFT, &byte, 1)) != 0)
		return ret;
	if ((ret = ctg_mprotect(mm, BASE + 400, 2 * PAGES, CTG_PROT_READ)) != 0)
		return ret;
	if ((ret = ctg_mprotect(mm, BASE + 400, PAGES, RW)) != 0)
		return ret;
	if ((ret = ctg_madvise_dontneed(mm, BASE + PAGES + 50, PAGES)) != 0)
		return ret;
	if ((ret = ctg_sim_read(w->sim, mm, (BASE + PAGES + 60) << CTG_PAGE_SHIFT, &byte, 1)) != 0)
		return ret;
	if ((ret = ctg_munmap(mm, BASE + 2 * PAGES + 100, 50)) != 0)
		return ret;
	if ((ret = ctg_mm_populate(mm, BASE + 300, PAGES, &present)) != 0)
		return ret;
	return ctg_munmap(mm, BASE, 8 * PAGES);
}

static void test_every_failure_in_turn(void **state)
{
	static const enum ctg_sim_hook hooks[] = {
		CTG_SIM_META_ALLOC, CTG_SIM_ZERO, CTG_SIM_INSTALL};
	struct world w;

	(void)state;
	world_open(&w, 8);
	for (unsigned h = 0; h < 3; h++) {
		for (uint64_t nth = 1;; nth++) {
			struct ctg_mm *mm = space_new(&w, 0);
			uint64_t calls;
			int ret;

			ctg_sim_fail(w.sim, hooks[h], nth);
			ret = scenario(&w, mm);
			calls = ctg_sim_fail(w.sim, hooks[h], 0);
			/* A large frame that cannot be zeroed is made up for by small ones. */
			assert_true(ret == 0 || (ret == -CTG_ENOMEM && calls >= nth));
			/* The frame of a large page is whole until its last piece goes. */
			assert_true(stat_of(mm).nr_present <= w.nr_free - world_free(&w));
			ctg_mm_destroy(mm, false);
			world_check_clean(&w);
			if (calls < nth) {
				assert_int_equal(ret, 0);
				assert_true(nth > 4);
				break;
			}
		}
	}
	world_close(&w);
}

static void test_munmap_fails_without_a_trace(void **state)
{
	static uint64_t before[3 * PAGES], after[3 * PAGES];
	struct ctg_mm *mm;
	struct world w;
	uint64_t nth;

	(void)state;
	world_open(&w, 8);
	for (nth = 1;; nth++) {
		int ret;

		mm = space_new(&w, 0);
		mapped(mm, BASE, 3 * PAGES, RW);
		for (uint64_t i = 0; i < 3 * PAGES; i++)
			put_byte(&w, mm, BASE + i, (unsigned char)(i + 1));
		snapshot(&w, mm, BASE, 3 * PAGES, before);
		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, nth);
		ret = nth % 2 != 0 ? ctg_munmap(mm, BASE + 10, 2 * PAGES)
				   : ctg_madvise_dontneed(mm, BASE + 10, 2 * PAGES);
		if (ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0) < nth) {
			assert_int_equal(ret, 0);
			break;
		}
		assert_int_equal(ret, -CTG_ENOMEM);
		snapshot(&w, mm, BASE, 3 * PAGES, after);
		assert_memory_equal(before, after, sizeof(before));
		assert_int_equal(world_free(&w), w.nr_free - 3 * PAGES);
		ctg_mm_destroy(mm, false);
		world_check_clean(&w);
	}
	/* One table for each edge. */
	assert_int_equal(nth, 3);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_destroy_frees_everything(void **state)
{
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	world_open(&w, 16);
	for (unsigned dead = 0; dead < 2; dead++) {
		mm = space_new(&w, 0);
		mapped(mm, BASE + 100, 6 * PAGES, RW);
		mapped(mm, CTG_MM_MAX_VPN - 3 * PAGES - 7, 3 * PAGES + 7, CTG_PROT_READ);
		assert_int_equal(ctg_mmap(mm, 0, ctg_level_pages(2), RW), 0);
		assert_int_equal(ctg_mprotect(mm, BASE + 150, PAGES, CTG_PROT_READ), 0);
		assert_int_equal(ctg_munmap(mm, BASE + 3 * PAGES + 5, 9), 0);
		ctg_mm_destroy(mm, dead != 0);
		world_check_clean(&w);
	}
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_create_refuses_bad_input),
		cmocka_unit_test(test_create_without_memory),
		cmocka_unit_test(test_families),
		cmocka_unit_test(test_ranges_are_checked),
		cmocka_unit_test(test_mmap_refuses_what_is_mapped),
		cmocka_unit_test(test_munmap_part_of_a_large_frame),
		cmocka_unit_test(test_dontneed_reads_as_zero),
		cmocka_unit_test(test_mprotect),
		cmocka_unit_test(test_mprotect_fails_without_a_trace),
		cmocka_unit_test(test_every_failure_in_turn),
		cmocka_unit_test(test_munmap_fails_without_a_trace),
		cmocka_unit_test(test_destroy_frees_everything),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
