"""The rows of this package's ops: one builder a family. See cases.py for what a Case is and how to
add one.
"""

from __future__ import annotations

import torch
from torch import Tensor

import mxtrain
from mxtrain import Operand, Quantizer, reference
from mxtrain.formats import HADAMARD_GROUPS, format_named

from .cases import DTYPES, Case, Options, Unfit, family, parse_shape
from .operands import (
    byte_error,
    matrix_bytes,
    operand_bytes,
    operand_pairs,
    quantize_error,
    random_matrix,
    random_operand,
    windows,
)
from .peers import to_mx_names

ROUNDED = {"bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@family("quantize")
def quantize(name: str, format: str, options: str, shape: str) -> Case:
    """quantize/FORMAT/OPTIONS/RxC of x [R, C]; with +transpose the operand is [C, R]."""
    fmt, o, (rows, cols) = format_named(format), Options.parse(options), parse_shape(shape)
    r, k = (cols, rows) if o.transpose else (rows, cols)
    o.require_fit(fmt, k)
    words, layout = o.keywords(), {"transpose": o.transpose, "swizzle": o.swizzle}
    peers = to_mx_names(format, shape) if options in ("nearest", "nearest+floor") else ()

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, o.dtype, device)
        return x, *o.tensors(x)

    def call(x: Tensor, rng: Tensor, signs: Tensor, toward: Tensor) -> Operand:
        return mxtrain.quantize(x, format, rng=rng, signs=signs, toward=toward, **words, **layout)

    def check(inputs: tuple, got: Operand, elements: int) -> float:
        x, rng, signs, toward = inputs
        return quantize_error(
            x,
            got,
            elements,
            o.transpose,
            format=format,
            rng=rng,
            signs=signs,
            toward=toward,
            **words,
        )

    reads = 2 if o.rounding == "toward" else 1
    moved = reads * matrix_bytes(rows, cols, o.dtype) + operand_bytes(fmt, r, k, o.swizzle)
    return Case(name, make, call, moved, 0, "quantize", check, peers=peers)


@family("quantize_dual")
def quantize_dual(name: str, format: str, options: str, shape: str) -> Case:
    """quantize_dual/FORMAT/OPTIONS/RxC: both operands of x [R, C]; +hN rotates the transposed one
    only.
    """
    fmt, o, (rows, cols) = format_named(format), Options.parse(options), parse_shape(shape)
    o.require_fit(fmt, rows)
    if o.transpose or o.rounding == "toward":
        raise ValueError(f"{name}: quantize_dual rows take neither +transpose nor toward")
    row, col = Quantizer(format, **o.keywords(rotate=False)), Quantizer(format, **o.keywords())

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, o.dtype, device)
        return x, *o.tensors(x)[:2]

    def call(x: Tensor, rng: Tensor, signs: Tensor) -> tuple[Operand, Operand]:
        return mxtrain.quantize_dual(x, row, col, rng=rng, col_signs=signs, swizzle=o.swizzle)

    def check(inputs: tuple, got: tuple[Operand, Operand], elements: int) -> float:
        x, rng, signs = inputs
        plain = {"format": format, "rng": rng, **o.keywords(rotate=False)}
        rotated = {"format": format, "rng": rng, "signs": signs, **o.keywords()}
        return max(
            quantize_error(x, got[0], elements, False, **plain),
            quantize_error(x, got[1], elements, True, **rotated),
        )

    moved = matrix_bytes(rows, cols, o.dtype)
    moved += operand_bytes(fmt, rows, cols, o.swizzle) + operand_bytes(fmt, cols, rows, o.swizzle)
    return Case(name, make, call, moved, 0, "quantize_dual", check)


@family("requantize")
def requantize(name: str, format: str, options: str, shape: str) -> Case:
    """requantize/FORMAT/OPTIONS/RxC: an operand [R, C] to the operand of its transpose."""
    fmt, o, (rows, cols) = format_named(format), Options.parse(options), parse_shape(shape)
    o.require_fit(fmt, rows)
    if o.transpose or o.rounding == "toward":
        raise ValueError(f"{name}: requantize rows take neither +transpose nor toward")

    def make(device: torch.device) -> tuple:
        data, scale, tensor_scale = random_operand(fmt, rows, cols, device)
        return data, scale, tensor_scale, *o.tensors(data.new_empty(0))[:2]

    def call(
        data: Tensor, scale: Tensor, tensor_scale: Tensor, rng: Tensor, signs: Tensor
    ) -> Operand:
        operand = Operand(data, scale, format, (rows, cols), tensor_scale)
        return mxtrain.requantize(operand, rng=rng, signs=signs, swizzle=o.swizzle, **o.keywords())

    def check(inputs: tuple, got: Operand, elements: int) -> float:
        data, scale, tensor_scale, rng, signs = (v if v is None else v.cpu() for v in inputs)
        count = min(cols, max(1, elements // rows // 32) * 32)  # columns: rows of the result
        packed = data[:, : fmt.row_bytes(count)], scale[:, : fmt.padded(count) // fmt.block]
        want = reference.requantize(
            *packed, tensor_scale, format, count, rng=rng, signs=signs, **o.keywords()
        )
        return byte_error(operand_pairs(got, want, slice(0, count)))

    moved = operand_bytes(fmt, rows, cols) + operand_bytes(fmt, cols, rows, o.swizzle)
    return Case(name, make, call, moved, 0, "requantize", check)


@family("dequantize")
def dequantize(name: str, format: str, dtype: str, shape: str) -> Case:
    """dequantize/FORMAT/DTYPE/RxC: an operand [R, C] to a dense matrix."""
    fmt, (rows, cols) = format_named(format), parse_shape(shape)
    out = _named(dtype, DTYPES)

    def make(device: torch.device) -> tuple:
        return random_operand(fmt, rows, cols, device)

    def call(data: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
        return mxtrain.dequantize(Operand(data, scale, format, (rows, cols), tensor_scale), out)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        data, scale, tensor_scale = inputs
        top = None if tensor_scale is None else tensor_scale.cpu()
        return byte_error(
            (got[w], reference.dequantize(data[w].cpu(), scale[w].cpu(), top, format, cols, out))
            for w in windows(rows, cols, elements, True)
        )

    moved = operand_bytes(fmt, rows, cols) + matrix_bytes(rows, cols, out)
    return Case(name, make, call, moved, 0, "dequantize", check)


@family("hadamard")
def hadamard(name: str, group: str, shape: str) -> Case:
    """hadamard/GROUP/RxC: BF16 to BF16 along the last axis."""
    rows, cols = parse_shape(shape)
    if not group.isdecimal() or int(group) not in HADAMARD_GROUPS:
        raise ValueError(f"a Hadamard group must be one of {HADAMARD_GROUPS}, got {group!r}")
    if cols % int(group):
        raise Unfit(f"Hadamard groups of {group} do not divide {cols}")

    def make(device: torch.device) -> tuple:
        x = random_matrix(rows, cols, torch.bfloat16, device)
        return x, mxtrain.draw_signs(int(group), device=device)[0]

    def call(x: Tensor, signs: Tensor) -> Tensor:
        return mxtrain.hadamard(x, int(group), signs)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        x, signs = inputs
        return byte_error(
            (got[w], reference.hadamard(x[w].cpu(), int(group), signs.cpu()))
            for w in windows(rows, cols, elements, True)
        )

    moved = 2 * matrix_bytes(rows, cols, torch.bfloat16)
    return Case(name, make, call, moved, 0, "hadamard", check)


@family("column_sum")
def column_sum(name: str, shape: str) -> Case:
    """column_sum/RxC: BF16 to float32, the bias gradient."""
    rows, cols = parse_shape(shape)

    def make(device: torch.device) -> tuple:
        return (random_matrix(rows, cols, torch.bfloat16, device),)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        width = max(1, min(cols, elements // rows))  # columns, from either end
        return byte_error(
            (got[w], reference.column_sum(inputs[0][:, w].cpu()))
            for w in (slice(width), slice(cols - width, cols))
        )

    moved = matrix_bytes(rows, cols, torch.bfloat16) + 4 * cols
    return Case(name, make, mxtrain.column_sum, moved, 0, "column_sum", check)


@family("stochastic_round")
def stochastic_round(name: str, dtype: str, shape: str) -> Case:
    """stochastic_round/DTYPE/RxC: float32 to bf16, e4m3 or e5m2."""
    rows, cols = parse_shape(shape)
    out = _named(dtype, ROUNDED)

    def make(device: torch.device) -> tuple:
        return random_matrix(rows, cols, torch.float32, device), mxtrain.draw_rng(device=device)[0]

    def call(x: Tensor, rng: Tensor) -> Tensor:
        return mxtrain.stochastic_round(x, out, rng)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        x, rng = inputs
        return byte_error(
            (got[w], reference.stochastic_round(x[w].cpu(), out, rng.cpu()))
            for w in windows(rows, cols, elements, False)
        )

    moved = matrix_bytes(rows, cols, torch.float32) + matrix_bytes(rows, cols, out)
    return Case(name, make, call, moved, 0, "stochastic_round", check)


@family("swizzle_scale")
def swizzle_scale(name: str, format: str, shape: str) -> Case:
    """swizzle_scale/FORMAT/RxC: the scales of an operand [R, C] to the 128x4 tile layout."""
    fmt, (rows, cols) = format_named(format), parse_shape(shape)
    blocks = fmt.padded(cols) // fmt.block

    def make(device: torch.device) -> tuple:
        return (torch.randint(0, 255, (rows, blocks), dtype=torch.uint8, device=device),)

    def check(inputs: tuple, got: Tensor, elements: int) -> float:
        return byte_error([(got, reference.swizzle(inputs[0].cpu()))])

    moved = rows * blocks + -(-rows // 128) * -(-blocks // 4) * 512
    return Case(name, make, mxtrain.swizzle_scale, moved, 0, "swizzle_scale", check)


def _named(name: str, known: dict[str, torch.dtype]) -> torch.dtype:
    if name not in known:
        raise ValueError(f"a dtype must be one of {', '.join(known)}, got {name!r}")
    return known[name]
