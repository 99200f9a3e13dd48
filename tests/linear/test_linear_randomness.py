"""The random numbers of the linear layer: seeds, draws, signs, checkpoints."""

from __future__ import annotations

import sys

import pytest
import torch
from linear_common import ALL, NAMES, Ops, draws, run, tensors
from torch import nn
from torch.utils.checkpoint import checkpoint

from mxtrain.linear import MXLinear, linear
from mxtrain.recipe import RECIPES, Quantizer, Recipe, fixed_signs

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides(device, name):
    x, w, b, dy = tensors(64, device=device)
    first, again, other = (
        run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy, seed) for seed in (1, 1, 2)
    )
    assert all(torch.equal(a, e) for a, e in zip(first, again, strict=True))
    random = draws(RECIPES[name])
    assert torch.equal(first[2], other[2]) != random
    assert torch.equal(first[0], other[0])  # no recipe of the table rounds the forward randomly


@pytest.mark.parametrize("name", NAMES)
def test_a_new_forward_draws_anew(device, name):
    x, w, b, dy = tensors(64, device=device)
    torch.manual_seed(1)
    grads = []
    for _ in range(2):
        w.grad = None
        linear(x, w, b, name).backward(dy)
        grads.append(w.grad)
    assert torch.equal(*grads) != draws(RECIPES[name])


@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
def test_no_two_operands_share_noise(device, recipe):
    """Every stochastic operand has a (seed, offset, stream) of its own."""
    if not recipe.needs_rng:
        return
    x, w, b, dy = tensors(64, device=device)
    with Ops() as ops:
        linear(x, w, b, recipe).backward(dy)
    noise = []
    for func, args, kwargs in ops.calls:
        a = {s.name: v for s, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        rng = tuple(a["rng"].tolist()) if a.get("rng") is not None else None
        if "quantize_dual" in func._schema.name:
            noise += [(rng, 0)] * (a["row_rounding"] == 1) + [(rng, 1)] * (a["col_rounding"] == 1)
        elif a.get("rounding") == 1:
            noise.append((rng, int(a.get("transpose", "requantize" in func._schema.name))))
    stochastic = [
        q for gemm in ("fprop", "dgrad", "wgrad") for q in recipe.pair(gemm)
        if q.format and q.rounding == "stochastic"
    ]  # fmt: skip
    shared = recipe.dgrad_dy.square and recipe.wgrad_dy.square  # one quantization serves both
    shared = shared and recipe.dgrad_dy.rounding == recipe.wgrad_dy.rounding == "stochastic"
    assert len(noise) == len(set(noise)) == len(stochastic) - shared
    assert all(rng is not None for rng, _ in noise)


def test_drawn_signs_are_one_vector_a_gemm_and_fixed_ones_constant(device):
    x, w, b, dy = tensors(64, device=device)

    def signs(name, seed):
        torch.manual_seed(seed)
        with Ops() as ops:
            linear(x, w, b, name).backward(dy)
        found = []
        for func, args, kwargs in ops.calls:
            a = {s.name: v for s, v in zip(func._schema.arguments, args, strict=False)} | kwargs
            found += [tuple(v.tolist()) for key, v in a.items() if "signs" in key and v is not None]
        return found

    first, other = signs("mxfp4_backward", 1), signs("mxfp4_backward", 2)
    assert len(first) == 4 and len(set(first)) == 2  # X and dY^T, dY and W^T
    assert not set(first) & set(other)
    fixed = tuple(fixed_signs(16).tolist())
    assert signs("nvfp4", 1) == [fixed, fixed]


def test_fixed_signs_first_made_in_inference_mode_serve_training(device):
    cache = sys.modules["mxtrain.draws"]._FIXED_SIGNS
    cache.clear()
    x, w, b, dy = tensors(64, device=device)
    recipe = Recipe("fixed", *[Quantizer("mxfp8_e4m3", hadamard=32, signs="fixed")] * 6)
    with torch.inference_mode():
        linear(x, w, b, recipe)
    linear(x, w, b, recipe).backward(dy)
    assert w.grad is not None and len(cache) == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_training_draws_alike_with_and_without_grad(device, name, training):
    layer = MXLinear(128, 128, device=device, recipe=name).train(training)
    x = tensors(64, device=device)[0].detach()
    after = []
    for grad in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            layer(x)
        after.append(torch.rand(1, device=device))
    assert torch.equal(*after) == (training or not draws(RECIPES[name]))


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_checkpoint_repeats_the_bits(device, name, use_reentrant):
    """Also those of what draws after the layer, in the same segment."""
    torch.manual_seed(0)
    net = nn.Sequential(
        MXLinear(128, 128, recipe=name), nn.Dropout(0.3), MXLinear(128, 128, recipe=name)
    ).to(device)
    x, _, _, dy = tensors(3, 20, device=device)

    def grads(f):
        net.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        y = f(x)
        y.backward(dy)
        return [y.detach(), x.grad, *(p.grad for p in net.parameters())]

    plain = grads(net)
    again = grads(lambda x: checkpoint(net, x, use_reentrant=use_reentrant))
    assert all(torch.equal(a, e) for a, e in zip(again, plain, strict=True))
