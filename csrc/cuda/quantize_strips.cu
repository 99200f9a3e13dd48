// SPDX-License-Identifier: Apache-2.0
// quantize (either axis), quantize_dual and requantize where strip.cuh serves: bfloat16 (or mxfp4
// operands) to mxfp4, stochastic or rotated. Persistent CTAs walk over tiles of x, 128 rows x 64
// columns, along the rows of tiles, and copy the next tile while they work on one. Row half: a
// thread takes a row of the tile; column half: 64 rows of a column. The copies are 16 bytes, so x
// must be aligned to that, in both directions.
#include "cuda/strip.cuh"

namespace mxtrain::cuda {

// ---- device helpers ----

// x as the tiles see it: height x width bfloat16, rows `pitch` apart; across: tiles in a row of
// tiles.
struct StripGrid {
  const uint16_t* x;
  int64_t height, width, pitch;
  unsigned across, tiles;
};

struct StripPlace {
  int64_t row, column;
};

__device__ __forceinline__ StripPlace strip_place(const StripGrid& g, unsigned tile) {
  const unsigned down = tile / g.across;
  return {static_cast<int64_t>(down) * StripTraits::kTileRows,
          static_cast<int64_t>(tile - down * g.across) * StripTraits::kElements};
}

// Fill a tile, zeros outside of x. A thread keeps its chunk and moves on by 16 rows.
__device__ __forceinline__ void copy_tile(const StripGrid& g, unsigned tile, uint8_t* to) {
  constexpr int kStep = StripTraits::kThreads / StripTraits::kChunks;
  static_assert(kStep % 8 == 0, "a chunk's place is the same in all of a thread's rows");
  const StripPlace at = strip_place(g, tile);
  const int chunk = threadIdx.x % StripTraits::kChunks, first = threadIdx.x / StripTraits::kChunks;
  const int64_t column = at.column + chunk * 8, left = g.width - column;
  const int bytes = left <= 0 ? 0 : left < 8 ? static_cast<int>(left) * 2 : 16;
  const int64_t rows = g.height - at.row - first;
  const uint16_t* from = bytes > 0 && rows > 0 ? g.x + (at.row + first) * g.pitch + column : g.x;
  uint32_t shared = ptx::shared_address(to + strip_offset(first, chunk));
  if (bytes == 16 && rows > StripTraits::kTileRows - kStep) {
#pragma unroll
    for (int i = 0; i < StripTraits::kTileRows / kStep; ++i)
      ptx::cp_async_16(shared + i * kStep * StripTraits::kRowBytes, from + i * kStep * g.pitch, 16);
    return;
  }
  for (int i = 0; i < StripTraits::kTileRows; i += kStep) {
    const bool inside = i < rows && bytes > 0;
    ptx::cp_async_16(shared + i * StripTraits::kRowBytes, inside ? from + i * g.pitch : g.x,
                     inside ? bytes : 0);
  }
}

// ---- kernels ----

// CTAs of an SM, as many as the registers allow without spilling.
constexpr int strip_ctas(Strip row, Strip col) { return rotates(row) || rotates(col) ? 4 : 5; }
constexpr int requantize_ctas(Strip col) { return rotates(col) ? 3 : 4; }

template <Strip kRow, Strip kCol>
__global__ void __launch_bounds__(StripTraits::kThreads, strip_ctas(kRow, kCol))
    quantize_strips_kernel(const QuantizeParams row, const QuantizeParams col,
                           const StripGrid grid) {
  __shared__ alignas(128) uint8_t tiles[2][StripTraits::kTileBytes];
  __shared__ StripTables row_tables, col_tables;
  if (kRow != Strip::kNone) fill_tables<kRow>(row_tables, row);
  if (kCol != Strip::kNone) fill_tables<kCol>(col_tables, col);
  unsigned tile = blockIdx.x;
  copy_tile(grid, tile, tiles[0]);
  ptx::cp_async_commit();
  for (int now = 0; tile < grid.tiles; now ^= 1) {
    const unsigned next = tile + gridDim.x;
    if (next < grid.tiles) copy_tile(grid, next, tiles[now ^ 1]);
    ptx::cp_async_commit();
    ptx::cp_async_wait_group<1>();
    __syncthreads();
    const StripPlace at = strip_place(grid, tile);
    if constexpr (kRow != Strip::kNone)
      row_strip<kRow>(tiles[now], row, StripPlan<kRow>(row), row_tables, at.row + threadIdx.x,
                      at.column);
    if constexpr (kCol != Strip::kNone)
      column_strip<kCol>(tiles[now], col, StripPlan<kCol>(col), col_tables, at.column, at.row);
    __syncthreads();
    tile = next;
  }
}

// The packed tile that requantize reads: 32 bytes of codes and two scales of one row a thread, and
// the same decoded.
struct PackedRow {
  uint4 codes[2];
  uint32_t scale[2];
};

__device__ __forceinline__ PackedRow load_packed_row(const QuantizeParams& p, const StripGrid& g,
                                                     unsigned tile) {
  PackedRow r = {};
  const StripPlace at = strip_place(g, tile);
  const int64_t row = at.row + threadIdx.x;
  if (tile >= g.tiles || row >= g.height) return r;
  const uint8_t* codes = static_cast<const uint8_t*>(p.x) + row * p.in_row_bytes + at.column / 2;
  const uint8_t* scale = p.in_scale + row * p.in_blocks + at.column / 32;
#pragma unroll
  for (int b = 0; b < 2; ++b)
    if (at.column + 32 * b < p.in_blocks * 32) {
      r.codes[b] = ptx::ld_global_nc_v4(codes + 16 * b);
      r.scale[b] = scale[b];
    }
  return r;
}

__device__ __forceinline__ void decode_row(const PackedRow& r, uint8_t* tile) {
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    const uint32_t codes[4] = {r.codes[b].x, r.codes[b].y, r.codes[b].z, r.codes[b].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t w[4];
      decode8_e2m1<false>(codes[j], r.scale[b], w);
      *reinterpret_cast<uint4*>(tile + strip_offset(threadIdx.x, 4 * b + j)) =
          make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

template <Strip kCol>
__global__ void __launch_bounds__(StripTraits::kThreads, requantize_ctas(kCol))
    requantize_strips_kernel(const QuantizeParams p, const StripGrid grid) {
  __shared__ alignas(128) uint8_t tile_bytes[StripTraits::kTileBytes];
  __shared__ StripTables tables;
  fill_tables<kCol>(tables, p);
  PackedRow packed = load_packed_row(p, grid, blockIdx.x);
  for (unsigned tile = blockIdx.x; tile < grid.tiles; tile += gridDim.x) {
    decode_row(packed, tile_bytes);
    packed = load_packed_row(p, grid, tile + gridDim.x);
    __syncthreads();
    const StripPlace at = strip_place(grid, tile);
    column_strip<kCol>(tile_bytes, p, StripPlan<kCol>(p), tables, at.column, at.row);
    __syncthreads();
  }
}

// ---- launchers ----

static Strip strip_of(const QuantizeParams& p) {
  const bool stochastic = p.rounding == static_cast<int>(Rounding::kStochastic);
  if (p.hadamard) return stochastic ? Strip::kRotatedStochastic : Strip::kRotatedNearest;
  return stochastic ? Strip::kStochastic : Strip::kNone;
}

static bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

static bool has_strips(const QuantizeParams& p) {
  return p.format == kMxfp4Code && !p.toward && p.hadamard <= StripTraits::kElements &&
         strip_of(p) != Strip::kNone;
}

// x with `pitch` between its contiguous rows.
static bool can_copy_tiles(const QuantizeParams& p, int64_t stride, int64_t pitch, int64_t height) {
  return p.in_format < 0 && p.x_type == FloatType::kBfloat16 && stride == 1 && aligned16(p.x) &&
         (height == 1 || pitch % 8 == 0);
}

bool can_strip_rows(const QuantizeParams& p) {
  return has_strips(p) && can_copy_tiles(p, p.stride_k, p.stride_row, p.rows);
}

bool can_strip_columns(const QuantizeParams& p) {
  if (p.in_format >= 0)
    return has_strips(p) && p.in_format == kMxfp4Code && aligned16(p.x) && p.in_row_bytes % 16 == 0;
  return has_strips(p) && can_copy_tiles(p, p.stride_row, p.stride_k, p.cols);
}

static StripGrid make_grid(const void* x, int64_t height, int64_t width, int64_t pitch,
                           int64_t padded_height, int64_t padded_width) {
  const int64_t across = (padded_width + StripTraits::kElements - 1) / StripTraits::kElements;
  const int64_t down = (padded_height + StripTraits::kTileRows - 1) / StripTraits::kTileRows;
  return {static_cast<const uint16_t*>(x),     height, width, pitch, static_cast<unsigned>(across),
          static_cast<unsigned>(across * down)};
}

static cudaError_t resident_ctas(const StripGrid& g, int per_sm, unsigned* ctas) {
  int device = 0, sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const unsigned most = static_cast<unsigned>(sms * per_sm);
  *ctas = g.tiles < most ? g.tiles : most;
  return error;
}

template <Strip kRow, Strip kCol>
static cudaError_t launch_strips(const QuantizeParams& row, const QuantizeParams& col,
                                 const StripGrid& grid, cudaStream_t stream) {
  unsigned ctas = 0;
  const cudaError_t error = resident_ctas(grid, strip_ctas(kRow, kCol), &ctas);
  if (error != cudaSuccess) return error;
  quantize_strips_kernel<kRow, kCol><<<ctas, StripTraits::kThreads, 0, stream>>>(row, col, grid);
  return cudaGetLastError();
}

cudaError_t launch_row_strips(const QuantizeParams& given, cudaStream_t stream) {
  QuantizeParams p = given;
  if (p.stride_row == p.cols && p.cols % StripTraits::kElements == 0 && !p.swizzled) {
    // Strips in a row, one after the other: the tile is a contiguous piece of memory.
    p.rows *= p.cols / StripTraits::kElements;
    p.cols = p.kp = p.stride_row = StripTraits::kElements;
  }
  const StripGrid grid = make_grid(p.x, p.rows, p.cols, p.stride_row, p.rows, p.kp);
  switch (strip_of(p)) {
    case Strip::kStochastic:
      return launch_strips<Strip::kStochastic, Strip::kNone>(p, p, grid, stream);
    case Strip::kRotatedStochastic:
      return launch_strips<Strip::kRotatedStochastic, Strip::kNone>(p, p, grid, stream);
    case Strip::kRotatedNearest:
      return launch_strips<Strip::kRotatedNearest, Strip::kNone>(p, p, grid, stream);
    case Strip::kNone:
      break;
  }
  return cudaErrorInvalidValue;
}

template <Strip kCol>
static cudaError_t launch_requantize_strips(const QuantizeParams& p, cudaStream_t stream) {
  const StripGrid grid = make_grid(nullptr, p.cols, p.rows, 0, p.kp, p.rows);
  unsigned ctas = 0;
  const cudaError_t error = resident_ctas(grid, requantize_ctas(kCol), &ctas);
  if (error != cudaSuccess) return error;
  requantize_strips_kernel<kCol><<<ctas, StripTraits::kThreads, 0, stream>>>(p, grid);
  return cudaGetLastError();
}

template <Strip kCol>
static cudaError_t launch_column_strip(const QuantizeParams& p, cudaStream_t stream) {
  if (p.in_format >= 0) return launch_requantize_strips<kCol>(p, stream);
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
    case Strip::kNone:
      break;
  }
  return cudaErrorInvalidValue;
}

bool can_strip_dual(const QuantizeParams& row, const QuantizeParams& col) {
  const auto stochastic = [](const QuantizeParams& p) {
    return p.rounding == static_cast<int>(Rounding::kStochastic);
  };
  return can_strip_rows(row) && can_strip_columns(col) && stochastic(row) && stochastic(col);
}

cudaError_t launch_dual_strips(const QuantizeParams& row, const QuantizeParams& col,
                               cudaStream_t stream) {
  constexpr Strip kPlain = Strip::kStochastic, kRotated = Strip::kRotatedStochastic;
  const StripGrid grid = make_grid(row.x, row.rows, row.cols, row.stride_row, col.kp, row.kp);
  if (row.hadamard)
    return col.hadamard ? launch_strips<kRotated, kRotated>(row, col, grid, stream)
                        : launch_strips<kRotated, kPlain>(row, col, grid, stream);
  return col.hadamard ? launch_strips<kPlain, kRotated>(row, col, grid, stream)
                      : launch_strips<kPlain, kPlain>(row, col, grid, stream);
}

}  // namespace mxtrain::cuda
