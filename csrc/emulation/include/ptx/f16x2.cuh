// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/f16x2.cuh, emulated. Sums and products of two halves are exact in double.
#pragma once

#include "ptx/rounding.h"

namespace mxtrain::ptx {

using emulation::Half;

inline uint32_t mul_rn_f16x2(uint32_t a, uint32_t b) {
  return emulation::each_half(a, b, [](uint32_t x, uint32_t y) {
    return emulation::narrow<Half>(emulation::widen<Half>(x) * emulation::widen<Half>(y));
  });
}
inline uint32_t add_rn_f16x2(uint32_t a, uint32_t b) {
  return emulation::each_half(a, b, [](uint32_t x, uint32_t y) {
    return emulation::narrow<Half>(emulation::widen<Half>(x) + emulation::widen<Half>(y));
  });
}
inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
  return emulation::each_half(a, b, emulation::pick<Half, true, false>);
}

}  // namespace mxtrain::ptx
