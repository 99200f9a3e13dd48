// SPDX-License-Identifier: Apache-2.0
// Blocks of mxfp4 codes, rounded stochastically from codes of x: what requantize_codes.cu does in
// registers with a 32 x 32 square of scales near each other. The source's codes carry one mantissa
// bit and a power of two that a whole row of the square shares, so float16 holds what rounding
// needs. With the square's scales within 8 binades of the largest, v = code * 2^(e - largest) is
// exact, and so is u = v / S * 2^-14, a multiple of 2^-23. Float16 is subnormal below 2^-14 as
// E2M1 is below 1, so u's bits above the cut at bit 9 are the code. Of the fraction F below, bit 0
// is zero, so the draw's first byte decides (F / 512 * 2^17 > 2 r + 1 just where F / 2 > r / 256
// rounded down), and one integer addition of its complement rounds both halves. Every rule takes
// the same scale, since no magnitude's mantissa exceeds that of the largest element, and no
// element exceeds 6 S.
#pragma once

#include "cuda/strip.cuh"
#include "ptx/f16x2.cuh"

namespace mxtrain::cuda {

// ---- transposed ----

// 8 words of 8 nibbles, transposed.
__device__ __forceinline__ void transpose_nibbles(const uint32_t (&w)[8], uint32_t (&out)[8]) {
  constexpr uint32_t kLow = 0x0F0F0F0Fu;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    uint32_t t[4];  // byte i of t[j]: column 2 i + odd of rows 2 j and 2 j + 1
#pragma unroll
    for (int j = 0; j < 4; ++j)
      t[j] = odd ? ptx::lop3_select(w[2 * j] >> 4, w[2 * j + 1], kLow)
                 : ptx::lop3_select(w[2 * j], w[2 * j + 1] << 4, kLow);
    const uint32_t a = __byte_perm(t[0], t[1], 0x5140), b = __byte_perm(t[2], t[3], 0x5140);
    const uint32_t c = __byte_perm(t[0], t[1], 0x7362), d = __byte_perm(t[2], t[3], 0x7362);
    out[odd] = __byte_perm(a, b, 0x5410);
    out[2 + odd] = __byte_perm(a, b, 0x7632);
    out[4 + odd] = __byte_perm(c, d, 0x5410);
    out[6 + odd] = __byte_perm(c, d, 0x7632);
  }
}

// ---- one block ----

// The complement of the first bytes of the draws of elements t and t + 4 of a quarter, in each half
// from bit 0 (even t) or 5 (odd t) up. See quarter_words: even t takes low halves.
struct PairDraws {
  // change: of even and odd t, in quarters 1, 2 and 3; the last of bits of the mask only, and by
  // lop3, or its XOR is made anew for each t.
  uint32_t word[4], change[3][2];
  static constexpr int kMaskedXor = (ptx::kLop3A ^ ptx::kLop3B) & ptx::kLop3C,
                       kMaskedNotXor = (~ptx::kLop3A & ptx::kLop3B) ^ ptx::kLop3C;

  __device__ __forceinline__ explicit PairDraws(const Philox4& call) {
    const uint32_t low = call.w[0] ^ call.w[1], high = call.w[2] ^ call.w[3];
    word[0] = __byte_perm(call.w[0], call.w[2], 0x5511);
    word[1] = odd(__byte_perm(call.w[0], call.w[2], 0x7733));
    word[2] = __byte_perm(call.w[1], call.w[3], 0x5511);
    word[3] = odd(__byte_perm(call.w[1], call.w[3], 0x7733));
    change[0][0] = __byte_perm(low, low, 0x3333);  // their halves change places
    change[0][1] = odd(__byte_perm(low, low, 0x1111));
    change[1][0] = __byte_perm(high, high, 0x3333);
    change[1][1] = odd(__byte_perm(high, high, 0x1111));
    change[2][0] = ptx::lop3<kMaskedXor>(change[0][0], change[1][0], mask(0));
    change[2][1] = ptx::lop3<kMaskedXor>(change[0][1], change[1][1], mask(1));
  }
  // A product, or it would be a shift after each XOR.
  __device__ __forceinline__ static uint32_t odd(uint32_t bytes) {
    return ptx::mad_lo_u32(bytes, 32u, 0u);
  }
  __device__ __forceinline__ static uint32_t mask(int t) {
    return t % 2 ? 0x1FE01FE0u : 0x00FF00FFu;
  }
  __device__ __forceinline__ uint32_t complement(int s, int t) const {
    if (s == 0) return ~word[t] & mask(t);
    if (s == 3) return ptx::lop3<kMaskedNotXor>(word[t], mask(t), change[2][t % 2]);
    return ~(word[t] ^ change[s - 1][t % 2]) & mask(t);
  }
};

// The magnitudes of codes t and t + 4 of a word as float16 bits: 2^-14 times their values.
__device__ __forceinline__ uint32_t raw_pair(uint32_t codes, int t) {
  const uint32_t moved = t < 3 ? codes << (9 - 4 * t) : codes >> 3;
  return moved & 0x0E000E00u;
}

// 32 codes of a column, scaled by units, to the codes of the block.
__device__ __forceinline__ StripBlock round_codes(const uint4& column, const uint32_t (&units)[16],
                                                  uint32_t largest, const PhiloxSchedule& keys,
                                                  uint32_t group) {
  const uint32_t codes[4] = {column.x, column.y, column.z, column.w};
  uint32_t v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = ptx::mul_rn_f16x2(raw_pair(codes[i / 4], i % 4), units[i]);
  uint32_t m[2] = {v[0], v[1]};
#pragma unroll
  for (int i = 2; i < 14; i += 4)
#pragma unroll
    for (int j = 0; j < 2; ++j)  // one instruction from sm_90 on
      m[j] = ptx::max_f16x2(ptx::max_f16x2(m[j], v[i + j]), v[i + j + 2]);
  const uint32_t m2 = ptx::max_f16x2(ptx::max_f16x2(m[0], v[14]), ptx::max_f16x2(m[1], v[15]));
  const uint32_t exponent = max(m2, m2 << 16) >> 26;       // 6 to 17, of zeros 0
  const uint32_t to_grid = (18 - exponent) * 0x04000400u;  // 2^-14 / S
  // Of a block of zeros, whose magnitudes come out as 0, it takes the signs and the scale: -1
  // there, else 0. On the multiply-add pipe, which has time.
  const uint32_t empty = static_cast<uint32_t>((static_cast<int>(exponent) - 1) >> 31);
  const PairDraws draws(philox_group(keys, group));
  uint32_t w[4];
#pragma unroll
  for (int s = 0; s < kQuarters; ++s) {
    uint32_t u[4], pair[2];
#pragma unroll
    for (int t = 0; t < 4; ++t) u[t] = ptx::mul_rn_f16x2(v[4 * s + t], to_grid);
#pragma unroll
    for (int t = 0; t < 4; t += 2) {
      // u's 12 bits and their carries stay in their half. Codes in bits 9..11 and 13..15.
      const uint32_t even = ptx::mad_lo_u32(draws.complement(s, t), 2u, u[t]),
                     odd = ptx::mad_lo_u32(u[t + 1], 16u, draws.complement(s, t + 1));
      pair[t / 2] = ptx::lop3_select(odd, even, 0xE000E000u);
    }
    const uint32_t joined = __byte_perm(pair[0], pair[1], 0x7351) >> 1;
    w[s] = ptx::lop3_select(ptx::mad_lo_u32(codes[s], empty, codes[s]), joined, 0x88888888u);
  }
  const uint32_t scale = largest + exponent - 17;
  return {make_uint4(w[0], w[1], w[2], w[3]), ptx::mad_lo_u32(scale, empty, scale)};
}

}  // namespace mxtrain::cuda
