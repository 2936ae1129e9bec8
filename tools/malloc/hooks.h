/* SPDX-License-Identifier: MIT */
/* What the preload library exports besides jemalloc's own names: see export.map. */
#ifndef CONTIG_MALLOC_HOOKS_H
#define CONTIG_MALLOC_HOOKS_H

#include <jemalloc/jemalloc.h>

void *pvalloc(size_t size);

#endif
