// The part of the CUDA language that kernels/*.cu use, on top of runtime.h. Included by kernels/device.cuh in place
// of the inline PTX.
#pragma once
#include <cmath>
#include <cstring>
#include <limits>

#include "memory.h"
#include "runtime.h"

using std::max;
using std::min;
struct alignas(16) uint4 { u32 x, y, z, w; };

#define DEVICE static inline
#define KERNEL(threads, blocks_per_sm) extern "C" void
#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_cpu::dynamic_shared()
#define NEGATIVE_INFINITY (-std::numeric_limits<float>::infinity())

#define threadIdx (*cuda_on_cpu::thread_index)
#define blockIdx (*cuda_on_cpu::block_index)
#define blockDim (*cuda_on_cpu::block_size)
#define gridDim (*cuda_on_cpu::grid_size)
#define __syncthreads() cuda_on_cpu::block_barrier(__LINE__)
#define __syncwarp() cuda_on_cpu::warp_barrier(cuda_on_cpu::FULL_WARP, __LINE__)
#define __shfl_xor_sync(mask, value, step) shuffle_value(mask, value, cuda_on_cpu::lane_number() ^ (step), __LINE__)
#define __shfl_up_sync(mask, value, step) shuffle_value(mask, value, cuda_on_cpu::lane_number() - (step), __LINE__)
#define __shfl_sync(mask, value, source) shuffle_value(mask, value, source, __LINE__)
#define __any_sync(mask, predicate) (cuda_on_cpu::ballot(mask, predicate, __LINE__) != 0u)
#define __ballot_sync(mask, predicate) cuda_on_cpu::ballot(mask, predicate, __LINE__)

template <typename V>
static inline V shuffle_value(u32 mask, V value, int source_lane, int line) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8);
  u32 words[sizeof(V) / 4];
  memcpy(words, &value, sizeof value);
  for (u32& word : words) word = cuda_on_cpu::shuffle(mask, word, source_lane, line);
  memcpy(&value, words, sizeof value);
  return value;
}

static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __popcll(u64 x) { return __builtin_popcountll(x); }
static inline u32 __byte_perm(u32 low, u32 high, u32 selector) {  // without the replication of signs
  const u64 bytes = (u64)high << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; i++) result |= (u32)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}
static inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
static inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __uint2float_rn(u32 x) { return (float)x; }
static inline u64 __float2ull_rn(float x) { return x >= 0.f ? (u64)nearbyintf(x) : 0; }  // NaN becomes 0, as there
static inline float exp2_approx(float x) { return exp2f(x); }
static inline float reciprocal_approx(float x) { return 1.f / x; }

template <typename T>
static inline u32 pack2(T*, float low, float high) {
  T first, second;
  from_float(first, low);
  from_float(second, high);
  return first.bits | (u32)second.bits << 16;
}

static inline void mma_at(bool is_bf16, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, int line) {
  u32 b[2] = {b0, b1};
  cuda_on_cpu::multiply_accumulate(is_bf16, d, a, b, line);
}
static inline bool is_bf16(bf16*) { return true; }
static inline bool is_bf16(f16*) { return false; }
#define multiply_accumulate(type, d, a, b0, b1) mma_at(is_bf16(type), d, a, b0, b1, __LINE__)
#define load_matrices(registers, row) load_matrices_at(registers, row, false, __LINE__)
#define load_matrices_transposed(registers, row) load_matrices_at(registers, row, true, __LINE__)
#define copy_async_16(shared, global, valid) copy_async(shared, global, 16, valid, __LINE__)
static inline void copy_async_commit() { cuda_on_cpu::commit_copies(); }
template <int pending>
static inline void copy_async_wait() { land_copies(pending); }
