/* SPDX-License-Identifier: MIT */
/* Groups: limits, charges through the hierarchy, and who is charged for what address spaces use. */
#include "family.h"

#include <pthread.h>

static struct ctg_group_stat stat_group(const struct ctg_group *group)
{
	struct ctg_group_stat stat;

	ctg_group_stat(group, &stat);
	return stat;
}

static uint64_t charged(const struct ctg_group *group)
{
	return stat_group(group).charged;
}

static struct ctg_group *group_new(struct world *w, struct ctg_group *parent, uint64_t limit)
{
	struct ctg_group *group = NULL;

	assert_int_equal(ctg_group_create(w->ctg, parent, limit, &group), 0);
	assert_non_null(group);
	return group;
}

static struct ctg_mm *space_in(struct world *w, struct ctg_group *group, unsigned map_order)
{
	struct ctg_mm_config config = {.owner = w, .map_order = map_order, .group = group};
	struct ctg_mm *mm = NULL;

	assert_int_equal(ctg_mm_create(w->ctg, &config, &mm), 0);
	return mm;
}

static void charges_go_up_and_come_back(void **state)
{
	struct world w;
	struct ctg_group *root, *mid, *leaf, *side;

	(void)state;
	world_open(&w, 4);
	root = group_new(&w, NULL, 100);
	mid = group_new(&w, root, 60);
	leaf = group_new(&w, mid, CTG_NO_LIMIT);
	side = group_new(&w, root, 70);
	assert_int_equal(ctg_group_charge(leaf, 60), 0);
	assert_int_equal(charged(leaf), 60);
	assert_int_equal(charged(mid), 60);
	assert_int_equal(charged(root), 60);
	/* Refused in the middle: what was charged below comes back. */
	assert_int_equal(ctg_group_charge(leaf, 1), -CTG_ENOSPC);
	assert_int_equal(charged(leaf), 60);
	assert_int_equal(stat_group(mid).failed, 1);
	assert_int_equal(stat_group(leaf).failed, 0);
	/* Refused at the top. */
	assert_int_equal(ctg_group_charge(side, 41), -CTG_ENOSPC);
	assert_int_equal(charged(side), 0);
	assert_int_equal(stat_group(side).peak, 0);
	assert_int_equal(stat_group(root).failed, 1);
	assert_int_equal(ctg_group_charge(side, 40), 0);
	assert_int_equal(charged(root), 100);
	assert_int_equal(ctg_group_charge(root, 1), -CTG_ENOSPC);
	assert_int_equal(ctg_group_charge(root, UINT64_MAX), -CTG_ENOSPC);
	ctg_group_uncharge(leaf, 60);
	assert_int_equal(charged(root), 40);
	assert_int_equal(charged(mid), 0);
	assert_int_equal(stat_group(mid).peak, 60);
	assert_int_equal(stat_group(root).peak, 100);
	assert_int_equal(stat_group(mid).limit, 60);
	ctg_group_uncharge(side, 40);
	/* A limit below what is charged stops new charges only. */
	assert_int_equal(ctg_group_charge(leaf, 50), 0);
	ctg_group_set_limit(mid, 10);
	assert_int_equal(charged(mid), 50);
	assert_int_equal(ctg_group_charge(leaf, 1), -CTG_ENOSPC);
	ctg_group_uncharge(leaf, 50);
	assert_int_equal(ctg_group_charge(leaf, 10), 0);
	ctg_group_uncharge(leaf, 10);
	/* Nobody's. */
	assert_int_equal(ctg_group_charge(NULL, UINT64_MAX), 0);
	assert_int_equal(ctg_group_destroy(leaf), 0);
	assert_int_equal(ctg_group_destroy(mid), 0);
	assert_int_equal(ctg_group_destroy(side), 0);
	assert_int_equal(ctg_group_destroy(root), 0);
	world_close(&w);
}

static void bad_arguments(void **state)
{
	struct world w, other;
	struct ctg_group *group, *stranger, *out;
	struct ctg_mm_config config = {.owner = &w};
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 4);
	world_open(&other, 4);
	group = group_new(&w, NULL, 1);
	stranger = group_new(&other, NULL, 1);
	assert_int_equal(ctg_group_create(NULL, NULL, 1, &out), -CTG_EINVAL);
	assert_int_equal(ctg_group_create(w.ctg, NULL, 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_group_create(w.ctg, stranger, 1, &out), -CTG_EINVAL);
	assert_int_equal(ctg_group_destroy(NULL), -CTG_EINVAL);
	config.group = stranger;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	config.group = NULL;
	config.max_order = 10;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), -CTG_EINVAL);
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(ctg_group_create(w.ctg, NULL, 1, &out), -CTG_ENOMEM);
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0);
	assert_int_equal(ctg_group_destroy(group), 0);
	assert_int_equal(ctg_group_destroy(stranger), 0);
	world_close(&other);
	world_close(&w);
}

static void destroy_refuses_what_is_in_use(void **state)
{
	struct world w;
	struct ctg_group *root, *leaf;
	struct ctg_mm *mm, *other;
	ctg_pfn_t pfn;

	(void)state;
	world_open(&w, 4);
	root = group_new(&w, NULL, CTG_NO_LIMIT);
	leaf = group_new(&w, root, CTG_NO_LIMIT);
	assert_int_equal(ctg_group_destroy(root), -CTG_EBUSY);
	mm = space_in(&w, leaf, 0);
	assert_int_equal(ctg_group_destroy(leaf), -CTG_EBUSY);
	mapped(mm, BASE, 3, RW);
	pfn = pfn_of(mm, BASE + 1);
	/* A frame that outlives its space stays charged until its last holder goes. */
	hold(&w, pfn, CTG_WORD_PIN1);
	ctg_mm_destroy(mm, false);
	assert_int_equal(charged(leaf), 1);
	assert_int_equal(charged(root), 1);
	assert_int_equal(ctg_group_destroy(leaf), -CTG_EBUSY);
	unhold(&w, pfn, CTG_WORD_PIN1);
	assert_int_equal(charged(root), 0);
	/* Used again, by somebody without a group. */
	other = space_new(&w, 0);
	mapped(other, BASE, 4 * PAGES - 8, RW);
	assert_int_equal(charged(root), 0);
	ctg_mm_destroy(other, false);
	assert_int_equal(ctg_group_destroy(leaf), 0);
	assert_int_equal(ctg_group_destroy(root), 0);
	world_close(&w);
}

static void table_is_full(void **state)
{
	struct world w;
	static struct ctg_group *groups[CTG_MAX_GROUPS];
	struct ctg_group *out;

	(void)state;
	world_open(&w, 4);
	for (unsigned i = 0; i < CTG_MAX_GROUPS; i++)
		groups[i] = group_new(&w, i % 3 == 0 ? NULL : groups[i - 1], i);
	assert_int_equal(ctg_group_create(w.ctg, NULL, 1, &out), -CTG_ENOSPC);
	/* Each is the one that its index says. */
	assert_int_equal(ctg_group_charge(groups[3], 2), 0);
	ctg_group_uncharge_index(w.ctg, ctg_group_index(groups[3]), 2);
	assert_int_equal(charged(groups[3]), 0);
	assert_int_equal(ctg_group_destroy(groups[5]), 0);
	groups[5] = group_new(&w, NULL, 1);
	for (unsigned i = CTG_MAX_GROUPS; i-- > 0;)
		assert_int_equal(ctg_group_destroy(groups[i]), 0);
	world_close(&w);
}

/* What is left at the end of a machine goes with it. */
static void machine_ends_with_groups(void **state)
{
	struct world w;

	(void)state;
	world_open(&w, 4);
	group_new(&w, group_new(&w, NULL, 1), 1);
	assert_true(ctg_sim_meta_bytes(w.sim) > w.meta_bytes);
	ctg_sim_destroy(w.sim);
}

static void populate_and_faults_charge(void **state)
{
	struct world w;
	struct ctg_group *group;
	struct ctg_mm *mm;
	uint64_t present;

	(void)state;
	world_open(&w, 8);
	group = group_new(&w, NULL, 700);
	mm = space_in(&w, group, 0);
	/* A large frame, then as many small ones as the limit allows. */
	assert_int_equal(ctg_mmap(mm, BASE, 2 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 2 * PAGES, &present), -CTG_ENOSPC);
	assert_int_equal(present, 700);
	assert_int_equal(level_of(mm, BASE), 1);
	assert_int_equal(charged(group), 700);
	assert_int_equal(stat_group(group).peak, 700);
	assert_int_equal(ctg_handle_fault(mm, BASE + 1000, true), -CTG_ENOSPC);
	assert_int_equal(world_free(&w), w.nr_free - 700);
	ctg_group_set_limit(group, 701);
	put_byte(&w, mm, BASE + 1000, 1);
	assert_int_equal(charged(group), 701);
	/* All of a large frame is charged as long as any of it is mapped. */
	assert_int_equal(ctg_munmap(mm, BASE, PAGES - 1), 0);
	assert_int_equal(charged(group), 701);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE + PAGES - 1, 1), 0);
	assert_int_equal(charged(group), 701 - PAGES);
	assert_int_equal(ctg_munmap(mm, BASE, 2 * PAGES), 0);
	assert_int_equal(charged(group), 0);
	/* No memory is not the group's fault, and nothing stays charged. */
	ctg_group_set_limit(group, CTG_NO_LIMIT);
	assert_int_equal(ctg_mmap(mm, BASE, 16 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 16 * PAGES, &present), -CTG_ENOMEM);
	assert_int_equal(present, 8 * PAGES);
	assert_int_equal(charged(group), 8 * PAGES);
	ctg_mm_destroy(mm, true);
	assert_int_equal(charged(group), 0);
	assert_int_equal(ctg_group_destroy(group), 0);
	world_close(&w);
}

static void large_only_space_is_refused(void **state)
{
	struct world w;
	struct ctg_group *group;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	group = group_new(&w, NULL, PAGES + 511);
	mm = space_in(&w, group, CTG_PAGEBLOCK_ORDER);
	assert_int_equal(ctg_mmap(mm, BASE, 2 * PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 2 * PAGES, NULL), -CTG_ENOSPC);
	assert_int_equal(charged(group), PAGES);
	ctg_mm_destroy(mm, false);
	assert_int_equal(charged(group), 0);
	assert_int_equal(ctg_group_destroy(group), 0);
	world_close(&w);
}

static void migration_moves_the_charge(void **state)
{
	struct world w;
	struct ctg_group *group;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	group = group_new(&w, NULL, CTG_NO_LIMIT);
	mm = space_in(&w, group, 0);
	map_small(&w, mm, BASE, 20);
	map_large(&w, mm, BASE + PAGES);
	map_large(&w, mm, BASE + 2 * PAGES);
	assert_int_equal(charged(group), 20 + 2 * PAGES);
	evacuate_block(&w, pfn_of(mm, BASE));
	evacuate_block(&w, pfn_of(mm, BASE + PAGES));
	assert_int_equal(charged(group), 20 + 2 * PAGES);
	assert_int_equal(level_of(mm, BASE + PAGES), 1);
	/* Into pieces; what is not mapped any more is given up. */
	assert_int_equal(ctg_munmap(mm, BASE + 2 * PAGES, 200), 0);
	assert_int_equal(charged(group), 20 + 2 * PAGES);
	evacuate_block(&w, pfn_of(mm, BASE + 2 * PAGES + 300));
	assert_int_equal(charged(group), 20 + 2 * PAGES - 200);
	assert_int_equal(ctg_munmap(mm, BASE + 2 * PAGES, 300), 0);
	assert_int_equal(charged(group), 20 + 2 * PAGES - 300);
	ctg_mm_destroy(mm, false);
	assert_int_equal(charged(group), 0);
	assert_int_equal(ctg_group_destroy(group), 0);
	world_close(&w);
}

/* ---- many at once ---------------------------------------------------------------------------- */

static struct contest {
	struct ctg_group *root, *leaf[2];
	struct ctg_word32 over;
} contest;

static void *charge_and_uncharge(void *arg)
{
	struct ctg_group *leaf = arg;

	for (unsigned i = 0; i < 20000; i++) {
		uint64_t nr = 1 + i % 7;

		if (ctg_group_charge(leaf, nr) != 0)
			continue;
		if (charged(contest.root) > 10 || charged(leaf) > 8)
			ctg_store32_relaxed(&contest.over, 1);
		ctg_group_uncharge(leaf, nr);
	}
	return NULL;
}

static void never_above_the_limit(void **state)
{
	struct world w;
	pthread_t thread[4];

	(void)state;
	world_open(&w, 4);
	memset(&contest, 0, sizeof(contest));
	contest.root = group_new(&w, NULL, 10);
	for (unsigned i = 0; i < 2; i++)
		contest.leaf[i] = group_new(&w, contest.root, 8);
	for (unsigned i = 0; i < 4; i++)
		assert_int_equal(
			pthread_create(&thread[i], NULL, charge_and_uncharge, contest.leaf[i % 2]),
			0);
	for (unsigned i = 0; i < 4; i++)
		pthread_join(thread[i], NULL);
	assert_int_equal(contest.over.v, 0);
	assert_int_equal(charged(contest.root), 0);
	assert_int_equal(charged(contest.leaf[0]), 0);
	assert_true(stat_group(contest.root).peak <= 10);
	assert_true(stat_group(contest.root).peak >= 7);
	for (unsigned i = 0; i < 2; i++)
		assert_int_equal(ctg_group_destroy(contest.leaf[i]), 0);
	assert_int_equal(ctg_group_destroy(contest.root), 0);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(charges_go_up_and_come_back),
		cmocka_unit_test(bad_arguments),
		cmocka_unit_test(destroy_refuses_what_is_in_use),
		cmocka_unit_test(table_is_full),
		cmocka_unit_test(machine_ends_with_groups),
		cmocka_unit_test(populate_and_faults_charge),
		cmocka_unit_test(large_only_space_is_refused),
		cmocka_unit_test(migration_moves_the_charge),
		cmocka_unit_test(never_above_the_limit),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
