"""The rule by which the threshold moves that decides which blocks fall back, without a layer."""

from __future__ import annotations

import pytest
import torch
from common import refuses

import mxtrain
from mxtrain.fallback import initial_threshold, next_threshold
from mxtrain.int8 import block_amax
from mxtrain.recipe import RECIPES, Fallback

pytestmark = pytest.mark.ops("int8_quantize", "int8_quantize_fallback", "int8_gemm")
RECIPE = RECIPES["int8_fallback"]


class Simulation:
    """The rule on a list of block maxima, without a layer."""

    def __init__(self, threshold, recipe=RECIPE):
        self.recipe = recipe
        self.threshold, self.step = torch.tensor([threshold]), torch.zeros(1)
        self.rates, self.thresholds = [], []

    def run(self, amax, calls, growth=lambda t: 1.0):
        for t in range(calls):
            fallen = int((amax * growth(t) > self.threshold).sum())
            counts = torch.tensor([[fallen, 0, amax.numel()]])
            state = next_threshold(self.threshold, self.step, counts, self.recipe)
            self.threshold, self.step = state
            self.rates.append(fallen / amax.numel())
            self.thresholds.append(float(self.threshold))
        return self

    def moves(self):
        """After how many calls the threshold stays."""
        last = self.thresholds[-1]
        return next(i for i, t in enumerate(self.thresholds) if t == last) + 1

    def settled(self):
        return len(set(self.thresholds[-20:])) == 1


def lognormal(mean, sigma, n=20000, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.exp(mean + sigma * torch.randn(n, generator=g))


def test_it_finds_the_band():
    """T12: from 100 in 8 updates to 12.26, r = .104; from .1 in 17 to r = .207."""
    amax = lognormal(1.5, 0.8)
    down = Simulation(100.0).run(amax, 40)
    assert down.moves() == 8 and down.thresholds[-1] == pytest.approx(12.26, abs=0.01)
    assert down.rates[-1] == pytest.approx(0.104, abs=0.005)
    up = Simulation(0.1).run(amax, 40)
    assert up.moves() == 17 and up.rates[-1] == pytest.approx(0.207, abs=0.01)


def test_it_follows_a_drift():
    """T13: maxima that grow by 5% of the first ones a step; in band nearly always."""
    amax = lognormal(1.5, 0.8)
    s = Simulation(float(amax.quantile(0.8))).run(amax, 200, lambda t: 1 + 0.05 * t)
    inside = [0.1 <= r <= 0.3 for r in s.rates]
    assert sum(inside) / len(inside) >= 0.9
    assert sum(s.rates) / len(s.rates) == pytest.approx(0.256, abs=0.03)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2, 0.3])
def test_damping_settles_narrow_spreads(sigma):
    """T14: from 20 of 20 starts; without it some starts go to and fro for ever."""
    amax = lognormal(0.0, sigma)
    starts = torch.exp(torch.linspace(-2, 2, 20)).tolist()
    assert all(Simulation(s).run(amax, 200).settled() for s in starts)
    plain = RECIPE.replace(fallback=Fallback(damping=False))
    settled = sum(Simulation(s, plain).run(amax, 200).settled() for s in starts)
    assert settled == 20 if sigma == 0.3 else settled < 20
    assert sigma != 0.2 or 5 <= settled <= 15


def test_nothing_counted_moves_nothing():
    state = next_threshold(
        torch.tensor([2.0]), torch.tensor([-1.3]), torch.zeros(1, 3).long(), RECIPE
    )
    assert [float(t) for t in state] == [2.0, pytest.approx(-1.3)]


def moved(threshold, step, counts, recipe=RECIPE):
    state = next_threshold(
        torch.tensor([threshold]), torch.tensor([step]), torch.tensor([counts]), recipe
    )
    return [float(t) for t in state]


def test_what_is_not_finite_is_no_evidence():
    """Trap 1.11.3: NaN is not "did not fall back". 2 of 10 finite blocks are in the band, of 100
    they would be below it; where all are not finite nothing moves."""
    assert moved(2.0, 0.0, [2, 90, 100]) == [2.0, 0.0]
    assert moved(2.0, 0.0, [9, 90, 100]) == [pytest.approx(2.6), pytest.approx(1.3)]
    assert moved(2.0, -1.3, [0, 100, 100]) == [2.0, pytest.approx(-1.3)]


def test_it_stays_in_the_positive_float32():
    high, low = torch.finfo(torch.float32).max, 2.0**-126
    for counts, start, end in (([1, 0, 1], 3e38, high), ([0, 0, 1], 1.3e-38, low)):
        threshold, step = start, 0.0
        for _ in range(5):
            threshold, step = moved(threshold, step, counts)
        assert threshold == end
        back, _ = moved(threshold, step, [1 - counts[0], 0, 1])
        assert back != end and 0 < back < float("inf")
    assert moved(1.0, 0.0, [0, 0, 1], RECIPE.replace(fallback=Fallback(factor=3e38)))[0] == low
    assert float(initial_threshold(torch.full((5, 5), 1e-44), RECIPE)) == low


def test_the_damping_is_the_recipes():
    rule = Fallback(smallest=1.2, recovery=2.0)
    recipe = RECIPE.replace(fallback=rule)
    assert moved(1.0, -1.3, [1, 0, 1], recipe)[1] == pytest.approx(1.2)
    assert moved(1.0, 1.1, [1, 0, 1], recipe)[1] == pytest.approx(1.21)
    assert moved(1.0, -1.3, [1, 0, 1])[1] == pytest.approx(1.3**0.5)
    assert moved(1.0, -1.01, [1, 0, 1])[1] == pytest.approx(1.02)
    assert mxtrain.Recipe.from_dict(recipe.to_dict()) == recipe
    for name in ("smallest", "recovery"):
        for bad in (1, 0.5, float("nan"), float("inf"), "a"):
            with refuses(ValueError, match=f"{name} must be above 1"):
                Fallback(**{name: bad})


def test_the_first_threshold_is_the_middle_of_the_band(device):
    x = torch.randn(1280, 1280, device=device) * torch.rand(1280, 1, device=device)
    threshold = initial_threshold(x, RECIPE)
    assert threshold.shape == (1,) and threshold.dtype == torch.float32
    assert float((block_amax(x) > threshold).float().mean()) == pytest.approx(0.2, abs=0.01)
    assert float(initial_threshold(torch.zeros(5, 5, device=device), RECIPE)) == 1.0
    x = torch.cat([x, torch.zeros(12800, 1280, device=device)])  # tokens that an expert has not got
    assert torch.equal(initial_threshold(x, RECIPE), threshold)
    assert float(initial_threshold(torch.full((5, 5), torch.nan), RECIPE)) == 1.0
