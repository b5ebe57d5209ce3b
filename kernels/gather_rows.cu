// out[i] = rows[indices[i]], row by row, any element type: the unit of copying is chosen by alignment.
#include "device.cuh"

template <typename Unit>
DEVICE void gather_rows(const Unit* rows, const i64* indices, Unit* out, int row_units, i64 row_stride) {
  const Unit* source = rows + indices[blockIdx.x] * row_stride;
  Unit* target = out + (i64)blockIdx.x * row_units;
  for (int i = threadIdx.x; i < row_units; i += blockDim.x) target[i] = source[i];
}

#define GATHER_ROWS(NAME, UNIT)                                                                   \
  KERNEL(256, 1)                                                                                  \
  NAME(const UNIT* rows, const i64* indices, UNIT* out, int row_units, i64 row_stride) {          \
    gather_rows<UNIT>(rows, indices, out, row_units, row_stride);                                 \
  }
GATHER_ROWS(gather_rows_16, uint4)
GATHER_ROWS(gather_rows_4, u32)
GATHER_ROWS(gather_rows_2, u16)
