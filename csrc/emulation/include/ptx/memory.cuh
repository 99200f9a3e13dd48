// SPDX-License-Identifier: Apache-2.0
// csrc/ptx/memory.cuh, emulated: an access that is not aligned, or a shared one that is outside,
// ends the launch.
#pragma once

#include <cstring>

#include "emulation/emulation.h"

namespace mxtrain::ptx {

template <class T>
T load_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0)
    emulation::fail("a load of %zu bytes is not aligned", sizeof(T));
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
T load_shared(uint32_t shared) {
  T v;
  memcpy(&v, emulation::at_shared(shared, sizeof v), sizeof v);
  return v;
}
template <class T>
void store_shared(uint32_t shared, const T& v) {
  memcpy(emulation::at_shared(shared, sizeof v), &v, sizeof v);
}

inline uint4 ld_global_nc_v4(const void* p) { return load_aligned<uint4>(p); }
inline uint32_t ld_global_nc_b32(const void* p) { return load_aligned<uint32_t>(p); }
inline uint32_t ld_global_nc_u8(const uint8_t* p) { return *p; }
inline void prefetch_global_l1(const void*) {}
inline void prefetch_global_l2(const void*) {}

inline void cp_async_16(uint32_t shared, const void* p, int bytes) {
  emulation::copy_async(shared, p, 16, bytes);
}
inline void cp_async_8(uint32_t shared, const void* p, int bytes) {
  emulation::copy_async(shared, p, 8, bytes);
}
inline void cp_async_4(uint32_t shared, const void* p, int bytes) {
  emulation::copy_async(shared, p, 4, bytes);
}
inline void cp_async_commit_group() { emulation::commit_copies(); }
template <int kPending>
void cp_async_wait_group() {
  emulation::await_copies(kPending);
}
inline void cp_async_wait_all() { emulation::await_all_copies(); }

inline void ldmatrix_x4(uint32_t (&w)[4], uint32_t shared, MXT_HERE) {
  const uint64_t* row = emulation::exchange("ldmatrix", 0xFFFFFFFFu, shared, file, line);
  const uint32_t lane = emulation::lane;
  for (int i = 0; i < 4; ++i) {
    const uint4 v = load_shared<uint4>(static_cast<uint32_t>(row[8 * i + lane / 4]));
    memcpy(&w[i], reinterpret_cast<const uint8_t*>(&v) + lane % 4 * 4, 4);
  }
}
inline void ldmatrix_x4_trans(uint32_t (&w)[4], uint32_t shared, MXT_HERE) {
  const uint64_t* row = emulation::exchange("ldmatrix", 0xFFFFFFFFu, shared, file, line);
  const uint32_t lane = emulation::lane;
  const auto value = [&](uint32_t r) -> uint32_t {
    const uint4 v = load_shared<uint4>(static_cast<uint32_t>(row[r]));
    uint16_t values[8];
    memcpy(values, &v, sizeof v);
    return values[lane / 4];
  };
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t r = 8 * i + lane % 4 * 2;
    w[i] = value(r) | value(r + 1) << 16;
  }
}
inline void stmatrix_x4(uint32_t shared, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3,
                        MXT_HERE) {
  const uint64_t* row = emulation::exchange("stmatrix", 0xFFFFFFFFu, shared, file, line);
  const uint32_t w[4] = {w0, w1, w2, w3}, lane = emulation::lane;
  for (int i = 0; i < 4; ++i)
    store_shared(static_cast<uint32_t>(row[8 * i + lane / 4]) + lane % 4 * 4, w[i]);
}

inline void st_shared_v2(uint32_t shared, uint32_t w0, uint32_t w1) {
  store_shared(shared, uint2{w0, w1});
}
inline void st_shared_u16(uint32_t shared, uint32_t bytes) {
  store_shared(shared, static_cast<uint16_t>(bytes));
}
inline void st_shared_u8(uint32_t shared, uint32_t byte) {
  store_shared(shared, static_cast<uint8_t>(byte));
}
inline uint32_t ld_shared_b32(uint32_t shared) { return load_shared<uint32_t>(shared); }
inline uint2 ld_shared_v2(uint32_t shared) { return load_shared<uint2>(shared); }
inline uint4 ld_shared_v4(uint32_t shared) { return load_shared<uint4>(shared); }
inline void st_shared_v4(uint32_t shared, uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  store_shared(shared, uint4{w0, w1, w2, w3});
}

inline void compiler_fence() {}
template <class T>
T opaque(T v) {
  return v;
}
inline uint32_t shared_address(const void* p) { return emulation::shared_address(p); }

}  // namespace mxtrain::ptx
