// What translated PTX needs: instructions with more to them than a C++ operator, by the PTX ISA's definitions.
#pragma once
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <limits>

#include "fp8_codes.h"
#include "memory.h"
#include "runtime.h"

static inline float as_f32(uint32_t bits) { return std::bit_cast<float>(bits); }
static inline double as_f64(uint64_t bits) { return std::bit_cast<double>(bits); }
static inline uint32_t bits_f32(float x) { return std::bit_cast<uint32_t>(x); }
static uint32_t bits_f32(double) = delete;  // float arithmetic that came out as double is a fault of the translator
static inline uint64_t bits_f64(double x) { return std::bit_cast<uint64_t>(x); }

static inline u16 to_bf16(float x) { bf16 y; from_float(y, x); return y.bits; }
static inline u16 to_f16(float x) { f16 y; from_float(y, x); return y.bits; }
static inline float from_bf16(u16 bits) { return to_float(bf16{bits}); }
static inline float from_f16(u16 bits) { return to_float(f16{bits}); }
static inline float saturate(float x) { return x > 0 ? std::min(x, 1.f) : 0.f; }  // NaN becomes 0

template <typename T>
static inline T to_integer(double x) {  // saturates; NaN becomes 0
  if (x != x) return 0;
  if (x <= (double)std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  return x >= (double)std::numeric_limits<T>::max() ? std::numeric_limits<T>::max() : (T)x;
}

template <typename Operation>
static inline float with_rounding(int mode, Operation operation) {
  const int before = fegetround();
  fesetround(mode);
  volatile float result = operation();
  fesetround(before);
  return result;
}
static inline float add_toward_zero(volatile float x, volatile float y) {
  return with_rounding(FE_TOWARDZERO, [&] { return x + y; });
}
static inline float fma_toward_minus(volatile float x, volatile float y, volatile float z) {
  return with_rounding(FE_DOWNWARD, [&] { return std::fma((float)x, (float)y, (float)z); });
}

template <typename T>
static inline T divide(T x, T y, int line) {
  if (y == 0) cuda_on_cpu::fail("integer division by zero", line);
  return x / y;
}
template <typename T>
static inline T remainder(T x, T y, int line) {
  if (y == 0) cuda_on_cpu::fail("integer division by zero", line);
  return x % y;
}
static inline uint32_t high_product(uint32_t x, uint32_t y) { return (uint64_t)x * y >> 32; }
static inline int32_t high_product(int32_t x, int32_t y) { return (int64_t)x * y >> 32; }
static inline uint64_t high_product(uint64_t x, uint64_t y) { return (unsigned __int128)x * y >> 64; }
static inline int64_t high_product(int64_t x, int64_t y) { return (__int128)x * y >> 64; }

template <typename T>
static inline T shift_left(T x, uint32_t n) { return n >= 8 * sizeof(T) ? 0 : (T)((std::make_unsigned_t<T>)x << n); }
template <typename T>
static inline T shift_right(T x, uint32_t n) {
  return n >= 8 * sizeof(T) ? (x < 0 ? (T)-1 : (T)0) : (T)(x >> n);
}
static inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t n, bool left, bool wrap) {
  n = wrap ? n & 31 : std::min(n, 32u);
  const uint64_t both = (uint64_t)high << 32 | low;
  return left ? (uint32_t)(both << n >> 32) : (uint32_t)(both >> n);
}
template <typename T>
static inline T extract_bits(T x, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  const uint32_t last = 8 * sizeof(T) - 1;
  const bool fill = std::numeric_limits<T>::is_signed && length && (x >> std::min(position + length - 1, last) & 1);
  std::make_unsigned_t<T> result = 0;
  for (uint32_t i = 0; i <= last; i++) {
    const bool bit = i < length && position + i <= last ? (x >> (position + i) & 1) : fill;
    result |= (std::make_unsigned_t<T>)bit << i;
  }
  return (T)result;
}
template <typename T>
static inline T insert_bits(T field, T x, uint32_t position, uint32_t length) {
  position &= 255, length &= 255;
  for (uint32_t i = 0; i < length && position + i < 8 * sizeof(T); i++) {
    const T bit = (T)1 << (position + i);
    x = (x & ~bit) | (field >> i & 1 ? bit : 0);
  }
  return x;
}
static inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = (uint64_t)high << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t choice = selector >> (4 * i) & 15;
    uint32_t byte = (uint32_t)(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;  // the sign, replicated
    result |= byte << (8 * i);
  }
  return result;
}
static inline uint32_t logic_table(uint32_t x, uint32_t y, uint32_t z, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i++) result |= (table >> ((x >> i & 1) << 2 | (y >> i & 1) << 1 | (z >> i & 1)) & 1) << i;
  return result;
}

enum class Shuffle { up, down, bfly, idx };
// The pseudo code of shfl.sync: `clamp` holds the segment mask (bits 8..12) and the largest lane (bits 0..4).
static inline uint32_t shuffle_ptx(uint32_t value, uint32_t operand, uint32_t clamp, uint32_t mask, Shuffle mode,
                                   bool* valid, int line) {
  const int lane = cuda_on_cpu::lane_number(), distance = operand & 31, bound = clamp & 31, segment = clamp >> 8 & 31;
  const int last = (lane & segment) | (bound & ~segment), first = lane & segment;
  int source = 0;
  if (mode == Shuffle::up) source = lane - distance;
  if (mode == Shuffle::down) source = lane + distance;
  if (mode == Shuffle::bfly) source = lane ^ distance;
  if (mode == Shuffle::idx) source = first | (distance & ~segment);
  *valid = mode == Shuffle::up ? source >= last : source <= last;
  return cuda_on_cpu::shuffle(mask, value, *valid ? source : lane, line);
}
