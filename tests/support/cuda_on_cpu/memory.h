// Memory accesses that need more than a plain load or store; shared by both executors. Inline, so that they are
// compiled with the kernel and its sanitizers.
#pragma once
#include "runtime.h"

static inline void check_aligned(const void* address, size_t bytes, int line) {
  if ((uintptr_t)address % bytes) cuda_on_cpu::fail("misaligned access", line);
}

static inline void load_matrices_at(u32 (&registers)[4], const void* row, bool transposed, int line) {
  check_aligned(row, 16, line);
  u16 elements[8];
  for (int i = 0; i < 8; i++) elements[i] = ((const u16*)row)[i];
  cuda_on_cpu::load_matrices(registers, elements, transposed, line);
}

static inline void copy_now(const cuda_on_cpu::AsyncCopy& copy) {
  for (int i = 0; i < copy.bytes; i++)
    ((unsigned char*)copy.target)[i] = copy.valid ? ((const unsigned char*)copy.source)[i] : 0;
}
static inline void copy_async(void* shared, const void* global, int bytes, bool valid, int line) {
  check_aligned(shared, bytes, line);
  if (valid) check_aligned(global, bytes, line);
  if (cuda_on_cpu::copies_are_eager()) copy_now({shared, global, bytes, valid, 0});
  else cuda_on_cpu::queue_copy(shared, global, bytes, valid);
}
static inline void land_copies(int pending) {
  cuda_on_cpu::AsyncCopy copy;
  while (cuda_on_cpu::take_copy(pending, &copy)) copy_now(copy);
}
