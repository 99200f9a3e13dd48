// SPDX-License-Identifier: Apache-2.0
// What rounding did to one element, and how one element moved since the step before. With S the
// scale of the element's block (times nvfp4's tensor scale), v = x * prescale / S its place on the
// grid and q = element * S / prescale what the operand holds of it:
//   statistics   elements, nonfinite, x != 0, (x != 0 and q == 0), |v| > max, x^2, (x - q)^2,
//                confidence
//   movements    (w - w')^2, w'^2, (q - q')^2, q'^2, flips: |q - q'| > max(|q|, |q'|) / 32
// Sums are double and made in kStatisticsParts parts: part p has the groups of 8 consecutive
// elements of a row, numbered row by row, from p * groups / parts on. A block whose scale is NaN
// counts as nonfinite alone.
#pragma once

#include "formats/block.h"

namespace mxtrain {

constexpr int kStatisticsParts = 128;
constexpr int kStatistics = 8;
constexpr int kMovements = 5;

// The planes of the state of oscillation_step_, each [rows, cols] float32.
enum StatePlane : int { kPreviousW, kPreviousQ, kTravelW, kTravelQ, kFlips, kStatePlanes };

MXT_HD float magnitude_of(float v) { return bits_float(float_bits(v) & ~kSignBit); }
MXT_HD bool is_finite(float v) { return (float_bits(v) & ~kSignBit) < kInfBits; }

// Distance of |v| to the nearest rounding threshold, over the largest one in its cell. Cells end
// halfway to the neighbours, that of the largest element at it.
template <class E>
MXT_HD float confidence(float v) {
  const float a = limit<E>(magnitude_of(v));
  const uint32_t code = encode_nearest<E>(a);
  const float at = decode<E>(code);
  const float below = 0.5f * (code == 0 ? -decode<E>(1) : decode<E>(code - 1) + at);
  if (code == E::kMaxCode) return (a - below) / (at - below);
  const float above = 0.5f * (at + decode<E>(code + 1));
  const float low = a - below, high = above - a;
  return (low < high ? low : high) / (0.5f * (above - below));
}

template <class F>
MXT_HD float block_scale_value(uint8_t code, float tensor_scale) {
  return F::kE4M3Scale ? decode<E4M3>(code) * tensor_scale : e8m0_value(code);
}

template <class F>
MXT_HD void add_statistics(float x, uint32_t code, float scale, float prescale,
                           double (&sums)[kStatistics]) {
  using E = typename F::Element;
  if (!is_finite(scale)) {
    sums[1] += 1.0;
    return;
  }
  const float q = decode<E>(code) * scale / prescale;
  const float v = scale == 0.0f ? 0.0f : x * prescale / scale;
  const double error = static_cast<double>(x - q);
  sums[0] += 1.0;
  sums[2] += x != 0.0f ? 1.0 : 0.0;
  sums[3] += x != 0.0f && q == 0.0f ? 1.0 : 0.0;
  sums[4] += magnitude_of(v) > bits_float(E::kMaxBits) ? 1.0 : 0.0;
  sums[5] += static_cast<double>(x) * static_cast<double>(x);
  sums[6] += error * error;
  sums[7] += static_cast<double>(confidence<E>(v));
}

// state: of the element, its planes `plane` floats apart.
MXT_HD void add_movement(float w, float q, float* state, int64_t plane,
                         double (&sums)[kMovements]) {
  const float w0 = state[kPreviousW * plane], q0 = state[kPreviousQ * plane];
  if (is_finite(w) && is_finite(q) && is_finite(w0) && is_finite(q0)) {
    const float dw = magnitude_of(w - w0), dq = magnitude_of(q - q0);
    const float a = magnitude_of(q), b = magnitude_of(q0);
    const bool flips = dq > (a > b ? a : b) / 32.0f;
    state[kTravelW * plane] += dw;
    state[kTravelQ * plane] += dq;
    if (flips) state[kFlips * plane] += 1.0f;
    sums[0] += static_cast<double>(dw) * static_cast<double>(dw);
    sums[1] += static_cast<double>(w0) * static_cast<double>(w0);
    sums[2] += static_cast<double>(dq) * static_cast<double>(dq);
    sums[3] += static_cast<double>(q0) * static_cast<double>(q0);
    sums[4] += flips ? 1.0 : 0.0;
  }
  state[kPreviousW * plane] = w;
  state[kPreviousQ * plane] = q;
}

// Bytes of one group of 8 codes, which start at a whole byte in every format; code i of them.
template <class F>
MXT_HD uint64_t load_codes(const uint8_t* p) {
  uint64_t w = 0;
  for (int i = 0; i < F::kBits; ++i) w |= static_cast<uint64_t>(p[i]) << (8 * i);
  return w;
}
template <class F>
MXT_HD uint32_t code_of(uint64_t codes, int i) {
  return static_cast<uint32_t>(codes >> (F::kBits * i)) & ((1u << F::kBits) - 1);
}

}  // namespace mxtrain
