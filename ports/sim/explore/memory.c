/* SPDX-License-Identifier: MIT */
/*
 * Every access of the core to memory.
 *
 * The core is compiled with -fsanitize=thread and linked with the functions below instead of the
 * sanitizer's own: so each atomic of the unmodified sources is a switch point that knows its
 * address and order, and each plain access can be checked for races by happens-before.
 *
 * Store buffers: a relaxed atomic store may stay invisible to other fibers, in any order with other
 * such stores, until its fiber does something with release order or enters the port. The fiber
 * itself sees its own stores.
 */
#define _GNU_SOURCE
#include "engine.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

/* ---- the arena --------------------------------------------------------------------------------
 */

unsigned char *xp_arena;
size_t xp_arena_used;

#define GRAIN 64
#define POISONED_MAX 256

static unsigned char *snapshot;
static size_t snapshot_used;
static unsigned char poison[XP_ARENA_BYTES / GRAIN];
static struct {
	size_t at, nr;
} poisoned[POISONED_MAX];
static unsigned nr_poisoned, snapshot_poisoned;

void *xp_alloc(size_t bytes, size_t align)
{
	size_t mask = (align < GRAIN ? GRAIN : align) - 1;
	size_t at = (xp_arena_used + mask) & ~mask;

	/* Never used again within a run: so a use after the free is always seen. */
	if (at + bytes > XP_ARENA_BYTES)
		abort();
	xp_arena_used = (at + bytes + GRAIN - 1) & ~(size_t)(GRAIN - 1);
	memset(xp_arena + at, 0, bytes);
	return xp_arena + at;
}

void xp_poison(const void *p, size_t bytes)
{
	size_t at = (size_t)((const unsigned char *)p - xp_arena) / GRAIN;
	size_t nr = (bytes + GRAIN - 1) / GRAIN;

	if (nr_poisoned == POISONED_MAX)
		return;
	memset(poison + at, 1, nr);
	poisoned[nr_poisoned].at = at;
	poisoned[nr_poisoned++].nr = nr;
}

void xp_snapshot(void)
{
	memcpy(snapshot, xp_arena, xp_arena_used);
	snapshot_used = xp_arena_used;
	snapshot_poisoned = nr_poisoned;
}

/* ---- what is known of a word ------------------------------------------------------------------
 */

typedef uint32_t clock_vector[XP_MAX_FIBERS];

/*
 * One address. Who has ever read and written it tells the scheduler whether the order matters. The
 * clocks are of one run: those at which each fiber last accessed it, and what a release left there.
 */
struct cell {
	uint32_t key; /* offset + 1 */
	uint32_t run;
	uint8_t readers, writers; /* bits by fiber */
	bool ignored;
	bool frozen_read, frozen_write; /* what xp_shared answers */
	clock_vector plain_read, plain_write, atomic_read, atomic_write, released;
};

#define CELLS (1u << 16)
static struct cell *cells;
static unsigned nr_cells;
static uint32_t this_run;
static clock_vector clocks[XP_MAX_FIBERS];
bool xp_all_points;

static struct cell *cell_of(const void *p)
{
	uint32_t key = (uint32_t)((uintptr_t)p - (uintptr_t)xp_arena) + 1;
	uint32_t at = key * 2654435761u >> 16;

	while (cells[at].key != key) {
		if (cells[at].key == 0) {
			if (++nr_cells > CELLS * 3 / 4)
				abort();
			cells[at].key = key;
			break;
		}
		at = (at + 1) % CELLS;
	}
	return &cells[at];
}

static struct cell *cell_now(const void *p)
{
	struct cell *cell = cell_of(p);

	if (cell->run != this_run) {
		cell->run = this_run;
		memset(cell->plain_read, 0, 5 * sizeof(clock_vector));
	}
	return cell;
}

bool xp_shared(const void *p, bool write)
{
	const struct cell *cell;

	if (xp_all_points)
		return true;
	cell = cell_of(p);
	return write ? cell->frozen_write : cell->frozen_read;
}

static bool several(unsigned fibers)
{
	return (fibers & (fibers - 1)) != 0;
}

/* A load matters if somebody else stores, a store if somebody else looks at all. */
void xp_freeze_shared(void)
{
	for (unsigned i = 0; i < CELLS; i++) {
		struct cell *cell = &cells[i];
		bool shared = cell->writers != 0 && several(cell->readers | cell->writers) &&
			      !cell->ignored;

		cell->frozen_read = cell->frozen_write = shared;
	}
}

unsigned xp_nr_shared(void)
{
	unsigned nr = 0;

	for (unsigned i = 0; i < CELLS; i++)
		nr += cells[i].writers != 0 && several(cells[i].readers | cells[i].writers) &&
		      !cells[i].ignored;
	return nr;
}

void xp_ignore(const void *p, size_t bytes)
{
	for (size_t i = 0; i < bytes; i += 8)
		cell_of((const unsigned char *)p + i)->ignored = true;
}

/* ---- store buffers ----------------------------------------------------------------------------
 */

#define BUFFERED 8

struct buffered {
	void *p;
	unsigned size;
	uint64_t value;
};
static struct buffered buffers[XP_MAX_FIBERS][BUFFERED];
static unsigned nr_buffered[XP_MAX_FIBERS];

static uint64_t load_memory(const volatile void *p, unsigned size)
{
	switch (size) {
	case 1:
		return *(const volatile uint8_t *)p;
	case 2:
		return *(const volatile uint16_t *)p;
	case 4:
		return *(const volatile uint32_t *)p;
	default:
		return *(const volatile uint64_t *)p;
	}
}

static void store_memory(volatile void *p, unsigned size, uint64_t value)
{
	uint64_t old = load_memory(p, size);

	switch (size) {
	case 1:
		*(volatile uint8_t *)p = (uint8_t)value;
		break;
	case 2:
		*(volatile uint16_t *)p = (uint16_t)value;
		break;
	case 4:
		*(volatile uint32_t *)p = (uint32_t)value;
		break;
	default:
		*(volatile uint64_t *)p = value;
	}
	if (old != value && xp_run.on) {
		xp_written((const void *)(uintptr_t)p);
		if (xp_in_arena((const void *)(uintptr_t)p))
			xp_watch((const void *)(uintptr_t)p, old, value);
	}
}

unsigned xp_buffered(unsigned fiber)
{
	return nr_buffered[fiber];
}

bool xp_drain_some(unsigned fiber, unsigned which)
{
	struct buffered entry;

	if (which >= nr_buffered[fiber])
		return false;
	entry = buffers[fiber][which];
	memmove(&buffers[fiber][which], &buffers[fiber][which + 1],
		(--nr_buffered[fiber] - which) * sizeof(entry));
	store_memory(entry.p, entry.size, entry.value);
	return true;
}

void xp_drain(void)
{
	while (nr_buffered[xp_run.now] != 0)
		xp_drain_some(xp_run.now, 0);
}

static struct buffered *buffered_store(const volatile void *p)
{
	struct buffered *entries = buffers[xp_run.now];

	for (unsigned i = 0; i < nr_buffered[xp_run.now]; i++)
		if (entries[i].p == p)
			return &entries[i];
	return NULL;
}

static void buffer_store(volatile void *p, unsigned size, uint64_t value)
{
	struct buffered *entry = buffered_store(p);

	if (entry == NULL) {
		if (nr_buffered[xp_run.now] == BUFFERED)
			xp_drain_some(xp_run.now, 0);
		entry = &buffers[xp_run.now][nr_buffered[xp_run.now]++];
	}
	*entry = (struct buffered){(void *)(uintptr_t)p, size, value};
}

static void drain_word(const void *p)
{
	for (unsigned i = 0; i < nr_buffered[xp_run.now]; i++)
		if (buffers[xp_run.now][i].p == p) {
			xp_drain_some(xp_run.now, i);
			return;
		}
}

/* ---- races ------------------------------------------------------------------------------------
 */

static bool before(const clock_vector when, unsigned *who)
{
	const uint32_t *known = clocks[xp_run.now];

	for (unsigned f = 0; f < xp_run.nr; f++)
		if (f != xp_run.now && when[f] > known[f]) {
			*who = f;
			return false;
		}
	return true;
}

static _Noreturn void race(const void *p, const char *what, const char *other, unsigned who)
{
	char name[128];

	xp_describe(p, name, sizeof(name));
	xp_violation("race on %s: %s by fiber %u, %s by fiber %u (%s), neither before the other",
		name, what, xp_run.now, other, who, xp_fiber_op(who));
}

/* An access in the order of things that acquire and release have made. */
static void check_race(struct cell *cell, const void *p, bool write, bool atomic)
{
	uint32_t now = clocks[xp_run.now][xp_run.now];
	const char *what =
		write ? (atomic ? "atomic write" : "write") : (atomic ? "atomic read" : "read");
	unsigned who;

	if (!before(cell->plain_write, &who))
		race(p, what, "write", who);
	if (!atomic && !before(cell->atomic_write, &who))
		race(p, what, "atomic write", who);
	if (write && !before(cell->plain_read, &who))
		race(p, what, "read", who);
	if (write && !atomic && !before(cell->atomic_read, &who))
		race(p, what, "atomic read", who);
	if (write)
		(atomic ? cell->atomic_write : cell->plain_write)[xp_run.now] = now;
	else
		(atomic ? cell->atomic_read : cell->plain_read)[xp_run.now] = now;
}

static void acquire(const struct cell *cell)
{
	for (unsigned f = 0; f < xp_run.nr; f++)
		if (clocks[xp_run.now][f] < cell->released[f])
			clocks[xp_run.now][f] = cell->released[f];
}

static bool has_acquire(int order)
{
	return order == __ATOMIC_ACQUIRE || order == __ATOMIC_CONSUME ||
	       order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
}

static bool has_release(int order)
{
	return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST;
}

static void release(struct cell *cell, bool rmw, int order)
{
	uint32_t *mine = clocks[xp_run.now];

	/* A relaxed store ends a release sequence, a relaxed read-modify-write goes on with it. */
	if (!rmw)
		memset(cell->released, 0, sizeof(cell->released));
	if (!has_release(order))
		return;
	for (unsigned f = 0; f < xp_run.nr; f++)
		if (cell->released[f] < mine[f])
			cell->released[f] = mine[f];
	mine[xp_run.now]++;
}

static void check_alive(const void *p)
{
	char name[128];

	if (poison[((uintptr_t)p - (uintptr_t)xp_arena) / GRAIN] == 0)
		return;
	xp_describe(p, name, sizeof(name));
	xp_violation("use of freed memory: %s", name);
}

static void plain(const void *p, bool write, unsigned long pc)
{
	if (!xp_run.on || !xp_run.races || !xp_in_arena(p))
		return;
	xp_run.violated_pc = pc;
	check_alive(p);
	/* A fiber sees its own relaxed stores, and its later plain ones come after them. */
	if (nr_buffered[xp_run.now] != 0)
		drain_word(p);
	check_race(cell_now(p), p, write, false);
}

/* ---- atomics ----------------------------------------------------------------------------------
 */

static void note(const void *p, bool write)
{
	struct cell *cell = cell_of(p);

	if (write)
		cell->writers |= (uint8_t)(1u << xp_run.now);
	else
		cell->readers |= (uint8_t)(1u << xp_run.now);
}

/* What is done in one step is not a point itself, but others' accesses are because of it. */
static bool watched(const volatile void *vp, bool write)
{
	const void *p = (const void *)(uintptr_t)vp;

	if (!xp_in_arena(p))
		return false;
	if (!xp_run.on && xp_run.one_step)
		note(p, write);
	return xp_run.on;
}

/* Others may run, then the access is noted. NULL: it is nobody else's. */
static struct cell *begin(const void *p, bool write, const char *what, unsigned long pc)
{
	struct cell *cell;

	xp_run.violated_pc = pc;
	check_alive(p);
	xp_point(p, write, what);
	xp_run.violated_pc = pc;
	cell = cell_now(p);
	note(p, write);
	return cell;
}

static uint64_t atomic_load(const volatile void *vp, unsigned size, int order, unsigned long pc)
{
	const void *p = (const void *)(uintptr_t)vp;
	const struct buffered *own;
	struct cell *cell;
	uint64_t value;

	if (!watched(p, false))
		return load_memory(p, size);
	cell = begin(p, false, "load", pc);
	xp_read_word(p);
	own = buffered_store(p);
	value = own != NULL ? own->value : load_memory(p, size);
	if (xp_run.races) {
		check_race(cell, p, false, true);
		if (has_acquire(order))
			acquire(cell);
	}
	if (xp_run.tracing)
		xp_trace(p, "load", size, value, value, pc);
	return value;
}

static void atomic_store(
	volatile void *vp, unsigned size, uint64_t value, int order, unsigned long pc)
{
	void *p = (void *)(uintptr_t)vp;
	struct cell *cell;

	if (!watched(p, true)) {
		store_memory(p, size, value);
		return;
	}
	cell = begin(p, true, "store", pc);
	if (has_release(order))
		xp_drain();
	if (xp_run.races) {
		check_race(cell, p, true, true);
		release(cell, false, order);
	}
	if (xp_run.tracing)
		xp_trace(p, has_release(order) ? "store" : "store relaxed", size,
			load_memory(p, size), value, pc);
	if (xp_run.weak && !has_release(order))
		buffer_store(p, size, value);
	else
		store_memory(p, size, value);
}

enum rmw { RMW_ADD, RMW_OR, RMW_AND, RMW_XCHG, RMW_CAS };

static uint64_t rmw_result(enum rmw op, uint64_t old, uint64_t operand)
{
	switch (op) {
	case RMW_ADD:
		return old + operand;
	case RMW_OR:
		return old | operand;
	case RMW_AND:
		return old & operand;
	default:
		return operand;
	}
}

/* expected is for RMW_CAS alone. Returns what was there. */
static uint64_t atomic_rmw(volatile void *vp, unsigned size, enum rmw op, uint64_t operand,
	uint64_t expected, int order, unsigned long pc)
{
	static const char *const names[] = {"add", "or", "and", "exchange", "cas"};
	void *p = (void *)(uintptr_t)vp;
	uint64_t mask = size == 8 ? UINT64_MAX : ((uint64_t)1 << (size * 8)) - 1;
	struct cell *cell = NULL;
	uint64_t old, new;
	bool stores, seen = watched(p, true);

	if (seen) {
		cell = begin(p, true, names[op], pc);
		/* Its own store to the word comes first, whatever the order. */
		if (has_release(order) || buffered_store(p) != NULL)
			xp_drain();
		xp_read_word(p);
	}
	old = load_memory(p, size);
	stores = op != RMW_CAS || old == (expected & mask);
	new = stores ? rmw_result(op, old, operand) & mask : old;
	if (seen && xp_run.races) {
		check_race(cell, p, stores, true);
		if (has_acquire(order))
			acquire(cell);
		if (stores)
			release(cell, true, order);
	}
	if (seen && xp_run.tracing)
		xp_trace(p, stores ? names[op] : "cas fails", size, old, new, pc);
	if (stores)
		store_memory(p, size, new);
	return old;
}

/* ---- what the compiler calls ------------------------------------------------------------------
 */

#define PC ((unsigned long)(uintptr_t)__builtin_return_address(0))
#define NAMED(type, name, ...)                                                                     \
	type xp_##name(__VA_ARGS__) __asm__("__tsan_" #name);                                      \
	type xp_##name(__VA_ARGS__)

NAMED(void, init, void)
{
}
NAMED(void, func_entry, void *pc)
{
	(void)pc;
}
NAMED(void, func_exit, void)
{
}

#define PLAIN(size)                                                                                \
	NAMED(void, read##size, void *p)                                                           \
	{                                                                                          \
		plain(p, false, PC);                                                               \
	}                                                                                          \
	NAMED(void, write##size, void *p)                                                          \
	{                                                                                          \
		plain(p, true, PC);                                                                \
	}                                                                                          \
	NAMED(void, unaligned_read##size, void *p)                                                 \
	{                                                                                          \
		plain(p, false, PC);                                                               \
	}                                                                                          \
	NAMED(void, unaligned_write##size, void *p)                                                \
	{                                                                                          \
		plain(p, true, PC);                                                                \
	}
PLAIN(1)
PLAIN(2)
PLAIN(4)
PLAIN(8)
PLAIN(16)

static void range(const unsigned char *p, size_t bytes, bool write, unsigned long pc)
{
	for (size_t i = 0; i < bytes; i += 8)
		plain(p + i, write, pc);
}

NAMED(void, read_range, void *p, size_t bytes)
{
	range(p, bytes, false, PC);
}
NAMED(void, write_range, void *p, size_t bytes)
{
	range(p, bytes, true, PC);
}
NAMED(void *, memcpy, void *dst, const void *src, size_t bytes)
{
	range(src, bytes, false, PC);
	range(dst, bytes, true, PC);
	return memcpy(dst, src, bytes);
}
NAMED(void *, memmove, void *dst, const void *src, size_t bytes)
{
	range(src, bytes, false, PC);
	range(dst, bytes, true, PC);
	return memmove(dst, src, bytes);
}
NAMED(void *, memset, void *dst, int c, size_t bytes)
{
	range(dst, bytes, true, PC);
	return memset(dst, c, bytes);
}

#define ATOMIC(bits, type)                                                                         \
	NAMED(type, atomic##bits##_load, const volatile type *p, int order)                        \
	{                                                                                          \
		return (type)atomic_load(p, bits / 8, order, PC);                                  \
	}                                                                                          \
	NAMED(void, atomic##bits##_store, volatile type *p, type v, int order)                     \
	{                                                                                          \
		atomic_store(p, bits / 8, v, order, PC);                                           \
	}                                                                                          \
	NAMED(type, atomic##bits##_exchange, volatile type *p, type v, int order)                  \
	{                                                                                          \
		return (type)atomic_rmw(p, bits / 8, RMW_XCHG, v, 0, order, PC);                   \
	}                                                                                          \
	NAMED(type, atomic##bits##_fetch_add, volatile type *p, type v, int order)                 \
	{                                                                                          \
		return (type)atomic_rmw(p, bits / 8, RMW_ADD, v, 0, order, PC);                    \
	}                                                                                          \
	NAMED(type, atomic##bits##_fetch_sub, volatile type *p, type v, int order)                 \
	{                                                                                          \
		return (type)atomic_rmw(p, bits / 8, RMW_ADD, -(uint64_t)v, 0, order, PC);         \
	}                                                                                          \
	NAMED(type, atomic##bits##_fetch_or, volatile type *p, type v, int order)                  \
	{                                                                                          \
		return (type)atomic_rmw(p, bits / 8, RMW_OR, v, 0, order, PC);                     \
	}                                                                                          \
	NAMED(type, atomic##bits##_fetch_and, volatile type *p, type v, int order)                 \
	{                                                                                          \
		return (type)atomic_rmw(p, bits / 8, RMW_AND, v, 0, order, PC);                    \
	}                                                                                          \
	NAMED(bool, atomic##bits##_compare_exchange_strong, volatile type *p, type *expected,      \
		type v, int order, int fail)                                                       \
	{                                                                                          \
		type old = (type)atomic_rmw(p, bits / 8, RMW_CAS, v, *expected, order, PC);        \
		bool done = old == *expected;                                                      \
                                                                                                   \
		(void)fail;                                                                        \
		*expected = old;                                                                   \
		return done;                                                                       \
	}                                                                                          \
	NAMED(type, atomic##bits##_compare_exchange_val, volatile type *p, type expected, type v,  \
		int order, int fail)                                                               \
	{                                                                                          \
		(void)fail;                                                                        \
		return (type)atomic_rmw(p, bits / 8, RMW_CAS, v, expected, order, PC);             \
	}
ATOMIC(8, uint8_t)
ATOMIC(16, uint16_t)
ATOMIC(32, uint32_t)
ATOMIC(64, uint64_t)

NAMED(void, atomic_thread_fence, int order)
{
	if (xp_run.on && has_release(order))
		xp_drain();
}

/* ---- runs -------------------------------------------------------------------------------------
 */

static void *pages(void *where, size_t bytes)
{
	void *p = mmap(where, bytes, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (p == MAP_FAILED)
		abort();
	return p;
}

void xp_memory_init(void)
{
	/* A hint: the same place in each process makes traces of two runs comparable. */
	xp_arena = pages((void *)(uintptr_t)0x200000000000, XP_ARENA_BYTES);
	snapshot = pages(NULL, XP_ARENA_BYTES);
	cells = pages(NULL, CELLS * sizeof(*cells));
}

void xp_memory_forget(void)
{
	memset(cells, 0, CELLS * sizeof(*cells));
	nr_cells = 0;
	memset(poison, 0, sizeof(poison));
	nr_poisoned = 0;
	xp_arena_used = 0;
}

void xp_restore(void)
{
	memcpy(xp_arena, snapshot, snapshot_used);
	xp_arena_used = snapshot_used;
	while (nr_poisoned > snapshot_poisoned) {
		nr_poisoned--;
		memset(poison + poisoned[nr_poisoned].at, 0, poisoned[nr_poisoned].nr);
	}
	this_run++;
	memset(nr_buffered, 0, sizeof(nr_buffered));
	memset(clocks, 0, sizeof(clocks));
	for (unsigned f = 0; f < XP_MAX_FIBERS; f++)
		clocks[f][f] = 1;
}
