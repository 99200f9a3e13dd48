// SPDX-License-Identifier: Apache-2.0
// Residuals of int8_block, packed: those of few blocks in a pool of tiles of 16 KB, which int8_gemm
// reads as it is; and back again. formats/int8.h says which blocks, their slots say where.
//   packing    one thread block a block that packs: finds it -> how many come before it -> its slot
//              and its tile
//   unpacking  one thread block a block of the grid: its slot -> its tile
// So packing is one launch without a sort, atomics or a host that waits, and no more thread blocks
// than are at work at once. Each looks at the masks and scales of all n blocks, to find its own and
// again to count, with 34 instructions a warp for 32 blocks. So the whole grows with n^2: by that
// count it takes 0.6 of the time that the tiles' bytes take for n = 2,048, and 2.3 times as long
// for n = 8,192 (16384 x 8192).
#include <algorithm>
#include <utility>

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
  static constexpr int kBatch = 8;                       // blocks that a thread looks at in one go
  static constexpr int kBlocks = 4;                      // on a multiprocessor: registers for these
  static constexpr int kTile = kInt8Block * kInt8Block;  // bytes
};

// ---- device helpers ----

// The order in which a thread block looks at the blocks: that of the scales in memory, rows or
// columns of the grid (of a transposed operand they are columns), so that a warp's loads are few.
struct Int8PackOrder {
  unsigned blocks, inner;                                    // of these that lie beside each other
  int64_t mask_outer, mask_inner, scale_outer, scale_inner;  // strides
  unsigned number_outer, number_inner;  // of a block's number, that is, along the rows of the grid
};

// Where the entries of a grid lie that a thread looks at: each kThreads blocks after the last.
template <class Index>
struct Int8GridWalk {
  Index at, step, wrap;  // wrap: more, where a step ends beyond the last of the inner ones

  __device__ __forceinline__ Int8GridWalk(Index outer, Index inner, unsigned size) {
    constexpr unsigned kStep = Int8Pool::kThreads;
    at = threadIdx.x / size * outer + threadIdx.x % size * inner;
    step = kStep / size * outer + kStep % size * inner;
    wrap = outer - size * inner;
  }
  __device__ __forceinline__ void advance(bool wraps) { at += wraps ? step + wrap : step; }
};

// What a thread sees of kBatch blocks, kThreads apart; no mask beyond the last.
struct Int8Batch {
  uint8_t mask[Int8Pool::kBatch];
  float scale[Int8Pool::kBatch];
  unsigned number[Int8Pool::kBatch];
};

// All blocks, a batch in each thread at a time.
struct Int8PackWalk {
  const Int8PackParams& p;
  const Int8PackOrder& order;
  unsigned first = threadIdx.x;  // of the batch
  unsigned inner = threadIdx.x % order.inner;
  Int8GridWalk<int64_t> to_mask = {order.mask_outer, order.mask_inner, order.inner};
  Int8GridWalk<int64_t> to_scale = {order.scale_outer, order.scale_inner, order.inner};
  Int8GridWalk<unsigned> to_number = {order.number_outer, order.number_inner, order.inner};

  __device__ __forceinline__ bool more() const { return first - threadIdx.x < order.blocks; }

  __device__ __forceinline__ Int8Batch next() {
    using T = Int8Pool;
    Int8Batch batch;
#pragma unroll
    for (int j = 0; j < T::kBatch; ++j) {  // all on their way before one is looked at
      const bool inside = first + j * T::kThreads < order.blocks;
      batch.mask[j] = inside ? p.mask[to_mask.at] : 0;
      batch.scale[j] = inside ? p.scale[to_scale.at] : 0.0f;
      batch.number[j] = to_number.at;
      inner += T::kThreads % order.inner;
      const bool wraps = inner >= order.inner;
      if (wraps) inner -= order.inner;
      to_mask.advance(wraps);
      to_scale.advance(wraps);
      to_number.advance(wraps);
    }
    first += T::kBatch * T::kThreads;
    return batch;
  }
};

struct WarpSums {
  unsigned below, all;  // of the warps below this one, and of all
};

// own: of the warp, in every lane.
__device__ __forceinline__ WarpSums sum_warps(unsigned own) {
  __shared__ unsigned sums[Int8Pool::kWarps];
  __syncthreads();  // what was read of them before has been read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = own;
  __syncthreads();
  WarpSums s = {};
#pragma unroll
  for (unsigned i = 0; i < Int8Pool::kWarps; ++i) {
    s.below += i < threadIdx.x / 32 ? sums[i] : 0;
    s.all += sums[i];
  }
  return s;
}

struct PackingBlock {
  unsigned number;  // order.blocks: there is none
  float scale;
};

// The block that packs and has `rank` others before it, in an order that is the same everywhere (by
// batch, warp, place in the batch, lane).
__device__ __forceinline__ PackingBlock find_packing(const Int8PackParams& p,
                                                     const Int8PackOrder& order, unsigned rank) {
  using T = Int8Pool;
  __shared__ PackingBlock found;
  const unsigned lane = threadIdx.x % 32;
  for (Int8PackWalk walk = {p, order}; walk.more();) {
    const Int8Batch batch = walk.next();
    unsigned packing[T::kBatch], own = 0;
#pragma unroll
    for (int j = 0; j < T::kBatch; ++j) {
      packing[j] = __ballot_sync(~0u, int8_packs(batch.mask[j], batch.scale[j]));
      own += __popc(packing[j]);
    }
    const WarpSums sums = sum_warps(own);
    if (rank >= sums.all) {
      rank -= sums.all;
      continue;
    }
    unsigned before = sums.below;
#pragma unroll
    for (int j = 0; j < T::kBatch; ++j) {
      const bool packs = packing[j] >> lane & 1;
      if (packs && before + __popc(packing[j] & ((1u << lane) - 1)) == rank)
        found = {batch.number[j], batch.scale[j]};
      before += __popc(packing[j]);
    }
    __syncthreads();
    return found;
  }
  return {order.blocks, 0.0f};
}

// How many blocks come before this one.
__device__ __forceinline__ unsigned count_before(const Int8PackParams& p,
                                                 const Int8PackOrder& order,
                                                 const PackingBlock& block) {
  unsigned before = 0;
  for (Int8PackWalk walk = {p, order}; walk.more();) {
    const Int8Batch batch = walk.next();
#pragma unroll
    for (int j = 0; j < Int8Pool::kBatch; ++j)
      before += int8_packs_before(batch.mask[j], batch.scale[j], batch.number[j], block.scale,
                                  block.number);
  }
  return sum_warps(__reduce_add_sync(~0u, before)).all;
}

// A thread's units of a tile, and of the same block in its matrix [rows, kp].
struct Int8TileCopy {
  int64_t r0, at, pitch, tile;  // at: of the first unit in the matrix

  __device__ __forceinline__ Int8TileCopy(int64_t i, int64_t k, int64_t kp) {
    using T = Int8Pool;
    const int row = threadIdx.x / T::kUnits, col = threadIdx.x % T::kUnits * 16;
    r0 = i * kInt8Block + row;
    at = r0 * kp + k * kInt8Block + col;
    pitch = T::kRowStep * kp;
    tile = row * kInt8Block + col;
  }
  __device__ __forceinline__ bool exists(int j, int64_t rows) const {
    return r0 + j * Int8Pool::kRowStep < rows;
  }
  // Of unit j.
  __device__ __forceinline__ int64_t in_matrix(int j) const { return at + j * pitch; }
  __device__ __forceinline__ int64_t in_pool(int64_t number, int j) const {
    return number * Int8Pool::kTile + tile + j * Int8Pool::kRowStep * kInt8Block;
  }
};

// ---- kernels ----

__global__ void __launch_bounds__(Int8Pool::kThreads, Int8Pool::kBlocks)
    int8_pack_kernel(const Int8PackParams p, const Int8PackOrder order) {
  using T = Int8Pool;
  const auto across = static_cast<unsigned>(p.kp / kInt8Block);
  for (unsigned rank = blockIdx.x;; rank += gridDim.x) {
    const PackingBlock block = find_packing(p, order, rank);
    if (block.number == order.blocks) break;
    const Int8TileCopy copy(block.number / across, block.number % across, p.kp);
    uint4 v[T::kLoads];  // on their way while the blocks are counted
#pragma unroll
    for (int j = 0; j < T::kLoads; ++j)
      v[j] = copy.exists(j, p.rows) ? ptx::ld_global_nc_v4(p.from + copy.in_matrix(j))
                                    : make_uint4(0, 0, 0, 0);
    const int64_t tile = count_before(p, order, block);
    const bool kept = tile < p.count;
    if (threadIdx.x == 0) p.slots[block.number] = kept ? static_cast<int32_t>(tile) + 1 : 0;
    if (!kept) continue;
#pragma unroll
    for (int j = 0; j < T::kLoads; ++j)
      *reinterpret_cast<uint4*>(p.to + copy.in_pool(tile, j)) = v[j];
  }
  for (unsigned at = blockIdx.x * T::kThreads + threadIdx.x; at < order.blocks;
       at += gridDim.x * T::kThreads) {
    const unsigned outer = at / order.inner, inner = at % order.inner;
    const uint8_t mask = p.mask[outer * order.mask_outer + inner * order.mask_inner];
    const float scale = p.scale[outer * order.scale_outer + inner * order.scale_inner];
    if (!int8_packs(mask, scale))
      p.slots[outer * order.number_outer + inner * order.number_inner] = 0;
  }
}

__global__ void __launch_bounds__(Int8Pool::kThreads) int8_unpack_kernel(const Int8UnpackParams p) {
  using T = Int8Pool;
  const auto across = static_cast<unsigned>(p.kp / kInt8Block);
  const unsigned i = blockIdx.x / across, k = blockIdx.x % across;
  const int64_t number = int64_t{p.slots.at(i, k)} - 1;
  if (number < 0 || number >= p.count) return;
  const Int8TileCopy copy(i, k, p.kp);
#pragma unroll
  for (int j = 0; j < T::kLoads; ++j)
    if (copy.exists(j, p.rows))
      *reinterpret_cast<uint4*>(p.to + copy.in_matrix(j)) =
          ptx::ld_global_nc_v4(p.from + copy.in_pool(number, j));
}

// ---- launchers ----

cudaError_t launch_int8_pack(const Int8PackParams& p, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const unsigned down = ceil_div(p.rows, kInt8Block), across = ceil_div(p.kp, kInt8Block);
  Int8PackOrder order = {down * across,
                         across,
                         p.mask_stride_row,
                         p.mask_stride_k,
                         p.scale_stride_row,
                         p.scale_stride_k,
                         across,
                         1};
  if (p.scale_stride_row < p.scale_stride_k) {
    order.inner = down;
    std::swap(order.mask_outer, order.mask_inner);
    std::swap(order.scale_outer, order.scale_inner);
    std::swap(order.number_outer, order.number_inner);
  }
  const unsigned grid = std::min<unsigned>(order.blocks, multiprocessors * Int8Pool::kBlocks);
  return launch(int8_pack_kernel, grid, Int8Pool::kThreads, stream, p, order);
}

cudaError_t launch_int8_unpack(const Int8UnpackParams& p, cudaStream_t stream) {
  const unsigned grid = ceil_div(p.rows, kInt8Block) * ceil_div(p.kp, kInt8Block);
  return launch(int8_unpack_kernel, grid, Int8Pool::kThreads, stream, p);
}

}  // namespace mxtrain::cuda
