// SPDX-License-Identifier: Apache-2.0
// Fragments of mma.sync's products of 8-bit or 4-bit codes (ptx/mma.cuh, ptx/block_scale.h) from
// rows in shared memory: which row and which unit of 16 bytes a lane addresses for ldmatrix.x4, of
// 16 rows by 2 units. Matrix lane / 8 of A is an A fragment's a[lane / 8]; matrices 0 and 1 of B
// are b[0] and b[1] of the first 8 rows, 2 and 3 those of the next 8.
#pragma once

namespace mxtrain::cuda {

constexpr int kUnit = 16;  // bytes that move together: one cp.async, one row of an ldmatrix matrix

struct AddressA {
  static constexpr int row(int lane) { return lane % 16; }
  static constexpr int unit(int lane) { return lane / 16; }
};
struct AddressB {
  static constexpr int row(int lane) { return lane / 16 * 8 + lane % 8; }
  static constexpr int unit(int lane) { return lane / 8 % 2; }
};

// ldmatrix gives lane l bytes 4 (l % 4) to + 3 of row l / 4 of each matrix: are they what mma wants
// there?
constexpr bool fragments_match() {
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      const int from = 8 * r + lane / 4;  // the lane that addresses the row
      if (AddressA::row(from) != lane / 4 + 8 * (r % 2) || AddressA::unit(from) != r / 2)
        return false;
      if (AddressB::row(from) != lane / 4 + 8 * (r / 2) || AddressB::unit(from) != r % 2)
        return false;
    }
  return true;
}
static_assert(fragments_match(), "fragments of mma.m16n8k32 and m16n8k64");

}  // namespace mxtrain::cuda
