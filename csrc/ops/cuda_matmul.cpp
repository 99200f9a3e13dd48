// SPDX-License-Identifier: Apache-2.0
// torch's own product with a bfloat16 result may split K and add the parts in bfloat16 (its
// allow_bf16_reduced_precision_reduction, on by default), so cuBLAS is called here, with its
// CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION (cuBLAS documentation, cublasMath_t). That is
// the cuBLAS which torch has loaded, its functions found by name: a library that was built without
// CUDA's, or runs with a torch without it, still loads.
#include "ops/cuda_matmul.h"

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <cstdint>
#include <type_traits>

namespace mxtrain::cuda {

// aten::mm.dtype_out: bfloat16 in, float32 out; unlike mm it is not one of the operators that
// autocast lowers.
void matmul_float32(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const Tensor bt = torch::stable::transpose(b, 0, 1);
  std::array<StableIValue, 4> stack = {from(a), from(bt), from(ScalarType::Float), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference back
}

// ---- cuBLAS, as cublas_api.h and library_types.h declare it ----

struct Cublas {
  using Handle = void*;
  // cublasStatus_t, cublasOperation_t, cudaDataType_t, cublasComputeType_t, cublasGemmAlgo_t,
  // cublasMath_t
  static constexpr int kSuccess = 0, kInvalidValue = 7, kNotSupported = 15, kNormal = 0,
                       kTransposed = 1, kBfloat16 = 14, kComputeFloat32 = 68, kAnyAlgorithm = -1,
                       kNoReducedReduction = 16;

  AOTITorchError (*get_handle)(Handle*);  // torch's
  int (*get_mode)(Handle, int*);
  int (*set_mode)(Handle, int);
  int (*multiply)(Handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a,
                  int a_type, int lda, const void* b, int b_type, int ldb, const void* beta,
                  void* c, int c_type, int ldc, int compute, int algorithm);

  bool found() const { return get_handle && get_mode && set_mode && multiply; }
};

static const Cublas& cublas() {
  static const Cublas found = [] {
    Cublas c = {};
    // torch's CUDA side, if it is there: what it needs is looked through with it, and nothing else.
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch_cuda == nullptr) return c;
    const auto find = [&](auto& function, const char* name) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(torch_cuda, name));
    };
    find(c.get_handle, "torch_get_current_cuda_blas_handle");
    find(c.get_mode, "cublasGetMathMode");
    find(c.set_mode, "cublasSetMathMode");
    find(c.multiply, "cublasGemmEx");
    return c;
  }();
  return found;
}

bool matmul_bfloat16(const char* op, Tensor& out, const Tensor& a, const Tensor& b, float alpha) {
  constexpr int64_t kMost = INT32_MAX;
  const int64_t m = a.size(0), n = b.size(0), k = a.size(1);
  const bool fits = m <= kMost && n <= kMost && k <= kMost;
  // A product by 0, or of no columns, may leave A and B, and so a NaN there, unread. Rows of the
  // result that are no whole 16 bytes leave by a slow kernel: float32 sums and an epilogue take
  // less time then.
  if (!fits || n % 8 != 0 || k == 0 || alpha == 0.0f) return false;
  if (!out.is_cuda() || !cublas().found()) return false;  // the first where kernels are emulated
  void* handle = nullptr;  // of the current device, on its current stream
  TORCH_ERROR_CODE_CHECK(cublas().get_handle(&handle));
  int mode = 0;
  if (cublas().get_mode(handle, &mode) != Cublas::kSuccess ||
      cublas().set_mode(handle, mode | Cublas::kNoReducedReduction) != Cublas::kSuccess)
    return false;
  // Column after column, as cuBLAS reads, these are out^T = b a^T.
  const float beta = 0.0f;
  const int status = cublas().multiply(
      handle, Cublas::kTransposed, Cublas::kNormal, static_cast<int>(n), static_cast<int>(m),
      static_cast<int>(k), &alpha, b.const_data_ptr(), Cublas::kBfloat16, static_cast<int>(k),
      a.const_data_ptr(), Cublas::kBfloat16, static_cast<int>(k), &beta, out.mutable_data_ptr(),
      Cublas::kBfloat16, static_cast<int>(n), Cublas::kComputeFloat32, Cublas::kAnyAlgorithm);
  cublas().set_mode(handle, mode);
  if (status == Cublas::kInvalidValue || status == Cublas::kNotSupported) return false;
  MXT_CHECK(status == Cublas::kSuccess, op, "cublasGemmEx must succeed, got cublasStatus_t ",
            status, " (", m, " x ", n, " x ", k, "). Look for an earlier error of this GPU.");
  return true;
}

}  // namespace mxtrain::cuda
