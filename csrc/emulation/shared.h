// SPDX-License-Identifier: Apache-2.0
// Where shared memory begins, with the dynamic one, and ends: see shared_first.cpp.
#pragma once

#include "cuda_runtime_api.h"

namespace mxtrain::emulation {

extern uint8_t shared_first[kMostShared], shared_last[64];

}  // namespace mxtrain::emulation
