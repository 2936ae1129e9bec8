/* SPDX-License-Identifier: MIT */
/*
 * A program that contig runs: made early, let go when there is something for it to use.
 *
 *   contig --- keeper --- program --- what it starts
 *
 * The program is forked while contig has one thread, because what prepares it (the seccomp filter)
 * may allocate. It stays in contig's process group, so that the terminal treats all as one job;
 * signals that were sent to contig alone are passed on. The keeper is the one to whom orphans fall:
 * it knows when the last process that the program has started is gone, also if the program was a
 * daemon that forked and left.
 */
#include "cli.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/prctl.h>
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

static void passed_set(sigset_t *set)
{
	static const int passed_on[] = {
		SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGCONT, SIGWINCH};

	sigemptyset(set);
	for (size_t i = 0; i < sizeof(passed_on) / sizeof(passed_on[0]); i++)
		sigaddset(set, passed_on[i]);
}

static void ending_set(sigset_t *set)
{
	sigemptyset(set);
	sigaddset(set, SIGHUP);
	sigaddset(set, SIGINT);
	sigaddset(set, SIGTERM);
	sigaddset(set, SIGQUIT);
}

static void block_signals(sigset_t *before)
{
	sigset_t set;

	passed_set(&set);
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

/* What the keeper tells: first pid, then how it ended, then nothing more: the end of the pipe. */
struct news {
	pid_t pid;
	int raw; /* as wait(2) gives it */
};

/* In the keeper: tell of the program's end; stay until nothing it started is left. */
__attribute__((noreturn)) static void keep(pid_t program, int news_fd, bool all)
{
	struct news news = {.pid = program};
	int raw;

	prctl(PR_SET_NAME, "contig-keeper");
	if (write(news_fd, &news, sizeof(news)) < 0)
		_exit(1);
	for (;;) {
		pid_t pid = waitpid(-1, &raw, 0);

		if (pid < 0 && errno == EINTR)
			continue;
		if (pid < 0)
			break;
		news.raw = raw;
		if (pid == program && (write(news_fd, &news, sizeof(news)) < 0 || !all))
			break;
	}
	_exit(0);
}

/* In the child of contig: fork the program, become its keeper. */
__attribute__((noreturn)) static void become_keeper(struct cli_child *child, int gate, int news_fd,
	const char **argv, cli_prepare prepare, void *arg, bool all)
{
	sigset_t none;
	pid_t pid;

	if (all)
		prctl(PR_SET_CHILD_SUBREAPER, 1);
	pid = fork();
	if (pid == 0) {
		close(news_fd);
		become(gate, &child->before, argv, prepare, arg);
	}
	if (pid < 0)
		_exit(1);
	close(gate);
	/* What the terminal sends is for the program; contig's death ends this too. */
	sigfillset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	keep(pid, news_fd, all);
}

static int read_news(const struct cli_child *child, struct news *news)
{
	ssize_t n;

	do
		n = read(child->news, news, sizeof(*news));
	while (n < 0 && errno == EINTR);
	return n == (ssize_t)sizeof(*news) ? 0 : -EIO;
}

int cli_child_start(
	struct cli_child *child, const char **argv, cli_prepare prepare, void *arg, bool all)
{
	int gate[2], pipe[2], error = 0;
	struct news news;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, gate) != 0)
		return -errno;
	if (pipe2(pipe, O_CLOEXEC) != 0) {
		error = -errno;
		close(gate[0]);
		close(gate[1]);
		return error;
	}
	block_signals(&child->before);
	child->keeper = fork();
	if (child->keeper == 0) {
		close(gate[0]);
		close(pipe[0]);
		become_keeper(child, gate[1], pipe[1], argv, prepare, arg, all);
	}
	if (child->keeper < 0)
		error = -errno;
	close(gate[1]);
	close(pipe[1]);
	child->gate = gate[0];
	child->news = pipe[0];
	child->told_to_end = false;
	if (error == 0 && read_news(child, &news) != 0)
		error = -EAGAIN; /* the keeper could not fork */
	child->pid = error ? -1 : news.pid;
	child->pidfd = error ? -1 : pidfd_open(news.pid, 0);
	if (error == 0 && child->pidfd < 0)
		error = -errno;
	if (error)
		cli_child_end(child);
	return error;
}

void cli_child_end(struct cli_child *child)
{
	if (child->gate >= 0)
		close(child->gate);
	if (child->pidfd >= 0)
		close(child->pidfd);
	close(child->news);
	if (child->keeper > 0) {
		kill(child->keeper, SIGKILL);
		waitpid(child->keeper, NULL, 0);
	}
	child->gate = child->pidfd = child->news = child->keeper = -1;
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
	if (failure.error)
		cli_note("cannot execute the program: %s", strerror(failure.error));
	return failure.status;
}

/* What the terminal sends goes to the whole group: the program has it already. */
static void pass_on(struct cli_child *child, const struct signalfd_siginfo *info)
{
	int number = (int)info->ssi_signo;
	sigset_t ending;

	if (info->ssi_code == SI_KERNEL && getpgid(child->pid) == getpgrp())
		return;
	/* It may be ending by itself just now: then this is the only trace of the wish. */
	ending_set(&ending);
	if (sigismember(&ending, number))
		child->told_to_end = true;
	/* By pidfd: the keeper may have waited for it already, and its number be another's. */
	pidfd_send_signal(child->pidfd, number, NULL, 0);
}

int cli_child_wait(struct cli_child *child, int extra_fd, void (*hangup)(void))
{
	struct signalfd_siginfo info;
	struct pollfd wait[3];
	struct news news;
	sigset_t set;

	passed_set(&set);
	wait[0] = (struct pollfd){
		.fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK), .events = POLLIN};
	wait[1] = (struct pollfd){.fd = extra_fd, .events = POLLRDHUP};
	wait[2] = (struct pollfd){.fd = child->news, .events = POLLIN};
	while (wait[2].revents == 0) {
		if (poll(wait, 3, -1) < 0 && errno != EINTR)
			break;
		while (read(wait[0].fd, &info, sizeof(info)) == (ssize_t)sizeof(info))
			pass_on(child, &info);
		if (wait[1].revents) {
			wait[1].fd = -1;
			hangup();
		}
	}
	close(wait[0].fd);
	if (read_news(child, &news) != 0)
		return cli_fail(
			EXIT_RUN_FAILED, "lost sight of the program: its keeper was killed");
	return WIFSIGNALED(news.raw) ? 128 + WTERMSIG(news.raw) : WEXITSTATUS(news.raw);
}

bool cli_child_gone(struct cli_child *child, int timeout_ms)
{
	struct pollfd wait[2] = {
		{.fd = child->news, .events = POLLIN}, {.fd = cli_ending_fd(), .events = POLLIN}};
	int n;

	do
		n = poll(wait, 2, timeout_ms);
	while (n < 0 && errno == EINTR);
	close(wait[1].fd);
	return wait[0].revents != 0;
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
