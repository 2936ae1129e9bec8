/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "borrower.h"
#include "proto.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHUNK ((size_t)2 << 20)
#define PAGE 4096
#define WRITERS 3

static char *window;
static int call_fd = -1, agent_fd = -1, files[POSIX_NR_FILES] = {-1, -1};
static pid_t agent_tid;
static uint64_t last_done;
static atomic_uint hints;
static atomic_bool lie, mute, deaf, calm;
static pthread_mutex_t hint_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t hint_come = PTHREAD_COND_INITIALIZER;

/* ---- the process: its agent ---------------------------------------------------------------- */

static void obey(const struct proto_command *command, size_t nr, struct proto_ack *ack)
{
	size_t i = 0;

	ack->seq = command->seq;
	ack->error = 0;
	while (i < nr) {
		int err = 0;

		if (command->op[i].kind == POSIX_OP_HINT) {
			pthread_mutex_lock(&hint_lock);
			hints++;
			pthread_cond_broadcast(&hint_come);
			pthread_mutex_unlock(&hint_lock);
		} else if (posix_ops_execute(files, &command->op[i], 1, &err) != 1) {
			ack->error = err;
			break;
		}
		i++;
	}
	ack->done = (int)i;
}

static void *agent(void *arg)
{
	static struct proto_command command;
	const size_t head = offsetof(struct proto_command, op);
	struct proto_ack ack;
	ssize_t n;

	agent_tid = (pid_t)syscall(SYS_gettid);
	pthread_barrier_wait(arg);
	while (__atomic_load_n(&agent_fd, __ATOMIC_ACQUIRE) < 0)
		usleep(100);
	while ((n = recv(agent_fd, &command, sizeof(command), 0)) >= (ssize_t)head) {
		while (deaf)
			pause();
		if (mute) {
			shutdown(agent_fd, SHUT_RDWR);
			break;
		}
		obey(&command, ((size_t)n - head) / sizeof(command.op[0]), &ack);
		if (lie)
			ack.seq += 7;
		if (send(agent_fd, &ack, sizeof(ack), MSG_NOSIGNAL) != sizeof(ack))
			break;
	}
	return NULL;
}

/* ---- the process: shaking hands ------------------------------------------------------------ */

static int dial(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);

	strcpy(address.sun_path, path);
	if (connect(fd, (const struct sockaddr *)&address, sizeof(address)) != 0)
		exit(120);
	return fd;
}

/* Send with a descriptor (or -1), or receive with at most two. */
static ssize_t message(int fd, void *data, size_t size, bool out, int *fds, size_t nr)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(2 * sizeof(int))];
	} control = {0};
	struct iovec iov = {.iov_base = data, .iov_len = size};
	struct msghdr header = {.msg_iov = &iov, .msg_iovlen = 1};
	struct cmsghdr *head;
	ssize_t n;

	if (nr != 0) {
		header.msg_control = control.bytes;
		header.msg_controllen = CMSG_SPACE(nr * sizeof(int));
		head = CMSG_FIRSTHDR(&header);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(nr * sizeof(int));
		if (out)
			memcpy(CMSG_DATA(head), fds, nr * sizeof(int));
	}
	if (out)
		return sendmsg(fd, &header, MSG_NOSIGNAL);
	n = recvmsg(fd, &header, MSG_CMSG_CLOEXEC);
	head = CMSG_FIRSTHDR(&header);
	if (n > 0 && head != NULL)
		memcpy(fds, CMSG_DATA(head), head->cmsg_len - CMSG_LEN(0));
	return n;
}

static void shake_hands(const char *path)
{
	struct proto_hello hello = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.role = PROTO_CALL,
		.window = (uint64_t)(uintptr_t)window,
		.window_bytes = BORROWER_CHUNKS * CHUNK,
		.agent_tids = {agent_tid, agent_tid},
	};
	struct proto_welcome welcome;
	bool kernel = false;
	int uffd, fd;

	call_fd = dial(path);
	if (message(call_fd, &hello, sizeof(hello), true, NULL, 0) != sizeof(hello) ||
		message(call_fd, &welcome, sizeof(welcome), false, files, 2) != sizeof(welcome) ||
		welcome.error != 0)
		exit(121);
	if (welcome.stopper_pid > 0)
		prctl(PR_SET_PTRACER, welcome.stopper_pid);
	uffd = posix_uffd_open(&kernel);
	hello.role = PROTO_AGENT;
	hello.session = welcome.session;
	hello.kernel_faults = uffd >= 0 && kernel;
	fd = dial(path);
	if (message(fd, &hello, sizeof(hello), true, &uffd, hello.kernel_faults ? 1 : 0) !=
		sizeof(hello))
		exit(122);
	if (uffd >= 0)
		close(uffd);
	__atomic_store_n(&agent_fd, fd, __ATOMIC_RELEASE);
}

static long request(uint32_t kind, uint64_t addr, uint64_t bytes)
{
	struct proto_request r = {.kind = kind, .addr = addr, .bytes = bytes};
	struct proto_reply reply;

	if (send(call_fd, &r, sizeof(r), MSG_NOSIGNAL) != sizeof(r) ||
		recv(call_fd, &reply, sizeof(reply), 0) != sizeof(reply))
		return -EPIPE;
	last_done = reply.done / CHUNK;
	return reply.error;
}

/* ---- the process: using memory ------------------------------------------------------------- */

static uint64_t pattern(size_t i, uint64_t seed)
{
	return (i + 1) * 0x9e3779b97f4a7c15ull ^ seed;
}

static long fill(size_t a, size_t n, uint64_t seed, bool check)
{
	uint64_t *word = (uint64_t *)(void *)(window + a * CHUNK);

	for (size_t i = 0; i < n * CHUNK / sizeof(*word); i += 64) {
		if (!check)
			word[i] = pattern(i, seed);
		else if (word[i] != pattern(i, seed))
			return 0;
	}
	return 1;
}

/* A writer has one word in every page, which only it changes, and knows what it must be. */
struct writer {
	pthread_t thread;
	size_t a, n;
	unsigned i;
	bool lost;
};
static struct writer writers[WRITERS];

static void *writer_main(void *arg)
{
	struct writer *w = arg;
	size_t pages = w->n * CHUNK / PAGE;
	uint64_t *expected = calloc(pages, sizeof(*expected));
	size_t at = w->i * 37;

	for (size_t i = 0; i < pages; i++) {
		volatile uint64_t *word =
			(uint64_t *)(void *)(window + w->a * CHUNK + i * PAGE) + 8 + w->i;
		expected[i] = *word;
	}
	while (!calm) {
		volatile uint64_t *word;

		at = (at * 5 + 12345) % pages;
		word = (uint64_t *)(void *)(window + w->a * CHUNK + at * PAGE) + 8 + w->i;
		if (*word != expected[at])
			w->lost = true;
		*word = ++expected[at];
	}
	for (size_t i = 0; i < pages; i++) {
		volatile uint64_t *word =
			(uint64_t *)(void *)(window + w->a * CHUNK + i * PAGE) + 8 + w->i;
		if (*word != expected[i])
			w->lost = true;
	}
	free(expected);
	return NULL;
}

static long churn(size_t a, size_t n)
{
	calm = false;
	for (unsigned i = 0; i < WRITERS; i++) {
		writers[i] = (struct writer){.a = a, .n = n, .i = i};
		pthread_create(&writers[i].thread, NULL, writer_main, &writers[i]);
	}
	return 0;
}

static long calm_down(void)
{
	long kept = 1;

	calm = true;
	for (unsigned i = 0; i < WRITERS; i++) {
		pthread_join(writers[i].thread, NULL);
		if (writers[i].lost)
			kept = 0;
	}
	return kept;
}

static long await_hint(void)
{
	pthread_mutex_lock(&hint_lock);
	while (hints == 0)
		pthread_cond_wait(&hint_come, &hint_lock);
	hints = 0;
	pthread_mutex_unlock(&hint_lock);
	return 0;
}

static long nonsense(size_t size)
{
	static char junk[65536];
	struct proto_reply reply;

	memset(junk, 0x5a, sizeof(junk));
	if (send(call_fd, junk, size, MSG_NOSIGNAL) != (ssize_t)size)
		return -errno;
	return recv(call_fd, &reply, sizeof(reply), 0);
}

/* The child keeps this thread waiting and shares its memory until stdin ends. */
static void *vfork_main(void *arg)
{
	char byte;

	if (vfork() == 0) {
		/* The other end says when; the parent's death does not matter. */
		while (read(*(int *)arg, &byte, 1) > 0)
			;
		_exit(0);
	}
	return NULL;
}

static long leave_child(void)
{
	static int in = STDIN_FILENO;
	pthread_t thread;

	pthread_create(&thread, NULL, vfork_main, &in);
	pthread_detach(thread);
	usleep(100000);
	return 0;
}

static long spoil(atomic_bool *how)
{
	*how = true;
	return 0;
}

static long carry_out(const char *line)
{
	char verb[16] = "";
	unsigned long a = 0, n = 0, s = 0;
	uint64_t at;

	sscanf(line, "%15s %lu %lu %lu", verb, &a, &n, &s);
	at = (uint64_t)(uintptr_t)window + a * CHUNK;
	if (strcmp(verb, "map") == 0)
		return request(PROTO_MAP, at, n * CHUNK);
	if (strcmp(verb, "unmap") == 0)
		return request(PROTO_UNMAP, at, n * CHUNK);
	if (strcmp(verb, "privatise") == 0)
		return request(PROTO_PRIVATISE, at, n * CHUNK);
	if (strcmp(verb, "lend") == 0)
		return request(PROTO_LEND, at, n * CHUNK);
	if (strcmp(verb, "count") == 0)
		return request(PROTO_COUNT, a, n);
	if (strcmp(verb, "done") == 0)
		return (long)last_done;
	if (strcmp(verb, "fill") == 0)
		return fill(a, n, s, false);
	if (strcmp(verb, "check") == 0)
		return fill(a, n, s, true);
	if (strcmp(verb, "churn") == 0)
		return churn(a, n);
	if (strcmp(verb, "calm") == 0)
		return calm_down();
	if (strcmp(verb, "hint") == 0)
		return await_hint();
	if (strcmp(verb, "request") == 0)
		return nonsense(a);
	if (strcmp(verb, "ack") == 0)
		return spoil(&lie);
	if (strcmp(verb, "mute") == 0)
		return spoil(&mute);
	if (strcmp(verb, "deaf") == 0)
		return spoil(&deaf);
	if (strcmp(verb, "vfork") == 0)
		return leave_child();
	if (strcmp(verb, "exec") == 0)
		execlp("cat", "cat", (char *)NULL);
	return -EINVAL;
}

int borrower_main(const char *name)
{
	const int prot = PROT_NONE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
	char path[256], line[128];
	pthread_barrier_t barrier;
	pthread_t thread;

	/* Nobody is left to kill it if the test dies. */
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	window = mmap(NULL, (BORROWER_CHUNKS + 1) * CHUNK, prot, flags, -1, 0);
	if (window == MAP_FAILED || posix_socket_path(name, path, sizeof(path)) != 0)
		return 123;
	window = (char *)(((uintptr_t)window + CHUNK - 1) & ~(CHUNK - 1));
	pthread_barrier_init(&barrier, NULL, 2);
	pthread_create(&thread, NULL, agent, &barrier);
	pthread_detach(thread);
	pthread_barrier_wait(&barrier);
	shake_hands(path);
	/* What comes after "exec" is for the next program. */
	setvbuf(stdin, NULL, _IONBF, 0);
	printf("0\n");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin) != NULL) {
		printf("%ld\n", carry_out(line));
		fflush(stdout);
	}
	_exit(0);
}

/* ---- the test's side ----------------------------------------------------------------------- */

static void broken(const char *what)
{
	fprintf(stderr, "borrower: %s: %s\n", what, strerror(errno));
	abort();
}

void borrower_start(struct borrower *b, const char *name)
{
	char *const argv[] = {"borrower", "borrower", (char *)(uintptr_t)name, NULL};
	posix_spawn_file_actions_t actions;
	int in[2], out[2];

	if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0)
		broken("pipe");
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
	posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
	if (posix_spawn(&b->pid, "/proc/self/exe", &actions, NULL, argv, environ) != 0)
		broken("spawn");
	posix_spawn_file_actions_destroy(&actions);
	close(in[0]);
	close(out[1]);
	b->in = in[1];
	b->out = out[0];
	if (borrower_answer(b) != 0)
		broken("start");
}

static void tell(struct borrower *b, const char *format, va_list args)
{
	char line[128];
	int n = vsnprintf(line, sizeof(line) - 1, format, args);

	line[n++] = '\n';
	if (write(b->in, line, (size_t)n) != n)
		broken("write");
}

void borrower_tell(struct borrower *b, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	tell(b, format, args);
	va_end(args);
}

long borrower_answer(struct borrower *b)
{
	char line[32];
	size_t n = 0;

	while (n < sizeof(line) - 1) {
		ssize_t got = read(b->out, line + n, 1);

		if (got <= 0)
			return LONG_MIN;
		if (line[n++] == '\n')
			break;
	}
	line[n] = '\0';
	return strtol(line, NULL, 10);
}

long borrower_do(struct borrower *b, const char *format, ...)
{
	va_list args;

	va_start(args, format);
	tell(b, format, args);
	va_end(args);
	return borrower_answer(b);
}

void borrower_kill(struct borrower *b)
{
	kill(b->pid, SIGKILL);
}

void borrower_end(struct borrower *b)
{
	int status;

	close(b->in);
	if (waitpid(b->pid, &status, 0) != b->pid && errno != ECHILD)
		broken("wait");
	close(b->out);
}
