// SPDX-License-Identifier: Apache-2.0
// The kernels' shared variables are static ones, in the .bss of their objects. CMakeLists.txt links
// those between this object and shared_last.cpp's, so that all shared memory is one range: dynamic
// shared memory, then theirs.
#include "emulation/shared.h"

namespace mxtrain::emulation {

alignas(1024) uint8_t shared_first[kMostShared];

}  // namespace mxtrain::emulation
