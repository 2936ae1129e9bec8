/* SPDX-License-Identifier: MIT */
/* Sizes, numbers and times, as people write and read them. */
#include "cli.h"
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_SECOND 1000000000.0

/* The decimal digits at text; *end is behind them. NULL or why not. */
static const char *parse_digits(const char *text, uint64_t *number, const char **end)
{
	uint64_t n = 0;

	if (!*text)
		return "is empty";
	if (*text == '-')
		return "is negative";
	if (!isdigit((unsigned char)*text))
		return "is not a number";
	for (; isdigit((unsigned char)*text); text++) {
		if (__builtin_mul_overflow(n, 10, &n) ||
			__builtin_add_overflow(n, (uint64_t)(*text - '0'), &n))
			return "is too large";
	}
	*number = n;
	*end = text;
	return NULL;
}

const char *cli_parse_size(const char *text, uint64_t *bytes)
{
	static const char units[] = "KMGTPE";
	const char *end, *why = parse_digits(text, bytes, &end);
	const char *unit;

	if (why)
		return strcmp(why, "is not a number") == 0 ? "is not a size such as 300M" : why;
	unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
	if (unit) {
		unsigned shift = 10 * (unsigned)(unit - units + 1);

		if (shift >= 64 || *bytes > UINT64_MAX >> shift)
			return "is too large";
		*bytes <<= shift;
		end++;
		if (*end == 'i')
			end++;
	}
	if (*end == 'B')
		end++;
	if (*end)
		return "is not a size such as 300M";
	if (*bytes == 0)
		return "is zero";
	if (*bytes > INT64_MAX)
		return "is too large";
	return NULL;
}

const char *cli_parse_number(const char *text, uint64_t min, uint64_t max, uint64_t *number)
{
	const char *end, *why = parse_digits(text, number, &end);

	if (why)
		return why;
	if (*end)
		return "is not a number";
	if (*number < min)
		return min == 1 ? "is zero" : "is too small";
	return *number > max ? "is too large" : NULL;
}

const char *cli_parse_seconds(const char *text, uint64_t *ns)
{
	char *end;
	double seconds;

	if (!isdigit((unsigned char)*text) && *text != '.')
		return *text == '-' ? "is negative" : "is not a number of seconds";
	seconds = strtod(text, &end);
	if (*end || !isfinite(seconds) || text[strspn(text, "0123456789.")])
		return "is not a number of seconds";
	if (seconds > 1e9)
		return "is too large";
	*ns = (uint64_t)(seconds * NS_PER_SECOND);
	return *ns ? NULL : "is zero";
}

char *cli_size_text(uint64_t bytes, char text[CLI_SIZE_TEXT])
{
	static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
	double value = (double)bytes;
	unsigned unit = 0;

	for (; value >= 1024 && unit < 6; unit++)
		value /= 1024;
	/* 8 GiB in 512 GiB reads well; 1.4 GiB must not read 1 GiB. */
	snprintf(text, CLI_SIZE_TEXT, value >= 100 || value == floor(value) ? "%.0f %s" : "%.1f %s",
		value, units[unit]);
	return text;
}

char *cli_time_text(uint64_t ns, char text[CLI_SIZE_TEXT])
{
	static const char *const units[] = {"ns", "us", "ms", "s"};
	double value = (double)ns;
	unsigned unit = 0;

	for (; value >= 1000 && unit < 3; unit++)
		value /= 1000;
	snprintf(text, CLI_SIZE_TEXT, value >= 100 || unit == 0 ? "%.0f %s" : "%.1f %s", value,
		units[unit]);
	return text;
}
