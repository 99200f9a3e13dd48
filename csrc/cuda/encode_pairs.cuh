// SPDX-License-Identifier: Apache-2.0
// Rounding bfloat16 to E2M1, nearest, two elements a word: the codes of encode_nearest<E2M1>, in
// half its instructions. Valid where u = x * 2^-e is exact in bfloat16, so for bfloat16 inputs with
// E8M0 scales, no rotation and no prescale (a u that underflows rounds to zero either way). As in
// encode.cuh, |u| + magic leaves the rounded count of steps in the low bits; here magic = 2^6 *
// 2^binade + 2 steps, in bfloat16's 8 significant bits, so that with binade / 2^6 the low 3 bits
// are the code.
#pragma once

#include "cuda/encode.cuh"
#include "ptx/bf16x2.cuh"

namespace mxtrain::cuda {

constexpr uint32_t kBf16One2 = 0x3F803F80u, kBf16Six2 = 0x40C040C0u, kBf16MinusZero2 = 0x80008000u;
constexpr uint32_t kBf16Exponent2 = 0x7F807F80u;
constexpr uint32_t kMagicStep2 = 0x03000300u + 0x00020002u;  // 6 more in the exponent, 2 steps

// Codes of two elements in bits 0..3 of each half; the other bits are garbage. ax2: |x2|; inv2:
// 2^-e of each half, as bfloat16.
__device__ __forceinline__ uint32_t encode2_nearest(uint32_t x2, uint32_t ax2, uint32_t inv2,
                                                    bool fits) {
  uint32_t a2 = ptx::fma_rn_bf16x2(ax2, inv2, kBf16MinusZero2);
  if (!fits) a2 = ptx::min_bf16x2(a2, kBf16Six2);
  const uint32_t binade2 = ptx::max_bf16x2(a2, kBf16One2) & kBf16Exponent2;
  const uint32_t rounded2 = ptx::fma_rn_bf16x2(a2, kBf16One2, binade2 + kMagicStep2);
  const uint32_t code2 = rounded2 + (binade2 >> 6);  // the low half's sum stays below 2^16
  return ptx::lop3_select(code2, x2 >> 12, 0x00070007u);
}

// The nibbles of w[k]'s low (high) halves, k = 0..7 from the low nibble up: the words of two
// operand rows.
__device__ __forceinline__ void gather_nibbles(const uint32_t (&w)[8], uint32_t& low,
                                               uint32_t& high) {
  uint32_t half[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t t = ptx::lop3_select(w[4 * h], w[4 * h + 1] << 4, 0x000F000Fu);
    t = ptx::lop3_select(t, w[4 * h + 2] << 8, 0x00FF00FFu);
    t = ptx::lop3_select(t, w[4 * h + 3] << 12, 0x0FFF0FFFu);
    half[h] = t;
  }
  low = __byte_perm(half[0], half[1], 0x5410);
  high = __byte_perm(half[0], half[1], 0x7632);
}

// The nibbles of w[0].low, w[0].high, w[1].low, ...: 8 consecutive elements of one operand row.
__device__ __forceinline__ uint32_t join_nibbles(const uint32_t (&w)[4]) {
  uint32_t b[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    b[i] = ptx::lop3_select(w[i], w[i] >> 12, 0x0000000Fu);  // byte 0; garbage above
  return __byte_perm(__byte_perm(b[0], b[1], 0x0040), __byte_perm(b[2], b[3], 0x0040), 0x5410);
}

// |x| of each half, and the largest of N words.
template <int N>
__device__ __forceinline__ uint32_t abs_amax2(const uint32_t (&x2)[N], uint32_t (&ax2)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) ax2[i] = x2[i] & 0x7FFF7FFFu;
  uint32_t m = ax2[0];
#pragma unroll
  for (int i = 1; i < N; ++i) m = ptx::max_nan_bf16x2(m, ax2[i]);
  return m;
}

// 2^-e of two scales as bfloat16 halves, from their codes; 0 is fine for a code of 254 and above.
__device__ __forceinline__ uint32_t reciprocal2(uint32_t low_code, uint32_t high_code) {
  return ((254u - low_code) << 7) | ((254u - high_code) << 23);
}

// ---- decoding: 8 E2M1 codes to bfloat16, times a power of two; exact ----

// Values by magnitude code, as the low and high bytes of bfloat16: two 8-entry tables for byte
// permutes.
constexpr uint32_t kE2M1Low[2] = {0xC0800000u, 0xC0804000u},
                   kE2M1High[2] = {0x3F3F3F00u, 0x40404040u};

// scale: the E8M0 code of the block. NaN blocks become bfloat16's quiet NaN, or with kQuiet false
// some mixture of NaN and Inf, which is enough to poison a block.
template <bool kQuiet = true>
__device__ __forceinline__ void decode8_e2m1(uint32_t codes, uint32_t scale, uint32_t (&w)[4]) {
  const uint32_t magnitudes = codes & 0x77777777u;
  const uint32_t scale_bits = scale == 0 ? 0x40u : scale << 7;
  const uint32_t scale2 = scale_bits * 0x00010001u;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t select = magnitudes >> (16 * h);
    const uint32_t low = __byte_perm(kE2M1Low[0], kE2M1Low[1], select);
    const uint32_t high = __byte_perm(kE2M1High[0], kE2M1High[1], select);
    w[2 * h] = __byte_perm(low, high, 0x5140);
    w[2 * h + 1] = __byte_perm(low, high, 0x7362);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    // A byte holds two codes; its bits 3 and 7 are their signs, which the product moves to bits 15
    // and 31.
    const uint32_t signs = ((codes >> (8 * j)) & 0xFFu) * 0x01001000u;
    w[j] = ptx::fma_rn_bf16x2(w[j] | (signs & 0x80008000u), scale2, kBf16MinusZero2);
    if (kQuiet) w[j] = scale == kE8M0Nan ? 0x7FC07FC0u : w[j];
  }
}

}  // namespace mxtrain::cuda
