/* SPDX-License-Identifier: MIT */
/*
 * The stopper, on processes with threads that count, sleep in system calls, come and go, are being
 * stopped or traced by others, or die.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "region.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/* The thread sanitizer delays signals and makes a fork of a vfork: what is tested here is not
 * there. */
#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#endif
#endif
#ifndef THREAD_SANITIZER
#define THREAD_SANITIZER 0
#endif

#define THREADS 6

/* What a victim process shows of itself. */
struct shown {
	uint64_t count[THREADS];
	uint64_t churned; /* threads that have come and gone */
	uint64_t signals;
	uint64_t bytes; /* read by the one that sleeps in read(2) */
	int32_t tid[THREADS];
	uint32_t quit;
};

static struct shown *shown;
static struct posix_stopper *stopper;
static const pid_t nobody[4];
static int pipe_fd[2];

static uint64_t now(void)
{
	return posix_now(NULL);
}

static bool eventually(const uint64_t *word, uint64_t beyond)
{
	uint64_t end = now() + UINT64_C(10000000000);

	while (__atomic_load_n(word, __ATOMIC_ACQUIRE) <= beyond) {
		if (now() > end)
			return false;
		sched_yield();
	}
	return true;
}

/* ---- victims ----------------------------------------------------------------------------- */

static void *count_main(void *arg)
{
	uint64_t *count = arg;

	__atomic_store_n(
		&shown->tid[count - shown->count], (int32_t)posix_gettid(), __ATOMIC_RELEASE);
	for (;;)
		__atomic_add_fetch(count, 1, __ATOMIC_RELEASE);
	return NULL;
}

static void *gone_main(void *arg)
{
	return arg;
}

static void *churn_main(void *arg)
{
	(void)arg;
	for (;;) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, gone_main, NULL) == 0) {
			pthread_join(thread, NULL);
			__atomic_add_fetch(&shown->churned, 1, __ATOMIC_RELEASE);
		}
	}
	return NULL;
}

static void *read_main(void *arg)
{
	(void)arg;
	for (;;) {
		char byte;

		/* A system call that is interrupted must be restarted, not fail. */
		if (read(pipe_fd[0], &byte, 1) != 1)
			abort();
		__atomic_add_fetch(&shown->bytes, 1, __ATOMIC_RELEASE);
	}
	return NULL;
}

static void on_signal(int signal)
{
	(void)signal;
	__atomic_add_fetch(&shown->signals, 1, __ATOMIC_RELEASE);
}

static void victim_main(bool churn)
{
	pthread_t thread;

	signal(SIGUSR1, on_signal);
	signal(SIGRTMIN, on_signal);
	for (int i = 0; i < 2; i++)
		pthread_create(&thread, NULL, count_main, &shown->count[i]);
	pthread_create(&thread, NULL, read_main, NULL);
	if (churn)
		pthread_create(&thread, NULL, churn_main, NULL);
	for (;;)
		pause();
}

static pid_t victim(bool churn)
{
	pid_t pid;

	memset(shown, 0, sizeof(*shown));
	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		prctl(PR_SET_PTRACER, (unsigned long)posix_stopper_pid(stopper), 0, 0, 0);
		victim_main(churn);
	}
	assert_true(pid > 0);
	assert_true(eventually(&shown->count[0], 0) && eventually(&shown->count[1], 0));
	return pid;
}

static void end(pid_t pid)
{
	int status;

	kill(pid, SIGKILL);
	assert_int_equal(waitpid(pid, &status, 0), pid);
	assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
}

static void assert_still(void)
{
	uint64_t before[2] = {shown->count[0], shown->count[1]};

	for (int i = 0; i < 2000; i++)
		sched_yield();
	assert_int_equal(__atomic_load_n(&shown->count[0], __ATOMIC_ACQUIRE), before[0]);
	assert_int_equal(__atomic_load_n(&shown->count[1], __ATOMIC_ACQUIRE), before[1]);
}

static void assert_running(void)
{
	for (int i = 0; i < 2; i++)
		assert_true(eventually(
			&shown->count[i], __atomic_load_n(&shown->count[i], __ATOMIC_ACQUIRE)));
}

static int setup(void **state)
{
	(void)state;
	shown = mmap(
		NULL, sizeof(*shown), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (shown == MAP_FAILED || pipe2(pipe_fd, O_CLOEXEC) != 0)
		return -1;
	return posix_stopper_start(&stopper);
}

static int teardown(void **state)
{
	(void)state;
	posix_stopper_end(stopper);
	stopper = NULL;
	close(pipe_fd[0]);
	close(pipe_fd[1]);
	munmap(shown, sizeof(*shown));
	return 0;
}

/* ---- cases ------------------------------------------------------------------------------- */

static void test_stop_and_resume(void **state)
{
	pid_t pid = victim(false);

	(void)state;
	for (int i = 0; i < 50; i++) {
		assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
		if (i < 5)
			assert_still();
		posix_stopper_resume(stopper, pid);
		if (i < 5)
			assert_running();
	}
	/* Twice is once, and resuming what is not stopped is nothing. */
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
	assert_still();
	posix_stopper_resume(stopper, pid);
	posix_stopper_resume(stopper, pid);
	assert_running();
	end(pid);
}

static void test_system_calls_are_restarted(void **state)
{
	pid_t pid = victim(false);

	(void)state;
	for (uint64_t i = 0; i < 50; i++) {
		assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
		assert_int_equal(write(pipe_fd[1], "x", 1), 1);
		if (i < 3) {
			for (int k = 0; k < 200; k++)
				sched_yield();
			assert_int_equal(shown->bytes, i);
		}
		posix_stopper_resume(stopper, pid);
		assert_true(eventually(&shown->bytes, i));
	}
	end(pid);
}

static void test_kept_threads_go_on(void **state)
{
	pid_t pid = victim(false);
	pid_t keep[4] = {shown->tid[1], 0, 0, 0};
	uint64_t before;

	(void)state;
	assert_int_equal(posix_stopper_stop(stopper, pid, keep), 0);
	before = __atomic_load_n(&shown->count[0], __ATOMIC_ACQUIRE);
	assert_true(eventually(&shown->count[1], shown->count[1]));
	assert_int_equal(__atomic_load_n(&shown->count[0], __ATOMIC_ACQUIRE), before);
	posix_stopper_resume(stopper, pid);
	assert_running();
	end(pid);
}

/* Threads that start others while they are being stopped. */
static void test_threads_come_and_go(void **state)
{
	pid_t pid = victim(true);

	(void)state;
	assert_true(eventually(&shown->churned, 10));
	for (int i = 0; i < 100; i++) {
		uint64_t before;

		assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
		before = __atomic_load_n(&shown->churned, __ATOMIC_ACQUIRE);
		if (i < 5)
			assert_still();
		assert_int_equal(__atomic_load_n(&shown->churned, __ATOMIC_ACQUIRE), before);
		posix_stopper_resume(stopper, pid);
	}
	assert_true(eventually(&shown->churned, shown->churned));
	end(pid);
}

static void test_signals_arrive_afterwards(void **state)
{
	pid_t pid = victim(false);
	uint64_t sent = 0;

	(void)state;
	for (int i = 0; i < 50; i++) {
		/* One before, which may be on its way while the threads stop, and one while they
		 * are. */
		uint64_t seen = __atomic_load_n(&shown->signals, __ATOMIC_ACQUIRE);

		kill(pid, SIGUSR1);
		assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
		kill(pid, SIGUSR1);
		posix_stopper_resume(stopper, pid);
		sent += 2;
		assert_true(eventually(&shown->signals, seen));
	}
	assert_true(shown->signals > 50 && shown->signals <= sent);
	end(pid);
}

static void *signal_main(void *arg)
{
	const pid_t *pid = arg;
	uint64_t sent = 0;

	while (__atomic_load_n(&shown->quit, __ATOMIC_ACQUIRE) == 0) {
		/* Queued, so each is delivered; refused when the queue is full. */
		if (sigqueue(*pid, SIGRTMIN, (union sigval){0}) == 0)
			sent++;
		if (sent > __atomic_load_n(&shown->signals, __ATOMIC_ACQUIRE) + 500)
			sched_yield();
	}
	return (void *)(uintptr_t)sent;
}

/* A signal on its way when a thread stops is delivered when it goes on: none is lost. */
static void test_no_signal_is_lost(void **state)
{
	pid_t pid = victim(false);
	pthread_t thread;
	void *sent;

	(void)state;
	assert_int_equal(pthread_create(&thread, NULL, signal_main, &pid), 0);
	for (int i = 0; i < 1000; i++) {
		assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
		posix_stopper_resume(stopper, pid);
	}
	__atomic_store_n(&shown->quit, 1, __ATOMIC_RELEASE);
	pthread_join(thread, &sent);
	assert_true((uintptr_t)sent > 1000);
	assert_true(eventually(&shown->signals, (uintptr_t)sent - 1));
	assert_int_equal(shown->signals, (uintptr_t)sent);
	end(pid);
}

static char process_state(pid_t pid)
{
	char path[64], text[256] = "", *at;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
	fd = open(path, O_RDONLY);
	assert_true(fd >= 0);
	assert_true(read(fd, text, sizeof(text) - 1) > 0);
	close(fd);
	at = strrchr(text, ')');
	assert_non_null(at);
	return at[2];
}

/* Job control is not undone by a take-back in between. */
static void test_stopped_by_a_signal_before(void **state)
{
	pid_t pid = victim(false);
	int status;

	(void)state;
	kill(pid, SIGSTOP);
	assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
	posix_stopper_resume(stopper, pid);
	assert_still();
	assert_int_equal(process_state(pid), 'T');
	kill(pid, SIGCONT);
	assert_running();
	end(pid);
}

static void test_stopped_by_a_signal_meanwhile(void **state)
{
	pid_t pid = victim(false);
	int status;

	(void)state;
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
	kill(pid, SIGSTOP);
	posix_stopper_resume(stopper, pid);
	assert_int_equal(waitpid(pid, &status, WUNTRACED), pid);
	assert_true(WIFSTOPPED(status));
	assert_still();
	kill(pid, SIGCONT);
	assert_running();
	end(pid);
}

/* Its parent hears of its end although it was stopped when it was killed. */
static void test_killed_while_stopped(void **state)
{
	(void)state;
	for (int i = 0; i < 5; i++) {
		pid_t pid = victim(i & 1);

		assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
		kill(pid, SIGKILL);
		posix_stopper_resume(stopper, pid);
		end(pid);
	}
}

static void test_gone(void **state)
{
	pid_t pid = victim(false);

	(void)state;
	end(pid);
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), -CTG_ENOENT);
	posix_stopper_resume(stopper, pid);
}

static void test_traced_by_somebody_else(void **state)
{
	pid_t pid = victim(false);

	(void)state;
	assert_int_equal(ptrace(PTRACE_SEIZE, pid, NULL, NULL), 0);
	assert_true(posix_stopper_stop(stopper, pid, nobody) < 0);
	assert_running();
	assert_int_equal(ptrace(PTRACE_INTERRUPT, pid, NULL, NULL), 0);
	assert_int_equal(waitpid(pid, NULL, __WALL), pid);
	assert_int_equal(ptrace(PTRACE_DETACH, pid, NULL, NULL), 0);
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), 0);
	assert_still();
	posix_stopper_resume(stopper, pid);
	end(pid);
}

/* A thread in vfork sleeps until its child execs, and the child has the same memory: refused. */
static void test_vfork_parent_is_refused(void **state)
{
	uint64_t begun;
	int status;
	pid_t pid;

	(void)state;
	memset(shown, 0, sizeof(*shown));
	fflush(NULL);
	pid = fork();
	if (pid == 0) {
		pthread_t thread;

		prctl(PR_SET_PTRACER, (unsigned long)posix_stopper_pid(stopper), 0, 0, 0);
		for (int i = 0; i < 2; i++)
			pthread_create(&thread, NULL, count_main, &shown->count[i]);
		if (vfork() == 0) {
			shown->tid[5] = 1;
			while (__atomic_load_n(&shown->quit, __ATOMIC_ACQUIRE) == 0)
				syscall(SYS_sched_yield);
			_exit(0);
		}
		for (;;)
			pause();
	}
	assert_true(eventually(&shown->count[0], 0));
	while (__atomic_load_n(&shown->tid[5], __ATOMIC_ACQUIRE) == 0)
		sched_yield();
	begun = now();
	assert_int_equal(posix_stopper_stop(stopper, pid, nobody), -CTG_EBUSY);
	print_message("refused after %llu ms\n", (unsigned long long)((now() - begun) / 1000000));
	assert_running();
	__atomic_store_n(&shown->quit, 1, __ATOMIC_RELEASE);
	while ((status = posix_stopper_stop(stopper, pid, nobody)) == -CTG_EBUSY)
		sched_yield();
	assert_int_equal(status, 0);
	posix_stopper_resume(stopper, pid);
	end(pid);
}

static void test_several_at_once(void **state)
{
	pid_t first = victim(false), second;
	struct shown *of_first = shown;

	(void)state;
	shown = mmap(
		NULL, sizeof(*shown), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	assert_ptr_not_equal(shown, MAP_FAILED);
	second = victim(false);
	assert_int_equal(posix_stopper_stop(stopper, first, nobody), 0);
	assert_running();
	assert_int_equal(posix_stopper_stop(stopper, second, nobody), 0);
	assert_still();
	posix_stopper_resume(stopper, second);
	assert_running();
	end(second);
	munmap(shown, sizeof(*shown));
	shown = of_first;
	assert_still();
	posix_stopper_resume(stopper, first);
	assert_running();
	end(first);
}

/* Whatever becomes of the stopper, what it has stopped goes on, and its users get an error. */
static void test_stopper_dies(void **state)
{
	struct posix_stopper *own;
	pid_t pid = victim(false);

	(void)state;
	assert_int_equal(posix_stopper_start(&own), 0);
	assert_int_equal(posix_stopper_stop(own, pid, nobody), 0);
	assert_still();
	kill(posix_stopper_pid(own), SIGKILL);
	assert_running();
	assert_int_equal(posix_stopper_stop(own, pid, nobody), -CTG_EBUSY);
	posix_stopper_resume(own, pid);
	posix_stopper_end(own);
	assert_running();
	end(pid);
}

static void test_stopper_ends_with_its_user(void **state)
{
	struct posix_stopper *own;
	pid_t pid = victim(false);

	(void)state;
	assert_int_equal(posix_stopper_start(&own), 0);
	assert_int_equal(posix_stopper_stop(own, pid, nobody), 0);
	posix_stopper_end(own);
	assert_running();
	end(pid);
}

/* It keeps nothing of ours open, and meets none of the program's waits for its children. */
static void test_stopper_is_discreet(void **state)
{
	char path[64];
	unsigned n = 0;
	DIR *dir;

	(void)state;
	/* It has answered once, so it has closed what it had. */
	posix_stopper_resume(stopper, getpid());
	snprintf(path, sizeof(path), "/proc/%d/fd", (int)posix_stopper_pid(stopper));
	dir = opendir(path);
	assert_non_null(dir);
	for (struct dirent *entry; (entry = readdir(dir)) != NULL;)
		n += entry->d_name[0] != '.';
	closedir(dir);
	assert_int_equal(n, 1);
	assert_int_equal(waitpid(-1, NULL, WNOHANG), -1);
	assert_int_equal(errno, ECHILD);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_stop_and_resume),
		cmocka_unit_test(test_system_calls_are_restarted),
		cmocka_unit_test(test_kept_threads_go_on),
		cmocka_unit_test(test_threads_come_and_go),
		cmocka_unit_test(test_signals_arrive_afterwards),
		cmocka_unit_test(test_no_signal_is_lost),
		cmocka_unit_test(test_stopped_by_a_signal_before),
		cmocka_unit_test(test_stopped_by_a_signal_meanwhile),
		cmocka_unit_test(test_killed_while_stopped),
		cmocka_unit_test(test_gone),
		cmocka_unit_test(test_traced_by_somebody_else),
		cmocka_unit_test(test_vfork_parent_is_refused),
		cmocka_unit_test(test_several_at_once),
		cmocka_unit_test(test_stopper_dies),
		cmocka_unit_test(test_stopper_ends_with_its_user),
		cmocka_unit_test(test_stopper_is_discreet),
	};

	if (THREAD_SANITIZER) {
		print_message("skipped: not under the thread sanitizer\n");
		return 77;
	}
	return cmocka_run_group_tests(tests, setup, teardown);
}
