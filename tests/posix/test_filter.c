/* SPDX-License-Identifier: MIT */
/*
 * The seccomp filter: each call that it refuses, as programs meet it, and that what resembles such
 * a call goes through. Everything happens in child processes: a filter cannot be taken off.
 */
#include "filter.h"
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

/* Run a program of programs/ with or without the filter; what it printed. */
static void run_pins(const char *which, bool allow, char *line, size_t size)
{
	char path[512], *argv[] = {"pins", (char *)(uintptr_t)which, NULL};
	int out[2], status;
	ssize_t n;
	pid_t pid;

	snprintf(path, sizeof(path), "%s/pins", getenv("CONTIG_TEST_PROGRAMS"));
	assert_int_equal(pipe(out), 0);
	pid = fork();
	if (pid == 0) {
		if (contig_filter_install(allow, NULL) != 0)
			_exit(100);
		dup2(out[1], 1);
		execv(path, argv);
		_exit(101);
	}
	close(out[1]);
	n = read(out[0], line, size - 1);
	line[n > 0 ? n : 0] = '\0';
	line[strcspn(line, "\n")] = '\0';
	close(out[0]);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

/* With the filter the program falls back. Without, it must not, or the first would prove nothing.
 */
static void falls_back(const char *which, const char *fast, const char *ordinary)
{
	char line[128];

	run_pins(which, false, line, sizeof(line));
	assert_string_equal(line, ordinary);
	run_pins(which, true, line, sizeof(line));
	if (strcmp(line, ordinary) == 0) {
		print_message("# this system has no %s\n", fast);
		skip();
	}
	assert_string_equal(line, fast);
}

static void test_uring(void **state)
{
	(void)state;
	falls_back("uring", "io_uring", "read");
}

static void test_aio(void **state)
{
	(void)state;
	falls_back("aio", "aio", "read");
}

static void test_direct(void **state)
{
	(void)state;
	falls_back("direct", "O_DIRECT", "buffered");
}

static void test_setfl(void **state)
{
	(void)state;
	falls_back("setfl", "O_DIRECT", "buffered");
}

static void test_vmsplice(void **state)
{
	(void)state;
	falls_back("vmsplice", "vmsplice", "writev");
}

static void test_zerocopy(void **state)
{
	(void)state;
	falls_back("zerocopy", "MSG_ZEROCOPY", "send");
}

/* Run fn under the filter in a child; it returns 0 or a number that says what was wrong. */
static void under_filter(int (*fn)(void))
{
	int status;
	pid_t pid = fork();

	if (pid == 0)
		_exit(contig_filter_install(false, NULL) != 0 ? 100 : fn());
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

#define REFUSED(call, err)                                                                         \
	do {                                                                                       \
		errno = 0;                                                                         \
		if ((call) != -1 || errno != (err)) {                                              \
			fprintf(stderr, "%s: %s\n", #call, strerror(errno));                       \
			return 1;                                                                  \
		}                                                                                  \
	} while (0)

static int refused_calls(void)
{
	char byte = 0, handle[32] = {0}, how[24] = {0};
	struct iovec iov = {&byte, 1};
	static const unsigned long requests[] = {0x2285, 0x3b71, 0x3b85, 0x40187542, 0x40087543,
		0xc0484e41, 0x40304e42, 0x402c4e42, 0xc0484e43, 0xc0504e47, 0xc0504e48, 0xc0504e49};

	REFUSED(syscall(SYS_io_uring_setup, 4, NULL), ENOSYS);
	REFUSED(syscall(SYS_io_uring_enter, 0, 0, 0, 0, NULL, 0), ENOSYS);
	REFUSED(syscall(SYS_io_uring_register, 0, 0, NULL, 0), ENOSYS);
	REFUSED(syscall(SYS_openat2, AT_FDCWD, "/", how, sizeof(how)), ENOSYS);
	REFUSED(syscall(SYS_open_by_handle_at, AT_FDCWD, handle, O_RDONLY | O_DIRECT), EINVAL);
	REFUSED(process_vm_writev(getpid(), &iov, 1, &iov, 1, 0), ENOSYS);
	REFUSED(process_vm_readv(getpid(), &iov, 1, &iov, 1, 0), ENOSYS);
	REFUSED(socket(44 /* AF_XDP */, SOCK_RAW, 0), EAFNOSUPPORT);
	REFUSED(socket(AF_ALG, SOCK_SEQPACKET, 0), EAFNOSUPPORT);
	REFUSED(setsockopt(0, 283 /* SOL_XDP */, 4 /* XDP_UMEM_REG */, &byte, 1), ENOPROTOOPT);
	for (size_t i = 0; i < sizeof(requests) / sizeof(requests[0]); i++)
		REFUSED(ioctl(0, requests[i], NULL), ENOTTY);
	return 0;
}

static void test_refused(void **state)
{
	(void)state;
	under_filter(refused_calls);
}

/* Upper halves of registers are not looked at, as in the kernel. */
static int refused_in_disguise(void)
{
	const long junk = (long)0x5a5a5a5a00000000;
	int one = 1;

	REFUSED(syscall(SYS_openat, (long)AT_FDCWD, "/etc/passwd", junk | O_RDONLY | O_DIRECT, 0L),
		EINVAL);
	REFUSED(syscall(SYS_fcntl, 0L, junk | F_SETFL, junk | O_DIRECT), EINVAL);
	REFUSED(syscall(SYS_ioctl, 0L, junk | 0x2285, NULL), ENOTTY);
	REFUSED(syscall(SYS_setsockopt, 0L, junk | SOL_SOCKET, junk | SO_ZEROCOPY, &one,
			sizeof(one)),
		ENOPROTOOPT);
	return 0;
}

static void test_disguise(void **state)
{
	(void)state;
	under_filter(refused_in_disguise);
}

#if defined(__x86_64__)
/* io_setup with a bad address, by the calls of 32-bit programs, which 64-bit ones can make too. */
static int other_table(void)
{
	long ret = 245;

	__asm__ volatile("int $0x80"
			 : "+a"(ret)
			 : "b"(1L), "c"(0L)
			 : "memory", "r8", "r9", "r10", "r11");
	return ret == -ENOSYS ? 0 : 1;
}

static void test_other_table(void **state)
{
	int status;
	pid_t pid = fork();

	(void)state;
	if (pid == 0)
		_exit(contig_filter_install(false, NULL) != 0 ? 100 : other_table());
	assert_int_equal(waitpid(pid, &status, 0), pid);
	if (WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV) {
		print_message("# this kernel has no 32-bit system calls\n");
		skip();
	}
	assert_int_equal(status, 0);
}
#endif

static int allowed_calls(void)
{
	int ends[2], one = 1, size = 0, fd, s;
	char text[8];

	fd = open("/etc/passwd", O_RDONLY | O_CLOEXEC);
	if (fd < 0 || read(fd, text, sizeof(text)) != sizeof(text))
		return 1;
	if (fcntl(fd, F_SETFL, O_NONBLOCK) != 0 || fcntl(fd, F_GETFL) < 0)
		return 2;
	if (fcntl(fd, F_SETFD, O_DIRECT) < 0) /* the bit means nothing there */
		return 3;
	s = socket(AF_INET, SOCK_STREAM, 0);
	if (s < 0 || setsockopt(s, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)) != 0)
		return 4;
	if (pipe2(ends, O_DIRECT) != 0) /* packets, not pages */
		return 5;
	if (write(ends[1], text, 4) != 4 || ioctl(ends[0], FIONREAD, &size) != 0 || size != 4)
		return 6;
	if (socket(AF_UNIX, SOCK_SEQPACKET, 0) < 0)
		return 7;
	return 0;
}

static void test_allowed(void **state)
{
	(void)state;
	under_filter(allowed_calls);
}

/* Children and what they execute have it too; without rights it can be installed all the same. */
static int ordinary_user(void)
{
	int status;
	pid_t pid;

	if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0))
		return 1;
	pid = fork();
	if (pid == 0) {
		struct ctg_error error = {0};

		if (contig_filter_install(false, &error) != 0) {
			fprintf(stderr, "%s\n", error.text);
			_exit(1);
		}
		pid = fork();
		if (pid == 0) {
			execlp("sh", "sh", "-c", "exit 7", NULL);
			_exit(2);
		}
		if (waitpid(pid, &status, 0) != pid || WEXITSTATUS(status) != 7)
			_exit(3);
		_exit(refused_calls());
	}
	if (waitpid(pid, &status, 0) != pid)
		return 2;
	return status;
}

static void test_ordinary_user(void **state)
{
	int status;
	pid_t pid = fork();

	(void)state;
	if (pid == 0)
		_exit(ordinary_user() != 0);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_int_equal(status, 0);
}

int main(void)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_uring),
		cmocka_unit_test(test_aio),
		cmocka_unit_test(test_direct),
		cmocka_unit_test(test_setfl),
		cmocka_unit_test(test_vmsplice),
		cmocka_unit_test(test_zerocopy),
		cmocka_unit_test(test_refused),
		cmocka_unit_test(test_disguise),
#if defined(__x86_64__)
		cmocka_unit_test(test_other_table),
#endif
		cmocka_unit_test(test_allowed),
		cmocka_unit_test(test_ordinary_user),
	};

	if (!getenv("CONTIG_TEST_PROGRAMS")) {
		fprintf(stderr, "CONTIG_TEST_PROGRAMS is not set\n");
		return 1;
	}
	return cmocka_run_group_tests_name("filter", tests, NULL, NULL);
}
