// SPDX-License-Identifier: Apache-2.0
// The order of int8_gemm's tiles. Both blocks of a cluster wait for the slower, and where blocks of
// A fell back, a tile takes up to twice as long. So with a mask of A they have one row of blocks of
// A, which falls back for both, and tiles beside each other along N; without, or where N has a
// small odd number of tiles, two rows and one tile of B, in no other order. A few rows may have
// fallen back much more than the others: such heavy rows come first, and the last round is dealt in
// reverse, so that clusters which began with a heavy tile have one tile less where the tiles do not
// come out even.
#pragma once

#include "cuda/int8.h"
#include "cuda/tile_order.cuh"

namespace mxtrain::cuda::sm90 {

constexpr int kOrderedRows = 440;  // rows of blocks, at most; with more, no row counts as heavy

// In shared memory.
struct RowOrder {
  uint16_t fallen[kOrderedRows];  // blocks of a row
  uint16_t row[kOrderedRows];     // heavy ones first; else as they were
  int rows;                       // of blocks; 0: clusters have two rows
  int pairs;                      // tiles of a cluster in a row
  int heavy;                      // rows
};

// All of the block's threads, between its barriers.
template <int kThreads>
__device__ __forceinline__ void order_rows(const Int8GemmParams& p, int tiles_n, int rows,
                                           int k_blocks, RowOrder& order) {
  const int thread = threadIdx.x;
  // An odd number of tiles leaves a block without one in each row.
  const bool along_n = p.mask.given() && (tiles_n % 2 == 0 || tiles_n > 8);
  if (thread == 0) {
    order.rows = along_n ? rows : 0;
    order.pairs = (tiles_n + 1) / 2;
  }
  if (!along_n || rows > kOrderedRows) {
    if (thread == 0) order.heavy = 0;
    __syncthreads();
    return;
  }
  for (int i = thread / 32; i < rows; i += kThreads / 32) {
    int count = 0;
    for (int k = thread % 32; k < k_blocks; k += 32) count += p.mask.at(i, k) != 0;
    count = __reduce_add_sync(~0u, count);
    if (thread % 32 == 0) order.fallen[i] = count;
  }
  __syncthreads();
  // Heavy: half a tile more than the lightest row.
  int least = k_blocks, heavy = 0;
  for (int i = 0; i < rows; ++i) least = min(least, static_cast<int>(order.fallen[i]));
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
  static constexpr int kBand = 16;  // rows: as many as two rows a cluster come to

  const RowOrder& order;
  TileOrder tiles;  // of clusters with two rows
  int round = 0;

  __device__ __forceinline__ int rows() const { return kOrdered ? order.rows : 0; }
  __device__ __forceinline__ int heavy() const { return kOrdered ? order.heavy : 0; }
  __device__ __forceinline__ int count() const {
    return rows() ? rows() * order.pairs : tiles.count();
  }
  // The next one's, or beyond them all.
  __device__ __forceinline__ int index() const {
    const int clusters = gridDim.x / kCluster, cluster = blockIdx.x / kCluster,
              from = round * clusters;
    const bool last = heavy() && from + clusters >= count();
    return from + (last ? clusters - 1 - cluster : cluster);
  }
  __device__ __forceinline__ bool more() const { return index() < count(); }
  __device__ __forceinline__ Place place() const {
    const int rank = blockIdx.x % kCluster;
    int at = index(), m, n;
    if (rows() == 0) {
      tiles.at(at, m, n);
      return {kCluster * m + rank, n, false};
    }
    const int pairs = order.pairs;
    if (at < heavy() * pairs) return {order.row[at / pairs], at % pairs * kCluster + rank, true};
    at -= heavy() * pairs;
    TileOrder{rows() - heavy(), pairs, kBand}.at(at, m, n);
    m += heavy();
    return {rows() > kOrderedRows ? m : order.row[m], n * kCluster + rank, true};
  }
};

}  // namespace mxtrain::cuda::sm90
