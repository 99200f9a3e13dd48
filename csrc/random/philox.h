// SPDX-License-Identifier: Apache-2.0
// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11)
// and the stream layout:
//   key = (low, high word of seed); counter = (low, high word of the group's index, low word of
//   offset, stream)
// A group is 8 consecutive elements of the operand; element j takes half j % 2 (low first) of
// output word j / 2.
#pragma once

#include "formats/host_device.h"

namespace mxtrain {

constexpr int kDrawGroup = 8;  // elements per Philox call
constexpr int kPhiloxRounds = 10;
constexpr uint32_t kRowStream = 0, kTransposedStream = 1;

struct PhiloxKey {
  uint64_t seed;
  uint32_t offset, stream;
};

struct Philox4 {
  uint32_t w[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;  // multipliers
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;  // key increments of a round

MXT_HD Philox4 philox_round(Philox4 c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * c.w[0];
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * c.w[2];
  return {{static_cast<uint32_t>(p1 >> 32) ^ c.w[1] ^ k0, static_cast<uint32_t>(p1),
           static_cast<uint32_t>(p0 >> 32) ^ c.w[3] ^ k1, static_cast<uint32_t>(p0)}};
}

MXT_HD Philox4 philox4x32(Philox4 c, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    c = philox_round(c, k0, k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return c;
}

MXT_HD Philox4 philox_group(const PhiloxKey& key, uint64_t group) {
  const Philox4 counter = {
      {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), key.offset, key.stream}};
  return philox4x32(counter, static_cast<uint32_t>(key.seed),
                    static_cast<uint32_t>(key.seed >> 32));
}

MXT_HD uint32_t draw16(const Philox4& words, int j) {
  return (words.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu;
}

}  // namespace mxtrain
