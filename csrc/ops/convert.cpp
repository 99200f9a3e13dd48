// SPDX-License-Identifier: Apache-2.0
// dequantize, hadamard, stochastic_round and the scale layouts on the CPU: check, allocate, split
// rows over torch's threads.
#include <cmath>
#include <cstring>

#include "formats/layout.h"
#include "ops/cpu_common.h"
#include "ops/ops.h"

namespace mxtrain {

PackedShape check_dequantize(const Tensor& data, const Tensor& scale,
                             const OptionalTensor& tensor_scale, int64_t format, int64_t cols,
                             ScalarType dtype) {
  const char* op = "dequantize";
  const PackedShape s = check_operand(op, "operand", data, scale, tensor_scale, format);
  check_logical_cols(op, cols, s, format);
  MXT_CHECK(is_input_float(dtype), op, "dtype must be bfloat16, float16 or float32, got ",
            dtype_name(dtype), " (data ", shape_of(data), "). Convert afterwards.");
  return s;
}

namespace cpu {

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
  const char* op = "hadamard";
  MXT_CHECK(is_input_float(x.scalar_type()), op, "x must be bfloat16, float16 or float32, got ",
            dtype_name(x.scalar_type()), " (shape ", shape_of(x), "). Convert it first.");
  MXT_CHECK(x.dim() >= 1, op, "x must have at least 1 dimension, got 0 (shape []). Reshape it.");
  MXT_CHECK(group != 0, op, "hadamard must be 16, 32, 64, 128 or 256, got 0 (x has shape ",
            shape_of(x), ").");
  check_hadamard(op, group, signs, x);
  const int64_t k = x.size(x.dim() - 1);
  check_divides(op, group, k, k);
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
  const char* op = "stochastic_round";
  MXT_CHECK(x.scalar_type() == ScalarType::Float, op, "x must be float32, got ",
            dtype_name(x.scalar_type()), " (shape ", shape_of(x), "). Convert it first.");
  const bool bf16 = dtype == ScalarType::BFloat16, e4m3 = dtype == ScalarType::Float8_e4m3fn,
             e5m2 = dtype == ScalarType::Float8_e5m2;
  MXT_CHECK(bf16 || e4m3 || e5m2, op, "dtype must be bfloat16, float8_e4m3fn or float8_e5m2, got ",
            dtype_name(dtype), " (x has shape ", shape_of(x), ").");
  check_rng(op, rng, x);
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(in, in.sizes(), dtype);
  const auto* r = static_cast<const int64_t*>(rng.const_data_ptr());
  StochasticRoundParams p = {};
  p.x = in.const_data_ptr<float>();
  p.n = in.numel();
  p.key = {static_cast<uint64_t>(r[0]), static_cast<uint32_t>(r[rng.stride(0)]), kRowStream};
  p.target = bf16 ? RoundTarget::kBfloat16 : e4m3 ? RoundTarget::kE4M3 : RoundTarget::kE5M2;
  p.out = out.mutable_data_ptr();
  torch::stable::parallel_for(
      0, tiles(p.n, kDrawGroup), grain(kDrawGroup),
      [&](int64_t begin, int64_t end) { kernels().stochastic_round(p, begin, end); });
  return out;
}

Tensor swizzle_scale(Tensor scale) {
  const char* op = "swizzle_scale";
  MXT_CHECK(scale.scalar_type() == ScalarType::Byte && scale.dim() == 2, op,
            "scale must be uint8 with 2 dimensions, got ", dtype_name(scale.scalar_type()),
            " (shape ", shape_of(scale), "). Pass the scale of an unswizzled operand.");
  const Tensor in = torch::stable::contiguous(scale);
  const int64_t rows = in.size(0), cols = in.size(1), row_tiles = tiles(rows, kTileRows),
                col_tiles = tiles(cols, kTileCols);
  Tensor out = torch::stable::new_zeros(in, {row_tiles, col_tiles, kTileBytes});
  const uint8_t* from = bytes(in);
  uint8_t* to = mutable_bytes(out);
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < cols; ++c) to[swizzled_offset(r, c, col_tiles)] = from[r * cols + c];
  });
  return out;
}

Tensor unswizzle_scale(Tensor scale, int64_t rows, int64_t cols) {
  const char* op = "unswizzle_scale";
  const int64_t row_tiles = tiles(rows, kTileRows), col_tiles = tiles(cols, kTileCols);
  MXT_CHECK(rows >= 0 && cols >= 0, op, "rows and cols must not be negative, got ", rows, " and ",
            cols, " (scale ", shape_of(scale), ").");
  MXT_CHECK(scale.scalar_type() == ScalarType::Byte && scale.dim() == 3 &&
                scale.size(0) == row_tiles && scale.size(1) == col_tiles &&
                scale.size(2) == kTileBytes,
            op, "scale must be uint8 of shape [", row_tiles, ", ", col_tiles, ", ", kTileBytes,
            "], got ", dtype_name(scale.scalar_type()), " ", shape_of(scale), " (for ", rows, " x ",
            cols, " scales). Pass what swizzle_scale returned.");
  const Tensor in = torch::stable::contiguous(scale);
  Tensor out = empty_bytes(in, rows, cols);
  const uint8_t* from = bytes(in);
  uint8_t* to = mutable_bytes(out);
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      for (int64_t c = 0; c < cols; ++c) to[r * cols + c] = from[swizzled_offset(r, c, col_tiles)];
  });
  return out;
}

}  // namespace cpu

}  // namespace mxtrain
