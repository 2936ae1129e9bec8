/* SPDX-License-Identifier: MIT */
/*
 * The tools' side of a control connection. The server is trusted no more than its answers can be
 * checked: whatever comes, the caller gets an answer that is a JSON object, or an error.
 */
#define _GNU_SOURCE
#include "client.h"
#include "state.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define ANSWER_MAX_BYTES ((size_t)256 << 20)
#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE)

struct ctg_client {
	int fd;
};

static int connect_error(const char *name, int err, struct ctg_error *error)
{
	switch (err) {
	case -EINVAL:
		posix_error(error, err, "'%.64s' is not a name of a region", name);
		break;
	case -ENOENT:
	case -ECONNREFUSED:
		posix_error(error, err, "no region named '%.64s'; `contig ps` lists them", name);
		break;
	case -EACCES:
	case -EPERM:
		posix_error(error, err, "the region '%.64s' belongs to another user", name);
		break;
	default:
		posix_error(error, err, "cannot connect to the region '%.64s': %s", name,
			strerror(-err));
		break;
	}
	return err;
}

int ctg_client_connect(const char *name, struct ctg_client **out, struct ctg_error *error)
{
	const struct proto_hello hello = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.role = PROTO_CONTROL,
	};
	char path[sizeof(((struct sockaddr_un *)0)->sun_path)];
	struct ctg_client *client;
	int err, fd;

	err = posix_socket_path(name, path, sizeof(path));
	if (err != 0)
		return connect_error(name, err, error);
	fd = runtime_connect(path);
	if (fd < 0)
		return connect_error(name, fd, error);
	if (send(fd, &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) {
		err = errno != 0 ? -errno : -EPIPE;
		close(fd);
		return connect_error(name, err, error);
	}
	client = malloc(sizeof(*client));
	if (client == NULL) {
		close(fd);
		return connect_error(name, -ENOMEM, error);
	}
	client->fd = fd;
	*out = client;
	return 0;
}

void ctg_client_close(struct ctg_client *client)
{
	if (client == NULL)
		return;
	close(client->fd);
	free(client);
}

int ctg_client_fd(const struct ctg_client *client)
{
	return client->fd;
}

/* ---- receiving ----------------------------------------------------------------------------- */

/* One message and at most two descriptors; what came beyond is closed. Bytes or negative errno. */
static ssize_t receive(int socket, char *buffer, size_t size, int fds[2])
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(8 * sizeof(int))];
	} control;
	struct iovec iov = {.iov_base = buffer, .iov_len = size};
	struct msghdr message = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes),
	};
	size_t nr = 0;
	ssize_t n;

	do
		n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	for (struct cmsghdr *head = CMSG_FIRSTHDR(&message); head != NULL;
		head = CMSG_NXTHDR(&message, head)) {
		size_t bytes = head->cmsg_len - CMSG_LEN(0);

		if (head->cmsg_level != SOL_SOCKET || head->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < bytes / sizeof(int); i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(head) + i * sizeof(int), sizeof(int));
			if (nr < 2)
				fds[nr++] = fd;
			else
				close(fd);
		}
	}
	if ((message.msg_flags & MSG_TRUNC) != 0)
		return -EMSGSIZE;
	return n;
}

/* The object in a sealed file: sealed, so that it cannot be cut short under us while we read. */
static json_t *load_file(int fd, json_int_t bytes)
{
	int seals = fcntl(fd, F_GET_SEALS);
	struct stat st;
	json_t *answer;
	void *text;

	if (bytes <= 0 || (uint64_t)bytes > ANSWER_MAX_BYTES || seals < 0 ||
		(seals & SEALS) != SEALS || fstat(fd, &st) != 0 || st.st_size != bytes)
		return NULL;
	text = mmap(NULL, (size_t)bytes, PROT_READ, MAP_PRIVATE, fd, 0);
	if (text == MAP_FAILED)
		return NULL;
	answer = json_loadb(text, (size_t)bytes, JSON_REJECT_DUPLICATES, NULL);
	munmap(text, (size_t)bytes);
	return answer;
}

/* An answer is an object with "ok"; a failure says why as an answer must. */
static bool is_answer(const json_t *answer)
{
	const json_t *ok = json_object_get(answer, "ok");

	if (!json_is_boolean(ok))
		return false;
	return json_is_true(ok) || (json_is_integer(json_object_get(answer, "error")) &&
					   json_is_string(json_object_get(answer, "text")));
}

static void close_both(int fds[2])
{
	for (int i = 0; i < 2; i++) {
		if (fds[i] >= 0)
			close(fds[i]);
		fds[i] = -1;
	}
}

/* Take the answer out of a message and its files; *fd: what is left of these. */
static json_t *take_answer(const char *message, size_t bytes, int fds[2], int *fd)
{
	json_t *answer = json_loadb(message, bytes, JSON_REJECT_DUPLICATES, NULL);
	json_t *inner;

	if (answer != NULL && json_is_true(json_object_get(answer, "in_fd"))) {
		inner = fds[0] < 0 ? NULL
				   : load_file(fds[0],
					     json_integer_value(json_object_get(answer, "bytes")));
		json_decref(answer);
		answer = inner;
		if (fds[0] >= 0)
			close(fds[0]);
		fds[0] = fds[1];
		fds[1] = -1;
	}
	if (answer == NULL || !is_answer(answer)) {
		json_decref(answer);
		return NULL;
	}
	*fd = fds[0];
	fds[0] = -1;
	return answer;
}

int ctg_client_call(struct ctg_client *client, json_t *request, json_t **answer, int *fd,
	struct ctg_error *error)
{
	char *text = json_dumps(request, JSON_COMPACT);
	int fds[2] = {-1, -1}, got = -1;
	char *buffer;
	ssize_t n;

	*answer = NULL;
	if (fd != NULL)
		*fd = -1;
	if (text == NULL) {
		posix_error(error, -EINVAL, "the request is not JSON");
		return -EINVAL;
	}
	do
		n = send(client->fd, text, strlen(text), MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	free(text);
	if (n < 0) {
		n = -errno;
		posix_error(error, (int)n, "the region has gone: %s", strerror((int)-n));
		return (int)n;
	}
	buffer = malloc(PROTO_MAX_CONTROL);
	if (buffer == NULL) {
		posix_error(error, -ENOMEM, "out of memory");
		return -ENOMEM;
	}
	n = receive(client->fd, buffer, PROTO_MAX_CONTROL, fds);
	if (n > 0)
		*answer = take_answer(buffer, (size_t)n, fds, &got);
	free(buffer);
	close_both(fds);
	if (*answer == NULL) {
		if (n == 0)
			n = -ECONNRESET;
		if (n < 0 && n != -EMSGSIZE) {
			posix_error(error, (int)n, "the region has gone: %s", strerror((int)-n));
			return (int)n;
		}
		posix_error(error, -EPROTO, "what answers at this socket is not a region");
		return -EPROTO;
	}
	if (fd != NULL)
		*fd = got;
	else if (got >= 0)
		close(got);
	return 0;
}

/* ---- listing ------------------------------------------------------------------------------- */

static void list_directory(const char *dir, json_t *list)
{
	const size_t suffix = strlen(".sock");
	char path[PATH_MAX];
	struct dirent *entry;
	DIR *d = opendir(dir);
	int lock;

	if (d == NULL)
		return;
	lock = runtime_lock(dir);
	while (lock >= 0 && (entry = readdir(d)) != NULL) {
		size_t len = strlen(entry->d_name);
		bool live;

		if (len <= suffix || strcmp(entry->d_name + len - suffix, ".sock") != 0)
			continue;
		if (snprintf(path, sizeof(path), "%s/%s", dir, entry->d_name) >= (int)sizeof(path))
			continue;
		live = runtime_remove_stale(path) == -EEXIST;
		if (live)
			json_array_append_new(list, json_pack("{s:s%, s:b}", "name", entry->d_name,
							    len - suffix, "live", 1));
	}
	if (lock >= 0)
		close(lock);
	closedir(d);
}

json_t *ctg_client_list(void)
{
	char dir[PATH_MAX];
	json_t *list = json_array();
	int err;

	for (unsigned i = 0;; i++) {
		err = runtime_candidate(i, dir, sizeof(dir));
		if (err == -CTG_ENOENT)
			break;
		if (err == 0 && runtime_dir_check(dir) == 0)
			list_directory(dir, list);
	}
	return list;
}
