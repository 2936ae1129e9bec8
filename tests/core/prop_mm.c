/* SPDX-License-Identifier: MIT */
/*
 * Random operations on two address spaces against a model that is an array of bytes each, while
 * others take memory, ranges are taken from under the spaces, and hooks fail. CONTIG_SEED=n
 * replays one seed.
 */
#include "space.h"

#include <inttypes.h>

#define SLOTS 4
#define WINDOW (SLOTS * PAGES) /* pages of a space that operations touch */
#define SPACES 2
#define BLOCKS_MAX 14
#define SEEDS 40
#define STEPS 400
#define OTHERS 64 /* allocations of somebody else's */

struct space {
	struct ctg_mm *mm;
	unsigned map_order;
	bool mapped[WINDOW];
	unsigned prot[WINDOW];
	unsigned char bytes[WINDOW][CTG_PAGE_SIZE];
};

static struct model {
	uint64_t random;
	struct world w;
	uint64_t blocks;
	struct space space[SPACES];
	ctg_pfn_t others[OTHERS];
	unsigned nr_others;
	uint64_t others_frames;
	bool failed;                          /* a hook failed during this step */
	uint32_t entries[BLOCKS_MAX * PAGES]; /* by head */
	bool mapped[BLOCKS_MAX * PAGES];      /* by frame */
} model;

static uint64_t current_seed;
static uint64_t moves; /* ranges that were taken from under the spaces, over all seeds */

static uint64_t rnd(struct model *m, uint64_t below)
{
	m->random ^= m->random << 13;
	m->random ^= m->random >> 7;
	m->random ^= m->random << 17;
	return (m->random >> 16) % below;
}

/* ---- failures -------------------------------------------------------------------------------- */

static const enum ctg_sim_hook failing[] = {
	CTG_SIM_META_ALLOC, CTG_SIM_ZERO, CTG_SIM_INSTALL, CTG_SIM_COPY, CTG_SIM_RESTRICT};

/* Let some call fail during the next operation; returns which hook and call, to be ended. */
static uint64_t fail_begin(struct model *m, enum ctg_sim_hook *hook)
{
	uint64_t nth = rnd(m, 8) == 0 ? 1 + rnd(m, 3) : 0;

	*hook = failing[rnd(m, 5)];
	ctg_sim_fail(m->w.sim, *hook, nth);
	return nth;
}

static void fail_end(struct model *m, enum ctg_sim_hook hook, uint64_t nth)
{
	uint64_t calls = ctg_sim_fail(m->w.sim, hook, 0);

	m->failed = nth != 0 && calls >= nth;
}

/* Is there any reason for a frame not to have been found? */
static bool memory_short(struct model *m, const struct space *s)
{
	struct ctg_zone_stat stat;
	uint64_t large = 0;

	if (m->failed)
		return true;
	ctg_zone_stat(m->w.zone, &stat);
	for (unsigned order = CTG_PAGEBLOCK_ORDER; order < CTG_NR_ORDERS; order++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			large += stat.free_blocks[order][mt];
	return s->map_order != 0 ? large == 0 : stat.nr_free + stat.nr_pcp == 0;
}

/* ---- what the port is told ------------------------------------------------------------------- */

/* Ranges are sorted, do not overlap, and lie in the window. */
static void check_ranges(const struct ctg_vrange *ranges, size_t nr)
{
	ctg_vpn_t next = BASE;

	assert_true(nr != 0);
	for (size_t i = 0; i < nr; i++) {
		assert_true(ranges[i].nr != 0 && ranges[i].vpn >= next);
		next = ranges[i].vpn + ranges[i].nr;
	}
	assert_true(next <= BASE + WINDOW);
}

static int checked_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	check_ranges(ranges, nr);
	return model.w.port.tlb_restrict(host, mm, ranges, nr, how);
}

static int checked_install(
	void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	check_ranges(ranges, nr);
	return model.w.port.tlb_install(host, mm, ranges, nr);
}

/* ---- operations ------------------------------------------------------------------------------ */

static struct ctg_vrange random_range(struct model *m, const struct space *s)
{
	uint64_t unit = s->map_order != 0 || rnd(m, 4) == 0 ? PAGES : 1;
	uint64_t max = rnd(m, 3) == 0 ? WINDOW : rnd(m, 2) == 0 ? 40 : 700;
	uint64_t first = rnd(m, WINDOW) / unit * unit;
	uint64_t nr = (1 + rnd(m, max) + unit - 1) / unit * unit;

	if (nr > WINDOW - first)
		nr = WINDOW - first;
	return (struct ctg_vrange){first, nr};
}

/* How many pages of a range are mapped. */
static uint64_t mapped_pages(const struct space *s, struct ctg_vrange r)
{
	uint64_t nr = 0;

	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++)
		nr += s->mapped[i];
	return nr;
}

static void do_mmap(struct model *m, struct space *s, struct ctg_vrange r)
{
	unsigned prot = rnd(m, 4) == 0 ? (unsigned)rnd(m, 4) : RW;
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook);
	int ret = ctg_mmap(s->mm, BASE + r.vpn, r.nr, prot);

	fail_end(m, hook, nth);
	if (mapped_pages(s, r) != 0) {
		assert_int_equal(ret, -CTG_EEXIST);
		return;
	}
	if (ret != 0) {
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_true(m->failed);
		return;
	}
	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++) {
		s->mapped[i] = true;
		s->prot[i] = prot;
		memset(s->bytes[i], 0, CTG_PAGE_SIZE);
	}
}

static void do_unmap(struct model *m, struct space *s, struct ctg_vrange r, bool reserve)
{
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook);
	int ret = reserve ? ctg_madvise_dontneed(s->mm, BASE + r.vpn, r.nr)
			  : ctg_munmap(s->mm, BASE + r.vpn, r.nr);

	fail_end(m, hook, nth);
	if (ret != 0) {
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_true(m->failed);
		return;
	}
	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++) {
		s->mapped[i] = s->mapped[i] && reserve;
		memset(s->bytes[i], 0, CTG_PAGE_SIZE);
	}
}

static void do_mprotect(struct model *m, struct space *s, struct ctg_vrange r)
{
	unsigned prot = rnd(m, 2) == 0 ? (unsigned)rnd(m, 4) : RW;
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook);
	int ret = ctg_mprotect(s->mm, BASE + r.vpn, r.nr, prot);

	fail_end(m, hook, nth);
	if (ret != 0) {
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_true(m->failed || mapped_pages(s, r) != r.nr);
		return;
	}
	assert_int_equal(mapped_pages(s, r), r.nr);
	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++)
		s->prot[i] = prot;
}

static void do_populate(struct model *m, struct space *s, struct ctg_vrange r)
{
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook);
	uint64_t present;
	int ret = ctg_mm_populate(s->mm, BASE + r.vpn, r.nr, &present);

	fail_end(m, hook, nth);
	assert_true(present <= mapped_pages(s, r));
	if (ret == -CTG_ENOMEM) {
		assert_true(memory_short(m, s));
		return;
	}
	assert_int_equal(ret, mapped_pages(s, r) == r.nr ? 0 : -CTG_EFAULT);
	assert_int_equal(present, mapped_pages(s, r));
}

/* What an access to a page must return, but for a lack of memory. */
static int expected(const struct space *s, uint64_t page, bool write)
{
	unsigned prot = s->prot[page];

	if (!s->mapped[page])
		return -CTG_EFAULT;
	return (write ? prot & CTG_PROT_WRITE : prot) != 0 ? 0 : -CTG_EFAULT;
}

/* Read or write some bytes of one page. */
static void do_access(struct model *m, struct space *s, uint64_t page, bool write)
{
	unsigned char buf[CTG_PAGE_SIZE];
	size_t at = (size_t)rnd(m, CTG_PAGE_SIZE);
	size_t len = 1 + (size_t)rnd(m, CTG_PAGE_SIZE - at);
	uint64_t addr = ((BASE + page) << CTG_PAGE_SHIFT) + at;
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook);
	int ret;

	ctg_sim_set_cpu((unsigned)rnd(m, 2));
	if (write) {
		memset(buf, (int)(1 + rnd(m, 255)), len);
		ret = ctg_sim_write(m->w.sim, s->mm, addr, buf, len);
	} else {
		ret = ctg_sim_read(m->w.sim, s->mm, addr, buf, len);
	}
	ctg_sim_set_cpu(0);
	fail_end(m, hook, nth);
	if (ret == -CTG_ENOMEM) {
		assert_int_equal(expected(s, page, write), 0);
		assert_true(memory_short(m, s));
		return;
	}
	assert_int_equal(ret, expected(s, page, write));
	if (ret != 0)
		return;
	if (write)
		memcpy(&s->bytes[page][at], buf, len);
	else
		assert_memory_equal(&s->bytes[page][at], buf, len);
}

static void do_accesses(struct model *m, struct space *s, struct ctg_vrange r, bool write)
{
	uint64_t step = 1 + rnd(m, 60);

	for (uint64_t page = r.vpn; page < r.vpn + r.nr; page += step)
		do_access(m, s, page, write);
}

/* Somebody else allocates or frees: memory gets short, and fragmented. */
static void do_other(struct model *m)
{
	if (m->nr_others < OTHERS && rnd(m, 3) != 0) {
		unsigned order = rnd(m, 4) == 0 ? (unsigned)rnd(m, 10) : (unsigned)rnd(m, 3);
		unsigned gfp = rnd(m, 2) == 0 ? CTG_GFP_MOVABLE : 0;
		ctg_pfn_t *pfn = &m->others[m->nr_others];

		if (ctg_alloc_frames(m->w.ctg, order, gfp, pfn) != 0)
			return;
		m->nr_others++;
		m->others_frames += (uint64_t)1 << order;
		for (uint64_t i = 0; i < (uint64_t)1 << order; i++)
			memset(ctg_sim_frame(m->w.sim, *pfn + i), 0x77, 64);
	} else if (m->nr_others != 0) {
		unsigned at = (unsigned)rnd(m, m->nr_others);
		struct ctg_frame *frame = ctg_frame_of(m->w.ctg, m->others[at]);

		m->others_frames -= (uint64_t)1 << ctg_info_order(ctg_load32_acquire(&frame->info));
		assert_int_equal(ctg_free_frames(m->w.ctg, m->others[at]), 0);
		m->others[at] = m->others[--m->nr_others];
	}
}

/* Take a range from under the spaces, and give it back. Contents and rights stay. */
static void do_take(struct model *m)
{
	uint64_t nr = 1 + rnd(m, rnd(m, 2) == 0 ? 64 : 2 * PAGES);
	ctg_pfn_t start = m->w.zone->base + rnd(m, m->blocks * PAGES - nr);
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook), held;
	int ret = ctg_alloc_contig_range(m->w.ctg, start, nr, NULL);

	fail_end(m, hook, nth);
	if (ret != 0) {
		assert_true(ret == -CTG_EBUSY || ret == -CTG_ENOMEM);
		return;
	}
	moves++;
	for (uint64_t i = 0; i < nr; i++)
		memset(ctg_sim_frame(m->w.sim, start + i), 0x99, 64);
	assert_int_equal(ctg_free_contig_range(m->w.ctg, start, nr, &held), 0);
	assert_int_equal(held, 0);
}

static void step(struct model *m)
{
	struct space *s = &m->space[rnd(m, SPACES)];
	struct ctg_vrange r = random_range(m, s);

	m->failed = false;
	switch (rnd(m, 12)) {
	case 0:
	case 1:
		do_mmap(m, s, r);
		break;
	case 2:
		do_unmap(m, s, r, rnd(m, 2) == 0);
		break;
	case 3:
		do_mprotect(m, s, r);
		break;
	case 4:
	case 5:
		do_populate(m, s, r);
		break;
	case 6:
	case 7:
		do_accesses(m, s, r, false);
		break;
	case 8:
	case 9:
		do_accesses(m, s, r, true);
		break;
	case 10:
		do_other(m);
		break;
	default:
		do_take(m);
		break;
	}
}

/* ---- what must hold -------------------------------------------------------------------------- */

/* Compare each entry of a space with the model, and count who maps which frame. */
static uint64_t check_entries(struct model *m, const struct space *s)
{
	uint64_t present = 0;

	for (uint64_t page = 0; page < WINDOW; page++) {
		unsigned level;
		uint64_t entry = ctg_pte_read(s->mm, BASE + page, &level);
		uint64_t rights = !s->mapped[page] || s->prot[page] == 0  ? 0
				  : (s->prot[page] & CTG_PROT_WRITE) != 0 ? CTG_PTE_RIGHTS
									  : CTG_PTE_READ;
		ctg_pfn_t pfn, head;

		assert_int_equal(entry != 0, s->mapped[page]);
		assert_int_equal(entry & CTG_PTE_RIGHTS, rights);
		assert_false((entry & CTG_PTE_MOVING) != 0);
		assert_true(s->map_order == 0 || level >= 1);
		if ((entry & CTG_PTE_PRESENT) == 0)
			continue;
		present++;
		pfn = ctg_pte_pfn(entry) + (level == 0 ? 0 : page % PAGES);
		head = ctg_frame_head(m->w.ctg, ctg_pte_pfn(entry));
		assert_false(m->mapped[pfn - m->w.zone->base]);
		m->mapped[pfn - m->w.zone->base] = true;
		assert_ptr_equal(ctg_frame_of(m->w.ctg, head)->anon, s->mm->anon);
		assert_int_equal(ctg_frame_of(m->w.ctg, head)->index + (pfn - head), BASE + page);
		if (level == 0 || page % PAGES == 0)
			m->entries[head - m->w.zone->base]++;
	}
	assert_int_equal(ctg_load64_relaxed(&s->mm->nr_present), present);
	assert_int_equal(s->mm->batch.nr_runs, 0);
	return present;
}

/* Each frame is mapped once at most, its word says so, and all others are accounted for. */
static void check(struct model *m)
{
	uint64_t used = m->others_frames;

	memset(m->entries, 0, sizeof(m->entries));
	memset(m->mapped, 0, sizeof(m->mapped));
	for (unsigned i = 0; i < SPACES; i++)
		check_entries(m, &m->space[i]);
	for (uint64_t i = 0; i < m->blocks * PAGES; i++) {
		struct ctg_frame *frame = ctg_frame_of(m->w.ctg, m->w.zone->base + i);

		if (m->entries[i] == 0)
			continue;
		assert_int_equal(ctg_load64_relaxed(&frame->word), m->entries[i] * CTG_WORD_MAP1);
		used += (uint64_t)1 << ctg_info_order(ctg_load32_relaxed(&frame->info));
	}
	assert_int_equal(world_free(&m->w), m->w.nr_free - used);
}

/* Every byte, at the end: whatever can be read. */
static void check_contents(struct model *m, struct space *s)
{
	unsigned char buf[CTG_PAGE_SIZE];

	for (uint64_t page = 0; page < WINDOW; page++) {
		unsigned level;
		uint64_t entry = ctg_pte_read(s->mm, BASE + page, &level);

		if ((entry & CTG_PTE_PRESENT) == 0) {
			static const unsigned char zero[CTG_PAGE_SIZE];

			assert_memory_equal(s->bytes[page], zero, CTG_PAGE_SIZE);
			continue;
		}
		memcpy(buf, ctg_sim_frame(m->w.sim, lookup(s->mm, BASE + page, 1).pfn),
			CTG_PAGE_SIZE);
		assert_memory_equal(s->bytes[page], buf, CTG_PAGE_SIZE);
	}
}

static void run_seed(uint64_t seed)
{
	struct model *m = &model;

	current_seed = seed;
	memset(m, 0, sizeof(*m));
	m->random = seed * 0x9e3779b97f4a7c15u + 1;
	for (unsigned i = 0; i < 8; i++)
		rnd(m, 2);
	m->blocks = 5 + rnd(m, BLOCKS_MAX - 4);
	world_open(&m->w, m->blocks);
	m->w.ctg->port.tlb_restrict = checked_restrict;
	m->w.ctg->port.tlb_install = checked_install;
	for (unsigned i = 0; i < SPACES; i++) {
		m->space[i].map_order = i != 0 && rnd(m, 4) == 0 ? CTG_PAGEBLOCK_ORDER : 0;
		m->space[i].mm = space_new(&m->w, m->space[i].map_order);
	}
	m->w.meta_bytes += (SPACES - 1) * sizeof(struct ctg_anon);
	for (unsigned i = 0; i < STEPS; i++) {
		step(m);
		if (i % 16 == 0 || i + 1 == STEPS)
			check(m);
	}
	for (unsigned i = 0; i < SPACES; i++) {
		check_contents(m, &m->space[i]);
		ctg_mm_destroy(m->space[i].mm, rnd(m, 2) == 0);
	}
	while (m->nr_others != 0)
		assert_int_equal(ctg_free_frames(m->w.ctg, m->others[--m->nr_others]), 0);
	world_close(&m->w);
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
	/* The spaces have been moved about under the operations. */
	assert_true(moves > SEEDS);
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
