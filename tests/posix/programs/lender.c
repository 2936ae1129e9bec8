/* SPDX-License-Identifier: MIT */
/* A server in a process of its own, to be killed. usage: lender NAME MIB. Prints the path of its
 * socket, serves until standard input ends, and takes buffers all the time. */
#include "server.h"
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void *take(void *server)
{
	struct ctg_region *region = ctg_server_region(server);
	struct ctg_buffer buffer;

	while (region)
		if (ctg_region_alloc(region, (uint64_t)48 << 20, NULL, &buffer) == 0)
			ctg_region_release(region, &buffer);
	return NULL;
}

int main(int argc, char **argv)
{
	struct ctg_server_config config = {.region = {.spill_bytes = CTG_SPILL_DEFAULT}};
	struct ctg_server *server;
	struct ctg_error error;
	pthread_t taker;
	char byte;

	if (argc < 3)
		return 64;
	config.name = argv[1];
	config.region.bytes = strtoull(argv[2], NULL, 10) << 20;
	if (ctg_server_start(&config, &server, &error) != 0) {
		fprintf(stderr, "lender: %s\n", error.text);
		return 1;
	}
	if (pthread_create(&taker, NULL, take, server) != 0)
		return 2;
	puts(ctg_server_socket(server));
	fflush(stdout);
	while (read(0, &byte, 1) > 0)
		;
	_exit(0);
}
