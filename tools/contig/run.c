/* SPDX-License-Identifier: MIT */
/* contig run: serve a region in this process, and run a program that borrows from it. */
#include "cli.h"
#include "filter.h"
#include "server.h"
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DEFAULT_REGION "512M"
#define MAX_SAME_NAME 1000
#define SLICE_MS 250 /* between two looks for a signal while borrowers go on */
#define SLICE_NS (SLICE_MS * 1000000u)

static struct {
	char *region, *backing, *name, *spill;
	int allow_unseen_pins;
} options;

static const struct poptOption table[] = {
	{"region", 'r', POPT_ARG_STRING, &options.region, 0,
		"Memory to lend, a multiple of 2M (default " DEFAULT_REGION ")", "SIZE"},
	{"backing", 'b', POPT_ARG_STRING, &options.backing, 0,
		"memfd (default), hugetlb, or file:PATH", "KIND"},
	{"name", 'n', POPT_ARG_STRING, &options.name, 0,
		"Name of the region (default: the program's, made unique)", "NAME"},
	{"spill", 's', POPT_ARG_STRING, &options.spill, 0,
		"Ordinary memory for what a buffer displaces, at most (default: as the region)",
		"SIZE"},
	{"allow-unseen-pins", 0, POPT_ARG_NONE, &options.allow_unseen_pins, 0,
		"Let the program pin memory behind Contig's back (io_uring, O_DIRECT, ...): what "
		"the device transfers can then be lost",
		NULL},
	POPT_TABLEEND};

static const struct cli_usage usage = {
	.command = "contig run",
	.args = "[OPTION...] [--] PROGRAM [ARG...]",
	.about = "Run a program whose heap lives in memory that can be taken back at any time\n"
		 "as large contiguous buffers ('contig alloc').",
	.after = "Exit status: the program's; 128 + N if signal N killed it; 125 if the region "
		 "could\n"
		 "not be made, 126 if the program cannot be executed, 127 if there is none.\n",
};

/* What the child needs to become a borrower. */
struct launch {
	char library[PATH_MAX];
	bool allow_unseen_pins;
};

static int size_option(const char *option, const char *text, uint64_t *bytes)
{
	const char *why = cli_parse_size(text, bytes);

	if (why)
		return cli_fail(EXIT_RUN_FAILED, "%s: '%s' %s", option, text, why);
	return 0;
}

/* Where the preload library is, seen from this executable: in a build tree, installed. */
static const char *const library_places[] = {"../malloc", ("../" CONTIG_LIBDIR), CONTIG_LIBDIR};

static int find_library(char path[PATH_MAX])
{
	char self[PATH_MAX], candidate[PATH_MAX];
	ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
	const char *dir;

	if (n < 0)
		return cli_fail(EXIT_RUN_FAILED, "cannot read /proc/self/exe: %s", strerror(errno));
	self[n] = 0;
	dir = dirname(self);
	for (size_t i = 0; i < sizeof(library_places) / sizeof(library_places[0]); i++) {
		const char *place = library_places[i];
		bool absolute = place[0] == '/';

		n = snprintf(candidate, sizeof(candidate), "%s%s%s/libcontig-malloc.so",
			absolute ? "" : dir, absolute ? "" : "/", place);
		if (n >= (ssize_t)sizeof(candidate) || access(candidate, R_OK) != 0 ||
			!realpath(candidate, path))
			continue;
		/* The dynamic linker has no way to quote these. */
		if (strpbrk(path, " :"))
			return cli_fail(EXIT_RUN_FAILED,
				"the path '%s' has a space or a colon, which LD_PRELOAD cannot "
				"hold; move Contig elsewhere",
				path);
		return 0;
	}
	return cli_fail(EXIT_RUN_FAILED,
		"libcontig-malloc.so is neither beside '%s' nor in '%s'; "
		"install Contig again",
		dir, CONTIG_LIBDIR);
}

static int add_preload(const char *library)
{
	const char *before = getenv("LD_PRELOAD");
	char *list = NULL;
	int rc;

	if (!before || !*before)
		return setenv("LD_PRELOAD", library, 1);
	if (asprintf(&list, "%s:%s", before, library) < 0)
		return -1;
	rc = setenv("LD_PRELOAD", list, 1);
	free(list);
	return rc;
}

/* In the child, single-threaded: the environment of a borrower, then the filter. */
static int become_borrower(void *arg, const char *socket)
{
	const struct launch *launch = arg;
	struct ctg_error error = {0};

	if (setenv(PROTO_ENV_SOCKET, socket, 1) != 0 || add_preload(launch->library) != 0)
		return cli_fail(EXIT_RUN_FAILED, "cannot set the environment: %s", strerror(errno));
	if (contig_filter_install(launch->allow_unseen_pins, &error) != 0)
		return cli_fail(EXIT_RUN_FAILED, "%s", error.text);
	return 0;
}

/* The default name: the program's, without what a socket's name may not have. */
static void default_name(const char *program, char name[32])
{
	const char *base = strrchr(program, '/');
	size_t n = 0;

	base = base ? base + 1 : program;
	while (*base == '.')
		base++;
	for (; *base && n < 24; base++)
		name[n++] = *base;
	name[n] = 0;
	if (n == 0)
		snprintf(name, 32, "region");
}

static int start_server(struct ctg_server_config *config, const char *program,
	struct ctg_server **server, struct ctg_error *error)
{
	static char name[48];
	char base[32];
	int rc;

	if (options.name) {
		config->name = config->region.name = options.name;
		return ctg_server_start(config, server, error);
	}
	/* The name is taken by the one who binds the socket: so try, rather than look first. */
	default_name(program, base);
	for (unsigned i = 1; i < MAX_SAME_NAME; i++) {
		if (i == 1)
			snprintf(name, sizeof(name), "%s", base);
		else
			snprintf(name, sizeof(name), "%s-%u", base, i);
		config->name = config->region.name = name;
		rc = ctg_server_start(config, server, error);
		if (rc != -EEXIST)
			return rc;
	}
	return rc;
}

static void announce(const struct ctg_server_config *config, struct ctg_server *server)
{
	struct ctg_region_info info;
	char size[CLI_SIZE_TEXT];

	ctg_region_info(ctg_server_region(server), &info);
	if (options.allow_unseen_pins)
		cli_note("warning: with --allow-unseen-pins, memory that a device or io_uring "
			 "transfers to while it moves loses what is transferred");
	if (strcmp(info.guard, "stop") == 0)
		cli_note("while memory moves, the program's threads are stopped: %s",
			info.guard_why);
	if (isatty(STDERR_FILENO))
		cli_note("region '%s': %s lent (%s)", config->name, cli_size_text(info.bytes, size),
			info.backing);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void say_what_is_left(struct ctg_server *server, const char *name)
{
	unsigned nr = ctg_server_borrowers(server);

	if (!isatty(STDERR_FILENO))
		return;
	if (nr)
		cli_note("the program has ended, but %u process%s still borrow%s from region '%s'; "
			 "Ctrl-C ends the region, not %s",
			nr, nr == 1 ? "" : "es", nr == 1 ? "s" : "", name, nr == 1 ? "it" : "them");
	else
		cli_note("the program has ended, but processes that it started, or buffers of "
			 "region "
			 "'%s' that are not released ('contig leases'), are left; Ctrl-C ends it",
			name);
}

/*
 * The program has ended; what it started may go on, and buffers may be taken. Processes are waited
 * for first: one that has just been started borrows only when it needs memory. For what is then
 * left, signals are looked for in slices, because the server's wait knows nothing of them.
 */
static void outlive(struct cli_child *child, struct ctg_server *server, const char *name)
{
	bool gone;

	if (child->told_to_end)
		return; /* and so was everything */
	gone = cli_child_gone(child, SLICE_MS);
	if (gone && ctg_server_wait_idle(server, now() + SLICE_NS) == 0)
		return;
	if (cli_ending_signal())
		return;
	say_what_is_left(server, name);
	if (!gone && !cli_child_gone(child, -1))
		return; /* a signal */
	while (ctg_server_wait_idle(server, now() + SLICE_NS) != 0) {
		if (cli_ending_signal())
			return;
	}
}

static int read_options(struct ctg_server_config *config)
{
	int status = size_option("--region", options.region ? options.region : DEFAULT_REGION,
		&config->region.bytes);

	config->region.backing = options.backing;
	config->region.spill_bytes = CTG_SPILL_DEFAULT;
	if (status == 0 && config->region.bytes % (2u << 20))
		status = cli_fail(
			EXIT_RUN_FAILED, "--region: '%s' is not a multiple of 2M", options.region);
	/* No spill is a choice: only what is lent elsewhere in the region can then take its place.
	 */
	if (status == 0 && options.spill && strcmp(options.spill, "0") == 0)
		config->region.spill_bytes = 0;
	else if (status == 0 && options.spill)
		status = size_option("--spill", options.spill, &config->region.spill_bytes);
	return status;
}

static int serve(struct ctg_server_config *config, const char **program, struct launch *launch)
{
	struct ctg_error error = {0};
	struct cli_progress progress;
	struct ctg_server *server;
	struct cli_child child;
	int rc = cli_child_start(&child, program, become_borrower, launch, true);

	if (rc)
		return cli_fail(EXIT_RUN_FAILED, "cannot start a process: %s", strerror(-rc));
	cli_progress_start(&progress, "making the region");
	rc = start_server(config, program[0], &server, &error);
	cli_progress_end(&progress);
	if (rc) {
		cli_child_end(&child);
		return cli_fail(EXIT_RUN_FAILED, "%s", error.text);
	}
	announce(config, server);
	rc = cli_child_go(&child, ctg_server_socket(server));
	if (rc == 0) {
		rc = cli_child_wait(&child, -1, NULL);
		outlive(&child, server, config->name);
	}
	cli_child_end(&child);
	ctg_server_stop(server);
	return rc;
}

int run_main(int argc, const char **argv)
{
	struct ctg_server_config config = {0};
	struct launch launch = {0};
	const char **cut = cli_cut(&argc, argv), **args;
	int status = cli_parse(&usage, argc, argv, table, true, &args);

	if (status >= 0)
		return status == EXIT_OK ? EXIT_OK : EXIT_RUN_FAILED;
	if (*args && cut) {
		/* "run prog -- x": the program began before the cut, so what follows is its own. */
		args = argv + argc - cli_count(args);
	} else if (!*args) {
		args = cut;
	}
	if (!args || !*args)
		return cli_fail(EXIT_RUN_FAILED, "a program is missing; see 'contig run --help'");
	status = read_options(&config);
	if (status == 0)
		status = cli_program_check(args[0]);
	if (status == 0)
		status = find_library(launch.library);
	if (status)
		return status;
	launch.allow_unseen_pins = options.allow_unseen_pins;
	return serve(&config, args, &launch);
}
