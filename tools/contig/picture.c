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

/* An entry is [pfn, free, taken, in use, isolated, present]. */
static unsigned char cell_at(const json_t *block)
{
	return (unsigned char)cell_of(at(block, 1), at(block, 2), at(block, 3), at(block, 4) != 0);
}

bool picture_read(const json_t *blocks, struct picture *picture)
{
	uint64_t next = 0;
	const json_t *block;
	size_t i;

	*picture = (struct picture){0};
	if (!json_is_array(blocks))
		return false;
	/* A hole, however long, is one cell. */
	picture->cells = malloc(2 * json_array_size(blocks) + 1);
	if (!picture->cells)
		return false;
	json_array_foreach(blocks, i, block)
	{
		if (i && at(block, 0) != next)
			picture->cells[picture->nr++] = CELL_HOLE;
		picture->cells[picture->nr++] = cell_at(block);
		next = at(block, 0) + CTG_PAGEBLOCK_FRAMES;
	}
	return true;
}

void picture_free(struct picture *picture)
{
	free(picture->cells);
	picture->cells = NULL;
}
