// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/convert.cuh, emulated; the conversions to E2M1 of 10.0 and newer for an architecture
// that has them (MXT_EMULATED_ARCH=1000).
#pragma once

#include "formats/elements.h"
#include "ptx/rounding.h"

namespace mxtrain::ptx {

inline uint32_t cvt_rn_bf16x2(float a, float b) {
  return emulation::narrow<emulation::Bfloat>(a) | emulation::narrow<emulation::Bfloat>(b) << 16;
}
inline uint32_t cvt_rn_f16x2(float a, float b) {
  return emulation::narrow<emulation::Half>(a) | emulation::narrow<emulation::Half>(b) << 16;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kHasCvtE2M1 = true;
#else
constexpr bool kHasCvtE2M1 = false;
#endif
inline uint32_t cvt_rn_satfinite_e2m1x8(const float (&v)[8]) {
  uint32_t d = 0;
  for (int i = 0; i < 8; ++i) d |= encode_nearest<E2M1>(v[i]) << (4 * i);
  return d;
}

inline uint32_t cvt_rn_satfinite_e4m3x2(float a, float b) {
  using emulation::Fp8E4;
  return emulation::narrow_satfinite<Fp8E4>(a, 0x7E) | emulation::narrow_satfinite<Fp8E4>(b, 0x7E)
                                                           << 8;
}
inline uint32_t cvt_rn_satfinite_e5m2x2(float a, float b) {
  using emulation::Fp8E5;
  return emulation::narrow_satfinite<Fp8E5>(a, 0x7B) | emulation::narrow_satfinite<Fp8E5>(b, 0x7B)
                                                           << 8;
}

inline float max_nan_f32(float a, float b) {
  if (a != a || b != b) return bits_float(0x7FFFFFFFu);
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

}  // namespace mxtrain::ptx
