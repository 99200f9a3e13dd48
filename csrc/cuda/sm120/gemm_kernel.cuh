// SPDX-License-Identifier: Apache-2.0
// D[M, N] = alpha * A[M, K] B[N, K]^T + bias[n] of block-scaled operands, codes and scales as they
// are stored (cuda/sm120/gemm_block_scale.h), D in bfloat16, float16 or float32; a float32 D may be
// added to. For compute capability 12.0 and 12.1, whose tensor cores apply the scales
// (ptx/mma_block_scale.cuh). It compiles for others, too, with that one instruction emulated: a
// check of everything here but its speed.
//
// One thread block a multiprocessor walks over tiles of D. All 8 warps copy stages of 64 or 128
// bytes of K, with their scales, into a ring in shared memory (cp.async), which runs ahead into the
// next tile while D is written, and multiply 32 or 64 rows and 64 columns each. What lies outside A
// and B, rows and K, is copied as zeros, codes and scales, and adds zeros to the products.
//
// A NaN scale makes its row (column) NaN by the instruction's own arithmetic. Every sum has one
// order, so the same operands give the same bytes.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "cuda/fold_epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm120/gemm_block_scale.h"
#include "cuda/sm120/gemm_traits.cuh"
#include "cuda/tile_order.cuh"
#include "ptx/mma_block_scale.cuh"

namespace mxtrain::cuda::sm120 {

// ---- arguments ----

struct KernelArgs {
  BlockScaledGemmParams p;
  TileOrder order;
  int k_blocks;
  bool pairs;  // D's rows are whole 8-byte units
};

// ---- copying ----

// How many of `size` bytes from `at` on lie before `end`.
__device__ __forceinline__ int inside(int at, int size, int end) {
  return min(max(end - at, 0), size);
}

// This thread's part of every stage of every tile that this block works on, in order.
template <class T>
class Loader {
 public:
  __device__ __forceinline__ Loader(const KernelArgs& args, uint32_t shared)
      : args_(args), shared_(shared), tile_(blockIdx.x) {
    aim();
  }

  // The next stage on its way, as one group of copies; an empty one when all are.
  __device__ __forceinline__ void next() {
    if (tile_ < args_.order.count()) {
      const BlockScaledGemmParams& p = args_.p;
      const uint32_t to = shared_ + stage_ * T::kBytesStage;
      const int codes = block_ * T::kRowBytes + unit();
      const int bytes = inside(codes, kUnit, p.row_bytes);
      copy<T::kTileM>(p.a, p.a_pitch, first_m_, static_cast<int>(p.m), codes, bytes, to);
      copy<T::kTileN>(p.b, p.b_pitch, first_n_, static_cast<int>(p.n), codes, bytes,
                      to + T::kBytesA);
      copy_scales(to + T::kOffsetScales);
      advance();
    }
    ptx::cp_async_commit_group();
  }

 private:
  const KernelArgs& args_;
  const uint32_t shared_;
  int tile_, block_ = 0, stage_ = 0;
  int first_m_, first_n_;  // of the tile

  __device__ static __forceinline__ int row() { return threadIdx.x / T::kUnits; }
  __device__ static __forceinline__ int unit() { return threadIdx.x % T::kUnits * kUnit; }

  // At the first stage of tile_.
  __device__ __forceinline__ void aim() {
    int m, n;
    args_.order.at(tile_, m, n);
    first_m_ = m * T::kTileM;
    first_n_ = n * T::kTileN;
  }

  __device__ __forceinline__ void advance() {
    if (++stage_ == T::kStages) stage_ = 0;
    if (++block_ < args_.k_blocks) return;
    block_ = 0;
    tile_ += gridDim.x;
    if (tile_ < args_.order.count()) aim();
  }

  // Unit unit() of the rows of a factor, which has `rows`, from `first` on. codes: its first byte
  // in a row, of which `bytes` are the operand's.
  template <int kRows>
  __device__ __forceinline__ void copy(const uint8_t* factor, int64_t pitch, int first, int rows,
                                       int codes, int bytes, uint32_t to) const {
    const int at = first + row();
    const uint8_t* from = factor + at * pitch + codes;
    to += swizzled<T::kUnits>(row(), threadIdx.x % T::kUnits);
#pragma unroll
    for (int i = 0; i < kRows; i += T::kCopyRows) {
      const bool exists = bytes > 0 && at + i < rows;
      ptx::cp_async_16(to + i * T::kRowBytes, exists ? from + i * pitch : factor,
                       exists ? bytes : 0);
    }
  }

  // The words of scales of A's rows and then of B's.
  __device__ __forceinline__ void copy_scales(uint32_t to) const {
    const BlockScaledGemmParams& p = args_.p;
#pragma unroll
    for (int i = 0; i < T::kScaleCopies; i += T::kThreads) {
      const int copy = i + threadIdx.x, row = copy / T::kScaleWords;
      if (T::kScaleCopies % T::kThreads != 0 && copy >= T::kScaleCopies) break;
      const bool of_a = row < T::kTileM;
      const int at = of_a ? first_m_ + row : first_n_ + row - T::kTileM;
      const int first = block_ * T::kScaleBytes + copy % T::kScaleWords * 4;
      const int bytes = at < (of_a ? p.m : p.n) ? inside(first, 4, p.blocks) : 0;
      const uint8_t* factor = of_a ? p.a_scale : p.b_scale;
      const int64_t pitch = of_a ? p.a_scale_pitch : p.b_scale_pitch;
      ptx::cp_async_4(to + copy * 4, bytes > 0 ? factor + at * pitch + first : factor, bytes);
    }
  }
};

// ---- multiplying ----

// f(0), f(1), ... with the numbers as types.
template <class Function, int... kNumbers>
__device__ __forceinline__ void with_each(std::integer_sequence<int, kNumbers...>,
                                          const Function& f) {
  (f(std::integral_constant<int, kNumbers>{}), ...);
}
template <int kCount, class Function>
__device__ __forceinline__ void for_each(const Function& f) {
  with_each(std::make_integer_sequence<int, kCount>{}, f);
}

// D of a warp: 16 rows a fragment, laid out as cuda/fold_epilogue.cuh says.
template <class T>
using Accumulators = float[T::kFragmentsM][4 * T::kFragmentsN];

// Where a lane reads in a stage, from its start. warp: of the block.
template <class T>
struct Addresses {
  uint32_t a, b, scales_a, scales_b;

  __device__ __forceinline__ Addresses(int warp, int lane) {
    const int m = warp / T::kWarpsN * T::kWarpM, n = warp % T::kWarpsN * T::kWarpN;
    a = m * T::kRowBytes + swizzled<T::kUnits>(AddressA::row(lane), AddressA::unit(lane));
    b = T::kBytesA + n * T::kRowBytes +
        swizzled<T::kUnits>(AddressB::row(lane), AddressB::unit(lane));
    scales_a = T::kOffsetScales + (m + scale_row_a(lane)) * T::kScaleBytes;
    scales_b = T::kOffsetScales + (T::kTileM + n + scale_row_b(lane)) * T::kScaleBytes;
  }
};

// The scales of a stage of kRows rows of a factor: of 32 each, one row a lane.
template <class T, int kRows>
struct Scales {
  uint32_t words[kRows / 32][T::kScaleWords];

  __device__ __forceinline__ void load(uint32_t shared) {
#pragma unroll
    for (int i = 0; i < kRows / 32; ++i) {
      const uint32_t at = shared + i * 32 * T::kScaleBytes;
      if constexpr (T::kScaleWords == 1) {
        words[i][0] = ptx::ld_shared_b32(at);
      } else {
        const uint2 both = ptx::ld_shared_v2(at);
        words[i][0] = both.x;
        words[i][1] = both.y;
      }
    }
  }
};

// One instruction's K of a warp's rows of A and of B.
template <class T>
struct Fragments {
  uint32_t a[T::kFragmentsM][4], b[T::kFragmentsN / 2][4];

  __device__ __forceinline__ void load(uint32_t at_a, uint32_t at_b, int step) {
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; ++i)
      ptx::ldmatrix_x4(a[i], (at_a ^ (32 * step)) + i * 16 * T::kRowBytes);
#pragma unroll
    for (int j = 0; j < T::kFragmentsN / 2; ++j)
      ptx::ldmatrix_x4(b[j], (at_b ^ (32 * step)) + j * 16 * T::kRowBytes);
  }
};

// One stage, which starts at `shared`.
template <class T>
__device__ __forceinline__ void multiply(Accumulators<T>& d, uint32_t shared,
                                         const Addresses<T>& at) {
  Scales<T, T::kWarpM> scales_a;
  Scales<T, T::kWarpN> scales_b;
  scales_a.load(shared + at.scales_a);
  scales_b.load(shared + at.scales_b);
  for_each<T::kSteps>([&](auto step) {
    constexpr int kWord = step / T::kStepsPerWord;
    constexpr int kByte = step % T::kStepsPerWord * T::Shape::kScales;
    Fragments<T> f;
    f.load(shared + at.a, shared + at.b, step);
    for_each<T::kFragmentsM>([&](auto i) {
      for_each<T::kFragmentsN>([&](auto j) {
        float* total = d[i] + 4 * j;
        const uint32_t *a = f.a[i], *b = f.b[j / 2] + j % 2 * 2;
        const uint32_t scale_a = scales_a.words[i / 2][kWord],
                       scale_b = scales_b.words[j / 4][kWord];
        if constexpr (T::kSeparate) {
          constexpr float kZeros[4] = {};
          float product[4];
          ptx::mma_block_scale<typename T::Format, kByte, i % 2, kByte, j % 4>(
              product, a, b, kZeros, scale_a, scale_b);
#pragma unroll
          for (int e = 0; e < 4; ++e) total[e] += product[e];
        } else {
          ptx::mma_block_scale<typename T::Format, kByte, i % 2, kByte, j % 4>(total, a, b, total,
                                                                               scale_a, scale_b);
        }
      });
    });
  });
}

// ---- finishing ----

template <class T, FloatType kType>
__device__ __forceinline__ void store(const Accumulators<T>& d, const KernelArgs& args, int m,
                                      int n, int lane) {
  const BlockScaledGemmParams& p = args.p;
  const int rows = static_cast<int>(p.m), cols = static_cast<int>(p.n);
#pragma unroll
  for (int i = 0; i < T::kFragmentsM; ++i) {
    if (__builtin_expect(args.pairs, 1))
      store_pairs<kType>(d[i], p.out, m + 16 * i, n, rows, cols, p.add, lane);
    else
      store_elements<kType>(d[i], p.out, m + 16 * i, n, rows, cols, p.add, lane);
  }
}

// m, n: the warp's first row and column.
template <class T>
__device__ __forceinline__ void finish(Accumulators<T>& d, const KernelArgs& args, int m, int n,
                                       int lane) {
  const BlockScaledGemmParams& p = args.p;
  if (n >= p.n) return;
  const float a = p.a_tensor_scale ? *p.a_tensor_scale : 1.0f,
              b = p.b_tensor_scale ? *p.b_tensor_scale : 1.0f;
#pragma unroll
  for (int i = 0; i < T::kFragmentsM; ++i) {
#pragma unroll
    for (int e = 0; e < 4 * T::kFragmentsN; ++e) d[i][e] = d[i][e] * a * b * p.alpha;
    if (__builtin_expect(p.bias != nullptr, 0)) add_bias(d[i], p, n, lane);
  }
  if (p.out_type == FloatType::kBfloat16)
    store<T, FloatType::kBfloat16>(d, args, m, n, lane);
  else if (p.out_type == FloatType::kFloat16)
    store<T, FloatType::kFloat16>(d, args, m, n, lane);
  else
    store<T, FloatType::kFloat32>(d, args, m, n, lane);
}

// ---- the kernel ----

template <class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    block_scaled_gemm_kernel(const __grid_constant__ KernelArgs args) {
  MXT_DYNAMIC_SHARED(memory, 128);
  const uint32_t shared = ptx::shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Addresses<T> at(warp, lane);
  Loader<T> loader(args, shared);
#pragma unroll
  for (int i = 0; i < T::kStages - 1; ++i) loader.next();
  int stage = 0;
  for (int tile = blockIdx.x; tile < args.order.count(); tile += gridDim.x) {
    Accumulators<T> d = {};
    for (int block = 0; block < args.k_blocks; ++block) {
      ptx::cp_async_wait_group<T::kStages - 2>();
      __syncthreads();  // everyone's copies of this stage are there, and the one before is read
      loader.next();
      multiply<T>(d, shared + stage * T::kBytesStage, at);
      if (++stage == T::kStages) stage = 0;
    }
    int m, n;
    args.order.at(tile, m, n);
    finish<T>(d, args, m * T::kTileM + warp / T::kWarpsN * T::kWarpM,
              n * T::kTileN + warp % T::kWarpsN * T::kWarpN, lane);
  }
}

// ---- launcher ----

template <class T>
static cudaError_t launch_tiles(const BlockScaledGemmParams& p, int multiprocessors,
                                cudaStream_t stream) {
  KernelArgs args = {};
  args.p = p;
  args.order = {ceil_div(p.m, T::kTileM), ceil_div(p.n, T::kTileN)};
  args.k_blocks = ceil_div(p.row_bytes, T::kRowBytes);
  const int size = p.out_type == FloatType::kFloat32 ? 4 : 2;
  args.pairs = p.n * size % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
  return launch_with_shared(block_scaled_gemm_kernel<T>,
                            std::min(args.order.count(), multiprocessors), T::kThreads,
                            T::kSharedBytes, stream, args);
}

// The wide tile where it finishes first: its rounds over the multiprocessors take kWorth times as
// long each.
template <class F>
static cudaError_t launch_format(const BlockScaledGemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  if (p.separate) return launch_tiles<GemmTraits<F, false, true>>(p, multiprocessors, stream);
  using Wide = GemmTraits<F, true, false>;
  using Narrow = GemmTraits<F, false, false>;
  constexpr double kWorth = 1.9;
  const auto rounds = [&](int tile_m, int tile_n) {
    return ceil_div(int64_t{ceil_div(p.m, tile_m)} * ceil_div(p.n, tile_n), multiprocessors);
  };
  if (rounds(Wide::kTileM, Wide::kTileN) * kWorth <= rounds(Narrow::kTileM, Narrow::kTileN))
    return launch_tiles<Wide>(p, multiprocessors, stream);
  return launch_tiles<Narrow>(p, multiprocessors, stream);
}

}  // namespace mxtrain::cuda::sm120
