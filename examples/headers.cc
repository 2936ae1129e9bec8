// SPDX-License-Identifier: MIT
// The headers serve C++ too.
#include <contig/contig.h>
#include <contig/posix.h>
#include <cstdio>

int main()
{
	ctg_region_config config = {};
	ctg_region *region = nullptr;
	ctg_error error = {};

	config.bytes = 1; // refused: not a multiple of 2 MiB
	int rc = ctg_region_open(&config, &region, &error);
	std::printf("%s\n", error.text);
	return rc == -CTG_EINVAL ? 0 : 1;
}
