/* SPDX-License-Identifier: MIT */
/* contig top: a region live on the terminal. */
#include "cli.h"
#include <locale.h>
#include <ncurses.h>
#include <stdlib.h>
#include <unistd.h>

#define BLOCK_BYTES (CTG_PAGEBLOCK_FRAMES * CTG_PAGE_SIZE)

static struct {
	char *interval;
} options;

static const struct poptOption table[] = {
	{"interval", 'i', POPT_ARG_STRING, &options.interval, 0,
		"Seconds from one picture to the next (default 1)", "SECONDS"},
	POPT_TABLEEND};

static const struct cli_usage usage = {
	.command = "contig top",
	.args = "[OPTION...] [NAME]",
	.about = "Watch a region: what is lent, taken and free, and who borrows. q quits.",
	.after = "Exit status: 0; 1 failed, 2 wrong usage, 3 no such region (any more).\n",
};

static short colour_of(unsigned cell)
{
	switch (cell) {
	case CELL_SOME:
	case CELL_LENT:
		return 1;
	case CELL_TAKEN:
	case CELL_PART:
		return 2;
	case CELL_BUSY:
		return 3;
	default:
		return 0;
	}
}

static void begin(void)
{
	setlocale(LC_ALL, "");
	initscr();
	cbreak();
	noecho();
	curs_set(0);
	keypad(stdscr, TRUE);
	if (has_colors() && start_color() == OK) {
		use_default_colors();
		init_pair(1, COLOR_CYAN, -1);
		init_pair(2, COLOR_RED, -1);
		init_pair(3, COLOR_MAGENTA, -1);
	}
}

/* The map, as many blocks to a character as are needed to fit; a character shows the busiest. */
static void draw_map(const struct picture *picture, int top, int rows)
{
	size_t columns = COLS > 2 ? (size_t)COLS - 2 : 1;
	size_t room = columns * (size_t)(rows > 0 ? rows : 1);
	size_t each = (picture->nr + room - 1) / room;

	if (each == 0)
		each = 1;
	for (size_t i = 0, k = 0; i < picture->nr; i += each, k++) {
		unsigned cell = 0;

		for (size_t n = i; n < i + each && n < picture->nr; n++)
			cell = picture->cells[n] > cell ? picture->cells[n] : cell;
		attrset(COLOR_PAIR(colour_of(cell)));
		mvaddch(top + (int)(k / columns), 1 + (int)(k % columns),
			(chtype)picture_chars[cell]);
	}
	attrset(A_NORMAL);
}

static void draw_borrowers(const json_t *answer, int top)
{
	char lent[CLI_SIZE_TEXT], away[CLI_SIZE_TEXT], ordinary[CLI_SIZE_TEXT],
		stall[CLI_SIZE_TEXT];
	const json_t *borrower;
	size_t i;

	attron(A_BOLD);
	mvprintw(top, 1, "%8s  %-16s %10s %10s %10s %12s", "PID", "COMMAND", "LENT", "DISPLACED",
		"ORDINARY", "MAX STALL");
	attroff(A_BOLD);
	json_array_foreach(json_object_get(answer, "borrowers"), i, borrower)
	{
		if (top + 1 + (int)i >= LINES - 1)
			break;
		mvprintw(top + 1 + (int)i, 1, "%8llu  %-16.16s %10s %10s %10s %12s",
			(unsigned long long)cli_u64(borrower, "pid"), cli_string(borrower, "comm"),
			cli_size_text(cli_u64(borrower, "lent_bytes"), lent),
			cli_size_text(cli_u64(borrower, "spilled_bytes"), away),
			cli_size_text(cli_u64(borrower, "private_bytes"), ordinary),
			cli_time_text(cli_u64(borrower, "stall_max_ns"), stall));
	}
}

static void draw(const json_t *answer, const struct picture *picture)
{
	char all[CLI_SIZE_TEXT], lent[CLI_SIZE_TEXT], taken[CLI_SIZE_TEXT], unused[CLI_SIZE_TEXT];
	char longest[CLI_SIZE_TEXT], away[CLI_SIZE_TEXT];
	int borrowers = (int)json_array_size(json_object_get(answer, "borrowers"));
	int map_rows = LINES - 8 - (borrowers < LINES / 2 ? borrowers : LINES / 2);

	erase();
	mvprintw(0, 1, "contig top: region %s, %s (%s)", cli_string(answer, "name"),
		cli_size_text(cli_u64(answer, "area.frames") * CTG_PAGE_SIZE, all),
		cli_string(answer, "backing"));
	mvprintw(1, 1, "lent %s   taken %s   free %s   longest free run %s   displaced %s",
		cli_size_text(cli_u64(answer, "area.lent") * CTG_PAGE_SIZE, lent),
		cli_size_text(cli_u64(answer, "area.allocated") * CTG_PAGE_SIZE, taken),
		cli_size_text(cli_u64(answer, "area.free") * CTG_PAGE_SIZE, unused),
		cli_size_text(cli_u64(answer, "area.longest_free") * CTG_PAGE_SIZE, longest),
		cli_size_text(cli_u64(answer, "spill_used_bytes"), away));
	mvprintw(2, 1, "buffers taken %llu   refused %llu   frames moved %llu",
		(unsigned long long)cli_u64(answer, "counters.cma_alloc_success"),
		(unsigned long long)cli_u64(answer, "counters.cma_alloc_fail"),
		(unsigned long long)cli_u64(answer, "counters.frames_migrated"));
	if (map_rows > 8)
		map_rows = 8;
	draw_map(picture, 4, map_rows);
	draw_borrowers(answer, 5 + (map_rows > 0 ? map_rows : 1));
	mvprintw(LINES - 1, 1, ". free  + lent  - less than half  # taken  %% in part     q quits");
	refresh();
}

/* Ask and draw until q. The terminal is ncurses' while this runs, so nothing is printed. */
static int watch(struct ctg_client *client, uint64_t interval_ns, struct ctg_error *error)
{
	json_t *request = json_pack("{s:s}", "do", "map"), *answer;
	struct picture picture;
	int rc = request ? 0 : -CTG_ENOMEM;

	timeout((int)(interval_ns / 1000000));
	while (rc == 0) {
		rc = ctg_client_call(client, request, &answer, NULL, error);
		if (rc)
			break;
		if (picture_read(cli_get(answer, "blocks.area"), &picture)) {
			draw(answer, &picture);
			picture_free(&picture);
		}
		json_decref(answer);
		int key = getch();
		if (key == 'q' || key == 'Q' || key == 27)
			break;
	}
	json_decref(request);
	return rc;
}

int top_main(int argc, const char **argv)
{
	struct ctg_error error = {.text = "out of memory"};
	uint64_t interval = 1000000000u;
	struct ctg_client *client;
	const char **args;
	int status = cli_parse(&usage, argc, argv, table, false, &args);

	if (status >= 0)
		return status;
	if (cli_count(args) > 1)
		return cli_fail(EXIT_USAGE, "one region at a time");
	if (options.interval) {
		const char *why = cli_parse_seconds(options.interval, &interval);

		if (!why && interval > 3600 * (uint64_t)1000000000u)
			why = "is more than an hour";
		if (!why && interval < 50000000u)
			why = "is less than 0.05";
		if (why)
			return cli_fail(EXIT_USAGE, "--interval: '%s' %s", options.interval, why);
	}
	if (!isatty(STDIN_FILENO) || !isatty(STDOUT_FILENO))
		return cli_fail(EXIT_USAGE, "a terminal is needed; 'contig stat' prints once");
	status = cli_connect(args[0], &client);
	if (status)
		return status;
	begin();
	status = watch(client, interval, &error);
	endwin();
	ctg_client_close(client);
	return status ? cli_fail(EXIT_NO_REGION, "%s", error.text) : EXIT_OK;
}
