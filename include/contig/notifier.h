/* SPDX-License-Identifier: MIT */
/*
 * MMU interval notifiers: the alternative to pinning. A client that mirrors a range of an address
 * space (a device's page table, a cached translation) is told before entries of it change and lets
 * go; nothing is held.
 *
 * The client's pattern:
 *
 *	again:
 *		seq = ctg_mmu_interval_read_begin(n);
 *		ctg_mm_lookup(...) for the pages it wants (faulting them in as needed)
 *		take the client's lock (the one its callback takes)
 *		if (ctg_mmu_interval_read_retry(n, seq)) { drop the lock; goto again; }
 *		use the frames; they are right until the callback
 *		drop the lock
 */
#ifndef CONTIG_NOTIFIER_H
#define CONTIG_NOTIFIER_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ctg_notify_event {
	CTG_NOTIFY_UNMAP,   /* munmap, dontneed */
	CTG_NOTIFY_PROTECT, /* fewer rights */
	CTG_NOTIFY_MIGRATE, /* other frames, the same contents; writes first stop */
	CTG_NOTIFY_FORK,    /* writable entries become copy-on-write */
	CTG_NOTIFY_COPY,    /* copy-on-write: another frame */
	CTG_NOTIFY_EXIT,    /* the address space ends: not to be looked at any more */
	CTG_NOTIFY_RECLAIM, /* nothing changes yet: somebody wants the pages not to be in use */
};

struct ctg_mmu_interval_notifier;
struct ctg_notify_range {
	struct ctg_mm *mm;
	ctg_vpn_t vpn;
	uint64_t nr;
	enum ctg_notify_event event;
	bool blockable;
};
struct ctg_mmu_interval_ops {
	/*
	 * Entries of the range are about to change: stop using what overlaps, now. Takes the client's
	 * lock. Not blockable and it would sleep: return false (the operation gives up with
	 * -EAGAIN and nothing has changed; what it returns otherwise does not matter). Runs under
	 * locks of the core: may not call anything of the address space but ctg_mm_lookup, and may
	 * insert intervals but not remove them. Several may run at once, also of one interval.
	 */
	bool (*invalidate)(struct ctg_mmu_interval_notifier *n, const struct ctg_notify_range *range);
};

/* The caller's memory, until removed. Fields below ops are the core's. */
struct ctg_mmu_interval_notifier {
	const struct ctg_mmu_interval_ops *ops;
	struct ctg_mm *mm; /* not to be used after CTG_NOTIFY_EXIT */
	struct ctg_notifiers *notifiers; /* the mm's, and outlives it */
	ctg_vpn_t vpn;
	uint64_t nr;
	struct ctg_word64 seq;
	/* interval tree and deferred lists, under the mm's notifier lock */
	struct ctg_mmu_interval_notifier *child[2], *parent, *deferred;
	ctg_vpn_t subtree_last;
	uint32_t priority;
	uint32_t state;
};

/*
 * Insert over [vpn, vpn + nr), in the time of the mm. During an invalidation it takes effect at its
 * end, and ctg_mmu_interval_read_begin waits for that. n is not inserted anywhere else.
 * Context: may sleep; not under the client's lock. Returns 0, -EINVAL (NULL, empty, wrapping, out of
 * range), -ENOMEM (only until one has been inserted into this mm).
 */
int ctg_mmu_interval_notifier_insert(struct ctg_mmu_interval_notifier *n, struct ctg_mm *mm,
	ctg_vpn_t vpn, uint64_t nr, const struct ctg_mmu_interval_ops *ops);
/*
 * Waits until no callback of it runs and none will. Every interval is to be removed, also when its
 * mm has gone. Again, or NULL: nothing happens. Not from a callback. Context: may sleep; not under
 * the client's lock.
 */
void ctg_mmu_interval_notifier_remove(struct ctg_mmu_interval_notifier *n);

/*
 * Waits while an invalidation of the interval is under way, and for those of the same mm that overlap
 * it in time. Context: may sleep; not from a callback, nor under the client's lock.
 */
uint64_t ctg_mmu_interval_read_begin(struct ctg_mmu_interval_notifier *n);
/* true: an invalidation began since: what was read is not to be used. Under the client's lock. */
bool ctg_mmu_interval_read_retry(const struct ctg_mmu_interval_notifier *n, uint64_t seq);

/*
 * Have everybody who mirrors a page of [vpn, vpn + nr) let go, as before a change; nothing changes.
 * For who is about to need the pages unused.
 * @blockable: false: waits for nobody.
 * Context: may sleep only if blockable; takes the mm's lock.
 * Returns 0; -EINVAL; -EAGAIN: not blockable, and somebody would have had to be waited for.
 */
int ctg_mm_invalidate(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, bool blockable);

/*
 * As ctg_madvise_dontneed, but waits neither for the mm's lock nor for clients: -EAGAIN, and what is
 * mapped is as before.
 */
int ctg_madvise_dontneed_nonblock(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);

#ifdef __cplusplus
}
#endif
#endif
