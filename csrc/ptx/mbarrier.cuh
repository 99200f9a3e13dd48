// SPDX-License-Identifier: Apache-2.0
// Barriers in shared memory that also count the bytes of asynchronous copies (PTX ISA, "Parallel
// Synchronization and Communication Instructions: mbarrier"); sm_90 and up. Addresses are those of
// the shared window (ptx::shared_address).
#pragma once

#include <cstdint>

#include "ptx/integer.cuh"

namespace mxtrain::ptx {

// Arrivals of a warp: one lane's, after all lanes have come together. The race checker of
// compute-sanitizer orders only the lanes that arrive themselves; for it, build with
// CUDAFLAGS=-DMXT_EVERY_LANE_ARRIVES.
#ifdef MXT_EVERY_LANE_ARRIVES
constexpr int kWarpArrivals = 32;
#else
constexpr int kWarpArrivals = 1;
#endif

// mbarrier.init: a phase completes after `arrivals` arrivals and the bytes they announced.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: the initialized barriers are visible to the cluster and to the copy engine.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive: one arrival; what this thread wrote before is seen by those who then wait.
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The kWarpArrivals arrivals of a whole warp.
__device__ __forceinline__ void mbarrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (kWarpArrivals == 32 || lane_id() == 0) mbarrier_arrive(barrier);
}

// mbarrier.arrive.expect_tx: one arrival, which announces `bytes` of copies to come.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// mapa + mbarrier.arrive: one arrival at the barrier of this address in block `rank` of the
// cluster. It orders what this block sees, not what the others do: right for "I have read this",
// and far cheaper than a release to the cluster, which is a fence of the GPU's memory.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

// mbarrier.try_wait.parity, mbarrier.test_wait.parity: whether the phase of this parity has
// completed; the first waits a while for it.
#define MXT_MBARRIER_QUERY(wait)                                                                \
  __device__ __forceinline__ bool mbarrier_##wait##_parity(uint32_t barrier, uint32_t parity) { \
    uint32_t done;                                                                              \
    asm volatile(                                                                               \
        "{\n"                                                                                   \
        ".reg .pred p;\n"                                                                       \
        "mbarrier." #wait                                                                       \
        ".parity.shared::cta.b64 p, [%1], %2;\n"                                                \
        "selp.u32 %0, 1, 0, p;\n"                                                               \
        "}"                                                                                     \
        : "=r"(done)                                                                            \
        : "r"(barrier), "r"(parity)                                                             \
        : "memory");                                                                            \
    return done != 0;                                                                           \
  }
MXT_MBARRIER_QUERY(try_wait)
MXT_MBARRIER_QUERY(test_wait)
#undef MXT_MBARRIER_QUERY

// Waits until the phase of this parity has completed. With MXT_BOUNDED_WAITS a deadlock ends in a
// trap within seconds instead of a hung GPU.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
#ifdef MXT_BOUNDED_WAITS
  for (int spins = 0; !mbarrier_try_wait_parity(barrier, parity); ++spins)
    if (spins == 1000000) __trap();
#else
  while (!mbarrier_try_wait_parity(barrier, parity)) {
  }
#endif
}

}  // namespace mxtrain::ptx
