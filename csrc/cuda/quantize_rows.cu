// SPDX-License-Identifier: Apache-2.0
// quantize along rows that are contiguous in memory (or strided in both directions, more slowly):
// operand [rows, kp] from x. A thread takes kGroups groups of 8 elements; consecutive lanes take
// consecutive groups, so loads are 16 bytes a lane and coalesced, a block is 2 or 4 lanes and a
// Hadamard group up to 32 lanes. nvfp4 first finds the tensor's maximum (a second read). Groups
// number the operand row by row; grid.x covers them all. Zero, NaN and Inf blocks: see
// docs/numerics.md.
#include "cuda/group.cuh"
#include "cuda/launch.cuh"

namespace mxtrain::cuda {

// ---- traits ----

struct RowTraits {
  static constexpr int kThreads = 256;
  static constexpr int kGroups =
      4;  // per thread: 64 bytes in flight for 16-bit inputs, enough to cover memory latency
  static constexpr int kGroupsPerCta = kThreads * kGroups;
  static_assert(kGroupsPerCta % 32 == 0, "groups of a block and of a Hadamard group share a warp");
};

// ---- device helpers ----

struct GroupPlace {
  int64_t row, k0;
};

__device__ __forceinline__ GroupPlace place_of(const QuantizeParams& p, int64_t group) {
  const int64_t per_row = p.kp / 8;
  if (p.rows == 1) return {0, group * 8};
  if (per_row <= 0x7FFFFFFF && group <= 0x7FFFFFFF) {
    const uint32_t row = static_cast<uint32_t>(group) / static_cast<uint32_t>(per_row);
    return {row, static_cast<int64_t>(static_cast<uint32_t>(group) -
                                      row * static_cast<uint32_t>(per_row)) *
                     8};
  }
  const int64_t row = group / per_row;
  return {row, (group - row * per_row) * 8};
}

// The group's elements, widened; zeros beyond the row's end. `vector`: 16-byte loads are aligned
// and whole.
template <class Source>
__device__ __forceinline__ void load_raw(const QuantizeParams& p, GroupPlace at, bool vector,
                                         uint4 (&raw)[Source::kVectors]) {
  using Type = typename Source::Type;
  const Type* base = static_cast<const Type*>(p.x) + at.row * p.stride_row + at.k0 * p.stride_k;
  if (vector) {
#pragma unroll
    for (int i = 0; i < Source::kVectors; ++i)
      raw[i] = ptx::ld_global_nc_v4(reinterpret_cast<const uint4*>(base) + i);
    return;
  }
  Type element[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) element[i] = at.k0 + i < p.cols ? base[i * p.stride_k] : Type(0);
  memcpy(raw, element, sizeof element);
}

// Group `first` + `step` of one long row.
template <class Source>
__device__ __forceinline__ void load_flat(const QuantizeParams& p, int64_t first, int step,
                                          uint4 (&raw)[Source::kVectors]) {
  const uint4* base =
      static_cast<const uint4*>(p.x) + first * Source::kVectors + step * Source::kVectors;
#pragma unroll
  for (int i = 0; i < Source::kVectors; ++i) raw[i] = ptx::ld_global_nc_v4(base + i);
}

__device__ __forceinline__ void load_toward(const QuantizeParams& p, GroupPlace at, float (&z)[8]) {
  const int64_t base = at.row * p.toward_stride_row + at.k0 * p.toward_stride_k;
#pragma unroll
  for (int i = 0; i < 8; ++i)
    z[i] =
        at.k0 + i < p.cols ? load_any(p.toward, p.toward_type, base + i * p.toward_stride_k) : 0.0f;
}

// ---- kernels ----

// kFlat: the operand is one long row without padding, so every address is a constant step from the
// thread's first.
template <class Source, class F, Path kPath, bool kFlat>
__global__ void __launch_bounds__(RowTraits::kThreads)
    quantize_rows_kernel(const QuantizeParams p, int64_t groups, bool vector) {
  begin_early();
  constexpr int N = RowTraits::kGroups, kLanes = F::kBlock / 8;
  const int lane = threadIdx.x % 32;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * RowTraits::kGroupsPerCta + threadIdx.x;
  const int left =
      static_cast<int>(min(groups - first, static_cast<int64_t>(RowTraits::kGroupsPerCta)));
  uint4 raw[N][Source::kVectors] = {};
  GroupPlace at[N];
  int64_t group[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
    group[n] = first + n * RowTraits::kThreads;
    if (!kFlat) at[n] = place_of(p, group[n]);
    if (n * RowTraits::kThreads >= left) continue;
    if (kFlat)
      load_flat<Source>(p, first, n * RowTraits::kThreads, raw[n]);
    else
      load_raw<Source>(p, at[n], vector, raw[n]);
  }
  Philox4 draws[N] = {};
  if (kPath == Path::kFloats) {
    const DrawKey key = make_draw_key(p);
    int64_t quarter[N];
#pragma unroll
    for (int n = 0; n < N; ++n)
      quarter[n] =
          kFlat ? group[n] : at[n].row * draw_quarters_of_row<F>(p) + at[n].k0 / kDrawQuarter;
    draw_groups<N>(key, quarter, draws);
  }
  const Rotation rotation = make_rotation(p.hadamard, p.signs, lane);
  const ScaleChooser<F> scales(p);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    Packed8 codes;
    BlockScale s;
    if constexpr (kPath == Path::kPairs) {
      const uint32_t w[4] = {raw[n][0].x, raw[n][0].y, raw[n][0].z, raw[n][0].w};
      codes = quantize_row_pairs(w, scales, s);
    } else {
      float v[8], z[8] = {};
      Source::unpack(raw[n], v);
      transform8(v, p, rotation, lane);
      uint32_t block_max =
          block_amax_bits<F>(rotation.lanes ? amax_bits8(v) : raw_amax_bits8<Source>(raw[n], v));
      if (kPath == Path::kToward) {
        if (n * RowTraits::kThreads < left) load_toward(p, at[n], z);
        transform8(z, p, rotation, lane);
        const uint32_t toward_max = block_amax_bits<F>(amax_bits8(z));
        block_max =
            toward_max >= kInfBits ? toward_max : block_max;  // a poisoned EMA poisons its block
      }
      s = scales.choose(block_max);
      codes = encode_group<F, kPath == Path::kToward>(v, z, s, p, draws[n]);
    }
    if (n * RowTraits::kThreads >= left) continue;
    store_codes<F>(codes_at<F>(p, first) + n * RowTraits::kThreads * F::kBits, codes);
    if (lane % kLanes != 0) continue;
    uint8_t* scale = kFlat ? p.scale + first / kLanes + n * (RowTraits::kThreads / kLanes)
                           : scale_at<F>(p, at[n].row, at[n].k0);
    *scale = static_cast<uint8_t>(s.code);
  }
}

// Largest finite |v| after the transforms, as float bits, into *p.tensor_scale (zeroed before).
template <class Source>
__global__ void __launch_bounds__(RowTraits::kThreads)
    amax_rows_kernel(const QuantizeParams p, int64_t groups, bool vector) {
  const int lane = threadIdx.x % 32;
  const Rotation rotation = make_rotation(p.hadamard, p.signs, lane);
  constexpr int N = RowTraits::kGroups;
  uint32_t m = 0;
  for (int64_t base = static_cast<int64_t>(blockIdx.x) * RowTraits::kGroupsPerCta; base < groups;
       base += static_cast<int64_t>(gridDim.x) * RowTraits::kGroupsPerCta) {
    uint4 raw[N][Source::kVectors] = {};
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const int64_t group = base + n * RowTraits::kThreads + threadIdx.x;
      if (group < groups) load_raw<Source>(p, place_of(p, group), vector, raw[n]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float v[8];
      Source::unpack(raw[n], v);
      transform8(v, p, rotation, lane);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const uint32_t a = float_bits(v[i]) & ~kSignBit;
        m = a < kInfBits ? max(m, a) : m;
      }
    }
  }
  m = __reduce_max_sync(kAllLanes, m);
  if (lane == 0 && m) atomicMax(reinterpret_cast<unsigned*>(p.tensor_scale), m);
}

__global__ void finish_tensor_scale_kernel(float* tensor_scale) {
  *tensor_scale = nvfp4_tensor_scale(*tensor_scale);
}

// ---- launchers ----

cudaError_t launch_finish_tensor_scale(const QuantizeParams& p, cudaStream_t stream) {
  return launch(finish_tensor_scale_kernel, 1, 1, stream, p.tensor_scale);
}

template <class Source>
static bool vector_loads(const QuantizeParams& p) {
  const int64_t size = sizeof(typename Source::Type);
  return p.stride_k == 1 && p.cols == p.kp && reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
         (p.rows == 1 || p.stride_row * size % 16 == 0);
}

template <class Source, class F, bool kFlat>
static cudaError_t launch_layout(const QuantizeParams& p, int64_t groups, bool vector,
                                 unsigned grid, cudaStream_t stream) {
  if constexpr (kHasPairs<Source, F>) {
    if (choose_path<Source, F>(p) == Path::kPairs) {
      return launch_early(quantize_rows_kernel<Source, F, Path::kPairs, kFlat>, grid,
                          RowTraits::kThreads, 0, stream, p, groups, vector);
    }
  }
  return launch_early(quantize_rows_kernel<Source, F, Path::kFloats, kFlat>, grid,
                      RowTraits::kThreads, 0, stream, p, groups, vector);
}

template <class Source, class F>
static cudaError_t launch_path(const QuantizeParams& p, int64_t groups, bool vector, bool flat,
                               unsigned grid, cudaStream_t stream) {
  if (p.toward)
    return launch_early(quantize_rows_kernel<Source, F, Path::kToward, false>, grid,
                        RowTraits::kThreads, 0, stream, p, groups, vector);
  if (flat) return launch_layout<Source, F, true>(p, groups, vector, grid, stream);
  return launch_layout<Source, F, false>(p, groups, vector, grid, stream);
}

template <class Source, class F>
static cudaError_t launch_rows(QuantizeParams p, cudaStream_t stream) {
  // Nothing ends with a row: no padding, no tile of scales, no group of draws.
  const bool whole = vector_loads<Source>(p) && (p.rows == 1 || p.stride_row == p.cols) &&
                     !p.swizzled && !p.toward && p.kp % kDrawGroup == 0;
  if (whole) {  // without padding the operand is one long row: no division per group
    p.cols = p.kp = p.rows * p.cols;
    p.rows = 1;
  }
  const int64_t groups = p.rows * (p.kp / 8);
  const bool vector = vector_loads<Source>(p);
  const unsigned grid =
      static_cast<unsigned>((groups + RowTraits::kGroupsPerCta - 1) / RowTraits::kGroupsPerCta);
  if (F::kE4M3Scale) {
    const unsigned amax_grid = grid < 4096 ? grid : 4096;
    cudaError_t error =
        launch(amax_rows_kernel<Source>, amax_grid, RowTraits::kThreads, stream, p, groups, vector);
    if (error == cudaSuccess) error = launch_finish_tensor_scale(p, stream);
    if (error != cudaSuccess) return error;
  }
  return launch_path<Source, F>(p, groups, vector, whole, grid, stream);
}

template <class Source>
static cudaError_t launch_rows_of(const QuantizeParams& p, cudaStream_t stream) {
  using Launcher = cudaError_t (*)(QuantizeParams, cudaStream_t);
#define MXT_ROW(code, traits, name) launch_rows<Source, traits>,
  static constexpr Launcher kLaunchers[] = {MXT_FORMATS(MXT_ROW)};
#undef MXT_ROW
  return kLaunchers[p.format](p, stream);
}

cudaError_t launch_quantize_rows(const QuantizeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return p.tensor_scale ? launch_finish_tensor_scale(p, stream) : cudaSuccess;
  if (can_strip_rows(p)) return launch_row_strips(p, stream);
  switch (p.x_type) {
    case FloatType::kFloat32:
      return launch_rows_of<Float32Source>(p, stream);
    case FloatType::kBfloat16:
      return launch_rows_of<Bfloat16Source>(p, stream);
    case FloatType::kFloat16:
      return launch_rows_of<Float16Source>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace mxtrain::cuda
