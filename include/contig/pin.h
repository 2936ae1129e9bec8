/* SPDX-License-Identifier: MIT */
/*
 * Pins: frames of an address space held for a device, and references for those who only look.
 *
 * A pin is counted exactly, one a frame for each hold, whatever the frame's order. A pinned frame is
 * never moved, never shared copy-on-write, and survives munmap and the end of its address space.
 *
 * Two forms. The array form thinks in pages: one element, and one count, a page. The handle form
 * thinks in frames, as a scatter list does: one count for each frame that the range touches,
 * a list of extents, an owner's tag and a time (the ledger; see ctg_pins_for_each).
 */
#ifndef CONTIG_PIN_H
#define CONTIG_PIN_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

enum ctg_foll {
	CTG_FOLL_WRITE = 1 << 0,    /* the holder will write: the page is made writable and dirty */
	CTG_FOLL_GET = 1 << 1,      /* implied by ctg_get_*: a plain reference */
	CTG_FOLL_PIN = 1 << 2,      /* implied by ctg_pin_*: a DMA pin */
	CTG_FOLL_LONGTERM = 1 << 3, /* may last: moved out of lendable memory first. Needs PIN */
	CTG_FOLL_NOWAIT = 1 << 4,   /* a frame that is draining or moving: -EAGAIN instead of waiting */
};

/*
 * Hold the frames of nr pages from vpn on, faulting in what is missing.
 * @pages: nr elements, the caller's; the first `return value` are filled with pfns.
 * @flags: enum ctg_foll. GET and PIN exclude each other and the name of the function; LONGTERM
 * needs PIN; anything else is -EINVAL.
 * Ownership: each element is one count, dropped by ctg_put_user_pages or ctg_unpin_user_pages.
 * Context: may sleep (killable); no lock held.
 * Returns the number of pages held: fewer than nr when a later one failed (LONGTERM: nothing
 * or all). When not even the first could be held: -EINVAL (nr 0, NULL, wrapping, beyond
 * CTG_MM_MAX_VPN, flags), -EFAULT (not mapped, or the rights forbid it), -ENOMEM, -EAGAIN,
 * -EOVERFLOW (the frame's counter is full: nothing changed), -EBUSY (LONGTERM: it could not be moved
 * out of lendable memory because of another holder), -EINTR, the group's error.
 */
int64_t ctg_get_user_pages(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages);
int64_t ctg_pin_user_pages(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages);

/*
 * The same without locks as far as it goes: for each page read the entry, take the count with one
 * atomic, read the entry again; the rest by the slow form. LONGTERM is checked on the way.
 */
int64_t ctg_get_user_pages_fast(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages);
int64_t ctg_pin_user_pages_fast(
	struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, ctg_pfn_t *pages);

/*
 * Drop one count of each element. Unpinning what is not pinned is detected: that element is left
 * alone, the others are done. `dirty`: the holder wrote; marked once a call.
 * Context: any that may take short locks. Returns 0, or -EINVAL (NULL, 0, or some element had no
 * such count; counts are unharmed).
 */
int ctg_put_user_pages(struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr);
int ctg_unpin_user_pages(struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr);
int ctg_unpin_user_pages_dirty_lock(
	struct ctg *ctg, const ctg_pfn_t *pages, uint64_t nr, bool dirty);

/* A pin of a range, with an owner. */
struct ctg_pin;

/*
 * Pin the range as ctg_pin_user_pages does, all or nothing.
 * @owner: a tag for reports (a driver's or program's name); copied, at most 31 bytes are kept.
 * Ownership: the handle is the caller's until ctg_pin_release. It outlives the mm.
 * Returns 0 or the errors above.
 */
int ctg_pin_range(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, const char *owner,
	struct ctg_pin **out);
/* Consecutive frames of the range, in its order. They stay valid until the release. */
const struct ctg_extent *ctg_pin_extents(const struct ctg_pin *pin, size_t *nr);
void ctg_pin_release(struct ctg_pin *pin, bool dirty);

/* One entry of the ledger. */
struct ctg_pin_info {
	const char *owner;
	uint64_t since;      /* ns of the port's clock */
	uint64_t nr_pages;
	bool longterm, write;
	bool orphan;         /* its mm has ended */
	const struct ctg_extent *extents;
	size_t nr_extents;
};
/*
 * Call fn for every handle, oldest first, until it returns non-zero; returns that, or 0. The
 * ledger is locked meanwhile: fn may not pin or release.
 */
int ctg_pins_for_each(
	struct ctg *ctg, int (*fn)(const struct ctg_pin_info *info, void *arg), void *arg);

/* Pins that the mm holds now, exactly: one a count on a frame. 0 means fork takes the fast path. */
uint64_t ctg_mm_nr_pins(const struct ctg_mm *mm);

#ifdef __cplusplus
}
#endif
#endif
