/* SPDX-License-Identifier: MIT */
/*
 * What goes over a region's socket (AF_UNIX, SOCK_SEQPACKET). The first message of a connection
 * says what it is:
 *
 *   PROTO_CALL     a borrower's requests: proto_request, answered by proto_reply, one at a time
 *   PROTO_AGENT    the same borrower's agent: the server sends proto_command, it answers proto_ack
 *   PROTO_CONTROL  the contig tool: JSON objects, one a message, answered by one JSON object
 *
 * A borrower connects PROTO_CALL first, gets a session number, then PROTO_AGENT with it. Everything a
 * client sends is checked as hostile: exact lengths, known kinds, ranges inside its window. The peer
 * must have the server's uid or be root (SO_PEERCRED); its pid is what the kernel says.
 */
#ifndef CONTIG_POSIX_PROTO_H
#define CONTIG_POSIX_PROTO_H

#include "space.h"

#define PROTO_MAGIC 0x43544731u /* "CTG1" */
#define PROTO_VERSION 1u
#define PROTO_MAX_CONTROL 65536 /* bytes of one JSON message */
#define PROTO_NAME_MAX 64       /* bytes of a region's name */
#define PROTO_ENV_SOCKET "CONTIG_SOCKET" /* path of the socket, for the preload library */

enum proto_role {
	PROTO_CALL = 1,
	PROTO_AGENT,
	PROTO_CONTROL,
};

struct proto_hello {
	uint32_t magic, version;
	uint32_t role;
	uint32_t kernel_faults; /* AGENT: a userfaultfd comes with this message and serves the
				   kernel's faults too; 0: none comes */
	uint64_t session;       /* AGENT: from proto_welcome */
	uint64_t window, window_bytes; /* CALL */
	int32_t agent_tids[2];  /* CALL: the two service threads */
};

/* To CALL: with the region's descriptor and, if there is one, the spill zone's (SCM_RIGHTS). */
struct proto_welcome {
	uint32_t magic, version;
	int32_t error; /* negative errno: refused; the connection ends */
	uint32_t nr_files;
	uint64_t session;
	uint64_t chunk_bytes; /* unit of map and unmap: 2 MiB */
	int32_t stopper_pid;  /* for PR_SET_PTRACER; 0: none */
	uint32_t spare;
};

enum proto_request_kind {
	PROTO_MAP = 1,   /* back whole chunks with zeroed lent memory; -ENOMEM: the region is full */
	PROTO_UNMAP,     /* give whole chunks back */
	PROTO_PRIVATISE, /* whole chunks become ordinary memory (before fork, mprotect, ...) */
	PROTO_LEND,      /* whole chunks of ordinary memory become lent memory */
	PROTO_COUNT,     /* addr: PROTO_COUNT_*; bytes: how much was served by ordinary memory */
};
/* Why memory was ordinary. Each message adds to the count of its kind. */
enum proto_count {
	PROTO_COUNT_FULL,   /* the region had no room */
	PROTO_COUNT_STICKY, /* the program changed rights or advice of it: not to be lent again */
	PROTO_COUNT_OTHER,  /* outside the window, or before it existed */
	PROTO_NR_COUNTS
};
struct proto_request {
	uint32_t kind;
	uint32_t spare;
	uint64_t addr, bytes;
};
struct proto_reply {
	int32_t error; /* 0 or a negative errno */
	uint32_t spare;
	uint64_t done; /* bytes that were done (PRIVATISE and LEND stop at the first error) */
};

/*
 * To AGENT: seq and the operations; the length says how many, which may be none: the agent is asked
 * whether it answers. Acknowledged one by one, in order. The first message to an agent is such an
 * empty command; requests sent on CALL before the agent is connected wait for it.
 */
struct proto_command {
	uint64_t seq;
	struct posix_op op[POSIX_MAX_OPS];
};
struct proto_ack {
	uint64_t seq;
	int32_t done;  /* operations done */
	int32_t error; /* of the one that was not */
};

/*
 * Control requests: {"do": "stat" | "map" | "alloc" | "release" | "leases", ...}.
 *   stat     {"reset_stall": bool}  true: begin the longest stalls anew
 *   map      {}                     adds "blocks" to the answer of stat
 *   alloc    {"bytes": N, "align": N, "count": N, "order": N, "mode": "normal" | "fast",
 *             "timeout_ns": N, "zero": bool, "hold": bool, "fd": bool}
 *            count > 0: count blocks of 2^order frames instead of one of bytes. hold: released
 *            when this connection ends. fd: the answer carries the region's descriptor.
 *   release  {"lease": N} or {"lease": N, "block": K}
 *   leases   {}
 * Answers: {"ok": true, ...} or {"ok": false, "error": -16, "name": "EBUSY", "text": "...",
 * "report": {...}}. Large answers come as a descriptor of a sealed memfd beside {"ok": true,
 * "in_fd": true, "bytes": N}; it comes before the region's descriptor if that comes too.
 * The members of the answers are described above the functions that make them: report.c (stat, map)
 * and lease.c (alloc, release, leases).
 */

/* runtime.c */
/* The private directory of sockets ($XDG_RUNTIME_DIR/contig, /run/contig-UID or /tmp/contig-UID), made
 * 0700 and checked to be ours if `create`. Writes the path; 0 or negative errno. */
int posix_runtime_dir(char *path, size_t size, bool create);
/* DIR/NAME.sock; -EINVAL: a name that is empty, too long, or has a slash or a leading dot. */
int posix_socket_path(const char *name, char *path, size_t size);

#endif
