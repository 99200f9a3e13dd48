// SPDX-License-Identifier: Apache-2.0
// The host side of every op: what library.cpp registers. Schemas, and so argument orders, are in
// library.cpp.
#pragma once

#include <tuple>

#include "check.h"

namespace mxtrain {

using Operand3 = std::tuple<Tensor, Tensor, Tensor>;  // data, scale, tensor_scale
using Operand2 = std::tuple<Tensor, Tensor>;
using Operand4 = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Operand5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Operand7 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Operand8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Checks that every backend of an op shares.
void check_gemm(const char* op, const Tensor& a, const Tensor& a_scale,
                const OptionalTensor& a_tensor_scale, const Tensor& b, const Tensor& b_scale,
                const OptionalTensor& b_tensor_scale, int64_t format, const OptionalTensor& bias,
                double alpha, ScalarType out_dtype, int64_t accumulate);

// out of gemm_add_, for operands a and b that are checked.
void check_accumulator(const Tensor& out, const Tensor& a, const Tensor& b);
// x (called name) and the operand that was made of it; the factor of quantize; the buffers of
// oscillation_step_ for a w that is checked.
void check_statistics(const char* op, const char* name, const Tensor& x, const Tensor& data,
                      const Tensor& scale, const OptionalTensor& tensor_scale, int64_t format);
void check_prescale(const char* op, const Tensor& x, double prescale);
void check_movement(const Tensor& state, const Tensor& sums, const Tensor& w);
// What mxtrain_set_gemm_backend was told last, in this process.
GemmBackend requested_gemm_backend();

// One declaration list for every device.
#define MXT_DECLARE_OPS                                                                            \
  Operand3 quantize(Tensor x, int64_t format, int64_t scale_rule, int64_t rounding,                \
                    bool transpose, OptionalTensor rng, int64_t hadamard, OptionalTensor signs,    \
                    double prescale, OptionalTensor toward, bool swizzle);                         \
  Operand7 quantize_dual(Tensor x, OptionalTensor rng, int64_t row_format, int64_t row_scale_rule, \
                         int64_t row_rounding, int64_t row_hadamard, OptionalTensor row_signs,     \
                         double row_prescale, OptionalTensor row_toward, int64_t col_format,       \
                         int64_t col_scale_rule, int64_t col_rounding, int64_t col_hadamard,       \
                         OptionalTensor col_signs, double col_prescale, OptionalTensor col_toward, \
                         bool swizzle, bool sum_columns);                                          \
  Operand3 requantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,      \
                      int64_t cols, int64_t out_format, int64_t scale_rule, int64_t rounding,      \
                      OptionalTensor rng, int64_t hadamard, OptionalTensor signs, double prescale, \
                      bool swizzle);                                                               \
  Tensor dequantize(Tensor data, Tensor scale, OptionalTensor tensor_scale, int64_t format,        \
                    int64_t cols, ScalarType dtype);                                               \
  Tensor hadamard(Tensor x, int64_t group, OptionalTensor signs);                                  \
  Tensor stochastic_round(Tensor x, ScalarType dtype, Tensor rng);                                 \
  Tensor column_sum(Tensor dy);                                                                    \
  Tensor swizzle_scale(Tensor scale);                                                              \
  Tensor unswizzle_scale(Tensor scale, int64_t rows, int64_t cols);                                \
  Tensor gemm(Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b, Tensor b_scale,   \
              OptionalTensor b_tensor_scale, int64_t format, OptionalTensor bias, double alpha,    \
              ScalarType out_dtype, int64_t accumulate);                                           \
  void gemm_add_(Tensor out, Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b,    \
                 Tensor b_scale, OptionalTensor b_tensor_scale, int64_t format, double alpha,      \
                 int64_t accumulate);                                                              \
  void adamw_(TensorList params, TensorList grads, TensorList exp_avgs, TensorList exp_avg_sqs,    \
              TensorList steps, double lr, double beta1, double beta2, double eps,                 \
              double weight_decay, OptionalTensor lr_tensor, OptionalTensor rng, TensorList emas,  \
              std::vector<double> ema_weights, TensorList weight_changes,                          \
              TensorList quantized_changes, int64_t scale_rule, int64_t rounding);                 \
  void ramped_adamw_(TensorList params, TensorList grads, TensorList exp_avgs,                     \
                     TensorList exp_avg_sqs, TensorList steps, double lr, double beta1,            \
                     double beta2, double eps, double weight_decay, OptionalTensor lr_tensor,      \
                     OptionalTensor rng, TensorList grad_sums, TensorList counts,                  \
                     TensorList periods);                                                          \
  Tensor quantization_statistics(Tensor x, Tensor data, Tensor scale, OptionalTensor tensor_scale, \
                                 int64_t format, double prescale);                                 \
  void oscillation_step_(Tensor state, Tensor sums, Tensor w, Tensor data, Tensor scale,           \
                         OptionalTensor tensor_scale, int64_t format);                             \
  Operand3 int8_quantize(Tensor x, int64_t rounding, OptionalTensor rng, int64_t layout);          \
  Operand8 int8_quantize_fallback(Tensor x, Tensor threshold, int64_t layout);                     \
  Tensor int8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, OptionalTensor bias,        \
                   ScalarType out_dtype, OptionalTensor residual, OptionalTensor residual_scale,   \
                   OptionalTensor mask, bool residual_of_b);                                       \
  Operand2 int8_pack_residual(Tensor residual, Tensor scale, Tensor mask, int64_t count);          \
  Tensor int8_unpack_residual(Tensor pool, Tensor slots, int64_t rows, int64_t kp);                \
  Operand5 rms_norm_forward(Tensor x, OptionalTensor weight, double eps, ScalarType out_dtype,     \
                            bool context);                                                         \
  Operand2 rms_norm_backward(Tensor dy, Tensor high, Tensor low, Tensor scale, Tensor rstd,        \
                             OptionalTensor weight, ScalarType dx_dtype, bool weight_grad);        \
  Operand4 swiglu_forward(Tensor gate, Tensor up, bool context);                                   \
  Tensor swiglu_backward(Tensor dh, Tensor high, Tensor low, Tensor scale, ScalarType dtype);

namespace cpu {
MXT_DECLARE_OPS
}  // namespace cpu

namespace cuda {
MXT_DECLARE_OPS
}  // namespace cuda

}  // namespace mxtrain
