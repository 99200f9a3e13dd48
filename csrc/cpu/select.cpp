// SPDX-License-Identifier: Apache-2.0
// Chooses, once, the widest instruction set that was built and that the processor runs. MXT_HAVE_*
// come from CMakeLists.txt.
#include "cpu/kernels.h"

namespace mxtrain::cpu {

namespace baseline {
extern const Kernels kTable;
}
#ifdef MXT_HAVE_AVX2
namespace avx2 {
extern const Kernels kTable;
}
#endif
#ifdef MXT_HAVE_AVX512
namespace avx512 {
extern const Kernels kTable;
}
#endif

static const Kernels& choose() {
#ifdef MXT_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma"))
    return avx512::kTable;
#endif
#ifdef MXT_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::kTable;
#endif
  return baseline::kTable;
}

const Kernels& kernels() {
  static const Kernels& best = choose();
  return best;
}

}  // namespace mxtrain::cpu
