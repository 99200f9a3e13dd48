// SPDX-License-Identifier: Apache-2.0
// The catalogue of torch.ops.mxtrain: every schema, and which function serves it on which device.
// Read this first.
//
// Conventions. x is a 2-D bfloat16, float16 or float32 matrix of any strides. An operand is (data,
// scale, tensor_scale): uint8 codes [R, Kp * bits / 8], uint8 block scales [R, Kp / block], and
// float32 [1] for nvfp4 ([0] elsewhere; inputs may pass None). format, scale_rule, rounding and
// accumulate are codes, named in mxtrain.formats: the stable ABI leaks `str` arguments. rng is
// int64 [2]. The int8_* ops have a contract of their own (formats/int8.h), and so have those of
// RMSNorm and SwiGLU (formats/context.h). Every op is functional but those that end in _.
// docs/numerics.md defines the arithmetic, mxtrain/ops.py documents each op and has its fake
// kernel.
#include <torch/csrc/stable/library.h>

#include "ops/ops.h"

#ifdef MXT_EMULATION  // the functions for CUDA, on the CPU, in a library of their own
#define MXT_LIBRARY mxtrain_emulated
#define MXT_CPU_FUNCTIONS mxtrain::cuda
#else
#define MXT_LIBRARY mxtrain
#define MXT_CPU_FUNCTIONS mxtrain::cpu
#endif
// Once more, so that the name is put in before torch's macros paste it.
#define MXT_DEFINE(library, m) STABLE_TORCH_LIBRARY(library, m)
#define MXT_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

MXT_DEFINE(MXT_LIBRARY, m) {
  m.def(
      "quantize(Tensor x, int format, int scale_rule=1, int rounding=0, bool transpose=False, "
      "Tensor? rng=None, int hadamard=0, "
      "Tensor? signs=None, float prescale=1.0, Tensor? toward=None, bool swizzle=False) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "quantize_dual(Tensor x, Tensor? rng, int row_format, int row_scale_rule, int row_rounding, "
      "int row_hadamard, Tensor? row_signs, "
      "float row_prescale, Tensor? row_toward, int col_format, int col_scale_rule, int "
      "col_rounding, int col_hadamard, "
      "Tensor? col_signs, float col_prescale, Tensor? col_toward, bool swizzle=False, bool "
      "column_sum=False) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "requantize(Tensor data, Tensor scale, Tensor? tensor_scale, int format, int cols, int "
      "out_format, int scale_rule=1, "
      "int rounding=0, Tensor? rng=None, int hadamard=0, Tensor? signs=None, float prescale=1.0, "
      "bool swizzle=False) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "dequantize(Tensor data, Tensor scale, Tensor? tensor_scale, int format, int cols, "
      "ScalarType dtype) -> Tensor");
  m.def("hadamard(Tensor x, int group, Tensor? signs=None) -> Tensor");
  m.def("stochastic_round(Tensor x, ScalarType dtype, Tensor rng) -> Tensor");
  m.def("column_sum(Tensor dy) -> Tensor");
  m.def("swizzle_scale(Tensor scale) -> Tensor");
  m.def("unswizzle_scale(Tensor scale, int rows, int cols) -> Tensor");
  m.def(
      "gemm(Tensor a, Tensor a_scale, Tensor? a_tensor_scale, Tensor b, Tensor b_scale, Tensor? "
      "b_tensor_scale, int format, "
      "Tensor? bias, float alpha, ScalarType out_dtype, int accumulate=0) -> Tensor");
  m.def(
      "gemm_add_(Tensor(a!) out, Tensor a, Tensor a_scale, Tensor? a_tensor_scale, Tensor b, "
      "Tensor b_scale, Tensor? b_tensor_scale, int format, float alpha, int accumulate=0) -> ()");
  m.def(
      "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
      "exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float "
      "weight_decay, Tensor? lr_tensor, Tensor? rng, Tensor(e!)[] emas, float[] ema_weights, "
      "Tensor(f!)[] weight_changes, Tensor(g!)[] quantized_changes, int scale_rule=1, int "
      "rounding=0) -> ()");
  m.def(
      "ramped_adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
      "exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, float "
      "weight_decay, Tensor? lr_tensor, Tensor? rng, Tensor(e!)[] grad_sums, Tensor(f!)[] counts, "
      "Tensor[] periods) -> ()");
  m.def(
      "quantization_statistics(Tensor x, Tensor data, Tensor scale, Tensor? tensor_scale, int "
      "format, float prescale=1.0) -> Tensor");
  m.def(
      "oscillation_step_(Tensor(a!) state, Tensor(b!) sums, Tensor w, Tensor data, Tensor scale, "
      "Tensor? tensor_scale, int format) -> ()");
  m.def(
      "int8_quantize(Tensor x, int rounding=0, Tensor? rng=None, int layout=0) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "int8_quantize_fallback(Tensor x, Tensor threshold, int layout=0) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "int8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor? bias, ScalarType "
      "out_dtype, Tensor? residual=None, Tensor? residual_scale=None, Tensor? mask=None, "
      "bool residual_of_b=False) -> Tensor");
  m.def(
      "int8_pack_residual(Tensor residual, Tensor scale, Tensor mask, SymInt count) -> (Tensor, "
      "Tensor)");
  m.def("int8_unpack_residual(Tensor pool, Tensor slots, SymInt rows, SymInt kp) -> Tensor");
  m.def(
      "rms_norm_forward(Tensor x, Tensor? weight, float eps, ScalarType out_dtype, bool "
      "context=True) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor high, Tensor low, Tensor scale, Tensor rstd, Tensor? "
      "weight, ScalarType dx_dtype, bool weight_grad=True) -> (Tensor, Tensor)");
  m.def(
      "swiglu_forward(Tensor gate, Tensor up, bool context=True) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "swiglu_backward(Tensor dh, Tensor high, Tensor low, Tensor scale, ScalarType dtype) -> "
      "Tensor");
}

MXT_IMPLEMENT(MXT_LIBRARY, CPU, m) {
  using namespace MXT_CPU_FUNCTIONS;
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_dual", TORCH_BOX(&quantize_dual));
  m.impl("requantize", TORCH_BOX(&requantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("stochastic_round", TORCH_BOX(&stochastic_round));
  m.impl("column_sum", TORCH_BOX(&column_sum));
  m.impl("swizzle_scale", TORCH_BOX(&swizzle_scale));
  m.impl("unswizzle_scale", TORCH_BOX(&unswizzle_scale));
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_add_", TORCH_BOX(&gemm_add_));
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("ramped_adamw_", TORCH_BOX(&ramped_adamw_));
  m.impl("quantization_statistics", TORCH_BOX(&quantization_statistics));
  m.impl("oscillation_step_", TORCH_BOX(&oscillation_step_));
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_quantize_fallback", TORCH_BOX(&int8_quantize_fallback));
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm));
  m.impl("int8_pack_residual", TORCH_BOX(&int8_pack_residual));
  m.impl("int8_unpack_residual", TORCH_BOX(&int8_unpack_residual));
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}

#ifdef MXT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(mxtrain, CUDA, m) {
  using namespace mxtrain::cuda;
  m.impl("quantize", TORCH_BOX(&quantize));
  m.impl("quantize_dual", TORCH_BOX(&quantize_dual));
  m.impl("requantize", TORCH_BOX(&requantize));
  m.impl("dequantize", TORCH_BOX(&dequantize));
  m.impl("hadamard", TORCH_BOX(&hadamard));
  m.impl("stochastic_round", TORCH_BOX(&stochastic_round));
  m.impl("column_sum", TORCH_BOX(&column_sum));
  m.impl("swizzle_scale", TORCH_BOX(&swizzle_scale));
  m.impl("unswizzle_scale", TORCH_BOX(&unswizzle_scale));
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_add_", TORCH_BOX(&gemm_add_));
  m.impl("adamw_", TORCH_BOX(&adamw_));
  m.impl("ramped_adamw_", TORCH_BOX(&ramped_adamw_));
  m.impl("quantization_statistics", TORCH_BOX(&quantization_statistics));
  m.impl("oscillation_step_", TORCH_BOX(&oscillation_step_));
  m.impl("int8_quantize", TORCH_BOX(&int8_quantize));
  m.impl("int8_quantize_fallback", TORCH_BOX(&int8_quantize_fallback));
  m.impl("int8_gemm", TORCH_BOX(&int8_gemm));
  m.impl("int8_pack_residual", TORCH_BOX(&int8_pack_residual));
  m.impl("int8_unpack_residual", TORCH_BOX(&int8_unpack_residual));
  m.impl("rms_norm_forward", TORCH_BOX(&rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
  m.impl("swiglu_forward", TORCH_BOX(&swiglu_forward));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
}
#endif
