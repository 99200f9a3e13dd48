"""The linear layer under torch.compile: the bits of eager, and how often it compiles."""

from __future__ import annotations

import pytest
import torch
from linear_common import draws, relative, run, tensors
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

from mxtrain.linear import MXLinear
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


@pytest.mark.parametrize("name", ["mxfp4_baseline", "tetrajet", "mxfp4_backward", "nvfp4"])
def test_compiled_equals_eager(device, name):
    """fullgraph, forward and backward, bitwise. That of db needs the op column_sum."""
    torch._dynamo.reset()
    x, _, _, dy = tensors(3, 20, device=device)
    layer = MXLinear(128, 128, device=device, recipe=name)
    compiled = torch.compile(layer, fullgraph=True)
    eager = run(lambda x, w, b: layer(x), x, layer.weight, layer.bias, dy)
    with torch._inductor.config.patch(fallback_random=True):
        got = run(lambda x, w, b: compiled(x), x, layer.weight, layer.bias, dy)
    assert all(torch.equal(a, e) for a, e in zip(got, eager, strict=True))


@pytest.mark.parametrize("name", [n for n in RECIPES if draws(RECIPES[n])])
def test_compiled_under_autocast_equals_eager(device, name):
    """There the partition is another, and backward must still see the signs of forward. What the
    recipe leaves to torch may be another kernel on a GPU: within two roundings to bfloat16."""
    torch._dynamo.reset()
    x, _, _, dy = tensors(128, device=device)
    layer = MXLinear(128, 128, device=device, recipe=name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def amp(f):
        with torch.autocast(device, dtype=torch.bfloat16):
            return f(x)

    if RECIPES[name].fprop_x.fallback:
        layer(x)  # the first call finds the threshold
    results = [run(lambda *_, f=f: amp(f), x, layer.weight, layer.bias, dy.bfloat16())
               for f in (layer, compiled)]  # fmt: skip
    (y, *gradients), (compiled_y, *compiled_gradients) = results
    if device == "cuda" and RECIPES[name].fprop_x.format is None:
        torch.testing.assert_close(compiled_y, y, rtol=2.0**-7, atol=2.0**-7 * float(y.abs().max()))
    else:
        assert torch.equal(compiled_y, y)
    names = ("x", "weight", "bias")
    pairs = zip(names, compiled_gradients, gradients, strict=True)
    assert [n for n, a, b in pairs if not torch.equal(a, b)] == []


@pytest.mark.parametrize("name", [n for n in RECIPES if RECIPES[n].fprop_x.format is None])
def test_compiled_in_two_dimensions_with_an_unquantized_forward(device, name):
    """The compiler of torch 2.11 gave backward zeros for dY there."""
    torch._dynamo.reset()
    x, _, _, dy = tensors(128, device=device)
    layer = MXLinear(128, 128, device=device, recipe=name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    eager = run(lambda x, w, b: layer(x), x, layer.weight, layer.bias, dy)
    got = run(lambda x, w, b: compiled(x), x, layer.weight, layer.bias, dy)
    for a, b in zip(got, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2.0**-20, atol=2.0**-20 * float(b.abs().max()))


def test_a_compiled_layer_draws_anew_and_the_seed_decides(device):
    """With Inductor's own random numbers, drawn in the graph."""
    torch._dynamo.reset()
    x, _, _, dy = tensors(3, 20, device=device)
    layer = MXLinear(128, 128, device=device, recipe="tetrajet")
    compiled = torch.compile(layer, fullgraph=True)
    grads = [run(lambda x, w, b: compiled(x), x, layer.weight, layer.bias, dy, seed)
             for seed in (1, 2, 3, 1)]  # fmt: skip
    assert all(torch.equal(got[0], grads[0][0]) for got in grads)  # the forward draws nothing
    for i in (1, 2):  # dX and dW
        assert all(torch.equal(got[i], grads[0][i]) == (got is grads[3]) for got in grads[1:])
    torch.manual_seed(1)
    weights = []
    for _ in range(2):
        layer.zero_grad()
        compiled(x).backward(dy)
        weights.append(layer.weight.grad)
    assert torch.equal(weights[0], grads[0][2]) and not torch.equal(*weights)


@pytest.mark.parametrize("name", ["mxfp4_baseline", "mxfp4_backward", "int8_fallback"])
def test_several_layers_with_dynamic_sizes(name, device):
    """dynamic=True makes symbols of what a recipe holds, and one symbol in two layers fails."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(*(MXLinear(64, 64, device=device, recipe=name) for _ in range(3)))
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    drawn = RECIPES[name].needs_rng
    for n in (40, 130):
        x, results = torch.randn(n, 64, device=device), []
        for f in (net, compiled):
            net.zero_grad()
            y = f(x)
            y.square().sum().backward()
            results.append([y.detach(), *(() if drawn else (p.grad for p in net.parameters()))])
            assert all(p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", ["mxfp4_baseline", "tetrajet"])
def test_compiled_micro_steps_under_autocast_and_checkpoint(device, name):
    """Gradients accumulate over three, as in eager: bitwise where the recipe draws nothing."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = nn.Sequential(MXLinear(128, 96, recipe=name), nn.ReLU(), MXLinear(96, 128, recipe=name))
    net.to(device)

    def forward(x):
        with torch.autocast(device, dtype=torch.bfloat16):
            return checkpoint(net, x, use_reentrant=False)

    def gradients(f):
        net.zero_grad()
        x, _, _, dy = tensors(3, 20, device=device)
        for i in range(3):
            f(x[i]).backward(dy[i].bfloat16())
        return [x.grad, *(p.grad for p in net.parameters())]

    eager, compiled = gradients(forward), gradients(torch.compile(forward, fullgraph=True))
    for got, expected in zip(compiled, eager, strict=True):
        assert got.isfinite().all() and relative(got, expected) < 0.5
        assert torch.equal(got, expected) or name == "tetrajet"


def test_blocks_that_are_alike_share_one_graph(device):
    """Compiled each by itself: what a layer holds of its own is not in the guards."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = nn.Sequential(*(nn.Sequential(MXLinear(64, 64), nn.ReLU()) for _ in range(12)))
    net.to(device)
    for block in net:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    optimizer = SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        net(torch.randn(8, 64, device=device, requires_grad=True)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1


def test_compiled_with_dynamic_tokens_and_autocast(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for tokens in (20, 33, 64):
        x, _, _, dy = tensors(2, tokens, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            got = run(lambda x, w, b: compiled(x), x, layer.weight, layer.bias, dy.bfloat16())
            eager = run(lambda x, w, b: layer(x), x, layer.weight, layer.bias, dy.bfloat16())
        assert got[0].dtype == torch.bfloat16
        assert all(torch.equal(a, e) for a, e in zip(got, eager, strict=True))
    assert counter.frame_count == 2  # the first size, then any size


def test_q_ema_recompiles_once(device):
    torch._dynamo.reset()
    counter = CompileCounter()
    layer = MXLinear(64, 64, device=device, recipe="tetrajet_ema")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    optimizer = SGD(layer.parameters(), lr=0.1)
    x = torch.randn(8, 64, device=device)
    for _ in range(15):
        compiled(x).sum().backward()
        optimizer.step()
    assert layer.ema_active and counter.frame_count == 2
    layer.recipe = "mxfp8"
    compiled(x)
    assert counter.frame_count == 3


def test_a_compiled_optimizer_step_updates_the_average(device):
    """Outside of the graph: the counts do not make it compile again."""
    torch._dynamo.reset()
    layer = MXLinear(64, 64, device=device, recipe="tetrajet_ema")
    optimizer = SGD(layer.parameters(), lr=0.1)
    counter = CompileCounter()
    compiled = torch.compile(optimizer.step, backend=counter)
    frames = []
    for i in range(5):
        for p in layer.parameters():
            p.grad = torch.ones_like(p)
        compiled()
        assert layer._ema_updates == i + 1
        frames.append(counter.frame_count)
    assert frames[-1] == frames[1]
