// SPDX-License-Identifier: Apache-2.0
// RMSNorm, as formats/context.h defines it.
//   forward    one read of x [rows, cols] gives y, the int10_group context of x and rstd [rows]; a
//              thread block takes a row and keeps it in registers
//   backward   dy and the context give dx, and dw [cols] where it is wanted; a thread block
//              takes 32 rows, one after another, and keeps their part of dw in registers. A second
//              kernel adds the parts in the order of column_sum. In rows of up to 4096 a thread has
//              one chunk, and reads the next row's while it works on one.
// A thread holds kSteps (backward: 1 or kSteps) chunks of 8 elements. The sums of a row's groups
// meet in shared memory and are added by every thread alike.
#include "cuda/context.cuh"
#include "cuda/launch.cuh"
#include "formats/column_sum.h"

namespace mxtrain::cuda {

// ---- traits ----

struct NormTraits {
  static constexpr int kSteps = 4;
  static constexpr int kMaxThreads = static_cast<int>(kNormMaxCols) / (8 * kSteps);
  static constexpr int kMaxGroups = static_cast<int>(kNormMaxCols) / kContextGroup;
  static constexpr int kColumns = 32, kStrips = 32;   // of a block of the second kernel
  static constexpr int kShortCols = 8 * kMaxThreads;  // a thread has one chunk of them in backward
  static_assert(kMaxThreads <= 512, "the registers of backward");
};

// ---- device helpers ----

// The sum of a row from those of its groups.
__device__ __forceinline__ float add_groups(const float* sums, int groups) {
  float total = 0.0f;
  for (int g = 0; g < groups; ++g) total += sums[g];
  return total;
}

template <class Source, bool kVector>
struct NormRow {
  using T = NormTraits;
  const RmsNormParams& p;
  int64_t row;

  // Computed where it stands, as what depends on it is: there are no registers to keep that.
  static __device__ __forceinline__ int column(int step) {
    const uint32_t chunk = step * blockDim.x + threadIdx.x;
    return static_cast<int>(ptx::opaque(chunk)) * 8;
  }
  __device__ __forceinline__ const void* source() const {
    return static_cast<const typename Source::Type*>(p.x) + row * p.stride_row;
  }
  __device__ __forceinline__ void weight(int k, bool aligned, float (&w)[8]) const {
    if (p.weight) return load_shared8(p.weight, p.weight_type, k, p.cols, aligned, w);
#pragma unroll
    for (float& v : w) v = 1.0f;
  }
  __device__ __forceinline__ void store(int k, const float (&v)[8]) const {
    store_chunk(p.out, p.out_type, row * p.cols + k, v, kVector, static_cast<int>(p.cols) - k);
  }
};

// ---- forward ----

template <class Source, bool kVector>
__global__ void __launch_bounds__(NormTraits::kMaxThreads)
    rms_norm_forward_kernel(const RmsNormParams p, bool weight_aligned) {
  using T = NormTraits;
  __shared__ float sums[T::kMaxGroups];
  const NormRow<Source, kVector> r = {p, blockIdx.x};
  const int lane = threadIdx.x % 32;
  Chunk<Source> x[T::kSteps];
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) x[s].template load<kVector>(r.source(), r.column(s), p.cols);
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) {
    const int k = r.column(s);
    if (k - 8 * lane >= p.kp) break;  // the warp alike
    float v[8], sum = 0.0f;
    x[s].unpack(v);
    if (p.context.high) store_context(p.context, r.row * p.kp + k, k < p.kp, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
    sum = half_warp_sum(sum);
    if (k < p.kp && lane % kContextLanes == 0) sums[k / kContextGroup] = sum;
  }
  __syncthreads();
  const float total = add_groups(sums, static_cast<int>(p.kp) / kContextGroup);
  const float rstd = norm_rstd(total, static_cast<float>(p.cols), p.eps);
  if (p.rstd && threadIdx.x == 0) p.rstd[r.row] = rstd;
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) {
    const int k = r.column(s);
    if (k >= p.cols) break;
    float v[8], w[8];
    x[s].forget();
    x[s].unpack(v);
    r.weight(k, weight_aligned, w);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = v[i] * rstd * w[i];
    r.store(k, v);
  }
}

// ---- backward ----

// What the loop over rows reads of one.
template <class Source>
struct NormGradient {
  Chunk<Source> dy;
  ContextChunk context;

  template <bool kVector>
  __device__ __forceinline__ void load(const NormRow<Source, kVector>& r, int step) {
    const int k = r.column(step);
    context = {};
    dy.template load<kVector>(r.source(), k, r.p.cols);
    if (k < r.p.kp) context.load(r.p.context, r.row * r.p.kp + k);
  }
  // xn = value * rstd and wd = dy * w.
  __device__ __forceinline__ void unpack(float rstd, const float (&w)[8], float (&xn)[8],
                                         float (&d)[8], float (&wd)[8]) const {
    context.unpack(xn);
    dy.unpack(d);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      xn[i] *= rstd;
      wd[i] = d[i] * w[i];
    }
  }
  __device__ __forceinline__ void forget() {
    dy.forget();
    context.forget();
  }
};

// The chunks of a row, and of the next one where there is one of each thread.
template <class Source, bool kVector, int kSteps>
struct NormRows {
  static constexpr bool kAhead = kSteps == 1;
  NormGradient<Source> now[kSteps], next[kSteps];
  float rstd, next_rstd;

  __device__ __forceinline__ void fetch(const RmsNormParams& p, int64_t row) {
    const NormRow<Source, kVector> r = {p, row};
    next_rstd = __ldg(p.rstd + row);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) next[s].load(r, s);
  }
  // Row `row` is now, and the one after it is asked for, if there is one below `end`.
  __device__ __forceinline__ void advance(const RmsNormParams& p, int64_t row, int64_t end) {
    if (!kAhead) fetch(p, row);
    rstd = next_rstd;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) now[s] = next[s];
    if (kAhead && row + 1 < end) fetch(p, row + 1);
  }
};

template <class Source, bool kVector, int kSteps>
__global__ void __launch_bounds__(NormTraits::kMaxThreads, 1)
    rms_norm_backward_kernel(const RmsNormParams p, bool weight_aligned) {
  using T = NormTraits;
  __shared__ float sums[2][T::kMaxGroups];  // of two rows in turn: one barrier a row
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSumRows,
                end = min(p.rows, first + kSumRows);
  float dw[kSteps][8] = {};
  NormRows<Source, kVector, kSteps> rows;
  if (rows.kAhead) rows.fetch(p, first);
  for (int64_t row = first; row < end; ++row) {
    const NormRow<Source, kVector> r = {p, row};
    float* sum_of = sums[row % 2];
    rows.advance(p, row, end);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = r.column(s);
      if (k - 8 * lane >= p.kp) break;  // the warp alike
      float xn[8], d[8], wd[8], w[8] = {}, sum = 0.0f;
      if (k < p.cols) r.weight(k, weight_aligned, w);
      rows.now[s].unpack(rows.rstd, w, xn, d, wd);
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += wd[e] * xn[e];
      sum = half_warp_sum(sum);
      if (k < p.kp && lane % kContextLanes == 0) sum_of[k / kContextGroup] = sum;
    }
    __syncthreads();
    const float total = add_groups(sum_of, static_cast<int>(p.kp) / kContextGroup);
    const float c = total / static_cast<float>(p.cols);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = r.column(s);
      if (k >= p.cols) break;
      float xn[8], d[8], wd[8], w[8];
      rows.now[s].forget();
      r.weight(k, weight_aligned, w);
      rows.now[s].unpack(rows.rstd, w, xn, d, wd);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        dw[s][e] += d[e] * xn[e];
        wd[e] = (wd[e] - xn[e] * c) * rows.rstd;
      }
      r.store(k, wd);
    }
  }
  if (!p.sums) return;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int k = NormRow<Source, kVector>::column(s);
    if (k >= p.kp) break;
    store_floats8<FloatType::kFloat32>(p.sums, blockIdx.x * p.kp + k, dw[s], true, 8);
  }
}

// dw from its parts: a warp takes every 32nd strip of 8 parts, of 32 columns.
__global__ void __launch_bounds__(NormTraits::kColumns* NormTraits::kStrips)
    norm_weight_kernel(const RmsNormParams p, int64_t parts) {
  using T = NormTraits;
  __shared__ float strips[T::kStrips][T::kColumns];
  const int c = threadIdx.x % T::kColumns, lane = threadIdx.x / T::kColumns;
  const int64_t col = static_cast<int64_t>(blockIdx.x) * T::kColumns + c;
  const int64_t count = (parts + kSumRuns - 1) / kSumRuns;
  float total = 0.0f;
  for (int64_t s = 0; s < count; s += T::kStrips) {
    float sum = 0.0f;
#pragma unroll
    for (int run = 0; run < kSumRuns; ++run) {
      const int64_t part = (s + lane) * kSumRuns + run;
      if (part < parts && col < p.cols) sum += __ldg(p.sums + part * p.kp + col);
    }
    strips[lane][c] = sum;
    __syncthreads();
    if (lane == 0)
      for (int i = 0; i < T::kStrips; ++i) total += strips[i][c];  // those beyond are +0
    __syncthreads();
  }
  if (lane == 0 && col < p.cols) p.dw[col] = total;
}

// ---- launchers ----

static bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

static unsigned norm_threads(const RmsNormParams& p, int steps) {
  return static_cast<unsigned>(ceil_div(p.kp, 8 * steps * 32) * 32);
}

// Whether all 8 elements of every chunk exist, in x as in out.
static bool whole_chunks(const RmsNormParams& p) {
  const int64_t size = p.x_type == FloatType::kFloat32 ? 4 : 2;
  return p.cols % 8 == 0 && aligned(p.x) && aligned(p.out) && p.stride_row * size % 16 == 0;
}

template <class Source>
static cudaError_t launch_forward(const RmsNormParams& p, cudaStream_t stream) {
  const auto kernel = whole_chunks(p) ? rms_norm_forward_kernel<Source, true>
                                      : rms_norm_forward_kernel<Source, false>;
  const bool weight = p.cols % 8 == 0 && aligned(p.weight);
  return launch(kernel, static_cast<unsigned>(p.rows), norm_threads(p, NormTraits::kSteps), stream,
                p, weight);
}

template <class Source, int kSteps>
static cudaError_t launch_backward_rows(const RmsNormParams& p, int parts, cudaStream_t stream) {
  const auto kernel = whole_chunks(p) ? rms_norm_backward_kernel<Source, true, kSteps>
                                      : rms_norm_backward_kernel<Source, false, kSteps>;
  const bool weight = p.cols % 8 == 0 && aligned(p.weight);
  return launch(kernel, parts, norm_threads(p, kSteps), stream, p, weight);
}

template <class Source>
static cudaError_t launch_backward(const RmsNormParams& p, cudaStream_t stream) {
  const int parts = ceil_div(p.rows, kSumRows);
  const cudaError_t error =
      p.kp <= NormTraits::kShortCols
          ? launch_backward_rows<Source, 1>(p, parts, stream)
          : launch_backward_rows<Source, NormTraits::kSteps>(p, parts, stream);
  if (error != cudaSuccess || !p.sums) return error;
  return launch(norm_weight_kernel, ceil_div(p.cols, NormTraits::kColumns),
                NormTraits::kColumns * NormTraits::kStrips, stream, p, static_cast<int64_t>(parts));
}

cudaError_t launch_rms_norm_forward(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (p.rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (p.x_type == FloatType::kFloat32) return launch_forward<Float32Source>(p, stream);
  if (p.x_type == FloatType::kBfloat16) return launch_forward<Bfloat16Source>(p, stream);
  return launch_forward<Float16Source>(p, stream);
}

cudaError_t launch_rms_norm_backward(const RmsNormParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (p.rows > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (p.x_type == FloatType::kFloat32) return launch_backward<Float32Source>(p, stream);
  if (p.x_type == FloatType::kBfloat16) return launch_backward<Bfloat16Source>(p, stream);
  return launch_backward<Float16Source>(p, stream);
}

}  // namespace mxtrain::cuda
