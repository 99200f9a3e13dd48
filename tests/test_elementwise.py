"""dequantize, hadamard, stochastic_round and the scale layouts against the reference.

Byte for byte.
"""

from __future__ import annotations

import pytest
import torch
from common import FLOATS, FORMATS, assert_same_bytes

import mxtrain
from mxtrain import reference

RNG = torch.tensor([-3, 2**33 + 4])


def every_code_and_scale(format: str) -> tuple:
    """An operand with every element code under every scale code: [256, codes, padded to blocks]."""
    fmt = mxtrain.FORMATS[format]
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    codes = codes.repeat(-(-fmt.block // len(codes)))
    data = reference.pack(codes[None], fmt.bits).expand(256, -1).contiguous()
    scale = (
        torch.arange(256, dtype=torch.uint8)[:, None]
        .expand(256, len(codes) // fmt.block)
        .contiguous()
    )
    return data, scale, torch.tensor([0.37]) if fmt.two_level else None, len(codes)


def same_values(got, expected, what):
    """Bytes, with every NaN taken as one: a NaN's payload is not part of the contract."""
    assert torch.equal(got.isnan().cpu(), expected.isnan()), what
    assert_same_bytes(
        got.cpu().nan_to_num(nan=0.0, posinf=None), expected.nan_to_num(nan=0.0, posinf=None), what
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.ops("dequantize")
def test_dequantize_every_code_under_every_scale(format, dtype, device):
    data, scale, tensor_scale, cols = every_code_and_scale(format)
    moved = [t if t is None else t.to(device) for t in (data, scale, tensor_scale)]
    got = torch.ops.mxtrain.dequantize(*moved, mxtrain.FORMATS[format].code, cols, dtype)
    same_values(got, reference.dequantize(data, scale, tensor_scale, format, cols, dtype), format)


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 31, 33, 100])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.ops("dequantize")
def test_dequantize_ragged(format, cols, device):
    data, scale, tensor_scale = reference.quantize(torch.randn(5, cols), format)
    moved = [t if t is None else t.to(device) for t in (data, scale, tensor_scale)]
    got = torch.ops.mxtrain.dequantize(*moved, mxtrain.FORMATS[format].code, cols, torch.float32)
    assert_same_bytes(got, reference.dequantize(data, scale, tensor_scale, format, cols))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.ops("hadamard")
def test_hadamard(group, dtype, device):
    x = torch.randn(3, 7, 768).to(dtype)
    signs = mxtrain.draw_signs(group)[0]
    for s in (None, signs):
        got = mxtrain.hadamard(x.to(device), group, None if s is None else s.to(device))
        assert_same_bytes(got, reference.hadamard(x, group, s))
    assert_same_bytes(
        mxtrain.hadamard(x.to(device).transpose(0, 1), group),
        reference.hadamard(x.transpose(0, 1), group),
    )
    assert mxtrain.hadamard(x[:0].to(device), group).shape == (0, 7, 768)


@pytest.mark.ops("hadamard")
def test_hadamard_gradient(device):
    x = torch.randn(4, 64, dtype=torch.float32, device=device, requires_grad=True)
    signs = mxtrain.draw_signs(32, device=device)[0]
    g = torch.randn(4, 64, device=device)
    mxtrain.hadamard(x, 32, signs).backward(g)
    # The rotation is orthogonal: <H x, g> = <x, H^T g>, and H^T undoes H.
    torch.testing.assert_close((mxtrain.hadamard(x, 32, signs) * g).sum(), (x * x.grad).sum())
    torch.testing.assert_close(mxtrain.hadamard(x.grad, 32, signs), g)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.ops("stochastic_round")
def test_stochastic_round(dtype, device):
    x = torch.randn(999) * torch.exp2(torch.randint(-140, 127, (999,)).float())
    x[:10] = torch.tensor(
        [
            0.0,
            -0.0,
            float("inf"),
            -float("inf"),
            float("nan"),
            3.4e38,
            -3.4e38,
            1e-45,
            448.0,
            57344.0,
        ]
    )
    for view in (x, x.reshape(27, 37).T):
        got = mxtrain.stochastic_round(view.to(device), dtype, RNG.to(device))
        expected = reference.stochastic_round(view, dtype, RNG)
        nan = expected.float().isnan()
        assert torch.equal(got.float().isnan().cpu(), nan)
        assert_same_bytes(
            got.float().cpu().masked_fill(nan, 0), expected.float().masked_fill(nan, 0)
        )
    finite = (
        mxtrain.stochastic_round(x.to(device), dtype, RNG.to(device)).float().cpu()[x.isfinite()]
    )
    assert finite.isfinite().all()


@pytest.mark.ops("stochastic_round")
def test_stochastic_round_is_unbiased(device):
    """The mean of n draws of 1 + f/256 (bf16 step 2^-7) is unbiased.

    It has standard error step * sqrt(f(1-f)/n): 7 of them is p < 1e-11.
    """
    n = 200_000
    for f in (0.03, 0.5, 0.9):
        x = torch.full((n,), 1 + f / 128, device=device)
        y = mxtrain.stochastic_round(x, torch.bfloat16, RNG.to(device)).double()
        fraction = float((x[0].double() - 1) * 128)
        assert abs(float((y.mean() - 1) * 128) - fraction) < 7 * (f * (1 - f) / n) ** 0.5 + 2**-17


@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 4), (129, 5), (300, 17), (0, 4), (256, 32), (300, 80)]
)
@pytest.mark.ops("swizzle_scale", "unswizzle_scale")
def test_scale_layout(shape, device):
    scale = torch.randint(0, 256, shape, dtype=torch.uint8)
    swizzled = mxtrain.swizzle_scale(scale.to(device))
    assert_same_bytes(swizzled, reference.swizzle(scale))
    assert_same_bytes(mxtrain.unswizzle_scale(swizzled, *shape), scale)
    strided = torch.randint(0, 256, (shape[1], shape[0]), dtype=torch.uint8).T
    assert_same_bytes(mxtrain.swizzle_scale(strided.to(device)), reference.swizzle(strided))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_column_sum_is_the_reference_on_every_device(dtype, device):
    """Bytes; ragged in both directions, strided, and at an odd address."""
    g = torch.Generator().manual_seed(0)
    for n, c in [(1, 1), (31, 7), (300, 264), (1025, 72), (5000, 1000), (0, 5), (4, 0)]:
        dy = torch.randn(n, c, generator=g).to(dtype)
        expected = reference.column_sum(dy)
        assert_same_bytes(torch.ops.mxtrain.column_sum(dy.to(device)), expected, f"{n} {c}")
        columns = dy.t().contiguous().to(device).t()
        assert_same_bytes(torch.ops.mxtrain.column_sum(columns), expected, f"{n} {c} strided")
        moved = torch.cat([dy.new_zeros(1), dy.flatten()]).to(device)[1:].view(n, c)
        assert_same_bytes(torch.ops.mxtrain.column_sum(moved), expected, f"{n} {c} moved")
        exact, size = dy.double().sum(0), dy.double().abs().sum(0)
        assert ((expected.double() - exact).abs() <= 60 * 2.0**-24 * size).all()
