// Attention of tree nodes over a paged KV cache: every node sees its request's committed tokens, its ancestors
// and itself. A root alone is plain decoding, a chain is a prefill chunk: one kernel serves all.
//
// The keys of request b are numbered 0 .. context_len-1 (committed) and then context_len + j for tree row j. The
// queries are the last rows of the tree. Rows of the score matrix are (node, query head of one KV head) pairs, so
// that K and V are read once for all heads that share them. Online softmax as in FlashAttention-2 (Dao 2023),
// base 2; keys are split over blocks (Flash-Decoding) and, where rows are few, over the warps of a block.
#include "device.cuh"

// Which of the 32 keys from `first_key` on a node sees: bit i is key first_key + i. Parents come before children,
// so a node's ancestors in row order are in depth order, and the last `window` of them are the ones in its window.
DEVICE u32 visible_keys(const u64* ancestors, int mask_words, int depth, int context_len, int first_key, int window) {
  int row = first_key - context_len;  // tree row of bit 0; negative inside the context
  u32 committed = row >= 0 ? 0u : row <= -32 ? ~0u : (1u << -row) - 1u;
  u32 tree = 0u;
  int num_after = 0;                  // ancestors in rows beyond these 32
  if (row > -32) {
    for (int w = 0; w < mask_words; w++) {
      u64 word = ancestors[w];
      int shift = 64 * w - row;       // where bit 0 of this word lands
      if (shift <= -64) continue;
      u64 bits = shift >= 64 ? 0ull : shift >= 0 ? word << shift : word >> -shift;
      u64 after = shift >= 32 ? word : shift > -32 ? word >> (32 - shift) : 0ull;
      tree |= (u32)bits;
      if (window == 0 && shift > 0) break;
      num_after += __popcll(after);
    }
  }
  if (window > 0) {
    int first_committed = context_len + depth - window + 1 - first_key;  // bit of the first key in the window
    if (first_committed > 0) committed &= first_committed >= 32 ? 0u : ~0u << first_committed;
    for (int surplus = num_after + __popc(tree) - window; surplus > 0 && tree != 0u; surplus--) tree &= tree - 1u;
  }
  return committed | tree;
}

template <typename T, int D, int ROW_WARPS, int KEY_WARPS, int WARP_KEYS>
DEVICE void tree_attention(
    const T* queries, const T* k_pages, const T* v_pages, const int* page_table, const int* context_lens,
    const int* tree_lens, const int* query_indptr, const u64* ancestors, const int* depths, T* out, float* partial_out,
    float* partial_lse, int num_queries, int num_heads, int num_kv_heads, int page_size, int max_pages, int mask_words,
    int num_splits, int window, float scale, float soft_cap, i64 query_stride, i64 head_stride, i64 page_stride,
    i64 row_stride, i64 kv_head_stride) {
  constexpr int NUM_WARPS = ROW_WARPS * KEY_WARPS, NUM_THREADS = 32 * NUM_WARPS;
  constexpr int TILE_ROWS = 16 * ROW_WARPS, TILE_KEYS = WARP_KEYS * KEY_WARPS;
  constexpr int LINE = D + 8;  // elements per key in shared memory: 16 bytes of padding against bank conflicts
  constexpr float LOG2_E = 1.4426950408889634f;
  static_assert(WARP_KEYS == 16 || WARP_KEYS == 32, "visible_keys answers for 32 keys");

  DYNAMIC_SHARED(shared);
  T* shared_k = reinterpret_cast<T*>(shared);     // [2][TILE_KEYS][LINE]
  T* shared_v = shared_k + 2 * TILE_KEYS * LINE;  // [2][TILE_KEYS][LINE]

  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, group = lane >> 2, quad = lane & 3;
  const int row_warp = warp % ROW_WARPS, key_warp = warp / ROW_WARPS;
  const int request = blockIdx.z, kv_head = blockIdx.y / num_splits, split = blockIdx.y % num_splits;
  const int heads_per_kv = num_heads / num_kv_heads;
  const int first_query = query_indptr[request], num_nodes = query_indptr[request + 1] - first_query;
  const int num_rows = num_nodes * heads_per_kv, tile_row = blockIdx.x * TILE_ROWS;
  if (tile_row >= num_rows) return;
  const int context_len = context_lens[request];
  const int first_tree_row = tree_lens[request] - num_nodes;
  // No node of this tile has an ancestor behind the last node of the tile.
  const int last_node = (min(tile_row + TILE_ROWS, num_rows) - 1) / heads_per_kv;
  const int num_keys = context_len + first_tree_row + last_node + 1;

  // A thread works on two rows of the score matrix, `group` and `group + 8` of its warp's sixteen.
  int node[2], head[2], depth[2];
  bool live[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    int row = tile_row + row_warp * 16 + group + 8 * r;
    live[r] = row < num_rows;
    node[r] = first_query + (live[r] ? row / heads_per_kv : 0);
    head[r] = kv_head * heads_per_kv + (live[r] ? row % heads_per_kv : 0);
    depth[r] = depths[node[r]];
  }
  u32 query[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int r = i & 1, column = k * 16 + quad * 2 + (i >> 1) * 8;
      const T* source = queries + (i64)node[r] * query_stride + (i64)head[r] * head_stride + column;
      query[k][i] = live[r] ? *reinterpret_cast<const u32*>(source) : 0u;
    }

  const int first_key = window > 0 ? max(0, context_len - window + 1) : 0;
  const int tile_begin = first_key / TILE_KEYS, tile_end = (num_keys + TILE_KEYS - 1) / TILE_KEYS;
  const int tiles_per_split = (tile_end - tile_begin + num_splits - 1) / num_splits;
  const int my_begin = tile_begin + split * tiles_per_split, my_end = min(my_begin + tiles_per_split, tile_end);

  auto load_tile = [&](int tile, int stage) {
    constexpr int CHUNKS = D / 8;  // of 16 bytes, in a row
    for (int i = thread; i < TILE_KEYS * CHUNKS; i += NUM_THREADS) {
      int row = i / CHUNKS, column = (i % CHUNKS) * 8, key = tile * TILE_KEYS + row;
      bool valid = key >= first_key && key < num_keys;  // others may lie in pages that hold anything, or nowhere
      i64 offset = 0;
      if (valid) {
        int page = page_table[(i64)request * max_pages + key / page_size];
        offset = page * page_stride + (key % page_size) * row_stride + kv_head * kv_head_stride + column;
      }
      int target = (stage * TILE_KEYS + row) * LINE + column;
      copy_async_16(shared_k + target, k_pages + offset, valid);
      copy_async_16(shared_v + target, v_pages + offset, valid);
    }
  };

  const float scale_log2 = (soft_cap > 0.f ? soft_cap : scale) * LOG2_E;
  const float cap_factor = soft_cap > 0.f ? scale / soft_cap * (2.f * LOG2_E) : 0.f;
  float acc[D / 8][4], row_max[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, row_sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;

  if (my_begin < my_end) load_tile(my_begin, 0);
  copy_async_commit();
  for (int tile = my_begin; tile < my_end; tile++) {
    const int stage = (tile - my_begin) & 1;
    if (tile + 1 < my_end) load_tile(tile + 1, stage ^ 1);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();

    // Scores of this warp's 16 rows and WARP_KEYS keys.
    const int warp_row = stage * TILE_KEYS + key_warp * WARP_KEYS;  // of its first key, in shared memory
    const int warp_key = tile * TILE_KEYS + key_warp * WARP_KEYS;
    float score[WARP_KEYS / 8][4];
#pragma unroll
    for (int j = 0; j < WARP_KEYS / 8; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.f;
    const int matrix = lane >> 3, matrix_row = lane & 7;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j += 2) {
        u32 keys[4];
        int row = warp_row + (j + (matrix >> 1)) * 8 + matrix_row, column = k * 16 + (matrix & 1) * 8;
        load_matrices(keys, shared_k + row * LINE + column);
        multiply_accumulate((T*)0, score[j], query[k], keys[0], keys[1]);
        multiply_accumulate((T*)0, score[j + 1], query[k], keys[2], keys[3]);
      }

    // Scale (to base 2), cap, mask.
    const bool all_visible = warp_key + WARP_KEYS <= context_len && window == 0;
    u32 visible[2] = {~0u, ~0u};
    if (!all_visible) {
#pragma unroll
      for (int r = 0; r < 2; r++)
        visible[r] = visible_keys(ancestors + (i64)node[r] * mask_words, mask_words, depth[r], context_len, warp_key, window);
    }
#pragma unroll
    for (int j = 0; j < WARP_KEYS / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float x = score[j][e];
        // tanh(y) = 1 - 2 / (1 + e^2y), which is right at both infinities
        if (soft_cap > 0.f) x = 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(x * cap_factor));
        bool seen = visible[e >> 1] >> (j * 8 + quad * 2 + (e & 1)) & 1u;
        score[j][e] = seen ? x * scale_log2 : NEGATIVE_INFINITY;
      }

    // Online softmax; the four lanes of a quad share a row.
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float new_max = row_max[r];
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j++) new_max = fmaxf(new_max, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
      new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, 1));
      new_max = fmaxf(new_max, __shfl_xor_sync(ALL_LANES, new_max, 2));
      float origin = new_max == NEGATIVE_INFINITY ? 0.f : new_max;  // nothing seen yet: avoid inf - inf
      float rescale = exp2_approx(row_max[r] - origin), sum = 0.f;
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j++) {
        score[j][2 * r] = exp2_approx(score[j][2 * r] - origin);
        score[j][2 * r + 1] = exp2_approx(score[j][2 * r + 1] - origin);
        sum += score[j][2 * r] + score[j][2 * r + 1];
      }
      row_sum[r] = row_sum[r] * rescale + sum;
      row_max[r] = new_max;
#pragma unroll
      for (int i = 0; i < D / 8; i++) { acc[i][2 * r] *= rescale; acc[i][2 * r + 1] *= rescale; }
    }

    // acc += P V. A pair of score fragments (D layout) is a P fragment (A layout).
#pragma unroll
    for (int k = 0; k < WARP_KEYS / 16; k++) {
      u32 p[4] = {pack2((T*)0, score[2 * k][0], score[2 * k][1]), pack2((T*)0, score[2 * k][2], score[2 * k][3]),
                  pack2((T*)0, score[2 * k + 1][0], score[2 * k + 1][1]),
                  pack2((T*)0, score[2 * k + 1][2], score[2 * k + 1][3])};
#pragma unroll
      for (int i = 0; i < D / 8; i += 2) {
        u32 values[4];
        int row = warp_row + k * 16 + (matrix & 1) * 8 + matrix_row, column = (i + (matrix >> 1)) * 8;
        load_matrices_transposed(values, shared_v + row * LINE + column);
        multiply_accumulate((T*)0, acc[i], p, values[0], values[1]);
        multiply_accumulate((T*)0, acc[i + 1], p, values[2], values[3]);
      }
    }
    __syncthreads();  // the next load overwrites the stage that was just read
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    row_sum[r] += __shfl_xor_sync(ALL_LANES, row_sum[r], 1);
    row_sum[r] += __shfl_xor_sync(ALL_LANES, row_sum[r], 2);
  }

  if (KEY_WARPS > 1) {
    // Bring the warps' rows to a common maximum and add them up; every warp ends with a share of the columns.
    float* shared_max = reinterpret_cast<float*>(shared);     // [KEY_WARPS][16]
    float* shared_sum = shared_max + KEY_WARPS * 16;          // [KEY_WARPS][16]
    float* shared_acc = shared_sum + KEY_WARPS * 16;          // [16][D]
    if (quad == 0)
#pragma unroll
      for (int r = 0; r < 2; r++) shared_max[key_warp * 16 + group + 8 * r] = row_max[r];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float common = shared_max[group + 8 * r];
      for (int w = 1; w < KEY_WARPS; w++) common = fmaxf(common, shared_max[w * 16 + group + 8 * r]);
      float rescale = common == NEGATIVE_INFINITY ? 0.f : exp2_approx(row_max[r] - common);
      row_max[r] = common;
      row_sum[r] *= rescale;
#pragma unroll
      for (int i = 0; i < D / 8; i++) { acc[i][2 * r] *= rescale; acc[i][2 * r + 1] *= rescale; }
      if (quad == 0) shared_sum[key_warp * 16 + group + 8 * r] = row_sum[r];
    }
    for (int w = 0; w < KEY_WARPS; w++) {  // one warp after the other: a fixed order of addition
      if (key_warp == w)
#pragma unroll
        for (int i = 0; i < D / 8; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float* place = shared_acc + (group + 8 * (e >> 1)) * D + i * 8 + quad * 2 + (e & 1);
            *place = (w == 0 ? 0.f : *place) + acc[i][e];
          }
      __syncthreads();
    }
    if (key_warp != 0) return;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      row_sum[r] = shared_sum[group + 8 * r];
      for (int w = 1; w < KEY_WARPS; w++) row_sum[r] += shared_sum[w * 16 + group + 8 * r];
    }
#pragma unroll
    for (int i = 0; i < D / 8; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][e] = shared_acc[(group + 8 * (e >> 1)) * D + i * 8 + quad * 2 + (e & 1)];
  }

#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (!live[r]) continue;
    float inverse = row_sum[r] > 0.f ? 1.f / row_sum[r] : 0.f;
    i64 row = (i64)node[r] * num_heads + head[r];
    if (num_splits == 1) {
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        *reinterpret_cast<u32*>(out + row * D + i * 8 + quad * 2) =
            pack2((T*)0, acc[i][2 * r] * inverse, acc[i][2 * r + 1] * inverse);
    } else {
      row += (i64)split * num_queries * num_heads;
      if (quad == 0) partial_lse[row] = row_sum[r] > 0.f ? row_max[r] + log2f(row_sum[r]) : NEGATIVE_INFINITY;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        partial_out[row * D + i * 8 + quad * 2] = acc[i][2 * r] * inverse;
        partial_out[row * D + i * 8 + quad * 2 + 1] = acc[i][2 * r + 1] * inverse;
      }
    }
  }
}

// One entry per element type, head size and tile. Rows of a tile: 16 with four warps over the keys (decoding and
// small trees), 64, and 128 (large trees, prefill). The plan in launch_plans.py picks.
#define TREE_ATTENTION(NAME, T, D, ROW_WARPS, KEY_WARPS, WARP_KEYS, BLOCKS_PER_SM)                                     \
  KERNEL(32 * ROW_WARPS * KEY_WARPS, BLOCKS_PER_SM)                                                                    \
  NAME(const T* queries, const T* k_pages, const T* v_pages, const int* page_table, const int* context_lens,           \
       const int* tree_lens, const int* query_indptr, const u64* ancestors, const int* depths, T* out,                 \
       float* partial_out, float* partial_lse, int num_queries, int num_heads, int num_kv_heads, int page_size,        \
       int max_pages, int mask_words, int num_splits, int window, float scale, float soft_cap, i64 query_stride,       \
       i64 head_stride, i64 page_stride, i64 row_stride, i64 kv_head_stride) {                                        \
    tree_attention<T, D, ROW_WARPS, KEY_WARPS, WARP_KEYS>(                                                             \
        queries, k_pages, v_pages, page_table, context_lens, tree_lens, query_indptr, ancestors, depths, out,          \
        partial_out, partial_lse, num_queries, num_heads, num_kv_heads, page_size, max_pages, mask_words, num_splits,  \
        window, scale, soft_cap, query_stride, head_stride, page_stride, row_stride, kv_head_stride);                 \
  }
TREE_ATTENTION(tree_attention_bf16_d64_rows16, bf16, 64, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_bf16_d64_rows64, bf16, 64, 4, 1, 32, 2)
TREE_ATTENTION(tree_attention_bf16_d64_rows128, bf16, 64, 8, 1, 32, 1)
TREE_ATTENTION(tree_attention_bf16_d128_rows16, bf16, 128, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_bf16_d128_rows64, bf16, 128, 4, 1, 32, 2)
TREE_ATTENTION(tree_attention_bf16_d128_rows128, bf16, 128, 8, 1, 32, 1)
TREE_ATTENTION(tree_attention_f16_d64_rows16, f16, 64, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_f16_d64_rows64, f16, 64, 4, 1, 32, 2)
TREE_ATTENTION(tree_attention_f16_d64_rows128, f16, 64, 8, 1, 32, 1)
TREE_ATTENTION(tree_attention_f16_d128_rows16, f16, 128, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_f16_d128_rows64, f16, 128, 4, 1, 32, 2)
TREE_ATTENTION(tree_attention_f16_d128_rows128, f16, 128, 8, 1, 32, 1)
