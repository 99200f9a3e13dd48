// SPDX-License-Identifier: Apache-2.0
// Philox4x32-7 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC'11:
// the fewest rounds with which it passes BigCrush) and the stream layout:
//   key = (low, high word of seed); counter = (low, high word of the group's index, low word of
//   offset, stream)
// A group is 32 consecutive elements of an operand's row; rows start new groups. Its four output
// words w serve its four quarters of 8: quarter s takes the words w[t] ^ c[s],
//   c[0] = 0, c[1] = rot16(w[0] ^ w[1]), c[2] = rot16(w[2] ^ w[3]), c[3] = c[1] ^ c[2]
// (rot16 exchanges a word's halves), and its element j half j % 2 (low first) of word j / 2. Each
// of the 32 draws is the XOR of an odd number of the 8 halves, and no two are of the same ones:
// so any three draws of a group are uniform and independent (docs/numerics.md).
#pragma once

#include "formats/host_device.h"

namespace mxtrain {

constexpr int kDrawGroup = 32;   // elements of a Philox call
constexpr int kDrawQuarter = 8;  // elements of its four words, taken once
constexpr int kPhiloxRounds = 7;
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

// What the calls of one seed, offset and stream share, for groups below 2^32: the keys, into which
// the parts of the first three rounds that do not depend on the group are folded. The same words as
// philox_group, by 2 products fewer.
struct PhiloxSchedule {
  static constexpr int kRounds = kPhiloxRounds - 2;
  uint32_t first;  // round 1, with the stream
  uint32_t second[2];
  uint32_t key[kRounds][2];
};

MXT_HD PhiloxSchedule philox_schedule(uint64_t seed, uint32_t offset, uint32_t stream) {
  const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const uint64_t of_offset = static_cast<uint64_t>(kPhiloxM1) * offset;
  const uint64_t next =
      static_cast<uint64_t>(kPhiloxM0) * (static_cast<uint32_t>(of_offset >> 32) ^ k0);
  PhiloxSchedule s = {};
  s.first = k1 ^ stream;
  s.second[0] = static_cast<uint32_t>(of_offset) ^ (k0 + kPhiloxW0);
  s.second[1] = static_cast<uint32_t>(next >> 32) ^ (k1 + kPhiloxW1);
  for (int i = 0; i < PhiloxSchedule::kRounds; ++i) {
    s.key[i][0] = k0 + static_cast<uint32_t>(i + 2) * kPhiloxW0;
    s.key[i][1] = k1 + static_cast<uint32_t>(i + 2) * kPhiloxW1;
  }
  s.key[0][1] ^= static_cast<uint32_t>(next);
  return s;
}

MXT_HD Philox4 philox_group(const PhiloxSchedule& s, uint32_t group) {
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * group;
  const uint64_t p1 =
      static_cast<uint64_t>(kPhiloxM1) * (static_cast<uint32_t>(p0 >> 32) ^ s.first);
  Philox4 c = {{static_cast<uint32_t>(p1 >> 32) ^ s.second[0], static_cast<uint32_t>(p1),
                static_cast<uint32_t>(p0) ^ s.second[1], 0}};
  for (int i = 0; i < PhiloxSchedule::kRounds; ++i) c = philox_round(c, s.key[i][0], s.key[i][1]);
  return c;
}

MXT_HD uint32_t swap_halves(uint32_t w) { return (w << 16) | (w >> 16); }

// The words of quarter s of a group whose call gave `words`.
MXT_HD Philox4 quarter_words(const Philox4& words, int s) {
  const uint32_t* w = words.w;
  const uint32_t low = s & 1 ? swap_halves(w[0] ^ w[1]) : 0u,
                 high = s & 2 ? swap_halves(w[2] ^ w[3]) : 0u;
  return {{w[0] ^ low ^ high, w[1] ^ low ^ high, w[2] ^ low ^ high, w[3] ^ low ^ high}};
}

// Quarters are numbered across groups: quarter q is quarter q % 4 of group q / 4.
constexpr int kQuarters = kDrawGroup / kDrawQuarter;

// Of a row of kp elements.
MXT_HD int64_t draw_groups_of_row(int64_t kp) { return (kp + kDrawGroup - 1) / kDrawGroup; }

MXT_HD Philox4 philox_quarter(const PhiloxKey& key, uint64_t quarter) {
  return quarter_words(philox_group(key, quarter / kQuarters),
                       static_cast<int>(quarter % kQuarters));
}

// Draw j of a quarter's words.
MXT_HD uint32_t draw16(const Philox4& quarter, int j) {
  return (quarter.w[j / 2] >> (16 * (j % 2))) & 0xFFFFu;
}

}  // namespace mxtrain
