// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/fold.h"

namespace mxtrain::cuda::sm90 {

cudaError_t launch_folded_gemm(const FoldedGemmParams& p, cudaStream_t stream);
cudaError_t launch_packed_gemm(const PackedGemmParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm90
