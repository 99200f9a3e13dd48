// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/mbarrier.cuh, emulated for barriers of one arrival, which comes before the wait: a wait
// for what has not been asked for ends the launch.
#pragma once

#include "ptx/memory.cuh"

namespace mxtrain::ptx {

struct EmulatedBarrier {
  int32_t bytes;  // still to come
  uint16_t arrived, parity;
  void settle() {
    if (!arrived || bytes != 0) return;
    arrived = 0;
    parity ^= 1;
  }
};

template <class F>
void change_barrier(uint32_t barrier, F change) {
  EmulatedBarrier b = load_shared<EmulatedBarrier>(barrier);
  change(b);
  store_shared(barrier, b);
}

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  if (arrivals != 1) emulation::fail("a barrier of %u arrivals", arrivals);
  store_shared(barrier, EmulatedBarrier{});
}
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  change_barrier(barrier, [&](EmulatedBarrier& b) {
    b.bytes += static_cast<int32_t>(bytes);
    b.arrived = 1;
    b.settle();
  });
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulation::await_boxes(barrier);
  if (load_shared<EmulatedBarrier>(barrier).parity == parity)
    emulation::fail("a wait for a phase of a barrier that has not begun");
}

}  // namespace mxtrain::ptx
