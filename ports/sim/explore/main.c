/* SPDX-License-Identifier: MIT */
/* The command: which scenarios, in which modes, for how long, and what came of it. */
#define _GNU_SOURCE
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* Runs in which every access is a point: they find out which words are shared. */
#define LEARNING_RUNS 12u

struct options {
	const char *scenario;
	const char *replay;
	const char *json;
	uint64_t seed;
	bool one_seed, trace;
	unsigned bound; /* of the exhaustive search; 0: none */
	double seconds; /* a scenario; 0: by runs */
	uint64_t runs;  /* a mode */
	uint64_t max_exhaustive;
};

struct row {
	const struct xp_scenario *scenario;
	enum xp_mode mode;
	unsigned bound;
	uint64_t schedules;
	unsigned violations;
	bool complete;
	double seconds;
};
#define MAX_ROWS 1024
static struct row rows[MAX_ROWS];
static unsigned nr_rows;

static double now_seconds(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (double)ts.tv_sec + (double)ts.tv_nsec * 1e-9;
}

/* ---- one run and its failure ------------------------------------------------------------------
 */

static void report(const char *mode, uint64_t seed)
{
	char place[160] = "";

	if (xp_run.violated_pc != 0)
		xp_describe_pc(xp_run.violated_pc, place, sizeof(place));
	printf("\nVIOLATION in %s (%s, seed %llu), step %llu, fiber %u (%s)\n  %s\n",
		xp_scenario->name, mode, (unsigned long long)seed, (unsigned long long)xp_run.step,
		xp_run.now, xp_fiber_op(xp_run.now), xp_run.message);
	if (*place != '\0')
		printf("  last access: %s\n", place);
	printf("replay: --scenario %s --replay ", xp_scenario->name);
	xp_replay_print();
	printf("\n");
}

/* The run that has just failed once more, with a trace. */
static void retrace(void)
{
	char message[sizeof(xp_run.message)];

	memcpy(message, xp_run.message, sizeof(message));
	xp_replay_recorded();
	xp_trace_reset();
	xp_run.tracing = true;
	xp_schedule_begin(XP_REPLAY, 0, 0);
	xp_all_points = true;
	xp_run_once();
	xp_all_points = false;
	xp_run.tracing = false;
	xp_trace_print();
	if (strcmp(message, xp_run.message) != 0)
		printf("THE REPLAY DIFFERS: %s\n",
			xp_run.violated ? xp_run.message : "it ends without a violation");
	fflush(stdout);
}

static bool run_one(enum xp_mode mode, unsigned bound, uint64_t seed, const struct options *options)
{
	xp_run.races = true;
	xp_schedule_begin(mode, bound, seed);
	if (xp_run_once())
		return true;
	report(xp_mode_names[mode], seed);
	if (options->trace)
		retrace();
	return false;
}

/* ---- modes ------------------------------------------------------------------------------------
 */

static bool learn(const struct options *options)
{
	bool ok = true;

	xp_all_points = true;
	for (unsigned seed = 0; ok && seed < LEARNING_RUNS; seed++) {
		ok = run_one(XP_RANDOM, 0, seed, options);
		xp_steps_seen(0);
	}
	xp_all_points = false;
	xp_freeze_shared();
	for (unsigned seed = 0; ok && seed < LEARNING_RUNS; seed++) {
		ok = run_one(XP_RANDOM, 0, seed, options);
		xp_steps_seen(xp_run.shared_steps);
	}
	return ok;
}

static struct row *new_row(enum xp_mode mode, unsigned bound)
{
	struct row *row = &rows[nr_rows];

	if (nr_rows + 1 < MAX_ROWS)
		nr_rows++;
	*row = (struct row){.scenario = xp_scenario, .mode = mode, .bound = bound};
	return row;
}

static bool explore_seeds(
	enum xp_mode mode, unsigned bound, double seconds, const struct options *options)
{
	struct row *row = new_row(mode, bound);
	double begun = now_seconds();
	uint64_t seed = options->seed;

	while (row->violations == 0) {
		if (options->one_seed ? row->schedules == 1
			: seconds > 0 ? now_seconds() - begun > seconds
				      : row->schedules == options->runs)
			break;
		row->schedules++;
		if (!run_one(
			    mode, mode == XP_PCT ? 1 + (unsigned)(seed % bound) : 0, seed, options))
			row->violations++;
		seed++;
	}
	row->seconds = now_seconds() - begun;
	return row->violations == 0;
}

static bool explore_all(unsigned bound, double seconds, const struct options *options)
{
	struct row *row = new_row(XP_DFS, bound);
	double begun = now_seconds();
	unsigned shared;

	/* Again from the start if a word turns out to be shared that had not been: rare. */
	do {
		xp_freeze_shared();
		shared = xp_nr_shared();
		xp_dfs_reset();
		row->complete = false;
		do {
			row->schedules++;
			if (!run_one(XP_DFS, bound, 0, options))
				row->violations++;
			if (seconds > 0 ? now_seconds() - begun > seconds
					: row->schedules >= options->max_exhaustive)
				break;
		} while (row->violations == 0 && (row->complete = !xp_dfs_next(), !row->complete));
	} while (row->complete && shared != xp_nr_shared());
	row->seconds = now_seconds() - begun;
	return row->violations == 0;
}

static bool explore_scenario(const struct xp_scenario *scenario, const struct options *options)
{
	double share = options->seconds / (options->bound != 0 ? 4 : 3);
	bool ok;

	if (!xp_setup(scenario)) {
		printf("%s: %s\n", scenario->name, xp_run.message);
		new_row(XP_RANDOM, 0)->violations = 1;
		return false;
	}
	ok = learn(options);
	if (!ok) {
		struct row *row = new_row(XP_RANDOM, 0);

		row->schedules = 2 * LEARNING_RUNS;
		row->violations = 1;
		return false;
	}
	ok = explore_seeds(XP_RANDOM, 0, share, options) &&
	     explore_seeds(XP_PCT, 4, share, options) && explore_seeds(XP_WEAK, 0, share, options);
	for (unsigned bound = 1; ok && !options->one_seed && bound <= options->bound; bound++)
		ok = explore_all(bound, share / options->bound, options);
	return ok;
}

static int replay(const struct xp_scenario *scenario, const char *text)
{
	bool ok;

	if (!xp_setup(scenario) || !xp_replay_parse(text)) {
		fprintf(stderr, "explore: '%s' is not a schedule\n", text);
		return 2;
	}
	xp_all_points = true;
	xp_run.races = true;
	for (unsigned seed = 0; seed < LEARNING_RUNS; seed++) {
		xp_schedule_begin(XP_RANDOM, 0, seed);
		xp_run_once();
	}
	xp_freeze_shared();
	xp_trace_reset();
	xp_run.tracing = true;
	xp_schedule_begin(XP_REPLAY, 0, 0);
	ok = xp_run_once();
	xp_run.tracing = false;
	xp_trace_print();
	if (ok)
		printf("%s: no violation\n", scenario->name);
	else
		report("replay", 0);
	return ok ? 0 : 1;
}

/* ---- output -----------------------------------------------------------------------------------
 */

static void print_rows(void)
{
	uint64_t schedules = 0;
	unsigned violations = 0;
	double seconds = 0;

	printf("%-30s %-10s %5s %10s %9s %s\n", "scenario", "mode", "bound", "schedules", "per sec",
		"violations");
	for (unsigned i = 0; i < nr_rows; i++) {
		const struct row *row = &rows[i];

		printf("%-30s %-10s %5u %10llu %9.0f %u%s\n", row->scenario->name,
			xp_mode_names[row->mode], row->bound, (unsigned long long)row->schedules,
			row->seconds > 0 ? (double)row->schedules / row->seconds : 0,
			row->violations,
			row->mode == XP_DFS ? (row->complete ? "  all" : "  not all") : "");
		schedules += row->schedules;
		violations += row->violations;
		seconds += row->seconds;
	}
	printf("%llu schedules in %.1f s, %u violations\n", (unsigned long long)schedules, seconds,
		violations);
}

static bool write_json(const char *path)
{
	FILE *file = fopen(path, "w");

	if (file == NULL)
		return false;
	fprintf(file, "{\"rows\": [");
	for (unsigned i = 0; i < nr_rows; i++)
		fprintf(file,
			"%s\n {\"scenario\": \"%s\", \"mode\": \"%s\", \"bound\": %u, "
			"\"schedules\": %llu, \"complete\": %s, \"seconds\": %.3f, "
			"\"violations\": %u}",
			i == 0 ? "" : ",", rows[i].scenario->name, xp_mode_names[rows[i].mode],
			rows[i].bound, (unsigned long long)rows[i].schedules,
			rows[i].complete ? "true" : "false", rows[i].seconds, rows[i].violations);
	fprintf(file, "\n]}\n");
	return fclose(file) == 0;
}

static int usage(void)
{
	fprintf(stderr,
		"usage: explore [--list] [--scenario NAME] [--seed N] [--replay SCHEDULE]\n"
		"               [--exhaustive BOUND] [--seconds N | --runs N] [--json FILE]\n"
		"               [--no-trace]\n");
	return 2;
}

static bool wanted(const struct options *options, const struct xp_scenario *scenario)
{
	size_t n = strlen(scenario->name);
	const char *at = options->scenario;

	/* NAME or NAME,NAME... */
	for (; at != NULL; at = strchr(at, ',') == NULL ? NULL : strchr(at, ',') + 1) {
		if (strncmp(at, scenario->name, n) == 0 && (at[n] == '\0' || at[n] == ','))
			return true;
		if (strchr(at, ',') == NULL)
			return false;
	}
	return true;
}

static bool parse(int argc, char **argv, struct options *options)
{
	for (int i = 1; i < argc; i++) {
		const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;

		if (strcmp(name, "--no-trace") == 0) {
			options->trace = false;
			continue;
		}
		if (value == NULL)
			return false;
		i++;
		if (strcmp(name, "--scenario") == 0)
			options->scenario = value;
		else if (strcmp(name, "--replay") == 0)
			options->replay = value;
		else if (strcmp(name, "--json") == 0)
			options->json = value;
		else if (strcmp(name, "--exhaustive") == 0)
			options->bound = (unsigned)strtoul(value, NULL, 0);
		else if (strcmp(name, "--seconds") == 0)
			options->seconds = strtod(value, NULL);
		else if (strcmp(name, "--runs") == 0)
			options->runs = strtoull(value, NULL, 0),
			options->max_exhaustive = options->runs * 10;
		else if (strcmp(name, "--seed") == 0)
			options->seed = strtoull(value, NULL, 0), options->one_seed = true;
		else
			return false;
	}
	return true;
}

int main(int argc, char **argv)
{
	struct options options = {.trace = true, .runs = 300, .max_exhaustive = 3000};
	unsigned nr = 0, failed = 0;

	if (argc == 2 && strcmp(argv[1], "--list") == 0) {
		for (unsigned i = 0; xp_scenarios[i] != NULL; i++)
			printf("%-30s %s\n", xp_scenarios[i]->name, xp_scenarios[i]->what);
		return 0;
	}
	if (!parse(argc, argv, &options))
		return usage();
	for (unsigned i = 0; xp_scenarios[i] != NULL; i++)
		nr += wanted(&options, xp_scenarios[i]);
	if (nr == 0) {
		fprintf(stderr, "explore: there is no scenario '%s'; see --list\n",
			options.scenario);
		return 2;
	}
	if (options.replay != NULL && nr != 1)
		return usage();
	options.seconds /= nr;
	xp_memory_init();
	for (unsigned i = 0; xp_scenarios[i] != NULL; i++) {
		if (!wanted(&options, xp_scenarios[i]))
			continue;
		if (options.replay != NULL)
			return replay(xp_scenarios[i], options.replay);
		failed += !explore_scenario(xp_scenarios[i], &options);
	}
	print_rows();
	if (options.json != NULL && !write_json(options.json)) {
		perror(options.json);
		return 2;
	}
	return failed != 0;
}
