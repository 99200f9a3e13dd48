// SPDX-License-Identifier: Apache-2.0
// RMSNorm and SwiGLU on CUDA: check, allocate, call.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/context.h"
#include "formats/column_sum.h"
#include "ops/context.h"
#include "ops/cuda_common.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

namespace {

using torch::stable::accelerator::DeviceGuard;

// Columns one element apart: rows may lie anywhere, as the halves of a wider matrix do.
Tensor rows_of(const Tensor& t) {
  return t.size(1) == 1 || t.stride(1) == 1 ? t : torch::stable::contiguous(t);
}

// Contiguous, from a multiple of 16 bytes on.
Tensor aligned(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  const bool fits = reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0;
  return fits ? c : torch::stable::clone(c);
}

ContextTensors aligned(const Tensor& high, const Tensor& low, const Tensor& scale) {
  return {aligned(high), aligned(low), aligned(scale)};
}

// Matrix `part` of the planes; high is null where they are empty.
ContextPlanes planes(const ContextTensors& c, int64_t part) {
  if (c.high.numel() == 0) return {};
  const int64_t size = c.high.numel() / c.high.size(0);
  return {static_cast<int8_t*>(c.high.mutable_data_ptr()) + part * size,
          static_cast<uint8_t*>(c.low.mutable_data_ptr()) + part * size / 4,
          c.scale.mutable_data_ptr<float>() + part * size / kContextGroup};
}

// What forward and backward share: x is dy in backward, and out has its shape.
RmsNormParams norm_params(const Tensor& x, const OptionalTensor& weight, const ContextTensors& c,
                          const Tensor& rstd, const Tensor& out) {
  RmsNormParams p = {};
  p.x = x.const_data_ptr();
  p.x_type = float_type(x.scalar_type());
  p.stride_row = x.stride(0);
  p.weight = weight ? weight->const_data_ptr() : nullptr;
  p.weight_type = weight ? float_type(weight->scalar_type()) : FloatType::kFloat32;
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.kp = context_cols(p.cols);
  p.context = planes(c, 0);
  p.rstd = p.context.high ? rstd.mutable_data_ptr<float>() : nullptr;
  p.out_type = float_type(out.scalar_type());
  p.out = out.mutable_data_ptr();
  return p;
}

}  // namespace

Operand5 rms_norm_forward(Tensor x, OptionalTensor weight, double eps, ScalarType out_dtype,
                          bool context) {
  const char* op = "rms_norm_forward";
  check_rms_norm(x, weight, eps, out_dtype);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for(op, x);
  const int64_t rows = x.size(0);
  const Tensor in = rows_of(x);
  OptionalTensor w;
  if (weight) w = torch::stable::contiguous(*weight);
  Tensor y = torch::stable::new_empty(x, {rows, x.size(1)}, out_dtype),
         rstd = torch::stable::new_empty(x, {context ? rows : 0}, ScalarType::Float);
  const ContextTensors c = new_context(x, 1, context);
  RmsNormParams p = norm_params(in, w, c, rstd, y);
  p.eps = static_cast<float>(eps);
  check_launch(op, launch_rms_norm_forward(p, stream));
  return {y, c.high, c.low, c.scale, rstd};
}

Operand2 rms_norm_backward(Tensor dy, Tensor high, Tensor low, Tensor scale, Tensor rstd,
                           OptionalTensor weight, ScalarType dx_dtype, bool weight_grad) {
  const char* op = "rms_norm_backward";
  check_rms_norm_backward(dy, {high, low, scale}, rstd, weight, dx_dtype);
  const bool sum = weight && weight_grad;
  const DeviceGuard guard(dy.get_device_index());
  const cudaStream_t stream = stream_for(op, dy);
  const int64_t rows = dy.size(0), cols = dy.size(1);
  Tensor dx = torch::stable::new_empty(dy, {rows, cols}, dx_dtype);
  if (rows == 0) return {dx, torch::stable::new_zeros(dy, {sum ? cols : 0}, ScalarType::Float)};
  Tensor dw = torch::stable::new_empty(dy, {sum ? cols : 0}, ScalarType::Float);
  const Tensor in = rows_of(dy), stds = torch::stable::contiguous(rstd);
  const ContextTensors c = aligned(high, low, scale);
  OptionalTensor w;
  if (weight) w = torch::stable::contiguous(*weight);
  RmsNormParams p = norm_params(in, w, c, stds, dx);
  const int64_t parts = sum ? (rows + kSumRows - 1) / kSumRows : 0;
  const Tensor sums = torch::stable::new_empty(dy, {parts, p.kp}, ScalarType::Float);
  p.sums = sum ? sums.mutable_data_ptr<float>() : nullptr;
  p.dw = sum ? dw.mutable_data_ptr<float>() : nullptr;
  check_launch(op, launch_rms_norm_backward(p, stream));
  return {dx, dw};
}

Operand4 swiglu_forward(Tensor gate, Tensor up, bool context) {
  const char* op = "swiglu_forward";
  check_swiglu(gate, up);
  const DeviceGuard guard(gate.get_device_index());
  const cudaStream_t stream = stream_for(op, gate);
  const int64_t rows = gate.size(0), cols = gate.size(1);
  const Tensor g = rows_of(gate), u = rows_of(up);
  Tensor h = torch::stable::new_empty(gate, {rows, cols}, gate.scalar_type());
  const ContextTensors c = new_context(gate, 2, context);
  SwigluParams p = {};
  p.gate = g.const_data_ptr();
  p.up = u.const_data_ptr();
  p.type = p.out_type = float_type(gate.scalar_type());
  p.gate_stride = g.stride(0);
  p.up_stride = u.stride(0);
  p.rows = rows;
  p.cols = cols;
  p.kp = context_cols(cols);
  p.gate_context = planes(c, 0);
  p.up_context = planes(c, 1);
  p.out = h.mutable_data_ptr();
  check_launch(op, launch_swiglu_forward(p, stream));
  return {h, c.high, c.low, c.scale};
}

Tensor swiglu_backward(Tensor dh, Tensor high, Tensor low, Tensor scale, ScalarType dtype) {
  const char* op = "swiglu_backward";
  check_swiglu_backward(dh, {high, low, scale}, dtype);
  const DeviceGuard guard(dh.get_device_index());
  const cudaStream_t stream = stream_for(op, dh);
  const int64_t rows = dh.size(0), cols = dh.size(1);
  Tensor out = torch::stable::new_empty(dh, {rows, 2 * cols}, dtype);
  if (out.numel() == 0) return out;
  const Tensor d = rows_of(dh);
  const ContextTensors c = aligned(high, low, scale);
  SwigluParams p = {};
  p.gate = p.up = d.const_data_ptr();
  p.type = float_type(dh.scalar_type());
  p.gate_stride = p.up_stride = d.stride(0);
  p.out_type = float_type(dtype);
  p.rows = rows;
  p.cols = cols;
  p.kp = context_cols(cols);
  p.gate_context = planes(c, 0);
  p.up_context = planes(c, 1);
  p.out = out.mutable_data_ptr();
  check_launch(op, launch_swiglu_backward(p, stream));
  return out;
}

}  // namespace mxtrain::cuda
