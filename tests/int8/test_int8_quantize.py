"""int8_block and its fallback: bytes against the reference, and the numbers of the method.

Errors are relative Frobenius norms on N(0, 1) data unless said.
"""

from __future__ import annotations

import pytest
import torch
from common import FLOATS, all_bfloat16, assert_same_bytes, refuses

import mxtrain
from mxtrain import reference
from mxtrain.int8 import BLOCK, block_amax

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback")
RNG = torch.tensor([11, 5 + (3 << 33)])
SHAPES = [(1, 1), (128, 128), (130, 300), (257, 127), (16, 384)]


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def outliers(rows, cols, blocks, size, seed=0):
    """N(0, 1) with one element of `size` in each of the first so many blocks, drawn at random."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g)
    across = cols // BLOCK
    chosen = torch.randperm(rows // BLOCK * across, generator=g)[:blocks]
    r = chosen // across * BLOCK + torch.randint(0, BLOCK, (blocks,), generator=g)
    c = chosen % across * BLOCK + torch.randint(0, BLOCK, (blocks,), generator=g)
    x[r, c] = size
    return x, r, c


def where_fallen(operand):
    """The mask, for every code of the operand."""
    rows = operand.mask.repeat_interleave(BLOCK, 0)[: operand.shape[0]]
    return rows.repeat_interleave(BLOCK, 1).bool()


# ---- bytes ----


def check(x, device, threshold):
    """Both forms of both ops against the reference."""
    y = x.to(device)
    data, scale = reference.int8_quantize(x)
    a, t = mxtrain.int8_quantize(y, layout="both")
    assert_same_bytes(a.data, data, "codes")
    assert_same_bytes(a.scale, scale, "scales")
    assert_same_bytes(t.data, a.transposed().data, "codes of the transpose")
    assert_same_bytes(mxtrain.int8_quantize(y).data, data, "row alone")
    assert_same_bytes(mxtrain.int8_quantize(y, layout="transposed").data, t.data, "column alone")
    data, scale, residual, second, mask, counts = reference.int8_quantize_fallback(x, threshold)
    (a, t), found = mxtrain.int8_quantize_fallback(y, threshold, layout="both")
    assert_same_bytes(a.data, data, "codes with fallback")
    assert_same_bytes(a.scale, scale, "scales with fallback")
    assert_same_bytes(a.mask, mask, "mask")
    assert_same_bytes(a.residual_scale, second, "residual scales")
    assert_same_bytes(found, counts, "counts")
    fallen = where_fallen(a)
    assert_same_bytes(torch.where(fallen, a.residual, 0), residual, "residual")
    turned = a.transposed()
    assert_same_bytes(
        torch.where(where_fallen(t), t.residual, 0),
        torch.where(where_fallen(turned), turned.residual, 0),
        "residual of the transpose",
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes(shape, dtype, device):
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[1])
    check(x.to(dtype), device, 100.0)


def test_bytes_of_strided_and_misaligned_input(device):
    base = torch.randn(300, 517).bfloat16()
    for view in (base.t(), base[:, 1:], base[::2, ::3], base[5:6].expand(140, -1)):
        moved = base.to(device).as_strided(view.shape, view.stride(), view.storage_offset())
        got = mxtrain.int8_quantize(moved, layout="both")
        data, scale = reference.int8_quantize(view)
        assert_same_bytes(got[0].data, data)
        assert_same_bytes(got[0].scale, scale)
        assert_same_bytes(got[1].data, got[0].transposed().data)


@pytest.mark.parametrize("order", ["natural", "shuffled", "finite"])
def test_bytes_of_every_bfloat16(order, device):
    check(all_bfloat16(order), device, 1e20)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_stochastic_rounding(shape, dtype, device):
    x = (torch.randn(shape) * 3).to(dtype)
    data, scale = reference.int8_quantize(x, RNG)
    rng = RNG.to(device)
    a, t = mxtrain.int8_quantize(x.to(device), rounding="stochastic", rng=rng, layout="both")
    assert_same_bytes(a.data, data)
    assert_same_bytes(a.scale, scale)
    assert_same_bytes(t.data, a.transposed().data)


@pytest.mark.parametrize("dtype", FLOATS)
def test_bytes_of_stochastic_rounding_at_both_ends(dtype, device):
    """Half a million zeros, draws of 0 and of 65535 among them, and blocks of their largest
    magnitude, whose quotients are 127 and one step of float32 more or less."""
    g = torch.Generator().manual_seed(3)
    grid = torch.rand(4, 8, generator=g) + 0.5
    zeros = torch.zeros(4 * BLOCK, 8 * BLOCK)
    zeros[::BLOCK, ::BLOCK] = grid
    drawn = reference.draws(RNG, *zeros.shape, 0)[zeros == 0]
    assert drawn.min() == 0 and drawn.max() == 2**16 - 1  # only of the last a wrong zero goes up
    tops = grid.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    tops = tops * (torch.randint(0, 2, tops.shape, generator=g) * 2 - 1)
    for x in (zeros.to(dtype), tops.to(dtype)):
        data, _ = reference.int8_quantize(x, RNG)
        got = mxtrain.int8_quantize(x.to(device), rounding="stochastic", rng=RNG.to(device))
        assert_same_bytes(got.data, data)


def test_quotients_of_the_largest_magnitude():
    """x / S of a block's largest |x| is at most 127 + 2^-17, as stochastic rounding on CUDA has it:
    for all float32 of a binade; others have the same, or smaller ones where S is held at 2^-126."""
    largest = (torch.arange(2**23, dtype=torch.int32) + (127 << 23)).view(torch.float32)
    quotient = largest * (1 / (largest / 127))
    assert quotient.max() == 127 + 2.0**-17


def test_ties_go_to_even_and_grid_values_stay(device):
    x = torch.zeros(BLOCK, BLOCK)
    x[0] = torch.arange(BLOCK) - 0.5
    x[1, :3] = torch.tensor([127.0, -127.0, 3.0])
    a = mxtrain.int8_quantize(x.to(device))
    assert float(a.scale) == 1.0
    assert a.data[0].tolist() == [round(float(v)) for v in x[0]]
    assert a.data[1, :3].tolist() == [127, -127, 3]
    whole = torch.randint(-127, 128, (BLOCK, BLOCK)).float()
    whole[0, 0] = 127
    for seed in range(4):
        rng = torch.tensor([seed, 0], device=device)
        got = mxtrain.int8_quantize(whole.to(device), rounding="stochastic", rng=rng)
        assert torch.equal(got.data.cpu().float(), whole)


def test_extreme_magnitudes(device):
    """Blocks near both ends of float32; a block of zeros; -0."""
    for size in (3e38, 1e-37, 1e-40, 1e-45):
        x = torch.randn(BLOCK, BLOCK).clamp(-3, 3) / 3 * size
        check(x, device, max(size / 2, 1.5e-45))
    zero = mxtrain.int8_quantize(-torch.zeros(130, 5, device=device))
    assert not zero.data.any() and not zero.scale.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_a_nan_scale_and_is_counted(bad, device):
    x = torch.randn(300, 300)
    x[130, 260] = bad
    check(x, device, 2.0)
    a, counts = mxtrain.int8_quantize_fallback(x.to(device), 2.0)
    assert a.scale.isnan().nonzero().tolist() == [[1, 2]]
    assert not a.data[128:256, 256:].any() and a.mask[1, 2] == 0
    assert counts.tolist() == [8, 1, 9]


def test_edges_are_filled_with_zeros(device):
    a, t = mxtrain.int8_quantize(torch.full((130, 5), 7.0, device=device), layout="both")
    assert a.data.shape == (130, 128) and t.data.shape == (5, 256)
    assert not a.data[:, 5:].any() and not t.data[:, 130:].any()
    assert (a.data[:, :5] == 127).all() and (t.data[:, :130] == 127).all()


def test_a_threshold_must_be_positive(device):
    x = torch.randn(130, 130, device=device)
    for value in (0.0, -1.0, float("nan")):
        limit = torch.full((1,), value, device=device)
        if device == "cpu":
            with refuses(RuntimeError, match="threshold must be positive"):
                mxtrain.int8_quantize_fallback(x, limit)
        else:  # the host does not wait for its value
            a, counts = mxtrain.int8_quantize_fallback(x, limit)
            assert a.scale.isnan().all() and counts.tolist() == [0, 4, 4]


# ---- the numbers of the method ----


def test_plain_error_and_range(device):
    """T1: 0.95% for 128 x 128; every block attains 127 and none goes beyond."""
    x = torch.randn(1024, 1024, device=device)
    a = mxtrain.int8_quantize(x)
    assert error(a.dequantize(), x) == pytest.approx(0.0095, abs=0.0005)
    attained = a.data.view(8, BLOCK, 8, BLOCK).int().abs().amax((1, 3))
    assert (attained == 127).all()


def test_fallback_everywhere_is_some_16_bits(device):
    """T2: error 3.7e-5, s / d in [254, 254.3] on dense blocks, some 45 times better than BF16."""
    x = torch.randn(512, 512, device=device)
    a, _ = mxtrain.int8_quantize_fallback(x, 1e-9)
    assert error(a.dequantize(), x) == pytest.approx(3.7e-5, rel=0.05)
    ratio = a.scale / a.residual_scale
    assert (ratio >= 253.99).all() and (ratio <= 254.3).all()
    assert error(x.bfloat16(), x) / error(a.dequantize(), x) > 40


def test_error_bounds(device):
    """T3: |A - Q| <= amax / 254, |A - FB| <= 1.551e-5 amax, |R| <= s / 2."""
    x = torch.randn(512, 512, device=device) ** 3
    a, _ = mxtrain.int8_quantize_fallback(x, 1e-9)
    amax = block_amax(x).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    plain = a.without_fallback().dequantize()
    assert ((x - plain).abs() <= amax / 254 * (1 + 1e-4)).all()
    assert ((x - a.dequantize()).abs() <= 1.551e-5 * amax).all()


@pytest.mark.parametrize("size, low, high", [(1000.0, 0.0085, 0.0095), (1e4, 0.0085, 0.011)])
def test_one_outlier_costs_the_fallback_nothing(size, low, high, device):
    """T4, T5: the residual's scale adapts, so the bulk keeps the error of plain INT8."""
    x, r, c = outliers(1024, 1024, 64, size)
    bulk = torch.ones_like(x, dtype=torch.bool)
    bulk[r, c] = False
    x = x.to(device)
    a, counts = mxtrain.int8_quantize_fallback(x, 10.0)
    assert counts.tolist() == [64, 0, 64]
    plain, full = (t.dequantize().cpu()[bulk] for t in (a.without_fallback(), a))
    want = x.cpu()[bulk]
    assert error(plain, want) >= 0.999 and low <= error(full, want) <= high
    codes = a.data.cpu()[bulk]
    assert (codes == 0).float().mean() > 0.999


def test_an_outlier_of_100(device):
    """T4: plain .229, fallback 9e-4."""
    x, r, c = outliers(512, 512, 16, 100.0)
    bulk = torch.ones_like(x, dtype=torch.bool)
    bulk[r, c] = False
    a, _ = mxtrain.int8_quantize_fallback(x.to(device), 10.0)
    plain, full = (t.dequantize().cpu()[bulk] for t in (a.without_fallback(), a))
    assert error(plain, x[bulk]) == pytest.approx(0.229, abs=0.01)
    assert error(full, x[bulk]) == pytest.approx(9e-4, rel=0.1)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_transpose_is_exact(dtype, device):
    """T9: Q(A^T) = Q(A)^T bitwise, scales, mask and residual included."""
    x = (torch.randn(256, 384, device=device) ** 3).to(dtype)
    a, _ = mxtrain.int8_quantize_fallback(x.t(), 65.0)
    b, _ = mxtrain.int8_quantize_fallback(x, 65.0, layout="transposed")
    for got, want in ((a.data, b.data), (a.scale, b.scale), (a.mask, b.mask)):
        assert_same_bytes(got, want.contiguous())
    fallen = where_fallen(a)
    assert fallen.any() and not fallen.all()
    assert_same_bytes(torch.where(fallen, a.residual, 0), torch.where(fallen, b.residual, 0))


def test_stochastic_rounding_is_unbiased(device):
    """T10: one draw errs by 1.42%, sqrt 2 times nearest; the mean of 400 by 1/20 of it."""
    x = torch.randn(256, 256, device=device)
    total = torch.zeros_like(x)
    for seed in range(400):
        rng = torch.tensor([seed, 1], device=device)
        one = mxtrain.int8_quantize(x, rounding="stochastic", rng=rng).dequantize()
        total += one
    single, nearest = error(one, x), error(mxtrain.int8_quantize(x).dequantize(), x)
    assert single / nearest == pytest.approx(2**0.5, rel=0.02)
    assert error(total / 400, x) == pytest.approx(single / 20, rel=0.05)


def test_the_rate_is_the_count(device):
    """T11: a huge threshold gives 0, a tiny one every block that is not zero."""
    x = torch.randn(512, 640, device=device)
    x[:128, :128] = 0
    for threshold, fallen in ((1e30, 0), (1e-30, 19)):
        a, counts = mxtrain.int8_quantize_fallback(x, threshold)
        assert counts.tolist() == [fallen, 0, 19] and int(a.mask.sum()) == fallen
    limit = float(block_amax(x).flatten().sort()[0][9])
    _, counts = mxtrain.int8_quantize_fallback(x, limit)
    assert counts.tolist() == [10, 0, 19]  # strictly above


def test_blocks_of_zeros_are_not_counted(device):
    """The counts are of those that fell back, are not finite, are not all zero."""
    x = torch.zeros(300, 260, device=device)
    x[0, 0], x[150, 259], x[299, 5] = 5.0, 1.0, float("nan")
    _, counts = mxtrain.int8_quantize_fallback(x, 2.0)
    assert counts.tolist() == [1, 1, 3]
