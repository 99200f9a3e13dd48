// SPDX-License-Identifier: Apache-2.0
// The random draws of a run of elements, several Philox groups side by side. Included once per
// instruction set.
#pragma once

#include "cpu/kernels.h"

namespace mxtrain::cpu::MXT_ISA {

// The 16-bit draws of n consecutive elements that start a group: draws[i] for element first + i.
static void draw_row(const PhiloxKey& key, uint64_t first, int n, uint32_t* draws) {
  constexpr int kLanes = 8;  // groups side by side: the compiler makes one vector of them
  const int groups = n / kDrawGroup;
  for (int g0 = 0; g0 < groups; g0 += kLanes) {
    uint32_t c[4][kLanes];
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t group = first / kDrawGroup + g0 + i;
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
    for (int i = 0; i < kLanes && g0 + i < groups; ++i)
      for (int w = 0; w < 4; ++w) {
        uint32_t* out = draws + (g0 + i) * kDrawGroup + 2 * w;
        out[0] = c[w][i] & 0xFFFFu;
        out[1] = c[w][i] >> 16;
      }
  }
}

}  // namespace mxtrain::cpu::MXT_ISA
