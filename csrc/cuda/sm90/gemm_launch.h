// SPDX-License-Identifier: Apache-2.0
// What the launchers of the 8-bit GEMMs share (host code).
#pragma once

#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/sm90/gemm_consumer.cuh"
#include "cuda/sm90/tensor_map.h"

namespace mxtrain::cuda::sm90 {

// The map of D, where boxes can be stored, or, transposed, of its transpose [n, m]. Params: of any
// GEMM.
template <class Params>
inline cudaError_t make_out_map(const Params& p, CUtensorMap* out, bool* boxes,
                                bool transposed = false) {
  const int size = p.out_type == FloatType::kFloat32 ? 4 : 2;
  const int64_t rows = transposed ? p.n : p.m, cols = transposed ? p.m : p.n;
  *boxes = cols * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  if (!*boxes) return cudaSuccess;
  const CUtensorMapDataType type =
      p.out_type == FloatType::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
      : p.out_type == FloatType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int box_bytes = transposed ? 16 * size : 128;
  return make_tensor_map(out, type, size, p.out, rows, cols, cols * size, kOutBoxBytes / box_bytes,
                         box_bytes);
}

// The arguments of a kernel that computes p in tiles of T, and the map of D where boxes can be
// stored.
template <class T>
inline cudaError_t make_arguments(const FoldedGemmParams& p, KernelArgs* args, CUtensorMap* out) {
  args->p = p;
  args->order = {ceil_div(p.m, T::kTileM * T::kCluster), ceil_div(p.n, T::kTileN)};
  args->k_blocks = ceil_div(p.k, T::kTileK);
  args->moderate_alpha = is_moderate_alpha(p.alpha);
  return make_out_map(p, out, &args->boxes);
}

// Whether the large tile, 256 rows of a cluster of two by large_n, finishes before the small one of
// 128 x 128: rounds over the multiprocessors times the time of a tile, where `worth` small tiles
// take the time of a large one.
inline bool prefer_large(int64_t m, int64_t n, int large_n, double worth, int multiprocessors) {
  const int64_t large = int64_t{ceil_div(m, 256)} * ceil_div(n, large_n) * 2;
  const int64_t small = int64_t{ceil_div(m, 128)} * ceil_div(n, 128);
  return ceil_div(large, multiprocessors) * worth <= ceil_div(small, multiprocessors);
}

// One block a multiprocessor, in clusters of T::kCluster, started while the kernel before ends.
template <class T, class Kernel, class... Arguments>
cudaError_t launch_persistent(Kernel kernel, int tiles, int multiprocessors, cudaStream_t stream,
                              const Arguments&... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {T::kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(T::kCluster * std::min(tiles, multiprocessors / T::kCluster));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  last_launch() = {config.gridDim.x, config.blockDim.x};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace mxtrain::cuda::sm90
