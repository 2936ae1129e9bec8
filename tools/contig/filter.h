/* SPDX-License-Identifier: MIT */
/* The system calls that a borrower does not get: those that let the kernel or a device hold pages
 * of its heap where Contig cannot see it. docs/unseen-pins.md has the list for users. */
#ifndef CONTIG_FILTER_H
#define CONTIG_FILTER_H

#include <contig/posix.h>

/*
 * Install the filter on the calling process, which must have one thread; it is inherited by all
 * that it forks and executes. allow_unseen_pins: do nothing. A process without CAP_SYS_ADMIN also
 * gets no_new_privs: without it the kernel refuses the filter. Returns 0; negative errno with
 * error->text (error may be NULL).
 */
int contig_filter_install(bool allow_unseen_pins, struct ctg_error *error);

#endif
