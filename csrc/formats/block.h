// SPDX-License-Identifier: Apache-2.0
// Block formats: an element format, a block length along K and a scale format; the one table of
// what exists.
//
//   value = decode(code) * scale             mxfp4, mxfp6_*, mxfp8_*: E8M0 scale, 32 elements
//   value = decode(code) * (scale * T)       nvfp4: E4M3 scale, 16 elements, T one float32 for the
//   tensor
//
// Rows are padded with zeros to whole blocks (Kp). Codes are a little-endian bit stream (4 bits:
// the even k in the low nibble). A new block format is a traits struct and a line in MXT_FORMATS;
// Python reads the table from the built library.
#pragma once

#include "formats/e8m0.h"
#include "formats/elements.h"

namespace mxtrain {

enum class Rounding : int { kNearest = 0, kStochastic = 1, kToward = 2 };
constexpr int kRoundings = 3;

template <class ElementFormat, int Block, bool E4M3Scale>
struct BlockFormat {
  using Element = ElementFormat;
  static constexpr int kBlock = Block;
  static constexpr bool kE4M3Scale = E4M3Scale;
  static constexpr int kBits = Element::kBits;
  static_assert(Block % 16 == 0,
                "a block is whole quarters of a group of draws and whole bytes of packed codes");
};

struct Mxfp4 : BlockFormat<E2M1, 32, false> {};
struct Mxfp6E3M2 : BlockFormat<E3M2, 32, false> {};
struct Mxfp6E2M3 : BlockFormat<E2M3, 32, false> {};
struct Mxfp8E4M3 : BlockFormat<E4M3, 32, false> {};
struct Mxfp8E5M2 : BlockFormat<E5M2, 32, false> {};
struct Nvfp4 : BlockFormat<E2M1, 16, true> {};

// X(code in the ops' schemas, traits, name)
#define MXT_FORMATS(X)          \
  X(0, Mxfp4, "mxfp4")          \
  X(1, Mxfp6E3M2, "mxfp6_e3m2") \
  X(2, Mxfp6E2M3, "mxfp6_e2m3") \
  X(3, Mxfp8E4M3, "mxfp8_e4m3") \
  X(4, Mxfp8E5M2, "mxfp8_e5m2") \
  X(5, Nvfp4, "nvfp4")

struct FormatInfo {
  const char* name;
  int bits, exp_bits, man_bits, emax, block;
  bool e4m3_scale;
  uint32_t max_bits;  // float32 bits of the largest element

  constexpr int64_t padded(int64_t k) const { return (k + block - 1) / block * block; }
  constexpr int64_t bytes(int64_t kp) const { return kp * bits / 8; }
};

template <class F>
constexpr FormatInfo format_info(const char* name) {
  using E = typename F::Element;
  return {name,     F::kBits,  E::kExpBits,   E::kManBits,
          E::kEmax, F::kBlock, F::kE4M3Scale, E::kMaxBits};
}

#define MXT_ROW(code, traits, name) format_info<traits>(name),
constexpr FormatInfo kFormats[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
constexpr int kFormatCount = sizeof(kFormats) / sizeof(kFormats[0]);

#define MXT_ROW(code, traits, name)                                                             \
  static_assert(kFormats[code].block == traits::kBlock && kFormats[code].bits == traits::kBits, \
                "codes are table positions");
MXT_FORMATS(MXT_ROW)
#undef MXT_ROW

constexpr int kMxfp4Code = 0;  // the format that has kernels of its own
static_assert(kFormats[kMxfp4Code].bits == 4 && kFormats[kMxfp4Code].block == 32, "mxfp4's place");

constexpr const char* kScaleRuleNames[kScaleRules] = {"floor", "ceil", "even"};
constexpr const char* kRoundingNames[kRoundings] = {"nearest", "stochastic", "toward"};
enum class Accumulate : int { kFp32 = 0, kFast = 1, kExact = 2 };
constexpr int kAccumulates = 3;
constexpr const char* kAccumulateNames[kAccumulates] = {"fp32", "fast", "exact"};

// How gemm runs on CUDA (csrc/dispatch.h chooses). fold is the GPU's own way to multiply what was
// folded, fold_packed the one that unpacks inside the product, fold_mma the one by mma.sync; sm120
// is block-scaled mma.sync, sm120_emulated the same kernel where the GPU lacks that instruction;
// sm100 is block-scaled tcgen05.mma.
enum class GemmBackend : int {
  kAuto = 0,
  kDequant = 1,
  kFold = 2,
  kFoldPacked = 3,
  kFoldMma = 4,
  kSm120 = 5,
  kSm120Emulated = 6,
  kSm100 = 7
};
constexpr int kGemmBackends = 8;
constexpr const char* kGemmBackendNames[kGemmBackends] = {
    "auto", "dequant", "fold", "fold_packed", "fold_mma", "sm120", "sm120_emulated", "sm100"};
constexpr int kHadamardGroups[] = {16, 32, 64, 128, 256};
constexpr int kHadamardGroupCount = sizeof(kHadamardGroups) / sizeof(kHadamardGroups[0]);

// ---- nvfp4's two-level scale ----

constexpr float kNvfp4Range =
    2688.0f;  // 6 * 448: the largest element times the largest block scale
constexpr uint32_t kE4M3Nan = 0x7F;

// From A, the largest finite magnitude of the operand.
MXT_HD float nvfp4_tensor_scale(float amax) {
  const float t = amax / kNvfp4Range;
  const float smallest = power_of_two(-126);
  return t > smallest ? t : smallest;
}

// Block scale code of M for a tensor scale: (M / 6) / T rounded to E4M3 by the rule, saturated.
MXT_HD uint32_t nvfp4_scale(float block_max, float tensor_scale, ScaleRule rule) {
  const float q = (block_max / 6.0f) / tensor_scale;
  if (rule == ScaleRule::kEven) return encode_nearest<E4M3>(q);
  const GridPosition g = locate<E4M3>(q);
  return g.code + (rule == ScaleRule::kCeil && g.fraction > 0.0f ? 1u : 0u);
}

}  // namespace mxtrain
