// SPDX-License-Identifier: Apache-2.0
// The one way to launch a kernel: it leaves grid and block where an error message finds them.
#pragma once

#include <cuda_runtime.h>

#include "cuda/quantize.h"

namespace mxtrain::cuda {

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), and the error of it.
template <class... P, class... A>
static cudaError_t launch_shared(void (*kernel)(P...), unsigned grid, unsigned block,
                                 unsigned shared_bytes, cudaStream_t stream,
                                 const A&... arguments) {
  last_launch() = {grid, block};
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
  return cudaGetLastError();
}

// The same without dynamic shared memory.
template <class... P, class... A>
static cudaError_t launch(void (*kernel)(P...), unsigned grid, unsigned block, cudaStream_t stream,
                          const A&... arguments) {
  return launch_shared(kernel, grid, block, 0, stream, arguments...);
}

}  // namespace mxtrain::cuda
