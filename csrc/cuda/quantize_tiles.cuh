// SPDX-License-Identifier: Apache-2.0
// quantize across rows (the operand of x.T for a row-major x), requantize, and quantize_dual: a CTA
// brings a tile of 256 x 128 bytes of x into shared memory, and its warps read columns (and, for
// the dual kernel, rows) of it as groups of 8. Column half: a warp takes kLanes groups along K of
// 32 / kLanes columns, kLanes = 8, or more where a Hadamard group spans more lanes; so its stores
// are whole 32-byte sectors. Row half: 8 (4 for float32) lanes a row of the tile. grid.x numbers
// the tiles, along x's rows first, so that CTAs that run together read neighbouring memory.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/tile.cuh"

namespace mxtrain::cuda {

// ---- device helpers ----

// A thread's place among the columns of a tile: lanes_k lanes of a warp lie along K, the others
// take pairs of columns, and the CTA's 8 warps cover the 256 elements along K of 16 columns. So k
// stays and the column moves on by 16 each step.
template <class T>
struct ColumnPlace {
  static constexpr int kStep = 16;
  static constexpr int kSteps = TileTraits::kChunks * T::kPerChunk / kStep;
  static_assert(TileTraits::kThreads * 8 * 2 == TileTraits::kTileK * kStep,
                "a step covers 16 columns");
  int lane_k, k, column;

  __device__ __forceinline__ explicit ColumnPlace(int hadamard) {
    const int lanes_k = hadamard > 64 ? hadamard / 8 : 8, warps_k = 32 / lanes_k;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    lane_k = lane % lanes_k;
    k = (warp % warps_k * lanes_k + lane_k) * 8;
    column = (warp / warps_k * (32 / lanes_k) + lane / lanes_k) * 2;
  }
};

__device__ __forceinline__ void load_toward_column(const QuantizeParams& p, int64_t row, int64_t k0,
                                                   float (&z)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    z[i] = row < p.rows && k0 + i < p.cols
               ? load_any(p.toward, p.toward_type,
                          row * p.toward_stride_row + (k0 + i) * p.toward_stride_k)
               : 0.0f;
}

// The column half: operand rows are columns of the tile. A thread takes two neighbouring columns.
template <class T, class F, Path kPath>
__device__ __forceinline__ void quantize_columns_of(const uint8_t* tile, const QuantizeParams& p,
                                                    int64_t k_base, int64_t r_base) {
  constexpr int kLanes = F::kBlock / 8;
  const ColumnPlace<T> place(p.hadamard);
  const Rotation rotation = make_rotation(p.hadamard, p.signs, place.lane_k);
  const DrawKey key = make_draw_key(p);
  const ScaleChooser<F> scales(p);
  const int64_t k0 = k_base + place.k, groups_per_row = p.kp / 8;
  const bool writes_scale = place.lane_k % kLanes == 0;
  int64_t row = r_base + place.column;
  const int64_t group = row * groups_per_row + k0 / 8;
  const int64_t row_bytes = groups_per_row * F::kBits, row_blocks = groups_per_row / kLanes;
  const int64_t quarters_per_row = draw_quarters_of_row<F>(p);
  int64_t quarter = row * quarters_per_row + k0 / kDrawQuarter;
  uint8_t* out = codes_at<F>(p, group);
  uint8_t* scale_out = p.scale + group / kLanes;
  int left = k0 < p.kp
                 ? static_cast<int>(min(p.rows - row, static_cast<int64_t>(ColumnPlace<T>::kStep *
                                                                           ColumnPlace<T>::kSteps)))
                 : 0;
#pragma unroll 1
  for (int step = 0; step < ColumnPlace<T>::kSteps; ++step) {
    ColumnPair<T> x;
    x.read(tile, place.k, place.column + step * ColumnPlace<T>::kStep);
    Packed8 codes[2];
    BlockScale s[2];
    if constexpr (kPath == Path::kPairs) {
      quantize_column_pairs(x.w, scales, s, codes);
    } else {
      Philox4 draws[2] = {};
      const int64_t both[2] = {quarter, quarter + quarters_per_row};
      draw_groups<2>(key, both, draws);
      // The maxima of both columns at once, where nothing has touched the elements.
      constexpr bool kWords = std::is_same<typename T::Source, Bfloat16Source>::value;
      uint32_t raw_max[2] = {};
      if constexpr (kWords) {
        if (!rotation.lanes) {
          uint32_t unused[8];
          const uint32_t m2 = block_amax2<F>(abs_amax2(x.w, unused));
          raw_max[0] = m2 << 16;
          raw_max[1] = m2 & 0xFFFF0000u;
        }
      }
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float v[8], z[8] = {};
        x.widen(n, v);
        transform8(v, p, rotation, place.lane_k);
        uint32_t block_max =
            kWords && !rotation.lanes ? raw_max[n] : block_amax_bits<F>(amax_bits8(v));
        if (kPath == Path::kToward) {
          load_toward_column(p, row + n, k0, z);
          transform8(z, p, rotation, place.lane_k);
          const uint32_t toward_max = block_amax_bits<F>(amax_bits8(z));
          block_max = toward_max >= kInfBits ? toward_max : block_max;
        }
        s[n] = scales.choose(block_max);
        codes[n] = encode_group<F, kPath == Path::kToward>(v, z, s[n], p, draws[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      if (n >= left) continue;
      store_codes<F>(out + n * row_bytes, codes[n]);
      if (!writes_scale) continue;
      uint8_t* at = p.swizzled ? scale_at<F>(p, row + n, k0) : scale_out + n * row_blocks;
      *at = static_cast<uint8_t>(s[n].code);
    }
    left -= ColumnPlace<T>::kStep;
    row += ColumnPlace<T>::kStep;
    quarter += ColumnPlace<T>::kStep * quarters_per_row;
    out += ColumnPlace<T>::kStep * row_bytes;
    scale_out += ColumnPlace<T>::kStep * row_blocks;
  }
}

// The row half: operand rows are rows of the tile.
template <class T, class F, Path kPath>
__device__ __forceinline__ void quantize_rows_of(const uint8_t* tile, const QuantizeParams& p,
                                                 int64_t row_base, int64_t k_base) {
  constexpr int N = 2;  // groups a thread works on at once
  constexpr int kGroupsPerRow = TileTraits::kChunks * T::kPerChunk / 8;
  constexpr int kRowStep = TileTraits::kThreads / kGroupsPerRow,
                kSteps = TileTraits::kTileK / kRowStep;
  constexpr int kLanes = F::kBlock / 8;
  static_assert(kSteps % N == 0 && kGroupsPerRow >= kLanes, "a tile's row holds whole blocks");
  static_assert(F::kBlock % kDrawGroup == 0, "groups number the quarters of draws too");
  const int lane_in_row = threadIdx.x % kGroupsPerRow, column = lane_in_row * 8;
  const Rotation rotation = make_rotation(p.hadamard, p.signs, lane_in_row);
  const DrawKey key = make_draw_key(p);
  const ScaleChooser<F> scales(p);
  const int64_t k0 = k_base + column, groups_per_row = p.kp / 8;
  int r = threadIdx.x / kGroupsPerRow;
  int64_t group = (row_base + r) * groups_per_row + k0 / 8;
#pragma unroll 1
  for (int step = 0; step < kSteps; step += N) {
    Philox4 draws[N] = {};
    const int64_t both[N] = {group, group + kRowStep * groups_per_row};
    draw_groups<N>(key, both, draws);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Packed8 codes;
      BlockScale s;
      if constexpr (kPath == Path::kPairs) {
        const uint4 raw =
            *reinterpret_cast<const uint4*>(tile + chunk_offset(r, column / T::kPerChunk));
        const uint32_t w[4] = {raw.x, raw.y, raw.z, raw.w};
        codes = quantize_row_pairs(w, scales, s);
      } else {
        float v[8], unused[8] = {};
        read_row8<T>(tile, r, column, v);
        transform8(v, p, rotation, lane_in_row);
        s = scales.choose(block_amax_bits<F>(amax_bits8(v)));
        codes = encode_group<F, false>(v, unused, s, p, draws[n]);
      }
      const int64_t row = row_base + r, at = group;
      r += kRowStep;
      group += kRowStep * groups_per_row;
      if (row >= p.rows || k0 >= p.kp) continue;
      store_codes<F>(codes_at<F>(p, at), codes);
      if (lane_in_row % kLanes == 0)
        *(p.swizzled ? scale_at<F>(p, row, k0) : p.scale + at / kLanes) =
            static_cast<uint8_t>(s.code);
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

template <class T, class F, Path kPath>
__global__ void __launch_bounds__(TileTraits::kThreads, TileTraits::kCtas)
    quantize_columns_kernel(const QuantizeParams p, int64_t tiles_across, bool vector) {
  __shared__ __align__(128) uint8_t tile[TileTraits::kBytes];
  const TilePlace at = tile_place<T>(tiles_across);
  load_tile<T>(p, at, vector, tile);
  quantize_columns_of<T, F, kPath>(tile, p, at.k_base, at.r_base);
}

template <class T, class F, Path kRow, Path kCol>
__global__ void __launch_bounds__(TileTraits::kThreads)
    quantize_dual_kernel(const QuantizeParams row, const QuantizeParams col, int64_t tiles_across,
                         bool vector) {
  __shared__ __align__(128) uint8_t tile[TileTraits::kBytes];
  const TilePlace at = tile_place<T>(tiles_across);
  load_tile<T>(col, at, vector, tile);
  quantize_rows_of<T, F, kRow>(tile, row, at.k_base, at.r_base);
  quantize_columns_of<T, F, kCol>(tile, col, at.k_base, at.r_base);
}

// nvfp4: the operand's largest finite |v| after the transforms, as float bits, into *p.tensor_scale
// (zeroed before).
template <class T>
__global__ void __launch_bounds__(TileTraits::kThreads)
    amax_columns_kernel(const QuantizeParams p, int64_t tiles_across, bool vector) {
  __shared__ __align__(128) uint8_t tile[TileTraits::kBytes];
  const TilePlace at = tile_place<T>(tiles_across);
  load_tile<T>(p, at, vector, tile);
  const ColumnPlace<T> place(p.hadamard);
  const Rotation rotation = make_rotation(p.hadamard, p.signs, place.lane_k);
  uint32_t m = 0;
  for (int step = 0; step < ColumnPlace<T>::kSteps; ++step) {
    ColumnPair<T> x;
    x.read(tile, place.k, place.column + step * ColumnPlace<T>::kStep);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float v[8];
      x.widen(n, v);
      transform8(v, p, rotation, place.lane_k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t a = float_bits(v[i]) & ~kSignBit;
        m = a < kInfBits ? max(m, a) : m;
      }
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
  const cudaError_t error = launch(amax_columns_kernel<T>, grid.ctas, TileTraits::kThreads, stream,
                                   p, grid.across, vector_copies<T>(p));
  return error == cudaSuccess ? launch_finish_tensor_scale(p, stream) : error;
}

template <class T, class F>
static cudaError_t launch_columns(const QuantizeParams& p, cudaStream_t stream) {
  const TileGrid grid = tile_grid<T>(p);
  const bool vector = vector_copies<T>(p);
  const cudaError_t error = find_column_scale<T, F>(p, stream);
  if (error != cudaSuccess) return error;
  const Path path = choose_path<typename T::Source, F>(p);
  if constexpr (kHasPairs<typename T::Source, F>) {
    if (path == Path::kPairs) {
      return launch(quantize_columns_kernel<T, F, Path::kPairs>, grid.ctas, TileTraits::kThreads,
                    stream, p, grid.across, vector);
    }
  }
  if constexpr (!T::kPacked) {
    if (path == Path::kToward) {
      return launch(quantize_columns_kernel<T, F, Path::kToward>, grid.ctas, TileTraits::kThreads,
                    stream, p, grid.across, vector);
    }
  }
  return launch(quantize_columns_kernel<T, F, Path::kFloats>, grid.ctas, TileTraits::kThreads,
                stream, p, grid.across, vector);
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
