// SPDX-License-Identifier: Apache-2.0
// The block-scaled instruction (or its emulation) by itself, for the tests of its tables: a warp
// takes its registers from memory and gives back what it gets. Instantiated are, of each format,
// all selectors of B, and with them the selectors of A in another order, so that no byte of one can
// stand for the other's: byte_a = last - byte_b and thread_a = thread_b % 2.
#include "cuda/launch.cuh"
#include "cuda/sm120/gemm_block_scale.h"
#include "ptx/mma_block_scale.cuh"

namespace mxtrain::cuda::sm120 {

template <class F, int kByteB, int kThreadB>
struct ProbeSelectors {
  static constexpr int kScales = ptx::BlockScaleShape<F>::kScales;
  static constexpr int kByteA = 4 - kScales - kByteB, kThreadA = kThreadB % 2;
};

template <class F, int kByteB, int kThreadB>
__global__ void __launch_bounds__(32) probe_kernel(const MmaProbeParams p) {
  using S = ProbeSelectors<F, kByteB, kThreadB>;
  const int64_t at = int64_t{blockIdx.x} * 32 + threadIdx.x;
  float d[4];
  ptx::mma_block_scale<F, S::kByteA, S::kThreadA, kByteB, kThreadB>(
      d, p.a + 4 * at, p.b + 2 * at, p.c + 4 * at, p.scale_a[at], p.scale_b[at]);
  for (int i = 0; i < 4; ++i) p.d[4 * at + i] = d[i];
}

template <class F, int kByteB, int kThreadB>
static bool launch_matching(const MmaProbeParams& p, cudaStream_t stream, cudaError_t* error) {
  using S = ProbeSelectors<F, kByteB, kThreadB>;
  if (p.byte_b != kByteB || p.thread_b != kThreadB || p.byte_a != S::kByteA ||
      p.thread_a != S::kThreadA)
    return false;
  *error = launch(probe_kernel<F, kByteB, kThreadB>, dim3(p.count), 32, stream, p);
  return true;
}

template <class F, int kByteB>
static bool launch_byte(const MmaProbeParams& p, cudaStream_t stream, cudaError_t* error) {
  return launch_matching<F, kByteB, 0>(p, stream, error) ||
         launch_matching<F, kByteB, 1>(p, stream, error) ||
         launch_matching<F, kByteB, 2>(p, stream, error) ||
         launch_matching<F, kByteB, 3>(p, stream, error);
}

template <class F>
static cudaError_t launch_probe(const MmaProbeParams& p, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  bool found = launch_byte<F, 0>(p, stream, &error);
  if constexpr (ptx::BlockScaleShape<F>::kScales <= 2)
    found = found || launch_byte<F, 2>(p, stream, &error);
  if constexpr (ptx::BlockScaleShape<F>::kScales == 1)
    found = found || launch_byte<F, 1>(p, stream, &error) || launch_byte<F, 3>(p, stream, &error);
  return found ? error : cudaErrorInvalidValue;
}

cudaError_t launch_mma_probe(const MmaProbeParams& p, cudaStream_t stream) {
  if (p.count <= 0 || p.format < 0 || p.format >= kFormatCount) return cudaErrorInvalidValue;
  const FormatInfo& f = kFormats[p.format];
  if (f.bits == 8)
    return f.man_bits == 3 ? launch_probe<Mxfp8E4M3>(p, stream)
                           : launch_probe<Mxfp8E5M2>(p, stream);
  if (f.bits == 4)
    return f.e4m3_scale ? launch_probe<Nvfp4>(p, stream) : launch_probe<Mxfp4>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace mxtrain::cuda::sm120
