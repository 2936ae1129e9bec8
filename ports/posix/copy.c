/* SPDX-License-Identifier: MIT */
/*
 * Contents: a batch is cut into pieces that the copy threads and the caller share.
 *
 * The threads serve one batch at a time. A caller that finds them taken does its own copying: it
 * must not wait, because in POSIX_GUARD_STOP whoever has them may be stopped and wait for the
 * caller.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define COPY_PIECE ((uint64_t)256 << 10)
#define COPY_PIECE_FRAMES (COPY_PIECE >> CTG_PAGE_SHIFT)
/* Memory that must stay available to others when the spill zone grows. */
#define COPY_RESERVE ((uint64_t)32 << 20)
#define COPY_CREDIT ((uint64_t)32 << 20)
/* How long a thread looks out for the next batch before it sleeps: batches of one take-back follow
 * each other at shorter intervals, and waking a thread takes longer than its share of the copy. */
#define COPY_LINGER_NS 100000

struct posix_copier {
	uint32_t taken; /* by one batch */
	uint32_t round; /* futex: raised when there is work, or the end */
	uint32_t done;  /* futex: threads that have left the current round */
	uint32_t next;  /* piece */
	bool end;
	int (*fn)(void *arg, size_t piece);
	void *arg;
	size_t nr;
	int error;
	unsigned nr_threads;
	struct copy_thread {
		struct posix_copier *copier;
		pthread_t thread;
		pid_t tid;
	} thread[POSIX_MAX_COPY_THREADS];
};

static void copy_wait(uint32_t *word, uint32_t expected)
{
	syscall(SYS_futex, word, FUTEX_WAIT | FUTEX_PRIVATE_FLAG, expected, NULL, NULL, 0);
}

static void copy_wake(uint32_t *word, int nr)
{
	syscall(SYS_futex, word, FUTEX_WAKE | FUTEX_PRIVATE_FLAG, nr, NULL, NULL, 0);
}

static void copy_pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
	for (int i = 0; i < 16; i++)
		__builtin_ia32_pause();
#else
	sched_yield();
#endif
}

static void copy_pieces(struct posix_copier *copier)
{
	for (;;) {
		size_t piece = __atomic_fetch_add(&copier->next, 1, __ATOMIC_RELAXED);
		int ret;

		if (piece >= copier->nr)
			return;
		ret = copier->fn(copier->arg, piece);
		if (ret != 0)
			__atomic_store_n(&copier->error, ret, __ATOMIC_RELAXED);
	}
}

static void *copy_main(void *arg)
{
	struct copy_thread *self = arg;
	struct posix_copier *copier = self->copier;
	uint64_t linger = 0;
	uint32_t seen = 0;

	__atomic_store_n(&self->tid, posix_gettid(), __ATOMIC_RELEASE);
	for (;;) {
		uint32_t round = __atomic_load_n(&copier->round, __ATOMIC_ACQUIRE);

		if (round == seen) {
			if (posix_now(NULL) < linger)
				copy_pause();
			else
				copy_wait(&copier->round, seen);
			continue;
		}
		seen = round;
		if (__atomic_load_n(&copier->end, __ATOMIC_ACQUIRE))
			return NULL;
		copy_pieces(copier);
		if (__atomic_add_fetch(&copier->done, 1, __ATOMIC_ACQ_REL) == copier->nr_threads)
			copy_wake(&copier->done, 1);
		linger = posix_now(NULL) + COPY_LINGER_NS;
	}
}

int posix_copier_start(struct ctg_region *region, unsigned threads)
{
	struct posix_copier *copier = calloc(1, sizeof(*copier));
	sigset_t all, old;

	if (copier == NULL)
		return -CTG_ENOMEM;
	region->copier = copier;
	/* The program's signals are not for these threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &old);
	while (copier->nr_threads + 1 < threads) {
		struct copy_thread *thread = &copier->thread[copier->nr_threads];

		thread->copier = copier;
		/* With fewer threads it is slower, not wrong. */
		if (pthread_create(&thread->thread, NULL, copy_main, thread) != 0)
			break;
		copier->nr_threads++;
	}
	pthread_sigmask(SIG_SETMASK, &old, NULL);
	return 0;
}

void posix_copier_end(struct ctg_region *region)
{
	struct posix_copier *copier = region->copier;

	if (copier == NULL)
		return;
	__atomic_store_n(&copier->end, true, __ATOMIC_RELEASE);
	__atomic_add_fetch(&copier->round, 1, __ATOMIC_RELEASE);
	copy_wake(&copier->round, POSIX_MAX_COPY_THREADS);
	for (unsigned i = 0; i < copier->nr_threads; i++)
		pthread_join(copier->thread[i].thread, NULL);
	free(copier);
	region->copier = NULL;
}

size_t posix_copier_tids(const struct ctg_region *region, pid_t *tids, size_t max)
{
	size_t n = 0;

	for (unsigned i = 0; i < region->copier->nr_threads && n < max; i++) {
		pid_t tid = __atomic_load_n(&region->copier->thread[i].tid, __ATOMIC_ACQUIRE);

		if (tid != 0)
			tids[n++] = tid;
	}
	return n;
}

int posix_copier_run(
	struct ctg_region *region, int (*fn)(void *arg, size_t piece), void *arg, size_t nr)
{
	struct posix_copier *copier = region->copier;
	uint32_t done;
	int ret = 0;

	if (nr < 2 || copier->nr_threads == 0 ||
		__atomic_exchange_n(&copier->taken, 1, __ATOMIC_ACQUIRE) != 0) {
		for (size_t i = 0; i < nr && ret == 0; i++)
			ret = fn(arg, i);
		return ret;
	}
	copier->fn = fn;
	copier->arg = arg;
	copier->nr = nr;
	copier->error = 0;
	copier->done = 0;
	__atomic_store_n(&copier->next, 0, __ATOMIC_RELAXED);
	__atomic_add_fetch(&copier->round, 1, __ATOMIC_RELEASE);
	copy_wake(&copier->round, (int)copier->nr_threads);
	copy_pieces(copier);
	while ((done = __atomic_load_n(&copier->done, __ATOMIC_ACQUIRE)) != copier->nr_threads)
		copy_wait(&copier->done, done);
	ret = copier->error;
	__atomic_store_n(&copier->taken, 0, __ATOMIC_RELEASE);
	return ret;
}

/* ---- copy -------------------------------------------------------------------------------- */

struct copy_job {
	struct ctg_region *region;
	const struct ctg_copy_run *runs;
	size_t nr;
	uint64_t piece_frames;
};

static int copy_run(struct ctg_region *region, ctg_pfn_t dst, ctg_pfn_t src, uint64_t nr)
{
	struct posix_store *to = posix_store_of(region, dst), *from = posix_store_of(region, src);
	size_t bytes = nr << CTG_PAGE_SHIFT;

	if (to->ops->write != NULL)
		return to->ops->write(to, dst, posix_store_address(from, src), bytes);
	memcpy(posix_store_address(to, dst), posix_store_address(from, src), bytes);
	return 0;
}

/* Piece number `piece` is the frames [piece, piece + 1) * piece_frames of all the runs in a row. */
static int copy_piece(void *arg, size_t piece)
{
	const struct copy_job *job = arg;
	uint64_t skip = piece * job->piece_frames, left = job->piece_frames;
	int ret = 0;

	for (size_t i = 0; i < job->nr && left > 0 && ret == 0; i++) {
		const struct ctg_copy_run *run = &job->runs[i];
		uint64_t n;

		if (skip >= run->nr) {
			skip -= run->nr;
			continue;
		}
		n = run->nr - skip < left ? run->nr - skip : left;
		ret = copy_run(job->region, run->dst + skip, run->src + skip, n);
		left -= n;
		skip = 0;
	}
	return ret;
}

/*
 * Is there memory for `bytes` more of a sparse store? Without asking, the kernel would look for a
 * victim instead of saying no. It is asked once in a while only; what is left of the last answer is
 * the store's credit.
 */
static int store_afford(struct posix_store *store, uint64_t bytes)
{
	uint64_t credit = __atomic_load_n(&store->credit, __ATOMIC_RELAXED);
	uint64_t available;

	if (credit < bytes) {
		available = posix_memory_available();
		if (available < bytes + COPY_RESERVE)
			return -CTG_ENOMEM;
		available -= COPY_RESERVE;
		credit = available < COPY_CREDIT + bytes ? available : COPY_CREDIT + bytes;
	}
	__atomic_store_n(&store->credit, credit - bytes, __ATOMIC_RELAXED);
	return 0;
}

int posix_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	struct copy_job job = {
		.region = host, .runs = runs, .nr = nr, .piece_frames = COPY_PIECE_FRAMES};
	struct posix_store *spill = &job.region->store[POSIX_FILE_SPILL];
	uint64_t frames = 0, grows = 0;
	int ret = 0;

	if (posix_self_stop_broken(job.region) ||
		__atomic_load_n(&job.region->orphaned, __ATOMIC_ACQUIRE))
		return -CTG_ENOMEM;
	for (size_t i = 0; i < nr; i++) {
		frames += runs[i].nr;
		if (posix_store_of(job.region, runs[i].dst) == spill)
			grows += runs[i].nr;
	}
	/* A huge page is made in one piece; a serial store by one thread. */
	if (grows > 0 && spill->map_order != 0)
		job.piece_frames = POSIX_CHUNK_FRAMES;
	else if (grows > 0 && spill->ops->serial)
		job.piece_frames = frames;
	if (grows > 0 && spill->ops->write != NULL)
		ret = store_afford(spill, grows << CTG_PAGE_SHIFT);
	if (ret == 0)
		ret = posix_copier_run(job.region, copy_piece, &job,
			(size_t)((frames + job.piece_frames - 1) / job.piece_frames));
	return ret;
}

/* ---- zero and discard -------------------------------------------------------------------- */

struct zero_job {
	unsigned char *addr;
	uint64_t bytes;
};

static int zero_piece(void *arg, size_t piece)
{
	const struct zero_job *job = arg;
	uint64_t at = piece * COPY_PIECE;

	memset(job->addr + at, 0, job->bytes - at < COPY_PIECE ? job->bytes - at : COPY_PIECE);
	return 0;
}

int posix_zero(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_region *region = host;
	struct posix_store *store = posix_store_of(region, pfn);
	struct zero_job job = {
		.addr = posix_store_address(store, pfn), .bytes = nr << CTG_PAGE_SHIFT};

	if (__atomic_load_n(&region->orphaned, __ATOMIC_ACQUIRE))
		return -CTG_ENOMEM;
	/* Punching a hole is how a sparse store is cleared, and it needs no memory. */
	if (store->ops->write != NULL) {
		posix_discard(host, pfn, nr);
		return store->ops->ensure == NULL ? 0 : store->ops->ensure(store, pfn, job.bytes);
	}
	return posix_copier_run(
		region, zero_piece, &job, (size_t)((job.bytes + COPY_PIECE - 1) / COPY_PIECE));
}

void posix_discard(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_region *region = host;
	struct posix_store *store = posix_store_of(region, pfn);
	uint64_t offset, run;

	if (__atomic_load_n(&region->orphaned, __ATOMIC_ACQUIRE))
		return;
	for (; nr > 0; pfn += run, nr -= run) {
		if (!posix_store_offset(store, pfn, nr, &offset, &run)) {
			run = 1;
			continue;
		}
		while (fallocate(store->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			       (off_t)offset, (off_t)(run << CTG_PAGE_SHIFT)) != 0 &&
			errno == EINTR)
			;
	}
}
