// SPDX-License-Identifier: Apache-2.0
// One optimizer step over a list of tensors: AdamW or Q-Ramping (optim/adamw.h), the average of the
// weights and the sums of their changes, each array read and written once.
// A first kernel, a thread a tensor, counts the step and makes its factors; Q-Ramping then looks
// for non-finite gradients. The update takes up to kTensors tensors a launch: a CTA finds its
// tensor by its number, a thread takes 8 consecutive elements, with 16-byte accesses where
// addresses allow. Four lanes hold a block of 32 for the statistics; rows are padded to whole
// blocks, unread. bfloat16 weights round as stochastic_round does.
#include "cuda/group.cuh"
#include "cuda/launch.cuh"
#include "cuda/optimizer.h"
#include "cuda/store.cuh"
#include "random/philox.h"

namespace mxtrain::cuda {

// ---- traits ----

struct OptimizerTraits {
  static constexpr int kThreads = 256;
  static constexpr int kTensors = 32;  // of one launch
  static constexpr int kElements = kThreads * 8;
};

struct AdamwLaunch {
  AdamwTensor tensors[OptimizerTraits::kTensors];
  unsigned first_cta[OptimizerTraits::kTensors + 1];
  int count;
  AdamwOptions options;
  const double* lr;
  const int64_t* rng;
  WeightQuantizer quantizer;
  AdamwRow* rows;
};
static_assert(sizeof(AdamwLaunch) <= 4096, "the kernel parameters that every driver takes");

enum class Extra : int { kNone, kStatistics, kRamp8, kRamp16 };

// ---- loads and stores ----

template <class Source>
__device__ __forceinline__ void load8(const void* from, int64_t at, bool vector, int valid,
                                      float (&v)[8]) {
  const auto* p = static_cast<const typename Source::Type*>(from) + at;
  if (vector) {
    uint4 raw[Source::kVectors];
#pragma unroll
    for (int i = 0; i < Source::kVectors; ++i) raw[i] = reinterpret_cast<const uint4*>(p)[i];
    Source::unpack(raw, v);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < valid ? Source::widen(p[i]) : 0.0f;
  }
}

// Counts of 1 or 2 bytes, in one word or vector of words.
template <class Count>
__device__ __forceinline__ void load_counts8(const void* from, int64_t at, bool vector, int valid,
                                             int (&v)[8]) {
  constexpr int kPerWord = 4 / sizeof(Count), kBits = 8 * sizeof(Count);
  const Count* p = static_cast<const Count*>(from) + at;
  if (vector) {
    uint32_t w[8 / kPerWord];
#pragma unroll
    for (int i = 0; i < 8 / kPerWord; i += 2) {
      const uint2 two = reinterpret_cast<const uint2*>(p)[i / 2];
      w[i] = two.x;
      w[i + 1] = two.y;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i)
      v[i] = static_cast<Count>(w[i / kPerWord] >> (i % kPerWord * kBits));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = i < valid ? p[i] : 1;
  }
}

template <class Count>
__device__ __forceinline__ void store_counts8(void* to, int64_t at, bool vector, int valid,
                                              const int (&v)[8]) {
  constexpr int kPerWord = 4 / sizeof(Count), kBits = 8 * sizeof(Count);
  Count* p = static_cast<Count*>(to) + at;
  if (vector) {
    uint32_t w[8 / kPerWord] = {};
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i / kPerWord] |= v[i] << (i % kPerWord * kBits);
#pragma unroll
    for (int i = 0; i < 8 / kPerWord; i += 2)
      reinterpret_cast<uint2*>(p)[i / 2] = make_uint2(w[i], w[i + 1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < valid) p[i] = static_cast<Count>(v[i]);
  }
}

// The draws of elements at..at + 7; a row of the statistics may start within a quarter.
__device__ __forceinline__ void draw8(const int64_t* rng, int64_t at, uint32_t (&draws)[8]) {
  const PhiloxKey key = {static_cast<uint64_t>(rng[0]), static_cast<uint32_t>(rng[1]), kRowStream};
  const uint64_t quarter = static_cast<uint64_t>(at) / kDrawQuarter;
  const int skipped = static_cast<int>(at % kDrawQuarter);
  const Philox4 words = philox_quarter(key, quarter);
#pragma unroll
  for (int i = 0; i < 8; ++i) draws[i] = draw16(words, i);
  if (skipped == 0) return;
  const Philox4 more = philox_quarter(key, quarter + 1);
  for (int shifts = 0; shifts < skipped; ++shifts) {
#pragma unroll
    for (int i = 0; i < 7; ++i) draws[i] = draws[i + 1];
    const uint32_t word =
        shifts & 4 ? (shifts & 2 ? more.w[3] : more.w[2]) : (shifts & 2 ? more.w[1] : more.w[0]);
    draws[7] = (word >> (16 * (shifts & 1))) & 0xFFFFu;
  }
}

// bfloat16: w becomes what is stored.
template <class Source>
__device__ __forceinline__ void store_weights8(const AdamwTensor& t, const int64_t* rng, int64_t at,
                                               bool vector, int valid, float (&w)[8]) {
  if (!std::is_same_v<Source, Bfloat16Source>)
    return store_floats8<FloatType::kFloat32>(t.param, at, w, vector, valid);
  if (rng) {
    uint32_t draws[8];
    draw8(rng, at, draws);
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = bf16_to_float(float_to_bf16_stochastic(w[i], draws[i]));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = bf16_to_float(float_to_bf16(w[i]));
  }
  store_floats8<FloatType::kBfloat16>(t.param, at, w, vector, valid);
}

// ---- kernels ----

__global__ void __launch_bounds__(OptimizerTraits::kTensors)
    adamw_factors_kernel(const __grid_constant__ AdamwLaunch p) {
  const int i = threadIdx.x;
  if (i >= p.count) return;
  AdamwOptions options = p.options;
  if (p.lr) options.lr = *p.lr;
  float* step = p.tensors[i].step;
  p.rows[i] = {adamw_factors(options, *step += 1.0f), 0};
}

// What a thread works on.
struct Place {
  int tensor;
  int64_t at;  // of 8 elements
  int valid;   // of these that exist
};

__device__ __forceinline__ Place find_place(const AdamwLaunch& p) {
  Place place = {};
#pragma unroll
  for (int half = OptimizerTraits::kTensors / 2; half > 0; half /= 2)
    if (place.tensor + half < p.count && p.first_cta[place.tensor + half] <= blockIdx.x)
      place.tensor += half;
  const AdamwTensor& t = p.tensors[place.tensor];
  const int64_t group =
      static_cast<int64_t>(blockIdx.x - p.first_cta[place.tensor]) * OptimizerTraits::kThreads +
      threadIdx.x;
  place.at = group * 8;
  int64_t end = t.n;
  if (t.cols != t.n) {
    const int64_t groups = (t.cols + 31) / 32 * 4, row = group / groups;
    place.at = row * t.cols + (group - row * groups) * 8;
    end = min((row + 1) * t.cols, t.n);
  }
  place.valid = static_cast<int>(max(min(end - place.at, int64_t{8}), int64_t{0}));
  return place;
}

template <class Source>
__global__ void __launch_bounds__(OptimizerTraits::kThreads)
    nonfinite_kernel(const __grid_constant__ AdamwLaunch p) {
  const Place at = find_place(p);
  const AdamwTensor& t = p.tensors[at.tensor];
  float g[8];
  load8<Source>(t.grad, at.at, t.vector && at.valid == 8, at.valid, g);
  if (amax_bits8(g) >= kInfBits) p.rows[at.tensor].nonfinite = 1;  // all who write, write the same
}

__device__ __forceinline__ uint32_t block_max(const float (&v)[8]) {
  uint32_t bits = amax_bits8(v);
  bits = max(bits, __shfl_xor_sync(kAllLanes, bits, 1));
  return max(bits, __shfl_xor_sync(kAllLanes, bits, 2));
}

// *_change += |before - after|, of the weights and of what the forward pass makes of them.
__device__ __forceinline__ void add_changes8(const AdamwLaunch& p, const AdamwTensor& t,
                                             const Place& at, bool vector, const float (&w)[8],
                                             const float (&e)[8], const float (&after)[8],
                                             const float (&e_after)[8]) {
  const uint32_t bits = block_max(w), e_bits = block_max(e);
  const uint32_t bits_after = block_max(after), e_bits_after = block_max(e_after);
  float moved[8], flipped[8];
  load8<Float32Source>(t.weight_change, at.at, vector, at.valid, moved);
  load8<Float32Source>(t.quantized_change, at.at, vector, at.valid, flipped);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float q = quantized_weight(w[i], e[i], bits, e_bits, p.quantizer);
    const float r = quantized_weight(after[i], e_after[i], bits_after, e_bits_after, p.quantizer);
    moved[i] += fabsf(after[i] - w[i]);
    flipped[i] += fabsf(r - q);
  }
  store_floats8<FloatType::kFloat32>(t.weight_change, at.at, moved, vector, at.valid);
  store_floats8<FloatType::kFloat32>(t.quantized_change, at.at, flipped, vector, at.valid);
}

template <class Count>
__device__ __forceinline__ void ramp8(const AdamwTensor& t, const AdamwRow& row, const Place& at,
                                      bool vector, const float (&g)[8], float (&w)[8],
                                      float (&m)[8], float (&v)[8]) {
  float sum[8];
  int count[8], period[8];
  load8<Float32Source>(t.grad_sum, at.at, vector, at.valid, sum);
  load_counts8<Count>(t.count, at.at, vector, at.valid, count);
  load_counts8<Count>(t.period, at.at, vector, at.valid, period);
#pragma unroll
  for (int i = 0; i < 8; ++i)
    ramped_update(g[i], !row.nonfinite, period[i], row.factors, w[i], m[i], v[i], sum[i], count[i]);
  store_floats8<FloatType::kFloat32>(t.grad_sum, at.at, sum, vector, at.valid);
  store_counts8<Count>(t.count, at.at, vector, at.valid, count);
}

// One thread's elements. kVector: all 8, with 16-byte accesses.
template <class Source, Extra kExtra, bool kVector>
__device__ __forceinline__ void update8(const AdamwLaunch& p, const Place& at) {
  const AdamwTensor& t = p.tensors[at.tensor];
  const int valid = kVector ? 8 : at.valid;
  float w[8], g[8], m[8], v[8], e[8] = {};
  load8<Source>(t.param, at.at, kVector, valid, w);
  load8<Source>(t.grad, at.at, kVector, valid, g);
  load8<Float32Source>(t.exp_avg, at.at, kVector, valid, m);
  load8<Float32Source>(t.exp_avg_sq, at.at, kVector, valid, v);
  if (t.ema) load8<Float32Source>(t.ema, at.at, kVector, valid, e);
  const AdamwRow row = p.rows[at.tensor];

  float after[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) after[i] = w[i];
  if constexpr (kExtra == Extra::kRamp8) ramp8<uint8_t>(t, row, at, kVector, g, after, m, v);
  if constexpr (kExtra == Extra::kRamp16) ramp8<int16_t>(t, row, at, kVector, g, after, m, v);
  if constexpr (kExtra == Extra::kNone || kExtra == Extra::kStatistics)
#pragma unroll
    for (int i = 0; i < 8; ++i) adamw_update(g[i], row.factors, after[i], m[i], v[i]);

  const int64_t* rng = p.rng ? p.rng + 2 * at.tensor : nullptr;
  store_weights8<Source>(t, rng, at.at, kVector, valid, after);
  store_floats8<FloatType::kFloat32>(t.exp_avg, at.at, m, kVector, valid);
  store_floats8<FloatType::kFloat32>(t.exp_avg_sq, at.at, v, kVector, valid);
  float e_after[8] = {};
  if (t.ema) {
#pragma unroll
    for (int i = 0; i < 8; ++i) e_after[i] = lerp(e[i], after[i], t.ema_weight);
    store_floats8<FloatType::kFloat32>(t.ema, at.at, e_after, kVector, valid);
  }
  if constexpr (kExtra == Extra::kStatistics) {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i >= valid) after[i] = e_after[i] = 0.0f;
    add_changes8(p, t, at, kVector, w, e, after, e_after);
  }
}

template <class Source, Extra kExtra>
__global__ void __launch_bounds__(OptimizerTraits::kThreads)
    adamw_kernel(const __grid_constant__ AdamwLaunch p) {
  const Place at = find_place(p);
  // A warp takes one way, for the shuffles of the statistics.
  if (__all_sync(kAllLanes, p.tensors[at.tensor].vector && at.valid == 8))
    update8<Source, kExtra, true>(p, at);
  else
    update8<Source, kExtra, false>(p, at);
}

// ---- launchers ----

template <class Source>
static cudaError_t launch_update(const AdamwLaunch& p, unsigned grid, cudaStream_t stream) {
  constexpr int kThreads = OptimizerTraits::kThreads;
  const AdamwTensor& t = p.tensors[0];
  if (t.ramped) {
    const cudaError_t error = launch(nonfinite_kernel<Source>, grid, kThreads, stream, p);
    if (error != cudaSuccess) return error;
    return t.wide ? launch(adamw_kernel<Source, Extra::kRamp16>, grid, kThreads, stream, p)
                  : launch(adamw_kernel<Source, Extra::kRamp8>, grid, kThreads, stream, p);
  }
  return t.statistics ? launch(adamw_kernel<Source, Extra::kStatistics>, grid, kThreads, stream, p)
                      : launch(adamw_kernel<Source, Extra::kNone>, grid, kThreads, stream, p);
}

cudaError_t launch_adamw(const AdamwParams& params, cudaStream_t stream) {
  constexpr int64_t kTensors = OptimizerTraits::kTensors;
  for (int64_t first = 0; first < params.count; first += kTensors) {
    AdamwLaunch p = {};
    p.count = static_cast<int>(params.count - first < kTensors ? params.count - first : kTensors);
    p.options = params.options;
    p.lr = params.lr;
    p.rng = params.rng ? params.rng + 2 * first : nullptr;
    p.quantizer = params.quantizer;
    p.rows = params.rows + first;
    for (int i = 0; i < p.count; ++i) {
      const AdamwTensor& t = p.tensors[i] = params.tensors[first + i];
      const int64_t rows = t.cols == t.n || t.n == 0 ? 1 : t.n / t.cols;
      const int64_t padded = t.cols == t.n ? t.n : (t.cols + 31) / 32 * 32;
      const int64_t ctas =
          (rows * padded + OptimizerTraits::kElements - 1) / OptimizerTraits::kElements;
      p.first_cta[i + 1] = p.first_cta[i] + static_cast<unsigned>(ctas);
    }
    const cudaError_t error = launch(adamw_factors_kernel, 1, OptimizerTraits::kTensors, stream, p);
    if (error != cudaSuccess) return error;
    const unsigned grid = p.first_cta[p.count];
    if (grid == 0) continue;
    const cudaError_t update = p.tensors[0].bf16 ? launch_update<Bfloat16Source>(p, grid, stream)
                                                 : launch_update<Float32Source>(p, grid, stream);
    if (update != cudaSuccess) return update;
  }
  return cudaSuccess;
}

}  // namespace mxtrain::cuda
