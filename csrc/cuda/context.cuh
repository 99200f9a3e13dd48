// SPDX-License-Identifier: Apache-2.0
// What the kernels of RMSNorm and SwiGLU share: a thread takes chunks of 8 consecutive elements of
// a row, and a half warp, 16 neighbouring chunks, is a group of int10_group. Rows end in whole
// groups, so a half warp is within a row or beyond it, and all its lanes alike.
#pragma once

#include "cuda/context.h"
#include "cuda/group.cuh"
#include "cuda/store.cuh"
#include "formats/context.h"

namespace mxtrain::cuda {

static_assert(kContextRun == 8 && kContextLanes == 16, "a chunk a lane, a group a half warp");

// ---- across a half warp ----

__device__ __forceinline__ uint32_t half_warp_max(uint32_t v) {
#pragma unroll
  for (int step = 1; step < kContextLanes; step *= 2)
    v = max(v, __shfl_xor_sync(kAllLanes, v, step));
  return v;
}

// In pairs of neighbours, then pairs of those.
__device__ __forceinline__ float half_warp_sum(float v) {
#pragma unroll
  for (int step = 1; step < kContextLanes; step *= 2) v += __shfl_xor_sync(kAllLanes, v, step);
  return v;
}

// ---- floats in memory ----

template <class Source>
struct Chunk {
  uint4 raw[Source::kVectors];

  // Elements k to k + 7 of a row; zeros beyond cols. kVector: 16-byte aligned, cols a multiple
  // of 8.
  template <bool kVector>
  __device__ __forceinline__ void load(const void* row, int k, int64_t cols) {
    using Type = typename Source::Type;
    const Type* from = static_cast<const Type*>(row) + k;
#pragma unroll
    for (uint4& w : raw) w = make_uint4(0, 0, 0, 0);
    if (kVector) {
      if (k < cols)
#pragma unroll
        for (int i = 0; i < Source::kVectors; ++i)
          raw[i] = ptx::ld_global_nc_v4(reinterpret_cast<const uint4*>(from) + i);
      return;
    }
    Type* to = reinterpret_cast<Type*>(raw);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (k + i < cols) to[i] = from[i];
  }
  __device__ __forceinline__ void unpack(float (&v)[8]) const { Source::unpack(raw, v); }
  // What depends on the elements is computed anew after this, not kept in registers.
  __device__ __forceinline__ void forget() {
#pragma unroll
    for (uint4& w : raw)
      w = make_uint4(ptx::opaque(w.x), ptx::opaque(w.y), ptx::opaque(w.z), ptx::opaque(w.w));
  }
};

// Elements k to k + 7 of a vector that many blocks read; zeros beyond cols.
__device__ __forceinline__ void load_shared8(const void* p, FloatType type, int k, int64_t cols,
                                             bool vector, float (&v)[8]) {
  if (!vector) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = k + i < cols ? load_any(p, type, k + i) : 0.0f;
  } else if (type == FloatType::kFloat32) {
    const auto* from = static_cast<const uint4*>(p) + k / 4;
    const uint4 raw[2] = {__ldg(from), __ldg(from + 1)};
    Float32Source::unpack(raw, v);
  } else {
    const uint4 raw[1] = {__ldg(static_cast<const uint4*>(p) + k / 8)};
    if (type == FloatType::kBfloat16)
      Bfloat16Source::unpack(raw, v);
    else
      Float16Source::unpack(raw, v);
  }
}

// v to out[at..], of which `valid` elements exist.
__device__ __forceinline__ void store_chunk(void* out, FloatType type, int64_t at,
                                            const float (&v)[8], bool vector, int valid) {
  if (type == FloatType::kBfloat16)
    store_floats8<FloatType::kBfloat16>(out, at, v, vector, valid);
  else if (type == FloatType::kFloat32)
    store_floats8<FloatType::kFloat32>(out, at, v, vector, valid);
  else
    store_floats8<FloatType::kFloat16>(out, at, v, vector, valid);
}

// ---- contexts ----

// Bits 0 and 1 of each byte, one after another.
__device__ __forceinline__ uint32_t gather_low(uint32_t bytes) {
  return ((bytes & 0x03030303u) * 0x01041040u) >> 24;  // no two of its fields overlap
}

// The codes of a chunk at element `at` of the planes, and the scale of its group; all lanes of a
// warp call, also those whose chunk does not exist.
__device__ __forceinline__ void store_context(const ContextPlanes& c, int64_t at, bool exists,
                                              const float (&v)[8]) {
  const uint32_t amax = half_warp_max(amax_bits8(v));
  if (!exists) return;
  const Int8Scale s = context_scale(amax);
  const uint32_t finite = amax < kInfBits ? 0xFFFFFFFFu : 0u;
  uint32_t code[8], bytes[2], high[2];
#pragma unroll
  for (int i = 0; i < 8; ++i) code[i] = context_code(v[i], s.reciprocal);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t* q = code + 4 * i;
    bytes[i] = finite & __byte_perm(__byte_perm(q[0], q[1], 0x0040),
                                    __byte_perm(q[2], q[3], 0x0040), 0x5410);
    high[i] = finite & __byte_perm(__byte_perm(q[0] >> 2, q[1] >> 2, 0x0040),
                                   __byte_perm(q[2] >> 2, q[3] >> 2, 0x0040), 0x5410);
  }
  *reinterpret_cast<uint2*>(c.high + at) = make_uint2(high[0], high[1]);
  *reinterpret_cast<uint16_t*>(c.low + at / 4) =
      static_cast<uint16_t>(gather_low(bytes[0]) | gather_low(bytes[1]) << 8);
  if (threadIdx.x % kContextLanes == 0) c.scale[at / kContextGroup] = s.scale;
}

struct ContextChunk {
  uint2 high;
  uint32_t low;
  float scale;

  __device__ __forceinline__ void load(const ContextPlanes& c, int64_t at) {
    high = __ldg(reinterpret_cast<const uint2*>(c.high + at));
    low = __ldg(reinterpret_cast<const uint16_t*>(c.low + at / 4));
    scale = __ldg(c.scale + at / kContextGroup);
  }
  // The values. A code plus 512 is 4 (high + 128) + low, unsigned: below the bits of 2^23.
  __device__ __forceinline__ void unpack(float (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t biased = (i < 4 ? high.x : high.y) ^ 0x80808080u;
      const uint32_t byte = (biased >> (8 * (i % 4))) & 0xFFu;
      const uint32_t code = (byte << 2) | ((low >> (2 * i)) & 3u);
      v[i] = scale * (bits_float(0x4B000000u | code) - 8389120.0f);  // 2^23 + 512
    }
  }
  __device__ __forceinline__ void forget() {
    high = make_uint2(ptx::opaque(high.x), ptx::opaque(high.y));
    low = ptx::opaque(low);
  }
};

}  // namespace mxtrain::cuda
