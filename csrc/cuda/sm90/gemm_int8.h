// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/int8.h"

namespace mxtrain::cuda::sm90 {

// Rows and columns of D at most: a stage carries its tile's place in 16 bits each.
constexpr int64_t kMostInt8Rows = int64_t{0xFFFF} * 128;

cudaError_t launch_int8_gemm(const Int8GemmParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm90
