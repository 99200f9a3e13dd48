// SPDX-License-Identifier: Apache-2.0
// Thread-block clusters, register reallocation and dependent launches (PTX ISA,
// "Special Registers", "Parallel Synchronization and Communication Instructions", "Control Flow
// Instructions"); sm_90 and up, setmaxnreg sm_90a.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// %cluster_ctarank: this block's number in its cluster.
__device__ __forceinline__ uint32_t cluster_ctarank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster.arrive.release and .wait.acquire: all threads of the cluster.
__device__ __forceinline__ void barrier_cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void barrier_cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// setmaxnreg: the warpgroup gives registers back, or takes them; a multiple of 8.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// griddepcontrol.launch_dependents: the next kernel in the stream, if it was launched to depend on
// this one, may start its blocks.
__device__ __forceinline__ void griddepcontrol_launch_dependents() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// griddepcontrol.wait: until the kernels that this one depends on have ended and their writes are
// visible.
__device__ __forceinline__ void griddepcontrol_wait() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace mxtrain::ptx
