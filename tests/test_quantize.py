"""quantize, quantize_dual and requantize against the reference, byte for byte."""

from __future__ import annotations

import pytest
import torch
from common import (
    FLOATS,
    FORMATS,
    ROUNDINGS,
    RULES,
    all_bfloat16,
    assert_same_bytes,
    assert_same_operand,
    check_quantize,
    operand,
    options_for,
    parts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import mxtrain
from mxtrain import Quantizer, reference

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize")
RNG = torch.tensor([2**62 + 12345, 2**40 + 99])


@pytest.mark.parametrize("order", ["natural", "shuffled", "finite"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_bfloat16_value(format, rule, rounding, order, device):
    x = all_bfloat16(order)
    check_quantize(x, format, device, scale_rule=rule, **options_for(rounding, x))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", FORMATS)
def test_every_bfloat16_value_under_scales_of_all_sizes(format, rule, device):
    """Nearest, by whatever instructions: each finite value below a block's largest element, for
    largest elements of many mantissas from one end of the exponents to the other.
    """
    every = all_bfloat16("finite").flatten()
    every = every[every.isfinite()]
    every = every[torch.randperm(every.numel(), generator=torch.Generator().manual_seed(2))]
    block = mxtrain.FORMATS[format].block
    for exponent in (-126, -9, 5, 126):
        for mantissa in (1.0, 1.1640625, 1.5, 1.9921875):
            largest = torch.tensor(mantissa * 2.0**exponent).bfloat16()
            fit = every[every.abs() <= largest]
            fit = fit[: fit.numel() // (block - 1) * (block - 1)].reshape(-1, block - 1)
            # leads a little smaller too: nvfp4's scales below the largest
            lead = largest * torch.exp2(-(torch.arange(fit.shape[0]) % 16)).bfloat16()
            x = torch.cat([lead[:, None], fit], 1)
            check_quantize(x, format, device, scale_rule=rule)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("format", FORMATS)
def test_dtypes_over_the_whole_exponent_range(format, dtype, rounding, device):
    exponents = torch.randint(-149, 128, (64, 8)).float().repeat_interleave(16, 1)
    x = (
        torch.randn(64, 128).double() * torch.exp2(exponents.double() + 3 * torch.randn(64, 128))
    ).to(dtype)
    check_quantize(x, format, device, **options_for(rounding, x))


def magnitudes(format):
    """The grid of an element format from 0 up, float32."""
    fmt = mxtrain.FORMATS[format]
    codes = torch.arange(2 ** (fmt.bits - 1), dtype=torch.uint8)
    grid = reference.decode(codes, reference.format_named(format).element)
    return grid[grid.isfinite() & (grid <= fmt.max)].unique()


@pytest.mark.parametrize("format", FORMATS)
def test_ties_and_their_neighbours(format, device):
    """Every midpoint of the grid and the float32 values beside it, in blocks whose scale is 1."""
    fmt, grid = mxtrain.FORMATS[format], magnitudes(format)
    mid = (grid[1:] + grid[:-1]) / 2
    values = torch.cat([mid, torch.nextafter(mid, mid - 1), torch.nextafter(mid, mid + 1), grid])
    rows = torch.cat([values, -values])[:, None].expand(-1, 32).clone()
    rows[:, 0] = fmt.max  # fixes the scale
    for rule in RULES:
        check_quantize(rows, format, device, scale_rule=rule)


@pytest.mark.parametrize("format", FORMATS)
def test_elements_at_their_draws_thresholds(format, device):
    """Every step of the grid at (2 draw + 1) / 2^17 and at the float32 values beside it."""
    fmt, grid = mxtrain.FORMATS[format], magnitudes(format)
    low = grid[:-1].repeat(64)[:, None].double()
    step = (grid[1:] - grid[:-1]).repeat(64)[:, None].double()
    draws = reference.draws(RNG, len(low), 32, stream=0)
    at = (low + step * (2 * draws + 1) / 2**17).float()
    assert (at.double() == low + step * (2 * draws + 1) / 2**17).float().mean() > 0.9
    for x in (at, at.nextafter(torch.zeros(())), at.nextafter(torch.full((), 1e9))):
        x = x.copysign(torch.randn(x.shape))
        x[:, :: fmt.block] = fmt.max  # fixes the scale
        check_quantize(x, format, device, rounding="stochastic", rng=RNG)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (31, 33), (16, 48), (17, 300), (257, 130), (1, 2049)]
)
@pytest.mark.parametrize("format", ["mxfp4", "mxfp6_e2m3", "nvfp4"])
def test_ragged_shapes(format, shape, transpose, device):
    x = torch.randn(shape).bfloat16()
    for rounding in ROUNDINGS:
        check_quantize(x, format, device, transpose=transpose, **options_for(rounding, x))


@pytest.mark.parametrize("transpose", [False, True])
def test_strided_and_offset_views(transpose, device):
    base = torch.randn(70, 200)
    for dtype in FLOATS:
        b = base.to(dtype)
        views = [
            b.T,
            b[:, 1:],
            b[3:, 7:],
            b[::2],
            b[:, ::3],
            b[1::2, 5::4].T,
            b[:1].expand(40, 200),
            b.flip(0),
        ]
        for view in views:
            check_quantize(view, "mxfp4", device, transpose=transpose)


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("group", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "mxfp8_e4m3"])
def test_hadamard(format, group, signs, device):
    x = torch.randn(37, 512).bfloat16()
    vector = mxtrain.draw_signs(group)[0] if signs else None
    for rounding in ROUNDINGS:
        for transpose, y in ((False, x), (True, x.T)):
            check_quantize(
                y,
                format,
                device,
                transpose=transpose,
                hadamard=group,
                signs=vector,
                prescale=0.75,
                **options_for(rounding, y),
            )


@pytest.mark.parametrize("format", FORMATS)
def test_prescale_that_overflows_saturates(format, device):
    x = torch.randn(4, 64)
    x[1, 40] = 3e38
    for rule in RULES:
        got = check_quantize(x, format, device, prescale=4.0, scale_rule=rule)
        assert not got.dequantize().isnan().any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("format", FORMATS)
def test_non_finite_blocks_leave_their_neighbours_untouched(format, value, device):
    fmt = mxtrain.FORMATS[format]
    x = torch.randn(8, 256)
    clean = mxtrain.quantize(x.to(device), format)
    x[3, 100] = value
    got = check_quantize(x, format, device)
    block = 100 // fmt.block
    nan_scale = 255 if fmt.scale == "e8m0" else 0x7F
    assert got.scale[3, block] == nan_scale
    values, expected = got.dequantize().cpu(), clean.dequantize().cpu()
    lo, hi = block * fmt.block, (block + 1) * fmt.block
    assert values[3, lo:hi].isnan().all()
    values[3, lo:hi] = expected[3, lo:hi] = 0
    if not fmt.two_level or x.abs().nan_to_num(0, 0, 0).max() == x.abs().max():
        assert_same_bytes(values, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_zero_blocks_of_either_sign_and_one_hot_blocks(format, device):
    x = torch.zeros(4, 64)
    x[1] = -0.0
    x[2, 5] = 1e-30
    x[3, 63] = -2.0
    got = check_quantize(x, format, device)
    assert got.data[:2].count_nonzero() == 0 and got.scale[:2].count_nonzero() == 0
    check_quantize(x.T, format, device, transpose=True)


def test_toward_is_poisoned_by_its_own_nan(device):
    x = torch.randn(4, 64)
    toward = x.clone()
    toward[2, 33] = float("nan")
    got = check_quantize(x, "mxfp4", device, rounding="toward", toward=toward)
    assert got.scale[2, 1] == 255 and got.scale[2, 0] != 255


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("format", FORMATS)
def test_no_rows(format, rows, device):
    got = check_quantize(torch.randn(rows, 40), format, device)
    assert got.dequantize().shape == (rows, 40)
    check_quantize(torch.randn(40, rows), format, device, transpose=True)


ROW = Quantizer("mxfp4", rounding="stochastic")
COLUMNS = [
    Quantizer("mxfp4", rounding="stochastic", hadamard=64, signs="drawn"),
    Quantizer("mxfp8_e5m2", scale_rule="floor"),
    Quantizer("nvfp4", scale_rule="even", rounding="stochastic", hadamard=16),
    Quantizer("mxfp6_e3m2", scale_rule="even", prescale=0.75),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 64), (256, 96), (300, 700), (1, 1), (520, 33)])
@pytest.mark.parametrize("col", COLUMNS, ids=lambda c: c.format)
def test_dual_equals_its_parts(col, shape, dtype, device):
    group = col.hadamard
    if (
        group
        and (-(-shape[0] // mxtrain.FORMATS[col.format].block) * mxtrain.FORMATS[col.format].block)
        % group
    ):
        shape = (-(-shape[0] // group) * group, shape[1])
    x = torch.randn(shape).to(dtype).to(device)
    rng = RNG.to(device)
    signs = mxtrain.draw_signs(group, device=device)[0] if col.signs == "drawn" else None
    a, b, sums = mxtrain.quantize_dual(x, ROW, col, rng=rng, col_signs=signs, column_sum=True)
    assert_same_bytes(sums, reference.column_sum(x.cpu()))
    for got, q, transpose in ((a, ROW, False), (b, col, True)):
        expected = mxtrain.quantize(
            x,
            q.format,
            scale_rule=q.scale_rule,
            rounding=q.rounding,
            transpose=transpose,
            hadamard=q.hadamard,
            signs=signs if transpose else None,
            prescale=q.prescale,
            rng=rng if q.rounding == "stochastic" else None,
        )
        assert_same_operand(got, parts(expected))
        assert got.shape == expected.shape


@pytest.mark.parametrize("shape", [(64, 64), (33, 100), (300, 520), (1, 1)])
@pytest.mark.parametrize("out_format", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_requantize_equals_its_parts(format, out_format, shape, device):
    a = mxtrain.quantize(torch.randn(shape).to(device), format)
    for rounding in ("nearest", "stochastic"):
        options = {
            "rounding": rounding,
            "rng": RNG.to(device) if rounding == "stochastic" else None,
        }
        got = mxtrain.requantize(a, out_format, **options)
        expected = mxtrain.quantize(a.dequantize(), out_format, transpose=True, **options)
        assert_same_operand(got, parts(expected))
        options["rng"] = None if options["rng"] is None else RNG
        assert_same_operand(
            got, reference.requantize(*parts(a), format, shape[1], out_format=out_format, **options)
        )


def test_requantize_with_hadamard_and_nan(device):
    x = torch.randn(128, 100)
    x[5, 70] = float("inf")
    a = mxtrain.quantize(x.to(device), "mxfp4")
    signs = mxtrain.draw_signs(64, device=device)[0]
    options = {"hadamard": 64, "signs": signs, "prescale": 0.75, "scale_rule": "floor"}
    got = mxtrain.requantize(a, **options)
    assert_same_operand(
        got, parts(mxtrain.quantize(a.dequantize(), "mxfp4", transpose=True, **options))
    )
    assert got.dequantize().isnan().any()


@pytest.mark.parametrize("transpose", [False, True])
def test_swizzled_scales(transpose, device):
    x = torch.randn(200, 330).to(device)
    plain = mxtrain.quantize(x, "mxfp4", transpose=transpose)
    swizzled = mxtrain.quantize(x, "mxfp4", transpose=transpose, swizzle=True)
    assert_same_bytes(swizzled.scale, mxtrain.swizzle_scale(plain.scale))
    assert_same_bytes(swizzled.dequantize(), plain.dequantize())
    assert_same_bytes(mxtrain.requantize(swizzled).data, mxtrain.requantize(plain).data)


def test_same_rng_same_bytes_whatever_the_thread_count():
    x = torch.randn(1000, 1000)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(mxtrain.quantize(x, "mxfp4", rounding="stochastic", rng=RNG))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same_operand(other, parts(results[0]))


def test_rng_may_be_a_strided_row(device):
    table = torch.stack([RNG, RNG + 1, RNG + 2]).to(device)
    x = torch.randn(32, 64).to(device)
    strided = torch.stack([RNG, RNG + 5]).T.contiguous().to(device)[:, 0]
    a = mxtrain.quantize(x, "mxfp4", rounding="stochastic", rng=strided)
    b = mxtrain.quantize(x, "mxfp4", rounding="stochastic", rng=table[0])
    c = mxtrain.quantize(x, "mxfp4", rounding="stochastic", rng=table[1])
    assert torch.equal(a.data, b.data) and not torch.equal(a.data, c.data)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_options_any_layout(data):
    """Random shapes, strides, dtypes and options.

    Values that mix magnitudes, zeros, subnormals and specials.
    """
    draw = data.draw
    format, rule = draw(st.sampled_from(FORMATS)), draw(st.sampled_from(RULES))
    rounding, transpose = draw(st.sampled_from(ROUNDINGS)), draw(st.booleans())
    rows, cols = draw(st.integers(1, 70)), draw(st.integers(1, 330))
    group = draw(st.sampled_from([0, 16, 64, 256]))
    if group:
        rows, cols = (
            (-(-rows // group) * group, cols) if transpose else (rows, -(-cols // group) * group)
        )
    seed, dtype = draw(st.integers(0, 2**31)), draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator) * torch.exp2(
        6 * torch.randn(rows, 1, generator=generator)
    )
    special = torch.rand(rows, cols, generator=generator)
    x[special < 0.02] = 0.0
    x[(special > 0.02) & (special < 0.03)] = -0.0
    x[(special > 0.03) & (special < 0.04)] *= 1e-38
    if draw(st.booleans()):
        x[special > 0.999] = float("nan")
    x = x.to(dtype)
    if draw(st.booleans()):
        x = x.T.contiguous().T
    check_quantize(
        x,
        format,
        scale_rule=rule,
        transpose=transpose,
        hadamard=group,
        signs=mxtrain.draw_signs(group)[0] if group and draw(st.booleans()) else None,
        prescale=draw(st.sampled_from([1.0, 0.75, 3.0])),
        swizzle=draw(st.booleans()),
        **options_for(rounding, x, seed),
    )


@pytest.mark.parametrize("format", FORMATS)
def test_operands_at_any_address(format, device):
    """Codes and scales that start anywhere decode, and quantize again, as aligned ones do."""
    op = operand(70, 96, format, device=device)
    for by in (1, 2, 4):
        data, scale = (torch.cat([t.new_zeros(by), t.flatten()])[by:] for t in (op.data, op.scale))
        moved = mxtrain.Operand(
            data.view_as(op.data), scale.view_as(op.scale), format, op.shape, op.tensor_scale
        )
        assert_same_bytes(moved.dequantize(torch.float32), op.dequantize(torch.float32))
        for got, expected in zip(
            parts(mxtrain.requantize(moved, "mxfp4")),
            parts(mxtrain.requantize(op, "mxfp4")),
            strict=True,
        ):
            assert got is expected is None or torch.equal(got, expected)


def test_operands_print_themselves_without_their_codes_and_compare_by_identity():
    x = torch.randn(130, 256)
    operand = mxtrain.quantize(x, "mxfp4")
    assert repr(operand) == "Operand('mxfp4', shape=(130, 256), device='cpu')"
    swizzled = mxtrain.quantize(x, "mxfp4", swizzle=True)
    assert repr(swizzled) == "Operand('mxfp4', shape=(130, 256), device='cpu', swizzled=True)"
    assert operand != swizzled and len({operand, swizzled, operand}) == 2
    assert repr(mxtrain.int8_quantize(x)) == "Int8Operand(shape=(130, 256), device='cpu')"
    fallen, _ = mxtrain.int8_quantize_fallback(x, 1.0)
    assert repr(fallen) == "Int8Operand(shape=(130, 256), device='cpu', with residual)"
