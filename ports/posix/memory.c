/* SPDX-License-Identifier: MIT */
/*
 * How much memory there is, by /proc and the control groups. Asked before a file of ours grows: the
 * kernel would not refuse it when memory is short, it would look for a process to kill.
 */
#define _GNU_SOURCE
#include "region.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TEXT_BYTES 4096

/* All of a small file, as text. false: it cannot be read. */
static bool read_text(const char *path, char *text)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n = fd < 0 ? -1 : read(fd, text, TEXT_BYTES - 1);

	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = '\0';
	return n > 0;
}

/* The number that follows a word at the start of a line, UINT64_MAX if it is not there. */
static uint64_t field_of(const char *text, const char *field)
{
	size_t length = strlen(field);

	for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
		line += *line == '\n';
		if (strncmp(line, field, length) == 0 &&
			(line[length] == ':' || line[length] == ' '))
			return strtoull(line + length + 1, NULL, 10);
	}
	return UINT64_MAX;
}

uint64_t posix_meminfo(const char *field)
{
	char text[TEXT_BYTES];
	uint64_t kib = read_text("/proc/meminfo", text) ? field_of(text, field) : UINT64_MAX;

	return kib > UINT64_MAX / 1024 ? UINT64_MAX : kib * 1024;
}

uint64_t posix_read_number(const char *path)
{
	char text[TEXT_BYTES], *end;
	uint64_t value;

	if (!read_text(path, text))
		return UINT64_MAX;
	value = strtoull(text, &end, 10);
	return end == text ? UINT64_MAX : value;
}

int posix_write_number(const char *path, uint64_t value)
{
	char text[32];
	int fd = open(path, O_WRONLY | O_CLOEXEC), ret = 0;
	int n = snprintf(text, sizeof(text), "%" PRIu64, value);

	if (fd < 0)
		return -errno;
	if (write(fd, text, (size_t)n) != n)
		ret = -errno;
	close(fd);
	return ret;
}

/* ---- control groups ---------------------------------------------------------------------- */

/* How one version of the interface calls things. */
struct group_files {
	const char *root, *limit, *used, *idle;
};

/* What a group may still take. What it can drop at once is not counted as taken. */
static uint64_t group_left(const struct group_files *files, const char *group)
{
	char path[TEXT_BYTES + 128], text[TEXT_BYTES];
	uint64_t limit, used, idle;

	snprintf(path, sizeof(path), "%s%s/%s", files->root, group, files->limit);
	limit = posix_read_number(path); /* "max" is no number */
	if (limit == UINT64_MAX)
		return UINT64_MAX;
	snprintf(path, sizeof(path), "%s%s/%s", files->root, group, files->used);
	used = posix_read_number(path);
	snprintf(path, sizeof(path), "%s%s/memory.stat", files->root, group);
	idle = read_text(path, text) ? field_of(text, files->idle) : UINT64_MAX;
	if (used == UINT64_MAX)
		return UINT64_MAX;
	if (idle != UINT64_MAX)
		used -= idle < used ? idle : used;
	return limit > used ? limit - used : 0;
}

/* The least over a group and those it is in. */
static uint64_t groups_left(const struct group_files *files, char *group)
{
	uint64_t least = UINT64_MAX;

	for (;;) {
		uint64_t left = group_left(files, strcmp(group, "/") == 0 ? "" : group);
		char *slash = strrchr(group, '/');

		if (left < least)
			least = left;
		if (slash == NULL || group[1] == '\0')
			return least;
		slash[slash == group] = '\0';
	}
}

/* A line of /proc/self/cgroup: "number:controllers:group". */
static uint64_t line_left(char *line)
{
	static const struct group_files unified[] = {
		{"/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"},
		{"/sys/fs/cgroup/unified", "memory.max", "memory.current", "inactive_file"}};
	static const struct group_files legacy = {"/sys/fs/cgroup/memory", "memory.limit_in_bytes",
		"memory.usage_in_bytes", "total_inactive_file"};
	char *controllers = strchr(line, ':'), *group, copy[TEXT_BYTES];
	uint64_t left;

	group = controllers == NULL ? NULL : strchr(controllers + 1, ':');
	if (group == NULL || group[1] != '/')
		return UINT64_MAX;
	*group++ = '\0';
	controllers++;
	if (strcmp(controllers, "memory") == 0)
		return groups_left(&legacy, group);
	if (*controllers != '\0')
		return UINT64_MAX;
	snprintf(copy, sizeof(copy), "%s", group);
	left = groups_left(&unified[0], copy);
	return left != UINT64_MAX ? left : groups_left(&unified[1], group);
}

uint64_t posix_memory_available(void)
{
	uint64_t least = posix_meminfo("MemAvailable");
	char text[TEXT_BYTES], *next = text;

	if (!read_text("/proc/self/cgroup", text))
		return least;
	while (next != NULL && *next != '\0') {
		char *line = next;
		uint64_t left;

		next = strchr(line, '\n');
		if (next != NULL)
			*next++ = '\0';
		left = line_left(line);
		if (left < least)
			least = left;
	}
	return least;
}
