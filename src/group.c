/* SPDX-License-Identifier: MIT */
/*
 * Groups: limits on frames, and who is charged for which.
 *
 * A charge goes up level by level, each level by one compare-and-swap that never exceeds the limit;
 * where one refuses, the levels below are undone. So no level is above its limit at any moment. The
 * price: while a charge that will be refused above is on its way, a level below looks fuller than
 * it is, and may refuse another.
 *
 * A group lives while anything is charged to it. A charge counts at all levels, so whoever
 * uncharges reads the parent before it lets go of the child: the parent is still charged and stays.
 */
#include "core.h"

struct ctg_group {
	struct ctg *ctg;
	struct ctg_group *parent;
	uint16_t index; /* what frames say; ctg->groups[index - 1] */
	struct ctg_word64 limit, charged, peak, failed;
	uint32_t nr_children, nr_spaces; /* ctg->groups_lock */
};

/* ---- charges --------------------------------------------------------------------------------- */

static bool charge_one(struct ctg_group *group, uint64_t nr)
{
	uint64_t charged = ctg_load64_relaxed(&group->charged);
	uint64_t limit;

	do {
		/* Read anew each time: what is stored must respect the limit as it is then. */
		limit = ctg_load64_acquire(&group->limit);
		if (charged > limit || nr > limit - charged) {
			ctg_add64_relaxed(&group->failed, 1);
			return false;
		}
	} while (!ctg_cas64_acq_rel(&group->charged, &charged, charged + nr));
	return true;
}

/* Uncharge from group up to, and not, `end`. */
static void uncharge_until(struct ctg_group *group, const struct ctg_group *end, uint64_t nr)
{
	while (group != end) {
		struct ctg_group *parent = group->parent;
		uint64_t charged = ctg_add64_acq_rel(&group->charged, -nr);

		CTG_ASSERT(charged >= nr);
		(void)charged;
		group = parent;
	}
}

int ctg_group_charge(struct ctg_group *group, uint64_t nr)
{
	for (struct ctg_group *g = group; g != NULL; g = g->parent)
		if (!charge_one(g, nr)) {
			uncharge_until(group, g, nr);
			return -CTG_ENOSPC;
		}
	/* Only what was granted is a peak. */
	for (struct ctg_group *g = group; g != NULL; g = g->parent) {
		uint64_t charged = ctg_load64_relaxed(&g->charged);
		uint64_t peak = ctg_load64_relaxed(&g->peak);

		while (peak < charged && !ctg_cas64_acq_rel(&g->peak, &peak, charged))
			;
	}
	return 0;
}

void ctg_group_uncharge(struct ctg_group *group, uint64_t nr)
{
	if (nr != 0)
		uncharge_until(group, NULL, nr);
}

uint16_t ctg_group_index(const struct ctg_group *group)
{
	return group != NULL ? group->index : 0;
}

void ctg_group_uncharge_index(struct ctg *ctg, uint16_t index, uint64_t nr)
{
	if (index != 0)
		ctg_group_uncharge(ctg->groups[index - 1], nr);
}

/* ---- spaces ---------------------------------------------------------------------------------- */

void ctg_group_join(struct ctg_group *group)
{
	if (group == NULL)
		return;
	ctg_lock(&group->ctg->port, &group->ctg->groups_lock);
	group->nr_spaces++;
	ctg_unlock(&group->ctg->port, &group->ctg->groups_lock);
}

void ctg_group_leave(struct ctg_group *group)
{
	struct ctg *ctg;

	if (group == NULL)
		return;
	/* Without its spaces it may be destroyed as soon as the lock is let go. */
	ctg = group->ctg;
	ctg_lock(&ctg->port, &ctg->groups_lock);
	CTG_ASSERT(group->nr_spaces != 0);
	group->nr_spaces--;
	ctg_unlock(&ctg->port, &ctg->groups_lock);
}

struct ctg *ctg_group_machine(const struct ctg_group *group)
{
	return group->ctg;
}

/* ---- making and destroying ------------------------------------------------------------------- */

int ctg_group_create(
	struct ctg *ctg, struct ctg_group *parent, uint64_t limit, struct ctg_group **out)
{
	const struct ctg_port *port;
	struct ctg_group *group;
	unsigned at = 0;

	if (ctg == NULL || out == NULL || (parent != NULL && parent->ctg != ctg))
		return -CTG_EINVAL;
	port = &ctg->port;
	group = port->meta_alloc(port->host, sizeof(*group), _Alignof(struct ctg_group));
	if (group == NULL)
		return -CTG_ENOMEM;
	group->ctg = ctg;
	group->parent = parent;
	ctg_store64_relaxed(&group->limit, limit);
	ctg_lock(port, &ctg->groups_lock);
	while (at < CTG_MAX_GROUPS && ctg->groups[at] != NULL)
		at++;
	if (at < CTG_MAX_GROUPS) {
		group->index = (uint16_t)(at + 1);
		ctg->groups[at] = group;
		if (parent != NULL)
			parent->nr_children++;
	}
	ctg_unlock(port, &ctg->groups_lock);
	if (at == CTG_MAX_GROUPS) {
		port->meta_free(port->host, group, sizeof(*group));
		return -CTG_ENOSPC;
	}
	*out = group;
	return 0;
}

int ctg_group_destroy(struct ctg_group *group)
{
	const struct ctg_port *port;
	struct ctg *ctg;
	bool busy;

	if (group == NULL)
		return -CTG_EINVAL;
	ctg = group->ctg;
	port = &ctg->port;
	ctg_lock(port, &ctg->groups_lock);
	/* Without spaces nobody charges it, so that a charge of 0 stays 0. */
	busy = group->nr_children != 0 || group->nr_spaces != 0 ||
	       ctg_load64_acquire(&group->charged) != 0;
	if (!busy) {
		ctg->groups[group->index - 1] = NULL;
		if (group->parent != NULL)
			group->parent->nr_children--;
	}
	ctg_unlock(port, &ctg->groups_lock);
	if (busy)
		return -CTG_EBUSY;
	port->meta_free(port->host, group, sizeof(*group));
	return 0;
}

void ctg_groups_destroy(struct ctg *ctg)
{
	const struct ctg_port *port = &ctg->port;

	for (unsigned i = 0; i < CTG_MAX_GROUPS; i++)
		if (ctg->groups[i] != NULL)
			port->meta_free(port->host, ctg->groups[i], sizeof(*ctg->groups[i]));
}

void ctg_group_set_limit(struct ctg_group *group, uint64_t limit)
{
	if (group != NULL)
		ctg_store64_release(&group->limit, limit);
}

void ctg_group_stat(const struct ctg_group *group, struct ctg_group_stat *out)
{
	if (group == NULL || out == NULL)
		return;
	*out = (struct ctg_group_stat){.limit = ctg_load64_relaxed(&group->limit),
		.charged = ctg_load64_relaxed(&group->charged),
		.peak = ctg_load64_relaxed(&group->peak),
		.failed = ctg_load64_relaxed(&group->failed)};
}
