// SPDX-License-Identifier: Apache-2.0
// requantize, mxfp4 to mxfp4, stochastic, not rotated. A lane takes 32 x 8 codes, transposes them
// as nibbles, and rounds 8 blocks, one after the other, two elements a word.
//
// Blocks are rounded as code_block.cuh says. Squares of other scales, NaN, and prescales go element
// by element (strip.cuh).
//
// A tile is 128 rows x 256 columns of x: rows come in as lines of 128 bytes, and rows of the result
// leave by 64. It is rounded in place in shared memory; code_tile.h says how it lies there. While
// one CTA copies, the others of its multiprocessor round, and the hardware gives the next tiles to
// the multiprocessor that is first done with some. A CTA takes two tiles below one another, so that
// scales leave by 8 bytes; where both lie in shared memory at once, the second is copied while the
// first is rounded, and codes leave by lines of 128 bytes too. The last CTAs, as many as run at
// once, have one each, so that multiprocessors end together and small matrices are shared out.
#include "cuda/code_block.cuh"
#include "cuda/code_tile.h"
#include "cuda/divide.cuh"
#include "cuda/launch.cuh"
#include "cuda/strip.cuh"

namespace mxtrain::cuda {

namespace {

// ---- traits ----

// Tiles below one another that a CTA takes, and how many of them lie in shared memory at once where
// a multiprocessor has 228 KB of it (9.0, 10.x); elsewhere it is one.
constexpr uint32_t kCodeTiles = 2, kCodeBuffers = 2;
static_assert(kCodeBuffers <= kCodeTiles && kCodeTiles <= 2, "a place for each tile at most");

constexpr uint32_t code_buffers(int arch) {
  return arch == 90 || arch / 10 == 10 ? kCodeBuffers : 1;
}
// CTAs of a multiprocessor.
constexpr int code_ctas(int arch) { return code_buffers(arch) == 2 ? 6 : 8; }

struct CodeTraits {
  static constexpr uint32_t kTiles = kCodeTiles, kBuffers = code_buffers(kCodeArch);
  static constexpr int kCtas = code_ctas(kCodeArch);
  static constexpr uint32_t kSquares = 8;  // 32 x 32, of a warp, each of 4 lanes
  // Scales that neither under- nor overflow on the way, and how far they may lie apart.
  static constexpr uint32_t kFirst = 16, kLast = 250, kBinades = 8;
};

// The packed operand: `height` rows of `blocks` blocks. across: tiles in a row of tiles. CTAs below
// `doubled` have two tiles, those of the rows before `single_row`.
struct CodeGrid {
  const uint8_t* x;
  uint32_t height, blocks;
  Divisor across;
  uint32_t doubled, single_row;
  bool plain;                     // no prescale
  bool loads8, stores4, stores8;  // rows of scales are aligned words of 8, 4 and 8
};

struct CodePlace {
  uint32_t row, column, tiles;
  __device__ __forceinline__ CodePlace(const CodeGrid& g, uint32_t cta) {
    const bool two = CodeTraits::kTiles == 2 && cta < g.doubled;
    const uint32_t group = two ? cta : cta - g.doubled, down = g.across.divide(group);
    tiles = two ? 2 : 1;
    row = (two ? 0 : g.single_row) + down * tiles * CodeTile::kRows;
    column = (group - down * g.across.value) * CodeTile::kColumns;
  }
  // The row of one of its tiles.
  __device__ __forceinline__ uint32_t row_of(uint32_t tile) const {
    return row + tile * CodeTile::kRows;
  }
};

using CodeRows = uint4[CodeTraits::kSquares][4];  // of squares: see survey

struct alignas(128) CodeShared {
  static constexpr uint32_t kBuffers = CodeTraits::kBuffers, kBandScales = 32 * 8;
  static_assert(CodeTile::kBandRows == 32, "a lane copies the scales of a row of its band");
  static_assert(sizeof(CodeRows) == 2 * kBandScales, "they take the place of the first tile's");

  uint8_t codes[kBuffers * CodeTile::kBytes];
  // A warp's: of the second tile, if it has a place of its own; of the first; nothing yet.
  uint8_t scales[CodeTile::kBands][kBuffers + 1][kBandScales];
  uint8_t block_scales[CodeTraits::kTiles][CodeTile::kScaleBytes];

  // Of a tile's: its first band, the scales of a band, and what is made of them.
  __device__ __forceinline__ static uint32_t first_band(uint32_t tile) {
    return kBuffers == 2 ? tile * CodeTile::kBands : 0;
  }
  __device__ __forceinline__ uint8_t* scales_of(uint32_t tile, uint32_t band) {
    return scales[band][kBuffers == 2 ? 1 - tile : 0];
  }
  __device__ __forceinline__ CodeRows& rows_of(uint32_t band) {
    return *reinterpret_cast<CodeRows*>(scales[band][kBuffers - 1]);
  }
};

static_assert(CodeTraits::kCtas * (sizeof(CodeShared) + 1024) <= 228 * 1024,
              "what a multiprocessor of 9.0 has, of which a CTA costs 1 KiB more");

// threadIdx.x, found where it stands, so that nothing of it waits in registers.
__device__ __forceinline__ uint32_t thread_id(uint32_t warp) { return warp * 32 + ptx::lane_id(); }

// ---- in ----

// Start copying the codes of a warp's band of a tile, with zeros outside of x.
__device__ __forceinline__ void copy_codes(const CodeGrid& g, const CodePlace& at, uint32_t tile,
                                           uint32_t band, CodeShared& shared) {
  const uint32_t lane = ptx::lane_id(), chunk = lane % CodeTile::kChunks;
  const uint32_t first = band * CodeTile::kBandRows + lane / CodeTile::kChunks;
  const uint32_t block = at.column / 32 + chunk, row = at.row_of(tile) + first;
  const uint8_t* from = g.x + (static_cast<uint64_t>(row) * g.blocks + block) * 16;
  const uint64_t pitch = static_cast<uint64_t>(g.blocks) * (16 * CodeTile::kCopyRows);
  const uint32_t to =
      ptx::shared_address(shared.codes) +
      CodeTile::chunk(CodeShared::first_band(tile) * CodeTile::kBandRows + first, chunk);
  if (at.row_of(tile + 1) <= g.height && at.column + CodeTile::kColumns <= g.blocks * 32) {
#pragma unroll
    for (uint32_t i = 0; i < CodeTile::kCopies; ++i, from += pitch)
      ptx::cp_async_16(to + CodeTile::chunk(i * CodeTile::kCopyRows, 0), from, 16);
    return;
  }
#pragma unroll 1
  for (uint32_t i = 0; i < CodeTile::kBandRows; i += CodeTile::kCopyRows, from += pitch) {
    const bool inside = row + i < g.height && block < g.blocks;
    ptx::cp_async_16(to + CodeTile::chunk(i, 0), inside ? from : g.x, inside ? 16 : 0);
  }
}

// The same of their scales: a lane takes the 8 of a row.
__device__ __forceinline__ void copy_scales(const QuantizeParams& p, const CodeGrid& g,
                                            const CodePlace& at, uint32_t tile, uint32_t band,
                                            CodeShared& shared) {
  const uint32_t lane = ptx::lane_id();
  const uint32_t row = at.row_of(tile) + CodeTile::kBandRows * band + lane, block = at.column / 32;
  const uint32_t blocks = row < g.height ? g.blocks - block : 0;
  const uint8_t* from = p.in_scale;
  if (blocks != 0) from += static_cast<uint64_t>(row) * g.blocks + block;
  const uint32_t to = ptx::shared_address(shared.scales_of(tile, band)) + lane * 8;
  if (g.loads8) return ptx::cp_async_8(to, from, blocks != 0 ? 8 : 0);
  uint32_t word[2] = {0, 0};
#pragma unroll
  for (uint32_t s = 0; s < 8; ++s)
    if (s < blocks) word[s / 4] |= ptx::ld_global_nc_u8(from + s) << (8 * (s % 4));
  ptx::st_shared_v2(to, word[0], word[1]);
}

__device__ __forceinline__ void copy_band(const QuantizeParams& p, const CodeGrid& g,
                                          const CodePlace& at, uint32_t tile, uint32_t band,
                                          CodeShared& shared) {
  copy_codes(g, at, tile, band, shared);
  copy_scales(p, g, at, tile, band, shared);
}

// ---- transposed ----

// A lane's 32 x 8 codes, from a band's rows to its columns; band: from 0 to 7. When a lane writes a
// column, which it alone reads, all have left the rows.
__device__ __forceinline__ void transpose_codes(CodeShared& shared, uint32_t band) {
  const uint32_t lane = ptx::lane_id();
  const uint32_t from =
      ptx::shared_address(shared.codes) + CodeTile::chunk(32 * band, 0) + lane * 4;
  uint32_t columns[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = ptx::ld_shared_b32(from + CodeTile::chunk(8 * i + j, 0));
    transpose_nibbles(w, columns[i]);
  }
  __syncwarp();
  const uint32_t to = ptx::shared_address(shared.codes) + CodeTile::column(band, lane, 0);
#pragma unroll
  for (int n = 0; n < 8; ++n)
    ptx::st_shared_v4(to ^ (n * 16), columns[0][n], columns[1][n], columns[2][n], columns[3][n]);
}

// ---- scales of the source ----

// Of 8 rows: lane 4 s + i takes rows 8 i to 8 i + 7 of square s, whose 4 lanes all need them.
struct RowScales {
  uint32_t code[8];

  __device__ __forceinline__ explicit RowScales(const uint8_t* of_band) {
    const uint32_t lane = ptx::lane_id();
    const uint8_t* from = of_band + lane % 4 * 64 + lane / 4;
#pragma unroll
    for (int t = 0; t < 8; ++t) code[t] = from[8 * t];
  }

  // Whether some of the rows whose scale is 0 hold other codes than zeros. band: from 0 to 7.
  __device__ __forceinline__ bool hides_codes(const CodeShared& shared, uint32_t band) const {
    const uint32_t lane = ptx::lane_id(), first = 32 * band + lane % 4 * 8;
    uint32_t found = 0;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint4 w =
          *reinterpret_cast<const uint4*>(shared.codes + CodeTile::chunk(first + t, lane / 4));
      found |= code[t] == 0 ? w.x | w.y | w.z | w.w : 0u;
    }
    return (found & 0x77777777u) != 0;
  }

  // Of 2^14 times 2^(e - largest) in float16; 0, of a zero, for e = 0.
  __device__ __forceinline__ uint32_t exponent(int t, uint32_t largest) const {
    return static_cast<uint32_t>(max(static_cast<int>(code[t] + 29 - largest), 0));
  }

  // These powers, the units of v over the codes' raw bits. Word t: of rows t and t + 4.
  __device__ __forceinline__ uint4 units(uint32_t largest) const {
    uint32_t u[4];
#pragma unroll
    for (int t = 0; t < 4; ++t)
      u[t] = (exponent(t, largest) + (exponent(t + 4, largest) << 16)) << 10;
    return make_uint4(u[0], u[1], u[2], u[3]);
  }

  __device__ __forceinline__ uint4 packed() const {
    return make_uint4(code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                      code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24, 0, 0);
  }
};

// What a lane's 8 blocks share.
struct Square {
  uint32_t largest;  // code of the largest scale
  bool fast;         // the same in all lanes
};

// Leaves the units in the band's rows_of()[square], or the scales where the squares are not fast.
// The tile must still hold the rows.
__device__ __forceinline__ Square survey(CodeShared& shared, uint32_t tile, uint32_t band,
                                         bool plain) {
  const RowScales scales(shared.scales_of(tile, band));
  const uint32_t lane = ptx::lane_id();
  uint32_t largest = 0, smallest = ~0u, least = 255;  // smallest: but for zeros, less 1
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    largest = max(largest, scales.code[t]);
    least = min(least, scales.code[t]);
    smallest = min(smallest, scales.code[t] - 1);
  }
  const bool hidden =
      __any_sync(kAllLanes, least == 0) &&
      __any_sync(kAllLanes, scales.hides_codes(shared, CodeShared::first_band(tile) + band));
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    smallest = min(smallest, __shfl_xor_sync(kAllLanes, smallest, lanes));
  }
  const bool near =
      largest == 0 || (smallest + 1 >= CodeTraits::kFirst && largest <= CodeTraits::kLast &&
                       largest - smallest - 1 <= CodeTraits::kBinades);
  const bool fast = __all_sync(kAllLanes, near) && !hidden && plain;
  // All lanes have read their scales, which lie here.
  shared.rows_of(band)[lane / 4][lane % 4] = fast ? scales.units(largest) : scales.packed();
  return {largest, fast};
}

// ---- one block ----

// As round_codes, from any scales, by float32.
__device__ __forceinline__ StripBlock round_values(const uint4& column, const uint4 (&scales)[4],
                                                   const QuantizeParams& p,
                                                   const StripOperand<false>& operand,
                                                   uint32_t group) {
  const uint32_t codes[4] = {column.x, column.y, column.z, column.w};
  float v[32];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint4 packed = scales[i];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[8 * i + j] = decode<E2M1>(codes[i] >> (4 * j) & 15u) *
                     e8m0_value((j < 4 ? packed.x : packed.y) >> (8 * (j % 4)) & 0xFFu);
  }
  return quantize_block<Strip::kStochastic>(v, amax32(v), p, operand, group);
}

// ---- kernel ----

// A warp's band of a tile, in place: rows of codes to blocks of columns.
__device__ __forceinline__ void round_band(const QuantizeParams& p, const CodeGrid& g,
                                           const CodePlace& at, uint32_t tile, uint32_t band,
                                           const StripOperand<false>& operand, CodeShared& shared) {
  const uint32_t lane = ptx::lane_id(), place = CodeShared::first_band(tile) + band;
  const uint32_t k = at.row_of(tile) + 32 * band, kp = static_cast<uint32_t>(p.kp);
  if (k >= kp) return;
  const Square square = survey(shared, tile, band, g.plain);
  transpose_codes(shared, place);
  const CodeRows& rows = shared.rows_of(band);
  const uint32_t group = (at.column + lane * CodeTile::kLaneColumns) * (kp / 32) + k / 32;
  const uint32_t columns = ptx::shared_address(shared.codes) + CodeTile::column(place, lane, 0),
                 scales = ptx::shared_address(shared.block_scales[tile]) +
                          CodeTile::block_scale(band, lane, 0);
  const auto each_column = [&](auto round) {
    uint32_t of_column = group;
#pragma unroll 1
    for (uint32_t step = 0; step < CodeTile::kLaneColumns * 16; step += 16) {
      const uint32_t at_column = columns ^ step;
      const uint4 column = ptx::ld_shared_v4(at_column);
      const StripBlock b = round(column, of_column);
      ptx::st_shared_v4(at_column, b.codes.x, b.codes.y, b.codes.z, b.codes.w);
      ptx::st_shared_u8(ptx::mad_lo_u32(step, CodeTile::kScaleStep / 16, scales), b.scale);
      of_column += kp / 32;
    }
  };
  if (square.fast) {
    uint32_t units[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 u = rows[lane / 4][i];
      units[4 * i] = u.x, units[4 * i + 1] = u.y, units[4 * i + 2] = u.z, units[4 * i + 3] = u.w;
    }
    each_column([&](const uint4& column, uint32_t group) {
      return round_codes(column, units, square.largest, operand.keys, group);
    });
  } else {
    each_column([&](const uint4& column, uint32_t group) {
      return round_values(column, rows[lane / 4], p, operand, group);
    });
  }
}

// kBands lanes write as many blocks of an operand row, from that of x's row on.
template <uint32_t kBands>
__device__ __forceinline__ void store_codes(const QuantizeParams& p, const CodePlace& at,
                                            uint32_t x_row, uint32_t thread, CodeShared& shared) {
  constexpr uint32_t kStep = CodeTile::store_step(kBands), kStores = CodeTile::stores(kBands);
  const uint32_t block = x_row / 32 + thread % kBands, row = at.column + thread / kBands;
  const uint32_t rows = static_cast<uint32_t>(p.rows), blocks = static_cast<uint32_t>(p.kp) / 32;
  const uint32_t left = block < blocks && row < rows ? rows - row : 0;
  const uint32_t from =
      ptx::opaque(ptx::shared_address(shared.codes) + CodeTile::stored(thread, kBands));
  uint8_t* to = p.data + (static_cast<uint64_t>(row) * blocks + block) * 16;
  const uint64_t pitch = static_cast<uint64_t>(blocks) * (16 * kStep);
  const auto store = [&](uint32_t i) {
    *reinterpret_cast<uint4*>(to + i * pitch) =
        ptx::ld_shared_v4(CodeTile::stored_further(from, i, kBands));
  };
  if (left > (kStores - 1) * kStep) {
#pragma unroll
    for (uint32_t i = 0; i < kStores; ++i) store(i);
    return;
  }
#pragma unroll 1
  for (uint32_t i = 0; i * kStep < left; ++i) store(i);
}

// A thread writes the scales of two operand rows, 4 of a tile.
__device__ __forceinline__ void store_scales(const QuantizeParams& p, const CodeGrid& g,
                                             const CodePlace& at, uint32_t thread,
                                             const CodeShared& shared) {
  const uint32_t kp = static_cast<uint32_t>(p.kp);
#pragma unroll
  for (uint32_t word = thread; word < CodeTile::kColumns; word += CodeTile::kThreads) {
    const uint32_t row = at.column + CodeTile::scaled_column(word);
    if (row >= static_cast<uint32_t>(p.rows)) continue;
    const auto from = [&](uint32_t tile) {
      return shared.block_scales[tile] + word * CodeTile::kBands;
    };
    const auto four = [&](uint32_t tile) { return *reinterpret_cast<const uint32_t*>(from(tile)); };
    uint8_t* to = p.scale + (static_cast<uint64_t>(row) * (kp / 32) + at.row / 32);
    if (CodeTraits::kTiles == 2 && at.tiles == 2 && g.stores8) {
      *reinterpret_cast<uint2*>(to) = make_uint2(four(0), four(CodeTraits::kTiles - 1));
      continue;
    }
    if (g.stores4) {
      *reinterpret_cast<uint32_t*>(to) = four(0);
      if (at.tiles == 2) *reinterpret_cast<uint32_t*>(to + 4) = four(CodeTraits::kTiles - 1);
      continue;
    }
#pragma unroll 1
    for (uint32_t b = 0; b < at.tiles * CodeTile::kBands; ++b) {
      const uint32_t k = at.row + 32 * b;
      if (k < kp)
        *(p.swizzled ? scale_at<Mxfp4>(p, row, k) : to + b) =
            from(b / CodeTile::kBands)[b % CodeTile::kBands];
    }
  }
}

__global__ void __launch_bounds__(CodeTile::kThreads, CodeTraits::kCtas)
    requantize_codes_kernel(const QuantizeParams p, const StripPlan plan, const CodeGrid g) {
  constexpr uint32_t kBuffers = CodeTraits::kBuffers;
  __shared__ CodeShared shared;
  begin_early();
  const CodePlace at(g, blockIdx.x);
  const uint32_t warp = uniform(threadIdx.x / 32);
  copy_band(p, g, at, 0, warp, shared);
  if (kBuffers == 2) {
    ptx::cp_async_commit_group();
    if (at.tiles == 2) copy_band(p, g, at, 1, warp, shared);
    ptx::cp_async_commit_group();
  }
  const PhiloxSchedule keys = uniform_schedule(p);
  const StripOperand<false> operand = {plan, keys, nullptr, 0};
#pragma unroll 1
  for (uint32_t tile = 0; tile < at.tiles; ++tile) {
    if (kBuffers == 2 && tile == 0)
      ptx::cp_async_wait_group<1>();
    else
      ptx::cp_async_wait_all();
    __syncwarp();  // a warp waits for its own rows only
    round_band(p, g, at, tile, warp, operand, shared);
    if (kBuffers == 2) continue;
    __syncthreads();
    store_codes<CodeTile::kBands>(p, at, at.row_of(tile), thread_id(warp), shared);
    if (tile + 1 == at.tiles) break;
    __syncthreads();  // all have left the codes
    copy_band(p, g, at, tile + 1, warp, shared);
  }
  if (kBuffers == 2) {
    __syncthreads();
    if (at.tiles == 2)
      store_codes<2 * CodeTile::kBands>(p, at, at.row, thread_id(warp), shared);
    else
      store_codes<CodeTile::kBands>(p, at, at.row, thread_id(warp), shared);
  }
  store_scales(p, g, at, thread_id(warp), shared);
}

}  // namespace

// ---- launcher ----

// As can_strip_columns says, without a rotation.
cudaError_t launch_requantize_codes(const QuantizeParams& p, cudaStream_t stream) {
  int arch = 0, sms = 0;
  cudaError_t error = device_arch(&arch);
  if (error == cudaSuccess) error = count_multiprocessors(&sms);
  if (error != cudaSuccess) return error;
  const auto narrow = [](int64_t n) { return static_cast<uint32_t>(n); };
  const int64_t across = (p.rows + CodeTile::kColumns - 1) / CodeTile::kColumns,
                down = (p.kp + CodeTile::kRows - 1) / CodeTile::kRows;
  // Rows of tiles that are taken two by two: all but those that the last CTAs have.
  const int64_t more = across * down - static_cast<int64_t>(sms) * code_ctas(arch);
  const int64_t twos = CodeTraits::kTiles == 2 && more > 0 ? more / (2 * across) : 0;
  const auto words = [](const uint8_t* scales, int64_t in_row, int64_t size) {
    return in_row % size == 0 && reinterpret_cast<uintptr_t>(scales) % size == 0;
  };
  const CodeGrid g = {static_cast<const uint8_t*>(p.x),
                      narrow(p.cols),
                      narrow(p.in_blocks),
                      Divisor::of(across),
                      narrow(across * twos),
                      narrow(twos * 2 * CodeTile::kRows),
                      p.prescale == 1.0f,
                      words(p.in_scale, p.in_blocks, CodeTile::kColumns / 32),
                      !p.swizzled && words(p.scale, p.kp / 32, CodeTile::kBands),
                      !p.swizzled && words(p.scale, p.kp / 32, 2 * CodeTile::kBands)};
  return launch_early(requantize_codes_kernel, narrow(across * (down - twos)), CodeTile::kThreads,
                      0, stream, p, make_plan<Strip::kStochastic>(p), g);
}

}  // namespace mxtrain::cuda
