/* SPDX-License-Identifier: MIT */
/*
 * The one lock of the core: a word that spins briefly, then sleeps in the port.
 *
 * The order in which locks are taken, outermost first. Two of one kind are never held together
 * unless a line says how.
 *
 *   mm->lock        what is mapped where (mmap, munmap, mprotect, populate); not taken by
 *                   migration, which works on entries under the table locks alone
 *   anon->lock      the list of address spaces of an anonymous family, while it is walked;
 *                   held across tlb hooks
 *   ctg->batches_lock  the list of batches, while one that somebody else owns is flushed
 *   batch->lock     the contents of one unmap batch; held across its tlb hook
 *   area->lock      an area's bitmap and its tree
 *   ctg->areas_lock the list of areas
 *   table->lock     the entries of one page-table node; two: the parent first; or one of each
 *                   address space of a family, under anon->lock, in the order of its list. No
 *                   hook is called under it
 *   mm->spare_lock  the tables that are not in the tree; a leaf
 *   mm->notifiers->lock  who is told, and how many invalidations are under way; a leaf, not held
 *                   over callbacks. A callback takes a lock of the client's, outside which is
 *                   mm->lock or anon->lock: so under that lock the client may look entries up and
 *                   ask for sequences, and no more
 *   pcp->lock       one CPU's cached frames of one zone; held across discard
 *   ctg->anons_lock the list of families
 *   ctg->groups_lock the table of groups; a leaf
 *   ctg->pins.lock  accounts of pins and the ledger; a leaf, held while the ledger is walked
 *   zone->lock      free lists, pageblocks and their summaries. No hook is called under it but
 *                   trace
 *
 * Allocating memory for tables (meta_alloc) happens under mm->lock or anon->lock only.
 */
#ifndef CTG_LOCK_H
#define CTG_LOCK_H

#include "atomic.h"
#include <contig/port.h>

struct ctg_lock {
	struct ctg_word32 state; /* 0 free, 1 held, 2 held and somebody may sleep */
};

#define CTG_LOCK_SPINS 64

static inline bool ctg_trylock(struct ctg_lock *lock)
{
	uint32_t expected = 0;

	return ctg_cas32_acq_rel(&lock->state, &expected, 1);
}

static inline void ctg_lock(const struct ctg_port *port, struct ctg_lock *lock)
{
	for (int i = 0; i < CTG_LOCK_SPINS; i++) {
		if (ctg_trylock(lock))
			return;
		port->relax(port->host);
	}
	/* From here on we hold it as 2: there may be sleepers that we cannot see. */
	while (ctg_xchg32_acq_rel(&lock->state, 2) != 0)
		port->wait(port->host, &lock->state, 2, CTG_NO_DEADLINE, false);
}

static inline void ctg_unlock(const struct ctg_port *port, struct ctg_lock *lock)
{
	if (ctg_xchg32_acq_rel(&lock->state, 0) == 2)
		port->wake(port->host, &lock->state, 1);
}

#endif
