/* SPDX-License-Identifier: MIT */
/* What a run did, in words. */
#define _GNU_SOURCE
#include "engine.h"
#include "pgtable.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define LINES 400
#define LINE 200
static char lines[LINES][LINE];
static uint64_t pcs[LINES];
static uint64_t nr_lines;

void xp_trace_reset(void)
{
	nr_lines = 0;
}

static char *new_line(uint64_t pc)
{
	pcs[nr_lines % LINES] = pc;
	return lines[nr_lines++ % LINES];
}

void xp_trace_text(const char *format, ...)
{
	char *line = new_line(0);
	int n = snprintf(line, LINE, "%7llu  %u  ", (unsigned long long)xp_run.step, xp_run.now);
	va_list args;

	va_start(args, format);
	vsnprintf(line + n, LINE - (size_t)n, format, args);
	va_end(args);
}

/* ---- names ------------------------------------------------------------------------------------
 */

#define FIELD(type, base, field)                                                                   \
	if (at - offsetof(type, field) < sizeof(((type *)0)->field)) {                             \
		snprintf(out, bytes, base #field);                                                 \
		return true;                                                                       \
	}

static bool describe_zone(const struct ctg_zone *zone, size_t at, char *out, size_t bytes)
{
	size_t pcp = at - offsetof(struct ctg_zone, pcp);

	(void)zone;
	FIELD(struct ctg_zone, "zone.", lock)
	FIELD(struct ctg_zone, "zone.", isolation_ended)
	FIELD(struct ctg_zone, "zone.", nr_free)
	FIELD(struct ctg_zone, "zone.", free)
	if (pcp < sizeof(zone->pcp)) {
		snprintf(out, bytes, "pcp[%zu].%s", pcp / sizeof(struct ctg_pcp),
			pcp % sizeof(struct ctg_pcp) < 8 ? "lock" : "list");
		return true;
	}
	return false;
}

static bool describe_ctg(size_t at, char *out, size_t bytes)
{
	size_t wait = at - offsetof(struct ctg, frame_wait);

	FIELD(struct ctg, "", areas_lock)
	FIELD(struct ctg, "", batches_lock)
	FIELD(struct ctg, "", batches)
	FIELD(struct ctg, "", anons_lock)
	FIELD(struct ctg, "", anons)
	FIELD(struct ctg, "", counters)
	if (wait < sizeof(((struct ctg *)0)->frame_wait)) {
		snprintf(out, bytes, "frame_wait[%zu]", wait / 4);
		return true;
	}
	return false;
}

static bool describe_mm(size_t at, char *out, size_t bytes)
{
	size_t batch = at - offsetof(struct ctg_mm, batch);

	FIELD(struct ctg_mm, "mm.", lock)
	FIELD(struct ctg_mm, "mm.", spare_lock)
	FIELD(struct ctg_mm, "mm.", spare)
	FIELD(struct ctg_mm, "mm.", recycled)
	FIELD(struct ctg_mm, "mm.", nr_tables)
	FIELD(struct ctg_mm, "mm.", nr_present)
	FIELD(struct ctg_mm, "mm.", moved)
	FIELD(struct ctg_mm, "mm.", slot)
	FIELD(struct ctg_mm, "mm.", pieces)
	if (batch < 4) {
		snprintf(out, bytes, "mm.batch.lock");
		return true;
	}
	FIELD(struct ctg_mm, "mm.", batch)
	return false;
}

static bool describe_table(const struct ctg_table *table, uintptr_t p, char *out, size_t bytes)
{
	uintptr_t at = p - (uintptr_t)table;

	if (table == NULL)
		return false;
	if (at < sizeof(table->entry)) {
		snprintf(out, bytes, "table%u.entry[%zu]", table->level, (size_t)at / 8);
		return true;
	}
	if (at < sizeof(*table)) {
		snprintf(out, bytes, "table%u.%s", table->level,
			at - sizeof(table->entry) < 4 ? "lock" : "fields");
		return true;
	}
	for (unsigned i = 0; i < CTG_TABLE_ENTRIES; i++)
		if ((table->entry[i].v & CTG_PTE_TABLE) != 0 &&
			describe_table(
				(const void *)(uintptr_t)(table->entry[i].v & ~CTG_PTE_TABLE), p,
				out, bytes))
			return true;
	return false;
}

static bool describe_frame(const void *p, char *out, size_t bytes)
{
	static const char *const fields[] = {"word", "link", "index", "info"};
	uint64_t index;
	const struct ctg_zone *zone = xp_zone_of_metadata(p, &index);

	if (zone == NULL)
		return false;
	snprintf(out, bytes, "frame %llu.%s", (unsigned long long)(zone->base + index),
		fields[((uintptr_t)p - (uintptr_t)&zone->frames[index]) / 8]);
	return true;
}

void xp_describe(const void *p, char *out, size_t bytes)
{
	const struct ctg *ctg = xp_world->ctg;
	uintptr_t at = (uintptr_t)p;

	if (p == &xp_m->let_go) {
		snprintf(out, bytes, "the port's writers");
		return;
	}
	if (ctg == NULL || describe_frame(p, out, bytes))
		return;
	if (at - (uintptr_t)ctg < sizeof(*ctg) && describe_ctg(at - (uintptr_t)ctg, out, bytes))
		return;
	for (unsigned i = 0; i < ctg->nr_zones; i++) {
		uintptr_t blocks = at - (uintptr_t)ctg->zones[i]->blocks;

		if (at - (uintptr_t)ctg->zones[i] < sizeof(*ctg->zones[i]) &&
			describe_zone(ctg->zones[i], at - (uintptr_t)ctg->zones[i], out, bytes))
			return;
		if (blocks < ctg->zones[i]->nr_blocks * sizeof(struct ctg_block)) {
			snprintf(out, bytes, "block %zu+%zu", blocks / sizeof(struct ctg_block),
				blocks % sizeof(struct ctg_block));
			return;
		}
	}
	for (const struct ctg_batch *b = ctg->batches; b != NULL; b = b->next) {
		if (at - (uintptr_t)b->mm < sizeof(*b->mm) &&
			describe_mm(at - (uintptr_t)b->mm, out, bytes))
			return;
		if (describe_table(b->mm->root, at, out, bytes))
			return;
		if (at - (uintptr_t)b->mm->anon < sizeof(struct ctg_anon)) {
			snprintf(out, bytes, "anon+%zu", (size_t)(at - (uintptr_t)b->mm->anon));
			return;
		}
	}
	snprintf(out, bytes, "arena+%zu", (size_t)(at - (uintptr_t)xp_arena));
}

static void describe_word(char *out, size_t bytes, uint64_t w)
{
	if (ctg_word_frozen(w))
		snprintf(out, bytes, "FROZEN%s", (w & CTG_WORD_WAITERS) != 0 ? " W" : "");
	else
		snprintf(out, bytes, "m%u p%u r%u%s", ctg_word_map(w), ctg_word_pin(w),
			ctg_word_ref(w), (w & CTG_WORD_WAITERS) != 0 ? " W" : "");
}

static void describe_entry(char *out, size_t bytes, uint64_t e)
{
	static const char letters[] = "PRWTryDM";
	size_t n = 0;

	for (unsigned i = 0; i < 8 && n + 2 < bytes; i++)
		if ((e >> i & 1) != 0)
			out[n++] = letters[i];
	if ((e & CTG_PTE_PRESENT) != 0)
		snprintf(out + n, bytes - n, " %llu", (unsigned long long)ctg_pte_pfn(e));
	else
		snprintf(out + n, bytes - n, "%s", e == 0 ? "empty" : "");
}

static void describe_value(const char *name, unsigned size, uint64_t v, char *out, size_t bytes)
{
	static const char *const states[] = {"TAIL", "FREE", "PCP", "USED", "ANON", "CONTIG"};

	if (size == 8 && strstr(name, ".word") != NULL)
		describe_word(out, bytes, v);
	else if (size == 8 && strstr(name, ".entry") != NULL)
		describe_entry(out, bytes, v);
	else if (strstr(name, ".info") != NULL && (v & 255) < 6)
		snprintf(out, bytes, "%s o%u", states[v & 255], ctg_info_order((uint32_t)v));
	else
		snprintf(out, bytes, "%llx", (unsigned long long)v);
}

void xp_trace(
	const void *p, const char *what, unsigned size, uint64_t old, uint64_t now, uint64_t pc)
{
	char name[64], before[40], after[40], change[96];
	bool all = xp_all_points;
	bool shared;

	xp_all_points = false;
	shared = xp_shared(p, true);
	xp_all_points = all;
	if (!shared)
		return;
	xp_describe(p, name, sizeof(name));
	describe_value(name, size, old, before, sizeof(before));
	describe_value(name, size, now, after, sizeof(after));
	snprintf(change, sizeof(change), "%s%s%s", before, old == now ? "" : " -> ",
		old == now ? "" : after);
	snprintf(new_line(pc), LINE, "%7llu  %u  %-13s %-22s %s", (unsigned long long)xp_run.step,
		xp_run.now, what, name, change);
}

/* ---- places in the source ---------------------------------------------------------------------
 */

extern const char __executable_start[];

void xp_describe_pc(uint64_t pc, char *out, size_t bytes)
{
	char path[1024], command[1280], line[256], *end;
	ssize_t n = readlink("/proc/self/exe", path, sizeof(path) - 1);
	FILE *pipe;

	*out = '\0';
	if (n <= 0)
		return;
	path[n] = '\0';
	/* The call that the address returns to. */
	snprintf(command, sizeof(command), "addr2line -sfpie '%s' 0x%llx 2>/dev/null", path,
		(unsigned long long)(pc - 1 - (uint64_t)(uintptr_t)__executable_start));
	pipe = popen(command, "r");
	if (pipe == NULL)
		return;
	/* The first place that is not the atomic or the lock itself. */
	while (fgets(line, sizeof(line), pipe) != NULL) {
		const char *from = strstr(line, "(inlined by) ");

		from = from != NULL ? from + strlen("(inlined by) ") : line;
		if (strstr(line, "atomic.h:") != NULL || strstr(line, "lock.h:") != NULL)
			continue;
		snprintf(out, bytes, "%s", from);
		break;
	}
	pclose(pipe);
	end = strpbrk(out, "\n(");
	if (end != NULL)
		*end = '\0';
}

void xp_trace_print(void)
{
	uint64_t from = nr_lines > LINES ? nr_lines - LINES : 0;
	char place[160];

	printf("   step  fiber\n");
	for (uint64_t i = from; i < nr_lines; i++) {
		place[0] = '\0';
		if (pcs[i % LINES] != 0)
			xp_describe_pc(pcs[i % LINES], place, sizeof(place));
		printf("%-76s %s\n", lines[i % LINES], place);
	}
}
