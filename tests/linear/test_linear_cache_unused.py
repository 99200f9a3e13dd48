"""Where MXLinear does not keep its packed weight: traces, captures, shards, shared memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cache_common import backward, equal, in_place, inputs
from linear_common import ops_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mxtrain.linear import MXLinear, linear

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


def untouched(layer):
    return layer._cache._fprop is None and layer._cache._dgrad is None


def test_what_evaluation_kept_serves_training(device):
    """What was packed in inference mode may be saved for backward."""
    layer = MXLinear(128, 128, device=device, recipe="tetrajet")
    with torch.inference_mode():
        layer(inputs(device))
    x = inputs(device).requires_grad_()
    assert ops_of(lambda: layer(x).sum().backward()).count("quantize") == 1


def test_not_under_compile(device):
    torch._dynamo.reset()
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = inputs(device)
    for _ in range(2):
        backward(compiled, x)
    assert untouched(layer)
    layer.zero_grad()
    expected = backward(layer, x)
    in_place(layer)
    layer.weight.data.div_(1.5)  # what is kept is now stale, and a trace does not read it
    layer.zero_grad()
    assert equal(backward(compiled, x)[:1], expected[:1])


def test_not_for_tensors_that_are_no_parameters(device):
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    x = inputs(device)
    state = {name: 1.5 * p.detach() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, state, x)
    assert untouched(layer) and torch.equal(y, linear(x, state["weight"], state["bias"], "mxfp8"))
    with torch.inference_mode():
        other = MXLinear(128, 128, device=device, recipe="mxfp8")
        other(x)
    assert untouched(other)


def test_not_in_memory_that_processes_share():
    layer = MXLinear(128, 128, recipe="mxfp8").share_memory()
    backward(layer, inputs("cpu"))
    assert untouched(layer)


def test_not_under_fsdp2():
    """It gathers the shards into one Parameter, the same each time, whose version it keeps."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs gloo")
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        net = nn.Sequential(MXLinear(128, 128, recipe="mxfp8"))
        mesh = dist.init_device_mesh("cpu", (1,))
        fsdp.fully_shard(net, mesh=mesh, reshard_after_forward=True)
        x = inputs("cpu")
        before = net(x)
        with torch.no_grad():
            net[0].weight.mul_(1.5)
        weight, bias = (p.full_tensor() for p in net.parameters())
        assert torch.equal(net(x), linear(x, weight, bias, "mxfp8"))
        assert untouched(net[0]) and not torch.equal(net(x), before)
    finally:
        dist.destroy_process_group()


def test_not_with_fake_tensors():
    with FakeTensorMode():
        layer = MXLinear(128, 128, recipe="mxfp8")
        assert layer(torch.randn(4, 128)).shape == (4, 128)
    assert untouched(layer)


def test_not_while_a_cuda_graph_is_captured(device):
    if device != "cuda":
        pytest.skip("needs CUDA graphs")
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    x = inputs(device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.weight.data.mul_(1.5)
        graph.replay()
        assert torch.equal(y, linear(x, layer.weight, layer.bias, "mxfp8"))
        layer(x)
        assert untouched(layer)  # a replay might change the weight


def test_switched_off(device, monkeypatch):
    layer = MXLinear(128, 128, device=device, recipe="mxfp8")
    backward(layer, inputs(device))
    monkeypatch.setattr(MXLinear, "keep_packed", False)
    backward(layer, inputs(device))
    assert untouched(layer)
