"""What int8_block does to a matrix: the sums of `quantization_statistics`, in plain torch.

For the monitor, which looks at a sample now and then; training has no need of it. A code's cell
ends halfway to its neighbours, so an element's confidence is 1 on a code and 0 between two; where a
block falls back it is that of the first step, while signal and noise are those of both. Nothing is
clipped: the scale follows the largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .int8 import BLOCK, int8_quantize, int8_quantize_fallback
from .quantizer import Quantizer


@torch.no_grad()
def int8_sums(
    x: Tensor, q: Quantizer, rng: Tensor, threshold: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The sums of STATISTICS over x [R, K] and its operand by q: float64 [8], on x's device.

    rng: what stochastic rounding draws from. threshold: where q has a fallback; None is without.
    """
    r, k = x.shape
    if q.fallback and threshold is not None:
        op, _ = int8_quantize_fallback(x, threshold)
    else:
        op = int8_quantize(x, rounding=q.rounding, rng=rng if q.rounding == "stochastic" else None)
    scale = op.scale.repeat_interleave(BLOCK, 0)[:r].repeat_interleave(BLOCK, 1)[:, :k]
    ok = scale.isfinite()
    x = torch.where(ok, x.float(), 0.0)
    value = torch.where(ok, op.dequantize(), 0.0)
    place = torch.where(scale > 0, x / scale, 0.0)
    sure = torch.where(ok, 1 - 2 * (place - place.round()).abs(), 0.0)
    counts = [ok, ~ok, x != 0, (x != 0) & (value == 0), torch.zeros_like(ok)]
    sums = [*counts, x.double() ** 2, (x - value).double() ** 2, sure]
    return torch.stack([t.sum(dtype=torch.float64) for t in sums])
