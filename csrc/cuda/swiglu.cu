// SPDX-License-Identifier: Apache-2.0
// SwiGLU, as formats/context.h defines it.
//   forward    one read of the gate and of up [rows, cols] gives h and the int10_group contexts of
//              both
//   backward   dh and the contexts give both gradients, in one matrix [rows, 2 cols]
// A thread takes kSteps chunks of 8 elements of a row; a block is within a row.
#include "cuda/context.cuh"
#include "cuda/launch.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct SwigluTraits {
  static constexpr int kSteps = 2, kMaxThreads = 256;
};

// Where a block is: its row, and the column of a thread's chunk of each step.
struct SwigluPlace {
  int64_t row;
  int first;

  __device__ __forceinline__ explicit SwigluPlace(unsigned per_row)
      : row(blockIdx.x / per_row),
        first((static_cast<int>(blockIdx.x % per_row * SwigluTraits::kSteps * blockDim.x) +
               static_cast<int>(threadIdx.x)) *
              8) {}
  __device__ __forceinline__ int column(int step) const {
    return first + step * static_cast<int>(blockDim.x) * 8;
  }
};

// ---- kernels ----

template <class Source, bool kVector>
__global__ void __launch_bounds__(SwigluTraits::kMaxThreads)
    swiglu_forward_kernel(const SwigluParams p, unsigned per_row) {
  using T = SwigluTraits;
  using Type = typename Source::Type;
  const SwigluPlace at(per_row);
  Chunk<Source> gate[T::kSteps], up[T::kSteps];
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) {
    const int k = at.column(s);
    gate[s].template load<kVector>(static_cast<const Type*>(p.gate) + at.row * p.gate_stride, k,
                                   p.cols);
    up[s].template load<kVector>(static_cast<const Type*>(p.up) + at.row * p.up_stride, k, p.cols);
  }
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) {
    const int k = at.column(s);
    const int64_t code = at.row * p.kp + k;
    float g[8], u[8];
    gate[s].unpack(g);
    up[s].unpack(u);
    if (p.gate_context.high) {
      store_context(p.gate_context, code, k < p.kp, g);
      store_context(p.up_context, code, k < p.kp, u);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = g[i] * sigmoid(g[i]) * u[i];
    if (k < p.cols)
      store_chunk(p.out, p.out_type, at.row * p.cols + k, g, kVector, static_cast<int>(p.cols) - k);
  }
}

template <class Source, bool kVector>
__global__ void __launch_bounds__(SwigluTraits::kMaxThreads)
    swiglu_backward_kernel(const SwigluParams p, unsigned per_row) {
  using T = SwigluTraits;
  using Type = typename Source::Type;
  const SwigluPlace at(per_row);
  Chunk<Source> dh[T::kSteps];
  ContextChunk gate[T::kSteps] = {}, up[T::kSteps] = {};
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) {
    const int k = at.column(s);
    dh[s].template load<kVector>(static_cast<const Type*>(p.gate) + at.row * p.gate_stride, k,
                                 p.cols);
    if (k >= p.kp) continue;
    gate[s].load(p.gate_context, at.row * p.kp + k);
    up[s].load(p.up_context, at.row * p.kp + k);
  }
#pragma unroll
  for (int s = 0; s < T::kSteps; ++s) {
    const int k = at.column(s), left = static_cast<int>(p.cols) - k;
    if (left <= 0) break;
    float d[8], g[8], u[8];
    dh[s].unpack(d);
    gate[s].unpack(g);
    up[s].unpack(u);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const SwigluGrad grad = swiglu_grad(d[i], g[i], u[i]);
      g[i] = grad.gate;
      u[i] = grad.up;
    }
    store_chunk(p.out, p.out_type, at.row * 2 * p.cols + k, g, kVector, left);
    store_chunk(p.out, p.out_type, (at.row * 2 + 1) * p.cols + k, u, kVector, left);
  }
}

// ---- launchers ----

template <class Source>
static cudaError_t launch_type(const SwigluParams& p, bool backward, cudaStream_t stream) {
  using T = SwigluTraits;
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  constexpr int kSize = sizeof(typename Source::Type);
  const bool vector = p.cols % 8 == 0 && p.gate_stride * kSize % 16 == 0 &&
                      p.up_stride * kSize % 16 == 0 && aligned(p.gate) && aligned(p.up) &&
                      aligned(p.out);
  const int64_t chunks = p.kp / 8, wanted = ceil_div(chunks, 32 * T::kSteps) * 32;
  const auto threads = static_cast<unsigned>(wanted < T::kMaxThreads ? wanted : T::kMaxThreads);
  const auto per_row = static_cast<unsigned>(ceil_div(chunks, threads * T::kSteps));
  const int64_t grid = p.rows * per_row;
  if (grid > INT32_MAX || p.kp > INT32_MAX / 2) return cudaErrorInvalidConfiguration;
  const auto kernel = backward ? vector ? swiglu_backward_kernel<Source, true>
                                        : swiglu_backward_kernel<Source, false>
                      : vector ? swiglu_forward_kernel<Source, true>
                               : swiglu_forward_kernel<Source, false>;
  return launch(kernel, static_cast<unsigned>(grid), threads, stream, p, per_row);
}

static cudaError_t launch_swiglu(const SwigluParams& p, bool backward, cudaStream_t stream) {
  if (p.rows == 0 || p.cols == 0) return cudaSuccess;
  if (p.type == FloatType::kFloat32) return launch_type<Float32Source>(p, backward, stream);
  if (p.type == FloatType::kBfloat16) return launch_type<Bfloat16Source>(p, backward, stream);
  return launch_type<Float16Source>(p, backward, stream);
}

cudaError_t launch_swiglu_forward(const SwigluParams& p, cudaStream_t stream) {
  return launch_swiglu(p, false, stream);
}

cudaError_t launch_swiglu_backward(const SwigluParams& p, cudaStream_t stream) {
  return launch_swiglu(p, true, stream);
}

}  // namespace mxtrain::cuda
