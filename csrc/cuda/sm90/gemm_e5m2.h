// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/fold.h"

namespace mxtrain::cuda::sm90 {

cudaError_t launch_folded_gemm(const FoldedGemmParams& p, cudaStream_t stream);
SplitScratch split_scratch(const SplitK& split, int64_t m, int64_t n);
cudaError_t launch_packed_gemm(const PackedGemmParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm90
