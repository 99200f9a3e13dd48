// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/bf16x2.cuh, emulated.
#pragma once

#include "ptx/rounding.h"

namespace mxtrain::ptx {

using emulation::Bfloat;

inline uint32_t fma_rn_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
    using emulation::widen;
    return emulation::narrow<Bfloat>(
        emulation::fused_to_odd(widen<Bfloat>(x), widen<Bfloat>(y), widen<Bfloat>(z)));
  };
  return one(a & 0xFFFF, b & 0xFFFF, c & 0xFFFF) | one(a >> 16, b >> 16, c >> 16) << 16;
}
inline uint32_t abs_bf16x2(uint32_t a) { return a & 0x7FFF7FFFu; }
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  return emulation::each_half(a, b, emulation::pick<Bfloat, true, false>);
}
inline uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  return emulation::each_half(a, b, emulation::pick<Bfloat, false, false>);
}
inline uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  return emulation::each_half(a, b, emulation::pick<Bfloat, true, true>);
}
inline uint32_t max_nan_abs_bf16x2(uint32_t a, uint32_t b) {
  return max_nan_bf16x2(abs_bf16x2(a), abs_bf16x2(b)) | ((a ^ b) & 0x80008000u);
}

}  // namespace mxtrain::ptx
