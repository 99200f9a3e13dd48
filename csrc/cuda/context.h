// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA kernels of RMSNorm and SwiGLU. Pointers are device pointers; matrices of
// floats have columns one element apart.
#pragma once

#include "cuda/quantize.h"

namespace mxtrain::cuda {

// A matrix [rows, cols] in int10_group (formats/context.h); kp = cols padded to whole groups.
struct ContextPlanes {
  int8_t* high;  // [rows, kp]; null: not kept
  uint8_t* low;  // [rows, kp / 4]
  float* scale;  // [rows, kp / 128]
};

struct RmsNormParams {
  const void* x;  // [rows, cols], rows stride_row elements apart; backward: dy
  FloatType x_type;
  int64_t stride_row;
  const void* weight;  // [cols], or null: ones
  FloatType weight_type;
  int64_t rows, cols, kp;
  float eps;
  ContextPlanes context;  // of x
  float* rstd;            // [rows], or null
  FloatType out_type;
  void* out;  // y or dx [rows, cols]
  // Backward, both null where dw is not wanted:
  float* sums;  // [ceil(rows / 32), kp], to work in
  float* dw;    // [cols]
};
cudaError_t launch_rms_norm_forward(const RmsNormParams& p, cudaStream_t stream);
cudaError_t launch_rms_norm_backward(const RmsNormParams& p, cudaStream_t stream);

struct SwigluParams {
  const void *gate, *up;  // [rows, cols]; backward: gate is dh, and up is not read
  FloatType type;
  int64_t gate_stride, up_stride;  // of rows
  int64_t rows, cols, kp;
  ContextPlanes gate_context, up_context;
  FloatType out_type;
  void* out;  // h [rows, cols]; backward: dg and du, [rows, 2, cols]
};
cudaError_t launch_swiglu_forward(const SwigluParams& p, cudaStream_t stream);
cudaError_t launch_swiglu_backward(const SwigluParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda
