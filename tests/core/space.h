/* SPDX-License-Identifier: MIT */
/*
 * A small machine on the sim for the tests of address spaces, and what must be true of it once all
 * spaces are gone.
 */
#ifndef TEST_SPACE_H
#define TEST_SPACE_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "../../ports/sim/sim.h"
#include "pgtable.h"

#define PAGES CTG_PAGEBLOCK_FRAMES /* of a large frame */
#define BASE 0x40000u              /* a vpn at the start of a slot of 1 GiB */
#define RW (CTG_PROT_READ | CTG_PROT_WRITE)

struct world {
	struct ctg_sim *sim;
	struct ctg *ctg;
	struct ctg_zone *zone;
	struct ctg_port port; /* the sim's own hooks, for tests that interpose */
	uint64_t nr_free;
	uint64_t meta_bytes;
};

/* The frames held by nobody, wherever they are kept. */
static inline uint64_t world_free(const struct world *w)
{
	struct ctg_zone_stat stat;
	uint64_t nr = 0;

	for (unsigned i = 0; i < w->ctg->nr_zones; i++) {
		ctg_zone_stat(w->ctg->zones[i], &stat);
		nr += stat.nr_free + stat.nr_isolated_free + stat.nr_pcp;
	}
	return nr;
}

static inline struct ctg_mm *space_new(struct world *w, unsigned map_order)
{
	struct ctg_mm_config config = {.owner = w, .map_order = map_order};
	struct ctg_mm *mm = NULL;

	assert_int_equal(ctg_mm_create(w->ctg, &config, &mm), 0);
	assert_non_null(mm);
	return mm;
}

/* One zone of so many pageblocks, ordinary memory whose contents are not known to be zero. */
static inline void world_open(struct world *w, uint64_t blocks)
{
	struct ctg_sim_config config = {.nr_cpus = 2, .virtual_time = false};
	struct ctg_zone_config zone = {.base = 4 * PAGES, .nr = blocks * PAGES};

	memset(w, 0, sizeof(*w));
	assert_int_equal(ctg_sim_create(&config, &w->sim), 0);
	assert_int_equal(ctg_sim_add_zone(w->sim, &zone, true, &w->zone), 0);
	assert_int_equal(ctg_zone_release(w->zone, zone.base, zone.nr, false), 0);
	w->ctg = ctg_sim_machine(w->sim);
	w->port = w->ctg->port;
	/* Families outlive their spaces, to be used again: make the one that tests will need. */
	ctg_mm_destroy(space_new(w, 0), false);
	w->nr_free = world_free(w);
	w->meta_bytes = ctg_sim_meta_bytes(w->sim);
	assert_int_equal(w->nr_free, zone.nr);
}

/* No frame and no byte of metadata is lost. */
static inline void world_check_clean(const struct world *w)
{
	assert_int_equal(world_free(w), w->nr_free);
	assert_int_equal(ctg_sim_meta_bytes(w->sim), w->meta_bytes);
	assert_null(w->ctg->batches);
}

static inline void world_close(struct world *w)
{
	world_check_clean(w);
	ctg_sim_destroy(w->sim);
}

static inline struct ctg_mapping lookup(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t max_nr)
{
	struct ctg_mapping m;

	assert_int_equal(ctg_mm_lookup(mm, vpn, max_nr, &m), 0);
	assert_int_equal(m.vpn, vpn);
	assert_in_range(m.nr, 1, max_nr);
	return m;
}

static inline uint64_t word_of(const struct world *w, ctg_pfn_t pfn)
{
	return ctg_load64_acquire(&ctg_frame_of(w->ctg, pfn)->word);
}

static inline void put_byte(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn, unsigned char byte)
{
	assert_int_equal(ctg_sim_write(w->sim, mm, vpn << CTG_PAGE_SHIFT, &byte, 1), 0);
}

static inline unsigned char get_byte(struct world *w, struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned char byte = 0xee;

	assert_int_equal(ctg_sim_read(w->sim, mm, vpn << CTG_PAGE_SHIFT, &byte, 1), 0);
	return byte;
}

static inline struct ctg_mm_stat stat_of(struct ctg_mm *mm)
{
	struct ctg_mm_stat stat;

	ctg_mm_stat(mm, &stat);
	return stat;
}

static inline struct ctg_counters counters_of(struct world *w)
{
	struct ctg_counters counters;

	ctg_counters_read(w->ctg, &counters);
	return counters;
}

static inline uint64_t entry_of(const struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned level;

	return ctg_pte_read(mm, vpn, &level);
}

/* Set or clear bits of an entry, as migration would. */
static inline void change_entry(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t set, uint64_t clear)
{
	struct ctg_pte_ref ref;

	ctg_pte_lock(mm, vpn, &ref);
	ctg_pte_set(&ref, (ref.entry | set) & ~clear);
	ctg_pte_unlock(mm, &ref);
}

static inline void mapped(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot)
{
	uint64_t present;

	assert_int_equal(ctg_mmap(mm, vpn, nr, prot), 0);
	assert_int_equal(ctg_mm_populate(mm, vpn, nr, &present), 0);
	assert_int_equal(present, nr);
}

#endif
