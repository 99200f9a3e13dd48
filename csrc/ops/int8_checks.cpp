// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include "ops/int8.h"

namespace mxtrain {

Int8Forms new_int8_forms(const Tensor& x, int64_t layout) {
  const auto l = static_cast<Int8Layout>(layout);
  const bool row = l != Int8Layout::kTransposed, transposed = l != Int8Layout::kRow;
  const int64_t r = x.size(0), k = x.size(1), rp = int8_blocks(r) * kInt8Block,
                kp = int8_blocks(k) * kInt8Block;
  return {torch::stable::new_empty(x, {row ? r : 0, row ? kp : 0}, ScalarType::Char),
          torch::stable::new_empty(x, {transposed ? k : 0, transposed ? rp : 0}, ScalarType::Char)};
}

Tensor new_int8_grid(const Tensor& x, ScalarType dtype) {
  return torch::stable::new_empty(x, {int8_blocks(x.size(0)), int8_blocks(x.size(1))}, dtype);
}

Int8Mask view_mask(const Tensor& mask) {
  const bool slots = mask.scalar_type() == ScalarType::Int;
  const void* data = mask.const_data_ptr();
  return {slots ? nullptr : static_cast<const uint8_t*>(data),
          slots ? static_cast<const int32_t*>(data) : nullptr, mask.stride(0), mask.stride(1)};
}

void check_int8_quantize(const char* op, const Tensor& x, int64_t rounding,
                         const OptionalTensor& rng, int64_t layout, const Tensor* threshold) {
  check_matrix(op, "x", x);
  MXT_CHECK(x.size(0) > 0 && x.size(1) > 0, op, "x must have elements, got none (shape ",
            shape_of(x), "). A product over no elements is zero; handle it before quantizing.");
  MXT_CHECK(rounding == 0 || rounding == 1, op, "rounding must be 0 nearest or 1 stochastic, got ",
            rounding, " (x has shape ", shape_of(x), "). Use the names in mxtrain.formats.");
  check_choice(op, "layout", layout, kInt8LayoutNames, kInt8Layouts);
  if (rounding == static_cast<int64_t>(Rounding::kStochastic)) check_rng(op, rng, x);
  if (!threshold) return;
  MXT_CHECK(threshold->scalar_type() == ScalarType::Float && threshold->numel() == 1, op,
            "threshold must be one float32, got ", dtype_name(threshold->scalar_type()), " ",
            shape_of(*threshold), " (x has shape ", shape_of(x),
            "). It is compared with the largest magnitude of a block.");
  check_same_device(op, "threshold", *threshold, x);
}

static void check_grid(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                       const char* side, const Tensor& data, const char* from = "int8_quantize") {
  const int64_t rows = int8_blocks(data.size(0)), cols = data.size(1) / kInt8Block;
  MXT_CHECK(t.scalar_type() == dtype && t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, op,
            name, " must be ", dtype_name(dtype), " of shape [", rows, ", ", cols, "], got ",
            dtype_name(t.scalar_type()), " ", shape_of(t), " (", side, " ", shape_of(data),
            " in blocks of 128 x 128). Pass what ", from, " returned.");
  check_same_device(op, name, t, data);
}

static void check_codes(const char* op, const char* name, const Tensor& t) {
  MXT_CHECK(t.scalar_type() == ScalarType::Char && t.dim() == 2, op, name,
            " must be int8 with 2 dimensions, got ", dtype_name(t.scalar_type()), " (shape ",
            shape_of(t), "). Pass what int8_quantize returned.");
  check_sizes(op, name, t);
  MXT_CHECK(t.size(1) > 0 && t.size(1) % kInt8Block == 0, op, name,
            " must hold whole blocks of 128 codes, got rows of ", t.size(1), " (shape ",
            shape_of(t), "). Pass what int8_quantize returned.");
}

// Of tiles of 128 x 128 codes.
static bool is_pool(const Tensor& t) {
  return t.scalar_type() == ScalarType::Char && t.dim() == 3 && t.size(1) == kInt8Block &&
         t.size(2) == kInt8Block;
}

static void check_residual(const char* op, const Int8Residual& r, const Tensor& own) {
  const int given = r.data.has_value() + r.scale.has_value() + r.mask.has_value();
  MXT_CHECK(given == 0 || given == 3, op,
            "residual, residual_scale and mask must be given together, got ", given,
            " of them (of ", r.of_b ? "b" : "a", "). Pass what int8_quantize_fallback returned.");
  if (given == 0) return;
  const char* side = r.of_b ? "b" : "a";
  const bool pool = is_pool(*r.data);
  MXT_CHECK(pool || (r.data->scalar_type() == ScalarType::Char && r.data->dim() == 2 &&
                     r.data->size(0) == own.size(0) && r.data->size(1) == own.size(1)),
            op, "residual must be int8 of shape ", shape_of(own), " or [tiles, 128, 128], got ",
            dtype_name(r.data->scalar_type()), " ", shape_of(*r.data), " (of ", side,
            "). Pass what int8_quantize_fallback or int8_pack_residual returned.");
  check_same_device(op, "residual", *r.data, own);
  const char* quantized = "int8_quantize_fallback";
  check_grid(op, "residual_scale", *r.scale, ScalarType::Float, side, own, quantized);
  check_grid(op, "mask", *r.mask, pool ? ScalarType::Int : ScalarType::Byte, side, own,
             pool ? "int8_pack_residual" : quantized);
}

void check_int8_gemm(const Tensor& a, const Tensor& a_scale, const Tensor& b, const Tensor& b_scale,
                     const OptionalTensor& bias, ScalarType out_dtype, const Int8Residual& r) {
  const char* op = "int8_gemm";
  check_codes(op, "a", a);
  check_codes(op, "b", b);
  MXT_CHECK(a.size(1) == b.size(1), op, "a and b must have the same K, got ", a.size(1), " and ",
            b.size(1), " (padded; a ", shape_of(a), ", b ", shape_of(b),
            "). Both have the contraction axis last: D = A B^T.");
  check_same_device(op, "b", b, a);
  check_grid(op, "a_scale", a_scale, ScalarType::Float, "a", a);
  check_grid(op, "b_scale", b_scale, ScalarType::Float, "b", b);
  MXT_CHECK(is_input_float(out_dtype), op, "out_dtype must be bfloat16, float16 or float32, got ",
            dtype_name(out_dtype), " (a ", shape_of(a), "). Convert afterwards.");
  check_residual(op, r, r.of_b ? b : a);
  if (!bias) return;
  MXT_CHECK(is_input_float(bias->scalar_type()) && bias->dim() == 1 && bias->size(0) == b.size(0),
            op, "bias must be bfloat16, float16 or float32 of shape [", b.size(0), "], got ",
            dtype_name(bias->scalar_type()), " ", shape_of(*bias), " (b has ", b.size(0),
            " rows). Convert or reshape it.");
  check_same_device(op, "bias", *bias, a);
}

void check_int8_pack_residual(const Tensor& residual, const Tensor& scale, const Tensor& mask,
                              int64_t count) {
  const char* op = "int8_pack_residual";
  check_codes(op, "residual", residual);
  check_grid(op, "scale", scale, ScalarType::Float, "residual", residual);
  check_grid(op, "mask", mask, ScalarType::Byte, "residual", residual, "int8_quantize_fallback");
  const int64_t blocks = mask.size(0) * mask.size(1);
  MXT_CHECK(count >= 0 && count <= blocks, op, "count must lie in [0, ", blocks, "], got ", count,
            " (mask ", shape_of(mask), "). No more blocks are there to be kept.");
}

void check_int8_unpack_residual(const Tensor& pool, const Tensor& slots, int64_t rows, int64_t kp) {
  const char* op = "int8_unpack_residual";
  constexpr int64_t kMaxSize = int64_t{1} << 56;  // as check_sizes
  MXT_CHECK(is_pool(pool), op, "pool must be int8 of shape [tiles, 128, 128], got ",
            dtype_name(pool.scalar_type()), " ", shape_of(pool), " (slots ", shape_of(slots),
            "). Pass what int8_pack_residual returned.");
  MXT_CHECK(slots.scalar_type() == ScalarType::Int && slots.dim() == 2, op,
            "slots must be int32 with 2 dimensions, got ", dtype_name(slots.scalar_type()),
            " (shape ", shape_of(slots), "). Pass what int8_pack_residual returned.");
  check_same_device(op, "slots", slots, pool);
  MXT_CHECK(rows >= 0 && rows <= kMaxSize && int8_blocks(rows) == slots.size(0) &&
                kp % kInt8Block == 0 && kp / kInt8Block == slots.size(1),
            op, "rows and kp must be those of the slots' blocks of 128 x 128, got ", rows, " and ",
            kp, " (slots ", shape_of(slots), "). Pass the shape of the operand's codes.");
}

}  // namespace mxtrain
