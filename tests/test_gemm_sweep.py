"""gemm and gemm_add_ on 500 random calls: ragged shapes, every epilogue, every backend.

Part 0 runs always; the others are slow ones, which also run under a memory and a race checker:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \\
        --kernel-name kernel_substring=mxtrain \\
        python -m pytest -m "slow or not slow" tests/test_gemm_sweep.py

(without the caching, every tensor ends where its memory does). `--tool racecheck` likewise, with
MXTRAIN_SWEEP_OWN_KERNELS=1, which makes folded products of the calls that end in cuBLAS: on its
kernels, instrumented or not, racecheck 2025.3 ends with "failed to handle a hardware exception".
(What surrounds cuBLAS is elementwise, without shared memory.)
"""

from __future__ import annotations

import contextlib
import math
import os
import random
from dataclasses import dataclass, replace

import pytest
import torch
from common import FLOATS, FORMATS, refuses
from torch import Tensor

import mxtrain
from mxtrain.env import gemm_backend_here

pytestmark = pytest.mark.ops("gemm", "gemm_add_", "dequantize")

PARTS, CALLS = 10, 50  # of a part
BACKENDS = ("auto", "fold_packed", "fold_mma", "dequant")
OWN_KERNELS = os.environ.get("MXTRAIN_SWEEP_OWN_KERNELS") == "1"


@dataclass(frozen=True)
class Call:
    """One random call. `shift` bytes or elements lie before operands, bias and out."""

    m: int
    n: int
    k: int
    format: str
    backend: str
    accumulate: str
    spread: float  # of the block scales, in binades
    out_dtype: torch.dtype
    bias: torch.dtype | None
    alpha: float
    add: bool  # gemm_add_
    nan: bool  # a NaN scale in each operand
    shift: int

    @staticmethod
    def draw(r: random.Random) -> Call:
        size = lambda: r.choice((r.randint(1, 40), r.randint(1, 300), 8 * r.randint(1, 40)))  # noqa: E731
        return Call(
            m=size(),
            n=size(),
            k=r.choice((r.randint(1, 64), r.randint(1, 700), 128 * r.randint(1, 5))),
            format=r.choice(("mxfp4",) * 5 + tuple(FORMATS)),
            backend=r.choice(BACKENDS),
            accumulate=r.choice(("fp32", "fast", "exact")),
            spread=r.choice((0.0, 1.0, 4.0)),
            out_dtype=r.choice(FLOATS),
            bias=r.choice((None, *FLOATS)),
            alpha=r.choice((1.0, -0.5, 16 / 9, 2.0**-10)),
            add=r.random() < 0.25,
            nan=r.random() < 0.1,
            shift=r.choice((0, 0, 1, 4, 16)),
        )


def served(call: Call, device: str) -> str:
    """The call's backend, or "auto" where the GPU or the format has no such one."""
    if not call.backend.startswith("fold") or device == "cpu":
        return call.backend
    hopper = torch.cuda.get_device_capability()[0] == 9
    folds = hopper and gemm_backend_here(call.format) == "fold"
    return call.backend if folds else "auto"


def resolved(name: str, call: Call) -> str:
    """The backend that "auto" takes for the call; another is itself."""
    return gemm_backend_here(call.format) if name == "auto" else name


@contextlib.contextmanager
def backend(name: str):
    before = mxtrain.set_gemm_backend(name)
    try:
        yield
    finally:
        mxtrain.set_gemm_backend(before)


def shifted(t: Tensor, by: int, device: str) -> Tensor:
    """t on the device, contiguous, its first element `by` elements behind the start of memory."""
    if by == 0:
        return t.to(device)
    storage = torch.empty(t.numel() + by, dtype=t.dtype, device=device)
    storage[by:] = t.flatten().to(device)
    return storage[by:].view_as(t)


def random_operand(call: Call, rows: int, g: torch.Generator, device: str) -> mxtrain.Operand:
    """Any finite codes, under scales of 2^(a normal distribution)."""
    fmt = mxtrain.FORMATS[call.format]
    blocks = fmt.padded(call.k) // fmt.block
    data = torch.randint(0, 256, (rows, fmt.row_bytes(call.k)), generator=g, dtype=torch.uint8)
    if fmt.bits == 8:
        data &= 0xBF  # keeps the exponent off the codes of NaN and Inf
    data[:, call.k * fmt.bits // 8 :] = 0  # the padding of K
    exponent = (call.spread * torch.randn(rows, blocks, generator=g)).round()
    scale = (56 + 8 * exponent.clamp(-6, 7) if fmt.two_level else 127 + exponent).to(torch.uint8)
    if call.nan:
        row, block = (int(torch.randint(size, (), generator=g)) for size in scale.shape)
        scale[row, block] = 0x7F if fmt.two_level else 255
    top = torch.tensor([0.375], device=device) if fmt.two_level else None
    parts = (shifted(t, call.shift, device) for t in (data, scale))
    return mxtrain.Operand(*parts, call.format, (rows, call.k), top)


def tolerance(call: Call, name: str) -> float:
    """c of |a sum's error| <= c |A||B|^T (docs/numerics.md). "fast" adds up the c of its parts."""
    if name == "dequant":  # cuBLAS's tensor cores cut off what others round, in short sums too
        return max(call.k, 8) * 2.0**-24
    if not name.startswith("fold") or call.accumulate == "exact":
        return call.k * 2.0**-24
    k = mxtrain.FORMATS[call.format].padded(call.k)
    return 2.0**-9 * (-(-k // 128) if call.accumulate == "fast" else 1)


def float32_error(call: Call, c: float, product: Tensor, magnitude: Tensor, other: Tensor | None):
    """What D's float32 value may be off before its rounding to D's type.

    The sum's c |A||B|^T (`magnitude` has alpha in it), and one rounding for each operation of the
    epilogue that may round: the two tensor scales, alpha, and the addition of bias or D.
    """
    error = c * magnitude
    roundings = 2 * mxtrain.FORMATS[call.format].two_level
    roundings += math.frexp(abs(call.alpha))[0] != 0.5
    for _ in range(roundings):
        error = error + 2.0**-24 * (product.abs() + error)
    if other is not None:
        error = error + 2.0**-24 * ((product + other).abs() + error)
    return error


def check(call: Call, seed: int, device: str) -> None:
    """The call against float64, elementwise.

    Rounding to D's type keeps order: D lies between the rounded ends of where D's float32 value
    does.
    """
    g = torch.Generator().manual_seed(seed)
    a, b = (random_operand(call, rows, g, device) for rows in (call.m, call.n))
    left, right = (t.dequantize(torch.float32).double() for t in (a, b))
    if OWN_KERNELS:
        left, right = left.cpu(), right.cpu()
    alpha = torch.tensor(call.alpha, dtype=torch.float32).item()
    product = (alpha * (left @ right.T)).to(device)
    magnitude = (abs(alpha) * (left.abs() @ right.abs().T)).to(device)
    out_dtype = torch.float32 if call.add else call.out_dtype
    other = None  # what is added to the product
    name = served(call, device)
    with backend(name):
        if call.add:
            before = torch.randn(call.m, call.n, generator=g)
            out, other = shifted(before.clone(), call.shift, device), before.to(device)
            assert mxtrain.gemm_add_(out, a, b, alpha, call.accumulate) is out
        else:
            bias = None
            if call.bias is not None:
                values = torch.randn(call.n, generator=g).to(call.bias)
                bias, other = shifted(values, call.shift, device), values.to(device)
            out = mxtrain.gemm(a, b, bias, alpha, out_dtype, call.accumulate)
    other = other if other is None else other.double()
    expected = product if other is None else product + other
    if device == "cpu" and name in BACKENDS:
        name = "cpu"
    name = resolved(name, call)
    error = float32_error(call, tolerance(call, name), product, magnitude, other)
    low, high = ((expected + e).float().to(out_dtype) for e in (-error, error))
    assert out.shape == (call.m, call.n) and out.dtype == out_dtype, call
    assert torch.equal(out.isnan(), expected.isnan()), call
    assert (((low <= out) & (out <= high)) | expected.isnan()).all(), call


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, PARTS))]
)
def test_random_calls(part, device):
    r = random.Random(part)
    for i in range(CALLS):
        call = Call.draw(r)
        if OWN_KERNELS and resolved(served(call, device), call) == "dequant":
            call = replace(call, format="mxfp4", backend="auto")
        check(call, 1000 * part + i, device)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16])
def test_the_neighbour_of_the_right_value_is_noticed(monkeypatch, device, out_dtype):
    call = Call(20, 30, 1, "mxfp4", "dequant", "exact", 1.0, out_dtype, None, 1.0, False,
                False, 0)  # fmt: skip
    check(call, 0, device)
    gemm = mxtrain.gemm

    def off_by_one(*args):
        out = gemm(*args)
        out.view(torch.int16)[3, 4] += 1
        return out

    monkeypatch.setattr(mxtrain, "gemm", off_by_one)
    with pytest.raises(AssertionError, match="format='mxfp4'"):
        check(call, 0, device)


def test_the_sweep_covers_every_option():
    calls = [Call.draw(r) for r in map(random.Random, range(PARTS)) for _ in range(CALLS)]
    assert len(set(calls)) == PARTS * CALLS == 500
    for name in BACKENDS:
        some = [c for c in calls if c.format == "mxfp4" and c.backend == name]
        for field, count in [("accumulate", 3), ("out_dtype", 3), ("bias", 4), ("alpha", 4),
                            ("add", 2), ("nan", 2), ("shift", 4), ("spread", 3)]:  # fmt: skip
            assert len({getattr(c, field) for c in some}) == count, (name, field)
    assert {c.format for c in calls} == set(FORMATS)


def test_an_accumulator_of_another_shape_or_device_is_refused(device):
    a, b = (mxtrain.quantize(torch.ones(rows, 64, device=device), "mxfp4") for rows in (5, 7))
    for out in (torch.zeros(7, 5), torch.zeros(5, 8), torch.zeros(35), torch.zeros(5, 14)[:, ::2],
                torch.zeros(5, 7).half()):  # fmt: skip
        out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=device)
        with refuses(RuntimeError, r"gemm_add_: out must be contiguous, float32 of shape \[5, 7\]"):
            mxtrain.gemm_add_(out, a, b)
    other = "cpu" if device == "cuda" else "meta"
    with refuses(RuntimeError, "gemm_add_: .* must be on the device of the first argument"):
        mxtrain.gemm_add_(torch.zeros(5, 7, device=other), a, b)
    with refuses(RuntimeError, "gemm: .* must be on the device of the first argument"):
        mxtrain.gemm(a, b, torch.zeros(7, device=other))
