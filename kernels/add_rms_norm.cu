// sum = hidden + added, rounded to the type, and the RMS norm of the sum, times a weight. One block per row, so that a
// row's result is the same among any other rows; squares are added in float32, in an order that the width alone gives.
#include "packs.cuh"

template <typename T>
DEVICE float add_at(const T* hidden, const T* added, T* sum, int i) {
  T rounded;
  from_float(rounded, to_float(hidden[i]) + to_float(added[i]));
  sum[i] = rounded;
  return to_float(rounded) * to_float(rounded);
}

template <typename T>
DEVICE void add_rms_norm(const T* hidden, const T* added, const T* weight, T* sums, T* normed, int width, float eps,
                         i64 hidden_stride, i64 added_stride, int aligned) {
  constexpr int SIZE = Pack<T>::SIZE;
  DYNAMIC_SHARED(shared);
  float* warp_squares = reinterpret_cast<float*>(shared);  // [16]
  const int row = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, num_warps = blockDim.x >> 5;
  const int num_packed = width / SIZE * SIZE;
  hidden += row * hidden_stride;
  added += row * added_stride;
  T* sum = sums + (i64)row * width;
  T* out = normed + (i64)row * width;

  float squares = 0.f;
  for (int i = threadIdx.x * SIZE; i < num_packed; i += blockDim.x * SIZE) {
    Pack<T> pack = load_pack(hidden + i, aligned);
    const Pack<T> other = load_pack(added + i, aligned);
    for (int e = 0; e < SIZE; e++) {
      from_float(pack.at[e], to_float(pack.at[e]) + to_float(other.at[e]));
      squares += to_float(pack.at[e]) * to_float(pack.at[e]);
    }
    store_pack(sum + i, pack, aligned);
  }
  for (int i = num_packed + threadIdx.x; i < width; i += blockDim.x) squares += add_at(hidden, added, sum, i);

  squares = warp_sum(squares);
  if (lane == 0) warp_squares[warp] = squares;
  __syncthreads();
  squares = warp_sum(lane < num_warps ? warp_squares[lane] : 0.f);
  const float scale = 1.f / sqrtf(squares / width + eps);
  // Each thread reads of `sum` what it wrote itself.
  for (int i = threadIdx.x * SIZE; i < num_packed; i += blockDim.x * SIZE) {
    Pack<T> pack = load_pack(sum + i, aligned);
    const Pack<T> factor = load_pack(weight + i, aligned);
    for (int e = 0; e < SIZE; e++)
      from_float(pack.at[e], to_float(pack.at[e]) * scale * to_float(factor.at[e]));
    store_pack(out + i, pack, aligned);
  }
  for (int i = num_packed + threadIdx.x; i < width; i += blockDim.x)
    from_float(out[i], to_float(sum[i]) * scale * to_float(weight[i]));
}

#define ADD_RMS_NORM(NAME, T)                                                                                     \
  KERNEL(512, 1)                                                                                                  \
  NAME(const T* hidden, const T* added, const T* weight, T* sums, T* normed, int width, float eps,               \
       i64 hidden_stride, i64 added_stride, int aligned) {                                                       \
    add_rms_norm<T>(hidden, added, weight, sums, normed, width, eps, hidden_stride, added_stride, aligned);       \
  }
ADD_RMS_NORM(add_rms_norm_bf16, bf16)
ADD_RMS_NORM(add_rms_norm_f16, f16)
ADD_RMS_NORM(add_rms_norm_f32, float)
