// Switching stacks, and copying bytes unseen by sanitizers. x86-64, System V.
#pragma once
#include <cstddef>
#ifndef __x86_64__
#error "the CPU executors switch stacks in x86-64 assembly; add the few instructions for this processor"
#endif

namespace cuda_on_cpu {

// Saves the callee-saved registers and the stack pointer, and goes on where `load` was saved.
extern "C" void outrider_switch_stacks(void** save, void* load);
asm(R"(.text
.weak outrider_switch_stacks
.type outrider_switch_stacks,@function
outrider_switch_stacks:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");
inline void switch_stacks(void** save, void* load) { outrider_switch_stacks(save, load); }

// A stack that starts in `entry` when switched to.
inline void* prepare_stack(char* stack, size_t bytes, void (*entry)()) {
  void** top = (void**)(stack + bytes - 72);  // so that the stack pointer is 8 mod 16 on entry, as after a call
  *top = nullptr;
  *--top = (void*)entry;
  for (int i = 0; i < 6; i++) *--top = nullptr;
  return top;
}

inline void raw_copy(void* target, const void* source, size_t bytes) {
  auto* to = (unsigned char*)target;
  auto* from = (const unsigned char*)source;
  unsigned long long word;
  for (; bytes >= 8; bytes -= 8, to += 8, from += 8)
    asm volatile("movq (%2), %0\n\tmovq %0, (%1)" : "=&r"(word) : "r"(to), "r"(from) : "memory");
  for (; bytes >= 4; bytes -= 4, to += 4, from += 4)
    asm volatile("movl (%2), %k0\n\tmovl %k0, (%1)" : "=&r"(word) : "r"(to), "r"(from) : "memory");
  for (; bytes > 0; bytes--, to++, from++)
    asm volatile("movb (%2), %b0\n\tmovb %b0, (%1)" : "=&q"(word) : "r"(to), "r"(from) : "memory");
}

// Brings `in` (at most 64 bytes) to a warp operation; returns the slots of all lanes once they have arrived, after
// `combine` (may be null) has run once on them.
using Combine = void (*)(unsigned char* const* slots);
unsigned char* const* warp_operation(const char* name, unsigned mask, const void* in, size_t bytes, Combine combine,
                                     int line);

}  // namespace cuda_on_cpu
