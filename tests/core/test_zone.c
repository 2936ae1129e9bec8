/* SPDX-License-Identifier: MIT */
/* Machines and zones: making them, what bad input does, what they report. */
#include "zone_check.h"

#include <sys/mman.h>

static struct ctg_sim *new_sim(void)
{
	struct ctg_sim *sim = NULL;

	assert_int_equal(ctg_sim_create(NULL, &sim), 0);
	return sim;
}

static void create_wants_a_complete_port(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg_port port = *ctg_port_of(ctg_sim_machine(sim));
	struct ctg *ctg = NULL;

	(void)state;
#define WITHOUT(hook)                                                                              \
	do {                                                                                       \
		struct ctg_port bad = port;                                                        \
		bad.hook = NULL;                                                                   \
		assert_int_equal(ctg_create(&bad, &ctg), -CTG_EINVAL);                             \
	} while (0)
	WITHOUT(meta_alloc);
	WITHOUT(meta_free);
	WITHOUT(cpu);
	WITHOUT(now);
	WITHOUT(wait);
	WITHOUT(wake);
	WITHOUT(relax);
	WITHOUT(copy);
	WITHOUT(zero);
	WITHOUT(tlb_restrict);
	WITHOUT(tlb_install);
#undef WITHOUT
	assert_int_equal(ctg_create(NULL, &ctg), -CTG_EINVAL);
	assert_int_equal(ctg_create(&port, NULL), -CTG_EINVAL);
	port.nr_cpus = 0;
	assert_int_equal(ctg_create(&port, &ctg), -CTG_EINVAL);
	port.nr_cpus = CTG_MAX_CPUS + 1;
	assert_int_equal(ctg_create(&port, &ctg), -CTG_EINVAL);
	assert_null(ctg);
	port.nr_cpus = CTG_MAX_CPUS;
	port.batch_pages = CTG_PAGEBLOCK_FRAMES + 1;
	assert_int_equal(ctg_create(&port, &ctg), -CTG_EINVAL);
	port.batch_pages = CTG_MAX_BATCH_PAGES + CTG_PAGEBLOCK_FRAMES;
	assert_int_equal(ctg_create(&port, &ctg), -CTG_EINVAL);
	port.batch_pages = CTG_MAX_BATCH_PAGES;
	port.discard = NULL;
	port.trace = NULL;
	assert_int_equal(ctg_create(&port, &ctg), 0);
	assert_memory_equal(ctg_port_of(ctg), &port, sizeof(port));
	ctg_destroy(ctg);
	ctg_destroy(NULL);
	ctg_sim_destroy(sim);
}

static void every_allocation_failed_in_turn(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg_port port = *ctg_port_of(ctg_sim_machine(sim));
	uint64_t before = ctg_sim_meta_bytes(sim);
	void *metadata = aligned_alloc(4096, (ctg_zone_metadata_bytes(BLOCK) + 4095) & ~4095u);
	struct ctg_zone_config config = {.base = 0, .nr = BLOCK, .metadata = metadata};
	unsigned failures = 0;
	int ret = -1;

	(void)state;
	assert_non_null(metadata);
	memset(metadata, 0, ctg_zone_metadata_bytes(BLOCK));
	for (uint64_t nth = 1; ret != 0; nth++) {
		struct ctg *ctg = NULL;
		struct ctg_zone *zone = NULL;

		ctg_sim_fail(sim, CTG_SIM_META_ALLOC, nth);
		ret = ctg_create(&port, &ctg);
		if (ret == 0)
			ret = ctg_zone_add(ctg, &config, &zone);
		if (ret != 0) {
			assert_int_equal(ret, -CTG_ENOMEM);
			assert_null(zone);
			failures++;
		}
		ctg_destroy(ctg);
		assert_int_equal(ctg_sim_meta_bytes(sim), before);
	}
	assert_int_equal(failures, 3); /* the machine, its accounts of pins, the zone */
	free(metadata);
	ctg_sim_destroy(sim);
}

static void metadata_is_small(void **state)
{
	(void)state;
	assert_int_equal(ctg_zone_metadata_bytes(0), 0);
	assert_int_equal(ctg_zone_metadata_bytes(1), 0);
	assert_int_equal(ctg_zone_metadata_bytes(BLOCK + 1), 0);
	assert_int_equal(ctg_zone_metadata_bytes((uint64_t)1 << 32), 0);
	assert_int_equal(ctg_zone_metadata_bytes(UINT64_MAX - BLOCK + 1), 0);
	assert_int_not_equal(ctg_zone_metadata_bytes(((uint64_t)1 << 32) - BLOCK), 0);
	for (uint64_t blocks = 1; blocks < 5000; blocks += blocks < 70 ? 1 : 97) {
		uint64_t frames = blocks * BLOCK * CTG_FRAME_METADATA_BYTES;
		uint64_t bytes = ctg_zone_metadata_bytes(blocks * BLOCK);

		assert_true(bytes > frames);
		assert_true((bytes - frames) * 1000 < frames * 4);
	}
}

static void add_refuses_bad_zones(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg *ctg = ctg_sim_machine(sim);
	_Alignas(64) static unsigned char space[64]; /* never touched by what is refused */
	struct ctg_zone_config good = {.base = 8 * BLOCK, .nr = 4 * BLOCK};
	struct ctg_zone *zone = NULL, *other = NULL;
	struct ctg_zone_config bad[] = {
		{.base = 1, .nr = BLOCK},
		{.base = 0, .nr = 0},
		{.base = 0, .nr = BLOCK - 1},
		{.base = 0, .nr = (uint64_t)1 << 32},
		{.base = UINT64_MAX - BLOCK + 1, .nr = BLOCK},
		{.base = ((uint64_t)1 << 52) - BLOCK, .nr = 2 * BLOCK},
		{.base = (uint64_t)1 << 52, .nr = BLOCK},
		{.base = 0, .nr = BLOCK, .map_order = 1},
		{.base = 0, .nr = BLOCK, .map_order = CTG_MAX_ORDER},
		{.base = 0, .nr = BLOCK, .flags = 1u << 7},
		{.base = 8 * BLOCK, .nr = 4 * BLOCK},
		{.base = 7 * BLOCK, .nr = 2 * BLOCK},
		{.base = 11 * BLOCK, .nr = 2 * BLOCK},
		{.base = 9 * BLOCK, .nr = BLOCK},
		{.base = 0, .nr = 100 * BLOCK},
	};

	(void)state;
	assert_int_equal(ctg_sim_add_zone(sim, &good, false, &zone), 0);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		bad[i].metadata = space;
		assert_int_equal(ctg_zone_add(ctg, &bad[i], &other), -CTG_EINVAL);
	}
	bad[0] = (struct ctg_zone_config){.base = 0, .nr = BLOCK, .metadata = space + 32};
	assert_int_equal(ctg_zone_add(ctg, &bad[0], &other), -CTG_EINVAL);
	bad[0].metadata = NULL;
	assert_int_equal(ctg_zone_add(ctg, &bad[0], &other), -CTG_EINVAL);
	assert_int_equal(ctg_zone_add(ctg, NULL, &other), -CTG_EINVAL);
	assert_int_equal(ctg_zone_add(NULL, &good, &other), -CTG_EINVAL);
	assert_null(other);
	for (ctg_pfn_t base = 12 * BLOCK; ctg->nr_zones < CTG_MAX_ZONES; base += BLOCK) {
		good = (struct ctg_zone_config){.base = base, .nr = BLOCK};
		assert_int_equal(ctg_sim_add_zone(sim, &good, false, &other), 0);
	}
	good = (struct ctg_zone_config){.base = 0, .nr = BLOCK, .metadata = space};
	assert_int_equal(ctg_zone_add(ctg, &good, &other), -CTG_ENOSPC);
	assert_ptr_equal(ctg_zone_of(ctg, 8 * BLOCK), zone);
	assert_ptr_equal(ctg_zone_of(ctg, 12 * BLOCK - 1), zone);
	assert_ptr_not_equal(ctg_zone_of(ctg, 12 * BLOCK), zone);
	assert_null(ctg_zone_of(ctg, 8 * BLOCK - 1));
	assert_null(ctg_zone_of(ctg, UINT64_MAX));
	ctg_sim_destroy(sim);
}

static void discard_flag_wants_the_hook(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg_port port = *ctg_port_of(ctg_sim_machine(sim));
	_Alignas(64) static unsigned char space[64];
	struct ctg_zone_config config = {
		.base = 0, .nr = BLOCK, .flags = CTG_ZONE_DISCARD, .metadata = space};
	struct ctg *ctg = NULL;

	(void)state;
	port.discard = NULL;
	assert_int_equal(ctg_create(&port, &ctg), 0);
	assert_int_equal(ctg_zone_add(ctg, &config, NULL), -CTG_EINVAL);
	ctg_destroy(ctg);
	ctg_sim_destroy(sim);
}

static void populate_and_release_refuse_bad_ranges(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg_zone_config config = {.base = 4 * BLOCK, .nr = 8 * BLOCK};
	struct ctg_zone *zone = NULL;
	const struct ctg_extent bad[] = {{4 * BLOCK, 0}, {4 * BLOCK + 1, BLOCK},
		{4 * BLOCK, BLOCK + 1}, {3 * BLOCK, BLOCK}, {3 * BLOCK, 2 * BLOCK},
		{11 * BLOCK, 2 * BLOCK}, {12 * BLOCK, BLOCK}, {4 * BLOCK, 9 * BLOCK},
		{5 * BLOCK, UINT64_MAX - BLOCK + 1}, {UINT64_MAX - BLOCK + 1, 2 * BLOCK}};
	struct ctg_zone_stat stat;

	(void)state;
	assert_int_equal(ctg_sim_add_zone(sim, &config, false, &zone), 0);
	for (unsigned i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(ctg_zone_populate(zone, bad[i].pfn, bad[i].nr), -CTG_EINVAL);
		assert_int_equal(ctg_zone_release(zone, bad[i].pfn, bad[i].nr, true), -CTG_EINVAL);
		assert_int_equal(ctg_zone_lend(zone, bad[i].pfn, bad[i].nr, CTG_MIGRATE_CMA, true),
			-CTG_EINVAL);
	}
	assert_int_equal(ctg_zone_populate(NULL, 4 * BLOCK, BLOCK), -CTG_EINVAL);
	assert_int_equal(ctg_zone_release(NULL, 4 * BLOCK, BLOCK, true), -CTG_EINVAL);
	/* A hole in the middle, and what was populated or released before: all or nothing. */
	assert_int_equal(ctg_zone_release(zone, 4 * BLOCK, BLOCK, true), -CTG_EINVAL);
	assert_int_equal(ctg_zone_populate(zone, 5 * BLOCK, BLOCK), 0);
	assert_int_equal(ctg_zone_populate(zone, 4 * BLOCK, 3 * BLOCK), -CTG_EINVAL);
	assert_int_equal(ctg_zone_populate(zone, 7 * BLOCK, 2 * BLOCK), 0);
	assert_int_equal(ctg_zone_release(zone, 5 * BLOCK, 3 * BLOCK, true), -CTG_EINVAL);
	ctg_zone_stat(zone, &stat);
	assert_int_equal(stat.nr_present, 3 * BLOCK);
	assert_int_equal(stat.nr_free, 0);
	assert_int_equal(ctg_zone_release(zone, 7 * BLOCK, BLOCK, true), 0);
	assert_int_equal(ctg_zone_release(zone, 7 * BLOCK, 2 * BLOCK, true), -CTG_EINVAL);
	ctg_zone_stat(zone, &stat);
	assert_int_equal(stat.nr_free, BLOCK);
	assert_int_equal(stat.nr_spanned, 8 * BLOCK);
	assert_int_equal(stat.base, 4 * BLOCK);
	ctg_zone_stat(NULL, &stat);
	ctg_zone_stat(zone, NULL);
	check_zone(zone);
	ctg_sim_destroy(sim);
}

/*
 * The metadata of holes is not even read: here it cannot be. Holes lie on either side of memory
 * and in between, at every alignment that merging looks at.
 */
static void holes_are_never_touched(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg *ctg = ctg_sim_machine(sim);
	const uint64_t nr = 64 * BLOCK;
	size_t bytes = ctg_zone_metadata_bytes(nr);
	unsigned char *metadata = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	struct ctg_zone_config config = {.base = 64 * BLOCK, .nr = nr, .metadata = metadata};
	const unsigned memory[] = {1, 4, 5, 6, 7, 16, 17, 35, 62};
	struct ctg_zone *zone = NULL;
	ctg_pfn_t pfn[9 * 2];

	(void)state;
	assert_ptr_not_equal(metadata, MAP_FAILED);
	assert_int_equal(ctg_zone_add(ctg, &config, &zone), 0);
	mprotect(metadata, nr * sizeof(struct ctg_frame), PROT_NONE);
	for (unsigned i = 0; i < 9; i++) {
		ctg_pfn_t at = zone->base + memory[i] * BLOCK;

		mprotect(metadata + memory[i] * BLOCK * sizeof(struct ctg_frame),
			BLOCK * sizeof(struct ctg_frame), PROT_READ | PROT_WRITE);
		assert_int_equal(ctg_zone_populate(zone, at, BLOCK), 0);
	}
	for (unsigned i = 0; i < 9; i++)
		assert_int_equal(
			ctg_zone_release(zone, zone->base + memory[i] * BLOCK, BLOCK, true), 0);
	check_zone(zone);
	for (unsigned i = 0; i < 18; i++)
		assert_int_equal(ctg_alloc_frames(ctg, 8, CTG_GFP_MOVABLE, &pfn[i]), 0);
	for (unsigned i = 0; i < 64; i++) {
		ctg_pfn_t at = zone->base + i * BLOCK;
		ctg_pfn_t busy;
		bool zeroed;

		assert_int_equal(
			ctg_buddy_take_range(zone, at, 1, NULL, &zeroed, &busy), -CTG_EBUSY);
		if (!zone->blocks[i].present) {
			assert_int_equal(ctg_free_frames(ctg, at + 3), -CTG_EINVAL);
			assert_int_equal(ctg_block_isolate(zone, at, &config), -CTG_EINVAL);
		}
	}
	for (unsigned i = 0; i < 18; i++)
		assert_int_equal(ctg_free_frames(ctg, pfn[i]), 0);
	check_zone(zone);
	assert_int_equal(zone->free[CTG_PAGEBLOCK_ORDER + 2][CTG_MIGRATE_MOVABLE].nr, 1);
	ctg_sim_destroy(sim);
	munmap(metadata, bytes);
}

static void blocks_are_described(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg *ctg = ctg_sim_machine(sim);
	struct ctg_zone_config config = {.base = 100 * BLOCK, .nr = 80 * BLOCK};
	struct ctg_zone *zone = NULL;
	struct ctg_block_info info[100];
	ctg_pfn_t pfn, busy;
	bool zeroed;

	(void)state;
	assert_int_equal(ctg_sim_add_zone(sim, &config, false, &zone), 0);
	assert_int_equal(ctg_zone_populate(zone, 101 * BLOCK, 79 * BLOCK), 0);
	assert_int_equal(ctg_zone_release(zone, 102 * BLOCK, BLOCK, true), 0);
	assert_int_equal(ctg_zone_lend(zone, 103 * BLOCK, BLOCK, CTG_MIGRATE_CMA, true), 0);
	assert_int_equal(ctg_alloc_frames(ctg, 4, CTG_GFP_MOVABLE, &pfn), 0);
	assert_int_equal(ctg_buddy_take_range(zone, 103 * BLOCK + 256, 7, NULL, &zeroed, &busy), 0);
	assert_int_equal(ctg_block_isolate(zone, 102 * BLOCK, &config), 0);
	assert_int_equal(ctg_blocks_read(ctg, 100 * BLOCK + 17, info, 100), 80);
	for (unsigned i = 0; i < 80; i++)
		assert_int_equal(info[i].pfn, (100 + i) * BLOCK);
	assert_false(info[0].present);
	assert_int_equal(info[0].nr_free + info[0].nr_taken + info[0].nr_in_use, 0);
	assert_true(info[1].present);
	assert_int_equal(info[1].nr_in_use, BLOCK);
	assert_true(info[2].isolated);
	assert_int_equal(info[2].migratetype, CTG_MIGRATE_MOVABLE);
	assert_int_equal(info[2].nr_free, BLOCK);
	assert_false(info[3].isolated);
	assert_int_equal(info[3].migratetype, CTG_MIGRATE_CMA);
	assert_int_equal(info[3].nr_free, BLOCK - 16 - 7);
	assert_int_equal(info[3].nr_taken, 7);
	assert_int_equal(info[3].nr_in_use, 16);
	assert_int_equal(ctg_blocks_read(ctg, 178 * BLOCK, info, 100), 2);
	assert_int_equal(ctg_blocks_read(ctg, 100 * BLOCK, info, 3), 3);
	assert_int_equal(ctg_blocks_read(ctg, 100 * BLOCK, info, 0), 0);
	assert_int_equal(ctg_blocks_read(ctg, 99 * BLOCK, info, 9), 0);
	assert_int_equal(ctg_blocks_read(ctg, 180 * BLOCK, info, 9), 0);
	assert_int_equal(ctg_blocks_read(NULL, 100 * BLOCK, info, 9), 0);
	assert_int_equal(ctg_blocks_read(ctg, 100 * BLOCK, NULL, 9), 0);
	ctg_sim_destroy(sim);
}

static void counters_count(void **state)
{
	struct ctg_sim *sim = new_sim();
	struct ctg *ctg = ctg_sim_machine(sim);
	struct ctg_counters c;

	(void)state;
	ctg_count(&ctg->counters.cma_alloc_success, 1);
	ctg_count(&ctg->counters.cma_alloc_fail, 2);
	ctg_count(&ctg->counters.cma_frames_allocated, 3);
	ctg_count(&ctg->counters.cma_frames_released, 4);
	ctg_count(&ctg->counters.frames_migrated, 5);
	ctg_count(&ctg->counters.migrate_fail, 6);
	ctg_count(&ctg->counters.frames_returned, 7);
	ctg_count(&ctg->counters.faults, 8);
	ctg_count(&ctg->counters.faults_waited, 9);
	ctg_count(&ctg->counters.frames_zeroed, 10);
	ctg_count(&ctg->counters.batches_helped, 11);
	ctg_count(&ctg->counters.cache_drains, 12);
	ctg_counters_read(ctg, &c);
	assert_int_equal(c.cma_alloc_success, 1);
	assert_int_equal(c.cma_alloc_fail, 2);
	assert_int_equal(c.cma_frames_allocated, 3);
	assert_int_equal(c.cma_frames_released, 4);
	assert_int_equal(c.frames_migrated, 5);
	assert_int_equal(c.migrate_fail, 6);
	assert_int_equal(c.frames_returned, 7);
	assert_int_equal(c.faults, 8);
	assert_int_equal(c.faults_waited, 9);
	assert_int_equal(c.frames_zeroed, 10);
	assert_int_equal(c.batches_helped, 11);
	assert_int_equal(c.cache_drains, 12);
	ctg_counters_read(NULL, &c);
	ctg_counters_read(ctg, NULL);
	ctg_sim_destroy(sim);
}

static void keep_event(void *arg, const struct ctg_event *event)
{
	*(struct ctg_event *)arg = *event;
}

static void trace_carries_everything(void **state)
{
	struct ctg_event got = {0};
	struct ctg_sim_config config = {
		.virtual_time = true, .trace = keep_event, .trace_arg = &got};
	struct ctg_sim *sim = NULL;
	struct ctg *ctg;

	(void)state;
	assert_int_equal(ctg_sim_create(&config, &sim), 0);
	ctg = ctg_sim_machine(sim);
	ctg_sim_advance(sim, 77);
	ctg_trace(ctg, CTG_EVENT_CMA_RELEASE, 5, 6, 7, "cam");
	assert_int_equal(got.kind, CTG_EVENT_CMA_RELEASE);
	assert_int_equal(got.time, 77);
	assert_int_equal(got.pfn, 5);
	assert_int_equal(got.nr, 6);
	assert_int_equal(got.value, 7);
	assert_string_equal(got.area, "cam");
	ctg->port.trace = NULL;
	ctg_trace(ctg, CTG_EVENT_MIGRATE, 1, 1, 1, NULL);
	assert_int_equal(got.kind, CTG_EVENT_CMA_RELEASE);
	ctg_sim_destroy(sim);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(create_wants_a_complete_port),
		cmocka_unit_test(every_allocation_failed_in_turn),
		cmocka_unit_test(metadata_is_small),
		cmocka_unit_test(add_refuses_bad_zones),
		cmocka_unit_test(discard_flag_wants_the_hook),
		cmocka_unit_test(populate_and_release_refuse_bad_ranges),
		cmocka_unit_test(holes_are_never_touched),
		cmocka_unit_test(blocks_are_described),
		cmocka_unit_test(counters_count),
		cmocka_unit_test(trace_carries_everything),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
