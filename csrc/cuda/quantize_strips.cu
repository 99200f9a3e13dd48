// SPDX-License-Identifier: Apache-2.0
// quantize (either axis), quantize_dual and requantize where strip.cuh serves: bfloat16 (or mxfp4
// operands) to mxfp4, stochastic or rotated, and quantize_dual nearest. Every warp works for
// itself, on a tile of x of its own in shared memory, 64 x 64, so that no barrier stops it: first
// the blocks along its rows, then those along its columns, 32 blocks at a time or 64. A CTA has all
// warps of a multiprocessor. They share its tiles, every gridDim.x-th, and each takes the next one
// when it needs it: a scheduler prefers some warps to others, so by equal shares some would be done
// long before others. The next tile is copied when the last blocks of one are in registers and few
// enough to leave room for what the copy needs: of two operands the one that is not rotated is
// last.
#include <algorithm>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/strip_copy.cuh"

namespace mxtrain::cuda {

// ---- device helpers ----

// What a CTA has beside its tiles.
struct StripStatic {
  StripSigns row_signs, col_signs;
  uint32_t taken;                          // how many of its tiles have been begun
  uint32_t next[StripTraits::kMostWarps];  // a warp's next one, which takes no register there
};

// What follows from it is uniform control flow.
__device__ __forceinline__ uint32_t uniform_warp() { return uniform(threadIdx.x / 32); }

// Where the tiles begin in dynamic shared memory, of which launch_strips asks for this much more.
constexpr uint32_t kTileAlignment = 1024;
__device__ __forceinline__ uint32_t first_tile(const uint8_t* tiles) {
  return (ptx::shared_address(tiles) + kTileAlignment - 1) / kTileAlignment * kTileAlignment;
}

// Whether all of a tile is of the operand, and its scales lie row by row.
__device__ __forceinline__ bool is_whole(const StripPlan& plan, uint32_t row, uint32_t k) {
  return row + StripTraits::kTile <= plan.plain_rows && k + StripTraits::kTile <= plan.kp;
}

// ---- kernels ----

// Warps of a CTA on an architecture: as many as there is shared memory for, and as registers allow
// without spilling.
constexpr int strip_warps(Strip row, int arch) {
  return arch == 90 && row != Strip::kRotated64Nearest            ? StripTraits::kMostWarps
         : arch == 80 || arch == 90 || arch == 100 || arch == 103 ? 20
                                                                  : 12;
}
// Whether the engine's uniform registers are left.
constexpr bool engine_fits(Strip row, Strip col) {
  return !rotates64(row) || rotates64(col) || col == Strip::kNone;
}
constexpr int requantize_ctas(Strip col) { return rotates64(col) ? 4 : 5; }

// Either may be kNone. kRuns: col.runs is written.
template <Strip kRow, Strip kCol, bool kFlat, bool kRuns>
__global__ void __launch_bounds__(strip_warps(kRow, kCodeArch) * 32, 1)
    quantize_strips_kernel(const QuantizeParams row, const QuantizeParams col,
                           const StripPlan row_plan, const StripPlan col_plan, const StripGrid grid,
                           const __grid_constant__ TensorMap map) {
  MXT_DYNAMIC_SHARED(tiles, 1024);
  __shared__ StripStatic fixed;
  StripSigns &row_signs = fixed.row_signs, &col_signs = fixed.col_signs;
  const uint32_t warp = uniform_warp();
  const StripCopy<kFlat, engine_fits(kRow, kCol) && strip_engine(kCodeArch)> copy = {
      grid, map, first_tile(tiles) + warp * CodeLayout::kPitch};
  if (threadIdx.x == 0) fixed.taken = blockDim.x / 32;
  if (ptx::lane_id() == 0) copy.init();
  begin_early();
  fill_signs<kRow>(row_signs.word, row);
  fill_signs<kCol>(col_signs.word, col);
  PhiloxSchedule row_keys = {}, col_keys = {};
  if (draws_bits(kRow)) row_keys = uniform_schedule(row);
  if (draws_bits(kCol)) col_keys = uniform_schedule(col);
  if (draws_bits(kRow) && draws_bits(kCol)) {  // one seed: they share registers
    const uint32_t first = col_keys.first;
    col_keys = row_keys;
    col_keys.first = first;
  }
  const StripOperand row_operand = {row_plan, row_keys, row_signs.word},
                     col_operand = {col_plan, col_keys, col_signs.word};
  __syncthreads();
  // Twice the tile's number, and the parity of how many the warp has had.
  uint32_t turn = 2 * (blockIdx.x + gridDim.x * warp);
  if (turn / 2 < grid.tiles) copy.start(turn / 2);
  while (turn / 2 < grid.tiles) {
    const StripPlace<kFlat> at(grid, turn / 2);
    if (ptx::lane_id() == 0)
      fixed.next[threadIdx.x / 32] =
          2 * (blockIdx.x + gridDim.x * atomicAdd(&fixed.taken, 1u)) + (turn & 1 ^ 1);
    const auto copy_next = [&] {
      __syncwarp();
      turn = uniform(fixed.next[threadIdx.x / 32]);
      if (turn / 2 < grid.tiles) copy.start(turn / 2);
    };
    copy.wait(turn & 1);
    const auto columns = [&](auto last) {
      const bool whole = is_whole(col_plan, at.column, at.row);
      const uint32_t lane = ptx::lane_id();
#pragma unroll 1
      for (int pass = 0; pass < column_passes(kCol); ++pass)
        column_pass<kCol, kRuns>(copy.to, pass, lane, col, col_operand, at.column, at.row, whole,
                                 [&] {
                                   if (last && pass == column_passes(kCol) - 1) copy_next();
                                 });
    };
    const auto rows = [&](auto last) {
      const bool whole = is_whole(row_plan, at.row, at.column);
      const uint32_t lane = ptx::lane_id();
#pragma unroll 1
      for (int pass = 0; pass < row_passes(kRow); ++pass)
        row_pass<kRow>(copy.to, pass, lane, row, row_operand, at.row, at.column, whole, [&] {
          if (last && pass == row_passes(kRow) - 1) copy_next();
        });
    };
    constexpr bool kRowsLast =
        kCol == Strip::kNone || (kRow != Strip::kNone && (rotates64(kCol) || !rotates64(kRow)));
    if constexpr (kCol != Strip::kNone && kRowsLast) columns(std::false_type());
    if constexpr (kRow != Strip::kNone) rows(std::bool_constant<kRowsLast>());
    if constexpr (!kRowsLast) columns(std::true_type());
  }
}

// The packed tile that requantize reads: 32 bytes of codes and two scales of a row. Lane 2 i + b
// takes block b of rows i, i + 16, ...: its copies to shared memory run ahead of their decoding;
// the scales wait in registers.
struct PackedStrips {
  static constexpr int kBytes = StripTraits::kTile * StripTraits::kTile / 2;
  uint32_t scale[StripTraits::kPasses];

  __device__ __forceinline__ void copy(const QuantizeParams& p, const StripGrid& g, uint32_t tile,
                                       uint8_t* to) {
    const StripPlace<false> at(g, tile);
    const int lane = threadIdx.x % 32;
    const uint32_t block = at.column / 32 + lane % 2, blocks = static_cast<uint32_t>(p.in_blocks);
#pragma unroll
    for (int i = 0; i < StripTraits::kPasses; ++i) {
      const uint32_t row = at.row + i * StripTraits::kPassRows + lane / 2;
      const bool inside = tile < g.tiles && row < g.height && block < blocks;
      const uint64_t from = inside ? static_cast<uint64_t>(row) * blocks + block : 0;
      ptx::cp_async_16(ptx::shared_address(to + (i * 32 + lane) * 16), g.x + from * 16,
                       inside ? 16 : 0);
      scale[i] = inside ? p.in_scale[from] : 0u;
    }
  }

  __device__ __forceinline__ void decode(const uint8_t* from, uint8_t* tile) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < StripTraits::kPasses; ++i) {
      const uint4 raw = *reinterpret_cast<const uint4*>(from + (i * 32 + lane) * 16);
      const uint32_t codes[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t w[4];
        decode8_e2m1<false>(codes[j], scale[i], w);
        const int r = i * StripTraits::kPassRows + lane / 2;
        *reinterpret_cast<uint4*>(tile + strip_offset(r, 4 * (lane % 2) + j)) =
            make_uint4(w[0], w[1], w[2], w[3]);
      }
    }
  }
};

template <Strip kCol>
__global__ void __launch_bounds__(StripTraits::kThreads, requantize_ctas(kCol))
    requantize_strips_kernel(const QuantizeParams p, const StripGrid grid) {
  __shared__ __align__(128) uint8_t tiles[StripTraits::kWarps][CodeLayout::kBytes];
  __shared__ __align__(128) uint8_t packed[StripTraits::kWarps][PackedStrips::kBytes];
  __shared__ StripTables tables;
  begin_early();
  fill_tables<kCol>(tables, p);
  __syncthreads();
  const uint32_t warp = uniform_warp(), step = gridDim.x * StripTraits::kWarps;
  uint32_t tile = blockIdx.x * StripTraits::kWarps + warp;
  PackedStrips next;
  next.copy(p, grid, tile, packed[warp]);
  for (; tile < grid.tiles; tile += step) {
    ptx::cp_async_wait_all();
    __syncwarp();
    next.decode(packed[warp], tiles[warp]);
    __syncwarp();
    next.copy(p, grid, tile + step, packed[warp]);
    const StripPlace<false> at(grid, tile);
#pragma unroll 1
    for (int pass = 0; pass < column_passes(kCol); ++pass)
      column_pass<kCol, false>(ptx::shared_address(tiles[warp]), pass, ptx::lane_id(), p, tables,
                               at.column, at.row, false, [] {});
    __syncwarp();
  }
}

// ---- launchers ----

static Strip strip_of(const QuantizeParams& p) {
  const bool stochastic = p.rounding == static_cast<int>(Rounding::kStochastic);
  if (p.hadamard == 64) return stochastic ? Strip::kRotated64Stochastic : Strip::kRotated64Nearest;
  if (p.hadamard) return stochastic ? Strip::kRotatedStochastic : Strip::kRotatedNearest;
  return stochastic ? Strip::kStochastic : Strip::kNone;
}

static bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

static bool fits_strips(const QuantizeParams& p) {
  constexpr int64_t kMost = 0x7FFFFFFF;
  return p.format == kMxfp4Code && !p.toward && p.hadamard <= StripTraits::kTile &&
         p.rows < kMost && p.kp < kMost && p.rows * (p.kp / 32) < 2 * kMost;
}

static bool has_strips(const QuantizeParams& p) {
  return fits_strips(p) && strip_of(p) != Strip::kNone;
}

// x with `pitch` between its contiguous rows, which do not overlap.
static bool can_copy_tiles(const QuantizeParams& p, int64_t stride, int64_t pitch, int64_t height,
                           int64_t width) {
  return p.in_format < 0 && p.x_type == FloatType::kBfloat16 && stride == 1 && aligned16(p.x) &&
         (height == 1 || (pitch % 8 == 0 && pitch >= width && pitch < 0x3FFFFFFF));
}

bool can_strip_rows(const QuantizeParams& p) {
  return has_strips(p) && can_copy_tiles(p, p.stride_k, p.stride_row, p.rows, p.cols);
}

bool can_strip_columns(const QuantizeParams& p) {
  if (p.in_format >= 0)
    return has_strips(p) && p.in_format == kMxfp4Code && aligned16(p.x) &&
           p.in_row_bytes == p.in_blocks * 16;
  return has_strips(p) && can_copy_tiles(p, p.stride_row, p.stride_k, p.cols, p.rows);
}

static StripGrid make_grid(const void* x, int64_t height, int64_t width, int64_t pitch,
                           int64_t padded_height, int64_t padded_width) {
  constexpr int64_t kTile = StripTraits::kTile;
  const int64_t across = (padded_width + kTile - 1) / kTile,
                down = (padded_height + kTile - 1) / kTile;
  const auto narrow = [](int64_t n) { return static_cast<uint32_t>(n); };
  return {static_cast<const uint8_t*>(x),      narrow(height),        narrow(width),
          narrow(height == 1 ? 0 : pitch * 2), narrow(across * down), Divisor::of(across)};
}

// As many CTAs as fit the GPU, and no more than there are tiles for their warps.
static cudaError_t resident_ctas(const StripGrid& g, int per_sm, unsigned* ctas) {
  int sms = 0;
  const cudaError_t error = count_multiprocessors(&sms);
  const unsigned most = static_cast<unsigned>(sms * per_sm);
  const unsigned wanted = (g.tiles + StripTraits::kWarps - 1) / StripTraits::kWarps;
  *ctas = wanted < most ? wanted : most;
  return error;
}

static uint32_t strip_pitch(int arch) {
  return strip_engine(arch) ? StripLayout<90>::kPitch : StripLayout<80>::kPitch;
}

// A CTA a multiprocessor, and no more warps of each than shared memory has room for tiles, or than
// there are tiles.
static cudaError_t share_tiles(const StripGrid& g, Strip row, int arch, unsigned* ctas,
                               unsigned* warps) {
  int device = 0, sms = 0, shared = 0;
  cudaError_t error = count_multiprocessors(&sms);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int room = (shared - static_cast<int>(sizeof(StripStatic) + kTileAlignment)) /
                   static_cast<int>(strip_pitch(arch));
  *ctas = std::min(g.tiles, static_cast<uint32_t>(sms));
  *warps = std::min((g.tiles + *ctas - 1) / *ctas,
                    static_cast<uint32_t>(std::min(room, strip_warps(row, arch))));
  return cudaSuccess;
}

template <Strip kRow, Strip kCol, bool kFlat = false, bool kRuns = false>
static cudaError_t launch_strips(const QuantizeParams& row, const QuantizeParams& col,
                                 const StripGrid& grid, cudaStream_t stream) {
  int arch = 0;
  unsigned ctas = 0, warps = 0;
  TensorMap map = {};
  cudaError_t error = device_arch(&arch);
  if (error == cudaSuccess) error = share_tiles(grid, kRow, arch, &ctas, &warps);
  if (error == cudaSuccess) error = make_strip_map(&map, grid, arch);
  if (error != cudaSuccess) return error;
  return launch_early(quantize_strips_kernel<kRow, kCol, kFlat, kRuns>, ctas, warps * 32,
                      static_cast<int>(warps * strip_pitch(arch) + kTileAlignment), stream, row,
                      col, make_plan<kRow>(row), make_plan<kCol>(col), grid, map);
}

template <bool kFlat>
static cudaError_t launch_row_strip(const QuantizeParams& p, cudaStream_t stream) {
  const StripGrid grid = make_grid(p.x, p.rows, p.cols, p.stride_row, p.rows, p.kp);
  switch (strip_of(p)) {
    case Strip::kStochastic:
      return launch_strips<Strip::kStochastic, Strip::kNone, kFlat>(p, p, grid, stream);
    case Strip::kRotatedStochastic:
      return launch_strips<Strip::kRotatedStochastic, Strip::kNone, kFlat>(p, p, grid, stream);
    case Strip::kRotatedNearest:
      return launch_strips<Strip::kRotatedNearest, Strip::kNone, kFlat>(p, p, grid, stream);
    case Strip::kRotated64Stochastic:
      return launch_strips<Strip::kRotated64Stochastic, Strip::kNone, kFlat>(p, p, grid, stream);
    case Strip::kRotated64Nearest:
      return launch_strips<Strip::kRotated64Nearest, Strip::kNone, kFlat>(p, p, grid, stream);
    case Strip::kNone:
    case Strip::kPairs:
      break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_row_strips(const QuantizeParams& given, cudaStream_t stream) {
  QuantizeParams p = given;
  const bool flat = p.stride_row == p.cols && p.cols % StripTraits::kTile == 0 && !p.swizzled;
  if (!flat) return launch_row_strip<false>(p, stream);
  p.rows *= p.cols / StripTraits::kTile;
  p.cols = p.kp = p.stride_row = StripTraits::kTile;
  return launch_row_strip<true>(p, stream);
}

template <Strip kCol>
static cudaError_t launch_requantize_strips(const QuantizeParams& p, cudaStream_t stream) {
  const StripGrid grid = make_grid(p.x, p.cols, p.rows, 0, p.kp, p.rows);
  unsigned ctas = 0;
  const cudaError_t error = resident_ctas(grid, requantize_ctas(kCol), &ctas);
  if (error != cudaSuccess) return error;
  return launch_early(requantize_strips_kernel<kCol>, ctas, StripTraits::kThreads, 0, stream, p,
                      grid);
}

template <Strip kCol>
static cudaError_t launch_column_strip(const QuantizeParams& p, cudaStream_t stream) {
  if (p.in_format >= 0) {
    if constexpr (kCol == Strip::kStochastic)
      return launch_requantize_codes(p, stream);
    else
      return launch_requantize_strips<kCol>(p, stream);
  }
  const StripGrid grid = make_grid(p.x, p.cols, p.rows, p.stride_k, p.kp, p.rows);
  return launch_strips<Strip::kNone, kCol>(p, p, grid, stream);
}

cudaError_t launch_column_strips(const QuantizeParams& p, cudaStream_t stream) {
  switch (strip_of(p)) {
    case Strip::kStochastic:
      return launch_column_strip<Strip::kStochastic>(p, stream);
    case Strip::kRotatedStochastic:
      return launch_column_strip<Strip::kRotatedStochastic>(p, stream);
    case Strip::kRotatedNearest:
      return launch_column_strip<Strip::kRotatedNearest>(p, stream);
    case Strip::kRotated64Stochastic:
      return launch_column_strip<Strip::kRotated64Stochastic>(p, stream);
    case Strip::kRotated64Nearest:
      return launch_column_strip<Strip::kRotated64Nearest>(p, stream);
    case Strip::kNone:
    case Strip::kPairs:
      break;
  }
  return cudaErrorInvalidValue;
}

// Both operands nearest, two elements a word.
static bool can_pair_dual(const QuantizeParams& row, const QuantizeParams& col) {
  const auto pairs = [](const QuantizeParams& p) {
    return fits_strips(p) && choose_path<Bfloat16Source, Mxfp4>(p) == Path::kPairs;
  };
  return pairs(row) && pairs(col) &&
         can_copy_tiles(row, row.stride_k, row.stride_row, row.rows, row.cols);
}

bool can_strip_dual(const QuantizeParams& row, const QuantizeParams& col) {
  const auto stochastic = [](const QuantizeParams& p) {
    return p.rounding == static_cast<int>(Rounding::kStochastic);
  };
  return can_pair_dual(row, col) ||
         (can_strip_rows(row) && can_strip_columns(col) && stochastic(row) && stochastic(col) &&
          row.rng == col.rng && row.rng_stride == col.rng_stride);
}

bool can_sum_runs(const QuantizeParams& row, const QuantizeParams& col) {
  return can_pair_dual(row, col) || (can_strip_dual(row, col) && !row.hadamard && !col.hadamard);
}

template <Strip kRow>
static cudaError_t launch_dual_strip(const QuantizeParams& row, const QuantizeParams& col,
                                     const StripGrid& grid, cudaStream_t stream) {
  switch (strip_of(col)) {
    case Strip::kStochastic:
      return launch_strips<kRow, Strip::kStochastic>(row, col, grid, stream);
    case Strip::kRotatedStochastic:
      return launch_strips<kRow, Strip::kRotatedStochastic>(row, col, grid, stream);
    case Strip::kRotated64Stochastic:
      return launch_strips<kRow, Strip::kRotated64Stochastic>(row, col, grid, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t launch_dual_strips(const QuantizeParams& row, const QuantizeParams& col,
                               cudaStream_t stream) {
  const StripGrid grid = make_grid(row.x, row.rows, row.cols, row.stride_row, col.kp, row.kp);
  const bool pairs = can_pair_dual(row, col);
  if (col.runs && pairs)
    return launch_strips<Strip::kPairs, Strip::kPairs, false, true>(row, col, grid, stream);
  if (col.runs)
    return launch_strips<Strip::kStochastic, Strip::kStochastic, false, true>(row, col, grid,
                                                                              stream);
  if (pairs) return launch_strips<Strip::kPairs, Strip::kPairs>(row, col, grid, stream);
  switch (strip_of(row)) {
    case Strip::kStochastic:
      return launch_dual_strip<Strip::kStochastic>(row, col, grid, stream);
    case Strip::kRotatedStochastic:
      return launch_dual_strip<Strip::kRotatedStochastic>(row, col, grid, stream);
    case Strip::kRotated64Stochastic:
      return launch_dual_strip<Strip::kRotated64Stochastic>(row, col, grid, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace mxtrain::cuda
