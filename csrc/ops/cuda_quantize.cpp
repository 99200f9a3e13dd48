// SPDX-License-Identifier: Apache-2.0
// quantize, quantize_dual and requantize on CUDA: check, allocate, choose the kernel by the input's
// strides, call.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/quantize.h"
#include "formats/column_sum.h"
#include "formats/layout.h"
#include "ops/cuda_common.h"
#include "ops/ops.h"
#include "ops/targets.h"
#include "random/philox.h"

namespace mxtrain::cuda {

namespace {

using torch::stable::accelerator::DeviceGuard;

// The float matrix [rows, cols] that the operand is made from; `transpose` exchanges x's axes.
QuantizeParams float_params(const Tensor& x, bool transpose) {
  QuantizeParams p = {};
  p.x = x.const_data_ptr();
  p.x_type = float_type(x.scalar_type());
  p.rows = x.size(transpose ? 1 : 0);
  p.cols = x.size(transpose ? 0 : 1);
  p.stride_row = x.stride(transpose ? 1 : 0);
  p.stride_k = x.stride(transpose ? 0 : 1);
  p.in_format = -1;
  return p;
}

void add_target(QuantizeParams& p, const Target& t, const OptionalTensor& rng, bool transpose) {
  p.kp = kFormats[t.format].padded(p.cols);
  p.format = static_cast<int>(t.format);
  p.scale_rule = static_cast<int>(t.scale_rule);
  p.rounding = static_cast<int>(t.rounding);
  p.hadamard = static_cast<int>(t.hadamard);
  p.signs = t.signs ? t.signs->const_data_ptr<int8_t>() : nullptr;
  p.hadamard_norm = t.hadamard_norm();
  p.prescale = static_cast<float>(t.prescale);
  p.stream = transpose ? kTransposedStream : kRowStream;
  if (t.toward) {
    p.toward = t.toward->const_data_ptr();
    p.toward_type = float_type(t.toward->scalar_type());
    p.toward_stride_row = t.toward->stride(transpose ? 1 : 0);
    p.toward_stride_k = t.toward->stride(transpose ? 0 : 1);
  }
  if (t.rounding == static_cast<int64_t>(Rounding::kStochastic)) {
    p.rng = rng->const_data_ptr<int64_t>();
    p.rng_stride = rng->stride(0);
  }
}

// Allocate the operand and point the params at it.
Operand3 allocate(const Tensor& like, QuantizeParams& p, bool swizzle) {
  const FormatInfo& f = kFormats[p.format];
  const int64_t blocks = p.kp / f.block;
  Tensor data = torch::stable::new_empty(like, {p.rows, f.bytes(p.kp)}, ScalarType::Byte), scale,
         tensor_scale;
  p.swizzled = swizzle;
  p.scale_tiles = tiles(blocks, kTileCols);
  if (swizzle)  // the padding must be zero
    scale = torch::stable::new_zeros(like, {tiles(p.rows, kTileRows), p.scale_tiles, kTileBytes},
                                     ScalarType::Byte);
  else
    scale = torch::stable::new_empty(like, {p.rows, blocks}, ScalarType::Byte);
  tensor_scale = f.e4m3_scale ? torch::stable::new_zeros(like, {1}, ScalarType::Float)
                              : torch::stable::new_empty(like, {0}, ScalarType::Float);
  p.data = static_cast<uint8_t*>(data.mutable_data_ptr());
  p.scale = static_cast<uint8_t*>(scale.mutable_data_ptr());
  p.tensor_scale = f.e4m3_scale ? tensor_scale.mutable_data_ptr<float>() : nullptr;
  return {data, scale, tensor_scale};
}

// Room for the tickets of what is made from floats, in one launch or two, where strips want them.
OptionalTensor add_tickets(const Tensor& like, QuantizeParams& p) {
  OptionalTensor tickets;
  if (!wants_tickets(p)) return tickets;
  tickets = torch::stable::new_empty(like, {1}, ScalarType::Int);
  p.tickets = static_cast<uint32_t*>(tickets->mutable_data_ptr());
  return tickets;
}

void launch(const char* op, const QuantizeParams& p, cudaStream_t stream) {
  // Contiguous operand rows, or neither axis contiguous: by rows. Operand rows across x: by tiles.
  const bool across = p.in_format >= 0 || (p.stride_row == 1 && p.stride_k != 1);
  check_launch(op, across ? launch_quantize_columns(p, stream) : launch_quantize_rows(p, stream));
}

}  // namespace

Operand3 quantize(Tensor x, int64_t format, int64_t scale_rule, int64_t rounding, bool transpose,
                  OptionalTensor rng, int64_t hadamard, OptionalTensor signs, double prescale,
                  OptionalTensor toward, bool swizzle) {
  const char* op = "quantize";
  check_matrix(op, "x", x);
  const Target t = {format, scale_rule, rounding, hadamard, signs, prescale, toward};
  check_target(op, x, t, rng, x.size(transpose ? 0 : 1));
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for(op, x);
  QuantizeParams p = float_params(x, transpose);
  add_target(p, t, rng, transpose);
  Operand3 out = allocate(x, p, swizzle);
  const OptionalTensor tickets = add_tickets(x, p);
  launch(op, p, stream);
  return out;
}

Operand7 quantize_dual(Tensor x, OptionalTensor rng, int64_t row_format, int64_t row_scale_rule,
                       int64_t row_rounding, int64_t row_hadamard, OptionalTensor row_signs,
                       double row_prescale, OptionalTensor row_toward, int64_t col_format,
                       int64_t col_scale_rule, int64_t col_rounding, int64_t col_hadamard,
                       OptionalTensor col_signs, double col_prescale, OptionalTensor col_toward,
                       bool swizzle, bool sum_columns) {
  const char* op = "quantize_dual";
  check_matrix(op, "x", x);
  const Target row = {row_format, row_scale_rule, row_rounding, row_hadamard,
                      row_signs,  row_prescale,   row_toward};
  const Target col = {col_format, col_scale_rule, col_rounding, col_hadamard,
                      col_signs,  col_prescale,   col_toward};
  check_target(op, x, row, rng, x.size(1));
  check_target(op, x, col, rng, x.size(0));
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for(op, x);
  QuantizeParams pr = float_params(x, false), pc = float_params(x, true);
  add_target(pr, row, rng, false);
  add_target(pc, col, rng, true);
  Operand3 a = allocate(x, pr, swizzle), b = allocate(x, pc, swizzle);
  const bool fused = can_fuse_dual(pr, pc), runs = sum_columns && fused && can_sum_runs(pr, pc);
  const int64_t count = runs ? tiles(pr.rows, kSumRows) : 0;
  const Tensor work = torch::stable::new_empty(x, {count, pr.cols}, ScalarType::Float);
  if (runs) pc.runs = work.mutable_data_ptr<float>();
  const OptionalTensor tickets = add_tickets(x, pr);
  pc.tickets = pr.tickets;
  if (fused) {
    check_launch(op, launch_quantize_dual(pr, pc, stream));
  } else {
    launch(op, pr, stream);
    launch(op, pc, stream);
  }
  if (sum_columns && !runs) return std::tuple_cat(a, b, std::make_tuple(column_sum(x)));
  Tensor sum = torch::stable::new_empty(x, {runs ? pr.cols : 0}, ScalarType::Float);
  if (runs)
    check_launch(
        op, launch_column_runs({pc.runs, count, pr.cols, sum.mutable_data_ptr<float>()}, stream));
  return std::tuple_cat(a, b, std::make_tuple(sum));
}

Operand3 requantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,
                    int64_t cols, int64_t out_format, int64_t scale_rule, int64_t rounding,
                    OptionalTensor rng, int64_t hadamard, OptionalTensor signs, double prescale,
                    bool swizzle) {
  const char* op = "requantize";
  const OptionalTensor none;
  const Target t = {out_format, scale_rule, rounding, hadamard, signs, prescale, none};
  const int64_t rows = check_requantize(data, scale, tensor_scale, format, cols, t, rng).rows;
  const DeviceGuard guard(data.get_device_index());
  const cudaStream_t stream = stream_for(op, data);
  const Tensor codes = torch::stable::contiguous(data), scales = torch::stable::contiguous(scale);
  QuantizeParams p = {};
  p.x = codes.const_data_ptr();
  p.in_scale = static_cast<const uint8_t*>(scales.const_data_ptr());
  p.in_tensor_scale = kFormats[format].e4m3_scale ? tensor_scale->const_data_ptr<float>() : nullptr;
  p.in_row_bytes = codes.size(1);
  p.in_blocks = scales.size(1);
  p.in_format = static_cast<int>(format);
  p.rows = cols;
  p.cols = rows;
  add_target(p, t, rng, true);
  Operand3 out = allocate(codes, p, swizzle);
  launch(op, p, stream);
  return out;
}

}  // namespace mxtrain::cuda
