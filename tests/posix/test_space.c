/* SPDX-License-Identifier: MIT */
/*
 * Address spaces: their ranges, conversions between lent and ordinary memory under the eyes of
 * writers, and hooks whose operations fail. The space is this process's own, so what an operation
 * does is real; where a remote one's failure is wanted, its ops are replaced.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/*
 * A process whose own threads are stopped by the port cannot run the thread sanitizer's runtime,
 * which takes locks of its own in every access: a stopped thread may hold one.
 */
#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#endif
#endif
#ifndef THREAD_SANITIZER
#define THREAD_SANITIZER 0
#endif

#define MIB ((uint64_t)1 << 20)
#define AREA (32 * MIB)
#define HEAP (16 * MIB)

/* An assertion for threads that are not the test's own: cmocka cannot unwind those. */
#define require(cond)                                                                              \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #cond);         \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

struct fixture {
	struct ctg_region *region;
	struct posix_space *space;
	unsigned char *heap;
	uint64_t addr; /* of the heap */
	uint32_t stop;
};

static bool setup(struct fixture *f, const char *backing, bool force_stop)
{
	struct ctg_region_config config = {.backing = backing,
		.bytes = AREA,
		.spill_bytes = CTG_SPILL_DEFAULT,
		.force_stop = force_stop};
	struct ctg_region_info info;
	struct ctg_error error = {0};
	void *heap;
	int ret;

	*f = (struct fixture){0};
	if (force_stop && THREAD_SANITIZER) {
		print_message("skipped: not under the thread sanitizer\n");
		return false;
	}
	ret = ctg_region_open(&config, &f->region, &error);
	if (ret != 0 && backing != NULL) {
		print_message("skipped: %s\n", error.text);
		return false;
	}
	assert_int_equal(ret, 0);
	ctg_region_info(f->region, &info);
	if (!force_stop && strcmp(info.guard, "userfaultfd") != 0) {
		print_message("skipped: %s\n", info.guard_why);
		ctg_region_close(f->region);
		return false;
	}
	assert_int_equal(ctg_region_map(f->region, HEAP, &heap), 0);
	f->heap = heap;
	f->addr = (uint64_t)(uintptr_t)heap;
	f->space = f->region->local;
	return true;
}

static uint64_t lent(const struct fixture *f)
{
	struct ctg_cma_stat stat;

	ctg_cma_stat(ctg_region_area(f->region), &stat);
	return stat.nr_lent << CTG_PAGE_SHIFT;
}

static void teardown(struct fixture *f)
{
	assert_null(f->space->moving);
	assert_null(f->space->exclusive);
	assert_false(f->space->stopped);
	assert_int_equal(f->space->guarded, 0);
	for (unsigned i = 0; i < POSIX_MAX_UNSETTLED; i++)
		assert_int_equal(f->space->unsettled[i], 0);
	ctg_region_close(f->region);
}

/* ---- lists of ranges --------------------------------------------------------------------- */

#define UNIT ((uint64_t)4096)

/* The list against an array of what each page says. */
static void test_ranges(void **state)
{
	struct fixture f;
	struct posix_range *list = NULL;
	uint64_t model[64] = {0}; /* since, 0: not in the list */
	uint32_t seed = 7;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	for (uint64_t step = 1; step < 20000; step++) {
		uint64_t first, nr, since = UINT64_MAX, end;
		bool overlaps = false;

		seed = seed * 1103515245 + 12345;
		first = seed >> 8 & 63;
		nr = 1 + (seed >> 16) % (64 - first);
		end = first + nr;
		for (uint64_t i = first; i < end; i++) {
			overlaps |= model[i] != 0;
			if (model[i] != 0 && model[i] < since)
				since = model[i];
		}
		assert_int_equal(posix_ranges_overlap(list, first * UNIT, nr * UNIT), overlaps);
		if (!overlaps) {
			assert_int_equal(
				posix_ranges_add(f.space, &list, first * UNIT, nr * UNIT, step), 0);
			for (uint64_t i = first; i < end; i++)
				model[i] = step;
			continue;
		}
		assert_int_equal(
			posix_ranges_remove(f.space, &list, first * UNIT, nr * UNIT), since);
		for (uint64_t i = first; i < end; i++)
			model[i] = 0;
	}
	posix_ranges_remove(f.space, &list, 0, 64 * UNIT);
	assert_null(list);
	teardown(&f);
}

/* ---- conversions ------------------------------------------------------------------------- */

static bool is_private(const struct fixture *f, uint64_t at)
{
	return posix_space_is_private(f->space, f->addr + at);
}

/* Is it really ordinary memory? Lent memory is a shared mapping. */
static bool really_private(const void *addr)
{
	FILE *file = fopen("/proc/self/maps", "r");
	char line[512], perms[8];
	unsigned long start, stop;
	bool found = false, result = false;

	assert_non_null(file);
	while (!found && fgets(line, sizeof(line), file) != NULL) {
		assert_int_equal(sscanf(line, "%lx-%lx %7s", &start, &stop, perms), 3);
		found = (uintptr_t)addr >= start && (uintptr_t)addr < stop;
		result = found && perms[3] == 'p' && perms[1] == 'w';
	}
	fclose(file);
	assert_true(found);
	return result;
}

static void convert_there_and_back(const char *backing, bool force_stop)
{
	struct fixture f;
	unsigned char *wanted = malloc(HEAP);

	if (!setup(&f, backing, force_stop)) {
		free(wanted);
		skip();
		return;
	}
	for (uint64_t i = 0; i < HEAP; i++)
		f.heap[i] = (i >> 12) % 3 == 0 ? 0 : (unsigned char)(i * 31 >> 5);
	memcpy(wanted, f.heap, HEAP);
	assert_int_equal(posix_space_privatise(f.space, f.addr + 2 * MIB, 6 * MIB), 0);
	for (uint64_t at = 0; at < HEAP; at += 2 * MIB) {
		assert_int_equal(is_private(&f, at), at >= 2 * MIB && at < 8 * MIB);
		assert_int_equal(really_private(f.heap + at), is_private(&f, at));
	}
	assert_int_equal(lent(&f), HEAP - 6 * MIB);
	assert_memory_equal(f.heap, wanted, HEAP);
	/* All of it, whether it is already or not. */
	assert_int_equal(posix_space_privatise(f.space, f.addr, HEAP), 0);
	assert_int_equal(lent(&f), 0);
	assert_memory_equal(f.heap, wanted, HEAP);
	f.heap[5 * MIB] = wanted[5 * MIB] = 77;
	assert_int_equal(posix_space_lend(f.space, f.addr, HEAP), 0);
	assert_int_equal(lent(&f), HEAP);
	for (uint64_t at = 0; at < HEAP; at += 2 * MIB)
		assert_false(is_private(&f, at) || really_private(f.heap + at));
	assert_memory_equal(f.heap, wanted, HEAP);
	/* Lending what is lent already is a mistake of the caller's. */
	assert_int_equal(posix_space_lend(f.space, f.addr, 2 * MIB), -CTG_EINVAL);
	assert_memory_equal(f.heap, wanted, HEAP);
	free(wanted);
	teardown(&f);
}

struct writer {
	struct fixture *f;
	unsigned index;
	uint64_t laps;
};

/* Two threads write to each page, each its own words. */
static void *writer_main(void *arg)
{
	struct writer *w = arg;
	volatile uint64_t *words = (volatile uint64_t *)w->f->heap;

	while (__atomic_load_n(&w->f->stop, __ATOMIC_ACQUIRE) == 0) {
		for (uint64_t i = w->index; i < HEAP / 8; i += 64)
			words[i]++;
		w->laps++;
	}
	return NULL;
}

/* The kernel writes: a pipe is read into the last chunk. */
static void *reader_main(void *arg)
{
	struct writer *w = arg;
	unsigned char *to = w->f->heap + HEAP - 2 * MIB;
	uint64_t out = 0, in = 0;
	int fd[2];

	require(pipe(fd) == 0);
	while (__atomic_load_n(&w->f->stop, __ATOMIC_ACQUIRE) == 0) {
		uint64_t text[128], at = (out * 1664525 + 1013904223) % (2 * MIB - sizeof(text));

		for (unsigned i = 0; i < 128; i++)
			text[i] = out++;
		require(write(fd[1], text, sizeof(text)) == (ssize_t)sizeof(text));
		require(read(fd[0], to + at / 64 * 64 + 8, sizeof(text) - 64) ==
			(ssize_t)sizeof(text) - 64);
		require(memcmp(to + at / 64 * 64 + 8, text, sizeof(text) - 64) == 0);
		require(read(fd[0], text, 64) == 64);
		in += 120;
	}
	w->laps = in;
	close(fd[0]);
	close(fd[1]);
	return NULL;
}

static void convert_while_written(const char *backing, bool force_stop)
{
	struct fixture f;
	struct writer writer[2];
	pthread_t thread[2];
	unsigned done = 0, refused = 0;

	if (!setup(&f, backing, force_stop)) {
		skip();
		return;
	}
	memset(f.heap, 0, HEAP);
	for (unsigned i = 0; i < 2; i++) {
		writer[i] = (struct writer){.f = &f, .index = i};
		assert_int_equal(pthread_create(&thread[i], NULL, writer_main, &writer[i]), 0);
	}
	for (unsigned i = 0; i < 40; i++) {
		uint64_t at = i * 7 % 8 * 2 * MIB;
		int ret = is_private(&f, at) ? posix_space_lend(f.space, f.addr + at, 2 * MIB)
					     : posix_space_privatise(f.space, f.addr + at, 2 * MIB);

		/* A thread may not have been stopped in time. */
		assert_true(ret == 0 || ret == -CTG_EBUSY);
		done += ret == 0;
		refused += ret != 0;
		sched_yield();
	}
	__atomic_store_n(&f.stop, 1, __ATOMIC_RELEASE);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	assert_true(done > refused);
	for (unsigned t = 0; t < 2; t++)
		for (uint64_t i = t; i < HEAP / 8; i += 64)
			assert_int_equal(((uint64_t *)f.heap)[i], writer[t].laps);
	teardown(&f);
}

static void convert_while_read_into(const char *backing, bool force_stop)
{
	struct fixture f;
	struct writer writer;
	pthread_t thread;

	if (!setup(&f, backing, force_stop)) {
		skip();
		return;
	}
	writer = (struct writer){.f = &f};
	assert_int_equal(pthread_create(&thread, NULL, reader_main, &writer), 0);
	for (unsigned i = 0; i < 60; i++) {
		uint64_t at = HEAP - 2 * MIB;
		int ret = is_private(&f, at) ? posix_space_lend(f.space, f.addr + at, 2 * MIB)
					     : posix_space_privatise(f.space, f.addr + at, 2 * MIB);

		assert_true(ret == 0 || ret == -CTG_EBUSY);
		sched_yield();
	}
	__atomic_store_n(&f.stop, 1, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
	assert_true(writer.laps > 0);
	teardown(&f);
}

/* Conversions, take-backs and homecomings of the same memory at once. */
static void *taker_main(void *arg)
{
	struct writer *w = arg;

	while (__atomic_load_n(&w->f->stop, __ATOMIC_ACQUIRE) == 0) {
		struct ctg_buffer buffer;
		uint64_t moved;

		if (ctg_region_alloc(w->f->region, 20 * MIB, NULL, &buffer) != 0)
			continue;
		require(ctg_region_release(w->f->region, &buffer) == 0);
		ctg_migrate_home(ctg_region_machine(w->f->region), UINT64_MAX, &moved);
		w->laps++;
	}
	return NULL;
}

static void convert_while_taken(const char *backing, bool force_stop)
{
	struct fixture f;
	struct writer writer[2];
	pthread_t thread[2];

	if (!setup(&f, backing, force_stop)) {
		skip();
		return;
	}
	memset(f.heap, 0, HEAP);
	for (unsigned i = 0; i < 2; i++)
		writer[i] = (struct writer){.f = &f, .index = i};
	assert_int_equal(pthread_create(&thread[0], NULL, writer_main, &writer[0]), 0);
	assert_int_equal(pthread_create(&thread[1], NULL, taker_main, &writer[1]), 0);
	for (unsigned i = 0; i < 60; i++) {
		uint64_t at = i * 7 % 8 * 2 * MIB;
		int ret = is_private(&f, at) ? posix_space_lend(f.space, f.addr + at, 2 * MIB)
					     : posix_space_privatise(f.space, f.addr + at, 2 * MIB);

		/* -ENOMEM: the taker has what there is. */
		assert_true(ret == 0 || ret == -CTG_EBUSY || ret == -CTG_ENOMEM);
		sched_yield();
	}
	__atomic_store_n(&f.stop, 1, __ATOMIC_RELEASE);
	for (unsigned i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
	for (uint64_t i = 0; i < HEAP / 8; i += 64)
		assert_int_equal(((uint64_t *)f.heap)[i], writer[0].laps);
	teardown(&f);
}

#define CASE(fn, name, backing, force_stop)                                                        \
	static void test_##fn##_##name(void **state)                                               \
	{                                                                                          \
		(void)state;                                                                       \
		fn(backing, force_stop);                                                           \
	}
#define CASES(fn)                                                                                  \
	CASE(fn, uffd, NULL, false)                                                                \
	CASE(fn, stop, NULL, true)                                                                 \
	CASE(fn, hugetlb_uffd, "hugetlb", false)                                                   \
	CASE(fn, hugetlb_stop, "hugetlb", true)

CASES(convert_there_and_back)
CASES(convert_while_written)
CASES(convert_while_read_into)
CASES(convert_while_taken)

static void test_convert_bad_ranges(void **state)
{
	struct fixture f;
	int (*const fn[])(struct posix_space *, uint64_t, uint64_t) = {
		posix_space_privatise, posix_space_lend};

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	for (int i = 0; i < 2; i++) {
		assert_int_equal(fn[i](f.space, f.addr, 0), -CTG_EINVAL);
		assert_int_equal(fn[i](f.space, f.addr, 4096), -CTG_EINVAL);
		assert_int_equal(fn[i](f.space, f.addr + 4096, 2 * MIB), -CTG_EINVAL);
		assert_int_equal(fn[i](f.space, f.space->window - 2 * MIB, 2 * MIB), -CTG_EINVAL);
		assert_int_equal(fn[i](f.space, f.space->window, f.space->window_bytes + 2 * MIB),
			-CTG_EINVAL);
		assert_int_equal(fn[i](f.space, f.addr, UINT64_MAX - 2 * MIB + 1), -CTG_EINVAL);
		/* Nothing is mapped there. */
		assert_int_equal(fn[i](f.space, f.addr + HEAP, 2 * MIB), -CTG_EINVAL);
	}
	assert_int_equal(lent(&f), HEAP);
	teardown(&f);
}

/* The area is full: what could not be lent stays ordinary, and nothing is lost. */
static void test_lend_without_room(void **state)
{
	struct fixture f;
	struct ctg_buffer buffer;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	memset(f.heap, 3, HEAP);
	assert_int_equal(posix_space_privatise(f.space, f.addr, HEAP), 0);
	assert_int_equal(ctg_region_alloc(f.region, AREA - 6 * MIB, NULL, &buffer), 0);
	assert_int_equal(posix_space_lend(f.space, f.addr, HEAP), -CTG_ENOMEM);
	for (uint64_t at = 0; at < HEAP; at += 2 * MIB)
		assert_int_equal(is_private(&f, at), at >= 6 * MIB);
	for (uint64_t i = 0; i < HEAP; i++)
		assert_int_equal(f.heap[i], 3);
	assert_int_equal(lent(&f), 6 * MIB);
	teardown(&f);
}

/* ---- exclusion --------------------------------------------------------------------------- */

static void test_exclusive_is_not_moved(void **state)
{
	struct fixture f;
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct ctg_buffer buffer;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	assert_int_equal(posix_space_begin(f.space, f.addr, HEAP), 0);
	assert_int_equal(ctg_region_alloc(f.region, AREA - 4 * MIB, &request, &buffer), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PORT);
	posix_space_end(f.space, f.addr, HEAP);
	assert_int_equal(ctg_region_alloc(f.region, AREA - 4 * MIB, &request, &buffer), 0);
	teardown(&f);
}

static void *begin_main(void *arg)
{
	struct fixture *f = arg;

	require(posix_space_begin(f->space, f->addr, 4 * MIB) == 0);
	require(__atomic_load_n(&f->stop, __ATOMIC_ACQUIRE) == 1);
	posix_space_end(f->space, f->addr, 4 * MIB);
	return NULL;
}

/* A second one waits for the first, also where they overlap only in part; and death ends the
 * waiting. */
static void test_begin_waits(void **state)
{
	struct fixture f;
	pthread_t thread;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	assert_int_equal(posix_space_begin(f.space, f.addr + 2 * MIB, 4 * MIB), 0);
	assert_int_equal(posix_space_begin(f.space, f.addr + 6 * MIB, 2 * MIB), 0);
	assert_int_equal(pthread_create(&thread, NULL, begin_main, &f), 0);
	for (int i = 0; i < 100; i++)
		sched_yield();
	__atomic_store_n(&f.stop, 1, __ATOMIC_RELEASE);
	posix_space_end(f.space, f.addr + 2 * MIB, 4 * MIB);
	pthread_join(thread, NULL);
	posix_space_set_dead(f.space);
	assert_int_equal(posix_space_begin(f.space, f.addr, 2 * MIB), -CTG_EINTR);
	f.space->dead = false;
	posix_space_end(f.space, f.addr + 6 * MIB, 2 * MIB);
	teardown(&f);
}

/* ---- operations that fail ---------------------------------------------------------------- */

static struct {
	int (*ops)(struct posix_space *space, const struct posix_op *ops, size_t nr, int *err);
	unsigned calls, fail_at; /* operations; 0: none */
	unsigned fail_for;       /* so many in a row */
	int error;
	bool gone;
} faulty;

static int faulty_ops(struct posix_space *space, const struct posix_op *ops, size_t nr, int *err)
{
	if (faulty.gone)
		return -CTG_ENOENT;
	for (size_t i = 0; i < nr; i++) {
		faulty.calls++;
		if (faulty.fail_at != 0 && faulty.calls - faulty.fail_at < faulty.fail_for) {
			*err = faulty.error;
			return (int)i;
		}
		if (faulty.ops(space, &ops[i], 1, err) != 1)
			return (int)i;
	}
	return (int)nr;
}

static void make_faulty(struct fixture *f, unsigned fail_at)
{
	if (f->space->ops != faulty_ops)
		faulty.ops = f->space->ops;
	faulty.calls = 0;
	faulty.fail_at = fail_at;
	faulty.fail_for = 1;
	faulty.error = -CTG_ENOMEM;
	faulty.gone = false;
	f->space->ops = faulty_ops;
}

/* Each operation of a take-back fails in turn. */
static void take_with_failures(bool force_stop)
{
	struct fixture f;
	bool all_done = false;
	unsigned failed = 0;

	if (!setup(&f, NULL, force_stop)) {
		skip();
		return;
	}
	for (uint64_t i = 0; i < HEAP; i += 8)
		*(uint64_t *)(f.heap + i) = i * 11;
	for (unsigned fail_at = 1; !all_done; fail_at++) {
		struct ctg_buffer buffer;
		uint64_t moved;
		int ret;

		make_faulty(&f, fail_at);
		ret = ctg_region_alloc(f.region, 20 * MIB, NULL, &buffer);
		all_done = faulty.calls < fail_at;
		assert_true(ret == 0 || ret == -CTG_ENOMEM || ret == -CTG_EBUSY);
		failed += ret != 0;
		for (uint64_t i = 0; i < HEAP; i += 8)
			assert_int_equal(*(uint64_t *)(f.heap + i), i * 11);
		make_faulty(&f, 0);
		if (ret == 0)
			assert_int_equal(ctg_region_release(f.region, &buffer), 0);
		assert_int_equal(
			ctg_migrate_home(ctg_region_machine(f.region), UINT64_MAX, &moved), 0);
		assert_int_equal(lent(&f), HEAP);
		assert_null(f.space->moving);
		/* Writers are let in again. */
		for (uint64_t i = 0; i < HEAP; i += CTG_PAGE_SIZE)
			*(volatile uint64_t *)(f.heap + i) = i * 11;
	}
	print_message("%u operations failed a take-back\n", failed);
	teardown(&f);
}

static void test_take_with_failures_uffd(void **state)
{
	(void)state;
	take_with_failures(false);
}

static void test_take_with_failures_stop(void **state)
{
	(void)state;
	take_with_failures(true);
}

/* Each operation of a conversion fails in turn: the chunk is one or the other, whole. */
static void test_convert_with_failures(void **state)
{
	struct fixture f;
	bool there = true;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	memset(f.heap, 9, HEAP);
	for (unsigned fail_at = 1; fail_at < 12; fail_at++) {
		int ret;

		make_faulty(&f, fail_at);
		ret = there ? posix_space_privatise(f.space, f.addr, HEAP)
			    : posix_space_lend(f.space, f.addr, HEAP);
		assert_true(ret == 0 || ret == -CTG_ENOMEM);
		for (uint64_t at = 0; at < HEAP; at += 2 * MIB)
			assert_int_equal(really_private(f.heap + at), is_private(&f, at));
		for (uint64_t i = 0; i < HEAP; i++)
			assert_int_equal(f.heap[i], 9);
		memset(f.heap, 9, HEAP);
		make_faulty(&f, 0);
		for (uint64_t at = 0; at < HEAP; at += 2 * MIB)
			if (is_private(&f, at) != there)
				assert_int_equal((there ? posix_space_privatise : posix_space_lend)(
							 f.space, f.addr + at, 2 * MIB),
					0);
		assert_int_equal(lent(&f), there ? 0 : HEAP);
		there = !there;
	}
	teardown(&f);
}

/*
 * A call with more operations than go into one message may fail at the first only: what has been
 * mapped may have been written to. Later ones are tried again until they succeed.
 */
static void test_install_fails_at_first_only(void **state)
{
	struct fixture f;
	ctg_vpn_t vpn;
	void *p;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	/* Even pages first, then odd ones: no two neighbours have consecutive frames. */
	assert_int_equal(ctg_region_map(f.region, 2 * MIB, &p), 0);
	vpn = (uint64_t)(uintptr_t)p >> CTG_PAGE_SHIFT;
	assert_int_equal(ctg_madvise_dontneed(f.space->mm, vpn, 512), 0);
	for (unsigned odd = 0; odd < 2; odd++)
		for (unsigned i = odd; i < 512; i += 2)
			assert_int_equal(ctg_mm_populate(f.space->mm, vpn + i, 1, NULL), 0);
	for (uint64_t i = 0; i < 2 * MIB; i++)
		((unsigned char *)p)[i] = (unsigned char)(i >> 12);
	make_faulty(&f, 0);
	assert_int_equal(ctg_mprotect(f.space->mm, vpn, 512, CTG_PROT_READ), 0);
	assert_true(faulty.calls >= 2 * POSIX_MAX_OPS);
	make_faulty(&f, POSIX_MAX_OPS + 1);
	assert_int_equal(ctg_mprotect(f.space->mm, vpn, 512, CTG_PROT_READ | CTG_PROT_WRITE), 0);
	assert_true(faulty.calls >= faulty.fail_at);
	for (uint64_t i = 0; i < 2 * MIB; i++) {
		assert_int_equal(((unsigned char *)p)[i], (unsigned char)(i >> 12));
		((unsigned char *)p)[i] = 1;
	}
	/* At the first it may, and then everything is as it was. */
	make_faulty(&f, 0);
	assert_int_equal(ctg_mprotect(f.space->mm, vpn, 512, CTG_PROT_READ), 0);
	make_faulty(&f, 1);
	faulty.fail_for = 3; /* putting back may not */
	assert_int_equal(
		ctg_mprotect(f.space->mm, vpn, 512, CTG_PROT_READ | CTG_PROT_WRITE), -CTG_ENOMEM);
	make_faulty(&f, 0);
	for (uint64_t i = 0; i < 2 * MIB; i++)
		assert_int_equal(((unsigned char *)p)[i], 1);
	teardown(&f);
}

/* The process goes away in the middle: hooks succeed, frames come back. */
static void test_death(void **state)
{
	struct fixture f;
	struct ctg_buffer buffer;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	memset(f.heap, 1, HEAP);
	make_faulty(&f, 0);
	faulty.gone = true;
	assert_int_equal(ctg_region_alloc(f.region, 20 * MIB, NULL, &buffer), 0);
	assert_true(f.space->dead);
	assert_int_equal(posix_space_privatise(f.space, f.addr, 2 * MIB), -CTG_EINTR);
	assert_int_equal(
		ctg_munmap(f.space->mm, f.addr >> CTG_PAGE_SHIFT, HEAP >> CTG_PAGE_SHIFT), 0);
	assert_int_equal(lent(&f), 0);
	assert_int_equal(ctg_region_release(f.region, &buffer), 0);
	teardown(&f);
}

static int ping_answer;
static int ping(struct posix_space *space)
{
	(void)space;
	return ping_answer;
}

/* Who does not answer is not moved, and not waited for. */
static void test_ping(void **state)
{
	struct fixture f;
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct ctg_buffer buffer;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	f.space->ping = ping;
	ping_answer = -CTG_EBUSY;
	assert_int_equal(ctg_region_alloc(f.region, 20 * MIB, &request, &buffer), -CTG_EBUSY);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PORT);
	ping_answer = 0;
	assert_int_equal(ctg_region_alloc(f.region, 20 * MIB, &request, &buffer), 0);
	assert_int_equal(ctg_region_release(f.region, &buffer), 0);
	teardown(&f);
}

static void test_stall_is_measured(void **state)
{
	struct fixture f;
	struct ctg_buffer buffer;

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	assert_int_equal(posix_space_stall(f.space, false), 0);
	assert_int_equal(ctg_region_alloc(f.region, 20 * MIB, NULL, &buffer), 0);
	assert_true(posix_space_stall(f.space, true) > 0);
	assert_int_equal(posix_space_stall(f.space, false), 0);
	teardown(&f);
}

static void test_bad_spaces(void **state)
{
	struct fixture f;
	struct posix_space space = {.window = 2 * MIB, .window_bytes = 2 * MIB};

	(void)state;
	if (!setup(&f, NULL, true)) {
		skip();
		return;
	}
	assert_int_equal(posix_space_init(&space, f.region), -CTG_EINVAL); /* no ops */
	space.ops = f.space->ops;
	space.window_bytes = 0;
	assert_int_equal(posix_space_init(&space, f.region), -CTG_EINVAL);
	space.window_bytes = MIB;
	assert_int_equal(posix_space_init(&space, f.region), -CTG_EINVAL);
	space.window_bytes = UINT64_MAX - 2 * MIB + 1;
	assert_int_equal(posix_space_init(&space, f.region), -CTG_EINVAL);
	space.window = (uint64_t)1 << 48;
	space.window_bytes = 2 * MIB;
	assert_int_equal(posix_space_init(&space, f.region), -CTG_EINVAL);
	space.window = ((uint64_t)1 << 48) - 2 * MIB;
	assert_int_equal(posix_space_init(&space, f.region), 0);
	posix_space_destroy(&space, true);
	teardown(&f);
}

#define TESTS(fn)                                                                                  \
	cmocka_unit_test(test_##fn##_uffd), cmocka_unit_test(test_##fn##_stop),                    \
		cmocka_unit_test(test_##fn##_hugetlb_uffd),                                        \
		cmocka_unit_test(test_##fn##_hugetlb_stop)

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_ranges),
		TESTS(convert_there_and_back),
		TESTS(convert_while_written),
		TESTS(convert_while_read_into),
		TESTS(convert_while_taken),
		cmocka_unit_test(test_convert_bad_ranges),
		cmocka_unit_test(test_lend_without_room),
		cmocka_unit_test(test_exclusive_is_not_moved),
		cmocka_unit_test(test_begin_waits),
		cmocka_unit_test(test_take_with_failures_uffd),
		cmocka_unit_test(test_take_with_failures_stop),
		cmocka_unit_test(test_convert_with_failures),
		cmocka_unit_test(test_install_fails_at_first_only),
		cmocka_unit_test(test_death),
		cmocka_unit_test(test_ping),
		cmocka_unit_test(test_stall_is_measured),
		cmocka_unit_test(test_bad_spaces),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
