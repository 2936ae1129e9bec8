/* SPDX-License-Identifier: MIT */
/* Borrowers and takers that end, hang or misbehave at any moment: every frame is back at the end.
 */
#define _GNU_SOURCE
#include "serve.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

/* ---- borrowers that end -------------------------------------------------------------------- */

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

/* The borrower's end may come at a moment when it is in the way. And somebody else may have had the
 * huge pages for what has to move. */
static void assert_taken_or_not(const struct taking *t)
{
	struct ctg_region_info info;

	ctg_region_info(ctg_server_region(server), &info);
	if (t->result < 0 && t->result != -EBUSY &&
		(t->result != -ENOMEM || strcmp(info.backing, "hugetlb") != 0))
		fail_msg("%s", t->text);
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
		assert_taken_or_not(&t);
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
		assert_taken_or_not(&t);
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

/* ---- borrowers that misbehave -------------------------------------------------------------- */

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

/* ---- borrowers that do not answer ---------------------------------------------------------- */

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

/* ---- takers that end ----------------------------------------------------------------------- */

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

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
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
	};

	if (argc == 3 && strcmp(argv[1], "borrower") == 0)
		return borrower_main(argv[2]);
	if (argc == 3 && strcmp(argv[1], "taker") == 0)
		return taker_main(argv[2]);
	if (argc == 2)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
