// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/mma.cuh, emulated: fragments as it lays them out. A product of floats is summed in
// double and rounded once; what hardware does with sums that are not exact is its own.
#pragma once

#include "emulation/emulation.h"
#include "ptx/rounding.h"

namespace mxtrain::ptx {

template <class Sum, class Number, class Element>
void mma_m16n8k32(Number* d, const uint32_t* a, const uint32_t* b, const Number* c, Element element,
                  const char* file, int line) {
  uint32_t all_a[32][4], all_b[32][2];
  const auto gather = [&](uint32_t w0, uint32_t w1, int i, bool is_a) {
    const uint64_t* all = emulation::exchange("mma.sync", 0xFFFFFFFFu,
                                              static_cast<uint64_t>(w1) << 32 | w0, file, line);
    for (int l = 0; l < 32; ++l) {
      uint32_t* to = is_a ? &all_a[l][i] : &all_b[l][i];
      to[0] = static_cast<uint32_t>(all[l]), to[1] = static_cast<uint32_t>(all[l] >> 32);
    }
  };
  gather(a[0], a[1], 0, true);
  gather(a[2], a[3], 2, true);
  gather(b[0], b[1], 0, false);
  const int lane = static_cast<int>(emulation::lane);
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    Sum sum = c[i];
    for (int k = 0; k < 32; ++k) {
      const uint32_t wa = all_a[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2],
                     wb = all_b[column * 4 + k % 16 / 4][k / 16];
      sum += element(wa >> (8 * (k % 4)) & 0xFFu) * element(wb >> (8 * (k % 4)) & 0xFFu);
    }
    d[i] = static_cast<Number>(sum);
  }
}

inline void mma_m16n8k32_e5m2(float* d, const uint32_t* a, const uint32_t* b, const float* c,
                              MXT_HERE) {
  const auto element = [](uint32_t byte) { return emulation::widen<emulation::Half>(byte << 8); };
  mma_m16n8k32<double>(d, a, b, c, element, file, line);
}
inline void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, const uint32_t* b, const int32_t* c,
                            MXT_HERE) {
  const auto element = [](uint32_t byte) { return static_cast<int32_t>(static_cast<int8_t>(byte)); };
  mma_m16n8k32<int64_t>(d, a, b, c, element, file, line);
}

}  // namespace mxtrain::ptx
