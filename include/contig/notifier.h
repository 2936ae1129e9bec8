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
	CTG_NOTIFY_EXIT,    /* the address space ends */
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
	 * -EAGAIN and nothing has changed). May not touch the address space.
	 */
	bool (*invalidate)(struct ctg_mmu_interval_notifier *n, const struct ctg_notify_range *range);
};

/* The caller's memory, until removed. Fields below ops are the core's. */
struct ctg_mmu_interval_notifier {
	const struct ctg_mmu_interval_ops *ops;
	struct ctg_mm *mm;
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
 * Insert over [vpn, vpn + nr). During an invalidation it takes effect at its end, and
 * ctg_mmu_interval_read_begin waits for that.
 * Context: may sleep. Returns 0, -EINVAL (NULL, empty, wrapping, out of range).
 */
int ctg_mmu_interval_notifier_insert(struct ctg_mmu_interval_notifier *n, struct ctg_mm *mm,
	ctg_vpn_t vpn, uint64_t nr, const struct ctg_mmu_interval_ops *ops);
/* Waits until no callback of it runs and none will. Not from a callback. Context: may sleep. */
void ctg_mmu_interval_notifier_remove(struct ctg_mmu_interval_notifier *n);

/* Waits while an invalidation of the interval is under way. Context: may sleep. */
uint64_t ctg_mmu_interval_read_begin(struct ctg_mmu_interval_notifier *n);
/* true: an invalidation began since: what was read is not to be used. Under the client's lock. */
bool ctg_mmu_interval_read_retry(const struct ctg_mmu_interval_notifier *n, uint64_t seq);

#ifdef __cplusplus
}
#endif
#endif
