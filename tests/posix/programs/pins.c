/* SPDX-License-Identifier: MIT */
/*
 * What the filter refuses, done as programs do it: try the fast way, and if the system does not
 * have it, the ordinary one. usage: pins CASE. Prints which way it was and exits with 0 if the data
 * arrived whole.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/aio_abi.h>
#include <netinet/in.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define BYTES (64u << 10)

static unsigned char *expected, *got;

static int finish(const char *way)
{
	if (memcmp(expected, got, BYTES) != 0) {
		fprintf(stderr, "pins: data differs\n");
		return 1;
	}
	puts(way);
	return 0;
}

static int make_file(char *path)
{
	int fd;

	strcpy(path, "/var/tmp/contig-pins-XXXXXX");
	fd = mkstemp(path);
	if (fd < 0 || write(fd, expected, BYTES) != BYTES || fsync(fd) != 0)
		exit(2);
	return fd;
}

static void read_all(int fd)
{
	if (pread(fd, got, BYTES, 0) != BYTES)
		exit(3);
}

static int case_uring(void)
{
	struct io_uring ring;
	struct io_uring_cqe *cqe;
	char path[64];
	int fd = make_file(path), ret;

	unlink(path);
	ret = io_uring_queue_init(4, &ring, 0);
	if (ret == -ENOSYS) {
		read_all(fd);
		return finish("read");
	}
	if (ret != 0)
		return 4;
	io_uring_prep_read(io_uring_get_sqe(&ring), fd, got, BYTES, 0);
	if (io_uring_submit(&ring) != 1 || io_uring_wait_cqe(&ring, &cqe) != 0 || cqe->res != BYTES)
		return 5;
	io_uring_cqe_seen(&ring, cqe);
	io_uring_queue_exit(&ring);
	return finish("io_uring");
}

static int case_aio(void)
{
	aio_context_t context = 0;
	struct iocb iocb = {.aio_lio_opcode = IOCB_CMD_PREAD}, *list = &iocb;
	struct io_event event;
	char path[64];
	int fd = make_file(path);

	unlink(path);
	if (syscall(SYS_io_setup, 4, &context) != 0) {
		if (errno != ENOSYS)
			return 4;
		read_all(fd);
		return finish("read");
	}
	iocb.aio_fildes = (uint32_t)fd;
	iocb.aio_buf = (uintptr_t)got;
	iocb.aio_nbytes = BYTES;
	if (syscall(SYS_io_submit, context, 1, &list) != 1 ||
		syscall(SYS_io_getevents, context, 1, 1, &event, NULL) != 1 || event.res != BYTES)
		return 5;
	syscall(SYS_io_destroy, context);
	return finish("aio");
}

static int case_direct(void)
{
	const char *way = "O_DIRECT";
	char path[64];
	int fd;

	close(make_file(path));
	fd = open(path, O_RDONLY | O_DIRECT);
	if (fd < 0 && errno == EINVAL) {
		way = "buffered";
		fd = open(path, O_RDONLY);
	}
	unlink(path);
	if (fd < 0)
		return 4;
	read_all(fd);
	return finish(way);
}

/* A descriptor that was opened without the flag is given it. */
static int case_setfl(void)
{
	const char *way = "O_DIRECT";
	char path[64];
	int fd = make_file(path);

	unlink(path);
	if (fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_DIRECT) != 0) {
		if (errno != EINVAL)
			return 4;
		way = "buffered";
	}
	read_all(fd);
	return finish(way);
}

static int case_vmsplice(void)
{
	struct iovec part = {expected, BYTES / 2};
	const char *way = "vmsplice";
	int ends[2];

	if (pipe(ends) != 0)
		return 2;
	for (int i = 0; i < 2; i++) {
		part.iov_base = expected + (size_t)i * (BYTES / 2);
		if (vmsplice(ends[1], &part, 1, 0) != BYTES / 2) {
			if (errno != EINVAL)
				return 4;
			way = "writev";
			if (writev(ends[1], &part, 1) != BYTES / 2)
				return 5;
		}
		for (size_t n = 0; n < BYTES / 2;) {
			ssize_t ret =
				read(ends[0], got + (size_t)i * (BYTES / 2) + n, BYTES / 2 - n);

			if (ret <= 0)
				return 6;
			n += (size_t)ret;
		}
	}
	return finish(way);
}

static int case_zerocopy(void)
{
	struct sockaddr_in address = {.sin_family = AF_INET};
	socklen_t length = sizeof(address);
	int listener = socket(AF_INET, SOCK_STREAM, 0), client, server, one = 1, flags = 0;

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	if (bind(listener, (struct sockaddr *)&address, length) != 0 || listen(listener, 1) != 0 ||
		getsockname(listener, (struct sockaddr *)&address, &length) != 0)
		return 2;
	client = socket(AF_INET, SOCK_STREAM, 0);
	if (connect(client, (struct sockaddr *)&address, length) != 0)
		return 3;
	server = accept(listener, NULL, NULL);
	if (setsockopt(client, SOL_SOCKET, SO_ZEROCOPY, &one, sizeof(one)) == 0)
		flags = MSG_ZEROCOPY;
	else if (errno != ENOPROTOOPT)
		return 4;
	for (size_t sent = 0, n = 0; n < BYTES;) {
		ssize_t ret;

		if (sent < BYTES) {
			ret = send(client, expected + sent, BYTES - sent, flags | MSG_DONTWAIT);
			if (ret > 0)
				sent += (size_t)ret;
			else if (errno != EAGAIN && errno != ENOBUFS)
				return 5;
		}
		ret = recv(server, got + n, BYTES - n, 0);
		if (ret <= 0)
			return 6;
		n += (size_t)ret;
	}
	return finish(flags ? "MSG_ZEROCOPY" : "send");
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*run)(void);
	} cases[] = {
		{"uring", case_uring},
		{"aio", case_aio},
		{"direct", case_direct},
		{"setfl", case_setfl},
		{"vmsplice", case_vmsplice},
		{"zerocopy", case_zerocopy},
	};

	expected = aligned_alloc(4096, BYTES);
	got = aligned_alloc(4096, BYTES);
	for (size_t i = 0; i < BYTES; i++)
		expected[i] = (unsigned char)(i * 31 + i / 256);
	memset(got, 0, BYTES);
	for (size_t i = 0; argc > 1 && i < sizeof(cases) / sizeof(cases[0]); i++)
		if (strcmp(cases[i].name, argv[1]) == 0)
			return cases[i].run();
	return 64;
}
