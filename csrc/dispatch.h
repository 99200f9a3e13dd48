// SPDX-License-Identifier: Apache-2.0
// Compute capability -> launcher: the only place that decides by architecture. The portable kernels
// serve every architecture they were built for; what needs one architecture's instructions gets a
// row of its own here.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "check.h"
#include "cuda/fold.h"
#include "cuda/int8.h"
#include "cuda/sm100/gemm.h"
#include "cuda/sm120/gemm_block_scale.h"

// The CPU wheel of torch lacks these three shims; weak, they let a CUDA build load there (and are
// never called there).
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
__attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*, const char*,
                                                              uint32_t, bool, char**);
__attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);
}

namespace mxtrain::cuda {

// The current stream of t's device, after checking that the portable kernels were built for that
// device.
cudaStream_t stream_for(const char* op, const Tensor& t);

// Which backend gemm takes for operands of this format on a GPU of this compute capability, and
// why.
struct GemmChoice {
  GemmBackend backend;
  std::string why;
};
GemmChoice best_gemm_backend(int major, int minor, int64_t format);

// The same for t's device, unless mxtrain_set_gemm_backend named another; kFoldMma, where that is
// what fold is on the device.
GemmBackend gemm_backend_for(const char* op, const Tensor& t, int64_t format);

// The product of two folded operands by kFold or kFoldMma, as gemm_backend_for has it, and of two
// packed ones, on the current device. plan_folded_gemm comes first: it sets p's split and overlap
// from the rest of p, and returns what p's partial and arrived must point to. To compare, the
// environment variable MXTRAIN_SPLIT_K = "0" keeps K whole, and MXTRAIN_GEMM_OVERLAP = "0" tiles
// one after the other.
cudaError_t run_folded_gemm(const FoldedGemmParams& p, GemmBackend backend, cudaStream_t stream);
SplitScratch plan_folded_gemm(FoldedGemmParams* p, GemmBackend backend);
cudaError_t run_packed_gemm(const PackedGemmParams& p, cudaStream_t stream);

// The product of two operands of a format as they are stored, by kSm120 or kSm120Emulated.
cudaError_t run_block_scaled_gemm(const sm120::BlockScaledGemmParams& p, int64_t format,
                                  cudaStream_t stream);

// The same by kSm100, for operands as sm100::GemmParams has them; and its tile, for t's device.
cudaError_t run_sm100_gemm(const sm100::GemmParams& p, int64_t format, sm100::Tile tile,
                           cudaStream_t stream);
sm100::Tile sm100_tile(const char* op, const Tensor& t, int64_t m, int64_t n, bool bfloat16_out);

// int8_gemm for t's device, which is current: the kernel of its architecture, or the portable one
// where there is none or the environment variable MXTRAIN_INT8_GEMM is "portable".
cudaError_t run_int8_gemm(const char* op, const Tensor& t, const Int8GemmParams& p,
                          cudaStream_t stream);
const char* int8_gemm_backend(int major, int minor);

// Turns a launch error into an exception that names the op.
void check_launch(const char* op, cudaError_t error);

}  // namespace mxtrain::cuda
