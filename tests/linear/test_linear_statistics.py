"""Expectations of the gradients over many draws: what is unbiased, and for what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_common import relative, run, tensors

import mxtrain
from mxtrain.linear import linear
from mxtrain.recipe import Quantizer, Recipe

pytestmark = pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm")


def statistics(recipe, draws, x, w, b, dy):
    """Mean over draws of dX and dW, and the z-scores of a difference from an expectation."""
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (x, w)]
    squares = [torch.zeros_like(t, dtype=torch.float64) for t in (x, w)]
    torch.manual_seed(3)
    y = None
    for _ in range(draws):
        y = linear(x, w, b, recipe)
        for i, g in enumerate(torch.autograd.grad(y, (x, w), dy)):
            sums[i] += g
            squares[i] += g.double() ** 2
    means = [s / draws for s in sums]
    errors = [((q / draws - m**2).clamp(min=1e-30) / draws).sqrt()
              for q, m in zip(squares, means, strict=True)]  # fmt: skip
    return means, lambda i, expected: (means[i] - expected) / errors[i]


def test_tetrajet_is_unbiased_for_the_gradient_of_the_quantized_forward(device):
    """E[dX] = dY Q(W) and E[dW] = dY^T Q(X), and not the products with W and X.

    The rms of 2 x 8192 z-scores, of which at least 4096 are independent, strays by 0.08 from 1 with
    probability below 1e-12; one of them exceeds 8 with probability below 3e-11.
    """
    x, w, b, dy = tensors(64, k=128, c=64, device=device)
    means, z = statistics("tetrajet", 3000, x, w, b, dy)
    x, w, dy = x.detach().double(), w.detach().double(), dy.double()
    qx, qw = (mxtrain.quantize(t.float(), "mxfp4").dequantize().double() for t in (x, w))
    for i, (expected, unquantized) in enumerate([(dy @ qw, dy @ w), (dy.t() @ qx, dy.t() @ x)]):
        score = z(i, expected)
        assert abs(score.square().mean().sqrt() - 1) < 0.08
        assert score.abs().max() < 8
        assert z(i, unquantized).square().mean().sqrt() > 10
        assert relative(means[i], expected) < 0.01 < 0.1 < relative(means[i], unquantized)


def slope(mean, exact):
    return ((mean * exact).sum() / (exact * exact).sum()).item()


@pytest.mark.parametrize("name", ["mxfp4_backward", "mxfp4_backward_mxfp8"])
def test_mxfp4_backward_is_unbiased_for_the_exact_gradient(device, name, monkeypatch):
    """Slope 1 with the derived alpha, 9/16 without it. (The token groups are not full here.)

    The bound on the rms fails with probability below 1e-12, that on the maximum below 3e-11. The
    standard deviation of a slope is below 5e-4.
    """
    x, w, b, dy = tensors(100, k=128, c=64, device=device)
    exact = run(F.linear, x, w, b, dy)[1:3]
    means, z = statistics(name, 1500, x, w, b, dy)
    for i, e in enumerate(exact):
        assert abs(slope(means[i], e.double()) - 1) < 0.004
        assert abs(z(i, e.double()).square().mean().sqrt() - 1) < 0.08
        assert z(i, e.double()).abs().max() < 8
    monkeypatch.setattr(Recipe, "alpha", lambda self, gemm: 1.0)
    means, _ = statistics(name, 500, x, w, b, dy)
    for i, e in enumerate(exact):
        assert abs(slope(means[i], e.double()) - 0.5625) < 0.004


def test_floor_and_nearest_shrink_what_the_prescale_does_not(device):
    """Rotated, rounded to nearest with the floor rule and no prescale: slope about 0.96, not 1."""
    q = Quantizer("mxfp4", "floor", hadamard=64, signs="drawn")
    recipe = Recipe("mode 1", dgrad_dy=q, dgrad_w=q, wgrad_dy=q, wgrad_x=q)
    x, w, b, dy = tensors(128, k=128, c=128, device=device)
    exact = run(F.linear, x, w, b, dy)[1:3]
    means, _ = statistics(recipe, 300, x, w, b, dy)
    for i, e in enumerate(exact):
        assert 0.945 < slope(means[i], e.double()) < 0.975
