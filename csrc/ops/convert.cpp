// SPDX-License-Identifier: Apache-2.0
// dequantize, hadamard, stochastic_round, column_sum and the scale layouts on the CPU: check,
// allocate, split rows over torch's threads.
#include <cmath>
#include <cstring>

#include "formats/column_sum.h"
#include "formats/layout.h"
#include "ops/cpu_common.h"
#include "ops/ops.h"
#include "ops/targets.h"

namespace mxtrain::cpu {

Tensor dequantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,
                  int64_t cols, ScalarType dtype) {
  const PackedShape s = check_dequantize(data, scale, tensor_scale, format, cols, dtype);
  const Tensor codes = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  Tensor out = torch::stable::new_empty(data, {s.rows, cols}, dtype);
  const DequantizeParams p = {bytes(codes),
                              bytes(scales),
                              codes.size(1),
                              scales.size(1),
                              cols,
                              static_cast<int>(format),
                              scale_of(tensor_scale),
                              source_type(dtype),
                              out.mutable_data_ptr()};
  torch::stable::parallel_for(0, s.rows, grain(cols), [&](int64_t begin, int64_t end) {
    kernels().dequantize(p, begin, end);
  });
  return out;
}

Tensor hadamard(Tensor x, int64_t group, OptionalTensor signs) {
  check_hadamard_op(x, group, signs);
  const int64_t k = x.size(x.dim() - 1);
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(in);
  if (x.numel() == 0) return out;
  HadamardParams p = {};
  p.x.type = source_type(x.scalar_type());
  p.x.data = in.const_data_ptr();
  p.x.stride_row = p.cols = k;
  p.x.stride_col = 1;
  p.group = static_cast<int>(group);
  p.signs = signs ? signs->const_data_ptr<int8_t>() : nullptr;
  p.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(group)));
  p.out = out.mutable_data_ptr();
  torch::stable::parallel_for(0, x.numel() / k, grain(k), [&](int64_t begin, int64_t end) {
    kernels().hadamard(p, begin, end);
  });
  return out;
}

Tensor stochastic_round(Tensor x, ScalarType dtype, Tensor rng) {
  check_stochastic_round(x, dtype, rng);
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(in, in.sizes(), dtype);
  const auto* r = static_cast<const int64_t*>(rng.const_data_ptr());
  StochasticRoundParams p = {};
  p.x = in.const_data_ptr<float>();
  p.n = in.numel();
  p.key = {static_cast<uint64_t>(r[0]), static_cast<uint32_t>(r[rng.stride(0)]), kRowStream};
  p.target = dtype == ScalarType::BFloat16        ? RoundTarget::kBfloat16
             : dtype == ScalarType::Float8_e4m3fn ? RoundTarget::kE4M3
                                                  : RoundTarget::kE5M2;
  p.out = out.mutable_data_ptr();
  torch::stable::parallel_for(
      0, tiles(p.n, kDrawGroup), grain(kDrawGroup),
      [&](int64_t begin, int64_t end) { kernels().stochastic_round(p, begin, end); });
  return out;
}

Tensor column_sum(Tensor dy) {
  check_column_sum(dy);
  const Tensor in = torch::stable::contiguous(dy);
  const int64_t rows = in.size(0), cols = in.size(1), strips = tiles(rows, kSumStripRows);
  Tensor out = torch::stable::new_zeros(in, {cols}, ScalarType::Float);
  const Tensor work = torch::stable::new_empty(in, {strips, cols}, ScalarType::Float);
  if (work.numel() == 0) return out;
  const ColumnSumParams p = {source_type(dy.scalar_type()), in.const_data_ptr(), rows, cols,
                             work.mutable_data_ptr<float>()};
  torch::stable::parallel_for(
      0, strips, grain(kSumStripRows * cols),
      [&](int64_t begin, int64_t end) { kernels().column_strips(p, begin, end); });
  float* total = out.mutable_data_ptr<float>();
  for (int64_t s = 0; s < strips; ++s)
    for (int64_t c = 0; c < cols; ++c) total[c] += p.strips[s * cols + c];
  return out;
}

Tensor swizzle_scale(Tensor scale) {
  check_swizzle(scale);
  const Tensor in = torch::stable::contiguous(scale);
  const int64_t rows = in.size(0), cols = in.size(1), row_tiles = tiles(rows, kTileRows),
                col_tiles = tiles(cols, kTileCols);
  Tensor out = torch::stable::new_zeros(in, {row_tiles, col_tiles, kTileBytes});
  if (out.numel() == 0) return out;
  const uint8_t* from = bytes(in);
  uint8_t* to = mutable_bytes(out);
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < cols; ++c) to[swizzled_offset(r, c, col_tiles)] = from[r * cols + c];
  });
  return out;
}

Tensor unswizzle_scale(Tensor scale, int64_t rows, int64_t cols) {
  check_unswizzle(scale, rows, cols);
  const int64_t col_tiles = tiles(cols, kTileCols);
  const Tensor in = torch::stable::contiguous(scale);
  Tensor out = empty_bytes(in, rows, cols);
  if (out.numel() == 0) return out;
  const uint8_t* from = bytes(in);
  uint8_t* to = mutable_bytes(out);
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < cols; ++c) to[r * cols + c] = from[swizzled_offset(r, c, col_tiles)];
  });
  return out;
}

}  // namespace mxtrain::cpu
