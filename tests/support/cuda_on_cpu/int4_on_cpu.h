// What kernels/int4.cuh has of inline PTX, for the source executor.
#pragma once
#include "device_on_cpu.h"

static inline u32 fma2(u32 x, u32 y, u32 z) {
  float results[2];
  for (int half = 0; half < 2; half++) {
    const int shift = 16 * half;
    // A float holds enough of the result to round it once more.
    results[half] = std::fma(to_float(bf16{(u16)(x >> shift)}), to_float(bf16{(u16)(y >> shift)}),
                             to_float(bf16{(u16)(z >> shift)}));
  }
  return pack2((bf16*)0, results[0], results[1]);
}
