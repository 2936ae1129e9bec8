/* SPDX-License-Identifier: MIT */
/*
 * Fills MIB of memory, then frees it and has the allocator give back what it keeps. usage: purge
 * MIB Prints "full" and "empty"; a byte of standard input leads from one to the other, then to a
 * second round that finds calloc's memory zeroed, then "intact".
 */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* jemalloc's, in the preload library. */
int mallctl(const char *name, void *old, size_t *old_size, void *new, size_t new_size)
	__attribute__((weak));

#define BLOCK 100000

static void say(const char *word)
{
	char byte;

	puts(word);
	fflush(stdout);
	if (read(0, &byte, 1) != 1)
		_exit(2);
}

int main(int argc, char **argv)
{
	size_t nr = argc > 1 ? (strtoul(argv[1], NULL, 10) << 20) / BLOCK : 0;
	char **blocks = calloc(nr + 1, sizeof(*blocks));

	if (nr == 0 || !mallctl)
		return 64;
	for (int round = 0; round < 2; round++) {
		for (size_t i = 0; i < nr; i++) {
			blocks[i] = round ? calloc(1, BLOCK) : malloc(BLOCK);
			for (size_t k = 0; round && k < BLOCK; k++)
				if (blocks[i][k] != 0)
					return 3;
			memset(blocks[i], 0x5a, BLOCK);
		}
		say("full");
		for (size_t i = 0; i < nr; i++)
			free(blocks[i]);
		if (mallctl("thread.tcache.flush", NULL, NULL, NULL, 0) != 0 ||
			mallctl("arena.4096.purge", NULL, NULL, NULL, 0) != 0) /* 4096: all */
			return 4;
		say("empty");
	}
	puts("intact");
	return 0;
}
