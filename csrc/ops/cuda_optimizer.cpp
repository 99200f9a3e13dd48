// SPDX-License-Identifier: Apache-2.0
// The optimizer steps on CUDA: check, allocate the scratch, call.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/optimizer.h"
#include "dispatch.h"
#include "ops/optimizer.h"

namespace mxtrain::cuda {

using torch::stable::accelerator::DeviceGuard;

static void run(const AdamwCall& call) {
  check_adamw(call);
  const Tensor& first = call.params[0];
  const DeviceGuard guard(first.get_device_index());
  const cudaStream_t stream = stream_for(call.op, first);
  const std::vector<AdamwTensor> tensors = adamw_tensors(call);
  const int64_t count = static_cast<int64_t>(tensors.size());
  const Tensor rows = torch::stable::new_empty(
      first, {count * static_cast<int64_t>(sizeof(AdamwRow))}, ScalarType::Byte);
  AdamwParams p = {};
  p.tensors = tensors.data();
  p.count = count;
  p.options = call.options;
  if (call.lr_tensor) p.lr = static_cast<const double*>(call.lr_tensor->const_data_ptr());
  if (call.rng) p.rng = call.rng->const_data_ptr<int64_t>();
  p.quantizer = weight_quantizer(call);
  p.rows = static_cast<AdamwRow*>(rows.mutable_data_ptr());
  check_launch(call.op, launch_adamw(p, stream));
}

MXT_DEFINE_ADAMW_OPS(run)

}  // namespace mxtrain::cuda
