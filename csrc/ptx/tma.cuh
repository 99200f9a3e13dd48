// SPDX-License-Identifier: Apache-2.0
// The bulk tensor copy engine (PTX ISA, "Data Movement and Conversion Instructions: Tensor copy");
// sm_90 and up. `map` points to a CUtensorMap that is a __grid_constant__ parameter; (x, y) is the
// box's corner, x along the contiguous axis. What lies outside the tensor is read as zero and not
// written.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// prefetch.tensormap: the descriptor into its cache.
__device__ __forceinline__ void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// cp.async.bulk.tensor.2d, global to shared; completes on `barrier`.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_load(uint32_t shared, const void* map,
                                                             int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// The same into every block of the cluster whose bit is in `blocks`, at the same offsets, where it
// completes on the barrier at the same offset.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_multicast(uint32_t shared, const void* map,
                                                                  int x, int y, uint32_t barrier,
                                                                  uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(x), "r"(y), "r"(barrier), "h"(blocks)
      : "memory");
}

// cp.async.bulk.tensor.2d, shared to global; tracked by bulk groups.
__device__ __forceinline__ void cp_async_bulk_tensor_2d_store(const void* map, int x, int y,
                                                              uint32_t shared) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map),
      "r"(x), "r"(y), "r"(shared)
      : "memory");
}

// cp.reduce.async.bulk.tensor.2d.add, shared to global; tracked by bulk groups. In float32 one
// rounding to nearest; inputs and sums below 2^-126 count as zero.
__device__ __forceinline__ void cp_reduce_async_bulk_tensor_2d_add(const void* map, int x, int y,
                                                                   uint32_t shared) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%0, {%1, %2}], [%3];" ::
          "l"(map),
      "r"(x), "r"(y), "r"(shared)
      : "memory");
}

// cp.async.bulk.commit_group
__device__ __forceinline__ void cp_async_bulk_commit_group() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// cp.async.bulk.wait_group.read: all but this thread's latest N groups have read their shared
// memory.
template <int N>
__device__ __forceinline__ void cp_async_bulk_wait_group_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// fence.proxy.async: this thread's shared-memory stores are visible to the copy engine.
__device__ __forceinline__ void fence_proxy_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace mxtrain::ptx
