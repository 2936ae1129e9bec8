/* SPDX-License-Identifier: MIT */
/* The server's life: start, accept, stop. */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

/* How long somebody may be connected without saying what he is. */
#define HELLO_TIMEOUT_MS 10000

int server_thread(pthread_t *thread, void *(*body)(void *), void *arg)
{
	sigset_t all, before;
	int err;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	err = pthread_create(thread, NULL, body, arg);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -err;
}

static void event_raise(int fd)
{
	const uint64_t one = 1;

	/* Cannot fail: nobody adds so much that the counter would overflow. */
	if (write(fd, &one, sizeof(one)) != sizeof(one))
		abort();
}

/* ---- connections --------------------------------------------------------------------------- */

/* The first message. A userfaultfd may come with it; anything else that comes is closed. */
static int hello_receive(struct connection *connection, struct proto_hello *hello, int *uffd)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(8 * sizeof(int))];
	} control;
	char message[sizeof(*hello) + 1];
	struct iovec iov = {.iov_base = message, .iov_len = sizeof(message)};
	struct msghdr header = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	struct pollfd p = {.fd = connection->fd, .events = POLLIN};
	ssize_t n;

	*uffd = -1;
	while ((n = poll(&p, 1, HELLO_TIMEOUT_MS)) < 0)
		;
	if (n == 0)
		return -ETIMEDOUT;
	n = recvmsg(connection->fd, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *head = CMSG_FIRSTHDR(&header); head != NULL;
		head = CMSG_NXTHDR(&header, head)) {
		size_t nr = (head->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < nr; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
			if (*uffd < 0)
				*uffd = fd;
			else
				close(fd);
		}
	}
	return session_check_hello(message, (size_t)n, hello);
}

static void connection_serve(struct connection *connection)
{
	struct proto_hello hello;
	int uffd;

	if (hello_receive(connection, &hello, &uffd) == 0) {
		switch (hello.role) {
		case PROTO_AGENT:
			session_attach(connection, &hello, uffd);
			return;
		case PROTO_CALL:
			session_serve(connection, &hello);
			break;
		case PROTO_CONTROL:
			control_serve(connection);
			break;
		}
	}
	if (uffd >= 0)
		close(uffd);
}

static void *connection_thread(void *arg)
{
	struct connection *connection = arg;
	struct ctg_server *server = connection->server;

	connection_serve(connection);
	pthread_mutex_lock(&server->lock);
	for (struct connection **at = &server->connections; *at != NULL; at = &(*at)->next)
		if (*at == connection) {
			*at = connection->next;
			break;
		}
	/* Under the lock: ctg_server_stop shuts down what is in the list. */
	if (connection->fd >= 0)
		close(connection->fd);
	connection->next = server->ended;
	server->ended = connection;
	server->nr_connections--;
	event_raise(server->reap_event);
	pthread_cond_broadcast(&server->changed);
	pthread_mutex_unlock(&server->lock);
	return NULL;
}

static void connections_reap(struct ctg_server *server)
{
	struct connection *list, *next;

	pthread_mutex_lock(&server->lock);
	list = server->ended;
	server->ended = NULL;
	pthread_mutex_unlock(&server->lock);
	for (; list != NULL; list = next) {
		next = list->next;
		pthread_join(list->thread, NULL);
		free(list);
	}
}

/* A name for people, which a process can choose freely: only what is plain is kept. */
static void comm_read(pid_t pid, char comm[SERVER_COMM_BYTES])
{
	char path[40];
	ssize_t n = 0;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/comm", (int)pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, comm, SERVER_COMM_BYTES - 1);
		close(fd);
	}
	if (n > 0 && comm[n - 1] == '\n')
		n--;
	for (ssize_t i = 0; i < n; i++)
		if (comm[i] < ' ' || comm[i] > '~')
			comm[i] = '?';
	comm[n > 0 ? n : 0] = '\0';
}

static void connection_begin(struct ctg_server *server, int fd)
{
	struct ucred peer;
	socklen_t size = sizeof(peer);
	struct connection *connection;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.pid <= 0 ||
		(peer.uid != geteuid() && peer.uid != 0)) {
		close(fd);
		return;
	}
	connection = calloc(1, sizeof(*connection));
	if (connection == NULL) {
		close(fd);
		return;
	}
	connection->server = server;
	connection->fd = fd;
	connection->pid = peer.pid;
	comm_read(peer.pid, connection->comm);
	pthread_mutex_lock(&server->lock);
	if (!server->stopping && server->nr_connections < SERVER_MAX_CONNECTIONS &&
		server_thread(&connection->thread, connection_thread, connection) == 0) {
		connection->next = server->connections;
		server->connections = connection;
		server->nr_connections++;
		connection = NULL;
	}
	pthread_mutex_unlock(&server->lock);
	if (connection != NULL) {
		close(fd);
		free(connection);
	}
}

static void *accept_thread(void *arg)
{
	struct ctg_server *server = arg;
	struct pollfd p[3] = {
		{.fd = server->stop_event, .events = POLLIN},
		{.fd = server->reap_event, .events = POLLIN},
		{.fd = server->listener, .events = POLLIN},
	};
	uint64_t count;

	for (;;) {
		if (poll(p, 3, -1) < 0)
			continue;
		if (p[0].revents != 0)
			return NULL;
		if (p[1].revents != 0 && read(server->reap_event, &count, sizeof(count)) > 0) {
			connections_reap(server);
			p[2].fd = server->listener;
		}
		if (p[2].revents != 0) {
			int fd = accept4(server->listener, NULL, NULL, SOCK_CLOEXEC);

			if (fd >= 0)
				connection_begin(server, fd);
			else if (errno == EMFILE || errno == ENFILE || errno == ENOMEM ||
				 errno == ENOBUFS)
				/* Nothing can be accepted before something ends. */
				p[2].fd = -1;
		}
	}
}

/* ---- start --------------------------------------------------------------------------------- */

static int events_open(struct ctg_server *server)
{
	struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0};

	server->stop_event = eventfd(0, EFD_CLOEXEC);
	server->reap_event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	server->watch_epoll = epoll_create1(EPOLL_CLOEXEC);
	if (server->stop_event < 0 || server->reap_event < 0 || server->watch_epoll < 0 ||
		epoll_ctl(server->watch_epoll, EPOLL_CTL_ADD, server->stop_event, &event) != 0)
		return -errno;
	return 0;
}

static int threads_start(struct ctg_server *server)
{
	int err;

	err = server_thread(&server->watcher, watch_thread, server);
	if (err != 0)
		return err;
	server->running = 1;
	err = server_thread(&server->homecomer, home_thread, server);
	if (err != 0)
		return err;
	server->running = 2;
	err = server_thread(&server->acceptor, accept_thread, server);
	if (err == 0)
		server->running = 3;
	return err;
}

static int listen_error(const char *name, int err, struct ctg_error *error)
{
	switch (err) {
	case -EEXIST:
		posix_error(error, err,
			"there is a region named '%s' already; choose another --name", name);
		break;
	case -EINVAL:
		posix_error(error, err,
			"'%.64s' cannot be a region's name: 1 to %d characters, no '/', no dot "
			"first",
			name, PROTO_NAME_MAX);
		break;
	default:
		posix_error(error, err, "cannot make the socket of region '%s': %s", name,
			strerror(-err));
		break;
	}
	return err;
}

static struct ctg_server *server_new(void)
{
	struct ctg_server *server = calloc(1, sizeof(*server));
	pthread_condattr_t attr;

	if (server == NULL)
		return NULL;
	server->listener = server->stop_event = server->reap_event = server->watch_epoll = -1;
	server->started = posix_now(NULL);
	pthread_mutex_init(&server->lock, NULL);
	pthread_condattr_init(&attr);
	pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
	pthread_cond_init(&server->changed, &attr);
	pthread_cond_init(&server->home, &attr);
	pthread_condattr_destroy(&attr);
	return server;
}

int ctg_server_start(
	const struct ctg_server_config *config, struct ctg_server **out, struct ctg_error *error)
{
	struct ctg_region_config region = config->region;
	struct ctg_server *server = server_new();
	const char *name = config->name != NULL ? config->name : "";
	int err;

	if (server == NULL) {
		posix_error(error, -ENOMEM, "out of memory");
		return -ENOMEM;
	}
	if (region.name == NULL && strlen(name) < CTG_CMA_NAME_MAX)
		region.name = name;
	/* First the name, which costs nothing: opening a region may take seconds. */
	server->listener = runtime_listen(name, server->path, sizeof(server->path), &server->inode);
	if (server->listener < 0) {
		err = listen_error(name, server->listener, error);
		ctg_server_stop(server);
		return err;
	}
	snprintf(server->name, sizeof(server->name), "%s", name);
	server->force_stop = region.force_stop;
	err = ctg_region_open(&region, &server->region, error);
	if (err != 0) {
		ctg_server_stop(server);
		return err;
	}
	server->ctg = ctg_region_machine(server->region);
	server->area = ctg_region_area(server->region);
	err = events_open(server);
	server->nr_files = (unsigned)posix_region_files(server->region, server->files);
	if (err == 0)
		err = threads_start(server);
	if (err != 0) {
		posix_error(error, err, "cannot start the server: %s", strerror(-err));
		ctg_server_stop(server);
		return err;
	}
	*out = server;
	return 0;
}

/* ---- stop ---------------------------------------------------------------------------------- */

/* End every connection and join its thread. */
static void connections_end(struct ctg_server *server)
{
	pthread_mutex_lock(&server->lock);
	while (server->nr_connections != 0) {
		for (struct connection *c = server->connections; c != NULL; c = c->next)
			if (c->fd >= 0)
				shutdown(c->fd, SHUT_RDWR);
		pthread_cond_wait(&server->changed, &server->lock);
	}
	pthread_mutex_unlock(&server->lock);
	connections_reap(server);
}

static void server_free(struct ctg_server *server)
{
	const int fds[] = {
		server->listener, server->stop_event, server->reap_event, server->watch_epoll};

	for (size_t i = 0; i < sizeof(fds) / sizeof(fds[0]); i++)
		if (fds[i] >= 0)
			close(fds[i]);
	pthread_cond_destroy(&server->home);
	pthread_cond_destroy(&server->changed);
	pthread_mutex_destroy(&server->lock);
	free(server);
}

/*
 * In order: no new connections; allocations are cancelled; connections end, and with them their
 * leases; borrowers are let go. Those keep what they have mapped, as after a kill of the server, so
 * nothing of the region may be written or discarded from here on (region->orphaned).
 */
void ctg_server_stop(struct ctg_server *server)
{
	if (server == NULL)
		return;
	pthread_mutex_lock(&server->lock);
	server->stopping = true;
	pthread_cond_broadcast(&server->home);
	pthread_mutex_unlock(&server->lock);
	if (server->listener >= 0)
		runtime_unlisten(server->path, server->inode);
	if (server->region != NULL)
		__atomic_store_n(&server->region->orphaned, true, __ATOMIC_RELEASE);
	if (server->running > 0)
		event_raise(server->stop_event);
	if (server->running > 2)
		pthread_join(server->acceptor, NULL);
	connections_end(server);
	if (server->running > 1)
		pthread_join(server->homecomer, NULL);
	if (server->running > 0)
		pthread_join(server->watcher, NULL);
	lease_drop_all(server);
	ctg_region_close(server->region);
	server_free(server);
}

/* ---- questions ----------------------------------------------------------------------------- */

const char *ctg_server_socket(const struct ctg_server *server)
{
	return server->path;
}

struct ctg_region *ctg_server_region(struct ctg_server *server)
{
	return server->region;
}

unsigned ctg_server_borrowers(struct ctg_server *server)
{
	unsigned nr;

	pthread_mutex_lock(&server->lock);
	nr = server->nr_sessions;
	pthread_mutex_unlock(&server->lock);
	return nr;
}

int ctg_server_wait_idle(struct ctg_server *server, uint64_t deadline)
{
	struct timespec until = {
		.tv_sec = (time_t)(deadline / 1000000000u),
		.tv_nsec = (long)(deadline % 1000000000u),
	};
	int err = 0;

	pthread_mutex_lock(&server->lock);
	while (err == 0 && (server->nr_sessions != 0 || server->nr_detached != 0))
		err = deadline == CTG_NO_DEADLINE
			      ? pthread_cond_wait(&server->changed, &server->lock)
			      : pthread_cond_timedwait(&server->changed, &server->lock, &until);
	if (server->nr_sessions == 0 && server->nr_detached == 0)
		err = 0;
	pthread_mutex_unlock(&server->lock);
	return err == 0 ? 0 : -ETIMEDOUT;
}
