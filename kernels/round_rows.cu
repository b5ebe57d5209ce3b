// Rows as FP8 with their scales. A scale is the largest magnitude of a row, or of a group of its columns, over 448; or
// it is given. Divisions are exact ones, and the largest of numbers does not depend on their order: so the result is
// the reference's, bit for bit, whoever looks at which columns. Rows behind `num_rows` are of zeros.
#include "fp8.cuh"
#include "packs.cuh"

// As integers magnitudes sort as they do as numbers, infinity is above them, and NaN above that.
template <typename T>
DEVICE u32 magnitude_bits(T x) { return (u32)__float_as_int(to_float(x)) & 0x7fffffffu; }

// Over each `lanes` threads of a warp, a power of two.
DEVICE u32 warp_max(u32 x, int lanes) {
  for (int step = lanes / 2; step > 0; step >>= 1) x = max(x, __shfl_xor_sync(ALL_LANES, x, step));
  return x;
}
DEVICE float scale_of(u32 largest, float bound, float least_scale) {
  const float magnitude = __int_as_float((int)largest);
  if (magnitude != magnitude) return __int_as_float(0x7fc00000);  // minimum and maximum would lose it
  return fmaxf(fminf(magnitude, bound) / 448.f, least_scale);
}
template <typename T>
DEVICE u32 rounded(T x, float scale) {
  const float quotient = to_float(x) / scale;
  fp8 code;
  from_float(code, quotient);
  return quotient != quotient ? 0x7fu : code.bits;
}

// Of `num` columns: threads `first`, `first` + 1 and so on, `step` in all, have a pack each in turn.
template <typename T>
DEVICE u32 largest_of(const T* x, int num, int first, int step, bool aligned) {
  constexpr int SIZE = Pack<T>::SIZE;
  const int num_packed = num / SIZE * SIZE;
  u32 largest = 0u;
  for (int i = first * SIZE; i < num_packed; i += step * SIZE) {
    const Pack<T> pack = load_pack(x + i, aligned);
    for (int e = 0; e < SIZE; e++) largest = max(largest, magnitude_bits(pack.at[e]));
  }
  for (int i = num_packed + first; i < num; i += step) largest = max(largest, magnitude_bits(x[i]));
  return largest;
}

// Four numbers in the bytes of a word, the first in the lowest.
template <typename T>
DEVICE u32 rounded4(const T* x, float scale) {
  u32 word = 0u;
  for (int e = 0; e < 4; e++) word |= rounded(x[e], scale) << (8 * e);
  return word;
}
DEVICE void store_codes(fp8* out, const u32 (&words)[1]) { *reinterpret_cast<u32*>(out) = words[0]; }
DEVICE void store_codes(fp8* out, const u32 (&words)[2]) {
  *reinterpret_cast<u64*>(out) = (u64)words[1] << 32 | words[0];
}

template <typename T>
DEVICE void round_columns(const T* x, fp8* out, int num, int first, int step, float scale, bool is_there,
                          bool aligned) {
  constexpr int SIZE = Pack<T>::SIZE;
  const int num_packed = num / SIZE * SIZE;
  const T zero{};
  for (int i = first * SIZE; i < num_packed; i += step * SIZE) {
    const Pack<T> pack = is_there ? load_pack(x + i, aligned) : Pack<T>{};
    u32 words[SIZE / 4];
    for (int w = 0; w < SIZE / 4; w++) words[w] = rounded4(pack.at + 4 * w, scale);
    if (aligned) {
      store_codes(out + i, words);
    } else {
      for (int e = 0; e < SIZE; e++) out[i + e].bits = (unsigned char)(words[e / 4] >> (8 * (e % 4)));
    }
  }
  for (int i = num_packed + first; i < num; i += step)
    out[i].bits = (unsigned char)rounded(is_there ? x[i] : zero, scale);
}

// A scale for each row. Each block of a row finds the scale by itself, and rounds a part: to divide takes longer.
template <typename T>
DEVICE void round_rows(const T* x, fp8* values, float* scales, int num_rows, int columns, i64 stride, float bound,
                       float least_scale, float static_scale, int is_static, int aligned) {
  DYNAMIC_SHARED(shared);
  u32* of_warps = reinterpret_cast<u32*>(shared);  // [8]
  const int row = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, num_warps = blockDim.x >> 5;
  const bool is_there = row < num_rows;
  x += row * stride;
  float scale = static_scale;
  if (!is_static) {
    u32 largest = warp_max(largest_of(x, is_there ? columns : 0, threadIdx.x, blockDim.x, aligned), 32);
    if (lane == 0) of_warps[warp] = largest;
    __syncthreads();
    largest = warp_max(lane < num_warps ? of_warps[lane] : 0u, 32);
    scale = scale_of(largest, bound, least_scale);
  }
  const int first = blockIdx.y * blockDim.x + threadIdx.x, step = gridDim.y * blockDim.x;
  round_columns(x, values + (i64)row * columns, columns, first, step, scale, is_there, aligned);
  if (first == 0) scales[row] = scale;
}

// A scale for each group of `width` columns, the last of which may have fewer; `lanes` threads of a warp for each.
template <typename T>
DEVICE void round_groups(const T* x, fp8* values, float* scales, int num_rows, int columns, i64 stride, float bound,
                         float least_scale, int width, int num_groups, int lanes, i64 scale_row_stride,
                         i64 scale_group_stride, int aligned) {
  const int row = blockIdx.x, lane = threadIdx.x & (lanes - 1);
  const int group = (blockIdx.y * blockDim.x + threadIdx.x) / lanes, begin = group * width;
  // The whole warp takes part in its maxima, also where no group is left.
  const bool is_group = group < num_groups, is_there = row < num_rows;
  const int num = is_group ? min(width, columns - begin) : 0;
  x += row * stride + begin;
  const u32 largest = warp_max(largest_of(x, is_there ? num : 0, lane, lanes, aligned), lanes);
  const float scale = scale_of(largest, bound, least_scale);
  round_columns(x, values + (i64)row * columns + begin, num, lane, lanes, scale, is_there, aligned);
  if (is_group && lane == 0) scales[row * scale_row_stride + group * scale_group_stride] = scale;
}

#define ROUND_ROWS(NAME, T)                                                                                         \
  KERNEL(256, 1)                                                                                                    \
  NAME(const T* x, fp8* values, float* scales, int num_rows, int columns, i64 stride, float bound,                  \
       float least_scale, float static_scale, int is_static, int aligned) {                                        \
    round_rows<T>(x, values, scales, num_rows, columns, stride, bound, least_scale, static_scale, is_static,        \
                  aligned);                                                                                         \
  }
#define ROUND_GROUPS(NAME, T)                                                                                       \
  KERNEL(256, 1)                                                                                                    \
  NAME(const T* x, fp8* values, float* scales, int num_rows, int columns, i64 stride, float bound,                  \
       float least_scale, int width, int num_groups, int lanes, i64 scale_row_stride, i64 scale_group_stride,       \
       int aligned) {                                                                                               \
    round_groups<T>(x, values, scales, num_rows, columns, stride, bound, least_scale, width, num_groups, lanes,     \
                    scale_row_stride, scale_group_stride, aligned);                                                 \
  }
ROUND_ROWS(round_rows_bf16, bf16)
ROUND_ROWS(round_rows_f16, f16)
ROUND_ROWS(round_rows_f32, float)
ROUND_GROUPS(round_rows_bf16_groups, bf16)
ROUND_GROUPS(round_rows_f16_groups, f16)
ROUND_GROUPS(round_rows_f32_groups, float)
