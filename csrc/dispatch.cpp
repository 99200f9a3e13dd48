// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <string>

#include "cuda/quantize.h"

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

cudaStream_t stream_for(const char* op, const Tensor& t) {
  const int device = t.get_device_index();
  int major = 0, minor = 0;
  check_runtime(op, cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  check_runtime(op, cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
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

void check_launch(const char* op, cudaError_t error) {
  MXT_CHECK(error == cudaSuccess, op, "the kernel must launch, got ", cudaGetErrorName(error), " (",
            cudaGetErrorString(error), "; grid ", last_launch().grid, ", block ",
            last_launch().block, "). ", kAsynchronous);
}

}  // namespace mxtrain::cuda
