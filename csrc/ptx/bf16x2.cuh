// SPDX-License-Identifier: Apache-2.0
// Packed bfloat16 arithmetic (PTX ISA, "Half Precision Floating Point Instructions"): two values a
// word, sm_80 and up. Subnormals are kept; each operation rounds once, to nearest even.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// fma.rn.bf16x2: a * b + c.
__device__ __forceinline__ uint32_t fma_rn_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// abs.bf16x2, which the hardware takes as an operand modifier.
__device__ __forceinline__ uint32_t abs_bf16x2(uint32_t a) {
  uint32_t d;
  asm("abs.bf16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}

// max.bf16x2 and min.bf16x2: of a number and a NaN, the number.
__device__ __forceinline__ uint32_t max_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

__device__ __forceinline__ uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// max.NaN.bf16x2: a NaN wins.
__device__ __forceinline__ uint32_t max_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// max.NaN.xorsign.abs.bf16x2 (sm_86): the larger magnitude; its sign is garbage.
__device__ __forceinline__ uint32_t max_nan_abs_bf16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 860
  uint32_t d;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
#else
  return max_nan_bf16x2(abs_bf16x2(a), abs_bf16x2(b));
#endif
}

}  // namespace mxtrain::ptx
