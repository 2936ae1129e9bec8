/* SPDX-License-Identifier: MIT */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "bitmap.h"

/* A map in memory of exactly the size it asks for, so that ASan sees a step beyond. */
static void map_open(struct ctg_bitmap *map, uint64_t nr)
{
	void *memory = calloc(1, ctg_bitmap_bytes(nr));

	assert_non_null(memory);
	ctg_bitmap_init(map, memory, nr);
}

static void map_close(struct ctg_bitmap *map)
{
	free(map->words);
}

static void check_run(
	const struct ctg_bitmap *map, uint64_t from, uint64_t nr, uint64_t start, uint64_t len)
{
	uint64_t got = UINT64_MAX;

	assert_int_equal(ctg_bitmap_next_run(map, from, nr, &got), start);
	assert_int_equal(got, len);
}

static void check_no_run(const struct ctg_bitmap *map, uint64_t from, uint64_t nr)
{
	uint64_t len;

	assert_int_equal(ctg_bitmap_next_run(map, from, nr, &len), map->nr);
}

static void test_bytes(void **state)
{
	(void)state;
	assert_int_equal(ctg_bitmap_bytes(0), 0);
	assert_int_equal(ctg_bitmap_bytes(((uint64_t)1 << 31) + 1), 0);
	assert_int_not_equal(ctg_bitmap_bytes((uint64_t)1 << 31), 0);
	assert_int_not_equal(ctg_bitmap_bytes(1), 0);
	/* The tree costs less than the words: 16 GiB of frames need less than 1 MiB. */
	assert_in_range(ctg_bitmap_bytes(1 << 22), 1 << 19, 1 << 20);
}

static void test_empty(void **state)
{
	static const uint64_t sizes[] = {
		1, 63, 64, 65, 511, 512, 513, 1024, 1025, 4095, 4096, 4097, 100000};

	(void)state;
	for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
		struct ctg_bitmap map;
		uint64_t nr = sizes[i];

		map_open(&map, nr);
		assert_int_equal(ctg_bitmap_longest(&map), nr);
		assert_int_equal(ctg_bitmap_next_set(&map, 0), nr);
		check_run(&map, 0, 1, 0, nr);
		check_run(&map, 0, nr, 0, nr);
		check_run(&map, nr - 1, 1, nr - 1, 1);
		check_no_run(&map, 0, nr + 1);
		check_no_run(&map, 1, nr);
		check_no_run(&map, nr, 1);
		check_no_run(&map, UINT64_MAX, 1);
		check_no_run(&map, 0, UINT64_MAX);
		assert_true(ctg_bitmap_all_clear(&map, 0, nr));
		assert_false(ctg_bitmap_all_clear(&map, 0, nr + 1));
		assert_false(ctg_bitmap_all_clear(&map, 1, nr));
		assert_false(ctg_bitmap_all_clear(&map, UINT64_MAX, 2));
		map_close(&map);
	}
}

static void test_full(void **state)
{
	struct ctg_bitmap map;

	(void)state;
	map_open(&map, 2000);
	ctg_bitmap_set(&map, 0, 2000);
	assert_int_equal(map.nr_set, 2000);
	assert_int_equal(ctg_bitmap_longest(&map), 0);
	check_no_run(&map, 0, 1);
	assert_int_equal(ctg_bitmap_next_set(&map, 1999), 1999);
	assert_int_equal(ctg_bitmap_next_set(&map, 2000), 2000);
	ctg_bitmap_clear(&map, 1999, 1);
	assert_int_equal(ctg_bitmap_longest(&map), 1);
	check_run(&map, 0, 1, 1999, 1);
	ctg_bitmap_clear(&map, 0, 1999);
	assert_int_equal(map.nr_set, 0);
	assert_int_equal(ctg_bitmap_longest(&map), 2000);
	map_close(&map);
}

/* Runs that begin and end in words, at word ends, at leaf ends and across leaves. */
static void test_runs_across_borders(void **state)
{
	static const uint64_t borders[] = {64, 128, 512, 1024, 4096, 8192};

	(void)state;
	for (size_t i = 0; i < sizeof(borders) / sizeof(borders[0]); i++)
		for (uint64_t before = 0; before < 3; before++)
			for (uint64_t after = 0; after < 3; after++) {
				uint64_t start = borders[i] - before;
				uint64_t nr = before + after;
				struct ctg_bitmap map;

				map_open(&map, 10000);
				ctg_bitmap_set(&map, 0, 10000);
				if (nr != 0) {
					ctg_bitmap_clear(&map, start, nr);
					check_run(&map, 0, nr, start, nr);
					check_run(&map, 0, 1, start, nr);
					check_run(&map, start + nr - 1, 1, start + nr - 1, 1);
					check_no_run(&map, start + 1, nr);
				}
				check_no_run(&map, 0, nr + 1);
				assert_int_equal(ctg_bitmap_longest(&map), nr);
				map_close(&map);
			}
}

static void test_first_of_several(void **state)
{
	struct ctg_bitmap map;

	(void)state;
	map_open(&map, 20000);
	ctg_bitmap_set(&map, 0, 20000);
	ctg_bitmap_clear(&map, 100, 10);
	ctg_bitmap_clear(&map, 500, 30);
	ctg_bitmap_clear(&map, 5000, 2000);
	ctg_bitmap_clear(&map, 12000, 30);
	check_run(&map, 0, 10, 100, 10);
	check_run(&map, 0, 11, 500, 30);
	check_run(&map, 505, 25, 505, 25);
	check_run(&map, 505, 26, 5000, 2000);
	check_run(&map, 5001, 1999, 5001, 1999);
	check_no_run(&map, 5001, 2000);
	check_run(&map, 6990, 11, 12000, 30);
	check_no_run(&map, 12001, 30);
	assert_int_equal(ctg_bitmap_longest(&map), 2000);
	assert_int_equal(ctg_bitmap_next_set(&map, 5000), 7000);
	assert_int_equal(ctg_bitmap_next_set(&map, 6999), 7000);
	assert_true(ctg_bitmap_all_clear(&map, 5000, 2000));
	assert_false(ctg_bitmap_all_clear(&map, 4999, 2));
	assert_false(ctg_bitmap_all_clear(&map, 5000, 2001));
	map_close(&map);
}

/* The answer of a search does not cost a walk over what does not fit. */
static void test_many_short_runs(void **state)
{
	enum { NR = 1 << 20 };
	struct ctg_bitmap map;

	(void)state;
	map_open(&map, NR);
	for (uint64_t bit = 0; bit < NR; bit += 4)
		ctg_bitmap_set(&map, bit, 1);
	assert_int_equal(ctg_bitmap_longest(&map), 3);
	check_no_run(&map, 0, 4);
	check_run(&map, 0, 3, 1, 3);
	check_run(&map, 777777, 3, 777777, 3);
	check_run(&map, 777778, 3, 777781, 3);
	ctg_bitmap_clear(&map, 1000000, 1);
	check_run(&map, 5, 4, 999997, 7);
	assert_int_equal(ctg_bitmap_longest(&map), 7);
	map_close(&map);
}

static void test_plain_words(void **state)
{
	uint64_t words[4] = {0, 0, 0, 0};

	(void)state;
	assert_int_equal(ctg_bits_bytes(1), 8);
	assert_int_equal(ctg_bits_bytes(64), 8);
	assert_int_equal(ctg_bits_bytes(65), 16);
	ctg_bits_fill(words, 60, 100, true);
	assert_int_equal(words[0], UINT64_C(0xf) << 60);
	assert_int_equal(words[1], UINT64_MAX);
	assert_int_equal(words[2], (UINT64_C(1) << 32) - 1);
	assert_int_equal(words[3], 0);
	assert_int_equal(ctg_bits_next(words, 0, 256, true), 60);
	assert_int_equal(ctg_bits_next(words, 60, 256, false), 160);
	assert_int_equal(ctg_bits_next(words, 161, 256, true), 256);
	assert_int_equal(ctg_bits_next(words, 0, 50, true), 50);
	assert_int_equal(ctg_bits_next(words, 70, 70, true), 70);
	ctg_bits_fill(words, 64, 64, false);
	assert_int_equal(words[1], 0);
	assert_true(ctg_bits_test(words, 63));
	assert_false(ctg_bits_test(words, 64));
	assert_true(ctg_bits_test(words, 128));
	ctg_bits_fill(words, 63, 0, false);
	assert_true(ctg_bits_test(words, 63));
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_bytes),
		cmocka_unit_test(test_empty),
		cmocka_unit_test(test_full),
		cmocka_unit_test(test_runs_across_borders),
		cmocka_unit_test(test_first_of_several),
		cmocka_unit_test(test_many_short_runs),
		cmocka_unit_test(test_plain_words),
	};

	return cmocka_run_group_tests(tests, NULL, NULL);
}
