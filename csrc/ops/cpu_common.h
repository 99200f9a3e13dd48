// SPDX-License-Identifier: Apache-2.0
// What the CPU ops share: tensors seen as the kernels' argument structs.
#pragma once

#include "check.h"
#include "cpu/kernels.h"

namespace mxtrain::cpu {

inline SourceType source_type(ScalarType dtype) {
  if (dtype == ScalarType::Float) return SourceType::kFloat32;
  return dtype == ScalarType::BFloat16 ? SourceType::kBfloat16 : SourceType::kFloat16;
}

inline Tensor empty_bytes(const Tensor& like, int64_t rows, int64_t cols) {
  return torch::stable::new_empty(like, {rows, cols}, ScalarType::Byte);
}

inline float scale_of(const OptionalTensor& tensor_scale) {
  return tensor_scale && tensor_scale->numel() ? *tensor_scale->const_data_ptr<float>() : 1.0f;
}

inline const uint8_t* bytes(const Tensor& t) {
  return static_cast<const uint8_t*>(t.const_data_ptr());
}
inline uint8_t* mutable_bytes(const Tensor& t) {
  return static_cast<uint8_t*>(t.mutable_data_ptr());
}

// Threads get at least this much work: below it, starting them costs more than it saves.
constexpr int64_t kGrainElements = 16384;

inline int64_t grain(int64_t elements_per_item) {
  return elements_per_item >= kGrainElements
             ? 1
             : kGrainElements / (elements_per_item > 0 ? elements_per_item : 1);
}

}  // namespace mxtrain::cpu
