/* SPDX-License-Identifier: MIT */
/*
 * What is told about the region, as JSON. All sizes in bytes unless a name says frames.
 *
 *   stat  {"name", "backing", "guard": "userfaultfd" or "stop", "guard_why", "map_order",
 *          "region_bytes", "spill_bytes": the limit, "spill_used_bytes", "physical": true, false or
 *          null, "physical_why", "uptime_ns",
 *          "area": {"frames", "allocated", "free", "lent", "lent_percent", "longest_free",
 *                   "longest_unallocated"}: frames,
 *          "counters": {as struct ctg_counters},
 *          "borrowers": [{"pid", "comm", "guard", "lent_bytes", "spilled_bytes", "private_bytes":
 *                   chunks that are ordinary memory now, "full_bytes", "sticky_bytes",
 *                   "other_bytes": served by ordinary memory so far, by reason,
 *                   "stall_max_ns"}, ...],
 *          "leases": how many}
 *   map   the same, and "blocks": {"area": A, "spill": A}, each {"pfn": [...], "free": [...],
 *          "taken": [...], "in_use": [...]: frames, "isolated": [...], "present": [...]: 0 or 1},
 *          an element a pageblock of 512 frames, in ascending order. Holes are left out: there pfn
 *          jumps.
 *   report {"result", "windows_tried", "frames_moved", "frames_free", "ns_search", "ns_isolate",
 *          "ns_copy", "ns_install", "ns_zero", "ns_total", "obstacle": null or {"kind": a text,
 *          "pfn": number or null, "map", "pin", "ref": its holders at that moment}}
 */
#define _GNU_SOURCE
#include "state.h"

#include <stdio.h>
#include <string.h>

#define BLOCKS_AT_ONCE 256

const char *report_size(uint64_t bytes, char *text, size_t size)
{
	static const char *const unit[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
	unsigned i = 0;

	while (i < 4 && bytes != 0 && bytes % 1024 == 0) {
		bytes /= 1024;
		i++;
	}
	snprintf(text, size, "%llu %s", (unsigned long long)bytes, unit[i]);
	return text;
}

const char *report_obstacle(enum ctg_obstacle_kind kind)
{
	switch (kind) {
	case CTG_OBSTACLE_NONE:
		return "none";
	case CTG_OBSTACLE_PIN:
		return "pinned for DMA";
	case CTG_OBSTACLE_REF:
		return "referenced";
	case CTG_OBSTACLE_MAP:
		return "mapped by somebody unknown";
	case CTG_OBSTACLE_UNMOVABLE:
		return "an unmovable allocation";
	case CTG_OBSTACLE_ISOLATED:
		return "another allocation is at work there";
	case CTG_OBSTACLE_PORT:
		return "its borrower does not answer or is busy with it";
	case CTG_OBSTACLE_NO_MEMORY:
		return "no room to move it to";
	case CTG_OBSTACLE_CACHED:
		return "free, in a cache that a fast request does not empty";
	case CTG_OBSTACLE_MOVING:
		return "being moved by somebody else";
	default:
		break;
	}
	return "held";
}

json_t *report_alloc(const struct ctg_alloc_report *r)
{
	json_t *obstacle = json_null();

	if (r->obstacle != CTG_OBSTACLE_NONE)
		obstacle = json_pack("{s:s, s:o, s:i, s:i, s:i}", "kind",
			report_obstacle(r->obstacle), "pfn",
			r->obstacle_pfn == CTG_PFN_NONE ? json_null()
							: json_integer((json_int_t)r->obstacle_pfn),
			"map", (int)(r->obstacle_word & 0xffffff), "pin",
			(int)(r->obstacle_word >> 24 & 0xffffff), "ref",
			(int)(r->obstacle_word >> 48 & 0x3fff));
	return json_pack("{s:i, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:o}", "result",
		r->result, "windows_tried", (json_int_t)r->windows_tried, "frames_moved",
		(json_int_t)r->frames_moved, "frames_free", (json_int_t)r->frames_free, "ns_search",
		(json_int_t)r->ns_search, "ns_isolate", (json_int_t)r->ns_isolate, "ns_copy",
		(json_int_t)r->ns_copy, "ns_install", (json_int_t)r->ns_install, "ns_zero",
		(json_int_t)r->ns_zero, "ns_total", (json_int_t)r->ns_total, "obstacle", obstacle);
}

static json_t *area_json(struct ctg_server *server)
{
	struct ctg_cma_stat a;

	ctg_cma_stat(server->area, &a);
	return json_pack("{s:I, s:I, s:I, s:I, s:f, s:I, s:I}", "frames", (json_int_t)a.nr,
		"allocated", (json_int_t)a.nr_allocated, "free", (json_int_t)a.nr_free, "lent",
		(json_int_t)a.nr_lent, "lent_percent",
		a.nr == 0 ? 0.0 : 100.0 * (double)a.nr_lent / (double)a.nr, "longest_free",
		(json_int_t)a.longest_free, "longest_unallocated",
		(json_int_t)a.longest_unallocated);
}

static json_t *counters_json(struct ctg_server *server)
{
	struct ctg_counters c;

	ctg_counters_read(server->ctg, &c);
	return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I, s:I}",
		"cma_alloc_success", (json_int_t)c.cma_alloc_success, "cma_alloc_fail",
		(json_int_t)c.cma_alloc_fail, "cma_frames_allocated",
		(json_int_t)c.cma_frames_allocated, "cma_frames_released",
		(json_int_t)c.cma_frames_released, "frames_migrated", (json_int_t)c.frames_migrated,
		"migrate_fail", (json_int_t)c.migrate_fail, "frames_returned",
		(json_int_t)c.frames_returned, "faults", (json_int_t)c.faults, "faults_waited",
		(json_int_t)c.faults_waited, "frames_zeroed", (json_int_t)c.frames_zeroed,
		"batches_helped", (json_int_t)c.batches_helped, "cache_drains",
		(json_int_t)c.cache_drains);
}

static json_t *borrowers_json(struct ctg_server *server, bool reset_stall)
{
	json_t *list = json_array();
	struct session_stat stat;

	for (struct session *s = session_next(server, NULL); s != NULL;
		s = session_next(server, s)) {
		session_stat(s, reset_stall, &stat);
		json_array_insert_new(list, 0,
			json_pack("{s:i, s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:I}", "pid",
				(int)s->pid, "comm", s->comm, "guard",
				s->space.guard == POSIX_GUARD_UFFD ? "userfaultfd" : "stop",
				"lent_bytes", (json_int_t)stat.lent, "spilled_bytes",
				(json_int_t)stat.spilled, "private_bytes",
				(json_int_t)stat.private_bytes, "full_bytes",
				(json_int_t)atomic_load(&s->count[PROTO_COUNT_FULL]),
				"sticky_bytes",
				(json_int_t)atomic_load(&s->count[PROTO_COUNT_STICKY]),
				"other_bytes",
				(json_int_t)atomic_load(&s->count[PROTO_COUNT_OTHER]),
				"stall_max_ns", (json_int_t)stat.stall_max_ns));
	}
	return list;
}

/* The pageblocks of a zone that are memory. */
static json_t *blocks_json(struct ctg_server *server, struct ctg_zone *zone)
{
	json_t *pfns = json_array(), *unused = json_array(), *taken = json_array();
	json_t *in_use = json_array(), *isolated = json_array(), *present = json_array();
	struct ctg_block_info info[BLOCKS_AT_ONCE];
	struct ctg_zone_stat stat = {0};
	ctg_pfn_t pfn, end;
	size_t nr;

	if (zone != NULL)
		ctg_zone_stat(zone, &stat);
	end = stat.base + stat.nr_spanned;
	for (pfn = stat.base; pfn < end; pfn += nr * CTG_PAGEBLOCK_FRAMES) {
		nr = ctg_blocks_read(server->ctg, pfn, info, BLOCKS_AT_ONCE);
		if (nr == 0)
			break;
		for (size_t i = 0; i < nr && info[i].pfn < end; i++) {
			if (!info[i].present)
				continue;
			json_array_append_new(pfns, json_integer((json_int_t)info[i].pfn));
			json_array_append_new(unused, json_integer(info[i].nr_free));
			json_array_append_new(taken, json_integer(info[i].nr_taken));
			json_array_append_new(in_use, json_integer(info[i].nr_in_use));
			json_array_append_new(isolated, json_integer(info[i].isolated));
			json_array_append_new(present, json_integer(1));
		}
	}
	return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o}", "pfn", pfns, "free", unused, "taken",
		taken, "in_use", in_use, "isolated", isolated, "present", present);
}

json_t *report_stat(struct ctg_server *server, bool reset_stall, bool map)
{
	struct ctg_region_info info;
	unsigned leases = 0;
	json_t *answer;

	ctg_region_info(server->region, &info);
	pthread_mutex_lock(&server->lock);
	for (const struct lease *l = server->leases; l != NULL; l = l->next)
		leases++;
	pthread_mutex_unlock(&server->lock);
	answer = json_pack("{s:b, s:s, s:s, s:s, s:s, s:i, s:I, s:I, s:I, s:o, s:s, s:I, s:i}",
		"ok", 1, "name", server->name, "backing", info.backing, "guard", info.guard,
		"guard_why", info.guard_why, "map_order", (int)info.map_order, "region_bytes",
		(json_int_t)info.bytes, "spill_bytes", (json_int_t)info.spill_bytes,
		"spill_used_bytes", (json_int_t)info.spill_used_bytes, "physical",
		info.physical < 0 ? json_null() : json_boolean(info.physical), "physical_why",
		info.physical_why, "uptime_ns", (json_int_t)(posix_now(NULL) - server->started),
		"leases", (int)leases);
	if (answer == NULL)
		return NULL;
	json_object_set_new(answer, "area", area_json(server));
	json_object_set_new(answer, "counters", counters_json(server));
	json_object_set_new(answer, "borrowers", borrowers_json(server, reset_stall));
	if (map)
		json_object_set_new(answer, "blocks",
			json_pack("{s:o, s:o}", "area", blocks_json(server, server->region->zone),
				"spill", blocks_json(server, ctg_region_spill(server->region))));
	return answer;
}
