"""Q-Ramping: the paper's step, detection of what oscillates, calibration without a trace."""

from __future__ import annotations

import copy

import pytest
import torch
from common import assert_same_bytes, refuses
from optim_common import (
    NUMBERS,
    OPS,
    OPTIONS,
    Float64,
    assert_same_state,
    gaussian,
    model,
    snapshot,
    train,
)
from torch import nn

import mxtrain
from mxtrain import reference
from mxtrain.optim import AdamW, QRamping

pytestmark = pytest.mark.ops(*OPS)


def layer_and_optimizer(device="cpu", features=32, max_period=100, **options):
    layer = mxtrain.MXLinear(features, 4, bias=False, device=device)
    return layer, QRamping(layer.parameters(), layer, max_period=max_period, **OPTIONS | options)


def set_periods(optimizer, weight, period) -> None:
    optimizer._start_state(optimizer.param_groups[0], weight)
    state = optimizer.state[weight]
    state["period"].copy_(period.broadcast_to(weight.shape))


# ---- the step ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [torch.uint8, torch.int16], ids=str)
@pytest.mark.parametrize("shape", [(64, 96), (3, 37), (1,), (2050,)], ids=str)
def test_the_op_is_bitwise_the_reference(device, shape, dtype, counts):
    """Two tensors, of which one gradient is not finite in the second step."""
    generator = torch.Generator().manual_seed(4)
    params = [gaussian(*shape, seed=i).to(dtype) for i in range(2)]
    periods = [torch.randint(1, 5, shape, generator=generator).to(counts) for _ in params]
    kept = [[torch.zeros(shape)] * 3 + [torch.zeros(shape).to(torch.int64)] for _ in params]
    on = [[t.clone().to(device) for t in part] for part in
          (params, *([torch.zeros(shape)] * 2 for _ in range(3)),
           [torch.zeros(shape, dtype=counts)] * 2, periods)]  # fmt: skip
    p, m, v, sums, count, period = on
    steps = [torch.zeros((), device=device) for _ in params]
    for t in range(1, 7):
        grads = [gaussian(*shape, seed=10 * t + i).to(dtype) for i in range(2)]
        if t == 2:
            grads[1].view(-1)[-1] = torch.inf if dtype == torch.float32 else torch.nan
        rng = torch.tensor([[t, 0], [t, 1]])
        torch.ops.mxtrain.ramped_adamw_(
            p, [g.to(device) for g in grads], m, v, steps, *NUMBERS, None, rng.to(device),
            sums, count, period,
        )  # fmt: skip
        f = reference.factors(t, *NUMBERS)
        for i, g in enumerate(grads):
            w, *kept[i] = reference.ramped_adamw(
                params[i].float(), g.float(), *kept[i], periods[i], f
            )
            exact = dtype == torch.float32
            params[i] = w if exact else reference.stochastic_round(w, dtype, rng[i])
            for got, expected in zip((p, m, v, sums), (params[i], *kept[i][:3]), strict=True):
                assert_same_bytes(got[i], expected, f"step {t}, tensor {i}")
            assert torch.equal(count[i].cpu().long(), kept[i][3])


def test_it_is_the_paper_in_float64_over_1000_steps(device):
    """Periods of 1 to 40; a step is at most as many times larger."""
    layer, optimizer = layer_and_optimizer(device)
    period = torch.arange(1, 129).reshape(4, 32) % 40 + 1
    set_periods(optimizer, layer.weight, period)
    exact = Float64(layer.weight.detach().cpu().clone(), period.numpy())
    for i in range(1000):
        g = gaussian(4, 32, seed=i) + 0.2
        if i % 100 == 7:
            g[2, 2] = torch.nan
        layer.weight.grad = g.to(device)
        optimizer.step()
        exact.step(g)
    state = optimizer.state[layer.weight]
    assert (state["count"].cpu().numpy() == exact.count).all() and exact.count.any()
    error = (layer.weight.detach().cpu().double() - torch.from_numpy(exact.p)).abs().max()
    assert error < 1000 * 2 * 2**-24 * abs(exact.p).max(), error


def test_periods_of_one_are_adamw_bitwise(device):
    """And what no MXLinear quantizes is AdamW whatever the periods of the others."""
    nets = [model(device=device) for _ in range(2)]
    options = {**OPTIONS, "max_period": 200}
    ramping = QRamping(nets[0].parameters(), nets[0], **options)
    optimizers = ramping, AdamW(nets[1].parameters(), **OPTIONS)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 20)
    assert_same_state(*(net.state_dict() for net in nets))
    weights = [net[0].weight for net in nets]
    for name in ("step", "exp_avg", "exp_avg_sq"):
        a, b = (o.state[w][name] for o, w in zip(optimizers, weights, strict=True))
        assert torch.equal(a, b)
    kinds = {p: set(s) for p, s in ramping.state.items()}
    extra = {"grad_sum", "count", "period"}
    assert {p for p, names in kinds.items() if extra & names} == {nets[0][0].weight,
                                                                 nets[0][3].weight}  # fmt: skip


def test_a_period_of_four_moves_the_weight_in_every_fourth_step(device):
    layer, optimizer = layer_and_optimizer(device, weight_decay=0.0)
    set_periods(optimizer, layer.weight, torch.tensor(4))
    start = layer.weight.detach().clone()
    for i in range(1, 13):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full_like(before, 0.5)
        optimizer.step()
        moved = layer.weight.detach() != before
        assert moved.all() if i % 4 == 0 else not moved.any()
    # Adam of a constant gradient takes lr a step: here four times lr, at the global step's
    # correction, (1 - b1^k) / (1 - b1^t) sqrt((1 - b2^t) / (1 - b2^k)) with k updates in t steps.
    expected = 0.0
    for k in (1, 2, 3):
        first = (1 - 0.9**k) / (1 - 0.9 ** (4 * k))
        second = ((1 - 0.999 ** (4 * k)) / (1 - 0.999**k)) ** 0.5
        expected += 4 * OPTIONS["lr"] * first * second
    assert torch.allclose(start - layer.weight, torch.tensor(expected).to(device), rtol=1e-4)


def test_decay_acts_in_every_step_and_an_infinite_gradient_only_counts(device):
    layer, optimizer = layer_and_optimizer(device)
    set_periods(optimizer, layer.weight, torch.tensor(4))
    for g in (1.0, torch.inf, 2.0):
        before = layer.weight.detach().clone()
        layer.weight.grad = torch.full_like(before, g)
        layer.weight.grad[1:] = 1.0
        optimizer.step()
        decay = torch.tensor(1 - OPTIONS["lr"] * OPTIONS["weight_decay"])
        assert torch.equal(layer.weight, before * decay.to(device))
    state = optimizer.state[layer.weight]
    assert (state["count"] == 3).all()
    assert (state["grad_sum"][0] == 3).all() and (state["grad_sum"][1:] == 2).all()


def test_a_count_may_pass_a_shortened_period(device):
    """It fires at the next multiple, by the steps it has made; max_period of 128 fits in a byte."""
    layer, optimizer = layer_and_optimizer(device, max_period=128)
    set_periods(optimizer, layer.weight, torch.tensor(128))
    state = optimizer.state[layer.weight]
    state["count"].fill_(126)
    for period, fires in ((127, True), (128, False)):
        set_periods(optimizer, layer.weight, torch.tensor(period))
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert bool((state["count"] == 0).all()) == fires
    state["count"].fill_(127)
    set_periods(optimizer, layer.weight, torch.tensor(85))
    counts = []
    for _ in range(43):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        counts.append(int(state["count"][0, 0]))
    assert counts == [*range(128, 170), 0]


# ---- detection ----


def test_an_oscillator_is_found_and_a_drift_is_not(device):
    """A step of 1e-3 that flips a code of 0.5 has R = 500: n = 5 floor(500 / 16) + 1 = 156."""
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
    sign[0] = -1.0
    optimizer.calibrate(forward_backward)
    period = optimizer.state[layer.weight]["period"]
    assert period[0, 1] == 100 and period.dtype == torch.uint8
    forward_backward()
    optimizer.step()
    assert (optimizer.state[layer.weight]["count"][0, 1] == 1).all()


@pytest.mark.parametrize(
    ("ratio", "period"),
    [(0.0, 1), (15.9, 1), (16.0, 6), (31.9, 6), (32.0, 11), (100.0, 31), (1e9, 40),
     (float("nan"), 1), (float("inf"), 40)],
)  # fmt: skip
def test_periods_of_ratios(ratio, period):
    layer, optimizer = layer_and_optimizer(max_period=40)
    changes = optimizer.track_changes(layer)
    changes.ratio = lambda weight: torch.full_like(weight, ratio)
    optimizer._set_periods(changes)
    assert (optimizer.state[layer.weight]["period"] == period).all()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_calibration_leaves_everything_but_the_periods(device, dtype):
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


def test_a_state_dict_goes_on_bitwise(device, tmp_path):
    net, optimizer, forward_backward = oscillating(device)
    optimizer.calibrate(forward_backward, transitions=4)
    train(net, optimizer, 3, first=5)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    states = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again = model(device=device)
    again.load_state_dict(states[0])
    resumed = QRamping(again.parameters(), again, max_period=2000)
    resumed.load_state_dict(states[1])
    assert_same_state(resumed.state_dict(), optimizer.state_dict())
    for n, o in ((net, optimizer), (again, resumed)):
        train(n, o, 12, first=8)
    assert_same_state(snapshot(again, resumed), snapshot(net, optimizer))


def test_it_starts_from_a_checkpoint_of_adamw():
    net = model()
    plain = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, plain, 2)
    ramping = QRamping(net.parameters(), net, max_period=200)
    ramping.load_state_dict(copy.deepcopy(plain.state_dict()))
    train(net, ramping, 2)
    state = ramping.state[net[0].weight]
    assert state["step"] == 4 and state["period"].dtype == torch.int16
    assert (state["period"] == 1).all()


BAD = [
    ({"max_period": 0}, ValueError, r"max_period must lie in \[1, 16384\], got 0"),
    ({"max_period": 2**15}, ValueError, "max_period must lie in"),
    ({"max_period": 1.5}, TypeError, "max_period must be an int"),
    ({"max_period": 9, "k1": 0.0}, ValueError, "k1 must be positive and finite"),
    ({"max_period": 9, "k2": 0}, ValueError, "k2 must lie in"),
    ({"max_period": 9, "lr": -1}, ValueError, "QRamping: lr must lie in"),
]


@pytest.mark.parametrize(("options", "error", "match"), BAD)
def test_options_out_of_range_are_refused(options, error, match):
    net = model()
    with refuses(error, match):
        QRamping(net.parameters(), net, **options)


def test_models_and_parameters_that_do_not_fit_are_refused():
    plain, averaged, net = nn.Linear(32, 32), model("tetrajet_ema"), model()
    with refuses(ValueError, "params must hold a weight that an MXLinear quantizes to mxfp4"):
        QRamping(plain.parameters(), plain, max_period=9)
    with refuses(ValueError, "params must hold a weight that an MXLinear quantizes to mxfp4"):
        QRamping(net[4].parameters(), net, max_period=9)
    with refuses(ValueError, "params must not be averaged too, got the weight of '0'"):
        QRamping(averaged.parameters(), averaged, max_period=9)
    with refuses(TypeError, "model must be a torch.nn.Module"):
        QRamping(net.parameters(), list(net.parameters()), max_period=9)


def test_calls_that_do_not_fit_are_refused():
    net, optimizer, forward_backward = oscillating()
    with refuses(TypeError, "forward_backward must be callable, got int"):
        optimizer.calibrate(3)
    with refuses(ValueError, "transitions must be at least 1, got 0"):
        optimizer.calibrate(forward_backward, transitions=0)
    with optimizer.track_changes(net):
        with refuses(RuntimeError, "calibration must be called outside"):
            optimizer.calibrate(forward_backward)
        forward_backward()
        before = snapshot(net, optimizer)
        with refuses(RuntimeError, "parameters must not be tracked"):
            optimizer.step()
        assert_same_state(snapshot(net, optimizer), before)
