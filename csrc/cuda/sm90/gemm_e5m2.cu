// SPDX-License-Identifier: Apache-2.0
// D[M, N] = alpha * 2^(a_scale[m] + b_scale[n] - 280) * A[M, K] B[N, K]^T + bias[n], A and B in
// E5M2 with K contiguous (cuda/fold.h makes them), D in bfloat16, float16 or float32; a float32 D
// may be added to.
//
// One thread block a multiprocessor walks over tiles of D. One thread of its first warpgroup keeps
// the copy engine loading stages of K = 128 into a ring in shared memory; the other two warpgroups
// multiply 64 rows of the tile each. The blocks of a cluster share a tile of B: each fetches a part
// for all.
//
// Hopper sums FP8 products with fewer bits than float32 has: it aligns the 32 products of an
// instruction and the sum so far to the largest of them and cuts off what lies some 13 bits below.
// So partial sums span a chunk of K only and are then added in float32:
//   128  as DeepGEMM's two-level accumulation (github.com/deepseek-ai/DeepGEMM). One warpgroup's
//        additions run under the other's products.
//   32   one instruction, one block of each operand. All its products share one scale and differ by
//        less than 8 binades, so none is cut: what is added in float32 is exact. The additions take
//        as many issue slots as the products take cycles.
//   0    all of K in the tensor cores.
// Every sum has one order, so the same operands give the same bytes.
#include <algorithm>

#include "cuda/sm90/gemm_e5m2.h"
#include "cuda/sm90/gemm_epilogue.cuh"
#include "cuda/sm90/gemm_traits.cuh"
#include "cuda/sm90/tensor_map.h"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/wgmma.cuh"

namespace mxtrain::cuda::sm90 {

// ---- arguments ----

struct KernelArgs {
  FoldedGemmParams p;
  TileOrder order;
  int k_blocks;
  bool boxes;           // D's rows are whole 16-byte units: the copy engine stores them
  bool moderate_alpha;  // 0, or within 2^(+-16)
};

// ---- the producer ----

template <class T>
__device__ __forceinline__ void load_stage(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                           const RingPosition<T>& ring, int k, int m, int n,
                                           uint32_t rank) {
  constexpr int kBytes = T::kBoxB * T::kTileK;
  ptx::mbarrier_arrive_expect_tx(ring.full(), T::kBytesA + T::kBytesB);
  ptx::cp_async_bulk_tensor_2d_load(ring.a(), &map_a, k, m, ring.full());
  if constexpr (T::kCluster > 1) {
    ptx::cp_async_bulk_tensor_2d_multicast(ring.b() + rank * kBytes, &map_b, k, n + rank * T::kBoxB,
                                           ring.full(), (1 << T::kCluster) - 1);
  } else {
#pragma unroll
    for (int box = 0; box < T::kParts; ++box)
      ptx::cp_async_bulk_tensor_2d_load(ring.b() + box * kBytes, &map_b, k, n + box * T::kBoxB,
                                        ring.full());
  }
}

template <class T>
__device__ __forceinline__ void produce(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                        const KernelArgs& args, uint32_t shared, uint32_t rank) {
  RingPosition<T> ring(shared);
  for (int tile = blockIdx.x / T::kCluster; tile < args.order.count();
       tile += gridDim.x / T::kCluster) {
    int m, n;
    args.order.at(tile, m, n);
    for (int block = 0; block < args.k_blocks; ++block) {
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      load_stage<T>(map_a, map_b, ring, block * T::kTileK, (m * T::kCluster + rank) * T::kTileM,
                    n * T::kTileN, rank);
      ring.advance();
    }
  }
}

// ---- the consumers ----

// This warp has read the stage: one arrival at the `empty` barrier of each block of the cluster.
template <class T>
__device__ __forceinline__ void release(uint32_t empty, int lane) {
  if (lane < T::kCluster) ptx::mbarrier_arrive_cluster(empty, lane);
}

// What a warpgroup multiplies: its 64 rows of A and the columns of B of a stage, as addresses in
// the units of matrix descriptors.
template <class T>
struct Factors {
  static constexpr int kUnit = 16;
  static constexpr int kStep = 32 / kUnit, kPart = 128 * T::kTileK / kUnit;  // along K; along N

  uint32_t a, b;  // of stage 0

  __device__ __forceinline__ Factors(uint32_t shared, int group)
      : a(shared / kUnit + group * (64 * T::kTileK / kUnit)), b((shared + T::kOffsetB) / kUnit) {}
  __device__ __forceinline__ uint64_t a_at(int stage, int k) const {
    return ptx::wgmma_descriptor(a + stage * (T::kBytesA / kUnit) + k * kStep);
  }
  __device__ __forceinline__ uint64_t b_at(int stage, int k, int part) const {
    return ptx::wgmma_descriptor(b + stage * (T::kBytesB / kUnit) + k * kStep + part * kPart);
  }
};

// Partial sums of K = 128, one part at a time, added to d. From the end of one part's products to
// the start of the next the tensor cores are the other warpgroup's, for 256 cycles: the time for
// the additions. So the next stage is waited for before them, under this warpgroup's own products.
template <class T>
__device__ __forceinline__ void multiply_promoted(float (&d)[T::kParts][64], RingPosition<T>& ring,
                                                  const Factors<T>& factors, int k_blocks,
                                                  int lane) {
  ptx::mbarrier_wait(ring.full(), ring.parity);
  for (int block = 0; block < k_blocks; ++block) {
    const int stage = ring.stage;
    const uint32_t empty = ring.empty();
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      float sum[64];
      ptx::wgmma_fence();
#pragma unroll
      for (int k = 0; k < T::kTileK / 32; ++k)
        ptx::wgmma_m64n128k32_e5m2(sum, factors.a_at(stage, k), factors.b_at(stage, k, part),
                                   k > 0);
      ptx::wgmma_commit_group();
      if (part == T::kParts - 1) {
        ring.advance();
        if (block + 1 < k_blocks) ptx::mbarrier_wait(ring.full(), ring.parity);
      }
      ptx::wgmma_wait_group<0>(sum);
      if (part == T::kParts - 1) release<T>(empty, lane);
#pragma unroll
      for (int i = 0; i < 64; ++i) d[part][i] += sum[i];
    }
  }
}

// Partial sums of K = 32: one in the tensor cores while the one before is added to d.
template <class T>
__device__ __forceinline__ void multiply_exact(float (&d)[T::kParts][64], RingPosition<T>& ring,
                                               const Factors<T>& factors, int k_blocks, int lane) {
  static_assert(T::kParts == 1 && T::kTileK / 32 % 2 == 0, "sums take turns");
  float sums[2][64] = {};  // adding the first "one before" adds zeros
  uint32_t previous = 0;   // the stage to release
  for (int block = 0; block < k_blocks; ++block) {
    ptx::mbarrier_wait(ring.full(), ring.parity);
#pragma unroll
    for (int k = 0; k < T::kTileK / 32; ++k) {
      ptx::wgmma_fence();
      ptx::wgmma_m64n128k32_e5m2(sums[k % 2], factors.a_at(ring.stage, k),
                                 factors.b_at(ring.stage, k, 0), false);
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<1>();  // ptxas keeps the reads below behind it
      if (k == 0 && block > 0) release<T>(previous, lane);
#pragma unroll
      for (int i = 0; i < 64; ++i) d[0][i] += sums[(k + 1) % 2][i];
    }
    previous = ring.empty();
    ring.advance();
  }
  ptx::wgmma_wait_group<0>(sums[1]);
  release<T>(previous, lane);
#pragma unroll
  for (int i = 0; i < 64; ++i) d[0][i] += sums[1][i];
}

// All of K in the tensor cores' accumulators; one stage's products are in flight while the next is
// waited for.
template <class T>
__device__ __forceinline__ void multiply_fast(float (&d)[T::kParts][64], RingPosition<T>& ring,
                                              const Factors<T>& factors, int k_blocks, int lane) {
  uint32_t previous = 0;  // the stage to release
  for (int block = 0; block < k_blocks; ++block) {
    ptx::mbarrier_wait(ring.full(), ring.parity);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < T::kTileK / 32; ++k) {
      const uint64_t a = factors.a_at(ring.stage, k), b = factors.b_at(ring.stage, k, 0);
      if constexpr (T::kParts == 2)
        ptx::wgmma_m64n256k32_e5m2(d, a, b, true);
      else
        ptx::wgmma_m64n128k32_e5m2(d[0], a, b, true);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<1>();
    if (block > 0) release<T>(previous, lane);
    previous = ring.empty();
    ring.advance();
  }
#pragma unroll
  for (int part = 0; part < T::kParts; ++part) ptx::wgmma_wait_group<0>(d[part]);
  release<T>(previous, lane);
}

// 64 columns at a time: scaled, then on their way to memory while the next are scaled.
template <class T, FloatType kType>
__device__ __forceinline__ void finish(float (&d)[T::kParts][64],
                                       const TileScales<T::kTileN>& scales, const KernelArgs& args,
                                       const CUtensorMap& map_out, int m, int n, uint32_t boxes,
                                       int lane) {
  const FoldedGemmParams& p = args.p;
  const bool moderate = scales.all_moderate() && args.moderate_alpha;
#pragma unroll
  for (int i = 0; i < 2 * T::kParts; ++i, n += 64) {
    float* v = &d[i / 2][i % 2 * 32];
    if (n >= p.n) break;
    if (__builtin_expect(moderate, 1))
      scale_moderate(v, scales.rows, scales.columns + 2 * i, p.alpha, lane);
    else
      scale_any(v, scales.rows, scales.columns + 2 * i, p.alpha, lane);
    if (__builtin_expect(p.bias != nullptr, 0)) add_bias(v, p, n, lane);
    if (__builtin_expect(args.boxes, 1))
      store_boxes<kType, T::kBoxes, T::kBoxBytes>(v, &map_out, m, n, boxes, i, p.add, lane);
    else
      store_elements<kType>(v, p.out, m, n, static_cast<int>(p.m), static_cast<int>(p.n), p.add,
                            lane);
  }
}

template <class T, FloatType kType>
__device__ __forceinline__ void consume(const CUtensorMap& map_out, const KernelArgs& args,
                                        uint32_t shared, uint32_t rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // uniform, and known to be
  const uint32_t boxes = shared + T::kOffsetOut + warp * T::kBoxes * T::kBoxBytes;
  const Factors<T> factors(shared, group);
  RingPosition<T> ring(shared);
  for (int tile = blockIdx.x / T::kCluster; tile < args.order.count();
       tile += gridDim.x / T::kCluster) {
    int m, n;
    args.order.at(tile, m, n);
    m = (m * T::kCluster + rank) * T::kTileM + warp * 16;  // the warp's 16 rows
    n *= T::kTileN;
    TileScales<T::kTileN> scales;
    scales.fetch(args.p, m, n, lane);
    float d[T::kParts][64] = {};
    if constexpr (T::kChunk == 128)
      multiply_promoted<T>(d, ring, factors, args.k_blocks, lane);
    else if constexpr (T::kChunk == 32)
      multiply_exact<T>(d, ring, factors, args.k_blocks, lane);
    else
      multiply_fast<T>(d, ring, factors, args.k_blocks, lane);
    finish<T, kType>(d, scales, args, map_out, m, n, boxes, lane);
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();
  __syncwarp();
}

// ---- the kernel ----

template <class T, FloatType kType>
__global__ void __launch_bounds__(T::kThreads, 1)
    folded_gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                       const __grid_constant__ CUtensorMap map_b,
                       const __grid_constant__ CUtensorMap map_out,
                       const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t rank = T::kCluster > 1 ? ptx::cluster_ctarank() : 0;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < T::kStages; ++stage) {
      ptx::mbarrier_init(shared + T::kOffsetFull + stage * 8, 1);
      ptx::mbarrier_init(shared + T::kOffsetEmpty + stage * 8, T::kWarps * T::kCluster);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&map_a);
    ptx::prefetch_tensormap(&map_b);
    if (args.boxes) ptx::prefetch_tensormap(&map_out);
  }
  __syncthreads();
  if constexpr (T::kCluster > 1) {  // no arrival and no copy before every block's barriers exist
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
  ptx::griddepcontrol_wait();  // the folded operands are there
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<T::kProducerRegisters>();
    if (threadIdx.x == 0) produce<T>(map_a, map_b, args, shared, rank);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<T::kConsumerRegisters>();
    consume<T, kType>(map_out, args, shared, rank);
  }
  if constexpr (T::kCluster > 1) {  // a block's barriers outlive the arrivals of the others
    ptx::barrier_cluster_arrive();
    ptx::barrier_cluster_wait();
  }
}

// ---- launcher ----

static int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

static cudaError_t make_out_map(CUtensorMap* map, const FoldedGemmParams& p, bool* boxes) {
  const int size = p.out_type == FloatType::kFloat32 ? 4 : 2;
  *boxes = p.n * size % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  if (!*boxes) return cudaSuccess;
  const CUtensorMapDataType type =
      p.out_type == FloatType::kFloat32   ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
      : p.out_type == FloatType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                          : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return make_tensor_map(map, type, size, p.out, p.m, p.n, p.n * size, 16);
}

template <class T, FloatType kType>
static cudaError_t launch(const FoldedGemmParams& p, int multiprocessors, cudaStream_t stream) {
  CUtensorMap map_a, map_b, map_out = {};
  KernelArgs args = {};
  cudaError_t error =
      make_tensor_map(&map_a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.a, p.m, p.k, p.pitch, T::kTileM);
  if (error == cudaSuccess)
    error =
        make_tensor_map(&map_b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.b, p.n, p.k, p.pitch, T::kBoxB);
  if (error == cudaSuccess) error = make_out_map(&map_out, p, &args.boxes);
  if (error != cudaSuccess) return error;
  args.p = p;
  args.order = {ceil_div(p.m, T::kTileM * T::kCluster), ceil_div(p.n, T::kTileN)};
  args.k_blocks = ceil_div(p.k, T::kTileK);
  const float alpha = p.alpha < 0 ? -p.alpha : p.alpha;
  args.moderate_alpha = alpha == 0 || (alpha >= 0x1p-16f && alpha <= 0x1p16f);

  const auto kernel = folded_gemm_kernel<T, kType>;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {T::kCluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(T::kCluster * std::min(args.order.count(), multiprocessors / T::kCluster));
  config.blockDim = dim3(T::kThreads);
  config.dynamicSmemBytes = T::kSharedBytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  last_launch() = {config.gridDim.x, config.blockDim.x};
  return cudaLaunchKernelEx(&config, kernel, map_a, map_b, map_out, args);
}

template <class T>
static cudaError_t launch(const FoldedGemmParams& p, int multiprocessors, cudaStream_t stream) {
  if (p.out_type == FloatType::kFloat32)
    return launch<T, FloatType::kFloat32>(p, multiprocessors, stream);
  if (p.out_type == FloatType::kBfloat16)
    return launch<T, FloatType::kBfloat16>(p, multiprocessors, stream);
  return launch<T, FloatType::kFloat16>(p, multiprocessors, stream);
}

// Whether the large tile, in clusters of two, finishes before the small one: rounds over the
// multiprocessors times the time of a tile, where `worth` small tiles take the time of a large one.
static bool prefer_large(const FoldedGemmParams& p, int large_n, double worth,
                         int multiprocessors) {
  const int64_t large = int64_t{ceil_div(p.m, 256)} * ceil_div(p.n, large_n) * 2;
  const int64_t small = int64_t{ceil_div(p.m, 128)} * ceil_div(p.n, 128);
  return ceil_div(large, multiprocessors) * worth <= ceil_div(small, multiprocessors);
}

template <int kChunk>
static cudaError_t launch_chunk(const FoldedGemmParams& p, int multiprocessors,
                                cudaStream_t stream) {
  constexpr int kParts = kChunk == 32 ? 1 : 2;  // two sums and two parts do not fit
  if (prefer_large(p, 128 * kParts, kParts == 2 ? 1.7 : 1.0, multiprocessors))
    return launch<GemmTraits<kParts, 2, kChunk>>(p, multiprocessors, stream);
  return launch<GemmTraits<1, 1, kChunk>>(p, multiprocessors, stream);
}

cudaError_t launch_folded_gemm(const FoldedGemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
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

}  // namespace mxtrain::cuda::sm90
