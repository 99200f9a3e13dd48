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

// Has the copy engine load kRows rows from `row` on of an operand, in boxes of kBox rows. share:
// each block of the cluster (rank) fetches one box, for all.
template <class T, int kRows, int kBox>
__device__ __forceinline__ void load_rows(const CUtensorMap& map, uint32_t to, uint32_t full, int k,
                                          int row, uint32_t rank, bool share) {
  constexpr int kBytes = kBox * T::kTileK;
  if (T::kCluster > 1 && kBox * T::kCluster == kRows && share) {
    ptx::cp_async_bulk_tensor_2d_multicast(to + rank * kBytes, &map, k, row + rank * kBox, full,
                                           (1 << T::kCluster) - 1);
    return;
  }
#pragma unroll
  for (int box = 0; box < kRows / kBox; ++box)
    ptx::cp_async_bulk_tensor_2d_load(to + box * kBytes, &map, k, row + box * kBox, full);
}

// A stage: the columns from k on of rows from m on of A and of rows from n on of B. The blocks of
// the cluster have one tile of B, which they share; along_n: one of A.
template <class T>
__device__ __forceinline__ void load_stage(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                           const RingPosition<T>& ring, int k, int m, int n,
                                           uint32_t rank, bool along_n = false) {
  ptx::mbarrier_arrive_expect_tx(ring.full(), T::kBytesA + T::kBytesB);
  load_rows<T, T::kTileM, T::kBoxA>(map_a, ring.a(), ring.full(), k, m, rank, along_n);
  load_rows<T, T::kTileN, T::kBoxB>(map_b, ring.b(), ring.full(), k, n, rank, !along_n);
}

}  // namespace mxtrain::cuda::sm90
