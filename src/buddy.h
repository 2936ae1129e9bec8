/* SPDX-License-Identifier: MIT */
/*
 * What the files that keep free blocks share. zone->lock is held in all of these.
 *
 * Invariants, true whenever zone->lock is free:
 *
 *   - A frame is the head of a free block if and only if its info says FREE, and then it is on the
 *     free list of its order and type. The infos of all other frames of the block are TAIL.
 *   - The type in a free block's info is that of every pageblock it touches: ISOLATE where one is
 *     isolated, else block->migratetype. So a block of order >= 9 has one type, and a free block of
 *     type ISOLATE is never larger than a pageblock.
 *   - Two free buddies of one order and type are merged, unless that would break the line above.
 *   - block->nr_free, zone->nr_free and the tree of free runs agree with the lists.
 *
 * Linking and unlinking a block change the lists and zone->nr_free only. block->nr_free and the
 * tree change with the frames that really become free or cease to be (ctg_buddy_account), so that
 * splitting or merging a block of 1 GiB costs no more than its pieces.
 */
#ifndef CTG_BUDDY_H
#define CTG_BUDDY_H

#include "core.h"

static inline enum ctg_migratetype ctg_block_type(const struct ctg_block *block)
{
	return block->isolated_by != NULL ? CTG_MIGRATE_ISOLATE
					  : (enum ctg_migratetype)block->migratetype;
}

/* First frame of the pageblock of pfn. */
static inline ctg_pfn_t ctg_block_start(ctg_pfn_t pfn)
{
	return pfn & ~(CTG_PAGEBLOCK_FRAMES - 1);
}

/*
 * From a frame of a released pageblock to the next that may be a head. A TAIL may be of a block
 * that is changing hands, so it says nothing about its neighbours.
 */
static inline uint64_t ctg_info_step(uint32_t info)
{
	switch (ctg_info_state(info)) {
	case CTG_FRAME_FREE:
	case CTG_FRAME_USED:
	case CTG_FRAME_ANON:
		return (uint64_t)1 << ctg_info_order(info);
	default:
		return 1;
	}
}

void ctg_buddy_link(
	struct ctg_zone *zone, ctg_pfn_t pfn, unsigned order, enum ctg_migratetype mt, bool zeroed);
void ctg_buddy_unlink(struct ctg_zone *zone, ctg_pfn_t pfn, uint32_t info);
/* Link [from, to) as the fewest blocks, without merging: pieces of one block that was unlinked. */
void ctg_buddy_link_pieces(
	struct ctg_zone *zone, ctg_pfn_t from, ctg_pfn_t to, enum ctg_migratetype mt, bool zeroed);
/* Link a block, merged with its buddies of the same type. */
void ctg_buddy_merge(
	struct ctg_zone *zone, ctg_pfn_t pfn, unsigned order, enum ctg_migratetype mt, bool zeroed);
/* [pfn, pfn + nr) became free (or ceased to be): the pageblocks' counts and the tree. */
void ctg_buddy_account(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool freed);
/* The free block that contains pfn: its head, and its info. CTG_PFN_NONE: pfn is not free. */
ctg_pfn_t ctg_buddy_find(const struct ctg_zone *zone, ctg_pfn_t pfn, uint32_t *info);
/*
 * Take a block off the lists of one type, the smallest that suffices; the rest stays there.
 * Neither accounted for nor marked: its infos are TAIL. false: there is none.
 */
bool ctg_buddy_take(struct ctg_zone *zone, unsigned order, enum ctg_migratetype mt, ctg_pfn_t *pfn,
	bool *zeroed);
/* Free frames whose infos are TAIL. */
void ctg_buddy_free_locked(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed);

/*
 * isolate.c: move what is free of the pageblock at start to the lists of another type, splitting
 * a larger free block around it. The caller changes what ctg_block_type says.
 */
void ctg_block_move_free(struct ctg_zone *zone, ctg_pfn_t start, enum ctg_migratetype mt);

/* The types that a request takes without changing a pageblock's, in order; how many. */
unsigned ctg_gfp_types(unsigned gfp, enum ctg_migratetype types[2]);
/* Info of an allocated block's head. */
uint32_t ctg_used_info(const struct ctg_zone *zone, ctg_pfn_t pfn, unsigned order, unsigned gfp);

/* runs.c */
/* A node of the tree of free runs, in frames. */
struct ctg_run_node {
	uint32_t prefix, suffix, best;
	uint32_t dirty; /* something below has changed since the numbers were made */
};
uint64_t ctg_runs_nodes(uint64_t nr_blocks); /* nodes of the tree of a zone */
void ctg_runs_init(struct ctg_zone *zone);

#endif
