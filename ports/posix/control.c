/* SPDX-License-Identifier: MIT */
/*
 * Control connections: JSON requests are taken apart with every field checked, carried out, and
 * answered. A message that is not a request gets an error and the connection goes on; one that is
 * too long to be one ends it.
 */
#define _GNU_SOURCE
#include "state.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* An answer larger than this goes as a file: a message must fit the socket's buffer whole. */
#define ANSWER_INLINE_BYTES 32768
#define MAX_ALIGN ((uint64_t)CTG_PAGE_SIZE << CTG_MAX_ORDER)
#define MAX_BLOCKS ((uint64_t)1 << 22)

enum field_type {
	FIELD_END,
	FIELD_BOOL,
	FIELD_NUMBER, /* into a uint64_t */
	FIELD_ORDER,  /* a number, into an unsigned */
	FIELD_MODE,   /* "normal" or "fast", into a bool that says fast */
};
/* A member that a request may have, and where it goes. */
struct field {
	const char *name;
	enum field_type type;
	void *to;
	uint64_t min, max;
	bool negate; /* BOOL: the request says the opposite of what is stored */
	bool *present;
};

static int field_read(const struct field *f, const json_t *value, struct ctg_error *error)
{
	json_int_t n = json_integer_value(value);
	const char *mode = json_string_value(value);

	switch (f->type) {
	case FIELD_BOOL:
		if (!json_is_boolean(value))
			break;
		*(bool *)f->to = json_is_true(value) != f->negate;
		return 0;
	case FIELD_NUMBER:
	case FIELD_ORDER:
		if (!json_is_integer(value))
			break;
		if (n < 0 || (uint64_t)n < f->min || (uint64_t)n > f->max) {
			posix_error(error, -EINVAL, "\"%s\" must be from %llu to %llu", f->name,
				(unsigned long long)f->min, (unsigned long long)f->max);
			return -EINVAL;
		}
		if (f->type == FIELD_ORDER)
			*(unsigned *)f->to = (unsigned)n;
		else
			*(uint64_t *)f->to = (uint64_t)n;
		return 0;
	case FIELD_MODE:
		if (mode == NULL || (strcmp(mode, "normal") != 0 && strcmp(mode, "fast") != 0)) {
			posix_error(error, -EINVAL, "\"mode\" must be \"normal\" or \"fast\"");
			return -EINVAL;
		}
		*(bool *)f->to = strcmp(mode, "fast") == 0;
		return 0;
	case FIELD_END:
		break;
	}
	posix_error(error, -EINVAL, "\"%s\" must be %s", f->name,
		f->type == FIELD_BOOL ? "true or false" : "a whole number");
	return -EINVAL;
}

/* What a request says, as one may show it to people. */
static const char *plain(const char *text, char *out, size_t size)
{
	size_t i;

	for (i = 0; i + 1 < size && text[i] != '\0'; i++)
		out[i] = text[i] < ' ' || text[i] > '~' ? '?' : text[i];
	out[i] = '\0';
	return out;
}

static int fields_read(const json_t *object, const struct field *fields, struct ctg_error *error)
{
	char shown[41];
	const char *key;
	json_t *value;
	void *i;

	/* jansson takes the object as not const for its iterators only. */
	for (i = json_object_iter((json_t *)(uintptr_t)object); i != NULL;
		i = json_object_iter_next((json_t *)(uintptr_t)object, i)) {
		const struct field *f = fields;

		key = json_object_iter_key(i);
		value = json_object_iter_value(i);
		if (strcmp(key, "do") == 0)
			continue;
		while (f->type != FIELD_END && strcmp(f->name, key) != 0)
			f++;
		if (f->type == FIELD_END) {
			posix_error(error, -EINVAL, "unknown member \"%s\" in a request to %s",
				plain(key, shown, sizeof(shown)),
				json_string_value(json_object_get(object, "do")));
			return -EINVAL;
		}
		if (field_read(f, value, error) != 0)
			return -EINVAL;
		if (f->present != NULL)
			*f->present = true;
	}
	return 0;
}

static int parse_alloc(const json_t *object, struct control_request *out, struct ctg_error *error)
{
	bool has_order = false;
	const struct field fields[] = {
		{.name = "bytes",
			.type = FIELD_NUMBER,
			.to = &out->bytes,
			.min = 1,
			.max = INT64_MAX},
		{.name = "align", .type = FIELD_NUMBER, .to = &out->align, .max = MAX_ALIGN},
		{.name = "count", .type = FIELD_NUMBER, .to = &out->count, .max = MAX_BLOCKS},
		{.name = "order",
			.type = FIELD_ORDER,
			.to = &out->order,
			.max = CTG_MAX_ORDER,
			.present = &has_order},
		{.name = "mode", .type = FIELD_MODE, .to = &out->fast},
		{.name = "timeout_ns",
			.type = FIELD_NUMBER,
			.to = &out->timeout_ns,
			.max = INT64_MAX},
		{.name = "zero", .type = FIELD_BOOL, .to = &out->no_zero, .negate = true},
		{.name = "hold", .type = FIELD_BOOL, .to = &out->hold},
		{.name = "fd", .type = FIELD_BOOL, .to = &out->fd},
		{.type = FIELD_END},
	};

	if (fields_read(object, fields, error) != 0)
		return -EINVAL;
	if ((out->bytes != 0) == (out->count != 0)) {
		posix_error(error, -EINVAL,
			"say how much: either \"bytes\", or \"count\" and \"order\"");
		return -EINVAL;
	}
	if (has_order && out->count == 0) {
		posix_error(error, -EINVAL, "\"order\" needs \"count\"");
		return -EINVAL;
	}
	if ((out->align & (out->align - 1)) != 0) {
		posix_error(error, -EINVAL, "\"align\" must be a power of two");
		return -EINVAL;
	}
	return 0;
}

static int parse_fields(const json_t *object, struct control_request *out, struct ctg_error *error)
{
	const struct field none[] = {{.type = FIELD_END}};
	const struct field stat[] = {
		{.name = "reset_stall", .type = FIELD_BOOL, .to = &out->reset_stall},
		{.type = FIELD_END},
	};
	const struct field release[] = {
		{.name = "lease", .type = FIELD_NUMBER, .to = &out->lease, .max = INT64_MAX},
		{.name = "block",
			.type = FIELD_NUMBER,
			.to = &out->block,
			.max = MAX_BLOCKS,
			.present = &out->has_block},
		{.type = FIELD_END},
	};

	switch (out->verb) {
	case CONTROL_STAT:
		return fields_read(object, stat, error);
	case CONTROL_ALLOC:
		return parse_alloc(object, out, error);
	case CONTROL_RELEASE:
		if (json_object_get(object, "lease") == NULL) {
			posix_error(error, -EINVAL, "say which: \"lease\" is missing");
			return -EINVAL;
		}
		return fields_read(object, release, error);
	case CONTROL_MAP:
	case CONTROL_LEASES:
		break;
	}
	return fields_read(object, none, error);
}

int control_parse(
	const char *message, size_t bytes, struct control_request *out, struct ctg_error *error)
{
	static const char *const verbs[] = {
		[CONTROL_STAT] = "stat",
		[CONTROL_MAP] = "map",
		[CONTROL_ALLOC] = "alloc",
		[CONTROL_RELEASE] = "release",
		[CONTROL_LEASES] = "leases",
	};
	json_error_t where;
	json_t *object;
	const char *verb;
	size_t i;
	int err;

	memset(out, 0, sizeof(*out));
	object = json_loadb(message, bytes, JSON_REJECT_DUPLICATES, &where);
	if (object == NULL) {
		/* The text may quote what came: printable or not. */
		posix_error(error, -EINVAL, "not a JSON request (byte %d)", where.position);
		return -EINVAL;
	}
	verb = json_string_value(json_object_get(object, "do"));
	for (i = 0; verb != NULL && i < sizeof(verbs) / sizeof(verbs[0]); i++)
		if (strcmp(verb, verbs[i]) == 0)
			break;
	if (verb == NULL || i == sizeof(verbs) / sizeof(verbs[0])) {
		posix_error(
			error, -EINVAL, "\"do\" must be one of stat, map, alloc, release, leases");
		json_decref(object);
		return -EINVAL;
	}
	out->verb = (enum control_verb)i;
	err = parse_fields(object, out, error);
	json_decref(object);
	return err;
}

/* ---- answers ------------------------------------------------------------------------------- */

json_t *control_failure(const struct ctg_error *error, json_t *report)
{
	const char *name = strerrorname_np(-error->code);
	json_t *answer = json_pack("{s:b, s:i, s:s}", "ok", 0, "error", error->code, "name",
		name != NULL ? name : "EUNKNOWN");

	json_object_set_new(answer, "text", json_string(error->text));
	if (report != NULL)
		json_object_set_new(answer, "report", report);
	return answer;
}

/* A sealed file with the text: its reader can check that it will not change. */
static int answer_file(const char *text, size_t bytes)
{
	int fd = memfd_create("contig-answer", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	size_t done = 0;
	ssize_t n;

	if (fd < 0)
		return -errno;
	while (done < bytes) {
		n = write(fd, text + done, bytes - done);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			break;
		done += (size_t)n;
	}
	if (done < bytes ||
		fcntl(fd, F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) !=
			0) {
		close(fd);
		return -ENOMEM;
	}
	return fd;
}

static int send_message(int socket, const char *text, size_t bytes, const int *fds, size_t nr)
{
	union {
		struct cmsghdr align;
		char bytes[CMSG_SPACE(2 * sizeof(int))];
	} control;
	struct iovec iov = {.iov_base = (void *)(uintptr_t)text, .iov_len = bytes};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
	struct cmsghdr *head;
	ssize_t n;

	if (nr != 0) {
		memset(&control, 0, sizeof(control));
		message.msg_control = control.bytes;
		message.msg_controllen = CMSG_SPACE(nr * sizeof(int));
		head = CMSG_FIRSTHDR(&message);
		head->cmsg_level = SOL_SOCKET;
		head->cmsg_type = SCM_RIGHTS;
		head->cmsg_len = CMSG_LEN(nr * sizeof(int));
		memcpy(CMSG_DATA(head), fds, nr * sizeof(int));
	}
	do
		n = sendmsg(socket, &message, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n == (ssize_t)bytes ? 0 : -EPIPE;
}

/* 0 or negative errno: the answer has not gone out, and the connection ends. */
static int send_answer(int socket, json_t *answer, int fd)
{
	char *text = json_dumps(answer, JSON_COMPACT);
	size_t bytes;
	char note[80];
	int fds[2], err;

	if (text == NULL)
		return -ENOMEM;
	bytes = strlen(text);
	if (bytes <= ANSWER_INLINE_BYTES) {
		err = send_message(socket, text, bytes, &fd, fd >= 0 ? 1 : 0);
	} else {
		fds[0] = answer_file(text, bytes);
		fds[1] = fd;
		err = fds[0];
		if (err >= 0) {
			snprintf(note, sizeof(note), "{\"ok\":true,\"in_fd\":true,\"bytes\":%zu}",
				bytes);
			err = send_message(socket, note, strlen(note), fds, fd >= 0 ? 2 : 1);
			close(fds[0]);
		}
	}
	free(text);
	return err;
}

static json_t *carry_out(
	struct connection *connection, const struct control_request *request, int *fd)
{
	struct ctg_server *server = connection->server;

	*fd = -1;
	switch (request->verb) {
	case CONTROL_STAT:
		return report_stat(server, request->reset_stall, false);
	case CONTROL_MAP:
		return report_stat(server, false, true);
	case CONTROL_ALLOC:
		return lease_alloc(connection, request, fd);
	case CONTROL_RELEASE:
		return lease_release(server, request);
	case CONTROL_LEASES:
		return lease_list(server);
	}
	return NULL;
}

/*
 * Requests until the connection ends. Returns whether the last answer was read: a socket that is
 * closed with something unread in it resets the connection.
 */
static bool control_loop(struct connection *connection, char *message)
{
	struct control_request request;
	struct ctg_error error;
	json_t *answer;
	ssize_t n;
	int fd, err;

	for (;;) {
		n = recv(connection->fd, message, PROTO_MAX_CONTROL, MSG_TRUNC);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return n == 0 || errno != ECONNRESET;
		/* Whoever asks again has read what came before. */
		connection->unread_lease = 0;
		fd = -1;
		if (n > PROTO_MAX_CONTROL) {
			posix_error(&error, -EMSGSIZE, "a request has at most %d bytes",
				PROTO_MAX_CONTROL);
			answer = control_failure(&error, NULL);
		} else if (control_parse(message, (size_t)n, &request, &error) != 0) {
			answer = control_failure(&error, NULL);
		} else {
			answer = carry_out(connection, &request, &fd);
		}
		err = answer == NULL ? -ENOMEM : send_answer(connection->fd, answer, fd);
		json_decref(answer);
		if (err != 0)
			return false;
	}
}

void control_serve(struct connection *connection)
{
	char *message = malloc(PROTO_MAX_CONTROL);
	bool read = true;

	if (message != NULL)
		read = control_loop(connection, message);
	free(message);
	lease_connection_end(connection, !read);
}
