// SPDX-License-Identifier: Apache-2.0
// The elementwise CPU kernels: dequantize, hadamard, stochastic_round and the GEMM's epilogue; and
// column_sum. Row ranges (groups of 8 for stochastic_round, strips for column_sum) are given by the
// caller. NaN scales give NaN elements;
// see docs/numerics.md.
#include "cpu/store.h"
#include "cpu/tiles.h"
#include "formats/column_sum.h"

namespace mxtrain::cpu::MXT_ISA {

// ---- dequantize ----

template <int Bits, int N>
MXT_HD void unpack(const uint8_t* data, uint8_t* codes) {
  if (Bits == 8)
    for (int i = 0; i < N; ++i) codes[i] = data[i];
  if (Bits == 4)
    for (int i = 0; i < N / 2; ++i) {
      codes[2 * i] = data[i] & 0xFu;
      codes[2 * i + 1] = data[i] >> 4;
    }
  if (Bits == 6)
    for (int i = 0; i < N / 4; ++i) {
      const uint32_t w = data[3 * i] | (data[3 * i + 1] << 8) | (data[3 * i + 2] << 16);
      for (int c = 0; c < 4; ++c) codes[4 * i + c] = (w >> (6 * c)) & 0x3Fu;
    }
}

template <class F>
static void dequantize_rows(const DequantizeParams& p, int64_t row_begin, int64_t row_end) {
  constexpr int n = F::kBlock;
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t k = 0; k < p.cols; k += n) {
      uint8_t codes[n];
      float v[n];
      unpack<F::kBits, n>(p.data + row * p.data_cols + k * F::kBits / 8, codes);
      const float scale = block_scale<F>(p.scale[row * p.scale_cols + k / n], p.tensor_scale);
      for (int i = 0; i < n; ++i) v[i] = decode<typename F::Element>(codes[i]) * scale;
      store(p.out_type, v, p.cols - k < n ? p.cols - k : n, p.out, row * p.cols + k);
    }
}

void dequantize(const DequantizeParams& p, int64_t row_begin, int64_t row_end) {
  using Kernel = void (*)(const DequantizeParams&, int64_t, int64_t);
#define MXT_ROW(code, traits, name) dequantize_rows<traits>,
  static constexpr Kernel kKernels[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  kKernels[p.format](p, row_begin, row_end);
}

// ---- hadamard ----

void hadamard(const HadamardParams& p, int64_t row_begin, int64_t row_end) {
  alignas(64) Tile tile;
  for (int64_t r0 = row_begin; r0 < row_end; r0 += kTileR)
    for (int64_t k0 = 0; k0 < p.cols; k0 += kTileK) {
      const int rows = static_cast<int>(row_end - r0 < kTileR ? row_end - r0 : kTileR);
      const int n = static_cast<int>(p.cols - k0 < kTileK ? p.cols - k0 : kTileK);
      load_tile(p.x, r0, k0, rows, n, n, tile);
      for (int r = 0; r < rows; ++r) {
        hadamard_row(tile[r], n, p.group, p.signs, p.norm);
        store(p.x.type, tile[r], n, p.out, (r0 + r) * p.cols + k0);
      }
    }
}

// ---- stochastic_round ----

template <class E>
MXT_HD uint8_t round_fp8(float v, uint32_t draw) {
  const uint32_t b = float_bits(v), magnitude = b & ~kSignBit, sign = (b >> 24) & 0x80u;
  if (magnitude > kInfBits) return 0x7Fu;
  if (magnitude == kInfBits)
    return static_cast<uint8_t>(sign | (E::kMaxCode + 1));  // E5M2: Inf; E4M3: its NaN
  return static_cast<uint8_t>(encode_stochastic<E>(v, draw));
}

void stochastic_round(const StochasticRoundParams& p, int64_t group_begin, int64_t group_end) {
  for (int64_t g = group_begin; g < group_end; ++g) {
    const Philox4 words = philox_group(p.key, static_cast<uint64_t>(g));
    uint32_t draws[kDrawGroup];
    for (int s = 0; s < kQuarters; ++s)
      for (int j = 0; j < kDrawQuarter; ++j)
        draws[s * kDrawQuarter + j] = draw16(quarter_words(words, s), j);
    for (int j = 0; j < kDrawGroup && g * kDrawGroup + j < p.n; ++j) {
      const int64_t i = g * kDrawGroup + j;
      const uint32_t draw = draws[j];
      if (p.target == RoundTarget::kBfloat16)
        static_cast<uint16_t*>(p.out)[i] = float_to_bf16_stochastic(p.x[i], draw);
      if (p.target == RoundTarget::kE4M3)
        static_cast<uint8_t*>(p.out)[i] = round_fp8<E4M3>(p.x[i], draw);
      if (p.target == RoundTarget::kE5M2)
        static_cast<uint8_t*>(p.out)[i] = round_fp8<E5M2>(p.x[i], draw);
    }
  }
}

// ---- epilogue ----

static float load_one(SourceType type, const void* data, int64_t i) {
  if (type == SourceType::kFloat32) return static_cast<const float*>(data)[i];
  const uint16_t h = static_cast<const uint16_t*>(data)[i];
  return type == SourceType::kBfloat16 ? bf16_to_float(h) : half_to_float(h);
}

void epilogue(const EpilogueParams& p, int64_t row_begin, int64_t row_end) {
  constexpr int64_t n = 256;
  float v[n];
  for (int64_t row = row_begin; row < row_end; ++row)
    for (int64_t c0 = 0; c0 < p.cols; c0 += n) {
      const int64_t width = p.cols - c0 < n ? p.cols - c0 : n;
      for (int64_t i = 0; i < width; ++i)
        v[i] = p.acc[row * p.cols + c0 + i] * p.a_scale * p.b_scale * p.alpha;
      if (p.bias)
        for (int64_t i = 0; i < width; ++i) v[i] += load_one(p.bias_type, p.bias, c0 + i);
      if (p.add)
        for (int64_t i = 0; i < width; ++i)
          v[i] += static_cast<const float*>(p.out)[row * p.cols + c0 + i];
      store(p.out_type, v, width, p.out, row * p.cols + c0);
    }
}

// ---- column_sum ----

void column_strips(const ColumnSumParams& p, int64_t strip_begin, int64_t strip_end) {
  constexpr int64_t n = 256;
  for (int64_t strip = strip_begin; strip < strip_end; ++strip)
    for (int64_t c0 = 0; c0 < p.cols; c0 += n) {
      const int64_t width = p.cols - c0 < n ? p.cols - c0 : n;
      float* total = p.strips + strip * p.cols + c0;
      for (int64_t c = 0; c < width; ++c) total[c] = 0.0f;
      for (int run = 0; run < kSumRuns; ++run) {
        const int64_t first = strip * kSumStripRows + run * kSumRows,
                      last = first + kSumRows < p.rows ? first + kSumRows : p.rows;
        float sum[n] = {};
        for (int64_t r = first; r < last; ++r)
          for (int64_t c = 0; c < width; ++c) sum[c] += load_one(p.type, p.x, r * p.cols + c0 + c);
        for (int64_t c = 0; c < width; ++c) total[c] += sum[c];
      }
    }
}

}  // namespace mxtrain::cpu::MXT_ISA
