// SPDX-License-Identifier: Apache-2.0
// What the ops of int8_block check on every device.
#pragma once

#include "check.h"
#include "formats/int8.h"

namespace mxtrain {

inline int64_t int8_blocks(int64_t size) { return (size + kInt8Block - 1) / kInt8Block; }

// What a layout writes of a matrix; [0, 0] where it does not.
struct Int8Forms {
  Tensor row, transposed;
};
Int8Forms new_int8_forms(const Tensor& x, int64_t layout);
Tensor new_int8_grid(const Tensor& x, ScalarType dtype);  // one a block
// The codes of t, or null where there are none.
inline int8_t* mutable_codes(const Tensor& t) {
  return t.numel() ? static_cast<int8_t*>(t.mutable_data_ptr()) : nullptr;
}

// threshold: null for int8_quantize.
void check_int8_quantize(const char* op, const Tensor& x, int64_t rounding,
                         const OptionalTensor& rng, int64_t layout, const Tensor* threshold);

// The residual of one operand of int8_gemm; all three, or none. data: a matrix like the operand's
// codes, mask: bytes; or data: a pool, mask: its slots.
struct Int8Residual {
  const OptionalTensor &data, &scale, &mask;
  bool of_b;
};
// mask: uint8, or int32 slots.
Int8Mask view_mask(const Tensor& mask);
void check_int8_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     const OptionalTensor& bias, ScalarType out_dtype, const Int8Residual& r);

// The pool, int8 [count, 128, 128], has the residuals of `count` blocks, each in one piece.
void check_int8_pack_residual(const Tensor& residual, const Tensor& scale, const Tensor& mask,
                              int64_t count);
void check_int8_unpack_residual(const Tensor& pool, const Tensor& slots, int64_t rows, int64_t kp);

}  // namespace mxtrain
