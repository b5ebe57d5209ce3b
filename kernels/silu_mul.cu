// out = silu(gate) * up of rows that hold all gates first, then all ups. silu is rounded to the type before the product,
// as where two operators compute it. A block has part of one row.
#include "packs.cuh"

template <typename T>
DEVICE T gated(T gate, T up) {
  const float x = to_float(gate);
  T rounded, out;
  from_float(rounded, x / (1.f + expf(-x)));
  from_float(out, to_float(rounded) * to_float(up));
  return out;
}

template <typename T>
DEVICE void silu_mul(const T* gate_up, T* out, int width, i64 stride, int aligned) {
  constexpr int SIZE = Pack<T>::SIZE;
  const int num_packed = width / SIZE * SIZE;
  const int first = blockIdx.x * blockDim.x + threadIdx.x, step = gridDim.x * blockDim.x;
  const T* gate = gate_up + blockIdx.y * stride;
  const T* up = gate + width;
  out += (i64)blockIdx.y * width;
  for (int i = first * SIZE; i < num_packed; i += step * SIZE) {
    Pack<T> pack = load_pack(gate + i, aligned);
    const Pack<T> other = load_pack(up + i, aligned);
    for (int e = 0; e < SIZE; e++) pack.at[e] = gated(pack.at[e], other.at[e]);
    store_pack(out + i, pack, aligned);
  }
  for (int i = num_packed + first; i < width; i += step) out[i] = gated(gate[i], up[i]);
}

#define SILU_MUL(NAME, T)                                                                \
  KERNEL(256, 1)                                                                         \
  NAME(const T* gate_up, T* out, int width, i64 stride, int aligned) {                   \
    silu_mul<T>(gate_up, out, width, stride, aligned);                                   \
  }
SILU_MUL(silu_mul_bf16, bf16)
SILU_MUL(silu_mul_f16, f16)
SILU_MUL(silu_mul_f32, float)
