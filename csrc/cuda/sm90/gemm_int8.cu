// SPDX-License-Identifier: Apache-2.0
// D[M, N] = A B^T + bias of int8_block operands on Hopper's integer tensor cores (wgmma), A and B
// with K contiguous, D in bfloat16, float16 or float32.
//
// The structure is that of gemm_e5m2.cu, and so are the ring and its copies: one thread of the
// first warpgroup keeps the copy engine loading stages of K = 128 into a ring; two warpgroups
// multiply 64 rows of the tile each; the blocks of a cluster share a tile of B. A stage is one
// block of K, so the producer, which is ahead, reads its scales and mask bits and leaves their
// products beside it. Where a block fell back, its residual comes through a stage of its own and
// meets the other operand, which is still there: a fallback costs the products and one tile of
// copies.
//
// The integer sums of a stage are exact. They are converted and added in float32 while the other
// warpgroup has the tensor cores: acc = fma(scale, sum, acc), K ascending, a residual after its
// block. That takes about as long as the other's products, so the warpgroups take turns: left to
// themselves they multiply together and convert together, and the tensor cores wait half the time.
// (Starting sums at the bits of a float, as cuda/int8_gemm.cu does, would take a move for each:
// wgmma adds to the registers that it is given. A conversion takes no more.)
#include "cuda/sm90/gemm_consumer.cuh"
#include "cuda/sm90/gemm_int8.h"
#include "cuda/sm90/gemm_launch.h"
#include "formats/int8.h"
#include "ptx/barrier.cuh"

namespace mxtrain::cuda::sm90 {

// ---- traits ----

// As GemmTraits, and the residual's tile, what the producer knows of each stage, the tile's
// barriers. A chunk is a stage, so the integer sums of one part take 64 registers of a consumer's.
template <int kParts, int kCluster>
using Int8RingTraits = GemmTraits<kParts, kCluster, 128, kParts == 2 ? 4 : 6, 56, 1>;

template <int kParts, int kCluster>
struct Int8Traits : Int8RingTraits<kParts, kCluster> {
  using Base = Int8RingTraits<kParts, kCluster>;
  static_assert(Base::kTileM == kInt8Block && Base::kTileK == kInt8Block,
                "one scale of A, and one mask bit, a stage");

  static constexpr int kOffsetResidual = (Base::kSharedBytes + 1023) / 1024 * 1024;
  static constexpr int kOffsetFacts = kOffsetResidual + Base::kBytesA;
  static constexpr int kFactBytes = 32;
  static constexpr int kOffsetResidualFull = kOffsetFacts + Base::kStages * kFactBytes;
  static constexpr int kOffsetResidualEmpty = kOffsetResidualFull + 8;
  static constexpr int kSharedBytes = kOffsetResidualEmpty + 8;
  static_assert(kSharedBytes <= 227 * 1024, "the shared memory of a block");
};

// What the producer leaves beside a stage.
struct StageFacts {
  float main[2], second[2];  // products of scales, of each part; second: with the residual's
  uint32_t fallen;           // bit 0: A's block fell back; bits 1 and 2: those of B's parts
  uint32_t unused[3];
};

struct Int8KernelArgs {
  Int8GemmParams p;
  TileOrder order;
  int k_blocks;
  bool boxes;  // D's rows are whole 16-byte units: the copy engine stores them
};

template <class T>
__device__ __forceinline__ StageFacts* facts_of(uint8_t* memory, int stage) {
  return reinterpret_cast<StageFacts*>(memory + T::kOffsetFacts + stage * T::kFactBytes);
}

// ---- the producer ----

// The facts of block k of the tile whose first blocks are i of A and j of B. Blocks beyond the edge
// have no scale; what they would multiply is not stored.
template <class T>
__device__ __forceinline__ StageFacts read_facts(const Int8GemmParams& p, int i, int j, int k,
                                                 int blocks_m, int blocks_n) {
  const auto scale = [&](const Int8Codes& codes, int block) {
    return __ldg(codes.scale + block * codes.stride_row + k * codes.stride_k);
  };
  const auto fell_back = [&](int block) {
    return p.mask && __ldg(p.mask + block * p.mask_stride_row + k * p.mask_stride_k);
  };
  StageFacts f = {};
  if (i >= blocks_m) return f;
  const float a = scale(p.a, i);
  const bool a_fell_back = !p.residual_of_b && fell_back(i);
  const float a_second = a_fell_back ? scale(p.residual, i) : 0.0f;
  f.fallen = a_fell_back;
#pragma unroll
  for (int part = 0; part < T::kParts; ++part) {
    if (j + part >= blocks_n) continue;
    const float b = scale(p.b, j + part);
    f.main[part] = a * b;
    f.second[part] = a_second * b;
    if (p.residual_of_b && fell_back(j + part)) {
      f.second[part] = a * scale(p.residual, j + part);
      f.fallen |= 2u << part;
    }
  }
  return f;
}

struct TensorMaps {
  const CUtensorMap &a, &b, &residual;
};

// One tile of the residual from row on.
template <class T>
__device__ __forceinline__ void load_residual(const TensorMaps& maps, uint32_t shared, int k,
                                              int row, uint32_t& parity) {
  const uint32_t full = shared + T::kOffsetResidualFull;
  ptx::mbarrier_wait(shared + T::kOffsetResidualEmpty, parity ^ 1);
  ptx::mbarrier_arrive_expect_tx(full, T::kBytesA);
  ptx::cp_async_bulk_tensor_2d_load(shared + T::kOffsetResidual, &maps.residual, k, row, full);
  parity ^= 1;
}

template <class T>
__device__ __forceinline__ void produce(const TensorMaps& maps, const Int8KernelArgs& args,
                                        uint8_t* memory, uint32_t shared, uint32_t rank) {
  const int blocks_m = static_cast<int>((args.p.m + kInt8Block - 1) / kInt8Block),
            blocks_n = static_cast<int>((args.p.n + kInt8Block - 1) / kInt8Block);
  RingPosition<T> ring(shared);
  uint32_t residual_parity = 0;
  for (int tile = blockIdx.x / T::kCluster; tile < args.order.count();
       tile += gridDim.x / T::kCluster) {
    int m, n;
    args.order.at(tile, m, n);
    const int i = m * T::kCluster + rank, j = n * T::kParts;
    for (int block = 0; block < args.k_blocks; ++block) {
      // Under the wait: most of the time the ring is full.
      const StageFacts facts = read_facts<T>(args.p, i, j, block, blocks_m, blocks_n);
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      *facts_of<T>(memory, ring.stage) = facts;  // the arrival of load_stage publishes it
      const int k = block * T::kTileK;
      load_stage<T>(maps.a, maps.b, ring, k, i * T::kTileM, n * T::kTileN, rank);
      if (facts.fallen & 1) load_residual<T>(maps, shared, k, i * T::kTileM, residual_parity);
#pragma unroll 1
      for (uint32_t left = facts.fallen >> 1, row = j * kInt8Block; left;
           left >>= 1, row += kInt8Block)
        if (left & 1) load_residual<T>(maps, shared, k, row, residual_parity);
      ring.advance();
    }
  }
}

// ---- the consumers ----

// As Factors, and the residual's tile: a consumer's 64 rows of one of A, all of one of B.
template <class T>
struct Int8Factors : Factors<T> {
  using Factors<T>::Factors;
  __device__ __forceinline__ uint32_t residual_of_a() const {
    return this->a + T::kOffsetResidual / this->kUnit;
  }
  __device__ __forceinline__ uint32_t residual_of_b() const {
    return this->b + (T::kOffsetResidual - T::kOffsetB) / this->kUnit;
  }
};

// Starts the products of 64 rows with 128 over K = 128, from these addresses on.
template <class T>
__device__ __forceinline__ void start_products(int32_t (&sum)[64], uint32_t a, uint32_t b) {
  constexpr int kStep = Factors<T>::kStep;
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < T::kTileK / 32; ++k)
    ptx::wgmma_m64n128k32_s8(sum, ptx::wgmma_descriptor(a + k * kStep),
                             ptx::wgmma_descriptor(b + k * kStep), k > 0);
  ptx::wgmma_commit_group();
}

__device__ __forceinline__ void promote(float (&d)[64], const int32_t (&sum)[64], float scale) {
#pragma unroll
  for (int i = 0; i < 64; ++i) d[i] = int8_promote(d[i], scale, static_cast<float>(sum[i]));
}

// Whose products come next: each warpgroup starts one part's, then lets the other start.
struct Turns {
  static constexpr int kBarriers = 1, kThreads = 256;  // barrier 1 + g: warpgroup g may start
  int group;

  __device__ __forceinline__ explicit Turns(int group) : group(group) {
    if (group == 1) pass();  // warpgroup 0 begins
  }
  __device__ __forceinline__ void wait() const { ptx::barrier_sync(kBarriers + group, kThreads); }
  __device__ __forceinline__ void pass() const {
    ptx::barrier_arrive(kBarriers + 1 - group, kThreads);
  }
  __device__ __forceinline__ void end() const {
    if (group == 0) wait();  // for the last pass of warpgroup 1
  }
};

template <class T>
struct ResidualRing {
  uint32_t shared, parity = 0;

  __device__ __forceinline__ void wait() {
    ptx::mbarrier_wait(shared + T::kOffsetResidualFull, parity);
  }
  __device__ __forceinline__ void release(int lane) {
    if (lane < kWarpArrivals) ptx::mbarrier_arrive(shared + T::kOffsetResidualEmpty);
    parity ^= 1;
  }
};

// The residuals of one stage, while its operands are there.
template <class T>
__device__ __forceinline__ void add_residuals(float (&d)[T::kParts][64], const StageFacts& facts,
                                              const Int8Factors<T>& factors, int stage,
                                              ResidualRing<T>& residual, const Turns& turns,
                                              int lane) {
  const bool of_a = facts.fallen & 1;
  if (of_a) residual.wait();
#pragma unroll
  for (int part = 0; part < T::kParts; ++part) {
    const bool of_b = facts.fallen & (2u << part);
    if (!of_a && !of_b) continue;
    if (of_b) residual.wait();
    int32_t sum[64];
    turns.wait();
    start_products<T>(sum, of_a ? factors.residual_of_a() : factors.stage_a(stage),
                      of_a ? factors.stage_b(stage, part) : factors.residual_of_b());
    turns.pass();
    ptx::wgmma_wait_group<0>(sum);
    if (of_b || part == T::kParts - 1) residual.release(lane);
    promote(d[part], sum, facts.second[part]);
  }
}

// As multiply_promoted of gemm_consumer.cuh: the next stage is waited for under this one's last
// products.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[T::kParts][64], RingPosition<T>& ring,
                                         const Int8Factors<T>& factors, uint8_t* memory,
                                         ResidualRing<T>& residual, const Turns& turns,
                                         int k_blocks, int lane) {
  ptx::mbarrier_wait(ring.full(), ring.parity);
  for (int block = 0; block < k_blocks; ++block) {
    const int stage = ring.stage;
    const uint32_t empty = ring.empty();
    const StageFacts& shared_facts = *facts_of<T>(memory, stage);
    const uint32_t fallen = shared_facts.fallen;
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      const float scale = shared_facts.main[part];
      const bool last = part == T::kParts - 1 && fallen == 0;
      int32_t sum[64];
      turns.wait();
      start_products<T>(sum, factors.stage_a(stage), factors.stage_b(stage, part));
      turns.pass();
      if (last) {
        ring.advance();
        if (block + 1 < k_blocks) ptx::mbarrier_wait(ring.full(), ring.parity);
      }
      ptx::wgmma_wait_group<0>(sum);
      if (last) {
        __syncwarp();  // every lane has read the facts
        release<T>(empty, lane);
      }
      promote(d[part], sum, scale);
    }
    if (fallen == 0) continue;
    const StageFacts facts = shared_facts;
    add_residuals<T>(d, facts, factors, stage, residual, turns, lane);
    __syncwarp();
    release<T>(empty, lane);
    ring.advance();
    if (block + 1 < k_blocks) ptx::mbarrier_wait(ring.full(), ring.parity);
  }
}

template <class T, FloatType kType>
__device__ __forceinline__ void consume(const CUtensorMap& map_out, const Int8KernelArgs& args,
                                        uint8_t* memory, uint32_t shared, uint32_t rank) {
  const Int8GemmParams& p = args.p;
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // uniform, and known to be
  const uint32_t boxes = shared + T::kOffsetOut + warp * T::kBoxes * T::kBoxBytes;
  const Int8Factors<T> factors(shared, group);
  RingPosition<T> ring(shared);
  ResidualRing<T> residual = {shared};
  const Turns turns(group);
  for (int tile = blockIdx.x / T::kCluster; tile < args.order.count();
       tile += gridDim.x / T::kCluster) {
    int m, n;
    args.order.at(tile, m, n);
    m = (m * T::kCluster + rank) * T::kTileM + warp * 16;  // the warp's 16 rows
    n *= T::kTileN;
    float d[T::kParts][64] = {};
    multiply<T>(d, ring, factors, memory, residual, turns, args.k_blocks, lane);
#pragma unroll
    for (int i = 0; i < 2 * T::kParts; ++i, n += 64) {
      if (n >= p.n) break;
      float v[32];  // a copy: stores of float32 from d itself made it spill
#pragma unroll
      for (int e = 0; e < 32; ++e) v[e] = ptx::opaque(d[i / 2][i % 2 * 32 + e]);
      if (__builtin_expect(p.bias != nullptr, 0)) add_bias(v, p, n, lane);
      // Addresses are computed anew for each part: kept, they would not fit beside d.
      const uint32_t box = ptx::opaque(boxes);
      const int row = static_cast<int>(ptx::opaque(static_cast<uint32_t>(m)));
      if (__builtin_expect(args.boxes, 1))
        store_boxes<kType, T::kBoxes, T::kBoxBytes>(v, &map_out, row, n, box, i, false, lane);
      else
        store_elements<kType>(v, p.out, row, n, static_cast<int>(p.m), static_cast<int>(p.n), false,
                              lane);
    }
  }
  turns.end();
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();
  __syncwarp();
}

// ---- the kernel ----

template <class T, FloatType kType>
__global__ void __launch_bounds__(T::kThreads, 1)
    int8_gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                     const __grid_constant__ CUtensorMap map_b,
                     const __grid_constant__ CUtensorMap map_residual,
                     const __grid_constant__ CUtensorMap map_out,
                     const __grid_constant__ Int8KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t rank = T::kCluster > 1 ? ptx::cluster_ctarank() : 0;
  if (threadIdx.x == 0) {
    init_ring<T>(shared, 1);
    ptx::mbarrier_init(shared + T::kOffsetResidualFull, 1);
    ptx::mbarrier_init(shared + T::kOffsetResidualEmpty, T::kWarps * kWarpArrivals);
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&map_a);
    ptx::prefetch_tensormap(&map_b);
    if (args.p.mask) ptx::prefetch_tensormap(&map_residual);
    if (args.boxes) ptx::prefetch_tensormap(&map_out);
  }
  __syncthreads();
  sync_cluster<T>();           // no arrival and no copy before every block's barriers exist
  ptx::griddepcontrol_wait();  // the operands are there
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<T::kProducerRegisters>();
    if (threadIdx.x == 0) produce<T>({map_a, map_b, map_residual}, args, memory, shared, rank);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<T::kConsumerRegisters>();
    consume<T, kType>(map_out, args, memory, shared, rank);
  }
  sync_cluster<T>();  // a block's barriers outlive the arrivals of the others
}

// ---- launcher ----

static cudaError_t make_codes_map(CUtensorMap* map, const int8_t* data, int64_t rows, int64_t kp,
                                  int box_rows) {
  return make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, data, rows, kp, kp, box_rows);
}

template <class T, FloatType kType>
static cudaError_t launch(const Int8GemmParams& p, int multiprocessors, cudaStream_t stream) {
  CUtensorMap map_a, map_b, map_residual = {}, map_out = {};
  Int8KernelArgs args = {};
  cudaError_t error = make_codes_map(&map_a, p.a.data, p.m, p.kp, T::kTileM);
  if (error == cudaSuccess) error = make_codes_map(&map_b, p.b.data, p.n, p.kp, T::kBoxB);
  if (error == cudaSuccess && p.mask)
    error = make_codes_map(&map_residual, p.residual.data, p.residual_of_b ? p.n : p.m, p.kp,
                           kInt8Block);
  if (error == cudaSuccess) error = make_out_map(p, &map_out, &args.boxes);
  if (error != cudaSuccess) return error;
  args.p = p;
  args.order = {ceil_div(p.m, T::kTileM * T::kCluster), ceil_div(p.n, T::kTileN)};
  args.k_blocks = ceil_div(p.kp, T::kTileK);
  return launch_persistent<T>(int8_gemm_kernel<T, kType>, args.order.count(), multiprocessors,
                              stream, map_a, map_b, map_residual, map_out, args);
}

template <class T>
static cudaError_t launch(const Int8GemmParams& p, int multiprocessors, cudaStream_t stream) {
  if (p.out_type == FloatType::kFloat32)
    return launch<T, FloatType::kFloat32>(p, multiprocessors, stream);
  if (p.out_type == FloatType::kBfloat16)
    return launch<T, FloatType::kBfloat16>(p, multiprocessors, stream);
  return launch<T, FloatType::kFloat16>(p, multiprocessors, stream);
}

cudaError_t launch_int8_gemm(const Int8GemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  if (prefer_large(p.m, p.n, 256, 1.7, multiprocessors))
    return launch<Int8Traits<2, 2>>(p, multiprocessors, stream);
  return launch<Int8Traits<1, 1>>(p, multiprocessors, stream);
}

}  // namespace mxtrain::cuda::sm90
