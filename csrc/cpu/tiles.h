// SPDX-License-Identifier: Apache-2.0
// Loading a tile of a source into float32 buffers, and the transforms that come before quantization
// (Hadamard, prescale). Written as plain loops over short arrays that the compiler turns into
// vector code. Included once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "formats/float16.h"

namespace mxtrain::cpu::MXT_ISA {

using Tile = float[kTileR][kTileK];

struct LoadFloat32 {
  using Type = float;
  MXT_HD static float load(float v) { return v; }
};
struct LoadBfloat16 {
  using Type = uint16_t;
  MXT_HD static float load(uint16_t v) { return bf16_to_float(v); }
};
struct LoadFloat16 {
  using Type = uint16_t;
  MXT_HD static float load(uint16_t v) { return half_to_float(v); }
};

// Rows r0.. and columns k0.. of x; `nr` x `nk` elements exist, the rest of the tile's `width`
// columns is zero.
template <class Load>
static void load_strided(const Source& x, int64_t r0, int64_t k0, int nr, int nk, int width,
                         Tile& tile) {
  const auto* base =
      static_cast<const typename Load::Type*>(x.data) + r0 * x.stride_row + k0 * x.stride_col;
  if (x.stride_col == 1) {
    for (int r = 0; r < nr; ++r) {
      const auto* row = base + r * x.stride_row;
      for (int k = 0; k < nk; ++k) tile[r][k] = Load::load(row[k]);
    }
  } else {  // a transposed view: walk along the rows, which are then near each other in memory
    for (int k = 0; k < nk; ++k) {
      const auto* col = base + k * x.stride_col;
      for (int r = 0; r < nr; ++r) tile[r][k] = Load::load(col[r * x.stride_row]);
    }
  }
  for (int r = 0; r < nr; ++r)
    for (int k = nk; k < width; ++k) tile[r][k] = 0.0f;
}

// Code k of a packed row; 6-bit codes may straddle two bytes.
template <int Bits>
MXT_HD uint32_t packed_code(const uint8_t* row, int64_t k) {
  if (Bits == 8) return row[k];
  if (Bits == 4) return (row[k / 2] >> (4 * (k % 2))) & 0xFu;
  const int64_t bit = 6 * k;
  const uint32_t low = row[bit / 8], high = bit % 8 > 2 ? row[bit / 8 + 1] : 0;
  return ((low | (high << 8)) >> (bit % 8)) & 0x3Fu;
}

template <class F>
MXT_HD float block_scale(uint8_t code, float tensor_scale) {
  return F::kE4M3Scale ? decode<E4M3>(code) * tensor_scale : e8m0_value(code);
}

// The transpose of a packed operand: tile[r][k] is element (k0 + k, r0 + r) of the operand.
template <class F>
static void load_packed(const Source& x, int64_t r0, int64_t k0, int nr, int nk, int width,
                        Tile& tile) {
  static_assert(F::kBlock % kTileR == 0, "a tile's rows share one block of the operand");
  for (int k = 0; k < nk; ++k) {
    const uint8_t* codes = static_cast<const uint8_t*>(x.data) + (k0 + k) * x.data_cols;
    const float scale =
        block_scale<F>(x.scale[(k0 + k) * x.scale_cols + r0 / F::kBlock], x.tensor_scale);
    for (int r = 0; r < nr; ++r)
      tile[r][k] = decode<typename F::Element>(packed_code<F::kBits>(codes, r0 + r)) * scale;
  }
  for (int r = 0; r < nr; ++r)
    for (int k = nk; k < width; ++k) tile[r][k] = 0.0f;
}

static void load_tile(const Source& x, int64_t r0, int64_t k0, int nr, int nk, int width,
                      Tile& tile) {
  switch (x.type) {
    case SourceType::kFloat32:
      return load_strided<LoadFloat32>(x, r0, k0, nr, nk, width, tile);
    case SourceType::kBfloat16:
      return load_strided<LoadBfloat16>(x, r0, k0, nr, nk, width, tile);
    case SourceType::kFloat16:
      return load_strided<LoadFloat16>(x, r0, k0, nr, nk, width, tile);
    case SourceType::kPacked:
      break;
  }
  using Loader = void (*)(const Source&, int64_t, int64_t, int, int, int, Tile&);
#define MXT_ROW(code, traits, name) load_packed<traits>,
  static constexpr Loader kLoaders[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  kLoaders[x.format](x, r0, k0, nr, nk, width, tile);
}

template <int Stride>
MXT_HD void butterflies(float* v, int n) {
  for (int base = 0; base < n; base += 2 * Stride)
    for (int i = base; i < base + Stride; ++i) {
      const float a = v[i], b = v[i + Stride];
      v[i] = a + b;
      v[i + Stride] = a - b;
    }
}

// Every group of g elements: v -> (v * signs) H_g * norm, butterflies from stride 1 upward.
MXT_HD void hadamard_row(float* v, int n, int g, const int8_t* signs, float norm) {
  if (signs)
    for (int base = 0; base < n; base += g)
      for (int i = 0; i < g; ++i) v[base + i] = signs[i] < 0 ? -v[base + i] : v[base + i];
  butterflies<1>(v, n);
  butterflies<2>(v, n);
  butterflies<4>(v, n);
  butterflies<8>(v, n);
  if (g > 16) butterflies<16>(v, n);
  if (g > 32) butterflies<32>(v, n);
  if (g > 64) butterflies<64>(v, n);
  if (g > 128) butterflies<128>(v, n);
  for (int i = 0; i < n; ++i) v[i] *= norm;
}

}  // namespace mxtrain::cpu::MXT_ISA
