// SPDX-License-Identifier: Apache-2.0
// Element formats: small floats with a sign bit, kExpBits exponent bits and kManBits mantissa bits.
//
//   value(code) = (-1)^s * 2^(max(E, 1) - kBias) * (m / 2^kManBits + (E > 0))
//
// The grid is n * step with step = 2^(max(exponent(v), kEmin) - kManBits); a magnitude code is
// (exponent - kEmin) * 2^kManBits + n, for subnormals and across binades alike. Encoders take a
// finite value, limit it to kMax (saturation) and keep the sign, also on zero. Zero -> +-0. NaN and
// Inf never reach an encoder: block.h replaces the whole block. Decoders take every code, E4M3's
// NaN and E5M2's Inf and NaN included. Source: OCP MX v1.0, section 5.3. A new element format is
// one more struct below, and a row in the table of block.h.
#pragma once

#include "formats/host_device.h"

namespace mxtrain {

template <int ExpBits, int ManBits, int Bias, uint32_t MaxCode>
struct Minifloat {
  static constexpr int kExpBits = ExpBits;
  static constexpr int kManBits = ManBits;
  static constexpr int kBits = 1 + ExpBits + ManBits;
  static constexpr int kBias = Bias;
  static constexpr int kEmin = 1 - Bias;  // exponent of the smallest normal
  static constexpr int kEmax =
      static_cast<int>(MaxCode >> ManBits) - Bias;  // exponent of the largest value
  static constexpr uint32_t kMaxCode = MaxCode;     // magnitude code of the largest value
  static constexpr uint32_t kMaxMantissa = (MaxCode & ((1u << ManBits) - 1))
                                           << (23 - ManBits);  // as float32 mantissa bits
  static constexpr uint32_t kMaxBits = (static_cast<uint32_t>(kEmax + 127) << 23) | kMaxMantissa;
  static constexpr uint32_t kMagnitudeMask = (1u << (ExpBits + ManBits)) - 1;
  static_assert(kBits <= 8, "a code is stored in at most one byte");
  static_assert(ManBits >= 1 && ManBits <= 10,
                "the rounding below keeps n exact in a float32 mantissa");
};

struct E2M1 : Minifloat<2, 1, 1, 0x07> {};   // max 6
struct E3M2 : Minifloat<3, 2, 3, 0x1F> {};   // max 28
struct E2M3 : Minifloat<2, 3, 1, 0x1F> {};   // max 7.5
struct E4M3 : Minifloat<4, 3, 7, 0x7E> {};   // max 448; 0x7F is NaN, no Inf
struct E5M2 : Minifloat<5, 2, 15, 0x7B> {};  // max 57344; 0x7C is Inf, above NaN

// A magnitude between two grid points: a = (n + fraction) * step.
struct GridPosition {
  uint32_t code;   // magnitude code of the lower neighbour; + 1 is the upper one
  float n;         // whole steps below
  float fraction;  // in [0, 1), exact
  float per_step;  // 1 / step, a power of two
};

template <class E>
MXT_HD float limit(float a) {
  const float max = bits_float(E::kMaxBits);
  return a < max ? a : max;
}

// The binade that sets the grid's step at magnitude a.
template <class E>
MXT_HD int grid_exponent(float a) {
  const int e = static_cast<int>(float_bits(a) >> 23) - 127;
  return e < E::kEmin ? E::kEmin : e;
}

template <class E>
MXT_HD GridPosition locate(float a) {
  a = limit<E>(a);
  const int e = grid_exponent<E>(a);
  GridPosition g;
  g.per_step = power_of_two(E::kManBits - e);
  const float t = a * g.per_step;
  const int n = static_cast<int>(t);
  g.n = static_cast<float>(n);
  g.fraction = t - g.n;
  g.code = (static_cast<uint32_t>(e - E::kEmin) << E::kManBits) + static_cast<uint32_t>(n);
  return g;
}

template <class E>
MXT_HD uint32_t with_sign(uint32_t magnitude, float v) {
  return magnitude | ((float_bits(v) >> 31) << (E::kBits - 1));
}

// Ties to even. Adding 2^23 * step leaves the rounded multiple of step in the low mantissa bits.
template <class E>
MXT_HD uint32_t encode_nearest(float v) {
  const float a = limit<E>(bits_float(float_bits(v) & ~kSignBit));
  const float smallest = power_of_two(E::kEmin);
  const uint32_t binade = float_bits(a > smallest ? a : smallest) & kInfBits;
  const uint32_t magic = binade + (static_cast<uint32_t>(23 - E::kManBits) << 23);
  const uint32_t n = float_bits(a + bits_float(magic)) - magic;
  constexpr uint32_t kFirst = static_cast<uint32_t>(E::kEmin + 127) << E::kManBits;
  return with_sign<E>(n + (binade >> (23 - E::kManBits)) - kFirst, v);
}

// Up if and only if fraction > (draw + 1/2) / 2^16; both sides are exact in float32.
template <class E>
MXT_HD uint32_t encode_stochastic(float v, uint32_t draw16) {
  const GridPosition g = locate<E>(bits_float(float_bits(v) & ~kSignBit));
  const bool up = g.fraction * 131072.0f > static_cast<float>(2 * draw16 + 1);
  return with_sign<E>(g.code + (up ? 1u : 0u), v);
}

// The neighbour of v that is nearer to `toward`, measured on v's side of zero (specs: Q-EMA). A v
// on the grid stays.
template <class E>
MXT_HD uint32_t encode_toward(float v, float toward) {
  const GridPosition g = locate<E>(bits_float(float_bits(v) & ~kSignBit));
  const float z = bits_float(float_bits(toward) ^ (float_bits(v) & kSignBit)) * g.per_step;
  const bool up = g.fraction > 0.0f && z >= g.n + 0.5f;
  return with_sign<E>(g.code + (up ? 1u : 0u), v);
}

template <class E>
MXT_HD float decode(uint32_t code) {
  const uint32_t magnitude = code & E::kMagnitudeMask;
  // The code's fields land on float32's, then one exact multiply moves the bias; float32 subnormals
  // become ours.
  float v = bits_float(magnitude << (23 - E::kManBits)) * power_of_two(127 - E::kBias);
  if (E::kMaxCode < E::kMagnitudeMask) {
    const bool is_inf = E::kExpBits == 5 && magnitude == E::kMaxCode + 1;
    v = magnitude > E::kMaxCode ? bits_float(is_inf ? kInfBits : kNanBits) : v;
  }
  return bits_float(float_bits(v) | (((code >> (E::kBits - 1)) & 1u) << 31));
}

}  // namespace mxtrain
