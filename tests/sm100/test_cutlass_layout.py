"""CUTLASS's own layout objects against ours: scale tiles, packed codes, what the codes mean.

Compiles cutlass_layout.cpp with the host compiler; needs the CUDA and CUTLASS headers (a build for
100a fetches these), no GPU.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from sm100_common import ROOT, cutlass_headers

from mxtrain import reference

CXX, NVCC, CUTLASS = shutil.which("g++"), shutil.which("nvcc"), cutlass_headers()
needs_headers = pytest.mark.skipif(
    not (CXX and NVCC and CUTLASS), reason="needs g++, nvcc and the CUTLASS headers"
)


def compare(folder: Path, first: Path | None = None) -> subprocess.CompletedProcess:
    """Compile and run; `first` is searched for our headers before csrc is."""
    said = subprocess.run([NVCC, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True)
    line = next(x for x in said.stderr.decode().splitlines() if "TOP=" in x)
    cuda = Path(line.split("TOP=")[1].strip()) / "include"
    mine = [f"-I{path}" for path in (first, ROOT / "csrc") if path]
    system = [f"-isystem{path}" for path in (CUTLASS, cuda, cuda / "cccl")]
    program = folder / "cutlass_layout"
    source = Path(__file__).with_name("cutlass_layout.cpp")
    command = [CXX, "-std=c++17", "-O1", "-w", *mine, *system, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return subprocess.run([program], capture_output=True, text=True)


@needs_headers
def test_every_offset_is_cutlass_own(tmp_path):
    done = compare(tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout) > 4_000_000  # offsets compared


@needs_headers
@pytest.mark.parametrize(
    "file, ours, other",
    [
        ("formats/layout.h", "(in_tile % 32) * 16 + (in_tile / 32) * 4",
         "(in_tile % 32) * 4 + (in_tile / 32) * 128"),
        ("formats/layout.h", "(r / kTileRows) * col_tiles + c / kTileCols",
         "c / kTileCols * 3 + r / kTileRows"),
        ("cpu/quantize.cpp", "codes[2 * i] | (codes[2 * i + 1] << 4)",
         "codes[2 * i + 1] | (codes[2 * i] << 4)"),
        ("cpu/quantize.cpp", "out[i] = codes[i]", "out[i ^ 1] = codes[i]"),
    ],
    ids=["in a tile", "of the tiles", "of 4-bit codes", "of 8-bit codes"],
)  # fmt: skip
def test_another_layout_is_noticed(file, ours, other, tmp_path):
    text = (ROOT / "csrc" / file).read_text()
    assert text.count(ours) == 1
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(text.replace(ours, other))
    done = compare(tmp_path, tmp_path)
    assert done.returncode == 1 and "CUTLASS" in done.stdout


def test_the_even_element_is_the_low_nibble_here_too():
    """What cutlass_layout.cpp asserts of CUTLASS, of the reference's packing."""
    import torch

    codes = torch.arange(16, dtype=torch.uint8).reshape(1, 16)
    packed = reference.pack(codes, 4)
    assert packed.tolist() == [[(2 * i + 1) << 4 | 2 * i for i in range(8)]]
