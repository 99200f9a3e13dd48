// SPDX-License-Identifier: Apache-2.0
// quantize across rows, nearest, bfloat16 to mxfp4: the fast path, on packed bfloat16 pairs. A lane
// takes a block of 32 of two neighbouring columns of x, as words that it loads from 32 rows: a
// warp's load is 128 bytes of a row of x, 32 of them are on their way at once, and maxima, scales
// and codes need no other lane. The CTA's 8 warps take 8 blocks one below the other. Codes and
// scales pass through shared memory, so that they leave as whole lines of 128 bytes and as runs of
// 8 scales. Zero, NaN and Inf blocks: see docs/numerics.md.
#include "cuda/group.cuh"
#include "cuda/launch.cuh"

namespace mxtrain::cuda {

namespace {

// ---- traits ----

struct PairTraits {
  static constexpr int kBlocks = 8;    // of an operand row, one a warp
  static constexpr int kColumns = 64;  // of x, two a lane: operand rows
  static constexpr int kThreads = 32 * kBlocks, kTileK = 32 * kBlocks;
  static constexpr int kCtas = 4;  // of an SM: 64 registers; 128 KiB of loads at most
  static constexpr int kRowStep = kThreads / kBlocks;
};

// x as the kernel sees it: rows `pitch` bytes apart.
struct PairGrid {
  const uint8_t* x;
  uint32_t rows, cols, kp, pitch;
};

// ---- device helpers ----

// What a CTA writes. The codes of block b of row r lie at b ^ r / 2 % 8: lanes that write rows two
// apart, and lanes that read the blocks of a row, touch every bank once.
struct PairTile {
  uint4 codes[PairTraits::kColumns][PairTraits::kBlocks];
  uint16_t scales[PairTraits::kBlocks][PairTraits::kColumns / 2 + 2];  // of two rows each

  __device__ __forceinline__ uint4& codes_at(int r, int b) {
    return codes[r][b ^ (r / 2 % PairTraits::kBlocks)];
  }
  __device__ __forceinline__ uint8_t scale_at(int r, int b) const {
    return static_cast<uint8_t>(scales[b][r / 2] >> (8 * (r % 2)));
  }
};

// 32 rows of two columns, zeros outside of x. `whole`: nothing is outside.
__device__ __forceinline__ void load_block(const PairGrid& g, uint32_t k, uint32_t column,
                                           bool whole, uint32_t (&x2)[32]) {
  const uint8_t* from = g.x + (static_cast<uint64_t>(k) * g.pitch + column * 2);
  if (whole) {
#pragma unroll
    for (int i = 0; i < 32; ++i)
      x2[i] = ptx::ld_global_nc_b32(from + static_cast<uint64_t>(i) * g.pitch);
    return;
  }
  const uint32_t inside = k < g.cols && column < g.rows ? g.cols - k : 0;
  from = inside ? from : g.x;
#pragma unroll
  for (uint32_t i = 0; i < 32; ++i) {
    x2[i] = ptx::ld_global_nc_b32(from);
    x2[i] = i < inside ? x2[i] : 0;
    from += i + 1 < inside ? g.pitch : 0;
  }
}

// 8 lanes write the 8 blocks of an operand row.
__device__ __forceinline__ void store_tile(PairTile& tile, const QuantizeParams& p,
                                           const PairGrid& g, uint32_t row, uint32_t k) {
  const uint32_t b = threadIdx.x % PairTraits::kBlocks, first = threadIdx.x / PairTraits::kBlocks;
  const uint32_t blocks = g.kp / 32;
  k += b * 32;
  uint64_t to = static_cast<uint64_t>(row + first) * blocks + k / 32;
#pragma unroll
  for (uint32_t r = first; r < PairTraits::kColumns; r += PairTraits::kRowStep) {
    if (k < g.kp && row + r < g.rows) {
      reinterpret_cast<uint4*>(p.data)[to] = tile.codes_at(r, b);
      *(p.swizzled ? scale_at<Mxfp4>(p, row + r, k) : p.scale + to) = tile.scale_at(r, b);
    }
    to += static_cast<uint64_t>(PairTraits::kRowStep) * blocks;
  }
}

// ---- kernel ----

// grid: tiles of 64 columns along x's rows, so that CTAs that run together read neighbouring
// memory; tiles of 256 rows. kFits: no scale leaves an element beyond the largest code.
template <bool kFits>
__global__ void __launch_bounds__(PairTraits::kThreads, PairTraits::kCtas)
    quantize_pairs_kernel(const QuantizeParams p, const PairGrid g) {
  __shared__ PairTile tile;
  begin_early();
  const uint32_t row = blockIdx.x * PairTraits::kColumns, k = blockIdx.y * PairTraits::kTileK;
  const int block = threadIdx.x / 32, column = threadIdx.x % 32 * 2;
  const bool whole = k + PairTraits::kTileK <= g.cols && row + PairTraits::kColumns <= g.rows;
  uint32_t x2[32];
  load_block(g, k + block * 32, row + column, whole, x2);
  const ScaleChooser<Mxfp4> scales(p);
  BlockScale s[2];
  uint4 codes[2];
  quantize_two_blocks<kFits>(x2, scales, s, codes);
  tile.codes_at(column, block) = codes[0];
  tile.codes_at(column + 1, block) = codes[1];
  tile.scales[block][column / 2] = static_cast<uint16_t>(s[0].code | s[1].code << 8);
  __syncthreads();
  store_tile(tile, p, g, row, k);
}

}  // namespace

// ---- launchers ----

bool can_pair_columns(const QuantizeParams& p) {
  constexpr int64_t kMostRows = 0x7FFFFFFF, kMostK = int64_t{65535} * PairTraits::kTileK;
  return p.in_format < 0 && p.x_type == FloatType::kBfloat16 && p.format == kMxfp4Code &&
         choose_path<Bfloat16Source, Mxfp4>(p) == Path::kPairs && p.stride_row == 1 &&
         p.rows % 2 == 0 && p.rows < kMostRows && p.kp <= kMostK &&
         reinterpret_cast<uintptr_t>(p.x) % 4 == 0 &&
         (p.cols == 1 || (p.stride_k % 2 == 0 && p.stride_k < 0x3FFFFFFF));
}

cudaError_t launch_column_pairs(const QuantizeParams& p, cudaStream_t stream) {
  const auto narrow = [](int64_t n) { return static_cast<uint32_t>(n); };
  const PairGrid g = {static_cast<const uint8_t*>(p.x), narrow(p.rows), narrow(p.cols),
                      narrow(p.kp), narrow(p.cols == 1 ? 0 : p.stride_k * 2)};
  const dim3 grid(narrow((p.rows + PairTraits::kColumns - 1) / PairTraits::kColumns),
                  narrow((p.kp + PairTraits::kTileK - 1) / PairTraits::kTileK));
  const bool fits = p.scale_rule == static_cast<int>(ScaleRule::kCeil);
  return launch_early(fits ? quantize_pairs_kernel<true> : quantize_pairs_kernel<false>, grid,
                      PairTraits::kThreads, 0, stream, p, g);
}

}  // namespace mxtrain::cuda
