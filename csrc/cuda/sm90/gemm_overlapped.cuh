// SPDX-License-Identifier: Apache-2.0
// The consumers of gemm_consumer.cuh with partial sums of K = 128, and a tile's end under other
// products: the columns of one part are scaled and stored while the next part's last products are
// in the tensor cores, those of the last part while the next tile's first are. With K = 1024 a tile
// is 8 stages, and its end takes the time of two or three. The sums, their order and the stores are
// those of gemm_consumer.cuh: the same bytes.
#pragma once

#include "cuda/sm90/gemm_consumer.cuh"

namespace mxtrain::cuda::sm90 {

// What TileScales holds, a byte each.
template <int kParts>
struct ScaleBytes {
  uint32_t rows, columns[kParts];

  __device__ __forceinline__ void pack(const TileScales<128 * kParts>& s) {
    rows = s.rows[0] | s.rows[1] << 8;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const uint32_t* c = s.columns + 4 * i;
      columns[i] = c[0] | c[1] << 8 | c[2] << 16 | c[3] << 24;
    }
  }
  // Those of the rows and of 64 columns.
  __device__ __forceinline__ TileScales<64> of_unit(int unit) const {
    const uint32_t pair = columns[unit / 2] >> unit % 2 * 16;
    return {{rows & 0xFF, rows >> 8}, {pair & 0xFF, pair >> 8 & 0xFF}};
  }
};

// What a warp does. A tile has two stages at least: the first, any number, and the last.
template <class T, FloatType kType>
struct Overlapped {
  static constexpr int kLast = T::kParts - 1;

  const CUtensorMap& map_out;
  const KernelArgs& args;
  RingPosition<T> ring;
  const Factors<T> factors;
  const int warp, lane;
  float d[T::kParts][64];
  ScaleBytes<T::kParts> scales;
  int m = 0, n = -1;  // of the tile whose last part is still in d; n < 0: none

  __device__ __forceinline__ void start(float (&sum)[64], int part) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < T::kTileK / 32; ++k)
      ptx::wgmma_m64n128k32_e5m2(sum, factors.a_at(ring.stage, k),
                                 factors.b_at(ring.stage, k, part), k > 0);
    ptx::wgmma_commit_group();
  }
  __device__ __forceinline__ void start_half(float (&sum)[32], int part, int half) {
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < T::kTileK / 32; ++k)
      ptx::wgmma_m64n64k32_e5m2(sum, factors.a_at(ring.stage, k),
                                factors.b_at(ring.stage, k, part, half), k > 0);
    ptx::wgmma_commit_group();
  }
  __device__ __forceinline__ void finish(int unit) {
    const TileScales<64> s = scales.of_unit(unit);
    finish_columns<T, kType, true>(&d[unit / 2][unit % 2 * 32], unit, s.rows, s.columns,
                                   s.all_moderate() && args.moderate_alpha, args, map_out, m, n,
                                   boxes_of<T>(ring.shared, ptx::opaque(warp)), ptx::opaque(lane));
  }
  // The stage's last products are on their way: where to go on, and, once they are done, whose
  // stage to release.
  __device__ __forceinline__ uint32_t leave_stage(bool more) {
    const uint32_t empty = ring.empty();
    ring.advance();
    if (more) ptx::mbarrier_wait(ring.full(), ring.parity);
    return empty;
  }
  template <int kCount>
  __device__ __forceinline__ void add(float* to, const float (&sum)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) to[i] += sum[i];
  }

  __device__ __forceinline__ void first_stage(int tile) {
    float sum[64];
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      float (&into)[64] = part == kLast ? sum : d[part];  // d[kLast] is not free yet
      uint32_t empty = 0;
      start(into, part);
      if (part == 0) {
        if (n >= 0) {
          finish(2 * kLast);
          finish(2 * kLast + 1);
        }
        args.order.at(tile, m, n);
        const int rank = T::kCluster > 1 ? ptx::cluster_ctarank() : 0;
        m = (m * T::kCluster + rank) * T::kTileM + warp * 16;  // the warp's 16 rows
        n *= T::kTileN;
        TileScales<T::kTileN> fetched;
        fetched.fetch(args.p, m, n, lane);
        prefetch_bias<T::kTileN>(args.p, n, lane);
        scales.pack(fetched);
      }
      if (part == kLast) empty = leave_stage(true);
      ptx::wgmma_wait_group<0>(into);
      if (part == kLast) release<T>(empty, lane);
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) d[kLast][i] = sum[i] + 0.0f;  // registers that wgmma does not know
  }

  __device__ __forceinline__ void middle_stage() {
#pragma unroll
    for (int part = 0; part < T::kParts; ++part) {
      float sum[64];
      uint32_t empty = 0;
      start(sum, part);
      if (part == kLast) empty = leave_stage(true);
      ptx::wgmma_wait_group<0>(sum);
      if (part == kLast) release<T>(empty, lane);
      add(d[part], sum);
    }
  }

  __device__ __forceinline__ void last_stage(bool more) {
    float sum[64];
    start(sum, 0);
    uint32_t empty = 0;
    if (kLast == 0) empty = leave_stage(more);
    ptx::wgmma_wait_group<0>(sum);
    if (kLast == 0) release<T>(empty, lane);
    add(d[0], sum);
#pragma unroll
    for (int unit = 0; unit < 2 * kLast; ++unit) {
      float half[32];
      start_half(half, 1 + unit / 2, unit % 2);
      finish(unit);
      if (unit == 2 * kLast - 1) empty = leave_stage(more);
      ptx::wgmma_wait_group<0>(half);
      if (unit == 2 * kLast - 1) release<T>(empty, lane);
      add(&d[1 + unit / 2][unit % 2 * 32], half);
    }
  }

  __device__ __forceinline__ void run() {
    Walk<T, Tiling::kOverlapped> walk{args};
    if (!walk.more()) return;
    ptx::mbarrier_wait(ring.full(), ring.parity);
    while (walk.more()) {
      const Segment s = walk.segment();
      walk.step();
      first_stage(s.tile);
#pragma unroll 1
      for (int block = 2; block < args.k_blocks; ++block) middle_stage();
      last_stage(walk.more());
    }
    finish(2 * kLast);
    finish(2 * kLast + 1);
  }
};

// D must be such that boxes can be stored (args.boxes), and args.k_blocks 2 at least.
template <class T, FloatType kType>
__device__ __forceinline__ void consume_overlapped(const CUtensorMap& map_out,
                                                   const KernelArgs& args, uint32_t shared) {
  static_assert(T::kChunk == 128, "a part is finished while the next is summed");
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int group = __shfl_sync(0xFFFFFFFFu, warp / 4, 0);  // uniform, and known to be
  Overlapped<T, kType>{map_out, args, RingPosition<T>(shared), Factors<T>(shared, group),
                       warp,    lane}
      .run();
  if (lane == 0) ptx::cp_async_bulk_wait_group_read<0>();
  __syncwarp();
}

}  // namespace mxtrain::cuda::sm90
