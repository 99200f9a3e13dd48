// SPDX-License-Identifier: Apache-2.0
// int8_block on the CPU: a block of 128 x 128 to codes, its scale and, where it falls back, the
// residual; and one 128 x 128 block of a product. formats/int8.h has the arithmetic.
#include "formats/int8.h"

#include "cpu/draws.h"
#include "cpu/tiles.h"

namespace mxtrain::cpu::MXT_ISA {

constexpr int kBlock = kInt8Block;
constexpr int kStrips = kBlock / kTileR;  // a block is loaded 16 rows at a time
static_assert(kBlock <= kTileK && kBlock % kTileR == 0, "a block is whole strips of tiles");

using Block = float[kBlock][kBlock];

static int smaller(int64_t a, int b) { return static_cast<int>(a < b ? a : b); }

// ---- quantize ----

struct Extent {
  int64_t r0, k0;
  int rows, cols;  // that exist
};

// Zeros stand where nothing exists.
static void load_block(const Source& x, const Extent& e, Block& v) {
  alignas(64) Tile tile;
  for (int s = 0; s < kStrips; ++s) {
    const int rows = e.rows - s * kTileR < kTileR ? e.rows - s * kTileR : int{kTileR};
    if (rows > 0) load_tile(x, e.r0 + s * kTileR, e.k0, rows, e.cols, kBlock, tile);
    for (int r = 0; r < kTileR; ++r)
      for (int k = 0; k < kBlock; ++k) v[s * kTileR + r][k] = r < rows ? tile[r][k] : 0.0f;
  }
}

static uint32_t block_amax(const Block& v) {
  uint32_t m = 0;
  for (int r = 0; r < kBlock; ++r)
    for (int k = 0; k < kBlock; ++k) {
      const uint32_t a = float_bits(v[r][k]) & ~kSignBit;
      m = a > m ? a : m;
    }
  return m;
}

// Codes of v into both forms; v becomes what they leave of it.
static void encode_block(const Int8QuantizeParams& p, const Extent& e, bool stochastic,
                         const Int8Scale& s, Block& v, int8_t* data, int8_t* data_t) {
  for (int r = 0; r < e.rows; ++r) {
    int8_t codes[kBlock];
    float rounded[kBlock];
    if (stochastic) {
      uint32_t draws[kBlock];
      draw_row(p.key, static_cast<uint64_t>((e.r0 + r) * p.kp + e.k0) / kDrawGroup, kBlock, draws);
      for (int k = 0; k < kBlock; ++k)
        rounded[k] = int8_stochastic(v[r][k] * s.reciprocal, draws[k]);
    } else {
      for (int k = 0; k < kBlock; ++k) rounded[k] = int8_nearest(v[r][k] * s.reciprocal);
    }
    for (int k = 0; k < kBlock; ++k) codes[k] = int8_code(rounded[k]);
    for (int k = 0; k < kBlock; ++k) v[r][k] = int8_residual(v[r][k], s.scale, rounded[k]);
    if (data) memcpy(data + (e.r0 + r) * p.kp + e.k0, codes, kBlock);
    if (data_t)
      for (int k = 0; k < e.cols; ++k) data_t[(e.k0 + k) * p.rp + e.r0 + r] = codes[k];
  }
  if (data_t && e.rows < kBlock)
    for (int k = 0; k < e.cols; ++k)
      memset(data_t + (e.k0 + k) * p.rp + e.r0 + e.rows, 0, kBlock - e.rows);
}

static void clear(Block& v) {
  for (int r = 0; r < kBlock; ++r)
    for (int k = 0; k < kBlock; ++k) v[r][k] = 0.0f;
}

Int8BlockState int8_quantize(const Int8QuantizeParams& p, int64_t i, int64_t k) {
  const Extent e = {i * kBlock, k * kBlock, smaller(p.rows - i * kBlock, kBlock),
                    smaller(p.cols - k * kBlock, kBlock)};
  const int64_t at = i * (p.kp / kBlock) + k;
  alignas(64) Block v;
  load_block(p.x, e, v);
  const uint32_t amax = block_amax(v);
  const Int8Scale s = int8_scale(amax);
  if (amax >= kInfBits) clear(v);
  p.scale[at] = s.scale;
  encode_block(p, e, p.rounding == Rounding::kStochastic, s, v, p.data, p.data_t);
  const bool fell_back = p.mask && int8_falls_back(amax, p.threshold);
  if (p.mask) {
    p.mask[at] = fell_back;
    p.residual_scale[at] = 0.0f;
  }
  if (fell_back) {
    const Int8Scale d = int8_scale(block_amax(v));
    p.residual_scale[at] = d.scale;
    encode_block(p, e, false, d, v, p.residual, p.residual_t);
  }
  return {fell_back, amax >= kInfBits, amax != 0};
}

// ---- gemm ----

using Wide = int16_t[kBlock][kBlock];

// A block's codes as 16-bit integers: `rows` of them, `pitch` apart.
static void widen(const int8_t* codes, int64_t pitch, int rows, Wide& w) {
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < kBlock; ++c) w[r][c] = codes[r * pitch + c];
}

// Block (i, k) of a matrix of rows of kp.
static const int8_t* block_of(const int8_t* data, int64_t kp, int64_t i, int64_t k) {
  return data + i * kBlock * kp + k * kBlock;
}

// acc += scale * (A B^T) of blocks of rows x cols.
static void add_product(const Wide& a, const Wide& b, int rows, int cols, float scale, float* acc,
                        int64_t pitch) {
  for (int r = 0; r < rows; ++r) {
    float products[kBlock];
    for (int c = 0; c < cols; ++c) {
      int32_t sum = 0;
      for (int k = 0; k < kBlock; ++k) sum += a[r][k] * b[c][k];
      products[c] = static_cast<float>(sum);
    }
    for (int c = 0; c < cols; ++c)
      acc[r * pitch + c] = int8_promote(acc[r * pitch + c], scale, products[c]);
  }
}

static float scale_at(const Int8Codes& codes, int64_t i, int64_t k) {
  return codes.scale[i * codes.stride_row + k * codes.stride_k];
}

void int8_gemm(const Int8GemmParams& p, int64_t i, int64_t j) {
  const int rows = smaller(p.m - i * kBlock, kBlock), cols = smaller(p.n - j * kBlock, kBlock);
  float* acc = p.acc + i * kBlock * p.n + j * kBlock;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < cols; ++c) acc[r * p.n + c] = 0.0f;
  alignas(64) Wide a, b;
  const int64_t own = p.residual_of_b ? j : i;
  for (int64_t k = 0; k < p.kp / kBlock; ++k) {
    const float sa = scale_at(p.a, i, k), sb = scale_at(p.b, j, k);
    widen(block_of(p.a.data, p.kp, i, k), p.kp, rows, a);
    widen(block_of(p.b.data, p.kp, j, k), p.kp, cols, b);
    add_product(a, b, rows, cols, sa * sb, acc, p.n);
    const int64_t fallen = p.mask.given() ? p.mask.at(own, k) : 0;
    if (fallen == 0) continue;
    const float d = scale_at(p.residual, own, k);
    const int8_t* codes = p.mask.slots ? p.residual.data + (fallen - 1) * kBlock * kBlock
                                       : block_of(p.residual.data, p.kp, own, k);
    widen(codes, p.mask.slots ? kBlock : p.kp, p.residual_of_b ? cols : rows,
          p.residual_of_b ? b : a);
    add_product(a, b, rows, cols, p.residual_of_b ? sa * d : d * sb, acc, p.n);
  }
}

}  // namespace mxtrain::cpu::MXT_ISA
