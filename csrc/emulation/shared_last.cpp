// SPDX-License-Identifier: Apache-2.0
// The end of shared memory: see shared_first.cpp.
#include "emulation/shared.h"

namespace mxtrain::emulation {

alignas(64) uint8_t shared_last[64];

}  // namespace mxtrain::emulation
