/* SPDX-License-Identifier: MIT */
/* The control protocol against a real server: what takers ask for and what they are told. */
#define _GNU_SOURCE
#include "client.h"
#include "state.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#define NAME "control"
#define MIB ((uint64_t)1 << 20)
#define AREA_BYTES (64 * MIB)

static char runtime[64];
static struct ctg_server *server;

static int setup(void **state)
{
	const struct ctg_server_config config = {
		.name = NAME,
		.region = {.bytes = AREA_BYTES, .spill_bytes = 16 * MIB},
	};
	struct ctg_error error;

	if (ctg_server_start(&config, &server, &error) == 0)
		return 0;
	print_error("%s\n", error.text);
	return -1;
}

static struct ctg_cma_stat area(void)
{
	struct ctg_cma_stat stat;

	ctg_cma_stat(ctg_region_area(ctg_server_region(server)), &stat);
	return stat;
}

static int teardown(void **state)
{
	ctg_server_stop(server);
	server = NULL;
	return 0;
}

static struct ctg_client *dial(void)
{
	struct ctg_client *client;
	struct ctg_error error;

	if (ctg_client_connect(NAME, &client, &error) != 0)
		fail_msg("%s", error.text);
	return client;
}

static json_t *ask_fd(struct ctg_client *client, json_t *request, int *fd)
{
	struct ctg_error error;
	json_t *answer;

	assert_non_null(request);
	if (ctg_client_call(client, request, &answer, fd, &error) != 0)
		fail_msg("%s", error.text);
	json_decref(request);
	return answer;
}

static json_t *ask(struct ctg_client *client, json_t *request)
{
	return ask_fd(client, request, NULL);
}

static json_int_t number(const json_t *object, const char *name)
{
	const json_t *n = json_object_get(object, name);

	if (!json_is_integer(n))
		fail_msg("no number %s", name);
	return json_integer_value(n);
}

static json_t *allocated(struct ctg_client *client, json_t *request)
{
	json_t *answer = ask(client, request);

	if (!json_is_true(json_object_get(answer, "ok")))
		fail_msg("%s", json_string_value(json_object_get(answer, "text")));
	return answer;
}

/* The lease's number alone. */
static json_int_t take(struct ctg_client *client, json_t *request)
{
	json_t *answer = allocated(client, request);
	json_int_t lease = number(answer, "lease");

	json_decref(answer);
	return lease;
}

static json_t *of_bytes(uint64_t bytes)
{
	return json_pack("{s:s, s:I}", "do", "alloc", "bytes", (json_int_t)bytes);
}

static json_t *of_lease(json_int_t lease)
{
	return json_pack("{s:s, s:I}", "do", "release", "lease", lease);
}

/* A failure with this error and with this in its text. */
static void refused(struct ctg_client *client, json_t *request, int err, const char *part)
{
	json_t *answer = ask(client, request);
	const char *text = json_string_value(json_object_get(answer, "text"));

	assert_false(json_is_true(json_object_get(answer, "ok")));
	assert_non_null(text);
	if (number(answer, "error") != err || strstr(text, part) == NULL)
		fail_msg("%d: %s", (int)number(answer, "error"), text);
	assert_string_equal(
		json_string_value(json_object_get(answer, "name")), strerrorname_np(-err));
	json_decref(answer);
}

/* ---- questions ----------------------------------------------------------------------------- */

static void test_stat(void **state)
{
	static const char *const strings[] = {
		"name", "backing", "guard", "guard_why", "physical_why"};
	static const char *const numbers[] = {"map_order", "region_bytes", "spill_bytes",
		"spill_used_bytes", "uptime_ns", "leases"};
	static const char *const frames[] = {
		"frames", "allocated", "free", "lent", "longest_free", "longest_unallocated"};
	struct ctg_client *client = dial();
	json_t *answer = ask(client, json_pack("{s:s}", "do", "stat"));
	json_t *part = json_object_get(answer, "area");

	for (size_t i = 0; i < sizeof(strings) / sizeof(strings[0]); i++)
		assert_true(json_is_string(json_object_get(answer, strings[i])));
	for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
		assert_true(number(answer, numbers[i]) >= 0);
	for (size_t i = 0; i < sizeof(frames) / sizeof(frames[0]); i++)
		assert_true(number(part, frames[i]) >= 0);
	assert_string_equal(json_string_value(json_object_get(answer, "name")), NAME);
	assert_int_equal(number(answer, "region_bytes"), AREA_BYTES);
	assert_int_equal(number(answer, "spill_bytes"), 16 * MIB);
	assert_int_equal(number(part, "free"), AREA_BYTES >> CTG_PAGE_SHIFT);
	assert_true(json_is_real(json_object_get(part, "lent_percent")));
	assert_int_equal(json_array_size(json_object_get(answer, "borrowers")), 0);
	assert_int_equal(number(json_object_get(answer, "counters"), "cma_alloc_success"), 0);
	json_decref(answer);
	ctg_client_close(client);
}

static uint64_t sum(const json_t *array)
{
	uint64_t n = 0;

	assert_true(json_is_array(array));
	for (size_t i = 0; i < json_array_size(array); i++)
		n += (uint64_t)json_integer_value(json_array_get(array, i));
	return n;
}

static void test_map(void **state)
{
	struct ctg_client *client = dial();
	json_int_t lease = take(client, of_bytes(3 * MIB));
	json_t *answer = ask(client, json_pack("{s:s}", "do", "map"));
	json_t *blocks = json_object_get(json_object_get(answer, "blocks"), "area");
	json_t *spill = json_object_get(json_object_get(answer, "blocks"), "spill");
	json_t *pfn = json_object_get(blocks, "pfn");
	uint64_t all = AREA_BYTES >> CTG_PAGE_SHIFT, taken = 3 * MIB >> CTG_PAGE_SHIFT;

	assert_int_equal(json_array_size(pfn), AREA_BYTES / POSIX_CHUNK);
	assert_int_equal(sum(json_object_get(blocks, "taken")), taken);
	assert_int_equal(sum(json_object_get(blocks, "free")), all - taken);
	assert_int_equal(sum(json_object_get(blocks, "in_use")), 0);
	assert_int_equal(sum(json_object_get(blocks, "isolated")), 0);
	assert_int_equal(sum(json_object_get(blocks, "present")), AREA_BYTES / POSIX_CHUNK);
	for (size_t i = 1; i < json_array_size(pfn); i++)
		assert_true(json_integer_value(json_array_get(pfn, i)) >
			    json_integer_value(json_array_get(pfn, i - 1)));
	assert_int_equal(sum(json_object_get(spill, "free")), 16 * MIB >> CTG_PAGE_SHIFT);
	json_decref(answer);
	json_decref(ask(client, of_lease(lease)));
	ctg_client_close(client);
}

/* ---- leases -------------------------------------------------------------------------------- */

static void test_lease(void **state)
{
	struct ctg_client *a = dial(), *b = dial();
	json_int_t one = take(a, of_bytes(1)), two = take(a, of_bytes(5 * MIB));
	json_t *answer = ask(b, json_pack("{s:s}", "do", "leases"));
	json_t *list = json_object_get(answer, "leases"), *first;

	assert_int_equal(json_array_size(list), 2);
	first = json_array_get(list, 0);
	assert_int_equal(number(first, "lease"), one);
	assert_int_equal(number(first, "bytes"), CTG_PAGE_SIZE);
	assert_int_equal(number(first, "nr_blocks"), 1);
	assert_int_equal(number(first, "pid"), getpid());
	assert_true(json_is_false(json_object_get(first, "hold")));
	assert_true(number(first, "age_ns") >= 0);
	assert_int_equal(number(json_array_get(list, 1), "lease"), two);
	json_decref(answer);
	/* Detached: whoever took it may go, and anybody may release it. */
	ctg_client_close(a);
	answer = ask(b, of_lease(two));
	assert_true(json_is_true(json_object_get(answer, "ok")));
	assert_int_equal(number(answer, "bytes"), 5 * MIB);
	assert_int_equal(number(answer, "left"), 0);
	assert_int_equal(number(answer, "held_frames"), 0);
	json_decref(answer);
	refused(b, of_lease(two), -ENOENT, "no lease 2; `contig leases` lists them");
	refused(b, of_lease(0), -ENOENT, "no lease 0");
	assert_int_equal(area().nr_allocated, 1);
	assert_int_equal(ctg_server_wait_idle(server, posix_now(NULL)), -ETIMEDOUT);
	json_decref(ask(b, of_lease(one)));
	assert_int_equal(ctg_server_wait_idle(server, posix_now(NULL) + 1000000000u), 0);
	assert_int_equal(area().nr_allocated, 0);
	ctg_client_close(b);
}

static void test_hold(void **state)
{
	struct ctg_client *a = dial(), *b = dial();
	json_t *answer;

	for (unsigned i = 0; i < 3; i++)
		take(a, json_pack("{s:s, s:i, s:b}", "do", "alloc", "bytes", 4096, "hold", 1));
	answer = ask(b, json_pack("{s:s}", "do", "leases"));
	assert_int_equal(json_array_size(json_object_get(answer, "leases")), 3);
	json_decref(answer);
	/* Also by somebody else, and before the end. */
	answer = ask(b, of_lease(2));
	assert_true(json_is_true(json_object_get(answer, "ok")));
	json_decref(answer);
	assert_int_equal(area().nr_allocated, 2);
	ctg_client_close(a);
	for (unsigned i = 0; i < 10000 && area().nr_allocated != 0; i++)
		usleep(1000);
	assert_int_equal(area().nr_allocated, 0);
	answer = ask(b, json_pack("{s:s}", "do", "leases"));
	assert_int_equal(json_array_size(json_object_get(answer, "leases")), 0);
	json_decref(answer);
	ctg_client_close(b);
}

static void test_blocks(void **state)
{
	struct ctg_client *client = dial();
	json_t *answer = allocated(
		client, json_pack("{s:s, s:i, s:i}", "do", "alloc", "count", 300, "order", 4));
	json_t *blocks = json_object_get(answer, "blocks");
	json_int_t lease = number(answer, "lease"), last = -1;
	json_t *part;

	assert_int_equal(json_array_size(blocks), 300);
	assert_int_equal(number(answer, "bytes"), 300 * 65536);
	for (size_t i = 0; i < 300; i++) {
		json_t *block = json_array_get(blocks, i);

		assert_int_equal(number(block, "bytes"), 65536);
		assert_int_equal(number(block, "pfn") % 16, 0);
		assert_true(number(block, "pfn") >= last + 16);
		last = number(block, "pfn");
	}
	json_decref(answer);
	assert_int_equal(area().nr_allocated, 300 * 16);
	/* One block; not twice; not one that never was. */
	part = json_pack("{s:s, s:I, s:i}", "do", "release", "lease", lease, "block", 7);
	answer = ask(client, json_incref(part));
	assert_int_equal(number(answer, "bytes"), 65536);
	assert_int_equal(number(answer, "left"), 299 * 65536);
	json_decref(answer);
	refused(client, json_incref(part), -ENOENT, "no block 7 in a lease 1");
	json_object_set_new(part, "block", json_integer(300));
	refused(client, part, -ENOENT, "no block 300");
	answer = ask(client, of_lease(lease));
	assert_int_equal(number(answer, "bytes"), 299 * 65536);
	json_decref(answer);
	assert_int_equal(area().nr_free, area().nr);
	/* The last block takes the lease with it. */
	lease = take(client, json_pack("{s:s, s:i}", "do", "alloc", "count", 2));
	for (int i = 0; i < 2; i++)
		json_decref(ask(client,
			json_pack("{s:s, s:I, s:i}", "do", "release", "lease", lease, "block", i)));
	refused(client, of_lease(lease), -ENOENT, "no lease");
	ctg_client_close(client);
}

/* More than a message holds, blocks that are scattered, and all or nothing. */
static void test_many_blocks(void **state)
{
	struct ctg_client *client = dial();
	const uint64_t frames = AREA_BYTES >> CTG_PAGE_SHIFT;
	json_int_t all, some[3];
	json_t *answer;

	/* Islands that leave no run of all the rest. */
	for (unsigned i = 0; i < 3; i++)
		some[i] = take(client, of_bytes(16 * MIB));
	json_decref(ask(client, of_lease(some[0])));
	json_decref(ask(client, of_lease(some[2])));
	answer = allocated(client, json_pack("{s:s, s:I, s:i}", "do", "alloc", "count",
					   (json_int_t)(48 * MIB / 16384), "order", 2));
	assert_int_equal(json_array_size(json_object_get(answer, "blocks")), 48 * MIB / 16384);
	all = number(answer, "lease");
	json_decref(answer);
	assert_int_equal(area().nr_allocated, frames);
	answer = ask(client, of_lease(all));
	assert_int_equal(number(answer, "bytes"), 48 * MIB);
	json_decref(answer);
	/* One more than there is: nothing is kept. */
	answer = ask(client, json_pack("{s:s, s:I, s:i}", "do", "alloc", "count",
				     (json_int_t)(48 * MIB / 65536 + 1), "order", 4));
	assert_int_equal(number(answer, "error"), -ENOMEM);
	assert_int_equal(number(answer, "got"), 48 * MIB / 65536);
	json_decref(answer);
	assert_int_equal(area().nr_allocated, 16 * MIB >> CTG_PAGE_SHIFT);
	refused(client, json_pack("{s:s, s:i, s:i}", "do", "alloc", "count", 4194304, "order", 18),
		-ENOMEM, "the area has only 64 MiB");
	json_decref(ask(client, of_lease(some[1])));
	assert_int_equal(area().nr_free, frames);
	ctg_client_close(client);
}

/* ---- what is taken ------------------------------------------------------------------------- */

/* The buffer as the taker sees it is the memory that the region says it is. */
static void test_descriptor(void **state)
{
	struct ctg_client *client = dial();
	struct ctg_region *region = ctg_server_region(server);
	json_t *request = of_bytes(5 * MIB), *answer, *extents, *block;
	uint64_t done = 0;
	int fd = -1;

	json_object_set_new(request, "fd", json_true());
	answer = ask_fd(client, request, &fd);
	assert_true(json_is_true(json_object_get(answer, "ok")));
	assert_true(fd >= 0);
	block = json_array_get(json_object_get(answer, "blocks"), 0);
	extents = json_object_get(answer, "extents");
	assert_int_equal(number(json_array_get(extents, 0), "offset"), number(block, "offset"));
	for (size_t i = 0; i < json_array_size(extents); i++) {
		json_t *e = json_array_get(extents, i);
		size_t bytes = (size_t)number(e, "bytes");
		char *mine = mmap(
			NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, number(e, "offset"));

		assert_true(mine != MAP_FAILED);
		memset(mine, 0x3c, bytes);
		munmap(mine, bytes);
		done += bytes;
	}
	assert_int_equal(done, 5 * MIB);
	for (uint64_t at = 0; at < 5 * MIB; at += CTG_PAGE_SIZE) {
		ctg_pfn_t pfn = (ctg_pfn_t)number(block, "pfn") + (at >> CTG_PAGE_SHIFT);
		const char *theirs = ctg_region_address(region, pfn);

		assert_int_equal(theirs[at % 4000], 0x3c);
	}
	close(fd);
	json_decref(answer);
	/* Who does not ask for it does not get it. */
	answer = ask_fd(client, of_bytes(4096), &fd);
	assert_int_equal(fd, -1);
	assert_null(json_object_get(answer, "extents"));
	json_decref(answer);
	ctg_client_close(client);
}

static const char *bytes_of(const json_t *answer)
{
	const json_t *block = json_array_get(json_object_get(answer, "blocks"), 0);

	return ctg_region_address(ctg_server_region(server), (ctg_pfn_t)number(block, "pfn"));
}

static void test_zero(void **state)
{
	struct ctg_client *client = dial();
	json_t *answer = allocated(client, of_bytes(AREA_BYTES)), *request;
	char *memory = (char *)(uintptr_t)bytes_of(answer);

	memset(memory, 0x77, AREA_BYTES);
	json_decref(ask(client, of_lease(number(answer, "lease"))));
	json_decref(answer);
	/* As it was left, if that is asked for; else nothing of it. */
	request = of_bytes(AREA_BYTES);
	json_object_set_new(request, "zero", json_false());
	answer = allocated(client, request);
	assert_int_equal(bytes_of(answer)[12345], 0x77);
	json_decref(ask(client, of_lease(number(answer, "lease"))));
	json_decref(answer);
	answer = allocated(client, of_bytes(AREA_BYTES));
	for (size_t i = 0; i < AREA_BYTES; i += 61)
		if (bytes_of(answer)[i] != 0)
			fail_msg("byte %zu", i);
	json_decref(answer);
	ctg_client_close(client);
}

static void test_align(void **state)
{
	struct ctg_client *client = dial();

	take(client, of_bytes(4096));
	for (uint64_t align = 1; align <= 32 * MIB; align *= 2) {
		json_t *request = of_bytes(8192), *answer, *block;

		json_object_set_new(request, "align", json_integer((json_int_t)align));
		answer = allocated(client, request);
		block = json_array_get(json_object_get(answer, "blocks"), 0);
		assert_int_equal(((uint64_t)number(block, "pfn") << CTG_PAGE_SHIFT) % align, 0);
		json_decref(ask(client, of_lease(number(answer, "lease"))));
		json_decref(answer);
	}
	ctg_client_close(client);
}

/* ---- failures ------------------------------------------------------------------------------ */

static void test_refusals(void **state)
{
	struct ctg_client *client = dial();
	json_int_t middle;

	refused(client, of_bytes(AREA_BYTES + 1), -ENOMEM, "the area has only 64 MiB");
	refused(client, of_bytes(INT64_MAX), -ENOMEM, "the area has only 64 MiB");
	take(client, of_bytes(20 * MIB));
	middle = take(client, of_bytes(30 * MIB));
	refused(client, of_bytes(32 * MIB), -ENOMEM,
		"no contiguous run of 32 MiB: the area has 64 MiB, longest unallocated run 14 MiB; "
		"release a buffer first");
	json_decref(ask(client, of_lease(middle)));
	json_decref(ask(client, of_lease(take(client, of_bytes(32 * MIB)))));
	assert_int_equal(area().nr_allocated, 20 * MIB >> CTG_PAGE_SHIFT);
	ctg_client_close(client);
}

/* A bad request is answered, and the connection goes on. */
static void test_garbage(void **state)
{
	static const char *const bad[] = {"x", "{\"do\":\"alloc\"}",
		"{\"do\":\"alloc\",\"bytes\":0}", "\xff\xfe", "{\"do\":\"\xc3\x28\"}"};
	static char big[PROTO_MAX_CONTROL + 1], answer[PROTO_MAX_CONTROL];
	struct ctg_client *client = dial();
	int fd = ctg_client_fd(client);
	json_t *a;

	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		ssize_t n;

		assert_true(send(fd, bad[i], strlen(bad[i]), 0) > 0);
		n = recv(fd, answer, sizeof(answer), 0);
		assert_true(n > 0);
		a = json_loadb(answer, (size_t)n, 0, NULL);
		assert_true(json_is_false(json_object_get(a, "ok")));
		assert_int_equal(number(a, "error"), -EINVAL);
		json_decref(a);
	}
	memset(big, ' ', sizeof(big));
	memcpy(big, "{\"do\":\"stat\"}", 13);
	assert_int_equal(send(fd, big, sizeof(big), 0), sizeof(big));
	a = json_loadb(answer, (size_t)recv(fd, answer, sizeof(answer), 0), 0, NULL);
	assert_int_equal(number(a, "error"), -EMSGSIZE);
	json_decref(a);
	/* As long as it may be. */
	assert_int_equal(send(fd, big, sizeof(big) - 1, 0), sizeof(big) - 1);
	a = json_loadb(answer, (size_t)recv(fd, answer, sizeof(answer), 0), 0, NULL);
	assert_true(json_is_true(json_object_get(a, "ok")));
	json_decref(a);
	ctg_client_close(client);
}

/* ---- several at once ----------------------------------------------------------------------- */

static void *hammer(void *arg)
{
	struct ctg_client *client = dial();
	unsigned seed = (unsigned)(uintptr_t)arg;

	for (unsigned i = 0; i < 60; i++) {
		uint64_t bytes = (uint64_t)(rand_r(&seed) % 12 + 1) * MIB;
		json_t *answer = ask(client, of_bytes(bytes));

		if (json_is_true(json_object_get(answer, "ok"))) {
			char *memory = (char *)(uintptr_t)bytes_of(answer);

			/* Nobody else has it. */
			for (uint64_t at = 0; at < bytes; at += CTG_PAGE_SIZE) {
				assert_int_equal(memory[at], 0);
				memory[at] = (char)seed;
			}
			for (uint64_t at = 0; at < bytes; at += CTG_PAGE_SIZE)
				assert_int_equal(memory[at], (char)seed);
			json_decref(ask(client, of_lease(number(answer, "lease"))));
		} else {
			assert_int_equal(number(answer, "error"), -ENOMEM);
		}
		json_decref(answer);
	}
	ctg_client_close(client);
	return NULL;
}

static void test_parallel(void **state)
{
	pthread_t thread[6];

	for (uintptr_t i = 0; i < 6; i++)
		assert_int_equal(pthread_create(&thread[i], NULL, hammer, (void *)(i + 1)), 0);
	for (unsigned i = 0; i < 6; i++)
		assert_int_equal(pthread_join(thread[i], NULL), 0);
	assert_int_equal(area().nr_free, area().nr);
	assert_int_equal(area().frames_allocated, area().frames_released);
}

static int group_setup(void **state)
{
	strcpy(runtime, "/tmp/contig-test-XXXXXX");
	if (mkdtemp(runtime) == NULL)
		return -1;
	return setenv("XDG_RUNTIME_DIR", runtime, 1);
}

static int group_teardown(void **state)
{
	char command[128];

	snprintf(command, sizeof(command), "rm -rf '%s'", runtime);
	return system(command);
}

#define SERVED(test) cmocka_unit_test_setup_teardown(test, setup, teardown)

int main(int argc, char **argv)
{
	const struct CMUnitTest tests[] = {
		SERVED(test_stat),
		SERVED(test_map),
		SERVED(test_lease),
		SERVED(test_hold),
		SERVED(test_blocks),
		SERVED(test_many_blocks),
		SERVED(test_descriptor),
		SERVED(test_zero),
		SERVED(test_align),
		SERVED(test_refusals),
		SERVED(test_garbage),
		SERVED(test_parallel),
	};

	if (argc == 2)
		cmocka_set_test_filter(argv[1]);
	return cmocka_run_group_tests(tests, group_setup, group_teardown);
}
