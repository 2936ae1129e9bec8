/* SPDX-License-Identifier: MIT */
/*
 * Mapping operations, as a process carries them out on itself: the region's own process, and the
 * agent in every borrower. An agent runs beside a program that knows nothing of it, so nothing here
 * may touch libc: raw system calls, no errno, no thread-local storage, no allocation.
 *
 * Each operation replaces a mapping in one step (MAP_FIXED or mremap over it), so that other
 * threads see the old one or the new one, and an operation that fails has changed nothing.
 */
#define _GNU_SOURCE
#include "rawcall.h"
#include "space.h"

#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>

#define OPS_PAGE ((uint64_t)4096)
#define OPS_HUGE ((uint64_t)2 << 20)

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

static long raw_mmap(uint64_t addr, uint64_t bytes, int prot, int flags, int fd, uint64_t offset)
{
	return posix_rawcall(
		SYS_mmap, (long)addr, (long)bytes, prot, flags, (long)fd, (long)offset);
}

static long raw_munmap(uint64_t addr, uint64_t bytes)
{
	return posix_rawcall(SYS_munmap, (long)addr, (long)bytes, 0, 0, 0, 0);
}

static long raw_madvise(uint64_t addr, uint64_t bytes, int advice)
{
	return posix_rawcall(SYS_madvise, (long)addr, (long)bytes, advice, 0, 0, 0);
}

static bool raw_failed(long ret)
{
	return ret < 0 && ret > -4096;
}

/* bytes: a multiple of the page size */
static void ops_copy(void *to, const void *from, uint64_t bytes)
{
#if defined(__x86_64__)
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
#else
	uint64_t *d = to;
	const uint64_t *s = from;

	for (uint64_t i = 0; i < bytes / sizeof(*d); i++)
		__atomic_store_n(&d[i], s[i], __ATOMIC_RELAXED);
#endif
}

/* It reads what other threads may write, but are kept from writing just now in a way that the
 * thread sanitizer does not see. */
__attribute__((no_sanitize("thread"))) static bool ops_page_is_zero(const uint64_t *page)
{
	for (unsigned i = 0; i < OPS_PAGE / sizeof(*page); i += 4)
		if ((page[i] | page[i + 1] | page[i + 2] | page[i + 3]) != 0)
			return false;
	return true;
}

static int op_map(const int files[POSIX_NR_FILES], const struct posix_op *op)
{
	long ret = raw_mmap(op->addr, op->bytes, (int)op->prot, MAP_SHARED | MAP_FIXED,
		files[op->file], op->offset);

	if (raw_failed(ret))
		return (int)ret;
	/* A child made behind our back must not share it: it would see what moves later. */
	(void)raw_madvise(op->addr, op->bytes, MADV_DONTFORK);
	return 0;
}

static int op_reserve(const struct posix_op *op)
{
	long ret = raw_mmap(op->addr, op->bytes, PROT_NONE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);

	return raw_failed(ret) ? (int)ret : 0;
}

/* Anonymous memory aligned as huge pages are: they move to their place without being split. */
static long ops_map_aligned(uint64_t bytes)
{
	long ret = raw_mmap(
		0, bytes + OPS_HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t start, aligned;

	if (raw_failed(ret))
		return ret;
	start = (uint64_t)ret;
	aligned = (start + OPS_HUGE - 1) & ~(OPS_HUGE - 1);
	if (aligned != start)
		(void)raw_munmap(start, aligned - start);
	(void)raw_munmap(aligned + bytes, start + OPS_HUGE - aligned);
	return (long)aligned;
}

static int op_privatise(const struct posix_op *op)
{
	long ret = ops_map_aligned(op->bytes);
	uint64_t fresh = (uint64_t)ret;

	if (raw_failed(ret))
		return (int)ret;
	(void)raw_madvise(fresh, op->bytes, MADV_HUGEPAGE);
	for (uint64_t at = 0; at < op->bytes; at += OPS_PAGE) {
		const void *from = (const void *)(op->addr + at);

		if (!ops_page_is_zero(from))
			ops_copy((void *)(fresh + at), from, OPS_PAGE);
	}
	ret = posix_rawcall(SYS_mremap, (long)fresh, (long)op->bytes, (long)op->bytes,
		MREMAP_MAYMOVE | MREMAP_FIXED, (long)op->addr, 0);
	if (raw_failed(ret)) {
		(void)raw_munmap(fresh, op->bytes);
		return (int)ret;
	}
	return 0;
}

static int op_lend(const int files[POSIX_NR_FILES], const struct posix_op *op)
{
	long ret = raw_mmap(
		0, op->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, files[op->file], op->offset);
	uint64_t fresh = (uint64_t)ret;

	if (raw_failed(ret))
		return (int)ret;
	ops_copy((void *)fresh, (const void *)op->addr, op->bytes);
	(void)raw_munmap(fresh, op->bytes);
	return op_map(files, op);
}

static int op_populate(const struct posix_op *op)
{
	return (int)raw_madvise(op->addr, op->bytes, MADV_POPULATE_WRITE);
}

static int ops_one(const int files[POSIX_NR_FILES], const struct posix_op *op)
{
	if (((op->addr | op->bytes | op->offset) & (OPS_PAGE - 1)) != 0 || op->bytes == 0 ||
		op->file >= POSIX_NR_FILES)
		return op->kind == POSIX_OP_HINT ? 0 : -CTG_EINVAL;
	switch (op->kind) {
	case POSIX_OP_MAP:
		return op_map(files, op);
	case POSIX_OP_RESERVE:
		return op_reserve(op);
	case POSIX_OP_PRIVATISE:
		return op_privatise(op);
	case POSIX_OP_POPULATE:
		return op_populate(op);
	case POSIX_OP_LEND:
		return op_lend(files, op);
	case POSIX_OP_HINT:
		return 0;
	default:
		return -CTG_EINVAL;
	}
}

int posix_ops_execute(
	const int files[POSIX_NR_FILES], const struct posix_op *ops, size_t nr, int *err)
{
	for (size_t i = 0; i < nr; i++) {
		*err = ops_one(files, &ops[i]);
		if (*err != 0)
			return (int)i;
	}
	*err = 0;
	return (int)nr;
}
