// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdlib>
#include <string>

#include "cuda/quantize.h"
#include "dispatch_table.h"
#include "ops/ops.h"
#ifdef MXT_HAVE_SM89
#include "cuda/sm89/gemm_e5m2.h"
#endif
#ifdef MXT_HAVE_SM90
#include "cuda/sm90/gemm_e5m2.h"
#include "cuda/sm90/gemm_int8.h"
#endif

namespace mxtrain::cuda {

// Whether one of the architectures of this build, "90a" and "120a" of "90a;120a", is what `matches`
// looks for.
template <class Predicate>
static bool any_arch(Predicate matches) {
  const std::string archs = MXT_CUDA_ARCHS;
  size_t begin = 0;
  while (begin < archs.size()) {
    const size_t end = std::min(archs.find(';', begin), archs.size());
    const std::string arch = archs.substr(begin, end - begin);
    if (!arch.empty() && matches(arch)) return true;
    begin = end + 1;
  }
  return false;
}

// Is there code for compute capability major.minor? Code for 80 also runs on 86 and 89: same major,
// not older. With the suffix a it is for that one alone, but from 10.0 on cmake/cuda.cmake builds
// the portable kernels for the family (suffix f), which is the major version.
static bool built_for(int major, int minor) {
  return any_arch([&](const std::string& arch) {
    const int number = std::atoi(arch.c_str()), have = number % 10;
    if (number / 10 != major) return false;
    if (arch.back() == 'a' || arch.back() == 'f') return major >= 10 || have == minor;
    return have <= minor;
  });
}

// Is there code for exactly this? Code for 80 runs on 89, without the kernels that need 89.
static bool built_as(const char* name) {
  return any_arch([&](const std::string& arch) { return arch == name; });
}

static const char* kAsynchronous =
    "An earlier asynchronous error shows here too: run again with CUDA_LAUNCH_BLOCKING=1.";

static void check_runtime(const char* op, cudaError_t error) {
  MXT_CHECK(error == cudaSuccess, op, "the CUDA runtime must answer, got ", cudaGetErrorName(error),
            " (", cudaGetErrorString(error), "). ", kAsynchronous);
}

struct Capability {
  int major = 0, minor = 0;
};

static Capability capability_of(const char* op, int device) {
  Capability c;
  check_runtime(op, cudaDeviceGetAttribute(&c.major, cudaDevAttrComputeCapabilityMajor, device));
  check_runtime(op, cudaDeviceGetAttribute(&c.minor, cudaDevAttrComputeCapabilityMinor, device));
  return c;
}

cudaStream_t stream_for(const char* op, const Tensor& t) {
  const int device = t.get_device_index();
  const auto [major, minor] = capability_of(op, device);
  const std::string arch = std::to_string(major) + std::to_string(minor);
  const std::string remedy =
      major < 8    ? "Use a GPU of compute capability 8.0 or newer."
      : major >= 9 ? "Rebuild with MXTRAIN_CUDA_ARCHS=" + arch + "a, the suffix included."
                   : "Rebuild with MXTRAIN_CUDA_ARCHS=" + arch + ".";
  MXT_CHECK(built_for(major, minor), op,
            "the GPU must be one this build has kernels for, got compute capability ", major, ".",
            minor, " (this build has: ", MXT_CUDA_ARCHS, "). ", remedy);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

LaunchShape& last_launch() {
  thread_local LaunchShape shape = {};
  return shape;
}

// ---- the GEMM's backends ----

// The wgmma kernel.
static bool has_fold(Capability c) { return c.major == 9 && c.minor == 0 && built_as("90a"); }

// The mma.sync kernel.
static bool has_fold_mma(Capability c) {
  return (c.major == 8 && c.minor == 9 && built_as("89")) || has_fold(c);
}

// Block-scaled mma.sync: an instruction of these architectures, and of no code without the suffix.
static bool has_sm120(Capability c) {
  return c.major == 12 && (built_as("120f") || (c.minor == 0 && built_as("120a")) ||
                           (c.minor == 1 && (built_as("121a") || built_as("121f"))));
}

// The same kernel with the instruction emulated.
static bool has_sm120_emulated(Capability c) {
  return c.major == 9 && c.minor == 0 && built_as("90a");
}

// Whether the current GPU has code of cuda/sm120/mma_probe.cu: cudaErrorNotSupported where not.
[[maybe_unused]] static cudaError_t check_probe() {
  int device = 0;
  Capability c;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&c.major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&c.minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return error;
  return has_sm120(c) || has_sm120_emulated(c) ? cudaSuccess : cudaErrorNotSupported;
}

// tcgen05.mma; its object is code for the family, so what was built for 100a runs on 10.3 too.
static bool has_sm100(Capability c) {
#ifdef MXT_HAVE_SM100
  return c.major == 10;
#else
  return false;
#endif
}

// Whether the build has the code of a row of the table.
static bool has_code(const GemmRow& row) {
  const Capability c = {row.major, row.minor};
  switch (row.backend) {
    case GemmBackend::kFold:
      return has_fold_mma(c);
    case GemmBackend::kSm100:
      return has_sm100(c);
    case GemmBackend::kSm120:
      return has_sm120(c);
    default:
      return false;
  }
}

GemmChoice best_gemm_backend(int major, int minor, int64_t format) {
  const GemmRow* row = gemm_row(major, minor, format);
  std::string why = "decode to BF16, cuBLAS";
  if (!row) return {GemmBackend::kDequant, why};
  if (has_code(*row)) return {row->backend, row->how};
  why += std::string("; ") + kGemmBackendNames[static_cast<int>(row->backend)] +
         " needs a build with ";
  const bool tcgen05 = row->backend == GemmBackend::kSm100;
  if (tcgen05 && (built_as("100a") || built_as("103a") || built_as("100f") || built_as("103f")))
    return {GemmBackend::kDequant, why + "CUTLASS: third_party/README.md"};
  const std::string arch = row->arch;
  if (arch.back() == 'a')
    why += arch + ", the suffix included: MXTRAIN_CUDA_ARCHS=";
  else
    why += arch + ": MXTRAIN_CUDA_ARCHS=";
  return {GemmBackend::kDequant, why + arch};
}

static bool can_take(GemmBackend backend, Capability c, int64_t format) {
  switch (backend) {
    case GemmBackend::kFold:
    case GemmBackend::kFoldMma:
      return format == kMxfp4Code && has_fold_mma(c);
    case GemmBackend::kFoldPacked:
      return format == kMxfp4Code && has_fold(c);
    case GemmBackend::kSm120:
      return block_scaled(format) && has_sm120(c);
    case GemmBackend::kSm120Emulated:
      return block_scaled(format) && has_sm120_emulated(c);
    case GemmBackend::kSm100:
      return block_scaled(format) && has_sm100(c);
    case GemmBackend::kAuto:
    case GemmBackend::kDequant:
      break;
  }
  return true;
}

GemmBackend gemm_backend_for(const char* op, const Tensor& t, int64_t format) {
  const Capability c = capability_of(op, t.get_device_index());
  GemmBackend asked = requested_gemm_backend();
  if (asked == GemmBackend::kAuto) asked = best_gemm_backend(c.major, c.minor, format).backend;
  MXT_CHECK(
      can_take(asked, c, format), op, "the GEMM backend must be one that serves format ",
      kFormats[format].name, " here, got ", kGemmBackendNames[static_cast<int>(asked)],
      " (compute capability ", c.major, ".", c.minor, ", this build has: ", MXT_CUDA_ARCHS,
      "). Use mxtrain.set_gemm_backend(\"auto\"); fold is mxfp4 on 8.9, built for 89, and on "
      "9.0, built for 90a; fold_packed on 9.0 only; sm120 is mxfp4, nvfp4 and mxfp8 on 12.0, "
      "built for 120a, and on 12.1, built for 121a (rebuild with MXTRAIN_CUDA_ARCHS=120a or "
      "121a); sm120_emulated the same on 9.0, to test it; sm100 the same on 10.0 and 10.3, built "
      "for 100a or 103a (rebuild with MXTRAIN_CUDA_ARCHS=100a) with CUTLASS.");
  return asked == GemmBackend::kFold && !has_fold(c) ? GemmBackend::kFoldMma : asked;
}

cudaError_t run_folded_gemm(const FoldedGemmParams& p, GemmBackend backend, cudaStream_t stream) {
#ifdef MXT_HAVE_SM90
  if (backend == GemmBackend::kFold) return sm90::launch_folded_gemm(p, stream);
#endif
#ifdef MXT_HAVE_SM89
  if (backend == GemmBackend::kFoldMma) return sm89::launch_folded_gemm(p, stream);
#endif
  return cudaErrorNotSupported;
}

SplitScratch plan_folded_gemm(FoldedGemmParams* p, GemmBackend backend) {
  p->split = {};
  p->overlap = false;
#ifdef MXT_HAVE_SM90
  const auto on = [](const char* variable) {
    const char* asked = std::getenv(variable);
    return asked == nullptr || std::string(asked) != "0";
  };
  if (backend != GemmBackend::kFold || p->accumulate != Accumulate::kFp32) return {};
  p->overlap = on("MXTRAIN_GEMM_OVERLAP");
  if (!on("MXTRAIN_SPLIT_K")) return {};
  int device = 0, multiprocessors = 0;
  check_runtime("gemm", cudaGetDevice(&device));
  check_runtime("gemm",
                cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  p->split = plan_split(p->m, p->n, p->k, multiprocessors);
  return sm90::split_scratch(p->split, p->m, p->n);
#else
  return {};
#endif
}

cudaError_t run_packed_gemm(const PackedGemmParams& p, cudaStream_t stream) {
#ifdef MXT_HAVE_SM90
  return sm90::launch_packed_gemm(p, stream);
#else
  return cudaErrorNotSupported;
#endif
}

cudaError_t run_block_scaled_gemm(const sm120::BlockScaledGemmParams& p, int64_t format,
                                  cudaStream_t stream) {
#ifdef MXT_HAVE_SM120
  const FormatInfo& f = kFormats[format];
  if (f.bits == 4)
    return f.e4m3_scale ? sm120::launch_gemm_nvfp4(p, stream) : sm120::launch_gemm_mxfp4(p, stream);
  if (f.bits == 8)
    return f.man_bits == 3 ? sm120::launch_gemm_mxfp8_e4m3(p, stream)
                           : sm120::launch_gemm_mxfp8_e5m2(p, stream);
#endif
  return cudaErrorNotSupported;
}

cudaError_t run_sm100_gemm(const sm100::GemmParams& p, int64_t format, sm100::Tile tile,
                           cudaStream_t stream) {
#ifdef MXT_HAVE_SM100
  const FormatInfo& f = kFormats[format];
  if (f.bits == 4)
    return sm100::launch_gemm(p, f.e4m3_scale ? sm100::Kind::kNvfp4 : sm100::Kind::kMxfp4, tile,
                              stream);
  if (f.bits == 8)
    return sm100::launch_gemm(
        p, f.man_bits == 3 ? sm100::Kind::kMxfp8E4M3 : sm100::Kind::kMxfp8E5M2, tile, stream);
#endif
  return cudaErrorNotSupported;
}

sm100::Tile sm100_tile(const char* op, const Tensor& t, int64_t m, int64_t n, bool bfloat16_out) {
  if (!bfloat16_out) return sm100::Tile::kSingle;
  int multiprocessors = 0;
  check_runtime(op, cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount,
                                           t.get_device_index()));
  return sm100::prefer_pair(m, n, multiprocessors) ? sm100::Tile::kPair : sm100::Tile::kSingle;
}

static bool int8_on_sm90(int major, int minor) {
  const char* asked = std::getenv("MXTRAIN_INT8_GEMM");
  if (asked && std::string(asked) == "portable") return false;
#ifdef MXT_HAVE_SM90
  return major == 9 && minor == 0;
#else
  return false;
#endif
}

const char* int8_gemm_backend(int major, int minor) {
  return int8_on_sm90(major, minor) ? "sm90: wgmma, integer tensor cores"
                                    : "portable: mma.sync, integer tensor cores";
}

cudaError_t run_int8_gemm(const char* op, const Tensor& t, const Int8GemmParams& p,
                          cudaStream_t stream) {
  const auto [major, minor] = capability_of(op, t.get_device_index());
#ifdef MXT_HAVE_SM90
  if (int8_on_sm90(major, minor) && p.m <= sm90::kMostInt8Rows && p.n <= sm90::kMostInt8Rows)
    return sm90::launch_int8_gemm(p, stream);
#endif
  return launch_int8_gemm(p, stream);
}

void check_launch(const char* op, cudaError_t error) {
  MXT_CHECK(error == cudaSuccess, op, "the kernel must launch, got ", cudaGetErrorName(error), " (",
            cudaGetErrorString(error), "; grid ", last_launch().grid, ", block ",
            last_launch().block, "). ", kAsynchronous);
}

}  // namespace mxtrain::cuda

// Not an op: what mxtrain.env prints of int8_gemm.
extern "C" __attribute__((visibility("default"))) const char* mxtrain_int8_gemm_backend(int major,
                                                                                        int minor) {
  return mxtrain::cuda::int8_gemm_backend(major, minor);
}

// Not an op: what mxtrain.env prints, "fold: exact folding ...".
extern "C" __attribute__((visibility("default"))) const char* mxtrain_gemm_backend(int major,
                                                                                   int minor,
                                                                                   int format) {
  thread_local std::string text;
  const mxtrain::cuda::GemmChoice choice = mxtrain::cuda::best_gemm_backend(major, minor, format);
  text =
      std::string(mxtrain::kGemmBackendNames[static_cast<int>(choice.backend)]) + ": " + choice.why;
  return text.c_str();
}

// Not an op: one block-scaled instruction, or its emulation, for the tests of its register layout
// (cuda/sm120/mma_probe.cu). Device pointers; returns a cudaError_t, cudaErrorNotSupported where
// the build has no code of it for the current GPU.
extern "C" __attribute__((visibility("default"))) int mxtrain_mma_probe(
    int format, const int* selectors, int count, const uint32_t* a, const uint32_t* b,
    const uint32_t* scale_a, const uint32_t* scale_b, const float* c, float* d, void* stream) {
#ifdef MXT_HAVE_SM120
  const cudaError_t error = mxtrain::cuda::check_probe();
  if (error != cudaSuccess) return error;
  const mxtrain::cuda::sm120::MmaProbeParams p = {a,
                                                  b,
                                                  scale_a,
                                                  scale_b,
                                                  c,
                                                  d,
                                                  count,
                                                  format,
                                                  selectors[0],
                                                  selectors[1],
                                                  selectors[2],
                                                  selectors[3]};
  return mxtrain::cuda::sm120::launch_mma_probe(p, static_cast<cudaStream_t>(stream));
#else
  return cudaErrorNotSupported;
#endif
}

// Not an op: whether the kernels of sm100 take these sizes, for tests without a GPU. pitch is that
// of the output, pair its tile (cuda/sm100/gemm.h). Returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int mxtrain_sm100_takes(int format, int pair,
                                                                          int64_t m, int64_t n,
                                                                          int64_t k,
                                                                          int64_t pitch) {
  using mxtrain::cuda::sm100::Tile;
  mxtrain::cuda::sm100::GemmParams p = {};
  p.m = m;
  p.n = n;
  p.k = k;
  p.pitch = pitch;
  return mxtrain::cuda::run_sm100_gemm(p, format, pair ? Tile::kPair : Tile::kSingle, nullptr);
}
