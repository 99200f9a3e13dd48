// SPDX-License-Identifier: Apache-2.0
// quantization_statistics and oscillation_step_: one read of x and of the operand that was made of
// it (and of the state, which is written back), one CTA a part of the sums. The arithmetic and the
// parts are those of formats/statistics.h; within a part a thread takes every 256th group of 8, and
// threads are added in one fixed order, so that a run repeats its bits.
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/statistics.h"
#include "formats/statistics.h"

namespace mxtrain::cuda {

// ---- traits ----

struct StatisticsTraits {
  static constexpr int kThreads = 256;
  static constexpr int kWarps = kThreads / 32;
};

// ---- device helpers ----

// The sums of the CTA's threads to out[0..N).
template <int N>
__device__ __forceinline__ void reduce_cta(double (&sums)[N], double* out) {
  __shared__ double warps[StatisticsTraits::kWarps][N];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < N; ++i) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sums[i] += __shfl_down_sync(kAllLanes, sums[i], step);
    if (lane == 0) warps[warp][i] = sums[i];
  }
  __syncthreads();
  if (threadIdx.x >= N) return;
  double total = 0.0;
  for (int w = 0; w < StatisticsTraits::kWarps; ++w) total += warps[w][threadIdx.x];
  out[threadIdx.x] = total;
}

// ---- kernels ----

template <class F, bool kMoves>
__global__ void __launch_bounds__(StatisticsTraits::kThreads)
    statistics_kernel(const StatisticsParams p) {
  constexpr int N = kMoves ? kMovements : kStatistics;
  const int64_t per_row = (p.cols + 7) / 8, groups = p.rows * per_row, plane = p.rows * p.cols;
  const int64_t part = blockIdx.x, end = (part + 1) * groups / kStatisticsParts;
  const float tensor_scale = F::kE4M3Scale ? *p.tensor_scale : 1.0f;
  double sums[N] = {};
  for (int64_t g = part * groups / kStatisticsParts + threadIdx.x; g < end;
       g += StatisticsTraits::kThreads) {
    const int64_t r = g / per_row, k0 = g % per_row * 8;
    const uint64_t codes = load_codes<F>(p.data + r * p.row_bytes + k0 * F::kBits / 8);
    const float scale = block_scale_value<F>(p.scale[r * p.blocks + k0 / F::kBlock], tensor_scale);
    const int valid = static_cast<int>(min(p.cols - k0, static_cast<int64_t>(8)));
    for (int i = 0; i < valid; ++i) {
      const float x = load_any(p.x, p.x_type, r * p.stride_row + (k0 + i) * p.stride_k);
      const uint32_t code = code_of<F>(codes, i);
      if constexpr (kMoves) {
        const float q = decode<typename F::Element>(code) * scale;
        add_movement(x, q, p.state + r * p.cols + k0 + i, plane, sums);
      } else {
        add_statistics<F>(x, code, scale, p.prescale, sums);
      }
    }
  }
  reduce_cta(sums, p.sums + part * N);
}

// ---- launchers ----

template <class F>
static cudaError_t launch_format(const StatisticsParams& p, cudaStream_t stream) {
  constexpr int kThreads = StatisticsTraits::kThreads;
  if (p.state == nullptr)
    return launch(statistics_kernel<F, false>, kStatisticsParts, kThreads, stream, p);
  return launch(statistics_kernel<F, true>, kStatisticsParts, kThreads, stream, p);
}

cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream) {
  using Launcher = cudaError_t (*)(const StatisticsParams&, cudaStream_t);
#define MXT_ROW(code, traits, name) launch_format<traits>,
  static constexpr Launcher kLaunchers[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kLaunchers[p.format](p, stream);
}

}  // namespace mxtrain::cuda
