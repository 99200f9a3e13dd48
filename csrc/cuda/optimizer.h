// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA optimizer steps: what csrc/ops hands over. Pointers are device pointers.
#pragma once

#include <cuda_runtime_api.h>

#include "optim/adamw.h"

namespace mxtrain::cuda {

// What the tensors of a step share, and what its first kernel leaves for the second.
struct AdamwRow {
  AdamwFactors factors;
  uint32_t nonfinite;  // whether the gradient is; Q-Ramping only
};

struct AdamwParams {
  const AdamwTensor* tensors;  // [count], on the host
  int64_t count;
  AdamwOptions options;
  const double* lr;    // [1], or null: options.lr holds
  const int64_t* rng;  // [count, 2], or null: bfloat16 rounds to nearest
  WeightQuantizer quantizer;
  AdamwRow* rows;  // [count] scratch
};
cudaError_t launch_adamw(const AdamwParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda
