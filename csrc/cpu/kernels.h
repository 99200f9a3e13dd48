// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' interface: argument structs and one table of functions per instruction set. The
// files that implement it (tiles.h, quantize.cpp, convert.cpp, optimizer.cpp, ...) are compiled
// once per instruction set, in the namespace MXT_ISA, contain no torch headers and start no
// threads; ops/*.cpp split the work with torch's thread pool. Every function writes only the part
// it is given, so results do not depend on the number of threads.
#pragma once

#include <cstdint>

#include "formats/block.h"
#include "formats/int8.h"
#include "optim/adamw.h"
#include "random/philox.h"

namespace mxtrain::cpu {

enum class SourceType : int { kFloat32, kBfloat16, kFloat16, kPacked };

// One logical matrix [rows, cols] that is read element by element: strided floats, or (kPacked) the
// transpose of an operand.
struct Source {
  SourceType type;
  const void* data;    // [rows, cols] floats; kPacked: codes of the operand [cols, rows]
  int64_t stride_row;  // in elements; kPacked: unused
  int64_t stride_col;
  int format;            // kPacked only, as the next three
  const uint8_t* scale;  // [cols, scale_cols]
  int64_t data_cols;     // bytes of a packed row
  int64_t scale_cols;
  float tensor_scale;
};

// Quantize the operand of a source [rows, cols]: blocks along cols, kp = cols padded to a block.
struct QuantizeParams {
  Source x;
  Source toward;  // read only where rounding is kToward; floats
  int64_t rows, cols, kp;
  int format;
  ScaleRule scale_rule;
  Rounding rounding;
  int hadamard;         // 0, or the group size g
  const int8_t* signs;  // [g], or null
  float hadamard_norm;  // float32(1 / sqrt(g))
  float prescale;
  PhiloxKey key;
  float tensor_scale;  // nvfp4
  uint8_t* data;       // [rows, kp * bits / 8]
  uint8_t* scale;      // [rows, kp / block]
};

// Work is cut into tiles of kTileR operand rows and kTileK elements along K.
constexpr int64_t kTileR = 16, kTileK = 256;
static_assert(kTileK % 256 == 0, "a tile holds whole Hadamard groups and whole blocks");

struct DequantizeParams {
  const uint8_t* data;   // [rows, data_cols]
  const uint8_t* scale;  // [rows, scale_cols]
  int64_t data_cols, scale_cols;
  int64_t cols;  // elements to write per row
  int format;
  float tensor_scale;
  SourceType out_type;
  void* out;  // [rows, cols] contiguous
};

struct HadamardParams {
  Source x;  // [rows, cols], cols a multiple of g
  int64_t cols;
  int group;
  const int8_t* signs;
  float norm;
  void* out;  // [rows, cols] contiguous, x's type
};

enum class RoundTarget : int { kBfloat16, kE4M3, kE5M2 };

struct StochasticRoundParams {
  const float* x;  // [n]
  int64_t n;
  PhiloxKey key;
  RoundTarget target;
  void* out;  // [n]
};

// out = alpha * acc * a_scale * b_scale + bias, one float32 operation after the other, then one
// cast.
struct EpilogueParams {
  const float* acc;  // [rows, cols]
  int64_t cols;
  float a_scale, b_scale;  // nvfp4's tensor scales, else 1
  float alpha;
  SourceType bias_type;
  const void* bias;  // [cols], or null
  SourceType out_type;
  void* out;  // [rows, cols]
  bool add;   // to what out holds, float32
};

struct ColumnSumParams {
  SourceType type;
  const void* x;  // [rows, cols] contiguous
  int64_t rows, cols;
  float* strips;  // [ceil(rows / 256), cols]
};

struct AdamwParams {
  AdamwTensor t;
  AdamwFactors factors;
  bool finite;      // whether the gradient is; read by Q-Ramping only
  bool stochastic;  // bfloat16 weights round so, with key
  PhiloxKey key;
  WeightQuantizer quantizer;
};

// quantization_statistics, and with a state oscillation_step_; see formats/statistics.h.
struct StatisticsParams {
  Source x;              // [rows, cols] floats
  const uint8_t* data;   // [rows, data_cols], the operand that was made of x
  const uint8_t* scale;  // [rows, scale_cols]
  int64_t data_cols, scale_cols;
  float tensor_scale;
  int64_t rows, cols;
  int format;
  float prescale;
  float* state;  // [5, rows, cols], changed; null: statistics are asked for
  double* sums;  // [parts, kStatistics], or [parts, kMovements] with a state
};

// One operand of int8_block: the logical matrix x, [rows, cols], in blocks of 128 x 128.
struct Int8QuantizeParams {
  Source x;
  int64_t rows, cols;
  int64_t kp, rp;  // cols and rows, padded to whole blocks
  Rounding rounding;
  PhiloxKey key;
  int8_t* data;           // [rows, kp], or null
  int8_t* data_t;         // [cols, rp], or null
  float* scale;           // [rp / 128, kp / 128]
  int8_t* residual;       // as data; the second step is taken where mask is not null
  int8_t* residual_t;     // as data_t
  float* residual_scale;  // as scale
  uint8_t* mask;          // as scale: whether the block fell back
  float threshold;
};
struct Int8BlockState {
  bool fell_back, not_finite, not_zero;
};

// The codes of one operand of int8_gemm, and where the scale of block (i, k) lies.
struct Int8Codes {
  const int8_t* data;  // [rows, kp]
  const float* scale;  // block (i, k) at i * stride_row + k * stride_k
  int64_t stride_row, stride_k;
};

// acc = A B^T, summed as formats/int8.h says. residual: of A, or of B where residual_of_b.
struct Int8GemmParams {
  Int8Codes a, b, residual;
  Int8Mask mask;  // not given: there is no residual
  bool residual_of_b;
  int64_t m, n, kp;
  float* acc;  // [m, n]
};

// A matrix [rows, cols] in int10_group (formats/context.h); kp = cols padded to whole groups.
struct ContextPlanes {
  int8_t* high;  // [rows, kp]; null: not kept
  uint8_t* low;  // [rows, kp / 4]
  float* scale;  // [rows, kp / 128]
};

struct RmsNormParams {
  Source x;       // [rows, cols]; backward: dy
  Source weight;  // [1, cols]; data null: ones
  int64_t rows, cols, kp;
  float eps;
  ContextPlanes context;  // of x
  float* rstd;            // [rows], or null
  SourceType out_type;
  void* out;    // y or dx [rows, cols]
  float* sums;  // backward: [ceil(rows / 32), cols], dw of runs of rows; or null
};

struct SwigluParams {
  Source gate, up;  // [rows, cols]
  Source dh;        // backward: [rows, cols], read instead
  int64_t rows, cols, kp;
  ContextPlanes gate_context, up_context;
  SourceType out_type;
  void* out;  // h [rows, cols]; backward: dg and du, [rows, 2, cols]
};

struct Kernels {
  const char* isa;
  void (*quantize)(const QuantizeParams&, int64_t r0, int64_t k0);  // one tile
  uint32_t (*finite_amax)(const QuantizeParams&, int64_t r0,
                          int64_t k0);  // float32 bits of one tile's finite amax
  void (*dequantize)(const DequantizeParams&, int64_t row_begin, int64_t row_end);
  void (*hadamard)(const HadamardParams&, int64_t row_begin, int64_t row_end);
  void (*stochastic_round)(const StochasticRoundParams&, int64_t group_begin, int64_t group_end);
  void (*epilogue)(const EpilogueParams&, int64_t row_begin, int64_t row_end);
  void (*column_strips)(const ColumnSumParams&, int64_t strip_begin, int64_t strip_end);
  void (*adamw)(const AdamwParams&, int64_t block_begin, int64_t block_end);
  void (*statistics)(const StatisticsParams&, int64_t part);
  Int8BlockState (*int8_quantize)(const Int8QuantizeParams&, int64_t i, int64_t k);  // one block
  void (*int8_gemm)(const Int8GemmParams&, int64_t i, int64_t j);  // one block of the result
  void (*rms_norm_forward)(const RmsNormParams&, int64_t row_begin, int64_t row_end);
  void (*rms_norm_backward)(const RmsNormParams&, int64_t run_begin, int64_t run_end);
  void (*swiglu_forward)(const SwigluParams&, int64_t row_begin, int64_t row_end);
  void (*swiglu_backward)(const SwigluParams&, int64_t row_begin, int64_t row_end);
};

// The widest instruction set that this build has and this processor runs.
const Kernels& kernels();

}  // namespace mxtrain::cpu
