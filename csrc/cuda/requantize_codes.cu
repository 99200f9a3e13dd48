// SPDX-License-Identifier: Apache-2.0
// requantize, mxfp4 to mxfp4, stochastic, not rotated. A lane takes 32 x 8 codes, transposes them
// as nibbles, and rounds 8 blocks, one after the other, two elements a word.
//
// The source's codes carry one mantissa bit and a power of two that a whole row of the 32 x 32
// square shares, so float16 holds what rounding needs. With the square's scales within 8 binades of
// the largest, v = code * 2^(e - largest) is exact, and so is u = v / S * 2^-14, a multiple of
// 2^-23. Float16 is subnormal below 2^-14 as E2M1 is below 1, so u's bits above the cut at bit 9
// are the code. Of the fraction F below, bit 0 is zero, so the draw's first byte decides (F / 512 *
// 2^17 > 2 r + 1 just where F / 2 > r / 256 rounded down), and one integer addition of its
// complement rounds both halves. Every rule takes the same scale, since no magnitude's mantissa
// exceeds that of the largest element, and no element exceeds 6 S. Squares of other scales, NaN,
// and prescales go element by element (strip.cuh).
//
// A CTA has one tile, 128 rows x 256 columns of x: rows come in as lines of 128 bytes, and rows of
// the result leave by 64. It is rounded in place in shared memory; code_tile.h says how it lies
// there. While one CTA copies, the others of its multiprocessor round, and the hardware gives
// the next tile to the multiprocessor that is first done with one.
#include "cuda/code_tile.h"
#include "cuda/divide.cuh"
#include "cuda/launch.cuh"
#include "cuda/strip.cuh"
#include "ptx/f16x2.cuh"

namespace mxtrain::cuda {

namespace {

// ---- traits ----

struct CodeTraits {
  static constexpr int kCtas = 8;          // of an SM
  static constexpr uint32_t kSquares = 8;  // 32 x 32, of a warp, each of 4 lanes
  // Scales that neither under- nor overflow on the way, and how far they may lie apart.
  static constexpr uint32_t kFirst = 16, kLast = 250, kBinades = 8;
};

// The packed operand: `height` rows of `blocks` blocks. across: tiles in a row of tiles.
struct CodeGrid {
  const uint8_t* x;
  uint32_t height, blocks;
  Divisor across;
  bool pairs;            // no prescale
  bool loads8, stores4;  // rows of scales are aligned words of 8 and 4
};

struct CodePlace {
  uint32_t row, column;
  __device__ __forceinline__ CodePlace(const CodeGrid& g, uint32_t tile) {
    const uint32_t down = g.across.divide(tile);
    row = down * CodeTile::kRows;
    column = (tile - down * g.across.value) * CodeTile::kColumns;
  }
};

struct alignas(128) CodeShared {
  uint8_t codes[CodeTile::kBytes];
  uint8_t scales[CodeTile::kScaleBytes];
  uint8_t block_scales[CodeTile::kScaleBytes];
  uint4 rows[CodeTile::kBands][CodeTraits::kSquares][4];  // of a square: see survey
};

static_assert(CodeTraits::kCtas * (sizeof(CodeShared) + 1024) <= 228 * 1024,
              "what a multiprocessor of 9.0 has, of which a CTA costs 1 KiB more");
static_assert(CodeTile::kBandRows == 32, "a lane copies the scales of a row of its band");

// threadIdx.x, found where it stands, so that nothing of it waits in registers.
__device__ __forceinline__ uint32_t thread_id(uint32_t warp) { return warp * 32 + ptx::lane_id(); }

// ---- in ----

// Start copying the codes of a warp's band, with zeros outside of x.
__device__ __forceinline__ void copy_codes(const CodeGrid& g, const CodePlace& at, uint32_t band,
                                           CodeShared& tile) {
  const uint32_t lane = ptx::lane_id(), chunk = lane % CodeTile::kChunks;
  const uint32_t first = band * CodeTile::kBandRows + lane / CodeTile::kChunks;
  const uint32_t block = at.column / 32 + chunk, row = at.row + first;
  const uint8_t* from = g.x + (static_cast<uint64_t>(row) * g.blocks + block) * 16;
  const uint64_t pitch = static_cast<uint64_t>(g.blocks) * (16 * CodeTile::kCopyRows);
  const uint32_t to = ptx::shared_address(tile.codes) + CodeTile::chunk(first, chunk);
  if (at.row + CodeTile::kRows <= g.height && at.column + CodeTile::kColumns <= g.blocks * 32) {
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

// The same of their scales: a thread takes the 8 of a row, which is of its warp's band.
__device__ __forceinline__ void copy_scales(const QuantizeParams& p, const CodeGrid& g,
                                            const CodePlace& at, uint32_t thread,
                                            CodeShared& tile) {
  const uint32_t row = at.row + thread, block = at.column / 32;
  const uint32_t blocks = row < g.height ? g.blocks - block : 0;
  const uint8_t* from = p.in_scale;
  if (blocks != 0) from += static_cast<uint64_t>(row) * g.blocks + block;
  const uint32_t to = ptx::shared_address(tile.scales) + thread * 8;
  if (g.loads8) return ptx::cp_async_8(to, from, blocks != 0 ? 8 : 0);
  uint32_t word[2] = {0, 0};
#pragma unroll
  for (uint32_t s = 0; s < 8; ++s)
    if (s < blocks) word[s / 4] |= ptx::ld_global_nc_u8(from + s) << (8 * (s % 4));
  ptx::st_shared_v2(to, word[0], word[1]);
}

// ---- transposed ----

// 8 words of 8 nibbles, transposed.
__device__ __forceinline__ void transpose_nibbles(const uint32_t (&w)[8], uint32_t (&out)[8]) {
  constexpr uint32_t kLow = 0x0F0F0F0Fu;
#pragma unroll
  for (int odd = 0; odd < 2; ++odd) {
    uint32_t t[4];  // byte i of t[j]: column 2 i + odd of rows 2 j and 2 j + 1
#pragma unroll
    for (int j = 0; j < 4; ++j)
      t[j] = odd ? ptx::lop3_select(w[2 * j] >> 4, w[2 * j + 1], kLow)
                 : ptx::lop3_select(w[2 * j], w[2 * j + 1] << 4, kLow);
    const uint32_t a = __byte_perm(t[0], t[1], 0x5140), b = __byte_perm(t[2], t[3], 0x5140);
    const uint32_t c = __byte_perm(t[0], t[1], 0x7362), d = __byte_perm(t[2], t[3], 0x7362);
    out[odd] = __byte_perm(a, b, 0x5410);
    out[2 + odd] = __byte_perm(a, b, 0x7632);
    out[4 + odd] = __byte_perm(c, d, 0x5410);
    out[6 + odd] = __byte_perm(c, d, 0x7632);
  }
}

// A lane's 32 x 8 codes, from a band's rows to its columns. When a lane writes a column, which it
// alone reads, all have left the rows.
__device__ __forceinline__ void transpose_codes(CodeShared& tile, uint32_t band) {
  const uint32_t lane = ptx::lane_id();
  const uint32_t from = ptx::shared_address(tile.codes) + CodeTile::chunk(32 * band, 0) + lane * 4;
  uint32_t columns[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = ptx::ld_shared_b32(from + CodeTile::chunk(8 * i + j, 0));
    transpose_nibbles(w, columns[i]);
  }
  __syncwarp();
  const uint32_t to = ptx::shared_address(tile.codes) + CodeTile::column(band, lane, 0);
#pragma unroll
  for (int n = 0; n < 8; ++n)
    ptx::st_shared_v4(to ^ (n * 16), columns[0][n], columns[1][n], columns[2][n], columns[3][n]);
}

// ---- scales of the source ----

// Of 8 rows: lane 4 s + i takes rows 8 i to 8 i + 7 of square s, whose 4 lanes all need them.
struct RowScales {
  uint32_t code[8];

  __device__ __forceinline__ RowScales(CodeShared& tile, uint32_t band) {
    const uint32_t lane = ptx::lane_id();
    const uint8_t* from = tile.scales + (CodeTile::kBandRows * band + lane % 4 * 8) * 8 + lane / 4;
#pragma unroll
    for (int t = 0; t < 8; ++t) code[t] = from[8 * t];
  }

  // Whether some of the rows whose scale is 0 hold other codes than zeros.
  __device__ __forceinline__ bool hides_codes(CodeShared& tile, uint32_t band) const {
    const uint32_t lane = ptx::lane_id(), first = 32 * band + lane % 4 * 8;
    uint32_t found = 0;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint4 w =
          *reinterpret_cast<const uint4*>(tile.codes + CodeTile::chunk(first + t, lane / 4));
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

// Leaves the units in rows[square], or the scales where the squares are not fast. The tile must
// still hold the rows.
__device__ __forceinline__ Square survey(CodeShared& tile, uint32_t band, bool pairs,
                                         uint4 (&rows)[CodeTraits::kSquares][4]) {
  const RowScales scales(tile, band);
  const uint32_t lane = ptx::lane_id();
  uint32_t largest = 0, smallest = ~0u, least = 255;  // smallest: but for zeros, less 1
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    largest = max(largest, scales.code[t]);
    least = min(least, scales.code[t]);
    smallest = min(smallest, scales.code[t] - 1);
  }
  const bool hidden =
      __any_sync(kAllLanes, least == 0) && __any_sync(kAllLanes, scales.hides_codes(tile, band));
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    smallest = min(smallest, __shfl_xor_sync(kAllLanes, smallest, lanes));
  }
  const bool near =
      largest == 0 || (smallest + 1 >= CodeTraits::kFirst && largest <= CodeTraits::kLast &&
                       largest - smallest - 1 <= CodeTraits::kBinades);
  const bool fast = __all_sync(kAllLanes, near) && !hidden && pairs;
  rows[lane / 4][lane % 4] = fast ? scales.units(largest) : scales.packed();
  return {largest, fast};
}

// ---- one block ----

// The complement of the first bytes of the draws of elements t and t + 4 of a quarter, in each half
// from bit 0 (even t) or 5 (odd t) up. See quarter_words: even t takes low halves.
struct PairDraws {
  // change: of even and odd t, in quarters 1, 2 and 3; the last of bits of the mask only, and by
  // lop3, or its XOR is made anew for each t.
  uint32_t word[4], change[3][2];
  static constexpr int kMaskedXor = (ptx::kLop3A ^ ptx::kLop3B) & ptx::kLop3C,
                       kMaskedNotXor = (~ptx::kLop3A & ptx::kLop3B) ^ ptx::kLop3C;

  __device__ __forceinline__ explicit PairDraws(const Philox4& call) {
    const uint32_t low = call.w[0] ^ call.w[1], high = call.w[2] ^ call.w[3];
    word[0] = __byte_perm(call.w[0], call.w[2], 0x5511);
    word[1] = odd(__byte_perm(call.w[0], call.w[2], 0x7733));
    word[2] = __byte_perm(call.w[1], call.w[3], 0x5511);
    word[3] = odd(__byte_perm(call.w[1], call.w[3], 0x7733));
    change[0][0] = __byte_perm(low, low, 0x3333);  // their halves change places
    change[0][1] = odd(__byte_perm(low, low, 0x1111));
    change[1][0] = __byte_perm(high, high, 0x3333);
    change[1][1] = odd(__byte_perm(high, high, 0x1111));
    change[2][0] = ptx::lop3<kMaskedXor>(change[0][0], change[1][0], mask(0));
    change[2][1] = ptx::lop3<kMaskedXor>(change[0][1], change[1][1], mask(1));
  }
  // A product, or it would be a shift after each XOR.
  __device__ __forceinline__ static uint32_t odd(uint32_t bytes) {
    return ptx::mad_lo_u32(bytes, 32u, 0u);
  }
  __device__ __forceinline__ static uint32_t mask(int t) {
    return t % 2 ? 0x1FE01FE0u : 0x00FF00FFu;
  }
  __device__ __forceinline__ uint32_t complement(int s, int t) const {
    if (s == 0) return ~word[t] & mask(t);
    if (s == 3) return ptx::lop3<kMaskedNotXor>(word[t], mask(t), change[2][t % 2]);
    return ~(word[t] ^ change[s - 1][t % 2]) & mask(t);
  }
};

// The magnitudes of codes t and t + 4 of a word as float16 bits: 2^-14 times their values.
__device__ __forceinline__ uint32_t raw_pair(uint32_t codes, int t) {
  const uint32_t moved = t < 3 ? codes << (9 - 4 * t) : codes >> 3;
  return moved & 0x0E000E00u;
}

// 32 codes of a column, scaled by units, to the codes of the block.
__device__ __forceinline__ StripBlock round_codes(const uint4& column, const uint32_t (&units)[16],
                                                  uint32_t largest, const PhiloxSchedule& keys,
                                                  uint32_t group) {
  const uint32_t codes[4] = {column.x, column.y, column.z, column.w};
  uint32_t v[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) v[i] = ptx::mul_rn_f16x2(raw_pair(codes[i / 4], i % 4), units[i]);
  uint32_t m[2] = {v[0], v[1]};
#pragma unroll
  for (int i = 2; i < 14; i += 4)
#pragma unroll
    for (int j = 0; j < 2; ++j)  // one instruction from sm_90 on
      m[j] = ptx::max_f16x2(ptx::max_f16x2(m[j], v[i + j]), v[i + j + 2]);
  const uint32_t m2 = ptx::max_f16x2(ptx::max_f16x2(m[0], v[14]), ptx::max_f16x2(m[1], v[15]));
  const uint32_t exponent = max(m2, m2 << 16) >> 26;       // 6 to 17, of zeros 0
  const uint32_t to_grid = (18 - exponent) * 0x04000400u;  // 2^-14 / S
  // Of a block of zeros, whose magnitudes come out as 0, it takes the signs and the scale: -1
  // there, else 0. On the multiply-add pipe, which has time.
  const uint32_t empty = static_cast<uint32_t>((static_cast<int>(exponent) - 1) >> 31);
  const PairDraws draws(philox_group(keys, group));
  uint32_t w[4];
#pragma unroll
  for (int s = 0; s < kQuarters; ++s) {
    uint32_t u[4], pair[2];
#pragma unroll
    for (int t = 0; t < 4; ++t) u[t] = ptx::mul_rn_f16x2(v[4 * s + t], to_grid);
#pragma unroll
    for (int t = 0; t < 4; t += 2) {
      // u's 12 bits and their carries stay in their half. Codes in bits 9..11 and 13..15.
      const uint32_t even = ptx::mad_lo_u32(draws.complement(s, t), 2u, u[t]),
                     odd = ptx::mad_lo_u32(u[t + 1], 16u, draws.complement(s, t + 1));
      pair[t / 2] = ptx::lop3_select(odd, even, 0xE000E000u);
    }
    const uint32_t joined = __byte_perm(pair[0], pair[1], 0x7351) >> 1;
    w[s] = ptx::lop3_select(ptx::mad_lo_u32(codes[s], empty, codes[s]), joined, 0x88888888u);
  }
  const uint32_t scale = largest + exponent - 17;
  return {make_uint4(w[0], w[1], w[2], w[3]), ptx::mad_lo_u32(scale, empty, scale)};
}

// The same from any scales, by float32.
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

// A warp's band, in place: rows of codes to blocks of columns. at: of the tile.
__device__ __forceinline__ void round_band(const QuantizeParams& p, const CodeGrid& g,
                                           const CodePlace& at, const StripOperand<false>& operand,
                                           uint32_t band, CodeShared& tile) {
  const uint32_t lane = ptx::lane_id();
  const uint32_t k = at.row + 32 * band, kp = static_cast<uint32_t>(p.kp);
  if (k >= kp) return;
  uint4(&rows)[CodeTraits::kSquares][4] = tile.rows[band];
  const Square square = survey(tile, band, g.pairs, rows);
  transpose_codes(tile, band);
  const uint32_t group = (at.column + lane * CodeTile::kLaneColumns) * (kp / 32) + k / 32;
  const uint32_t columns = ptx::shared_address(tile.codes) + CodeTile::column(band, lane, 0),
                 scales =
                     ptx::shared_address(tile.block_scales) + CodeTile::block_scale(band, lane, 0);
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

// 4 lanes write the 4 blocks of an operand row.
__device__ __forceinline__ void store_codes(const QuantizeParams& p, const CodePlace& at,
                                            uint32_t thread, CodeShared& tile) {
  const uint32_t block = at.row / 32 + thread % CodeTile::kBands,
                 row = at.column + thread / CodeTile::kBands;
  const uint32_t rows = static_cast<uint32_t>(p.rows), blocks = static_cast<uint32_t>(p.kp) / 32;
  const uint32_t left = block < blocks && row < rows ? rows - row : 0;
  const uint32_t from = ptx::opaque(ptx::shared_address(tile.codes) + CodeTile::stored(thread));
  uint8_t* to = p.data + (static_cast<uint64_t>(row) * blocks + block) * 16;
  const uint64_t pitch = static_cast<uint64_t>(blocks) * (16 * CodeTile::kStoreColumns);
  const auto store = [&](uint32_t i) {
    *reinterpret_cast<uint4*>(to + i * pitch) =
        ptx::ld_shared_v4(CodeTile::stored_further(from, i));
  };
  if (left > (CodeTile::kStores - 1) * CodeTile::kStoreColumns) {
#pragma unroll
    for (uint32_t i = 0; i < CodeTile::kStores; ++i) store(i);
    return;
  }
#pragma unroll 1
  for (uint32_t i = 0; i * CodeTile::kStoreColumns < left; ++i) store(i);
}

// A thread writes the 4 scales of two operand rows.
__device__ __forceinline__ void store_scales(const QuantizeParams& p, const CodeGrid& g,
                                             const CodePlace& at, uint32_t thread,
                                             const uint8_t* block_scales) {
  const uint32_t kp = static_cast<uint32_t>(p.kp);
#pragma unroll
  for (uint32_t word = thread; word < CodeTile::kColumns; word += CodeTile::kThreads) {
    const uint32_t row = at.column + CodeTile::scaled_column(word);
    if (row >= static_cast<uint32_t>(p.rows)) continue;
    const uint8_t* from = block_scales + word * CodeTile::kBands;
    uint8_t* to = p.scale + (static_cast<uint64_t>(row) * (kp / 32) + at.row / 32);
    if (g.stores4) {
      *reinterpret_cast<uint32_t*>(to) = *reinterpret_cast<const uint32_t*>(from);
      continue;
    }
#pragma unroll 1
    for (uint32_t b = 0; b < CodeTile::kBands; ++b) {
      const uint32_t k = at.row + 32 * b;
      if (k < kp) *(p.swizzled ? scale_at<Mxfp4>(p, row, k) : to + b) = from[b];
    }
  }
}

__global__ void __launch_bounds__(CodeTile::kThreads, CodeTraits::kCtas)
    requantize_codes_kernel(const QuantizeParams p, const StripPlan plan, const CodeGrid g) {
  __shared__ CodeShared tile;
  begin_early();
  const CodePlace at(g, blockIdx.x);
  const uint32_t warp = uniform(threadIdx.x / 32);
  copy_codes(g, at, warp, tile);
  copy_scales(p, g, at, thread_id(warp), tile);
  const PhiloxSchedule keys = uniform_schedule(p);
  const StripOperand<false> operand = {plan, keys, nullptr, 0};
  ptx::cp_async_wait_all();
  __syncwarp();  // a warp waits for its own rows only
  round_band(p, g, at, operand, warp, tile);
  __syncthreads();
  store_codes(p, at, thread_id(warp), tile);
  store_scales(p, g, at, thread_id(warp), tile.block_scales);
}

}  // namespace

// ---- launcher ----

// As can_strip_columns says, without a rotation.
cudaError_t launch_requantize_codes(const QuantizeParams& p, cudaStream_t stream) {
  const auto narrow = [](int64_t n) { return static_cast<uint32_t>(n); };
  const int64_t across = (p.rows + CodeTile::kColumns - 1) / CodeTile::kColumns,
                down = (p.kp + CodeTile::kRows - 1) / CodeTile::kRows;
  const auto words = [](const uint8_t* scales, int64_t in_row, int64_t size) {
    return in_row % size == 0 && reinterpret_cast<uintptr_t>(scales) % size == 0;
  };
  const CodeGrid g = {static_cast<const uint8_t*>(p.x),
                      narrow(p.cols),
                      narrow(p.in_blocks),
                      Divisor::of(across),
                      p.prescale == 1.0f,
                      words(p.in_scale, p.in_blocks, CodeTile::kColumns / 32),
                      !p.swizzled && words(p.scale, p.kp / 32, CodeTile::kBands)};
  return launch_early(requantize_codes_kernel, narrow(across * down), CodeTile::kThreads, 0, stream,
                      p, make_plan<Strip::kStochastic>(p), g);
}

}  // namespace mxtrain::cuda
