// Attention of tree nodes over a paged KV cache: every node sees its request's committed tokens, its ancestors
// and itself. A root alone is plain decoding, a chain is a prefill chunk: one kernel serves all.
//
// The keys of request b are numbered 0 .. context_len-1 (committed) and then context_len + j for tree row j. The
// queries are the last rows of the tree. Rows of the score matrix are (node, query head of one KV head) pairs, so
// that K and V are read once for all heads that share them. Online softmax as in FlashAttention-2 (Dao 2023),
// base 2; keys are split over blocks (Flash-Decoding) and, where rows are few, over the warps of a block.
// The cache may be in FP8: a tile is then brought as it is and widened once for all warps, while the next one comes.
#include "attention_work.cuh"
#include "fp8.cuh"

// Which of the 64 keys from `first_key` on a node sees: bit i is key first_key + i. Parents come before children,
// so a node's ancestors in row order are in depth order, and the last `window` of them are the ones in its window.
DEVICE u64 visible_keys(const u64* ancestors, int mask_words, int depth, int context_len, int first_key, int window) {
  int row = first_key - context_len;  // tree row of bit 0; negative inside the context
  u64 committed = row >= 0 ? 0ull : row <= -64 ? ~0ull : (1ull << -row) - 1ull;
  u64 tree = 0ull;
  int num_after = 0;                  // ancestors in rows beyond these 64
  if (row > -64) {
    for (int w = 0; w < mask_words; w++) {
      u64 word = ancestors[w];
      int shift = 64 * w - row;       // where bit 0 of this word lands
      if (shift <= -64) continue;
      u64 bits = shift >= 64 ? 0ull : shift >= 0 ? word << shift : word >> -shift;
      tree |= bits;
      if (window == 0 && shift > 0) break;
      num_after += __popcll(shift >= 64 ? word : shift > 0 ? word >> (64 - shift) : 0ull);
    }
  }
  if (window > 0) {
    int first_committed = context_len + depth - window + 1 - first_key;  // bit of the first key in the window
    if (first_committed > 0) committed &= first_committed >= 64 ? 0ull : ~0ull << first_committed;
    for (int surplus = num_after + __popcll(tree) - window; surplus > 0 && tree != 0ull; surplus--) tree &= tree - 1ull;
  }
  return committed | tree;
}

template <typename T, typename C, int D, int ROW_WARPS, int KEY_WARPS, int WARP_KEYS>
DEVICE void tree_attention(
    const T* queries, const C* k_pages, const C* v_pages, const int* page_table, const int* context_lens,
    const int* tree_lens, const int* query_indptr, const u64* ancestors, const int* depths, T* out, float* partial_out,
    float* partial_lse, int num_requests, int num_heads, int num_kv_heads, int page_size, int max_pages, int mask_words,
    int wave, int min_split_tiles, int max_splits, int window, float scale, float soft_cap, float value_scale,
    i64 query_stride, i64 head_stride, i64 page_stride, i64 row_stride, i64 kv_head_stride) {
  constexpr int NUM_WARPS = ROW_WARPS * KEY_WARPS, NUM_THREADS = 32 * NUM_WARPS;
  constexpr int TILE_ROWS = 16 * ROW_WARPS;
  constexpr int LINE = D + 8;  // elements per key in shared memory: 16 bytes of padding against bank conflicts
  constexpr bool WIDENED = sizeof(C) < sizeof(T);
  constexpr int COPY_LINE = WIDENED ? D : LINE;
  constexpr float LOG2_E = 1.4426950408889634f;
  static_assert(WARP_KEYS * KEY_WARPS == TILE_KEYS && TILE_KEYS <= 64, "visible_keys answers for 64 keys");
  static_assert(TILE_KEYS <= NUM_THREADS, "a thread looks up one key of a tile");

  DYNAMIC_SHARED(shared);
  C* shared_k = reinterpret_cast<C*>(shared);          // [2][TILE_KEYS][COPY_LINE]
  C* shared_v = shared_k + 2 * TILE_KEYS * COPY_LINE;  // [2][TILE_KEYS][COPY_LINE]
  i64* shared_offsets = reinterpret_cast<i64*>(shared_v + 2 * TILE_KEYS * COPY_LINE);  // [2][TILE_KEYS], in the cache
  T* wide_k = reinterpret_cast<T*>(shared_offsets + 2 * TILE_KEYS);  // [TILE_KEYS][LINE], where a tile is widened
  T* wide_v = wide_k + TILE_KEYS * LINE;

  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, group = lane >> 2, quad = lane & 3;
  const int row_warp = warp % ROW_WARPS, key_warp = warp / ROW_WARPS;
  const int heads_per_kv = num_heads / num_kv_heads;
  const BatchWork work = {query_indptr, context_lens, tree_lens, num_requests, heads_per_kv, num_kv_heads, window,
                          TILE_ROWS, wave, min_split_tiles, max_splits};
  const Place place = place_of_block(work, blockIdx.x);
  const int request = place.request, num_splits = place.num_splits;
  if (request < 0) return;
  const int row_tiles = num_row_tiles(work, request), row_tile = place.block % row_tiles;
  const int kv_head = place.block / row_tiles % num_kv_heads, split = place.block / row_tiles / num_kv_heads;
  const int first_query = query_indptr[request], num_nodes = query_indptr[request + 1] - first_query;
  const int num_rows = num_nodes * heads_per_kv, tile_row = row_tile * TILE_ROWS;
  const int context_len = context_lens[request];
  const int first_tree_row = tree_lens[request] - num_nodes;
  // No node of this tile has an ancestor behind the last node of the tile.
  const int last_node = (min(tile_row + TILE_ROWS, num_rows) - 1) / heads_per_kv;
  const int num_keys = context_len + first_tree_row + last_node + 1;

  const int first_key = first_key_of(work, request), tile_begin = first_key / TILE_KEYS;
  const int request_tiles = num_key_tiles(work, request);  // no split is empty, but for rows that see less than others
  const int my_begin = tile_begin + request_tiles * split / num_splits;
  const int my_end = min(tile_begin + request_tiles * (split + 1) / num_splits, (num_keys + TILE_KEYS - 1) / TILE_KEYS);

  // A tile is looked up in the page table one iteration before it is loaded, by one thread a key, so that nobody waits
  // for the table.
  auto page_of = [&](int tile) {
    const int key = tile * TILE_KEYS + thread;
    const bool valid = thread < TILE_KEYS && tile < my_end && key >= first_key && key < num_keys;
    return valid ? page_table[(i64)request * max_pages + key / page_size] : -1;
  };
  auto keep_offset = [&](int tile, int page) {  // -1: the key may lie in a page that holds anything, or nowhere
    const int key = tile * TILE_KEYS + thread;
    const i64 offset = page < 0 ? -1 : page * page_stride + (key % page_size) * row_stride + kv_head * kv_head_stride;
    if (thread < TILE_KEYS) shared_offsets[((tile - my_begin) & 1) * TILE_KEYS + thread] = offset;
  };
  constexpr int CHUNK = 16 / sizeof(C);                                // elements in 16 bytes
  constexpr int CHUNKS = D / CHUNK, LOAD_ROWS = NUM_THREADS / CHUNKS;  // in a row; rows loaded at a time
  const int my_row = thread / CHUNKS, my_column = thread % CHUNKS * CHUNK;
  const C *my_k = k_pages + my_column, *my_v = v_pages + my_column;
  auto load_rows = [&](int stage, bool all_valid) {
    const int first_row = stage * TILE_KEYS + my_row, target = first_row * COPY_LINE + my_column;
    const i64* offsets = shared_offsets + first_row;
    C *to_k = shared_k + target, *to_v = shared_v + target;
#pragma unroll
    for (int i = 0; i < TILE_KEYS / LOAD_ROWS; i++) {
      const i64 offset = offsets[i * LOAD_ROWS];
      const bool valid = all_valid || offset >= 0;
      copy_async_16(to_k + i * LOAD_ROWS * COPY_LINE, valid ? my_k + offset : my_k, valid);
      copy_async_16(to_v + i * LOAD_ROWS * COPY_LINE, valid ? my_v + offset : my_v, valid);
    }
  };
  auto load_tile = [&](int tile) {
    const int stage = (tile - my_begin) & 1, key = tile * TILE_KEYS;
    if (key >= first_key && key + TILE_KEYS <= num_keys) load_rows(stage, true);
    else load_rows(stage, false);
  };

  auto widen_tile = [&](int stage) {  // what this thread has copied, so that nobody waits in between
    if constexpr (WIDENED) {
      const int source = (stage * TILE_KEYS + my_row) * COPY_LINE + my_column, target = my_row * LINE + my_column;
#pragma unroll
      for (int i = 0; i < TILE_KEYS / LOAD_ROWS; i++) {
        widen16(shared_k + source + i * LOAD_ROWS * COPY_LINE, wide_k + target + i * LOAD_ROWS * LINE);
        widen16(shared_v + source + i * LOAD_ROWS * COPY_LINE, wide_v + target + i * LOAD_ROWS * LINE);
      }
    }
  };

  const int first_page = page_of(my_begin), second_page = page_of(my_begin + 1);

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

  const float scale_log2 = (soft_cap > 0.f ? soft_cap : scale) * LOG2_E;
  const float cap_factor = soft_cap > 0.f ? scale / soft_cap * (2.f * LOG2_E) : 0.f;
  const bool idle = tile_row + row_warp * 16 >= num_rows;  // a warp without rows only loads
  float acc[D / 8][4], row_max[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY}, row_sum[2] = {0.f, 0.f};
#pragma unroll
  for (int i = 0; i < D / 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;

  keep_offset(my_begin, first_page);
  keep_offset(my_begin + 1, second_page);
  __syncthreads();
  if (my_begin < my_end) load_tile(my_begin);
  copy_async_commit();
  for (int tile = my_begin; tile < my_end; tile++) {
    const int stage = (tile - my_begin) & 1;
    copy_async_wait<0>();
    __syncthreads();  // the tile is there, and nobody reads the one before any longer
    if (tile + 1 < my_end) load_tile(tile + 1);
    copy_async_commit();
    const int page = page_of(tile + 2);
    if (WIDENED) {
      widen_tile(stage);
      __syncthreads();  // the whole tile is wide
    }
    if (!idle) {

    // Scores of this warp's 16 rows and WARP_KEYS keys.
    const T* tile_k = WIDENED ? wide_k : reinterpret_cast<const T*>(shared_k) + stage * TILE_KEYS * LINE;
    const T* tile_v = WIDENED ? wide_v : reinterpret_cast<const T*>(shared_v) + stage * TILE_KEYS * LINE;
    const int warp_row = key_warp * WARP_KEYS;  // of its first key, in the tile
    const int matrix = lane >> 3, matrix_row = lane & 7;
    const T* my_keys = tile_k + (warp_row + (matrix >> 1) * 8 + matrix_row) * LINE + (matrix & 1) * 8;
    const T* my_values = tile_v + (warp_row + (matrix & 1) * 8 + matrix_row) * LINE + (matrix >> 1) * 8;
    const int warp_key = tile * TILE_KEYS + key_warp * WARP_KEYS;
    float score[WARP_KEYS / 8][4];
#pragma unroll
    for (int j = 0; j < WARP_KEYS / 8; j++) score[j][0] = score[j][1] = score[j][2] = score[j][3] = 0.f;
#pragma unroll
    for (int k = 0; k < D / 16; k++)
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j += 2) {
        u32 keys[4];
        load_matrices(keys, my_keys + j * 8 * LINE + k * 16);
        multiply_accumulate((T*)0, score[j], query[k], keys[0], keys[1]);
        multiply_accumulate((T*)0, score[j + 1], query[k], keys[2], keys[3]);
      }

    // Cap and mask; most tiles need neither.
    if (soft_cap > 0.f) {
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)  // tanh(y) = 1 - 2 / (1 + e^2y), which is right at both infinities
          score[j][e] = 1.f - 2.f * reciprocal_approx(1.f + exp2_approx(score[j][e] * cap_factor));
    }
    if (warp_key + WARP_KEYS > context_len || window > 0) {
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const u64 visible =
            visible_keys(ancestors + (i64)node[r] * mask_words, mask_words, depth[r], context_len, warp_key, window);
#pragma unroll
        for (int j = 0; j < WARP_KEYS / 8; j++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const bool seen = visible >> (j * 8 + quad * 2 + e) & 1ull;
            if (!seen) score[j][2 * r + e] = NEGATIVE_INFINITY;
          }
      }
    }

    // Online softmax, in base 2; the four lanes of a quad share a row.
    float rescale[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float largest = NEGATIVE_INFINITY;
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j++) largest = fmaxf(largest, fmaxf(score[j][2 * r], score[j][2 * r + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
      const float new_max = fmaxf(row_max[r], largest * scale_log2);
      const float origin = new_max == NEGATIVE_INFINITY ? 0.f : new_max;  // nothing seen yet: avoid inf - inf
      float sum = 0.f;
#pragma unroll
      for (int j = 0; j < WARP_KEYS / 8; j++) {
        score[j][2 * r] = exp2_approx(fmaf(score[j][2 * r], scale_log2, -origin));
        score[j][2 * r + 1] = exp2_approx(fmaf(score[j][2 * r + 1], scale_log2, -origin));
        sum += score[j][2 * r] + score[j][2 * r + 1];
      }
      rescale[r] = exp2_approx(row_max[r] - origin);
      row_sum[r] = row_sum[r] * rescale[r] + sum;
      row_max[r] = new_max;
    }
    if (__any_sync(ALL_LANES, rescale[0] != 1.f || rescale[1] != 1.f)) {  // rare behind the first tiles
#pragma unroll
      for (int i = 0; i < D / 8; i++)
#pragma unroll
        for (int e = 0; e < 4; e++) acc[i][e] *= rescale[e >> 1];
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
        load_matrices_transposed(values, my_values + k * 16 * LINE + i * 8);
        multiply_accumulate((T*)0, acc[i], p, values[0], values[1]);
        multiply_accumulate((T*)0, acc[i + 1], p, values[2], values[3]);
      }
    }
    }
    keep_offset(tile + 2, page);
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    row_sum[r] += __shfl_xor_sync(ALL_LANES, row_sum[r], 1);
    row_sum[r] += __shfl_xor_sync(ALL_LANES, row_sum[r], 2);
  }

  if (KEY_WARPS > 1) {
    __syncthreads();  // the tiles are read, their place is taken for sums
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
    float inverse = row_sum[r] > 0.f ? value_scale / row_sum[r] : 0.f;
    i64 row = (i64)node[r] * num_heads + head[r];
    if (num_splits == 1) {
#pragma unroll
      for (int i = 0; i < D / 8; i++)
        *reinterpret_cast<u32*>(out + row * D + i * 8 + quad * 2) =
            pack2((T*)0, acc[i][2 * r] * inverse, acc[i][2 * r + 1] * inverse);
    } else {
      row = (i64)(place.first_slot + place.block) * TILE_ROWS + row_warp * 16 + group + 8 * r;
      if (quad == 0) partial_lse[row] = row_sum[r] > 0.f ? row_max[r] + log2f(row_sum[r]) : NEGATIVE_INFINITY;
#pragma unroll
      for (int i = 0; i < D / 8; i++) {
        partial_out[row * D + i * 8 + quad * 2] = acc[i][2 * r] * inverse;
        partial_out[row * D + i * 8 + quad * 2 + 1] = acc[i][2 * r + 1] * inverse;
      }
    }
  }
}

// One entry per type of queries, type of the cache, head size and tile. Rows of a tile: 16 with four warps over the
// keys (decoding and small trees), 64, and 128 (large trees, prefill). The plan in tree_attention.py picks.
#define TREE_ATTENTION(NAME, T, C, D, ROW_WARPS, KEY_WARPS, WARP_KEYS, BLOCKS_PER_SM)                                  \
  KERNEL(32 * ROW_WARPS * KEY_WARPS, BLOCKS_PER_SM)                                                                    \
  NAME(const T* queries, const C* k_pages, const C* v_pages, const int* page_table, const int* context_lens,           \
       const int* tree_lens, const int* query_indptr, const u64* ancestors, const int* depths, T* out,                 \
       float* partial_out, float* partial_lse, int num_requests, int num_heads, int num_kv_heads, int page_size,       \
       int max_pages, int mask_words, int wave, int min_split_tiles, int max_splits, int window, float scale,          \
       float soft_cap, float value_scale, i64 query_stride, i64 head_stride, i64 page_stride, i64 row_stride,          \
       i64 kv_head_stride) {                                                                                           \
    tree_attention<T, C, D, ROW_WARPS, KEY_WARPS, WARP_KEYS>(                                                          \
        queries, k_pages, v_pages, page_table, context_lens, tree_lens, query_indptr, ancestors, depths, out,          \
        partial_out, partial_lse, num_requests, num_heads, num_kv_heads, page_size, max_pages, mask_words, wave,       \
        min_split_tiles, max_splits, window, scale, soft_cap, value_scale, query_stride, head_stride, page_stride,     \
        row_stride, kv_head_stride);                                                                                   \
  }
TREE_ATTENTION(tree_attention_bf16_d64_rows16, bf16, bf16, 64, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_bf16_d64_rows64, bf16, bf16, 64, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_bf16_d64_rows128, bf16, bf16, 64, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_bf16_d128_rows16, bf16, bf16, 128, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_bf16_d128_rows64, bf16, bf16, 128, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_bf16_d128_rows128, bf16, bf16, 128, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_f16_d64_rows16, f16, f16, 64, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_f16_d64_rows64, f16, f16, 64, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_f16_d64_rows128, f16, f16, 64, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_f16_d128_rows16, f16, f16, 128, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_f16_d128_rows64, f16, f16, 128, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_f16_d128_rows128, f16, f16, 128, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_bf16_fp8_d64_rows16, bf16, fp8, 64, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_bf16_fp8_d64_rows64, bf16, fp8, 64, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_bf16_fp8_d64_rows128, bf16, fp8, 64, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_bf16_fp8_d128_rows16, bf16, fp8, 128, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_bf16_fp8_d128_rows64, bf16, fp8, 128, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_bf16_fp8_d128_rows128, bf16, fp8, 128, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_f16_fp8_d64_rows16, f16, fp8, 64, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_f16_fp8_d64_rows64, f16, fp8, 64, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_f16_fp8_d64_rows128, f16, fp8, 64, 8, 1, 64, 1)
TREE_ATTENTION(tree_attention_f16_fp8_d128_rows16, f16, fp8, 128, 1, 4, 16, 2)
TREE_ATTENTION(tree_attention_f16_fp8_d128_rows64, f16, fp8, 128, 4, 1, 64, 2)
TREE_ATTENTION(tree_attention_f16_fp8_d128_rows128, f16, fp8, 128, 8, 1, 64, 1)
