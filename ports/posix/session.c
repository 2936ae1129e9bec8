/* SPDX-License-Identifier: MIT */
/*
 * A borrower's session: handshake, requests, commands to its agent, and its death.
 *
 * The rule that everything here serves: a frame that the borrower may still reach is not given to
 * anybody else. The end of its connections only says that its agents are gone; other threads may
 * run on for a moment, and a vfork child as long as it likes. What counts is that the address space
 * is gone (session_gone), and until then the frames stay where they are.
 */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A window of 1 TiB is more than anybody asks for, and its bitmap is small. */
#define WINDOW_MAX_BYTES ((uint64_t)1 << 40)
#define WINDOW_LIMIT (CTG_MM_MAX_VPN << CTG_PAGE_SHIFT)
/* How long a process may live on after its agent has vanished in the middle of a command. */
#define LOST_AGENT_NS 5000000000ull
#define STAT_WAIT_NS 100000000l

int session_check_hello(const void *message, size_t bytes, struct proto_hello *out)
{
	if (bytes != sizeof(*out))
		return -EINVAL;
	memcpy(out, message, sizeof(*out));
	if (out->magic != PROTO_MAGIC || out->version != PROTO_VERSION)
		return -EINVAL;
	switch (out->role) {
	case PROTO_CONTROL:
	case PROTO_AGENT:
		return 0;
	case PROTO_CALL:
		break;
	default:
		return -EINVAL;
	}
	if (out->window == 0 || out->window % POSIX_CHUNK != 0 || out->window_bytes == 0 ||
		out->window_bytes % POSIX_CHUNK != 0)
		return -EINVAL;
	if (out->window_bytes > WINDOW_MAX_BYTES || out->window >= WINDOW_LIMIT ||
		out->window_bytes > WINDOW_LIMIT - out->window)
		return -EINVAL;
	if (out->agent_tids[0] <= 0 || out->agent_tids[1] <= 0)
		return -EINVAL;
	return 0;
}

int session_check_request(uint64_t window, uint64_t window_bytes, const void *message, size_t bytes,
	struct proto_request *out)
{
	uint64_t offset;

	if (bytes != sizeof(*out))
		return -EINVAL;
	memcpy(out, message, sizeof(*out));
	if (out->spare != 0)
		return -EINVAL;
	switch (out->kind) {
	case PROTO_COUNT:
		return out->addr < PROTO_NR_COUNTS ? 0 : -EINVAL;
	case PROTO_MAP:
	case PROTO_UNMAP:
	case PROTO_PRIVATISE:
	case PROTO_LEND:
		break;
	default:
		return -EINVAL;
	}
	if (out->addr % POSIX_CHUNK != 0 || out->bytes == 0 || out->bytes % POSIX_CHUNK != 0)
		return -EINVAL;
	if (out->addr < window)
		return -EINVAL;
	offset = out->addr - window;
	if (offset >= window_bytes || out->bytes > window_bytes - offset)
		return -EINVAL;
	return 0;
}

/* ---- death --------------------------------------------------------------------------------- */

/*
 * Is the borrower's address space gone? An open /proc/PID/maps or environ belongs to the address
 * space it was opened on, not to the process: it reads as empty once nobody runs in that address
 * space any more. So it sees exit and exec, is not fooled by what is executed next (which may well
 * map the region again), and waits for vfork children. Once the process has been reaped maps
 * answers -ESRCH, while environ still knows whether somebody (a vfork child) lives on; alone,
 * environ would also be empty for a process that has unmapped its first stack. A process whose maps
 * may not be read (it is not dumpable) is waited for to its end.
 */
static bool session_gone(const struct session *session)
{
	struct pollfd p = {.fd = session->pidfd, .events = POLLIN};
	char byte;

	if (session->maps_fd < 0)
		return poll(&p, 1, 0) == 1;
	if (pread(session->maps_fd, &byte, 1, 0) > 0)
		return false;
	return session->environ_fd < 0 || pread(session->environ_fd, &byte, 1, 0) <= 0;
}

/*
 * Wait until the address space is gone: 0; -ETIMEDOUT; -ECANCELED: the server stops.
 * Exit announces itself through the pidfd. There is no event for exec, nor for the end of the last
 * vfork child, so those are looked for at growing intervals, which end at 100 ms.
 */
static int session_await_gone(const struct session *session, uint64_t deadline)
{
	struct pollfd p[2] = {
		{.fd = session->server->stop_event, .events = POLLIN},
		{.fd = session->pidfd, .events = POLLIN},
	};
	int interval = 1;

	while (!session_gone(session)) {
		if (posix_now(NULL) >= deadline)
			return -ETIMEDOUT;
		if (poll(p, 2, interval) > 0) {
			if (p[0].revents != 0)
				return -ECANCELED;
			p[1].fd = -1; /* it has exited; what remains has no event */
		}
		interval = interval < 50 ? interval * 2 : 100;
	}
	return 0;
}

/* ---- the agent; all of it under space.lock ------------------------------------------------- */

/*
 * Take one acknowledgement. 1: of command `seq`; 0: an older one's (a ping or hint nobody waited
 * for), or none yet; -EPIPE: the agent is gone or speaks nonsense.
 */
static int agent_receive(struct session *session, uint64_t seq, struct proto_ack *ack)
{
	ssize_t n;

	n = recv(session->agent_fd, ack, sizeof(*ack), MSG_DONTWAIT | MSG_TRUNC);
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 0 : -EPIPE;
	if (n != sizeof(*ack) || ack->seq != session->seq_acked + 1 || ack->seq > session->seq_sent)
		return -EPIPE;
	session->seq_acked = ack->seq;
	return ack->seq == seq;
}

static int agent_send(struct session *session, const struct posix_op *ops, size_t nr)
{
	struct proto_command command;
	size_t bytes = offsetof(struct proto_command, op) + nr * sizeof(*ops);
	ssize_t n;

	command.seq = session->seq_sent + 1;
	if (nr != 0)
		memcpy(command.op, ops, nr * sizeof(*ops));
	/* The buffer has room: at most a ping and a hint are unanswered, and they are small. */
	do
		n = send(session->agent_fd, &command, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	if (n != (ssize_t)bytes)
		return -EPIPE;
	session->seq_sent++;
	return 0;
}

/* Wait for the acknowledgement of `seq`. 0, -EPIPE: the agent is gone; -ETIMEDOUT. When the server
 * stops, a borrower that does not answer (it may have been stopped) is not waited for any longer.
 */
static int agent_wait(
	struct session *session, uint64_t seq, uint64_t deadline, struct proto_ack *ack)
{
	struct pollfd p[3] = {
		{.fd = session->agent_fd, .events = POLLIN | POLLRDHUP},
		{.fd = session->pidfd, .events = POLLIN},
		{.fd = session->server->stop_event, .events = POLLIN},
	};

	for (;;) {
		uint64_t now = posix_now(NULL);
		int timeout = -1, got, n;

		if (deadline != CTG_NO_DEADLINE)
			timeout = now < deadline ? (int)((deadline - now) / 1000000) + 1 : 0;
		n = poll(p, 3, timeout);
		if (n == 0 && posix_now(NULL) >= deadline)
			return -ETIMEDOUT;
		if (n <= 0)
			continue;
		if (p[0].revents != 0) {
			got = agent_receive(session, seq, ack);
			if (got != 0)
				return got < 0 ? got : 0;
			continue;
		}
		if (p[1].revents != 0)
			return -EPIPE;
		if (p[2].revents != 0) {
			p[2].fd = -1;
			if (deadline > posix_now(NULL) + SERVER_PING_NS)
				deadline = posix_now(NULL) + SERVER_PING_NS;
		}
	}
}

static void session_break(struct session *session)
{
	session->broken = true;
	shutdown(session->agent_fd, SHUT_RDWR);
	shutdown(session->call_fd, SHUT_RDWR); /* its thread takes the session apart */
}

/*
 * The agent vanished while it had a command. Nobody knows how far it came, and writers may be
 * waiting that only the agent could have released, so the one good outcome is that the process is
 * dying, and that is nearly always the reason. A process that lost its agent alone (killed by a
 * seccomp filter, say) cannot be repaired: it is killed.
 */
static int session_lost(struct session *session)
{
	int err;

	session_break(session);
	err = session_await_gone(session, posix_now(NULL) + LOST_AGENT_NS);
	if (err == -ETIMEDOUT) {
		fprintf(stderr,
			"contig: killing %s (pid %d): it lost its agent while its memory moved\n",
			session->comm, (int)session->pid);
		syscall(SYS_pidfd_send_signal, session->pidfd, SIGKILL, NULL, 0);
		session_await_gone(session, CTG_NO_DEADLINE);
	}
	session->space.dead = true;
	pthread_cond_broadcast(&session->space.settled);
	return -CTG_ENOENT;
}

/* Has the process been stopped (by a signal or a debugger)? */
static bool session_stopped(const struct session *session)
{
	char path[64], text[512], *at;
	ssize_t n = -1;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", (int)session->pid,
		(int)session->hello.agent_tids[0]);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, text, sizeof(text) - 1);
		close(fd);
	}
	if (n <= 0)
		return false;
	text[n] = '\0';
	/* "tid (name) state ...", and the name may have brackets. */
	at = strrchr(text, ')');
	return at != NULL && (at[2] == 'T' || at[2] == 't');
}

/*
 * Does the agent answer? A ping that stays unanswered is not repeated: its answer, whenever it
 * comes, is as good as a new one's. A take-back asks for each of its batches, so the wait gets
 * shorter with each miss, and one that is known to be stopped is not waited for again.
 */
static int session_ping(struct posix_space *space)
{
	struct session *session = space->link;
	struct proto_ack ack;
	uint64_t wait;
	int err = 0;

	if (space->dead)
		return -CTG_ENOENT;
	if (session->broken)
		return -CTG_EBUSY;
	if (session->seq_sent == session->seq_acked)
		err = agent_send(session, NULL, 0);
	wait = SERVER_PING_NS >> session->missed;
	if (session->missed != 0 && session_stopped(session))
		wait = 0;
	if (err == 0)
		err = agent_wait(session, session->seq_sent, posix_now(NULL) + wait, &ack);
	if (err == -EPIPE)
		session_break(session);
	if (err == 0) {
		session->missed = 0;
		return 0;
	}
	if (session->missed < SERVER_PING_HALVED)
		session->missed++;
	if (err == -ETIMEDOUT)
		home_await_answer(session->server, session->agent_fd);
	return -CTG_EBUSY;
}

static int session_ops(struct posix_space *space, const struct posix_op *ops, size_t nr, int *err)
{
	struct session *session = space->link;
	struct proto_ack ack;

	*err = 0;
	if (space->dead)
		return -CTG_ENOENT;
	if (nr > POSIX_MAX_OPS) {
		*err = -CTG_EINVAL;
		return 0;
	}
	if (session->broken || agent_send(session, ops, nr) != 0 ||
		agent_wait(session, session->seq_sent, CTG_NO_DEADLINE, &ack) != 0)
		return session_lost(session);
	/* All done and no error, or some done and the error of the next one. */
	if (ack.done < 0 || (size_t)ack.done > nr || ack.error > 0 || ack.error < -4095 ||
		((size_t)ack.done == nr) != (ack.error == 0))
		return session_lost(session);
	*err = ack.error;
	return ack.done;
}

static bool any_private(const struct posix_space *space)
{
	for (size_t i = 0; i <= space->window_bytes / POSIX_CHUNK / 8; i++)
		if (space->private_chunks[i] != 0)
			return true;
	return false;
}

void session_hint(struct session *session)
{
	struct posix_space *space = &session->space;
	struct posix_op op = {.kind = POSIX_OP_HINT};
	struct proto_ack ack;

	/* Locked: its agent has work to do, and a borrower that is served asks by itself. */
	if (pthread_mutex_trylock(&space->lock) != 0)
		return;
	if (!space->dead && !session->broken && any_private(space)) {
		while (session->seq_acked != session->seq_sent &&
			agent_receive(session, session->seq_acked + 1, &ack) == 1)
			;
		/* An agent that has not answered the last one would not answer this one either. */
		if (session->seq_acked == session->seq_sent && agent_send(session, &op, 1) != 0)
			session_break(session);
	}
	pthread_mutex_unlock(&space->lock);
}

/* ---- requests ------------------------------------------------------------------------------ */

/* Bytes of [addr, addr + bytes) from its start whose chunks are (or are not) private. */
static uint64_t chunks_alike(struct posix_space *space, uint64_t addr, uint64_t bytes, bool private)
{
	uint64_t at = addr;

	pthread_mutex_lock(&space->lock);
	while (at < addr + bytes &&
		posix_chunk_private(space, posix_chunk_of(space, at)) == private)
		at += POSIX_CHUNK;
	pthread_mutex_unlock(&space->lock);
	return at - addr;
}

static int request_map(struct session *session, uint64_t addr, uint64_t bytes)
{
	struct posix_space *space = &session->space;
	ctg_vpn_t vpn = addr >> CTG_PAGE_SHIFT;
	uint64_t nr = bytes >> CTG_PAGE_SHIFT;
	int err;

	/* What the borrower asks to have mapped is not its own any more. */
	posix_space_set_private(space, addr, bytes, false);
	err = ctg_mmap(space->mm, vpn, nr, CTG_PROT_READ | CTG_PROT_WRITE);
	if (err != 0)
		return err;
	err = ctg_mm_populate(space->mm, vpn, nr, NULL);
	if (err == 0)
		return 0;
	ctg_munmap(space->mm, vpn, nr);
	/* It will put ordinary memory there, which the port must leave alone. */
	if (err == -CTG_ENOMEM)
		posix_space_set_private(space, addr, bytes, true);
	return err;
}

static int request_unmap(struct session *session, uint64_t addr, uint64_t bytes)
{
	struct posix_space *space = &session->space;
	int err = ctg_munmap(space->mm, addr >> CTG_PAGE_SHIFT, bytes >> CTG_PAGE_SHIFT);

	if (err == 0)
		posix_space_set_private(space, addr, bytes, false);
	return err;
}

/* PRIVATISE (to = true) and LEND, run by run of chunks that are not so yet. */
static int request_convert(
	struct session *session, uint64_t addr, uint64_t bytes, bool to, uint64_t *done)
{
	struct posix_space *space = &session->space;
	uint64_t at = addr, end = addr + bytes, run;
	int err = 0;

	while (err == 0 && at < end) {
		at += chunks_alike(space, at, end - at, to);
		if (at == end)
			break;
		run = chunks_alike(space, at, end - at, !to);
		err = to ? posix_space_privatise(space, at, run) : posix_space_lend(space, at, run);
		if (err == 0)
			at += run;
		else
			at += chunks_alike(space, at, run, to);
	}
	*done = at - addr;
	return err;
}

static void request_serve(
	struct session *session, const struct proto_request *request, struct proto_reply *reply)
{
	memset(reply, 0, sizeof(*reply));
	pthread_mutex_lock(&session->serving);
	switch (request->kind) {
	case PROTO_MAP:
		reply->error = request_map(session, request->addr, request->bytes);
		break;
	case PROTO_UNMAP:
		reply->error = request_unmap(session, request->addr, request->bytes);
		break;
	case PROTO_PRIVATISE:
		reply->error =
			request_convert(session, request->addr, request->bytes, true, &reply->done);
		break;
	case PROTO_LEND:
		reply->error = request_convert(
			session, request->addr, request->bytes, false, &reply->done);
		break;
	case PROTO_COUNT:
		atomic_fetch_add_explicit(
			&session->count[request->addr], request->bytes, memory_order_relaxed);
		break;
	}
	pthread_mutex_unlock(&session->serving);
	if (reply->error == 0)
		reply->done = request->bytes;
	/* A conversion frees memory too, or was in the way of what comes home. But it is a
	 * borrower's own decision, often for a fork: nobody is told to lend again because of it. */
	if (request->kind == PROTO_UNMAP)
		home_kick(session->server, true);
	else if (request->kind != PROTO_COUNT)
		home_kick(session->server, false);
}

/* Until the connection ends, or something comes that is not a request. */
static void session_loop(struct session *session)
{
	struct proto_request request;
	struct proto_reply reply;
	char message[sizeof(request) + 1];
	ssize_t n;

	for (;;) {
		n = recv(session->call_fd, message, sizeof(message), 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return;
		if (session_check_request(session->hello.window, session->hello.window_bytes,
			    message, (size_t)n, &request) != 0)
			return;
		request_serve(session, &request, &reply);
		if (send(session->call_fd, &reply, sizeof(reply), MSG_NOSIGNAL) != sizeof(reply))
			return;
	}
}

/* ---- beginning and end --------------------------------------------------------------------- */

static int send_welcome(struct session *session, int error)
{
	const struct ctg_server *server = session->server;
	struct proto_welcome welcome = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.error = error,
		.nr_files = error == 0 ? server->nr_files : 0,
		.session = session->number,
		.chunk_bytes = POSIX_CHUNK,
	};
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int) * POSIX_NR_FILES)];
	} control;
	struct iovec iov = {.iov_base = &welcome, .iov_len = sizeof(welcome)};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
	struct cmsghdr *head;
	struct posix_stopper *stopper;

	/* Whoever brings no userfaultfd is stopped while its memory moves, by this process. */
	if (server->region->guard == POSIX_GUARD_STOP &&
		posix_region_stopper(server->region, &stopper) == 0)
		welcome.stopper_pid = posix_stopper_pid(stopper);
	if (welcome.nr_files != 0) {
		memset(&control, 0, sizeof(control));
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * welcome.nr_files);
		head = CMSG_FIRSTHDR(&message);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(sizeof(int) * welcome.nr_files);
		memcpy(CMSG_DATA(head), server->files, sizeof(int) * welcome.nr_files);
	}
	return sendmsg(session->call_fd, &message, MSG_NOSIGNAL) == sizeof(welcome) ? 0 : -EPIPE;
}

static bool is_userfaultfd(int fd)
{
	char link[64], target[64];
	ssize_t n;

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	n = readlink(link, target, sizeof(target) - 1);
	if (n < 0)
		return false;
	target[n] = '\0';
	return strcmp(target, "anon_inode:[userfaultfd]") == 0;
}

void session_attach(struct connection *connection, const struct proto_hello *hello, int uffd)
{
	struct ctg_server *server = connection->server;
	struct session *s;
	uint64_t one = 1;
	bool usable = uffd >= 0 && hello->kernel_faults != 0 && !server->force_stop &&
		      is_userfaultfd(uffd);

	if (uffd >= 0 && !usable) {
		close(uffd);
		uffd = -1;
	}
	pthread_mutex_lock(&server->lock);
	for (s = server->sessions; s != NULL; s = s->next)
		if (s->number == hello->session && s->pid == connection->pid && s->agent_fd < 0)
			break;
	if (s != NULL && !server->stopping) {
		s->agent_fd = connection->fd;
		s->space.uffd = uffd;
		connection->fd = uffd = -1;
		/* The session is alive while it is in the list, so its eventfd is too. */
		if (write(s->attached, &one, sizeof(one)) != sizeof(one))
			abort();
	}
	pthread_mutex_unlock(&server->lock);
	if (uffd >= 0)
		close(uffd);
}

/* Wait for the agent, or the end of the connection. A request sent meanwhile stays in the queue. */
static int session_await_agent(struct session *session)
{
	struct pollfd p[2] = {
		{.fd = session->attached, .events = POLLIN},
		{.fd = session->call_fd, .events = POLLRDHUP},
	};

	for (;;) {
		if (poll(p, 2, -1) < 0)
			continue;
		if (p[0].revents != 0)
			break;
		if (p[1].revents != 0)
			return -EPIPE;
	} /* What came was handed over under the lock. */
	pthread_mutex_lock(&session->server->lock);
	pthread_mutex_unlock(&session->server->lock);
	return 0;
}

static int session_start(struct session *session)
{
	struct posix_space *space = &session->space;
	struct ctg_server *server = session->server;
	struct posix_stopper *stopper;
	int err;

	space->pid = session->pid;
	space->local = false;
	space->guard = space->uffd >= 0 ? POSIX_GUARD_UFFD : POSIX_GUARD_STOP;
	space->keep[0] = session->hello.agent_tids[0];
	space->keep[1] = session->hello.agent_tids[1];
	space->window = session->hello.window;
	space->window_bytes = session->hello.window_bytes;
	space->ops = session_ops;
	space->ping = session_ping;
	space->link = session;
	if (space->guard == POSIX_GUARD_STOP) {
		err = posix_region_stopper(server->region, &stopper);
		if (err != 0)
			return err; /* nobody could keep its writers out */
	}
	err = posix_space_init(space, server->region);
	if (err != 0)
		return err;
	pthread_mutex_lock(&space->lock);
	err = agent_send(session, NULL, 0);
	pthread_mutex_unlock(&space->lock);
	if (err != 0) {
		posix_space_destroy(space, true); /* nothing was lent yet */
		return err;
	}
	pthread_mutex_lock(&server->lock);
	session->ready = true;
	pthread_mutex_unlock(&server->lock);
	return 0;
}

/*
 * The connection has ended, and the process has perhaps not. Let moves that are under way finish
 * while its agent still answers, begin no new ones, then let go of the agent: from here on the
 * frames stay as they are until the address space is gone.
 */
static void session_finish(struct session *session)
{
	struct posix_space *space = &session->space;
	struct ctg_server *server = session->server;
	bool began;

	began = posix_space_begin(space, space->window, space->window_bytes) == 0;
	pthread_mutex_lock(&space->lock);
	session->broken = true;
	pthread_mutex_unlock(&space->lock);
	shutdown(session->agent_fd, SHUT_RDWR);
	session_await_gone(session, CTG_NO_DEADLINE);
	posix_space_set_dead(space);
	if (began)
		posix_space_end(space, space->window, space->window_bytes);

	pthread_mutex_lock(&server->lock);
	session->ready = false;
	while (session->refs != 0)
		pthread_cond_wait(&server->changed, &server->lock);
	pthread_mutex_unlock(&server->lock);
	posix_space_destroy(space, true);
	home_kick(server, true);
}

/* A file of a process that says something now; -1: it may not be read, or is empty. */
static int open_proc(pid_t pid, const char *name)
{
	char path[64], byte;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", (int)pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0 && pread(fd, &byte, 1, 0) != 1) {
		close(fd);
		fd = -1;
	}
	return fd;
}

static void session_close(struct session *session)
{
	const int fds[] = {session->maps_fd, session->environ_fd, session->agent_fd,
		session->space.uffd, session->pidfd, session->attached};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	pthread_mutex_destroy(&session->serving);
}

static struct session *session_new(struct connection *connection, const struct proto_hello *hello)
{
	struct ctg_server *server = connection->server;
	struct session *session = calloc(1, sizeof(*session));

	if (session == NULL)
		return NULL;
	session->server = server;
	session->pid = connection->pid;
	memcpy(session->comm, connection->comm, sizeof(session->comm));
	session->hello = *hello;
	session->call_fd = connection->fd;
	session->agent_fd = -1;
	session->space.uffd = -1;
	pthread_mutex_init(&session->serving, NULL);
	session->maps_fd = open_proc(session->pid, "maps");
	session->environ_fd = open_proc(session->pid, "environ");
	session->pidfd = (int)syscall(SYS_pidfd_open, session->pid, 0);
	session->attached = eventfd(0, EFD_CLOEXEC);
	if (session->pidfd < 0 || session->attached < 0) {
		session_close(session);
		free(session);
		return NULL;
	}
	pthread_mutex_lock(&server->lock);
	session->number = ++server->next_session;
	session->next = server->sessions;
	server->sessions = session;
	server->nr_sessions++;
	pthread_mutex_unlock(&server->lock);
	return session;
}

static void session_free(struct session *session)
{
	struct ctg_server *server = session->server;

	pthread_mutex_lock(&server->lock);
	for (struct session **at = &server->sessions; *at != NULL; at = &(*at)->next)
		if (*at == session) {
			*at = session->next;
			break;
		}
	server->nr_sessions--;
	pthread_cond_broadcast(&server->changed);
	pthread_mutex_unlock(&server->lock);
	session_close(session);
	free(session);
}

void session_serve(struct connection *connection, const struct proto_hello *hello)
{
	struct session *session = session_new(connection, hello);

	if (session == NULL)
		return;
	if (send_welcome(session, 0) == 0 && session_await_agent(session) == 0 &&
		session_start(session) == 0) {
		session_loop(session);
		session_finish(session);
	}
	session_free(session);
}

struct session *session_next(struct ctg_server *server, struct session *after)
{
	struct session *session;

	pthread_mutex_lock(&server->lock);
	session = after == NULL ? server->sessions : after->next;
	while (session != NULL && !session->ready)
		session = session->next;
	if (session != NULL)
		session->refs++;
	if (after != NULL && --after->refs == 0)
		pthread_cond_broadcast(&server->changed);
	pthread_mutex_unlock(&server->lock);
	return session;
}

/* Pages, unless a request is under way that does not end: then the borrower has perhaps been
 * stopped in the middle of it, with the lock that the count needs. */
static void stat_pages(struct session *session)
{
	struct ctg_server *server = session->server;
	struct ctg_mm_stat mm;
	struct timespec until;

	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_nsec += STAT_WAIT_NS;
	if (until.tv_nsec >= 1000000000) {
		until.tv_nsec -= 1000000000;
		until.tv_sec++;
	}
	if (pthread_mutex_timedlock(&session->serving, &until) != 0)
		return;
	ctg_mm_stat(session->space.mm, &mm);
	pthread_mutex_unlock(&session->serving);
	pthread_mutex_lock(&server->lock);
	session->last.lent = mm.nr_lent << CTG_PAGE_SHIFT;
	session->last.spilled = mm.nr_spilled << CTG_PAGE_SHIFT;
	pthread_mutex_unlock(&server->lock);
}

/* What the port knows, unless it is waiting for the borrower. */
static void stat_space(struct session *session, bool reset_stall)
{
	struct posix_space *space = &session->space;
	struct ctg_server *server = session->server;
	uint64_t private_bytes = 0, stall;

	if (pthread_mutex_trylock(&space->lock) != 0)
		return;
	for (uint64_t i = 0; i < space->window_bytes / POSIX_CHUNK; i++)
		if (posix_chunk_private(space, i))
			private_bytes += POSIX_CHUNK;
	stall = space->stall_max_ns;
	if (reset_stall)
		space->stall_max_ns = 0;
	pthread_mutex_unlock(&space->lock);
	pthread_mutex_lock(&server->lock);
	session->last.private_bytes = private_bytes;
	session->last.stall_max_ns = stall;
	pthread_mutex_unlock(&server->lock);
}

/* Fresh numbers if they can be had without waiting for the borrower, else those of the last time.
 */
void session_stat(struct session *session, bool reset_stall, struct session_stat *out)
{
	stat_pages(session);
	stat_space(session, reset_stall);
	pthread_mutex_lock(&session->server->lock);
	*out = session->last;
	pthread_mutex_unlock(&session->server->lock);
}
