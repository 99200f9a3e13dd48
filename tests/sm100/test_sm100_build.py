"""The objects of csrc/cuda/sm100 in machine code: the instructions that they are for.

Disassembles what a build for 100a or 103a left in build/; needs cuobjdump, no GPU.
"""

from __future__ import annotations

import re
import subprocess

import pytest
from common import cuobjdump
from sm100_common import ROOT, objects

SOURCES = sorted(path.stem for path in (ROOT / "csrc/cuda/sm100").glob("*.cu"))
OBJECTS = objects()
needs_objects = pytest.mark.skipif(
    not (OBJECTS and cuobjdump()), reason="needs a build for 100a with CUTLASS, and cuobjdump"
)


def dump(*arguments: str) -> str:
    return subprocess.run(
        [cuobjdump(), *arguments], capture_output=True, text=True, check=True
    ).stdout


def test_there_are_few_and_cmake_has_them_all():
    cmake = (ROOT / "cmake/cuda.cmake").read_text()
    assert len(SOURCES) == 6 and all(f"csrc/cuda/sm100/{name}.cu" in cmake for name in SOURCES)


@needs_objects
@pytest.mark.parametrize("name", SOURCES)
def test_an_object_has_the_block_scaled_instruction(name):
    """UTCOMMA is kind::mxf4 and mxf4nvf4, UTCQMMA kind::mxf8f6f4, UTCCP the copy of the scales."""
    code = dump("-sass", str(OBJECTS[name]))
    products = re.findall(r"\b(UTC\w*MMA)(\.2CTA)?", code)
    instruction = "UTCQMMA" if "mxfp8" in name else "UTCOMMA"
    pair = ".2CTA" if name.endswith("pair") else ""
    assert products and set(products) == {(instruction, pair)}
    assert re.search(r"\bUTCCP\.", code)  # scales, into tensor memory
    assert re.search(r"\bUTMALDG\.", code) and re.search(r"\bUTMASTG\.", code)  # TMA, both ways
    assert re.search(r"\bLDTM\.", code)  # the epilogue's reads of tensor memory
    assert not re.search(r"\b(HMMA|IMMA|QMMA|OMMA)\.", code)  # no product of another kind


@needs_objects
@pytest.mark.parametrize("name", SOURCES)
def test_one_object_serves_10_0_and_10_3(name):
    """Family code, and nothing on the stack: no spills."""
    elf = dump("-lelf", str(OBJECTS[name]))
    assert re.findall(r"sm_(\w+)\.cubin", elf) in (["100"], ["100f"])
    usage = re.findall(r"REG:(\d+) STACK:(\d+)", dump("-res-usage", str(OBJECTS[name])))
    assert usage and all(stack == "0" for _, stack in usage), usage
