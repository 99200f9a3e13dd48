// SPDX-License-Identifier: Apache-2.0
// The block-scaled GEMM of compute capability 10.x (tcgen05.mma), through CUTLASS.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mxtrain::cuda::sm100 {

// D[m, n] = alpha * ta * tb * sum over k of A[m, k] B[n, k] + bias[n], float32 until it is stored.
struct GemmParams {
  const void* a;        // [m, k] codes of the format, rows of whole 16 bytes, 16-byte aligned
  const void* b;        // [n, k]
  const void* a_scale;  // 128x4 tiles (formats/layout.h), 16-byte aligned
  const void* b_scale;
  const float* a_tensor_scale;  // ta and tb, [1] each on the device, or null for 1
  const float* b_tensor_scale;
  const float* bias;  // [n], or null
  float alpha;
  int64_t m, n, k;  // below 2^31
  void* out;        // [m, pitch], bfloat16 or float32; rows of whole 16 bytes, 16-byte aligned
  int64_t pitch;    // elements of a row of out
};

enum class Tile : int {
  kPair,    // 256 x 256 by two multiprocessors (cta_group::2), bfloat16 out
  kSingle,  // 128 x 128 by one, float32 out
};

// What serves one block format: mxfp4, nvfp4, mxfp8_e4m3, mxfp8_e5m2.
enum class Kind : int { kMxfp4, kNvfp4, kMxfp8E4M3, kMxfp8E5M2 };

// Whether the pair's tile finishes an m x n bfloat16 product first. A pair of multiprocessors takes
// a 256 x 256 tile while two singles take a 128 x 128 one each, half the work. Not measured: a
// single is taken to need 1.2 times the time an element, because its tile reads twice the operand
// bytes, and because a pass over its float32 result follows.
inline bool prefer_pair(int64_t m, int64_t n, int multiprocessors) {
  const auto parts = [](int64_t work, int64_t of) { return (work + of - 1) / of; };
  const int64_t pair = parts(parts(m, 256) * parts(n, 256), multiprocessors / 2);
  const int64_t single = parts(parts(m, 128) * parts(n, 128), multiprocessors);
  return pair * 20 <= single * 12;
}

// With a null out: launches nothing, and cudaErrorInvalidValue where CUTLASS refuses the sizes.
cudaError_t launch_gemm(const GemmParams& p, Kind kind, Tile tile, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm100
