// SPDX-License-Identifier: Apache-2.0
// Writing 4 or 8 consecutive float32 results as float32, bfloat16 or float16: stores of 8 or 16
// bytes where the address allows, element by element at a ragged edge. A NaN is written as the
// quiet NaN of formats/float16.h (the hardware's conversion gives another).
#pragma once

#include "cuda/quantize.h"
#include "formats/float16.h"
#include "ptx/convert.cuh"

namespace mxtrain::cuda {

__device__ __forceinline__ uint32_t quiet_halves(uint32_t w, uint32_t inf, uint32_t quiet) {
  const uint32_t low = w & 0xFFFFu, high = w >> 16;
  const uint32_t a = (low & 0x7FFFu) > inf ? quiet : low, b = (high & 0x7FFFu) > inf ? quiet : high;
  return a | (b << 16);
}

// N floats as the words that hold them in kType.
template <FloatType kType, int N>
__device__ __forceinline__ void pack_floats(
    const float (&v)[N], uint32_t (&w)[kType == FloatType::kFloat32 ? N : N / 2]) {
  if constexpr (kType == FloatType::kFloat32) {
#pragma unroll
    for (int i = 0; i < N; ++i) w[i] = float_bits(v[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; ++i)
      w[i] = kType == FloatType::kBfloat16
                 ? quiet_halves(ptx::cvt_rn_bf16x2(v[2 * i], v[2 * i + 1]), 0x7F80u, 0x7FC0u)
                 : quiet_halves(ptx::cvt_rn_f16x2(v[2 * i], v[2 * i + 1]), 0x7C00u, 0x7E00u);
  }
}

// v[0..valid) to out[at..]; vector: all N, aligned to their size or to 16 bytes.
template <FloatType kType, int N>
__device__ __forceinline__ void store_floats(void* out, int64_t at, const float (&v)[N],
                                             bool vector, int valid) {
  constexpr int kSize = kType == FloatType::kFloat32 ? 4 : 2, kWords = N * kSize / 4;
  static_assert(kWords == 2 || kWords % 4 == 0, "stores are of 8 or 16 bytes");
  uint32_t w[kWords];
  pack_floats<kType, N>(v, w);
  uint8_t* to = static_cast<uint8_t*>(out) + at * kSize;
  if (vector) {
    if constexpr (kWords == 2) {
      *reinterpret_cast<uint2*>(to) = make_uint2(w[0], w[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i)
        reinterpret_cast<uint4*>(to)[i] =
            make_uint4(w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < valid) {
      if (kSize == 4) reinterpret_cast<uint32_t*>(to)[i] = w[i];
      if (kSize == 2)
        reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(w[i / 2] >> (16 * (i % 2)));
    }
}

}  // namespace mxtrain::cuda
