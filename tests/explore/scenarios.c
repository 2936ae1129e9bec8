/* SPDX-License-Identifier: MIT */
/*
 * Everything at once, in small: what two or three CPUs do to the same few pages.
 *
 * A machine has an area of one or two pageblocks and a spill zone, and address spaces of a few
 * pages: enough for each protocol, and small enough to be run a thousand times a second.
 */
#include "explore.h"
#include "buddy.h"
#include "pgtable.h"

#define VPN ((ctg_vpn_t)512)
#define BLOCK CTG_PAGEBLOCK_FRAMES

#define SCENARIO(id, text, ...)                                                                    \
	static const struct xp_scenario id = {.name = #id, .what = text, __VA_ARGS__}

/* ---- parts ------------------------------------------------------------------------------------
 */

/* One small space, nr pages filled, in the area's first block. */
static void setup_pages(uint64_t nr)
{
	xp_simple(1, 1);
	/* What the take leaves without room may go to the spill zone. */
	xp_world->mm[0] = xp_mm(CTG_GFP_SPILL);
	xp_fill(xp_world->mm[0], VPN, nr);
}

static void setup_two_pages(void)
{
	setup_pages(2);
}

/* One space with a large frame. */
static void setup_large(void)
{
	xp_simple(1, 2);
	xp_world->mm[0] = xp_mm(0);
	xp_fill(xp_world->mm[0], VPN, BLOCK);
}

/* Take the whole first block back, zeroed; try until it works or is not to. */
static int take(uint64_t nr)
{
	struct ctg_alloc_request request = {.mode = CTG_MODE_NORMAL};

	return ctg_alloc_contig_range(xp_world->ctg, xp_world->zone->base, nr, &request);
}

static void give_back(uint64_t nr)
{
	uint64_t held = 0;

	for (uint64_t i = 0; i < nr; i++)
		if (xp_frame_value(xp_world->zone->base + i) != 0)
			xp_violation("a buffer does not read as zero");
	XP_EXPECT(ctg_free_contig_range(xp_world->ctg, xp_world->zone->base, nr, &held) == 0);
	/* A stranger may look at the buffer's frame too; it then frees what it held last. */
	XP_EXPECT(held <= xp_world->n[4]);
}

static void fiber_take(void)
{
	xp_op("take 64 frames");
	xp_world->ret[0] = take(64);
	XP_EXPECT(xp_world->ret[0] == 0 || xp_world->ret[0] == -CTG_EBUSY ||
		  xp_world->ret[0] == -CTG_ENOMEM);
	if (xp_world->ret[0] == 0) {
		xp_op("give 64 frames back");
		give_back(64);
	}
}

/* Nothing holds the pages but mappings: the take must succeed. */
static void finish_took(void)
{
	XP_EXPECT(xp_world->ret[0] == 0);
}

static void fiber_munmap(void)
{
	xp_op("munmap");
	XP_EXPECT(xp_munmap(xp_world->mm[0], VPN, 1) == 0);
	XP_EXPECT(xp_read(xp_world->mm[0], VPN, NULL) == -CTG_EFAULT);
}

static void fiber_exit(void)
{
	xp_op("exit");
	xp_mm_destroy(xp_world->mm[0], true);
	xp_world->mm[0] = NULL;
}

static void fiber_write(void)
{
	xp_op("write");
	XP_EXPECT(xp_write(xp_world->mm[0], VPN, 77) == 0);
	XP_EXPECT(xp_read(xp_world->mm[0], VPN, NULL) == 0);
	XP_EXPECT(xp_write(xp_world->mm[0], VPN + 1, 78) == 0);
}

static void fiber_read_write(void)
{
	xp_op("read, write");
	xp_read(xp_world->mm[0], VPN + 1, NULL);
	xp_write(xp_world->mm[0], VPN + 1, 5);
	xp_read(xp_world->mm[0], VPN, NULL);
}

static void fiber_populate(void)
{
	xp_op("mmap, populate");
	XP_EXPECT(xp_mmap(xp_world->mm[0], VPN + 8, 2, CTG_PROT_READ | CTG_PROT_WRITE) == 0);
	XP_EXPECT(ctg_mm_populate(xp_world->mm[0], VPN + 8, 2, NULL) == 0);
	XP_EXPECT(xp_write(xp_world->mm[0], VPN + 8, 3) == 0);
}

/* ---- unmapping against migration --------------------------------------------------------------
 */

SCENARIO(exit_and_migration, "a space exits while its frames are taken", .setup = setup_two_pages,
	.fiber = {fiber_take, fiber_exit}, .finish = finish_took);

SCENARIO(munmap_and_migration, "a page is unmapped while its frame is taken",
	.setup = setup_two_pages, .fiber = {fiber_take, fiber_munmap}, .finish = finish_took);

SCENARIO(munmap_migration_access, "unmap, take and write, all at once", .setup = setup_two_pages,
	.fiber = {fiber_take, fiber_munmap, fiber_read_write}, .finish = finish_took);

static void setup_two_spaces(void)
{
	setup_pages(1);
	xp_world->mm[1] = xp_mm(0);
	xp_fill(xp_world->mm[1], VPN, 1);
}

static void fiber_exit_other(void)
{
	xp_op("exit of another");
	xp_mm_destroy(xp_world->mm[1], false);
	xp_world->mm[1] = NULL;
}

SCENARIO(two_exits_and_migration, "two spaces exit while frames of both are taken",
	.setup = setup_two_spaces, .fiber = {fiber_take, fiber_exit, fiber_exit_other},
	.finish = finish_took);

static void fiber_dontneed(void)
{
	xp_op("madvise_dontneed");
	XP_EXPECT(xp_dontneed(xp_world->mm[0], VPN, 2) == 0);
	XP_EXPECT(xp_read(xp_world->mm[0], VPN, NULL) == 0);
}

SCENARIO(dontneed_and_migration, "pages are discarded and touched while their frames are taken",
	.setup = setup_two_pages, .fiber = {fiber_take, fiber_dontneed, fiber_write});

/* Page tables leave the tree and are used again elsewhere while a migration looks at them. */
static void fiber_remap(void)
{
	struct ctg_mm *mm = xp_world->mm[0];

	xp_op("munmap of all");
	XP_EXPECT(xp_munmap(mm, VPN, 2) == 0);
	xp_op("mmap elsewhere");
	XP_EXPECT(xp_mmap(mm, VPN + 2 * BLOCK, 2, CTG_PROT_READ | CTG_PROT_WRITE) == 0);
	XP_EXPECT(xp_write(mm, VPN + 2 * BLOCK, 4) == 0);
}

SCENARIO(remap_and_migration, "all pages are unmapped and others mapped while frames are taken",
	.setup = setup_two_pages, .fiber = {fiber_take, fiber_remap}, .finish = finish_took);

/* ---- access and rights against migration ------------------------------------------------------
 */

SCENARIO(write_and_migration, "writes and reads while the frame moves", .setup = setup_two_pages,
	.fiber = {fiber_take, fiber_write}, .finish = finish_took);

static void setup_unwritten(void)
{
	xp_simple(1, 1);
	xp_world->mm[0] = xp_mm(CTG_GFP_SPILL);
	XP_EXPECT(xp_mmap(xp_world->mm[0], VPN, 2, CTG_PROT_READ | CTG_PROT_WRITE) == 0);
	XP_EXPECT(ctg_mm_populate(xp_world->mm[0], VPN, 2, NULL) == 0);
}

SCENARIO(first_write_and_migration, "pages are written for the first time while the frames move",
	.setup = setup_unwritten, .fiber = {fiber_take, fiber_write}, .finish = finish_took);

SCENARIO(writes_and_migration, "two CPUs write while the frame moves", .setup = setup_two_pages,
	.fiber = {fiber_take, fiber_write, fiber_read_write}, .finish = finish_took);

static void fiber_protect(void)
{
	struct ctg_mm *mm = xp_world->mm[0];

	xp_op("mprotect, read only");
	XP_EXPECT(xp_mprotect(mm, VPN, 1, CTG_PROT_READ) == 0);
	XP_EXPECT(xp_write(mm, VPN, 9) == -CTG_EFAULT);
	xp_op("mprotect, writable");
	XP_EXPECT(xp_mprotect(mm, VPN, 1, CTG_PROT_READ | CTG_PROT_WRITE) == 0);
	XP_EXPECT(xp_write(mm, VPN, 10) == 0);
}

SCENARIO(mprotect_and_migration, "rights change while the frame moves", .setup = setup_two_pages,
	.fiber = {fiber_take, fiber_protect}, .finish = finish_took);

static void fiber_try_write(void)
{
	xp_op("write, perhaps");
	xp_write(xp_world->mm[0], VPN, 21);
	xp_write(xp_world->mm[0], VPN, 22);
}

SCENARIO(mprotect_and_write, "rights change while another CPU writes", .setup = setup_two_pages,
	.fiber = {fiber_protect, fiber_try_write});

SCENARIO(fault_and_populate, "a fault and a populate of the same pages", .setup = setup_two_pages,
	.fiber = {fiber_populate, fiber_write, fiber_take});

/* ---- hooks that fail --------------------------------------------------------------------------
 */

SCENARIO(failing_hooks_and_munmap, "every hook of a migration may fail while a page is unmapped",
	.setup = setup_two_pages, .fiber = {fiber_take, fiber_munmap},
	.failing = 1u << XP_COPY | 1u << XP_RESTRICT | 1u << XP_INSTALL | 1u << XP_META_ALLOC |
		   1u << XP_ZERO);

SCENARIO(failing_hooks_and_write, "every hook of a migration may fail while pages are written",
	.setup = setup_two_pages, .fiber = {fiber_take, fiber_write},
	.failing = 1u << XP_COPY | 1u << XP_RESTRICT | 1u << XP_INSTALL | 1u << XP_META_ALLOC |
		   1u << XP_ZERO);

/* ---- large frames -----------------------------------------------------------------------------
 */

SCENARIO(split_and_migration, "part of a large frame is unmapped while it is taken",
	.setup = setup_large, .fiber = {fiber_take, fiber_munmap}, .finish = finish_took);

static void setup_large_in_pieces(void)
{
	ctg_pfn_t pfn;

	setup_large();
	/* One frame of each spill block is used: no block is whole, so it moves in pieces. */
	for (unsigned i = 0; i < 2; i++) {
		bool zeroed;

		pfn = xp_world->spill->base + (i + 1) * BLOCK - 1;
		XP_EXPECT(ctg_buddy_take_range(xp_world->spill, pfn, 1, NULL, &zeroed, &pfn) == 0);
	}
}

SCENARIO(pieces_and_migration, "a large frame moves in pieces while part of it is unmapped",
	.setup = setup_large_in_pieces, .fiber = {fiber_take, fiber_munmap});

SCENARIO(large_write_and_migration, "a large frame is written while it moves", .setup = setup_large,
	.fiber = {fiber_take, fiber_write}, .finish = finish_took);

/* ---- allocation against allocation ------------------------------------------------------------
 */

static void fiber_take_second(void)
{
	struct ctg_alloc_request request = {.mode = CTG_MODE_NORMAL};
	ctg_pfn_t start = xp_world->zone->base + 32;

	xp_op("take another 64 frames");
	xp_world->ret[1] = ctg_alloc_contig_range(xp_world->ctg, start, 64, &request);
	if (xp_world->ret[1] == 0) {
		xp_op("give those 64 back");
		XP_EXPECT(ctg_free_contig_range(xp_world->ctg, start, 64, NULL) == 0);
	}
}

static void finish_both_ended(void)
{
	for (unsigned i = 0; i < 2; i++)
		XP_EXPECT(xp_world->ret[i] == 0 || xp_world->ret[i] == -CTG_EBUSY);
	/* Who waited for the other was woken, and did not sleep until it gave up. */
	XP_EXPECT(xp_time() < 500000000);
}

SCENARIO(two_takes, "two allocations over the same frames", .setup = setup_two_pages,
	.fiber = {fiber_take, fiber_take_second}, .finish = finish_both_ended);

SCENARIO(two_takes_and_munmap, "two allocations over the same frames, and an unmap",
	.setup = setup_two_pages, .fiber = {fiber_take, fiber_take_second, fiber_munmap},
	.finish = finish_both_ended);

static void setup_two_blocks(void)
{
	xp_simple(2, 1);
	xp_world->mm[0] = xp_mm(0);
	xp_fill(xp_world->mm[0], VPN, 2);
}

static void take_from_area(unsigned i, uint64_t nr)
{
	struct ctg_alloc_request request = {.mode = CTG_MODE_NORMAL};

	xp_op("ctg_cma_alloc");
	xp_world->ret[i] = ctg_cma_alloc(xp_world->cma, nr, &request, &xp_world->pfn[i]);
}

static void fiber_area_0(void)
{
	take_from_area(0, BLOCK);
}

static void fiber_area_1(void)
{
	take_from_area(1, BLOCK);
	if (xp_world->ret[1] == 0) {
		xp_op("ctg_cma_release");
		XP_EXPECT(ctg_cma_release(xp_world->cma, xp_world->pfn[1], BLOCK, NULL) == 0);
		xp_op("ctg_cma_alloc again");
		take_from_area(1, BLOCK);
	}
}

static void finish_area(void)
{
	XP_EXPECT(xp_world->ret[0] == 0 && xp_world->ret[1] == 0);
	XP_EXPECT(xp_world->pfn[0] + BLOCK <= xp_world->pfn[1] ||
		  xp_world->pfn[1] + BLOCK <= xp_world->pfn[0]);
	for (unsigned i = 0; i < 2; i++)
		XP_EXPECT(ctg_cma_release(xp_world->cma, xp_world->pfn[i], BLOCK, NULL) == 0);
}

SCENARIO(two_in_one_area, "two allocations in one area that has room for both",
	.setup = setup_two_blocks, .fiber = {fiber_area_0, fiber_area_1}, .finish = finish_area);

static void finish_one(void)
{
	XP_EXPECT(xp_world->ret[0] == 0);
	XP_EXPECT(ctg_cma_release(xp_world->cma, xp_world->pfn[0], BLOCK, NULL) == 0);
}

SCENARIO(area_and_access, "an allocation in an area, a fault and a write",
	.setup = setup_two_blocks, .fiber = {fiber_area_0, fiber_populate, fiber_write},
	.finish = finish_one);

static void fiber_isolate(void)
{
	struct ctg_zone *zone = xp_world->zone;
	const void *owner = &xp_world->n[2];

	xp_op("isolate");
	if (ctg_block_isolate(zone, zone->base, owner) != 0)
		return;
	XP_EXPECT(xp_world->n[0]++ == 0);
	xp_pause();
	xp_world->n[0]--;
	ctg_block_unisolate(zone, zone->base, owner);
}

static void fiber_isolate_too(void)
{
	struct ctg_zone *zone = xp_world->zone;
	const void *owner = &xp_world->n[3];

	xp_op("isolate, too");
	if (ctg_block_isolate(zone, zone->base, owner) != 0)
		return;
	XP_EXPECT(xp_world->n[0]++ == 0);
	xp_pause();
	xp_world->n[0]--;
	ctg_block_unisolate(zone, zone->base, owner);
}

SCENARIO(two_isolate, "one block, isolated by two", .setup = setup_two_pages,
	.fiber = {fiber_isolate, fiber_isolate_too, fiber_munmap});

/* ---- caches and isolation ---------------------------------------------------------------------
 */

static void setup_cached(void)
{
	xp_simple(1, 1);
	/* A frame to be freed into a cache, in the block that is taken. */
	XP_EXPECT(ctg_alloc_frames(xp_world->ctg, 0, CTG_GFP_MOVABLE, &xp_world->pfn[0]) == 0);
	XP_EXPECT(ctg_alloc_frames(xp_world->ctg, 0, CTG_GFP_MOVABLE, &xp_world->pfn[1]) == 0);
	ctg_drain_caches(xp_world->ctg);
	xp_held(xp_world->pfn[0], 0);
}

static void fiber_free(void)
{
	xp_op("free a frame");
	XP_EXPECT(ctg_free_frames(xp_world->ctg, xp_world->pfn[0]) == 0);
	XP_EXPECT(ctg_free_frames(xp_world->ctg, xp_world->pfn[1]) == 0);
}

static void fiber_take_isolated(void)
{
	xp_op("take the block");
	xp_world->ret[0] = take(BLOCK);
	if (xp_world->ret[0] == 0) {
		xp_op("give the block back");
		give_back(BLOCK);
	}
}

SCENARIO(free_and_isolation, "frames are freed into a cache while their block is isolated",
	.setup = setup_cached, .fiber = {fiber_take_isolated, fiber_free});

static void fiber_alloc_free(void)
{
	ctg_pfn_t pfn;

	xp_op("allocate and free a frame");
	if (ctg_alloc_frames(xp_world->ctg, 0, CTG_GFP_MOVABLE, &pfn) == 0)
		XP_EXPECT(ctg_free_frames(xp_world->ctg, pfn) == 0);
}

/* The caches hold frames of the block: a drain has to find them all. */
SCENARIO(cache_and_isolation, "frames go in and out of caches while their block is isolated",
	.setup = setup_cached, .fiber = {fiber_take_isolated, fiber_alloc_free, fiber_free});

/* The frames are being freed, or held for a moment: isolation and a drain leave none in a cache. */
static void fiber_isolate_and_drain(void)
{
	struct ctg_zone *zone = xp_world->zone;

	xp_op("isolate and drain");
	XP_EXPECT(ctg_block_isolate(zone, zone->base, xp_world) == 0);
	ctg_pcp_drain(zone);
	for (unsigned cpu = 0; cpu < XP_MAX_FIBERS; cpu++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			XP_EXPECT(zone->pcp[cpu].list[mt].nr == 0);
	/* Whoever was freeing has done so by then. */
	xp_let_others();
	for (unsigned cpu = 0; cpu < XP_MAX_FIBERS; cpu++)
		for (unsigned mt = 0; mt < CTG_MIGRATE_ISOLATE; mt++)
			XP_EXPECT(zone->pcp[cpu].list[mt].nr == 0);
	ctg_block_unisolate(zone, zone->base, xp_world);
}

static void setup_cached_alone(void)
{
	xp_machine();
	xp_world->zone = xp_zone(1, 0, true);
	xp_area(xp_world->zone);
	for (unsigned i = 0; i < 2; i++)
		XP_EXPECT(ctg_alloc_frames(xp_world->ctg, 0, CTG_GFP_MOVABLE, &xp_world->pfn[i]) ==
			  0);
}

SCENARIO(drain_and_free, "after isolation and a drain no cache has a frame of the block",
	.setup = setup_cached_alone, .fiber = {fiber_isolate_and_drain, fiber_free});

SCENARIO(populate_and_isolation, "pages are backed while the block is taken",
	.setup = setup_two_pages, .fiber = {fiber_take_isolated, fiber_populate});

/* ---- the word ---------------------------------------------------------------------------------
 */

static void setup_held(void)
{
	xp_simple(1, 0);
	XP_EXPECT(ctg_alloc_frames(xp_world->ctg, 0, CTG_GFP_MOVABLE, &xp_world->pfn[0]) == 0);
}

static struct ctg_frame *held_frame(void)
{
	return ctg_frame_of(xp_world->ctg, xp_world->pfn[0]);
}

/* Sleep until the frame has no holder but the one that is known. */
static void wait_for_holders(uint64_t counts)
{
	for (;;) {
		uint64_t word = __atomic_load_n(&held_frame()->word.v, __ATOMIC_ACQUIRE);

		if ((word & ~CTG_WORD_FLAGS) == counts)
			return;
		XP_EXPECT(ctg_frame_wait(xp_world->ctg, xp_world->pfn[0], word, CTG_NO_DEADLINE,
				  false) == 0);
	}
}

static void setup_extra_holders(void)
{
	setup_held();
	XP_EXPECT(ctg_frame_tryget(held_frame()) == 0);
	XP_EXPECT(ctg_frame_tryget(held_frame()) == 0);
}

static void fiber_wait_for_holders(void)
{
	xp_op("wait for the holders");
	wait_for_holders(CTG_WORD_REF1);
}

static void fiber_put(void)
{
	xp_op("put");
	ctg_frame_put(xp_world->ctg, xp_world->pfn[0], CTG_WORD_REF1, 1);
}

static void finish_held(void)
{
	XP_EXPECT(ctg_free_frames(xp_world->ctg, xp_world->pfn[0]) == 0);
}

SCENARIO(put_and_waiter, "a sleeper waits until two holders have left",
	.setup = setup_extra_holders, .fiber = {fiber_wait_for_holders, fiber_put, fiber_put},
	.finish = finish_held);

SCENARIO(put_and_two_waiters, "two sleepers wait until two holders have left",
	.setup = setup_extra_holders,
	.fiber = {fiber_wait_for_holders, fiber_wait_for_holders, fiber_put, fiber_put},
	.finish = finish_held);

static void fiber_freeze(void)
{
	uint64_t seen;

	xp_op("freeze");
	if (ctg_frame_freeze(held_frame(), 0, 1, &seen)) {
		xp_world->n[0]++;
		XP_EXPECT(__atomic_load_n(&xp_world->n[1], __ATOMIC_RELAXED) == 0);
		xp_pause();
		XP_EXPECT(__atomic_load_n(&xp_world->n[1], __ATOMIC_RELAXED) == 0);
		xp_world->n[0]--;
		ctg_frame_unfreeze(xp_world->ctg, held_frame(), CTG_WORD_REF1);
	} else {
		XP_EXPECT(ctg_word_ref(seen) == 2 || ctg_word_ref(seen) == 3);
	}
}

static void fiber_tryget(void)
{
	xp_op("tryget");
	if (ctg_frame_tryget(held_frame()) != 0)
		return;
	XP_EXPECT(xp_world->n[0] == 0);
	xp_world->n[1]++;
	xp_pause();
	xp_world->n[1]--;
	ctg_frame_put(xp_world->ctg, xp_world->pfn[0], CTG_WORD_REF1, 1);
}

SCENARIO(freeze_and_tryget, "a frame is frozen or held, never both", .setup = setup_held,
	.fiber = {fiber_freeze, fiber_tryget, fiber_tryget}, .finish = finish_held);

static void fiber_wait_for_thaw(void)
{
	xp_op("wait for the thaw");
	for (;;) {
		uint64_t word = __atomic_load_n(&held_frame()->word.v, __ATOMIC_ACQUIRE);

		if (!ctg_word_frozen(word))
			return;
		XP_EXPECT(ctg_frame_wait(xp_world->ctg, xp_world->pfn[0], word, CTG_NO_DEADLINE,
				  false) == 0);
	}
}

SCENARIO(freeze_and_waiter, "a sleeper waits for the end of a freeze", .setup = setup_held,
	.fiber = {fiber_freeze, fiber_wait_for_thaw, fiber_wait_for_thaw}, .finish = finish_held);

/* ---- home, and those who give up --------------------------------------------------------------
 */

static void setup_spilled(void)
{
	xp_simple(1, 1);
	xp_world->mm[0] = xp_mm(CTG_GFP_SPILL);
	/* Filled while the area is taken: the pages lie in the spill zone. */
	XP_EXPECT(take(BLOCK) == 0);
	xp_fill(xp_world->mm[0], VPN, 2);
	XP_EXPECT(ctg_free_contig_range(xp_world->ctg, xp_world->zone->base, BLOCK, NULL) == 0);
}

static void fiber_home(void)
{
	xp_op("migrate home");
	ctg_migrate_home(xp_world->ctg, 512, &xp_world->n[2]);
}

SCENARIO(home_and_munmap, "spilled pages come home while one is unmapped", .setup = setup_spilled,
	.fiber = {fiber_home, fiber_munmap});

SCENARIO(home_take_write, "spilled pages come home while the area is taken and pages are written",
	.setup = setup_spilled, .fiber = {fiber_home, fiber_take, fiber_write});

/* The one who takes meets a held frame, waits for the holder, and is killed meanwhile. */
static void setup_obstacle(void)
{
	struct ctg_mapping m;

	setup_pages(2);
	XP_EXPECT(ctg_mm_lookup(xp_world->mm[0], VPN, 1, &m) == 0);
	xp_world->pfn[0] = m.pfn;
	XP_EXPECT(ctg_frame_tryget(held_frame()) == 0);
}

static void fiber_take_killed(void)
{
	xp_op("take, until killed");
	xp_world->ret[0] = take(64);
	XP_EXPECT(xp_world->ret[0] == -CTG_EINTR || xp_world->ret[0] == -CTG_EBUSY);
}

static void fiber_kill(void)
{
	xp_op("kill");
	xp_pause();
	xp_kill(0);
}

static void finish_obstacle(void)
{
	ctg_frame_put(xp_world->ctg, xp_world->pfn[0], CTG_WORD_REF1, 1);
}

/* Somebody holds a frame for a moment, again and again, while it is taken. */
static void setup_glance(void)
{
	struct ctg_mapping m;

	setup_pages(2);
	XP_EXPECT(ctg_mm_lookup(xp_world->mm[0], VPN, 1, &m) == 0);
	xp_world->pfn[0] = m.pfn;
	xp_world->n[4] = 1;
}

static void fiber_glance(void)
{
	xp_op("glance");
	for (unsigned i = 0; i < 2; i++) {
		if (ctg_frame_tryget(held_frame()) != 0)
			continue;
		xp_pause();
		ctg_frame_put(xp_world->ctg, xp_world->pfn[0], CTG_WORD_REF1, 1);
	}
}

SCENARIO(glance_and_migration, "a stranger holds a frame for a moment while it is taken",
	.setup = setup_glance, .fiber = {fiber_take, fiber_glance, fiber_write});

SCENARIO(glance_and_munmap, "a stranger holds a frame for a moment while it is unmapped and taken",
	.setup = setup_glance, .fiber = {fiber_take, fiber_glance, fiber_munmap});

static void setup_obstacle_held(void)
{
	setup_obstacle();
	xp_held(xp_world->pfn[0], 1);
}

static void finish_obstacle_held(void)
{
	xp_held(xp_world->pfn[0], -1);
	finish_obstacle();
}

SCENARIO(killed_waiter, "an allocation that waits for a holder is killed",
	.setup = setup_obstacle_held, .fiber = {fiber_take_killed, fiber_kill, fiber_write},
	.finish = finish_obstacle_held);

static void fiber_put_obstacle(void)
{
	xp_op("put the frame in the way");
	xp_pause();
	ctg_frame_put(xp_world->ctg, xp_world->pfn[0], CTG_WORD_REF1, 1);
}

SCENARIO(put_and_take, "a holder leaves while an allocation waits for it", .setup = setup_obstacle,
	.fiber = {fiber_take, fiber_put_obstacle, fiber_munmap});

const struct xp_scenario *const xp_scenarios[] = {&exit_and_migration, &munmap_and_migration,
	&munmap_migration_access, &two_exits_and_migration, &dontneed_and_migration,
	&write_and_migration, &writes_and_migration, &mprotect_and_migration, &mprotect_and_write,
	&fault_and_populate, &failing_hooks_and_munmap, &failing_hooks_and_write,
	&split_and_migration, &pieces_and_migration, &large_write_and_migration, &two_takes,
	&two_takes_and_munmap, &two_in_one_area, &area_and_access, &free_and_isolation,
	&cache_and_isolation, &drain_and_free, &populate_and_isolation, &put_and_waiter,
	&put_and_two_waiters, &freeze_and_tryget, &freeze_and_waiter, &home_and_munmap,
	&home_take_write, &killed_waiter, &put_and_take, &glance_and_migration, &glance_and_munmap,
	&two_isolate, &remap_and_migration, &first_write_and_migration, NULL};
