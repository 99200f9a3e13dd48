// SPDX-License-Identifier: Apache-2.0
// int8_block: the codes, scales and residuals of a matrix, as formats/int8.h defines them.
//   one thread block a 128 x 128 block, which stays in registers: one read of x
//   largest magnitude -> scale -> codes [-> what they leave -> its scale -> residual codes]
// A thread holds 8 consecutive columns of 8 rows, 16 apart. Codes of the transpose go through
// shared memory in words of 4, swizzled so that neither side meets bank conflicts. The blocks that
// fall back and those that are not finite are counted on the device.
#include "cuda/group.cuh"
#include "cuda/int8.h"
#include "cuda/launch.cuh"
#include "formats/float16.h"
#include "formats/int8.h"
#include "ptx/bf16x2.cuh"
#include "ptx/integer.cuh"
#include "ptx/memory.cuh"
#include "random/philox.h"

namespace mxtrain::cuda {

// ---- traits ----

struct Int8Tile {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kAcross = kInt8Block / 8;       // threads along a row
  static constexpr int kRowStep = kThreads / kAcross;  // rows between a thread's
  static constexpr int kRows = kInt8Block / kRowStep;  // of a thread
  static constexpr int kWords = kInt8Block / 4;        // words of codes in a row
  static constexpr int kOwnDraws = kRows / kQuarters;  // Philox calls of a thread
  static_assert(kAcross % kQuarters == 0 && kRows % kQuarters == 0, "four lanes share their calls");
  // Blocks on a multiprocessor, by what the registers hold: 32 words of bfloat16 a thread. (Before
  // 9.0 a few would be spilled with three.)
  static constexpr int blocks(FloatType type, bool fallback) {
    return type != FloatType::kBfloat16 ? 1 : !fallback ? 4 : kCodeArch >= 90 ? 3 : 2;
  }
  static constexpr int kUnit = 16;  // codes in a store of the transpose
};

// 8 elements of x as they came.
template <FloatType kType>
struct Raw8 {
  static constexpr int kSize = kType == FloatType::kFloat32 ? 4 : 2;
  uint32_t w[2 * kSize];

  __device__ __forceinline__ float operator[](int j) const {
    if (kType == FloatType::kFloat32) return bits_float(w[j]);
    const uint16_t h = static_cast<uint16_t>(w[j / 2] >> (16 * (j % 2)));
    return kType == FloatType::kBfloat16 ? bf16_to_float(h) : half_to_float(h);
  }
  // Of elements 4 h to 4 h + 3: 0xFF for a negative one's byte.
  __device__ __forceinline__ uint32_t signs4(int h) const {
    if (kSize == 2) return ptx::prmt(w[2 * h], w[2 * h + 1], 0xFDB9);
    const uint32_t* f = w + 4 * h;
    return __byte_perm(ptx::prmt(f[0], f[1], 0x00FB), ptx::prmt(f[2], f[3], 0x00FB), 0x5410);
  }
  __device__ __forceinline__ void set(int j, uint32_t bits) {
    if (kType == FloatType::kFloat32)
      w[j] = bits;
    else
      w[j / 2] |= bits << (16 * (j % 2));
  }
};

// ---- device helpers ----

template <FloatType kType, bool kVector>
__device__ __forceinline__ Raw8<kType> load8(const Int8QuantizeParams& p, int64_t r, int64_t k) {
  using R = Raw8<kType>;
  R v = {};
  if (r >= p.rows || k >= p.cols) return v;
  const auto* base = static_cast<const uint8_t*>(p.x) +
                     (r * p.stride_row + k * (kVector ? 1 : p.stride_col)) * R::kSize;
  if constexpr (kVector) {
#pragma unroll
    for (int i = 0; i < R::kSize / 2; ++i) {
      const uint4 q = ptx::ld_global_nc_v4(base + 16 * i);
      v.w[4 * i] = q.x, v.w[4 * i + 1] = q.y, v.w[4 * i + 2] = q.z, v.w[4 * i + 3] = q.w;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (k + j < p.cols) {
        const uint8_t* at = base + j * p.stride_col * R::kSize;
        v.set(j, R::kSize == 4 ? *reinterpret_cast<const uint32_t*>(at)
                               : *reinterpret_cast<const uint16_t*>(at));
      }
  }
  return v;
}

// The largest magnitude of a block, as float32 bits, in every thread. `partial`: the thread's own.
__device__ __forceinline__ uint32_t block_max(uint32_t partial, uint32_t* shared) {
  const uint32_t own = __reduce_max_sync(0xFFFFFFFFu, partial);
  __syncthreads();  // what was read of shared before has been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < Int8Tile::kWarps; ++i) largest = max(largest, shared[i]);
  return largest;
}

__device__ __forceinline__ uint32_t pack4(const float* rounded) {
  const uint32_t low = __byte_perm(float_bits(rounded[0]), float_bits(rounded[1]), 0x0040);
  const uint32_t high = __byte_perm(float_bits(rounded[2]), float_bits(rounded[3]), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// The codes of formats/int8.h's int8_stochastic for finite u, four of them, in fewer instructions.
// |u| + 128 - 2^-17, rounded up to a multiple of 2^-16, has the bits of n + 128 and, below them, a
// 16-bit F for the fraction f, with f * 2^16 > draw + 1/2 just where F > draw (or n has its carry
// already, above 65535 1/2). So plus 65535 - draw it carries into n just there, and the third byte
// is the magnitude; at most 127, since |u| is at most 127 + 2^-17 (tests/int8 tries all maxima of a
// binade; others have the same quotients). Of a zero the sum would lie under 128: its |u| is 2^-20,
// which never goes up either. flipped: draws 2 h and 2 h + 1 in the halves of word h, all bits
// flipped. signs: 0xFF for a negative one's byte.
__device__ __forceinline__ uint32_t stochastic4(const float* u, const uint32_t* flipped,
                                                uint32_t signs) {
  constexpr float kSmall = 0x1p-20f, kBelow128 = 128.0f - 0x1p-17f;
  static_assert(kInt8Max == 127.0f, "the sums lie in [128, 256), a binade with steps of 2^-16");
  uint32_t sum[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float a = fmaxf(fabsf(u[j]), kSmall);
    sum[j] = ptx::dp2a_lo_u32_s32(flipped[j / 2], 1u << (8 * (j % 2)),
                                  float_bits(__fadd_ru(a, kBelow128)));
  }
  const uint32_t m =
      __byte_perm(__byte_perm(sum[0], sum[1], 0x0062), __byte_perm(sum[2], sum[3], 0x0062), 0x5410);
  // 128 - m, its top bit flipped, is -m; no byte borrows from the next
  const uint32_t minus = (0x80808080u - m) ^ 0x80808080u;
  return ptx::lop3_select(minus, m, signs);
}

// Word w of row r of a tile in shared memory. Rows 16 apart, which the transpose reads at once, lie
// in different banks.
__device__ __forceinline__ int tile_word(int r, int w) {
  return r * Int8Tile::kWords + (w ^ (r / Int8Tile::kUnit % 8 * 4));
}

// Bytes of 4 words, transposed.
__device__ __forceinline__ void transpose4(const uint32_t (&w)[4], uint32_t (&out)[4]) {
  const uint32_t a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[2], w[3], 0x5140);
  const uint32_t c = __byte_perm(w[0], w[1], 0x7362), d = __byte_perm(w[2], w[3], 0x7362);
  out[0] = __byte_perm(a, b, 0x5410);
  out[1] = __byte_perm(a, b, 0x7632);
  out[2] = __byte_perm(c, d, 0x5410);
  out[3] = __byte_perm(c, d, 0x7632);
}

// The tile in shared memory to data_t, 16 codes of 4 columns a thread; 8 threads write 128 bytes.
__device__ __forceinline__ void store_transposed(const uint32_t* tile, int8_t* data_t, int64_t r0,
                                                 int64_t k0, const Int8QuantizeParams& p) {
  const int unit = threadIdx.x % 8, word = threadIdx.x / 8;
  uint32_t out[4][4];  // of column, of 4 rows
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    uint32_t w[4], t[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = tile[tile_word(unit * Int8Tile::kUnit + 4 * g + i, word)];
    transpose4(w, t);
#pragma unroll
    for (int j = 0; j < 4; ++j) out[j][g] = t[j];
  }
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const int64_t k = k0 + 4 * word + j;
    if (k < p.cols)
      *reinterpret_cast<uint4*>(data_t + k * p.rp + r0 + unit * Int8Tile::kUnit) =
          make_uint4(out[j][0], out[j][1], out[j][2], out[j][3]);
  }
}

__device__ __forceinline__ void count_one(int64_t* at) {
  atomicAdd(reinterpret_cast<unsigned long long*>(at), 1ull);
}

// ---- kernel ----

enum class Int8Mode { kNearest, kStochastic, kFallback };

template <FloatType kType, bool kVector, Int8Mode kMode>
struct Int8Quantizer {
  using T = Int8Tile;
  const Int8QuantizeParams& p;
  int64_t r0, k0;  // of the block
  int row, col;    // of the thread's first element in it
  Raw8<kType> v[T::kRows];

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
      v[i] = load8<kType, kVector>(p, r0 + row + i * T::kRowStep, k0 + col);
  }

  // What depends on the elements is computed anew after this, not kept in registers.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
      for (uint32_t& word : v[i].w) word = ptx::opaque(word);
  }

  __device__ __forceinline__ uint32_t own_max() const {
    if constexpr (kType == FloatType::kBfloat16) {
      uint32_t pair = 0;  // of magnitudes, with garbage for signs
#pragma unroll
      for (int i = 0; i < T::kRows; ++i)
#pragma unroll
        for (const uint32_t word : v[i].w) pair = ptx::max_nan_abs_bf16x2(pair, word);
      return larger_half(pair);
    }
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = max(largest, float_bits(v[i][j]) & ~kSignBit);
    return largest;
  }

  // What the first step leaves of element (i, j).
  __device__ __forceinline__ float left(int i, int j, const Int8Scale& s) const {
    return int8_residual(v[i][j], s.scale, int8_nearest(v[i][j] * s.reciprocal));
  }

  __device__ __forceinline__ uint32_t left_max(const Int8Scale& s) const {
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < T::kRows; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = max(largest, float_bits(left(i, j, s)) & ~kSignBit);
    return largest;
  }

  // The calls of some of its rows; the lanes of the group's other quarters have the other rows'.
  struct Draws {
    Philox4 own[T::kOwnDraws];
  };
  __device__ __forceinline__ Draws draw() const {
    Draws draws = {};
    if constexpr (kMode == Int8Mode::kStochastic) {
      const PhiloxKey key = {static_cast<uint64_t>(p.rng[0]),
                             static_cast<uint32_t>(p.rng[p.rng_stride]), kRowStream};
      const int first = static_cast<int>(threadIdx.x) % kQuarters * T::kOwnDraws;
#pragma unroll
      for (int i = 0; i < T::kOwnDraws; ++i) {
        const int64_t at = (r0 + row + (first + i) * T::kRowStep) * p.kp + k0 + col;
        draws.own[i] = philox_group(key, static_cast<uint64_t>(at) / kDrawGroup);
      }
    }
    return draws;
  }
  // The draws of row i, flipped, as stochastic4 takes them.
  __device__ __forceinline__ static Philox4 draws_of(int i, const Draws& draws) {
    const int lane = static_cast<int>(threadIdx.x) % 32, quarter = lane % kQuarters;
    Philox4 words;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      words.w[j] = __shfl_sync(kAllLanes, draws.own[i % T::kOwnDraws].w[j],
                               lane - quarter + i / T::kOwnDraws);
    words = quarter_words(words, quarter);
#pragma unroll
    for (uint32_t& w : words.w) w = ~w;
    return words;
  }

  // The codes of 8 elements; d: those of the second step.
  template <bool kSecond>
  __device__ __forceinline__ uint2 encode(int i, const Int8Scale& s, const Int8Scale& d,
                                          const Draws& draws) const {
    float u[8];
#pragma unroll
    for (int j = 0; j < 8; ++j)
      u[j] = kSecond ? left(i, j, s) * d.reciprocal : v[i][j] * s.reciprocal;
    if constexpr (kMode == Int8Mode::kStochastic) {
      const Philox4 flipped = draws_of(i, draws);
      return make_uint2(stochastic4(u, flipped.w, v[i].signs4(0)),
                        stochastic4(u + 4, flipped.w + 2, v[i].signs4(1)));
    } else {
#pragma unroll
      for (float& value : u) value = int8_nearest(value);
      return make_uint2(pack4(u), pack4(u + 4));
    }
  }

  // All codes of the block, into both forms.
  template <bool kSecond>
  __device__ __forceinline__ void write(int8_t* data, int8_t* data_t, const Int8Scale& s,
                                        const Int8Scale& d, bool finite, uint32_t* tile) const {
    const Draws draws = draw();
#pragma unroll
    for (int i = 0; i < T::kRows; ++i) {
      const int r = row + i * T::kRowStep;
      const uint2 codes = finite ? encode<kSecond>(i, s, d, draws) : make_uint2(0, 0);
      if (data && r0 + r < p.rows)
        *reinterpret_cast<uint2*>(data + (r0 + r) * p.kp + k0 + col) = codes;
      if (data_t) *reinterpret_cast<uint2*>(tile + tile_word(r, col / 4)) = codes;
    }
    if (!data_t) return;
    __syncthreads();
    store_transposed(tile, data_t, r0, k0, p);
  }
};

template <FloatType kType, bool kVector, Int8Mode kMode>
__global__ void __launch_bounds__(Int8Tile::kThreads,
                                  Int8Tile::blocks(kType, kMode == Int8Mode::kFallback))
    int8_quantize_kernel(const Int8QuantizeParams p) {
  using T = Int8Tile;
  __shared__ __align__(16) uint32_t tile[kInt8Block * T::kWords];
  __shared__ uint32_t maxima[T::kWarps];
  const int64_t across = p.kp / kInt8Block, i = blockIdx.x / across, k = blockIdx.x % across;
  Int8Quantizer<kType, kVector, kMode> q = {p, i * kInt8Block, k * kInt8Block,
                                            static_cast<int>(threadIdx.x) / T::kAcross,
                                            static_cast<int>(threadIdx.x) % T::kAcross * 8};
  q.load();
  uint32_t amax = block_max(q.own_max(), maxima);
  float threshold = 0.0f;
  if constexpr (kMode == Int8Mode::kFallback) {
    threshold = *p.threshold;
    if (!(threshold > 0.0f)) amax = kNanBits;  // never hidden by a comparison that is false
  }
  const Int8Scale s = int8_scale(amax);
  const bool finite = amax < kInfBits, first = threadIdx.x == 0;
  if (first) p.scale[blockIdx.x] = s.scale;
  if constexpr (kMode == Int8Mode::kFallback)
    if (first && amax != 0) count_one(p.counts + 2);
  q.forget();
  q.template write<false>(p.data, p.data_t, s, s, finite, tile);
  if constexpr (kMode == Int8Mode::kFallback) {
    const bool fell_back = int8_falls_back(amax, threshold);
    Int8Scale d = {0.0f, 0.0f};
    if (fell_back) {
      q.forget();
      d = int8_scale(block_max(q.left_max(s), maxima));  // its barriers also free the tile
      q.forget();
      q.template write<true>(p.residual, p.residual_t, s, d, true, tile);
    }
    if (!first) return;
    p.mask[blockIdx.x] = fell_back;
    p.residual_scale[blockIdx.x] = d.scale;
    if (fell_back) count_one(p.counts);
    if (!finite) count_one(p.counts + 1);
  }
}

// ---- launcher ----

template <FloatType kType, bool kVector>
static cudaError_t launch_modes(const Int8QuantizeParams& p, unsigned grid, cudaStream_t stream) {
  const auto kernel = p.threshold ? int8_quantize_kernel<kType, kVector, Int8Mode::kFallback>
                      : p.rng     ? int8_quantize_kernel<kType, kVector, Int8Mode::kStochastic>
                                  : int8_quantize_kernel<kType, kVector, Int8Mode::kNearest>;
  return launch(kernel, grid, Int8Tile::kThreads, stream, p);
}

template <FloatType kType>
static cudaError_t launch_type(const Int8QuantizeParams& p, cudaStream_t stream) {
  constexpr int kSize = Raw8<kType>::kSize;
  const bool vector = p.stride_col == 1 && p.cols % 8 == 0 && p.stride_row * kSize % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  const auto grid = static_cast<unsigned>(p.rp / kInt8Block * (p.kp / kInt8Block));
  return vector ? launch_modes<kType, true>(p, grid, stream)
                : launch_modes<kType, false>(p, grid, stream);
}

cudaError_t launch_int8_quantize(const Int8QuantizeParams& p, cudaStream_t stream) {
  if (p.x_type == FloatType::kFloat32) return launch_type<FloatType::kFloat32>(p, stream);
  if (p.x_type == FloatType::kBfloat16) return launch_type<FloatType::kBfloat16>(p, stream);
  return launch_type<FloatType::kFloat16>(p, stream);
}

}  // namespace mxtrain::cuda
