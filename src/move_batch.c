/* SPDX-License-Identifier: MIT */
/*
 * A batch of frames to move: gathered with a reference each, and put in order.
 */
#include "move.h"

/* ---- the batch --------------------------------------------------------------------------- */

struct ctg_moves *ctg_moves_alloc(
	struct ctg_zone *zone, unsigned max_pages, struct ctg_migrate_stats *stats)
{
	const struct ctg_port *port = &zone->ctg->port;
	size_t page_bytes = sizeof(struct ctg_move) + sizeof(ctg_pfn_t) +
			    sizeof(struct ctg_copy_run) + sizeof(struct ctg_vrange);
	size_t bytes = sizeof(struct ctg_moves) + max_pages * page_bytes;
	struct ctg_moves *b = port->meta_alloc(port->host, bytes, 64);

	CTG_ASSERT(max_pages != 0);
	if (b == NULL)
		return NULL;
	b->ctg = zone->ctg;
	b->zone = zone;
	b->bytes = bytes;
	b->stats = stats;
	b->max_pages = max_pages;
	b->move = (struct ctg_move *)(void *)(b + 1);
	b->run = (struct ctg_copy_run *)(void *)(b->move + max_pages);
	b->range = (struct ctg_vrange *)(void *)(b->run + max_pages);
	b->dst = (ctg_pfn_t *)(void *)(b->range + max_pages);
	return b;
}

void ctg_moves_free(struct ctg_moves *b)
{
	if (b == NULL)
		return;
	CTG_ASSERT(b->nr == 0);
	b->ctg->port.meta_free(b->ctg->port.host, b, b->bytes);
}

void ctg_moves_fail(struct ctg_moves *b, enum ctg_obstacle_kind kind, ctg_pfn_t pfn, uint64_t nr,
	uint64_t word, int error)
{
	b->stats->obstacle = kind;
	b->stats->obstacle_pfn = pfn;
	b->stats->obstacle_word = word;
	ctg_count(&b->ctg->counters.migrate_fail, nr);
	if (b->error != -CTG_ENOMEM)
		b->error = error;
}

void ctg_move_fail(struct ctg_moves *b, struct ctg_move *m, enum ctg_obstacle_kind kind,
	uint64_t word, int error)
{
	ctg_moves_fail(b, kind, m->src, ctg_move_frames(m), word, error);
	if (m->state == CTG_MOVE_MARKED)
		m->state = CTG_MOVE_DOOMED;
}

void ctg_move_no_memory(struct ctg_moves *b, struct ctg_move *m)
{
	ctg_move_fail(b, m, CTG_OBSTACLE_NO_MEMORY, ctg_move_word(b, m), -CTG_ENOMEM);
}

int ctg_moves_add(struct ctg_moves *b, ctg_pfn_t pfn, uint32_t info)
{
	struct ctg_frame *frame = ctg_zone_frame(b->zone, pfn);
	uint64_t nr = (uint64_t)1 << ctg_info_order(info);
	bool large = ctg_info_order(info) == CTG_PAGEBLOCK_ORDER;
	bool huge = ctg_info_order(info) == CTG_MAX_ORDER;
	unsigned pages = large ? CTG_MOVE_LARGE : 1;
	uint64_t word = ctg_load64_relaxed(&frame->word);
	enum ctg_obstacle_kind kind = ctg_word_obstacle(word, ctg_word_map(word), 0);

	CTG_ASSERT(large || huge || nr == 1);
	if (b->nr_pages + pages > b->max_pages)
		return -CTG_ENOSPC;
	if (kind == CTG_OBSTACLE_NONE && ctg_frame_tryget(frame) != 0)
		kind = CTG_OBSTACLE_REF;
	if (kind != CTG_OBSTACLE_NONE) {
		ctg_moves_fail(b, kind, pfn, nr, word, -CTG_EBUSY);
		return -CTG_EBUSY;
	}
	/* It may have been freed and used again since the caller looked. Now it stays. */
	if (ctg_load32_acquire(&frame->info) != info) {
		ctg_frame_put(b->ctg, pfn, CTG_WORD_REF1, 1);
		ctg_moves_fail(b, CTG_OBSTACLE_REF, pfn, nr, word, -CTG_EBUSY);
		return -CTG_EBUSY;
	}
	b->move[b->nr++] = (struct ctg_move){.anon = frame->anon,
		.vpn = frame->index,
		.src = pfn,
		.whole = CTG_PFN_NONE,
		.large = large,
		.huge = huge};
	b->nr_pages += pages;
	b->nr_frames += nr;
	return 0;
}

/* ---- order ------------------------------------------------------------------------------- */

static bool move_before(const struct ctg_move *a, const struct ctg_move *b)
{
	if (a->anon != b->anon)
		return (uintptr_t)a->anon < (uintptr_t)b->anon;
	return a->vpn < b->vpn;
}

static void sift_down(struct ctg_move *heap, unsigned at, unsigned nr)
{
	struct ctg_move m = heap[at];
	unsigned child;

	while ((child = 2 * at + 1) < nr) {
		if (child + 1 < nr && move_before(&heap[child], &heap[child + 1]))
			child++;
		if (!move_before(&m, &heap[child]))
			break;
		heap[at] = heap[child];
		at = child;
	}
	heap[at] = m;
}

/* As a rule frames lie as their pages do and there is nothing to sort. */
void ctg_moves_sort(struct ctg_moves *b)
{
	struct ctg_move *move = b->move;
	unsigned sorted = 1, page = 0;

	while (sorted < b->nr && !move_before(&move[sorted], &move[sorted - 1]))
		sorted++;
	if (sorted < b->nr) {
		for (unsigned at = b->nr / 2; at-- > 0;)
			sift_down(move, at, b->nr);
		for (unsigned nr = b->nr - 1; nr > 0; nr--) {
			struct ctg_move last = move[nr];

			move[nr] = move[0];
			move[0] = last;
			sift_down(move, 0, nr);
		}
	}
	for (unsigned i = 0; i < b->nr; i++) {
		move[i].first = page;
		page += ctg_move_pages(&move[i]);
	}
	for (unsigned i = 0; i < page; i++)
		b->dst[i] = CTG_PFN_NONE;
}
