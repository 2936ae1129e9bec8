/* SPDX-License-Identifier: MIT */
/* contig map: a region drawn as text or as a page. */
#include "cli.h"
#include <errno.h>
#include <string.h>

#define ROW_CELLS 64 /* 128 MiB a row */
#define BLOCK_BYTES (CTG_PAGEBLOCK_FRAMES * CTG_PAGE_SIZE)

static struct {
	char *html;
	int json;
} options;

static const struct poptOption table[] = {
	{"html", 0, POPT_ARG_STRING, &options.html, 0,
		"Write a page with the map as a picture (- is standard output)", "FILE"},
	{"json", 'j', POPT_ARG_NONE, &options.json, 0, "Print the region's answer as JSON", NULL},
	POPT_TABLEEND};

static const struct cli_usage usage = {
	.command = "contig map",
	.args = "[OPTION...] [NAME]",
	.about = "Draw a region, a character for each 2 MiB:\n"
		 "  . free   + lent   - lent, less than half   # taken   % taken in part   ! being "
		 "taken",
	.after = "Exit status: 0; 1 failed, 2 wrong usage, 3 no such region.\n",
};

static void print_rows(const char *label, const struct picture *picture)
{
	printf("%s\n", label);
	for (size_t i = 0; i < picture->nr; i += ROW_CELLS) {
		printf("%6llu MiB  ", (unsigned long long)(i * BLOCK_BYTES >> 20));
		for (size_t k = i; k < picture->nr && k < i + ROW_CELLS; k++)
			putchar(picture_chars[picture->cells[k]]);
		putchar('\n');
	}
}

static void print_legend(void)
{
	for (unsigned i = CELL_FREE; i < NR_CELLS; i++)
		printf("%s%c %s", i == CELL_FREE ? "" : "   ", picture_chars[i], picture_names[i]);
	putchar('\n');
}

static bool any_used(const struct picture *picture)
{
	for (size_t i = 0; i < picture->nr; i++) {
		if (picture->cells[i] > CELL_FREE)
			return true;
	}
	return false;
}

static int write_page(const json_t *answer, const struct picture *area, const struct picture *spill)
{
	bool to_stdout = strcmp(options.html, "-") == 0;
	FILE *out = to_stdout ? stdout : fopen(options.html, "w");
	int error;

	if (!out)
		return cli_fail(EXIT_FAILED, "--html: cannot write '%s': %s", options.html,
			strerror(errno));
	error = html_write(out, answer, area, spill);
	if (to_stdout)
		return cli_flush();
	if (fclose(out) != 0 || error)
		return cli_fail(EXIT_FAILED, "--html: cannot write '%s': %s", options.html,
			strerror(errno));
	return EXIT_OK;
}

static int draw(const json_t *answer)
{
	struct picture area, spill;
	int status;

	if (!picture_read(cli_get(answer, "blocks.area"), &area))
		return cli_fail(EXIT_FAILED, "the region's answer has no map");
	if (!picture_read(cli_get(answer, "blocks.spill"), &spill))
		spill.nr = 0;
	if (options.html) {
		status = write_page(answer, &area, &spill);
	} else {
		print_rows("region", &area);
		if (any_used(&spill))
			print_rows("displaced", &spill);
		print_legend();
		status = cli_flush();
	}
	picture_free(&area);
	picture_free(&spill);
	return status;
}

int map_main(int argc, const char **argv)
{
	const char **args;
	int status = cli_parse(&usage, argc, argv, table, false, &args);
	json_t *answer;

	if (status >= 0)
		return status;
	if (cli_count(args) > 1)
		return cli_fail(EXIT_USAGE, "one region at a time");
	status = cli_ask(args[0], json_pack("{s:s}", "do", "map"), &answer);
	if (options.json && answer) {
		int printed = cli_print_json(answer);

		status = status ? status : printed;
	} else if (status == EXIT_OK) {
		status = draw(answer);
	}
	json_decref(answer);
	return status;
}
