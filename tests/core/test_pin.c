/* SPDX-License-Identifier: MIT */
/* Pins by handle, the ledger, and the accounts that outlive address spaces. */
#include "moving.h"

#include "gup.h"

static struct ctg_pin *pin_of(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, const char *owner)
{
	struct ctg_pin *pin = NULL;

	assert_int_equal(ctg_pin_range(mm, vpn, nr, flags, owner, &pin), 0);
	assert_non_null(pin);
	return pin;
}

static uint32_t pins_on(const struct world *w, ctg_pfn_t pfn)
{
	return ctg_word_pin(word_of(w, pfn));
}

/* The extents, page by page, are where the pages are. */
static void check_extents(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, const struct ctg_pin *pin)
{
	size_t nr_extents;
	const struct ctg_extent *extents = ctg_pin_extents(pin, &nr_extents);
	uint64_t done = 0;

	for (size_t i = 0; i < nr_extents; i++) {
		if (i != 0)
			assert_true(extents[i - 1].pfn + extents[i - 1].nr != extents[i].pfn);
		for (uint64_t at = 0; at < extents[i].nr; at++)
			assert_int_equal(pfn_of(mm, vpn + done++), extents[i].pfn + at);
	}
	assert_int_equal(done, nr);
}

/* ---- handles ----------------------------------------------------------------------------- */

static void test_one_count_a_frame(void **state)
{
	struct world w;
	struct ctg_pin *pin;
	ctg_pfn_t head;
	struct ctg_mm *mm;
	size_t nr;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + PAGES - 4, 4);
	head = map_large(&w, mm, BASE + PAGES);
	map_small(&w, mm, BASE + 2 * PAGES, 4);
	pin = pin_of(mm, BASE + PAGES - 4, PAGES + 8, CTG_FOLL_WRITE, "dma");
	check_extents(mm, BASE + PAGES - 4, PAGES + 8, pin);
	assert_int_equal(word_of(&w, head), CTG_WORD_MAP1 + CTG_WORD_PIN1);
	for (unsigned i = 0; i < 4; i++) {
		assert_int_equal(pins_on(&w, pfn_of(mm, BASE + PAGES - 4 + i)), 1);
		assert_int_equal(pins_on(&w, pfn_of(mm, BASE + 2 * PAGES + i)), 1);
	}
	assert_int_equal(ctg_mm_nr_pins(mm), 9);
	assert_int_equal(entry_of(mm, BASE + PAGES) & CTG_PTE_DIRTY, CTG_PTE_DIRTY);
	ctg_pin_release(pin, false);
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	assert_int_equal(word_of(&w, head), CTG_WORD_MAP1);
	/* A part of a large frame is one extent and one count. */
	pin = pin_of(mm, BASE + PAGES + 5, 9, 0, "dma");
	assert_int_equal(ctg_pin_extents(pin, &nr)->pfn, head + 5);
	assert_int_equal(nr, 1);
	assert_int_equal(word_of(&w, head), CTG_WORD_MAP1 + CTG_WORD_PIN1);
	ctg_pin_release(pin, false);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Split: the pieces of one frame that follow each other are held by one count. */
static void test_pieces_of_one_frame(void **state)
{
	struct world w;
	struct ctg_pin *whole, *part;
	ctg_pfn_t head;
	struct ctg_mm *mm;
	size_t nr;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	head = map_large(&w, mm, BASE + PAGES);
	assert_int_equal(ctg_munmap(mm, BASE + PAGES + 100, 1), 0);
	part = pin_of(mm, BASE + PAGES, 100, 0, "a");
	assert_int_equal(pins_on(&w, head), 1);
	/* A page of another frame between: two runs of the frame, two counts. */
	map_small(&w, mm, BASE + PAGES + 100, 1);
	whole = pin_of(mm, BASE + PAGES, PAGES, CTG_FOLL_WRITE, "b");
	check_extents(mm, BASE + PAGES, PAGES, whole);
	ctg_pin_extents(whole, &nr);
	assert_int_equal(nr, 3);
	assert_int_equal(pins_on(&w, head), 3);
	assert_int_equal(ctg_mm_nr_pins(mm), 4);
	assert_int_equal(ctg_munmap(mm, BASE + PAGES, PAGES), 0);
	assert_int_equal(word_of(&w, head), 3 * CTG_WORD_PIN1);
	ctg_pin_release(part, true);
	assert_int_equal(word_of(&w, head), 2 * CTG_WORD_PIN1);
	ctg_pin_release(whole, true);
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_release_marks_dirty(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	mapped(mm, BASE + PAGES - 2, 2 + PAGES, RW);
	ctg_pin_release(pin_of(mm, BASE + PAGES - 2, 2 + PAGES, 0, "a"), false);
	assert_int_equal(entry_of(mm, BASE + PAGES - 1) & CTG_PTE_DIRTY, 0);
	assert_int_equal(entry_of(mm, BASE + PAGES) & CTG_PTE_DIRTY, 0);
	ctg_pin_release(pin_of(mm, BASE + PAGES - 1, 1 + PAGES, 0, "a"), true);
	assert_int_equal(entry_of(mm, BASE + PAGES - 2) & CTG_PTE_DIRTY, 0);
	assert_int_equal(entry_of(mm, BASE + PAGES - 1) & CTG_PTE_DIRTY, CTG_PTE_DIRTY);
	assert_int_equal(entry_of(mm, BASE + PAGES) & CTG_PTE_DIRTY, CTG_PTE_DIRTY);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Scattered so that each page is an extent: the list has to grow, and each time may fail. */
static void test_every_allocation_failed_in_turn(void **state)
{
	struct world w;
	struct hoard *hoard;
	struct ctg_pin *pin = NULL;
	struct ctg_mm *mm;
	unsigned failures = 0;
	int ret = -1;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 1); /* the tables */
	hoard = fragment(&w, 100, CTG_PFN_NONE);
	map_small(&w, mm, BASE + 2, 60);
	for (uint64_t nth = 1; ret != 0; nth++) {
		struct before *before = before_take(&w, mm, BASE + 1, 61);

		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, nth);
		ret = ctg_pin_range(mm, BASE + 1, 61, CTG_FOLL_WRITE, "x", &pin);
		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0);
		if (ret == 0) {
			before_free(before);
			break;
		}
		assert_int_equal(ret, -CTG_ENOMEM);
		assert_null(pin);
		assert_int_equal(ctg_mm_nr_pins(mm), 0);
		before_check(&w, mm, before, 0);
		failures++;
	}
	assert_int_equal(failures, 5); /* the handle; 8, 16, 32, 64 extents */
	check_extents(mm, BASE + 1, 61, pin);
	assert_int_equal(ctg_mm_nr_pins(mm), 61);
	ctg_pin_release(pin, false);
	hoard_free_all(&w, hoard);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* All or nothing, wherever it ends. */
static void test_all_or_nothing(void **state)
{
	struct world w;
	struct before *before;
	struct ctg_pin *pin = NULL;
	struct ctg_mm *mm;
	ctg_pfn_t full;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 9);
	full = pfn_of(mm, BASE + 5);
	assert_int_equal(ctg_mprotect(mm, BASE + 8, 1, CTG_PROT_READ), 0);
	hold(&w, full, (uint64_t)CTG_WORD_PIN_MAX * CTG_WORD_PIN1);
	before = before_take(&w, mm, BASE + 1, 9);
	assert_int_equal(ctg_pin_range(mm, BASE + 1, 9, 0, "x", &pin), -CTG_EOVERFLOW);
	assert_int_equal(ctg_pin_range(mm, BASE + 6, 5, 0, "x", &pin), -CTG_EFAULT);
	assert_int_equal(ctg_pin_range(mm, BASE + 6, 4, CTG_FOLL_WRITE, "x", &pin), -CTG_EFAULT);
	assert_int_equal(ctg_pin_range(mm, BASE + 10, 1, 0, "x", &pin), -CTG_EFAULT);
	assert_null(pin);
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	before_check(&w, mm, before, 0);
	hold(&w, full, -((uint64_t)CTG_WORD_PIN_MAX * CTG_WORD_PIN1));
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

static void test_bad_input_is_refused(void **state)
{
	struct world w;
	struct ctg_pin *pin = NULL;
	struct ctg_mm *mm;
	size_t nr = 7;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 2);
	assert_int_equal(ctg_pin_range(NULL, BASE + 1, 1, 0, "x", &pin), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, BASE + 1, 0, 0, "x", &pin), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, BASE + 1, 1, 0, NULL, &pin), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, BASE + 1, 1, 0, "x", NULL), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, CTG_MM_MAX_VPN - 1, 2, 0, "x", &pin), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, UINT64_MAX, UINT64_MAX, 0, "x", &pin), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, BASE + 1, 1, CTG_FOLL_GET, "x", &pin), -CTG_EINVAL);
	assert_int_equal(ctg_pin_range(mm, BASE + 1, 1, 1 << 5, "x", &pin), -CTG_EINVAL);
	assert_null(pin);
	ctg_pin_release(NULL, true);
	assert_null(ctg_pin_extents(NULL, &nr));
	assert_int_equal(nr, 0);
	assert_int_equal(ctg_pins_for_each(NULL, NULL, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_pins_for_each(w.ctg, NULL, NULL), -CTG_EINVAL);
	pin = pin_of(mm, BASE + 1, 1, CTG_FOLL_PIN, "");
	assert_non_null(ctg_pin_extents(pin, NULL));
	ctg_pin_release(pin, false);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- many -------------------------------------------------------------------------------- */

#define MANY 1000000u

/* A million registrations of one frame, and all of them gone again. */
static void pin_a_million_times(unsigned order)
{
	struct ctg_mm_config config = {.max_order = order};
	struct ctg_pin **pins = calloc(MANY, sizeof(struct ctg_pin *));
	uint64_t nr = (uint64_t)1 << order;
	ctg_vpn_t vpn = (ctg_vpn_t)1 << 20;
	struct ctg_mm *mm;
	struct world w;
	ctg_pfn_t head;

	assert_non_null(pins);
	/* The zone begins below a boundary of 1 GiB and reaches beyond the end of the next. */
	world_open(&w, order == CTG_MAX_ORDER ? 2 * 512 : 4);
	config.owner = &w;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), 0);
	mapped(mm, vpn, nr, RW);
	head = pfn_of(mm, vpn);
	assert_int_equal(ctg_info_order(info_of(&w, head)), order);
	/* Some of the whole and some of parts. */
	for (unsigned i = 0; i < MANY; i++)
		pins[i] = pin_of(mm, vpn + i % nr, i % 2 ? 1 : nr - i % nr, CTG_FOLL_WRITE, "mr");
	assert_int_equal(word_of(&w, head), CTG_WORD_MAP1 + MANY * CTG_WORD_PIN1);
	assert_int_equal(ctg_mm_nr_pins(mm), MANY);
	for (unsigned i = 0; i < MANY; i++) /* in another order */
		ctg_pin_release(pins[(uint64_t)i * 7919 % MANY], false);
	assert_int_equal(word_of(&w, head), CTG_WORD_MAP1);
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
	free(pins);
}

static void test_a_million_pins_of_2_mib(void **state)
{
	(void)state;
	pin_a_million_times(CTG_PAGEBLOCK_ORDER);
}

static void test_a_million_pins_of_1_gib(void **state)
{
	(void)state;
	pin_a_million_times(CTG_MAX_ORDER);
}

/* A frame of 1 GiB in pieces of 2 MiB and of 4 KiB: the counts are all on its one head. */
static void test_pieces_of_1_gib(void **state)
{
	struct ctg_mm_config config = {.max_order = CTG_MAX_ORDER};
	const uint64_t nr = (uint64_t)1 << CTG_MAX_ORDER;
	ctg_vpn_t vpn = (ctg_vpn_t)1 << 20;
	ctg_pfn_t head, *pages = calloc(nr, sizeof(*pages));
	struct ctg_pin *pin;
	struct ctg_mm *mm;
	struct world w;

	(void)state;
	assert_non_null(pages);
	world_open(&w, 2 * 512);
	config.owner = &w;
	assert_int_equal(ctg_mm_create(w.ctg, &config, &mm), 0);
	mapped(mm, vpn, nr, RW);
	head = pfn_of(mm, vpn);
	assert_int_equal(ctg_pin_user_pages_fast(mm, vpn, nr, CTG_FOLL_WRITE, pages), nr);
	assert_int_equal(word_of(&w, head), CTG_WORD_MAP1 + nr * CTG_WORD_PIN1);
	/* Pinned, it may be split all the same, and unmapped in part: the pins stay. */
	assert_int_equal(ctg_munmap(mm, vpn, PAGES + 1), 0);
	pin = pin_of(mm, vpn + PAGES + 1, nr - PAGES - 1, 0, "rest");
	assert_int_equal(pins_on(&w, head), nr + 1);
	ctg_pin_release(pin, true);
	for (uint64_t i = 0; i < nr; i += PAGES + 1)
		assert_int_equal(pages[i], head + i);
	assert_int_equal(ctg_unpin_user_pages_dirty_lock(w.ctg, pages, nr, true), 0);
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	assert_int_equal(pins_on(&w, head), 0);
	/* What cannot be told apart: its pages are one frame, so it cannot leave while one is held.
	 */
	assert_int_equal(ctg_pin_user_pages_fast(mm, vpn + PAGES + 5, 1, 0, pages), 1);
	assert_int_equal(ctg_munmap(mm, vpn, nr), 0);
	assert_int_equal(world_free(&w), w.nr_free - nr);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, pages, 1), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
	free(pages);
}

/*
 * One block, registered by several owners over and over, as a whole and in parts, and released in
 * any order: what is left is always what the registrations that are left add up to.
 */
static void test_one_block_many_owners(void **state)
{
	enum { NR = 60, LEN = 40 };
	static const char *const owners[3] = {"nic", "gpu", "disk"};
	struct ctg_pin *pins[NR] = {0};
	ctg_vpn_t at[NR];
	uint64_t len[NR];
	uint32_t random = 12345;
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, LEN);
	for (unsigned step = 0; step < 2000; step++) {
		unsigned i;

		random = random * 1103515245 + 12345;
		i = (random >> 8) % NR;
		if (pins[i] != NULL) {
			ctg_pin_release(pins[i], (random & 0x80) != 0);
			pins[i] = NULL;
		} else {
			at[i] = (random >> 16) % LEN;
			len[i] = 1 + (random >> 4) % (LEN - at[i]);
			pins[i] = pin_of(mm, BASE + 1 + at[i], len[i],
				random & 0x40 ? CTG_FOLL_WRITE : 0, owners[i % 3]);
		}
		for (unsigned page = 0; step % 50 == 0 && page < LEN; page++) {
			uint32_t want = 0;

			for (unsigned k = 0; k < NR; k++)
				want += pins[k] != NULL && page - at[k] < len[k];
			assert_int_equal(pins_on(&w, pfn_of(mm, BASE + 1 + page)), want);
		}
	}
	for (unsigned i = 0; i < NR; i++)
		ctg_pin_release(pins[i], false);
	assert_int_equal(ctg_mm_nr_pins(mm), 0);
	check_stamp(&w, mm, BASE + 1, LEN);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* ---- the ledger -------------------------------------------------------------------------- */

struct seen {
	unsigned nr, stop_at;
	char owner[8][32];
	uint64_t since[8], pages[8];
	bool longterm[8], write[8], orphan[8];
	struct ctg_extent first[8];
};

static int see(const struct ctg_pin_info *info, void *arg)
{
	struct seen *s = arg;
	unsigned i = s->nr++;

	assert_in_range(i, 0, 7);
	assert_in_range(strlen(info->owner), 0, 31);
	strcpy(s->owner[i], info->owner);
	s->since[i] = info->since;
	s->pages[i] = info->nr_pages;
	s->longterm[i] = info->longterm;
	s->write[i] = info->write;
	s->orphan[i] = info->orphan;
	assert_true(info->nr_extents != 0);
	s->first[i] = info->extents[0];
	return s->nr == s->stop_at ? 42 : 0;
}

static struct seen ledger_of(struct world *w)
{
	struct seen s = {0};

	assert_int_equal(ctg_pins_for_each(w->ctg, see, &s), 0);
	for (unsigned i = 1; i < s.nr; i++)
		assert_true(s.since[i - 1] <= s.since[i]);
	return s;
}

static void test_the_ledger_is_in_order(void **state)
{
	struct world w;
	struct ctg_pin *a, *b, *c;
	struct ctg_mm *mm;
	struct seen s = {0};

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 10);
	assert_int_equal(ledger_of(&w).nr, 0);
	a = pin_of(mm, BASE + 1, 3, 0, "camera");
	b = pin_of(mm, BASE + 2, 4, CTG_FOLL_WRITE | CTG_FOLL_LONGTERM,
		"a name that is longer than what is kept of it");
	c = pin_of(mm, BASE + 9, 1, CTG_FOLL_WRITE, "codec");
	s = ledger_of(&w);
	assert_int_equal(s.nr, 3);
	assert_string_equal(s.owner[0], "camera");
	assert_string_equal(s.owner[1], "a name that is longer than what");
	assert_string_equal(s.owner[2], "codec");
	assert_int_equal(s.pages[1], 4);
	assert_true(!s.write[0] && s.write[1] && s.write[2]);
	assert_true(!s.longterm[0] && s.longterm[1] && !s.longterm[2]);
	assert_false(s.orphan[0] || s.orphan[1] || s.orphan[2]);
	assert_int_equal(s.first[2].pfn, pfn_of(mm, BASE + 9));
	assert_int_equal(s.first[2].nr, 1);
	s = (struct seen){.stop_at = 2};
	assert_int_equal(ctg_pins_for_each(w.ctg, see, &s), 42);
	assert_int_equal(s.nr, 2);
	/* From the middle, the end, the only one. */
	ctg_pin_release(b, false);
	s = ledger_of(&w);
	assert_int_equal(s.nr, 2);
	assert_string_equal(s.owner[1], "codec");
	ctg_pin_release(c, false);
	c = pin_of(mm, BASE + 1, 1, 0, "next");
	s = ledger_of(&w);
	assert_int_equal(s.nr, 2);
	assert_string_equal(s.owner[1], "next");
	ctg_pin_release(a, false);
	assert_string_equal(ledger_of(&w).owner[0], "next");
	ctg_pin_release(c, false);
	assert_int_equal(ledger_of(&w).nr, 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

/* Pins at exit: the frames stay, the ledger says that nobody is left, the owner releases. */
static void test_pins_outlive_their_space(void **state)
{
	struct world w;
	struct ctg_pin *handle;
	ctg_pfn_t page, kept;
	struct ctg_mm *mm, *other;

	(void)state;
	for (unsigned dead = 0; dead < 2; dead++) {
		struct seen s;

		world_open(&w, 8);
		mm = space_new(&w, 0);
		map_small(&w, mm, BASE + 1, 4);
		handle = pin_of(mm, BASE + 2, 2, CTG_FOLL_WRITE, "left");
		assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 2, 1, 0, &page), 1);
		kept = page;
		ctg_mm_destroy(mm, dead);
		s = ledger_of(&w);
		assert_int_equal(s.nr, 1);
		assert_true(s.orphan[0]);
		assert_int_equal(s.first[0].pfn, kept);
		assert_int_equal(word_of(&w, kept), 2 * CTG_WORD_PIN1);
		assert_int_equal(world_free(&w), w.nr_free - 2);
		/* Another space has an account of its own, also the same one later on. */
		other = space_new(&w, 0);
		assert_int_equal(ctg_mm_nr_pins(other), 0);
		map_small(&w, other, BASE + 1, 1);
		assert_int_equal(ctg_pin_user_pages_fast(other, BASE + 1, 1, 0, &page), 1);
		assert_int_equal(ctg_mm_nr_pins(other), 1);
		ctg_pin_release(handle, true);
		assert_int_equal(word_of(&w, kept), CTG_WORD_PIN1);
		assert_int_equal(world_free(&w), w.nr_free - 2);
		assert_int_equal(ctg_unpin_user_pages(w.ctg, &kept, 1), 0);
		assert_int_equal(ctg_unpin_user_pages(w.ctg, &kept, 1), -CTG_EINVAL);
		assert_int_equal(ctg_mm_nr_pins(other), 1);
		assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
		assert_int_equal(ctg_mm_nr_pins(other), 0);
		ctg_mm_destroy(other, false);
		world_close(&w);
	}
}

/* A machine that ends first takes the handles' memory along. */
static void test_a_machine_may_end_first(void **state)
{
	struct world w;
	struct ctg_mm *mm;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 4);
	pin_of(mm, BASE + 1, 4, 0, "left");
	pin_of(mm, BASE + 1, 2, 0, "left");
	ctg_mm_destroy(mm, false);
	ctg_sim_destroy(w.sim); /* a leak checker sees the rest */
}

/* ---- accounts ---------------------------------------------------------------------------- */

/* More spaces than a chunk has accounts, some orphaned: each is exact, and all are used again. */
static void test_accounts_are_used_again(void **state)
{
	enum { NR = 150 };
	struct world w;
	struct ctg_mm *mm[NR];
	ctg_pfn_t page[NR];
	uint32_t most;

	(void)state;
	world_open(&w, 8);
	for (unsigned round = 0; round < 3; round++) {
		for (unsigned i = 0; i < NR; i++) {
			mm[i] = space_new(&w, 0);
			mapped(mm[i], BASE + 1, 1, RW);
			assert_int_equal(ctg_pin_user_pages(mm[i], BASE + 1, 1, 0, &page[i]), 1);
		}
		for (unsigned i = 0; i < NR; i++)
			assert_int_equal(ctg_mm_nr_pins(mm[i]), 1);
		for (unsigned i = 0; i < NR; i += 2)
			ctg_mm_destroy(mm[i], false);
		for (unsigned i = 0; i < NR; i++)
			assert_int_equal(ctg_unpin_user_pages(w.ctg, &page[i], 1), 0);
		for (unsigned i = 1; i < NR; i += 2) {
			assert_int_equal(ctg_mm_nr_pins(mm[i]), 0);
			ctg_mm_destroy(mm[i], false);
		}
		if (round == 0)
			most = w.ctg->pins.nr_accounts;
		assert_int_equal(w.ctg->pins.nr_accounts, most);
	}
	assert_int_equal(most, NR + 1);
	assert_int_equal(world_free(&w), w.nr_free);
	ctg_sim_destroy(w.sim);
}

static void test_no_memory_for_an_account(void **state)
{
	struct world w;
	struct ctg_mm *mm;
	ctg_pfn_t page;

	(void)state;
	world_open(&w, 8);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 1);
	w.ctg->pins.nr_accounts = CTG_PIN_CHUNK; /* the next one needs a chunk */
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), -CTG_ENOMEM);
	assert_int_equal(word_of(&w, pfn_of(mm, BASE + 1)), CTG_WORD_MAP1);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
	/* None are left at all. */
	ctg_mm_destroy(mm, false);
	w.ctg->pins.free_account = 0;
	w.ctg->pins.nr_accounts = CTG_PIN_CHUNK * CTG_PIN_CHUNKS;
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 1);
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 1, 1, 0, &page), -CTG_ENOMEM);
	/* References need none. */
	assert_int_equal(ctg_get_user_pages_fast(mm, BASE + 1, 1, 0, &page), 1);
	assert_int_equal(ctg_put_user_pages(w.ctg, &page, 1), 0);
	ctg_mm_destroy(mm, false);
	ctg_sim_destroy(w.sim);
}

/* ---- whose pin it was -------------------------------------------------------------------- */

static void test_the_report_names_the_owner(void **state)
{
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.mode = CTG_MODE_FAST, .report = &report};
	struct world w;
	struct ctg_pin *pin, *later;
	struct ctg_mm *mm;
	ctg_pfn_t small, large, page;

	(void)state;
	world_open(&w, 16);
	mm = space_new(&w, 0);
	map_small(&w, mm, BASE + 1, 5);
	large = map_large(&w, mm, BASE + PAGES);
	small = pfn_of(mm, BASE + 3);
	pin = pin_of(mm, BASE + 3, 2, 0, "camera");
	later = pin_of(mm, BASE + 3, 1, 0, "codec");
	assert_int_equal(ctg_alloc_contig_range(w.ctg, small, 1, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_int_equal(report.obstacle_pfn, small);
	assert_string_equal(report.obstacle_owner, "camera");
	assert_int_equal(report.obstacle_since, ledger_of(&w).since[0]);
	ctg_pin_release(pin, false);
	request.mode = CTG_MODE_NORMAL;
	assert_int_equal(ctg_alloc_contig_range(w.ctg, small, 1, &request), -CTG_EBUSY);
	assert_string_equal(report.obstacle_owner, "codec");
	ctg_pin_release(later, false);
	/* A page at the end of a large frame is pinned, and the frame's head in the way. */
	pin = pin_of(mm, BASE + 2 * PAGES - 1, 1, 0, "disk");
	assert_int_equal(ctg_alloc_contig_range(w.ctg, large, PAGES, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_string_equal(report.obstacle_owner, "disk");
	ctg_pin_release(pin, false);
	/* The array form has no name to give; a reference is not in the ledger. */
	assert_int_equal(ctg_pin_user_pages_fast(mm, BASE + 3, 1, 0, &page), 1);
	assert_int_equal(ctg_alloc_contig_range(w.ctg, small, 1, &request), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PIN);
	assert_string_equal(report.obstacle_owner, "");
	assert_int_equal(report.obstacle_since, 0);
	assert_int_equal(ctg_unpin_user_pages(w.ctg, &page, 1), 0);
	/* And when nothing is in the way, nobody is named. */
	assert_int_equal(ctg_alloc_contig_range(w.ctg, small, 1, &request), 0);
	assert_string_equal(report.obstacle_owner, "");
	assert_int_equal(ctg_free_contig_range(w.ctg, small, 1, NULL), 0);
	ctg_mm_destroy(mm, false);
	world_close(&w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_one_count_a_frame),
		cmocka_unit_test(test_pieces_of_one_frame),
		cmocka_unit_test(test_release_marks_dirty),
		cmocka_unit_test(test_every_allocation_failed_in_turn),
		cmocka_unit_test(test_all_or_nothing),
		cmocka_unit_test(test_bad_input_is_refused),
		cmocka_unit_test(test_a_million_pins_of_2_mib),
		cmocka_unit_test(test_a_million_pins_of_1_gib),
		cmocka_unit_test(test_pieces_of_1_gib),
		cmocka_unit_test(test_one_block_many_owners),
		cmocka_unit_test(test_the_ledger_is_in_order),
		cmocka_unit_test(test_pins_outlive_their_space),
		cmocka_unit_test(test_a_machine_may_end_first),
		cmocka_unit_test(test_accounts_are_used_again),
		cmocka_unit_test(test_no_memory_for_an_account),
		cmocka_unit_test(test_the_report_names_the_owner),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
