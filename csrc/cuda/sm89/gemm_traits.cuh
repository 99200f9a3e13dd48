// SPDX-License-Identifier: Apache-2.0
// The compile-time facts of the mma.sync FP8 GEMM: its tile, its shared memory, and which byte of a
// stage every lane copies and reads. The index maps are constexpr, and checked here.
#pragma once

#include <cstdint>

#include "cuda/mma_tile.cuh"

namespace mxtrain::cuda::sm89 {

// ---- traits ----

// kParts_: groups of 64 columns of a warp. kChunk_: the K of a partial sum, 0 for all of it.
template <int kParts_, int kChunk_>
struct GemmTraits {
  static constexpr int kParts = kParts_, kChunk = kChunk_;
  static_assert(kChunk == 0 || kChunk == 32 || kChunk == 128,
                "one product, one stage, or all of K");

  // Warps: 4 down the tile, of 32 rows each, and 2 across it, of kWarpN columns each.
  static constexpr int kWarpsM = 4, kWarpsN = 2, kThreads = 32 * kWarpsM * kWarpsN;
  static constexpr int kWarpM = 32, kWarpN = 64 * kParts;
  static constexpr int kTileM = kWarpsM * kWarpM, kTileN = kWarpsN * kWarpN, kTileK = 128;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = 64 / 8;  // of a part

  // Registers of a thread: D, the partial sums of one part, the fragments of one instruction's K.
  static constexpr int kPart = 4 * kFragmentsM * kFragmentsN, kSums = kChunk == 0 ? 0 : kPart;
  static constexpr int kRegisters = kPart * kParts + kSums + 4 * kFragmentsM + 2 * kFragmentsN;

  // Steps of K = 32 unrolled together. Where every product is added on its own, one: its products
  // wait in as many registers as the sums of a part. On 9.0 one, too: what binary16 takes.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
  static constexpr int kStepsAtOnce = 1;
#else
  static constexpr int kStepsAtOnce = kChunk == 32 ? 1 : kTileK / 32;
#endif

  static_assert(kRegisters + 32 <= 255, "no spills");
  static_assert(256 * kThreads <= 65536, "the register file of a multiprocessor");

  // Shared memory: a ring of stages, each K = 128 of A's rows and then of B's.
  static constexpr int kStages = kParts == 2 ? 2 : 3;
  static constexpr int kBytesA = kTileM * kTileK, kBytesStage = kBytesA + kTileN * kTileK;
  static constexpr int kSharedBytes = kStages * kBytesStage;
  static_assert(kStages >= 2, "one is read while another is written");
  static_assert(kSharedBytes <= 99 * 1024, "the shared memory of a block on 8.9");

  // Copies: 8 threads a row of 128 bytes, so many rows at once.
  static constexpr int kCopyRows = kThreads / 8;
  static_assert(kTileM % kCopyRows == 0 && kTileN % kCopyRows == 0 && kCopyRows % 8 == 0,
                "every copy of a thread has the same place in the swizzle");
};

// ---- index maps ----

// Where the stage has unit `unit` of row `row` of a factor: units of 8 consecutive rows are
// permuted so that one column of units lies in all 32 banks.
constexpr uint32_t swizzled(int row, int unit) { return row * 128 + (unit ^ (row % 8)) * kUnit; }

// A step of 32 bytes along K is an exclusive or, in any row and from either unit of the first step.
constexpr bool steps_are_xor() {
  for (int row = 0; row < 16; ++row)
    for (int unit = 0; unit < 2; ++unit)
      for (int step = 0; step < 4; ++step)
        if (swizzled(row, 2 * step + unit) != (swizzled(row, unit) ^ (32 * step))) return false;
  return true;
}
static_assert(steps_are_xor(), "steps along K");

// The 8 rows of every matrix lie in different banks.
template <class Address>
constexpr bool no_bank_conflicts() {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t seen = 0;
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane)
      seen |= 1u << (swizzled(Address::row(lane), Address::unit(lane)) % 128 / kUnit);
    if (seen != 0xFFu) return false;
  }
  return true;
}
static_assert(no_bank_conflicts<AddressA>() && no_bank_conflicts<AddressB>(), "ldmatrix at speed");

// 8 rows fill their 1024 bytes: no two units share a place.
constexpr bool units_fill_rows() {
  uint64_t seen = 0;
  for (int i = 0; i < 64; ++i) seen |= 1ull << (swizzled(i / 8, i % 8) / kUnit);
  return seen == ~0ull;
}
static_assert(units_fill_rows(), "a permutation");

}  // namespace mxtrain::cuda::sm89
