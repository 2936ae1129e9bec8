/* SPDX-License-Identifier: MIT */
/*
 * Everything that takes apart what comes over the socket, fed with anything. Built with libFuzzer
 * (-fsanitize=fuzzer -DCONTIG_LIBFUZZER) it searches; otherwise main() runs the seeds in the
 * directories it is given, and the same mutations of each in every run.
 */
#define _GNU_SOURCE
#include "state.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MUST(cond)                                                                                 \
	do {                                                                                       \
		if (!(cond)) {                                                                     \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond);                 \
			abort();                                                                   \
		}                                                                                  \
	} while (0)

static void try_control(const char *text, size_t size)
{
	struct control_request request;
	struct ctg_error error = {0};
	int err = control_parse(text, size, &request, &error);
	json_t *answer;

	if (err != 0) {
		MUST(err == -CTG_EINVAL && error.code == err);
		MUST(error.text[0] != '\0' && memchr(error.text, '\0', sizeof(error.text)) != NULL);
		MUST(strchr(error.text, '\n') == NULL);
		answer = control_failure(&error, NULL);
		MUST(json_is_string(json_object_get(answer, "text")));
		json_decref(answer);
		return;
	}
	MUST(request.verb <= CONTROL_LEASES);
	if (request.verb == CONTROL_ALLOC) {
		MUST((request.bytes != 0) != (request.count != 0));
		MUST(request.bytes <= INT64_MAX && request.timeout_ns <= INT64_MAX);
		MUST(request.order <= CTG_MAX_ORDER && request.count <= (uint64_t)1 << 22);
		MUST((request.align & (request.align - 1)) == 0);
	}
}

static void try_request(const uint8_t *data, size_t size)
{
	static const struct {
		uint64_t window, bytes;
	} windows[] = {
		{0x7f0000000000, 64ull << 30},
		{POSIX_CHUNK, POSIX_CHUNK},
		{(CTG_MM_MAX_VPN << CTG_PAGE_SHIFT) - POSIX_CHUNK, POSIX_CHUNK},
	};
	struct proto_request request;

	for (size_t i = 0; i < sizeof(windows) / sizeof(windows[0]); i++) {
		if (session_check_request(
			    windows[i].window, windows[i].bytes, data, size, &request) != 0)
			continue;
		MUST(size == sizeof(request));
		if (request.kind == PROTO_COUNT) {
			MUST(request.addr < PROTO_NR_COUNTS);
			continue;
		}
		MUST(request.kind >= PROTO_MAP && request.kind <= PROTO_LEND);
		MUST(request.addr % POSIX_CHUNK == 0 && request.bytes % POSIX_CHUNK == 0);
		MUST(request.bytes != 0 && request.addr + request.bytes > request.addr);
		MUST(request.addr >= windows[i].window);
		MUST(request.addr + request.bytes <= windows[i].window + windows[i].bytes);
	}
}

static void try_hello(const uint8_t *data, size_t size)
{
	struct proto_hello hello;

	if (session_check_hello(data, size, &hello) != 0)
		return;
	MUST(size == sizeof(hello));
	if (hello.role != PROTO_CALL) {
		MUST(hello.role == PROTO_AGENT || hello.role == PROTO_CONTROL);
		return;
	}
	MUST(hello.window % POSIX_CHUNK == 0 && hello.window_bytes % POSIX_CHUNK == 0);
	MUST(hello.window != 0 && hello.window_bytes != 0);
	MUST(hello.window + hello.window_bytes > hello.window);
	MUST(hello.window + hello.window_bytes <= CTG_MM_MAX_VPN << CTG_PAGE_SHIFT);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	try_control((const char *)data, size);
	try_request(data, size);
	try_hello(data, size);
	return 0;
}

#ifndef CONTIG_LIBFUZZER
#define MUTATIONS 4000

static uint64_t seed;
static size_t next_random(size_t below)
{
	seed ^= seed << 13;
	seed ^= seed >> 7;
	seed ^= seed << 17;
	return below == 0 ? 0 : (size_t)(seed % below);
}

/* Flip, overwrite, cut or double something. */
static size_t mutate(uint8_t *data, size_t size, size_t room)
{
	static const char interesting[] = "{}[]\",:\\0129-.eE\0\xff\x80tfn";
	size_t at = next_random(size), len;

	switch (next_random(5)) {
	case 0:
		if (size != 0)
			data[at] ^= (uint8_t)(1u << next_random(8));
		break;
	case 1:
		if (size != 0)
			data[at] = (uint8_t)interesting[next_random(sizeof(interesting))];
		break;
	case 2:
		return next_random(size + 1);
	case 3:
		len = next_random(size - at + 1);
		if (size + len > room)
			break;
		memmove(data + at + len, data + at, size - at);
		return size + len;
	default:
		len = next_random(size - at + 1);
		memmove(data + at, data + at + len, size - at - len);
		return size - len;
	}
	return size;
}

static void run_seed(const char *path)
{
	static uint8_t data[65536], work[sizeof(data)];
	FILE *file = fopen(path, "rb");
	size_t size, n;

	MUST(file != NULL);
	size = fread(data, 1, sizeof(data), file);
	fclose(file);
	LLVMFuzzerTestOneInput(data, size);
	seed = 0x9e3779b97f4a7c15ull;
	for (unsigned i = 0; i < MUTATIONS; i++) {
		memcpy(work, data, size);
		n = size;
		for (size_t k = 1 + next_random(4); k > 0; k--)
			n = mutate(work, n, sizeof(work));
		LLVMFuzzerTestOneInput(work, n);
	}
}

int main(int argc, char **argv)
{
	unsigned seeds = 0;

	for (int i = 1; i < argc; i++) {
		struct dirent **list;
		char path[4096];
		int n = scandir(argv[i], &list, NULL, alphasort);

		if (n < 0) {
			fprintf(stderr, "%s: not a directory of seeds\n", argv[i]);
			return 1;
		}
		for (int k = 0; k < n; k++) {
			snprintf(path, sizeof(path), "%s/%s", argv[i], list[k]->d_name);
			if (list[k]->d_name[0] != '.') {
				run_seed(path);
				seeds++;
			}
			free(list[k]);
		}
		free(list);
	}
	/* As TAP: one case. */
	printf("1..1\n%sok 1 - %u seeds, %u mutations each\n", seeds == 0 ? "not " : "", seeds,
		MUTATIONS);
	return seeds == 0;
}
#endif
