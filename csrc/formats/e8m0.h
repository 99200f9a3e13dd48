// SPDX-License-Identifier: Apache-2.0
// E8M0 block scales: code c is 2^(c - 127), 255 is NaN (OCP MX v1.0, section 5.4). The scale rules
// read the float32 bits of M = max|block|, never a logarithm:
//   floor   e = E(M) - emax                                        M/S below 2^(emax+1), may clip
//   ceil    e = E(M) - emax + (mantissa(M) > mantissa(max))        the smallest S with M/S <= max,
//   never clips even    e = E(bits(M) + half a unit of the element's last mantissa bit) - emax
// clamped to [-127, 127]. Zero and subnormal M count as E = -127, which the clamp makes exact for
// every format here.
#pragma once

#include "formats/elements.h"

namespace mxtrain {

enum class ScaleRule : int { kFloor = 0, kCeil = 1, kEven = 2 };
constexpr int kScaleRules = 3;

constexpr uint32_t kE8M0Nan = 255;

// A rule as what is added to M's bits before its exponent is read: a carry out of the mantissa is
// the step up.
template <class E>
MXT_HD uint32_t e8m0_round_up(ScaleRule rule) {
  if (rule == ScaleRule::kCeil) return 0x007FFFFFu - E::kMaxMantissa;
  return rule == ScaleRule::kEven ? 1u << (22 - E::kManBits) : 0u;
}

// bits: of a finite M >= 0; round_up: of the rule. Returns the code, in [0, 254].
template <class E>
MXT_HD uint32_t e8m0_scale(uint32_t bits, uint32_t round_up) {
  static_assert(E::kEmax >= 1,
                "no code reaches 255, and the clamp hides the exponents of subnormals");
  const int code = static_cast<int>((bits + round_up) >> 23) - E::kEmax;
  return code < 0 ? 0u : static_cast<uint32_t>(code);
}

// 2^(code - 127) as float32; code 0 is the subnormal 2^-127.
MXT_HD float e8m0_value(uint32_t code) {
  if (code == kE8M0Nan) return bits_float(kNanBits);
  return bits_float(code == 0 ? 0x00400000u : code << 23);
}

// 2^(127 - code), exact in float32 for the codes that e8m0_scale returns (at most 253).
MXT_HD float e8m0_reciprocal(uint32_t code) { return bits_float((254u - code) << 23); }

}  // namespace mxtrain
