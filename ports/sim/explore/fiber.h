/* SPDX-License-Identifier: MIT */
/* Switching stacks: no system call, no signal mask. */
#ifndef CONTIG_EXPLORE_FIBER_H
#define CONTIG_EXPLORE_FIBER_H

#include <stddef.h>

/* Save the caller's registers and stack in *save, go on where `load` was saved. */
void xp_switch(void **save, void *load);
/* What to load to begin entry() on a stack. entry must not return. */
void *xp_fiber_new(void *stack, size_t bytes, void (*entry)(void));

#endif
