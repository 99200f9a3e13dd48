"""The block-scaled GEMM as compiled for 12.0 and 12.1: the instruction it is for, and no spills.

Needs nvcc (nvidia-cuda-cuobjdump, on the PATH or from PyPI, for the machine code), no GPU.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from common import cuobjdump

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda/sm120"
# Format: the instruction in PTX, in machine code, and the steps of a stage. A step has 2 x 8
# fragments with the narrow tile, twice (products added in float32, too), and 4 x 8 with the wide.
INSTRUCTIONS = {
    "mxfp4": ("kind::mxf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
              "OMMA.SF.16864.F32.E2M1.E2M1.E8 ", 2),
    "nvfp4": ("kind::mxf4nvf4.block_scale.scale_vec::4X.f32.e2m1.e2m1.f32.ue4m3",
              "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X ", 2),
    "mxfp8_e4m3": ("kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0",
                   "QMMA.SF.16832.F32.E4M3.E4M3.E8 ", 4),
    "mxfp8_e5m2": ("kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e5m2.e5m2.f32.ue8m0",
                   "QMMA.SF.16832.F32.E5M2.E5M2.E8 ", 4),
}  # fmt: skip
TILES = 2 * (2 * 8) + 4 * 8

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


def compile_for(arch: str, source: Path, folder: Path) -> tuple[str, Path]:
    """What ptxas says, and the cubin; the PTX lies beside it."""
    flags = re.search(r"set\(MXT_CUDA_FLAGS ([^)]+)\)", (ROOT / "cmake/cuda.cmake").read_text())
    command = [
        "nvcc",
        "-std=c++17",
        *flags.group(1).split(),
        "-Xptxas=-v,-Werror",
        f"-I{ROOT}/csrc",
    ]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "--keep", f"--keep-dir={folder}"]
    out = folder / f"{source.stem}.cubin"
    done = subprocess.run(
        [*command, "-cubin", str(source), "-o", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, out


@pytest.mark.parametrize(
    "arch, format", [*(("120a", format) for format in INSTRUCTIONS), ("121a", "mxfp4")]
)
def test_the_kernels_have_the_instruction_and_no_spills(arch, format, tmp_path):
    in_ptx, in_code, steps = INSTRUCTIONS[format]
    said, cubin = compile_for(arch, SOURCES / f"gemm_{format}.cu", tmp_path)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * 3, said
    (ptx,) = tmp_path.glob("*.ptx")
    assert ptx.read_text().count(in_ptx) == steps * TILES
    if not cuobjdump():
        pytest.skip("the PTX has it, without spills; cuobjdump is needed for the machine code")
    code = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True).stdout
    assert code.count(in_code) == steps * TILES
    products = [line for line in code.splitlines() if re.search(r"\b[A-Z]*MMA\.", line)]
    assert len(products) == steps * TILES  # and no product of another kind


@pytest.mark.parametrize("arch", ["121a", "120f"])
def test_others_of_the_family_have_it_too(arch, tmp_path):
    compile_for(arch, SOURCES / "mma_probe.cu", tmp_path)
    (ptx,) = tmp_path.glob("*.ptx")
    for in_ptx, _, _ in INSTRUCTIONS.values():
        assert in_ptx in ptx.read_text()


def test_other_architectures_emulate_it(tmp_path):
    compile_for(
        "120", SOURCES / "mma_probe.cu", tmp_path
    )  # without the suffix: no such instruction
    (ptx,) = tmp_path.glob("*.ptx")
    assert "mma.sync" not in ptx.read_text() and "shfl.sync" in ptx.read_text()
