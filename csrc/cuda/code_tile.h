// SPDX-License-Identifier: Apache-2.0
// Where requantize_codes.cu keeps a tile, 128 rows x 256 columns of codes of x, in shared memory.
// Its 4 bands of 32 rows are the blocks of the result's rows; a warp has one, and each of its lanes
// 8 columns. A band holds first its rows as in memory, 128 bytes each; then, in the same bytes,
// each lane's columns, 16 bytes down; then the blocks that come of them. No CUDA here: tests ask
// the host for it.
#pragma once

#include <cstdint>

#include "formats/host_device.h"

namespace mxtrain::cuda {

struct CodeTile {
  static constexpr uint32_t kRows = 128, kColumns = 256, kBandRows = 32, kBands = kRows / kBandRows;
  static constexpr uint32_t kLaneColumns = kColumns / 32;
  static constexpr uint32_t kRowBytes = kColumns / 2, kChunks = kRowBytes / 16;
  static constexpr uint32_t kBandBytes = kBandRows * kRowBytes, kBytes = kBands * kBandBytes;
  static constexpr uint32_t kScaleBytes = kRows * (kColumns / 32);  // of its rows, or of its blocks
  // A warp copies its band, a lane chunk lane % 8 of the rows lane / 8 + 4 i; a thread stores block
  // thread % 4 of the operand rows thread / 4 + 32 i.
  static constexpr uint32_t kThreads = 32 * kBands;
  static constexpr uint32_t kCopyRows = 32 / kChunks, kCopies = kBandRows / kCopyRows;
  static constexpr uint32_t kStoreColumns = kThreads / kBands, kStores = kColumns / kStoreColumns;
  static_assert(kLaneColumns * 16 == kRowBytes, "columns take the place of rows");

  MXT_HD static uint32_t chunk(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + chunk * 16;
  }
  // Column n of a lane. Lanes that take their n-th columns at once, and bands that are asked for
  // the blocks of two columns, touch every bank once.
  MXT_HD static uint32_t column(uint32_t band, uint32_t lane, uint32_t n) {
    return band * kBandBytes + lane * kRowBytes + (n ^ lane % 8 ^ band * 2) * 16;
  }
  // Block thread % 4 of column thread / 4 + 32 i: column() of its lane, from that of i = 0.
  MXT_HD static uint32_t stored(uint32_t thread) {
    return column(thread % kBands, thread / kBands / kLaneColumns, thread / kBands % kLaneColumns);
  }
  MXT_HD static uint32_t stored_further(uint32_t first, uint32_t i) {
    return (first ^ i % 2 * 64) + i * (kStoreColumns / kLaneColumns * kRowBytes);
  }
  // The scale of a block. Those of a column are a word of 4; thread t stores words t and t + 128.
  static constexpr uint32_t kScaleStep = 32 * kBands;  // from a lane's column to its next
  MXT_HD static uint32_t block_scale(uint32_t band, uint32_t lane, uint32_t n) {
    return (n * 32 + lane) * kBands + band;
  }
  MXT_HD static uint32_t scaled_column(uint32_t word) {
    return word % 32 * kLaneColumns + word / 32;
  }
};

}  // namespace mxtrain::cuda
