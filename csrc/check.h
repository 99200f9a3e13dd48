// SPDX-License-Identifier: Apache-2.0
// Argument checks of the ops, with one message style:
//   mxtrain::<op>: <argument> must <condition>, got <value> (<context>). <what to do>
// MXT_CHECK(condition, op, parts...) throws std::runtime_error, which Python sees as RuntimeError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "formats/block.h"

namespace mxtrain {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using TensorList = std::vector<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream s;
  s << "mxtrain::" << op << ": ";
  (s << ... << parts);
  throw std::runtime_error(s.str());
}

#define MXT_CHECK(condition, op, ...)                   \
  do {                                                  \
    if (!(condition)) ::mxtrain::fail(op, __VA_ARGS__); \
  } while (0)

std::string shape_of(const Tensor& t);     // "[4, 100]"
std::string device_of(const Tensor& t);    // "cuda:1"
const char* dtype_name(ScalarType dtype);  // as Python has it: "float32"

bool is_input_float(ScalarType dtype);  // bfloat16, float16 or float32
void check_matrix(const char* op, const char* name, const Tensor& t);  // 2-D, a float type
void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x);
const FormatInfo& check_format(const char* op, const char* name, int64_t format);
void check_choice(const char* op, const char* name, int64_t value, const char* const* names,
                  int count);
// name: what the op calls the group; none: whether 0, for no rotation, is legal.
void check_hadamard(const char* op, const char* name, int64_t group, bool none,
                    const OptionalTensor& signs, const Tensor& x);
// Sizes whose padding and bytes stay within 64 bits; only empty and expanded tensors can be larger.
void check_sizes(const char* op, const char* name, const Tensor& t);
void check_rng(const char* op, const OptionalTensor& rng,
               const Tensor& x);  // int64 [2] on x's device

// A packed operand as the ops take it: codes, scales and nvfp4's tensor scale agree with the
// format.
struct PackedShape {
  int64_t rows, kp;
};
PackedShape check_operand(const char* op, const char* name, const Tensor& data, const Tensor& scale,
                          const OptionalTensor& tensor_scale, int64_t format,
                          bool tiles_too = false);  // whether scale may be swizzled
// cols is the logical K of an operand: it ends in the last block.
void check_logical_cols(const char* op, int64_t cols, const PackedShape& shape, int64_t format);

}  // namespace mxtrain
