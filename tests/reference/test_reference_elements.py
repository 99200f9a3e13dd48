"""Element codecs against ml_dtypes and gfloat, over all bfloat16 values and around every tie."""

from __future__ import annotations

import math
from typing import Any

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from common import refuses

import mxtrain.reference as ref
from mxtrain.reference.elements import pow2

ML_DTYPES: dict[str, Any] = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
GFLOAT = {
    "e2m1": gfloat.formats.format_info_ocp_e2m1,
    "e3m2": gfloat.formats.format_info_ocp_e3m2,
    "e2m3": gfloat.formats.format_info_ocp_e2m3,
    "e4m3": gfloat.formats.format_info_ocp_e4m3,
    "e5m2": gfloat.formats.format_info_ocp_e5m2,
}
ELEMENTS = [ref.E2M1, ref.E3M2, ref.E2M3, ref.E4M3, ref.E5M2]
every_element = pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)


def all_bfloat16() -> torch.Tensor:
    """All 65,536 bfloat16 values but the NaNs, as float32."""
    bits = torch.arange(65536, dtype=torch.int32) << 16
    values = bits.view(torch.float32)
    return values[~torch.isnan(values)]


def grid(element: ref.Element) -> np.ndarray:
    """The finite values >= 0 in code order, from ml_dtypes, as float64."""
    codes = np.arange(2 ** (element.bits - 1), dtype=np.uint8)
    values = codes.view(ML_DTYPES[element.name]).astype(np.float64)
    return values[np.isfinite(values)]


def critical_values(element: ref.Element) -> torch.Tensor:
    """Grid values, midpoints, and the float32 neighbours of both, of either sign."""
    g = grid(element)
    points = np.concatenate([g, (g[1:] + g[:-1]) / 2]).astype(np.float32)
    inf = np.float32(np.inf)
    points = np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf)])
    return torch.from_numpy(np.concatenate([points, -points]))


def random_values(element: ref.Element, n: int) -> torch.Tensor:
    """Random float32 with 24 significant bits, log-uniform over the range and a little past it."""
    generator = torch.Generator().manual_seed(11)
    low, high = element.emin - element.mbits - 3, element.emax + 2
    exponent = torch.randint(low, high, (n,), generator=generator)
    mantissa = 1 + torch.rand(n, generator=generator)
    sign = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    return sign * mantissa * pow2(exponent)


@every_element
def test_nearest_matches_ml_dtypes(element: ref.Element) -> None:
    values = torch.cat([all_bfloat16(), critical_values(element), random_values(element, 20000)])
    # ml_dtypes overflows to Inf or NaN in the 8-bit types, so it is given saturated values
    limited = values.clamp(-element.max, element.max).numpy()
    expected = limited.astype(ML_DTYPES[element.name]).view(np.uint8)
    codes = ref.encode(values, element).numpy()
    np.testing.assert_array_equal(codes, expected)


@every_element
def test_decode_matches_ml_dtypes(element: ref.Element) -> None:
    codes = np.arange(2**element.bits, dtype=np.uint8)
    expected = codes.view(ML_DTYPES[element.name]).astype(np.float32)
    decoded = ref.decode(torch.from_numpy(codes), element).numpy()
    np.testing.assert_array_equal(decoded, expected)
    np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


@every_element
def test_finite_codes_round_trip(element: ref.Element) -> None:
    codes = torch.arange(2**element.bits)
    values = ref.decode(codes, element)
    finite = torch.isfinite(values)
    for rounding in ("nearest", "down", "up"):
        assert torch.equal(ref.encode(values[finite], element, rounding), codes[finite])


@every_element
def test_descriptor(element: ref.Element) -> None:
    info = ml_dtypes.finfo(ML_DTYPES[element.name])
    assert (element.bits, element.mbits) == (info.bits, info.nmant)
    assert element.max == float(info.max)
    assert 2.0**element.emin == float(info.smallest_normal)
    assert 2.0 ** (element.emin - element.mbits) == float(info.smallest_subnormal)
    assert 2.0**element.emax <= element.max < 2.0 ** (element.emax + 1)


@every_element
@pytest.mark.parametrize("rounding", ["down", "up"])
def test_directed_rounding_matches_gfloat(element: ref.Element, rounding: str) -> None:
    values = torch.cat([critical_values(element), random_values(element, 2000)]).abs()
    mode = gfloat.RoundMode.TowardZero if rounding == "down" else gfloat.RoundMode.TowardPositive
    expected = gfloat.round_ndarray(GFLOAT[element.name], values.double().numpy(), mode, sat=True)
    decoded = ref.decode(ref.encode(values, element, rounding), element)
    np.testing.assert_array_equal(decoded.double().numpy(), expected)


@every_element
def test_stochastic_matches_gfloat(element: ref.Element) -> None:
    """gfloat's StochasticFast rounds up where f + (s + 1/2) / 2^16 >= 1.

    With s = 2^16 - 1 - r that is f >= (r + 1/2) / 2^16: the rule here but for the equality, which
    is tested on its own below.
    """
    values = torch.cat([critical_values(element), random_values(element, 20000)])
    generator = torch.Generator().manual_seed(12)
    draws = torch.randint(0, 2**16, values.shape, generator=generator)
    expected = gfloat.round_ndarray(
        GFLOAT[element.name],
        values.double().numpy(),
        gfloat.RoundMode.StochasticFast,
        sat=True,
        srbits=65535 - draws.numpy(),
        srnumbits=16,
    )
    decoded = ref.decode(ref.encode(values, element, "stochastic", draws), element).double().numpy()

    a = values.double().abs().clamp(max=element.max).numpy()
    step = 2.0 ** (np.maximum(np.frexp(a)[1] - 1, element.emin) - element.mbits)
    f = a / step - np.floor(a / step)
    differs = decoded != expected
    assert (f[differs] * 2**17 == 2 * draws.numpy()[differs] + 1).all()
    assert differs.mean() < 0.01


def test_stochastic_equality_rounds_down() -> None:
    draws = torch.arange(65536)
    # u = 1 + step * (2r + 1) / 2^17 with step 1/2, exact in float32: f * 2^17 = 2r + 1, so not up
    u = 1 + (2 * draws + 1).to(torch.float32) * 2.0**-18
    assert (ref.encode(u, ref.E2M1, "stochastic", draws) == 2).all()
    above = torch.nextafter(u, torch.full_like(u, 9.0))
    assert (ref.encode(above, ref.E2M1, "stochastic", draws) == 3).all()


@every_element
def test_stochastic_mean_over_all_draws(element: ref.Element) -> None:
    """The mean over all 2^16 draws is within 2^-17 step of the value; up is monotone in r."""
    draws = torch.arange(65536)
    for value in random_values(element, 40).clamp(-element.max, element.max).tolist():
        u = torch.full((65536,), value)
        q = ref.decode(ref.encode(u, element, "stochastic", draws), element).double()
        step = 2.0 ** (max(math.frexp(value)[1] - 1, element.emin) - element.mbits)
        assert abs(float(q.mean()) - value) <= step * 2.0**-17
        assert (q.abs().diff() <= 0).all()
        assert q.unique().numel() <= 2


@every_element
def test_t05_stochastic_keeps_grid_values_for_every_draw(element: ref.Element) -> None:
    draws = torch.arange(65536)
    values = torch.from_numpy(grid(element)).to(torch.float32)
    for value in torch.cat([values, -values]):
        codes = ref.encode(value.expand(65536), element, "stochastic", draws)
        assert (codes == ref.encode(value.reshape(1), element)).all()


@every_element
def test_toward_picks_the_neighbour_nearer_to_the_target(element: ref.Element) -> None:
    u = torch.cat([critical_values(element), random_values(element, 5000)])
    generator = torch.Generator().manual_seed(13)
    noise = torch.randn(u.shape, generator=generator)
    target = u + noise * 2.0 ** (torch.log2(u.abs() + 2.0**element.emin).floor() - element.mbits)
    target[::7] = -target[::7]
    codes = ref.encode(u, element, "toward", toward=target)

    g = grid(element)
    a = u.abs().double().clamp(max=element.max).numpy()
    low = np.searchsorted(g, a, side="right") - 1
    high = np.minimum(low + 1, len(g) - 1)
    z = (torch.sign(u) * target).double().numpy()
    up = (a != g[low]) & (z >= (g[low] + g[high]) / 2)
    sign = (torch.signbit(u).to(torch.int64) << (element.bits - 1)).numpy()
    np.testing.assert_array_equal(codes.numpy(), np.where(up, high, low) + sign)
    assert up.any() and not up.all()


def test_toward_ties_go_up_and_infinite_targets_are_compared() -> None:
    u = torch.tensor([2.2, 2.2, 2.2, 2.2, -2.2, -2.2, 0.1, 2.0])
    z = torch.tensor([2.5, 2.4999998, math.inf, -math.inf, -2.5, 2.5, 0.25, 9.0])
    values = ref.decode(ref.encode(u, ref.E2M1, "toward", toward=z), ref.E2M1)
    assert values.tolist() == [3.0, 2.0, 3.0, 2.0, -3.0, -2.0, 0.5, 2.0]


def test_infinity_saturates_and_zero_keeps_its_sign() -> None:
    u = torch.tensor([math.inf, -math.inf, 0.0, -0.0, -0.1, -1e-40])
    for element in ELEMENTS:
        codes = ref.encode(u, element)
        largest = int(ref.encode(torch.tensor([element.max]), element))
        minus = 1 << (element.bits - 1)
        small = int(ref.encode(torch.tensor([0.1]), element))
        assert codes.tolist() == [largest, largest + minus, 0, minus, small + minus, minus]


def test_bfloat16_nearest_matches_torch() -> None:
    generator = torch.Generator().manual_seed(14)
    bits = torch.randint(-(2**31), 2**31, (200000,), generator=generator).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), all_bfloat16()])
    values = values[values.to(torch.bfloat16).isfinite()]  # torch rounds beyond the largest to Inf
    expected = values.to(torch.bfloat16).view(torch.int16).to(torch.int64) & 0xFFFF
    assert torch.equal(ref.encode(values, ref.BFLOAT16), expected)


def test_e8m0_decode() -> None:
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    decoded = ref.decode_e8m0(torch.from_numpy(codes)).numpy()
    np.testing.assert_array_equal(decoded, expected)
    assert decoded[0] == 2.0**-127 and np.isnan(decoded[255])


def test_pow2_is_exact() -> None:
    exponents = torch.arange(-149, 128)
    assert pow2(exponents).tolist() == [math.ldexp(1.0, int(e)) for e in exponents]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_packing_is_a_little_endian_bit_stream(bits: int) -> None:
    generator = torch.Generator().manual_seed(15)
    codes = torch.randint(0, 2**bits, (5, 96), generator=generator)
    data = ref.pack(codes, bits)
    assert data.dtype == torch.uint8 and data.shape == (5, 96 * bits // 8)
    for row in range(5):
        stream = sum(int(c) << (bits * k) for k, c in enumerate(codes[row]))
        assert bytes(data[row].tolist()) == stream.to_bytes(96 * bits // 8, "little")
    assert torch.equal(ref.unpack(data, bits), codes)


def test_unknown_names_raise() -> None:
    with refuses(ValueError, match="mxfp4"):
        ref.format_named("mxfp5")
    with refuses(ValueError, match="rounding must be"):
        ref.encode(torch.zeros(1), ref.E2M1, "odd")
    with refuses(TypeError, match="float32"):
        ref.encode(torch.zeros(1, dtype=torch.float64), ref.E2M1)
