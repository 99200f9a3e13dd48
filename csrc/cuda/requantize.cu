// SPDX-License-Identifier: Apache-2.0
// requantize: an operand's codes in, the codes of its transpose out. See quantize_tiles.cuh.
#include "cuda/quantize_tiles.cuh"

namespace mxtrain::cuda {

cudaError_t launch_requantize(const QuantizeParams& p, cudaStream_t stream) {
  using Launcher = cudaError_t (*)(const QuantizeParams&, cudaStream_t);
#define MXT_ROW(code, traits, name) launch_columns_of<PackedTile<traits>>,
  static constexpr Launcher kLaunchers[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kLaunchers[p.in_format](p, stream);
}

}  // namespace mxtrain::cuda
