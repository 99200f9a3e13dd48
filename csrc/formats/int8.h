// SPDX-License-Identifier: Apache-2.0
// int8_block: signed 8-bit codes in [-127, 127] that share a float32 scale in squares of 128 x 128.
//
//   s = max(amax / 127, 2^-126), 0 for a block of zeros    code = round(x * (1 / s))    value = s q
//   fallback, a second step for what is left: R = x - s q, quantized alike with a scale of its own
//
// 1 / s is one float32 division a block, so every other operation is a multiply or an add. A square
// is its own transpose: the codes of x.T are those of x, transposed. Never -128: |R| <= s / 2 holds
// for what the codes say. A block with NaN or Inf has the scale NaN and codes of zero.
#pragma once

#include "formats/host_device.h"

namespace mxtrain {

constexpr int kInt8Block = 128;
constexpr float kInt8Max = 127.0f;

// Which forms of the codes int8_quantize writes.
enum class Int8Layout : int { kRow = 0, kTransposed = 1, kBoth = 2 };
constexpr int kInt8Layouts = 3;
constexpr const char* kInt8LayoutNames[kInt8Layouts] = {"row", "transposed", "both"};

// Scale and reciprocal of a block whose largest magnitude has these float32 bits, for codes up to
// `largest`.
struct Int8Scale {
  float scale, reciprocal;
};
MXT_HD Int8Scale integer_scale(uint32_t amax_bits, float largest) {
  if (amax_bits >= kInfBits) return {bits_float(kNanBits), 0.0f};
  if (amax_bits == 0) return {0.0f, 0.0f};
  const float s = bits_float(amax_bits) / largest, smallest = power_of_two(-126);
  const float scale = s > smallest ? s : smallest;
  return {scale, 1.0f / scale};
}
MXT_HD Int8Scale int8_scale(uint32_t amax_bits) { return integer_scale(amax_bits, kInt8Max); }

// Adding 1.5 * 2^23 rounds |u| < 2^22 to an integer, ties to even, and leaves it in the low bits.
constexpr float kInt8Magic = 12582912.0f;
constexpr uint32_t kInt8MagicBits = 0x4B400000u;

// u + kInt8Magic: its low byte is the code, and minus kInt8Magic it is the code's value.
MXT_HD float int8_nearest(float u) { return u + kInt8Magic; }

// Up if and only if the fraction of |u| exceeds (draw + 1/2) / 2^16; the same form.
MXT_HD float int8_stochastic(float u, uint32_t draw16) {
  const float a = bits_float(float_bits(u) & ~kSignBit);
  const float near = (a + kInt8Magic) - kInt8Magic, n = near > a ? near - 1.0f : near;
  const bool up = (a - n) * 131072.0f > static_cast<float>(2 * draw16 + 1);
  const float q = up ? n + 1.0f : n;
  const float limited = q > kInt8Max ? kInt8Max : q;
  return bits_float(float_bits(limited) | (float_bits(u) & kSignBit)) + kInt8Magic;
}

MXT_HD int8_t int8_code(float rounded) { return static_cast<int8_t>(float_bits(rounded) & 0xFFu); }

// What the first step left of x.
MXT_HD float int8_residual(float x, float scale, float rounded) {
  return x - scale * (rounded - kInt8Magic);
}

// Whether a block falls back: its largest magnitude lies above the threshold. A threshold that is
// not positive has no meaning; the blocks' scales are then NaN.
MXT_HD bool int8_falls_back(uint32_t amax_bits, float threshold) {
  return amax_bits < kInfBits && bits_float(amax_bits) > threshold;
}

// Of the residuals that are kept packed, those of the blocks that fell back come with the largest
// scale first, and of equal ones in the order of the grid. NaN is no size: such a block did not
// fall back, whatever its mask says.
MXT_HD bool int8_packs(uint8_t mask, float scale) { return mask != 0 && scale == scale; }

// Whether block i comes before block j, which packs.
MXT_HD bool int8_packs_before(uint8_t mask_i, float scale_i, int64_t i, float scale_j, int64_t j) {
  return (mask_i != 0) & ((scale_i > scale_j) | ((scale_i == scale_j) & (i < j)));
}

// Which blocks of an operand have a residual, in grids of any strides. Bytes: a block's is not 0,
// and its codes lie in a matrix, where the block does in the operand. Or slots, of a pool of tiles
// of 128 x 128: 1 + the number of the block's tile, or 0. The other pointer is null.
struct Int8Mask {
  const uint8_t* bytes;
  const int32_t* slots;
  int64_t stride_row, stride_k;

  MXT_HD bool given() const { return bytes || slots; }
  // Of block (i, k): 0 where it has none.
  MXT_HD int32_t at(int64_t i, int64_t k) const {
    const int64_t block = i * stride_row + k * stride_k;
    return slots ? slots[block] : bytes[block];
  }
};

// The float32 sum of a product, K in blocks of 128, ascending; a residual follows its block:
//   acc = fma(scale_a * scale_b, integer product, acc)
MXT_HD float int8_promote(float acc, float scale, float product) {
  return fused(scale, product, acc);
}

}  // namespace mxtrain
