// SPDX-License-Identifier: Apache-2.0
// Warp-level matrix multiply-accumulate (PTX ISA, "Warp Level Matrix Multiply-Accumulate
// Instructions"); sm_80 and up.
#pragma once

#include <cstdint>

namespace mxtrain::ptx {

// ldmatrix.x4: four 8x8 matrices of 16-bit values, or 8 rows of 16 bytes each. Lane l gives the
// address of row l % 8 of matrix l / 8 and gets, in w[i], bytes 4 (l % 4) to 4 (l % 4) + 3 of row
// l / 4 of matrix i.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&w)[4], uint32_t shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(shared)
               : "memory");
}

// mma.m16n8k32.s32.s8.s8: D = A B^T + C. A: rows l / 4 and l / 4 + 8, bytes 4 (l % 4) on, then the
// same 16 bytes further; B: row l / 4 likewise; D and c [4]: rows as A, columns 2 (l % 4) and the
// next.
__device__ __forceinline__ void mma_m16n8k32_s8(int32_t (&d)[4], const uint32_t (&a)[4],
                                                uint32_t b0, uint32_t b1, const int32_t* c) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]),
        "r"(c[2]), "r"(c[3]));
}

}  // namespace mxtrain::ptx
