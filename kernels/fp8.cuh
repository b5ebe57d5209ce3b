// Numbers of 8 bits in a KV cache: e4m3 without infinities ("fn": the largest is 448, all ones are NaN). Widening is
// exact in both 16-bit types. The machine converts from compute capability 8.9 on; before, shifts put sign, exponent
// and mantissa where the wider type has them and a product with a power of two corrects the exponent's bias, which is
// right for subnormals, too.
// With OUTRIDER_ON_CPU (tests only) the same names come from tests/support/cuda_on_cpu/fp8_on_cpu.h.
#pragma once
#include "device.cuh"
#ifdef OUTRIDER_ON_CPU
#include "fp8_on_cpu.h"
#else
struct fp8 { unsigned char bits; };

// widen2: the two numbers in bits 0..15 as 16-bit ones in one register. from_float: to the nearest, ties to even, and
// no further than the largest.
#if __CUDA_ARCH__ >= 890
DEVICE u32 widen2(f16*, u32 codes) {
  u32 y; asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(y) : "h"((u16)codes)); return y;
}
DEVICE u32 widen2(bf16*, u32 codes) {
  const u32 pair = widen2((f16*)0, codes);
  return pack2((bf16*)0, to_float(f16{(u16)pair}), to_float(f16{(u16)(pair >> 16)}));
}
DEVICE void from_float(fp8& y, float x) {
  u16 codes; asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(0.f), "f"(x));  // high half first
  y.bits = (unsigned char)codes;
}
#else
DEVICE u32 scale2(f16*, u32 x) {  // by 2^8
  u32 y; asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(0x5c005c00u)); return y;
}
DEVICE u32 scale2(bf16*, u32 x) {  // by 2^120; -0 is added, which changes nothing
  u32 y; asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(x), "r"(0x7b807b80u), "r"(0x80008000u)); return y;
}
DEVICE u32 exponent_shift(f16*) { return 1; }
DEVICE u32 exponent_shift(bf16*) { return 4; }

template <typename T>
DEVICE u32 widen2(T* type, u32 codes) {
  const u32 spread = __byte_perm(codes, 0u, 0x1404);  // each code in the upper byte of its half
  const u32 magnitude = spread & 0x7f007f00u;
  const u32 nan = ((magnitude + 0x01000100u) & 0x80008000u) >> 8;  // bit 7 of the half where all ones were
  return scale2(type, (spread & 0x80008000u) | magnitude >> exponent_shift(type)) | nan * 0xffu;
}
DEVICE void from_float(fp8& y, float x) {
  const float magnitude = fminf(fabsf(x), 448.f);
  const u32 sign = (u32)__float_as_int(x) >> 24 & 0x80u, bits = (u32)__float_as_int(magnitude);
  u32 code;
  if (x != x) code = 0x7fu;
  else if (magnitude < 0.015625f)  // subnormal, in units of 2^-9: what is the last bit of a sum around 2^14
    code = (u32)__float_as_int(magnitude + 16384.f) & 0xffu;
  else code = (bits + 0x7ffffu + (bits >> 20 & 1u) >> 20) - (120u << 3);
  y.bits = (unsigned char)(sign | code);
}
#endif
#endif

// Sixteen numbers; both places are aligned to 16 bytes.
template <typename T>
DEVICE void widen16(const fp8* source, T* target) {
  const uint4 codes = *reinterpret_cast<const uint4*>(source);
  uint4* wide = reinterpret_cast<uint4*>(target);
  T* type = 0;
  wide[0] = uint4{widen2(type, codes.x), widen2(type, codes.x >> 16), widen2(type, codes.y), widen2(type, codes.y >> 16)};
  wide[1] = uint4{widen2(type, codes.z), widen2(type, codes.z >> 16), widen2(type, codes.w), widen2(type, codes.w >> 16)};
}
