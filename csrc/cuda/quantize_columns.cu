// SPDX-License-Identifier: Apache-2.0
// quantize across rows: the transposed operand of float matrices. See quantize_tiles.cuh;
// the fast paths are quantize_strips.cu and quantize_pairs.cu.
#include "cuda/quantize_tiles.cuh"

namespace mxtrain::cuda {

cudaError_t launch_requantize(const QuantizeParams& p, cudaStream_t stream);

cudaError_t launch_quantize_columns(const QuantizeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return p.tensor_scale ? launch_finish_tensor_scale(p, stream) : cudaSuccess;
  if (can_strip_columns(p)) return launch_column_strips(p, stream);
  if (can_pair_columns(p)) return launch_column_pairs(p, stream);
  if (p.in_format >= 0) return launch_requantize(p, stream);
  switch (p.x_type) {
    case FloatType::kFloat32:
      return launch_columns_of<FloatTile<Float32Source>>(p, stream);
    case FloatType::kBfloat16:
      return launch_columns_of<FloatTile<Bfloat16Source>>(p, stream);
    case FloatType::kFloat16:
      return launch_columns_of<FloatTile<Float16Source>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxtrain::cuda
