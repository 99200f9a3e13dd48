"""`MXLinear.keep_input`: x itself is saved, and quantized for wgrad in backward. The same bytes."""

from __future__ import annotations

import copy

import pytest
import torch
from linear_common import ALL, ops_of
from torch import nn
from torch.utils.checkpoint import checkpoint

import mxtrain
from mxtrain.fallback import update_fallback_thresholds
from mxtrain.linear import MXLinear
from mxtrain.recipe import RECIPES, Fallback

pytestmark = pytest.mark.ops(
    "quantize", "quantize_dual", "requantize", "gemm", "int8_quantize", "int8_quantize_fallback",
    "int8_gemm",
)  # fmt: skip
recipes = pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
FALLBACK = RECIPES["int8_fallback"]
SQUARE = mxtrain.Quantizer("int8_block")


def layer_and_input(recipe, device, keep=True, n=200, k=256):
    torch.manual_seed(0)
    layer = MXLinear(k, 128, device=device, recipe=recipe)
    layer.keep_input = keep
    x = torch.randn(2, n // 2, k, generator=torch.Generator().manual_seed(1))
    x[0, ::50, ::100] *= 20
    return layer, x.to(device)


def step(layer, x, through=None):
    """Y, dX, dW, db of a step, and what falls back."""
    x = x.detach().requires_grad_()
    torch.manual_seed(2)
    y = layer(x) if through is None else through(layer, x)
    y.square().sum().backward()
    out = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *layer.buffers()]
    layer.zero_grad()
    return [t.clone() for t in out]


def saved_by(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.detach().requires_grad_())
    return saved


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


@recipes
def test_the_same_bytes(device, recipe):
    results = []
    for keep in (False, True):
        layer, x = layer_and_input(recipe, device, keep)
        results.append([step(layer, x) for _ in range(2)])
    assert all(map(same, *results))


@recipes
def test_what_is_saved(device, recipe):
    """x by reference and nothing packed of it; where X^T is made of the packed X, that."""
    layer, x = layer_and_input(recipe, device, n=1024, k=128)  # x has 8 times weight's elements
    q = recipe.wgrad_x
    for keep in (False, True):
        layer.keep_input = keep
        layer(x)
        saved = saved_by(layer, x)
        itself = q.format is None or (keep and (q.source == "original" or q.square))
        assert sum(t.data_ptr() == x.data_ptr() for t in saved) == itself
        known = (x.data_ptr(), layer.weight.data_ptr())
        packed = sum(t.nbytes for t in saved if t.data_ptr() not in known)
        assert (packed < x.numel() / 4) == itself  # W's codes at most


def test_ops_of_a_step(device):
    """One quantization more, and no residual is packed."""
    layer, x = layer_and_input(FALLBACK, device)
    layer.eval()
    layer(x)
    x.requires_grad_()
    ops = ops_of(lambda: layer(x).sum().backward())
    assert ops.count("int8_quantize_fallback") == 2 and ops.count("int8_gemm") == 3
    assert not any("residual" in op for op in ops)


def test_a_frozen_weight_keeps_nothing(device):
    layer, x = layer_and_input(FALLBACK, device)
    layer.weight.requires_grad_(False)
    assert not any(t.data_ptr() == x.data_ptr() for t in saved_by(layer, x))


def test_all_residuals_are_there(device):
    """Whatever the capacity: nothing is packed."""
    results = []
    for share, keep in ((None, False), (0.1, True), (0.1, False)):
        fallback = Fallback(low=0.4, high=0.9, capacity=share)
        recipe = FALLBACK.replace(fallback=fallback, dgrad_dy=SQUARE, wgrad_dy=SQUARE)
        layer, x = layer_and_input(recipe, device, keep, n=512, k=512)
        results.append(step(layer, x)[:4])
    assert same(*results[:2]) and not torch.equal(results[0][2], results[2][2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_a_checkpoint(device, reentrant):
    def through(layer, x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    results = []
    for keep in (False, True):
        layer, x = layer_and_input(FALLBACK, device, keep)
        results.append([step(layer, x, through) for _ in range(2)])
    assert all(map(same, *results))


def test_under_compile(device):
    recipe = FALLBACK.replace(dgrad_dy=SQUARE, wgrad_dy=SQUARE)
    layer, x = layer_and_input(recipe, device)
    step(layer, x)  # sets the threshold
    want = step(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = step(layer, x, lambda _, x: compiled(x))
    assert same(got[:4], want[:4])


def changed_input(layer, x):
    x.mul_(2)


def changed_threshold(layer, x):
    update_fallback_thresholds([layer])


@pytest.mark.parametrize("change", [changed_input, changed_threshold])
def test_a_change_before_backward_is_an_error(device, change):
    """Else wgrad would multiply something else than the forward did."""
    layer, x = layer_and_input(FALLBACK, device)
    step(layer, x)
    loss = layer(x).sum()
    with torch.no_grad():
        change(layer, x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_off_by_default_and_copied():
    layer = MXLinear.from_linear(nn.Linear(32, 32), "int8_block")
    assert not layer.keep_input
    layer.keep_input = True
    layer.recipe = "int8_fallback"
    assert layer.keep_input and copy.deepcopy(layer).keep_input
