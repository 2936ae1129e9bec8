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
#define STOP_ASLEEP_NS UINT64_C(50000000)
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

/* ---- the child --------------------------------------------------------------------------- */

struct stop_thread {
	pid_t pid, tid; /* tid 0: gone */
	int signal;     /* was about to be delivered; goes along when the thread does */
	bool stopped;
	bool leaving; /* to be let go as soon as it stops, or reaped: see thread_resume */
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
 * Let a thread go on. What has not stopped yet (it sleeps where nothing interrupts it) or has been
 * killed meanwhile cannot be detached now: that is done when it stops or can be reaped, by
 * let_leave. If a killed one were not reaped here, its process's parent would never hear of the
 * end.
 */
static void thread_resume(struct stop_thread *thread)
{
	for (int tries = 0; tries < 2 && thread->tid != 0; tries++) {
		if (ptrace(PTRACE_DETACH, thread->tid, NULL, (void *)(long)thread->signal) == 0)
			thread->tid = 0;
		else
			thread_poll(thread);
	}
	thread->stopped = false;
	thread->leaving = thread->tid != 0;
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
	for (uint32_t i = 0; i < state->nr; i++)
		if (state->thread[i].pid == pid)
			thread_resume(&state->thread[i]);
	threads_compact(state);
}

/* true: some have not left yet. */
static bool let_leave(struct stop_state *state)
{
	bool left = false;

	for (uint32_t i = 0; i < state->nr; i++) {
		if (!state->thread[i].leaving)
			continue;
		thread_resume(&state->thread[i]);
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

static pid_t number_of(const char *name)
{
	pid_t n = 0;

	for (; *name >= '0' && *name <= '9'; name++)
		n = n * 10 + (*name - '0');
	return *name == '\0' ? n : 0;
}

static size_t put_text(char *to, const char *text)
{
	size_t n = strlen(text);

	memcpy(to, text, n + 1);
	return n;
}

static size_t put_number(char *to, pid_t n)
{
	char digits[16];
	size_t nr = 0, at = 0;

	for (; n > 0; n /= 10)
		digits[nr++] = (char)('0' + n % 10);
	while (nr > 0)
		to[at++] = digits[--nr];
	to[at] = '\0';
	return at;
}

#define TASK_PATH 64
/* "/proc/PID/task" */
static size_t put_tasks(char *path, pid_t pid)
{
	size_t at = put_text(path, "/proc/");

	at += put_number(path + at, pid);
	return at + put_text(path + at, "/task");
}

/* What the kernel says a thread does: 'R', 'S', 'D', 'T', 't', 'Z', ... 'X' if it is not there. */
static char thread_state(pid_t pid, pid_t tid)
{
	char path[TASK_PATH], text[128];
	size_t at = put_tasks(path, pid);
	ssize_t n = -1;
	int fd;

	at += put_text(path + at, "/");
	at += put_number(path + at, tid);
	put_text(path + at, "/stat");
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		n = read(fd, text, sizeof(text));
		close(fd);
	}
	/* "tid (name) state": the name is at most 15 bytes, and may have brackets. */
	while (n > 2 && text[n - 1] != ')')
		n--;
	return n > 2 && n + 1 < (ssize_t)sizeof(text) ? text[n + 1] : 'X';
}

static bool thread_over(pid_t pid, pid_t tid)
{
	char state = thread_state(pid, tid);

	return state == 'Z' || state == 'X';
}

/* 1: seized; 0: it does nothing any more. */
static int thread_seize(struct stop_state *state, pid_t pid, pid_t tid)
{
	if (state->nr == STOP_MAX_THREADS)
		return -CTG_ENOMEM;
	if (ptrace(PTRACE_SEIZE, tid, NULL, NULL) != 0) {
		int ret = errno == EPERM ? -CTG_EPERM : -CTG_EBUSY;

		/* A thread that has ended but is still listed is refused, too. */
		return errno == ESRCH || thread_over(pid, tid) ? 0 : ret;
	}
	ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
	state->thread[state->nr++] = (struct stop_thread){.pid = pid, .tid = tid};
	return 1;
}

/* As thread_seize. One that was to leave, and has not stopped so far, stays. */
static int thread_take(struct stop_state *state, pid_t pid, pid_t tid)
{
	struct stop_thread *thread = thread_find(state, tid);

	if (thread == NULL)
		return thread_seize(state, pid, tid);
	if (!thread->leaving || thread_over(pid, tid))
		return 0;
	thread->leaving = false;
	return 1;
}

static int open_tasks(pid_t pid)
{
	char path[TASK_PATH];

	put_tasks(path, pid);
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
			if (keep)
				continue;
			ret = thread_take(state, command->pid, tid);
			*found += ret > 0;
			ret = ret < 0 ? ret : 0;
		}
	}
	close(fd);
	return ret;
}

/* How many of the process's threads still run. */
static unsigned count_running(struct stop_state *state, pid_t pid, bool *asleep)
{
	unsigned running = 0;

	for (uint32_t i = 0; i < state->nr; i++) {
		struct stop_thread *thread = &state->thread[i];

		if (thread->pid != pid || thread->tid == 0 || thread->stopped || thread->leaving)
			continue;
		thread_poll(thread);
		if (thread->tid == 0 || thread->stopped)
			continue;
		running++;
		if (asleep != NULL)
			*asleep = *asleep || thread_state(pid, thread->tid) == 'D';
	}
	return running;
}

/*
 * A thread that sleeps where nothing interrupts it may do so for long (in vfork: until its child,
 * which writes to the same memory, has become another program), and the others are stopped
 * meanwhile.
 */
static int wait_stopped(struct stop_state *state, pid_t pid, uint64_t deadline)
{
	uint64_t patience = deadline - STOP_TIMEOUT_NS + STOP_ASLEEP_NS;
	bool asleep = false;

	while (count_running(state, pid, NULL) > 0) {
		if (stop_wait(stop_now() < patience ? patience : deadline))
			continue;
		asleep = false;
		if (count_running(state, pid, &asleep) > 0 && (asleep || stop_now() >= deadline))
			return -CTG_EBUSY;
	}
	return 0;
}

/* A thread that has not been seized yet may start others: look until there are no new ones. */
static int process_stop(struct stop_state *state, const struct stop_command *command)
{
	uint64_t deadline = stop_now() + STOP_TIMEOUT_NS;
	unsigned found = 1;
	int ret = 0;

	for (uint32_t i = 0; i < state->nr; i++)
		if (state->thread[i].pid == command->pid && !state->thread[i].leaving)
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

static void on_child(int signal)
{
	(void)signal;
}

static void stopper_main(struct stop_state *state)
{
	struct sigaction action = {.sa_handler = on_child};
	struct stop_command command;
	sigset_t all, child;

	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	sigaction(SIGCHLD, &action, NULL);
	child = all;
	sigdelset(&child, SIGCHLD);
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

		/* A report that comes after the look interrupts the wait. */
		if (ppoll(&p, 1, NULL, let_leave(state) ? &child : &all) <= 0)
			continue;
		n = recv(state->fd, &command, sizeof(command), 0);
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

/* ---- the parent -------------------------------------------------------------------------- */

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
