// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <string>

#include "cuda/quantize.h"
#include "ops/ops.h"
#ifdef MXT_HAVE_SM90
#include "cuda/sm90/gemm_e5m2.h"
#include "cuda/sm90/gemm_int8.h"
#endif

namespace mxtrain::cuda {

// "90a;120a" -> is there code for compute capability major.minor? Code for 80 also runs on 86 and
// 89: same major, not older, unless it is architecture-specific (suffix a) or family-specific (f).
static bool built_for(int major, int minor) {
  const std::string archs = MXT_CUDA_ARCHS;
  size_t begin = 0;
  while (begin < archs.size()) {
    size_t end = archs.find(';', begin);
    if (end == std::string::npos) end = archs.size();
    const std::string arch = archs.substr(begin, end - begin);
    const int number = std::atoi(arch.c_str()), have_major = number / 10, have_minor = number % 10;
    const char suffix = arch.empty() ? ' ' : arch.back();
    if (have_major == major && (suffix == 'a' ? have_minor == minor : have_minor <= minor))
      return true;
    begin = end + 1;
  }
  return false;
}

static const char* kAsynchronous =
    "An earlier asynchronous error shows here too: run again with CUDA_LAUNCH_BLOCKING=1.";

static void check_runtime(const char* op, cudaError_t error) {
  MXT_CHECK(error == cudaSuccess, op, "the CUDA runtime must answer, got ", cudaGetErrorName(error),
            " (", cudaGetErrorString(error), "). ", kAsynchronous);
}

struct Capability {
  int major = 0, minor = 0;
};

static Capability capability_of(const char* op, int device) {
  Capability c;
  check_runtime(op, cudaDeviceGetAttribute(&c.major, cudaDevAttrComputeCapabilityMajor, device));
  check_runtime(op, cudaDeviceGetAttribute(&c.minor, cudaDevAttrComputeCapabilityMinor, device));
  return c;
}

cudaStream_t stream_for(const char* op, const Tensor& t) {
  const int device = t.get_device_index();
  const auto [major, minor] = capability_of(op, device);
  MXT_CHECK(built_for(major, minor), op,
            "the GPU must be one this build has kernels for, got compute capability ", major, ".",
            minor, " (this build has: ", MXT_CUDA_ARCHS,
            "). Rebuild with MXTRAIN_CUDA_ARCHS=native.");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

LaunchShape& last_launch() {
  thread_local LaunchShape shape = {};
  return shape;
}

GemmChoice best_gemm_backend(int major, int minor, int64_t format) {
  if (format != kMxfp4Code) return {GemmBackend::kDequant, "decode to BF16, cuBLAS"};
  if (major != 9 || minor != 0)
    return {GemmBackend::kDequant, "decode to BF16, cuBLAS; fold needs compute capability 9.0"};
#ifdef MXT_HAVE_SM90
  return {GemmBackend::kFold, "exact folding into E5M2, FP8 tensor cores"};
#else
  return {GemmBackend::kDequant, "decode to BF16, cuBLAS; fold needs a build with 90a"};
#endif
}

GemmBackend gemm_backend_for(const char* op, const Tensor& t, int64_t format) {
  const auto [major, minor] = capability_of(op, t.get_device_index());
  const GemmChoice best = best_gemm_backend(major, minor, format);
  const GemmBackend asked = requested_gemm_backend();
  if (asked == GemmBackend::kAuto || asked == best.backend) return best.backend;
  MXT_CHECK(asked == GemmBackend::kDequant, op, "the GEMM backend must be one that serves format ",
            kFormats[format].name, " here, got fold (compute capability ", major, ".", minor,
            ", this build has: ", MXT_CUDA_ARCHS,
            "). Use mxtrain.set_gemm_backend(\"auto\"); fold is mxfp4 on 9.0, "
            "built for 90a.");
  return asked;
}

cudaError_t run_folded_gemm(const FoldedGemmParams& p, cudaStream_t stream) {
#ifdef MXT_HAVE_SM90
  return sm90::launch_folded_gemm(p, stream);
#else
  return cudaErrorNotSupported;
#endif
}

static bool int8_on_sm90(int major, int minor) {
  const char* asked = std::getenv("MXTRAIN_INT8_GEMM");
  if (asked && std::string(asked) == "portable") return false;
#ifdef MXT_HAVE_SM90
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

const char* int8_gemm_backend(int major, int minor) {
  return int8_on_sm90(major, minor) ? "sm90: wgmma, integer tensor cores"
                                    : "portable: mma.sync, integer tensor cores";
}

cudaError_t run_int8_gemm(const char* op, const Tensor& t, const Int8GemmParams& p,
                          cudaStream_t stream) {
  const auto [major, minor] = capability_of(op, t.get_device_index());
#ifdef MXT_HAVE_SM90
  if (int8_on_sm90(major, minor)) return sm90::launch_int8_gemm(p, stream);
#endif
  return launch_int8_gemm(p, stream);
}

void check_launch(const char* op, cudaError_t error) {
  MXT_CHECK(error == cudaSuccess, op, "the kernel must launch, got ", cudaGetErrorName(error), " (",
            cudaGetErrorString(error), "; grid ", last_launch().grid, ", block ",
            last_launch().block, "). ", kAsynchronous);
}

}  // namespace mxtrain::cuda

// Not an op: what mxtrain.env prints of int8_gemm.
extern "C" __attribute__((visibility("default"))) const char* mxtrain_int8_gemm_backend(int major,
                                                                                        int minor) {
  return mxtrain::cuda::int8_gemm_backend(major, minor);
}

// Not an op: what mxtrain.env prints, "fold: exact folding ...".
extern "C" __attribute__((visibility("default"))) const char* mxtrain_gemm_backend(int major,
                                                                                   int minor,
                                                                                   int format) {
  thread_local std::string text;
  const mxtrain::cuda::GemmChoice choice = mxtrain::cuda::best_gemm_backend(major, minor, format);
  text =
      std::string(mxtrain::kGemmBackendNames[static_cast<int>(choice.backend)]) + ": " + choice.why;
  return text.c_str();
}
