// SPDX-License-Identifier: Apache-2.0
// quantize (either axis), quantize_dual and requantize where strip.cuh serves: bfloat16 (or mxfp4
// operands) to mxfp4, stochastic or rotated, and quantize_dual nearest. Every warp works for
// itself, on a tile of x of its own in shared memory, 64 x 64, so that no barrier stops it: first
// the blocks along its rows, then those along its columns, 32 blocks at a time or 64. A CTA has all
// warps of a multiprocessor. They share its tiles, every gridDim.x-th but for the last
// (strip_grid.cuh), and each takes the next one when it needs it: a scheduler prefers some warps to
// others, so by equal shares some would be done long before others. Scales go by strip_stages.cuh
// where x is made of whole squares. The next tile is copied when the last blocks of one are in
// registers and few enough to leave room for the copy's addresses. The copies are 16 bytes, so x
// must be aligned to that, in both directions.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/strip_grid.cuh"
#include "cuda/strip_stages.cuh"

namespace mxtrain::cuda {

// ---- device helpers ----

// Where a warp will be next, in shared memory: so it takes no registers while the warp works.
struct alignas(8) StripWarp {
  uint32_t tile, n;  // the CTA's n-th
};

// What a CTA has beside its tiles and stages.
struct StripStatic {
  StripSigns row_signs, col_signs;
  uint32_t taken;  // how many of its tiles have been begun
  StripWarp warps[StripTraits::kMostWarps];
  Stages::Barriers barriers;
};

// What follows from it is uniform control flow.
__device__ __forceinline__ uint32_t uniform_warp() { return uniform(threadIdx.x / 32); }

template <Strip kRow, Strip kCol>
__device__ __forceinline__ void make_schedules(const QuantizeParams& row, const QuantizeParams& col,
                                               PhiloxSchedule& row_keys, PhiloxSchedule& col_keys) {
  if (draws_bits(kRow)) row_keys = uniform_schedule(row);
  if (draws_bits(kCol)) col_keys = uniform_schedule(col);
  if (!draws_bits(kRow) || !draws_bits(kCol)) return;
  const uint32_t first = col_keys.first;  // one seed: they share registers
  col_keys = row_keys;
  col_keys.first = first;
}

// ---- kernels ----

// Warps of a CTA on an architecture: as many as there is shared memory for, and as registers allow
// without spilling. Two stochastic operands of 16384 x 8192 on 9.0 are no slower with 20 warps of
// 96 registers, and where memory bounds them faster.
constexpr int strip_warps(Strip row, Strip col, int arch) {
  const bool two = draws_bits(row) && draws_bits(col);
  return arch == 90 && row != Strip::kRotated64Nearest && !two    ? StripTraits::kMostWarps
         : arch == 80 || arch == 90 || arch == 100 || arch == 103 ? 20
                                                                  : 12;
}
constexpr int requantize_ctas(Strip col) { return rotates64(col) ? 4 : 5; }

// Either may be kNone. kRuns: col.runs is written.
template <Strip kRow, Strip kCol, bool kFlat, bool kRuns>
__global__ void __launch_bounds__(strip_warps(kRow, kCol, kCodeArch) * 32, 1)
    quantize_strips_kernel(const QuantizeParams row, const QuantizeParams col,
                           const StripPlan row_plan, const StripPlan col_plan,
                           const StripGrid grid) {
  MXT_DYNAMIC_SHARED(dynamic, 128);
  __shared__ StripStatic fixed;
  StripSigns &row_signs = fixed.row_signs, &col_signs = fixed.col_signs;
  if (threadIdx.x == 0) fixed.taken = blockDim.x / 32;
  begin_early();
  if (has_tickets(kRow) && grid.tickets && blockIdx.x == 0 && threadIdx.x == 0)
    atomicExch(grid.tickets, 0u);
  fill_signs<kRow, StripSide::kRows>(row_signs.word, row);
  fill_signs<kCol, StripSide::kColumns>(col_signs.word, col);
  PhiloxSchedule row_keys = {}, col_keys = {};
  make_schedules<kRow, kCol>(row, col, row_keys, col_keys);
  constexpr bool kStaged = kCol != Strip::kNone && !kFlat && has_stages(kCodeArch);
  const uint32_t warp = uniform_warp();
  // Addresses that the compiler does not make anew wherever they are needed.
  const uint32_t next = uniform(ptx::shared_address(&fixed.warps[warp]));
  const Stages stages(uniform(ptx::shared_address(dynamic)),
                      uniform(ptx::shared_address(&fixed.barriers)));
  if (kStaged && threadIdx.x == 0) stages.init();
  const uint32_t tiles = stages.at + (grid.rounds != 0 ? StageTraits::kRequired : 0);
  const uint32_t mine = tiles + warp * StripTraits::kTileBytes;
  const auto flush = [&](uint32_t square) {
    const uint32_t tile = tile_of<kStaged>(grid, square * StripSquare::kTiles);
    const StripPlace at = place_of<kFlat, kStaged>(grid, tile);
    stages.flush<kRow != Strip::kNone>(square, row, col, at.row, at.column);
  };
  uint32_t n = warp, tile = tile_of<kStaged>(grid, n);
  __syncthreads();
  StripPlace place = place_of<kFlat, kStaged>(grid, tile);
  if (tile < grid.tiles) copy_tile<kFlat>(grid, place, mine);
  while (tile < grid.tiles) {
    const StripPlace at = place;
    const uint32_t square = n / StripSquare::kTiles;
    const bool staged = kStaged && square < grid.rounds;
    if (ptx::lane_id() == 0) {
      const uint32_t then = atomicAdd(&fixed.taken, 1u);
      ptx::st_shared_v2(next, draw_tile<kStaged, has_tickets(kRow)>(grid, then), then);
    }
    if (staged) {
      if (n % StripSquare::kTiles == 0 && square >= StageTraits::kLag) {
        stages.await_turn(square - StageTraits::kLag);
        flush(square - StageTraits::kLag);
      }
      stages.acquire(square);
    }
    const StripOperand<kStaged> row_operand = {row_plan, row_keys, row_signs.word,
                                               staged ? stages.row_stage(n) : 0},
                                col_operand = {col_plan, col_keys, col_signs.word,
                                               staged ? stages.col_stage(n) : 0};
    const auto copy_next = [&] {
      __syncwarp();
      tile = uniform(ptx::ld_shared_b32(next));
      if (tile >= grid.tiles) return;
      place = place_of<kFlat, kStaged>(grid, tile);
      copy_tile<kFlat>(grid, place, mine);
    };
    ptx::cp_async_wait_all();
    __syncwarp();
    if constexpr (kRow != Strip::kNone)
#pragma unroll 1
      for (int pass = 0; pass < row_passes(kRow); ++pass)
        row_pass<kRow>(mine, pass, row, row_operand, at.row, at.column, [&] {
          if (kCol == Strip::kNone && pass == row_passes(kRow) - 1) copy_next();
        });
    if constexpr (kCol != Strip::kNone)
#pragma unroll 1
      for (int pass = 0; pass < column_passes(kCol); ++pass)
        column_pass<kCol, kRuns>(mine, pass, col, col_operand, at.column, at.row, [&] {
          if (pass == column_passes(kCol) - 1) copy_next();
        });
    if (staged) stages.commit(square);
    n = uniform(ptx::ld_shared_b32(next + sizeof(uint32_t)));
    __syncwarp();
  }
  if (!kStaged) return;
  __syncthreads();  // all tiles are done, and all squares written but the last
  const uint32_t left = min(grid.rounds, StageTraits::kLag);
  if (warp < left) flush(grid.rounds - left + warp);
}

// The packed tile that requantize reads: 32 bytes of codes and two scales of a row. Lane 2 i + b
// takes block b of rows i, i + 16, ...: its copies to shared memory run ahead of their decoding;
// the scales wait in registers.
struct PackedStrips {
  static constexpr int kBytes = StripTraits::kTile * StripTraits::kTile / 2;
  uint32_t scale[StripTraits::kPasses];

  __device__ __forceinline__ void copy(const QuantizeParams& p, const StripGrid& g, uint32_t tile,
                                       uint8_t* to) {
    const StripPlace at = place_of<false, false>(g, tile);
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
  __shared__ __align__(128) uint8_t tiles[StripTraits::kWarps][StripTraits::kTileBytes];
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
    const StripPlace at = place_of<false, false>(grid, tile);
#pragma unroll 1
    for (int pass = 0; pass < column_passes(kCol); ++pass)
      column_pass<kCol, false>(ptx::shared_address(tiles[warp]), pass, p, tables, at.column, at.row,
                               [] {});
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

// x with `pitch` between its contiguous rows.
static bool can_copy_tiles(const QuantizeParams& p, int64_t stride, int64_t pitch, int64_t height) {
  return p.in_format < 0 && p.x_type == FloatType::kBfloat16 && stride == 1 && aligned16(p.x) &&
         (height == 1 || (pitch % 8 == 0 && pitch < 0x3FFFFFFF));
}

bool can_strip_rows(const QuantizeParams& p) {
  return has_strips(p) && can_copy_tiles(p, p.stride_k, p.stride_row, p.rows);
}

bool can_strip_columns(const QuantizeParams& p) {
  if (p.in_format >= 0)
    return has_strips(p) && p.in_format == kMxfp4Code && aligned16(p.x) &&
           p.in_row_bytes == p.in_blocks * 16;
  return has_strips(p) && can_copy_tiles(p, p.stride_row, p.stride_k, p.cols);
}

static StripGrid make_grid(const void* x, int64_t height, int64_t width, int64_t pitch,
                           int64_t padded_height, int64_t padded_width) {
  constexpr int64_t kTile = StripTraits::kTile;
  const int64_t across = (padded_width + kTile - 1) / kTile,
                down = (padded_height + kTile - 1) / kTile;
  const auto narrow = [](int64_t n) { return static_cast<uint32_t>(n); };
  return {static_cast<const uint8_t*>(x),
          narrow(height),
          narrow(width),
          narrow(height == 1 ? 0 : pitch * 2),
          narrow(across * down),
          Divisor::of(across),
          0,
          0,
          nullptr};
}

// Whether an operand is made of whole squares, with rows of scales that are words of 8 bytes.
static bool has_squares(const QuantizeParams& p) {
  return p.rows % StripSquare::kRows == 0 && p.cols % StripSquare::kRows == 0 && !p.swizzled &&
         reinterpret_cast<uintptr_t>(p.scale) % StripSquare::kRowScales == 0;
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

// A CTA a multiprocessor, and no more warps of each than shared memory has room for tiles, or than
// there are tiles.
struct StripShares {
  unsigned ctas = 0, warps = 0;
  int shared = 0;  // bytes
};

// squares: whether scales may leave by squares; then g may come to have rounds of these.
static cudaError_t share_tiles(Strip row, Strip col, bool squares, StripGrid& g,
                               StripShares& shares) {
  int device = 0, sms = 0, shared = 0, arch = 0;
  cudaError_t error = device_arch(&arch);
  if (error == cudaSuccess) error = count_multiprocessors(&sms);
  if (error == cudaSuccess) error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  shares.ctas = std::min(g.tiles, static_cast<uint32_t>(sms));
  const uint32_t share = g.tiles / shares.ctas;
  const bool staged = squares && has_stages(arch);
  const auto reserve = [&](uint32_t of) { return g.tickets != nullptr ? share / of : 0; };
  if (staged) g.rounds = (share - reserve(TicketTraits::kOfStaged)) / StripSquare::kTiles;
  g.own = g.rounds != 0 ? g.rounds * StripSquare::kTiles : share - reserve(TicketTraits::kOfOthers);
  const int stages = g.rounds != 0 ? StageTraits::kRequired : 0;
  if (g.rounds != 0) g.across = Divisor::of(g.across.value / StripSquare::kSide);
  const int room =
      (shared - static_cast<int>(sizeof(StripStatic)) - stages) / StripTraits::kTileBytes;
  shares.warps = std::min((g.tiles + shares.ctas - 1) / shares.ctas,
                          static_cast<uint32_t>(std::min(room, strip_warps(row, col, arch))));
  shares.shared = static_cast<int>(shares.warps) * StripTraits::kTileBytes + stages;
  return cudaSuccess;
}

bool wants_tickets(const QuantizeParams& p) {
  int sms = 0;
  if (count_multiprocessors(&sms) != cudaSuccess) return false;
  const int64_t tiles = p.rows / StripTraits::kTile * (p.cols / StripTraits::kTile);
  return tiles >= TicketTraits::kLeast * sms;
}

template <Strip kRow, Strip kCol, bool kFlat = false, bool kRuns = false>
static cudaError_t launch_strips(const QuantizeParams& row, const QuantizeParams& col,
                                 const StripGrid& given, cudaStream_t stream) {
  StripGrid grid = given;
  grid.tickets = has_tickets(kRow) ? row.tickets : nullptr;
  StripShares shares;
  const bool squares = kCol != Strip::kNone && has_squares(row) && has_squares(col);
  const cudaError_t error = share_tiles(kRow, kCol, squares, grid, shares);
  if (error != cudaSuccess) return error;
  return launch_early(quantize_strips_kernel<kRow, kCol, kFlat, kRuns>, shares.ctas,
                      shares.warps * 32, shares.shared, stream, row, col, make_plan<kRow>(row),
                      make_plan<kCol>(col), grid);
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
  return pairs(row) && pairs(col) && can_copy_tiles(row, row.stride_k, row.stride_row, row.rows);
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
