// SPDX-License-Identifier: Apache-2.0
// The element encoders of csrc/formats/elements.h in the fewest GPU instructions; the same codes,
// which the tests compare over every bfloat16 value. A magnitude a is moved to b = a + max(a,
// 2^emin): subnormals become fixed point in one binade and every other binade moves up by one, so
// that b's bits above the cut at bit 23 - kManBits are the code, and one integer add of the draw
// rounds. b is rounded up (fadd.ru): the draw's thresholds lie on b's grid, so a > threshold
// survives, exactly.
#pragma once

#include "formats/block.h"
#include "random/philox.h"

namespace mxtrain::cuda {

template <class E>
struct EncodeTraits {
  static constexpr int kCut = 23 - E::kManBits;
  static constexpr uint32_t kFirst = static_cast<uint32_t>(E::kEmin + 127)
                                     << E::kManBits;  // b's field of code 0
  static constexpr uint32_t kDrawStep =
      1u << (7 - E::kManBits);  // one unit of the 16-bit draw, below the cut
  // up <=> fraction field > (2 draw + 1) * kDrawStep / 2, as a carry: field + kCarry - draw *
  // kDrawStep reaches the cut.
  static constexpr uint32_t kCarry = (1u << kCut) - 1 - kDrawStep / 2;
  static_assert(E::kManBits <= 6,
                "the draw's thresholds must be whole units of b's last mantissa bit");
};

// v limited to the element's maximum already where clamp is false. Code in the low bits, sign at
// bit kBits - 1.
template <class E>
__device__ __forceinline__ uint32_t encode_stochastic_fast(float v, uint32_t draw) {
  using T = EncodeTraits<E>;
  const float a = fabsf(v);
  const float b = __fadd_ru(a, fmaxf(a, power_of_two(E::kEmin)));
  const uint32_t sum = float_bits(b) + (T::kCarry - draw * T::kDrawStep);
  return with_sign<E>((sum >> T::kCut) - T::kFirst, v);
}

// One E2M1 code into the top nibble of a word, for funnel shifts; the rest of the word is garbage.
__device__ __forceinline__ uint32_t top_nibble(uint32_t code_at_cut, float v) {
  // code_at_cut holds the magnitude in bits 22..24 and zero in bit 25.
  const uint32_t t = code_at_cut << 6;
  return (float_bits(v) & kSignBit) | (t & ~kSignBit);
}

__device__ __forceinline__ uint32_t e2m1_stochastic_at_cut(float v, uint32_t draw) {
  using T = EncodeTraits<E2M1>;
  const float a = fabsf(v);
  const float b = __fadd_ru(a, fmaxf(a, 1.0f));
  // b's field of code 0 is 254: two more make the low nibble of the field the code itself.
  return float_bits(b) + (T::kCarry + (2u << T::kCut) - draw * T::kDrawStep);
}

__device__ __forceinline__ uint32_t e2m1_nearest_at_cut(float v) {
  const float a = fabsf(v);
  const uint32_t binade = float_bits(fmaxf(a, 1.0f)) & kInfBits;
  const uint32_t magic = binade + (22u << 23);
  // n + binade / 2^22 is the code + 254; moved to the cut, two more make the low nibble the code.
  return (float_bits(a + bits_float(magic)) - magic + (binade >> 22) + 2u) << 22;
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
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i)
    word = __funnelshift_l(top_nibble(e2m1_nearest_at_cut(u[i]), u[i]), word, 4);
  return {word, 0};
}

template <class E>
__device__ __forceinline__ Packed8 encode8_stochastic(const float (&u)[8], const Philox4& draws) {
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = encode_stochastic_fast<E>(u[i], draw16(draws, i));
  return pack8<E>(codes);
}

template <>
__device__ __forceinline__ Packed8 encode8_stochastic<E2M1>(const float (&u)[8],
                                                            const Philox4& draws) {
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i)
    word =
        __funnelshift_l(top_nibble(e2m1_stochastic_at_cut(u[i], draw16(draws, i)), u[i]), word, 4);
  return {word, 0};
}

template <class E>
__device__ __forceinline__ Packed8 encode8_toward(const float (&u)[8], const float (&z)[8]) {
  uint32_t codes[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = encode_toward<E>(u[i], z[i]);
  return pack8<E>(codes);
}

}  // namespace mxtrain::cuda
