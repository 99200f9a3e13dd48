// SPDX-License-Identifier: Apache-2.0
// Integer instructions that the compiler would otherwise split (PTX ISA, "Integer Arithmetic" and
// "Logic and Shift").
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// lop3.b32 as a selection: the bits of a where mask is 1, of b where it is 0.
__device__ __forceinline__ uint32_t lop3_select(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(d) : "r"(a), "r"(b), "r"(mask));
  return d;
}

// lop3.b32: kTable is the same expression of kLop3A, kLop3B and kLop3C as is wanted of a, b and c.
constexpr int kLop3A = 0xF0, kLop3B = 0xCC, kLop3C = 0xAA;

template <int kTable>
__device__ __forceinline__ uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable & 0xFF));
  return d;
}

// %laneid, read where it stands.
__device__ __forceinline__ uint32_t lane_id() {
  uint32_t v;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(v));
  return v;
}

// The largest of three: one instruction from sm_90 on.
__device__ __forceinline__ uint32_t max3_u32(uint32_t a, uint32_t b, uint32_t c) {
  return __vimax3_u32(a, b, c);
}

// prmt.b32: four of the eight bytes of a (0 to 3) and b (4 to 7), the first by the lowest nibble of
// the selectors, or with 8 added to a nibble eight copies of that byte's top bit. (__byte_perm
// drops the 8.)
__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t selectors) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selectors));
  return d;
}

// mad.lo.u32: a * b + c, on the multiply-add pipe.
__device__ __forceinline__ uint32_t mad_lo_u32(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// dp2a.lo.u32.s32: a's low half times b's lowest byte plus a's high half times b's next, signed
// bytes, plus c.
__device__ __forceinline__ uint32_t dp2a_lo_u32_s32(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("dp2a.lo.u32.s32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

}  // namespace mxtrain::ptx
