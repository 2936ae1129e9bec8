/* SPDX-License-Identifier: MIT */
/*
 * What the server's threads share.
 *
 * Threads: one accepts; each connection has one, joined by the acceptor; one watches takers so that
 * the end of their connection cancels what they asked for; one brings displaced memory home.
 *
 * Locks: server->lock protects the lists and counts in here and is never held across a call into
 * the core, a message, or anything else that can sleep. A session's posix_space has its own lock
 * (space.h); the two are never held together.
 */
#ifndef CONTIG_POSIX_STATE_H
#define CONTIG_POSIX_STATE_H

#include "region.h"
#include "server.h"
#include <jansson.h>
#include <stdatomic.h>
#include <sys/un.h>

#define SERVER_MAX_CONNECTIONS 1024
#define SERVER_PING_NS 250000000ull
#define SERVER_PING_HALVED 5 /* so often */
#define SERVER_COMM_BYTES 17

struct connection {
	struct ctg_server *server;
	struct connection *next;
	int fd;
	pid_t pid; /* as the kernel says */
	char comm[SERVER_COMM_BYTES];
	pthread_t thread;
	/* Control: the detached lease of the last answer, until it is known that it was read. */
	uint64_t unread_lease;
};

/* A borrower. Made by its CALL connection's thread, which also takes it apart. */
struct session {
	struct ctg_server *server;
	struct session *next;
	uint64_t number;
	pid_t pid;
	char comm[SERVER_COMM_BYTES];
	int pidfd;
	int maps_fd, environ_fd; /* its /proc/PID/...; -1: may not be read. See session_gone. */
	int call_fd;             /* the connection's, valid as long as the session */
	int attached;            /* eventfd: the agent has come */
	bool ready;              /* the space exists; server->lock */
	unsigned refs;           /* users other than the CALL thread; server->lock */
	struct proto_hello hello;

	/* The agent's: set before `ready`, then under space.lock. */
	int agent_fd;
	uint64_t seq_sent, seq_acked;
	unsigned missed; /* pings in a row without an answer, at most SERVER_PING_HALVED */
	bool broken;     /* the agent cannot be reached any more */

	struct posix_space space;
	pthread_mutex_t serving; /* held while a request is carried out; outside space.lock */
	_Atomic uint64_t count[PROTO_NR_COUNTS];
	/* What stat said last: it must not wait for a borrower that has been stopped. space.lock is
	 * not enough for that, so these are under server->lock. */
	struct session_stat {
		uint64_t lent, spilled, private_bytes, stall_max_ns;
	} last;
};

/* Somebody who waits for an allocation; his connection's end raises `cancel`. */
struct taker {
	struct taker *next;
	uint64_t id;
	struct ctg_word32 cancel;
};

struct lease {
	struct lease *next;
	uint64_t number;
	struct connection *holder; /* released when it ends; NULL: detached */
	pid_t pid;
	char comm[SERVER_COMM_BYTES];
	uint64_t since; /* CLOCK_REALTIME, ns */
	size_t nr, nr_left;
	uint64_t frames;          /* of what is left */
	struct ctg_extent *block; /* nr 0: released */
};

struct ctg_server {
	struct ctg_region *region;
	struct ctg *ctg;
	struct ctg_cma *area;
	bool force_stop;
	char name[PROTO_NAME_MAX + 1];
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	ino_t inode;      /* of the socket */
	uint64_t started; /* CLOCK_MONOTONIC, ns */
	int listener;
	int stop_event;            /* eventfd: readable, for good, once the server stops */
	int reap_event;            /* eventfd: a connection has ended */
	int files[POSIX_NR_FILES]; /* what borrowers get; the region's; -1 */
	unsigned nr_files;
	unsigned running; /* threads started by ctg_server_start */
	pthread_t acceptor, watcher, homecomer;
	int watch_epoll;

	pthread_mutex_t lock;
	bool stopping;
	struct connection *connections, *ended;
	unsigned nr_connections;
	struct session *sessions;
	unsigned nr_sessions;
	uint64_t next_session;
	pthread_cond_t
		changed; /* sessions, their refs, detached leases, connections; CLOCK_MONOTONIC */
	struct lease *leases;
	unsigned nr_detached;
	uint64_t next_lease;
	struct taker *takers;
	uint64_t next_taker;
	unsigned allocating; /* allocations under way: coming home waits for them */
	bool home_wanted, hint_wanted;
	bool coming_home; /* ctg_migrate_home runs; its end broadcasts changed */
	pthread_cond_t home;
};

/* server.c */
/* Start a thread that takes no signals. 0 or negative errno. */
int server_thread(pthread_t *thread, void *(*body)(void *), void *arg);

/* runtime.c */
/* The i-th place where the directory of sockets may be. -EAGAIN: not on this system, try the next
 * one; -ENOENT: no more. */
int runtime_candidate(unsigned i, char *path, size_t size);
/* 0: a directory, not a link, of this user, that nobody else may enter. */
int runtime_dir_check(const char *path);
int runtime_address(const char *path, struct sockaddr_un *out);
int runtime_connect(const char *path); /* descriptor or negative errno */
/* Lock a directory of sockets: a descriptor to close, or negative errno. */
int runtime_lock(const char *dir);
/* Remove a socket nobody listens at. 0: nothing is there now; -EEXIST: live, or not a socket. */
int runtime_remove_stale(const char *path);
/* Bind and listen at DIR/NAME.sock, 0600, without waiting in accept. Descriptor or negative errno.
 */
int runtime_listen(const char *name, char *path, size_t size, ino_t *inode);
void runtime_unlisten(const char *path, ino_t inode);

/* session.c */
/* The checks of what a borrower sends: pure, for the fuzzer too. 0 or -EINVAL. */
int session_check_hello(const void *message, size_t bytes, struct proto_hello *out);
int session_check_request(uint64_t window, uint64_t window_bytes, const void *message, size_t bytes,
	struct proto_request *out);
/* Serve a CALL connection until it ends and the borrower's memory is back. */
void session_serve(struct connection *connection, const struct proto_hello *hello);
/* Hand an AGENT connection and its userfaultfd (or -1) to its session; both are consumed. */
void session_attach(struct connection *connection, const struct proto_hello *hello, int uffd);
/* Use sessions without the lock: the next ready one after `after` (NULL: the first), referenced;
 * drops the reference on `after`. */
struct session *session_next(struct ctg_server *server, struct session *after);
/* Tell a borrower with ordinary memory that there is room. Does not wait for it. */
void session_hint(struct session *session);
void session_stat(struct session *session, bool reset_stall, struct session_stat *out);

/* control.c */
enum control_verb {
	CONTROL_STAT,
	CONTROL_MAP,
	CONTROL_ALLOC,
	CONTROL_RELEASE,
	CONTROL_LEASES,
};
struct control_request {
	enum control_verb verb;
	bool reset_stall;
	/* alloc */
	uint64_t bytes, align, count, timeout_ns;
	unsigned order;
	bool fast, no_zero, hold, fd;
	/* release */
	uint64_t lease, block;
	bool has_block;
};
/* What a JSON message asks for: pure, for the fuzzer too. 0, or -EINVAL with error->text. */
int control_parse(
	const char *message, size_t bytes, struct control_request *out, struct ctg_error *error);
void control_serve(struct connection *connection);
/* An answer that says what failed. report: stolen, may be NULL. */
json_t *control_failure(const struct ctg_error *error, json_t *report);

/* lease.c */
/* Each makes the answer. *fd: the region's descriptor to go along (not the caller's), or -1. */
json_t *lease_alloc(struct connection *connection, const struct control_request *request, int *fd);
json_t *lease_release(struct ctg_server *server, const struct control_request *request);
json_t *lease_list(struct ctg_server *server);
/* The connection has ended: drop what it held. `unread`: its last answer was not read, so nobody
 * knows the number of the detached lease in it. */
void lease_connection_end(struct connection *connection, bool unread);
void lease_drop_all(struct ctg_server *server);
/* Something has become free: bring home what was displaced and, if `hint`, tell borrowers that have
 * to do with ordinary memory. */
void home_kick(struct ctg_server *server, bool hint);
/* What could not come home because this agent does not answer shall when it does. */
void home_await_answer(struct ctg_server *server, int agent_fd);
void *home_thread(void *server);
void *watch_thread(void *server);

/* report.c */
json_t *report_stat(struct ctg_server *server, bool reset_stall, bool map);
json_t *report_alloc(const struct ctg_alloc_report *report);
const char *report_obstacle(enum ctg_obstacle_kind kind);
/* "300 MiB", "64 KiB", "12345 bytes": exact. */
const char *report_size(uint64_t bytes, char *text, size_t size);

#endif
