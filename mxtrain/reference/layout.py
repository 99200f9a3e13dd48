"""The 128x4 tile layout of block scales that Blackwell tensor cores read.

Source: cuBLAS documentation, "1D Block Scaling Factors Layout". Scale (r, c) of a tile is byte
(r % 32) * 16 + (r // 32 % 4) * 4 + c % 4; tiles run along the columns first; padding is zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import refusal


def swizzle(scale: Tensor) -> Tensor:
    """uint8 [R, C] to uint8 [ceil(R/128), ceil(C/4), 512]."""
    if scale.dim() != 2:
        context, advice = f"shape {list(scale.shape)}", "Pass the scale of an unswizzled operand."
        raise ValueError(
            refusal("swizzle", "scale", "have 2 dimensions", scale.dim(), context, advice)
        )
    rows, cols = scale.shape
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    padded = torch.zeros(row_tiles * 128, col_tiles * 4, dtype=scale.dtype, device=scale.device)
    padded[:rows, :cols] = scale
    tiles = padded.reshape(row_tiles, 4, 32, col_tiles, 4)  # row tile, r // 32, r % 32, col tile, c
    return tiles.permute(0, 3, 2, 1, 4).reshape(row_tiles, col_tiles, 512)


def unswizzle(scale: Tensor, rows: int, cols: int) -> Tensor:
    """uint8 [ceil(rows/128), ceil(cols/4), 512] to uint8 [rows, cols]."""
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    if scale.shape != (row_tiles, col_tiles, 512):
        condition, context = f"have shape {[row_tiles, col_tiles, 512]}", f"for {rows} x {cols}"
        got, advice = list(scale.shape), "Pass what swizzle returned."
        raise ValueError(refusal("unswizzle", "scale", condition, got, context, advice))
    tiles = scale.reshape(row_tiles, col_tiles, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(row_tiles * 128, col_tiles * 4)[:rows, :cols].contiguous()
