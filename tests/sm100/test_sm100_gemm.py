"""Backend sm100: what takes it, what it refuses, and on a GPU that has it, its products.

It has never run on the chip: the tests of products wait for one.
"""

from __future__ import annotations

import ctypes
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
import torch
from common import assert_same_bytes, operand, prefer_pair, refuses
from test_gemm_sweep import Call, backend, check

import mxtrain
from mxtrain._library import CATALOGUE, LIBRARY, gemm_backend
from mxtrain.env import gemm_backend_here

FORMATS = ("mxfp4", "nvfp4", "mxfp8_e4m3", "mxfp8_e5m2")
ARCHS = CATALOGUE["build"]["cuda_archs"].split(";")
FAMILY = {"100a", "103a", "100f", "103f"}
HAS_SM100 = torch.cuda.is_available() and gemm_backend_here("mxfp4") == "sm100"
on_sm100 = pytest.mark.skipif(not HAS_SM100, reason="no GPU that this build has sm100 for")
needs_emulation = pytest.mark.skipif(
    emulated.library() is None, reason="the emulated library has not been built"
)
needs_cuda_build = pytest.mark.skipif(ARCHS == [""], reason="a build with CUDA chooses")
PARTS, CALLS = 4, 50
PAIR_SHAPES = [(2048, 2048, 512), (2047, 2300, 288), (4099, 3001, 1040)]


@needs_cuda_build
def test_auto_takes_it_on_10_only_and_says_what_is_missing():
    for (major, minor), arch in {(10, 0): "100a", (10, 3): "103a"}.items():
        for name, fmt in mxtrain.FORMATS.items():
            chosen = gemm_backend(major, minor, fmt.code)
            if name not in FORMATS:
                assert chosen == "dequant: decode to BF16, cuBLAS"
            elif not FAMILY & set(ARCHS):
                advice = f"sm100 needs a build with {arch}, the suffix included"
                assert chosen.startswith("dequant: ") and advice in chosen
                assert chosen.endswith(f"MXTRAIN_CUDA_ARCHS={arch}")
            elif not CATALOGUE["build"]["cutlass"]:
                assert chosen.startswith("dequant: ") and "a build with CUTLASS" in chosen
            else:  # either suffix: one object serves both
                assert chosen == "sm100: block-scaled tensor cores by tcgen05"
    for major, minor in [(8, 0), (8, 9), (9, 0), (12, 0), (12, 1)]:
        for fmt in mxtrain.FORMATS.values():
            assert "sm100" not in gemm_backend(major, minor, fmt.code)


@needs_emulation
@pytest.mark.parametrize("format", FORMATS)
def test_what_surrounds_the_product(format):
    """What the op hands to CUTLASS and makes of its result, with a plain product in its place: rows
    and scales that are not whole, addresses, tiles for both outputs, bias, addition, NaN."""
    r = random.Random(format)
    calls = [replace(Call.draw(r), format=format, backend="sm100") for _ in range(20)]
    lines = [replace(calls[i], m=m, n=n) for i, (m, n) in enumerate([(1, 1), (1, 130), (77, 1)])]
    of_pairs = {"out_dtype": torch.bfloat16, "add": False}
    pairs = [
        replace(calls[i], m=m, n=n, k=k, **of_pairs)
        for i, (m, n, k) in enumerate([(256, 256, 32), (251, 253, 40)])
    ]
    assert all(prefer_pair(c.m, c.n, 2) for c in pairs)
    with emulated.emulated("sm100"):
        for seed, call in enumerate([*calls, *lines, *pairs]):
            check(call, seed, "cpu")


@needs_emulation
@pytest.mark.parametrize("format", FORMATS)
def test_scales_in_tiles_and_plain_give_the_same_bytes(format):
    a, b = (operand(rows, 300, format, seed=rows) for rows in (150, 90))
    tiled = [mxtrain.quantize(t.dequantize(), format, swizzle=True) for t in (a, b)]
    plain = [mxtrain.quantize(t.dequantize(), format) for t in (a, b)]
    with emulated.emulated("sm100"):
        assert_same_bytes(mxtrain.gemm(*tiled), mxtrain.gemm(*plain))


@pytest.mark.skipif(not CATALOGUE["build"]["cutlass"], reason="a build with CUTLASS")
@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_cutlass_takes_every_size_that_is_handed_to_it(format, pair):
    """Its own check of shapes and alignments, on the host; the sizes as csrc/ops/cuda_gemm.cpp."""
    fmt, unit = mxtrain.FORMATS[format], 8 if pair else 4
    takes = LIBRARY.mxtrain_sm100_takes
    takes.argtypes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4]
    r = random.Random(1)
    for _ in range(300):
        m, n, k = (r.choice((r.randint(1, 40), r.randint(1, 9000))) for _ in range(3))
        row_bytes = -(-fmt.row_bytes(k) // 16) * 16
        handed = (m, n, row_bytes * 8 // fmt.bits, -(-n // unit) * unit)
        assert takes(fmt.code, pair, *handed) == 0, handed
    assert takes(fmt.code, pair, 100, 99, 128, 99) == 1  # cudaErrorInvalidValue: rows of D
    assert takes(fmt.code, pair, 100, 104, 16 if fmt.bits == 4 else 8, 104) == 1  # of A and B


@pytest.mark.skipif(not torch.cuda.is_available() or HAS_SM100, reason="needs another GPU")
@pytest.mark.ops("gemm")
def test_it_is_refused_where_it_does_not_run():
    a = operand(16, 64, "mxfp4", device="cuda")
    with backend("sm100"), refuses(RuntimeError, "got sm100 .* built for 100a or 103a"):
        mxtrain.gemm(a, a)


@pytest.mark.ops("quantize", "gemm", "gemm_add_", "swizzle_scale")
@pytest.mark.parametrize("format", mxtrain.FORMATS)
def test_swizzled_scales_give_the_bytes_of_plain_ones(format, device):
    """Straight from quantize(..., swizzle=True), of either operand or both, on every backend."""
    x = torch.randn(140, 100, generator=torch.Generator().manual_seed(1)).to(device)
    y = torch.randn(70, 100, generator=torch.Generator().manual_seed(2)).to(device)
    a, b = mxtrain.quantize(x, format), mxtrain.quantize(y, format)
    a_tiles, b_tiles = (mxtrain.quantize(t, format, swizzle=True) for t in (x, y))
    assert a_tiles.scale.shape == (2, -(-a.scale.shape[1] // 4), 512)
    expected = mxtrain.gemm(a, b)
    for left, right in ((a_tiles, b), (a, b_tiles), (a_tiles, b_tiles)):
        assert_same_bytes(mxtrain.gemm(left, right), expected)
    out = torch.ones(140, 70, device=device)
    assert_same_bytes(
        mxtrain.gemm_add_(out.clone(), a_tiles, b_tiles), mxtrain.gemm_add_(out.clone(), a, b)
    )


@pytest.mark.ops("gemm", "swizzle_scale")
def test_swizzled_scales_of_the_wrong_size_are_refused_with_the_right_one(device):
    a = operand(140, 160, "mxfp4", device=device)
    tiles = mxtrain.swizzle_scale(a.scale)  # [2, 2, 512]
    call = lambda s: torch.ops.mxtrain.gemm(  # noqa: E731
        a.data, s, None, a.data, a.scale, None, 0, None, 1.0, torch.bfloat16
    )
    expected = r"a scale must have shape \[2, 2, 512\] where it is swizzled, got "
    for wrong in (tiles[:1], tiles[:, :1], tiles[:, :, :256], tiles.view(4, 1, 512)):
        with refuses(RuntimeError, expected + r".* pads them to 128 rows and 4 columns"):
            call(wrong)
        with refuses(RuntimeError, expected):
            call_meta(a, wrong)
    for wrong in (tiles.flatten(), tiles.int(), tiles[None]):
        with refuses(RuntimeError, "a scale must be uint8 with 2 dimensions, or 3 where it is"):
            call(wrong)
    with refuses(RuntimeError, r"a scale must have shape \[140, 5\], got \[256, 8\]"):
        call(tiles.view(256, 8))  # padded, and not in tiles
    for op in ("dequantize", "requantize"):  # these take plain ones
        rest = (torch.float32,) if op == "dequantize" else (0,)
        with refuses(RuntimeError, "operand scale must be uint8 with 2 dimensions"):
            getattr(torch.ops.mxtrain, op)(a.data, tiles, None, 0, 160, *rest)


def call_meta(a: mxtrain.Operand, scale: torch.Tensor) -> None:
    """The same call as the fake kernel sees it."""
    data, plain, wrong = (torch.empty_like(t, device="meta") for t in (a.data, a.scale, scale))
    torch.ops.mxtrain.gemm(data, wrong, None, data, plain, None, 0, None, 1.0, torch.bfloat16)


# ---- the product ----


@on_sm100
@pytest.mark.parametrize("part", range(PARTS), ids=lambda part: f"part{part}")
def test_random_calls(part):
    """Elementwise within K * 2^-24 |A||B|^T of float64, before the rounding to D's type."""
    r = random.Random(part)
    for i in range(CALLS):
        call = replace(Call.draw(r), format=r.choice(FORMATS), backend="sm100")
        check(call, 1000 * part + i, "cuda")


@on_sm100
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("shape", PAIR_SHAPES)
def test_the_pair_and_the_single_agree(format, shape):
    """bfloat16 out takes the pair's tile here, float32 the single's: one rounding apart."""
    m, n, k = shape
    a, b = (operand(rows, k, format, seed=rows, device="cuda") for rows in (m, n))
    bias = torch.randn(n, device="cuda")
    wide = mxtrain.gemm(a, b, bias, 0.7, torch.float32)
    narrow = mxtrain.gemm(a, b, bias, 0.7, torch.bfloat16)
    magnitude = a.dequantize().abs().double() @ b.dequantize().abs().double().T
    slack = 2 * k * 2.0**-24 * 0.7 * magnitude + 2.0**-8 * wide.abs().double()
    assert ((narrow.double() - wide.double()).abs() <= slack).all()


def test_these_shapes_take_the_pair_at_148_152_and_160_multiprocessors():
    for m, n, _ in PAIR_SHAPES:
        assert all(prefer_pair(m, n, count) for count in (148, 152, 160)), (m, n)
    assert not any(prefer_pair(2304, 2056, count) for count in (148, 152, 160))


GEMM_H = Path(__file__).parents[2] / "csrc/cuda/sm100/gemm.h"


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_rule_of_the_tests_is_the_dispatchs(tmp_path):
    """common.prefer_pair against prefer_pair of csrc/cuda/sm100/gemm.h, compiled here."""
    (rule,) = re.findall(r"^inline (bool prefer_pair\(.*?^})", GEMM_H.read_text(), re.M | re.S)
    source = tmp_path / "rule.cpp"
    source.write_text(f'#include <cstdint>\nextern "C" {rule}\n')
    library = tmp_path / "rule.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    compiled = ctypes.CDLL(str(library)).prefer_pair
    compiled.argtypes, compiled.restype = (
        [ctypes.c_int64, ctypes.c_int64, ctypes.c_int],
        ctypes.c_bool,
    )
    r = random.Random(3)
    drawn = [(r.randint(1, 9000), r.randint(1, 9000), r.randint(2, 170)) for _ in range(5000)]
    assert all(compiled(*one) == prefer_pair(*one) for one in drawn)
    assert 500 < sum(prefer_pair(*one) for one in drawn) < 4500


@on_sm100
def test_the_same_call_gives_the_same_bytes():
    a, b = (operand(1000, 2048, "mxfp4", seed=s, device="cuda") for s in (1, 2))
    first = mxtrain.gemm(a, b)
    for _ in range(20):
        assert_same_bytes(mxtrain.gemm(a, b), first)
