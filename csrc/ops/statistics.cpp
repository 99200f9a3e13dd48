// SPDX-License-Identifier: Apache-2.0
// quantization_statistics and oscillation_step_ on the CPU: check, allocate, split the parts over
// torch's threads.
#include "formats/statistics.h"

#include "ops/cpu_common.h"
#include "ops/ops.h"

namespace mxtrain {

void check_statistics(const char* op, const char* name, const Tensor& x, const Tensor& data,
                      const Tensor& scale, const OptionalTensor& tensor_scale, int64_t format) {
  check_matrix(op, name, x);
  const PackedShape s = check_operand(op, "operand", data, scale, tensor_scale, format);
  check_logical_cols(op, x.size(1), s, format);
  MXT_CHECK(s.rows == x.size(0), op, "data must have the rows of ", name, ", got ", s.rows,
            " (data ", shape_of(data), ", ", name, " ", shape_of(x),
            "). Pass the operand that was made of it.");
  check_same_device(op, "data", data, x);
}

void check_prescale(const char* op, const Tensor& x, double prescale) {
  const float p = static_cast<float>(prescale);
  MXT_CHECK(p > 0.0f && is_finite(p), op, "prescale must be finite and positive, got ", prescale,
            " (x has shape ", shape_of(x), "). Use 1 for none.");
}

static void check_buffer(const char* name, const Tensor& t, ScalarType dtype, const char* shape,
                         bool fits, const Tensor& w) {
  const char* op = "oscillation_step_";
  MXT_CHECK(t.scalar_type() == dtype && fits && t.is_contiguous(), op, name,
            " must be contiguous, of dtype ", dtype_name(dtype), " and shape ", shape, ", got ",
            dtype_name(t.scalar_type()), " ", shape_of(t), t.is_contiguous() ? "" : " strided",
            " (w ", shape_of(w), "). Allocate it with torch.zeros.");
  check_same_device(op, name, t, w);
}

void check_movement(const Tensor& state, const Tensor& sums, const Tensor& w) {
  const bool planes = state.dim() == 3 && state.size(0) == kStatePlanes &&
                      state.size(1) == w.size(0) && state.size(2) == w.size(1);
  check_buffer("state", state, ScalarType::Float, "[5, rows, cols]", planes, w);
  const bool parts =
      sums.dim() == 2 && sums.size(0) == kStatisticsParts && sums.size(1) == kMovements;
  check_buffer("sums", sums, ScalarType::Double, "[128, 5]", parts, w);
  static_assert(kStatePlanes == 5 && kStatisticsParts == 128 && kMovements == 5, "as it says");
}

namespace cpu {

static void run(const Tensor& x, const Tensor& data, const Tensor& scale,
                const OptionalTensor& tensor_scale, int64_t format, double prescale, float* state,
                double* sums) {
  const Tensor codes = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  StatisticsParams p = {};
  p.x.type = source_type(x.scalar_type());
  p.x.data = x.const_data_ptr();
  p.x.stride_row = x.stride(0);
  p.x.stride_col = x.stride(1);
  p.data = bytes(codes);
  p.scale = bytes(scales);
  p.data_cols = codes.size(1);
  p.scale_cols = scales.size(1);
  p.tensor_scale = scale_of(tensor_scale);
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.format = static_cast<int>(format);
  p.prescale = static_cast<float>(prescale);
  p.state = state;
  p.sums = sums;
  torch::stable::parallel_for(0, kStatisticsParts, grain(p.rows * p.cols / kStatisticsParts),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t part = begin; part < end; ++part)
                                  kernels().statistics(p, part);
                              });
}

Tensor quantization_statistics(Tensor x, Tensor data, Tensor scale, OptionalTensor tensor_scale,
                               int64_t format, double prescale) {
  const char* op = "quantization_statistics";
  check_statistics(op, "x", x, data, scale, tensor_scale, format);
  check_prescale(op, x, prescale);
  Tensor out = torch::stable::new_empty(x, {kStatisticsParts, kStatistics}, ScalarType::Double);
  run(x, data, scale, tensor_scale, format, prescale, nullptr, out.mutable_data_ptr<double>());
  return out;
}

void oscillation_step_(Tensor state, Tensor sums, Tensor w, Tensor data, Tensor scale,
                       OptionalTensor tensor_scale, int64_t format) {
  check_statistics("oscillation_step_", "w", w, data, scale, tensor_scale, format);
  check_movement(state, sums, w);
  run(w, data, scale, tensor_scale, format, 1.0, state.mutable_data_ptr<float>(),
      sums.mutable_data_ptr<double>());
}

}  // namespace cpu

}  // namespace mxtrain
