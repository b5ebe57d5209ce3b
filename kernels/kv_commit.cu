// Moves KV rows between slots in all layers at once: row source_slots[i] goes to target_slots[i]. All rows are read
// before one is written, so a slot may be source and target. A block owns a few columns of one layer's K or V for
// all rows, and keeps them in shared memory in between. A pair with a negative slot is padding.
#include "device.cuh"

KERNEL(256, 1)
kv_commit(unsigned char* kv, const i64* source_slots, const i64* target_slots, int num_rows, i64 plane_bytes,
          int row_bytes, int block_chunks) {
  DYNAMIC_SHARED(shared);
  uint4* staged = reinterpret_cast<uint4*>(shared);  // [num_rows][block_chunks], 16 bytes each
  unsigned char* plane = kv + blockIdx.y * plane_bytes;  // K or V of one layer
  const int first_column = blockIdx.x * block_chunks * 16;
  for (int i = threadIdx.x; i < num_rows * block_chunks; i += blockDim.x) {
    i64 slot = source_slots[i / block_chunks];
    int column = first_column + i % block_chunks * 16;
    if (slot >= 0 && column < row_bytes) staged[i] = *reinterpret_cast<const uint4*>(plane + slot * row_bytes + column);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < num_rows * block_chunks; i += blockDim.x) {
    i64 source = source_slots[i / block_chunks], slot = target_slots[i / block_chunks];
    int column = first_column + i % block_chunks * 16;
    if (source >= 0 && slot >= 0 && column < row_bytes)
      *reinterpret_cast<uint4*>(plane + slot * row_bytes + column) = staged[i];
  }
}
