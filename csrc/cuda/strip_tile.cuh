// SPDX-License-Identifier: Apache-2.0
// Strips from a warp's tile of 64 x 64 bfloat16 in shared memory: how it lies there, and the passes
// over its rows and columns, which take lanes' blocks to registers and hand them to strip.cuh. A
// tile is given by its address in shared memory.
#pragma once

#include "cuda/strip.cuh"

namespace mxtrain::cuda {

// Chunk j of 16 bytes of tile row r lies at j ^ r % 8 ^ r / 32 * 4. So every bank is touched once
// by lanes that read both blocks of 4 rows, by lanes that read words of 32 columns, or 16 columns,
// of rows r and r + 32, and by the copies.
__device__ __forceinline__ uint32_t strip_offset(uint32_t r, uint32_t chunk) {
  return r * StripTraits::kRowBytes + ((chunk ^ (r & 7) ^ (r / 32 * 4)) * 16);
}

__device__ __forceinline__ float widen_with_sign(uint32_t half, uint32_t sign) {
  return bits_float(ptx::mad_lo_u32(half, 1u << 16, sign));  // adding bit 31 flips it
}

// v[i] = element(i, sign bit); the signs are those of half b of the Hadamard group's 64.
template <Strip kStrip, StripSide kSide, class Tables, class Element>
__device__ __forceinline__ void fill_block(float (&v)[32], const Tables& tables, int b,
                                           Element element) {
#pragma unroll
  for (int i = 0; i < 32; i += 4) {
    uint4 four = {};
    if (rotates(kStrip)) four = tables.signs[8 * b + i / 4];
    const uint32_t s[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i + j] = element(i + j, s[sign_slot(kSide, j)]);
  }
}

// A block of a row, whose first chunk lies at `from`.
__device__ __forceinline__ void read_row_block(uint32_t from, uint32_t (&w)[16]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint4 raw = ptx::ld_shared_v4(from ^ (j * 16));
    w[4 * j] = raw.x, w[4 * j + 1] = raw.y, w[4 * j + 2] = raw.z, w[4 * j + 3] = raw.w;
  }
}

template <Strip kStrip, class Tables>
__device__ __forceinline__ void fill_from_row(float (&v)[32], const Tables& tables, int b,
                                              const uint32_t (&w)[16]) {
  fill_block<kStrip, StripSide::kRows>(v, tables, b, [&](int i, uint32_t sign) {
    return i % 2 ? bits_float((w[i / 2] & 0xFFFF0000u) ^ sign) : widen_with_sign(w[i / 2], sign);
  });
}

// Blocks of bfloat16 pairs as they lie in x, nearest.
template <class Tables>
__device__ __forceinline__ void finish_row_pairs(const uint32_t (&w)[16], const QuantizeParams& p,
                                                 const Tables& tables, const BlockPlace& at) {
  const ScaleChooser<Mxfp4> scales(p);
  BlockScale s;
  const uint4 codes = tables.plan.fits ? quantize_row_block<true>(w, scales, s)
                                       : quantize_row_block<false>(w, scales, s);
  store_block<false>(p, tables, at, at.group(tables.plan.blocks), {codes, s.code});
}

// The sum of a block of x, one element after the other: a run of rows (formats/column_sum.h).
__device__ __forceinline__ void store_run(const QuantizeParams& p, const StripPlan& plan,
                                          uint32_t row, uint32_t k, float sum) {
  if (row < plan.rows && k < plan.kp) p.runs[k / 32 * plan.rows + row] = sum;
}

// The same of 32 rows of two columns, which are operand rows `row` and the next.
template <bool kRuns, class Tables>
__device__ __forceinline__ void finish_column_pairs(const uint32_t (&x2)[32],
                                                    const QuantizeParams& p, const Tables& tables,
                                                    const BlockPlace& at) {
  const uint32_t row = at.row + at.tile_row, k = at.k + at.tile_k;
  if (kRuns) {
    float sum[2] = {};
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      sum[0] += bits_float(x2[i] << 16);
      sum[1] += bits_float(x2[i] & 0xFFFF0000u);
    }
    store_run(p, tables.plan, row, k, sum[0]);
    store_run(p, tables.plan, row + 1, k, sum[1]);
  }
  const ScaleChooser<Mxfp4> scales(p);
  BlockScale s[2];
  uint4 codes[2];
  if (tables.plan.fits)
    quantize_two_blocks<true>(x2, scales, s, codes);
  else
    quantize_two_blocks<false>(x2, scales, s, codes);
  const uint32_t blocks = tables.plan.blocks, group = row * blocks + k / 32;
  store_block<false>(p, tables, at, group, {codes[0], s[0].code});
  store_block<false>(p, tables, at.below(1), group + blocks, {codes[1], s[1].code});
}

// Pass `pass` of the rows: lane 2 i + b takes block b of row 16 pass + i, or, for a group of 64,
// lane i both blocks of row 32 pass + i. (row, k): the operand's at the tile's corner. after_read:
// called when the blocks are in registers, or half of them in codes.
template <Strip kStrip, class Tables, class AfterRead>
__device__ __forceinline__ void row_pass(uint32_t tile, int pass, const QuantizeParams& p,
                                         const Tables& tables, uint32_t row, uint32_t k,
                                         AfterRead after_read) {
  const uint32_t lane = rotates64(kStrip) ? ptx::lane_id() : threadIdx.x % 32;
  uint32_t w[16];
  if constexpr (rotates64(kStrip)) {
    const uint32_t r = pass * 32 + lane;
    const uint32_t from = tile + strip_offset(r, 0);
    float v[2][32];
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      read_row_block(from ^ (b * 64), w);
      fill_from_row<kStrip>(v[b], tables, b, w);
    }
    return finish64<kStrip, RowLanes>(v, p, tables, row, k, pass * 32, after_read);
  }
  const uint32_t b = lane % 2, r = pass * StripTraits::kPassRows + lane / 2;
  const uint32_t first = tile + strip_offset(lane / 2, 4 * b);
  // as strip_offset(r, 4 * b) has it, whose r % 8 no pass changes
  read_row_block((first + pass * (StripTraits::kPassRows * StripTraits::kRowBytes)) ^
                     (pass * StripTraits::kPassRows / 32 * 64),
                 w);
  if constexpr (kStrip == Strip::kPairs) {
    after_read();
    return finish_row_pairs(w, p, tables, {row, k, r, 32 * b});
  }
  float v[32];
  uint32_t m = 0;
  if constexpr (!rotates(kStrip)) {
    uint32_t m4[4];  // four chains, of words from both banks of registers
#pragma unroll
    for (int j = 0; j < 4; ++j) m4[j] = ptx::max_nan_abs_bf16x2(w[2 * j], w[2 * j + 1]);
#pragma unroll
    for (int i = 8; i < 16; ++i) m4[i / 2 % 4] = ptx::max_nan_abs_bf16x2(m4[i / 2 % 4], w[i]);
    const uint32_t m2 = ptx::max_nan_abs_bf16x2(ptx::max_nan_abs_bf16x2(m4[0], m4[1]),
                                                ptx::max_nan_abs_bf16x2(m4[2], m4[3]));
    m = larger_half(m2);
  }
  fill_from_row<kStrip>(v, tables, b, w);
  after_read();
  finish_block<kStrip>(v, m, p, tables, {row, k, r, 32 * b});
}

// Where column c has its elements of rows 32 b + j, j = 0 to 7; every 8 rows are a kilobyte
// further.
__device__ __forceinline__ void column_addresses(uint32_t tile, uint32_t b, uint32_t c,
                                                 uint32_t (&from)[8]) {
  from[0] = tile + strip_offset(32 * b, c / 8) + c % 8 * 2;
#pragma unroll
  for (int j = 1; j < 8; ++j) from[j] = from[0] ^ (j * 16);
}

// Columns by ldmatrix.trans: its lane l gets value l / 4 of two of the 16-byte chunks that others
// address, and which rows and chunks of columns these are is free. So a lane comes to have one
// column, of its own chunk, and in a word its rows r and r + kApart. Groups of 64: lane l has a
// whole column of chunk l % 4; else half l % 2 of one of chunk l % 4 / 2. In either case the 8
// chunks of a matrix lie in different banks.
template <bool k64>
struct ColumnLanes {
  static constexpr uint32_t kApart = k64 ? 4 : 2;
  static constexpr uint32_t kChunks = k64 ? 4 : 2;  // of a pass
  static constexpr uint32_t kNeighbour = 8;         // see RowLanes; where k64

  // The column of a lane, in its pass.
  __device__ static __forceinline__ uint32_t row(uint32_t lane) {
    return lane % 4 / (4 / kChunks) * 8 + lane / 4;
  }
  // Which matrix has row i % 8 of its 8 rows, and the first row of a matrix.
  __device__ static constexpr int matrix(int i) {
    return i % static_cast<int>(kApart) + (k64 ? 0 : i % 8 / 4 * 2);
  }
  __device__ static constexpr uint32_t first_row(uint32_t m) {
    return m % kApart + m / kApart * 2 * kApart;
  }
  // What a lane addresses, of the first 8 rows; every 8 rows are a kilobyte further.
  __device__ static __forceinline__ uint32_t address(uint32_t tile, uint32_t pass, uint32_t lane) {
    const uint32_t to = lane % 8 / 2, half = k64 ? 0 : to % 2,
                   r = first_row(lane / 8) + lane % 2 * kApart + 32 * half;
    return tile + strip_offset(r, pass * kChunks + to / (4 / kChunks));
  }
};

// A block of a column, from the address that ColumnLanes has for its first rows.
template <Strip kStrip, class Tables>
__device__ __forceinline__ void fill_from_column(float (&v)[32], const Tables& tables, int b,
                                                 uint32_t from) {
  using Lanes = ColumnLanes<rotates64(kStrip)>;
  uint32_t w[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) ptx::ldmatrix_x4_trans(w[i], from + i * 8 * StripTraits::kRowBytes);
  fill_block<kStrip, StripSide::kColumns>(v, tables, b, [&](int i, uint32_t sign) {
    const uint32_t pair = w[i / 8][Lanes::matrix(i)];
    return i & Lanes::kApart ? bits_float((pair & 0xFFFF0000u) ^ sign)
                             : widen_with_sign(pair, sign);
  });
}

// Pass `pass` of the columns: in pairs, lane 2 i + b takes rows 32 b and up of columns 32 pass + 2
// i and the next; else lanes take 16 columns, or for a group of 64, 32, by ColumnLanes. (row, k):
// the operand's at the tile's corner. kRuns: also their sums, to p.runs.
template <Strip kStrip, bool kRuns, class Tables, class AfterRead>
__device__ __forceinline__ void column_pass(uint32_t tile, int pass, const QuantizeParams& p,
                                            const Tables& tables, uint32_t row, uint32_t k,
                                            AfterRead after_read) {
  static_assert(!kRuns || !rotates(kStrip), "what is rotated has no sums of x");
  using Lanes = ColumnLanes<rotates64(kStrip)>;
  const uint32_t lane = rotates64(kStrip) ? ptx::lane_id() : threadIdx.x % 32;
  if constexpr (rotates64(kStrip)) {
    const uint32_t from = Lanes::address(tile, pass, lane);
    float v[2][32];
    fill_from_column<kStrip>(v[0], tables, 0, from);  // the second block's chunks are moved by 4
    fill_from_column<kStrip>(v[1], tables, 1, (from ^ 64) + 32 * StripTraits::kRowBytes);
    return finish64<kStrip, Lanes>(v, p, tables, row, k, pass * 32, after_read);
  }
  if constexpr (kStrip == Strip::kPairs) {
    const uint32_t half = lane % 2, c = pass * 32 + lane / 2 * 2;
    uint32_t from[8];
    column_addresses(tile, half, c, from);
    uint32_t x2[32];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      x2[i] = ptx::ld_shared_b32(from[i % 8] + i * StripTraits::kRowBytes);
    after_read();
    return finish_column_pairs<kRuns>(x2, p, tables, {row, k, c, 32 * half});
  }
  const uint32_t b = lane % 2, c = pass * StripTraits::kPassRows + Lanes::row(lane);
  float v[32];
  fill_from_column<kStrip>(v, tables, b, Lanes::address(tile, pass, lane));
  if (kRuns) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; ++i) sum += v[i];
    store_run(p, tables.plan, row + c, k + 32 * b, sum);
  }
  const uint32_t m = rotates(kStrip) ? 0 : amax32(v);
  after_read();
  finish_block<kStrip>(v, m, p, tables, {row, k, c, 32 * b});
}

}  // namespace mxtrain::cuda
