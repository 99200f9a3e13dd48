// SPDX-License-Identifier: Apache-2.0
// Launching: the one way to do it, which leaves the number of blocks and their size where an error
// message finds them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/quantize.h"
#include "ptx/cluster.cuh"

// What is CUDA's own in a launch, and in a kernel's dynamic shared memory; csrc/emulation has
// others.
#ifndef MXT_LAUNCH
#define MXT_LAUNCH(kernel, grid, block, shared, stream) kernel<<<grid, block, shared, stream>>>
#define MXT_DYNAMIC_SHARED(name, alignment) \
  extern __shared__ __align__(alignment)    \
  uint8_t name[]
#define MXT_OVERLAPS  // launches may overlap
#endif

namespace mxtrain::cuda {

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Of the current device.
inline cudaError_t count_multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

// The compute capability that this code is compiled for, as 90 for 9.0; 0 on the host.
#ifdef __CUDA_ARCH__
constexpr int kCodeArch = __CUDA_ARCH__ / 10;
#else
constexpr int kCodeArch = 0;
#endif

// That of the current device.
inline cudaError_t device_arch(int* arch) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  *arch = 10 * major + minor;
  return error;
}

// A kernel of launch_early calls it before it touches global memory: the kernel after it may start,
// and what the kernels before it wrote is there.
__device__ __forceinline__ void begin_early() {
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();
}

// kernel<<<grid, block, 0, stream>>>(arguments...), and the error of it.
template <class... P, class... A>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, unsigned block, cudaStream_t stream,
                          const A&... arguments) {
  last_launch() = {grid.x * grid.y * grid.z, block};
  MXT_LAUNCH(kernel, grid, block, 0, stream)(arguments...);
  return cudaGetLastError();
}

// The same with `shared` bytes of dynamic shared memory; more than 48 KB must be asked for.
template <class... P, class... A>
static cudaError_t launch_with_shared(void (*kernel)(P...), dim3 grid, unsigned block, int shared,
                                      cudaStream_t stream, const A&... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  last_launch() = {grid.x * grid.y * grid.z, block};
  MXT_LAUNCH(kernel, grid, block, shared, stream)(arguments...);
  return cudaGetLastError();
}

// The same for a kernel that calls begin_early. From 9.0 on its blocks come to multiprocessors that
// the kernel before has left, if that one is of these too, and wait there for its end.
template <class... P, class... A>
static cudaError_t launch_early(void (*kernel)(P...), dim3 grid, unsigned block, int shared,
                                cudaStream_t stream, const A&... arguments) {
#ifdef MXT_OVERLAPS
  int arch = 0;
  cudaError_t error = device_arch(&arch);
  if (error == cudaSuccess && shared > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute overlap = {};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = arch >= 90 ? 1 : 0;
  last_launch() = {grid.x * grid.y * grid.z, block};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
#else
  return launch_with_shared(kernel, grid, block, shared, stream, arguments...);
#endif
}

}  // namespace mxtrain::cuda
