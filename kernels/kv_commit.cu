// Moves KV rows within the cache in all layers at once: row source_rows[i] goes to target_rows[i]. All rows are
// read before one is written, so a row may be source and target. A block owns a few columns of one layer's K or V
// for all rows, and keeps them in shared memory in between. A pair with a negative row is padding.
#include "device.cuh"

KERNEL(256, 1)
kv_commit(unsigned char* kv, const i64* source_rows, const i64* target_rows, int num_rows, i64 plane_bytes,
          int row_bytes, int block_chunks) {
  DYNAMIC_SHARED(shared);
  uint4* staged = reinterpret_cast<uint4*>(shared);  // [num_rows][block_chunks], 16 bytes each
  unsigned char* plane = kv + blockIdx.y * plane_bytes;  // K or V of one layer
  const int first_column = blockIdx.x * block_chunks * 16;
  for (int i = threadIdx.x; i < num_rows * block_chunks; i += blockDim.x) {
    i64 row = source_rows[i / block_chunks];
    int column = first_column + i % block_chunks * 16;
    if (row >= 0 && column < row_bytes) staged[i] = *reinterpret_cast<const uint4*>(plane + row * row_bytes + column);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_rows * block_chunks; i += blockDim.x) {
    i64 source = source_rows[i / block_chunks], target = target_rows[i / block_chunks];
    int column = first_column + i % block_chunks * 16;
    if (source >= 0 && target >= 0 && column < row_bytes)
      *reinterpret_cast<uint4*>(plane + target * row_bytes + column) = staged[i];
  }
}
