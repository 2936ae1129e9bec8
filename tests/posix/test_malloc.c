/* SPDX-License-Identifier: MIT */
/*
 * Unmodified programs in lent memory, under a real server, while buffers are taken out from under
 * them. The programs are in programs/; where they are and where the preload library is, the build
 * tells by CONTIG_TEST_PROGRAMS and CONTIG_TEST_PRELOAD.
 */
#define _GNU_SOURCE
#include "client.h"
#include "server.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

#define MIB ((uint64_t)1 << 20)
#define SECOND ((uint64_t)1000000000)
#define PATTERN 0xa5c3f00d12345678u

extern char **environ;

/* ---- programs ---- */

struct program {
	pid_t pid;
	int in;
	FILE *out;
};

/* socket: NULL: an ordinary process. argv[0]: a name in CONTIG_TEST_PROGRAMS, or of a shell
 * command. */
static void program_start(struct program *p, const char *socket, char *const argv[])
{
	char path[512], preload[512], socket_is[512], *env[256];
	posix_spawn_file_actions_t actions;
	int in[2], out[2], nr = 0;

	snprintf(path, sizeof(path), "%s/%s", getenv("CONTIG_TEST_PROGRAMS"), argv[0]);
	snprintf(preload, sizeof(preload), "LD_PRELOAD=%s", getenv("CONTIG_TEST_PRELOAD"));
	snprintf(socket_is, sizeof(socket_is), PROTO_ENV_SOCKET "=%s", socket ? socket : "");
	for (char **e = environ; *e && nr < 250; e++)
		if (strncmp(*e, "LD_PRELOAD=", 11) != 0)
			env[nr++] = *e;
	if (socket) {
		env[nr++] = preload;
		env[nr++] = socket_is;
	}
	env[nr] = NULL;
	assert_int_equal(pipe2(in, O_CLOEXEC), 0);
	assert_int_equal(pipe2(out, O_CLOEXEC), 0);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, in[0], 0);
	posix_spawn_file_actions_adddup2(&actions, out[1], 1);
	assert_int_equal(
		posix_spawn(&p->pid, argv[0][0] == '/' ? argv[0] : path, &actions, NULL, argv, env),
		0);
	posix_spawn_file_actions_destroy(&actions);
	close(in[0]);
	close(out[1]);
	p->in = in[1];
	p->out = fdopen(out[0], "r");
	assert_non_null(p->out);
}

static void program_expect(struct program *p, const char *word)
{
	char line[512] = "";

	if (!fgets(line, sizeof(line), p->out))
		line[0] = '\0';
	line[strcspn(line, "\n")] = '\0';
	assert_string_equal(line, word);
}

static void program_go_on(struct program *p)
{
	assert_int_equal(write(p->in, "x", 1), 1);
}

/* End its input, wait for its end. */
static int program_end(struct program *p)
{
	int status;

	close(p->in);
	fclose(p->out);
	assert_int_equal(waitpid(p->pid, &status, 0), p->pid);
	return status;
}

static void program_passes(const char *socket, char *const argv[])
{
	struct program p;

	program_start(&p, socket, argv);
	program_expect(&p, "intact");
	assert_int_equal(program_end(&p), 0);
}

/* ---- the server ---- */

struct lending {
	struct ctg_server *server;
	struct ctg_region *region;
	char name[64];
	/* the taker */
	pthread_t thread;
	atomic_bool stop;
	uint64_t bytes;
	unsigned taken, refused, spoilt;
};

static void lending_start(struct lending *l, uint64_t mib, bool force_stop)
{
	struct ctg_server_config config = {.region = {.bytes = mib * MIB,
						   .spill_bytes = CTG_SPILL_DEFAULT,
						   .force_stop = force_stop}};
	struct ctg_error error = {0};
	static unsigned number;

	memset(l, 0, sizeof(*l));
	snprintf(l->name, sizeof(l->name), "malloc-%d-%u", (int)getpid(), number++);
	config.name = l->name;
	if (ctg_server_start(&config, &l->server, &error) != 0)
		fail_msg("%s", error.text);
	l->region = ctg_server_region(l->server);
}

static uint64_t monotonic(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return (uint64_t)ts.tv_sec * SECOND + (uint64_t)ts.tv_nsec;
}

/* Every frame must have come back. */
static void lending_end(struct lending *l)
{
	struct ctg_cma_stat stat;

	/* 60 s: a limit for a test that hangs, not an expectation. */
	assert_int_equal(ctg_server_wait_idle(l->server, monotonic() + 60 * SECOND), 0);
	ctg_cma_stat(ctg_region_area(l->region), &stat);
	assert_int_equal(stat.nr_allocated, 0);
	assert_int_equal(stat.nr_lent, 0);
	assert_int_equal(stat.nr_free, stat.nr);
	ctg_server_stop(l->server);
}

/* Take a buffer, see that it is zero, that what is written stays, give it back, and again. */
static void *taker(void *arg)
{
	struct lending *l = arg;
	struct ctg_buffer buffer;

	while (!l->stop) {
		if (ctg_region_alloc(l->region, l->bytes, NULL, &buffer) != 0) {
			l->refused++;
			usleep(1000);
			continue;
		}
		uint64_t *words = buffer.address;
		size_t nr = buffer.bytes / 8;

		for (size_t i = 0; i < nr; i++) {
			l->spoilt += words[i] != 0;
			words[i] = PATTERN ^ i;
		}
		usleep(500);
		for (size_t i = 0; i < nr; i++)
			l->spoilt += words[i] != (PATTERN ^ i);
		ctg_region_release(l->region, &buffer);
		l->taken++;
	}
	return NULL;
}

static void taker_start(struct lending *l, uint64_t mib)
{
	l->bytes = mib * MIB;
	l->stop = false;
	assert_int_equal(pthread_create(&l->thread, NULL, taker, l), 0);
}

static void taker_end(struct lending *l)
{
	l->stop = true;
	pthread_join(l->thread, NULL);
	print_message("# taken %u times, refused %u times\n", l->taken, l->refused);
	assert_int_equal(l->spoilt, 0);
	assert_true(l->taken > 0);
}

/* What stat says of borrower pid. */
static uint64_t borrower_stat(struct lending *l, pid_t pid, const char *key)
{
	json_t *request = json_pack("{s:s}", "do", "stat"), *answer = NULL, *borrower;
	struct ctg_client *client;
	struct ctg_error error = {0};
	uint64_t value = UINT64_MAX;
	size_t i;

	assert_int_equal(ctg_client_connect(l->name, &client, &error), 0);
	assert_int_equal(ctg_client_call(client, request, &answer, NULL, &error), 0);
	json_array_foreach(json_object_get(answer, "borrowers"), i,
		borrower) if (json_integer_value(json_object_get(borrower, "pid")) == pid) value =
		(uint64_t)json_integer_value(json_object_get(borrower, key));
	json_decref(answer);
	json_decref(request);
	ctg_client_close(client);
	return value;
}

/* ---- tests ---- */

static void churn_while_taken(bool force_stop)
{
	char *argv[] = {"churn", "4", "20000", "160", NULL};
	static struct lending l; /* a failure jumps out while the taker runs */

	lending_start(&l, 256, force_stop);
	taker_start(&l, 64);
	program_passes(ctg_server_socket(l.server), argv);
	taker_end(&l);
	lending_end(&l);
}

static void test_churn(void **state)
{
	(void)state;
	churn_while_taken(false);
}

static void test_churn_with_stopped_threads(void **state)
{
	(void)state;
	churn_while_taken(true);
}

static void forks(const char *which, const char *mib)
{
	char name[32], size[16], *argv[] = {"forks", name, size, NULL};
	static struct lending l; /* a failure jumps out while the taker runs */

	snprintf(name, sizeof(name), "%s", which);
	snprintf(size, sizeof(size), "%s", mib);
	lending_start(&l, 128, false);
	taker_start(&l, 40);
	program_passes(ctg_server_socket(l.server), argv);
	taker_end(&l);
	lending_end(&l);
}

#define FORK_CASE(name, mib)                                                                       \
	static void test_fork_##name(void **state)                                                 \
	{                                                                                          \
		(void)state;                                                                       \
		forks(#name, #mib);                                                                \
	}
FORK_CASE(plain, 32)
FORK_CASE(nested, 32)
FORK_CASE(threads, 32)
FORK_CASE(exec, 32)
FORK_CASE(daemon, 32)
FORK_CASE(descriptors, 32)
FORK_CASE(identity, 32)
FORK_CASE(mappings, 32)
FORK_CASE(limits, 32)
FORK_CASE(vfork, 0) /* there is no link yet */

static void objects(const char *which)
{
	char name[32], path[512], *argv[] = {name, NULL};
	static struct lending l;

	snprintf(name, sizeof(name), "%s", which);
	snprintf(path, sizeof(path), "%s/%s", getenv("CONTIG_TEST_PROGRAMS"), which);
	if (access(path, X_OK) != 0) {
		print_message("# built without a C++ compiler\n");
		skip();
	}
	lending_start(&l, 128, false);
	taker_start(&l, 40);
	program_passes(ctg_server_socket(l.server), argv);
	taker_end(&l);
	lending_end(&l);
}

static void test_objects(void **state)
{
	(void)state;
	objects("objects");
}

static void test_objects_with_jemalloc(void **state)
{
	(void)state;
	objects("objects-jemalloc");
}

/* What the allocator purges goes back to the area, and comes from there again. */
static void test_purge(void **state)
{
	char *argv[] = {"purge", "96", NULL};
	static struct lending l; /* a failure jumps out while the taker runs */
	struct program p;

	(void)state;
	lending_start(&l, 128, false);
	program_start(&p, ctg_server_socket(l.server), argv);
	for (int round = 0; round < 2; round++) {
		program_expect(&p, "full");
		assert_true(borrower_stat(&l, p.pid, "lent_bytes") >= 90 * MIB);
		program_go_on(&p);
		program_expect(&p, "empty");
		assert_true(borrower_stat(&l, p.pid, "lent_bytes") <= 16 * MIB);
		program_go_on(&p);
	}
	program_expect(&p, "intact");
	assert_int_equal(program_end(&p), 0);
	lending_end(&l);
}

/* More than the region has: the rest is ordinary memory, counted, and lent once there is room. */
static void test_full_region(void **state)
{
	char *argv[] = {"churn", "2", "0", "160", "mark", NULL};
	static struct lending l; /* a failure jumps out while the taker runs */
	struct program p;

	(void)state;
	lending_start(&l, 64, false);
	program_start(&p, ctg_server_socket(l.server), argv);
	program_expect(&p, "ready");
	assert_true(borrower_stat(&l, p.pid, "lent_bytes") > 48 * MIB);
	assert_true(borrower_stat(&l, p.pid, "full_bytes") > 32 * MIB);
	close(p.in);
	p.in = open("/dev/null", O_RDONLY | O_CLOEXEC);
	program_expect(&p, "intact");
	assert_int_equal(program_end(&p), 0);
	lending_end(&l);
}

static void test_borrower_killed(void **state)
{
	char *argv[] = {"churn", "3", "0", "80", "mark", NULL};
	static struct lending l; /* a failure jumps out while the taker runs */
	struct program p;

	(void)state;
	lending_start(&l, 128, false);
	taker_start(&l, 40);
	for (int i = 0; i < 5; i++) {
		program_start(&p, ctg_server_socket(l.server), argv);
		program_expect(&p, "ready");
		usleep((useconds_t)(i * 7000));
		kill(p.pid, SIGKILL);
		assert_int_equal(program_end(&p), SIGKILL);
	}
	taker_end(&l);
	lending_end(&l);
}

/* What found no room is lent as soon as there is some. */
static void test_room_again(void **state)
{
	char *argv[] = {"purge", "56", NULL};
	static struct lending l;
	struct program first, second;
	uint64_t deadline;

	(void)state;
	lending_start(&l, 64, false);
	program_start(&first, ctg_server_socket(l.server), argv);
	program_expect(&first, "full");
	program_start(&second, ctg_server_socket(l.server), argv);
	program_expect(&second, "full");
	assert_true(borrower_stat(&l, second.pid, "lent_bytes") <= 16 * MIB);
	program_go_on(&first);
	program_expect(&first, "empty");
	deadline = monotonic() + 60 * SECOND;
	while (borrower_stat(&l, second.pid, "lent_bytes") < 40 * MIB) {
		assert_true(monotonic() < deadline);
		usleep(10000);
	}
	kill(first.pid, SIGKILL);
	assert_int_equal(program_end(&first), SIGKILL);
	program_go_on(&second);
	program_expect(&second, "empty");
	program_go_on(&second);
	program_expect(&second, "full");
	program_go_on(&second);
	program_expect(&second, "empty");
	program_go_on(&second);
	program_expect(&second, "intact");
	assert_int_equal(program_end(&second), 0);
	lending_end(&l);
}

/* Start a server of its own, with a borrower that is ready; then kill the server. */
static void lose_the_server(struct program *p, char *const argv[])
{
	char name[64], path[256], *lender_argv[] = {"lender", name, "96", NULL};
	struct program lender;

	snprintf(name, sizeof(name), "lost-%d-%s", (int)getpid(), argv[0]);
	program_start(&lender, NULL, lender_argv);
	assert_non_null(fgets(path, sizeof(path), lender.out));
	path[strcspn(path, "\n")] = '\0';
	program_start(p, path, argv);
	program_expect(p, "ready");
	usleep(100000);
	kill(lender.pid, SIGKILL);
	assert_int_equal(program_end(&lender), SIGKILL);
	unlink(path);
}

static void test_server_killed(void **state)
{
	char *argv[] = {"churn", "3", "0", "60", "mark", NULL};
	struct program p;

	(void)state;
	lose_the_server(&p, argv);
	usleep(300000);
	close(p.in);
	p.in = open("/dev/null", O_RDONLY | O_CLOEXEC);
	program_expect(&p, "intact");
	assert_int_equal(program_end(&p), 0);
}

static void test_server_killed_before_fork(void **state)
{
	char *argv[] = {"forks", "orphan", "40", NULL};
	struct program p;

	(void)state;
	lose_the_server(&p, argv);
	program_go_on(&p);
	program_expect(&p, "intact");
	assert_int_equal(program_end(&p), 0);
}

/* No server, no such socket, garbage in the variable: memory is ordinary and nothing is said. */
static void test_no_server(void **state)
{
	char *argv[] = {"churn", "2", "500", "16", NULL};
	char *forks_argv[] = {"forks", "plain", "8", NULL};
	char long_path[300];

	(void)state;
	memset(long_path, 'x', sizeof(long_path) - 1);
	long_path[sizeof(long_path) - 1] = '\0';
	program_passes("", argv);
	program_passes("/nonexistent/socket", argv);
	program_passes("/etc/passwd", forks_argv);
	program_passes(long_path, argv);
}

/* ---- programs that everybody has ---- */

static size_t run_shell(const char *socket, const char *script, char *out, size_t size, int *status)
{
	char text[4096], *argv[] = {"/bin/sh", "-c", text, NULL};
	struct program p;
	size_t n, total = 0;

	snprintf(text, sizeof(text), "exec 2>&1; %s", script);
	program_start(&p, socket, argv);
	while ((n = fread(out + total, 1, size - 1 - total, p.out)) > 0)
		total += n;
	out[total] = '\0';
	*status = program_end(&p);
	return total;
}

/* The same output and status as without Contig, while buffers are taken. */
static void same_with_contig(const char *needs, const char *script)
{
	static char expected[65536], got[65536];
	char check[256];
	static struct lending l; /* a failure jumps out while the taker runs */
	int status, expected_status;

	snprintf(check, sizeof(check), "command -v %s", needs);
	run_shell(NULL, check, got, sizeof(got), &status);
	if (status != 0) {
		print_message("# %s is not installed\n", needs);
		skip();
	}
	run_shell(NULL, script, expected, sizeof(expected), &expected_status);
	assert_int_equal(expected_status, 0);
	lending_start(&l, 256, false);
	taker_start(&l, 64);
	run_shell(ctg_server_socket(l.server), script, got, sizeof(got), &status);
	assert_string_equal(got, expected);
	assert_int_equal(status, 0);
	taker_end(&l);
	lending_end(&l);
}

static void test_python(void **state)
{
	(void)state;
	same_with_contig("python3",
		"python3 -c '\n"
		"import hashlib, subprocess, multiprocessing, threading, json\n"
		"d = {i: str(i) * (i % 50) for i in range(300000)}\n"
		"def f(n): return hashlib.sha256(\"\".join(d[i] for i in "
		"range(n)).encode()).hexdigest()\n"
		"with multiprocessing.get_context(\"fork\").Pool(3) as p: print(p.map(f, [1000, "
		"50000, 200000]))\n"
		"print(subprocess.check_output([\"sh\", \"-c\", \"echo sub | cat\"]))\n"
		"t = [threading.Thread(target=f, args=(100000,)) for i in range(4)]\n"
		"[x.start() for x in t]; [x.join() for x in t]\n"
		"print(len(json.dumps(d)), f(300000))'");
}

static void test_perl(void **state)
{
	(void)state;
	same_with_contig("perl",
		"perl -e 'my %h; $h{$_} = \"v\" x ($_ % 60) for 1..200000; my $p = fork;"
		" if (!$p) { my $n = 0; $n += length for values %h; print \"child $n\\n\"; exit }"
		" waitpid $p, 0; delete $h{$_} for 1..100000; print scalar(keys %h), \"\\n\";"
		" print `echo sub`;'");
}

static void test_sqlite(void **state)
{
	(void)state;
	same_with_contig("sqlite3",
		"sqlite3 :memory: 'CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);"
		"WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c WHERE x<300000)"
		" INSERT INTO t SELECT x, printf(\"%0120d\", x*7) FROM c;"
		"UPDATE t SET b = b || a WHERE a % 3 = 0; CREATE INDEX i ON t(b);"
		"DELETE FROM t WHERE a % 5 = 0;"
		"SELECT count(*), sum(length(b)), max(b) FROM t;'");
}

static void test_shell(void **state)
{
	(void)state;
	same_with_contig("bash",
		"bash -c 'for i in {1..40}; do echo $((i * i)) | tr 0-9 a-j | rev; done;"
		" x=$(seq 1 200000 | sort -rn | md5sum); echo $x; declare -a a; for i in "
		"{1..50000};"
		" do a[$i]=value$i; done; (echo ${#a[@]}; echo ${a[777]}) | cat; echo ${a[*]} | "
		"md5sum'");
}

static void test_compiler(void **state)
{
	(void)state;
	same_with_contig("gcc",
		"d=$(mktemp -d) && cd $d && printf '#include <stdio.h>\\n#include <stdlib.h>\\n"
		"#include <pthread.h>\\nint main(void){puts(\"compiled\");return 0;}\\n' > a.c &&"
		" gcc -O2 -c -pipe a.c -o a.o && gcc a.o -o a && ./a && md5sum < a.o; rm -rf $d");
}

static void test_redis(void **state)
{
	(void)state;
	same_with_contig("redis-server",
		"d=$(mktemp -d) && cd $d && redis-server --port 0 --unixsocket $d/s --daemonize yes"
		" --dir $d --save '' --appendonly no --enable-debug-command yes --logfile $d/log"
		" >/dev/null; i=0; until redis-cli -s $d/s ping 2>/dev/null | grep -q PONG || [ $i "
		"= 100 ];"
		" do i=$((i+1)); sleep 0.1; done;"
		" redis-cli -s $d/s debug populate 300000 key 200; redis-cli -s $d/s bgsave;"
		" redis-cli -s $d/s lpush l a b c;"
		" while redis-cli -s $d/s info persistence | grep -q bgsave_in_progress:1;"
		" do sleep 0.05; done; redis-cli -s $d/s debug reload;"
		" redis-cli -s $d/s debug digest; redis-cli -s $d/s flushall;"
		" redis-cli -s $d/s shutdown nosave; rm -rf $d");
}

/* An argument picks the tests whose names it matches, as in test_malloc 'test_fork_*'. */
int main(int argc, char **argv)
{
	static const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_no_server),
		cmocka_unit_test(test_churn),
		cmocka_unit_test(test_churn_with_stopped_threads),
		cmocka_unit_test(test_fork_plain),
		cmocka_unit_test(test_fork_nested),
		cmocka_unit_test(test_fork_threads),
		cmocka_unit_test(test_fork_exec),
		cmocka_unit_test(test_fork_daemon),
		cmocka_unit_test(test_fork_descriptors),
		cmocka_unit_test(test_fork_identity),
		cmocka_unit_test(test_fork_mappings),
		cmocka_unit_test(test_fork_limits),
		cmocka_unit_test(test_fork_vfork),
		cmocka_unit_test(test_objects),
		cmocka_unit_test(test_objects_with_jemalloc),
		cmocka_unit_test(test_purge),
		cmocka_unit_test(test_full_region),
		cmocka_unit_test(test_room_again),
		cmocka_unit_test(test_borrower_killed),
		cmocka_unit_test(test_server_killed),
		cmocka_unit_test(test_server_killed_before_fork),
		cmocka_unit_test(test_python),
		cmocka_unit_test(test_perl),
		cmocka_unit_test(test_sqlite),
		cmocka_unit_test(test_shell),
		cmocka_unit_test(test_compiler),
		cmocka_unit_test(test_redis),
	};

	if (!getenv("CONTIG_TEST_PROGRAMS") || !getenv("CONTIG_TEST_PRELOAD")) {
		fprintf(stderr, "CONTIG_TEST_PROGRAMS and CONTIG_TEST_PRELOAD are not set\n");
		return 1;
	}
	if (argc > 1)
		cmocka_set_test_filter(argv[1]);
	signal(SIGPIPE, SIG_IGN);
	return cmocka_run_group_tests_name("malloc", tests, NULL, NULL);
}
