/* SPDX-License-Identifier: MIT */
/* The server: what borrowers do in ordinary life, who may connect, how it starts and stops. */
#define _GNU_SOURCE
#include "serve.h"

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

/* ---- ordinary life ------------------------------------------------------------------------- */

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

/* What would have to move has nowhere to go: everything as before, also what has moved already. */
static void test_spill_full(void **state)
{
	const struct ctg_server_config config = {
		.name = NAME,
		.region = {.bytes = AREA_BYTES, .spill_bytes = 16 * MIB},
	};
	struct ctg_client *client;
	struct ctg_error error;
	char text[256] = "";
	struct borrower b;
	json_int_t lease;

	assert_int_equal(ctg_server_start(&config, &server, &error), 0);
	NEED_GUARD();
	client = dial();
	borrower_start(&b, NAME);
	assert_int_equal(borrower_do(&b, "map 0 %u", (unsigned)AREA_CHUNKS), 0);
	borrower_do(&b, "fill 0 %u 2", (unsigned)AREA_CHUNKS);
	borrower_do(&b, "churn 0 %u", (unsigned)AREA_CHUNKS);
	for (unsigned i = 0; i < 3; i++) {
		assert_int_equal(take(client, 48 * MIB, false, text), -ENOMEM);
		assert_non_null(strstr(text, "no room for what has to move"));
		assert_non_null(strstr(text, "spill zone's 16 MiB"));
		assert_int_equal(area().nr_allocated, 0);
	}
	/* What does fit is still had. */
	lease = take_surely(client, 8 * MIB, false);
	release(client, lease);
	assert_int_equal(borrower_do(&b, "calm"), 1);
	assert_int_equal(borrower_do(&b, "check 0 %u 2", (unsigned)AREA_CHUNKS), 1);
	borrower_end(&b);
	ctg_client_close(client);
	assert_all_free();
}

/* ---- connections --------------------------------------------------------------------------- */

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

/* ---- the server's end ---------------------------------------------------------------------- */

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
		cmocka_unit_test_teardown(test_spill_full, teardown),
		ONE(test_strangers),
		ONE(test_crowd),
		cmocka_unit_test(test_stop),
		cmocka_unit_test(test_start_errors),
	};

	if (argc == 3 && strcmp(argv[1], "borrower") == 0)
		return borrower_main(argv[2]);
	if (argc == 2)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
