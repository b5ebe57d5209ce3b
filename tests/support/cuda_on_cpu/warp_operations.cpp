// Shuffles, votes and tensor-core operations: what the lanes of a warp do together.
#include <cstring>

#include "fiber.h"
#include "runtime.h"

float to_float(bf16 x) {
  u32 bits = (u32)x.bits << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}
float to_float(f16 x) {
  _Float16 y;
  __builtin_memcpy(&y, &x, 2);
  return (float)y;
}
void from_float(bf16& y, float x) {
  u32 bits;
  __builtin_memcpy(&bits, &x, 4);
  y.bits = x != x ? 0x7fff : (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
void from_float(f16& y, float x) {
  _Float16 half = (_Float16)x;
  __builtin_memcpy(&y, &half, 2);
}

namespace cuda_on_cpu {

u32 shuffle(u32 mask, u32 value, int source_lane, int line) {
  unsigned char* const* slots = warp_operation("shuffle", mask, &value, 4, nullptr, line);
  if (source_lane < 0 || source_lane > 31) return value;
  if (!(mask >> source_lane & 1)) fail("a shuffle reads a lane outside its mask", line);
  raw_copy(&value, slots[source_lane], 4);
  return value;
}

u32 ballot(u32 mask, bool predicate, int line) {
  unsigned char byte = predicate;
  unsigned char* const* slots = warp_operation("ballot", mask, &byte, 1, nullptr, line);
  u32 result = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) result |= (u32)(*slots[lane] != 0) << lane;
  return result;
}

namespace {
struct MmaOperands {
  u32 a[4], b[2];
  float d[4];
  bool is_bf16;

  float element(u32 registers, int half) const {
    u16 bits = (u16)(registers >> (16 * half));
    return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
  }
};
static_assert(sizeof(MmaOperands) <= 64);

void multiply_matrices(unsigned char* const* slots) {
  float A[16][16], B[16][8], D[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const MmaOperands& in = *(const MmaOperands*)slots[lane];
    const int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 8; i++) A[g + 8 * (i >> 1 & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = in.element(in.a[i >> 1], i & 1);
    for (int i = 0; i < 4; i++) {
      B[2 * t + (i & 1) + 8 * (i >> 1)][g] = in.element(in.b[i >> 1], i & 1);
      D[g + 8 * (i >> 1)][2 * t + (i & 1)] = in.d[i];
    }
  }
  for (int row = 0; row < 16; row++)
    for (int k = 0; k < 16; k++)
      for (int column = 0; column < 8; column++) D[row][column] += A[row][k] * B[k][column];
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++)
      ((MmaOperands*)slots[lane])->d[i] = D[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)];
}
}  // namespace

void multiply_accumulate(bool is_bf16, float* d, const u32* a, const u32* b, int line) {
  MmaOperands in;
  raw_copy(in.a, a, 16);
  raw_copy(in.b, b, 8);
  raw_copy(in.d, d, 16);
  in.is_bf16 = is_bf16;
  unsigned char* const* slots = warp_operation("mma", FULL_WARP, &in, sizeof in, multiply_matrices, line);
  raw_copy(d, ((const MmaOperands*)slots[lane_number()])->d, 16);
}

void load_matrices(u32* registers, const u16* row, bool transposed, int line) {
  const char* name = transposed ? "ldmatrix.trans" : "ldmatrix";
  unsigned char* const* rows = warp_operation(name, FULL_WARP, row, 16, nullptr, line);
  const u32 g = lane_number() >> 2, t = lane_number() & 3;
  auto element = [&](u32 matrix, u32 r, u32 column) {
    u16 value;
    raw_copy(&value, rows[matrix * 8 + r] + 2 * column, 2);
    return (u32)value;
  };
  for (u32 m = 0; m < 4; m++)
    registers[m] = transposed ? element(m, 2 * t, g) | element(m, 2 * t + 1, g) << 16
                              : element(m, g, 2 * t) | element(m, g, 2 * t + 1) << 16;
}

}  // namespace cuda_on_cpu
