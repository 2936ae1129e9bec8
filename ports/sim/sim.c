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

/*
 * A tlb_restrict for writing whose tlb_install has not come yet. Meanwhile the core switches
 * entries to other frames: a write that is filled from the new entry while another CPU still reads
 * through the old one would not be seen there. So no write is filled until the install has dropped
 * both.
 */
struct sim_hold {
	struct sim_hold *next;
	struct ctg_mm *mm;
	size_t nr;
	struct ctg_vrange range[];
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
	struct sim_hold *holds;   /* under tlb_lock */
	struct ctg_word32 let_go; /* raised when writers may go on */
	int install_failed;       /* the next install puts back: it may not fail */
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

/*
 * What is freed may have been an address space whose process was gone, so that no invalidation was
 * asked for. Another may come to be at its address, and must not meet its TLB entries.
 */
static void tlb_forget(struct ctg_sim *sim, const void *p, size_t bytes)
{
	pthread_rwlock_wrlock(&sim->tlb_lock);
	for (unsigned cpu = 0; cpu < sim->config.nr_cpus; cpu++)
		for (unsigned i = 0; i < TLB_ENTRIES; i++) {
			struct tlb_entry *entry = &sim->tlb[cpu][i];

			if ((uintptr_t)entry->mm - (uintptr_t)p < bytes)
				entry->mm = NULL;
		}
	pthread_rwlock_unlock(&sim->tlb_lock);
}

static void sim_meta_free(void *host, void *p, size_t bytes)
{
	struct ctg_sim *sim = host;

	if (p == NULL)
		return;
	tlb_forget(sim, p, bytes);
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

			if (pthread_cond_clockwait(&sim->woken, &sim->lock, CLOCK_MONOTONIC, &ts) !=
				0)
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

/* tlb_lock is held exclusively. */
static void tlb_drop(
	struct ctg_sim *sim, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	for (unsigned cpu = 0; cpu < sim->config.nr_cpus; cpu++)
		for (unsigned i = 0; i < TLB_ENTRIES; i++) {
			struct tlb_entry *entry = &sim->tlb[cpu][i];

			for (size_t r = 0; entry->mm == mm && r < nr; r++)
				if (entry->vpn - ranges[r].vpn < ranges[r].nr)
					entry->mm = NULL;
		}
}

/* Is the page one that writers wait for? tlb_lock is held. */
static bool page_held(const struct ctg_sim *sim, const struct ctg_mm *mm, ctg_vpn_t vpn)
{
	for (const struct sim_hold *hold = sim->holds; hold != NULL; hold = hold->next)
		for (size_t r = 0; hold->mm == mm && r < hold->nr; r++)
			if (vpn - hold->range[r].vpn < hold->range[r].nr)
				return true;
	return false;
}

/* Does an install of these ranges end the hold? Not if it is somebody else's, of pages that move.
 */
static bool hold_ends(const struct sim_hold *hold, const struct ctg_vrange *ranges, size_t nr)
{
	size_t at = 0;

	for (size_t r = 0; r < hold->nr; r++) {
		const struct ctg_vrange *held = &hold->range[r];
		struct ctg_mapping m = {.nr = 1};

		while (at < nr && ranges[at].vpn + ranges[at].nr <= held->vpn)
			at++;
		if (at == nr || held->vpn < ranges[at].vpn ||
			held->vpn + held->nr > ranges[at].vpn + ranges[at].nr)
			return false;
		for (uint64_t done = 0; done < held->nr; done += m.nr)
			if (ctg_mm_lookup(hold->mm, held->vpn + done, held->nr - done, &m) != 0 ||
				m.moving)
				return false;
	}
	return true;
}

static int sim_tlb_restrict(void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges,
	size_t nr, enum ctg_tlb_how how)
{
	struct ctg_sim *sim = host;
	struct sim_hold *hold = NULL;

	if (how == CTG_TLB_WRPROTECT) {
		if (hook_fails(sim, CTG_SIM_RESTRICT))
			return -CTG_EBUSY;
		hold = malloc(sizeof(*hold) + nr * sizeof(*ranges));
		if (hold == NULL)
			return -CTG_ENOMEM;
		hold->mm = mm;
		hold->nr = nr;
		memcpy(hold->range, ranges, nr * sizeof(*ranges));
	}
	pthread_rwlock_wrlock(&sim->tlb_lock);
	if (hold != NULL) {
		hold->next = sim->holds;
		sim->holds = hold;
	}
	tlb_drop(sim, mm, ranges, nr);
	pthread_rwlock_unlock(&sim->tlb_lock);
	return 0;
}

static int sim_tlb_install(
	void *host, struct ctg_mm *mm, const struct ctg_vrange *ranges, size_t nr)
{
	struct ctg_sim *sim = host;
	bool back = __atomic_exchange_n(&sim->install_failed, 0, __ATOMIC_ACQ_REL) != 0;
	struct sim_hold **link = &sim->holds;

	if (hook_fails(sim, CTG_SIM_INSTALL) && !back) {
		__atomic_store_n(&sim->install_failed, 1, __ATOMIC_RELEASE);
		return -CTG_ENOMEM;
	}
	pthread_rwlock_wrlock(&sim->tlb_lock);
	tlb_drop(sim, mm, ranges, nr);
	while (*link != NULL) {
		struct sim_hold *hold = *link;

		if (hold->mm == mm && hold_ends(hold, ranges, nr)) {
			*link = hold->next;
			free(hold);
		} else {
			link = &hold->next;
		}
	}
	__atomic_fetch_add(&sim->let_go.v, 1, __ATOMIC_RELEASE);
	pthread_rwlock_unlock(&sim->tlb_lock);
	sim_wake(sim, &sim->let_go, UINT32_MAX);
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
	while (sim->holds != NULL) {
		struct sim_hold *hold = sim->holds;

		sim->holds = hold->next;
		free(hold);
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
	ret = zone->memory == NULL || zone->metadata == NULL
		      ? -CTG_ENOMEM
		      : ctg_zone_add(sim->ctg, &filled, &added);
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
static int tlb_access(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, void *in,
	const void *out, size_t len)
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
			*entry = (struct tlb_entry){mm, vpn, m.pfn,
				(m.prot & CTG_PROT_WRITE) != 0 && !page_held(sim, mm, vpn)};
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

/* Sleep if writers to the page are held back: until the port has installed something. */
static void wait_while_held(struct ctg_sim *sim, struct ctg_mm *mm, ctg_vpn_t vpn)
{
	uint32_t seen = __atomic_load_n(&sim->let_go.v, __ATOMIC_ACQUIRE);
	bool held;

	pthread_rwlock_rdlock(&sim->tlb_lock);
	held = page_held(sim, mm, vpn);
	pthread_rwlock_unlock(&sim->tlb_lock);
	if (held)
		sim_wait(sim, &sim->let_go, seen, CTG_NO_DEADLINE, false);
}

static int access_memory(struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, void *in,
	const void *out, size_t len)
{
	while (len != 0) {
		size_t part = CTG_PAGE_SIZE - (addr & (CTG_PAGE_SIZE - 1));

		if (part > len)
			part = len;
		while (!tlb_access(sim, mm, addr, in, out, part)) {
			int ret = ctg_handle_fault(mm, addr >> CTG_PAGE_SHIFT, out != NULL);

			if (ret != 0)
				return ret;
			if (out != NULL)
				wait_while_held(sim, mm, addr >> CTG_PAGE_SHIFT);
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

int ctg_sim_write(
	struct ctg_sim *sim, struct ctg_mm *mm, uint64_t addr, const void *buf, size_t len)
{
	return access_memory(sim, mm, addr, NULL, buf, len);
}
