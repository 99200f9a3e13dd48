// SPDX-License-Identifier: Apache-2.0
// How a product with too few tiles for the multiprocessors is shared out: the K of every tile is
// cut into slabs, tile after tile they form one line, and every worker (a cluster of thread blocks)
// takes the next `share` of them. A worker that has all slabs of a tile finishes it; otherwise it
// leaves its sum in memory, and the last one to do so adds those of all, in the order of K. Nobody
// waits for anybody, and the order of every sum depends on the shapes and the number of
// multiprocessors alone. No CUDA here: tests ask the host for it.
#pragma once

#include <cstdint>

#include "formats/host_device.h"

namespace mxtrain::cuda {

// What a worker computes in one go: stages [begin, end) of K of a tile, `count` slabs.
struct Segment {
  int tile, begin, end, count;
};

struct SplitK {
  int slabs = 1;   // of a tile; 1: tiles stay whole, and the rest is not used
  int blocks = 0;  // stages of K in a slab; the last of a tile may have fewer
  int share = 0;   // slabs of a worker
  int parts = 0;   // of 128 columns, in a tile

  MXT_HD int line(int tiles) const { return tiles * slabs; }
  MXT_HD int workers(int tiles) const { return (line(tiles) + share - 1) / share; }

  // From a slab of the line up to the end of its tile or to `stop`.
  MXT_HD Segment segment(int slab, int stop, int k_blocks) const {
    const int tile = slab / slabs, first = slab - tile * slabs;
    const int count = slabs - first < stop - slab ? slabs - first : stop - slab;
    const int end = (first + count) * blocks;
    return {tile, first * blocks, end < k_blocks ? end : k_blocks, count};
  }

  // Who shares a tile, and where one of them leaves its sum: a worker has at most two parts of
  // tiles, at the start and at the end of its slabs.
  MXT_HD int first_worker(int tile) const { return tile * slabs / share; }
  MXT_HD int last_worker(int tile) const { return (tile * slabs + slabs - 1) / share; }
  MXT_HD int slots() const { return share > 1 ? 2 : 1; }
  MXT_HD int slot(int worker, int tile) const {
    return worker * slots() + (worker * share < tile * slabs ? 1 : 0);
  }
};

namespace split_k {

constexpr int kStage = 128;  // of K

// Clocks of a multiprocessor, on an H200: a stage of a tile of 128 x 256 or of 128 x 128; leaving
// one's sum; adding another's.
constexpr double kStageClocks[3] = {0, 602, 1024};
constexpr double kLeave[3] = {0, 1300, 2600}, kAdd[3] = {0, 1300, 2600};
constexpr double kGain = 0.9;  // of the time of whole tiles, at most
constexpr int kMostSlabs = 16;

MXT_HD int64_t tiles_of(int64_t m, int64_t n, int parts) {
  const int64_t rows = parts == 2 ? 256 : 128, cols = 128 * parts;
  return ((m + rows - 1) / rows) * ((n + cols - 1) / cols);
}

// The same for tiles that stay whole: a worker of parts = 2 is two blocks, which share 256 columns.
inline double whole_clocks(int64_t m, int64_t n, int k_blocks, int parts, int multiprocessors) {
  const int64_t workers = multiprocessors / parts, tiles = tiles_of(m, n, parts);
  return static_cast<double>((tiles + workers - 1) / workers * k_blocks) * kStageClocks[parts];
}

}  // namespace split_k

// The cheapest way for m x n x k, which may be not to split.
inline SplitK plan_split(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  using namespace split_k;
  const int k_blocks = static_cast<int>((k + kStage - 1) / kStage);
  SplitK best;
  if (multiprocessors < 2) return best;
  double least = kGain * whole_clocks(m, n, k_blocks, 1, multiprocessors);
  const double large = kGain * whole_clocks(m, n, k_blocks, 2, multiprocessors);
  if (large < least) least = large;
  for (int parts = 2; parts >= 1; --parts) {
    const int64_t workers = multiprocessors / parts, tiles = tiles_of(m, n, parts);
    if (tiles > 16 * workers) continue;  // what is left to gain is small, and offsets are ints
    for (int slabs = 2; slabs <= kMostSlabs; ++slabs) {
      const int blocks = (k_blocks + slabs - 1) / slabs;
      if ((slabs - 1) * blocks >= k_blocks) continue;  // the last would be empty
      const int share = static_cast<int>((tiles * slabs + workers - 1) / workers);
      const int sharers = (slabs - 2) / share + 2;  // of a tile, at most
      const double clocks = share * blocks * kStageClocks[parts] +
                            (share > 1 ? 2 : 1) * kLeave[parts] + (sharers - 1) * kAdd[parts];
      if (clocks >= least) continue;
      least = clocks;
      best = {slabs, blocks, share, parts};
    }
  }
  return best;
}

}  // namespace mxtrain::cuda
