// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/integer.cuh, emulated.
#pragma once

#include "emulation/emulation.h"

namespace mxtrain::ptx {

inline uint32_t lop3_select(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}
inline uint32_t lane_id() { return emulation::lane; }
inline uint32_t max3_u32(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t m = a > b ? a : b;
  return m > c ? m : c;
}
inline uint32_t mad_lo_u32(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }
inline uint32_t dp2a_lo_u32_s32(uint32_t a, uint32_t b, uint32_t c) {
  const auto byte = [&](int i) { return static_cast<uint32_t>(static_cast<int8_t>(b >> (8 * i))); };
  return (a & 0xFFFFu) * byte(0) + (a >> 16) * byte(1) + c;
}

}  // namespace mxtrain::ptx
