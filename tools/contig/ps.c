/* SPDX-License-Identifier: MIT */
/* contig ps: the regions there are, and who borrows from them. */
#include "cli.h"
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>

static struct {
	int json;
} options;

static const struct poptOption table[] = {
	{"json", 'j', POPT_ARG_NONE, &options.json, 0, "Print it as JSON", NULL}, POPT_TABLEEND};

static const struct cli_usage usage = {
	.command = "contig ps",
	.args = "[OPTION...]",
	.about = "List your regions, and under each the programs that borrow from it.",
	.after = "LENT is in use by programs, TAKEN by buffers, FREE by nobody. Of a program, AWAY "
		 "is\n"
		 "what buffers have displaced, ORDINARY what did not fit into the region.\n",
};

/* A region's stat; NULL if it went away or does not answer (a stopped process) within a second. */
static json_t *stat_of(const char *name)
{
	static const struct timeval patience = {.tv_sec = 1};
	json_t *request = json_pack("{s:s}", "do", "stat"), *answer = NULL;
	struct ctg_error error;
	struct ctg_client *client;

	if (request && ctg_client_connect(name, &client, &error) == 0) {
		setsockopt(ctg_client_fd(client), SOL_SOCKET, SO_RCVTIMEO, &patience,
			sizeof(patience));
		if (ctg_client_call(client, request, &answer, NULL, &error) != 0)
			answer = NULL;
		ctg_client_close(client);
	}
	json_decref(request);
	return answer;
}

static void print_borrower(const json_t *borrower)
{
	char lent[CLI_SIZE_TEXT], away[CLI_SIZE_TEXT], ordinary[CLI_SIZE_TEXT];

	printf("  %8llu  %-18s  %10s lent  %10s away  %10s ordinary\n",
		(unsigned long long)cli_u64(borrower, "pid"), cli_string(borrower, "comm"),
		cli_size_text(cli_u64(borrower, "lent_bytes"), lent),
		cli_size_text(cli_u64(borrower, "spilled_bytes"), away),
		cli_size_text(cli_u64(borrower, "private_bytes"), ordinary));
}

static void print_region(const char *name, const json_t *stat)
{
	char size[CLI_SIZE_TEXT], lent[CLI_SIZE_TEXT], taken[CLI_SIZE_TEXT], unused[CLI_SIZE_TEXT];
	const json_t *borrower;
	size_t i;

	if (!stat) {
		printf("%-16s  does not answer (is its process stopped?)\n", name);
		return;
	}
	printf("%-16s  %-8s  %10s  %10s  %10s  %10s\n", name, cli_string(stat, "backing"),
		cli_size_text(cli_u64(stat, "area.frames") * CTG_PAGE_SIZE, size),
		cli_size_text(cli_u64(stat, "area.lent") * CTG_PAGE_SIZE, lent),
		cli_size_text(cli_u64(stat, "area.allocated") * CTG_PAGE_SIZE, taken),
		cli_size_text(cli_u64(stat, "area.free") * CTG_PAGE_SIZE, unused));
	json_array_foreach(json_object_get(stat, "borrowers"), i, borrower)
		print_borrower(borrower);
}

int ps_main(int argc, const char **argv)
{
	const char **args;
	int status = cli_parse(&usage, argc, argv, table, false, &args);
	json_t *list, *all, *entry;
	size_t i;

	if (status >= 0)
		return status;
	if (*args)
		return cli_fail(EXIT_USAGE, "'%s' is one argument too many", *args);
	list = ctg_client_list();
	all = json_array();
	if (!list || !all)
		return cli_fail(EXIT_FAILED, "out of memory");
	if (!options.json && json_array_size(list))
		printf("%-16s  %-8s  %10s  %10s  %10s  %10s\n", "REGION", "BACKING", "SIZE", "LENT",
			"TAKEN", "FREE");
	json_array_foreach(list, i, entry)
	{
		const char *name = cli_string(entry, "name");
		json_t *stat;

		if (!json_is_true(json_object_get(entry, "live")))
			continue;
		stat = stat_of(name);
		if (options.json)
			json_array_append_new(all, json_pack("{s:s, s:o}", "name", name, "stat",
							   stat ? json_incref(stat) : json_null()));
		else
			print_region(name, stat);
		json_decref(stat);
	}
	status = options.json ? cli_print_json(all) : cli_flush();
	json_decref(all);
	json_decref(list);
	return status;
}
