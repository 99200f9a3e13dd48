// SPDX-License-Identifier: Apache-2.0
// One optimizer step over one tensor: AdamW or Q-Ramping (optim/adamw.h), the average of the
// weights and the sums of their changes. Work is blocks of 32 elements along rows of t.cols, the
// last of a row ragged; the caller gives a range of them.
#include "cpu/kernels.h"

namespace mxtrain::cpu::MXT_ISA {

constexpr int kWidth = Mxfp4::kBlock;
using Floats = float[kWidth];

static void load(const void* from, bool bf16, int64_t at, int n, Floats& v) {
  const auto* floats = static_cast<const float*>(from) + at;
  const auto* halves = static_cast<const uint16_t*>(from) + at;
  for (int i = 0; i < n; ++i) v[i] = bf16 ? bf16_to_float(halves[i]) : floats[i];
  for (int i = n; i < kWidth; ++i) v[i] = 0.0f;
}

static void store(float* to, int64_t at, int n, const Floats& v) {
  for (int i = 0; i < n; ++i) to[at + i] = v[i];
}

// bfloat16: w becomes what is stored.
static void store_weights(const AdamwParams& p, int64_t at, int n, Floats& w) {
  if (!p.t.bf16) return store(static_cast<float*>(p.t.param), at, n, w);
  auto* out = static_cast<uint16_t*>(p.t.param) + at;
  Philox4 words = {};
  for (int i = 0; i < n; ++i) {
    const int64_t draw = (at + i) % kDrawQuarter;
    if (p.stochastic && (i == 0 || draw == 0))
      words = philox_quarter(p.key, static_cast<uint64_t>((at + i) / kDrawQuarter));
    out[i] = p.stochastic ? float_to_bf16_stochastic(w[i], draw16(words, static_cast<int>(draw)))
                          : float_to_bf16(w[i]);
    w[i] = bf16_to_float(out[i]);
  }
}

template <class Count>
static void ramp(const AdamwParams& p, int64_t at, int n, const Floats& g, Floats& w, Floats& m,
                 Floats& v) {
  auto* counts = static_cast<Count*>(p.t.count) + at;
  const auto* periods = static_cast<const Count*>(p.t.period) + at;
  float* sums = p.t.grad_sum + at;
  for (int i = 0; i < n; ++i) {
    int count = counts[i];
    ramped_update(g[i], p.finite, periods[i], p.factors, w[i], m[i], v[i], sums[i], count);
    counts[i] = static_cast<Count>(count);
  }
}

static uint32_t max_bits(const Floats& v) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t b = float_bits(v[i]) & ~kSignBit;
    bits = b > bits ? b : bits;
  }
  return bits;
}

static void add_changes(const AdamwParams& p, int64_t at, int n, const Floats& w, const Floats& e,
                        const Floats& after, const Floats& e_after) {
  const uint32_t bits = max_bits(w), e_bits = max_bits(e);
  const uint32_t bits_after = max_bits(after), e_bits_after = max_bits(e_after);
  for (int i = 0; i < n; ++i) {
    const float q = quantized_weight(w[i], e[i], bits, e_bits, p.quantizer);
    const float r = quantized_weight(after[i], e_after[i], bits_after, e_bits_after, p.quantizer);
    p.t.weight_change[at + i] += fabsf(after[i] - w[i]);
    p.t.quantized_change[at + i] += fabsf(r - q);
  }
}

static void update_block(const AdamwParams& p, int64_t at, int n) {
  const AdamwTensor& t = p.t;
  Floats w, g, m, v, e = {}, after, e_after = {};
  load(t.param, t.bf16, at, n, w);
  load(t.grad, t.bf16, at, n, g);
  load(t.exp_avg, false, at, n, m);
  load(t.exp_avg_sq, false, at, n, v);
  for (int i = 0; i < kWidth; ++i) after[i] = w[i];
  if (t.ramped && t.wide) ramp<int16_t>(p, at, n, g, after, m, v);
  if (t.ramped && !t.wide) ramp<uint8_t>(p, at, n, g, after, m, v);
  if (!t.ramped)
    for (int i = 0; i < kWidth; ++i) adamw_update(g[i], p.factors, after[i], m[i], v[i]);
  for (int i = n; i < kWidth; ++i) after[i] = 0.0f;
  store_weights(p, at, n, after);
  store(t.exp_avg, at, n, m);
  store(t.exp_avg_sq, at, n, v);
  if (t.ema) {
    load(t.ema, false, at, n, e);
    for (int i = 0; i < kWidth; ++i) e_after[i] = lerp(e[i], after[i], t.ema_weight);
    store(t.ema, at, n, e_after);
  }
  if (t.statistics) add_changes(p, at, n, w, e, after, e_after);
}

void adamw(const AdamwParams& p, int64_t block_begin, int64_t block_end) {
  const int64_t cols = p.t.cols, blocks = (cols + kWidth - 1) / kWidth;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t col = block % blocks * kWidth, left = cols - col;
    update_block(p, block / blocks * cols + col, static_cast<int>(left < kWidth ? left : kWidth));
  }
}

}  // namespace mxtrain::cpu::MXT_ISA
