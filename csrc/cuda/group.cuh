// SPDX-License-Identifier: Apache-2.0
// What the quantization kernels do with one group: 8 consecutive elements of an operand row in one
// thread's registers.
//   load -> Hadamard (strides 1, 2, 4 in registers, 8 and up across lanes) -> block maximum across
//   lanes -> scale -> prescale -> codes -> packed bytes.
// A group is also a quarter of what one Philox call serves. `lane_in_row` is the group's index
// modulo 32 along the row, so that groups of one block, and of one Hadamard group, sit in
// neighbouring lanes of a warp, aligned to their number.
#pragma once

#include <type_traits>

#include "cuda/encode_pairs.cuh"
#include "cuda/quantize.h"
#include "formats/float16.h"
#include "formats/layout.h"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace mxtrain::cuda {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// The larger magnitude of two bfloat16, whose signs may be garbage, as float32 bits.
__device__ __forceinline__ uint32_t larger_half(uint32_t pair) {
  return max(pair << 16 & ~kSignBit, pair & 0x7FFF0000u);
}

// ---- sources: floats in memory ----

struct Float32Source {
  using Type = float;
  static constexpr int kVectors = 2;  // 16-byte loads in a group
  __device__ static __forceinline__ float widen(float v) { return v; }
  __device__ static __forceinline__ void unpack(const uint4 (&raw)[2], float (&v)[8]) {
    const uint32_t w[8] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w,
                           raw[1].x, raw[1].y, raw[1].z, raw[1].w};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = bits_float(w[i]);
  }
};

struct Bfloat16Source {
  using Type = uint16_t;
  static constexpr int kVectors = 1;
  __device__ static __forceinline__ float widen(uint16_t v) { return bf16_to_float(v); }
  __device__ static __forceinline__ void unpack(const uint4 (&raw)[1], float (&v)[8]) {
    const uint32_t w[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = bits_float(w[i] << 16);
      v[2 * i + 1] = bits_float(w[i] & 0xFFFF0000u);
    }
  }
};

struct Float16Source {
  using Type = uint16_t;
  static constexpr int kVectors = 1;
  __device__ static __forceinline__ float widen(uint16_t v) { return half_to_float(v); }
  __device__ static __forceinline__ void unpack(const uint4 (&raw)[1], float (&v)[8]) {
    const uint32_t w[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[2 * i] = half_to_float(static_cast<uint16_t>(w[i]));
      v[2 * i + 1] = half_to_float(static_cast<uint16_t>(w[i] >> 16));
    }
  }
};

__device__ __forceinline__ float load_any(const void* p, FloatType type, int64_t i) {
  if (type == FloatType::kFloat32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == FloatType::kBfloat16 ? bf16_to_float(h) : half_to_float(h);
}

// ---- transforms ----

// What stays the same for every group of a thread: the lanes of its Hadamard group and the signs of
// its elements there.
struct Rotation {
  int lanes;  // lanes that hold one Hadamard group; 0: none
  bool flips;
  float sign[8];
};

__device__ __forceinline__ Rotation make_rotation(int group, const int8_t* signs, int lane_in_row) {
  Rotation r = {group / 8, signs != nullptr, {}};
  if (r.flips)
#pragma unroll
    for (int i = 0; i < 8; ++i) r.sign[i] = signs[lane_in_row % r.lanes * 8 + i] < 0 ? -1.0f : 1.0f;
  return r;
}

template <int Stride>
__device__ __forceinline__ void butterfly8(float (&v)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (!(i & Stride)) {
      const float a = v[i], b = v[i + Stride];
      v[i] = a + b;
      v[i + Stride] = a - b;
    }
}

// Across lanes: the lower lane keeps a + b, the upper a - b. `stride` counts lanes of the same row.
__device__ __forceinline__ void butterfly_lanes(float (&v)[8], int stride, int lane_in_row) {
  const float sign = lane_in_row & stride ? -1.0f : 1.0f;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    v[i] = __fmaf_rn(v[i], sign, __shfl_xor_sync(kAllLanes, v[i], stride));
}

__device__ __forceinline__ void rotate8(float (&v)[8], const Rotation& r, float norm,
                                        int lane_in_row) {
  if (r.flips) {
    // Signs and the first butterfly together: products with +-1 are exact, so each result is
    // rounded once, as a + b is.
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      const float a = v[i] * r.sign[i], b = v[i + 1];
      v[i] = __fmaf_rn(b, r.sign[i + 1], a);
      v[i + 1] = __fmaf_rn(b, -r.sign[i + 1], a);
    }
  } else {
    butterfly8<1>(v);
  }
  butterfly8<2>(v);
  butterfly8<4>(v);
  for (int stride = 1; stride < r.lanes; stride *= 2) butterfly_lanes(v, stride, lane_in_row);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] *= norm;
}

__device__ __forceinline__ void transform8(float (&v)[8], const QuantizeParams& p,
                                           const Rotation& r, int lane_in_row) {
  if (r.lanes) rotate8(v, r, p.hadamard_norm, lane_in_row);
}

// ---- scales ----

// Largest |v| bits of the group: integer maxima, in which NaN and Inf win.
__device__ __forceinline__ uint32_t amax_bits8(const float (&v)[8]) {
  uint32_t m = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) m = max(m, float_bits(v[i]) & ~kSignBit);
  return m;
}

// The same from a source's raw words, where nothing has touched the elements.
template <class Source>
__device__ __forceinline__ uint32_t raw_amax_bits8(const uint4 (&raw)[Source::kVectors],
                                                   const float (&v)[8]) {
  if constexpr (std::is_same<Source, Bfloat16Source>::value) {
    const uint32_t w[4] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w};
    uint32_t unused[4];
    const uint32_t m2 = abs_amax2(w, unused);
    return max(m2 << 16, m2 & 0xFFFF0000u);
  }
  return amax_bits8(v);
}

// ... of the block, over the lanes that share it.
template <class F>
__device__ __forceinline__ uint32_t block_amax_bits(uint32_t m) {
  static_assert(F::kBlock == 16 || F::kBlock == 32, "a block is 2 or 4 neighbouring lanes");
  m = max(m, __shfl_xor_sync(kAllLanes, m, 1));
  if (F::kBlock == 32) m = max(m, __shfl_xor_sync(kAllLanes, m, 2));
  return m;
}

// The same of both halves of a word, for two operand rows.
template <class F>
__device__ __forceinline__ uint32_t block_amax2(uint32_t m2) {
  m2 = ptx::max_nan_bf16x2(m2, __shfl_xor_sync(kAllLanes, m2, 1));
  if (F::kBlock == 32) m2 = ptx::max_nan_bf16x2(m2, __shfl_xor_sync(kAllLanes, m2, 2));
  return m2;
}

struct BlockScale {
  uint32_t code;
  float factor;  // elements are multiplied (E8M0) or divided (E4M3) by it
  bool empty;    // all codes are 0: a zero block, or one with NaN or Inf
};

// What the scales of an operand need, the same for all its blocks.
template <class F>
struct ScaleChooser {
  uint32_t round_up;
  ScaleRule rule;
  float tensor_scale;

  __device__ __forceinline__ explicit ScaleChooser(const QuantizeParams& p)
      : round_up(e8m0_round_up<typename F::Element>(static_cast<ScaleRule>(p.scale_rule))),
        rule(static_cast<ScaleRule>(p.scale_rule)),
        tensor_scale(F::kE4M3Scale ? *p.tensor_scale : 1.0f) {}

  __device__ __forceinline__ BlockScale choose(uint32_t max_bits) const {
    BlockScale s;
    const bool finite = max_bits < kInfBits;
    s.empty = max_bits == 0 || !finite;
    if (F::kE4M3Scale) {
      s.code = s.empty ? 0u : nvfp4_scale(bits_float(max_bits), tensor_scale, rule);
      s.factor = decode<E4M3>(s.code) * tensor_scale;
      s.empty = s.empty || s.factor == 0.0f;
      s.code = finite ? s.code : kE4M3Nan;
    } else {
      s.code = e8m0_scale<typename F::Element>(max_bits, round_up);
      s.factor = e8m0_reciprocal(s.code);
      s.code = finite ? s.code : kE8M0Nan;
    }
    return s;
  }
};

// v / s, each rounded once, where s lies within 2^-60 and 2^60: Markstein's division ("Computation
// of elementary functions on the IBM RISC System/6000 processor", 1990) by the rounded reciprocal.
// The first correction makes the quotient faithful, the second correct, with the remainders exact
// for |v| >= 2^-90; smaller ones are under 2^-29 s, exact or not, and become zeros.
__device__ __forceinline__ void divide8(float (&v)[8], float s) {
  const float reciprocal = __fdiv_rn(1.0f, s);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float q = v[i] * reciprocal;
    q = __fmaf_rn(__fmaf_rn(-q, s, v[i]), reciprocal, q);
    q = __fmaf_rn(__fmaf_rn(-q, s, v[i]), reciprocal, q);
    v[i] = copysignf(q, v[i]);  // of a zero
  }
}

// kBounded: v is of the block that the factor was made for, so that no quotient comes near 2^100.
template <class F, bool kBounded>
__device__ __forceinline__ void to_grid8(float (&v)[8], float factor, float prescale) {
  if (prescale != 1.0f)
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= prescale;
  if (F::kE4M3Scale && kBounded && factor >= 0x1p-60f && factor <= 0x1p60f && prescale <= 0x1p20f)
    return divide8(v, factor);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = F::kE4M3Scale ? __fdiv_rn(v[i], factor) : v[i] * factor;
}

// ---- codes ----

// v: transformed elements; z: the transformed `toward` elements, read only with Rounding::kToward.
template <class F, bool kToward>
__device__ __forceinline__ Packed8 encode_group(float (&v)[8], float (&z)[8], const BlockScale& s,
                                                const QuantizeParams& p, const Philox4& draws) {
  using E = typename F::Element;
  if (s.empty) return {0, 0};
  to_grid8<F, true>(v, s.factor, p.prescale);
  const bool stochastic = p.rounding == static_cast<int>(Rounding::kStochastic);
  // The ceil rule of the E8M0 formats never exceeds the element's maximum: nothing to limit. Nor
  // where the encoder does it.
  const bool fits =
      !F::kE4M3Scale && p.scale_rule == static_cast<int>(ScaleRule::kCeil) && p.prescale <= 1.0f;
  if (!fits && (stochastic || E::kBits < 8)) clamp8<E>(v);
  if (kToward) {
    to_grid8<F, false>(z, s.factor, p.prescale);
    return encode8_toward<E>(v, z);
  }
  if (stochastic) return encode8_stochastic<E>(v, draws);
  return encode8_nearest<E>(v);
}

// ---- stores ----

// Where a group's codes go: 8 * kBits / 8 bytes, aligned to 4, 2 or 8 bytes for 4-, 6- and 8-bit
// codes.
template <class F>
__device__ __forceinline__ uint8_t* codes_at(const QuantizeParams& p, int64_t group) {
  return p.data + group * F::kBits;
}

template <class F>
__device__ __forceinline__ uint8_t* scale_at(const QuantizeParams& p, int64_t row, int64_t k0) {
  const int64_t block = k0 / F::kBlock;
  return p.scale + (p.swizzled ? swizzled_offset(row, block, p.scale_tiles)
                               : row * (p.kp / F::kBlock) + block);
}

template <class F>
__device__ __forceinline__ void store_codes(uint8_t* out, Packed8 codes) {
  if (F::kBits == 4) *reinterpret_cast<uint32_t*>(out) = codes.low;
  if (F::kBits == 8) *reinterpret_cast<uint2*>(out) = make_uint2(codes.low, codes.high);
  if (F::kBits == 6) {
    auto* half = reinterpret_cast<uint16_t*>(out);
    half[0] = static_cast<uint16_t>(codes.low);
    half[1] = static_cast<uint16_t>(codes.low >> 16);
    half[2] = static_cast<uint16_t>(codes.high);
  }
}

// ---- two elements a word ----

// What a kernel is compiled for. kPairs: encode_pairs.cuh serves (bfloat16 to E2M1 with E8M0
// scales, nearest, nothing done to the elements before). kFloats: everything else but rounding
// `toward`, which reads a second tensor.
enum class Path { kPairs, kFloats, kToward };

template <class Source, class F>
constexpr bool kHasPairs = std::is_same<Source, Bfloat16Source>::value && !F::kE4M3Scale &&
                           std::is_same<typename F::Element, E2M1>::value;

template <class Source, class F>
Path choose_path(const QuantizeParams& p) {
  if (p.toward) return Path::kToward;
  const bool plain =
      p.rounding == static_cast<int>(Rounding::kNearest) && p.hadamard == 0 && p.prescale == 1.0f;
  return kHasPairs<Source, F> && plain ? Path::kPairs : Path::kFloats;
}

// 8 consecutive elements of an operand row, as 4 words.
template <class F>
__device__ __forceinline__ Packed8 quantize_row_pairs(const uint32_t (&x2)[4],
                                                      const ScaleChooser<F>& scales,
                                                      BlockScale& s) {
  uint32_t ax2[4], c[4];
  const uint32_t m2 = abs_amax2(x2, ax2);
  s = scales.choose(block_amax_bits<F>(max(m2 << 16, m2 & 0xFFFF0000u)));
  const uint32_t inv2 = (float_bits(s.factor) >> 16) * 0x00010001u;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    c[i] = encode2_nearest(x2[i], ax2[i], inv2, scales.rule == ScaleRule::kCeil);
  return {s.empty ? 0u : join_nibbles(c), 0};
}

// 8 consecutive elements of two neighbouring operand rows, as the halves of 8 words.
template <class F>
__device__ __forceinline__ void quantize_column_pairs(const uint32_t (&x2)[8],
                                                      const ScaleChooser<F>& scales,
                                                      BlockScale (&s)[2], Packed8 (&codes)[2]) {
  uint32_t ax2[8], c[8], low, high;
  const uint32_t m2 = block_amax2<F>(abs_amax2(x2, ax2));
  s[0] = scales.choose(m2 << 16);
  s[1] = scales.choose(m2 & 0xFFFF0000u);
  const uint32_t inv2 = __byte_perm(float_bits(s[0].factor), float_bits(s[1].factor), 0x7632);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    c[i] = encode2_nearest(x2[i], ax2[i], inv2, scales.rule == ScaleRule::kCeil);
  gather_nibbles(c, low, high);
  codes[0] = {s[0].empty ? 0u : low, 0};
  codes[1] = {s[1].empty ? 0u : high, 0};
}

// The larger magnitude of each half over the block; a NaN wins.
__device__ __forceinline__ uint32_t block_amax2_of(const uint32_t (&x2)[32]) {
  uint32_t m[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    m[j] = ptx::max_nan_abs_bf16x2(x2[j], x2[j + 4]);
#pragma unroll
    for (int i = j + 8; i < 32; i += 4) m[j] = ptx::max_nan_abs_bf16x2(m[j], x2[i]);
  }
  const uint32_t a = ptx::max_nan_abs_bf16x2(m[0], m[1]), b = ptx::max_nan_abs_bf16x2(m[2], m[3]);
  return ptx::max_nan_abs_bf16x2(a, b) & 0x7FFF7FFFu;
}

// 32 rows of two columns: the codes of their blocks, one an operand row.
template <bool kFits>
__device__ __forceinline__ void quantize_two_blocks(const uint32_t (&x2)[32],
                                                    const ScaleChooser<Mxfp4>& scales,
                                                    BlockScale (&s)[2], uint4 (&codes)[2]) {
  const uint32_t m2 = block_amax2_of(x2);
  s[0] = scales.choose(m2 << 16);
  s[1] = scales.choose(m2 & 0xFFFF0000u);
  const uint32_t inv2 = __byte_perm(float_bits(s[0].factor), float_bits(s[1].factor), 0x7632);
  uint32_t w[2][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t c[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t x = x2[8 * j + i];
      c[i] = encode2_nearest(x, ptx::abs_bf16x2(x), inv2, kFits);
    }
    gather_nibbles(c, w[0][j], w[1][j]);
  }
#pragma unroll
  for (int n = 0; n < 2; ++n)
    codes[n] = s[n].empty ? make_uint4(0, 0, 0, 0) : make_uint4(w[n][0], w[n][1], w[n][2], w[n][3]);
}

// 32 elements of one operand row, as 16 words.
template <bool kFits>
__device__ __forceinline__ uint4 quantize_row_block(const uint32_t (&x2)[16],
                                                    const ScaleChooser<Mxfp4>& scales,
                                                    BlockScale& s) {
  uint32_t m2 = ptx::max_nan_abs_bf16x2(x2[0], x2[1]);
#pragma unroll
  for (int i = 2; i < 16; ++i) m2 = ptx::max_nan_abs_bf16x2(m2, x2[i]);
  s = scales.choose(larger_half(m2));
  const uint32_t inv2 = (float_bits(s.factor) >> 16) * 0x00010001u;
  uint32_t w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t c[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t x = x2[4 * j + i];
      c[i] = encode2_nearest(x, ptx::abs_bf16x2(x), inv2, kFits);
    }
    w[j] = join_nibbles(c);
  }
  return s.empty ? make_uint4(0, 0, 0, 0) : make_uint4(w[0], w[1], w[2], w[3]);
}

// ---- draws ----

struct DrawKey {
  PhiloxKey key;
  bool on;
};

__device__ __forceinline__ DrawKey make_draw_key(const QuantizeParams& p) {
  if (p.rounding != static_cast<int>(Rounding::kStochastic)) return {{0, 0, 0}, false};
  return {{static_cast<uint64_t>(p.rng[0]), static_cast<uint32_t>(p.rng[p.rng_stride]), p.stream},
          true};
}

// A row's quarters of draws: its groups, but for nvfp4, whose rows may end in half a group of
// draws.
template <class F>
__device__ __forceinline__ int64_t draw_quarters_of_row(const QuantizeParams& p) {
  return F::kBlock % kDrawGroup == 0 ? p.kp / kDrawQuarter : draw_groups_of_row(p.kp) * kQuarters;
}

// Draws of N groups at once, each a quarter of a call: the key schedule is shared and the calls
// overlap.
template <int N>
__device__ __forceinline__ void draw_groups(const DrawKey& k, const int64_t (&quarter)[N],
                                            Philox4 (&draws)[N]) {
  if (!k.on) return;
  uint32_t k0 = static_cast<uint32_t>(k.key.seed), k1 = static_cast<uint32_t>(k.key.seed >> 32);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const uint64_t group = static_cast<uint64_t>(quarter[n]) / kQuarters;
    draws[n] = {{static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), k.key.offset,
                 k.key.stream}};
  }
#pragma unroll
  for (int round = 0; round < kPhiloxRounds; ++round) {
#pragma unroll
    for (int n = 0; n < N; ++n) draws[n] = philox_round(draws[n], k0, k1);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
#pragma unroll
  for (int n = 0; n < N; ++n)
    draws[n] = quarter_words(draws[n], static_cast<int>(quarter[n] % kQuarters));
}

}  // namespace mxtrain::cuda
