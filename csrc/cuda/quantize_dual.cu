// SPDX-License-Identifier: Apache-2.0
// quantize_dual: both operands of x from one read, where both have one format. See
// quantize_tiles.cuh.
#include "cuda/quantize_tiles.cuh"

namespace mxtrain::cuda {

// The row half's Hadamard group must lie inside a tile's row.
bool can_fuse_dual(const QuantizeParams& row, const QuantizeParams& col) {
  const int columns = TileTraits::kRowBytes / (row.x_type == FloatType::kFloat32 ? 4 : 2);
  return row.format == col.format && !row.toward && !col.toward && row.stride_k == 1 &&
         row.hadamard <= columns && !kFormats[row.format].e4m3_scale;
}

template <class T, class F>
static cudaError_t launch_dual(const QuantizeParams& row, const QuantizeParams& col,
                               cudaStream_t stream) {
  // The padding of either operand may reach one tile further than x.
  const int64_t columns = TileTraits::kChunks * T::kPerChunk, width = row.kp, height = col.kp;
  const int64_t across = (width + columns - 1) / columns,
                down = (height + TileTraits::kTileK - 1) / TileTraits::kTileK;
  const unsigned grid = static_cast<unsigned>(across * down);
  const bool vector = vector_copies<T>(col);
  constexpr int kThreads = TileTraits::kThreads;
  if constexpr (kHasPairs<typename T::Source, F>) {
    const Path row_path = choose_path<typename T::Source, F>(row),
               col_path = choose_path<typename T::Source, F>(col);
    if (row_path == Path::kPairs && col_path == Path::kPairs) {
      return launch(quantize_dual_kernel<T, F, Path::kPairs, Path::kPairs>, grid, kThreads, stream,
                    row, col, across, vector);
    }
    if (row_path == Path::kPairs) {
      return launch(quantize_dual_kernel<T, F, Path::kPairs, Path::kFloats>, grid, kThreads, stream,
                    row, col, across, vector);
    }
  }
  return launch(quantize_dual_kernel<T, F, Path::kFloats, Path::kFloats>, grid, kThreads, stream,
                row, col, across, vector);
}

template <class T>
static cudaError_t launch_dual_of(const QuantizeParams& row, const QuantizeParams& col,
                                  cudaStream_t stream) {
  switch (row.format) {
#define MXT_ROW(code, traits, name) \
  case code:                        \
    if constexpr (!traits::kE4M3Scale) return launch_dual<T, traits>(row, col, stream);
    MXT_FORMATS(MXT_ROW)
#undef MXT_ROW
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_quantize_dual(const QuantizeParams& row, const QuantizeParams& col,
                                 cudaStream_t stream) {
  if (can_strip_dual(row, col)) return launch_dual_strips(row, col, stream);
  switch (row.x_type) {
    case FloatType::kFloat32:
      return launch_dual_of<FloatTile<Float32Source>>(row, col, stream);
    case FloatType::kBfloat16:
      return launch_dual_of<FloatTile<Bfloat16Source>>(row, col, stream);
    case FloatType::kFloat16:
      return launch_dual_of<FloatTile<Float16Source>>(row, col, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxtrain::cuda
