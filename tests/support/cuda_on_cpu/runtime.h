// A CPU runtime for CUDA kernels, for correctness only: blocks run one after the other, every CUDA thread is a fiber
// that runs until it meets a barrier or a warp operation. Both executors (source and PTX) stand on it.
//
// What is modelled: barriers and their deadlocks, warp operations with their masks, mma / ldmatrix data layouts,
// cp.async groups landing as late as the waits allow or at once, the order in which warps and blocks run.
// What is not: timing, memory ordering between blocks, rounding inside the tensor cores, approximate functions.
#pragma once
// Many small units include these headers: of the standard library only what takes the compiler little time.
#include <bits/stl_algobase.h>  // std::min and std::max, without the rest of <algorithm>

#include <cstddef>
#include <cstdint>

typedef uint16_t u16;
typedef uint32_t u32;
typedef unsigned long long u64;
typedef long long i64;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };
float to_float(bf16 x);
float to_float(f16 x);
void from_float(bf16& y, float x);
void from_float(f16& y, float x);

namespace cuda_on_cpu {

struct Index { u32 x, y, z; };
constexpr u32 FULL_WARP = 0xffffffffu;

enum class Order { ascending, descending, random };
// One way of running a launch. Kernels that are right give the same result under all of them.
struct Schedule {
  Order order;        // of blocks, warps and lanes
  bool eager_copies;  // cp.async lands when issued instead of when waited for
  u32 seed;           // for Order::random
};

// --- the running thread ---
extern thread_local const Index *thread_index, *block_index, *block_size, *grid_size;
extern thread_local u32 thread_number;  // in its block
inline u32 lane_number() { return thread_number & 31; }
unsigned char* dynamic_shared();
// Ends the launch with an error message; does not return.
[[noreturn]] void fail(const char* what, int line);

// --- synchronisation ---
void block_barrier(int line);
void warp_barrier(u32 mask, int line);

// --- warp operations: registers are exchanged, memory is not ordered (only warp_barrier orders it) ---
u32 shuffle(u32 mask, u32 value, int source_lane, int line);  // lanes outside 0..31: own value
u32 ballot(u32 mask, bool predicate, int line);
// Layouts as documented in kernels/device.cuh. b: two registers, d: four floats, in and out.
void multiply_accumulate(bool is_bf16, float* d, const u32* a, const u32* b, int line);
// `row`: the eight elements this lane's address points at, read by the caller so that sanitizers see the read.
void load_matrices(u32* registers, const u16* row, bool transposed, int line);

// --- asynchronous copies of this thread ---
struct AsyncCopy { void* target; const void* source; int bytes; bool valid; int group; };
bool copies_are_eager();
void queue_copy(void* target, const void* source, int bytes, bool valid);
void commit_copies();
// Takes the next queued copy that must have landed when at most `pending` groups are under way; false: none.
bool take_copy(int pending, AsyncCopy* copy);

// Runs `body(context)` once per CUDA thread. Returns 0, or 1 with a message in `error`.
int launch(void (*body)(void*), void* context, Index grid, Index block, size_t shared_bytes, Schedule schedule,
           char* error, size_t error_size);

}  // namespace cuda_on_cpu
