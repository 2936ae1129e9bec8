/* SPDX-License-Identifier: MIT */
/*
 * Regions of huge pages: physical order, the pool and its limit, displaced memory in huge pages,
 * and what is said when there are not enough. Skipped where no huge pages can be had.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/"

struct pool {
	uint64_t nr, free, reserved, surplus, limit;
};

static struct pool look(void)
{
	return (struct pool){posix_read_number(POOL "nr_hugepages"),
		posix_read_number(POOL "free_hugepages"), posix_read_number(POOL "resv_hugepages"),
		posix_read_number(POOL "surplus_hugepages"),
		posix_read_number(POOL "nr_overcommit_hugepages")};
}

static bool same(const struct pool *a, const struct pool *b)
{
	return a->nr - a->surplus == b->nr - b->surplus && a->limit == b->limit &&
	       a->reserved == b->reserved;
}

/*
 * The pool is the whole machine's. What we leave behind stays; what others do passes, or goes on:
 * then nothing can be said. false: that is so.
 */
static bool restored(const struct pool *before)
{
	struct pool after = look(), later;

	for (int i = 0; i < 20 && !same(before, &after); i++) {
		usleep(50000);
		later = look();
		if (!same(&after, &later)) {
			print_message("skipped: others use the pool\n");
			return false;
		}
		after = later;
	}
	assert_true(same(before, &after));
	return true;
}

/* NULL: not here, and why. */
static struct ctg_region *open_or_skip(const struct ctg_region_config *config)
{
	struct ctg_error error = {0};
	struct ctg_region *region;

	if (ctg_region_open(config, &region, &error) == 0)
		return region;
	print_message("skipped: %s\n", error.text);
	return NULL;
}

static struct ctg_region_config config_of(uint64_t bytes, uint64_t spill)
{
	return (struct ctg_region_config){
		.backing = "hugetlb", .bytes = bytes, .spill_bytes = spill};
}

/* The frame number of an address, by a reader of its own. */
static uint64_t pagemap_of(const void *addr)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	uint64_t entry = 0;

	assert_true(fd >= 0);
	assert_int_equal(pread(fd, &entry, 8, (off_t)((uintptr_t)addr / 4096 * 8)), 8);
	close(fd);
	return entry & ((UINT64_C(1) << 55) - 1);
}

static void test_pfns_are_physical(void **state)
{
	struct ctg_region_config config = config_of(64 * MIB, 0);
	struct ctg_region *region = open_or_skip(&config);
	struct ctg_region_info info;
	struct ctg_cma_stat stat;
	uint64_t frames = 0, last_end = 0;

	(void)state;
	if (region == NULL) {
		skip();
		return;
	}
	ctg_region_info(region, &info);
	assert_string_equal(info.backing, "hugetlb");
	assert_int_equal(info.map_order, CTG_PAGEBLOCK_ORDER);
	if (info.physical != 1) {
		print_message("skipped: %s\n", info.physical_why);
		ctg_region_close(region);
		skip();
		return;
	}
	ctg_cma_stat(ctg_region_area(region), &stat);
	for (size_t i = 0; i < stat.nr_ranges; i++) {
		ctg_pfn_t pfn = stat.ranges[i].pfn;
		uint64_t phys = 0, offset, run;
		int fd;

		assert_true(pfn >= last_end); /* ascending, apart from each other */
		if (i > 0)
			assert_null(ctg_region_address(region, pfn - 1));
		assert_int_equal(ctg_region_physical(region, pfn, stat.ranges[i].nr, &phys), 1);
		assert_int_equal(phys, pfn);
		for (uint64_t k = 0; k < stat.ranges[i].nr; k += 511) {
			unsigned char *p = ctg_region_address(region, pfn + k);

			assert_int_equal(pagemap_of(p), pfn + k);
			/* The file has it where it says, although it is in another order. */
			*(uint64_t *)p = pfn + k;
			assert_int_equal(ctg_region_fd(region, pfn + k, 1, &fd, &offset, &run), 0);
			p = mmap(NULL, 2 * MIB, PROT_READ, MAP_SHARED, fd,
				(off_t)(offset & ~(2 * MIB - 1)));
			assert_ptr_not_equal(p, MAP_FAILED);
			assert_int_equal(*(uint64_t *)(p + (offset & (2 * MIB - 1))), pfn + k);
			munmap(p, 2 * MIB);
		}
		frames += stat.ranges[i].nr;
		last_end = pfn + stat.ranges[i].nr;
	}
	assert_int_equal(frames, 64 * MIB >> CTG_PAGE_SHIFT);
	/* Across a gap it is not contiguous, and is not claimed to be. */
	if (stat.nr_ranges > 1)
		assert_true(ctg_region_physical(region, stat.ranges[0].pfn, stat.ranges[0].nr + 1,
				    &(uint64_t){0}) <= 0);
	ctg_region_close(region);
}

static void test_buffers_are_physical(void **state)
{
	struct ctg_region_config config = config_of(32 * MIB, CTG_SPILL_DEFAULT);
	struct ctg_region *region = open_or_skip(&config);
	struct ctg_cma_stat stat;
	struct ctg_buffer buffer;
	uint64_t phys, moved;
	void *heap;

	(void)state;
	if (region == NULL || region->store[POSIX_FILE_REGION].physical != 1) {
		ctg_region_close(region);
		skip();
		return;
	}
	ctg_cma_stat(ctg_region_area(region), &stat);
	assert_int_equal(ctg_region_map(region, 32 * MIB, &heap), 0);
	for (uint64_t i = 0; i < 32 * MIB; i += 8)
		*(uint64_t *)((char *)heap + i) = i * 13;
	for (uint64_t bytes = 2 * MIB; bytes <= stat.longest_unallocated << CTG_PAGE_SHIFT;
		bytes *= 2) {
		assert_int_equal(ctg_region_alloc(region, bytes, NULL, &buffer), 0);
		assert_int_equal(
			ctg_region_physical(region, buffer.pfn, bytes >> CTG_PAGE_SHIFT, &phys), 1);
		assert_int_equal(phys, buffer.pfn);
		memset(buffer.address, 0xff, bytes);
		for (uint64_t i = 0; i < 32 * MIB; i += 8)
			assert_int_equal(*(uint64_t *)((char *)heap + i), i * 13);
		assert_int_equal(ctg_region_release(region, &buffer), 0);
		assert_int_equal(
			ctg_migrate_home(ctg_region_machine(region), UINT64_MAX, &moved), 0);
	}
	ctg_region_close(region);
}

/* Displaced memory is in huge pages, too, where the limit can be raised, and they come back. */
static void test_spill_in_huge_pages(void **state)
{
	struct ctg_region_config config = config_of(16 * MIB, 16 * MIB);
	struct pool before = look();
	struct ctg_region *region = open_or_skip(&config);
	struct ctg_region_info info;
	struct ctg_buffer buffer;
	uint64_t moved;
	void *heap;

	(void)state;
	if (region == NULL || region->store[POSIX_FILE_SPILL].map_order == 0) {
		ctg_region_close(region);
		skip();
		return;
	}
	assert_int_equal(ctg_region_map(region, 16 * MIB, &heap), 0);
	memset(heap, 7, 16 * MIB);
	assert_int_equal(ctg_region_alloc(region, 2 * MIB, NULL, &buffer), 0);
	ctg_region_info(region, &info);
	assert_int_equal(info.spill_used_bytes, 2 * MIB);
	for (uint64_t i = 0; i < 16 * MIB; i++)
		assert_int_equal(((char *)heap)[i], 7);
	assert_int_equal(ctg_region_release(region, &buffer), 0);
	assert_int_equal(ctg_migrate_home(ctg_region_machine(region), UINT64_MAX, &moved), 0);
	ctg_region_info(region, &info);
	assert_int_equal(info.spill_used_bytes, 0);
	ctg_region_close(region);
	if (!restored(&before))
		skip();
}

/* The promise is broken: the pages are not there when they are wanted. */
static void test_spill_without_pages(void **state)
{
	struct ctg_region_config config = config_of(16 * MIB, 16 * MIB);
	struct ctg_region *region = open_or_skip(&config);
	struct ctg_buffer buffer;
	struct pool now = look();
	uint64_t moved;
	void *heap;

	(void)state;
	if (region == NULL || region->store[POSIX_FILE_SPILL].map_order == 0 || now.free != 0) {
		ctg_region_close(region);
		skip();
		return;
	}
	assert_int_equal(ctg_region_map(region, 16 * MIB, &heap), 0);
	memset(heap, 7, 16 * MIB);
	assert_int_equal(posix_write_number(POOL "nr_overcommit_hugepages", 0), 0);
	assert_int_equal(ctg_region_alloc(region, 2 * MIB, NULL, &buffer), -CTG_ENOMEM);
	for (uint64_t i = 0; i < 16 * MIB; i++)
		assert_int_equal(((char *)heap)[i], 7);
	assert_int_equal(posix_write_number(POOL "nr_overcommit_hugepages", now.limit), 0);
	assert_int_equal(ctg_region_alloc(region, 2 * MIB, NULL, &buffer), 0);
	assert_int_equal(ctg_region_release(region, &buffer), 0);
	assert_int_equal(ctg_migrate_home(ctg_region_machine(region), UINT64_MAX, &moved), 0);
	for (uint64_t i = 0; i < 16 * MIB; i++)
		assert_int_equal(((char *)heap)[i], 7);
	ctg_region_close(region);
}

/* Two regions, closed in either order, leave the pool and its limit as they were. */
static void test_pool_is_restored(void **state)
{
	struct ctg_region_config config = config_of(8 * MIB, 8 * MIB);
	struct pool before = look();

	(void)state;
	for (int order = 0; order < 2; order++) {
		struct ctg_region *first = open_or_skip(&config), *second;

		if (first == NULL) {
			skip();
			return;
		}
		second = open_or_skip(&config);
		assert_non_null(second);
		ctg_region_close(order == 0 ? first : second);
		ctg_region_close(order == 0 ? second : first);
		if (!restored(&before))
			skip();
	}
}

static void test_more_than_there_is(void **state)
{
	uint64_t bytes = posix_meminfo("MemTotal") / (2 * MIB) * (2 * MIB);
	struct ctg_region_config config = config_of(bytes, 0);
	struct pool before = look();
	struct ctg_error error = {0};
	struct ctg_region *region;

	(void)state;
	assert_int_equal(ctg_region_open(&config, &region, &error), -CTG_ENOMEM);
	assert_non_null(strstr(error.text, "pages of 2 MiB"));
	assert_non_null(strstr(error.text, "memfd"));
	if (!restored(&before))
		skip();
}

/* Without rights, and with an empty pool, it says what is missing and who can do something about
 * it. */
static void test_nobody_is_told(void **state)
{
	struct ctg_region_config config = config_of(64 * MIB, 0);
	struct pool now = look();
	int status;
	pid_t pid;

	(void)state;
	if (geteuid() != 0 || now.free != 0 || now.limit > now.surplus) {
		print_message("skipped: needs root and an empty pool\n");
		skip();
		return;
	}
	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		struct ctg_error error = {0};
		struct ctg_region *region;

		if (setgroups(0, NULL) != 0 || setresgid(65534, 65534, 65534) != 0 ||
			setresuid(65534, 65534, 65534) != 0)
			_exit(99);
		prctl(PR_SET_DUMPABLE, 1, 0, 0, 0);
		if (ctg_region_open(&config, &region, &error) != -CTG_ENOMEM)
			_exit(1);
		_exit(strstr(error.text, "need 32 pages of 2 MiB, 0 free") != NULL &&
					strstr(error.text, "nr_hugepages") != NULL
				? 0
				: 2);
	}
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

/* Killed in the middle, it leaves no page behind: they go with the last mapping. */
static void test_killed(void **state)
{
	struct ctg_region_config config = config_of(16 * MIB, 16 * MIB);
	struct pool before = look(), after;
	int go[2];
	pid_t pid;
	char byte = 0;

	(void)state;
	assert_int_equal(pipe(go), 0);
	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		struct ctg_region *region;
		void *heap;

		if (ctg_region_open(&config, &region, NULL) == 0) {
			ctg_region_map(region, 16 * MIB, &heap);
			memset(heap, 1, 16 * MIB);
			byte = 1;
		}
		if (write(go[1], &byte, 1) == 1)
			pause();
		_exit(1);
	}
	assert_int_equal(read(go[0], &byte, 1), 1);
	kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, NULL, 0), pid);
	close(go[0]);
	close(go[1]);
	after = look();
	/* The limit is a permission, not memory; we who survive put it back. */
	if (after.limit == before.limit + 16)
		posix_write_number(POOL "nr_overcommit_hugepages", before.limit);
	if (!restored(&before) || byte == 0)
		skip();
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_pfns_are_physical),
		cmocka_unit_test(test_buffers_are_physical),
		cmocka_unit_test(test_spill_in_huge_pages),
		cmocka_unit_test(test_spill_without_pages),
		cmocka_unit_test(test_pool_is_restored),
		cmocka_unit_test(test_more_than_there_is),
		cmocka_unit_test(test_nobody_is_told),
		cmocka_unit_test(test_killed),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
