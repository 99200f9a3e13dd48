// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel: it leaves the number of blocks and their size where an error
// message finds them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/quantize.h"

namespace mxtrain::cuda {

// kernel<<<grid, block, 0, stream>>>(arguments...), and the error of it.
template <class... P, class... A>
static cudaError_t launch(void (*kernel)(P...), dim3 grid, unsigned block, cudaStream_t stream,
                          const A&... arguments) {
  last_launch() = {grid.x * grid.y * grid.z, block};
  kernel<<<grid, block, 0, stream>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace mxtrain::cuda
