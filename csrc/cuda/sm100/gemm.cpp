// SPDX-License-Identifier: Apache-2.0
// Which instantiation serves a product (host code).
#include "cuda/sm100/gemm.h"

#include "cuda/sm100/gemm_instances.h"

namespace mxtrain::cuda::sm100 {

static int64_t rounds(int64_t work, int64_t places) { return (work + places - 1) / places; }

// A pair of multiprocessors takes a 256 x 256 tile while two singles take a 128 x 128 one each, half
// the work. Not measured: a single is taken to need 1.2 times the time an element, because its tile
// reads twice the operand bytes, and a pass that rounds its float32 result.
bool prefer_pair(int64_t m, int64_t n, int multiprocessors) {
  const int64_t pair = rounds(rounds(m, 256) * rounds(n, 256), multiprocessors / 2);
  const int64_t single = rounds(rounds(m, 128) * rounds(n, 128), multiprocessors);
  return pair * 20 <= single * 12;
}

cudaError_t launch_gemm(const GemmParams& p, Kind kind, Tile tile, cudaStream_t stream) {
  const bool pair = tile == Tile::kPair, e5m2 = kind == Kind::kMxfp8E5M2;
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
