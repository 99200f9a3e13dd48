// SPDX-License-Identifier: Apache-2.0
// The instantiations, one a file: each takes a minute and 5.5 GB to compile.
#pragma once

#include "cuda/sm100/gemm.h"

namespace mxtrain::cuda::sm100 {

cudaError_t gemm_mxfp4_pair(const GemmParams& p, cudaStream_t stream);
cudaError_t gemm_mxfp4_single(const GemmParams& p, cudaStream_t stream);
cudaError_t gemm_nvfp4_pair(const GemmParams& p, cudaStream_t stream);
cudaError_t gemm_nvfp4_single(const GemmParams& p, cudaStream_t stream);
// The element format is a field of the instruction's descriptor, so one kernel serves both.
cudaError_t gemm_mxfp8_pair(const GemmParams& p, bool e5m2, cudaStream_t stream);
cudaError_t gemm_mxfp8_single(const GemmParams& p, bool e5m2, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm100
