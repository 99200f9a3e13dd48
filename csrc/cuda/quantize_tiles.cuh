// SPDX-License-Identifier: Apache-2.0
// quantize across rows (the operand of x.T for a row-major x), requantize, and quantize_dual: a CTA
// brings a tile of 256 x 128 bytes of x into shared memory, and its warps read columns (and, for
// the dual kernel, rows) of it as groups of 8. Column half: a warp takes kLanes groups along K of
// 32 / kLanes columns, kLanes = 8, or more where a Hadamard group spans more lanes; so its stores
// are whole 32-byte sectors. Row half: 8 (4 for float32) lanes a row of the tile. grid.x numbers
// the tiles, along x's rows first, so that CTAs that run together read neighbouring memory.
#pragma once

#include "cuda/tile.cuh"

namespace mxtrain::cuda {

// ---- device helpers ----

// The column half: operand rows are columns of the tile.
template <class T, class F, bool kToward>
__device__ __forceinline__ void quantize_columns_of(const uint8_t* tile, const QuantizeParams& p,
                                                    int64_t k_base, int64_t r_base) {
  constexpr int N = 2;  // groups a thread works on at once
  constexpr int kColumns = TileTraits::kChunks * T::kPerChunk, kWarps = TileTraits::kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int lanes_k = p.hadamard > 64 ? p.hadamard / 8 : 8, lanes_r = 32 / lanes_k;
  const int lane_k = lane % lanes_k, lane_r = lane / lanes_k;
  const int steps_k = TileTraits::kTileK / 8 / lanes_k, steps = steps_k * (kColumns / lanes_r);
  const Rotation rotation = make_rotation(p, lane_k);
  const DrawKey key = make_draw_key(p);
  const float tensor_scale = F::kE4M3Scale ? *p.tensor_scale : 1.0f;
  for (int step = warp * N; step < steps; step += kWarps * N) {
    int k[N], column[N];
    int64_t group[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      k[n] = ((step + n) % steps_k * lanes_k + lane_k) * 8;
      column[n] = (step + n) / steps_k * lanes_r + lane_r;
      group[n] = ((r_base + column[n]) * p.kp + k_base + k[n]) / 8;
    }
    Philox4 draws[N] = {};
    draw_groups<N>(key, group, draws);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t row = r_base + column[n], k0 = k_base + k[n];
      const bool inside = row < p.rows && k0 < p.kp;
      float v[8], z[8] = {};
      read_column8<T>(tile, k[n], column[n], v);
      transform8(v, p, rotation, lane_k);
      uint32_t block_max = block_amax_bits<F>(amax_bits8(v));
      if (kToward) {
        if (inside)
#pragma unroll
          for (int i = 0; i < 8; ++i)
            z[i] = k0 + i < p.cols
                       ? load_any(p.toward, p.toward_type,
                                  row * p.toward_stride_row + (k0 + i) * p.toward_stride_k)
                       : 0.0f;
        transform8(z, p, rotation, lane_k);
        const uint32_t toward_max = block_amax_bits<F>(amax_bits8(z));
        block_max = toward_max >= kInfBits ? toward_max : block_max;
      }
      const BlockScale s =
          choose_scale<F>(block_max, static_cast<ScaleRule>(p.scale_rule), tensor_scale);
      const Packed8 codes = encode_group<F, kToward>(v, z, s, p, draws[n]);
      if (!inside) continue;
      store_codes<F>(p, row, k0, codes);
      if (lane_k % (F::kBlock / 8) == 0) store_scale<F>(p, row, k0, s.code);
    }
  }
}

// The row half: operand rows are rows of the tile.
template <class T, class F>
__device__ __forceinline__ void quantize_rows_of(const uint8_t* tile, const QuantizeParams& p,
                                                 int64_t row_base, int64_t k_base) {
  constexpr int N = 2;
  constexpr int kGroupsPerRow = TileTraits::kChunks * T::kPerChunk / 8;
  constexpr int kSteps = TileTraits::kTileK * kGroupsPerRow / TileTraits::kThreads;
  static_assert(kSteps % N == 0 && kGroupsPerRow >= F::kBlock / 8,
                "a tile's row holds whole blocks");
  const int lane = threadIdx.x % 32;
  const Rotation rotation = make_rotation(p, lane % kGroupsPerRow);
  const DrawKey key = make_draw_key(p);
  const float tensor_scale = F::kE4M3Scale ? *p.tensor_scale : 1.0f;
  const int column = threadIdx.x % kGroupsPerRow * 8;
  for (int step = 0; step < kSteps; step += N) {
    int r[N];
    int64_t group[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      r[n] = ((step + n) * TileTraits::kThreads + threadIdx.x) / kGroupsPerRow;
      group[n] = ((row_base + r[n]) * p.kp + k_base + column) / 8;
    }
    Philox4 draws[N] = {};
    draw_groups<N>(key, group, draws);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t row = row_base + r[n], k0 = k_base + column;
      float v[8], unused[8] = {};
      read_row8<T>(tile, r[n], column, v);
      transform8(v, p, rotation, lane % kGroupsPerRow);
      const BlockScale s = choose_scale<F>(block_amax_bits<F>(amax_bits8(v)),
                                           static_cast<ScaleRule>(p.scale_rule), tensor_scale);
      const Packed8 codes = encode_group<F, false>(v, unused, s, p, draws[n]);
      if (row >= p.rows || k0 >= p.kp) continue;
      store_codes<F>(p, row, k0, codes);
      if (lane % (F::kBlock / 8) == 0) store_scale<F>(p, row, k0, s.code);
    }
  }
}

struct TilePlace {
  int64_t k_base, r_base;
};

template <class T>
__device__ __forceinline__ TilePlace tile_place(int64_t tiles_across) {
  constexpr int kColumns = TileTraits::kChunks * T::kPerChunk;
  const int64_t tile = blockIdx.x;
  return {tile / tiles_across * TileTraits::kTileK, tile % tiles_across * kColumns};
}

template <class T>
__device__ __forceinline__ void load_tile(const QuantizeParams& p, TilePlace at, bool vector,
                                          uint8_t* tile) {
  if constexpr (T::kPacked)
    load_packed_tile<T>(p, at.k_base, at.r_base, tile);
  else
    load_float_tile<T>(p, at.k_base, at.r_base, vector, tile);
  __syncthreads();
}

// ---- kernels ----

template <class T, class F, bool kToward>
__global__ void __launch_bounds__(TileTraits::kThreads)
    quantize_columns_kernel(const QuantizeParams p, int64_t tiles_across, bool vector) {
  __shared__ alignas(128) uint8_t tile[TileTraits::kBytes];
  const TilePlace at = tile_place<T>(tiles_across);
  load_tile<T>(p, at, vector, tile);
  quantize_columns_of<T, F, kToward>(tile, p, at.k_base, at.r_base);
}

template <class T, class F>
__global__ void __launch_bounds__(TileTraits::kThreads)
    quantize_dual_kernel(const QuantizeParams row, const QuantizeParams col, int64_t tiles_across,
                         bool vector) {
  __shared__ alignas(128) uint8_t tile[TileTraits::kBytes];
  const TilePlace at = tile_place<T>(tiles_across);
  load_tile<T>(col, at, vector, tile);
  quantize_rows_of<T, F>(tile, row, at.k_base, at.r_base);
  quantize_columns_of<T, F, false>(tile, col, at.k_base, at.r_base);
}

// nvfp4: the operand's largest finite |v| after the transforms, as float bits, into *p.tensor_scale
// (zeroed before).
template <class T>
__global__ void __launch_bounds__(TileTraits::kThreads)
    amax_columns_kernel(const QuantizeParams p, int64_t tiles_across, bool vector) {
  __shared__ alignas(128) uint8_t tile[TileTraits::kBytes];
  const TilePlace at = tile_place<T>(tiles_across);
  load_tile<T>(p, at, vector, tile);
  constexpr int kColumns = TileTraits::kChunks * T::kPerChunk;
  const int lanes_k = p.hadamard > 64 ? p.hadamard / 8 : 8, lanes_r = 32 / lanes_k;
  const int lane_k = threadIdx.x % 32 % lanes_k, lane_r = threadIdx.x % 32 / lanes_k;
  const int steps_k = TileTraits::kTileK / 8 / lanes_k;
  const Rotation rotation = make_rotation(p, lane_k);
  uint32_t m = 0;
  for (int step = threadIdx.x / 32; step < steps_k * (kColumns / lanes_r);
       step += TileTraits::kThreads / 32) {
    float v[8];
    read_column8<T>(tile, (step % steps_k * lanes_k + lane_k) * 8,
                    step / steps_k * lanes_r + lane_r, v);
    transform8(v, p, rotation, lane_k);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t a = float_bits(v[i]) & ~kSignBit;
      m = a < kInfBits ? max(m, a) : m;
    }
  }
  m = __reduce_max_sync(kAllLanes, m);
  if (threadIdx.x % 32 == 0 && m) atomicMax(reinterpret_cast<unsigned*>(p.tensor_scale), m);
}

cudaError_t launch_finish_tensor_scale(const QuantizeParams& p, cudaStream_t stream);

// ---- launchers ----

struct TileGrid {
  int64_t across;
  unsigned ctas;
};

template <class T>
static TileGrid tile_grid(const QuantizeParams& p) {
  const int64_t columns = TileTraits::kChunks * T::kPerChunk;
  const int64_t across = (p.rows + columns - 1) / columns;
  return {across,
          static_cast<unsigned>(across * ((p.kp + TileTraits::kTileK - 1) / TileTraits::kTileK))};
}

template <class T>
static bool vector_copies(const QuantizeParams& p) {
  const int64_t size = sizeof(typename T::Type);
  return !T::kPacked && p.stride_row == 1 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
         (p.cols == 1 || p.stride_k * size % 16 == 0);
}

template <class T, class F>
static cudaError_t find_column_scale(const QuantizeParams& p, cudaStream_t stream) {
  if (!F::kE4M3Scale) return cudaSuccess;
  const TileGrid grid = tile_grid<T>(p);
  amax_columns_kernel<T>
      <<<grid.ctas, TileTraits::kThreads, 0, stream>>>(p, grid.across, vector_copies<T>(p));
  return launch_finish_tensor_scale(p, stream);
}

template <class T, class F>
static cudaError_t launch_columns(const QuantizeParams& p, cudaStream_t stream) {
  const TileGrid grid = tile_grid<T>(p);
  const bool vector = vector_copies<T>(p);
  const cudaError_t error = find_column_scale<T, F>(p, stream);
  if (error != cudaSuccess) return error;
  if constexpr (!T::kPacked) {
    if (p.toward) {
      quantize_columns_kernel<T, F, true>
          <<<grid.ctas, TileTraits::kThreads, 0, stream>>>(p, grid.across, vector);
      return cudaGetLastError();
    }
  }
  quantize_columns_kernel<T, F, false>
      <<<grid.ctas, TileTraits::kThreads, 0, stream>>>(p, grid.across, vector);
  return cudaGetLastError();
}

template <class T>
static cudaError_t launch_columns_of(const QuantizeParams& p, cudaStream_t stream) {
  using Launcher = cudaError_t (*)(const QuantizeParams&, cudaStream_t);
#define MXT_ROW(code, traits, name) launch_columns<T, traits>,
  static constexpr Launcher kLaunchers[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kLaunchers[p.format](p, stream);
}

}  // namespace mxtrain::cuda
