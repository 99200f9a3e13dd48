// SPDX-License-Identifier: Apache-2.0
// D[M, N] = alpha * 2^(a_scale[m] + b_scale[n] - 280) * A[M, K] B[N, K]^T + bias[n], A and B in
// E5M2 with K contiguous (cuda/fold.h makes them), D in bfloat16, float16 or float32; a float32 D
// may be added to.
//
// One thread block a multiprocessor walks over tiles of D. One thread of its first warpgroup keeps
// the copy engine loading stages of K = 128 into a ring in shared memory; the other two warpgroups
// multiply 64 rows of the tile each. The blocks of a cluster share a tile of B: each fetches a part
// for all.
// gemm_consumer.cuh says how the sums are formed.
#include "cuda/sm90/gemm_consumer.cuh"
#include "cuda/sm90/gemm_e5m2.h"
#include "cuda/sm90/gemm_launch.h"
#include "cuda/sm90/gemm_overlapped.cuh"

namespace mxtrain::cuda::sm90 {

// ---- the producer ----

template <class T, Tiling kTiling>
__device__ __forceinline__ void produce(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                        const KernelArgs& args, uint32_t shared, uint32_t rank) {
  RingPosition<T> ring(shared);
  for (Walk<T, kTiling> walk{args}; walk.more(); walk.step()) {
    const Segment s = walk.segment();
    int m, n;
    args.order.at(s.tile, m, n);
    for (int block = s.begin; block < s.end; ++block) {
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      load_stage<T>(map_a, map_b, ring, block * T::kTileK, (m * T::kCluster + rank) * T::kTileM,
                    n * T::kTileN, rank);
      ring.advance();
    }
  }
}

// ---- the kernel ----

template <class T, FloatType kType, Tiling kTiling>
__global__ void __launch_bounds__(T::kThreads, 1)
    folded_gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                       const __grid_constant__ CUtensorMap map_b,
                       const __grid_constant__ CUtensorMap map_out,
                       const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t rank = T::kCluster > 1 ? ptx::cluster_ctarank() : 0;
  if (threadIdx.x == 0) {
    init_ring<T>(shared, 1);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&map_a);
    ptx::prefetch_tensormap(&map_b);
    if (args.boxes) ptx::prefetch_tensormap(&map_out);
  }
  __syncthreads();
  sync_cluster<T>();  // no arrival and no copy before every block's barriers exist
  ptx::griddepcontrol_launch_dependents();
  ptx::griddepcontrol_wait();  // the folded operands are there
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<T::kProducerRegisters>();
    if (threadIdx.x == 0) produce<T, kTiling>(map_a, map_b, args, shared, rank);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<T::kConsumerRegisters>();
    if constexpr (kTiling == Tiling::kOverlapped)
      consume_overlapped<T, kType>(map_out, args, shared);
    else
      consume<T, kType, kTiling>(map_out, args, shared, rank);
  }
  sync_cluster<T>();  // a block's barriers outlive the arrivals of the others
}

// ---- launcher ----

template <class T, Tiling kTiling, FloatType kType>
static cudaError_t launch(const FoldedGemmParams& p, int multiprocessors, cudaStream_t stream) {
  CUtensorMap map_a, map_b, map_out = {};
  KernelArgs args = {};
  cudaError_t error =
      make_tensor_map(&map_a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.a, p.m, p.k, p.pitch, T::kTileM);
  if (error == cudaSuccess)
    error =
        make_tensor_map(&map_b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, p.b, p.n, p.k, p.pitch, T::kBoxB);
  if (error == cudaSuccess) error = make_arguments<T>(p, &args, &map_out);
  if (error != cudaSuccess) return error;
  if constexpr (kTiling == Tiling::kOverlapped) {
    if (!args.boxes) return launch<T, Tiling::kWhole, kType>(p, multiprocessors, stream);
    args.k_blocks = std::max(args.k_blocks, 2);  // beyond K there are zeros
  }
  const int tiles = args.order.count();
  return launch_persistent<T>(folded_gemm_kernel<T, kType, kTiling>,
                              kTiling == Tiling::kSlabs ? tiles * p.split.slabs : tiles,
                              multiprocessors, stream, map_a, map_b, map_out, args);
}

template <class T, Tiling kTiling = Tiling::kWhole>
static cudaError_t launch(const FoldedGemmParams& p, int multiprocessors, cudaStream_t stream) {
  switch (p.out_type) {
    case FloatType::kFloat32:
      return launch<T, kTiling, FloatType::kFloat32>(p, multiprocessors, stream);
    case FloatType::kBfloat16:
      return launch<T, kTiling, FloatType::kBfloat16>(p, multiprocessors, stream);
    case FloatType::kFloat16:
      return launch<T, kTiling, FloatType::kFloat16>(p, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

template <int kChunk, Tiling kTiling = Tiling::kWhole>
static cudaError_t launch_chunk(const FoldedGemmParams& p, int multiprocessors,
                                cudaStream_t stream) {
  constexpr int kParts = kChunk == 32 ? 1 : 2;  // two sums and two parts do not fit
  if (prefer_large(p.m, p.n, 128 * kParts, kParts == 2 ? 1.7 : 1.0, multiprocessors))
    return launch<GemmTraits<kParts, 2, kChunk>, kTiling>(p, multiprocessors, stream);
  return launch<GemmTraits<1, 1, kChunk>, kTiling>(p, multiprocessors, stream);
}

// Partial sums of a chunk of 128, K in slabs.
using SlabTraits = GemmTraits<1, 1, 128>;

SplitScratch split_scratch(const SplitK& split, int64_t m, int64_t n) {
  if (split.slabs == 1) return {};
  const int64_t tiles = split_k::tiles_of(m, n, SlabTraits::kParts);
  return {tiles * split.slabs * SlabTraits::kSumBytes,
          static_cast<int>(tiles) * SlabTraits::kWarps};
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
  if (p.split.slabs > 1) return launch<SlabTraits, Tiling::kSlabs>(p, multiprocessors, stream);
  if (p.overlap) return launch_chunk<128, Tiling::kOverlapped>(p, multiprocessors, stream);
  return launch_chunk<128>(p, multiprocessors, stream);
}

}  // namespace mxtrain::cuda::sm90
