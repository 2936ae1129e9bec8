/* SPDX-License-Identifier: MIT */
#include "lend.h"

/* ---- making areas ---------------------------------------------------------------------------- */

static int create(struct lend *l, const char *name, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_extent range = {pfn, nr};
	struct ctg_cma_config config = {.name = name, .ranges = &range, .nr_ranges = 1};
	struct ctg_cma *cma = NULL;
	int ret = ctg_cma_create(l->ctg, &config, &cma);

	assert_int_equal(ret == 0, cma != NULL);
	return ret;
}

static void test_create_refuses(void **state)
{
	struct lend *l = lend_open(8, 2, true);
	struct ctg_zone_config next = {.base = LEND_BASE + 10 * BLOCK, .nr = 4 * BLOCK};
	struct ctg_zone *second;
	struct snapshot *before;

	(void)state;
	/* A neighbouring zone, with a hole at its second pageblock. */
	assert_int_equal(ctg_sim_add_zone(l->sim, &next, false, &second), 0);
	assert_int_equal(ctg_zone_populate(second, next.base, BLOCK), 0);
	assert_int_equal(ctg_zone_populate(second, next.base + 2 * BLOCK, 2 * BLOCK), 0);
	assert_int_equal(create(l, "first", at(6 * BLOCK), BLOCK), 0);
	before = snapshot_take(l);
	assert_int_equal(create(l, "a", at(0), 0), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(1), BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(0), BLOCK + 1), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(0), BLOCK - 1), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(0), UINT64_MAX - BLOCK + 1), -CTG_EINVAL);
	assert_int_equal(create(l, "a", UINT64_MAX - BLOCK + 1, BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", 0, BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", LEND_BASE - BLOCK, 2 * BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(14 * BLOCK), BLOCK), -CTG_EINVAL);
	/* Ordinary memory; from one zone into the other; a hole, alone and after memory. */
	assert_int_equal(create(l, "a", at(8 * BLOCK), BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(7 * BLOCK), 2 * BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(9 * BLOCK), 2 * BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", next.base + BLOCK, BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", next.base, 2 * BLOCK), -CTG_EINVAL);
	/* Another area, partly. */
	assert_int_equal(create(l, "a", at(5 * BLOCK), 2 * BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "a", at(6 * BLOCK), BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "first", at(0), BLOCK), -CTG_EEXIST);
	assert_int_equal(create(l, NULL, at(0), BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "", at(0), BLOCK), -CTG_EINVAL);
	assert_int_equal(create(l, "12345678901234567890123456789012", at(0), BLOCK), -CTG_EINVAL);
	ctg_sim_fail(l->sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(create(l, "a", at(0), BLOCK), -CTG_ENOMEM);
	snapshot_check(l, before, true);
	/* None of them stops a good one. */
	assert_int_equal(create(l, "1234567890123456789012345678901", at(0), 6 * BLOCK), 0);
	assert_int_equal(create(l, "b", next.base + 2 * BLOCK, 2 * BLOCK), 0);
	lend_close(l);
}

static void test_create_refuses_configs(void **state)
{
	struct lend *l = lend_open(8, 2, true);
	struct ctg_extent ranges[CTG_CMA_MAX_RANGES + 1] = {
		{at(0), BLOCK}, {at(2 * BLOCK), BLOCK}, {at(BLOCK), 2 * BLOCK}};
	struct ctg_cma_config config = {.name = "a", .ranges = ranges, .nr_ranges = 3};
	struct ctg_cma *cma = NULL;
	struct snapshot *before = snapshot_take(l);

	(void)state;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), -CTG_EINVAL); /* overlap */
	config.nr_ranges = 0;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), -CTG_EINVAL);
	config.nr_ranges = CTG_CMA_MAX_RANGES + 1;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), -CTG_EINVAL);
	config.nr_ranges = 2;
	config.order_per_bit = CTG_PAGEBLOCK_ORDER + 1;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), -CTG_EINVAL);
	config.order_per_bit = 0;
	config.ranges = NULL;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), -CTG_EINVAL);
	config.ranges = ranges;
	assert_int_equal(ctg_cma_create(NULL, &config, &cma), -CTG_EINVAL);
	assert_int_equal(ctg_cma_create(l->ctg, NULL, &cma), -CTG_EINVAL);
	assert_null(cma);
	/* The second range is bad: the first is not taken either. */
	ranges[1].pfn = at(8 * BLOCK);
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), -CTG_EINVAL);
	snapshot_check(l, before, true);
	ranges[1].pfn = at(2 * BLOCK);
	assert_int_equal(ctg_cma_create(l->ctg, &config, NULL), 0);
	lend_close(l);
}

static int count_areas(struct ctg_cma *cma, void *arg)
{
	unsigned *n = arg;
	char name[8];

	snprintf(name, sizeof(name), "a%u", *n);
	assert_string_equal(ctg_cma_name(cma), name);
	return ++*n == 5 ? 77 : 0;
}

static int always_zero(struct ctg_cma *cma, void *arg)
{
	(void)cma;
	++*(unsigned *)arg;
	return 0;
}

static void test_many_areas(void **state)
{
	struct lend *l = lend_open(CTG_MAX_AREAS + 1, 1, true);
	char name[8];
	unsigned n = 0;

	(void)state;
	for (unsigned i = 0; i < CTG_MAX_AREAS; i++) {
		snprintf(name, sizeof(name), "a%u", i);
		assert_int_equal(create(l, name, at(i * BLOCK), BLOCK), 0);
	}
	assert_int_equal(create(l, "more", at(CTG_MAX_AREAS * BLOCK), BLOCK), -CTG_ENOSPC);
	assert_int_equal(ctg_cma_for_each(l->ctg, count_areas, &n), 77);
	assert_int_equal(n, 5);
	n = 0;
	assert_int_equal(ctg_cma_for_each(l->ctg, always_zero, &n), 0);
	assert_int_equal(n, CTG_MAX_AREAS);
	assert_int_equal(ctg_cma_for_each(NULL, always_zero, &n), -CTG_EINVAL);
	assert_int_equal(ctg_cma_for_each(l->ctg, NULL, &n), -CTG_EINVAL);
	assert_null(ctg_cma_name(NULL));
	ctg_cma_stat(NULL, NULL);
	lend_close(l);
}

/* The area's memory serves movable requests, and only these. */
static void test_lends_at_once(void **state)
{
	struct lend *l = lend_open(2, 0, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 0);
	ctg_pfn_t pfn;

	(void)state;
	assert_int_equal(ctg_alloc_frames(l->ctg, 0, 0, &pfn), -CTG_ENOMEM);
	assert_int_equal(
		ctg_alloc_frames(l->ctg, 0, CTG_GFP_MOVABLE | CTG_GFP_NO_CMA, &pfn), -CTG_ENOMEM);
	fill(l, 2 * BLOCK);
	assert_int_equal(stat_of(cma).nr_lent, 2 * BLOCK);
	assert_int_equal(stat_of(cma).nr_free, 0);
	assert_int_equal(l->zone->blocks[0].migratetype, CTG_MIGRATE_CMA);
	lend_close(l);
}

/* ---- requests -------------------------------------------------------------------------------- */

static void test_bad_requests_count_nothing(void **state)
{
	struct lend *l = lend_open(4, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 2);
	struct ctg_alloc_report report;
	struct ctg_alloc_request bad[] = {
		{.mode = (enum ctg_mode)(CTG_MODE_FAST + 1)}, {.flags = 4}, {.flags = 1u << 31},
		{.align_order = 52}, {.align_order = UINT32_MAX}, {.boundary = 3},
		{.boundary = 4}, /* less than 5, rounded up to 8 */
	};
	struct snapshot *before = snapshot_take(l);
	struct ctg_counters counters;
	ctg_pfn_t pfn = 42;

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		memset(&report, 0xff, sizeof(report));
		bad[i].report = &report;
		assert_int_equal(ctg_cma_alloc(cma, 5, &bad[i], &pfn), -CTG_EINVAL);
		assert_int_equal(report.result, -CTG_EINVAL);
		assert_int_equal(report.windows_tried, 0);
		assert_int_equal(report.obstacle_pfn, CTG_PFN_NONE);
	}
	assert_int_equal(ctg_cma_alloc(NULL, 1, NULL, &pfn), -CTG_EINVAL);
	assert_int_equal(ctg_cma_alloc(cma, 0, NULL, &pfn), -CTG_EINVAL);
	assert_int_equal(ctg_cma_alloc(cma, 1, NULL, NULL), -CTG_EINVAL);
	assert_int_equal(pfn, 42);
	ctg_counters_read(l->ctg, &counters);
	assert_int_equal(counters.cma_alloc_success + counters.cma_alloc_fail, 0);
	assert_int_equal(stat_of(cma).alloc_fail, 0);
	assert_int_equal(l->nr_events, 0);
	snapshot_check(l, before, true);
	lend_close(l);
}

static void test_too_large_fails_at_once(void **state)
{
	struct lend *l = lend_open(4, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	ctg_pfn_t pfn = 42, got;

	(void)state;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK + 1, &request, &pfn), -CTG_ENOMEM);
	assert_int_equal(ctg_cma_alloc(cma, UINT64_MAX, &request, &pfn), -CTG_ENOMEM);
	got = alloc_ok(cma, 2 * BLOCK, NULL);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK + 1, &request, &pfn), -CTG_ENOMEM);
	assert_int_equal(report.result, -CTG_ENOMEM);
	assert_int_equal(report.windows_tried, 0);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_NONE);
	assert_int_equal(pfn, 42);
	assert_int_equal(stat_of(cma).alloc_fail, 3);
	release_ok(cma, got, 2 * BLOCK);
	release_ok(cma, alloc_ok(cma, 4 * BLOCK, NULL), 4 * BLOCK);
	lend_close(l);
}

static void test_rounds_up_to_bits(void **state)
{
	struct lend *l = lend_open(8, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 1, 7, 3);
	struct ctg_alloc_request aligned = {.align_order = 12};
	ctg_pfn_t pfn = alloc_ok(cma, 9, NULL), big;

	(void)state;
	assert_int_equal(pfn % 8, 0);
	check_taken(l, pfn, 16, true);
	assert_int_equal(stat_of(cma).nr_allocated, 16);
	assert_int_equal(stat_of(cma).frames_allocated, 16);
	/* The area begins at 9 pageblocks: aligned to 8 is not at its start. */
	assert_int_equal(ctg_cma_alloc(cma, 1, &aligned, &big), -CTG_ENOMEM);
	aligned.align_order = 11;
	big = alloc_ok(cma, 1, &aligned);
	assert_int_equal(big, 12 * BLOCK);
	release_ok(cma, pfn, 9);
	release_ok(cma, big, 8);
	assert_int_equal(stat_of(cma).nr_allocated, 0);
	assert_int_equal(stat_of(cma).frames_released, 24);
	lend_close(l);
}

static void test_limit_and_boundary(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_alloc_request request = {.limit = at(600)};
	ctg_pfn_t pfn[3];

	(void)state;
	fill(l, 8 * BLOCK);
	pfn[0] = alloc_ok(cma, 600, &request);
	assert_int_equal(pfn[0], at(0));
	assert_int_equal(ctg_cma_alloc(cma, 1, &request, &pfn[1]), -CTG_ENOMEM);
	request = (struct ctg_alloc_request){.boundary = 1024};
	pfn[1] = alloc_ok(cma, 1000, &request);
	assert_int_equal(pfn[1] / 1024, (pfn[1] + 999) / 1024);
	pfn[2] = alloc_ok(cma, 1024, &request);
	assert_int_equal(pfn[2] % 1024, 0);
	check_stamps(l);
	release_ok(cma, pfn[0], 600);
	release_ok(cma, pfn[1], 1000);
	release_ok(cma, pfn[2], 1024);
	lend_close(l);
}

/* From an idle area: nothing is isolated, copied or moved. */
static void test_idle_area(void **state)
{
	struct lend *l = lend_open(8, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	ctg_pfn_t pfn = alloc_ok(cma, 3 * BLOCK + 7, &request);

	(void)state;
	check_taken(l, pfn, 3 * BLOCK + 7, true);
	assert_int_equal(report.result, 0);
	assert_int_equal(report.windows_tried, 1);
	assert_int_equal(report.frames_moved, 0);
	assert_int_equal(report.frames_free, 3 * BLOCK + 7);
	assert_int_equal(report.ns_isolate + report.ns_copy + report.ns_install, 0);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_NONE);
	assert_int_equal(report.obstacle_pfn, CTG_PFN_NONE);
	release_ok(cma, pfn, 3 * BLOCK + 7);
	assert_int_equal(stat_of(cma).longest_free, 8 * BLOCK);
	lend_close(l);
}

static void test_takes_back_what_is_lent(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 8 * BLOCK);
	pfn = alloc_ok(cma, 4 * BLOCK + 100, &request);
	check_taken(l, pfn, 4 * BLOCK + 100, true);
	assert_int_equal(report.frames_moved, 4 * BLOCK + 100);
	assert_int_equal(report.frames_free, 0);
	assert_int_equal(stat_of(cma).frames_moved, 4 * BLOCK + 100);
	assert_int_equal(stat_of(cma).nr_allocated, 4 * BLOCK + 100);
	assert_int_equal(nr_lent_pages(l), 8 * BLOCK);
	check_stamps(l);
	check_no_isolation(l);
	release_ok(cma, pfn, 4 * BLOCK + 100);
	assert_int_equal(stat_of(cma).nr_free, 4 * BLOCK + 100);
	lend_close(l);
}

/* The cheapest window, not the first; first fit to compare with. */
static void test_least_cost_and_first_fit(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 8 * BLOCK);
	unlend(l, at(4 * BLOCK), 2 * BLOCK - 3);
	pfn = alloc_ok(cma, 2 * BLOCK, &request);
	assert_int_equal(pfn, at(4 * BLOCK));
	assert_int_equal(report.frames_moved, 3);
	assert_int_equal(report.frames_free, 2 * BLOCK - 3);
	release_ok(cma, pfn, 2 * BLOCK);
	request.flags = CTG_ALLOC_FIRST_FIT;
	pfn = alloc_ok(cma, 2 * BLOCK, &request);
	assert_int_equal(pfn, at(0));
	assert_int_equal(report.frames_moved, 2 * BLOCK);
	release_ok(cma, pfn, 2 * BLOCK);
	lend_close(l);
}

/* ---- zeroing --------------------------------------------------------------------------------- */

static uint64_t zeroed_frames(struct lend *l)
{
	struct ctg_counters counters;

	ctg_counters_read(l->ctg, &counters);
	return counters.frames_zeroed;
}

static void test_zeroes_only_what_is_not(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_extent range = {at(0), 8 * BLOCK};
	struct ctg_cma_config config = {
		.name = "a", .ranges = &range, .nr_ranges = 1, .zeroed = true};
	struct ctg_alloc_request no_zero = {.flags = CTG_ALLOC_NO_ZERO};
	struct ctg_cma *cma;
	uint64_t zeroed;
	ctg_pfn_t pfn;

	(void)state;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	pfn = alloc_ok(cma, 8 * BLOCK, NULL);
	assert_int_equal(zeroed_frames(l), 0);
	memset(ctg_sim_frame(l->sim, pfn + 3 * BLOCK), 0xff, 2 * BLOCK * CTG_PAGE_SIZE);
	/* Four frames that are not zero any more, among others that nobody touched. */
	release_ok(cma, pfn, 8 * BLOCK);
	zeroed = zeroed_frames(l);
	pfn = alloc_ok(cma, 8 * BLOCK, NULL);
	check_taken(l, pfn, 8 * BLOCK, true);
	assert_int_equal(zeroed_frames(l) - zeroed, 8 * BLOCK);
	memset(ctg_sim_frame(l->sim, pfn), 0xee, CTG_PAGE_SIZE);
	release_ok(cma, pfn, 8 * BLOCK);
	zeroed = zeroed_frames(l);
	pfn = alloc_ok(cma, 8 * BLOCK, &no_zero);
	assert_int_equal(zeroed_frames(l), zeroed);
	assert_int_equal(*(unsigned char *)ctg_sim_frame(l->sim, pfn), 0xee);
	release_ok(cma, pfn, 8 * BLOCK);
	lend_close(l);
}

/* Known per piece: a pageblock that was used does not make its neighbours be zeroed. */
static void test_zero_is_known_by_pageblock(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_extent range = {at(0), 8 * BLOCK};
	struct ctg_cma_config config = {
		.name = "a", .ranges = &range, .nr_ranges = 1, .zeroed = true};
	ctg_pfn_t pair, four, dirty;
	struct ctg_cma *cma;
	uint64_t zeroed;

	(void)state;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	/* A page lent in one pageblock keeps its buddy from merging with what is zero. */
	assert_int_equal(lend_small(l, 1), 1);
	pair = page_at(l, BLOCK) & ~(2 * BLOCK - 1);
	four = pair & ~(4 * BLOCK - 1);
	dirty = ctg_block_start(page_at(l, BLOCK)) ^ BLOCK;
	assert_int_equal(ctg_alloc_contig_range(l->ctg, dirty, BLOCK, NULL), 0);
	memset(ctg_sim_frame(l->sim, dirty), 0xff, BLOCK * CTG_PAGE_SIZE);
	assert_int_equal(ctg_free_contig_range(l->ctg, dirty, BLOCK, NULL), 0);
	zeroed = zeroed_frames(l);
	assert_int_equal(ctg_alloc_contig_range(l->ctg, four, 4 * BLOCK, NULL), 0);
	check_taken(l, four, 4 * BLOCK, true);
	assert_int_equal(zeroed_frames(l) - zeroed, 2 * BLOCK);
	check_stamps(l);
	lend_close(l);
}

static void test_discarded_memory_reads_as_zero(void **state)
{
	struct ctg_zone_config zone = {
		.base = 64 * BLOCK, .nr = 4 * BLOCK, .flags = CTG_ZONE_DISCARD};
	struct lend *l = lend_open(1, 1, true);
	struct ctg_extent range = {zone.base, zone.nr};
	struct ctg_cma_config config = {.name = "a", .ranges = &range, .nr_ranges = 1};
	struct ctg_cma *cma;
	ctg_pfn_t pfn;
	uint64_t zeroed;

	(void)state;
	assert_int_equal(ctg_sim_add_zone(l->sim, &zone, true, NULL), 0);
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	pfn = alloc_ok(cma, 4 * BLOCK, NULL);
	zeroed = zeroed_frames(l);
	assert_int_equal(zeroed, 4 * BLOCK);
	memset(ctg_sim_frame(l->sim, pfn), 0xff, 4 * BLOCK * CTG_PAGE_SIZE);
	release_ok(cma, pfn, 4 * BLOCK);
	pfn = alloc_ok(cma, 4 * BLOCK, NULL);
	assert_int_equal(zeroed_frames(l), zeroed);
	for (uint64_t i = 0; i < 4 * BLOCK; i++)
		assert_int_equal(*(unsigned char *)ctg_sim_frame(l->sim, pfn + i), 0);
	release_ok(cma, pfn, 4 * BLOCK);
	lend_close(l);
}

/* ---- what stands in the way ------------------------------------------------------------------ */

static void test_busy_names_the_pin(void **state)
{
	struct lend *l = lend_open(4, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	struct snapshot *before;
	ctg_pfn_t pfn = 42;

	(void)state;
	fill(l, 4 * BLOCK);
	pin(l, at(2 * BLOCK + 7));
	before = snapshot_take(l);
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_int_equal(report.result, -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, at(2 * BLOCK + 7));
	assert_int_equal(ctg_word_pin(report.obstacle_word), 1);
	assert_int_equal(report.windows_tried, 1);
	assert_int_equal(report.frames_moved, 0);
	assert_int_equal(pfn, 42);
	snapshot_check(l, before, true);
	/* NORMAL waits a little, and does not move the others in vain. */
	before = snapshot_take(l);
	request.mode = CTG_MODE_NORMAL;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, at(2 * BLOCK + 7));
	assert_int_equal(report.windows_tried, 2);
	assert_int_equal(report.frames_moved, 0);
	snapshot_check(l, before, true);
	unpin(l, at(2 * BLOCK + 7));
	pfn = alloc_ok(cma, 4 * BLOCK, &request);
	check_stamps(l);
	release_ok(cma, pfn, 4 * BLOCK);
	lend_close(l);
}

/* After -EBUSY the search goes on elsewhere, and a pinned window is the last resort. */
static void goes_elsewhere(enum ctg_mode mode)
{
	struct lend *l = lend_open(6, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 6, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = mode};
	ctg_pfn_t pfn;

	fill(l, 6 * BLOCK);
	unlend(l, at(0), BLOCK); /* cheapest, but for the pin */
	pin(l, at(BLOCK + 300));
	pfn = alloc_ok(cma, 2 * BLOCK, &request);
	assert_int_equal(report.windows_tried, 2);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, at(BLOCK + 300));
	assert_true(pfn > at(BLOCK + 300));
	assert_int_equal(report.frames_moved, 2 * BLOCK); /* none for the first window */
	check_stamps(l);
	release_ok(cma, pfn, 2 * BLOCK);
	unpin(l, at(BLOCK + 300));
	lend_close(l);
}

static void test_goes_elsewhere(void **state)
{
	(void)state;
	goes_elsewhere(CTG_MODE_FAST);
	goes_elsewhere(CTG_MODE_NORMAL);
}

/* As many windows as obstacles, none looked at twice. */
static void test_remembers_every_obstacle(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 8, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	unsigned seen = 0;
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 8 * BLOCK);
	for (unsigned i = 0; i < 8; i++)
		pin(l, at(i * BLOCK + 100));
	l->nr_events = 0;
	assert_int_equal(ctg_cma_alloc(cma, BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_in_range(report.windows_tried, 1, 8);
	for (unsigned i = 0; i < l->nr_events; i++) {
		uint64_t offset = l->events[i].pfn - LEND_BASE;

		if (l->events[i].kind != CTG_EVENT_CMA_ALLOC_BUSY)
			continue;
		assert_int_equal(offset % BLOCK, 100);
		assert_int_equal(seen >> (offset / BLOCK) & 1, 0);
		seen |= 1u << (offset / BLOCK);
	}
	/* One frame less than lies between two pins is always to be had. */
	pfn = alloc_ok(cma, BLOCK - 1, &request);
	release_ok(cma, pfn, BLOCK - 1);
	for (unsigned i = 0; i < 8; i++)
		unpin(l, at(i * BLOCK + 100));
	lend_close(l);
}

/* More obstacles than can be remembered one by one: it still ends, and still finds the gap. */
static void test_more_obstacles_than_memory(void **state)
{
	struct lend *l = lend_open(2, 8, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 0);
	struct ctg_alloc_request request = {.mode = CTG_MODE_FAST};
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 2 * BLOCK);
	for (unsigned i = 0; i < 2 * BLOCK; i += 4)
		pin(l, at(i));
	assert_int_equal(ctg_cma_alloc(cma, 4, &request, &pfn), -CTG_EBUSY);
	request.mode = CTG_MODE_NORMAL;
	assert_int_equal(ctg_cma_alloc(cma, 4, &request, &pfn), -CTG_EBUSY);
	pfn = alloc_ok(cma, 3, &request);
	assert_int_equal(pfn % 4, 1);
	release_ok(cma, pfn, 3);
	for (unsigned i = 0; i < 2 * BLOCK; i += 4)
		unpin(l, at(i));
	check_stamps(l);
	lend_close(l);
}

static void test_no_room(void **state)
{
	struct lend *l = lend_open(4, 0, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct snapshot *before;
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 4 * BLOCK);
	before = snapshot_take(l);
	assert_int_equal(ctg_cma_alloc(cma, BLOCK, &request, &pfn), -CTG_ENOMEM);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_NO_MEMORY);
	assert_in_range(report.obstacle_pfn, at(0), at(4 * BLOCK - 1));
	snapshot_check(l, before, true);
	/* Room for what has to move, elsewhere in the area. */
	unlend(l, at(3 * BLOCK), BLOCK);
	request.limit = at(3 * BLOCK);
	pfn = alloc_ok(cma, BLOCK, &request);
	assert_int_equal(report.frames_moved, BLOCK);
	check_stamps(l);
	release_ok(cma, pfn, BLOCK);
	lend_close(l);
}

static void test_deadline_and_cancel(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0);
	struct ctg_alloc_report report;
	struct ctg_word32 cancel = {0};
	struct ctg_alloc_request request = {.report = &report, .deadline = 1000, .cancel = &cancel};
	struct snapshot *before;
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 4 * BLOCK);
	pin(l, at(3));
	before = snapshot_take(l);
	/* It waits for the pin, in vain, until the deadline. */
	ctg_sim_advance(l->sim, 500);
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &request, &pfn), -CTG_ETIMEDOUT);
	assert_int_equal(report.result, -CTG_ETIMEDOUT);
	assert_int_equal(report.obstacle_pfn, at(3));
	snapshot_check(l, before, false);
	unpin(l, at(3));
	before = snapshot_take(l);
	ctg_sim_advance(l->sim, 1000);
	assert_int_equal(ctg_cma_alloc(cma, BLOCK, &request, &pfn), -CTG_ETIMEDOUT);
	request.deadline = 0;
	cancel.v = 1;
	assert_int_equal(ctg_cma_alloc(cma, BLOCK, &request, &pfn), -CTG_EINTR);
	assert_int_equal(report.windows_tried, 0);
	snapshot_check(l, before, true);
	cancel.v = 0;
	release_ok(cma, alloc_ok(cma, BLOCK, &request), BLOCK);
	lend_close(l);
}

/* A frame in a CPU's cache: NORMAL drains, FAST says so. */
static void test_cached_frames(void **state)
{
	struct lend *l = lend_open(2, 2, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 2, 0);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report, .mode = CTG_MODE_FAST};
	ctg_pfn_t pfn;

	(void)state;
	fill(l, 2 * BLOCK);
	assert_int_equal(ctg_munmap(l->mm, lend_frame(l, at(77))->index, 1), 0);
	assert_int_equal(state_of(l, at(77)), CTG_FRAME_PCP);
	assert_int_equal(ctg_cma_alloc(cma, 2 * BLOCK, &request, &pfn), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_CACHED);
	assert_int_equal(report.obstacle_pfn, at(77));
	request.mode = CTG_MODE_NORMAL;
	pfn = alloc_ok(cma, 2 * BLOCK, &request);
	assert_int_equal(report.frames_free, 1);
	release_ok(cma, pfn, 2 * BLOCK);
	check_stamps(l);
	lend_close(l);
}

/* ---- several areas, statistics --------------------------------------------------------------- */

static void test_areas_are_apart(void **state)
{
	struct lend *l = lend_open(8, 4, true);
	struct ctg_cma *a = lend_area(l, "a", 0, 4, 0), *b = lend_area(l, "b", 4, 4, 0);
	ctg_pfn_t in_a = alloc_ok(a, 4 * BLOCK, NULL), in_b = alloc_ok(b, 4 * BLOCK, NULL);

	(void)state;
	assert_int_equal(in_a, at(0));
	assert_int_equal(in_b, at(4 * BLOCK));
	refuse(l, a, in_b, 1);
	refuse(l, b, in_a, 1);
	refuse(l, a, in_a + 3 * BLOCK, 2 * BLOCK);
	release_ok(a, in_a, 4 * BLOCK);
	assert_int_equal(stat_of(b).nr_allocated, 4 * BLOCK);
	release_ok(b, in_b, 4 * BLOCK);
	lend_close(l);
}

static void test_longest_runs_are_exact(void **state)
{
	struct lend *l = lend_open(6, 1, true);
	struct ctg_cma *cma = lend_area(l, "a", 0, 4, 0), *coarse = lend_area(l, "b", 4, 2, 4);
	ctg_pfn_t pfn;

	(void)state;
	assert_int_equal(stat_of(cma).longest_free, 4 * BLOCK);
	assert_int_equal(stat_of(coarse).longest_free, 2 * BLOCK);
	fill(l, 6 * BLOCK);
	assert_int_equal(stat_of(cma).longest_free, 0);
	assert_int_equal(stat_of(cma).longest_unallocated, 4 * BLOCK);
	unlend(l, at(100), 333);
	unlend(l, at(2 * BLOCK - 50), 120);
	assert_int_equal(stat_of(cma).longest_free, 333);
	unlend(l, at(433), 2 * BLOCK - 50 - 433);
	assert_int_equal(stat_of(cma).longest_free, 2 * BLOCK + 70 - 100);
	/* 46 frames from 7 on hold two whole bits of 16, 47 from 1 on as well, 48 from 16 on three.
	 */
	unlend(l, at(4 * BLOCK + 7), 46);
	assert_int_equal(stat_of(coarse).longest_free, 32);
	unlend(l, at(4 * BLOCK + 129), 47);
	assert_int_equal(stat_of(coarse).longest_free, 32);
	unlend(l, at(4 * BLOCK + 256), 48);
	assert_int_equal(stat_of(coarse).longest_free, 48);
	/* Exactly so much can be had without a copy. */
	pfn = alloc_ok(cma, 2 * BLOCK - 30, NULL);
	assert_int_equal(stat_of(cma).frames_moved, 0);
	assert_int_equal(stat_of(cma).longest_unallocated, 4 * BLOCK - (2 * BLOCK + 70));
	release_ok(cma, pfn, 2 * BLOCK - 30);
	lend_close(l);
}

static void test_several_ranges(void **state)
{
	struct lend *l = lend_open(8, 8, true);
	struct ctg_extent ranges[] = {{at(5 * BLOCK), 3 * BLOCK}, {at(0), 2 * BLOCK}};
	struct ctg_cma_config config = {.name = "two", .ranges = ranges, .nr_ranges = 2};
	struct ctg_cma *cma;
	struct ctg_cma_stat stat;
	ctg_pfn_t a, b, c;

	(void)state;
	assert_int_equal(ctg_cma_create(l->ctg, &config, &cma), 0);
	stat = stat_of(cma);
	assert_int_equal(stat.nr, 5 * BLOCK);
	assert_int_equal(stat.nr_ranges, 2);
	assert_int_equal(stat.longest_unallocated, 3 * BLOCK);
	assert_memory_equal(stat.ranges, ranges, sizeof(ranges));
	fill(l, 5 * BLOCK);
	a = alloc_ok(cma, 2 * BLOCK, NULL);
	b = alloc_ok(cma, 2 * BLOCK, NULL);
	assert_true((a < at(2 * BLOCK)) != (b < at(2 * BLOCK)));
	c = alloc_ok(cma, BLOCK, NULL);
	assert_int_equal(stat_of(cma).nr_allocated, 5 * BLOCK);
	assert_int_equal(ctg_cma_alloc(cma, 1, NULL, &c), -CTG_ENOMEM);
	check_stamps(l);
	lend_close(l);
}

/* The counters, the area's and the machine's, say what the trace says. */
static void test_counters_agree_with_trace(void **state)
{
	struct lend *l = lend_open(4, 4, true);
	struct ctg_cma *cma = lend_area(l, "traced", 0, 4, 3);
	uint64_t started = 0, finished = 0, failed = 0, busy = 0, taken = 0, given = 0, moved = 0;
	struct ctg_alloc_report report;
	struct ctg_alloc_request fast = {.mode = CTG_MODE_FAST, .report = &report};
	uint64_t tried = 0;
	struct ctg_counters counters;
	struct ctg_cma_stat stat;
	ctg_pfn_t pfn, other;

	(void)state;
	fill(l, 4 * BLOCK);
	pfn = alloc_ok(cma, 70, &fast);
	tried += report.windows_tried;
	pin(l, at(4 * BLOCK - 1));
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK - 72, &fast, &other), -CTG_EBUSY);
	tried += report.windows_tried;
	assert_int_equal(ctg_cma_alloc(cma, 4 * BLOCK, &fast, &other), -CTG_ENOMEM);
	unpin(l, at(4 * BLOCK - 1));
	release_ok(cma, pfn, 70);
	for (unsigned i = 0; i < l->nr_events; i++) {
		const struct ctg_event *event = &l->events[i];

		if (event->kind == CTG_EVENT_MIGRATE) {
			moved += event->nr;
			continue;
		}
		assert_string_equal(event->area, "traced");
		started += event->kind == CTG_EVENT_CMA_ALLOC_START;
		busy += event->kind == CTG_EVENT_CMA_ALLOC_BUSY;
		if (event->kind == CTG_EVENT_CMA_RELEASE)
			given += event->nr;
		if (event->kind != CTG_EVENT_CMA_ALLOC_FINISH)
			continue;
		finished++;
		failed += (int64_t)event->value < 0;
		assert_int_equal(event->pfn == CTG_PFN_NONE, (int64_t)event->value < 0);
		if (event->value == 0)
			taken += event->nr;
	}
	ctg_counters_read(l->ctg, &counters);
	stat = stat_of(cma);
	assert_int_equal(started, 3);
	assert_int_equal(finished, 3);
	assert_int_equal(failed, 2);
	assert_int_equal(busy + 1, tried); /* each window but the one that was taken */
	assert_int_equal(counters.cma_alloc_success, 1);
	assert_int_equal(counters.cma_alloc_fail, failed);
	assert_int_equal(stat.alloc_success, 1);
	assert_int_equal(stat.alloc_fail, failed);
	assert_int_equal(taken, 72);
	assert_int_equal(given, 72);
	assert_int_equal(counters.cma_frames_allocated, taken);
	assert_int_equal(counters.cma_frames_released, given);
	assert_int_equal(stat.frames_allocated, taken);
	assert_int_equal(stat.frames_released, given);
	assert_int_equal(counters.frames_migrated, moved);
	assert_int_equal(stat.frames_moved, moved);
	lend_close(l);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_create_refuses),
		cmocka_unit_test(test_create_refuses_configs),
		cmocka_unit_test(test_many_areas),
		cmocka_unit_test(test_lends_at_once),
		cmocka_unit_test(test_bad_requests_count_nothing),
		cmocka_unit_test(test_too_large_fails_at_once),
		cmocka_unit_test(test_rounds_up_to_bits),
		cmocka_unit_test(test_limit_and_boundary),
		cmocka_unit_test(test_idle_area),
		cmocka_unit_test(test_takes_back_what_is_lent),
		cmocka_unit_test(test_least_cost_and_first_fit),
		cmocka_unit_test(test_zeroes_only_what_is_not),
		cmocka_unit_test(test_zero_is_known_by_pageblock),
		cmocka_unit_test(test_discarded_memory_reads_as_zero),
		cmocka_unit_test(test_busy_names_the_pin),
		cmocka_unit_test(test_goes_elsewhere),
		cmocka_unit_test(test_remembers_every_obstacle),
		cmocka_unit_test(test_more_obstacles_than_memory),
		cmocka_unit_test(test_no_room),
		cmocka_unit_test(test_deadline_and_cancel),
		cmocka_unit_test(test_cached_frames),
		cmocka_unit_test(test_areas_are_apart),
		cmocka_unit_test(test_longest_runs_are_exact),
		cmocka_unit_test(test_several_ranges),
		cmocka_unit_test(test_counters_agree_with_trace),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
