// SPDX-License-Identifier: Apache-2.0
// The order in which a GEMM visits the tiles of D.
#pragma once

namespace mxtrain::cuda {

// Tiles of D in the order in which they are computed: down kBand tiles of M, then the next column
// of tiles, so that the tiles in flight at one time share rows of A and of B in the L2.
struct TileOrder {
  static constexpr int kBand = 8;
  int tiles_m, tiles_n;  // where a cluster works on one tile, tiles_m counts those of clusters

  __host__ __device__ int count() const { return tiles_m * tiles_n; }
  __device__ __forceinline__ void at(int index, int& m, int& n) const {
    const int per_band = kBand * tiles_n, band = index / per_band, in_band = index % per_band;
    const int rows = min(kBand, tiles_m - band * kBand);
    n = in_band / rows;
    m = band * kBand + in_band % rows;
  }
};

}  // namespace mxtrain::cuda
