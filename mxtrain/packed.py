"""What the linear layer keeps and multiplies: operands of either kind, and their parts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .int8 import Int8Operand, int8_quantize, int8_quantize_fallback
from .int8_ops import BLOCK
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


# ---- residuals of few blocks ----


def _largest_fallen(op: Int8Operand, count: int) -> tuple[Tensor, Tensor]:
    """Block row and column of `count` blocks: those that fell back first, the largest scale first;
    blocks of one scale, and those that did not fall back, in the order of the grid.

    The same whether the mask has all of them or only these.
    """
    size = torch.where(op.mask.bool(), op.scale, -1.0)
    order = size.flatten().argsort(descending=True, stable=True)[:count]
    return order // op.mask.shape[1], order % op.mask.shape[1]


def _tiles(residual: Tensor) -> Tensor:
    """A view of codes [R, Kp], R whole blocks: [R / 128, 128, Kp / 128, 16] of 8 codes each."""
    rows, kp = residual.shape
    return residual.view(torch.int64).view(rows // BLOCK, BLOCK, kp // BLOCK, BLOCK // 8)


def compacted(op: Int8Operand, capacity: float | None) -> Int8Operand:
    """op with the residual of that share of its blocks, int64 `[blocks, 128, 16]`; see Fallback."""
    if op.residual is None or capacity is None:
        return op
    count = math.ceil(capacity * op.mask.shape[0] * op.mask.shape[1])
    rows, cols = _largest_fallen(op, count)
    mask = torch.zeros_like(op.mask, memory_format=torch.contiguous_format)
    mask[rows, cols] = op.mask[rows, cols]
    residual, fill = op.residual, -op.shape[0] % BLOCK
    pool = _tiles(F.pad(residual, (0, 0, 0, fill)) if fill else residual)[rows, :, cols]
    return Int8Operand(op.data, op.scale, op.shape, pool, op.residual_scale, mask)


def _expanded(op: Int8Operand) -> Int8Operand:
    """What compacted was made of, but for blocks that the mask leaves out."""
    if op.residual is None or op.residual.dim() == 2:
        return op
    rows, kp = op.mask.shape[0] * BLOCK, op.data.shape[1]
    residual = op.data.new_empty(rows, kp)
    row, col = _largest_fallen(op, op.residual.shape[0])
    _tiles(residual)[row, :, col] = op.residual
    residual = residual[: op.shape[0]]
    return Int8Operand(op.data, op.scale, op.shape, residual, op.residual_scale, op.mask)


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
        return _expanded(Int8Operand.of(parts, shape))
    data, scale, tensor_scale = parts[:3]
    return Operand(data, scale, q.format, shape, tensor_scale)
