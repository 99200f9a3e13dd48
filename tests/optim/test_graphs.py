"""Optimizer steps in CUDA graphs, and of tensors beyond 32 bits."""

from __future__ import annotations

import copy

import pytest
import torch
from common import assert_same_bytes, refuses
from optim_common import NUMBERS, OPS, OPTIONS, assert_same_state, gaussian, model, snapshot
from torch import nn

import mxtrain
from mxtrain import reference
from mxtrain.optim import AdamW, QRamping
from mxtrain.weight_cache import _Steps

pytestmark = [
    pytest.mark.ops(*OPS),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def _forget_captures(monkeypatch):
    """A captured step ends the keeping of packed weights in the process; not for other tests."""
    monkeypatch.setattr(_Steps, "captured", False)


# An average of constant memory: replays repeat how far its update goes.
EMA = mxtrain.get_recipe("tetrajet_ema").replace(ema_fraction=None, ema_at_half=None)


def ready(recipe=EMA, steps=12, ramping=False):
    """A model on the GPU and its optimizer after some steps on given gradients."""
    net = model(recipe, "cuda")
    lr = torch.tensor(1e-2, dtype=torch.float64, device="cuda")
    options = {**OPTIONS, "lr": lr}
    if ramping:
        optimizer = QRamping(net.parameters(), net, max_period=9, **options)
    else:
        optimizer = AdamW(net.parameters(), **options)
    for p in net.parameters():
        p.grad = gaussian(*p.shape, seed=p.numel()).cuda()
    for _ in range(steps):
        optimizer.step()
    if ramping:
        optimizer.state[net[0].weight]["period"].fill_(3)
    return net, optimizer, lr


@pytest.mark.parametrize("ramping", [False, True], ids=["adamw", "qramping"])
def test_replays_are_steps(ramping):
    """The step count, the learning rate and the gradients are read on the device."""
    recipe = "tetrajet" if ramping else EMA
    (net, optimizer, lr), (twin, other, other_lr) = (ready(recipe, ramping=ramping),
                                                     ready(recipe, ramping=ramping))  # fmt: skip
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for i in range(5):
        for rate in (lr, other_lr):
            rate.fill_(1e-2 / (i + 1))
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            p.grad.mul_(0.9)
            q.grad.mul_(0.9)
        graph.replay()
        other.step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert_same_bytes(p.detach(), q.detach())
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, other.state[q][name]), name
    for a, b in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ramping", [False, True], ids=["adamw", "qramping"])
def test_a_step_does_not_wait_for_the_device(ramping):
    _, optimizer, _ = ready("tetrajet" if ramping else EMA, ramping=ramping)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_capture_repeats_the_memory_of_the_last_learning_rate():
    """ema_at_half reads a learning rate on the device outside of captures; replays have its s."""
    net, optimizer, lr = ready(EMA.replace(ema_at_half=0.5))  # 12 steps at the peak
    assert torch.equal(net[0].weight_ema, net[0].weight)
    lr.fill_(5e-3)
    optimizer.step()
    amount = net[0].ema_step
    assert amount == 1 / (1 + 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        before = net[0].weight_ema.clone()
        graph.replay()
        after = net[0].weight.detach()
        assert torch.equal(net[0].weight_ema, before.lerp(after, amount))


def test_a_capture_before_the_first_step_is_refused():
    net, optimizer, _ = ready(steps=0)
    before = snapshot(net, optimizer)
    with refuses(RuntimeError, "state must exist before a CUDA graph is captured"):
        captured(optimizer.step)
    assert_same_state(snapshot(net, optimizer), before)
    plain = model("tetrajet", "cuda")
    optimizer = AdamW(plain.parameters(), lr=torch.tensor(0.1))
    for p in plain.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with refuses(RuntimeError, "a tensor lr must be on the device before a CUDA graph"):
        captured(optimizer.step)
    plain[0].recipe = "tetrajet_ema"
    optimizer.param_groups[0]["lr"] = 0.1
    with refuses(RuntimeError, "the average of the weights must start before a CUDA graph"):
        captured(optimizer.step)


def test_a_calibration_in_a_capture_is_refused():
    net, optimizer, _ = ready("tetrajet", ramping=True)
    before = snapshot(net, optimizer)
    with refuses(RuntimeError, "calibration must be called outside, got a call in a CUDA graph"):
        captured(lambda: optimizer.calibrate(lambda: None))
    assert_same_state(snapshot(net, optimizer), before)


def captured(call) -> None:
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        call()


def test_torchs_foreach_kernels_give_the_same_bits():
    """Gradients over seven decades, so that every operation rounds."""
    shapes = [(257, 33), (64,), (5, 7, 3)]
    params = [[nn.Parameter(gaussian(*s, seed=i).cuda()) for i, s in enumerate(shapes)]
              for _ in range(2)]  # fmt: skip
    theirs = copy.deepcopy(params[1])
    optimizers = AdamW(params[0], **OPTIONS), torch.optim.AdamW(theirs, **OPTIONS, foreach=True)
    for i in range(100):
        for mine, other in zip(params[0], theirs, strict=True):
            mine.grad = gaussian(*mine.shape, seed=i).cuda() * 10.0 ** (i % 7 - 3)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(params[0], theirs, strict=True):
        assert_same_bytes(mine.detach(), other.detach())


@pytest.mark.slow
def test_elements_beyond_2_to_31_are_updated():
    n = 2**31 + 2048 + 5
    p = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros_like(p)
    m, v = (torch.zeros(n, device="cuda") for _ in range(2))
    ends = torch.tensor([0, 2**31 - 1, 2**31, n - 1])
    g[ends.cuda()] = torch.tensor([1.0, -2.0, 3.0, -4.0]).bfloat16().cuda()
    step = torch.zeros((), device="cuda")
    torch.ops.mxtrain.adamw_([p], [g], [m], [v], [step], *NUMBERS, None, None, [], [], [], [])
    zero, f = torch.zeros(4), reference.factors(1, *NUMBERS)
    expected = reference.adamw(zero, g[ends.cuda()].float().cpu(), zero, zero, f)
    assert_same_bytes(p[ends.cuda()], expected[0].bfloat16())
    assert_same_bytes(v[ends.cuda()], expected[2])
    assert int(p.count_nonzero()) == 4
