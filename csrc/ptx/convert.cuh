// SPDX-License-Identifier: Apache-2.0
// Conversions (PTX ISA, "cvt"); sm_80 and up.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// cvt.rn.bf16x2.f32: low half from a, high half from b. A NaN becomes 0x7FFF.
__device__ __forceinline__ uint32_t cvt_rn_bf16x2(float a, float b) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

// cvt.rn.f16x2.f32: low half from a, high half from b. A NaN becomes 0x7FFF.
__device__ __forceinline__ uint32_t cvt_rn_f16x2(float a, float b) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(b), "f"(a));
  return d;
}

// max.NaN.f32: a NaN wins.
__device__ __forceinline__ float max_nan_f32(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

}  // namespace mxtrain::ptx
