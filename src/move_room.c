/* SPDX-License-Identifier: MIT */
/*
 * Room for a batch of frames: destinations, and tables for large frames that go in pieces.
 */
#include "move.h"

/*
 * The largest block that small frames come from. It keeps them out of memory that maps nothing
 * smaller than order 9.
 */
#define SMALL_RUN_ORDER (CTG_PAGEBLOCK_ORDER - 1)

static unsigned family_gfp(const struct ctg_moves *b)
{
	unsigned gfp = b->gfp;

	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next)
		gfp |= mm->config.gfp & b->gfp_honoured;
	return gfp;
}

static bool family_maps_small(const struct ctg_moves *b)
{
	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next)
		if (mm->config.map_order != 0)
			return false;
	return true;
}

static bool get_whole(struct ctg_moves *b, struct ctg_move *m, unsigned gfp)
{
	unsigned order = m->huge ? CTG_MAX_ORDER : CTG_PAGEBLOCK_ORDER;

	if (ctg_alloc_run(b->ctg, order, order, gfp, &m->whole, &order) != 0) {
		m->whole = CTG_PFN_NONE;
		return false;
	}
	for (unsigned page = 0; page < ctg_move_pages(m); page++)
		if (b->dst[m->first + page] == CTG_MOVE_WANTED)
			b->dst[m->first + page] = m->whole + page;
	return true;
}

/* A table in place of each large entry that is about to be taken to pieces. No table is locked. */
static bool get_tables(struct ctg_moves *b, const struct ctg_move *m)
{
	unsigned member = 0;

	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next, member++) {
		struct ctg_table *table;
		unsigned level;

		/* Large entries may be split meanwhile but do not come into being. */
		if ((m->members & ctg_move_member(member)) == 0)
			continue;
		ctg_pte_read(mm, m->vpn, &level);
		if (level != 1)
			continue;
		table = ctg_table_alloc(mm, 0);
		if (table == NULL)
			return false;
		table->next = mm->pieces;
		mm->pieces = table;
	}
	return true;
}

void ctg_moves_put_tables(struct ctg_moves *b)
{
	for (struct ctg_mm *mm = b->anon->mms; mm != NULL; mm = mm->family_next)
		while (mm->pieces != NULL) {
			struct ctg_table *table = mm->pieces;

			mm->pieces = table->next;
			ctg_table_free(mm, table);
		}
}

static unsigned pages_wanted(const struct ctg_moves *b, const struct ctg_move *m)
{
	unsigned nr = 0;

	for (unsigned page = 0; page < ctg_move_pages(m); page++)
		nr += b->dst[m->first + page] == CTG_MOVE_WANTED;
	return nr;
}

/*
 * A large frame goes to a large one if it can: as a whole it is cheaper, also for who uses it. One
 * that is only partly mapped any more would waste the rest, so that goes in pieces first.
 */
static void get_large(struct ctg_moves *b, struct ctg_move *m, unsigned gfp, bool small)
{
	bool may_split = small && !b->whole;

	if ((!may_split || pages_wanted(b, m) == CTG_MOVE_LARGE) && get_whole(b, m, gfp))
		return;
	/* In pieces, then: what get_small finds. */
	if (!may_split || !get_tables(b, m))
		ctg_move_no_memory(b, m);
}

static unsigned run_order(unsigned wanted)
{
	unsigned order = 31 - (unsigned)__builtin_clz(wanted);

	return order < SMALL_RUN_ORDER ? order : SMALL_RUN_ORDER;
}

/* Small destinations, in the largest runs that there are. Some pages may stay without. */
static void get_small(struct ctg_moves *b, unsigned gfp)
{
	unsigned wanted = 0;
	ctg_pfn_t pfn = 0;
	uint64_t left = 0;

	for (unsigned i = b->from; i < b->to; i++)
		if (b->move[i].state == CTG_MOVE_MARKED)
			wanted += pages_wanted(b, &b->move[i]);
	for (unsigned i = b->from; i < b->to && wanted != 0; i++) {
		struct ctg_move *m = &b->move[i];
		ctg_pfn_t *dst = &b->dst[m->first];

		if (m->state != CTG_MOVE_MARKED)
			continue;
		for (unsigned page = 0; page < ctg_move_pages(m); page++) {
			unsigned order = run_order(wanted);

			if (dst[page] != CTG_MOVE_WANTED)
				continue;
			if (left == 0) {
				if (ctg_alloc_run(b->ctg, order, 0, gfp, &pfn, &order) != 0)
					return;
				ctg_split_used(b->ctg, pfn, order);
				left = (uint64_t)1 << order;
			}
			dst[page] = pfn++;
			left--;
			if (--wanted == 0)
				break;
		}
	}
	CTG_ASSERT(left == 0);
}

void ctg_move_put(struct ctg_moves *b, struct ctg_move *m, bool wanting)
{
	if (m->whole != CTG_PFN_NONE)
		ctg_frame_put(b->ctg, m->whole, CTG_WORD_REF1, 1);
	for (unsigned page = 0; page < ctg_move_pages(m); page++) {
		ctg_pfn_t *dst = &b->dst[m->first + page];

		if (*dst == CTG_PFN_NONE)
			continue;
		if (*dst != CTG_MOVE_WANTED && m->whole == CTG_PFN_NONE)
			ctg_frame_put(b->ctg, *dst, CTG_WORD_REF1, 1);
		*dst = wanting ? CTG_MOVE_WANTED : CTG_PFN_NONE;
	}
	m->whole = CTG_PFN_NONE;
}

void ctg_moves_get(struct ctg_moves *b)
{
	bool small = family_maps_small(b);
	unsigned gfp = family_gfp(b);

	for (unsigned i = b->from; i < b->to; i++) {
		struct ctg_move *m = &b->move[i];

		if (m->state != CTG_MOVE_MARKED)
			continue;
		if (m->large)
			get_large(b, m, gfp, small);
		else if (m->huge && !get_whole(b, m, gfp))
			ctg_move_no_memory(b, m);
	}
	get_small(b, gfp);
	for (unsigned i = b->from; i < b->to; i++) {
		struct ctg_move *m = &b->move[i];

		if (m->state != CTG_MOVE_MARKED || pages_wanted(b, m) == 0)
			continue;
		ctg_move_put(b, m, true);
		if (!m->large || !get_whole(b, m, gfp))
			ctg_move_no_memory(b, m);
	}
	for (unsigned i = b->from; i < b->to && ctg_moves_pointless(b); i++)
		if (b->move[i].state == CTG_MOVE_MARKED)
			b->move[i].state = CTG_MOVE_DOOMED;
}
