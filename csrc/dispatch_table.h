// SPDX-License-Identifier: Apache-2.0
// What gemm takes on which GPU, if the build has its code: what dispatch.cpp chooses by and
// mxtrain/tables.py prints. No CUDA header, so that every build has it. Formats and GPUs that have
// no row here decode to BF16.
#pragma once

#include "formats/block.h"

namespace mxtrain {

struct GemmRow {
  int major, minor;
  const char* gpus;  // examples, for people
  const char*
      arch;  // the architecture to build for, with the suffix without which there is no code
  GemmBackend backend;
  bool only_mxfp4;    // or every format of 4 and 8 bits
  const char* kind;   // "native": multiplied as stored. "folded": exactly, in another format
  const char* how;    // in words
  const char* proof;  // where it has run
};

constexpr const char* kNeverRan = "never run on the chip";
constexpr GemmRow kGemmRows[] = {
    {8, 9, "L4, L40S, RTX 40", "89", GemmBackend::kFold, true, "folded",
     "exact folding into E5M2, FP8 tensor cores by mma.sync", kNeverRan},
    {9, 0, "H100, H200", "90a", GemmBackend::kFold, true, "folded",
     "exact folding into E5M2, FP8 tensor cores", "runs on an H100 and an H200"},
    {10, 0, "B200, GB200", "100a", GemmBackend::kSm100, false, "native",
     "block-scaled tensor cores by tcgen05", kNeverRan},
    {10, 3, "B300, GB300", "103a", GemmBackend::kSm100, false, "native",
     "block-scaled tensor cores by tcgen05", kNeverRan},
    {12, 0, "RTX 50, RTX PRO Blackwell", "120a", GemmBackend::kSm120, false, "native",
     "block-scaled tensor cores by mma.sync", kNeverRan},
    {12, 1, "GB10 (DGX Spark)", "121a", GemmBackend::kSm120, false, "native",
     "block-scaled tensor cores by mma.sync", kNeverRan},
};

// What block-scaled tensor cores multiply here, of all that they could.
constexpr bool block_scaled(int64_t format) { return kFormats[format].bits != 6; }

constexpr bool serves(const GemmRow& row, int64_t format) {
  return row.only_mxfp4 ? format == kMxfp4Code : block_scaled(format);
}

// The row of a compute capability and format, or null.
constexpr const GemmRow* gemm_row(int major, int minor, int64_t format) {
  for (const GemmRow& row : kGemmRows)
    if (row.major == major && row.minor == minor && serves(row, format)) return &row;
  return nullptr;
}

}  // namespace mxtrain
