// Rotates the queries and keys of new nodes by their positions' angles (halves paired: element i with i + D/2, as
// in Llama and Qwen) and writes keys and values to their cache rows. A negative row is padding: nothing written.
// A cache in FP8 gets what a cache of the queries' type would get, divided by the layer's scale and rounded once more.
// One block per node.
#include "fp8.cuh"

template <typename T>
DEVICE void keep(T& place, T x, float scale) { place = x; }
template <typename T>
DEVICE void keep(fp8& place, T x, float scale) { from_float(place, to_float(x) / scale); }

template <typename T, typename C>
DEVICE void rotate_pair(const T* source, C* target, int i, int half, T cosine_bits, T sine_bits, float scale) {
  float cosine = to_float(cosine_bits), sine = to_float(sine_bits);
  float low = to_float(source[i]), high = to_float(source[i + half]);
  T first, second;
  from_float(first, low * cosine - high * sine);
  from_float(second, high * cosine + low * sine);
  keep(target[i], first, scale);
  keep(target[i + half], second, scale);
}

template <typename T, typename C>
DEVICE void rope_append(const T* q, const T* k, const T* v, const T* cosines, const T* sines, const i64* kv_rows,
                        T* q_rotated, C* k_pages, C* v_pages, float key_scale, float value_scale, int num_heads,
                        int num_kv_heads, int head_dim, int page_size, i64 q_stride, i64 k_stride, i64 v_stride,
                        i64 angle_stride, i64 page_stride, i64 row_stride, i64 kv_head_stride) {
  const int node = blockIdx.x, half = head_dim / 2;
  const T* cosine = cosines + node * angle_stride;
  const T* sine = sines + node * angle_stride;
  for (int i = threadIdx.x; i < num_heads * half; i += blockDim.x) {
    int head = i / half, pair = i % half;
    rotate_pair(q + node * q_stride + head * head_dim, q_rotated + ((i64)node * num_heads + head) * head_dim, pair,
                half, cosine[pair], sine[pair], 1.f);
  }
  const i64 row = kv_rows[node];
  if (row < 0) return;
  const i64 place = row / page_size * page_stride + row % page_size * row_stride;
  for (int i = threadIdx.x; i < num_kv_heads * half; i += blockDim.x) {
    int head = i / half, pair = i % half;
    i64 target = place + head * kv_head_stride;
    const T* value = v + node * v_stride + head * head_dim;
    rotate_pair(k + node * k_stride + head * head_dim, k_pages + target, pair, half, cosine[pair], sine[pair],
                key_scale);
    keep(v_pages[target + pair], value[pair], value_scale);
    keep(v_pages[target + pair + half], value[pair + half], value_scale);
  }
}

#define ROPE_APPEND(NAME, T, C)                                                                                      \
  KERNEL(256, 1)                                                                                                     \
  NAME(const T* q, const T* k, const T* v, const T* cosines, const T* sines, const i64* kv_rows, T* q_rotated,       \
       C* k_pages, C* v_pages, float key_scale, float value_scale, int num_heads, int num_kv_heads, int head_dim,    \
       int page_size, i64 q_stride, i64 k_stride, i64 v_stride, i64 angle_stride, i64 page_stride, i64 row_stride,   \
       i64 kv_head_stride) {                                                                                         \
    rope_append<T, C>(q, k, v, cosines, sines, kv_rows, q_rotated, k_pages, v_pages, key_scale, value_scale,         \
                      num_heads, num_kv_heads, head_dim, page_size, q_stride, k_stride, v_stride, angle_stride,      \
                      page_stride, row_stride, kv_head_stride);                                                      \
  }
ROPE_APPEND(rope_append_bf16, bf16, bf16)
ROPE_APPEND(rope_append_f16, f16, f16)
ROPE_APPEND(rope_append_bf16_fp8, bf16, fp8)
ROPE_APPEND(rope_append_f16_fp8, f16, fp8)
