// Puts the splits of tree_attention together: out = sum_s 2^(lse_s - m) out_s / sum_s 2^(lse_s - m), m = max lse_s.
// A warp takes one (query, head) row after the other; rows whose keys were not split have been written already.
#include "attention_work.cuh"

template <typename T>
DEVICE void merge_splits(const float* partial_out, const float* partial_lse, const int* context_lens,
                         const int* tree_lens, const int* query_indptr, T* out, int num_requests, int num_heads,
                         int num_kv_heads, int head_dim, int tile_rows, int wave, int min_split_tiles, int max_splits,
                         int window) {
  constexpr int MAX_PAIRS = 2;  // of columns for a lane, of heads of up to 128
  const int lane = threadIdx.x & 31, heads_per_kv = num_heads / num_kv_heads;
  const BatchWork work = {query_indptr, context_lens, tree_lens, num_requests, heads_per_kv, num_kv_heads, window,
                          tile_rows, wave, min_split_tiles, max_splits};
  const int num_rows = query_indptr[num_requests] * num_heads, num_warps = gridDim.x * (blockDim.x >> 5);
  for (int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5); row < num_rows; row += num_warps) {
    const int query = row / num_heads, head = row % num_heads;
    const Place place = place_of_query(work, query);
    if (place.num_splits == 1) continue;
    // Where the row lies: as tree_attention numbers rows, tiles and blocks.
    const int row_tiles = num_row_tiles(work, place.request);
    const int tile_row = (query - query_indptr[place.request]) * heads_per_kv + head % heads_per_kv;
    const i64 slot = place.first_slot + head / heads_per_kv * row_tiles + tile_row / tile_rows;
    const i64 first = slot * tile_rows + tile_row % tile_rows, step = (i64)num_kv_heads * row_tiles * tile_rows;

    float largest = NEGATIVE_INFINITY, total = 0.f;
    for (int s = lane; s < place.num_splits; s += 32) largest = fmaxf(largest, partial_lse[first + s * step]);
    largest = warp_max(largest);
    if (largest == NEGATIVE_INFINITY) largest = 0.f;
    for (int s = lane; s < place.num_splits; s += 32) total += exp2_approx(partial_lse[first + s * step] - largest);
    total = warp_sum(total);
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    float sums[MAX_PAIRS][2] = {};
    for (int base = 0; base < place.num_splits; base += 32) {
      const int mine = base + lane, end = min(place.num_splits - base, 32);
      const float my_weight =
          mine < place.num_splits ? exp2_approx(partial_lse[first + mine * step] - largest) * inverse : 0.f;
#pragma unroll 8  // so many reads are under way at a time
      for (int s = 0; s < end; s++) {
        const float weight = __shfl_sync(ALL_LANES, my_weight, s);
        const float* source = partial_out + (first + (base + s) * step) * head_dim;
#pragma unroll
        for (int pair = 0; pair < MAX_PAIRS; pair++) {
          const int column = pair * 64 + lane * 2;
          if (column >= head_dim) break;
          sums[pair][0] += weight * source[column];
          sums[pair][1] += weight * source[column + 1];
        }
      }
    }
#pragma unroll
    for (int pair = 0; pair < MAX_PAIRS; pair++) {
      const int column = pair * 64 + lane * 2;
      if (column < head_dim)
        *reinterpret_cast<u32*>(out + (i64)row * head_dim + column) = pack2((T*)0, sums[pair][0], sums[pair][1]);
    }
  }
}

#define MERGE_SPLITS(NAME, T)                                                                                       \
  KERNEL(128, 1)                                                                                                    \
  NAME(const float* partial_out, const float* partial_lse, const int* context_lens, const int* tree_lens,           \
       const int* query_indptr, T* out, int num_requests, int num_heads, int num_kv_heads, int head_dim,            \
       int tile_rows, int wave, int min_split_tiles, int max_splits, int window) {                                  \
    merge_splits<T>(partial_out, partial_lse, context_lens, tree_lens, query_indptr, out, num_requests, num_heads,  \
                    num_kv_heads, head_dim, tile_rows, wave, min_split_tiles, max_splits, window);                  \
  }
MERGE_SPLITS(merge_splits_bf16, bf16)
MERGE_SPLITS(merge_splits_f16, f16)
