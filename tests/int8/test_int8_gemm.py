"""int8_gemm: exact integer products, one order of float32 additions, a residual on either side."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from common import assert_same_bytes, refuses

import mxtrain
from mxtrain import Int8Operand, reference

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback", "int8_gemm")
SHAPES = [
    (1, 1, 1),
    (128, 128, 128),
    (130, 257, 300),
    (5, 300, 1000),
    (256, 16, 128),
    (300, 72, 513),
    (130, 40, 4500),  # 36 blocks of K
]


def operands(m, n, k, device, threshold=6.0):
    """A with blocks that fall back and blocks that do not, poison in the latter; B without."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(m, k, generator=g), torch.randn(n, k, generator=g)
    x[::97, ::61] *= 40
    a, _ = mxtrain.int8_quantize_fallback(x, threshold)
    rows = a.mask.repeat_interleave(128, 0)[:m].repeat_interleave(128, 1).bool()
    residual = torch.where(rows, a.residual, 127)  # what is not masked must not be read
    a = Int8Operand.of((a.data, a.scale, residual, a.residual_scale, a.mask), a.shape)
    return move(a, device), move(mxtrain.int8_quantize(w), device)


def move(a, device):
    return Int8Operand.of([None if t is None else t.to(device) for t in a.parts], a.shape)


def pooled(op, count=None):
    """op with its residual in a pool, its tiles the other way round, poison in what is left."""
    count = count or op.mask.numel()
    op = op.packed(count)
    slots = torch.where(op.mask > 0, count + 1 - op.mask, 0).to(torch.int32)
    pool = op.residual.flip(0)
    unused = torch.ones(count, dtype=torch.bool, device=pool.device)
    unused[slots[slots > 0].long() - 1] = False
    pool[unused] = -128
    return Int8Operand.of((op.data, op.scale, pool, op.residual_scale, slots), op.shape)


def expected(a, b):
    of_b = b.residual is not None
    own = (b if of_b else a).parts[2:]
    parts = (t.cpu() for t in (a.data, a.scale, b.data, b.scale))
    residual = None if own[0] is None else tuple(t.cpu() for t in own)
    return reference.int8_gemm(*parts, residual, of_b)


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes(shape, device):
    """Every float32 step in the order of the definition; either side may have the residual."""
    a, b = operands(*shape, device)
    for left, right in ((a.without_fallback(), b), (a, b), (b, a)):
        got = mxtrain.int8_gemm(left, right, out_dtype=torch.float32)
        assert_same_bytes(got, expected(left, right), str(shape))


@pytest.mark.parametrize("heavy", [(0,), (3,), (1, 4), (0, 2, 5), (0, 1, 2, 3, 4, 5)])
def test_rows_that_fell_back_as_a_whole(heavy, device):
    """Their tiles come first."""
    rows, n, k = (25 * 128 - 5, 14 * 256 - 3, 384) if device == "cuda" else (6 * 128 - 5, 130, 384)
    a, b = operands(rows, n, k, "cpu")
    mask = a.mask.clone()
    mask[::7, 1], mask[list(heavy)] = 1, 1
    residual = torch.randint(-127, 128, a.data.shape, dtype=torch.int8)
    scale = torch.rand(a.scale.shape) * 1e-3
    a = Int8Operand.of((a.data, a.scale, residual, scale, mask), a.shape)
    got = mxtrain.int8_gemm(move(a, device), move(b, device), out_dtype=torch.float32)
    of_cpu = mxtrain.int8_gemm(a, b, out_dtype=torch.float32)  # the reference would take minutes
    assert_same_bytes(got, of_cpu if device == "cuda" else expected(a, b))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_and_output_types(out_dtype, device):
    """Also where B has the residual: there a kernel may compute D^T. N of 130 is no multiple of 8;
    the last is one that Hopper's large tile takes.
    """
    shapes = [(130, 200, 256), (136, 200, 256)] + [(4200, 4352, 128)] * (device == "cuda")
    pairs = [operands(*shape, device) for shape in shapes]
    for left, right in pairs + [pair[::-1] for pair in pairs]:
        bias = torch.randn(right.shape[0], device=device)
        want = mxtrain.int8_gemm(left, right, out_dtype=torch.float32)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            got = mxtrain.int8_gemm(left, right, bias.to(dtype), out_dtype)
            assert_same_bytes(got, (want + bias.to(dtype).float()).to(out_dtype))
        assert_same_bytes(mxtrain.int8_gemm(left, right, out_dtype=out_dtype), want.to(out_dtype))


def test_scales_and_masks_of_any_strides(device):
    a, b = operands(260, 300, 400, device)
    want = mxtrain.int8_gemm(a, b)

    def strided(t):
        return None if t is None else t.t().contiguous().t()

    parts = a.parts
    again = Int8Operand.of(
        (parts[0], strided(parts[1]), parts[2], *map(strided, parts[3:])), a.shape
    )
    other = Int8Operand(b.data, strided(b.scale), b.shape)
    assert_same_bytes(mxtrain.int8_gemm(again, other), want)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_residual_in_a_pool(shape, device):
    """The bytes are those of the matrix, from tiles in any order, grids of any strides; what no
    slot has is not looked at.
    """
    a, b = operands(*shape, device)
    packed = pooled(a)
    slots = packed.mask.t().contiguous().t()
    strided = dataclasses.replace(packed, mask=slots)
    for left, right in ((a, b), (b, a)):
        want = mxtrain.int8_gemm(left, right, out_dtype=torch.float32)
        for op in (packed, strided):
            pair = [op if t is a else t for t in (left, right)]
            assert_same_bytes(mxtrain.int8_gemm(*pair, out_dtype=torch.float32), want, str(shape))


def test_fewer_tiles_than_blocks_fell_back(device):
    """What has no slot is as if it had not fallen back; no tiles, no residual."""
    a, b = operands(400, 200, 700, device)
    few = pooled(a, 3)
    assert few.mask.count_nonzero() == 3 < a.mask.count_nonzero()
    cut = dataclasses.replace(a, mask=(few.mask != 0).to(torch.uint8))
    none = dataclasses.replace(few, residual=few.residual[:0], mask=torch.zeros_like(few.mask))
    for turn in (False, True):
        for op, want in ((few, cut), (none, a.without_fallback())):
            got, want = (
                mxtrain.int8_gemm(*((b, t) if turn else (t, b)), out_dtype=torch.float32)
                for t in (op, want)
            )
            assert_same_bytes(got, want)


@pytest.mark.parametrize("bad", [-1, -(2**31), 1000, 2**25 + 1, 2**31 - 1])
def test_a_slot_beyond_the_pool(bad, device, looks_at_values):
    """The CPU refuses it; CUDA multiplies a tile of zeros."""
    a, b = operands(300, 200, 400, device)
    a = pooled(a)
    i, k = a.mask.nonzero()[0].tolist()
    slots, tiles = a.mask.clone(), a.residual.clone()
    tiles[slots[i, k] - 1] = 0
    slots[i, k] = bad
    broken = dataclasses.replace(a, mask=slots)
    for turn in (False, True):
        pair = (b, broken) if turn else (broken, b)
        if looks_at_values:
            with refuses(RuntimeError, match=rf"mask must lie in \[0, 12\], got {bad} \(block {i}"):
                mxtrain.int8_gemm(*pair)
        else:
            zeros = dataclasses.replace(a, residual=tiles)
            want = mxtrain.int8_gemm(*((b, zeros) if turn else (zeros, b)))
            assert_same_bytes(mxtrain.int8_gemm(*pair), want)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "shape",
    [(260, 300, 400), (1024, 1280, 512), (4200, 4352, 300), (4200, 4352, 100), (9001, 2000, 512),
     (9001, 1280, 512), (4200, 4352, 4500), (56500, 512, 128)],
)  # fmt: skip
def test_every_kernel_gives_the_same_bytes(shape, monkeypatch):
    """The portable kernel and that of the architecture, both sides' residuals, large and small;
    the third to the sixth have several tiles a thread block, whose stages follow one another, an
    odd or an even number of them across; then many blocks of K, and more rows of blocks than Hopper
    orders.
    """
    a, b = operands(*shape, "cuda")
    packed = pooled(a)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for left, right in ((a.without_fallback(), b), (a, b), (b, a)):
            want = mxtrain.int8_gemm(left, right, out_dtype=dtype)
            pair = [packed if t is a else t for t in (left, right)]
            assert_same_bytes(mxtrain.int8_gemm(*pair, out_dtype=dtype), want, str(shape))
            with monkeypatch.context() as context:
                context.setenv("MXTRAIN_INT8_GEMM", "portable")
                for parts in ((left, right), pair):
                    got = mxtrain.int8_gemm(*parts, out_dtype=dtype)
                    assert_same_bytes(got, want, str(shape))


def test_the_largest_integers_are_exact(device):
    """T8: |I| = 128 * 127^2 = 2,064,512 in every block of K."""
    ones = torch.full((130, 512), 127, dtype=torch.int8, device=device)
    grid = torch.ones(2, 4, device=device)
    for sign in (1, -1):
        a, b = Int8Operand(ones, grid, (130, 512)), Int8Operand(sign * ones, grid, (130, 512))
        got = mxtrain.int8_gemm(a, b, out_dtype=torch.float32)
        assert (got == sign * 4 * 2_064_512).all()


def test_error_against_float64(device):
    """T8: relative to float64 of the same codes, 3e-7 sqrt(K / 128)."""
    a, b = operands(256, 256, 2048, device, threshold=60.0)
    got = mxtrain.int8_gemm(a, b, out_dtype=torch.float32).double().cpu()
    want = a.dequantize(torch.float32).double().cpu() @ b.dequantize().double().cpu().T
    assert ((got - want).norm() / want.norm()) <= 3e-7 * (2048 / 128) ** 0.5


def test_no_block_and_every_block(device):
    """T7: no fallback is the plain product bitwise; all of it is the sum of two."""
    x, w = torch.randn(300, 384, device=device), torch.randn(140, 384, device=device)
    b = mxtrain.int8_quantize(w)
    plain = mxtrain.int8_gemm(mxtrain.int8_quantize(x), b, out_dtype=torch.float32)
    a, _ = mxtrain.int8_quantize_fallback(x, 1e30)
    assert_same_bytes(mxtrain.int8_gemm(a, b, out_dtype=torch.float32), plain)
    a, _ = mxtrain.int8_quantize_fallback(x, 1e-30)
    second = Int8Operand(a.residual, a.residual_scale, a.shape)
    want = plain + mxtrain.int8_gemm(second, b, out_dtype=torch.float32)
    got = mxtrain.int8_gemm(a, b, out_dtype=torch.float32)
    assert (got - want).norm() <= 1e-6 * want.norm()


def test_outliers_in_a_product(device):
    """T6, at 1024^3: 3 of 64 blocks hold one 1000; plain errs by a tenth, the fallback by 1%."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(1024, 1024, generator=g), torch.randn(1024, 1024, generator=g)
    for i, j in ((0, 3), (4, 4), (6, 1)):
        x[128 * i + 5, 128 * j + 77] = 1000.0
    x, w = x.to(device), w.to(device)
    exact = x.double() @ w.double().T
    b = mxtrain.int8_quantize(w)

    def off(a):
        d = mxtrain.int8_gemm(a, b, out_dtype=torch.float32).double()
        return float((d - exact).norm() / exact.norm())

    a, counts = mxtrain.int8_quantize_fallback(x, 10.0)
    assert counts.tolist()[0] == 3
    assert 0.08 < off(a.without_fallback()) < 0.13 and off(a) < 0.0125


def test_t6_outliers_in_a_product(device):
    """T6: 13 of 256 blocks hold one 1000. Plain errs by 11.1%, the fallback by 0.46% of an exact W
    and by 1.06% of one in INT8. (The error does not depend on how many rows W has.)
    """
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(2048, 2048, generator=g), torch.randn(256, 2048, generator=g)
    chosen = torch.randperm(256, generator=g)[:13]
    x[chosen // 16 * 128 + 5, chosen % 16 * 128 + 77] = 1000.0
    x, w = x.to(device), w.to(device)
    exact = x.double() @ w.double().T
    b = mxtrain.int8_quantize(w)

    def off(d):
        return float((d.double() - exact).norm() / exact.norm())

    a, counts = mxtrain.int8_quantize_fallback(x, 10.0)
    assert counts.tolist() == [13, 0, 256]
    plain = mxtrain.int8_gemm(a.without_fallback(), b, out_dtype=torch.float32)
    assert off(plain) == pytest.approx(0.111, abs=0.006)
    assert off(a.dequantize().double() @ w.double().T) == pytest.approx(0.0046, abs=0.0005)
    assert off(mxtrain.int8_gemm(a, b, out_dtype=torch.float32)) == pytest.approx(
        0.0106, abs=0.0006
    )


def test_a_nan_scale_reaches_its_block_of_rows_or_columns(device):
    x, w = torch.randn(300, 300), torch.randn(140, 300)
    x[130, 7], w[5, 299] = float("nan"), float("inf")
    a, b = (mxtrain.int8_quantize(t.to(device)) for t in (x, w))
    expected = torch.zeros(300, 140, dtype=torch.bool)
    expected[128:256] = expected[:, :128] = True
    assert torch.equal(mxtrain.int8_gemm(a, b).isnan().cpu(), expected)


def test_empty_and_deterministic(device):
    a, b = operands(300, 640, 256, device)
    none = Int8Operand(a.data[:0], a.scale[:0], (0, 256))
    assert mxtrain.int8_gemm(none, b).shape == (0, 640)
    assert mxtrain.int8_gemm(b, none).shape == (640, 0)
    first = mxtrain.int8_gemm(a, b)
    assert all(torch.equal(first, mxtrain.int8_gemm(a, b)) for _ in range(3))


def test_refusals():
    a, b = operands(130, 200, 256, "cpu")
    with refuses(ValueError, match="a and b must have the same K, got 256 and 200"):
        mxtrain.int8_gemm(a, b.transposed())
    with refuses(ValueError, match="a and b must have at most one residual"):
        mxtrain.int8_gemm(a, a)
    lowest = Int8Operand(torch.full((4, 128), -128, dtype=torch.int8), torch.ones(1, 1), (4, 128))
    with refuses(RuntimeError, match=r"a must hold codes in \[-127, 127\], got -128"):
        mxtrain.int8_gemm(lowest, mxtrain.int8_quantize(torch.ones(4, 128)))
    other = Int8Operand.of((*a.parts[:4], a.mask[:1]), a.shape)
    with refuses(RuntimeError, match=r"mask must be uint8 of shape \[2, 2\], got uint8 \[1, 2\]"):
        mxtrain.int8_gemm(other, b)


@pytest.mark.parametrize("k", [256, 300])
def test_a_residual_of_another_kind_is_refused_by_the_op(k):
    """Whatever the operand's class looked at before."""
    a, b = operands(130, 200, k, "cpu")
    packed = pooled(a)
    wrong = [
        (a, {"residual": a.residual[0]}, "residual must be int8 of shape"),
        (a, {"residual": a.residual[:100]}, "residual must be int8 of shape"),
        (a, {"residual": a.residual.float()}, "residual must be int8 of shape"),
        (packed, {"residual": packed.residual.flatten(1)}, "residual must be int8 of shape"),
        (packed, {"residual": packed.residual[None]}, "residual must be int8 of shape"),
        (packed, {"mask": packed.mask.to(torch.complex64)}, "mask must be int32 of shape"),
        (packed, {"mask": packed.mask.to(torch.uint8)}, "mask must be int32 .* int8_pack_residual"),
        (a, {"mask": a.mask.int()}, "mask must be uint8 .* int8_quantize_fallback"),
        (a, {"mask": a.mask[0]}, "mask must be uint8 of shape"),
        (packed, {"residual": packed.residual.to("meta")}, "residual must be on the device"),
    ]
    for op, change, match in wrong:
        bad = dataclasses.replace(op, **change)
        for pair in ((bad, b), (b, bad)):
            with refuses(RuntimeError, match=match):
                mxtrain.int8_gemm(*pair)


def test_what_no_quantizer_writes_is_refused():
    """On the CPU: -128 and negative scales where they are looked at, codes beyond K."""
    a, b = operands(130, 200, 300, "cpu")
    assert 0 < int(a.mask.sum()) < a.mask.numel()
    want = mxtrain.int8_gemm(a, b)

    def changed(op, **parts):
        return dataclasses.replace(op, **parts)

    fallen = a.mask.repeat_interleave(128, 0)[:130].repeat_interleave(128, 1).bool()
    lowest = torch.where(fallen, a.residual, -128)
    negative = torch.where(a.mask.bool(), a.residual_scale, -1.0)
    assert_same_bytes(mxtrain.int8_gemm(changed(a, residual=lowest), b), want)
    assert_same_bytes(mxtrain.int8_gemm(changed(a, residual_scale=negative), b), want)
    for own, other in ((a, b), (b, a)):
        scale = own.scale.clone()
        scale[1, 2] = -1.0
        one = changed(own, scale=scale)
        data = own.data.clone()
        data[7, 300] = 1
        two = changed(own, data=data)
        for bad, match in (
            (one, "a_scale must be at least 0 or NaN, got -1"),
            (two, "a must hold zeros beyond K = 300, got other codes"),
        ):
            with refuses(RuntimeError, match=match):
                mxtrain.int8_gemm(bad, other)
            with refuses(RuntimeError, match="b" + match.removeprefix("a")):
                mxtrain.int8_gemm(other, bad)
    i, k = a.mask.nonzero()[0].tolist()
    residual, scale = a.residual.clone(), a.residual_scale.clone()
    residual[128 * i, 128 * k], scale[i, k] = -128, -1.0
    whole, _ = mxtrain.int8_quantize_fallback(torch.ones(130, 300), 0.5)
    tail = whole.residual.clone()
    tail[129, 383] = 1
    for left, right in ((a, b), (b, a)):
        for change, match in (
            ({"residual": residual}, r"residual must hold codes in \[-127, 127\], got -128"),
            ({"residual_scale": scale}, "residual_scale must be at least 0 or NaN, got -1"),
        ):
            bad = [changed(t, **change) if t is a else t for t in (left, right)]
            with refuses(RuntimeError, match=match):
                mxtrain.int8_gemm(*bad)
    with refuses(RuntimeError, match="residual must hold zeros beyond K = 300"):
        mxtrain.int8_gemm(changed(whole, residual=tail), b)
    for bad, match in (
        (changed(whole, residual=tail), "residual must hold zeros beyond K = 300"),
        (changed(a, residual=residual), r"residual must hold codes in \[-127, 127\], got -128"),
    ):
        with refuses(RuntimeError, match=match):
            mxtrain.int8_gemm(b, pooled(bad))
