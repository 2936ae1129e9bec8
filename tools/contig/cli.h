/* SPDX-License-Identifier: MIT */
/*
 * The contig command: what its files share. Each command is a function of argc and argv that
 * returns the exit status; what people read goes to stderr one line a failure, what programs read
 * to stdout.
 */
#ifndef CONTIG_CLI_H
#define CONTIG_CLI_H

#include "client.h"
#include <jansson.h>
#include <popt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

/* Exit statuses of every command but `run`, whose own are those of env(1). Documented in contig.1.
 */
enum exit_status {
	EXIT_OK,
	EXIT_FAILED,    /* refused for a reason that has no number here */
	EXIT_USAGE,     /* the command line is wrong; nothing was done */
	EXIT_NO_REGION, /* no region of that name, or it went away */
	EXIT_NO_MEMORY, /* -ENOMEM: no such run of memory, or no room for what would have to move */
	EXIT_BUSY,      /* -EBUSY: there is one, and something holds it */
	EXIT_TIMEOUT,   /* -ETIMEDOUT */
	EXIT_CANCELLED, /* -EINTR */
	EXIT_RUN_FAILED = 125,
	EXIT_NOT_EXECUTABLE = 126,
	EXIT_NOT_FOUND = 127,
};

/* main.c */
/* One line on stderr: "contig COMMAND: text". Returns status, so that callers can return it. */
__attribute__((format(printf, 2, 3))) int cli_fail(int status, const char *format, ...);
__attribute__((format(printf, 1, 2))) void cli_note(const char *format, ...);

/* options.c */
struct cli_usage {
	const char *command; /* "contig alloc" */
	const char *args;    /* "--from NAME SIZE [-- COMMAND [ARG...]]" */
	const char *about;   /* printed by --help before the options */
	const char *after;   /* and after them; may be NULL */
};
/*
 * Parse argv[1..] with popt. The values that options point to must be static, so that they stay
 * reachable. *args: what was left over, NULL-terminated, until the process ends. Returns -1 to go
 * on, otherwise the status to exit with (--help, a mistake).
 */
int cli_parse(const struct cli_usage *usage, int argc, const char **argv,
	const struct poptOption *options, bool stop_at_first, const char ***args);
/* Cut argv at the first "--": *argc is then what lies before it; what follows, or NULL if none. */
const char **cli_cut(int *argc, const char **argv);
size_t cli_count(const char **args);

/* size.c */
/* "300M", "2G", "64K", "4096", with "iB" or "B" behind it if one likes. NULL or why not. */
const char *cli_parse_size(const char *text, uint64_t *bytes);
/* A number from min to max. NULL or why not. */
const char *cli_parse_number(const char *text, uint64_t min, uint64_t max, uint64_t *number);
/* "1.5": seconds, more than 0. NULL or why not. */
const char *cli_parse_seconds(const char *text, uint64_t *ns);
/* "300 MiB". Into text, which is returned. */
#define CLI_SIZE_TEXT 24
char *cli_size_text(uint64_t bytes, char text[CLI_SIZE_TEXT]);
/* "12.3 ms". */
char *cli_time_text(uint64_t ns, char text[CLI_SIZE_TEXT]);

/* ask.c */
/* Connect to a region; name NULL: the only one there is. EXIT_OK or a status, said on stderr. */
int cli_connect(const char *name, struct ctg_client **client);
/*
 * Send a request (stolen) and wait; says what went wrong. *answer is a new reference or NULL, also
 * when the region refused. fd may be NULL.
 */
int cli_call(struct ctg_client *client, json_t *request, json_t **answer, int *fd);
/* As both, for one request. */
int cli_ask(const char *name, json_t *request, json_t **answer);
/* Follow "area.lent" through objects. 0, "" or false when it is not there. */
uint64_t cli_u64(const json_t *object, const char *path);
double cli_real(const json_t *object, const char *path);
const char *cli_string(const json_t *object, const char *path);
const json_t *cli_get(const json_t *object, const char *path);
/* Print as one JSON document; EXIT_OK or EXIT_FAILED (stdout is full or closed). */
int cli_print_json(const json_t *value);
/* Flush stdout: a report that could not be written is a failure. */
int cli_flush(void);

/* progress.c */
/* Say on stderr what is going on, from the first second on, if it is a terminal. */
struct cli_progress {
	pid_t pid;
	int gate;
};
void cli_progress_start(struct cli_progress *progress, const char *what);
void cli_progress_end(struct cli_progress *progress);

/* child.c: run a program and pass on the signals that are meant for it */
struct cli_child {
	pid_t pid; /* the program */
	int pidfd;
	pid_t keeper; /* its parent, to whom its orphans fall */
	int gate; /* until cli_child_go: the program waits here; then the result of exec comes */
	int news; /* what the keeper tells */
	bool told_to_end; /* a signal that ends things has been passed on */
	sigset_t before;  /* the signal mask to give back to the program */
};
/* Called in the child before exec; 0, or an exit status after it has said why. */
typedef int (*cli_prepare)(void *arg, const char *message);
/*
 * Block the signals that are passed on and make a child that waits. all: keep watch also over what
 * the program starts, after its end. 0 or a negative errno. Undone by cli_child_end.
 */
int cli_child_start(
	struct cli_child *child, const char **argv, cli_prepare prepare, void *arg, bool all);
/* Let it exec; message is handed to prepare. 0, or an exit status (126, 127; or prepare's). */
int cli_child_go(struct cli_child *child, const char *message);
/*
 * Wait for the program's end, passing signals on. Returns its exit status, 128 + n if signal n
 * killed it. extra_fd (-1: none): on its hang-up `hangup` is called once.
 */
int cli_child_wait(struct cli_child *child, int extra_fd, void (*hangup)(void));
/* After that, with all: true if nothing that it started is left. Waits until then, at most so long
 * (-1: for ever), or until a signal that ends things comes. */
bool cli_child_gone(struct cli_child *child, int timeout_ms);
/* Let go of it. One that has not been told to go ends. */
void cli_child_end(struct cli_child *child);
/* Can it be found and executed? 0, 126 or 127, said on stderr. */
int cli_program_check(const char *program);
/* true if one of the signals that end things (HUP INT TERM QUIT) has come since; takes it. */
bool cli_ending_signal(void);
/* Block HUP INT TERM QUIT and get a descriptor that becomes readable on them; -1. */
int cli_ending_fd(void);

/* picture.c: the map of a region, one cell a pageblock */
enum picture_cell {
	CELL_HOLE,
	CELL_FREE,
	CELL_SOME, /* less than half of it lent */
	CELL_LENT,
	CELL_TAKEN,
	CELL_PART, /* taken in part */
	CELL_BUSY, /* isolated: being taken now */
	NR_CELLS
};
struct picture {
	size_t nr;
	unsigned char *cells; /* enum picture_cell */
};
extern const char picture_chars[NR_CELLS];
extern const char *const picture_names[NR_CELLS];
/* blocks: an answer's "blocks.area" or "blocks.spill". false: not such a thing. */
bool picture_read(const json_t *blocks, struct picture *picture);
void picture_free(struct picture *picture);
/* html.c */
int html_write(
	FILE *out, const json_t *answer, const struct picture *area, const struct picture *spill);

int run_main(int argc, const char **argv);
int ps_main(int argc, const char **argv);
int alloc_main(int argc, const char **argv);
int release_main(int argc, const char **argv);
int leases_main(int argc, const char **argv);
int stat_main(int argc, const char **argv);
int map_main(int argc, const char **argv);
int top_main(int argc, const char **argv);

#endif
