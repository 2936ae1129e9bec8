/* SPDX-License-Identifier: MIT */
/* A region as a picture: what each pageblock is, from a map answer. */
#include "cli.h"
#include <stdlib.h>

const char picture_chars[NR_CELLS] = {' ', '.', '-', '+', '#', '%', '!'};
const char *const picture_names[NR_CELLS] = {"not memory", "free", "lent, less than half", "lent",
	"taken", "taken in part", "being taken"};

static uint64_t at(const json_t *array, size_t i)
{
	json_int_t n = json_integer_value(json_array_get(array, i));

	return n > 0 ? (uint64_t)n : 0;
}

static enum picture_cell cell_of(uint64_t unused, uint64_t taken, uint64_t in_use, bool isolated)
{
	uint64_t all = unused + taken + in_use;

	if (all == 0)
		return CELL_HOLE;
	if (taken)
		return taken == all ? CELL_TAKEN : CELL_PART;
	if (isolated)
		return CELL_BUSY;
	if (in_use == 0)
		return CELL_FREE;
	return in_use * 2 < all ? CELL_SOME : CELL_LENT;
}

bool picture_read(const json_t *blocks, struct picture *picture)
{
	const json_t *pfns = json_object_get(blocks, "pfn");
	const json_t *unused = json_object_get(blocks, "free");
	const json_t *taken = json_object_get(blocks, "taken");
	const json_t *in_use = json_object_get(blocks, "in_use");
	const json_t *isolated = json_object_get(blocks, "isolated");
	size_t nr = json_array_size(pfns);

	*picture = (struct picture){0};
	if (!json_is_array(pfns) || json_array_size(unused) != nr || json_array_size(taken) != nr ||
		json_array_size(in_use) != nr || json_array_size(isolated) != nr)
		return false;
	picture->cells = malloc(2 * nr + 1);
	if (!picture->cells)
		return false;
	for (size_t i = 0; i < nr; i++) {
		/* A hole, however long, is one cell. */
		if (i && at(pfns, i) != at(pfns, i - 1) + CTG_PAGEBLOCK_FRAMES)
			picture->cells[picture->nr++] = CELL_HOLE;
		picture->cells[picture->nr++] = (unsigned char)cell_of(
			at(unused, i), at(taken, i), at(in_use, i), at(isolated, i) != 0);
	}
	return true;
}

void picture_free(struct picture *picture)
{
	free(picture->cells);
	picture->cells = NULL;
}
