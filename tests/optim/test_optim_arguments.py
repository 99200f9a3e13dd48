"""What the optimizers refuse, in a step, a load and a group: all of it before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from common import assert_same_bytes, refuses
from optim_common import OPS, OPTIONS, assert_same_state, gaussian, model, snapshot, train
from torch import nn

from mxtrain.optim import AdamW, QRamping

pytestmark = pytest.mark.ops(*OPS)


def two_groups(kind=AdamW, **options):
    """A model with gradients and its optimizer after a step, in two groups."""
    net = model()
    params = list(net.parameters())
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    more = (net,) if kind is QRamping else ()
    optimizer = kind(groups, *more, **{**OPTIONS, **options})
    train(net, optimizer, 1)
    return net, optimizer


def ramping():
    return two_groups(QRamping, max_period=9)


# ---- options ----

REAL = "be a float or a tensor of one real number"
BAD_OPTIONS = [
    ("lr", "x", "lr must lie in"),
    ("lr", None, "lr must lie in"),
    ("lr", -1.0, r"lr must lie in \[0, inf\), got -1.0"),
    ("lr", float("nan"), "lr must lie in"),
    ("lr", float("inf"), "lr must lie in"),
    ("lr", 10**400, "lr must lie in"),
    ("lr", torch.tensor([0.1, 0.2]), f"lr must {REAL}, got a tensor of float32"),
    ("lr", torch.tensor(1 + 1j), f"lr must {REAL}, got a tensor of complex64"),
    ("lr", torch.tensor(True), f"lr must {REAL}, got a tensor of bool"),
    ("lr", torch.ones((), device="meta"), rf"lr must {REAL}, got .* \(on meta\)"),
    ("lr", torch.tensor(-1.0), "lr must lie in"),
    ("lr", torch.tensor(float("nan")), "lr must lie in"),
    ("betas", None, "betas must be two floats"),
    ("betas", (0.9,), "betas must be two floats"),
    ("betas", (2, 3), r"betas\[0\] must lie in \[0, 1\)"),
    ("eps", "x", "eps must lie in"),
    ("weight_decay", None, "weight_decay must lie in"),
    ("stochastic_rounding", 1, "stochastic_rounding must be True or False"),
    ("maximize", True, "maximize must be off, got True"),
    ("amsgrad", True, "amsgrad must be off, got True"),
]


@pytest.mark.parametrize(("name", "value", "match"), BAD_OPTIONS)
def test_an_option_of_a_group_is_refused_wherever_it_comes_from(name, value, match):
    error = TypeError if name == "stochastic_rounding" else ValueError
    net, optimizer = two_groups()
    saved = optimizer.state_dict()
    before = snapshot(net, optimizer)
    group = optimizer.param_groups[1]
    good = {"x": group[name]} if name in group else {}
    group[name] = value
    with refuses(error, rf"AdamW\.step: {match}"):
        optimizer.step()
    group[name] = good.get("x", False)
    if not good:
        del group[name]
    assert_same_state(snapshot(net, optimizer), before)
    bad = copy.deepcopy(saved)
    bad["param_groups"][1][name] = value
    bad["state"][0]["exp_avg"].fill_(7.0)
    with refuses(error, rf"AdamW\.load_state_dict: {match}"):
        optimizer.load_state_dict(bad)
    new = nn.Parameter(torch.ones(3))
    with refuses(error, rf"AdamW\.add_param_group: {match}"):
        optimizer.add_param_group({"params": [new], name: value})
    with refuses(error, match):
        AdamW([{"params": [new], name: value}])
    assert_same_state(snapshot(net, optimizer), before)
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("name", ["maximize", "amsgrad", "fused", "foo", "max_period"])
def test_unknown_options_are_no_arguments(name):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        AdamW([nn.Parameter(torch.ones(3))], **{name: True})


def test_a_group_may_have_options_of_others():
    """Schedulers and users keep theirs there."""
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [p], "scale": 3}], lr=torch.tensor(0.1))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.param_groups[0]["scale"] == 3 and (p < 1).all()


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("max_period", -3, ValueError, r"max_period must lie in \[1, 16384\], got -3 .*epoch"),
        ("max_period", 0, ValueError, "max_period must lie in"),
        ("max_period", "x", TypeError, "max_period must be an int"),
        ("k1", "x", TypeError, "k1 must be a float"),
        ("k1", float("nan"), ValueError, "k1 must be positive and finite"),
        ("k2", 0, ValueError, r"k2 must lie in .*\. The paper takes 5\.$"),
    ],
)
def test_the_options_of_qramping_in_a_group(name, value, error, match):
    net, optimizer = ramping()
    before, saved = snapshot(net, optimizer), optimizer.state_dict()
    calls = []
    good, group = optimizer.param_groups[1][name], optimizer.param_groups[1]
    group[name] = value
    with refuses(error, rf"QRamping\.step: {match}"):
        optimizer.step()
    with refuses(error, rf"QRamping\.calibrate: {match}"):
        optimizer.calibrate(lambda: calls.append(1))
    group[name] = good
    saved["param_groups"][1][name] = value
    with refuses(error, rf"QRamping\.load_state_dict: {match}"):
        optimizer.load_state_dict(saved)
    assert not calls
    assert_same_state(snapshot(net, optimizer), before)
    with refuses(error, match):
        QRamping([{"params": list(net.parameters()), name: value}], net, max_period=9)


# ---- states ----


def without(name):
    return lambda state: state.pop(name)


def with_(name, value):
    return lambda state: state.__setitem__(name, value)


SQUARE = torch.zeros(3, 3)
BAD_STATES = [
    (with_("exp_avg", SQUARE), "exp_avg must be .*, got a tensor of float32"),
    (with_("exp_avg", None), "exp_avg must be .*, got None"),
    (without("exp_avg"), "exp_avg must be .*, got none"),
    (without("exp_avg_sq"), "exp_avg_sq must be .*, got none"),
    (without("step"), "step must be .*, got none"),
    (with_("step", "x"), "step must be .*, got 'x'"),
    (with_("step", torch.ones(2)), "step must be .*, got a tensor of float32"),
]
BAD_SAVED = [
    *BAD_STATES,
    (with_("step", -1), "step must be one finite number of at least 0, got -1"),
    (with_("step", torch.tensor(float("nan"))), "step must be one finite number"),
    (with_("exp_avg", torch.zeros(96, 64, dtype=torch.int64)), "exp_avg must have floats"),
]
BAD_RAMP = [
    (with_("period", SQUARE.to(torch.uint8)), "period must be .*, got a tensor of uint8"),
    (without("count"), "count must be .*, got none"),
    (without("period"), "period must be .*, got none"),
    (with_("grad_sum", 3), "grad_sum must be .*, got 3"),
]
BAD_SAVED_RAMP = [
    *BAD_RAMP,
    (with_("period", torch.zeros(96, 64, dtype=torch.uint8)), r"period must lie in \[1, 16384\]"),
    (with_("period", torch.full((96, 64), -1, dtype=torch.int16)), "period must lie in"),
    (with_("count", torch.zeros(96, 64)), "count must have integers"),
    (with_("count", torch.full((96, 64), -1, dtype=torch.int16)), "count must lie in"),
]


@pytest.mark.parametrize(("change", "match"), BAD_STATES)
def test_a_state_that_cannot_be_used_is_refused_before_anything_changes(change, match):
    net, optimizer = two_groups()
    change(optimizer.state[net[3].weight])
    before = snapshot(net, optimizer)
    with refuses(ValueError, rf"AdamW\.step: {match}"):
        optimizer.step()
    assert_same_state(snapshot(net, optimizer), before)


def test_more_states_that_cannot_be_used():
    for change, match in (
        (with_("step", 3), "step must be one float32, got 3"),
        (with_("exp_avg", torch.zeros(40, 96).double()), "exp_avg must be float32, laid out as"),
        (with_("exp_avg", torch.zeros(96, 40).t()), r"exp_avg must be .* strides \[1, 40\]"),
        (with_("step", torch.zeros((), device="meta")), "step must be on cpu"),
    ):
        net, optimizer = two_groups()
        change(optimizer.state[net[3].weight])
        before = snapshot(net)
        with refuses(ValueError, match):
            optimizer.step()
        assert_same_state(snapshot(net), before)
    net, optimizer = ramping()
    state = optimizer.state[net[3].weight]
    state["count"] = state["count"].to(torch.int16)
    with refuses(ValueError, "count must be uint8, laid out as its parameter"):
        optimizer.step()


@pytest.mark.parametrize(("change", "match"), BAD_RAMP)
def test_a_state_of_qramping_that_cannot_be_used(change, match):
    net, optimizer = ramping()
    change(optimizer.state[net[3].weight])
    before = snapshot(net, optimizer)
    with refuses(ValueError, rf"QRamping\.step: {match}"):
        optimizer.step()
    assert_same_state(snapshot(net, optimizer), before)


@pytest.mark.parametrize(("change", "match", "make"), [
    *((*bad, two_groups) for bad in BAD_SAVED), *((*bad, ramping) for bad in BAD_SAVED_RAMP)
])  # fmt: skip
def test_a_saved_state_is_refused_before_it_is_taken(change, match, make):
    """In the last parameter that has one of this shape; the first group's would have been taken."""
    net, optimizer = make()
    saved = copy.deepcopy(optimizer.state_dict())
    train(net, optimizer, 1, first=1)
    before = snapshot(net, optimizer)
    saved["state"][1]["exp_avg"].fill_(7.0)
    change(saved["state"][0])
    with refuses(ValueError, rf"load_state_dict: {match}"):
        optimizer.load_state_dict(saved)
    assert_same_state(snapshot(net, optimizer), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks


@pytest.mark.parametrize(
    ("state_dict", "error", "match"),
    [
        (3, TypeError, "state_dict must be a state_dict of an optimizer, got 3"),
        ({"state": {}}, TypeError, "state_dict must be a state_dict of an optimizer"),
        ({"state": {}, "param_groups": [{"params": [0]}]}, ValueError,
         r"state_dict must have groups of \[2, 6\] parameters, got \[1\]"),
        ({"state": {0: 3}, "param_groups": [{"params": [0, 1]}, {"params": [2, 3, 4, 5, 6, 7]}]},
         TypeError, "state_dict must have a dict of states for each parameter, got 3"),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(state_dict, error, match):
    net, optimizer = two_groups()
    before = snapshot(net, optimizer)
    with refuses(error, match):
        optimizer.load_state_dict(state_dict)
    assert_same_state(snapshot(net, optimizer), before)


def test_what_hooks_make_of_a_state_dict_is_checked_and_taken():
    _, optimizer = two_groups()
    saved = copy.deepcopy(optimizer.state_dict())
    other = copy.deepcopy(saved)
    other["state"][0]["exp_avg"].fill_(7.0)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: other)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state_dict()))
    optimizer.load_state_dict(saved)
    assert_same_state(optimizer.state_dict(), other)
    assert_same_state(seen[0], other)
    other["state"][0]["exp_avg"] = SQUARE
    with refuses(ValueError, "exp_avg must be"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"capturable": True}])
def test_options_that_torchs_adamw_saves_are_no_obstacle(options):
    """amsgrad and maximize are in its checkpoints, off."""
    net = model()
    theirs = torch.optim.AdamW(net.parameters(), **OPTIONS)
    train(net, theirs, 2)
    saved = copy.deepcopy(theirs.state_dict())
    assert saved["param_groups"][0]["amsgrad"] is False
    saved["param_groups"][0].update(options)
    saved["state"][0]["step"] = 2  # as torch kept it once
    optimizer = AdamW(net.parameters(), lr=0.5)
    optimizer.load_state_dict(saved)
    train(net, optimizer, 1, first=2)
    assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}


def test_a_saved_state_is_laid_out_as_the_parameter():
    """Elements go together, whatever the strides that were saved."""
    w = gaussian(4, 6, 3, 3)
    nets = [nn.Parameter(w.to(memory_format=f).clone(memory_format=f))
            for f in (torch.contiguous_format, torch.channels_last)]  # fmt: skip
    optimizers = [AdamW([p], **OPTIONS) for p in nets]
    nets[0].grad = gaussian(4, 6, 3, 3, seed=1)
    optimizers[0].step()
    with torch.no_grad():
        nets[1].copy_(nets[0])
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for p, optimizer in zip(nets, optimizers, strict=True):
        p.grad = gaussian(4, 6, 3, 3, seed=2)
        optimizer.step()
    assert_same_bytes(nets[1].detach().contiguous(), nets[0].detach())


def test_a_count_beyond_a_byte_survives_a_load():
    net, optimizer = two_groups(QRamping, max_period=300)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["count"].fill_(299)
    saved["param_groups"][0]["max_period"] = 9
    optimizer.load_state_dict(saved)
    count = optimizer.state[net[0].weight]["count"]
    assert count.dtype == torch.int16 and (count == 299).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_reads_no_learning_rate_on_the_device():
    p = nn.Parameter(torch.ones(3, device="cuda"))
    with refuses(ValueError, "lr must lie in"):
        AdamW([p], lr=torch.tensor(-1.0, device="cuda"))
    lr = torch.tensor(0.1, device="cuda", dtype=torch.float64)
    optimizer = AdamW([p], lr=lr)
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    optimizer.param_groups[0]["lr"] = torch.ones(2, device="cuda")
    before = p.detach().clone()
    with refuses(ValueError, f"lr must {REAL}"):
        optimizer.step()
    assert torch.equal(p, before)
