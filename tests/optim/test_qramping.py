"""Q-Ramping: the paper's step, its state, and layers whose recipes change."""

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
    layer_and_optimizer,
    model,
    oscillating,
    set_periods,
    snapshot,
    train,
)
from torch import nn

import mxtrain
from mxtrain import reference
from mxtrain.optim import AdamW, QRamping

pytestmark = pytest.mark.ops(*OPS)


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
    """T22; and what no MXLinear quantizes is AdamW whatever the periods of the others."""
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
    """T22: the constant gradient, without decay."""
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
    """T22: decay, and the infinite gradient."""
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


# ---- layers that change ----


def test_a_weight_that_is_quantized_no_more_has_a_period_of_one(device):
    """What it has summed acts in the next step; then it is AdamW, bitwise."""
    net = model(device=device)
    optimizer = QRamping(net.parameters(), net, max_period=50, **OPTIONS)
    train(net, optimizer, 1)
    for layer in (net[0], net[3]):
        set_periods(optimizer, layer.weight, torch.tensor(50))
    train(net, optimizer, 3, first=1)
    weight, kept = net[0].weight, optimizer.state[net[3].weight]
    state = optimizer.state[weight]
    assert (state["count"] == 3).all() and state["grad_sum"].any()
    net[0].recipe = "bf16"
    gradient = gaussian(96, 64, seed=7)
    optimizer.zero_grad()
    weight.grad = gradient.to(device)
    old = [state[name].cpu().clone() for name in ("exp_avg", "exp_avg_sq", "grad_sum")]
    expected = reference.ramped_adamw(
        weight.detach().cpu(), gradient, *old, torch.full((96, 64), 3), torch.ones(96, 64),
        reference.factors(5, *NUMBERS),
    )  # fmt: skip
    optimizer.step()
    assert_same_bytes(weight.detach(), expected[0])
    assert not state["count"].any() and not state["grad_sum"].any()
    assert (kept["count"] == 3).all()  # no gradient, so no step

    twin = copy.deepcopy(net)
    plain = AdamW(twin.parameters(), **OPTIONS)
    plain.load_state_dict(optimizer.state_dict())
    twin[3].recipe = net[3].recipe = "bf16"
    net[3].weight.requires_grad_(False)
    twin[3].weight.requires_grad_(False)
    for n, o in ((net, optimizer), (twin, plain)):
        train(n, o, 5, first=4)
    assert_same_state(net.state_dict(), twin.state_dict())
    assert not state["count"].any()  # the pass of AdamW, which leaves it

    net[0].recipe = "tetrajet"  # and back
    train(net, optimizer, 1, first=9)
    assert not state["count"].any() and (state["period"] == 1).all()


def test_after_the_switch_of_a_schedule_nothing_is_ramped(device):
    net = model(device=device)
    optimizer = QRamping(net.parameters(), net, max_period=50, **OPTIONS | {"weight_decay": 0.0})
    schedule = mxtrain.TargetPrecision(net, 10, 0.2)
    train(net, optimizer, 1)
    for layer in (net[0], net[3]):
        set_periods(optimizer, layer.weight, torch.tensor(50))
    schedule.step()
    train(net, optimizer, 1, first=1)
    schedule.step()
    saved = snapshot(net, optimizer)
    for i in range(3):
        before = net[0].weight.detach().clone()
        train(net, optimizer, 1, first=2 + i)
        assert (net[0].weight != before).float().mean() > 0.9
    calls = []
    assert optimizer.calibrate(lambda: calls.append(1)) == {} and not calls
    again = model(device=device)
    mxtrain.convert(again, "bf16", include=["0", "3"])
    for layer in (again[0], again[3]):
        layer.recipe = "tetrajet"
    resumed = QRamping(again.parameters(), again, max_period=50, **OPTIONS)
    for layer in (again[0], again[3]):
        layer.recipe = "bf16"
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(again, resumed, 3, first=2)
    assert_same_state(snapshot(again, resumed), snapshot(net, optimizer))


def test_a_layer_converted_later_is_ramped_too():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    mxtrain.convert(net, "tetrajet", include="0")
    optimizer = QRamping(net.parameters(), net, max_period=50, k1=1.0, **OPTIONS)
    mxtrain.convert(net, "tetrajet", include="1")
    share = optimizer.calibrate(lambda: net(torch.randn(32, 64)).square().mean().backward(),
                                transitions=3)  # fmt: skip
    assert set(share) == {"0", "1"}
    assert {"period", "count", "grad_sum"} <= set(optimizer.state[net[1].weight])


def test_a_layer_that_gets_an_average_later_is_refused():
    net, optimizer, forward_backward = oscillating()
    net[3].recipe = "tetrajet_ema"
    before = snapshot(net, optimizer)
    net.zero_grad()
    forward_backward()
    match = r"QRamping\.step: weights must not be averaged too, got the weight of '3'"
    for call in (optimizer.step, lambda: optimizer.calibrate(forward_backward)):
        with refuses(ValueError, match):
            call()
    before[0].update({k: v for k, v in net.state_dict().items() if "running" in k or "num" in k})
    assert_same_state(snapshot(net, optimizer), before)
    net[3].recipe = "tetrajet"
    train(net, optimizer, 1)


def test_a_weight_that_ends_its_ramp_with_an_average_is_averaged():
    """Another layer shares it, which the model has not: its average moves with every step."""
    net, optimizer, _ = oscillating()
    lagging = mxtrain.get_recipe("tetrajet_ema").replace(ema_at_half=None)
    other = mxtrain.MXLinear(64, 96, recipe=lagging)
    net[0].recipe = "bf16"
    other.weight = net[0].weight
    train(net, optimizer, 3)
    assert other._ema_updates == 3 and not torch.equal(other.weight_ema, other.weight)


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
