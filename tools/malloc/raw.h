/* SPDX-License-Identifier: MIT */
/*
 * System calls without libc. The agents run with the thread pointer of the thread that made them,
 * which may be gone: nothing that they call may touch thread-local storage, so not even errno. And
 * what interposes mprotect cannot call mprotect.
 *
 * raw6 and its shorter forms return what the kernel returned: a negative errno on failure.
 */
#ifndef CONTIG_MALLOC_RAW_H
#define CONTIG_MALLOC_RAW_H

#include "rawcall.h"
#include <linux/futex.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>

#define raw6 posix_rawcall

static inline long raw1(long nr, long a)
{
	return raw6(nr, a, 0, 0, 0, 0, 0);
}

static inline long raw2(long nr, long a, long b)
{
	return raw6(nr, a, b, 0, 0, 0, 0);
}

static inline long raw3(long nr, long a, long b, long c)
{
	return raw6(nr, a, b, c, 0, 0, 0);
}

static inline long raw4(long nr, long a, long b, long c, long d)
{
	return raw6(nr, a, b, c, d, 0, 0);
}

/* The address, or a negative errno: test with raw_failed. */
static inline long raw_mmap(uintptr_t addr, size_t bytes, int prot, int flags)
{
	return raw6(SYS_mmap, (long)addr, (long)bytes, prot, flags, -1, 0);
}

static inline bool raw_failed(long ret)
{
	return (unsigned long)ret >= (unsigned long)-4095L;
}

static inline uint64_t raw_now(void)
{
	struct timespec ts = {0, 0};

	raw2(SYS_clock_gettime, CLOCK_MONOTONIC, (long)&ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* ns: how long at most; UINT64_MAX: without end. Returns for any reason: look again. */
static inline void raw_futex_wait(uint32_t *word, uint32_t seen, uint64_t ns)
{
	struct timespec ts = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};

	raw6(SYS_futex, (long)word, FUTEX_WAIT_PRIVATE, (long)seen,
		ns == UINT64_MAX ? 0 : (long)&ts, 0, 0);
}

static inline void raw_futex_wake(uint32_t *word, int nr)
{
	raw3(SYS_futex, (long)word, FUTEX_WAKE_PRIVATE, nr);
}

#endif
