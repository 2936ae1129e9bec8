/* SPDX-License-Identifier: MIT */
/*
 * Write protection by userfaultfd. Nobody reads events from it: a writer that faults sleeps until
 * somebody wakes the range, which happens after the page it wants has been replaced.
 *
 * Only raw system calls, so that the agent in a borrower may use this file too.
 */
#define _GNU_SOURCE
#include "rawcall.h"
#include "space.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

/* What this port needs: write protection of shared memory and huge pages, also of pages that the
 * page table does not have yet. */
#define UFFD_NEEDS (UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM)

#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#ifndef UFFD_FEATURE_WP_HUGETLBFS_SHMEM
#define UFFD_FEATURE_WP_HUGETLBFS_SHMEM (1 << 12)
#endif
#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

static long uffd_ioctl(int fd, unsigned long request, void *arg)
{
	return posix_rawcall(SYS_ioctl, fd, (long)request, (long)arg, 0, 0, 0);
}

static int uffd_setup(int fd)
{
	struct uffdio_api api = {
		.api = UFFD_API, .features = UFFD_NEEDS | UFFD_FEATURE_WP_UNPOPULATED};
	long ret = uffd_ioctl(fd, UFFDIO_API, &api);

	if (ret != 0) {
		/* Before 6.4 there is no WP_UNPOPULATED; what is anonymous is populated first. */
		api = (struct uffdio_api){.api = UFFD_API, .features = UFFD_NEEDS};
		ret = uffd_ioctl(fd, UFFDIO_API, &api);
	}
	return (int)ret;
}

int posix_uffd_open(bool *kernel_faults)
{
	long fd = posix_rawcall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK, 0, 0, 0, 0, 0);
	int ret;

	*kernel_faults = true;
	if (fd < 0) {
		long dev = posix_rawcall(SYS_openat, AT_FDCWD, (long)"/dev/userfaultfd",
			O_RDWR | O_CLOEXEC, 0, 0, 0);

		if (dev >= 0) {
			fd = posix_rawcall(SYS_ioctl, dev, (long)USERFAULTFD_IOC_NEW,
				O_CLOEXEC | O_NONBLOCK, 0, 0, 0);
			posix_rawcall(SYS_close, dev, 0, 0, 0, 0, 0);
		}
	}
	if (fd < 0) {
		*kernel_faults = false;
		fd = posix_rawcall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY, 0,
			0, 0, 0, 0);
	}
	if (fd < 0)
		return (int)fd;
	ret = uffd_setup((int)fd);
	if (ret != 0) {
		posix_rawcall(SYS_close, fd, 0, 0, 0, 0, 0);
		return ret;
	}
	return (int)fd;
}

int posix_uffd_protect(int uffd, uint64_t addr, uint64_t bytes)
{
	struct uffdio_register reg = {
		.range = {.start = addr, .len = bytes}, .mode = UFFDIO_REGISTER_MODE_WP};
	struct uffdio_writeprotect wp = {
		.range = {.start = addr, .len = bytes}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
	long ret = uffd_ioctl(uffd, UFFDIO_REGISTER, &reg);

	if (ret != 0)
		return (int)ret;
	/* -EAGAIN: mappings are changing elsewhere in the process (fork). */
	do {
		ret = uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &wp);
	} while (ret == -CTG_EAGAIN);
	if (ret != 0)
		posix_uffd_unprotect(uffd, addr, bytes);
	return (int)ret;
}

int posix_uffd_wake(int uffd, uint64_t addr, uint64_t bytes)
{
	struct uffdio_range range = {.start = addr, .len = bytes};

	return (int)uffd_ioctl(uffd, UFFDIO_WAKE, &range);
}

void posix_uffd_unprotect(int uffd, uint64_t addr, uint64_t bytes)
{
	struct uffdio_range range = {.start = addr, .len = bytes};
	struct uffdio_writeprotect wp = {.range = range, .mode = 0};

	/* What is no longer registered refuses these: then there is nothing to take back. */
	while (uffd_ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) == -CTG_EAGAIN)
		;
	(void)uffd_ioctl(uffd, UFFDIO_UNREGISTER, &range);
	(void)posix_uffd_wake(uffd, addr, bytes);
}
