/* SPDX-License-Identifier: MIT */
/* contig alloc: take a buffer, and hand it to whoever is to use it. */
#include "cli.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAX_ENV_STRING 120000 /* the kernel refuses strings of 128 KiB */

static struct {
	char *from, *align, *count, *order, *mode, *timeout, *fd;
	int no_zero, hold, json;
} options;

static const struct poptOption table[] = {
	{"from", 'f', POPT_ARG_STRING, &options.from, 0,
		"The region (may be left out if there is one only)", "NAME"},
	{"align", 'a', POPT_ARG_STRING, &options.align, 0,
		"Alignment in the region, a power of two from 4K on", "SIZE"},
	{"count", 'c', POPT_ARG_STRING, &options.count, 0,
		"Take N blocks of 2^ORDER pages, all or none, instead of one of SIZE", "N"},
	{"order", 'o', POPT_ARG_STRING, &options.order, 0,
		"Their order: 0 is 4K, 4 is 64K, 9 is 2M (default 0)", "ORDER"},
	{"mode", 'm', POPT_ARG_STRING, &options.mode, 0,
		"normal (default): look again at what is held; fast: go elsewhere at once", "MODE"},
	{"timeout", 't', POPT_ARG_STRING, &options.timeout, 0, "Give up after so long", "SECONDS"},
	{"no-zero", 'Z', POPT_ARG_NONE, &options.no_zero, 0,
		"Leave in the buffer what its borrower had there: faster, and it shows other "
		"programs' memory",
		NULL},
	{"hold", 0, POPT_ARG_NONE, &options.hold, 0,
		"Release it at a signal, or at the end of standard input if that is no terminal",
		NULL},
	{"fd", 0, POPT_ARG_STRING, &options.fd, 0,
		"Send a line of JSON and the descriptor through the Unix socket FD", "FD"},
	{"json", 'j', POPT_ARG_NONE, &options.json, 0, "Print the region's answer as JSON", NULL},
	POPT_TABLEEND};

static const struct cli_usage usage = {
	.command = "contig alloc",
	.args = "[OPTION...] SIZE [-- COMMAND [ARG...]]",
	.about =
		"Take a contiguous buffer out of a region, while programs go on using it.\n"
		"\n"
		"Without --hold or a COMMAND the buffer is yours until 'contig release', and its\n"
		"number is printed. A COMMAND finds it through CONTIG_BUFFER_FD, _OFFSET, _BYTES "
		"(and\n"
		"_EXTENTS, OFFSET:BYTES,..., if it is several pieces of the file); it is released\n"
		"when the command ends.",
	.after = "Exit status: 0, or the COMMAND's; 1 failed, 2 wrong usage, 3 no such region,\n"
		 "4 no such run of memory or no room for what would have to move, 5 something in "
		 "the\n"
		 "way is held, 6 timed out, 7 cancelled; 126, 127: the command cannot be "
		 "executed.\n",
};

static json_t *answer;
static int buffer_fd = -1;

static int bad(const char *option, const char *text, const char *why)
{
	return cli_fail(EXIT_USAGE, "%s: '%s' %s", option, text, why);
}

static int put_size(json_t *request, const char *size)
{
	uint64_t bytes;
	const char *why = cli_parse_size(size, &bytes);

	if (why)
		return bad("SIZE", size, why);
	json_object_set_new(request, "bytes", json_integer((json_int_t)bytes));
	return EXIT_OK;
}

static int put_align(json_t *request)
{
	uint64_t align;
	const char *why = cli_parse_size(options.align, &align);

	if (!why && (align & (align - 1) || align < CTG_PAGE_SIZE))
		why = "is not a power of two of at least 4K";
	if (why)
		return bad("--align", options.align, why);
	json_object_set_new(request, "align", json_integer((json_int_t)align));
	return EXIT_OK;
}

static int put_blocks(json_t *request)
{
	uint64_t count = 0, order = 0;
	const char *why = cli_parse_number(options.count, 1, UINT32_MAX, &count);

	if (why)
		return bad("--count", options.count, why);
	if (options.order)
		why = cli_parse_number(options.order, 0, CTG_MAX_ORDER, &order);
	if (why)
		return bad("--order", options.order, why);
	json_object_set_new(request, "count", json_integer((json_int_t)count));
	json_object_set_new(request, "order", json_integer((json_int_t)order));
	return EXIT_OK;
}

static int put_how(json_t *request)
{
	uint64_t ns;

	if (options.align) {
		int status = put_align(request);

		if (status)
			return status;
	}
	if (options.mode && strcmp(options.mode, "normal") != 0 &&
		strcmp(options.mode, "fast") != 0)
		return bad("--mode", options.mode, "is neither normal nor fast");
	if (options.mode)
		json_object_set_new(request, "mode", json_string(options.mode));
	if (options.timeout) {
		const char *why = cli_parse_seconds(options.timeout, &ns);

		if (why)
			return bad("--timeout", options.timeout, why);
		json_object_set_new(request, "timeout_ns", json_integer((json_int_t)ns));
	}
	if (options.no_zero)
		json_object_set_new(request, "zero", json_false());
	return EXIT_OK;
}

/* The request, or NULL with *status. */
static json_t *make_request(const char *size, bool hold, bool fd, int *status)
{
	json_t *request = json_pack("{s:s}", "do", "alloc");

	if (!request) {
		*status = cli_fail(EXIT_FAILED, "out of memory");
		return NULL;
	}
	if (options.count && size)
		*status = cli_fail(EXIT_USAGE, "SIZE and --count exclude each other");
	else if (options.count)
		*status = put_blocks(request);
	else if (options.order)
		*status = cli_fail(EXIT_USAGE, "--order needs --count");
	else if (!size)
		*status = cli_fail(EXIT_USAGE, "SIZE is missing; see 'contig alloc --help'");
	else
		*status = put_size(request, size);
	if (*status == EXIT_OK)
		*status = put_how(request);
	if (*status) {
		json_decref(request);
		return NULL;
	}
	if (hold)
		json_object_set_new(request, "hold", json_true());
	if (fd)
		json_object_set_new(request, "fd", json_true());
	return request;
}

static const char *contiguity(void)
{
	const json_t *physical = json_object_get(answer, "physically_contiguous");

	if (json_is_true(physical))
		return "physically contiguous";
	return "contiguous in the region";
}

static void print_buffer(void)
{
	const json_t *blocks = json_object_get(answer, "blocks");
	uint64_t bytes = cli_u64(answer, "bytes");
	char size[CLI_SIZE_TEXT], took[CLI_SIZE_TEXT];

	if (options.json) {
		cli_print_json(answer);
		return;
	}
	printf("lease %" JSON_INTEGER_FORMAT ": ", (json_int_t)cli_u64(answer, "lease"));
	if (json_array_size(blocks) == 1)
		printf("%s at offset %" JSON_INTEGER_FORMAT ", %s", cli_size_text(bytes, size),
			(json_int_t)cli_u64(json_array_get(blocks, 0), "offset"), contiguity());
	else
		printf("%zu blocks, together %s", json_array_size(blocks),
			cli_size_text(bytes, size));
	printf("; %" JSON_INTEGER_FORMAT " frames moved in %s\n",
		(json_int_t)cli_u64(answer, "frames_moved"),
		cli_time_text(cli_u64(answer, "ns"), took));
}

/* ---- what is done with it -------------------------------------------------------------------- */

static int hold(struct ctg_client *client)
{
	struct pollfd wait[3];
	char waste[256];

	wait[0] = (struct pollfd){.fd = cli_ending_fd(), .events = POLLIN};
	wait[1] = (struct pollfd){.fd = ctg_client_fd(client), .events = POLLIN | POLLRDHUP};
	wait[2] = (struct pollfd){.fd = isatty(STDIN_FILENO) ? -1 : STDIN_FILENO, .events = POLLIN};
	for (;;) {
		if (poll(wait, 3, -1) < 0 && errno != EINTR)
			return cli_fail(EXIT_FAILED, "cannot wait: %s", strerror(errno));
		if (wait[0].revents)
			return EXIT_OK;
		if (wait[1].revents)
			return cli_fail(
				EXIT_NO_REGION, "the region has ended, and the buffer with it");
		if (wait[2].revents && read(STDIN_FILENO, waste, sizeof(waste)) <= 0)
			return EXIT_OK;
	}
}

/* The line that goes with the descriptor. */
static char *fd_line(void)
{
	json_t *line = json_pack("{s:O, s:O, s:O}", "lease", json_object_get(answer, "lease"),
		"bytes", json_object_get(answer, "bytes"), "extents",
		json_object_get(answer, "extents"));
	char *text = line ? json_dumps(line, JSON_COMPACT) : NULL;
	char *whole = NULL;

	json_decref(line);
	if (text && asprintf(&whole, "%s\n", text) < 0)
		whole = NULL;
	free(text);
	return whole;
}

/* Send all of text, the descriptor with its first byte. 0 or errno. */
static int send_fd(int socket, const char *text, int fd)
{
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} control = {.header = {.cmsg_len = CMSG_LEN(sizeof(int)),
			     .cmsg_level = SOL_SOCKET,
			     .cmsg_type = SCM_RIGHTS}};
	size_t left = strlen(text);

	memcpy(CMSG_DATA(&control.header), &fd, sizeof(fd));
	for (bool first = true; left; first = false) {
		struct iovec part = {.iov_base = (void *)(uintptr_t)text, .iov_len = left};
		struct msghdr message = {.msg_iov = &part,
			.msg_iovlen = 1,
			.msg_control = first ? &control : NULL,
			.msg_controllen = first ? sizeof(control) : 0};
		ssize_t n = sendmsg(socket, &message, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno;
		text += n;
		left -= (size_t)n;
	}
	return 0;
}

static int hand_over(struct ctg_client *client, int socket)
{
	char *line = fd_line();
	int error = line ? send_fd(socket, line, buffer_fd) : ENOMEM;
	json_t *released;

	free(line);
	if (error == 0)
		return EXIT_OK;
	/* Nobody knows of it: give it back. */
	cli_call(client,
		json_pack("{s:s, s:O}", "do", "release", "lease", json_object_get(answer, "lease")),
		&released, NULL);
	json_decref(released);
	return cli_fail(
		EXIT_FAILED, "--fd: cannot send the buffer, released it: %s", strerror(error));
}

static int set_number(const char *name, uint64_t value)
{
	char text[24];

	snprintf(text, sizeof(text), "%llu", (unsigned long long)value);
	return setenv(name, text, 1);
}

/* "OFFSET:BYTES,OFFSET:BYTES", to be freed; NULL: out of memory. */
static char *extents_text(const json_t *extents, size_t *size)
{
	const json_t *extent;
	char *list = NULL;
	FILE *out = open_memstream(&list, size);
	size_t i;

	if (!out)
		return NULL;
	json_array_foreach(extents, i, extent) fprintf(out, "%s%llu:%llu", i ? "," : "",
		(unsigned long long)cli_u64(extent, "offset"),
		(unsigned long long)cli_u64(extent, "bytes"));
	if (fclose(out) != 0) {
		free(list);
		list = NULL;
	}
	return list;
}

/* CONTIG_BUFFER_*: of the command's environment. 0 or an exit status. */
static int set_environment(void)
{
	const json_t *extents = json_object_get(answer, "extents");
	size_t size = 0, nr = json_array_size(extents);
	char *list = extents_text(extents, &size);
	uint64_t offset = cli_u64(json_array_get(extents, 0), "offset");
	int rc;

	if (!list)
		return cli_fail(EXIT_FAILED, "out of memory");
	if (size > MAX_ENV_STRING) {
		free(list);
		return cli_fail(EXIT_FAILED,
			"%zu pieces are too many for an environment variable; use --fd", nr);
	}
	rc = set_number("CONTIG_BUFFER_FD", (uint64_t)buffer_fd) |
	     set_number("CONTIG_BUFFER_BYTES", cli_u64(answer, "bytes")) |
	     set_number("CONTIG_BUFFER_OFFSET", offset);
	if (nr == 1)
		unsetenv("CONTIG_BUFFER_EXTENTS");
	else
		rc |= setenv("CONTIG_BUFFER_EXTENTS", list, 1);
	free(list);
	if (rc)
		return cli_fail(EXIT_FAILED, "cannot set the environment: %s", strerror(errno));
	return 0;
}

static int let_through(void *arg, const char *message)
{
	int flags = fcntl(buffer_fd, F_GETFD);

	(void)arg;
	(void)message;
	if (flags < 0 || fcntl(buffer_fd, F_SETFD, flags & ~FD_CLOEXEC) < 0)
		return cli_fail(EXIT_FAILED, "cannot pass the buffer on: %s", strerror(errno));
	return 0;
}

static void region_ended(void)
{
	cli_note("the region has ended; the command keeps the memory that it has mapped");
}

static int run_command(struct ctg_client *client, const char **command)
{
	struct cli_child child;
	int status = set_environment(), error;

	if (status)
		return status;
	error = cli_child_start(&child, command, let_through, NULL, false);
	if (error)
		return cli_fail(EXIT_FAILED, "cannot start a process: %s", strerror(-error));
	status = cli_child_go(&child, "go");
	if (status == 0)
		status = cli_child_wait(&child, ctg_client_fd(client), region_ended);
	cli_child_end(&child);
	return status;
}

/* A socket that descriptors can go through. */
static int check_socket(uint64_t *fd)
{
	const char *why = cli_parse_number(options.fd, 0, INT32_MAX, fd);
	struct stat stat;

	if (why)
		return bad("--fd", options.fd, why);
	if (fstat((int)*fd, &stat) != 0)
		return bad("--fd", options.fd, "is not an open descriptor");
	if (!S_ISSOCK(stat.st_mode))
		return bad("--fd", options.fd, "is not a Unix socket");
	return EXIT_OK;
}

static int take(json_t *request, bool keep, const char **command, uint64_t socket)
{
	struct cli_progress progress;
	struct ctg_client *client;
	int status = cli_connect(options.from, &client);

	if (status) {
		json_decref(request);
		return status;
	}
	cli_progress_start(&progress, "taking the buffer");
	status = cli_call(client, request, &answer, &buffer_fd);
	cli_progress_end(&progress);
	if (status == EXIT_OK && buffer_fd < 0 && (command || options.fd))
		status = cli_fail(EXIT_FAILED, "the region sent no descriptor");
	if (status == EXIT_OK && !command) {
		print_buffer();
		status = cli_flush();
	} else if (status && options.json && answer) {
		cli_print_json(answer);
	}
	if (status == EXIT_OK && command)
		status = run_command(client, command);
	else if (status == EXIT_OK && keep)
		status = hold(client);
	else if (status == EXIT_OK && options.fd)
		status = hand_over(client, (int)socket);
	ctg_client_close(client);
	return status;
}

int alloc_main(int argc, const char **argv)
{
	const char **command = cli_cut(&argc, argv), **args;
	int status = cli_parse(&usage, argc, argv, table, false, &args);
	uint64_t socket = 0;
	json_t *request;

	if (status >= 0)
		return status;
	if (cli_count(args) > 1)
		return cli_fail(EXIT_USAGE,
			"'%s' is one argument too many; see 'contig alloc --help'", args[1]);
	if (command && !*command)
		return cli_fail(EXIT_USAGE, "a command is missing after '--'");
	if (!!command + !!options.hold + !!options.fd > 1)
		return cli_fail(EXIT_USAGE, "--hold, --fd and a COMMAND exclude each other");
	if (options.fd)
		status = check_socket(&socket);
	else if (command)
		status = cli_program_check(command[0]);
	else
		status = EXIT_OK;
	if (status)
		return status;
	request = make_request(args[0], command || options.hold, command || options.fd, &status);
	if (!request)
		return status;
	return take(request, options.hold, command, socket);
}
