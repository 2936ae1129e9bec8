/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "link.h"
#include "window.h"
#include <errno.h>
#include <string.h>

#define AGENT_LOOK_NS 1000000000u

struct link link_to_server;

void link_setup(const char *path, bool debug)
{
	struct link *l = &link_to_server;
	size_t length = path ? strlen(path) : 0;

	l->debug = debug;
	l->pid = (int32_t)raw1(SYS_getpid, 0);
	l->call_fd = l->agent_fd = l->uffd = -1;
	if (length == 0 || length >= sizeof(l->path)) {
		l->state = LINK_OFF;
		return;
	}
	memcpy(l->path, path, length + 1);
	l->state = LINK_NONE;
}

bool link_trylock(void)
{
	uint32_t free = 0;

	return __atomic_compare_exchange_n(
		&link_to_server.lock, &free, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
}

void link_lock(void)
{
	uint32_t *lock = &link_to_server.lock;

	if (link_trylock())
		return;
	while (__atomic_exchange_n(lock, 2, __ATOMIC_ACQUIRE) != 0)
		raw_futex_wait(lock, 2, UINT64_MAX);
}

void link_unlock(void)
{
	struct link *l = &link_to_server;

	if (__atomic_exchange_n(&l->lock, 0, __ATOMIC_SEQ_CST) == 2)
		raw_futex_wake(&l->lock, 1);
	/* The second agent may have tried the lock in vain. */
	if (__atomic_load_n(&l->lend, __ATOMIC_SEQ_CST) ||
		__atomic_load_n(&l->rescue, __ATOMIC_SEQ_CST))
		link_ring();
}

void link_ring(void)
{
	__atomic_fetch_add(&link_to_server.bell, 1, __ATOMIC_SEQ_CST);
	raw_futex_wake(&link_to_server.bell, 1);
}

bool link_connect(void)
{
	struct link *l = &link_to_server;

	/* The agents of a vfork child would end with it, and its parent would count on them. */
	if (__atomic_load_n(&l->state, __ATOMIC_ACQUIRE) == LINK_NONE &&
		raw1(SYS_getpid, 0) == l->pid) {
		agent_start();
		if (__atomic_load_n(&l->state, __ATOMIC_ACQUIRE) != LINK_UP)
			link_say("contig: no region to lend from, ordinary memory is used\n");
		else
			link_lend_in(0);
	}
	return __atomic_load_n(&l->state, __ATOMIC_ACQUIRE) == LINK_UP;
}

/* Have the second agent serve a request. It exists since hands were shaken, whatever happened to
 * the server. */
static int link_post(uint32_t kind, uintptr_t addr, size_t bytes)
{
	struct link *l = &link_to_server;

	l->request = (struct proto_request){.kind = kind, .addr = addr, .bytes = bytes};
	__atomic_store_n(&l->mail, MAIL_POSTED, __ATOMIC_RELEASE);
	link_ring();
	while (__atomic_load_n(&l->mail, __ATOMIC_ACQUIRE) == MAIL_POSTED) {
		uint64_t since = raw_now();

		raw_futex_wait(&l->mail, MAIL_POSTED, AGENT_LOOK_NS);
		if (raw_now() - since < AGENT_LOOK_NS ||
			raw3(SYS_tgkill, l->pid, l->mail_tid, 0) != -ESRCH)
			continue;
		__atomic_store_n(&l->state, LINK_DOWN, __ATOMIC_SEQ_CST);
		__atomic_store_n(&l->shook_hands, false, __ATOMIC_RELEASE);
		__atomic_store_n(&l->mail, MAIL_IDLE, __ATOMIC_RELAXED);
		return -ENOTCONN;
	}
	__atomic_store_n(&l->mail, MAIL_IDLE, __ATOMIC_RELAXED);
	return l->reply.error;
}

int link_call(uint32_t kind, uintptr_t addr, size_t bytes, uint64_t *done)
{
	int ret = -ENOTCONN;

	if (done)
		*done = 0;
	if (__atomic_load_n(&link_to_server.state, __ATOMIC_ACQUIRE) != LINK_UP)
		return ret;
	ret = link_post(kind, addr, bytes);
	if (done)
		*done = link_to_server.reply.done;
	return ret;
}

int link_rescue(void)
{
	if (!__atomic_load_n(&link_to_server.shook_hands, __ATOMIC_ACQUIRE))
		return -EPERM;
	return link_post(LINK_RESCUE, 0, 0);
}

void link_lend_in(uint64_t delay_ns)
{
	struct link *l = &link_to_server;

	__atomic_store_n(&l->due, raw_now() + delay_ns, __ATOMIC_RELAXED);
	__atomic_store_n(&l->lend, 1, __ATOMIC_SEQ_CST);
	link_ring();
}

void link_child(void)
{
	struct link *l = &link_to_server;

	/* Descriptors were the agents' own: this process never had them. */
	l->call_fd = l->agent_fd = l->uffd = -1;
	l->mail = MAIL_IDLE;
	l->lend = l->rescue = 0;
	l->shook_hands = false;
	l->pid = (int32_t)raw1(SYS_getpid, 0);
	/* A server that was gone stays gone. */
	if (l->state == LINK_UP || l->state == LINK_STARTING)
		l->state = LINK_NONE;
	__atomic_store_n(&l->lock, 0, __ATOMIC_RELEASE);
}

void link_say(const char *text)
{
	if (link_to_server.debug)
		raw3(SYS_write, 2, (long)text, (long)strlen(text));
}
