/* SPDX-License-Identifier: MIT */
/*
 * The units that every other header speaks in.
 *
 * A pfn is the number of a 4 KiB page frame; a vpn the number of a 4 KiB page of an address
 * space. Counts of memory are in frames unless a name says bytes; times are nanoseconds of the
 * port's monotonic clock; errors are negative errno values with Linux's numbers (below, because
 * a freestanding core has no errno.h).
 */
#ifndef CONTIG_TYPES_H
#define CONTIG_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef uint64_t ctg_pfn_t;
typedef uint64_t ctg_vpn_t;

#define CTG_PAGE_SHIFT 12
#define CTG_PAGE_SIZE ((size_t)1 << CTG_PAGE_SHIFT)
/* A pageblock is the unit of isolation and of migratetypes: 2 MiB. */
#define CTG_PAGEBLOCK_ORDER 9
#define CTG_PAGEBLOCK_FRAMES ((uint64_t)1 << CTG_PAGEBLOCK_ORDER)
/* The largest buddy block and the largest frame: 1 GiB. */
#define CTG_MAX_ORDER 18
#define CTG_NR_ORDERS (CTG_MAX_ORDER + 1)
#define CTG_PFN_NONE UINT64_MAX
#define CTG_NO_DEADLINE UINT64_MAX

#define CTG_EPERM 1
#define CTG_ENOENT 2
#define CTG_EINTR 4
#define CTG_EAGAIN 11
#define CTG_ENOMEM 12
#define CTG_EFAULT 14
#define CTG_EBUSY 16
#define CTG_EEXIST 17
#define CTG_EINVAL 22
#define CTG_ENOSPC 28
#define CTG_EOVERFLOW 75
#define CTG_ENOTSUP 95
#define CTG_ETIMEDOUT 110

enum ctg_migratetype {
	CTG_MIGRATE_UNMOVABLE, /* held by pfn: cannot move */
	CTG_MIGRATE_MOVABLE,   /* reached through page tables only: can move */
	CTG_MIGRATE_CMA,       /* belongs to an area: serves movable requests, never changes */
	CTG_MIGRATE_ISOLATE,   /* being taken: what is freed here stays here */
	CTG_NR_MIGRATETYPES
};

/* 16-, 32- and 64-bit words that other CPUs change too. Touch them with the core's functions only. */
struct ctg_word16 {
	uint16_t v;
};
struct ctg_word32 {
	uint32_t v;
};
struct ctg_word64 {
	uint64_t v;
};

struct ctg;
struct ctg_zone;
struct ctg_mm;
struct ctg_cma;
struct ctg_group;

/* A run of consecutive frames. */
struct ctg_extent {
	ctg_pfn_t pfn;
	uint64_t nr; /* frames */
};

/* A run of consecutive pages of one address space. */
struct ctg_vrange {
	ctg_vpn_t vpn;
	uint64_t nr; /* pages */
};

#ifdef __cplusplus
}
#endif
#endif
