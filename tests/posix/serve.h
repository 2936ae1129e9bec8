/* SPDX-License-Identifier: MIT */
/* A server for the tests that use one through its socket: its region, and takers. */
#ifndef CONTIG_TESTS_SERVE_H
#define CONTIG_TESTS_SERVE_H

#include "borrower.h"
#include "client.h"
#include "state.h"

#define NAME "test"
#define MIB ((uint64_t)1 << 20)
#define AREA_BYTES (64 * MIB)
#define AREA_CHUNKS (AREA_BYTES / POSIX_CHUNK)

extern struct ctg_server *server; /* NULL: no region could be had, the test skips (NEED_GUARD) */

/* A directory of sockets of the test's own, and its end. */
int group_setup(void **state);
int group_teardown(void **state);
int start(const char *backing, bool force_stop);
int setup_uffd(void **state);
int setup_stop(void **state);
int setup_hugetlb(void **state);
int teardown(void **state);

struct ctg_cma_stat area(void);
/* As much as that, or as a buffer can have: physical memory may come in short runs. */
uint64_t at_most(uint64_t bytes);
/* Nobody is left, and neither is a frame of theirs, once the server has seen that they have gone.
 */
void assert_all_free(void);

/* Can writers be kept out, so that memory can move? */
bool can_guard(void);
#define NEED_GUARD()                                                                               \
	do {                                                                                       \
		if (!can_guard())                                                                  \
			skip();                                                                    \
	} while (0)

struct ctg_client *dial(void);
json_t *ask(struct ctg_client *client, json_t *request);
/* Take so many bytes: the lease's number, or the negative error. *text: of a failure. */
json_int_t take(struct ctg_client *client, uint64_t bytes, bool hold, char *text);
/* The same where it must succeed. */
json_int_t take_surely(struct ctg_client *client, uint64_t bytes, bool hold);
void release(struct ctg_client *client, json_int_t lease);
/* A number of the first (and only) borrower in a stat answer. */
json_int_t borrower_number(struct ctg_client *client, const char *name);

/* Tests with a server of each kind. */
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

#endif
