// SPDX-License-Identifier: Apache-2.0
// Host code only: CUTLASS's own layout objects against csrc/formats, offset by offset, and its
// elements against what csrc/cpu packs. Prints the number of comparisons; exit status 1 and the
// first difference where one differs.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cute/tensor.hpp"
#include "cutlass/detail/sm100_blockscaled_layout.hpp"
#include "cutlass/numeric_types.h"
#include "formats/layout.h"
// The CPU's quantize, for its pack(); the CUDA kernels' bytes are compared with it elsewhere.
#define MXT_ISA layout
#include "cpu/quantize.cpp"

namespace {

int64_t g_compared = 0;

void same(const char* what, int64_t rows, int64_t k, int64_t r, int64_t i, int64_t theirs,
          int64_t ours) {
  ++g_compared;
  if (theirs == ours) return;
  std::printf("%s of [%ld, %ld] at (%ld, %ld): CUTLASS %ld, here %ld\n", what, long(rows), long(k),
              long(r), long(i), long(theirs), long(ours));
  std::exit(1);
}

// The layout object takes an element of [rows, k]; every element of a block has its scale's offset.
template <class Layout>
void compare_scales(const char* what, const Layout& layout, int64_t rows, int64_t k, int block) {
  const int64_t blocks = (k + block - 1) / block;
  const int64_t col_tiles = mxtrain::tiles(blocks, mxtrain::kTileCols);
  const int64_t row_tiles = mxtrain::tiles(rows, mxtrain::kTileRows);
  // All positions that the tiles have, padding included.
  for (int64_t r = 0; r < row_tiles * mxtrain::kTileRows; ++r)
    for (int64_t c = 0; c < col_tiles * mxtrain::kTileCols; ++c)
      for (const int in_block : {0, 1, block - 1})
        same(what, rows, k, r, c,
             layout(static_cast<int>(r), static_cast<int>(c * block + in_block), 0),
             mxtrain::swizzled_offset(r, c, col_tiles));
  same(what, rows, k, -1, -1, cute::cosize(cute::filter_zeros(layout)),
       row_tiles * col_tiles * mxtrain::kTileBytes);
}

template <int kBlock>
void compare_shape(int m, int n, int k) {
  using Config = cutlass::detail::Sm1xxBlockScaledConfig<kBlock>;
  const auto shape = cute::make_shape(m, n, k, 1);
  compare_scales("SFA", Config::tile_atom_to_shape_SFA(shape), m, k, kBlock);
  compare_scales("SFB", Config::tile_atom_to_shape_SFB(shape), n, k, kBlock);
}

// Rows of codes that our quantize packed, as CUTLASS reads a row-major matrix of its element type.
template <class F, class Element>
void compare_packing(const char* what, int rows, int k) {
  const int row_bytes = k * F::kBits / 8;
  std::vector<uint8_t> codes(size_t(rows) * k), bytes(size_t(rows) * row_bytes);
  uint32_t state = 1;  // of a generator of any codes
  for (auto& code : codes) {
    state = state * 1664525u + 1013904223u;
    code = uint8_t(state >> (32 - F::kBits));
  }
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < k; i += F::kBlock)
      mxtrain::cpu::MXT_ISA::pack<F::kBits, F::kBlock>(
          &codes[size_t(r) * k + i], &bytes[size_t(r) * row_bytes + i * F::kBits / 8]);
  const auto layout =
      cute::make_layout(cute::make_shape(rows, k), cute::make_stride(k, cute::_1{}));
  const auto tensor = cute::make_tensor(cute::recast_ptr<Element>(bytes.data()), layout);
  for (int r = 0; r < rows; ++r)
    for (int i = 0; i < k; ++i) {
      const Element theirs = tensor(r, i);
      same(what, rows, k, r, i, theirs.raw(), codes[size_t(r) * k + i]);
    }
}

// The code of each E2M1 and E8M0 value.
void compare_codes() {
  const float magnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  for (int code = 0; code < 16; ++code) {
    const float value = (code & 8 ? -1.0f : 1.0f) * magnitudes[code & 7];
    const float theirs = static_cast<float>(cutlass::float_e2m1_t::bitcast(uint8_t(code)));
    same("E2M1", 0, 0, code, 0, theirs == value, 1);
  }
  for (int code = 1; code < 255; ++code) {  // 2^-127 is subnormal: float32 has it, but not as bits
    const uint32_t bits = uint32_t(code) << 23;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    const float theirs = static_cast<float>(cutlass::float_ue8m0_t::bitcast(uint8_t(code)));
    same("E8M0", 0, 0, code, 0, theirs == value, 1);
  }
}

}  // namespace

int main() {
  const int rows[] = {1, 31, 128, 129, 300, 511};
  const int ks[] = {32, 64, 96, 128, 160, 512, 1056};
  for (const int m : rows)
    for (const int k : ks) {
      compare_shape<32>(m, 640 - m, k);
      compare_shape<16>(m, 640 - m, k);
      compare_shape<16>(m, 640 - m, k + 16);  // an odd number of blocks
    }
  for (const int k : {32, 96, 160}) {
    compare_packing<mxtrain::Mxfp4, cutlass::float_e2m1_t>("codes of mxfp4", 50, k);
    compare_packing<mxtrain::Nvfp4, cutlass::float_e2m1_t>("codes of nvfp4", 50, k + 16);
    compare_packing<mxtrain::Mxfp8E4M3, cutlass::float_e4m3_t>("codes of mxfp8_e4m3", 50, k);
    compare_packing<mxtrain::Mxfp8E5M2, cutlass::float_e5m2_t>("codes of mxfp8_e5m2", 50, k);
  }
  compare_codes();
  std::printf("%ld\n", long(g_compared));
}
