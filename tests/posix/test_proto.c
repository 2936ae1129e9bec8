/* SPDX-License-Identifier: MIT */
/* Names, sockets and their directory, the checks of messages, and the client against servers that
 * send anything but an answer. */
#define _GNU_SOURCE
#include "client.h"
#include "state.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

static char runtime[64];

static int setup(void **state)
{
	strcpy(runtime, "/tmp/contig-test-XXXXXX");
	if (mkdtemp(runtime) == NULL)
		return -1;
	return setenv("XDG_RUNTIME_DIR", runtime, 1);
}

static int teardown(void **state)
{
	char command[128];

	snprintf(command, sizeof(command), "rm -rf '%s'", runtime);
	return system(command);
}

static unsigned open_fds(void)
{
	DIR *d = opendir("/proc/self/fd");
	unsigned nr = 0;

	assert_non_null(d);
	while (readdir(d) != NULL)
		nr++;
	closedir(d);
	return nr;
}

/* ---- names and sockets --------------------------------------------------------------------- */

static void test_names(void **state)
{
	char path[256], longest[PROTO_NAME_MAX + 2];
	static const char *const bad[] = {"", ".", "..", ".hidden", "a/b", "/", "a\nb", "\x7f"};

	assert_int_equal(posix_runtime_dir(path, sizeof(path), true), 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
		assert_int_equal(posix_socket_path(bad[i], path, sizeof(path)), -EINVAL);
	memset(longest, 'x', sizeof(longest));
	longest[PROTO_NAME_MAX + 1] = '\0';
	assert_int_equal(posix_socket_path(longest, path, sizeof(path)), -EINVAL);
	longest[PROTO_NAME_MAX] = '\0';
	assert_int_equal(posix_socket_path(longest, path, sizeof(path)), 0);
	assert_int_equal(posix_socket_path("redis", path, sizeof(path)), 0);
	assert_non_null(strstr(path, "/contig/redis.sock"));
	assert_int_equal(posix_socket_path("redis", path, 8), -EINVAL);
}

static void test_directory(void **state)
{
	char path[256], made[256];
	struct stat st;

	assert_int_equal(posix_runtime_dir(path, sizeof(path), true), 0);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(st.st_mode & 07777, 0700);
	snprintf(made, sizeof(made), "%s/contig", runtime);
	assert_string_equal(path, made);
	/* Not ours alone: another place is taken. */
	assert_int_equal(chmod(made, 0770), 0);
	assert_int_equal(runtime_dir_check(made), -EPERM);
	assert_int_equal(chmod(made, 0701), 0);
	assert_int_equal(runtime_dir_check(made), -EPERM);
	assert_int_equal(chmod(made, 0700), 0);
	assert_int_equal(runtime_dir_check(made), 0);
	if (geteuid() == 0) {
		assert_int_equal(chown(made, 65534, 65534), 0);
		assert_int_equal(runtime_dir_check(made), -EPERM);
		assert_int_equal(chown(made, 0, 0), 0);
	}
	/* A link to a fine directory is still a link. */
	snprintf(path, sizeof(path), "%s/link", runtime);
	assert_int_equal(symlink(made, path), 0);
	assert_int_equal(runtime_dir_check(path), -ENOTDIR);
	snprintf(path, sizeof(path), "%s/absent", runtime);
	assert_int_equal(runtime_dir_check(path), -ENOENT);
}

static void test_sockets(void **state)
{
	char path[108], again[108];
	unsigned before = open_fds();
	ino_t inode, other;
	struct stat st;
	int fd, second;
	FILE *file;

	fd = runtime_listen("one", path, sizeof(path), &inode);
	assert_true(fd >= 0);
	assert_int_equal(stat(path, &st), 0);
	assert_true(S_ISSOCK(st.st_mode));
	assert_int_equal(st.st_mode & 07777, 0600);
	/* Live. */
	assert_int_equal(runtime_listen("one", again, sizeof(again), &other), -EEXIST);
	assert_int_equal(runtime_remove_stale(path), -EEXIST);
	/* Stale, as a kill leaves it: replaced, and its old owner does not remove the new one. */
	close(fd);
	second = runtime_listen("one", again, sizeof(again), &other);
	assert_true(second >= 0);
	assert_string_equal(path, again);
	if (inode != other)
		runtime_unlisten(path, inode);
	assert_int_equal(stat(path, &st), 0);
	runtime_unlisten(path, other);
	assert_int_equal(stat(path, &st), -1);
	close(second);
	/* Something that is no socket stays what it is. */
	file = fopen(path, "w");
	assert_non_null(file);
	fclose(file);
	assert_int_equal(runtime_listen("one", again, sizeof(again), &other), -EEXIST);
	assert_int_equal(stat(path, &st), 0);
	assert_int_equal(unlink(path), 0);
	assert_int_equal(runtime_listen("a/b", again, sizeof(again), &other), -EINVAL);
	assert_int_equal(open_fds(), before);
}

static void test_list(void **state)
{
	char path[108];
	ino_t inode;
	int live = runtime_listen("alive", path, sizeof(path), &inode);
	int dead = runtime_listen("dead", path, sizeof(path), &inode);
	struct stat st;
	json_t *list;

	assert_true(live >= 0 && dead >= 0);
	close(dead);
	list = ctg_client_list();
	assert_int_equal(stat(path, &st), -1); /* removed */
	/* Other directories may have regions of the machine's user: look at ours only. */
	for (size_t i = 0; i < json_array_size(list); i++) {
		const json_t *entry = json_array_get(list, i);
		const char *name = json_string_value(json_object_get(entry, "name"));

		assert_non_null(name);
		assert_string_not_equal(name, "dead");
		if (strcmp(name, "alive") == 0)
			inode = 0;
		assert_true(json_is_true(json_object_get(entry, "live")));
	}
	assert_int_equal(inode, 0);
	json_decref(list);
	close(live);
}

/* ---- checks of messages -------------------------------------------------------------------- */

static void test_hello(void **state)
{
	const struct proto_hello good = {
		.magic = PROTO_MAGIC,
		.version = PROTO_VERSION,
		.role = PROTO_CALL,
		.window = 0x7f0000000000,
		.window_bytes = 64ull << 30,
		.agent_tids = {10, 11},
	};
	struct proto_hello h, out;
	char longer[sizeof(h) + 1] = {0};

	assert_int_equal(session_check_hello(&good, sizeof(good), &out), 0);
	assert_memory_equal(&good, &out, sizeof(good));
	assert_int_equal(session_check_hello(&good, sizeof(good) - 1, &out), -EINVAL);
	assert_int_equal(session_check_hello(&good, 0, &out), -EINVAL);
	memcpy(longer, &good, sizeof(good));
	assert_int_equal(session_check_hello(longer, sizeof(longer), &out), -EINVAL);
#define REFUSED(field, value)                                                                      \
	do {                                                                                       \
		h = good;                                                                          \
		h.field = value;                                                                   \
		assert_int_equal(session_check_hello(&h, sizeof(h), &out), -EINVAL);               \
	} while (0)
	REFUSED(magic, PROTO_MAGIC + 1);
	REFUSED(version, PROTO_VERSION + 1);
	REFUSED(role, 0);
	REFUSED(role, PROTO_CONTROL + 1);
	REFUSED(window, 0);
	REFUSED(window, good.window + 4096);
	REFUSED(window, UINT64_MAX - POSIX_CHUNK + 1);
	REFUSED(window, CTG_MM_MAX_VPN << CTG_PAGE_SHIFT);
	REFUSED(window, (CTG_MM_MAX_VPN << CTG_PAGE_SHIFT) - POSIX_CHUNK);
	REFUSED(window_bytes, 0);
	REFUSED(window_bytes, POSIX_CHUNK + 4096);
	REFUSED(window_bytes, UINT64_MAX - POSIX_CHUNK + 1);
	REFUSED(window_bytes, 2ull << 40);
	REFUSED(agent_tids[0], 0);
	REFUSED(agent_tids[1], -1);
#undef REFUSED
	h = good;
	h.role = PROTO_AGENT;
	h.window = 1; /* not looked at */
	assert_int_equal(session_check_hello(&h, sizeof(h), &out), 0);
}

static void test_request(void **state)
{
	const uint64_t window = 0x7f0000000000, bytes = 16 * POSIX_CHUNK;
	static const struct {
		struct proto_request r;
		int err;
	} cases[] = {
		{{PROTO_MAP, 0, 0x7f0000000000, POSIX_CHUNK}, 0},
		{{PROTO_UNMAP, 0, 0x7f0000000000, 16 * POSIX_CHUNK}, 0},
		{{PROTO_LEND, 0, 0x7f0000000000 + 15 * POSIX_CHUNK, POSIX_CHUNK}, 0},
		{{PROTO_PRIVATISE, 0, 0x7f0000000000, POSIX_CHUNK}, 0},
		{{PROTO_COUNT, 0, PROTO_COUNT_OTHER, 77}, 0},
		{{PROTO_COUNT, 0, PROTO_NR_COUNTS, 77}, -EINVAL},
		{{0, 0, 0x7f0000000000, POSIX_CHUNK}, -EINVAL},
		{{PROTO_COUNT + 1, 0, 0x7f0000000000, POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 1, 0x7f0000000000, POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000001000, POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000000000, 4096}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000000000, 0}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000000000 - POSIX_CHUNK, POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000000000 + 16 * POSIX_CHUNK, POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000000000 + 15 * POSIX_CHUNK, 2 * POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, 0x7f0000000000 + POSIX_CHUNK, -POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, 0, POSIX_CHUNK}, -EINVAL},
		{{PROTO_MAP, 0, -POSIX_CHUNK, 2 * POSIX_CHUNK}, -EINVAL},
	};
	struct proto_request out;

	for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++)
		assert_int_equal(
			session_check_request(window, bytes, &cases[i].r, sizeof(cases[i].r), &out),
			cases[i].err);
	for (size_t n = 0; n < sizeof(out); n++)
		assert_int_equal(
			session_check_request(window, bytes, &cases[0].r, n, &out), -EINVAL);
}

static void test_parse(void **state)
{
	static const char *const good[] = {
		"{\"do\":\"stat\"}",
		"{\"do\":\"stat\",\"reset_stall\":false}",
		"{\"do\":\"map\"}",
		"{\"do\":\"leases\"}",
		"{\"do\":\"alloc\",\"bytes\":1}",
		"{\"do\":\"alloc\",\"bytes\":9223372036854775807}",
		"{\"do\":\"alloc\",\"count\":4800,\"order\":4}",
		"{\"do\":\"alloc\",\"count\":1}",
		"{\"do\":\"alloc\",\"bytes\":1,\"align\":0}",
		"{\"do\":\"alloc\",\"bytes\":1,\"align\":1073741824}",
		"{\"do\":\"release\",\"lease\":1}",
		"{\"do\":\"release\",\"lease\":1,\"block\":0}",
	};
	static const char *const bad[][2] = {
		{"", "not a JSON"},
		{"{", "not a JSON"},
		{"null", "not a JSON"},
		{"[]", "\"do\" must be one of"},
		{"{}", "\"do\" must be one of"},
		{"{\"do\":1}", "\"do\" must be one of"},
		{"{\"do\":\"quit\"}", "\"do\" must be one of"},
		{"{\"do\":\"stat\",\"do\":\"stat\"}", "not a JSON"},
		{"{\"do\":\"stat\"} x", "not a JSON"},
		{"{\"do\":\"stat\",\"bytes\":1}", "unknown member \"bytes\" in a request to stat"},
		{"{\"do\":\"map\",\"reset_stall\":true}", "unknown member"},
		{"{\"do\":\"stat\",\"reset_stall\":1}", "must be true or false"},
		{"{\"do\":\"alloc\"}", "say how much"},
		{"{\"do\":\"alloc\",\"bytes\":1,\"count\":1}", "say how much"},
		{"{\"do\":\"alloc\",\"bytes\":0}", "must be from 1"},
		{"{\"do\":\"alloc\",\"bytes\":-1}", "must be from 1"},
		{"{\"do\":\"alloc\",\"bytes\":1.5}", "must be a whole number"},
		{"{\"do\":\"alloc\",\"bytes\":\"1\"}", "must be a whole number"},
		{"{\"do\":\"alloc\",\"bytes\":null}", "must be a whole number"},
		{"{\"do\":\"alloc\",\"bytes\":9223372036854775808}", "not a JSON"},
		{"{\"do\":\"alloc\",\"bytes\":1,\"align\":3}", "power of two"},
		{"{\"do\":\"alloc\",\"bytes\":1,\"align\":2147483648}", "must be from 0"},
		{"{\"do\":\"alloc\",\"count\":1,\"order\":19}", "must be from 0 to 18"},
		{"{\"do\":\"alloc\",\"bytes\":1,\"order\":1}", "needs \"count\""},
		{"{\"do\":\"alloc\",\"count\":4194305}", "must be from 0"},
		{"{\"do\":\"alloc\",\"bytes\":1,\"mode\":\"hard\"}", "\"normal\" or \"fast\""},
		{"{\"do\":\"alloc\",\"bytes\":1,\"mode\":0}", "\"normal\" or \"fast\""},
		{"{\"do\":\"alloc\",\"bytes\":1,\"zero\":0}", "must be true or false"},
		{"{\"do\":\"alloc\",\"bytes\":1,\"timeout_ns\":-1}", "must be from 0"},
		{"{\"do\":\"release\"}", "\"lease\" is missing"},
		{"{\"do\":\"release\",\"lease\":-1}", "must be from 0"},
		{"{\"do\":\"release\",\"lease\":1,\"block\":-1}", "must be from 0"},
	};
	struct control_request r;
	struct ctg_error error;

	for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++)
		assert_int_equal(control_parse(good[i], strlen(good[i]), &r, &error), 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		assert_int_equal(control_parse(bad[i][0], strlen(bad[i][0]), &r, &error), -EINVAL);
		if (strstr(error.text, bad[i][1]) == NULL)
			fail_msg("%s: %s", bad[i][0], error.text);
	}
}

static void test_parse_values(void **state)
{
	static const char text[] =
		"{\"do\":\"alloc\",\"bytes\":314572800,\"align\":65536,\"mode\":\"fast\","
		"\"timeout_ns\":5,\"zero\":false,\"hold\":true,\"fd\":true}";
	static const char release[] = "{\"do\":\"release\",\"lease\":7,\"block\":0}";
	struct control_request r;
	struct ctg_error error;

	assert_int_equal(control_parse(text, strlen(text), &r, &error), 0);
	assert_int_equal(r.verb, CONTROL_ALLOC);
	assert_int_equal(r.bytes, 314572800);
	assert_int_equal(r.align, 65536);
	assert_int_equal(r.timeout_ns, 5);
	assert_true(r.fast && r.no_zero && r.hold && r.fd);
	assert_int_equal(control_parse(release, strlen(release), &r, &error), 0);
	assert_int_equal(r.lease, 7);
	assert_true(r.has_block && r.block == 0);
	assert_false(r.hold || r.fast || r.no_zero);
}

/* ---- the client against false servers ------------------------------------------------------ */

/* What the false server sends once it has been asked. */
struct lie {
	const void *bytes;
	size_t size;
	int fds[3];
	size_t nr_fds;
	int listener;
};

static void *liar(void *arg)
{
	const struct lie *lie = arg;
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(3 * sizeof(int))];
	} control = {0};
	struct iovec iov = {.iov_base = (void *)(uintptr_t)lie->bytes, .iov_len = lie->size};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
	char waste[4096];
	int fd = accept(lie->listener, NULL, NULL);

	assert_true(fd >= 0);
	assert_true(recv(fd, waste, sizeof(waste), 0) == sizeof(struct proto_hello));
	assert_true(recv(fd, waste, sizeof(waste), 0) > 0);
	if (lie->nr_fds != 0) {
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(lie->nr_fds * sizeof(int));
		CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
		CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
		CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(lie->nr_fds * sizeof(int));
		memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), lie->fds, lie->nr_fds * sizeof(int));
	}
	if (lie->bytes != NULL)
		assert_true(sendmsg(fd, &message, MSG_NOSIGNAL) == (ssize_t)lie->size);
	close(fd);
	return NULL;
}

/* Ask a false server; the answer, or NULL with what the call returned in *err. */
static json_t *ask_liar(struct lie *lie, int *err, int *fd)
{
	struct ctg_error error = {0};
	struct ctg_client *client;
	char path[108];
	pthread_t thread;
	json_t *request = json_pack("{s:s}", "do", "stat"), *answer;
	ino_t inode;

	lie->listener = runtime_listen("liar", path, sizeof(path), &inode);
	assert_true(lie->listener >= 0);
	assert_int_equal(fcntl(lie->listener, F_SETFL, 0), 0);
	assert_int_equal(pthread_create(&thread, NULL, liar, lie), 0);
	assert_int_equal(ctg_client_connect("liar", &client, &error), 0);
	*err = ctg_client_call(client, request, &answer, fd, &error);
	assert_int_equal(pthread_join(thread, NULL), 0);
	if (*err != 0) {
		assert_null(answer);
		assert_int_equal(error.code, *err);
		assert_true(error.text[0] != '\0');
	}
	ctg_client_close(client);
	json_decref(request);
	close(lie->listener);
	runtime_unlisten(path, inode);
	return answer;
}

static void test_client_garbage(void **state)
{
	static const char *const texts[] = {
		"x",
		"{",
		"[]",
		"{}",
		"1",
		"{\"ok\":1}",
		"{\"ok\":\"yes\"}",
		"{\"ok\":false}",
		"{\"ok\":false,\"error\":\"EBUSY\",\"text\":\"x\"}",
		"{\"ok\":false,\"error\":-16}",
		"{\"ok\":true,\"ok\":true}",
		"{\"ok\":true}\xff",
		"{\"ok\":true,\"in_fd\":true}",
		"{\"ok\":true,\"in_fd\":true,\"bytes\":10}",
		"{\"ok\":true,\"in_fd\":true,\"bytes\":-1}",
		"{\"ok\":true,\"in_fd\":true,\"bytes\":\"many\"}",
	};
	unsigned before = open_fds();
	static char random[PROTO_MAX_CONTROL + 100];
	struct lie lie = {0};
	int err;

	for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
		lie = (struct lie){.bytes = texts[i], .size = strlen(texts[i])};
		assert_null(ask_liar(&lie, &err, NULL));
		assert_int_equal(err, -EPROTO);
	}
	for (size_t i = 0; i < sizeof(random); i++)
		random[i] = (char)(i * 2654435761u >> 13);
	lie = (struct lie){.bytes = random, .size = 5000};
	assert_null(ask_liar(&lie, &err, NULL));
	assert_int_equal(err, -EPROTO);
	/* Longer than an answer may be. */
	lie.size = sizeof(random);
	assert_null(ask_liar(&lie, &err, NULL));
	assert_int_equal(err, -EPROTO);
	/* It hangs up. */
	lie = (struct lie){0};
	assert_null(ask_liar(&lie, &err, NULL));
	assert_int_equal(err, -ECONNRESET);
	assert_int_equal(open_fds(), before);
}

static int file_of(const char *text, bool sealed)
{
	int fd = memfd_create("test", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	assert_true(fd >= 0);
	assert_true(write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	if (sealed)
		assert_int_equal(
			fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE), 0);
	return fd;
}

static void test_client_files(void **state)
{
	static const char note[] = "{\"ok\":true,\"in_fd\":true,\"bytes\":18}";
	static const char wrong[] = "{\"ok\":true,\"in_fd\":true,\"bytes\":17}";
	static const char inner[] = "{\"ok\":true,\"n\":12}";
	unsigned before = open_fds();
	int sealed = file_of(inner, true), loose = file_of(inner, false);
	int null = open("/dev/null", O_RDONLY | O_CLOEXEC), err, fd;
	struct lie lie = {.bytes = note, .size = strlen(note), .fds = {sealed, null}, .nr_fds = 2};
	struct stat a, b;
	json_t *answer;

	assert_int_equal(strlen(inner), 18);
	answer = ask_liar(&lie, &err, &fd);
	assert_non_null(answer);
	assert_int_equal(json_integer_value(json_object_get(answer, "n")), 12);
	json_decref(answer);
	assert_true(fd >= 0 && fstat(fd, &a) == 0 && fstat(null, &b) == 0);
	assert_true(a.st_rdev == b.st_rdev);
	close(fd);
	/* Nobody asked for it: closed. A third one too. */
	lie.nr_fds = 3;
	lie.fds[2] = null;
	answer = ask_liar(&lie, &err, NULL);
	assert_non_null(answer);
	json_decref(answer);
	/* Not sealed, not of that size, not a memfd. */
	lie.fds[0] = loose;
	assert_null(ask_liar(&lie, &err, &fd));
	assert_int_equal(err, -EPROTO);
	lie.fds[0] = null;
	assert_null(ask_liar(&lie, &err, &fd));
	assert_int_equal(err, -EPROTO);
	lie.fds[0] = sealed;
	lie.bytes = wrong;
	assert_null(ask_liar(&lie, &err, &fd));
	assert_int_equal(err, -EPROTO);
	close(sealed);
	close(loose);
	close(null);
	assert_int_equal(open_fds(), before);
}

static void test_client_connect(void **state)
{
	struct ctg_client *client;
	struct ctg_error error;
	char path[108];
	ino_t inode;
	int fd;

	assert_int_equal(ctg_client_connect("absent", &client, &error), -ENOENT);
	assert_string_equal(error.text, "no region named 'absent'; `contig ps` lists them");
	assert_int_equal(ctg_client_connect("a/b", &client, &error), -EINVAL);
	fd = runtime_listen("stale", path, sizeof(path), &inode);
	assert_true(fd >= 0);
	close(fd);
	assert_int_equal(ctg_client_connect("stale", &client, &error), -ECONNREFUSED);
	assert_non_null(strstr(error.text, "no region named 'stale'"));
	assert_int_equal(unlink(path), 0);
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_names),
		cmocka_unit_test(test_directory),
		cmocka_unit_test(test_sockets),
		cmocka_unit_test(test_list),
		cmocka_unit_test(test_hello),
		cmocka_unit_test(test_request),
		cmocka_unit_test(test_parse),
		cmocka_unit_test(test_parse_values),
		cmocka_unit_test(test_client_garbage),
		cmocka_unit_test(test_client_files),
		cmocka_unit_test(test_client_connect),
	};

	return cmocka_run_group_tests(tests, setup, teardown);
}
