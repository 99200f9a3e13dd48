// SPDX-License-Identifier: Apache-2.0
// Strips: the fast path for bfloat16 to mxfp4 with stochastic rounding, a Hadamard rotation, or
// both. A lane owns one block, 32 consecutive elements along K of one operand row, in registers, or
// the two of a Hadamard group of 64. So maxima, scales and butterflies need no other lane. A block
// is rounded where it stands, without dividing it by its scale S, which encode.cuh takes into its
// one product, and a Hadamard norm that is a power of two moves S instead of v. Blocks whose
// maximum is no ordinary number for that (zero, subnormal, huge, NaN, Inf) are first brought to S =
// 1. Two operands of one read may also be nearest, by encode_pairs.cuh. Rows, K and strides are
// below 2^31 here, blocks below 2^32.
#pragma once

#include "cuda/group.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct StripTraits {
  static constexpr int kMostWarps = 24;                     // of a CTA, from floats
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of one from codes
  static constexpr int kTile = 64;      // rows and columns of a warp's tile of bfloat16
  static constexpr int kPassRows = 16;  // operand rows that a warp takes at once
  static constexpr int kPasses = kTile / kPassRows;
  static constexpr int kRowBytes = kTile * 2, kTileBytes = kTile * kRowBytes;
  static constexpr int kChunks = kRowBytes / 16;
  static_assert(kPassRows * kTile == 32 * 32, "a lane takes a block of 32 elements");
  static_assert(kRowBytes == 128, "a tile's row touches every bank of shared memory once");
};

// 4 x 4 tiles, whose scales leave together (strip_stages.cuh).
struct StripSquare {
  static constexpr uint32_t kSide = 4, kTiles = kSide * kSide;
  static constexpr uint32_t kRows = kSide * StripTraits::kTile, kRowScales = kRows / 32;
  static constexpr uint32_t kBytes = kRows * kRowScales;  // of one operand's scales
  static_assert(kRowScales == 8, "a lane writes a word of 8 bytes");

  // Where the scale of a block lies, from that of (row, k) = (0, 0) on.
  __device__ static __forceinline__ uint32_t scale(uint32_t row, uint32_t k) {
    return row * kRowScales + k / 32;
  }
};

// Blocks whose maximum lies in [2^-90, 2^25): nothing on the way to their codes under- or
// overflows, for prescales within 2^-20 and 2^20, and S, at most half of the maximum, not even by
// the rules that round up, is one of e2m1_stochastic8's.
struct OrdinaryTraits {
  static constexpr uint32_t kFirst = (127u - 90) << 23, kEnd = (127u + 25) << 23,
                            kCount = kEnd - kFirst;
  static_assert(25 - E2M1::kEmax <= kMostStochasticScale, "the largest maximum's scale");
  static constexpr float kSmallestPrescale = 0x1p-20f, kLargestPrescale = 0x1p20f;
};

// What a kernel does with an operand. kNone: it has none. kPairs: nearest, two elements a word,
// where the other operand goes the same way. 64: the Hadamard group, which is one of the shorter
// ones elsewhere.
enum class Strip {
  kNone,
  kPairs,
  kStochastic,
  kRotatedStochastic,
  kRotatedNearest,
  kRotated64Stochastic,
  kRotated64Nearest
};

constexpr bool rotates64(Strip s) {
  return s == Strip::kRotated64Stochastic || s == Strip::kRotated64Nearest;
}
constexpr bool rotates(Strip s) {
  return rotates64(s) || s == Strip::kRotatedStochastic || s == Strip::kRotatedNearest;
}
constexpr int row_passes(Strip s) { return StripTraits::kPasses / (rotates64(s) ? 2 : 1); }
constexpr int column_passes(Strip s) {
  return StripTraits::kPasses / (rotates64(s) || s == Strip::kPairs ? 2 : 1);
}
constexpr bool draws_bits(Strip s) {
  return s == Strip::kStochastic || s == Strip::kRotatedStochastic ||
         s == Strip::kRotated64Stochastic;
}

// ---- what is the same for all blocks of an operand ----

struct StripPlan {
  uint32_t rows, kp, blocks;  // blocks: of a row
  uint32_t round_up, ordinary;
  uint32_t norm_shift;  // float32 bits by which the norm, a power of two, moves a scale; else 0
  float norm;           // 1 where it is multiplied into the elements
  bool fits, plain;     // plain: fits, and no prescale
};

template <Strip kStrip>
__host__ __device__ __forceinline__ StripPlan make_plan(const QuantizeParams& p) {
  StripPlan plan = {};
  plan.rows = static_cast<uint32_t>(p.rows);
  plan.kp = static_cast<uint32_t>(p.kp);
  plan.blocks = plan.kp / 32;
  plan.round_up = e8m0_round_up<E2M1>(static_cast<ScaleRule>(p.scale_rule));
  plan.ordinary = p.prescale >= OrdinaryTraits::kSmallestPrescale &&
                          p.prescale <= OrdinaryTraits::kLargestPrescale
                      ? OrdinaryTraits::kCount
                      : 0u;
  plan.norm_shift =
      rotates(kStrip) && p.hadamard != 32 ? (127u << 23) - float_bits(p.hadamard_norm) : 0u;
  plan.norm = plan.norm_shift != 0 ? p.hadamard_norm : 1.0f;
  // |v| < 8 S by every rule and <= 6 S by ceil
  plan.fits = p.prescale <= 0.75f ||
              (p.scale_rule == static_cast<int>(ScaleRule::kCeil) && p.prescale <= 1.0f);
  plan.plain = plan.fits && p.prescale == 1.0f;
  return plan;
}

// The sign bits of 64 elements, in shared memory.
struct StripSigns {
  uint4 word[StripTraits::kTile / 4];
};

// Whose blocks a sign is for.
enum class StripSide { kRows, kColumns };

// Which word of its four has the sign of element i. By measurement a scheduler reads one register
// of an even number and one of an odd in a clock (docs/performance.md), and loads fill four in
// order. So a sign comes to lie in the other kind than the word of its element: word i / 2 of a
// row, so 1, 3, 0, 2, and of a column one whose number is as odd as i (ColumnLanes::matrix), so 1,
// 0, 3, 2.
__host__ __device__ constexpr int sign_slot(StripSide side, int i) {
  return i / 4 * 4 + (side == StripSide::kColumns ? i % 4 ^ 1 : (i % 4 * 2 + 1) % 5);
}

template <Strip kStrip, StripSide kSide>
__device__ __forceinline__ void fill_signs(uint4 (&signs)[StripTraits::kTile / 4],
                                           const QuantizeParams& p) {
  if constexpr (rotates(kStrip)) {
#pragma unroll 1
    for (int i = threadIdx.x; i < StripTraits::kTile; i += blockDim.x)
      reinterpret_cast<uint32_t*>(signs)[sign_slot(kSide, i)] =
          p.signs != nullptr && p.signs[i % p.hadamard] < 0 ? kSignBit : 0u;
  }
}

// The same in all lanes, and the compiler knows it: so it lies in a uniform register.
__device__ __forceinline__ uint32_t uniform(uint32_t v) { return __shfl_sync(kAllLanes, v, 0); }

__device__ __forceinline__ PhiloxSchedule uniform_schedule(const QuantizeParams& p) {
  PhiloxSchedule s = philox_schedule(static_cast<uint64_t>(p.rng[0]),
                                     static_cast<uint32_t>(p.rng[p.rng_stride]), p.stream);
  s.first = uniform(s.first);
  s.second[0] = uniform(s.second[0]), s.second[1] = uniform(s.second[1]);
#pragma unroll
  for (auto& key : s.key) key[0] = uniform(key[0]), key[1] = uniform(key[1]);
  return s;
}

// An operand of the kernels from floats: the plan among their parameters, the keys in uniform
// registers, signs in shared memory. stage: 0, or where the tile's scales wait for those of its
// square (strip_stages.cuh); only where kStages.
template <bool kStages>
struct StripOperand {
  static constexpr bool kStaged = kStages;
  const StripPlan& plan;
  const PhiloxSchedule& keys;
  const uint4* signs;
  uint32_t stage;
};

// An operand of the kernels from codes, in shared memory; keys: (k0, k1) of the rounds.
struct StripTables {
  uint4 signs[StripTraits::kTile / 4];
  uint2 keys[kPhiloxRounds];
  StripPlan plan;
  uint32_t offset;

  static constexpr bool kStaged = false;
};

template <Strip kStrip>
__device__ __forceinline__ void fill_tables(StripTables& t, const QuantizeParams& p) {
  const int i = threadIdx.x;
  if (kStrip != Strip::kNone && i == 0) {
    t.plan = make_plan<kStrip>(p);
    t.offset = draws_bits(kStrip) ? static_cast<uint32_t>(p.rng[p.rng_stride]) : 0u;
  }
  fill_signs<kStrip, StripSide::kColumns>(t.signs, p);
  if (draws_bits(kStrip) && i < kPhiloxRounds) {
    const uint64_t seed = static_cast<uint64_t>(p.rng[0]);
    t.keys[i] = make_uint2(static_cast<uint32_t>(seed) + i * kPhiloxW0,
                           static_cast<uint32_t>(seed >> 32) + i * kPhiloxW1);
  }
}

// ---- one block of 32 elements ----

struct StripBlock {
  uint4 codes;
  uint32_t scale;  // in the low byte
};

// The call of a block, which is a group of draws.
__device__ __forceinline__ Philox4 draw_block(const StripTables& t, uint64_t group,
                                              uint32_t stream) {
  ptx::compiler_fence();  // the keys wait in shared memory, so that no draw is made too early
  Philox4 c = {
      {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32), t.offset, stream}};
#pragma unroll
  for (int i = 0; i < kPhiloxRounds; ++i) {
    const uint2 key = t.keys[i];
    c = philox_round(c, key.x, key.y);
  }
  return c;
}

template <bool kStages>
__device__ __forceinline__ Philox4 draw_block(const StripOperand<kStages>& o, uint64_t group,
                                              uint32_t) {
  return philox_group(o.keys, static_cast<uint32_t>(group));
}

__device__ __forceinline__ void limit_block(float (&v)[32], uint32_t scale_bits) {
  const float max = bits_float(E2M1::kMaxBits) * bits_float(scale_bits);
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = fminf(fmaxf(v[i], -max), max);
}

// The codes of v over the scale of these float32 bits, prescaled and limited. group: of its draws.
template <Strip kStrip, class Tables>
__device__ __forceinline__ uint4 encode_block(float (&v)[32], uint32_t scale_bits,
                                              const QuantizeParams& p, const Tables& tables,
                                              uint64_t group) {
  // Or the compiler keeps every v twice: its sign from before a branch, its magnitude from after.
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = ptx::opaque(v[i]);
  uint32_t w[4];
  if (draws_bits(kStrip)) {
    const Philox4 words = draw_block(tables, group, p.stream);
#pragma unroll
    for (int n = 0; n < kQuarters; ++n)
      w[n] = e2m1_stochastic8(v + 8 * n, scale_bits, quarter_words(words, n));
  } else {
#pragma unroll
    for (int n = 0; n < 4; ++n) w[n] = e2m1_nearest8(v + 8 * n, scale_bits);
  }
  return make_uint4(w[0], w[1], w[2], w[3]);
}

// By the steps of docs/numerics.md one after the other, to S = 1: where the maximum is no ordinary
// number.
template <Strip kStrip, class Tables>
__device__ __forceinline__ StripBlock quantize_odd_block(float (&v)[32], uint32_t max_bits,
                                                         const QuantizeParams& p,
                                                         const Tables& tables, uint64_t group) {
  const StripPlan& plan = tables.plan;
  const uint32_t m = float_bits(bits_float(max_bits) * plan.norm);
  const bool empty = m == 0 || m >= kInfBits;
  const uint32_t code = e8m0_scale<E2M1>(m, plan.round_up);
  const float factor = e8m0_reciprocal(code);
#pragma unroll
  for (int i = 0; i < 32; ++i) v[i] = empty ? 0.0f : v[i] * plan.norm * p.prescale * factor;
  if (!plan.fits) limit_block(v, float_bits(1.0f));
  return {encode_block<kStrip>(v, float_bits(1.0f), p, tables, group),
          m >= kInfBits ? kE8M0Nan : code};
}

__device__ __forceinline__ bool is_ordinary(const StripPlan& plan, uint32_t max_bits) {
  return max_bits - OrdinaryTraits::kFirst < plan.ordinary;
}

// The scale of an ordinary block, as a code; code: in the low byte.
__device__ __forceinline__ uint32_t scale_code(const StripPlan& plan, uint32_t max_bits) {
  return e8m0_scale<E2M1>(max_bits - plan.norm_shift, plan.round_up);
}
__device__ __forceinline__ uint32_t scale_bits_of(const StripPlan& plan, uint32_t code) {
  return (code << 24 >> 1) + plan.norm_shift;
}

// v: a block, before a norm that moves the scale; max_bits: of its maximum; group: of its draws.
template <Strip kStrip, class Tables>
__device__ __forceinline__ StripBlock quantize_block(float (&v)[32], uint32_t max_bits,
                                                     const QuantizeParams& p, const Tables& tables,
                                                     uint64_t group) {
  const StripPlan& plan = tables.plan;
  // A path of its own, or the compiler moves all of v where the paths meet.
  if (!is_ordinary(plan, max_bits))
    return quantize_odd_block<kStrip>(v, max_bits, p, tables, group);
  const uint32_t code = scale_code(plan, max_bits), scale_bits = scale_bits_of(plan, code);
  if (!plan.plain) {
#pragma unroll
    for (int i = 0; i < 32; ++i) v[i] *= p.prescale;
    if (!plan.fits) limit_block(v, scale_bits);
  }
  return {encode_block<kStrip>(v, scale_bits, p, tables, group), code};
}

// The same of an ordinary block where the plan is plain, from the code of its scale.
template <Strip kStrip, class Tables>
__device__ __forceinline__ StripBlock quantize_short(float (&v)[32], uint32_t code,
                                                     const QuantizeParams& p, const Tables& tables,
                                                     uint64_t group) {
  return {encode_block<kStrip>(v, scale_bits_of(tables.plan, code), p, tables, group), code};
}

// Whether a warp's blocks, two a lane or one, go the short way, which has no branches: a jump waits
// for instructions. Others go by a copy of the code that knows all cases.
template <class Tables>
__device__ __forceinline__ bool is_short(const Tables& tables, uint32_t max_bits,
                                         uint32_t other_max_bits) {
  const StripPlan& plan = tables.plan;
  bool whole = true;
  if constexpr (Tables::kStaged) whole = tables.stage != 0;
  return __all_sync(kAllLanes, whole && plan.plain && is_ordinary(plan, max_bits) &&
                                   is_ordinary(plan, other_max_bits));
}

// Largest |v| bits of 32 elements; a NaN wins.
__device__ __forceinline__ uint32_t amax32(const float* v) {
  uint32_t m[16];  // of magnitudes the order of the bits is that of the floats
#pragma unroll
  for (int i = 0; i < 16; ++i)
    m[i] = float_bits(ptx::max_nan_f32(fabsf(v[2 * i]), fabsf(v[2 * i + 1])));
#pragma unroll
  for (int i = 2; i < 14; i += 4)
#pragma unroll
    for (int j = 0; j < 2; ++j) m[j] = ptx::max3_u32(m[j], m[i + j], m[i + j + 2]);
  return max(ptx::max3_u32(m[0], m[1], m[14]), m[15]);
}

// The butterflies of the first `last` strides, upward.
__device__ __forceinline__ void butterflies(float (&v)[32], int last) {
#pragma unroll
  for (int stride = 1; stride <= last; stride *= 2)
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if (!(i & stride)) {
        const float a = v[i], b = v[i + stride];
        v[i] = a + b;
        v[i + stride] = a - b;
      }
}

// Sylvester order; signs are already in v.
__device__ __forceinline__ void rotate_short(float (&v)[32], int group, float norm) {
  butterflies(v, 8);
  if (group == 16) return;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const float a = v[i], b = v[i + 16];
    v[i] = (a + b) * norm;
    v[i + 16] = (a - b) * norm;
  }
}

__device__ __forceinline__ void rotate64(float (&v)[2][32]) {
  butterflies(v[0], 16);
  butterflies(v[1], 16);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const float a = v[0][i], b = v[1][i];
    v[0][i] = a + b;
    v[1][i] = a - b;
  }
}

// A block's row and k: those of the tile's corner, and how far it is from there.
struct BlockPlace {
  uint32_t row, k, tile_row, tile_k;

  __device__ __forceinline__ BlockPlace below(uint32_t rows) const {
    return {row, k, tile_row + rows, tile_k};
  }
  // The block's number, which is that of its draws. blocks: of a row.
  __device__ __forceinline__ uint32_t group(uint32_t blocks) const {
    return (row + tile_row) * blocks + (k + tile_k) / 32;
  }
};

// Neighbour lanes write the 32 bytes of codes, and the two scales, of 64 elements of a row.
// group: of the block. kShort: see is_short.
template <bool kShort, class Tables>
__device__ __forceinline__ void store_block(const QuantizeParams& p, const Tables& tables,
                                            const BlockPlace& at, uint32_t group,
                                            const StripBlock& b) {
  uint4* to = reinterpret_cast<uint4*>(p.data) + group;
  if constexpr (Tables::kStaged) {
    if (kShort || tables.stage != 0) {  // then the tile is a whole one
      *to = b.codes;
      return ptx::st_shared_u8(tables.stage + StripSquare::scale(at.tile_row, at.tile_k), b.scale);
    }
  }
  const uint32_t row = at.row + at.tile_row, k = at.k + at.tile_k;
  if (row >= tables.plan.rows || k >= tables.plan.kp) return;
  *to = b.codes;
  if (p.swizzled)
    *scale_at<Mxfp4>(p, row, k) = static_cast<uint8_t>(b.scale);
  else
    p.scale[group] = static_cast<uint8_t>(b.scale);
}

template <Strip kStrip, class Tables>
__device__ __forceinline__ void finish_block(float (&v)[32], uint32_t max_bits,
                                             const QuantizeParams& p, const Tables& tables,
                                             const BlockPlace& at) {
  if constexpr (rotates(kStrip)) {
    rotate_short(v, p.hadamard, p.hadamard_norm);
    max_bits = amax32(v);
  }
  const uint32_t group = at.group(tables.plan.blocks);
  if (is_short(tables, max_bits, max_bits)) {
    const uint32_t code = scale_code(tables.plan, max_bits);
    store_block<true>(p, tables, at, group, quantize_short<kStrip>(v, code, p, tables, group));
  } else {
    store_block<false>(p, tables, at, group, quantize_block<kStrip>(v, max_bits, p, tables, group));
  }
}

// Which row of a pass a lane has in finish64, and how many rows on its odd neighbour's is.
struct RowLanes {
  static constexpr uint32_t kNeighbour = 1;
  __device__ static __forceinline__ uint32_t row(uint32_t lane) { return lane; }
};

// Neighbour lanes hold the two blocks of two rows. Afterwards the even lane has the first
// block of both rows, the odd lane the second.
__device__ __forceinline__ void exchange(uint32_t& first, uint32_t& second, bool odd) {
  const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? first : second, 1);
  first = odd ? got : first;
  second = odd ? second : got;
}
__device__ __forceinline__ void exchange_codes(StripBlock& first, StripBlock& second, bool odd) {
  exchange(first.codes.x, second.codes.x, odd);
  exchange(first.codes.y, second.codes.y, odd);
  exchange(first.codes.z, second.codes.z, odd);
  exchange(first.codes.w, second.codes.w, odd);
}

// See finish64; m: the maxima of both blocks, for kShort.
template <Strip kStrip, class Lanes, bool kShort, class Tables, class AfterFirst>
__device__ __forceinline__ void finish_two(float (&v)[2][32], const uint32_t (&m)[2],
                                           const QuantizeParams& p, const Tables& tables,
                                           uint32_t row, uint32_t k, uint32_t first,
                                           AfterFirst after_first) {
  const uint32_t blocks = tables.plan.blocks;
  const auto group = [&](uint32_t lane) {
    return (row + first + Lanes::row(lane)) * blocks + k / 32;
  };
  const auto quantize = [&](int i, uint32_t lane, uint32_t codes) {
    if constexpr (kShort)
      return quantize_short<kStrip>(v[i], codes >> (8 * i), p, tables, group(lane) + i);
    else  // the maximum anew: to keep it would take a register too many
      return quantize_block<kStrip>(v[i], amax32(v[i]), p, tables, group(lane) + i);
  };
  const StripPlan& plan = tables.plan;  // one register for both scales
  const uint32_t codes = kShort ? scale_code(plan, m[0]) | scale_code(plan, m[1]) << 8 : 0;
  StripBlock even = quantize(0, ptx::lane_id(), codes);
  after_first();
  StripBlock odd = quantize(1, threadIdx.x % 32, codes);
  const uint32_t lane = ptx::lane_id(), half = lane % 2;
  exchange_codes(even, odd, half);  // so that together they write 32 bytes of a row at a time
  const uint32_t to = group(lane - half) + half;
  if constexpr (kShort && Tables::kStaged) {
    ptx::st_shared_u16(tables.stage + StripSquare::scale(first + Lanes::row(lane), 0), codes);
    uint4* data = reinterpret_cast<uint4*>(p.data) + to;
    data[0] = even.codes;
    data[Lanes::kNeighbour * blocks] = odd.codes;
    return;
  }
  exchange(even.scale, odd.scale, half);
  const BlockPlace at = {row, k, first + Lanes::row(lane - half), 32 * half};
  store_block<kShort>(p, tables, at, to, even);
  store_block<kShort>(p, tables, at.below(Lanes::kNeighbour), to + Lanes::kNeighbour * blocks, odd);
}

// Lane i has the blocks at k and k + 32 of row first + Lanes::row(i) of the tile, whose corner is
// (row, k). Its place is found anew where it is needed, so that it takes no registers
// in between. after_first: called when the first block's are free again.
template <Strip kStrip, class Lanes, class Tables, class AfterFirst>
__device__ __forceinline__ void finish64(float (&v)[2][32], const QuantizeParams& p,
                                         const Tables& tables, uint32_t row, uint32_t k,
                                         uint32_t first, AfterFirst after_first) {
  rotate64(v);
  const uint32_t m[2] = {amax32(v[0]), amax32(v[1])};
  if (is_short(tables, m[0], m[1]))
    finish_two<kStrip, Lanes, true>(v, m, p, tables, row, k, first, after_first);
  else
    finish_two<kStrip, Lanes, false>(v, m, p, tables, row, k, first, after_first);
}

}  // namespace mxtrain::cuda
