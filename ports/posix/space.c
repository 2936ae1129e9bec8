/* SPDX-License-Identifier: MIT */
/*
 * Address spaces: their lists of ranges, and the two conversions between lent and ordinary memory.
 *
 * A conversion works on whole chunks between posix_space_begin and posix_space_end, which keep
 * migrations out of them. While it copies, writers are kept out as they are for a migration;
 * readers go on. What decides is the chunk's bit in private_chunks: with it set the tlb hooks leave
 * the chunk's mapping alone, so the page table may be filled or emptied behind it.
 */
#define _GNU_SOURCE
#include "region.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

/* ---- lists of ranges --------------------------------------------------------------------- */

static struct posix_range *range_alloc(struct posix_space *space)
{
	return posix_meta_alloc(space->region, sizeof(struct posix_range), sizeof(uint64_t));
}

static void range_free(struct posix_space *space, struct posix_range *range)
{
	posix_meta_free(space->region, range, sizeof(*range));
}

bool posix_ranges_overlap(const struct posix_range *list, uint64_t addr, uint64_t bytes)
{
	for (; list != NULL; list = list->next)
		if (list->addr < addr + bytes && addr < list->addr + list->bytes)
			return true;
	return false;
}

int posix_ranges_add(struct posix_space *space, struct posix_range **list, uint64_t addr,
	uint64_t bytes, uint64_t since)
{
	struct posix_range *range = range_alloc(space), *spare = range_alloc(space);

	if (range == NULL || spare == NULL) {
		range_free(space, range);
		range_free(space, spare);
		return -CTG_ENOMEM;
	}
	spare->next = space->spare;
	space->spare = spare;
	*range = (struct posix_range){.addr = addr, .bytes = bytes, .since = since, .next = *list};
	*list = range;
	return 0;
}

/* A range for the right half of a split. There is one by for each range in a list; should ranges be
 * split more often than that, memory is waited for, since the caller cannot fail. */
static struct posix_range *range_spare(struct posix_space *space)
{
	const struct timespec pause = {.tv_nsec = 1000000};
	struct posix_range *spare = space->spare;

	if (spare != NULL) {
		space->spare = spare->next;
		return spare;
	}
	while ((spare = range_alloc(space)) == NULL)
		nanosleep(&pause, NULL);
	return spare;
}

static void spares_trim(struct posix_space *space)
{
	if (space->moving != NULL || space->exclusive != NULL)
		return;
	while (space->spare != NULL) {
		struct posix_range *spare = space->spare;

		space->spare = spare->next;
		range_free(space, spare);
	}
}

uint64_t posix_ranges_remove(
	struct posix_space *space, struct posix_range **list, uint64_t addr, uint64_t bytes)
{
	uint64_t since = UINT64_MAX, end = addr + bytes;
	struct posix_range **link = list;

	while (*link != NULL) {
		struct posix_range *range = *link;
		uint64_t range_end = range->addr + range->bytes;

		if (range->addr >= end || addr >= range_end) {
			link = &range->next;
			continue;
		}
		if (range->since < since)
			since = range->since;
		if (range->addr < addr && range_end > end) {
			struct posix_range *right = range_spare(space);

			*right = (struct posix_range){.addr = end,
				.bytes = range_end - end,
				.since = range->since,
				.next = range->next};
			range->bytes = addr - range->addr;
			range->next = right;
			link = &right->next;
		} else if (range->addr < addr) {
			range->bytes = addr - range->addr;
			link = &range->next;
		} else if (range_end > end) {
			range->addr = end;
			range->bytes = range_end - end;
			link = &range->next;
		} else {
			*link = range->next;
			range_free(space, range);
		}
	}
	spares_trim(space);
	return since;
}

/* ---- making and unmaking ----------------------------------------------------------------- */

int posix_space_init(struct posix_space *space, struct ctg_region *region)
{
	struct ctg_mm_config config = {
		.owner = space, .map_order = region->store[POSIX_FILE_REGION].map_order};
	int ret;

	if ((space->window | space->window_bytes) % POSIX_CHUNK != 0 || space->window_bytes == 0 ||
		space->window_bytes > UINT64_MAX - space->window || space->ops == NULL ||
		((space->window + space->window_bytes) >> CTG_PAGE_SHIFT) > CTG_MM_MAX_VPN)
		return -CTG_EINVAL;
	space->region = region;
	space->private_chunks = calloc(space->window_bytes / POSIX_CHUNK / 8 + 1, 1);
	if (space->private_chunks == NULL)
		return -CTG_ENOMEM;
	ret = ctg_mm_create(region->ctg, &config, &space->mm);
	if (ret != 0) {
		free(space->private_chunks);
		space->private_chunks = NULL;
		return ret;
	}
	pthread_mutex_init(&space->lock, NULL);
	pthread_cond_init(&space->settled, NULL);
	space->nr_maps = 1;
	return 0;
}

void posix_space_set_dead(struct posix_space *space)
{
	pthread_mutex_lock(&space->lock);
	space->dead = true;
	pthread_cond_broadcast(&space->settled);
	pthread_mutex_unlock(&space->lock);
}

static void ranges_free(struct posix_space *space, struct posix_range **list)
{
	while (*list != NULL) {
		struct posix_range *range = *list;

		*list = range->next;
		range_free(space, range);
	}
}

void posix_space_destroy(struct posix_space *space, bool dead)
{
	if (dead)
		posix_space_set_dead(space);
	/* Waits for migrations that have found this mm, so no hook runs on it afterwards. */
	ctg_mm_destroy(space->mm, dead);
	space->mm = NULL;
	pthread_mutex_lock(&space->lock);
	ranges_free(space, &space->moving);
	ranges_free(space, &space->exclusive);
	ranges_free(space, &space->spare);
	posix_space_settle(space);
	pthread_mutex_unlock(&space->lock);
	pthread_cond_destroy(&space->settled);
	pthread_mutex_destroy(&space->lock);
	free(space->private_chunks);
	space->private_chunks = NULL;
}

uint64_t posix_space_stall(struct posix_space *space, bool reset)
{
	uint64_t stall;

	pthread_mutex_lock(&space->lock);
	stall = space->stall_max_ns;
	if (reset)
		space->stall_max_ns = 0;
	pthread_mutex_unlock(&space->lock);
	return stall;
}

bool posix_space_is_private(struct posix_space *space, uint64_t addr)
{
	bool is_private;

	if (addr - space->window >= space->window_bytes)
		return true;
	pthread_mutex_lock(&space->lock);
	is_private = posix_chunk_private(space, posix_chunk_of(space, addr));
	pthread_mutex_unlock(&space->lock);
	return is_private;
}

void posix_space_set_private(
	struct posix_space *space, uint64_t addr, uint64_t bytes, bool is_private)
{
	pthread_mutex_lock(&space->lock);
	for (uint64_t at = addr; at < addr + bytes; at += POSIX_CHUNK) {
		uint64_t chunk = posix_chunk_of(space, at);
		unsigned char bit = (unsigned char)(1u << (chunk % 8));

		if (is_private)
			space->private_chunks[chunk / 8] |= bit;
		else
			space->private_chunks[chunk / 8] &= (unsigned char)~bit;
	}
	pthread_mutex_unlock(&space->lock);
}

int posix_space_begin(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	int ret = 0;

	pthread_mutex_lock(&space->lock);
	while (!space->dead && (posix_ranges_overlap(space->moving, addr, bytes) ||
				       posix_ranges_overlap(space->exclusive, addr, bytes)))
		pthread_cond_wait(&space->settled, &space->lock);
	if (space->dead)
		ret = -CTG_EINTR;
	else
		ret = posix_ranges_add(space, &space->exclusive, addr, bytes, 0);
	pthread_mutex_unlock(&space->lock);
	return ret;
}

void posix_space_end(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	pthread_mutex_lock(&space->lock);
	posix_ranges_remove(space, &space->exclusive, addr, bytes);
	pthread_cond_broadcast(&space->settled);
	pthread_mutex_unlock(&space->lock);
}

/* ---- conversions ------------------------------------------------------------------------- */

#define CONVERT_CHUNKS 8 /* in one go: writers wait for all of them */

static int check_chunks(const struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	if (bytes == 0 || (addr | bytes) % POSIX_CHUNK != 0 || addr < space->window ||
		bytes > space->window_bytes || addr - space->window > space->window_bytes - bytes)
		return -CTG_EINVAL;
	return 0;
}

/* Carry out operations that may fail. Returns how many were done. */
static size_t space_ops(struct posix_space *space, const struct posix_op *ops, size_t nr, int *err)
{
	int done;

	*err = 0;
	pthread_mutex_lock(&space->lock);
	done = space->dead ? -CTG_ENOENT : space->ops(space, ops, nr, err);
	pthread_mutex_unlock(&space->lock);
	if (done < 0) {
		*err = -CTG_EINTR;
		return 0;
	}
	return (size_t)done;
}

/* Is all of the chunk mapped and backed? */
static bool chunk_present(struct posix_space *space, uint64_t addr)
{
	ctg_vpn_t vpn = addr >> CTG_PAGE_SHIFT, end = vpn + POSIX_CHUNK_FRAMES;

	while (vpn < end) {
		struct ctg_mapping m;

		if (ctg_mm_lookup(space->mm, vpn, end - vpn, &m) != 0 || m.pfn == CTG_PFN_NONE)
			return false;
		vpn = m.vpn + m.nr;
	}
	return true;
}

/* A run of at most CONVERT_CHUNKS chunks, exclusively the caller's. Returns the bytes that were
 * done. */
static uint64_t privatise_run(struct posix_space *space, uint64_t addr, uint64_t bytes, int *ret)
{
	struct posix_op op[CONVERT_CHUNKS] = {0};
	size_t nr = bytes / POSIX_CHUNK, done;

	*ret = posix_guard_protect(space, addr, bytes);
	if (*ret != 0)
		return 0;
	for (size_t i = 0; i < nr; i++)
		op[i] = (struct posix_op){.kind = POSIX_OP_PRIVATISE,
			.addr = addr + i * POSIX_CHUNK,
			.bytes = POSIX_CHUNK,
			.prot = PROT_READ | PROT_WRITE};
	done = space_ops(space, op, nr, ret);
	/* Before writers go on and before the table is emptied: these are no longer lent. */
	if (done > 0)
		posix_space_set_private(space, addr, done * POSIX_CHUNK, true);
	posix_guard_release(space, addr, bytes);
	if (done > 0)
		ctg_munmap(space->mm, addr >> CTG_PAGE_SHIFT, done * POSIX_CHUNK_FRAMES);
	return done * POSIX_CHUNK;
}

int posix_space_privatise(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	uint64_t end = addr + bytes;
	int ret = check_chunks(space, addr, bytes);

	if (ret != 0)
		return ret;
	ret = posix_space_begin(space, addr, bytes);
	if (ret != 0)
		return ret;
	for (uint64_t at = addr, n = 0; at < end && ret == 0; at += n) {
		n = POSIX_CHUNK;
		if (posix_space_is_private(space, at))
			continue;
		if (!chunk_present(space, at)) {
			ret = -CTG_EINVAL;
			break;
		}
		while (at + n < end && n < CONVERT_CHUNKS * POSIX_CHUNK &&
			!posix_space_is_private(space, at + n) && chunk_present(space, at + n))
			n += POSIX_CHUNK;
		privatise_run(space, at, n, &ret);
	}
	posix_space_end(space, addr, bytes);
	return ret;
}

/*
 * Copy a chunk of ordinary memory into the frames that the table has for it, and map those. Only
 * the first operation may fail; nothing has changed then.
 */
static int lend_copy(struct posix_space *space, uint64_t addr)
{
	struct posix_op op[POSIX_CHUNK_FRAMES] = {0};
	ctg_vpn_t vpn = addr >> CTG_PAGE_SHIFT, end = vpn + POSIX_CHUNK_FRAMES;
	size_t nr = 0;
	int err, done;

	while (vpn < end) {
		struct ctg_mapping m;
		struct posix_store *store;
		uint64_t run;

		if (ctg_mm_lookup(space->mm, vpn, end - vpn, &m) != 0 || m.pfn == CTG_PFN_NONE)
			return -CTG_ENOMEM;
		store = posix_store_of(space->region, m.pfn);
		if (!posix_store_offset(store, m.pfn + (vpn - m.vpn), m.nr - (vpn - m.vpn),
			    &op[nr].offset, &run))
			abort(); /* the core has mapped a hole */
		op[nr].kind = POSIX_OP_LEND;
		op[nr].addr = vpn << CTG_PAGE_SHIFT;
		op[nr].bytes = run << CTG_PAGE_SHIFT;
		op[nr].file = (uint32_t)(store - space->region->store);
		op[nr].prot = PROT_READ | PROT_WRITE;
		nr++;
		vpn += run;
	}
	done = (int)space_ops(space, op, 1, &err);
	if (done != 1)
		return err;
	pthread_mutex_lock(&space->lock);
	for (size_t i = 1; i < nr; i += POSIX_MAX_OPS)
		posix_space_must(space, op + i, nr - i < POSIX_MAX_OPS ? nr - i : POSIX_MAX_OPS);
	pthread_mutex_unlock(&space->lock);
	return 0;
}

static int lend_chunk(struct posix_space *space, uint64_t addr)
{
	ctg_vpn_t vpn = addr >> CTG_PAGE_SHIFT;
	struct posix_op populate = {.kind = POSIX_OP_POPULATE, .addr = addr, .bytes = POSIX_CHUNK};
	int ret = ctg_mmap(space->mm, vpn, POSIX_CHUNK_FRAMES, CTG_PROT_READ | CTG_PROT_WRITE);

	if (ret != 0)
		return ret;
	ret = ctg_mm_populate(space->mm, vpn, POSIX_CHUNK_FRAMES, NULL);
	/* What is not there cannot be write-protected on kernels before 6.4. */
	if (ret == 0)
		(void)space_ops(space, &populate, 1, &ret);
	if (ret == 0)
		ret = posix_guard_protect(space, addr, POSIX_CHUNK);
	if (ret == 0) {
		ret = lend_copy(space, addr);
		/* Before writers go on, and before a hook looks at the chunk again. */
		if (ret == 0)
			posix_space_set_private(space, addr, POSIX_CHUNK, false);
		posix_guard_release(space, addr, POSIX_CHUNK);
	}
	if (ret != 0)
		ctg_munmap(space->mm, vpn, POSIX_CHUNK_FRAMES);
	return ret;
}

int posix_space_lend(struct posix_space *space, uint64_t addr, uint64_t bytes)
{
	int ret = check_chunks(space, addr, bytes);

	if (ret != 0)
		return ret;
	ret = posix_space_begin(space, addr, bytes);
	if (ret != 0)
		return ret;
	for (uint64_t at = addr; at < addr + bytes && ret == 0; at += POSIX_CHUNK)
		ret = posix_space_is_private(space, at) ? lend_chunk(space, at) : -CTG_EINVAL;
	posix_space_end(space, addr, bytes);
	return ret;
}
