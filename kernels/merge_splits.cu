// Puts the splits of tree_attention together: out = sum_s 2^(lse_s - m) out_s / sum_s 2^(lse_s - m), m = max lse_s.
// One warp per (query, head) row.
#include "device.cuh"

template <typename T>
DEVICE void merge_splits(const float* partial_out, const float* partial_lse, T* out, int num_rows, int head_dim,
                         int num_splits) {
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (row >= num_rows) return;
  float largest = NEGATIVE_INFINITY, total = 0.f;
  for (int s = lane; s < num_splits; s += 32) largest = fmaxf(largest, partial_lse[(i64)s * num_rows + row]);
  largest = warp_max(largest);
  if (largest == NEGATIVE_INFINITY) largest = 0.f;  // a row that sees nothing (padding) becomes zeros
  for (int s = lane; s < num_splits; s += 32) total += exp2_approx(partial_lse[(i64)s * num_rows + row] - largest);
  total = warp_sum(total);
  const float inverse = total > 0.f ? 1.f / total : 0.f;
  for (int column = lane * 2; column < head_dim; column += 64) {
    float low = 0.f, high = 0.f;
    for (int s = 0; s < num_splits; s++) {
      float weight = exp2_approx(partial_lse[(i64)s * num_rows + row] - largest) * inverse;
      const float* source = partial_out + ((i64)s * num_rows + row) * head_dim + column;
      low += weight * source[0];
      high += weight * source[1];
    }
    *reinterpret_cast<u32*>(out + (i64)row * head_dim + column) = pack2((T*)0, low, high);
  }
}

#define MERGE_SPLITS(NAME, T)                                                                                  \
  KERNEL(128, 1)                                                                                               \
  NAME(const float* partial_out, const float* partial_lse, T* out, int num_rows, int head_dim, int num_splits) { \
    merge_splits<T>(partial_out, partial_lse, out, num_rows, head_dim, num_splits);                            \
  }
MERGE_SPLITS(merge_splits_bf16, bf16)
MERGE_SPLITS(merge_splits_f16, f16)
