// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/fold.h"

namespace mxtrain::cuda::sm89 {

cudaError_t launch_folded_gemm(const FoldedGemmParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm89
