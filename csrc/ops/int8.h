// SPDX-License-Identifier: Apache-2.0
// What the ops of int8_block check on every device.
#pragma once

#include "check.h"
#include "formats/int8.h"

namespace mxtrain {

inline int64_t int8_blocks(int64_t size) { return (size + kInt8Block - 1) / kInt8Block; }

// threshold: null for int8_quantize.
void check_int8_quantize(const char* op, const Tensor& x, int64_t rounding,
                         const OptionalTensor& rng, int64_t layout, const Tensor* threshold);

// The residual of one operand of int8_gemm; all three, or none.
struct Int8Residual {
  const OptionalTensor &data, &scale, &mask;
  bool of_b;
};
void check_int8_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     const OptionalTensor& bias, ScalarType out_dtype, const Int8Residual& r);

}  // namespace mxtrain
