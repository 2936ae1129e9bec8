/* SPDX-License-Identifier: MIT */
/*
 * A borrower written by hand, to test sessions with: a process of its own (the test program run
 * again as `PROGRAM borrower NAME`) that does one thing a line of commands on its stdin says, and
 * answers each with a number.
 */
#ifndef CONTIG_TESTS_BORROWER_H
#define CONTIG_TESTS_BORROWER_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define BORROWER_CHUNKS 128 /* of its window */

struct borrower {
	pid_t pid;
	int in, out;
};

/* The process's side. Commands (A: first chunk, N: chunks):
 *   map A N, unmap A N, privatise A N, lend A N   the request; answers its error
 *   done            what the last request has done, in chunks
 *   fill A N S      write a pattern that depends on S; check A N S: 1 if it is there
 *   churn A N       start threads that write and check; calm: stop them, 1 if nothing was lost
 *   count K B       report B bytes of kind K
 *   hint            wait for a hint
 *   request SIZE    send that many bytes of nonsense as a request; 0 if the connection ends then
 *   ack             answer the next command with nonsense
 *   mute            the agent goes away with the next command, the process stays
 *   deaf            the agent never carries out the next command
 *   vfork           leave a vfork child with the address space, for as long as stdin is open
 *   exec            become a process that waits for the end of stdin
 */
int borrower_main(const char *name);

/* The test's side. */
void borrower_start(struct borrower *b, const char *name);
/* Send a command; and wait for the answer. printf-like. */
void borrower_tell(struct borrower *b, const char *format, ...)
	__attribute__((format(printf, 2, 3)));
long borrower_answer(struct borrower *b);
long borrower_do(struct borrower *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Send SIGKILL and do not wait. */
void borrower_kill(struct borrower *b);
/* Let it end (kill it if it does not live any more) and reap it. */
void borrower_end(struct borrower *b);

#endif
