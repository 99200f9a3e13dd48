// SPDX-License-Identifier: Apache-2.0
// CUDA C++ for the emulation (csrc/emulation/emulation.h): its keywords, and the functions that
// csrc's kernels call. Those that round do so exactly as the CUDA programming guide says.
#pragma once

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "emulation/emulation.h"
#include "ptx/rcp.cuh"  // formats/context.h asks for it by __CUDACC__

#define __host__
#define __device__
#define __global__ static
#define __shared__ static
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- threads that meet ----

inline void __syncthreads(MXT_HERE) { mxtrain::emulation::barrier("__syncthreads", file, line); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, MXT_HERE) {
  mxtrain::emulation::exchange("__syncwarp", mask, 0, file, line);
}

namespace mxtrain::emulation {

template <class T>
T exchange_from(const char* what, unsigned mask, T v, unsigned from, const char* file, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 8, "a register or two");
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof v);
  const uint64_t* all = exchange(what, mask, bits, file, line);
  if (from >= 32) return v;
  if (!(mask >> from & 1))
    fail("%s:%d: %s reads lane %u, which mask %08x lacks", file, line, what, from, mask);
  memcpy(&v, &all[from], sizeof v);
  return v;
}

// Whether the lanes' predicates, as a mask.
inline unsigned ballot(const char* what, unsigned mask, bool p, const char* file, int line) {
  const uint64_t* all = exchange(what, mask, p, file, line);
  unsigned set = 0;
  for (int i = 0; i < 32; ++i) set |= (mask >> i & 1 && all[i] ? 1u : 0u) << i;
  return set;
}

}  // namespace mxtrain::emulation

template <class T>
T __shfl_sync(unsigned mask, T v, int from, MXT_HERE) {
  return mxtrain::emulation::exchange_from("__shfl_sync", mask, v, from & 31, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, MXT_HERE) {
  const unsigned from = mxtrain::emulation::lane ^ static_cast<unsigned>(lanes);
  return mxtrain::emulation::exchange_from("__shfl_xor_sync", mask, v, from, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned lanes, MXT_HERE) {
  const unsigned from = mxtrain::emulation::lane + lanes;
  return mxtrain::emulation::exchange_from("__shfl_down_sync", mask, v, from, file, line);
}
inline unsigned __ballot_sync(unsigned mask, int p, MXT_HERE) {
  return mxtrain::emulation::ballot("__ballot_sync", mask, p != 0, file, line);
}
inline int __any_sync(unsigned mask, int p, MXT_HERE) {
  return mxtrain::emulation::ballot("__any_sync", mask, p != 0, file, line) != 0;
}
inline int __all_sync(unsigned mask, int p, MXT_HERE) {
  return mxtrain::emulation::ballot("__all_sync", mask, p != 0, file, line) == mask;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned v, MXT_HERE) {
  const uint64_t* all = mxtrain::emulation::exchange("__reduce_max_sync", mask, v, file, line);
  unsigned m = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && all[i] > m) m = static_cast<unsigned>(all[i]);
  return m;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned v, MXT_HERE) {
  const uint64_t* all = mxtrain::emulation::exchange("__reduce_add_sync", mask, v, file, line);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) sum += static_cast<unsigned>(all[i]);
  return sum;
}

// ---- memory ----

template <class T>
T atomicAdd(T* p, T v) {
  const T old = *p;
  *p = old + v;
  return old;
}
template <class T>
T atomicExch(T* p, T v) {
  const T old = *p;
  *p = v;
  return old;
}
template <class T>
T atomicMax(T* p, T v) {
  const T old = *p;
  if (v > old) *p = v;
  return old;
}
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}

// ---- integers ----

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selectors) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selectors >> (4 * i) & 7u;
    d |= (static_cast<uint32_t>(bytes >> (8 * s)) & 0xFFu) << (8 * i);
  }
  return d;
}
inline int __popc(uint32_t v) { return __builtin_popcount(v); }
inline uint32_t __vmaxu4(uint32_t a, uint32_t b) {
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 8) d |= max(a >> i & 0xFFu, b >> i & 0xFFu) << i;
  return d;
}

// ---- floats ----

inline float __int_as_float(int v) {
  float f;
  memcpy(&f, &v, sizeof f);
  return f;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
// a * b rounded up; the product is exact in double.
inline float __fmul_ru(float a, float b) {
  const double product = static_cast<double>(a) * b;
  const float f = static_cast<float>(product);
  return f < product ? nextafterf(f, INFINITY) : f;
}
// a + b rounded up; where their exponents are within 29 of each other the sum is exact in double.
inline float __fadd_ru(float a, float b) {
  const double sum = static_cast<double>(a) + b;
  const float f = static_cast<float>(sum);
  return f < sum ? nextafterf(f, INFINITY) : f;
}

namespace mxtrain::cuda {

// Found before C's, which need not say which zero is the larger.
inline float fmaxf(float a, float b) {
  if (a == b) return std::signbit(a) ? b : a;
  return b != b || a > b ? a : b;
}
inline float fminf(float a, float b) {
  if (a == b) return std::signbit(a) ? a : b;
  return b != b || a < b ? a : b;
}

}  // namespace mxtrain::cuda
