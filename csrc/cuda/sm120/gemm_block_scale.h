// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantize.h"
#include "formats/block.h"

namespace mxtrain::cuda::sm120 {

// The product of two operands as they are stored:
//   D[m, n] = ((sum over k of a[m, k] b[n, k], scaled) * a_tensor_scale * b_tensor_scale) * alpha
//             + bias[n]
// one float32 operation after the other, or with add that much more than what a float32 D holds.
struct BlockScaledGemmParams {
  const uint8_t *a, *b;  // codes of a row at each multiple of its pitch, 16-byte aligned
  const uint8_t *a_scale, *b_scale;  // the same for E8M0 or E4M3 codes, 4-byte aligned
  int64_t m, n;
  int row_bytes, blocks;     // codes and scales of a row, in bytes; what follows in the same
                             // 16 (4) aligned bytes may be read, and is not used
  int64_t a_pitch, b_pitch;  // in bytes, multiples of 16
  int64_t a_scale_pitch, b_scale_pitch;  // multiples of 4
  const float* a_tensor_scale;           // nvfp4: [1] each; or null
  const float* b_tensor_scale;
  bool separate;  // add each instruction's product in float32, not in the tensor cores
  float alpha;
  const void* bias;  // [n], or null
  FloatType bias_type, out_type;
  void* out;  // [m, n]
  bool add;   // to what a float32 out holds
};

// The alignments above.
constexpr int64_t kPitchUnit = 16, kScalePitchUnit = 4;

// One for each format: mxfp4, nvfp4 and the two of mxfp8.
cudaError_t launch_gemm_mxfp4(const BlockScaledGemmParams& p, cudaStream_t stream);
cudaError_t launch_gemm_nvfp4(const BlockScaledGemmParams& p, cudaStream_t stream);
cudaError_t launch_gemm_mxfp8_e4m3(const BlockScaledGemmParams& p, cudaStream_t stream);
cudaError_t launch_gemm_mxfp8_e5m2(const BlockScaledGemmParams& p, cudaStream_t stream);

// One instruction, for its tests: `count` warps, each with registers of its own as
// ptx/block_scale.h lays them out, d = the product plus c. cudaErrorInvalidValue for selectors that
// are not instantiated (mma_probe.cu).
struct MmaProbeParams {
  const uint32_t *a, *b, *scale_a, *scale_b;  // [count, 32, 4], [count, 32, 2], [count, 32] twice
  const float* c;                             // [count, 32, 4]
  float* d;
  int count, format, byte_a, thread_a, byte_b, thread_b;
};
cudaError_t launch_mma_probe(const MmaProbeParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda::sm120
