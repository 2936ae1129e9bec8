/* SPDX-License-Identifier: MIT */
/*
 * The stopper: a process that stops the threads of others with ptrace, and lets them go on.
 *
 * It is a process of its own because a thread cannot trace its own process, and because what it has
 * stopped goes on when it dies, whatever it dies of. PTRACE_SEIZE and PTRACE_INTERRUPT send no
 * signals; a thread in a system call leaves it first (and restarts it afterwards), so no kernel
 * code writes to the process's memory either.
 *
 * The child runs with a copy of a process that may have had many threads, so it uses system calls
 * and nothing of libc that allocates or locks.
 */
#define _GNU_SOURCE
#include "region.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define STOP_TIMEOUT_NS UINT64_C(500000000)
#define STOP_REAP_MS 10
#define STOP_MAX_THREADS 65536u

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

enum stop_kind {
	STOP_STOP = 1,
	STOP_RESUME,
};

struct stop_command {
	uint32_t kind;
	pid_t pid;
	pid_t keep[4];
};

struct posix_stopper {
	pthread_mutex_t lock; /* one command at a time */
	int fd;
	pid_t pid;
};

/* ---- the child ----------------------------------------------------------------------------------
 */

struct stop_thread {
	pid_t pid, tid; /* tid 0: gone */
	int signal;     /* was about to be delivered; goes along when the thread does */
	bool stopped;
	bool dying; /* killed, not reaped yet: see thread_resume */
};

/* Its memory is a mapping made before the fork. */
struct stop_state {
	int fd;
	uint32_t nr;
	struct stop_thread thread[STOP_MAX_THREADS];
};

static uint64_t stop_now(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

/* Sleep until a traced thread reports something, at most until the deadline. false: it has passed.
 */
static bool stop_wait(uint64_t deadline)
{
	uint64_t now = stop_now();
	struct timespec ts;
	sigset_t set;

	if (now >= deadline)
		return false;
	ts.tv_sec = (time_t)((deadline - now) / 1000000000u);
	ts.tv_nsec = (long)((deadline - now) % 1000000000u);
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	return sigtimedwait(&set, NULL, &ts) >= 0 || errno == EINTR;
}

/* Look whether the thread has stopped or gone; does not sleep. */
static void thread_poll(struct stop_thread *thread)
{
	int status;
	pid_t ret = waitpid(thread->tid, &status, __WALL | WNOHANG);

	if (ret == 0)
		return;
	if (ret < 0 || WIFEXITED(status) || WIFSIGNALED(status)) {
		thread->tid = 0;
		return;
	}
	if (!WIFSTOPPED(status))
		return;
	thread->stopped = true;
	/* Event stops (the interrupt, or a stopped process) carry no signal to be delivered. */
	if (status >> 16 == 0)
		thread->signal = WSTOPSIG(status);
}

/*
 * A thread that has been killed while it was stopped must be reaped here, or its process's parent
 * never hears of the end. The leader can be reaped only after all others, also those never traced,
 * have gone; that is waited for here, and what takes longer is done later (reap_dying).
 */
static void thread_resume(struct stop_thread *thread)
{
	uint64_t deadline = stop_now() + STOP_TIMEOUT_NS;

	while (thread->tid != 0) {
		if (ptrace(PTRACE_DETACH, thread->tid, NULL, (void *)(long)thread->signal) == 0) {
			thread->tid = 0;
			return;
		}
		/* It has not stopped yet, or somebody has killed it. */
		thread->stopped = false;
		thread_poll(thread);
		if (thread->tid != 0 && !thread->stopped && !stop_wait(deadline)) {
			thread->dying = true;
			return;
		}
	}
}

static void threads_compact(struct stop_state *state)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < state->nr; i++)
		if (state->thread[i].tid != 0)
			state->thread[kept++] = state->thread[i];
	state->nr = kept;
}

static void process_resume(struct stop_state *state, pid_t pid)
{
	struct stop_thread *leader = NULL;

	for (uint32_t i = 0; i < state->nr; i++) {
		struct stop_thread *thread = &state->thread[i];

		if (thread->pid != pid || thread->dying)
			continue;
		if (thread->tid == pid)
			leader = thread;
		else
			thread_resume(thread);
	}
	if (leader != NULL)
		thread_resume(leader);
	threads_compact(state);
}

/* true: some are left. */
static bool reap_dying(struct stop_state *state)
{
	bool left = false;

	for (uint32_t i = 0; i < state->nr; i++) {
		if (!state->thread[i].dying)
			continue;
		thread_poll(&state->thread[i]);
		left = left || state->thread[i].tid != 0;
	}
	threads_compact(state);
	return left;
}

static struct stop_thread *thread_find(struct stop_state *state, pid_t tid)
{
	for (uint32_t i = 0; i < state->nr; i++)
		if (state->thread[i].tid == tid)
			return &state->thread[i];
	return NULL;
}

/* 0: seized, or gone meanwhile. */
static int thread_seize(struct stop_state *state, pid_t pid, pid_t tid)
{
	if (state->nr == STOP_MAX_THREADS)
		return -CTG_ENOMEM;
	if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) != 0) {
		if (errno == ESRCH)
			return 0;
		return errno == EPERM ? -CTG_EPERM : -CTG_EBUSY;
	}
	ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
	state->thread[state->nr++] = (struct stop_thread){.pid = pid, .tid = tid};
	return 0;
}

static pid_t number_of(const char *name)
{
	pid_t n = 0;

	for (; *name >= '0' && *name <= '9'; name++)
		n = n * 10 + (*name - '0');
	return *name == '\0' ? n : 0;
}

/* "/proc/PID/task" */
static int open_tasks(pid_t pid)
{
	char digits[16], path[32] = "/proc/";
	size_t n = 0, at = 6;

	for (; pid > 0; pid /= 10)
		digits[n++] = (char)('0' + pid % 10);
	while (n > 0)
		path[at++] = digits[--n];
	memcpy(path + at, "/task", 6);
	return open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

/* Seize what is not seized yet. *found: how many those were. */
static int seize_new(struct stop_state *state, const struct stop_command *command, unsigned *found)
{
	char buf[4096] __attribute__((aligned(8)));
	int fd = open_tasks(command->pid), ret = 0;
	long n;

	*found = 0;
	if (fd < 0)
		return -CTG_ENOENT;
	while (ret == 0 && (n = syscall(SYS_getdents64, fd, buf, sizeof(buf))) > 0) {
		for (long at = 0; at < n && ret == 0;) {
			const struct dirent64 *entry = (const void *)(buf + at);
			pid_t tid = number_of(entry->d_name);
			bool keep = tid == 0;

			at += entry->d_reclen;
			for (int i = 0; i < 4 && command->keep[i] != 0; i++)
				keep |= tid == command->keep[i];
			if (keep || thread_find(state, tid) != NULL)
				continue;
			ret = thread_seize(state, command->pid, tid);
			++*found;
		}
	}
	close(fd);
	return ret;
}

static int wait_stopped(struct stop_state *state, pid_t pid, uint64_t deadline)
{
	for (;;) {
		bool all = true;

		for (uint32_t i = 0; i < state->nr; i++) {
			struct stop_thread *thread = &state->thread[i];

			if (thread->pid != pid || thread->tid == 0 || thread->stopped ||
				thread->dying)
				continue;
			thread_poll(thread);
			all = all && (thread->tid == 0 || thread->stopped);
		}
		if (all)
			return 0;
		if (!stop_wait(deadline))
			return -CTG_EBUSY;
	}
}

/* A thread that has not been seized yet may start others: look until there are no new ones. */
static int process_stop(struct stop_state *state, const struct stop_command *command)
{
	uint64_t deadline = stop_now() + STOP_TIMEOUT_NS;
	unsigned found = 1;
	int ret = 0;

	for (uint32_t i = 0; i < state->nr; i++)
		if (state->thread[i].pid == command->pid && !state->thread[i].dying)
			return 0;
	while (ret == 0 && found > 0) {
		ret = seize_new(state, command, &found);
		if (ret == 0)
			ret = wait_stopped(state, command->pid, deadline);
	}
	if (ret != 0)
		process_resume(state, command->pid);
	return ret;
}

static void stopper_main(struct stop_state *state)
{
	struct sigaction action = {.sa_handler = SIG_DFL};
	struct stop_command command;
	sigset_t all;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigaction(SIGCHLD, &action, NULL);
	prctl(PR_SET_NAME, "contig-stopper", 0, 0, 0);
	/* Nothing of the parent's may be kept open: a pipe's reader would wait for its end for
	 * ever. */
	if (dup2(state->fd, 0) != 0 || syscall(SYS_close_range, 1, ~0U, 0) != 0)
		_exit(1);
	state->fd = 0;
	for (;;) {
		struct pollfd p = {.fd = state->fd, .events = POLLIN};
		int32_t ret = 0;
		ssize_t n;

		if (poll(&p, 1, reap_dying(state) ? STOP_REAP_MS : -1) <= 0)
			continue;
		n = recv(state->fd, &command, sizeof(command), 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n != (ssize_t)sizeof(command))
			_exit(0); /* whatever is stopped goes on */
		if (command.kind == STOP_STOP)
			ret = process_stop(state, &command);
		else
			process_resume(state, command.pid);
		if (send(state->fd, &ret, sizeof(ret), MSG_NOSIGNAL) != (ssize_t)sizeof(ret))
			_exit(0);
	}
}

/* ---- the parent ---------------------------------------------------------------------------------
 */

int posix_stopper_start(struct posix_stopper **out)
{
	struct posix_stopper *stopper = calloc(1, sizeof(*stopper));
	struct stop_state *state = mmap(NULL, sizeof(*state), PROT_READ | PROT_WRITE,
		MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int pair[2] = {-1, -1}, ret = 0;

	if (stopper == NULL || state == MAP_FAILED)
		ret = -CTG_ENOMEM;
	else if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0)
		ret = -errno;
	if (ret == 0) {
		state->fd = pair[1];
		/* No signal at its end: a program that waits for its own children never meets it.
		 */
		stopper->pid = (pid_t)syscall(SYS_clone, 0, NULL, NULL, NULL, 0);
		if (stopper->pid == 0)
			stopper_main(state);
		if (stopper->pid < 0)
			ret = -errno;
	}
	if (pair[1] >= 0)
		close(pair[1]);
	if (state != MAP_FAILED)
		munmap(state, sizeof(*state));
	if (ret != 0) {
		if (pair[0] >= 0)
			close(pair[0]);
		free(stopper);
		return ret;
	}
	stopper->fd = pair[0];
	pthread_mutex_init(&stopper->lock, NULL);
	*out = stopper;
	return 0;
}

void posix_stopper_end(struct posix_stopper *stopper)
{
	if (stopper == NULL)
		return;
	close(stopper->fd);
	while (waitpid(stopper->pid, NULL, (int)__WCLONE) < 0 && errno == EINTR)
		;
	pthread_mutex_destroy(&stopper->lock);
	free(stopper);
}

pid_t posix_stopper_pid(const struct posix_stopper *stopper)
{
	return stopper->pid;
}

static int stopper_call(struct posix_stopper *stopper, const struct stop_command *command)
{
	int32_t answer = -CTG_EBUSY;
	ssize_t n;

	pthread_mutex_lock(&stopper->lock);
	n = send(stopper->fd, command, sizeof(*command), MSG_NOSIGNAL);
	if (n == (ssize_t)sizeof(*command)) {
		do {
			n = recv(stopper->fd, &answer, sizeof(answer), 0);
		} while (n < 0 && errno == EINTR);
		/* It is gone: nothing is stopped. */
		if (n != (ssize_t)sizeof(answer))
			answer = -CTG_EBUSY;
	}
	pthread_mutex_unlock(&stopper->lock);
	return answer;
}

int posix_stopper_stop(struct posix_stopper *stopper, pid_t pid, const pid_t keep[4])
{
	struct stop_command command = {.kind = STOP_STOP, .pid = pid};

	memcpy(command.keep, keep, sizeof(command.keep));
	return stopper_call(stopper, &command);
}

void posix_stopper_resume(struct posix_stopper *stopper, pid_t pid)
{
	struct stop_command command = {.kind = STOP_RESUME, .pid = pid};

	stopper_call(stopper, &command);
}
