/* SPDX-License-Identifier: MIT */
/*
 * Keeping writers out of what moves: write protection by userfaultfd, or stopping the threads.
 *
 * When the threads are those of this very process, the thread that moves and its copy threads go on
 * while the others are stopped at an arbitrary instruction, perhaps with a lock of the core held.
 * As soon as the mover is about to sleep (host_wait: it does so for a contended lock only, there),
 * the stop is broken: everybody goes on, and may write through the old mapping, which is still in
 * place. Such a batch must not come into force, so copy fails from then on, and tlb_install fails
 * if it would replace any frame. The core puts its entries back, and the old frames, which have
 * seen every write, stay. Nothing else sleeps between the two hooks, so a stop cannot deadlock.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>

bool posix_self_stop_broken(const struct ctg_region *region)
{
	return (pid_t)__atomic_load_n(&region->self_mover.v, __ATOMIC_RELAXED) == posix_gettid() &&
	       region->self_broken;
}

void posix_self_stop_break(struct ctg_region *region)
{
	if (region->self_broken)
		return;
	region->self_broken = true;
	posix_stopper_resume(region->stopper, region->local->pid);
}

static void self_end(struct ctg_region *region)
{
	struct ctg_mapping *runs = region->self_runs;
	size_t bytes = region->self_bytes;

	if (!region->self_broken)
		posix_stopper_resume(region->stopper, region->local->pid);
	region->self_runs = NULL;
	region->self_nr = region->self_bytes = 0;
	region->self_broken = false;
	__atomic_store_n(&region->self_mover.v, 0, __ATOMIC_RELEASE);
	/* Only now: the pool's lock may have to be waited for. */
	posix_meta_free(region, runs, bytes);
}

/* Write down what the entries say, to know later whether they have changed. */
static void self_record(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	struct ctg_region *region = space->region;
	size_t max = region->self_bytes / sizeof(*region->self_runs);

	for (size_t i = 0; i < nr; i++) {
		ctg_vpn_t vpn = ranges[i].vpn, end = vpn + ranges[i].nr;

		while (vpn < end && region->self_nr < max) {
			struct ctg_mapping *m = &region->self_runs[region->self_nr++];

			if (ctg_mm_lookup(space->mm, vpn, end - vpn, m) != 0)
				return;
			m->nr -= vpn - m->vpn;
			if (m->pfn != CTG_PFN_NONE)
				m->pfn += vpn - m->vpn;
			m->vpn = vpn;
			vpn += m->nr;
		}
	}
}

static int self_begin(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	struct ctg_region *region = space->region;
	pid_t keep[4] = {posix_gettid()};
	uint64_t pages = 0;
	int ret;

	for (size_t i = 0; i < nr; i++)
		pages += ranges[i].nr;
	region->self_bytes = pages * sizeof(*region->self_runs);
	region->self_runs = posix_meta_alloc(region, region->self_bytes, sizeof(uint64_t));
	if (region->self_runs == NULL) {
		region->self_bytes = 0;
		return -CTG_ENOMEM;
	}
	region->self_nr = 0;
	region->self_broken = false;
	posix_copier_tids(region, keep + 1, 3);
	ret = posix_stopper_stop(region->stopper, space->pid, keep);
	if (ret != 0) {
		posix_meta_free(region, region->self_runs, region->self_bytes);
		region->self_runs = NULL;
		region->self_bytes = 0;
		return ret;
	}
	__atomic_store_n(&region->self_mover.v, (uint32_t)keep[0], __ATOMIC_RELAXED);
	self_record(space, ranges, nr);
	return 0;
}

/* The frame that was mapped at vpn when the batch began. */
static ctg_pfn_t self_recorded(const struct ctg_region *region, ctg_vpn_t vpn)
{
	for (size_t i = 0; i < region->self_nr; i++) {
		const struct ctg_mapping *m = &region->self_runs[i];

		if (vpn - m->vpn < m->nr)
			return m->pfn == CTG_PFN_NONE ? CTG_PFN_NONE : m->pfn + (vpn - m->vpn);
	}
	return CTG_PFN_NONE;
}

bool posix_self_spoiled(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	struct ctg_region *region = space->region;

	if (!space->local || !posix_self_stop_broken(region))
		return false;
	for (size_t i = 0; i < nr; i++) {
		for (uint64_t k = 0; k < ranges[i].nr; k++) {
			ctg_pfn_t before = self_recorded(region, ranges[i].vpn + k);
			struct ctg_mapping m;

			/* What has been unmapped meanwhile is nobody's loss. */
			if (before != CTG_PFN_NONE &&
				ctg_mm_lookup(space->mm, ranges[i].vpn + k, 1, &m) == 0 &&
				m.pfn != CTG_PFN_NONE && m.pfn != before)
				return true;
		}
	}
	return false;
}

static int stop_protect(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	struct posix_stopper *stopper;
	int ret;

	/* Another batch has stopped a remote process: it stays stopped until the last has settled.
	 */
	if (space->stopped)
		return space->local ? -CTG_EBUSY : 0;
	ret = posix_region_stopper(space->region, &stopper);
	if (ret != 0)
		return ret;
	ret = space->local ? self_begin(space, ranges, nr)
			   : posix_stopper_stop(stopper, space->pid, space->keep);
	if (ret == -CTG_ENOENT)
		return 0; /* nobody is left who could write */
	if (ret == 0)
		space->stopped = true;
	return ret;
}

int posix_space_protect(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	int ret = 0;

	if (space->guard == POSIX_GUARD_STOP)
		return stop_protect(space, ranges, nr);
	for (size_t i = 0; i < nr; i++) {
		ret = posix_uffd_protect(space->uffd, ranges[i].vpn << CTG_PAGE_SHIFT,
			ranges[i].nr << CTG_PAGE_SHIFT);
		/* The address space is being torn down: nobody is left who could write. */
		if (ret == -ESRCH)
			ret = 0;
		if (ret != 0) {
			while (i-- > 0)
				posix_uffd_unprotect(space->uffd, ranges[i].vpn << CTG_PAGE_SHIFT,
					ranges[i].nr << CTG_PAGE_SHIFT);
			return ret == -CTG_ENOMEM ? ret : -CTG_EBUSY;
		}
	}
	return 0;
}

void posix_space_wake(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	if (space->guard == POSIX_GUARD_UFFD && space->uffd >= 0)
		(void)posix_uffd_wake(space->uffd, addr, bytes);
}

void posix_space_settle(struct posix_space *space)
{
	if (!space->stopped || space->moving != NULL || space->guarded != 0)
		return;
	space->stopped = false;
	if (space->local)
		self_end(space->region);
	else
		posix_stopper_resume(space->region->stopper, space->pid);
}

int posix_guard_protect(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	struct ctg_vrange range = {.vpn = addr >> CTG_PAGE_SHIFT, .nr = bytes >> CTG_PAGE_SHIFT};
	int ret;

	pthread_mutex_lock(&space->lock);
	ret = posix_space_protect(space, &range, 1);
	if (ret == 0)
		space->guarded++;
	pthread_mutex_unlock(&space->lock);
	return ret;
}

void posix_guard_release(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	pthread_mutex_lock(&space->lock);
	if (space->guard == POSIX_GUARD_UFFD && space->uffd >= 0)
		posix_uffd_unprotect(space->uffd, addr, bytes);
	space->guarded--;
	posix_space_settle(space);
	pthread_mutex_unlock(&space->lock);
}
