// SPDX-License-Identifier: Apache-2.0
// Kernels with one fault each, which the emulation must find: its own tests launch them.
#include "cuda/launch.cuh"
#include "ptx/memory.cuh"

namespace mxtrain::cuda {

namespace {

enum Fault {
  kNone,
  kMissingBarrier,
  kMissingSyncwarp,
  kMissingWait,
  kEarlyWrite,
  kUninitialized,
  kExitedLane,
  kDivergentBarrier,
  kDifferentCalls,
  kExitedThread,
  kOutside,
  kMisaligned,
  kNoSharedAddress
};

// Every thread gives its number + 1 to its neighbour; twice, through the same words.
__global__ void exchange_kernel(uint32_t* out, const uint32_t* in, Fault fault) {
  __shared__ uint32_t words[64];
  MXT_DYNAMIC_SHARED(memory, 16);
  const uint32_t i = threadIdx.x, next = (i + 1) % 64;
  const uint32_t to = ptx::shared_address(fault == kNoSharedAddress ? out : words + i);
  if (fault != kUninitialized || i != 5) ptx::cp_async_4(to, in + i, 4);
  if (fault != kMissingWait) ptx::cp_async_wait_all();
  if (fault == kExitedThread && i == 7) return;
  if (fault == kDivergentBarrier && i < 32)
    __syncthreads();
  else if (fault != kMissingBarrier)
    __syncthreads();
  const uint32_t got = words[next];
  if (fault != kEarlyWrite) __syncthreads();
  words[i] = got + 1;
  // Within a warp: its lanes turned round.
  if (fault != kMissingSyncwarp) __syncwarp();
  const uint32_t turned = words[i ^ 31];
  if (fault == kExitedLane && i == 40) return;
  uint32_t sum = turned;
  if (fault == kDifferentCalls && i % 32 == 3)
    sum += __shfl_xor_sync(0xFFFFFFFFu, turned, 1);
  else
    sum += __shfl_xor_sync(0xFFFFFFFFu, turned, 1);
  const uint32_t there = ptx::shared_address(memory) + 4 * i;
  ptx::st_shared_v2(there % 8 ? there - 4 : there, sum, sum);
  if (fault == kOutside) ptx::st_shared_u8(ptx::shared_address(memory) + 256, 0);
  if (fault == kMisaligned) ptx::ld_shared_v4(ptx::shared_address(memory) + 8);
  out[i] = sum;
}

}  // namespace

}  // namespace mxtrain::cuda

// Launches one; the message of its error, or "".
extern "C" __attribute__((visibility("default"))) const char* mxtrain_emulation_fault(
    uint32_t* out, const uint32_t* in, int fault) {
  using namespace mxtrain::cuda;
  const cudaError_t error =
      launch_with_shared(exchange_kernel, 1, 64, 256, nullptr, out, in, static_cast<Fault>(fault));
  return cudaGetErrorString(error);
}
