"""The linear layer on CUDA: the operands of the CPU, and layers and steps in CUDA graphs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import FORMATS, assert_same_bytes, cuda_has
from linear_common import ALL, Ops, relative, run, tensors
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import AdamW

import mxtrain
from mxtrain import draws, reference, weight_cache
from mxtrain.env import gemm_backend_here
from mxtrain.linear import MXLinear, linear
from mxtrain.recipe import RECIPES, Recipe

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and cuda_has("gemm")),
    reason="no GPU that this build has code for",
)


# ---- the same as on the CPU ----

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def check_product(call: tuple, result: torch.Tensor) -> None:
    """What an op gemm returned against float64, within the bound of docs/numerics.md."""
    func, args, kwargs = call
    named = {s.name: v for s, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    given = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in named.items()}
    names = [side + part for side in "ab" for part in ("", "_scale", "_tensor_scale")]
    parts = [None if given[k] is None or given[k].numel() == 0 else given[k] for k in names]
    format, alpha = FORMATS[given["format"]], given["alpha"]
    exact = reference.gemm_float64(*parts, format, given["bias"], alpha)
    size = abs(alpha) * reference.gemm_magnitude(*parts, format)
    folds = result.is_cuda and gemm_backend_here(format) == "fold"
    c = 2.0**-9 if folds else 2.0**-24 * 2 * parts[0].shape[1]  # K, or 2 K of 8-bit codes
    bound = c * size + (UNIT[result.dtype] + 2.0**-22) * (size + exact.abs())
    assert ((result.cpu().double() - exact).abs() <= bound).all()


def written(name: str, result: torch.Tensor | tuple) -> list[torch.Tensor]:
    """What an op returned, with zeros in the blocks of a residual that it does not write."""
    parts = [result] if isinstance(result, torch.Tensor) else list(result)
    if name == "int8_pack_residual":
        parts[0] = parts[0][: int(parts[1].max())]
    if name == "int8_quantize_fallback":
        mask = parts[6]
        for i, grid in ((3, mask), (4, mask.t())):
            if parts[i].numel():
                rows = grid.repeat_interleave(128, 0)[: len(parts[i])]
                parts[i] = torch.where(rows.repeat_interleave(128, 1).bool(), parts[i], 0)
    return parts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recipe", ALL, ids=lambda r: r.name)
def test_operands_are_those_of_the_cpu(recipe, dtype, monkeypatch):
    """Byte for byte, forward and backward, from the same draws; products within their bound."""
    rng, signs = mxtrain.draw_rng(3), mxtrain.draw_signs(256, 3)
    monkeypatch.setattr(draws, "draw_rng", lambda n, device: rng[:n].to(device))
    monkeypatch.setattr(
        draws, "draw_signs", lambda g, n, device: signs[:n, :g].contiguous().to(device)
    )
    ops, results = [], []
    for device in ("cpu", "cuda"):
        x, w, b, dy = tensors(3, 35, k=256, device=device, dtype=dtype)
        ema = w.detach().float().mul(1.1) if recipe.ema_beta else None
        with Ops() as seen:
            out = run(lambda x, w, b, e=ema: linear(x, w, b, recipe, e), x, w, b, dy)
        ops.append(seen)
        results.append([t.cpu() for t in out])
    on_cpu, on_cuda = ops
    assert on_cuda.names == on_cpu.names
    for name, ours, theirs, call, twin in zip(
        on_cpu.names, on_cuda.results, on_cpu.results, on_cuda.calls, on_cpu.calls, strict=True
    ):
        if name == "gemm":
            check_product(call, ours)
            check_product(twin, theirs)
            continue
        both = written(name, ours), written(name, theirs)
        for got, expected in zip(*both, strict=True):
            assert_same_bytes(got.cpu(), expected, name)
    for got, expected in zip(*reversed(results), strict=True):
        assert relative(got, expected) < (1e-3 if dtype == torch.float32 else 1e-2)


# ---- CUDA graphs ----


@pytest.mark.parametrize("name", ["tetrajet", "mxfp4_backward"])
def test_a_graphed_layer_draws_anew_and_is_unbiased(name):
    """make_graphed_callables: the mean of 64 replays is nearer to the gradient's mean than one."""
    layer = MXLinear(128, 256, device="cuda", recipe=name)
    x, dy = torch.randn(96, 128, device="cuda"), torch.randn(96, 256, device="cuda")
    kept = x
    if layer.recipe.wgrad_x.source == "forward":
        kept = mxtrain.quantize(x, "mxfp4", scale_rule=layer.recipe.fprop_x.scale_rule).dequantize()
    expected = dy.T @ kept
    graphed = torch.cuda.make_graphed_callables(layer, (x.clone().requires_grad_(),))
    outputs, grads = [], []
    for _ in range(64):
        layer.zero_grad()
        y = graphed(x.clone().requires_grad_())
        y.backward(dy)
        outputs.append(y.detach().clone())
        grads.append(layer.weight.grad.clone())
    assert all(torch.equal(y, outputs[0]) for y in outputs)
    assert not any(torch.equal(g, grads[0]) for g in grads[1:])
    mean = torch.stack(grads).mean(0)
    assert relative(mean, expected) < relative(grads[0], expected) / 4
    assert torch.equal(layer.bias.grad, torch.ops.mxtrain.column_sum(dy))
    with torch.no_grad():
        layer.weight.mul_(1.5)  # the graph reads it, and quantizes it again
    fresh = linear(x, layer.weight, layer.bias, name)
    assert relative(graphed(x.clone().requires_grad_()), fresh) < 1e-5 < relative(outputs[0], fresh)


EMA = RECIPES["tetrajet_ema"].replace(ema_warmup=2)


def network(recipe: str | Recipe) -> tuple[nn.Sequential, AdamW]:
    torch.manual_seed(0)
    net = nn.Sequential(
        MXLinear(128, 256, recipe=recipe), nn.ReLU(), MXLinear(256, 64, recipe=recipe)
    ).cuda()
    return net, AdamW(net.parameters(), lr=3e-3, capturable=True)


def step(net: nn.Module, optimizer: AdamW, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.mse_loss(net(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def captured(net, optimizer, x, target) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A step as a graph, after three on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(net, optimizer, x, target)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(net, optimizer, x, target)
    return graph, loss


@pytest.mark.parametrize("name", ["mxfp4_baseline", "mxfp8"])
def test_a_captured_step_is_bitwise_that_of_eager(name, monkeypatch):
    """These recipes draw nothing. Forward, backward and optimizer in one graph."""
    monkeypatch.setattr(weight_cache._Steps, "captured", False)  # and back, for the other tests
    x, target = torch.randn(96, 128, device="cuda"), torch.randn(96, 64, device="cuda")
    (eager, optimizer), (net, other) = network(name), network(name)
    graph, loss = captured(net, other, x, target)
    for _ in range(5):
        graph.replay()
    losses = [step(eager, optimizer, x, target) for _ in range(8)]
    assert torch.equal(loss, losses[-1]) and losses[-1] < losses[0]
    assert all(map(torch.equal, net.parameters(), eager.parameters()))


@pytest.mark.parametrize("recipe", [RECIPES["tetrajet"], EMA], ids=lambda r: r.name)
def test_replays_of_a_step_train_and_leave_no_stale_weight(recipe, monkeypatch):
    monkeypatch.setattr(weight_cache._Steps, "captured", False)
    x, target = torch.randn(96, 128, device="cuda"), torch.randn(96, 64, device="cuda")
    net, optimizer = network(recipe)
    first = step(net, optimizer, x, target)
    net(x)  # the packed weight is kept
    graph, loss = captured(net, optimizer, x, target)
    for _ in range(2):
        for _ in range(30):
            graph.replay()
        for m in (net[0], net[2]):
            h = torch.randn(8, m.in_features, device="cuda")
            ema = m.weight_ema if m.ema_active else None
            assert torch.equal(m(h), linear(h, m.weight, m.bias, recipe, ema))
    assert loss < 0.7 * first


@pytest.mark.parametrize("name", ["mxfp4_baseline", "tetrajet"])
def test_compiled_into_cuda_graphs(name):
    """mode="reduce-overhead", forward and backward."""
    torch._dynamo.reset()
    counters.clear()
    layer = MXLinear(128, 256, device="cuda", recipe=name)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    x, dy = torch.randn(96, 128, device="cuda"), torch.randn(96, 256, device="cuda")

    def gradients(f):
        torch.compiler.cudagraph_mark_step_begin()
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(dy)
        return [t.detach().clone() for t in (y, leaf.grad, layer.weight.grad, layer.bias.grad)]

    runs = [gradients(compiled) for _ in range(6)]
    assert counters["inductor"]["cudagraph_skips"] == 0
    eager = gradients(layer)
    for got in runs:
        assert torch.equal(got[0], eager[0]) and torch.equal(got[3], eager[3])
    if layer.recipe.needs_rng:
        assert not torch.equal(runs[-1][2], runs[-2][2])
        mean = torch.stack([got[2] for got in runs]).mean(0)
        bf16 = dy.T @ x
        assert relative(mean, bf16) < relative(runs[-1][2], bf16) < 0.4
    else:
        assert all(map(torch.equal, runs[-1], eager))
    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert torch.equal(gradients(compiled)[0], linear(x, layer.weight, layer.bias, name))
