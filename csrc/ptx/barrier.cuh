// SPDX-License-Identifier: Apache-2.0
// The numbered barriers of a thread block (PTX ISA, "Parallel Synchronization and Communication
// Instructions: barrier"). `threads`: how many come to it, those that wait and those that do not; a
// multiple of 32. Barrier 0 is __syncthreads'.
#pragma once

namespace mxtrain::ptx {

// barrier.sync: waits until all have come.
__device__ __forceinline__ void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// barrier.arrive: comes, and goes on.
__device__ __forceinline__ void barrier_arrive(int barrier, int threads) {
  asm volatile("barrier.arrive.aligned %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace mxtrain::ptx
