// SPDX-License-Identifier: Apache-2.0
// What the producers and the consumers of int8_gemm on Hopper share: its traits and shared memory,
// and the facts that lie beside a stage of the ring.
#pragma once

#include "cuda/sm90/gemm_ring.cuh"
#include "cuda/sm90/int8_order.cuh"
#include "formats/int8.h"

namespace mxtrain::cuda::sm90 {

// ---- facts ----

// A pass: the products of a block, or of its residual.
struct alignas(16) PassFacts {
  float scale[2];   // products of scales, of each part
  uint32_t fallen;  // kFallen: A's block fell back, so its residual is next; or kOnResidual
  uint16_t row, n;  // main: the tile, in rows of blocks and in tiles
};
constexpr uint32_t kFallen = 1, kOnResidual = 2;

// What lies beside a stage. second: of the residual's pass.
struct StageFacts {
  PassFacts main, second;
};
static_assert(sizeof(PassFacts) == 16, "one load");

// ---- traits ----

// As GemmTraits, and the residual's tile, the facts of each stage, the tile's barriers. A chunk is
// a stage. Of a consumer's registers the integer sums of two times 64 columns take 64, and rows of
// A 16.
template <int kParts, int kCluster>
using Int8RingTraits = GemmTraits<kParts, kCluster, 128, kParts == 2 ? 4 : 6, 40, 1>;

template <int kParts, int kCluster>
struct Int8Traits : Int8RingTraits<kParts, kCluster> {
  using Base = Int8RingTraits<kParts, kCluster>;
  static_assert(Base::kTileM == kInt8Block && Base::kTileK == kInt8Block,
                "one scale of A, and one entry of the mask, a stage");

  static constexpr int kOffsetResidual = (Base::kSharedBytes + 1023) / 1024 * 1024;
  static constexpr int kOffsetFacts = kOffsetResidual + Base::kBytesA;
  static constexpr int kFactBytes = sizeof(StageFacts);
  static constexpr int kOffsetResidualFull = kOffsetFacts + Base::kStages * kFactBytes;
  static constexpr int kOffsetResidualEmpty = kOffsetResidualFull + 8;
  static constexpr int kOffsetOrder = kOffsetResidualEmpty + 8;
  static constexpr int kSharedBytes =
      kOffsetOrder + (Deal<kCluster>::kOrdered ? int{sizeof(RowOrder)} : 0);
  static_assert(kSharedBytes <= 227 * 1024, "the shared memory of a block");
};

// ---- arguments ----

struct Int8KernelArgs {
  Int8GemmParams p;  // transposed: of D^T, but bias and out are D's
  TileOrder order;
  int k_blocks, blocks_m, blocks_n;
  bool boxes;  // D's rows are whole 16-byte units: the copy engine stores them
};

template <class T>
__device__ __forceinline__ StageFacts* facts_of(uint8_t* memory, int stage) {
  return reinterpret_cast<StageFacts*>(memory + T::kOffsetFacts + stage * T::kFactBytes);
}

template <class T>
__device__ __forceinline__ Deal<T::kCluster> deal(const Int8KernelArgs& args, uint8_t* memory) {
  return {*reinterpret_cast<RowOrder*>(memory + T::kOffsetOrder), args.order};
}

}  // namespace mxtrain::cuda::sm90
