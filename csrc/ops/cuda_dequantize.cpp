// SPDX-License-Identifier: Apache-2.0
// dequantize on CUDA: check, allocate, call.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/dequantize.h"
#include "dispatch.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

Tensor dequantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,
                  int64_t cols, ScalarType dtype) {
  const PackedShape s = check_dequantize(data, scale, tensor_scale, format, cols, dtype);
  const torch::stable::accelerator::DeviceGuard guard(data.get_device_index());
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
  p.out_type = dtype == ScalarType::Float      ? FloatType::kFloat32
               : dtype == ScalarType::BFloat16 ? FloatType::kBfloat16
                                               : FloatType::kFloat16;
  p.out = out.mutable_data_ptr();
  check_launch("dequantize", launch_dequantize(p, stream));
  return out;
}

}  // namespace mxtrain::cuda
