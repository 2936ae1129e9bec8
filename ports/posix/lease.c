/* SPDX-License-Identifier: MIT */
/*
 * Leases: buffers that somebody outside this process holds, and what follows when one ends. Every
 * frame that was taken is in exactly one lease from the moment the core granted it to its release,
 * so nothing is lost whoever dies.
 *
 * Answers:
 *   alloc    {"lease": N, "bytes": all of it, "blocks": [{"pfn", "offset", "bytes", "phys": the
 *            first physical frame's number or null}, ...] in ascending order of pfn,
 *            "physically_contiguous": every block in itself: true, false or null,
 *            "frames_moved", "ns", "report": see report.c}; if "fd" was asked for, "extents":
 *            [{"offset", "bytes"}, ...]: where the blocks, one after the other, lie in the file.
 *            A failure carries "report" too, and "got": blocks that were had and given back.
 *   release  {"lease": N, "bytes": released, "left": bytes that remain, "held_frames"}
 *   leases   {"leases": [{"lease", "pid", "comm", "hold", "since_ns": CLOCK_REALTIME,
 *            "age_ns", "nr_blocks", "bytes"}, ...]}
 */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define WATCH_STOP 0            /* what the watcher's events are about: the stop event, */
#define WATCH_HOME UINT64_MAX   /* an agent that answers again, */
				/* or else the connection of the taker of that number */
#define HOME_BUDGET_FRAMES 2048 /* 8 MiB: what an allocation may have to wait for */

/* ---- takers that may go away --------------------------------------------------------------- */

/*
 * While an allocation runs, its connection's thread is inside the core. This thread notices that
 * the other end has gone, or that the server stops, and raises the taker's cancel word.
 */
void *watch_thread(void *arg)
{
	struct ctg_server *server = arg;
	const struct ctg_port *port = ctg_port_of(server->ctg);
	struct epoll_event event;

	for (;;) {
		if (epoll_wait(server->watch_epoll, &event, 1, -1) != 1)
			continue;
		if (event.data.u64 == WATCH_HOME) {
			home_kick(server, true);
			continue;
		}
		pthread_mutex_lock(&server->lock);
		for (struct taker *t = server->takers; t != NULL; t = t->next) {
			if (event.data.u64 != WATCH_STOP && event.data.u64 != t->id)
				continue;
			__atomic_store_n(&t->cancel.v, 1, __ATOMIC_RELEASE);
			port->wake(port->host, &t->cancel, UINT32_MAX);
		}
		pthread_cond_broadcast(&server->changed);
		pthread_mutex_unlock(&server->lock);
		if (event.data.u64 == WATCH_STOP)
			return NULL;
	}
}

/*
 * What is on its way home at this moment is held, and the allocation would find it in its way. A
 * step is short, and no other begins while somebody allocates; only a borrower that does not answer
 * may make it long, and then there is no use in waiting.
 */
static void taker_await_home(struct ctg_server *server, const struct taker *taker)
{
	uint64_t give_up = posix_now(NULL) + SERVER_PING_NS;
	const struct timespec until = {
		.tv_sec = (time_t)(give_up / 1000000000u),
		.tv_nsec = (long)(give_up % 1000000000u),
	};

	pthread_mutex_lock(&server->lock);
	while (server->coming_home && taker->cancel.v == 0)
		if (pthread_cond_timedwait(&server->changed, &server->lock, &until) != 0)
			break;
	pthread_mutex_unlock(&server->lock);
}

static void taker_begin(struct connection *connection, struct taker *taker)
{
	struct ctg_server *server = connection->server;
	struct epoll_event event = {.events = EPOLLRDHUP | EPOLLONESHOT};

	pthread_mutex_lock(&server->lock);
	taker->id = ++server->next_taker;
	taker->cancel.v = server->stopping;
	taker->next = server->takers;
	server->takers = taker;
	server->allocating++;
	pthread_mutex_unlock(&server->lock);
	event.data.u64 = taker->id;
	/* Without a watch it can still be answered; it only cannot be cancelled. */
	epoll_ctl(server->watch_epoll, EPOLL_CTL_ADD, connection->fd, &event);
	taker_await_home(server, taker);
}

static void taker_end(struct connection *connection, struct taker *taker)
{
	struct ctg_server *server = connection->server;

	epoll_ctl(server->watch_epoll, EPOLL_CTL_DEL, connection->fd, NULL);
	pthread_mutex_lock(&server->lock);
	for (struct taker **at = &server->takers; *at != NULL; at = &(*at)->next)
		if (*at == taker) {
			*at = taker->next;
			break;
		}
	server->allocating--;
	/* Whatever came of it, frames may have been displaced, and there may be room for them. */
	server->home_wanted = true;
	pthread_cond_signal(&server->home);
	pthread_mutex_unlock(&server->lock);
}

/* ---- coming home --------------------------------------------------------------------------- */

void home_kick(struct ctg_server *server, bool hint)
{
	pthread_mutex_lock(&server->lock);
	server->home_wanted = true;
	server->hint_wanted = server->hint_wanted || hint;
	pthread_cond_signal(&server->home);
	pthread_mutex_unlock(&server->lock);
}

void home_await_answer(struct ctg_server *server, int agent_fd)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLONESHOT, .data.u64 = WATCH_HOME};

	/* Goes away with the descriptor. */
	if (epoll_ctl(server->watch_epoll, EPOLL_CTL_ADD, agent_fd, &event) != 0)
		epoll_ctl(server->watch_epoll, EPOLL_CTL_MOD, agent_fd, &event);
}

/* Borrowers that had to do with ordinary memory may have lent memory now. */
static void home_hint(struct ctg_server *server)
{
	struct ctg_cma_stat area;

	ctg_cma_stat(server->area, &area);
	if (area.nr_free < POSIX_CHUNK_FRAMES)
		return;
	for (struct session *s = session_next(server, NULL); s != NULL; s = session_next(server, s))
		session_hint(s);
}

/*
 * Woken by everything that makes room: releases, unmaps, ends of borrowers, ends of allocations.
 * What could not come home (no room, or held) waits for the next such event.
 */
void *home_thread(void *arg)
{
	struct ctg_server *server = arg;
	uint64_t moved;
	bool hint;
	int err;

	for (;;) {
		pthread_mutex_lock(&server->lock);
		/* Not against an allocation: it would displace the same frames again. */
		while (!server->stopping && (!server->home_wanted || server->allocating != 0))
			pthread_cond_wait(&server->home, &server->lock);
		server->home_wanted = false;
		hint = server->hint_wanted;
		if (server->stopping) {
			pthread_mutex_unlock(&server->lock);
			return NULL;
		}
		server->coming_home = true;
		pthread_mutex_unlock(&server->lock);
		err = ctg_migrate_home(server->ctg, HOME_BUDGET_FRAMES, &moved);
		pthread_mutex_lock(&server->lock);
		server->coming_home = false;
		pthread_cond_broadcast(&server->changed);
		pthread_mutex_unlock(&server->lock);
		if (err == -CTG_EAGAIN) {
			home_kick(server, hint);
		} else if (hint) {
			pthread_mutex_lock(&server->lock);
			server->hint_wanted = false;
			pthread_mutex_unlock(&server->lock);
			home_hint(server);
		}
	}
}

/* ---- taking -------------------------------------------------------------------------------- */

/* An allocation under way: its lease, whose blocks fill up, and what it has cost so far. */
struct taking {
	struct connection *connection;
	const struct control_request *request;
	struct taker taker;
	struct ctg_alloc_request core;
	struct ctg_alloc_report report; /* of the last attempt */
	struct ctg_alloc_report total;
	struct lease *lease;
	uint64_t ns; /* when it began; in the end: how long it took */
};

static void report_add(struct taking *t)
{
	t->total.result = t->report.result;
	t->total.windows_tried += t->report.windows_tried;
	t->total.frames_moved += t->report.frames_moved;
	t->total.frames_free += t->report.frames_free;
	t->total.ns_search += t->report.ns_search;
	t->total.ns_isolate += t->report.ns_isolate;
	t->total.ns_copy += t->report.ns_copy;
	t->total.ns_install += t->report.ns_install;
	t->total.ns_zero += t->report.ns_zero;
	t->total.ns_total += t->report.ns_total;
	if (t->report.obstacle != CTG_OBSTACLE_NONE) {
		t->total.obstacle = t->report.obstacle;
		t->total.obstacle_pfn = t->report.obstacle_pfn;
		t->total.obstacle_word = t->report.obstacle_word;
	}
}

static int take_run(struct taking *t, uint64_t frames, ctg_pfn_t *pfn)
{
	int err;

	memset(&t->report, 0, sizeof(t->report));
	t->report.obstacle_pfn = CTG_PFN_NONE;
	t->core.report = &t->report;
	err = ctg_cma_alloc(t->connection->server->area, frames, &t->core, pfn);
	t->report.result = err;
	report_add(t);
	return err;
}

/*
 * Blocks of one order, as few calls as possible: first out of runs that are free, then out of runs
 * as long as what is missing, halved while something is in the way. A run's blocks are released one
 * by one like any others, and one move of 300 MiB costs far less than 4800 of 64 KiB.
 */
static int take_blocks(struct taking *t)
{
	const uint64_t frames = (uint64_t)1 << t->request->order;
	struct lease *lease = t->lease;
	uint64_t longest = t->request->count; /* blocks to ask for at once */
	struct ctg_cma_stat area;
	ctg_pfn_t pfn;
	int err;

	while (lease->nr < t->request->count) {
		uint64_t missing = t->request->count - lease->nr, run;

		ctg_cma_stat(t->connection->server->area, &area);
		run = area.longest_free / frames;
		if (run == 0 || run > longest)
			run = longest;
		if (run > missing)
			run = missing;
		err = take_run(t, run * frames, &pfn);
		if (err == 0) {
			for (uint64_t i = 0; i < run; i++)
				lease->block[lease->nr++] =
					(struct ctg_extent){.pfn = pfn + i * frames, .nr = frames};
		} else if ((err == -CTG_EBUSY || err == -CTG_ENOMEM) && run > 1) {
			longest = run / 2;
		} else {
			return err;
		}
	}
	return 0;
}

static int block_compare(const void *a, const void *b)
{
	const struct ctg_extent *x = a, *y = b;

	return x->pfn < y->pfn ? -1 : x->pfn > y->pfn;
}

static int take(struct taking *t)
{
	const struct control_request *r = t->request;
	uint64_t frames = (r->bytes + CTG_PAGE_SIZE - 1) >> CTG_PAGE_SHIFT;
	unsigned align = 0;
	int err;

	while (align < 63 && (uint64_t)CTG_PAGE_SIZE << align < r->align)
		align++;
	if (r->count != 0 && align < r->order)
		align = r->order;
	t->core.mode = r->fast ? CTG_MODE_FAST : CTG_MODE_NORMAL;
	t->core.flags = r->no_zero ? CTG_ALLOC_NO_ZERO : 0;
	t->core.align_order = align;
	t->core.cancel = &t->taker.cancel;
	t->total.obstacle_pfn = CTG_PFN_NONE;
	if (r->timeout_ns != 0)
		t->core.deadline =
			r->timeout_ns < CTG_NO_DEADLINE - 1 - t->ns ? t->ns + r->timeout_ns : 0;
	if (r->count != 0) {
		err = take_blocks(t);
		qsort(t->lease->block, t->lease->nr, sizeof(*t->lease->block), block_compare);
	} else {
		err = take_run(t, frames, &t->lease->block[0].pfn);
		if (err == 0)
			t->lease->block[t->lease->nr++].nr = frames;
	}
	t->ns = posix_now(NULL) - t->ns;
	return err;
}

static uint64_t realtime(void)
{
	struct timespec now;

	clock_gettime(CLOCK_REALTIME, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static struct lease *lease_new(struct connection *connection, const struct control_request *r)
{
	struct lease *lease = calloc(1, sizeof(*lease));

	if (lease == NULL)
		return NULL;
	lease->block = calloc(r->count != 0 ? r->count : 1, sizeof(*lease->block));
	if (lease->block == NULL) {
		free(lease);
		return NULL;
	}
	lease->since = realtime();
	pthread_mutex_lock(&connection->server->lock);
	lease->number = ++connection->server->next_lease;
	pthread_mutex_unlock(&connection->server->lock);
	lease->holder = r->hold ? connection : NULL;
	lease->pid = connection->pid;
	memcpy(lease->comm, connection->comm, sizeof(lease->comm));
	return lease;
}

/* Give back what the lease still has. Returns frames that others still hold. */
static uint64_t lease_free(struct ctg_server *server, struct lease *lease)
{
	uint64_t held = 0, h;

	for (size_t i = 0; i < lease->nr; i++) {
		if (lease->block[i].nr == 0)
			continue;
		h = 0;
		if (ctg_cma_release(server->area, lease->block[i].pfn, lease->block[i].nr, &h) == 0)
			held += h;
	}
	free(lease->block);
	free(lease);
	return held;
}

static void lease_register(struct connection *connection, struct lease *lease)
{
	struct ctg_server *server = connection->server;

	pthread_mutex_lock(&server->lock);
	lease->next = server->leases;
	server->leases = lease;
	if (lease->holder == NULL) {
		server->nr_detached++;
		connection->unread_lease = lease->number;
	}
	pthread_mutex_unlock(&server->lock);
}

/* ---- what the taker is told ---------------------------------------------------------------- */

/* Where a block lies in the file, added to the list; pieces that follow each other are one. */
static void extents_add(struct ctg_server *server, const struct ctg_extent *block, json_t *list)
{
	uint64_t offset, run;
	int fd;

	for (uint64_t i = 0; i < block->nr; i += run) {
		json_t *last = json_array_get(list, json_array_size(list) - 1);
		uint64_t at, bytes;

		if (ctg_region_fd(
			    server->region, block->pfn + i, block->nr - i, &fd, &offset, &run) != 0)
			return;
		at = (uint64_t)json_integer_value(json_object_get(last, "offset"));
		bytes = (uint64_t)json_integer_value(json_object_get(last, "bytes"));
		if (last != NULL && at + bytes == offset)
			json_object_set_new(last, "bytes",
				json_integer((json_int_t)(bytes + (run << CTG_PAGE_SHIFT))));
		else
			json_array_append_new(
				list, json_pack("{s:I, s:I}", "offset", (json_int_t)offset, "bytes",
					      (json_int_t)(run << CTG_PAGE_SHIFT)));
	}
}

/*
 * Where each block lies physically, CTG_PFN_NONE: cannot be known. Blocks that follow each other
 * are asked for at once. Returns whether each is contiguous: 1, 0, or -1: cannot be known.
 */
static int blocks_physical(struct ctg_server *server, const struct lease *lease, uint64_t *phys)
{
	int all = 1, one;

	for (size_t i = 0, n; i < lease->nr; i += n) {
		const struct ctg_extent *b = &lease->block[i];
		uint64_t frames = b->nr;

		for (n = 1; i + n < lease->nr && b->pfn + frames == b[n].pfn; n++)
			frames += b[n].nr;
		one = ctg_region_physical(server->region, b->pfn, frames, &phys[i]);
		for (size_t k = 1; k < n; k++)
			phys[i + k] = phys[i] + (b[k].pfn - b->pfn);
		for (size_t k = 0; one == 0 && n > 1 && k < n; k++)
			if (ctg_region_physical(server->region, b[k].pfn, b[k].nr, &phys[i + k]) !=
				1)
				all = 0;
		if (one == 0 && n == 1)
			all = 0;
		if (one < 0) {
			for (size_t k = 0; k < lease->nr; k++)
				phys[k] = CTG_PFN_NONE;
			return -1;
		}
	}
	return all;
}

static json_t *granted(struct taking *t, int *fd)
{
	struct ctg_server *server = t->connection->server;
	const struct lease *lease = t->lease;
	json_t *blocks = json_array(), *extents = json_array(), *answer;
	uint64_t bytes = 0, offset = 0;
	uint64_t *phys = malloc(lease->nr * sizeof(*phys));
	int contiguous = phys == NULL ? -1 : blocks_physical(server, lease, phys);

	for (size_t i = 0; i < lease->nr; i++) {
		const struct ctg_extent *b = &lease->block[i];

		ctg_region_fd(server->region, b->pfn, 1, fd, &offset, NULL);
		json_array_append_new(
			blocks, json_pack("{s:I, s:I, s:I, s:o}", "pfn", (json_int_t)b->pfn,
					"offset", (json_int_t)offset, "bytes",
					(json_int_t)(b->nr << CTG_PAGE_SHIFT), "phys",
					phys == NULL || phys[i] == CTG_PFN_NONE
						? json_null()
						: json_integer((json_int_t)phys[i])));
		if (t->request->fd)
			extents_add(server, b, extents);
		bytes += b->nr << CTG_PAGE_SHIFT;
	}
	free(phys);
	answer = json_pack("{s:b, s:I, s:I, s:o, s:o, s:I, s:I, s:o}", "ok", 1, "lease",
		(json_int_t)lease->number, "bytes", (json_int_t)bytes, "blocks", blocks,
		"physically_contiguous", contiguous < 0 ? json_null() : json_boolean(contiguous),
		"frames_moved", (json_int_t)t->total.frames_moved, "ns", (json_int_t)t->ns,
		"report", report_alloc(&t->total));
	if (t->request->fd) {
		json_object_set_new(answer, "extents", extents);
	} else {
		json_decref(extents);
		*fd = -1;
	}
	return answer;
}

/* There is a run that fits, but no room for what has to leave it. */
static void text_no_room(struct ctg_server *server, struct ctg_error *error)
{
	struct ctg_region_info info;
	char all[32], used[32];

	ctg_region_info(server->region, &info);
	posix_error(error, -CTG_ENOMEM,
		"no room for what has to move: of the spill zone's %s, %s are in use, and the "
		"system "
		"or the borrower can have no more; free memory, or start the region with a larger "
		"--spill",
		report_size(info.spill_bytes, all, sizeof(all)),
		report_size(info.spill_used_bytes, used, sizeof(used)));
}

static void text_no_memory(struct taking *t, struct ctg_error *error)
{
	struct ctg_server *server = t->connection->server;
	const struct control_request *r = t->request;
	uint64_t bytes = r->count != 0 ? (uint64_t)CTG_PAGE_SIZE << r->order : r->bytes;
	struct ctg_cma_stat area;
	char want[32], all[32], run[32];
	uint64_t longest;

	ctg_cma_stat(server->area, &area);
	longest = area.longest_unallocated << CTG_PAGE_SHIFT;
	report_size(bytes, want, sizeof(want));
	report_size(area.nr << CTG_PAGE_SHIFT, all, sizeof(all));
	report_size(longest, run, sizeof(run));
	if (r->count != 0 && r->count > (area.nr << CTG_PAGE_SHIFT) / bytes)
		posix_error(error, -CTG_ENOMEM, "%llu blocks of %s: the area has only %s",
			(unsigned long long)r->count, want, all);
	else if (bytes > area.nr << CTG_PAGE_SHIFT)
		posix_error(error, -CTG_ENOMEM,
			"%s: the area has only %s; start the region with a larger --region", want,
			all);
	else if (t->total.obstacle != CTG_OBSTACLE_NONE && bytes <= longest)
		text_no_room(server, error);
	else
		posix_error(error, -CTG_ENOMEM,
			"no contiguous run of %s%s: the area has %s, longest unallocated run %s%s",
			want, r->align > CTG_PAGE_SIZE ? " with that alignment" : "", all, run,
			area.nr_allocated != 0 ? "; release a buffer first" : "");
}

static void text_busy(struct taking *t, struct ctg_error *error)
{
	const struct ctg_alloc_report *r = &t->total;

	if (r->obstacle_pfn == CTG_PFN_NONE)
		posix_error(error, -CTG_EBUSY, "every window that fits is held: %s; try again",
			report_obstacle(r->obstacle));
	else
		posix_error(error, -CTG_EBUSY,
			"every window that fits is held: the last obstacle is frame %#llx, %s; try "
			"again, or with a timeout",
			(unsigned long long)r->obstacle_pfn, report_obstacle(r->obstacle));
}

static json_t *refused(struct taking *t, int err, size_t got)
{
	struct ctg_error error;
	json_t *answer;

	switch (err) {
	case -CTG_ENOMEM:
		text_no_memory(t, &error);
		break;
	case -CTG_EBUSY:
		text_busy(t, &error);
		break;
	case -CTG_ETIMEDOUT:
		posix_error(&error, err, "not within %.3f s (last obstacle: %s); allow more time",
			(double)t->request->timeout_ns / 1e9, report_obstacle(t->total.obstacle));
		break;
	case -CTG_EINTR:
		posix_error(&error, err, "cancelled: the region is being closed");
		break;
	case -CTG_EINVAL:
		posix_error(&error, err, "an area of this size cannot have that alignment");
		break;
	default:
		posix_error(&error, err, "%s", strerror(-err));
		break;
	}
	answer = control_failure(&error, report_alloc(&t->total));
	json_object_set_new(answer, "got", json_integer((json_int_t)got));
	return answer;
}

json_t *lease_alloc(struct connection *connection, const struct control_request *request, int *fd)
{
	struct ctg_server *server = connection->server;
	struct taking t = {.connection = connection, .request = request};
	struct ctg_error error;
	struct ctg_cma_stat area;
	json_t *answer;
	size_t got;
	int err;

	*fd = -1;
	/* Refused before anything is reserved for it: the counts are the taker's. */
	ctg_cma_stat(server->area, &area);
	if (request->count > area.nr >> request->order)
		return refused(&t, -CTG_ENOMEM, 0);
	t.lease = lease_new(connection, request);
	if (t.lease == NULL) {
		posix_error(&error, -CTG_ENOMEM, "the server has no memory for the request");
		return control_failure(&error, NULL);
	}
	t.ns = posix_now(NULL);
	taker_begin(connection, &t.taker);
	err = take(&t);
	taker_end(connection, &t.taker);
	if (err != 0) {
		got = t.lease->nr;
		answer = refused(&t, err, got);
		lease_free(server, t.lease);
		home_kick(server, true);
		return answer;
	}
	t.lease->nr_left = t.lease->nr;
	for (size_t i = 0; i < t.lease->nr; i++)
		t.lease->frames += t.lease->block[i].nr;
	/* Once it is in the list anybody may release it. */
	answer = granted(&t, fd);
	lease_register(connection, t.lease);
	return answer;
}

/* ---- giving back --------------------------------------------------------------------------- */

/* Take a lease out of the list. server->lock held. */
static void lease_unlink(struct ctg_server *server, struct lease *lease)
{
	for (struct lease **at = &server->leases; *at != NULL; at = &(*at)->next)
		if (*at == lease) {
			*at = lease->next;
			break;
		}
	if (lease->holder == NULL)
		server->nr_detached--;
	pthread_cond_broadcast(&server->changed);
}

static json_t *no_lease(const struct control_request *request)
{
	struct ctg_error error;

	if (request->has_block)
		posix_error(&error, -CTG_ENOENT,
			"no block %llu in a lease %llu; `contig leases` lists the leases",
			(unsigned long long)request->block, (unsigned long long)request->lease);
	else
		posix_error(&error, -CTG_ENOENT, "no lease %llu; `contig leases` lists them",
			(unsigned long long)request->lease);
	return control_failure(&error, NULL);
}

static json_t *released(uint64_t number, uint64_t frames, uint64_t left, uint64_t held)
{
	return json_pack("{s:b, s:I, s:I, s:I, s:I}", "ok", 1, "lease", (json_int_t)number, "bytes",
		(json_int_t)(frames << CTG_PAGE_SHIFT), "left",
		(json_int_t)(left << CTG_PAGE_SHIFT), "held_frames", (json_int_t)held);
}

json_t *lease_release(struct ctg_server *server, const struct control_request *request)
{
	struct lease *lease;
	struct ctg_extent block = {0};
	uint64_t frames, left, held = 0;

	pthread_mutex_lock(&server->lock);
	for (lease = server->leases; lease != NULL; lease = lease->next)
		if (lease->number == request->lease)
			break;
	if (lease == NULL ||
		(request->has_block &&
			(request->block >= lease->nr || lease->block[request->block].nr == 0))) {
		pthread_mutex_unlock(&server->lock);
		return no_lease(request);
	}
	if (request->has_block) {
		/* Out of the lease first: of two releases of one block, one finds it. */
		block = lease->block[request->block];
		lease->block[request->block].nr = 0;
		lease->frames -= block.nr;
		lease->nr_left--;
	}
	left = lease->frames;
	frames = request->has_block ? block.nr : lease->frames;
	if (!request->has_block || lease->nr_left == 0)
		lease_unlink(server, lease);
	else
		lease = NULL;
	pthread_mutex_unlock(&server->lock);

	if (request->has_block)
		ctg_cma_release(server->area, block.pfn, block.nr, &held);
	else
		left = 0;
	if (lease != NULL)
		held += lease_free(server, lease);
	home_kick(server, true);
	return released(request->lease, frames, left, held);
}

json_t *lease_list(struct ctg_server *server)
{
	json_t *list = json_array();
	uint64_t now = realtime();

	pthread_mutex_lock(&server->lock);
	for (const struct lease *l = server->leases; l != NULL; l = l->next)
		json_array_insert_new(list, 0,
			json_pack("{s:I, s:i, s:s, s:b, s:I, s:I, s:I, s:I}", "lease",
				(json_int_t)l->number, "pid", (int)l->pid, "comm", l->comm, "hold",
				l->holder != NULL, "since_ns", (json_int_t)l->since, "age_ns",
				(json_int_t)(now > l->since ? now - l->since : 0), "nr_blocks",
				(json_int_t)l->nr_left, "bytes",
				(json_int_t)(l->frames << CTG_PAGE_SHIFT)));
	pthread_mutex_unlock(&server->lock);
	return json_pack("{s:b, s:o}", "ok", 1, "leases", list);
}

/* Take out and release every lease that `match` says, one at a time: releasing may take a while. */
static void lease_drop(struct ctg_server *server,
	bool (*match)(const struct lease *lease, const struct connection *connection),
	const struct connection *connection)
{
	struct lease *lease;
	bool any = false;

	for (;;) {
		pthread_mutex_lock(&server->lock);
		for (lease = server->leases; lease != NULL; lease = lease->next)
			if (match(lease, connection))
				break;
		if (lease != NULL)
			lease_unlink(server, lease);
		pthread_mutex_unlock(&server->lock);
		if (lease == NULL)
			break;
		lease_free(server, lease);
		any = true;
	}
	if (any)
		home_kick(server, true);
}

static bool match_holder(const struct lease *lease, const struct connection *connection)
{
	return lease->holder == connection;
}

static bool match_unread(const struct lease *lease, const struct connection *connection)
{
	return lease->number == connection->unread_lease && lease->holder == NULL;
}

static bool match_all(const struct lease *lease, const struct connection *connection)
{
	return true;
}

void lease_connection_end(struct connection *connection, bool unread)
{
	lease_drop(connection->server, match_holder, connection);
	if (unread && connection->unread_lease != 0)
		lease_drop(connection->server, match_unread, connection);
}

void lease_drop_all(struct ctg_server *server)
{
	lease_drop(server, match_all, NULL);
}
