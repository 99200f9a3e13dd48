// SPDX-License-Identifier: Apache-2.0
// Which instantiation serves a product (host code).
#include "cuda/sm100/gemm.h"

#include "cuda/quantize.h"
#include "cuda/sm100/gemm_instances.h"

namespace mxtrain::cuda::sm100 {

cudaError_t launch_gemm(const GemmParams& p, Kind kind, Tile tile, cudaStream_t stream) {
  const bool pair = tile == Tile::kPair, e5m2 = kind == Kind::kMxfp8E5M2;
  const auto parts = [](int64_t work, int64_t of) { return (work + of - 1) / of; };
  // For check_launch: CUTLASS launches, a block of 256 threads for 128 rows of each tile.
  const int64_t blocks =
      pair ? 2 * parts(p.m, 256) * parts(p.n, 256) : parts(p.m, 128) * parts(p.n, 128);
  last_launch() = {static_cast<unsigned>(blocks), 256};
  switch (kind) {
    case Kind::kMxfp4:
      return pair ? gemm_mxfp4_pair(p, stream) : gemm_mxfp4_single(p, stream);
    case Kind::kNvfp4:
      return pair ? gemm_nvfp4_pair(p, stream) : gemm_nvfp4_single(p, stream);
    case Kind::kMxfp8E4M3:
    case Kind::kMxfp8E5M2:
      return pair ? gemm_mxfp8_pair(p, e5m2, stream) : gemm_mxfp8_single(p, e5m2, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxtrain::cuda::sm100
