/* SPDX-License-Identifier: MIT */
/*
 * Where sockets live: a directory that only its user may enter. Everything here is by path, because
 * bind and connect are; that is safe once the directory is ours, as nobody else can change what is
 * in it, and its parents are root's or sticky.
 */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

int runtime_dir_check(const char *path)
{
	struct stat st;
	int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
	int err = 0;

	if (fd < 0)
		return errno == ELOOP ? -ENOTDIR : -errno;
	if (fstat(fd, &st) != 0)
		err = -errno;
	else if (st.st_uid != geteuid() || (st.st_mode & 077) != 0)
		err = -EPERM;
	close(fd);
	return err;
}

int runtime_candidate(unsigned i, char *path, size_t size)
{
	const char *xdg = getenv("XDG_RUNTIME_DIR");
	int n;

	switch (i) {
	case 0:
		if (xdg == NULL || xdg[0] != '/')
			return -CTG_EAGAIN;
		n = snprintf(path, size, "%s/contig", xdg);
		break;
	case 1:
		n = snprintf(path, size, "/run/contig-%u", (unsigned)geteuid());
		break;
	case 2:
		n = snprintf(path, size, "/tmp/contig-%u", (unsigned)geteuid());
		break;
	default:
		return -CTG_ENOENT;
	}
	return n < 0 || (size_t)n >= size ? -CTG_EINVAL : 0;
}

int posix_runtime_dir(char *path, size_t size, bool create)
{
	int err, why = -ENOENT;

	for (unsigned i = 0;; i++) {
		err = runtime_candidate(i, path, size);
		if (err == -CTG_ENOENT)
			return why;
		if (err != 0)
			continue;
		if (create && mkdir(path, 0700) != 0 && errno != EEXIST) {
			why = -errno;
			continue;
		}
		err = runtime_dir_check(path);
		if (err == 0)
			return 0;
		if (err != -ENOENT || why == -ENOENT)
			why = err;
	}
}

static bool name_valid(const char *name)
{
	size_t len = strnlen(name, PROTO_NAME_MAX + 1);

	if (len == 0 || len > PROTO_NAME_MAX || name[0] == '.')
		return false;
	for (size_t i = 0; i < len; i++)
		if (name[i] == '/' || (unsigned char)name[i] < ' ' || name[i] == 0x7f)
			return false;
	return true;
}

/* The region may have been started with another environment (sudo, cron): look everywhere for a
 * socket that exists before naming the place where one would be made. */
int posix_socket_path(const char *name, char *path, size_t size)
{
	char dir[sizeof(((struct sockaddr_un *)0)->sun_path)];
	struct stat st;
	int err, n;

	if (!name_valid(name))
		return -EINVAL;
	for (unsigned i = 0;; i++) {
		err = runtime_candidate(i, dir, sizeof(dir));
		if (err == -CTG_ENOENT)
			break;
		if (err != 0 || runtime_dir_check(dir) != 0)
			continue;
		n = snprintf(path, size, "%s/%s.sock", dir, name);
		if (n > 0 && (size_t)n < size && lstat(path, &st) == 0)
			return 0;
	}
	err = posix_runtime_dir(dir, sizeof(dir), false);
	if (err != 0)
		return err;
	n = snprintf(path, size, "%s/%s.sock", dir, name);
	return n < 0 || (size_t)n >= size ? -EINVAL : 0;
}

int runtime_address(const char *path, struct sockaddr_un *out)
{
	size_t len = strlen(path);

	memset(out, 0, sizeof(*out));
	out->sun_family = AF_UNIX;
	if (len >= sizeof(out->sun_path))
		return -ENAMETOOLONG;
	memcpy(out->sun_path, path, len + 1);
	return 0;
}

int runtime_connect(const char *path)
{
	struct sockaddr_un addr;
	int err = runtime_address(path, &addr);
	int fd;

	if (err != 0)
		return err;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	while (connect(fd, (const struct sockaddr *)&addr, sizeof(addr)) != 0) {
		if (errno == EINTR)
			continue;
		err = -errno;
		close(fd);
		return err;
	}
	return fd;
}

/*
 * bind and listen are two steps, and a socket that is bound but does not listen yet refuses like a
 * stale one. Whoever binds or removes a socket holds the directory's lock.
 */
int runtime_lock(const char *dir)
{
	int fd = open(dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);

	if (fd < 0)
		return -errno;
	while (flock(fd, LOCK_EX) != 0) {
		int err = -errno;

		if (err == -EINTR)
			continue;
		close(fd);
		return err;
	}
	return fd;
}

int runtime_remove_stale(const char *path)
{
	struct stat st;
	int fd;

	if (lstat(path, &st) != 0)
		return errno == ENOENT ? 0 : -errno;
	if (!S_ISSOCK(st.st_mode))
		return -EEXIST;
	fd = runtime_connect(path);
	if (fd >= 0) {
		close(fd);
		return -EEXIST;
	}
	/* EAGAIN: its queue is full, so somebody listens. */
	if (fd != -ECONNREFUSED)
		return fd == -ENOENT ? 0 : -EEXIST;
	return unlink(path) != 0 && errno != ENOENT ? -errno : 0;
}

static int bind_listen(int fd, const char *path)
{
	struct sockaddr_un addr;
	int err = runtime_address(path, &addr);

	if (err != 0)
		return err;
	/* The file takes its mode from the socket at bind: it is never wider, not for a moment. */
	if (fchmod(fd, 0600) != 0 || bind(fd, (const struct sockaddr *)&addr, sizeof(addr)) != 0)
		return -errno;
	if (listen(fd, 128) != 0) {
		err = -errno;
		unlink(path);
		return err;
	}
	return 0;
}

int runtime_listen(const char *name, char *path, size_t size, ino_t *inode)
{
	char dir[sizeof(((struct sockaddr_un *)0)->sun_path)];
	struct stat st;
	int lock, fd, n, err;

	if (!name_valid(name))
		return -EINVAL;
	err = posix_runtime_dir(dir, sizeof(dir), true);
	if (err != 0)
		return err;
	n = snprintf(path, size, "%s/%s.sock", dir, name);
	if (n < 0 || (size_t)n >= size || (size_t)n >= sizeof(dir))
		return -ENAMETOOLONG;
	lock = runtime_lock(dir);
	if (lock < 0)
		return lock;
	fd = -1;
	err = runtime_remove_stale(path);
	if (err == 0) {
		fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
		err = fd < 0 ? -errno : bind_listen(fd, path);
	}
	if (err == 0 && lstat(path, &st) != 0)
		err = -errno;
	close(lock);
	if (err != 0) {
		if (fd >= 0)
			close(fd);
		return err;
	}
	*inode = st.st_ino;
	return fd;
}

void runtime_unlisten(const char *path, ino_t inode)
{
	char dir[sizeof(((struct sockaddr_un *)0)->sun_path)];
	struct stat st;
	char *slash;
	int lock;

	snprintf(dir, sizeof(dir), "%s", path);
	slash = strrchr(dir, '/');
	if (slash == NULL)
		return;
	*slash = '\0';
	lock = runtime_lock(dir);
	/* Somebody may have removed it and bound another in its place. */
	if (lstat(path, &st) == 0 && S_ISSOCK(st.st_mode) && st.st_ino == inode)
		unlink(path);
	if (lock >= 0)
		close(lock);
}
