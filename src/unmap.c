/* SPDX-License-Identifier: MIT */
/*
 * Unmap batches: entries that are cleared, of frames that stay counted as mapped until no CPU can
 * reach them any more.
 */
#include "pgtable.h"

void ctg_batch_init(struct ctg_mm *mm)
{
	struct ctg *ctg = mm->ctg;
	struct ctg_batch *batch = &mm->batch;

	batch->mm = mm;
	ctg_lock(&ctg->port, &ctg->batches_lock);
	batch->next = ctg->batches;
	batch->link = &ctg->batches;
	if (batch->next != NULL)
		batch->next->link = &batch->next;
	ctg->batches = batch;
	ctg_unlock(&ctg->port, &ctg->batches_lock);
}

void ctg_batch_destroy(struct ctg_mm *mm)
{
	struct ctg *ctg = mm->ctg;
	struct ctg_batch *batch = &mm->batch;

	ctg_batch_flush(batch, false);
	/* Those who flush for others hold this lock while they do. */
	ctg_lock(&ctg->port, &ctg->batches_lock);
	*batch->link = batch->next;
	if (batch->next != NULL)
		batch->next->link = batch->link;
	ctg_unlock(&ctg->port, &ctg->batches_lock);
	batch->link = NULL;
	CTG_ASSERT(batch->nr_runs == 0);
}

/* The pages of the batch as the port wants them: sorted, and neighbours merged. */
static size_t batch_ranges(const struct ctg_batch *batch, struct ctg_vrange *ranges)
{
	size_t nr = 0, merged = 0;

	for (unsigned i = 0; i < batch->nr_runs; i++) {
		struct ctg_vrange range = {batch->run[i].vpn, batch->run[i].nr};
		size_t at = nr++;

		/* Runs come from ascending walks: this moves nothing, as a rule. */
		for (; at > 0 && ranges[at - 1].vpn > range.vpn; at--)
			ranges[at] = ranges[at - 1];
		ranges[at] = range;
	}
	for (size_t i = 1; i < nr; i++) {
		struct ctg_vrange *last = &ranges[merged];

		CTG_ASSERT(last->vpn + last->nr <= ranges[i].vpn);
		if (last->vpn + last->nr == ranges[i].vpn)
			last->nr += ranges[i].nr;
		else
			ranges[++merged] = ranges[i];
	}
	return nr == 0 ? 0 : merged + 1;
}

/* Drop the mappings that a run counts: one a page, those of one frame at once. */
static void put_run(struct ctg *ctg, const struct ctg_batch_run *run)
{
	uint64_t done = 0;

	if (run->large) {
		ctg_frame_put(ctg, ctg_frame_head(ctg, run->pfn), CTG_WORD_MAP1, 1);
		return;
	}
	while (done < run->nr) {
		ctg_pfn_t head = ctg_frame_head(ctg, run->pfn + done);
		uint32_t nr = 1;

		/* Until the last of them is dropped the frame stays what it is. */
		while (done + nr < run->nr && ctg_frame_head(ctg, run->pfn + done + nr) == head)
			nr++;
		ctg_frame_put(ctg, head, CTG_WORD_MAP1, nr);
		done += nr;
	}
}

/* batch->lock held. */
static void flush_locked(struct ctg_batch *batch)
{
	struct ctg *ctg = batch->mm->ctg;
	struct ctg_vrange ranges[CTG_BATCH_RUNS];

	if (batch->nr_runs == 0)
		return;
	if (!batch->dead) {
		size_t nr = batch_ranges(batch, ranges);

		/* An invalidation cannot fail. */
		ctg->port.tlb_restrict(ctg->port.host, batch->mm, ranges, nr, CTG_TLB_INVALIDATE);
	}
	for (unsigned i = 0; i < batch->nr_runs; i++)
		put_run(ctg, &batch->run[i]);
	batch->nr_runs = 0;
	batch->nr_pages = 0;
}

static uint64_t frame_size(struct ctg *ctg, ctg_pfn_t head)
{
	return (uint64_t)1 << ctg_info_order(ctg_load32_acquire(&ctg_frame_of(ctg, head)->info));
}

static bool batch_holds(const struct ctg_batch *batch, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg *ctg = batch->mm->ctg;

	for (unsigned i = 0; i < batch->nr_runs; i++) {
		const struct ctg_batch_run *run = &batch->run[i];
		/*
		 * A piece of a large frame counts on the head, which may be the one that is asked
		 * for. It is still counted, so the heads are there.
		 */
		ctg_pfn_t first = run->pfn, last = run->pfn + run->nr - 1;

		if (nr == 0)
			return true;
		first = ctg_frame_head(ctg, first);
		last = ctg_frame_head(ctg, last);
		last += frame_size(ctg, last) - 1;
		if (first < pfn + nr && last >= pfn)
			return true;
	}
	return false;
}

void ctg_batch_flush(struct ctg_batch *batch, bool helping)
{
	struct ctg *ctg = batch->mm->ctg;

	ctg_lock(&ctg->port, &batch->lock);
	if (helping && batch->nr_runs != 0)
		ctg_count(&ctg->counters.batches_helped, 1);
	flush_locked(batch);
	ctg_unlock(&ctg->port, &batch->lock);
}

void ctg_batches_flush(struct ctg *ctg, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_batch *batch;

	ctg_lock(&ctg->port, &ctg->batches_lock);
	for (batch = ctg->batches; batch != NULL; batch = batch->next) {
		ctg_lock(&ctg->port, &batch->lock);
		if (batch_holds(batch, pfn, nr)) {
			ctg_count(&ctg->counters.batches_helped, 1);
			flush_locked(batch);
		}
		ctg_unlock(&ctg->port, &batch->lock);
	}
	ctg_unlock(&ctg->port, &ctg->batches_lock);
}

bool ctg_batch_add(struct ctg_batch *batch, ctg_vpn_t vpn, ctg_pfn_t pfn, uint64_t nr, bool large)
{
	struct ctg_batch_run *last = NULL;

	/* One entry always fits, however large. */
	if (batch->nr_pages != 0 && batch->nr_pages + nr > CTG_BATCH_PAGES)
		return false;
	if (batch->nr_runs != 0)
		last = &batch->run[batch->nr_runs - 1];
	if (last != NULL && !large && !last->large && last->vpn + last->nr == vpn &&
		last->pfn + last->nr == pfn) {
		last->nr++;
	} else {
		if (batch->nr_runs == CTG_BATCH_RUNS)
			return false;
		batch->run[batch->nr_runs++] =
			(struct ctg_batch_run){.vpn = vpn, .pfn = pfn, .nr = nr, .large = large};
	}
	batch->nr_pages += nr;
	return true;
}

/* Clear entries into the batch until it is full: returns the page to go on with. */
static ctg_vpn_t unmap_some(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end, bool reserve)
{
	struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, end);

	while (ctg_pte_walk_next(&walk)) {
		uint64_t entry = walk.ref.entry;
		uint64_t left = reserve ? CTG_PTE_RESERVED | (entry & CTG_PTE_RIGHTS) : 0;

		if (entry == 0)
			continue;
		/* The edges have been split. */
		CTG_ASSERT(walk.nr == ctg_level_pages(walk.ref.level));
		if ((entry & CTG_PTE_PRESENT) != 0) {
			if (!ctg_batch_add(&mm->batch, walk.vpn, ctg_pte_pfn(entry), walk.nr,
				    walk.ref.level != 0)) {
				ctg_pte_walk_stop(&walk);
				return walk.vpn;
			}
			ctg_add64_relaxed(&mm->nr_present, -walk.nr);
		}
		ctg_pte_set(&walk.ref, left);
	}
	return end;
}

void ctg_unmap_range(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, bool reserve)
{
	const struct ctg_port *port = &mm->ctg->port;
	ctg_vpn_t end = vpn + nr;

	while (vpn < end) {
		/*
		 * Held over clear and add, so that a walk that misses the entry finds the mapping
		 * when it flushes the batch.
		 */
		ctg_lock(port, &mm->batch.lock);
		vpn = unmap_some(mm, vpn, end, reserve);
		ctg_unlock(port, &mm->batch.lock);
		ctg_batch_flush(&mm->batch, false);
	}
}
