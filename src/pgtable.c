/* SPDX-License-Identifier: MIT */
/*
 * The page-table tree: how an entry is found, locked, changed, split and pruned.
 *
 * A walk from the root takes no lock. It may therefore reach a table that has left the tree. Two
 * things make that harmless:
 *
 *   - whoever locks a table looks, under its lock, whether it is live and covers the address
 *     (ctg_pte_lock), and begins again if not;
 *   - whoever only reads looks at mm->recycled before and after (ctg_pte_read). A table that was
 *     pruned but not filled again still says what was true when it left the tree, which was during
 *     the walk; one that is filled again was preceded by a raise of mm->recycled.
 */
#include "pgtable.h"

/* Entries hold a table's address beside the flags, so its low eight bits must be clear. */
#define TABLE_ALIGN 256
#define ROOT_LEVEL (CTG_TABLE_LEVELS - 1)
/* The highest level that RESERVED may stand at. */
#define RESERVED_LEVEL 2

static struct ctg_table *entry_table(uint64_t entry)
{
	return (struct ctg_table *)(uintptr_t)(entry & ~CTG_PTE_TABLE);
}

static uint64_t table_entry(const struct ctg_table *table)
{
	return (uint64_t)(uintptr_t)table | CTG_PTE_TABLE;
}

static unsigned entry_index(ctg_vpn_t vpn, unsigned level)
{
	return (unsigned)(vpn >> (9 * level)) % CTG_TABLE_ENTRIES;
}

/* First page that a table of this level covers, if it covers vpn. */
static ctg_vpn_t table_base(ctg_vpn_t vpn, unsigned level)
{
	return vpn & ~(ctg_level_pages(level + 1) - 1);
}

/* ---- tables in and out of the tree ----------------------------------------------------------- */

static struct ctg_table *spare_pop(struct ctg_mm *mm)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_table *table;

	ctg_lock(port, &mm->spare_lock);
	table = mm->spare;
	if (table != NULL)
		mm->spare = table->next;
	ctg_unlock(port, &mm->spare_lock);
	return table;
}

static void spare_push(struct ctg_mm *mm, struct ctg_table *table)
{
	const struct ctg_port *port = &mm->ctg->port;

	ctg_lock(port, &mm->spare_lock);
	table->next = mm->spare;
	mm->spare = table;
	ctg_unlock(port, &mm->spare_lock);
}

struct ctg_table *ctg_table_alloc(struct ctg_mm *mm, unsigned level)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_table *table = spare_pop(mm);

	CTG_ASSERT(level < CTG_TABLE_LEVELS);
	if (table == NULL) {
		table = port->meta_alloc(port->host, sizeof(*table), TABLE_ALIGN);
		if (table != NULL)
			table->level = level;
		return table;
	}
	/* Before the first store to it: a reader that sees the store sees that too. */
	ctg_add64_acq_rel(&mm->recycled, 1);
	ctg_lock(port, &table->lock);
	CTG_ASSERT(!table->live);
	table->level = level;
	table->used = 0;
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		ctg_store64_release(&table->entry[i], 0);
	ctg_unlock(port, &table->lock);
	return table;
}

void ctg_table_free(struct ctg_mm *mm, struct ctg_table *table)
{
	if (table == NULL)
		return;
	CTG_ASSERT(!table->live);
	spare_push(mm, table);
}

static void table_release(struct ctg_mm *mm, struct ctg_table *table)
{
	const struct ctg_port *port = &mm->ctg->port;

	port->meta_free(port->host, table, sizeof(*table));
}

int ctg_pt_init(struct ctg_mm *mm)
{
	mm->root = ctg_table_alloc(mm, ROOT_LEVEL);
	if (mm->root == NULL)
		return -CTG_ENOMEM;
	mm->root->live = true;
	ctg_store64_relaxed(&mm->nr_tables, 1);
	return 0;
}

/* Everything is EMPTY and nobody else looks at the tree any more. */
void ctg_pt_destroy(struct ctg_mm *mm)
{
	struct ctg_table *table;

	ctg_pte_prune(mm, 0, CTG_MM_MAX_VPN);
	CTG_ASSERT(mm->root->used == 0);
	while ((table = spare_pop(mm)) != NULL)
		table_release(mm, table);
	table_release(mm, mm->root);
	mm->root = NULL;
}

/* ---- reading and locking --------------------------------------------------------------------- */

/*
 * Find the entry that governs vpn without a lock: where it is, what it said, at which level.
 */
static struct ctg_word64 *find_entry(
	const struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t *entry, unsigned *level)
{
	CTG_ASSERT(vpn < CTG_MM_MAX_VPN);
	for (;;) {
		uint64_t recycled = ctg_load64_acquire(&mm->recycled);
		struct ctg_table *table = mm->root;
		struct ctg_word64 *word;
		unsigned at = ROOT_LEVEL;

		for (;; at--) {
			word = &table->entry[entry_index(vpn, at)];
			*entry = ctg_load64_acquire(word);
			if ((*entry & CTG_PTE_TABLE) == 0 || at == 0)
				break;
			table = entry_table(*entry);
		}
		if (ctg_load64_acquire(&mm->recycled) != recycled)
			continue;
		CTG_ASSERT((*entry & CTG_PTE_TABLE) == 0);
		*level = at;
		return word;
	}
}

uint64_t ctg_pte_read(const struct ctg_mm *mm, ctg_vpn_t vpn, unsigned *level)
{
	uint64_t entry;

	find_entry(mm, vpn, &entry, level);
	return entry;
}

/*
 * The entry may be switched, cleared or split between the look and the mark: then there is another
 * look. Its table may even leave the tree and be filled again: then another page may be marked,
 * which claims too much but loses nothing. EMPTY and RESERVED entries are never marked.
 */
void ctg_pte_mark(struct ctg_mm *mm, ctg_vpn_t vpn, bool dirty)
{
	uint64_t marks = CTG_PTE_YOUNG | (dirty ? CTG_PTE_DIRTY : 0);
	struct ctg_word64 *word;
	uint64_t entry;
	unsigned level;

	do {
		word = find_entry(mm, vpn, &entry, &level);
		if ((entry & CTG_PTE_PRESENT) == 0 || (entry & marks) == marks)
			return;
	} while (!ctg_cas64_acq_rel(word, &entry, entry | marks));
}

/*
 * Pages that follow each other are governed by one table, as a rule, which need not be found again.
 * It may have left the tree, but only with entries that are not PRESENT, and whoever fills it again
 * raises mm->recycled first: so a PRESENT entry is in force if that is as it was.
 */
void ctg_pte_look(const struct ctg_mm *mm, ctg_vpn_t vpn, struct ctg_pte_look *look)
{
	if (look->word != NULL && look->level == 0 &&
		table_base(vpn, 0) == table_base(look->vpn, 0)) {
		struct ctg_word64 *word = look->word - entry_index(look->vpn, 0);

		word += entry_index(vpn, 0);
		look->vpn = vpn;
		look->word = word;
		look->entry = ctg_load64_acquire(word);
		if ((look->entry & CTG_PTE_PRESENT) != 0 &&
			ctg_load64_acquire(&mm->recycled) == look->recycled)
			return;
	}
	look->vpn = vpn;
	look->recycled = ctg_load64_acquire(&mm->recycled);
	look->word = find_entry(mm, vpn, &look->entry, &look->level);
}

bool ctg_pte_look_again(const struct ctg_mm *mm, const struct ctg_pte_look *look, uint64_t marks)
{
	uint64_t entry = ctg_load64_acquire(look->word);

	do {
		if (((entry ^ look->entry) & ~(CTG_PTE_YOUNG | CTG_PTE_DIRTY)) != 0)
			return false;
		if ((entry & marks) == marks)
			break;
	} while (!ctg_cas64_acq_rel(look->word, &entry, entry | marks));
	return ctg_load64_acquire(&mm->recycled) == look->recycled;
}

void ctg_pte_lock(struct ctg_mm *mm, ctg_vpn_t vpn, struct ctg_pte_ref *ref)
{
	const struct ctg_port *port = &mm->ctg->port;

	CTG_ASSERT(vpn < CTG_MM_MAX_VPN);
	for (;;) {
		struct ctg_table *table = mm->root;
		unsigned at = ROOT_LEVEL;
		uint64_t entry;

		for (; at > 0; at--) {
			entry = ctg_load64_acquire(&table->entry[entry_index(vpn, at)]);
			if ((entry & CTG_PTE_TABLE) == 0)
				break;
			table = entry_table(entry);
		}
		ctg_lock(port, &table->lock);
		if (table->live && table->level == at && table->base == table_base(vpn, at)) {
			entry = ctg_load64_relaxed(&table->entry[entry_index(vpn, at)]);
			if ((entry & CTG_PTE_TABLE) == 0) {
				*ref = (struct ctg_pte_ref){.table = table,
					.index = entry_index(vpn, at),
					.level = at,
					.entry = entry};
				return;
			}
		}
		/* It left the tree, or a table took the entry's place, since the walk. */
		ctg_unlock(port, &table->lock);
	}
}

void ctg_pte_unlock(struct ctg_mm *mm, struct ctg_pte_ref *ref)
{
	ctg_unlock(&mm->ctg->port, &ref->table->lock);
	ref->table = NULL;
}

/* Part of [vpn, end) that the entry which governs vpn at this level covers. */
static uint64_t governed(ctg_vpn_t vpn, ctg_vpn_t end, unsigned level)
{
	uint64_t left = ctg_level_pages(level) - (vpn & (ctg_level_pages(level) - 1));

	return left < end - vpn ? left : end - vpn;
}

bool ctg_pte_walk_next(struct ctg_pte_walk *walk)
{
	struct ctg_pte_ref *ref = &walk->ref;

	CTG_ASSERT(walk->end <= CTG_MM_MAX_VPN);
	walk->vpn += walk->nr;
	walk->nr = 0;
	if (walk->locked) {
		ref->index++;
		if (walk->vpn < walk->end && ref->index < CTG_TABLE_ENTRIES) {
			ref->entry = ctg_load64_relaxed(&ref->table->entry[ref->index]);
			if ((ref->entry & CTG_PTE_TABLE) == 0) {
				walk->nr = governed(walk->vpn, walk->end, ref->level);
				return true;
			}
		}
		ctg_pte_walk_stop(walk);
	}
	if (walk->vpn >= walk->end)
		return false;
	ctg_pte_lock(walk->mm, walk->vpn, ref);
	walk->locked = true;
	walk->nr = governed(walk->vpn, walk->end, ref->level);
	return true;
}

void ctg_pte_walk_stop(struct ctg_pte_walk *walk)
{
	if (walk->locked)
		ctg_pte_unlock(walk->mm, &walk->ref);
	walk->locked = false;
}

/* ---- changing -------------------------------------------------------------------------------- */

void ctg_pte_set(struct ctg_pte_ref *ref, uint64_t entry)
{
	const uint64_t marks = CTG_PTE_YOUNG | CTG_PTE_DIRTY;
	struct ctg_word64 *word = &ref->table->entry[ref->index];
	uint64_t old = ctg_load64_relaxed(word);
	uint64_t value;

	CTG_ASSERT(((entry | old) & CTG_PTE_TABLE) == 0);
	CTG_ASSERT(entry == 0 || (entry & (CTG_PTE_PRESENT | CTG_PTE_RESERVED)) != 0);
	do {
		value = entry;
		if ((entry & old & CTG_PTE_PRESENT) != 0)
			value |= old & marks & ~ref->entry;
	} while (!ctg_cas64_acq_rel(word, &old, value));
	if (old == 0 && value != 0)
		ref->table->used++;
	if (old != 0 && value == 0)
		ref->table->used--;
	ref->entry = value;
}

void ctg_pte_set_table(struct ctg_mm *mm, struct ctg_pte_ref *ref, struct ctg_table *table)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_table *parent = ref->table;
	uint64_t old, late;

	ctg_lock(port, &table->lock);
	CTG_ASSERT(!table->live && table->level + 1 == parent->level);
	table->base = parent->base + ((ctg_vpn_t)ref->index << (9 * parent->level));
	table->live = true;
	table->used = 0;
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		if (ctg_load64_relaxed(&table->entry[i]) != 0)
			table->used++;
	old = ctg_xchg64_acq_rel(&parent->entry[ref->index], table_entry(table));
	if (old == 0)
		parent->used++;
	late = old & ~ref->entry & (CTG_PTE_YOUNG | CTG_PTE_DIRTY);
	for (unsigned i = 0; late != 0 && (old & CTG_PTE_PRESENT) != 0 && i < CTG_TABLE_ENTRIES;
		i++)
		if ((ctg_load64_relaxed(&table->entry[i]) & CTG_PTE_PRESENT) != 0)
			ctg_or64_acq_rel(&table->entry[i], late);
	ctg_unlock(port, &table->lock);
	ctg_add64_relaxed(&mm->nr_tables, 1);
	ctg_pte_unlock(mm, ref);
}

/*
 * Count 511 more mappings of a large frame, one entry of which the caller has locked. -EAGAIN: a
 * migration has frozen the frame and is about to switch the entry; *seen is the word to wait on.
 */
static int count_pieces(struct ctg_frame *frame, uint64_t *seen)
{
	uint64_t word = ctg_load64_acquire(&frame->word);

	do {
		if (ctg_word_frozen(word)) {
			*seen = word;
			return -CTG_EAGAIN;
		}
		if (ctg_word_map(word) + (CTG_TABLE_ENTRIES - 1) > CTG_WORD_MAP_MAX)
			return -CTG_EOVERFLOW;
	} while (!ctg_cas64_acq_rel(
		&frame->word, &word, word + (CTG_TABLE_ENTRIES - 1) * CTG_WORD_MAP1));
	return 0;
}

/* Fill a table with the pieces of the entry that it is to replace. */
static void fill_pieces(struct ctg_table *table, uint64_t entry)
{
	uint64_t step = 0;

	/* All in the one frame, whatever its order. */
	if ((entry & CTG_PTE_PRESENT) != 0)
		step = ctg_pte(ctg_level_pages(table->level), 0);
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		ctg_store64_release(&table->entry[i], entry == 0 ? 0 : entry + i * step);
}

/* Replace the entry that governs vpn by a table, if it is above `level`. -EAGAIN: look again. */
static int split_once(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned level, struct ctg_table *table)
{
	struct ctg_pte_ref ref;
	ctg_pfn_t pfn = CTG_PFN_NONE;
	uint64_t seen = 0;
	int ret = 0;

	ctg_pte_lock(mm, vpn, &ref);
	if (ref.level <= level) {
		ctg_pte_unlock(mm, &ref);
		ctg_table_free(mm, table);
		return 0;
	}
	/* Only PRESENT entries of level 1 are split without mm->lock. */
	CTG_ASSERT(ref.level == table->level + 1);
	if ((ref.entry & CTG_PTE_PRESENT) != 0) {
		pfn = ctg_frame_head(mm->ctg, ctg_pte_pfn(ref.entry));
		ret = count_pieces(ctg_frame_of(mm->ctg, pfn), &seen);
	}
	if (ret == 0) {
		fill_pieces(table, ref.entry);
		ctg_pte_set_table(mm, &ref, table);
		return -CTG_EAGAIN;
	}
	ctg_pte_unlock(mm, &ref);
	ctg_table_free(mm, table);
	if (ret == -CTG_EAGAIN)
		ctg_frame_wait(mm->ctg, pfn, seen, CTG_NO_DEADLINE, false);
	return ret;
}

int ctg_pte_split_to(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned level)
{
	int ret;

	do {
		struct ctg_table *table;
		unsigned at;

		ctg_pte_read(mm, vpn, &at);
		if (at <= level)
			return 0;
		table = ctg_table_alloc(mm, at - 1);
		if (table == NULL)
			return -CTG_ENOMEM;
		ret = split_once(mm, vpn, level, table);
	} while (ret == -CTG_EAGAIN);
	return ret;
}

/* ---- pruning --------------------------------------------------------------------------------- */

/* What one entry could say in place of the table. Its lock is held. */
static bool table_uniform(const struct ctg_table *table, uint64_t *entry)
{
	*entry = ctg_load64_relaxed(&table->entry[0]);
	if (table->used == 0)
		return true;
	if (table->used != CTG_TABLE_ENTRIES || (*entry & CTG_PTE_RESERVED) == 0 ||
		table->level >= RESERVED_LEVEL)
		return false;
	for (unsigned i = 1; i < CTG_TABLE_ENTRIES; i++)
		if (ctg_load64_relaxed(&table->entry[i]) != *entry)
			return false;
	return true;
}

/* The table that covers vpn at this level, where there is one. mm->lock held: it stays. */
static struct ctg_table *table_at(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned level)
{
	struct ctg_table *table = mm->root;

	for (unsigned at = ROOT_LEVEL; at > level; at--) {
		uint64_t entry = ctg_load64_acquire(&table->entry[entry_index(vpn, at)]);

		CTG_ASSERT((entry & CTG_PTE_TABLE) != 0);
		table = entry_table(entry);
	}
	return table;
}

/*
 * Only the holder of mm->lock takes tables out of the tree, so parent and child stay what they are
 * until they are locked. The entries of the child are left as they are: see the top of the file.
 */
static bool prune_table(struct ctg_mm *mm, ctg_vpn_t vpn, unsigned level)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_table *parent = table_at(mm, vpn, level + 1);
	struct ctg_table *table = table_at(mm, vpn, level);
	uint64_t entry;
	bool uniform;

	ctg_lock(port, &parent->lock);
	ctg_lock(port, &table->lock);
	uniform = table_uniform(table, &entry);
	if (uniform) {
		ctg_store64_release(&parent->entry[entry_index(vpn, level + 1)], entry);
		if (entry == 0)
			parent->used--;
		table->live = false;
	}
	ctg_unlock(port, &table->lock);
	ctg_unlock(port, &parent->lock);
	if (uniform) {
		ctg_add64_relaxed(&mm->nr_tables, (uint64_t)-1);
		spare_push(mm, table);
	}
	return uniform;
}

void ctg_pte_prune(struct ctg_mm *mm, ctg_vpn_t vpn, ctg_vpn_t end)
{
	while (vpn < end) {
		unsigned level;
		ctg_vpn_t next;

		ctg_pte_read(mm, vpn, &level);
		next = vpn + (level == 0 ? governed(vpn, end, 1) : governed(vpn, end, level));
		/* A table is looked at once, after its last entry of the range. */
		while (level < ROOT_LEVEL &&
			(next == end || (next & (ctg_level_pages(level + 1) - 1)) == 0)) {
			if (!prune_table(mm, next - 1, level))
				break;
			level++;
		}
		vpn = next;
	}
}
