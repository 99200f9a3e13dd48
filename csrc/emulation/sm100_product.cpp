// SPDX-License-Identifier: Apache-2.0
// The product of csrc/cuda/sm100, for the emulation: what gemm.h says that CUTLASS makes of its
// arguments, element by element. So what the op hands over (rows of whole 16 bytes, scales in
// tiles, the pitch of the result, float32 bias) and what it does with the result run on a CPU;
// tcgen05 does not. Sums are in double and rounded to float32 once.
#include <vector>

#include "cuda/sm100/gemm.h"
#include "formats/block.h"
#include "formats/float16.h"
#include "formats/layout.h"
#include "formats/statistics.h"

namespace mxtrain::cuda::sm100 {

// The values of rows x k codes, but for a tensor scale.
template <class F>
static std::vector<float> values(const void* codes, const void* scales, int64_t rows, int64_t k) {
  const auto* data = static_cast<const uint8_t*>(codes);
  const auto* scale = static_cast<const uint8_t*>(scales);
  const int64_t row_bytes = k * F::kBits / 8, col_tiles = tiles(k / F::kBlock, kTileCols);
  std::vector<float> out(rows * k);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < k; c += 8) {
      const uint64_t eight = load_codes<F>(data + r * row_bytes + c * F::kBits / 8);
      const float s =
          block_scale_value<F>(scale[swizzled_offset(r, c / F::kBlock, col_tiles)], 1.0f);
      for (int i = 0; i < 8; ++i)
        out[r * k + c + i] = decode<typename F::Element>(code_of<F>(eight, i)) * s;
    }
  return out;
}

template <class F>
static cudaError_t product(const GemmParams& p, Tile tile) {
  const auto whole = [](const void* q) { return reinterpret_cast<uintptr_t>(q) % 16 == 0; };
  const int64_t out_bytes = tile == Tile::kPair ? 2 : 4;
  if (!whole(p.a) || !whole(p.b) || !whole(p.a_scale) || !whole(p.b_scale) || !whole(p.out) ||
      p.k * F::kBits / 8 % 16 != 0 || p.pitch * out_bytes % 16 != 0 || p.pitch < p.n)
    return cudaErrorInvalidValue;
  const std::vector<float> a = values<F>(p.a, p.a_scale, p.m, p.k),
                           b = values<F>(p.b, p.b_scale, p.n, p.k);
  float factor = p.alpha;
  if (p.a_tensor_scale != nullptr) factor = factor * *p.a_tensor_scale * *p.b_tensor_scale;
  for (int64_t r = 0; r < p.m; ++r)
    for (int64_t c = 0; c < p.n; ++c) {
      double sum = 0.0;
      for (int64_t i = 0; i < p.k; ++i) sum += static_cast<double>(a[r * p.k + i]) * b[c * p.k + i];
      float d = static_cast<float>(sum) * factor;
      if (p.bias != nullptr) d += p.bias[c];
      if (tile == Tile::kPair)
        static_cast<uint16_t*>(p.out)[r * p.pitch + c] = float_to_bf16(d);
      else
        static_cast<float*>(p.out)[r * p.pitch + c] = d;
    }
  return cudaSuccess;
}

cudaError_t emulated_gemm(const GemmParams& p, int64_t format, Tile tile) {
  using Product = cudaError_t (*)(const GemmParams&, Tile);
#define MXT_ROW(code, traits, name) product<traits>,
  static constexpr Product kProducts[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kProducts[format](p, tile);
}

}  // namespace mxtrain::cuda::sm100
