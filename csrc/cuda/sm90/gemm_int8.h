// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/int8.h"

namespace mxtrain::cuda::sm90 {

cudaError_t launch_int8_gemm(const Int8GemmParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm90
