/* SPDX-License-Identifier: MIT */
/*
 * A line on the terminal for what takes longer than a second.
 *
 * A process of its own writes it: the work itself may have to fork before it makes a thread (the
 * region's stopper), and a timer's signal would interrupt its system calls.
 */
#include "cli.h"
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void show(int gate, const char *what)
{
	static const char clear[] = "\r\033[K";
	struct pollfd wait = {.fd = gate, .events = POLLIN};
	unsigned seconds = 0;
	char line[160];

	/* A byte comes when the work is done, and the end of the pipe if its process is gone. */
	while (poll(&wait, 1, 1000) == 0) {
		int n = snprintf(
			line, sizeof(line), "%scontig: %s ... %u s", clear, what, ++seconds);

		if (write(STDERR_FILENO, line, (size_t)n) < 0)
			break;
	}
	if (seconds && write(STDERR_FILENO, clear, sizeof(clear) - 1) < 0)
		_exit(1);
	_exit(0);
}

void cli_progress_start(struct cli_progress *progress, const char *what)
{
	int ends[2];

	progress->pid = -1;
	progress->gate = -1;
	if (!isatty(STDERR_FILENO) || pipe2(ends, O_CLOEXEC) != 0)
		return;
	progress->pid = fork();
	if (progress->pid < 0) {
		close(ends[0]);
		close(ends[1]);
		return;
	}
	if (progress->pid == 0) {
		close(ends[1]);
		show(ends[0], what);
	}
	close(ends[0]);
	progress->gate = ends[1];
}

void cli_progress_end(struct cli_progress *progress)
{
	if (progress->gate < 0)
		return;
	/* Not by closing alone: a process that the work has made may hold a copy of the pipe. */
	if (write(progress->gate, "", 1) < 0)
		kill(progress->pid, SIGKILL);
	close(progress->gate);
	if (progress->pid > 0)
		waitpid(progress->pid, NULL, 0);
	progress->gate = -1;
	progress->pid = -1;
}
