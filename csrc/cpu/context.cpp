// SPDX-License-Identifier: Apache-2.0
// RMSNorm and SwiGLU on the CPU, forward and backward, and the int10_group contexts that they keep.
// A group of 128 elements of a row at a time; formats/context.h has the arithmetic.
#include "formats/context.h"

#include "cpu/store.h"
#include "cpu/tiles.h"
#include "formats/column_sum.h"

namespace mxtrain::cpu::MXT_ISA {

constexpr int kGroup = kContextGroup;
static_assert(kGroup <= kTileK, "a group is loaded as a row of a tile");

static int smaller(int64_t a, int b) { return static_cast<int>(a < b ? a : b); }

// Zeros stand where nothing exists.
static void load_group(const Source& x, int64_t r, int64_t k, int n, float (&v)[kGroup]) {
  alignas(64) Tile tile;
  load_tile(x, r, k, 1, n, kGroup, tile);
  for (int i = 0; i < kGroup; ++i) v[i] = tile[0][i];
}

// The weight's elements, or ones where there is none.
static void load_weight(const Source& w, int64_t k, int n, float (&v)[kGroup]) {
  if (w.data) return load_group(w, 0, k, n, v);
  for (int i = 0; i < kGroup; ++i) v[i] = 1.0f;
}

static float sum_group(const float (&v)[kGroup]) {
  float sums[kContextLanes];
  for (int i = 0; i < kContextLanes; ++i) {
    sums[i] = 0.0f;
    for (int j = 0; j < kContextRun; ++j) sums[i] += v[i * kContextRun + j];
  }
  for (int left = kContextLanes / 2; left > 0; left /= 2)
    for (int i = 0; i < left; ++i) sums[i] = sums[2 * i] + sums[2 * i + 1];
  return sums[0];
}

// ---- contexts ----

static void compress(const float (&v)[kGroup], const ContextPlanes& c, int64_t r, int64_t k,
                     int64_t kp) {
  uint32_t amax = 0;
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t a = float_bits(v[i]) & ~kSignBit;
    amax = a > amax ? a : amax;
  }
  const Int8Scale s = context_scale(amax);
  const int64_t at = r * kp + k;
  c.scale[at / kGroup] = s.scale;
  uint32_t codes[kGroup];
  if (amax < kInfBits)
    for (int i = 0; i < kGroup; ++i) codes[i] = context_code(v[i], s.reciprocal);
  else
    memset(codes, 0, sizeof codes);
  for (int i = 0; i < kGroup; ++i) c.high[at + i] = context_high(codes[i]);
  for (int i = 0; i < kGroup; i += 4)
    c.low[(at + i) / 4] =
        static_cast<uint8_t>(context_low(codes[i]) | context_low(codes[i + 1]) << 2 |
                             context_low(codes[i + 2]) << 4 | context_low(codes[i + 3]) << 6);
}

static void expand(const ContextPlanes& c, int64_t r, int64_t k, int64_t kp, float (&v)[kGroup]) {
  const int64_t at = r * kp + k;
  const float scale = c.scale[at / kGroup];
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t low = (c.low[(at + i) / 4] >> (i % 4 * 2)) & 3u;
    v[i] = scale * context_integer(c.high[at + i], low);
  }
}

// ---- RMSNorm ----

void rms_norm_forward(const RmsNormParams& p, int64_t row_begin, int64_t row_end) {
  alignas(64) float v[kGroup], w[kGroup];
  for (int64_t r = row_begin; r < row_end; ++r) {
    float total = 0.0f;
    for (int64_t k = 0; k < p.cols; k += kGroup) {
      load_group(p.x, r, k, smaller(p.cols - k, kGroup), v);
      if (p.context.high) compress(v, p.context, r, k, p.kp);
      for (int i = 0; i < kGroup; ++i) v[i] *= v[i];
      total += sum_group(v);
    }
    const float rstd = norm_rstd(total, static_cast<float>(p.cols), p.eps);
    if (p.rstd) p.rstd[r] = rstd;
    for (int64_t k = 0; k < p.cols; k += kGroup) {
      const int n = smaller(p.cols - k, kGroup);
      load_group(p.x, r, k, n, v);
      load_weight(p.weight, k, n, w);
      for (int i = 0; i < kGroup; ++i) v[i] = v[i] * rstd * w[i];
      store(p.out_type, v, n, p.out, r * p.cols + k);
    }
  }
}

// xn = value * rstd and wd = dy * w of a group.
struct NormGroup {
  float xn[kGroup], dy[kGroup], wd[kGroup];
};

static void load_norm_group(const RmsNormParams& p, int64_t r, int64_t k, int n, NormGroup& g) {
  expand(p.context, r, k, p.kp, g.xn);
  load_group(p.x, r, k, n, g.dy);
  load_weight(p.weight, k, n, g.wd);
  const float rstd = p.rstd[r];
  for (int i = 0; i < kGroup; ++i) g.xn[i] *= rstd;
  for (int i = 0; i < kGroup; ++i) g.wd[i] = g.dy[i] * g.wd[i];
}

void rms_norm_backward(const RmsNormParams& p, int64_t run_begin, int64_t run_end) {
  alignas(64) NormGroup g;
  alignas(64) float v[kGroup];
  for (int64_t run = run_begin; run < run_end; ++run) {
    float* sums = p.sums ? p.sums + run * p.cols : nullptr;
    if (sums) memset(sums, 0, p.cols * sizeof(float));
    const int64_t first = run * kSumRows, end = first + smaller(p.rows - first, kSumRows);
    for (int64_t r = first; r < end; ++r) {
      float total = 0.0f;
      for (int64_t k = 0; k < p.cols; k += kGroup) {
        load_norm_group(p, r, k, smaller(p.cols - k, kGroup), g);
        for (int i = 0; i < kGroup; ++i) v[i] = g.wd[i] * g.xn[i];
        total += sum_group(v);
      }
      const float c = total / static_cast<float>(p.cols), rstd = p.rstd[r];
      for (int64_t k = 0; k < p.cols; k += kGroup) {
        const int n = smaller(p.cols - k, kGroup);
        load_norm_group(p, r, k, n, g);
        for (int i = 0; i < kGroup; ++i) v[i] = (g.wd[i] - g.xn[i] * c) * rstd;
        store(p.out_type, v, n, p.out, r * p.cols + k);
        if (sums)
          for (int i = 0; i < n; ++i) sums[k + i] += g.dy[i] * g.xn[i];
      }
    }
  }
}

// ---- SwiGLU ----

void swiglu_forward(const SwigluParams& p, int64_t row_begin, int64_t row_end) {
  alignas(64) float g[kGroup], u[kGroup];
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int64_t k = 0; k < p.cols; k += kGroup) {
      const int n = smaller(p.cols - k, kGroup);
      load_group(p.gate, r, k, n, g);
      load_group(p.up, r, k, n, u);
      if (p.gate_context.high) {
        compress(g, p.gate_context, r, k, p.kp);
        compress(u, p.up_context, r, k, p.kp);
      }
      for (int i = 0; i < kGroup; ++i) g[i] = g[i] * sigmoid(g[i]) * u[i];
      store(p.out_type, g, n, p.out, r * p.cols + k);
    }
}

void swiglu_backward(const SwigluParams& p, int64_t row_begin, int64_t row_end) {
  alignas(64) float g[kGroup], u[kGroup], dh[kGroup];
  for (int64_t r = row_begin; r < row_end; ++r)
    for (int64_t k = 0; k < p.cols; k += kGroup) {
      const int n = smaller(p.cols - k, kGroup);
      expand(p.gate_context, r, k, p.kp, g);
      expand(p.up_context, r, k, p.kp, u);
      load_group(p.dh, r, k, n, dh);
      for (int i = 0; i < kGroup; ++i) {
        const SwigluGrad d = swiglu_grad(dh[i], g[i], u[i]);
        g[i] = d.gate;
        u[i] = d.up;
      }
      store(p.out_type, g, n, p.out, r * 2 * p.cols + k);
      store(p.out_type, u, n, p.out, (r * 2 + 1) * p.cols + k);
    }
}

}  // namespace mxtrain::cpu::MXT_ISA
