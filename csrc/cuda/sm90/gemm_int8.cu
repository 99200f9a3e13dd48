// SPDX-License-Identifier: Apache-2.0
// D[M, N] = A B^T + bias of int8_block operands on Hopper's integer tensor cores (wgmma), A and B
// with K contiguous, D in bfloat16, float16 or float32.
//
// The ring of stages is that of gemm_e5m2.cu; a stage is one block of K, and beside it lie the
// products of its scales and whether its block of A fell back (int8_producers.cuh). Two warpgroups
// multiply 64 rows of the tile each. The blocks of a cluster share a tile of B or, with a mask, in
// general one of A (int8_order.cuh). Where a block of A fell back, its residual comes through a
// buffer of its own and meets B, which is still there: a fallback costs the products and one tile
// of copies. Where B has the residual, the kernel computes D^T = B A^T, whose sums are the same,
// and stores it transposed.
//
// The integer sums of a stage are exact. They are converted and added in float32:
// acc = fma(scale, sum, acc), K ascending, a residual after its block. A conversion and a
// multiply-add for each sum take as many issue slots as half the products take cycles, so a
// warpgroup multiplies 64 columns while it adds the 64 before: two sets of sums take turns. The
// products take the rows of A from registers: from shared memory, such narrow ones would read them
// again for each 64 columns, 128 bytes a cycle with B, and there would be no room for the copies.
// (Sums that start at the bits of a float, as cuda/int8_gemm.cu has them, would take a move each.)
#include <utility>

#include "cuda/sm90/gemm_consumer.cuh"
#include "cuda/sm90/gemm_int8.h"
#include "cuda/sm90/gemm_launch.h"
#include "cuda/sm90/int8_producers.cuh"
#include "ptx/memory.cuh"

namespace mxtrain::cuda::sm90 {

// ---- the consumers ----

// What a warp does. A unit is the products of its warpgroup's 64 rows with 64 columns over K = 128.
// Under whatever is added, but for a tile's last, there is a unit in the tensor cores. From one
// pass to the next: the rows of A in registers are in use until a pass's last unit is done, so its
// sums are added under the next pass's first unit, and in between only the next rows are read.
// Where they are, whether they have come, and their facts is found out before, under the last but
// one unit.
//
// Starts, waits and additions have the order that ptxas follows. It waits after each product where
// one in flight around a loop is first waited for with others behind it, where the loop is entered
// in more than one place, where its condition has branches (C7514, C7515), and where rows are read
// with others in flight (C7513). It moves additions and waits past one another, but not past a
// branch.
template <class T>
struct Multiplier {
  static constexpr int kUnits = 2 * T::kParts;          // of a pass
  static constexpr int kColumns = 64 * T::kTileK / 16;  // of B, in the units of descriptors
  static_assert(kUnits % 2 == 0, "a pass begins with the first set of sums");

  // What follows from the number of a stage of the ring, kept so that nothing of it is computed
  // between two passes: how far its tile of A lies from stage 0's; its tile of B, in the units of
  // descriptors; the addresses of its first barrier and of its facts; the barriers' parity.
  struct Stage {
    uint32_t a, b, full, facts, parity;

    __device__ __forceinline__ uint32_t empty() const {
      return full + (T::kOffsetEmpty - T::kOffsetFull);
    }
  };
  // Where the next pass is, and whether it is there; facts: only then.
  struct Next {
    Stage stage;
    uint32_t rows, full, parity, facts_at;
    bool ready;
    PassFacts facts;
  };

  const uint32_t shared;
  const int lane;
  uint32_t rows_at[4];  // where the lane's first 16 bytes of A are in stage 0, of each step of K
  Stage stage;
  uint32_t residual_parity = 0;
  PassFacts facts;      // of the pass
  float last_scale;     // of the pass before
  uint32_t rows[4][4];  // the warp's 16 rows of A, as wgmma takes them
  int32_t sums[2][32];  // of two units
  float d[32 * kUnits];

  __device__ __forceinline__ Multiplier(uint32_t shared, int warp, int lane)
      : shared(shared),
        lane(lane),
        stage{0, (shared + T::kOffsetB) / 16, shared + T::kOffsetFull, shared + T::kOffsetFacts,
              0} {
    const uint32_t first =
        shared + (warp * 16 + lane % 16) * T::kTileK + (lane / 16 ^ lane % 8) * 16;
#pragma unroll
    for (int k = 0; k < 4; ++k) rows_at[k] = first ^ k * 32;  // of the 128-byte swizzle
  }

  __device__ __forceinline__ Stage after() const {
    const bool wraps = stage.a == (T::kStages - 1) * T::kBytesA;
    return {wraps ? 0 : stage.a + T::kBytesA,
            wraps ? (shared + T::kOffsetB) / 16 : stage.b + T::kBytesB / 16,
            wraps ? shared + T::kOffsetFull : stage.full + 8,
            wraps ? shared + T::kOffsetFacts : stage.facts + T::kFactBytes, stage.parity ^ wraps};
  }
  // The rows of A in a stage or in the residual, `offset` bytes from stage 0 on.
  __device__ __forceinline__ void take_rows(uint32_t offset) {
#pragma unroll
    for (int k = 0; k < 4; ++k) ptx::ldmatrix_x4(rows[k], rows_at[k] + offset);
  }
  __device__ __forceinline__ void start(int32_t (&sum)[32], uint32_t columns) {
    ptx::wgmma_fence();
    ptx::wgmma_m64n64k128_s8(sum, rows, ptx::wgmma_descriptor(columns));
    ptx::wgmma_commit_group();
  }
  __device__ __forceinline__ void add(float* to, const int32_t (&sum)[32], float scale) {
#pragma unroll
    for (int i = 0; i < 32; ++i) to[i] = int8_promote(to[i], scale, static_cast<float>(sum[i]));
  }
  // PassFacts at an address of the shared window, in one load.
  __device__ __forceinline__ static PassFacts read_facts(uint32_t at) {
    const uint4 w = ptx::ld_shared_v4(at);
    return {{__uint_as_float(w.x), __uint_as_float(w.y)},
            w.z,
            static_cast<uint16_t>(w.w),
            static_cast<uint16_t>(w.w >> 16)};
  }

  // The first pass of a tile, at the stage where the ring is; nothing is left to be added.
  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int i = 0; i < 32 * kUnits; ++i) d[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) sums[1][i] = 0;
    last_scale = 0.0f;
    ptx::mbarrier_wait(stage.full, stage.parity);
    take_rows(stage.a);
    facts = read_facts(stage.facts);
  }
  // (Selections one by one: of whole structs they are branches.)
  __device__ __forceinline__ Next peek() const {
    const bool residual = facts.fallen & kFallen;
    const Stage after = this->after();
    Next next;
    next.stage.a = residual ? stage.a : after.a;
    next.stage.b = residual ? stage.b : after.b;
    next.stage.full = residual ? stage.full : after.full;
    next.stage.facts = residual ? stage.facts : after.facts;
    next.stage.parity = residual ? stage.parity : after.parity;
    next.rows = residual ? uint32_t{T::kOffsetResidual} : after.a;
    next.full = residual ? shared + T::kOffsetResidualFull : after.full;
    next.parity = residual ? residual_parity : after.parity;
    next.facts_at = residual ? stage.facts + sizeof(PassFacts) : after.facts;
    next.ready = ptx::mbarrier_test_wait_parity(next.full, next.parity);
    if (next.ready) next.facts = read_facts(next.facts_at);
    return next;
  }
  __device__ __forceinline__ void release_residual() {
    __syncwarp();  // every lane has read the rows
    if (lane < kWarpArrivals) ptx::mbarrier_arrive(shared + T::kOffsetResidualEmpty);
  }
  // This stage has been read.
  __device__ __forceinline__ void leave() {
    __syncwarp();  // every lane has read the facts and the rows
    release<T>(stage.empty(), lane);
    stage = after();
  }

  // Whether a pass follows this one directly. (Without branches: more blocks around the loop, and
  // ptxas waits after every product.)
  __device__ __forceinline__ bool goes_on(int left) const {
    return (facts.fallen & kFallen) | (left > 1);
  }
  // Before: the rows and the facts are there, and of the pass before, the last unit's sums. kNext:
  // then another pass follows, with A's residual or the next stage, and so it is afterwards.
  // The stage is left unless its residual is next. added(u): after unit u.
  template <bool kNext, class Added>
  __device__ __forceinline__ void multiply(Added added) {
    constexpr int kLast = kUnits - 1;
    const uint32_t from = stage.b, empty = stage.empty();
    const bool residual_next = facts.fallen & kFallen;
    start(sums[0], from);
    ptx::wgmma_wait_group<1>(sums[1]);  // done before; for the order
    if (facts.fallen & kOnResidual) release_residual();
    add(d + 32 * kLast, sums[1], last_scale);
    start(sums[1], from + kColumns);
    Next next;
#pragma unroll
    for (int u = 0; u < kLast; ++u) {
      if (kNext && u == kLast - 1) next = peek();
      ptx::wgmma_wait_group<1>(sums[u % 2]);
      add(d + 32 * u, sums[u % 2], facts.scale[u / 2]);
      added(u);
      if (u + 2 <= kLast) start(sums[u % 2], from + (u + 2) * kColumns);
    }
    last_scale = facts.scale[T::kParts - 1];
    if constexpr (kNext) {
      if (!next.ready) {
        ptx::mbarrier_wait(next.full, next.parity);
        next.facts = read_facts(next.facts_at);
      }
      ptx::wgmma_wait_group<0>(sums[1]);
      take_rows(next.rows);
      stage = next.stage;
      facts = next.facts;
      residual_parity ^= residual_next;
      __syncwarp();  // every lane has read the facts and the rows
      if (!residual_next) release<T>(empty, lane);
    } else {
      ptx::wgmma_wait_group<0>(sums[1]);
      leave();
      add(d + 32 * kLast, sums[1], last_scale);
      added(kLast);
    }
  }
};

// A tile's way to D, 64 columns at a time; see store_boxes.
template <class T, FloatType kType, bool kTransposed>
struct Output {
  const CUtensorMap& map_out;
  const Int8KernelArgs& args;
  const uint32_t shared;
  int m, n;  // the tile's first row and column

  __device__ __forceinline__ void at(const PassFacts& facts) {
    m = facts.row * T::kTileM;
    n = facts.n * T::kTileN;
  }
  // kPlain: plain() is known.
  __device__ __forceinline__ bool plain() const { return args.boxes && args.p.bias == nullptr; }
  template <bool kPlain = false>
  __device__ __forceinline__ void store(const float* d, int unit) const {
    const Int8GemmParams& p = args.p;
    // The thread and what follows from it anew for each unit: kept, they would not fit beside d.
    const int thread = ptx::opaque(static_cast<int>(threadIdx.x)), warp = thread / 32 - 4,
              lane = thread % 32, row = m + warp * 16, column = n + 64 * unit;
    static_assert(T::kBoxes == 1, "with more, a unit that is left out must keep its turn");
    if (column >= p.n) return;
    float v[32];  // a copy: stores of float32 from d itself made it spill
#pragma unroll
    for (int e = 0; e < 32; ++e) v[e] = ptx::opaque(d[32 * unit + e]);
    if (!kPlain && __builtin_expect(p.bias != nullptr, 0)) {
      if constexpr (kTransposed)
        add_row_bias(v, p, row, lane);
      else
        add_bias(v, p, column, lane);
    }
    const uint32_t box = boxes_of<T>(shared, warp);
    if (kPlain || __builtin_expect(args.boxes, 1))
      store_boxes<kType, T::kBoxes, T::kBoxBytes, kTransposed>(v, &map_out, row, column, box, unit,
                                                               false, lane);
    else
      store_elements<kType, kTransposed>(v, p.out, row, column, static_cast<int>(p.m),
                                         static_cast<int>(p.n), false, lane);
  }
};

template <class T, FloatType kType, bool kTransposed>
__device__ __forceinline__ void consume(const CUtensorMap& map_out, const Int8KernelArgs& args,
                                        uint8_t* memory, uint32_t shared) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  Output<T, kType, kTransposed> out = {map_out, args, shared};
  Multiplier<T> work(shared, warp, lane);
  for (auto tiles = deal<T>(args, memory); tiles.more(); ++tiles.round) {
    int left = args.k_blocks;  // stages, with this one
    work.begin();
#pragma unroll 1
    while (work.goes_on(left)) {
      left -= ~work.facts.fallen & kFallen;
      work.template multiply<true>([](int) {});
    }
    out.at(work.read_facts(work.stage.facts));
    const bool stored = out.plain();
    work.template multiply<false>([&](int unit) {
      if (stored) out.template store<true>(work.d, unit);
    });
    if (stored) continue;
#pragma unroll
    for (int unit = 0; unit < 2 * T::kParts; ++unit) out.store(work.d, unit);
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();
  __syncwarp();
}

// ---- the kernel ----

template <class T, FloatType kType, bool kTransposed>
__global__ void __launch_bounds__(T::kThreads, 1)
    int8_gemm_kernel(const __grid_constant__ TensorMaps maps,
                     const __grid_constant__ Int8KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  const uint32_t rank = T::kCluster > 1 ? ptx::cluster_ctarank() : 0;
  if (threadIdx.x == 0) {
    init_ring<T>(shared, 1 + kWarpArrivals);
    for (int stage = 0; stage < T::kStages; ++stage)
      facts_of<T>(memory, stage)->second.fallen = kOnResidual;
    ptx::mbarrier_init(shared + T::kOffsetResidualFull, 1);
    ptx::mbarrier_init(shared + T::kOffsetResidualEmpty, T::kWarps * kWarpArrivals);
    ptx::fence_mbarrier_init();
    for (const CUtensorMap& map : maps.a) ptx::prefetch_tensormap(&map);
    for (const CUtensorMap& map : maps.b) ptx::prefetch_tensormap(&map);
    if (args.p.mask.given()) ptx::prefetch_tensormap(&maps.residual);
    if (args.boxes) ptx::prefetch_tensormap(&maps.out);
  }
  __syncthreads();
  sync_cluster<T>();           // no arrival and no copy before every block's barriers exist
  ptx::griddepcontrol_wait();  // the operands are there
  if constexpr (Deal<T::kCluster>::kOrdered)
    order_rows<T::kThreads>(args.p, args.order.tiles_n, args.blocks_m, args.k_blocks,
                            *reinterpret_cast<RowOrder*>(memory + T::kOffsetOrder));
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<T::kProducerRegisters>();
    produce<T>(maps, args, memory, shared, rank);
  } else {
    ptx::setmaxnreg_inc<T::kConsumerRegisters>();
    consume<T, kType, kTransposed>(maps.out, args, memory, shared);
  }
  sync_cluster<T>();  // a block's barriers outlive the arrivals of the others
}

// ---- launcher ----

template <class T, FloatType kType, bool kTransposed>
static cudaError_t launch(const Int8GemmParams& p, int multiprocessors, cudaStream_t stream) {
  TensorMaps maps = {};
  Int8KernelArgs args = {};
  cudaError_t error = cudaSuccess;
  const auto make = [&](CUtensorMap* map, const Int8Codes& codes, int64_t rows, int64_t kp,
                        int box_rows) {
    if (error == cudaSuccess)
      error = make_tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, codes.data, rows, kp, kp,
                              box_rows);
  };
  for (int shared : {0, 1}) {
    make(&maps.a[shared], p.a, p.m, p.kp, T::kTileM / (shared ? T::kCluster : 1));
    make(&maps.b[shared], p.b, p.n, p.kp, T::kTileN / (shared ? T::kCluster : 1));
  }
  if (p.mask.slots)  // tiles, one below the other
    make(&maps.residual, p.residual, int64_t{p.tiles} * kInt8Block, kInt8Block, kInt8Block);
  else if (p.mask.given())
    make(&maps.residual, p.residual, p.m, p.kp, kInt8Block);
  if (error == cudaSuccess) error = make_out_map(p, &maps.out, &args.boxes, kTransposed);
  if (error != cudaSuccess) return error;
  args.p = p;
  args.order = {ceil_div(p.m, T::kTileM * T::kCluster), ceil_div(p.n, T::kTileN)};
  args.k_blocks = ceil_div(p.kp, T::kTileK);
  args.blocks_m = ceil_div(p.m, kInt8Block);
  args.blocks_n = ceil_div(p.n, kInt8Block);
  // With a mask a cluster's tiles may lie along N (int8_order.cuh): more of them where N has an odd
  // number.
  const int along_n = p.mask.given() ? args.blocks_m * ceil_div(args.order.tiles_n, 2) : 0;
  return launch_persistent<T>(int8_gemm_kernel<T, kType, kTransposed>,
                              std::max(args.order.count(), along_n), multiprocessors, stream, maps,
                              args);
}

template <class T, bool kTransposed>
static cudaError_t launch(const Int8GemmParams& p, int multiprocessors, cudaStream_t stream) {
  if (p.out_type == FloatType::kFloat32)
    return launch<T, FloatType::kFloat32, kTransposed>(p, multiprocessors, stream);
  if (p.out_type == FloatType::kBfloat16)
    return launch<T, FloatType::kBfloat16, kTransposed>(p, multiprocessors, stream);
  return launch<T, FloatType::kFloat16, kTransposed>(p, multiprocessors, stream);
}

template <bool kTransposed>
static cudaError_t launch(const Int8GemmParams& p, cudaStream_t stream) {
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  if (prefer_large(p.m, p.n, 256, 1.7, multiprocessors))
    return launch<Int8Traits<2, 2>, kTransposed>(p, multiprocessors, stream);
  return launch<Int8Traits<1, 1>, kTransposed>(p, multiprocessors, stream);
}

cudaError_t launch_int8_gemm(const Int8GemmParams& p, cudaStream_t stream) {
  if (p.m == 0 || p.n == 0) return cudaSuccess;
  if (!p.residual_of_b) return launch<false>(p, stream);
  Int8GemmParams turned = p;  // D^T = B A^T
  std::swap(turned.a, turned.b);
  std::swap(turned.m, turned.n);
  turned.residual_of_b = false;
  return launch<true>(turned, stream);
}

}  // namespace mxtrain::cuda::sm90
