// A stand-in for libcuda.so.1: as much of the driver as cuda.core needs to load a cubin and launch a kernel, which
// then runs on the CPU in the PTX executor (FAKE_CUDA_KERNELS: its shared objects, separated by ':'). It refuses
// what the driver refuses: too much shared memory without the opt-in, empty grids, large blocks.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int Result;
enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_IMAGE = 200, NOT_FOUND = 500, LAUNCH_FAILED = 719, NOT_SUPPORTED = 801 };
enum { MAX_SHARED = 232448, UNASKED_SHARED = 49152, FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED = 8 };
enum { ATTRIBUTE_MULTIPROCESSORS = 16, ATTRIBUTE_MAJOR = 75, ATTRIBUTE_MINOR = 76 };
typedef int (*RunKernel)(const char*, const unsigned*, const unsigned*, size_t, void**, int, int, unsigned, char*, size_t);
typedef struct { char name[128]; int shared; } Kernel;
typedef struct { unsigned grid[3], block[3], shared; void* stream; void* attributes; unsigned num_attributes; } LaunchConfig;

static Kernel kernels[256];
static int num_kernels;
static void* const CONTEXT = (void*)0x1000;
static void* const LIBRARY = (void*)0x2000;

static Result unsupported(void) { return NOT_SUPPORTED; }
Result cuInit(unsigned flags) { return SUCCESS; }
Result cuDriverGetVersion(int* version) { *version = 13000; return SUCCESS; }
Result cuGetErrorName(Result e, const char** s) { *s = e == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "CUDA_ERROR"; return SUCCESS; }
Result cuGetErrorString(Result e, const char** s) { *s = "from the stand-in driver"; return SUCCESS; }
Result cuDeviceGetCount(int* n) { *n = 1; return SUCCESS; }
Result cuDeviceGet(int* device, int ordinal) { *device = ordinal; return SUCCESS; }
Result cuDeviceGetName(char* name, int size, int device) { snprintf(name, size, "stand-in sm_90"); return SUCCESS; }
Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == ATTRIBUTE_MAJOR ? 9 : attribute == ATTRIBUTE_MULTIPROCESSORS ? 132 : 0;
  return SUCCESS;
}
Result cuDevicePrimaryCtxRetain(void** context, int device) { *context = CONTEXT; return SUCCESS; }
Result cuCtxGetCurrent(void** context) { *context = CONTEXT; return SUCCESS; }
Result cuCtxSetCurrent(void* context) { return SUCCESS; }
Result cuCtxGetDevice(int* device) { *device = 0; return SUCCESS; }
Result cuCtxGetDevice_v2(int* device, void* context) { *device = 0; return SUCCESS; }
Result cuStreamGetCtx(void* stream, void** context) { *context = CONTEXT; return SUCCESS; }
Result cuStreamGetCtx_v2(void* stream, void** context, void** green) { *context = CONTEXT; if (green) *green = 0; return SUCCESS; }
Result cuStreamGetDevice(void* stream, int* device) { *device = 0; return SUCCESS; }
Result cuStreamSynchronize(void* stream) { return SUCCESS; }

Result cuLibraryLoadData(void** library, const void* code, void* a, void** b, unsigned c, void* d, void** e, unsigned f) {
  if (memcmp(code, "\177ELF", 4)) return INVALID_IMAGE;
  *library = LIBRARY;
  return SUCCESS;
}
Result cuLibraryUnload(void* library) { return SUCCESS; }
Result cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  for (int i = 0; i < num_kernels; i++)
    if (!strcmp(kernels[i].name, name)) { *kernel = &kernels[i]; return SUCCESS; }
  snprintf(kernels[num_kernels].name, sizeof kernels->name, "%s", name);
  kernels[num_kernels].shared = UNASKED_SHARED;
  *kernel = &kernels[num_kernels++];
  return SUCCESS;
}
Result cuKernelGetFunction(void** function, void* kernel) { *function = kernel; return SUCCESS; }
Result cuKernelSetAttribute(int attribute, int value, void* kernel, int device) {
  if (attribute != FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED) return NOT_SUPPORTED;
  if (value > MAX_SHARED) return INVALID_VALUE;
  ((Kernel*)kernel)->shared = value;
  return SUCCESS;
}
Result cuKernelGetAttribute(int* value, int attribute, void* kernel, int device) { *value = 0; return SUCCESS; }

Result cuLaunchKernelEx(const LaunchConfig* config, void* function, void** arguments, void** extra) {
  Kernel* kernel = function;
  const unsigned* grid = config->grid;
  const unsigned* block = config->block;
  if ((int)config->shared > kernel->shared) return INVALID_VALUE;
  if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535) return INVALID_VALUE;
  if (block[0] * block[1] * block[2] > 1024) return INVALID_VALUE;
  char paths[8192], error[512];
  snprintf(paths, sizeof paths, "%s", getenv("FAKE_CUDA_KERNELS"));
  for (char* path = strtok(paths, ":"); path; path = strtok(NULL, ":")) {
    void* library = dlopen(path, RTLD_NOW);
    RunKernel run = library ? (RunKernel)dlsym(library, "run_kernel") : NULL;
    if (!run) { fprintf(stderr, "fake_cuda: %s\n", dlerror()); return NOT_FOUND; }
    if (!run(kernel->name, grid, block, config->shared, arguments, 0, 0, 0, error, sizeof error)) return SUCCESS;
    if (strncmp(error, "no kernel", 9)) { fprintf(stderr, "fake_cuda: %s\n", error); return LAUNCH_FAILED; }
  }
  return NOT_FOUND;
}

Result cuGetProcAddress_v2(const char* symbol, void** pointer, int version, unsigned long long flags, int* status) {
  static void* self;
  if (!self) {
    Dl_info info;
    dladdr((void*)cuInit, &info);
    self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }
  *pointer = dlsym(self, symbol);
  if (!*pointer) *pointer = (void*)unsupported;
  if (status) *status = 0;
  return SUCCESS;
}
Result cuGetProcAddress(const char* symbol, void** pointer, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(symbol, pointer, version, flags, NULL);
}
