// SPDX-License-Identifier: Apache-2.0
// The product of gemm_e5m2.cu from packed mxfp4 operands, which are unpacked on their way to the
// tensor cores: no E5M2 copy of them in memory.
//   shift[r, b] = row_scale[r] - scale[r, b]     by cuda/fold.cu; an eighth of the codes' bytes
//   stage[r, k] = E5M2(element[r, k] * 2^(13 - shift[r, k / 32]))       as TMA would lay it
// The first warpgroup keeps both rings filled. One of its threads has the copy engine load packed
// stages (64 bytes of each row of the tile); all unpack them: a thread takes every 128th row,
// 64 bytes of codes and four shifts at a time, looks the codes up in a table of E5M2 bytes and
// stores 128 bytes. gemm_consumer.cuh has the rest. The same operands give the bytes that
// gemm_e5m2.cu gives.
#include "cuda/fold.cuh"
#include "cuda/sm90/gemm_consumer.cuh"
#include "cuda/sm90/gemm_e5m2.h"
#include "cuda/sm90/gemm_launch.h"

namespace mxtrain::cuda::sm90 {

// ---- traits ----

// As GemmTraits, and a ring of packed stages: those of A, those of B, their barriers.
template <int kParts, int kChunk>
using UnpackedTraits = GemmTraits<kParts, 1, kChunk, kParts == 2 ? 2 : 3, kChunk == 32 ? 80 : 64>;

template <int kParts, int kChunk>
struct PackedTraits : UnpackedTraits<kParts, kChunk> {
  using Base = UnpackedTraits<kParts, kChunk>;
  static constexpr int kRows = Base::kTileM + Base::kTileN;  // of a stage
  static constexpr int kRowBytes = Base::kTileK / 2, kRowBlocks = Base::kTileK / 32;
  static constexpr int kThreadRows = kRows / 128;  // that a thread unpacks
  static_assert(kRowBytes == 64, "the 64-byte swizzle; four 16-byte blocks with four shifts");
  static_assert(Base::kTileM == 128 && kRows % 128 == 0, "a thread's first row is of A");

  static constexpr int kPacked = kParts == 2 ? 4 : 6;  // packed stages
  static constexpr int kPackedBytes = kRows * kRowBytes;
  static constexpr int kOffsetPacked = (Base::kSharedBytes + 1023) / 1024 * 1024;
  static constexpr int kOffsetPackedFull = kOffsetPacked + kPacked * kPackedBytes;
  static constexpr int kOffsetPackedEmpty = kOffsetPackedFull + kPacked * 8;
  static constexpr int kSharedBytes = kOffsetPackedEmpty + kPacked * 8;
  static_assert(kSharedBytes <= 227 * 1024, "the shared memory of a block");
};

// Where a thread is in the ring of packed stages.
template <class T>
struct PackedPosition {
  uint32_t shared, parity = 0;
  int stage = 0;

  __device__ __forceinline__ explicit PackedPosition(uint32_t shared) : shared(shared) {}
  __device__ __forceinline__ uint32_t data() const {
    return shared + T::kOffsetPacked + stage * T::kPackedBytes;
  }
  __device__ __forceinline__ uint32_t full() const {
    return shared + T::kOffsetPackedFull + stage * 8;
  }
  __device__ __forceinline__ uint32_t empty() const {
    return shared + T::kOffsetPackedEmpty + stage * 8;
  }
  __device__ __forceinline__ void advance() {
    if (++stage == T::kPacked) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// ---- the producers ----

// Which stage of which of this block's tiles.
struct StagePosition {
  int tile = blockIdx.x, block = 0;

  __device__ __forceinline__ bool done(const KernelArgs& args) const {
    return tile >= args.order.count();
  }
  __device__ __forceinline__ void advance(const KernelArgs& args) {
    if (++block < args.k_blocks) return;
    block = 0;
    tile += gridDim.x;
  }
};

// Asks for the packed stage at `at`; one thread.
template <class T>
__device__ __forceinline__ void load_packed(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                            const KernelArgs& args, const PackedPosition<T>& ring,
                                            const StagePosition& at) {
  ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
  ptx::mbarrier_arrive_expect_tx(ring.full(), T::kPackedBytes);
  int m, n;
  args.order.at(at.tile, m, n);
  const int k = at.block * T::kRowBytes;
  ptx::cp_async_bulk_tensor_2d_load(ring.data(), &map_a, k, m * T::kTileM, ring.full());
  ptx::cp_async_bulk_tensor_2d_load(ring.data() + T::kTileM * T::kRowBytes, &map_b, k,
                                    n * T::kTileN, ring.full());
}

// The four shifts of each of this thread's rows of the stage at `at`.
template <class T>
__device__ __forceinline__ void load_shifts(const KernelArgs& args, const StagePosition& at,
                                            uint32_t (&shifts)[T::kThreadRows]) {
  int m, n;
  args.order.at(at.tile, m, n);
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) {
    const int64_t row = threadIdx.x + (i == 0 ? m * T::kTileM : n * T::kTileN + (i - 1) * 128);
    const uint32_t* p = (i == 0 ? args.a_shift : args.b_shift) + row * args.k_blocks + at.block;
    shifts[i] = row < (i == 0 ? args.p.m : args.p.n) ? __ldg(p) : 0;
  }
}

// This thread's rows of a stage: `packed` to `unpacked`, its first row of A, then of B.
template <class T>
__device__ __forceinline__ void unpack_stage(uint32_t packed, uint32_t unpacked_a,
                                             uint32_t unpacked_b,
                                             const uint32_t (&shifts)[T::kThreadRows]) {
  const int row = threadIdx.x;
#pragma unroll
  for (int i = 0; i < T::kThreadRows; ++i) {
    const uint32_t from = packed + (i * 128 + row) * T::kRowBytes;
    const uint32_t to =
        (i == 0 ? unpacked_a : unpacked_b + (i - 1) * 128 * T::kTileK) + row * T::kTileK;
    uint4 codes[2];  // one in flight while the other is unpacked
    codes[0] = ptx::ld_shared_v4(from + (row / 2 % 4) * 16);
#pragma unroll
    for (int b = 0; b < T::kRowBlocks; ++b) {
      if (b + 1 < T::kRowBlocks)
        codes[(b + 1) % 2] = ptx::ld_shared_v4(from + ((b + 1) ^ (row / 2 % 4)) * 16);
      const uint4 c = codes[b % 2];
      const uint2 table = fold_table(shifts[i] >> (8 * b) & 0xFF);
      const uint2 q0 = fold8(c.x, table), q1 = fold8(c.y, table), q2 = fold8(c.z, table),
                  q3 = fold8(c.w, table);
      ptx::st_shared_v4(to + ((2 * b) ^ (row % 8)) * 16, q0.x, q0.y, q1.x, q1.y);
      ptx::st_shared_v4(to + ((2 * b + 1) ^ (row % 8)) * 16, q2.x, q2.y, q3.x, q3.y);
    }
  }
}

template <class T>
__device__ __forceinline__ void unpack(const CUtensorMap& map_a, const CUtensorMap& map_b,
                                       const KernelArgs& args, uint32_t shared) {
  const bool loads = threadIdx.x == 0;
  const int lane = threadIdx.x % 32;
  StagePosition at, ahead;  // what is unpacked, and what is asked for
  PackedPosition<T> packed(shared), asked(shared);
  RingPosition<T> ring(shared);
  const auto ask = [&] {
    if (ahead.done(args)) return;
    if (loads) load_packed<T>(map_a, map_b, args, asked, ahead);
    asked.advance();
    ahead.advance(args);
  };
#pragma unroll 1
  for (int i = 0; i < T::kPacked - 1; ++i) ask();
  uint32_t shifts[T::kThreadRows];
  load_shifts<T>(args, at, shifts);
  while (!at.done(args)) {
    ask();  // into the stage that was unpacked last
    __syncwarp();
    uint32_t next[T::kThreadRows] = {};
    at.advance(args);
    if (!at.done(args)) load_shifts<T>(args, at, next);
    ptx::mbarrier_wait(packed.full(), packed.parity);
    ptx::mbarrier_wait(ring.empty(), ring.parity ^ 1);
    unpack_stage<T>(packed.data(), ring.a(), ring.b(), shifts);
    ptx::fence_proxy_async_shared();  // wgmma reads shared memory as the copy engine does
    __syncwarp();
    if (lane == 0) {
      ptx::mbarrier_arrive(ring.full());
      ptx::mbarrier_arrive(packed.empty());
    }
    packed.advance();
    ring.advance();
#pragma unroll
    for (int i = 0; i < T::kThreadRows; ++i) shifts[i] = next[i];
  }
}

// ---- the kernel ----

template <class T, FloatType kType>
__global__ void __launch_bounds__(T::kThreads, 1)
    packed_gemm_kernel(const __grid_constant__ CUtensorMap map_a,
                       const __grid_constant__ CUtensorMap map_b,
                       const __grid_constant__ CUtensorMap map_out,
                       const __grid_constant__ KernelArgs args) {
  extern __shared__ __align__(1024) uint8_t memory[];
  const uint32_t shared = ptx::shared_address(memory);
  if (threadIdx.x == 0) {
    init_ring<T>(shared, 4);  // producing warps
    for (int stage = 0; stage < T::kPacked; ++stage) {
      ptx::mbarrier_init(shared + T::kOffsetPackedFull + stage * 8, 1);
      ptx::mbarrier_init(shared + T::kOffsetPackedEmpty + stage * 8, 4);
    }
    ptx::fence_mbarrier_init();
    ptx::prefetch_tensormap(&map_a);
    ptx::prefetch_tensormap(&map_b);
    if (args.boxes) ptx::prefetch_tensormap(&map_out);
  }
  __syncthreads();
  ptx::griddepcontrol_wait();  // the shifts and row scales are there
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<T::kProducerRegisters>();
    unpack<T>(map_a, map_b, args, shared);
  } else {
    ptx::setmaxnreg_inc<T::kConsumerRegisters>();
    consume<T, kType>(map_out, args, shared, 0);
  }
}

// ---- launcher ----

template <class T, FloatType kType>
static cudaError_t launch(const PackedGemmParams& p, int multiprocessors, cudaStream_t stream) {
  const FoldedGemmParams& g = p.product;
  CUtensorMap map_a, map_b, map_out = {};
  KernelArgs args = {};
  cudaError_t error = make_tensor_map(&map_a, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.a, g.m, g.k / 2,
                                      g.k / 2, T::kTileM, T::kRowBytes);
  if (error == cudaSuccess)
    error = make_tensor_map(&map_b, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, g.b, g.n, g.k / 2, g.k / 2,
                            T::kTileN, T::kRowBytes);
  if (error == cudaSuccess) error = make_arguments<T>(g, &args, &map_out);
  if (error != cudaSuccess) return error;
  args.a_shift = reinterpret_cast<const uint32_t*>(p.a_shift);
  args.b_shift = reinterpret_cast<const uint32_t*>(p.b_shift);
  return launch_persistent<T>(packed_gemm_kernel<T, kType>, args.order.count(), multiprocessors,
                              stream, map_a, map_b, map_out, args);
}

// The large tile, unless the small one needs fewer rounds over the multiprocessors; two small ones
// take the time of a large one and a little more. Chunks of 32 and a float32 D take registers that
// the large tile does not leave.
template <int kChunk, FloatType kType>
static cudaError_t launch_tile(const PackedGemmParams& p, int multiprocessors,
                               cudaStream_t stream) {
  if constexpr (kChunk != 32 && kType != FloatType::kFloat32) {
    const int64_t rows = ceil_div(p.product.m, 128);
    const int64_t large = rows * ceil_div(p.product.n, 256),
                  small = rows * ceil_div(p.product.n, 128);
    if (ceil_div(large, multiprocessors) * 1.7 <= ceil_div(small, multiprocessors))
      return launch<PackedTraits<2, kChunk>, kType>(p, multiprocessors, stream);
  }
  return launch<PackedTraits<1, kChunk>, kType>(p, multiprocessors, stream);
}

template <int kChunk>
static cudaError_t launch_chunk(const PackedGemmParams& p, int multiprocessors,
                                cudaStream_t stream) {
  switch (p.product.out_type) {
    case FloatType::kFloat32:
      return launch_tile<kChunk, FloatType::kFloat32>(p, multiprocessors, stream);
    case FloatType::kBfloat16:
      return launch_tile<kChunk, FloatType::kBfloat16>(p, multiprocessors, stream);
    case FloatType::kFloat16:
      return launch_tile<kChunk, FloatType::kFloat16>(p, multiprocessors, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t launch_packed_gemm(const PackedGemmParams& p, cudaStream_t stream) {
  if (p.product.m == 0 || p.product.n == 0) return cudaSuccess;
  int multiprocessors = 0;
  const cudaError_t error = count_multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  switch (p.product.accumulate) {
    case Accumulate::kExact:
      return launch_chunk<32>(p, multiprocessors, stream);
    case Accumulate::kFast:
      return launch_chunk<0>(p, multiprocessors, stream);
    case Accumulate::kFp32:
      break;
  }
  return launch_chunk<128>(p, multiprocessors, stream);
}

}  // namespace mxtrain::cuda::sm90
