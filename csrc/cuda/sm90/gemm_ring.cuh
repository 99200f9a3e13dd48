// SPDX-License-Identifier: Apache-2.0
// The ring of stages in shared memory through which A and B reach the consumers: its barriers,
// where a thread is in it, and how the copy engine fills it.
#pragma once

#include <cuda.h>

#include "cuda/sm90/gemm_traits.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace mxtrain::cuda::sm90 {

using ptx::kWarpArrivals;

// One thread makes the barriers: a stage is full after `fills` arrivals, and empty after those of
// every consumer warp of the cluster.
template <class T>
__device__ __forceinline__ void init_ring(uint32_t shared, int fills) {
  for (int stage = 0; stage < T::kStages; ++stage) {
    ptx::mbarrier_init(shared + T::kOffsetFull + stage * 8, fills);
    ptx::mbarrier_init(shared + T::kOffsetEmpty + stage * 8,
                       T::kWarps * T::kCluster * kWarpArrivals);
  }
}

template <class T>
__device__ __forceinline__ void sync_cluster() {
  if constexpr (T::kCluster > 1) {
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
}

// Where the producer or a consumer is in the ring of stages: the stage, its addresses in the shared
// window, and the parity of the current round.
template <class T>
struct RingPosition {
  uint32_t shared, parity = 0;
  int stage = 0;

  __device__ __forceinline__ explicit RingPosition(uint32_t shared) : shared(shared) {}
  __device__ __forceinline__ uint32_t a() const { return shared + stage * T::kBytesA; }
  __device__ __forceinline__ uint32_t b() const {
    return shared + T::kOffsetB + stage * T::kBytesB;
  }
  __device__ __forceinline__ uint32_t full() const { return shared + T::kOffsetFull + stage * 8; }
  __device__ __forceinline__ uint32_t empty() const { return shared + T::kOffsetEmpty + stage * 8; }
  __device__ __forceinline__ void advance() {
    if (++stage == T::kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Has the copy engine load a stage: the columns from k on of rows from m on of A, and of the rows
// from n on of B, of which each block of the cluster (rank) fetches a part for all.
template <class T>
__device__ __forceinline__ void load_stage(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                           const RingPosition<T>& ring, int k, int m, int n,
                                           uint32_t rank) {
  constexpr int kBytes = T::kBoxB * T::kTileK;
  ptx::mbarrier_arrive_expect_tx(ring.full(), T::kBytesA + T::kBytesB);
  ptx::cp_async_bulk_tensor_2d_load(ring.a(), &map_a, k, m, ring.full());
  if constexpr (T::kCluster > 1) {
    ptx::cp_async_bulk_tensor_2d_multicast(ring.b() + rank * kBytes, &map_b, k, n + rank * T::kBoxB,
                                           ring.full(), (1 << T::kCluster) - 1);
  } else {
#pragma unroll
    for (int box = 0; box < T::kTileN / T::kBoxB; ++box)
      ptx::cp_async_bulk_tensor_2d_load(ring.b() + box * kBytes, &map_b, k, n + box * T::kBoxB,
                                        ring.full());
  }
}

}  // namespace mxtrain::cuda::sm90
