/* SPDX-License-Identifier: MIT */
/* Interval notifiers: who is told, when, of what, and what a reader may believe. */
#include "moving.h"

#include <pthread.h>
#include <sched.h>

#define MAX_CALLS 32

/* A client that keeps a log. */
struct client {
	struct ctg_mmu_interval_notifier n;
	unsigned nr_calls;
	struct ctg_notify_range call[MAX_CALLS];
	struct ctg_mapping seen[MAX_CALLS]; /* what its first page was during the call */
	bool refuses;                       /* when it may not block */
	void (*act)(struct client *);       /* during a call */
	struct client *other;
	uint64_t result;
	pthread_t thread;
	struct ctg_word32 done; /* what the thread has come to */
};

static bool client_invalidate(
	struct ctg_mmu_interval_notifier *n, const struct ctg_notify_range *range)
{
	struct client *c = (struct client *)(void *)n;

	assert_in_range(c->nr_calls, 0, MAX_CALLS - 1);
	c->call[c->nr_calls] = *range;
	if (range->event != CTG_NOTIFY_EXIT)
		c->seen[c->nr_calls] = lookup(n->mm, n->vpn, 1);
	c->nr_calls++;
	if (c->act != NULL)
		c->act(c);
	return !c->refuses || range->blockable;
}

static const struct ctg_mmu_interval_ops client_ops = {.invalidate = client_invalidate};

static void client_on(struct client *c, struct ctg_mm *mm, ctg_vpn_t vpn, uint64_t nr)
{
	memset(c, 0, sizeof(*c));
	assert_int_equal(ctg_mmu_interval_notifier_insert(&c->n, mm, vpn, nr, &client_ops), 0);
}

static void client_off(struct client *c)
{
	ctg_mmu_interval_notifier_remove(&c->n);
}

static void expect_call(
	const struct client *c, unsigned i, ctg_vpn_t vpn, uint64_t nr, enum ctg_notify_event event)
{
	assert_in_range(i, 0, c->nr_calls - 1);
	assert_ptr_equal(c->call[i].mm, c->n.mm);
	assert_int_equal(c->call[i].vpn, vpn);
	assert_int_equal(c->call[i].nr, nr);
	assert_int_equal(c->call[i].event, event);
}

static struct world w;
static struct ctg_mm *mm;

static int open_world(void **state)
{
	struct ctg_mm *second;

	(void)state;
	world_open(&w, 8);
	/* Two families at a time. */
	mm = space_new(&w, 0);
	second = space_new(&w, 0);
	ctg_mm_destroy(second, false);
	ctg_mm_destroy(mm, false);
	w.meta_bytes = ctg_sim_meta_bytes(w.sim);
	mm = space_new(&w, 0);
	return 0;
}

static int close_world(void **state)
{
	(void)state;
	ctg_mm_destroy(mm, false);
	world_close(&w);
	return 0;
}

/* ---- who is told ------------------------------------------------------------------------- */

static void test_bad_input(void **state)
{
	static const struct ctg_mmu_interval_ops none = {0};
	struct ctg_mmu_interval_notifier n = {0};
	static const struct {
		ctg_vpn_t vpn;
		uint64_t nr;
	} bad[] = {{BASE, 0}, {CTG_MM_MAX_VPN, 1}, {CTG_MM_MAX_VPN - 1, 2}, {BASE, UINT64_MAX},
		{UINT64_MAX, 2}};

	(void)state;
	assert_int_equal(
		ctg_mmu_interval_notifier_insert(NULL, mm, BASE, 1, &client_ops), -CTG_EINVAL);
	assert_int_equal(
		ctg_mmu_interval_notifier_insert(&n, NULL, BASE, 1, &client_ops), -CTG_EINVAL);
	assert_int_equal(ctg_mmu_interval_notifier_insert(&n, mm, BASE, 1, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_mmu_interval_notifier_insert(&n, mm, BASE, 1, &none), -CTG_EINVAL);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(ctg_mmu_interval_notifier_insert(
					 &n, mm, bad[i].vpn, bad[i].nr, &client_ops),
			-CTG_EINVAL);
		assert_int_equal(ctg_mm_invalidate(mm, bad[i].vpn, bad[i].nr, true), -CTG_EINVAL);
		assert_int_equal(
			ctg_madvise_dontneed_nonblock(mm, bad[i].vpn, bad[i].nr), -CTG_EINVAL);
	}
	assert_int_equal(ctg_mm_invalidate(NULL, BASE, 1, true), -CTG_EINVAL);
	assert_int_equal(ctg_madvise_dontneed_nonblock(NULL, BASE, 1), -CTG_EINVAL);
	/* What was never inserted is not removed. */
	ctg_mmu_interval_notifier_remove(&n);
	ctg_mmu_interval_notifier_remove(NULL);
	assert_null(mm->notifiers);
}

static void test_no_memory(void **state)
{
	struct client c = {0};

	(void)state;
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(
		ctg_mmu_interval_notifier_insert(&c.n, mm, BASE, 1, &client_ops), -CTG_ENOMEM);
	assert_null(mm->notifiers);
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 1, true), 0);
	client_on(&c, mm, BASE, 1);
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 1, true), 0);
	assert_int_equal(c.nr_calls, 1);
	client_off(&c);
	/* Only the first needs memory. */
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 1);
	client_on(&c, mm, BASE, 1);
	client_off(&c);
	client_off(&c);
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0);
}

/* Exactly those that overlap, before the entries change, and with the whole range. */
static void test_unmap(void **state)
{
	struct client left, right, in, around, at_edge;

	(void)state;
	mapped(mm, BASE, 64, RW);
	client_on(&left, mm, BASE, 10);
	client_on(&at_edge, mm, BASE + 5, 6);
	client_on(&in, mm, BASE + 12, 1);
	client_on(&around, mm, 0, CTG_MM_MAX_VPN);
	client_on(&right, mm, BASE + 20, 10);
	assert_int_equal(ctg_munmap(mm, BASE + 10, 10), 0);
	assert_int_equal(left.nr_calls, 0);
	assert_int_equal(right.nr_calls, 0);
	assert_int_equal(at_edge.nr_calls, 1);
	assert_int_equal(in.nr_calls, 1);
	assert_int_equal(around.nr_calls, 1);
	expect_call(&in, 0, BASE + 10, 10, CTG_NOTIFY_UNMAP);
	expect_call(&at_edge, 0, BASE + 10, 10, CTG_NOTIFY_UNMAP);
	assert_true(in.call[0].blockable);
	assert_true(in.seen[0].pfn != CTG_PFN_NONE);
	assert_int_equal(lookup(mm, BASE + 12, 1).pfn, CTG_PFN_NONE);
	assert_int_equal(ctg_madvise_dontneed(mm, BASE + 29, 1), 0);
	assert_int_equal(right.nr_calls, 1);
	expect_call(&right, 0, BASE + 29, 1, CTG_NOTIFY_UNMAP);
	/* Mapping and filling changes nothing that anybody could have read. */
	assert_int_equal(ctg_mmap(mm, BASE + 10, 10, RW), 0);
	assert_int_equal(ctg_mm_populate(mm, BASE, 64, NULL), 0);
	assert_int_equal(in.nr_calls, 1);
	assert_int_equal(ctg_munmap(mm, BASE + 9, 1), 0);
	assert_int_equal(left.nr_calls, 1);
	client_off(&left);
	client_off(&right);
	client_off(&in);
	client_off(&around);
	client_off(&at_edge);
	assert_int_equal(ctg_munmap(mm, BASE, 64), 0);
	assert_int_equal(left.nr_calls + in.nr_calls + right.nr_calls, 3);
}

/* Nobody is told of an unmapping that does not come about. */
static void test_unmap_fails(void **state)
{
	struct client c;

	(void)state;
	mapped(mm, BASE, PAGES, RW);
	client_on(&c, mm, BASE, PAGES);
	ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 1);
	assert_int_equal(ctg_munmap(mm, BASE + 1, 1), -CTG_ENOMEM);
	assert_int_equal(c.nr_calls, 0);
	client_off(&c);
}

static void test_protect(void **state)
{
	struct client c;

	(void)state;
	mapped(mm, BASE, 8, RW);
	client_on(&c, mm, BASE, 8);
	assert_int_equal(ctg_mprotect(mm, BASE + 2, 2, RW), 0);
	assert_int_equal(c.nr_calls, 0);
	assert_int_equal(ctg_mprotect(mm, BASE, 8, CTG_PROT_READ), 0);
	assert_int_equal(c.nr_calls, 1);
	expect_call(&c, 0, BASE, 8, CTG_NOTIFY_PROTECT);
	assert_int_equal(c.seen[0].prot, RW);
	assert_int_equal(ctg_mprotect(mm, BASE, 8, RW), 0);
	assert_int_equal(c.nr_calls, 1);
	/* Rights that were there for a moment are taken away again. */
	assert_int_equal(ctg_mprotect(mm, BASE, 8, CTG_PROT_READ), 0);
	ctg_sim_fail(w.sim, CTG_SIM_INSTALL, 1);
	assert_int_equal(ctg_mprotect(mm, BASE, 8, RW), -CTG_ENOMEM);
	assert_int_equal(c.nr_calls, 3);
	assert_int_equal(c.seen[2].prot, RW);
	assert_int_equal(lookup(mm, BASE, 1).prot, CTG_PROT_READ);
	client_off(&c);
}

static void test_fill_undone(void **state)
{
	struct client c;

	(void)state;
	assert_int_equal(ctg_mmap(mm, BASE, 4, RW), 0);
	client_on(&c, mm, BASE + 1, 1);
	ctg_sim_fail(w.sim, CTG_SIM_INSTALL, 1);
	assert_int_equal(ctg_mm_populate(mm, BASE, 4, NULL), -CTG_ENOMEM);
	assert_int_equal(c.nr_calls, 1);
	expect_call(&c, 0, BASE, 4, CTG_NOTIFY_UNMAP);
	assert_true(c.seen[0].pfn != CTG_PFN_NONE);
	client_off(&c);
}

/* Small and large, of the space that has the frames and of no other. */
static void test_migrate(void **state)
{
	struct client small, large, beside, stranger;
	struct ctg_mm *second = space_new(&w, 0);
	ctg_pfn_t pfn, to;

	(void)state;
	map_small(&w, mm, BASE, 20);
	pfn = map_large(&w, mm, BASE + PAGES);
	client_on(&small, mm, BASE + 3, 1);
	client_on(&large, mm, BASE + PAGES + 77, 1);
	client_on(&beside, mm, BASE + 20, 1);
	client_on(&stranger, second, BASE, PAGES * 2);
	assert_int_equal(evacuate_block(&w, pfn_of(mm, BASE)), 20);
	assert_int_equal(small.nr_calls, 1);
	assert_int_equal(small.call[0].event, CTG_NOTIFY_MIGRATE);
	assert_int_equal(small.call[0].vpn, BASE);
	assert_int_equal(small.call[0].nr, 20);
	assert_false(small.seen[0].moving);
	assert_int_not_equal(small.seen[0].pfn, pfn_of(mm, BASE + 3));
	assert_int_equal(large.nr_calls, 0);
	assert_int_equal(evacuate_block(&w, pfn), PAGES);
	to = pfn_of(mm, BASE + PAGES);
	assert_int_equal(large.nr_calls, 1);
	expect_call(&large, 0, BASE + PAGES, PAGES, CTG_NOTIFY_MIGRATE);
	assert_int_equal(large.seen[0].pfn, pfn + 77);
	assert_int_not_equal(to, pfn);
	assert_int_equal(beside.nr_calls, 0);
	assert_int_equal(stranger.nr_calls, 0);
	check_stamp(&w, mm, BASE, 20);
	client_off(&small);
	client_off(&large);
	client_off(&beside);
	client_off(&stranger);
	ctg_mm_destroy(second, false);
}

/* It begins and ends also when it fails, and then readers go on. */
static void test_migrate_fails(void **state)
{
	static const enum ctg_sim_hook hooks[] = {CTG_SIM_RESTRICT, CTG_SIM_COPY, CTG_SIM_INSTALL};
	struct ctg_migrate_stats stats;
	struct client c;

	(void)state;
	map_small(&w, mm, BASE, 4);
	client_on(&c, mm, BASE, 1);
	for (unsigned i = 0; i < 3; i++) {
		uint64_t seq = ctg_mmu_interval_read_begin(&c.n);

		ctg_sim_fail(w.sim, hooks[i], 1);
		assert_int_not_equal(
			evacuate(&w, pfn_of(mm, BASE) & ~(PAGES - 1), PAGES, 1, NULL, &stats), 0);
		assert_int_equal(c.nr_calls, i + 1);
		assert_true(ctg_mmu_interval_read_retry(&c.n, seq));
		seq = ctg_mmu_interval_read_begin(&c.n);
		assert_false(ctg_mmu_interval_read_retry(&c.n, seq));
	}
	client_off(&c);
}

static struct ctg_mm *fork_of(struct ctg_mm *parent)
{
	struct ctg_mm_config config = {.owner = &w};
	struct ctg_mm *child = NULL;

	assert_int_equal(ctg_mm_fork(parent, &config, &child), 0);
	return child;
}

/* A fork tells of what was writable, once; a copy of the page that has another frame from then. */
static void test_fork(void **state)
{
	struct client rw, ro, sparse, own;
	struct ctg_mm *child, *second;
	ctg_pfn_t pfn;

	(void)state;
	map_small(&w, mm, BASE, 8);
	assert_int_equal(ctg_mprotect(mm, BASE + 4, 4, CTG_PROT_READ), 0);
	/* More ranges than are told at a time. */
	for (unsigned i = 0; i < 100; i++)
		mapped(mm, BASE + PAGES + 2 * i, 1, RW);
	client_on(&rw, mm, BASE + 3, 1);
	client_on(&ro, mm, BASE + 4, 4);
	client_on(&sparse, mm, BASE + PAGES + 198, 1);
	child = fork_of(mm);
	assert_int_equal(rw.nr_calls, 1);
	expect_call(&rw, 0, BASE, 4, CTG_NOTIFY_FORK);
	assert_int_equal(rw.seen[0].prot, RW);
	assert_int_equal(lookup(mm, BASE + 3, 1).prot, CTG_PROT_READ);
	assert_int_equal(ro.nr_calls, 0);
	assert_int_equal(sparse.nr_calls, 1);
	ctg_mmu_interval_read_begin(&rw.n);
	/* Copy-on-write already: nothing changes for the parent. */
	second = fork_of(mm);
	assert_int_equal(rw.nr_calls, 1);
	ctg_mm_destroy(second, false);
	client_on(&own, child, BASE, 8);
	pfn = pfn_of(mm, BASE + 3);
	put_byte(&w, mm, BASE + 3, 1);
	assert_int_equal(rw.nr_calls, 2);
	expect_call(&rw, 1, BASE + 3, 1, CTG_NOTIFY_COPY);
	assert_int_equal(rw.seen[1].pfn, pfn);
	assert_int_not_equal(pfn_of(mm, BASE + 3), pfn);
	/* The child is the last who has it: it keeps the frame and may write. */
	put_byte(&w, child, BASE + 3, 2);
	assert_int_equal(own.nr_calls, 0);
	assert_int_equal(pfn_of(child, BASE + 3), pfn);
	/* Both have the other pages. */
	assert_int_not_equal(evacuate_block(&w, pfn_of(mm, BASE)), 0);
	assert_in_range(own.nr_calls, 1, MAX_CALLS);
	assert_int_equal(own.call[0].event, CTG_NOTIFY_MIGRATE);
	client_off(&own);
	ctg_mm_destroy(child, false);
	/* It may write for a moment, until the port says that it cannot install. */
	client_on(&own, mm, BASE, 1);
	ctg_sim_fail(w.sim, CTG_SIM_INSTALL, 1);
	assert_int_equal(ctg_handle_fault(mm, BASE, true), -CTG_ENOMEM);
	assert_int_equal(own.nr_calls, 1);
	expect_call(&own, 0, BASE, 1, CTG_NOTIFY_PROTECT);
	assert_int_equal(own.seen[0].prot, RW);
	assert_int_equal(lookup(mm, BASE, 1).prot, CTG_PROT_READ);
	client_off(&own);
	client_off(&rw);
	client_off(&ro);
	client_off(&sparse);
}

/* A fork that fails has begun and ended all the same. */
static void test_fork_fails(void **state)
{
	struct ctg_mm_config config = {.owner = &w};
	struct ctg_mm *child = NULL;
	struct client c;
	uint64_t nth = 0, seq;
	int ret;

	(void)state;
	map_small(&w, mm, BASE, 8);
	client_on(&c, mm, BASE, 8);
	do {
		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, ++nth);
		ret = ctg_mm_fork(mm, &config, &child);
		ctg_sim_fail(w.sim, CTG_SIM_META_ALLOC, 0);
		assert_true(ret == 0 || ret == -CTG_ENOMEM);
		seq = ctg_mmu_interval_read_begin(&c.n);
		assert_false(ctg_mmu_interval_read_retry(&c.n, seq));
		assert_int_equal(lookup(mm, BASE, 1).prot, ret == 0 ? CTG_PROT_READ : (unsigned)RW);
	} while (ret != 0);
	assert_in_range(c.nr_calls, 1, nth);
	assert_in_range(nth, 3, 100);
	ctg_mm_destroy(child, false);
	client_off(&c);
}

static void test_exit(void **state)
{
	struct ctg_mm *second = space_new(&w, 0);
	struct client a, b;
	uint64_t seq;

	(void)state;
	mapped(second, BASE, 4, RW);
	client_on(&a, second, BASE, 4);
	client_on(&b, second, BASE + 100, 4);
	seq = ctg_mmu_interval_read_begin(&a.n);
	ctg_mm_destroy(second, true);
	assert_int_equal(a.nr_calls, 1);
	assert_int_equal(b.nr_calls, 1);
	assert_int_equal(a.call[0].event, CTG_NOTIFY_EXIT);
	assert_int_equal(a.call[0].vpn, 0);
	assert_int_equal(a.call[0].nr, CTG_MM_MAX_VPN);
	assert_true(ctg_mmu_interval_read_retry(&a.n, seq));
	/* What is left of it belongs to them: the last to go frees it. */
	client_off(&a);
	assert_int_not_equal(ctg_sim_meta_bytes(w.sim), 0);
	client_off(&b);
}

/* ---- what a reader may believe ----------------------------------------------------------- */

static void test_sequence(void **state)
{
	struct client c;
	uint64_t seq, next;

	(void)state;
	client_on(&c, mm, BASE, 4);
	seq = ctg_mmu_interval_read_begin(&c.n);
	assert_false(ctg_mmu_interval_read_retry(&c.n, seq));
	assert_int_equal(ctg_mm_invalidate(mm, BASE + 4, 1, true), 0);
	assert_false(ctg_mmu_interval_read_retry(&c.n, seq));
	assert_int_equal(ctg_mm_invalidate(mm, BASE + 3, 1, true), 0);
	expect_call(&c, 0, BASE + 3, 1, CTG_NOTIFY_RECLAIM);
	assert_true(ctg_mmu_interval_read_retry(&c.n, seq));
	next = ctg_mmu_interval_read_begin(&c.n);
	assert_int_not_equal(next, seq);
	assert_false(ctg_mmu_interval_read_retry(&c.n, next));
	client_off(&c);
}

/* A reader that comes between the callback and the end sleeps until then. */
static unsigned sleepers;

static int count_sleepers(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	__atomic_fetch_add(&sleepers, 1, __ATOMIC_ACQ_REL);
	return w.port.wait(host, word, expected, deadline, killable);
}

static void await_sleeper(void)
{
	while (__atomic_load_n(&sleepers, __ATOMIC_ACQUIRE) == 0)
		sched_yield();
	sched_yield();
}

static void *read_thread(void *arg)
{
	struct client *c = arg;

	c->result = ctg_mmu_interval_read_begin(&c->n);
	ctg_store32_release(&c->done, 1);
	return NULL;
}

static void start_reader(struct client *c)
{
	assert_int_equal(pthread_create(&c->thread, NULL, read_thread, c), 0);
	await_sleeper();
	assert_int_equal(ctg_load32_acquire(&c->done), 0);
}

static void test_reader_waits(void **state)
{
	struct client c;

	(void)state;
	mapped(mm, BASE, 4, RW);
	client_on(&c, mm, BASE, 4);
	c.act = start_reader;
	sleepers = 0;
	w.ctg->port.wait = count_sleepers;
	assert_int_equal(ctg_munmap(mm, BASE, 4), 0);
	assert_int_equal(pthread_join(c.thread, NULL), 0);
	assert_int_equal(ctg_load32_acquire(&c.done), 1);
	assert_int_equal(c.nr_calls, 1);
	assert_false(ctg_mmu_interval_read_retry(&c.n, c.result));
	c.act = NULL;
	client_off(&c);
}

/* ---- insert and remove meanwhile --------------------------------------------------------- */

static void insert_other(struct client *c)
{
	c->act = NULL;
	client_on(c->other, mm, BASE, 8);
	c->other->act = start_reader;
}

/* An interval that is inserted meanwhile is not called, its reader waits; then it is as others. */
static void test_insert_meanwhile(void **state)
{
	struct client c, other;

	(void)state;
	mapped(mm, BASE, 8, RW);
	client_on(&c, mm, BASE + 7, 1);
	c.act = insert_other;
	c.other = &other;
	assert_int_equal(ctg_munmap(mm, BASE, 8), 0);
	assert_int_equal(c.nr_calls, 1);
	assert_int_equal(other.nr_calls, 0);
	other.act = NULL;
	other.result = ctg_mmu_interval_read_begin(&other.n);
	assert_false(ctg_mmu_interval_read_retry(&other.n, other.result));
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 1, true), 0);
	assert_int_equal(c.nr_calls, 1);
	assert_int_equal(other.nr_calls, 1);
	assert_true(ctg_mmu_interval_read_retry(&other.n, other.result));
	client_off(&c);
	client_off(&other);
}

static void insert_and_read_other(struct client *c)
{
	insert_other(c);
	start_reader(c->other);
}

static void test_insert_meanwhile_reader_waits(void **state)
{
	struct client c, other;

	(void)state;
	client_on(&c, mm, BASE, 1);
	c.act = insert_and_read_other;
	c.other = &other;
	sleepers = 0;
	w.ctg->port.wait = count_sleepers;
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 1, true), 0);
	assert_int_equal(pthread_join(other.thread, NULL), 0);
	assert_int_equal(ctg_load32_acquire(&other.done), 1);
	other.act = NULL;
	client_off(&c);
	client_off(&other);
}

/* What is inserted meanwhile can be removed meanwhile, from wherever it is in the list. */
static struct client many[8];

static void insert_and_remove_many(struct client *c)
{
	static const unsigned order[8] = {3, 0, 7, 5, 6, 1, 2, 4};

	c->act = NULL;
	for (unsigned i = 0; i < 8; i++)
		client_on(&many[i], mm, BASE + i, 1);
	for (unsigned i = 0; i < 6; i++)
		client_off(&many[order[i]]);
}

static void test_remove_what_is_not_in_yet(void **state)
{
	struct client c;

	(void)state;
	client_on(&c, mm, BASE, 1);
	c.act = insert_and_remove_many;
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 8, true), 0);
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 8, true), 0);
	for (unsigned i = 0; i < 8; i++)
		assert_int_equal(many[i].nr_calls, i == 2 || i == 4 ? 1 : 0);
	client_off(&many[2]);
	client_off(&many[4]);
	client_off(&c);
}

static void *remove_thread(void *arg)
{
	struct client *c = arg;

	ctg_mmu_interval_notifier_remove(&c->n);
	ctg_store32_release(&c->done, 1);
	return NULL;
}

static void start_remover(struct client *c)
{
	c->act = NULL;
	assert_int_equal(pthread_create(&c->thread, NULL, remove_thread, c), 0);
	await_sleeper();
	assert_int_equal(ctg_load32_acquire(&c->done), 0);
	/* Beside one that is to be inserted and one that no longer is. */
	client_on(c->other, mm, BASE, 1);
	client_on(&many[0], mm, BASE, 1);
	client_off(&many[0]);
}

/* Removing waits for the callbacks; after it there are none. */
static void test_remove_meanwhile(void **state)
{
	struct client c, other;

	(void)state;
	client_on(&c, mm, BASE, 8);
	c.act = start_remover;
	c.other = &other;
	sleepers = 0;
	w.ctg->port.wait = count_sleepers;
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 8, true), 0);
	assert_int_equal(pthread_join(c.thread, NULL), 0);
	assert_int_equal(ctg_load32_acquire(&c.done), 1);
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 8, true), 0);
	assert_int_equal(c.nr_calls, 1);
	assert_int_equal(other.nr_calls, 1);
	client_off(&other);
}

/* ---- not blockable ----------------------------------------------------------------------- */

static void test_not_blockable(void **state)
{
	struct client first, second, third;
	struct before *before;
	uint64_t seq;

	(void)state;
	map_small(&w, mm, BASE, 8);
	client_on(&first, mm, BASE, 1);
	client_on(&second, mm, BASE + 1, 1);
	client_on(&third, mm, BASE + 2, 1);
	second.refuses = true;
	seq = ctg_mmu_interval_read_begin(&third.n);
	before = before_take(&w, mm, BASE, 8);
	assert_int_equal(ctg_madvise_dontneed_nonblock(mm, BASE, 8), -CTG_EAGAIN);
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 8, false), -CTG_EAGAIN);
	before_check(&w, mm, before, 0);
	check_stamp(&w, mm, BASE, 8);
	assert_int_equal(first.nr_calls, 2);
	assert_int_equal(second.nr_calls, 2);
	assert_false(second.call[0].blockable);
	assert_int_equal(third.nr_calls, 0);
	assert_false(ctg_mmu_interval_read_retry(&third.n, seq));
	/* Nothing is left begun. */
	ctg_mmu_interval_read_begin(&first.n);
	second.refuses = false;
	/* Nor does it wait for who holds the lock. */
	ctg_lock(&w.ctg->port, &mm->lock);
	assert_int_equal(ctg_madvise_dontneed_nonblock(mm, BASE, 8), -CTG_EAGAIN);
	assert_int_equal(ctg_mm_invalidate(mm, BASE, 8, false), -CTG_EAGAIN);
	ctg_unlock(&w.ctg->port, &mm->lock);
	assert_int_equal(third.nr_calls, 0);
	assert_int_equal(ctg_madvise_dontneed_nonblock(mm, BASE, 8), 0);
	assert_int_equal(third.nr_calls, 1);
	assert_true(lookup(mm, BASE, 8).reserved);
	/* Who may be waited for is: what it returns does not matter. */
	second.refuses = true;
	assert_int_equal(ctg_munmap(mm, BASE, 8), 0);
	client_off(&first);
	client_off(&second);
	client_off(&third);
}

#define IN_WORLD(test) cmocka_unit_test_setup_teardown(test, open_world, close_world)

int main(void)
{
	const struct CMUnitTest tests[] = {
		IN_WORLD(test_bad_input),
		IN_WORLD(test_no_memory),
		IN_WORLD(test_unmap),
		IN_WORLD(test_unmap_fails),
		IN_WORLD(test_protect),
		IN_WORLD(test_fill_undone),
		IN_WORLD(test_migrate),
		IN_WORLD(test_migrate_fails),
		IN_WORLD(test_fork),
		IN_WORLD(test_fork_fails),
		IN_WORLD(test_exit),
		IN_WORLD(test_sequence),
		IN_WORLD(test_reader_waits),
		IN_WORLD(test_insert_meanwhile),
		IN_WORLD(test_insert_meanwhile_reader_waits),
		IN_WORLD(test_remove_what_is_not_in_yet),
		IN_WORLD(test_remove_meanwhile),
		IN_WORLD(test_not_blockable),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
