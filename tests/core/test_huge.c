/* SPDX-License-Identifier: MIT */
/*
 * Frames of 1 GiB: mapped by one entry, split, shared, copied, moved. Their memory is sparse, so
 * what copies them copies the first page of each 2 MiB.
 */
#include "family.h"

#define HUGE ((uint64_t)1 << CTG_MAX_ORDER)

static struct huge {
	struct world w;
	uint64_t copied; /* frames, by our copy */
} huge;

static int copy_some(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	struct ctg_sim *sim = host;

	for (size_t i = 0; i < nr; i++) {
		uint64_t step = runs[i].nr < PAGES ? 1 : PAGES;

		for (uint64_t at = 0; at < runs[i].nr; at += step)
			memcpy(ctg_sim_frame(sim, runs[i].dst + at),
				ctg_sim_frame(sim, runs[i].src + at), CTG_PAGE_SIZE);
		huge.copied += runs[i].nr;
	}
	return 0;
}

/* So many GiB of memory that is known to be zero. */
static void huge_open(unsigned gib)
{
	struct ctg_sim_config config = {.nr_cpus = 2};
	struct ctg_zone_config zone = {.base = HUGE, .nr = gib * HUGE};
	struct world *w = &huge.w;
	struct ctg_mm *mm[2];

	memset(&huge, 0, sizeof(huge));
	assert_int_equal(ctg_sim_create(&config, &w->sim), 0);
	assert_int_equal(ctg_sim_add_zone(w->sim, &zone, true, &w->zone), 0);
	assert_int_equal(ctg_zone_release(w->zone, zone.base, zone.nr, true), 0);
	w->ctg = ctg_sim_machine(w->sim);
	w->ctg->port.copy = copy_some;
	/* Families outlive their spaces: make those that the tests will need. */
	for (unsigned i = 0; i < 2; i++)
		mm[i] = space_new(w, 0);
	for (unsigned i = 0; i < 2; i++)
		ctg_mm_destroy(mm[i], false);
	w->nr_free = world_free(w);
	w->meta_bytes = ctg_sim_meta_bytes(w->sim);
}

static struct ctg_mm *huge_space(unsigned map_order, struct ctg_group *group)
{
	struct ctg_mm_config config = {
		.owner = &huge, .map_order = map_order, .max_order = CTG_MAX_ORDER, .group = group};
	struct ctg_mm *mm = NULL;

	assert_int_equal(ctg_mm_create(huge.w.ctg, &config, &mm), 0);
	return mm;
}

/* A page here and there that says where it is. */
static void mark_pages(struct ctg_mm *mm, unsigned char salt)
{
	for (unsigned i = 0; i < 8; i++)
		put_byte(&huge.w, mm, BASE + i * 64 * PAGES, (unsigned char)(salt + i));
}

static void check_pages(struct ctg_mm *mm, unsigned char salt)
{
	for (unsigned i = 0; i < 8; i++)
		assert_int_equal(*(unsigned char *)ctg_sim_frame(
					 huge.w.sim, pfn_of(mm, BASE + i * 64 * PAGES)),
			(unsigned char)(salt + i));
}

static struct ctg_mm *huge_mapped(unsigned map_order)
{
	struct ctg_mm *mm = huge_space(map_order, NULL);

	mapped(mm, BASE, HUGE, RW);
	assert_int_equal(level_of(mm, BASE), 2);
	mark_pages(mm, 10);
	return mm;
}

static ctg_pfn_t base_of(struct ctg_mm *mm)
{
	return ctg_frame_head(huge.w.ctg, pfn_of(mm, BASE));
}

/* ---- mapping and splitting ------------------------------------------------------------------- */

static void one_entry_for_all(void **state)
{
	struct ctg_mm *mm;
	struct ctg_mapping m;

	(void)state;
	huge_open(2);
	mm = huge_mapped(0);
	m = lookup(mm, BASE, 2 * HUGE);
	assert_int_equal(m.nr, HUGE);
	assert_int_equal(m.prot, RW);
	assert_int_equal(m.pfn % HUGE, 0);
	assert_int_equal(lookup(mm, BASE + 12345, HUGE).pfn, m.pfn + 12345);
	assert_int_equal(word_of(&huge.w, m.pfn), counts(1, 0, 0));
	assert_int_equal(ctg_frame_head(huge.w.ctg, m.pfn + 77 * PAGES + 5), m.pfn);
	assert_int_equal(stat_of(mm).nr_present, HUGE);
	assert_int_equal(stat_of(mm).nr_tables, 2);
	/* A fault gets one, too, where all is reserved; a part of one does not. */
	assert_int_equal(ctg_mmap(mm, BASE + HUGE, HUGE - PAGES, RW), 0);
	put_byte(&huge.w, mm, BASE + HUGE + 9, 1);
	assert_int_equal(level_of(mm, BASE + HUGE), 1);
	assert_int_equal(ctg_munmap(mm, BASE, 2 * HUGE), 0);
	assert_int_equal(ctg_mmap(mm, BASE, HUGE, RW), 0);
	put_byte(&huge.w, mm, BASE + 9, 1);
	assert_int_equal(level_of(mm, BASE), 2);
	ctg_mm_destroy(mm, false);
	world_close(&huge.w);
}

static void not_without_being_asked_for(void **state)
{
	struct ctg_mm *mm;

	(void)state;
	huge_open(1);
	mm = space_new(&huge.w, 0);
	mapped(mm, BASE, HUGE, RW);
	assert_int_equal(level_of(mm, BASE), 1);
	ctg_mm_destroy(mm, false);
	/* Nor where there is none. */
	mm = huge_space(CTG_PAGEBLOCK_ORDER, NULL);
	assert_int_equal(ctg_mmap(mm, BASE + HUGE, PAGES, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE + HUGE, PAGES, NULL), 0);
	assert_int_equal(ctg_mmap(mm, BASE, HUGE, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, HUGE, NULL), -CTG_ENOMEM);
	assert_int_equal(stat_of(mm).nr_present, HUGE);
	assert_int_equal(level_of(mm, BASE), 1);
	ctg_mm_destroy(mm, false);
	world_close(&huge.w);
}

static void splits_step_by_step(void **state)
{
	struct ctg_mm *mm;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(1);
	mm = huge_mapped(0);
	pfn = base_of(mm);
	assert_int_equal(ctg_munmap(mm, BASE + 5 * PAGES, PAGES), 0);
	assert_int_equal(word_of(&huge.w, pfn), counts(511, 0, 0));
	assert_int_equal(level_of(mm, BASE), 1);
	assert_int_equal(pfn_of(mm, BASE + 300 * PAGES + 7), pfn + 300 * PAGES + 7);
	assert_int_equal(ctg_mprotect(mm, BASE + 64 * PAGES, 1, CTG_PROT_READ), 0);
	assert_int_equal(word_of(&huge.w, pfn), counts(511 + 511, 0, 0));
	assert_int_equal(level_of(mm, BASE + 64 * PAGES), 0);
	check_pages(mm, 10);
	assert_int_equal(world_free(&huge.w), 0);
	/* Where the hole is, there is no memory: all of the frame is in use while any of it is. */
	assert_int_equal(ctg_mmap(mm, BASE + 5 * PAGES, 1, RW), 0);
	assert_int_equal(ctg_handle_fault(mm, BASE + 5 * PAGES, true), -CTG_ENOMEM);
	assert_int_equal(ctg_munmap(mm, BASE, HUGE - 1), 0);
	assert_int_equal(word_of(&huge.w, pfn), counts(1, 0, 0));
	assert_int_equal(world_free(&huge.w), 0);
	assert_int_equal(ctg_munmap(mm, BASE + HUGE - 1, 1), 0);
	assert_int_equal(world_free(&huge.w), HUGE);
	ctg_mm_destroy(mm, false);
	world_close(&huge.w);
}

/* A batch says which heads it counts on, also when these are far from its pages. */
static void batch_of_pieces_is_found(void **state)
{
	struct ctg_mm *mm;
	struct ctg_pte_ref ref;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(2);
	mm = huge_mapped(0);
	pfn = base_of(mm);
	assert_int_equal(ctg_pte_split_to(mm, BASE, 1), 0);
	ctg_lock(&huge.w.port, &mm->batch.lock);
	ctg_pte_lock(mm, BASE + 400 * PAGES, &ref);
	assert_true(
		ctg_batch_add(&mm->batch, BASE + 400 * PAGES, ctg_pte_pfn(ref.entry), PAGES, true));
	ctg_pte_set(&ref, 0);
	ctg_pte_unlock(mm, &ref);
	ctg_unlock(&huge.w.port, &mm->batch.lock);
	ctg_add64_relaxed(&mm->nr_present, -PAGES);
	ctg_batches_flush(huge.w.ctg, pfn ^ HUGE, HUGE);
	assert_int_equal(word_of(&huge.w, pfn), counts(512, 0, 0));
	ctg_batches_flush(huge.w.ctg, pfn + 3, 1);
	assert_int_equal(word_of(&huge.w, pfn), counts(511, 0, 0));
	ctg_mm_destroy(mm, false);
	world_close(&huge.w);
}

static void overflow_of_pieces(void **state)
{
	struct ctg_mm *mm;
	ctg_pfn_t pfn;
	uint64_t more = CTG_WORD_MAP_MAX - 510;

	(void)state;
	huge_open(1);
	mm = huge_mapped(0);
	pfn = base_of(mm);
	hold(&huge.w, pfn, more * CTG_WORD_MAP1);
	assert_int_equal(ctg_munmap(mm, BASE, 1), -CTG_EOVERFLOW);
	assert_int_equal(level_of(mm, BASE), 2);
	hold(&huge.w, pfn, -(more * CTG_WORD_MAP1));
	assert_int_equal(ctg_munmap(mm, BASE, 1), 0);
	ctg_mm_destroy(mm, true);
	world_close(&huge.w);
}

/* ---- fork ------------------------------------------------------------------------------------ */

static void shared_whole_and_copied_whole(void **state)
{
	struct ctg_mm *parent, *child;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(2);
	parent = huge_mapped(0);
	pfn = base_of(parent);
	child = forked(&huge.w, parent);
	assert_int_equal(level_of(child, BASE), 2);
	assert_int_equal(word_of(&huge.w, pfn), counts(2, 0, 0));
	mark_pages(child, 20);
	assert_int_equal(huge.copied, HUGE);
	assert_int_equal(level_of(child, BASE), 2);
	assert_int_not_equal(base_of(child), pfn);
	check_pages(parent, 10);
	check_pages(child, 20);
	assert_int_equal(word_of(&huge.w, pfn), counts(1, 0, 0));
	put_byte(&huge.w, parent, BASE, 10);
	assert_int_equal(base_of(parent), pfn);
	assert_int_equal(huge.copied, HUGE);
	ctg_mm_destroy(parent, false);
	ctg_mm_destroy(child, false);
	world_close(&huge.w);
}

/* Not room for all of it: the write costs 2 MiB if there are these, else a page. */
static void copied_in_pieces_when_it_must(void **state)
{
	struct ctg_mm *parent, *child, *filler;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(2);
	filler = space_new(&huge.w, 0);
	mapped(filler, BASE + HUGE, 3, RW);
	mapped(filler, BASE, 509 * PAGES, RW);
	parent = huge_mapped(0);
	pfn = base_of(parent);
	child = forked(&huge.w, parent);
	put_byte(&huge.w, child, BASE + 64 * PAGES, 99);
	assert_int_equal(huge.copied, PAGES);
	assert_int_equal(level_of(child, BASE + 64 * PAGES), 1);
	assert_int_equal(word_of(&huge.w, pfn), counts(1 + 511, 0, 0));
	put_byte(&huge.w, child, BASE + 65 * PAGES, 98);
	assert_int_equal(huge.copied, 2 * PAGES);
	put_byte(&huge.w, child, BASE + 66 * PAGES, 97);
	assert_int_equal(huge.copied, 2 * PAGES + 1);
	assert_int_equal(level_of(child, BASE + 66 * PAGES), 0);
	assert_int_equal(word_of(&huge.w, pfn), counts(1 + 509 + 511, 0, 0));
	check_pages(parent, 10);
	assert_int_equal(get_byte(&huge.w, child, BASE + 64 * PAGES), 99);
	assert_int_equal(get_byte(&huge.w, child, BASE + 128 * PAGES), 12);
	/* Alone with its pieces, it copies no more, but takes a table at a time. */
	ctg_mm_destroy(parent, false);
	huge.copied = 0;
	put_byte(&huge.w, child, BASE + 128 * PAGES, 1);
	put_byte(&huge.w, child, BASE + 192 * PAGES, 1);
	put_byte(&huge.w, child, BASE + 66 * PAGES + 9, 1);
	assert_int_equal(huge.copied, 0);
	assert_int_equal(base_of(child), pfn);
	ctg_mm_destroy(child, false);
	ctg_mm_destroy(filler, false);
	world_close(&huge.w);
}

static void pinned_is_copied_whole_or_in_pieces(void **state)
{
	(void)state;
	for (unsigned room = 0; room < 2; room++) {
		struct ctg_mm *parent, *child, *filler;
		ctg_pfn_t pfn;

		huge_open(3);
		parent = huge_mapped(0);
		filler = space_new(&huge.w, 0);
		/* Something in each GiB: there is no frame of that size any more. */
		if (room == 0) {
			mapped(filler, BASE, 2, RW);
			mapped(filler, BASE + HUGE, 512 * PAGES, RW);
			assert_int_equal(ctg_munmap(filler, BASE + HUGE, 511 * PAGES), 0);
		}
		pfn = base_of(parent);
		hold(&huge.w, pfn, CTG_WORD_PIN1);
		huge.copied = 0;
		child = forked(&huge.w, parent);
		assert_int_equal(huge.copied, HUGE);
		assert_int_equal(word_of(&huge.w, pfn), counts(1, 1, 0));
		assert_int_equal(level_of(parent, BASE), 2);
		assert_false(is_cow(parent, BASE));
		assert_int_equal(level_of(child, BASE), room == 0 ? 1 : 2);
		check_pages(child, 10);
		mark_pages(parent, 30);
		check_pages(child, 10);
		assert_int_equal(stat_of(child).nr_present, HUGE);
		unhold(&huge.w, pfn, CTG_WORD_PIN1);
		ctg_mm_destroy(parent, false);
		ctg_mm_destroy(child, false);
		ctg_mm_destroy(filler, false);
		world_close(&huge.w);
	}
}

/* Half of the copy fits: then nothing has happened. */
static void pinned_without_memory_fails_whole(void **state)
{
	struct ctg_mm *parent, *child = NULL, *filler;
	struct ctg_mm_config config = {.owner = &huge};
	uint64_t entry, free;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(2);
	filler = huge_space(0, NULL);
	parent = huge_mapped(0);
	mapped(filler, BASE, 256 * PAGES, RW);
	pfn = base_of(parent);
	hold(&huge.w, pfn, CTG_WORD_PIN1);
	entry = raw_entry(parent, BASE);
	free = world_free(&huge.w);
	assert_int_equal(ctg_mm_fork(parent, &config, &child), -CTG_ENOMEM);
	assert_null(child);
	assert_int_equal(raw_entry(parent, BASE), entry);
	assert_int_equal(word_of(&huge.w, pfn), counts(1, 1, 0));
	assert_int_equal(world_free(&huge.w), free);
	unhold(&huge.w, pfn, CTG_WORD_PIN1);
	ctg_mm_destroy(parent, false);
	ctg_mm_destroy(filler, false);
	world_close(&huge.w);
}

static void pieces_are_shared_and_copied(void **state)
{
	struct ctg_mm *parent, *child;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(3);
	parent = huge_mapped(0);
	pfn = base_of(parent);
	assert_int_equal(ctg_munmap(parent, BASE + 7, 1), 0);
	child = forked(&huge.w, parent);
	assert_int_equal(word_of(&huge.w, pfn), counts(2 * (511 + 511), 0, 0));
	check_pages(child, 10);
	ctg_mm_destroy(child, false);
	assert_int_equal(word_of(&huge.w, pfn), counts(511 + 511, 0, 0));
	put_byte(&huge.w, parent, BASE, 10);
	mark_pages(parent, 10);
	hold(&huge.w, pfn, CTG_WORD_PIN1);
	child = forked(&huge.w, parent);
	assert_int_equal(word_of(&huge.w, pfn), counts(511 + 511, 1, 0));
	check_pages(child, 10);
	assert_false(is_cow(parent, BASE + 100));
	assert_false(is_cow(parent, BASE + 100 * PAGES));
	assert_int_equal(level_of(child, BASE + PAGES), 1);
	assert_int_equal(level_of(child, BASE), 0);
	unhold(&huge.w, pfn, CTG_WORD_PIN1);
	ctg_mm_destroy(child, false);
	ctg_mm_destroy(parent, false);
	world_close(&huge.w);
}

/* ---- migration and groups -------------------------------------------------------------------- */

static int evacuate_some(ctg_pfn_t pfn, struct ctg_migrate_stats *stats)
{
	ctg_pfn_t block = pfn & ~(PAGES - 1);
	int ret;

	assert_int_equal(ctg_block_isolate(huge.w.zone, block, &huge), 0);
	ctg_pcp_drain(huge.w.zone);
	ret = ctg_migrate_range(huge.w.zone, block, PAGES, EVACUATE_GFP, 2, NULL, stats);
	ctg_block_unisolate(huge.w.zone, block, &huge);
	return ret;
}

static void moves_whole(void **state)
{
	struct ctg_migrate_stats stats;
	struct ctg_group_stat charges;
	struct ctg_group *group;
	struct ctg_mm *parent, *child;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(2);
	assert_int_equal(ctg_group_create(huge.w.ctg, NULL, 2 * HUGE, &group), 0);
	parent = huge_space(0, group);
	mapped(parent, BASE, HUGE, RW);
	mark_pages(parent, 10);
	pfn = base_of(parent);
	child = forked(&huge.w, parent);
	assert_int_equal(evacuate_some(pfn + 77 * PAGES, &stats), 0);
	assert_int_equal(stats.frames_moved, HUGE);
	assert_int_not_equal(base_of(parent), pfn);
	assert_int_equal(base_of(parent), base_of(child));
	assert_int_equal(head_word(&huge.w, parent, BASE), counts(2, 0, 0));
	assert_int_equal(level_of(parent, BASE), 2);
	assert_true(is_cow(parent, BASE));
	check_pages(parent, 10);
	check_pages(child, 10);
	ctg_group_stat(group, &charges);
	assert_int_equal(charges.charged, HUGE);
	ctg_mm_destroy(parent, false);
	ctg_group_stat(group, &charges);
	assert_int_equal(charges.charged, HUGE);
	ctg_mm_destroy(child, false);
	assert_int_equal(ctg_group_destroy(group), 0);
	world_close(&huge.w);
}

/* It stays, with its obstacle named: no room, a pin, or in pieces. */
static void stays_when_it_must(void **state)
{
	struct ctg_migrate_stats stats;
	struct ctg_mm *mm, *filler;
	ctg_pfn_t pfn;

	(void)state;
	huge_open(2);
	mm = huge_mapped(0);
	pfn = base_of(mm);
	filler = huge_space(0, NULL);
	mapped(filler, BASE, 1, RW);
	assert_int_equal(evacuate_some(pfn, &stats), -CTG_ENOMEM);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_NO_MEMORY);
	assert_int_equal(stats.obstacle_pfn, pfn);
	ctg_mm_destroy(filler, false);
	hold(&huge.w, pfn, CTG_WORD_PIN1);
	assert_int_equal(evacuate_some(pfn + 5 * PAGES, &stats), -CTG_EBUSY);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_PIN);
	unhold(&huge.w, pfn, CTG_WORD_PIN1);
	assert_int_equal(ctg_mprotect(mm, BASE + 3, 1, CTG_PROT_READ), 0);
	assert_int_equal(evacuate_some(pfn + 5 * PAGES, &stats), -CTG_EBUSY);
	assert_int_equal(stats.obstacle, CTG_OBSTACLE_MAP);
	assert_int_equal(stats.obstacle_pfn, pfn);
	assert_int_equal(base_of(mm), pfn);
	assert_int_equal(word_of(&huge.w, pfn), counts(1022 + 1, 0, 0));
	for (unsigned i = 0; i < 600; i++)
		assert_int_equal(raw_entry(mm, BASE + i * 300) & CTG_PTE_MOVING, 0);
	put_byte(&huge.w, mm, BASE + 5, 1);
	ctg_mm_destroy(mm, false);
	world_close(&huge.w);
}

static void charged_whole(void **state)
{
	struct ctg_group_stat charges;
	struct ctg_group *group;
	struct ctg_mm *mm;

	(void)state;
	huge_open(2);
	assert_int_equal(ctg_group_create(huge.w.ctg, NULL, HUGE + 600, &group), 0);
	mm = huge_space(0, group);
	assert_int_equal(ctg_mmap(mm, BASE, 2 * HUGE, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 2 * HUGE, NULL), -CTG_ENOSPC);
	ctg_group_stat(group, &charges);
	assert_int_equal(charges.charged, HUGE + 600);
	assert_int_equal(stat_of(mm).nr_present, HUGE + 600);
	ctg_mm_destroy(mm, false);
	assert_int_equal(ctg_group_destroy(group), 0);
	world_close(&huge.w);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(one_entry_for_all),
		cmocka_unit_test(not_without_being_asked_for),
		cmocka_unit_test(splits_step_by_step),
		cmocka_unit_test(batch_of_pieces_is_found),
		cmocka_unit_test(overflow_of_pieces),
		cmocka_unit_test(shared_whole_and_copied_whole),
		cmocka_unit_test(copied_in_pieces_when_it_must),
		cmocka_unit_test(pinned_is_copied_whole_or_in_pieces),
		cmocka_unit_test(pinned_without_memory_fails_whole),
		cmocka_unit_test(pieces_are_shared_and_copied),
		cmocka_unit_test(moves_whole),
		cmocka_unit_test(stays_when_it_must),
		cmocka_unit_test(charged_whole),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
