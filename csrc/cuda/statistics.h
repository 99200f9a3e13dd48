// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/quantize.h"

namespace mxtrain::cuda {

// x and the operand that was made of it.
struct StatisticsParams {
  const void* x;  // [rows, cols] floats, element (r, k) at r * stride_row + k * stride_k
  FloatType x_type;
  int64_t stride_row, stride_k;
  const uint8_t* data;   // [rows, row_bytes] codes
  const uint8_t* scale;  // [rows, blocks]
  int64_t row_bytes, blocks;
  const float* tensor_scale;  // nvfp4: [1]
  int64_t rows, cols;
  int format;
  float prescale;
  float* state;  // [5, rows, cols], changed; null: statistics are asked for
  double* sums;  // [kStatisticsParts, kStatistics], or [kStatisticsParts, kMovements] with a state
};

cudaError_t launch_statistics(const StatisticsParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda
