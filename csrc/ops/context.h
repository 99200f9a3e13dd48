// SPDX-License-Identifier: Apache-2.0
// What the ops of RMSNorm and SwiGLU check on every device.
#pragma once

#include "check.h"
#include "formats/context.h"

namespace mxtrain {

inline int64_t context_cols(int64_t cols) {
  return (cols + kContextGroup - 1) / kContextGroup * kContextGroup;
}

// The planes of `parts` matrices [rows, cols] in int10_group; empty where they are not kept.
struct ContextTensors {
  Tensor high, low, scale;
};
ContextTensors new_context(const Tensor& x, int64_t parts, bool kept);

void check_rms_norm(const Tensor& x, const OptionalTensor& weight, double eps,
                    ScalarType out_dtype);
void check_rms_norm_backward(const Tensor& dy, const ContextTensors& context, const Tensor& rstd,
                             const OptionalTensor& weight, ScalarType dx_dtype);
void check_swiglu(const Tensor& gate, const Tensor& up);
void check_swiglu_backward(const Tensor& dh, const ContextTensors& context, ScalarType dtype);

}  // namespace mxtrain
