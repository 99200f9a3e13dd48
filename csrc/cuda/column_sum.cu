// SPDX-License-Identifier: Apache-2.0
// column_sum: out[c] = sum over r of x[r, c], x [rows, cols] contiguous bfloat16, float16 or
// float32, in float32 and in one order, which the CPU kernel shares: 32 rows after one another,
// then the 8 sums of 256 rows, then those of all rows. A warp takes 32 rows of 256 columns, 8 a
// lane; the 8 warps of a CTA meet in shared memory. One pass over x; a second kernel adds what the
// CTAs left, [ceil(rows / 256), cols]. Where another kernel has added the runs of 32 rows, one
// takes it from there, a CTA 32 columns and its warps strips.
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "formats/column_sum.h"

namespace mxtrain::cuda {

// ---- traits ----

struct ColumnSumTraits {
  static constexpr int kWarps = kSumRuns, kThreads = 32 * kWarps;
  static constexpr int kLaneColumns = 8, kColumns = 32 * kLaneColumns;
  static constexpr int kFlight = 8;  // rows that a lane has asked for
  static_assert(kThreads == kColumns, "after the barrier a thread takes a column");
  static_assert(kSumRows % kFlight == 0, "whole steps");
};

struct ColumnRunsTraits {
  static constexpr int kWarps = 16, kThreads = 32 * kWarps;
  static constexpr int kStrips = 64;  // that wait in shared memory to be added
};

// ---- kernels ----

template <class Source>
__global__ void __launch_bounds__(ColumnSumTraits::kThreads)
    column_strips_kernel(const ColumnSumParams p, bool vector) {
  using T = ColumnSumTraits;
  using Type = typename Source::Type;
  __shared__ float runs[T::kWarps][T::kColumns];
  const int64_t strip = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * T::kColumns + lane * T::kLaneColumns,
                first = (strip * T::kWarps + warp) * kSumRows;
  const Type* from = static_cast<const Type*>(p.x) + first * p.cols + column;
  const int64_t left = p.rows - first;  // may be negative
  const int rows = left < kSumRows ? static_cast<int>(left) : kSumRows;
  float sum[T::kLaneColumns] = {};
  for (int r0 = 0; r0 < rows; r0 += T::kFlight) {
    uint4 raw[T::kFlight][Source::kVectors] = {};
#pragma unroll
    for (int r = 0; r < T::kFlight; ++r) {
      if (r0 + r >= rows) continue;
      const Type* at = from + (r0 + r) * p.cols;
      if (vector && column < p.cols) {
#pragma unroll
        for (int i = 0; i < Source::kVectors; ++i)
          raw[r][i] = ptx::ld_global_nc_v4(reinterpret_cast<const uint4*>(at) + i);
      } else {
        Type* to = reinterpret_cast<Type*>(raw[r]);
#pragma unroll
        for (int i = 0; i < T::kLaneColumns; ++i)
          if (column + i < p.cols) to[i] = at[i];
      }
    }
#pragma unroll
    for (int r = 0; r < T::kFlight; ++r) {
      if (r0 + r >= rows) continue;
      float v[T::kLaneColumns];
      Source::unpack(raw[r], v);
#pragma unroll
      for (int i = 0; i < T::kLaneColumns; ++i) sum[i] += v[i];
    }
  }
#pragma unroll
  for (int i = 0; i < T::kLaneColumns; ++i) runs[warp][lane * T::kLaneColumns + i] = sum[i];
  __syncthreads();
  const int64_t mine = static_cast<int64_t>(blockIdx.y) * T::kColumns + threadIdx.x;
  if (mine >= p.cols) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < T::kWarps; ++w) total += runs[w][threadIdx.x];
  p.strips[strip * p.cols + mine] = total;
}

__global__ void __launch_bounds__(ColumnSumTraits::kThreads)
    column_total_kernel(const ColumnSumParams p, int64_t strips) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * ColumnSumTraits::kThreads + threadIdx.x;
  if (column >= p.cols) return;
  float total = 0.0f;
#pragma unroll 16
  for (int64_t s = 0; s < strips; ++s) total += __ldg(p.strips + s * p.cols + column);
  p.out[column] = total;
}

// The sums of strips s, s + kWarps, ..., below n; first: the run where strip 0 begins.
__device__ __forceinline__ void add_runs(const ColumnRunsParams& p, int64_t column, int64_t first,
                                         int n, float (*strips)[32]) {
  const int lane = threadIdx.x % 32;
#pragma unroll 2
  for (int s = threadIdx.x / 32; s < n; s += ColumnRunsTraits::kWarps) {
    const int64_t run = first + static_cast<int64_t>(s) * kSumRuns;
    float v[kSumRuns], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kSumRuns; ++i)
      v[i] = column < p.cols && run + i < p.count ? __ldg(p.runs + (run + i) * p.cols + column)
                                                  : 0.0f;  // which changes no sum
#pragma unroll
    for (int i = 0; i < kSumRuns; ++i) sum += v[i];
    strips[s][lane] = sum;
  }
}

__global__ void __launch_bounds__(ColumnRunsTraits::kThreads)
    column_runs_kernel(const ColumnRunsParams p) {
  constexpr int kRuns = ColumnRunsTraits::kStrips * kSumRuns;
  __shared__ float strips[ColumnRunsTraits::kStrips][32];
  begin_early();
  const int lane = threadIdx.x % 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float total = 0.0f;
  for (int64_t first = 0; first < p.count; first += kRuns) {
    const int64_t left = p.count - first;
    const int runs = left < kRuns ? static_cast<int>(left) : kRuns;
    const int n = (runs + kSumRuns - 1) / kSumRuns;
    add_runs(p, column, first, n, strips);
    __syncthreads();
    if (threadIdx.x < 32)
#pragma unroll 8
      for (int s = 0; s < n; ++s) total += strips[s][lane];
    __syncthreads();
  }
  if (threadIdx.x < 32 && column < p.cols) p.out[column] = total;
}

// ---- launchers ----

cudaError_t launch_column_runs(const ColumnRunsParams& p, cudaStream_t stream) {
  if (p.cols == 0) return cudaSuccess;
  const int64_t ctas = ceil_div(p.cols, int64_t{32});
  return launch_early(column_runs_kernel, static_cast<unsigned>(ctas), ColumnRunsTraits::kThreads,
                      0, stream, p);
}

template <class Source>
static cudaError_t launch_strips(const ColumnSumParams& p, dim3 grid, cudaStream_t stream) {
  using T = ColumnSumTraits;
  const bool vector = p.cols % T::kLaneColumns == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  return launch(column_strips_kernel<Source>, grid, T::kThreads, stream, p, vector);
}

cudaError_t launch_column_sum(const ColumnSumParams& p, cudaStream_t stream) {
  using T = ColumnSumTraits;
  if (p.cols == 0) return cudaSuccess;
  const int64_t strips = ceil_div(p.rows, kSumStripRows);
  const dim3 grid(static_cast<unsigned>(strips), ceil_div(p.cols, T::kColumns));
  if (grid.y > 65535) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaErrorInvalidValue;
  switch (p.type) {
    case FloatType::kFloat32:
      error = launch_strips<Float32Source>(p, grid, stream);
      break;
    case FloatType::kBfloat16:
      error = launch_strips<Bfloat16Source>(p, grid, stream);
      break;
    case FloatType::kFloat16:
      error = launch_strips<Float16Source>(p, grid, stream);
      break;
  }
  if (error != cudaSuccess) return error;
  return launch(column_total_kernel, grid.y, T::kThreads, stream, p, strips);
}

}  // namespace mxtrain::cuda
