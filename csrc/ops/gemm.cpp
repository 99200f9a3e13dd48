// SPDX-License-Identifier: Apache-2.0
// gemm, backend `cpu`: decode both operands to float32, torch's matmul, one epilogue.
//   D[M, N] = alpha * A[M, K] B[N, K]^T + bias[N]
// gemm_add_: D += alpha * A B^T, in float32.
#include <array>
#include <atomic>
#include <cmath>

#include "ops/cpu_common.h"
#include "ops/ops.h"

namespace mxtrain {

void check_gemm(const char* op, const Tensor& a, const Tensor& a_scale,
                const OptionalTensor& a_tensor_scale, const Tensor& b, const Tensor& b_scale,
                const OptionalTensor& b_tensor_scale, int64_t format, const OptionalTensor& bias,
                double alpha, ScalarType out_dtype, int64_t accumulate) {
  const PackedShape sa = check_operand(op, "a", a, a_scale, a_tensor_scale, format, true);
  const PackedShape sb = check_operand(op, "b", b, b_scale, b_tensor_scale, format, true);
  MXT_CHECK(sa.kp == sb.kp, op, "a and b must have the same K, got ", sa.kp, " and ", sb.kp,
            " (padded, format ", kFormats[format].name, "; a data ", shape_of(a), ", b data ",
            shape_of(b), "). Both are quantized along the contraction axis: D = A B^T.");
  check_same_device(op, "b", b, a);
  MXT_CHECK(is_input_float(out_dtype), op, "out_dtype must be bfloat16, float16 or float32, got ",
            dtype_name(out_dtype), " (a data ", shape_of(a), "). Convert afterwards.");
  MXT_CHECK(std::isfinite(static_cast<float>(alpha)), op, "alpha must be finite, got ", alpha,
            " (a data ", shape_of(a), "). It is a float32 factor on the product; 1 for none.");
  check_choice(op, "accumulate", accumulate, kAccumulateNames, kAccumulates);
  if (!bias) return;
  MXT_CHECK(is_input_float(bias->scalar_type()) && bias->dim() == 1 && bias->size(0) == sb.rows, op,
            "bias must be bfloat16, float16 or float32 of shape [", sb.rows, "], got ",
            dtype_name(bias->scalar_type()), " ", shape_of(*bias), " (b has ", sb.rows,
            " rows). Convert or reshape it.");
  check_same_device(op, "bias", *bias, a);
}

static std::atomic<int> g_gemm_backend{static_cast<int>(GemmBackend::kAuto)};

GemmBackend requested_gemm_backend() { return static_cast<GemmBackend>(g_gemm_backend.load()); }

void check_accumulator(const Tensor& out, const Tensor& a, const Tensor& b) {
  const char* op = "gemm_add_";
  MXT_CHECK(out.scalar_type() == ScalarType::Float && out.dim() == 2 && out.size(0) == a.size(0) &&
                out.size(1) == b.size(0) && out.is_contiguous(),
            op, "out must be contiguous, float32 of shape [", a.size(0), ", ", b.size(0), "], got ",
            dtype_name(out.scalar_type()), " ", shape_of(out),
            out.is_contiguous() ? "" : " strided", " (a data ", shape_of(a), ", b data ",
            shape_of(b), "). Allocate it with torch.zeros.");
  check_same_device(op, "out", out, a);
}

namespace cpu {

// aten::mm.out: unlike matmul it is not one of the operators that autocast lowers.
static void matmul_into(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack = {from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes the returned reference back
}

// out = alpha * A B^T + bias, or out += alpha * A B^T where add is set; everything is checked.
static void product_into(Tensor& out, bool add, const Tensor& a, const Tensor& a_scale,
                         const OptionalTensor& a_tensor_scale, const Tensor& b,
                         const Tensor& b_scale, const OptionalTensor& b_tensor_scale,
                         int64_t format, const OptionalTensor& bias, double alpha) {
  const int64_t kp = a.size(1) * 8 / kFormats[format].bits, m = a.size(0), n = b.size(0);
  // The tensor scales stay out of the product, so that its terms are exact; the epilogue multiplies
  // by them.
  const bool two_level = kFormats[format].e4m3_scale;
  OptionalTensor one;
  if (two_level) one = torch::stable::full({1}, 1.0, ScalarType::Float);
  const int64_t blocks = kp / kFormats[format].block;
  const auto plain = [&](const Tensor& scale, int64_t rows) {
    return scale.dim() == 2 ? scale : unswizzle_scale(scale, rows, blocks);
  };
  const Tensor af = dequantize(a, plain(a_scale, m), one, format, kp, ScalarType::Float);
  const Tensor bf = dequantize(b, plain(b_scale, n), one, format, kp, ScalarType::Float);
  Tensor acc = torch::stable::new_empty(af, {m, n});
  matmul_into(acc, af, torch::stable::transpose(bf, 0, 1));
  OptionalTensor bias_row;
  if (bias) bias_row = torch::stable::contiguous(*bias);
  EpilogueParams p = {};
  p.acc = acc.const_data_ptr<float>();
  p.cols = n;
  p.a_scale = scale_of(a_tensor_scale);
  p.b_scale = scale_of(b_tensor_scale);
  p.alpha = static_cast<float>(alpha);
  p.bias = bias_row ? bias_row->const_data_ptr() : nullptr;
  p.bias_type = bias_row ? source_type(bias_row->scalar_type()) : SourceType::kFloat32;
  p.out_type = source_type(out.scalar_type());
  p.out = out.mutable_data_ptr();
  p.add = add;
  torch::stable::parallel_for(
      0, m, grain(n), [&](int64_t begin, int64_t end) { kernels().epilogue(p, begin, end); });
}

Tensor gemm(Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b, Tensor b_scale,
            OptionalTensor b_tensor_scale, int64_t format, OptionalTensor bias, double alpha,
            ScalarType out_dtype, int64_t accumulate) {
  check_gemm("gemm", a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias, alpha,
             out_dtype, accumulate);
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(0)}, out_dtype);
  product_into(out, false, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias,
               alpha);
  return out;
}

void gemm_add_(Tensor out, Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b,
               Tensor b_scale, OptionalTensor b_tensor_scale, int64_t format, double alpha,
               int64_t accumulate) {
  const OptionalTensor none;
  check_gemm("gemm_add_", a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, none,
             alpha, ScalarType::Float, accumulate);
  check_accumulator(out, a, b);
  product_into(out, true, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, none,
               alpha);
}

}  // namespace cpu

}  // namespace mxtrain

// Not an op: it is a setting of the process. Returns the one before; the caller passes a valid
// code.
extern "C" __attribute__((visibility("default"))) int mxtrain_set_gemm_backend(int backend) {
  return mxtrain::g_gemm_backend.exchange(backend);
}
