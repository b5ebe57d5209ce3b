// What kernels/fp8.cuh has of inline PTX, for the source executor.
#pragma once
#include "fp8_codes.h"

struct fp8 { unsigned char bits; };

template <typename T>
static inline u32 widen2(T* type, u32 codes) {
  return pack2(type, float_of_code(codes & 255), float_of_code(codes >> 8 & 255));
}
static inline void from_float(fp8& y, float x) { y.bits = (unsigned char)code_of_float(x); }
