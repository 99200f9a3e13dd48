// SPDX-License-Identifier: Apache-2.0
// Writing float32 results as float32, bfloat16 or float16. Included once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "formats/float16.h"

namespace mxtrain::cpu::MXT_ISA {

struct StoreFloat32 {
  using Type = float;
  MXT_HD static float store(float v) { return v; }
};
struct StoreBfloat16 {
  using Type = uint16_t;
  MXT_HD static uint16_t store(float v) { return float_to_bf16(v); }
};
struct StoreFloat16 {
  using Type = uint16_t;
  MXT_HD static uint16_t store(float v) { return float_to_half(v); }
};

template <class Store>
static void store_row(const float* v, int64_t n, void* out, int64_t first) {
  auto* o = static_cast<typename Store::Type*>(out) + first;
  for (int64_t i = 0; i < n; ++i) o[i] = Store::store(v[i]);
}

static void store(SourceType type, const float* v, int64_t n, void* out, int64_t first) {
  if (type == SourceType::kFloat32) return store_row<StoreFloat32>(v, n, out, first);
  if (type == SourceType::kBfloat16) return store_row<StoreBfloat16>(v, n, out, first);
  store_row<StoreFloat16>(v, n, out, first);
}

}  // namespace mxtrain::cpu::MXT_ISA
