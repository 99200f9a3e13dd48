// SPDX-License-Identifier: Apache-2.0
// Packed float16 arithmetic (PTX ISA, "Half Precision Floating Point Instructions"): two values a
// word, sm_80 and up. Subnormals are kept; each operation rounds once, to nearest even.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// mul.rn.f16x2
__device__ __forceinline__ uint32_t mul_rn_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// add.rn.f16x2
__device__ __forceinline__ uint32_t add_rn_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

// max.f16x2
__device__ __forceinline__ uint32_t max_f16x2(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

}  // namespace mxtrain::ptx
