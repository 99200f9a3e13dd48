// SPDX-License-Identifier: Apache-2.0
// AdamW (arXiv 1711.05101) and its element-wise gradient-accumulation variant Q-Ramping
// (arXiv 2502.20853), for one element in float32; one source for the CPU and CUDA kernels.
//   p *= 1 - lr wd;   m += (1 - b1)(g - m);   v = b2 v + (1 - b2) g g
//   p += -(lr / (1 - b1^t)) (m / (sqrt(v) / sqrt(1 - b2^t) + eps))
// Where operations are fused (one rounding) is the order of torch's foreach kernels on CUDA, so
// there the result is bitwise that of torch.optim.AdamW. The factors of a step are made in float64.
#pragma once

#include "formats/block.h"
#include "formats/float16.h"

namespace mxtrain {

struct AdamwOptions {
  double lr, beta1, beta2, eps, weight_decay;
};

// One parameter and its state, contiguous, in pointers of the device that runs.
struct AdamwTensor {
  void* param;                              // [n] float32 or bfloat16
  const void* grad;                         // [n], param's type
  float *exp_avg, *exp_avg_sq;              // [n]
  float* ema;                               // [n], or null
  float *weight_change, *quantized_change;  // [n], or null: sums of |w - w'| and |Q(w) - Q(w')|
  float* grad_sum;                          // Q-Ramping: [n]
  void* count;                              // Q-Ramping: [n] uint8 or int16
  const void* period;                       // Q-Ramping: the same
  float* step;                              // [1]
  int64_t n, cols;                          // blocks run along rows of cols; cols == n: no matter
  float ema_weight;                         // ema += ema_weight (w' - ema)
  bool bf16, wide;                          // param's type; whether count and period are int16
  bool statistics, ramped;  // whether it has the sums of changes, or Q-Ramping's state
  bool vector;              // every address of 8 elements is 16-byte aligned
};

// ---- the factors of a step ----

struct AdamwFactors {
  float decay, lerp, beta2, square, step_size, root, eps;
};

// beta^n to twice the precision of a double, so that its double is the one that libm returns.
MXT_HD double power(double beta, uint32_t n) {
  double high = 1.0, low = 0.0, b = beta, b_low = 0.0;
  for (; n; n >>= 1) {
    if (n & 1u) {
      const double p = high * b, e = fma(high, b, -p) + (high * b_low + low * b);
      high = p + e;
      low = e - (high - p);
    }
    const double p = b * b, e = fma(b, b, -p) + 2.0 * (b * b_low);
    b = p + e;
    b_low = e - (b - p);
  }
  return high;
}

// step counts from 1; it is exact in float32 up to 2^24, like torch's.
MXT_HD AdamwFactors adamw_factors(const AdamwOptions& o, float step) {
  const uint32_t n = static_cast<uint32_t>(step);
  const double correction1 = 1.0 - power(o.beta1, n), correction2 = 1.0 - power(o.beta2, n);
  return {static_cast<float>(1.0 - o.lr * o.weight_decay),
          static_cast<float>(1.0 - o.beta1),
          static_cast<float>(o.beta2),
          static_cast<float>(1.0 - o.beta2),
          static_cast<float>(-(o.lr / correction1)),
          static_cast<float>(sqrt(correction2)),
          static_cast<float>(o.eps)};
}

// ---- one element ----

// a + weight (b - a), exact at both ends: torch.lerp.
MXT_HD float lerp(float a, float b, float weight) {
  return weight < 0.5f ? fmaf(weight, b - a, a) : fmaf(weight - 1.0f, b - a, b);
}

MXT_HD void adamw_update(float g, const AdamwFactors& f, float& p, float& m, float& v) {
  m = lerp(m, g, f.lerp);
  v = fmaf(f.square, g * g, v * f.beta2);
  p = fmaf(f.step_size, m / (sqrtf(v) / f.root + f.eps), p * f.decay);
}

// Every period-th step takes the mean of the gradients since the last one, times as large a step.
MXT_HD void ramped_update(float g, bool finite, int period, const AdamwFactors& f, float& p,
                          float& m, float& v, float& sum, int& count) {
  count += 1;
  if (finite) sum += g;
  if (period > 1 && count % period != 0) {
    p *= f.decay;
    return;
  }
  AdamwFactors longer = f;
  longer.step_size *= static_cast<float>(count);
  adamw_update(sum / static_cast<float>(count), longer, p, m, v);
  sum = 0.0f;
  count = 0;
}

// ---- oscillation statistics ----

// How weights are quantized to mxfp4 in the forward pass: the numbers of e8m0_round_up, and whether
// they round toward their average.
struct WeightQuantizer {
  uint32_t round_up;
  bool toward;
};

// Q(w) of an element of a block whose largest |w| has these bits (with those of the average where
// it rounds toward it, so that a non-finite block is NaN).
MXT_HD float quantized_weight(float w, float average, uint32_t max_bits, uint32_t average_bits,
                              const WeightQuantizer& q) {
  using E = Mxfp4::Element;
  if (max_bits >= kInfBits || (q.toward && average_bits >= kInfBits)) return bits_float(kNanBits);
  const uint32_t scale = e8m0_scale<E>(max_bits, q.round_up);
  const float reciprocal = e8m0_reciprocal(scale);
  const uint32_t code = q.toward ? encode_toward<E>(w * reciprocal, average * reciprocal)
                                 : encode_nearest<E>(w * reciprocal);
  return decode<E>(code) * e8m0_value(scale);
}

}  // namespace mxtrain
