/* SPDX-License-Identifier: MIT */
/*
 * Take 300 MiB back from a fully lent area of real memory, next to a memcpy of as many bytes in
 * memory of the same kind. One line of JSON a round; bench.py makes the table.
 *
 *	take BACKING ROUNDS
 */
#define _GNU_SOURCE
#include <contig/posix.h>

#include <err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define AREA_BYTES ((uint64_t)512 << 20)
#define TAKE_BYTES ((uint64_t)300 << 20)

static uint64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Every page of the borrowed heap carries its own number, so that a page moved wrongly shows. */
static void heap_fill(unsigned char *heap, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += sizeof(uint64_t))
		memcpy(heap + at, &at, sizeof(at));
}

static void heap_check(const unsigned char *heap, size_t bytes)
{
	for (size_t at = 0; at < bytes; at += sizeof(uint64_t)) {
		uint64_t seen;

		memcpy(&seen, heap + at, sizeof(seen));
		if (seen != at)
			errx(1, "the heap is damaged at byte %zu", at);
	}
}

static void take_once(struct ctg_region *region, unsigned flags, const char *what)
{
	struct ctg_alloc_report report = {0};
	struct ctg_alloc_request request = {.flags = flags, .report = &report};
	struct ctg_buffer buffer;
	uint64_t start = now_ns();
	int ret = ctg_region_alloc(region, TAKE_BYTES, &request, &buffer);
	uint64_t took = now_ns() - start;

	if (ret != 0)
		errx(1, "taking 300 MiB failed: %d (obstacle %d)", ret, (int)report.obstacle);
	printf("{\"what\": \"%s\", \"ns\": %llu, \"frames_moved\": %llu, \"ns_copy\": %llu, "
	       "\"ns_install\": %llu, \"ns_zero\": %llu}\n",
		what, (unsigned long long)took, (unsigned long long)report.frames_moved,
		(unsigned long long)report.ns_copy, (unsigned long long)report.ns_install,
		(unsigned long long)report.ns_zero);
	if (ctg_region_release(region, &buffer) != 0)
		errx(1, "release failed");
}

/* What was displaced goes home, as the server's homecoming thread would have it. */
static void home(struct ctg_region *region)
{
	uint64_t moved;
	int ret;

	do {
		ret = ctg_migrate_home(ctg_region_machine(region), UINT64_MAX, &moved);
	} while (ret == -CTG_EAGAIN);
	if (ret != 0)
		errx(1, "bringing displaced memory home failed: %d", ret);
}

int main(int argc, char **argv)
{
	struct ctg_region_config config = {
		.backing = argc > 1 ? argv[1] : "memfd",
		.bytes = AREA_BYTES,
		.spill_bytes = CTG_SPILL_DEFAULT,
	};
	int rounds = argc > 2 ? atoi(argv[2]) : 5;
	struct ctg_region_info info;
	struct ctg_cma_stat stat;
	struct ctg_region *region;
	struct ctg_error error;
	void *heap;
	unsigned char *from, *to;
	int flags = MAP_PRIVATE | MAP_ANONYMOUS;

	if (ctg_region_open(&config, &region, &error) != 0)
		errx(77, "%s", error.text);
	ctg_region_info(region, &info);
	ctg_cma_stat(ctg_region_area(region), &stat);
	if (stat.longest_unallocated << CTG_PAGE_SHIFT < TAKE_BYTES)
		errx(77, "%s: the longest run has %llu MiB: physical memory is in pieces", config.backing,
			(unsigned long long)(stat.longest_unallocated >> (20 - CTG_PAGE_SHIFT)));
	if (ctg_region_map(region, AREA_BYTES, &heap) != 0)
		errx(1, "mapping the heap failed");
	heap_fill(heap, AREA_BYTES);
	ctg_cma_stat(ctg_region_area(region), &stat);
	/* The limit: a copy between warm buffers of pages of the same size. */
	if (info.map_order != 0)
		flags |= MAP_HUGETLB;
	from = mmap(NULL, TAKE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
	to = mmap(NULL, TAKE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
	if (from == MAP_FAILED || to == MAP_FAILED) {
		flags &= ~MAP_HUGETLB;
		from = mmap(NULL, TAKE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
		to = mmap(NULL, TAKE_BYTES, PROT_READ | PROT_WRITE, flags, -1, 0);
		if (from == MAP_FAILED || to == MAP_FAILED)
			err(1, "mmap");
		madvise(from, TAKE_BYTES, MADV_HUGEPAGE);
		madvise(to, TAKE_BYTES, MADV_HUGEPAGE);
	}
	memset(from, 1, TAKE_BYTES);
	memset(to, 2, TAKE_BYTES);
	printf("{\"what\": \"info\", \"backing\": \"%s\", \"guard\": \"%s\", \"lent_percent\": %.1f, "
	       "\"physical\": %d}\n",
		info.backing, info.guard, 100.0 * (double)stat.nr_lent / (double)stat.nr,
		info.physical);
	for (int i = 0; i < rounds; i++) {
		uint64_t start = now_ns();

		memcpy(to, from, TAKE_BYTES);
		printf("{\"what\": \"memcpy\", \"ns\": %llu}\n",
			(unsigned long long)(now_ns() - start));
		take_once(region, CTG_ALLOC_NO_ZERO, "take");
		home(region);
		take_once(region, 0, "take_zeroed");
		home(region);
	}
	heap_check(heap, AREA_BYTES);
	ctg_region_unmap(region, heap, AREA_BYTES);
	ctg_region_close(region);
	return 0;
}
