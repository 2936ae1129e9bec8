/* SPDX-License-Identifier: MIT */
/*
 * The whole contract between the core and what it runs on.
 *
 * A port fills one struct ctg_port. The core calls nothing else: no libc, no globals, no
 * allocation except meta_alloc. Unless a hook says otherwise it may be called from any CPU
 * (thread), several at once.
 *
 * A worked example: one frame leaves a range that somebody wants.
 *
 *   1. The core marks the page-table entry MOVING and calls
 *      tlb_restrict(mm, {vpn, 1}, CTG_TLB_WRPROTECT). The port makes sure that no write through
 *      that page can happen any more: sim drops the entry from its software TLBs, posix
 *      write-protects the page with userfaultfd. Readers go on.
 *   2. copy({dst, src, 1}) copies the frame.
 *   3. The core freezes the old frame, switches the entry to the new frame and calls
 *      tlb_install(mm, {vpn, 1}). The port asks for the entry as it stands now
 *      (ctg_mm_lookup) and makes its mapping agree: sim drops the entry once more and fills it at
 *      the next access, posix maps the new frame over the old one and wakes the writers.
 *   4. Only then is the old frame free.
 *
 * THE TRUTH IS THE CORE'S PAGE TABLE and the hardware's or the OS's mapping a cache of it. So
 * tlb_install carries no frame number: the entry may have changed again since the core asked.
 * A port that keeps mappings serialises the two tlb hooks for each mm, and reads the entries
 * inside; then whoever comes last leaves the mapping as the table says.
 */
#ifndef CONTIG_PORT_H
#define CONTIG_PORT_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* How far tlb_restrict goes. */
enum ctg_tlb_how {
	CTG_TLB_WRPROTECT,  /* no write until tlb_install; reads go on */
	CTG_TLB_INVALIDATE, /* the entries are gone or narrower: no access beyond what they now say */
};

/* One copy of a batch: nr frames from src to dst, not overlapping. */
struct ctg_copy_run {
	ctg_pfn_t dst;
	ctg_pfn_t src;
	uint64_t nr;
};

struct ctg_event;

struct ctg_port {
	void *host; /* handed to every hook */

	/* CPUs that cpu() can name: 1 to CTG_MAX_CPUS. Per-CPU caches are made for so many. */
	unsigned nr_cpus;

	/*
	 * Pages that a migration moves at a time: more let the port spread a copy better, and make a
	 * writer wait longer. A multiple of CTG_PAGEBLOCK_FRAMES, at most CTG_MAX_BATCH_PAGES; 0:
	 * the core's choice.
	 */
	unsigned batch_pages;

	/*
	 * Memory for the core's own structures (page tables, address spaces, areas, batches),
	 * zeroed, aligned to align (a power of two, at most 4096). NULL when there is none: the
	 * caller of the core gets -ENOMEM and everything is as before. May sleep. Never called
	 * with a lock of the core held other than an mm's, or that of the family it belongs to.
	 */
	void *(*meta_alloc)(void *host, size_t bytes, size_t align);
	void (*meta_free)(void *host, void *p, size_t bytes);

	/* The number of the CPU that runs: below nr_cpus. Advisory: it may change at any time. */
	unsigned (*cpu)(void *host);

	/* Nanoseconds of a monotonic clock. */
	uint64_t (*now)(void *host);

	/*
	 * Sleep while *word == expected: compare and sleep are one step with regard to wake().
	 * 0: woken, or the word differed, or for no reason. -ETIMEDOUT: now() >= deadline.
	 * -EINTR: the sleeper is to give up (only if killable). CTG_NO_DEADLINE never times out.
	 */
	int (*wait)(void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline,
		bool killable);
	/* Wake at most nr sleepers on word. */
	void (*wake)(void *host, struct ctg_word32 *word, unsigned nr);
	/* The body of a short spin loop (pause, yield). */
	void (*relax)(void *host);

	/*
	 * Contents. copy moves a whole batch: a port may spread it over CPUs or hand it to a DMA
	 * engine, and returns when it is done. 0, or a negative errno (-ENOMEM: a sparse
	 * destination could not be filled) after which the destinations' contents are undefined.
	 * zero fills with zero bytes; the same errors. Both may sleep.
	 */
	int (*copy)(void *host, const struct ctg_copy_run *runs, size_t nr);
	int (*zero)(void *host, ctg_pfn_t pfn, uint64_t nr);
	/*
	 * The frames are free and their contents not wanted: give the memory behind them back (a
	 * zone with CTG_ZONE_DISCARD). They must read as zero when used next. May be NULL if
	 * no zone has the flag.
	 */
	void (*discard)(void *host, ctg_pfn_t pfn, uint64_t nr);

	/*
	 * The mapping. Ranges are those whose entries the core has just changed; they are sorted
	 * and do not overlap. May sleep; no lock of the core is held other than an mm's, its
	 * family's or a batch's.
	 *
	 * tlb_restrict: on success nothing beyond what `how` allows can happen through the
	 * ranges. With CTG_TLB_WRPROTECT it may refuse with a negative errno (-EBUSY: the
	 * owner of the mm cannot be stopped now; -ENOMEM: no room for the mappings that a move
	 * would need), and has then undone what it had done. CTG_TLB_INVALIDATE cannot fail.
	 *
	 * tlb_install: make the mapping agree with the entries as ctg_mm_lookup returns them now,
	 * let writers that waited go on. May map eagerly or only forget. After a success no
	 * access through an older entry can happen. On failure (-ENOMEM) every page of the
	 * ranges maps either what it mapped before or what the table says; the core then puts its
	 * entries back and calls again, and that call must not fail.
	 */
	int (*tlb_restrict)(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
		enum ctg_tlb_how how);
	int (*tlb_install)(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr);

	/* Called for every event, if not NULL. Must not call the core. May run under locks. */
	void (*trace)(void *host, const struct ctg_event *event);
};

#define CTG_MAX_CPUS 64
#define CTG_MAX_BATCH_PAGES 65536u

#ifdef __cplusplus
}
#endif
#endif
