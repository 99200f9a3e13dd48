// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/tma.cuh, emulated: a box is copied when it is asked for or when its barrier is waited
// for, as drawn.
#pragma once

#include "cuda/tensor_map.h"
#include "ptx/mbarrier.cuh"

namespace mxtrain::ptx {

inline void cp_async_bulk_tensor_2d_load(uint32_t shared, const void* map, int x, int y,
                                         uint32_t barrier) {
  constexpr uint32_t kRowBytes = 128;
  const cuda::TensorMap m = *static_cast<const cuda::TensorMap*>(map);
  if (shared % kRowBytes != 0) emulation::fail("a box at an address that is no multiple of 128");
  emulation::copy_box(barrier, [=] {
    for (int r = 0; r < m.box_rows; ++r)
      for (uint32_t byte = 0; byte < kRowBytes; ++byte) {
        const int64_t row = y + int64_t{r}, at = x * int64_t{m.element_bytes} + byte;
        const bool inside = row >= 0 && row < m.rows && at >= 0 && at < m.row_bytes;
        const uint32_t to = shared + r * kRowBytes + byte;
        store_shared(to ^ (to >> 7 & 7) << 4, inside ? m.base[row * m.pitch + at] : uint8_t{0});
      }
    change_barrier(barrier, [&](EmulatedBarrier& b) {
      b.bytes -= m.box_rows * static_cast<int32_t>(kRowBytes);
      b.settle();
    });
  });
}
inline void prefetch_tensormap(const void*) {}

}  // namespace mxtrain::ptx
