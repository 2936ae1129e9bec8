/* SPDX-License-Identifier: MIT */
/*
 * The link to the server: a lock, a mailbox, and the two agents behind it.
 *
 * link->lock protects the window (window.h) and the mailbox. It is taken inside jemalloc's locks
 * and never around them. The agent that serves the mailbox only ever tries it: whoever holds the
 * lock may be waiting for that agent.
 */
#ifndef CONTIG_MALLOC_LINK_H
#define CONTIG_MALLOC_LINK_H

#include "proto.h"
#include "raw.h"

enum link_state {
	LINK_OFF,      /* no server was named: ordinary memory only */
	LINK_NONE,     /* not connected yet */
	LINK_STARTING, /* the agents are shaking hands */
	LINK_UP,
	LINK_DOWN, /* refused, or gone: for good */
};

enum mail_state {
	MAIL_IDLE,
	MAIL_POSTED,
	MAIL_DONE,
};

#define LINK_RESCUE 0 /* request to the second agent itself, beside enum proto_request_kind */

struct link {
	uint32_t lock;   /* 0 free, 1 held, 2 held and waited for */
	uint32_t state;  /* enum link_state; a futex */
	uint32_t mail;   /* enum mail_state; a futex */
	uint32_t bell;   /* changes whenever the second agent has something to look at; a futex */
	uint32_t lend;   /* private chunks are to be lent */
	uint32_t rescue; /* the server is gone: lent chunks are to become private */
	uint64_t due;    /* not before: CLOCK_MONOTONIC ns */
	struct proto_request request;
	struct proto_reply reply;
	bool debug; /* CONTIG_DEBUG: say on stderr why memory is ordinary */

	int32_t pid; /* of the process that this is about; a vfork child looks on as another one */
	int32_t mail_tid; /* the second agent */

	/* The agents'. Descriptors are of their own table. */
	char path[108];
	char *stacks; /* of both; kept for the children of a fork */
	int call_fd, agent_fd;
	int uffd; /* to rescue with; -1 */
	int files[POSIX_NR_FILES];
	bool shook_hands; /* agents exist and will not end */
};

extern struct link link_to_server;

/* path: of the server's socket; NULL or too long: LINK_OFF. */
void link_setup(const char *path, bool debug);

void link_lock(void);
bool link_trylock(void);
void link_unlock(void);

/* With the lock held: connect if that was not tried yet. Is there a server? */
bool link_connect(void);

/* With the lock held, not by an agent: ask the server. *done (may be NULL): bytes that were done.
 * 0 or a negative errno; -ENOTCONN: there is no server (any more). */
int link_call(uint32_t kind, uintptr_t addr, size_t bytes, uint64_t *done);

/* With the lock held, not by an agent, and the server gone: make all that is lent private. 0, or
 * -EBUSY: the kernel has not taken the server's userfaultfd down yet; -EPERM: it cannot be done. */
int link_rescue(void);

/* Private chunks are to be lent in the background, in delay_ns. Lock-free. */
void link_lend_in(uint64_t delay_ns);
void link_ring(void);

/* In the child of a fork, which has no agents: start from the beginning. Releases the lock. */
void link_child(void);

/* One line on stderr if the user wants to know. */
void link_say(const char *text);

/* agent.c */
/* Start both agents and wait for their handshake; state is STARTING before and UP or DOWN after. */
void agent_start(void);
/* In the second agent only: the request on the wire. */
int agent_wire_call(uint32_t kind, uintptr_t addr, size_t bytes, uint64_t *done);
/* In the second agent only, with the lock held: turn lent memory into private memory alone. */
int agent_rescue(uintptr_t addr, size_t bytes);

#endif
