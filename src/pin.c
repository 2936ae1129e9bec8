/* SPDX-License-Identifier: MIT */
/*
 * Accounts of pins, one an address space, and the ledger: pins of ranges, with an owner and a time.
 */
#include "gup.h"

/* ---- accounts -------------------------------------------------------------------------------- */

#define NR_ACCOUNTS (CTG_PIN_CHUNK * CTG_PIN_CHUNKS)
_Static_assert(NR_ACCOUNTS - 1 <= UINT16_MAX, "an index fits the frame");

static void *chunk_alloc(struct ctg *ctg)
{
	return ctg->port.meta_alloc(ctg->port.host, CTG_PIN_CHUNK * sizeof(struct ctg_pin_account),
		_Alignof(struct ctg_pin_account));
}

static void chunk_free(struct ctg *ctg, struct ctg_pin_account *chunk)
{
	ctg->port.meta_free(ctg->port.host, chunk, CTG_PIN_CHUNK * sizeof(struct ctg_pin_account));
}

int ctg_pins_init(struct ctg *ctg)
{
	ctg->pins.accounts[0] = chunk_alloc(ctg);
	ctg->pins.nr_accounts = CTG_ACCOUNT_SHARED + 1;
	return ctg->pins.accounts[0] == NULL ? -CTG_ENOMEM : 0;
}

static struct ctg_pin_account *account_at(struct ctg *ctg, uint16_t index)
{
	struct ctg_pin_account *chunk =
		ctg_pointer_acquire(&ctg->pins.accounts[index / CTG_PIN_CHUNK]);

	return &chunk[index % CTG_PIN_CHUNK];
}

/* pins.lock held. 0: all that the chunks have room for are in use. */
static uint16_t account_claim(struct ctg *ctg)
{
	struct ctg_pins *pins = &ctg->pins;
	uint16_t index = pins->free_account;

	if (index != 0) {
		pins->free_account = account_at(ctg, index)->next_free;
	} else if (pins->nr_accounts < NR_ACCOUNTS &&
		   pins->accounts[pins->nr_accounts / CTG_PIN_CHUNK] != NULL) {
		index = (uint16_t)pins->nr_accounts++;
	} else {
		return 0;
	}
	ctg_store64_release(&account_at(ctg, index)->pins, 0);
	return index;
}

static void account_free(struct ctg *ctg, uint16_t index)
{
	struct ctg_pins *pins = &ctg->pins;

	ctg_lock(&ctg->port, &pins->lock);
	account_at(ctg, index)->next_free = pins->free_account;
	pins->free_account = index;
	ctg_unlock(&ctg->port, &pins->lock);
}

int ctg_pin_account_of(struct ctg_mm *mm, uint16_t *index)
{
	struct ctg *ctg = mm->ctg;
	struct ctg_pins *pins = &ctg->pins;
	struct ctg_pin_account *chunk = NULL;
	bool full;

	for (;;) {
		*index = ctg_load16_acquire(&mm->pin_account);
		if (*index != 0)
			break;
		ctg_lock(&ctg->port, &pins->lock);
		full = pins->nr_accounts == NR_ACCOUNTS;
		if (chunk != NULL && !full &&
			pins->accounts[pins->nr_accounts / CTG_PIN_CHUNK] == NULL) {
			ctg_pointer_publish(
				&pins->accounts[pins->nr_accounts / CTG_PIN_CHUNK], chunk);
			chunk = NULL;
		}
		if (ctg_load16_relaxed(&mm->pin_account) == 0)
			ctg_store16_release(&mm->pin_account, account_claim(ctg));
		*index = ctg_load16_relaxed(&mm->pin_account);
		ctg_unlock(&ctg->port, &pins->lock);
		if (*index != 0 || full)
			break;
		if (chunk == NULL)
			chunk = chunk_alloc(ctg);
		if (chunk == NULL)
			break;
	}
	if (chunk != NULL)
		chunk_free(ctg, chunk);
	return *index == 0 ? -CTG_ENOMEM : 0;
}

void ctg_pin_account_add(struct ctg *ctg, uint16_t index, uint64_t nr)
{
	ctg_add64_acq_rel(&account_at(ctg, index)->pins, nr);
}

/* Who unpins what another has pinned may take that one's share: never more than there is. */
void ctg_pin_account_sub(struct ctg *ctg, uint16_t index, uint64_t nr)
{
	struct ctg_pin_account *account = account_at(ctg, index);
	uint64_t old = ctg_load64_relaxed(&account->pins), left;

	do {
		uint64_t has = old & ~CTG_ACCOUNT_ORPHAN;

		if (has == 0)
			return;
		left = old - (nr < has ? nr : has);
	} while (!ctg_cas64_acq_rel(&account->pins, &old, left));
	if (left == CTG_ACCOUNT_ORPHAN)
		account_free(ctg, index);
}

uint64_t ctg_mm_nr_pins(const struct ctg_mm *mm)
{
	uint16_t index;

	if (mm == NULL)
		return 0;
	index = ctg_load16_acquire(&mm->pin_account);
	if (index == 0)
		return 0;
	return ctg_load64_acquire(&account_at(mm->ctg, index)->pins);
}

/* ---- the ledger ------------------------------------------------------------------------------ */

#define OWNER_BYTES CTG_PIN_OWNER_MAX

struct ctg_pin {
	struct ctg_pin *next, *prev; /* the ledger, by age; pins.lock */
	struct ctg *ctg;
	struct ctg_mm *mm; /* NULL: it has ended; pins.lock */
	uint64_t since, nr_pages;
	unsigned flags;
	char owner[OWNER_BYTES];
	uint32_t nr_extents, max_extents;
	struct ctg_extent *extents; /* one, or memory of its own */
	struct ctg_extent one;
};

static void ledger_add(struct ctg_pin *pin)
{
	struct ctg_pins *pins = &pin->ctg->pins;
	const struct ctg_port *port = &pin->ctg->port;

	ctg_lock(port, &pins->lock);
	/* Under the lock: the ledger is in the order of these times. */
	pin->since = port->now(port->host);
	pin->mm->nr_pin_handles++;
	pin->prev = pins->newest;
	if (pin->prev != NULL)
		pin->prev->next = pin;
	else
		pins->oldest = pin;
	pins->newest = pin;
	ctg_unlock(port, &pins->lock);
}

static void ledger_remove(struct ctg_pin *pin)
{
	struct ctg_pins *pins = &pin->ctg->pins;

	ctg_lock(&pin->ctg->port, &pins->lock);
	if (pin->mm != NULL)
		pin->mm->nr_pin_handles--;
	if (pin->prev != NULL)
		pin->prev->next = pin->next;
	else
		pins->oldest = pin->next;
	if (pin->next != NULL)
		pin->next->prev = pin->prev;
	else
		pins->newest = pin->prev;
	ctg_unlock(&pin->ctg->port, &pins->lock);
}

int ctg_pins_for_each(
	struct ctg *ctg, int (*fn)(const struct ctg_pin_info *info, void *arg), void *arg)
{
	int ret = 0;

	if (ctg == NULL || fn == NULL)
		return -CTG_EINVAL;
	ctg_lock(&ctg->port, &ctg->pins.lock);
	for (const struct ctg_pin *pin = ctg->pins.oldest; ret == 0 && pin != NULL;
		pin = pin->next) {
		const struct ctg_pin_info info = {.owner = pin->owner,
			.since = pin->since,
			.nr_pages = pin->nr_pages,
			.longterm = (pin->flags & CTG_FOLL_LONGTERM) != 0,
			.write = (pin->flags & CTG_FOLL_WRITE) != 0,
			.orphan = pin->mm == NULL,
			.extents = pin->extents,
			.nr_extents = pin->nr_extents};

		ret = fn(&info, arg);
	}
	ctg_unlock(&ctg->port, &ctg->pins.lock);
	return ret;
}

struct who {
	struct ctg_alloc_report *report;
	struct ctg_extent frame; /* all of it: the pin may be of another part */
};

static int name_owner(const struct ctg_pin_info *info, void *arg)
{
	const struct who *who = arg;

	for (size_t i = 0; i < info->nr_extents; i++) {
		const struct ctg_extent *e = &info->extents[i];

		if (e->pfn >= who->frame.pfn + who->frame.nr || e->pfn + e->nr <= who->frame.pfn)
			continue;
		for (unsigned at = 0; at < OWNER_BYTES; at++)
			who->report->obstacle_owner[at] = info->owner[at];
		who->report->obstacle_since = info->since;
		return 1;
	}
	return 0;
}

void ctg_pins_name(struct ctg *ctg, struct ctg_alloc_report *report)
{
	struct who who = {.report = report};
	unsigned order = 0;

	report->obstacle_owner[0] = '\0';
	report->obstacle_since = 0;
	if (report->obstacle != CTG_OBSTACLE_PIN)
		return;
	who.frame.pfn = ctg_hold_head(ctg, report->obstacle_pfn, &order);
	if (who.frame.pfn == CTG_PFN_NONE) /* it has gone since */
		return;
	who.frame.nr = (uint64_t)1 << order;
	ctg_pins_for_each(ctg, name_owner, &who);
}

/* ---- the end of address spaces and machines -------------------------------------------------- */

void ctg_pins_leave(struct ctg_mm *mm)
{
	struct ctg *ctg = mm->ctg;
	struct ctg_pins *pins = &ctg->pins;
	uint16_t index = ctg_load16_acquire(&mm->pin_account);

	if (index == 0)
		return;
	ctg_lock(&ctg->port, &pins->lock);
	for (struct ctg_pin *pin = pins->oldest; pin != NULL && mm->nr_pin_handles != 0;
		pin = pin->next)
		if (pin->mm == mm) {
			pin->mm = NULL;
			mm->nr_pin_handles--;
		}
	CTG_ASSERT(mm->nr_pin_handles == 0);
	ctg_unlock(&ctg->port, &pins->lock);
	ctg_store16_release(&mm->pin_account, 0);
	/* Whoever sees the flag and no pins frees the account: us, or the last to unpin. */
	if (ctg_or64_acq_rel(&account_at(ctg, index)->pins, CTG_ACCOUNT_ORPHAN) == 0)
		account_free(ctg, index);
}

static void pin_free(struct ctg_pin *pin)
{
	const struct ctg_port *port = &pin->ctg->port;

	if (pin->extents != &pin->one)
		port->meta_free(port->host, pin->extents, pin->max_extents * sizeof(*pin->extents));
	port->meta_free(port->host, pin, sizeof(*pin));
}

void ctg_pins_destroy(struct ctg *ctg)
{
	while (ctg->pins.oldest != NULL) {
		struct ctg_pin *pin = ctg->pins.oldest;

		ctg->pins.oldest = pin->next;
		pin_free(pin);
	}
	for (unsigned i = 0; i < CTG_PIN_CHUNKS && ctg->pins.accounts[i] != NULL; i++)
		chunk_free(ctg, ctg->pins.accounts[i]);
}

/* ---- handles --------------------------------------------------------------------------------- */

/* Room for one more extent. 0 or -ENOMEM. */
static int extents_reserve(struct ctg_pin *pin)
{
	const struct ctg_port *port = &pin->ctg->port;
	uint32_t max = pin->max_extents * 2;
	struct ctg_extent *more;

	if (pin->nr_extents < pin->max_extents)
		return 0;
	if (max < 8)
		max = 8;
	if (max < pin->max_extents)
		return -CTG_ENOMEM;
	more = port->meta_alloc(port->host, max * sizeof(*more), _Alignof(struct ctg_extent));
	if (more == NULL)
		return -CTG_ENOMEM;
	for (uint32_t i = 0; i < pin->nr_extents; i++)
		more[i] = pin->extents[i];
	if (pin->extents != &pin->one)
		port->meta_free(port->host, pin->extents, pin->max_extents * sizeof(*pin->extents));
	pin->extents = more;
	pin->max_extents = max;
	return 0;
}

static void extents_add(struct ctg_pin *pin, struct ctg_extent run)
{
	struct ctg_extent *last = &pin->extents[pin->nr_extents - 1];

	if (pin->nr_extents != 0 && last->pfn + last->nr == run.pfn)
		last->nr += run.nr;
	else
		pin->extents[pin->nr_extents++] = run;
	pin->nr_pages += run.nr;
}

/*
 * Drop the counts of a handle: one for each frame of each extent. That is what was taken, since a
 * run of pages that follow each other in one frame is counted once and lies in one extent.
 */
static void drop_extents(struct ctg_pin *pin, bool dirty)
{
	struct ctg_drop drop = {.ctg = pin->ctg, .one = CTG_WORD_PIN1};

	for (uint32_t i = 0; i < pin->nr_extents; i++) {
		ctg_pfn_t pfn = pin->extents[i].pfn, end = pfn + pin->extents[i].nr;

		while (pfn < end) {
			unsigned order;
			ctg_pfn_t head = ctg_hold_head(pin->ctg, pfn, &order);
			ctg_pfn_t past = head + ((uint64_t)1 << order);
			uint32_t dropped;

			/* It is pinned, by us: so it is still what it was. */
			CTG_ASSERT(head != CTG_PFN_NONE);
			if (past > end)
				past = end;
			if (dirty)
				ctg_hold_mark_dirty(pin->ctg, pfn, past - pfn);
			dropped = ctg_drop_some(&drop, head, 1);
			CTG_ASSERT(dropped == 1);
			(void)dropped;
			pfn = past;
		}
	}
	ctg_drop_end(&drop);
	pin->nr_extents = 0;
}

static int pin_pages(struct ctg_pin *pin, struct ctg_hold *hold, ctg_vpn_t vpn, uint64_t nr)
{
	uint64_t done = 0;
	int ret = 0;

	while (ret == 0 && done < nr) {
		struct ctg_extent run;

		/* First the room, so that there is nothing to undo for want of it. */
		ret = extents_reserve(pin);
		if (ret == 0)
			ret = ctg_hold_some(hold, vpn + done, nr - done, &run);
		if (ret == 0) {
			extents_add(pin, run);
			done += run.nr;
		}
	}
	ctg_hold_end(hold);
	if (ret != 0)
		drop_extents(pin, false);
	return ret;
}

int ctg_pin_range(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, unsigned flags, const char *owner,
	struct ctg_pin **out)
{
	const struct ctg_port *port;
	struct ctg_hold hold;
	struct ctg_pin *pin;
	int ret;

	if (owner == NULL || out == NULL)
		return -CTG_EINVAL;
	ret = ctg_hold_begin(&hold, mm, vpn, nr, flags, CTG_FOLL_PIN);
	if (ret != 0)
		return ret;
	hold.fast = true;
	hold.per_frame = true;
	port = &mm->ctg->port;
	pin = port->meta_alloc(port->host, sizeof(*pin), _Alignof(struct ctg_pin));
	if (pin == NULL)
		return -CTG_ENOMEM;
	pin->ctg = mm->ctg;
	pin->mm = mm;
	pin->flags = flags;
	pin->extents = &pin->one;
	pin->max_extents = 1;
	for (unsigned i = 0; i < OWNER_BYTES - 1 && owner[i] != '\0'; i++)
		pin->owner[i] = owner[i];
	ret = pin_pages(pin, &hold, vpn, nr);
	if (ret != 0) {
		pin_free(pin);
		return ret;
	}
	ledger_add(pin);
	*out = pin;
	return 0;
}

const struct ctg_extent *ctg_pin_extents(const struct ctg_pin *pin, size_t *nr)
{
	if (nr != NULL)
		*nr = pin == NULL ? 0 : pin->nr_extents;
	return pin == NULL ? NULL : pin->extents;
}

void ctg_pin_release(struct ctg_pin *pin, bool dirty)
{
	if (pin == NULL)
		return;
	/* The ledger goes first: who looks at it may find frames that are held, never the reverse.
	 */
	ledger_remove(pin);
	drop_extents(pin, dirty);
	pin_free(pin);
}
