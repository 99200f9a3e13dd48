// SPDX-License-Identifier: Apache-2.0
// int8_quantize, int8_quantize_fallback, int8_gemm and the packing of residuals on CUDA: check,
// allocate, call; dispatch.h chooses the GEMM's kernel.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/int8.h"
#include "ops/cuda_common.h"
#include "ops/int8.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

namespace {

using torch::stable::accelerator::DeviceGuard;

Int8QuantizeParams make_params(const Tensor& x, const Int8Forms& forms, const Tensor& scale) {
  Int8QuantizeParams p = {};
  p.x = x.const_data_ptr();
  p.x_type = float_type(x.scalar_type());
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.stride_row = x.stride(0);
  p.stride_col = x.stride(1);
  p.rp = int8_blocks(p.rows) * kInt8Block;
  p.kp = int8_blocks(p.cols) * kInt8Block;
  p.data = mutable_codes(forms.row);
  p.data_t = mutable_codes(forms.transposed);
  p.scale = scale.mutable_data_ptr<float>();
  return p;
}

// Contiguous codes that the copy instructions can read: from a multiple of 16 bytes on.
Tensor aligned_codes(const Tensor& t) {
  const Tensor c = torch::stable::contiguous(t);
  const bool aligned = reinterpret_cast<uintptr_t>(c.const_data_ptr()) % 16 == 0;
  return aligned ? c : torch::stable::clone(c);
}

Int8Codes view_codes(const Tensor& data, const Tensor& scale) {
  return {static_cast<const int8_t*>(data.const_data_ptr()), scale.const_data_ptr<float>(),
          static_cast<int>(scale.stride(0)), static_cast<int>(scale.stride(1))};
}

}  // namespace

Operand3 int8_quantize(Tensor x, int64_t rounding, OptionalTensor rng, int64_t layout) {
  const char* op = "int8_quantize";
  check_int8_quantize(op, x, rounding, rng, layout, nullptr);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for(op, x);
  const Int8Forms forms = new_int8_forms(x, layout);
  Tensor scale = new_int8_grid(x, ScalarType::Float);
  Int8QuantizeParams p = make_params(x, forms, scale);
  if (rounding == static_cast<int64_t>(Rounding::kStochastic)) {
    p.rng = rng->const_data_ptr<int64_t>();
    p.rng_stride = rng->stride(0);
  }
  check_launch(op, launch_int8_quantize(p, stream));
  return {forms.row, forms.transposed, scale};
}

Operand8 int8_quantize_fallback(Tensor x, Tensor threshold, int64_t layout) {
  const char* op = "int8_quantize_fallback";
  check_int8_quantize(op, x, 0, OptionalTensor(), layout, &threshold);
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = stream_for(op, x);
  const Int8Forms forms = new_int8_forms(x, layout), residual = new_int8_forms(x, layout);
  Tensor scale = new_int8_grid(x, ScalarType::Float),
         residual_scale = new_int8_grid(x, ScalarType::Float),
         mask = new_int8_grid(x, ScalarType::Byte),
         counts = torch::stable::new_zeros(x, {3}, ScalarType::Long);
  Int8QuantizeParams p = make_params(x, forms, scale);
  p.threshold = threshold.const_data_ptr<float>();
  p.residual = mutable_codes(residual.row);
  p.residual_t = mutable_codes(residual.transposed);
  p.residual_scale = residual_scale.mutable_data_ptr<float>();
  p.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  p.counts = counts.mutable_data_ptr<int64_t>();
  check_launch(op, launch_int8_quantize(p, stream));
  return {forms.row,           forms.transposed, scale, residual.row,
          residual.transposed, residual_scale,   mask,  counts};
}

Tensor int8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, OptionalTensor bias,
                 ScalarType out_dtype, OptionalTensor residual, OptionalTensor residual_scale,
                 OptionalTensor mask, bool residual_of_b) {
  const char* op = "int8_gemm";
  check_int8_gemm(a, a_scale, b, b_scale, bias, out_dtype,
                  {residual, residual_scale, mask, residual_of_b});
  const DeviceGuard guard(a.get_device_index());
  const cudaStream_t stream = stream_for(op, a);
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(0)}, out_dtype);
  if (out.numel() == 0) return out;
  const Tensor ac = aligned_codes(a), bc = aligned_codes(b);
  Tensor rc;
  OptionalTensor bias_row;
  if (bias) bias_row = torch::stable::contiguous(*bias);
  Int8GemmParams p = {};
  p.a = view_codes(ac, a_scale);
  p.b = view_codes(bc, b_scale);
  if (mask && residual->numel() > 0) {  // what the mask leaves out is not looked at
    rc = aligned_codes(*residual);
    p.residual = view_codes(rc, *residual_scale);
    p.mask = view_mask(*mask);
    p.tiles = p.mask.slots ? static_cast<int>(rc.size(0)) : 0;
  }
  p.residual_of_b = residual_of_b;
  p.m = a.size(0);
  p.n = b.size(0);
  p.kp = ac.size(1);
  p.bias = bias_row ? bias_row->const_data_ptr() : nullptr;
  p.bias_type = bias_row ? float_type(bias_row->scalar_type()) : FloatType::kFloat32;
  p.out_type = float_type(out_dtype);
  p.out = out.mutable_data_ptr();
  check_launch(op, run_int8_gemm(op, a, p, stream));
  return out;
}

Operand2 int8_pack_residual(Tensor residual, Tensor scale, Tensor mask, int64_t count) {
  const char* op = "int8_pack_residual";
  check_int8_pack_residual(residual, scale, mask, count);
  const DeviceGuard guard(residual.get_device_index());
  const cudaStream_t stream = stream_for(op, residual);
  Tensor pool =
      torch::stable::new_empty(residual, {count, kInt8Block, kInt8Block}, ScalarType::Char);
  Tensor slots = torch::stable::new_empty(residual, {mask.size(0), mask.size(1)}, ScalarType::Int);
  if (slots.numel() == 0) return {pool, slots};
  const Tensor codes = aligned_codes(residual);
  Int8PackParams p = {};
  p.from = static_cast<const int8_t*>(codes.const_data_ptr());
  p.to = mutable_codes(pool);
  p.scale = scale.const_data_ptr<float>();
  p.scale_stride_row = scale.stride(0);
  p.scale_stride_k = scale.stride(1);
  p.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  p.mask_stride_row = mask.stride(0);
  p.mask_stride_k = mask.stride(1);
  p.slots = static_cast<int32_t*>(slots.mutable_data_ptr());
  p.count = count;
  p.rows = codes.size(0);
  p.kp = codes.size(1);
  check_launch(op, launch_int8_pack(p, stream));
  return {pool, slots};
}

Tensor int8_unpack_residual(Tensor pool, Tensor slots, int64_t rows, int64_t kp) {
  const char* op = "int8_unpack_residual";
  check_int8_unpack_residual(pool, slots, rows, kp);
  const DeviceGuard guard(pool.get_device_index());
  const cudaStream_t stream = stream_for(op, pool);
  Tensor residual = torch::stable::new_empty(pool, {rows, kp}, ScalarType::Char);
  if (residual.numel() == 0) return residual;
  const Tensor tiles = aligned_codes(pool);
  Int8UnpackParams p = {};
  p.from = static_cast<const int8_t*>(tiles.const_data_ptr());
  p.to = mutable_codes(residual);
  p.slots = view_mask(slots);
  p.count = tiles.size(0);
  p.rows = rows;
  p.kp = kp;
  check_launch(op, launch_int8_unpack(p, stream));
  return residual;
}

}  // namespace mxtrain::cuda
