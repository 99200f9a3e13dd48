// SPDX-License-Identifier: Apache-2.0
// csrc/dispatch.h for the emulation (csrc/emulation/emulation.h): the kernels that it has serve, as
// on a GPU of 9.0 without wgmma.
#include "dispatch.h"

#include "cuda/sm89/gemm_e5m2.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

namespace sm100 {
cudaError_t emulated_gemm(const GemmParams& p, int64_t format, Tile tile);  // sm100_product.cpp
}

cudaStream_t stream_for(const char*, const Tensor&) { return nullptr; }

LaunchShape& last_launch() {
  thread_local LaunchShape shape = {};
  return shape;
}

// As asked; what is not emulated gives way to what decodes to BF16.
GemmBackend gemm_backend_for(const char*, const Tensor&, int64_t format) {
  const GemmBackend asked = requested_gemm_backend();
  const bool fold = asked == GemmBackend::kFold || asked == GemmBackend::kFoldMma;
  if (fold && format == kMxfp4Code) return GemmBackend::kFoldMma;
  const bool block_scaled = kFormats[format].bits != 6;
  if (asked == GemmBackend::kSm100 && block_scaled) return asked;
  return asked == GemmBackend::kSm120Emulated ? asked : GemmBackend::kDequant;
}

cudaError_t run_folded_gemm(const FoldedGemmParams& p, GemmBackend, cudaStream_t stream) {
  return sm89::launch_folded_gemm(p, stream);
}

SplitScratch plan_folded_gemm(FoldedGemmParams* p, GemmBackend) {
  p->split = {};
  p->overlap = false;
  return {};
}

cudaError_t run_block_scaled_gemm(const sm120::BlockScaledGemmParams& p, int64_t format,
                                  cudaStream_t stream) {
  const FormatInfo& f = kFormats[format];
  if (f.bits == 4)
    return f.e4m3_scale ? sm120::launch_gemm_nvfp4(p, stream) : sm120::launch_gemm_mxfp4(p, stream);
  return f.man_bits == 3 ? sm120::launch_gemm_mxfp8_e4m3(p, stream)
                         : sm120::launch_gemm_mxfp8_e5m2(p, stream);
}

cudaError_t run_packed_gemm(const PackedGemmParams&, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t run_sm100_gemm(const sm100::GemmParams& p, int64_t format, sm100::Tile tile,
                           cudaStream_t) {
  return sm100::emulated_gemm(p, format, tile);
}
// Of a GPU of two multiprocessors.
sm100::Tile sm100_tile(const char*, const Tensor&, int64_t m, int64_t n, bool bfloat16_out) {
  const bool pair = bfloat16_out && sm100::prefer_pair(m, n, 2);
  return pair ? sm100::Tile::kPair : sm100::Tile::kSingle;
}

cudaError_t run_int8_gemm(const char*, const Tensor&, const Int8GemmParams& p,
                          cudaStream_t stream) {
  return launch_int8_gemm(p, stream);
}

void check_launch(const char* op, cudaError_t error) {
  MXT_CHECK(error == cudaSuccess, op, "the emulated kernel must run, got ",
            cudaGetErrorString(error), " (", cudaGetErrorName(error), "; grid ", last_launch().grid,
            ", block ", last_launch().block, "). See docs/emulation.md.");
}

}  // namespace mxtrain::cuda
