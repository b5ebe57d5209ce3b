// out = x W^T + bias for few rows of x and a matrix of 4 bits in groups of columns with a scale and a centre, which is
// read once. As narrow_matmul: a block streams its 64 rows of the matrix through a ring in shared memory, several
// chunks ahead, and widens them in registers to bfloat16; sums are in float32. Scales and centres come with the
// chunks, and a number is rounded once as it is widened: nothing is left to do at the end of a group, however small.
// The matrix lies as tensor cores read it: a tile is 8 of its rows ("features") and 128 columns, 512 bytes, of which
// lane l has 16: row l / 4, and of each word's 32 columns the pairs 2 (l % 4) + 0, 8, 16, 24 in places 0, 1, 2, 3,
// the first of a pair in the lower half of the word. So two tiles are the first operand of a product of 16x8.
// Which columns a block, a warp and a step add up does not depend on how many rows x has: a row's bits are the same
// among any others.
#include "int4.cuh"

// A block has 64 features and a chunk of 256 columns at a time; of its eight warps each has 32 features and 64 columns.
enum { TILE_FEATURES = 64, CHUNK = 256, NUM_THREADS = 256, COLUMN_WARPS = 4, WARP_FEATURES = 32, LEAST_GROUP = 32 };
enum { MATRIX_TILE = 512, MATRIX_COLUMNS = 128, STEP_COLUMNS = 32 };  // bytes of a tile of the matrix; of one word
enum { MATRIX_BYTES = TILE_FEATURES * CHUNK / 2, GROUP_BYTES = CHUNK / LEAST_GROUP * TILE_FEATURES * 4 };

DEVICE void wait_for_chunk(int num_stages) {  // until the oldest of num_stages - 1 chunks under way is there
  if (num_stages <= 2) copy_async_wait<0>();
  else if (num_stages <= 3) copy_async_wait<1>();
  else if (num_stages <= 4) copy_async_wait<2>();
  else copy_async_wait<4>();
}

// TILES: of eight rows of x. Grid: tiles of features, splits of the columns.
template <int TILES>
DEVICE void int4_matmul(const bf16* x, const u32* weight, const u32* of_groups, const bf16* bias, bf16* out,
                        float* partial_out, int num_rows, int out_features, int in_features, int group,
                        int num_stages, int has_bias, i64 x_stride) {
  constexpr int ROWS = 8 * TILES, ROW_BYTES = 2 * CHUNK;
  constexpr int STAGE_BYTES = MATRIX_BYTES + GROUP_BYTES + ROWS * ROW_BYTES;

  DYNAMIC_SHARED(shared);  // [num_stages]: a chunk of the matrix, its groups' scales and centres, a chunk of x
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, row_in_8 = lane >> 2, quad = lane & 3;
  const int column_warp = warp % COLUMN_WARPS, feature_warp = warp / COLUMN_WARPS;
  const int first_feature = blockIdx.x * TILE_FEATURES, num_feature_tiles = (out_features + 7) / 8;
  const int num_column_tiles = in_features / MATRIX_COLUMNS, groups_per_chunk = CHUNK / group;
  const int num_chunks = (in_features + CHUNK - 1) / CHUNK, num_splits = gridDim.y, split = blockIdx.y;
  const int begin = num_chunks * split / num_splits, end = num_chunks * (split + 1) / num_splits;

  constexpr int X_PIECES = ROW_BYTES / 16, LOAD_ROWS = NUM_THREADS / X_PIECES;
  const int my_row = thread / X_PIECES, my_piece = thread % X_PIECES;
  const bf16* my_x = x + my_row * x_stride + my_piece * 8;
  auto load_chunk = [&](int chunk, int stage) {  // zeros for what lies beyond the matrix
    unsigned char* to = shared + stage * STAGE_BYTES;
#pragma unroll
    for (int i = 0; i < MATRIX_BYTES / (NUM_THREADS * 16); i++) {
      const int tile = i * (NUM_THREADS / 32) + warp;  // two side by side for each eight features
      const int feature_tile = first_feature / 8 + tile / 2, column_tile = chunk * 2 + tile % 2;
      const bool valid = feature_tile < num_feature_tiles && column_tile < num_column_tiles;
      const u32* from = weight + ((i64)feature_tile * num_column_tiles + column_tile) * (MATRIX_TILE / 4) + lane * 4;
      copy_async_16(to + tile * MATRIX_TILE + lane * 16, valid ? from : weight, valid);
    }
    if (thread < groups_per_chunk * (TILE_FEATURES / 4)) {  // four features' at once
      const int number = chunk * groups_per_chunk + thread / (TILE_FEATURES / 4);
      const int feature = first_feature + thread % (TILE_FEATURES / 4) * 4;
      const bool valid = number * group < in_features && feature < num_feature_tiles * 8;
      const u32* from = of_groups + (i64)number * num_feature_tiles * 8 + feature;
      copy_async_16(to + MATRIX_BYTES + thread * 16, valid ? from : of_groups, valid);
    }
    const int first_column = chunk * CHUNK;
    const bool in_x = first_column + my_piece * 8 < in_features;
#pragma unroll
    for (int i = 0; i < ROWS / LOAD_ROWS; i++) {
      const int row = my_row + i * LOAD_ROWS;
      const bool valid = in_x && row < num_rows;
      const bf16* from = my_x + i * LOAD_ROWS * x_stride + first_column;
      // Eight rows' pieces of the same columns lie in different banks.
      copy_async_16(to + MATRIX_BYTES + GROUP_BYTES + row * ROW_BYTES + 16 * (my_piece ^ (row & 7)), valid ? from : x,
                    valid);
    }
  };

  // Of a product a thread has features `row_in_8` and that + 8 of sixteen and rows 2 `quad` and 2 `quad` + 1 of eight.
  float sum[2][TILES][4];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum[m][j][e] = 0.f;

  for (int i = 0; i < num_stages - 1; i++) {
    if (begin + i < end) load_chunk(begin + i, i);
    copy_async_commit();
  }
  int stage = 0;
  for (int chunk = begin; chunk < end; chunk++) {
    wait_for_chunk(num_stages);
    __syncthreads();  // the chunk is there, and nobody reads the one before any longer
    const int ahead = chunk + num_stages - 1;
    if (ahead < end) load_chunk(ahead, stage == 0 ? num_stages - 1 : stage - 1);
    copy_async_commit();

    const unsigned char* tiles = shared + stage * STAGE_BYTES;
    const u32* pairs = reinterpret_cast<const u32*>(tiles + MATRIX_BYTES);  // [groups_per_chunk][TILE_FEATURES]
    const unsigned char* rows = tiles + MATRIX_BYTES + GROUP_BYTES;
    u32 words[2][2][2];  // 32 columns each, of eight features
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int tile = (feature_warp * (WARP_FEATURES / 8) + m * 2 + r) * 2 + column_warp / 2;
        const uint4 four = *reinterpret_cast<const uint4*>(tiles + tile * MATRIX_TILE + lane * 16);
        words[0][m][r] = column_warp % 2 ? four.z : four.x;
        words[1][m][r] = column_warp % 2 ? four.w : four.y;
      }
#pragma unroll
    for (int step = 0; step < 2; step++) {
      const int first_column = (column_warp * 2 + step) * STEP_COLUMNS;
      const u32* my_pairs = pairs + first_column / group * TILE_FEATURES + feature_warp * WARP_FEATURES + row_in_8;
      u32 a[2][2][4];  // of sixteen columns each
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const u32 pair = my_pairs[m * 16 + r * 8];
          const u32 scales = __byte_perm(pair, 0u, 0x1010), centres = __byte_perm(pair, 0u, 0x3232);
#pragma unroll
          for (int place = 0; place < 4; place++)
            a[place / 2][m][place % 2 * 2 + r] = widen_nibbles(words[step][m][r], place, scales, centres);
        }
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        u32 b[4];
        const int row = j * 8 + (lane & 7), piece = first_column / 8 + (lane >> 3);
        load_matrices(b, rows + row * ROW_BYTES + 16 * (piece ^ (row & 7)));
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int m = 0; m < 2; m++)
            multiply_accumulate((bf16*)0, sum[m][j], a[half][m], b[2 * half], b[2 * half + 1]);
      }
    }
    stage = stage + 1 == num_stages ? 0 : stage + 1;
  }

  // The warps' columns are added in their order.
  __syncthreads();  // the chunks are read, their place is taken for sums
  constexpr int LINE = TILE_FEATURES + 4;               // floats per row: against bank conflicts
  float* shared_sums = reinterpret_cast<float*>(shared);  // [COLUMN_WARPS][ROWS][LINE]
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int feature = feature_warp * WARP_FEATURES + m * 16 + (e >> 1) * 8 + row_in_8;
        const int row = j * 8 + quad * 2 + (e & 1);
        shared_sums[(column_warp * ROWS + row) * LINE + feature] = sum[m][j][e];
      }
  __syncthreads();
  const int column = thread % TILE_FEATURES, feature = first_feature + column;
  if (feature >= out_features) return;
  for (int row = thread / TILE_FEATURES; row < num_rows; row += NUM_THREADS / TILE_FEATURES) {
    float value = shared_sums[row * LINE + column];
#pragma unroll
    for (int w = 1; w < COLUMN_WARPS; w++) value += shared_sums[(w * ROWS + row) * LINE + column];
    if (num_splits > 1) {
      partial_out[((i64)split * num_rows + row) * out_features + feature] = value;
    } else {
      if (has_bias) value += to_float(bias[feature]);
      from_float(out[(i64)row * out_features + feature], value);
    }
  }
}

// One entry per number of rows. The plan in int4_matmul.py picks; splits are added by sum_column_splits of
// narrow_matmul.cu.
#define FOUR_BIT_MATMUL(NAME, TILES)                                                                                \
  KERNEL(256, 1)                                                                                                    \
  NAME(const bf16* x, const u32* weight, const u32* of_groups, const bf16* bias, bf16* out, float* partial_out,     \
       int num_rows, int out_features, int in_features, int group, int num_stages, int has_bias, i64 x_stride) {    \
    int4_matmul<TILES>(x, weight, of_groups, bias, out, partial_out, num_rows, out_features, in_features, group,    \
                       num_stages, has_bias, x_stride);                                                             \
  }
FOUR_BIT_MATMUL(int4_matmul_rows8, 1)
FOUR_BIT_MATMUL(int4_matmul_rows16, 2)
FOUR_BIT_MATMUL(int4_matmul_rows40, 5)
FOUR_BIT_MATMUL(int4_matmul_rows64, 8)
