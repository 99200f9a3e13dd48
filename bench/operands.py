"""Inputs of the rows, the bytes they count, and their error against mxtrain.reference.

Bytes counted are the fewest that any kernel must move: each input read once and each output written
once. (nvfp4 needs the tensor's maximum before it can quantize, so a real kernel reads x twice; it
is still counted once.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from mxtrain import Operand, reference
from mxtrain.formats import Format, format_named
from mxtrain.recipe import RECIPES, Fallback, Recipe

LARGEST = 64.0  # x[0, 0]: the maximum of the whole tensor lies in every slice that is checked


def random_matrix(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Gaussian numbers, and LARGEST at [0, 0]."""
    x = torch.randn(rows, cols, dtype=dtype, device=device)
    x[0, 0] = LARGEST
    return x


def random_operand(
    fmt: Format, rows: int, k: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(data, scale, tensor scale) of random finite codes and scales, made on the device without any
    mxtrain kernel. E8M0 scales lie in 6 binades: the blocks of a normal matrix lie in 2 or 3, so
    what a kernel does with neighbours far apart is tested, not timed.
    """
    data = torch.randint(0, 256, (rows, fmt.row_bytes(k)), dtype=torch.uint8, device=device)
    if fmt.bits == 8:
        data &= 0xBF  # keeps the exponent off the codes of NaN and Inf
    data[:, k * fmt.bits // 8 :] = 0  # the padding of K
    low, high = (16, 112) if fmt.two_level else (119, 125)
    blocks = fmt.padded(k) // fmt.block
    scale = torch.randint(low, high, (rows, blocks), dtype=torch.uint8, device=device)
    if not fmt.two_level:
        return data, scale, None
    data[0, 0] |= 7  # the largest element under the largest scale, for the same reason as LARGEST
    scale[0, 0] = 0x7E
    return data, scale, torch.full((1,), 1e-3, device=device)


def matrix_bytes(rows: int, cols: int, dtype: torch.dtype) -> int:
    """Bytes of a dense matrix."""
    return rows * cols * dtype.itemsize


def operand_bytes(fmt: Format, rows: int, k: int, swizzle: bool = False) -> int:
    """Bytes of an operand's codes and scales."""
    blocks = fmt.padded(k) // fmt.block
    scales = -(-rows // 128) * -(-blocks // 4) * 512 if swizzle else rows * blocks
    return rows * fmt.row_bytes(k) + scales + (4 if fmt.two_level else 0)


def byte_error(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The fraction of differing bytes over (got, expected) pairs; 1.0 where shapes or dtypes
    differ.
    """
    wrong = total = 0
    for got, want in pairs:
        if got.shape != want.shape or got.dtype != want.dtype:
            return 1.0
        a, b = (t.cpu().contiguous().view(torch.uint8) for t in (got, want))
        wrong, total = wrong + int((a != b).sum()), total + a.numel()
    return wrong / max(total, 1)


def windows(rows: int, row_elements: int, elements: int, anywhere: bool) -> Iterator[slice]:
    """Slices of about `elements` in all: the first rows and, where rows do not depend on their
    index, the last.
    """
    count = max(1, min(rows, elements // max(row_elements, 1)))
    if anywhere and count < rows:
        count = max(1, count // 2)
        yield slice(rows - count, rows)
    yield slice(0, count)


def operand_pairs(got: Operand, want: tuple, window: slice) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows of an operand beside what the reference made of the same rows."""
    data, scale, tensor_scale = want
    got_scale = got.scale
    if got.swizzled:
        got_scale = reference.unswizzle(got_scale.cpu(), got.shape[0], scale.shape[1])
    yield got.data[window], data
    yield got_scale[window], scale
    if tensor_scale is not None:
        yield got.tensor_scale, tensor_scale


def quantize_error(
    x: Tensor, got: Operand, elements: int, transpose: bool, **options: Any
) -> float:
    """Error of quantize's result for x against the reference, on rows of the operand; options are
    tensors and names.
    """
    format, toward = options.pop("format"), options.pop("toward", None)
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    rows, k = got.shape
    anywhere = options["rounding"] != "stochastic" and not format_named(format).two_level
    pairs: list[tuple[Tensor, Tensor]] = []
    for window in windows(rows, k, elements, anywhere):
        part = (slice(None), window) if transpose else (window,)
        near = None if toward is None else toward[part].cpu()
        want = reference.quantize(
            x[part].cpu(), format, transpose=transpose, toward=near, **options
        )
        pairs += operand_pairs(got, want, window)
    return byte_error(pairs)


def recipe_named(text: str) -> Recipe | None:
    """The recipe of a row, None for bf16: NAME, NAME+cSHARE with that capacity for the residuals of
    blocks that fell back (mxtrain.recipe.Fallback), NAME+dense where all are kept.

    Raises ValueError for another.
    """
    first, _, kept = text.partition("+")
    if text == "bf16":
        return None
    if first not in RECIPES:
        raise ValueError(f"a recipe must be bf16, {', '.join(RECIPES)}, got {first!r}")
    if not kept:
        return RECIPES[first]
    try:
        share = None if kept == "dense" else float(kept.removeprefix("c"))
        return RECIPES[first].replace(name=text, fallback=Fallback(capacity=share))
    except ValueError as error:
        condition = "a recipe must end with +dense or +cX, X in (0, 1]"
        raise ValueError(f"{condition}, got {text!r}") from error
