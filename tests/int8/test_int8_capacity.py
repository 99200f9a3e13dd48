"""What backward keeps of the blocks that fell back, and of a whole block of a model (T18)."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from common import refuses

import mxtrain
from mxtrain.packed import PARTS, compacted, parts_of, restored
from mxtrain.recipe import RECIPES, Fallback

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback", "int8_gemm")
BF16 = torch.bfloat16
RECIPE = RECIPES["int8_fallback"]


def with_capacity(share):
    square = mxtrain.Quantizer("int8_block")  # nearest: every call computes the same
    return RECIPE.replace(
        fallback=Fallback(capacity=share), dgrad_dy=square, wgrad_dy=square, name=f"{share}"
    )


def saved_bytes(f, left_out=()):
    """Bytes that autograd keeps while f runs, each storage once, and the tensors."""
    skip = {t.untyped_storage().data_ptr() for t in left_out}
    kept = {}

    def pack(t):
        place = t.untyped_storage().data_ptr()
        if place not in skip:
            kept[place] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        f()
    return sum(t.untyped_storage().nbytes() for t in kept.values()), list(kept.values())


def gradients(x, w, dy, recipe, threshold):
    x, w = (t.detach().clone().requires_grad_() for t in (x, w))
    mxtrain.linear(x, w, None, recipe, threshold=threshold).backward(dy)
    return x.grad, w.grad


@pytest.mark.parametrize("rows, k", [(512, 640), (300, 200), (130, 129)])
def test_what_fits_is_kept_exactly(rows, k, device):
    """Rates of 0, some, and all; ragged both ways; both forms."""
    x = torch.randn(rows, k, device=device)
    x[:, ::150] *= 50
    for threshold in (1e9, 20.0, 1e-9):
        for op in mxtrain.int8_quantize_fallback(x, threshold, layout="both")[0]:
            share = max(float(op.mask.float().mean()), 1e-3)
            got = restored(parts_of(compacted(op, share)), RECIPE.wgrad_x, op.shape)
            assert torch.equal(got.mask != 0, op.mask != 0)
            assert torch.equal(got.dequantize(), op.dequantize())
            turned, want = got.transposed(), op.transposed()
            assert torch.equal(turned.mask, want.mask)
            assert torch.equal(turned.dequantize(), want.dequantize())


def test_what_does_not_fit_is_plain_int8(device):
    """The largest blocks are kept, those of one size in the order of the grid."""
    x = torch.randn(512, 640, device=device).clamp(-4, 4)
    peaks = torch.full((4, 5), 8.0)
    peaks[3, 4], peaks[1, 0], peaks[2, 2] = 9.0, 30.0, 9.0
    x[5::128, 7::128] = peaks.to(device)
    op = mxtrain.int8_quantize_fallback(x, 1e-9)[0]
    for count, more in ((2, []), (5, [(0, 0), (0, 1)])):
        kept = [(1, 0), (2, 2), *([(3, 4)] if count > 2 else []), *more]
        got = restored(parts_of(compacted(op, count / 20)), RECIPE.wgrad_x, op.shape)
        assert got.mask.nonzero().tolist() == sorted(map(list, kept))
        plain, want = op.without_fallback().dequantize(), op.dequantize()
        for i in range(4):
            for j in range(5):
                tile = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                expected = want if (i, j) in kept else plain
                assert torch.equal(got.dequantize()[tile], expected[tile]), (count, i, j)
    assert len(parts_of(compacted(op, 0.25))) == PARTS
    assert compacted(op, None) is op
    assert compacted(op.without_fallback(), 0.25).residual is None


def test_a_block_that_is_not_finite_is_not_kept(device):
    """It did not fall back, and its scale is NaN."""
    x = torch.randn(256, 256, device=device)
    x[0, 0] = float("nan")
    op = mxtrain.int8_quantize_fallback(x, 1e-9)[0]
    got = restored(parts_of(compacted(op, 0.5)), RECIPE.wgrad_x, op.shape)
    assert got.mask.count_nonzero() == 2 and got.mask[0, 0] == 0 and got.scale[0, 0].isnan()
    assert got.dequantize()[128:, 128:].isfinite().all()


def test_gradients_are_those_of_all_blocks(device):
    """Bitwise where the fallen blocks fit; else dW loses their bulk, and dX nothing."""
    x, w = torch.randn(512, 512, device=device), torch.randn(256, 512, device=device)
    dy = torch.randn(512, 256, device=device)
    x[::260, ::280] = 1000.0
    threshold = torch.full((1,), 10.0, device=device)
    want = gradients(x, w, dy, with_capacity(None), threshold)
    rate = int(mxtrain.int8_quantize_fallback(x, 10.0)[1][0]) / 16
    got = gradients(x, w, dy, with_capacity(rate), threshold)
    assert 0.2 < rate < 1 and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    dx, dw = gradients(x, w, dy, with_capacity(rate / 2), threshold)
    assert torch.equal(dx, want[0]) and not torch.equal(dw, want[1])


def test_under_compile_with_a_capacity(device):
    layer = mxtrain.MXLinear(256, 128, device=device, recipe=with_capacity(0.3))
    x = torch.randn(256, 256, device=device)
    layer(x).sum().backward()  # sets the threshold
    want = layer.weight.grad.clone()
    layer.weight.grad = None
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    assert torch.equal(layer.weight.grad, want)


@pytest.mark.parametrize("dynamic", [None, True])
def test_layers_of_several_capacities_and_sizes_compile(dynamic, device):
    """torch.compile makes symbols of what differs from one compilation to the next."""
    torch.compiler.reset()
    for share in (0.3, 0.5):
        layer = mxtrain.MXLinear(256, 128, device=device, recipe=with_capacity(share))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for tokens in (384, 512, 300):
            x, grads = torch.randn(tokens, 256, device=device), []
            for f in (layer, compiled):
                layer.weight.grad = None
                f(x).sum().backward()
                grads.append(layer.weight.grad)
            assert torch.equal(*grads)


@pytest.mark.parametrize("share", [None, 0.1, 0.3])
def test_t18_bytes_of_a_linear_layer(share, device):
    """T18: 1 + r + .01 bytes an element, or 2.01 where all is kept; nothing of 16 bits."""
    x = torch.randn(1280, 1280, device=device, dtype=BF16)
    layer = mxtrain.MXLinear(1280, 128, False, device, BF16, recipe=with_capacity(share))
    layer(x)
    _, kept = saved_bytes(lambda: layer(x), [layer.weight])
    weight = [t for t in kept if t.shape[:1] == (128,) or t.numel() <= 10]
    count = sum(t.nbytes for t in kept) - sum(t.nbytes for t in weight)
    assert count / x.numel() <= (2.01 if share is None else 1 + share + 0.01)
    assert not any(t.dtype == BF16 for t in kept)


def test_the_default_lies_above_the_band():
    """By what the rate gains in a step of 5% growth, and no less where the band is another."""
    assert Fallback().capacity == "band" and Fallback().kept_share == pytest.approx(0.4)
    assert Fallback(high=0.95).kept_share == 1.0
    narrow = NormalDist(sigma=0.2)  # of the logarithms of the blocks' maxima
    for high in (0.01, 0.1, 0.3, 0.5, 0.8):
        rate = 1 - narrow.cdf(narrow.inv_cdf(1 - high) - math.log(1.05))
        assert high < rate < Fallback(low=0, high=high).kept_share
    assert hash(Fallback()) != hash(Fallback(capacity=0.4))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.4, 0.7])
def test_the_share_is_that_of_the_blocks(share, device):
    op = mxtrain.int8_quantize_fallback(torch.randn(640, 1280, device=device), 1e-9)[0]
    assert len(compacted(op, share).residual) == math.ceil(share * 50)


def test_packed_and_unpacked(device):
    """Of what falls back at most so many blocks stay; nothing to pack is no error."""
    op = mxtrain.int8_quantize_fallback(torch.randn(300, 520, device=device), 1e-9)[0]
    plain, packed = op.without_fallback(), op.packed(4)
    assert plain.packed(4) is plain and plain.unpacked() is plain and not plain.is_packed
    assert packed.is_packed and packed.packed(4) is packed and not op.is_packed
    two, want = packed.packed(2), op.packed(2)
    assert torch.equal(two.mask, want.mask) and torch.equal(two.residual, want.residual)
    assert packed.residual.shape == (4, 128, 128) and sorted(packed.mask[packed.mask > 0]) == [
        1, 2, 3, 4,
    ]  # fmt: skip
    back = packed.unpacked()
    assert back.mask.dtype == torch.uint8 and back.residual.shape == op.residual.shape
    assert torch.equal(back.mask != 0, packed.mask != 0)
    assert torch.equal(back.dequantize(), packed.dequantize())
    assert packed.nbytes < op.nbytes and "with residual" in repr(packed)
    for bad, error, match in (
        (2.0, TypeError, "count must be an int"),
        (-1, ValueError, r"count must lie in \[0, 2\^63\), got -1"),
        (16, RuntimeError, r"count must lie in \[0, 15\], got 16"),
    ):
        with refuses(error, match=match):
            op.packed(bad)
        if error is not RuntimeError:  # there is nothing to pack
            with refuses(error, match=match):
                plain.packed(bad)


def test_slots_beyond_the_pool_are_zeros_once_unpacked(device, looks_at_values):
    """As for int8_gemm, on CUDA; the CPU refuses them."""
    op = mxtrain.int8_quantize_fallback(torch.randn(300, 520, device=device), 1e-9)[0].packed(15)
    op.mask[1, 2] = 77
    if looks_at_values:
        with refuses(RuntimeError, match=r"slots must lie in \[0, 15\], got 77 \(block 1, 2"):
            op.unpacked()
        return
    back = op.unpacked()
    assert back.mask[1, 2] == 0 and back.mask.sum() == 14
    plain = op.without_fallback().dequantize()
    for values in (back.dequantize(), op.dequantize(), op.transposed().dequantize().t()):
        assert torch.equal(values[128:256, 256:384], plain[128:256, 256:384])


def test_parts_of_a_residual_belong_together():
    op = mxtrain.int8_quantize_fallback(torch.randn(130, 200), 1e-9)[0]
    for left_out in (2, 3, 4):
        parts = [None if i == left_out else t for i, t in enumerate(op.parts)]
        with refuses(ValueError, match="residual, residual_scale and mask must be given together"):
            mxtrain.Int8Operand.of(tuple(parts), op.shape)


def test_refusals():
    for bad in (0, 1.5, float("nan"), "all"):
        with refuses(ValueError, match="capacity must be None or a share"):
            Fallback(capacity=bad)
