/* SPDX-License-Identifier: MIT */
/*
 * Page tables, address spaces, families and unmap batches: what mm.c, unmap.c, rmap.c and
 * migrate.c share.
 *
 * Entries
 *
 *   EMPTY     0                                   nothing may be here
 *   TABLE     TABLE | pointer                     levels above 0
 *   RESERVED  RESERVED | rights                   no frame yet; at level 1 or 2 for a whole slot
 *   PRESENT   PRESENT | rights | state | pfn      level 0: one page; level 1: a frame of order 9, or
 *                                                 512 of the pages of one of order 18; level 2: a
 *                                                 frame of order 18
 *
 * An entry changes only under its table's lock, except that YOUNG and DIRTY are set by an atomic
 * without it. It is read without a lock. MOVING is set by migration on a PRESENT entry: reads go on,
 * writes fault and wait on mm->moved. COW: reads go on, writes fault and get a frame of their own.
 *
 * Tables are never freed before their mm, so a reader without a lock never touches freed memory.
 * But munmap may take an empty table out of the tree and use it elsewhere, so whoever locks a table
 * must see, under the lock, that it is live and still covers the address (ctg_pte_lock does).
 */
#ifndef CTG_PGTABLE_H
#define CTG_PGTABLE_H

#include "core.h"

#define CTG_PTE_PRESENT ((uint64_t)1 << 0)
#define CTG_PTE_READ ((uint64_t)1 << 1)
#define CTG_PTE_WRITE ((uint64_t)1 << 2) /* the right to write; in force unless MOVING or COW */
#define CTG_PTE_TABLE ((uint64_t)1 << 3)
#define CTG_PTE_RESERVED ((uint64_t)1 << 4)
#define CTG_PTE_YOUNG ((uint64_t)1 << 5)
#define CTG_PTE_DIRTY ((uint64_t)1 << 6)
#define CTG_PTE_MOVING ((uint64_t)1 << 7)
/*
 * The frame may be shared copy-on-write with other spaces of the family. An anonymous entry WITHOUT it
 * is exclusive to its mm: no other entry of another mm says the same frame.
 */
#define CTG_PTE_COW ((uint64_t)1 << 8)
/* The frame belongs to a shared object: written by all, never copied. */
#define CTG_PTE_SHARED ((uint64_t)1 << 9)
#define CTG_PTE_RIGHTS (CTG_PTE_READ | CTG_PTE_WRITE)
#define CTG_PTE_PFN_SHIFT 12

#define CTG_TABLE_ENTRIES 512u
#define CTG_TABLE_LEVELS 4

static inline uint64_t ctg_pte(ctg_pfn_t pfn, uint64_t flags)
{
	return pfn << CTG_PTE_PFN_SHIFT | flags;
}
static inline ctg_pfn_t ctg_pte_pfn(uint64_t entry)
{
	return entry >> CTG_PTE_PFN_SHIFT;
}
/* Pages that one entry of a level covers. */
static inline uint64_t ctg_level_pages(unsigned level)
{
	return (uint64_t)1 << (9 * level);
}

struct ctg_table {
	struct ctg_word64 entry[CTG_TABLE_ENTRIES];
	struct ctg_lock lock; /* protects the entries, level, base, live and used */
	unsigned level;
	bool live;            /* part of the tree */
	ctg_vpn_t base;       /* first page it covers */
	unsigned used;        /* entries that are not EMPTY */
	struct ctg_table *next; /* mm->spare, under mm->spare_lock */
};

/*
 * The address spaces that may map the same anonymous frames, at the same addresses: one mm, and
 * those forked from it. Never freed before the machine (a walk may read frame->anon of a frame
 * that has just been unmapped), only used again: whoever locks one must then see that the frame is
 * still ANON, mapped, and belongs to it.
 */
struct ctg_anon {
	struct ctg_lock lock; /* protects mms; held while the family is walked */
	struct ctg_mm *mms;   /* by mm->family_next */
	struct ctg_anon *next; /* ctg->anons: all of them, under ctg->anons_lock */
	bool in_use;           /* under ctg->anons_lock */
};

#define CTG_BATCH_RUNS 64
#define CTG_BATCH_PAGES 2048
/*
 * What has been unmapped, and is still counted as mapped until nobody can access it. The entry is
 * cleared and the run added under lock, so that for everybody else a mapping is in the table or
 * in the batch. Anybody may flush it.
 */
struct ctg_batch {
	struct ctg_lock lock;
	struct ctg_mm *mm;
	bool dead; /* no access can happen any more: do not tell the port */
	unsigned nr_runs;
	uint64_t nr_pages;
	struct ctg_batch_run {
		ctg_vpn_t vpn;
		ctg_pfn_t pfn;
		uint64_t nr;    /* pages */
		bool large;     /* one entry (and one count) for all of them, else one a page */
	} run[CTG_BATCH_RUNS];
	struct ctg_batch *next, **link; /* ctg->batches, under ctg->batches_lock */
};

/* An entry found and locked. */
struct ctg_pte_ref {
	struct ctg_table *table;
	unsigned index;
	unsigned level;
	uint64_t entry; /* as it was when locked; never a TABLE */
};

struct ctg_mm {
	struct ctg *ctg;
	struct ctg_lock lock;
	struct ctg_mm_config config;
	struct ctg_anon *anon;
	struct ctg_mm *family_next; /* anon->lock */
	struct ctg_table *root;     /* level 3 */
	struct ctg_lock spare_lock; /* a leaf: migration takes tables without mm->lock */
	struct ctg_table *spare;    /* tables out of the tree; spare_lock */
	struct ctg_word64 recycled; /* raised when a spare table is about to be filled again */
	struct ctg_word64 nr_tables; /* in the tree */
	struct ctg_word64 nr_present; /* pages */
	/*
	 * notifier.c: NULL until the first insertion. Written under mm->lock and anon->lock, so read
	 * under either.
	 */
	struct ctg_notifiers *notifiers;
	struct ctg_word32 moved;    /* raised whenever a migration ends in this mm; waited on */
	struct ctg_pte_ref slot;    /* anon->lock: the table that a migration has locked here */
	struct ctg_table *pieces;   /* anon->lock: tables for large entries that it takes to pieces */
	struct ctg_batch batch;
	struct ctg_word16 pin_account; /* pin.c: 0 until its first pin */
	uint64_t nr_pin_handles;       /* ctg->pins.lock */
};

/* pgtable.c */

/* Lock the table whose entry governs vpn: the lowest that exists. Always succeeds. */
void ctg_pte_lock(struct ctg_mm *mm, ctg_vpn_t vpn, struct ctg_pte_ref *ref);
void ctg_pte_unlock(struct ctg_mm *mm, struct ctg_pte_ref *ref);
/* Change the locked entry (not YOUNG and DIRTY that come in meanwhile: those are kept if both old
 * and new are PRESENT). Keeps table->used. */
void ctg_pte_set(struct ctg_pte_ref *ref, uint64_t entry);
/* The entry that governs vpn, without a lock; *level is the level it was found at. */
uint64_t ctg_pte_read(const struct ctg_mm *mm, ctg_vpn_t vpn, unsigned *level);

/*
 * Visit every entry that governs a page of [vpn, end), from the lowest address up:
 *
 *	struct ctg_pte_walk walk = CTG_PTE_WALK(mm, vpn, end);
 *	while (ctg_pte_walk_next(&walk))
 *		... walk.ref is locked and never a TABLE; it may be changed with ctg_pte_set ...
 *
 * A table stays locked from its first entry to its last. To leave early: ctg_pte_walk_stop.
 */
struct ctg_pte_walk {
	struct ctg_mm *mm;
	ctg_vpn_t vpn; /* first page of the range that ref governs */
	uint64_t nr;   /* pages of the range that ref governs */
	ctg_vpn_t end;
	struct ctg_pte_ref ref;
	bool locked;
};
#define CTG_PTE_WALK(mm_, vpn_, end_) {.mm = (mm_), .vpn = (vpn_), .end = (end_)}
bool ctg_pte_walk_next(struct ctg_pte_walk *walk);
void ctg_pte_walk_stop(struct ctg_pte_walk *walk);

/*
 * A table that is not part of the tree, all EMPTY: fill its entries with ctg_store64_release (a
 * reader that was on its way when the table was last in the tree may still look), then give it to
 * ctg_pte_set_table. Free it with ctg_table_free if it was not used. No table lock may be held;
 * mm->lock need not be. NULL: no memory.
 */
struct ctg_table *ctg_table_alloc(struct ctg_mm *mm, unsigned level);
void ctg_table_free(struct ctg_mm *mm, struct ctg_table *table);
/* Put a filled table in place of the locked entry, which it must cover; ref becomes unlocked.
 * YOUNG and DIRTY that come in meanwhile go to every PRESENT entry of the table. */
void ctg_pte_set_table(struct ctg_mm *mm, struct ctg_pte_ref *ref, struct ctg_table *table);
/*
 * Make sure that the entry governing vpn is at `level` or below and that its neighbours outside are
 * unaffected: splits EMPTY, RESERVED and PRESENT large entries above it. Splitting a PRESENT entry
 * adds 511 mappings to its frame; pieces of a MOVING one are MOVING. mm->lock held.
 * 0, -ENOMEM, -EOVERFLOW.
 */
int ctg_pte_split_to(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned level);
/*
 * Of the tables that cover pages of [vpn, end), take those out of the tree whose entries are all
 * EMPTY, or all RESERVED with the same rights (one RESERVED entry replaces those). mm->lock held.
 */
void ctg_pte_prune(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end);
int ctg_pt_init(struct ctg_mm *mm);
void ctg_pt_destroy(struct ctg_mm *mm);

/*
 * A look at one entry after another without a lock, each twice: see gup.c. Zero-initialise.
 */
struct ctg_pte_look {
	struct ctg_word64 *word; /* where the entry was found */
	uint64_t entry;
	uint64_t recycled; /* mm->recycled before that */
	ctg_vpn_t vpn;
	unsigned level;
};
/* Read the entry that governs vpn: look->entry, at look->level. */
void ctg_pte_look(const struct ctg_mm *mm, ctg_vpn_t vpn, struct ctg_pte_look *look);
/*
 * Is a PRESENT entry still, or again, what it was, YOUNG and DIRTY apart? If so they are set as
 * `marks` says, by the same atomic that compares.
 */
bool ctg_pte_look_again(const struct ctg_mm *mm, const struct ctg_pte_look *look, uint64_t marks);

/* Find the entry and set YOUNG (and DIRTY) if it is PRESENT. Takes no lock. */
void ctg_pte_mark(struct ctg_mm *mm, ctg_vpn_t vpn, bool dirty);

/* mm.c */
/* ctg_mm_create, into the family of a relative if that is not NULL. */
int ctg_mm_make(struct ctg *ctg, const struct ctg_mm_config *config, struct ctg_mm *relative,
	struct ctg_mm **out);
/* Not empty, in bounds, aligned to what the mm maps. */
bool ctg_mm_range_valid(const struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);
/* Change the rights of what is mapped, PRESENT or RESERVED: the table only. mm->lock held; no entry
 * crosses the edges. */
void ctg_mm_set_rights(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end, uint64_t rights);

/* unmap.c */
void ctg_batch_init(struct ctg_mm *mm);   /* and into ctg->batches */
void ctg_batch_destroy(struct ctg_mm *mm); /* flushed; out of ctg->batches */
/*
 * Add the mapping of one entry that is about to be cleared or to say another frame, in its table's
 * lock and batch->lock. false: the batch is full.
 */
bool ctg_batch_add(
	struct ctg_batch *batch, ctg_vpn_t vpn, ctg_pfn_t pfn, uint64_t nr, bool large);
void ctg_batch_flush(struct ctg_batch *batch, bool helping);
/*
 * Clear the entries of [vpn, vpn + nr) (leaving RESERVED with the same rights if `reserve`), give
 * their frames to the batch, flush it. Large entries that cross the edges have been split.
 * mm->lock held.
 */
void ctg_unmap_range(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, bool reserve);

/* anon.c */
/*
 * Frames for the mm, as ctg_alloc_run with what its config adds, charged to its group: fewer where
 * the group's limit or memory forbid the most. Each block has one plain reference, on its head; a
 * ctg_frame_put of it uncharges too. -ENOSPC: the group. No table is locked.
 */
int ctg_anon_alloc(struct ctg_mm *mm, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order);
/* ctg_split_used for such frames. */
void ctg_anon_split(struct ctg *ctg, ctg_pfn_t pfn, unsigned order);
/* Say whose a new frame is: of which family, mapped where. */
void ctg_anon_own(struct ctg *ctg, struct ctg_anon *anon, ctg_pfn_t pfn, ctg_vpn_t vpn);
/* Turn the allocation's reference into the mapping that the locked entry is about to be. */
void ctg_anon_map(struct ctg *ctg, ctg_pfn_t pfn);

/* cow.c */
/*
 * Make the page at vpn, which is PRESENT and COW, exclusive to the mm: by a copy, or without one if
 * nobody else has it; its rights do not matter. The entry is not COW afterwards, and the port knows.
 * Does nothing for others. gfp: beside what the mm's config says. mm->lock held (that is how a fork keeps its snapshot); copies under it.
 * 0; -EAGAIN: it is MOVING, wait as for a fault; -ENOMEM; -ENOSPC: the group; -EOVERFLOW; what the
 * port's copy or install returned: as before.
 */
int ctg_cow_break(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned gfp);

/* fault.c */
/*
 * As ctg_handle_fault for a read, not counted as a fault. longterm: what is allocated is not
 * lendable, whatever the mm's own gfp says.
 */
int ctg_fault_in(struct ctg_mm *mm, ctg_vpn_t vpn, bool longterm);

/* cow.c */
/*
 * Make the page at vpn exclusive to the mm if its entry is COW, whatever its rights: reuse or copy,
 * as a write fault does. longterm as above. Waits while a migration moves it. No lock is held.
 * 0: look again; -ENOMEM, -ENOSPC (the group), -EINTR, or what the port's copy returned.
 */
int ctg_cow_unshare(struct ctg_mm *mm, ctg_vpn_t vpn, bool longterm);

/* notifier.c */
/*
 * Begin an invalidation: tell everybody who mirrors a page of the ranges. Then the entries may be
 * changed, and what follows from it done (flush, install); then ctg_notify_end. mm->lock or the
 * family's lock is held, one of them all the time in between; no table is locked. Costs one load
 * if nobody has ever asked. Never fails if blockable; else -EAGAIN, and there is nothing to end.
 */
int ctg_notify_start(struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_notify_event event, bool blockable);
/* More ranges of an invalidation that has been started and may block. */
void ctg_notify_more(struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_notify_event event);
void ctg_notify_end(struct ctg_mm *mm);
/* The mm is going, and nobody can find it any more. */
void ctg_notifiers_leave(struct ctg_mm *mm);

/* rmap.c */
/*
 * Set DIRTY in the entries that say the frames [pfn, pfn + nr), all of one frame that the caller
 * holds a count on. Takes anon->lock.
 */
void ctg_anon_mark_dirty(struct ctg *ctg, ctg_pfn_t pfn, uint64_t nr);
int ctg_anon_join(struct ctg_mm *mm, struct ctg_mm *relative); /* relative NULL: a new family */
void ctg_anon_leave(struct ctg_mm *mm);
void ctg_anons_destroy(struct ctg *ctg);
/*
 * Lock the family of a frame that the caller holds a reference on. NULL: it is not anonymous or no
 * longer mapped. Unlock with ctg_unlock.
 */
struct ctg_anon *ctg_anon_lock(struct ctg *ctg, ctg_pfn_t pfn);
/* The head, whose word has the counts, of a frame that the caller knows to stay mapped or held. */
ctg_pfn_t ctg_frame_head(struct ctg *ctg, ctg_pfn_t pfn);

#endif
