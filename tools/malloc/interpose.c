/* SPDX-License-Identifier: MIT */
/*
 * Calls by which a program changes mappings of its heap itself. Lent memory is mapped again
 * whenever it moves, which would undo what the program did; and it is shared memory, of which
 * MADV_DONTNEED for example would not give zeroes. So the chunks that such a call touches become
 * ordinary memory first, for good, and then the call is made.
 *
 * Not covered: system calls made without these functions, process_madvise, mlockall (which goes on
 * working for what is mapped when it is called), and changes made by another process.
 */
#define _GNU_SOURCE
#undef _FILE_OFFSET_BITS /* it renames mmap, and here both names are wanted */
#include "link.h"
#include "window.h"
#include <errno.h>
#include <stdarg.h>
#include <sys/resource.h>

/* madvise values that change how fast memory is, not what it holds; those that forbid something are
 * not among them. */
static bool advice_is_harmless(int advice)
{
	switch (advice) {
	case MADV_NORMAL:
	case MADV_RANDOM:
	case MADV_SEQUENTIAL:
	case MADV_WILLNEED:
	case MADV_HUGEPAGE:
	case MADV_NOHUGEPAGE:
	case MADV_MERGEABLE:
	case MADV_UNMERGEABLE:
	case MADV_COLD:
	case MADV_PAGEOUT:
	case MADV_DODUMP:
	case 22: /* MADV_POPULATE_READ */
	case 23: /* MADV_POPULATE_WRITE */
	case 25: /* MADV_COLLAPSE */
		return true;
	default:
		return false;
	}
}

/* 0 or a negative errno. */
static int settle(uintptr_t addr, size_t bytes)
{
	int ret;

	if (!window_touches(addr, bytes))
		return 0;
	link_lock();
	ret = window_privatise(addr, bytes, true);
	link_unlock();
	return ret;
}

static long result(long ret)
{
	if (!raw_failed(ret))
		return ret;
	errno = (int)-ret;
	return -1;
}

int mprotect(void *addr, size_t length, int prot)
{
	long ret = settle((uintptr_t)addr, length);

	if (ret == 0)
		ret = raw3(SYS_mprotect, (long)addr, (long)length, prot);
	return (int)result(ret);
}

int pkey_mprotect(void *addr, size_t length, int prot, int pkey)
{
	long ret = settle((uintptr_t)addr, length);

	if (ret == 0)
		ret = pkey == -1 ? raw3(SYS_mprotect, (long)addr, (long)length, prot)
				 : raw4(SYS_pkey_mprotect, (long)addr, (long)length, prot, pkey);
	return (int)result(ret);
}

int madvise(void *addr, size_t length, int advice)
{
	long ret = advice_is_harmless(advice) ? 0 : settle((uintptr_t)addr, length);

	if (ret == 0)
		ret = raw3(SYS_madvise, (long)addr, (long)length, advice);
	return (int)result(ret);
}

int munmap(void *addr, size_t length)
{
	long ret = settle((uintptr_t)addr, length);

	if (ret == 0)
		ret = raw2(SYS_munmap, (long)addr, (long)length);
	return (int)result(ret);
}

void *mremap(void *old, size_t old_size, size_t new_size, int flags, ...)
{
	void *target = NULL;
	va_list args;
	long ret;

	if (flags & MREMAP_FIXED) {
		va_start(args, flags);
		target = va_arg(args, void *);
		va_end(args);
	}
	ret = settle((uintptr_t)old, old_size > new_size ? old_size : new_size);
	if (ret == 0 && target)
		ret = settle((uintptr_t)target, new_size);
	if (ret == 0)
		ret = raw6(SYS_mremap, (long)old, (long)old_size, (long)new_size, flags,
			(long)target, 0);
	return (void *)result(ret);
}

int mlock(const void *addr, size_t length)
{
	long ret = settle((uintptr_t)addr, length);

	if (ret == 0)
		ret = raw2(SYS_mlock, (long)addr, (long)length);
	return (int)result(ret);
}

int mlock2(const void *addr, size_t length, unsigned int flags)
{
	long ret = settle((uintptr_t)addr, length);

	if (ret == 0)
		ret = raw3(SYS_mlock2, (long)addr, (long)length, (long)flags);
	return (int)result(ret);
}

/* Lent memory is never locked: what was locked is private already. */
int munlock(const void *addr, size_t length)
{
	return (int)result(raw2(SYS_munlock, (long)addr, (long)length));
}

/* The window is more than most limits of a process's addresses allow. */
static void before_limit(int resource, const struct rlimit *limit)
{
	if (resource != RLIMIT_AS || !limit || limit->rlim_cur == RLIM_INFINITY)
		return;
	link_lock();
	window_retire();
	link_unlock();
}

int prlimit(
	pid_t pid, enum __rlimit_resource resource, const struct rlimit *new, struct rlimit *old)
{
	if (pid == 0 || pid == (pid_t)raw1(SYS_getpid, 0))
		before_limit((int)resource, new);
	return (int)result(raw4(SYS_prlimit64, pid, (long)resource, (long)new, (long)old));
}

int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit)
{
	return prlimit(0, resource, limit, NULL);
}

/* The same on 64-bit machines. */
int prlimit64(pid_t pid, enum __rlimit_resource resource, const struct rlimit64 *new,
	struct rlimit64 *old) __attribute__((alias("prlimit")));
int setrlimit64(__rlimit_resource_t resource, const struct rlimit64 *limit)
	__attribute__((alias("setrlimit")));

/* MAP_FIXED over the heap. */
void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
{
	long ret = (flags & MAP_FIXED) ? settle((uintptr_t)addr, length) : 0;

	if (ret == 0)
		ret = raw6(SYS_mmap, (long)addr, (long)length, prot, flags, fd, offset);
	return (void *)result(ret);
}

void *mmap64(void *addr, size_t length, int prot, int flags, int fd, off_t offset)
	__attribute__((alias("mmap")));
