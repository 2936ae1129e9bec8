/* SPDX-License-Identifier: MIT */
/* The control side of a region's socket, for tools: one request, one answer. Needs jansson. */
#ifndef CONTIG_POSIX_CLIENT_H
#define CONTIG_POSIX_CLIENT_H

#include "proto.h"
#include <jansson.h>

struct ctg_client;

/* name: of a region (see posix_socket_path). 0, -ENOENT: no such region; -ECONNREFUSED etc. as
 * negative errno, error->text with the remedy. */
int ctg_client_connect(const char *name, struct ctg_client **out, struct ctg_error *error);
void ctg_client_close(struct ctg_client *client);
/* The connection, to poll for its end. */
int ctg_client_fd(const struct ctg_client *client);

/*
 * Send a request, wait for its answer. Steals nothing. *answer: a new reference, also when the answer
 * says {"ok": false}. *fd: a descriptor that came along, or -1; may be NULL.
 * 0 when an answer came; negative errno when the server is gone, or what it sent is not an answer.
 */
int ctg_client_call(struct ctg_client *client, json_t *request, json_t **answer, int *fd,
	struct ctg_error *error);

/* Names of the regions whose sockets exist, as a JSON array of {"name", "live"}; removes stale ones. */
json_t *ctg_client_list(void);

#endif
