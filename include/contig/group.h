/* SPDX-License-Identifier: MIT */
/*
 * Groups: a hierarchy of limits on how many frames their address spaces may use.
 *
 * A frame is charged once, to the group of the address space that it was allocated for, and to all
 * of its ancestors; it is uncharged when it is freed, whoever had it last. A migration moves the
 * charge along.
 *
 * A charge that a limit forbids is refused with -ENOSPC: -ENOMEM is for memory. Where an allocation
 * of several frames at once would exceed a limit, fewer are tried.
 */
#ifndef CONTIG_GROUP_H
#define CONTIG_GROUP_H

#include <contig/types.h>

#ifdef __cplusplus
extern "C" {
#endif

#define CTG_MAX_GROUPS 1024
#define CTG_NO_LIMIT UINT64_MAX

struct ctg_group;

/*
 * @parent: NULL: a root. @limit: frames; CTG_NO_LIMIT.
 * Returns 0, -EINVAL, -ENOSPC (CTG_MAX_GROUPS), -ENOMEM. Context: may sleep.
 */
int ctg_group_create(
	struct ctg *ctg, struct ctg_group *parent, uint64_t limit, struct ctg_group **out);
/* 0; -EINVAL (NULL); -EBUSY: it has children, address spaces, or charged frames. */
int ctg_group_destroy(struct ctg_group *group);
/* A limit below what is charged stops new charges only. */
void ctg_group_set_limit(struct ctg_group *group, uint64_t limit);

struct ctg_group_stat {
	uint64_t limit, charged, peak; /* frames, descendants included */
	uint64_t failed;               /* charges refused here */
};
void ctg_group_stat(const struct ctg_group *group, struct ctg_group_stat *out);

#ifdef __cplusplus
}
#endif
#endif
