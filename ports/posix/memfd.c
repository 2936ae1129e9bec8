/* SPDX-License-Identifier: MIT */
/*
 * Stores in anonymous shared memory (shmem.c): the default backing, all of it there from the start,
 * and the sparse one that displaced memory goes to.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

/* Where frames are numbered from when they have no numbers of their own. */
#define MEMFD_BASE ((ctg_pfn_t)0x100000)

int posix_store_map_linear(struct posix_store *store, ctg_pfn_t base, uint64_t bytes)
{
	store->direct = posix_reserve(bytes);
	if (store->direct == NULL)
		return -CTG_ENOMEM;
	store->base = base;
	store->nr = bytes >> CTG_PAGE_SHIFT;
	if (mmap(store->direct, bytes, PROT_READ | PROT_WRITE,
		    MAP_SHARED | MAP_FIXED | MAP_NORESERVE, store->fd, 0) == MAP_FAILED)
		return -errno;
	madvise(store->direct, bytes, MADV_DONTFORK);
	/* Where the system gives huge pages to those who ask. Devices refuse, which is as well. */
	(void)madvise(store->direct, bytes, MADV_HUGEPAGE);
	store->ranges = malloc(sizeof(*store->ranges));
	if (store->ranges == NULL)
		return -CTG_ENOMEM;
	store->ranges[0] = (struct ctg_extent){.pfn = base, .nr = store->nr};
	store->nr_ranges = 1;
	return 0;
}

static const struct posix_store_ops memfd_ops = {.name = "memfd"};

/* So that the first take-back does not fault page by page. Before 5.14 it will. */
static int populate_piece(void *arg, size_t piece)
{
	struct posix_store *store = arg;

	(void)madvise(store->direct + piece * POSIX_CHUNK, POSIX_CHUNK, MADV_POPULATE_WRITE);
	return 0;
}

static int memfd_fill(struct posix_store *store, uint64_t bytes, struct ctg_error *error)
{
	uint64_t available = posix_memory_available();
	int ret;

	if (bytes > available) {
		posix_error(error, -CTG_ENOMEM,
			"memfd: %llu MiB wanted, %llu MiB of memory available; use a smaller "
			"region",
			(unsigned long long)(bytes >> 20), (unsigned long long)(available >> 20));
		return -CTG_ENOMEM;
	}
	store->fd = posix_shmem_open("contig-region", bytes, &store->large);
	if (store->fd < 0 || fallocate(store->fd, 0, 0, (off_t)bytes) != 0) {
		ret = store->fd < 0 ? store->fd : -errno;
		posix_error(error, ret, "memfd: cannot have %llu MiB: %s",
			(unsigned long long)(bytes >> 20), strerror(-ret));
		return ret;
	}
	ret = posix_store_map_linear(store, MEMFD_BASE, bytes);
	if (ret != 0) {
		posix_error(error, ret,
			"memfd: cannot map %llu MiB: %s; is the address space limited?",
			(unsigned long long)(bytes >> 20), strerror(-ret));
		return ret;
	}
	return 0;
}

int posix_memfd_open(struct ctg_region *region, struct posix_store *store, uint64_t bytes,
	struct ctg_error *error)
{
	int ret;

	store->ops = &memfd_ops;
	store->backing = "memfd";
	store->physical = 0;
	store->physical_why = "memfd pages lie anywhere; contiguous in the region's file";
	ret = memfd_fill(store, bytes, error);
	if (ret == 0)
		ret = posix_copier_run(region, populate_piece, store, bytes / POSIX_CHUNK);
	if (ret != 0)
		posix_store_close(store);
	return ret;
}

/*
 * The sparse store is written with pwrite: the kernel then need not clear a page before it is
 * overwritten, no page table is filled, and a lack of memory is an error instead of a signal.
 */
static int sparse_write(struct posix_store *store, ctg_pfn_t pfn, const void *from, size_t bytes)
{
	off_t at = (off_t)((pfn - store->base) << CTG_PAGE_SHIFT);
	const unsigned char *p = from;

	while (bytes > 0) {
		ssize_t n = pwrite(store->fd, p, bytes, at);

		if (n <= 0) {
			if (n < 0 && errno == EINTR)
				continue;
			return -CTG_ENOMEM;
		}
		p += n;
		at += n;
		bytes -= (size_t)n;
	}
	return 0;
}

static const struct posix_store_ops sparse_ops = {
	.name = "memfd", .write = sparse_write, .serial = true};

int posix_memfd_open_sparse(
	struct posix_store *store, ctg_pfn_t base, uint64_t bytes, struct ctg_error *error)
{
	int ret = 0;

	store->ops = &sparse_ops;
	store->backing = "memfd";
	store->physical_why = "memfd pages lie anywhere";
	store->fd = posix_shmem_open("contig-spill", bytes, &store->large);
	if (store->fd < 0)
		ret = store->fd;
	else
		ret = posix_store_map_linear(store, base, bytes);
	if (ret != 0) {
		posix_error(error, ret, "spill: cannot have %llu MiB of address space: %s",
			(unsigned long long)(bytes >> 20), strerror(-ret));
		posix_store_close(store);
	}
	return ret;
}
