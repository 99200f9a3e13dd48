// SPDX-License-Identifier: Apache-2.0
// dequantize, hadamard, stochastic_round, column_sum and the scale layouts on CUDA: check,
// allocate, call.
#include <torch/csrc/stable/accelerator.h>

#include <cmath>

#include "cuda/dequantize.h"
#include "formats/column_sum.h"
#include "formats/layout.h"
#include "ops/cuda_common.h"
#include "ops/ops.h"
#include "ops/targets.h"

namespace mxtrain::cuda {

using torch::stable::accelerator::DeviceGuard;

Tensor dequantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,
                  int64_t cols, ScalarType dtype) {
  const PackedShape s = check_dequantize(data, scale, tensor_scale, format, cols, dtype);
  const DeviceGuard guard(data.get_device_index());
  const cudaStream_t stream = stream_for("dequantize", data);
  const Tensor codes = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  Tensor out = torch::stable::new_empty(data, {s.rows, cols}, dtype);
  DequantizeParams p = {};
  p.data = static_cast<const uint8_t*>(codes.const_data_ptr());
  p.scale = static_cast<const uint8_t*>(scales.const_data_ptr());
  p.tensor_scale = kFormats[format].e4m3_scale ? tensor_scale->const_data_ptr<float>() : nullptr;
  p.rows = s.rows;
  p.cols = cols;
  p.kp = s.kp;
  p.format = static_cast<int>(format);
  p.out_type = float_type(dtype);
  p.out = out.mutable_data_ptr();
  check_launch("dequantize", launch_dequantize(p, stream));
  return out;
}

Tensor hadamard(Tensor x, int64_t group, OptionalTensor signs) {
  check_hadamard_op(x, group, signs);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for("hadamard", x);
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(in, in.sizes());
  HadamardParams p = {};
  p.x = in.const_data_ptr();
  p.out = out.mutable_data_ptr();
  p.type = float_type(x.scalar_type());
  p.n = in.numel();
  p.group = static_cast<int>(group);
  p.signs = signs ? signs->const_data_ptr<int8_t>() : nullptr;
  p.norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(group)));
  check_launch("hadamard", launch_hadamard(p, stream));
  return out;
}

Tensor stochastic_round(Tensor x, ScalarType dtype, Tensor rng) {
  check_stochastic_round(x, dtype, rng);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for("stochastic_round", x);
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(in, in.sizes(), dtype);
  StochasticRoundParams p = {};
  p.x = in.const_data_ptr<float>();
  p.out = out.mutable_data_ptr();
  p.n = in.numel();
  p.target = dtype == ScalarType::BFloat16        ? RoundTarget::kBfloat16
             : dtype == ScalarType::Float8_e4m3fn ? RoundTarget::kE4M3
                                                  : RoundTarget::kE5M2;
  p.rng = rng.const_data_ptr<int64_t>();
  p.rng_stride = rng.stride(0);
  check_launch("stochastic_round", launch_stochastic_round(p, stream));
  return out;
}

Tensor column_sum(Tensor dy) {
  check_column_sum(dy);
  const DeviceGuard guard(dy.get_device_index());
  const cudaStream_t stream = stream_for("column_sum", dy);
  const Tensor in = torch::stable::contiguous(dy);
  const int64_t rows = in.size(0), cols = in.size(1);
  if (rows == 0) return torch::stable::new_zeros(in, {cols}, ScalarType::Float);
  Tensor out = torch::stable::new_empty(in, {cols}, ScalarType::Float);
  const Tensor work =
      torch::stable::new_empty(in, {tiles(rows, kSumStripRows), cols}, ScalarType::Float);
  const ColumnSumParams p = {in.const_data_ptr(),
                             float_type(dy.scalar_type()),
                             rows,
                             cols,
                             work.mutable_data_ptr<float>(),
                             out.mutable_data_ptr<float>()};
  check_launch("column_sum", launch_column_sum(p, stream));
  return out;
}

static Tensor swizzle(const char* op, const Tensor& scale, Tensor out, int64_t rows, int64_t cols,
                      bool forward) {
  const cudaStream_t stream = stream_for(op, scale);
  const Tensor in = torch::stable::contiguous(scale);
  const SwizzleParams p = {static_cast<const uint8_t*>(in.const_data_ptr()),
                           static_cast<uint8_t*>(out.mutable_data_ptr()), rows, cols, forward};
  check_launch(op, launch_swizzle(p, stream));
  return out;
}

Tensor swizzle_scale(Tensor scale) {
  check_swizzle(scale);
  const DeviceGuard guard(scale.get_device_index());
  const int64_t rows = scale.size(0), cols = scale.size(1);
  Tensor out =
      torch::stable::new_empty(scale, {tiles(rows, kTileRows), tiles(cols, kTileCols), kTileBytes});
  return swizzle("swizzle_scale", scale, out, rows, cols, true);
}

Tensor unswizzle_scale(Tensor scale, int64_t rows, int64_t cols) {
  check_unswizzle(scale, rows, cols);
  const DeviceGuard guard(scale.get_device_index());
  return swizzle("unswizzle_scale", scale, torch::stable::new_empty(scale, {rows, cols}), rows,
                 cols, false);
}

}  // namespace mxtrain::cuda
