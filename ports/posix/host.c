/* SPDX-License-Identifier: MIT */
/*
 * The hooks that have nothing to do with the region's memory: sleeping, time, CPUs, and memory for
 * the core's own structures.
 *
 * That memory does not come from malloc: while a batch moves under POSIX_GUARD_STOP in this very
 * process, a stopped thread may hold malloc's lock. The pool here has a lock of ours, and whoever
 * must wait for it lets the stopped threads go on first (host_wait).
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/*
 * 16 MiB: each batch ends with the copy threads waiting for the slowest of them, and 4 MiB spent a
 * quarter of the time on that. A writer waits some milliseconds at most.
 */
#define POSIX_BATCH_PAGES 4096u

/* Not remembered: a process that has forked would remember its parent's. */
pid_t posix_gettid(void)
{
	return (pid_t)syscall(SYS_gettid);
}

uint64_t posix_now(void *host)
{
	struct timespec ts;

	(void)host;
	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static unsigned host_cpu(void *host)
{
	const struct ctg_region *region = host;
	int cpu = sched_getcpu();

	return cpu < 0 ? 0 : (unsigned)cpu % region->port.nr_cpus;
}

static int host_wait(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	struct ctg_region *region = host;
	uint32_t mover = __atomic_load_n(&region->self_mover.v, __ATOMIC_RELAXED);
	struct timespec ts, *until = NULL;

	/* Nothing kills a thread of a process but the end of the process. */
	(void)killable;
	if (mover != 0 && (pid_t)mover == posix_gettid())
		posix_self_stop_break(region);
	if (deadline != CTG_NO_DEADLINE) {
		ts.tv_sec = (time_t)(deadline / 1000000000u);
		ts.tv_nsec = (long)(deadline % 1000000000u);
		until = &ts;
	}
	if (syscall(SYS_futex, &word->v, FUTEX_WAIT_BITSET | FUTEX_PRIVATE_FLAG, expected, until,
		    NULL, FUTEX_BITSET_MATCH_ANY) != 0 &&
		errno == ETIMEDOUT)
		return -CTG_ETIMEDOUT;
	return 0;
}

static void host_wake(void *host, struct ctg_word32 *word, unsigned nr)
{
	(void)host;
	syscall(SYS_futex, &word->v, FUTEX_WAKE | FUTEX_PRIVATE_FLAG,
		nr > INT_MAX ? INT_MAX : (int)nr, NULL, NULL, 0);
}

static void host_relax(void *host)
{
	(void)host;
#if defined(__x86_64__) || defined(__i386__)
	__builtin_ia32_pause();
#elif defined(__aarch64__)
	__asm__ volatile("isb" ::: "memory");
#else
	sched_yield();
#endif
}

/* ---- memory for the core's structures ---------------------------------------------------- */

#define META_UNIT 64u
#define META_SMALL 8192u /* larger ones are mappings of their own */
#define META_SLAB ((size_t)1 << 20)

struct meta_free {
	struct meta_free *next;
};

struct meta_slab {
	struct meta_slab *next;
};

struct posix_meta {
	struct ctg_word32
		lock; /* as struct ctg_lock of the core: 0 free, 1 held, 2 perhaps waited for */
	struct meta_free *free[META_SMALL / META_UNIT + 1];
	struct meta_slab *slabs;
	unsigned char *rest; /* of the newest slab */
	size_t rest_bytes;
	uint64_t bytes; /* handed out */
};

static void meta_lock(struct ctg_region *region)
{
	struct ctg_word32 *lock = &region->meta->lock;
	uint32_t expected = 0;

	if (__atomic_compare_exchange_n(
		    &lock->v, &expected, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
		return;
	while (__atomic_exchange_n(&lock->v, 2, __ATOMIC_ACQUIRE) != 0)
		host_wait(region, lock, 2, CTG_NO_DEADLINE, false);
}

static void meta_unlock(struct ctg_region *region)
{
	if (__atomic_exchange_n(&region->meta->lock.v, 0, __ATOMIC_RELEASE) == 2)
		host_wake(region, &region->meta->lock, 1);
}

static void *meta_map(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

/* One piece of a size class at a multiple of align; lock held. */
static void *meta_take(struct posix_meta *meta, size_t size, size_t align)
{
	struct meta_free **link = &meta->free[size / META_UNIT];
	size_t skip;

	for (; *link != NULL; link = &(*link)->next) {
		struct meta_free *piece = *link;

		if (((uintptr_t)piece & (align - 1)) == 0) {
			*link = piece->next;
			memset(piece, 0, size);
			return piece;
		}
	}
	skip = -(uintptr_t)meta->rest & (align - 1);
	if (meta->rest_bytes < skip + size) {
		struct meta_slab *slab = meta_map(META_SLAB);

		if (slab == NULL)
			return NULL;
		slab->next = meta->slabs;
		meta->slabs = slab;
		meta->rest = (unsigned char *)slab + META_UNIT;
		meta->rest_bytes = META_SLAB - META_UNIT;
		skip = -(uintptr_t)meta->rest & (align - 1);
	}
	meta->rest += skip + size;
	meta->rest_bytes -= skip + size;
	return meta->rest - size;
}

static size_t meta_size(size_t bytes)
{
	return bytes == 0 ? META_UNIT : (bytes + META_UNIT - 1) / META_UNIT * META_UNIT;
}

void *posix_meta_alloc(void *host, size_t bytes, size_t align)
{
	struct ctg_region *region = host;
	size_t size = meta_size(bytes);
	void *p;

	if (bytes > SIZE_MAX / 2)
		return NULL;
	if (size > META_SMALL) {
		p = meta_map(size);
	} else {
		meta_lock(region);
		p = meta_take(region->meta, size, align < META_UNIT ? META_UNIT : align);
		meta_unlock(region);
	}
	if (p != NULL)
		__atomic_add_fetch(&region->meta->bytes, bytes, __ATOMIC_RELAXED);
	return p;
}

void posix_meta_free(void *host, void *p, size_t bytes)
{
	struct ctg_region *region = host;
	size_t size = meta_size(bytes);
	struct meta_free *piece = p;

	if (p == NULL)
		return;
	__atomic_sub_fetch(&region->meta->bytes, bytes, __ATOMIC_RELAXED);
	if (size > META_SMALL) {
		munmap(p, size);
		return;
	}
	meta_lock(region);
	piece->next = region->meta->free[size / META_UNIT];
	region->meta->free[size / META_UNIT] = piece;
	meta_unlock(region);
}

int posix_meta_init(struct ctg_region *region)
{
	region->meta = calloc(1, sizeof(*region->meta));
	return region->meta == NULL ? -CTG_ENOMEM : 0;
}

void posix_meta_end(struct ctg_region *region)
{
	struct posix_meta *meta = region->meta;

	if (meta == NULL)
		return;
	while (meta->slabs != NULL) {
		struct meta_slab *slab = meta->slabs;

		meta->slabs = slab->next;
		munmap(slab, META_SLAB);
	}
	free(meta);
	region->meta = NULL;
}

uint64_t posix_meta_bytes(const struct ctg_region *region)
{
	return __atomic_load_n(&region->meta->bytes, __ATOMIC_RELAXED);
}

static void host_trace(void *host, const struct ctg_event *event)
{
	const struct ctg_region *region = host;

	region->config.trace(region->config.trace_arg, event);
}

void posix_host_hooks(struct ctg_port *port)
{
	struct ctg_region *region = port->host;
	long cpus = sysconf(_SC_NPROCESSORS_CONF);

	port->batch_pages = POSIX_BATCH_PAGES;
	port->nr_cpus = cpus < 1 ? 1 : cpus > CTG_MAX_CPUS ? CTG_MAX_CPUS : (unsigned)cpus;
	port->meta_alloc = posix_meta_alloc;
	port->meta_free = posix_meta_free;
	port->cpu = host_cpu;
	port->now = posix_now;
	port->wait = host_wait;
	port->wake = host_wake;
	port->relax = host_relax;
	port->trace = region->config.trace == NULL ? NULL : host_trace;
}
