/* SPDX-License-Identifier: MIT */
/*
 * operator new and delete of C++. libstdc++'s would do, but a program linked to libjemalloc.so
 * would take that library's, whose memory our free() does not know. jemalloc's own file of them
 * needs libstdc++, which does not belong into every program; so here they are by their linker
 * names. What throws is called in libstdc++ if the program has it.
 *
 * Compiled with -fexceptions, so that the exception passes through.
 */
#define _GNU_SOURCE
#include "hooks.h"
#include <stdbool.h>
#include <stdlib.h>

typedef void (*new_handler)(void);

/* std::get_new_handler(), std::__throw_bad_alloc(). No program can call these operators without the
 * library that has both, but a weak name costs nothing. */
extern new_handler _ZSt15get_new_handlerv(void) __attribute__((weak));
extern void _ZSt17__throw_bad_allocv(void) __attribute__((weak, noreturn));

static void *new_aligned(size_t size, size_t align, bool nothrow)
{
	new_handler handler;
	void *p;

	if (size == 0)
		size = 1;
	for (;;) {
		p = align ? aligned_alloc(align, size) : malloc(size);
		if (p)
			return p;
		handler = _ZSt15get_new_handlerv ? _ZSt15get_new_handlerv() : NULL;
		if (!handler)
			break;
		handler();
	}
	if (nothrow)
		return NULL;
	if (_ZSt17__throw_bad_allocv)
		_ZSt17__throw_bad_allocv();
	abort();
}

#define OPERATOR(type, name, arguments, body)                                                      \
	type name arguments;                                                                       \
	type name arguments                                                                        \
	{                                                                                          \
		body;                                                                              \
	}

/* clang-format off */
OPERATOR(void *, _Znwm, (size_t size), return new_aligned(size, 0, false))
OPERATOR(void *, _Znam, (size_t size), return new_aligned(size, 0, false))
OPERATOR(void *, _ZnwmRKSt9nothrow_t, (size_t size, const void *tag), (void)tag; return new_aligned(size, 0, true))
OPERATOR(void *, _ZnamRKSt9nothrow_t, (size_t size, const void *tag), (void)tag; return new_aligned(size, 0, true))
OPERATOR(void *, _ZnwmSt11align_val_t, (size_t size, size_t align), return new_aligned(size, align, false))
OPERATOR(void *, _ZnamSt11align_val_t, (size_t size, size_t align), return new_aligned(size, align, false))
OPERATOR(void *, _ZnwmSt11align_val_tRKSt9nothrow_t, (size_t size, size_t align, const void *tag), (void)tag; return new_aligned(size, align, true))
OPERATOR(void *, _ZnamSt11align_val_tRKSt9nothrow_t, (size_t size, size_t align, const void *tag), (void)tag; return new_aligned(size, align, true))
OPERATOR(void, _ZdlPv, (void *p), free(p))
OPERATOR(void, _ZdaPv, (void *p), free(p))
OPERATOR(void, _ZdlPvm, (void *p, size_t size), (void)size; free(p))
OPERATOR(void, _ZdaPvm, (void *p, size_t size), (void)size; free(p))
OPERATOR(void, _ZdlPvRKSt9nothrow_t, (void *p, const void *tag), (void)tag; free(p))
OPERATOR(void, _ZdaPvRKSt9nothrow_t, (void *p, const void *tag), (void)tag; free(p))
OPERATOR(void, _ZdlPvSt11align_val_t, (void *p, size_t align), (void)align; free(p))
OPERATOR(void, _ZdaPvSt11align_val_t, (void *p, size_t align), (void)align; free(p))
OPERATOR(void, _ZdlPvmSt11align_val_t, (void *p, size_t size, size_t align), (void)size; (void)align; free(p))
OPERATOR(void, _ZdaPvmSt11align_val_t, (void *p, size_t size, size_t align), (void)size; (void)align; free(p))
OPERATOR(void, _ZdlPvSt11align_val_tRKSt9nothrow_t, (void *p, size_t align, const void *tag), (void)align; (void)tag; free(p))
OPERATOR(void, _ZdaPvSt11align_val_tRKSt9nothrow_t, (void *p, size_t align, const void *tag), (void)align; (void)tag; free(p))
/* clang-format on */
