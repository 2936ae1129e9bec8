/* SPDX-License-Identifier: MIT */
#include "fiber.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
/* The registers that a call preserves; mxcsr and the x87 control word nobody changes. */
#define SAVED 6
__asm__(".text\n"
	".globl xp_switch\n"
	".type xp_switch, @function\n"
	"xp_switch:\n"
	"	pushq %rbp\n"
	"	pushq %rbx\n"
	"	pushq %r12\n"
	"	pushq %r13\n"
	"	pushq %r14\n"
	"	pushq %r15\n"
	"	movq %rsp, (%rdi)\n"
	"	movq %rsi, %rsp\n"
	"	popq %r15\n"
	"	popq %r14\n"
	"	popq %r13\n"
	"	popq %r12\n"
	"	popq %rbx\n"
	"	popq %rbp\n"
	"	ret\n"
	".size xp_switch, . - xp_switch\n"
	".section .note.GNU-stack, \"\", @progbits\n"
	".text\n");

void *xp_fiber_new(void *stack, size_t bytes, void (*entry)(void))
{
	uintptr_t top = ((uintptr_t)stack + bytes) & ~(uintptr_t)15;
	/* Below a 16-byte boundary by the return address that entry never uses. */
	uintptr_t *sp = (uintptr_t *)(top - 16 - sizeof(uintptr_t));

	*sp = 0;
	*--sp = (uintptr_t)entry;
	sp -= SAVED;
	memset(sp, 0, SAVED * sizeof(*sp));
	return sp;
}
#elif defined(__aarch64__)
#define SAVED 20
__asm__(".text\n"
	".globl xp_switch\n"
	".type xp_switch, %function\n"
	"xp_switch:\n"
	"	sub sp, sp, #160\n"
	"	stp x19, x20, [sp]\n"
	"	stp x21, x22, [sp, #16]\n"
	"	stp x23, x24, [sp, #32]\n"
	"	stp x25, x26, [sp, #48]\n"
	"	stp x27, x28, [sp, #64]\n"
	"	stp x29, x30, [sp, #80]\n"
	"	stp d8, d9, [sp, #96]\n"
	"	stp d10, d11, [sp, #112]\n"
	"	stp d12, d13, [sp, #128]\n"
	"	stp d14, d15, [sp, #144]\n"
	"	mov x9, sp\n"
	"	str x9, [x0]\n"
	"	mov sp, x1\n"
	"	ldp x19, x20, [sp]\n"
	"	ldp x21, x22, [sp, #16]\n"
	"	ldp x23, x24, [sp, #32]\n"
	"	ldp x25, x26, [sp, #48]\n"
	"	ldp x27, x28, [sp, #64]\n"
	"	ldp x29, x30, [sp, #80]\n"
	"	ldp d8, d9, [sp, #96]\n"
	"	ldp d10, d11, [sp, #112]\n"
	"	ldp d12, d13, [sp, #128]\n"
	"	ldp d14, d15, [sp, #144]\n"
	"	add sp, sp, #160\n"
	"	ret\n"
	".size xp_switch, . - xp_switch\n");

void *xp_fiber_new(void *stack, size_t bytes, void (*entry)(void))
{
	uintptr_t *sp = (uintptr_t *)(((uintptr_t)stack + bytes) & ~(uintptr_t)15) - SAVED;

	memset(sp, 0, SAVED * sizeof(*sp));
	sp[11] = (uintptr_t)entry; /* x30 */
	return sp;
}
#else
#error "the explorer knows how to switch stacks on x86_64 and aarch64"
#endif
