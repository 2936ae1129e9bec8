/* SPDX-License-Identifier: MIT */
/*
 * A program that contig runs: made early, let go when there is something for it to use.
 *
 * It is forked while contig has one thread, because what prepares it (the seccomp filter) may
 * allocate. It stays in contig's process group, so that the terminal treats both as one job;
 * signals that were sent to contig alone are passed on.
 */
#include "cli.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MESSAGE_MAX 4096

/* What comes back through the gate when there was no exec. */
struct failure {
	int status; /* to exit with */
	int error;  /* errno of exec; 0: already said */
};

static const int passed_on[] = {
	SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGCONT, SIGWINCH, SIGCHLD};

static void block_signals(sigset_t *before)
{
	sigset_t set;

	sigemptyset(&set);
	for (size_t i = 0; i < sizeof(passed_on) / sizeof(passed_on[0]); i++)
		sigaddset(&set, passed_on[i]);
	sigprocmask(SIG_BLOCK, &set, before);
}

static int status_of_exec(int error)
{
	return error == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

/* In the child: wait at the gate, get ready, become the program. */
__attribute__((noreturn)) static void become(
	int gate, const sigset_t *mask, const char **argv, cli_prepare prepare, void *arg)
{
	static char message[MESSAGE_MAX];
	struct failure failure = {0};
	ssize_t n;

	do
		n = recv(gate, message, sizeof(message) - 1, 0);
	while (n < 0 && errno == EINTR);
	if (n <= 0)
		_exit(EXIT_RUN_FAILED); /* given up on: whoever did has said why */
	message[n] = 0;
	failure.status = prepare(arg, message);
	if (failure.status == 0) {
		sigprocmask(SIG_SETMASK, mask, NULL);
		execvp(argv[0], (char *const *)(uintptr_t)argv);
		failure = (struct failure){.status = status_of_exec(errno), .error = errno};
	}
	send(gate, &failure, sizeof(failure), MSG_NOSIGNAL);
	_exit(failure.status);
}

int cli_child_start(struct cli_child *child, const char **argv, cli_prepare prepare, void *arg)
{
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0)
		return -errno;
	block_signals(&child->before);
	child->pid = fork();
	if (child->pid < 0) {
		int error = errno;

		sigprocmask(SIG_SETMASK, &child->before, NULL);
		close(ends[0]);
		close(ends[1]);
		return -error;
	}
	if (child->pid == 0) {
		close(ends[0]);
		become(ends[1], &child->before, argv, prepare, arg);
	}
	close(ends[1]);
	child->gate = ends[0];
	return 0;
}

int cli_child_go(struct cli_child *child, const char *message)
{
	struct failure failure;
	ssize_t n;

	/* If it was killed at the gate, the wait for it says so. */
	if (send(child->gate, message, strlen(message), MSG_NOSIGNAL) < 0 && errno == EMSGSIZE)
		return cli_fail(EXIT_RUN_FAILED, "the path of the region's socket is too long");
	do
		n = recv(child->gate, &failure, sizeof(failure), 0);
	while (n < 0 && errno == EINTR);
	close(child->gate);
	child->gate = -1;
	if (n != (ssize_t)sizeof(failure))
		return 0; /* exec has closed its end */
	waitpid(child->pid, NULL, 0);
	child->pid = -1;
	if (failure.error)
		cli_note("cannot execute the program: %s", strerror(failure.error));
	return failure.status;
}

void cli_child_abandon(struct cli_child *child)
{
	if (child->gate >= 0)
		close(child->gate);
	if (child->pid > 0)
		waitpid(child->pid, NULL, 0);
	sigprocmask(SIG_SETMASK, &child->before, NULL);
}

/* What the terminal sends goes to the whole group: the program has it already. */
static void pass_on(const struct cli_child *child, const struct signalfd_siginfo *info)
{
	if (info->ssi_code == SI_KERNEL && getpgid(child->pid) == getpgrp())
		return;
	kill(child->pid, (int)info->ssi_signo);
}

/* true: the child has ended, *status is its exit status. */
static bool ended(const struct cli_child *child, int *status)
{
	int raw;

	if (waitpid(child->pid, &raw, WNOHANG) != child->pid)
		return false;
	*status = WIFSIGNALED(raw) ? 128 + WTERMSIG(raw) : WEXITSTATUS(raw);
	return true;
}

int cli_child_wait(struct cli_child *child, int extra_fd, void (*hangup)(void))
{
	struct signalfd_siginfo info;
	struct pollfd wait[2];
	sigset_t set;
	int status;

	sigemptyset(&set);
	for (size_t i = 0; i < sizeof(passed_on) / sizeof(passed_on[0]); i++)
		sigaddset(&set, passed_on[i]);
	wait[0] = (struct pollfd){
		.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), .events = POLLIN};
	wait[1] = (struct pollfd){.fd = extra_fd, .events = POLLRDHUP};
	if (wait[0].fd < 0) {
		cli_note("signals will not be passed on: %s", strerror(errno));
		waitpid(child->pid, &status, 0);
		return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
	}
	while (!ended(child, &status)) {
		if (poll(wait, 2, -1) < 0 && errno != EINTR)
			break;
		while (read(wait[0].fd, &info, sizeof(info)) == (ssize_t)sizeof(info)) {
			if (info.ssi_signo != SIGCHLD)
				pass_on(child, &info);
		}
		if (wait[1].revents) {
			wait[1].fd = -1;
			hangup();
		}
	}
	close(wait[0].fd);
	child->pid = -1;
	return status;
}

static int check_path(const char *path)
{
	struct stat stat;

	if (faccessat(AT_FDCWD, path, X_OK, AT_EACCESS) != 0)
		return errno;
	if (lstat(path, &stat) == 0 && S_ISDIR(stat.st_mode))
		return EISDIR;
	return 0;
}

/* errno of the best that PATH has to offer; 0: there is one. */
static int search_path(const char *program)
{
	const char *path = getenv("PATH");
	char full[4096];
	int best = ENOENT;

	if (!path)
		path = "/usr/local/bin:/usr/bin:/bin";
	for (;;) {
		size_t n = strcspn(path, ":");
		int length = snprintf(
			full, sizeof(full), "%.*s%s%s", (int)n, path, n ? "/" : "./", program);
		int error = length < (int)sizeof(full) ? check_path(full) : ENOENT;

		if (error == 0)
			return 0;
		if (error != ENOENT && error != ENOTDIR)
			best = error;
		if (!path[n])
			return best;
		path += n + 1;
	}
}

int cli_program_check(const char *program)
{
	int error = strchr(program, '/') ? check_path(program) : search_path(program);

	if (!*program)
		error = ENOENT;
	if (error == 0)
		return 0;
	return cli_fail(status_of_exec(error), "cannot execute '%s': %s", program,
		error == ENOENT ? "there is no such program" : strerror(error));
}

static void ending_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGHUP);
	sigaddset(set, SIGINT);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGQUIT);
}

bool cli_ending_signal(void)
{
	static const struct timespec now;
	sigset_t set;

	ending_set(&set);
	return sigtimedwait(&set, NULL, &now) > 0;
}

int cli_ending_fd(void)
{
	sigset_t set;

	ending_set(&set);
	sigprocmask(SIG_BLOCK, &set, NULL);
	return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}
