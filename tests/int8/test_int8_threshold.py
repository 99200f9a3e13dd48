"""The threshold that decides which blocks fall back: its state in a layer, and when it moves.

Its rule is in test_int8_threshold_rule.py.
"""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from common import refuses
from torch import nn
from torch.utils.checkpoint import checkpoint

import mxtrain
from mxtrain import MXLinear, fallback
from mxtrain.fallback import update_fallback_thresholds
from mxtrain.int8 import block_amax
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback", "int8_gemm")
RECIPE = RECIPES["int8_fallback"]


def layer_and_optimizer(device="cpu", **changes):
    torch.manual_seed(0)
    layer = MXLinear(1280, 128, device=device, recipe=RECIPE.replace(**changes))
    return layer, torch.optim.SGD(layer.parameters(), lr=1e-3)


def tokens(n=256, scale=1.0, device="cpu"):
    x = torch.randn(n, 1280, device=device) * scale
    return x * torch.logspace(-1, 1, 10, device=device).repeat_interleave(128)


def train(layer, optimizer, x):
    layer(x).square().mean().backward()
    optimizer.step()


def test_a_call_uses_the_old_threshold(device):
    """T15: what is reported is mean(amax > threshold); it moves after the step, not before."""
    layer, optimizer = layer_and_optimizer(device)
    train(layer, optimizer, tokens(device=device))
    for scale in (8.0, 8.0, 0.1):
        x = tokens(scale=scale, device=device)
        before = layer.fallback_threshold.clone()
        layer(x).square().mean().backward()
        rate = (block_amax(x) > before).float().mean()
        assert layer.fallback_rate() == rate and torch.equal(layer.fallback_threshold, before)
        optimizer.step()
        factor = {True: 1.3, False: 1 / 1.3}[scale > 1] if not 0.1 <= rate <= 0.3 else 1.0
        got = float(layer.fallback_threshold / before)
        assert got == pytest.approx(factor, rel=1e-6) or scale < 1  # a turn: the damped factor
        assert layer.fallback_counts.tolist() == [0, 0, 0]
        assert layer.last_fallback_rate() == rate and layer.fallback_rate().isnan()


def test_micro_batches_share_one_update(device):
    layer, optimizer = layer_and_optimizer(device)
    train(layer, optimizer, tokens(device=device))
    before = layer.fallback_threshold.clone()
    for scale in (0.01, 100.0, 0.01):
        layer(tokens(scale=scale, device=device)).square().mean().backward()
    assert torch.equal(layer.fallback_threshold, before)
    assert layer.fallback_counts.tolist() == [20, 0, 60]
    optimizer.step()
    assert torch.allclose(layer.fallback_threshold, before * 1.3)


def test_evaluation_changes_nothing(device):
    layer, optimizer = layer_and_optimizer(device)
    fresh = copy.deepcopy(layer).eval()
    x = tokens(device=device)
    assert torch.equal(fresh(x), mxtrain.linear(x, layer.weight, layer.bias, layer.recipe))
    assert not fresh.fallback_threshold.any() and not fresh._fallback_started
    train(layer, optimizer, x)
    state = {k: v.clone() for k, v in layer.eval().state_dict().items()}
    layer(tokens(scale=9.0, device=device))
    optimizer.step()
    for name in ("fallback_threshold", "fallback_step", "fallback_counts"):
        assert torch.equal(layer.state_dict()[name], state[name])


def test_zeros_are_no_evidence(device):
    """An idle expert: the threshold waits, and blocks of zeros among others count for nothing."""
    layer, optimizer = layer_and_optimizer(device)
    train(layer, optimizer, tokens(device=device))
    before = layer.fallback_threshold.clone()
    for _ in range(5):
        train(layer, optimizer, torch.zeros(256, 1280, device=device))
        assert layer.last_fallback_rate().isnan() and layer.last_nonfinite_rate().isnan()
    assert torch.equal(layer.fallback_threshold, before)
    x = tokens(128, 100.0, device)
    layer(F.pad(x, (0, 0, 0, 128 * 9)))
    assert layer.fallback_counts.tolist() == [10, 0, 10] and layer.fallback_rate() == 1
    fresh, optimizer = layer_and_optimizer(device)
    for _ in range(3):
        train(fresh, optimizer, torch.zeros(256, 1280, device=device))
    assert float(fresh.fallback_threshold) == 1.0


def test_nan_is_counted_by_itself(device):
    layer, optimizer = layer_and_optimizer(device)
    x = tokens(device=device)
    train(layer, optimizer, x)
    before, rate = layer.fallback_threshold.clone(), layer.last_fallback_rate()
    bad = x.clone()
    bad[::128, : 128 * 5] = torch.nan
    with torch.no_grad():
        layer(bad)
    assert layer.fallback_counts[1:].tolist() == [10, 20] and layer.nonfinite_rate() == 0.5
    layer.fallback_counts.zero_()
    with torch.no_grad():
        layer(torch.full_like(x, torch.nan))
    optimizer.step()
    assert torch.equal(layer.fallback_threshold, before)
    assert layer.last_nonfinite_rate() == 1 and layer.last_fallback_rate().isnan()
    assert 0 < rate < 1


def test_an_optimizer_moves_what_it_holds():
    """Two models: a step of one leaves the other, in the middle of its own, as it is. A frozen
    weight that no optimizer has held moves with any."""
    (a, of_a), (b, of_b) = layer_and_optimizer(), layer_and_optimizer()
    train(a, of_a, tokens())
    train(b, of_b, tokens())
    before = b.fallback_threshold.clone()
    b(tokens(scale=100.0)).sum().backward()
    train(a, of_a, tokens())
    assert torch.equal(b.fallback_threshold, before) and b.fallback_counts.tolist() == [20, 0, 20]
    b.requires_grad_(False)  # a discriminator, while the generator steps
    train(a, of_a, tokens())
    assert torch.equal(b.fallback_threshold, before) and b.fallback_counts.tolist() == [20, 0, 20]
    of_b.step()
    assert torch.allclose(b.fallback_threshold, before * 1.3)
    frozen, _ = layer_and_optimizer()
    frozen.requires_grad_(False)
    frozen(tokens())
    before = frozen.fallback_threshold.clone()
    frozen(tokens(scale=100.0))
    frozen(tokens(scale=100.0))
    train(a, of_a, tokens())
    assert torch.allclose(frozen.fallback_threshold, before * 1.3)


def test_layers_that_share_an_input_have_equal_thresholds():
    q, k = (MXLinear(1280, n, recipe=RECIPE) for n in (128, 64))
    optimizer = torch.optim.SGD([*q.parameters(), *k.parameters()], lr=1e-3)
    for scale in (1.0, 9.0, 9.0, 0.1):
        x = tokens(scale=scale)
        (q(x).square().mean() + k(x).square().mean()).backward()
        optimizer.step()
        assert torch.equal(q.fallback_threshold, k.fallback_threshold)
        assert torch.equal(q.fallback_step, k.fallback_step)


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_meets_the_threshold_of_the_forward(device, reentrant):
    results = []
    for again in (False, True):
        layer, optimizer = layer_and_optimizer(device)
        layer.train()
        for step in range(3):
            torch.manual_seed(step)
            x = tokens(scale=1.0 + 5 * step, device=device).requires_grad_()
            y = checkpoint(layer, x, use_reentrant=reentrant) if again else layer(x)
            y.square().mean().backward()
            optimizer.step()
        results.append((layer.weight.grad, x.grad, layer.fallback_threshold, layer.fallback_step))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_state_survives_a_checkpoint(device):
    layer, optimizer = layer_and_optimizer(device)
    for scale in (1.0, 9.0, 9.0):
        train(layer, optimizer, tokens(scale=scale, device=device))
    layer(tokens(device=device))  # in the middle of a step
    other, others = layer_and_optimizer(device)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    first = layer.fallback_threshold.clone()
    for step, scale in enumerate((30.0, 30.0, 1.0, 0.01)):  # T15: on, to the bit
        for one, its in ((layer, optimizer), (other, others)):
            torch.manual_seed(step)
            its.zero_grad()
            train(one, its, tokens(scale=scale, device=device))
        for name, value in layer.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), (step, name)
    assert not torch.equal(layer.fallback_threshold, first)
    x = tokens(scale=3.0, device=device)
    assert torch.equal(layer(x), other(x))
    plain = nn.Linear(1280, 128, device=device)
    other.load_state_dict(plain.state_dict())  # starts anew
    assert not other.fallback_threshold.any() and not other._fallback_started


@pytest.mark.parametrize(
    "key, value",
    [
        ("threshold", [float("nan")]), ("threshold", [float("inf")]), ("threshold", [-1.0]),
        ("threshold", [1.0, 1.0]), ("step", [float("nan")]), ("step", [0.5]), ("step", [1.0, 1.0]),
        ("counts", [-1, 0, 5]), ("counts", [3, 3, 5]), ("counts", [1, 2]), ("counts", [1.0, 0, 5]),
    ],
)  # fmt: skip
def test_a_layer_that_refuses_a_state_loads_nothing(key, value):
    layer, optimizer = layer_and_optimizer()
    train(layer, optimizer, tokens())
    kept = copy.deepcopy(layer.state_dict())
    bad = {k: v + 1 for k, v in kept.items()}
    bad[f"fallback_{key}"] = torch.tensor(value)
    with pytest.raises(RuntimeError, match=f"mxtrain::load_state_dict: fallback_{key} must be"):
        layer.load_state_dict(bad)
    assert all(torch.equal(v, kept[k]) for k, v in layer.state_dict().items())
    assert layer._fallback_started and torch.equal(
        layer.trained_threshold(), kept["fallback_threshold"]
    )


def test_a_state_may_be_assigned_in_other_forms():
    layer, optimizer = layer_and_optimizer()
    train(layer, optimizer, tokens())
    state = layer.state_dict()
    state["fallback_threshold"] = layer.fallback_threshold.double()[0]
    other = MXLinear(1280, 128, device="meta", recipe=RECIPE)
    other.load_state_dict(state, assign=True)
    loaded = other.fallback_threshold
    assert loaded.dtype == torch.float32 and loaded.shape == (1,)
    assert torch.equal(other(tokens() * 0), layer(tokens() * 0)) and other._fallback_started


def test_initialization_starts_anew():
    """What to_empty leaves is arbitrary memory; here it is what a layer must not believe."""
    layer, optimizer = layer_and_optimizer()
    train(layer, optimizer, tokens())
    layer.reset_parameters()
    fresh = (0.0, 0.0, [0, 0, 0], False, None)

    def state(layer):
        own = layer.fallback_threshold.item(), layer.fallback_step.item()
        counts = layer.fallback_counts.tolist()
        return *own, counts, layer._fallback_started, layer.last_fallback_rate()

    assert state(layer) == fresh

    def garbage(t):
        return torch.full_like(t, 7 if t.dtype == torch.int64 else -2.2e12, device="cpu")

    meta = MXLinear(1280, 128, device="meta", recipe=RECIPE)
    meta(tokens().to("meta"))
    assert state(meta._apply(garbage)) == fresh
    train(layer, optimizer, tokens())
    assert state(layer._apply(garbage)) == fresh
    layer.reset_parameters()
    train(layer, torch.optim.SGD(layer.parameters(), lr=1e-3), tokens())
    before = state(layer)[:4]
    assert state(layer.to(torch.float64))[:4] == before == state(layer.cpu().float())[:4]
    assert before[0] > 0 and layer.fallback_threshold.dtype == torch.float32


def test_the_state_comes_and_goes_with_the_recipe():
    layer, _ = layer_and_optimizer()
    layer.recipe = "int8_block"
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.recipe = RECIPE
    layer.bfloat16()
    assert layer.fallback_threshold.dtype == layer.fallback_step.dtype == torch.float32
    assert layer.fallback_counts.dtype == torch.int64
    meta = MXLinear(8, 8, device="meta", recipe=RECIPE)
    assert meta.fallback_threshold.is_meta


def test_dead_layers_leave_and_frozen_weights_stay():
    layer, _ = layer_and_optimizer()
    layer.weight.requires_grad_(False)
    head = nn.Linear(128, 1)
    train(nn.Sequential(layer, head), torch.optim.SGD(head.parameters(), lr=0.1), tokens())
    before = layer.fallback_threshold.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    train(nn.Sequential(layer, head), optimizer, tokens(scale=20.0))
    assert (layer.fallback_threshold > before).all()
    key = id(layer)
    assert key in fallback._LAYERS
    del layer
    gc.collect()
    train(head, optimizer, torch.randn(4, 128))
    assert key not in fallback._LAYERS


def test_the_counts_are_summed_over_ranks(monkeypatch):
    """Two ranks, of which the other has counted as many blocks, all of them fallen back."""
    layer, optimizer = layer_and_optimizer()
    train(layer, optimizer, tokens())
    before = layer.fallback_threshold.clone()
    groups = []

    def all_reduce(t, op=torch.distributed.ReduceOp.SUM, group=None):
        if op == torch.distributed.ReduceOp.SUM:
            groups.append(group)
            t += torch.stack([t[:, 2], t[:, 1], t[:, 2]], 1)

    monkeypatch.setattr(fallback.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(fallback.dist, "all_reduce", all_reduce)
    layer(tokens(scale=1e-3))
    update_fallback_thresholds([layer])
    assert groups == [None] and torch.allclose(layer.fallback_threshold, before * 1.3)
    fallback.set_fallback_group(local=True)
    try:
        layer(tokens(scale=1e-3))
        update_fallback_thresholds([layer])
    finally:
        fallback.set_fallback_group()
    assert groups == [None] and (layer.fallback_threshold < before * 1.3).all()


def test_under_compile(device):
    nearest = mxtrain.Quantizer("int8_block")  # compiled code draws other numbers
    layer, optimizer = layer_and_optimizer(device, dgrad_dy=nearest, wgrad_dy=nearest)
    other = copy.deepcopy(layer)
    second = torch.optim.SGD(other.parameters(), lr=1e-3)
    compiled = torch.compile(other, fullgraph=True)
    for scale in (1.0, 9.0, 9.0, 0.2):
        x = tokens(scale=scale, device=device)
        y, z = layer(x), compiled(x)
        assert torch.equal(y, z)
        for loss, step in ((y, optimizer), (z, second)):
            loss.square().mean().backward()
            step.step()
            step.zero_grad()
        assert torch.equal(layer.fallback_threshold, other.fallback_threshold)


def test_refusals():
    x, w = torch.randn(8, 16), torch.randn(4, 16)
    with refuses(ValueError, match="threshold must be None without a fallback"):
        mxtrain.linear(x, w, None, "int8_block", threshold=torch.ones(1))
    with refuses(ValueError, match="threshold must be one float32"):
        mxtrain.linear(x, w, None, "int8_fallback", threshold=torch.ones(2))
    with refuses(TypeError, match="layers must be made of MXLinear"):
        update_fallback_thresholds([nn.Linear(2, 2)])


# ---- what the fallback is for ----


@pytest.mark.parametrize(
    "wgrad, low, high",
    [("on", 0.999, 1.001), ("off_rtn", 0.88, 0.92), ("off_sr", 0.995, 1.005)],
)
def test_the_slope_of_the_weight_gradient(wgrad, low, high, device):
    """T16: INT8 alone loses the bulk of the blocks that hold an outlier, a tenth of dW here."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 1024, generator=g)
    chosen = torch.randperm(128, generator=g)[:13]
    rows, cols = chosen // 8 * 128 + 5, chosen % 8 * 128 + 77
    x[rows, cols] = 1000.0
    dy = torch.randn(2048, 256, generator=g)
    x, dy = x.to(device), dy.to(device)
    w = torch.zeros(256, 1024, device=device, requires_grad=True)
    square = mxtrain.Quantizer("int8_block")
    again = {
        "on": RECIPE.wgrad_x,
        "off_rtn": mxtrain.Quantizer("int8_block", source="forward"),
        "off_sr": mxtrain.Quantizer("int8_block", rounding="stochastic"),
    }[wgrad]
    recipe = RECIPE.replace(wgrad_x=again, wgrad_dy=square, dgrad_dy=square)
    threshold = torch.full((1,), 10.0, device=device)
    mxtrain.linear(x, w, None, recipe, threshold=threshold).backward(dy)
    exact = dy.double().T @ x.double()
    bulk = torch.ones(1024, dtype=torch.bool)
    bulk[cols] = False
    got, want = w.grad.double().cpu()[:, bulk], exact.cpu()[:, bulk]
    slope = float((got * want).sum() / (want * want).sum())
    assert low <= slope <= high
