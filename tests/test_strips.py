"""The kernels of csrc/cuda/strip.cuh: bfloat16 to mxfp4, stochastic or rotated, and both operands
of one read nearest; byte for byte.

They quantize a block where it stands, so what could go wrong is at the ends of the exponent range,
at prescales, at the edges of tiles of 64 x 64, and where they hand over to the general kernels.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from common import RULES, assert_same_bytes, check_quantize, wide_range

import mxtrain
from mxtrain import Quantizer, reference

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize")

RNG = torch.tensor([0x123456789ABCDEF, 2**33 + 7])
TARGETS = [("stochastic", 0), ("stochastic", 16), ("stochastic", 32), ("stochastic", 64)]
TARGETS += [("nearest", 32), ("nearest", 64)]


def some_signs(group: int) -> torch.Tensor | None:
    return torch.where(torch.arange(group) * 7 % 5 > 1, 1, -1).to(torch.int8) if group else None


def options(rounding: str, group: int, **more) -> dict:
    rng = RNG if rounding == "stochastic" else None
    return dict(rounding=rounding, hadamard=group, signs=some_signs(group), rng=rng, **more)


def test_scheduled_philox():
    """The kernels' calls, with folded keys, against the generator's."""
    host = pytest.importorskip("mxtrain._host", reason="this library was built for another Python")
    draw = random.Random(3)
    ends = [0, 1, 2**31, 2**32 - 1]
    cases = list(itertools.product(ends, ends, [0, 1], ends, ends))
    cases += [[draw.getrandbits(32) for _ in range(5)] for _ in range(5000)]
    for group, offset, stream, low, high in cases:
        want = host.philox4x32([group, 0, offset, stream], [low, high])
        assert host.scheduled_philox(group, offset, stream, [low, high]) == want


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rounding, group", TARGETS)
def test_blocks_of_every_exponent(rounding, group, rule, transpose, device):
    x = wide_range(192, 384)
    x = x.T.contiguous() if transpose else x
    check_quantize(
        x, "mxfp4", device, transpose=transpose, scale_rule=rule, **options(rounding, group)
    )


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_elements_at_their_draws_thresholds(rule, transpose, device):
    """Below, at and above (2 draw + 1) / 2^17 of a step of 1/2, where bfloat16 has it: draws below
    128. Rows have scales of every exponent, past both ends of what is rounded where it stands.
    """
    exponents = torch.arange(-124, 126)
    shape = len(exponents), 4096
    draws = reference.draws(RNG, *shape, stream=int(transpose))
    at = (2 * draws + 1).double() * 2.0**-18
    steps = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(8))
    x = torch.where(draws < 128, at, 0.75)
    x = (x.bfloat16().view(torch.int16) + steps.short()).view(torch.bfloat16).double()
    assert (draws < 128).sum() > 1000 and ((x == at) & (draws < 128)).sum() > 300
    x *= 1 - 2 * torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(9))
    x[:, ::32] = 6.0  # the scale is 1 by every rule
    x = (x * 2.0 ** exponents[:, None].double()).bfloat16()
    x = x.T.contiguous() if transpose else x
    check_quantize(
        x, "mxfp4", device, transpose=transpose, scale_rule=rule, **options("stochastic", 0)
    )


@pytest.mark.parametrize("prescale", [0.75, 1.0, 1.5, 1e-30, 1e30])
@pytest.mark.parametrize("rounding, group", TARGETS)
def test_prescales(rounding, group, prescale, device):
    x = wide_range(96, 256, 1)
    x[:48] = torch.randn(48, 256).bfloat16()
    for rule in RULES:
        check_quantize(
            x, "mxfp4", device, scale_rule=rule, prescale=prescale, **options(rounding, group)
        )


@pytest.mark.parametrize("value", [3.0, -3.0, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rounding, group", TARGETS)
def test_maximum_at_every_place(rounding, group, transpose, value, device):
    x = torch.randn(64, 64).clamp(-0.5, 0.5).bfloat16()
    x.fill_diagonal_(value)
    if group:  # rotated back: it stands there after the rotation
        x = (x.float() @ reference.hadamard(torch.eye(64), group, some_signs(group)).T).bfloat16()
    x = x.T.contiguous() if transpose else x
    check_quantize(x, "mxfp4", device, transpose=transpose, **options(rounding, group))


def zeros_of_both_signs(rows, cols, group):
    """Sparse +-1, of which what is left out keeps its sign; and a group that is half -0 and cancels
    in the rest: a butterfly's -0 - (+0) is -0, so the sign of a zero reaches a code."""
    g = torch.Generator().manual_seed(group)
    sign = torch.randint(0, 2, (rows, cols), generator=g) * 2.0 - 1
    x = (torch.rand(rows, cols, generator=g) < 0.02) * sign
    if group:
        x[0, :group] = -0.0
        x[0, group // 2], x[0, group // 2 + 1] = 1, -1
    return x.bfloat16()


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rounding, group", TARGETS)
def test_zeros_of_both_signs(rounding, group, transpose, device):
    x = zeros_of_both_signs(192, 256, group)
    opts = options(rounding, group) | ({"signs": None} if group else {})
    for y in (x, x.T.contiguous()):
        check_quantize(y, "mxfp4", device, transpose=transpose, **opts)
        check_quantize(y, "mxfp4", device, transpose=transpose, **options(rounding, group))
    codes = reference.quantize(x, "mxfp4", **opts)[0]
    assert ((codes & 0xF) == 8).any() or ((codes >> 4) == 8).any()  # -0, in blocks of ordinary size


@pytest.mark.parametrize("group", [16, 32, 64])
def test_zeros_of_both_signs_from_codes(group, device):
    x = reference.quantize(zeros_of_both_signs(192, 256, group).T.contiguous(), "mxfp4")
    data, scale = (t.to(device) for t in x[:2])
    opts = options("stochastic", group)
    on = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in opts.items()}
    got = mxtrain.requantize(mxtrain.Operand(data, scale, "mxfp4", (256, 192)), **on)
    want = reference.requantize(*x, "mxfp4", 192, **opts)
    assert_same_bytes(got.scale, want[1])
    assert_same_bytes(got.data, want[0])


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 64), (64, 1), (127, 63), (129, 65), (130, 136), (96, 1000), (1000, 96), (2, 8)]
)
def test_edges_of_tiles(shape, transpose, swizzle, device):
    torch.manual_seed(shape[0])
    x = torch.randn(shape).bfloat16()
    more = dict(transpose=transpose, swizzle=swizzle)
    check_quantize(x, "mxfp4", device, **options("stochastic", 0), **more)
    check_quantize(x, "mxfp4", device, **options("stochastic", 32), **more)
    wide = torch.randn(shape[0], shape[1] + 24).bfloat16()[:, 8 : 8 + shape[1]]  # pitch and offset
    check_quantize(wide, "mxfp4", device, **options("stochastic", 16), **more)


@pytest.mark.parametrize("shape", [(128, 64), (192, 320), (640, 576)])
@pytest.mark.parametrize("row, col", [(0, 0), (0, 64), (64, 0), (64, 64), (32, 16)])
def test_dual(row, col, shape, device):
    x = wide_range(*shape, 2)
    quantizers = [
        Quantizer("mxfp4", scale_rule="floor", rounding="stochastic", hadamard=g, prescale=0.75)
        if g
        else Quantizer("mxfp4", rounding="stochastic")
        for g in (row, col)
    ]
    signs = [some_signs(row), some_signs(col)]
    to = lambda t: None if t is None else t.to(device)  # noqa: E731
    got = mxtrain.quantize_dual(
        x.to(device),
        *quantizers,
        rng=RNG.to(device),
        row_signs=to(signs[0]),
        col_signs=to(signs[1]),
    )
    for operand, q, s, transpose in zip(got, quantizers, signs, (False, True), strict=True):
        want = reference.quantize(
            x, "mxfp4", scale_rule=q.scale_rule, rounding="stochastic", hadamard=q.hadamard,
            signs=s, prescale=q.prescale, transpose=transpose, rng=RNG,
        )  # fmt: skip
        assert_same_bytes(operand.scale, want[1])
        assert_same_bytes(operand.data, want[0])


@pytest.mark.parametrize("width", [1000, 64])
@pytest.mark.parametrize("group", [0, 64])
def test_tiles_by_tickets(group, width, device):
    """So many that a CTA has only its first to itself, and the last go to whoever comes first,
    whatever lay where the ticket is (csrc/cuda/strip_grid.cuh). The emulated GPU has 2
    multiprocessors.
    """
    gpu = device == "cuda"
    share = 100 * (torch.cuda.get_device_properties(0).multi_processor_count if gpu else 2)
    rows = 64 * -(-share // (width // 64))
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(5)).bfloat16()
    given = options("stochastic", group)
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    for transpose in (False, True):
        want = mxtrain.quantize(x, "mxfp4", transpose=transpose, **given)
        for before in (0, -1, -150, 7):
            torch.full((1,), before, dtype=torch.int32, device=device)  # and its memory is free
            got = mxtrain.quantize(x.to(device), "mxfp4", transpose=transpose, **moved)
            assert_same_bytes(got.scale, want.scale)
            assert_same_bytes(got.data, want.data)


@pytest.mark.parametrize("squares", [3, 14])
@pytest.mark.parametrize("row, col", [("stochastic", 0), ("stochastic", 64), ("nearest", 0)])
def test_scales_by_squares(row, col, squares, device):
    """Where squares of 256 x 256 cover x, scales leave square by square: one for a CTA and tiles
    left over, and so many that a CTA's stages come round, and the last tiles go to whoever comes
    first. Transposed, of one operand, too.
    """
    if device == "cuda":
        squares *= torch.cuda.get_device_properties(0).multi_processor_count // 2
    q = [Quantizer("mxfp4", rounding=row, hadamard=g) for g in (0, col)]
    stochastic = row == "stochastic"
    x = torch.randn(256, squares * 256, generator=torch.Generator().manual_seed(squares))
    x = torch.cat([x[:, 0::2], x[:, 1::2]]) if squares % 2 == 0 else x  # two squares high
    x = (x * torch.exp2(4 * torch.randn(x.shape))).bfloat16()
    rng, signs = RNG if stochastic else None, some_signs(col)
    to = lambda t: None if t is None else t.to(device)  # noqa: E731
    more = dict(rng=to(rng), col_signs=to(signs))
    got = mxtrain.quantize_dual(x.to(device), *q, **more)
    if stochastic:
        got += (
            mxtrain.quantize(
                x.to(device),
                "mxfp4",
                transpose=True,
                **{
                    k: to(v) if isinstance(v, torch.Tensor) else v
                    for k, v in options(row, col).items()
                },
            ),
        )
    for operand, g, transpose in zip(got, (0, col, col), (False, True, True), strict=False):
        given = dict(
            rounding=row, hadamard=g, signs=signs if g else None, rng=rng, transpose=transpose
        )
        want = (reference if device == "cpu" else mxtrain).quantize(x, "mxfp4", **given)
        want = want[:2] if device == "cpu" else (want.data, want.scale)
        assert_same_bytes(operand.scale, want[1])
        assert_same_bytes(operand.data, want[0])


@pytest.mark.parametrize("rounding, group", [("stochastic", 0), ("nearest", 0), ("stochastic", 32)])
@pytest.mark.parametrize(
    "shape", [(1, 64), (31, 40), (64, 63), (65, 72), (300, 264), (520, 136), (2112, 8)]
)
def test_column_sum_of_dual(shape, rounding, group, device):
    """In the order of column_sum, whole runs of 32 rows and ragged ones, of a view too; and with it
    the same operands. Rotated columns, and 63, take the kernel of column_sum.
    """
    shape = (-(-shape[0] // 64) * 64, shape[1]) if group else shape
    wide = torch.randn(shape[0], 3 * shape[1], generator=torch.Generator().manual_seed(7))
    wide = (wide * torch.exp2(8 * torch.randn(wide.shape))).bfloat16()
    q, col = (Quantizer("mxfp4", rounding=rounding, hadamard=g) for g in (0, group))
    rng = RNG.to(device) if rounding == "stochastic" else None
    for x in (wide[:, : shape[1]].contiguous(), wide[:, 8 : 8 + shape[1]]):
        on_device = x.to(device)
        *got, sums = mxtrain.quantize_dual(on_device, q, col, rng=rng, column_sum=True)
        assert_same_bytes(sums, reference.column_sum(x))
        for operand, want in zip(
            got, mxtrain.quantize_dual(on_device, q, col, rng=rng), strict=True
        ):
            assert_same_bytes(operand.data, want.data.cpu())
            assert_same_bytes(operand.scale, want.scale.cpu())


def test_column_sum_of_dual_of_many_rows(device):
    """More strips than wait in shared memory at once; columns that are zero, NaN or infinite."""
    x = torch.randn(64 * 256 + 300, 40, generator=torch.Generator().manual_seed(11)).bfloat16()
    x[:, 3], x[:, 7] = -0.0, 0.0
    x[5000, 11], x[40, 13], x[16600, 13] = float("inf"), float("inf"), float("-inf")
    q = Quantizer("mxfp4", rounding="stochastic")
    sums = mxtrain.quantize_dual(
        x.to(device), q, q, rng=RNG.to(device), column_sum=True
    )[2].cpu()  # fmt: skip
    want = reference.column_sum(x)
    assert want.isnan().sum() == 1 and torch.equal(sums.isnan(), want.isnan())
    assert_same_bytes(sums.nan_to_num(0.0), want.nan_to_num(0.0))


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "shape", [(1, 64), (64, 8), (31, 40), (65, 72), (130, 136), (192, 320), (96, 63)]
)
def test_dual_nearest(shape, rule, swizzle, device):
    """Two elements a word in both directions, and beside NaN and Inf; 63 columns have no strips."""
    x = wide_range(-(-shape[0] // 32) * 32, -(-shape[1] // 32) * 32, 5)[: shape[0], : shape[1]]
    x = x.contiguous()
    x[0, 3], x[-1, -1] = float("nan"), float("-inf")
    q = Quantizer("mxfp4", scale_rule=rule)
    wide = torch.cat([x, x, x], 1)
    for first, pitched in ((0, x), (8, wide)):
        view = pitched[:, first : first + shape[1]]
        on_device = pitched.to(device)[:, first : first + shape[1]]
        got = mxtrain.quantize_dual(on_device, q, q, swizzle=swizzle)
        for operand, transpose in zip(got, (False, True), strict=True):
            want = reference.quantize(
                view, "mxfp4", scale_rule=rule, transpose=transpose, swizzle=swizzle
            )
            assert_same_bytes(operand.scale, want[1])
            assert_same_bytes(operand.data, want[0])


def test_dual_nearest_of_every_value(device):
    """Each bfloat16 value beside others of any kind, in a row and in a column."""
    every = (torch.arange(1 << 16) * 40503 % (1 << 16)).to(torch.int32)  # odd: each value once
    every = torch.where(every < 1 << 15, every, every - (1 << 16)).to(torch.int16)
    x = torch.randn(64, 1 << 16, generator=torch.Generator().manual_seed(6)).bfloat16()
    x[7] = every.view(torch.bfloat16)
    x = torch.cat([x, x.reshape(1 << 16, 64).T], 1)
    for rule in RULES:
        q = Quantizer("mxfp4", scale_rule=rule)
        for operand, transpose in zip(
            mxtrain.quantize_dual(x.to(device), q, q), (False, True), strict=True
        ):
            want = reference.quantize(x, "mxfp4", scale_rule=rule, transpose=transpose)
            assert_same_bytes(operand.scale, want[1])
            assert_same_bytes(operand.data, want[0])


@pytest.mark.parametrize("shape", [(1, 64), (64, 33), (200, 300), (384, 640)])
@pytest.mark.parametrize("rounding, group", TARGETS)
def test_requantize(rounding, group, shape, device):
    shape = (-(-shape[0] // 64) * 64, shape[1]) if group else shape
    operand = reference.quantize(wide_range(*shape, 4), "mxfp4")
    data, scale = (t.to(device) for t in operand[:2])
    opts = options(rounding, group)
    on = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in opts.items()}
    got = mxtrain.requantize(mxtrain.Operand(data, scale, "mxfp4", shape), **on)
    want = reference.requantize(*operand, "mxfp4", shape[1], **opts)
    assert_same_bytes(got.scale, want[1])
    assert_same_bytes(got.data, want[0])


@pytest.mark.parametrize("swizzle", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("codes", ["all", "small", "sparse"])
@pytest.mark.parametrize(
    "first, last", [(100, 100), (100, 104), (100, 108), (100, 109), (16, 24), (242, 250), (0, 5),
                    (246, 254), (250, 255)],
)  # fmt: skip
def test_requantize_of_scales_near_each_other(first, last, codes, rule, swizzle, device):
    """Both sides of the limit, 8 binades, within which two elements are rounded a word."""
    generator = torch.Generator().manual_seed(first + last)
    data = torch.randint(0, 256, (192, 80), dtype=torch.uint8, generator=generator)
    scale = torch.randint(first, last + 1, (192, 5), dtype=torch.uint8, generator=generator)
    if codes == "small":
        data &= 0x99  # 0 and 1/2, of both signs
    if codes == "sparse":
        data[torch.rand(data.shape, generator=generator) < 0.97] &= 0x88
        scale[torch.rand(scale.shape, generator=generator) < 0.3] = 0
    got = mxtrain.requantize(
        mxtrain.Operand(data.to(device), scale.to(device), "mxfp4", (192, 150)),
        scale_rule=rule, rounding="stochastic", rng=RNG.to(device), swizzle=swizzle,
    )  # fmt: skip
    want = reference.requantize(
        data, scale, None, "mxfp4", 150, scale_rule=rule, rounding="stochastic", rng=RNG,
        swizzle=swizzle,
    )  # fmt: skip
    assert_same_bytes(got.scale, want[1])
    assert_same_bytes(got.data, want[0])


@pytest.mark.parametrize("rows", [64, 130])
def test_requantize_of_zero_blocks(rows, device):
    """Whose scale is 0: they take no part in how far scales lie apart; nor do signs of zeros."""
    x = torch.randn(rows, 100, generator=torch.Generator().manual_seed(rows))
    x[5], x[32:64, 40:], x[:, 70] = 0.0, 0.0, -0.0
    operand = reference.quantize(x, "mxfp4")
    data, scale = operand[0].clone(), operand[1].clone()
    data[40] = 0x88  # zeros with signs in a row of scale 0
    scale[40] = 0
    got = mxtrain.requantize(
        mxtrain.Operand(data.to(device), scale.to(device), "mxfp4", (rows, 100)),
        rounding="stochastic", rng=RNG.to(device),
    )  # fmt: skip
    want = reference.requantize(data, scale, None, "mxfp4", 100, rounding="stochastic", rng=RNG)
    assert_same_bytes(got.scale, want[1])
    assert_same_bytes(got.data, want[0])
