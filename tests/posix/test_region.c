/* SPDX-License-Identifier: MIT */
/*
 * Regions on memfd and in files: opening, refusing, undoing; contents of frames; the port's own
 * memory; and take-backs that cannot be carried through.
 */
#define _GNU_SOURCE
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "region.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

/* What an open or a failed open must leave as it was. */
struct traces {
	unsigned fds, maps, children, threads;
};

static unsigned count_entries(const char *path)
{
	DIR *dir = opendir(path);
	unsigned n = 0;

	assert_non_null(dir);
	while (readdir(dir) != NULL)
		n++;
	closedir(dir);
	return n;
}

/* Mappings of shared files: malloc's own and a C library's caches come and go. */
static unsigned count_shared_maps(void)
{
	FILE *f = fopen("/proc/self/maps", "r");
	char line[512];
	unsigned n = 0;

	assert_non_null(f);
	while (fgets(line, sizeof(line), f) != NULL)
		n += strstr(line, "s ") != NULL && strstr(line, "-s ") == NULL &&
		     strchr(line, ' ')[4] == 's';
	fclose(f);
	return n;
}

static unsigned count_children(void)
{
	char path[64], text[256] = "";
	unsigned n = 0;
	int fd;

	snprintf(path, sizeof(path), "/proc/self/task/%d/children", (int)getpid());
	fd = open(path, O_RDONLY);
	if (fd < 0)
		return 0;
	if (read(fd, text, sizeof(text) - 1) > 0)
		for (const char *p = text; *p != '\0'; p++)
			n += *p == ' ';
	close(fd);
	return n;
}

static struct traces look(void)
{
	return (struct traces){count_entries("/proc/self/fd"), count_shared_maps(),
		count_children(), count_entries("/proc/self/task")};
}

static void assert_no_traces(const struct traces *before)
{
	struct traces after = look();

	/* A thread that has been joined may be listed a moment longer. */
	for (int i = 0; i < 10000 && after.threads > before->threads; i++) {
		sched_yield();
		after = look();
	}
	assert_int_equal(after.fds, before->fds);
	assert_int_equal(after.maps, before->maps);
	assert_int_equal(after.children, before->children);
	assert_int_equal(after.threads, before->threads);
}

static struct ctg_region *open_ok(const struct ctg_region_config *config)
{
	struct ctg_error error = {0};
	struct ctg_region *region;
	int ret = ctg_region_open(config, &region, &error);

	if (ret != 0)
		fail_msg("%s", error.text);
	return region;
}

/* ---- refusals ---------------------------------------------------------------------------- */

static void refuse(const struct ctg_region_config *config, int code, const char *word)
{
	struct traces before = look();
	struct ctg_error error = {0};
	struct ctg_region *region = NULL;

	assert_int_equal(ctg_region_open(config, &region, &error), code);
	assert_null(region);
	assert_int_equal(error.code, code);
	assert_null(strchr(error.text, '\n'));
	if (strstr(error.text, word) == NULL)
		fail_msg("'%s' does not say '%s'", error.text, word);
	/* The caller may not want to know. */
	assert_int_equal(ctg_region_open(config, &region, NULL), code);
	assert_no_traces(&before);
}

static void test_bad_sizes(void **state)
{
	const uint64_t bad[] = {0, 1, 4096, MIB, 2 * MIB + 4096, UINT64_MAX,
		UINT64_MAX - 2 * MIB + 1, (uint64_t)1 << 63};

	(void)state;
	for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
		refuse(&(struct ctg_region_config){.bytes = bad[i]}, -CTG_EINVAL, "2 MiB");
		if (bad[i] != 0 && bad[i] != CTG_SPILL_DEFAULT)
			refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .spill_bytes = bad[i]},
				-CTG_EINVAL, "spill");
	}
	refuse(&(struct ctg_region_config){.bytes = (uint64_t)1 << 50}, -CTG_ENOMEM, "memory");
	refuse(&(struct ctg_region_config){.bytes = (uint64_t)1 << 50, .backing = "hugetlb"},
		-CTG_ENOMEM, "memory");
}

static void test_bad_config(void **state)
{
	(void)state;
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .backing = "floppy"}, -CTG_EINVAL,
		"'floppy'");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .backing = ""}, -CTG_EINVAL,
		"backing");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .name = ""}, -CTG_EINVAL, "name");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB,
		       .name = "a name that is longer than thirty-one bytes"},
		-CTG_EINVAL, "name");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .copy_threads = 1000}, -CTG_EINVAL,
		"threads");
}

static void test_bad_files(void **state)
{
	char small[] = "/tmp/contig-test-XXXXXX", backing[64];
	int fd = mkstemp(small);

	(void)state;
	assert_true(fd >= 0);
	assert_int_equal(ftruncate(fd, 2 * (off_t)MIB), 0);
	snprintf(backing, sizeof(backing), "file:%s", small);
	refuse(&(struct ctg_region_config){.bytes = 4 * MIB, .backing = backing}, -CTG_EINVAL,
		"2 MiB");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .backing = "file:"}, -CTG_EINVAL,
		"path");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .backing = "file:/nowhere/at/all"},
		-CTG_ENOENT, "/nowhere");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .backing = "file:/tmp"}, -EISDIR,
		"/tmp");
	refuse(&(struct ctg_region_config){.bytes = 2 * MIB, .backing = "file:/dev/null"}, -ENODEV,
		"/dev/null");
	close(fd);
	unlink(small);
}

/* Every descriptor that an open makes is refused in turn. */
static void test_out_of_descriptors(void **state)
{
	struct ctg_region_config config = {
		.bytes = 2 * MIB, .spill_bytes = CTG_SPILL_DEFAULT, .force_stop = true};
	struct traces before = look();
	struct rlimit limit, low;
	bool opened = false;

	(void)state;
	assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
	for (rlim_t n = 3; !opened; n++) {
		struct ctg_region *region;
		struct ctg_error error = {0};
		int ret;

		assert_true(n < 64);
		low = (struct rlimit){n, limit.rlim_max};
		assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
		ret = ctg_region_open(&config, &region, &error);
		assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
		if (ret == 0) {
			ctg_region_close(region);
			opened = true;
		} else {
			assert_true(ret < 0 && error.text[0] != '\0');
		}
		assert_no_traces(&before);
	}
}

/* ---- what is open ------------------------------------------------------------------------ */

static void test_open_close(void **state)
{
	struct traces before = look();

	(void)state;
	for (int i = 0; i < 4; i++) {
		struct ctg_region *region = open_ok(&(struct ctg_region_config){.bytes = 8 * MIB,
			.spill_bytes = CTG_SPILL_DEFAULT,
			.name = "camera",
			.force_stop = i & 1});
		void *p;

		assert_string_equal(ctg_cma_name(ctg_region_area(region)), "camera");
		if (i & 2)
			assert_int_equal(ctg_region_map(region, 4 * MIB, &p), 0);
		ctg_region_close(region); /* what is mapped goes away with it */
		assert_no_traces(&before);
	}
	ctg_region_close(NULL);
}

/* Pages of 2 MiB wherever they can be had, and never claimed in vain. */
static void test_large_pages(void **state)
{
	struct ctg_region *region =
		open_ok(&(struct ctg_region_config){.bytes = 8 * MIB, .spill_bytes = 8 * MIB});

	(void)state;
	for (unsigned i = 0; i < POSIX_NR_FILES; i++) {
		struct stat st;

		assert_int_equal(fstat(region->store[i].fd, &st), 0);
		/* What tmpfs says when it makes large pages by itself. */
		assert_int_equal(st.st_blksize == 2 * (blksize_t)MIB, region->store[i].large);
		assert_int_equal(st.st_nlink, 0);
		if (geteuid() == 0 && !region->store[i].large)
			print_message("this system has no large pages in shared memory\n");
	}
	ctg_region_close(region);
}

static void test_info(void **state)
{
	struct ctg_region *region = open_ok(&(struct ctg_region_config){
		.bytes = 8 * MIB, .spill_bytes = 4 * MIB, .force_stop = true});
	struct ctg_region_info info;

	(void)state;
	ctg_region_info(region, &info);
	assert_string_equal(info.backing, "memfd");
	assert_int_equal(info.bytes, 8 * MIB);
	assert_int_equal(info.spill_bytes, 4 * MIB);
	assert_int_equal(info.spill_used_bytes, 0);
	assert_int_equal(info.map_order, 0);
	assert_string_equal(info.guard, "stop");
	assert_string_equal(info.guard_why, "asked for");
	assert_int_equal(info.physical, 0);
	assert_non_null(ctg_region_spill(region));
	ctg_region_close(region);
	region = open_ok(&(struct ctg_region_config){.bytes = 8 * MIB});
	assert_null(ctg_region_spill(region));
	ctg_region_info(region, &info);
	assert_int_equal(info.spill_bytes, 0);
	ctg_region_close(region);
}

/* The direct map and the file are the same memory, frame by frame. */
static void test_direct_map(void **state)
{
	struct ctg_region *region = open_ok(&(struct ctg_region_config){.bytes = 8 * MIB});
	struct ctg_buffer buffer;
	uint64_t offset, run;
	char text[16];
	int fd;

	(void)state;
	assert_int_equal(ctg_region_alloc(region, 8 * MIB, NULL, &buffer), 0);
	assert_ptr_equal(buffer.address, ctg_region_address(region, buffer.pfn));
	for (uint64_t i = 0; i < buffer.bytes / CTG_PAGE_SIZE; i += 97) {
		snprintf((char *)buffer.address + i * CTG_PAGE_SIZE, 16, "frame %u", (unsigned)i);
		assert_int_equal(
			ctg_region_fd(region, buffer.pfn + i, 1000, &fd, &offset, &run), 0);
		assert_int_equal(run, buffer.bytes / CTG_PAGE_SIZE - i < 1000
					      ? buffer.bytes / CTG_PAGE_SIZE - i
					      : 1000);
		assert_int_equal(pread(fd, text, 16, (off_t)offset), 16);
		assert_string_equal(text, (char *)buffer.address + i * CTG_PAGE_SIZE);
	}
	assert_null(ctg_region_address(region, buffer.pfn - 1));
	assert_null(ctg_region_address(region, buffer.pfn + buffer.bytes / CTG_PAGE_SIZE));
	assert_null(ctg_region_address(region, CTG_PFN_NONE));
	assert_int_equal(ctg_region_fd(region, 0, 1, &fd, &offset, NULL), -CTG_EINVAL);
	assert_int_equal(ctg_region_physical(region, 0, 1, &offset), -CTG_EINVAL);
	assert_int_equal(ctg_region_physical(region, buffer.pfn, 0, &offset), -CTG_EINVAL);
	assert_int_equal(ctg_region_physical(region, buffer.pfn, 8 * MIB, &offset), -CTG_EINVAL);
	assert_int_equal(ctg_region_release(region, &buffer), 0);
	ctg_region_close(region);
}

/* A file's old contents never show in a buffer. */
static void test_file_backing(void **state)
{
	char path[] = "/tmp/contig-test-XXXXXX", backing[64];
	int fd = mkstemp(path);
	struct ctg_region_info info;
	struct ctg_region *region;
	struct ctg_buffer buffer;
	unsigned char *page = malloc(MIB);

	(void)state;
	assert_true(fd >= 0);
	memset(page, 0x5a, MIB);
	for (int i = 0; i < 8; i++)
		assert_int_equal(write(fd, page, MIB), MIB);
	snprintf(backing, sizeof(backing), "file:%s", path);
	region = open_ok(&(struct ctg_region_config){.bytes = 8 * MIB, .backing = backing});
	ctg_region_info(region, &info);
	assert_string_equal(info.backing, "file");
	assert_int_equal(info.physical, -1);
	assert_int_equal(ctg_region_alloc(region, 3 * MIB, NULL, &buffer), 0);
	for (uint64_t i = 0; i < buffer.bytes; i++)
		assert_int_equal(((unsigned char *)buffer.address)[i], 0);
	assert_int_equal(ctg_region_release(region, &buffer), 0);
	ctg_region_close(region);
	close(fd);
	unlink(path);
	free(page);
}

/* ---- contents ---------------------------------------------------------------------------- */

static void fill(unsigned char *p, uint64_t bytes, unsigned seed)
{
	for (uint64_t i = 0; i < bytes; i++)
		p[i] = (unsigned char)((i * 2654435761u + seed) >> 7);
}

/* Copies of any lengths and places, to the spill zone and home, by one thread and by several. */
static void copies(unsigned threads)
{
	struct ctg_region *region = open_ok(&(struct ctg_region_config){
		.bytes = 16 * MIB, .spill_bytes = 16 * MIB, .copy_threads = threads});
	const struct posix_store *area = &region->store[POSIX_FILE_REGION];
	const struct posix_store *spill = &region->store[POSIX_FILE_SPILL];
	const struct ctg_copy_run out[] = {{spill->base, area->base + 7, 1},
		{spill->base + 5, area->base + 100, 3}, {spill->base + 512, area->base + 512, 1024},
		{spill->base + 2000, area->base + 2000, 700}};
	struct ctg_copy_run back[4];
	unsigned char *memory = ctg_region_address(region, area->base);
	unsigned char *wanted = malloc(16 * MIB);
	struct ctg_region_info info;

	fill(memory, 16 * MIB, threads);
	memcpy(wanted, memory, 16 * MIB);
	assert_int_equal(posix_copy(region, out, 4), 0);
	for (int i = 0; i < 4; i++) {
		assert_memory_equal(ctg_region_address(region, out[i].dst),
			ctg_region_address(region, out[i].src), out[i].nr * CTG_PAGE_SIZE);
		back[i] = (struct ctg_copy_run){out[i].src, out[i].dst, out[i].nr};
		memset(ctg_region_address(region, out[i].src), 0, out[i].nr * CTG_PAGE_SIZE);
	}
	ctg_region_info(region, &info);
	assert_true(info.spill_used_bytes >= 1728 * CTG_PAGE_SIZE);
	assert_int_equal(posix_copy(region, back, 4), 0);
	assert_memory_equal(memory, wanted, 16 * MIB);
	/* Nothing else of the spill zone came into being with contents. */
	assert_int_equal(*(unsigned char *)ctg_region_address(region, spill->base + 1), 0);

	posix_discard(region, spill->base, spill->nr);
	ctg_region_info(region, &info);
	assert_int_equal(info.spill_used_bytes, 0);
	assert_int_equal(posix_zero(region, area->base + 3, 1001), 0);
	memset(wanted + 3 * CTG_PAGE_SIZE, 0, 1001 * CTG_PAGE_SIZE);
	assert_memory_equal(memory, wanted, 16 * MIB);
	free(wanted);
	ctg_region_close(region);
}

static void test_copies(void **state)
{
	(void)state;
	copies(1);
	copies(2);
	copies(5);
}

struct piece_job {
	unsigned char seen[1000];
	int fail_at;
};

static int note_piece(void *arg, size_t piece)
{
	struct piece_job *job = arg;

	__atomic_add_fetch(&job->seen[piece], 1, __ATOMIC_RELAXED);
	return (int)piece == job->fail_at ? -CTG_ENOMEM : 0;
}

static void test_pieces(void **state)
{
	struct ctg_region *region =
		open_ok(&(struct ctg_region_config){.bytes = 2 * MIB, .copy_threads = 4});

	(void)state;
	for (size_t nr = 0; nr <= 1000; nr = nr * 3 + 1) {
		struct piece_job job = {.fail_at = -1};

		assert_int_equal(posix_copier_run(region, note_piece, &job, nr), 0);
		for (size_t i = 0; i < 1000; i++)
			assert_int_equal(job.seen[i], i < nr);
		job.fail_at = (int)nr / 2;
		if (nr > 0)
			assert_int_equal(
				posix_copier_run(region, note_piece, &job, nr), -CTG_ENOMEM);
	}
	ctg_region_close(region);
}

/* ---- memory for the core ----------------------------------------------------------------- */

static void test_meta(void **state)
{
	struct ctg_region *region = open_ok(&(struct ctg_region_config){.bytes = 2 * MIB});
	uint64_t before = posix_meta_bytes(region);
	struct {
		unsigned char *p;
		size_t bytes;
	} slot[64] = {0};
	uint32_t seed = 1;

	(void)state;
	for (int step = 0; step < 20000; step++) {
		unsigned i = (seed = seed * 1103515245 + 12345) >> 16 & 63;
		size_t bytes = 1 + (seed >> 8) % 20000, align = (size_t)1 << ((seed >> 3) % 13);

		if (slot[i].p != NULL) {
			for (size_t k = 0; k < slot[i].bytes; k++)
				assert_int_equal(slot[i].p[k], i);
			posix_meta_free(region, slot[i].p, slot[i].bytes);
		}
		slot[i].p = posix_meta_alloc(region, bytes, align);
		slot[i].bytes = bytes;
		assert_non_null(slot[i].p);
		assert_int_equal((uintptr_t)slot[i].p & (align - 1), 0);
		for (size_t k = 0; k < bytes; k++)
			assert_int_equal(slot[i].p[k], 0);
		memset(slot[i].p, (int)i, bytes);
	}
	for (unsigned i = 0; i < 64; i++)
		posix_meta_free(region, slot[i].p, slot[i].bytes);
	posix_meta_free(region, NULL, 10);
	assert_null(posix_meta_alloc(region, SIZE_MAX, 8));
	assert_int_equal(posix_meta_bytes(region), before);
	ctg_region_close(region);
}

/* ---- take-backs that cannot be ----------------------------------------------------------- */

struct lent {
	struct ctg_region *region;
	unsigned char *heap;
	uint64_t bytes;
};

static struct lent lend(const struct ctg_region_config *config, uint64_t bytes)
{
	struct lent l = {.region = open_ok(config), .bytes = bytes};
	void *heap;

	assert_int_equal(ctg_region_map(l.region, bytes, &heap), 0);
	l.heap = heap;
	fill(l.heap, bytes, 3);
	return l;
}

/* Nothing was lost, and everything is where it was. */
static void assert_as_before(const struct lent *l)
{
	struct ctg_cma_stat stat;
	struct ctg_region_info info;
	unsigned char *wanted = malloc(l->bytes);

	fill(wanted, l->bytes, 3);
	assert_memory_equal(l->heap, wanted, l->bytes);
	free(wanted);
	ctg_cma_stat(ctg_region_area(l->region), &stat);
	assert_int_equal(stat.nr_allocated, 0);
	assert_int_equal(stat.nr_lent, l->bytes >> CTG_PAGE_SHIFT);
	ctg_region_info(l->region, &info);
	assert_int_equal(info.spill_used_bytes, 0);
	/* It can still be written to. */
	fill(l->heap, l->bytes, 3);
}

static void end(struct lent *l)
{
	assert_int_equal(ctg_region_unmap(l->region, l->heap, l->bytes), 0);
	ctg_region_close(l->region);
}

static void test_no_spill_zone(void **state)
{
	struct lent l = lend(&(struct ctg_region_config){.bytes = 16 * MIB}, 16 * MIB);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct ctg_buffer buffer;

	(void)state;
	assert_int_equal(ctg_region_alloc(l.region, 4 * MIB, &request, &buffer), -CTG_ENOMEM);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_NO_MEMORY);
	assert_as_before(&l);
	end(&l);
}

static void test_small_spill_zone(void **state)
{
	struct lent l = lend(
		&(struct ctg_region_config){.bytes = 16 * MIB, .spill_bytes = 4 * MIB}, 16 * MIB);
	struct ctg_buffer buffer;
	uint64_t moved;

	(void)state;
	assert_int_equal(ctg_region_alloc(l.region, 8 * MIB, NULL, &buffer), -CTG_ENOMEM);
	/* Some may have moved before it was clear: that is invisible, and comes home. */
	assert_int_equal(ctg_migrate_home(ctg_region_machine(l.region), UINT64_MAX, &moved), 0);
	assert_as_before(&l);
	assert_int_equal(ctg_region_alloc(l.region, 4 * MIB, NULL, &buffer), 0);
	assert_int_equal(ctg_region_release(l.region, &buffer), 0);
	assert_int_equal(ctg_migrate_home(ctg_region_machine(l.region), UINT64_MAX, &moved), 0);
	assert_as_before(&l);
	end(&l);
}

/* The system refuses to let the spill file grow. */
static void test_spill_cannot_grow(void **state)
{
	struct lent l = lend(
		&(struct ctg_region_config){.bytes = 16 * MIB, .spill_bytes = 16 * MIB}, 16 * MIB);
	struct rlimit limit, none;
	struct ctg_buffer buffer;
	uint64_t moved;
	int ret;

	(void)state;
	signal(SIGXFSZ, SIG_IGN);
	assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
	none = (struct rlimit){0, limit.rlim_max};
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &none), 0);
	ret = ctg_region_alloc(l.region, 8 * MIB, NULL, &buffer);
	assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
	assert_int_equal(ret, -CTG_ENOMEM);
	assert_as_before(&l);
	assert_int_equal(ctg_region_alloc(l.region, 8 * MIB, NULL, &buffer), 0);
	assert_int_equal(ctg_region_release(l.region, &buffer), 0);
	assert_int_equal(ctg_migrate_home(ctg_region_machine(l.region), UINT64_MAX, &moved), 0);
	assert_as_before(&l);
	end(&l);
}

/* A control group of our own with a limit. false: none can be made here. */
struct group {
	const char *root, *limit, *used;
	char path[128];
};

static bool group_make(struct group *g)
{
	static const struct group known[] = {{.root = "/sys/fs/cgroup/memory",
						     .limit = "memory.limit_in_bytes",
						     .used = "memory.usage_in_bytes"},
		{.root = "/sys/fs/cgroup", .limit = "memory.max", .used = "memory.current"}};

	for (size_t i = 0; i < 2; i++) {
		char file[192];

		*g = known[i];
		snprintf(g->path, sizeof(g->path), "%s/contig-test-%d", g->root, (int)getpid());
		if (mkdir(g->path, 0755) != 0)
			continue;
		snprintf(file, sizeof(file), "%s/%s", g->path, g->limit);
		if (posix_write_number(file, 256 * MIB) == 0)
			return true;
		rmdir(g->path);
	}
	return false;
}

/* In the group: its limit leaves room for what is displaced, but not for others besides. */
static int take_in_group(const struct group *g)
{
	char file[192];
	struct ctg_buffer buffer;
	struct lent l;
	uint64_t used;

	snprintf(file, sizeof(file), "%s/cgroup.procs", g->path);
	if (posix_write_number(file, (uint64_t)getpid()) != 0)
		return 77;
	l = lend(&(struct ctg_region_config){.bytes = 16 * MIB, .spill_bytes = 16 * MIB}, 16 * MIB);
	snprintf(file, sizeof(file), "%s/%s", g->path, g->used);
	used = posix_read_number(file);
	snprintf(file, sizeof(file), "%s/%s", g->path, g->limit);
	if (posix_write_number(file, used + 24 * MIB) != 0)
		return 77;
	if (ctg_region_alloc(l.region, 8 * MIB, NULL, &buffer) != -CTG_ENOMEM)
		return 1;
	assert_as_before(&l);
	if (posix_write_number(file, used + 128 * MIB) != 0)
		return 77;
	if (ctg_region_alloc(l.region, 8 * MIB, NULL, &buffer) != 0)
		return 2;
	return 0;
}

static void test_memory_is_short(void **state)
{
	struct group g;
	int status;
	pid_t pid;

	(void)state;
#ifdef __SANITIZE_THREAD__
	print_message("skipped: the sanitizer's shadow does not fit into the group\n");
	skip();
	return;
#endif
	if (!group_make(&g)) {
		print_message("skipped: no control group can be made here\n");
		skip();
		return;
	}
	fflush(NULL);
	pid = fork();
	if (pid == 0)
		_exit(take_in_group(&g));
	assert_int_equal(waitpid(pid, &status, 0), pid);
	for (int i = 0; i < 1000 && rmdir(g.path) != 0; i++)
		sched_yield();
	if (WIFEXITED(status) && WEXITSTATUS(status) == 77)
		skip();
	assert_int_equal(status, 0);
}

static void test_map_budget(void **state)
{
	struct lent l = lend(
		&(struct ctg_region_config){
			.bytes = 16 * MIB, .spill_bytes = 16 * MIB, .map_budget = 100},
		16 * MIB);
	struct ctg_alloc_report report;
	struct ctg_alloc_request request = {.report = &report};
	struct ctg_buffer buffer;

	(void)state;
	assert_int_equal(ctg_region_alloc(l.region, 8 * MIB, &request, &buffer), -CTG_ENOMEM);
	assert_int_equal(report.obstacle, CTG_OBSTACLE_PORT);
	assert_as_before(&l);
	end(&l);
}

static void test_cancelled_and_late(void **state)
{
	struct lent l = lend(
		&(struct ctg_region_config){.bytes = 16 * MIB, .spill_bytes = 16 * MIB}, 16 * MIB);
	const struct ctg_word32 cancel = {1};
	struct ctg_alloc_request request = {.cancel = &cancel};
	struct ctg_buffer buffer;

	(void)state;
	assert_int_equal(ctg_region_alloc(l.region, 8 * MIB, &request, &buffer), -CTG_EINTR);
	assert_as_before(&l);
	request = (struct ctg_alloc_request){.deadline = 1};
	assert_int_equal(ctg_region_alloc(l.region, 8 * MIB, &request, &buffer), -CTG_ETIMEDOUT);
	assert_as_before(&l);
	end(&l);
}

static void count_event(void *arg, const struct ctg_event *event)
{
	unsigned *count = arg;

	__atomic_add_fetch(&count[event->kind], 1, __ATOMIC_RELAXED);
}

static void test_trace(void **state)
{
	unsigned count[8] = {0};
	struct lent l = lend(&(struct ctg_region_config){.bytes = 16 * MIB,
				     .spill_bytes = 16 * MIB,
				     .trace = count_event,
				     .trace_arg = count},
		16 * MIB);
	struct ctg_buffer buffer;

	(void)state;
	assert_int_equal(ctg_region_alloc(l.region, 8 * MIB, NULL, &buffer), 0);
	assert_int_equal(count[CTG_EVENT_CMA_ALLOC_START], 1);
	assert_int_equal(count[CTG_EVENT_CMA_ALLOC_FINISH], 1);
	assert_true(count[CTG_EVENT_MIGRATE] > 0);
	assert_int_equal(ctg_region_release(l.region, &buffer), 0);
	assert_int_equal(count[CTG_EVENT_CMA_RELEASE], 1);
	end(&l);
}

static void *nothing(void *arg)
{
	return arg;
}

/* A sanitizer starts a thread of its own with the first one of the program. */
static int setup(void **state)
{
	pthread_t thread;

	(void)state;
	return pthread_create(&thread, NULL, nothing, NULL) != 0 || pthread_join(thread, NULL) != 0;
}

int main(void)
{
	const struct CMUnitTest tests[] = {
		cmocka_unit_test(test_bad_sizes),
		cmocka_unit_test(test_bad_config),
		cmocka_unit_test(test_bad_files),
		cmocka_unit_test(test_out_of_descriptors),
		cmocka_unit_test(test_open_close),
		cmocka_unit_test(test_large_pages),
		cmocka_unit_test(test_info),
		cmocka_unit_test(test_direct_map),
		cmocka_unit_test(test_file_backing),
		cmocka_unit_test(test_copies),
		cmocka_unit_test(test_pieces),
		cmocka_unit_test(test_meta),
		cmocka_unit_test(test_no_spill_zone),
		cmocka_unit_test(test_small_spill_zone),
		cmocka_unit_test(test_spill_cannot_grow),
		cmocka_unit_test(test_memory_is_short),
		cmocka_unit_test(test_map_budget),
		cmocka_unit_test(test_cancelled_and_late),
		cmocka_unit_test(test_trace),
	};

	return cmocka_run_group_tests(tests, setup, NULL);
}
