// SPDX-License-Identifier: Apache-2.0
// The block-scaled GEMM (cuda/sm120/gemm_kernel.cuh) of mxfp4.
#include "cuda/sm120/gemm_kernel.cuh"

namespace mxtrain::cuda::sm120 {

cudaError_t launch_gemm_mxfp4(const BlockScaledGemmParams& p, cudaStream_t stream) {
  return launch_format<Mxfp4>(p, stream);
}

}  // namespace mxtrain::cuda::sm120
