// SPDX-License-Identifier: Apache-2.0
// x as strips take it: which tile of 64 x 64 is a CTA's n-th, where it lies in x, and how a warp
// copies it to shared memory (strip_tile.cuh).
#pragma once

#include "cuda/divide.cuh"
#include "cuda/strip_tile.cuh"

namespace mxtrain::cuda {

// x as the tiles see it: height x width bfloat16, rows `pitch` bytes apart; across: tiles in a row
// of tiles. rounds: of whole squares that every CTA takes (strip_stages.cuh); if there are any,
// tiles are in the order of squares, and `across` counts these.
//
// Multiprocessors are not equally fast: with equal shares some are done long before others
// (docs/performance.md). So with `tickets` only a CTA's first `own` tiles are its own, and the rest
// of all go to whoever comes first. CTA 0 sets the ticket to 0 when it starts, and nobody waits for
// that: who draws before, draws what memory held, and works at a tile that somebody else works at
// too, which gives the same bytes twice, or at none. But CTA 0 itself draws from 0 on until there
// are no more, so every tile is drawn after that, whatever was before.
struct StripGrid {
  const uint8_t* x;
  uint32_t height, width, pitch, tiles;
  Divisor across;
  uint32_t rounds;
  uint32_t own;
  uint32_t* tickets;  // null: all tiles are shared out
};

// A CTA's n-th tile; those of the grid come first.
template <bool kStaged>
__device__ __forceinline__ uint32_t tile_of(const StripGrid& g, uint32_t n) {
  constexpr uint32_t kTiles = StripSquare::kTiles;
  const bool staged = kStaged && n < g.rounds * kTiles;
  return staged ? (blockIdx.x + gridDim.x * (n / kTiles)) * kTiles + n % kTiles
                : blockIdx.x + gridDim.x * n;
}

// Of a CTA's equal share, how much goes by tickets: at least one tile of so many. Where scales
// leave by squares it is what evens out the multiprocessors and, but for the tiles of a square that
// is not whole, no more: these tiles write their scales by themselves.
struct TicketTraits {
  static constexpr uint32_t kOfStaged = 32, kOfOthers = 10;
  static constexpr int64_t kLeast = 4 * StripTraits::kMostWarps;  // the least share that has any
};

// Kernels that have tickets at all: those with a row operand in groups of 64 are slower for the
// code.
constexpr bool has_tickets(Strip row) { return !rotates64(row); }

// The tile of a warp that comes to be its CTA's n-th.
template <bool kStaged, bool kTickets>
__device__ __forceinline__ uint32_t draw_tile(const StripGrid& g, uint32_t n) {
  if (!kTickets || g.tickets == nullptr || n < g.own) return tile_of<kStaged>(g, n);
  return g.own * gridDim.x + atomicAdd(g.tickets, 1u);
}

// First row and column of a tile. kFlat: one column of tiles, without gaps between the rows.
struct StripPlace {
  uint32_t row, column;
};

template <bool kFlat, bool kStaged>
__device__ __forceinline__ StripPlace place_of(const StripGrid& g, uint32_t tile) {
  constexpr uint32_t kTile = StripTraits::kTile, kSide = StripSquare::kSide;
  if (kFlat) return {tile * kTile, 0};
  const bool squares = kStaged && g.rounds != 0;
  const uint32_t at = squares ? tile / StripSquare::kTiles : tile;
  const uint32_t down = uniform(g.across.divide(at)), along = at - down * g.across.value;
  if (!squares) return {down * kTile, along * kTile};
  return {(down * kSide + tile % StripSquare::kTiles / kSide) * kTile,
          (along * kSide + tile % kSide) * kTile};
}

// Start copying up to 8 elements, with zeros behind them. A part of a chunk goes by elements: the
// copy would read 16 bytes, some of which may lie behind x.
__device__ __forceinline__ void copy_chunk(uint32_t to, const uint8_t* from, uint32_t elements) {
  if (elements % 8 == 0) return ptx::cp_async_16(to, from, elements * 2);
  uint32_t w[4] = {};
#pragma unroll
  for (uint32_t i = 0; i < 7; ++i)
    if (i < elements) w[i / 2] |= reinterpret_cast<const uint16_t*>(from)[i] << (16 * (i % 2));
  ptx::st_shared_v4(to, w[0], w[1], w[2], w[3]);
}

// Start filling a tile, zeros outside of x. A lane keeps its chunk and moves on by 4 rows.
template <bool kFlat>
__device__ __forceinline__ void copy_tile(const StripGrid& g, StripPlace at, uint32_t to) {
  constexpr int kStep = 32 / StripTraits::kChunks;
  const uint32_t pitch = kFlat ? StripTraits::kRowBytes : g.pitch;
  const int lane = ptx::lane_id(), chunk = lane % StripTraits::kChunks,
            first = lane / StripTraits::kChunks;
  const uint32_t column = at.column + chunk * 8;
  const uint8_t* from = g.x + static_cast<uint64_t>(at.row + first) * pitch + column * 2;
  const uint32_t even = to + strip_offset(first, chunk),
                 odd = to + strip_offset(first + kStep, chunk);
  if (at.row + StripTraits::kTile <= g.height &&
      (kFlat || at.column + StripTraits::kTile <= g.width)) {
#pragma unroll
    for (int i = 0; i < StripTraits::kTile / kStep; ++i)
      ptx::cp_async_16(((i % 2 ? odd : even) ^ (i * kStep / 32 * 64)) +
                           i / 2 * (2 * kStep * StripTraits::kRowBytes),
                       from + static_cast<uint64_t>(pitch) * (i * kStep), 16);
    return;
  }
  const uint32_t elements = column >= g.width ? 0 : min(g.width - column, 8u);
#pragma unroll 1
  for (int i = first; i < StripTraits::kTile; i += kStep, from += uint64_t{pitch} * kStep) {
    const bool inside = at.row + i < g.height && elements > 0;
    copy_chunk(to + strip_offset(i, chunk), inside ? from : g.x, inside ? elements : 0);
  }
}

}  // namespace mxtrain::cuda
