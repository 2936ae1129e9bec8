/* SPDX-License-Identifier: MIT */
/*
 * The agents: two threads of the program's process that libc knows nothing of.
 *
 * They are made with clone and without libc, so that a program that counts its threads, closes
 * every descriptor or changes its signal masks neither sees them nor harms them: their table of
 * descriptors is their own, every signal is blocked in them, and they are not in libc's lists.
 * Their thread pointer is that of the thread that made them, which may be gone: no thread-local
 * storage (errno, stack protector) and no libc function that has any.
 *
 * The first carries out the server's commands: mappings in this address space. The second carries
 * the program's requests, and lends private chunks when nobody waits.
 *
 * What the program does to all of its threads by way of libc passes the agents by: after setuid()
 * they go on with the old identity until interpose.c tells them.
 */
#define _GNU_SOURCE
#include "link.h"
#include "window.h"
#include <errno.h>
#include <linux/capability.h>
#include <linux/close_range.h>
#include <linux/sched.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>

#define AGENT_STACK ((size_t)64 << 10)
#define AGENT_GUARD ((size_t)64 << 10) /* a page of any size */
#define AGENT_FLAGS (CLONE_VM | CLONE_FS | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM)
#define HANDSHAKE_SECONDS 5
#define AGENT_NOBODY 65534

/* clone(2) with a function to run: the new thread calls fn(0) on its own stack and exits. */
long agent_clone(unsigned long flags, void *stack_top, void (*fn)(void));

#if defined(__x86_64__)
__asm__(".text\n"
	".globl agent_clone\n"
	".hidden agent_clone\n"
	".type agent_clone, @function\n"
	"agent_clone:\n"
	"	endbr64\n"
	"	mov %rdx, %r9\n" /* fn: clone does not look at the sixth argument */
	"	xor %edx, %edx\n"
	"	xor %r10d, %r10d\n"
	"	xor %r8d, %r8d\n"
	"	mov $56, %eax\n"
	"	syscall\n"
	"	test %rax, %rax\n"
	"	jz 1f\n"
	"	ret\n"
	"1:	xor %ebp, %ebp\n"
	"	call *%r9\n"
	"	xor %edi, %edi\n"
	"	mov $60, %eax\n"
	"	syscall\n"
	"	hlt\n"
	".size agent_clone, .-agent_clone\n");
#elif defined(__aarch64__)
__asm__(".text\n"
	".globl agent_clone\n"
	".hidden agent_clone\n"
	".type agent_clone, %function\n"
	"agent_clone:\n"
	"	mov x9, x2\n"
	"	mov x2, xzr\n"
	"	mov x3, xzr\n"
	"	mov x4, xzr\n"
	"	mov x8, #220\n"
	"	svc 0\n"
	"	cbz x0, 1f\n"
	"	ret\n"
	"1:	mov x29, xzr\n"
	"	mov x30, xzr\n"
	"	blr x9\n"
	"	mov x0, xzr\n"
	"	mov x8, #93\n"
	"	svc 0\n"
	"	brk #1\n"
	".size agent_clone, .-agent_clone\n");
#endif

static struct link *const l = &link_to_server;

/* 64 bits of signal set, as the kernel has it. */
static uint64_t agent_block_signals(uint64_t mask)
{
	uint64_t old = 0;

	raw4(SYS_rt_sigprocmask, 2 /* SIG_SETMASK */, (long)&mask, (long)&old, sizeof(old));
	return old;
}

static void agent_set_state(enum link_state state)
{
	__atomic_store_n(&l->state, (uint32_t)state, __ATOMIC_SEQ_CST);
	raw_futex_wake(&l->state, INT32_MAX);
}

static void agent_set_name(void)
{
	raw2(SYS_prctl, PR_SET_NAME, (long)"contig-agent");
}

/*
 * Become nobody, without capabilities but for the one that lets memory be mapped where a program of
 * root has locked all of its memory. Only root can give up something here. Changing the user makes
 * the whole process undumpable, which must not be seen.
 */
static void agent_drop_rights(void)
{
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct data[2];
	long dumpable = raw1(SYS_prctl, PR_GET_DUMPABLE), uid = raw1(SYS_geteuid, 0);

	if (uid == 0) {
		raw2(SYS_prctl, PR_SET_KEEPCAPS, 1);
		raw2(SYS_setgroups, 0, 0);
		raw3(SYS_setresgid, AGENT_NOBODY, AGENT_NOBODY, AGENT_NOBODY);
		raw3(SYS_setresuid, AGENT_NOBODY, AGENT_NOBODY, AGENT_NOBODY);
	}
	if (raw2(SYS_capget, (long)&head, (long)data) == 0) {
		data[0].permitted &= 1u << CAP_IPC_LOCK;
		data[0].effective = data[0].permitted;
		data[0].inheritable = 0;
		data[1].permitted = data[1].effective = data[1].inheritable = 0;
		raw2(SYS_capset, (long)&head, (long)data);
	}
	if (uid == 0 && dumpable == 1)
		raw2(SYS_prctl, PR_SET_DUMPABLE, 1);
}

/* ---- the wire ---- */

static long agent_send(int fd, const void *data, size_t bytes, int descriptor)
{
	union {
		char space[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {{0}};
	struct iovec iov = {(void *)(uintptr_t)data, bytes};
	struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
	long ret;

	if (descriptor >= 0) {
		struct cmsghdr *cmsg;

		msg.msg_control = control.space;
		msg.msg_controllen = sizeof(control.space);
		cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(cmsg), &descriptor, sizeof(int));
	}
	do {
		ret = raw3(SYS_sendmsg, fd, (long)&msg, MSG_NOSIGNAL);
	} while (ret == -EINTR);
	return ret;
}

static long agent_recv(int fd, void *data, size_t bytes)
{
	long ret;

	do {
		ret = raw6(SYS_recvfrom, fd, (long)data, (long)bytes, 0, 0, 0);
	} while (ret == -EINTR);
	return ret;
}

static int agent_socket(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval limit = {HANDSHAKE_SECONDS, 0};
	long fd = raw3(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	long ret;

	if (fd < 0)
		return (int)fd;
	memcpy(address.sun_path, l->path, sizeof(address.sun_path));
	/* A server that is stopped must not stop the program for good: connect waits for it. */
	raw6(SYS_setsockopt, fd, SOL_SOCKET, SO_SNDTIMEO, (long)&limit, sizeof(limit), 0);
	raw6(SYS_setsockopt, fd, SOL_SOCKET, SO_RCVTIMEO, (long)&limit, sizeof(limit), 0);
	do {
		ret = raw3(SYS_connect, fd, (long)&address, sizeof(address));
	} while (ret == -EINTR);
	if (ret < 0) {
		raw1(SYS_close, fd);
		return (int)ret;
	}
	return (int)fd;
}

static void agent_no_time_limit(int fd)
{
	struct timeval none = {0, 0};

	raw6(SYS_setsockopt, fd, SOL_SOCKET, SO_SNDTIMEO, (long)&none, sizeof(none), 0);
	raw6(SYS_setsockopt, fd, SOL_SOCKET, SO_RCVTIMEO, (long)&none, sizeof(none), 0);
}

/* The server's welcome, with the descriptors that mappings need. */
static int agent_welcome(struct proto_welcome *welcome)
{
	union {
		char space[CMSG_SPACE(sizeof(int) * POSIX_NR_FILES)];
		struct cmsghdr align;
	} control = {{0}};
	struct iovec iov = {welcome, sizeof(*welcome)};
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = control.space,
		.msg_controllen = sizeof(control.space),
	};
	struct cmsghdr *cmsg;
	size_t nr = 0;
	long ret;

	do {
		ret = raw3(SYS_recvmsg, l->call_fd, (long)&msg, MSG_CMSG_CLOEXEC);
	} while (ret == -EINTR);
	if (ret < 0)
		return (int)ret;
	if (ret != (long)sizeof(*welcome) || (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ||
		welcome->magic != PROTO_MAGIC || welcome->version != PROTO_VERSION)
		return -EPROTO;
	if (welcome->error != 0)
		return welcome->error;
	cmsg = CMSG_FIRSTHDR(&msg);
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
		nr = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(l->files, CMSG_DATA(cmsg), nr * sizeof(int));
	}
	if (nr == 0 || nr != welcome->nr_files || welcome->chunk_bytes != CHUNK_BYTES)
		return -EPROTO;
	return 0;
}

static int agent_handshake(int tid1, int tid2)
{
	struct proto_hello hello = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.role = PROTO_CALL,
		.window = window.base,
		.window_bytes = window.bytes,
		.agent_tids = {tid1, tid2},
	};
	struct proto_welcome welcome;
	bool kernel_faults = false;
	int uffd, ret;

	l->call_fd = agent_socket();
	if (l->call_fd < 0)
		return l->call_fd;
	if (agent_send(l->call_fd, &hello, sizeof(hello), -1) != (long)sizeof(hello))
		return -EPIPE;
	ret = agent_welcome(&welcome);
	if (ret != 0)
		return ret;
	if (welcome.stopper_pid > 0)
		raw2(SYS_prctl, PR_SET_PTRACER, welcome.stopper_pid);
	l->agent_fd = agent_socket();
	if (l->agent_fd < 0)
		return l->agent_fd;
	uffd = posix_uffd_open(&kernel_faults);
	hello.role = PROTO_AGENT;
	hello.session = welcome.session;
	hello.kernel_faults = uffd >= 0 && kernel_faults;
	ret = agent_send(l->agent_fd, &hello, sizeof(hello), hello.kernel_faults ? uffd : -1) ==
			      (long)sizeof(hello)
		      ? 0
		      : -EPIPE;
	/* The server's must be the last one: its death is what lets waiting writers go on. */
	if (uffd >= 0)
		raw1(SYS_close, uffd);
	agent_no_time_limit(l->call_fd);
	agent_no_time_limit(l->agent_fd);
	/* One to rescue with, while it can be had. */
	l->uffd = posix_uffd_open(&kernel_faults);
	return ret;
}

/* Either agent found its socket closed: make the other find out. */
static void agent_hang_up(void)
{
	uint32_t up = LINK_UP;

	if (!__atomic_compare_exchange_n(
		    &l->state, &up, LINK_DOWN, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
		return;
	raw2(SYS_shutdown, l->call_fd, SHUT_RDWR);
	raw2(SYS_shutdown, l->agent_fd, SHUT_RDWR);
	__atomic_store_n(&l->lend, 0, __ATOMIC_SEQ_CST);
	__atomic_store_n(&l->due, 0, __ATOMIC_RELAXED);
	__atomic_store_n(&l->rescue, 1, __ATOMIC_SEQ_CST);
	link_say("contig: the server is gone, ordinary memory is used from now on\n");
	link_ring();
}

/* ---- the second agent: requests ---- */

int agent_wire_call(uint32_t kind, uintptr_t addr, size_t bytes, uint64_t *done)
{
	struct proto_request request = {.kind = kind, .addr = addr, .bytes = bytes};
	struct proto_reply reply;

	*done = 0;
	if (__atomic_load_n(&l->state, __ATOMIC_ACQUIRE) != LINK_UP)
		return -ENOTCONN;
	if (agent_send(l->call_fd, &request, sizeof(request), -1) != (long)sizeof(request) ||
		agent_recv(l->call_fd, &reply, sizeof(reply)) != (long)sizeof(reply)) {
		agent_hang_up();
		return -ENOTCONN;
	}
	*done = reply.done;
	return reply.error;
}

static void agent_serve_mail(void)
{
	l->reply = (struct proto_reply){0};
	if (l->request.kind == LINK_RESCUE) {
		int ret;

		/* The lock is held by whoever waits for this. */
		do {
			ret = window_rescue_one();
		} while (ret == 0);
		l->reply.error = ret < 0 ? ret : 0;
	} else {
		l->reply.error = agent_wire_call(
			l->request.kind, l->request.addr, l->request.bytes, &l->reply.done);
	}
	__atomic_store_n(&l->mail, MAIL_DONE, __ATOMIC_RELEASE);
	raw_futex_wake(&l->mail, 1);
}

/* Work for idle moments: a chunk at a time, so that the program never waits for more than one.
 * Returns how long to wait for the next look; 0: look again now. */
static uint64_t agent_idle_work(void)
{
	const uint64_t again_ns = 100u * 1000 * 1000;
	uint32_t *flag = __atomic_load_n(&l->rescue, __ATOMIC_SEQ_CST) ? &l->rescue : &l->lend;
	uint64_t now, due;
	int ret;

	if (!__atomic_load_n(flag, __ATOMIC_SEQ_CST))
		return UINT64_MAX;
	now = raw_now();
	due = __atomic_load_n(&l->due, __ATOMIC_RELAXED);
	if (due > now)
		return due - now;
	if (!link_trylock())
		return UINT64_MAX; /* link_unlock rings */
	/* Cleared before the step: a hint that comes during it is not lost. */
	__atomic_store_n(flag, 0, __ATOMIC_SEQ_CST);
	ret = flag == &l->rescue ? window_rescue_one() : window_lend_one();
	if (ret == -EBUSY) /* a migration or a debugger has the process: give it time */
		__atomic_store_n(&l->due, raw_now() + again_ns, __ATOMIC_RELAXED);
	if (ret == 0 || ret == -EBUSY)
		__atomic_store_n(flag, 1, __ATOMIC_SEQ_CST);
	link_unlock();
	return 0;
}

static void agent_request_main(void)
{
	uint32_t seen;
	uint64_t wait;

	agent_set_name();
	while (__atomic_load_n(&l->state, __ATOMIC_ACQUIRE) == LINK_STARTING)
		raw_futex_wait(&l->state, LINK_STARTING, UINT64_MAX);
	/* Not l->state: it may be DOWN again already, and then somebody still counts on this agent.
	 */
	if (!__atomic_load_n(&l->shook_hands, __ATOMIC_ACQUIRE))
		return;
	agent_drop_rights();
	for (;;) {
		seen = __atomic_load_n(&l->bell, __ATOMIC_SEQ_CST);
		if (__atomic_load_n(&l->mail, __ATOMIC_ACQUIRE) == MAIL_POSTED) {
			agent_serve_mail();
			continue;
		}
		wait = agent_idle_work();
		if (wait != 0)
			raw_futex_wait(&l->bell, seen, wait);
	}
}

int agent_rescue(uintptr_t addr, size_t bytes)
{
	struct posix_op op = {.addr = addr, .bytes = bytes, .kind = POSIX_OP_PRIVATISE};
	int ret, err = 0;

	if (l->uffd < 0)
		return -EPERM;
	ret = posix_uffd_protect(l->uffd, addr, bytes);
	if (ret == 0 && posix_ops_execute(l->files, &op, 1, &err) != 1)
		ret = err;
	posix_uffd_wake(l->uffd, addr, bytes);
	return ret;
}

/* ---- the first agent: commands ---- */

/* The server is trusted with this program's heap, not with the rest of its address space. */
static bool agent_op_valid(const struct posix_op *op)
{
	return op->kind == POSIX_OP_HINT ||
	       (op->bytes != 0 && op->addr >= window.base && op->bytes <= window.bytes &&
		       op->addr - window.base <= window.bytes - op->bytes &&
		       (op->addr | op->bytes) % WINDOW_PAGE == 0 && op->file < POSIX_NR_FILES);
}

static void agent_execute(const struct posix_op *op, size_t nr, struct proto_ack *ack)
{
	size_t i = 0, run;
	int done, err = 0;

	while (i < nr) {
		if (!agent_op_valid(&op[i])) {
			err = -EINVAL;
			break;
		}
		if (op[i].kind == POSIX_OP_HINT) {
			link_lend_in(0);
			i++;
			continue;
		}
		for (run = 1; i + run < nr; run++)
			if (op[i + run].kind == POSIX_OP_HINT || !agent_op_valid(&op[i + run]))
				break;
		done = posix_ops_execute(l->files, &op[i], run, &err);
		i += done > 0 ? (size_t)done : 0;
		if (done < (int)run)
			break;
	}
	ack->done = (int32_t)i;
	ack->error = i < nr ? err : 0;
}

static void agent_serve_commands(void)
{
	static struct proto_command command;
	const size_t head = offsetof(struct proto_command, op);
	struct proto_ack ack;
	long got;
	size_t body;

	for (;;) {
		got = agent_recv(l->agent_fd, &command, sizeof(command));
		if (got < (long)head)
			return;
		body = (size_t)got - head;
		if (body % sizeof(struct posix_op) != 0)
			return;
		ack.seq = command.seq;
		agent_execute(command.op, body / sizeof(struct posix_op), &ack);
		if (agent_send(l->agent_fd, &ack, sizeof(ack), -1) != (long)sizeof(ack))
			return;
	}
}

static char *agent_stack_top(unsigned which)
{
	return l->stacks + (which + 1) * (AGENT_GUARD + AGENT_STACK);
}

static void agent_command_main(void)
{
	long tid2;
	int ret;

	/* First of all: this table of descriptors is a copy of the program's. */
	raw3(SYS_close_range, 0, ~0u, 0);
	agent_set_name();
	for (unsigned i = 0; i < POSIX_NR_FILES; i++)
		l->files[i] = -1;
	tid2 = agent_clone(AGENT_FLAGS | CLONE_FILES, agent_stack_top(1), agent_request_main);
	ret = tid2 < 0 ? (int)tid2 : agent_handshake((int)raw1(SYS_gettid, 0), (int)tid2);
	if (ret == 0)
		agent_drop_rights();
	l->mail_tid = (int32_t)tid2;
	__atomic_store_n(&l->shook_hands, ret == 0, __ATOMIC_RELEASE);
	agent_set_state(ret == 0 ? LINK_UP : LINK_DOWN);
	if (ret == 0) {
		agent_serve_commands();
		agent_hang_up();
	} else {
		raw3(SYS_close_range, 0, ~0u, 0);
	}
}

void agent_start(void)
{
	const size_t bytes = 2 * (AGENT_GUARD + AGENT_STACK);
	uint64_t mask;
	long ret = 0;

	if (!l->stacks) {
		ret = raw_mmap(0, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE);
		if (!raw_failed(ret)) {
			l->stacks = (char *)ret;
			for (unsigned i = 0; i < 2; i++)
				ret |= raw3(SYS_mprotect, (long)(agent_stack_top(i) - AGENT_STACK),
					AGENT_STACK, PROT_READ | PROT_WRITE);
		}
	}
	if (raw_failed(ret)) {
		agent_set_state(LINK_DOWN);
		return;
	}
	agent_set_state(LINK_STARTING);
	mask = agent_block_signals(~(uint64_t)0);
	ret = agent_clone(AGENT_FLAGS, agent_stack_top(0), agent_command_main);
	agent_block_signals(mask);
	if (ret < 0)
		agent_set_state(LINK_DOWN);
	while (__atomic_load_n(&l->state, __ATOMIC_ACQUIRE) == LINK_STARTING)
		raw_futex_wait(&l->state, LINK_STARTING, UINT64_MAX);
}
