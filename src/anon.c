/* SPDX-License-Identifier: MIT */
/*
 * An address space's own frames: allocated and charged, then owned, then mapped.
 */
#include "pgtable.h"

int ctg_anon_alloc(struct ctg_mm *mm, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order)
{
	struct ctg_group *group = mm->config.group;
	int ret;

	/* What may not be lent at all outweighs what its mm would rather have. */
	gfp |= mm->config.gfp | CTG_GFP_MOVABLE;
	if ((gfp & CTG_GFP_NO_CMA) != 0)
		gfp &= ~(unsigned)CTG_GFP_NO_ORDINARY;

	/* Charged first: nobody sees frames that a group was not asked for. */
	while ((ret = ctg_group_charge(group, (uint64_t)1 << max_order)) != 0) {
		if (max_order == min_order)
			return ret;
		max_order--;
	}
	ret = ctg_alloc_run(mm->ctg, max_order, min_order, gfp, pfn, order);
	if (ret != 0) {
		ctg_group_uncharge(group, (uint64_t)1 << max_order);
		return ret;
	}
	ctg_group_uncharge(group, ((uint64_t)1 << max_order) - ((uint64_t)1 << *order));
	ctg_frame_of(mm->ctg, *pfn)->group = ctg_group_index(group);
	return 0;
}

void ctg_anon_split(struct ctg *ctg, ctg_pfn_t pfn, unsigned order)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);

	if (order == 0)
		return;
	for (uint64_t i = 1; i < (uint64_t)1 << order; i++)
		frame[i].group = frame->group;
	ctg_split_used(ctg, pfn, order);
}

/* The frame's only holder is the allocation's reference, or a stranger's glance. */
void ctg_anon_own(struct ctg *ctg, struct ctg_anon *anon, ctg_pfn_t pfn, ctg_vpn_t vpn)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);
	uint32_t info = ctg_load32_relaxed(&frame->info);

	frame->anon = anon;
	frame->index = vpn;
	ctg_store32_release(
		&frame->info, CTG_INFO(CTG_FRAME_ANON, ctg_info_order(info), ctg_info_mt(info), 0));
}

/* A migration that sees the count under the table's lock sees the entry too. */
void ctg_anon_map(struct ctg *ctg, ctg_pfn_t pfn)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);
	uint64_t word = ctg_add64_acq_rel(&frame->word, CTG_WORD_MAP1 - CTG_WORD_REF1);

	CTG_ASSERT(!ctg_word_frozen(word) && ctg_word_ref(word) != 0 && ctg_word_map(word) == 0);
	/* Somebody sleeps until a reference leaves: one has. */
	if ((word & CTG_WORD_WAITERS) != 0) {
		ctg_and64_acq_rel(&frame->word, ~CTG_WORD_WAITERS);
		ctg_frame_wake(ctg, pfn);
	}
}
