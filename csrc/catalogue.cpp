// SPDX-License-Identifier: Apache-2.0
// What the op library is: formats, option names and build facts as one JSON text, which
// mxtrain/formats.py and mxtrain/env.py read through ctypes. So every list lives once, in C++, and
// the library needs no Python of its own.
#include <sstream>
#include <string>

#include "cpu/kernels.h"
#include "dispatch_table.h"
#include "formats/int8.h"

#ifndef MXT_CUDA_ARCHS
#define MXT_CUDA_ARCHS ""
#endif
#ifndef MXT_CUDA_COMPILER
#define MXT_CUDA_COMPILER ""
#endif

#ifndef MXT_CUTLASS
#define MXT_CUTLASS ""
#endif

namespace mxtrain {

static std::string names(const char* const* list, int count) {
  std::string s = "[";
  for (int i = 0; i < count; ++i) s += std::string(i ? ", \"" : "\"") + list[i] + "\"";
  return s + "]";
}

static std::string groups() {
  std::string s = "[";
  for (int i = 0; i < kHadamardGroupCount; ++i)
    s += (i ? ", " : "") + std::to_string(kHadamardGroups[i]);
  return s + "]";
}

static std::string gemm_rows() {
  std::ostringstream s;
  for (const GemmRow& row : kGemmRows) {
    s << (&row == kGemmRows ? "[" : ", ") << "{\"capability\": \"" << row.major << "." << row.minor
      << "\", \"gpus\": \"" << row.gpus << "\", \"arch\": \"" << row.arch << "\", \"backend\": \""
      << kGemmBackendNames[static_cast<int>(row.backend)] << "\", \"kind\": \"" << row.kind
      << "\", \"how\": \"" << row.how << "\", \"proof\": \"" << row.proof << "\", \"formats\": [";
    for (int i = 0, count = 0; i < kFormatCount; ++i)
      if (serves(row, i)) s << (count++ ? ", \"" : "\"") << kFormats[i].name << "\"";
    s << "]}";
  }
  return s.str() + "]";
}

static std::string make_catalogue() {
  std::ostringstream s;
  s << "{\"formats\": [";
  for (int i = 0; i < kFormatCount; ++i) {
    const FormatInfo& f = kFormats[i];
    s << (i ? ", " : "") << "{\"name\": \"" << f.name << "\", \"bits\": " << f.bits
      << ", \"ebits\": " << f.exp_bits << ", \"mbits\": " << f.man_bits << ", \"emax\": " << f.emax
      << ", \"max\": " << bits_float(f.max_bits) << ", \"block\": " << f.block << ", \"scale\": \""
      << (f.e4m3_scale ? "e4m3" : "e8m0") << "\"}";
  }
  s << "], \"scale_rules\": " << names(kScaleRuleNames, kScaleRules)
    << ", \"roundings\": " << names(kRoundingNames, kRoundings)
    << ", \"accumulate\": " << names(kAccumulateNames, kAccumulates)
    << ", \"gemm_backends\": " << names(kGemmBackendNames, kGemmBackends)
    << ", \"int8_layouts\": " << names(kInt8LayoutNames, kInt8Layouts)
    << ", \"gemm_rows\": " << gemm_rows() << ", \"hadamard_groups\": " << groups()
    << ", \"build\": {\"version\": \"" << MXT_VERSION << "\", \"torch_abi\": \"" << MXT_TORCH_ABI
    << "\", \"built_with_torch\": \"" << MXT_BUILT_WITH_TORCH << "\", \"cxx\": \""
    << MXT_CXX_COMPILER << "\", \"nvcc\": \"" << MXT_CUDA_COMPILER << "\", \"cutlass\": \""
    << MXT_CUTLASS << "\", \"cuda_archs\": \"" << MXT_CUDA_ARCHS << "\", \"cpu_isa\": \""
    << cpu::kernels().isa << "\"}}";
  return s.str();
}

}  // namespace mxtrain

// Not an op: torch's schemas cannot return text without leaking it.
extern "C" __attribute__((visibility("default"))) const char* mxtrain_catalogue() {
  static const std::string text = mxtrain::make_catalogue();
  return text.c_str();
}
