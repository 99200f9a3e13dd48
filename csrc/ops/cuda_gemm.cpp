// SPDX-License-Identifier: Apache-2.0
// gemm on CUDA, backend `dequant`: decode both operands to bfloat16 (exact for every format here
// within bfloat16's range; nvfp4's tensor scales wait for the epilogue), cuBLAS through torch with
// a float32 result, one epilogue.
#include <torch/csrc/stable/accelerator.h>

#include <array>

#include "cuda/quantize.h"
#include "ops/cuda_common.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

// aten::mm.dtype_out: bfloat16 in, float32 out; unlike mm it is not one of the operators that
// autocast lowers.
static void matmul_into(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 4> stack = {from(a), from(b), from(ScalarType::Float), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference back
}

Tensor gemm(Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b, Tensor b_scale,
            OptionalTensor b_tensor_scale, int64_t format, OptionalTensor bias, double alpha,
            ScalarType out_dtype, int64_t accumulate) {
  const char* op = "gemm";
  check_gemm(a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias, alpha, out_dtype,
             accumulate);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = stream_for(op, a);
  const FormatInfo& f = kFormats[format];
  const int64_t kp = a.size(1) * 8 / f.bits, m = a.size(0), n = b.size(0);
  Tensor out = torch::stable::new_empty(a, {m, n}, out_dtype);
  if (m == 0 || n == 0) return out;
  OptionalTensor one;
  if (f.e4m3_scale)
    one = torch::stable::fill_(torch::stable::new_empty(a, {1}, ScalarType::Float), 1.0);
  const Tensor av = dequantize(a, a_scale, one, format, kp, ScalarType::BFloat16);
  const Tensor bv = dequantize(b, b_scale, one, format, kp, ScalarType::BFloat16);
  const Tensor bt = torch::stable::transpose(bv, 0, 1);
  const bool plain = out_dtype == ScalarType::Float && !bias && alpha == 1.0 && !f.e4m3_scale;
  Tensor acc = plain ? out : torch::stable::new_empty(a, {m, n}, ScalarType::Float);
  matmul_into(acc, av, bt);
  if (plain) return out;
  OptionalTensor bias_row;
  if (bias) bias_row = torch::stable::contiguous(*bias);
  EpilogueParams p = {};
  p.acc = acc.const_data_ptr<float>();
  p.rows = m;
  p.cols = n;
  p.a_scale = f.e4m3_scale ? a_tensor_scale->const_data_ptr<float>() : nullptr;
  p.b_scale = f.e4m3_scale ? b_tensor_scale->const_data_ptr<float>() : nullptr;
  p.alpha = static_cast<float>(alpha);
  p.bias = bias_row ? bias_row->const_data_ptr() : nullptr;
  p.bias_type = bias_row ? float_type(bias_row->scalar_type()) : FloatType::kFloat32;
  p.out_type = float_type(out_dtype);
  p.out = out.mutable_data_ptr();
  check_launch(op, launch_epilogue(p, stream));
  return out;
}

}  // namespace mxtrain::cuda
