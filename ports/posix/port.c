/* SPDX-License-Identifier: MIT */
/*
 * The two hooks about mappings. The core's page table is the truth; here the operating system's
 * mapping of an address space is made to agree with it.
 *
 *   restrict(WRPROTECT)  keeps writers out of the ranges and writes them down as moving
 *   restrict(INVALIDATE) maps what the entries say now: narrower, or nothing
 *   install              maps what the entries say now, which also ends the write protection,
 *                        because that belongs to the mapping that is replaced; wakes who waited
 *
 * Ranges are compared with the table under space->lock, so the last hook to run leaves the mapping
 * as the table says. Entries that the table says are moving are left alone by everybody but the
 * migration itself, whose install comes after it has switched them.
 */
#define _GNU_SOURCE
#include "region.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SETTLE_LOOK_NS 1000000
#define MUST_PAUSE_NS 1000000
#define MUST_GIVE_UP_NS UINT64_C(10000000000)

/* Operations gathered for one call, and the space they are for. */
struct op_list {
	struct posix_space *space;
	struct posix_op op[POSIX_MAX_OPS];
	size_t nr;
	size_t done; /* operations carried out before these */
	bool must;
	bool settle; /* they end the moving of what they map */
	int error;
};

void posix_space_must(struct posix_space *space, const struct posix_op *ops, size_t nr)
{
	uint64_t give_up = posix_now(NULL) + MUST_GIVE_UP_NS;
	const struct timespec pause = {.tv_nsec = MUST_PAUSE_NS};

	while (nr > 0 && !space->dead) {
		int err = 0, done = space->ops(space, ops, nr, &err);

		if (done < 0) {
			space->dead = true; /* -CTG_ENOENT: it is gone */
			pthread_cond_broadcast(&space->settled);
			return;
		}
		ops += done;
		nr -= (size_t)done;
		if (nr == 0)
			return;
		if (done > 0)
			give_up = posix_now(NULL) + MUST_GIVE_UP_NS;
		/*
		 * The process has run out of mappings or memory in spite of the budget. It cannot
		 * go on with a mapping of frames that are no longer its own, and nothing tells when
		 * there is room again: look again in a moment, and in the end choose its death.
		 */
		if (posix_now(NULL) > give_up) {
			if (space->local)
				abort();
			kill(space->pid, SIGKILL);
			space->dead = true;
			pthread_cond_broadcast(&space->settled);
			return;
		}
		nanosleep(&pause, NULL);
	}
}

static void settle_op(struct posix_space *space, const struct posix_op *op)
{
	uint64_t since = posix_ranges_remove(space, &space->moving, op->addr, op->bytes);
	uint64_t now;

	if (since == UINT64_MAX)
		return;
	posix_space_wake(space, op->addr, op->bytes);
	now = posix_now(NULL);
	if (now - since > space->stall_max_ns)
		space->stall_max_ns = now - since;
}

/* It was converted or unmapped between the core's look at it and tlb_restrict: nothing is mapped
 * over it, so the protection that tlb_restrict put on it must be taken off. */
static void settle_skipped(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	if (posix_ranges_remove(space, &space->moving, addr, bytes) == UINT64_MAX)
		return;
	if (space->guard == POSIX_GUARD_UFFD && space->uffd >= 0)
		posix_uffd_unprotect(space->uffd, addr, bytes);
}

/*
 * Carry out what is gathered. Only the very first operation of a call may fail: once a writer can
 * reach a new frame, putting the entries back would lose what it wrote.
 */
static void ops_flush(struct op_list *list)
{
	struct posix_space *space = list->space;
	int done = 0;

	if (list->nr == 0 || list->error != 0) {
		list->nr = 0; /* what is gathered after a failure is not wanted */
		return;
	}
	if (!list->must && list->done == 0) {
		done = space->ops(space, list->op, list->nr, &list->error);
		if (done == 0 && list->error != 0) {
			list->nr = 0;
			return;
		}
		if (done < 0) {
			space->dead = true;
			done = (int)list->nr;
		}
		list->error = 0;
	}
	posix_space_must(space, list->op + done, list->nr - (size_t)done);
	list->done += list->nr;
	for (size_t i = 0; i < list->nr; i++) {
		space->nr_maps += 2;
		if (list->settle)
			settle_op(space, &list->op[i]);
	}
	list->nr = 0;
}

static void ops_add(struct op_list *list, const struct posix_op *op)
{
	struct posix_op *last = list->nr > 0 ? &list->op[list->nr - 1] : NULL;

	if (last != NULL && last->kind == op->kind && last->file == op->file &&
		last->prot == op->prot && last->addr + last->bytes == op->addr &&
		(op->kind != POSIX_OP_MAP || last->offset + last->bytes == op->offset)) {
		last->bytes += op->bytes;
		return;
	}
	if (list->nr == POSIX_MAX_OPS)
		ops_flush(list);
	list->op[list->nr++] = *op;
}

/* Operations for [vpn, vpn + nr), which is alike as m says. */
static void ops_for_mapping(
	struct op_list *list, ctg_vpn_t vpn, uint64_t nr, const struct ctg_mapping *m)
{
	struct ctg_region *region = list->space->region;
	struct posix_op op = {.addr = vpn << CTG_PAGE_SHIFT};
	uint64_t run;

	if (m->pfn == CTG_PFN_NONE || m->prot == CTG_PROT_NONE) {
		op.kind = POSIX_OP_RESERVE;
		op.bytes = nr << CTG_PAGE_SHIFT;
		ops_add(list, &op);
		return;
	}
	op.kind = POSIX_OP_MAP;
	/* CTG_PROT_* and PROT_* have the same values; write implies read. */
	op.prot = m->prot | CTG_PROT_READ;
	for (ctg_pfn_t pfn = m->pfn + (vpn - m->vpn); nr > 0; pfn += run, nr -= run) {
		struct posix_store *store = posix_store_of(region, pfn);

		if (!posix_store_offset(store, pfn, nr, &op.offset, &run))
			abort(); /* the core has mapped a hole */
		op.file = (uint32_t)(store - region->store);
		op.bytes = run << CTG_PAGE_SHIFT;
		ops_add(list, &op);
		op.addr += op.bytes;
	}
}

/* A migration has marked a page of ours. It tells us when it has installed it; one that gives up
 * before it has asked us anything tells nobody, hence the limit. */
static void wait_settled(struct posix_space *space)
{
	uint64_t until = posix_now(NULL) + SETTLE_LOOK_NS;
	const struct timespec ts = {
		.tv_sec = (time_t)(until / 1000000000u), .tv_nsec = (long)(until % 1000000000u)};

	pthread_cond_clockwait(&space->settled, &space->lock, CLOCK_MONOTONIC, &ts);
}

/* Make the mapping agree with the table, but for private chunks. */
static int space_sync(struct op_list *list, const struct ctg_vrange *ranges, size_t nr)
{
	struct posix_space *space = list->space;

	for (size_t i = 0; i < nr; i++) {
		ctg_vpn_t vpn = ranges[i].vpn, end = vpn + ranges[i].nr;

		while (vpn < end) {
			ctg_vpn_t stop = (vpn | (POSIX_CHUNK_FRAMES - 1)) + 1;
			uint64_t chunk = posix_chunk_of(space, vpn << CTG_PAGE_SHIFT);
			struct ctg_mapping m;

			if (stop > end)
				stop = end;
			/* A chunk under conversion may be private already, although its bit does
			 * not say so yet: only the conversion maps anything there. */
			if (posix_chunk_private(space, chunk) ||
				posix_ranges_overlap(space->exclusive, vpn << CTG_PAGE_SHIFT,
					(stop - vpn) << CTG_PAGE_SHIFT) ||
				ctg_mm_lookup(space->mm, vpn, stop - vpn, &m) != 0) {
				if (list->settle)
					settle_skipped(space, vpn << CTG_PAGE_SHIFT,
						(stop - vpn) << CTG_PAGE_SHIFT);
				vpn = stop;
				continue;
			}
			if (m.vpn + m.nr < stop)
				stop = m.vpn + m.nr;
			if (m.moving && m.prot != CTG_PROT_NONE && list->settle) {
				ops_flush(list);
				if (list->error != 0 || space->dead)
					return list->error;
				wait_settled(space);
				continue;
			}
			if (!m.moving || m.prot == CTG_PROT_NONE)
				ops_for_mapping(list, vpn, stop - vpn, &m);
			vpn = stop;
		}
	}
	ops_flush(list);
	return list->error;
}

/* ---- the budget of mappings -------------------------------------------------------------- */

/* Count exactly: runs of the table that one mapping each serves, and the gaps between them. */
static uint64_t count_maps(struct posix_space *space)
{
	ctg_vpn_t vpn = space->window >> CTG_PAGE_SHIFT;
	ctg_vpn_t end = vpn + (space->window_bytes >> CTG_PAGE_SHIFT);
	uint64_t maps = 1, next = UINT64_MAX;
	unsigned prot = 0;

	while (vpn < end) {
		struct ctg_mapping m;
		uint64_t nr, offset = UINT64_MAX, run;

		if (ctg_mm_lookup(space->mm, vpn, end - vpn, &m) != 0)
			break;
		nr = m.nr - (vpn - m.vpn);
		if (m.pfn != CTG_PFN_NONE) {
			ctg_pfn_t pfn = m.pfn + (vpn - m.vpn);
			struct posix_store *store = posix_store_of(space->region, pfn);

			if (!posix_store_offset(store, pfn, nr, &offset, &run))
				abort();
			nr = run;
			/* Distinct from every offset of the other file. */
			offset |= (uint64_t)(store - space->region->store) << 62;
		}
		if (offset != next || m.prot != prot)
			maps++;
		next = offset == UINT64_MAX ? UINT64_MAX : offset + (nr << CTG_PAGE_SHIFT);
		prot = m.prot;
		vpn += nr;
	}
	return maps;
}

/* May `pages` pages in nr ranges be mapped anew, each perhaps elsewhere? */
static int check_budget(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	uint64_t need = 2 * nr, budget = space->region->map_budget;
	bool large = space->region->store[POSIX_FILE_REGION].map_order != 0;

	for (size_t i = 0; i < nr; i++)
		need += large ? ranges[i].nr / POSIX_CHUNK_FRAMES : ranges[i].nr;
	if (space->nr_maps + need > budget)
		space->nr_maps = count_maps(space);
	return space->nr_maps + need > budget ? -CTG_ENOMEM : 0;
}

/* ---- the hooks --------------------------------------------------------------------------- */

static int wrprotect(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	uint64_t now;
	size_t added = 0;
	int ret = 0;

	for (size_t i = 0; i < nr; i++)
		if (posix_ranges_overlap(space->exclusive, ranges[i].vpn << CTG_PAGE_SHIFT,
			    ranges[i].nr << CTG_PAGE_SHIFT))
			return -CTG_EBUSY;
	ret = check_budget(space, ranges, nr);
	if (ret == 0 && space->ping != NULL)
		ret = space->ping(space);
	if (ret == -CTG_ENOENT) {
		space->dead = true;
		pthread_cond_broadcast(&space->settled);
		return 0;
	}
	now = posix_now(NULL);
	for (; ret == 0 && added < nr; added += ret == 0)
		ret = posix_ranges_add(space, &space->moving, ranges[added].vpn << CTG_PAGE_SHIFT,
			ranges[added].nr << CTG_PAGE_SHIFT, now);
	if (ret == 0)
		ret = posix_space_protect(space, ranges, nr);
	if (ret != 0)
		while (added-- > 0)
			posix_ranges_remove(space, &space->moving,
				ranges[added].vpn << CTG_PAGE_SHIFT,
				ranges[added].nr << CTG_PAGE_SHIFT);
	return ret;
}

int posix_tlb_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_tlb_how how)
{
	struct posix_space *space = ctg_mm_owner(mm);
	struct op_list list = {.space = space, .must = true};
	int ret = 0;

	(void)host;
	pthread_mutex_lock(&space->lock);
	if (space->dead)
		ret = 0;
	else if (how == CTG_TLB_WRPROTECT)
		ret = wrprotect(space, ranges, nr);
	else
		ret = space_sync(&list, ranges, nr);
	if (ret != 0)
		space->refused_to = posix_gettid();
	pthread_mutex_unlock(&space->lock);
	return ret;
}

/* Nobody carries out operations any more, but somebody may wait in posix_space_begin. */
static void forget_moving(struct posix_space *space, const struct ctg_vrange *ranges, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		posix_ranges_remove(space, &space->moving, ranges[i].vpn << CTG_PAGE_SHIFT,
			ranges[i].nr << CTG_PAGE_SHIFT);
}

/*
 * The core also calls tlb_install for a batch that tlb_restrict has refused. Its mapping is what it
 * was, and the process perhaps does not answer (which is why it was refused): it must not be waited
 * for. The same thread calls both, with nothing else of this space between, and only one batch of a
 * space moves at a time.
 */
static bool was_refused(struct posix_space *space, pid_t self)
{
	bool refused = space->refused_to == self;

	if (refused)
		space->refused_to = 0;
	return refused;
}

/* The place of tid (0: a free one) among those whose tlb_install has failed; NULL: there is none.
 */
static pid_t *unsettled(struct posix_space *space, pid_t tid)
{
	for (unsigned i = 0; i < POSIX_MAX_UNSETTLED; i++)
		if (space->unsettled[i] == tid)
			return &space->unsettled[i];
	return NULL;
}

int posix_tlb_install(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	struct posix_space *space = ctg_mm_owner(mm);
	struct op_list list = {.space = space, .settle = true};
	pid_t self = posix_gettid(), *place;
	int ret = 0;

	(void)host;
	pthread_mutex_lock(&space->lock);
	place = unsettled(space, self);
	list.must = place != NULL;
	if (place == NULL)
		place = unsettled(space, 0);
	/* Whoever cannot be remembered may not fail the first time either. */
	if (place == NULL)
		list.must = true;
	else
		*place = self;
	if (!was_refused(space, self) && !space->dead) {
		if (!list.must && posix_self_spoiled(space, ranges, nr))
			ret = -CTG_ENOMEM;
		else
			ret = space_sync(&list, ranges, nr);
	}
	if (ret == 0 && place != NULL)
		*place = 0;
	if (space->dead)
		forget_moving(space, ranges, nr);
	posix_space_settle(space);
	pthread_cond_broadcast(&space->settled);
	pthread_mutex_unlock(&space->lock);
	return ret;
}
