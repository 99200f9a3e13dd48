// SPDX-License-Identifier: Apache-2.0
// A tile of x in shared memory: kTileK rows of x (the K axis of the transposed operand) x
// kTileBytes of columns, raw elements. Each row of 128 bytes is 8 chunks of 16; chunk j of row k
// lies at j ^ (k / 8 % 8). So a warp whose lanes take 8 groups along K of 4 columns each, and one
// whose lanes take the chunks of rows, both touch every bank once.
#pragma once

#include <type_traits>

#include "cuda/group.cuh"

namespace mxtrain::cuda {

struct TileTraits {
  static constexpr int kThreads = 256;
  static constexpr int kCtas = 3;     // of an SM at least: 80 registers, which no kernel spills
  static constexpr int kTileK = 256;  // holds the largest Hadamard group
  static constexpr int kRowBytes = 128;
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kBytes = kTileK * kRowBytes;
  static_assert(kBytes <= 48 * 1024, "static shared memory; 6 tiles fit a Hopper SM");
};

// Sources of tiles: what one stored element is, and how a 16-byte chunk of them is filled from
// memory.
template <class S>
struct FloatTile {
  using Source = S;
  using Type = typename S::Type;
  static constexpr int kPerChunk = 16 / sizeof(Type);
  static constexpr bool kPacked = false;
};

// An operand's codes, decoded on the way in: bfloat16 holds every mxfp4 and mxfp6 value with its
// E8M0 scale exactly; the others need float32.
template <class F>
struct PackedTile {
  static constexpr bool kNarrow = !F::kE4M3Scale && F::kBits < 8;
  using Format = F;
  using Source = typename std::conditional<kNarrow, Bfloat16Source, Float32Source>::type;
  using Type = typename Source::Type;
  static constexpr int kPerChunk = 16 / sizeof(Type);
  static constexpr bool kPacked = true;
};

__device__ __forceinline__ uint32_t chunk_offset(int k, int chunk) {
  return k * TileTraits::kRowBytes + ((chunk ^ (k / 8 % 8)) * 16);
}

// Columns `column` (even) and the next, 8 consecutive k: raw words, one or two a k.
template <class T>
struct ColumnPair {
  uint32_t w[8 * sizeof(typename T::Type) / 2];

  __device__ __forceinline__ void read(const uint8_t* tile, int k0, int column) {
    const uint8_t* base = tile + chunk_offset(k0, column / T::kPerChunk) +
                          column % T::kPerChunk * sizeof(typename T::Type);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint8_t* at = base + i * TileTraits::kRowBytes;
      if constexpr (sizeof(typename T::Type) == 2) {
        w[i] = *reinterpret_cast<const uint32_t*>(at);
      } else {
        const uint2 two = *reinterpret_cast<const uint2*>(at);
        w[2 * i] = two.x;
        w[2 * i + 1] = two.y;
      }
    }
  }

  // Column 0 or 1 of the pair, widened.
  __device__ __forceinline__ void widen(int which, float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (sizeof(typename T::Type) == 2)
        v[i] = T::Source::widen(static_cast<uint16_t>(w[i] >> (16 * which)));
      else
        v[i] = bits_float(w[2 * i + which]);
    }
  }
};

// 8 consecutive columns of row k.
template <class T>
__device__ __forceinline__ void read_row8(const uint8_t* tile, int k, int column, float (&v)[8]) {
  constexpr int kVectors = T::Source::kVectors;
  uint4 raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    raw[i] = *reinterpret_cast<const uint4*>(tile + chunk_offset(k, column / T::kPerChunk + i));
  T::Source::unpack(raw, v);
}

// Fill the tile at (k_base, r_base) of x; zeros outside. `vector`: 16-byte copies are aligned. A
// thread keeps its chunk and moves on by 32 rows of x.
template <class T>
__device__ __forceinline__ void load_float_tile(const QuantizeParams& p, int64_t k_base,
                                                int64_t r_base, bool vector, uint8_t* tile) {
  using Type = typename T::Type;
  constexpr int kRowStep = TileTraits::kThreads / TileTraits::kChunks;
  const int chunk = threadIdx.x % TileTraits::kChunks, k_first = threadIdx.x / TileTraits::kChunks;
  const int64_t r = r_base + chunk * T::kPerChunk, left = p.rows - r;
  const int valid = left <= 0 ? 0 : left < T::kPerChunk ? static_cast<int>(left) : T::kPerChunk;
  const int rows = static_cast<int>(min(p.cols - k_base, static_cast<int64_t>(TileTraits::kTileK)));
  const Type* from =
      static_cast<const Type*>(p.x) + (k_base + k_first) * p.stride_k + r * p.stride_row;
#pragma unroll
  for (int k = k_first; k < TileTraits::kTileK; k += kRowStep, from += kRowStep * p.stride_k) {
    uint8_t* to = tile + chunk_offset(k, chunk);
    const int count = k < rows ? valid : 0;
    // Of a part, 16 bytes would be read, too, though cp.async keeps no more of them.
    if (vector && (count == 0 || count == T::kPerChunk)) {
      const void* safe = count ? static_cast<const void*>(from) : p.x;
      ptx::cp_async_16(ptx::shared_address(to), safe, count * static_cast<int>(sizeof(Type)));
    } else {
#pragma unroll
      for (int e = 0; e < T::kPerChunk; ++e)
        reinterpret_cast<Type*>(to)[e] = e < count ? from[e * p.stride_row] : Type(0);
    }
  }
  if (vector) ptx::cp_async_wait_all();
}

// 4 bytes from anywhere; as one where they are aligned.
__device__ __forceinline__ uint32_t load_word(const uint8_t* p) {
  if (reinterpret_cast<uintptr_t>(p) % 4 == 0) return *reinterpret_cast<const uint32_t*>(p);
  return p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
}

// 8 codes of an operand's row as two halves of 4 bf16 or 8 floats. Exact: see PackedTile.
template <class T>
__device__ __forceinline__ void load_packed_tile(const QuantizeParams& p, int64_t k_base,
                                                 int64_t r_base, uint8_t* tile) {
  using F = typename T::Format;
  using E = typename F::Element;
  constexpr int kColumns = TileTraits::kChunks * T::kPerChunk, kGroupsPerRow = kColumns / 8;
  const uint8_t* codes = static_cast<const uint8_t*>(p.x);
  for (int i = threadIdx.x; i < TileTraits::kTileK * kGroupsPerRow; i += TileTraits::kThreads) {
    const int k = i / kGroupsPerRow, group = i % kGroupsPerRow;
    const int64_t row = k_base + k, r = r_base + group * 8;
    const bool inside =
        row < p.cols && r < p.rows;  // rows of codes hold whole blocks, so whole groups
    const uint8_t* from = codes + row * p.in_row_bytes + r / 8 * F::kBits;
    const uint8_t* scale_from = p.in_scale + row * p.in_blocks + r / F::kBlock;
    if constexpr (std::is_same<F, Mxfp4>::value) {
      uint32_t w[4] = {};
      if (inside) decode8_e2m1(load_word(from), *scale_from, w);
      *reinterpret_cast<uint4*>(tile + chunk_offset(k, group)) = make_uint4(w[0], w[1], w[2], w[3]);
      continue;
    }
    uint64_t bits = 0;
    float scale = 0.0f;
    if (inside) {
#pragma unroll
      for (int b = 0; b < F::kBits; ++b) bits |= static_cast<uint64_t>(from[b]) << (8 * b);
      scale =
          F::kE4M3Scale ? decode<E4M3>(*scale_from) * *p.in_tensor_scale : e8m0_value(*scale_from);
    }
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e)
      v[e] =
          decode<E>(static_cast<uint32_t>(bits >> (F::kBits * e)) & ((1u << F::kBits) - 1)) * scale;
    if (T::kNarrow) {
      uint32_t w[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        w[e] = (float_bits(v[2 * e]) >> 16) | (float_bits(v[2 * e + 1]) & 0xFFFF0000u);
      *reinterpret_cast<uint4*>(tile + chunk_offset(k, group)) = make_uint4(w[0], w[1], w[2], w[3]);
    } else {
      const uint32_t* w = reinterpret_cast<const uint32_t*>(v);
      *reinterpret_cast<uint4*>(tile + chunk_offset(k, 2 * group)) =
          make_uint4(w[0], w[1], w[2], w[3]);
      *reinterpret_cast<uint4*>(tile + chunk_offset(k, 2 * group + 1)) =
          make_uint4(w[4], w[5], w[6], w[7]);
    }
  }
}

}  // namespace mxtrain::cuda
