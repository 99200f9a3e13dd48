// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/mbarrier.cuh, emulated: within a block, without copies that it counts.
#pragma once

#include "emulation/emulation.h"
#include "ptx/integer.cuh"

namespace mxtrain::ptx {

constexpr int kWarpArrivals = 1;

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  emulation::init_phases(barrier, arrivals);
}
inline void mbarrier_arrive(uint32_t barrier) { emulation::arrive(barrier); }
inline void mbarrier_arrive_warp(uint32_t barrier) {
  __syncwarp();
  if (lane_id() == 0) mbarrier_arrive(barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity, MXT_HERE) {
  emulation::await_phase(barrier, parity, "mbarrier.try_wait", file, line);
}

}  // namespace mxtrain::ptx
