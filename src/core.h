/* SPDX-License-Identifier: MIT */
/*
 * The core's own structures, and the functions its files offer each other.
 */
#ifndef CTG_CORE_H
#define CTG_CORE_H

#include <contig/contig.h>
#include "atomic.h"
#include "lock.h"

#ifdef CTG_DEBUG
#define CTG_ASSERT(cond) ((cond) ? (void)0 : __builtin_trap())
#else
#define CTG_ASSERT(cond) ((void)sizeof((cond) ? 1 : 0))
#endif

/* ---- frame.h: the word ----------------------------------------------------------------------- */

/*
 * map:24 | pin:24 | ref:14 | waiters:1 | draining:1, from the low bits up. All holders of a frame
 * are in this one word, so each of map, unmap, pin, reference and freeze is one atomic.
 */
#define CTG_WORD_MAP_SHIFT 0
#define CTG_WORD_PIN_SHIFT 24
#define CTG_WORD_REF_SHIFT 48
#define CTG_WORD_MAP_MAX ((1u << 24) - 2) /* one less than fits: FROZEN is out of reach */
#define CTG_WORD_PIN_MAX ((1u << 24) - 2)
#define CTG_WORD_REF_MAX ((1u << 14) - 2)
#define CTG_WORD_MAP1 ((uint64_t)1 << CTG_WORD_MAP_SHIFT)
#define CTG_WORD_PIN1 ((uint64_t)1 << CTG_WORD_PIN_SHIFT)
#define CTG_WORD_REF1 ((uint64_t)1 << CTG_WORD_REF_SHIFT)
#define CTG_WORD_WAITERS ((uint64_t)1 << 62)
#define CTG_WORD_DRAINING ((uint64_t)1 << 63)
#define CTG_WORD_FLAGS (CTG_WORD_WAITERS | CTG_WORD_DRAINING)
#define CTG_WORD_FROZEN (~CTG_WORD_FLAGS) /* all counts at their impossible maximum, no flags */

static inline uint32_t ctg_word_map(uint64_t w)
{
	return (uint32_t)(w >> CTG_WORD_MAP_SHIFT) & 0xffffff;
}
static inline uint32_t ctg_word_pin(uint64_t w)
{
	return (uint32_t)(w >> CTG_WORD_PIN_SHIFT) & 0xffffff;
}
static inline uint32_t ctg_word_ref(uint64_t w)
{
	return (uint32_t)(w >> CTG_WORD_REF_SHIFT) & 0x3fff;
}
static inline bool ctg_word_frozen(uint64_t w)
{
	return (w & ~CTG_WORD_FLAGS) == CTG_WORD_FROZEN;
}

/*
 * What a frame is. info is one word, so that a scan without locks sees state, order and type of
 * the same moment.
 *
 *   state     the frame is                      who may change it            to
 *   TAIL (0)  inside a larger block, or memory  whoever owns the block       any
 *             never used, or a hole
 *   RESERVED  populated, not released           set-up                       FREE
 *   FREE      head of a free buddy block, on a  zone->lock                   PCP, USED, CONTIG, TAIL
 *             free list (perhaps ISOLATE's)
 *   PCP       free, in a per-CPU cache          pcp->lock (then zone->lock)  FREE, USED
 *   USED      head of an allocated block:       the holder that drops the    FREE, PCP, USED (split)
 *             `order`, holders in word          last count
 *   ANON      as USED, and owner/index say      as USED; set by the mapper   as USED
 *             where it is mapped: can move      while it holds the only
 *                                               reference
 *   CONTIG    taken by a contiguous allocation, the holder that drops the    FREE
 *             order 0, holders in word          last count
 *
 * RESERVED is not written to frames: a pageblock's `released` flag says it, so that making an area
 * of 16 GiB touches a few heads only. A frame of a released, present pageblock is never a hole.
 */
enum ctg_frame_state {
	CTG_FRAME_TAIL,
	CTG_FRAME_FREE,
	CTG_FRAME_PCP,
	CTG_FRAME_USED,
	CTG_FRAME_ANON,
	CTG_FRAME_CONTIG,
};
enum ctg_frame_flags {
	CTG_FRAME_ZEROED = 1 << 0,    /* free block: all of it reads as zero */
	CTG_FRAME_UNMOVABLE = 1 << 1, /* USED: allocated without CTG_GFP_MOVABLE */
};
#define CTG_INFO(state, order, mt, flags)                                                          \
	((uint32_t)(state) | (uint32_t)(order) << 8 | (uint32_t)(mt) << 16 | (uint32_t)(flags) << 24)
static inline unsigned ctg_info_state(uint32_t info)
{
	return info & 0xff;
}
static inline unsigned ctg_info_order(uint32_t info)
{
	return info >> 8 & 0xff;
}
static inline unsigned ctg_info_mt(uint32_t info)
{
	return info >> 16 & 0xff;
}
static inline unsigned ctg_info_flags(uint32_t info)
{
	return info >> 24;
}

struct ctg_frame {
	struct ctg_word64 word;
	union {
		struct {
			uint32_t next, prev; /* FREE, PCP: index in the zone + 1; 0 ends the list */
		} link;
		struct ctg_anon *anon; /* ANON: the family whose address spaces may map it */
	};
	uint64_t index; /* ANON: vpn at which the head is mapped, in every space of the family */
	struct ctg_word32 info;
	/*
	 * Whose account the pins of an ANON frame are on, written by whoever holds a verified pin (all
	 * pins of one frame are one mm's, so racing writers agree); and which group it is charged
	 * to, 0: none, written by the holder of its only count.
	 */
	struct ctg_word16 pin_account;
	uint16_t group;
};
_Static_assert(sizeof(struct ctg_frame) == CTG_FRAME_METADATA_BYTES, "metadata of a frame");

/* ---- zones ----------------------------------------------------------------------------------- */

struct ctg_free_list {
	uint32_t first; /* index + 1 */
	uint64_t nr;    /* blocks */
};

/*
 * A pageblock's summary. All under zone->lock; without it, ctg_hint_load reads a field as a hint.
 * So whoever changes one that is in use does so with ctg_hint_store.
 */
struct ctg_block {
	uint8_t migratetype; /* what it is when not isolated */
	bool present;
	bool released; /* its frames are, or were, in the buddy allocator or an area */
	uint16_t nr_free;   /* frames of it in buddy lists (of any type, ISOLATE too) */
	uint16_t nr_contig; /* frames of it that are CONTIG */
	const void *isolated_by; /* who isolated it; NULL: nobody. Only that one may undo it */
};

/* Levels of the tree of free runs: 2^23 pageblocks are the most that a zone can have. */
#define CTG_RUN_LEVELS 24

#define CTG_PCP_BATCH 32
#define CTG_PCP_HIGH 128
struct ctg_pcp {
	struct ctg_lock lock;
	struct ctg_free_list list[CTG_MIGRATE_ISOLATE]; /* order 0, by type */
};

struct ctg_zone {
	struct ctg *ctg;
	struct ctg_lock lock;
	ctg_pfn_t base;
	uint64_t nr;
	uint64_t nr_blocks;
	unsigned flags;
	unsigned map_order;
	struct ctg_frame *frames;
	struct ctg_block *blocks;
	struct ctg_run_node *tree; /* runs.c: longest free run, a segment tree over the blocks */
	uint32_t run_level[CTG_RUN_LEVELS]; /* runs.c: index of each level's first node */
	unsigned nr_run_levels;
	uint64_t nr_present;
	/* Raised when an allocation has undone its isolation; waited on (contig.c). */
	struct ctg_word32 isolation_ended;
	uint64_t nr_free[CTG_NR_MIGRATETYPES]; /* frames on the lists of each type */
	struct ctg_free_list free[CTG_NR_ORDERS][CTG_NR_MIGRATETYPES];
	struct ctg_pcp pcp[CTG_MAX_CPUS];
};

/* pin.c: accounts of pins, by index, and the ledger of handles. */
#define CTG_PIN_CHUNK 64u
#define CTG_PIN_CHUNKS 1024u
struct ctg_pins {
	struct ctg_lock lock; /* a leaf; held while the ledger is walked */
	/* Accounts are never freed before the machine: chunks that exist stay. */
	struct ctg_pin_account *accounts[CTG_PIN_CHUNKS];
	uint32_t nr_accounts;  /* indexes that were ever used, the shared one included */
	uint16_t free_account; /* first of those that are free; 0: none */
	struct ctg_pin *oldest, *newest;
};

#define CTG_FRAME_WAITS 64
struct ctg {
	struct ctg_port port;
	unsigned nr_zones;
	struct ctg_zone *zones[CTG_MAX_ZONES];
	struct ctg_lock areas_lock;
	unsigned nr_areas;
	struct ctg_cma *areas[CTG_MAX_AREAS];
	struct ctg_lock batches_lock; /* the list of batches; inside anon->lock, outside batch->lock */
	struct ctg_batch *batches;    /* unmap.c: every address space's batch */
	struct ctg_lock anons_lock;   /* a leaf: taken for a moment, nothing inside */
	struct ctg_anon *anons;       /* rmap.c: families, in use or not */
	struct ctg_pins pins;
	struct ctg_lock groups_lock;  /* a leaf */
	struct ctg_group *groups[CTG_MAX_GROUPS]; /* by index - 1; NULL: not in use */
	/*
	 * Sleepers on frames, by a hash of the pfn: a word that the waker raises. A sleeper sets
	 * WAITERS in the frame's word, so that the one who leaves knows; see ctg_frame_wait.
	 */
	struct ctg_word32 frame_wait[CTG_FRAME_WAITS];
	struct {
		struct ctg_word64 cma_alloc_success, cma_alloc_fail, cma_frames_allocated,
			cma_frames_released, frames_migrated, migrate_fail, frames_returned, faults,
			faults_waited, frames_zeroed, batches_helped, cache_drains;
	} counters;
};

static inline void ctg_count(struct ctg_word64 *counter, uint64_t n)
{
	ctg_add64_relaxed(counter, n);
}
static inline struct ctg_frame *ctg_zone_frame(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	CTG_ASSERT(pfn - zone->base < zone->nr);
	return &zone->frames[pfn - zone->base];
}
static inline struct ctg_block *ctg_zone_block(const struct ctg_zone *zone, ctg_pfn_t pfn)
{
	CTG_ASSERT(pfn - zone->base < zone->nr);
	return &zone->blocks[(pfn - zone->base) >> CTG_PAGEBLOCK_ORDER];
}

/* zone.c */
struct ctg_zone *ctg_zone_of(struct ctg *ctg, ctg_pfn_t pfn); /* NULL: outside every zone */
/* The frame of a pfn known to be in a zone. */
struct ctg_frame *ctg_frame_of(struct ctg *ctg, ctg_pfn_t pfn);
/* The head of the block in use that contains pfn; pfn itself if it is in none. */
ctg_pfn_t ctg_used_head(const struct ctg_zone *zone, ctg_pfn_t pfn);
/* ctg_zone_release into a given type (CMA for areas). Takes zone->lock. 0 or -EINVAL. */
int ctg_zone_lend(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, enum ctg_migratetype mt,
	bool zeroed);

/* cma.c: what ctg_destroy needs: free every area's structures */
void ctg_cma_destroy_all(struct ctg *ctg);
/* rmap.c: likewise, every family */
void ctg_anons_destroy(struct ctg *ctg);

/* pin.c */
int ctg_pins_init(struct ctg *ctg); /* 0 or -ENOMEM */
void ctg_pins_destroy(struct ctg *ctg);
/* The mm ends: its account and its handles live on while there are pins. */
void ctg_pins_leave(struct ctg_mm *mm);
/* Say in the report who pins the frame that it names, if the ledger knows. */
void ctg_pins_name(struct ctg *ctg, struct ctg_alloc_report *report);

/*
 * group.c. A NULL group, or index 0, is nobody's: charged without end. Charge before the frames are
 * allocated; a frame then says whom (frame->group of the head) until ctg_frame_free uncharges it.
 */
int ctg_group_charge(struct ctg_group *group, uint64_t nr); /* 0 or -ENOSPC */
void ctg_group_uncharge(struct ctg_group *group, uint64_t nr);
uint16_t ctg_group_index(const struct ctg_group *group);
void ctg_group_uncharge_index(struct ctg *ctg, uint16_t index, uint64_t nr);
void ctg_group_join(struct ctg_group *group); /* an address space of it begins */
void ctg_group_leave(struct ctg_group *group);
struct ctg *ctg_group_machine(const struct ctg_group *group);
void ctg_groups_destroy(struct ctg *ctg);

/* buddy.c: all of these take zone->lock themselves. A block is [pfn, pfn + 2^order), aligned. */
/* Largest block of order max..min that suits gfp out of one zone; its head is USED, word 0. */
int ctg_buddy_alloc(struct ctg_zone *zone, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order, bool *zeroed);
/*
 * Free frames of any count and alignment, as the largest blocks; nobody holds them (words are 0).
 * Infos may be those of any blocks, but the blocks must be whole, in this sense: each frame is a
 * head, or a TAIL inside the block of a head that is freed too or was shortened before. Goes to
 * the ISOLATE list where a block is isolated. Takes the lock anew now and then.
 */
void ctg_buddy_free_range(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed);
/*
 * Take exactly [pfn, pfn + nr) if every frame of it is free now: each becomes CONTIG, order 0,
 * word = one reference. owner NULL: only in blocks nobody has isolated; else only in blocks that
 * owner has isolated. *zeroed: all of it is known to be zero.
 * 0, or -EBUSY with *busy the first frame that is not free (or whose block is not right).
 */
int ctg_buddy_take_range(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, const void *owner,
	bool *zeroed, ctg_pfn_t *busy);

/* isolate.c */
/* Isolate the block of pfn for owner. 0; -EBUSY: somebody else has; -EINVAL: not released memory. */
int ctg_block_isolate(struct ctg_zone *zone, ctg_pfn_t pfn, const void *owner);
/* Undo; the block must be owner's. Free frames go back to the block's own type and merge. */
void ctg_block_unisolate(struct ctg_zone *zone, ctg_pfn_t pfn, const void *owner);

/* runs.c: free runs of a zone, exact, O(log blocks) a query once the dirty leaves are done */
void ctg_runs_mark(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr); /* zone->lock held */
/* Longest run of free, not isolated frames inside [start, start + nr). zone->lock held. */
struct ctg_extent ctg_runs_longest(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr);
/* First run of nr free, not isolated frames inside [start, end), aligned; CTG_PFN_NONE: none.
 * zone->lock held. */
ctg_pfn_t ctg_runs_find(struct ctg_zone *zone, ctg_pfn_t start, ctg_pfn_t end, uint64_t nr,
	uint64_t align);

/* pcp.c: order 0 through the caches. The frame comes back USED, word 0. */
int ctg_pcp_alloc(struct ctg_zone *zone, unsigned gfp, ctg_pfn_t *pfn, bool *zeroed);
void ctg_pcp_free(struct ctg_zone *zone, ctg_pfn_t pfn); /* to buddy if its block is isolated */
void ctg_pcp_drain(struct ctg_zone *zone); /* every CPU's */

/* alloc.c */
/*
 * The largest free block of order max..min that suits gfp, over the zones in their order; one
 * plain reference on the head, zeroed if asked. zones with map_order > max are passed over.
 */
int ctg_alloc_run(struct ctg *ctg, unsigned max_order, unsigned min_order, unsigned gfp,
	ctg_pfn_t *pfn, unsigned *order);
/* Split an allocated block held by one reference on the head into order-0 blocks with one each. */
void ctg_split_used(struct ctg *ctg, ctg_pfn_t pfn, unsigned order);
/*
 * Give back a block whose last count the caller has just dropped (its word has no counts left):
 * wakes waiters, clears the word, discards if the zone says so, frees, uncharges.
 */
void ctg_frame_free(struct ctg *ctg, ctg_pfn_t pfn);
/*
 * Free frames that nobody holds and nobody waits for (words are 0): discards if the zone says so,
 * then ctg_buddy_free_range.
 */
void ctg_free_run(struct ctg_zone *zone, ctg_pfn_t pfn, uint64_t nr, bool zeroed);

/* frame.c: the operations on the word */
/* Take a plain reference unless the frame is free, frozen or full. 0, -EBUSY, -EOVERFLOW. */
int ctg_frame_tryget(struct ctg_frame *frame);
/* Drop one count of a kind (CTG_WORD_MAP1, PIN1, REF1) times nr; frees the frame if it was the
 * last, wakes waiters. */
void ctg_frame_put(struct ctg *ctg, ctg_pfn_t pfn, uint64_t one, uint32_t nr);
/* The same for PIN1 or REF1 on the word of a caller who may be wrong: drops at most what is there,
 * and returns how many that was. */
uint32_t ctg_frame_put_some(struct ctg *ctg, ctg_pfn_t pfn, uint64_t one, uint32_t nr);
/* Freeze from exactly `map` mappings and `ref` references and no pin (flags as they may be).
 * true: frozen. false: *seen is the word that stood in the way. */
bool ctg_frame_freeze(struct ctg_frame *frame, uint32_t map, uint32_t ref, uint64_t *seen);
/*
 * Leave FROZEN with these counts; wakes those who waited for it. With counts 0 the frame is the
 * caller's, who then calls ctg_frame_free (which may also be called on a FROZEN frame).
 */
void ctg_frame_unfreeze(struct ctg *ctg, struct ctg_frame *frame, uint64_t counts);
/*
 * Sleep until a holder leaves the frame, it is unfrozen, or the deadline passes: sets WAITERS and
 * sleeps, unless the word is no longer `seen` (WAITERS apart). 0: look again. -ETIMEDOUT, -EINTR.
 */
int ctg_frame_wait(struct ctg *ctg, ctg_pfn_t pfn, uint64_t seen, uint64_t deadline, bool killable);
/* Which kind of holder exceeds what is accounted for. */
enum ctg_obstacle_kind ctg_word_obstacle(uint64_t word, uint32_t map, uint32_t ref);

/* Wake those who wait for a frame, after WAITERS has been cleared in its word. */
void ctg_frame_wake(struct ctg *ctg, ctg_pfn_t pfn);

/* stat.c */
void ctg_trace(struct ctg *ctg, enum ctg_event_kind kind, ctg_pfn_t pfn, uint64_t nr, uint64_t value,
	const char *area);

/* ---- address spaces and migration ------------------------------------------------------------ */

/* unmap.c: flush every batch that may hold frames of [pfn, pfn + nr) of the machine (any if nr is
 * 0). Whoever calls does the work: it does not wait for the batch's owner. */
void ctg_batches_flush(struct ctg *ctg, ctg_pfn_t pfn, uint64_t nr);

/* migrate.c */
struct ctg_migrate_stats {
	uint64_t frames_moved;
	uint64_t ns_copy, ns_install;
	enum ctg_obstacle_kind obstacle;
	ctg_pfn_t obstacle_pfn;
	uint64_t obstacle_word;
};
/*
 * Move every movable frame of [start, start + nr) elsewhere; the range is isolated by the caller,
 * so that nothing new is allocated there and what becomes free stays. Destinations come from
 * gfp (normally MOVABLE | SPILL), never from isolated blocks. A large frame that begins before or
 * ends after the range is moved whole. One of order 18 moves to another such frame, if everybody
 * maps it by one entry, or not at all: NO_MEMORY or MAP is then the obstacle.
 * rounds: how often to look again at frames that could not be moved (FAST 1, NORMAL some).
 * 0: nothing is left in the way; -EBUSY, -ENOMEM, -ETIMEDOUT, -EINTR otherwise, and *stats names
 * the obstacle. What has moved stays moved: that is invisible to its owners.
 */
int ctg_migrate_range(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr, unsigned gfp,
	unsigned rounds, const struct ctg_alloc_request *request, struct ctg_migrate_stats *stats);

/* contig.c */
/*
 * The body of ctg_alloc_contig_range, for one window: *report's counts are added to. The caller
 * has checked the range. Not zeroed unless `zero`. *isolated: pageblocks were isolated; when
 * nothing of the attempt is left, the caller tells those who wait (ctg_isolation_ended).
 */
int ctg_contig_take(struct ctg_zone *zone, ctg_pfn_t start, uint64_t nr, unsigned rounds, bool zero,
	const struct ctg_alloc_request *request, struct ctg_alloc_report *report, bool *isolated);
/* 0, or -EINTR / -ETIMEDOUT if the request was cancelled or is late. request may be NULL. */
int ctg_request_check(struct ctg *ctg, const struct ctg_alloc_request *request);

#endif
