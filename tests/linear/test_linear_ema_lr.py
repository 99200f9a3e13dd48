"""Q-EMA with ema_at_half: what the average remembers at a learning rate, its state, bad input."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from linear_common import run, tensors
from torch import nn
from torch.optim import SGD

import mxtrain
from mxtrain.linear import MXLinear, linear, update_weight_ema
from mxtrain.recipe import RECIPES

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")
RECIPE = RECIPES["tetrajet_ema"].replace(ema_beta=0.9, ema_warmup=1, ema_at_half=0.25)
RATES = (0.0, 0.25, 0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.1, 2.0, 1.0, 1e-9)
# peak / lr - 1 at these steps; the peak is 1 up to the step at 2
COOLED = (0, 0, 0, 0, 0, 1 / 3, 1, 3, math.inf, 9, 0, 1, 2e9)


def step(layer, optimizer, seed=0, lr=None):
    g = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups if lr is not None else ():
        group["lr"] = lr
    for p in layer.parameters():
        p.grad = torch.randn(p.shape, generator=g).to(p)
    optimizer.step()


def amount(n, cooled, at_half=0.25, beta=0.9):
    """How far update n + 1 goes, by the definition."""
    return 1.0 if n == 0 else max(1 - beta, 1 / (1 + at_half * cooled))


@pytest.mark.parametrize("kind", [SGD, torch.optim.AdamW, mxtrain.optim.AdamW])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_the_memory_follows_the_learning_rate(kind, as_tensor, device):
    """Bitwise, by the hook and within mxtrain's step; the weight itself while lr is at its peak."""
    layer, expected = MXLinear(64, 64, device=device, recipe=RECIPE), None
    optimizer = kind(
        layer.parameters(), lr=torch.tensor(0.1) if as_tensor and kind is not SGD else 0.1
    )
    for i, (rate, cooled) in enumerate(zip(RATES, COOLED, strict=True)):
        lr = 0.125 * rate  # a power of two: the ratios are exact
        step(layer, optimizer, i, torch.tensor(lr, dtype=torch.float64) if as_tensor else lr)
        w = layer.weight.detach()
        expected = w.clone() if i == 0 else torch.lerp(expected, w, amount(i, cooled))
        assert torch.equal(layer.weight_ema, expected), i
        if cooled == 0:
            assert torch.equal(layer.weight_ema, w)


def test_the_shorter_memory_counts():
    recipe = RECIPE.replace(ema_beta=0.98, ema_fraction=0.5, ema_at_half=12.0)
    layer, steps = MXLinear(32, 32, recipe=recipe), []
    optimizer = SGD(layer.parameters(), lr=1.0)
    for i in range(60):
        lr = 1.0 if i < 20 else 0.5 if i < 40 else 0.125
        step(layer, optimizer, i, lr)
        layer._ema_updates -= 1  # as it was for this step
        steps.append(layer.ema_step)
        layer._ema_updates += 1
    assert steps[:20] == [1.0] * 20
    # ema_fraction up to update 24 and at an eighth of the peak, where ema_at_half has 84
    assert steps[20:40] == [1 / (1 + min(0.5 * n, 12.0)) for n in range(20, 40)]
    assert steps[40:] == [1 / (1 + 0.5 * n) for n in range(40, 60)]


def test_what_the_default_remembers():
    """The same after any number of steps; the paper's beta where lr is next to nothing."""
    layer = MXLinear(32, 32, recipe="tetrajet_ema")
    layer.see_lr(1e-3)
    for updates, lr, memory in (
        (100, 5e-4, 0.03), (100_000, 5e-4, 0.03), (1000, 1e-4, 0.27), (1000, 1e-5, 2.97),
        (1000, 1e-9, 499.0), (1000, 0.0, 499.0), (100_000, 1e-3, 0.0),
    ):  # fmt: skip
        layer._ema_updates = updates
        layer.see_lr(lr)
        assert 1 / layer.ema_step - 1 == pytest.approx(memory, rel=1e-9, abs=1e-9)


def test_at_the_peak_it_is_tetrajet(device):
    """A constant learning rate, a warm-up: every byte of forward and backward, ties aside."""
    recipe = RECIPES["tetrajet_ema"].replace(ema_warmup=0)
    layer = MXLinear(64, 64, device=device, recipe=recipe)
    optimizer = mxtrain.optim.AdamW(layer.parameters(), lr=0.01)
    for i in range(5):
        step(layer, optimizer, i, 0.002 * (i + 1))
    assert layer.ema_active and torch.equal(layer.weight_ema, layer.weight)
    x, _, _, dy = tensors(48, k=64, c=64, device=device)
    w, b = (p.detach().requires_grad_() for p in (layer.weight, layer.bias))
    got = run(lambda *a: linear(*a, recipe, layer.weight_ema), x, w, b, dy)
    want = run(lambda *a: linear(*a, "tetrajet"), x, w, b, dy)
    assert all(torch.equal(p, q) for p, q in zip(got, want, strict=True))


def test_groups_have_their_own_learning_rates():
    net = nn.Sequential(MXLinear(32, 32, recipe=RECIPE), MXLinear(32, 32, recipe=RECIPE))
    groups = [{"params": layer.parameters(), "lr": 1.0} for layer in net]
    for kind in (SGD, mxtrain.optim.AdamW):
        optimizer = kind(groups, lr=1.0)
        step(net, optimizer)
        optimizer.param_groups[1]["lr"] = 0.5
        step(net, optimizer)
        assert net[0].ema_step == 1.0
        assert net[1].ema_step == 1 / (1 + 0.25)


def test_an_optimizer_without_a_learning_rate_is_at_its_peak():
    class Odd(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    p -= 0.1 * p.grad

    layer = MXLinear(32, 32, recipe=RECIPE)
    for i in range(4):
        step(layer, Odd(layer.parameters()), i)
        assert torch.equal(layer.weight_ema, layer.weight)
    assert layer._ema_updates == 4


# ---- stability ----

MU = 0.9
EDGE = 2 * (1 + MU) / (1 - MU)  # of the step times the curvature, without an average: 38


def growth(eta_h, b):
    """Largest |eigenvalue| of a step of momentum MU on a quadratic whose gradient is that of the
    average: m' = MU m + (1 - MU) a, w' = w - eta_h m', a' = b a + (1 - b) w'.
    """
    w, m, a = np.eye(3)
    m = MU * m + (1 - MU) * a
    w = w - eta_h * m
    a = b * a + (1 - b) * w
    return np.abs(np.linalg.eigvals([w, m, a])).max()


def test_an_average_is_stable_up_to_1_over_mu_b_less_1():
    assert growth(0.999 * EDGE, 0.0) < 1 < growth(1.001 * EDGE, 0.0)
    for b in (0.03, 0.1, 0.5, 0.9, 0.998):
        bound = 1 / (MU * b) - 1
        assert growth(0.999 * bound, b) < 1 < growth(1.001 * bound, b)
        polynomial = np.poly([1, MU, b]) + np.array([0, bound * (1 - MU) * (1 - b), 0, 0])
        assert np.abs(np.roots(polynomial)).max() == pytest.approx(1, abs=1e-9)


def test_the_default_is_stable_on_what_is_stable_at_the_peak():
    """Where the curvature is at the edge for the peak; and it is within a tenth of the bound."""
    layer, shares = MXLinear(32, 32, recipe="tetrajet_ema"), []
    layer.see_lr(1.0)
    layer._ema_updates = 100
    for r in np.geomspace(1e-6, 0.999, 400):
        layer.see_lr(float(r))
        b = 1 - layer.ema_step
        assert growth(EDGE * r, b) < 1
        shares.append(b * MU * (EDGE * r + 1))
        if r > 0.03:
            assert b / (1 - b) * r < (1 - MU) / (2 * MU * (1 + MU))
    assert 0.9 < max(shares) < 1


# ---- state ----


def test_the_peak_is_saved_and_goes_on_bitwise(tmp_path):
    layer = MXLinear(64, 64, recipe=RECIPE)
    optimizer = SGD(layer.parameters(), lr=0.5)
    for i, lr in enumerate((0.1, 0.5, 0.3)):
        step(layer, optimizer, i, lr)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    state = torch.load(tmp_path / "layer.pt", weights_only=True)
    assert set(state) == {"weight", "bias", "weight_ema", "ema_updates", "ema_peak_lr"}
    assert state["ema_peak_lr"].dtype == torch.float64 and state["ema_peak_lr"] == 0.5
    again = MXLinear(64, 64, recipe=RECIPE)
    again.load_state_dict(state, strict=True)
    for m in (layer, again, copy.deepcopy(layer)):
        step(m, SGD(m.parameters(), lr=0.1), 9)
        assert m.ema_step == 1 / (1 + 0.25 * (0.5 / 0.1 - 1))
        assert torch.equal(m.weight_ema, layer.weight_ema)


def test_a_checkpoint_without_a_peak_begins_with_the_next_step():
    """One that another recipe wrote. With it the average is kept; it starts at the weight again."""
    layer = MXLinear(64, 64, recipe=RECIPE.replace(ema_at_half=None))
    for i in range(3):
        step(layer, SGD(layer.parameters(), lr=0.5), i)
    again = MXLinear(64, 64, recipe=RECIPE)
    again.load_state_dict(layer.state_dict(), strict=True)
    assert again._ema_updates == 3 and torch.equal(again.weight_ema, layer.weight_ema)
    step(again, SGD(again.parameters(), lr=0.1))
    assert torch.equal(again.weight_ema, again.weight)
    layer.load_state_dict(again.state_dict(), strict=True)  # nor does the other need it


def test_other_weights_start_anew():
    layer = MXLinear(64, 64, recipe=RECIPE)
    for forget in (
        layer.reset_parameters,
        lambda: layer.load_state_dict(nn.Linear(64, 64).state_dict()),
    ):
        for i in range(3):
            step(layer, SGD(layer.parameters(), lr=0.5 / (i + 1)), i)
        assert layer._ema_peak_lr == 0.5
        forget()
        assert (layer._ema_updates, layer._ema_peak_lr) == (0, 0.0)


# ---- bad input ----


@pytest.mark.parametrize(
    "peak", ["x", 3, torch.ones(2), torch.tensor(1), torch.tensor(-1.0), torch.tensor(math.nan)]
)
def test_a_peak_that_is_none_is_refused(peak):
    layer = MXLinear(32, 32, recipe=RECIPE)
    step(layer, SGD(layer.parameters(), lr=0.5))
    state = {**layer.state_dict(), "ema_peak_lr": peak}
    layer = MXLinear(32, 32, recipe=RECIPE)
    with pytest.raises(
        RuntimeError, match="mxtrain::load_state_dict: ema_peak_lr must be one finite"
    ):
        layer.load_state_dict(state)
    assert (layer._ema_updates, layer._ema_peak_lr) == (0, 0.0)


def test_an_update_by_hand_needs_the_learning_rate():
    layer = MXLinear(32, 32, recipe=RECIPE)
    with pytest.raises(
        ValueError, match="lr must be given where a recipe has ema_at_half, got None"
    ):
        update_weight_ema([layer])
    with pytest.raises(ValueError, match="lr must be a number of at least 0, got nan"):
        update_weight_ema([layer], math.nan)
    assert layer._ema_updates == 0
    for lr in (1.0, 0.5):
        before = layer.weight_ema.clone()
        with torch.no_grad():
            layer.weight.add_(1)
        update_weight_ema([layer], lr)
    assert torch.equal(layer.weight_ema, before.lerp(layer.weight.detach(), 1 / (1 + 0.25)))
