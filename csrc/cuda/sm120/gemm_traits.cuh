// SPDX-License-Identifier: Apache-2.0
// The compile-time facts of the block-scaled GEMM: its tile, its shared memory, which byte of a
// stage every lane copies and reads, and which scales it holds for whom. The index maps are
// constexpr, and checked here.
#pragma once

#include <cstdint>

#include "cuda/mma_tile.cuh"
#include "ptx/block_scale.h"

namespace mxtrain::cuda::sm120 {

// ---- traits ----

// kWide: a tile of 256 columns, or one of 128. kSeparate_: add each product in float32.
template <class F, bool kWide, bool kSeparate_>
struct GemmTraits {
  using Format = F;
  using Shape = ptx::BlockScaleShape<F>;
  static constexpr bool kSeparate = kSeparate_;
  static_assert(!kSeparate || !kWide, "a product that waits to be added needs registers");

  // Warps: 8, of 64 columns each and as many rows as it takes.
  static constexpr int kTileM = 128, kTileN = kWide ? 256 : 128;
  static constexpr int kWarpsN = kTileN / 64, kWarpsM = 8 / kWarpsN, kThreads = 256;
  static constexpr int kWarpM = kTileM / kWarpsM, kWarpN = 64;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;

  // A stage: of every row so many bytes of codes, whole words of scales, and steps of one
  // instruction's K.
  static constexpr int kRowBytes = F::kBits == 4 ? 64 : 128, kUnits = kRowBytes / kUnit;
  static constexpr int kTileK = kRowBytes * 8 / F::kBits, kSteps = kTileK / Shape::kK;
  static constexpr int kScaleBytes = kTileK / F::kBlock, kScaleWords = kScaleBytes / 4;
  static constexpr int kStepsPerWord = kSteps / kScaleWords;
  static_assert(Shape::kK * F::kBits / 8 == 2 * kUnit, "an instruction takes two units of a row");
  static_assert(kScaleBytes % 4 == 0 && kSteps % kScaleWords == 0 &&
                    kStepsPerWord * Shape::kScales == 4,
                "every byte of a word of scales is some step's");
  static_assert(kScaleWords == 1 || kScaleWords == 2, "one load of 4 or 8 bytes");

  // Registers of a thread: D, the fragments of a step, the scales of a stage.
  static constexpr int kRegisters = 4 * kFragmentsM * kFragmentsN + 4 * kFragmentsM +
                                    2 * kFragmentsN + (kWarpM + kWarpN) / 32 * kScaleWords;
  static_assert(kRegisters + 48 <= 255, "no spills");
  static_assert(kWarpM % 32 == 0, "thread_a picks one of two fragments");

  // Shared memory: a ring of stages, each the codes of A's rows and of B's, then A's scales and
  // B's.
  static constexpr int kBytesA = kTileM * kRowBytes, kBytesB = kTileN * kRowBytes;
  static constexpr int kOffsetScales = kBytesA + kBytesB;
  static constexpr int kBytesStage = kOffsetScales + (kTileM + kTileN) * kScaleBytes;
  static constexpr int kAvailable = 99 * 1024;  // of a block on 12.0 and 12.1
  static constexpr int kMost = kAvailable / kBytesStage, kStages = kMost < 5 ? kMost : 5;
  static constexpr int kSharedBytes = kStages * kBytesStage;
  static_assert(kStages >= 2, "one is read while another is written");
  static_assert(kBytesStage % 128 == 0, "the swizzle counts from a stage's start");

  // Copies: kUnits threads a row, so many rows at once; and of scales a word a thread.
  static constexpr int kCopyRows = kThreads / kUnits;
  static constexpr int kScaleCopies = (kTileM + kTileN) * kScaleWords;
  static_assert(kTileM % kCopyRows == 0 && kTileN % kCopyRows == 0 && kCopyRows % 8 == 0,
                "every copy of a thread has the same place in the swizzle");
};

// ---- index maps ----

// Where a stage has unit `unit` of row `row` of a factor, rows of kUnits units: units are permuted
// so that one column of them, in 8 consecutive rows, lies in all 32 banks.
template <int kUnits>
constexpr uint32_t swizzled(int row, int unit) {
  return row * kUnits * kUnit + (unit ^ row * kUnits / 8 % kUnits) * kUnit;
}

// A step along K is two units: an exclusive or, in any row and from either unit of the first step.
template <int kUnits>
constexpr bool steps_are_xor() {
  for (int row = 0; row < 16; ++row)
    for (int unit = 0; unit < 2; ++unit)
      for (int step = 0; step < kUnits / 2; ++step)
        if (swizzled<kUnits>(row, 2 * step + unit) != (swizzled<kUnits>(row, unit) ^ (32 * step)))
          return false;
  return true;
}
static_assert(steps_are_xor<4>() && steps_are_xor<8>(), "steps along K");

// The 8 rows of every matrix of an ldmatrix lie in different banks.
template <int kUnits, class Address>
constexpr bool no_bank_conflicts() {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint32_t seen = 0;
    for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane)
      seen |= 1u << (swizzled<kUnits>(Address::row(lane), Address::unit(lane)) % 128 / kUnit);
    if (seen != 0xFFu) return false;
  }
  return true;
}
static_assert(no_bank_conflicts<4, AddressA>() && no_bank_conflicts<4, AddressB>() &&
                  no_bank_conflicts<8, AddressA>() && no_bank_conflicts<8, AddressB>(),
              "ldmatrix at speed");

// 8 rows fill their bytes: no two units share a place.
template <int kUnits>
constexpr bool units_fill_rows() {
  uint64_t seen = 0;
  for (int i = 0; i < 8 * kUnits; ++i)
    seen |= 1ull << (swizzled<kUnits>(i / kUnits, i % kUnits) / kUnit);
  return seen == ~0ull >> (64 - 8 * kUnits);
}
static_assert(units_fill_rows<4>() && units_fill_rows<8>(), "a permutation");

// Every lane holds the scales of one row in 32: of A those that fragments i and i + 1 find with
// thread_a = i % 2, of B those that fragments j to j + 3 find with thread_b = j % 4.
constexpr int scale_row_a(int lane) { return lane % 4 / 2 * 16 + lane % 2 * 8 + lane / 4; }
constexpr int scale_row_b(int lane) { return lane % 4 * 8 + lane / 4; }

constexpr bool scales_match() {
  for (int i = 0; i < 2; ++i)
    for (int row = 0; row < 16; ++row)
      if (scale_row_a(ptx::lane_of_scale_a(row, i)) != 16 * i + row) return false;
  for (int j = 0; j < 4; ++j)
    for (int row = 0; row < 8; ++row)
      if (scale_row_b(ptx::lane_of_scale_b(row, j)) != 8 * j + row) return false;
  return true;
}
static_assert(scales_match(), "whose scales an instruction reads");

}  // namespace mxtrain::cuda::sm120
