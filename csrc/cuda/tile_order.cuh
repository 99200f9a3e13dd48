// SPDX-License-Identifier: Apache-2.0
// The order in which a GEMM visits the tiles of D.
#pragma once

namespace mxtrain::cuda {

// Tiles of D in the order in which they are computed: down `band` tiles of M, then the next column
// of tiles, so that the tiles in flight at one time share rows of A and of B in the L2.
struct TileOrder {
  int tiles_m, tiles_n;  // where a cluster works on one tile, tiles_m counts those of clusters
  int band = 8;

  __host__ __device__ int count() const { return tiles_m * tiles_n; }
  __device__ __forceinline__ void at(int index, int& m, int& n) const {
    const int per_band = band * tiles_n, first = index / per_band * band,
              in_band = index % per_band;
    const int rows = min(band, tiles_m - first);
    n = in_band / rows;
    m = first + in_band % rows;
  }
};

}  // namespace mxtrain::cuda
