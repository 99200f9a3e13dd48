"""The emulation of the CUDA kernels (docs/emulation.md): that it finds faults, and its GEMMs.

The tests of `device` that run on it are those of the files that emulated.py lists.
"""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from common import assert_same_bytes
from emulated import LIBRARY, emulated, library, set_order

import mxtrain

pytestmark = pytest.mark.skipif(
    library() is None, reason=f"{LIBRARY} has not been built: MXTRAIN_EMULATED=1 pip install -e ."
)

# As csrc/emulation/faults.cu numbers them. Wrong bytes, by chance in one order of the threads:
WRONG = {1: "barrier", 2: "syncwarp", 3: "wait", 4: "early write", 5: "uninitialized"}
FAULTS = {
    6: r"wait for others that cannot come.* at __shfl_xor_sync \(.*faults.cu:\d+\); \d+ of 64",
    7: r"at different barriers: .*faults.cu:\d+ and .*faults.cu:\d+",
    8: r"meet in __shfl_xor_sync \(.*\) and __shfl_xor_sync \(",
    9: r"wait for others that cannot come.* at __syncthreads \(.*; 1 of 64 have left",
    10: "1 bytes are not within shared memory",
    11: "16 bytes in shared memory are not aligned",
    12: "an address is used as one of shared memory, and is none",
}


@pytest.fixture(autouse=True)
def _order():
    yield
    set_order(1)


def launch(fault: int) -> tuple[str, torch.Tensor]:
    call = library().mxtrain_emulation_fault
    call.restype, call.argtypes = ctypes.c_char_p, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int]
    values = torch.arange(64, dtype=torch.int32)
    out = torch.full((64,), -1, dtype=torch.int32)
    message = call(out.data_ptr(), values.data_ptr(), fault).decode()
    return message, out


def expected() -> torch.Tensor:
    i = torch.arange(64)
    turned = ((i ^ 31) + 1) % 64 + 1
    return (turned + turned[i ^ 1]).int()


@pytest.mark.parametrize("seed", range(8))
def test_no_fault(seed):
    set_order(seed)
    message, out = launch(0)
    assert message == ""
    assert_same_bytes(out, expected())


@pytest.mark.parametrize("fault", WRONG, ids=WRONG.values())
def test_wrong_bytes(fault):
    """In every order but the one in turn: 64 threads are not in order by chance."""
    for seed in range(1, 9):
        set_order(seed)
        message, out = launch(fault)
        assert message == "" and not torch.equal(out, expected())


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_end_the_launch(fault):
    for seed in range(4):
        set_order(seed)
        message, _ = launch(fault)
        assert re.search(FAULTS[fault], message), message
    assert launch(0)[0] == ""  # and nothing of it stays


def integers(rows: int, k: int, format: str, seed: int) -> mxtrain.Operand:
    """Whose products sum exactly, in any order."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-4, 5, (rows, k), generator=generator).float()
    return mxtrain.quantize(x, format)


@pytest.mark.parametrize("shape", [(128, 128, 128), (33, 40, 96), (200, 130, 320)])
@pytest.mark.parametrize(
    "backend, format",
    [("fold", "mxfp4")] + [("sm120_emulated", f) for f in ("mxfp4", "nvfp4", "mxfp8_e4m3")],
)
def test_gemm(backend, format, shape):
    m, n, k = shape
    a, b = integers(m, k, format, 1), integers(n, k, format, 2)
    names = ["auto", "dequant", "fold", "fold_packed", "fold_mma", "sm120", "sm120_emulated"]
    args = (a.data, a.scale, a.tensor_scale, b.data, b.scale, b.tensor_scale,
            list(mxtrain.FORMATS).index(format), None, 1.0, torch.float32)  # fmt: skip
    was = library().mxtrain_set_gemm_backend(names.index(backend))
    try:
        got = torch.ops.mxtrain_emulated.gemm(*args)
    finally:
        library().mxtrain_set_gemm_backend(was)
    assert_same_bytes(got, torch.ops.mxtrain.gemm(*args))


@pytest.mark.parametrize("warp", [0, 5, 23])
def test_a_warp_that_others_overtake(warp):
    """Scales of the strips wait for each other in stages that come round, so one warp that is late
    must not let others take a stage's round for the one before.
    """
    x = torch.randn(512, 10 * 256, generator=torch.Generator().manual_seed(warp)).bfloat16()
    q = mxtrain.Quantizer("mxfp4")
    want = mxtrain.quantize_dual(x, q, q)
    set_order(((warp + 1) << 32) + 7)
    with emulated():
        got = mxtrain.quantize_dual(x, q, q)
    for a, b in zip(got, want, strict=True):
        assert_same_bytes(a.scale, b.scale)
        assert_same_bytes(a.data, b.data)
