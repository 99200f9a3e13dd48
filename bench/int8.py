"""The rows of int8_block.

int8_quantize/ROUNDING[+both]/RxC and int8_quantize_fallback/rRATE[+both]/RxC write the operand of x
[R, C], with +both that of x.T as well, from one read. int8_gemm/rRATE[+PATTERN][+b]/MxNxK is a
product of which the blocks of one side, of B with +b, fell back: that share of them at "random"
(the default), in whole "channels" (blocks of K), or in whole "tokens" (one row of blocks, the rate
below 1 / rows as it may).
"""

from __future__ import annotations

import torch
from torch import Tensor

import mxtrain
from mxtrain import Int8Operand, reference
from mxtrain.int8 import BLOCK, block_amax, blocks

from .cases import Case, family, parse_shape
from .operands import byte_error, matrix_bytes, random_matrix
from .products import BF16_STEP, CHECKED_ROWS

PATTERNS = ("random", "channels", "tokens")


def _rate(text: str) -> float:
    if text[:1] != "r" or not text[1:].replace(".", "", 1).isdecimal() or float(text[1:]) > 1:
        raise ValueError(f"a rate must be rX with X in [0, 1], got {text!r}")
    return float(text[1:])


def _words(text: str, known: tuple[str, ...]) -> tuple[str, list[str]]:
    first, *words = text.split("+")
    for word in words:
        if word not in known:
            raise ValueError(f"unknown option {word!r} in {text!r}")
    return first, words


def _codes_bytes(rows: int, cols: int, both: bool, share: float) -> int:
    """Of codes and residual codes in one or both forms, and the grids."""
    padded = rows * blocks(cols) * BLOCK + both * cols * blocks(rows) * BLOCK
    return int(padded * (1 + share)) + blocks(rows) * blocks(cols) * (9 if share else 4)


def _pairs(x: Tensor, got: Int8Operand, want: tuple):
    """Codes and grids of the first blocks of rows against the reference's of these rows."""
    data, scale, *residual = want
    rows, grid = len(data), len(scale)
    yield got.data[:rows], data
    yield got.scale[:grid], scale
    if residual:
        codes, second, mask, _ = residual
        fallen = mask.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1).bool()
        yield torch.where(fallen, got.residual[:rows].cpu(), 0), codes
        yield got.residual_scale[:grid], second
        yield got.mask[:grid], mask


@family("int8_quantize")
def int8_quantize(name: str, options: str, shape: str) -> Case:
    """int8_quantize/nearest|stochastic[+both]/RxC."""
    (rounding, words), (rows, cols) = _words(options, ("both",)), parse_shape(shape)
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"a rounding must be nearest or stochastic, got {rounding!r}")
    layout = "both" if words else "row"

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, torch.bfloat16, device)
        return x, mxtrain.draw_rng(device=device)[0] if rounding == "stochastic" else None

    def call(x: Tensor, rng: Tensor | None):
        return mxtrain.int8_quantize(x, rounding=rounding, rng=rng, layout=layout)

    def check(inputs: tuple, got, elements: int) -> float:
        x, rng = inputs
        a = got[0] if words else got
        want = reference.int8_quantize(x[:BLOCK].cpu(), None if rng is None else rng.cpu())
        return byte_error(_pairs(x, a, want))

    moved = matrix_bytes(rows, cols, torch.bfloat16) + _codes_bytes(rows, cols, bool(words), 0)
    return Case(name, make, call, moved, 0, "int8_quantize", check)


@family("int8_quantize_fallback")
def int8_quantize_fallback(name: str, options: str, shape: str) -> Case:
    """int8_quantize_fallback/rRATE[+both]/RxC, the threshold at that share of the blocks."""
    (text, words), (rows, cols) = _words(options, ("both",)), parse_shape(shape)
    rate, layout = _rate(text), "both" if words else "row"

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, torch.bfloat16, device)
        limit = torch.quantile(block_amax(x).flatten(), 1 - rate).reshape(1)
        return x, limit * (2 if rate == 0 else 0.5 if rate == 1 else 1)

    def call(x: Tensor, threshold: Tensor):
        return mxtrain.int8_quantize_fallback(x, threshold, layout=layout)

    def check(inputs: tuple, got, elements: int) -> float:
        x, threshold = inputs
        a = got[0][0] if words else got[0]
        want = reference.int8_quantize_fallback(x[:BLOCK].cpu(), float(threshold))
        return byte_error(_pairs(x, a, want))

    moved = matrix_bytes(rows, cols, torch.bfloat16) + _codes_bytes(rows, cols, bool(words), rate)
    return Case(name, make, call, moved, 0, "int8_quantize_fallback", check)


def _mask(pattern: str, rate: float, rows: int, k: int, device: torch.device) -> Tensor:
    mask = torch.zeros(rows, k, dtype=torch.uint8, device=device)
    if pattern == "random":
        mask.view(-1)[torch.randperm(mask.numel(), device=device)[: round(rate * rows * k)]] = 1
    elif pattern == "channels":
        mask[:, : round(rate * k)] = 1
    else:
        mask[: max(round(rate * rows), 1)] = 1
    return mask


def _random_operand(rows: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    data = torch.randint(-127, 128, (rows, blocks(k) * BLOCK), dtype=torch.int8, device=device)
    data[:, k:] = 0
    return data, torch.rand(blocks(rows), blocks(k), device=device) + 0.5


@family("int8_gemm")
def int8_gemm(name: str, options: str, shape: str) -> Case:
    """int8_gemm/rRATE[+PATTERN][+b]/MxNxK, BF16 out; r0.0 has no residual."""
    (text, words), (m, n, k) = _words(options, (*PATTERNS, "b")), parse_shape(shape, 3)
    rate, of_b = _rate(text), "b" in words
    pattern = next((word for word in words if word in PATTERNS), "random")

    def make(device: torch.device) -> tuple:
        a, b = _random_operand(m, k, device), _random_operand(n, k, device)
        if rate == 0:
            return *a, *b, None, None, None
        rows = n if of_b else m
        codes, scale = _random_operand(rows, k, device)
        return *a, *b, codes, scale / 254, _mask(pattern, rate, *scale.shape, device)

    def operands(a, a_scale, b, b_scale, *residual) -> tuple[Int8Operand, Int8Operand]:
        none = (None,) * 3
        return (
            Int8Operand(a, a_scale, (m, k), *(none if of_b else residual)),
            Int8Operand(b, b_scale, (n, k), *(residual if of_b else none)),
        )

    def call(*inputs: Tensor) -> Tensor:
        return mxtrain.int8_gemm(*operands(*inputs))

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        """Largest error of some rows against float64, over the sums of absolute products."""
        left, right = operands(*inputs)
        rows = slice(0, min(m, CHECKED_ROWS))
        parts = left.data[rows], left.scale[:1], None, None, None
        if left.residual is not None:
            parts = (*parts[:2], left.residual[rows], left.residual_scale[:1], left.mask[:1])
        a = Int8Operand.of(parts, (rows.stop, k)).dequantize().double()
        b = right.dequantize().double()
        error = (got[rows].double() - a @ b.T).abs()
        return float((error / (a.abs() @ b.abs().T)).max())

    moved = m * k + n * k + 2 * m * n + int(rate * (n if of_b else m) * k)
    return Case(
        name, make, call, moved, 2 * m * n * k, "int8_gemm", check, BF16_STEP,
        bf16=f"peer/cublas_bf16/{shape}",
    )  # fmt: skip
