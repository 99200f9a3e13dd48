// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "ops/context.h"

namespace mxtrain {

ContextTensors new_context(const Tensor& x, int64_t parts, bool kept) {
  const int64_t rows = kept ? x.size(0) : 0, kp = kept ? context_cols(x.size(1)) : 0;
  return {torch::stable::new_empty(x, {parts, rows, kp}, ScalarType::Char),
          torch::stable::new_empty(x, {parts, rows, kp / 4}, ScalarType::Byte),
          torch::stable::new_empty(x, {parts, rows, kp / kContextGroup}, ScalarType::Float)};
}

static void check_dtype(const char* op, const char* name, ScalarType dtype, const Tensor& x) {
  MXT_CHECK(is_input_float(dtype), op, name, " must be bfloat16, float16 or float32, got ",
            dtype_name(dtype), " (the first argument has shape ", shape_of(x),
            "). Convert afterwards.");
}

static void check_cols(const char* op, const char* name, const Tensor& x) {
  MXT_CHECK(x.size(1) > 0 && x.size(1) <= kNormMaxCols, op, name, " must have 1 to ", kNormMaxCols,
            " columns, got ", x.size(1), " (shape ", shape_of(x),
            "). Use torch.nn.functional.rms_norm.");
}

static void check_weight(const char* op, const OptionalTensor& weight, const Tensor& x) {
  if (!weight) return;
  MXT_CHECK(
      is_input_float(weight->scalar_type()) && weight->dim() == 1 && weight->size(0) == x.size(1),
      op, "weight must be bfloat16, float16 or float32 of shape [", x.size(1), "], got ",
      dtype_name(weight->scalar_type()), " ", shape_of(*weight), " (the first argument has shape ",
      shape_of(x), "). Convert or reshape it.");
  check_same_device(op, "weight", *weight, x);
}

static void check_plane(const char* op, const char* name, const Tensor& t, ScalarType dtype,
                        int64_t parts, int64_t cols, const Tensor& x) {
  MXT_CHECK(t.scalar_type() == dtype && t.dim() == 3 && t.size(0) == parts &&
                t.size(1) == x.size(0) && t.size(2) == cols,
            op, name, " must be ", dtype_name(dtype), " of shape [", parts, ", ", x.size(0), ", ",
            cols, "], got ", dtype_name(t.scalar_type()), " ", shape_of(t),
            " (the gradient has shape ", shape_of(x), "). Pass what the forward op returned.");
  check_same_device(op, name, t, x);
}

static void check_context(const char* op, const ContextTensors& c, int64_t parts, const Tensor& x) {
  const int64_t kp = context_cols(x.size(1));
  check_plane(op, "high", c.high, ScalarType::Char, parts, kp, x);
  check_plane(op, "low", c.low, ScalarType::Byte, parts, kp / 4, x);
  check_plane(op, "scale", c.scale, ScalarType::Float, parts, kp / kContextGroup, x);
}

void check_rms_norm(const Tensor& x, const OptionalTensor& weight, double eps,
                    ScalarType out_dtype) {
  const char* op = "rms_norm_forward";
  check_matrix(op, "x", x);
  check_cols(op, "x", x);
  check_weight(op, weight, x);
  MXT_CHECK(std::isfinite(static_cast<float>(eps)) && eps >= 0, op,
            "eps must be finite and at least 0, got ", eps, " (x has shape ", shape_of(x),
            "). Try 1e-6.");
  check_dtype(op, "out_dtype", out_dtype, x);
}

void check_rms_norm_backward(const Tensor& dy, const ContextTensors& context, const Tensor& rstd,
                             const OptionalTensor& weight, ScalarType dx_dtype) {
  const char* op = "rms_norm_backward";
  check_matrix(op, "dy", dy);
  check_cols(op, "dy", dy);
  check_context(op, context, 1, dy);
  MXT_CHECK(
      rstd.scalar_type() == ScalarType::Float && rstd.dim() == 1 && rstd.size(0) == dy.size(0), op,
      "rstd must be float32 of shape [", dy.size(0), "], got ", dtype_name(rstd.scalar_type()), " ",
      shape_of(rstd), " (the gradient has shape ", shape_of(dy),
      "). Pass what the forward op returned.");
  check_same_device(op, "rstd", rstd, dy);
  check_weight(op, weight, dy);
  check_dtype(op, "dx_dtype", dx_dtype, dy);
}

void check_swiglu(const Tensor& gate, const Tensor& up) {
  const char* op = "swiglu_forward";
  check_matrix(op, "gate", gate);
  MXT_CHECK(up.scalar_type() == gate.scalar_type() && up.dim() == 2 && up.size(0) == gate.size(0) &&
                up.size(1) == gate.size(1),
            op, "up must have the dtype and shape of gate, got ", dtype_name(up.scalar_type()), " ",
            shape_of(up), " (gate is ", dtype_name(gate.scalar_type()), " ", shape_of(gate),
            "). Pass the two halves of a gated layer.");
  check_same_device(op, "up", up, gate);
}

void check_swiglu_backward(const Tensor& dh, const ContextTensors& context, ScalarType dtype) {
  const char* op = "swiglu_backward";
  check_matrix(op, "dh", dh);
  check_context(op, context, 2, dh);
  check_dtype(op, "dtype", dtype, dh);
}

}  // namespace mxtrain
