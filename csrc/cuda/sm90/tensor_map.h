// SPDX-License-Identifier: Apache-2.0
// Tensor maps for the copy engine (CUDA driver API, "Tensor Map Object Management"). The encoder is
// asked of the driver at run time, so that nothing links libcuda.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace mxtrain::cuda::sm90 {

// A row-major matrix [rows, cols], `pitch` bytes from row to row, in boxes of box_rows rows of
// box_bytes bytes, 32, 64 or 128, stored in shared memory with the swizzle of that size. base:
// 16-byte aligned; pitch: a multiple of 16.
inline cudaError_t make_tensor_map(CUtensorMap* map, CUtensorMapDataType type, int element_bytes,
                                   const void* base, int64_t rows, int64_t cols, int64_t pitch,
                                   int box_rows, int box_bytes = 128) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault,
                                     &found);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(
        found == cudaDriverEntryPointSuccess ? function : nullptr);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(cols), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(pitch)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_bytes / element_bytes),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, type, 2, const_cast<void*>(base), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE,
             box_bytes == 32   ? CU_TENSOR_MAP_SWIZZLE_32B
             : box_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                               : CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace mxtrain::cuda::sm90
