// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels of csrc on a CPU: their sources, compiled by the host's compiler against the
// headers in include/, which stand before csrc on the include path. This is how a kernel runs.
//
// One block runs at a time, on the thread that launches. Each of its threads is a fiber, with a
// stack of its own, that runs until it must wait for others: at a barrier for all threads of the
// block, at a warp's intrinsic for the lanes of its mask, as CUDA has it. Which of those that may
// run comes next is drawn from a seed, and so is the order of the blocks: what a missing barrier
// would order comes in any order. Shared memory holds garbage when a block starts. A copy by
// cp.async is made when it is issued or when it is waited for, as drawn, too.
//
// An error ends the launch, and cudaGetLastError says what it was: threads that wait for one that
// cannot come, a barrier that not all threads of a block reach, lanes that meet in different
// intrinsics, a shared address outside of shared memory or not aligned.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

// The place of an intrinsic in the source, as its last two arguments.
#define MXT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace mxtrain::emulation {

// Of the thread that runs.
extern uint32_t lane;

// Ends the launch with this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Every thread of the block comes here.
void barrier(const char* what, const char* file, int line);

// The lanes of mask come here, each with a value; what they brought, by lane.
const uint64_t* exchange(const char* what, unsigned mask, uint64_t value, const char* file,
                         int line);

// Dynamic shared memory, from an address on that is a multiple of 1024.
uint8_t* dynamic_shared();

// Addresses in shared memory, as instructions take them: all 32-bit, but no base that a kernel
// could know. `bytes` at an address must lie in shared memory, at a multiple of `bytes`.
uint32_t shared_address(const void* p);
void* at_shared(uint32_t address, uint32_t bytes);

// Barriers in 8 bytes of shared memory: a phase ends with the last of its arrivals.
void init_phases(uint32_t barrier, uint32_t arrivals);
void arrive(uint32_t barrier);
void await_phase(uint32_t barrier, uint32_t parity, const char* what, const char* file, int line);

// cp.async, of `bytes` that are followed by zeros up to `size`.
void copy_async(uint32_t to, const void* from, uint32_t size, uint32_t bytes);
void commit_copies();
void await_copies(unsigned pending);  // all but the last `pending` groups
void await_all_copies();

// Whether a coin, from the seed, shows heads.
bool draw();

// body(context) as every thread of the grid.
void run(void (*body)(const void*), const void* context, dim3 grid, unsigned block, size_t shared);

template <class... P>
auto launcher(void (*kernel)(P...), dim3 grid, unsigned block, size_t shared) {
  return [=](const auto&... arguments) {
    const auto call = [&] { kernel(arguments...); };
    run([](const void* c) { (*static_cast<const decltype(call)*>(c))(); }, &call, grid, block,
        shared);
  };
}

}  // namespace mxtrain::emulation

// What csrc/cuda/launch.cuh leaves to be defined.
#define MXT_LAUNCH(kernel, grid, block, shared, stream) \
  ::mxtrain::emulation::launcher(kernel, grid, block, shared)
#define MXT_DYNAMIC_SHARED(name, alignment) \
  uint8_t* const name = ::mxtrain::emulation::dynamic_shared()
