// SPDX-License-Identifier: Apache-2.0
// Where requantize_codes.cu keeps a warp's tile, 128 rows x 64 columns of codes of x, in shared
// memory. Its 4 bands of 32 rows are the blocks of the result's rows; 8 lanes have one, each of
// them 8 columns. A band holds first its rows, 32 bytes each; then, in the same bytes, its lanes'
// columns, 16 bytes down; then the blocks that come of them. No CUDA here: tests ask the host.
#pragma once

#include <cstdint>

#include "formats/host_device.h"

namespace mxtrain::cuda {

struct CodeTile {
  static constexpr uint32_t kRows = 128, kColumns = 64, kBands = kRows / 32;
  static constexpr uint32_t kLanes = 32 / kBands, kLaneColumns = kColumns / kLanes;
  static constexpr uint32_t kRowBytes = kColumns / 2, kChunks = kRowBytes / 16;
  static constexpr uint32_t kBandBytes = 32 * kRowBytes, kBytes = kBands * kBandBytes;
  static constexpr uint32_t kLaneBytes = kLaneColumns * 16;        // a lane's columns
  static constexpr uint32_t kBlocks = kColumns / 32;               // of a row of x
  static constexpr uint32_t kScaleBytes = kRows * kBlocks;         // of its rows
  static constexpr uint32_t kBlockScaleBytes = kColumns * kBands;  // of what comes of them
  // A lane copies chunk lane % 2 of the rows lane / 2 + 16 i, and stores block lane % 4 of the
  // columns lane / 4 + 8 j.
  static constexpr uint32_t kCopyRows = 32 / kChunks, kCopies = kRows / kCopyRows;
  static constexpr uint32_t kStoreColumns = 32 / kBands, kStores = kColumns / kStoreColumns;
  static_assert(kLaneBytes == 128 && kLanes * kLaneBytes == kBandBytes, "columns replace rows");

  // Bands that read words of their r-th rows at once touch every bank once.
  MXT_HD static uint32_t chunk(uint32_t row, uint32_t chunk) {
    return row / 32 * kBandBytes + (row % 32 * kRowBytes ^ row / 32 * kRowBytes) + chunk * 16;
  }
  // Column n of a lane. Lanes that take their n-th columns at once, and bands that are asked for
  // the blocks of two columns, touch every bank once.
  MXT_HD static uint32_t column(uint32_t lane, uint32_t n) {
    return lane * kLaneBytes + (n ^ lane % kLanes ^ lane / kLanes * 2) * 16;
  }
  // Block lane % 4 of column lane / 4 + 8 j: column() of its lane, from that of j = 0.
  MXT_HD static uint32_t stored(uint32_t lane) {
    return column(lane % kBands * kLanes, lane / kBands);
  }
  MXT_HD static uint32_t stored_further(uint32_t first, uint32_t j) {
    return (first ^ j * 16) + j * kLaneBytes;
  }
  // The scale of a block. Those of a column are a word of 4; a lane stores words lane and lane
  // + 32.
  MXT_HD static uint32_t block_scale(uint32_t lane, uint32_t n) {
    return (n * kLanes + lane % kLanes) * kBands + lane / kLanes;
  }
  MXT_HD static uint32_t scaled_column(uint32_t word) {
    return word % kLanes * kLaneColumns + word / kLanes;
  }
};

}  // namespace mxtrain::cuda
