// SPDX-License-Identifier: Apache-2.0
// quantize and requantize on the CPU, one tile of 16 operand rows x 256 elements along K at a time:
//   load (bf16, fp16, fp32 of any strides, or a packed operand) -> Hadamard -> prescale -> block
//   scale -> codes -> packed bytes
// A transposed quantization is the same kernel with the strides exchanged. Zero blocks: scale 0,
// codes 0. A block with NaN or Inf: the NaN scale, codes 0. See docs/numerics.md for the
// arithmetic; formats/ holds it.
#include "cpu/draws.h"
#include "cpu/tiles.h"

namespace mxtrain::cpu::MXT_ISA {

constexpr int kMaxBlock = 32;

struct TileShape {
  int rows, loaded, width;  // rows of the tile, columns that exist, columns with padding
};

static TileShape tile_shape(const QuantizeParams& p, int64_t r0, int64_t k0) {
  const int64_t rows = p.rows - r0, loaded = p.cols - k0, width = p.kp - k0;
  return {static_cast<int>(rows < kTileR ? rows : kTileR),
          static_cast<int>(loaded < kTileK ? (loaded > 0 ? loaded : 0) : kTileK),
          static_cast<int>(width < kTileK ? width : kTileK)};
}

// ---- one block ----

template <int N>
MXT_HD uint32_t amax_bits(const float* v) {
  uint32_t m = 0;
  for (int i = 0; i < N; ++i) {
    const uint32_t a = float_bits(v[i]) & ~kSignBit;
    m = a > m ? a : m;
  }
  return m;
}

template <int Bits, int N>
MXT_HD void pack(const uint8_t* codes, uint8_t* out) {
  if (Bits == 8)
    for (int i = 0; i < N; ++i) out[i] = codes[i];
  if (Bits == 4)
    for (int i = 0; i < N / 2; ++i)
      out[i] = static_cast<uint8_t>(codes[2 * i] | (codes[2 * i + 1] << 4));
  if (Bits == 6)
    for (int i = 0; i < N / 4; ++i) {
      const uint32_t w = codes[4 * i] | (codes[4 * i + 1] << 6) | (codes[4 * i + 2] << 12) |
                         (codes[4 * i + 3] << 18);
      for (int b = 0; b < 3; ++b) out[3 * i + b] = static_cast<uint8_t>(w >> (8 * b));
    }
}

template <class E, Rounding R>
MXT_HD uint32_t encode(float v, float toward, uint32_t draw) {
  if (R == Rounding::kStochastic) return encode_stochastic<E>(v, draw);
  if (R == Rounding::kToward) return encode_toward<E>(v, toward);
  return encode_nearest<E>(v);
}

// Scale code of a block and what its elements are multiplied (E8M0) or divided (E4M3) by.
template <class F>
MXT_HD uint32_t scale_code(uint32_t max_bits, float tensor_scale, ScaleRule rule, float* factor) {
  if (F::kE4M3Scale) {
    const uint32_t code = nvfp4_scale(bits_float(max_bits), tensor_scale, rule);
    *factor = decode<E4M3>(code) * tensor_scale;
    return code;
  }
  const uint32_t code =
      e8m0_scale<typename F::Element>(max_bits, e8m0_round_up<typename F::Element>(rule));
  *factor = e8m0_reciprocal(code);
  return code;
}

template <class F, Rounding R>
static void quantize_block(const QuantizeParams& p, const float* v, const float* toward,
                           const uint32_t* draws, uint8_t* data, uint8_t* scale) {
  using E = typename F::Element;
  constexpr int n = F::kBlock;
  uint8_t codes[n] = {};
  const uint32_t max_bits = amax_bits<n>(v);
  const bool finite =
      max_bits < kInfBits && (R != Rounding::kToward || amax_bits<n>(toward) < kInfBits);
  float factor = 0.0f;
  if (!finite) {
    *scale = static_cast<uint8_t>(F::kE4M3Scale ? kE4M3Nan : kE8M0Nan);
  } else if (max_bits == 0) {
    *scale = 0;
  } else {
    *scale = static_cast<uint8_t>(scale_code<F>(max_bits, p.tensor_scale, p.scale_rule, &factor));
  }
  if (factor != 0.0f) {
    float u[n], z[n];
    const float pre = p.prescale;
    for (int i = 0; i < n; ++i) u[i] = F::kE4M3Scale ? v[i] * pre / factor : v[i] * pre * factor;
    if (R == Rounding::kToward)
      for (int i = 0; i < n; ++i)
        z[i] = F::kE4M3Scale ? toward[i] * pre / factor : toward[i] * pre * factor;
    for (int i = 0; i < n; ++i)
      codes[i] = static_cast<uint8_t>(encode<E, R>(u[i], R == Rounding::kToward ? z[i] : 0.0f,
                                                   R == Rounding::kStochastic ? draws[i] : 0u));
  }
  pack<F::kBits, n>(codes, data);
}

template <class F, Rounding R>
static void quantize_row(const QuantizeParams& p, int64_t row, int64_t k0, int n, const float* v,
                         const float* toward) {
  static_assert(F::kBlock <= kMaxBlock && kTileK % F::kBlock == 0 && kTileK % kDrawGroup == 0,
                "tiles hold whole blocks and whole groups of draws");
  uint32_t draws[kTileK];
  if (R == Rounding::kStochastic)
    draw_row(p.key, static_cast<uint64_t>(row * draw_groups_of_row(p.kp) + k0 / kDrawGroup), n,
             draws);
  uint8_t* data = p.data + (row * p.kp + k0) * F::kBits / 8;
  uint8_t* scale = p.scale + (row * p.kp + k0) / F::kBlock;
  for (int k = 0; k < n; k += F::kBlock)
    quantize_block<F, R>(p, v + k, toward ? toward + k : nullptr, draws + k,
                         data + k * F::kBits / 8, scale + k / F::kBlock);
}

using RowKernel = void (*)(const QuantizeParams&, int64_t, int64_t, int, const float*,
                           const float*);
#define MXT_ROW(code, traits, name)                                                       \
  {quantize_row<traits, Rounding::kNearest>, quantize_row<traits, Rounding::kStochastic>, \
   quantize_row<traits, Rounding::kToward>},
constexpr RowKernel kRowKernels[][kRoundings] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW

// ---- tiles ----

static void load_and_transform(const QuantizeParams& p, const Source& x, int64_t r0, int64_t k0,
                               const TileShape& s, Tile& tile) {
  load_tile(x, r0, k0, s.rows, s.loaded, s.width, tile);
  if (!p.hadamard) return;
  for (int r = 0; r < s.rows; ++r)
    hadamard_row(tile[r], s.width, p.hadamard, p.signs, p.hadamard_norm);
}

void quantize(const QuantizeParams& p, int64_t r0, int64_t k0) {
  const TileShape s = tile_shape(p, r0, k0);
  const bool toward = p.rounding == Rounding::kToward;
  alignas(64) Tile x, z;
  load_and_transform(p, p.x, r0, k0, s, x);
  if (toward) load_and_transform(p, p.toward, r0, k0, s, z);
  const RowKernel kernel = kRowKernels[p.format][static_cast<int>(p.rounding)];
  for (int r = 0; r < s.rows; ++r) kernel(p, r0 + r, k0, s.width, x[r], toward ? z[r] : nullptr);
}

uint32_t finite_amax(const QuantizeParams& p, int64_t r0, int64_t k0) {
  const TileShape s = tile_shape(p, r0, k0);
  alignas(64) Tile x;
  load_and_transform(p, p.x, r0, k0, s, x);
  uint32_t m = 0;
  for (int r = 0; r < s.rows; ++r)
    for (int k = 0; k < s.width; ++k) {
      const uint32_t a = float_bits(x[r][k]) & ~kSignBit;
      m = a < kInfBits && a > m ? a : m;
    }
  return m;
}

}  // namespace mxtrain::cpu::MXT_ISA
