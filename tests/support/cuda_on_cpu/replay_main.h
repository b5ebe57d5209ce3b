// Replays a case file: `program CASE RESULT ORDER EAGER SEED`. Buffers have their exact sizes, so that
// AddressSanitizer sees one byte too far. Format: replay.py. Exit status 64: the runtime reported an error.
#include <cstdlib>
#include <string>
#include <vector>

int main(int, char** argv) {
  FILE* file = fopen(argv[1], "rb");
  auto read = [&](void* target, size_t bytes) {
    if (bytes && fread(target, 1, bytes, file) != bytes) exit(3);
  };
  auto number = [&] { i64 value; read(&value, 8); return value; };
  std::vector<std::pair<void*, size_t>> buffers(number());
  for (auto& [data, bytes] : buffers) {
    bytes = number();
    if (posix_memalign(&data, 256, bytes)) exit(4);
    read(data, bytes);
  }
  for (i64 left = number(); left > 0; left--) {
    std::string name(number(), 0);
    read(name.data(), name.size());
    u32 grid[3], block[3] = {1, 1, 1};
    for (u32& size : grid) size = number();
    block[0] = number();
    const size_t shared_bytes = number();
    std::vector<i64> values(number());
    std::vector<void*> arguments;
    for (i64& value : values) {
      const bool is_buffer = number();
      value = number();
      if (is_buffer) value = (i64)buffers[value >> 32].first + (value & 0xffffffff);
      arguments.push_back(&value);
    }
    char error[512];
    if (run_kernel(name.c_str(), grid, block, shared_bytes, arguments.data(), atoi(argv[3]), atoi(argv[4]),
                   atoi(argv[5]), error, sizeof error)) {
      fprintf(stderr, "%s\n", error);
      return 64;
    }
  }
  FILE* result = fopen(argv[2], "wb");
  for (auto& [data, bytes] : buffers) fwrite(data, 1, bytes, result);
  return fclose(result);
}
