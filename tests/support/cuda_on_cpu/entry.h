// Ends a translation unit of kernels: `run_kernel` launches one by name. Before it, KERNEL_LIST(X) must list them.
// With OUTRIDER_REPLAY the unit is a program that replays a case file (see replay.py), for sanitizers.
#pragma once
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <cstdio>
#include <cstring>
#include <utility>

namespace cuda_on_cpu {
// Unpacks the driver's void** arguments by the kernel's own signature.
template <class... Args>
int launch_source(void (*kernel)(Args...), void** arguments, Index grid, Index block, size_t shared_bytes,
                  Schedule schedule, char* error, size_t error_size) {
  auto bound = std::make_pair(kernel, arguments);
  auto body = [](void* context) {
    auto& [kernel, arguments] = *(std::pair<void (*)(Args...), void**>*)context;
    [&]<size_t... I>(std::index_sequence<I...>) { kernel(*(Args*)arguments[I]...); }(std::index_sequence_for<Args...>{});
  };
  return launch(body, &bound, grid, block, shared_bytes, schedule, error, error_size);
}
// A kernel translated from PTX reads the arguments itself.
inline int launch_source(void (*kernel)(void**), void** arguments, Index grid, Index block, size_t shared_bytes,
                         Schedule schedule, char* error, size_t error_size) {
  auto bound = std::make_pair(kernel, arguments);
  auto body = [](void* context) {
    auto& [kernel, arguments] = *(std::pair<void (*)(void**), void**>*)context;
    kernel(arguments);
  };
  return launch(body, &bound, grid, block, shared_bytes, schedule, error, error_size);
}
}  // namespace cuda_on_cpu

extern "C" int run_kernel(const char* name, const u32* grid, const u32* block, size_t shared_bytes, void** arguments,
                          int order, int eager_copies, u32 seed, char* error, size_t error_size) {
  using namespace cuda_on_cpu;
  const Index g = {grid[0], grid[1], grid[2]}, b = {block[0], block[1], block[2]};
  const Schedule schedule = {(Order)order, eager_copies != 0, seed};
#define RUN(kernel) \
  if (!strcmp(name, #kernel)) return launch_source(kernel, arguments, g, b, shared_bytes, schedule, error, error_size);
  KERNEL_LIST(RUN)
#undef RUN
  snprintf(error, error_size, "no kernel %s", name);
  return 1;
}

#ifdef OUTRIDER_REPLAY
#include "replay_main.h"
#endif
