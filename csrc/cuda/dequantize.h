// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantize.h"

namespace mxtrain::cuda {

struct DequantizeParams {
  const uint8_t* data;        // [rows, kp * bits / 8]
  const uint8_t* scale;       // [rows, kp / block]
  const float* tensor_scale;  // [1] on the device (nvfp4), or null
  int64_t rows, cols, kp;     // cols <= kp elements are written per row
  int format;
  FloatType out_type;
  void* out;  // [rows, cols]
};

cudaError_t launch_dequantize(const DequantizeParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda
