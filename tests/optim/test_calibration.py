"""Calibration of Q-Ramping: what oscillates is found, and nothing else is left of it."""

from __future__ import annotations

import pytest
import torch
from common import refuses
from optim_common import (
    OPS,
    OPTIONS,
    assert_same_state,
    layer_and_optimizer,
    model,
    oscillating,
    set_periods,
    snapshot,
    train,
)
from torch import nn

import mxtrain
from mxtrain.optim import QRamping

pytestmark = pytest.mark.ops(*OPS)

# ---- detection ----


def test_an_oscillator_is_found_and_a_drift_is_not(device):
    """T21: a step of 1e-3 that flips a code of 0.5 has R = 500, n = 5 floor(500 / 16) + 1 = 156."""
    layer, optimizer = layer_and_optimizer(device, max_period=1000, betas=(0.0, 0.0), eps=1e-12,
                                           weight_decay=0.0, lr=1e-3)  # fmt: skip
    with torch.no_grad():
        layer.weight.fill_(0.1)
        layer.weight[:, 0] = 6.0  # S = 1
        layer.weight[0, 1] = 0.2495
        layer.weight[1, 1] = 0.22  # drifts to 0.251 and flips once
    start = layer.weight.detach().clone()
    sign = [-1.0]

    def forward_backward():
        layer.weight.grad = torch.zeros_like(layer.weight)
        layer.weight.grad[0, 1] = sign[0]
        layer.weight.grad[1, 1] = -1.0
        sign[0] = -sign[0]

    share = optimizer.calibrate(forward_backward)
    period = optimizer.state[layer.weight]["period"]
    assert period.dtype == torch.int16 and period[0, 1] == 156 and period[1, 1] == 6
    assert (period > 1).sum() == 2 and share == {"": 2 / 128}
    assert torch.equal(layer.weight, start)
    optimizer.param_groups[0]["max_period"] = 100
    optimizer.state[layer.weight]["count"].fill_(300)  # more than a byte holds
    sign[0] = -1.0
    optimizer.calibrate(forward_backward)
    period = optimizer.state[layer.weight]["period"]
    assert period[0, 1] == 100 and period.dtype == torch.int16
    forward_backward()
    optimizer.step()
    assert (optimizer.state[layer.weight]["count"][0, 1] == 301).all()


@pytest.mark.parametrize(
    ("ratio", "period"),
    [(0.0, 1), (15.9, 1), (16.0, 6), (31.9, 6), (32.0, 11), (100.0, 31), (1e9, 40),
     (float("nan"), 1), (float("inf"), 40)],
)  # fmt: skip
def test_periods_of_ratios(ratio, period):
    """T21: the map from ratios to periods."""
    layer, optimizer = layer_and_optimizer(max_period=40)
    changes = optimizer.track_changes(layer)
    changes.ratio = lambda weight: torch.full_like(weight, ratio)
    optimizer._set_periods(changes)
    assert (optimizer.state[layer.weight]["period"] == period).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calibration_leaves_everything_but_the_periods(device, dtype):
    """T23."""
    # torch's scaler does not unscale bfloat16 gradients on CUDA.
    options = {"init_scale": 2.0**10, "growth_interval": 3, "enabled": dtype == torch.float32}
    scaler = torch.amp.GradScaler(device, **options)
    net, optimizer, forward_backward = oscillating(device, dtype, scaler)
    forward_backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    optimizer.calibrate(forward_backward, scaler=scaler, transitions=4)
    train(net, optimizer, 3)  # counts and sums that are not zero
    grads = {p: p.grad for p in net.parameters()}
    values = [g.clone() for g in grads.values()]
    objects = [t for s in optimizer.state.values() for t in s.values()]
    tensors = [*net.parameters(), *net.buffers()]
    before = snapshot(net, optimizer, scaler)
    for state in before[1]["state"].values():
        state.pop("period", None)
    generator = torch.get_rng_state()
    share = optimizer.calibrate(forward_backward, scaler=scaler, transitions=6)
    assert set(share) == {"0", "3"} and max(share.values()) > 0
    after = snapshot(net, optimizer, scaler)
    periods = [state.pop("period") for state in after[1]["state"].values() if "period" in state]
    assert any((p > 1).any() for p in periods) and len(periods) == 2
    assert_same_state(after, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is grads[p] for p in net.parameters())
    assert all(torch.equal(p.grad, v) for p, v in zip(net.parameters(), values, strict=True))
    again = [t for s in optimizer.state.values() for t in s.values()]
    assert all(a is b for a, b in zip(again, objects, strict=True))
    both = zip([*net.parameters(), *net.buffers()], tensors, strict=True)
    assert all(a is b for a, b in both)


def test_calibration_before_the_first_step(device):
    """What it leaves is the state that the first step would start with, and periods."""
    nets = [model(device=device) for _ in range(2)]
    optimizers = [QRamping(n.parameters(), n, max_period=64, k1=1e9, **OPTIONS) for n in nets]

    def forward_backward():
        nets[0](torch.randn(32, 64, device=device)).square().mean().backward()

    optimizers[0].calibrate(forward_backward, transitions=2)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 3)
    assert_same_state(snapshot(nets[0]), snapshot(nets[1]))


def test_what_fails_in_calibration_leaves_everything(device):
    scaler = torch.amp.GradScaler(device)
    net, optimizer, forward_backward = oscillating(device, scaler=scaler)
    before = snapshot(net, optimizer, scaler)
    calls = []

    def fails():
        calls.append(1)
        forward_backward()
        if len(calls) == 3:
            with refuses(RuntimeError, "calibration must be called outside, got a call within"):
                optimizer.calibrate(forward_backward)
            raise KeyError("data")

    with pytest.raises(KeyError, match="data"):
        optimizer.calibrate(fails, scaler=scaler)
    assert_same_state(snapshot(net, optimizer, scaler), before)
    train(net, optimizer, 1)


@pytest.mark.parametrize("first", [True, False], ids=["before the first forward", "in training"])
def test_calibration_leaves_what_layers_count(device, first):
    """T23, with a layer whose activations fall back, and two averages that calibration moves.

    One by the step of the optimizer, of a layer outside of the model that it holds as well, and one
    by another optimizer's step in forward_backward.
    """
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(3)]).to(device)
    recipes = [("0", "tetrajet"), ("1", "int8_fallback"), ("2", "tetrajet_ema")]
    mxtrain.convert(net, recipes, include="*")
    outside = mxtrain.MXLinear(32, 32, device=device, recipe="tetrajet_ema")
    held = [*net[0].parameters(), *net[1].parameters(), *outside.parameters()]
    optimizer = QRamping(held, net, max_period=10, **OPTIONS)
    other = torch.optim.SGD(net[2].parameters(), lr=0.1)

    def forward_backward():
        loss = net(torch.randn(256, 256, device=device)).square().mean()
        (loss + outside(torch.randn(4, 32, device=device)).square().mean()).backward()
        other.step()

    def counts():
        layer = net[1]
        return [outside._ema_updates, outside.ema_active, net[2]._ema_updates, net[2].ema_active,
                layer.trained_threshold()]  # fmt: skip

    if not first:
        for _ in range(12):
            optimizer.zero_grad()
            other.zero_grad()
            forward_backward()
            optimizer.step()
        net(torch.randn(256, 256, device=device))  # a micro-batch whose blocks are counted
    before, had, rate = snapshot(net, outside), counts(), net[1].last_fallback_rate()
    optimizer.calibrate(forward_backward, transitions=4)
    assert_same_state(snapshot(net, outside), before)
    assert_same_state(counts(), had)
    after = net[1].last_fallback_rate()
    assert (after is None) == (rate is None) == first and (first or torch.equal(after, rate))
    assert had[0] == had[2] == (0 if first else 12) and (had[4] is None) == first
    net.train()
    assert net(torch.randn(256, 256, device=device)).isfinite().all()
    assert net[1].trained_threshold() > 0


def test_calibration_needs_gradients_and_makes_the_steps(device):
    net, optimizer, forward_backward = oscillating(device)
    optimizer.calibrate(forward_backward, transitions=4)
    scaler = torch.amp.GradScaler(device)

    def steps():
        forward_backward()
        optimizer.step()

    def scaled():
        scaler.scale(net(torch.randn(4, 64, device=device)).sum()).backward()
        scaler.step(optimizer)

    def head_alone():
        forward_backward()
        net[0].weight.grad = net[3].weight.grad = None

    before = snapshot(net, optimizer)
    for nothing in (lambda: None, head_alone):
        with refuses(RuntimeError, "forward_backward must leave gradients in quantized weights"):
            optimizer.calibrate(nothing, transitions=2)
    for call in (steps, scaled):
        with refuses(
            RuntimeError, r"QRamping\.step: step must be called outside of forward_backward, got"
        ):
            optimizer.calibrate(call, transitions=2)
    assert_same_state(snapshot(net, optimizer), before)
    train(net, optimizer, 1)


def test_a_period_that_cannot_be_found_writes_none():
    """All are found before the first is written."""
    net, optimizer, _ = oscillating()
    before = snapshot(optimizer)
    changes = optimizer.track_changes(net)

    def ratio(weight):
        if weight is net[3].weight:
            raise KeyError("no ratio")
        return torch.full_like(weight, 100.0)

    changes.ratio = ratio
    with pytest.raises(KeyError):
        optimizer._set_periods(changes)
    assert_same_state(snapshot(optimizer), before)


def test_a_count_fires_before_it_leaves_its_type():
    """One that calibrations have led past its multiples again and again."""
    layer, optimizer = layer_and_optimizer(max_period=128)
    set_periods(optimizer, layer.weight, torch.tensor(128))
    state = optimizer.state[layer.weight]
    state["count"][0].fill_(253)  # the next multiple of 100 is 300
    changes = optimizer.track_changes(layer)
    changes.ratio = lambda weight: torch.full_like(weight, 16.0 * 25)
    optimizer._set_periods(changes)
    assert (state["period"][0] == 1).all() and (state["period"][1:] == 126).all()
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    assert (state["count"][0] == 0).all() and (state["count"][1:] == 1).all()
