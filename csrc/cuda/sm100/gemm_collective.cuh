// SPDX-License-Identifier: Apache-2.0
// A block-scaled GEMM out of CUTLASS's collectives (3.x API): TMA loads of codes and scale tiles,
// tcgen05.cp of the scales and tcgen05.mma with block_scale, both by one elected thread, an
// epilogue out of tensor memory and TMA stores. Here is only what is chosen: types, tile, epilogue.
//   layout    A and B K-major, codes packed as docs/layouts.md has them; scales in 128x4 tiles
//   epilogue  ((acc * ta) * tb) * alpha + bias in float32, in the order of cuda/elementwise.cu,
//             then rounded to the output's type to nearest
//   ragged    TMA fills with zeros what lies outside A and B and leaves out what lies outside D;
//             bias is read element by element below n
//   NaN       a scale of 255 (E8M0) makes its block's products NaN, by the instruction itself
#pragma once

#include "cuda/sm100/gemm_instances.h"
#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"

namespace mxtrain::cuda::sm100 {

// What a format is to CUTLASS: the pair of element and scale type, the elements of 16 bytes, the
// K of a tile (128 bytes of a row), and the schedules that name its instruction.
struct Mxfp4 {
  using Element = cutlass::mx_float4_t<cutlass::float_e2m1_t>;
  static constexpr int kAlignment = 32, kTileK = 256;
  using PairSchedule = cutlass::gemm::KernelTmaWarpSpecialized2SmMxf4Sm100;
  using SingleSchedule = cutlass::gemm::KernelTmaWarpSpecialized1SmMxf4Sm100;
};
struct Nvfp4 {
  using Element = cutlass::nv_float4_t<cutlass::float_e2m1_t>;
  static constexpr int kAlignment = 32, kTileK = 256;
  using PairSchedule = cutlass::gemm::KernelTmaWarpSpecialized2SmNvf4Sm100;
  using SingleSchedule = cutlass::gemm::KernelTmaWarpSpecialized1SmNvf4Sm100;
};
struct Mxfp8 {
  using Element = cutlass::type_erased_dynamic_mx_float8_t;
  static constexpr int kAlignment = 16, kTileK = 128;
  using PairSchedule = cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100;
  using SingleSchedule = cutlass::gemm::KernelTmaWarpSpecialized1SmMxf8f6f4Sm100;
};

template <class Format, bool kPair>
struct Collective {
  using Out = cute::conditional_t<kPair, cutlass::bfloat16_t, float>;
  // Per multiprocessor 128 rows; of a pair, 256 columns.
  using TileShape = cute::Shape<cute::Int<kPair ? 256 : 128>, cute::Int<kPair ? 256 : 128>,
                                cute::Int<Format::kTileK>>;
  using CtaTile = cute::Shape<cute::_128, cute::Int<kPair ? 256 : 128>, cute::Int<Format::kTileK>>;
  using Cluster = cute::Shape<cute::Int<kPair ? 2 : 1>, cute::_1, cute::_1>;
  using Row = cutlass::layout::RowMajor;
  using Column = cutlass::layout::ColumnMajor;
  static constexpr int kOutAlignment = 128 / cutlass::sizeof_bits<Out>::value;

  template <template <class> class Op, class To, class... Inputs>
  using Compute = cutlass::epilogue::fusion::Sm90EVT<
      cutlass::epilogue::fusion::Sm90Compute<Op, To, float,
                                             cutlass::FloatRoundStyle::round_to_nearest>,
      Inputs...>;
  using Scalar = cutlass::epilogue::fusion::Sm90ScalarBroadcast<float>;
  using Bias = cutlass::epilogue::fusion::Sm90RowBroadcast<0, CtaTile, float>;
  using Accumulator = cutlass::epilogue::fusion::Sm90AccFetch;
  using TimesA = Compute<cutlass::multiplies, float, Accumulator, Scalar>;
  using TimesB = Compute<cutlass::multiplies, float, TimesA, Scalar>;
  using Epilogue = Compute<cutlass::homogeneous_multiply_add, Out, TimesB, Scalar, Bias>;

  using EpilogueSchedule = cute::conditional_t<kPair, cutlass::epilogue::TmaWarpSpecialized2Sm,
                                               cutlass::epilogue::TmaWarpSpecialized1Sm>;
  // What a warp has in registers at a time; CUTLASS's own choice for the pair, 128 columns, spills.
  using EpilogueTile = cute::Shape<cute::_128, cute::_64>;
  using CollectiveEpilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, TileShape, Cluster,
      EpilogueTile, float, float, void, Row, kOutAlignment, Out, Row, kOutAlignment,
      EpilogueSchedule, Epilogue>::CollectiveOp;
  using Schedule =
      cute::conditional_t<kPair, typename Format::PairSchedule, typename Format::SingleSchedule>;
  using CollectiveMainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm100, cutlass::arch::OpClassBlockScaledTensorOp, typename Format::Element,
      Row, Format::kAlignment, typename Format::Element, Column, Format::kAlignment, float,
      TileShape, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename CollectiveEpilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>,
                                                      CollectiveMainloop, CollectiveEpilogue>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  using Arguments = typename Gemm::Arguments;

  static Arguments arguments(const GemmParams& p, int device, int multiprocessors) {
    const auto shape =
        cute::make_shape(static_cast<int>(p.m), static_cast<int>(p.n), static_cast<int>(p.k), 1);
    using Scales = typename CollectiveMainloop::Sm1xxBlkScaledConfig;
    Arguments args = {};
    args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    args.problem_shape = shape;
    auto& in = args.mainloop;
    in.ptr_A = static_cast<decltype(in.ptr_A)>(p.a);
    in.ptr_B = static_cast<decltype(in.ptr_B)>(p.b);
    in.dA = {p.k, cute::_1{}, 0};
    in.dB = {p.k, cute::_1{}, 0};
    in.ptr_SFA = static_cast<decltype(in.ptr_SFA)>(p.a_scale);
    in.ptr_SFB = static_cast<decltype(in.ptr_SFB)>(p.b_scale);
    in.layout_SFA = Scales::tile_atom_to_shape_SFA(shape);
    in.layout_SFB = Scales::tile_atom_to_shape_SFB(shape);
    auto& out = args.epilogue;
    out.thread = {{{{}, {{1.0f}, {p.a_tensor_scale}}, {}}, {{1.0f}, {p.b_tensor_scale}}, {}},
                  {{p.alpha}, {nullptr}},
                  {p.bias, 0.0f},
                  {}};
    out.ptr_D = static_cast<Out*>(p.out);
    out.dD = {p.pitch, cute::_1{}, 0};
    args.hw_info.device_id = device;
    args.hw_info.sm_count = multiprocessors;
    return args;
  }
};

// Whether CUTLASS takes the sizes. It has n stand for the pitch of D, which here is its own.
template <class C>
bool takes(const GemmParams& p) {
  GemmParams whole = p;
  whole.n = p.pitch;
  const typename C::Arguments args = C::arguments(whole, 0, 1);
  // Neither this scheduler nor this epilogue works in memory of its own.
  return C::Gemm::can_implement(args) == cutlass::Status::kSuccess &&
         C::Gemm::get_workspace_size(args) == 0;
}

inline cudaError_t error_or(cudaError_t otherwise) {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? otherwise : error;
}

// edit(arguments): what a format has to add. A null out only asks whether the sizes are taken.
template <class Format, bool kPair, class Edit>
cudaError_t launch_collective(const GemmParams& p, cudaStream_t stream, Edit edit) {
  using C = Collective<Format, kPair>;
  if (!takes<C>(p)) return cudaErrorInvalidValue;
  if (!p.out) return cudaSuccess;
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  typename C::Arguments args = C::arguments(p, device, multiprocessors);
  edit(args);
  typename C::Gemm gemm;
  if (gemm.initialize(args, nullptr, stream) != cutlass::Status::kSuccess)
    return error_or(cudaErrorInvalidValue);
  if (gemm.run(stream) != cutlass::Status::kSuccess) return error_or(cudaErrorLaunchFailure);
  return cudaGetLastError();
}

template <class Format, bool kPair>
cudaError_t launch_collective(const GemmParams& p, cudaStream_t stream) {
  return launch_collective<Format, kPair>(p, stream, [](auto&) {});
}

template <bool kPair>
cudaError_t launch_mxfp8(const GemmParams& p, bool e5m2, cudaStream_t stream) {
  using cute::UMMA::MXF8F6F4Format;
  return launch_collective<Mxfp8, kPair>(p, stream, [e5m2](auto& args) {
    args.mainloop.runtime_data_type_a = e5m2 ? MXF8F6F4Format::E5M2 : MXF8F6F4Format::E4M3;
    args.mainloop.runtime_data_type_b = args.mainloop.runtime_data_type_a;
  });
}

}  // namespace mxtrain::cuda::sm100
