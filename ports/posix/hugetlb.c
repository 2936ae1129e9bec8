/* SPDX-License-Identifier: MIT */
/*
 * Stores in 2 MiB pages of hugetlb.
 *
 * The region's: more pages than needed are faulted in, their physical frame numbers read, the
 * longest physical runs kept and the rest given back. The pfns of the core ARE the physical frame
 * numbers, so that a run of pfns is physically contiguous by construction; between the runs there
 * are holes. The file's blocks come in another order, hence the table store->block.
 *
 * Pages come out of the pool of free huge pages, or beyond that are surplus pages, which the kernel
 * makes on demand up to nr_overcommit_hugepages and takes back with the last mapping. Root may
 * raise that limit; it is lowered again as soon as the pages are there. nr_hugepages is never
 * touched: pages reserved so would outlive a crash.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define POOL "/sys/kernel/mm/hugepages/hugepages-2048kB/"
#define HUGETLB_BASE ((ctg_pfn_t)0x100000)
#define LOOK_MAX 64u /* times the size of the region */
/* Free memory in pieces: a buffer that the area cannot hold is worse than a slow start. */
#define GROW_MAX_NS UINT64_C(30000000000)
#define GROW_NS UINT64_C(500000000)
#define GROW_PAGE_NS UINT64_C(2000000)
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif

/* Huge pages that can be had now without and with surplus ones. */
static uint64_t pool_free(void)
{
	uint64_t nr_free = posix_read_number(POOL "free_hugepages");
	uint64_t reserved = posix_read_number(POOL "resv_hugepages");

	if (nr_free == UINT64_MAX || reserved == UINT64_MAX || reserved > nr_free)
		return 0;
	return nr_free - reserved;
}

static uint64_t pool_surplus_left(void)
{
	uint64_t limit = posix_read_number(POOL "nr_overcommit_hugepages");
	uint64_t used = posix_read_number(POOL "surplus_hugepages");

	if (limit == UINT64_MAX || used == UINT64_MAX || used >= limit)
		return 0;
	return limit - used;
}

/* The limit is read and written in two steps, by every region of the machine: one at a time. A lock
 * that cannot be had (it is no more than good manners between us) changes nothing. */
static int pool_lock(void)
{
	int fd = open(POOL "nr_overcommit_hugepages", O_RDONLY | O_CLOEXEC);

	if (fd >= 0)
		(void)flock(fd, LOCK_EX);
	return fd;
}

static void pool_unlock(int lock)
{
	if (lock >= 0)
		close(lock);
}

/*
 * Let `pages` more surplus pages be made, on top of what others may have been promised: what a
 * region has raised stays so until it is closed. Returns by how much the limit was raised.
 */
static uint64_t pool_raise(uint64_t pages)
{
	int lock = pool_lock();
	uint64_t used = posix_read_number(POOL "surplus_hugepages");
	uint64_t limit = posix_read_number(POOL "nr_overcommit_hugepages");
	uint64_t want = (limit > used ? limit : used) + pages;

	if (limit == UINT64_MAX || used == UINT64_MAX ||
		posix_write_number(POOL "nr_overcommit_hugepages", want) != 0)
		want = limit;
	pool_unlock(lock);
	return want - limit;
}

/* Others may have raised or lowered it since, so take back only what was added. */
static void pool_lower(uint64_t raised)
{
	uint64_t limit;
	int lock;

	if (raised == 0)
		return;
	lock = pool_lock();
	limit = posix_read_number(POOL "nr_overcommit_hugepages");
	if (limit != UINT64_MAX)
		posix_write_number(
			POOL "nr_overcommit_hugepages", limit > raised ? limit - raised : 0);
	pool_unlock(lock);
}

void posix_hugetlb_lower(struct posix_store *store)
{
	pool_lower(store->raised);
	store->raised = 0;
}

int posix_pagemap(const void *addr, uint64_t nr, uint64_t page, uint64_t *pfn)
{
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	int ret = 0;

	if (fd < 0)
		return -CTG_EPERM;
	/* The entries of 4 KiB pages follow each other. */
	if (page == CTG_PAGE_SIZE) {
		size_t bytes = nr * sizeof(*pfn);

		if (pread(fd, pfn, bytes, (off_t)((uintptr_t)addr / page * sizeof(*pfn))) !=
			(ssize_t)bytes)
			ret = -CTG_EPERM;
	}
	for (uint64_t i = 0; i < nr && ret == 0; i++) {
		uint64_t entry = page == CTG_PAGE_SIZE ? pfn[i] : 0;
		uint64_t at = ((uint64_t)(uintptr_t)addr + i * page) >> CTG_PAGE_SHIFT;

		if (page != CTG_PAGE_SIZE && pread(fd, &entry, sizeof(entry),
						     (off_t)(at * sizeof(entry))) != sizeof(entry))
			ret = -CTG_EPERM;
		/* Without CAP_SYS_ADMIN the number reads as 0; bit 63: present. */
		if ((entry >> 63) == 0 || (entry & (((uint64_t)1 << 55) - 1)) == 0)
			ret = -CTG_EPERM;
		pfn[i] = entry & (((uint64_t)1 << 55) - 1);
	}
	close(fd);
	return ret;
}

static const struct posix_store_ops hugetlb_ops = {.name = "hugetlb"};

/* A page of the file and where it lies. */
struct huge_page {
	uint64_t pfn;
	uint32_t block; /* of the file */
};

struct huge_run {
	uint32_t first; /* index into the sorted pages */
	uint32_t nr;
};

struct huge_set {
	struct huge_page *page;
	uint32_t nr, max;
	struct huge_run *run; /* longest first */
	uint32_t nr_runs;
	uint64_t extra; /* by so much the limit was raised for pages that are given back */
};

static int by_pfn(const void *a, const void *b)
{
	const struct huge_page *x = a, *y = b;

	return x->pfn < y->pfn ? -1 : x->pfn > y->pfn;
}

static int by_length(const void *a, const void *b)
{
	const struct huge_run *x = a, *y = b;

	if (x->nr != y->nr)
		return x->nr > y->nr ? -1 : 1;
	return x->first < y->first ? -1 : x->first > y->first;
}

static int by_first(const void *a, const void *b)
{
	const struct huge_run *x = a, *y = b;

	return x->first < y->first ? -1 : x->first > y->first;
}

/* Sort the pages and find the runs. */
static void set_find_runs(struct huge_set *set)
{
	qsort(set->page, set->nr, sizeof(*set->page), by_pfn);
	set->nr_runs = 0;
	for (uint32_t i = 0; i < set->nr; i++) {
		struct huge_run *last = set->nr_runs > 0 ? &set->run[set->nr_runs - 1] : NULL;

		if (last != NULL && set->page[i].pfn == set->page[i - 1].pfn + POSIX_CHUNK_FRAMES)
			last->nr++;
		else
			set->run[set->nr_runs++] = (struct huge_run){.first = i, .nr = 1};
	}
	qsort(set->run, set->nr_runs, sizeof(*set->run), by_length);
}

/* How many of the longest runs hold `want` pages; 0: not even all that an area may have. */
static uint32_t set_runs_for(const struct huge_set *set, uint64_t want)
{
	uint64_t have = 0;

	for (uint32_t i = 0; i < set->nr_runs && i < CTG_CMA_MAX_RANGES; i++) {
		have += set->run[i].nr;
		if (have >= want)
			return i + 1;
	}
	return 0;
}

struct grow_job {
	int fd;
	unsigned char *addr;
	off_t offset;
};

/* Make one page. A fault could not say that there is no memory but by a signal. */
static int grow_piece(void *arg, size_t piece)
{
	const struct grow_job *job = arg;
	unsigned char *p = job->addr + piece * POSIX_CHUNK;

	if (madvise(p, POSIX_CHUNK, MADV_POPULATE_WRITE) == 0)
		return 0;
	if (errno != EINVAL)
		return -CTG_ENOMEM;
	/* Before 5.14. */
	if (fallocate(job->fd, 0, job->offset + (off_t)(piece * POSIX_CHUNK), (off_t)POSIX_CHUNK) !=
		0)
		return -CTG_ENOMEM;
	(void)*(volatile unsigned char *)p;
	return 0;
}

/* Fault blocks [set->nr, to) of the file in and learn where they are. Clearing them takes the time.
 */
static int set_grow(
	struct ctg_region *region, struct posix_store *store, struct huge_set *set, uint32_t to)
{
	uint32_t nr = to - set->nr;
	struct grow_job job = {.fd = store->fd, .offset = (off_t)(set->nr * POSIX_CHUNK)};
	uint64_t *pfn = calloc(nr, sizeof(*pfn));
	int ret;

	job.addr = mmap(NULL, nr * POSIX_CHUNK, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE,
		store->fd, job.offset);
	if (job.addr == MAP_FAILED || pfn == NULL) {
		ret = -CTG_ENOMEM;
	} else {
		ret = posix_copier_run(region, grow_piece, &job, nr);
		if (ret == 0)
			ret = posix_pagemap(job.addr, nr, POSIX_CHUNK, pfn);
	}
	if (ret == 0 || ret == -CTG_EPERM) {
		for (uint32_t i = 0; i < nr; i++)
			set->page[set->nr + i] =
				(struct huge_page){.pfn = pfn[i], .block = set->nr + i};
		set->nr = to;
	}
	if (job.addr != MAP_FAILED)
		munmap(job.addr, nr * POSIX_CHUNK);
	free(pfn);
	return ret;
}

/* May `step` more pages be looked at? */
static bool set_may_grow(const struct huge_set *set, uint32_t step)
{
	return step > 0 && set->nr + step <= set->max &&
	       (pool_free() >= step || posix_meminfo("MemAvailable") / 4 >= step * POSIX_CHUNK);
}

/* Until when to look for longer runs than there are. */
static uint64_t set_patience(const struct huge_set *set, uint32_t want, uint64_t start)
{
	/* Too few long ones to make an area at all, or one that large buffers do not fit in. */
	if (set_runs_for(set, want) == 0 || set->run[0].nr < want / 4 * 3)
		return start + GROW_MAX_NS;
	return start + GROW_NS + want * GROW_PAGE_NS;
}

/*
 * Take pages until the longest run holds the whole region, or patience or memory runs short; what
 * is beyond the first `want` is a bonus. The kernel hands out its smallest fragments first, so the
 * long runs come late. -CTG_EPERM: the numbers cannot be known, `want` pages are there.
 */
static int set_collect(
	struct ctg_region *region, struct posix_store *store, struct huge_set *set, uint32_t want)
{
	uint32_t step = want / 4 > 0 ? want / 4 : 1;
	uint64_t start = posix_now(NULL);
	int ret = set_grow(region, store, set, want);

	if (ret != 0)
		return ret;
	set_find_runs(set);
	while (set->run[0].nr < want && set_may_grow(set, step) &&
		posix_now(NULL) < set_patience(set, want, start)) {
		set->extra += pool_free() < step ? pool_raise(step - pool_free()) : 0;
		if (set_grow(region, store, set, set->nr + step) != 0)
			break;
		set_find_runs(set);
		step = set->nr / 4 < set->max - set->nr ? set->nr / 4 : set->max - set->nr;
	}
	return 0;
}

/* Keep the runs that hold `want` pages: fill store->ranges, block and base; punch out the rest. */
static int set_keep(struct posix_store *store, struct huge_set *set, uint32_t want)
{
	uint32_t runs = set_runs_for(set, want);
	uint64_t left = want, last;
	unsigned char *kept = calloc(set->nr, 1);

	store->ranges = calloc(runs, sizeof(*store->ranges));
	if (store->ranges == NULL || kept == NULL) {
		free(kept);
		return -CTG_ENOMEM;
	}
	for (uint32_t i = 0; i < runs; i++) {
		if (set->run[i].nr > left)
			set->run[i].nr = (uint32_t)left;
		left -= set->run[i].nr;
	}
	qsort(set->run, runs, sizeof(*set->run), by_first);
	store->base = set->page[set->run[0].first].pfn;
	last = set->page[set->run[runs - 1].first].pfn + set->run[runs - 1].nr * POSIX_CHUNK_FRAMES;
	store->nr = last - store->base;
	store->block_bytes = store->nr / POSIX_CHUNK_FRAMES * sizeof(*store->block);
	store->block = malloc(store->block_bytes);
	if (store->block == NULL) {
		free(kept);
		return -CTG_ENOMEM;
	}
	memset(store->block, 0xff, store->block_bytes);
	for (uint32_t i = 0; i < runs; i++) {
		const struct huge_page *page = &set->page[set->run[i].first];

		store->ranges[i] = (struct ctg_extent){
			.pfn = page->pfn, .nr = set->run[i].nr * POSIX_CHUNK_FRAMES};
		for (uint32_t k = 0; k < set->run[i].nr; k++) {
			store->block[(page[k].pfn - store->base) / POSIX_CHUNK_FRAMES] =
				page[k].block;
			kept[page[k].block] = 1;
		}
	}
	store->nr_ranges = runs;
	/* In the order of their frames: so they merge, and are handed out next time. */
	for (uint32_t i = 0; i < set->nr; i++)
		if (!kept[set->page[i].block])
			fallocate(store->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
				(off_t)(set->page[i].block * POSIX_CHUNK), (off_t)POSIX_CHUNK);
	free(kept);
	return 0;
}

/* The direct map, in the order of the frames; blocks that follow each other in one go. */
static int hugetlb_map(struct posix_store *store)
{
	uint64_t blocks = store->nr / POSIX_CHUNK_FRAMES;

	store->direct = posix_reserve(store->nr << CTG_PAGE_SHIFT);
	if (store->direct == NULL)
		return -CTG_ENOMEM;
	for (uint64_t i = 0, n; i < blocks; i += n) {
		n = 1;
		if (store->block[i] == POSIX_NO_BLOCK)
			continue;
		while (i + n < blocks && store->block[i + n] == store->block[i] + n)
			n++;
		if (mmap(store->direct + i * POSIX_CHUNK, n * POSIX_CHUNK, PROT_READ | PROT_WRITE,
			    MAP_SHARED | MAP_FIXED | MAP_NORESERVE, store->fd,
			    (off_t)(store->block[i] * POSIX_CHUNK)) == MAP_FAILED)
			return -errno;
		for (uint64_t k = 0; k < n; k++)
			(void)*(volatile unsigned char *)(store->direct + (i + k) * POSIX_CHUNK);
		madvise(store->direct + i * POSIX_CHUNK, n * POSIX_CHUNK, MADV_DONTFORK);
	}
	return 0;
}

/* Read the numbers again where the frames are used: 1 if every run is what it claims to be. */
static int hugetlb_verify(struct posix_store *store)
{
	int verified = 1;

	for (size_t i = 0; i < store->nr_ranges && verified == 1; i++) {
		uint64_t n = store->ranges[i].nr / POSIX_CHUNK_FRAMES;
		uint64_t *pfn = calloc(n, sizeof(*pfn));

		if (pfn == NULL || posix_pagemap(posix_store_address(store, store->ranges[i].pfn),
					   n, POSIX_CHUNK, pfn) != 0)
			verified = -1;
		for (uint64_t k = 0; k < n && verified == 1; k++)
			if (pfn[k] != store->ranges[i].pfn + k * POSIX_CHUNK_FRAMES)
				verified = 0;
		free(pfn);
	}
	return verified;
}

static void pool_error(struct ctg_error *error, int code, uint32_t want)
{
	posix_error(error, code,
		"hugetlb: need %u pages of 2 MiB, %llu free; as root: echo %llu > "
		"/proc/sys/vm/nr_hugepages, or use --backing memfd",
		want, (unsigned long long)pool_free(),
		(unsigned long long)(posix_read_number("/proc/sys/vm/nr_hugepages") + want -
				     pool_free()));
}

/* Make sure that `want` pages can be had: from the pool, or as surplus. */
static int hugetlb_reach(struct posix_store *store, uint32_t want, struct ctg_error *error)
{
	uint64_t have = pool_free();

	if (have < want) {
		uint64_t available = posix_meminfo("MemAvailable");
		uint64_t more = (want - have) * POSIX_CHUNK;

		if (more > available) {
			pool_error(error, -CTG_ENOMEM, want);
			return -CTG_ENOMEM;
		}
		store->raised += pool_raise(want - have);
		if (have + pool_surplus_left() < want) {
			pool_error(error, -CTG_ENOMEM, want);
			return -CTG_ENOMEM;
		}
	}
	return 0;
}

static int hugetlb_layout(struct ctg_region *region, struct posix_store *store,
	struct huge_set *set, uint32_t want, struct ctg_error *error)
{
	int ret = set_collect(region, store, set, want);

	if (ret == -CTG_EPERM) {
		store->physical = -1;
		store->physical_why = "physical frame numbers are for root (CAP_SYS_ADMIN) only";
		for (uint32_t i = 0; i < want; i++)
			set->page[i] = (struct huge_page){
				.pfn = HUGETLB_BASE + i * POSIX_CHUNK_FRAMES, .block = i};
		set->nr = want;
		set_find_runs(set);
	} else if (ret != 0) {
		pool_error(error, -CTG_ENOMEM, want);
		return -CTG_ENOMEM;
	}
	if (set_runs_for(set, want) == 0) {
		posix_error(error, -CTG_ENOMEM,
			"hugetlb: memory is fragmented: %u physical runs for %u pages, at most %d "
			"can be "
			"used; as root: echo 1 > /proc/sys/vm/compact_memory, or start earlier",
			set->nr_runs, want, CTG_CMA_MAX_RANGES);
		return -CTG_ENOMEM;
	}
	ret = set_keep(store, set, want);
	if (ret == 0)
		ret = hugetlb_map(store);
	if (ret != 0)
		posix_error(error, ret, "hugetlb: cannot map %u pages of 2 MiB: %s", want,
			strerror(-ret));
	return ret;
}

static int hugetlb_open(struct ctg_region *region, struct posix_store *store, uint32_t want,
	struct ctg_error *error)
{
	/* Others keep as much as is taken for a look. */
	uint64_t look = (pool_free() + posix_meminfo("MemAvailable") / POSIX_CHUNK) / 2;
	struct huge_set set = {.max = want};
	int ret = hugetlb_reach(store, want, error);

	if (ret != 0)
		return ret;
	if (look > (uint64_t)want * LOOK_MAX)
		look = (uint64_t)want * LOOK_MAX;
	if (look > want)
		set.max = (uint32_t)look;
	store->fd = memfd_create("contig-region", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
	if (store->fd < 0 || ftruncate(store->fd, (off_t)(set.max * POSIX_CHUNK)) != 0) {
		ret = -errno;
		posix_error(error, ret,
			"hugetlb: this system has no 2 MiB pages: %s; use --backing memfd",
			strerror(-ret));
		return ret;
	}
	set.page = calloc(set.max, sizeof(*set.page));
	set.run = calloc(set.max, sizeof(*set.run));
	if (set.page == NULL || set.run == NULL) {
		ret = -CTG_ENOMEM;
		posix_error(error, ret, "hugetlb: out of memory");
	} else {
		ret = hugetlb_layout(region, store, &set, want, error);
	}
	pool_lower(set.extra);
	free(set.page);
	free(set.run);
	return ret;
}

int posix_hugetlb_open(struct ctg_region *region, struct posix_store *store, uint64_t bytes,
	struct ctg_error *error)
{
	int ret;

	store->ops = &hugetlb_ops;
	store->backing = "hugetlb";
	store->map_order = CTG_PAGEBLOCK_ORDER;
	store->physical = 1;
	store->physical_why = "verified by /proc/self/pagemap";
	if (bytes / POSIX_CHUNK > UINT32_MAX / 4) {
		pool_error(error, -CTG_ENOMEM, UINT32_MAX);
		return -CTG_ENOMEM;
	}
	ret = hugetlb_open(region, store, (uint32_t)(bytes / POSIX_CHUNK), error);
	if (ret != 0) {
		posix_store_close(store);
		return ret;
	}
	if (store->physical == 1)
		store->physical = hugetlb_verify(store);
	if (store->physical == 0)
		store->physical_why = "the kernel has moved pages since they were sorted";
	return 0;
}

/* ---- displaced memory -------------------------------------------------------------------- */

static int huge_ensure(struct posix_store *store, ctg_pfn_t pfn, size_t bytes)
{
	off_t at = (off_t)((pfn - store->base) << CTG_PAGE_SHIFT);

	if (fallocate(store->fd, 0, at, (off_t)bytes) != 0)
		return -CTG_ENOMEM;
	return 0;
}

/*
 * A huge page that is about to be overwritten need not be cleared: UFFDIO_COPY makes it with its
 * contents. The direct map of the store is registered for missing pages to that end, so nobody may
 * touch a page of it that does not exist: `ensure` comes first.
 */
static int huge_fill(struct posix_store *store, ctg_pfn_t pfn, const void *from, size_t bytes)
{
	struct uffdio_copy copy = {.dst = (uint64_t)(uintptr_t)posix_store_address(store, pfn),
		.src = (uint64_t)(uintptr_t)from,
		.len = bytes};

	while (ioctl(store->uffd, UFFDIO_COPY, &copy) != 0) {
		if (errno == EEXIST) {
			/* Or there is no page to be had: the kernel says the same then. */
			if (huge_ensure(store, pfn, bytes) != 0)
				return -CTG_ENOMEM;
			memcpy(posix_store_address(store, pfn), from, bytes);
			return 0;
		}
		if (errno != EAGAIN)
			return -CTG_ENOMEM;
		if (copy.copy > 0) {
			copy.dst += (uint64_t)copy.copy;
			copy.src += (uint64_t)copy.copy;
			copy.len -= (uint64_t)copy.copy;
		}
		copy.copy = 0;
	}
	return 0;
}

static int huge_write(struct posix_store *store, ctg_pfn_t pfn, const void *from, size_t bytes)
{
	const unsigned char *p = from;
	int ret = 0;

	for (size_t at = 0; at < bytes && ret == 0; at += POSIX_CHUNK)
		ret = huge_fill(store, pfn + (at >> CTG_PAGE_SHIFT), p + at, POSIX_CHUNK);
	return ret;
}

static const struct posix_store_ops huge_sparse_ops = {
	.name = "hugetlb", .write = huge_write, .ensure = huge_ensure};

static int huge_register(struct posix_store *store)
{
	struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_HUGETLBFS};
	struct uffdio_register reg = {.range = {.start = (uint64_t)(uintptr_t)store->direct,
					      .len = store->nr << CTG_PAGE_SHIFT},
		.mode = UFFDIO_REGISTER_MODE_MISSING};

	store->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
	if (store->uffd < 0)
		return -errno;
	if (ioctl(store->uffd, UFFDIO_API, &api) != 0 ||
		ioctl(store->uffd, UFFDIO_REGISTER, &reg) != 0)
		return -errno;
	return 0;
}

int posix_hugetlb_open_sparse(struct posix_store *store, ctg_pfn_t base, uint64_t bytes)
{
	uint64_t pages = bytes / POSIX_CHUNK;
	int ret = 0;

	store->ops = &huge_sparse_ops;
	store->backing = "hugetlb";
	store->map_order = CTG_PAGEBLOCK_ORDER;
	store->physical_why = "displaced memory lies anywhere";
	if (pool_free() < pages)
		store->raised = pool_raise(pages - pool_free());
	if (pool_free() + pool_surplus_left() < pages)
		ret = -CTG_ENOMEM;
	if (ret == 0)
		store->fd = memfd_create("contig-spill", MFD_CLOEXEC | MFD_HUGETLB | MFD_HUGE_2MB);
	if (ret == 0 && (store->fd < 0 || ftruncate(store->fd, (off_t)bytes) != 0))
		ret = -CTG_ENOMEM;
	if (ret == 0)
		ret = posix_store_map_linear(store, base, bytes);
	if (ret == 0)
		ret = huge_register(store);
	if (ret != 0)
		posix_store_close(store);
	return ret == 0 ? 0 : -CTG_ENOMEM;
}
