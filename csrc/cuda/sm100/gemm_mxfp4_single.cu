// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm100/gemm_collective.cuh"

namespace mxtrain::cuda::sm100 {

cudaError_t gemm_mxfp4_single(const GemmParams& p, cudaStream_t stream) {
  return launch_collective<Mxfp4, false>(p, stream);
}

}  // namespace mxtrain::cuda::sm100
