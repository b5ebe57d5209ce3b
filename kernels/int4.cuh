// Numbers of 4 bits that become bfloat16: (value - 8) * scale + centre, rounded once.
// With OUTRIDER_ON_CPU (tests only) the same names come from tests/support/cuda_on_cpu/int4_on_cpu.h.
#pragma once
#include "device.cuh"
#ifdef OUTRIDER_ON_CPU
#include "int4_on_cpu.h"
#else
DEVICE u32 fma2(u32 x, u32 y, u32 z) {  // x * y + z of two bfloat16 in a register
  u32 d; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(x), "r"(y), "r"(z)); return d;
}
#endif

// The values in bits 4 `place` .. + 3 of both halves of a word; scale and centre stand in both halves of theirs.
// Behind the upper bits of 128 a value of 4 bits is the last ones of 128 + value, from which 136 is taken exactly.
DEVICE u32 widen_nibbles(u32 word, int place, u32 scales, u32 centres) {
  const u32 biased = (word >> (4 * place) & 0x000f000fu) | 0x43004300u;
  return fma2(fma2(biased, 0x3f803f80u, 0xc308c308u), scales, centres);
}
