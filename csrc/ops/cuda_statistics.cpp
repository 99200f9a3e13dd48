// SPDX-License-Identifier: Apache-2.0
// quantization_statistics and oscillation_step_ on CUDA: check, allocate, call.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/statistics.h"
#include "formats/statistics.h"
#include "ops/cuda_common.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

using torch::stable::accelerator::DeviceGuard;

static void run(const char* op, const Tensor& x, const Tensor& data, const Tensor& scale,
                const OptionalTensor& tensor_scale, int64_t format, double prescale, float* state,
                double* sums) {
  const cudaStream_t stream = stream_for(op, x);
  const Tensor codes = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  StatisticsParams p = {};
  p.x = x.const_data_ptr();
  p.x_type = float_type(x.scalar_type());
  p.stride_row = x.stride(0);
  p.stride_k = x.stride(1);
  p.data = static_cast<const uint8_t*>(codes.const_data_ptr());
  p.scale = static_cast<const uint8_t*>(scales.const_data_ptr());
  p.row_bytes = codes.size(1);
  p.blocks = scales.size(1);
  p.tensor_scale = kFormats[format].e4m3_scale ? tensor_scale->const_data_ptr<float>() : nullptr;
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.format = static_cast<int>(format);
  p.prescale = static_cast<float>(prescale);
  p.state = state;
  p.sums = sums;
  check_launch(op, launch_statistics(p, stream));
}

Tensor quantization_statistics(Tensor x, Tensor data, Tensor scale, OptionalTensor tensor_scale,
                               int64_t format, double prescale) {
  const char* op = "quantization_statistics";
  check_statistics(op, "x", x, data, scale, tensor_scale, format);
  check_prescale(op, x, prescale);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(x, {kStatisticsParts, kStatistics}, ScalarType::Double);
  run(op, x, data, scale, tensor_scale, format, prescale, nullptr, out.mutable_data_ptr<double>());
  return out;
}

void oscillation_step_(Tensor state, Tensor sums, Tensor w, Tensor data, Tensor scale,
                       OptionalTensor tensor_scale, int64_t format) {
  const char* op = "oscillation_step_";
  check_statistics(op, "w", w, data, scale, tensor_scale, format);
  check_movement(state, sums, w);
  const DeviceGuard guard(w.get_device_index());
  run(op, w, data, scale, tensor_scale, format, 1.0, state.mutable_data_ptr<float>(),
      sums.mutable_data_ptr<double>());
}

}  // namespace mxtrain::cuda
