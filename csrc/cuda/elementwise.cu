// SPDX-License-Identifier: Apache-2.0
// hadamard:          out = (x * signs) H_g / sqrt(g) on consecutive groups of g, float32 inside,
// x's type outside. stochastic_round:  float32 to bfloat16, E4M3 or E5M2 with one 16-bit draw an
// element; finite stays finite, Inf stays (NaN for E4M3). swizzle:           block scales [rows,
// cols] to the 128x4 tile layout and back; padding bytes 0. A thread takes groups of 8 consecutive
// elements (swizzle: 64 bytes); grid.x covers them all.
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/store.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct ElementwiseTraits {
  static constexpr int kThreads = 256;
  static constexpr int kGroups = 4;  // of 8 elements, per thread
  static constexpr int kPerCta = kThreads * kGroups;
};

static unsigned grid_for(int64_t items, int64_t per_cta) {
  return static_cast<unsigned>((items + per_cta - 1) / per_cta);
}

// ---- hadamard ----

template <class Source, FloatType kType>
__global__ void __launch_bounds__(ElementwiseTraits::kThreads)
    hadamard_kernel(const HadamardParams p, int64_t groups, bool vector) {
  constexpr int N = ElementwiseTraits::kGroups;
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * ElementwiseTraits::kPerCta + threadIdx.x;
  const Rotation rotation = make_rotation(p.group, p.signs, lane);
  using Type = typename Source::Type;
  uint4 raw[N][Source::kVectors] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t group = first + n * ElementwiseTraits::kThreads;
    if (group >= groups) continue;
    const Type* from = static_cast<const Type*>(p.x) + group * 8;
    if (vector)
#pragma unroll
      for (int i = 0; i < Source::kVectors; ++i)
        raw[n][i] = ptx::ld_global_nc_v4(reinterpret_cast<const uint4*>(from) + i);
    else
      memcpy(raw[n], from, 8 * sizeof(Type));
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t group = first + n * ElementwiseTraits::kThreads;
    float v[8];
    Source::unpack(raw[n], v);
    rotate8(v, rotation, p.norm, lane);
    if (group < groups) store_floats8<kType>(p.out, group * 8, v, vector, 8);
  }
}

cudaError_t launch_hadamard(const HadamardParams& p, cudaStream_t stream) {
  if (p.n == 0) return cudaSuccess;
  const int64_t groups = p.n / 8;
  const unsigned grid = grid_for(groups, ElementwiseTraits::kPerCta);
  const bool vector =
      reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  switch (p.type) {
    case FloatType::kFloat32:
      return launch(hadamard_kernel<Float32Source, FloatType::kFloat32>, grid,
                    ElementwiseTraits::kThreads, stream, p, groups, vector);
    case FloatType::kBfloat16:
      return launch(hadamard_kernel<Bfloat16Source, FloatType::kBfloat16>, grid,
                    ElementwiseTraits::kThreads, stream, p, groups, vector);
    case FloatType::kFloat16:
      return launch(hadamard_kernel<Float16Source, FloatType::kFloat16>, grid,
                    ElementwiseTraits::kThreads, stream, p, groups, vector);
  }
  return cudaErrorInvalidValue;
}

// ---- stochastic_round ----

__device__ __forceinline__ uint32_t round_element(float v, uint32_t draw, RoundTarget target) {
  if (target == RoundTarget::kBfloat16) return float_to_bf16_stochastic(v, draw);
  const uint32_t b = float_bits(v), magnitude = b & ~kSignBit;
  if (magnitude > kInfBits) return 0x7Fu;
  const bool e4m3 = target == RoundTarget::kE4M3;
  if (magnitude == kInfBits)
    return ((b >> 24) & 0x80u) | (e4m3 ? E4M3::kMaxCode + 1 : E5M2::kMaxCode + 1);
  return e4m3 ? encode_stochastic<E4M3>(v, draw) : encode_stochastic<E5M2>(v, draw);
}

__global__ void __launch_bounds__(ElementwiseTraits::kThreads)
    stochastic_round_kernel(const StochasticRoundParams p, bool vector) {
  const int64_t group =
      static_cast<int64_t>(blockIdx.x) * ElementwiseTraits::kThreads + threadIdx.x;
  const int64_t i0 = group * kDrawQuarter;
  if (i0 >= p.n) return;
  const PhiloxKey key = {static_cast<uint64_t>(p.rng[0]),
                         static_cast<uint32_t>(p.rng[p.rng_stride]), kRowStream};
  const bool whole = vector && i0 + 8 <= p.n;
  float v[8];
  uint32_t codes[8];
  if (whole) {
    uint4 raw[2] = {ptx::ld_global_nc_v4(p.x + i0), ptx::ld_global_nc_v4(p.x + i0 + 4)};
    Float32Source::unpack(raw, v);
  } else {
    for (int i = 0; i < 8; ++i) v[i] = i0 + i < p.n ? p.x[i0 + i] : 0.0f;
  }
  const Philox4 draws = philox_quarter(key, static_cast<uint64_t>(group));
#pragma unroll
  for (int i = 0; i < 8; ++i) codes[i] = round_element(v[i], draw16(draws, i), p.target);
  if (p.target == RoundTarget::kBfloat16) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + i0;
    if (whole)
      *reinterpret_cast<uint4*>(out) =
          make_uint4(codes[0] | (codes[1] << 16), codes[2] | (codes[3] << 16),
                     codes[4] | (codes[5] << 16), codes[6] | (codes[7] << 16));
    else
      for (int i = 0; i < 8 && i0 + i < p.n; ++i) out[i] = static_cast<uint16_t>(codes[i]);
    return;
  }
  uint8_t* out = static_cast<uint8_t*>(p.out) + i0;
  if (whole)
    *reinterpret_cast<uint2*>(out) =
        make_uint2(codes[0] | (codes[1] << 8) | (codes[2] << 16) | (codes[3] << 24),
                   codes[4] | (codes[5] << 8) | (codes[6] << 16) | (codes[7] << 24));
  else
    for (int i = 0; i < 8 && i0 + i < p.n; ++i) out[i] = static_cast<uint8_t>(codes[i]);
}

cudaError_t launch_stochastic_round(const StochasticRoundParams& p, cudaStream_t stream) {
  if (p.n == 0) return cudaSuccess;
  const bool vector =
      reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  const unsigned grid = grid_for(p.n, ElementwiseTraits::kThreads * kDrawQuarter);
  return launch(stochastic_round_kernel, grid, ElementwiseTraits::kThreads, stream, p, vector);
}

// ---- epilogue ----

template <FloatType kType>
__global__ void __launch_bounds__(ElementwiseTraits::kThreads)
    epilogue_kernel(const EpilogueParams p, int64_t groups, bool vector) {
  const int64_t group =
      static_cast<int64_t>(blockIdx.x) * ElementwiseTraits::kThreads + threadIdx.x;
  if (group >= groups) return;
  const int64_t i0 = group * 8, n = p.rows * p.cols;
  const float a = p.a_scale ? *p.a_scale : 1.0f, b = p.b_scale ? *p.b_scale : 1.0f;
  float v[8];
  if (i0 + 8 <= n) {  // acc is 16-byte aligned, as all that torch allocates
    const uint4 raw[2] = {ptx::ld_global_nc_v4(p.acc + i0), ptx::ld_global_nc_v4(p.acc + i0 + 4)};
    Float32Source::unpack(raw, v);
  } else {
    for (int i = 0; i < 8; ++i) v[i] = i0 + i < n ? p.acc[i0 + i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    v[i] = v[i] * a * b * p.alpha;
    if (p.bias && i0 + i < n) v[i] += load_any(p.bias, p.bias_type, (i0 + i) % p.cols);
    if (p.add && i0 + i < n) v[i] += static_cast<const float*>(p.out)[i0 + i];
  }
  store_floats8<kType>(p.out, i0, v, vector && i0 + 8 <= n,
                       static_cast<int>(min(n - i0, static_cast<int64_t>(8))));
}

cudaError_t launch_epilogue(const EpilogueParams& p, cudaStream_t stream) {
  const int64_t groups = (p.rows * p.cols + 7) / 8;
  if (groups == 0) return cudaSuccess;
  const unsigned grid = grid_for(groups, ElementwiseTraits::kThreads);
  const bool vector = reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  switch (p.out_type) {
    case FloatType::kFloat32:
      return launch(epilogue_kernel<FloatType::kFloat32>, grid, ElementwiseTraits::kThreads, stream,
                    p, groups, vector);
    case FloatType::kBfloat16:
      return launch(epilogue_kernel<FloatType::kBfloat16>, grid, ElementwiseTraits::kThreads,
                    stream, p, groups, vector);
    case FloatType::kFloat16:
      return launch(epilogue_kernel<FloatType::kFloat16>, grid, ElementwiseTraits::kThreads, stream,
                    p, groups, vector);
  }
  return cudaErrorInvalidValue;
}

// ---- swizzle ----

// A thread takes 16 columns of rows r, r + 32, r + 64 and r + 96 of a row of tiles: 16 bytes of
// each row, and 16 bytes of each of 4 tiles. A warp takes 4 such pieces of 8 rows, so that it
// touches 64 bytes of a row and 128 of a tile.
struct SwizzleTraits {
  static constexpr int kTiles = 4, kColumns = kTiles * kTileCols;
  static constexpr int kAcross = 4, kDown = 32 / kAcross;  // lanes of a warp
  static constexpr int kWarpsDown = 32 / kDown;
  static_assert(kColumns == 16 && kTileRows == 4 * 32, "16 bytes of 4 rows are 16 of 4 tiles");
};

// 16 bytes, or the first `valid` of them where they are not all there or not aligned.
__device__ __forceinline__ void load_bytes16(const uint8_t* from, bool vector, int valid,
                                             uint32_t (&w)[4]) {
  if (vector) {
    const uint4 v = ptx::ld_global_nc_v4(from);
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    return;
  }
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i < valid) w[i / 4] |= static_cast<uint32_t>(from[i]) << (8 * (i % 4));
}

__device__ __forceinline__ void store_bytes16(uint8_t* to, bool vector, int valid, uint32_t w0,
                                              uint32_t w1, uint32_t w2, uint32_t w3) {
  if (vector) {
    *reinterpret_cast<uint4*>(to) = make_uint4(w0, w1, w2, w3);
    return;
  }
  const uint32_t w[4] = {w0, w1, w2, w3};
#pragma unroll
  for (int i = 0; i < 16; ++i)
    if (i < valid) to[i] = static_cast<uint8_t>(w[i / 4] >> (8 * (i % 4)));
}

// rows_vector, tiles_vector: 16-byte accesses are aligned, and whole in a row.
template <bool kForward>
__global__ void __launch_bounds__(ElementwiseTraits::kThreads)
    swizzle_kernel(const SwizzleParams p, bool rows_vector, bool tiles_vector) {
  using T = SwizzleTraits;
  const int64_t col_tiles = tiles(p.cols, kTileCols);
  const int64_t across = tiles(p.cols, T::kColumns * T::kAcross);  // warps along a row
  const int64_t warp =
      (static_cast<int64_t>(blockIdx.x) * ElementwiseTraits::kThreads + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int r = static_cast<int>(warp % T::kWarpsDown) * T::kDown + lane / T::kAcross;
  const int64_t at = warp / T::kWarpsDown, tile_row = at / across;
  const int64_t column = (at % across * T::kAcross + lane % T::kAcross) * T::kColumns;
  if (tile_row >= tiles(p.rows, kTileRows) || column >= p.cols) return;
  const int valid = static_cast<int>(min(p.cols - column, static_cast<int64_t>(T::kColumns)));
  const int64_t row = tile_row * kTileRows + r, plain = row * p.cols + column;
  const int64_t tiled = (tile_row * col_tiles + column / kTileCols) * kTileBytes + r * 16;
  uint32_t w[4][4] = {};  // of row r + 32 i, tile j
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (kForward) {
      if (row + 32 * i < p.rows)
        load_bytes16(p.in + plain + 32 * i * p.cols, rows_vector, valid, w[i]);
    } else if (i * kTileCols < valid) {
      uint32_t t[4] = {};
      load_bytes16(p.in + tiled + i * kTileBytes, tiles_vector, 16, t);
#pragma unroll
      for (int j = 0; j < 4; ++j) w[j][i] = t[j];
    }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (kForward) {
      if (i * kTileCols < valid)
        store_bytes16(p.out + tiled + i * kTileBytes, tiles_vector, 16, w[0][i], w[1][i], w[2][i],
                      w[3][i]);
    } else if (row + 32 * i < p.rows) {
      store_bytes16(p.out + plain + 32 * i * p.cols, rows_vector, valid, w[i][0], w[i][1], w[i][2],
                    w[i][3]);
    }
}

cudaError_t launch_swizzle(const SwizzleParams& p, cudaStream_t stream) {
  using T = SwizzleTraits;
  const auto aligned = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 16 == 0; };
  const void *plain = p.forward ? p.in : p.out, *tiled = p.forward ? p.out : p.in;
  const int64_t threads =
      tiles(p.rows, kTileRows) * tiles(p.cols, T::kColumns * T::kAcross) * (T::kWarpsDown * 32);
  if (threads == 0) return cudaSuccess;
  return launch(p.forward ? swizzle_kernel<true> : swizzle_kernel<false>,
                grid_for(threads, ElementwiseTraits::kThreads), ElementwiseTraits::kThreads, stream,
                p, aligned(plain) && p.cols % T::kColumns == 0, aligned(tiled));
}

}  // namespace mxtrain::cuda
