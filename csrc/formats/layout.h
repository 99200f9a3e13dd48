// SPDX-License-Identifier: Apache-2.0
// The 128x4 scale layout of Blackwell tensor cores (PTX ISA, "tcgen05.mma scale factor layout";
// cuBLAS "1D block scaling factors layout"): scales [R, C] are padded to 128 rows and 4 columns and
// stored in 512-byte tiles, tiles K-major; inside a tile the byte of row r, column c is at (r % 32)
// * 16 + (r / 32) * 4 + c. Padding bytes are 0.
#pragma once

#include "formats/host_device.h"

namespace mxtrain {

constexpr int64_t kTileRows = 128, kTileCols = 4, kTileBytes = 512;
static_assert(kTileBytes == kTileRows * kTileCols, "a tile holds one byte per scale");

MXT_HD int64_t tiles(int64_t n, int64_t tile) { return (n + tile - 1) / tile; }

// Byte offset of scale (r, c) when each row has `col_tiles` tiles.
MXT_HD int64_t swizzled_offset(int64_t r, int64_t c, int64_t col_tiles) {
  const int64_t tile = (r / kTileRows) * col_tiles + c / kTileCols;
  const int64_t in_tile = r % kTileRows;
  return tile * kTileBytes + (in_tile % 32) * 16 + (in_tile / 32) * 4 + c % kTileCols;
}

}  // namespace mxtrain
