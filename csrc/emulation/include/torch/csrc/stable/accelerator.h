// SPDX-License-Identifier: Apache-2.0
// Tensors of the emulation (csrc/emulation/emulation.h) are on the CPU: no device to choose.
#pragma once

#include_next <torch/csrc/stable/accelerator.h>

namespace mxtrain::emulation {

struct NoGuard {
  explicit NoGuard(int32_t) {}
  ~NoGuard() {}  // so that one which nobody reads is not unused
};

}  // namespace mxtrain::emulation

namespace torch::stable::accelerator {

using mxtrain::emulation::NoGuard;

}  // namespace torch::stable::accelerator

#define DeviceGuard NoGuard
