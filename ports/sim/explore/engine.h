/* SPDX-License-Identifier: MIT */
/*
 * Inside the explorer: fibers, runs, memory, the machine. See docs/explorer.md for the whole.
 */
#ifndef CONTIG_EXPLORE_ENGINE_H
#define CONTIG_EXPLORE_ENGINE_H

#include "explore.h"

/* ---- memory.c ---------------------------------------------------------------------------------
 */

/*
 * Everything that a run changes lies in one arena, at the same place in every process if possible,
 * so that a run is restored by one copy and addresses can be named by their offset.
 */
#define XP_ARENA_BYTES ((size_t)4 << 20)
extern unsigned char *xp_arena;
extern size_t xp_arena_used;

static inline bool xp_in_arena(const void *p)
{
	return (uintptr_t)p - (uintptr_t)xp_arena < XP_ARENA_BYTES;
}

void xp_memory_init(void);
void *xp_alloc(size_t bytes, size_t align); /* zeroed; never fails */
void xp_snapshot(void);
void xp_restore(void);       /* also forgets what the detectors know of the last run */
void xp_memory_forget(void); /* a new scenario: forget which words are shared */

/* What an access would do, for the scheduler. */
bool xp_shared(const void *p, bool write);
/* Addresses that decide nothing (statistics): never a reason to switch. */
void xp_ignore(const void *p, size_t bytes);
unsigned xp_nr_shared(void);
/* From now on xp_shared answers by what has been seen up to now. */
void xp_freeze_shared(void);
extern bool xp_all_points; /* it answers yes */

/* Freed memory: an access is a violation. */
void xp_poison(const void *p, size_t bytes);

/* Store buffers. */
void xp_drain(void);                                /* the running fiber's, all of it */
bool xp_drain_some(unsigned fiber, unsigned which); /* one entry; false: there is none */
unsigned xp_buffered(unsigned fiber);

/* ---- schedule.c -------------------------------------------------------------------------------
 */

enum xp_mode {
	XP_RANDOM, /* a switch with some probability at each shared word */
	XP_PCT,    /* priorities, changed at a few random points */
	XP_WEAK,   /* RANDOM, with store buffers */
	XP_DFS,    /* every schedule with at most so many preemptions */
	XP_REPLAY, /* the recorded decisions */
	XP_NR_MODES
};
extern const char *const xp_mode_names[XP_NR_MODES];

enum xp_decision { XP_PREEMPT = 'p', XP_BLOCK = 'b', XP_CHOICE = 'c', XP_DRAIN = 'd' };

struct xp_record {
	uint64_t step;
	char kind;
	unsigned char choice;
};
#define XP_MAX_RECORDS 65536
extern struct xp_record xp_records[XP_MAX_RECORDS];
extern unsigned xp_nr_records;

void xp_schedule_begin(enum xp_mode mode, unsigned bound, uint64_t seed);
/* DFS: go to the next schedule. false: all have been run. */
bool xp_dfs_next(void);
void xp_dfs_reset(void);
/* The recorded decisions of a run become those that XP_REPLAY follows. */
void xp_replay_recorded(void);
bool xp_replay_parse(const char *text);
void xp_replay_print(void);
/* One of the options of a decision: bits of `options` that are set. `now` is the default. */
unsigned xp_decide(enum xp_decision kind, unsigned options, unsigned now);
void xp_steps_seen(uint64_t steps); /* how long runs are, for PCT */
uint64_t xp_random(void);

/* ---- engine.c ---------------------------------------------------------------------------------
 */

struct xp_run {
	bool on;          /* fibers run, and accesses are points */
	bool one_step;    /* a fiber does several accesses in one step; on is false meanwhile */
	bool weak, races; /* store buffers; the race detector */
	bool tracing;
	unsigned nr;  /* fibers */
	unsigned now; /* the one that runs */
	uint64_t step;
	uint64_t shared_steps;
	bool violated;
	char message[1024];
	uint64_t violated_pc;
};
extern struct xp_run xp_run;
extern const struct xp_scenario *xp_scenario;

/* Before an access to p, or a hook (p NULL): others may run here. */
void xp_point(const void *p, bool write, const char *what);
/* What follows is one step, until xp_step_end. Both do nothing outside of fibers. */
bool xp_step_begin(void);
void xp_step_end(bool on);
/* A value the running fiber has read: a spin loop waits for it to change. */
void xp_read_word(const void *p);
void xp_written(const void *p);
const char *xp_fiber_op(unsigned fiber);

/* One run of the scenario. false: a violation, told in xp_run. */
bool xp_run_once(void);
bool xp_setup(const struct xp_scenario *scenario);

int xp_wait(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable);
void xp_wake(void *host, struct ctg_word32 *word, unsigned nr);
void xp_relax(void *host);
uint64_t xp_now(void *host);

/* ---- machine.c --------------------------------------------------------------------------------
 */

#define XP_MAX_PAGES 32
#define XP_TLB 16
#define XP_HOLDS 8

enum xp_page_state { XP_UNMAPPED, XP_MAPPED, XP_CHANGING };
/* What a page must read as. */
struct xp_page {
	struct ctg_mm *mm; /* NULL: the slot is free */
	ctg_vpn_t vpn;
	enum xp_page_state state;
	unsigned prot, prot_next; /* differ while mprotect runs */
	uint64_t value;
	bool dirty;   /* written and not discarded: the entry has to say so */
	bool zeroing; /* a discard is under way, or was when it was last written: zero is right too
		       */
};

struct xp_machine {
	struct xp_world world;
	uint64_t now;
	struct xp_page page[XP_MAX_PAGES];
	struct xp_tlb {
		struct ctg_mm *mm;
		ctg_vpn_t vpn;
		ctg_pfn_t pfn;
		bool write;
	} tlb[XP_MAX_FIBERS][XP_TLB];
	unsigned tlb_next[XP_MAX_FIBERS];
	struct xp_hold {
		struct ctg_mm *mm;
		unsigned nr;
		struct ctg_vrange range[8];
	} hold[XP_HOLDS];
	struct ctg_word32 let_go;
	struct ctg_mm *install_failed;
	unsigned failed; /* hooks that have failed in this run */
	unsigned nr_zones;
	struct xp_memory {
		ctg_pfn_t base;
		uint64_t nr;
		uint64_t *value;
	} zone[CTG_MAX_ZONES];
	struct xp_held {
		ctg_pfn_t pfn;
		int references;
	} held[16];
	size_t meta_bytes;
	/* As set-up left them: so it has to be at the end. */
	uint64_t nr_contig;
};
extern struct xp_machine *xp_m;

void xp_machine_new(void);

/* ---- check.c ----------------------------------------------------------------------------------
 */

/* A word of the arena has changed. */
void xp_watch(const void *p, uint64_t old, uint64_t now);
/* Frames taken by contiguous allocations, in all zones. */
uint64_t xp_nr_contig(void);
/* After finish: nothing is left. */
void xp_check_end(void);
/* A frame of the page tables is used by an access. */
void xp_check_access(ctg_pfn_t pfn, const char *what);
struct ctg_zone *xp_zone_of_metadata(const void *p, uint64_t *index);

/* ---- trace.c ----------------------------------------------------------------------------------
 */

void xp_trace(
	const void *p, const char *what, unsigned size, uint64_t old, uint64_t now, uint64_t pc);
void xp_trace_text(const char *format, ...) __attribute__((format(printf, 1, 2)));
void xp_trace_reset(void);
void xp_trace_print(void);
void xp_describe(const void *p, char *out, size_t bytes);
void xp_describe_pc(uint64_t pc, char *out, size_t bytes);

#endif
