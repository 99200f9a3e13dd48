// SPDX-License-Identifier: Apache-2.0
#include "cuda/sm100/gemm_collective.cuh"

namespace mxtrain::cuda::sm100 {

cudaError_t gemm_mxfp8_pair(const GemmParams& p, bool e5m2, cudaStream_t stream) {
  return launch_mxfp8<true>(p, e5m2, stream);
}

}  // namespace mxtrain::cuda::sm100
