/* SPDX-License-Identifier: MIT */
/*
 * jemalloc, with the memory of its arenas in the window.
 *
 * The hooks are installed by the constructor. What was allocated before, and jemalloc's own
 * metadata, is ordinary memory outside the window; the hooks treat it as jemalloc's defaults do.
 *
 * New extents are addresses only: jemalloc commits the pages that it is about to use and decommits
 * those that have been unused for dirty_decay_ms, which is what maps chunks and gives them back. It
 * never unmaps: addresses are plenty.
 */
#define _GNU_SOURCE
#include "hooks.h"
#include "link.h"
#include "window.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

/*
 * oversize_threshold: 0, or else large allocations get an arena of their own that decays at once
 * and that nobody told of the hooks. narenas: each arena has free pages of its own in chunks of its
 * own. No background thread: it would appear in the program's list of threads, and die with every
 * fork.
 */
const char *malloc_conf = "narenas:4,oversize_threshold:0,dirty_decay_ms:1000,muzzy_decay_ms:0,"
			  "retain:true,background_thread:false";

/* Anonymous memory outside the window. */
static void *hook_map_outside(void *want, size_t size, size_t align, enum proto_count why)
{
	size_t span = align > WINDOW_PAGE ? size + align - WINDOW_PAGE : size;
	uintptr_t start, addr;
	long ret;

	if (want || span < size)
		return NULL;
	ret = raw_mmap(
		0, span, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
	if (raw_failed(ret))
		return NULL;
	start = (uintptr_t)ret;
	addr = (start + align - 1) & ~(uintptr_t)(align - 1);
	if (addr != start)
		raw2(SYS_munmap, (long)start, (long)(addr - start));
	if (addr + size != start + span)
		raw2(SYS_munmap, (long)(addr + size), (long)(start + span - addr - size));
	link_lock();
	window.ordinary[why] += size;
	link_unlock();
	return (void *)addr;
}

static void *hook_alloc(extent_hooks_t *hooks, void *want, size_t size, size_t align, bool *zero,
	bool *commit, unsigned arena)
{
	uintptr_t addr;
	int ret = 0;

	(void)hooks;
	(void)arena;
	/*
	 * Zeroed, committed and aligned like this is how jemalloc asks for a block of metadata. It
	 * would occupy whole chunks of which little is used, and be moved about for nothing.
	 */
	if (*zero && *commit && align == CHUNK_BYTES && size % CHUNK_BYTES == 0)
		return hook_map_outside(want, size, align, PROTO_COUNT_OTHER);

	link_lock();
	if (want)
		addr = window_grow((uintptr_t)want, size) ? (uintptr_t)want : 0;
	else
		addr = window_cut(size, align);
	if (addr && *commit)
		ret = window_commit(addr, size);
	link_unlock();
	if (ret != 0)
		return NULL; /* the addresses are lost: no matter */
	if (addr) {
		*zero = true;
		return (void *)addr;
	}
	addr = (uintptr_t)hook_map_outside(want, size, align, PROTO_COUNT_OTHER);
	if (addr)
		*zero = *commit = true;
	return (void *)addr;
}

/* For jemalloc, true is failure, from here on. */
static bool hook_dalloc(
	extent_hooks_t *hooks, void *addr, size_t size, bool committed, unsigned arena)
{
	(void)hooks;
	(void)addr;
	(void)size;
	(void)committed;
	(void)arena;
	return true;
}

static bool hook_commit(extent_hooks_t *hooks, void *addr, size_t size, size_t offset,
	size_t length, unsigned arena)
{
	bool failed;

	(void)hooks;
	(void)arena;
	if (!window_touches((uintptr_t)addr, size))
		return false; /* never decommitted */
	link_lock();
	failed = window_commit((uintptr_t)addr + offset, length) != 0;
	link_unlock();
	return failed;
}

static bool hook_decommit(extent_hooks_t *hooks, void *addr, size_t size, size_t offset,
	size_t length, unsigned arena)
{
	(void)hooks;
	(void)arena;
	if (!window_touches((uintptr_t)addr, size))
		return true;
	link_lock();
	window_decommit((uintptr_t)addr + offset, length);
	link_unlock();
	return false;
}

static bool hook_purge_forced(extent_hooks_t *hooks, void *addr, size_t size, size_t offset,
	size_t length, unsigned arena)
{
	(void)hooks;
	(void)arena;
	if (window_touches((uintptr_t)addr, size))
		return true;
	return raw3(SYS_madvise, (long)((uintptr_t)addr + offset), (long)length, MADV_DONTNEED) !=
	       0;
}

static bool hook_split(extent_hooks_t *hooks, void *addr, size_t size, size_t left, size_t right,
	bool committed, unsigned arena)
{
	(void)hooks;
	(void)addr;
	(void)size;
	(void)left;
	(void)right;
	(void)committed;
	(void)arena;
	return false;
}

static bool hook_merge(extent_hooks_t *hooks, void *a, size_t a_size, void *b, size_t b_size,
	bool committed, unsigned arena)
{
	(void)hooks;
	(void)committed;
	(void)arena;
	return window_touches((uintptr_t)a, a_size) != window_touches((uintptr_t)b, b_size);
}

static extent_hooks_t window_hooks = {
	.alloc = hook_alloc,
	.dalloc = hook_dalloc,
	.commit = hook_commit,
	.decommit = hook_decommit,
	.purge_forced = hook_purge_forced,
	.split = hook_split,
	.merge = hook_merge,
};

__attribute__((constructor)) static void hooks_install(void)
{
	extent_hooks_t *hooks = &window_hooks;
	unsigned nr = 0;
	size_t size = sizeof(nr), mib[3], depth = 3;
	int saved = errno;

	link_setup(secure_getenv(PROTO_ENV_SOCKET), secure_getenv("CONTIG_DEBUG") != NULL);
	if (link_to_server.state == LINK_OFF || window_reserve() != 0 ||
		mallctl("arenas.narenas", &nr, &size, NULL, 0) != 0 ||
		mallctlnametomib("arena.0.extent_hooks", mib, &depth) != 0) {
		errno = saved;
		return;
	}
	/* Also initialises those arenas that no thread has used yet. */
	for (mib[1] = 0; mib[1] < nr; mib[1]++)
		mallctlbymib(mib, depth, NULL, NULL, &hooks, sizeof(hooks));
	errno = saved;
}

/* glibc's own would hand out memory that our free() does not know. */
void *pvalloc(size_t size)
{
	if (size > SIZE_MAX - WINDOW_PAGE)
		return NULL;
	return valloc((size + WINDOW_PAGE - 1) & ~(WINDOW_PAGE - 1));
}
