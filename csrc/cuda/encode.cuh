// SPDX-License-Identifier: Apache-2.0
// The element encoders of csrc/formats/elements.h in the fewest GPU instructions; the same codes,
// which the tests compare over every bfloat16 value.
//
// Stochastic rounding works in float32's own subnormals. A magnitude a is multiplied by 2^(-126 -
// emin), a power of two, so the product u is subnormal just where a is subnormal in the element
// format. There the bits of u count steps of 2^-149 and above they are u's exponent and mantissa:
// in either case the bits above the cut at bit 23 - kManBits are the magnitude code of the grid
// point below a, and those under it are the fraction to the next one, in units of 2^-kCut. One
// integer add of the draw rounds. The product is exact where u is normal, and rounded up
// (mul.rp) where it is not. Up is right: the draw's thresholds, odd multiples of 2^-17, are whole
// units of 2^-kCut, so a fraction above one stays above it, and one that is not stays where it is
// or goes up to it at most. GPUs multiply subnormals at full rate; the code must not be compiled
// to flush them.
#pragma once

#include "formats/block.h"
#include "ptx/convert.cuh"
#include "ptx/integer.cuh"
#include "random/philox.h"

namespace mxtrain::cuda {

template <class E>
struct EncodeTraits {
  static constexpr int kCut = 23 - E::kManBits;
  static constexpr int kToGrid = -126 - E::kEmin;  // the power of two that a is multiplied by
  static constexpr uint32_t kDrawStep = 1u << (kCut - 16);  // one unit of the draw, below the cut
  // up <=> fraction > (2 draw + 1) * kDrawStep / 2, as a carry: fraction + kCarry - draw *
  // kDrawStep reaches the cut.
  static constexpr uint32_t kCarry = (1u << kCut) - 1 - kDrawStep / 2;
  static_assert(E::kManBits <= 6, "the draw's thresholds must be whole units of 2^-kCut");
};

// sum - draw j * kDrawStep, the draw taken from its half of the quarter's word by the
// multiplication.
template <class E>
__device__ __forceinline__ uint32_t subtract_draw(uint32_t sum, const Philox4& draws, int j) {
  constexpr uint32_t kStep = EncodeTraits<E>::kDrawStep;
  static_assert(kStep <= 128, "a signed byte holds minus one step");
  return ptx::dp2a_lo_u32_s32(draws.w[j / 2], (256u - kStep) << (8 * (j % 2)), sum);
}

// v limited to the element's maximum already. Code in the low bits, sign at bit kBits - 1.
template <class E>
__device__ __forceinline__ uint32_t encode_stochastic_fast(float v, const Philox4& draws, int j) {
  using T = EncodeTraits<E>;
  const uint32_t u = float_bits(__fmul_ru(fabsf(v), power_of_two(T::kToGrid)));
  return with_sign<E>((subtract_draw<E>(u, draws, j) + T::kCarry) >> T::kCut, v);
}

// A magnitude code in bits 28..30 and its sign in bit 31, for funnel shifts; the rest is garbage.
__device__ __forceinline__ uint32_t e2m1_top_nibble(uint32_t magnitude, float v) {
  return ptx::lop3_select(float_bits(v), magnitude, kSignBit);
}

// 8 codes of v / S, |v| <= 6 S, for S = 2^-126 to kMostStochasticScale, given by its float32 bits:
// the factor 2^-126 / S, from 2^-149 to 1, is a float32, so v is not divided. kUp moves the code to
// bit 28.
constexpr int kMostStochasticScale = 23;  // as an exponent
__device__ __forceinline__ uint32_t e2m1_stochastic8(const float* v, uint32_t scale_bits,
                                                     const Philox4& draws) {
  using T = EncodeTraits<E2M1>;
  constexpr uint32_t kUp = 64u;
  const float to_grid = bits_float((254u << 23) - scale_bits) * power_of_two(T::kToGrid);
  // Plus 0: a constant that ptxas sees makes an LEA, of the ALU pipe, of the multiplication.
  const uint32_t carry = kUp * T::kCarry + (float_bits(to_grid) >> 31);
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const uint32_t u = float_bits(__fmul_ru(fabsf(v[i]), to_grid));
    const uint32_t sum = ptx::mad_lo_u32(subtract_draw<E2M1>(u, draws, i), kUp, carry);
    word = __funnelshift_l(e2m1_top_nibble(sum, v[i]), word, 4);
  }
  return word;
}

// 8 codes of v / S, |v| <= 6 S, as above: by an instruction where there is one, from v * (1 / S),
// which is exact or too small to be anything but a zero. Otherwise magic = 2^22 * 2^binade + 2
// steps, and n + 2 + binade / 2^22 is the code of S = 1, modulo 8.
__device__ __forceinline__ uint32_t e2m1_nearest8(const float* v, uint32_t scale_bits) {
  if constexpr (ptx::kHasCvtE2M1) {
    const float inverse = bits_float((254u << 23) - (scale_bits & kInfBits));  // of 2^-127, too
    float u[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) u[i] = v[i] * inverse;
    return ptx::cvt_rn_satfinite_e2m1x8(u);
  }
  const float s = bits_float(scale_bits);
  const uint32_t back = 254u - (scale_bits >> 22);
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float a = fabsf(v[i]);
    const uint32_t binade = float_bits(fmaxf(a, s)) & kInfBits;
    const uint32_t n = float_bits(a + bits_float(binade + (22u << 23) + 2u)) - binade;
    word = __funnelshift_l(e2m1_top_nibble((n + (binade >> 22) + back) << 28, v[i]), word, 4);
  }
  return word;
}

// Eight codes of an element format, packed as the operand's bytes: 4, 6 or 8 bytes in a word pair.
struct Packed8 {
  uint32_t low, high;
};

template <class E>
__device__ __forceinline__ Packed8 pack8(const uint32_t (&codes)[8]) {
  uint64_t bits = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) bits |= static_cast<uint64_t>(codes[i]) << (E::kBits * i);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)};
}

template <class E>
__device__ __forceinline__ void clamp8(float (&u)[8]) {
  const float max = bits_float(E::kMaxBits);
#pragma unroll
  for (int i = 0; i < 8; ++i) u[i] = fminf(fmaxf(u[i], -max), max);
}

template <class E>
__device__ __forceinline__ Packed8 encode8_nearest(const float (&u)[8]) {
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = encode_nearest<E>(u[i]);
  return pack8<E>(codes);
}

template <>
__device__ __forceinline__ Packed8 encode8_nearest<E2M1>(const float (&u)[8]) {
  return {e2m1_nearest8(u, float_bits(1.0f)), 0};
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890

// By conversion to FP8; saturates.
template <class E>
__device__ __forceinline__ uint32_t convert4(float a, float b, float c, float d) {
  static_assert(E::kBits == 8 && (E::kManBits == 3 || E::kManBits == 2), "E4M3 or E5M2");
  if (E::kManBits == 3)
    return ptx::cvt_rn_satfinite_e4m3x2(a, b) | ptx::cvt_rn_satfinite_e4m3x2(c, d) << 16;
  return ptx::cvt_rn_satfinite_e5m2x2(a, b) | ptx::cvt_rn_satfinite_e5m2x2(c, d) << 16;
}

template <>
__device__ __forceinline__ Packed8 encode8_nearest<E4M3>(const float (&u)[8]) {
  return {convert4<E4M3>(u[0], u[1], u[2], u[3]), convert4<E4M3>(u[4], u[5], u[6], u[7])};
}

template <>
__device__ __forceinline__ Packed8 encode8_nearest<E5M2>(const float (&u)[8]) {
  return {convert4<E5M2>(u[0], u[1], u[2], u[3]), convert4<E5M2>(u[4], u[5], u[6], u[7])};
}

// The 6-bit formats have the mantissas of these two: with the smallest normal moved to theirs, the
// magnitude codes are the same, as far as 6 bits reach. u is limited already.
template <class E, class Wide>
__device__ __forceinline__ Packed8 encode8_nearest_6bit(const float (&u)[8]) {
  static_assert(E::kBits == 6 && E::kManBits == Wide::kManBits, "the same grid");
  const float move = power_of_two(Wide::kEmin - E::kEmin);
  uint32_t w[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t c = convert4<Wide>(u[4 * h] * move, u[4 * h + 1] * move, u[4 * h + 2] * move,
                                u[4 * h + 3] * move);
    c = ptx::lop3_select(c, c >> 2, 0x1F1F1F1Fu);  // the sign to bit 5; garbage above
    c = (c & 0x003F003Fu) | (c >> 2 & 0x0FC00FC0u);
    w[h] = (c & 0xFFFu) | (c >> 4 & 0xFFF000u);
  }
  return {w[0] | w[1] << 24, w[1] >> 8};
}

template <>
__device__ __forceinline__ Packed8 encode8_nearest<E2M3>(const float (&u)[8]) {
  return encode8_nearest_6bit<E2M3, E4M3>(u);
}

template <>
__device__ __forceinline__ Packed8 encode8_nearest<E3M2>(const float (&u)[8]) {
  return encode8_nearest_6bit<E3M2, E5M2>(u);
}

#endif

template <class E>
__device__ __forceinline__ Packed8 encode8_stochastic(const float (&u)[8], const Philox4& draws) {
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = encode_stochastic_fast<E>(u[i], draws, i);
  return pack8<E>(codes);
}

template <>
__device__ __forceinline__ Packed8 encode8_stochastic<E2M1>(const float (&u)[8],
                                                            const Philox4& draws) {
  return {e2m1_stochastic8(u, float_bits(1.0f), draws), 0};
}

template <class E>
__device__ __forceinline__ Packed8 encode8_toward(const float (&u)[8], const float (&z)[8]) {
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = encode_toward<E>(u[i], z[i]);
  return pack8<E>(codes);
}

}  // namespace mxtrain::cuda
