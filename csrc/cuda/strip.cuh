// SPDX-License-Identifier: Apache-2.0
// Strips: the fast path for bfloat16 to mxfp4 with stochastic rounding, a Hadamard rotation, or
// both. A thread owns 64 consecutive elements along K of one operand row, in registers: two blocks
// and any Hadamard group up to 64. So butterflies, maxima and scales need no other lane, and each
// is done once. A block is rounded where it stands, without dividing it by its scale S: with
// a = |v| and b = a + max(a, S), the bits of b - S above bit 22 are the code (encode.cuh, moved up
// by S), and a Hadamard norm that is a power of two moves S instead of v. Blocks whose maximum is
// no ordinary number for that (zero, subnormal, huge, NaN, Inf) are first brought to S = 1.
#pragma once

#include "cuda/group.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct StripTraits {
  static constexpr int kThreads = 128;
  static constexpr int kElements = 64;
  static constexpr int kTileRows = 128;            // of x
  static constexpr int kRowBytes = kElements * 2;  // a tile is 64 columns of bfloat16
  static constexpr int kTileBytes = kTileRows * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kColumnStrips = kTileRows / kElements;
  static_assert(kTileRows == kThreads, "row half: a thread takes one row of the tile");
  static_assert(kElements * kColumnStrips == kThreads,
                "column half: a thread takes one column of each 64 rows");
  static_assert(2 * kTileBytes <= 40 * 1024, "two tiles and the tables are static shared memory");
};

// Blocks whose maximum lies in [2^-90, 2^100): nothing on the way to their codes under- or
// overflows, for prescales within 2^-20 and 2^20.
struct OrdinaryTraits {
  static constexpr uint32_t kFirst = (127u - 90) << 23, kCount = 190u << 23;
  static constexpr float kSmallestPrescale = 0x1p-20f, kLargestPrescale = 0x1p20f;
};

// What a kernel does with an operand. kNone: it has none.
enum class Strip { kNone, kStochastic, kRotatedStochastic, kRotatedNearest };

constexpr bool rotates(Strip s) {
  return s == Strip::kRotatedStochastic || s == Strip::kRotatedNearest;
}
constexpr bool draws_bits(Strip s) {
  return s == Strip::kStochastic || s == Strip::kRotatedStochastic;
}

// ---- shared memory ----

// Sign bits of a strip's elements and the Philox key schedule: (k0, k1) of two rounds a uint4.
struct StripTables {
  uint4 signs[StripTraits::kElements / 4];
  uint4 keys[kPhiloxRounds / 2];
};

template <Strip kStrip>
__device__ __forceinline__ void fill_tables(StripTables& t, const QuantizeParams& p) {
  const int i = threadIdx.x;
  if (rotates(kStrip) && i < StripTraits::kElements)
    reinterpret_cast<uint32_t*>(t.signs)[i] =
        p.signs != nullptr && p.signs[i % p.hadamard] < 0 ? kSignBit : 0u;
  if (draws_bits(kStrip) && i < kPhiloxRounds) {
    const uint64_t seed = static_cast<uint64_t>(p.rng[0]);
    reinterpret_cast<uint2*>(t.keys)[i] =
        make_uint2(static_cast<uint32_t>(seed) + i * kPhiloxW0,
                   static_cast<uint32_t>(seed >> 32) + i * kPhiloxW1);
  }
}

// Chunk j of 16 bytes of tile row r lies at j ^ r % 8: threads that read rows, and threads that
// read columns, touch every bank once.
__device__ __forceinline__ uint32_t strip_offset(int r, int chunk) {
  return r * StripTraits::kRowBytes + ((chunk ^ (r & 7)) * 16);
}

// ---- what is the same for all strips of an operand ----

template <Strip kStrip>
struct StripPlan {
  uint32_t round_up, ordinary, offset;
  uint32_t norm_shift;  // float32 bits by which the norm, a power of two, moves a scale; else 0
  float norm;           // 1 where it is multiplied into the elements
  bool fits, prescaled;

  __device__ __forceinline__ explicit StripPlan(const QuantizeParams& p)
      : round_up(e8m0_round_up<E2M1>(static_cast<ScaleRule>(p.scale_rule))),
        ordinary(p.prescale >= OrdinaryTraits::kSmallestPrescale &&
                         p.prescale <= OrdinaryTraits::kLargestPrescale
                     ? OrdinaryTraits::kCount
                     : 0u),
        offset(draws_bits(kStrip) ? static_cast<uint32_t>(p.rng[p.rng_stride]) : 0u),
        norm_shift(rotates(kStrip) && p.hadamard != 32 ? (127u << 23) - float_bits(p.hadamard_norm)
                                                       : 0u),
        norm(norm_shift != 0 ? p.hadamard_norm : 1.0f),
        // |v| < 8 S by every rule and <= 6 S by ceil
        fits(p.prescale <= 0.75f ||
             (p.scale_rule == static_cast<int>(ScaleRule::kCeil) && p.prescale <= 1.0f)),
        prescaled(p.prescale != 1.0f) {}
};

// ---- one block of 32 elements ----

struct StripBlock {
  uint4 codes;
  uint32_t scale;
};

// Groups group .. group + 3, where group is a multiple of 4.
__device__ __forceinline__ void draw_block(const StripTables& t, int64_t group, uint32_t offset,
                                           uint32_t stream, Philox4 (&draws)[4]) {
  const uint32_t low = static_cast<uint32_t>(group), high = static_cast<uint32_t>(group >> 32);
#pragma unroll
  for (int n = 0; n < 4; ++n) draws[n] = {{low + n, high, offset, stream}};
#pragma unroll
  for (int i = 0; i < kPhiloxRounds / 2; ++i) {
    const uint4 key = t.keys[i];
#pragma unroll
    for (int n = 0; n < 4; ++n) draws[n] = philox_round(draws[n], key.x, key.y);
#pragma unroll
    for (int n = 0; n < 4; ++n) draws[n] = philox_round(draws[n], key.z, key.w);
  }
}

// 8 codes; scale_bits: float32 bits of S, a power of two.
__device__ __forceinline__ uint32_t strip_stochastic8(const float* v, uint32_t scale_bits,
                                                      const Philox4& draws) {
  using T = EncodeTraits<E2M1>;
  constexpr uint32_t kUp = 64u;  // the code's place: bits 28..30
  const float s = bits_float(scale_bits);
  const uint32_t carry = kUp * (T::kCarry - scale_bits);
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float a = fabsf(v[i]);
    const uint32_t b = float_bits(__fadd_ru(a, fmaxf(a, s)));
    const uint32_t t = ptx::mad_lo_u32(draw16(draws, i), 0u - kUp * T::kDrawStep, carry);
    word = __funnelshift_l(e2m1_top_nibble(ptx::mad_lo_u32(b, kUp, t), v[i]), word, 4);
  }
  return word;
}

__device__ __forceinline__ uint32_t strip_nearest8(const float* v, uint32_t scale_bits) {
  const float s = bits_float(scale_bits);
  const uint32_t back = 254u - (scale_bits >> 22);
  uint32_t word = 0;
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const float a = fabsf(v[i]);
    const uint32_t binade = float_bits(fmaxf(a, s)) & kInfBits;
    const uint32_t n = float_bits(a + bits_float(binade + (22u << 23) + 2u)) - binade;
    word = __funnelshift_l(e2m1_top_nibble((n + (binade >> 22) + back) << 28, v[i]), word, 4);
  }
  return word;
}

// The elements over their scale, by the steps of docs/numerics.md one after the other; then S = 1.
template <Strip kStrip>
__device__ __forceinline__ uint32_t to_grid_of_one(float* v, uint32_t max_bits,
                                                   const StripPlan<kStrip>& plan, float prescale,
                                                   uint32_t& code) {
  const bool finite = max_bits < kInfBits;
  const uint32_t m = float_bits(bits_float(max_bits) * plan.norm);
  const bool empty = m == 0 || !finite;
  code = e8m0_scale<E2M1>(m, plan.round_up);
  const float factor = e8m0_reciprocal(code), max = bits_float(E2M1::kMaxBits);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float u = v[i] * plan.norm * prescale * factor;
    v[i] = empty ? 0.0f : fminf(fmaxf(u, -max), max);
  }
  code = finite ? code : kE8M0Nan;
  return float_bits(1.0f);
}

// v: 32 elements in registers, before a norm that moves the scale; max_bits: of their maximum.
template <Strip kStrip>
__device__ __forceinline__ StripBlock quantize_block(float* v, uint32_t max_bits,
                                                     const StripPlan<kStrip>& plan,
                                                     const QuantizeParams& p,
                                                     const StripTables& tables, int64_t group) {
  uint32_t scale_bits, code;
  if (max_bits - OrdinaryTraits::kFirst < plan.ordinary) {
    code = e8m0_scale<E2M1>(max_bits - plan.norm_shift, plan.round_up);
    scale_bits = (code << 23) + plan.norm_shift;
    if (plan.prescaled)
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i] *= p.prescale;
    if (!plan.fits) {
      const float max = 6.0f * bits_float(scale_bits);
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i] = fminf(fmaxf(v[i], -max), max);
    }
  } else {
    scale_bits = to_grid_of_one(v, max_bits, plan, p.prescale, code);
  }
  uint32_t w[4];
  if (draws_bits(kStrip)) {
    Philox4 draws[4];
    draw_block(tables, group, plan.offset, p.stream, draws);
#pragma unroll
    for (int n = 0; n < 4; ++n) w[n] = strip_stochastic8(v + 8 * n, scale_bits, draws[n]);
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) w[n] = strip_nearest8(v + 8 * n, scale_bits);
  }
  return {make_uint4(w[0], w[1], w[2], w[3]), code};
}

__device__ __forceinline__ void store_block(const QuantizeParams& p, int64_t row, int64_t k,
                                            const StripBlock& b) {
  *reinterpret_cast<uint4*>(p.data + row * (p.kp / 2) + k / 2) = b.codes;
  *scale_at<Mxfp4>(p, row, k) = static_cast<uint8_t>(b.scale);
}

// Largest |v| bits of 32 elements; a NaN wins.
__device__ __forceinline__ uint32_t amax32(const float* v) {
  float m[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    m[j] = fabsf(v[j]);
#pragma unroll
    for (int i = j + 4; i < 32; i += 4) m[j] = ptx::max_nan_f32(m[j], fabsf(v[i]));
  }
  return float_bits(ptx::max_nan_f32(ptx::max_nan_f32(m[0], m[1]), ptx::max_nan_f32(m[2], m[3])));
}

// Sylvester order, strides 1 upward; signs are already in v.
__device__ __forceinline__ void rotate64(float (&v)[64], int group, float norm) {
  const auto stage = [&](int stride) {
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (!(i & stride)) {
        const float a = v[i], b = v[i + stride];
        v[i] = a + b;
        v[i + stride] = a - b;
      }
  };
  stage(1), stage(2), stage(4), stage(8);
  if (group >= 32) stage(16);
  if (group >= 64) stage(32);
  if (group == 32)
#pragma unroll
    for (int i = 0; i < 64; ++i) v[i] *= norm;
}

// ---- strips from a tile ----

__device__ __forceinline__ float widen_with_sign(uint32_t half, uint32_t sign) {
  return bits_float(ptx::mad_lo_u32(half, 1u << 16, sign));  // adding bit 31 flips it
}

// 32 words of a tile's row -> 64 floats, or a block of it.
template <int kWords>
__device__ __forceinline__ void read_words(const uint8_t* tile, int r, int chunk,
                                           uint32_t (&w)[kWords]) {
#pragma unroll
  for (int j = 0; j < kWords / 4; ++j) {
    const uint4 raw = *reinterpret_cast<const uint4*>(tile + strip_offset(r, chunk + j));
    w[4 * j] = raw.x, w[4 * j + 1] = raw.y, w[4 * j + 2] = raw.z, w[4 * j + 3] = raw.w;
  }
}

// The rotated strip: quantize both blocks of v.
template <Strip kStrip>
__device__ __forceinline__ void finish_rotated(float (&v)[64], const QuantizeParams& p,
                                               const StripPlan<kStrip>& plan,
                                               const StripTables& tables, int64_t row, int64_t k0) {
  rotate64(v, p.hadamard, p.hadamard_norm);
  const int64_t group = row * (p.kp / 8) + k0 / 8;
#pragma unroll
  for (int b = 0; b < 2; ++b) {
    if (k0 + 32 * b >= p.kp) return;
    const uint32_t m = amax32(v + 32 * b);
    store_block(p, row, k0 + 32 * b, quantize_block(v + 32 * b, m, plan, p, tables, group + 4 * b));
  }
}

// Operand row `row` is row threadIdx.x of the tile, its columns are k0 and up.
template <Strip kStrip>
__device__ __forceinline__ void row_strip(const uint8_t* tile, const QuantizeParams& p,
                                          const StripPlan<kStrip>& plan, const StripTables& tables,
                                          int64_t row, int64_t k0) {
  if (row >= p.rows || k0 >= p.kp) return;
  const int r = threadIdx.x;
  if constexpr (rotates(kStrip)) {
    uint32_t w[32];
    float v[64];
    read_words<32>(tile, r, 0, w);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint4 s = tables.signs[i];
      v[4 * i] = widen_with_sign(w[2 * i], s.x);
      v[4 * i + 1] = bits_float((w[2 * i] & 0xFFFF0000u) ^ s.y);
      v[4 * i + 2] = widen_with_sign(w[2 * i + 1], s.z);
      v[4 * i + 3] = bits_float((w[2 * i + 1] & 0xFFFF0000u) ^ s.w);
    }
    finish_rotated(v, p, plan, tables, row, k0);
  } else {
    const int64_t group = row * (p.kp / 8) + k0 / 8;
#pragma unroll 1
    for (int b = 0; b < 2; ++b) {
      if (k0 + 32 * b >= p.kp) return;
      uint32_t w[16];
      float v[32];
      read_words<16>(tile, r, 4 * b, w);
      uint32_t m2 = ptx::abs_bf16x2(w[0]);
#pragma unroll
      for (int i = 1; i < 16; ++i) m2 = ptx::max_nan_bf16x2(m2, ptx::abs_bf16x2(w[i]));
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        v[2 * i] = widen_with_sign(w[i], 0);
        v[2 * i + 1] = bits_float(w[i] & 0xFFFF0000u);
      }
      const uint32_t m = max(m2 << 16, m2 & 0xFFFF0000u);
      store_block(p, row, k0 + 32 * b, quantize_block(v, m, plan, p, tables, group + 4 * b));
    }
  }
}

// N elements of column c of the tile, from row k on (a multiple of 8).
template <int N>
__device__ __forceinline__ void read_column(const uint8_t* tile, int k, int c,
                                            uint32_t (&half)[N]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint8_t* at = tile + strip_offset(k + j, c / 8) + c % 8 * 2;
#pragma unroll
    for (int i = 0; i < N; i += 8)
      half[i + j] = *reinterpret_cast<const uint16_t*>(at + i * StripTraits::kRowBytes);
  }
}

// Operand row `row` is column threadIdx.x % 64 of the tile, from its row k on; k0 there.
template <Strip kStrip>
__device__ __forceinline__ void column_strip(const uint8_t* tile, const QuantizeParams& p,
                                             const StripPlan<kStrip>& plan,
                                             const StripTables& tables, int64_t r_base,
                                             int64_t k_base) {
  const int c = threadIdx.x % 64, k = threadIdx.x / 64 * StripTraits::kElements;
  const int64_t row = r_base + c, k0 = k_base + k;
  if (row >= p.rows || k0 >= p.kp) return;
  if constexpr (rotates(kStrip)) {
    uint32_t half[64];
    float v[64];
    read_column<64>(tile, k, c, half);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const uint4 s = tables.signs[i];
      v[4 * i] = widen_with_sign(half[4 * i], s.x);
      v[4 * i + 1] = widen_with_sign(half[4 * i + 1], s.y);
      v[4 * i + 2] = widen_with_sign(half[4 * i + 2], s.z);
      v[4 * i + 3] = widen_with_sign(half[4 * i + 3], s.w);
    }
    finish_rotated(v, p, plan, tables, row, k0);
  } else {
    const int64_t group = row * (p.kp / 8) + k0 / 8;
#pragma unroll 1
    for (int b = 0; b < 2; ++b) {
      if (k0 + 32 * b >= p.kp) return;
      uint32_t half[32];
      float v[32];
      read_column<32>(tile, k + 32 * b, c, half);
#pragma unroll
      for (int i = 0; i < 32; ++i) v[i] = widen_with_sign(half[i], 0);
      store_block(p, row, k0 + 32 * b,
                  quantize_block(v, amax32(v), plan, p, tables, group + 4 * b));
    }
  }
}

}  // namespace mxtrain::cuda
