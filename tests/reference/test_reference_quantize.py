"""The quantizers against a slow independent model and other packages, and their contract."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from common import refuses
from reference_common import (
    ML_DTYPES,
    every_finite_bfloat16,
    every_format,
    every_mx,
    every_rule,
    gaussian,
    quantized,
    random_signs,
    rng,
    wide,
)
from torch import Tensor

import mxtrain.reference as ref

# ---------------------------------------------------------------- a slow model, value by value


def model_grid(format: str) -> np.ndarray:
    bits = ml_dtypes.finfo(ML_DTYPES[format]).bits
    values = np.arange(2 ** (bits - 1), dtype=np.uint8).view(ML_DTYPES[format]).astype(np.float64)
    return values[np.isfinite(values)]


def model_exponent(maximum: float, format: str, rule: str) -> int:
    """From the meaning of each rule, in float64, without looking at bits."""
    info = ml_dtypes.finfo(ML_DTYPES[format])
    largest = float(info.max)
    emax = math.frexp(largest)[1] - 1
    fraction, e = math.frexp(maximum)
    e -= 1
    if rule == "floor":
        e -= emax
    elif rule == "even":
        significand = math.floor(fraction * 2 * 2**info.nmant + 0.5) / 2**info.nmant
        e += (1 if significand >= 2 else 0) - emax
    else:
        e -= emax + 2
        while math.ldexp(maximum, -e) > largest:
            e += 1
    return min(max(e, -127), 127)


def model_code(
    u: float, grid: np.ndarray, sign_bit: int, rounding: str, draw: int, target: float
) -> int:
    """Code n stands for grid[n], so that an even code is an even mantissa."""
    negative = math.copysign(1.0, u) < 0
    a = min(abs(u), float(grid[-1]))
    code = int(np.searchsorted(grid, a, side="right")) - 1
    if a != grid[code]:
        low, high = float(grid[code]), float(grid[code + 1])
        middle = (low + high) / 2
        if rounding == "nearest":
            up = a > middle or (a == middle and code % 2 == 1)
        elif rounding == "stochastic":
            up = (a - low) / (high - low) * 2**17 > 2 * draw + 1
        else:
            up = (-target if negative else target) >= middle
        code += int(up)
    return code + (sign_bit if negative else 0)


def model(
    v: np.ndarray,
    format: str,
    rule: str,
    rounding: str,
    draws: np.ndarray | None,
    toward: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.float32 | None]:
    """Codes [R, Kp], scale codes and tensor scale of float32 v [R, Kp], all finite."""
    grid = model_grid(format)
    sign_bit = 2 ** (ml_dtypes.finfo(ML_DTYPES[format]).bits - 1)
    block = 16 if format == "nvfp4" else 32
    e4m3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    tensor_scale = None
    if format == "nvfp4":
        tensor_scale = max(np.float32(np.abs(v).max()) / np.float32(2688), np.float32(2.0**-126))
    codes = np.zeros(v.shape, dtype=np.int64)
    scale = np.zeros((v.shape[0], v.shape[1] // block), dtype=np.int64)
    for r, b in product(*map(range, scale.shape)):
        part = slice(b * block, (b + 1) * block)
        maximum = np.abs(v[r, part]).max()
        if maximum == 0:
            continue
        if tensor_scale is None:
            e = model_exponent(float(maximum), format, rule)
            scale[r, b] = e + 127
            u = v[r, part] * np.float32(math.ldexp(1.0, -e))
            z = toward[r, part] * np.float32(math.ldexp(1.0, -e)) if toward is not None else u
        else:
            q = min(float(maximum / np.float32(6) / tensor_scale), 448.0)
            low = int(np.searchsorted(e4m3, q, side="right")) - 1
            if rule == "ceil" and q != e4m3[low]:
                low += 1
            elif rule == "even" and q != e4m3[low]:
                middle = (e4m3[low] + e4m3[low + 1]) / 2
                low += int(q > middle or (q == middle and low % 2 == 1))
            scale[r, b] = low
            s = np.float32(e4m3[low]) * tensor_scale
            if s == 0:
                continue
            u = v[r, part] / s
            z = toward[r, part] / s if toward is not None else u
        for j in range(block):
            k = b * block + j
            draw = 0 if draws is None else int(draws[r, k])
            codes[r, k] = model_code(float(u[j]), grid, sign_bit, rounding, draw, float(z[j]))
    return codes, scale, tensor_scale


def assert_equals_model(
    x: Tensor, format: str, rule: str, rounding: str, transpose: bool, seed: int = 9
) -> None:
    toward = x.float() * (1 + 0.3 * gaussian(*x.shape, seed=seed)) if rounding == "toward" else None
    data, scale, tensor_scale = ref.quantize(
        x,
        format,
        scale_rule=rule,
        rounding=rounding,
        transpose=transpose,
        rng=rng(seed, 4),
        toward=toward,
    )

    def oriented(t: Tensor) -> np.ndarray:
        a = (t.t() if transpose else t).float().numpy()
        block = 16 if format == "nvfp4" else 32
        return np.pad(a, ((0, 0), (0, -a.shape[1] % block)))

    v = oriented(x)
    draws = None
    if rounding == "stochastic":
        draws = ref.draws(rng(seed, 4), *v.shape, int(transpose)).numpy()
    expected = model(v, format, rule, rounding, draws, None if toward is None else oriented(toward))
    bits = ml_dtypes.finfo(ML_DTYPES[format]).bits
    np.testing.assert_array_equal(ref.unpack(data, bits).numpy(), expected[0])
    np.testing.assert_array_equal(scale.numpy(), expected[1])
    assert data.dtype == scale.dtype == torch.uint8
    assert (tensor_scale is None) == (format != "nvfp4")
    if tensor_scale is not None:
        assert tensor_scale.shape == (1,) and tensor_scale.numpy()[0] == expected[2]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "toward"])
@every_rule
@every_format
def test_equals_the_model(format: str, scale_rule: str, rounding: str) -> None:
    for transpose in (False, True):
        assert_equals_model(wide(7, 70), format, scale_rule, rounding, transpose)
    assert_equals_model(gaussian(3, 32).to(torch.bfloat16), format, scale_rule, rounding, False)


@every_rule
@every_mx
def test_scale_of_every_bfloat16(format: str, scale_rule: str) -> None:
    maxima = every_finite_bfloat16().float()
    maxima = maxima[maxima > 0]
    x = torch.zeros(len(maxima), 32)
    x[:, 5] = -maxima
    scale = ref.quantize(x, format, scale_rule=scale_rule)[1]
    expected = [model_exponent(m, format, scale_rule) + 127 for m in maxima.tolist()]
    assert scale[:, 0].tolist() == expected


@every_rule
@every_mx
def test_scale_of_float32_around_every_threshold(format: str, scale_rule: str) -> None:
    points = []
    for significand in (1.0, 1.5, 1.75, 1.875, 1.9375):
        for e in (-149, -127, -126, -125, -3, 0, 1, 64, 126, 127):
            value = np.float32(math.ldexp(significand, e))
            points += [np.nextafter(value, np.float32(0)), value]
            points += [np.nextafter(value, np.float32(np.inf))]
    points = [float(p) for p in points if 0 < p < np.inf] + [float(np.finfo(np.float32).max)]
    x = torch.zeros(len(points), 32)
    x[:, 31] = torch.tensor(points)
    scale = ref.quantize(x, format, scale_rule=scale_rule)[1]
    assert scale[:, 0].tolist() == [model_exponent(m, format, scale_rule) + 127 for m in points]


# ---------------------------------------------------------------- other packages

TORCHAO_ELEMENT = {
    "mxfp4": torch.float4_e2m1fn_x2,
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
}


@every_rule
@every_mx
def test_matches_torchao_to_mx(format: str, scale_rule: str) -> None:
    """torchao's FLOOR, RCEIL and EVEN are floor, ceil and even here, for finite blocks.

    Compared on bfloat16 blocks of 2^-40 to 2^40, and zero blocks. Left out: scale code 0 with data
    in the block (torchao then divides by 2^-126, not 2^-127), Inf (its FLOOR and EVEN store a
    finite scale), and float32 input to RCEIL (its log2 in float32 misses maxima just above a power
    of two; in bfloat16 the nearest such maximum is 2^-8 away). Its CEIL is another rule: up
    wherever the mantissa is not zero.
    """
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    modes = mx_tensor.ScaleCalculationMode
    mode = {"floor": modes.FLOOR, "ceil": modes.RCEIL, "even": modes.EVEN}[scale_rule]
    e = torch.arange(-40, 40).repeat_interleave(4)[:, None]
    x = torch.cat([torch.ldexp(gaussian(320, 64, seed=1), e), torch.zeros(1, 64)])
    x = x.to(torch.bfloat16)
    scale, data = mx_tensor.to_mx(x, TORCHAO_ELEMENT[format], 32, mode)
    got = ref.quantize(x, format, scale_rule=scale_rule)
    assert torch.equal(got[1], scale.view(torch.uint8))
    if format.startswith("mxfp6"):  # torchao leaves one 6-bit code a byte
        assert torch.equal(ref.unpack(got[0], 6).to(torch.uint8), data)
    else:
        assert torch.equal(got[0], data.view(torch.uint8))


def test_matches_torchao_nvfp4() -> None:
    """Given the same tensor scale, the scales are equal and so are the codes away from ties.

    torchao multiplies by a reciprocal where this divides, so u differs by up to 2 units in the last
    place: codes of elements within 1e-6 of a rounding threshold are left out. It also keeps block
    scales at or above 2^-6, so every block here is larger than that.
    """
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    e = torch.randint(-3, 3, (128, 8), generator=torch.Generator().manual_seed(2))
    x = torch.ldexp(gaussian(128, 128, seed=2), e.repeat_interleave(16, 1))
    data, scale, tensor_scale = ref.quantize(x, "nvfp4", scale_rule="even")
    assert tensor_scale is not None
    their_scale, their_data = nvfp4.nvfp4_quantize(
        x, 16, nvfp4.per_tensor_amax_to_scale(x.abs().max())
    )
    assert float(nvfp4.per_tensor_amax_to_scale(x.abs().max())) == float(tensor_scale)
    assert torch.equal(scale, their_scale.view(torch.uint8))

    s = (ref.decode(scale, ref.E4M3) * tensor_scale).repeat_interleave(16, 1)
    u = (x / s).abs()
    thresholds = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    clear = ((u[..., None] - thresholds).abs() > 1e-6 * thresholds).all(-1)
    assert clear.float().mean() > 0.999
    ours, theirs = ref.unpack(data, 4), ref.unpack(their_data.view(torch.uint8), 4)
    assert torch.equal(ours[clear], theirs[clear])


@every_mx
def test_matches_gfloat_blocks(format: str) -> None:
    """gfloat.quantize_block with compute_scale_amax is the OCP rule, `floor` here, to nearest."""
    info = {
        "mxfp4": gfloat.formats.format_info_mxfp4_e2m1,
        "mxfp6_e3m2": gfloat.formats.format_info_mxfp6_e3m2,
        "mxfp6_e2m3": gfloat.formats.format_info_mxfp6_e2m3,
        "mxfp8_e4m3": gfloat.formats.format_info_mxfp8_e4m3,
        "mxfp8_e5m2": gfloat.formats.format_info_mxfp8_e5m2,
    }[format]
    x = wide(8, 64, seed=3)
    ours = quantized(x, format, scale_rule="floor").double().numpy()
    for r, b in product(range(8), range(2)):
        block = x[r, 32 * b : 32 * b + 32].double().numpy()
        theirs = gfloat.quantize_block(info, block, gfloat.compute_scale_amax)
        np.testing.assert_array_equal(ours[r, 32 * b : 32 * b + 32], theirs)


# ---------------------------------------------------------------- structure


@every_format
def test_shapes_padding_and_dtypes(format: str) -> None:
    block, bits = ref.FORMATS[format].block, ref.FORMATS[format].element.bits
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = gaussian(5, 70).to(dtype)
        for transpose, (rows, cols) in ((False, (5, 70)), (True, (70, 5))):
            data, scale, _ = ref.quantize(x, format, transpose=transpose)
            padded = -(-cols // block) * block
            assert data.shape == (rows, padded * bits // 8)
            assert scale.shape == (rows, padded // block)
            assert (ref.unpack(data, bits)[:, cols:] == 0).all()
            same = ref.quantize(x.float(), format, transpose=transpose)
            assert torch.equal(data, same[0]) and torch.equal(scale, same[1])
            plain = ref.quantize(x.t().contiguous() if transpose else x, format)
            assert torch.equal(data, plain[0]) and torch.equal(scale, plain[1])
    assert ref.quantize(torch.zeros(0, 32), format)[0].shape == (0, 32 * bits // 8)
    assert ref.quantize(torch.zeros(3, 0), format)[1].shape == (3, 0)


@every_format
def test_compositions(format: str) -> None:
    """hadamard, swizzle, quantize_dual and requantize are compositions of plain parts."""
    x, group = gaussian(64, 96, seed=4), 32
    signs = random_signs(1, group)[0]
    rotated = ref.hadamard(x, group, signs)
    options = {"rounding": "stochastic", "rng": rng(1), "prescale": 0.75}
    fused = ref.quantize(x, format, hadamard=group, signs=signs, **options)
    parts = ref.quantize(rotated, format, **options)
    assert all(torch.equal(a, b) for a, b in zip(fused[:2], parts[:2], strict=True))
    swizzled = ref.quantize(x, format, swizzle=True)
    assert torch.equal(swizzled[1], ref.swizzle(ref.quantize(x, format)[1]))

    row = {"format": format, "rounding": "stochastic", "scale_rule": "floor"}
    col = {"format": "mxfp4", "rounding": "stochastic", "hadamard": group, "signs": signs}
    dual = ref.quantize_dual(x, row, col, rng=rng(2))
    single = (
        ref.quantize(x, **row, rng=rng(2)),
        ref.quantize(x, **col, rng=rng(2), transpose=True),
    )
    for a, b in zip(dual, single, strict=True):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])

    again = ref.requantize(*fused, format, 96, "mxfp8_e4m3", **options)
    values = ref.dequantize(*fused, format, 96)
    direct = ref.quantize(values, "mxfp8_e4m3", transpose=True, **options)
    assert torch.equal(again[0], direct[0]) and torch.equal(again[1], direct[1])


def test_toward_is_prepared_as_x_is() -> None:
    x = gaussian(64, 32, seed=5)
    target, signs = x + 0.05 * gaussian(64, 32, seed=6), random_signs(1, 64)[0]
    fused = ref.quantize(
        x,
        "mxfp4",
        rounding="toward",
        toward=target,
        transpose=True,
        hadamard=64,
        signs=signs,
        prescale=0.5,
    )
    parts = ref.quantize(
        ref.hadamard(x.t().contiguous(), 64, signs),
        "mxfp4",
        rounding="toward",
        toward=ref.hadamard(target.t().contiguous(), 64, signs),
        prescale=0.5,
    )
    assert torch.equal(fused[0], parts[0]) and torch.equal(fused[1], parts[1])


@every_format
def test_dequantize_casts_once(format: str) -> None:
    parts = ref.quantize(wide(6, 64, seed=7), format)
    exact = ref.dequantize(*parts, format, 50)
    assert exact.shape == (6, 50) and exact.dtype == torch.float32
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(ref.dequantize(*parts, format, 50, dtype), exact.to(dtype))


def test_nvfp4_scales_at_the_ends() -> None:
    data, scale, tensor_scale = ref.quantize(torch.zeros(2, 32), "nvfp4")
    assert not data.any() and not scale.any() and float(tensor_scale) == 2.0**-126
    x = torch.zeros(1, 32)
    x[0, 0], x[0, 16] = -2688.0, 2.0**-10  # tensor scale 1; the second block's q is 2^-10 / 6
    for rule, code in (("floor", 0), ("ceil", 1), ("even", 0)):
        data, scale, tensor_scale = ref.quantize(x, "nvfp4", scale_rule=rule)
        assert scale.tolist() == [[0x7E, code]] and float(tensor_scale) == 1.0
        assert ref.unpack(data, 4)[0, 0] == 15
        if code == 0:
            assert not ref.unpack(data, 4)[0, 16:].any()
    x[0, 1] = math.inf  # the largest finite magnitude still counts, and the block is NaN
    data, scale, tensor_scale = ref.quantize(x, "nvfp4")
    assert scale.tolist() == [[0x7F, 1]] and float(tensor_scale) == 1.0


@every_rule
def test_nvfp4_divides_in_float32_and_in_order(scale_rule: str) -> None:
    """Maxima around every threshold of the block scale, elements around every threshold of E2M1."""
    top, six, inf = np.float32(2688 * 1.1), np.float32(6), np.float32(np.inf)
    tensor_scale = top / np.float32(2688)
    codes = np.arange(1, 127, dtype=np.uint8)
    e4m3 = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    thresholds = np.concatenate([e4m3, (e4m3[1:] + e4m3[:-1]) / 2])
    maxima = [thresholds * six * tensor_scale]
    for _ in range(3):
        maxima += [np.nextafter(maxima[-1], inf)]
        maxima = [np.nextafter(maxima[0], -inf), *maxima]
    m = np.minimum(np.concatenate(maxima), top)
    x = np.zeros((len(m) + 1, 16), dtype=np.float32)
    x[-1, 0] = top
    x[:-1, 0] = m
    s = (m / six / tensor_scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * tensor_scale
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=np.float32)
    x[:-1, 1:8] = np.minimum(s[:, None] * ties, m[:, None])
    x[:-1, 8:15] = np.nextafter(x[:-1, 1:8], inf)
    x[:-1, 8:15] = np.minimum(x[:-1, 8:15], m[:, None])
    once = m / (six * tensor_scale)
    assert (once != m / six / tensor_scale).any()  # so the order can show
    assert_equals_model(torch.from_numpy(x), "nvfp4", scale_rule, "nearest", False)


def test_bad_arguments_raise() -> None:
    x = torch.zeros(32, 32)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"format": "fp4"}, "format must be"),
        ({"format": "mxfp4", "scale_rule": "round"}, "scale_rule must be"),
        ({"format": "mxfp4", "rounding": "up"}, "rounding must be"),
        ({"format": "mxfp4", "rounding": "stochastic"}, "rng must be"),
        ({"format": "mxfp4", "rounding": "toward"}, "toward must be"),
        ({"format": "mxfp4", "toward": x}, "toward must be"),
        ({"format": "mxfp4", "rounding": "toward", "toward": x[:3]}, "toward must have"),
        ({"format": "mxfp4", "hadamard": 64}, "hadamard must divide"),
        ({"format": "mxfp4", "hadamard": 24}, "power of two"),
        ({"format": "mxfp4", "hadamard": 16, "signs": torch.ones(8)}, "signs must have"),
        ({"format": "mxfp4", "signs": torch.ones(8)}, "signs must be None"),
    ]
    for kwargs, message in bad:
        with refuses(ValueError, match=message):
            ref.quantize(x, **kwargs)
    with refuses(TypeError, match="bfloat16, float16 or float32"):
        ref.quantize(x.double(), "mxfp4")
    with refuses(ValueError, match="2 dimensions"):
        ref.quantize(x[0], "mxfp4")
    with refuses(ValueError, match="shapes"):
        ref.dequantize(*ref.quantize(x, "mxfp4", swizzle=True), "mxfp4", 32)


# ---------------------------------------------------------------- stochastic_round


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_stochastic_round(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    bits = torch.randint(-(2**31), 2**31, (50001,), generator=torch.Generator().manual_seed(8))
    x = torch.cat([bits.to(torch.int32).view(torch.float32), gaussian(50000), gaussian(500) * 1e-5])
    x = x[~torch.isnan(x)]
    got = ref.stochastic_round(x, dtype, rng(3, 1)).double()
    a = x.double().abs().clamp(max=largest)
    info = {torch.bfloat16: (-126, 7), torch.float8_e4m3fn: (-6, 3), torch.float8_e5m2: (-14, 2)}
    emin, mbits = info[dtype]
    e = (torch.frexp(a)[1] - 1).clamp(min=emin) - mbits
    scaled = torch.ldexp(a, -e)
    draws = ref.draws(rng(3, 1), 1, len(x), 0)[0]
    up = (scaled - scaled.floor()) * 2**17 > 2 * draws + 1
    expected = torch.copysign(torch.ldexp(scaled.floor() + up, e), x.double())
    finite = torch.isfinite(x)
    assert torch.equal(got[finite], expected[finite])
    assert torch.equal(torch.signbit(got[finite]), torch.signbit(x[finite]))

    special = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 3.4e38, 0.0, -0.0])
    result = ref.stochastic_round(special.reshape(2, 4), dtype, rng(0))
    assert result.shape == (2, 4) and result.dtype == dtype
    values = result.float().flatten().tolist()
    if dtype == torch.float8_e4m3fn:
        assert math.isnan(values[0]) and math.isnan(values[1])
    else:
        assert values[:2] == [math.inf, -math.inf]
    assert math.isnan(values[2])
    assert values[5] == largest and values[6:] == [0.0, 0.0]
    assert math.copysign(1, values[7]) == -1


def test_stochastic_round_keeps_representable_values() -> None:
    values = every_finite_bfloat16().float()
    assert torch.equal(ref.stochastic_round(values, torch.bfloat16, rng(4)).float(), values)


# ---------------------------------------------------------------- GEMM


@every_format
def test_gemm(format: str) -> None:
    a = ref.quantize(gaussian(20, 96, seed=1), format)
    b = ref.quantize(gaussian(12, 96, seed=2), format)
    bias = gaussian(12, seed=3)
    exact = ref.gemm_float64(*a, *b, format, bias, 0.5)
    va, vb = (ref.dequantize(*p, format, 96).double().numpy() for p in (a, b))
    np.testing.assert_allclose(exact.numpy(), 0.5 * va @ vb.T + bias.double().numpy(), rtol=1e-12)
    magnitude = ref.gemm_magnitude(*a, *b, format)
    np.testing.assert_allclose(magnitude.numpy(), np.abs(va) @ np.abs(vb).T, rtol=1e-12)
    got = ref.gemm(*a, *b, format, None, 1.0, torch.float32)
    bound = 96 * 2.0**-24 * magnitude
    assert ((got.double() - ref.gemm_float64(*a, *b, format)).abs() <= bound).all()
    assert ref.gemm(*a, *b, format, bias, 0.5).dtype == torch.bfloat16


def test_gemm_is_exact_on_small_integers() -> None:
    g = torch.Generator().manual_seed(4)
    a = torch.randint(-4, 5, (16, 64), generator=g).float()
    b = torch.randint(-4, 5, (8, 64), generator=g).float()
    parts = (*ref.quantize(a, "mxfp4"), *ref.quantize(b, "mxfp4"))
    assert torch.equal(ref.gemm(*parts, "mxfp4", None, 1.0, torch.float32), a @ b.t())
