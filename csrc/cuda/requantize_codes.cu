// SPDX-License-Identifier: Apache-2.0
// requantize, mxfp4 to mxfp4, stochastic, not rotated. A lane takes 32 x 8 codes, transposes them
// as nibbles, and rounds 8 blocks, one after the other, two elements a word.
//
// The source's codes carry one mantissa bit and a power of two that a whole row of the 32 x 32
// square shares, so float16 holds what rounding needs. With the square's scales within 8 binades of
// the largest, v = code * 2^(e - largest) and b = v + max(v, S) are exact (d = log2 of S over the
// row's scale is at most 8: b is S times 1 + code / 2^d, 10 bits), and b's bits above the cut at
// bit 9 are the code, as in encode.cuh. The fraction below has 9 bits, so the draw's first 9 decide
// (F / 512 * 2^17 > 2 r + 1 just where F > r / 128 rounded down), and one integer addition of their
// complement rounds both halves. Every rule takes the same scale, since no magnitude's mantissa
// exceeds that of the largest element, and no element exceeds 6 S. Squares of other scales, NaN,
// and prescales go element by element (strip.cuh).
//
// A warp's tile is 128 rows x 64 columns of x, 4 x 8 lanes. Warps work for themselves and are
// persistent; a tile's codes are copied to shared memory while the one before is rounded.
#include "cuda/divide.cuh"
#include "cuda/launch.cuh"
#include "cuda/strip.cuh"
#include "ptx/f16x2.cuh"

namespace mxtrain::cuda {

namespace {

// ---- traits ----

struct CodeTraits {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kCtas = 5;  // of an SM, as many as registers and shared memory allow
  static constexpr int kHeight = 128, kWidth = 64;  // of a warp's tile, in codes
  static constexpr int kColumns = 8;                // of a lane: the nibbles of a word
  static constexpr int kLanesAcross = kWidth / kColumns;
  static constexpr int kChunks = kHeight * kWidth / 32;  // of 16 bytes, in a tile
  static constexpr int kSquares = kChunks / 32;          // 32 x 32, each of 4 lanes
  // Scales that neither under- nor overflow on the way, and how far they may lie apart.
  static constexpr uint32_t kFirst = 16, kLast = 250, kBinades = 8;
};

// The packed operand: `height` rows of `blocks` blocks. across: tiles in a row of tiles.
struct CodeGrid {
  const uint8_t* x;
  uint32_t height, blocks, tiles;
  Divisor across;
};

struct CodePlace {
  uint32_t row, column;
  __device__ __forceinline__ CodePlace(const CodeGrid& g, uint32_t tile) {
    const uint32_t down = g.across.divide(tile);
    row = down * CodeTraits::kHeight;
    column = (tile - down * g.across.value) * CodeTraits::kWidth;
  }
};

// A warp's part of shared memory.
struct alignas(128) CodeTile {
  uint4 source[CodeTraits::kChunks];        // as in memory, two chunks a row: see chunk_at
  uint4 columns[32][CodeTraits::kColumns];  // of a lane: column n, 32 codes down, at n ^ lane % 8
  uint4 units[CodeTraits::kSquares][4];     // 2^(e - largest), of the pairs of rows of 8: see below
  uint2 scales[CodeTraits::kSquares][4];    // e of each row, where they are needed

  // Rows 32 apart, which 8 lanes each read at once, lie in different banks.
  __device__ static __forceinline__ int chunk_at(int row, int half) {
    return row / 4 * 8 + ((row % 4 * 2 + half) ^ (row / 32 * 2));
  }
};

// ---- codes: in, and transposed ----

// Start filling the source of a tile, zeros outside of x.
__device__ __forceinline__ void copy_codes(const CodeGrid& g, CodePlace at, bool whole,
                                           CodeTile& tile) {
  constexpr int kStep = 16;  // rows of 32 lanes
  const int lane = threadIdx.x % 32, first = lane / 2, half = lane % 2;
  const uint32_t block = at.column / 32 + half, row = at.row + first;
  const uint8_t* from = g.x + (static_cast<uint64_t>(row) * g.blocks + block) * 16;
  const uint64_t pitch = static_cast<uint64_t>(g.blocks) * (16 * kStep);
  if (whole) {
    const uint32_t to = ptx::shared_address(tile.source + CodeTile::chunk_at(first, half));
#pragma unroll
    for (int i = 0; i < CodeTraits::kHeight / kStep; ++i, from += pitch)
      ptx::cp_async_16((to ^ (i / 2 * 32)) + i * kStep * 32, from, 16);
    return;
  }
#pragma unroll 1
  for (int r = first; r < CodeTraits::kHeight; r += kStep, from += pitch) {
    const bool inside = at.row + r < g.height && block < g.blocks;
    ptx::cp_async_16(ptx::shared_address(tile.source + CodeTile::chunk_at(r, half)),
                     inside ? from : g.x, inside ? 16 : 0);
  }
}

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

// A lane's 32 x 8 codes from tile.source to tile.columns.
__device__ __forceinline__ void transpose_codes(CodeTile& tile) {
  const int lane = threadIdx.x % 32, down = lane / CodeTraits::kLanesAcross,
            word = lane % CodeTraits::kLanesAcross;
  const uint32_t* from[4];  // of rows 0 to 3; every 4 rows are 128 bytes further
#pragma unroll
  for (int j = 0; j < 4; ++j)
    from[j] = reinterpret_cast<const uint32_t*>(tile.source +
                                                CodeTile::chunk_at(32 * down + j, word / 4)) +
              word % 4;
  uint32_t columns[4][8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t w[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) w[j] = from[j % 4][(8 * i + j) / 4 * 32];
    transpose_nibbles(w, columns[i]);
  }
#pragma unroll
  for (int n = 0; n < CodeTraits::kColumns; ++n)
    tile.columns[lane][n ^ (lane % 8)] =
        make_uint4(columns[0][n], columns[1][n], columns[2][n], columns[3][n]);
}

// ---- scales of the source ----

// Of 8 rows: lane 4 s + i takes rows 8 i to 8 i + 7 of square s, whose 4 lanes all need them.
struct RowScales {
  uint32_t code[8];

  __device__ __forceinline__ void load(const QuantizeParams& p, const CodeGrid& g, CodePlace at,
                                       bool whole) {
    const uint32_t lane = threadIdx.x % 32, block = at.column / 32 + lane / 4 % 2,
                   row = at.row + lane / 8 * 32 + lane % 4 * 8;
    const uint8_t* from = p.in_scale + (static_cast<uint64_t>(row) * g.blocks + block);
    if (whole) {
#pragma unroll
      for (int t = 0; t < 8; ++t, from += g.blocks) code[t] = ptx::ld_global_nc_u8(from);
      return;
    }
    const uint32_t rows = block < g.blocks && row < g.height ? g.height - row : 0;
    from = rows ? from : p.in_scale;
#pragma unroll
    for (uint32_t t = 0; t < 8; ++t) {
      code[t] = t < rows ? ptx::ld_global_nc_u8(from) : 0u;
      from += t + 1 < rows ? g.blocks : 0;
    }
  }

  // Whether some of the rows whose scale is 0 hold other codes than zeros.
  __device__ __forceinline__ bool hides_codes(const CodeTile& tile) const {
    const int lane = threadIdx.x % 32;
    uint32_t found = 0;
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      const uint4 w =
          tile.source[CodeTile::chunk_at(lane / 8 * 32 + lane % 4 * 8 + t, lane / 4 % 2)];
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

  __device__ __forceinline__ uint2 packed() const {
    return make_uint2(code[0] | code[1] << 8 | code[2] << 16 | code[3] << 24,
                      code[4] | code[5] << 8 | code[6] << 16 | code[7] << 24);
  }
};

// What a lane's 8 blocks share.
struct Square {
  uint32_t largest;  // code of the largest scale
  bool fast;         // the same in all lanes
};

// Leaves the units, or the scales, in the tile; its source must still be there.
__device__ __forceinline__ Square survey(const RowScales& rows, float prescale, CodeTile& tile) {
  const int lane = threadIdx.x % 32;
  uint32_t largest = 0, smallest = 255, least = 255;  // smallest: but for zeros, less 1
#pragma unroll
  for (int t = 0; t < 8; ++t) {
    largest = max(largest, rows.code[t]);
    least = min(least, rows.code[t]);
    smallest = min(smallest, (rows.code[t] - 1) & 0xFFu);
  }
  const bool hidden =
      __any_sync(kAllLanes, least == 0) && __any_sync(kAllLanes, rows.hides_codes(tile));
#pragma unroll
  for (int lanes = 1; lanes < 4; lanes *= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
    smallest = min(smallest, __shfl_xor_sync(kAllLanes, smallest, lanes));
  }
  const bool near =
      largest == 0 || (smallest + 1 >= CodeTraits::kFirst && largest <= CodeTraits::kLast &&
                       largest - smallest - 1 <= CodeTraits::kBinades);
  const bool fast = __all_sync(kAllLanes, near) && !hidden && prescale == 1.0f;
  if (fast)
    tile.units[lane / 4][lane % 4] = rows.units(largest);
  else
    tile.scales[lane / 4][lane % 4] = rows.packed();
  return {largest, fast};
}

// ---- one block ----

// ~draw's first 9 bits of elements t and t + 4 of a quarter, in each half from bit 0 (even t) or 4
// (odd t) up: ~(word[t] ^ change[s]) under a mask. See quarter_words: even t takes low halves.
struct PairDraws {
  uint32_t word[4], change[4][2];  // change: of even and odd t

  __device__ __forceinline__ explicit PairDraws(const Philox4& call) {
    uint32_t even[4], odd[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) even[i] = call.w[i] >> 7, odd[i] = even[i] << 4;
    const uint32_t low = even[0] ^ even[1], high = even[2] ^ even[3];
    word[0] = __byte_perm(even[0], even[2], 0x5410);
    word[1] = __byte_perm(odd[0], odd[2], 0x7632);
    word[2] = __byte_perm(even[1], even[3], 0x5410);
    word[3] = __byte_perm(odd[1], odd[3], 0x7632);
    change[0][0] = change[0][1] = 0;  // their halves change places
    change[1][0] = __byte_perm(low, low, 0x3232);
    change[1][1] = __byte_perm(low << 4, 0, 0x1010);
    change[2][0] = __byte_perm(high, high, 0x3232);
    change[2][1] = __byte_perm(high << 4, 0, 0x1010);
    change[3][0] = change[1][0] ^ change[2][0];
    change[3][1] = change[1][1] ^ change[2][1];
  }
  __device__ __forceinline__ uint32_t complement(int s, int t) const {
    return ~(word[t] ^ change[s][t % 2]) & (t % 2 ? 0x1FF01FF0u : 0x01FF01FFu);
  }
};

// The magnitudes of codes t and t + 4 of a word as float16 bits: 2^-14 times their values.
__device__ __forceinline__ uint32_t raw_pair(uint32_t codes, int t) {
  const uint32_t moved = t < 3 ? codes << (9 - 4 * t) : codes >> 3;
  return moved & 0x0E000E00u;
}

// 32 codes of a column, scaled by units, to the codes of the block.
__device__ __forceinline__ StripBlock round_codes(const uint4& column, const uint32_t (&units)[16],
                                                  uint32_t largest, const StripTables& tables,
                                                  uint64_t group, uint32_t stream) {
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
  const uint32_t bits = max(m2 & 0xFFFFu, m2 >> 16), exponent = max(bits >> 10, 2u);
  const bool empty = bits == 0;  // then S is 0, and all magnitudes come out as 0
  const uint32_t s2 = (exponent - 2) * 0x04000400u;
  const uint32_t first = (2 * exponent + 4) % 8 * 0x11111111u;  // what code 0 leaves in a nibble
  const uint32_t signs = empty ? 0u : 0x88888888u;
  const PairDraws draws(draw_block(tables, group, stream));
  uint32_t w[4];
#pragma unroll
  for (int s = 0; s < kQuarters; ++s) {
    uint32_t b[4], pair[2];
#pragma unroll
    for (int t = 0; t < 4; ++t)
      b[t] = ptx::add_rn_f16x2(v[4 * s + t], ptx::max_f16x2(v[4 * s + t], s2));
#pragma unroll
    for (int t = 0; t < 4; t += 2) {
      // Codes in bits 9..11 and 13..15. What the low half pushes over its edge stays below the
      // high half's draw.
      const uint32_t even = b[t] + draws.complement(s, t),
                     odd = ptx::mad_lo_u32(b[t + 1], 16u, draws.complement(s, t + 1));
      pair[t / 2] = ptx::lop3_select(odd, even, 0xE000E000u);
    }
    const uint32_t joined = __byte_perm(pair[0], pair[1], 0x7351) >> 1;
    const uint32_t magnitudes = (joined | 0x88888888u) - first;
    w[s] = ptx::lop3_select(codes[s] & signs, magnitudes, 0x88888888u);
  }
  return {make_uint4(w[0], w[1], w[2], w[3]), empty ? 0u : largest + exponent - 17};
}

// The same from any scales, by float32.
__device__ __forceinline__ StripBlock round_values(const uint4& column, const uint2 (&scales)[4],
                                                   const QuantizeParams& p,
                                                   const StripTables& tables, uint64_t group) {
  const uint32_t codes[4] = {column.x, column.y, column.z, column.w};
  float v[32];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint2 packed = scales[i];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[8 * i + j] = decode<E2M1>(codes[i] >> (4 * j) & 15u) *
                     e8m0_value((j < 4 ? packed.x : packed.y) >> (8 * (j % 4)) & 0xFFu);
  }
  return quantize_block<Strip::kStochastic>(v, amax32(v), p, tables, group);
}

// ---- kernel ----

__global__ void __launch_bounds__(CodeTraits::kThreads, CodeTraits::kCtas)
    requantize_codes_kernel(const QuantizeParams p, const CodeGrid g) {
  __shared__ CodeTile tiles[CodeTraits::kWarps];
  __shared__ StripTables tables;
  fill_tables<Strip::kStochastic>(tables, p);
  __syncthreads();
  const uint32_t warp = __shfl_sync(kAllLanes, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const uint32_t step = gridDim.x * CodeTraits::kWarps;
  CodeTile& mine = tiles[warp];
  uint32_t tile = blockIdx.x * CodeTraits::kWarps + warp;
  if (tile >= g.tiles) return;
  RowScales rows;
  const auto fetch = [&](const CodePlace& at) {
    const bool whole =
        at.row + CodeTraits::kHeight <= g.height && at.column + CodeTraits::kWidth <= g.blocks * 32;
    copy_codes(g, at, whole, mine);
    rows.load(p, g, at, whole);
  };
  fetch(CodePlace(g, tile));
  for (; tile < g.tiles; tile += step) {
    const CodePlace at(g, tile);
    ptx::cp_async_wait_all();
    __syncwarp();
    const Square square = survey(rows, p.prescale, mine);
    transpose_codes(mine);
    __syncwarp();
    if (tile + step < g.tiles) fetch(CodePlace(g, tile + step));
    uint32_t units[16];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 u = mine.units[lane / 4][i];
      units[4 * i] = u.x, units[4 * i + 1] = u.y, units[4 * i + 2] = u.z, units[4 * i + 3] = u.w;
    }
    const uint32_t k = at.row + lane / CodeTraits::kLanesAcross * 32,
                   first = at.column + lane % CodeTraits::kLanesAcross * CodeTraits::kColumns,
                   blocks = tables.plan.kp / 32;
    const int valid = k < tables.plan.kp ? static_cast<int>(tables.plan.rows - first) : 0;
    uint64_t group = static_cast<uint64_t>(first) * blocks + k / 32;
    const uint32_t columns = ptx::shared_address(&mine.columns[lane][lane % 8]);
#pragma unroll 1
    for (int n = 0; n < CodeTraits::kColumns; ++n, group += blocks) {
      const uint4 column = ptx::ld_shared_v4(columns ^ (n * 16));
      const StripBlock b = square.fast
                               ? round_codes(column, units, square.largest, tables, group, p.stream)
                               : round_values(column, mine.scales[lane / 4], p, tables, group);
      if (n >= valid) continue;
      reinterpret_cast<uint4*>(p.data)[group] = b.codes;
      *(p.swizzled ? scale_at<Mxfp4>(p, first + n, k) : p.scale + group) =
          static_cast<uint8_t>(b.scale);
    }
    __syncwarp();
  }
}

}  // namespace

// ---- launcher ----

// As can_strip_columns says, without a rotation.
cudaError_t launch_requantize_codes(const QuantizeParams& p, cudaStream_t stream) {
  const auto narrow = [](int64_t n) { return static_cast<uint32_t>(n); };
  const int64_t across = (p.rows + CodeTraits::kWidth - 1) / CodeTraits::kWidth,
                down = (p.kp + CodeTraits::kHeight - 1) / CodeTraits::kHeight;
  const CodeGrid g = {static_cast<const uint8_t*>(p.x), narrow(p.cols), narrow(p.in_blocks),
                      narrow(across * down), Divisor::of(across)};
  int sms = 0;
  const cudaError_t error = count_multiprocessors(&sms);
  if (error != cudaSuccess) return error;
  const int64_t wanted = ceil_div(across * down, CodeTraits::kWarps),
                most = sms * CodeTraits::kCtas;
  return launch(requantize_codes_kernel, narrow(wanted < most ? wanted : most),
                CodeTraits::kThreads, stream, p, g);
}

}  // namespace mxtrain::cuda
