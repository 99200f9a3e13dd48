"""MXLinear as a module, and the errors of the function and of the module."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from common import refuses
from linear_common import NAMES, run, tensors
from torch import nn
from torch.optim import AdamW

from mxtrain.linear import MXLinear, linear
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


# ---- errors ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("name", ["bf16", "tetrajet"])
def test_other_dtypes_are_type_errors(name, dtype):
    x, w, b, _ = tensors(4)
    what = r"must be bfloat16, float16 or float32, got torch\.\w+ \(shape \[\d+, 128\]\). Cast it"
    with refuses(TypeError, match="mxtrain::linear: x " + what):
        linear(x.detach().to(dtype), w, b, name)
    with refuses(TypeError, match="mxtrain::linear: weight " + what):
        linear(x, w.detach().to(dtype), b, name)
    with refuses(TypeError, match="mxtrain::linear: bias must be bfloat16, float16 or float32"):
        linear(x, w, b.detach().to(dtype), name)


def test_shape_errors():
    x, w, b, _ = tensors(4)
    message = r"x must have in_features = 128 as its last size, got \[4, 64\] \(weight \[128, 128\]"
    with refuses(ValueError, match=message):
        linear(x[:, :64], w, b)
    with refuses(RuntimeError, match="weight must be on the device of x, got cpu .x is on meta"):
        linear(torch.empty(4, 128, device="meta"), w, b)
    with refuses(ValueError, match=r"x must have in_features = 128 .* got \[\]"):
        linear(torch.tensor(1.0), w, b)
    with refuses(ValueError, match=r"weight must be \[out_features, in_features\], got \[128\]"):
        linear(x, w[0], b)
    with refuses(ValueError, match=r"bias must have out_features = 128 elements, got \[3\]"):
        linear(x, w, b[:3])
    with refuses(ValueError, match=r"weight_ema must have the shape of weight, got \[3, 128\]"):
        linear(x, w, b, "tetrajet_ema", weight_ema=w[:3])
    with refuses(ValueError, match="recipe must be one of bf16, "):
        linear(x, w, b, "tetra")


def test_misfit_is_an_error():
    x, w, b, _ = tensors(4, c=96)
    message = r"mxtrain::{}: recipe must fit the layer, got out_features = 96, .* smaller group"
    with refuses(ValueError, match=message.format("linear")):
        linear(x, w, b, "mxfp4_backward")
    with refuses(ValueError, match=message.format("MXLinear")):
        MXLinear(128, 96, recipe="mxfp4_backward")
    layer = MXLinear(128, 96)
    with refuses(ValueError, match=message.format("MXLinear")):
        layer.recipe = "mxfp4_backward"
    assert layer.recipe.name == "tetrajet"


# ---- the module ----


@pytest.mark.parametrize("name", NAMES)
def test_module_is_the_function(device, name):
    x, w, b, dy = tensors(3, 20, device=device)
    layer = MXLinear(128, 128, device=device, recipe=name)
    layer.load_state_dict({"weight": w.detach(), "bias": b.detach()})
    assert isinstance(layer, nn.Linear) and layer.recipe is RECIPES[name]
    assert repr(layer).endswith(f"bias=True, recipe='{name}')")
    expected = run(lambda x, w, b: linear(x, w, b, name), x, w, b, dy)
    got = run(lambda x, w, b: layer(x), x, layer.weight, layer.bias, dy)
    assert all(torch.equal(a, e) for a, e in zip(got, expected, strict=True))


def test_from_linear_keeps_every_object():
    module = nn.Linear(64, 32, bias=False)
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    weight = module.weight
    layer = MXLinear.from_linear(module, "mxfp8")
    assert layer is module and type(layer) is MXLinear and layer.weight is weight
    layer(torch.randn(2, 64))
    assert calls == [1] and layer.bias is None and list(layer.state_dict()) == ["weight"]

    class Other(nn.Linear):
        pass

    for other in (Other(64, 32), layer):
        message = rf"module must be exactly a torch.nn.Linear, got {type(other).__name__}"
        with refuses(TypeError, match=message):
            MXLinear.from_linear(other)
    plain = nn.Linear(64, 96)
    with refuses(ValueError, match="out_features = 96"):
        MXLinear.from_linear(plain, "mxfp4_backward")
    assert type(plain) is nn.Linear


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_load_both_ways(name):
    plain, layer = nn.Linear(64, 64), MXLinear(64, 64, recipe=name)
    layer.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(layer.weight, plain.weight)
    if RECIPES[name].ema_beta is None and not RECIPES[name].fprop_x.fallback:
        assert list(layer.state_dict()) == ["weight", "bias"]
        plain.load_state_dict(layer.state_dict(), strict=True)
    ema = MXLinear(64, 64, recipe="tetrajet_ema")
    layer.load_state_dict(ema.state_dict(), strict=True)  # what the recipe has no use for is left
    assert torch.equal(layer.weight, ema.weight)


def test_missing_and_unexpected_keys_are_still_reported():
    for name in ("tetrajet", "tetrajet_ema"):
        layer = MXLinear(64, 64, recipe=name)
        with pytest.raises(RuntimeError, match=r'Missing key.* "weight"'):
            layer.load_state_dict({"bias": layer.bias})
        with pytest.raises(RuntimeError, match=r'Unexpected key.* "scale"'):
            layer.load_state_dict({**nn.Linear(64, 64).state_dict(), "scale": torch.ones(1)})


@pytest.mark.parametrize("name", ["tetrajet", "mxfp4_backward", "nvfp4"])
def test_trains(device, name):
    """A small regression: the loss falls to a fraction of where it began."""
    torch.manual_seed(0)
    net = nn.Sequential(MXLinear(64, 128, recipe=name), nn.ReLU(), MXLinear(128, 64, recipe=name))
    net.to(device)
    x = torch.randn(256, 64, device=device)
    target = torch.tanh(x @ torch.randn(64, 64, device=device) / 8)
    optimizer = AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(net(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
