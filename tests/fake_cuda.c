/* Stands for libcuda.so.1 under Triton's own launcher, on machines without a GPU: launches are recorded, byte by byte,
   and tensor maps spell out what they were encoded from. See tests/fake_cuda.py. */
#include <stdint.h>
#include <string.h>
#include "cuda.h"

enum { MOST_PARAMETERS = 256, MOST_BYTES = 1 << 16 };
static int parameters, sizes[MOST_PARAMETERS], bytes;
static unsigned char values[MOST_BYTES];
static int64_t facts[6];  /* launches, maps encoded, grid, stream, function, shared memory */

/* Triton's launcher hands over pointers alone: how many bytes each points to is told beforehand. */
void fake_expect(int count, const int *sizes_of) { parameters = count; memcpy(sizes, sizes_of, count * sizeof(int)); }
void fake_facts(int64_t *out) { memcpy(out, facts, sizeof facts); }
int fake_values(unsigned char *out) { memcpy(out, values, bytes); return bytes; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **pointers, void **extra) {
  facts[0]++;
  facts[2] = config->gridDimX;
  facts[3] = (int64_t)config->hStream;
  facts[4] = (int64_t)function;
  facts[5] = config->sharedMemBytes;
  bytes = 0;
  for (int i = 0; i < parameters; bytes += sizes[i++]) memcpy(values + bytes, pointers[i], sizes[i]);
  return CUDA_SUCCESS;
}
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                CUtensorMapFloatOOBfill fill) {
  uint64_t *words = (uint64_t *)map;
  facts[1]++;
  memset(map, 0, sizeof *map);
  words[0] = (uint64_t)address;
  words[1] = type | swizzle << 8 | promotion << 16 | fill << 24;
  for (cuuint32_t i = 0; i < rank; i++) words[2 + i] = dims[i], words[11 + i] = box[i];
  for (cuuint32_t i = 0; i + 1 < rank; i++) words[7 + i] = strides[i];
  return CUDA_SUCCESS;
}

/* What else Triton asks for: one device with room for any kernel, and modules that load. */
CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448 : 0;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)1; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  static uint64_t loaded;
  *module = (CUmodule)(++loaded << 4);
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  *function = (CUfunction)((uint64_t)module + 1);
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { *status = 0; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "of tests/fake_cuda.c"; return CUDA_SUCCESS; }
