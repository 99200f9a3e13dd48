// SPDX-License-Identifier: Apache-2.0
// mxfp4 codes to E5M2 bytes, a block shifted by a power of two: cuda/fold.cu has the rule. A byte
// permute looks four magnitudes up in an 8-entry table of E5M2 bytes, which each block shifts by
// subtracting s from its exponent fields.
#pragma once

#include <cstdint>

namespace mxtrain::cuda {

constexpr int kExactShifts = 29;  // s = 0 .. 28

// The E5M2 bytes of magnitude codes 0..3 and 4..7 (0, 0.5, 1, 1.5; 2, 3, 4, 6), times 2^(13 - s).
__device__ __forceinline__ uint2 fold_table(uint32_t s) {
  constexpr uint32_t kLow = 0x72706C00u, kHigh = 0x7A787674u;  // s = 0
  constexpr uint32_t kLastNormal = 26;                         // 0.5 * 2^(13 - 26) = 2^-14
  uint2 table = make_uint2(kLow - s * 0x04040400u, kHigh - s * 0x04040404u);
  if (s > kLastNormal) {  // some are subnormal: their bytes are multiples of 2^-16
    table = s == 27 ? make_uint2(0x06040200u, 0x0E0C0A08u) : make_uint2(0x03020100u, 0x0A080604u);
    if (s >= kExactShifts) table = make_uint2(0, 0);
  }
  return table;
}

// 8 codes, the first in the low nibble, to 8 bytes.
__device__ __forceinline__ uint2 fold8(uint32_t codes, uint2 table) {
  constexpr uint32_t kSigns = 0x5140u;  // bytes 0, 4, 1, 5
  const uint32_t magnitudes = codes & 0x77777777u, even = codes << 4;
  const uint32_t low = __byte_perm(table.x, table.y, magnitudes),
                 high = __byte_perm(table.x, table.y, magnitudes >> 16);
  return make_uint2(low | (__byte_perm(even, codes, kSigns) & 0x80808080u),
                    high | (__byte_perm(even >> 16, codes >> 16, kSigns) & 0x80808080u));
}

}  // namespace mxtrain::cuda
