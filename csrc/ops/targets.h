// SPDX-License-Identifier: Apache-2.0
// What quantize, quantize_dual and requantize share on every device: the options of one operand, as
// the schemas give them, and their checks.
#pragma once

#include <cmath>

#include "check.h"

namespace mxtrain {

// What one operand is quantized to.
struct Target {
  int64_t format, scale_rule, rounding, hadamard;
  const OptionalTensor& signs;
  double prescale;
  const OptionalTensor& toward;

  float hadamard_norm() const {
    return hadamard ? static_cast<float>(1.0 / std::sqrt(static_cast<double>(hadamard))) : 1.0f;
  }
};

// k: the length of the block axis.
void check_target(const char* op, const Tensor& x, const Target& t, const OptionalTensor& rng,
                  int64_t k);

// Everything that quantize_dual and requantize check before any device's code runs.
PackedShape check_requantize(const Tensor& data, const Tensor& scale,
                             const OptionalTensor& tensor_scale, int64_t format, int64_t cols,
                             const Target& t, const OptionalTensor& rng);
PackedShape check_dequantize(const Tensor& data, const Tensor& scale,
                             const OptionalTensor& tensor_scale, int64_t format, int64_t cols,
                             ScalarType dtype);
void check_column_sum(const Tensor& dy);
void check_hadamard_op(const Tensor& x, int64_t group, const OptionalTensor& signs);
void check_stochastic_round(const Tensor& x, ScalarType dtype, const Tensor& rng);
void check_swizzle(const Tensor& scale);
void check_unswizzle(const Tensor& scale, int64_t rows, int64_t cols);

}  // namespace mxtrain
