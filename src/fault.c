/* SPDX-License-Identifier: MIT */
/*
 * Frames for what is RESERVED: populate and faults.
 */
#include "pgtable.h"

/*
 * What has been mapped in the table and not yet installed: consecutive pages in consecutive frames,
 * with the same rights, so that a port maps them in one step.
 */
struct fill {
	struct ctg_mm *mm;
	unsigned gfp; /* beside what the mm's config says */
	ctg_vpn_t vpn;
	ctg_pfn_t pfn;
	uint64_t nr;
	uint64_t rights;
	int error; /* the first that an installation returned; that run has been taken back */
};

/* ---- taking a run back ----------------------------------------------------------------------- */

/* Has somebody written to it, or does somebody hold its frame, who will look at what is written? */
static bool in_use(struct ctg *ctg, uint64_t entry)
{
	uint64_t word;

	if ((entry & CTG_PTE_DIRTY) != 0)
		return true;
	word = ctg_load64_acquire(
		&ctg_frame_of(ctg, ctg_frame_head(ctg, ctg_pte_pfn(entry)))->word);
	return ctg_word_pin(word) != 0 || ctg_word_ref(word) != 0;
}

/* Which pages of a run are in use, from vpn on: as long as they agree. */
static uint64_t used_run(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end, bool *used)
{
	ctg_vpn_t at = vpn;
	unsigned level;

	while (at < end) {
		bool now = in_use(mm->ctg, ctg_pte_read(mm, at, &level));

		if (at == vpn)
			*used = now;
		else if (now != *used)
			break;
		at = (at | (ctg_level_pages(level) - 1)) + 1;
	}
	return at - vpn;
}

/*
 * The port could not install the run: it becomes RESERVED again. A port that fills its mapping on
 * demand may have let a write through since the entries were stored, and somebody may have pinned a
 * frame. That page stays: so first no access is allowed any more, then DIRTY and the frame's word
 * are looked at. Faults meanwhile wait for mm->lock.
 */
static void fill_undo(const struct fill *fill)
{
	struct ctg_mm *mm = fill->mm;
	const struct ctg_port *port = &mm->ctg->port;
	const struct ctg_vrange range = {fill->vpn, fill->nr};
	ctg_vpn_t vpn = range.vpn, end = range.vpn + range.nr;

	ctg_notify_start(mm, &range, 1, CTG_NOTIFY_UNMAP, true);
	ctg_mm_set_rights(mm, vpn, end, 0);
	port->tlb_restrict(port->host, mm, &range, 1, CTG_TLB_INVALIDATE);
	while (vpn < end) {
		bool used = false;
		uint64_t nr = used_run(mm, vpn, end, &used);

		if (!used)
			ctg_unmap_range(mm, vpn, nr, true);
		vpn += nr;
	}
	ctg_mm_set_rights(mm, range.vpn, end, fill->rights);
	/* The table is as it was: this call must not fail. */
	port->tlb_install(port->host, mm, &range, 1);
	ctg_notify_end(mm);
	ctg_pte_prune(mm, range.vpn, end);
}

static void fill_install(struct fill *fill)
{
	const struct ctg_port *port = &fill->mm->ctg->port;
	const struct ctg_vrange range = {fill->vpn, fill->nr};
	int ret;

	if (fill->nr == 0)
		return;
	ret = port->tlb_install(port->host, fill->mm, &range, 1);
	if (ret != 0) {
		fill_undo(fill);
		if (fill->error == 0)
			fill->error = ret;
	}
	fill->nr = 0;
}

/* ---- mapping new frames ---------------------------------------------------------------------- */

/*
 * Map 2^order frames at vpn, where every entry is RESERVED at `level`: one entry of level 1 or 2,
 * or 2^order of level 0 with a frame each.
 */
static void fill_map(
	struct fill *fill, ctg_vpn_t vpn, ctg_pfn_t pfn, unsigned order, unsigned level)
{
	struct ctg_mm *mm = fill->mm;
	uint64_t nr = (uint64_t)1 << order;
	uint64_t step = ctg_level_pages(level);
	struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, vpn + nr);
	uint64_t rights = 0;

	for (uint64_t i = 0; i < nr; i += step)
		ctg_anon_own(mm->ctg, mm->anon, pfn + i, vpn + i);
	while (ctg_pte_walk_next(&walk)) {
		CTG_ASSERT(walk.ref.level == level && (walk.ref.entry & CTG_PTE_RESERVED) != 0);
		rights = walk.ref.entry & CTG_PTE_RIGHTS;
		ctg_anon_map(mm->ctg, pfn + (walk.vpn - vpn));
		ctg_pte_set(&walk.ref, ctg_pte(pfn + (walk.vpn - vpn), CTG_PTE_PRESENT | rights));
	}
	ctg_add64_relaxed(&mm->nr_present, nr);
	if (fill->nr != 0 && (fill->vpn + fill->nr != vpn || fill->pfn + fill->nr != pfn ||
				     fill->rights != rights))
		fill_install(fill);
	if (fill->nr == 0) {
		fill->vpn = vpn;
		fill->pfn = pfn;
		fill->rights = rights;
	}
	fill->nr += nr;
}

/* The highest level at which the mm maps a frame by one entry. */
static unsigned frame_level(const struct ctg_mm *mm)
{
	return mm->config.max_order == CTG_MAX_ORDER ? 2 : 1;
}

/* Back the slot of this level at vpn, which is RESERVED as a whole, with one frame. */
static int fill_whole(struct fill *fill, ctg_vpn_t vpn, unsigned level)
{
	unsigned order = level * CTG_PAGEBLOCK_ORDER;
	ctg_pfn_t pfn;
	int ret = ctg_pte_split_to(fill->mm, vpn, level);

	if (ret == 0)
		ret = ctg_anon_alloc(fill->mm, order, order, fill->gfp, &pfn, &order);
	if (ret == 0)
		fill_map(fill, vpn, pfn, order, level);
	return ret;
}

/* The largest order of which 2^order pages of [vpn, vpn + nr) are RESERVED alike, at level 0. */
static unsigned reserved_order(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, vpn + nr);
	uint64_t first = 0, alike = 0;
	unsigned order = 0;

	while (ctg_pte_walk_next(&walk)) {
		if (alike == 0)
			first = walk.ref.entry;
		if (walk.ref.entry != first) {
			ctg_pte_walk_stop(&walk);
			break;
		}
		alike++;
	}
	while (order + 1 < CTG_PAGEBLOCK_ORDER && (uint64_t)2 << order <= alike)
		order++;
	return order;
}

/* Back the page at vpn and some of those that follow, nr at most, with a run of small frames. */
static int fill_small(struct fill *fill, ctg_vpn_t vpn, uint64_t nr, uint64_t *done)
{
	unsigned order;
	ctg_pfn_t pfn;
	int ret = ctg_pte_split_to(fill->mm, vpn, 0);

	if (ret != 0)
		return ret;
	ret = ctg_anon_alloc(
		fill->mm, reserved_order(fill->mm, vpn, nr), 0, fill->gfp, &pfn, &order);
	if (ret != 0)
		return ret;
	ctg_anon_split(fill->mm->ctg, pfn, order);
	*done = (uint64_t)1 << order;
	fill_map(fill, vpn, pfn, order, 0);
	return 0;
}

/*
 * Back at least the page at vpn, which is RESERVED by an entry of this level, and at most all up to
 * end: *done pages of them.
 */
static int fill_some(
	struct fill *fill, ctg_vpn_t vpn, ctg_vpn_t end, unsigned level, uint64_t *done)
{
	ctg_vpn_t slot_end = (vpn | (CTG_PAGEBLOCK_FRAMES - 1)) + 1;
	int ret = -CTG_ENOMEM;

	if (level > frame_level(fill->mm))
		level = frame_level(fill->mm);
	for (; level != 0; level--) {
		*done = ctg_level_pages(level);
		if ((vpn & (*done - 1)) != 0 || *done > end - vpn)
			continue;
		ret = fill_whole(fill, vpn, level);
		if (ret == 0)
			return 0;
	}
	if (fill->mm->config.map_order != 0)
		return ret;
	return fill_small(fill, vpn, (slot_end < end ? slot_end : end) - vpn, done);
}

/* Pages that populate backs before it lets others take mm->lock. */
#define FILL_PAGES 4096

/* ---- populate -------------------------------------------------------------------------------- */

static uint64_t present_pages(const struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end)
{
	uint64_t nr = 0;

	while (vpn < end) {
		unsigned level;
		bool present = (ctg_pte_read(mm, vpn, &level) & CTG_PTE_PRESENT) != 0;
		ctg_vpn_t next = (vpn | (ctg_level_pages(level) - 1)) + 1;

		if (next > end)
			next = end;
		nr += present ? next - vpn : 0;
		vpn = next;
	}
	return nr;
}

/* mm->lock is held, and let go now and then so that faults elsewhere do not wait for all of it. */
static int fill_range(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct fill fill = {.mm = mm, .gfp = CTG_GFP_ZERO};
	ctg_vpn_t pause = vpn + FILL_PAGES;
	bool hole = false;
	int ret = 0;

	while (ret == 0 && fill.error == 0 && vpn < end) {
		unsigned level;
		uint64_t entry = ctg_pte_read(mm, vpn, &level);
		uint64_t done = ctg_level_pages(level) - (vpn & (ctg_level_pages(level) - 1));

		if ((entry & CTG_PTE_RESERVED) != 0)
			ret = fill_some(&fill, vpn, end, level, &done);
		hole = hole || entry == 0;
		vpn += done < end - vpn ? done : end - vpn;
		if (vpn >= pause) {
			/* Nothing is pending then: whatever others change, the next look sees. */
			fill_install(&fill);
			ctg_unlock(port, &mm->lock);
			ctg_lock(port, &mm->lock);
			pause = vpn + FILL_PAGES;
		}
	}
	fill_install(&fill);
	if (fill.error != 0)
		return fill.error;
	return ret == 0 && hole ? -CTG_EFAULT : ret;
}

int ctg_mm_populate(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, uint64_t *nr_present)
{
	ctg_vpn_t end = vpn + nr;
	int ret;

	if (nr_present != NULL)
		*nr_present = 0;
	if (!ctg_mm_range_valid(mm, vpn, nr))
		return -CTG_EINVAL;
	ctg_lock(&mm->ctg->port, &mm->lock);
	ret = fill_range(mm, vpn, end);
	if (ret != 0) /* tables that were made for frames that did not come */
		ctg_pte_prune(mm, vpn, end);
	if (nr_present != NULL)
		*nr_present = present_pages(mm, vpn, end);
	ctg_unlock(&mm->ctg->port, &mm->lock);
	return ret;
}

/* ---- faults ---------------------------------------------------------------------------------- */

/*
 * The largest frame that suits: a large one if the slot has nothing yet, else one page. mm->lock
 * held; the page is RESERVED.
 */
static int fault_fill(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned level, unsigned gfp)
{
	struct fill fill = {.mm = mm, .gfp = CTG_GFP_ZERO | gfp};
	ctg_vpn_t slot = vpn & ~(CTG_PAGEBLOCK_FRAMES - 1);
	uint64_t done;
	int ret = -CTG_ENOMEM;

	if (level > frame_level(mm))
		level = frame_level(mm);
	for (; ret != 0 && level != 0; level--)
		ret = fill_whole(&fill, vpn & ~(ctg_level_pages(level) - 1), level);
	if (ret != 0 && mm->config.map_order == 0)
		ret = fill_small(&fill, vpn, 1, &done);
	fill_install(&fill);
	if (ret == 0)
		ret = fill.error;
	if (ret != 0)
		ctg_pte_prune(mm, slot, slot + CTG_PAGEBLOCK_FRAMES);
	return ret;
}

static bool access_allowed(uint64_t entry, bool write)
{
	return (entry & (write ? CTG_PTE_WRITE : CTG_PTE_READ)) != 0;
}

/* -EAGAIN: a migration is copying the page, and mm->moved was *moved before that was seen. */
static int fault_once(struct ctg_mm *mm, ctg_vpn_t vpn, bool write, uint32_t *moved)
{
	unsigned level;
	uint64_t entry;
	int ret = 0;

	*moved = ctg_load32_acquire(&mm->moved);
	entry = ctg_pte_read(mm, vpn, &level);
	if ((entry & CTG_PTE_PRESENT) != 0 && access_allowed(entry, write)) {
		if (!write || (entry & (CTG_PTE_MOVING | CTG_PTE_COW)) == 0)
			return 0;
		if ((entry & CTG_PTE_MOVING) != 0)
			return -CTG_EAGAIN;
	}
	ctg_lock(&mm->ctg->port, &mm->lock);
	*moved = ctg_load32_acquire(&mm->moved);
	entry = ctg_pte_read(mm, vpn, &level);
	if (!access_allowed(entry, write))
		ret = -CTG_EFAULT;
	else if ((entry & CTG_PTE_RESERVED) != 0)
		ret = fault_fill(mm, vpn, level, 0);
	else if (write && (entry & CTG_PTE_MOVING) != 0)
		ret = -CTG_EAGAIN;
	else if (write && (entry & CTG_PTE_COW) != 0)
		ret = ctg_cow_break(mm, vpn, 0);
	ctg_unlock(&mm->ctg->port, &mm->lock);
	return ret;
}

int ctg_handle_fault(struct ctg_mm *mm, ctg_vpn_t vpn, bool write)
{
	const struct ctg_port *port;
	bool waited = false;
	uint32_t moved;
	int ret;

	if (mm == NULL || vpn >= CTG_MM_MAX_VPN)
		return -CTG_EFAULT;
	port = &mm->ctg->port;
	ctg_count(&mm->ctg->counters.faults, 1);
	while ((ret = fault_once(mm, vpn, write, &moved)) == -CTG_EAGAIN) {
		if (!waited)
			ctg_count(&mm->ctg->counters.faults_waited, 1);
		waited = true;
		/* The migration clears MOVING, then raises mm->moved. */
		ret = port->wait(port->host, &mm->moved, moved, CTG_NO_DEADLINE, true);
		if (ret == -CTG_EINTR)
			break;
	}
	return ret;
}

int ctg_fault_in(struct ctg_mm *mm, ctg_vpn_t vpn, bool longterm)
{
	const struct ctg_port *port = &mm->ctg->port;
	unsigned level;
	uint64_t entry;
	int ret = 0;

	ctg_lock(port, &mm->lock);
	entry = ctg_pte_read(mm, vpn, &level);
	if (!access_allowed(entry, false))
		ret = -CTG_EFAULT;
	else if ((entry & CTG_PTE_RESERVED) != 0)
		ret = fault_fill(mm, vpn, level, longterm ? CTG_GFP_NO_CMA | CTG_GFP_SPILL : 0);
	ctg_unlock(port, &mm->lock);
	return ret;
}
