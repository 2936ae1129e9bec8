/* SPDX-License-Identifier: MIT */
/* operator new and delete in their forms, also where they fail. Prints "intact". */
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

struct alignas(256) wide {
	char bytes[300];
};

static int handled;

static void give_up()
{
	handled++;
	std::set_new_handler(nullptr);
}

static bool churn(unsigned seed)
{
	std::map<unsigned, std::string> map;

	for (unsigned i = 0; i < 60000; i++)
		map[(i * 7919u + seed) % 5000] = std::string(i % 700, char('a' + i % 26));
	for (const auto &entry : map)
		for (char c : entry.second)
			if (c != entry.second[0])
				return false;
	return map.size() == 5000;
}

static bool fails_as_it_should()
{
	volatile std::size_t huge = SIZE_MAX / 2;
	bool thrown = false;

	std::set_new_handler(give_up);
	try {
		std::unique_ptr<char[]> p(new char[huge]);
	} catch (const std::bad_alloc &) {
		thrown = true;
	}
	return thrown && handled == 1 && ::operator new(huge, std::nothrow) == nullptr;
}

int main()
{
	std::vector<std::unique_ptr<wide>> objects;
	std::vector<std::thread> threads;
	bool good[3] = {};

	for (int i = 0; i < 20000; i++) {
		objects.emplace_back(new wide);
		if (reinterpret_cast<std::uintptr_t>(objects.back().get()) % 256 != 0)
			return 1;
	}
	for (unsigned i = 0; i < 3; i++)
		threads.emplace_back([&good, i] { good[i] = churn(i); });
	for (auto &thread : threads)
		thread.join();
	if (!good[0] || !good[1] || !good[2] || !fails_as_it_should())
		return 2;
	/* One allocator behind both: what one gives the other takes. */
	void *(*volatile from_new)(std::size_t) = ::operator new;
	void *(*volatile from_malloc)(std::size_t) = std::malloc;
	void (*volatile to_delete)(void *) = ::operator delete;
	void (*volatile to_free)(void *) = std::free;

	to_delete(from_malloc(100000));
	to_free(from_new(100000));
	std::puts("intact");
	return 0;
}
