/* SPDX-License-Identifier: MIT */
/*
 * The server: one region, its borrowers (other processes) and its control connections, on threads of
 * the calling process. `contig run` is a thin shell around it.
 */
#ifndef CONTIG_POSIX_SERVER_H
#define CONTIG_POSIX_SERVER_H

#include "proto.h"

struct ctg_server;

struct ctg_server_config {
	const char *name; /* of the socket; "redis" is RUNTIME_DIR/redis.sock */
	struct ctg_region_config region;
};

/* Open the region, bind the socket (0600; a stale one is replaced, a live one is -EEXIST), serve.
 * 0 or a negative errno with error->text. */
int ctg_server_start(const struct ctg_server_config *config, struct ctg_server **out,
	struct ctg_error *error);
/* Stop serving, drop every lease and borrower, remove the socket, close the region. */
void ctg_server_stop(struct ctg_server *server);
const char *ctg_server_socket(const struct ctg_server *server);
struct ctg_region *ctg_server_region(struct ctg_server *server);
/* Borrowers connected now. */
unsigned ctg_server_borrowers(struct ctg_server *server);
/* Wait until no borrower is connected and no detached lease is left, at most until deadline
 * (CLOCK_MONOTONIC ns; CTG_NO_DEADLINE). 0 or -ETIMEDOUT. */
int ctg_server_wait_idle(struct ctg_server *server, uint64_t deadline);

#endif
