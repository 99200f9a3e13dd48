// SPDX-License-Identifier: Apache-2.0
// gemm and gemm_add_ on CUDA; dispatch.h chooses the backend.
//   dequant  decode both operands to bfloat16 (exact for every format here within bfloat16's range;
//            nvfp4's tensor scales wait for the epilogue), cuBLAS with the result, where it is
//            bfloat16 without a bias, or with float32 sums and one epilogue
//   fold     fold both operands into E5M2 (exact; cuda/fold.cu), multiply on the FP8 tensor cores
//            (fold_mma: by mma.sync)
//   sm120    multiply the operands as they are stored on block-scaled tensor cores
//   sm100    the same, with the scales in 128x4 tiles (swizzled here where they are not)
// Scales may be swizzled for every backend.
#include <torch/csrc/stable/accelerator.h>

#include "cuda/quantize.h"
#include "formats/layout.h"
#include "ops/cuda_common.h"
#include "ops/cuda_matmul.h"
#include "ops/ops.h"

namespace mxtrain::cuda {

// The arguments that the backends share, checked; bias contiguous.
struct GemmArguments {
  const Tensor &a, &a_scale, &b, &b_scale;
  const OptionalTensor &a_tensor_scale, &b_tensor_scale;
  int64_t format, m, n, kp;
  const OptionalTensor& bias;
  float alpha;
  ScalarType out_dtype;
  Accumulate accumulate;
  bool add;  // to what a float32 out holds

  const void* bias_data() const { return bias ? bias->const_data_ptr() : nullptr; }
  FloatType bias_type() const {
    return bias ? float_type(bias->scalar_type()) : FloatType::kFloat32;
  }
};

static void gemm_dequant(const char* op, const GemmArguments& g, Tensor& out, cudaStream_t stream) {
  const bool two_level = kFormats[g.format].e4m3_scale;
  OptionalTensor one;
  if (two_level)
    one = torch::stable::fill_(torch::stable::new_empty(g.a, {1}, ScalarType::Float), 1.0);
  const Tensor av = dequantize(g.a, g.a_scale, one, g.format, g.kp, ScalarType::BFloat16);
  const Tensor bv = dequantize(g.b, g.b_scale, one, g.format, g.kp, ScalarType::BFloat16);
  const bool bare = !g.bias && !two_level && !g.add,
             plain = bare && g.out_dtype == ScalarType::Float && g.alpha == 1.0f;
  if (bare && g.out_dtype == ScalarType::BFloat16 && matmul_bfloat16(op, out, av, bv, g.alpha))
    return;
  Tensor acc = plain ? out : torch::stable::new_empty(g.a, {g.m, g.n}, ScalarType::Float);
  matmul_float32(acc, av, bv);
  if (plain) return;
  EpilogueParams p = {};
  p.acc = acc.const_data_ptr<float>();
  p.rows = g.m;
  p.cols = g.n;
  p.a_scale = two_level ? g.a_tensor_scale->const_data_ptr<float>() : nullptr;
  p.b_scale = two_level ? g.b_tensor_scale->const_data_ptr<float>() : nullptr;
  p.alpha = g.alpha;
  p.bias = g.bias_data();
  p.bias_type = g.bias_type();
  p.out_type = float_type(g.out_dtype);
  p.out = out.mutable_data_ptr();
  p.add = g.add;
  check_launch(op, launch_epilogue(p, stream));
}

// What the product of folded operands is, whichever way they come.
static FoldedGemmParams product_of(const GemmArguments& g, Tensor& out) {
  FoldedGemmParams p = {};
  p.m = g.m;
  p.n = g.n;
  p.k = g.kp;
  p.accumulate = g.accumulate;
  p.alpha = g.alpha;
  p.bias = g.bias_data();
  p.bias_type = g.bias_type();
  p.out_type = float_type(g.out_dtype);
  p.out = out.mutable_data_ptr();
  p.add = g.add;
  return p;
}

static void gemm_fold(const char* op, const GemmArguments& g, GemmBackend backend, Tensor& out,
                      cudaStream_t stream) {
  const Tensor a = torch::stable::contiguous(g.a), a_scale = torch::stable::contiguous(g.a_scale),
               b = torch::stable::contiguous(g.b), b_scale = torch::stable::contiguous(g.b_scale);
  const int64_t pitch = (g.kp + 127) / 128 * 128;
  FoldedGemmParams p = product_of(g, out);
  const SplitScratch scratch = plan_folded_gemm(&p, backend);
  // A and B in E5M2, the sums of a split product and their counters, the row scales of both.
  Tensor workspace = torch::stable::new_empty(
      g.a, {(g.m + g.n) * (pitch + 1) + scratch.partial_bytes + 4 * scratch.counters},
      ScalarType::Byte);
  uint8_t* folded = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  uint8_t* partial = folded + (g.m + g.n) * pitch;
  p.partial = reinterpret_cast<float*>(partial);
  p.arrived = reinterpret_cast<uint32_t*>(partial + scratch.partial_bytes);
  uint8_t* scales = reinterpret_cast<uint8_t*>(p.arrived + scratch.counters);
  const auto bytes = [](const Tensor& t) {
    return static_cast<const uint8_t*>(t.const_data_ptr());
  };
  const FoldParams fa = {bytes(a), bytes(a_scale), g.m, g.kp, folded, pitch, scales};
  const FoldParams fb = {bytes(b), bytes(b_scale), g.n, g.kp, folded + g.m * pitch,
                         pitch,    scales + g.m};
  check_launch(op, launch_fold(fa, fb, p.arrived, scratch.counters, stream));
  p.a = fa.out;
  p.b = fb.out;
  p.a_scale = fa.row_scale;
  p.b_scale = fb.row_scale;
  p.pitch = pitch;
  check_launch(op, run_folded_gemm(p, backend, stream));
}

// As gemm_fold, with no folded copy; false where the operands do not lie as the copy engine needs.
static bool gemm_fold_packed(const char* op, const GemmArguments& g, Tensor& out,
                             cudaStream_t stream) {
  const auto aligned = [](const Tensor& t) {
    return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  if (g.kp == 0 || !aligned(g.a) || !aligned(g.b)) return false;
  const Tensor a_scale = torch::stable::contiguous(g.a_scale),
               b_scale = torch::stable::contiguous(g.b_scale);
  const int64_t blocks = g.kp / 32, pitch = (blocks + 3) / 4 * 4;
  // The shifts of A's and B's blocks, then the row scales of both.
  Tensor workspace = torch::stable::new_empty(g.a, {(g.m + g.n) * (pitch + 1)}, ScalarType::Byte);
  uint8_t* shifts = static_cast<uint8_t*>(workspace.mutable_data_ptr());
  uint8_t* scales = shifts + (g.m + g.n) * pitch;
  const auto bytes = [](const Tensor& t) {
    return static_cast<const uint8_t*>(t.const_data_ptr());
  };
  const ShiftParams sa = {bytes(a_scale), g.m, blocks, shifts, scales};
  const ShiftParams sb = {bytes(b_scale), g.n, blocks, shifts + g.m * pitch, scales + g.m};
  check_launch(op, launch_shifts(sa, sb, stream));
  PackedGemmParams p = {product_of(g, out), sa.shift, sb.shift};
  p.product.a = bytes(g.a);
  p.product.b = bytes(g.b);
  p.product.a_scale = sa.row_scale;
  p.product.b_scale = sb.row_scale;
  check_launch(op, run_packed_gemm(p, stream));
  return true;
}

// The rows of a matrix of bytes at addresses that are multiples of `unit`: t itself where they are.
static Tensor aligned_rows(const Tensor& t, int64_t unit) {
  const bool in_place = t.stride(1) == 1 && (t.size(0) == 1 || t.stride(0) % unit == 0) &&
                        reinterpret_cast<uintptr_t>(t.const_data_ptr()) % unit == 0;
  if (in_place) return t;
  const int64_t width = t.size(1), pitch = (width + unit - 1) / unit * unit;
  Tensor rows = torch::stable::new_empty(t, {t.size(0), pitch}, ScalarType::Byte);
  Tensor to = torch::stable::narrow(rows, 1, 0, width);
  torch::stable::copy_(to, t);
  return rows;
}

static void gemm_sm120(const char* op, const GemmArguments& g, Tensor& out, cudaStream_t stream) {
  const Tensor a = aligned_rows(g.a, sm120::kPitchUnit), b = aligned_rows(g.b, sm120::kPitchUnit),
               a_scale = aligned_rows(g.a_scale, sm120::kScalePitchUnit),
               b_scale = aligned_rows(g.b_scale, sm120::kScalePitchUnit);
  const auto bytes = [](const Tensor& t) {
    return static_cast<const uint8_t*>(t.const_data_ptr());
  };
  const auto pitch = [](const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); };
  const bool two_level = kFormats[g.format].e4m3_scale;
  sm120::BlockScaledGemmParams p = {};
  p.a = bytes(a);
  p.b = bytes(b);
  p.a_scale = bytes(a_scale);
  p.b_scale = bytes(b_scale);
  p.m = g.m;
  p.n = g.n;
  p.row_bytes = static_cast<int>(g.a.size(1));
  p.blocks = static_cast<int>(g.a_scale.size(1));
  p.a_pitch = pitch(a);
  p.b_pitch = pitch(b);
  p.a_scale_pitch = pitch(a_scale);
  p.b_scale_pitch = pitch(b_scale);
  p.a_tensor_scale = two_level ? g.a_tensor_scale->const_data_ptr<float>() : nullptr;
  p.b_tensor_scale = two_level ? g.b_tensor_scale->const_data_ptr<float>() : nullptr;
  p.separate = g.accumulate == Accumulate::kExact;
  p.alpha = g.alpha;
  p.bias = g.bias_data();
  p.bias_type = g.bias_type();
  p.out_type = float_type(g.out_dtype);
  p.out = out.mutable_data_ptr();
  p.add = g.add;
  check_launch(op, run_block_scaled_gemm(p, g.format, stream));
}

// What the kernel counts in 32 bits: rows, columns, tiles, and the bytes of a row.
static bool sm120_fits(int64_t m, int64_t n, int64_t row_bytes) {
  constexpr int64_t kInt = (int64_t{1} << 31) - 1, kTile = 128;
  return m <= kInt - kTile && n <= kInt - 2 * kTile && row_bytes <= kInt - 2 * kTile &&
         tiles(m, kTile) * tiles(n, kTile) <= kInt;
}

// ---- sm100 ----

static bool aligned_16(const Tensor& t) {
  return t.is_contiguous() && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// Codes in rows of whole 16 bytes, 16-byte aligned: t itself where it is so, else a copy whose rows
// end in zeros (nvfp4 has rows of 8 bytes over).
static Tensor whole_rows(const Tensor& t) {
  const int64_t width = t.size(1), pitch = (width + 15) / 16 * 16;
  if (pitch == width && aligned_16(t)) return t;
  Tensor rows = torch::stable::new_zeros(t, {t.size(0), pitch}, ScalarType::Byte);
  Tensor to = torch::stable::narrow(rows, 1, 0, width);
  torch::stable::copy_(to, t);
  return rows;
}

// Scales in 128x4 tiles, 16-byte aligned.
static Tensor in_tiles(const Tensor& scale) {
  if (scale.dim() == 2) return swizzle_scale(scale);
  return aligned_16(scale) ? scale : torch::stable::clone(torch::stable::contiguous(scale));
}

// What CUTLASS counts in 32 bits, and the rows and columns of tiles that a grid has.
static bool sm100_fits(int64_t m, int64_t n, int64_t kp, int64_t format) {
  constexpr int64_t kInt = (int64_t{1} << 31) - 1, kSide = int64_t{65535} * 128;
  const auto scale_bytes = [&](int64_t rows) {
    return tiles(rows, kTileRows) * tiles(kp / kFormats[format].block, kTileCols) * kTileBytes;
  };
  return m <= kSide && n <= kSide && kp <= kInt - 128 && scale_bytes(m) <= kInt &&
         scale_bytes(n) <= kInt;
}

static void gemm_sm100(const char* op, const GemmArguments& g, Tensor& out, cudaStream_t stream) {
  const bool bfloat16_out = g.out_dtype == ScalarType::BFloat16 && !g.add;
  const sm100::Tile tile = sm100_tile(op, g.a, g.m, g.n, bfloat16_out);
  const ScalarType type = tile == sm100::Tile::kPair ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t unit = tile == sm100::Tile::kPair ? 8 : 4, pitch = (g.n + unit - 1) / unit * unit;
  const bool in_place = type == g.out_dtype && !g.add && pitch == g.n && aligned_16(out);
  Tensor product = in_place ? out : torch::stable::new_empty(g.a, {g.m, pitch}, type);
  const Tensor a = whole_rows(g.a), b = whole_rows(g.b), a_scale = in_tiles(g.a_scale),
               b_scale = in_tiles(g.b_scale);
  const bool two_level = kFormats[g.format].e4m3_scale;
  OptionalTensor bias = g.bias;
  if (bias && bias->scalar_type() != ScalarType::Float) {
    bias = torch::stable::new_empty(g.a, {g.n}, ScalarType::Float);
    torch::stable::copy_(*bias, *g.bias);
  }
  sm100::GemmParams p = {};
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.a_scale = a_scale.const_data_ptr();
  p.b_scale = b_scale.const_data_ptr();
  p.a_tensor_scale = two_level ? g.a_tensor_scale->const_data_ptr<float>() : nullptr;
  p.b_tensor_scale = two_level ? g.b_tensor_scale->const_data_ptr<float>() : nullptr;
  p.bias = bias ? bias->const_data_ptr<float>() : nullptr;
  p.alpha = g.alpha;
  p.m = g.m;
  p.n = g.n;
  p.k = a.size(1) * 8 / kFormats[g.format].bits;
  p.out = product.mutable_data_ptr();
  p.pitch = pitch;
  check_launch(op, run_sm100_gemm(p, g.format, tile, stream));
  if (in_place) return;
  const Tensor result = torch::stable::narrow(product, 1, 0, g.n);
  if (!g.add) {
    torch::stable::copy_(out, result);
    return;
  }
  const Tensor acc = torch::stable::contiguous(result);
  EpilogueParams e = {};
  e.acc = acc.const_data_ptr<float>();
  e.rows = g.m;
  e.cols = g.n;
  e.alpha = 1.0f;
  e.out_type = FloatType::kFloat32;
  e.out = out.mutable_data_ptr();
  e.add = true;
  check_launch(op, launch_epilogue(e, stream));
}

static void product_into(const char* op, Tensor& out, bool add, const Tensor& a,
                         const Tensor& a_scale, const OptionalTensor& a_tensor_scale,
                         const Tensor& b, const Tensor& b_scale,
                         const OptionalTensor& b_tensor_scale, int64_t format,
                         const OptionalTensor& bias, double alpha, int64_t accumulate) {
  const cudaStream_t stream = stream_for(op, a);
  GemmBackend backend = gemm_backend_for(op, a, format);
  const int64_t m = a.size(0), n = b.size(0), kp = a.size(1) * 8 / kFormats[format].bits;
  if (m == 0 || n == 0) return;
  if (backend == GemmBackend::kSm100 && !sm100_fits(m, n, kp, format))
    backend = GemmBackend::kDequant;
  if ((backend == GemmBackend::kSm120 || backend == GemmBackend::kSm120Emulated) &&
      !sm120_fits(m, n, a.size(1)))
    backend = GemmBackend::kDequant;
  const int64_t blocks = kp / kFormats[format].block;
  const auto plain = [&](const Tensor& scale, int64_t rows) {
    const bool as_it_is = scale.dim() == 2 || backend == GemmBackend::kSm100;
    return as_it_is ? scale : unswizzle_scale(scale, rows, blocks);
  };
  const Tensor a_plain = plain(a_scale, m), b_plain = plain(b_scale, n);
  OptionalTensor bias_row;
  if (bias) bias_row = torch::stable::contiguous(*bias);
  const GemmArguments g = {a,
                           a_plain,
                           b,
                           b_plain,
                           a_tensor_scale,
                           b_tensor_scale,
                           format,
                           m,
                           n,
                           kp,
                           bias_row,
                           static_cast<float>(alpha),
                           out.scalar_type(),
                           static_cast<Accumulate>(accumulate),
                           add};
  if (backend == GemmBackend::kSm100) return gemm_sm100(op, g, out, stream);
  if (backend == GemmBackend::kDequant) return gemm_dequant(op, g, out, stream);
  if (backend == GemmBackend::kSm120 || backend == GemmBackend::kSm120Emulated)
    return gemm_sm120(op, g, out, stream);
  if (backend == GemmBackend::kFoldPacked) {
    if (gemm_fold_packed(op, g, out, stream)) return;
    return gemm_fold(op, g, GemmBackend::kFold, out, stream);
  }
  gemm_fold(op, g, backend, out, stream);
}

Tensor gemm(Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b, Tensor b_scale,
            OptionalTensor b_tensor_scale, int64_t format, OptionalTensor bias, double alpha,
            ScalarType out_dtype, int64_t accumulate) {
  const char* op = "gemm";
  check_gemm(op, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias, alpha,
             out_dtype, accumulate);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  Tensor out = torch::stable::new_empty(a, {a.size(0), b.size(0)}, out_dtype);
  product_into(op, out, false, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, bias,
               alpha, accumulate);
  return out;
}

void gemm_add_(Tensor out, Tensor a, Tensor a_scale, OptionalTensor a_tensor_scale, Tensor b,
               Tensor b_scale, OptionalTensor b_tensor_scale, int64_t format, double alpha,
               int64_t accumulate) {
  const char* op = "gemm_add_";
  const OptionalTensor none;
  check_gemm(op, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, none, alpha,
             ScalarType::Float, accumulate);
  check_accumulator(out, a, b);
  const torch::stable::accelerator::DeviceGuard guard(a.get_device_index());
  product_into(op, out, true, a, a_scale, a_tensor_scale, b, b_scale, b_tensor_scale, format, none,
               alpha, accumulate);
}

}  // namespace mxtrain::cuda
