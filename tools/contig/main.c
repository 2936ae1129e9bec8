/* SPDX-License-Identifier: MIT */
/* The contig command: which command, and how failures are said. */
#include "cli.h"
#include <stdarg.h>
#include <string.h>

#ifndef CONTIG_VERSION
#error "the build says which version this is"
#endif

static const struct command {
	const char *name;
	const char *summary;
	int (*main)(int argc, const char **argv);
} commands[] = {
	{"run", "run a program whose heap lives in a lent region", run_main},
	{"ps", "list regions and the programs that borrow from them", ps_main},
	{"alloc", "take a contiguous buffer out of a region", alloc_main},
	{"release", "give a buffer back", release_main},
	{"leases", "list the buffers that are taken", leases_main},
	{"stat", "show what a region holds and has done", stat_main},
	{"map", "draw a region, a character for each 2 MiB", map_main},
	{"top", "watch a region live", top_main},
};
#define NR_COMMANDS (sizeof(commands) / sizeof(commands[0]))

static const char *current = "contig";

int cli_fail(int status, const char *format, ...)
{
	va_list args;

	fprintf(stderr, "%s: ", current);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
	return status;
}

void cli_note(const char *format, ...)
{
	va_list args;

	fprintf(stderr, "%s: ", current);
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fputc('\n', stderr);
}

static int print_help(void)
{
	printf("Usage: contig COMMAND [OPTION...] [ARG...]\n\n"
	       "Large contiguous buffers out of memory that other programs are using.\n\n"
	       "Commands:\n");
	for (size_t i = 0; i < NR_COMMANDS; i++)
		printf("  %-10s %s\n", commands[i].name, commands[i].summary);
	printf("\n'contig COMMAND --help' tells more; so does 'man contig'.\n\n"
	       "  --help     show this\n"
	       "  --version  show the version\n");
	return cli_flush();
}

static int known(const char *text, const char *const *names)
{
	for (; *names; names++) {
		if (strcmp(text, *names) == 0)
			return 1;
	}
	return 0;
}

int main(int argc, char **argv)
{
	static const char *const help[] = {"--help", "-h", "-?", "help", NULL};
	static const char *const version[] = {"--version", "-V", NULL};
	static char name[32];

	if (argc < 2)
		return cli_fail(EXIT_USAGE, "a command is missing; 'contig --help' lists them");
	if (known(argv[1], help))
		return print_help();
	if (known(argv[1], version)) {
		printf("contig %s\n", CONTIG_VERSION);
		return cli_flush();
	}
	for (size_t i = 0; i < NR_COMMANDS; i++) {
		if (strcmp(argv[1], commands[i].name) != 0)
			continue;
		snprintf(name, sizeof(name), "contig %s", commands[i].name);
		current = name;
		/* popt wants const strings; nothing writes to them. */
		const char **args = (const char **)(void *)(argv + 1);
		args[0] = name;
		return commands[i].main(argc - 1, args);
	}
	return cli_fail(EXIT_USAGE, "'%s' is not a command; 'contig --help' lists them", argv[1]);
}
