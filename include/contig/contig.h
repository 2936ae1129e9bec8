/* SPDX-License-Identifier: MIT */
/* All of the core's public API. */
#ifndef CONTIG_CONTIG_H
#define CONTIG_CONTIG_H

#include <contig/types.h>
#include <contig/port.h>
#include <contig/machine.h>
#include <contig/group.h>
#include <contig/mm.h>
#include <contig/notifier.h>
#include <contig/cma.h>
#include <contig/pin.h>
#include <contig/stat.h>

#endif
