// SPDX-License-Identifier: Apache-2.0
// Warp matrix multiply-accumulate (PTX ISA, "Matrix Fragments for mma.m16n8k32"); 8-bit integers
// need sm_80, 8-bit floats sm_89. Lane l holds of
//   A [16, 32]  in a[r] bytes 4 (l % 4) + 16 (r / 2) to + 3 of row l / 4 + 8 (r % 2)
//   B [8, 32]   in b[r] bytes 4 (l % 4) + 16 r to + 3 of row l / 4
//   D [16, 8]   in d[2 i + c] row l / 4 + 8 i, column 2 (l % 4) + c
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// mma.sync.m16n8k32 of E5M2: D = A B^T + C, all in float32; c may be d. One instruction from sm_89
// on, but on sm_90 the compiler makes 8-bit products of binary16 ones.
__device__ __forceinline__ void mma_m16n8k32_e5m2(float* d, const uint32_t* a, const uint32_t* b,
                                                  const float* c) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e5m2.e5m2.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// mma.sync.m16n8k32 of s8: D = A B^T + C, all in int32; c may be d.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t* d, const uint32_t* a, const uint32_t* b,
                                                const int32_t* c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

}  // namespace mxtrain::ptx
