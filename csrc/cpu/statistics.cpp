// SPDX-License-Identifier: Apache-2.0
// quantization_statistics and oscillation_step_ on the CPU: one part of the sums a call. The
// arithmetic is that of formats/statistics.h.
#include "formats/statistics.h"

#include "cpu/kernels.h"
#include "formats/float16.h"

namespace mxtrain::cpu::MXT_ISA {

static float load_one(const Source& x, int64_t r, int64_t k) {
  const int64_t at = r * x.stride_row + k * x.stride_col;
  if (x.type == SourceType::kFloat32) return static_cast<const float*>(x.data)[at];
  const uint16_t h = static_cast<const uint16_t*>(x.data)[at];
  return x.type == SourceType::kBfloat16 ? bf16_to_float(h) : half_to_float(h);
}

// f(value of x, code, scale, row, column) for every element of the part.
template <class F, class Visit>
static void visit_part(const StatisticsParams& p, int64_t part, const Visit& f) {
  const int64_t per_row = (p.cols + 7) / 8, groups = p.rows * per_row;
  const int64_t end = (part + 1) * groups / kStatisticsParts;
  for (int64_t g = part * groups / kStatisticsParts; g < end; ++g) {
    const int64_t r = g / per_row, k0 = g % per_row * 8;
    const uint64_t codes = load_codes<F>(p.data + r * p.data_cols + k0 * F::kBits / 8);
    const float scale =
        block_scale_value<F>(p.scale[r * p.scale_cols + k0 / F::kBlock], p.tensor_scale);
    for (int i = 0; i < 8 && k0 + i < p.cols; ++i)
      f(load_one(p.x, r, k0 + i), code_of<F>(codes, i), scale, r, k0 + i);
  }
}

template <class F>
static void part_of(const StatisticsParams& p, int64_t part) {
  if (p.state == nullptr) {
    double sums[kStatistics] = {};
    visit_part<F>(p, part, [&](float x, uint32_t code, float scale, int64_t, int64_t) {
      add_statistics<F>(x, code, scale, p.prescale, sums);
    });
    for (int i = 0; i < kStatistics; ++i) p.sums[part * kStatistics + i] = sums[i];
    return;
  }
  double sums[kMovements] = {};
  const int64_t plane = p.rows * p.cols;
  visit_part<F>(p, part, [&](float w, uint32_t code, float scale, int64_t r, int64_t k) {
    const float q = decode<typename F::Element>(code) * scale;
    add_movement(w, q, p.state + r * p.cols + k, plane, sums);
  });
  for (int i = 0; i < kMovements; ++i) p.sums[part * kMovements + i] = sums[i];
}

void statistics(const StatisticsParams& p, int64_t part) {
  using Part = void (*)(const StatisticsParams&, int64_t);
#define MXT_ROW(code, traits, name) part_of<traits>,
  static constexpr Part kParts[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  kParts[p.format](p, part);
}

}  // namespace mxtrain::cpu::MXT_ISA
