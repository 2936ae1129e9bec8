/* SPDX-License-Identifier: MIT */
/* The space of the process that has the region: ctg_region_map and ctg_region_alloc. */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Addresses are cheap, and fragments of them would be the only reason to refuse. */
#define LOCAL_WINDOW_FACTOR 4
#define LOCAL_WINDOW_MIN ((uint64_t)1 << 30)

static int local_ops(struct posix_space *space, const struct posix_op *ops, size_t nr, int *err)
{
	int files[POSIX_NR_FILES];

	posix_region_files(space->region, files);
	return posix_ops_execute(files, ops, nr, err);
}

static void local_free(struct ctg_region *region, struct posix_space *space)
{
	posix_unreserve((void *)(uintptr_t)space->window, space->window_bytes);
	if (space->uffd >= 0)
		close(space->uffd);
	free(region->local_used);
	region->local_used = NULL;
	free(space);
}

/* The least window that serves: shrunk until addresses can be had. */
static int local_window(struct ctg_region *region, struct posix_space *space)
{
	uint64_t bytes = region->config.bytes * LOCAL_WINDOW_FACTOR;

	if (bytes < LOCAL_WINDOW_MIN)
		bytes = LOCAL_WINDOW_MIN;
	for (; bytes >= region->config.bytes; bytes /= 2) {
		bytes = bytes / POSIX_CHUNK * POSIX_CHUNK;
		space->window = (uint64_t)(uintptr_t)posix_reserve(bytes);
		space->window_bytes = bytes;
		if (space->window != 0)
			return 0;
	}
	return -CTG_ENOMEM;
}

static int local_make(struct ctg_region *region, struct posix_space *space)
{
	bool kernel_faults;
	int ret = local_window(region, space);

	if (ret != 0)
		return ret;
	space->guard = region->guard;
	if (space->guard == POSIX_GUARD_UFFD) {
		space->uffd = posix_uffd_open(&kernel_faults);
		if (space->uffd < 0)
			return space->uffd;
	}
	region->local_used = calloc(space->window_bytes / POSIX_CHUNK / 8 + 1, 1);
	if (region->local_used == NULL)
		return -CTG_ENOMEM;
	return posix_space_init(space, region);
}

/* local_lock held */
static int local_space(struct ctg_region *region, struct posix_space **out)
{
	struct posix_space *space = region->local;
	int ret;

	if (space == NULL) {
		space = calloc(1, sizeof(*space));
		if (space == NULL)
			return -CTG_ENOMEM;
		space->pid = getpid();
		space->local = true;
		space->uffd = -1;
		space->ops = local_ops;
		ret = local_make(region, space);
		if (ret != 0) {
			local_free(region, space);
			return ret;
		}
		region->local = space;
	}
	*out = space;
	return 0;
}

void posix_local_end(struct ctg_region *region)
{
	struct posix_space *space = region->local;

	if (space == NULL)
		return;
	posix_space_destroy(space, false);
	region->local = NULL;
	local_free(region, space);
}

static bool chunk_used(const struct ctg_region *region, uint64_t chunk)
{
	return (region->local_used[chunk / 8] >> (chunk % 8) & 1) != 0;
}

static void chunks_mark(struct ctg_region *region, uint64_t chunk, uint64_t nr, bool used)
{
	for (; nr > 0; chunk++, nr--) {
		if (used)
			region->local_used[chunk / 8] |= (unsigned char)(1u << (chunk % 8));
		else
			region->local_used[chunk / 8] &= (unsigned char)~(1u << (chunk % 8));
	}
}

/* First fit. UINT64_MAX: none. */
static uint64_t chunks_find(const struct ctg_region *region, uint64_t nr)
{
	uint64_t all = region->local->window_bytes / POSIX_CHUNK, run = 0;

	for (uint64_t chunk = 0; chunk < all; chunk++) {
		run = chunk_used(region, chunk) ? 0 : run + 1;
		if (run == nr)
			return chunk + 1 - nr;
	}
	return UINT64_MAX;
}

static bool chunk_empty(struct posix_space *space, uint64_t chunk)
{
	ctg_vpn_t vpn = (space->window + chunk * POSIX_CHUNK) >> CTG_PAGE_SHIFT;
	struct ctg_mapping m;

	return ctg_mm_lookup(space->mm, vpn, POSIX_CHUNK_FRAMES, &m) == 0 &&
	       m.pfn == CTG_PFN_NONE && !m.reserved && m.nr - (vpn - m.vpn) >= POSIX_CHUNK_FRAMES;
}

/* Chunks that have nothing mapped any more may be used again. local_lock held. */
static void chunks_reclaim(struct ctg_region *region, uint64_t addr, uint64_t bytes)
{
	struct posix_space *space = region->local;
	uint64_t first = posix_chunk_of(space, addr),
		 last = posix_chunk_of(space, addr + bytes - 1);

	for (uint64_t chunk = first; chunk <= last; chunk++)
		if (chunk_empty(space, chunk))
			chunks_mark(region, chunk, 1, false);
}

int ctg_region_map(struct ctg_region *region, size_t bytes, void **addr)
{
	uint64_t granule =
		region->store[POSIX_FILE_REGION].map_order != 0 ? POSIX_CHUNK : CTG_PAGE_SIZE;
	uint64_t chunk = UINT64_MAX, at, chunks;
	struct posix_space *space;
	int ret;

	if (bytes == 0 || bytes % granule != 0)
		return -CTG_EINVAL;
	if (bytes > region->config.bytes)
		return -CTG_ENOMEM;
	chunks = (bytes + POSIX_CHUNK - 1) / POSIX_CHUNK;
	pthread_mutex_lock(&region->local_lock);
	ret = local_space(region, &space);
	if (ret == 0) {
		chunk = chunks_find(region, chunks);
		if (chunk == UINT64_MAX)
			ret = -CTG_ENOMEM;
		else
			chunks_mark(region, chunk, chunks, true);
	}
	pthread_mutex_unlock(&region->local_lock);
	if (ret != 0)
		return ret;
	at = space->window + chunk * POSIX_CHUNK;
	ret = ctg_mmap(space->mm, at >> CTG_PAGE_SHIFT, bytes >> CTG_PAGE_SHIFT,
		CTG_PROT_READ | CTG_PROT_WRITE);
	if (ret == 0)
		ret = ctg_mm_populate(
			space->mm, at >> CTG_PAGE_SHIFT, bytes >> CTG_PAGE_SHIFT, NULL);
	if (ret != 0) {
		ctg_munmap(space->mm, at >> CTG_PAGE_SHIFT, bytes >> CTG_PAGE_SHIFT);
		pthread_mutex_lock(&region->local_lock);
		chunks_reclaim(region, at, bytes);
		pthread_mutex_unlock(&region->local_lock);
		return ret;
	}
	*addr = (void *)(uintptr_t)at;
	return 0;
}

int ctg_region_unmap(struct ctg_region *region, void *addr, size_t bytes)
{
	struct posix_space *space;
	uint64_t at = (uint64_t)(uintptr_t)addr;
	int ret = -CTG_EINVAL;

	pthread_mutex_lock(&region->local_lock);
	space = region->local;
	pthread_mutex_unlock(&region->local_lock);
	if (space == NULL || bytes == 0 || (at | bytes) % CTG_PAGE_SIZE != 0 ||
		at < space->window || bytes > space->window_bytes ||
		at - space->window > space->window_bytes - bytes)
		return -CTG_EINVAL;
	ret = ctg_munmap(space->mm, at >> CTG_PAGE_SHIFT, bytes >> CTG_PAGE_SHIFT);
	if (ret != 0)
		return ret;
	pthread_mutex_lock(&region->local_lock);
	chunks_reclaim(region, at, bytes);
	pthread_mutex_unlock(&region->local_lock);
	return 0;
}

int ctg_region_alloc(struct ctg_region *region, uint64_t bytes,
	const struct ctg_alloc_request *request, struct ctg_buffer *out)
{
	/*
	 * The caller's request and report may lie in lent memory, which the allocation writes to
	 * while it is moving that very page: work on copies.
	 */
	struct ctg_alloc_request own = {0};
	struct ctg_alloc_report report = {0}, *wanted = NULL;
	uint64_t nr;
	ctg_pfn_t pfn;
	int ret;

	if (request != NULL) {
		own = *request;
		wanted = request->report;
	}
	own.report = &report;
	if (bytes == 0 || bytes > UINT64_MAX - CTG_PAGE_SIZE)
		ret = -CTG_EINVAL;
	else {
		nr = (bytes + CTG_PAGE_SIZE - 1) >> CTG_PAGE_SHIFT;
		ret = ctg_cma_alloc(region->area, nr, &own, &pfn);
	}
	if (ret == 0)
		*out = (struct ctg_buffer){.pfn = pfn,
			.bytes = nr << CTG_PAGE_SHIFT,
			.address = ctg_region_address(region, pfn)};
	else
		report.result = ret;
	if (wanted != NULL)
		*wanted = report;
	return ret;
}

int ctg_region_release(struct ctg_region *region, const struct ctg_buffer *buffer)
{
	if (buffer == NULL || buffer->bytes == 0 || buffer->bytes % CTG_PAGE_SIZE != 0)
		return -CTG_EINVAL;
	return ctg_cma_release(region->area, buffer->pfn, buffer->bytes >> CTG_PAGE_SHIFT, NULL);
}
