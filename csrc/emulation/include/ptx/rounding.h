// SPDX-License-Identifier: Apache-2.0
// Small floats for the emulated instructions (csrc/emulation/emulation.h), by double and apart from
// csrc/formats, which the instructions are tested against. A format has an exponent of bias 1 -
// kEmin and kManBits of mantissa, subnormals kept.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace mxtrain::emulation {

inline uint64_t double_bits(double v) {
  uint64_t b;
  memcpy(&b, &v, sizeof b);
  return b;
}
inline double bits_double(uint64_t b) {
  double v;
  memcpy(&v, &b, sizeof v);
  return v;
}
inline double power(int e) { return bits_double(static_cast<uint64_t>(e + 1023) << 52); }

struct Half {
  static constexpr int kManBits = 10, kEmin = -14;
  static constexpr uint32_t kInf = 0x7C00, kNan = 0x7FFF;
};
struct Bfloat {
  static constexpr int kManBits = 7, kEmin = -126;
  static constexpr uint32_t kInf = 0x7F80, kNan = 0x7FFF;
};
struct Fp8E4 {
  static constexpr int kManBits = 3, kEmin = -6;
};
struct Fp8E5 {
  static constexpr int kManBits = 2, kEmin = -14;
};

// The code of |v|, finite, rounded to nearest even, as if exponents had no end.
template <class F>
uint32_t round_magnitude(double v) {
  v = std::fabs(v);
  const int e = static_cast<int>(double_bits(v) >> 52) - 1023, binade = e < F::kEmin ? F::kEmin : e;
  const double step = power(binade - F::kManBits), magic = step * 0x1.8p52;
  const uint32_t steps = static_cast<uint32_t>(((v + magic) - magic) / step);
  return (static_cast<uint32_t>(binade - F::kEmin) << F::kManBits) + steps;
}

// The 16-bit formats.
template <class F>
double widen(uint32_t h) {
  const uint32_t code = h & 0x7FFF, e = code >> F::kManBits, m = code & ((1u << F::kManBits) - 1);
  double v = m * power(F::kEmin - F::kManBits);
  if (e != 0) v = (m + (1u << F::kManBits)) * power(F::kEmin - F::kManBits + static_cast<int>(e) - 1);
  if (code >= F::kInf) v = code == F::kInf ? INFINITY : NAN;
  return h & 0x8000 ? -v : v;
}

template <class F>
uint32_t narrow(double v) {
  if (v != v) return F::kNan;
  uint32_t code = std::isinf(v) ? F::kInf : round_magnitude<F>(v);
  if (code > F::kInf) code = F::kInf;
  return code | (std::signbit(v) ? 0x8000u : 0u);
}

// The 8-bit formats, saturating.
template <class F>
uint32_t narrow_satfinite(float v, uint32_t largest) {
  if (v != v) return 0x7F;
  uint32_t code = std::isinf(v) ? largest : round_magnitude<F>(v);
  if (code > largest) code = largest;
  return code | (std::signbit(v) ? 0x80u : 0u);
}

// a * b + c for rounding to at most 24 bits: rounded to odd, which keeps on which side it lies.
// a * b is exact.
inline double fused_to_odd(double a, double b, double c) {
  const double x = a * b, sum = x + c, part = sum - x;
  const double rest = (x - (sum - part)) + (c - part);
  if (!std::isfinite(sum) || rest == 0 || double_bits(sum) & 1) return sum;
  return bits_double(double_bits(sum) + ((rest > 0) == (sum > 0) ? 1 : -1));
}

// The larger or the smaller of two halves: of a number and a NaN the number, or with kNanWins a
// NaN; of two zeros by their sign.
template <class F, bool kLarger, bool kNanWins>
uint32_t pick(uint32_t a, uint32_t b) {
  const bool a_nan = (a & 0x7FFF) > F::kInf, b_nan = (b & 0x7FFF) > F::kInf;
  if ((a_nan && b_nan) || (kNanWins && (a_nan || b_nan))) return F::kNan;
  if (a_nan || b_nan) return a_nan ? b : a;
  const auto rank = [](uint32_t h) { return h & 0x8000 ? 0x7FFF - static_cast<int>(h & 0x7FFF) : static_cast<int>(h | 0x8000); };
  return (rank(a) > rank(b)) == kLarger ? a : b;
}

// Of both halves of words.
template <class Op>
uint32_t each_half(uint32_t a, uint32_t b, Op op) {
  return op(a & 0xFFFF, b & 0xFFFF) | op(a >> 16, b >> 16) << 16;
}

}  // namespace mxtrain::emulation
