"""What the fake kernels check: the checks of csrc/check.cpp and csrc/ops, in the same words.

The real kernels check in C++. These make `torch.compile` and meta tensors refuse the same calls
with the same messages, in the same order. A size that is symbolic is not looked at: the kernels
check it when they run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, as_float32, refusal
from .formats import ACCUMULATE, FORMATS, HADAMARD_GROUPS, ROUNDINGS, SCALE_RULES, Format

BY_CODE: list[Format] = list(FORMATS.values())
MAX_SIZE = 2**56  # as check_sizes in csrc/check.cpp
BYTE = torch.uint8
STATISTICS_PARTS = 128  # as kStatisticsParts in csrc/formats/statistics.h
ROUND_TARGETS = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def _fail(op: str, argument: str, condition: str, got: object, context: str, advice: str) -> None:
    raise RuntimeError(refusal(op, argument, condition, got, context, advice))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(t: Tensor) -> str:
    return "[" + ", ".join(map(str, t.shape)) + "]"


def _device(t: Tensor) -> str:
    return t.device.type if t.device.index is None or t.device.type == "cpu" else str(t.device)


def _known(*values: object) -> bool:
    return all(type(v) is int for v in values)


def _differ(a: object, b: object) -> bool:
    return _known(a, b) and a != b


# ---- one argument ----


def check_sizes(op: str, name: str, t: Tensor) -> None:
    for size in t.shape:
        if _known(size) and size > MAX_SIZE:
            advice = "No memory holds as many; split it."
            _fail(op, name, "have sizes of at most 2^56", size, f"shape {_shape(t)}", advice)


def check_float(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOATS:
        condition, shape = "be bfloat16, float16 or float32", f"shape {_shape(t)}"
        _fail(op, name, condition, _dtype(t.dtype), shape, "Convert it first.")


def check_matrix(op: str, name: str, t: Tensor) -> None:
    check_float(op, name, t)
    if t.dim() != 2:
        advice = "Flatten the leading axes: x.flatten(0, -2)."
        _fail(op, name, "have 2 dimensions", t.dim(), f"shape {_shape(t)}", advice)
    check_sizes(op, name, t)


def check_same_device(op: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.device != x.device:
        condition = "be on the device of the first argument"
        context = f"the first argument is on {_device(x)}"
        _fail(op, name, condition, _device(t), context, "Move it there.")


def check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    """A meta tensor among real ones brings a call to the fake kernels: refuse it."""
    for name, t in others.items():
        if t is not None:
            check_same_device(op, name, t, x)


def check_choice(op: str, name: str, value: int, known: list[str]) -> None:
    if not 0 <= value < len(known):
        names = ", ".join(f"{i} {text}" for i, text in enumerate(known))
        advice = "Use the names in mxtrain.formats."
        _fail(op, name, "be one of the known codes", value, f"known: {names}", advice)


def check_format(op: str, code: int) -> Format:
    check_choice(op, "format", code, list(FORMATS))
    return BY_CODE[code]


def check_group(
    op: str, name: str, group: int, none: bool, signs: Tensor | None, x: Tensor
) -> None:  # fmt: skip
    """check_hadamard of csrc/check.cpp."""
    if group not in HADAMARD_GROUPS and not (none and group == 0):
        *most, last = (str(g) for g in ([0] if none else []) + list(HADAMARD_GROUPS))
        condition, context = f"be {', '.join(most)} or {last}", f"x has shape {_shape(x)}"
        _fail(op, name, condition, group, context, "Choose one of these.")
    if signs is None:
        return
    if group == 0:
        got, advice = f"signs of shape {_shape(signs)}", f"Set {name}, or leave signs out."
        _fail(op, "signs", "come with a Hadamard group", got, f"{name} is 0", advice)
    advice = "See mxtrain.draw_signs."
    if signs.dtype != torch.int8:
        _fail(op, "signs", "be int8", _dtype(signs.dtype), f"shape {_shape(signs)}", advice)
    if signs.dim() != 1 or _differ(signs.shape[0], group) or not signs.is_contiguous():
        condition = f"be contiguous, of shape [{group}]"
        _fail(op, "signs", condition, _shape(signs), f"{name} is {group}", advice)
    check_same_device(op, "signs", signs, x)


def check_rng(op: str, rng: Tensor | None, x: Tensor) -> None:
    if rng is None:
        advice = "Pass int64 [2] (seed, offset); see mxtrain.draw_rng."
        context = f"x has shape {_shape(x)}"
        _fail(op, "rng", "be given for stochastic rounding", "None", context, advice)
    if rng.dtype != torch.int64 or rng.dim() != 1 or _differ(rng.shape[0], 2):
        condition, context = "be int64 of shape [2]", f"shape {_shape(rng)}"
        _fail(op, "rng", condition, _dtype(rng.dtype), context, "See mxtrain.draw_rng.")
    check_same_device(op, "rng", rng, x)


def check_float_dtype(op: str, name: str, dtype: torch.dtype, what: str, t: Tensor) -> None:
    if dtype not in FLOATS:
        condition, context = "be bfloat16, float16 or float32", f"{what} {_shape(t)}"
        _fail(op, name, condition, _dtype(dtype), context, "Convert afterwards.")


# ---- operands ----


def check_operand(
    op: str, name: str, data: Tensor, scale: Tensor, tensor_scale: Tensor | None, code: int,
    tiles_too: bool = False,
) -> tuple[int, int]:  # fmt: skip
    """(rows, Kp); tiles_too: whether scale may be swizzled."""
    f = check_format(op, code)
    as_made, either = "Pass what quantize returned.", ", or 3 where it is swizzled"
    if data.dtype != BYTE or data.dim() != 2:
        condition, context = "be uint8 with 2 dimensions", f"shape {_shape(data)}"
        _fail(op, f"{name} data", condition, _dtype(data.dtype), context, as_made)
    in_tiles = tiles_too and scale.dtype == BYTE and scale.dim() == 3
    if not in_tiles and (scale.dtype != BYTE or scale.dim() != 2):
        condition = f"be uint8 with 2 dimensions{either if tiles_too else ''}"
        advice = as_made if tiles_too else "Unswizzle a swizzled scale first."
        context = f"shape {_shape(scale)}"
        _fail(op, f"{name} scale", condition, _dtype(scale.dtype), context, advice)
    check_sizes(op, name, data)
    rows, width = data.shape
    kp = width * 8 // f.bits
    whole = not _known(width) or (width > 0 and kp * f.bits == width * 8 and kp % f.block == 0)
    if not whole:
        condition = f"hold whole blocks of {f.block} codes of {f.bits} bits"
        got = f"rows of {width} bytes"
        _fail(op, f"{name} data", condition, got, f"format {f.name}", "Check the format.")
    blocks, context = kp // f.block, f"format {f.name}, data {_shape(data)}"
    if in_tiles:
        tiles = ((rows + 127) // 128, (blocks + 3) // 4, 512)
        if any(_differ(a, b) for a, b in zip(scale.shape, tiles, strict=True)):
            condition = f"have shape [{tiles[0]}, {tiles[1]}, 512] where it is swizzled"
            advice = (
                f"Pass what swizzle_scale made of {rows} x {blocks} scales; "
                "it pads them to 128 rows and 4 columns."
            )
            _fail(op, f"{name} scale", condition, _shape(scale), context, advice)
    elif _differ(scale.shape[0], rows) or _differ(scale.shape[1], blocks):
        condition = f"have shape [{rows}, {blocks}]"
        _fail(op, f"{name} scale", condition, _shape(scale), context, "Check the format.")
    check_same_device(op, "scale", scale, data)
    given = tensor_scale is not None and tensor_scale.numel() > 0
    if given != f.two_level:
        condition = f"be {'given' if f.two_level else 'absent'}"
        got, context = _shape(tensor_scale) if given else "None", f"format {f.name}"
        _fail(op, f"{name} tensor_scale", condition, got, context, "Only nvfp4 has one.")
    if given:
        if tensor_scale.dtype != torch.float32 or _differ(tensor_scale.numel(), 1):
            got, context = _dtype(tensor_scale.dtype), f"shape {_shape(tensor_scale)}"
            what = f"{name} tensor_scale"
            _fail(op, what, "be one float32", got, context, "Pass what quantize returned.")
        check_same_device(op, "tensor_scale", tensor_scale, data)
    return rows, kp


def check_cols(op: str, cols: int, kp: int, code: int) -> None:
    f = BY_CODE[code]
    if _known(cols, kp) and not kp - f.block < cols <= kp:
        context, advice = f"rows of {kp} codes, format {f.name}", "Pass the operand's logical K."
        _fail(op, "cols", "lie in the last block of the operand", cols, context, advice)


# ---- whole calls ----


class Target(NamedTuple):
    """What one operand is quantized to."""

    format: int
    scale_rule: int
    rounding: int
    hadamard: int
    signs: Tensor | None
    prescale: float
    toward: Tensor | None


def check_target(op: str, x: Tensor, t: Target, rng: Tensor | None, k: int) -> None:
    """k: the length of the block axis."""
    f = check_format(op, t.format)
    check_choice(op, "scale_rule", t.scale_rule, list(SCALE_RULES))
    check_choice(op, "rounding", t.rounding, list(ROUNDINGS))
    shape = f"x has shape {_shape(x)}"
    if _known(k) and k <= 0:
        condition, context = "have a block axis longer than 0", f"shape {_shape(x)}"
        advice = "A product over no elements is zero; handle it before quantizing."
        _fail(op, "x", condition, 0, context, advice)
    check_group(op, "hadamard", t.hadamard, True, t.signs, x)
    if _known(k) and t.hadamard and f.padded(k) % t.hadamard:
        context = f"K = {k}, padded to {f.padded(k)}"
        advice = f"Pad x with zeros to a multiple of {t.hadamard}, or take a smaller group."
        condition = "divide the padded contraction axis"
        _fail(op, "hadamard", condition, t.hadamard, context, advice)
    if not (math.isfinite(as_float32(t.prescale)) and as_float32(t.prescale) > 0):
        condition, got = "be finite and positive", f"{t.prescale:g}"
        _fail(op, "prescale", condition, got, shape, "Use 1 for none.")
    rounding = list(ROUNDINGS)[t.rounding]
    if rounding == "stochastic":
        check_rng(op, rng, x)
    if (rounding == "toward") != (t.toward is not None):
        condition = "be given with rounding 'toward' and only then"
        got = "None" if t.toward is None else "a tensor"
        _fail(op, "toward", condition, got, f"rounding is {rounding}", "Give both, or neither.")
    if t.toward is None:
        return
    check_matrix(op, "toward", t.toward)
    if any(_differ(a, b) for a, b in zip(t.toward.shape, x.shape, strict=True)):
        advice = "With transpose too, it lies as x does."
        _fail(op, "toward", "have x's shape", _shape(t.toward), shape, advice)
    check_same_device(op, "toward", t.toward, x)


def check_requantize(
    data: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: int, cols: int, t: Target,
    rng: Tensor | None,
) -> None:  # fmt: skip
    op = "requantize"
    rows, kp = check_operand(op, "operand", data, scale, tensor_scale, format)
    check_cols(op, cols, kp, format)
    if t.rounding == ROUNDINGS["toward"]:
        context, advice = f"format {BY_CODE[format].name}", "Quantize from the original for Q-EMA."
        _fail(op, "rounding", "be nearest or stochastic", "toward", context, advice)
    check_target(op, data, t, rng, rows)


def check_dequantize(
    data: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: int, cols: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    op = "dequantize"
    _, kp = check_operand(op, "operand", data, scale, tensor_scale, format)
    check_cols(op, cols, kp, format)
    check_float_dtype(op, "dtype", dtype, "data", data)


def check_hadamard(x: Tensor, group: int, signs: Tensor | None) -> None:
    op = "hadamard"
    check_float(op, "x", x)
    if x.dim() < 1:
        _fail(op, "x", "have at least 1 dimension", 0, "shape []", "Reshape it.")
    check_group(op, "group", group, False, signs, x)
    if _known(x.shape[-1]) and x.shape[-1] % group:
        advice = f"Pad x with zeros to a multiple of {group}, or take a smaller group."
        _fail(op, "group", "divide the last axis", group, f"x has shape {_shape(x)}", advice)


def check_stochastic_round(x: Tensor, dtype: torch.dtype, rng: Tensor) -> None:
    op = "stochastic_round"
    if x.dtype != torch.float32:
        got, context = _dtype(x.dtype), f"shape {_shape(x)}"
        _fail(op, "x", "be float32", got, context, "Convert it first.")
    if dtype not in ROUND_TARGETS:
        condition, context = "be bfloat16, float8_e4m3fn or float8_e5m2", f"x has shape {_shape(x)}"
        _fail(op, "dtype", condition, _dtype(dtype), context, "Choose one of these.")
    check_rng(op, rng, x)


def check_swizzle(scale: Tensor) -> None:
    op = "swizzle_scale"
    if scale.dtype != BYTE or scale.dim() != 2:
        condition, context = "be uint8 with 2 dimensions", f"shape {_shape(scale)}"
        advice = "Pass the scale of an unswizzled operand."
        _fail(op, "scale", condition, _dtype(scale.dtype), context, advice)
    check_sizes(op, "scale", scale)


def check_unswizzle(scale: Tensor, rows: int, cols: int) -> None:
    op = "unswizzle_scale"
    if any(_known(n) and not 0 <= n <= MAX_SIZE for n in (rows, cols)):
        context, advice = f"scale {_shape(scale)}", "Pass the shape that was swizzled."
        got = f"{rows} and {cols}"
        _fail(op, "rows and cols", "lie in [0, 2^56]", got, context, advice)
    tiles = ((rows + 127) // 128, (cols + 3) // 4, 512)
    fits = scale.dtype == BYTE and scale.dim() == 3
    if not fits or any(_differ(a, b) for a, b in zip(scale.shape, tiles, strict=True)):
        condition = f"be uint8 of shape [{tiles[0]}, {tiles[1]}, 512]"
        got = f"{_dtype(scale.dtype)} {_shape(scale)}"
        context, advice = f"for {rows} x {cols} scales", "Pass what swizzle_scale returned."
        _fail(op, "scale", condition, got, context, advice)


def check_gemm(
    a: tuple[Tensor, Tensor, Tensor | None], b: tuple[Tensor, Tensor, Tensor | None], format: int,
    bias: Tensor | None, alpha: float, out_dtype: torch.dtype, accumulate: int, op: str = "gemm",
) -> None:  # fmt: skip
    _, a_kp = check_operand(op, "a", *a, format, True)
    n, b_kp = check_operand(op, "b", *b, format, True)
    shapes = f"a data {_shape(a[0])}, b data {_shape(b[0])}"
    if _differ(a_kp, b_kp):
        condition, got = "have the same K", f"{a_kp} and {b_kp}"
        context = f"padded, format {BY_CODE[format].name}; {shapes}"
        advice = "Both are quantized along the contraction axis: D = A B^T."
        _fail(op, "a and b", condition, got, context, advice)
    check_same_device(op, "b", b[0], a[0])
    check_float_dtype(op, "out_dtype", out_dtype, "a data", a[0])
    if not math.isfinite(as_float32(alpha)):
        advice = "It is a float32 factor on the product; 1 for none."
        _fail(op, "alpha", "be finite", f"{alpha:g}", f"a data {_shape(a[0])}", advice)
    check_choice(op, "accumulate", accumulate, list(ACCUMULATE))
    if bias is None:
        return
    if bias.dtype not in FLOATS or bias.dim() != 1 or _differ(bias.shape[0], n):
        condition = f"be bfloat16, float16 or float32 of shape [{n}]"
        got = f"{_dtype(bias.dtype)} {_shape(bias)}"
        _fail(op, "bias", condition, got, f"b has {n} rows", "Convert or reshape it.")
    check_same_device(op, "bias", bias, a[0])


def check_accumulator(out: Tensor, a: Tensor, b: Tensor) -> None:
    size = (a.shape[0], b.shape[0])
    fits = out.dtype == torch.float32 and out.dim() == 2 and out.is_contiguous()
    if not fits or any(_differ(have, want) for have, want in zip(out.shape, size, strict=True)):
        condition = f"be contiguous, float32 of shape [{size[0]}, {size[1]}]"
        strided = "" if out.is_contiguous() else " strided"
        got, advice = f"{_dtype(out.dtype)} {_shape(out)}{strided}", "Allocate it with torch.zeros."
        _fail("gemm_add_", "out", condition, got, f"a data {_shape(a)}, b data {_shape(b)}", advice)
    check_same_device("gemm_add_", "out", out, a)


def check_statistics(
    op: str, name: str, x: Tensor, data: Tensor, scale: Tensor, tensor_scale: Tensor | None,
    format: int,
) -> None:  # fmt: skip
    check_matrix(op, name, x)
    rows, kp = check_operand(op, "operand", data, scale, tensor_scale, format)
    check_cols(op, x.shape[1], kp, format)
    if _differ(rows, x.shape[0]):
        context = f"data {_shape(data)}, {name} {_shape(x)}"
        advice = "Pass the operand that was made of it."
        _fail(op, "data", f"have the rows of {name}", rows, context, advice)
    check_same_device(op, "data", data, x)


def check_prescale(op: str, x: Tensor, prescale: float) -> None:
    p = as_float32(prescale)
    if not (p > 0 and math.isfinite(p)):
        context, got = f"x has shape {_shape(x)}", f"{prescale:g}"
        _fail(op, "prescale", "be finite and positive", got, context, "Use 1 for none.")


def check_movement(state: Tensor, sums: Tensor, w: Tensor) -> None:
    op, advice = "oscillation_step_", "Allocate it with torch.zeros."
    planes = (5, *w.shape)
    for name, t, dtype, shape, sizes in (
        ("state", state, torch.float32, "[5, rows, cols]", planes),
        ("sums", sums, torch.float64, "[128, 5]", (STATISTICS_PARTS, 5)),
    ):
        fits = t.dtype == dtype and t.dim() == len(sizes) and t.is_contiguous()
        if not fits or any(_differ(a, b) for a, b in zip(t.shape, sizes, strict=True)):
            condition = f"be contiguous, of dtype {_dtype(dtype)} and shape {shape}"
            strided = "" if t.is_contiguous() else " strided"
            got, context = f"{_dtype(t.dtype)} {_shape(t)}{strided}", f"w {_shape(w)}"
            _fail(op, name, condition, got, context, advice)
        check_same_device(op, name, t, w)


def check_column_sum(dy: Tensor) -> None:
    if dy.dim() != 2 or dy.dtype not in FLOATS:
        condition = "be a matrix of bfloat16, float16 or float32"
        advice = "Reshape or convert it first."
        _fail("column_sum", "dy", condition, _dtype(dy.dtype), f"shape {_shape(dy)}", advice)
