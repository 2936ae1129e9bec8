/* SPDX-License-Identifier: MIT */
/*
 * A device that reads a program's buffer without pinning it. It keeps a page table of its own,
 * which an interval notifier tells it to drop before the program's changes; so memory that the
 * device uses can still be moved, unmapped, forked, and given up with the program. On the simulated
 * machine.
 */
#include "../ports/sim/sim.h"

#include <err.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define PAGES 64u
#define VPN 0x1000u
#define FRAMES CTG_PAGEBLOCK_FRAMES

struct mirror {
	struct ctg_mmu_interval_notifier notifier; /* first: the callback gets its address */
	pthread_mutex_t lock;
	struct ctg_sim *sim;
	struct ctg_mm *mm; /* NULL: the program is gone */
	ctg_pfn_t pfn[PAGES];
	unsigned dropped; /* pages, so far */
};

static bool mirror_invalidate(
	struct ctg_mmu_interval_notifier *notifier, const struct ctg_notify_range *range)
{
	struct mirror *mirror = (struct mirror *)(void *)notifier;

	/* A real device's driver would try the lock if it may not block, and flush its TLB here. */
	pthread_mutex_lock(&mirror->lock);
	for (unsigned i = 0; i < PAGES; i++) {
		if (VPN + i - range->vpn >= range->nr || mirror->pfn[i] == CTG_PFN_NONE)
			continue;
		mirror->pfn[i] = CTG_PFN_NONE;
		mirror->dropped++;
	}
	if (range->event == CTG_NOTIFY_EXIT)
		mirror->mm = NULL;
	pthread_mutex_unlock(&mirror->lock);
	return true;
}

static const struct ctg_mmu_interval_ops mirror_ops = {.invalidate = mirror_invalidate};

/*
 * Read a byte of page i through the device. -EFAULT: there is no such page. The program does not
 * end while the device faults a page in: a driver would hold on to the address space.
 */
static int mirror_read(struct mirror *mirror, unsigned i, unsigned char *byte)
{
	struct ctg_mapping map;
	uint64_t seq;
	int ret;

	pthread_mutex_lock(&mirror->lock);
	while (mirror->pfn[i] == CTG_PFN_NONE) {
		struct ctg_mm *mm = mirror->mm;

		pthread_mutex_unlock(&mirror->lock);
		if (mm == NULL)
			return -CTG_EFAULT;
		ret = ctg_handle_fault(mm, VPN + i, false);
		if (ret != 0)
			return ret;
		seq = ctg_mmu_interval_read_begin(&mirror->notifier);
		ctg_mm_lookup(mm, VPN + i, 1, &map);
		pthread_mutex_lock(&mirror->lock);
		if (!ctg_mmu_interval_read_retry(&mirror->notifier, seq))
			mirror->pfn[i] = map.pfn;
	}
	/* Under the lock, so no callback has returned since: the frame is right. */
	*byte = *(unsigned char *)ctg_sim_frame(mirror->sim, mirror->pfn[i]);
	pthread_mutex_unlock(&mirror->lock);
	return 0;
}

static void program_write(struct ctg_sim *sim, struct ctg_mm *mm, unsigned i, unsigned char byte)
{
	if (ctg_sim_write(sim, mm, (uint64_t)(VPN + i) << CTG_PAGE_SHIFT, &byte, 1) != 0)
		errx(1, "the program cannot write page %u", i);
}

static void expect_all(struct mirror *mirror, unsigned char add, const char *when)
{
	for (unsigned i = 0; i < PAGES; i++) {
		unsigned char byte = 0;

		if (mirror_read(mirror, i, &byte) != 0 || byte != (unsigned char)(i + add))
			errx(1, "%s: the device reads %u from page %u", when, byte, i);
	}
	printf("%s: the device reads what the program wrote; %u pages dropped so far\n", when,
		mirror->dropped);
}

/* Somebody needs the memory in which the buffer lies. */
static void take_memory(struct ctg *ctg, struct ctg_mm *mm)
{
	struct ctg_mapping map;
	ctg_pfn_t block;

	ctg_mm_lookup(mm, VPN, 1, &map);
	block = map.pfn & ~(FRAMES - 1);
	if (ctg_alloc_contig_range(ctg, block, FRAMES, NULL) != 0)
		errx(1, "the memory cannot be taken");
	if (ctg_free_contig_range(ctg, block, FRAMES, NULL) != 0)
		errx(1, "the memory cannot be given back");
}

static struct ctg_mm *program_fork(struct ctg_mm *mm)
{
	struct ctg_mm_config config = {0};
	struct ctg_mm *child;

	if (ctg_mm_fork(mm, &config, &child) != 0)
		errx(1, "fork");
	return child;
}

int main(void)
{
	struct ctg_zone_config memory = {.base = 4 * FRAMES, .nr = 4 * FRAMES};
	struct mirror mirror = {.lock = PTHREAD_MUTEX_INITIALIZER};
	struct ctg_sim_config machine = {0};
	struct ctg_mm_config config = {0};
	struct ctg_zone *zone;
	struct ctg_mm *child;
	unsigned char byte;
	struct ctg *ctg;

	if (ctg_sim_create(&machine, &mirror.sim) != 0 ||
		ctg_sim_add_zone(mirror.sim, &memory, true, &zone) != 0 ||
		ctg_zone_release(zone, memory.base, memory.nr, false) != 0)
		errx(1, "no machine");
	ctg = ctg_sim_machine(mirror.sim);
	if (ctg_mm_create(ctg, &config, &mirror.mm) != 0 ||
		ctg_mmap(mirror.mm, VPN, PAGES, CTG_PROT_READ | CTG_PROT_WRITE) != 0)
		errx(1, "no program");
	for (unsigned i = 0; i < PAGES; i++)
		mirror.pfn[i] = CTG_PFN_NONE;
	if (ctg_mmu_interval_notifier_insert(
		    &mirror.notifier, mirror.mm, VPN, PAGES, &mirror_ops) != 0)
		errx(1, "no notifier");

	for (unsigned i = 0; i < PAGES; i++)
		program_write(mirror.sim, mirror.mm, i, (unsigned char)i);
	expect_all(&mirror, 0, "at first");
	take_memory(ctg, mirror.mm);
	if (mirror.dropped != PAGES)
		errx(1, "migration: %u pages dropped", mirror.dropped);
	expect_all(&mirror, 0, "after a migration");

	child = program_fork(mirror.mm);
	for (unsigned i = 0; i < PAGES; i++)
		program_write(mirror.sim, mirror.mm, i, (unsigned char)(i + 1));
	expect_all(&mirror, 1, "after a fork and writes");
	ctg_mm_destroy(child, true);

	if (ctg_munmap(mirror.mm, VPN, 1) != 0 || mirror_read(&mirror, 0, &byte) != -CTG_EFAULT ||
		mirror_read(&mirror, 1, &byte) != 0 || byte != 2)
		errx(1, "unmap: the device reads what is not there, or not what is");
	printf("after an unmap: the device faults there, and nowhere else\n");

	ctg_mm_destroy(mirror.mm, true);
	if (mirror_read(&mirror, 1, &byte) != -CTG_EFAULT)
		errx(1, "exit: the device reads what is not there");
	ctg_mmu_interval_notifier_remove(&mirror.notifier);
	printf("after the program's end: the device faults\n");
	ctg_sim_destroy(mirror.sim);
	return 0;
}
