// SPDX-License-Identifier: Apache-2.0
#include "check.h"

#include "formats/layout.h"

namespace mxtrain {

std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}

const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
#define MXT_ROW(type, name) \
  case ScalarType::type:    \
    return name;
    MXT_ROW(Bool, "bool")
    MXT_ROW(Byte, "uint8")
    MXT_ROW(Char, "int8")
    MXT_ROW(Short, "int16")
    MXT_ROW(Int, "int32")
    MXT_ROW(Long, "int64")
    MXT_ROW(Half, "float16")
    MXT_ROW(BFloat16, "bfloat16")
    MXT_ROW(Float, "float32")
    MXT_ROW(Double, "float64")
    MXT_ROW(ComplexFloat, "complex64")
    MXT_ROW(ComplexDouble, "complex128")
    MXT_ROW(Float8_e4m3fn, "float8_e4m3fn")
    MXT_ROW(Float8_e5m2, "float8_e5m2")
    MXT_ROW(Float8_e8m0fnu, "float8_e8m0fnu")
    MXT_ROW(Float8_e4m3fnuz, "float8_e4m3fnuz")
    MXT_ROW(Float8_e5m2fnuz, "float8_e5m2fnuz")
    MXT_ROW(Float4_e2m1fn_x2, "float4_e2m1fn_x2")
    MXT_ROW(ComplexHalf, "complex32")
    MXT_ROW(UInt16, "uint16")
    MXT_ROW(UInt32, "uint32")
    MXT_ROW(UInt64, "uint64")
#undef MXT_ROW
    default:
      return torch::headeronly::toString(dtype);
  }
}

bool is_input_float(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float;
}

void check_matrix(const char* op, const char* name, const Tensor& t) {
  MXT_CHECK(is_input_float(t.scalar_type()), op, name,
            " must be bfloat16, float16 or float32, got ", dtype_name(t.scalar_type()), " (shape ",
            shape_of(t), "). Convert it first.");
  MXT_CHECK(t.dim() == 2, op, name, " must have 2 dimensions, got ", t.dim(), " (shape ",
            shape_of(t), "). Flatten the leading axes: x.flatten(0, -2).");
  check_sizes(op, name, t);
}

void check_sizes(const char* op, const char* name, const Tensor& t) {
  constexpr int64_t kMaxSize = int64_t{1} << 56;
  for (int64_t i = 0; i < t.dim(); ++i)
    MXT_CHECK(t.size(i) <= kMaxSize, op, name, " must have sizes of at most 2^56, got ", t.size(i),
              " (shape ", shape_of(t), "). No memory holds as many; split it.");
}

void check_same_device(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  MXT_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), op, name,
            " must be on the device of the first argument, got ", device_of(t),
            " (the first argument is on ", device_of(x), "). Move it there.");
}

const FormatInfo& check_format(const char* op, const char* name, int64_t format) {
  const char* names[kFormatCount];
  for (int i = 0; i < kFormatCount; ++i) names[i] = kFormats[i].name;
  check_choice(op, name, format, names, kFormatCount);
  return kFormats[format];
}

void check_choice(const char* op, const char* name, int64_t value, const char* const* names,
                  int count) {
  if (value >= 0 && value < count) return;
  std::string known;
  for (int i = 0; i < count; ++i) known += (i ? ", " : "") + std::to_string(i) + " " + names[i];
  fail(op, name, " must be one of the known codes, got ", value, " (known: ", known,
       "). Use the names in mxtrain.formats.");
}

void check_hadamard(const char* op, const char* name, int64_t group, bool none,
                    const OptionalTensor& signs, const Tensor& x) {
  const bool known = group == 16 || group == 32 || group == 64 || group == 128 || group == 256;
  MXT_CHECK(known || (none && group == 0), op, name, " must be ", none ? "0, " : "",
            "16, 32, 64, 128 or 256, got ", group, " (x has shape ", shape_of(x),
            "). Choose one of these.");
  if (!signs) return;
  MXT_CHECK(group != 0, op, "signs must come with a Hadamard group, got signs of shape ",
            shape_of(*signs), " (", name, " is 0). Set ", name, ", or leave signs out.");
  MXT_CHECK(signs->scalar_type() == ScalarType::Char, op, "signs must be int8, got ",
            dtype_name(signs->scalar_type()), " (shape ", shape_of(*signs),
            "). See mxtrain.draw_signs.");
  MXT_CHECK(signs->dim() == 1 && signs->size(0) == group && signs->is_contiguous(), op,
            "signs must be contiguous, of shape [", group, "], got ", shape_of(*signs), " (", name,
            " is ", group, "). See mxtrain.draw_signs.");
  check_same_device(op, "signs", *signs, x);
}

void check_rng(const char* op, const OptionalTensor& rng, const Tensor& x) {
  MXT_CHECK(rng.has_value(), op,
            "rng must be given for stochastic rounding, got None (x has shape ", shape_of(x),
            "). Pass int64 [2] (seed, offset); see mxtrain.draw_rng.");
  MXT_CHECK(rng->scalar_type() == ScalarType::Long && rng->dim() == 1 && rng->size(0) == 2, op,
            "rng must be int64 of shape [2], got ", dtype_name(rng->scalar_type()), " (shape ",
            shape_of(*rng), "). See mxtrain.draw_rng.");
  check_same_device(op, "rng", *rng, x);
}

PackedShape check_operand(const char* op, const char* name, const Tensor& data, const Tensor& scale,
                          const OptionalTensor& tensor_scale, int64_t format, bool tiles_too) {
  const FormatInfo& f = check_format(op, "format", format);
  const auto is_bytes = [](const Tensor& t, int dims) {
    return t.scalar_type() == ScalarType::Byte && t.dim() == dims;
  };
  MXT_CHECK(is_bytes(data, 2), op, name, " data must be uint8 with 2 dimensions, got ",
            dtype_name(data.scalar_type()), " (shape ", shape_of(data),
            "). Pass what quantize returned.");
  const bool in_tiles = tiles_too && is_bytes(scale, 3);
  MXT_CHECK(in_tiles || is_bytes(scale, 2), op, name, " scale must be uint8 with 2 dimensions",
            tiles_too ? ", or 3 where it is swizzled" : "", ", got ",
            dtype_name(scale.scalar_type()), " (shape ", shape_of(scale), "). ",
            tiles_too ? "Pass what quantize returned." : "Unswizzle a swizzled scale first.");
  check_sizes(op, name, data);
  const int64_t rows = data.size(0), kp = data.size(1) * 8 / f.bits;
  MXT_CHECK(data.size(1) > 0 && f.bytes(kp) == data.size(1) && kp % f.block == 0, op, name,
            " data must hold whole blocks of ", f.block, " codes of ", f.bits,
            " bits, got rows of ", data.size(1), " bytes (format ", f.name, "). Check the format.");
  const int64_t blocks = kp / f.block, row_tiles = tiles(rows, kTileRows),
                col_tiles = tiles(blocks, kTileCols);
  MXT_CHECK(!in_tiles || (scale.size(0) == row_tiles && scale.size(1) == col_tiles &&
                          scale.size(2) == kTileBytes),
            op, name, " scale must have shape [", row_tiles, ", ", col_tiles, ", ", kTileBytes,
            "] where it is swizzled, got ", shape_of(scale), " (format ", f.name, ", data ",
            shape_of(data), "). Pass what swizzle_scale made of ", rows, " x ", blocks,
            " scales; it pads them to 128 rows and 4 columns.");
  MXT_CHECK(in_tiles || (scale.size(0) == rows && scale.size(1) == blocks), op, name,
            " scale must have shape [", rows, ", ", blocks, "], got ", shape_of(scale), " (format ",
            f.name, ", data ", shape_of(data), "). Check the format.");
  check_same_device(op, "scale", scale, data);
  const bool has_scale = tensor_scale && tensor_scale->numel() > 0;
  MXT_CHECK(has_scale == f.e4m3_scale, op, name, " tensor_scale must be ",
            f.e4m3_scale ? "given" : "absent", ", got ",
            has_scale ? shape_of(*tensor_scale) : "None", " (format ", f.name,
            "). Only nvfp4 has one.");
  if (has_scale) {
    MXT_CHECK(tensor_scale->scalar_type() == ScalarType::Float && tensor_scale->numel() == 1, op,
              name, " tensor_scale must be one float32, got ",
              dtype_name(tensor_scale->scalar_type()), " (shape ", shape_of(*tensor_scale),
              "). Pass what quantize returned.");
    check_same_device(op, "tensor_scale", *tensor_scale, data);
  }
  return {rows, kp};
}

void check_logical_cols(const char* op, int64_t cols, const PackedShape& shape, int64_t format) {
  const FormatInfo& f = kFormats[format];
  MXT_CHECK(cols > shape.kp - f.block && cols <= shape.kp, op,
            "cols must lie in the last block of the operand, got ", cols, " (rows of ", shape.kp,
            " codes, format ", f.name, "). Pass the operand's logical K.");
}

}  // namespace mxtrain
