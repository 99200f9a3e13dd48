// SPDX-License-Identifier: Apache-2.0
// D[M, N] = A B^T + bias of int8_block operands on Hopper's integer tensor cores (wgmma), A and B
// with K contiguous, D in bfloat16, float16 or float32.
//
// The structure is that of gemm_e5m2.cu, and so are the ring and its copies: one warp of the first
// warpgroup keeps the copy engine loading stages of K = 128 into a ring; two warpgroups multiply 64
// rows of the tile each; the blocks of a cluster share a tile of B. A stage is one block of K, so
// the producer, which is ahead, reads its scales and mask bits and leaves their products beside it.
// Where a block fell back, its residual comes through a stage of its own and meets the other
// operand, which is still there: a fallback costs the products and one tile of copies.
//
// The integer sums of a stage are exact. They are converted and added in float32:
// acc = fma(scale, sum, acc), K ascending, a residual after its block. A conversion and a
// multiply-add for each sum take as many issue slots as half the products take cycles, so a
// warpgroup multiplies 64 columns while it adds the 64 before: two sets of sums take turns. Most
// products take the rows of A from registers: from shared memory, such narrow ones would read them
// again for each 64 columns, 128 bytes a cycle with B, and there would be no room for the copies.
// (Sums that start at the bits of a float, as cuda/int8_gemm.cu has them, would take a move each.)
#include "cuda/sm90/gemm_consumer.cuh"
#include "cuda/sm90/gemm_int8.h"
#include "cuda/sm90/gemm_launch.h"
#include "cuda/sm90/int8_order.cuh"
#include "formats/int8.h"
#include "ptx/memory.cuh"

namespace mxtrain::cuda::sm90 {

// ---- traits ----

// As GemmTraits, and the residual's tile, what the producer knows of each stage, the tile's
// barriers. A chunk is a stage. Of a consumer's registers the integer sums of two times 64 columns
// take 64, and rows of A 16.
template <int kParts, int kCluster>
using Int8RingTraits = GemmTraits<kParts, kCluster, 128, kParts == 2 ? 4 : 6, 40, 1>;

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
  static constexpr int kOffsetOrder = kOffsetResidualEmpty + 8;
  static constexpr int kSharedBytes =
      kOffsetOrder + (Deal<kCluster>::kOrdered ? int{sizeof(RowOrder)} : 0);
  static_assert(kSharedBytes <= 227 * 1024, "the shared memory of a block");
};

// A pass: the products of a block, or of its residual.
struct alignas(16) PassFacts {
  float scale[2];   // products of scales, of each part
  uint32_t fallen;  // bit 0: A's block fell back; bits 1 and 2: those of B's parts; or kOnResidual
  uint16_t row, n;  // main: the tile, in rows of blocks and in tiles
};
constexpr uint32_t kOnResidual = 8;

// What the producer leaves beside a stage. second: with the residual's scale.
struct StageFacts {
  PassFacts main, second;
};

struct Int8KernelArgs {
  Int8GemmParams p;
  TileOrder order;
  int k_blocks, blocks_m, blocks_n;
  bool boxes;  // D's rows are whole 16-byte units: the copy engine stores them
};

template <class T>
__device__ __forceinline__ StageFacts* facts_of(uint8_t* memory, int stage) {
  return reinterpret_cast<StageFacts*>(memory + T::kOffsetFacts + stage * T::kFactBytes);
}

template <class T>
__device__ __forceinline__ Deal<T::kCluster> deal(const Int8KernelArgs& args, uint8_t* memory) {
  return {*reinterpret_cast<RowOrder*>(memory + T::kOffsetOrder), args.order};
}

// ---- the producer ----

// A warp reads the facts of kBatch stages at once, a lane those of one part of one stage: what the
// producer does each stage, it does in the issue slots that the consumers need.
constexpr int kBatch = 16;

struct LaneFacts {
  float main, second;
  uint32_t fallen;  // of the stage
};

// Of block k of the tile whose first blocks are i of A and j of B. Blocks beyond the edge have no
// scale; what they would multiply is not stored.
template <class T>
__device__ __forceinline__ LaneFacts read_facts(const Int8KernelArgs& args, int i, int j, int k,
                                                int part) {
  const Int8GemmParams& p = args.p;
  const auto scale = [&](const Int8Codes& codes, int block) {
    return __ldg(codes.scale + block * codes.stride_row + k * codes.stride_k);
  };
  LaneFacts f = {};
  const bool in_a = i < args.blocks_m && k < args.k_blocks, in_b = in_a && j + part < args.blocks_n;
  const int fallback = p.residual_of_b ? j + part : i;
  if (p.mask && (p.residual_of_b ? in_b : in_a) &&
      __ldg(p.mask + fallback * p.mask_stride_row + k * p.mask_stride_k))
    f.fallen = p.residual_of_b ? 2u << part : 1u;
  if (in_b) {
    const float a = scale(p.a, i), b = scale(p.b, j + part);
    f.main = a * b;
    if (f.fallen) f.second = (p.residual_of_b ? a : b) * scale(p.residual, fallback);
  }
  if constexpr (T::kParts == 2) f.fallen |= __shfl_xor_sync(~0u, f.fallen, 1);
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

// All lanes; lane 0 copies.
template <class T>
__device__ __forceinline__ void produce(const TensorMaps& maps, const Int8KernelArgs& args,
                                        uint8_t* memory, uint32_t shared, uint32_t rank, int lane) {
  RingPosition<T> ring(shared);
  uint32_t residual_parity = 0;
  for (auto tiles = deal<T>(args, memory); tiles.more(); ++tiles.round) {
    const Place place = tiles.place();
    const int i = place.row, j = place.n * T::kParts;
    LaneFacts read;
    for (int block = 0; block < args.k_blocks; ++block) {
      const int in_batch = block % kBatch, part = ptx::opaque(lane) % T::kParts,
                ahead = ptx::opaque(lane) / T::kParts % kBatch;  // anew: registers are few
      // Before the wait: most of the time the ring is full.
      if (in_batch == 0) read = read_facts<T>(args, i, j, block + ahead, part);
      uint32_t fallen = __shfl_sync(~0u, read.fallen, in_batch * T::kParts);
      ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
      if (ahead == in_batch) {
        StageFacts& facts = *facts_of<T>(memory, ring.stage);
        facts.main.scale[part] = read.main;
        facts.second.scale[part] = read.second;
        facts.main.fallen = fallen;
        facts.main.row = i;
        facts.main.n = place.n;
      }
      __syncwarp();  // the arrival of load_stage publishes it
      if (lane != 0) {
        if (kWarpArrivals == 32) ptx::mbarrier_arrive(ring.full());
      } else {
        const int k = block * T::kTileK;
        load_stage<T>(maps.a, maps.b, ring, k, i * T::kTileM, j * kInt8Block, rank,
                      Deal<T::kCluster>::kOrdered && place.along_n);
        int row = (fallen & 1 ? i : j) * kInt8Block;
        if (!(fallen & 1)) fallen >>= 1;
#pragma unroll 1
        for (; fallen; fallen >>= 1, row += kInt8Block)
          if (fallen & 1) load_residual<T>(maps, shared, k, row, residual_parity);
      }
      ring.advance();
    }
  }
}

// ---- the consumers ----

// What a warp does. A unit is the products of its warpgroup's 64 rows with 64 columns over K = 128.
// Under whatever is added there is a unit in the tensor cores, also from one pass to the next: the
// rows of A in registers are in use until a pass's last unit is done, so the next one's first unit
// takes them from shared memory.
//
// Starts, waits and additions have the order that ptxas follows. It waits after each product
// (C7514, C7515) where one in flight around a loop is first waited for with others behind it, where
// the loop is entered in more than one place, and where its condition has branches. Of a unit that
// is started right before additions it moves all but the first product behind them, unless the
// additions need a wait that comes after the start.
template <class T>
struct Multiplier {
  static constexpr int kUnits = 2 * T::kParts;          // of a pass
  static constexpr int kColumns = 64 * T::kTileK / 16;  // of B, in the units of descriptors
  static_assert(kUnits % 2 == 0, "a pass begins with the first set of sums");

  uint8_t* const memory;
  const int lane;
  const uint32_t rows_at;     // where the lane's first 16 bytes of A are in stage 0
  const uint32_t group_at;    // where the warpgroup's rows of A are, in the units of descriptors
  const uint32_t columns_at;  // where B is, likewise
  RingPosition<T> ring;
  uint32_t residual_parity = 0;
  float scale[T::kParts];  // of the pass
  uint32_t fallen;
  uint32_t rows[4][4];  // the warp's 16 rows of A, as wgmma takes them
  int32_t sums[2][32];  // of two units
  float d[32 * kUnits];

  __device__ __forceinline__ Multiplier(uint8_t* memory, uint32_t shared, int warp, int lane)
      : memory(memory),
        lane(lane),
        rows_at(shared + (warp * 16 + lane % 16) * T::kTileK + (lane / 16 ^ lane % 8) * 16),
        group_at(shared / 16 + __shfl_sync(~0u, warp / 4, 0) * (64 * T::kTileK / 16)),
        columns_at((shared + T::kOffsetB) / 16),
        ring(shared) {}

  // The rows of A in a stage or in the residual, `offset` bytes from stage 0 on.
  __device__ __forceinline__ void take_rows(uint32_t offset) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
      ptx::ldmatrix_x4(rows[k], rows_at + offset ^ k * 32);  // of the 128-byte swizzle
  }
  __device__ __forceinline__ void start(int32_t (&sum)[32], uint32_t columns) {
    ptx::wgmma_fence();
    ptx::wgmma_m64n64k128_s8(sum, rows, ptx::wgmma_descriptor(columns));
    ptx::wgmma_commit_group();
  }
  // The first unit of a pass.
  __device__ __forceinline__ void start_first(uint32_t offset, uint32_t columns) {
    ptx::wgmma_fence();
    ptx::wgmma_m64n64k128_s8(sums[0], ptx::wgmma_descriptor(group_at + offset / 16),
                             ptx::wgmma_descriptor(columns));
    ptx::wgmma_commit_group();
  }
  __device__ __forceinline__ void add(float* to, const int32_t (&sum)[32], float scale) {
#pragma unroll
    for (int i = 0; i < 32; ++i) to[i] = int8_promote(to[i], scale, static_cast<float>(sum[i]));
  }
  __device__ __forceinline__ uint32_t columns() const {
    return columns_at + ring.stage * (T::kBytesB / 16);
  }
  __device__ __forceinline__ PassFacts facts(bool of_residual) const {
    const StageFacts& both = *facts_of<T>(memory, ring.stage);
    return of_residual ? both.second : both.main;
  }
  __device__ __forceinline__ void take_facts(const PassFacts& facts) {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) scale[part] = facts.scale[part];
    fallen = facts.fallen;
  }

  // The pass of the stage where the ring is, from nothing.
  __device__ __forceinline__ void begin() {
    ptx::mbarrier_wait(ring.full(), ring.parity);
    start_first(ring.stage * T::kBytesA, columns());
    take_rows(ring.stage * T::kBytesA);
    take_facts(facts(false));
  }
  __device__ __forceinline__ void await_residual() {
    ptx::mbarrier_wait(ring.shared + T::kOffsetResidualFull, residual_parity);
    residual_parity ^= 1;
  }
  __device__ __forceinline__ void release_residual() {
    __syncwarp();  // every lane has read the rows
    if (lane < kWarpArrivals) ptx::mbarrier_arrive(ring.shared + T::kOffsetResidualEmpty);
  }
  // This stage has been read.
  __device__ __forceinline__ void leave() {
    __syncwarp();  // every lane has read the facts and the rows
    release<T>(ring.empty(), lane);
    ring.advance();
  }

  // Whether a pass follows this one directly. (Without branches: more blocks around the loop, and
  // ptxas waits after every product.)
  __device__ __forceinline__ bool goes_on(int left) const {
    return (fallen & 1) | ((left > 1) & ((fallen & 6) == 0));
  }
  // Before: unit 0 is in flight. kNext: then another pass follows, with A's residual or the next
  // stage, and so it is afterwards. Otherwise the stage is left, unless residuals of B follow.
  // added(u): after unit u.
  template <bool kNext, class Added>
  __device__ __forceinline__ void multiply(Added added) {
    constexpr int kLast = kUnits - 1;
    const uint32_t from = columns(), empty = ring.empty();
    const bool residual_next = fallen & 1;
    ptx::wgmma_wait_group<0>(sums[0]);
    start(sums[1], from + kColumns);
    if (fallen & kOnResidual) release_residual();
    add(d, sums[0], scale[0]);
    added(0);
#pragma unroll
    for (int u = 1; u < kLast; ++u) {
      start(sums[(u + 1) % 2], from + (u + 1) * kColumns);
      ptx::wgmma_wait_group<1>(sums[u % 2]);
      add(d + 32 * u, sums[u % 2], scale[u / 2]);
      added(u);
    }
    if constexpr (kNext) {
      uint32_t at = T::kOffsetResidual;
      if (residual_next) {
        await_residual();
      } else {
        ring.advance();
        ptx::mbarrier_wait(ring.full(), ring.parity);
        at = ring.stage * T::kBytesA;
      }
      start_first(at, columns());
      ptx::wgmma_wait_group<1>(sums[1]);
      __syncwarp();  // every lane has read the facts and the rows
      if (!residual_next) release<T>(empty, lane);
      take_rows(at);
      const PassFacts next = facts(residual_next);
      add(d + 32 * kLast, sums[1], scale[T::kParts - 1]);
      take_facts(next);
    } else {
      ptx::wgmma_wait_group<0>(sums[1]);
      if (!(fallen & 6)) leave();
      add(d + 32 * kLast, sums[1], scale[T::kParts - 1]);
      added(kLast);
    }
  }
  // The residuals of B of a stage, while its rows are there.
  __device__ __forceinline__ void add_residuals_of_b() {
    const PassFacts second = facts(true);
    constexpr uint32_t kFrom = (T::kOffsetResidual - T::kOffsetB) / 16;
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      if (!(fallen & 2u << part)) continue;
      await_residual();
      start(sums[0], columns_at + kFrom);
      start(sums[1], columns_at + kFrom + kColumns);
      ptx::wgmma_wait_group<1>(sums[0]);
      add(d + 64 * part, sums[0], second.scale[part]);
      ptx::wgmma_wait_group<0>(sums[1]);
      release_residual();
      add(d + 64 * part + 32, sums[1], second.scale[part]);
    }
  }
};

// A tile's way to D, 64 columns at a time.
template <class T, FloatType kType>
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
    if (!kPlain && __builtin_expect(p.bias != nullptr, 0)) add_bias(v, p, column, lane);
    const uint32_t box = boxes_of<T>(shared, warp);
    if (kPlain || __builtin_expect(args.boxes, 1))
      store_boxes<kType, T::kBoxes, T::kBoxBytes>(v, &map_out, row, column, box, unit, false, lane);
    else
      store_elements<kType>(v, p.out, row, column, static_cast<int>(p.m), static_cast<int>(p.n),
                            false, lane);
  }
};

template <class T, FloatType kType>
__device__ __forceinline__ void consume(const CUtensorMap& map_out, const Int8KernelArgs& args,
                                        uint8_t* memory, uint32_t shared, uint32_t rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  Output<T, kType> out = {map_out, args, shared};
  Multiplier<T> work(memory, shared, warp, lane);
  for (auto tiles = deal<T>(args, memory); tiles.more(); ++tiles.round) {
#pragma unroll
    for (int i = 0; i < 64 * T::kParts; ++i) work.d[i] = 0.0f;
    bool stored = false;
    int left = args.k_blocks;  // stages, with this one
#pragma unroll 1
    do {
      work.begin();
#pragma unroll 1
      while (work.goes_on(left)) {
        left -= ~work.fallen & 1;
        work.template multiply<true>([](int) {});
      }
      if (left == 1) out.at(work.facts(false));
      stored = left == 1 && !(work.fallen & 6) && out.plain();
      work.template multiply<false>([&](int unit) {
        if (stored) out.template store<true>(work.d, unit);
      });
      if (work.fallen & 6) {
        work.add_residuals_of_b();
        work.leave();
      }
    } while (--left > 0);
    if (stored) continue;
#pragma unroll
    for (int unit = 0; unit < 2 * T::kParts; ++unit) out.store(work.d, unit);
  }
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
    init_ring<T>(shared, kWarpArrivals);
    for (int stage = 0; stage < T::kStages; ++stage)
      facts_of<T>(memory, stage)->second.fallen = kOnResidual;
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
  if constexpr (Deal<T::kCluster>::kOrdered)
    order_rows<T::kThreads>(args.p, args.order.tiles_m * T::kCluster, args.blocks_m, args.k_blocks,
                            *reinterpret_cast<RowOrder*>(memory + T::kOffsetOrder));
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<T::kProducerRegisters>();
    if (threadIdx.x < 32)
      produce<T>({map_a, map_b, map_residual}, args, memory, shared, rank, threadIdx.x);
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
  args.blocks_m = ceil_div(p.m, kInt8Block);
  args.blocks_n = ceil_div(p.n, kInt8Block);
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
