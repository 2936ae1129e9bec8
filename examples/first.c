/* SPDX-License-Identifier: MIT */
/* A heap in lent memory, and a contiguous buffer taken out from under it. */
#include <contig/posix.h>
#include <stdio.h>
#include <string.h>

static int all(const unsigned char *p, size_t bytes, unsigned char value)
{
	return p[0] == value && memcmp(p, p + 1, bytes - 1) == 0;
}

int main(void)
{
	const size_t heap_bytes = 48 << 20, buffer_bytes = 32 << 20;
	struct ctg_region_config config = {.bytes = 64 << 20, .spill_bytes = CTG_SPILL_DEFAULT};
	struct ctg_region *region;
	struct ctg_buffer buffer;
	struct ctg_error error;
	void *heap;
	int rc;

	if (ctg_region_open(&config, &region, &error) != 0) {
		fprintf(stderr, "%s\n", error.text);
		return 1;
	}
	rc = ctg_region_map(region, heap_bytes, &heap); /* lent: it may move at any time */
	if (rc == 0) {
		memset(heap, 1, heap_bytes);
		rc = ctg_region_alloc(region, buffer_bytes, NULL, &buffer); /* now part of it moves */
	}
	if (rc == 0) {
		memset(buffer.address, 2, buffer.bytes); /* the heap still reads 1 everywhere */
		rc = !all(heap, heap_bytes, 1) || !all(buffer.address, buffer_bytes, 2);
		ctg_region_release(region, &buffer);
	}
	printf(rc ? "failed: %d\n" : "both are intact\n", rc);
	ctg_region_close(region);
	return rc != 0;
}
