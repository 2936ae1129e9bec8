/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "sim.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define TLB_ENTRIES 64

struct tlb_entry {
	struct ctg_mm *mm; /* NULL: empty */
	ctg_vpn_t vpn;
	ctg_pfn_t pfn;
	bool write;
};

struct sim_zone {
	ctg_pfn_t base;
	uint64_t nr;
	unsigned char *memory;
	void *metadata;
};

struct sim_hook {
	uint64_t calls;
	uint64_t fail_at; /* 0: never */
};

struct ctg_sim {
	struct ctg *ctg;
	struct ctg_sim_config config;
	unsigned nr_zones;
	struct sim_zone zones[CTG_MAX_ZONES];
	uint64_t virtual_now;
	uint64_t meta_bytes;
	/* Guards hooks, meta_bytes and virtual_now; the sleepers' condition goes with it. */
	pthread_mutex_t lock;
	pthread_cond_t woken;
	struct sim_hook hooks[CTG_SIM_NR_HOOKS];
	/*
	 * The TLBs. An access holds it shared while it looks up and touches memory, an
	 * invalidation holds it exclusively: so no access is under way when a hook returns.
	 */
	pthread_rwlock_t tlb_lock;
	pthread_mutex_t tlb_fill[CTG_MAX_CPUS]; /* threads that claim to be the same CPU */
	struct tlb_entry tlb[CTG_MAX_CPUS][TLB_ENTRIES];
	int install_failed; /* the next install puts back: it may not fail */
};

static _Thread_local unsigned current_cpu;

void ctg_sim_set_cpu(unsigned cpu)
{
	current_cpu = cpu;
}

static bool hook_fails(struct ctg_sim *sim, enum ctg_sim_hook which)
{
	struct sim_hook *hook = &sim->hooks[which];
	bool fails;

	pthread_mutex_lock(&sim->lock);
	hook->calls++;
	fails = hook->fail_at != 0 && hook->calls == hook->fail_at;
	pthread_mutex_unlock(&sim->lock);
	return fails;
}

static void *sim_meta_alloc(void *host, size_t bytes, size_t align)
{
	struct ctg_sim *sim = host;
	void *p;

	if (hook_fails(sim, CTG_SIM_META_ALLOC))
		return NULL;
	if (align < sizeof(void *))
		align = sizeof(void *);
	if (posix_memalign(&p, align, bytes) != 0)
		return NULL;
	memset(p, 0, bytes);
	pthread_mutex_lock(&sim->lock);
	sim->meta_bytes += bytes;
	pthread_mutex_unlock(&sim->lock);
	return p;
}

static void sim_meta_free(void *host, void *p, size_t bytes)
{
	struct ctg_sim *sim = host;

	if (p == NULL)
		return;
	pthread_mutex_lock(&sim->lock);
	sim->meta_bytes -= bytes;
	pthread_mutex_unlock(&sim->lock);
	free(p);
}

static unsigned sim_cpu(void *host)
{
	const struct ctg_sim *sim = host;

	return current_cpu % sim->config.nr_cpus;
}

static uint64_t real_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint64_t sim_now(void *host)
{
	struct ctg_sim *sim = host;
	uint64_t now;

	if (!sim->config.virtual_time)
		return real_now();
	pthread_mutex_lock(&sim->lock);
	now = sim->virtual_now;
	pthread_mutex_unlock(&sim->lock);
	return now;
}

static int sim_wait(
	void *host, struct ctg_word32 *word, uint32_t expected, uint64_t deadline, bool killable)
{
	struct ctg_sim *sim = host;
	int ret = 0;

	(void)killable; /* nobody kills a thread of the sim */
	pthread_mutex_lock(&sim->lock);
	if (__atomic_load_n(&word->v, __ATOMIC_ACQUIRE) == expected) {
		if (deadline == CTG_NO_DEADLINE) {
			pthread_cond_wait(&sim->woken, &sim->lock);
		} else if (sim->config.virtual_time) {
			/* Nobody else can move virtual time while this thread sleeps. */
			if (sim->virtual_now < deadline)
				sim->virtual_now = deadline;
			ret = -CTG_ETIMEDOUT;
		} else {
			struct timespec ts = {.tv_sec = (time_t)(deadline / 1000000000u),
				.tv_nsec = (long)(deadline % 1000000000u)};

			if (pthread_cond_clockwait(&sim->woken, &sim->lock, CLOCK_MONOTONIC, &ts) != 0)
				ret = -CTG_ETIMEDOUT;
		}
	}
	pthread_mutex_unlock(&sim->lock);
	return ret;
}

static void sim_wake(void *host, struct ctg_word32 *word, unsigned nr)
{
	struct ctg_sim *sim = host;

	(void)word; /* one condition for all words: sleepers look again */
	(void)nr;
	pthread_mutex_lock(&sim->lock);
	pthread_cond_broadcast(&sim->woken);
	pthread_mutex_unlock(&sim->lock);
}

static void sim_relax(void *host)
{
	(void)host;
	sched_yield();
}

void *ctg_sim_frame(struct ctg_sim *sim, ctg_pfn_t pfn)
{
	for (unsigned i = 0; i < sim->nr_zones; i++) {
		const struct sim_zone *zone = &sim->zones[i];

		if (pfn - zone->base < zone->nr)
			return zone->memory + ((pfn - zone->base) << CTG_PAGE_SHIFT);
	}
	return NULL;
}

static int sim_copy(void *host, const struct ctg_copy_run *runs, size_t nr)
{
	struct ctg_sim *sim = host;

	if (hook_fails(sim, CTG_SIM_COPY))
		return -CTG_ENOMEM;
	for (size_t i = 0; i < nr; i++)
		memcpy(ctg_sim_frame(sim, runs[i].dst), ctg_sim_frame(sim, runs[i].src),
			runs[i].nr << CTG_PAGE_SHIFT);
	return 0;
}

static int sim_zero(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_sim *sim = host;

	if (hook_fails(sim, CTG_SIM_ZERO))
		return -CTG_ENOMEM;
	memset(ctg_sim_frame(sim, pfn), 0, nr << CTG_PAGE_SHIFT);
	return 0;
}

static void sim_discard(void *host, ctg_pfn_t pfn, uint64_t nr)
{
	struct ctg_sim *sim = host;

	madvise(ctg_sim_frame(sim, pfn), nr << CTG_PAGE_SHIFT, MADV_DONTNEED);
}

static void tlb_drop(
	struct ctg_sim *sim, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	pthread_rwlock_wrlock(&sim->tlb_lock);
	for (unsigned cpu = 0; cpu < sim->config.nr_cpus; cpu++)
		for (unsigned i = 0; i < TLB_ENTRIES; i++) {
			struct tlb_entry *entry = &sim->tlb[cpu][i];

			for (size_t r = 0; entry->mm == mm && r < nr; r++)
				if (entry->vpn - ranges[r].vpn < ranges[r].nr)
					entry->mm = NULL;
		}
	pthread_rwlock_unlock(&sim->tlb_lock);
}

static int sim_tlb_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	struct ctg_sim *sim = host;

	if (how == CTG_TLB_WRPROTECT && hook_fails(sim, CTG_SIM_RESTRICT))
		return -CTG_EBUSY;
	tlb_drop(sim, mm, ranges, nr);
	return 0;
}

static int sim_tlb_install(
	void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	struct ctg_sim *sim = host;
	bool back = __atomic_exchange_n(&sim->install_failed, 0, __ATOMIC_ACQ_REL) != 0;

	if (hook_fails(sim, CTG_SIM_INSTALL) && !back) {
		__atomic_store_n(&sim->install_failed, 1, __ATOMIC_RELEASE);
		return -CTG_ENOMEM;
	}
	tlb_drop(sim, mm, ranges, nr);
	return 0;
}

static void sim_trace(void *host, const struct ctg_event *event)
{
	struct ctg_sim *sim = host;

	if (sim->config.trace != NULL)
		sim->config.trace(sim->config.trace_arg, event);
}

int ctg_sim_create(const struct ctg_sim_config *config, struct ctg_sim **out)
{
	struct ctg_sim *sim = calloc(1, sizeof(*sim));
	struct ctg_port port = {
		.host = sim,
		.meta_alloc = sim_meta_alloc,
		.meta_free = sim_meta_free,
		.cpu = sim_cpu,
		.now = sim_now,
		.wait = sim_wait,
		.wake = sim_wake,
		.relax = sim_relax,
		.copy = sim_copy,
		.zero = sim_zero,
		.discard = sim_discard,
		.tlb_restrict = sim_tlb_restrict,
		.tlb_install = sim_tlb_install,
		.trace = sim_trace,
	};
	int ret;

	if (sim == NULL)
		return -CTG_ENOMEM;
	if (config != NULL)
		sim->config = *config;
	if (sim->config.nr_cpus == 0)
		sim->config.nr_cpus = 2;
	port.nr_cpus = sim->config.nr_cpus;
	pthread_mutex_init(&sim->lock, NULL);
	pthread_cond_init(&sim->woken, NULL);
	pthread_rwlock_init(&sim->tlb_lock, NULL);
	for (unsigned i = 0; i < CTG_MAX_CPUS; i++)
		pthread_mutex_init(&sim->tlb_fill[i], NULL);
	ret = ctg_create(&port, &sim->ctg);
	if (ret != 0) {
		ctg_sim_destroy(sim);
		return ret;
	}
	*out = sim;
	return 0;
}

void ctg_sim_destroy(struct ctg_sim *sim)
{
	if (sim == NULL)
		return;
	ctg_destroy(sim->ctg);
	for (unsigned i = 0; i < sim->nr_zones; i++) {
		struct sim_zone *zone = &sim->zones[i];

		munmap(zone->memory, zone->nr << CTG_PAGE_SHIFT);
		munmap(zone->metadata, ctg_zone_metadata_bytes(zone->nr));
	}
	pthread_mutex_destroy(&sim->lock);
	pthread_cond_destroy(&sim->woken);
	pthread_rwlock_destroy(&sim->tlb_lock);
	for (unsigned i = 0; i < CTG_MAX_CPUS; i++)
		pthread_mutex_destroy(&sim->tlb_fill[i]);
	free(sim);
}

struct ctg *ctg_sim_machine(struct ctg_sim *sim)
{
	return sim->ctg;
}

static void *map_sparse(size_t bytes)
{
	void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return p == MAP_FAILED ? NULL : p;
}

int ctg_sim_add_zone(struct ctg_sim *sim, const struct ctg_zone_config *config, bool populate,
	struct ctg_zone **out)
{
	struct ctg_zone_config filled = *config;
	size_t metadata_bytes = ctg_zone_metadata_bytes(config->nr);
	struct sim_zone *zone = &sim->zones[sim->nr_zones];
	struct ctg_zone *added;
	int ret;

	if (metadata_bytes == 0)
		return -CTG_EINVAL;
	if (sim->nr_zones == CTG_MAX_ZONES)
		return -CTG_ENOSPC;
	zone->base = config->base;
	zone->nr = config->nr;
	zone->memory = map_sparse(config->nr << CTG_PAGE_SHIFT);
	zone->metadata = map_sparse(metadata_bytes);
	filled.metadata = zone->metadata;
	ret = zone->memory == NULL || zone->metadata == NULL ? -CTG_ENOMEM :
							      ctg_zone_add(sim->ctg, &filled, &added);
	if (ret != 0) {
		if (zone->memory != NULL)
			munmap(zone->memory, config->nr << CTG_PAGE_SHIFT);
		if (zone->metadata != NULL)
			munmap(zone->metadata, metadata_bytes);
		return ret;
	}
	sim->nr_zones++;
	if (out != NULL)
		*out = added;
	return populate ? ctg_zone_populate(added, config->base, config->nr) : 0;
}

void ctg_sim_advance(struct ctg_sim *sim, uint64_t ns)
{
	pthread_mutex_lock(&sim->lock);
	sim->virtual_now += ns;
	pthread_mutex_unlock(&sim->lock);
}

uint64_t ctg_sim_fail(struct ctg_sim *sim, enum ctg_sim_hook which, uint64_t nth)
{
	struct sim_hook *hook = &sim->hooks[which];
	uint64_t calls;

	pthread_mutex_lock(&sim->lock);
	calls = hook->calls;
	hook->calls = 0;
	hook->fail_at = nth;
	pthread_mutex_unlock(&sim->lock);
	return calls;
}

uint64_t ctg_sim_meta_bytes(struct ctg_sim *sim)
{
	uint64_t bytes;

	pthread_mutex_lock(&sim->lock);
	bytes = sim->meta_bytes;
	pthread_mutex_unlock(&sim->lock);
	return bytes;
}

/*
 * One access within a page. Returns 1 when done, 0 when the TLB has no entry that allows it:
 * the caller fills it and tries again.
 */
static int tlb_access(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, void *in, const void *out,
	size_t len)
{
	unsigned cpu = sim_cpu(sim);
	ctg_vpn_t vpn = addr >> CTG_PAGE_SHIFT;
	struct tlb_entry *entry = &sim->tlb[cpu][vpn % TLB_ENTRIES];
	int done = 0;

	pthread_rwlock_rdlock(&sim->tlb_lock);
	pthread_mutex_lock(&sim->tlb_fill[cpu]);
	if (entry->mm != mm || entry->vpn != vpn || (out != NULL && !entry->write)) {
		struct ctg_mapping m;

		/*
		 * The walk happens under the lock that invalidations take: an entry that is
		 * changed after the walk is invalidated after the fill.
		 */
		entry->mm = NULL;
		if (ctg_mm_lookup(mm, vpn, 1, &m) == 0 && m.pfn != CTG_PFN_NONE &&
			(m.prot & CTG_PROT_READ) != 0)
			*entry = (struct tlb_entry){
				mm, vpn, m.pfn, (m.prot & CTG_PROT_WRITE) != 0};
	}
	if (entry->mm == mm && entry->vpn == vpn && (out == NULL || entry->write)) {
		unsigned char *p = ctg_sim_frame(sim, entry->pfn);

		p += addr & (CTG_PAGE_SIZE - 1);
		if (out != NULL)
			memcpy(p, out, len);
		else
			memcpy(in, p, len);
		ctg_mm_mark_accessed(mm, vpn, out != NULL);
		done = 1;
	}
	pthread_mutex_unlock(&sim->tlb_fill[cpu]);
	pthread_rwlock_unlock(&sim->tlb_lock);
	return done;
}

static int access_memory(
	struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, void *in, const void *out, size_t len)
{
	while (len != 0) {
		size_t part = CTG_PAGE_SIZE - (addr & (CTG_PAGE_SIZE - 1));

		if (part > len)
			part = len;
		while (!tlb_access(sim, mm, addr, in, out, part)) {
			int ret = ctg_handle_fault(mm, addr >> CTG_PAGE_SHIFT, out != NULL);

			if (ret != 0)
				return ret;
		}
		addr += part;
		len -= part;
		if (in != NULL)
			in = (unsigned char *)in + part;
		if (out != NULL)
			out = (const unsigned char *)out + part;
	}
	return 0;
}

int ctg_sim_read(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, void *buf, size_t len)
{
	return access_memory(sim, mm, addr, buf, NULL, len);
}

int ctg_sim_write(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, const void *buf, size_t len)
{
	return access_memory(sim, mm, addr, NULL, buf, len);
}
