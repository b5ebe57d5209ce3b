// Everything that touches the machine: types, inline PTX, warp reductions. No header of the CUDA toolkit is
// needed. Every instruction here exists from sm_80 up, so one source serves all targets.
// With OUTRIDER_ON_CPU (tests only) the same names come from tests/support/cuda_on_cpu/device_on_cpu.h.
#pragma once
#ifdef OUTRIDER_ON_CPU
#include "device_on_cpu.h"
#else
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, blocks_per_sm) extern "C" __global__ void __launch_bounds__(threads, blocks_per_sm)
extern __shared__ __align__(128) unsigned char dynamic_shared[];
#define DYNAMIC_SHARED(name) unsigned char* name = dynamic_shared
#define NEGATIVE_INFINITY __int_as_float(0xff800000)

DEVICE float to_float(bf16 x) { return __int_as_float((int)((u32)x.bits << 16)); }
DEVICE float to_float(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
DEVICE void from_float(bf16& y, float x) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void from_float(f16& y, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }

// Two values in one register, `low` in bits 0..15 (the PTX instruction names the high half first).
DEVICE u32 pack2(bf16*, float low, float high) {
  u32 y; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y;
}
DEVICE u32 pack2(f16*, float low, float high) {
  u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y;
}

DEVICE float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE float reciprocal_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// D += A B on the tensor cores: A 16x16 (rows), B 16x8 (columns), D 16x8 in f32. Of a fragment lane l holds,
// with g = l / 4 and t = l % 4:  A rows g, g+8, columns 2t, 2t+1 (+8);  B rows 2t, 2t+1 (+8), column g;
// D rows g, g+8, columns 2t, 2t+1.  (PTX ISA, "Matrix Fragments for mma.m16n8k16".)
DEVICE void multiply_accumulate(bf16*, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void multiply_accumulate(f16*, float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 matrices of 16-bit elements; lane 8m + r passes the address of row r of matrix m, and receives
// elements 2t, 2t+1 of row g of each (transposed: of column g).
DEVICE void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
DEVICE void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

// 16 bytes from global to shared memory in the background; zeros, and no read, when `valid` is false.
DEVICE void copy_async_16(void* shared, const void* global, bool valid) {
  int num_bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(shared)), "l"(global), "r"(num_bytes) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's committed groups are still under way.
template <int pending> DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(pending) : "memory");
}
#endif

enum : u32 { ALL_LANES = 0xffffffffu };

DEVICE float warp_max(float x) {
  for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}
DEVICE float warp_sum(float x) {
  for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}
