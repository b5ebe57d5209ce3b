// Fibers and scheduler. Compiled without sanitizers, whose shadow memory only follows the kernels' own accesses;
// with OUTRIDER_TSAN it tells ThreadSanitizer which fiber runs and what barriers order.
#include "runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"

#ifdef OUTRIDER_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#else
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_destroy_fiber(void*) {}
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace cuda_on_cpu {

thread_local const Index *thread_index, *block_index, *block_size, *grid_size;
thread_local u32 thread_number;

namespace {
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t MAX_COPIES = 256;  // a thread's cp.async under way

struct Block;
thread_local Block* current;
void begin_thread();

struct Fiber {
  enum State { READY, AT_BLOCK_BARRIER, AT_WARP_BARRIER, IN_WARP_OPERATION, DONE } state = READY;
  void* stack_pointer = nullptr;
  void* tsan = nullptr;
  Index index{};
  int line = 0;                 // of the barrier or operation it waits at
  const char* operation = "";   // its name, equal pointers for equal operations
  u32 mask = 0;
  u32 num_block_barriers = 0, num_warp_barriers = 0, num_operations = 0;
  unsigned char slots[2][64];   // what it brings to a warp operation; two, so that a fast lane cannot overwrite
  unsigned char* inputs[32];    // the slots of all lanes, filled in when the operation is complete
  Combine combine = nullptr;
  // A ring, allocated once: memory that fibers allocate and the scheduler frees looks like a race to sanitizers.
  std::vector<AsyncCopy> copies = std::vector<AsyncCopy>(MAX_COPIES);
  size_t num_queued = 0, num_taken = 0;
  int num_groups = 0;

  void start(Index thread_index, void* stack) {
    state = READY;
    index = thread_index;
    stack_pointer = stack;
    tsan = __tsan_create_fiber(0);
    mask = num_block_barriers = num_warp_barriers = num_operations = 0;
    num_queued = num_taken = num_groups = 0;
  }

  unsigned char* slot() { return slots[(num_operations - 1) & 1]; }
};

struct Block {
  std::vector<Fiber> fibers;
  void* scheduler_stack = nullptr;
  void* scheduler_tsan = nullptr;
  unsigned char* shared = nullptr;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  Schedule schedule{};
  std::mt19937 random;
  std::string error;
  char block_barrier_tag[2], warp_barrier_tags[32][2], start_tag, end_tag;  // addresses for __tsan_acquire

  u32 num_warps() const { return (u32)fibers.size() / 32; }
};

Fiber& self() { return current->fibers[thread_number]; }

void yield_to_scheduler() {
  __tsan_switch_to_fiber(current->scheduler_tsan, 1);
  switch_stacks(&self().stack_pointer, current->scheduler_stack);
}

void resume(u32 number) {
  thread_number = number;
  thread_index = &self().index;
  __tsan_switch_to_fiber(self().tsan, 1);
  switch_stacks(&current->scheduler_stack, self().stack_pointer);
}

void begin_thread() {
  __tsan_acquire(&current->start_tag);
  current->body(current->context);
  __tsan_release(&current->end_tag);
  self().state = Fiber::DONE;
  yield_to_scheduler();
  abort();  // a finished thread is never resumed
}

// A warp operation happens when every lane of its mask has arrived at the same one.
bool complete_operation(u32 warp, u32 lane) {
  Fiber* lanes = &current->fibers[warp * 32];
  Fiber& first = lanes[lane];
  if (first.state != Fiber::AT_WARP_BARRIER && first.state != Fiber::IN_WARP_OPERATION) return false;
  const u32 mask = first.mask;
  unsigned char* inputs[32] = {};
  for (u32 l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    Fiber& other = lanes[l];
    if (other.state != first.state || other.mask != mask) return false;
    if (other.operation != first.operation && strcmp(other.operation, first.operation)) return false;
    inputs[l] = other.slot();
  }
  if (first.combine) first.combine(inputs);
  for (u32 l = 0; l < 32; l++) {
    if (!(mask >> l & 1)) continue;
    raw_copy(lanes[l].inputs, inputs, sizeof inputs);
    lanes[l].state = Fiber::READY;
  }
  return true;
}

// Runs each ready lane of a warp up to its next stop, then completes what can be completed.
bool step_warp(u32 warp) {
  u32 lanes[32];
  std::iota(lanes, lanes + 32, 0);
  if (current->schedule.order == Order::descending) std::reverse(lanes, lanes + 32);
  if (current->schedule.order == Order::random) std::shuffle(lanes, lanes + 32, current->random);
  bool moved = false;
  for (u32 lane : lanes) {
    if (current->fibers[warp * 32 + lane].state != Fiber::READY) continue;
    resume(warp * 32 + lane);
    moved = true;
    if (!current->error.empty()) return false;
  }
  u32 incomplete = 0;  // the mask that was looked at last: its other lanes wait for the same
  for (u32 lane = 0; lane < 32; lane++) {
    const u32 mask = current->fibers[warp * 32 + lane].mask;
    if (mask == incomplete && mask >> lane & 1) continue;
    const bool completed = complete_operation(warp, lane);
    incomplete = completed ? 0 : mask;
    moved |= completed;
  }
  return moved;
}

// A round over the warps. In fixed orders a warp runs as far as it can before the next: the greatest distance
// between warps that barriers allow. At random it runs a random number of steps.
bool step_block() {
  const u32 n = current->num_warps();
  bool moved = false;
  for (u32 i = 0; i < n && current->error.empty(); i++) {
    const bool random = current->schedule.order == Order::random;
    const u32 warp = random ? current->random() % n : current->schedule.order == Order::descending ? n - 1 - i : i;
    for (u32 left = random ? current->random() % 200 : ~0u; left > 0 && step_warp(warp); left--) moved = true;
  }
  for (u32 warp = 0; current->error.empty() && !moved && warp < n; warp++) moved = step_warp(warp);  // the random choice may miss the only one
  return moved;
}

void report_deadlock() {
  std::string text = "deadlock: divergent barrier or warp operation;";
  const char* names[] = {"ready", "at __syncthreads", "at __syncwarp", "in", "exited"};
  std::string last;
  for (u32 i = 0; i < current->fibers.size(); i++) {
    const Fiber& f = current->fibers[i];
    std::string state = names[f.state];
    if (f.state == Fiber::IN_WARP_OPERATION) state += std::string(" ") + f.operation;
    if (f.state != Fiber::DONE) state += " line " + std::to_string(f.line);
    if (state != last) text += " from thread " + std::to_string(i) + " " + state + ";";
    last = state;
  }
  current->error = text;
}

void run_block(char* stacks) {
  for (u32 i = 0; i < current->fibers.size(); i++) {
    const Index index = {i % block_size->x, i / block_size->x % block_size->y, i / block_size->x / block_size->y};
    current->fibers[i].start(index, prepare_stack(stacks + STACK_BYTES * i, STACK_BYTES, begin_thread));
  }
  while (current->error.empty()) {
    const bool moved = step_block();
    u32 num_done = 0, num_waiting = 0;
    for (const Fiber& f : current->fibers) {
      num_done += f.state == Fiber::DONE;
      num_waiting += f.state == Fiber::AT_BLOCK_BARRIER;
    }
    if (!current->error.empty() || num_done == current->fibers.size()) return;
    if (num_waiting > 0 && num_waiting + num_done == current->fibers.size()) {
      for (Fiber& f : current->fibers)
        if (f.state == Fiber::AT_BLOCK_BARRIER) f.state = Fiber::READY;
    } else if (!moved) {
      report_deadlock();
    }
  }
}

char* map_stacks(size_t num) {
  return (char*)mmap(nullptr, STACK_BYTES * num, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                     -1, 0);
}
// What launches of one size leave to the next ones of a thread: fibers are large, and fresh stacks are pages to fault.
struct Kept {
  std::vector<Fiber> fibers;
  char* stacks;

  explicit Kept(size_t num) : fibers(num), stacks(map_stacks(num)) {}
  ~Kept() { munmap(stacks, STACK_BYTES * fibers.size()); }
};
thread_local std::map<size_t, Kept> kept;
}  // namespace

unsigned char* dynamic_shared() { return current->shared; }

void fail(const char* what, int line) {
  char text[512];
  snprintf(text, sizeof text, "%s (line %d, block %u,%u,%u, thread %u)", what, line, block_index->x, block_index->y,
           block_index->z, thread_number);
  current->error = text;
  yield_to_scheduler();  // which sees the error and drops the launch with all its stacks
  abort();
}

void block_barrier(int line) {
  Fiber& f = self();
  char* tag = &current->block_barrier_tag[f.num_block_barriers++ & 1];
  __tsan_release(tag);
  f.state = Fiber::AT_BLOCK_BARRIER;
  f.line = line;
  yield_to_scheduler();
  __tsan_acquire(tag);
}

void warp_barrier(u32 mask, int line) {
  Fiber& f = self();
  char* tag = &current->warp_barrier_tags[thread_number >> 5][f.num_warp_barriers++ & 1];
  __tsan_release(tag);
  f.state = Fiber::AT_WARP_BARRIER;
  f.operation = "__syncwarp";
  f.combine = nullptr;
  f.num_operations++;
  f.line = line;
  f.mask = mask;
  yield_to_scheduler();
  __tsan_acquire(tag);
}

unsigned char* const* warp_operation(const char* name, u32 mask, const void* in, size_t bytes, Combine combine, int line) {
  Fiber& f = self();
  if (!(mask >> lane_number() & 1)) fail("a lane calls a warp operation whose mask leaves it out", line);
  f.num_operations++;
  raw_copy(f.slot(), in, bytes);
  f.state = Fiber::IN_WARP_OPERATION;
  f.operation = name;
  f.combine = combine;
  f.line = line;
  f.mask = mask;
  yield_to_scheduler();
  return self().inputs;
}

bool copies_are_eager() { return current->schedule.eager_copies; }
void queue_copy(void* target, const void* source, int bytes, bool valid) {
  Fiber& f = self();
  if (f.num_queued - f.num_taken == MAX_COPIES) fail("too many asynchronous copies under way", 0);
  f.copies[f.num_queued++ % MAX_COPIES] = {target, source, bytes, valid, f.num_groups};
}
void commit_copies() { self().num_groups++; }
bool take_copy(int pending, AsyncCopy* copy) {
  Fiber& f = self();
  if (f.num_taken == f.num_queued) return false;
  const AsyncCopy& next = f.copies[f.num_taken % MAX_COPIES];
  if (next.group >= f.num_groups - pending) return false;
  *copy = next;
  f.num_taken++;
  return true;
}

int launch(void (*body)(void*), void* context, Index grid, Index block, size_t shared_bytes, Schedule schedule,
           char* error, size_t error_size) {
  Block state;
  current = &state;
  grid_size = &grid;
  block_size = &block;
  state.body = body;
  state.context = context;
  state.schedule = schedule;
  state.random.seed(schedule.seed);
  const size_t num_threads = (size_t)block.x * block.y * block.z;
  Kept& own = kept.try_emplace(num_threads, num_threads).first->second;
  state.fibers.swap(own.fibers);
  if (state.fibers.empty() || state.fibers.size() % 32 || state.fibers.size() > 1024) state.error = "bad block size";
  state.scheduler_tsan = __tsan_get_current_fiber();
  __tsan_release(&state.start_tag);

  std::vector<size_t> order((size_t)grid.x * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::descending) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::random) std::shuffle(order.begin(), order.end(), state.random);

  // Under ThreadSanitizer blocks get memory and fibers of their own: reuse would look like a race between them.
  const size_t padded_bytes = (shared_bytes + 127) / 128 * 128;
  std::vector<unsigned char*> used;
  std::vector<void*> used_fibers;
  for (size_t number : order) {
    if (!state.error.empty()) break;
    Index index = {(u32)(number % grid.x), (u32)(number / grid.x % grid.y), (u32)(number / grid.x / grid.y)};
    block_index = &index;
    if (padded_bytes) {
      state.shared = (unsigned char*)aligned_alloc(128, padded_bytes);
      memset(state.shared, 0xff, padded_bytes);  // NaN in every format
      used.push_back(state.shared);
    }
#ifdef OUTRIDER_TSAN
    munmap(own.stacks, STACK_BYTES * state.fibers.size());
    own.stacks = map_stacks(state.fibers.size());
#endif
    run_block(own.stacks);
    for (Fiber& f : state.fibers) used_fibers.push_back(f.tsan);
#ifndef OUTRIDER_TSAN
    free(state.shared);
    used.clear();
    state.shared = nullptr;
#endif
  }
  __tsan_acquire(&state.end_tag);
  for (void* fiber : used_fibers) __tsan_destroy_fiber(fiber);
  for (unsigned char* shared : used) free(shared);
  state.fibers.swap(own.fibers);
  snprintf(error, error_size, "%s", state.error.c_str());
  return !state.error.empty();
}

}  // namespace cuda_on_cpu
