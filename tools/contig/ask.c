/* SPDX-License-Identifier: MIT */
/* Asking a region: connections, requests, and what answers say. */
#include "cli.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int status_of(int error)
{
	switch (error) {
	case -ENOENT:
	case -ECONNREFUSED:
	case -ECONNRESET:
	case -EPIPE:
		return EXIT_NO_REGION;
	case -ENOMEM:
		return EXIT_NO_MEMORY;
	case -EBUSY:
		return EXIT_BUSY;
	case -ETIMEDOUT:
		return EXIT_TIMEOUT;
	case -EINTR:
		return EXIT_CANCELLED;
	default:
		return EXIT_FAILED;
	}
}

/* The name of the only region there is, borrowed from list; NULL after saying why not. */
static const char *only_region(json_t *list)
{
	const char *found = NULL;
	unsigned nr = 0;
	json_t *entry;
	size_t i;

	json_array_foreach(list, i, entry)
	{
		if (!json_is_true(json_object_get(entry, "live")))
			continue;
		found = cli_string(entry, "name");
		nr++;
	}
	if (nr == 1)
		return found;
	if (nr == 0)
		cli_note("no region is being served; 'contig run' makes one");
	else
		cli_note("%u regions are being served, so say which; 'contig ps' lists them", nr);
	return NULL;
}

int cli_connect(const char *name, struct ctg_client **client)
{
	struct ctg_error error = {0};
	json_t *list = NULL;
	int rc;

	if (!name) {
		list = ctg_client_list();
		if (!list)
			return cli_fail(EXIT_FAILED, "cannot list the regions: out of memory");
		name = only_region(list);
		if (!name) {
			json_decref(list);
			return EXIT_NO_REGION;
		}
	}
	rc = ctg_client_connect(name, client, &error);
	json_decref(list);
	if (rc)
		return cli_fail(status_of(rc), "%s", error.text);
	return EXIT_OK;
}

int cli_call(struct ctg_client *client, json_t *request, json_t **answer, int *fd)
{
	struct ctg_error error = {0};
	int rc;

	*answer = NULL;
	if (fd)
		*fd = -1;
	if (!request)
		return cli_fail(EXIT_FAILED, "out of memory");
	rc = ctg_client_call(client, request, answer, fd, &error);
	json_decref(request);
	if (rc)
		return cli_fail(rc == -ENOMEM ? EXIT_FAILED : EXIT_NO_REGION, "%s", error.text);
	if (json_is_true(json_object_get(*answer, "ok")))
		return EXIT_OK;
	rc = (int)json_integer_value(json_object_get(*answer, "error"));
	/* -ENOENT here is a lease or block that is not there; the region is. */
	return cli_fail(
		rc == -ENOENT ? EXIT_FAILED : status_of(rc), "%s", cli_string(*answer, "text"));
}

int cli_ask(const char *name, json_t *request, json_t **answer)
{
	struct ctg_client *client;
	int status = cli_connect(name, &client);

	*answer = NULL;
	if (status) {
		json_decref(request);
		return status;
	}
	status = cli_call(client, request, answer, NULL);
	ctg_client_close(client);
	return status;
}

const json_t *cli_get(const json_t *object, const char *path)
{
	char key[64];

	while (object && *path) {
		size_t n = strcspn(path, ".");

		if (n >= sizeof(key))
			return NULL;
		memcpy(key, path, n);
		key[n] = 0;
		object = json_object_get(object, key);
		path += n + (path[n] == '.');
	}
	return object;
}

uint64_t cli_u64(const json_t *object, const char *path)
{
	json_int_t n = json_integer_value(cli_get(object, path));

	return n > 0 ? (uint64_t)n : 0;
}

double cli_real(const json_t *object, const char *path)
{
	return json_number_value(cli_get(object, path));
}

const char *cli_string(const json_t *object, const char *path)
{
	const char *text = json_string_value(cli_get(object, path));

	return text ? text : "";
}

int cli_flush(void)
{
	if (fflush(stdout) != 0 || ferror(stdout))
		return cli_fail(EXIT_FAILED, "cannot write the output: %s", strerror(errno));
	return EXIT_OK;
}

int cli_print_json(const json_t *value)
{
	if (json_dumpf(value, stdout, JSON_INDENT(2)) != 0 || putchar('\n') == EOF)
		return cli_fail(EXIT_FAILED, "cannot write the output: %s", strerror(errno));
	return cli_flush();
}
