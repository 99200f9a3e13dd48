// SPDX-License-Identifier: Apache-2.0
// int8_quantize, int8_quantize_fallback, int8_gemm and the packing of residuals on the CPU: check,
// allocate, split blocks over torch's threads.
#include "ops/int8.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "ops/cpu_common.h"
#include "ops/ops.h"

namespace mxtrain::cpu {

namespace {

Int8QuantizeParams make_params(const Tensor& x, const Int8Forms& forms, const Tensor& scale) {
  Int8QuantizeParams p = {};
  p.x.type = source_type(x.scalar_type());
  p.x.data = x.const_data_ptr();
  p.x.stride_row = x.stride(0);
  p.x.stride_col = x.stride(1);
  p.rows = x.size(0);
  p.cols = x.size(1);
  p.rp = int8_blocks(p.rows) * kInt8Block;
  p.kp = int8_blocks(p.cols) * kInt8Block;
  p.data = mutable_codes(forms.row);
  p.data_t = mutable_codes(forms.transposed);
  p.scale = scale.mutable_data_ptr<float>();
  return p;
}

// Quantizes all blocks. counts: how many fell back, are not finite, are not all zero; or null.
void run(const Int8QuantizeParams& p, int64_t* counts) {
  std::atomic<int64_t> fallen{0}, bad{0}, some{0};
  const int64_t along_k = p.kp / kInt8Block;
  torch::stable::parallel_for(0, p.rp / kInt8Block * along_k, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Int8BlockState s = kernels().int8_quantize(p, t / along_k, t % along_k);
      fallen += s.fell_back;
      bad += s.not_finite;
      some += s.not_zero;
    }
  });
  if (!counts) return;
  counts[0] = fallen;
  counts[1] = bad;
  counts[2] = some;
}

// Which blocks of an operand are looked at: all, or those that a mask has.
bool is_seen(const Int8Mask& seen, int64_t i, int64_t k) {
  return !seen.given() || seen.at(i, k) != 0;
}

// codes: a matrix, or a pool: of that, tile t is seen as block (t, 0).
void check_no_lowest(const char* name, const Tensor& codes, const Int8Mask& seen = {}) {
  const auto* c = static_cast<const int8_t*>(codes.const_data_ptr());
  const int64_t kp = codes.size(codes.dim() - 1), rows = codes.numel() / kp;
  std::atomic<bool> found{false};
  torch::stable::parallel_for(0, rows, grain(kp), [&](int64_t begin, int64_t end) {
    int8_t lowest = 0;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t k = 0; k < kp; k += kInt8Block) {
        if (!is_seen(seen, r / kInt8Block, k / kInt8Block)) continue;
        const int8_t* block = c + r * kp + k;
        for (int i = 0; i < kInt8Block; ++i) lowest = block[i] < lowest ? block[i] : lowest;
      }
    if (lowest == -128) found = true;
  });
  MXT_CHECK(!found, "int8_gemm", name, " must hold codes in [-127, 127], got -128 (shape ",
            shape_of(codes), "). The format has no such code: use int8_quantize.");
}

void check_scales(const char* name, const Tensor& grid, const Int8Mask& seen = {}) {
  const float* s = grid.const_data_ptr<float>();
  for (int64_t i = 0; i < grid.size(0); ++i)
    for (int64_t k = 0; k < grid.size(1); ++k) {
      const float scale = s[i * grid.stride(0) + k * grid.stride(1)];
      MXT_CHECK(!is_seen(seen, i, k) || !(scale < 0), "int8_gemm", name,
                " must be at least 0 or NaN, got ", scale, " (block ", i, ", ", k,
                "). The signs are in the codes: use int8_quantize.");
    }
}

void check_slots(const char* op, const char* name, const Tensor& slots, const Tensor& pool) {
  const Int8Mask mask = view_mask(slots);
  for (int64_t i = 0; i < slots.size(0); ++i)
    for (int64_t k = 0; k < slots.size(1); ++k) {
      const int64_t slot = mask.at(i, k);
      MXT_CHECK(slot >= 0 && slot <= pool.size(0), op, name, " must lie in [0, ", pool.size(0),
                "], got ", slot, " (block ", i, ", ", k, " of ", shape_of(slots),
                "). Pass what int8_pack_residual returned with the pool.");
    }
}

// The tiles of a pool that its slots have: a byte each.
std::vector<uint8_t> used_tiles(const Tensor& slots, int64_t tiles) {
  std::vector<uint8_t> used(tiles);
  const Int8Mask mask = view_mask(slots);
  for (int64_t i = 0; i < slots.size(0); ++i)
    for (int64_t k = 0; k < slots.size(1); ++k)
      if (mask.at(i, k) > 0) used[mask.at(i, k) - 1] = 1;
  return used;
}

Int8Codes view_codes(const Tensor& data, const Tensor& scale) {
  return {static_cast<const int8_t*>(data.const_data_ptr()), scale.const_data_ptr<float>(),
          scale.stride(0), scale.stride(1)};
}

// The blocks that pack, numbered along the rows of the grid, in the order of the pool.
std::vector<int64_t> packing_order(const Tensor& scale, const Tensor& mask) {
  const float* s = scale.const_data_ptr<float>();
  const uint8_t* m = bytes(mask);
  const int64_t across = mask.size(1);
  const auto scale_of = [&](int64_t t) {
    return s[t / across * scale.stride(0) + t % across * scale.stride(1)];
  };
  std::vector<int64_t> order;
  for (int64_t t = 0; t < mask.size(0) * across; ++t)
    if (int8_packs(m[t / across * mask.stride(0) + t % across * mask.stride(1)], scale_of(t)))
      order.push_back(t);
  std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
    return int8_packs_before(1, scale_of(i), i, scale_of(j), j);
  });
  return order;
}

// move(row in the pool, row of codes of the residual or -1 beyond the last) for every row of a tile
// that is block (i, k).
template <class Move>
void for_each_row(int64_t tile, int64_t i, int64_t k, int64_t rows, int64_t kp, const Move& move) {
  for (int64_t r = 0; r < kInt8Block; ++r) {
    const int64_t row = i * kInt8Block + r;
    move((tile * kInt8Block + r) * kInt8Block, row < rows ? row * kp + k * kInt8Block : -1);
  }
}

}  // namespace

Operand3 int8_quantize(Tensor x, int64_t rounding, OptionalTensor rng, int64_t layout) {
  check_int8_quantize("int8_quantize", x, rounding, rng, layout, nullptr);
  const Int8Forms forms = new_int8_forms(x, layout);
  Tensor scale = new_int8_grid(x, ScalarType::Float);
  Int8QuantizeParams p = make_params(x, forms, scale);
  p.rounding = static_cast<Rounding>(rounding);
  if (p.rounding == Rounding::kStochastic) {
    const auto* r = static_cast<const int64_t*>(rng->const_data_ptr());
    p.key = {static_cast<uint64_t>(r[0]), static_cast<uint32_t>(r[rng->stride(0)]), kRowStream};
  }
  run(p, nullptr);
  return {forms.row, forms.transposed, scale};
}

Operand8 int8_quantize_fallback(Tensor x, Tensor threshold, int64_t layout) {
  const char* op = "int8_quantize_fallback";
  check_int8_quantize(op, x, 0, OptionalTensor(), layout, &threshold);
  const float limit = *threshold.const_data_ptr<float>();
  MXT_CHECK(limit > 0, op, "threshold must be positive, got ", limit, " (x has shape ", shape_of(x),
            "). Blocks whose largest magnitude lies above it fall back.");
  const Int8Forms forms = new_int8_forms(x, layout), residual = new_int8_forms(x, layout);
  Tensor scale = new_int8_grid(x, ScalarType::Float),
         residual_scale = new_int8_grid(x, ScalarType::Float),
         mask = new_int8_grid(x, ScalarType::Byte);
  Tensor counts = torch::stable::new_empty(x, {3}, ScalarType::Long);
  Int8QuantizeParams p = make_params(x, forms, scale);
  p.residual = mutable_codes(residual.row);
  p.residual_t = mutable_codes(residual.transposed);
  p.residual_scale = residual_scale.mutable_data_ptr<float>();
  p.mask = mutable_bytes(mask);
  p.threshold = limit;
  run(p, static_cast<int64_t*>(counts.mutable_data_ptr()));
  return {forms.row,           forms.transposed, scale, residual.row,
          residual.transposed, residual_scale,   mask,  counts};
}

Tensor int8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, OptionalTensor bias,
                 ScalarType out_dtype, OptionalTensor residual, OptionalTensor residual_scale,
                 OptionalTensor mask, bool residual_of_b) {
  check_int8_gemm(a, a_scale, b, b_scale, bias, out_dtype,
                  {residual, residual_scale, mask, residual_of_b});
  const int64_t m = a.size(0), n = b.size(0);
  Tensor out = torch::stable::new_empty(a, {m, n}, out_dtype);
  if (m == 0 || n == 0) return out;
  const Tensor ac = torch::stable::contiguous(a), bc = torch::stable::contiguous(b);
  check_no_lowest("a", ac);
  check_no_lowest("b", bc);
  check_scales("a_scale", a_scale);
  check_scales("b_scale", b_scale);
  Tensor acc = torch::stable::new_empty(a, {m, n}, ScalarType::Float);
  Int8GemmParams p = {};
  p.a = view_codes(ac, a_scale);
  p.b = view_codes(bc, b_scale);
  p.m = m;
  p.n = n;
  p.kp = ac.size(1);
  p.residual_of_b = residual_of_b;
  p.acc = acc.mutable_data_ptr<float>();
  Tensor rc;
  if (mask) {  // what the mask leaves out is not looked at
    p.mask = view_mask(*mask);
    if (p.mask.slots) check_slots("int8_gemm", "mask", *mask, *residual);
    rc = torch::stable::contiguous(*residual);
    p.residual = view_codes(rc, *residual_scale);
    if (p.mask.slots) {
      const std::vector<uint8_t> used = used_tiles(*mask, rc.size(0));
      if (!used.empty()) check_no_lowest("residual", rc, {used.data(), nullptr, 1, 0});
    } else {
      check_no_lowest("residual", rc, p.mask);
    }
    check_scales("residual_scale", *residual_scale, p.mask);
  }
  const int64_t across = int8_blocks(n);
  torch::stable::parallel_for(0, int8_blocks(m) * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) kernels().int8_gemm(p, t / across, t % across);
  });
  OptionalTensor bias_row;
  if (bias) bias_row = torch::stable::contiguous(*bias);
  EpilogueParams e = {};
  e.acc = p.acc;
  e.cols = n;
  e.a_scale = e.b_scale = e.alpha = 1.0f;
  e.bias = bias_row ? bias_row->const_data_ptr() : nullptr;
  e.bias_type = bias_row ? source_type(bias_row->scalar_type()) : SourceType::kFloat32;
  e.out_type = source_type(out_dtype);
  e.out = out.mutable_data_ptr();
  torch::stable::parallel_for(
      0, m, grain(n), [&](int64_t begin, int64_t end) { kernels().epilogue(e, begin, end); });
  return out;
}

Operand2 int8_pack_residual(Tensor residual, Tensor scale, Tensor mask, int64_t count) {
  check_int8_pack_residual(residual, scale, mask, count);
  Tensor pool =
      torch::stable::new_empty(residual, {count, kInt8Block, kInt8Block}, ScalarType::Char);
  Tensor slots = torch::stable::new_zeros(residual, {mask.size(0), mask.size(1)}, ScalarType::Int);
  const std::vector<int64_t> order = packing_order(scale, mask);
  const int64_t tiles = std::min<int64_t>(count, order.size()), across = mask.size(1);
  const Tensor codes = torch::stable::contiguous(residual);
  const auto* from = static_cast<const int8_t*>(codes.const_data_ptr());
  auto* to = static_cast<int8_t*>(pool.mutable_data_ptr());
  auto* slot_of = static_cast<int32_t*>(slots.mutable_data_ptr());
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t block = order[tile];
      slot_of[block] = static_cast<int32_t>(tile + 1);
      for_each_row(tile, block / across, block % across, codes.size(0), codes.size(1),
                   [&](int64_t at, int64_t row) {
                     if (row < 0)
                       memset(to + at, 0, kInt8Block);
                     else
                       memcpy(to + at, from + row, kInt8Block);
                   });
    }
  });
  return {pool, slots};
}

Tensor int8_unpack_residual(Tensor pool, Tensor slots, int64_t rows, int64_t kp) {
  check_int8_unpack_residual(pool, slots, rows, kp);
  check_slots("int8_unpack_residual", "slots", slots, pool);
  Tensor residual = torch::stable::new_empty(pool, {rows, kp}, ScalarType::Char);
  const Tensor tiles = torch::stable::contiguous(pool);
  const auto* from = static_cast<const int8_t*>(tiles.const_data_ptr());
  auto* to = static_cast<int8_t*>(residual.mutable_data_ptr());
  const Int8Mask mask = view_mask(slots);
  const int64_t across = slots.size(1);
  torch::stable::parallel_for(0, slots.numel(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i = block / across, k = block % across, tile = mask.at(i, k) - 1;
      if (tile < 0) continue;
      for_each_row(tile, i, k, rows, kp, [&](int64_t at, int64_t row) {
        if (row >= 0) memcpy(to + row, from + at, kInt8Block);
      });
    }
  });
  return residual;
}

}  // namespace mxtrain::cpu
