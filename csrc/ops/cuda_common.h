// SPDX-License-Identifier: Apache-2.0
// What the CUDA ops share.
#pragma once

#include "cuda/quantize.h"
#include "dispatch.h"

namespace mxtrain::cuda {

inline FloatType float_type(ScalarType dtype) {
  if (dtype == ScalarType::Float) return FloatType::kFloat32;
  return dtype == ScalarType::BFloat16 ? FloatType::kBfloat16 : FloatType::kFloat16;
}

}  // namespace mxtrain::cuda
