/* SPDX-License-Identifier: MIT */
/*
 * The sim port: memory of this process that pretends to be a machine.
 *
 * Contents are real (sparse) memory, CPUs are whatever the calling thread says it is, each CPU
 * has a software TLB that goes stale unless the core invalidates it, and every hook that can fail
 * can be told to. Safe for real threads; deterministic with one.
 */
#ifndef CONTIG_PORT_SIM_H
#define CONTIG_PORT_SIM_H

#include <contig/contig.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ctg_sim;

struct ctg_sim_config {
	unsigned nr_cpus;  /* 0: 2 */
	bool virtual_time; /* time moves by ctg_sim_advance and by waits only */
	void (*trace)(void *arg, const struct ctg_event *event); /* may be NULL */
	void *trace_arg;
};

/* Hooks that can fail, for ctg_sim_fail. */
enum ctg_sim_hook {
	CTG_SIM_META_ALLOC,
	CTG_SIM_COPY,
	CTG_SIM_ZERO,
	CTG_SIM_RESTRICT, /* CTG_TLB_WRPROTECT only */
	CTG_SIM_INSTALL,
	CTG_SIM_NR_HOOKS
};

/* Make a machine on the sim. Returns 0, -EINVAL, -ENOMEM. ctg_sim_destroy frees all of it. */
int ctg_sim_create(const struct ctg_sim_config *config, struct ctg_sim **out);
void ctg_sim_destroy(struct ctg_sim *sim);
struct ctg *ctg_sim_machine(struct ctg_sim *sim);

/*
 * Add a zone with memory (all of it populated and reserved if `populate`). The memory is sparse.
 * Returns as ctg_zone_add.
 */
int ctg_sim_add_zone(struct ctg_sim *sim, const struct ctg_zone_config *config, bool populate,
	struct ctg_zone **out);

/* The contents of a frame, in the direct map. NULL outside every zone. */
void *ctg_sim_frame(struct ctg_sim *sim, ctg_pfn_t pfn);

/* The calling thread is this CPU from now on (0 at first). */
void ctg_sim_set_cpu(unsigned cpu);

void ctg_sim_advance(struct ctg_sim *sim, uint64_t ns);

/*
 * Let the nth call of a hook from now on (1: the next) fail, once; 0: none. Returns how many calls
 * the hook has had since the last ctg_sim_fail of it. tlb_install's second call, which puts back,
 * never fails.
 */
uint64_t ctg_sim_fail(struct ctg_sim *sim, enum ctg_sim_hook hook, uint64_t nth);

/* Bytes from meta_alloc that are not freed: 0 after a clean end but for the machine itself. */
uint64_t ctg_sim_meta_bytes(struct ctg_sim *sim);

/*
 * Access memory as a program would: through the CPU's TLB, faulting as needed. Bytes; may cross
 * pages. Returns 0 or what the fault handler returned.
 */
int ctg_sim_read(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, void *buf, size_t len);
int ctg_sim_write(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, const void *buf, size_t len);

#ifdef __cplusplus
}
#endif
#endif
