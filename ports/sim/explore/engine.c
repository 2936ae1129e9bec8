/* SPDX-License-Identifier: MIT */
/*
 * Fibers as virtual CPUs, virtual time, and one run from its start to its end.
 *
 * A spin loop is a wait: after the port's relax a fiber runs again only when a word that it read
 * last has changed, or when nobody else can run. So no schedule is spent on looking in vain, and a
 * loop that nothing will ever end is noticed.
 */
#define _GNU_SOURCE
#include "engine.h"
#include "fiber.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define STACK_BYTES ((size_t)512 << 10)
#define STEPS_MAX 3000000u
#define QUIET_ROUNDS_MAX 20000u
#define RELAX_NS 20000u
#define NOW_NS 100u
#define LAST_READS 4

enum state { RUNNABLE, WAITING, SPINNING, DONE };

struct fiber {
	void *sp;
	unsigned char *stack;
	enum state state;
	const struct ctg_word32 *word;
	uint64_t deadline;
	bool killable, killed;
	int woken_with;
	const void *reads[LAST_READS];
	unsigned next_read;
	const char *op;
};

struct xp_run xp_run;
const struct xp_scenario *xp_scenario;
static struct fiber fibers[XP_MAX_FIBERS];
static void *main_sp;
static sigjmp_buf failed;
static uint64_t quiet_rounds; /* since a word changed */

const char *xp_fiber_op(unsigned fiber)
{
	return fibers[fiber].op == NULL ? "-" : fibers[fiber].op;
}

void xp_op(const char *name)
{
	fibers[xp_run.now].op = name;
	if (xp_run.tracing)
		xp_trace_text("begins: %s", name);
}

_Noreturn void xp_violation(const char *format, ...)
{
	va_list args;

	xp_run.on = false;
	xp_run.violated = true;
	va_start(args, format);
	vsnprintf(xp_run.message, sizeof(xp_run.message), format, args);
	va_end(args);
	siglongjmp(failed, 1);
}

static void on_signal(int signal)
{
	xp_run.on = false;
	xp_run.violated = true;
	snprintf(xp_run.message, sizeof(xp_run.message), "%s in fiber %u (%s)",
		signal == SIGILL || signal == SIGTRAP ? "an assertion failed" : "a bad access",
		xp_run.now, xp_fiber_op(xp_run.now));
	siglongjmp(failed, 1);
}

/* ---- who can run ------------------------------------------------------------------------------
 */

static bool can_run(struct fiber *fiber)
{
	if (fiber->state == WAITING) {
		if (fiber->killable && fiber->killed)
			fiber->woken_with = -CTG_EINTR;
		else if (fiber->deadline != CTG_NO_DEADLINE && xp_m->now >= fiber->deadline)
			fiber->woken_with = -CTG_ETIMEDOUT;
		else
			return false;
		fiber->state = RUNNABLE;
	}
	return fiber->state == RUNNABLE;
}

static unsigned runnable(void)
{
	unsigned options = 0;

	for (unsigned f = 0; f < xp_run.nr; f++)
		if (can_run(&fibers[f]))
			options |= 1u << f;
	return options;
}

static void switch_to(unsigned next)
{
	unsigned now = xp_run.now;

	if (next == now)
		return;
	xp_run.now = next;
	if (xp_run.tracing)
		xp_trace_text("runs (%s)", xp_fiber_op(next));
	xp_switch(&fibers[now].sp, fibers[next].sp);
}

static _Noreturn void stuck(void)
{
	char text[512] = "", name[96];
	size_t used = 0;

	for (unsigned f = 0; f < xp_run.nr; f++) {
		if (fibers[f].state != WAITING)
			continue;
		xp_describe(fibers[f].word, name, sizeof(name));
		used += (size_t)snprintf(text + used, sizeof(text) - used,
			"; fiber %u (%s) waits on %s", f, xp_fiber_op(f), name);
		if (used >= sizeof(text))
			break;
	}
	xp_violation("nobody can run: a lost wake-up or a deadlock%s", text);
}

/* Nobody can run as things are: let time pass. */
static void pass_time(void)
{
	uint64_t next = CTG_NO_DEADLINE;
	bool drained = false, spinning = false;

	for (unsigned f = 0; f < xp_run.nr; f++)
		while (xp_drain_some(f, 0))
			drained = true;
	if (drained)
		return;
	for (unsigned f = 0; f < xp_run.nr; f++) {
		struct fiber *fiber = &fibers[f];

		if (fiber->state == SPINNING) {
			fiber->state = RUNNABLE;
			spinning = true;
		} else if (fiber->state == WAITING && fiber->deadline < next) {
			next = fiber->deadline;
		}
	}
	if (spinning) {
		if (++quiet_rounds > QUIET_ROUNDS_MAX)
			xp_violation("fibers spin and nothing changes: a livelock");
		return;
	}
	if (next == CTG_NO_DEADLINE)
		stuck();
	if (xp_m->now < next)
		xp_m->now = next;
}

/* The running fiber cannot go on, or has ended. */
static void block(void)
{
	unsigned options, done = 0;

	for (unsigned f = 0; f < xp_run.nr; f++)
		done += fibers[f].state == DONE;
	if (done == xp_run.nr) {
		void *ended;

		xp_switch(&ended, main_sp);
	}
	while ((options = runnable()) == 0)
		pass_time();
	switch_to(xp_decide(XP_BLOCK, options, (unsigned)__builtin_ctz(options)));
}

static void drain_point(void)
{
	unsigned options = 1, bit = 1, choice;

	for (unsigned f = 0; f < xp_run.nr; f++)
		for (unsigned i = 0; i < xp_buffered(f) && bit < 32; i++)
			options |= 1u << bit++;
	if (bit == 1)
		return;
	choice = xp_decide(XP_DRAIN, options, 0);
	for (unsigned f = 0; choice != 0 && f < xp_run.nr; f++) {
		if (choice <= xp_buffered(f)) {
			xp_drain_some(f, choice - 1);
			return;
		}
		choice -= xp_buffered(f);
	}
}

void xp_point(const void *p, bool write, const char *what)
{
	unsigned options;

	if (!xp_run.on)
		return;
	if (++xp_run.step > STEPS_MAX)
		xp_violation("no end after %u steps: a livelock", STEPS_MAX);
	if (xp_run.weak)
		drain_point();
	if (p != NULL && !xp_shared(p, write))
		return;
	xp_run.shared_steps++;
	if (p == NULL && xp_run.tracing)
		xp_trace_text("%s", what);
	options = runnable();
	if ((options & (options - 1)) != 0)
		switch_to(xp_decide(XP_PREEMPT, options, xp_run.now));
}

bool xp_step_begin(void)
{
	bool on = xp_run.on;

	xp_run.one_step = on;
	xp_run.on = false;
	return on;
}

void xp_step_end(bool on)
{
	xp_run.one_step = false;
	xp_run.on = on;
}

void xp_pause(void)
{
	xp_point(NULL, false, "pause");
}

void xp_let_others(void)
{
	if (!xp_run.on)
		return;
	memset(fibers[xp_run.now].reads, 0, sizeof(fibers[xp_run.now].reads));
	xp_relax(NULL);
}

uint64_t xp_time(void)
{
	return xp_m->now;
}

unsigned xp_choose(unsigned n)
{
	if (!xp_run.on || n < 2)
		return 0;
	xp_run.step++;
	return xp_decide(XP_CHOICE, (1u << n) - 1, 0);
}

void xp_kill(unsigned fiber)
{
	fibers[fiber].killed = true;
}

/* ---- waiting ----------------------------------------------------------------------------------
 */

void xp_read_word(const void *p)
{
	struct fiber *fiber = &fibers[xp_run.now];

	fiber->reads[fiber->next_read++ % LAST_READS] = p;
}

void xp_written(const void *p)
{
	quiet_rounds = 0;
	for (unsigned f = 0; f < xp_run.nr; f++) {
		struct fiber *fiber = &fibers[f];

		for (unsigned i = 0; fiber->state == SPINNING && i < LAST_READS; i++)
			if (fiber->reads[i] == p)
				fiber->state = RUNNABLE;
	}
}

int xp_wait(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	struct fiber *fiber = &fibers[xp_run.now];

	(void)host;
	if (!xp_run.on) {
		if (word->v == expected)
			xp_violation("a wait that nobody can end");
		return 0;
	}
	xp_point(NULL, false, "wait");
	xp_drain();
	if (word->v != expected)
		return 0;
	fiber->word = word;
	fiber->deadline = deadline;
	fiber->killable = killable;
	fiber->woken_with = 0;
	fiber->state = WAITING;
	block();
	if (xp_run.tracing)
		xp_trace_text("wakes with %d", fiber->woken_with);
	return fiber->woken_with;
}

void xp_wake(void *host, struct ctg_word32 *word, unsigned nr)
{
	(void)host;
	if (!xp_run.on)
		return;
	xp_point(NULL, false, "wake");
	xp_drain();
	for (unsigned f = 0; f < xp_run.nr && nr != 0; f++) {
		/* From the next on, so that no CPU is favoured. */
		struct fiber *fiber = &fibers[(xp_run.now + 1 + f) % xp_run.nr];

		if (fiber->state != WAITING || fiber->word != word)
			continue;
		fiber->state = RUNNABLE;
		nr--;
	}
}

void xp_relax(void *host)
{
	(void)host;
	if (!xp_run.on)
		return;
	xp_run.step++;
	xp_drain();
	xp_m->now += RELAX_NS;
	fibers[xp_run.now].state = SPINNING;
	block();
}

uint64_t xp_now(void *host)
{
	(void)host;
	return xp_m->now += NOW_NS;
}

/* ---- runs -------------------------------------------------------------------------------------
 */

static void fiber_main(void)
{
	xp_scenario->fiber[xp_run.now]();
	xp_run.step++;
	xp_drain();
	fibers[xp_run.now].state = DONE;
	if (xp_run.tracing)
		xp_trace_text("has ended");
	block();
	abort();
}

static void catch_signals(void)
{
	static unsigned char stack[64 << 10];
	stack_t alternate = {.ss_sp = stack, .ss_size = sizeof(stack)};
	struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};

	sigaltstack(&alternate, NULL);
	sigaction(SIGILL, &action, NULL);
	sigaction(SIGTRAP, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGFPE, &action, NULL);
}

static void make_fibers(void)
{
	xp_run.nr = 0;
	for (unsigned f = 0; f < XP_MAX_FIBERS && xp_scenario->fiber[f] != NULL; f++) {
		unsigned char *stack = fibers[f].stack;

		if (stack == NULL)
			stack = malloc(STACK_BYTES);
		if (stack == NULL)
			abort();
		fibers[f] = (struct fiber){.stack = stack};
		fibers[f].sp = xp_fiber_new(stack, STACK_BYTES, fiber_main);
		xp_run.nr++;
	}
}

bool xp_setup(const struct xp_scenario *scenario)
{
	static bool caught;

	if (!caught)
		catch_signals();
	caught = true;
	xp_scenario = scenario;
	xp_memory_forget();
	xp_run = (struct xp_run){.nr = 0};
	if (sigsetjmp(failed, 1) != 0)
		return false;
	xp_machine_new();
	scenario->setup();
	xp_m->nr_contig = xp_nr_contig();
	xp_snapshot();
	return true;
}

bool xp_run_once(void)
{
	unsigned first;

	xp_restore();
	xp_run.violated = false;
	xp_run.one_step = false;
	xp_run.step = 0;
	xp_run.shared_steps = 0;
	quiet_rounds = 0;
	make_fibers();
	if (sigsetjmp(failed, 1) != 0)
		return false;
	first = xp_decide(XP_BLOCK, (1u << xp_run.nr) - 1, 0);
	xp_run.now = first;
	xp_run.on = true;
	if (xp_run.tracing)
		xp_trace_text("runs");
	xp_switch(&main_sp, fibers[first].sp);
	xp_run.on = false;
	xp_run.now = 0;
	for (unsigned f = 0; f < xp_run.nr; f++)
		fibers[f].op = "finish";
	xp_run.violated_pc = 0;
	xp_check_rest();
	if (xp_scenario->finish != NULL)
		xp_scenario->finish();
	xp_check_end();
	return true;
}
