/* SPDX-License-Identifier: MIT */
/*
 * Moving a batch of frames: what migrate.c, which decides what moves, asks of move.c, which moves
 * it.
 */
#ifndef CTG_MOVE_H
#define CTG_MOVE_H

#include "pgtable.h"

/* Pages of one batch, for a port that does not say. */
#define CTG_MIGRATE_BATCH_PAGES 1024u

enum ctg_move_state {
	CTG_MOVE_NONE,     /* none of its entries is MOVING */
	CTG_MOVE_MARKED,   /* its entries are MOVING */
	CTG_MOVE_DOOMED,   /* so they are still, but it will not move this time */
	CTG_MOVE_SWITCHED, /* frozen; the entries say where it has gone */
};

/* A frame to move, by its head. */
struct ctg_move {
	struct ctg_anon *anon;
	ctg_vpn_t vpn;
	ctg_pfn_t src;
	/*
	 * Which address spaces of the family had entries for it when it was marked: bit i the ith
	 * of the list, bit 63 any from there on. These are told about the mapping.
	 */
	uint64_t members;
	uint64_t seen;    /* the source's word that freezing met */
	ctg_pfn_t whole;  /* a large or huge frame's destination, if that is one; else none */
	uint32_t first;   /* its first page in dst[] */
	uint32_t entries; /* found when it was marked */
	uint8_t state;
	bool large;      /* order 9 */
	bool huge;       /* order 18, moves whole or not at all; if neither, order 0 */
	bool restricted; /* the port holds writers back */
};

struct ctg_moves {
	struct ctg *ctg;
	struct ctg_zone *zone; /* of the sources */
	size_t bytes;
	/* Set by the caller before ctg_moves_run. */
	unsigned gfp; /* of the destinations */
	unsigned
		gfp_honoured; /* what address spaces may add: CTG_GFP_NO_CMA, CTG_GFP_NO_ORDINARY */
	bool partial;         /* move what there is room for, rather than all or nothing */
	bool whole;           /* do not take large frames to pieces */
	bool last_look;       /* what does not move now decides: then copy nothing more */
	/* What came of it. */
	int error; /* -EBUSY: some did not move; -ENOMEM: for want of memory; 0 */
	uint64_t frames_moved;
	struct ctg_migrate_stats *stats;
	/* The batch. */
	unsigned max_pages, nr_pages; /* of dst[] */
	uint64_t nr_frames;
	unsigned nr;
	struct ctg_move *move; /* by family, then vpn, once it runs */
	ctg_pfn_t *dst; /* by page: of those that are mapped; of a huge frame the head only */
	struct ctg_copy_run *run;
	struct ctg_vrange *range;
	/* The family that is being moved: locked, and its part of move[]. */
	struct ctg_anon *anon;
	unsigned from, to;
	unsigned nr_told; /* members whose ports have been asked to hold writers back */
	/* Members, as in ctg_move: the one whose port is asked, those where it has installed. */
	uint64_t installing, installed;
	int port_error;
};

/* A batch of up to max_pages pages out of a zone; NULL: no memory. No lock is held. */
struct ctg_moves *ctg_moves_alloc(
	struct ctg_zone *zone, unsigned max_pages, struct ctg_migrate_stats *stats);
void ctg_moves_free(struct ctg_moves *moves);

/*
 * Gather an anonymous frame, whose head's info the caller has seen: takes a plain reference.
 * 0; -ENOSPC: the batch is full; -EBUSY: somebody holds the frame otherwise than by mapping it, or
 * it is changing hands (recorded as ctg_moves_fail does).
 */
int ctg_moves_add(struct ctg_moves *moves, ctg_pfn_t pfn, uint32_t info);

/* Move what was gathered, and drop the references. The batch is empty again. */
void ctg_moves_run(struct ctg_moves *moves);

/* Record why nr frames, the first at pfn, could not be moved. */
void ctg_moves_fail(struct ctg_moves *moves, enum ctg_obstacle_kind kind, ctg_pfn_t pfn,
	uint64_t nr, uint64_t word, int error);

/* ---- between move.c, move_batch.c and move_room.c -------------------------------------------- */

#define CTG_MOVE_LARGE ((unsigned)CTG_PAGEBLOCK_FRAMES)
/* In dst[]: the page needs a destination and has none yet. No entry can say that frame. */
#define CTG_MOVE_WANTED (CTG_PFN_NONE - 1)
#define CTG_MOVE_REST 63u

/* Elements of dst[] that a move has. */
static inline unsigned ctg_move_pages(const struct ctg_move *m)
{
	return m->large ? CTG_MOVE_LARGE : 1;
}

/* Frames that one of them stands for. */
static inline uint64_t ctg_move_step(const struct ctg_move *m)
{
	return m->huge ? (uint64_t)1 << CTG_MAX_ORDER : 1;
}

static inline uint64_t ctg_move_frames(const struct ctg_move *m)
{
	return ctg_move_pages(m) * ctg_move_step(m);
}

/* The bit of the ith address space of a family. */
static inline uint64_t ctg_move_member(unsigned i)
{
	return (uint64_t)1 << (i < CTG_MOVE_REST ? i : CTG_MOVE_REST);
}

static inline struct ctg_frame *ctg_move_source(
	const struct ctg_moves *moves, const struct ctg_move *m)
{
	return ctg_zone_frame(moves->zone, m->src);
}

static inline uint64_t ctg_move_word(const struct ctg_moves *moves, const struct ctg_move *m)
{
	return ctg_load64_acquire(&ctg_move_source(moves, m)->word);
}

/* Is what is left of the batch not worth copying, because the range cannot be emptied any more? */
static inline bool ctg_moves_pointless(const struct ctg_moves *moves)
{
	if (moves->error == -CTG_ENOMEM)
		return !moves->partial;
	return moves->error != 0 && moves->last_look;
}

/*
 * By family and page, so that the port gets few and long ranges and consecutive pages get
 * consecutive frames. Gives each move its pages in dst[], which are none yet.
 */
void ctg_moves_sort(struct ctg_moves *moves);
/* ctg_moves_fail for a move, which is doomed if it was marked. `word` is what its source said. */
void ctg_move_fail(struct ctg_moves *moves, struct ctg_move *m, enum ctg_obstacle_kind kind,
	uint64_t word, int error);
void ctg_move_no_memory(struct ctg_moves *moves, struct ctg_move *m);

/*
 * Destinations for the pages of dst[] that are wanted by the marked moves of the family, each held
 * by a reference. Moves that get none are doomed. No table is locked.
 */
void ctg_moves_get(struct ctg_moves *moves);
/*
 * Drop the references on a move's destinations: what no entry says is free then. The pages that had
 * one, or wanted one, are left without, or wanting one.
 */
void ctg_move_put(struct ctg_moves *moves, struct ctg_move *m, bool wanting);
/* Give back the tables that were not needed. */
void ctg_moves_put_tables(struct ctg_moves *moves);

#endif
