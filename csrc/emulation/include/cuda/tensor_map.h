// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/tensor_map.h, emulated: what ptx/tma.cuh needs of a map, for swizzles of 128 bytes.
#pragma once

#include <cstdint>

#include "cuda_runtime_api.h"

enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };

namespace mxtrain::cuda {

struct TensorMap {
  const uint8_t* base;
  int64_t rows, row_bytes, pitch;
  int element_bytes, box_rows;
};

inline cudaError_t make_tensor_map(TensorMap* map, CUtensorMapDataType, int element_bytes,
                                   const void* base, int64_t rows, int64_t cols, int64_t pitch,
                                   int box_rows) {
  if (reinterpret_cast<uintptr_t>(base) % 16 != 0 || pitch % 16 != 0) return cudaErrorInvalidValue;
  *map = {static_cast<const uint8_t*>(base),
          rows,
          cols * element_bytes,
          pitch,
          element_bytes,
          box_rows};
  return cudaSuccess;
}

}  // namespace mxtrain::cuda
