/* SPDX-License-Identifier: MIT */
/*
 * Some system calls make the kernel or a device hold on to pages of the caller and write to them,
 * or read them, later or behind the page table's back. If such a page moves meanwhile, what is
 * written goes to where it was. Nothing in user space can see who holds a page, so these calls are
 * refused, each with the error that programs know from systems that do not have it, and answer by
 * doing without.
 *
 * The filter keeps programs from accidents. It is not a wall against a program that wants to lose
 * its own data.
 */
#include "filter.h"
#include <errno.h>
#include <fcntl.h>
#include <seccomp.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#ifndef AF_XDP
#define AF_XDP 44
#endif
#ifndef SOL_XDP
#define SOL_XDP 283
#endif
#define XDP_UMEM_REG 4

/* Interface numbers from the manuals of the drivers; they never change. */
#define SG_IO 0x2285u
#define VFIO_IOMMU_MAP_DMA 0x3b71u
#define IOMMU_IOAS_MAP 0x3b85u
#define UDMABUF_CREATE 0x40187542u
#define UDMABUF_CREATE_LIST 0x40087543u
#define NVME_ADMIN_CMD 0xc0484e41u
#define NVME_SUBMIT_IO 0x40304e42u
#define NVME_SUBMIT_IO32 0x402c4e42u
#define NVME_IO_CMD 0xc0484e43u
#define NVME_ADMIN64_CMD 0xc0504e47u
#define NVME_IO64_CMD 0xc0504e48u
#define NVME_IO64_CMD_VEC 0xc0504e49u

/* Refuse the call if each of the first nr conditions holds: (argument & mask) == value. */
struct refusal {
	int call;
	int error;
	unsigned nr;
	struct condition {
		unsigned argument;
		uint32_t mask, value;
	} on[2];
};

/* clang-format off */
/* The kernel takes ints out of the low half of a register; what is in the other half is no matter. */
#define IS(argument, value) {argument, 0xffffffffu, value}
#define HAS(argument, flag) {argument, flag, flag}
#define ANY {0, 0, 0}

#define ALWAYS(name, err) {SCMP_SYS(name), err, 0, {ANY, ANY}}
#define IF(name, err, condition) {SCMP_SYS(name), err, 1, {condition, ANY}}
#define IF2(name, err, condition, condition2) {SCMP_SYS(name), err, 2, {condition, condition2}}
#define IOCTL(value) IF(ioctl, ENOTTY, IS(1, value))

static const struct refusal refusals[] = {
	/* Reads into buffers after the call that asked for it has returned; registered buffers are
	 * pinned for good. ENOSYS: a kernel without it. */
	ALWAYS(io_uring_setup, ENOSYS),
	ALWAYS(io_uring_enter, ENOSYS),
	ALWAYS(io_uring_register, ENOSYS),
	/* The same of old. Without a context the other calls have nothing to work on. */
	ALWAYS(io_setup, ENOSYS),

	/* The disk reads and writes the caller's pages. EINVAL: a file system that cannot. */
	IF(open, EINVAL, HAS(1, O_DIRECT)),
	IF(openat, EINVAL, HAS(2, O_DIRECT)),
	IF(open_by_handle_at, EINVAL, HAS(2, O_DIRECT)),
	IF2(fcntl, EINVAL, IS(1, F_SETFL), HAS(2, O_DIRECT)),
	IF2(fcntl64, EINVAL, IS(1, F_SETFL), HAS(2, O_DIRECT)),
	/* Its flags are in memory, where the filter cannot look. ENOSYS: before Linux 5.6. */
	ALWAYS(openat2, ENOSYS),

	/* Puts the caller's pages themselves into a pipe. */
	ALWAYS(vmsplice, EINVAL),

	/* Sends the caller's pages themselves, some time later. */
	IF2(setsockopt, ENOPROTOOPT, IS(1, SOL_SOCKET), IS(2, SO_ZEROCOPY)),
	/* Packet buffers in the caller's memory. */
	IF(socket, EAFNOSUPPORT, IS(0, AF_XDP)),
	IF2(setsockopt, ENOPROTOOPT, IS(1, SOL_XDP), IS(2, XDP_UMEM_REG)),
	/* Ciphers whose result is written through pinned pages. */
	IF(socket, EAFNOSUPPORT, IS(0, AF_ALG)),

	/* Reaches the pages of another process, which may be moving, not by its page table. */
	ALWAYS(process_vm_writev, ENOSYS),
	ALWAYS(process_vm_readv, ENOSYS),

	/* Devices that are given pages of the caller. ENOTTY: a device that does not know it. */
	IOCTL(VFIO_IOMMU_MAP_DMA),
	IOCTL(IOMMU_IOAS_MAP),
	IOCTL(SG_IO),
	IOCTL(UDMABUF_CREATE),
	IOCTL(UDMABUF_CREATE_LIST),
	IOCTL(NVME_ADMIN_CMD),
	IOCTL(NVME_SUBMIT_IO),
	IOCTL(NVME_SUBMIT_IO32),
	IOCTL(NVME_IO_CMD),
	IOCTL(NVME_ADMIN64_CMD),
	IOCTL(NVME_IO64_CMD),
	IOCTL(NVME_IO64_CMD_VEC),
};
/* clang-format on */

/* The other system call tables that a process of this machine can use. */
static const uint32_t other_tables[] = {
#if defined(__x86_64__)
	SCMP_ARCH_X86,
	SCMP_ARCH_X32,
#elif defined(__aarch64__)
	SCMP_ARCH_ARM,
#endif
};

static int filter_failed(struct ctg_error *error, int code, const char *what)
{
	if (error) {
		error->code = code;
		snprintf(error->text, sizeof(error->text),
			"seccomp filter: %s: %s; --allow-unseen-pins runs the program without it",
			what, strerror(-code));
	}
	return code;
}

static int filter_add(scmp_filter_ctx filter, const struct refusal *refusal)
{
	struct scmp_arg_cmp compare[2];
	int ret;

	for (unsigned i = 0; i < refusal->nr; i++) {
		const struct condition *c = &refusal->on[i];

		compare[i] =
			(struct scmp_arg_cmp){c->argument, SCMP_CMP_MASKED_EQ, c->mask, c->value};
	}
	ret = seccomp_rule_add_array(filter, SCMP_ACT_ERRNO((uint32_t)refusal->error),
		refusal->call, refusal->nr, compare);
	/* A call that only other machines have. */
	return ret == -EDOM ? 0 : ret;
}

static int filter_build(scmp_filter_ctx filter, struct ctg_error *error)
{
	int ret;

	/* Tables that nobody here knows are none of our business. */
	ret = seccomp_attr_set(filter, SCMP_FLTATR_ACT_BADARCH, SCMP_ACT_ALLOW);
	/* Say what the kernel said, not -ECANCELED. */
	if (ret == 0)
		ret = seccomp_attr_set(filter, SCMP_FLTATR_API_SYSRAWRC, 1);
	for (size_t i = 0; ret == 0 && i < sizeof(other_tables) / sizeof(other_tables[0]); i++)
		ret = seccomp_arch_add(filter, other_tables[i]);
	if (ret != 0)
		return filter_failed(error, ret, "cannot be set up");
	for (size_t i = 0; i < sizeof(refusals) / sizeof(refusals[0]); i++) {
		ret = filter_add(filter, &refusals[i]);
		if (ret != 0)
			return filter_failed(error, ret, "a rule was refused");
	}
	return 0;
}

int contig_filter_install(bool allow_unseen_pins, struct ctg_error *error)
{
	scmp_filter_ctx filter;
	int ret;

	if (allow_unseen_pins)
		return 0;
	filter = seccomp_init(SCMP_ACT_ALLOW);
	if (!filter)
		return filter_failed(error, -ENOMEM, "cannot be set up");
	ret = filter_build(filter, error);
	if (ret == 0) {
		/* Without CAP_SYS_ADMIN the kernel wants no_new_privs, or set-user-id programs
		 * could be fooled. With it, sudo and su go on working below us. */
		ret = seccomp_attr_set(filter, SCMP_FLTATR_CTL_NNP, 0);
		if (ret == 0)
			ret = seccomp_load(filter);
		if (ret == -EACCES || ret == -EPERM) {
			ret = seccomp_attr_set(filter, SCMP_FLTATR_CTL_NNP, 1);
			if (ret == 0)
				ret = seccomp_load(filter);
		}
		if (ret != 0)
			filter_failed(error, ret, "the kernel refused it");
	}
	seccomp_release(filter);
	return ret;
}
