/* SPDX-License-Identifier: MIT */
/*
 * The ways in which a program makes processes, each checked on both sides: the child sees the heap
 * as it was, what it writes stays its own, and the parent's stays the parent's. usage: forks CASE
 * [MIB] Prints "intact" and exits with 0, or says what differed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <pthread.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

#define BLOCK (256u << 10)

static uint32_t **blocks;
static size_t nr_blocks;

static void heap_fill(uint32_t seed)
{
	for (size_t i = 0; i < nr_blocks; i++)
		for (size_t k = 0; k < BLOCK / 4; k++)
			blocks[i][k] = seed + (uint32_t)(i * 7919 + k);
}

static void heap_check(uint32_t seed, const char *who)
{
	for (size_t i = 0; i < nr_blocks; i++)
		for (size_t k = 0; k < BLOCK / 4; k++)
			if (blocks[i][k] != seed + (uint32_t)(i * 7919 + k)) {
				fprintf(stderr,
					"forks: %s: block %zu word %zu at %p: %#x, not %#x\n", who,
					i, k, (void *)&blocks[i][k], blocks[i][k],
					seed + (uint32_t)(i * 7919 + k));
				_exit(1);
			}
}

static void heap_make(size_t mib)
{
	nr_blocks = (mib << 20) / BLOCK;
	blocks = calloc(nr_blocks, sizeof(*blocks));
	for (size_t i = 0; i < nr_blocks; i++)
		blocks[i] = malloc(BLOCK);
	heap_fill(1);
}

static void await(pid_t pid)
{
	int status;

	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			_exit(10);
	if (status != 0) {
		fprintf(stderr, "forks: child ended with %#x\n", (unsigned)status);
		_exit(11);
	}
}

/* Allocate in the child, which may make it a borrower of its own. */
static void use_malloc(size_t mib)
{
	size_t nr = (mib << 20) / 65536;
	unsigned char **p = calloc(nr, sizeof(*p));

	for (size_t i = 0; i < nr; i++) {
		p[i] = malloc(65536);
		memset(p[i], (int)i, 65536);
	}
	for (size_t i = 0; i < nr; i++) {
		for (size_t k = 0; k < 65536; k += 512)
			if (p[i][k] != (unsigned char)i)
				_exit(12);
		free(p[i]);
	}
	free(p);
}

static void case_plain(void)
{
	for (uint32_t n = 0; n < 8; n++) {
		pid_t pid = fork();

		if (pid == 0) {
			heap_check(1 + n, "child");
			heap_fill(77);
			use_malloc(8);
			heap_check(77, "child, after its own writes");
			_exit(0);
		}
		heap_check(1 + n, "parent, beside the child");
		heap_fill(2 + n);
		await(pid);
		heap_check(2 + n, "parent");
		usleep(n * 50000);
	}
}

static void case_nested(void)
{
	pid_t pid = fork();

	if (pid == 0) {
		use_malloc(12);
		pid = fork();
		if (pid == 0) {
			heap_check(1, "grandchild");
			use_malloc(12);
			_exit(0);
		}
		heap_fill(5);
		await(pid);
		heap_check(5, "child");
		_exit(0);
	}
	await(pid);
	heap_check(1, "parent");
}

static atomic_bool stop;

static void *churn(void *arg)
{
	unsigned seed = (unsigned)(uintptr_t)arg;
	char *p[64] = {NULL};

	while (!stop) {
		unsigned i = (unsigned)rand_r(&seed) % 64;
		size_t size = (size_t)rand_r(&seed) % 300000 + 1;

		if (p[i] && p[i][0] != (char)i)
			_exit(13);
		free(p[i]);
		p[i] = malloc(size);
		memset(p[i], (int)i, size);
	}
	for (unsigned i = 0; i < 64; i++)
		free(p[i]);
	return NULL;
}

/* Other threads are in malloc at the moment of the fork. */
static void case_threads(void)
{
	pthread_t threads[3];

	for (uintptr_t i = 0; i < 3; i++)
		pthread_create(&threads[i], NULL, churn, (void *)(i + 1));
	for (uint32_t n = 0; n < 20; n++) {
		pid_t pid = fork();

		if (pid == 0) {
			heap_check(1, "child");
			use_malloc(4);
			_exit(0);
		}
		await(pid);
		if (n % 5 == 0)
			usleep(150000); /* lent again meanwhile */
	}
	stop = true;
	for (unsigned i = 0; i < 3; i++)
		pthread_join(threads[i], NULL);
	heap_check(1, "parent");
}

/* Threads that libc does not know of must not keep what the program gives up. Returns how many
 * there are. */
static unsigned check_agents(void)
{
	char path[300], line[256];
	unsigned nr = 0;
	DIR *dir = opendir("/proc/self/task");
	struct dirent *entry;

	while (dir && (entry = readdir(dir))) {
		bool agent = false;
		FILE *file;

		snprintf(path, sizeof(path), "/proc/self/task/%s/status", entry->d_name);
		file = entry->d_name[0] == '.' ? NULL : fopen(path, "r");
		if (!file)
			continue;
		while (fgets(line, sizeof(line), file)) {
			unsigned long long caps, uid;

			if (strcmp(line, "Name:\tcontig-agent\n") == 0) {
				agent = true;
				nr++;
			}
			if (agent && sscanf(line, "Uid: %llu", &uid) == 1 && uid == 0)
				_exit(32);
			if (agent && sscanf(line, "CapPrm: %llx", &caps) == 1 &&
				(caps & ~(1ull << 14)) != 0) /* CAP_IPC_LOCK */
				_exit(33);
		}
		fclose(file);
	}
	if (dir)
		closedir(dir);
	return nr;
}

static void case_exec(void)
{
	char *argv[] = {"true", NULL};
	char line[64] = "";
	posix_spawn_file_actions_t actions;
	pid_t pid = fork();
	FILE *pipe;

	if (pid == 0) {
		execvp("true", argv);
		_exit(14);
	}
	await(pid);
	if (system("test $((6 * 7)) = 42") != 0)
		_exit(15);
	pipe = popen("echo one | cat | tr a-z A-Z", "r");
	if (!pipe || !fgets(line, sizeof(line), pipe) || pclose(pipe) != 0 || strcmp(line, "ONE\n"))
		_exit(16);
	posix_spawn_file_actions_init(&actions);
	if (posix_spawnp(&pid, "true", &actions, NULL, argv, environ) != 0)
		_exit(17);
	posix_spawn_file_actions_destroy(&actions);
	await(pid);
	pid = vfork();
	if (pid == 0) {
		execvp("true", argv);
		_exit(14);
	}
	await(pid);
	heap_check(1, "parent");
}

/* It must not, but programs do: allocate between vfork and exec, here before there is a link. */
static void case_vfork(void)
{
	char *argv[] = {"true", NULL};
	static void *volatile p;
	pid_t pid = vfork();

	if (pid == 0) {
		p = malloc(16u << 20);
		execvp("true", argv);
		_exit(14);
	}
	await(pid);
	memset(p, 1, 16u << 20);
	use_malloc(32);
	pid = vfork();
	if (pid == 0) {
		free(p);
		p = malloc(32u << 20);
		execvp("true", argv);
		_exit(14);
	}
	await(pid);
	memset(p, 1, 32u << 20);
	use_malloc(64);
	if (check_agents() != 2)
		_exit(38);
}

static void case_daemon(void)
{
	int ends[2];
	char word[8] = "";
	pid_t pid;

	if (pipe(ends) != 0)
		_exit(18);
	pid = fork();
	if (pid == 0) {
		if (daemon(1, 1) != 0)
			_exit(19);
		setsid();
		heap_check(1, "daemon");
		heap_fill(9);
		use_malloc(16);
		heap_check(9, "daemon, later");
		_exit(write(ends[1], "good", 5) != 5);
	}
	await(pid);
	close(ends[1]);
	if (read(ends[0], word, 5) != 5 || strcmp(word, "good") != 0)
		_exit(20);
	heap_check(1, "parent");
}

/* Everything that a program may do to descriptors. */
static void case_descriptors(void)
{
	int null = open("/dev/null", O_RDWR);

	for (int fd = 3; fd < 1024; fd++)
		if (fd != null && fcntl(fd, F_GETFD) >= 0)
			close(fd);
	for (int fd = 3; fd < 256; fd++)
		if (fd != null)
			dup2(null, fd);
	use_malloc(16);
	closefrom(3);
	use_malloc(24);
	close(0);
	use_malloc(32);
	heap_check(1, "after closing everything");
}

static void case_identity(void)
{
	if (check_agents() != 2)
		_exit(34);
	if (prctl(PR_GET_DUMPABLE) != 1)
		_exit(35);
	if (geteuid() == 0) {
		if (chroot("/tmp") != 0 || chdir("/") != 0 || setgroups(0, NULL) != 0 ||
			setgid(65534) != 0 || setuid(65534) != 0)
			_exit(21);
	}
	use_malloc(16);
	pid_t pid = fork();

	if (pid == 0) {
		heap_check(1, "child of nobody");
		use_malloc(16);
		_exit(0);
	}
	await(pid);
	heap_check(1, "nobody");
}

/* What a program may do to mappings of its heap. */
static void case_mappings(void)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE), bytes = 3u << 20;
	unsigned char *p = aligned_alloc(page, bytes);

	memset(p, 3, bytes);
	if (mprotect(p, bytes, PROT_READ) != 0)
		_exit(22);
	pid_t pid = fork();
	if (pid == 0) {
		p[page] = 1; /* must kill it */
		_exit(0);
	}
	int status;
	waitpid(pid, &status, 0);
	if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGSEGV)
		_exit(23);
	if (mprotect(p, bytes, PROT_READ | PROT_WRITE) != 0)
		_exit(24);
	for (size_t i = 0; i < bytes; i++)
		if (p[i] != 3)
			_exit(25);
	if (madvise(p, bytes, MADV_DONTNEED) != 0)
		_exit(26);
	for (size_t i = 0; i < bytes; i++)
		if (p[i] != 0)
			_exit(27);
	memset(p, 4, bytes);
	if (mlock(p, page) == 0)
		munlock(p, page);
	if (madvise(p, bytes, MADV_DONTFORK) != 0 || madvise(p, bytes, MADV_DOFORK) != 0)
		_exit(28);
	for (size_t i = 0; i < bytes; i++)
		if (p[i] != 4)
			_exit(29);
	free(p);
	use_malloc(16);
	heap_check(1, "after changes of mappings");
}

/* A limit of addresses far below what is reserved for the heap. */
static void case_limits(void)
{
	struct rlimit limit;
	void *p;

	getrlimit(RLIMIT_AS, &limit);
	limit.rlim_cur = (rlim_t)512 << 20;
	if (setrlimit(RLIMIT_AS, &limit) != 0)
		_exit(36);
	case_plain();
	use_malloc(64);
	p = malloc((size_t)1 << 30);
	if (p != NULL || errno != ENOMEM)
		_exit(37);
	use_malloc(64);
}

/* The test kills the server before it answers: from then on there is nobody to make the heap ready
 * for a fork. */
static void case_orphan(void)
{
	char byte;

	puts("ready");
	fflush(stdout);
	if (read(0, &byte, 1) != 1)
		_exit(30);
	case_plain();
	use_malloc(64);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(void);
	} cases[] = {
		{"plain", case_plain},
		{"nested", case_nested},
		{"threads", case_threads},
		{"exec", case_exec},
		{"vfork", case_vfork},
		{"daemon", case_daemon},
		{"descriptors", case_descriptors},
		{"identity", case_identity},
		{"mappings", case_mappings},
		{"limits", case_limits},
		{"orphan", case_orphan},
	};

	if (argc < 2)
		return 64;
	heap_make(argc > 2 ? strtoul(argv[2], NULL, 10) : 24);
	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		if (strcmp(cases[i].name, argv[1]) == 0) {
			cases[i].run();
			puts("intact");
			return 0;
		}
	return 64;
}
