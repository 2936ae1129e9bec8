/* SPDX-License-Identifier: MIT */
/*
 * Holding the frames behind a range of an address space: what gup.c, which takes and drops the
 * counts, longterm.c, which moves what may not be held where it is, and pin.c, which keeps the
 * accounts and the ledger, offer each other.
 */
#ifndef CTG_GUP_H
#define CTG_GUP_H

#include "pgtable.h"

/* ---- pin.c: accounts ------------------------------------------------------------------------- */

/*
 * How many pins an mm has, in one word that outlives it: whoever takes it to zero after the mm has
 * ended frees the account. It is never less than the frames' counts that have been given to a
 * caller, so fork may rely on a zero only as a hint about what it will meet; the words decide.
 */
struct ctg_pin_account {
	struct ctg_word64 pins; /* and CTG_ACCOUNT_ORPHAN */
	uint16_t next_free;     /* index; under ctg->pins.lock */
} __attribute__((aligned(64)));

#define CTG_ACCOUNT_ORPHAN ((uint64_t)1 << 63)
/* Pins of pages of shared objects: no mm's, and never copied at fork. */
#define CTG_ACCOUNT_SHARED 0

/* The mm's account, made if it has none. 0 or -ENOMEM. No lock is held. */
int ctg_pin_account_of(struct ctg_mm *mm, uint16_t *index);
void ctg_pin_account_add(struct ctg *ctg, uint16_t index, uint64_t nr);
void ctg_pin_account_sub(struct ctg *ctg, uint16_t index, uint64_t nr);

/* ---- gup.c ----------------------------------------------------------------------------------- */

/* One call that holds pages. */
struct ctg_hold {
	struct ctg_mm *mm;
	unsigned flags;   /* enum ctg_foll, GET or PIN included */
	uint64_t one;     /* CTG_WORD_REF1 or CTG_WORD_PIN1 */
	bool fast;        /* without locks as far as it goes */
	bool per_frame;   /* one count for each frame, else for each page */
	uint16_t account; /* PIN: the mm's */
	/* Counts that have been taken and are on no account yet. */
	uint64_t own, shared;
	/* The frame that was held last, and the page of it that would follow. */
	ctg_pfn_t head, next;
	struct ctg_zone *zone; /* of a frame that was met before; NULL at first */
	struct ctg_pte_look look;
};

/* *hold for a call with these flags, `kind` (CTG_FOLL_GET or PIN) added. 0, -EINVAL, -ENOMEM. */
int ctg_hold_begin(struct ctg_hold *hold, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr,
	unsigned flags, unsigned kind);
/*
 * Hold the frame of vpn, and of the pages after it those that are in the same frame and held with
 * it, nr at most: *run is what they are. 0, or the error for vpn.
 */
int ctg_hold_some(struct ctg_hold *hold, ctg_vpn_t vpn, uint64_t nr, struct ctg_extent *run);
/* Put what has been taken on the accounts: before anybody can drop it. */
void ctg_hold_end(struct ctg_hold *hold);

/* One call that lets go. Ends with ctg_drop_end. */
struct ctg_drop {
	struct ctg *ctg;
	uint64_t one;     /* CTG_WORD_REF1 or CTG_WORD_PIN1 */
	uint16_t account; /* that `owed` pins, which have been dropped, are still on */
	uint64_t owed;
};
/* Drop counts of a frame, nr at most. Returns how many there were to drop. */
uint32_t ctg_drop_some(struct ctg_drop *drop, ctg_pfn_t head, uint32_t nr);
void ctg_drop_end(struct ctg_drop *drop);
/* Set DIRTY where frames [pfn, pfn + nr), all of one frame, are mapped. Takes anon->lock. */
void ctg_hold_mark_dirty(struct ctg *ctg, ctg_pfn_t pfn, uint64_t nr);
/*
 * The frame in use by address spaces that contains pfn, which may be any number. Right for as long
 * as the caller holds a count on it. CTG_PFN_NONE: none.
 */
ctg_pfn_t ctg_hold_head(struct ctg *ctg, ctg_pfn_t pfn, unsigned *order);

/* ---- longterm.c ------------------------------------------------------------------------------ */

/* Does any of the frame lie where a contiguous allocation may want it: in an area, or isolated? */
bool ctg_frame_lendable(const struct ctg_zone *zone, ctg_pfn_t head, unsigned order);

/* How long one long-term pin has been waiting for others to let go of a page. Zero at first. */
struct ctg_patience {
	uint64_t begun;
	unsigned looks;
};
/*
 * Move pages from vpn on, nr at most, out of lendable memory. 0: look again; -EBUSY: somebody holds
 * the first and does not let go; -EAGAIN: the same, at once, with CTG_FOLL_NOWAIT; -ENOMEM; -EINTR.
 */
int ctg_longterm_move(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags,
	struct ctg_patience *patience);

#endif
