/* SPDX-License-Identifier: MIT */
/*
 * Chunks: where each stands, and the ways between RESERVED, LENT and PRIVATE.
 *
 *   RESERVED -> LENT      the server maps it (PROTO_MAP)
 *   RESERVED -> PRIVATE   there is no server, or it has no room
 *   LENT -> PRIVATE       PROTO_PRIVATISE: before fork, before the program changes the mapping
 *   PRIVATE -> LENT       PROTO_LEND: in the background, unless sticky
 *   LENT, PRIVATE -> RESERVED   no page of it is committed any more
 *
 * A page that is not `used` reads as zeroes; `live` pages are the allocator's. A page that was
 * decommitted in a chunk that stays is used and not live: it is cleared when it is committed again.
 */
#define _GNU_SOURCE
#include "window.h"
#include "link.h"
#include <errno.h>
#include <string.h>
#include <sys/resource.h>

/* A process that never needs more than this is not worth two threads and a connection. */
#define UNLINKED_CHUNKS 1
#define WINDOW_MAX ((size_t)64 << 30)
#define WINDOW_MIN ((size_t)1 << 30)
/* How long a fork tries to get memory out of a migration's or a debugger's hands. */
#define FORK_TRIES 200
#define FORK_TRY_NS 5000000u

struct window window;

static uintptr_t chunk_addr(size_t i)
{
	return window.base + i * CHUNK_BYTES;
}

static size_t chunk_of(uintptr_t addr)
{
	return (addr - window.base) >> CHUNK_SHIFT;
}

int window_reserve(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	size_t bytes = WINDOW_MAX, table;
	long addr = -ENOMEM, chunks;
	struct rlimit limit;
	uintptr_t base;

	/* Where addresses are limited, stacks and mapped files need some, too. */
	if (getrlimit(RLIMIT_AS, &limit) == 0)
		while (bytes > limit.rlim_cur / 4)
			bytes /= 2;
	for (; bytes >= WINDOW_MIN; bytes /= 2) {
		addr = raw_mmap(0, bytes + CHUNK_BYTES, PROT_NONE, flags);
		if (!raw_failed(addr))
			break;
	}
	if (raw_failed(addr))
		return (int)addr;
	table = bytes / CHUNK_BYTES * sizeof(struct chunk);
	chunks = raw_mmap(0, table, PROT_READ | PROT_WRITE, flags);
	if (raw_failed(chunks)) {
		raw2(SYS_munmap, addr, (long)(bytes + CHUNK_BYTES));
		return (int)chunks;
	}
	base = ((uintptr_t)addr + CHUNK_BYTES - 1) & ~(CHUNK_BYTES - 1);
	if (base != (uintptr_t)addr)
		raw2(SYS_munmap, addr, (long)(base - (uintptr_t)addr));
	raw2(SYS_munmap, (long)(base + bytes), (long)(addr + (long)CHUNK_BYTES - (long)base));
	window.chunks = (struct chunk *)chunks;
	window.nr_chunks = bytes / CHUNK_BYTES;
	window.bytes = bytes;
	window.next = base;
	__atomic_store_n(&window.base, base, __ATOMIC_RELEASE);
	return 0;
}

uintptr_t window_cut(size_t bytes, size_t align)
{
	uintptr_t addr, end = window.base + window.bytes;

	addr = (window.next + align - 1) & ~(uintptr_t)(align - 1);
	if (addr < window.next || addr > end || bytes > end - addr)
		return 0;
	window.next = addr + bytes;
	return addr;
}

bool window_grow(uintptr_t addr, size_t bytes)
{
	if (addr != window.next || bytes > window.base + window.bytes - addr)
		return false;
	window.next += bytes;
	return true;
}

/* ---- chunks ---- */

static void window_report_ordinary(void)
{
	for (unsigned i = 0; i < PROTO_NR_COUNTS; i++)
		if (window.ordinary[i] && link_call(PROTO_COUNT, i, window.ordinary[i], NULL) == 0)
			window.ordinary[i] = 0;
}

static void chunk_set(size_t i, enum chunk_state state)
{
	struct chunk *chunk = &window.chunks[i];

	if (chunk->state == CHUNK_LENT)
		window.nr_lent--;
	if (state == CHUNK_LENT)
		window.nr_lent++;
	if (state == CHUNK_RESERVED) {
		chunk->sticky = false;
		memset(chunk->used, 0, sizeof(chunk->used));
	}
	chunk->state = (uint8_t)state;
	if (i >= window.top)
		window.top = i + 1;
}

/* RESERVED -> PRIVATE. unknown: the server does not know of it, so it cannot be asked to lend it.
 */
static int chunks_make_private(size_t i, size_t nr, enum proto_count why, bool unknown)
{
	long ret = raw_mmap(chunk_addr(i), nr * CHUNK_BYTES, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED);

	if (raw_failed(ret))
		return -ENOMEM;
	window.ordinary[why] += nr * CHUNK_BYTES;
	for (; nr; nr--, i++) {
		chunk_set(i, CHUNK_PRIVATE);
		window.chunks[i].sticky = unknown;
	}
	return 0;
}

/* RESERVED -> LENT, or PRIVATE where there is no room. */
static int chunks_obtain(size_t i, size_t nr)
{
	size_t part = nr;
	int ret;

	if (window.retired)
		return chunks_make_private(i, nr, PROTO_COUNT_OTHER, true);
	if (link_to_server.state == LINK_NONE && window.unlinked + nr <= UNLINKED_CHUNKS) {
		window.unlinked += nr;
		return chunks_make_private(i, nr, PROTO_COUNT_OTHER, true);
	}
	link_connect();
	while (nr) {
		if (part > nr)
			part = nr;
		ret = link_call(PROTO_MAP, chunk_addr(i), part * CHUNK_BYTES, NULL);
		if (ret != 0 && part > 1) {
			part = ret == -ENOMEM ? part / 2 : 1;
			continue;
		}
		if (ret == 0)
			for (size_t k = i; k < i + part; k++)
				chunk_set(k, CHUNK_LENT);
		else if (ret == -ENOTCONN || part < nr)
			/* Without a server none of the rest can be had. With a full one, a larger
			 * part was refused just now: so is the rest of it. */
			part = nr;
		if (ret != 0 && chunks_make_private(i, part, PROTO_COUNT_FULL, ret != -ENOMEM) != 0)
			return -ENOMEM;
		i += part;
		nr -= part;
	}
	return 0;
}

/* LENT or PRIVATE -> RESERVED. The server is told of both: it knows which chunks are private. */
static void chunks_release(size_t i, size_t nr)
{
	bool lent = window.chunks[i].state == CHUNK_LENT;
	int ret = link_call(PROTO_UNMAP, chunk_addr(i), nr * CHUNK_BYTES, NULL);

	if (lent && ret != 0 && ret != -ENOTCONN)
		return; /* they stay lent, with no page live: good to be committed again */
	if (!lent || ret != 0)
		if (raw_failed(raw_mmap(chunk_addr(i), nr * CHUNK_BYTES, PROT_NONE,
			    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED)))
			return;
	while (nr--)
		chunk_set(i++, CHUNK_RESERVED);
}

/* ---- pages ---- */

/* Bits [first, first + nr) of word w. */
static uint64_t page_mask(size_t w, size_t first, size_t nr)
{
	size_t from = first > w * 64 ? first - w * 64 : 0;
	size_t to = first + nr > w * 64 ? first + nr - w * 64 : 0;

	if (from >= 64 || to == 0)
		return 0;
	if (to > 64)
		to = 64;
	return (to - from == 64 ? ~(uint64_t)0 : (((uint64_t)1 << (to - from)) - 1)) << from;
}

static void pages_clear(uintptr_t chunk, size_t w, uint64_t dirty)
{
	unsigned from, nr;

	while (dirty) {
		from = (unsigned)__builtin_ctzll(dirty);
		nr = ~(dirty >> from) ? (unsigned)__builtin_ctzll(~(dirty >> from)) : 64 - from;
		memset((void *)(chunk + (w * 64 + from) * WINDOW_PAGE), 0, nr * WINDOW_PAGE);
		dirty &= nr == 64 ? 0 : ~(((((uint64_t)1 << nr) - 1)) << from);
	}
}

static void chunk_commit(size_t i, size_t first, size_t nr)
{
	struct chunk *chunk = &window.chunks[i];

	for (size_t w = first / 64; w <= (first + nr - 1) / 64; w++) {
		uint64_t mask = page_mask(w, first, nr);

		pages_clear(chunk_addr(i), w, mask & chunk->used[w]);
		chunk->nr_live =
			(uint16_t)(chunk->nr_live + __builtin_popcountll(mask & ~chunk->live[w]));
		chunk->live[w] |= mask;
		chunk->used[w] |= mask;
	}
}

static void chunk_decommit(size_t i, size_t first, size_t nr)
{
	struct chunk *chunk = &window.chunks[i];
	/* Ordinary memory can go back page by page. */
	bool gone = chunk->state == CHUNK_PRIVATE &&
		    raw3(SYS_madvise, (long)(chunk_addr(i) + first * WINDOW_PAGE),
			    (long)(nr * WINDOW_PAGE), MADV_DONTNEED) == 0;

	for (size_t w = first / 64; w <= (first + nr - 1) / 64; w++) {
		uint64_t mask = page_mask(w, first, nr);

		chunk->nr_live =
			(uint16_t)(chunk->nr_live - __builtin_popcountll(mask & chunk->live[w]));
		chunk->live[w] &= ~mask;
		if (gone)
			chunk->used[w] &= ~mask;
	}
}

/* For each chunk of a range: which of its pages are in it. */
static void chunk_part(size_t i, uintptr_t addr, size_t bytes, size_t *first, size_t *nr)
{
	uintptr_t from = addr > chunk_addr(i) ? addr : chunk_addr(i);
	uintptr_t to = addr + bytes < chunk_addr(i + 1) ? addr + bytes : chunk_addr(i + 1);

	*first = (from - chunk_addr(i)) / WINDOW_PAGE;
	*nr = (to - from) / WINDOW_PAGE;
}

int window_commit(uintptr_t addr, size_t bytes)
{
	size_t last = chunk_of(addr + bytes - 1), i, run, first, nr;
	int ret = 0;

	for (i = chunk_of(addr); i <= last && ret == 0; i += run) {
		for (run = 0; i + run <= last && window.chunks[i + run].state == CHUNK_RESERVED;)
			run++;
		if (run)
			ret = chunks_obtain(i, run);
		else
			run = 1;
	}
	if (ret != 0) {
		/* Give back what was obtained for nothing. */
		for (i = chunk_of(addr); i <= last; i++)
			if (window.chunks[i].state != CHUNK_RESERVED &&
				window.chunks[i].nr_live == 0)
				chunks_release(i, 1);
		return ret;
	}
	for (i = chunk_of(addr); i <= last; i++) {
		chunk_part(i, addr, bytes, &first, &nr);
		chunk_commit(i, first, nr);
	}
	window_report_ordinary();
	return 0;
}

static bool chunk_is_empty(size_t i, enum chunk_state state)
{
	return window.chunks[i].state == state && window.chunks[i].nr_live == 0;
}

void window_decommit(uintptr_t addr, size_t bytes)
{
	size_t last, i, run, first, nr;

	if (bytes == 0)
		return;
	last = chunk_of(addr + bytes - 1);
	for (i = chunk_of(addr); i <= last; i++) {
		chunk_part(i, addr, bytes, &first, &nr);
		chunk_decommit(i, first, nr);
	}
	for (i = chunk_of(addr); i <= last; i += run) {
		enum chunk_state state = window.chunks[i].state;

		run = 1;
		if (state == CHUNK_RESERVED || !chunk_is_empty(i, state))
			continue;
		while (i + run <= last && chunk_is_empty(i + run, state))
			run++;
		chunks_release(i, run);
	}
}

/* ---- conversions ---- */

/* LENT -> PRIVATE for a run; *done: chunks. */
static int chunks_privatise(size_t i, size_t nr, size_t *done)
{
	uint64_t bytes;
	int ret = link_call(PROTO_PRIVATISE, chunk_addr(i), nr * CHUNK_BYTES, &bytes);

	*done = ret == 0 ? nr : bytes / CHUNK_BYTES;
	if (*done > nr)
		*done = nr;
	for (size_t k = i; k < i + *done; k++)
		chunk_set(k, CHUNK_PRIVATE);
	return ret;
}

int window_privatise(uintptr_t addr, size_t bytes, bool sticky)
{
	uintptr_t end = addr + bytes;
	size_t i, last, run, done;
	int ret;

	if (addr < window.base)
		addr = window.base;
	if (end < addr || end > window.base + window.bytes)
		end = window.base + window.bytes;
	i = chunk_of(addr);
	last = chunk_of(end - 1);
	if (last >= window.top) {
		if (window.top == 0)
			return 0;
		last = window.top - 1;
	}
	while (i <= last) {
		for (run = 0; i + run <= last && window.chunks[i + run].state == CHUNK_LENT;)
			run++;
		if (run == 0) {
			if (sticky && window.chunks[i].state == CHUNK_PRIVATE)
				window.chunks[i].sticky = true;
			i++;
			continue;
		}
		ret = chunks_privatise(i, run, &done);
		if (ret != 0)
			return ret;
		if (sticky)
			window.ordinary[PROTO_COUNT_STICKY] += run * CHUNK_BYTES;
	}
	window_report_ordinary();
	return 0;
}

/*
 * The limit counts what is reserved, too, and with less of it left than nothing the agent could not
 * even replace one mapping by another when memory moves.
 */
void window_retire(void)
{
	uintptr_t end = (window.next + CHUNK_BYTES - 1) & ~(CHUNK_BYTES - 1);

	if (!window.base || window.retired)
		return;
	window.retired = true;
	window_privatise(window.base, window.bytes, true);
	raw2(SYS_munmap, (long)end, (long)(window.base + window.bytes - end));
	window.bytes = end - window.base;
}

void window_before_fork(void)
{
	const struct timespec pause = {0, FORK_TRY_NS};
	int ret = -EBUSY;

	if (!window.base || window.nr_lent == 0)
		return;
	/* Nothing tells when a migration or a debugger lets go of the process: look again. */
	for (unsigned i = 0; i < FORK_TRIES && ret == -EBUSY; i++) {
		if (i != 0)
			raw2(SYS_nanosleep, (long)&pause, 0);
		ret = -ENOTCONN;
		if (link_connect())
			ret = window_privatise(window.base, window.bytes, false);
		/* It may have been found gone only now; -EBUSY until its userfaultfd is, too. */
		if (ret == -ENOTCONN)
			ret = link_rescue();
	}
	if (ret != 0)
		link_say("contig: lent memory could not be made ready for a fork\n");
}

void window_after_fork_in_child(void)
{
	for (size_t i = 0; i < window.top; i++) {
		struct chunk *chunk = &window.chunks[i];

		/* What stayed lent is not mapped here (MADV_DONTFORK). Nothing else may come to lie
		 * there: whoever uses it must get a fault, not somebody else's data. */
		if (chunk->state == CHUNK_LENT) {
			raw_mmap(chunk_addr(i), CHUNK_BYTES, PROT_NONE,
				MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED);
			chunk_set(i, CHUNK_PRIVATE);
		}
		/* Shared copy-on-write with the parent: lending it would copy what nobody changes.
		 */
		if (chunk->state == CHUNK_PRIVATE)
			chunk->sticky = true;
	}
	window.unlinked = 0;
	memset(window.ordinary, 0, sizeof(window.ordinary));
}

int window_lend_one(void)
{
	uint64_t done;
	size_t i, n;
	int ret;

	for (n = 0; n < window.top; n++) {
		i = (window.cursor + n) % window.top;
		if (window.chunks[i].state == CHUNK_PRIVATE && !window.chunks[i].sticky)
			break;
	}
	if (n == window.top)
		return 1;
	ret = agent_wire_call(PROTO_LEND, chunk_addr(i), CHUNK_BYTES, &done);
	window.cursor = i + (ret == -EBUSY);
	if (ret == 0)
		chunk_set(i, CHUNK_LENT);
	else if (ret == -ENOMEM || ret == -EBUSY || ret == -ENOTCONN)
		return ret;
	else
		window.chunks[i].sticky = true; /* it never will */
	return 0;
}

int window_rescue_one(void)
{
	int ret;

	for (size_t i = 0; i < window.top; i++) {
		if (window.chunks[i].state != CHUNK_LENT)
			continue;
		ret = agent_rescue(chunk_addr(i), CHUNK_BYTES);
		if (ret == 0)
			chunk_set(i, CHUNK_PRIVATE);
		return ret;
	}
	return 1;
}
