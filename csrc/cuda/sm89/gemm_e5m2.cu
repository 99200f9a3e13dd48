// SPDX-License-Identifier: Apache-2.0
// D[M, N] = alpha * 2^(a_scale[m] + b_scale[n] - 280) * A[M, K] B[N, K]^T + bias[n], A and B in
// E5M2 with K contiguous (cuda/fold.h makes them), D in bfloat16, float16 or float32; a float32 D
// may be added to. mma.sync for compute capability 8.9. It compiles for 9.0 too, where the compiler
// makes each instruction of two binary16 ones: a check of everything here but speed and rounding.
//
// One thread block a multiprocessor walks over tiles of D. All 8 warps copy stages of K = 128 into
// a ring in shared memory (cp.async), which runs ahead into the next tile while D is written, and
// multiply 32 rows and 64 columns, or twice that, each. What lies outside A and B is copied as
// zeros; K need not be a multiple of a stage, and what follows it in a row is not read.
//
// Ada's FP8 products are summed with fewer bits than float32 has, as Hopper's are
// (cuda/sm90/gemm_e5m2.cu), so partial sums span a chunk of K only and are then added in float32:
// 128, one stage; 32, one instruction, whose products share one scale; or 0, all of K. Every sum
// has one order, so the same operands give the same bytes.
#include <algorithm>

#include "cuda/fold_epilogue.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm89/gemm_e5m2.h"
#include "cuda/sm89/gemm_traits.cuh"
#include "cuda/tile_order.cuh"
#include "ptx/mma.cuh"

namespace mxtrain::cuda::sm89 {

// ---- arguments ----

struct KernelArgs {
  FoldedGemmParams p;
  TileOrder order;
  int k_blocks;
  bool pairs;  // D's rows are whole 8-byte units
  bool moderate_alpha;
};

// ---- copying ----

// This thread's part of every stage of every tile that this block works on, in order.
template <class T>
class Loader {
 public:
  __device__ __forceinline__ Loader(const KernelArgs& args, uint32_t shared)
      : args_(args),
        shared_(shared + swizzled(threadIdx.x / 8, threadIdx.x % 8)),
        tile_(blockIdx.x) {
    aim();
  }

  // The next stage on its way, as one group of copies; an empty one when all are.
  __device__ __forceinline__ void next() {
    if (tile_ < args_.order.count()) {
      const uint32_t to = shared_ + stage_ * T::kBytesStage;
      const bool inside = block_ * T::kTileK + unit() < args_.p.k;
      copy<T::kTileM>(a_, args_.p.a, inside ? rows_a_ : 0, to);
      copy<T::kTileN>(b_, args_.p.b, inside ? rows_b_ : 0, to + T::kBytesA);
      advance();
    }
    ptx::cp_async_commit_group();
  }

 private:
  const KernelArgs& args_;
  const uint32_t shared_;
  int tile_, block_ = 0, stage_ = 0;
  const uint8_t *a_, *b_;  // what it copies first of the stage's A and B
  int rows_a_, rows_b_;    // of A and B from there on

  __device__ static __forceinline__ int row() { return threadIdx.x / 8; }
  __device__ static __forceinline__ int unit() { return threadIdx.x % 8 * kUnit; }

  // At the first stage of tile_.
  __device__ __forceinline__ void aim() {
    int m, n;
    args_.order.at(tile_, m, n);
    m = m * T::kTileM + row();
    n = n * T::kTileN + row();
    a_ = args_.p.a + m * args_.p.pitch + unit();
    b_ = args_.p.b + n * args_.p.pitch + unit();
    rows_a_ = static_cast<int>(args_.p.m) - m;
    rows_b_ = static_cast<int>(args_.p.n) - n;
  }

  __device__ __forceinline__ void advance() {
    a_ += T::kTileK;
    b_ += T::kTileK;
    if (++stage_ == T::kStages) stage_ = 0;
    if (++block_ < args_.k_blocks) return;
    block_ = 0;
    tile_ += gridDim.x;
    if (tile_ < args_.order.count()) aim();
  }

  // rows: how many exist of `first` and what follows it; `any` is an address that may be read.
  template <int kRows>
  __device__ __forceinline__ void copy(const uint8_t* first, const uint8_t* any, int rows,
                                       uint32_t to) const {
#pragma unroll
    for (int i = 0; i < kRows; i += T::kCopyRows) {
      const bool exists = i < rows;
      ptx::cp_async_16(to + i * 128, exists ? first + i * args_.p.pitch : any, exists ? kUnit : 0);
    }
  }
};

// ---- multiplying ----

// D of a warp: 64 columns a part, 16 rows a fragment, laid out as cuda/fold_epilogue.cuh says.
template <class T>
using Accumulators = float[T::kParts][T::kFragmentsM][4 * T::kFragmentsN];

// K = 32 of a warp's rows of A and of one part of its rows of B.
template <class T>
struct Fragments {
  uint32_t a[T::kFragmentsM][4], b[T::kFragmentsN / 2][4];

  // Where this lane's rows of the first step start, from the start of a stage. warp: of the block.
  __device__ static __forceinline__ uint32_t first_a(int warp, int lane) {
    return warp / T::kWarpsN * T::kWarpM * T::kTileK +
           swizzled(AddressA::row(lane), AddressA::unit(lane));
  }
  __device__ static __forceinline__ uint32_t first_b(int warp, int lane) {
    return T::kBytesA + warp % T::kWarpsN * T::kWarpN * T::kTileK +
           swizzled(AddressB::row(lane), AddressB::unit(lane));
  }

  __device__ __forceinline__ void load(uint32_t at_a, uint32_t at_b, int part, int step) {
#pragma unroll
    for (int i = 0; i < T::kFragmentsM; ++i)
      ptx::ldmatrix_x4(a[i], (at_a ^ (32 * step)) + i * 16 * T::kTileK);
#pragma unroll
    for (int j = 0; j < T::kFragmentsN / 2; ++j)
      ptx::ldmatrix_x4(b[j], (at_b ^ (32 * step)) + (part * 64 + j * 16) * T::kTileK);
  }

  // d = the product of fragments i and j, plus c.
  __device__ __forceinline__ void multiply(int i, int j, float* d, const float* c) const {
    ptx::mma_m16n8k32_e5m2(d, a[i], b[j / 2] + j % 2 * 2, c);
  }
};

// One stage.
template <class T>
__device__ __forceinline__ void multiply(Accumulators<T>& d, uint32_t at_a, uint32_t at_b) {
  constexpr float kZeros[4] = {};
#pragma unroll
  for (int part = 0; part < T::kParts; ++part) {
    float sums[T::kFragmentsM][4 * T::kFragmentsN] = {};  // of K = 128
#pragma unroll(T::kStepsAtOnce)
    for (int step = 0; step < T::kTileK / 32; ++step) {
      Fragments<T> f;
      f.load(at_a, at_b, part, step);
#pragma unroll
      for (int i = 0; i < T::kFragmentsM; ++i)
#pragma unroll
        for (int j = 0; j < T::kFragmentsN; ++j) {
          float *total = d[part][i] + 4 * j, *sum = sums[i] + 4 * j;
          if constexpr (T::kChunk == 0) {
            f.multiply(i, j, total, total);
          } else if constexpr (T::kChunk == 128) {
            f.multiply(i, j, sum, sum);
          } else {
            float product[4];
            f.multiply(i, j, product, kZeros);
#pragma unroll
            for (int e = 0; e < 4; ++e) total[e] += product[e];
          }
        }
    }
    if constexpr (T::kChunk == 128) {
#pragma unroll
      for (int i = 0; i < T::kFragmentsM; ++i)
#pragma unroll
        for (int e = 0; e < 4 * T::kFragmentsN; ++e) d[part][i][e] += sums[i][e];
    }
  }
}

// ---- finishing ----

// m, n: the warp's first row and column.
template <class T, FloatType kType>
__device__ __forceinline__ void finish(Accumulators<T>& d, const KernelArgs& args, int m, int n,
                                       int lane) {
  const FoldedGemmParams& p = args.p;
  const int rows = static_cast<int>(p.m), cols = static_cast<int>(p.n);
#pragma unroll
  for (int i = 0; i < T::kFragmentsM; ++i, m += 16) {
    TileScales<T::kWarpN> scales;
    scales.fetch(p, m, n, lane);
    const bool moderate = scales.all_moderate() && args.moderate_alpha;
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      float* v = d[part][i];
      const int col = n + 64 * part;
      if (col >= cols) break;
      if (__builtin_expect(moderate, 1))
        scale_moderate(v, scales.rows, scales.columns + 2 * part, p.alpha, lane);
      else
        scale_any(v, scales.rows, scales.columns + 2 * part, p.alpha, lane);
      if (__builtin_expect(p.bias != nullptr, 0)) add_bias(v, p, col, lane);
      if (__builtin_expect(args.pairs, 1))
        store_pairs<kType>(v, p.out, m, col, rows, cols, p.add, lane);
      else
        store_elements<kType>(v, p.out, m, col, rows, cols, p.add, lane);
    }
  }
}

// ---- the kernel ----

template <class T, FloatType kType>
__global__ void __launch_bounds__(T::kThreads, 1)
    folded_gemm_kernel(const __grid_constant__ KernelArgs args) {
  MXT_DYNAMIC_SHARED(memory, 128);
  const uint32_t shared = ptx::shared_address(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t first_a = shared + Fragments<T>::first_a(warp, lane),
                 first_b = shared + Fragments<T>::first_b(warp, lane);
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
      multiply<T>(d, first_a + stage * T::kBytesStage, first_b + stage * T::kBytesStage);
      if (++stage == T::kStages) stage = 0;
    }
    int m, n;
    args.order.at(tile, m, n);
    finish<T, kType>(d, args, m * T::kTileM + warp / T::kWarpsN * T::kWarpM,
                     n * T::kTileN + warp % T::kWarpsN * T::kWarpN, lane);
  }
}

// ---- launcher ----

template <class T, FloatType kType>
static cudaError_t launch_tiles(const FoldedGemmParams& p, int multiprocessors,
                                cudaStream_t stream) {
  KernelArgs args = {};
  args.p = p;
  args.order = {ceil_div(p.m, T::kTileM), ceil_div(p.n, T::kTileN)};
  args.k_blocks = ceil_div(p.k, T::kTileK);
  const int size = kType == FloatType::kFloat32 ? 4 : 2;
  args.pairs = p.n * size % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
  args.moderate_alpha = is_moderate_alpha(p.alpha);
  return launch_with_shared(folded_gemm_kernel<T, kType>,
                            std::min(args.order.count(), multiprocessors), T::kThreads,
                            T::kSharedBytes, stream, args);
}

template <class T>
static cudaError_t launch_type(const FoldedGemmParams& p, int multiprocessors,
                               cudaStream_t stream) {
  if (p.out_type == FloatType::kFloat32)
    return launch_tiles<T, FloatType::kFloat32>(p, multiprocessors, stream);
  if (p.out_type == FloatType::kBfloat16)
    return launch_tiles<T, FloatType::kBfloat16>(p, multiprocessors, stream);
  return launch_tiles<T, FloatType::kFloat16>(p, multiprocessors, stream);
}

// The large tile where it finishes first: its rounds over the multiprocessors take kWorth times as
// long each.
template <int kChunk>
static cudaError_t launch_chunk(const FoldedGemmParams& p, int multiprocessors,
                                cudaStream_t stream) {
  using Large = GemmTraits<2, kChunk>;
  using Small = GemmTraits<1, kChunk>;
  constexpr double kWorth = 1.9;
  const auto rounds = [&](int tile_m, int tile_n) {
    return ceil_div(int64_t{ceil_div(p.m, tile_m)} * ceil_div(p.n, tile_n), multiprocessors);
  };
  if (rounds(Large::kTileM, Large::kTileN) * kWorth <= rounds(Small::kTileM, Small::kTileN))
    return launch_type<Large>(p, multiprocessors, stream);
  return launch_type<Small>(p, multiprocessors, stream);
}

cudaError_t launch_folded_gemm(const FoldedGemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  switch (p.accumulate) {
    case Accumulate::kExact:
      return launch_chunk<32>(p, multiprocessors, stream);
    case Accumulate::kFast:
      return launch_chunk<0>(p, multiprocessors, stream);
    case Accumulate::kFp32:
      break;
  }
  return launch_chunk<128>(p, multiprocessors, stream);
}

}  // namespace mxtrain::cuda::sm89
