// SPDX-License-Identifier: Apache-2.0
// int10_group, in which the inputs of non-linear operators are kept for backward: signed 10-bit
// codes in [-511, 511] that share a float32 scale in groups of 128 along a row.
//
//   s = max(amax / 511, 2^-126), 0 for a group of zeros    code = round(x * (1 / s))    value = s q
//
// A code is 4 high + low: `high`, int8, in one plane, and `low`, two bits, in another, where byte j
// of a row has those of elements 4 j to 4 j + 3 from its lowest bits on. 1.25 bytes an element and
// 4 a group. Rows end in a whole group, the tail zero. A group with NaN or Inf has the scale NaN
// and codes of zero.
//
// And the arithmetic of those operators, in float32, one operation after the other unless `fused`:
//   RMSNorm   mean = sum x^2 / F    rstd = 1 / sqrt(mean + eps)    y = (x * rstd) * w
//             with xn = value * rstd, wd = dy * w, c = (sum wd * xn) / F:
//             dx = (wd - xn * c) * rstd    dw = column_sum(dy * xn)
//   SwiGLU    h = (g * s) * u, s = sigmoid(g)
//             du = dh * (g * s)    dg = (dh * u) * (s + (g * s) * (1 - s))
// Sums over a row: 8 consecutive elements after one another, from +0; the 16 sums of a group in
// pairs of neighbours, then pairs of those, until one is left; those of the groups after one
// another.
#pragma once

#include "formats/int8.h"
#if defined(__CUDACC__)
#include "ptx/rcp.cuh"
#endif

namespace mxtrain {

constexpr int kContextGroup = 128;
constexpr int kContextRun = 8;                              // elements of a sum, one after another
constexpr int kContextLanes = kContextGroup / kContextRun;  // sums of a group, in pairs
constexpr float kContextMax = 511.0f;
constexpr int64_t kNormMaxCols = 16384;  // what the kernels of RMSNorm hold of a row

MXT_HD Int8Scale context_scale(uint32_t amax_bits) { return integer_scale(amax_bits, kContextMax); }

// x * reciprocal + kInt8Magic, whose low 10 bits are the code.
MXT_HD uint32_t context_code(float x, float reciprocal) {
  return float_bits(int8_nearest(x * reciprocal));
}
MXT_HD int8_t context_high(uint32_t code) { return static_cast<int8_t>((code >> 2) & 0xFFu); }
MXT_HD uint32_t context_low(uint32_t code) { return code & 3u; }
MXT_HD float context_integer(int8_t high, uint32_t low) {
  return static_cast<float>(4 * high + static_cast<int32_t>(low));
}

// ---- RMSNorm ----

MXT_HD float norm_rstd(float sum_of_squares, float cols, float eps) {
  return 1.0f / sqrtf(sum_of_squares / cols + eps);
}

// ---- SwiGLU ----

constexpr float kSigmoidEnd = 87.0f;  // exp of it, and one over that, are normal numbers

// 1 / v, correctly rounded, for v in [2^-125, 2^126): what the compiler makes of a division for
// such v, without its branch for the others.
MXT_HD float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
  const float near = ptx::rcp_approx_ftz_f32(v);
  return __fmaf_rn(near, -__fmaf_rn(near, v, -1.0f), near);
#else
  return 1.0f / v;
#endif
}

// 1 / (1 + exp(-x)), to some 2^-22 relative; 0 below -87. NaN may give anything.
MXT_HD float sigmoid(float x) {
  constexpr float kLog2E = 0x1.715476p+0f, kLn2High = 0x1.62e430p-1f, kLn2Low = -0x1.05c610p-29f;
  // exp(r) = 1 + r + r^2 (P[0] + P[1] r + ...) for |r| <= ln(2) / 2, to 3.1e-9 before rounding.
  constexpr float P[5] = {0x1.fffffcp-2f, 0x1.555490p-3f, 0x1.5558f8p-5f, 0x1.123b02p-7f,
                          0x1.6a2256p-10f};
  float a = -x < kSigmoidEnd ? -x : kSigmoidEnd;
  a = a > -kSigmoidEnd ? a : -kSigmoidEnd;
  const float shifted = fused(a, kLog2E, kInt8Magic), n = shifted - kInt8Magic;
  const float r = fused(n, -kLn2Low, fused(n, -kLn2High, a));
  float p = P[4];
  p = fused(p, r, P[3]);
  p = fused(p, r, P[2]);
  p = fused(p, r, P[1]);
  p = fused(p, r, P[0]);
  p = fused(p, r, 1.0f);
  p = fused(p, r, 1.0f);
  const float e = bits_float(float_bits(p) + (float_bits(shifted) << 23));  // p * 2^n
  return x < -kSigmoidEnd ? 0.0f : reciprocal(1.0f + e);
}

struct SwigluGrad {
  float gate, up;
};
MXT_HD SwigluGrad swiglu_grad(float dh, float g, float u) {
  const float s = sigmoid(g), silu = g * s;
  return {(dh * u) * (s + silu * (1.0f - s)), dh * silu};
}

}  // namespace mxtrain
