/* SPDX-License-Identifier: MIT */
/*
 * The word of a frame: taking and dropping holders, freezing, and waiting for a holder to leave.
 *
 * Why a waiter cannot be missed. A sleeper does, in this order:
 *
 *   S1  reads ticket = frame_wait[hash]                     (acquire)
 *   S2  by compare-and-swap, from the word it has seen, sets WAITERS (also if it is set already)
 *   S3  sleeps in the port while frame_wait[hash] == ticket
 *
 * and whoever lets a holder go or unfreezes:
 *
 *   W1  changes the counts, in one atomic, and finds WAITERS set in what it replaced
 *   W2  clears WAITERS (W1 itself may have)
 *   W3  raises frame_wait[hash], then calls the port's wake
 *
 * All of S2, W1 and W2 are on one word, so they have one order. If W1 comes before S2, S2 fails
 * (the counts differ) and the sleeper looks again, unless the counts have come back to what
 * was seen, and then there is again a holder to wait for. If S2 comes before W1, then W1 finds
 * WAITERS, or somebody else's W2 cleared it between the two. Take the first W2 after S2; its
 * W3 follows. Had S1 read the value that this W3 wrote, S1 would have synchronised with it, so W2
 * would have come before S2: a contradiction. So ticket is older than this W3, and S3 either finds
 * that the word differs or is woken. A sleeper may be woken for nothing; it looks again.
 *
 * W2 may hit a word that has been freed and allocated again since W1. It then clears a WAITERS bit
 * that belongs to a sleeper of the new owner, which W3 wakes by the same argument.
 */
#include "core.h"

/* The word that sleepers on a frame wait for. Neighbouring frames have different ones. */
static struct ctg_word32 *wait_word(struct ctg *ctg, ctg_pfn_t pfn)
{
	return &ctg->frame_wait[pfn % CTG_FRAME_WAITS];
}

void ctg_frame_wake(struct ctg *ctg, ctg_pfn_t pfn)
{
	struct ctg_word32 *word = wait_word(ctg, pfn);

	ctg_add32_acq_rel(word, 1);
	ctg->port.wake(ctg->port.host, word, UINT32_MAX);
}

int ctg_frame_tryget(struct ctg_frame *frame)
{
	uint64_t w = ctg_load64_relaxed(&frame->word);

	do {
		if ((w & ~CTG_WORD_FLAGS) == 0 || ctg_word_frozen(w))
			return -CTG_EBUSY;
		if (ctg_word_ref(w) >= CTG_WORD_REF_MAX)
			return -CTG_EOVERFLOW;
	} while (!ctg_cas64_acq_rel(&frame->word, &w, w + CTG_WORD_REF1));
	return 0;
}

/* A holder has left: old is the word before, counts what is left. */
static void holder_left(struct ctg *ctg, ctg_pfn_t pfn, uint64_t old, uint64_t counts)
{
	if (counts == 0) {
		ctg_frame_free(ctg, pfn);
		return;
	}
	if ((old & CTG_WORD_WAITERS) == 0)
		return;
	ctg_and64_acq_rel(&ctg_frame_of(ctg, pfn)->word, ~CTG_WORD_WAITERS);
	ctg_frame_wake(ctg, pfn);
}

void ctg_frame_put(struct ctg *ctg, ctg_pfn_t pfn, uint64_t one, uint32_t nr)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);
	uint64_t old = ctg_add64_acq_rel(&frame->word, -(one * nr));

	CTG_ASSERT(!ctg_word_frozen(old));
	CTG_ASSERT(one != CTG_WORD_MAP1 || ctg_word_map(old) >= nr);
	CTG_ASSERT(one != CTG_WORD_PIN1 || ctg_word_pin(old) >= nr);
	CTG_ASSERT(one != CTG_WORD_REF1 || ctg_word_ref(old) >= nr);
	holder_left(ctg, pfn, old, (old - one * nr) & ~CTG_WORD_FLAGS);
}

uint32_t ctg_frame_put_some(struct ctg *ctg, ctg_pfn_t pfn, uint64_t one, uint32_t nr)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);
	uint64_t w = ctg_load64_relaxed(&frame->word);
	uint32_t some;

	do {
		uint32_t has = one == CTG_WORD_PIN1 ? ctg_word_pin(w) : ctg_word_ref(w);

		some = has < nr ? has : nr;
		if (some == 0 || ctg_word_frozen(w))
			return 0;
	} while (!ctg_cas64_acq_rel(&frame->word, &w, w - one * some));
	holder_left(ctg, pfn, w, (w - one * some) & ~CTG_WORD_FLAGS);
	return some;
}

int ctg_free_frames(struct ctg *ctg, ctg_pfn_t pfn)
{
	struct ctg_zone *zone;
	struct ctg_frame *frame;
	uint64_t w;

	if (ctg == NULL)
		return -CTG_EINVAL;
	zone = ctg_zone_of(ctg, pfn);
	/* Frames of holes and of reserved memory are not read: their metadata may not exist. */
	if (zone == NULL || !ctg_hint_load(&ctg_zone_block(zone, pfn)->released))
		return -CTG_EINVAL;
	frame = ctg_zone_frame(zone, pfn);
	if (ctg_info_state(ctg_load32_acquire(&frame->info)) != CTG_FRAME_USED)
		return -CTG_EINVAL;
	w = ctg_load64_relaxed(&frame->word);
	do {
		if (ctg_word_ref(w) == 0 || ctg_word_frozen(w))
			return -CTG_EINVAL;
	} while (!ctg_cas64_acq_rel(&frame->word, &w, w - CTG_WORD_REF1));
	holder_left(ctg, pfn, w, (w - CTG_WORD_REF1) & ~CTG_WORD_FLAGS);
	return 0;
}

bool ctg_frame_freeze(struct ctg_frame *frame, uint32_t map, uint32_t ref, uint64_t *seen)
{
	uint64_t counts = map * CTG_WORD_MAP1 + ref * CTG_WORD_REF1;
	uint64_t w = ctg_load64_relaxed(&frame->word);

	CTG_ASSERT(counts != 0);
	do {
		if ((w & ~CTG_WORD_FLAGS) != counts) {
			*seen = w;
			return false;
		}
	} while (!ctg_cas64_acq_rel(&frame->word, &w, CTG_WORD_FROZEN | (w & CTG_WORD_FLAGS)));
	return true;
}

void ctg_frame_unfreeze(struct ctg *ctg, struct ctg_frame *frame, uint64_t counts)
{
	uint64_t w = ctg_load64_relaxed(&frame->word);
	/* Without counts, ctg_frame_free wakes once the frame is free, which is what they wait for.
	 */
	uint64_t keep = counts != 0 ? CTG_WORD_DRAINING : CTG_WORD_FLAGS;

	CTG_ASSERT((counts & CTG_WORD_FLAGS) == 0);
	do {
		CTG_ASSERT(ctg_word_frozen(w));
	} while (!ctg_cas64_acq_rel(&frame->word, &w, counts | (w & keep)));
	if ((w & CTG_WORD_WAITERS) == 0)
		return;
	for (unsigned i = 0; i < ctg->nr_zones; i++) {
		const struct ctg_zone *zone = ctg->zones[i];
		uintptr_t at = (uintptr_t)frame - (uintptr_t)zone->frames;

		if (at / sizeof(*frame) < zone->nr) {
			ctg_frame_wake(ctg, zone->base + at / sizeof(*frame));
			return;
		}
	}
	CTG_ASSERT(false);
}

int ctg_frame_wait(struct ctg *ctg, ctg_pfn_t pfn, uint64_t seen, uint64_t deadline, bool killable)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);
	struct ctg_word32 *word = wait_word(ctg, pfn);
	uint32_t ticket = ctg_load32_acquire(word);
	uint64_t w = ctg_load64_relaxed(&frame->word);

	/* Nobody holds it: it is on its way to the free lists, and no event says when. */
	if ((seen & ~CTG_WORD_FLAGS) == 0) {
		ctg->port.relax(ctg->port.host);
		return 0;
	}
	do {
		if (((w ^ seen) & ~CTG_WORD_WAITERS) != 0)
			return 0;
	} while (!ctg_cas64_acq_rel(&frame->word, &w, w | CTG_WORD_WAITERS));
	return ctg->port.wait(ctg->port.host, word, ticket, deadline, killable);
}

enum ctg_obstacle_kind ctg_word_obstacle(uint64_t word, uint32_t map, uint32_t ref)
{
	if (ctg_word_frozen(word))
		return CTG_OBSTACLE_MOVING;
	if (ctg_word_pin(word) != 0)
		return CTG_OBSTACLE_PIN;
	if (ctg_word_map(word) > map)
		return CTG_OBSTACLE_MAP;
	if (ctg_word_ref(word) > ref)
		return CTG_OBSTACLE_REF;
	return CTG_OBSTACLE_NONE;
}
