/* SPDX-License-Identifier: MIT */
/*
 * Threads that allocate, grow, move and free memory at random, and check on every step that what
 * they wrote is there. usage: churn THREADS STEPS MIB [mark]
 *
 * About MIB of memory is in use in the middle of a run. With "mark", prints "ready" once it is, and
 * goes on until standard input ends.
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define SLOTS 2048

struct slot {
	uint64_t *words;
	size_t nr;
	uint64_t seed;
};

static size_t nr_steps, mean_bytes;
static atomic_bool stop, endless;
static atomic_uint nr_ready;

static uint64_t next_random(uint64_t *state)
{
	uint64_t x = *state;

	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

static void fill(struct slot *slot, size_t from)
{
	for (size_t i = from; i < slot->nr; i++)
		slot->words[i] = slot->seed + i * 0x9e3779b97f4a7c15u;
}

static void check(const struct slot *slot)
{
	for (size_t i = 0; i < slot->nr; i++)
		if (slot->words[i] != slot->seed + i * 0x9e3779b97f4a7c15u) {
			fprintf(stderr, "churn: word %zu of %zu at %p is %016llx\n", i, slot->nr,
				(void *)&slot->words[i], (unsigned long long)slot->words[i]);
			_exit(1);
		}
}

static size_t random_words(uint64_t *state)
{
	uint64_t r = next_random(state);
	size_t bytes = mean_bytes;

	/* Mostly small, some large: the mean is about right. */
	if (r % 16 != 0)
		bytes /= 4;
	else
		bytes *= 8;
	return 1 + (size_t)(next_random(state) % (2 * bytes)) / 8;
}

static void renew(struct slot *slot, uint64_t *state)
{
	size_t nr = random_words(state), old = slot->nr;

	if (slot->words && next_random(state) % 4 == 0) {
		slot->words = realloc(slot->words, nr * 8);
		slot->nr = nr;
		if (nr > old)
			fill(slot, old);
	} else {
		free(slot->words);
		slot->nr = nr;
		slot->seed = next_random(state);
		slot->words = next_random(state) % 8 ? malloc(nr * 8) : calloc(nr, 8);
		fill(slot, 0);
	}
	if (!slot->words)
		_exit(2);
	check(slot);
}

static void *churn(void *arg)
{
	uint64_t state = 88172645463325252u + (uintptr_t)arg;
	struct slot *slots = calloc(SLOTS, sizeof(*slots));

	for (size_t i = 0; i < SLOTS; i++)
		renew(&slots[i], &state);
	atomic_fetch_add(&nr_ready, 1);
	for (size_t n = 0; endless ? !stop : n < nr_steps; n++) {
		struct slot *slot = &slots[next_random(&state) % SLOTS];

		check(slot);
		renew(slot, &state);
		/* Calloc's promise, also for memory that was decommitted. */
		if (n % 64 == 0) {
			size_t nr = random_words(&state);
			uint64_t *zeroes = calloc(nr, 8);

			for (size_t i = 0; i < nr; i++)
				if (zeroes[i] != 0)
					_exit(3);
			free(zeroes);
		}
	}
	for (size_t i = 0; i < SLOTS; i++) {
		check(&slots[i]);
		free(slots[i].words);
	}
	free(slots);
	return NULL;
}

int main(int argc, char **argv)
{
	unsigned nr_threads = argc > 1 ? (unsigned)atoi(argv[1]) : 4;
	pthread_t threads[64];
	char byte;

	if (argc < 4 || nr_threads == 0 || nr_threads > 64)
		return 64;
	nr_steps = strtoul(argv[2], NULL, 10);
	mean_bytes = (strtoul(argv[3], NULL, 10) << 20) / nr_threads / SLOTS;
	endless = argc > 4;
	for (unsigned i = 0; i < nr_threads; i++)
		if (pthread_create(&threads[i], NULL, churn, (void *)(uintptr_t)(i + 1)) != 0)
			return 65;
	if (endless) {
		while (nr_ready < nr_threads)
			usleep(1000);
		puts("ready");
		fflush(stdout);
		while (read(0, &byte, 1) > 0)
			;
		stop = true;
	}
	for (unsigned i = 0; i < nr_threads; i++)
		pthread_join(threads[i], NULL);
	puts("intact");
	return 0;
}
