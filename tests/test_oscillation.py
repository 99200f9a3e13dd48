"""Diagnostics: confidence, oscillation ratio, rates of change, and what a quantizer loses."""

from __future__ import annotations

import math

import pytest
import torch
from common import FORMATS, RULES, refuses

import mxtrain
from mxtrain import Quantizer, get_recipe
from mxtrain import oscillation as osc

MXFP4 = Quantizer("mxfp4", "ceil")
pytestmark = pytest.mark.ops(
    "quantize", "dequantize", "hadamard", "quantization_statistics", "oscillation_step_"
)


# ---- confidence ----

# |w| over the scale, and distance to the nearest threshold over the largest of its cell, by hand.
BY_HAND = {
    0.0: 1, 0.125: 0.5, 0.25: 0, 0.375: 0.5, 0.5: 1, 0.7: 0.2, 0.75: 0, 1: 1, 1.5: 1, 1.75: 0,
    2: 0.25 / 0.375, 2.125: 1, 2.5: 0, 2.75: 0.5, 3: 1, 3.5: 0, 4: 0.5 / 0.75, 4.25: 1, 5: 0,
    5.5: 0.5, 6: 1,
}  # fmt: skip


def test_confidence_by_hand(device):
    w = torch.zeros(2, 32)
    w[0, : len(BY_HAND)] = torch.tensor(list(BY_HAND))
    w[0, 31] = 6.0
    w[1] = -w[0] * 2**-10
    got = osc.confidence(w.to(device), MXFP4).cpu()
    expected = torch.ones(32)
    expected[: len(BY_HAND)] = torch.tensor(list(BY_HAND.values()))
    assert torch.allclose(got[0], expected, atol=1e-6) and torch.equal(got[0], got[1])


@pytest.mark.parametrize("format", FORMATS)
def test_confidence_on_the_grid_of_every_format(format):
    """0 halfway between neighbours, 1 where both are equally far (and at 0 and the largest)."""
    fmt = mxtrain.FORMATS[format]
    element = mxtrain.reference.format_named(format).element
    grid = mxtrain.reference.decode(torch.arange(2 ** (fmt.bits - 1)), element)
    grid = grid[grid.isfinite()].double()
    gaps = grid.diff()
    even = torch.cat([torch.ones(1), (gaps[1:] == gaps[:-1]).double(), torch.ones(1)])

    def of(values):
        w = torch.full((len(values) + 1, fmt.block), float(fmt.max))  # so the scale is 1
        w[1:, 1] = values.float()
        if fmt.two_level:
            w[0, 0] = 6 * 448.0  # and the tensor scale is 1
        return osc.confidence(w, Quantizer(format, "ceil"))[1:, 1]

    assert (of((grid[1:] + grid[:-1]) / 2) == 0).all()
    on_grid = of(grid)
    assert torch.equal(on_grid == 1, even == 1) and (on_grid > 0.5).all()


def test_confidence_of_zero_and_of_nonfinite_blocks():
    for q in (MXFP4, Quantizer("nvfp4", "even")):
        w = torch.zeros(1, 64)
        w[0, 40] = math.inf
        got = osc.confidence(w, q)
        assert (got[0, :32] == 1).all() and got[0, 40].isnan()


# ---- what a quantizer loses ----


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("format", FORMATS)
def test_statistics_by_definition(device, format, rule):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 70, generator=g) * torch.exp2(3 * torch.randn(40, 70, generator=g))
    x = x.to(device)
    got = osc.quantizer_statistics(x, Quantizer(format, rule))
    op = mxtrain.quantize(x, format, scale_rule=rule)
    q = op.dequantize()
    x64, q64 = x.double(), q.double()
    snr = 10 * math.log10((x64**2).sum() / ((x64 - q64) ** 2).sum())
    assert got["snr"] == pytest.approx(snr, rel=1e-9)
    assert got["underflow"] == ((x != 0) & (q == 0)).double().mean().item()
    assert got["confidence"] == pytest.approx(
        osc.confidence(x, Quantizer(format, rule)).double().mean().item(), rel=1e-6
    )
    # beyond the largest element at the scale: only such values err by more than half the top step
    fmt = mxtrain.FORMATS[format]
    if fmt.two_level:
        scale = op.scale.view(torch.float8_e4m3fn).float() * op.tensor_scale
    else:
        scale = torch.exp2(op.scale.float() - 127)
    clipped = x.abs() / scale.repeat_interleave(fmt.block, 1)[:, :70] > fmt.max
    assert got["clip"] == clipped.double().mean().item() and got["nonfinite"] == 0
    if rule == "ceil" and not fmt.two_level:
        assert got["clip"] == 0


def test_published_shares_on_normal_values(device):
    """Gaussian blocks: floor clips 2.34% of the elements, at a relative squared error of 1.322e-2;
    ceil none, at 1.332e-2, and stochastic at 2.711e-2 (computed with numpy)."""
    x = torch.randn(2048, 512, generator=torch.Generator().manual_seed(0)).to(device)
    for q, clip, mse in (
        (Quantizer("mxfp4", "floor"), 0.0234, 1.322e-2),
        (MXFP4, 0, 1.332e-2),
        (Quantizer("mxfp4", "ceil", "stochastic"), 0, 2.711e-2),
    ):
        got = osc.quantizer_statistics(x, q)
        assert got["clip"] == pytest.approx(clip, abs=4e-4)
        assert 10 ** (-got["snr"] / 10) == pytest.approx(mse, rel=0.01)


def test_rotation_prescale_transpose_and_draws(device):
    """A rotated quantizer is measured on its own grid, and torch's generator is left alone."""
    q = get_recipe("mxfp4_backward").dgrad_dy
    x = torch.randn(96, 70, generator=torch.Generator().manual_seed(0)).to(device)
    before = torch.get_rng_state()
    a = osc.quantizer_statistics(x.t(), q)
    b = osc.quantizer_statistics(x, q, transpose=True)
    assert a == b and torch.equal(before, torch.get_rng_state())
    assert a["clip"] == 0  # x 3/4
    # one outlier a row costs a rotated quantizer less
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 50
    plain = Quantizer("mxfp4", "ceil")
    rotated = Quantizer("mxfp4", "ceil", hadamard=64, signs="drawn")
    assert (
        osc.quantizer_statistics(x, plain)["underflow"]
        > osc.quantizer_statistics(x, rotated)["underflow"]
    )


def test_nonfinite_blocks_count_as_such_only(device):
    x = torch.randn(2, 64, device=device)
    clean = osc.quantizer_statistics(torch.cat([x[:1, :32], x[1:, 32:]]), MXFP4)
    x[0, 40], x[1, 3] = math.nan, math.inf
    got = osc.quantizer_statistics(x, MXFP4)
    assert got.pop("nonfinite") == 0.5 and clean.pop("nonfinite") == 0
    assert got == pytest.approx(clean)


def test_of_nothing():
    got = osc.quantizer_statistics(torch.zeros(2, 32), MXFP4)
    assert math.isnan(got["snr"]) and math.isnan(got["underflow"]) and got["clip"] == 0
    exact = osc.quantizer_statistics(torch.ones(2, 32), MXFP4)
    assert exact["snr"] == math.inf and exact["underflow"] == 0


# ---- oscillation ----


def test_t21_ratios(device):
    """A drifting weight has R near 1; one that steps 1e-3 S around a threshold of .5 S has 500."""
    watch = osc.Oscillation(MXFP4)
    w = torch.zeros(2, 32, device=device)
    w[:, 0] = 6.0  # scale 1
    steps = 4000
    for t in range(steps + 1):
        w[0, 1] = 1.0 * t / steps  # from 0 to 1
        w[1, 1] = 0.2495 + 1e-3 * (t % 2)  # 0 and 0.5
        sums = watch.update(w)
        assert (sums is None) == (t == 0)
        if t == 100:
            early = watch.ratio()[1, 1].item()
    r = watch.ratio().cpu()
    assert early == pytest.approx(500, rel=1e-3) and r[1, 1] == pytest.approx(500, rel=1e-2)
    assert r[0, 1] == pytest.approx(1, rel=1e-3) and r[0, 0] == 0
    assert watch.transitions == steps
    flips = watch.flips()
    assert flips[1, 1] == steps and flips[0, 1] == 2 and flips[0, 0] == 0
    assert watch.summary()[0] == 1 / 64
    watch.reset()
    with refuses(RuntimeError, "updates must have seen two matrices, got 0"):
        watch.ratio()
    w[1, 1] = 0.2495
    watch.update(w)
    assert watch.transitions == 1 and watch.flips().sum() <= 1


def test_sums_of_a_transition_by_definition(device):
    g = torch.Generator().manual_seed(3)
    a = torch.randn(8, 96, generator=g)
    b = a + 0.1 * torch.randn(8, 96, generator=g)
    watch = osc.Oscillation(Quantizer("mxfp4", "floor"))
    watch.update(a.to(device))
    got = watch.update(b.to(device)).cpu()
    qa, qb = (mxtrain.quantize(t, "mxfp4", scale_rule="floor").dequantize() for t in (a, b))
    norms = [(t.double() ** 2).sum() for t in (b - a, a, qb - qa, qa)]
    expected = torch.stack([*norms, (qa != qb).sum().double()])
    assert torch.allclose(got, expected, rtol=1e-6)
    rate_w, rate_q = osc.rate_of_change(got[None])
    assert rate_w.item() == pytest.approx(((b - a).norm() / a.norm()).item(), rel=1e-5)
    assert rate_q.item() == pytest.approx(((qb - qa).norm() / qa.norm()).item(), rel=1e-5)


def test_a_nonfinite_weight_adds_nothing_and_recovers():
    watch = osc.Oscillation(MXFP4)
    w = torch.randn(1, 64)
    for value in (1.0, math.nan, 1.0, 1.0):
        w[0, 3] = value
        sums = watch.update(w)
    assert (sums[[0, 2, 4]] == 0).all() and watch.ratio().isfinite().all()
    assert (watch.ratio() == 0).all()


def test_toward_is_what_q_ema_rounds_to():
    """T18's damping as the ratio: the average stays, so Q does, though W crosses the threshold."""
    q = get_recipe("tetrajet_ema").fprop_w
    plain, ema = osc.Oscillation(q), osc.Oscillation(q)
    w = torch.zeros(1, 32)
    w[0, 0] = 6.0
    average = w.clone()
    average[0, 1] = 0.26
    for t in range(31):
        w[0, 1] = 0.2495 + 1e-3 * (t % 2)
        plain.update(w)
        ema.update(w, toward=average)
    assert plain.flips()[0, 1] == 30 and ema.flips()[0, 1] == 0


def test_rotated_weights_are_watched_on_their_grid():
    q = get_recipe("quartet").fprop_w
    watch = osc.Oscillation(q)
    w = torch.randn(4, 40)
    watch.update(w)
    watch.update(w + 0.01)
    assert watch.ratio().shape == (4, 64)


# ---- the ops against the reference ----


def hard(shape, dtype=torch.float32, seed=0):
    """Values over many binades, with zeros, ties of E2M1 and blocks that are not finite."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * torch.exp2(6 * torch.randn(shape, generator=g))
    x[1::7] = torch.randint(-24, 25, x[1::7].shape, generator=g) / 4
    x[:, 3] = 0
    x[2, 40], x[3, 1] = math.nan, -math.inf
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("prescale", [1.0, 0.75])
@pytest.mark.parametrize("format", FORMATS)
def test_statistics_equal_the_reference(device, format, prescale, dtype):
    """Counts exactly; sums of doubles to their rounding, in any layout of x."""
    x = hard((45, 100), dtype)
    op = mxtrain.quantize(x, format, scale_rule="floor", prescale=prescale)
    parts = (op.data, op.scale, op.tensor_scale)
    expected = mxtrain.reference.quantization_statistics(x, *parts, format, prescale)
    scale = None if op.tensor_scale is None else op.tensor_scale.to(device)
    on = mxtrain.Operand(op.data.to(device), op.scale.to(device), format, op.shape, scale)
    layouts = [x.to(device), x.to(device).t().contiguous().t()]
    sums = [mxtrain.quantization_statistics(t, on, prescale).cpu() for t in layouts]
    assert torch.equal(*sums)
    assert torch.equal(sums[0][:5], expected[:5]) and expected[1] > 0
    assert torch.allclose(sums[0][5:], expected[5:], rtol=1e-12, atol=0)


def bits(x):
    """Of float32, where every NaN is one."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


@pytest.mark.parametrize("format", FORMATS)
def test_an_oscillation_step_equals_the_reference(device, format):
    """The state bitwise, after three steps, of which one is not finite in places."""
    state, ours = torch.zeros(5, 45, 100), torch.zeros(5, 45, 100, device=device)
    for step in range(4):
        w = hard((45, 100), seed=0) * (1 + 0.05 * step)
        w[5 + step, 7] = math.nan
        op = mxtrain.quantize(w, format)
        parts = (op.data, op.scale, op.tensor_scale)
        expected = mxtrain.reference.oscillation_step_(state, w, *parts, format)
        got = mxtrain.oscillation_step_(ours, w.to(device), mxtrain.quantize(w.to(device), format))
        assert torch.equal(bits(ours.cpu()), bits(state))
        assert torch.allclose(got.cpu(), expected, rtol=1e-12, atol=0)
    assert state[4].sum() > 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 33), (1000, 31)])
def test_every_element_is_in_one_part(device, shape):
    x = torch.ones(shape, device=device)
    sums = mxtrain.quantization_statistics(x, mxtrain.quantize(x, "mxfp4"))
    assert sums[0] == sums[2] == sums[5] == x.numel()


# ---- the rest ----


def test_output_change():
    a = torch.randn(3, 5)
    assert osc.output_change(a, a * 1.5).item() == pytest.approx(0.5)
    with refuses(ValueError, "after must have the shape of before"):
        osc.output_change(a, a[:2])


@pytest.mark.parametrize(
    "rows, cols, elements", [(100, 64, 640), (7, 64, 10**9), (5, 64, 1), (3, 0, 5)]
)
def test_row_sample(rows, cols, elements):
    sample = torch.zeros(rows, cols)[osc.row_sample(rows, cols, elements)]
    assert 1 <= len(sample) <= rows
    assert sample.numel() <= max(2 * elements, cols)
    if rows * cols <= elements:
        assert len(sample) == rows


def test_errors():
    x = torch.randn(4, 32)
    with refuses(TypeError, "operand must be an Operand, got Tensor"):
        mxtrain.quantization_statistics(x, x)
    with refuses(TypeError, "state must be a torch.Tensor"):
        mxtrain.oscillation_step_(None, x, mxtrain.quantize(x, "mxfp4"))
    with refuses(RuntimeError, "state must be contiguous, of dtype float32 and shape"):
        mxtrain.oscillation_step_(x, x, mxtrain.quantize(x, "mxfp4"))
    with refuses(ValueError, "x must have 2 dimensions, got 3"):
        osc.quantizer_statistics(x[None], MXFP4)
    with refuses(TypeError, "x must be a torch.Tensor"):
        osc.confidence([1.0], MXFP4)
    with refuses(ValueError, "quantizer must be a Quantizer to mxfp4, .*, int8_block, got"):
        osc.quantizer_statistics(x, Quantizer())
    for other in (Quantizer(), Quantizer("int8_block")):
        with refuses(ValueError, "quantizer must be a Quantizer to mxfp4, mxfp6_e3m2"):
            osc.Oscillation(other)
    watch = osc.Oscillation(MXFP4)
    with refuses(RuntimeError, "updates must have seen two matrices"):
        watch.flips()
    watch.update(x)
    with refuses(ValueError, r"w must have the shape of the first, \[4, 32\], got \[2, 32\]"):
        watch.update(x[:2])


# ---- several matrices in one call ----


@pytest.mark.parametrize("groups, rows, cols", [(2, 3, 40), (8, 16, 64), (128, 1, 256)])
@pytest.mark.parametrize("format", ["mxfp4", "mxfp6_e2m3", "mxfp8_e4m3"])
def test_groups_are_told_apart(device, format, groups, rows, cols):
    """Sums of each are those of a call by itself: double, so only their order differs."""
    q = Quantizer(format, "ceil")
    generator = torch.Generator().manual_seed(groups)
    steps = [
        torch.randn(groups * rows, cols, generator=generator).to(device) * 10.0**-i
        for i in range(3)
    ]
    together, alone = osc.Oscillation(q, groups), [osc.Oscillation(q) for _ in range(groups)]
    for w in steps:
        moved = together.update(w)
        one_by_one = [a.update(part) for a, part in zip(alone, w.chunk(groups), strict=True)]
        if moved is not None:
            torch.testing.assert_close(moved, torch.stack(one_by_one), rtol=1e-12, atol=0)
    for said in ("summary", "histogram"):
        expected = torch.stack([getattr(a, said)() for a in alone])
        torch.testing.assert_close(getattr(together, said)(), expected)
    assert torch.equal(together.ratio(), torch.cat([a.ratio() for a in alone]))
    sums = osc.quantizer_sums(steps[0], q, groups=groups)
    expected = torch.stack([osc.quantizer_sums(part, q) for part in steps[0].chunk(groups)])
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    beside = torch.cat(steps[0].chunk(groups), 1)  # each transposed
    sums = osc.quantizer_sums(beside, q, transpose=True, groups=groups)
    expected = [osc.quantizer_sums(p, q, transpose=True) for p in steps[0].chunk(groups)]
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-12, atol=0)
    again = osc.Oscillation.joined([(together, groups - 1), (alone[0], 0)])
    assert torch.equal(again.ratio(), torch.cat([alone[-1].ratio(), alone[0].ratio()]))
    assert again.transitions == 2


def test_groups_that_cannot_be():
    x = torch.randn(12, 32)
    for groups, rows in ((3, 12), (8, 12), (256, 256), (0, 12), (-2, 12)):
        with refuses(ValueError, "quantization_statistics: groups"):
            osc.quantizer_sums(torch.randn(rows, 32), MXFP4, groups=groups)
    with refuses(ValueError, "quantization_statistics: groups"):
        osc.quantizer_sums(x, Quantizer("nvfp4", "even"), groups=4)
    with refuses(ValueError, "quantizer_sums: groups"):
        osc.quantizer_sums(x, Quantizer("int8_block"), groups=4)
