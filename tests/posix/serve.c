/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "serve.h"

#include <errno.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <cmocka.h>

static char runtime[64];
struct ctg_server *server;

/* ---- the region ---------------------------------------------------------------------------- */

int start(const char *backing, bool force_stop)
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

int setup_uffd(void **state)
{
	return start(NULL, false);
}

int setup_stop(void **state)
{
	return start(NULL, true);
}

/* Huge pages may not be had here: then the test skips (NEED_GUARD). */
int setup_hugetlb(void **state)
{
	int err = start("hugetlb", false);

	return err == -ENOMEM || err == -EPERM || err == -ENOSYS ? 0 : err;
}

struct ctg_cma_stat area(void)
{
	struct ctg_cma_stat stat;

	ctg_cma_stat(ctg_region_area(ctg_server_region(server)), &stat);
	return stat;
}

/* As much as that, or as a buffer can have: physical memory may come in short runs. */
uint64_t at_most(uint64_t bytes)
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
void assert_all_free(void)
{
	assert_int_equal(ctg_server_wait_idle(server, posix_now(NULL) + 20000000000u), 0);
	for (unsigned i = 0; i < 10000 && !all_free(); i++)
		usleep(1000);
	assert_true(all_free());
}

int teardown(void **state)
{
	ctg_server_stop(server);
	server = NULL;
	return 0;
}

/* Skips the test where writers can be kept out in neither way. */
bool can_guard(void)
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

/* ---- a taker ------------------------------------------------------------------------------- */

json_t *ask(struct ctg_client *client, json_t *request)
{
	struct ctg_error error;
	json_t *answer;

	assert_non_null(request);
	if (ctg_client_call(client, request, &answer, NULL, &error) != 0)
		fail_msg("%s", error.text);
	json_decref(request);
	return answer;
}

struct ctg_client *dial(void)
{
	struct ctg_client *client;
	struct ctg_error error;

	if (ctg_client_connect(NAME, &client, &error) != 0)
		fail_msg("%s", error.text);
	return client;
}

/* Take so many bytes: the lease's number, or the negative error. *text: of a failure. */
json_int_t take(struct ctg_client *client, uint64_t bytes, bool hold, char *text)
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
json_int_t take_surely(struct ctg_client *client, uint64_t bytes, bool hold)
{
	char text[256] = "";
	json_int_t lease = take(client, bytes, hold, text);

	if (lease < 0)
		fail_msg("%s", text);
	return lease;
}

void release(struct ctg_client *client, json_int_t lease)
{
	json_t *answer = ask(client, json_pack("{s:s, s:I}", "do", "release", "lease", lease));

	assert_true(json_is_true(json_object_get(answer, "ok")));
	json_decref(answer);
}

/* A number of the first (and only) borrower. */
json_int_t borrower_number(struct ctg_client *client, const char *name)
{
	json_t *answer = ask(client, json_pack("{s:s}", "do", "stat"));
	json_t *list = json_object_get(answer, "borrowers");
	json_int_t n;

	assert_int_equal(json_array_size(list), 1);
	n = json_integer_value(json_object_get(json_array_get(list, 0), name));
	json_decref(answer);
	return n;
}

int group_setup(void **state)
{
	strcpy(runtime, "/tmp/contig-test-XXXXXX");
	if (mkdtemp(runtime) == NULL)
		return -1;
	signal(SIGPIPE, SIG_IGN);
	return setenv("XDG_RUNTIME_DIR", runtime, 1);
}

int group_teardown(void **state)
{
	char command[128];

	snprintf(command, sizeof(command), "rm -rf '%s'", runtime);
	return system(command);
}
