// SPDX-License-Identifier: Apache-2.0
// RMSNorm and SwiGLU on the CPU: check, allocate, split rows over torch's threads.
#include "ops/context.h"

#include "formats/column_sum.h"
#include "ops/cpu_common.h"
#include "ops/ops.h"

namespace mxtrain::cpu {

namespace {

Source view(const Tensor& t) {
  Source s = {};
  s.type = source_type(t.scalar_type());
  s.data = t.const_data_ptr();
  s.stride_row = t.dim() == 2 ? t.stride(0) : 0;
  s.stride_col = t.stride(t.dim() - 1);
  return s;
}

// Matrix `part` of the planes; high is null where they are empty.
ContextPlanes planes(const ContextTensors& c, int64_t part) {
  if (c.high.numel() == 0) return {};
  const int64_t size = c.high.numel() / c.high.size(0);
  return {static_cast<int8_t*>(c.high.mutable_data_ptr()) + part * size,
          mutable_bytes(c.low) + part * size / 4,
          c.scale.mutable_data_ptr<float>() + part * size / kContextGroup};
}

ContextTensors contiguous(const Tensor& high, const Tensor& low, const Tensor& scale) {
  return {torch::stable::contiguous(high), torch::stable::contiguous(low),
          torch::stable::contiguous(scale)};
}

// dw of runs of rows, in the order of column_sum.
void add_runs(const float* sums, int64_t runs, int64_t cols, float* out) {
  for (int64_t s = 0; s < runs; s += kSumRuns)
    for (int64_t c = 0; c < cols; ++c) {
      float strip = 0.0f;
      for (int64_t r = s; r < runs && r < s + kSumRuns; ++r) strip += sums[r * cols + c];
      out[c] += strip;
    }
}

}  // namespace

Operand5 rms_norm_forward(Tensor x, OptionalTensor weight, double eps, ScalarType out_dtype,
                          bool context) {
  check_rms_norm(x, weight, eps, out_dtype);
  const int64_t rows = x.size(0);
  Tensor y = torch::stable::new_empty(x, {rows, x.size(1)}, out_dtype),
         rstd = torch::stable::new_empty(x, {context ? rows : 0}, ScalarType::Float);
  const ContextTensors c = new_context(x, 1, context);
  RmsNormParams p = {};
  p.x = view(x);
  if (weight) p.weight = view(*weight);
  p.rows = rows;
  p.cols = x.size(1);
  p.kp = context_cols(p.cols);
  p.eps = static_cast<float>(eps);
  p.context = planes(c, 0);
  p.rstd = context ? rstd.mutable_data_ptr<float>() : nullptr;
  p.out_type = source_type(out_dtype);
  p.out = y.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, grain(p.cols), [&](int64_t begin, int64_t end) {
    kernels().rms_norm_forward(p, begin, end);
  });
  return {y, c.high, c.low, c.scale, rstd};
}

Operand2 rms_norm_backward(Tensor dy, Tensor high, Tensor low, Tensor scale, Tensor rstd,
                           OptionalTensor weight, ScalarType dx_dtype, bool weight_grad) {
  check_rms_norm_backward(dy, {high, low, scale}, rstd, weight, dx_dtype);
  const bool sum = weight && weight_grad;
  const int64_t rows = dy.size(0), cols = dy.size(1), runs = (rows + kSumRows - 1) / kSumRows;
  Tensor dx = torch::stable::new_empty(dy, {rows, cols}, dx_dtype),
         dw = torch::stable::new_zeros(dy, {sum ? cols : 0}, ScalarType::Float);
  if (rows == 0) return {dx, dw};
  const ContextTensors c = contiguous(high, low, scale);
  const Tensor stds = torch::stable::contiguous(rstd),
               sums = torch::stable::new_empty(dy, {sum ? runs : 0, cols}, ScalarType::Float);
  RmsNormParams p = {};
  p.x = view(dy);
  if (weight) p.weight = view(*weight);
  p.rows = rows;
  p.cols = cols;
  p.kp = context_cols(cols);
  p.context = planes(c, 0);
  p.rstd = stds.mutable_data_ptr<float>();
  p.out_type = source_type(dx_dtype);
  p.out = dx.mutable_data_ptr();
  p.sums = sum ? sums.mutable_data_ptr<float>() : nullptr;
  torch::stable::parallel_for(0, runs, grain(kSumRows * cols), [&](int64_t begin, int64_t end) {
    kernels().rms_norm_backward(p, begin, end);
  });
  if (sum) add_runs(p.sums, runs, cols, dw.mutable_data_ptr<float>());
  return {dx, dw};
}

Operand4 swiglu_forward(Tensor gate, Tensor up, bool context) {
  check_swiglu(gate, up);
  const int64_t rows = gate.size(0), cols = gate.size(1);
  Tensor h = torch::stable::new_empty(gate, {rows, cols}, gate.scalar_type());
  const ContextTensors c = new_context(gate, 2, context);
  SwigluParams p = {};
  p.gate = view(gate);
  p.up = view(up);
  p.rows = rows;
  p.cols = cols;
  p.kp = context_cols(cols);
  p.gate_context = planes(c, 0);
  p.up_context = planes(c, 1);
  p.out_type = source_type(gate.scalar_type());
  p.out = h.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    kernels().swiglu_forward(p, begin, end);
  });
  return {h, c.high, c.low, c.scale};
}

Tensor swiglu_backward(Tensor dh, Tensor high, Tensor low, Tensor scale, ScalarType dtype) {
  check_swiglu_backward(dh, {high, low, scale}, dtype);
  const int64_t rows = dh.size(0), cols = dh.size(1);
  Tensor out = torch::stable::new_empty(dh, {rows, 2 * cols}, dtype);
  if (out.numel() == 0) return out;
  const ContextTensors c = contiguous(high, low, scale);
  SwigluParams p = {};
  p.dh = view(dh);
  p.rows = rows;
  p.cols = cols;
  p.kp = context_cols(cols);
  p.gate_context = planes(c, 0);
  p.up_context = planes(c, 1);
  p.out_type = source_type(dtype);
  p.out = out.mutable_data_ptr();
  torch::stable::parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
    kernels().swiglu_backward(p, begin, end);
  });
  return out;
}

}  // namespace mxtrain::cpu
