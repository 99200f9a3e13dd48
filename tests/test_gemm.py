"""gemm: the elementwise bound of docs/numerics.md, exact products, and what reaches the output."""

from __future__ import annotations

import pytest
import torch
from common import FORMATS, assert_same_bytes, operand, parts

import mxtrain
from mxtrain import reference

pytestmark = pytest.mark.ops("gemm", "quantize")
SHAPES = [(1, 1, 1), (16, 16, 32), (33, 65, 100), (128, 96, 512), (5, 300, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", FORMATS)
def test_error_bound(format, shape, device):
    """|D - D64| <= c |A||B|^T with c = K 2^-24.

    That is the worst case of a float32 sum of K exact products. tests/test_gemm_fold.py has the
    bound of the default accumulation in Hopper's FP8 tensor cores.
    """
    m, n, k = shape
    a, b = (
        operand(m, k, format, seed=1, device=device),
        operand(n, k, format, seed=2, device=device),
    )
    got = mxtrain.gemm(a, b, out_dtype=torch.float32, accumulate="exact").double().cpu()
    exact = reference.gemm_float64(*parts(a), *parts(b), format)
    magnitude = reference.gemm_magnitude(*parts(a), *parts(b), format)
    assert ((got - exact).abs() <= max(k, 8) * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", [f for f in FORMATS if f != "nvfp4"])
def test_exact_where_sums_are_exact(format, out_dtype, device):
    """Small integers: partial sums are integers below 2^24, so only the output is rounded."""
    k = 160
    a = torch.randint(-1, 2, (40, k)).float() * 2
    b = torch.randint(-1, 2, (24, k)).float() * 4
    a[:, ::32] = b[:, ::32] = 4.0  # one scale for every block
    bias = torch.randint(-8, 9, (24,)).float()
    got = mxtrain.gemm(
        mxtrain.quantize(a.to(device), format),
        mxtrain.quantize(b.to(device), format),
        bias.to(device),
        alpha=0.5,
        out_dtype=out_dtype,
    )
    assert_same_bytes(got, (0.5 * (a @ b.T) + bias).to(out_dtype))


@pytest.mark.parametrize("format", FORMATS)
def test_alpha_and_bias(format, device):
    a, b = (
        operand(20, 64, format, seed=1, device=device),
        operand(30, 64, format, seed=2, device=device),
    )
    bias = torch.randn(30, device=device)
    plain = mxtrain.gemm(a, b, out_dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = mxtrain.gemm(a, b, bias.to(dtype), alpha=16 / 9, out_dtype=torch.float32)
        torch.testing.assert_close(got, plain * (16 / 9) + bias.to(dtype).float())
    # the same product: by `dequant` cuBLAS rounds only results whose rows are whole 16 bytes
    assert_same_bytes(mxtrain.gemm(a, b), plain.bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_a_nan_block_reaches_its_row_or_column_and_nothing_else(format, device):
    x, y = torch.randn(16, 96), torch.randn(24, 96)
    x[3, 40] = float("nan")
    y[7, 90] = float("inf")
    got = (
        mxtrain.gemm(mxtrain.quantize(x.to(device), format), mxtrain.quantize(y.to(device), format))
        .isnan()
        .cpu()
    )
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[3, :] = expected[:, 7] = True
    assert torch.equal(got, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_agrees_with_the_reference_gemm(format, device):
    a, b = (
        operand(20, 100, format, seed=1, device=device),
        operand(30, 100, format, seed=2, device=device),
    )
    expected = reference.gemm(*parts(a), *parts(b), format, out_dtype=torch.float32)
    torch.testing.assert_close(
        mxtrain.gemm(a, b, out_dtype=torch.float32).cpu(),
        expected,
        rtol=1e-4,
        atol=1e-4 * float(expected.abs().max()),
    )


@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3"])
def test_a_bfloat16_result_is_rounded_once(format, device):
    """Of few elements and a long K, whose parts a library might add in bfloat16.

    Each such addition is off by up to 2^-8 of a sum as large as the result; two float32 results by
    some 2^-18 of it.
    """
    a, b = (operand(48, 32768, format, seed=s, device=device) for s in (1, 2))
    exact, got = mxtrain.gemm(a, b, out_dtype=torch.float32), mxtrain.gemm(a, b).float()
    allowed = 2.0**-8 * exact.abs() + 2.0**-14 * exact.square().mean().sqrt()
    assert ((got - exact).abs() <= allowed).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_bfloat16_result_needs_no_float32_one():
    """By `dequant`: cuBLAS is found, and writes the result itself."""
    a = operand(2048, 2048, "mxfp8_e4m3", device="cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mxtrain.gemm(a, a)
    # both operands decoded and the result, 2 bytes an element each
    assert torch.cuda.max_memory_allocated() - before < 3.5 * 2 * 2048**2


def test_empty_and_deterministic(device):
    a, b = operand(0, 64, "mxfp4", device=device), operand(30, 64, "mxfp4", device=device)
    assert mxtrain.gemm(a, b).shape == (0, 30) and mxtrain.gemm(b, a).shape == (30, 0)
    c = operand(300, 640, "mxfp4", device=device)
    first = mxtrain.gemm(c, c)
    assert all(torch.equal(first, mxtrain.gemm(c, c)) for _ in range(3))


def test_swizzled_operands(device):
    x = torch.randn(70, 130, device=device)
    a, s = mxtrain.quantize(x, "mxfp4"), mxtrain.quantize(x, "mxfp4", swizzle=True)
    assert_same_bytes(mxtrain.gemm(s, s), mxtrain.gemm(a, a))


def test_hadamard_cancels(device):
    """Both operands rotated by the same T: (A T)(B T)^T = A B^T, up to quantization.

    Exact T for mxfp8 data of a few binades.
    """
    x, y = torch.randn(32, 256, device=device), torch.randn(48, 256, device=device)
    signs = mxtrain.draw_signs(64, device=device)[0]
    a, b = (mxtrain.quantize(t, "mxfp8_e4m3", hadamard=64, signs=signs) for t in (x, y))
    error = (mxtrain.gemm(a, b, out_dtype=torch.float32) - x @ y.T).norm() / (x @ y.T).norm()
    assert error < 0.05
    other = mxtrain.quantize(y, "mxfp8_e4m3", hadamard=64, signs=-signs.roll(1))
    assert (mxtrain.gemm(a, other, out_dtype=torch.float32) - x @ y.T).norm() / (
        x @ y.T
    ).norm() > 0.5


@pytest.mark.ops("quantize", "gemm_add_")
@pytest.mark.parametrize("format", ["mxfp4", "mxfp8_e4m3", "nvfp4"])
@pytest.mark.parametrize("shape", [(64, 96, 128), (33, 47, 100), (1, 1, 32), (256, 130, 4096)])
def test_gemm_add_is_the_product_and_one_addition(format, shape, device):
    m, n, k = shape
    a, b = (
        operand(m, k, format, seed=1, device=device),
        operand(n, k, format, seed=2, device=device),
    )
    out = torch.randn(m, n, device=device)
    expected, version = out.clone(), out._version
    for alpha in (1.0, -0.5, 16 / 9):
        assert mxtrain.gemm_add_(out, a, b, alpha) is out
        expected += mxtrain.gemm(a, b, alpha=alpha, out_dtype=torch.float32)
    assert torch.equal(out, expected) and out._version > version


@pytest.mark.ops("quantize", "gemm_add_")
def test_gemm_add_of_nothing_and_under_compile(device):
    a, b = operand(0, 64, "mxfp4", device=device), operand(5, 64, "mxfp4", device=device)
    assert mxtrain.gemm_add_(torch.ones(0, 5, device=device), a, b).shape == (0, 5)
    a = operand(7, 64, "mxfp4", device=device)

    def step(out):
        mxtrain.gemm_add_(out, a, b)
        return mxtrain.gemm_add_(out, a, b, 0.5).sum()

    eager, compiled = (torch.full((7, 5), 3.0, device=device) for _ in range(2))
    want = step(eager)
    got = torch.compile(step, fullgraph=True)(compiled)
    assert torch.equal(eager, compiled) and torch.allclose(got, want)


@pytest.mark.parametrize("shape", [*SHAPES, (300, 260, 480), (64, 1031, 96)])
def test_accumulation_adds_the_product_rounded_to_float32(shape, device):
    """gemm_add_ is one rounded addition to what gemm returns, element for element, twice over."""
    m, n, k = shape
    a, b = (
        operand(m, k, "mxfp4", seed=1, device=device),
        operand(n, k, "mxfp4", seed=2, device=device),
    )
    out = torch.randn(m, n, generator=torch.Generator().manual_seed(3)).to(device)
    for accumulate in ("fp32", "exact", "fast"):
        product = mxtrain.gemm(a, b, alpha=0.7, out_dtype=torch.float32, accumulate=accumulate)
        expected = out + product + product
        got = out.clone()
        assert mxtrain.gemm_add_(got, a, b, alpha=0.7, accumulate=accumulate) is got
        mxtrain.gemm_add_(got, a, b, alpha=0.7, accumulate=accumulate)
        assert_same_bytes(got, expected, accumulate)
