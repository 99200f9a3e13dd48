// SPDX-License-Identifier: Apache-2.0
// Residuals of int8_block, packed: those of few blocks in a pool of tiles of 16 KB, and back again.
// Which blocks, and where each lies, formats/int8.h defines.
//   one thread block a block of the grid -> how many come before it, by looking at all -> the tile
// So it is one launch without a sort, atomics or a host that waits. A block that did not fall back
// is done at once; each of the others looks at the scales and the mask of all n, in some 30
// instructions for each 32 of them. So the whole grows with n^2: by that count it takes a quarter
// of the time that the tiles' bytes take for n = 2,048, and as long for n = 8,192 (16384 x 8192).
#include "cuda/int8.h"
#include "cuda/launch.cuh"
#include "formats/int8.h"
#include "ptx/memory.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct Int8Pool {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kUnits = kInt8Block / 16;         // of 16 bytes, in a row of a tile
  static constexpr int kRowStep = kThreads / kUnits;     // rows between a thread's units
  static constexpr int kLoads = kInt8Block / kRowStep;   // units of a thread
  static constexpr int kBatch = 4;                       // blocks that a thread looks at in one go
  static constexpr int kBlocks = 4;                      // on a multiprocessor: registers for these
  static constexpr int kTile = kInt8Block * kInt8Block;  // bytes
};

// ---- device helpers ----

// The sum over the block, in every thread.
__device__ __forceinline__ unsigned block_sum(unsigned partial) {
  __shared__ unsigned sums[Int8Pool::kWarps];
  const unsigned own = __reduce_add_sync(0xFFFFFFFFu, partial);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
  __syncthreads();
  unsigned sum = 0;
#pragma unroll
  for (int i = 0; i < Int8Pool::kWarps; ++i) sum += sums[i];
  return sum;
}

// Where the entries of a grid lie that a thread looks at: each kThreads blocks after the last.
struct Int8Walk {
  int64_t at, step, wrap;  // wrap: more, where a step ends beyond the last column

  __device__ __forceinline__ Int8Walk(int64_t stride_row, int64_t stride_k, unsigned across) {
    constexpr unsigned kStep = Int8Pool::kThreads;
    at = threadIdx.x / across * stride_row + threadIdx.x % across * stride_k;
    step = kStep / across * stride_row + kStep % across * stride_k;
    wrap = stride_row - across * stride_k;
  }
  __device__ __forceinline__ void advance(bool wraps) { at += wraps ? step + wrap : step; }
};

// How many blocks come before this thread block's, which has this scale.
__device__ __forceinline__ unsigned count_before(const Int8PoolParams& p, float scale,
                                                 unsigned across) {
  using T = Int8Pool;
  Int8Walk to_mask(p.mask_stride_row, p.mask_stride_k, across),
      to_scale(p.scale_stride_row, p.scale_stride_k, across);
  unsigned k = threadIdx.x % across, before = 0;
  for (unsigned first = threadIdx.x; first < gridDim.x; first += T::kBatch * T::kThreads) {
    uint8_t mask[T::kBatch];
    float other[T::kBatch];
#pragma unroll
    for (int j = 0; j < T::kBatch; ++j) {  // all on their way before one is looked at
      const bool inside = first + j * T::kThreads < gridDim.x;
      mask[j] = inside ? p.mask[to_mask.at] : 0;
      other[j] = inside ? p.scale[to_scale.at] : 0.0f;
      k += T::kThreads % across;
      const bool wraps = k >= across;
      if (wraps) k -= across;
      to_mask.advance(wraps);
      to_scale.advance(wraps);
    }
#pragma unroll
    for (int j = 0; j < T::kBatch; ++j)
      before += int8_packs_before(mask[j], other[j], first + j * T::kThreads, scale, blockIdx.x);
  }
  return block_sum(before);
}

// ---- kernel ----

template <bool kPack>
__global__ void __launch_bounds__(Int8Pool::kThreads, Int8Pool::kBlocks)
    int8_pool_kernel(const Int8PoolParams p) {
  using T = Int8Pool;
  const auto across = static_cast<unsigned>(p.kp / kInt8Block);
  const int64_t i = blockIdx.x / across, k = blockIdx.x % across;
  const float scale = p.scale[i * p.scale_stride_row + k * p.scale_stride_k];
  const uint8_t mask = p.mask[i * p.mask_stride_row + k * p.mask_stride_k];
  if (!int8_packs(mask, scale)) {
    if (kPack && threadIdx.x == 0) p.kept[blockIdx.x] = 0;
    return;
  }
  const int row = threadIdx.x / T::kUnits, col = threadIdx.x % T::kUnits * 16;
  const int64_t r0 = i * kInt8Block + row, k0 = k * kInt8Block + col;
  uint4 v[T::kLoads];
  if (kPack) {  // on their way while the blocks are counted
#pragma unroll
    for (int j = 0; j < T::kLoads; ++j) {
      const int64_t r = r0 + j * T::kRowStep;
      v[j] = r < p.rows ? ptx::ld_global_nc_v4(p.from + r * p.kp + k0) : make_uint4(0, 0, 0, 0);
    }
  }
  const int64_t slot = count_before(p, scale, across);
  if (kPack && threadIdx.x == 0) p.kept[blockIdx.x] = slot < p.count;
  if (slot >= p.count) return;
  const int64_t tile = slot * T::kTile + row * kInt8Block + col;
  if (!kPack) {
#pragma unroll
    for (int j = 0; j < T::kLoads; ++j)
      v[j] = ptx::ld_global_nc_v4(p.from + tile + j * T::kRowStep * kInt8Block);
  }
#pragma unroll
  for (int j = 0; j < T::kLoads; ++j) {
    const int64_t r = r0 + j * T::kRowStep;
    if (kPack)
      *reinterpret_cast<uint4*>(p.to + tile + j * T::kRowStep * kInt8Block) = v[j];
    else if (r < p.rows)
      *reinterpret_cast<uint4*>(p.to + r * p.kp + k0) = v[j];
  }
}

// ---- launchers ----

template <bool kPack>
static cudaError_t launch_pool(const Int8PoolParams& p, cudaStream_t stream) {
  const int64_t down = (p.rows + kInt8Block - 1) / kInt8Block;
  const auto grid = static_cast<unsigned>(down * (p.kp / kInt8Block));
  return launch(int8_pool_kernel<kPack>, grid, Int8Pool::kThreads, stream, p);
}

cudaError_t launch_int8_pack(const Int8PoolParams& p, cudaStream_t stream) {
  return launch_pool<true>(p, stream);
}

cudaError_t launch_int8_unpack(const Int8PoolParams& p, cudaStream_t stream) {
  return launch_pool<false>(p, stream);
}

}  // namespace mxtrain::cuda
