/* SPDX-License-Identifier: MIT */
/*
 * The window: addresses reserved for the heap, in chunks of 2 MiB. A chunk is mapped as a whole;
 * the allocator commits and decommits pages of it. Every function here needs the link's lock.
 */
#ifndef CONTIG_MALLOC_WINDOW_H
#define CONTIG_MALLOC_WINDOW_H

#include "proto.h"

#define CHUNK_SHIFT 21
#define CHUNK_BYTES ((size_t)1 << CHUNK_SHIFT)
#define WINDOW_PAGE ((size_t)4096)
#define CHUNK_PAGES (CHUNK_BYTES / WINDOW_PAGE)
#define CHUNK_WORDS (CHUNK_PAGES / 64)

/* After a fork, the heap stays ordinary memory for so long: programs that fork often would
 * otherwise copy it to and fro. */
#define LEND_AFTER_FORK_NS 100000000u

enum chunk_state {
	CHUNK_RESERVED, /* PROT_NONE */
	CHUNK_LENT,     /* memory of the region */
	CHUNK_PRIVATE,  /* ordinary memory of this process */
};

struct chunk {
	uint8_t state;
	bool sticky; /* PRIVATE, and not to be lent: the program changed its mapping, or it is
			shared copy-on-write with the process that forked this one */
	uint16_t nr_live;
	uint64_t live[CHUNK_WORDS]; /* pages that are committed */
	uint64_t used[CHUNK_WORDS]; /* pages that may hold anything but zeroes */
};

struct window {
	uintptr_t base; /* 0: there is no window */
	size_t bytes;
	uintptr_t next;        /* where the next piece is cut */
	size_t nr_chunks, top; /* chunks from top on were never touched */
	size_t nr_lent;
	size_t cursor;                      /* where lending in the background goes on */
	size_t unlinked;                    /* chunks made private without asking a server */
	bool retired;                       /* no memory is to be lent any more */
	uint64_t ordinary[PROTO_NR_COUNTS]; /* bytes of ordinary memory, not reported yet */
	struct chunk *chunks;
};

extern struct window window;

/* Constant once the constructor ran: needs no lock. */
static inline bool window_touches(uintptr_t addr, size_t bytes)
{
	return window.base && addr < window.base + window.bytes && bytes != 0 &&
	       (addr >= window.base || bytes > window.base - addr);
}

int window_reserve(void);

/* Cut a piece of addresses, not committed. align: a power of two. 0: there is no room. */
uintptr_t window_cut(size_t bytes, size_t align);
/* Grow the last piece cut. */
bool window_grow(uintptr_t addr, size_t bytes);

/* Commit pages: zeroed, writable. 0 or -ENOMEM (nothing is committed then). */
int window_commit(uintptr_t addr, size_t bytes);
/* Pages are not needed; chunks with no page left go back. */
void window_decommit(uintptr_t addr, size_t bytes);

/* Make every lent chunk of the range ordinary memory; sticky: for good. 0 or a negative errno. */
int window_privatise(uintptr_t addr, size_t bytes, bool sticky);
void window_before_fork(void);
void window_after_fork_in_child(void);

/* Before the program limits its address space: have nothing lent, and reserve no more than is in
 * use. */
void window_retire(void);

/* In the second agent. Do one chunk; returns 0 if there may be more, 1 if not, or negative errno.
 */
int window_lend_one(void);
int window_rescue_one(void);

#endif
