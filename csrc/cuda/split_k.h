// SPDX-License-Identifier: Apache-2.0
// How a product with too few tiles for the multiprocessors is shared out: the K of every tile is
// cut into slabs, a thread block for each. A block leaves its sum in memory, and the last one of a
// tile to do so adds those of all, in the order of K. Nobody waits for anybody, and the order of
// every sum depends on the shapes and the number of multiprocessors alone. No CUDA here: tests ask
// the host for it.
//
// A block takes one slab and no more. Where blocks took several, they no longer read the same part
// of A or B at one time: four of seven shapes were 8 to 35% slower than whole tiles, three 4 to 6%
// faster (docs/performance.md).
#pragma once

#include <cstdint>

#include "formats/host_device.h"

namespace mxtrain::cuda {

// What a block computes: stages [begin, end) of K of a tile.
struct Segment {
  int tile, begin, end;
};

struct SplitK {
  int slabs = 1;   // of a tile; 1: tiles stay whole
  int blocks = 0;  // stages of K in a slab; the last of a tile may have fewer

  // Slab after slab, tile after tile; `slab` of this line.
  MXT_HD Segment segment(int slab, int k_blocks) const {
    const int tile = slab / slabs, begin = (slab - tile * slabs) * blocks, end = begin + blocks;
    return {tile, begin, end < k_blocks ? end : k_blocks};
  }
};

namespace split_k {

constexpr int kStage = 128;  // of K

// Clocks of a multiprocessor: a stage of a whole tile of 128 x 128 or of 128 x 256; one of a slab,
// always of 128 x 128, since slabs share less of what they read; leaving a sum; adding another's.
constexpr double kStageClocks[3] = {0, 602, 1024};
constexpr double kSlabStage = 1000;  // 1100 on an H100; but then two slabs a tile would never pay
constexpr double kLeave = 1300, kAdd = 1300;
constexpr double kGain = 0.92;  // of the time of whole tiles, at most
constexpr int kMostSlabs = 16;

MXT_HD int stages_of(int64_t k) { return static_cast<int>((k + kStage - 1) / kStage); }
MXT_HD int64_t tiles_of(int64_t m, int64_t n, int parts) {
  const int64_t rows = parts == 2 ? 256 : 128, cols = 128 * parts;
  return ((m + rows - 1) / rows) * ((n + cols - 1) / cols);
}

// Of tiles that stay whole; two blocks with parts = 2 share 256 columns.
inline double whole_clocks(int64_t m, int64_t n, int k_blocks, int parts, int multiprocessors) {
  const int64_t workers = multiprocessors / parts, tiles = tiles_of(m, n, parts);
  return static_cast<double>((tiles + workers - 1) / workers * k_blocks) * kStageClocks[parts];
}

}  // namespace split_k

// The cheapest way for m x n x k, which may be not to split.
inline SplitK plan_split(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  using namespace split_k;
  const int k_blocks = stages_of(k);
  SplitK best;
  if (multiprocessors < 2) return best;
  double least = kGain * whole_clocks(m, n, k_blocks, 1, multiprocessors);
  const double large = kGain * whole_clocks(m, n, k_blocks, 2, multiprocessors);
  if (large < least) least = large;
  const int64_t tiles = tiles_of(m, n, 1);
  for (int slabs = 2; slabs <= kMostSlabs && tiles * slabs <= multiprocessors; ++slabs) {
    const int blocks = (k_blocks + slabs - 1) / slabs;
    if ((slabs - 1) * blocks >= k_blocks) continue;  // the last would be empty
    const double clocks = blocks * kSlabStage + kLeave + (slabs - 1) * kAdd;
    if (clocks >= least) continue;
    least = clocks;
    best = {slabs, blocks};
  }
  return best;
}

}  // namespace mxtrain::cuda
