// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA kernels of int8_block. Pointers are device pointers.
#pragma once

#include "cuda/quantize.h"
#include "formats/int8.h"

namespace mxtrain::cuda {

// The logical matrix x, [rows, cols], in blocks of 128 x 128.
struct Int8QuantizeParams {
  const void* x;  // element (r, k) at x[r * stride_row + k * stride_col]
  FloatType x_type;
  int64_t rows, cols, stride_row, stride_col;
  int64_t kp, rp;      // cols and rows, padded to whole blocks
  const int64_t* rng;  // (seed, offset), rng_stride apart; null: nearest
  int64_t rng_stride;
  int8_t* data;    // [rows, kp], or null
  int8_t* data_t;  // [cols, rp], or null
  float* scale;    // [rp / 128, kp / 128]
  // The fallback, where threshold is not null:
  const float* threshold;  // [1]
  int8_t* residual;        // as data
  int8_t* residual_t;      // as data_t
  float* residual_scale;   // as scale
  uint8_t* mask;           // as scale
  int64_t* counts;         // [3] zeros: fallen back, not finite, not all zero
};
cudaError_t launch_int8_quantize(const Int8QuantizeParams& p, cudaStream_t stream);

// Codes [rows, kp], 16-byte aligned, and where the scale of block (i, k) lies.
struct Int8Codes {
  const int8_t* data;
  const float* scale;  // block (i, k) at i * stride_row + k * stride_k
  int stride_row, stride_k;
};

// D[M, N] = A B^T + bias, summed as formats/int8.h says. residual: of A, or of B.
struct Int8GemmParams {
  Int8Codes a, b, residual;
  Int8Mask mask;  // of the residual's blocks; not given: there is none
  int tiles;      // of the residual, where it is a pool
  bool residual_of_b;
  int64_t m, n, kp;
  const void* bias;  // [n], or null
  FloatType bias_type, out_type;
  void* out;  // [m, n]

  // The number of a slot's tile. Beyond the pool it is `tiles`, of zeros.
  MXT_HD int tile_of(int32_t slot) const {
    const uint32_t number = static_cast<uint32_t>(slot) - 1u;
    return number < static_cast<uint32_t>(tiles) ? static_cast<int>(number) : tiles;
  }
};
cudaError_t launch_int8_gemm(const Int8GemmParams& p, cudaStream_t stream);

// A residual [rows, kp] to its pool [count, 128, 128], and back; both 16-byte aligned. What no
// block has is neither read nor written.
struct Int8PackParams {
  const int8_t* from;
  int8_t* to;
  const float* scale;  // [ceil(rows / 128), kp / 128], of these strides; mask: alike
  int64_t scale_stride_row, scale_stride_k;
  const uint8_t* mask;
  int64_t mask_stride_row, mask_stride_k;
  int32_t* slots;  // of the pool, as Int8Mask has them, contiguous
  int64_t count, rows, kp;
};
cudaError_t launch_int8_pack(const Int8PackParams& p, cudaStream_t stream);

struct Int8UnpackParams {
  const int8_t* from;
  int8_t* to;
  Int8Mask slots;  // one beyond the pool: nothing is written
  int64_t count, rows, kp;
};
cudaError_t launch_int8_unpack(const Int8UnpackParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda
