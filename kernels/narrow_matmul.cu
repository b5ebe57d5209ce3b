// out = x W^T + bias for few rows of x and a matrix of 8-bit numbers, which is read once, as it lies, and scaled by row
// or by group of columns. Reading it is all the time there is: so a block streams its 64 rows of the matrix through a
// ring in shared memory, several chunks ahead, and widens them in registers to what the tensor cores take. Widening is
// exact; scales are applied to sums in float32. Where x is in FP8, too, both become float16.
// Rows of the matrix ("features") are the rows of a product of 16x8, rows of x its columns. Which columns of the matrix
// a block, a warp and a step add up does not depend on how many rows x has: a row's bits are the same among any others.
#include "fp8.cuh"

struct int8 { signed char bits; };
template <typename X> struct Widened { using type = X; };
template <> struct Widened<fp8> { using type = f16; };

// A block has 64 features and a chunk of 256 columns at a time; of its eight warps each has 32 features and 64 columns.
enum { TILE_FEATURES = 64, CHUNK = 256, NUM_THREADS = 256, COLUMN_WARPS = 4, WARP_FEATURES = 32, STEPS = 4 };

// Four numbers side by side as two registers of two.
template <typename T>
DEVICE void widen4(fp8*, T* type, u32 codes, u32& low, u32& high) {
  low = widen2(type, codes);
  high = widen2(type, codes >> 16);
}
DEVICE void widen4(int8*, bf16* type, u32 codes, u32& low, u32& high) {
  const u32 biased = codes ^ 0x80808080u;  // from 0 to 255: the last byte of a float between 2^23 and 2^24
  float values[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    values[i] = __int_as_float((int)__byte_perm(biased, 0x4b000000u, 0x7440u + i)) - (8388608.f + 128.f);
  low = pack2(type, values[0], values[1]);
  high = pack2(type, values[2], values[3]);
}

// Where 16 bytes of a row lie in a chunk. A warp reads columns 16t .. 16t+15 of eight rows at once: their pieces are
// exchanged in every other row, so that two rows do not meet in the same banks.
template <int ROW_BYTES>
DEVICE int place_of(int row, int piece) {
  return row * ROW_BYTES + 16 * (piece ^ (ROW_BYTES == CHUNK ? (row & 1) << 2 : row & 1));
}

DEVICE void wait_for_chunk(int num_stages) {  // until the oldest of num_stages - 1 chunks under way is there
  if (num_stages <= 2) copy_async_wait<0>();
  else if (num_stages <= 3) copy_async_wait<1>();
  else if (num_stages <= 4) copy_async_wait<2>();
  else copy_async_wait<4>();
}

// X: type of x; W: of the matrix; TILES: of eight rows. Grid: tiles of features, splits of the columns.
template <typename X, typename W, int TILES>
DEVICE void narrow_matmul(const X* x, const W* weight, const float* x_scales, const float* weight_scales,
                          const bf16* bias, bf16* out, float* partial_out, int num_rows, int out_features,
                          int in_features, int x_group, int num_x_groups, int weight_group, int num_weight_groups,
                          int num_stages, int has_bias, i64 x_stride) {
  using T = typename Widened<X>::type;
  constexpr bool IS_SCALED = sizeof(X) == 1;
  constexpr int ROWS = 8 * TILES, ROW_BYTES = CHUNK * sizeof(X);
  constexpr bool SCALES_ARE_HELD = TILES <= 5;  // those of x: from when they are known, or read when needed
  constexpr int STAGE_BYTES = TILE_FEATURES * CHUNK + ROWS * ROW_BYTES;

  DYNAMIC_SHARED(shared);  // [num_stages]: a chunk of the matrix, then of x
  const int thread = threadIdx.x, warp = thread >> 5, lane = thread & 31, group = lane >> 2, quad = lane & 3;
  const int column_warp = warp % COLUMN_WARPS, feature_warp = warp / COLUMN_WARPS;
  const int first_feature = blockIdx.x * TILE_FEATURES;
  const int num_chunks = (in_features + CHUNK - 1) / CHUNK, num_splits = gridDim.y, split = blockIdx.y;
  const int begin = num_chunks * split / num_splits, end = num_chunks * (split + 1) / num_splits;

  constexpr int PIECES = CHUNK / 16, LOAD_FEATURES = NUM_THREADS / PIECES;
  constexpr int X_PIECES = ROW_BYTES / 16, LOAD_ROWS = NUM_THREADS / X_PIECES;
  const int my_feature = thread / PIECES, my_piece = thread % PIECES;
  const int my_row = thread / X_PIECES, my_x_piece = thread % X_PIECES;
  const W* my_weight = weight + (i64)(first_feature + my_feature) * in_features + my_piece * 16;
  const X* my_x = x + my_row * x_stride + my_x_piece * (16 / (int)sizeof(X));
  auto load_chunk = [&](int chunk, int stage) {  // zeros for what lies beyond the matrix
    unsigned char* to = shared + stage * STAGE_BYTES;
    const int first_column = chunk * CHUNK;
    const bool in_weight = first_column + my_piece * 16 < in_features;
#pragma unroll
    for (int i = 0; i < TILE_FEATURES / LOAD_FEATURES; i++) {
      const int row = my_feature + i * LOAD_FEATURES;
      const bool valid = in_weight && first_feature + row < out_features;
      const W* from = my_weight + (i64)i * LOAD_FEATURES * in_features + first_column;
      copy_async_16(to + place_of<CHUNK>(row, my_piece), valid ? from : weight, valid);
    }
    const bool in_x = first_column + my_x_piece * (16 / (int)sizeof(X)) < in_features;
#pragma unroll
    for (int i = 0; i < (ROWS + LOAD_ROWS - 1) / LOAD_ROWS; i++) {
      const int row = my_row + i * LOAD_ROWS;
      if (ROWS % LOAD_ROWS != 0 && row >= ROWS) break;
      const bool valid = in_x && row < num_rows;
      const X* from = my_x + i * LOAD_ROWS * x_stride + first_column;
      copy_async_16(to + TILE_FEATURES * CHUNK + place_of<ROW_BYTES>(row, my_x_piece), valid ? from : x, valid);
    }
  };

  // Of a product a thread has features `group` and `group + 8` of sixteen and rows 2 `quad` and 2 `quad` + 1 of eight.
  float total[2][TILES][4], sum[2][TILES][4], weight_scale[2][2], x_scale[TILES][2];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) total[m][j][e] = sum[m][j][e] = 0.f;
  int x_number = -1, weight_number = -1;
  auto load_x_scales = [&]() {
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        x_scale[j][r] = x_scales[(i64)min(j * 8 + quad * 2 + r, num_rows - 1) * num_x_groups + x_number];
  };
  auto load_scales = [&]() {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int feature = min(first_feature + feature_warp * WARP_FEATURES + m * 16 + r * 8 + group, out_features - 1);
        weight_scale[m][r] = weight_scales[(i64)feature * num_weight_groups + weight_number];
      }
    if (IS_SCALED && SCALES_ARE_HELD) load_x_scales();
  };
  auto add_scaled = [&]() {  // what was summed up with the same scales
    if (IS_SCALED && !SCALES_ARE_HELD) load_x_scales();
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const float scale = IS_SCALED ? weight_scale[m][e >> 1] * x_scale[j][e & 1] : weight_scale[m][e >> 1];
          total[m][j][e] = fmaf(sum[m][j][e], scale, total[m][j][e]);
          sum[m][j][e] = 0.f;
        }
  };

  for (int i = 0; i < num_stages - 1; i++) {
    if (begin + i < end) load_chunk(begin + i, i);
    copy_async_commit();
  }
  int stage = 0;
  for (int chunk = begin; chunk < end; chunk++) {
    // Columns beyond the matrix are zeros, with the last scale.
    const int column = min(chunk * CHUNK + column_warp * (CHUNK / COLUMN_WARPS), in_features - 1);
    const int next_x = column / x_group, next_weight = column / weight_group;
    if (next_x != x_number || next_weight != weight_number) {
      if (chunk > begin) add_scaled();
      x_number = next_x, weight_number = next_weight;
      load_scales();
    }
    wait_for_chunk(num_stages);
    __syncthreads();  // the chunk is there, and nobody reads the one before any longer
    const int ahead = chunk + num_stages - 1;
    if (ahead < end) load_chunk(ahead, stage == 0 ? num_stages - 1 : stage - 1);
    copy_async_commit();

    // A thread has the same sixteen columns of all rows: four to a step, two for each half of a product's sixteen.
    const unsigned char* features = shared + stage * STAGE_BYTES;
    const unsigned char* rows = features + TILE_FEATURES * CHUNK;
    u32 a[STEPS][2][4];
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int row = feature_warp * WARP_FEATURES + m * 16 + r * 8 + group;
        const uint4 codes =
            *reinterpret_cast<const uint4*>(features + place_of<CHUNK>(row, column_warp * 4 + quad));
        widen4((W*)0, (T*)0, codes.x, a[0][m][r], a[0][m][2 + r]);
        widen4((W*)0, (T*)0, codes.y, a[1][m][r], a[1][m][2 + r]);
        widen4((W*)0, (T*)0, codes.z, a[2][m][r], a[2][m][2 + r]);
        widen4((W*)0, (T*)0, codes.w, a[3][m][r], a[3][m][2 + r]);
      }
#pragma unroll
    for (int first = 0; first < TILES; first += 2) {
      u32 b[2][STEPS][2];
#pragma unroll
      for (int j = 0; j < 2 && first + j < TILES; j++) {
        const int row = (first + j) * 8 + group;
        if constexpr (IS_SCALED) {
          const uint4 codes =
              *reinterpret_cast<const uint4*>(rows + place_of<ROW_BYTES>(row, column_warp * 4 + quad));
          widen4((X*)0, (T*)0, codes.x, b[j][0][0], b[j][0][1]);
          widen4((X*)0, (T*)0, codes.y, b[j][1][0], b[j][1][1]);
          widen4((X*)0, (T*)0, codes.z, b[j][2][0], b[j][2][1]);
          widen4((X*)0, (T*)0, codes.w, b[j][3][0], b[j][3][1]);
        } else {
#pragma unroll
          for (int half = 0; half < 2; half++) {
            const int piece = (column_warp * 4 + quad) * 2 + half;
            const uint4 values = *reinterpret_cast<const uint4*>(rows + place_of<ROW_BYTES>(row, piece));
            b[j][2 * half][0] = values.x, b[j][2 * half][1] = values.y;
            b[j][2 * half + 1][0] = values.z, b[j][2 * half + 1][1] = values.w;
          }
        }
      }
#pragma unroll
      for (int s = 0; s < STEPS; s++)
#pragma unroll
        for (int j = 0; j < 2 && first + j < TILES; j++)
#pragma unroll
          for (int m = 0; m < 2; m++) multiply_accumulate((T*)0, sum[m][first + j], a[s][m], b[j][s][0], b[j][s][1]);
    }
    stage = stage + 1 == num_stages ? 0 : stage + 1;
  }
  add_scaled();

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
        const int feature = feature_warp * WARP_FEATURES + m * 16 + (e >> 1) * 8 + group;
        const int row = j * 8 + quad * 2 + (e & 1);
        shared_sums[(column_warp * ROWS + row) * LINE + feature] = total[m][j][e];
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

// Adds the splits in their order; a thread for each element of `out`.
KERNEL(256, 1)
sum_column_splits(const float* partial_out, const bf16* bias, bf16* out, int num_rows, int out_features,
                  int num_splits, int has_bias) {
  const int num_elements = num_rows * out_features, at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= num_elements) return;
  float value = partial_out[at];
#pragma unroll 4
  for (int s = 1; s < num_splits; s++) value += partial_out[(i64)s * num_elements + at];
  if (has_bias) value += to_float(bias[at % out_features]);
  from_float(out[at], value);
}

// One entry per type of x, type of the matrix, and rows. The plan in narrow_matmul.py picks.
#define NARROW_MATMUL(NAME, X, W, TILES)                                                                            \
  KERNEL(256, 1)                                                                                                    \
  NAME(const X* x, const W* weight, const float* x_scales, const float* weight_scales, const bf16* bias, bf16* out, \
       float* partial_out, int num_rows, int out_features, int in_features, int x_group, int num_x_groups,          \
       int weight_group, int num_weight_groups, int num_stages, int has_bias, i64 x_stride) {                       \
    narrow_matmul<X, W, TILES>(x, weight, x_scales, weight_scales, bias, out, partial_out, num_rows, out_features,  \
                               in_features, x_group, num_x_groups, weight_group, num_weight_groups, num_stages,     \
                               has_bias, x_stride);                                                                 \
  }
NARROW_MATMUL(narrow_matmul_bf16_fp8_rows8, bf16, fp8, 1)
NARROW_MATMUL(narrow_matmul_bf16_fp8_rows16, bf16, fp8, 2)
NARROW_MATMUL(narrow_matmul_bf16_fp8_rows40, bf16, fp8, 5)
NARROW_MATMUL(narrow_matmul_bf16_fp8_rows64, bf16, fp8, 8)
NARROW_MATMUL(narrow_matmul_bf16_int8_rows8, bf16, int8, 1)
NARROW_MATMUL(narrow_matmul_bf16_int8_rows16, bf16, int8, 2)
NARROW_MATMUL(narrow_matmul_bf16_int8_rows40, bf16, int8, 5)
NARROW_MATMUL(narrow_matmul_bf16_int8_rows64, bf16, int8, 8)
NARROW_MATMUL(narrow_matmul_fp8_fp8_rows8, fp8, fp8, 1)
NARROW_MATMUL(narrow_matmul_fp8_fp8_rows16, fp8, fp8, 2)
NARROW_MATMUL(narrow_matmul_fp8_fp8_rows40, fp8, fp8, 5)
NARROW_MATMUL(narrow_matmul_fp8_fp8_rows64, fp8, fp8, 8)
