// SPDX-License-Identifier: Apache-2.0
// mxtrain._host: the formats' host codecs over numpy arrays, straight from csrc/formats and
// csrc/random, for tests, tools and people who want to look at one value. Everything that trains
// goes through torch.ops.mxtrain instead.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

#include "cuda/code_tile.h"
#include "cuda/split_k.h"
#include "formats/block.h"
#include "formats/layout.h"
#include "ptx/block_scale.h"
#include "random/philox.h"

namespace py = pybind11;
using namespace mxtrain;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Calls f(element struct) for an element format's name.
template <class F>
auto with_element(const std::string& name, const F& f) {
  if (name == "e2m1") return f(E2M1{});
  if (name == "e3m2") return f(E3M2{});
  if (name == "e2m3") return f(E2M3{});
  if (name == "e4m3") return f(E4M3{});
  if (name == "e5m2") return f(E5M2{});
  throw py::value_error(
      "mxtrain::_host: element must be one of e2m1, e3m2, e2m3, e4m3, e5m2, got " + name +
      " (a name). Choose one of these.");
}

Array<uint8_t> encode_array(const std::string& element, const Array<float>& values) {
  Array<uint8_t> out(std::vector<py::ssize_t>(values.shape(), values.shape() + values.ndim()));
  with_element(element, [&](auto e) {
    for (py::ssize_t i = 0; i < values.size(); ++i) {
      if (!std::isfinite(values.data()[i]))
        throw py::value_error("mxtrain::_host.encode: values must be finite, got " +
                              std::to_string(values.data()[i]) + " (value " + std::to_string(i) +
                              "). Replace it first.");
      out.mutable_data()[i] = static_cast<uint8_t>(encode_nearest<decltype(e)>(values.data()[i]));
    }
  });
  return out;
}

Array<float> decode_array(const std::string& element, const Array<uint8_t>& codes) {
  Array<float> out(std::vector<py::ssize_t>(codes.shape(), codes.shape() + codes.ndim()));
  with_element(element, [&](auto e) {
    for (py::ssize_t i = 0; i < codes.size(); ++i)
      out.mutable_data()[i] = decode<decltype(e)>(codes.data()[i]);
  });
  return out;
}

Array<uint8_t> scale_codes(const std::string& element, const Array<float>& block_max, int rule) {
  if (rule < 0 || rule >= kScaleRules)
    throw py::value_error("mxtrain::_host.e8m0_scale: rule must be a known code, got " +
                          std::to_string(rule) + " (known: 0 to " +
                          std::to_string(kScaleRules - 1) +
                          "). Take it from mxtrain.formats.SCALE_RULES.");
  Array<uint8_t> out(
      std::vector<py::ssize_t>(block_max.shape(), block_max.shape() + block_max.ndim()));
  with_element(element, [&](auto e) {
    for (py::ssize_t i = 0; i < block_max.size(); ++i) {
      const uint32_t bits = float_bits(block_max.data()[i]);
      if (bits >= kInfBits)
        throw py::value_error(
            "mxtrain::_host.e8m0_scale: block_max must be finite and not negative, got " +
            std::to_string(block_max.data()[i]) + " (value " + std::to_string(i) +
            "). Pass the largest magnitude of each block.");
      out.mutable_data()[i] = static_cast<uint8_t>(
          e8m0_scale<decltype(e)>(bits, e8m0_round_up<decltype(e)>(static_cast<ScaleRule>(rule))));
    }
  });
  return out;
}

Array<float> scale_values(const Array<uint8_t>& codes) {
  Array<float> out(std::vector<py::ssize_t>(codes.shape(), codes.shape() + codes.ndim()));
  for (py::ssize_t i = 0; i < codes.size(); ++i)
    out.mutable_data()[i] = e8m0_value(codes.data()[i]);
  return out;
}

py::tuple philox(const std::array<uint32_t, 4>& counter, const std::array<uint32_t, 2>& key) {
  const Philox4 w = philox4x32({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  return py::make_tuple(w.w[0], w.w[1], w.w[2], w.w[3]);
}

// The same by a schedule, for counters (group, 0, offset, stream).
py::tuple scheduled_philox(uint32_t group, uint32_t offset, uint32_t stream,
                           const std::array<uint32_t, 2>& key) {
  const uint64_t seed = static_cast<uint64_t>(key[1]) << 32 | key[0];
  const Philox4 w = philox_group(philox_schedule(seed, offset, stream), group);
  return py::make_tuple(w.w[0], w.w[1], w.w[2], w.w[3]);
}

// The plan of a product, and what each thread block does by it: (tile, first stage, end).
py::dict split_k(int64_t m, int64_t n, int64_t k, int multiprocessors) {
  const cuda::SplitK split = cuda::plan_split(m, n, k, multiprocessors);
  const int tiles = static_cast<int>(cuda::split_k::tiles_of(m, n, 1)),
            k_blocks = cuda::split_k::stages_of(k);
  py::list segments;
  for (int slab = 0; split.slabs > 1 && slab < tiles * split.slabs; ++slab) {
    const cuda::Segment s = split.segment(slab, k_blocks);
    segments.append(py::make_tuple(s.tile, s.begin, s.end));
  }
  py::dict plan;
  plan["slabs"] = split.slabs;
  plan["tiles"] = tiles;
  plan["segments"] = segments;
  return plan;
}

// Byte offsets in a tile of requantize_codes.cu, by the names of CodeTile's functions.
py::dict code_tile() {
  using Tile = cuda::CodeTile;
  const auto table = [](std::vector<py::ssize_t> shape, const auto& at) {
    Array<int> out(shape);
    const uint32_t last = static_cast<uint32_t>(shape.back()),
                   middle = shape.size() > 2 ? static_cast<uint32_t>(shape[1]) : 1;
    for (uint32_t i = 0; i < out.size(); ++i)
      out.mutable_data()[i] = static_cast<int>(at(i / last / middle, i / last % middle, i % last));
    return out;
  };
  py::dict tile;
  tile["chunk"] = table({Tile::kRows, Tile::kChunks}, [](uint32_t row, uint32_t, uint32_t chunk) {
    return Tile::chunk(row, chunk);
  });
  tile["column"] = table({Tile::kBands, 32, Tile::kLaneColumns}, &Tile::column);
  tile["stored"] =
      table({Tile::kThreads, Tile::kStores}, [](uint32_t thread, uint32_t, uint32_t i) {
        return Tile::stored_further(Tile::stored(thread), i);
      });
  tile["block_scale"] = table({Tile::kBands, 32, Tile::kLaneColumns}, &Tile::block_scale);
  tile["scaled_column"] = table({Tile::kColumns, 1}, [](uint32_t word, uint32_t, uint32_t) {
    return Tile::scaled_column(word);
  });
  return tile;
}

// Row and k (column, for "d") of every code (value) that a lane holds.
Array<int> fragment_table(const std::string& factor, int per_word) {
  const bool a = factor == "a", b = factor == "b";
  if ((!a && !b && factor != "d") || (per_word != 4 && per_word != 8))
    throw py::value_error(
        "mxtrain::_host.fragment_table: factor and per_word must be a, b or d and 4 or 8, got " +
        factor + " and " + std::to_string(per_word) +
        " (32 / bits codes lie in a word). Pass one of these.");
  const int words = b ? 2 : 4, codes = a || b ? per_word : 1;
  Array<int> out(std::vector<py::ssize_t>{32, words, codes, 2});
  auto at = out.mutable_unchecked<4>();
  for (int lane = 0; lane < 32; ++lane)
    for (int word = 0; word < words; ++word)
      for (int e = 0; e < codes; ++e) {
        at(lane, word, e, 0) = a   ? ptx::row_of_a(lane, word)
                               : b ? ptx::row_of_b(lane)
                                   : ptx::row_of_d(lane, word);
        at(lane, word, e, 1) = a   ? ptx::k_of_a(lane, word, per_word) + e
                               : b ? ptx::k_of_b(lane, word, per_word) + e
                                   : ptx::column_of_d(lane, word);
      }
  return out;
}

// A warp as the arrays of its lanes' registers.
struct RecordedWarp {
  const Array<uint32_t>&codes_a, &codes_b, &scales_a, &scales_b;
  uint32_t a(int word, int lane) const { return codes_a.data()[4 * lane + word]; }
  uint32_t b(int word, int lane) const { return codes_b.data()[2 * lane + word]; }
  uint32_t scale_a(int lane) const { return scales_a.data()[lane]; }
  uint32_t scale_b(int lane) const { return scales_b.data()[lane]; }
};

Array<float> mma_block_scale(int format, const std::array<int, 4>& selectors,
                             const Array<uint32_t>& a, const Array<uint32_t>& b,
                             const Array<uint32_t>& scale_a, const Array<uint32_t>& scale_b,
                             const Array<float>& c) {
  const bool sized = a.size() == 128 && b.size() == 64 && scale_a.size() == 32 &&
                     scale_b.size() == 32 && c.size() == 128;
  const bool served = format >= 0 && format < kFormatCount && kFormats[format].bits != 6;
  const ptx::ScaleSelectors s = {selectors[0], selectors[1], selectors[2], selectors[3]};
  const int scales = served ? 256 / kFormats[format].bits / kFormats[format].block : 1;
  if (!sized || !served || !ptx::is_legal(s, scales))
    throw py::value_error(
        "mxtrain::_host.mma_block_scale: the arguments must be what one instruction takes, got "
        "others (format " +
        std::to_string(format) + "). csrc/ptx/block_scale.h says what that is.");
  Array<float> d(std::vector<py::ssize_t>{32, 4});
  const auto run = [&](auto f) {
    for (int lane = 0; lane < 32; ++lane)
      ptx::block_scale_product<decltype(f)>(RecordedWarp{a, b, scale_a, scale_b}, lane, s,
                                            c.data() + 4 * lane, d.mutable_data() + 4 * lane);
  };
  const FormatInfo& info = kFormats[format];
  if (info.bits == 4 && info.e4m3_scale) run(Nvfp4{});
  if (info.bits == 4 && !info.e4m3_scale) run(Mxfp4{});
  if (info.bits == 8 && info.man_bits == 3) run(Mxfp8E4M3{});
  if (info.bits == 8 && info.man_bits == 2) run(Mxfp8E5M2{});
  return d;
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host codecs of mxtrain's formats over numpy arrays.";
  m.def("encode", &encode_array, py::arg("element"), py::arg("values"),
        "Round float32 values to the nearest code of an element format ('e2m1', ...), ties to "
        "even, saturating. uint8, same shape.");
  m.def("decode", &decode_array, py::arg("element"), py::arg("codes"),
        "Values of an element format's codes. float32, same shape.");
  m.def("e8m0_scale", &scale_codes, py::arg("element"), py::arg("block_max"), py::arg("rule"),
        "E8M0 scale codes from block maxima for an element format; rule 0 floor, 1 ceil, 2 even. "
        "uint8, same shape.");
  m.def("e8m0_decode", &scale_values, py::arg("codes"),
        "Values of E8M0 codes. float32, same shape.");
  m.def("philox4x32", &philox, py::arg("counter"), py::arg("key"),
        "One Philox4x32-7 block: 4 words from a counter of 4 and a key of 2.");
  m.def("scheduled_philox", &scheduled_philox, py::arg("group"), py::arg("offset"),
        py::arg("stream"), py::arg("key"),
        "The block of counter (group, 0, offset, stream) as the CUDA kernels make it, from keys "
        "with a part of the rounds folded in.");
  m.def("split_k", &split_k, py::arg("m"), py::arg("n"), py::arg("k"), py::arg("multiprocessors"),
        "How gemm's fold backend shares out a product on Hopper whose tiles are too few.");
  m.def("code_tile", &code_tile,
        "Where requantize's kernel for mxfp4 keeps a tile in shared memory: byte offsets.");
  m.def("swizzled_offset", &swizzled_offset, py::arg("row"), py::arg("col"), py::arg("col_tiles"),
        "Byte offset of scale (row, col) in the 128x4 tile layout.");
  m.def("fragment_table", &fragment_table, py::arg("factor"), py::arg("per_word"),
        "Row and k (of 'd': row and column) of each code that each lane holds of a warp's product, "
        "int [32, words, codes, 2].");
  m.def("scale_lane", [](const std::string& factor, int row, int thread) {
    return factor == "a" ? ptx::lane_of_scale_a(row, thread) : ptx::lane_of_scale_b(row, thread);
  });
  m.def("mma_block_scale", &mma_block_scale, py::arg("format"), py::arg("selectors"), py::arg("a"),
        py::arg("b"), py::arg("scale_a"), py::arg("scale_b"), py::arg("c"),
        "The emulation of one block-scaled mma.sync: the registers of 32 lanes, and the selectors "
        "(byte_a, thread_a, byte_b, thread_b). float32 [32, 4].");
}
