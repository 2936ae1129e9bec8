/* SPDX-License-Identifier: MIT */
/* Opening and closing a region, and what can be asked about it. */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

/* Frames of the spill zone are numbered from the next multiple of this after the area's. */
#define SPILL_ALIGN ((ctg_pfn_t)1 << CTG_MAX_ORDER)

void posix_error(struct ctg_error *error, int code, const char *format, ...)
{
	va_list ap;

	if (error == NULL)
		return;
	error->code = code;
	va_start(ap, format);
	vsnprintf(error->text, sizeof(error->text), format, ap);
	va_end(ap);
}

unsigned char *posix_reserve(uint64_t bytes)
{
	unsigned char *p, *aligned;

	if (bytes > UINT64_MAX - POSIX_CHUNK)
		return NULL;
	p = mmap(NULL, bytes + POSIX_CHUNK, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		-1, 0);
	if (p == MAP_FAILED)
		return NULL;
	aligned = p + (-(uintptr_t)p & (POSIX_CHUNK - 1));
	if (aligned != p)
		munmap(p, (size_t)(aligned - p));
	munmap(aligned + bytes, POSIX_CHUNK - (size_t)(aligned - p));
	return aligned;
}

void posix_unreserve(void *addr, uint64_t bytes)
{
	if (addr != NULL)
		munmap(addr, bytes);
}

/* ---- stores ------------------------------------------------------------------------------ */

struct posix_store *posix_store_of(struct ctg_region *region, ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < POSIX_NR_FILES; i++)
		if (pfn - region->store[i].base < region->store[i].nr)
			return &region->store[i];
	return NULL;
}

bool posix_store_offset(const struct posix_store *store, ctg_pfn_t pfn, uint64_t nr,
	uint64_t *offset, uint64_t *run)
{
	uint64_t index = pfn - store->base, block = index / POSIX_CHUNK_FRAMES, n;

	if (index >= store->nr)
		return false;
	if (nr > store->nr - index)
		nr = store->nr - index;
	if (store->block == NULL) {
		*offset = index << CTG_PAGE_SHIFT;
		*run = nr;
		return true;
	}
	if (store->block[block] == POSIX_NO_BLOCK)
		return false;
	*offset = store->block[block] * POSIX_CHUNK +
		  ((index % POSIX_CHUNK_FRAMES) << CTG_PAGE_SHIFT);
	n = POSIX_CHUNK_FRAMES - index % POSIX_CHUNK_FRAMES;
	while (n < nr && store->block[block + 1] == store->block[block] + 1) {
		n += POSIX_CHUNK_FRAMES;
		block++;
	}
	*run = n < nr ? n : nr;
	return true;
}

void posix_store_close(struct posix_store *store)
{
	if (store->uffd >= 0)
		close(store->uffd);
	posix_unreserve(store->direct, store->nr << CTG_PAGE_SHIFT);
	if (store->metadata != NULL)
		munmap(store->metadata, store->metadata_bytes);
	if (store->fd >= 0)
		close(store->fd);
	posix_hugetlb_lower(store);
	free(store->block);
	free(store->ranges);
	*store = (struct posix_store){.fd = -1, .uffd = -1};
}

static int open_area(
	struct ctg_region *region, const char *backing, uint64_t bytes, struct ctg_error *error)
{
	struct posix_store *store = &region->store[POSIX_FILE_REGION];

	if (backing == NULL || strcmp(backing, "memfd") == 0)
		return posix_memfd_open(region, store, bytes, error);
	if (strcmp(backing, "hugetlb") == 0)
		return posix_hugetlb_open(region, store, bytes, error);
	if (strncmp(backing, "file:", 5) == 0)
		return posix_file_open(store, backing + 5, bytes, error);
	posix_error(error, -CTG_EINVAL,
		"unknown backing '%.64s'; there are memfd, hugetlb and file:PATH", backing);
	return -CTG_EINVAL;
}

static int open_spill(struct ctg_region *region, struct ctg_error *error)
{
	const struct posix_store *area = &region->store[POSIX_FILE_REGION];
	struct posix_store *spill = &region->store[POSIX_FILE_SPILL];
	ctg_pfn_t base = (area->base + area->nr + 2 * SPILL_ALIGN - 1) & ~(SPILL_ALIGN - 1);

	if (region->config.spill_bytes == 0)
		return 0;
	if (area->map_order != 0 &&
		posix_hugetlb_open_sparse(spill, base, region->config.spill_bytes) == 0)
		return 0;
	return posix_memfd_open_sparse(spill, base, region->config.spill_bytes, error);
}

/* ---- the machine over them --------------------------------------------------------------- */

static int add_zone(
	struct ctg_region *region, struct posix_store *store, unsigned flags, struct ctg_zone **out)
{
	struct ctg_zone_config config = {.base = store->base,
		.nr = store->nr,
		.flags = flags,
		.map_order = store->map_order};
	int ret;

	store->metadata_bytes = ctg_zone_metadata_bytes(store->nr);
	if (store->metadata_bytes == 0)
		return -CTG_EINVAL;
	store->metadata = mmap(NULL, store->metadata_bytes, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (store->metadata == MAP_FAILED) {
		store->metadata = NULL;
		return -CTG_ENOMEM;
	}
	config.metadata = store->metadata;
	ret = ctg_zone_add(region->ctg, &config, out);
	for (size_t i = 0; i < store->nr_ranges && ret == 0; i++)
		ret = ctg_zone_populate(*out, store->ranges[i].pfn, store->ranges[i].nr);
	return ret;
}

static int build_machine(struct ctg_region *region)
{
	struct posix_store *area = &region->store[POSIX_FILE_REGION];
	struct posix_store *spill = &region->store[POSIX_FILE_SPILL];
	/* What a file held before is not known to be zero. */
	struct ctg_cma_config config = {.name = region->name,
		.ranges = area->ranges,
		.nr_ranges = area->nr_ranges,
		.zeroed = strcmp(area->backing, "file") != 0};
	int ret;

	region->port.host = region;
	posix_host_hooks(&region->port);
	region->port.copy = posix_copy;
	region->port.zero = posix_zero;
	region->port.discard = posix_discard;
	region->port.tlb_restrict = posix_tlb_restrict;
	region->port.tlb_install = posix_tlb_install;
	ret = ctg_create(&region->port, &region->ctg);
	if (ret == 0)
		ret = add_zone(region, area, 0, &region->zone);
	if (ret == 0 && spill->nr != 0) {
		ret = add_zone(
			region, spill, CTG_ZONE_SPILL | CTG_ZONE_DISCARD, &region->spill_zone);
		if (ret == 0)
			ret = ctg_zone_release(region->spill_zone, spill->base, spill->nr, true);
	}
	if (ret == 0)
		ret = ctg_cma_create(region->ctg, &config, &region->area);
	return ret;
}

/* How writers of this process, and probably of others of this user, are kept out of a move. */
static void choose_guard(struct ctg_region *region)
{
	bool kernel_faults;
	int uffd = posix_uffd_open(&kernel_faults);

	region->guard = POSIX_GUARD_STOP;
	if (region->config.force_stop)
		snprintf(region->guard_why, sizeof(region->guard_why), "asked for");
	else if (uffd < 0)
		snprintf(region->guard_why, sizeof(region->guard_why),
			"no userfaultfd with write protection of shared memory here: %s",
			strerror(-uffd));
	else if (!kernel_faults)
		snprintf(region->guard_why, sizeof(region->guard_why),
			"userfaultfd may not serve system calls: run as root, or "
			"echo 1 > /proc/sys/vm/unprivileged_userfaultfd");
	else
		region->guard = POSIX_GUARD_UFFD;
	if (region->guard == POSIX_GUARD_UFFD)
		snprintf(region->guard_why, sizeof(region->guard_why),
			"write protection, also against system calls");
	if (uffd >= 0)
		close(uffd);
}

int posix_region_stopper(struct ctg_region *region, struct posix_stopper **out)
{
	int ret = 0;

	pthread_mutex_lock(&region->stopper_lock);
	if (region->stopper == NULL) {
		ret = posix_stopper_start(&region->stopper);
		/* Where only ancestors may trace (Yama), this process must allow it. */
		if (ret == 0)
			prctl(PR_SET_PTRACER, (unsigned long)posix_stopper_pid(region->stopper), 0,
				0, 0);
	}
	*out = region->stopper;
	pthread_mutex_unlock(&region->stopper_lock);
	return ret;
}

/* ---- open and close ---------------------------------------------------------------------- */

static int check_config(const struct ctg_region_config *config, struct ctg_error *error)
{
	uint64_t total = posix_meminfo("MemTotal");

	if (config->bytes == 0 || config->bytes % POSIX_CHUNK != 0 ||
		config->bytes > UINT64_MAX / 8) {
		posix_error(error, -CTG_EINVAL,
			"region: %" PRIu64
			" bytes is not a size: give a multiple of 2 MiB above zero",
			config->bytes);
		return -CTG_EINVAL;
	}
	if (config->spill_bytes != CTG_SPILL_DEFAULT &&
		(config->spill_bytes % POSIX_CHUNK != 0 || config->spill_bytes > UINT64_MAX / 8)) {
		posix_error(error, -CTG_EINVAL,
			"spill: %" PRIu64
			" bytes is not a size: give a multiple of 2 MiB, or 0 for none",
			config->spill_bytes);
		return -CTG_EINVAL;
	}
	if (config->copy_threads > POSIX_MAX_COPY_THREADS) {
		posix_error(error, -CTG_EINVAL, "copy threads: %u is more than %d",
			config->copy_threads, POSIX_MAX_COPY_THREADS);
		return -CTG_EINVAL;
	}
	if (config->name != NULL &&
		(config->name[0] == '\0' || strlen(config->name) >= CTG_CMA_NAME_MAX)) {
		posix_error(error, -CTG_EINVAL, "region: a name has 1 to %d bytes",
			CTG_CMA_NAME_MAX - 1);
		return -CTG_EINVAL;
	}
	/* A file or device may be larger than memory; its own size is checked when it is opened. */
	if (config->bytes > total &&
		(config->backing == NULL || strncmp(config->backing, "file:", 5) != 0)) {
		posix_error(error, -CTG_ENOMEM,
			"region: %" PRIu64 " MiB is more than the %" PRIu64
			" MiB of memory this machine has; use a smaller one",
			config->bytes >> 20, total >> 20);
		return -CTG_ENOMEM;
	}
	return 0;
}

static void fill_config(struct ctg_region *region, const struct ctg_region_config *config)
{
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	uint64_t max_maps = posix_read_number("/proc/sys/vm/max_map_count");

	region->config = *config;
	region->config.backing = region->config.name = NULL;
	snprintf(region->name, sizeof(region->name), "%s",
		config->name == NULL ? "region" : config->name);
	if (config->spill_bytes == CTG_SPILL_DEFAULT)
		region->config.spill_bytes = config->bytes;
	if (config->copy_threads == 0)
		region->config.copy_threads = cpus < 1 ? 1 : cpus > 4 ? 4 : (unsigned)cpus;
	if (max_maps == UINT64_MAX)
		max_maps = 65530;
	region->map_budget = config->map_budget != 0 ? config->map_budget : max_maps / 4 * 3;
}

static int region_build(
	struct ctg_region *region, const struct ctg_region_config *config, struct ctg_error *error)
{
	struct posix_stopper *stopper;
	int ret;

	choose_guard(region);
	/* Before there is memory that the stopper's process should not have. */
	if (region->guard == POSIX_GUARD_STOP) {
		ret = posix_region_stopper(region, &stopper);
		if (ret != 0) {
			posix_error(error, ret, "cannot start the process that stops threads: %s",
				strerror(-ret));
			return ret;
		}
	}
	ret = posix_meta_init(region);
	if (ret == 0)
		ret = posix_copier_start(region, region->config.copy_threads);
	if (ret != 0) {
		posix_error(error, ret, "region: out of memory");
		return ret;
	}
	ret = open_area(region, config->backing, config->bytes, error);
	if (ret == 0)
		ret = open_spill(region, error);
	if (ret != 0)
		return ret;
	ret = build_machine(region);
	if (ret != 0)
		posix_error(error, ret, "region: cannot set up %" PRIu64 " MiB: %s",
			config->bytes >> 20, strerror(-ret));
	return ret;
}

int ctg_region_open(
	const struct ctg_region_config *config, struct ctg_region **out, struct ctg_error *error)
{
	struct ctg_region *region;
	int ret = check_config(config, error);

	if (ret != 0)
		return ret;
	region = calloc(1, sizeof(*region));
	if (region == NULL) {
		posix_error(error, -CTG_ENOMEM, "region: out of memory");
		return -CTG_ENOMEM;
	}
	for (unsigned i = 0; i < POSIX_NR_FILES; i++)
		region->store[i] = (struct posix_store){.fd = -1, .uffd = -1};
	pthread_mutex_init(&region->stopper_lock, NULL);
	pthread_mutex_init(&region->local_lock, NULL);
	fill_config(region, config);
	ret = region_build(region, config, error);
	if (ret != 0) {
		ctg_region_close(region);
		return ret;
	}
	*out = region;
	return 0;
}

void ctg_region_close(struct ctg_region *region)
{
	if (region == NULL)
		return;
	posix_local_end(region);
	ctg_destroy(region->ctg);
	posix_copier_end(region);
	posix_stopper_end(region->stopper);
	for (unsigned i = 0; i < POSIX_NR_FILES; i++)
		posix_store_close(&region->store[i]);
	posix_meta_end(region);
	pthread_mutex_destroy(&region->local_lock);
	pthread_mutex_destroy(&region->stopper_lock);
	free(region);
}

/* ---- what can be asked ------------------------------------------------------------------- */

struct ctg *ctg_region_machine(struct ctg_region *region)
{
	return region->ctg;
}

struct ctg_cma *ctg_region_area(struct ctg_region *region)
{
	return region->area;
}

struct ctg_zone *ctg_region_spill(struct ctg_region *region)
{
	return region->spill_zone;
}

int posix_region_files(struct ctg_region *region, int files[POSIX_NR_FILES])
{
	int n = 0;

	for (unsigned i = 0; i < POSIX_NR_FILES; i++) {
		files[i] = region->store[i].fd;
		n += files[i] >= 0;
	}
	return n;
}

void ctg_region_info(struct ctg_region *region, struct ctg_region_info *out)
{
	const struct posix_store *area = &region->store[POSIX_FILE_REGION];
	const struct posix_store *spill = &region->store[POSIX_FILE_SPILL];
	struct stat st;

	*out = (struct ctg_region_info){.backing = area->backing,
		.bytes = region->config.bytes,
		.spill_bytes = spill->nr << CTG_PAGE_SHIFT,
		.map_order = area->map_order,
		.guard = region->guard == POSIX_GUARD_UFFD ? "userfaultfd" : "stop",
		.guard_why = region->guard_why,
		.physical = area->physical,
		.physical_why = area->physical_why};
	/* st_blocks of a sparse file is what it uses, of hugetlb too. */
	if (spill->fd >= 0 && fstat(spill->fd, &st) == 0)
		out->spill_used_bytes = (uint64_t)st.st_blocks * 512;
}

void *ctg_region_address(struct ctg_region *region, ctg_pfn_t pfn)
{
	const struct posix_store *store = posix_store_of(region, pfn);
	uint64_t offset, run;

	if (store == NULL || !posix_store_offset(store, pfn, 1, &offset, &run))
		return NULL;
	return posix_store_address(store, pfn);
}

int ctg_region_fd(struct ctg_region *region, ctg_pfn_t pfn, uint64_t max, int *fd, uint64_t *offset,
	uint64_t *nr)
{
	const struct posix_store *store = posix_store_of(region, pfn);
	uint64_t run;

	if (store == NULL || !posix_store_offset(store, pfn, max, offset, &run))
		return -CTG_EINVAL;
	*fd = store->fd;
	if (nr != NULL)
		*nr = run;
	return 0;
}

/* Frames [pfn, pfn + nr) by pagemap, in pieces; hugetlb's are looked at a huge page at a time. */
int ctg_region_physical(struct ctg_region *region, ctg_pfn_t pfn, uint64_t nr, uint64_t *phys)
{
	const struct posix_store *store = posix_store_of(region, pfn);
	uint64_t first = 0, number[256], offset, run;

	if (store == NULL || nr == 0 || nr > store->nr - (pfn - store->base))
		return -CTG_EINVAL;
	for (uint64_t done = 0, n; done < nr; done += n) {
		n = nr - done < 256 ? nr - done : 256;
		if (!posix_store_offset(store, pfn + done, n, &offset, &run))
			return -CTG_EINVAL;
		if (posix_pagemap(
			    posix_store_address(store, pfn + done), n, CTG_PAGE_SIZE, number) != 0)
			return -CTG_EPERM;
		if (done == 0) {
			first = number[0];
			if (phys != NULL)
				*phys = first;
		}
		for (uint64_t i = 0; i < n; i++)
			if (number[i] != first + done + i)
				return 0;
	}
	return 1;
}
