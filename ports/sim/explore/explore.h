/* SPDX-License-Identifier: MIT */
/*
 * What a scenario sees of the explorer.
 *
 * A scenario is a machine that set-up makes once, up to four fibers that work on it at the same
 * time, each on a CPU of its own, and a finish that looks at what came of it and takes everything
 * down. The explorer runs the fibers again and again, from the same start, in different orders.
 *
 * Everything that differs from run to run must live in the world or in the core: the explorer
 * restores those before each run, and nothing else.
 */
#ifndef CONTIG_EXPLORE_H
#define CONTIG_EXPLORE_H

#include "core.h"

#define XP_MAX_FIBERS 4

/* Hooks that a run may let fail, as bits of xp_scenario.failing. */
enum xp_hook {
	XP_META_ALLOC,
	XP_COPY,
	XP_ZERO,
	XP_RESTRICT, /* CTG_TLB_WRPROTECT only */
	XP_INSTALL,
	XP_NR_HOOKS
};

/* The scenario's own state; its meaning is the scenario's. */
struct xp_world {
	struct ctg *ctg;
	struct ctg_zone *zone, *spill;
	struct ctg_cma *cma;
	struct ctg_mm *mm[4];
	ctg_pfn_t pfn[8];
	int ret[8];
	uint64_t n[8];
	struct ctg_word32 flag[4]; /* a request's cancel word, for example */
};
extern struct xp_world *xp_world;

struct xp_scenario {
	const char *name;
	const char *what; /* one line */
	void (*setup)(void);
	void (*fiber[XP_MAX_FIBERS])(void); /* up to the first NULL */
	void (*finish)(void);               /* may be NULL */
	unsigned failing; /* hooks that may fail, once a run, as the scheduler chooses */
};

/* ---- making the machine, in setup -------------------------------------------------------------
 */

/* A machine without zones, in xp_world->ctg. */
void xp_machine(void);
/* A zone of nr pageblocks after all others. Released as ordinary memory, unless `area`. */
struct ctg_zone *xp_zone(unsigned nr_blocks, unsigned flags, bool area);
/* One area over all of a zone, in xp_world->cma. */
void xp_area(struct ctg_zone *zone);
/* A machine with an area of so many pageblocks and, if spill is not 0, a spill zone. */
void xp_simple(unsigned nr_blocks, unsigned spill_blocks);
/* An empty address space. */
struct ctg_mm *xp_mm(unsigned gfp);
/* Map nr pages at vpn for reading and writing, and write vpn + 1 to each through the TLB. */
void xp_fill(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);
/* Take all free frames but `left` of a zone away, as unmovable memory. */
void xp_occupy(struct ctg_zone *zone, uint64_t left);

/* ---- acting, in fibers ------------------------------------------------------------------------
 */

/* Name what the fiber does from here on, for traces. */
void xp_op(const char *name);
/* One 64-bit value a page, through the fiber's TLB, checked against the model. 0 or the fault's. */
int xp_read(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t *value);
int xp_write(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t value);
/* The core's functions, with the model told. */
int xp_mmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot);
int xp_munmap(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);
int xp_dontneed(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr);
int xp_mprotect(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned prot);
void xp_mm_destroy(struct ctg_mm *mm, bool dead);
/* Frames held by pfn: their contents, and how many references are the scenario's. */
uint64_t xp_frame_value(ctg_pfn_t pfn);
void xp_set_frame_value(ctg_pfn_t pfn, uint64_t value);
void xp_held(ctg_pfn_t pfn, int references);
/* Let the killable waits of a fiber end with -EINTR, the one it is in and all later ones. */
void xp_kill(unsigned fiber);
/* A number below n, as the scheduler chooses. */
unsigned xp_choose(unsigned n);
/* The order of this fiber's actions: a place where others may run. */
void xp_pause(void);
/* Go on when nobody else can. */
void xp_let_others(void);
/* Virtual nanoseconds: far in the future if somebody slept until a deadline. */
uint64_t xp_time(void);

/* ---- judging ----------------------------------------------------------------------------------
 */

/* End the run as a violation. */
_Noreturn void xp_violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define XP_EXPECT(cond)                                                                            \
	((cond) ? (void)0 : xp_violation("%s:%d: expected %s", __FILE__, __LINE__, #cond))
/*
 * Nobody is inside the core: every count is explained, every list is whole. Called after the last
 * fiber, before finish; finish may call it again.
 */
void xp_check_rest(void);
/* The frame is free, on a list or in a cache. */
bool xp_frame_free(ctg_pfn_t pfn);

/* All scenarios, ended by one without a name. */
extern const struct xp_scenario *const xp_scenarios[];

#endif
