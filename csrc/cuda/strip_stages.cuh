// SPDX-License-Identifier: Apache-2.0
// How quantize_strips.cu writes scales: 16 tiles, a square of 4 x 4, leave theirs in a stage in
// shared memory, and one warp writes a stage's when all are there, 8 bytes of an operand row at a
// time. A tile by itself has 2 bytes of each of its rows, and a request to the L2 is for one line,
// whatever is asked of it: these were two fifths of all requests.
//
// A CTA takes `rounds` whole squares, one tile after the other, and then single tiles, which write
// their own scales. Its warps are at 24 tiles in a row or so, in two squares or three; a square is
// written by the warp that begins the third one after it, when nearly always all of its tiles are
// done, and its stage serves the fourth. Squares are written one after the other, since a wait for
// a phase cannot tell its end from that of the phase two before: while a square is not written, no
// tile of the fourth to the seventh after it can be worked, which is more tiles than warps hold, so
// no warp comes to one whose wait could be mistaken.
#pragma once

#include "cuda/strip.cuh"
#include "ptx/mbarrier.cuh"

namespace mxtrain::cuda {

struct StageTraits {
  static constexpr uint32_t kStages = 4, kLag = kStages - 1;
  static constexpr uint32_t kBytes = 2 * StripSquare::kBytes;  // of both operands' scales
  static constexpr int kRequired = kStages * kBytes;
  static_assert(2 * StripTraits::kMostWarps <= kLag * StripSquare::kTiles,
                "a warp holds two tiles, one of them taken only: see above");
};

// Architectures whose multiprocessors have room for the stages beside the tiles of as many warps as
// their registers allow.
constexpr bool has_stages(int arch) { return arch == 90 || arch == 100 || arch == 103; }

// In shared memory; at: the stages.
struct Stages {
  uint32_t at, full, empty;

  struct Barriers {
    uint64_t full[StageTraits::kStages], empty[StageTraits::kStages];
  };

  // barriers: where they lie.
  __device__ __forceinline__ Stages(uint32_t at, uint32_t barriers)
      : at(at), full(barriers), empty(barriers + sizeof(Barriers::full)) {}

  // One thread's; a __syncthreads() follows.
  __device__ __forceinline__ void init() const {
    for (uint32_t i = 0; i < StageTraits::kStages; ++i) {
      ptx::mbarrier_init(full + 8 * i, StripSquare::kTiles * ptx::kWarpArrivals);
      ptx::mbarrier_init(empty + 8 * i, ptx::kWarpArrivals);
    }
  }
  // Of a square, the CTA's `square`-th.
  __device__ static __forceinline__ uint32_t index(uint32_t square) {
    return square % StageTraits::kStages;
  }
  __device__ static __forceinline__ uint32_t parity(uint32_t square) {
    return square / StageTraits::kStages % 2;
  }
  __device__ __forceinline__ uint32_t stage(uint32_t square) const {
    return at + index(square) * StageTraits::kBytes;
  }
  // Where the scales of the CTA's n-th tile go, of the row operand and of the column operand.
  __device__ __forceinline__ uint32_t row_stage(uint32_t n) const {
    const uint32_t i = n % StripSquare::kTiles;
    return stage(n / StripSquare::kTiles) +
           StripSquare::scale(i / StripSquare::kSide * StripTraits::kTile,
                              i % StripSquare::kSide * StripTraits::kTile);
  }
  __device__ __forceinline__ uint32_t col_stage(uint32_t n) const {
    const uint32_t i = n % StripSquare::kTiles;
    return stage(n / StripSquare::kTiles) + StripSquare::kBytes +
           StripSquare::scale(i % StripSquare::kSide * StripTraits::kTile,
                              i / StripSquare::kSide * StripTraits::kTile);
  }
  // A warp, before a tile of the square leaves scales, and after its tile.
  __device__ __forceinline__ void acquire(uint32_t square) const {
    ptx::mbarrier_wait(empty + 8 * index(square), parity(square) ^ 1);
  }
  __device__ __forceinline__ void commit(uint32_t square) const {
    ptx::mbarrier_arrive_warp(full + 8 * index(square));
  }

  // A warp, before it writes the scales of a square that others may still be ahead of.
  __device__ __forceinline__ void await_turn(uint32_t square) const {
    if (square != 0) ptx::mbarrier_wait(empty + 8 * index(square - 1), parity(square - 1));
  }
  // A warp writes the scales of a square, once all are there; (row, column): of x, at its corner.
  template <bool kHasRow>
  __device__ __forceinline__ void flush(uint32_t square, const QuantizeParams& row_operand,
                                        const QuantizeParams& col_operand, uint32_t row,
                                        uint32_t column) const {
    ptx::mbarrier_wait(full + 8 * index(square), parity(square));
    if (kHasRow) write(stage(square), row_operand, row, column);
    write(stage(square) + StripSquare::kBytes, col_operand, column, row);
    ptx::mbarrier_arrive_warp(empty + 8 * index(square));
  }

 private:
  // k: the first of the square, along K of the operand.
  __device__ static __forceinline__ void write(uint32_t from, const QuantizeParams& p, uint32_t row,
                                               uint32_t k) {
    const uint32_t lane = ptx::lane_id(), pitch = static_cast<uint32_t>(p.kp) / 32;
    uint8_t* to = p.scale + (static_cast<uint64_t>(row + lane) * pitch + k / 32);
#pragma unroll
    for (uint32_t i = 0; i < StripSquare::kRows; i += 32)
      *reinterpret_cast<uint2*>(to + static_cast<uint64_t>(pitch) * i) =
          ptx::ld_shared_v2(from + (i + lane) * StripSquare::kRowScales);
  }
};

}  // namespace mxtrain::cuda
