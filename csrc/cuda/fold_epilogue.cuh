// SPDX-License-Identifier: Apache-2.0
// From the accumulators of a folded GEMM to D, what every architecture's kernel shares:
// d * 2^(a_scale + b_scale - 280) * alpha + bias, one rounding to the output type; or that rounded
// to float32 and added to D. Adding a bias and storing serve other GEMMs, too. Nothing here waits
// for another warp. A warp holds 16 rows of D as
// mma.sync and wgmma leave them: d[4 j + 2 i + c] is row lane / 4 + 8 i and column 8 j + 2 (lane %
// 4) + c.
#pragma once

#include "cuda/fold.h"
#include "cuda/group.cuh"
#include "formats/e8m0.h"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

namespace mxtrain::cuda {

constexpr int kFoldBias = 127 + 13;  // a folded row is 2^(scale - kFoldBias) * E5M2

// ---- scaling ----

// The usual case: |d| is a multiple of 2^-32 below 2^48, so with scales in this range and a
// moderate alpha no intermediate product leaves float32's normal range, and two factors do.
inline bool is_moderate_alpha(float alpha) {
  const float size = alpha < 0 ? -alpha : alpha;
  return size == 0 || (size >= 0x1p-16f && size <= 0x1p16f);
}

__device__ __forceinline__ bool is_moderate(uint32_t scale) {
  return (scale >= 64 && scale <= 190) || scale == kE8M0Nan;
}

// 2^(scale - kFoldBias) of a moderate scale, or NaN, as float32 bits; bfloat16 holds it, too.
__device__ __forceinline__ uint32_t moderate_factor(uint32_t scale) {
  return scale == kE8M0Nan ? kNanBits : (scale - (kFoldBias - 127)) << 23;
}

// The same as a product of two factors within 2^(+-70), for any scale: the product of a row's and a
// column's half is exact, and d times the two products underflows or overflows only where the
// result does.
__device__ __forceinline__ float2 split_factor(uint32_t scale) {
  if (scale == kE8M0Nan) return make_float2(bits_float(kNanBits), 1.0f);
  const int e = static_cast<int>(scale) - kFoldBias, half = e >> 1;
  return make_float2(power_of_two(half), power_of_two(e - half));
}

// What a lane knows of the scales of its warp's rows and the tile's columns, fetched before the
// products and looked at after them: its two rows, and columns 64 t + 2 lane and the next, which it
// hands to the lanes that need them. Past the edge the last scale stands in.
template <int kTileN>
struct TileScales {
  uint32_t rows[2], columns[kTileN / 32];

  // m, n: the warp's first row and the tile's first column.
  __device__ __forceinline__ void fetch(const FoldedGemmParams& p, int m, int n, int lane) {
    const int last_m = static_cast<int>(p.m) - 1, last_n = static_cast<int>(p.n) - 1;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      rows[i] = ptx::ld_global_nc_u8(p.a_scale + min(m + lane / 4 + 8 * i, last_m));
#pragma unroll
    for (int i = 0; i < kTileN / 32; ++i)
      columns[i] = ptx::ld_global_nc_u8(p.b_scale + min(n + i / 2 * 64 + 2 * lane + i % 2, last_n));
  }

  // Whether all that the warp needs are moderate.
  __device__ __forceinline__ bool all_moderate() const {
    bool moderate = is_moderate(rows[0]) && is_moderate(rows[1]);
#pragma unroll
    for (int i = 0; i < kTileN / 32; ++i) moderate &= is_moderate(columns[i]);
    return __all_sync(0xFFFFFFFFu, moderate);
  }
};

// The next three take 64 columns: d their 8 accumulators of 4, `own` what TileScales has of them.

// f(d, i, factor of its column), for all of d; i: which of the lane's rows. own: this lane's two
// columns' factors as a pair of bfloat16, which holds powers of two.
template <class F>
__device__ __forceinline__ void with_columns(float* d, uint32_t own, int lane, const F& f) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t pair = __shfl_sync(0xFFFFFFFFu, own, 4 * j + lane % 4);
    const float low = bits_float(pair << 16), high = bits_float(pair & 0xFFFF0000u);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      f(d[4 * j + 2 * i], i, low);
      f(d[4 * j + 2 * i + 1], i, high);
    }
  }
}

__device__ __forceinline__ void scale_moderate(float* d, const uint32_t (&rows)[2],
                                               const uint32_t* own, float alpha, int lane) {
  const float row[2] = {bits_float(moderate_factor(rows[0])) * alpha,
                        bits_float(moderate_factor(rows[1])) * alpha};
  with_columns(d, (moderate_factor(own[0]) >> 16) | moderate_factor(own[1]), lane,
               [&](float& v, int i, float column) { v = v * row[i] * column; });
}

// Any scales and any alpha, slowly.
__device__ __forceinline__ void scale_any(float* d, const uint32_t (&rows)[2], const uint32_t* own,
                                          float alpha, int lane) {
#pragma unroll 1
  for (int half = 0; half < 2; ++half) {
    const auto factor = [&](uint32_t scale) {
      const float2 f = split_factor(scale);
      return half ? f.y : f.x;
    };
    const float row[2] = {factor(rows[0]), factor(rows[1])};
    with_columns(d, (float_bits(factor(own[0])) >> 16) | float_bits(factor(own[1])), lane,
                 [&](float& v, int i, float column) { v = v * (row[i] * column); });
  }
#pragma unroll
  for (int i = 0; i < 32; ++i) d[i] *= alpha;
}

// n: the first of the 64 columns. Params: of any GEMM.
template <class Params>
__device__ __forceinline__ void add_bias(float* d, const Params& p, int n, int lane) {
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const int at = n + 2 * lane + c;
    const float own = at < p.n ? load_any(p.bias, p.bias_type, at) : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float bias = __shfl_sync(0xFFFFFFFFu, own, 4 * j + lane % 4);
      d[4 * j + c] += bias;
      d[4 * j + 2 + c] += bias;
    }
  }
}

// The same where the bias is of rows, from m on.
template <class Params>
__device__ __forceinline__ void add_row_bias(float* d, const Params& p, int m, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = m + lane / 4 + 8 * i;
    const float bias = at < p.m ? load_any(p.bias, p.bias_type, at) : 0.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      d[4 * j + 2 * i] += bias;
      d[4 * j + 2 * i + 1] += bias;
    }
  }
}

// What add_bias will read of the kTileN columns from n on, on its way into the L1.
template <int kTileN, class Params>
__device__ __forceinline__ void prefetch_bias(const Params& p, int n, int lane) {
  if (p.bias == nullptr) return;
  const int at = min(n + lane * (kTileN / 32), static_cast<int>(p.n) - 1),
            size = p.bias_type == FloatType::kFloat32 ? 4 : 2;
  ptx::prefetch_global_l1(static_cast<const uint8_t*>(p.bias) + int64_t{at} * size);
}

// ---- storing ----

template <FloatType kType>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  return kType == FloatType::kBfloat16 ? ptx::cvt_rn_bf16x2(low, high)
                                       : ptx::cvt_rn_f16x2(low, high);
}

// 16 rows from m and 64 columns from n on, element by element: any address and row length.
// kTransposed: out is [cols, rows].
template <FloatType kType, bool kTransposed = false>
__device__ __forceinline__ void store_elements(const float* d, void* out, int m, int n, int rows,
                                               int cols, bool add, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = m + lane / 4 + 8 * i;
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int col = n + 8 * j + 2 * (lane % 4) + c;
        if (col >= cols) continue;
        const int64_t at = kTransposed ? static_cast<int64_t>(col) * rows + row
                                       : static_cast<int64_t>(row) * cols + col;
        const float v = d[4 * j + 2 * i + c];
        if constexpr (kType == FloatType::kFloat32)
          static_cast<float*>(out)[at] = add ? static_cast<float*>(out)[at] + v : v;
        else
          static_cast<uint16_t*>(out)[at] = static_cast<uint16_t>(pack2<kType>(v, v));
      }
  }
}

// 16 rows from m and 64 columns from n on, 8 bytes a lane, so that 4 lanes fill 32 bytes of a row.
// Two 16-bit elements of a lane become four by an exchange with its neighbour: the even lane takes
// its pair of columns 8 j, the odd one theirs of columns 8 (j + 1).
template <FloatType kType>
__device__ __forceinline__ void store_pairs(const float* d, void* out, int m, int n, int rows,
                                            int cols, bool add, int lane) {
  const int odd = lane % 2, quad = lane % 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = m + lane / 4 + 8 * i;
    const int64_t start = static_cast<int64_t>(row) * cols;
#pragma unroll
    for (int j = 0; j < 8; j += kType == FloatType::kFloat32 ? 1 : 2) {
      const float* v = d + 4 * j + 2 * i;
      if constexpr (kType == FloatType::kFloat32) {
        const int col = n + 8 * j + 2 * quad;
        if (row >= rows || col >= cols) continue;
        float2* to = reinterpret_cast<float2*>(static_cast<float*>(out) + start + col);
        const float2 before = add ? *to : make_float2(0, 0);
        *to = add ? make_float2(before.x + v[0], before.y + v[1]) : make_float2(v[0], v[1]);
      } else {
        const uint32_t near = pack2<kType>(v[0], v[1]), far = pack2<kType>(v[4], v[5]);
        const uint32_t other = __shfl_xor_sync(0xFFFFFFFFu, odd ? near : far, 1);
        const int col = n + 8 * (j + odd) + 2 * (quad - odd);
        if (row >= rows || col >= cols) continue;
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(out) + start + col) =
            odd ? make_uint2(other, far) : make_uint2(near, other);
      }
    }
  }
}

}  // namespace mxtrain::cuda
