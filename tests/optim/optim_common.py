"""What the tests of the optimizers share: the paper's equations in float64, models, gradients."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

import mxtrain
from mxtrain import reference
from mxtrain.optim import QRamping

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.1
OPTIONS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
NUMBERS = (LR, *BETAS, EPS, DECAY)
OPS = ("quantize", "quantize_dual", "requantize", "dequantize", "gemm", "adamw_", "ramped_adamw_")


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model(recipe: str = "tetrajet", device: str = "cpu", dtype=torch.float32) -> nn.Sequential:
    """Two layers that quantize, and norms and a head that do not."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(64, 96), nn.BatchNorm1d(96), nn.GELU(), nn.Linear(96, 40), nn.Linear(40, 8)
    ).to(device, dtype)
    mxtrain.convert(net, recipe, include=["0", "3"])
    return net


def train(net: nn.Module, optimizer, steps: int, first: int = 0) -> None:
    """Forward, backward and step on seeded data; the same for every optimizer."""
    p = next(net.parameters())
    for i in range(first, first + steps):
        optimizer.zero_grad()
        torch.manual_seed(i)
        x = gaussian(32, 64, seed=i).to(p)
        net(x).float().square().mean().backward()
        optimizer.step()


def snapshot(*objects) -> list:
    return [copy.deepcopy(o.state_dict()) for o in objects]


def flat(state) -> list:
    """Every leaf of nested dicts and lists, in order."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in (key, *flat(state[key]))]
    if isinstance(state, (list, tuple)):
        return [leaf for value in state for leaf in flat(value)]
    return [state]


def assert_same_state(got, expected) -> None:
    got, expected = flat(got), flat(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
        else:
            assert a == b


class Float64:
    """Q-Ramping as the paper writes it, in float64; periods of 1 are AdamW."""

    def __init__(self, p, period=1):
        self.p = np.asarray(p, np.float64)
        self.m, self.v, self.sum = (np.zeros_like(self.p) for _ in range(3))
        self.count = np.zeros(self.p.shape, np.int64)
        self.period = np.broadcast_to(period, self.p.shape)
        self.t = 0

    def step(self, g):
        g, (b1, b2) = np.asarray(g, np.float64), BETAS
        self.t += 1
        self.count += 1
        if np.isfinite(g).all():
            self.sum += g
        self.p *= 1 - LR * DECAY
        now = self.count % self.period == 0
        mean = self.sum / self.count
        self.m = np.where(now, b1 * self.m + (1 - b1) * mean, self.m)
        self.v = np.where(now, b2 * self.v + (1 - b2) * mean**2, self.v)
        root = np.sqrt(self.v) / np.sqrt(1 - b2**self.t) + EPS
        self.p -= np.where(now, LR * self.count * (self.m / (1 - b1**self.t)) / root, 0.0)
        self.sum[now], self.count[now] = 0.0, 0


def changes(before, after, rule="ceil", rounding="nearest", averages=(None, None)):
    """|w - w'| and |Q(w) - Q(w')| by the reference quantizer."""

    def q(w, average):
        given = {"toward": average} if rounding == "toward" else {}
        data, scale, _ = reference.quantize(w, "mxfp4", scale_rule=rule, rounding=rounding, **given)
        return reference.dequantize(data, scale, None, "mxfp4", w.shape[1], torch.float32)

    a, b = q(before, averages[0]), q(after, averages[1])
    return (after.float() - before.float()).abs(), (b - a).abs()


def layer_and_optimizer(device="cpu", features=32, max_period=100, **options):
    layer = mxtrain.MXLinear(features, 4, bias=False, device=device)
    return layer, QRamping(layer.parameters(), layer, max_period=max_period, **OPTIONS | options)


def set_periods(optimizer, weight, period) -> None:
    optimizer._start_state(optimizer.param_groups[0], weight)
    state = optimizer.state[weight]
    state["period"].copy_(period.broadcast_to(weight.shape))


def oscillating(device="cpu", dtype=torch.float32, scaler=None):
    """A model in training whose calibration finds something; its closure draws random numbers."""
    net = model(device=device, dtype=dtype)
    optimizer = QRamping(net.parameters(), net, max_period=64, k1=4.0, **OPTIONS | {"lr": 2e-3})
    train(net, optimizer, 5)

    def forward_backward():
        x = torch.randn(32, 64, device=device).to(dtype)
        loss = net(x).float().square().mean() * 1e-3
        (loss if scaler is None else scaler.scale(loss)).backward()

    return net, optimizer, forward_backward
