/* SPDX-License-Identifier: MIT */
/* Giving allocations of an area back: whole, in parts, wrongly, and while somebody holds them. */
#include "lend.h"

static void test_release_in_parts(void **state)
{
	struct lend *l = lend_open(4, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	ctg_pfn_t a = alloc_ok(cma, 100, NULL), b = alloc_ok(cma, 100, NULL);

	(void)state;
	assert_int_equal(a, at(0));
	assert_int_equal(b, at(100));
	refuse(l, cma, a, 0);
	refuse(l, cma, a, 101); /* into b */
	refuse(l, cma, a + 99, 2);
	refuse(l, cma, b, 101); /* beyond */
	refuse(l, cma, b + 100, 1);
	refuse(l, cma, at(4 * BLOCK), 1);
	refuse(l, cma, LEND_BASE - 1, 2);
	refuse(l, cma, a, UINT64_MAX);
	refuse(l, cma, UINT64_MAX, 1);
	refuse(l, NULL, a, 1);
	release_ok(cma, a + 40, 20); /* the middle */
	refuse(l, cma, a + 40, 20);
	refuse(l, cma, a + 39, 2);
	refuse(l, cma, a + 59, 2);
	refuse(l, cma, a, 100);
	refuse(l, cma, a + 60, 41);
	release_ok(cma, a, 40); /* the start, which ends at the hole */
	release_ok(cma, a + 60, 40);
	release_ok(cma, b, 100);
	refuse(l, cma, b, 100);
	assert_int_equal(stat_of(cma).nr_free, 4 * BLOCK);
	assert_int_equal(stat_of(cma).frames_released, 200);
	lend_close(l);
}

/* The frames between two parts of an allocation do not become one with what follows. */
static void test_parts_keep_their_ends(void **state)
{
	struct lend *l = lend_open(4, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	ctg_pfn_t a = alloc_ok(cma, 100, NULL), b;

	(void)state;
	release_ok(cma, a + 50, 50);
	b = alloc_ok(cma, 50, NULL);
	assert_int_equal(b, a + 50);
	refuse(l, cma, a, 100);
	refuse(l, cma, a + 49, 2);
	release_ok(cma, a, 50);
	release_ok(cma, b, 50);
	lend_close(l);
}

static void test_release_granularity(void **state)
{
	struct lend *l = lend_open(4, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 2);
	ctg_pfn_t a = alloc_ok(cma, 13, NULL);

	(void)state;
	refuse(l, cma, a + 1, 4);
	refuse(l, cma, a, 3);
	refuse(l, cma, a, 6);
	refuse(l, cma, a, 14);
	refuse(l, cma, a, 15);
	refuse(l, cma, a, 17);
	release_ok(cma, a, 4);
	refuse(l, cma, a + 4, 7);
	release_ok(cma, a + 4, 9); /* the rest, as it was asked for */
	assert_int_equal(stat_of(cma).frames_released, 16);
	a = alloc_ok(cma, 13, NULL);
	release_ok(cma, a, 16); /* or with what it was rounded up to */
	a = alloc_ok(cma, 13, NULL);
	release_ok(cma, a, 13);
	/* Cut off its end, the rest ends with a whole bit. */
	a = alloc_ok(cma, 13, NULL);
	release_ok(cma, a + 12, 1);
	refuse(l, cma, a, 9);
	release_ok(cma, a, 12);
	assert_int_equal(stat_of(cma).nr_free, 4 * BLOCK);
	lend_close(l);
}

/* Frames that somebody else holds stay with that one; the rest is free. */
static void test_release_while_held(void **state)
{
	struct lend *l = lend_open(2, 2, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	ctg_pfn_t pfn = alloc_ok(cma, BLOCK, NULL), other;
	uint64_t held;

	(void)state;
	assert_int_equal(ctg_frame_tryget(lend_frame(l, pfn + 10)), 0);
	pin(l, pfn + 200);
	pin(l, pfn + 200);
	assert_int_equal(ctg_cma_release(cma, pfn, BLOCK, &held), 0);
	assert_int_equal(held, 2);
	assert_int_equal(stat_of(cma).nr_allocated, 0);
	assert_int_equal(stat_of(cma).nr_free, 2 * BLOCK - 2);
	assert_int_equal(stat_of(cma).nr_lent, 2);
	assert_int_equal(stat_of(cma).longest_free, 2 * BLOCK - 201);
	assert_int_equal(word_of(l, pfn + 200), 2 * CTG_WORD_PIN1);
	refuse(l, cma, pfn + 10, 1);
	/* They are in the way of the next one, and named. */
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, &request, &other), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_REF);
	assert_int_equal(report.obstacle_pfn, pfn + 10);
	ctg_frame_put(l->ctg, pfn + 10, CTG_WORD_REF1, 1);
	ctg_frame_put(l->ctg, pfn + 200, CTG_WORD_PIN1, 1);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, NULL, &other), -CTG_EBUSY);
	ctg_frame_put(l->ctg, pfn + 200, CTG_WORD_PIN1, 1);
	other = alloc_ok(cma, 2 * BLOCK, &request);
	release_ok(cma, other, 2 * BLOCK);
	lend_close(l);
}

/* What an area has given out cannot be given back past it. */
static void test_not_past_the_area(void **state)
{
	struct lend *l = lend_open(2, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 2);
	ctg_pfn_t pfn = alloc_ok(cma, 100, NULL);
	struct snapshot *before = snapshot_take(l);

	(void)state;
	assert_int_equal(ctg_free_contig_range(l->ctg, pfn, 100, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_contig_range(l->ctg, pfn + 7, 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_free_frames(l->ctg, pfn), -CTG_EINVAL);
	snapshot_check(l, before, true);
	/* From an area into ordinary memory, both taken. */
	assert_int_equal(ctg_cma_release(cma, pfn, 100, NULL), 0);
	pfn = alloc_ok(cma, 2 * BLOCK, NULL);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(2 * BLOCK), 5, NULL), 0);
	before = snapshot_take(l);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK - 5), 10, NULL), -CTG_EINVAL);
	snapshot_check(l, before, true);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(2 * BLOCK), 5, NULL), 0);
	release_ok(cma, pfn, 2 * BLOCK);
	pfn = alloc_ok(cma, 100, NULL);
	/* And what was taken past the area is not the area's to release. */
	assert_int_equal(ctg_alloc_contig_range(l->ctg, at(BLOCK), 64, NULL), 0);
	refuse(l, cma, at(BLOCK), 64);
	assert_int_equal(ctg_free_contig_range(l->ctg, at(BLOCK), 64, NULL), 0);
	release_ok(cma, pfn, 100);
	lend_close(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_release_in_parts),
		cmocka_unit_test(test_parts_keep_their_ends),
		cmocka_unit_test(test_release_granularity),
		cmocka_unit_test(test_release_while_held),
		cmocka_unit_test(test_not_past_the_area),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
