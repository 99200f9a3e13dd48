"""The conversion instruction to E2M1 (cvt.rn.satfinite.e2m1x2.f32) against the software path.

What the instruction computes is stated by the CUDA toolkit as host code, too (cuda_fp4.hpp), and
that is compared with csrc/formats/elements.h on every finite float32. Which architectures take it
is read from what nvcc makes. Needs nvcc, no GPU; where a GPU has the instruction, test_quantize.py
compares the bytes.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

# Both codes rise with |v|: where they agree at the first two and the last of 256 neighbours, and
# either has one code from the second to the last, they agree on all 256.
COMPARE = """
#include <cuda_fp4.h>
#include <cstdio>
#include "formats/elements.h"
int main() {
  unsigned wrong = 0;
  for (uint64_t first = 0; first < uint64_t{1} << 32; first += 256) {
    if ((first & 0x7F800000u) == 0x7F800000u) continue;  // Inf and NaN
    uint32_t codes[3];
    const uint32_t offsets[3] = {0, 1, 255};
    for (int i = 0; i < 3; ++i) {
      const float v = mxtrain::bits_float(static_cast<uint32_t>(first) + offsets[i]);
      codes[i] = mxtrain::encode_nearest<mxtrain::E2M1>(v);
      const uint32_t theirs = __nv_cvt_float_to_fp4(v, __NV_E2M1, cudaRoundNearest);
      wrong += codes[i] != theirs;
    }
    wrong += codes[1] != codes[2];
  }
  std::printf("%u", wrong);
}
"""

KERNEL = """
#include "cuda/encode.cuh"
__global__ void kernel(const float* x, uint32_t scale, uint32_t* y) {
  float v[8];
  for (int i = 0; i < 8; ++i) v[i] = x[i];
  y[0] = mxtrain::cuda::e2m1_nearest8(v, scale);
  y[1] = mxtrain::cuda::encode8_nearest<mxtrain::E2M1>(v).low;
}
"""


def test_the_software_path_is_the_instruction_on_every_float(tmp_path):
    source, program = tmp_path / "compare.cpp", tmp_path / "compare"
    source.write_text(COMPARE)
    command = ["nvcc", "-std=c++17", "-O2", "-Xcompiler=-ffp-contract=off", f"-I{CSRC}"]
    subprocess.run([*command, source, "-o", program], check=True)
    assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == "0"


@pytest.mark.parametrize("arch", ["90a", "100", "100a", "100f", "103a", "120a", "120f", "121a"])
def test_which_architectures_have_it(arch, tmp_path):
    source, ptx = tmp_path / "kernel.cu", tmp_path / "kernel.ptx"
    source.write_text(KERNEL)
    command = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", f"-I{CSRC}", "-ptx"]
    subprocess.run([*command, f"-arch=compute_{arch}", source, "-o", ptx], check=True)
    count = ptx.read_text().count("cvt.rn.satfinite.e2m1x2.f32")
    assert count == (0 if arch in ("90a", "100") else 8)
