// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/cluster.cuh, emulated, as far as kernels without clusters use it: launches do not
// overlap.
#pragma once

namespace mxtrain::ptx {

inline void griddepcontrol_launch_dependents() {}
inline void griddepcontrol_wait() {}

}  // namespace mxtrain::ptx
