/* SPDX-License-Identifier: MIT */
/*
 * Long-term pins: out of lendable memory first.
 *
 * Nothing is held while a page moves, so two that pin one page do not stop each other for good: one
 * of them moves it, and the other, whose migration met the first one's reference, looks again.
 */
#include "gup.h"

/* Pages that are moved in one go: the migration's own batch. */
#define MOVE_PAGES 1024u
/* A pin may stay for ever: wait a little. Any other holder is about to leave. */
#define PIN_PATIENCE_NS 100000000u
#define PATIENCE_NS 1000000000u
/* Looks at holders that come and go, or that no event tells about. */
#define PATIENCE_LOOKS 4096

bool ctg_frame_lendable(const struct ctg_zone *zone, ctg_pfn_t head, unsigned order)
{
	ctg_pfn_t end = head + ((uint64_t)1 << order);

	for (ctg_pfn_t pfn = head; pfn < end; pfn += CTG_PAGEBLOCK_FRAMES) {
		const struct ctg_block *block = ctg_zone_block(zone, pfn);

		if (ctg_hint_load(&block->migratetype) == CTG_MIGRATE_CMA ||
			ctg_hint_load(&block->isolated_by) != NULL)
			return true;
	}
	return false;
}

/* The frames behind vpn and the pages after it, as far as they follow each other and are lendable.
 */
static struct ctg_extent lendable_run(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, struct ctg_zone **zone)
{
	struct ctg_extent run = {0};
	struct ctg_mapping m;

	if (ctg_mm_lookup(mm, vpn, nr < MOVE_PAGES ? nr : MOVE_PAGES, &m) != 0 ||
		m.pfn == CTG_PFN_NONE)
		return run;
	*zone = ctg_zone_of(mm->ctg, m.pfn);
	run.pfn = m.pfn;
	while (run.nr < m.nr && run.pfn + run.nr - (*zone)->base < (*zone)->nr) {
		ctg_pfn_t pfn = run.pfn + run.nr;
		uint64_t left = CTG_PAGEBLOCK_FRAMES - (pfn & (CTG_PAGEBLOCK_FRAMES - 1));

		if (!ctg_frame_lendable(*zone, pfn, 0))
			break;
		run.nr += left < m.nr - run.nr ? left : m.nr - run.nr;
	}
	return run;
}

/* Somebody holds the page. 0: it may have let go. */
static int wait_for_holder(struct ctg *ctg, const struct ctg_migrate_stats *stats, unsigned flags,
	struct ctg_patience *patience)
{
	const struct ctg_port *port = &ctg->port;
	uint64_t now = port->now(port->host), until;
	int ret;

	if ((flags & CTG_FOLL_NOWAIT) != 0)
		return -CTG_EAGAIN;
	if (patience->looks == 0)
		patience->begun = now;
	until = patience->begun +
		(stats->obstacle == CTG_OBSTACLE_PIN ? PIN_PATIENCE_NS : PATIENCE_NS);
	if (now >= until || patience->looks == PATIENCE_LOOKS)
		return -CTG_EBUSY;
	patience->looks++;
	if (stats->obstacle_pfn == CTG_PFN_NONE) {
		port->relax(port->host);
		return 0;
	}
	ret = ctg_frame_wait(ctg, stats->obstacle_pfn, stats->obstacle_word, until, true);
	return ret == -CTG_EINTR ? ret : 0;
}

int ctg_longterm_move(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags,
	struct ctg_patience *patience)
{
	struct ctg_migrate_stats stats;
	struct ctg_zone *zone = NULL;
	struct ctg_extent run = lendable_run(mm, vpn, nr, &zone);
	int ret;

	if (run.nr == 0)
		return 0;
	/*
	 * What becomes free is not isolated and may be used by others at once: they are not in
	 * anybody's way. Spill zones are for what has to leave an area, as this does.
	 */
	ret = ctg_migrate_range(zone, run.pfn, run.nr,
		CTG_GFP_MOVABLE | CTG_GFP_NO_CMA | CTG_GFP_SPILL, 1, NULL, &stats);
	if (ret != -CTG_EBUSY)
		return ret;
	/* Some of a run may have moved; the page that is wanted next decides. */
	if (lendable_run(mm, vpn, 1, &zone).pfn != run.pfn)
		return 0;
	return wait_for_holder(mm->ctg, &stats, flags, patience);
}
