/* SPDX-License-Identifier: MIT */
/*
 * Every atomic access of the core goes through these, so that a build for the explorer can put a
 * switch point (CTG_SWITCH_POINT) in front of each. Orders are in the names; the plain names are
 * sequentially consistent, which only fork against lockless pin needs.
 */
#ifndef CTG_ATOMIC_H
#define CTG_ATOMIC_H

#include <contig/types.h>

#ifndef CTG_SWITCH_POINT
#define CTG_SWITCH_POINT() ((void)0)
#endif

#define CTG_DEFINE_ATOMICS(bits, type)                                                             \
	static inline uint##bits##_t ctg_load##bits##_relaxed(const type *w)                       \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_load_n(&w->v, __ATOMIC_RELAXED);                                   \
	}                                                                                          \
	static inline uint##bits##_t ctg_load##bits##_acquire(const type *w)                       \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_load_n(&w->v, __ATOMIC_ACQUIRE);                                   \
	}                                                                                          \
	static inline void ctg_store##bits##_relaxed(type *w, uint##bits##_t v)                    \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		__atomic_store_n(&w->v, v, __ATOMIC_RELAXED);                                      \
	}                                                                                          \
	static inline void ctg_store##bits##_release(type *w, uint##bits##_t v)                    \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		__atomic_store_n(&w->v, v, __ATOMIC_RELEASE);                                      \
	}                                                                                          \
	/* On failure *expected is what was there. */                                              \
	static inline bool ctg_cas##bits##_acq_rel(                                                \
		type *w, uint##bits##_t *expected, uint##bits##_t desired)                         \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_compare_exchange_n(                                                \
			&w->v, expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);      \
	}                                                                                          \
	/* The adds, ors and ands return what was there before. */                                       \
	static inline uint##bits##_t ctg_add##bits##_acq_rel(type *w, uint##bits##_t v)            \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_fetch_add(&w->v, v, __ATOMIC_ACQ_REL);                             \
	}                                                                                          \
	static inline uint##bits##_t ctg_add##bits##_relaxed(type *w, uint##bits##_t v)            \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_fetch_add(&w->v, v, __ATOMIC_RELAXED);                             \
	}                                                                                          \
	static inline uint##bits##_t ctg_or##bits##_acq_rel(type *w, uint##bits##_t v)             \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_fetch_or(&w->v, v, __ATOMIC_ACQ_REL);                              \
	}                                                                                          \
	static inline uint##bits##_t ctg_and##bits##_acq_rel(type *w, uint##bits##_t v)            \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_fetch_and(&w->v, v, __ATOMIC_ACQ_REL);                             \
	}                                                                                          \
	static inline uint##bits##_t ctg_xchg##bits##_acq_rel(type *w, uint##bits##_t v)           \
	{                                                                                          \
		CTG_SWITCH_POINT();                                                                \
		return __atomic_exchange_n(&w->v, v, __ATOMIC_ACQ_REL);                            \
	}

CTG_DEFINE_ATOMICS(16, struct ctg_word16)
CTG_DEFINE_ATOMICS(32, struct ctg_word32)
CTG_DEFINE_ATOMICS(64, struct ctg_word64)

/*
 * Fields that a lock protects and that are also read without it, as hints that may be stale: the
 * reader without the lock uses the first, the writer under it the second.
 */
#define ctg_hint_load(p) (CTG_SWITCH_POINT(), __atomic_load_n((p), __ATOMIC_RELAXED))
#define ctg_hint_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)

/* A pointer that leads to something just made, which is complete before it can be found. */
#define ctg_pointer_acquire(p) (CTG_SWITCH_POINT(), __atomic_load_n((p), __ATOMIC_ACQUIRE))
#define ctg_pointer_publish(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)

#endif
