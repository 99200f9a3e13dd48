"""What the linear layer keeps and multiplies: operands of either kind, and their parts."""

from __future__ import annotations

import math

from torch import Tensor

from .int8 import Int8Operand, int8_quantize, int8_quantize_fallback
from .operand import Operand
from .recipe import Quantizer

Packed = Operand | Int8Operand


def quantize_squares(
    x: Tensor, row: Quantizer | None, col: Quantizer | None, rng: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Int8Operand | None, Int8Operand | None, Tensor | None]:  # fmt: skip
    """The int8_block operands of x by row and of x.T by col, None for None; the counts, or None.

    From one read of x where both round alike. threshold: where row, or col alone, has a fallback.
    """
    if row is not None and col is not None and row.rounding != col.rounding:
        a, _, counts = quantize_squares(x, row, None, rng, threshold)
        return a, quantize_squares(x, None, col, rng, threshold)[1], counts
    layout = "both" if row and col else "row" if row else "transposed"
    q, counts = row or col, None
    if q.fallback:
        operands, counts = int8_quantize_fallback(x, threshold, layout=layout)
    else:
        rng = rng if q.rounding == "stochastic" else None
        operands = int8_quantize(x, rounding=q.rounding, rng=rng, layout=layout)
    if layout != "both":
        return (operands, None, counts) if row else (None, operands, counts)
    a, b = operands
    return a, b if col.fallback else b.without_fallback(), counts


def compacted(op: Int8Operand, capacity: float | None) -> Int8Operand:
    """op with the residuals of at most that share of its blocks, in a pool; see Fallback."""
    if op.residual is None or capacity is None:
        return op
    return op.packed(math.ceil(capacity * (op.mask.shape[0] * op.mask.shape[1])))


PARTS = 5


def parts_of(kept: Packed | Tensor | None) -> tuple[Tensor | None, ...]:
    """The PARTS tensors of an operand, or the tensor itself first, for save_for_backward."""
    if isinstance(kept, Int8Operand):
        return kept.parts
    if isinstance(kept, Operand):
        return kept.data, kept.scale, kept.tensor_scale, None, None
    return kept, None, None, None, None


def restored(
    parts: tuple[Tensor | None, ...], q: Quantizer, shape: tuple[int, int]
) -> Packed:  # fmt: skip
    """The operand by q of which parts_of were saved."""
    if q.square:
        return Int8Operand.of(parts, shape)
    data, scale, tensor_scale = parts[:3]
    return Operand(data, scale, q.format, shape, tensor_scale)
