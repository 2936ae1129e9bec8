/* SPDX-License-Identifier: MIT */
/*
 * Families: from a frame to the address spaces that may map it.
 */
#include "pgtable.h"

static struct ctg_anon *anon_claim(struct ctg *ctg)
{
	struct ctg_anon *anon;

	ctg_lock(&ctg->port, &ctg->anons_lock);
	for (anon = ctg->anons; anon != NULL && anon->in_use; anon = anon->next)
		;
	if (anon != NULL)
		anon->in_use = true;
	ctg_unlock(&ctg->port, &ctg->anons_lock);
	return anon;
}

/* A family without members that nobody else joins. */
static struct ctg_anon *anon_new(struct ctg *ctg)
{
	const struct ctg_port *port = &ctg->port;
	struct ctg_anon *anon = anon_claim(ctg);

	if (anon != NULL)
		return anon;
	anon = port->meta_alloc(port->host, sizeof(*anon), _Alignof(struct ctg_anon));
	if (anon == NULL)
		return NULL;
	anon->in_use = true;
	ctg_lock(port, &ctg->anons_lock);
	anon->next = ctg->anons;
	ctg->anons = anon;
	ctg_unlock(port, &ctg->anons_lock);
	return anon;
}

int ctg_anon_join(struct ctg_mm *mm, struct ctg_mm *relative)
{
	struct ctg *ctg = mm->ctg;
	struct ctg_anon *anon = relative != NULL ? relative->anon : anon_new(ctg);

	if (anon == NULL)
		return -CTG_ENOMEM;
	ctg_lock(&ctg->port, &anon->lock);
	mm->anon = anon;
	mm->family_next = anon->mms;
	anon->mms = mm;
	ctg_unlock(&ctg->port, &anon->lock);
	return 0;
}

/* Nothing of the mm is mapped or in its batch. Waits for walks that are looking at it. */
void ctg_anon_leave(struct ctg_mm *mm)
{
	struct ctg *ctg = mm->ctg;
	struct ctg_anon *anon = mm->anon;
	struct ctg_mm **link;

	ctg_lock(&ctg->port, &anon->lock);
	for (link = &anon->mms; *link != mm; link = &(*link)->family_next)
		CTG_ASSERT(*link != NULL);
	*link = mm->family_next;
	if (anon->mms == NULL) {
		ctg_lock(&ctg->port, &ctg->anons_lock);
		anon->in_use = false;
		ctg_unlock(&ctg->port, &ctg->anons_lock);
	}
	ctg_unlock(&ctg->port, &anon->lock);
	mm->anon = NULL;
}

void ctg_anons_destroy(struct ctg *ctg)
{
	const struct ctg_port *port = &ctg->port;

	while (ctg->anons != NULL) {
		struct ctg_anon *anon = ctg->anons;

		CTG_ASSERT(!anon->in_use);
		ctg->anons = anon->next;
		port->meta_free(port->host, anon, sizeof(*anon));
	}
}

/*
 * The caller's reference keeps the frame from being freed, so an ANON frame's owner and index stay.
 * The family lives as long as somebody maps one of its frames: an mm leaves only after its
 * entries are gone and its batch is flushed. So if the frame is mapped, seen under the lock, the
 * lock is the right family's, and stays so until it is let go. If it is not mapped, the structure
 * may be another family's by now; then it is let go at once.
 */
struct ctg_anon *ctg_anon_lock(struct ctg *ctg, ctg_pfn_t pfn)
{
	struct ctg_frame *frame = ctg_frame_of(ctg, pfn);
	struct ctg_anon *anon;
	uint64_t word;

	/* The mapper writes the owner, then ANON with release order. */
	if (ctg_info_state(ctg_load32_acquire(&frame->info)) != CTG_FRAME_ANON)
		return NULL;
	anon = frame->anon;
	ctg_lock(&ctg->port, &anon->lock);
	word = ctg_load64_acquire(&frame->word);
	if (!ctg_word_frozen(word) && ctg_word_map(word) != 0)
		return anon;
	ctg_unlock(&ctg->port, &anon->lock);
	return NULL;
}

/*
 * Only frames of order 0, 9 and 18 are mapped. A mapped frame that is inside a larger one has no
 * head's info of its own, and a head is never inside another: the first info that says ANON
 * decides.
 */
ctg_pfn_t ctg_frame_head(struct ctg *ctg, ctg_pfn_t pfn)
{
	ctg_pfn_t head = pfn;

	for (unsigned order = 0; order <= CTG_MAX_ORDER; order += CTG_PAGEBLOCK_ORDER) {
		head &= ~(((uint64_t)1 << order) - 1);
		if (ctg_info_state(ctg_load32_acquire(&ctg_frame_of(ctg, head)->info)) ==
			CTG_FRAME_ANON)
			return head;
	}
	CTG_ASSERT(false);
	return pfn;
}

/* Entries may change meanwhile: what is marked for nothing claims too much, and loses nothing. */
static void mark_dirty_in(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_pfn_t pfn, uint64_t nr)
{
	ctg_vpn_t end = vpn + nr;

	while (vpn < end) {
		unsigned level;
		uint64_t entry = ctg_pte_read(mm, vpn, &level);
		uint64_t at = vpn & (ctg_level_pages(level) - 1);
		uint64_t left = ctg_level_pages(level) - at;

		if ((entry & CTG_PTE_PRESENT) != 0 && ctg_pte_pfn(entry) + at == pfn)
			ctg_pte_mark(mm, vpn, true);
		if (left > end - vpn)
			left = end - vpn;
		vpn += left;
		pfn += left;
	}
}

void ctg_anon_mark_dirty(struct ctg *ctg, ctg_pfn_t pfn, uint64_t nr)
{
	ctg_pfn_t head = ctg_frame_head(ctg, pfn);
	ctg_vpn_t vpn = ctg_frame_of(ctg, head)->index + (pfn - head);
	struct ctg_anon *anon = ctg_anon_lock(ctg, head);

	/* Not mapped any more: nobody is left who would ask. */
	if (anon == NULL)
		return;
	for (struct ctg_mm *mm = anon->mms; mm != NULL; mm = mm->family_next)
		mark_dirty_in(mm, vpn, pfn, nr);
	ctg_unlock(&ctg->port, &anon->lock);
}
