// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantize.h"
#include "cuda/split_k.h"
#include "formats/block.h"

namespace mxtrain::cuda {

// One mxfp4 operand and its folded form.
struct FoldParams {
  const uint8_t* data;   // [rows, kp / 2] E2M1 codes
  const uint8_t* scale;  // [rows, kp / 32] E8M0 codes
  int64_t rows, kp;
  uint8_t* out;  // [rows, pitch] E5M2, the first kp of each row written; 16-byte aligned
  int64_t pitch;
  uint8_t* row_scale;  // [rows] E8M0
};

// Both operands of a GEMM in one launch, which also sets the `counters` words from `zero` on to 0.
cudaError_t launch_fold(const FoldParams& a, const FoldParams& b, uint32_t* zero, int counters,
                        cudaStream_t stream);

// The product of two folded operands:
//   D[m, n] = alpha * 2^(a_scale[m] + b_scale[n] - 280) * sum over k of a[m, k] b[n, k] + bias[n]
// or, with add, that much more than what a float32 D holds.
struct FoldedGemmParams {
  const uint8_t* a;        // [m, pitch] E5M2, 16-byte aligned
  const uint8_t* b;        // [n, pitch]
  const uint8_t* a_scale;  // [m] E8M0; 255 makes the row NaN
  const uint8_t* b_scale;  // [n] E8M0; 255 makes the column NaN
  int64_t m, n, k, pitch;  // pitch: bytes of a row, a multiple of 16
  Accumulate accumulate;
  float alpha;
  const void* bias;  // [n], or null
  FloatType bias_type, out_type;
  void* out;  // [m, n]
  bool add;   // to what a float32 out holds

  SplitK split;       // K in slabs, if it has any; of plan_folded_gemm
  float* partial;     // the sums of slabs, [slab, ...]; 16-byte aligned
  bool overlap;       // a tile's end under the next one's products; the same bytes
  uint32_t* arrived;  // how many sums are in partial, of each warp of each tile; 0 at first
};

// What a split product needs beside its operands; nothing, if it is not split.
struct SplitScratch {
  int64_t partial_bytes;
  int counters;
};

// How far each block of an mxfp4 operand lies below the largest of its row.
struct ShiftParams {
  const uint8_t* scale;  // [rows, blocks] E8M0
  int64_t rows, blocks;
  uint8_t* shift;      // [rows, blocks rounded up to 4]: row_scale - scale, then 0; 4-byte aligned
  uint8_t* row_scale;  // [rows] E8M0
};

// Both operands of a GEMM in one launch.
cudaError_t launch_shifts(const ShiftParams& a, const ShiftParams& b, cudaStream_t stream);

// The same product from packed operands.
struct PackedGemmParams {
  FoldedGemmParams product;  // a, b: E2M1 codes [m, k / 2] and [n, k / 2], contiguous, 16-byte
                             // aligned; k a multiple of 32; pitch is not used
  const uint8_t *a_shift, *b_shift;  // of ShiftParams
};

}  // namespace mxtrain::cuda
