/* SPDX-License-Identifier: MIT */
/*
 * Random operations on one zone against a model that is obvious and slow: for each frame, who has
 * it. After each step the model, and a walk over the zone, are compared with all lists and counts.
 * CONTIG_SEED=n replays one seed.
 */
#include "zone_check.h"

#include <inttypes.h>

#define BASE (3 * BLOCK)
#define NR_BLOCKS 13
#define NR (NR_BLOCKS * BLOCK)
#define HOLE 6      /* this pageblock is never memory */
#define RESERVED 11 /* this one is released in mid-run */
#define CMA_FROM 7
#define CMA_TO 11
#define SEEDS 24
#define STEPS 260
#define MAX_ALLOCATIONS 4096
#define NOBODY 0

struct allocation {
	ctg_pfn_t pfn;
	uint64_t nr;
	bool contig; /* each frame on its own */
	bool live;
};

struct model {
	uint64_t random;
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
	struct ctg_frame *metadata;
	bool known[NR];     /* in the allocator's hands, or was */
	uint32_t owner[NR]; /* NOBODY, or 1 + the number of the allocation */
	bool dirty[NR];     /* may read as something else than zero */
	const void *isolated[NR_BLOCKS];
	uint8_t type[NR_BLOCKS]; /* as of the last step */
	struct allocation allocation[MAX_ALLOCATIONS];
	unsigned nr_allocations;
	bool discard;
};

static uint64_t current_seed;

static uint64_t rnd(struct model *m, uint64_t below)
{
	m->random ^= m->random << 13;
	m->random ^= m->random >> 7;
	m->random ^= m->random << 17;
	return (m->random >> 16) % below;
}

static bool is_free(const struct model *m, uint64_t i)
{
	return m->known[i] && m->owner[i] == NOBODY;
}

/* What the zone says of each frame is what the model says. */
static void compare(struct model *m)
{
	struct ctg_zone_stat stat;
	uint64_t nr_free = 0, nr_isolated = 0, nr_cma = 0, longest = 0, run = 0;
	bool cached = false;

	for (unsigned cpu = 0; cpu < 2; cpu++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			cached = cached || m->zone->pcp[cpu].list[mt].nr != 0;
	for (uint64_t i = 0; i < NR; i++) {
		unsigned state = ctg_info_state(m->zone->frames[i].info.v);
		bool lies_free =
			m->known[i] && (state == CTG_FRAME_PCP || frame_is_free(m->zone, BASE + i));

		assert_int_equal(is_free(m, i), lies_free);
	}
	for (unsigned b = 0; b < NR_BLOCKS; b++) {
		const struct ctg_block *block = &m->zone->blocks[b];

		assert_ptr_equal(block->isolated_by, m->isolated[b]);
		assert_int_equal(
			block->migratetype == CTG_MIGRATE_CMA, b >= CMA_FROM && b < CMA_TO);
		if (m->isolated[b] != NULL)
			assert_int_equal(block->migratetype, m->type[b]);
		m->type[b] = block->migratetype;
	}
	if (cached)
		return;
	for (uint64_t i = 0; i < NR; i++) {
		bool isolated = m->isolated[i / BLOCK] != NULL;
		bool counts = is_free(m, i) && !isolated;

		nr_free += counts;
		nr_isolated += is_free(m, i) && isolated;
		nr_cma += counts && i / BLOCK >= CMA_FROM && i / BLOCK < CMA_TO;
		run = counts ? run + 1 : 0;
		longest = run > longest ? run : longest;
	}
	ctg_zone_stat(m->zone, &stat);
	assert_int_equal(stat.nr_free, nr_free);
	assert_int_equal(stat.nr_free_cma, nr_cma);
	assert_int_equal(stat.nr_isolated_free, nr_isolated);
	assert_int_equal(stat.nr_pcp, 0);
	assert_int_equal(stat.longest_free, longest);
}

/* A block known to be zero is. */
static void compare_contents(struct model *m)
{
	for (uint64_t i = 0; i < NR; i++) {
		uint32_t info = m->zone->frames[i].info.v;
		unsigned state = ctg_info_state(info);

		if (!m->known[i] || (state != CTG_FRAME_FREE && state != CTG_FRAME_PCP) ||
			(ctg_info_flags(info) & CTG_FRAME_ZEROED) == 0)
			continue;
		for (uint64_t k = i; k < i + ((uint64_t)1 << ctg_info_order(info)); k++)
			assert_true(!m->dirty[k] || m->discard);
	}
}

/* Could a block of this order be cut out of one run of one allowed type? */
static bool exists(const struct model *m, unsigned order, unsigned types)
{
	uint64_t nr = (uint64_t)1 << order;

	for (uint64_t i = (-(uint64_t)BASE) & (nr - 1); i + nr <= NR; i += nr) {
		uint64_t k;

		for (k = i; k < i + nr; k++)
			if (!is_free(m, k) || m->isolated[k / BLOCK] != NULL ||
				(types >> m->type[k / BLOCK] & 1) == 0 ||
				m->type[k / BLOCK] != m->type[i / BLOCK])
				break;
		if (k == i + nr)
			return true;
	}
	return false;
}

static unsigned allowed_types(unsigned gfp)
{
	unsigned ordinary = 1u << CTG_MIGRATE_MOVABLE | 1u << CTG_MIGRATE_UNMOVABLE;
	unsigned types = 0;

	if ((gfp & CTG_GFP_MOVABLE) == 0)
		return ordinary;
	if ((gfp & CTG_GFP_NO_ORDINARY) == 0)
		types |= ordinary;
	if ((gfp & CTG_GFP_NO_CMA) == 0)
		types |= 1u << CTG_MIGRATE_CMA;
	return types;
}

static void own(struct model *m, ctg_pfn_t pfn, uint64_t nr, bool contig)
{
	struct allocation *a = &m->allocation[m->nr_allocations++];

	assert_true(m->nr_allocations < MAX_ALLOCATIONS);
	*a = (struct allocation){.pfn = pfn, .nr = nr, .contig = contig, .live = true};
	for (uint64_t i = pfn - BASE; i < pfn - BASE + nr; i++) {
		assert_true(is_free(m, i));
		m->owner[i] = m->nr_allocations;
	}
}

static void disown(struct model *m, ctg_pfn_t pfn, uint64_t nr)
{
	for (uint64_t i = pfn - BASE; i < pfn - BASE + nr; i++)
		m->owner[i] = NOBODY;
}

static void check_zeroed(struct model *m, ctg_pfn_t pfn, uint64_t nr)
{
	for (ctg_pfn_t p = pfn; p < pfn + nr; p++) {
		const uint64_t *contents = ctg_sim_frame(m->sim, p);

		assert_int_equal(contents[0], 0);
		assert_int_equal(contents[CTG_PAGE_SIZE / 8 - 1], 0);
		m->dirty[p - BASE] = false;
	}
}

static void scribble(struct model *m, ctg_pfn_t pfn, uint64_t nr)
{
	for (ctg_pfn_t p = pfn; p < pfn + nr; p++) {
		uint64_t *contents = ctg_sim_frame(m->sim, p);

		contents[0] = contents[CTG_PAGE_SIZE / 8 - 1] = p;
		m->dirty[p - BASE] = true;
	}
}

static void op_alloc(struct model *m)
{
	static const unsigned gfps[] = {0, CTG_GFP_MOVABLE, CTG_GFP_MOVABLE,
		CTG_GFP_MOVABLE | CTG_GFP_NO_CMA, CTG_GFP_MOVABLE | CTG_GFP_NO_ORDINARY};
	unsigned gfp = gfps[rnd(m, 5)] | (rnd(m, 3) == 0 ? CTG_GFP_ZERO : 0);
	unsigned max = (unsigned)(rnd(m, 4) == 0 ? rnd(m, 13) : rnd(m, 8));
	unsigned min = rnd(m, 3) == 0 ? (unsigned)rnd(m, max + 1) : max;
	unsigned types = allowed_types(gfp), order = 99, expected = max;
	ctg_pfn_t pfn = 0;
	bool rested = rnd(m, 2) == 0;
	int ret;

	if (rested)
		ctg_pcp_drain(m->zone);
	ret = ctg_alloc_run(m->ctg, max, min, gfp, &pfn, &order);
	while (expected > min && !exists(m, expected, types))
		expected--;
	if (!exists(m, expected, types)) {
		assert_int_equal(ret, -CTG_ENOMEM);
		return;
	}
	assert_int_equal(ret, 0);
	/* Frames in caches are not merged: without them, it is the largest that there is. */
	assert_in_range(order, rested ? expected : min, expected);
	if (rested && (types >> CTG_MIGRATE_CMA & 1) != 0 &&
		exists(m, order, 1u << CTG_MIGRATE_CMA))
		assert_int_equal(m->type[(pfn - BASE) / BLOCK], CTG_MIGRATE_CMA);
	assert_int_equal(pfn % ((uint64_t)1 << order), 0);
	for (ctg_pfn_t p = pfn; p < pfn + ((uint64_t)1 << order); p++) {
		unsigned b = (unsigned)((p - BASE) / BLOCK);

		assert_true(p - BASE < NR);
		assert_null(m->isolated[b]);
		assert_true(types >> m->type[b] & 1);
	}
	assert_int_equal(word_at(m->zone, pfn), CTG_WORD_REF1);
	assert_int_equal(ctg_info_flags(info_at(m->zone, pfn)),
		(gfp & CTG_GFP_MOVABLE) != 0 ? 0 : CTG_FRAME_UNMOVABLE);
	own(m, pfn, (uint64_t)1 << order, false);
	if ((gfp & CTG_GFP_ZERO) != 0)
		check_zeroed(m, pfn, (uint64_t)1 << order);
	if (rnd(m, 2) == 0)
		scribble(m, pfn, (uint64_t)1 << order);
}

static struct allocation *pick(struct model *m)
{
	for (unsigned tries = 0; m->nr_allocations != 0 && tries < 20; tries++) {
		struct allocation *a = &m->allocation[rnd(m, m->nr_allocations)];

		if (a->live)
			return a;
	}
	return NULL;
}

static void op_free(struct model *m)
{
	struct allocation *a = pick(m);
	uint64_t from, nr;

	if (a == NULL)
		return;
	if (!a->contig) {
		if (a->nr > 1)
			assert_int_equal(ctg_free_frames(m->ctg, a->pfn + 1 + rnd(m, a->nr - 1)),
				-CTG_EINVAL);
		assert_int_equal(ctg_free_frames(m->ctg, a->pfn), 0);
		assert_int_equal(ctg_free_frames(m->ctg, a->pfn), -CTG_EINVAL);
		disown(m, a->pfn, a->nr);
		a->live = false;
		return;
	}
	/* A part, from either end, one by one or as a run. */
	assert_int_equal(ctg_free_frames(m->ctg, a->pfn), -CTG_EINVAL);
	nr = rnd(m, 2) == 0 ? a->nr : 1 + rnd(m, a->nr);
	from = rnd(m, 2) == 0 ? a->pfn : a->pfn + a->nr - nr;
	if (rnd(m, 2) == 0) {
		for (ctg_pfn_t p = from; p < from + nr; p++)
			ctg_frame_put(m->ctg, p, CTG_WORD_REF1, 1);
	} else {
		for (ctg_pfn_t p = from; p < from + nr; p++)
			frame_at(m->zone, p)->word.v = 0;
		ctg_free_run(m->zone, from, nr, false);
	}
	disown(m, from, nr);
	if (from == a->pfn)
		a->pfn += nr;
	a->nr -= nr;
	a->live = a->nr != 0;
}

/* Some used block becomes single frames. */
static void op_split(struct model *m)
{
	struct allocation *a = pick(m);

	if (a == NULL || a->contig || a->nr > BLOCK)
		return;
	ctg_split_used(m->ctg, a->pfn, ctg_info_order(info_at(m->zone, a->pfn)));
	a->live = false;
	for (uint64_t i = 0; i < a->nr; i++)
		assert_int_equal(word_at(m->zone, a->pfn + i), CTG_WORD_REF1);
	for (uint64_t i = 0; i < a->nr; i++) {
		ctg_pfn_t pfn = a->pfn + i;

		if (m->nr_allocations + 2 < MAX_ALLOCATIONS && i < 40 && rnd(m, 2) == 0) {
			m->owner[pfn - BASE] = NOBODY;
			own(m, pfn, 1, false);
			continue;
		}
		assert_int_equal(ctg_free_frames(m->ctg, pfn), 0);
		disown(m, pfn, 1);
	}
}

static void op_take(struct model *m)
{
	uint64_t nr = 1 + rnd(m, rnd(m, 2) == 0 ? 40 : 3 * BLOCK);
	uint64_t from = rnd(m, NR - nr);
	const void *owner = rnd(m, 4) != 0 ? NULL : m->isolated[from / BLOCK];
	bool zeroed = false;
	ctg_pfn_t busy = 0;
	uint64_t i;
	int ret;

	ctg_pcp_drain(m->zone);
	ret = ctg_buddy_take_range(m->zone, BASE + from, nr, owner, &zeroed, &busy);
	for (i = from; i < from + nr; i++)
		if (!is_free(m, i) || m->isolated[i / BLOCK] != owner)
			break;
	if (i < from + nr) {
		assert_int_equal(ret, -CTG_EBUSY);
		assert_int_equal(busy, BASE + i);
		return;
	}
	assert_int_equal(ret, 0);
	own(m, BASE + from, nr, true);
	for (ctg_pfn_t p = BASE + from; p < BASE + from + nr; p++) {
		assert_int_equal(ctg_info_state(info_at(m->zone, p)), CTG_FRAME_CONTIG);
		assert_int_equal(ctg_info_order(info_at(m->zone, p)), 0);
		assert_int_equal(word_at(m->zone, p), CTG_WORD_REF1);
	}
	if (zeroed)
		check_zeroed(m, BASE + from, nr);
	if (rnd(m, 2) == 0)
		scribble(m, BASE + from, nr);
}

static void op_isolate(struct model *m)
{
	unsigned b = (unsigned)rnd(m, NR_BLOCKS);
	ctg_pfn_t pfn = BASE + b * BLOCK + rnd(m, BLOCK);
	const void *owner = &m->isolated[rnd(m, 2)];
	int ret;

	if (m->isolated[b] != NULL && rnd(m, 2) == 0) {
		ctg_block_unisolate(m->zone, pfn, m->isolated[b]);
		m->isolated[b] = NULL;
		return;
	}
	ret = ctg_block_isolate(m->zone, pfn, owner);
	if (!m->known[b * BLOCK]) {
		assert_int_equal(ret, -CTG_EINVAL);
		return;
	}
	assert_int_equal(ret, m->isolated[b] != NULL ? -CTG_EBUSY : 0);
	if (ret != 0)
		return;
	m->isolated[b] = owner;
	/* Without it the caches may still give out frames of the block. */
	ctg_pcp_drain(m->zone);
}

static void op_find(struct model *m)
{
	uint64_t from = rnd(m, NR), to = from + 1 + rnd(m, NR - from);
	uint64_t nr = 1 + rnd(m, rnd(m, 2) == 0 ? 20 : 2 * BLOCK);
	uint64_t align = (uint64_t)1 << rnd(m, 11);
	bool map[NR];

	free_map(m->zone, map);
	assert_int_equal(ctg_runs_find(m->zone, BASE + from, BASE + to, nr, align),
		slow_find(m->zone, map, from, to, nr, align));
	check_longest(m->zone, map, from, to);
}

static void op_release_late(struct model *m)
{
	bool late = !m->known[RESERVED * BLOCK];

	assert_int_equal(ctg_zone_release(m->zone, BASE + RESERVED * BLOCK, BLOCK, true),
		late ? 0 : -CTG_EINVAL);
	for (uint64_t i = RESERVED * BLOCK; i < (RESERVED + 1) * BLOCK; i++)
		m->known[i] = true;
	m->type[RESERVED] = m->zone->blocks[RESERVED].migratetype;
}

static void op_other(struct model *m)
{
	if (rnd(m, 2) == 0)
		ctg_drain_caches(m->ctg);
	if (rnd(m, 8) == 0)
		op_release_late(m);
	ctg_sim_set_cpu((unsigned)rnd(m, 2));
}

static void step(struct model *m)
{
	static void (*const ops[])(struct model *) = {op_alloc, op_alloc, op_alloc, op_alloc,
		op_alloc, op_free, op_free, op_free, op_free, op_split, op_take, op_take,
		op_isolate, op_isolate, op_find, op_other};

	ops[rnd(m, sizeof(ops) / sizeof(ops[0]))](m);
}

static void start(struct model *m)
{
	struct ctg_zone_config config = {
		.base = BASE, .nr = NR, .flags = m->discard ? CTG_ZONE_DISCARD : 0};
	struct ctg_sim_config sim = {.nr_cpus = 2};

	assert_int_equal(ctg_sim_create(&sim, &m->sim), 0);
	m->ctg = ctg_sim_machine(m->sim);
	assert_int_equal(ctg_sim_add_zone(m->sim, &config, false, &m->zone), 0);
	for (unsigned b = 0; b < NR_BLOCKS; b++) {
		if (b == HOLE)
			continue;
		assert_int_equal(ctg_zone_populate(m->zone, BASE + b * BLOCK, BLOCK), 0);
		for (uint64_t i = b * BLOCK; b != RESERVED && i < (b + 1) * BLOCK; i++)
			m->known[i] = true;
	}
	assert_int_equal(ctg_zone_release(m->zone, BASE, HOLE * BLOCK, rnd(m, 2) == 0), 0);
	assert_int_equal(ctg_zone_lend(m->zone, BASE + CMA_FROM * BLOCK,
				 (CMA_TO - CMA_FROM) * BLOCK, CTG_MIGRATE_CMA, true),
		0);
	assert_int_equal(ctg_zone_release(m->zone, BASE + 12 * BLOCK, BLOCK, true), 0);
	for (unsigned b = 0; b < NR_BLOCKS; b++)
		m->type[b] = m->zone->blocks[b].migratetype;
}

/* All of it comes back, in the largest blocks. */
static void finish(struct model *m)
{
	for (unsigned i = 0; i < m->nr_allocations; i++) {
		struct allocation *a = &m->allocation[i];

		for (uint64_t k = 0; a->live && k < a->nr; k += a->contig ? 1 : a->nr)
			ctg_frame_put(m->ctg, a->pfn + k, CTG_WORD_REF1, 1);
		if (a->live)
			disown(m, a->pfn, a->nr);
	}
	for (unsigned b = 0; b < NR_BLOCKS; b++)
		if (m->isolated[b] != NULL)
			ctg_block_unisolate(m->zone, BASE + b * BLOCK, m->isolated[b]);
	memset(m->isolated, 0, sizeof(m->isolated));
	ctg_drain_caches(m->ctg);
	check_zone(m->zone);
	compare(m);
	for (unsigned order = 0; order < CTG_PAGEBLOCK_ORDER; order++)
		for (unsigned mt = 0; mt < CTG_NR_MIGRATETYPES; mt++)
			assert_int_equal(m->zone->free[order][mt].nr, 0);
	ctg_sim_destroy(m->sim);
}

static void run_seed(uint64_t seed)
{
	struct model *m = calloc(1, sizeof(*m));

	assert_non_null(m);
	current_seed = seed;
	m->random = seed * 0x9e3779b97f4a7c15u + 1;
	m->discard = seed % 3 == 0;
	start(m);
	for (unsigned i = 0; i < STEPS; i++) {
		step(m);
		check_zone(m->zone);
		compare(m);
		compare_contents(m);
	}
	finish(m);
	free(m);
	current_seed = 0;
}

static void random_operations(void **state)
{
	const char *one = getenv("CONTIG_SEED");

	(void)state;
	if (one != NULL) {
		run_seed(strtoull(one, NULL, 0));
		return;
	}
	for (uint64_t seed = 1; seed <= SEEDS; seed++)
		run_seed(seed);
}

static int report_seed(void **state)
{
	(void)state;
	if (current_seed != 0)
		fprintf(stderr, "failed with CONTIG_SEED=%" PRIu64 "\n", current_seed);
	return 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test_teardown(random_operations, report_seed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
