"""What the message for a GPU whose architecture was not built says: csrc/dispatch.cpp, for any GPU.

Compiles dispatch_gpus.cpp with the host compiler; needs the headers of CUDA, no GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from common import STYLE

ROOT = Path(__file__).parents[1]
SUFFIX = ", the suffix included."
CXX, NVCC = shutil.which("g++"), shutil.which("nvcc")

pytestmark = pytest.mark.skipif(not (CXX and NVCC), reason="needs g++ and nvcc")


@pytest.fixture(scope="module")
def says(tmp_path_factory):
    program = tmp_path_factory.mktemp("dispatch") / "dispatch_gpus"
    dry = subprocess.run([NVCC, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True)
    line = next(x for x in dry.stderr.decode().splitlines() if "TOP=" in x)
    cuda = Path(line.split("TOP=")[1].strip()) / "include"
    command = [
        CXX, "-std=c++17", "-w", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000",
        f"-I{ROOT}/csrc", f"-isystem{Path(torch.__file__).parent}/include", f"-isystem{cuda}",
        str(ROOT / "tests/dispatch_gpus.cpp"), "-o", str(program),
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]

    def run(archs: str, gpu: str) -> str:
        done = subprocess.run([program, archs, *gpu.split(".")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(
    "archs, gpu",
    [("80", "8.0"), ("80", "8.9"), ("80;90a", "8.6"), ("90a", "9.0"), ("100a", "10.0"),
     ("100a", "10.3"), ("103f", "10.0"), ("120f", "12.1"), ("90a;120a", "12.1")],
)  # fmt: skip
def test_a_gpu_that_the_build_has_code_for_is_taken(says, archs, gpu):
    assert says(archs, gpu) == ""


@pytest.mark.parametrize(
    "archs, gpu, remedy",
    [("89", "8.6", "86."), ("90a", "8.0", "80."), ("80", "9.0", "90a" + SUFFIX),
     ("90a", "12.0", "120a" + SUFFIX), ("80;90a", "12.1", "121a" + SUFFIX),
     ("120a", "10.3", "103a" + SUFFIX), ("90a", "10.0", "100a" + SUFFIX),
     ("100a;120a", "9.0", "90a" + SUFFIX)],
)  # fmt: skip
def test_another_is_told_what_to_build(says, archs, gpu, remedy):
    check(says(archs, gpu), archs, gpu, f"Rebuild with MXTRAIN_CUDA_ARCHS={remedy}")


def test_an_old_one_is_told_that_no_build_serves_it(says):
    advice = "Use a GPU of compute capability 8.0 or newer."
    check(says("80;90a", "7.5"), "80;90a", "7.5", advice)


def check(message: str, archs: str, gpu: str, advice: str) -> None:
    assert message == (
        "mxtrain::quantize: the GPU must be one this build has kernels for, got compute capability "
        f"{gpu} (this build has: {archs}). {advice}"
    )
    assert STYLE.fullmatch(message)
