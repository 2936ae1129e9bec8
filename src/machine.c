/* SPDX-License-Identifier: MIT */
/* Making and destroying a machine. */
#include "core.h"

static bool port_complete(const struct ctg_port *port)
{
	return port->meta_alloc != NULL && port->meta_free != NULL && port->cpu != NULL &&
	       port->now != NULL && port->wait != NULL && port->wake != NULL &&
	       port->relax != NULL && port->copy != NULL && port->zero != NULL &&
	       port->tlb_restrict != NULL && port->tlb_install != NULL;
}

static bool port_in_bounds(const struct ctg_port *port)
{
	return port->nr_cpus != 0 && port->nr_cpus <= CTG_MAX_CPUS &&
	       port->batch_pages % CTG_PAGEBLOCK_FRAMES == 0 &&
	       port->batch_pages <= CTG_MAX_BATCH_PAGES;
}

int ctg_create(const struct ctg_port *port, struct ctg **out)
{
	struct ctg *ctg;

	if (port == NULL || out == NULL || !port_complete(port) || !port_in_bounds(port))
		return -CTG_EINVAL;
	ctg = port->meta_alloc(port->host, sizeof(*ctg), 64);
	if (ctg == NULL)
		return -CTG_ENOMEM;
	ctg->port = *port;
	if (ctg_pins_init(ctg) != 0) {
		port->meta_free(port->host, ctg, sizeof(*ctg));
		return -CTG_ENOMEM;
	}
	*out = ctg;
	return 0;
}

void ctg_destroy(struct ctg *ctg)
{
	struct ctg_port port;

	if (ctg == NULL)
		return;
	ctg_cma_destroy_all(ctg);
	ctg_anons_destroy(ctg);
	ctg_groups_destroy(ctg);
	ctg_pins_destroy(ctg);
	port = ctg->port;
	for (unsigned i = 0; i < ctg->nr_zones; i++)
		port.meta_free(port.host, ctg->zones[i], sizeof(*ctg->zones[i]));
	port.meta_free(port.host, ctg, sizeof(*ctg));
}

const struct ctg_port *ctg_port_of(const struct ctg *ctg)
{
	return &ctg->port;
}
