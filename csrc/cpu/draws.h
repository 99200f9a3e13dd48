// SPDX-License-Identifier: Apache-2.0
// The random draws of a run of elements, several Philox groups side by side. Included once per
// instruction set.
#pragma once

#include "cpu/kernels.h"

namespace mxtrain::cpu::MXT_ISA {

// The 16-bit draws of n elements from the first of a group on, whole quarters.
static void draw_row(const PhiloxKey& key, uint64_t first_group, int n, uint32_t* draws) {
  constexpr int kLanes = 8;  // groups side by side: the compiler makes one vector of them
  const int groups = (n + kDrawGroup - 1) / kDrawGroup;
  for (int g0 = 0; g0 < groups; g0 += kLanes) {
    uint32_t c[4][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t group = first_group + g0 + i;
      c[0][i] = static_cast<uint32_t>(group);
      c[1][i] = static_cast<uint32_t>(group >> 32);
      c[2][i] = key.offset;
      c[3][i] = key.stream;
    }
    uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int i = 0; i < kLanes; ++i) {
        const Philox4 next = philox_round({{c[0][i], c[1][i], c[2][i], c[3][i]}}, k0, k1);
        for (int w = 0; w < 4; ++w) c[w][i] = next.w[w];
      }
      k0 += kPhiloxW0;
      k1 += kPhiloxW1;
    }
    for (int i = 0; i < kLanes; ++i)
      for (int s = 0; s < kQuarters; ++s) {
        const int at = (g0 + i) * kDrawGroup + s * kDrawQuarter;
        if (at >= n) break;
        const Philox4 words = quarter_words({{c[0][i], c[1][i], c[2][i], c[3][i]}}, s);
        for (int j = 0; j < kDrawQuarter; ++j) draws[at + j] = draw16(words, j);
      }
  }
}

}  // namespace mxtrain::cpu::MXT_ISA
