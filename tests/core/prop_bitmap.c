/* SPDX-License-Identifier: MIT */
/* The bitmap with a tree against an array of booleans, on random operations. CONTIG_SEED replays.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "bitmap.h"

static uint64_t rng;

static uint64_t below(uint64_t n)
{
	rng ^= rng << 13;
	rng ^= rng >> 7;
	rng ^= rng << 17;
	return rng % n;
}

struct model {
	uint64_t nr;
	bool set[6000];
};

static uint64_t model_next(const struct model *m, uint64_t from, bool value)
{
	while (from < m->nr && m->set[from] != value)
		from++;
	return from;
}

static uint64_t model_run(const struct model *m, uint64_t from, uint64_t nr, uint64_t *len)
{
	for (uint64_t start = model_next(m, from, false); start < m->nr;) {
		uint64_t end = model_next(m, start, true);

		*len = end - start;
		if (*len >= nr)
			return start;
		start = model_next(m, end, false);
	}
	return m->nr;
}

static void check(const struct ctg_bitmap *map, const struct model *m)
{
	uint64_t longest = 0, nr_set = 0, len, want, from, nr;

	for (uint64_t at = 0; at < m->nr;) {
		uint64_t start = model_next(m, at, false), end = model_next(m, start, true);

		nr_set += start - at;
		if (end - start > longest)
			longest = end - start;
		at = end;
	}
	assert_int_equal(map->nr_set, nr_set);
	assert_int_equal(ctg_bitmap_longest(map), longest);
	for (unsigned i = 0; i < 4; i++) {
		uint64_t got_len = 0;

		from = below(m->nr + 2);
		nr = 1 + below(i < 2 ? 20 : m->nr);
		if (i == 3 && longest != 0)
			nr = longest;
		want = model_run(m, from, nr, &len);
		assert_int_equal(ctg_bitmap_next_run(map, from, nr, &got_len), want);
		if (want < m->nr)
			assert_int_equal(got_len, len);
		from = from < m->nr ? from : m->nr;
		assert_int_equal(ctg_bitmap_next_set(map, from), model_next(m, from, true));
		assert_int_equal(ctg_bitmap_all_clear(map, from, nr),
			nr <= m->nr - from && model_next(m, from, true) >= from + nr);
	}
}

static void one_seed(uint64_t seed)
{
	static struct model m;
	struct ctg_bitmap map;
	void *memory;

	rng = seed * UINT64_C(0x9e3779b97f4a7c15) + 1;
	m.nr = 1 + below(sizeof(m.set) / sizeof(m.set[0]));
	for (uint64_t i = 0; i < m.nr; i++)
		m.set[i] = false;
	memory = calloc(1, ctg_bitmap_bytes(m.nr));
	assert_non_null(memory);
	ctg_bitmap_init(&map, memory, m.nr);
	for (unsigned step = 0; step < 300; step++) {
		uint64_t start = below(m.nr), end;
		uint64_t most = below(4) == 0 ? m.nr : 1 + below(100);
		bool value = m.set[start];

		end = model_next(&m, start, !value);
		if (end > start + most)
			end = start + most;
		if (value)
			ctg_bitmap_clear(&map, start, end - start);
		else
			ctg_bitmap_set(&map, start, end - start);
		for (uint64_t i = start; i < end; i++)
			m.set[i] = !value;
		check(&map, &m);
	}
	free(memory);
}

static void prop_agrees_with_model(void **state)
{
	const char *replay = getenv("CONTIG_SEED");
	uint64_t first = replay != NULL ? strtoull(replay, NULL, 0) : 1;
	uint64_t last = replay != NULL ? first : 60;

	(void)state;
	for (uint64_t seed = first; seed <= last; seed++) {
		print_message("seed %llu\n", (unsigned long long)seed);
		one_seed(seed);
	}
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(prop_agrees_with_model),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
