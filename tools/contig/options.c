/* SPDX-License-Identifier: MIT */
/* Command lines: popt, with one line for each mistake and --help everywhere. */
#include "cli.h"
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#define OPTION_HELP 0x1000000

static int print_help(poptContext context, const struct cli_usage *usage)
{
	printf("%s\n\n", usage->about);
	poptPrintHelp(context, stdout, 0);
	if (usage->after)
		printf("\n%s", usage->after);
	return cli_flush();
}

static int say_mistake(poptContext context, const struct cli_usage *usage, int rc)
{
	const char *option = poptBadOption(context, POPT_BADOPTION_NOALIAS);

	if (!option)
		option = "?";
	/* What was meant as a negative number looks like an option. */
	if (rc == POPT_ERROR_BADOPT && option[0] == '-' && isdigit((unsigned char)option[1]))
		return cli_fail(EXIT_USAGE, "%s is negative", option);
	if (rc == POPT_ERROR_NOARG)
		return cli_fail(EXIT_USAGE, "%s: a value is missing; see '%s --help'", option,
			usage->command);
	if (rc == POPT_ERROR_BADOPT)
		return cli_fail(
			EXIT_USAGE, "%s: no such option; see '%s --help'", option, usage->command);
	return cli_fail(
		EXIT_USAGE, "%s: %s; see '%s --help'", option, poptStrerror(rc), usage->command);
}

int cli_parse(const struct cli_usage *usage, int argc, const char **argv,
	const struct poptOption *options, bool stop_at_first, const char ***args)
{
	static const char *none[] = {NULL};
	/* popt keeps pointers to the tables and to argv: they live as long as the process. */
	static poptContext context;
	static struct poptOption table[3];

	table[0] = (struct poptOption){
		.argInfo = POPT_ARG_INCLUDE_TABLE, .arg = (void *)(uintptr_t)options};
	table[1] = (struct poptOption){.longName = "help",
		.shortName = 'h',
		.argInfo = POPT_ARG_NONE,
		.val = OPTION_HELP,
		.descrip = "Show this"};
	table[2] = (struct poptOption)POPT_TABLEEND;
	context = poptGetContext(
		usage->command, argc, argv, table, stop_at_first ? POPT_CONTEXT_POSIXMEHARDER : 0);
	if (!context)
		return cli_fail(EXIT_FAILED, "out of memory");
	poptSetOtherOptionHelp(context, usage->args);
	for (int rc; (rc = poptGetNextOpt(context)) != -1;) {
		if (rc == OPTION_HELP)
			return print_help(context, usage);
		if (rc < -1)
			return say_mistake(context, usage, rc);
	}
	*args = poptGetArgs(context);
	if (!*args)
		*args = none;
	return -1;
}

const char **cli_cut(int *argc, const char **argv)
{
	for (int i = 1; i < *argc; i++) {
		if (strcmp(argv[i], "--") == 0) {
			*argc = i;
			return argv + i + 1;
		}
	}
	return NULL;
}

size_t cli_count(const char **args)
{
	size_t n = 0;

	while (args[n])
		n++;
	return n;
}
