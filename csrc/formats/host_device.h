// SPDX-License-Identifier: Apache-2.0
// MXT_HD marks a function that is compiled for host and device from one source. On the host it is
// always inlined: the CPU kernels are built once per instruction set, and no out-of-line copy of
// one build may serve another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MXT_HD __host__ __device__ __forceinline__
#else
#define MXT_HD inline __attribute__((always_inline))
#endif

namespace mxtrain {

MXT_HD uint32_t float_bits(float v) {
  uint32_t b;
  memcpy(&b, &v, sizeof b);
  return b;
}

MXT_HD float bits_float(uint32_t b) {
  float v;
  memcpy(&v, &b, sizeof v);
  return v;
}

constexpr uint32_t kSignBit = 0x80000000u;
constexpr uint32_t kInfBits = 0x7F800000u;  // |v| bits at or above: Inf or NaN
constexpr uint32_t kNanBits = 0x7FC00000u;

// a * b + c, rounded once.
MXT_HD float fused(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// 2^e for e in [-126, 127], by its bits.
MXT_HD float power_of_two(int e) { return bits_float(static_cast<uint32_t>(e + 127) << 23); }

}  // namespace mxtrain
