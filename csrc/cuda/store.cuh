// SPDX-License-Identifier: Apache-2.0
// Writing 8 consecutive float32 results as float32, bfloat16 or float16: one or two 16-byte stores
// where the address allows, element by element at a ragged edge. A NaN is written as the quiet NaN
// of formats/float16.h (the hardware's conversion gives another).
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

template <FloatType kType>
__device__ __forceinline__ void pack_floats8(const float (&v)[8], uint4 (&out)[2]) {
  uint32_t w[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (kType == FloatType::kBfloat16)
      w[i] = quiet_halves(ptx::cvt_rn_bf16x2(v[2 * i], v[2 * i + 1]), 0x7F80u, 0x7FC0u);
    if (kType == FloatType::kFloat16)
      w[i] = quiet_halves(ptx::cvt_rn_f16x2(v[2 * i], v[2 * i + 1]), 0x7C00u, 0x7E00u);
  }
  if (kType == FloatType::kFloat32)
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = float_bits(v[i]);
  out[0] = make_uint4(w[0], w[1], w[2], w[3]);
  if (kType == FloatType::kFloat32) out[1] = make_uint4(w[4], w[5], w[6], w[7]);
}

// v[0..valid) to out[at..]; vector: all 8, 16-byte aligned.
template <FloatType kType>
__device__ __forceinline__ void store_floats8(void* out, int64_t at, const float (&v)[8],
                                              bool vector, int valid) {
  constexpr int kSize = kType == FloatType::kFloat32 ? 4 : 2;
  uint4 packed[2];
  pack_floats8<kType>(v, packed);
  uint8_t* to = static_cast<uint8_t*>(out) + at * kSize;
  if (vector) {
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) reinterpret_cast<uint4*>(to)[i] = packed[i];
    return;
  }
  const uint8_t* from = reinterpret_cast<const uint8_t*>(packed);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < valid) {
      if (kSize == 4)
        reinterpret_cast<uint32_t*>(to)[i] = reinterpret_cast<const uint32_t*>(from)[i];
      if (kSize == 2)
        reinterpret_cast<uint16_t*>(to)[i] = reinterpret_cast<const uint16_t*>(from)[i];
    }
}

}  // namespace mxtrain::cuda
