// SPDX-License-Identifier: Apache-2.0
// Conversions (PTX ISA, "cvt"); sm_80 and up, but where another body stands in.
#pragma once

#include <cstdint>

#include "formats/elements.h"

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

// Whether e2m1x2 conversions are instructions here: on 10.0 and newer, in code with a suffix (a or
// f), by nvcc 12.9's macro for both or 12.8's for a.
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL) || \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH__ >= 1000)
#define MXT_HAS_CVT_E2M1 1
#else
#define MXT_HAS_CVT_E2M1 0
#endif
constexpr bool kHasCvtE2M1 = MXT_HAS_CVT_E2M1;

// cvt.rn.satfinite.e2m1x2.f32, of v[0] to v[7]: v[0] in the low nibble. To nearest, ties to even,
// the sign kept on zero, 6 at most. v is finite; a NaN becomes 6 (the other body: some code).
__device__ __forceinline__ uint32_t cvt_rn_satfinite_e2m1x8(const float (&v)[8]) {
#if MXT_HAS_CVT_E2M1
  uint32_t d;
  asm("{\n"
      ".reg .b8 a, b, c, d;\n"
      "cvt.rn.satfinite.e2m1x2.f32 a, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 c, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 d, %8, %7;\n"
      "mov.b32 %0, {a, b, c, d};\n"
      "}"
      : "=r"(d)
      : "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "f"(v[4]), "f"(v[5]), "f"(v[6]), "f"(v[7]));
  return d;
#else
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) d |= encode_nearest<E2M1>(v[i]) << (4 * i);
  return d;
#endif
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 890
// cvt.rn.satfinite.e4m3x2.f32 and .e5m2x2.f32 (sm_89 and up): low byte from a, high byte from b;
// ties to even, the largest finite element beyond it, the sign kept.
__device__ __forceinline__ uint32_t cvt_rn_satfinite_e4m3x2(float a, float b) {
  uint16_t d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(d) : "f"(b), "f"(a));
  return d;
}

__device__ __forceinline__ uint32_t cvt_rn_satfinite_e5m2x2(float a, float b) {
  uint16_t d;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(d) : "f"(b), "f"(a));
  return d;
}
#endif

// max.NaN.f32: a NaN wins.
__device__ __forceinline__ float max_nan_f32(float a, float b) {
  float d;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(d) : "f"(a), "f"(b));
  return d;
}

}  // namespace mxtrain::ptx
