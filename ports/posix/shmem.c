/* SPDX-License-Identifier: MIT */
/*
 * Unnamed files in shared memory, in pages of 2 MiB where those can be had.
 *
 * Whether a memfd gets huge pages is a setting of the system that most leave off. A file in a tmpfs
 * of one's own gets them by a mount option. Such a file system needs no place in the tree: it is
 * mounted nowhere, one unnamed file is made in it, and it goes away with the file. Without the
 * right to do that, a child does it in a user namespace of its own and hands the file over. It
 * makes a take-back several times faster, because what is displaced needs fewer and cheaper pages;
 * if it cannot be had, a memfd serves.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* Only system calls: it runs in a child of a process that may have many threads, too. */
static int tmpfs_file(void)
{
	int fs = (int)syscall(SYS_fsopen, "tmpfs", FSOPEN_CLOEXEC), mount = -1, fd = -1;

	if (fs < 0)
		return -1;
	if (syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "huge", "always", 0) == 0 &&
		/* No limit of its own: the caller has asked how much memory there is. */
		syscall(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "size", "0", 0) == 0 &&
		syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
		mount = (int)syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
	if (mount >= 0)
		fd = openat(mount, ".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
	if (mount >= 0)
		close(mount);
	close(fs);
	return fd;
}

/* The text is made before the child exists: it may not use stdio. */
struct shmem_identity {
	char uid[48], gid[48];
};

static void write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	if (write(fd, text, strlen(text)) < 0) {
		/* Then the file cannot be made, which is seen soon enough. */
	}
	close(fd);
}

union fd_message {
	struct cmsghdr header;
	char space[CMSG_SPACE(sizeof(int))];
};

static int send_fd(int socket, int fd)
{
	union fd_message control = {0};
	char byte = 0;
	struct iovec data = {.iov_base = &byte, .iov_len = 1};
	struct msghdr message = {.msg_iov = &data,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control)};

	control.header.cmsg_level = SOL_SOCKET;
	control.header.cmsg_type = SCM_RIGHTS;
	control.header.cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	return sendmsg(socket, &message, MSG_NOSIGNAL) == 1 ? 0 : -1;
}

static int receive_fd(int socket)
{
	union fd_message control = {0};
	char byte;
	struct iovec data = {.iov_base = &byte, .iov_len = 1};
	struct msghdr message = {.msg_iov = &data,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control)};
	int fd = -1;
	ssize_t n;

	do {
		n = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
	} while (n < 0 && errno == EINTR);
	if (n == 1 && message.msg_controllen > 0 && control.header.cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(&control.header), sizeof(fd));
	return fd;
}

static void namespace_child(int socket, const struct shmem_identity *who)
{
	int fd;

	write_text("/proc/self/uid_map", who->uid);
	write_text("/proc/self/setgroups", "deny");
	write_text("/proc/self/gid_map", who->gid);
	fd = tmpfs_file();
	_exit(fd >= 0 && send_fd(socket, fd) == 0 ? 0 : 1);
}

static int tmpfs_file_by_child(void)
{
	struct shmem_identity who;
	int pair[2], fd = -1;
	pid_t pid;

	snprintf(who.uid, sizeof(who.uid), "%u %u 1", geteuid(), geteuid());
	snprintf(who.gid, sizeof(who.gid), "%u %u 1", getegid(), getegid());
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
		return -1;
	/* No signal at its end: the program's own children are none of our business, nor ours its.
	 */
	pid = (pid_t)syscall(SYS_clone, CLONE_NEWUSER | CLONE_NEWNS, NULL, NULL, NULL, 0);
	if (pid == 0)
		namespace_child(pair[1], &who);
	close(pair[1]);
	if (pid > 0) {
		fd = receive_fd(pair[0]);
		while (waitpid(pid, NULL, (int)__WCLONE) < 0 && errno == EINTR)
			;
	}
	close(pair[0]);
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
	int fd = -1, ret;

	if (!large_denied()) {
		fd = tmpfs_file();
		if (fd < 0)
			fd = tmpfs_file_by_child();
	}
	*large = fd >= 0;
	if (fd < 0)
		fd = memfd_create(name, MFD_CLOEXEC);
	if (fd >= 0 && ftruncate(fd, (off_t)bytes) == 0)
		return fd;
	ret = -errno;
	if (fd >= 0)
		close(fd);
	return ret;
}
