// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/integer.cuh, emulated.
#pragma once

#include "emulation/emulation.h"

namespace mxtrain::ptx {

inline uint32_t lop3_select(uint32_t a, uint32_t b, uint32_t mask) {
  return (a & mask) | (b & ~mask);
}
constexpr int kLop3A = 0xF0, kLop3B = 0xCC, kLop3C = 0xAA;
template <int kTable>
uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i)
    if (kTable >> i & 1) d |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return d;
}
inline uint32_t lane_id() { return emulation::lane; }
inline uint32_t max3_u32(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t m = a > b ? a : b;
  return m > c ? m : c;
}
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t d = __byte_perm(a, b, selectors);
  for (int i = 0; i < 4; ++i)
    if (selectors >> (4 * i) & 8u)
      d = (d & ~(0xFFu << (8 * i))) | (d >> (8 * i + 7) & 1u) * 0xFFu << (8 * i);
  return d;
}
inline uint32_t mad_lo_u32(uint32_t a, uint32_t b, uint32_t c) { return a * b + c; }
inline uint32_t dp2a_lo_u32_s32(uint32_t a, uint32_t b, uint32_t c) {
  const auto byte = [&](int i) { return static_cast<uint32_t>(static_cast<int8_t>(b >> (8 * i))); };
  return (a & 0xFFFFu) * byte(0) + (a >> 16) * byte(1) + c;
}

}  // namespace mxtrain::ptx
