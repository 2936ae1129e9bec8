/* SPDX-License-Identifier: MIT */
/*
 * Fork. Lent memory is mapped shared, which is the opposite of what a fork is to do with a heap. So
 * before one, every lent chunk becomes ordinary memory, and the kernel's own copy-on-write does the
 * rest, whatever touches the heap in the child before any handler runs. The parent lends its chunks
 * again in the background; the child is a process of its own, with its own link when it needs one.
 *
 * jemalloc's handlers take all of its locks, and whoever has one of them may be waiting in our
 * hooks for the link's lock. So ours must be taken after jemalloc's and dropped before: the library
 * is linked with --wrap=pthread_atfork, and the handlers that jemalloc registers are called from
 * here.
 *
 * A fork without libc (syscall(SYS_clone), or _Fork, which runs no handlers by definition) leaves
 * the child without its lent chunks, unless it shares the address space as vfork does.
 */
#define _GNU_SOURCE
#include "link.h"
#include "window.h"
#include <pthread.h>

int __real_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void));
int __wrap_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void));

static void (*inner_prepare)(void), (*inner_parent)(void), (*inner_child)(void);
static bool was_lent;

static void fork_prepare(void)
{
	inner_prepare();
	link_lock();
	was_lent = window.nr_lent != 0;
	window_before_fork();
}

static void fork_parent(void)
{
	bool lend = was_lent || __atomic_load_n(&link_to_server.lend, __ATOMIC_SEQ_CST);

	link_unlock();
	if (lend)
		link_lend_in(LEND_AFTER_FORK_NS);
	inner_parent();
}

static void fork_child(void)
{
	window_after_fork_in_child();
	link_child();
	inner_child();
}

int __wrap_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void))
{
	inner_prepare = prepare;
	inner_parent = parent;
	inner_child = child;
	return __real_pthread_atfork(fork_prepare, fork_parent, fork_child);
}
