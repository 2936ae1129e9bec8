/* SPDX-License-Identifier: MIT */
/*
 * Who runs next. A decision that is not the default is recorded with the step it was made at, so
 * that a run of any mode is repeated by its list of decisions alone.
 */
#include "engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const char *const xp_mode_names[XP_NR_MODES] = {"random", "pct", "weak", "exhaustive", "replay"};

struct xp_record xp_records[XP_MAX_RECORDS];
unsigned xp_nr_records;
static struct xp_record replay[XP_MAX_RECORDS];
static unsigned nr_replay, replay_at;
static bool replay_weak;

static enum xp_mode mode;
static unsigned bound;
static uint64_t rng;

uint64_t xp_random(void)
{
	/* splitmix64 */
	uint64_t z = rng += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static unsigned nth_option(unsigned options, unsigned n)
{
	while (n-- != 0)
		options &= options - 1;
	return (unsigned)__builtin_ctz(options);
}

static unsigned random_option(unsigned options)
{
	return nth_option(options, (unsigned)(xp_random() % (unsigned)__builtin_popcount(options)));
}

/* ---- PCT --------------------------------------------------------------------------------------
 */

static uint64_t longest; /* run seen, in shared steps */
static unsigned priority[XP_MAX_FIBERS];
static uint64_t change[8];

void xp_steps_seen(uint64_t steps)
{
	if (steps > longest)
		longest = steps;
}

static void pct_begin(void)
{
	for (unsigned f = 0; f < XP_MAX_FIBERS; f++)
		priority[f] = 100 + f;
	for (unsigned f = XP_MAX_FIBERS - 1; f > 0; f--) {
		unsigned other = (unsigned)(xp_random() % (f + 1));
		unsigned p = priority[f];

		priority[f] = priority[other];
		priority[other] = p;
	}
	for (unsigned i = 0; i < bound && i < 8; i++)
		change[i] = 1 + xp_random() % (longest + 1);
}

static unsigned pct_highest(unsigned options)
{
	unsigned best = (unsigned)__builtin_ctz(options);

	for (unsigned f = best + 1; f < XP_MAX_FIBERS; f++)
		if ((options >> f & 1) != 0 && priority[f] > priority[best])
			best = f;
	return best;
}

static unsigned pct_preempt(unsigned options)
{
	for (unsigned i = 0; i < bound && i < 8; i++)
		if (change[i] == xp_run.shared_steps)
			priority[xp_run.now] = i;
	return pct_highest(options);
}

/* ---- exhaustive -------------------------------------------------------------------------------
 */

struct node {
	unsigned options, tried, chosen;
	char kind;
};
#define MAX_NODES 262144
static struct node nodes[MAX_NODES];
static unsigned nr_nodes, at_node, preemptions;

void xp_dfs_reset(void)
{
	nr_nodes = 0;
}

bool xp_dfs_next(void)
{
	while (nr_nodes != 0) {
		struct node *last = &nodes[nr_nodes - 1];
		unsigned left = last->options & ~last->tried;

		if (left != 0) {
			last->chosen = (unsigned)__builtin_ctz(left);
			last->tried |= 1u << last->chosen;
			return true;
		}
		nr_nodes--;
	}
	return false;
}

static unsigned dfs_decide(enum xp_decision kind, unsigned options, unsigned now)
{
	struct node *node;

	if (kind == XP_DRAIN || (kind == XP_PREEMPT && preemptions >= bound))
		return now;
	if (at_node == MAX_NODES)
		return now;
	node = &nodes[at_node];
	if (at_node == nr_nodes) {
		*node = (struct node){options, 1u << now, now, (char)kind};
		nr_nodes++;
	} else if (node->options != options || node->kind != (char)kind) {
		/* Runs are repeated exactly, or the search means nothing. */
		fprintf(stderr, "explore: a run was not the same when repeated\n");
		abort();
	}
	at_node++;
	if (kind == XP_PREEMPT && node->chosen != now)
		preemptions++;
	return node->chosen;
}

/* ---- replay -----------------------------------------------------------------------------------
 */

void xp_replay_recorded(void)
{
	memcpy(replay, xp_records, xp_nr_records * sizeof(replay[0]));
	nr_replay = xp_nr_records;
	replay_weak = xp_run.weak;
}

bool xp_replay_parse(const char *text)
{
	nr_replay = 0;
	replay_weak = *text == 'w';
	if (*text != 'w' && *text != 's')
		return false;
	text++;
	while (*text == ':' || *text == ',') {
		struct xp_record *record = &replay[nr_replay];
		char *end;

		text++;
		if (*text == '\0')
			return true;
		record->step = strtoull(text, &end, 10);
		if (end == text || strchr("pbcd", *end) == NULL || *end == '\0')
			return false;
		record->kind = *end;
		text = end + 1;
		record->choice = (unsigned char)strtoul(text, &end, 10);
		if (end == text || ++nr_replay == XP_MAX_RECORDS)
			return false;
		text = end;
	}
	return *text == '\0';
}

void xp_replay_print(void)
{
	printf("%c:", xp_run.weak ? 'w' : 's');
	for (unsigned i = 0; i < xp_nr_records; i++)
		printf("%s%llu%c%u", i == 0 ? "" : ",", (unsigned long long)xp_records[i].step,
			xp_records[i].kind, xp_records[i].choice);
}

static unsigned replay_decide(enum xp_decision kind, unsigned options, unsigned now)
{
	const struct xp_record *record = &replay[replay_at];

	if (replay_at == nr_replay || record->step != xp_run.step || record->kind != (char)kind ||
		(options >> record->choice & 1) == 0)
		return now;
	replay_at++;
	return record->choice;
}

/* ---- deciding ---------------------------------------------------------------------------------
 */

static unsigned one_in; /* XP_RANDOM: how rarely it switches */

void xp_schedule_begin(enum xp_mode new_mode, unsigned new_bound, uint64_t seed)
{
	mode = new_mode;
	bound = new_bound;
	rng = seed * 0x2545f4914f6cdd1du + (uint64_t)mode;
	xp_nr_records = 0;
	replay_at = 0;
	at_node = 0;
	preemptions = 0;
	one_in = 2u << xp_random() % 7;
	if (mode == XP_PCT)
		pct_begin();
	xp_run.weak = mode == XP_WEAK || (mode == XP_REPLAY && replay_weak);
}

static unsigned decide(enum xp_decision kind, unsigned options, unsigned now)
{
	switch (mode) {
	case XP_PCT:
		if (kind == XP_PREEMPT)
			return pct_preempt(options);
		return kind == XP_BLOCK ? pct_highest(options) : random_option(options);
	case XP_DFS:
		return dfs_decide(kind, options, now);
	case XP_REPLAY:
		return replay_decide(kind, options, now);
	default:
		if (kind == XP_PREEMPT && xp_random() % one_in != 0)
			return now;
		if (kind == XP_DRAIN && xp_random() % 8 != 0)
			return now;
		return random_option(options);
	}
}

unsigned xp_decide(enum xp_decision kind, unsigned options, unsigned now)
{
	unsigned choice = decide(kind, options, now);

	if (choice != now && xp_nr_records < XP_MAX_RECORDS)
		xp_records[xp_nr_records++] =
			(struct xp_record){xp_run.step, (char)kind, (unsigned char)choice};
	return choice;
}
