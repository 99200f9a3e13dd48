// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA quantization kernels: what csrc/ops hands over. Pointers are device
// pointers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mxtrain::cuda {

enum class FloatType : int { kFloat32, kBfloat16, kFloat16 };

// The grid and block of this thread's last launch, for the message if it fails.
struct LaunchShape {
  unsigned grid, block;
};
LaunchShape& last_launch();

// One operand to make from a logical matrix [rows, cols], blocks along cols.
struct QuantizeParams {
  const void* x;  // floats: element (r, k) at x[r * stride_row + k * stride_k]
  FloatType x_type;
  int64_t stride_row, stride_k;
  const void* toward;  // the same for the tensor that rounding `toward` leans to, or null
  FloatType toward_type;
  int64_t toward_stride_row, toward_stride_k;
  const uint8_t* in_scale;  // requantize: x holds the codes [cols, in_row_bytes] of the operand of
                            // the transpose, these are its
  const float* in_tensor_scale;  // scales [cols, in_blocks], and its tensor scale
  int64_t in_row_bytes, in_blocks;
  int in_format;  // -1: x holds floats

  int64_t rows, cols, kp;
  int format, scale_rule, rounding;
  int hadamard;         // 0 or g
  const int8_t* signs;  // [g], or null
  float hadamard_norm, prescale;
  const int64_t* rng;  // (seed, offset), rng_stride apart, or null
  int64_t rng_stride;
  uint32_t stream;

  uint8_t* data;        // [rows, kp * bits / 8]
  uint8_t* scale;       // [rows, kp / block], or tiles of 512 bytes where swizzled
  float* tensor_scale;  // nvfp4: [1], written here
  bool swizzled;
  int64_t scale_tiles;  // tiles along K, where swizzled
  float* runs;          // [kp / 32, rows], or null: sums of 32 elements of x, where can_sum_runs
  uint32_t* tickets;    // [1], of launches of one stream, or null (see strip_grid.cuh)
};

// Operand rows are contiguous in x (stride_k == 1), or x is strided in both directions.
cudaError_t launch_quantize_rows(const QuantizeParams& p, cudaStream_t stream);
// Operand rows run across x (stride_row == 1), and requantize.
cudaError_t launch_quantize_columns(const QuantizeParams& p, cudaStream_t stream);
// Both operands of one x from one read: `row` as for quantize_rows, `col` as for quantize_columns;
// one format.
bool can_fuse_dual(const QuantizeParams& row, const QuantizeParams& col);
cudaError_t launch_quantize_dual(const QuantizeParams& row, const QuantizeParams& col,
                                 cudaStream_t stream);

// The same where strip.cuh serves: bfloat16 to mxfp4, stochastic or rotated; both operands also
// nearest.
bool can_strip_rows(const QuantizeParams& p);
bool can_strip_columns(const QuantizeParams& p);
bool can_strip_dual(const QuantizeParams& row, const QuantizeParams& col);
// Whether they are faster with `tickets`, if they serve: x, of floats, has many tiles for each of a
// GPU's warps.
bool wants_tickets(const QuantizeParams& p);
// Whether they leave col.runs.
bool can_sum_runs(const QuantizeParams& row, const QuantizeParams& col);
cudaError_t launch_row_strips(const QuantizeParams& p, cudaStream_t stream);
cudaError_t launch_column_strips(const QuantizeParams& p, cudaStream_t stream);
cudaError_t launch_dual_strips(const QuantizeParams& row, const QuantizeParams& col,
                               cudaStream_t stream);
// requantize where can_strip_columns and nothing is rotated: stochastic.
cudaError_t launch_requantize_codes(const QuantizeParams& p, cudaStream_t stream);

// Operand rows across x where quantize_pairs.cu serves: bfloat16 to mxfp4, nearest.
bool can_pair_columns(const QuantizeParams& p);
cudaError_t launch_column_pairs(const QuantizeParams& p, cudaStream_t stream);

struct HadamardParams {
  const void* x;  // [n] contiguous, n a multiple of g
  void* out;
  FloatType type;
  int64_t n;
  int group;
  const int8_t* signs;
  float norm;
};
cudaError_t launch_hadamard(const HadamardParams& p, cudaStream_t stream);

enum class RoundTarget : int { kBfloat16, kE4M3, kE5M2 };

struct StochasticRoundParams {
  const float* x;  // [n] contiguous
  void* out;
  int64_t n;
  RoundTarget target;
  const int64_t* rng;
  int64_t rng_stride;
};
cudaError_t launch_stochastic_round(const StochasticRoundParams& p, cudaStream_t stream);

// out = acc * a_scale * b_scale * alpha + bias, one float32 operation after the other, then one
// cast.
struct EpilogueParams {
  const float* acc;  // [rows, cols]
  int64_t rows, cols;
  const float* a_scale;  // nvfp4's tensor scales, [1] each, or null
  const float* b_scale;
  float alpha;
  const void* bias;  // [cols], or null
  FloatType bias_type, out_type;
  void* out;  // [rows, cols]
  bool add;   // to what out holds, float32
};
cudaError_t launch_epilogue(const EpilogueParams& p, cudaStream_t stream);

struct ColumnSumParams {
  const void* x;  // [rows, cols] contiguous, rows > 0
  FloatType type;
  int64_t rows, cols;
  float* strips;  // [ceil(rows / 256), cols], to work in
  float* out;     // [cols]
};
cudaError_t launch_column_sum(const ColumnSumParams& p, cudaStream_t stream);

// The rest of it, of runs of 32 rows.
struct ColumnRunsParams {
  const float* runs;  // [count, cols], count > 0
  int64_t count, cols;
  float* out;  // [cols]
};
cudaError_t launch_column_runs(const ColumnRunsParams& p, cudaStream_t stream);

struct SwizzleParams {
  const uint8_t* in;
  uint8_t* out;
  int64_t rows, cols;  // of the plain scales
  bool forward;        // plain -> tiles, or back
};
cudaError_t launch_swizzle(const SwizzleParams& p, cudaStream_t stream);

}  // namespace mxtrain::cuda
