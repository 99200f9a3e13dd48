"""One step of AdamW and of Q-Ramping, float32 operation by operation (docs/optimizers.md)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The float32 factors of step number `step`, made in float64."""

    decay: Tensor
    lerp: Tensor
    beta2: Tensor
    square: Tensor
    step_size: Tensor
    root: Tensor
    eps: Tensor


def factors(
    step: int, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
) -> Factors:
    correction1, correction2 = 1.0 - beta1**step, 1.0 - beta2**step
    values = (
        1.0 - lr * weight_decay, 1.0 - beta1, beta2, 1.0 - beta2, -(lr / correction1),
        correction2**0.5, eps,
    )  # fmt: skip
    return Factors(*(torch.tensor(v, dtype=torch.float32) for v in values))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of float32 tensors, rounded once.

    The product is exact in float64. The sum is rounded to odd there: where it is not exact, its
    last bit becomes 1, so that rounding it again to float32 is rounding it once.
    """
    p, c = a.double() * b.double(), c.double()
    s = p + c
    part = s - p
    error = (p - (s - part)) + (c - part)
    toward = torch.where(error > 0, torch.inf, -torch.inf).to(s)
    even = s.view(torch.int64) % 2 == 0
    return torch.where((error != 0) & even, torch.nextafter(s, toward), s).float()


def lerp(a: Tensor, b: Tensor, weight: Tensor | float) -> Tensor:
    """a + weight (b - a) in float32, b where weight is 1."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    if weight < 0.5:
        return fma(weight, b - a, a)
    return fma(weight - 1.0, b - a, b)


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, f: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(parameter, first moment, second moment) after a step, float32."""
    m = lerp(m, g, f.lerp)
    v = fma(f.square, g * g, v * f.beta2)
    denominator = v.double().sqrt().float() / f.root + f.eps
    return fma(f.step_size, m / denominator, p * f.decay), m, v


def ramped_adamw(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, grad_sum: Tensor, count: Tensor, period: Tensor,
    f: Factors,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(parameter, first moment, second moment, grad_sum, count) after a step of Q-Ramping."""
    count = count + 1
    if g.isfinite().all():
        grad_sum = grad_sum + g
    many = count.float()
    longer = f._replace(step_size=f.step_size * many)
    fired = adamw(p, grad_sum / many, m, v, longer)
    now = count % period == 0
    p, m, v = (torch.where(now, a, b) for a, b in zip(fired, (p * f.decay, m, v), strict=True))
    return p, m, v, torch.where(now, 0.0, grad_sum), torch.where(now, 0, count)
