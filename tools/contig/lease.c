/* SPDX-License-Identifier: MIT */
/* contig release and contig leases. */
#include "cli.h"

static struct {
	char *from;
	int json;
} options;

static const struct poptOption table[] = {
	{"from", 'f', POPT_ARG_STRING, &options.from, 0,
		"The region (may be left out if there is one only)", "NAME"},
	{"json", 'j', POPT_ARG_NONE, &options.json, 0, "Print the region's answer as JSON", NULL},
	POPT_TABLEEND};

static const struct cli_usage release_usage = {
	.command = "contig release",
	.args = "[OPTION...] LEASE [BLOCK]",
	.about = "Give a buffer back, or one block of it (counted from 0).",
	.after = "Exit status: 0; 1 no such lease, 2 wrong usage, 3 no such region.\n",
};

static const struct cli_usage leases_usage = {
	.command = "contig leases",
	.args = "[OPTION...] [NAME]",
	.about = "List the buffers that have been taken out of a region.",
	.after = "Exit status: 0; 1 failed, 2 wrong usage, 3 no such region.\n",
};

/* Print or drop an answer. */
static int finish(int status, json_t *answer)
{
	if (options.json && answer) {
		int printed = cli_print_json(answer);

		status = status ? status : printed;
	}
	json_decref(answer);
	return status;
}

int release_main(int argc, const char **argv)
{
	const char **args;
	int status = cli_parse(&release_usage, argc, argv, table, false, &args);
	json_t *request, *answer;
	const char *why;
	uint64_t number;

	if (status >= 0)
		return status;
	if (cli_count(args) < 1 || cli_count(args) > 2)
		return cli_fail(EXIT_USAGE, "one LEASE and perhaps one BLOCK are wanted; "
					    "'contig leases' lists them");
	why = cli_parse_number(args[0], 1, INT64_MAX, &number);
	if (why)
		return cli_fail(EXIT_USAGE, "LEASE: '%s' %s", args[0], why);
	request = json_pack("{s:s, s:I}", "do", "release", "lease", (json_int_t)number);
	if (args[1]) {
		why = cli_parse_number(args[1], 0, UINT32_MAX, &number);
		if (why) {
			json_decref(request);
			return cli_fail(EXIT_USAGE, "BLOCK: '%s' %s", args[1], why);
		}
		json_object_set_new(request, "block", json_integer((json_int_t)number));
	}
	status = cli_ask(options.from, request, &answer);
	return finish(status, answer);
}

static void print_lease(const json_t *lease)
{
	char size[CLI_SIZE_TEXT], since[CLI_SIZE_TEXT];

	printf("%6llu  %10s  %6llu  %-5s  %8llu  %-16s  %s\n",
		(unsigned long long)cli_u64(lease, "lease"),
		cli_size_text(cli_u64(lease, "bytes"), size),
		(unsigned long long)cli_u64(lease, "nr_blocks"),
		json_is_true(cli_get(lease, "hold")) ? "yes" : "no",
		(unsigned long long)cli_u64(lease, "pid"), cli_string(lease, "comm"),
		cli_time_text(cli_u64(lease, "age_ns"), since));
}

int leases_main(int argc, const char **argv)
{
	const char **args;
	int status = cli_parse(&leases_usage, argc, argv, table, false, &args);
	json_t *answer, *lease;
	size_t i;

	if (status >= 0)
		return status;
	if (cli_count(args) > 1 || (args[0] && options.from))
		return cli_fail(EXIT_USAGE, "one region at a time");
	status = cli_ask(
		args[0] ? args[0] : options.from, json_pack("{s:s}", "do", "leases"), &answer);
	if (status || options.json)
		return finish(status, answer);
	printf("%6s  %10s  %6s  %-5s  %8s  %-16s  %s\n", "LEASE", "SIZE", "BLOCKS", "HELD", "PID",
		"TAKEN BY", "FOR");
	json_array_foreach(json_object_get(answer, "leases"), i, lease) print_lease(lease);
	json_decref(answer);
	return cli_flush();
}
