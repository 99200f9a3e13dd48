// SPDX-License-Identifier: Apache-2.0
// Loads, stores and asynchronous copies (PTX ISA, "Data Movement and Conversion Instructions");
// sm_80 and up.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// ld.global.nc.L1::no_allocate.v4.b32: 16 bytes, read once. p is 16-byte aligned.
__device__ __forceinline__ uint4 ld_global_nc_v4(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// ld.global.nc.L1::no_allocate.b32: 4 bytes, read once.
__device__ __forceinline__ uint32_t ld_global_nc_b32(const void* p) {
  uint32_t v;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// ld.global.nc.u8, where it stands: the compiler does not move it to the use.
__device__ __forceinline__ uint32_t ld_global_nc_u8(const uint8_t* p) {
  uint32_t v;
  asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

// prefetch.global.L1: the line of p, which is in memory.
__device__ __forceinline__ void prefetch_global_l1(const void* p) {
  asm volatile("prefetch.global.L1 [%0];" ::"l"(p));
}

// prefetch.global.L2: the sector of p, which is in memory.
__device__ __forceinline__ void prefetch_global_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// cp.async.cg.shared.global: 16 bytes into shared memory, of which the first `bytes` come from p
// and the rest are zero. memcheck counts 16 as read of a part too: they must lie in the tensor.
__device__ __forceinline__ void cp_async_16(uint32_t shared, const void* p, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(p), "r"(bytes));
}

// cp.async.ca.shared.global: the same for 4 bytes, 4-byte aligned; through the L1, where what
// shares their line stays.
__device__ __forceinline__ void cp_async_4(uint32_t shared, const void* p, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(p), "r"(bytes));
}

// cp.async.ca.shared.global: the same for 8 bytes, 8-byte aligned.
__device__ __forceinline__ void cp_async_8(uint32_t shared, const void* p, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared), "l"(p), "r"(bytes));
}

// cp.async.commit_group: this thread's copies since the last one make a group.
__device__ __forceinline__ void cp_async_commit_group() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// cp.async.wait_group: all but the last kPending groups of this thread are done.
template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// cp.async.wait_all: this thread's copies are done; a barrier makes them visible to the others.
__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ldmatrix.x4: four 8x8 matrices of 16-bit values from shared memory, laid out as stmatrix_x4's.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&w)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared)
               : "memory");
}

// ldmatrix.x4.trans: lane l gives addresses as for stmatrix_x4 and gets, in w[i], values l / 4 of
// rows 2 (l % 4), in the low half, and 2 (l % 4) + 1 of matrix i.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&w)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared)
               : "memory");
}

// stmatrix.x4: four 8x8 matrices of 16-bit values into shared memory. Lane l gives the address of
// row l % 8 of matrix l / 8 and, in w[i], the values 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of
// matrix i. sm_90 and up.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, uint32_t w0, uint32_t w1, uint32_t w2,
                                            uint32_t w3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
               "r"(w0), "r"(w1), "r"(w2), "r"(w3)
               : "memory");
}

// stmatrix.x4.trans: the same, each matrix transposed; w[i] as above, of columns in place of rows.
__device__ __forceinline__ void stmatrix_x4_trans(uint32_t shared, uint32_t w0, uint32_t w1,
                                                  uint32_t w2, uint32_t w3) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
      "r"(w0), "r"(w1), "r"(w2), "r"(w3)
      : "memory");
}

// st.shared.v2.b32: 8 bytes.
__device__ __forceinline__ void st_shared_v2(uint32_t shared, uint32_t w0, uint32_t w1) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(w0), "r"(w1) : "memory");
}

// st.shared.b32: 4 bytes.
__device__ __forceinline__ void st_shared_b32(uint32_t shared, uint32_t w) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared), "r"(w) : "memory");
}

// st.shared.u16: 2 bytes.
__device__ __forceinline__ void st_shared_u16(uint32_t shared, uint32_t bytes) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(static_cast<uint16_t>(bytes))
               : "memory");
}

// st.shared.u8.
__device__ __forceinline__ void st_shared_u8(uint32_t shared, uint32_t byte) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(shared), "r"(byte) : "memory");
}

// ld.shared.b32.
__device__ __forceinline__ uint32_t ld_shared_b32(uint32_t shared) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(shared) : "memory");
  return v;
}

// ld.shared.v2.b32: 8 bytes.
__device__ __forceinline__ uint2 ld_shared_v2(uint32_t shared) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared) : "memory");
  return v;
}

// ld.shared.v4.b32: 16 bytes.
__device__ __forceinline__ uint4 ld_shared_v4(uint32_t shared) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(shared)
               : "memory");
  return v;
}

// st.shared.v4.b32: 16 bytes.
__device__ __forceinline__ void st_shared_v4(uint32_t shared, uint32_t w0, uint32_t w1, uint32_t w2,
                                             uint32_t w3) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(w0), "r"(w1), "r"(w2),
               "r"(w3)
               : "memory");
}

// No instruction: memory is not read before this point of the program for what comes after it.
__device__ __forceinline__ void compiler_fence() { asm volatile("" ::: "memory"); }

// No instruction: the compiler forgets what it knows of v, and keeps one copy of it.
__device__ __forceinline__ float opaque(float v) {
  asm("" : "+f"(v));
  return v;
}

__device__ __forceinline__ uint32_t opaque(uint32_t v) {
  asm("" : "+r"(v));
  return v;
}

__device__ __forceinline__ int opaque(int v) {
  asm("" : "+r"(v));
  return v;
}

// cvta to the shared window: the address form that cp.async takes.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

}  // namespace mxtrain::ptx
