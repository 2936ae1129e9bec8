/* SPDX-License-Identifier: MIT */
/* A store in a file of the user's: a regular file, or a device whose memory can be mapped shared.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_BASE ((ctg_pfn_t)0x100000)

static const struct posix_store_ops file_ops = {.name = "file"};

static bool file_maps(int fd, uint64_t offset, uint64_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)offset);

	if (p == MAP_FAILED)
		return false;
	munmap(p, bytes);
	return true;
}

/* Is there enough of it, and how finely can it be mapped? */
static int file_probe(struct posix_store *store, const char *path, const struct stat *st,
	uint64_t bytes, struct ctg_error *error)
{
	if (S_ISREG(st->st_mode)) {
		if ((uint64_t)st->st_size < bytes) {
			posix_error(error, -CTG_EINVAL,
				"file: %s has %llu MiB, %llu MiB wanted; grow it (truncate -s) or "
				"use less",
				path, (unsigned long long)st->st_size >> 20,
				(unsigned long long)(bytes >> 20));
			return -CTG_EINVAL;
		}
		/* A hole filled at a write could meet a full disk: then the writer gets SIGBUS. */
		if (fallocate(store->fd, 0, 0, (off_t)bytes) != 0 && errno != EOPNOTSUPP) {
			int ret = -errno;

			posix_error(error, ret, "file: no room for %s: %s", path, strerror(-ret));
			return ret;
		}
	} else if (!S_ISCHR(st->st_mode)) {
		posix_error(error, -CTG_EINVAL,
			"file: %s is neither a regular file nor a character device", path);
		return -CTG_EINVAL;
	}
	/* The last chunk, because a device checks the end of a mapping against its own. */
	if (!file_maps(store->fd, bytes - POSIX_CHUNK, POSIX_CHUNK)) {
		int ret = -errno;

		posix_error(error, ret, "file: %llu MiB of %s cannot be mapped shared: %s",
			(unsigned long long)(bytes >> 20), path, strerror(-ret));
		return ret;
	}
	/* device-dax with an alignment of 2 MiB refuses anything smaller. */
	if (!file_maps(store->fd, CTG_PAGE_SIZE, CTG_PAGE_SIZE))
		store->map_order = CTG_PAGEBLOCK_ORDER;
	return 0;
}

static int file_open(
	struct posix_store *store, const char *path, uint64_t bytes, struct ctg_error *error)
{
	struct stat st;
	int ret;

	store->fd = open(path, O_RDWR | O_CLOEXEC | O_NOCTTY);
	if (store->fd < 0 || fstat(store->fd, &st) != 0) {
		ret = -errno;
		posix_error(error, ret, "file: cannot open %s: %s", path, strerror(-ret));
		return ret;
	}
	ret = file_probe(store, path, &st, bytes, error);
	if (ret != 0)
		return ret;
	ret = posix_store_map_linear(store, FILE_BASE, bytes);
	if (ret != 0)
		posix_error(error, ret, "file: cannot map %llu MiB of %s: %s",
			(unsigned long long)(bytes >> 20), path, strerror(-ret));
	return ret;
}

int posix_file_open(
	struct posix_store *store, const char *path, uint64_t bytes, struct ctg_error *error)
{
	int ret;

	store->ops = &file_ops;
	store->backing = "file";
	store->physical = -1;
	store->physical_why = "a file or device: what lies behind its offsets is not known here";
	if (path[0] == '\0') {
		posix_error(error, -CTG_EINVAL, "file: no path given; use --backing file:PATH");
		return -CTG_EINVAL;
	}
	ret = file_open(store, path, bytes, error);
	if (ret != 0)
		posix_store_close(store);
	return ret;
}
