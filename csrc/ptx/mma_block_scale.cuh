// SPDX-License-Identifier: Apache-2.0
// Block-scaled warp matrix multiply-accumulate (PTX ISA, "mma", .block_scale): one instruction on
// sm_120a, sm_121a and sm_120f. Anywhere else the same product from the same registers, lane by
// lane and slowly, so that everything around the instruction runs on the GPUs at hand.
// ptx/block_scale.h says which lane holds what, and what the selectors (byte ids, thread ids) are.
// The whole warp calls; blocks are one-dimensional; c may be d.
#pragma once

#include "ptx/block_scale.h"

// In code with a suffix (a or f), by nvcc 12.9's macro for both or 12.8's for a.
#if defined(__CUDA_ARCH_FEAT_SM120_ALL) || \
    (defined(__CUDA_ARCH_FAMILY_SPECIFIC__) && __CUDA_ARCH__ / 100 == 12)
#define MXT_HAS_MMA_BLOCK_SCALE 1
#else
#define MXT_HAS_MMA_BLOCK_SCALE 0
#endif

namespace mxtrain::ptx {

// The lanes' registers, asked for by all lanes at once.
struct ExchangingWarp {
  const uint32_t *own_a, *own_b;
  uint32_t own_scale_a, own_scale_b;

  static __device__ __forceinline__ uint32_t from(uint32_t own, int lane) {
    return __shfl_sync(0xFFFFFFFFu, own, lane);
  }
  // Comparisons, so that the registers stay registers.
  __device__ __forceinline__ uint32_t a(int word, int lane) const {
    const uint32_t low = word % 2 ? own_a[1] : own_a[0], high = word % 2 ? own_a[3] : own_a[2];
    return from(word / 2 ? high : low, lane);
  }
  __device__ __forceinline__ uint32_t b(int word, int lane) const {
    return from(word ? own_b[1] : own_b[0], lane);
  }
  __device__ __forceinline__ uint32_t scale_a(int lane) const { return from(own_scale_a, lane); }
  __device__ __forceinline__ uint32_t scale_b(int lane) const { return from(own_scale_b, lane); }
};

#if MXT_HAS_MMA_BLOCK_SCALE
#define MXT_MMA_BLOCK_SCALE(format, instruction)                                                   \
  asm("mma.sync.aligned." instruction                                                              \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13}, %14, {%15, %16}, "     \
      "%17, {%18, %19};"                                                                           \
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])                                             \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),    \
        "f"(c[2]), "f"(c[3]), "r"(scale_a), "n"(kByteA), "n"(kThreadA), "r"(scale_b), "n"(kByteB), \
        "n"(kThreadB))
#else
#define MXT_MMA_BLOCK_SCALE(format, instruction)                                        \
  block_scale_product<format>(ExchangingWarp{a, b, scale_a, scale_b}, threadIdx.x % 32, \
                              ScaleSelectors{kByteA, kThreadA, kByteB, kThreadB}, c, d)
#endif

// mma.sync.m16n8k64.kind::mxf4.block_scale.scale_vec::2X: E2M1, E8M0 scales of 32.
template <int kByteA, int kThreadA, int kByteB, int kThreadB>
__device__ __forceinline__ void mma_m16n8k64_mxf4(float* d, const uint32_t* a, const uint32_t* b,
                                                  const float* c, uint32_t scale_a,
                                                  uint32_t scale_b) {
  static_assert(is_legal({kByteA, kThreadA, kByteB, kThreadB}, BlockScaleShape<Mxfp4>::kScales),
                "byte ids 0 or 2, thread ids of A 0 or 1, of B 0 to 3");
  MXT_MMA_BLOCK_SCALE(Mxfp4,
                      "m16n8k64.row.col.kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32."
                      "ue8m0");
}

// mma.sync.m16n8k64.kind::mxf4nvf4.block_scale.scale_vec::4X: E2M1, E4M3 scales of 16.
template <int kByteA, int kThreadA, int kByteB, int kThreadB>
__device__ __forceinline__ void mma_m16n8k64_mxf4nvf4(float* d, const uint32_t* a,
                                                      const uint32_t* b, const float* c,
                                                      uint32_t scale_a, uint32_t scale_b) {
  static_assert(is_legal({kByteA, kThreadA, kByteB, kThreadB}, BlockScaleShape<Nvfp4>::kScales),
                "byte ids 0, thread ids of A 0 or 1, of B 0 to 3");
  MXT_MMA_BLOCK_SCALE(Nvfp4,
                      "m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32."
                      "ue4m3");
}

// mma.sync.m16n8k32.kind::mxf8f6f4.block_scale.scale_vec::1X of E4M3 or of E5M2, E8M0 scales of 32.
template <class F, int kByteA, int kThreadA, int kByteB, int kThreadB>
__device__ __forceinline__ void mma_m16n8k32_mxf8f6f4(float* d, const uint32_t* a,
                                                      const uint32_t* b, const float* c,
                                                      uint32_t scale_a, uint32_t scale_b) {
  constexpr bool kE4M3 = F::Element::kManBits == 3;
  static_assert(F::kBits == 8 && !F::kE4M3Scale, "mxfp8");
  static_assert(is_legal({kByteA, kThreadA, kByteB, kThreadB}, BlockScaleShape<F>::kScales),
                "byte ids 0 to 3, thread ids of A 0 or 1, of B 0 to 3");
  if constexpr (kE4M3)
    MXT_MMA_BLOCK_SCALE(F,
                        "m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3."
                        "f32.ue8m0");
  else
    MXT_MMA_BLOCK_SCALE(F,
                        "m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e5m2.e5m2."
                        "f32.ue8m0");
}

#undef MXT_MMA_BLOCK_SCALE

// The one of a block format.
template <class F, int kByteA, int kThreadA, int kByteB, int kThreadB>
__device__ __forceinline__ void mma_block_scale(float* d, const uint32_t* a, const uint32_t* b,
                                                const float* c, uint32_t scale_a,
                                                uint32_t scale_b) {
  if constexpr (F::kBits == 8)
    mma_m16n8k32_mxf8f6f4<F, kByteA, kThreadA, kByteB, kThreadB>(d, a, b, c, scale_a, scale_b);
  else if constexpr (F::kE4M3Scale)
    mma_m16n8k64_mxf4nvf4<kByteA, kThreadA, kByteB, kThreadB>(d, a, b, c, scale_a, scale_b);
  else
    mma_m16n8k64_mxf4<kByteA, kThreadA, kByteB, kThreadB>(d, a, b, c, scale_a, scale_b);
}

}  // namespace mxtrain::ptx
