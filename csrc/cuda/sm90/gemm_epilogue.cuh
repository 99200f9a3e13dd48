// SPDX-License-Identifier: Apache-2.0
// The fast way from scaled accumulators (cuda/fold_epilogue.cuh) to D: through shared memory and
// the copy engine, which may add to a float32 D.
#pragma once

#include "cuda/fold_epilogue.cuh"
#include "ptx/tma.cuh"

namespace mxtrain::cuda::sm90 {

// 16 rows, 128 bytes of each, from d on, into a swizzled box in shared memory.
template <FloatType kType>
__device__ __forceinline__ void fill_box(const float* d, uint32_t box, int lane) {
  if constexpr (kType == FloatType::kFloat32) {
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int r = lane / 4 + 8 * i, chunk = (2 * j + lane % 4 / 2) ^ (r % 8);
        const float* v = d + 4 * j + 2 * i;
        ptx::st_shared_v2(box + r * 128 + chunk * 16 + lane % 2 * 8, float_bits(v[0]),
                          float_bits(v[1]));
      }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* v = d + 4 * j;
      const int r = lane % 16, chunk = (j + lane / 16) ^ (r % 8);
      ptx::stmatrix_x4(box + r * 128 + chunk * 16, pack2<kType>(v[0], v[1]),
                       pack2<kType>(v[2], v[3]), pack2<kType>(v[4], v[5]),
                       pack2<kType>(v[6], v[7]));
    }
  }
}

// The same transposed: 128 bytes of 16 rows of d become 16 elements of each of the box's rows.
template <FloatType kType>
__device__ __forceinline__ void fill_box_transposed(const float* d, uint32_t box, int lane) {
  if constexpr (kType == FloatType::kFloat32) {
#pragma unroll
    for (int e = 0; e < 16; ++e) {
      const int r = 8 * (e / 4) + lane % 4 * 2 + e % 2, column = lane / 4 + 8 * (e % 4 / 2);
      ptx::st_shared_b32(box + r * 64 + (column / 4 ^ r / 2 % 4) * 16 + column % 4 * 4,
                         float_bits(d[e]));
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* v = d + 4 * j;
      const int r = 8 * (j + lane / 16) + lane % 8, chunk = lane / 8 % 2 ^ r / 4 % 2;
      ptx::stmatrix_x4_trans(box + r * 32 + chunk * 16, pack2<kType>(v[0], v[1]),
                             pack2<kType>(v[2], v[3]), pack2<kType>(v[4], v[5]),
                             pack2<kType>(v[6], v[7]));
    }
  }
}

// 16 rows from m and 64 columns from n on through the warp's boxes and the copy engine, which
// leaves out what lies outside D. With two, boxes take turns: one is filled while the other is
// read. `first` is the number of boxes before these. No element is in two boxes, so adding has one
// order. kTransposed: D is the transpose of what is summed, and so is the map.
template <FloatType kType, int kBoxes, int kBoxBytes, bool kTransposed = false>
__device__ __forceinline__ void store_boxes(const float* d, const void* map, int m, int n,
                                            uint32_t boxes, int first, bool add, int lane) {
  constexpr int kCount = kType == FloatType::kFloat32 ? 2 : 1, kCols = 64 / kCount;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t box = boxes + (first * kCount + i) % kBoxes * kBoxBytes;
    if (lane == 0) ptx::cp_async_bulk_wait_group_read<kBoxes - 1>();
    __syncwarp();
    if constexpr (kTransposed)
      fill_box_transposed<kType>(d + 32 / kCount * i, box, lane);
    else
      fill_box<kType>(d + 32 / kCount * i, box, lane);
    ptx::fence_proxy_async_shared();
    __syncwarp();
    if (lane == 0) {
      if (kTransposed)
        ptx::cp_async_bulk_tensor_2d_store(map, m, n + i * kCols, box);
      else if (kType == FloatType::kFloat32 && add)
        ptx::cp_reduce_async_bulk_tensor_2d_add(map, n + i * kCols, m, box);
      else
        ptx::cp_async_bulk_tensor_2d_store(map, n + i * kCols, m, box);
      ptx::cp_async_bulk_commit_group();
    }
  }
}

}  // namespace mxtrain::cuda::sm90
