// SPDX-License-Identifier: Apache-2.0
// Reciprocals (PTX ISA, "Floating-Point Instructions: rcp").
#pragma once

namespace mxtrain::ptx {

// rcp.approx.ftz.f32: 1 / v to one unit in the last place; v and 1 / v are normal numbers.
__device__ __forceinline__ float rcp_approx_ftz_f32(float v) {
  float d;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(v));
  return d;
}

}  // namespace mxtrain::ptx
