// SPDX-License-Identifier: Apache-2.0
// csrc/dispatch.cpp with a runtime that answers for any GPU, and for any architectures of the
// build: program "90a;120a" 12 1 prints what stream_for says of a GPU of 12.1, nothing where it
// takes it.
#include <cstdio>
#include <cstdlib>
#include <string>

static std::string g_archs;
static int g_major, g_minor;

#define MXT_CUDA_ARCHS g_archs
#include "dispatch.cpp"

extern "C" {
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? g_major : g_minor;
  return cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return ""; }
const char* cudaGetErrorString(cudaError_t) { return ""; }
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle, int32_t* index) {
  *index = 0;
  return 0;
}
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle) { return 0; }
}

namespace mxtrain {
GemmBackend requested_gemm_backend() { return GemmBackend::kAuto; }
namespace cuda {
cudaError_t launch_int8_gemm(const Int8GemmParams&, cudaStream_t) { return cudaSuccess; }
}  // namespace cuda
}  // namespace mxtrain

int main(int, char** argv) {
  g_archs = argv[1];
  g_major = std::atoi(argv[2]);
  g_minor = std::atoi(argv[3]);
  try {
    mxtrain::cuda::stream_for("quantize", mxtrain::Tensor(AtenTensorHandle{}));
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
}
