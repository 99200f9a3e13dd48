// SPDX-License-Identifier: Apache-2.0
// Block-scaled products of a warp: which lane holds what, and the product by way of these tables
// where the GPU has no such instruction (ptx/mma_block_scale.cuh). Host and device: the CPU tests
// run it, too.
//
//   D [16, 8] = C + sum over k of A[m, k] scale_a[m, k / block] * B[n, k] scale_b[n, k / block]
//
// With P = 32 / bits codes in a word, low bits first, and g = lane / 4, t = lane % 4, a lane holds
// (PTX ISA 9.0, "Matrix Fragments for mma.m16n8k64", 4-bit codes, and "for mma.m16n8k32", 8-bit)
//   A [16, 8 P]  in a[r] row g + 8 (r % 2), k = P t + 4 P (r / 2) to + P - 1
//   B [8, 8 P]   in b[r] row g, k = P t + 4 P r to + P - 1 (PTX calls this B's column)
//   C, D         in d[2 i + c] row g + 8 i, column 2 t + c
// and of the scales (PTX ISA 9.0, "Block Scaling for mma.sync")
//   row m of A     in the word of lane 4 (m % 8) + 2 thread_a + m / 8; thread_a: 0 or 1
//   column n of D  in the word of lane 4 n + thread_b; thread_b: 0 to 3
// where byte byte_a + j (byte_b + j) belongs to block j of the instruction's K: byte ids 0 to 3
// where that is one block (scale_vec::1X), 0 or 2 for two (2X), 0 for four (4X). All other lanes
// and bytes are ignored.
//
// The product's order: from C on, k ascending, one float32 addition each. A term is the product of
// two float32 values, code times scale, and as they exact but where it leaves float32's range.
// E8M0's 255 and E4M3's 127 make their terms NaN, those of zero codes included.
#pragma once

#include "formats/block.h"

#if defined(__CUDACC__)
#define MXT_ROLLED _Pragma("unroll 1")
#else
#define MXT_ROLLED
#endif

namespace mxtrain::ptx {

// The instruction that a block format takes.
template <class F>
struct BlockScaleShape {
  static_assert(F::kBits == 4 || F::kBits == 8,
                "6-bit codes would lie in bytes of their own, and an operand packs them");
  static constexpr int kPerWord = 32 / F::kBits, kK = 8 * kPerWord, kScales = kK / F::kBlock;
  static_assert(kK % F::kBlock == 0 && F::kBlock % kPerWord == 0 && kScales <= 4,
                "a word of codes has one scale, and a word of scales serves an instruction");
};

// Which of the scale words and bytes an instruction reads.
struct ScaleSelectors {
  int byte_a, thread_a, byte_b, thread_b;
};

MXT_HD constexpr bool is_legal(const ScaleSelectors& s, int scales) {
  return s.byte_a >= 0 && s.byte_a + scales <= 4 && s.byte_a % scales == 0 && s.byte_b >= 0 &&
         s.byte_b + scales <= 4 && s.byte_b % scales == 0 && s.thread_a >= 0 && s.thread_a < 2 &&
         s.thread_b >= 0 && s.thread_b < 4;
}

// ---- tables ----

MXT_HD constexpr int row_of_a(int lane, int word) { return lane / 4 + 8 * (word % 2); }
MXT_HD constexpr int k_of_a(int lane, int word, int per_word) {
  return per_word * (lane % 4 + 4 * (word / 2));
}
MXT_HD constexpr int row_of_b(int lane) { return lane / 4; }
MXT_HD constexpr int k_of_b(int lane, int word, int per_word) {
  return per_word * (lane % 4 + 4 * word);
}
MXT_HD constexpr int row_of_d(int lane, int i) { return lane / 4 + 8 * (i / 2); }
MXT_HD constexpr int column_of_d(int lane, int i) { return 2 * (lane % 4) + i % 2; }

// Back: who has the codes of row `row` from k = per_word * unit on, and in which word.
MXT_HD constexpr int lane_of_a(int row, int unit) { return 4 * (row % 8) + unit % 4; }
MXT_HD constexpr int word_of_a(int row, int unit) { return row / 8 + unit / 4 * 2; }
MXT_HD constexpr int lane_of_b(int row, int unit) { return 4 * row + unit % 4; }
MXT_HD constexpr int word_of_b(int unit) { return unit / 4; }

MXT_HD constexpr int lane_of_scale_a(int row, int thread_a) {
  return 4 * (row % 8) + 2 * thread_a + row / 8;
}
MXT_HD constexpr int lane_of_scale_b(int column, int thread_b) { return 4 * column + thread_b; }

constexpr bool tables_agree() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int word = 0; word < 4; ++word) {
      const int row = row_of_a(lane, word), unit = k_of_a(lane, word, 1);
      if (lane_of_a(row, unit) != lane || word_of_a(row, unit) != word) return false;
    }
    for (int word = 0; word < 2; ++word) {
      const int unit = k_of_b(lane, word, 1);
      if (lane_of_b(row_of_b(lane), unit) != lane || word_of_b(unit) != word) return false;
    }
  }
  return true;
}
static_assert(tables_agree(), "there and back");

// ---- the product ----

template <class F>
MXT_HD float scale_value(uint32_t code) {
  return F::kE4M3Scale ? decode<E4M3>(code & 0x7Fu) : e8m0_value(code);  // ue4m3 has no sign
}

// What lane `lane` gets of the product, in d[0..4); c may be d. warp.a(word, lane) and b are the
// codes that a lane holds, warp.scale_a(lane) and scale_b its scales: on the device exchanges of
// the whole warp, which is why the loops have no branches.
template <class F, class Warp>
MXT_HD void block_scale_product(const Warp& warp, int lane, const ScaleSelectors& s, const float* c,
                                float* d) {
  using Element = typename F::Element;
  constexpr int kPerWord = BlockScaleShape<F>::kPerWord;
  float sums[4] = {c[0], c[1], c[2], c[3]};
  uint32_t scales_a[2], scales_b[2];
  for (int i = 0; i < 2; ++i) {
    scales_a[i] = warp.scale_a(lane_of_scale_a(row_of_d(lane, 2 * i), s.thread_a)) >> 8 * s.byte_a;
    scales_b[i] = warp.scale_b(lane_of_scale_b(column_of_d(lane, i), s.thread_b)) >> 8 * s.byte_b;
  }
  MXT_ROLLED
  for (int unit = 0; unit < 8; ++unit) {
    const int shift = 8 * (kPerWord * unit / F::kBlock);
    uint32_t a[2], b[2];
    float scale_a[2], scale_b[2];
    for (int i = 0; i < 2; ++i) {
      const int row = row_of_d(lane, 2 * i), column = column_of_d(lane, i);
      a[i] = warp.a(word_of_a(row, unit), lane_of_a(row, unit));
      b[i] = warp.b(word_of_b(unit), lane_of_b(column, unit));
      scale_a[i] = scale_value<F>(scales_a[i] >> shift & 0xFFu);
      scale_b[i] = scale_value<F>(scales_b[i] >> shift & 0xFFu);
    }
    MXT_ROLLED
    for (int e = 0; e < kPerWord; ++e) {
      const float values_a[2] = {decode<Element>(a[0]) * scale_a[0],
                                 decode<Element>(a[1]) * scale_a[1]};
      const float values_b[2] = {decode<Element>(b[0]) * scale_b[0],
                                 decode<Element>(b[1]) * scale_b[1]};
      for (int i = 0; i < 4; ++i) sums[i] += values_a[i / 2] * values_b[i % 2];
      for (int i = 0; i < 2; ++i) {
        a[i] >>= F::kBits;
        b[i] >>= F::kBits;
      }
    }
  }
  for (int i = 0; i < 4; ++i) d[i] = sums[i];
}

}  // namespace mxtrain::ptx

#undef MXT_ROLLED
