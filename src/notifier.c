/* SPDX-License-Identifier: MIT */
/*
 * MMU interval notifiers: who is told, and when what they read is out of date.
 *
 * An invalidation is begun, its callbacks are made, the entries change, it is ended; several may be
 * under way in one address space at a time (one under mm->lock, one under the family's). seq is
 * odd from the beginning of the first to the end of the last. While it is odd the tree does not
 * change, so it is walked without the lock and callbacks run without it; what is inserted and
 * removed meanwhile waits on a list.
 *
 * Why a client that was told nothing may use what it has read. An interval's own seq is set to the
 * odd number of the invalidation before its callback is made, and read_begin returns no number that
 * is current: it waits for the end. So a client that reads entries
 *   - before the callback: the callback takes the client's lock. Either it does so before the
 *     client does, and then read_retry, under that lock, sees the number that was set before; or
 *     after, and then the client has let go of the lock with frames in use, which the callback
 *     finds. The entries change only when the callback has returned.
 *   - after the callback and before the end: read_begin has waited, or it returned before the
 *     callback, with another number, and read_retry says so.
 *
 * The structure is made at the first insertion, under mm->lock and the family's lock: whoever holds
 * one of these from the beginning of an invalidation to its end sees the same all the time, and
 * that there is none is one load. It outlives the mm while there are intervals.
 */
#include "pgtable.h"

struct ctg_notifiers {
	struct ctg *ctg;
	struct ctg_lock lock; /* protects all below; the tree, but for readers while seq is odd */
	uint64_t refs;        /* the mm's, and one for each interval */
	uint64_t seq;
	unsigned nr_active; /* invalidations under way */
	struct ctg_mmu_interval_notifier *root;
	struct ctg_mmu_interval_notifier *deferred; /* to be inserted or removed at the end */
	struct ctg_word32 ended; /* raised whenever seq becomes even; waited on */
	uint32_t random;
};

enum state {
	STATE_OUT,
	STATE_INSERTING, /* on the deferred list, not in the tree */
	STATE_IN,
	STATE_REMOVING, /* on the deferred list, still in the tree: may be called */
};

/* ---- the tree: a treap by first page, each node knowing the last page below it --------------- */

typedef struct ctg_mmu_interval_notifier node_t;

static ctg_vpn_t last_of(const node_t *n)
{
	return n->vpn + (n->nr - 1);
}

/* Intervals that begin at one page are in the order of their addresses. */
static bool node_before(const node_t *a, const node_t *b)
{
	return a->vpn != b->vpn ? a->vpn < b->vpn : (uintptr_t)a < (uintptr_t)b;
}

static void node_update(node_t *n)
{
	n->subtree_last = last_of(n);
	for (unsigned side = 0; side < 2; side++)
		if (n->child[side] != NULL && n->child[side]->subtree_last > n->subtree_last)
			n->subtree_last = n->child[side]->subtree_last;
}

/* Make `with` (may be NULL) what `parent` has in place of n. */
static void node_replace(struct ctg_notifiers *all, node_t *parent, const node_t *n, node_t *with)
{
	if (parent == NULL)
		all->root = with;
	else
		parent->child[parent->child[1] == n] = with;
	if (with != NULL)
		with->parent = parent;
}

/* Put n in the place of its parent, which becomes its child. */
static void node_raise(struct ctg_notifiers *all, node_t *n)
{
	node_t *parent = n->parent;
	unsigned side = parent->child[1] == n;
	node_t *inner = n->child[!side];

	node_replace(all, parent->parent, parent, n);
	parent->child[side] = inner;
	if (inner != NULL)
		inner->parent = parent;
	n->child[!side] = parent;
	parent->parent = n;
	node_update(parent);
	node_update(n);
}

static uint32_t next_random(struct ctg_notifiers *all)
{
	uint32_t x = all->random;

	x ^= x << 13;
	x ^= x >> 17;
	x ^= x << 5;
	return all->random = x;
}

static void tree_insert(struct ctg_notifiers *all, node_t *n)
{
	node_t **link = &all->root, *parent = NULL;

	while (*link != NULL) {
		parent = *link;
		if (parent->subtree_last < last_of(n))
			parent->subtree_last = last_of(n);
		link = &parent->child[node_before(parent, n)];
	}
	n->child[0] = n->child[1] = NULL;
	n->parent = parent;
	n->subtree_last = last_of(n);
	n->priority = next_random(all);
	*link = n;
	while (n->parent != NULL && n->parent->priority < n->priority)
		node_raise(all, n);
}

static void tree_remove(struct ctg_notifiers *all, node_t *n)
{
	node_t *parent;

	while (n->child[0] != NULL && n->child[1] != NULL)
		node_raise(all, n->child[n->child[0]->priority < n->child[1]->priority]);
	parent = n->parent;
	node_replace(all, parent, n, n->child[0] != NULL ? n->child[0] : n->child[1]);
	for (; parent != NULL; parent = parent->parent)
		node_update(parent);
	n->child[0] = n->child[1] = n->parent = NULL;
}

/*
 * The first interval below n, in order, that has a page of [first, last]. If the left subtree
 * reaches up to `first` it decides: should nothing of it overlap, then what reaches so far begins
 * after `last`, and all that follows does.
 */
static node_t *overlap_below(node_t *n, ctg_vpn_t first, ctg_vpn_t last)
{
	while (n != NULL && n->subtree_last >= first) {
		if (n->child[0] != NULL && n->child[0]->subtree_last >= first) {
			n = n->child[0];
			continue;
		}
		if (n->vpn > last)
			return NULL;
		if (last_of(n) >= first)
			return n;
		n = n->child[1];
	}
	return NULL;
}

static node_t *overlap_next(node_t *n, ctg_vpn_t first, ctg_vpn_t last)
{
	for (;;) {
		node_t *below = n->child[1], *from;

		if (below != NULL && below->subtree_last >= first)
			return overlap_below(below, first, last);
		do {
			from = n;
			n = n->parent;
		} while (n != NULL && n->child[1] == from);
		if (n == NULL || n->vpn > last)
			return NULL;
		if (last_of(n) >= first)
			return n;
	}
}

/* ---- the deferred list: `deferred` leads on, and `parent` back for what is not in the tree ----
 */

static void defer(struct ctg_notifiers *all, node_t *n, enum state state)
{
	n->state = state;
	n->deferred = all->deferred;
	if (state == STATE_INSERTING)
		n->parent = NULL;
	if (n->deferred != NULL && n->deferred->state == STATE_INSERTING)
		n->deferred->parent = n;
	all->deferred = n;
}

/* Take back an insertion that has not happened yet. */
static void defer_cancel(struct ctg_notifiers *all, node_t *n)
{
	node_t *before = n->parent, *after = n->deferred;

	CTG_ASSERT(n->state == STATE_INSERTING);
	if (before == NULL)
		all->deferred = after;
	else
		before->deferred = after;
	if (after != NULL && after->state == STATE_INSERTING)
		after->parent = before;
	n->parent = n->deferred = NULL;
	n->state = STATE_OUT;
}

/* No invalidation is under way any more. */
static void do_deferred(struct ctg_notifiers *all)
{
	while (all->deferred != NULL) {
		node_t *n = all->deferred;

		all->deferred = n->deferred;
		n->deferred = NULL;
		if (n->state == STATE_INSERTING) {
			tree_insert(all, n);
			n->state = STATE_IN;
		} else {
			tree_remove(all, n);
			n->state = STATE_OUT;
		}
	}
}

/* ---- invalidations --------------------------------------------------------------------------- */

static void begin(struct ctg_notifiers *all)
{
	ctg_lock(&all->ctg->port, &all->lock);
	if (all->nr_active++ == 0)
		all->seq++;
	CTG_ASSERT((all->seq & 1) != 0);
	ctg_unlock(&all->ctg->port, &all->lock);
}

static void end(struct ctg_notifiers *all)
{
	const struct ctg_port *port = &all->ctg->port;
	bool over;

	ctg_lock(port, &all->lock);
	CTG_ASSERT(all->nr_active != 0 && (all->seq & 1) != 0);
	over = --all->nr_active == 0;
	if (over) {
		all->seq++;
		do_deferred(all);
		ctg_add32_acq_rel(&all->ended, 1);
	}
	ctg_unlock(port, &all->lock);
	/* The mm's reference keeps the structure. */
	if (over)
		port->wake(port->host, &all->ended, UINT32_MAX);
}

static bool tell(struct ctg_notifiers *all, const struct ctg_notify_range *range)
{
	ctg_vpn_t last = range->vpn + (range->nr - 1);
	node_t *n = overlap_below(all->root, range->vpn, last);

	for (; n != NULL; n = overlap_next(n, range->vpn, last)) {
		ctg_store64_release(&n->seq, all->seq);
		if (!n->ops->invalidate(n, range) && !range->blockable)
			return false;
	}
	return true;
}

static bool tell_all(struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_notify_event event, bool blockable)
{
	for (size_t i = 0; i < nr; i++) {
		const struct ctg_notify_range range = {.mm = mm,
			.vpn = ranges[i].vpn,
			.nr = ranges[i].nr,
			.event = event,
			.blockable = blockable};

		if (!tell(mm->notifiers, &range))
			return false;
	}
	return true;
}

int ctg_notify_start(struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_notify_event event, bool blockable)
{
	if (mm->notifiers == NULL)
		return 0;
	begin(mm->notifiers);
	if (tell_all(mm, ranges, nr, event, blockable))
		return 0;
	/* Those who were told have let go for nothing. */
	end(mm->notifiers);
	return -CTG_EAGAIN;
}

void ctg_notify_more(struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr,
	enum ctg_notify_event event)
{
	if (mm->notifiers != NULL)
		tell_all(mm, ranges, nr, event, true);
}

void ctg_notify_end(struct ctg_mm *mm)
{
	if (mm->notifiers != NULL)
		end(mm->notifiers);
}

int ctg_mm_invalidate(struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr, bool blockable)
{
	const struct ctg_vrange range = {vpn, nr};
	int ret;

	if (!ctg_mm_range_valid(mm, vpn, nr))
		return -CTG_EINVAL;
	if (blockable)
		ctg_lock(&mm->ctg->port, &mm->lock);
	else if (!ctg_trylock(&mm->lock))
		return -CTG_EAGAIN;
	ret = ctg_notify_start(mm, &range, 1, CTG_NOTIFY_RECLAIM, blockable);
	if (ret == 0)
		ctg_notify_end(mm);
	ctg_unlock(&mm->ctg->port, &mm->lock);
	return ret;
}

/* ---- insert and remove ----------------------------------------------------------------------- */

/* Drop a reference; all->lock is held, and is not afterwards. */
static void put_unlock(struct ctg_notifiers *all)
{
	const struct ctg_port *port = &all->ctg->port;
	bool last = --all->refs == 0;

	ctg_unlock(port, &all->lock);
	if (!last)
		return;
	CTG_ASSERT(all->root == NULL && all->deferred == NULL);
	port->meta_free(port->host, all, sizeof(*all));
}

void ctg_notifiers_leave(struct ctg_mm *mm)
{
	struct ctg_notifiers *all = mm->notifiers;

	if (all == NULL)
		return;
	mm->notifiers = NULL;
	ctg_lock(&all->ctg->port, &all->lock);
	CTG_ASSERT(all->nr_active == 0);
	put_unlock(all);
}

/* Under the locks of everybody who invalidates: nobody is in the middle of it. */
static int make_notifiers(struct ctg_mm *mm)
{
	const struct ctg_port *port = &mm->ctg->port;
	struct ctg_notifiers *all;
	int ret = 0;

	ctg_lock(port, &mm->lock);
	if (mm->notifiers == NULL) {
		all = port->meta_alloc(port->host, sizeof(*all), _Alignof(struct ctg_notifiers));
		if (all != NULL) {
			all->ctg = mm->ctg;
			all->refs = 1;
			all->seq = 2;
			all->random = 1;
			ctg_lock(port, &mm->anon->lock);
			ctg_pointer_publish(&mm->notifiers, all);
			ctg_unlock(port, &mm->anon->lock);
		} else {
			ret = -CTG_ENOMEM;
		}
	}
	ctg_unlock(port, &mm->lock);
	return ret;
}

int ctg_mmu_interval_notifier_insert(struct ctg_mmu_interval_notifier *n, struct ctg_mm *mm,
	ctg_vpn_t vpn, uint64_t nr, const struct ctg_mmu_interval_ops *ops)
{
	struct ctg_notifiers *all;
	int ret;

	if (n == NULL || mm == NULL || ops == NULL || ops->invalidate == NULL || nr == 0 ||
		vpn >= CTG_MM_MAX_VPN || nr > CTG_MM_MAX_VPN - vpn)
		return -CTG_EINVAL;
	/* Once it is there it stays; then a callback may insert, under whatever locks it runs. */
	if (ctg_pointer_acquire(&mm->notifiers) == NULL) {
		ret = make_notifiers(mm);
		if (ret != 0)
			return ret;
	}
	all = ctg_pointer_acquire(&mm->notifiers);
	*n = (struct ctg_mmu_interval_notifier){
		.ops = ops, .mm = mm, .vpn = vpn, .nr = nr, .notifiers = all};
	ctg_lock(&all->ctg->port, &all->lock);
	all->refs++;
	if (all->nr_active != 0) {
		/* The current number: whoever reads waits for the end. */
		ctg_store64_release(&n->seq, all->seq);
		defer(all, n, STATE_INSERTING);
	} else {
		ctg_store64_release(&n->seq, all->seq - 1);
		tree_insert(all, n);
		n->state = STATE_IN;
	}
	ctg_unlock(&all->ctg->port, &all->lock);
	return 0;
}

/* Sleep until the invalidations that are under way have ended; all->lock is dropped meanwhile. */
static void wait_for_end(struct ctg_notifiers *all)
{
	const struct ctg_port *port = &all->ctg->port;
	uint32_t ended = ctg_load32_acquire(&all->ended);

	ctg_unlock(port, &all->lock);
	port->wait(port->host, &all->ended, ended, CTG_NO_DEADLINE, false);
	ctg_lock(port, &all->lock);
}

void ctg_mmu_interval_notifier_remove(struct ctg_mmu_interval_notifier *n)
{
	struct ctg_notifiers *all;

	if (n == NULL || n->notifiers == NULL)
		return;
	all = n->notifiers;
	ctg_lock(&all->ctg->port, &all->lock);
	if (n->state == STATE_INSERTING) {
		defer_cancel(all, n);
	} else if (n->state == STATE_IN && all->nr_active == 0) {
		tree_remove(all, n);
		n->state = STATE_OUT;
	} else if (n->state == STATE_IN) {
		defer(all, n, STATE_REMOVING);
	}
	while (n->state != STATE_OUT)
		wait_for_end(all);
	n->notifiers = NULL;
	put_unlock(all);
}

/* ---- reading --------------------------------------------------------------------------------- */

uint64_t ctg_mmu_interval_read_begin(struct ctg_mmu_interval_notifier *n)
{
	struct ctg_notifiers *all = n->notifiers;
	uint64_t seq;

	ctg_lock(&all->ctg->port, &all->lock);
	seq = ctg_load64_acquire(&n->seq);
	while (seq == all->seq)
		wait_for_end(all);
	ctg_unlock(&all->ctg->port, &all->lock);
	return seq;
}

bool ctg_mmu_interval_read_retry(const struct ctg_mmu_interval_notifier *n, uint64_t seq)
{
	return ctg_load64_acquire(&n->seq) != seq;
}
