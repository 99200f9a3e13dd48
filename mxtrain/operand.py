"""Quantized operands, and the functions that make, change and multiply them.

Names and defaults over `torch.ops.mxtrain`. The ops check their arguments; here names become codes.
docs/numerics.md defines the bytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ._library import LIBRARY
from .checks import (
    check_bool,
    check_device,
    check_dtype,
    check_int,
    check_name,
    check_number,
    check_tensor,
    kind,
    refusal,
    show,
)
from .formats import (
    ACCUMULATE,
    FORMATS,
    GEMM_BACKENDS,
    ROUNDINGS,
    SCALE_RULES,
    Format,
    format_named,
)
from .recipe import Quantizer

_ops = torch.ops.mxtrain


@dataclass(frozen=True, eq=False)  # tensors have no one truth of ==
class Operand:
    """A logical `[R, K]` matrix, quantized in blocks along K.

    Attributes:
        data: uint8 `[R, Kp * bits / 8]`, the element codes; Kp is K rounded up to a block.
        scale: uint8 `[R, Kp / block]` block scales; `[ceil(R/128), ceil(Kp/block/4), 512]` where
            swizzled.
        format: the format's name.
        shape: (R, K).
        tensor_scale: float32 `[1]` for nvfp4, else None.
        swizzled: whether scale is in the 128x4 tile layout.
    """

    data: Tensor
    scale: Tensor
    format: str
    shape: tuple[int, int]
    tensor_scale: Tensor | None = None
    swizzled: bool = False

    def __post_init__(self) -> None:
        check_name("Operand", "format", self.format, FORMATS)
        check_tensor("Operand", "data", self.data)
        check_tensor("Operand", "scale", self.scale)
        check_tensor("Operand", "tensor_scale", self.tensor_scale, optional=True)
        check_bool("Operand", "swizzled", self.swizzled)
        if not isinstance(self.shape, tuple) or len(self.shape) != 2:
            got, advice = show(self.shape), "Pass what quantize returned."
            raise TypeError(
                refusal("Operand", "shape", "be a tuple (R, K)", got, kind(self.shape), advice)
            )
        for size in self.shape:
            check_int("Operand", "shape", size, low=0)
        if self.data.dim() != 2 or self.data.shape[0] != self.shape[0]:
            context, advice = f"data {list(self.data.shape)}", "Pass what quantize returned."
            raise ValueError(
                refusal("Operand", "shape", "have data's rows", self.shape, context, advice)
            )

        if self.scale.dim() != (3 if self.swizzled else 2):
            got, context = self.swizzled, f"scale {list(self.scale.shape)}"
            condition = "be true of scales in tiles, of 3 dimensions, and only of them"
            advice = "Pass what quantize or swizzle_scale returned."
            raise ValueError(refusal("Operand", "swizzled", condition, got, context, advice))

    def __repr__(self) -> str:
        """Without the codes and scales, which may be large and on a GPU."""
        layout = ", swizzled=True" if self.swizzled else ""
        return f"Operand({self.format!r}, shape={self.shape}, device='{self.data.device}'{layout})"

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.data.nbytes + self.scale.nbytes

    def plain_scale(self) -> Tensor:
        """The block scales as `[R, Kp / block]`, unswizzled where need be."""
        if not self.swizzled:
            return self.scale
        fmt = FORMATS[self.format]
        return unswizzle_scale(self.scale, self.shape[0], fmt.padded(self.shape[1]) // fmt.block)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values as `[R, K]` of dtype (float32, bfloat16 or float16)."""
        return dequantize(self, dtype)


def wrap(
    parts: tuple[Tensor, Tensor, Tensor], fmt: Format, shape: tuple[int, int], swizzled: bool
) -> Operand:
    """An Operand from what an op returned."""
    data, scale, tensor_scale = parts
    return Operand(data, scale, fmt.name, shape, tensor_scale if fmt.two_level else None, swizzled)


def _codes(what: str, scale_rule: str, rounding: str) -> tuple[int, int]:
    check_name(what, "scale_rule", scale_rule, SCALE_RULES)
    check_name(what, "rounding", rounding, ROUNDINGS)
    return SCALE_RULES[scale_rule], ROUNDINGS[rounding]


def _check_operand(what: str, argument: str, value: object) -> None:
    if not isinstance(value, Operand):
        got, advice = type(value).__name__, "Make one with mxtrain.quantize."
        raise TypeError(refusal(what, argument, "be an Operand", got, show(value), advice))


def _check_target(what: str, hadamard: object, prescale: object, swizzle: object) -> None:
    check_int(what, "hadamard", hadamard)
    check_number(what, "prescale", prescale)
    check_bool(what, "swizzle", swizzle)


def _check_tensors(what: str, **tensors: object) -> None:
    """Of arguments that may be None."""
    for name, t in tensors.items():
        if t is not None:
            check_tensor(what, name, t, optional=True)


def quantize(
    x: Tensor,
    format: str,
    *,
    scale_rule: str = "ceil",
    rounding: str = "nearest",
    transpose: bool = False,
    rng: Tensor | None = None,
    hadamard: int = 0,
    signs: Tensor | None = None,
    prescale: float = 1.0,
    toward: Tensor | None = None,
    swizzle: bool = False,
) -> Operand:
    """Quantize a matrix in blocks along its last axis.

    With `transpose`: along its first, as the operand of x.T.

    Args:
        x: `[R, K]`, bfloat16, float16 or float32, any strides.
        format: a name of `mxtrain.formats.FORMATS`: "mxfp4", "mxfp8_e4m3", "nvfp4", ...
        scale_rule: "floor" (OCP MX), "ceil" (never clips) or "even".
        rounding: "nearest" (ties to even), "stochastic" (needs rng) or "toward" (needs toward).
        transpose: quantize x.T, blocked along x's first axis.
        rng: int64 `[2]` (seed, offset) on x's device; see `draw_rng`.
        hadamard: rotate groups of 16, 32, 64, 128 or 256 along K first; 0 for none.
        signs: int8 `[hadamard]`; negative entries flip their element before the rotation.
        prescale: factor on the elements, after the scale is chosen and before rounding.
        toward: a tensor of x's shape; each element rounds to whichever of its two neighbours is
            nearer to it (Q-EMA).
        swizzle: return the scales in the 128x4 tile layout.

    Returns:
        Operand of shape (R, K), or (K, R) with transpose.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for tensors that do not fit; see `mxtrain.ops`.
    """
    check_tensor("quantize", "x", x)
    fmt = format_named(format)
    rule, mode = _codes("quantize", scale_rule, rounding)
    check_bool("quantize", "transpose", transpose)
    _check_target("quantize", hadamard, prescale, swizzle)
    _check_tensors("quantize", rng=rng, signs=signs, toward=toward)
    parts = _ops.quantize(
        x, fmt.code, rule, mode, transpose, rng, hadamard, signs, prescale, toward, swizzle
    )
    shape = (x.shape[1], x.shape[0]) if transpose else (x.shape[0], x.shape[1])
    return wrap(parts, fmt, shape, swizzle)


def quantize_dual(
    x: Tensor,
    row: Quantizer,
    col: Quantizer,
    *,
    rng: Tensor | None = None,
    row_signs: Tensor | None = None,
    col_signs: Tensor | None = None,
    row_toward: Tensor | None = None,
    col_toward: Tensor | None = None,
    swizzle: bool = False,
    column_sum: bool = False,
) -> tuple[Operand, Operand] | tuple[Operand, Operand, Tensor]:
    """The operand of x by `row` and of x.T by `col`, from one read of x.

    The same bytes as `quantize(x, ...)` and `quantize(x, ..., transpose=True)` with the same rng.

    Args:
        x: `[R, K]`, as in `quantize`.
        row, col: `mxtrain.Quantizer`s; their format must not be None. (Their `signs` field is not
            read: pass the vectors.)
        rng, row_signs, col_signs, row_toward, col_toward, swizzle: as in `quantize`.
        column_sum: return `column_sum(x)` too, where the kernel can from the same read.

    Returns:
        Operands of shape (R, K) and (K, R); with `column_sum` then float32 `[K]`.
    """
    check_tensor("quantize_dual", "x", x)
    check_bool("quantize_dual", "swizzle", swizzle)
    check_bool("quantize_dual", "column_sum", column_sum)
    _check_tensors(
        "quantize_dual", rng=rng, row_signs=row_signs, col_signs=col_signs, row_toward=row_toward,
        col_toward=col_toward,
    )  # fmt: skip
    formats, arguments = [], []
    sides = (("row", row, row_signs, row_toward), ("col", col, col_signs, col_toward))
    for side, quantizer, signs, toward in sides:
        if not isinstance(quantizer, Quantizer):
            got, advice = type(quantizer).__name__, 'Pass one such as mxtrain.Quantizer("mxfp4").'
            condition = "be a mxtrain.Quantizer"
            raise TypeError(refusal("quantize_dual", side, condition, got, show(quantizer), advice))
        fmt = format_named(quantizer.format, "quantize_dual")
        rule, mode = _codes("quantize_dual", quantizer.scale_rule, quantizer.rounding)
        formats.append(fmt)
        arguments += [fmt.code, rule, mode, quantizer.hadamard, signs, quantizer.factor, toward]
    *parts, sums = _ops.quantize_dual(x, rng, *arguments, swizzle, column_sum)
    rows, cols = x.shape
    a = wrap(parts[:3], formats[0], (rows, cols), swizzle)
    b = wrap(parts[3:], formats[1], (cols, rows), swizzle)
    return (a, b, sums) if column_sum else (a, b)


def requantize(
    operand: Operand,
    format: str | None = None,
    *,
    scale_rule: str = "ceil",
    rounding: str = "nearest",
    rng: Tensor | None = None,
    hadamard: int = 0,
    signs: Tensor | None = None,
    prescale: float = 1.0,
    swizzle: bool = False,
) -> Operand:
    """The operand of the transpose, straight from packed bytes (TetraJet's double quantization).

    Equals `quantize(operand.dequantize(), ..., transpose=True)` bit for bit.

    Args:
        operand: of shape (R, K).
        format: of the result; the operand's own by default.
        scale_rule, rounding, rng, hadamard, signs, prescale, swizzle: as in `quantize`; rounding is
            not "toward".

    Returns:
        Operand of shape (K, R).
    """
    _check_operand("requantize", "operand", operand)
    fmt = format_named(operand.format if format is None else format, "requantize")
    rule, mode = _codes("requantize", scale_rule, rounding)
    _check_target("requantize", hadamard, prescale, swizzle)
    _check_tensors("requantize", rng=rng, signs=signs)
    rows, cols = operand.shape
    parts = _ops.requantize(
        operand.data,
        operand.plain_scale(),
        operand.tensor_scale,
        FORMATS[operand.format].code,
        cols,
        fmt.code,
        rule,
        mode,
        rng,
        hadamard,
        signs,
        prescale,
        swizzle,
    )
    return wrap(parts, fmt, (cols, rows), swizzle)


def dequantize(operand: Operand, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of an operand as `[R, K]` of dtype (float32, bfloat16 or float16)."""
    _check_operand("dequantize", "operand", operand)
    check_dtype("dequantize", "dtype", dtype)
    code = FORMATS[operand.format].code
    return _ops.dequantize(
        operand.data, operand.plain_scale(), operand.tensor_scale, code, operand.shape[1], dtype
    )


def _check_factors(what: str, a: Operand, b: Operand, alpha: float, accumulate: str) -> None:
    _check_operand(what, "a", a)
    _check_operand(what, "b", b)
    check_name(what, "accumulate", accumulate, ACCUMULATE)
    check_number(what, "alpha", alpha)
    if a.format != b.format:
        got, advice = f"{a.format} and {b.format}", "Quantize both to one format."
        context = f"a {a.shape}, b {b.shape}"
        raise ValueError(refusal(what, "a and b", "have the same format", got, context, advice))
    if a.shape[1] != b.shape[1]:
        got, context = f"{a.shape[1]} and {b.shape[1]}", f"a {a.shape}, b {b.shape}"
        advice = "Both are quantized along the contraction axis: D = A B^T."
        raise ValueError(refusal(what, "a and b", "have the same K", got, context, advice))


def gemm(
    a: Operand,
    b: Operand,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: str = "fp32",
) -> Tensor:
    """D = alpha * A B^T + bias for operands A `[M, K]` and B `[N, K]`.

    Args:
        a, b: operands of the same format and K.
        bias: `[N]` float vector, or None.
        alpha: factor on the product.
        out_dtype: bfloat16, float16 or float32.
        accumulate: "fp32", or "fast" or "exact" where a backend has a quicker way, or one with less
            error: backend fold (mxfp4 on Ada and Hopper) sums 128 products, all, or 32 in the
            tensor cores' short accumulator before it adds them in float32. Elsewhere all are
            float32.

    Returns:
        `[M, N]` of out_dtype.

    Raises:
        ValueError: if the formats differ, or for an unknown name.
        RuntimeError: for tensors that do not fit.
    """
    _check_factors("gemm", a, b, alpha, accumulate)
    check_dtype("gemm", "out_dtype", out_dtype)
    check_tensor("gemm", "bias", bias, optional=True)
    return _ops.gemm(
        a.data,
        a.scale,
        a.tensor_scale,
        b.data,
        b.scale,
        b.tensor_scale,
        FORMATS[a.format].code,
        bias,
        alpha,
        out_dtype,
        ACCUMULATE[accumulate],
    )


def gemm_add_(
    out: Tensor, a: Operand, b: Operand, alpha: float = 1.0, accumulate: str = "fp32"
) -> Tensor:
    """out += alpha * A B^T in float32: a weight gradient over several steps, for instance.

    Args:
        out: contiguous float32 `[M, N]`, changed in place; autograd does not see the change.
        a, b, alpha, accumulate: as in `gemm`.

    Returns:
        out.

    Raises:
        ValueError: as `gemm`, and if out requires grad.
        RuntimeError: for tensors that do not fit.
    """
    what = "gemm_add_"
    _check_factors(what, a, b, alpha, accumulate)
    check_tensor(what, "out", out)
    if out.requires_grad:
        context, advice = f"shape {list(out.shape)}", "Pass a buffer, or out.detach()."
        raise ValueError(refusal(what, "out", "not require grad", True, context, advice))
    _ops.gemm_add_(
        out, a.data, a.scale, a.tensor_scale, b.data, b.scale, b.tensor_scale,
        FORMATS[a.format].code, alpha, ACCUMULATE[accumulate],
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)  # what was saved of out is not what it holds
    return out


def set_gemm_backend(name: str) -> str:
    """Say how `gemm` runs on CUDA from now on, in this process; returns what held before.

    "auto" (the default) takes the fastest that serves the format on the GPU, which
    `python -m mxtrain.env` lists; "fold" (mxfp4 on Ada and Hopper: exact folding into FP8) and
    "dequant" (every format: decode to BF16, cuBLAS) insist on one, for comparisons. "fold_packed"
    is "fold" with no FP8 copy of the operands in memory (Hopper), and "fold_mma" the "fold" of Ada,
    also on Hopper: to check it, slower there. "sm100" (10.0 and 10.3) and "sm120" (12.0 and 12.1)
    are block-scaled tensor cores (mxfp4, nvfp4, mxfp8), and "sm120_emulated" its kernels on Hopper,
    with the instruction emulated: to check them, very slow. The environment variable
    MXTRAIN_GEMM_BACKEND sets it at import. The CPU has one backend, whatever the setting.

    Raises:
        ValueError: for an unknown name. A `gemm` that the named backend cannot serve raises
            RuntimeError.
    """
    check_name("set_gemm_backend", "name", name, GEMM_BACKENDS)
    return list(GEMM_BACKENDS)[LIBRARY.mxtrain_set_gemm_backend(GEMM_BACKENDS[name])]


if "MXTRAIN_GEMM_BACKEND" in os.environ:
    set_gemm_backend(os.environ["MXTRAIN_GEMM_BACKEND"])


def hadamard(x: Tensor, group: int, signs: Tensor | None = None) -> Tensor:
    """(x * signs) H_group / sqrt(group) on consecutive groups along the last axis.

    In float32, rounded to x's dtype. Differentiable. group is 16, 32, 64, 128 or 256 and divides
    the last axis; signs is int8 `[group]`.
    """
    check_tensor("hadamard", "x", x)
    check_int("hadamard", "group", group)
    check_tensor("hadamard", "signs", signs, optional=True)
    return _ops.hadamard(x, group, signs)


def stochastic_round(x: Tensor, dtype: torch.dtype, rng: Tensor) -> Tensor:
    """Round float32 to bfloat16, float8_e4m3fn or float8_e5m2.

    Up with the probability of the fraction (in 2^-16 steps).
    """
    check_tensor("stochastic_round", "x", x)
    check_dtype("stochastic_round", "dtype", dtype)
    check_tensor("stochastic_round", "rng", rng)
    return _ops.stochastic_round(x, dtype, rng)


def column_sum(dy: Tensor) -> Tensor:
    """Float32 `[C]`, the sum over the rows of dy `[N, C]`: the bias gradient of a linear layer.

    Added in float32 in one order (docs/numerics.md), so the same on every device. Not
    differentiable. Raises RuntimeError for another dtype than bfloat16, float16 and float32, or
    another rank.
    """
    check_tensor("column_sum", "dy", dy)
    return _ops.column_sum(dy)


def swizzle_scale(scale: Tensor) -> Tensor:
    """Scales `[R, C]` in the 128x4 tile layout of Blackwell tensor cores.

    uint8 `[ceil(R/128), ceil(C/4), 512]`.
    """
    check_tensor("swizzle_scale", "scale", scale)
    return _ops.swizzle_scale(scale)


def unswizzle_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """The inverse of `swizzle_scale`: uint8 `[rows, cols]`."""
    check_tensor("unswizzle_scale", "scale", scale)
    check_int("unswizzle_scale", "rows", rows)
    check_int("unswizzle_scale", "cols", cols)
    return _ops.unswizzle_scale(scale, rows, cols)


def _check_draw(what: str, n: object, device: object) -> None:
    check_int(what, "n", n, low=0)
    check_device(what, device)


def draw_rng(n: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """n (seed, offset) pairs, int64 `[n, 2]`, from torch's default generator of the device.

    Pass one row as `rng`.
    """
    _check_draw("draw_rng", n, device)
    return torch.randint(0, 2**63 - 1, (n, 2), dtype=torch.int64, device=device)


def draw_signs(group: int, n: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """n vectors of random signs, int8 `[n, group]`, from the device's default generator."""
    check_int("draw_signs", "group", group, low=0)
    _check_draw("draw_signs", n, device)
    return torch.randint(0, 2, (n, group), dtype=torch.int8, device=device) * 2 - 1
