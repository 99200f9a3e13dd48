"""The linear layer under torch.compile: the bits of eager, and how often it compiles."""

from __future__ import annotations

import pytest
import torch
from linear_common import run, tensors
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.optim import SGD

from mxtrain.linear import MXLinear

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
