// SPDX-License-Identifier: Apache-2.0
// The order of int8_gemm's tiles where a few rows of blocks of A fell back much more than the
// others: their tiles take up to twice as long, and both blocks of a cluster wait for the slower.
// Such heavy rows come first, two of them in a cluster. A heavy row without a partner is worked
// along N: the two blocks of the cluster then take neighbouring tiles of one row, and copy B each
// for itself. The last round is dealt in reverse, so that clusters which began with a heavy tile
// have one tile less where the tiles do not come out even.
#pragma once

#include "cuda/int8.h"
#include "cuda/tile_order.cuh"

namespace mxtrain::cuda::sm90 {

constexpr int kOrderedRows = 440;  // rows of blocks, at most; with more, no row counts as heavy

// In shared memory.
struct RowOrder {
  uint16_t fallen[kOrderedRows];  // blocks of a row
  uint16_t row[kOrderedRows];     // heavy ones first; else as they were
  int heavy;                      // how many are
};

// All of the block's threads, between its barriers. rows: even.
template <int kThreads>
__device__ __forceinline__ void order_rows(const Int8GemmParams& p, int rows, int blocks_m,
                                           int k_blocks, RowOrder& order) {
  const int thread = threadIdx.x;
  if (!p.mask || p.residual_of_b || rows > kOrderedRows) {
    if (thread == 0) order.heavy = 0;
    __syncthreads();
    return;
  }
  for (int i = thread / 32; i < rows; i += kThreads / 32) {
    int count = 0;
    for (int k = thread % 32; i < blocks_m && k < k_blocks; k += 32)
      count += __ldg(p.mask + i * p.mask_stride_row + k * p.mask_stride_k) != 0;
    count = __reduce_add_sync(~0u, count);
    if (thread % 32 == 0) order.fallen[i] = count;
  }
  __syncthreads();
  // Heavy: half a tile more than the lightest row.
  int least = k_blocks, heavy = 0;
  for (int i = 0; i < blocks_m; ++i) least = min(least, static_cast<int>(order.fallen[i]));
  const int limit = least + k_blocks / 2;
  for (int i = 0; i < rows; ++i) heavy += order.fallen[i] > limit;
  for (int i = thread; i < rows; i += kThreads) {
    int before = 0;  // rows of i's kind
    const bool mine = order.fallen[i] > limit;
    for (int other = 0; other < i; ++other) before += (order.fallen[other] > limit) == mine;
    order.row[mine ? before : heavy + before] = i;
  }
  if (thread == 0) order.heavy = heavy;
  __syncthreads();
}

// A tile of this block: its row of blocks of A, its tile's column, and whether the cluster's blocks
// have one row.
struct Place {
  int row, n;
  bool along_n;
};

// The tiles of this block, one after the other. Only clusters of two have an order of rows.
template <int kCluster>
struct Deal {
  static constexpr bool kOrdered = kCluster == 2;

  const RowOrder& order;
  TileOrder tiles;  // of clusters
  int round = 0;

  __device__ __forceinline__ int heavy() const { return kOrdered ? order.heavy : 0; }
  // The next one's, or beyond them all.
  __device__ __forceinline__ int index() const {
    const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster,
              from = round * clusters;
    const bool last = heavy() && from + clusters >= tiles.count();
    return from + (last ? clusters - 1 - cluster : cluster);
  }
  __device__ __forceinline__ bool more() const { return index() < tiles.count(); }
  __device__ __forceinline__ Place place() const {
    const int rank = blockIdx.x % kCluster;
    int at = index(), m, n;
    if (heavy() == 0) {
      tiles.at(at, m, n);
      return {kCluster * m + rank, n, false};
    }
    const bool alone = heavy() % 2 && tiles.tiles_n % 2 == 0;
    const int pairs = alone ? heavy() / 2 : (heavy() + 1) / 2;  // of heavy rows
    if (at < pairs * tiles.tiles_n)
      return {order.row[2 * (at / tiles.tiles_n) + rank], at % tiles.tiles_n, false};
    at -= pairs * tiles.tiles_n;
    const int half = alone ? tiles.tiles_n / 2 : 0, before = pairs + alone;
    if (at < half) return {order.row[2 * pairs], 2 * at + rank, true};
    at -= half;
    const TileOrder others = {tiles.tiles_m - before, tiles.tiles_n};
    if (at < others.count()) {
      others.at(at, m, n);
      return {order.row[2 * (before + m) + rank], n, false};
    }
    return {order.row[2 * pairs + 1], 2 * (at - others.count()) + rank, true};
  }
};

}  // namespace mxtrain::cuda::sm90
