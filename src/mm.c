/* SPDX-License-Identifier: MIT */
/*
 * Address spaces: what is mapped where, and with which rights.
 */
#include "pgtable.h"

static uint64_t prot_rights(unsigned prot)
{
	if ((prot & CTG_PROT_WRITE) != 0)
		return CTG_PTE_READ | CTG_PTE_WRITE;
	return (prot & CTG_PROT_READ) != 0 ? CTG_PTE_READ : 0;
}

static bool prot_valid(unsigned prot)
{
	return (prot & ~(unsigned)(CTG_PROT_READ | CTG_PROT_WRITE)) == 0;
}

static bool config_valid(const struct ctg *ctg, const struct ctg_mm_config *config)
{
	const unsigned only = CTG_GFP_NO_CMA | CTG_GFP_NO_ORDINARY;

	if ((config->gfp & ~(only | CTG_GFP_SPILL)) != 0 || (config->gfp & only) == only)
		return false;
	if (config->group != NULL && ctg_group_machine(config->group) != ctg)
		return false;
	if (config->max_order != 0 && config->max_order != CTG_PAGEBLOCK_ORDER &&
		config->max_order != CTG_MAX_ORDER)
		return false;
	return config->map_order == 0 || config->map_order == CTG_PAGEBLOCK_ORDER;
}

int ctg_mm_make(struct ctg *ctg, const struct ctg_mm_config *config, struct ctg_mm *relative,
	struct ctg_mm **out)
{
	const struct ctg_port *port = &ctg->port;
	struct ctg_mm *mm;
	int ret;

	if (!config_valid(ctg, config))
		return -CTG_EINVAL;
	mm = port->meta_alloc(port->host, sizeof(*mm), _Alignof(struct ctg_mm));
	if (mm == NULL)
		return -CTG_ENOMEM;
	mm->ctg = ctg;
	mm->config = *config;
	ret = ctg_pt_init(mm);
	if (ret != 0)
		goto free_mm;
	ret = ctg_anon_join(mm, relative);
	if (ret != 0)
		goto free_tables;
	ctg_group_join(config->group);
	ctg_batch_init(mm);
	*out = mm;
	return 0;

free_tables:
	ctg_pt_destroy(mm);
free_mm:
	port->meta_free(port->host, mm, sizeof(*mm));
	return ret;
}

int ctg_mm_create(struct ctg *ctg, const struct ctg_mm_config *config, struct ctg_mm **out)
{
	if (ctg == NULL || config == NULL || out == NULL)
		return -CTG_EINVAL;
	return ctg_mm_make(ctg, config, NULL, out);
}

void ctg_mm_destroy(struct ctg_mm *mm, bool dead)
{
	const struct ctg_vrange all = {0, CTG_MM_MAX_VPN};
	const struct ctg_port *port;

	if (mm == NULL)
		return;
	port = &mm->ctg->port;
	ctg_lock(port, &mm->lock);
	ctg_lock(port, &mm->batch.lock);
	mm->batch.dead = dead;
	ctg_unlock(port, &mm->batch.lock);
	ctg_notify_start(mm, &all, 1, CTG_NOTIFY_EXIT, true);
	ctg_unmap_range(mm, 0, CTG_MM_MAX_VPN, false);
	ctg_notify_end(mm);
	ctg_unlock(port, &mm->lock);
	CTG_ASSERT(ctg_load64_relaxed(&mm->nr_present) == 0);
	ctg_batch_destroy(mm);
	/* A walk of the family may be looking at the tables until this returns. */
	ctg_anon_leave(mm);
	ctg_notifiers_leave(mm);
	ctg_pins_leave(mm);
	ctg_pt_destroy(mm);
	ctg_group_leave(mm->config.group);
	port->meta_free(port->host, mm, sizeof(*mm));
}

void *ctg_mm_owner(const struct ctg_mm *mm)
{
	return mm->config.owner;
}

struct ctg *ctg_mm_machine(const struct ctg_mm *mm)
{
	return mm->ctg;
}

/* ---- ranges ---------------------------------------------------------------------------------- */

bool ctg_mm_range_valid(const struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	uint64_t mask = ((uint64_t)1 << (mm == NULL ? 0 : mm->config.map_order)) - 1;

	return mm != NULL && nr != 0 && vpn < CTG_MM_MAX_VPN && nr <= CTG_MM_MAX_VPN - vpn &&
	       ((vpn | nr) & mask) == 0;
}

/* The highest level at which an entry may begin at vpn. */
static unsigned level_from(ctg_vpn_t vpn)
{
	unsigned level = 2;

	while ((vpn & (ctg_level_pages(level) - 1)) != 0)
		level--;
	return level;
}

/* The highest level of an entry that begins at vpn and does not reach beyond end. */
static unsigned level_within(ctg_vpn_t vpn, ctg_vpn_t end)
{
	unsigned level = level_from(vpn);

	while (ctg_level_pages(level) > end - vpn)
		level--;
	return level;
}

static ctg_vpn_t next_slot(ctg_vpn_t vpn, ctg_vpn_t end, unsigned level)
{
	ctg_vpn_t next = (vpn | (ctg_level_pages(level) - 1)) + 1;

	return next < end ? next : end;
}

/* Make a boundary between two entries at vpn, unless nothing is mapped on both sides of it. */
static int split_at(struct ctg_mm *mm, ctg_vpn_t vpn)
{
	unsigned level;

	if (vpn == CTG_MM_MAX_VPN || ctg_pte_read(mm, vpn, &level) == 0)
		return 0;
	return level <= level_from(vpn) ? 0 : ctg_pte_split_to(mm, vpn, level_from(vpn));
}

/* So that no entry that is mapped crosses an edge. A split that was made stays made. */
static int split_edges(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end)
{
	int ret = split_at(mm, vpn);

	return ret != 0 ? ret : split_at(mm, end);
}

/* ---- mmap and munmap ------------------------------------------------------------------------- */

static bool range_empty(const struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end)
{
	unsigned level;

	for (; vpn < end; vpn = next_slot(vpn, end, level))
		if (ctg_pte_read(mm, vpn, &level) != 0)
			return false;
	return true;
}

/* The tables that it takes to say RESERVED with the largest entries. */
static int make_tables(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end)
{
	while (vpn < end) {
		unsigned level = level_within(vpn, end);
		int ret = ctg_pte_split_to(mm, vpn, level);

		if (ret != 0)
			return ret;
		/* One table holds all pages up to the next slot. */
		vpn = next_slot(vpn, end, level == 0 ? 1 : level);
	}
	return 0;
}

int ctg_mmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot)
{
	ctg_vpn_t end = vpn + nr;
	int ret = -CTG_EEXIST;

	if (!ctg_mm_range_valid(mm, vpn, nr) || !prot_valid(prot))
		return -CTG_EINVAL;
	ctg_lock(&mm->ctg->port, &mm->lock);
	if (range_empty(mm, vpn, end)) {
		ret = make_tables(mm, vpn, end);
		if (ret == 0) {
			struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, end);

			while (ctg_pte_walk_next(&walk))
				ctg_pte_set(&walk.ref, CTG_PTE_RESERVED | prot_rights(prot));
		}
		/* Takes back the tables after a failure, and fuses with neighbours after success.
		 */
		ctg_pte_prune(mm, vpn, end);
	}
	ctg_unlock(&mm->ctg->port, &mm->lock);
	return ret;
}

/* A split that was made for nothing is not seen by who looks pages up. */
static int unmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, bool reserve, bool blockable)
{
	const struct ctg_vrange range = {vpn, nr};
	ctg_vpn_t end = vpn + nr;
	int ret;

	if (!ctg_mm_range_valid(mm, vpn, nr))
		return -CTG_EINVAL;
	if (blockable)
		ctg_lock(&mm->ctg->port, &mm->lock);
	else if (!ctg_trylock(&mm->lock))
		return -CTG_EAGAIN;
	ret = split_edges(mm, vpn, end);
	if (ret == 0)
		ret = ctg_notify_start(mm, &range, 1, CTG_NOTIFY_UNMAP, blockable);
	if (ret == 0) {
		ctg_unmap_range(mm, vpn, nr, reserve);
		ctg_notify_end(mm);
	}
	ctg_pte_prune(mm, vpn, end);
	ctg_unlock(&mm->ctg->port, &mm->lock);
	return ret;
}

int ctg_munmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	return unmap(mm, vpn, nr, false, true);
}

int ctg_madvise_dontneed(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	return unmap(mm, vpn, nr, true, true);
}

int ctg_madvise_dontneed_nonblock(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	return unmap(mm, vpn, nr, true, false);
}

/* ---- mprotect -------------------------------------------------------------------------------- */

/* Rights as they were, to go back to when the port cannot widen the mapping. */
struct old_rights {
	ctg_vpn_t vpn;
	uint64_t nr;
	uint64_t rights;
};

struct protect {
	struct ctg_mm *mm;
	struct ctg_vrange range;
	uint64_t rights;
	bool narrows, widens; /* something that is PRESENT */
	size_t nr_old;
	struct old_rights one; /* as a rule, all of the range had the same */
	struct old_rights *old;
};

/*
 * Look at the range, and list its old rights if there is room for them: only holders of
 * mm->lock change rights, so what is seen stays. -ENOMEM: a hole.
 */
static int protect_survey(struct protect *p)
{
	ctg_vpn_t vpn = p->range.vpn, end = vpn + p->range.nr;
	struct old_rights run = {0};
	unsigned level;

	p->nr_old = 0;
	for (; vpn < end; vpn = next_slot(vpn, end, level)) {
		uint64_t entry = ctg_pte_read(p->mm, vpn, &level);
		uint64_t rights = entry & CTG_PTE_RIGHTS;

		if (entry == 0)
			return -CTG_ENOMEM;
		if ((entry & CTG_PTE_PRESENT) != 0) {
			p->narrows = p->narrows || (rights & ~p->rights) != 0;
			p->widens = p->widens || (p->rights & ~rights) != 0;
		}
		if (p->nr_old == 0 || run.rights != rights) {
			run = (struct old_rights){.vpn = vpn, .rights = rights};
			p->nr_old++;
		}
		run.nr = next_slot(vpn, end, level) - run.vpn;
		if (p->old != NULL)
			p->old[p->nr_old - 1] = run;
	}
	return 0;
}

void ctg_mm_set_rights(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end, uint64_t rights)
{
	struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, end);

	while (ctg_pte_walk_next(&walk)) {
		CTG_ASSERT(walk.ref.entry != 0 && walk.nr == ctg_level_pages(walk.ref.level));
		ctg_pte_set(&walk.ref, (walk.ref.entry & ~CTG_PTE_RIGHTS) | rights);
	}
}

/* The wider rights may have been looked up meanwhile: taking them back is narrowing. */
static void protect_undo(struct protect *p)
{
	const struct ctg_port *port = &p->mm->ctg->port;

	ctg_notify_start(p->mm, &p->range, 1, CTG_NOTIFY_PROTECT, true);
	for (size_t i = 0; i < p->nr_old; i++)
		ctg_mm_set_rights(
			p->mm, p->old[i].vpn, p->old[i].vpn + p->old[i].nr, p->old[i].rights);
	port->tlb_install(port->host, p->mm, &p->range, 1);
	ctg_notify_end(p->mm);
}

/* mm->lock held. The edges are split and the old rights listed: only the port can fail now. */
static int protect_apply(struct protect *p)
{
	const struct ctg_port *port = &p->mm->ctg->port;
	int ret;

	if (p->narrows)
		ctg_notify_start(p->mm, &p->range, 1, CTG_NOTIFY_PROTECT, true);
	ctg_mm_set_rights(p->mm, p->range.vpn, p->range.vpn + p->range.nr, p->rights);
	if (p->narrows)
		port->tlb_restrict(port->host, p->mm, &p->range, 1, CTG_TLB_INVALIDATE);
	ret = p->widens ? port->tlb_install(port->host, p->mm, &p->range, 1) : 0;
	if (p->narrows)
		ctg_notify_end(p->mm);
	if (ret != 0)
		protect_undo(p);
	return ret;
}

int ctg_mprotect(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot)
{
	struct protect p = {.mm = mm, .range = {vpn, nr}, .rights = prot_rights(prot)};
	const struct ctg_port *port;
	size_t bytes = 0;
	int ret;

	if (!ctg_mm_range_valid(mm, vpn, nr) || !prot_valid(prot))
		return -CTG_EINVAL;
	port = &mm->ctg->port;
	ctg_lock(port, &mm->lock);
	p.old = NULL;
	ret = protect_survey(&p);
	if (ret == 0)
		ret = split_edges(mm, vpn, vpn + nr);
	if (ret == 0) {
		p.old = &p.one;
		if (p.nr_old > 1) {
			bytes = p.nr_old * sizeof(*p.old);
			p.old = port->meta_alloc(port->host, bytes, _Alignof(struct old_rights));
		}
		if (p.old == NULL)
			ret = -CTG_ENOMEM;
	}
	if (ret == 0) {
		protect_survey(&p);
		ret = protect_apply(&p);
	}
	if (bytes != 0)
		port->meta_free(port->host, p.old, bytes);
	ctg_pte_prune(mm, vpn, vpn + nr);
	ctg_unlock(port, &mm->lock);
	return ret;
}

/* ---- what is there --------------------------------------------------------------------------- */

/* The bits of an entry in which the pages of a run agree. */
#define ALIKE (CTG_PTE_PRESENT | CTG_PTE_RESERVED | CTG_PTE_RIGHTS | CTG_PTE_MOVING | CTG_PTE_COW)

/* The frame of vpn, if the entry that governs it is PRESENT. */
static ctg_pfn_t page_pfn(uint64_t entry, ctg_vpn_t vpn, unsigned level)
{
	return ctg_pte_pfn(entry) + (vpn & (ctg_level_pages(level) - 1));
}

int ctg_mm_lookup(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t max_nr, struct ctg_mapping *out)
{
	ctg_vpn_t next, end;
	uint64_t first;
	unsigned level;

	if (mm == NULL || out == NULL || vpn >= CTG_MM_MAX_VPN || max_nr == 0)
		return -CTG_EINVAL;
	end = vpn + (max_nr < CTG_MM_MAX_VPN - vpn ? max_nr : CTG_MM_MAX_VPN - vpn);
	first = ctg_pte_read(mm, vpn, &level);
	*out = (struct ctg_mapping){.vpn = vpn,
		.pfn = CTG_PFN_NONE,
		.reserved = (first & CTG_PTE_RESERVED) != 0,
		.moving = (first & CTG_PTE_MOVING) != 0};
	if ((first & CTG_PTE_PRESENT) != 0) {
		out->pfn = page_pfn(first, vpn, level);
		if ((first & CTG_PTE_READ) != 0)
			out->prot |= CTG_PROT_READ;
		if ((first & CTG_PTE_WRITE) != 0 && (first & CTG_PTE_COW) == 0 && !out->moving)
			out->prot |= CTG_PROT_WRITE;
	}
	for (next = next_slot(vpn, end, level); next < end; next = next_slot(next, end, level)) {
		uint64_t entry = ctg_pte_read(mm, next, &level);

		if (((entry ^ first) & ALIKE) != 0)
			break;
		if (out->pfn != CTG_PFN_NONE &&
			page_pfn(entry, next, level) != out->pfn + (next - vpn))
			break;
	}
	out->nr = next - vpn;
	return 0;
}

void ctg_mm_mark_accessed(struct ctg_mm *mm, ctg_vpn_t vpn, bool dirty)
{
	if (vpn < CTG_MM_MAX_VPN)
		ctg_pte_mark(mm, vpn, dirty);
}

void ctg_mm_stat(struct ctg_mm *mm, struct ctg_mm_stat *out)
{
	ctg_pfn_t block = CTG_PFN_NONE;
	bool lent = false, spilled = false;
	ctg_vpn_t vpn, next;
	unsigned level;

	if (mm == NULL || out == NULL)
		return;
	*out = (struct ctg_mm_stat){.nr_tables = ctg_load64_relaxed(&mm->nr_tables)};
	/* Tables do not go away meanwhile, so the walk meets each page once. */
	ctg_lock(&mm->ctg->port, &mm->lock);
	for (vpn = 0; vpn < CTG_MM_MAX_VPN; vpn = next) {
		uint64_t entry = ctg_pte_read(mm, vpn, &level);
		ctg_pfn_t pfn = ctg_pte_pfn(entry);

		next = next_slot(vpn, CTG_MM_MAX_VPN, level);
		if ((entry & CTG_PTE_PRESENT) == 0)
			continue;
		if (pfn >> CTG_PAGEBLOCK_ORDER != block) {
			struct ctg_zone *zone = ctg_zone_of(mm->ctg, pfn);

			block = pfn >> CTG_PAGEBLOCK_ORDER;
			lent = ctg_hint_load(&ctg_zone_block(zone, pfn)->migratetype) ==
			       CTG_MIGRATE_CMA;
			spilled = (zone->flags & CTG_ZONE_SPILL) != 0;
		}
		out->nr_present += next - vpn;
		out->nr_lent += lent ? next - vpn : 0;
		out->nr_spilled += spilled ? next - vpn : 0;
	}
	ctg_unlock(&mm->ctg->port, &mm->lock);
}
