// SPDX-License-Identifier: Apache-2.0
// The compile-time facts of the 8-bit GEMMs and their shared memory.
#pragma once

#include <cstdint>

namespace mxtrain::cuda::sm90 {

constexpr int kOutBoxBytes = 2048;  // of D: 16 rows by 128 bytes, or 16 columns

// kParts_: blocks of 128 columns in a tile. kCluster_: thread blocks that share one tile of B, each
// with a tile of A of its own (or one of A: int8_order.cuh). kChunk_: the K of a partial sum, 0 for
// all of it. kStages_: of the ring. kProducerRegisters_: of a thread of the producing warpgroup;
// the consumers have the others. kBoxes_: of output, for each consumer warp.
template <int kParts_, int kCluster_, int kChunk_, int kStages_ = kParts_ == 2 ? 4 : 6,
          int kProducerRegisters_ = 24, int kBoxes_ = 2>
struct GemmTraits {
  static constexpr int kParts = kParts_, kCluster = kCluster_, kChunk = kChunk_;
  static_assert(kChunk == 0 || kChunk == 32 || kChunk == 128,
                "one product, one stage, or all of K");

  static constexpr int kGroups =
      2;  // consumer warpgroups, 64 rows each; one more drives the copies
  static constexpr int kWarps = 4 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kTileM = 64 * kGroups, kTileN = 128 * kParts, kTileK = 128;
  static_assert(kTileK == 128, "a row of a stage is one 128-byte swizzle atom");
  static constexpr int kBoxB = kCluster > 1 ? kTileN / kCluster : 128;  // rows of B in one copy
  static_assert(kBoxB % 8 == 0 && kBoxB <= 256, "whole swizzle atoms; the copy engine's limit");

  // Registers: D takes 64 kParts of a consumer's, and every partial sum of one part 64 more, of
  // which chunks of 32 need two. Both parts' at once, 128 + 128, would not fit.
  static constexpr int kSums = kChunk == 32 ? 2 : 1;
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kProducerRegisters = kProducerRegisters_,
                       kConsumerRegisters =
                           ((kGroups + 1) * kLaunchRegisters - kProducerRegisters) / kGroups / 8 *
                           8;
  static_assert(kProducerRegisters % 8 == 0 && kProducerRegisters <= kLaunchRegisters,
                "what setmaxnreg gives back");
  static_assert(64 * kParts + 64 * kSums + 16 <= kConsumerRegisters, "no spills");

  static constexpr int kSumBytes = kTileM * kTileN * 4;  // of a tile

  // Shared memory: the stages of A, those of B, the 2 KB boxes of output, the barriers.
  static constexpr int kStages = kStages_;
  static constexpr int kBytesA = kTileM * kTileK, kBytesB = kTileN * kTileK;
  static constexpr int kOffsetB = kStages * kBytesA;
  static constexpr int kOffsetOut = kOffsetB + kStages * kBytesB;
  static constexpr int kBoxBytes = kOutBoxBytes, kBoxes = kBoxes_;
  static constexpr int kOffsetFull = kOffsetOut + kWarps * kBoxes * kBoxBytes;
  static constexpr int kOffsetEmpty = kOffsetFull + kStages * 8;
  static constexpr int kSharedBytes = kOffsetEmpty + kStages * 8;
  static_assert(kBytesA % 1024 == 0 && kBytesB % 1024 == 0 && kBoxBytes % 1024 == 0,
                "swizzle atoms are 1024 bytes");
  static_assert(kSharedBytes <= 227 * 1024, "the shared memory of a block");
};

}  // namespace mxtrain::cuda::sm90
