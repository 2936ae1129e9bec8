/* SPDX-License-Identifier: MIT */
/* contig stat: what a region holds and has done, for people or as JSON. */
#include "cli.h"
#include <string.h>

static struct {
	int json, reset_stall;
} options;

static const struct poptOption table[] = {
	{"json", 'j', POPT_ARG_NONE, &options.json, 0, "Print it as JSON", NULL},
	{"reset-stall", 0, POPT_ARG_NONE, &options.reset_stall, 0,
		"Begin to measure the longest stall anew, after this", NULL},
	POPT_TABLEEND};

static const struct cli_usage usage = {
	.command = "contig stat",
	.args = "[OPTION...] [NAME]",
	.about = "Show what a region holds and what it has done since it was made.",
	.after = "Exit status: 0; 1 failed, 2 wrong usage, 3 no such region.\n",
};

static void row_bytes(const char *label, uint64_t bytes)
{
	char text[CLI_SIZE_TEXT];

	printf("  %-24s %s\n", label, cli_size_text(bytes, text));
}

static void row_frames(const char *label, const json_t *answer, const char *path)
{
	row_bytes(label, cli_u64(answer, path) * CTG_PAGE_SIZE);
}

static void row_count(const char *label, const json_t *answer, const char *path)
{
	printf("  %-24s %llu\n", label, (unsigned long long)cli_u64(answer, path));
}

static void print_region(const json_t *answer)
{
	const json_t *physical = json_object_get(answer, "physical");

	printf("region '%s', %s, %llu-KiB mappings\n", cli_string(answer, "name"),
		cli_string(answer, "backing"),
		(unsigned long long)(4u << cli_u64(answer, "map_order")));
	printf("  %-24s %s%s%s%s\n", "physically contiguous",
		json_is_true(physical)    ? "yes"
		: json_is_false(physical) ? "no"
					  : "cannot be known",
		*cli_string(answer, "physical_why") ? " (" : "", cli_string(answer, "physical_why"),
		*cli_string(answer, "physical_why") ? ")" : "");
	printf("  %-24s %s%s%s%s\n", "writers wait by", cli_string(answer, "guard"),
		*cli_string(answer, "guard_why") ? " (" : "", cli_string(answer, "guard_why"),
		*cli_string(answer, "guard_why") ? ")" : "");
	printf("memory\n");
	row_bytes("region", cli_u64(answer, "region_bytes"));
	row_frames("lent", answer, "area.lent");
	row_frames("taken", answer, "area.allocated");
	row_frames("free", answer, "area.free");
	row_frames("longest free run", answer, "area.longest_free");
	row_frames("longest that can be had", answer, "area.longest_unallocated");
	row_bytes("displaced", cli_u64(answer, "spill_used_bytes"));
	row_bytes("displaced, at most", cli_u64(answer, "spill_bytes"));
}

static void print_borrower(const json_t *borrower)
{
	char lent[CLI_SIZE_TEXT], away[CLI_SIZE_TEXT], ordinary[CLI_SIZE_TEXT],
		stall[CLI_SIZE_TEXT];

	printf("  %8llu %-16s lent %s, displaced %s, ordinary %s, longest stall %s\n",
		(unsigned long long)cli_u64(borrower, "pid"), cli_string(borrower, "comm"),
		cli_size_text(cli_u64(borrower, "lent_bytes"), lent),
		cli_size_text(cli_u64(borrower, "spilled_bytes"), away),
		cli_size_text(cli_u64(borrower, "private_bytes"), ordinary),
		cli_time_text(cli_u64(borrower, "stall_max_ns"), stall));
}

static void print_stat(const json_t *answer)
{
	const json_t *borrowers = json_object_get(answer, "borrowers"), *borrower;
	size_t i;

	print_region(answer);
	printf("since it was made\n");
	row_count("buffers taken", answer, "counters.cma_alloc_success");
	row_count("requests refused", answer, "counters.cma_alloc_fail");
	row_count("frames moved", answer, "counters.frames_migrated");
	row_count("of them, back home", answer, "counters.frames_returned");
	row_count("could not be moved", answer, "counters.migrate_fail");
	row_count("frames zeroed", answer, "counters.frames_zeroed");
	printf("borrowers\n");
	json_array_foreach(borrowers, i, borrower) print_borrower(borrower);
	if (json_array_size(borrowers) == 0)
		printf("  none\n");
}

int stat_main(int argc, const char **argv)
{
	const char **args;
	int status = cli_parse(&usage, argc, argv, table, false, &args);
	json_t *request, *answer;

	if (status >= 0)
		return status;
	if (cli_count(args) > 1)
		return cli_fail(EXIT_USAGE, "one region at a time");
	request = json_pack("{s:s}", "do", "stat");
	if (request && options.reset_stall)
		json_object_set_new(request, "reset_stall", json_true());
	status = cli_ask(args[0], request, &answer);
	if (options.json && answer) {
		int printed = cli_print_json(answer);

		status = status ? status : printed;
	} else if (status == EXIT_OK) {
		print_stat(answer);
		status = cli_flush();
	}
	json_decref(answer);
	return status;
}
