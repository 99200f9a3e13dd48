// SPDX-License-Identifier: Apache-2.0
// quantize, quantize_dual and requantize on the CPU: check, allocate, split tiles over torch's
// threads.
#include <algorithm>
#include <vector>

#include "formats/layout.h"
#include "ops/cpu_common.h"
#include "ops/ops.h"
#include "ops/targets.h"

namespace mxtrain::cpu {

namespace {

Source strided_source(const Tensor& t, bool transpose) {
  Source s = {};
  s.type = source_type(t.scalar_type());
  s.data = t.const_data_ptr();
  s.stride_row = t.stride(transpose ? 1 : 0);
  s.stride_col = t.stride(transpose ? 0 : 1);
  return s;
}

QuantizeParams make_params(const Source& x, int64_t rows, int64_t cols, const Target& t,
                           const OptionalTensor& rng, uint32_t stream) {
  QuantizeParams p = {};
  p.x = x;
  p.rows = rows;
  p.cols = cols;
  p.kp = kFormats[t.format].padded(cols);
  p.format = static_cast<int>(t.format);
  p.scale_rule = static_cast<ScaleRule>(t.scale_rule);
  p.rounding = static_cast<Rounding>(t.rounding);
  p.hadamard = static_cast<int>(t.hadamard);
  p.signs = t.signs ? t.signs->const_data_ptr<int8_t>() : nullptr;
  p.hadamard_norm = t.hadamard_norm();
  p.prescale = static_cast<float>(t.prescale);
  if (p.rounding == Rounding::kToward)
    p.toward = strided_source(*t.toward, stream == kTransposedStream);
  if (p.rounding == Rounding::kStochastic) {
    const auto* r = static_cast<const int64_t*>(rng->const_data_ptr());
    p.key = {static_cast<uint64_t>(r[0]), static_cast<uint32_t>(r[rng->stride(0)]), stream};
  }
  p.tensor_scale = 1.0f;
  return p;
}

int64_t tiles_along_k(const QuantizeParams& p) { return tiles(p.kp, kTileK); }
int64_t tile_count(const QuantizeParams& p) { return tiles(p.rows, kTileR) * tiles_along_k(p); }

template <class F>
void for_each_tile(const QuantizeParams& p, const F& f) {
  const int64_t along_k = tiles_along_k(p);
  torch::stable::parallel_for(0, tile_count(p), grain(kTileR * kTileK),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t t = begin; t < end; ++t)
                                  f(t, t / along_k * kTileR, t % along_k * kTileK);
                              });
}

// The tensor scale needs the whole operand's amax first: one more read. A maximum does not depend
// on the order of tiles.
float find_tensor_scale(const QuantizeParams& p) {
  std::vector<uint32_t> amax(tile_count(p), 0);
  for_each_tile(
      p, [&](int64_t t, int64_t r0, int64_t k0) { amax[t] = kernels().finite_amax(p, r0, k0); });
  return nvfp4_tensor_scale(
      bits_float(amax.empty() ? 0u : *std::max_element(amax.begin(), amax.end())));
}

// Allocate the operand and point the params at it.
Operand3 allocate(const Tensor& like, QuantizeParams& p) {
  const FormatInfo& f = kFormats[p.format];
  Tensor data = empty_bytes(like, p.rows, f.bytes(p.kp)),
         scale = empty_bytes(like, p.rows, p.kp / f.block);
  Tensor tensor_scale = torch::stable::new_empty(like, {f.e4m3_scale ? 1 : 0}, ScalarType::Float);
  if (f.e4m3_scale) {
    p.tensor_scale = find_tensor_scale(p);
    *tensor_scale.mutable_data_ptr<float>() = p.tensor_scale;
  }
  p.data = mutable_bytes(data);
  p.scale = mutable_bytes(scale);
  return {data, scale, tensor_scale};
}

Operand3 run(const Tensor& like, QuantizeParams p, bool swizzle) {
  Operand3 out = allocate(like, p);
  for_each_tile(p, [&](int64_t, int64_t r0, int64_t k0) { kernels().quantize(p, r0, k0); });
  if (swizzle) std::get<1>(out) = swizzle_scale(std::get<1>(out));
  return out;
}

}  // namespace

Operand3 quantize(Tensor x, int64_t format, int64_t scale_rule, int64_t rounding, bool transpose,
                  OptionalTensor rng, int64_t hadamard, OptionalTensor signs, double prescale,
                  OptionalTensor toward, bool swizzle) {
  check_matrix("quantize", "x", x);
  const Target t = {format, scale_rule, rounding, hadamard, signs, prescale, toward};
  const int64_t rows = x.size(transpose ? 1 : 0), cols = x.size(transpose ? 0 : 1);
  check_target("quantize", x, t, rng, cols);
  return run(x,
             make_params(strided_source(x, transpose), rows, cols, t, rng,
                         transpose ? kTransposedStream : kRowStream),
             swizzle);
}

// Both operands from one pass over memory: squares of 256 x 256 elements stay in cache while rows,
// then columns, are quantized.
Operand7 quantize_dual(Tensor x, OptionalTensor rng, int64_t row_format, int64_t row_scale_rule,
                       int64_t row_rounding, int64_t row_hadamard, OptionalTensor row_signs,
                       double row_prescale, OptionalTensor row_toward, int64_t col_format,
                       int64_t col_scale_rule, int64_t col_rounding, int64_t col_hadamard,
                       OptionalTensor col_signs, double col_prescale, OptionalTensor col_toward,
                       bool swizzle, bool sum_columns) {
  const char* op = "quantize_dual";
  check_matrix(op, "x", x);
  const Target row = {row_format, row_scale_rule, row_rounding, row_hadamard,
                      row_signs,  row_prescale,   row_toward};
  const Target col = {col_format, col_scale_rule, col_rounding, col_hadamard,
                      col_signs,  col_prescale,   col_toward};
  const int64_t m = x.size(0), n = x.size(1);
  check_target(op, x, row, rng, n);
  check_target(op, x, col, rng, m);
  QuantizeParams pr = make_params(strided_source(x, false), m, n, row, rng, kRowStream);
  QuantizeParams pc = make_params(strided_source(x, true), n, m, col, rng, kTransposedStream);
  Operand3 a = allocate(x, pr), b = allocate(x, pc);
  const int64_t across = tiles(std::max(pr.kp, n), kTileK),
                down = tiles(std::max(pc.kp, m), kTileK);
  torch::stable::parallel_for(0, across * down, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t i0 = s / across * kTileK, j0 = s % across * kTileK;
      for (int64_t r = i0; r < std::min(i0 + kTileK, m); r += kTileR)
        if (j0 < pr.kp) kernels().quantize(pr, r, j0);
      for (int64_t r = j0; r < std::min(j0 + kTileK, n); r += kTileR)
        if (i0 < pc.kp) kernels().quantize(pc, r, i0);
    }
  });
  if (swizzle) {
    std::get<1>(a) = swizzle_scale(std::get<1>(a));
    std::get<1>(b) = swizzle_scale(std::get<1>(b));
  }
  const Tensor sum =
      sum_columns ? column_sum(x) : torch::stable::new_empty(x, {0}, ScalarType::Float);
  return std::tuple_cat(a, b, std::make_tuple(sum));
}

Operand3 requantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,
                    int64_t cols, int64_t out_format, int64_t scale_rule, int64_t rounding,
                    OptionalTensor rng, int64_t hadamard, OptionalTensor signs, double prescale,
                    bool swizzle) {
  const OptionalTensor none;
  const Target t = {out_format, scale_rule, rounding, hadamard, signs, prescale, none};
  const int64_t rows = check_requantize(data, scale, tensor_scale, format, cols, t, rng).rows;
  const Tensor codes = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  Source x = {};
  x.type = SourceType::kPacked;
  x.data = codes.const_data_ptr();
  x.format = static_cast<int>(format);
  x.scale = bytes(scales);
  x.data_cols = codes.size(1);
  x.scale_cols = scales.size(1);
  x.tensor_scale = scale_of(tensor_scale);
  return run(codes, make_params(x, cols, rows, t, rng, kTransposedStream), swizzle);
}

}  // namespace mxtrain::cpu
