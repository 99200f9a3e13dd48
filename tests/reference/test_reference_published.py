"""The quantizers against the published numbers and behaviour: the tests that bear a T-number.

Statistical tests have fixed seeds; the comment at each bound says how probable a failure of a
correct quantizer would be if the seed were free.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from common import refuses
from reference_common import (
    MX,
    every_format,
    every_mx,
    every_rule,
    exponents,
    gaussian,
    neighbours,
    quantized,
    random_signs,
    rng,
    wide,
)
from torch import Tensor

import mxtrain.reference as ref


def test_t01_ceil_scale_never_clips() -> None:
    x = wide(256, 128, seed=10)
    maximum = x.reshape(256, 4, 32).abs().amax(-1).double()
    scale = ref.quantize(x, "mxfp4")[1]
    s = torch.ldexp(torch.ones(256, 4, dtype=torch.float64), scale.int() - 127)
    ratio = (maximum / s)[maximum > 0]
    assert (ratio > 3).all() and (ratio <= 6).all()

    block = torch.full((1, 32), 31.0)
    assert ref.quantize(block, "mxfp4")[1].item() == 127 + 3
    assert ref.quantize(block, "mxfp4", scale_rule="floor")[1].item() == 127 + 2

    k = torch.arange(-127, 126)
    six = torch.ldexp(torch.full((253,), 1.5), k + 2)[:, None].repeat(1, 32)
    data, scale, _ = ref.quantize(six, "mxfp4")
    assert torch.equal(scale[:, 0].int() - 127, k.int()) and (data == 0x77).all()
    above = torch.nextafter(six, torch.full_like(six, math.inf))
    assert torch.equal(ref.quantize(above, "mxfp4")[1][:, 0].int() - 127, k.int() + 1)


def test_t02_ceil_scale_never_clips_small_bfloat16() -> None:
    for std in (1e-2, 1e-4, 1e-6, 1e-8):
        x = (gaussian(2048, 32, seed=11) * std).to(torch.bfloat16)
        e = exponents(ref.quantize(x, "mxfp4")[1])
        assert torch.ldexp(x.double(), -e).abs().max() <= 6


def test_t03_three_quarters_never_clips_with_the_floor_rule() -> None:
    """S = 2^(floor(log2 M) - 2) comes from M before the factor 3/4: 3/4 M / S lies in [3, 6)."""
    x = gaussian(50_000, 32, seed=12)
    maximum = x.abs().amax(1)
    e = ref.quantize(x, "mxfp4", prescale=0.75, scale_rule="floor")[1][:, 0].int() - 127
    ratio = torch.ldexp(0.75 * maximum.double(), -e)
    assert ratio.max() < 6 and ratio.min() >= 3
    assert torch.equal(e, torch.frexp(maximum)[1] - 3)
    # The scale is that of the unscaled block, whatever the rule.
    for rule in ("floor", "ceil", "even"):
        plain, pre = (ref.quantize(x, "mxfp4", prescale=f, scale_rule=rule)[1] for f in (1.0, 0.75))
        assert torch.equal(plain, pre)


def test_t04_stochastic_rounding_is_unbiased() -> None:
    x, n, calls = gaussian(64, 32, seed=13), 512, 8
    e = exponents(ref.quantize(x, "mxfp4")[1])
    u = torch.ldexp(x.double(), -e)
    low, high = neighbours(u)
    total = torch.zeros_like(u)
    squares = torch.zeros_like(u)
    for i in range(calls):
        q = quantized(x.repeat(n, 1), rounding="stochastic", rng=rng(77, i)).double()
        q = torch.ldexp(q.reshape(n, 64, 32), -e).abs()
        assert ((q == low) | (q == high)).all()
        total += q.sum(0)
        squares += ((q - u.abs()) ** 2).sum(0)
    n *= calls
    variance = (high - u.abs()) * (u.abs() - low)
    error = total / n - u.abs()
    assert (error[variance == 0] == 0).all()
    z = error[variance > 0] / (variance[variance > 0] / n).sqrt()
    # rms of 2048 z: standard deviation 0.017, so 0.12 is 7 of them, p < 1e-11
    assert abs(float((z**2).mean().sqrt()) - 1) < 0.12
    # |z| is near normal where at least 50 of the n draws are expected on either side;
    # 7.5 has p = 6e-14 each, 2e-10 for all 2048 (the skew of the sparsest ones: below 1e-9)
    common = variance[variance > 0] / ((high - low)[variance > 0] ** 2) * n >= 50
    assert float(z[common].abs().max()) < 7.5
    # the ratio has a standard deviation of about 0.1 %, so 5 % has p < 1e-100
    assert abs(float(squares.sum() / n / variance.sum()) - 1) < 0.05


def test_t05_stochastic_rounding_keeps_grid_values() -> None:
    """Every draw of every grid value is in test_elements; here through blocks, in bfloat16."""
    g = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6, 6])
    x = torch.ldexp(g.repeat(4096, 2), torch.arange(-64, 64).repeat(32)[:, None])
    x = x.to(torch.bfloat16)
    assert torch.equal(quantized(x, rounding="stochastic", rng=rng(5)), x.float())


@every_rule
@every_mx
def test_t06_quantization_is_idempotent(format: str, scale_rule: str) -> None:
    x = wide(64, 128, seed=14)
    once = quantized(x, format, scale_rule=scale_rule)
    assert torch.equal(quantized(once, format, scale_rule=scale_rule), once)
    if scale_rule == "ceil":
        again = quantized(once, format, rounding="stochastic", rng=rng(6))
        assert torch.equal(again, once)


def test_t07_nearest_error_and_ties() -> None:
    x = gaussian(512, 64, seed=15)
    data, scale, _ = ref.quantize(x, "mxfp4")
    u = torch.ldexp(x.double(), -exponents(scale))
    low, high = neighbours(u)
    error = (ref.decode(ref.unpack(data, 4), ref.E2M1) - u).abs()
    assert (error <= (high - low) / 2).all()
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    rounded = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    block = torch.tensor([*ties, *(-t for t in ties), 6.0, *[0.0] * 17])[None]
    expected = torch.tensor([*rounded, *(-r for r in rounded), 6.0, *[0.0] * 17])[None]
    assert torch.equal(quantized(block), expected)
    assert torch.signbit(quantized(block)[0, 7])


@every_rule
@every_format
def test_t08_zero_one_hot_and_extreme_blocks(format: str, scale_rule: str) -> None:
    element = ref.FORMATS[format].element
    for zero in (torch.zeros(2, 32), -torch.zeros(2, 32)):
        data, scale, _ = ref.quantize(zero, format, scale_rule=scale_rule)
        assert not data.any() and not scale.any()
    for value in (element.max, -1.0, 2.0**126, 2.0**-126, 2.0**-140):
        one_hot = torch.zeros(1, 32)
        one_hot[0, 9] = value
        y = quantized(one_hot, format, scale_rule=scale_rule)
        assert torch.isfinite(y).all()
        others = y.clone()
        others[0, 9] = 0
        assert not others.any()
        # relative spacing 2^-mbits; nvfp4 has an inexact scale besides; tiny blocks may round to 0
        bound = abs(value) * 2.0**-element.mbits
        if value != 2.0**-140:
            assert (y - one_hot).abs().max() <= bound
        if format in MX and value in (-1.0, 2.0**126, 2.0**-126):
            assert torch.equal(y, one_hot)
    # M / S is 2^-13 for a maximum of 2^-140: below half a subnormal for all but E5M2
    tiny = torch.full((1, 32), 2.0**-140)
    y = quantized(tiny, format, scale_rule=scale_rule)
    if format in MX:
        assert ref.quantize(tiny, format, scale_rule=scale_rule)[1].item() == 0
        assert torch.equal(y, tiny if format == "mxfp8_e5m2" else torch.zeros(1, 32))


def test_t09_double_quantization_is_unbiased() -> None:
    x, n = gaussian(64, 32, seed=16) * torch.exp(1.5 * gaussian(64, 32, seed=30)), 2048
    once = ref.quantize(x, "mxfp4")
    values = ref.dequantize(*once, "mxfp4", 32)
    repeated = (once[0].repeat(1, n), once[1].repeat(1, n), None)
    twice = ref.requantize(*repeated, "mxfp4", 32 * n, rounding="stochastic", rng=rng(8))
    y = ref.dequantize(*twice, "mxfp4", 64).reshape(n, 32, 64).transpose(1, 2).double()
    e = exponents(twice[1].reshape(n, 32, 2)[0]).t()
    u = torch.ldexp(values.double(), -e)
    low, high = neighbours(u)
    variance = torch.ldexp((high - u.abs()) * (u.abs() - low), 2 * e)
    error = y.mean(0) - values
    assert (error[variance == 0] == 0).all() and int((variance > 0).sum()) > 100
    common = (u.abs() - low) * (high - u.abs()) / (high - low) ** 2 * n >= 50
    z = error[common] / (variance[common] / n).sqrt()
    assert z.abs().max() < 7.5  # at most 2048 elements: p < 1e-9, as in T4

    x = gaussian(1024, 256, seed=17)
    once = ref.quantize(x, "mxfp4")
    values = ref.dequantize(*once, "mxfp4", 256)
    twice = ref.requantize(*once, "mxfp4", 256, rounding="stochastic", rng=rng(9))
    y = ref.dequantize(*twice, "mxfp4", 1024).t()
    # published: 0.6 % of the entries, 3e-4 added, 2.7e-2 for direct stochastic rounding
    assert 0.004 < float((y != values).float().mean()) < 0.009
    power = (x**2).mean()
    assert float(((y - values) ** 2).mean() / power) < 6e-4
    direct = quantized(x, rounding="stochastic", rng=rng(10))
    assert 2.6e-2 < float(((direct - x) ** 2).mean() / power) < 2.8e-2


def test_t12_noises_are_independent_and_reproducible() -> None:
    x = gaussian(512, 512, seed=18)
    options = {"rounding": "stochastic"}
    row = quantized(x, rng=rng(3), **options)
    residuals = [
        row - x,
        quantized(x, rng=rng(3), transpose=True, **options) - x,
        quantized(x, rng=rng(4), **options) - x,
        quantized(x, rng=rng(3, 1), **options) - x,
    ]
    for i in range(4):
        for j in range(i):
            # given x the residuals have mean 0 and are independent: the correlation is normal with
            # standard deviation 1 / sqrt(N); 7 of them have p < 3e-12
            c = float(torch.corrcoef(torch.stack([residuals[i], residuals[j]]).flatten(1))[0, 1])
            assert abs(c) < 7 / math.sqrt(x.numel())
    assert torch.equal(quantized(x, rng=rng(3), **options), row)


@every_format
def test_t14_powers_of_two_pass_through(format: str) -> None:
    x = gaussian(64, 64, seed=19)
    for kwargs in ({}, {"rounding": "stochastic", "rng": rng(11)}, {"scale_rule": "floor"}):
        data, scale, tensor_scale = ref.quantize(x, format, **kwargs)
        for k in (-60, -1, 1, 13, 60):
            scaled = ref.quantize(x * 2.0**k, format, **kwargs)
            assert torch.equal(scaled[0], data)
            if tensor_scale is None:
                assert torch.equal(scaled[1].int(), scale.int() + k)
            else:
                assert torch.equal(scaled[1], scale)
                assert float(scaled[2]) == float(tensor_scale) * 2.0**k


@pytest.mark.parametrize("group", [2, 16, 32, 64, 128, 256])
def test_t15_hadamard(group: int) -> None:
    h = torch.from_numpy(scipy.linalg.hadamard(group) / math.sqrt(group))
    signs = random_signs(1, group)[0]
    t = ref.hadamard(torch.eye(group), group, signs)  # row j is signs[j] times row j of H
    np.testing.assert_allclose(t.numpy(), (signs.double()[:, None] * h).numpy(), atol=1e-7)
    assert (t @ t.t() - torch.eye(group)).abs().max() < 1e-6

    a, b = gaussian(9, 2 * group, seed=20), gaussian(7, 2 * group, seed=21)
    ra, rb = ref.hadamard(a, group, signs), ref.hadamard(b, group, signs)
    torch.testing.assert_close(ra @ rb.t(), a @ b.t(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(ra.norm(dim=1), a.norm(dim=1), atol=0, rtol=1e-6)
    matrix = torch.block_diag(*[signs.double()[:, None] * h] * 2)
    torch.testing.assert_close(ra.double(), a.double() @ matrix, atol=1e-5, rtol=1e-5)

    # the order of the additions, one float32 operation at a time
    v = [np.float32(u) * np.float32(s) for u, s in zip(a[0, :group].tolist(), signs, strict=True)]
    stride = 1
    while stride < group:
        for j in range(group):
            if not j & stride:
                v[j], v[j + stride] = v[j] + v[j + stride], v[j] - v[j + stride]
        stride *= 2
    expected = np.array(v, dtype=np.float32) * np.float32(1 / math.sqrt(group))
    np.testing.assert_array_equal(ra[0, :group].numpy(), expected)

    half = ref.hadamard(a.to(torch.bfloat16), group)
    assert torch.equal(half, ref.hadamard(a.to(torch.bfloat16).float(), group).to(torch.bfloat16))
    with refuses(ValueError, match="group must divide"):
        ref.hadamard(a[:, :-1], group)


def published_backward(x: Tensor, seed: int, **kwargs: Any) -> Tensor:
    """Q of the MXFP4-backward paper: 3/4, stochastic, never clipping."""
    options = {"scale_rule": "floor", "rounding": "stochastic", "prescale": 0.75}
    return quantized(x, rng=rng(seed), **options, **kwargs)


def test_t16_three_quarters_gemm() -> None:
    a = gaussian(256, 256, seed=22)
    b = a * 0.5 + gaussian(256, 256, seed=23)
    true = a @ b.t()
    slopes = []
    for i in range(24):
        p = published_backward(a, 2 * i, hadamard=64) @ (
            published_backward(b, 2 * i + 1, hadamard=64).t()
        )
        slopes.append(float((p * true).sum() / (true * true).sum()))
    mean, error = float(np.mean(slopes)), float(np.std(slopes) / math.sqrt(len(slopes)))
    # 9/16 with a standard error of about 2.1e-4 (measured over seeds): 0.002 has p < 1e-18
    assert error < 4e-4
    assert abs(mean - 0.5625) < 0.002
    biased = quantized(a, scale_rule="floor", hadamard=64) @ (
        quantized(b, scale_rule="floor", hadamard=64).t()
    )
    assert abs(float((biased * true).sum() / (true * true).sum()) - 0.96) < 0.01


def test_t17_hadamard_lowers_the_variance_of_outliers() -> None:
    pairs, cols, group, draws = 1024, 256, 64, 8
    ratios = []
    for outlier in (None, 50.0):
        a, b = gaussian(pairs, cols, seed=24), gaussian(pairs, cols, seed=25)
        if outlier is not None:
            a[:, 7] = outlier
        signs = random_signs(draws, group, seed=26)
        variances = []
        for rotate in (False, True):
            products = []
            for i in range(draws):
                options = {"hadamard": group, "signs": signs[i]} if rotate else {}
                qa = published_backward(a, 2 * i, **options)
                qb = published_backward(b, 2 * i + 1, **options)
                products.append((qa * qb).sum(1).double() / 0.5625)
            variances.append(float(torch.stack(products).var(0).mean()) / cols)
        ratios.append(variances[0] / variances[1])
    # published per-K variances: Gaussian .0557 -> .0567, one column x50 1.06 -> .56. Over seeds the
    # ratios are 1.00 +- 0.015 and 1.9 +- 0.085, so these bounds have p < 1e-9 or so
    assert abs(ratios[0] - 1) < 0.1
    assert ratios[1] > 1.4


def test_t18_rounding_toward_the_average() -> None:
    x = gaussian(512, 256, seed=27)
    nearest = ref.quantize(x, "mxfp4")
    data, scale, _ = ref.quantize(x, "mxfp4", rounding="toward", toward=x)
    u = torch.ldexp(x.double(), -exponents(scale))
    low, high = neighbours(u)
    tie = (u.abs() == (low + high) / 2) & (low != high)
    same = ref.unpack(data, 4) == ref.unpack(nearest[0], 4)
    assert same[~tie].all() and torch.equal(scale, nearest[1])

    for far, neighbour in ((100.0, high), (-100.0, low)):
        data, scale, _ = ref.quantize(x, "mxfp4", rounding="toward", toward=far * x.sign())
        value = ref.decode(ref.unpack(data, 4), ref.E2M1).double()
        assert torch.equal(value.abs(), neighbour) and torch.equal(scale, nearest[1])
        assert ((value - u).abs() < 2).all() and (value * u >= 0).all()
    # on the grid the target has no say
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6]).repeat(1, 4)
    assert torch.equal(quantized(grid, rounding="toward", toward=100 + grid), grid)

    average = x + 0.02 * gaussian(512, 256, seed=28)
    toward = quantized(x, rounding="toward", toward=average)
    plain = quantized(x)
    # published: about 5 % of the codes differ, relative error 1.37e-2 against 1.33e-2
    assert abs(float((toward != plain).float().mean()) - 0.05) < 0.005
    power = (x**2).mean()
    assert abs(float(((toward - x) ** 2).mean() / power) - 1.37e-2) < 3e-4
    assert abs(float(((plain - x) ** 2).mean() / power) - 1.33e-2) < 3e-4


def test_t19_the_average_damps_oscillation() -> None:
    beta, threshold, delta, steps = 0.998, 2.5, 0.01, 5000

    def flips(offset: float, toward: bool) -> int:
        weights, averages = [], []
        average = threshold + offset + delta
        for t in range(2 * steps):  # the first half lets the average settle
            w = threshold + offset + (delta if t % 2 == 0 else -delta)
            average = beta * average + (1 - beta) * w
            weights.append(w)
            averages.append(average)
        ripple = (max(averages[-2:]) - min(averages[-2:])) / 2
        assert abs(ripple - delta * (1 - beta) / (1 + beta)) < 1e-3 * delta
        x = torch.zeros(steps, 32)
        x[:, 0] = 6.0  # keeps the scale at 1
        x[:, 1] = torch.tensor(weights[steps:])
        target = x.clone()
        target[:, 1] = torch.tensor(averages[steps:])
        q = quantized(x, rounding="toward", toward=target) if toward else quantized(x)
        return int((q[1:, 1] != q[:-1, 1]).sum())

    assert flips(0.002, toward=False) == steps - 1
    assert flips(0.002, toward=True) == 0
    assert flips(0.0, toward=True) == steps - 1  # no hysteresis exactly at the threshold


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@every_format
def test_t25_non_finite_blocks(format: str, value: float) -> None:
    element, block = ref.FORMATS[format].element, ref.FORMATS[format].block
    nan_scale = 0x7F if format == "nvfp4" else 0xFF
    clean = gaussian(4, 96, seed=29)
    x = clean.clone()
    x[1, 40] = value
    bad = torch.zeros(4, 96 // block, dtype=torch.bool)
    bad[1, 40 // block] = True
    wide_bad = bad.repeat_interleave(block, 1)
    for rounding in ("nearest", "stochastic"):
        options = {"rounding": rounding, "rng": rng(1)}
        data, scale, tensor_scale = ref.quantize(x, format, **options)
        assert (scale[bad] == nan_scale).all() and (scale[~bad] != nan_scale).all()
        codes = ref.unpack(data, element.bits)
        assert not codes[wide_bad].any()
        y = ref.dequantize(data, scale, tensor_scale, format, 96)
        assert torch.equal(torch.isnan(y), wide_bad)
        if format != "nvfp4" or int(clean.abs().argmax()) != 96 + 40:
            plain = ref.quantize(clean, format, **options)
            assert torch.equal(scale[~bad], plain[1][~bad])
            assert torch.equal(codes[~wide_bad], ref.unpack(plain[0], element.bits)[~wide_bad])
    # a target that is not finite; and a rotation spreads the NaN over its group
    y = quantized(clean, format, rounding="toward", toward=x)
    assert torch.equal(torch.isnan(y), wide_bad)
    y = quantized(torch.cat([x, clean], 1), format, hadamard=64)
    expected = torch.zeros(4, 192, dtype=torch.bool)
    expected[1, :64] = True
    assert torch.equal(torch.isnan(y), expected)
    # and a product has NaN in that row only
    other = ref.quantize(clean, format)
    d = ref.gemm(*ref.quantize(x, format), *other, format, None, 1.0, torch.float32)
    assert torch.isnan(d[1]).all() and torch.isfinite(d[[0, 2, 3]]).all()
