// SPDX-License-Identifier: Apache-2.0
// out[r, k] = cast(decode(code[r, k]) * scale[r, k / block]), the packed codes of
// csrc/formats/block.h in, floats out. One float32 product, one round-to-nearest-even cast; a NaN
// scale makes its block NaN. One thread decodes 8 consecutive elements of a row, whose codes are
// whole bytes in every format; rows need no alignment. Grid: x over groups of 8, all rows
// flattened.
#include "cuda/dequantize.h"
#include "formats/block.h"
#include "formats/float16.h"

namespace mxtrain::cuda {

// ---- traits ----

template <class F>
struct DequantizeTraits {
  static constexpr int kThreads = 256;
  static constexpr int kElements = 8;  // per thread
  static constexpr int kBytes = kElements * F::kBits / 8;
  static_assert(F::kBlock % kElements == 0, "a thread's elements share one scale");
};

// ---- device helpers ----

template <class F>
__device__ __forceinline__ float scale_value(uint8_t code, const float* tensor_scale) {
  if (F::kE4M3Scale) return __fmul_rn(decode<E4M3>(code), *tensor_scale);
  return e8m0_value(code);
}

__device__ __forceinline__ void store(void* out, FloatType type, int64_t i, float v) {
  if (type == FloatType::kFloat32) static_cast<float*>(out)[i] = v;
  if (type == FloatType::kBfloat16) static_cast<uint16_t*>(out)[i] = float_to_bf16(v);
  if (type == FloatType::kFloat16) static_cast<uint16_t*>(out)[i] = float_to_half(v);
}

// ---- kernels ----

template <class F>
__global__ void dequantize_kernel(const DequantizeParams p) {
  using Traits = DequantizeTraits<F>;
  const int64_t groups_per_row = p.kp / Traits::kElements;
  const int64_t group = static_cast<int64_t>(blockIdx.x) * Traits::kThreads + threadIdx.x;
  if (group >= p.rows * groups_per_row) return;
  const int64_t row = group / groups_per_row, k0 = group % groups_per_row * Traits::kElements;

  const uint8_t* bytes = p.data + group * Traits::kBytes;
  uint64_t codes = 0;
  for (int b = 0; b < Traits::kBytes; ++b) codes |= static_cast<uint64_t>(bytes[b]) << (8 * b);
  const float scale =
      scale_value<F>(p.scale[row * (p.kp / F::kBlock) + k0 / F::kBlock], p.tensor_scale);
  for (int i = 0; i < Traits::kElements; ++i) {
    const uint32_t code = static_cast<uint32_t>(codes >> (F::kBits * i)) & ((1u << F::kBits) - 1);
    if (k0 + i < p.cols)
      store(p.out, p.out_type, row * p.cols + k0 + i,
            __fmul_rn(decode<typename F::Element>(code), scale));
  }
}

// ---- launchers ----

template <class F>
static cudaError_t launch(const DequantizeParams& p, cudaStream_t stream) {
  using Traits = DequantizeTraits<F>;
  const int64_t groups = p.rows * (p.kp / Traits::kElements);
  const int64_t blocks = (groups + Traits::kThreads - 1) / Traits::kThreads;
  dequantize_kernel<F><<<static_cast<unsigned>(blocks), Traits::kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  using Launcher = cudaError_t (*)(const DequantizeParams&, cudaStream_t);
#define MXT_ROW(code, traits, name) launch<traits>,
  static constexpr Launcher kLaunchers[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kLaunchers[p.format](p, stream);
}

}  // namespace mxtrain::cuda
