// SPDX-License-Identifier: Apache-2.0
// out[r, k] = cast(decode(code[r, k]) * scale[r, k / block]), the packed codes of
// csrc/formats/block.h in, floats out. One float32 product, one round-to-nearest-even cast; a NaN
// scale makes its block NaN. A thread decodes kGroups groups of 8 consecutive elements, whose codes
// are whole bytes in every format; consecutive lanes take consecutive groups. Groups number the
// operand row by row; grid.x covers them all.
#include <type_traits>

#include "cuda/dequantize.h"
#include "cuda/encode_pairs.cuh"
#include "cuda/launch.cuh"
#include "cuda/store.cuh"
#include "formats/block.h"

namespace mxtrain::cuda {

// ---- traits ----

struct DequantizeTraits {
  static constexpr int kThreads = 256;
  static constexpr int kGroups = 4;  // per thread, loaded before the first is used
};

// ---- device helpers ----

// The 4, 6 or 8 bytes of a group; aligned: to 4, 2 and 8 bytes.
template <int Bits>
__device__ __forceinline__ uint64_t load_codes8(const uint8_t* p, bool aligned) {
  if (__builtin_expect(!aligned, 0)) {
    uint64_t codes = 0;
#pragma unroll
    for (int i = 0; i < Bits; ++i) codes |= static_cast<uint64_t>(p[i]) << (8 * i);
    return codes;
  }
  if (Bits == 4) return *reinterpret_cast<const uint32_t*>(p);
  if (Bits == 8) {
    const uint2 w = *reinterpret_cast<const uint2*>(p);
    return w.x | (static_cast<uint64_t>(w.y) << 32);
  }
  const uint16_t* h = reinterpret_cast<const uint16_t*>(p);
  return h[0] | (static_cast<uint64_t>(h[1]) << 16) | (static_cast<uint64_t>(h[2]) << 32);
}

template <class F>
__device__ __forceinline__ float scale_value(uint8_t code, const float* tensor_scale) {
  return F::kE4M3Scale ? decode<E4M3>(code) * *tensor_scale : e8m0_value(code);
}

// ---- kernels ----

template <class F, FloatType kType>
__global__ void __launch_bounds__(DequantizeTraits::kThreads)
    dequantize_kernel(const DequantizeParams p, int64_t groups, bool vector, bool aligned) {
  using E = typename F::Element;
  constexpr int N = DequantizeTraits::kGroups;
  const int64_t per_row = p.kp / 8,
                first =
                    static_cast<int64_t>(blockIdx.x) * DequantizeTraits::kThreads * N + threadIdx.x;
  uint64_t codes[N] = {};
  uint8_t scale[N] = {};
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t group = first + n * DequantizeTraits::kThreads;
    if (group >= groups) continue;
    codes[n] = load_codes8<F::kBits>(p.data + group * F::kBits, aligned);
    scale[n] =
        p.scale[group * 8 /
                F::kBlock];  // rows hold whole blocks, so blocks number the operand as groups do
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t group = first + n * DequantizeTraits::kThreads;
    if (group >= groups) continue;
    const int64_t row = p.rows == 1 ? 0 : group / per_row, k0 = (group - row * per_row) * 8;
    if constexpr (std::is_same<F, Mxfp4>::value && kType == FloatType::kBfloat16) {
      if (vector) {
        uint32_t w[4];
        decode8_e2m1(static_cast<uint32_t>(codes[n]), scale[n], w);
        reinterpret_cast<uint4*>(p.out)[group] = make_uint4(w[0], w[1], w[2], w[3]);
        continue;
      }
    }
    const float s = scale_value<F>(scale[n], p.tensor_scale);
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] =
          decode<E>(static_cast<uint32_t>(codes[n] >> (F::kBits * i)) & ((1u << F::kBits) - 1)) * s;
    const int64_t left = p.cols - k0;
    store_floats8<kType>(p.out, row * p.cols + k0, v, vector,
                         left < 8 ? static_cast<int>(left) : 8);
  }
}

// ---- launchers ----

template <class F>
static cudaError_t launch_format(DequantizeParams p, cudaStream_t stream) {
  if (p.cols == p.kp) {  // without padding the operand is one long row: no division per group
    p.cols = p.kp = p.rows * p.cols;
    p.rows = 1;
  }
  const int64_t groups = p.rows * (p.kp / 8);
  const bool aligned = reinterpret_cast<uintptr_t>(p.data) % 8 == 0;
  const bool vector = p.cols == p.kp && reinterpret_cast<uintptr_t>(p.out) % 16 == 0;
  constexpr int64_t kPerCta = DequantizeTraits::kThreads * DequantizeTraits::kGroups;
  const unsigned grid = static_cast<unsigned>((groups + kPerCta - 1) / kPerCta);
  switch (p.out_type) {
    case FloatType::kFloat32:
      return launch(dequantize_kernel<F, FloatType::kFloat32>, grid, DequantizeTraits::kThreads,
                    stream, p, groups, vector, aligned);
    case FloatType::kBfloat16:
      return launch(dequantize_kernel<F, FloatType::kBfloat16>, grid, DequantizeTraits::kThreads,
                    stream, p, groups, vector, aligned);
    case FloatType::kFloat16:
      return launch(dequantize_kernel<F, FloatType::kFloat16>, grid, DequantizeTraits::kThreads,
                    stream, p, groups, vector, aligned);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  using Launcher = cudaError_t (*)(DequantizeParams, cudaStream_t);
#define MXT_ROW(code, traits, name) launch_format<traits>,
  static constexpr Launcher kLaunchers[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kLaunchers[p.format](p, stream);
}

}  // namespace mxtrain::cuda
