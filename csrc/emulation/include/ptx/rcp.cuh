// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/rcp.cuh, emulated: some value within one unit in the last place, as hardware may give.
#pragma once

#include <cstdint>
#include <cstring>

namespace mxtrain::ptx {

inline float rcp_approx_ftz_f32(float v) {
  uint32_t from, to;
  float d = 1.0f / v;
  memcpy(&from, &v, sizeof v);
  memcpy(&to, &d, sizeof d);
  const double off = static_cast<double>(d) * v - 1;  // of one unit, in the direction that it has
  if (off != 0 && from % 3 != 0) to += (off > 0) == (from % 3 == 1) ? -1 : 1;
  memcpy(&d, &to, sizeof d);
  return d;
}

}  // namespace mxtrain::ptx
