// SPDX-License-Identifier: Apache-2.0
// The consumers of the FP8 GEMMs: two warpgroups that wait for stages of A and B in shared memory
// (whoever fills them), multiply 64 rows of the tile each, and write the tile.
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
// Every sum has one order, so the same operands give the same bytes. (cuda/split_k.h: K may be cut
// into slabs that are summed apart.)
#pragma once

#include <cuda.h>

#include "cuda/sm90/gemm_epilogue.cuh"
#include "cuda/sm90/gemm_ring.cuh"
#include "cuda/tile_order.cuh"
#include "ptx/wgmma.cuh"

namespace mxtrain::cuda::sm90 {

// ---- arguments ----

// How tiles follow one another: whole ones, one after the other; the same with their ends under
// other products, where boxes can be stored; or parts of them, by slabs of K.
enum class Tiling { kWhole, kOverlapped, kSlabs };

struct KernelArgs {
  FoldedGemmParams p;
  TileOrder order;
  int k_blocks;
  bool boxes;           // D's rows are whole 16-byte units: the copy engine stores them
  bool moderate_alpha;  // 0, or within 2^(+-16)

  // gemm_packed.cu only: p.a and p.b are codes, and these the shifts of their blocks.
  const uint32_t *a_shift, *b_shift;  // [m, k_blocks], [n, k_blocks]: four of a stage in a word
};

// ---- the tiles ----

// What a cluster computes, one after the other: every so many of all tiles, or of all slabs.
template <class T, Tiling kTiling>
struct Walk {
  static constexpr bool kSplit = kTiling == Tiling::kSlabs;

  const KernelArgs& args;
  int at = blockIdx.x / T::kCluster;

  __device__ __forceinline__ bool more() const {
    return at < args.order.count() * (kSplit ? args.p.split.slabs : 1);
  }
  __device__ __forceinline__ Segment segment() const {
    if constexpr (kSplit) return args.p.split.segment(at, args.k_blocks);
    return {at, 0, args.k_blocks};
  }
  __device__ __forceinline__ void step() { at += gridDim.x / T::kCluster; }
};

// ---- the consumers ----

// This warp has read the stage: an arrival at the `empty` barrier of each block of the cluster.
template <class T>
__device__ __forceinline__ void release(uint32_t empty, int lane) {
  if constexpr (kWarpArrivals == 1) {
    if (lane < T::kCluster) ptx::mbarrier_arrive_cluster(empty, lane);
  } else {
    for (int rank = 0; rank < T::kCluster; ++rank) ptx::mbarrier_arrive_cluster(empty, rank);
  }
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
  __device__ __forceinline__ uint32_t stage_a(int stage) const {
    return a + stage * (T::kBytesA / kUnit);
  }
  __device__ __forceinline__ uint32_t stage_b(int stage, int part) const {
    return b + stage * (T::kBytesB / kUnit) + part * kPart;
  }
  __device__ __forceinline__ uint64_t a_at(int stage, int k) const {
    return ptx::wgmma_descriptor(stage_a(stage) + k * kStep);
  }
  __device__ __forceinline__ uint64_t b_at(int stage, int k, int part, int half = 0) const {
    return ptx::wgmma_descriptor(stage_b(stage, part) + half * (kPart / 2) + k * kStep);
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

// The warp's sum of a slab joins those of the tile's other slabs. Whether they are all there: then
// d is their sum, in the order of K, and the warp finishes its rows. A warp has one counter and one
// order of its own, so no warp waits for another.
template <class T>
__device__ __forceinline__ bool join(float (&d)[T::kParts][64], const FoldedGemmParams& p, int tile,
                                     int slab, int warp, int lane) {
  static_assert(T::kCluster == 1, "a slab is one block's");
  constexpr int kVectors = T::kParts * 16, kFlight = 8;   // float4 of a lane; asked for at a time
  const int slabs = p.split.slabs, first = tile * slabs;  // the tile's first of all slabs
  const auto sum_of = [&](int which) {
    return reinterpret_cast<float4*>(p.partial) + (which * T::kWarps + warp) * (kVectors * 32) +
           lane;
  };
  float4* mine = sum_of(slab);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const float* v = &d[i / 16][i % 16 * 4];
    __stcg(mine + i * 32, make_float4(v[0], v[1], v[2], v[3]));
  }
  __syncwarp();
  uint32_t before = 0;
  if (lane == 0) {
    __threadfence();  // what the warp wrote, before its arrival
    before = atomicAdd(p.arrived + tile * T::kWarps + warp, 1u);
    __threadfence();  // the arrivals of the others, before what they wrote is read
  }
  before = __shfl_sync(0xFFFFFFFFu, before, 0);
  __syncwarp();
  if (before != static_cast<uint32_t>(slabs - 1)) return false;
#pragma unroll
  for (int i = 0; i < kVectors; i += kFlight) {
    float4 sum[kFlight];
#pragma unroll 1
    for (int other = first; other < first + slabs; ++other) {
      const float4* theirs = sum_of(other) + i * 32;
      float4 v[kFlight];
#pragma unroll
      for (int j = 0; j < kFlight; ++j) v[j] = __ldcg(theirs + j * 32);
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        sum[j].x = other == first ? v[j].x : sum[j].x + v[j].x;
        sum[j].y = other == first ? v[j].y : sum[j].y + v[j].y;
        sum[j].z = other == first ? v[j].z : sum[j].z + v[j].z;
        sum[j].w = other == first ? v[j].w : sum[j].w + v[j].w;
      }
    }
#pragma unroll
    for (int j = 0; j < kFlight; ++j) {
      float* v = &d[(i + j) / 16][(i + j) % 16 * 4];
      v[0] = sum[j].x;
      v[1] = sum[j].y;
      v[2] = sum[j].z;
      v[3] = sum[j].w;
    }
  }
  return true;
}

template <class T>
__device__ __forceinline__ uint32_t boxes_of(uint32_t shared, int warp) {
  return shared + T::kOffsetOut + warp * T::kBoxes * T::kBoxBytes;
}

// 64 columns of a tile, the unit-th ones: scaled, then on their way to memory while the next are
// scaled. v: their 32 accumulators; own: of TileScales; m, n: the warp's first row and the tile's
// first column. kBoxed: args.boxes is known to be set.
template <class T, FloatType kType, bool kBoxed = false>
__device__ __forceinline__ void finish_columns(float* v, int unit, const uint32_t (&rows)[2],
                                               const uint32_t* own, bool moderate,
                                               const KernelArgs& args, const CUtensorMap& map_out,
                                               int m, int n, uint32_t boxes, int lane) {
  const FoldedGemmParams& p = args.p;
  n += 64 * unit;
  if (n >= p.n) {  // a group for no box, so that boxes keep their turns
    if (lane == 0) ptx::cp_async_bulk_commit_group();
    return;
  }
  if (__builtin_expect(moderate, 1))
    scale_moderate(v, rows, own, p.alpha, lane);
  else
    scale_any(v, rows, own, p.alpha, lane);
  if (__builtin_expect(p.bias != nullptr, 0)) add_bias(v, p, n, lane);
  if (kBoxed || __builtin_expect(args.boxes, 1))
    store_boxes<kType, T::kBoxes, T::kBoxBytes>(v, &map_out, m, n, boxes, unit, p.add, lane);
  else
    store_elements<kType>(v, p.out, m, n, static_cast<int>(p.m), static_cast<int>(p.n), p.add,
                          lane);
}

template <class T, FloatType kType, Tiling kTiling = Tiling::kWhole>
__device__ __forceinline__ void consume(const CUtensorMap& map_out, const KernelArgs& args,
                                        uint32_t shared, uint32_t rank) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // uniform, and known to be
  const uint32_t boxes = boxes_of<T>(shared, warp);
  const Factors<T> factors(shared, group);
  RingPosition<T> ring(shared);
  for (Walk<T, kTiling> walk{args}; walk.more(); walk.step()) {
    const Segment s = walk.segment();
    int m, n;
    args.order.at(s.tile, m, n);
    m = (m * T::kCluster + rank) * T::kTileM + warp * 16;  // the warp's 16 rows
    n *= T::kTileN;
    TileScales<T::kTileN> scales;
    scales.fetch(args.p, m, n, lane);
    float d[T::kParts][64] = {};
    if constexpr (T::kChunk == 128)
      multiply_promoted<T>(d, ring, factors, s.end - s.begin, lane);
    else if constexpr (T::kChunk == 32)
      multiply_exact<T>(d, ring, factors, s.end - s.begin, lane);
    else
      multiply_fast<T>(d, ring, factors, s.end - s.begin, lane);
    if constexpr (kTiling == Tiling::kSlabs)
      if (!join<T>(d, args.p, s.tile, walk.at, warp, lane)) continue;
    const bool moderate = scales.all_moderate() && args.moderate_alpha;
#pragma unroll
    for (int unit = 0; unit < 2 * T::kParts; ++unit)
      finish_columns<T, kType>(&d[unit / 2][unit % 2 * 32], unit, scales.rows,
                               scales.columns + 2 * unit, moderate, args, map_out, m, n, boxes,
                               ptx::opaque(lane));
  }
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();
  __syncwarp();
}

}  // namespace mxtrain::cuda::sm90
