/* SPDX-License-Identifier: MIT */
/*
 * Areas against a slow model, on random requests, releases and borrowings, with several ranges and
 * granularities: who owns what, which calls must fail and how, and that the window that was chosen
 * is the cheapest of all. CONTIG_SEED replays one seed.
 */
#include "lend.h"

#define AREA_BLOCKS 12
#define ORDINARY_BLOCKS 16
#define MAX_ALLOCS 64
#define MAX_HELD 6
#define STEPS 60
#define SEEDS 40

static uint64_t rng;

static uint64_t below(uint64_t n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng % n;
}

struct held {
	ctg_pfn_t pfn;
	uint64_t one; /* CTG_WORD_PIN1 or CTG_WORD_REF1 */
};

struct model {
	struct lend *l;
	struct ctg_cma *cma;
	struct ctg_extent ranges[3];
	size_t nr_ranges;
	unsigned order_per_bit;
	uint64_t granule;
	unsigned nr_allocs;
	struct {
		ctg_pfn_t pfn;
		uint64_t nr, asked;
	} alloc[MAX_ALLOCS];
	bool allocated[AREA_BLOCKS * CTG_PAGEBLOCK_FRAMES];
	unsigned nr_held;
	struct held held[MAX_HELD];
	uint64_t success, fail, frames_allocated, frames_released;
};

static uint64_t round_up(uint64_t n, uint64_t to)
{
	return (n + to - 1) & ~(to - 1);
}

static bool is_held(const struct model *m, ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < m->nr_held; i++)
		if (m->held[i].pfn == pfn)
			return true;
	return false;
}

/* ---- the slow way ---------------------------------------------------------------------------- */

/* Sums before each frame of the area's part of the zone. */
struct sums {
	uint32_t used[AREA_BLOCKS * CTG_PAGEBLOCK_FRAMES + 1];
	uint32_t allocated[AREA_BLOCKS * CTG_PAGEBLOCK_FRAMES + 1];
	uint32_t held[AREA_BLOCKS * CTG_PAGEBLOCK_FRAMES + 1];
};
static struct sums sums;

static void sum_up(const struct model *m)
{
	for (uint64_t i = 0; i < AREA_BLOCKS * BLOCK; i++) {
		ctg_pfn_t pfn = LEND_BASE + i;
		bool used =
			m->l->zone->blocks[i / BLOCK].released && !frame_is_free(m->l->zone, pfn);
		/* A large frame that is held is in the way with all of it. */
		bool held =
			is_held(m, pfn) ||
			(is_held(m, ctg_block_start(pfn)) &&
				ctg_info_order(lend_frame(m->l, ctg_block_start(pfn))->info.v) ==
					CTG_PAGEBLOCK_ORDER);

		sums.used[i + 1] = sums.used[i] + used;
		sums.allocated[i + 1] = sums.allocated[i] + m->allocated[i];
		sums.held[i + 1] = sums.held[i] + held;
	}
}

static uint64_t sum(const uint32_t *s, ctg_pfn_t pfn, uint64_t nr)
{
	return s[pfn - LEND_BASE + nr] - s[pfn - LEND_BASE];
}

struct outlook {
	bool possible;   /* a window without allocated frames */
	bool clear;      /* one of them has no held frames */
	uint64_t cost;   /* the least of the clear ones */
	ctg_pfn_t first; /* the first clear one */
};

static bool suits(ctg_pfn_t pfn, uint64_t nr, const struct ctg_alloc_request *request)
{
	if (pfn % ((uint64_t)1 << request->align_order) != 0)
		return false;
	if (request->limit != 0 && pfn + nr > request->limit)
		return false;
	return request->boundary == 0 ||
	       pfn / request->boundary == (pfn + nr - 1) / request->boundary;
}

static struct outlook look(
	const struct model *m, uint64_t nr, const struct ctg_alloc_request *request)
{
	struct outlook o = {.cost = UINT64_MAX, .first = CTG_PFN_NONE};

	for (size_t r = 0; r < m->nr_ranges; r++) {
		const struct ctg_extent *range = &m->ranges[r];

		for (uint64_t at = 0; at + nr <= range->nr; at += m->granule) {
			ctg_pfn_t pfn = range->pfn + at;

			if (!suits(pfn, nr, request) || sum(sums.allocated, pfn, nr) != 0)
				continue;
			o.possible = true;
			if (sum(sums.held, pfn, nr) != 0)
				continue;
			o.clear = true;
			if (o.first == CTG_PFN_NONE)
				o.first = pfn;
			if (sum(sums.used, pfn, nr) < o.cost)
				o.cost = sum(sums.used, pfn, nr);
		}
	}
	return o;
}

static void check_longest_runs(const struct model *m, const struct ctg_cma_stat *stat)
{
	uint64_t free = 0, unallocated = 0, nr_free = 0, nr_allocated = 0;

	for (size_t r = 0; r < m->nr_ranges; r++) {
		uint64_t free_run = 0, unallocated_run = 0;

		for (uint64_t at = 0; at < m->ranges[r].nr; at += m->granule) {
			ctg_pfn_t pfn = m->ranges[r].pfn + at;
			uint64_t used = sum(sums.used, pfn, m->granule);
			bool allocated = m->allocated[pfn - LEND_BASE];

			nr_free += m->granule - used;
			nr_allocated += allocated ? m->granule : 0;
			free_run = used == 0 ? free_run + m->granule : 0;
			unallocated_run = allocated ? 0 : unallocated_run + m->granule;
			free = free_run > free ? free_run : free;
			if (unallocated_run > unallocated)
				unallocated = unallocated_run;
		}
	}
	assert_int_equal(stat->nr_free, nr_free);
	assert_int_equal(stat->nr_allocated, nr_allocated);
	assert_int_equal(stat->nr_lent, stat->nr - nr_free - nr_allocated);
	assert_int_equal(stat->longest_free, free);
	assert_int_equal(stat->longest_unallocated, unallocated);
}

static void check(struct model *m)
{
	struct ctg_cma_stat stat;

	ctg_cma_stat(m->cma, &stat);
	sum_up(m);
	check_longest_runs(m, &stat);
	assert_int_equal(stat.alloc_success, m->success);
	assert_int_equal(stat.alloc_fail, m->fail);
	assert_int_equal(stat.frames_allocated, m->frames_allocated);
	assert_int_equal(stat.frames_released, m->frames_released);
	check_no_isolation(m->l);
	for (unsigned i = 0; i < m->nr_allocs; i++)
		for (uint64_t n = 0; n < m->alloc[i].nr; n += 1 + m->alloc[i].nr / 7)
			assert_int_equal(state_of(m->l, m->alloc[i].pfn + n), CTG_FRAME_CONTIG);
}

/* ---- operations ------------------------------------------------------------------------------ */

static uint64_t some_size(void)
{
	switch (below(4)) {
	case 0:
		return 1 + below(20);
	case 1:
		return 1 + below(BLOCK);
	case 2:
		return BLOCK * (1 + below(3));
	default:
		return BLOCK + 1 + below(4 * BLOCK);
	}
}

static void set_allocated(struct model *m, ctg_pfn_t pfn, uint64_t nr, bool value)
{
	for (uint64_t i = 0; i < nr; i++) {
		assert_int_equal(m->allocated[pfn - LEND_BASE + i], !value);
		m->allocated[pfn - LEND_BASE + i] = value;
	}
}

static void do_alloc(struct model *m)
{
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	uint64_t asked = some_size(), nr = round_up(asked, m->granule);
	struct outlook o;
	ctg_pfn_t pfn = 7;
	int ret;

	if (m->nr_allocs == MAX_ALLOCS)
		return;
	request.mode = below(2) == 0 ? CTG_MODE_FAST : CTG_MODE_NORMAL;
	request.flags = (below(3) == 0 ? CTG_ALLOC_NO_ZERO : 0u) |
			(below(6) == 0 ? CTG_ALLOC_FIRST_FIT : 0u);
	if (below(3) == 0)
		request.align_order = (unsigned)below(12);
	if (below(5) == 0)
		request.limit = LEND_BASE + 1 + below(AREA_BLOCKS * BLOCK);
	if (below(5) == 0)
		for (request.boundary = 1; request.boundary < nr || below(2) == 0;)
			request.boundary *= 2;
	ctg_drain_caches(m->l->ctg); /* FAST does not */
	sum_up(m);
	o = look(m, nr, &request);
	ret = ctg_cma_alloc(m->cma, asked, &request, &pfn);
	assert_int_equal(ret, o.clear ? 0 : o.possible ? -CTG_EBUSY : -CTG_ENOMEM);
	assert_int_equal(report.result, ret);
	if (ret != 0) {
		m->fail++;
		return;
	}
	assert_true(suits(pfn, nr, &request));
	if ((request.flags & CTG_ALLOC_FIRST_FIT) != 0)
		assert_int_equal(pfn, o.first);
	else if (nr > BLOCK)
		assert_int_equal(sum(sums.used, pfn, nr), o.cost);
	assert_true(sum(sums.used, pfn, nr) >= o.cost);
	check_taken(m->l, pfn, nr, (request.flags & CTG_ALLOC_NO_ZERO) == 0);
	memset(ctg_sim_frame(m->l->sim, pfn), 0xa5, nr * CTG_PAGE_SIZE);
	set_allocated(m, pfn, nr, true);
	m->alloc[m->nr_allocs].pfn = pfn;
	m->alloc[m->nr_allocs].nr = nr;
	m->alloc[m->nr_allocs++].asked = asked;
	m->success++;
	m->frames_allocated += nr;
}

static void released(struct model *m, ctg_pfn_t pfn, uint64_t nr)
{
	set_allocated(m, pfn, nr, false);
	m->frames_released += nr;
}

/* A release that must be refused: it has one thing wrong. */
static void do_bad_release(struct model *m)
{
	uint64_t from = below(AREA_BLOCKS * BLOCK), nr = 1 + below(2 * BLOCK), owners = 0;
	uint64_t held = 99;

	/* Right only if it is whole bits of one allocation, or its end. */
	for (unsigned i = 0; i < m->nr_allocs; i++) {
		ctg_pfn_t start = m->alloc[i].pfn, pfn = LEND_BASE + from;

		if (pfn >= start && pfn + nr <= start + m->alloc[i].nr)
			owners++;
		else if (pfn < start + m->alloc[i].nr && pfn + nr > start)
			owners = 2;
	}
	if (owners == 1 && from % m->granule == 0)
		return; /* perhaps a good one */
	assert_int_equal(ctg_cma_release(m->cma, LEND_BASE + from, nr, &held), -CTG_EINVAL);
	assert_int_equal(held, 99);
}

static void do_release(struct model *m)
{
	unsigned i;
	ctg_pfn_t pfn;
	uint64_t nr, asked, bits, from, to, held, expected = 0;

	if (m->nr_allocs == 0)
		return;
	i = (unsigned)below(m->nr_allocs);
	pfn = m->alloc[i].pfn;
	nr = m->alloc[i].nr;
	asked = m->alloc[i].asked;
	bits = nr / m->granule;
	from = below(2) == 0 ? 0 : below(bits);
	to = below(2) == 0 ? bits : from + 1 + below(bits - from);
	if (m->nr_held < MAX_HELD && below(4) == 0) {
		ctg_pfn_t hold = pfn + from * m->granule + below((to - from) * m->granule);

		assert_int_equal(ctg_frame_tryget(lend_frame(m->l, hold)), 0);
		m->held[m->nr_held++] = (struct held){hold, CTG_WORD_REF1};
		expected = 1;
	}
	/* One more frame than there is. */
	if (to == bits)
		assert_int_equal(ctg_cma_release(m->cma, pfn + from * m->granule,
					 (to - from) * m->granule + 1, &held),
			-CTG_EINVAL);
	nr = (to - from) * m->granule;
	if (to == bits && below(2) == 0)
		nr = asked - from * m->granule;
	assert_int_equal(ctg_cma_release(m->cma, pfn + from * m->granule, nr, &held), 0);
	assert_int_equal(held, expected);
	released(m, pfn + from * m->granule, (to - from) * m->granule);
	assert_int_equal(ctg_cma_release(m->cma, pfn + from * m->granule, nr, &held), -CTG_EINVAL);
	/* What is left: the start, the end, both or nothing. */
	if (to < bits && m->nr_allocs < MAX_ALLOCS) {
		m->alloc[m->nr_allocs].pfn = pfn + to * m->granule;
		m->alloc[m->nr_allocs].nr = (bits - to) * m->granule;
		m->alloc[m->nr_allocs++].asked = asked - to * m->granule;
	} else if (to < bits) {
		assert_int_equal(ctg_cma_release(m->cma, pfn + to * m->granule,
					 (bits - to) * m->granule, &held),
			0);
		released(m, pfn + to * m->granule, (bits - to) * m->granule);
	}
	m->alloc[i].nr = m->alloc[i].asked = from * m->granule;
	if (from == 0)
		m->alloc[i] = m->alloc[--m->nr_allocs];
}

static void do_lend(struct model *m)
{
	struct lend *l = m->l;

	/* So much that there is always room for what has to move. */
	if (nr_lent_pages(l) + 3 * BLOCK > AREA_BLOCKS * BLOCK)
		return;
	if (below(4) != 0) {
		lend_small(l, 1 + below(2 * BLOCK));
		return;
	}
	assert_int_equal(ctg_mmap(l->mm, l->next_vpn, BLOCK, RW), 0);
	ctg_mm_populate(l->mm, l->next_vpn, BLOCK, NULL);
	for (uint64_t i = 0; i < BLOCK; i++)
		if (page_at(l, l->next_vpn + i) != CTG_PFN_NONE)
			stamp(l, l->next_vpn + i);
	l->next_vpn += BLOCK;
}

/* Unmap a run of the borrower's pages, whole slots of large frames or parts of others. */
static void do_unlend(struct model *m)
{
	struct lend *l = m->l;
	ctg_vpn_t vpn = BLOCK + below(l->next_vpn - BLOCK + 1);
	uint64_t nr = 1 + below(3 * BLOCK);

	for (uint64_t i = 0; i < nr && vpn + i < l->next_vpn; i++) {
		ctg_pfn_t pfn = page_at(l, vpn + i);

		/* A pin would keep the frame, and the model would have to know where. */
		if (pfn != CTG_PFN_NONE && (is_held(m, pfn) || is_held(m, ctg_block_start(pfn))))
			return;
	}
	assert_int_equal(ctg_munmap(l->mm, vpn, nr), 0);
}

static void do_hold(struct model *m)
{
	struct lend *l = m->l;
	ctg_vpn_t vpn = BLOCK + below(l->next_vpn - BLOCK + 1);
	ctg_pfn_t pfn = page_at(l, vpn);
	uint32_t info;

	if (m->nr_held == MAX_HELD || pfn == CTG_PFN_NONE || pfn >= LEND_BASE + AREA_BLOCKS * BLOCK)
		return;
	if (state_of(l, pfn) == CTG_FRAME_TAIL)
		pfn = ctg_block_start(pfn);
	info = lend_frame(l, pfn)->info.v;
	assert_int_equal(ctg_info_state(info), CTG_FRAME_ANON);
	if (is_held(m, pfn))
		return;
	ctg_add64_acq_rel(&lend_frame(l, pfn)->word, CTG_WORD_PIN1);
	m->held[m->nr_held++] = (struct held){pfn, CTG_WORD_PIN1};
}

static void let_go(struct model *m)
{
	struct held h = m->held[--m->nr_held];

	ctg_frame_put(m->l->ctg, h.pfn, h.one, 1);
}

/* ---- runs ------------------------------------------------------------------------------------ */

static void make_area(struct model *m)
{
	static const unsigned orders[] = {0, 0, 1, 3, 6, 9};
	struct ctg_cma_config config = {.name = "area", .ranges = m->ranges};
	uint64_t at = below(2);

	for (m->nr_ranges = 0; m->nr_ranges < 3 && at < AREA_BLOCKS; m->nr_ranges++) {
		uint64_t nr = 1 + below(AREA_BLOCKS - at);

		if (m->nr_ranges == 0 && below(2) == 0)
			nr = AREA_BLOCKS - at;
		m->ranges[m->nr_ranges] = (struct ctg_extent){LEND_BASE + at * BLOCK, nr * BLOCK};
		at += nr + below(2);
	}
	m->order_per_bit = orders[below(sizeof(orders) / sizeof(orders[0]))];
	m->granule = (uint64_t)1 << m->order_per_bit;
	config.nr_ranges = m->nr_ranges;
	config.order_per_bit = m->order_per_bit;
	config.zeroed = below(2) == 0;
	assert_int_equal(ctg_cma_create(m->l->ctg, &config, &m->cma), 0);
}

static void one_seed(uint64_t seed)
{
	static struct model model;
	struct model *m = &model;

	memset(m, 0, sizeof(*m));
	rng = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	m->l = lend_open(AREA_BLOCKS, ORDINARY_BLOCKS, true);
	make_area(m);
	for (unsigned step = 0; step < STEPS; step++) {
		switch (below(12)) {
		case 0:
		case 1:
		case 2:
		case 3:
			do_alloc(m);
			break;
		case 4:
		case 5:
			do_release(m);
			break;
		case 6:
			do_bad_release(m);
			break;
		case 7:
		case 8:
			do_lend(m);
			break;
		case 9:
			do_unlend(m);
			break;
		case 10:
			do_hold(m);
			break;
		default:
			if (m->nr_held != 0)
				let_go(m);
		}
		check(m);
		if (step % 10 == 0) {
			check_zone(m->l->zone);
			check_stamps(m->l);
		}
	}
	check_stamps(m->l);
	while (m->nr_held != 0)
		let_go(m);
	while (m->nr_allocs != 0)
		do_release(m);
	while (m->nr_held != 0)
		let_go(m);
	check(m);
	lend_close(m->l);
}

static void prop_agrees_with_model(void **state)
{
	const char *replay = getenv("CONTIG_SEED");
	uint64_t first = replay != NULL ? strtoull(replay, NULL, 0) : 1;
	uint64_t last = replay != NULL ? first : SEEDS;

	(void)state;
	for (uint64_t seed = first; seed <= last; seed++) {
		print_message("seed %llu\n", (unsigned long long)seed);
		one_seed(seed);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(prop_agrees_with_model),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
