/* SPDX-License-Identifier: MIT */
/* Sessions: what borrowers do, what is done to them, and that every frame is back at the end. */
#define _GNU_SOURCE
#include "borrower.h"
#include "client.h"
#include "state.h"

#include <dirent.h>
#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define NAME "test"
#define MIB ((uint64_t)1 << 20)
#define AREA_BYTES (64 * MIB)
#define AREA_CHUNKS (AREA_BYTES / POSIX_CHUNK)

static char runtime[64];
static struct ctg_server *server;

/* ---- the region -------------------------------------------------------------------------------
 */

static int start(const char *backing, bool force_stop)
{
	const struct ctg_server_config config = {
		.name = NAME,
		.region = {.backing = backing,
			.bytes = AREA_BYTES,
			.spill_bytes = CTG_SPILL_DEFAULT,
			.force_stop = force_stop},
	};
	struct ctg_error error;
	int err = ctg_server_start(&config, &server, &error);

	if (err != 0)
		print_message("%s\n", error.text);
	return err;
}

static int setup_uffd(void **state)
{
	return start(NULL, false);
}

static int setup_stop(void **state)
{
	return start(NULL, true);
}

/* Huge pages may not be had here: then the test skips (NEED_GUARD). */
static int setup_hugetlb(void **state)
{
	int err = start("hugetlb", false);

	return err == -ENOMEM || err == -EPERM || err == -ENOSYS ? 0 : err;
}

static struct ctg_cma_stat area(void)
{
	struct ctg_cma_stat stat;

	ctg_cma_stat(ctg_region_area(ctg_server_region(server)), &stat);
	return stat;
}

/* As much as that, or as a buffer can have: physical memory may come in short runs. */
static uint64_t at_most(uint64_t bytes)
{
	uint64_t longest = area().longest_unallocated << CTG_PAGE_SHIFT;

	return bytes < longest ? bytes : longest;
}

static bool all_free(void)
{
	struct ctg_cma_stat stat = area();
	struct ctg_region_info info;

	ctg_region_info(ctg_server_region(server), &info);
	return stat.nr_free == stat.nr && stat.nr_allocated == 0 && info.spill_used_bytes == 0;
}

/* Nobody is left, and neither is a frame of theirs, once the server has seen that they have gone.
 */
static void assert_all_free(void)
{
	assert_int_equal(ctg_server_wait_idle(server, posix_now(NULL) + 20000000000u), 0);
	for (unsigned i = 0; i < 10000 && !all_free(); i++)
		usleep(1000);
	assert_true(all_free());
}

static int teardown(void **state)
{
	ctg_server_stop(server);
	server = NULL;
	return 0;
}

/* Skips the test where writers can be kept out in neither way. */
static bool can_guard(void)
{
	struct posix_stopper *stopper;

	if (server == NULL)
		return false;
	if (ctg_server_region(server)->guard == POSIX_GUARD_STOP) {
		if (posix_region_stopper(ctg_server_region(server), &stopper) == 0)
			return true;
		print_message("skipped: threads cannot be stopped here\n");
		return false;
	}
	return true;
}
#define NEED_GUARD()                                                                               \
	do {                                                                                       \
		if (!can_guard())                                                                  \
			skip();                                                                    \
	} while (0)

/* ---- a taker ----------------------------------------------------------------------------------
 */

static json_t *ask(struct ctg_client *client, json_t *request)
{
	struct ctg_error error;
	json_t *answer;

	assert_non_null(request);
	if (ctg_client_call(client, request, &answer, NULL, &error) != 0)
		fail_msg("%s", error.text);
	json_decref(request);
	return answer;
}

static struct ctg_client *dial(void)
{
	struct ctg_client *client;
	struct ctg_error error;

	if (ctg_client_connect(NAME, &client, &error) != 0)
		fail_msg("%s", error.text);
	return client;
}

/* Take so many bytes: the lease's number, or the negative error. *text: of a failure. */
static json_int_t take(struct ctg_client *client, uint64_t bytes, bool hold, char *text)
{
	json_t *answer = ask(client, json_pack("{s:s, s:I, s:b}", "do", "alloc", "bytes",
					     (json_int_t)bytes, "hold", (int)hold));
	bool ok = json_is_true(json_object_get(answer, "ok"));
	json_int_t n = json_integer_value(json_object_get(answer, ok ? "lease" : "error"));

	if (!ok && text != NULL)
		snprintf(text, 256, "%s", json_string_value(json_object_get(answer, "text")));
	json_decref(answer);
	return n;
}

/* The same where it must succeed. */
static json_int_t take_surely(struct ctg_client *client, uint64_t bytes, bool hold)
{
	char text[256] = "";
	json_int_t lease = take(client, bytes, hold, text);

	if (lease < 0)
		fail_msg("%s", text);
	return lease;
}

static void release(struct ctg_client *client, json_int_t lease)
{
	json_t *answer = ask(client, json_pack("{s:s, s:I}", "do", "release", "lease", lease));

	assert_true(json_is_true(json_object_get(answer, "ok")));
	json_decref(answer);
}

/* A number of the first (and only) borrower. */
static json_int_t borrower_number(struct ctg_client *client, const char *name)
{
	json_t *answer = ask(client, json_pack("{s:s}", "do", "stat"));
	json_t *list = json_object_get(answer, "borrowers");
	json_int_t n;

	assert_int_equal(json_array_size(list), 1);
	n = json_integer_value(json_object_get(json_array_get(list, 0), name));
	json_decref(answer);
	return n;
}

/* ---- ordinary life ----------------------------------------------------------------------------
 */

static void test_map(void **state)
{
	struct ctg_client *client = dial();
	struct borrower b;

	borrower_start(&b, NAME);
	assert_int_equal(ctg_server_borrowers(server), 1);
	assert_int_equal(borrower_do(&b, "map 0 8"), 0);
	assert_int_equal(borrower_number(client, "lent_bytes"), 8 * POSIX_CHUNK);
	assert_int_equal(borrower_number(client, "pid"), b.pid);
	assert_int_equal(area().nr_lent, 8 * POSIX_CHUNK_FRAMES);
	borrower_do(&b, "fill 0 8 1");
	assert_int_equal(borrower_do(&b, "check 0 8 1"), 1);
	/* Somebody is there already; nothing of it changes. */
	assert_int_equal(borrower_do(&b, "map 7 2"), -EEXIST);
	assert_int_equal(borrower_do(&b, "check 0 8 1"), 1);
	assert_int_equal(borrower_do(&b, "unmap 2 3"), 0);
	assert_int_equal(area().nr_lent, 5 * POSIX_CHUNK_FRAMES);
	assert_int_equal(borrower_do(&b, "check 0 2 1"), 1);
	/* Twice is no error, and comes back as zero. */
	assert_int_equal(borrower_do(&b, "unmap 2 3"), 0);
	assert_int_equal(borrower_do(&b, "map 2 3"), 0);
	assert_int_equal(borrower_do(&b, "check 2 3 1"), 0);
	ctg_client_close(client);
	borrower_end(&b);
	assert_all_free();
}

static void test_full(void **state)
{
	struct ctg_client *client = dial();
	struct borrower a, b;
	json_t *answer;

	borrower_start(&a, NAME);
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&a, "map 0 %u", (unsigned)AREA_CHUNKS - 2), 0);
	assert_int_equal(borrower_do(&b, "map 0 3"), -ENOMEM);
	assert_int_equal(area().nr_lent, (AREA_CHUNKS - 2) * POSIX_CHUNK_FRAMES);
	assert_int_equal(borrower_do(&b, "map 3 2"), 0);
	assert_int_equal(borrower_do(&b, "count 0 5000000"), 0);
	assert_int_equal(borrower_do(&b, "count 1 7"), 0);
	answer = ask(client, json_pack("{s:s}", "do", "stat"));
	for (size_t i = 0; i < 2; i++) {
		json_t *one = json_array_get(json_object_get(answer, "borrowers"), i);
		bool is_b = json_integer_value(json_object_get(one, "pid")) == b.pid;

		assert_int_equal(json_integer_value(json_object_get(one, "private_bytes")),
			is_b ? 3 * POSIX_CHUNK : 0);
		assert_int_equal(
			json_integer_value(json_object_get(one, "full_bytes")), is_b ? 5000000 : 0);
		assert_int_equal(
			json_integer_value(json_object_get(one, "sticky_bytes")), is_b ? 7 : 0);
	}
	json_decref(answer);
	/* Room: whoever had to do without is told. */
	assert_int_equal(borrower_do(&a, "unmap 0 3"), 0);
	assert_int_equal(borrower_do(&b, "hint"), 0);
	assert_int_equal(borrower_do(&b, "map 0 3"), 0);
	borrower_end(&a);
	borrower_end(&b);
	ctg_client_close(client);
	assert_all_free();
}

static void test_convert(void **state)
{
	struct ctg_client *client;
	struct borrower b;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 6"), 0);
	borrower_do(&b, "fill 0 6 9");
	borrower_do(&b, "churn 0 6");
	for (unsigned i = 0; i < 5; i++) {
		assert_int_equal(borrower_do(&b, "privatise 1 4"), 0);
		assert_int_equal(borrower_do(&b, "done"), 4);
		assert_int_equal(area().nr_lent, 2 * POSIX_CHUNK_FRAMES);
		assert_int_equal(borrower_number(client, "private_bytes"), 4 * POSIX_CHUNK);
		/* Those that are so already are done. */
		assert_int_equal(borrower_do(&b, "privatise 0 3"), 0);
		assert_int_equal(area().nr_lent, 1 * POSIX_CHUNK_FRAMES);
		assert_int_equal(borrower_do(&b, "lend 0 6"), 0);
		assert_int_equal(borrower_do(&b, "done"), 6);
		assert_int_equal(area().nr_lent, 6 * POSIX_CHUNK_FRAMES);
		assert_int_equal(borrower_number(client, "private_bytes"), 0);
	}
	assert_int_equal(borrower_do(&b, "calm"), 1);
	assert_int_equal(borrower_do(&b, "check 0 6 9"), 1);
	ctg_client_close(client);
	borrower_end(&b);
	assert_all_free();
}

static void test_take_back(void **state)
{
	struct ctg_client *client;
	struct borrower b;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	borrower_do(&b, "fill 0 %u 3", (unsigned)AREA_CHUNKS);
	borrower_do(&b, "churn 0 %u", (unsigned)AREA_CHUNKS);
	for (unsigned i = 0; i < 6; i++) {
		uint64_t bytes = at_most((8 + 8 * i) * MIB);
		json_int_t lease = take_surely(client, bytes, i % 2 != 0);

		assert_int_equal(area().nr_allocated, bytes >> CTG_PAGE_SHIFT);
		release(client, lease);
	}
	assert_int_equal(borrower_do(&b, "calm"), 1);
	assert_int_equal(borrower_do(&b, "check 0 %u 3", (unsigned)AREA_CHUNKS), 1);
	ctg_client_close(client);
	borrower_end(&b);
	assert_all_free();
}

/* What was displaced comes back once the buffer is released, without anybody asking. */
static void test_home(void **state)
{
	struct ctg_client *client;
	uint64_t give_up = posix_now(NULL) + 20000000000u, bytes;
	struct borrower b;
	json_int_t lease;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	borrower_do(&b, "fill 0 %u 3", (unsigned)AREA_CHUNKS);
	bytes = at_most(40 * MIB);
	lease = take_surely(client, bytes, false);
	assert_int_equal(borrower_number(client, "spilled_bytes"), bytes);
	release(client, lease);
	while (borrower_number(client, "spilled_bytes") != 0 && posix_now(NULL) < give_up)
		usleep(1000);
	assert_int_equal(borrower_number(client, "spilled_bytes"), 0);
	assert_int_equal(borrower_number(client, "lent_bytes"), AREA_BYTES);
	assert_true(borrower_number(client, "stall_max_ns") > 0);
	/* Once the last of it has been mapped, nothing moves any more. */
	do
		json_decref(ask(client, json_pack("{s:s, s:b}", "do", "stat", "reset_stall", 1)));
	while (borrower_number(client, "stall_max_ns") != 0 && posix_now(NULL) < give_up);
	assert_int_equal(borrower_number(client, "stall_max_ns"), 0);
	assert_int_equal(borrower_do(&b, "check 0 %u 3", (unsigned)AREA_CHUNKS), 1);
	ctg_client_close(client);
	borrower_end(&b);
	assert_all_free();
}

/* ---- borrowers that end -----------------------------------------------------------------------
 */

struct taking {
	pthread_t thread;
	uint64_t bytes;
	json_int_t result;
	char text[256];
};

static void *take_main(void *arg)
{
	struct taking *t = arg;
	struct ctg_client *client = dial();

	t->result = take(client, t->bytes, true, t->text);
	ctg_client_close(client);
	return NULL;
}

static void take_begin(struct taking *t, uint64_t bytes)
{
	t->bytes = bytes;
	assert_int_equal(pthread_create(&t->thread, NULL, take_main, t), 0);
}

static void take_end(struct taking *t)
{
	assert_int_equal(pthread_join(t->thread, NULL), 0);
}

/* Killed at some moment of a take-back: the buffer is had, for nobody is in the way any more. */
static void test_killed(void **state)
{
	NEED_GUARD();
	for (unsigned i = 0; i < 12; i++) {
		struct taking t;
		struct borrower b;

		borrower_start(&b, NAME);
		assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
		borrower_do(&b, "churn 0 %u", (unsigned)AREA_CHUNKS);
		take_begin(&t, at_most(48 * MIB));
		usleep(i * 1500);
		borrower_kill(&b);
		take_end(&t);
		if (t.result < 0 && t.result != -EBUSY)
			fail_msg("%s", t.text);
		borrower_end(&b);
		assert_all_free();
	}
}

/* As killed, but the process lives on with another address space. */
static void test_exec(void **state)
{
	NEED_GUARD();
	for (unsigned i = 0; i < 6; i++) {
		struct taking t;
		struct borrower b;

		borrower_start(&b, NAME);
		assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
		borrower_do(&b, "churn 0 %u", (unsigned)AREA_CHUNKS);
		take_begin(&t, at_most(48 * MIB));
		usleep(i * 2000);
		borrower_tell(&b, "exec");
		take_end(&t);
		if (t.result < 0 && t.result != -EBUSY)
			fail_msg("%s", t.text);
		/* It is cat now, and no borrower. */
		assert_int_equal(borrower_do(&b, "4711"), 4711);
		assert_all_free();
		borrower_end(&b);
	}
}

/* A vfork child has the dead borrower's address space: its frames are not free yet, also when the
 * borrower has been reaped. */
static void test_vfork(void **state)
{
	struct borrower b;
	int status;

	for (unsigned reap = 0; reap < 2; reap++) {
		borrower_start(&b, NAME);
		assert_int_equal(borrower_do(&b, "map 0 4"), 0);
		assert_int_equal(borrower_do(&b, "vfork"), 0);
		borrower_kill(&b);
		if (reap)
			assert_int_equal(waitpid(b.pid, &status, 0), b.pid);
		assert_int_equal(
			ctg_server_wait_idle(server, posix_now(NULL) + 300000000u), -ETIMEDOUT);
		assert_int_equal(area().nr_lent, 4 * POSIX_CHUNK_FRAMES);
		borrower_end(&b);
		assert_all_free();
	}
}

/* ---- borrowers that misbehave -----------------------------------------------------------------
 */

/* The connection ends; the frames stay with the process until it ends too. */
static void test_garbage(void **state)
{
	static const unsigned size[] = {1, sizeof(struct proto_request) - 1,
		sizeof(struct proto_request), sizeof(struct proto_request) + 1, 65536};
	struct borrower good;

	borrower_start(&good, NAME);
	assert_int_equal(borrower_do(&good, "map 0 2"), 0);
	borrower_do(&good, "fill 0 2 5");
	for (size_t i = 0; i < sizeof(size) / sizeof(size[0]); i++) {
		struct borrower b;

		borrower_start(&b, NAME);
		assert_int_equal(borrower_do(&b, "map 0 4"), 0);
		borrower_do(&b, "fill 0 4 8");
		borrower_tell(&b, "request %u", size[i]);
		/* Its session waits for its end, and does not answer. */
		assert_int_equal(
			ctg_server_wait_idle(server, posix_now(NULL) + 100000000u), -ETIMEDOUT);
		assert_int_equal(area().nr_lent, 6 * POSIX_CHUNK_FRAMES);
		borrower_kill(&b);
		borrower_end(&b);
		for (unsigned k = 0; k < 2000 && ctg_server_borrowers(server) > 1; k++)
			usleep(1000);
		assert_int_equal(area().nr_lent, 2 * POSIX_CHUNK_FRAMES);
	}
	assert_int_equal(borrower_do(&good, "map 2 2"), 0);
	assert_int_equal(borrower_do(&good, "check 0 2 5"), 1);
	borrower_end(&good);
	assert_all_free();
}

/* An agent that answers with nonsense or goes away. */
static void test_bad_agent(void **state)
{
	static const char *const how[] = {"ack", "mute"};
	struct ctg_client *client;
	struct borrower b;
	int status;

	NEED_GUARD();
	client = dial();
	for (unsigned i = 0; i < 2; i++) {
		borrower_start(&b, NAME);
		assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
		assert_int_equal(borrower_do(&b, "%s", how[i]), 0);
		/* Found out before anything moved: the borrower is let go of. */
		assert_int_equal(take(client, AREA_BYTES, false, NULL), -EBUSY);
		assert_int_equal(borrower_do(&b, "unmap 0 1"), -EPIPE);
		assert_int_equal(area().nr_lent, area().nr);
		borrower_end(&b);
		assert_all_free();
	}
	/* In the middle of a command: it has no agent and goes on, so it is killed. */
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "mute"), 0);
	borrower_tell(&b, "map 0 1");
	assert_int_equal(borrower_answer(&b), -EPIPE);
	assert_int_equal(waitpid(b.pid, &status, 0), b.pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	borrower_end(&b);
	ctg_client_close(client);
	assert_all_free();
}

/* ---- borrowers that do not answer -------------------------------------------------------------
 */

static void test_stopped(void **state)
{
	struct ctg_client *client;
	char text[256] = "";
	struct borrower b;
	json_int_t lease;
	json_t *answer;
	int status;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	borrower_do(&b, "fill 0 %u 4", (unsigned)AREA_CHUNKS);
	kill(b.pid, SIGSTOP);
	assert_int_equal(waitpid(b.pid, &status, WUNTRACED), b.pid);
	assert_int_equal(take(client, at_most(48 * MIB), false, text), -EBUSY);
	assert_non_null(strstr(text, "frame 0x"));
	assert_non_null(strstr(text, "its borrower does not answer"));
	assert_int_equal(area().nr_allocated, 0);
	/* Nobody waits for it who only wants to look. */
	assert_int_equal(borrower_number(client, "pid"), b.pid);
	answer = ask(client, json_pack("{s:s}", "do", "map"));
	json_decref(answer);
	kill(b.pid, SIGCONT);
	/* The missed answers come first. */
	assert_int_equal(borrower_do(&b, "check 0 %u 4", (unsigned)AREA_CHUNKS), 1);
	lease = take(client, at_most(48 * MIB), false, text);
	if (lease < 0)
		fail_msg("%s", text);
	assert_int_equal(borrower_do(&b, "check 0 %u 4", (unsigned)AREA_CHUNKS), 1);
	release(client, lease);
	/* Killed while it is stopped, perhaps in the middle of what comes home. */
	kill(b.pid, SIGSTOP);
	usleep(10000);
	borrower_kill(&b);
	borrower_end(&b);
	ctg_client_close(client);
	assert_all_free();
}

/* In the middle of a request, with whatever locks that takes: others are served all the same. */
static void test_deaf(void **state)
{
	struct borrower deaf, other;
	struct ctg_client *client;

	NEED_GUARD();
	client = dial();
	borrower_start(&deaf, NAME);
	borrower_start(&other, NAME);
	assert_int_equal(borrower_do(&deaf, "map 0 4"), 0);
	assert_int_equal(borrower_do(&deaf, "deaf"), 0);
	borrower_tell(&deaf, "map 4 1");
	assert_int_equal(borrower_do(&other, "map 0 4"), 0);
	borrower_do(&other, "fill 0 4 6");
	for (unsigned i = 0; i < 2; i++) {
		json_t *answer = ask(client, json_pack("{s:s}", "do", i == 0 ? "stat" : "map"));

		assert_int_equal(json_array_size(json_object_get(answer, "borrowers")), 2);
		json_decref(answer);
	}
	release(client, take_surely(client, 32 * MIB, false));
	assert_int_equal(borrower_do(&other, "check 0 4 6"), 1);
	borrower_end(&other);
	borrower_kill(&deaf);
	borrower_end(&deaf);
	ctg_client_close(client);
	assert_all_free();
}

/* What could not come home because its borrower was stopped does when it goes on. */
static void test_home_later(void **state)
{
	uint64_t give_up = posix_now(NULL) + 20000000000u;
	struct ctg_client *client;
	struct borrower b;
	json_int_t lease;
	int status;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	lease = take_surely(client, 32 * MIB, false);
	assert_int_equal(borrower_number(client, "spilled_bytes"), 32 * MIB);
	kill(b.pid, SIGSTOP);
	assert_int_equal(waitpid(b.pid, &status, WUNTRACED), b.pid);
	release(client, lease);
	usleep(500000);
	assert_int_equal(borrower_number(client, "spilled_bytes"), 32 * MIB);
	kill(b.pid, SIGCONT);
	while (borrower_number(client, "spilled_bytes") != 0 && posix_now(NULL) < give_up)
		usleep(1000);
	assert_int_equal(borrower_number(client, "spilled_bytes"), 0);
	borrower_end(&b);
	ctg_client_close(client);
	assert_all_free();
}

/* ---- takers that end --------------------------------------------------------------------------
 */

static int taker_main(const char *bytes)
{
	struct ctg_client *client;
	struct ctg_error error;
	json_t *answer;

	if (ctg_client_connect(NAME, &client, &error) != 0)
		return 1;
	return ctg_client_call(client,
		json_pack("{s:s, s:I}", "do", "alloc", "bytes", (json_int_t)atoll(bytes)), &answer,
		NULL, &error);
}

static pid_t taker_start(uint64_t bytes)
{
	char text[32];
	pid_t pid;

	snprintf(text, sizeof(text), "%llu", (unsigned long long)bytes);
	pid = vfork();
	assert_true(pid >= 0);
	if (pid == 0) {
		execl("/proc/self/exe", "taker", "taker", text, (char *)NULL);
		_exit(1);
	}
	return pid;
}

static size_t leases(struct ctg_client *client)
{
	json_t *answer = ask(client, json_pack("{s:s}", "do", "leases"));
	size_t n = json_array_size(json_object_get(answer, "leases"));

	json_decref(answer);
	return n;
}

/*
 * A detached lease that nobody has been told of is dropped; one whose number arrived stays. A taker
 * killed between the two cannot be told apart by counting, so here nobody gets an answer:
 * connections that ask, wait for different times, and end with the answer unread.
 */
static void test_unread(void **state)
{
	struct ctg_client *client;
	const char request[] = "{\"do\":\"alloc\",\"bytes\":50331648}";
	struct borrower b;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	borrower_do(&b, "churn 0 %u", (unsigned)AREA_CHUNKS);
	for (unsigned i = 0; i < 12; i++) {
		struct ctg_client *taker = dial();

		assert_true(send(ctg_client_fd(taker), request, strlen(request), 0) > 0);
		usleep(i * 4000);
		ctg_client_close(taker);
	}
	/* A request that is served after theirs: all but the last have ended, and that will. */
	for (unsigned i = 0; i < 10000 && area().nr_allocated != 0; i++)
		usleep(1000);
	for (unsigned i = 0; i < 10000 && leases(client) != 0; i++)
		usleep(1000);
	assert_int_equal(area().nr_allocated, 0);
	assert_int_equal(leases(client), 0);
	assert_int_equal(borrower_do(&b, "calm"), 1);
	ctg_client_close(client);
	borrower_end(&b);
	assert_all_free();
}

static void test_taker_killed(void **state)
{
	struct ctg_client *client;
	struct borrower b;

	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	borrower_do(&b, "churn 0 %u", (unsigned)AREA_CHUNKS);
	for (unsigned i = 0; i < 12; i++) {
		pid_t pid = taker_start(at_most(48 * MIB));
		int status;

		usleep(i * 3000);
		kill(pid, SIGKILL);
		assert_int_equal(waitpid(pid, &status, 0), pid);
	}
	/* Every lease that is left is one that can be released by its number; all others are gone.
	 */
	for (unsigned i = 0; i < 10000; i++) {
		json_t *answer = ask(client, json_pack("{s:s}", "do", "leases"));
		json_t *list = json_object_get(answer, "leases");
		uint64_t bytes = 0;

		for (size_t k = 0; k < json_array_size(list); k++) {
			json_t *one = json_array_get(list, k);

			bytes += (uint64_t)json_integer_value(json_object_get(one, "bytes"));
		}
		json_decref(answer);
		if (bytes == area().nr_allocated << CTG_PAGE_SHIFT)
			break;
		assert_int_not_equal(i, 9999);
		usleep(1000);
	}
	while (leases(client) != 0) {
		json_t *answer = ask(client, json_pack("{s:s}", "do", "leases"));
		json_t *one = json_array_get(json_object_get(answer, "leases"), 0);

		release(client, json_integer_value(json_object_get(one, "lease")));
		json_decref(answer);
	}
	assert_int_equal(area().nr_allocated, 0);
	assert_int_equal(borrower_do(&b, "calm"), 1);
	ctg_client_close(client);
	borrower_end(&b);
	assert_all_free();
}

/* ---- connections ------------------------------------------------------------------------------
 */

static int dial_raw(void)
{
	int fd = runtime_connect(ctg_server_socket(server));

	assert_true(fd >= 0);
	return fd;
}

static void assert_closed(int fd)
{
	char byte;
	ssize_t n = recv(fd, &byte, 1, 0);

	assert_true(n == 0 || (n < 0 && errno == ECONNRESET));
	close(fd);
}

/* What comes first must be a hello; an agent must be the borrower's own. */
static void test_strangers(void **state)
{
	struct proto_hello hello = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.role = PROTO_AGENT,
		.session = 1,
	};
	struct borrower b;
	int fd;

	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 1"), 0);
	fd = dial_raw();
	assert_int_equal(send(fd, "{\"do\":\"stat\"}", 13, MSG_NOSIGNAL), 13);
	assert_closed(fd);
	for (hello.session = 0; hello.session < 50; hello.session++) {
		fd = dial_raw();
		assert_int_equal(send(fd, &hello, sizeof(hello), MSG_NOSIGNAL), sizeof(hello));
		assert_closed(fd);
	}
	hello.magic++;
	fd = dial_raw();
	assert_int_equal(send(fd, &hello, sizeof(hello), MSG_NOSIGNAL), sizeof(hello));
	assert_closed(fd);
	/* Says hello and goes, before it has an agent. */
	hello.magic--;
	hello.role = PROTO_CALL;
	hello.window = 0x7f0000000000;
	hello.window_bytes = POSIX_CHUNK;
	hello.agent_tids[0] = hello.agent_tids[1] = 1;
	fd = dial_raw();
	assert_int_equal(send(fd, &hello, sizeof(hello), MSG_NOSIGNAL), sizeof(hello));
	close(fd);
	assert_int_equal(borrower_do(&b, "map 1 1"), 0);
	borrower_end(&b);
	assert_all_free();
}

static void test_crowd(void **state)
{
	const struct rlimit wanted = {.rlim_cur = 4096, .rlim_max = 4096};
	const struct proto_hello hello = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.role = PROTO_CONTROL,
	};
	static int fd[SERVER_MAX_CONNECTIONS + 8];
	struct rlimit limit;
	unsigned refused = 0;

	assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
	if (limit.rlim_cur < wanted.rlim_cur && setrlimit(RLIMIT_NOFILE, &wanted) != 0) {
		print_message("skipped: at most %lu files\n", (unsigned long)limit.rlim_cur);
		skip();
	}
	for (size_t i = 0; i < SERVER_MAX_CONNECTIONS + 8; i++) {
		fd[i] = dial_raw();
		send(fd[i], &hello, sizeof(hello), MSG_NOSIGNAL);
	}
	for (size_t i = 0; i < SERVER_MAX_CONNECTIONS + 8; i++) {
		char answer[PROTO_MAX_CONTROL];

		send(fd[i], "{\"do\":\"leases\"}", 15, MSG_NOSIGNAL);
		if (recv(fd[i], answer, sizeof(answer), 0) <= 0)
			refused++;
	}
	assert_int_equal(refused, 8);
	for (size_t i = 0; i < SERVER_MAX_CONNECTIONS + 8; i++)
		close(fd[i]);
	/* There is room again; it may take the server a moment to see it. */
	for (unsigned i = 0;; i++) {
		struct ctg_client *client = dial();
		struct ctg_error error;
		json_t *request = json_pack("{s:s}", "do", "leases"), *answer;
		int err = ctg_client_call(client, request, &answer, NULL, &error);

		json_decref(request);
		ctg_client_close(client);
		if (err == 0) {
			json_decref(answer);
			break;
		}
		assert_int_not_equal(i, 10000);
		usleep(1000);
	}
	assert_all_free();
}

/* ---- the server's end -------------------------------------------------------------------------
 */

static unsigned open_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned nr = 0;

	assert_non_null(d);
	while (readdir(d) != NULL)
		nr++;
	closedir(d);
	return nr;
}

/* Borrowers keep what they have, whatever they were doing, and takers get an answer or an end. */
static void test_stop(void **state)
{
	for (unsigned i = 0; i < 6; i++) {
		unsigned before = open_fds();
		struct borrower a, b;
		bool guarded;

		assert_int_equal(start(NULL, i % 2 != 0), 0);
		guarded = can_guard();
		borrower_start(&a, NAME);
		borrower_start(&b, NAME);
		assert_int_equal(borrower_do(&a, "map 0 16"), 0);
		assert_int_equal(borrower_do(&b, "map 0 16"), 0);
		borrower_do(&a, "fill 0 16 1");
		borrower_do(&b, "fill 0 16 2");
		borrower_do(&a, "churn 0 16");
		if (guarded && i >= 2) {
			struct ctg_client *client = dial();

			/* Some of it is in the spill zone when the end comes. */
			take_surely(client, 24 * MIB, false);
			ctg_client_close(client);
		}
		usleep(i * 1000);
		if (i == 5) {
			/* The end does not wait for who does not answer. */
			assert_int_equal(borrower_do(&b, "deaf"), 0);
			borrower_tell(&b, "map 16 1");
		}
		teardown(NULL);
		assert_int_equal(borrower_do(&a, "calm"), 1);
		assert_int_equal(borrower_do(&a, "check 0 16 1"), 1);
		if (i == 5)
			assert_true(borrower_answer(&b) < 0);
		assert_int_equal(borrower_do(&b, "check 0 16 2"), 1);
		assert_int_equal(borrower_do(&b, "map 16 1"), -EPIPE);
		borrower_end(&a);
		borrower_end(&b);
		assert_int_equal(open_fds(), before);
	}
}

static void test_start_errors(void **state)
{
	struct ctg_server_config config = {.name = NAME, .region = {.bytes = AREA_BYTES}};
	static const char *const names[] = {"", ".x", "a/b"};
	struct ctg_server *other;
	struct ctg_error error;
	unsigned before = open_fds();

	for (size_t i = 0; i < 3; i++) {
		config.name = names[i];
		assert_int_equal(ctg_server_start(&config, &other, &error), -EINVAL);
		assert_non_null(strstr(error.text, "name"));
	}
	config.name = NAME;
	config.region.bytes = 4096;
	assert_int_equal(ctg_server_start(&config, &other, &error), -EINVAL);
	config.region.bytes = AREA_BYTES;
	config.region.backing = "punched-cards";
	assert_int_equal(ctg_server_start(&config, &other, &error), -EINVAL);
	config.region.backing = NULL;
	assert_int_equal(open_fds(), before);
	/* The name is free after all that, and taken then. */
	assert_int_equal(start(NULL, false), 0);
	assert_int_equal(ctg_server_start(&config, &other, &error), -EEXIST);
	assert_non_null(strstr(error.text, "already"));
	assert_all_free();
	teardown(NULL);
	assert_int_equal(open_fds(), before);
}

static int group_setup(void **state)
{
	strcpy(runtime, "/tmp/contig-test-XXXXXX");
	if (mkdtemp(runtime) == NULL)
		return -1;
	signal(SIGPIPE, SIG_IGN);
	return setenv("XDG_RUNTIME_DIR", runtime, 1);
}

static int group_teardown(void **state)
{
	char command[128];

	snprintf(command, sizeof(command), "rm -rf '%s'", runtime);
	return system(command);
}

#define HUGE(test)                                                                                 \
	{                                                                                          \
#test "/hugetlb", test, setup_hugetlb, teardown, NULL                              \
	}
#define BOTH(test)                                                                                 \
	{#test "/userfaultfd", test, setup_uffd, teardown, NULL},                                  \
	{                                                                                          \
#test "/stop", test, setup_stop, teardown, NULL                                    \
	}
#define ONE(test)                                                                                  \
	{                                                                                          \
#test, test, setup_uffd, teardown, NULL                                            \
	}

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		ONE(test_map),
		ONE(test_full),
		BOTH(test_convert),
		HUGE(test_convert),
		BOTH(test_take_back),
		HUGE(test_take_back),
		BOTH(test_home),
		HUGE(test_home),
		BOTH(test_killed),
		HUGE(test_killed),
		BOTH(test_exec),
		HUGE(test_exec),
		ONE(test_vfork),
		ONE(test_garbage),
		ONE(test_bad_agent),
		BOTH(test_stopped),
		HUGE(test_stopped),
		ONE(test_deaf),
		BOTH(test_home_later),
		BOTH(test_unread),
		BOTH(test_taker_killed),
		HUGE(test_taker_killed),
		ONE(test_strangers),
		ONE(test_crowd),
		cmocka_unit_test(test_stop),
		cmocka_unit_test(test_start_errors),
	};

	if (argc == 3 && strcmp(argv[1], "borrower") == 0)
		return borrower_main(argv[2]);
	if (argc == 3 && strcmp(argv[1], "taker") == 0)
		return taker_main(argv[2]);
	if (argc == 2)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
