// SPDX-License-Identifier: Apache-2.0
// How the kernels of strips cut bfloat16 x into tiles, and how a warp's tile comes to its shared
// memory, with zeros outside of x: by the copy engine, two boxes that one lane asks for, where
// strip_engine says so, else by 16 cp.async of each lane. x is aligned to 16 bytes in both
// directions. One copy is under way at a time.
#pragma once

#include "cuda/divide.cuh"
#include "cuda/strip_tile.cuh"
#include "cuda/tensor_map.h"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"

namespace mxtrain::cuda {

// x as the tiles see it: height x width bfloat16, rows `pitch` bytes apart; across: tiles in a row
// of tiles.
struct StripGrid {
  const uint8_t* x;
  uint32_t height, width, pitch, tiles;
  Divisor across;
};

// First row and column of a tile. kFlat: one column of tiles, without gaps between the rows.
template <bool kFlat>
struct StripPlace {
  uint32_t row, column;
  __device__ __forceinline__ StripPlace(const StripGrid& g, uint32_t tile) {
    const uint32_t down = kFlat ? tile : uniform(g.across.divide(tile));
    row = down * StripTraits::kTile;
    column = kFlat ? 0 : (tile - down * g.across.value) * StripTraits::kTile;
  }
};

struct StripBoxes {
  static constexpr int kRows = StripTraits::kTile / 2, kBytes = kRows * StripTraits::kRowBytes;
  static_assert(kRows == 32, "strip_offset moves on after so many rows");
};

// The engine's map of x; empty, and unused, where there is no engine.
inline cudaError_t make_strip_map(TensorMap* map, const StripGrid& g, int arch) {
  if (!strip_engine(arch)) return cudaSuccess;
  const int64_t row_bytes = g.width * int64_t{2};
  return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, g.x, g.height, g.width,
                         g.height == 1 ? (row_bytes + 15) / 16 * 16 : g.pitch, StripBoxes::kRows);
}

// A warp's: where its tile lies. The barrier that counts the engine's bytes is between its halves.
template <bool kFlat, bool kEngine>
struct StripCopy {
  const StripGrid& grid;
  const TensorMap& map;
  uint32_t to;

  __device__ __forceinline__ uint32_t barrier() const { return to + StripBoxes::kBytes; }

  // By one lane, before a barrier of the CTA.
  __device__ __forceinline__ void init() const {
    if (!kEngine) return;
    ptx::mbarrier_init(barrier(), 1);
    ptx::fence_mbarrier_init();
  }

  // Start filling the tile. All lanes have left what was there.
  __device__ __forceinline__ void start(uint32_t tile) const {
    const StripPlace<kFlat> at(grid, tile);
    if (!kEngine) return copy_chunks(at);
    if (ptx::lane_id() != 0) return;
    const int row = static_cast<int>(at.row), column = static_cast<int>(at.column);
    ptx::mbarrier_arrive_expect_tx(barrier(), 2 * StripBoxes::kBytes);
    ptx::cp_async_bulk_tensor_2d_load(to, &map, column, row, barrier());
    ptx::cp_async_bulk_tensor_2d_load(to + StripBoxes::kBytes + CodeLayout::kSkew, &map, column,
                                      row + StripBoxes::kRows, barrier());
  }

  // For the n-th tile of the warp, parity = n % 2.
  __device__ __forceinline__ void wait(uint32_t parity) const {
    if (!kEngine) ptx::cp_async_wait_all();
    __syncwarp();
    if (kEngine) ptx::mbarrier_wait(barrier(), parity);
  }

 private:
  // A lane keeps its chunk and moves on by 4 rows.
  __device__ __forceinline__ void copy_chunks(const StripPlace<kFlat>& at) const {
    constexpr int kStep = 32 / StripTraits::kChunks;
    const uint32_t pitch = kFlat ? StripTraits::kRowBytes : grid.pitch;
    const int lane = ptx::lane_id(), chunk = lane % StripTraits::kChunks,
              first = lane / StripTraits::kChunks;
    const uint32_t column = at.column + chunk * 8;
    const uint8_t* from = grid.x + static_cast<uint64_t>(at.row + first) * pitch + column * 2;
    const uint32_t even = to + strip_offset(first, chunk),
                   odd = to + strip_offset(first + kStep, chunk);
    if (at.row + StripTraits::kTile <= grid.height &&
        (kFlat || at.column + StripTraits::kTile <= grid.width)) {
#pragma unroll
      for (int i = 0; i < StripTraits::kTile / kStep; ++i)
        ptx::cp_async_16(((i % 2 ? odd : even) ^ (i * kStep / 32 * 64)) +
                             i / 2 * (2 * kStep * StripTraits::kRowBytes) +
                             i * kStep / 32 * CodeLayout::kSkew,
                         from + static_cast<uint64_t>(pitch) * (i * kStep), 16);
      return;
    }
    const int bytes = column >= grid.width ? 0 : min(grid.width - column, 8u) * 2;
#pragma unroll 1
    for (int i = first; i < StripTraits::kTile; i += kStep, from += pitch * kStep) {
      const bool inside = at.row + i < grid.height && bytes > 0;
      ptx::cp_async_16(to + strip_offset(i, chunk), inside ? from : grid.x, inside ? bytes : 0);
    }
  }
};

}  // namespace mxtrain::cuda
