/* SPDX-License-Identifier: MIT */
/*
 * Take-backs from a region that this very process lives in, while its threads write to the memory
 * and the kernel writes to it for them. Each writer knows what it has written, so a lost write, a
 * doubled one, or an EFAULT is seen. Every case runs with both guards.
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
#include <grp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/wait.h>
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
#define HEAP (28 * MIB)
#define TAKE (20 * MIB)
#define ROUNDS 12

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
	unsigned char *heap;
	uint32_t stop;
	unsigned takes; /* that moved something */
};

/* false: not here, and why. */
static bool open_region(struct fixture *f, const char *backing, bool force_stop)
{
	struct ctg_region_config config = {.backing = backing,
		.bytes = AREA,
		.spill_bytes = CTG_SPILL_DEFAULT,
		.force_stop = force_stop};
	struct ctg_region_info info;
	struct ctg_cma_stat stat;
	struct ctg_error error = {0};
	void *heap;
	int ret;

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
	ctg_cma_stat(ctg_region_area(f->region), &stat);
	if (stat.longest_unallocated < TAKE >> CTG_PAGE_SHIFT) {
		print_message("skipped: no physical run is long enough\n");
		ctg_region_close(f->region);
		return false;
	}
	ctg_region_info(f->region, &info);
	if (!force_stop && strcmp(info.guard, "userfaultfd") != 0) {
		print_message("skipped: %s\n", info.guard_why);
		ctg_region_close(f->region);
		return false;
	}
	assert_int_equal(ctg_region_map(f->region, HEAP, &heap), 0);
	f->heap = heap;
	memset(heap, 0, HEAP);
	return true;
}

static void close_region(struct fixture *f)
{
	struct ctg_cma_stat stat;

	assert_int_equal(ctg_region_unmap(f->region, f->heap, HEAP), 0);
	ctg_cma_stat(ctg_region_area(f->region), &stat);
	assert_int_equal(stat.nr_allocated, 0);
	assert_int_equal(stat.nr_free, AREA >> CTG_PAGE_SHIFT);
	ctg_region_close(f->region);
}

/* Take a buffer, see that it is zero and stays ours, give it back, let what was displaced home. */
static void take_once(struct fixture *f)
{
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct ctg_buffer buffer;
	uint64_t *words, moved;
	int ret = ctg_region_alloc(f->region, TAKE, &request, &buffer);

	/* What runs beside may hold a lock or a page at a bad moment; it is tried again. */
	if (ret == -CTG_EBUSY || ret == -CTG_ENOMEM)
		return;
	assert_int_equal(ret, 0);
	f->takes += report.frames_moved > 0;
	words = buffer.address;
	for (uint64_t i = 0; i < TAKE / sizeof(*words); i += 64)
		assert_int_equal(words[i], 0);
	memset(buffer.address, 0xa5, TAKE);
	sched_yield();
	for (uint64_t i = 0; i < TAKE / sizeof(*words); i += 512)
		assert_int_equal(words[i], UINT64_C(0xa5a5a5a5a5a5a5a5));
	assert_int_equal(ctg_region_release(f->region, &buffer), 0);
	ctg_migrate_home(ctg_region_machine(f->region), UINT64_MAX, &moved);
}

static bool stopped(const struct fixture *f)
{
	return __atomic_load_n(&f->stop, __ATOMIC_ACQUIRE) != 0;
}

/* Take-backs until enough of them have moved something, while `nr` threads run. */
static void take_while(struct fixture *f, void *(*fn)(void *), void *arg, size_t size, unsigned nr)
{
	pthread_t thread[4];
	uint64_t end = posix_now(NULL) + UINT64_C(20000000000);

	for (unsigned i = 0; i < nr; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, fn, (char *)arg + i * size), 0);
	while (f->takes < ROUNDS && posix_now(NULL) < end)
		take_once(f);
	__atomic_store_n(&f->stop, 1, __ATOMIC_RELEASE);
	for (unsigned i = 0; i < nr; i++)
		assert_int_equal(pthread_join(thread[i], NULL), 0);
	assert_true(f->takes >= ROUNDS);
}

/* ---- user-mode writers ------------------------------------------------------------------- */

struct counter {
	struct fixture *f;
	unsigned index, of;
	uint64_t laps;
};

#define STRIDE 32u /* words: 16 counters a page */

/* Each thread has its own words of every page, so that two write to one page at a time. */
static void *count_main(void *arg)
{
	struct counter *c = arg;
	volatile uint64_t *words = (volatile uint64_t *)c->f->heap;

	while (!stopped(c->f)) {
		for (uint64_t i = c->index; i < HEAP / 8; i += STRIDE)
			words[i]++;
		c->laps++;
	}
	return NULL;
}

static bool writers(const char *backing, bool force_stop)
{
	struct fixture f = {0};
	struct counter counter[2];

	if (!open_region(&f, backing, force_stop))
		return false;
	for (unsigned i = 0; i < 2; i++)
		counter[i] = (struct counter){.f = &f, .index = i};
	take_while(&f, count_main, counter, sizeof(counter[0]), 2);
	for (unsigned t = 0; t < 2; t++) {
		const uint64_t *words = (const uint64_t *)f.heap;

		assert_true(counter[t].laps > 0);
		for (uint64_t i = t; i < HEAP / 8; i += STRIDE)
			assert_int_equal(words[i], counter[t].laps);
	}
	close_region(&f);
	return true;
}

/* ---- the kernel writes ------------------------------------------------------------------- */

struct stream {
	struct fixture *f;
	int fd[2];
	uint64_t words;         /* read and verified */
	uint64_t offset, bytes; /* of the heap: what it reads into */
	bool socket;
};

/* A sequence of words into one end of a pipe or socket... */
static void *feed_main(void *arg)
{
	struct stream *s = arg;
	uint64_t next = 0, buf[512];

	for (;;) {
		size_t at = 0;

		for (unsigned i = 0; i < 512; i++)
			buf[i] = next++;
		while (at < sizeof(buf)) {
			ssize_t n = write(s->fd[1], (char *)buf + at, sizeof(buf) - at);

			if (n < 0)
				return NULL; /* EPIPE: the reader has finished */
			at += (size_t)n;
		}
	}
}

/* ... and out of the other, into lent memory, in pieces that end anywhere in a page. */
static void *drain_main(void *arg)
{
	struct stream *s = arg;
	uint64_t at = 0, expect = 0;
	pthread_t feeder;

	require(pthread_create(&feeder, NULL, feed_main, s) == 0);
	while (!stopped(s->f)) {
		uint64_t want = 8 * (1 + (expect * 7919) % 1500), got = 0;
		unsigned char *to = s->f->heap + s->offset;

		if (at + want > s->bytes)
			at = 0;
		while (got < want) {
			ssize_t n = s->socket ? recv(s->fd[0], to + at + got, want - got, 0)
					      : read(s->fd[0], to + at + got, want - got);

			if (n < 0)
				require(errno == EINTR);
			else
				got += (uint64_t)n;
		}
		for (uint64_t i = 0; i < want / 8; i++) {
			uint64_t word;

			memcpy(&word, to + at + i * 8, 8);
			require(word == expect);
			expect++;
		}
		at += want;
	}
	s->words = expect;
	close(s->fd[0]);
	pthread_join(feeder, NULL);
	close(s->fd[1]);
	return NULL;
}

static bool streams(const char *backing, bool force_stop)
{
	struct fixture f = {0};
	struct stream stream[2];

	if (!open_region(&f, backing, force_stop))
		return false;
	for (unsigned i = 0; i < 2; i++) {
		stream[i] = (struct stream){
			.f = &f, .offset = i * (HEAP / 2), .bytes = HEAP / 2, .socket = i == 1};
		if (stream[i].socket)
			assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM, 0, stream[i].fd), 0);
		else
			assert_int_equal(pipe(stream[i].fd), 0);
	}
	take_while(&f, drain_main, stream, sizeof(stream[0]), 2);
	for (unsigned i = 0; i < 2; i++)
		assert_true(stream[i].words > 1000);
	close_region(&f);
	return true;
}

/* getrandom fills a page with what nobody else knows: a hash kept outside tells if it stays. */
struct dice {
	struct fixture *f;
	uint64_t sum[HEAP / CTG_PAGE_SIZE / 8];
};

static uint64_t page_sum(const unsigned char *page)
{
	uint64_t sum = 14695981039346656037u;

	for (unsigned i = 0; i < CTG_PAGE_SIZE; i += 8) {
		uint64_t word;

		memcpy(&word, page + i, 8);
		sum = (sum ^ word) * 1099511628211u;
	}
	return sum;
}

static void *dice_main(void *arg)
{
	struct dice *d = arg;
	uint64_t pages = sizeof(d->sum) / sizeof(d->sum[0]);

	for (uint64_t i = 0; !stopped(d->f); i = (i + 1) % pages) {
		unsigned char *page = d->f->heap + i * 8 * CTG_PAGE_SIZE;

		if (d->sum[i] != 0)
			require(page_sum(page) == d->sum[i]);
		require(getrandom(page, CTG_PAGE_SIZE, 0) == CTG_PAGE_SIZE);
		d->sum[i] = page_sum(page);
	}
	return NULL;
}

static bool randoms(const char *backing, bool force_stop)
{
	struct fixture f = {0};
	struct dice *d = calloc(1, sizeof(*d));

	assert_non_null(d);
	d->f = &f;
	if (!open_region(&f, backing, force_stop)) {
		free(d);
		return false;
	}
	take_while(&f, dice_main, d, 0, 1);
	for (uint64_t i = 0; i < sizeof(d->sum) / sizeof(d->sum[0]); i++)
		if (d->sum[i] != 0)
			assert_int_equal(page_sum(f.heap + i * 8 * CTG_PAGE_SIZE), d->sum[i]);
	close_region(&f);
	free(d);
	return true;
}

/* ---- others use the core meanwhile ------------------------------------------------------- */

/*
 * Maps and unmaps beside the take-backs. Under POSIX_GUARD_STOP these threads are stopped with
 * locks of the core held, which the mover must survive.
 */
static void *churn_main(void *arg)
{
	struct counter *c = arg;

	while (!stopped(c->f)) {
		void *p;
		int ret = ctg_region_map(c->f->region, 2 * MIB, &p);

		if (ret != 0) {
			require(ret == -CTG_ENOMEM);
			continue;
		}
		for (uint64_t i = 0; i < 2 * MIB; i += CTG_PAGE_SIZE) {
			require(((unsigned char *)p)[i] == 0);
			((unsigned char *)p)[i] = 1;
		}
		require(ctg_region_unmap(c->f->region, p, 2 * MIB) == 0);
		c->laps++;
	}
	return NULL;
}

static bool churn(const char *backing, bool force_stop)
{
	struct fixture f = {0};
	struct counter counter[2];

	if (!open_region(&f, backing, force_stop))
		return false;
	for (unsigned i = 0; i < 2; i++)
		counter[i] = (struct counter){.f = &f};
	take_while(&f, churn_main, counter, sizeof(counter[0]), 2);
	assert_true(counter[0].laps + counter[1].laps > 0);
	close_region(&f);
	return true;
}

#define CASE(fn, name, backing, force_stop)                                                        \
	static void test_##fn##_##name(void **state)                                               \
	{                                                                                          \
		(void)state;                                                                       \
		if (!fn(backing, force_stop))                                                      \
			skip();                                                                    \
	}
#define CASES(fn)                                                                                  \
	CASE(fn, uffd, NULL, false)                                                                \
	CASE(fn, stop, NULL, true)                                                                 \
	CASE(fn, hugetlb_uffd, "hugetlb", false)                                                   \
	CASE(fn, hugetlb_stop, "hugetlb", true)

CASES(writers)
CASES(streams)
CASES(randoms)
CASES(churn)

/* ---- a stop that is broken ------------------------------------------------------------------ */

/*
 * Under POSIX_GUARD_STOP a mover that has to wait for a lock lets the others go on, because one of
 * them may hold it. Here every batch has to, before its copy or after it.
 */
static struct {
	int (*copy)(void *host, const struct ctg_copy_run *runs, size_t nr);
	struct fixture *f;
	const struct counter *counter;
	bool before, after;
	unsigned calls, refused;
} broken;

/* Wait as for a lock, until the writer has been seen to write. */
static void wait_for_writer(const struct ctg_port *port)
{
	uint64_t end = posix_now(NULL) + UINT64_C(5000000000);
	struct ctg_word32 word = {1};
	const uint64_t *words = (const uint64_t *)broken.f->heap;
	uint64_t first = __atomic_load_n(&words[0], __ATOMIC_RELAXED);

	while (__atomic_load_n(&words[0], __ATOMIC_RELAXED) == first) {
		require(posix_now(NULL) < end);
		port->wait(port->host, &word, 1, posix_now(NULL) + 1000000, false);
	}
}

static int broken_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	const struct ctg_port *port = ctg_port_of(ctg_region_machine(broken.f->region));
	int ret;

	broken.calls++;
	if (broken.before)
		wait_for_writer(port);
	ret = broken.copy(host, runs, nr);
	broken.refused += ret != 0;
	if (broken.after)
		wait_for_writer(port);
	return ret;
}

static void break_stop(bool before, bool after)
{
	struct fixture f = {0};
	struct counter counter = {.f = &f};
	struct ctg_port *port;
	struct ctg_buffer buffer;
	pthread_t thread;

	if (!open_region(&f, NULL, true)) {
		skip();
		return;
	}
	port = (struct ctg_port *)(uintptr_t)ctg_port_of(ctg_region_machine(f.region));
	broken.copy = port->copy;
	broken.f = &f;
	broken.before = before;
	broken.after = after;
	broken.calls = broken.refused = 0;
	port->copy = broken_copy;
	assert_int_equal(pthread_create(&thread, NULL, count_main, &counter), 0);
	assert_true(ctg_region_alloc(f.region, TAKE, NULL, &buffer) < 0);
	assert_true(broken.calls > 0);
	assert_int_equal(broken.refused, before ? broken.calls : 0);
	/* Without the waiting it works. */
	broken.before = broken.after = false;
	take_once(&f);
	__atomic_store_n(&f.stop, 1, __ATOMIC_RELEASE);
	pthread_join(thread, NULL);
	for (uint64_t i = 0; i < HEAP / 8; i += STRIDE)
		assert_int_equal(((uint64_t *)f.heap)[i], counter.laps);
	assert_int_equal(f.takes, 1);
	close_region(&f);
}

static void test_stop_is_broken_before_the_copy(void **state)
{
	(void)state;
	break_stop(true, false);
}

static void test_stop_is_broken_after_the_copy(void **state)
{
	(void)state;
	break_stop(false, true);
}

/* ---- the calls themselves ---------------------------------------------------------------- */

static void test_bad_calls(void **state)
{
	struct fixture f = {0};
	struct ctg_buffer buffer, other;
	void *p;

	(void)state;
	if (!open_region(&f, NULL, true)) {
		skip();
		return;
	}
	assert_int_equal(ctg_region_map(f.region, 0, &p), -CTG_EINVAL);
	assert_int_equal(ctg_region_map(f.region, 100, &p), -CTG_EINVAL);
	assert_int_equal(ctg_region_map(f.region, AREA + MIB, &p), -CTG_ENOMEM);
	assert_int_equal(ctg_region_map(f.region, AREA - HEAP + MIB, &p), -CTG_ENOMEM);
	assert_int_equal(ctg_region_unmap(f.region, f.heap, 0), -CTG_EINVAL);
	assert_int_equal(ctg_region_unmap(f.region, f.heap + 1, CTG_PAGE_SIZE), -CTG_EINVAL);
	assert_int_equal(ctg_region_unmap(f.region, &f, CTG_PAGE_SIZE), -CTG_EINVAL);
	assert_int_equal(ctg_region_unmap(f.region, f.heap, SIZE_MAX / 4096 * 4096), -CTG_EINVAL);
	assert_int_equal(ctg_region_alloc(f.region, 0, NULL, &buffer), -CTG_EINVAL);
	assert_int_equal(ctg_region_alloc(f.region, UINT64_MAX, NULL, &buffer), -CTG_EINVAL);
	assert_int_equal(ctg_region_alloc(f.region, AREA + 1, NULL, &buffer), -CTG_ENOMEM);
	assert_int_equal(ctg_region_release(f.region, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_region_alloc(f.region, 1, NULL, &buffer), 0);
	assert_int_equal(buffer.bytes, CTG_PAGE_SIZE);
	other = buffer;
	other.pfn++;
	assert_int_equal(ctg_region_release(f.region, &other), -CTG_EINVAL);
	assert_int_equal(ctg_region_release(f.region, &buffer), 0);
	assert_int_equal(ctg_region_release(f.region, &buffer), -CTG_EINVAL);
	close_region(&f);
}

/* What the caller hands in may itself lie in the memory that moves. */
static void test_report_in_lent_memory(void **state)
{
	struct fixture f = {0};

	(void)state;
	if (!open_region(&f, NULL, false)) {
		skip();
		return;
	}
	for (uint64_t at = 0; at < HEAP; at += HEAP / 8) {
		struct ctg_alloc_report *report = (void *)(f.heap + at);
		struct ctg_alloc_request *request = (void *)(f.heap + at + 1024);
		struct ctg_buffer *buffer = (void *)(f.heap + at + 2048);

		*request = (struct ctg_alloc_request){.report = report};
		assert_int_equal(ctg_region_alloc(f.region, TAKE, request, buffer), 0);
		assert_int_equal(report->result, 0);
		assert_int_equal(ctg_region_release(f.region, buffer), 0);
		ctg_migrate_home(ctg_region_machine(f.region), UINT64_MAX, &(uint64_t){0});
	}
	close_region(&f);
}

/* Parts of a mapping can go, and their addresses are used again. */
static void test_addresses_are_reused(void **state)
{
	struct fixture f = {0};
	void *first, *again;

	(void)state;
	if (!open_region(&f, NULL, true)) {
		skip();
		return;
	}
	for (int i = 0; i < 3000; i++) {
		assert_int_equal(ctg_region_map(f.region, 3 * CTG_PAGE_SIZE, &again), 0);
		if (i == 0)
			first = again;
		assert_ptr_equal(again, first);
		assert_int_equal(
			ctg_region_unmap(f.region, (char *)again + CTG_PAGE_SIZE, CTG_PAGE_SIZE),
			0);
		assert_int_equal(ctg_region_unmap(f.region, again, CTG_PAGE_SIZE), 0);
		assert_int_equal(ctg_region_unmap(f.region, (char *)again + 2 * CTG_PAGE_SIZE,
					 CTG_PAGE_SIZE),
			0);
	}
	close_region(&f);
}

/* A child does not share what the parent's region lends: it has nothing at those addresses. */
static void test_fork_shares_nothing(void **state)
{
	struct fixture f = {0};
	int status;
	pid_t pid;

	(void)state;
	if (!open_region(&f, NULL, true)) {
		skip();
		return;
	}
	pid = fork();
	if (pid == 0) {
		unsigned char vec[1];
		void *direct = ctg_region_address(f.region, f.region->store[0].base);

		_exit(mincore(f.heap, CTG_PAGE_SIZE, vec) == -1 &&
					mincore(direct, CTG_PAGE_SIZE, vec) == -1
				? 0
				: 1);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
	close_region(&f);
}

/* All of it again without privileges, in a process of its own. */
static void run_as_nobody(bool (*fn)(const char *, bool))
{
	int status;
	pid_t pid;

	if (geteuid() != 0) {
		print_message("skipped: already an ordinary user\n");
		skip();
		return;
	}
	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		if (setgroups(0, NULL) != 0 || setresgid(65534, 65534, 65534) != 0 ||
			setresuid(65534, 65534, 65534) != 0)
			_exit(99);
		prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
		_exit(fn(NULL, true) ? 0 : 77);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		skip();
	assert_int_equal(status, 0);
}

static void test_nobody_writers(void **state)
{
	(void)state;
	run_as_nobody(writers);
}

static void test_nobody_streams(void **state)
{
	(void)state;
	run_as_nobody(streams);
}

#define TESTS(fn)                                                                                  \
	cmocka_unit_test(test_##fn##_uffd), cmocka_unit_test(test_##fn##_stop),                    \
		cmocka_unit_test(test_##fn##_hugetlb_uffd),                                        \
		cmocka_unit_test(test_##fn##_hugetlb_stop)

int main(void)
{
	const struct CMUnitTest tests[] = {
		TESTS(writers),
		TESTS(streams),
		TESTS(randoms),
		TESTS(churn),
		cmocka_unit_test(test_stop_is_broken_before_the_copy),
		cmocka_unit_test(test_stop_is_broken_after_the_copy),
		cmocka_unit_test(test_bad_calls),
		cmocka_unit_test(test_report_in_lent_memory),
		cmocka_unit_test(test_addresses_are_reused),
		cmocka_unit_test(test_fork_shares_nothing),
		cmocka_unit_test(test_nobody_writers),
		cmocka_unit_test(test_nobody_streams),
	};

	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests(tests, NULL, NULL);
}
