// SPDX-License-Identifier: Apache-2.0
#include "ops/targets.h"

#include "formats/layout.h"

namespace mxtrain {

void check_target(const char* op, const Tensor& x, const Target& t, const OptionalTensor& rng,
                  int64_t k) {
  const FormatInfo& f = check_format(op, "format", t.format);
  check_choice(op, "scale_rule", t.scale_rule, kScaleRuleNames, kScaleRules);
  check_choice(op, "rounding", t.rounding, kRoundingNames, kRoundings);
  MXT_CHECK(k > 0, op, "x must have a block axis longer than 0, got 0 (shape ", shape_of(x),
            "). A product over no elements is zero; handle it before quantizing.");
  check_hadamard(op, "hadamard", t.hadamard, true, t.signs, x);
  MXT_CHECK(t.hadamard == 0 || f.padded(k) % t.hadamard == 0, op,
            "hadamard must divide the padded contraction axis, got ", t.hadamard, " (K = ", k,
            ", padded to ", f.padded(k), "). Pad x with zeros to a multiple of ", t.hadamard,
            ", or take a smaller group.");
  MXT_CHECK(std::isfinite(static_cast<float>(t.prescale)) && static_cast<float>(t.prescale) > 0, op,
            "prescale must be finite and positive, got ", t.prescale, " (x has shape ", shape_of(x),
            "). Use 1 for none.");
  const auto rounding = static_cast<Rounding>(t.rounding);
  if (rounding == Rounding::kStochastic) check_rng(op, rng, x);
  MXT_CHECK((rounding == Rounding::kToward) == t.toward.has_value(), op,
            "toward must be given with rounding 'toward' and only then, got ",
            t.toward ? "a tensor" : "None", " (rounding is ", kRoundingNames[t.rounding],
            "). Give both, or neither.");
  if (!t.toward) return;
  check_matrix(op, "toward", *t.toward);
  MXT_CHECK(t.toward->size(0) == x.size(0) && t.toward->size(1) == x.size(1), op,
            "toward must have x's shape, got ", shape_of(*t.toward), " (x has shape ", shape_of(x),
            "). With transpose too, it lies as x does.");
  check_same_device(op, "toward", *t.toward, x);
}

PackedShape check_requantize(const Tensor& data, const Tensor& scale,
                             const OptionalTensor& tensor_scale, int64_t format, int64_t cols,
                             const Target& t, const OptionalTensor& rng) {
  const char* op = "requantize";
  const PackedShape s = check_operand(op, "operand", data, scale, tensor_scale, format);
  check_logical_cols(op, cols, s, format);
  MXT_CHECK(t.rounding != static_cast<int64_t>(Rounding::kToward), op,
            "rounding must be nearest or stochastic, got toward (format ", kFormats[format].name,
            "). Quantize from the original for Q-EMA.");
  check_target(op, data, t, rng, s.rows);
  return s;
}

PackedShape check_dequantize(const Tensor& data, const Tensor& scale,
                             const OptionalTensor& tensor_scale, int64_t format, int64_t cols,
                             ScalarType dtype) {
  const char* op = "dequantize";
  const PackedShape s = check_operand(op, "operand", data, scale, tensor_scale, format);
  check_logical_cols(op, cols, s, format);
  MXT_CHECK(is_input_float(dtype), op, "dtype must be bfloat16, float16 or float32, got ",
            dtype_name(dtype), " (data ", shape_of(data), "). Convert afterwards.");
  return s;
}

void check_hadamard_op(const Tensor& x, int64_t group, const OptionalTensor& signs) {
  const char* op = "hadamard";
  MXT_CHECK(is_input_float(x.scalar_type()), op, "x must be bfloat16, float16 or float32, got ",
            dtype_name(x.scalar_type()), " (shape ", shape_of(x), "). Convert it first.");
  MXT_CHECK(x.dim() >= 1, op, "x must have at least 1 dimension, got 0 (shape []). Reshape it.");
  check_hadamard(op, "group", group, false, signs, x);
  MXT_CHECK(x.size(x.dim() - 1) % group == 0, op, "group must divide the last axis, got ", group,
            " (x has shape ", shape_of(x), "). Pad x with zeros to a multiple of ", group,
            ", or take a smaller group.");
}

void check_stochastic_round(const Tensor& x, ScalarType dtype, const Tensor& rng) {
  const char* op = "stochastic_round";
  MXT_CHECK(x.scalar_type() == ScalarType::Float, op, "x must be float32, got ",
            dtype_name(x.scalar_type()), " (shape ", shape_of(x), "). Convert it first.");
  const bool bf16 = dtype == ScalarType::BFloat16, e4m3 = dtype == ScalarType::Float8_e4m3fn,
             e5m2 = dtype == ScalarType::Float8_e5m2;
  MXT_CHECK(bf16 || e4m3 || e5m2, op, "dtype must be bfloat16, float8_e4m3fn or float8_e5m2, got ",
            dtype_name(dtype), " (x has shape ", shape_of(x), "). Choose one of these.");
  check_rng(op, rng, x);
}

void check_column_sum(const Tensor& dy) {
  const char* op = "column_sum";
  MXT_CHECK(dy.dim() == 2 && is_input_float(dy.scalar_type()), op,
            "dy must be a matrix of bfloat16, float16 or float32, got ",
            dtype_name(dy.scalar_type()), " (shape ", shape_of(dy),
            "). Reshape or convert it first.");
  check_sizes(op, "dy", dy);
}

void check_swizzle(const Tensor& scale) {
  const char* op = "swizzle_scale";
  MXT_CHECK(scale.scalar_type() == ScalarType::Byte && scale.dim() == 2, op,
            "scale must be uint8 with 2 dimensions, got ", dtype_name(scale.scalar_type()),
            " (shape ", shape_of(scale), "). Pass the scale of an unswizzled operand.");
  check_sizes(op, "scale", scale);
}

void check_unswizzle(const Tensor& scale, int64_t rows, int64_t cols) {
  const char* op = "unswizzle_scale";
  constexpr int64_t kMaxSize = int64_t{1} << 56;  // as check_sizes: nothing below overflows
  MXT_CHECK(rows >= 0 && cols >= 0 && rows <= kMaxSize && cols <= kMaxSize, op,
            "rows and cols must lie in [0, 2^56], got ", rows, " and ", cols, " (scale ",
            shape_of(scale), "). Pass the shape that was swizzled.");
  const int64_t row_tiles = tiles(rows, kTileRows), col_tiles = tiles(cols, kTileCols);
  MXT_CHECK(scale.scalar_type() == ScalarType::Byte && scale.dim() == 3 &&
                scale.size(0) == row_tiles && scale.size(1) == col_tiles &&
                scale.size(2) == kTileBytes,
            op, "scale must be uint8 of shape [", row_tiles, ", ", col_tiles, ", ", kTileBytes,
            "], got ", dtype_name(scale.scalar_type()), " ", shape_of(scale), " (for ", rows, " x ",
            cols, " scales). Pass what swizzle_scale returned.");
}

}  // namespace mxtrain
