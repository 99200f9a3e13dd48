// SPDX-License-Identifier: Apache-2.0
// a b^T for bfloat16 matrices on the current stream, by cuBLAS, with float32 sums.
#pragma once

#include "ops/ops.h"

namespace mxtrain::cuda {

// out [M, N] float32 = a [M, K] b [N, K]^T, through torch.
void matmul_float32(Tensor& out, const Tensor& a, const Tensor& b);

// out [M, N] bfloat16 = alpha a b^T, rounded once. All three contiguous. False, with nothing done,
// where cuBLAS cannot be asked (see cuda_matmul.cpp), does not take it, or is not the faster way.
bool matmul_bfloat16(const char* op, Tensor& out, const Tensor& a, const Tensor& b, float alpha);

}  // namespace mxtrain::cuda
