/* SPDX-License-Identifier: MIT */
/*
 * Contig on a POSIX system (Linux): a region of real memory, lent to this or other processes.
 *
 * A first program:
 *
 *	struct ctg_region_config config = {.bytes = 64 << 20};
 *	struct ctg_error error;
 *	struct ctg_region *region;
 *	if (ctg_region_open(&config, &region, &error) != 0)
 *		errx(1, "%s", error.text);
 *	void *heap;                                  // movable: lent out of the area
 *	ctg_region_map(region, 48 << 20, &heap);
 *	memset(heap, 1, 48 << 20);
 *	struct ctg_buffer buffer;                    // taken back, contiguous, while heap is in use
 *	ctg_region_alloc(region, 32 << 20, NULL, &buffer);
 *	memset(buffer.address, 2, buffer.bytes);     // heap still reads 1 everywhere
 */
#ifndef CONTIG_POSIX_H
#define CONTIG_POSIX_H

#include <contig/contig.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What failed and what to do about it: one line without a newline, for people. */
struct ctg_error {
	int code; /* negative errno */
	char text[256];
};

#define CTG_SPILL_DEFAULT UINT64_MAX

struct ctg_region_config {
	/*
	 * "memfd" (default, also for NULL: no privileges), "hugetlb" (2 MiB pages in the order of
	 * their physical frames), "file:PATH" (a file or memory device that can be mapped shared).
	 */
	const char *backing;
	uint64_t bytes;       /* of the area; a multiple of 2 MiB */
	uint64_t spill_bytes; /* at most so much ordinary memory for what is displaced;
				 CTG_SPILL_DEFAULT: as much as the area; 0: none */
	const char *name;     /* of the area; NULL: "region" */
	unsigned copy_threads; /* that share one batch's copy; 0: one a CPU, at most 4 */
	/* mappings one address space may use; 0: three quarters of vm.max_map_count */
	uint64_t map_budget;
	/* Stop threads even where userfaultfd would do. For tests. */
	bool force_stop;
	void (*trace)(void *arg, const struct ctg_event *event); /* may be NULL */
	void *trace_arg;
};

struct ctg_region;

/*
 * Open a region: get the memory, build a machine over it, lend all of it as one area.
 * error: may be NULL. Context: any thread; sleeps (hugetlb pages are allocated and sorted: about a
 * second a GiB, up to half a minute where free memory is in pieces and longer runs are looked for).
 * Returns 0; -EINVAL: bytes zero, unaligned, overflowing, unknown backing; -ENOMEM: more than the
 * machine or the hugetlb pool has; what open or mmap of the file returned.
 */
int ctg_region_open(const struct ctg_region_config *config, struct ctg_region **out,
	struct ctg_error *error);

/* Close: maps of this process made by ctg_region_map go away. NULL is allowed. */
void ctg_region_close(struct ctg_region *region);

struct ctg *ctg_region_machine(struct ctg_region *region);
struct ctg_cma *ctg_region_area(struct ctg_region *region);
/* The zone of displaced memory; NULL if spill_bytes was 0. */
struct ctg_zone *ctg_region_spill(struct ctg_region *region);

struct ctg_region_info {
	const char *backing;  /* "memfd", "hugetlb", "file" */
	uint64_t bytes;
	uint64_t spill_bytes; /* the limit */
	uint64_t spill_used_bytes; /* ordinary memory in use for displaced frames now */
	unsigned map_order;   /* granule of mappings */
	const char *guard;    /* "userfaultfd" or "stop": how writers are kept out of a move */
	const char *guard_why; /* one line */
	int physical;         /* 1: runs of pfns are physically contiguous, verified; 0: known
				 not to be; -1: cannot be known here */
	const char *physical_why;
};
void ctg_region_info(struct ctg_region *region, struct ctg_region_info *out);

/* The direct map: where the calling process sees a frame. NULL for what is not memory. */
void *ctg_region_address(struct ctg_region *region, ctg_pfn_t pfn);

/*
 * The descriptor and the offset (bytes) at which frame pfn lies in it; *nr (if not NULL): how many
 * frames from pfn on follow each other in the file, at most max. The descriptor stays the region's.
 * Who has it can see and write the whole region. -EINVAL: not memory.
 */
int ctg_region_fd(struct ctg_region *region, ctg_pfn_t pfn, uint64_t max, int *fd, uint64_t *offset,
	uint64_t *nr);

/*
 * Map movable memory into the calling process: lent out of the area, populated, zeroed.
 * bytes: a multiple of the page size (of 2 MiB on hugetlb).
 * Returns 0; -EINVAL; -ENOMEM: the area has not so much to lend.
 */
int ctg_region_map(struct ctg_region *region, size_t bytes, void **addr);
int ctg_region_unmap(struct ctg_region *region, void *addr, size_t bytes);

/* A contiguous buffer. */
struct ctg_buffer {
	ctg_pfn_t pfn;
	uint64_t bytes;
	void *address; /* where this process sees it: contiguous */
};
/* ctg_cma_alloc in bytes (rounded up to pages), and where to see it. Same errors. */
int ctg_region_alloc(struct ctg_region *region, uint64_t bytes,
	const struct ctg_alloc_request *request, struct ctg_buffer *out);
int ctg_region_release(struct ctg_region *region, const struct ctg_buffer *buffer);

/*
 * Is [pfn, pfn + nr) physically contiguous? Reads /proc/self/pagemap.
 * Returns 1 yes, 0 no, -EPERM when this process may not know. *phys: physical frame number of pfn.
 */
int ctg_region_physical(struct ctg_region *region, ctg_pfn_t pfn, uint64_t nr, uint64_t *phys);

#ifdef __cplusplus
}
#endif
#endif
