/* SPDX-License-Identifier: MIT */
/*
 * Random family trees: spaces fork, write, read, unmap, pin and exit in any order, while devices
 * write through the pins, ranges are taken from under them and hooks fail; against a model of bytes
 * for each space and each pin. CONTIG_SEED=n replays one seed.
 */
#include "family.h"

#include <inttypes.h>

#define SLOTS 3
#define WINDOW (SLOTS * PAGES) /* pages of a space that operations touch */
#define SPACES 6
#define PINS 48
#define GROUPS 3
#define BLOCKS_MAX 14
#define SEEDS 50
#define STEPS 1000
#define KEPT 32 /* bytes of a page that are looked at, at its start */

struct space {
	struct ctg_mm *mm; /* NULL: not in use */
	struct ctg_group *group;
	uint64_t nr_pins;
	bool mapped[WINDOW];
	unsigned prot[WINDOW];
	unsigned char bytes[WINDOW][KEPT];
};

struct pin {
	ctg_pfn_t pfn; /* CTG_PFN_NONE: not in use */
	int space;     /* whose; -1: that has ended */
	uint64_t page;
	bool attached;             /* the space still has the page: one contents for both */
	unsigned char bytes[KEPT]; /* what it holds if not */
};

static struct model {
	uint64_t random;
	struct world w;
	uint64_t blocks;
	struct space space[SPACES];
	struct pin pin[PINS];
	struct ctg_group *group[GROUPS];
	bool failed; /* a hook failed during this step */
	/* By frame of the zone. */
	uint32_t entries[BLOCKS_MAX * PAGES];
	uint32_t pins[BLOCKS_MAX * PAGES];
	int mapper[BLOCKS_MAX * PAGES];     /* a space that maps it */
	bool shared[BLOCKS_MAX * PAGES];    /* several do */
	bool exclusive[BLOCKS_MAX * PAGES]; /* some entry is not COW */
} model;

static uint64_t current_seed;
static struct {
	uint64_t forks, failed_forks, reuses, copies_at_fork, takes, orphans;
} met; /* over all seeds */

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

static uint64_t fail_begin(struct model *m, enum ctg_sim_hook *hook)
{
	uint64_t nth = rnd(m, 6) == 0 ? 1 + rnd(m, 6) : 0;

	*hook = failing[rnd(m, 5)];
	ctg_sim_fail(m->w.sim, *hook, nth);
	return nth;
}

static void fail_end(struct model *m, enum ctg_sim_hook hook, uint64_t nth)
{
	uint64_t calls = ctg_sim_fail(m->w.sim, hook, 0);

	m->failed = nth != 0 && calls >= nth;
}

/* Is an error one that the state of the world explains? `free`: frames that were, before. */
static void explained(struct model *m, const struct space *s, int ret, uint64_t free, uint64_t need)
{
	if (ret == -CTG_ENOSPC)
		assert_non_null(s->group);
	else if (ret == -CTG_ENOMEM)
		assert_true(m->failed || free < need);
	else
		assert_true(m->failed && ret == -CTG_EBUSY);
}

/* ---- pins of a space ------------------------------------------------------------------------- */

/* The space loses a page, or all: what devices see of it is theirs alone now. */
static void detach(struct model *m, int space, uint64_t page, bool ends)
{
	struct space *s = &m->space[space];

	for (unsigned i = 0; i < PINS; i++) {
		struct pin *pin = &m->pin[i];

		if (pin->pfn == CTG_PFN_NONE || pin->space != space)
			continue;
		if (pin->attached && (ends || pin->page == page)) {
			memcpy(pin->bytes, s->bytes[pin->page], KEPT);
			pin->attached = false;
		}
		if (ends) {
			pin->space = -1;
			met.orphans++;
		}
	}
}

static void write_through(struct model *m, struct pin *pin)
{
	unsigned char *frame = ctg_sim_frame(m->w.sim, pin->pfn);
	unsigned char byte = (unsigned char)(1 + rnd(m, 255));
	size_t at = (size_t)rnd(m, KEPT);

	frame[at] = byte;
	for (unsigned i = 0; i < PINS; i++) {
		struct pin *other = &m->pin[i];

		if (other->pfn != pin->pfn)
			continue;
		if (other->attached)
			m->space[other->space].bytes[other->page][at] = byte;
		else
			other->bytes[at] = byte;
	}
}

static void check_pin(struct model *m, const struct pin *pin)
{
	const unsigned char *bytes = pin->bytes;

	if (pin->attached) {
		const struct space *s = &m->space[pin->space];

		assert_int_equal(pfn_of(s->mm, BASE + pin->page), pin->pfn);
		assert_false(is_cow(s->mm, BASE + pin->page));
		bytes = s->bytes[pin->page];
	}
	assert_memory_equal(ctg_sim_frame(m->w.sim, pin->pfn), bytes, KEPT);
}

/* ---- operations ------------------------------------------------------------------------------ */

static struct ctg_vrange random_range(struct model *m)
{
	uint64_t unit = rnd(m, 4) == 0 ? PAGES : 1;
	uint64_t max = rnd(m, 4) == 0 ? WINDOW : rnd(m, 2) == 0 ? 20 : 600;
	uint64_t first = rnd(m, WINDOW) / unit * unit;
	uint64_t nr = (1 + rnd(m, max) + unit - 1) / unit * unit;

	if (nr > WINDOW - first)
		nr = WINDOW - first;
	return (struct ctg_vrange){first, nr};
}

static uint64_t mapped_pages(const struct space *s, struct ctg_vrange r)
{
	uint64_t nr = 0;

	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++)
		nr += s->mapped[i];
	return nr;
}

static void do_mmap(struct model *m, struct space *s, struct ctg_vrange r)
{
	unsigned prot = rnd(m, 5) == 0 ? (unsigned)rnd(m, 3) : RW;

	if (mapped_pages(s, r) != 0)
		return;
	assert_int_equal(ctg_mmap(s->mm, BASE + r.vpn, r.nr, prot), 0);
	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++) {
		s->mapped[i] = true;
		s->prot[i] = prot;
		memset(s->bytes[i], 0, KEPT);
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
		detach(m, (int)(s - m->space), i, false);
		s->mapped[i] = s->mapped[i] && reserve;
		memset(s->bytes[i], 0, KEPT);
	}
}

static void do_mprotect(struct model *m, struct space *s, struct ctg_vrange r)
{
	unsigned prot = rnd(m, 3) == 0 ? (unsigned)rnd(m, 3) : RW;
	enum ctg_sim_hook hook;
	uint64_t nth = fail_begin(m, &hook);
	int ret = ctg_mprotect(s->mm, BASE + r.vpn, r.nr, prot);

	fail_end(m, hook, nth);
	if (ret != 0) {
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_true(m->failed || mapped_pages(s, r) != r.nr);
		return;
	}
	for (uint64_t i = r.vpn; i < r.vpn + r.nr; i++)
		s->prot[i] = prot;
}

static void do_populate(struct model *m, struct space *s, struct ctg_vrange r)
{
	uint64_t free = world_free(&m->w), nth;
	enum ctg_sim_hook hook;
	int ret;

	nth = fail_begin(m, &hook);
	ret = ctg_mm_populate(s->mm, BASE + r.vpn, r.nr, NULL);
	fail_end(m, hook, nth);
	if (ret == -CTG_EFAULT)
		assert_true(mapped_pages(s, r) != r.nr);
	else if (ret != 0)
		explained(m, s, ret, free, r.nr);
}

static void do_access(struct model *m, struct space *s, uint64_t page, bool write)
{
	uint64_t free = world_free(&m->w), nth, addr = (BASE + page) << CTG_PAGE_SHIFT;
	bool allowed =
		s->mapped[page] && (write ? s->prot[page] & CTG_PROT_WRITE : s->prot[page]) != 0;
	unsigned char buf[KEPT];
	ctg_pfn_t before = lookup(s->mm, BASE + page, 1).pfn;
	bool was_cow = is_cow(s->mm, BASE + page);
	enum ctg_sim_hook hook;
	int ret;

	memset(buf, (int)(1 + rnd(m, 255)), KEPT);
	ctg_sim_set_cpu((unsigned)rnd(m, 2));
	nth = fail_begin(m, &hook);
	ret = write ? ctg_sim_write(m->w.sim, s->mm, addr, buf, KEPT)
		    : ctg_sim_read(m->w.sim, s->mm, addr, buf, KEPT);
	fail_end(m, hook, nth);
	ctg_sim_set_cpu(0);
	if (!allowed) {
		assert_int_equal(ret, -CTG_EFAULT);
		return;
	}
	if (ret != 0) {
		explained(m, s, ret, free, 1);
		return;
	}
	if (!write) {
		assert_memory_equal(s->bytes[page], buf, KEPT);
		return;
	}
	memcpy(s->bytes[page], buf, KEPT);
	if (was_cow && lookup(s->mm, BASE + page, 1).pfn == before)
		met.reuses++;
}

static void do_accesses(struct model *m, struct space *s, struct ctg_vrange r, bool write)
{
	uint64_t step = 1 + rnd(m, 60);

	for (uint64_t page = r.vpn; page < r.vpn + r.nr; page += step)
		do_access(m, s, page, write);
}

static int free_space(const struct model *m)
{
	for (int i = 0; i < SPACES; i++)
		if (m->space[i].mm == NULL)
			return i;
	return -1;
}

/* Frames of a space's pages that are pinned, as many as a fork may have to copy. */
static uint64_t pinned_pages(struct model *m, const struct space *s)
{
	uint64_t nr = 0;

	for (uint64_t page = 0; page < WINDOW; page++) {
		uint64_t entry = raw_entry(s->mm, BASE + page);

		if ((entry & CTG_PTE_PRESENT) != 0)
			nr += ctg_word_pin(head_word(&m->w, s->mm, BASE + page)) != 0;
	}
	return nr;
}

static void do_fork(struct model *m, struct space *s)
{
	struct ctg_mm_config config = {.owner = m};
	uint64_t free = world_free(&m->w), need = pinned_pages(m, s), nth;
	struct space *child;
	enum ctg_sim_hook hook;
	int at = free_space(m), ret;

	if (at < 0)
		return;
	child = &m->space[at];
	memcpy(child, s, sizeof(*child));
	child->mm = NULL;
	child->nr_pins = 0;
	child->group = rnd(m, 3) == 0 ? NULL : m->group[rnd(m, GROUPS)];
	config.group = child->group;
	nth = fail_begin(m, &hook);
	ret = ctg_mm_fork(s->mm, &config, &child->mm);
	fail_end(m, hook, nth);
	if (ret != 0) {
		met.failed_forks++;
		assert_null(child->mm);
		explained(m, child, ret, free, need);
		return;
	}
	met.forks++;
	met.copies_at_fork += free - world_free(&m->w);
}

static void check_contents(struct model *m, const struct space *s)
{
	for (uint64_t page = 0; page < WINDOW; page++) {
		static const unsigned char zero[KEPT];
		ctg_pfn_t pfn = lookup(s->mm, BASE + page, 1).pfn;

		assert_memory_equal(s->bytes[page],
			pfn == CTG_PFN_NONE ? zero : ctg_sim_frame(m->w.sim, pfn), KEPT);
	}
}

static void do_exit(struct model *m, int at)
{
	struct space *s = &m->space[at];

	check_contents(m, s);
	detach(m, at, 0, true);
	ctg_mm_destroy(s->mm, rnd(m, 2) == 0);
	s->mm = NULL;
}

static void do_pin(struct model *m, struct space *s, uint64_t page)
{
	unsigned flags =
		(rnd(m, 2) == 0 ? CTG_FOLL_WRITE : 0) | (rnd(m, 4) == 0 ? CTG_FOLL_LONGTERM : 0);
	unsigned right = (flags & CTG_FOLL_WRITE) != 0 ? CTG_PROT_WRITE : RW;
	uint64_t free = world_free(&m->w), nth;
	struct pin *pin = m->pin;
	enum ctg_sim_hook hook;
	int64_t ret;

	while (pin < &m->pin[PINS] && pin->pfn != CTG_PFN_NONE)
		pin++;
	if (pin == &m->pin[PINS])
		return;
	nth = fail_begin(m, &hook);
	ret = rnd(m, 2) == 0 ? ctg_pin_user_pages(s->mm, BASE + page, 1, flags, &pin->pfn)
			     : ctg_pin_user_pages_fast(s->mm, BASE + page, 1, flags, &pin->pfn);
	fail_end(m, hook, nth);
	if (ret != 1) {
		pin->pfn = CTG_PFN_NONE;
		if (!s->mapped[page] || (s->prot[page] & right) == 0)
			assert_int_equal(ret, -CTG_EFAULT);
		else
			explained(m, s, (int)ret, free, 1);
		return;
	}
	assert_true(s->mapped[page] && (s->prot[page] & right) != 0);
	pin->space = (int)(s - m->space);
	pin->page = page;
	pin->attached = true;
	s->nr_pins++;
	check_pin(m, pin);
}

static void do_unpin(struct model *m, struct pin *pin)
{
	if (pin->pfn == CTG_PFN_NONE)
		return;
	check_pin(m, pin);
	assert_int_equal(ctg_unpin_user_pages(m->w.ctg, &pin->pfn, 1), 0);
	if (pin->space >= 0)
		m->space[pin->space].nr_pins--;
	pin->pfn = CTG_PFN_NONE;
}

static void do_take(struct model *m)
{
	uint64_t nr = 1 + rnd(m, rnd(m, 2) == 0 ? 64 : 2 * PAGES), nth, held;
	ctg_pfn_t start = m->w.zone->base + rnd(m, m->blocks * PAGES - nr);
	enum ctg_sim_hook hook;
	int ret;

	nth = fail_begin(m, &hook);
	ret = ctg_alloc_contig_range(m->w.ctg, start, nr, NULL);
	fail_end(m, hook, nth);
	if (ret != 0) {
		assert_true(ret == -CTG_EBUSY || ret == -CTG_ENOMEM);
		return;
	}
	met.takes++;
	for (uint64_t i = 0; i < nr; i++)
		memset(ctg_sim_frame(m->w.sim, start + i), 0x99, KEPT);
	assert_int_equal(ctg_free_contig_range(m->w.ctg, start, nr, &held), 0);
	assert_int_equal(held, 0);
}

static void step(struct model *m)
{
	int at = (int)rnd(m, SPACES);
	struct space *s = &m->space[at];
	struct ctg_vrange r = random_range(m);
	struct pin *pin = &m->pin[rnd(m, PINS)];

	m->failed = false;
	if (s->mm == NULL) {
		struct ctg_mm_config config = {.owner = m, .group = m->group[rnd(m, GROUPS)]};

		/* Families come from forks mostly; a new one begins now and then. */
		if (rnd(m, 8) != 0)
			return;
		memset(s, 0, sizeof(*s));
		s->group = config.group;
		assert_int_equal(ctg_mm_create(m->w.ctg, &config, &s->mm), 0);
		return;
	}
	switch (rnd(m, 22)) {
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
	case 10:
		do_accesses(m, s, r, true);
		break;
	case 11:
	case 12:
	case 13:
		do_fork(m, s);
		break;
	case 14:
		do_exit(m, at);
		break;
	case 15:
	case 16:
	case 17:
		do_pin(m, s, rnd(m, 2) == 0 ? r.vpn : rnd(m, 8));
		break;
	case 18:
		do_unpin(m, pin);
		break;
	case 19:
		if (pin->pfn != CTG_PFN_NONE)
			write_through(m, pin);
		break;
	default:
		do_take(m);
		break;
	}
}

/* ---- what must hold -------------------------------------------------------------------------- */

/* Compare each entry of a space with the model, and count who maps which frame how. */
static void check_entries(struct model *m, int at)
{
	const struct space *s = &m->space[at];
	uint64_t present = 0;

	for (uint64_t page = 0; page < WINDOW; page++) {
		unsigned level;
		uint64_t entry = ctg_pte_read(s->mm, BASE + page, &level);
		uint64_t rights = !s->mapped[page] || s->prot[page] == 0  ? 0
				  : (s->prot[page] & CTG_PROT_WRITE) != 0 ? CTG_PTE_RIGHTS
									  : CTG_PTE_READ;
		ctg_pfn_t head;
		uint64_t i;

		assert_int_equal(entry != 0, s->mapped[page]);
		assert_int_equal(entry & CTG_PTE_RIGHTS, rights);
		assert_false((entry & CTG_PTE_MOVING) != 0);
		if ((entry & CTG_PTE_PRESENT) == 0)
			continue;
		present++;
		head = ctg_frame_head(m->w.ctg, ctg_pte_pfn(entry));
		i = head - m->w.zone->base;
		assert_ptr_equal(ctg_frame_of(m->w.ctg, head)->anon, s->mm->anon);
		m->entries[i] += level == 0 || page % PAGES == 0;
		m->shared[i] = m->shared[i] || (m->mapper[i] != -1 && m->mapper[i] != at);
		m->mapper[i] = at;
		m->exclusive[i] = m->exclusive[i] || (entry & CTG_PTE_COW) == 0;
	}
	assert_int_equal(ctg_load64_relaxed(&s->mm->nr_present), present);
	assert_int_equal(s->mm->batch.nr_runs, 0);
	assert_int_equal(ctg_mm_nr_pins(s->mm), s->nr_pins);
}

/* Each frame in use is charged to whom it says. */
static void check_charges(struct model *m, const uint64_t *charged)
{
	for (unsigned i = 0; i < GROUPS; i++) {
		struct ctg_group_stat stat;
		uint64_t sum = charged[i];

		/* The first is the parent of the others. */
		for (unsigned j = 1; i == 0 && j < GROUPS; j++)
			sum += charged[j];
		ctg_group_stat(m->group[i], &stat);
		assert_int_equal(stat.charged, sum);
		assert_true(stat.peak <= stat.limit);
	}
}

static void check(struct model *m)
{
	uint64_t used = 0, charged[GROUPS] = {0};

	memset(m->entries, 0, sizeof(m->entries));
	memset(m->pins, 0, sizeof(m->pins));
	memset(m->shared, 0, sizeof(m->shared));
	memset(m->exclusive, 0, sizeof(m->exclusive));
	for (uint64_t i = 0; i < m->blocks * PAGES; i++)
		m->mapper[i] = -1;
	for (int i = 0; i < SPACES; i++)
		if (m->space[i].mm != NULL)
			check_entries(m, i);
	for (unsigned i = 0; i < PINS; i++) {
		if (m->pin[i].pfn == CTG_PFN_NONE)
			continue;
		check_pin(m, &m->pin[i]);
		m->pins[ctg_frame_head(m->w.ctg, m->pin[i].pfn) - m->w.zone->base]++;
	}
	for (uint64_t i = 0; i < m->blocks * PAGES; i++) {
		const struct ctg_frame *frame = ctg_frame_of(m->w.ctg, m->w.zone->base + i);
		uint64_t word = ctg_load64_relaxed(&frame->word) & ~CTG_WORD_FLAGS, nr;

		if (word == 0 && m->entries[i] == 0 && m->pins[i] == 0)
			continue;
		assert_int_equal(word, counts(m->entries[i], m->pins[i], 0));
		assert_false(m->shared[i] && m->exclusive[i]);
		nr = (uint64_t)1 << ctg_info_order(ctg_load32_relaxed(&frame->info));
		used += nr;
		for (unsigned g = 0; g < GROUPS; g++)
			if (frame->group == ctg_group_index(m->group[g]))
				charged[g] += nr;
	}
	assert_int_equal(world_free(&m->w), m->w.nr_free - used);
	check_charges(m, charged);
}

static void run_seed(uint64_t seed)
{
	struct model *m = &model;

	current_seed = seed;
	memset(m, 0, sizeof(*m));
	m->random = seed * 0x9e3779b97f4a7c15u + 1;
	for (unsigned i = 0; i < 8; i++)
		rnd(m, 2);
	m->blocks = 6 + rnd(m, BLOCKS_MAX - 5);
	world_open(&m->w, m->blocks);
	for (unsigned i = 0; i < PINS; i++)
		m->pin[i].pfn = CTG_PFN_NONE;
	for (unsigned i = 0; i < GROUPS; i++)
		assert_int_equal(
			ctg_group_create(m->w.ctg, i == 0 ? NULL : m->group[0],
				rnd(m, 2) == 0 ? CTG_NO_LIMIT : rnd(m, 3000), &m->group[i]),
			0);
	for (unsigned i = 0; i < STEPS; i++) {
		step(m);
		if (i % 12 == 0 || i + 1 == STEPS)
			check(m);
	}
	for (int i = 0; i < SPACES; i++)
		if (m->space[i].mm != NULL)
			do_exit(m, i);
	check(m);
	for (unsigned i = 0; i < PINS; i++)
		do_unpin(m, &m->pin[i]);
	assert_int_equal(world_free(&m->w), m->w.nr_free);
	for (unsigned i = GROUPS; i-- > 0;)
		assert_int_equal(ctg_group_destroy(m->group[i]), 0);
	assert_null(m->w.ctg->batches);
	ctg_sim_destroy(m->w.sim);
	current_seed = 0;
}

static void random_families(void **state)
{
	const char *one = getenv("CONTIG_SEED");

	(void)state;
	if (one != NULL) {
		run_seed(strtoull(one, NULL, 0));
		return;
	}
	for (uint64_t seed = 1; seed <= SEEDS; seed++)
		run_seed(seed);
	/* What is to be tested has happened. */
	assert_true(met.forks > 10 * SEEDS && met.failed_forks > SEEDS);
	assert_true(met.copies_at_fork > SEEDS && met.reuses > SEEDS);
	assert_true(met.takes > SEEDS && met.orphans > SEEDS);
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
		cmocka_unit_test_teardown(random_families, report_seed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
