// SPDX-License-Identifier: Apache-2.0
// The producers of int8_gemm on Hopper: three warps of the first warpgroup, a task each. A pass
// then waits for the longest of three chains of waits and instructions, not for their sum. All walk
// over the same tiles, and each is as far ahead as its barriers let it:
//   copy_stages     tiles of A and B into the ring; an arrival and the bytes at a stage's barrier
//   leave_facts     scales and mask beside each stage; an arrival at the same barrier
//   copy_residuals  tiles of A's residual, where blocks fell back, through a buffer of its own
#pragma once

#include "cuda/sm90/int8_stage.cuh"

namespace mxtrain::cuda::sm90 {

// Operands in boxes: [0] of a tile's rows, [1] of those that one block of a cluster fetches for
// all.
struct TensorMaps {
  CUtensorMap a[2], b[2], residual, out;
};

// A tile's stages of A and B. The blocks of the cluster have one tile of B, which
// they share; kAlongN: one of A.
template <class T, bool kAlongN>
__device__ __forceinline__ void copy_tile(const TensorMaps& maps, RingPosition<T>& ring,
                                          int k_blocks, int m, int n, uint32_t rank) {
  constexpr bool kShareA = T::kCluster > 1 && kAlongN, kShareB = T::kCluster > 1 && !kAlongN;
  constexpr int kRowsA = T::kTileM / T::kCluster, kRowsB = T::kTileN / T::kCluster;
  constexpr uint16_t kAll = (1 << T::kCluster) - 1;
  const uint32_t part_a = rank * kRowsA * T::kTileK, part_b = rank * kRowsB * T::kTileK;
  m += kShareA ? rank * kRowsA : 0;
  n += kShareB ? rank * kRowsB : 0;
#pragma unroll 1
  for (int block = 0; block < k_blocks; ++block) {
    const int k = block * T::kTileK;
    const uint32_t full = ring.full();
    ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full, T::kBytesA + T::kBytesB);
    if constexpr (kShareA)
      ptx::cp_async_bulk_tensor_2d_multicast(ring.a() + part_a, &maps.a[1], k, m, full, kAll);
    else
      ptx::cp_async_bulk_tensor_2d_load(ring.a(), &maps.a[0], k, m, full);
    if constexpr (kShareB)
      ptx::cp_async_bulk_tensor_2d_multicast(ring.b() + part_b, &maps.b[1], k, n, full, kAll);
    else
      ptx::cp_async_bulk_tensor_2d_load(ring.b(), &maps.b[0], k, n, full);
    ring.advance();
  }
}

// By one thread.
template <class T>
__device__ __forceinline__ void copy_stages(const TensorMaps& maps, const Int8KernelArgs& args,
                                            uint8_t* memory, uint32_t shared, uint32_t rank) {
  RingPosition<T> ring(shared);
  for (auto tiles = deal<T>(args, memory); tiles.more(); ++tiles.round) {
    const Place place = tiles.place();
    const int m = place.row * T::kTileM, n = place.n * T::kTileN;
    if (Deal<T::kCluster>::kOrdered && place.along_n)
      copy_tile<T, true>(maps, ring, args.k_blocks, m, n, rank);
    else
      copy_tile<T, false>(maps, ring, args.k_blocks, m, n, rank);
  }
}

// By all lanes, which read 32 entries of the mask at once; lane 0 copies.
template <class T>
__device__ __forceinline__ void copy_residuals(const TensorMaps& maps, const Int8KernelArgs& args,
                                               uint8_t* memory, uint32_t shared, int lane) {
  const Int8Mask& mask = args.p.mask;
  const uint32_t full = shared + T::kOffsetResidualFull, empty = shared + T::kOffsetResidualEmpty;
  uint32_t parity = 1;
  for (auto tiles = deal<T>(args, memory); tiles.more(); ++tiles.round) {
    const int i = tiles.place().row;
    for (int from = 0; from < args.k_blocks; from += 32) {
      const int k = from + lane;
      uint32_t fallen =
          __ballot_sync(~0u, i < args.blocks_m && k < args.k_blocks && mask.at(i, k) != 0);
      for (; fallen; fallen &= fallen - 1, parity ^= 1) {
        if (lane != 0) continue;
        const int block = from + __ffs(fallen) - 1;
        const int column = mask.slots ? 0 : block;
        const int row = mask.slots ? args.p.tile_of(mask.at(i, block)) : i;
        ptx::mbarrier_wait(empty, parity);
        ptx::mbarrier_arrive_expect_tx(full, T::kBytesA);
        ptx::cp_async_bulk_tensor_2d_load(shared + T::kOffsetResidual, &maps.residual,
                                          column * T::kTileK, row * kInt8Block, full);
      }
    }
  }
}

// A warp reads the facts of kBatch stages at once, a lane those of one part of one stage.
constexpr int kBatch = 16;

struct LaneFacts {
  float main, second;
  uint32_t fallen;
};

// Of block k of the tile whose first blocks are i of A and j of B. Blocks beyond the edge have no
// scale; what they would multiply is not stored.
template <class T>
__device__ __forceinline__ LaneFacts read_facts(const Int8KernelArgs& args, int i, int j, int k,
                                                int part) {
  const Int8GemmParams& p = args.p;
  const auto scale = [&](const Int8Codes& codes, int block) {
    return __ldg(codes.scale + block * codes.stride_row + k * codes.stride_k);
  };
  LaneFacts f = {};
  if (i >= args.blocks_m || k >= args.k_blocks) return f;
  f.fallen = p.mask.given() && p.mask.at(i, k) != 0;
  if (j + part >= args.blocks_n) return f;
  const float b = scale(p.b, j + part);
  f.main = scale(p.a, i) * b;
  if (f.fallen) f.second = scale(p.residual, i) * b;
  return f;
}

// By all lanes.
template <class T>
__device__ __forceinline__ void leave_facts(const Int8KernelArgs& args, uint8_t* memory,
                                            uint32_t shared, int lane) {
  RingPosition<T> ring(shared);
  const int part = lane % T::kParts, ahead = lane / T::kParts % kBatch;
  for (auto tiles = deal<T>(args, memory); tiles.more(); ++tiles.round) {
    const Place place = tiles.place();
    LaneFacts read;
    for (int block = 0; block < args.k_blocks; ++block) {
      const int in_batch = block % kBatch;
      // Before the wait: most of the time the ring is full.
      if (in_batch == 0)
        read = read_facts<T>(args, place.row, place.n * T::kParts, block + ahead, part);
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      if (ahead == in_batch) {
        StageFacts& facts = *facts_of<T>(memory, ring.stage);
        facts.main.scale[part] = read.main;
        facts.second.scale[part] = read.second;
        facts.main.fallen = read.fallen ? kFallen : 0;
        facts.main.row = place.row;
        facts.main.n = place.n;
      }
      ptx::mbarrier_arrive_warp(ring.full());
      ring.advance();
    }
  }
}

// By the producing warpgroup.
template <class T>
__device__ __forceinline__ void produce(const TensorMaps& maps, const Int8KernelArgs& args,
                                        uint8_t* memory, uint32_t shared, uint32_t rank) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp == 0 && lane == 0) copy_stages<T>(maps, args, memory, shared, rank);
  if (warp == 1) leave_facts<T>(args, memory, shared, lane);
  if (warp == 2 && args.p.mask.given()) copy_residuals<T>(maps, args, memory, shared, lane);
  __syncwarp();
}

}  // namespace mxtrain::cuda::sm90
