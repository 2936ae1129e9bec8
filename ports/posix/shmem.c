/* SPDX-License-Identifier: MIT */
/*
 * Shared memory in the largest pages the kernel gives.
 *
 * A memfd has pages of 4 KiB unless the administrator has set shmem_enabled, and a take-back then
 * spends most of its time allocating them (on a virtual machine 3 µs each: 8 times the copy). A
 * tmpfs mount may ask for pages of 2 MiB by itself. So the file is made in a mount of our own that
 * is attached nowhere: by root at once, otherwise in a user namespace of a child, which passes
 * the descriptor back. The mount lives as long as the file. Where neither is allowed, a memfd.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static int call(long ret)
{
	return ret < 0 ? -errno : (int)ret;
}

/* A nameless file in a fresh tmpfs. Only raw system calls: it also runs in a forked child. */
static int tmpfs_file(const char *size)
{
	int fs = call(syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC));
	int mount, fd, ret;

	if (fs < 0)
		return fs;
	ret = call(syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "huge", "always", 0));
	if (ret == 0)
		ret = call(syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "size", size, 0));
	if (ret == 0)
		ret = call(syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0));
	mount = ret == 0 ? call(syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0)) : ret;
	close(fs);
	if (mount < 0)
		return mount;
	fd = call(openat(mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
	close(mount);
	return fd;
}

static void send_file(int socket, int fd)
{
	char byte = 0;
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = {0};
	struct iovec iov = {&byte, 1};
	struct msghdr msg = {.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes)};
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);

	cmsg->cmsg_level = SOL_SOCKET;
	cmsg->cmsg_type = SCM_RIGHTS;
	cmsg->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(cmsg), &fd, sizeof(fd));
	(void)sendmsg(socket, &msg, MSG_NOSIGNAL);
}

static int receive_file(int socket)
{
	char byte;
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control;
	struct iovec iov = {&byte, 1};
	struct msghdr msg = {.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.bytes,
		.msg_controllen = sizeof(control.bytes)};
	const struct cmsghdr *cmsg;
	int fd;

	if (recvmsg(socket, &msg, MSG_CMSG_CLOEXEC) <= 0)
		return -EPERM;
	cmsg = CMSG_FIRSTHDR(&msg);
	if (cmsg == NULL || cmsg->cmsg_type != SCM_RIGHTS ||
		cmsg->cmsg_len != CMSG_LEN(sizeof(int)))
		return -EPERM;
	memcpy(&fd, CMSG_DATA(cmsg), sizeof(fd));
	return fd;
}

/* As tmpfs_file, with the rights that a user namespace of one's own gives. */
static int tmpfs_file_in_namespace(const char *size)
{
	int pair[2], fd;
	pid_t pid;

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) != 0)
		return -errno;
	pid = fork();
	if (pid == 0) {
		fd = unshare(CLONE_NEWUSER | CLONE_NEWNS) == 0 ? tmpfs_file(size) : -EPERM;
		if (fd >= 0)
			send_file(pair[1], fd);
		_exit(0);
	}
	close(pair[1]);
	fd = pid < 0 ? -EAGAIN : receive_file(pair[0]);
	close(pair[0]);
	while (pid > 0 && waitpid(pid, NULL, 0) < 0 && errno == EINTR)
		;
	return fd;
}

/* Is the whole kernel forbidden to use large pages in shared memory? Then a mount cannot either. */
static bool large_denied(void)
{
	char text[80] = "";
	int fd = open("/sys/kernel/mm/transparent_hugepage/shmem_enabled", O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	return n <= 0 || strstr(text, "[deny]") != NULL;
}

int posix_shmem_open(const char *name, uint64_t bytes, bool *large)
{
	char size[32];
	int fd = -EPERM;

	/* tmpfs counts its own limit in blocks; a margin costs nothing. */
	snprintf(size, sizeof(size), "%llu", (unsigned long long)(bytes + (4u << 20)));
	if (!large_denied()) {
		fd = tmpfs_file(size);
		if (fd < 0)
			fd = tmpfs_file_in_namespace(size);
	}
	*large = fd >= 0;
	if (fd < 0)
		fd = call(memfd_create(name, MFD_CLOEXEC));
	if (fd >= 0 && ftruncate(fd, (off_t)bytes) != 0) {
		int ret = -errno;

		close(fd);
		return ret;
	}
	return fd;
}
