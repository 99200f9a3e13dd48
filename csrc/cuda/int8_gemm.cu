// SPDX-License-Identifier: Apache-2.0
// D[M, N] = A B^T + bias of int8_block operands on the integer tensor cores that every GPU since
// sm_80 has (mma.sync m16n8k32).
//
// A thread block makes a 128 x 128 tile of D, K in steps of one block: so one scale and one entry
// of the mask serve a step. A block that fell back is a step of its own, of the residual's codes
// and the other operand's again. Copies run kStages - 1 steps ahead. An integer sum starts at the
// bits of 1.5 * 2^23, of which it moves the low bits only (|I| < 2^22): read as a float32 minus
// that constant it is the integer, without a conversion. Then acc = fma(scale, I, acc).
#include "cuda/group.cuh"
#include "cuda/int8.h"
#include "cuda/launch.cuh"
#include "cuda/store.cuh"
#include "cuda/tile_order.cuh"
#include "formats/int8.h"
#include "ptx/memory.cuh"
#include "ptx/mma.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct Int8GemmTile {
  static constexpr int kThreads = 256, kWarpsN = 4;  // 2 x 4 warps of 64 x 32
  static constexpr int kTile = kInt8Block, kRowBytes = kInt8Block;
  static constexpr int kFragmentsM = 4, kFragmentsN = 4;  // 16 x 8 accumulators of a warp
  static constexpr int kStages = 3;
  static constexpr int kBytes = kTile * kRowBytes;  // of one operand of a stage
  static constexpr int kSharedBytes = kStages * 2 * kBytes;
  static_assert(kSharedBytes <= 99 * 1024, "the shared memory of a block on sm_86 and sm_89");
};

// ---- device helpers ----

// A step along K: the codes of block k, or (second) the residual's.
struct Int8Step {
  int k = 0;
  bool second = false;
};

// The rows of a block, and how many exist.
struct Int8Rows {
  const int8_t* first;
  int64_t pitch, count;
};

struct Int8Walk {
  const Int8GemmParams& p;
  int i, j;  // of the tile, in blocks

  __device__ __forceinline__ bool fell_back(int k) const {
    const int own = p.residual_of_b ? j : i;
    return p.mask.given() && p.mask.at(own, k) != 0;
  }
  __device__ __forceinline__ void advance(Int8Step& s) const {
    if (!s.second && fell_back(s.k)) {
      s.second = true;
    } else {
      s.second = false;
      ++s.k;
    }
  }
  __device__ __forceinline__ bool is_residual(bool of_b, bool second) const {
    return second && of_b == p.residual_of_b;
  }
  __device__ __forceinline__ const Int8Codes& codes(bool of_b, bool second) const {
    return is_residual(of_b, second) ? p.residual : of_b ? p.b : p.a;
  }
  __device__ __forceinline__ Int8Rows rows(bool of_b, const Int8Step& s) const {
    const int8_t* data = codes(of_b, s.second).data;
    const int own = of_b ? j : i;
    if (p.mask.slots && is_residual(of_b, s.second)) {
      const int tile = p.tile_of(p.mask.at(own, s.k));
      return {data + static_cast<int64_t>(tile) * kInt8Block * kInt8Block, kInt8Block,
              tile < p.tiles ? kInt8Block : 0};
    }
    const int64_t row0 = static_cast<int64_t>(own) * kInt8Block;
    return {data + row0 * p.kp + s.k * kInt8Block, p.kp, (of_b ? p.n : p.m) - row0};
  }
  __device__ __forceinline__ float scale(const Int8Step& s) const {
    const Int8Codes &a = codes(false, s.second), &b = codes(true, s.second);
    return __ldg(a.scale + i * a.stride_row + s.k * a.stride_k) *
           __ldg(b.scale + j * b.stride_row + s.k * b.stride_k);
  }
};

// Chunk c of 16 bytes of row r of an operand in shared memory: 8 rows' same chunk in all banks.
__device__ __forceinline__ uint32_t chunk_at(uint32_t base, int r, int c) {
  return base + r * Int8GemmTile::kRowBytes + ((c ^ (r % 8)) * 16);
}

// Zeros stand where no row exists.
__device__ __forceinline__ void copy_rows(uint32_t shared, const Int8Rows& rows) {
  using T = Int8GemmTile;
  constexpr int kChunks = T::kRowBytes / 16;
#pragma unroll
  for (int t = 0; t < T::kTile * kChunks / T::kThreads; ++t) {
    const int at = t * T::kThreads + threadIdx.x, r = at / kChunks, c = at % kChunks;
    const bool exists = r < rows.count;
    const int8_t* from = rows.first + (exists ? r * rows.pitch + c * 16 : 0);
    ptx::cp_async_16(chunk_at(shared, r, c), from, exists ? 16 : 0);
  }
}

// The products of one step, and what they add to acc.
__device__ __forceinline__ void multiply(float (&acc)[4][4][4], uint32_t a, uint32_t b, float scale,
                                         int warp_m, int warp_n, int lane) {
  using T = Int8GemmTile;
  constexpr int32_t kMagic = static_cast<int32_t>(kInt8MagicBits);
  const int32_t start[4] = {kMagic, kMagic, kMagic, kMagic};
  int32_t sum[4][4][4];
  // Matrices of an x4 load. A: rows 0-7, 8-15, then the next 16 bytes; B: the two chunks of rows
  // 0-7, then of rows 8-15.
  const int a_row = warp_m * 64 + lane % 16, a_chunk = lane / 16;
  const int b_row = warp_n * 32 + lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
#pragma unroll
  for (int k = 0; k < kInt8Block / 32; ++k) {
    uint32_t fa[T::kFragmentsM][4], fb[T::kFragmentsN / 2][4];
#pragma unroll
    for (int m = 0; m < T::kFragmentsM; ++m)
      ptx::ldmatrix_x4(fa[m], chunk_at(a, a_row + 16 * m, 2 * k + a_chunk));
#pragma unroll
    for (int n = 0; n < T::kFragmentsN / 2; ++n)
      ptx::ldmatrix_x4(fb[n], chunk_at(b, b_row + 16 * n, 2 * k + b_chunk));
#pragma unroll
    for (int m = 0; m < T::kFragmentsM; ++m)
#pragma unroll
      for (int n = 0; n < T::kFragmentsN; ++n)
        ptx::mma_m16n8k32_s8(sum[m][n], fa[m], fb[n / 2] + n % 2 * 2, k == 0 ? start : sum[m][n]);
  }
#pragma unroll
  for (int m = 0; m < T::kFragmentsM; ++m)
#pragma unroll
    for (int n = 0; n < T::kFragmentsN; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        acc[m][n][e] = int8_promote(acc[m][n][e], scale, __int_as_float(sum[m][n][e]) - kInt8Magic);
}

template <FloatType kType>
__device__ __forceinline__ void store_pair(const Int8GemmParams& p, int64_t row, int64_t col,
                                           float low, float high) {
  if (row >= p.m || col >= p.n) return;
  const bool both = col + 1 < p.n;
  if (p.bias) {
    low += load_any(p.bias, p.bias_type, col);
    if (both) high += load_any(p.bias, p.bias_type, col + 1);
  }
  const int64_t at = row * p.n + col;
  if constexpr (kType == FloatType::kFloat32) {
    auto* out = static_cast<float*>(p.out) + at;
    out[0] = low;
    if (both) out[1] = high;
  } else {
    constexpr bool kBrain = kType == FloatType::kBfloat16;
    const uint32_t w = kBrain ? quiet_halves(ptx::cvt_rn_bf16x2(low, high), 0x7F80u, 0x7FC0u)
                              : quiet_halves(ptx::cvt_rn_f16x2(low, high), 0x7C00u, 0x7E00u);
    auto* out = static_cast<uint16_t*>(p.out) + at;
    if (both && at % 2 == 0 && p.n % 2 == 0) {
      *reinterpret_cast<uint32_t*>(out) = w;
    } else {
      out[0] = static_cast<uint16_t>(w);
      if (both) out[1] = static_cast<uint16_t>(w >> 16);
    }
  }
}

// ---- kernel ----

template <FloatType kType>
__global__ void __launch_bounds__(Int8GemmTile::kThreads, 1)
    int8_gemm_kernel(const __grid_constant__ Int8GemmParams p, TileOrder order) {
  using T = Int8GemmTile;
  MXT_DYNAMIC_SHARED(memory, 128);
  const uint32_t shared = ptx::shared_address(memory);
  int tile_m, tile_n;
  order.at(blockIdx.x, tile_m, tile_n);
  const Int8Walk walk = {p, tile_m, tile_n};
  const int64_t m0 = static_cast<int64_t>(walk.i) * T::kTile,
                n0 = static_cast<int64_t>(walk.j) * T::kTile;
  const int blocks = static_cast<int>(p.kp / kInt8Block);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / T::kWarpsN, warp_n = warp % T::kWarpsN;

  Int8Step ahead, step;
  int fill = 0, use = 0;
  const auto copy_next = [&] {
    if (ahead.k < blocks) {
      const uint32_t stage = shared + fill * 2 * T::kBytes;
      copy_rows(stage, walk.rows(false, ahead));
      copy_rows(stage + T::kBytes, walk.rows(true, ahead));
      fill = fill + 1 == T::kStages ? 0 : fill + 1;
      walk.advance(ahead);
    }
    ptx::cp_async_commit_group();
  };
  for (int i = 0; i < T::kStages - 1; ++i) copy_next();

  float acc[T::kFragmentsM][T::kFragmentsN][4] = {};
  while (step.k < blocks) {
    const float scale = walk.scale(step);
    ptx::cp_async_wait_group<T::kStages - 2>();
    __syncthreads();  // the stage is there for all, and all have read the one before
    copy_next();
    const uint32_t stage = shared + use * 2 * T::kBytes;
    multiply(acc, stage, stage + T::kBytes, scale, warp_m, warp_n, lane);
    use = use + 1 == T::kStages ? 0 : use + 1;
    walk.advance(step);
  }
#pragma unroll
  for (int m = 0; m < T::kFragmentsM; ++m)
#pragma unroll
    for (int n = 0; n < T::kFragmentsN; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_pair<kType>(p, m0 + warp_m * 64 + m * 16 + half * 8 + lane / 4,
                          n0 + warp_n * 32 + n * 8 + lane % 4 * 2, acc[m][n][2 * half],
                          acc[m][n][2 * half + 1]);
}

// ---- launcher ----

cudaError_t launch_int8_gemm(const Int8GemmParams& p, cudaStream_t stream) {
  using T = Int8GemmTile;
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  const auto kernel = p.out_type == FloatType::kFloat32    ? int8_gemm_kernel<FloatType::kFloat32>
                      : p.out_type == FloatType::kBfloat16 ? int8_gemm_kernel<FloatType::kBfloat16>
                                                           : int8_gemm_kernel<FloatType::kFloat16>;
  const TileOrder order = {ceil_div(p.m, T::kTile), ceil_div(p.n, T::kTile)};
  return launch_with_shared(kernel, order.count(), T::kThreads, T::kSharedBytes, stream, p, order);
}

}  // namespace mxtrain::cuda
