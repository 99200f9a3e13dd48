"""What rounding did to a matrix, and how its elements move from step to step.

Both functions compare x [R, cols] with the operand that was made of it (rotated, where that was
rotated before quantizing). With S the scale of an element's block (times nvfp4's tensor scale),
v = x * prescale / S its position on the element's grid, and q = element * S / prescale what the
operand holds of it:

    underflow   x != 0 and q == 0
    clip        |v| > the largest element
    confidence  distance of |v| to the nearest rounding threshold / the largest one of its grid
                value, in [0, 1]; arXiv 2502.20853, "quantization confidence". A value's cell ends
                halfway to its neighbours; that of the largest element at it.

Blocks whose scale is NaN count as nonfinite and in nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import E4M3, Element, decode, decode_e8m0, decode_table, format_named, unpack

STATISTICS = (
    "elements", "nonfinite", "nonzero", "underflow", "clip", "signal", "noise", "confidence",
)  # fmt: skip
"""What `quantization_statistics` sums: counts, then x^2, (x - q)^2 and the confidence."""

MOVEMENTS = ("w_moved", "w_size", "q_moved", "q_size", "flips")
"""What `oscillation_step_` sums: squares of w - w', w', q - q' and q', and flips of q."""


def element_scales(
    scale: Tensor, tensor_scale: Tensor | None, format: str, cols: int
) -> Tensor:  # fmt: skip
    """The scale of every element, float32 [R, cols]."""
    fmt = format_named(format)
    s = decode_e8m0(scale) if tensor_scale is None else decode(scale, E4M3) * tensor_scale
    return s.repeat_interleave(fmt.block, 1)[:, :cols]


def _elements(data: Tensor, format: str, cols: int) -> Tensor:
    element = format_named(format).element
    return decode(unpack(data, element.bits), element)[:, :cols]


def _magnitudes(element: Element) -> Tensor:
    """The grid of a format from 0 up, float32."""
    positive = decode_table(element)[: 2 ** (element.bits - 1)]
    return positive[positive.isfinite()]


def confidence(v: Tensor, format: str) -> Tensor:
    """Of positions v on the grid of a format (values over their scales), float32, v's shape."""
    grid = _magnitudes(format_named(format).element).to(v.device)
    ends = (grid[1:] + grid[:-1]) / 2
    a = v.abs().float().clamp(max=grid[-1].item())
    code = torch.bucketize(a, ends)
    lower = torch.cat([-ends[:1], ends])[code]
    upper = torch.cat([ends, grid[-1:] * 2])[code]
    top = code == len(grid) - 1
    distance = torch.where(top, a - lower, torch.minimum(a - lower, upper - a))
    most = torch.where(top, grid[-1] - lower, (upper - lower) / 2)
    return distance / most


def quantization_statistics(
    x: Tensor, data: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: str,
    prescale: float = 1.0,
) -> Tensor:  # fmt: skip
    """The sums of STATISTICS over x, float64 [8]."""
    cols = x.shape[1]
    x, s = x.float(), element_scales(scale, tensor_scale, format, cols)
    ok = s.isfinite()
    x = torch.where(ok, x, 0.0)
    q = torch.where(ok, _elements(data, format, cols) * s / prescale, 0.0)
    v = torch.where(ok & (s != 0), x * prescale / s, 0.0)
    largest = _magnitudes(format_named(format).element)[-1].item()
    sure = torch.where(ok, confidence(v, format), 0.0)
    counts = [ok, ~ok, x != 0, (x != 0) & (q == 0), v.abs() > largest]
    sums = [*counts, x.double() ** 2, (x - q).double() ** 2, sure]
    return torch.stack([t.sum(dtype=torch.float64) for t in sums])


def oscillation_step_(
    state: Tensor, w: Tensor, data: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: str
) -> Tensor:  # fmt: skip
    """One transition of w [R, cols] and its quantized q: the sums of MOVEMENTS, float64 [5].

    state is float32 [5, R, cols]: w' and q' of the step before, and sums to which this adds
    |w - w'|, |q - q'| and 1 where q flips; then w' and q' are set. q flips where it moves by more
    than 1/32 of the larger of q and q': by a step of any grid, but not as nvfp4's values all do
    where the tensor scale drifts. An element that is or was not finite adds nothing.
    """
    cols = w.shape[1]
    previous_w, previous_q, travel_w, travel_q, flips = state
    w = w.float()
    q = _elements(data, format, cols) * element_scales(scale, tensor_scale, format, cols)
    ok = w.isfinite() & q.isfinite() & previous_w.isfinite() & previous_q.isfinite()
    dw = torch.where(ok, (w - previous_w).abs(), 0.0)
    dq = torch.where(ok, (q - previous_q).abs(), 0.0)
    flipped = dq > torch.maximum(q.abs(), previous_q.abs()) / 32
    sizes = (torch.where(ok, t, 0.0) for t in (previous_w, previous_q))
    squares = [t.double() ** 2 for t in (dw, next(sizes), dq, next(sizes))]
    travel_w += dw
    travel_q += dq
    flips += flipped
    previous_w.copy_(w)
    previous_q.copy_(q)
    return torch.stack([t.sum(dtype=torch.float64) for t in [*squares, flipped]])
