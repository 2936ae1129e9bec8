/* SPDX-License-Identifier: MIT */
/*
 * The interval tree against a list, at random; and mirrors that use a space's frames without
 * holding them while threads take those frames away.
 */
#include "moving.h"

#include <pthread.h>
#include <sched.h>

static uint64_t random_state;

static uint64_t random_below(uint64_t *state, uint64_t n)
{
	*state ^= *state << 13;
	*state ^= *state >> 7;
	*state ^= *state << 17;
	return *state % n;
}

/* ---- against a list ---------------------------------------------------------------------- */

#define NR 300
#define SPAN 4000

static struct interval {
	struct ctg_mmu_interval_notifier n;
	bool in;
	unsigned calls;
} interval[NR];

static unsigned insert_in_callback; /* so many intervals, before it ends */
static struct ctg_mm *prop_mm;

static void insert_one(unsigned i);

static bool count_call(struct ctg_mmu_interval_notifier *n, const struct ctg_notify_range *range)
{
	struct interval *v = (struct interval *)(void *)n;

	assert_true(range->vpn < n->vpn + n->nr && n->vpn < range->vpn + range->nr);
	v->calls++;
	for (; insert_in_callback != 0; insert_in_callback--)
		insert_one((unsigned)random_below(&random_state, NR));
	return true;
}

static const struct ctg_mmu_interval_ops count_ops = {.invalidate = count_call};

static void insert_one(unsigned i)
{
	struct interval *v = &interval[i];
	uint64_t nr = random_below(&random_state, 8) == 0 ? 1 + random_below(&random_state, SPAN)
							  : 1 + random_below(&random_state, 20);

	if (v->in)
		return;
	assert_int_equal(ctg_mmu_interval_notifier_insert(&v->n, prop_mm,
				 BASE + random_below(&random_state, SPAN), nr, &count_ops),
		0);
	v->in = true;
	v->calls = 0;
}

/* Order, priorities, links, and the last page of each subtree. Returns the nodes. */
static unsigned check_tree(const struct ctg_mmu_interval_notifier *n, ctg_vpn_t low, ctg_vpn_t high,
	unsigned depth, unsigned *deepest)
{
	unsigned nr = 1;
	ctg_vpn_t last = n->vpn + n->nr - 1;

	if (depth > *deepest)
		*deepest = depth;
	assert_in_range(n->vpn, low, high);
	for (unsigned side = 0; side < 2; side++) {
		const struct ctg_mmu_interval_notifier *child = n->child[side];

		if (child == NULL)
			continue;
		assert_ptr_equal(child->parent, n);
		assert_true(child->priority <= n->priority);
		nr += check_tree(child, side == 0 ? low : n->vpn, side == 0 ? n->vpn : high,
			depth + 1, deepest);
		if (child->subtree_last > last)
			last = child->subtree_last;
	}
	assert_int_equal(n->subtree_last, last);
	return nr;
}

static void check_all(void)
{
	const struct ctg_mmu_interval_notifier *root = NULL;
	unsigned nr = 0, deepest = 0;

	for (unsigned i = 0; i < NR; i++) {
		if (!interval[i].in)
			continue;
		nr++;
		root = &interval[i].n;
	}
	if (nr == 0)
		return;
	while (root->parent != NULL)
		root = root->parent;
	assert_int_equal(check_tree(root, 0, CTG_MM_MAX_VPN, 1, &deepest), nr);
	/* Of a tree that was a list, or nearly. */
	assert_in_range(deepest, 1, 64);
}

static void invalidate_some(void)
{
	ctg_vpn_t vpn = BASE + random_below(&random_state, SPAN + 100);
	uint64_t nr = 1 + random_below(&random_state, 50);
	uint64_t seq[NR];
	bool in[NR];

	for (unsigned i = 0; i < NR; i++) {
		in[i] = interval[i].in;
		interval[i].calls = 0;
		seq[i] = in[i] ? ctg_mmu_interval_read_begin(&interval[i].n) : 0;
	}
	insert_in_callback = random_below(&random_state, 4) == 0 ? 3 : 0;
	assert_int_equal(ctg_mm_invalidate(prop_mm, vpn, nr, true), 0);
	insert_in_callback = 0;
	for (unsigned i = 0; i < NR; i++) {
		const struct ctg_mmu_interval_notifier *n = &interval[i].n;
		bool hit = in[i] && n->vpn < vpn + nr && vpn < n->vpn + n->nr;

		assert_int_equal(interval[i].calls, hit ? 1 : 0);
		if (in[i])
			assert_int_equal(ctg_mmu_interval_read_retry(n, seq[i]), hit);
	}
}

static void test_against_a_list(void **state)
{
	struct world w;

	(void)state;
	world_open(&w, 1);
	for (uint64_t seed = 1; seed <= 20; seed++) {
		random_state = seed * UINT64_C(0x9e3779b97f4a7c15);
		prop_mm = space_new(&w, 0);
		for (unsigned step = 0; step < 1500; step++) {
			unsigned i = (unsigned)random_below(&random_state, NR);
			/* It grows, then shrinks. */
			bool grow = random_below(&random_state, 1500) > step;

			if (random_below(&random_state, 8) == 0) {
				invalidate_some();
			} else if (grow) {
				insert_one(i);
			} else if (interval[i].in) {
				ctg_mmu_interval_notifier_remove(&interval[i].n);
				interval[i].in = false;
			}
			if (step % 8 == 0)
				check_all();
		}
		for (unsigned i = 0; i < NR; i++) {
			if (interval[i].in)
				ctg_mmu_interval_notifier_remove(&interval[i].n);
			interval[i].in = false;
		}
		ctg_mm_destroy(prop_mm, false);
	}
	world_close(&w);
}

/* The worst order for a tree that does not look after itself. */
static void test_in_order(void **state)
{
	struct world w;

	(void)state;
	world_open(&w, 1);
	prop_mm = space_new(&w, 0);
	for (unsigned i = 0; i < NR; i++) {
		assert_int_equal(ctg_mmu_interval_notifier_insert(
					 &interval[i].n, prop_mm, BASE + i / 2, 1, &count_ops),
			0);
		interval[i].in = true;
		check_all();
	}
	for (unsigned i = 0; i < NR; i++) {
		ctg_mmu_interval_notifier_remove(&interval[i].n);
		interval[i].in = false;
		check_all();
	}
	ctg_mm_destroy(prop_mm, false);
	world_close(&w);
}

/* ---- mirrors ----------------------------------------------------------------------------- */

#define KEPT 16  /* pages that always hold their stamp */
#define GIVEN 16 /* pages that are given back now and then: their stamp, or zero */
#define MIRRORS 2
#define POISON 0xee

static struct {
	struct world w;
	struct ctg_mm *mm;
	struct ctg_word32 stop;
	struct ctg_word64 used, retried, moved, failures;
} stage;

struct mirror {
	struct ctg_mmu_interval_notifier n;
	pthread_mutex_t lock; /* what the callback takes */
	bool valid;
	ctg_pfn_t pfn[KEPT + GIVEN];
	pthread_t thread;
	uint64_t random;
};

static bool mirror_invalidate(
	struct ctg_mmu_interval_notifier *n, const struct ctg_notify_range *range)
{
	struct mirror *m = (struct mirror *)(void *)n;

	(void)range;
	pthread_mutex_lock(&m->lock);
	m->valid = false;
	pthread_mutex_unlock(&m->lock);
	return true;
}

static const struct ctg_mmu_interval_ops mirror_ops = {.invalidate = mirror_invalidate};

/* Read through the mirror, under its lock: as a device would. */
static void mirror_use(const struct mirror *m)
{
	for (unsigned i = 0; i < KEPT + GIVEN; i++) {
		const unsigned char *page;
		uint64_t value;

		if (m->pfn[i] == CTG_PFN_NONE)
			continue;
		page = ctg_sim_frame(stage.w.sim, m->pfn[i]);
		memcpy(&value, page, sizeof(value));
		if (value != stamp_of(stage.mm, BASE + i, 0) && (i < KEPT || value != 0))
			ctg_add64_relaxed(&stage.failures, 1);
	}
	ctg_add64_relaxed(&stage.used, 1);
}

static void mirror_round(struct mirror *m)
{
	ctg_pfn_t pfn[KEPT + GIVEN];
	uint64_t seq = ctg_mmu_interval_read_begin(&m->n);

	for (unsigned i = 0; i < KEPT + GIVEN; i++) {
		struct ctg_mapping map = {.pfn = CTG_PFN_NONE};

		ctg_mm_lookup(stage.mm, BASE + i, 1, &map);
		pfn[i] = map.pfn;
	}
	pthread_mutex_lock(&m->lock);
	if (ctg_mmu_interval_read_retry(&m->n, seq)) {
		ctg_add64_relaxed(&stage.retried, 1);
		pthread_mutex_unlock(&m->lock);
		return;
	}
	memcpy(m->pfn, pfn, sizeof(pfn));
	m->valid = true;
	pthread_mutex_unlock(&m->lock);
	/* Long enough for something to be taken away meanwhile. */
	for (unsigned i = 0; i < 50; i++) {
		sched_yield();
		pthread_mutex_lock(&m->lock);
		if (m->valid)
			mirror_use(m);
		pthread_mutex_unlock(&m->lock);
	}
}

static void *mirror_thread(void *arg)
{
	struct mirror *m = arg;

	while (ctg_load32_acquire(&stage.stop) == 0) {
		m->valid = false;
		if (ctg_mmu_interval_notifier_insert(
			    &m->n, stage.mm, BASE, KEPT + GIVEN, &mirror_ops) != 0)
			ctg_add64_relaxed(&stage.failures, 1);
		for (uint64_t i = random_below(&m->random, 10) + 1; i != 0; i--)
			mirror_round(m);
		ctg_mmu_interval_notifier_remove(&m->n);
	}
	return NULL;
}

static void *giver_thread(void *arg)
{
	uint64_t random = 77;

	(void)arg;
	while (ctg_load32_acquire(&stage.stop) == 0) {
		ctg_vpn_t vpn = BASE + KEPT + random_below(&random, GIVEN);

		switch (random_below(&random, 4)) {
		case 0:
			ctg_madvise_dontneed_nonblock(stage.mm, vpn, 1);
			break;
		case 1:
			ctg_munmap(stage.mm, vpn, 1);
			ctg_mmap(stage.mm, vpn, 1, RW);
			break;
		default:
			ctg_handle_fault(stage.mm, vpn, true);
		}
		ctg_mprotect(stage.mm, BASE, 1, random_below(&random, 2) == 0 ? CTG_PROT_READ : RW);
		sched_yield();
	}
	return NULL;
}

/* Take the pageblock of a page away from everybody, spoil what was there, and give it back. */
static void take_away(ctg_vpn_t vpn)
{
	struct ctg_mapping map;
	ctg_pfn_t block;

	assert_int_equal(ctg_mm_lookup(stage.mm, vpn, 1, &map), 0);
	if (map.pfn == CTG_PFN_NONE)
		return;
	block = map.pfn & ~(PAGES - 1);
	if (ctg_alloc_contig_range(stage.w.ctg, block, PAGES, NULL) != 0)
		return;
	ctg_add64_relaxed(&stage.moved, 1);
	for (ctg_pfn_t pfn = block; pfn < block + PAGES; pfn++)
		memset(ctg_sim_frame(stage.w.sim, pfn), POISON, 64);
	assert_int_equal(ctg_free_contig_range(stage.w.ctg, block, PAGES, NULL), 0);
}

static void test_mirrors(void **state)
{
	static struct mirror mirror[MIRRORS];
	pthread_t giver;

	(void)state;
	memset(&stage, 0, sizeof(stage));
	world_open(&stage.w, 4);
	stage.mm = space_new(&stage.w, 0);
	map_small(&stage.w, stage.mm, BASE, KEPT + GIVEN);
	for (unsigned i = 0; i < MIRRORS; i++) {
		mirror[i].random = i + 1;
		pthread_mutex_init(&mirror[i].lock, NULL);
		assert_int_equal(
			pthread_create(&mirror[i].thread, NULL, mirror_thread, &mirror[i]), 0);
	}
	assert_int_equal(pthread_create(&giver, NULL, giver_thread, NULL), 0);
	for (unsigned i = 0; i < 600 || ctg_load64_relaxed(&stage.moved) < 200; i++)
		take_away(BASE + i % (KEPT + GIVEN));
	while (ctg_load64_relaxed(&stage.used) < 100)
		sched_yield();
	ctg_store32_release(&stage.stop, 1);
	for (unsigned i = 0; i < MIRRORS; i++)
		assert_int_equal(pthread_join(mirror[i].thread, NULL), 0);
	assert_int_equal(pthread_join(giver, NULL), 0);
	assert_int_equal(ctg_load64_relaxed(&stage.failures), 0);
	check_stamp(&stage.w, stage.mm, BASE, KEPT);
	ctg_mm_destroy(stage.mm, false);
	world_close(&stage.w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_against_a_list),
		cmocka_unit_test(test_in_order),
		cmocka_unit_test(test_mirrors),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
