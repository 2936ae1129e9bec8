/* SPDX-License-Identifier: MIT */
/*
 * The port under the core: memory of one value a page, a TLB for each fiber that goes stale, and
 * the model of what pages must read as.
 */
#include "engine.h"
#include "buddy.h"
#include "pgtable.h"

#include <stdio.h>
#include <string.h>

struct xp_machine *xp_m;
struct xp_world *xp_world;

/* ---- hooks ------------------------------------------------------------------------------------
 */

static bool hook_fails(enum xp_hook hook)
{
	unsigned bit = 1u << hook;

	if (!xp_run.on || (xp_scenario->failing & ~xp_m->failed & bit) == 0)
		return false;
	if (xp_choose(2) == 0)
		return false;
	xp_m->failed |= bit;
	if (xp_run.tracing)
		xp_trace_text("the hook fails");
	return true;
}

static void *meta_alloc(void *host, size_t bytes, size_t align)
{
	(void)host;
	if (hook_fails(XP_META_ALLOC))
		return NULL;
	xp_m->meta_bytes += bytes;
	return xp_alloc(bytes, align);
}

static void meta_free(void *host, void *p, size_t bytes)
{
	(void)host;
	if (p == NULL)
		return;
	xp_m->meta_bytes -= bytes;
	xp_poison(p, bytes);
}

static unsigned cpu(void *host)
{
	(void)host;
	return xp_run.now;
}

static uint64_t *value_of(ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < xp_m->nr_zones; i++)
		if (pfn - xp_m->zone[i].base < xp_m->zone[i].nr)
			return &xp_m->zone[i].value[pfn - xp_m->zone[i].base];
	xp_violation("frame %llu is in no zone", (unsigned long long)pfn);
}

static int copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	(void)host;
	xp_point(NULL, false, "copy");
	xp_drain();
	if (hook_fails(XP_COPY))
		return -CTG_ENOMEM;
	for (size_t i = 0; i < nr; i++) {
		memcpy(value_of(runs[i].dst), value_of(runs[i].src), runs[i].nr * sizeof(uint64_t));
		xp_point(NULL, false, "copied a run");
	}
	return 0;
}

static int zero(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	(void)host;
	xp_point(NULL, false, "zero");
	xp_drain();
	if (hook_fails(XP_ZERO))
		return -CTG_ENOMEM;
	memset(value_of(pfn), 0, nr * sizeof(uint64_t));
	return 0;
}

static void discard(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	(void)host;
	memset(value_of(pfn), 0, nr * sizeof(uint64_t));
}

/* ---- the TLB ----------------------------------------------------------------------------------
 */

static bool in_ranges(ctg_vpn_t vpn, const struct ctg_vrange *ranges, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		if (vpn - ranges[i].vpn < ranges[i].nr)
			return true;
	return false;
}

/* One CPU after the other, as interrupts do: between two of them others go on. */
static void drop(const struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	for (unsigned f = 0; f < xp_run.nr; f++) {
		for (unsigned i = 0; i < XP_TLB; i++)
			if (xp_m->tlb[f][i].mm == mm && in_ranges(xp_m->tlb[f][i].vpn, ranges, nr))
				xp_m->tlb[f][i].mm = NULL;
		xp_point(NULL, false, "a TLB is flushed");
	}
}

/* Writers wait from tlb_restrict to the tlb_install that covers the pages; see ports/sim. */
static bool held(const struct ctg_mm *mm, ctg_vpn_t vpn)
{
	for (unsigned i = 0; i < XP_HOLDS; i++)
		if (xp_m->hold[i].mm == mm && in_ranges(vpn, xp_m->hold[i].range, xp_m->hold[i].nr))
			return true;
	return false;
}

static bool hold_ends(const struct xp_hold *hold, const struct ctg_vrange *ranges, size_t nr)
{
	for (unsigned i = 0; i < hold->nr; i++)
		for (uint64_t page = 0; page < hold->range[i].nr; page++) {
			ctg_vpn_t vpn = hold->range[i].vpn + page;
			struct ctg_mapping m;

			if (!in_ranges(vpn, ranges, nr))
				return false;
			if (ctg_mm_lookup(hold->mm, vpn, 1, &m) != 0 || m.moving)
				return false;
		}
	return true;
}

static int tlb_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how)
{
	unsigned i = 0;

	(void)host;
	xp_point(NULL, false,
		how == CTG_TLB_WRPROTECT ? "tlb_restrict, writes" : "tlb_restrict, all");
	xp_drain();
	if (how == CTG_TLB_WRPROTECT) {
		if (hook_fails(XP_RESTRICT))
			return -CTG_EBUSY;
		while (i < XP_HOLDS && xp_m->hold[i].mm != NULL)
			i++;
		if (i == XP_HOLDS || nr > 8)
			return -CTG_ENOMEM;
		xp_m->hold[i].mm = mm;
		xp_m->hold[i].nr = (unsigned)nr;
		memcpy(xp_m->hold[i].range, ranges, nr * sizeof(*ranges));
	}
	drop(mm, ranges, nr);
	return 0;
}

static int tlb_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	bool back = xp_m->install_failed == mm, on;

	(void)host;
	xp_point(NULL, false, "tlb_install");
	xp_drain();
	if (back) {
		xp_m->install_failed = NULL;
	} else if (hook_fails(XP_INSTALL)) {
		xp_m->install_failed = mm;
		return -CTG_ENOMEM;
	}
	drop(mm, ranges, nr);
	on = xp_step_begin();
	for (unsigned i = 0; i < XP_HOLDS; i++)
		if (xp_m->hold[i].mm == mm && hold_ends(&xp_m->hold[i], ranges, nr))
			xp_m->hold[i].mm = NULL;
	xp_step_end(on);
	xp_m->let_go.v++;
	xp_wake(NULL, &xp_m->let_go, UINT32_MAX);
	return 0;
}

/* ---- the model --------------------------------------------------------------------------------
 */

static struct xp_page *page_of(const struct ctg_mm *mm, ctg_vpn_t vpn)
{
	for (unsigned i = 0; i < XP_MAX_PAGES; i++)
		if (xp_m->page[i].mm == mm && xp_m->page[i].vpn == vpn)
			return &xp_m->page[i];
	return NULL;
}

static struct xp_page *page_make(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	struct xp_page *page = page_of(mm, vpn);

	for (unsigned i = 0; page == NULL && i < XP_MAX_PAGES; i++)
		if (xp_m->page[i].mm == NULL)
			page = &xp_m->page[i];
	if (page != NULL) {
		page->mm = mm;
		page->vpn = vpn;
	}
	return page;
}

static void model_read(struct xp_page *page, uint64_t value, ctg_pfn_t pfn)
{
	if (page == NULL)
		return;
	if (page->state == XP_UNMAPPED)
		xp_violation("page %llu read although it is unmapped (frame %llu)",
			(unsigned long long)page->vpn, (unsigned long long)pfn);
	if (page->zeroing && value == 0)
		page->value = 0;
	if (value != page->value)
		xp_violation("page %llu reads as %llu, not %llu (frame %llu)",
			(unsigned long long)page->vpn, (unsigned long long)value,
			(unsigned long long)page->value, (unsigned long long)pfn);
}

static void model_written(struct xp_page *page, uint64_t value, ctg_pfn_t pfn)
{
	if (page == NULL)
		return;
	if (page->state == XP_UNMAPPED || ((page->prot | page->prot_next) & CTG_PROT_WRITE) == 0)
		xp_violation("page %llu written although that is forbidden (frame %llu)",
			(unsigned long long)page->vpn, (unsigned long long)pfn);
	page->value = value;
	page->dirty = !page->zeroing;
}

static void model_faulted(const struct xp_page *page, bool write, int error)
{
	unsigned prot = write ? CTG_PROT_WRITE : CTG_PROT_READ;

	if (page == NULL || error != -CTG_EFAULT || page->state != XP_MAPPED)
		return;
	if ((page->prot & page->prot_next & prot) != 0)
		xp_violation(
			"page %llu faults although it is mapped", (unsigned long long)page->vpn);
}

/* ---- accesses ---------------------------------------------------------------------------------
 */

static struct xp_tlb *tlb_find(const struct ctg_mm *mm, ctg_vpn_t vpn)
{
	for (unsigned i = 0; i < XP_TLB; i++) {
		struct xp_tlb *entry = &xp_m->tlb[xp_run.now][i];

		if (entry->mm == mm && entry->vpn == vpn)
			return entry;
	}
	return NULL;
}

/* The walk and the fill are one step, as in hardware that an invalidation waits for. */
static bool tlb_fill(struct ctg_mm *mm, ctg_vpn_t vpn, bool write)
{
	struct xp_tlb *entry = tlb_find(mm, vpn);
	struct ctg_mapping m;

	if (entry == NULL)
		entry = &xp_m->tlb[xp_run.now][xp_m->tlb_next[xp_run.now]++ % XP_TLB];
	entry->mm = NULL;
	if (ctg_mm_lookup(mm, vpn, 1, &m) != 0 || m.pfn == CTG_PFN_NONE ||
		(m.prot & CTG_PROT_READ) == 0)
		return false;
	*entry = (struct xp_tlb){mm, vpn, m.pfn, (m.prot & CTG_PROT_WRITE) != 0 && !held(mm, vpn)};
	return !write || entry->write;
}

/* true: done. false, *filled: look again; else fault. */
static bool touch(struct ctg_mm *mm, ctg_vpn_t vpn, bool write, uint64_t *value, bool *filled)
{
	struct xp_tlb *entry = tlb_find(mm, vpn);
	struct xp_page *page = page_of(mm, vpn);

	*filled = false;
	if (entry == NULL || (write && !entry->write)) {
		*filled = tlb_fill(mm, vpn, write);
		return false;
	}
	xp_check_access(entry->pfn, write ? "written" : "read");
	if (write) {
		*value_of(entry->pfn) = *value;
		model_written(page, *value, entry->pfn);
	} else {
		*value = *value_of(entry->pfn);
		model_read(page, *value, entry->pfn);
	}
	ctg_mm_mark_accessed(mm, vpn, write);
	return true;
}

static int access_page(struct ctg_mm *mm, ctg_vpn_t vpn, bool write, uint64_t *value)
{
	bool filled, on;

	for (;;) {
		uint32_t seen;
		bool done;
		int ret;

		xp_point(NULL, write, write ? "writes a page" : "reads a page");
		on = xp_step_begin();
		done = touch(mm, vpn, write, value, &filled);
		xp_step_end(on);
		if (done)
			return 0;
		if (filled)
			continue;
		ret = ctg_handle_fault(mm, vpn, write);
		if (ret != 0) {
			model_faulted(page_of(mm, vpn), write, ret);
			return ret;
		}
		seen = xp_m->let_go.v;
		if (write && held(mm, vpn))
			xp_wait(NULL, &xp_m->let_go, seen, CTG_NO_DEADLINE, false);
	}
}

int xp_read(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t *value)
{
	uint64_t ignored;

	return access_page(mm, vpn, false, value != NULL ? value : &ignored);
}

int xp_write(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t value)
{
	return access_page(mm, vpn, true, &value);
}

/* ---- the core's functions, with the model told ------------------------------------------------
 */

static void each_page(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr,
	void (*fn)(struct xp_page *, unsigned), unsigned arg)
{
	for (unsigned i = 0; i < XP_MAX_PAGES; i++)
		if (xp_m->page[i].mm == mm && xp_m->page[i].vpn - vpn < nr)
			fn(&xp_m->page[i], arg);
}

static void set_state(struct xp_page *page, unsigned state)
{
	page->state = (enum xp_page_state)state;
}

static void begin_zeroing(struct xp_page *page, unsigned arg)
{
	(void)arg;
	page->zeroing = true;
	page->dirty = false;
	page->prot_next = page->prot;
}

static void set_prot(struct xp_page *page, unsigned prot)
{
	page->prot = page->prot_next = prot;
}

static void set_prot_next(struct xp_page *page, unsigned prot)
{
	page->prot_next = prot;
}

static void keep_prot(struct xp_page *page, unsigned arg)
{
	(void)arg;
	page->prot_next = page->prot;
}

int xp_mmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot)
{
	int ret = ctg_mmap(mm, vpn, nr, prot);

	for (uint64_t i = 0; ret == 0 && i < nr && i < XP_MAX_PAGES; i++) {
		struct xp_page *page = page_make(mm, vpn + i);

		if (page == NULL)
			break;
		page->state = XP_MAPPED;
		page->prot = page->prot_next = prot;
		page->value = 0;
		page->dirty = false;
		page->zeroing = false;
	}
	return ret;
}

int xp_munmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	int ret;

	each_page(mm, vpn, nr, set_state, XP_CHANGING);
	ret = ctg_munmap(mm, vpn, nr);
	each_page(mm, vpn, nr, set_state, ret == 0 ? XP_UNMAPPED : XP_MAPPED);
	return ret;
}

int xp_dontneed(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	each_page(mm, vpn, nr, begin_zeroing, 0);
	return ctg_madvise_dontneed(mm, vpn, nr);
}

int xp_mprotect(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot)
{
	int ret;

	each_page(mm, vpn, nr, set_prot_next, prot);
	ret = ctg_mprotect(mm, vpn, nr, prot);
	if (ret == 0)
		each_page(mm, vpn, nr, set_prot, prot);
	else
		each_page(mm, vpn, nr, keep_prot, 0);
	return ret;
}

void xp_mm_destroy(struct ctg_mm *mm, bool dead)
{
	each_page(mm, 0, CTG_MM_MAX_VPN, set_state, XP_CHANGING);
	ctg_mm_destroy(mm, dead);
	for (unsigned i = 0; i < XP_MAX_PAGES; i++)
		if (xp_m->page[i].mm == mm)
			xp_m->page[i].mm = NULL;
	for (unsigned f = 0; f < XP_MAX_FIBERS; f++)
		for (unsigned i = 0; i < XP_TLB; i++)
			if (xp_m->tlb[f][i].mm == mm)
				xp_m->tlb[f][i].mm = NULL;
}

uint64_t xp_frame_value(ctg_pfn_t pfn)
{
	return *value_of(pfn);
}

void xp_set_frame_value(ctg_pfn_t pfn, uint64_t value)
{
	*value_of(pfn) = value;
}

void xp_held(ctg_pfn_t pfn, int references)
{
	unsigned at = 0;

	while (at < 16 && xp_m->held[at].references != 0 && xp_m->held[at].pfn != pfn)
		at++;
	if (at == 16)
		xp_violation("a scenario holds too many frames");
	xp_m->held[at].pfn = pfn;
	xp_m->held[at].references += references;
}

/* ---- making machines --------------------------------------------------------------------------
 */

static void need(int ret, const char *what)
{
	if (ret != 0)
		xp_violation("set-up: %s returned %d", what, ret);
}

void xp_machine_new(void)
{
	xp_m = xp_alloc(sizeof(*xp_m), 64);
	xp_world = &xp_m->world;
	xp_m->now = 1000;
	xp_run.nr = 1;
}

void xp_machine(void)
{
	const struct ctg_port port = {
		.nr_cpus = XP_MAX_FIBERS,
		.meta_alloc = meta_alloc,
		.meta_free = meta_free,
		.cpu = cpu,
		.now = xp_now,
		.wait = xp_wait,
		.wake = xp_wake,
		.relax = xp_relax,
		.copy = copy,
		.zero = zero,
		.discard = discard,
		.tlb_restrict = tlb_restrict,
		.tlb_install = tlb_install,
	};

	need(ctg_create(&port, &xp_world->ctg), "ctg_create");
	xp_ignore(&xp_world->ctg->counters, sizeof(xp_world->ctg->counters));
}

struct ctg_zone *xp_zone(unsigned nr_blocks, unsigned flags, bool area)
{
	struct xp_memory *memory = &xp_m->zone[xp_m->nr_zones];
	uint64_t nr = nr_blocks * CTG_PAGEBLOCK_FRAMES;
	struct ctg_zone_config config = {.nr = nr, .flags = flags};
	struct ctg_zone *zone;

	/* A gap, so that nothing merges with the zone before. */
	config.base = (1 + 8 * (uint64_t)xp_m->nr_zones) * CTG_PAGEBLOCK_FRAMES;
	config.metadata = xp_alloc(ctg_zone_metadata_bytes(nr), 64);
	*memory = (struct xp_memory){config.base, nr, xp_alloc(nr * sizeof(uint64_t), 64)};
	xp_m->nr_zones++;
	need(ctg_zone_add(xp_world->ctg, &config, &zone), "ctg_zone_add");
	need(ctg_zone_populate(zone, config.base, nr), "ctg_zone_populate");
	if (!area)
		need(ctg_zone_release(zone, config.base, nr, false), "ctg_zone_release");
	return zone;
}

void xp_area(struct ctg_zone *zone)
{
	struct ctg_extent extent = {zone->base, zone->nr};
	struct ctg_cma_config config = {.name = "area", .ranges = &extent, .nr_ranges = 1};

	config.order_per_bit = 6;
	need(ctg_cma_create(xp_world->ctg, &config, &xp_world->cma), "ctg_cma_create");
}

void xp_simple(unsigned nr_blocks, unsigned spill_blocks)
{
	xp_machine();
	xp_world->zone = xp_zone(nr_blocks, 0, true);
	xp_area(xp_world->zone);
	if (spill_blocks != 0)
		xp_world->spill = xp_zone(spill_blocks, CTG_ZONE_SPILL, false);
}

struct ctg_mm *xp_mm(unsigned gfp)
{
	struct ctg_mm_config config = {.gfp = gfp};
	struct ctg_mm *mm;

	need(ctg_mm_create(xp_world->ctg, &config, &mm), "ctg_mm_create");
	xp_ignore(&mm->nr_present, sizeof(mm->nr_present));
	xp_ignore(&mm->nr_tables, sizeof(mm->nr_tables));
	return mm;
}

void xp_fill(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	need(xp_mmap(mm, vpn, nr, CTG_PROT_READ | CTG_PROT_WRITE), "ctg_mmap");
	need(ctg_mm_populate(mm, vpn, nr, NULL), "ctg_mm_populate");
	for (uint64_t i = 0; i < nr && i < XP_MAX_PAGES; i++)
		need(xp_write(mm, vpn + i, vpn + i + 1), "a write");
}

void xp_occupy(struct ctg_zone *zone, uint64_t left)
{
	struct ctg_zone_stat stat;
	uint64_t nr;
	bool zeroed;
	ctg_pfn_t busy;

	ctg_zone_stat(zone, &stat);
	nr = stat.longest_free > left ? stat.longest_free - left : 0;
	if (nr != 0)
		need(ctg_buddy_take_range(
			     zone, stat.longest_free_pfn + left, nr, NULL, &zeroed, &busy),
			"ctg_buddy_take_range");
}
