/* SPDX-License-Identifier: MIT */
/*
 * Real threads on one machine: programs that read and write, map and unmap, come and go, while
 * memory is taken from under them and given back. Every page holds what was last written to it,
 * whatever CPU looks, and at the end every frame is free.
 */
#include "moving.h"

#include <pthread.h>
#include <sched.h>

#define NR_SPACES 2
#define NR_PAGES (2 * PAGES + 300) /* of a program: large frames and small ones */
/* Not much more than what is in use: some has to leave the zone, and comes back. */
#define NR_BLOCKS 10u
#define SPILL_BLOCKS 6u
#define SPILL_BASE (256 * PAGES)
#define ROUNDS 30u /* of each thread that takes memory away */

/* A failed check in a thread cannot go back to cmocka. */
#define CHECK(cond)                                                                                \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                 \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

/* What a page says of itself: torn or misplaced contents do not agree with it. */
struct record {
	uint64_t space, vpn, count, sum;
};

struct program {
	struct ctg_mm *mm;
	pthread_mutex_t lock[NR_PAGES]; /* of a page: what was written last is count[] */
	uint64_t count[NR_PAGES];
};

static struct {
	struct world w;
	struct ctg_zone *spill;
	struct program program[NR_SPACES];
	int stop;
	uint64_t taken, returned;
} all;

static bool stopped(void)
{
	return __atomic_load_n(&all.stop, __ATOMIC_RELAXED) != 0;
}

static uint64_t next_random(uint64_t *seed)
{
	*seed ^= *seed << 13;
	*seed ^= *seed >> 7;
	*seed ^= *seed << 17;
	return *seed;
}

static uint64_t sum_of(const struct record *r)
{
	return (r->space * 31 + r->vpn) * UINT64_C(0x9e3779b97f4a7c15) ^ r->count;
}

/* A page's record stands at both ends of it. */
static const unsigned record_places[2] = {64, 4000};

static int write_record(struct ctg_mm *mm, uint64_t space, ctg_vpn_t vpn, uint64_t count)
{
	struct record r = {.space = space, .vpn = vpn, .count = count};
	int ret = 0;

	r.sum = sum_of(&r);
	for (unsigned i = 0; i < 2 && ret == 0; i++)
		ret = ctg_sim_write(
			all.w.sim, mm, (vpn << CTG_PAGE_SHIFT) + record_places[i], &r, sizeof(r));
	return ret;
}

static void check_record(struct ctg_mm *mm, uint64_t space, ctg_vpn_t vpn, uint64_t count)
{
	for (unsigned i = 0; i < 2; i++) {
		struct record r;

		CHECK(ctg_sim_read(all.w.sim, mm, (vpn << CTG_PAGE_SHIFT) + record_places[i], &r,
			      sizeof(r)) == 0);
		if (count == 0) {
			CHECK(r.space == 0 && r.vpn == 0 && r.count == 0 && r.sum == 0);
			continue;
		}
		CHECK(r.space == space && r.vpn == vpn);
		CHECK(r.count == count && r.sum == sum_of(&r));
	}
}

/* ---- programs ---------------------------------------------------------------------------- */

/* Two threads of each program, on different CPUs: each sees at once what the other wrote. */
static void *use_pages(void *arg)
{
	unsigned which = (unsigned)(uintptr_t)arg;
	struct program *p = &all.program[which % NR_SPACES];
	uint64_t seed = which * 77 + 1, space = which % NR_SPACES;

	ctg_sim_set_cpu(which);
	while (!stopped()) {
		uint64_t page = next_random(&seed) % NR_PAGES;
		bool write = next_random(&seed) % 2 != 0;

		pthread_mutex_lock(&p->lock[page]);
		check_record(p->mm, space, BASE + page, p->count[page]);
		if (write) {
			p->count[page]++;
			CHECK(write_record(p->mm, space, BASE + page, p->count[page]) == 0);
		}
		pthread_mutex_unlock(&p->lock[page]);
	}
	return NULL;
}

/* Map, use, change and unmap, beside what the others use. */
static void *churn_mappings(void *arg)
{
	unsigned which = (unsigned)(uintptr_t)arg;
	struct ctg_mm *mm = all.program[which % NR_SPACES].mm;
	uint64_t seed = which * 1234567 + 89;
	ctg_vpn_t base = BASE + 64 * PAGES;

	ctg_sim_set_cpu(which);
	while (!stopped()) {
		uint64_t nr = 1 + next_random(&seed) % (PAGES + 100);
		uint64_t at = next_random(&seed) % nr, part = 1 + next_random(&seed) % (nr - at);
		int ret;

		CHECK(ctg_mmap(mm, base, nr, RW) == 0);
		ret = ctg_mm_populate(mm, base, nr, NULL);
		CHECK(ret == 0 || ret == -CTG_ENOMEM);
		for (uint64_t i = 0; i < nr && ret == 0; i += 7)
			ret = write_record(mm, 99, base + i, 5);
		CHECK(ret == 0 || ret == -CTG_ENOMEM);
		if (ret == 0) {
			CHECK(ctg_mprotect(mm, base + at, part, CTG_PROT_READ) == 0 || true);
			for (uint64_t i = 0; i < nr; i += 7)
				check_record(mm, 99, base + i, 5);
			ret = ctg_madvise_dontneed(mm, base + at, part);
			CHECK(ret == 0 || ret == -CTG_ENOMEM);
			for (uint64_t i = 0; i < nr && ret == 0; i += 7)
				if (i < at || i >= at + part)
					check_record(mm, 99, base + i, 5);
		}
		while (ctg_munmap(mm, base, nr) == -CTG_ENOMEM)
			sched_yield();
	}
	return NULL;
}

/* Programs that start, use memory, and are gone. */
static void *come_and_go(void *arg)
{
	unsigned which = (unsigned)(uintptr_t)arg;
	uint64_t seed = which * 999331 + 7;

	ctg_sim_set_cpu(which);
	while (!stopped()) {
		struct ctg_mm_config config = {.owner = &all, .gfp = CTG_GFP_SPILL};
		uint64_t nr = 1 + next_random(&seed) % 700;
		struct ctg_mm *mm;

		CHECK(ctg_mm_create(all.w.ctg, &config, &mm) == 0);
		CHECK(ctg_mmap(mm, BASE + 3, nr, RW) == 0);
		for (unsigned i = 0; i < 50; i++) {
			ctg_vpn_t vpn = BASE + 3 + next_random(&seed) % nr;
			int ret = write_record(mm, 1000, vpn, i + 1);

			CHECK(ret == 0 || ret == -CTG_ENOMEM);
			if (ret == 0)
				check_record(mm, 1000, vpn, i + 1);
		}
		/* Not as dead: the next one may have the same address, which is all a TLB knows. */
		ctg_mm_destroy(mm, false);
	}
	return NULL;
}

/* Brief references on frames, as any look at a page may take. */
static void *glance(void *arg)
{
	unsigned which = (unsigned)(uintptr_t)arg;
	uint64_t seed = which * 31 + 5;

	ctg_sim_set_cpu(which);
	while (!stopped()) {
		struct ctg_zone *zone = all.w.zone;
		ctg_pfn_t pfn = zone->base + next_random(&seed) % zone->nr;

		if (ctg_frame_tryget(ctg_zone_frame(zone, pfn)) == 0) {
			if (next_random(&seed) % 4 == 0)
				sched_yield();
			ctg_frame_put(all.w.ctg, pfn, CTG_WORD_REF1, 1);
		}
		sched_yield();
	}
	return NULL;
}

/* ---- those who take ---------------------------------------------------------------------- */

/* Scribble over what was taken: whoever still uses it will see. */
static void scribble(ctg_pfn_t pfn, uint64_t nr)
{
	for (; nr != 0; pfn++, nr--)
		memset(ctg_sim_frame(all.w.sim, pfn), 0xdd, CTG_PAGE_SIZE);
}

/* By hand: isolate one pageblock, empty it, take it. */
static void take_block(ctg_pfn_t pfn, const void *owner)
{
	struct ctg_zone *zone = all.w.zone;
	struct ctg_migrate_stats stats;
	ctg_pfn_t busy;
	bool zeroed;
	int ret = ctg_block_isolate(zone, pfn, owner);

	if (ret != 0) {
		CHECK(ret == -CTG_EBUSY);
		return;
	}
	ctg_pcp_drain(zone);
	ret = ctg_migrate_range(zone, pfn, PAGES, EVACUATE_GFP, 5, NULL, &stats);
	CHECK(ret == 0 || ret == -CTG_EBUSY || ret == -CTG_ENOMEM);
	CHECK(ret == 0 || stats.obstacle != CTG_OBSTACLE_NONE);
	if (ret == 0 && ctg_buddy_take_range(zone, pfn, PAGES, owner, &zeroed, &busy) == 0) {
		scribble(pfn, PAGES);
		for (uint64_t i = 0; i < PAGES; i++)
			ctg_frame_put(all.w.ctg, pfn + i, CTG_WORD_REF1, 1);
		__atomic_fetch_add(&all.taken, PAGES, __ATOMIC_RELAXED);
	}
	ctg_block_unisolate(zone, pfn, owner);
}

static void *take_blocks(void *arg)
{
	unsigned which = (unsigned)(uintptr_t)arg;
	uint64_t seed = which * 4243 + 3;

	ctg_sim_set_cpu(which);
	for (unsigned i = 0; i < ROUNDS; i++)
		take_block(all.w.zone->base + next_random(&seed) % NR_BLOCKS * PAGES, &seed);
	return NULL;
}

static void *take_ranges(void *arg)
{
	unsigned which = (unsigned)(uintptr_t)arg;
	uint64_t seed = which * 5557 + 11;

	ctg_sim_set_cpu(which);
	for (unsigned i = 0; i < ROUNDS; i++) {
		struct ctg_alloc_request request = {
			.flags = next_random(&seed) % 2 != 0 ? CTG_ALLOC_NO_ZERO : 0};
		uint64_t nr = 1 + next_random(&seed) % (3 * PAGES), moved;
		ctg_pfn_t pfn =
			all.w.zone->base + next_random(&seed) % (NR_BLOCKS * PAGES - nr + 1);
		int ret = ctg_alloc_contig_range(all.w.ctg, pfn, nr, &request);

		CHECK(ret == 0 || ret == -CTG_EBUSY || ret == -CTG_ENOMEM);
		if (ret == 0) {
			scribble(pfn, nr);
			CHECK(ctg_free_contig_range(all.w.ctg, pfn, nr, NULL) == 0);
			__atomic_fetch_add(&all.taken, nr, __ATOMIC_RELAXED);
		}
		ret = ctg_migrate_home(all.w.ctg, 200, &moved);
		CHECK(ret == 0 || ret == -CTG_EAGAIN || ret == -CTG_ENOMEM || ret == -CTG_EBUSY);
		__atomic_fetch_add(&all.returned, moved, __ATOMIC_RELAXED);
	}
	return NULL;
}

/* ---- the test ---------------------------------------------------------------------------- */

static void open_all(unsigned nr_cpus)
{
	struct ctg_sim_config config = {.nr_cpus = nr_cpus};
	struct ctg_zone_config zone = {.base = 4 * PAGES, .nr = NR_BLOCKS * PAGES};
	struct ctg_zone_config spill = {
		.base = SPILL_BASE, .nr = SPILL_BLOCKS * PAGES, .flags = CTG_ZONE_SPILL};

	memset(&all, 0, sizeof(all));
	assert_int_equal(ctg_sim_create(&config, &all.w.sim), 0);
	all.w.ctg = ctg_sim_machine(all.w.sim);
	assert_int_equal(ctg_sim_add_zone(all.w.sim, &zone, true, &all.w.zone), 0);
	assert_int_equal(ctg_sim_add_zone(all.w.sim, &spill, true, &all.spill), 0);
	assert_int_equal(ctg_zone_release(all.w.zone, zone.base, zone.nr, false), 0);
	assert_int_equal(ctg_zone_release(all.spill, spill.base, spill.nr, false), 0);
	for (unsigned s = 0; s < NR_SPACES; s++) {
		struct ctg_mm_config program = {.owner = &all, .gfp = CTG_GFP_SPILL};
		struct program *p = &all.program[s];

		for (unsigned i = 0; i < NR_PAGES; i++)
			pthread_mutex_init(&p->lock[i], NULL);
		assert_int_equal(ctg_mm_create(all.w.ctg, &program, &p->mm), 0);
		/* Of three slots the last is small frames; reserved pages come with faults. */
		assert_int_equal(ctg_mmap(p->mm, BASE, NR_PAGES, RW), 0);
		assert_int_equal(ctg_mm_populate(p->mm, BASE, PAGES + 200, NULL), 0);
	}
}

static void close_all(void)
{
	for (unsigned s = 0; s < NR_SPACES; s++) {
		struct program *p = &all.program[s];

		for (unsigned i = 0; i < NR_PAGES; i++)
			check_record(p->mm, s, BASE + i, p->count[i]);
		ctg_mm_destroy(p->mm, false);
		for (unsigned i = 0; i < NR_PAGES; i++)
			pthread_mutex_destroy(&p->lock[i]);
	}
	assert_null(all.w.ctg->batches);
	for (unsigned i = 0; i < all.w.ctg->nr_zones; i++) {
		ctg_drain_caches(all.w.ctg);
		check_zone(all.w.ctg->zones[i]);
	}
	assert_int_equal(world_free(&all.w), (NR_BLOCKS + SPILL_BLOCKS) * PAGES);
	ctg_sim_destroy(all.w.sim);
}

static void test_all_at_once(void **state)
{
	static void *(*const roles[])(void *) = {use_pages, use_pages, use_pages, use_pages,
		churn_mappings, come_and_go, glance, take_blocks, take_ranges};
	enum { NR_ROLES = sizeof(roles) / sizeof(*roles), NR_TAKERS = 2 };
	pthread_t thread[NR_ROLES];
	struct ctg_counters counters;

	(void)state;
	open_all(NR_ROLES);
	for (unsigned i = 0; i < NR_ROLES; i++)
		assert_int_equal(
			pthread_create(&thread[i], NULL, roles[i], (void *)(uintptr_t)i), 0);
	for (unsigned i = NR_ROLES - NR_TAKERS; i < NR_ROLES; i++)
		assert_int_equal(pthread_join(thread[i], NULL), 0);
	__atomic_store_n(&all.stop, 1, __ATOMIC_RELAXED);
	for (unsigned i = 0; i < NR_ROLES - NR_TAKERS; i++)
		assert_int_equal(pthread_join(thread[i], NULL), 0);
	ctg_counters_read(all.w.ctg, &counters);
	print_message("taken %llu, migrated %llu, failed %llu, returned %llu, waited %llu, "
		      "helped %llu\n",
		(unsigned long long)all.taken, (unsigned long long)counters.frames_migrated,
		(unsigned long long)counters.migrate_fail,
		(unsigned long long)counters.frames_returned,
		(unsigned long long)counters.faults_waited,
		(unsigned long long)counters.batches_helped);
	assert_true(all.taken != 0);
	assert_true(counters.frames_migrated != 0);
	assert_int_equal(counters.frames_returned, all.returned);
	close_all();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_all_at_once),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
