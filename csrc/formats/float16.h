// SPDX-License-Identifier: Apache-2.0
// bfloat16 and IEEE half as uint16 bits, to and from float32. Widening is exact; narrowing rounds
// to nearest, ties to even, overflows to Inf and turns every NaN into the quiet NaN that torch
// writes. Branch-free, so that loops vectorize.
#pragma once

#include "formats/host_device.h"

namespace mxtrain {

MXT_HD float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

MXT_HD uint16_t float_to_bf16(float v) {
  const uint32_t b = float_bits(v);
  const uint32_t rounded = (b + 0x7FFFu + ((b >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((b & ~kSignBit) > kInfBits ? 0x7FC0u : rounded);
}

// Stochastically: up where the 16 bits that are cut off exceed the draw. Finite stays finite.
MXT_HD uint16_t float_to_bf16_stochastic(float v, uint32_t draw) {
  const uint32_t b = float_bits(v), magnitude = b & ~kSignBit, sign = (b >> 16) & 0x8000u;
  const uint32_t up = (magnitude >> 16) + ((b & 0xFFFFu) > draw ? 1u : 0u);
  const uint32_t rounded = magnitude == kInfBits ? 0x7F80u : up > 0x7F7Fu ? 0x7F7Fu : up;
  return static_cast<uint16_t>(magnitude > kInfBits ? 0x7FC0u : rounded | sign);
}

MXT_HD float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7FFFu) << 13;
  uint32_t b = float_bits(bits_float(magnitude) * power_of_two(112));
  b = magnitude >= (0x7C00u << 13) ? (magnitude | kInfBits) : b;
  return bits_float(b | (static_cast<uint32_t>(h & 0x8000u) << 16));
}

MXT_HD uint16_t float_to_half(float v) {
  const uint32_t b = float_bits(v), a = b & ~kSignBit, sign = (b >> 16) & 0x8000u;
  const uint32_t odd = (a >> 13) & 1u;
  const uint32_t normal = (a - (112u << 23) + 0xFFFu + odd) >> 13;
  // Below 2^-14 the grid is 2^-24: adding 1/2 leaves the rounded count in the low mantissa bits.
  const uint32_t subnormal = float_bits(bits_float(a) + 0.5f) - 0x3F000000u;
  uint32_t h = a < (113u << 23) ? subnormal : normal;
  h = a >= 0x477FF000u ? 0x7C00u : h;  // 65520 and above round to Inf
  h = a > kInfBits ? 0x7E00u : h;
  return static_cast<uint16_t>(h | sign);
}

}  // namespace mxtrain
