"""What the tests of the kept weight share: a small network, its steps, and an odd optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from mxtrain.linear import MXLinear
from mxtrain.recipe import Recipe


class DataSGD(Optimizer):
    """Writes through p.data, so no version changes."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


def network(recipe: Recipe, keep: bool, device="cpu", seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(
        MXLinear(128, 128, recipe=recipe), nn.GELU(), MXLinear(128, 128, recipe=recipe)
    )
    for layer in net:
        layer.keep_packed = keep
    return net.to(device)


def inputs(device, n=40, seed=5):
    return torch.randn(n, 128, generator=torch.Generator().manual_seed(seed)).to(device)


def backward(net, x, through=None):
    """Output and gradients of one micro-step, which accumulate."""
    x = x.detach().requires_grad_()
    y = net(x) if through is None else through(net, x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in net.parameters())]


def evaluate(net, x):
    net.eval()
    with torch.inference_mode():
        out = [net(x).clone(), net(x).clone()]
    net.train()
    return out


def equal(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)
