// SPDX-License-Identifier: Apache-2.0
// Folding of mxfp4 into E5M2, whose tensor cores run at twice the BF16 rate:
//   row_scale[r] = max over b of scale[r, b]              E8M0; 255, if any block of the row is NaN
//   out[r, k]    = E5M2(element[r, k] * 2^(13 - s))       s = row_scale[r] - scale[r, k / 32]
// so that element * 2^(scale - 127) = out * 2^(row_scale - 140). E2M1 has one mantissa bit: from
// s = 0 (6 * 2^13 is three quarters of the way to E5M2's overflow) to s = 28 (0.5 * 2^-15 is E5M2's
// smallest subnormal) the value is exact. A block further down becomes zero; it is less than 2^-28
// of the row's largest. Signs stay, also on zeros that were zeros.
// A warp folds kChunk consecutive elements of one row, and reads all scales of the row for that
// (the other warps of the row find them in L1). A lane takes 16 elements, half a block, at a time:
// an 8-byte load, a 16-byte store. A byte permute looks four magnitudes up in an 8-entry table of
// E5M2 bytes, which each block shifts by subtracting s from its exponent fields.
#include "cuda/fold.cuh"
#include "cuda/fold.h"
#include "cuda/launch.cuh"
#include "formats/e8m0.h"
#include "ptx/memory.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct FoldTraits {
  static constexpr int kThreads = 256;
  static constexpr int kLoads = 4;                    // in flight in each lane
  static constexpr int kSteps = 1;                    // of kLoads loads
  static constexpr int kLaneElements = 16;            // an 8-byte load, a 16-byte store
  static constexpr int kStride = 32 * kLaneElements;  // what a warp loads at once
  static constexpr int kChunk = kSteps * kLoads * kStride;
  static_assert(32 % kLaneElements == 0, "a lane's elements have one scale");
};

// ---- device helpers ----

// The largest of a row's scales, in every lane.
__device__ __forceinline__ uint32_t row_max(const uint8_t* scale, int blocks, bool words,
                                            int lane) {
  uint32_t largest = 0;
  if (words) {
    const uint32_t* w = reinterpret_cast<const uint32_t*>(scale);
    for (int i = lane; i < blocks / 4; i += 32) largest = __vmaxu4(largest, __ldg(w + i));
    largest = max(max(largest & 0xFFu, (largest >> 8) & 0xFFu),
                  max((largest >> 16) & 0xFFu, largest >> 24));
  } else {
    for (int i = lane; i < blocks; i += 32)
      largest = max(largest, static_cast<uint32_t>(__ldg(scale + i)));
  }
  return __reduce_max_sync(0xFFFFFFFFu, largest);
}

template <bool kAligned>
__device__ __forceinline__ uint2 load8(const uint8_t* p) {
  if (kAligned) return __ldcs(reinterpret_cast<const uint2*>(p));
  uint2 w;
  memcpy(&w, p, 8);
  return w;
}

// ---- kernel ----

struct FoldWork {
  FoldParams a, b;  // of one kp and one pitch
  int chunks;       // per row
  int a_warps, b_warps;
  bool words;  // each row's scales start at multiples of 4 bytes
};

// kAligned: all codes start at multiples of 8 bytes (rows are multiples of 16).
template <bool kAligned>
__global__ void __launch_bounds__(FoldTraits::kThreads, 2048 / FoldTraits::kThreads)
    fold_kernel(const FoldWork work, uint32_t* zero, int counters) {
  using T = FoldTraits;
  begin_early();
  const int lane = threadIdx.x % 32;
  int warp = blockIdx.x * (T::kThreads / 32) + threadIdx.x / 32;
  const bool second = warp >= work.a_warps;
  if (second) warp -= work.a_warps;
  if (second && warp >= work.b_warps) {
    const int i = (warp - work.b_warps) * 32 + lane;
    if (i < counters) zero[i] = 0;
    return;
  }
  const int row = warp / work.chunks, chunk = warp - row * work.chunks;
  const int kp = static_cast<int>(work.a.kp), blocks = kp / 32;
  const int k0 = chunk * T::kChunk + lane * T::kLaneElements;
  const int64_t at = static_cast<int64_t>(row) * kp + k0;
  const uint8_t* data = (second ? work.b.data : work.a.data) + at / 2;
  const uint8_t* scale = (second ? work.b.scale : work.a.scale) + at / 32;
  uint8_t* out = (second ? work.b.out : work.a.out) + row * work.a.pitch + k0;

  uint2 codes[T::kLoads];
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int k = (step * T::kLoads + i) * T::kStride;
      if (k0 + k < kp) codes[i] = load8<kAligned>(data + k / 2);
    }
  };
  load(0);
  const uint32_t largest = row_max(scale - k0 / 32, blocks, work.words, lane);
  if (chunk == 0 && lane == 0)
    (second ? work.b.row_scale : work.a.row_scale)[row] = static_cast<uint8_t>(largest);
#pragma unroll
  for (int step = 0; step < T::kSteps; ++step) {
    if (step > 0) load(step);
#pragma unroll
    for (int i = 0; i < T::kLoads; ++i) {
      const int k = (step * T::kLoads + i) * T::kStride;
      if (k0 + k >= kp) return;
      const uint2 table = fold_table(largest - __ldg(scale + k / 32));
      const uint2 low = fold8(codes[i].x, table), high = fold8(codes[i].y, table);
      *reinterpret_cast<uint4*>(out + k) = make_uint4(low.x, low.y, high.x, high.y);
    }
  }
}

struct ShiftWork {
  ShiftParams a, b;  // of one number of blocks
  bool words;        // each row's scales are whole words
};

// A warp a row.
__global__ void __launch_bounds__(FoldTraits::kThreads) shift_kernel(const ShiftWork work) {
  begin_early();
  const int lane = threadIdx.x % 32;
  int64_t row = static_cast<int64_t>(blockIdx.x) * (FoldTraits::kThreads / 32) + threadIdx.x / 32;
  const bool second = row >= work.a.rows;
  if (second) row -= work.a.rows;
  if (second && row >= work.b.rows) return;
  const int blocks = static_cast<int>(work.a.blocks), words = (blocks + 3) / 4;
  const uint8_t* scale = (second ? work.b.scale : work.a.scale) + row * blocks;
  uint32_t* shift = reinterpret_cast<uint32_t*>(second ? work.b.shift : work.a.shift) + row * words;
  const uint32_t largest = row_max(scale, blocks, work.words, lane);
  if (lane == 0)
    (second ? work.b.row_scale : work.a.row_scale)[row] = static_cast<uint8_t>(largest);
  for (int i = lane; i < words; i += 32) {
    uint32_t four = 0;
    if (work.words)
      four = __ldg(reinterpret_cast<const uint32_t*>(scale) + i);
    else
      for (int b = 0; b < 4; ++b)
        four |= (4 * i + b < blocks ? __ldg(scale + 4 * i + b) : largest) << (8 * b);
    shift[i] = largest * 0x01010101u - four;  // no byte borrows: none is above the largest
  }
}

// ---- launchers ----

cudaError_t launch_shifts(const ShiftParams& a, const ShiftParams& b, cudaStream_t stream) {
  const auto word = [](const uint8_t* p) { return reinterpret_cast<uintptr_t>(p) % 4 == 0; };
  const ShiftWork w = {a, b, word(a.scale) && word(b.scale) && a.blocks % 4 == 0};
  const int64_t rows = a.rows + b.rows;
  if (rows == 0) return cudaSuccess;
  constexpr int kWarps = FoldTraits::kThreads / 32;
  const unsigned grid = static_cast<unsigned>((rows + kWarps - 1) / kWarps);
  return launch_early(shift_kernel, grid, FoldTraits::kThreads, 0, stream, w);
}

cudaError_t launch_fold(const FoldParams& a, const FoldParams& b, uint32_t* zero, int counters,
                        cudaStream_t stream) {
  const auto aligned = [](const void* x, const void* y, int bytes) {
    return (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % bytes == 0;
  };
  FoldWork w = {a, b};
  w.chunks = static_cast<int>((a.kp + FoldTraits::kChunk - 1) / FoldTraits::kChunk);
  w.a_warps = static_cast<int>(a.rows) * w.chunks;
  w.b_warps = static_cast<int>(b.rows) * w.chunks;
  w.words = aligned(a.scale, b.scale, 4) && a.kp % 128 == 0;
  constexpr int kWarps = FoldTraits::kThreads / 32;
  const int64_t warps = int64_t{w.a_warps} + w.b_warps + ceil_div(counters, 32);
  if (warps == 0) return cudaSuccess;
  const unsigned grid = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  return launch_early(aligned(a.data, b.data, 8) ? fold_kernel<true> : fold_kernel<false>, grid,
                      FoldTraits::kThreads, 0, stream, w, zero, counters);
}

}  // namespace mxtrain::cuda
