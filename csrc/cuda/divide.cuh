// SPDX-License-Identifier: Apache-2.0
// Division by a number that a launch fixes, as a multiplication: Granlund and Montgomery, "Division
// by invariant integers using multiplication".
#pragma once

#include <cstdint>

namespace mxtrain::cuda {

// For dividends below 2^31.
struct Divisor {
  uint32_t value, magic, shift;  // magic: 2^32 (2^shift / value - 1) + 1

  static Divisor of(int64_t value) {
    int shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    const int64_t magic = ((((int64_t{1} << shift) - value) << 32) / value) + 1;
    return {static_cast<uint32_t>(value), static_cast<uint32_t>(magic),
            static_cast<uint32_t>(shift)};
  }
  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (__umulhi(n, magic) + n) >> shift;
  }
};

}  // namespace mxtrain::cuda
