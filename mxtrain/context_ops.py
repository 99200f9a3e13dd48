"""The fake kernels of RMSNorm and SwiGLU: the checks of csrc/ops/context_checks.cpp, and shapes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import op_checks as check
from .checks import FLOATS, as_float32
from .op_checks import _differ, _dtype, _fail, _known, _shape

GROUP = 128
MAX_COLS = 16384  # of RMSNorm, as kNormMaxCols in csrc/formats/context.h
_ADVICE = "Pass what the forward op returned."


def padded(cols: int) -> int:
    """cols, rounded up to whole groups."""
    return (cols + GROUP - 1) // GROUP * GROUP


# ---- checks ----


def _check_dtype(op: str, name: str, dtype: torch.dtype, x: Tensor) -> None:
    if dtype not in FLOATS:
        context = f"the first argument has shape {_shape(x)}"
        condition = "be bfloat16, float16 or float32"
        _fail(op, name, condition, _dtype(dtype), context, "Convert afterwards.")


def _check_cols(op: str, name: str, x: Tensor) -> None:
    if _known(x.shape[1]) and not 0 < x.shape[1] <= MAX_COLS:
        advice = "Use torch.nn.functional.rms_norm."
        condition = f"have 1 to {MAX_COLS} columns"
        _fail(op, name, condition, x.shape[1], f"shape {_shape(x)}", advice)


def _check_weight(op: str, weight: Tensor | None, x: Tensor) -> None:
    if weight is None:
        return
    fits = weight.dtype in FLOATS and weight.dim() == 1
    if not fits or _differ(weight.shape[0], x.shape[1]):
        condition = f"be bfloat16, float16 or float32 of shape [{x.shape[1]}]"
        got = f"{_dtype(weight.dtype)} {_shape(weight)}"
        context = f"the first argument has shape {_shape(x)}"
        _fail(op, "weight", condition, got, context, "Convert or reshape it.")
    check.check_same_device(op, "weight", weight, x)


def _check_part(
    op: str, name: str, t: Tensor, dtype: torch.dtype, shape: tuple, x: Tensor
) -> None:  # fmt: skip
    fits = t.dtype == dtype and t.dim() == len(shape)
    if not fits or any(_differ(have, want) for have, want in zip(t.shape, shape, strict=True)):
        condition = f"be {_dtype(dtype)} of shape [{', '.join(map(str, shape))}]"
        got, context = f"{_dtype(t.dtype)} {_shape(t)}", f"the gradient has shape {_shape(x)}"
        _fail(op, name, condition, got, context, _ADVICE)
    check.check_same_device(op, name, t, x)


def _check_context(
    op: str, high: Tensor, low: Tensor, scale: Tensor, parts: int, x: Tensor
) -> None:  # fmt: skip
    rows, kp = x.shape[0], padded(x.shape[1])
    _check_part(op, "high", high, torch.int8, (parts, rows, kp), x)
    _check_part(op, "low", low, torch.uint8, (parts, rows, kp // 4), x)
    _check_part(op, "scale", scale, torch.float32, (parts, rows, kp // GROUP), x)


def _check_forward(x: Tensor, weight: Tensor | None, eps: float, out_dtype: torch.dtype) -> None:
    op = "rms_norm_forward"
    check.check_matrix(op, "x", x)
    _check_cols(op, "x", x)
    _check_weight(op, weight, x)
    if not (math.isfinite(as_float32(eps)) and eps >= 0):
        condition, got = "be finite and at least 0", f"{eps:g}"
        _fail(op, "eps", condition, got, f"x has shape {_shape(x)}", "Try 1e-6.")
    _check_dtype(op, "out_dtype", out_dtype, x)


def _check_swiglu(gate: Tensor, up: Tensor) -> None:
    op = "swiglu_forward"
    check.check_matrix(op, "gate", gate)
    fits = up.dtype == gate.dtype and up.dim() == 2
    if not fits or any(_differ(a, b) for a, b in zip(up.shape, gate.shape, strict=True)):
        got = f"{_dtype(up.dtype)} {_shape(up)}"
        context = f"gate is {_dtype(gate.dtype)} {_shape(gate)}"
        advice = "Pass the two halves of a gated layer."
        _fail(op, "up", "have the dtype and shape of gate", got, context, advice)
    check.check_same_device(op, "up", up, gate)


# ---- fake kernels ----


def _empty_context(x: Tensor, parts: int, kept: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, kp = (x.shape[0], padded(x.shape[1])) if kept else (0, 0)
    return (
        x.new_empty((parts, rows, kp), dtype=torch.int8),
        x.new_empty((parts, rows, kp // 4), dtype=torch.uint8),
        x.new_empty((parts, rows, kp // GROUP), dtype=torch.float32),
    )


@torch.library.register_fake("mxtrain::rms_norm_forward")
def _(x, weight, eps, out_dtype, context=True):
    _check_forward(x, weight, eps, out_dtype)
    rows = x.shape[0] if context else 0
    return (
        x.new_empty(tuple(x.shape), dtype=out_dtype), *_empty_context(x, 1, context),
        x.new_empty((rows,), dtype=torch.float32),
    )  # fmt: skip


@torch.library.register_fake("mxtrain::rms_norm_backward")
def _(dy, high, low, scale, rstd, weight, dx_dtype, weight_grad=True):
    op = "rms_norm_backward"
    check.check_matrix(op, "dy", dy)
    _check_cols(op, "dy", dy)
    _check_context(op, high, low, scale, 1, dy)
    _check_part(op, "rstd", rstd, torch.float32, (dy.shape[0],), dy)
    _check_weight(op, weight, dy)
    _check_dtype(op, "dx_dtype", dx_dtype, dy)
    cols = dy.shape[1] if weight is not None and weight_grad else 0
    return (
        dy.new_empty(tuple(dy.shape), dtype=dx_dtype),
        dy.new_empty((cols,), dtype=torch.float32),
    )  # fmt: skip


@torch.library.register_fake("mxtrain::swiglu_forward")
def _(gate, up, context=True):
    _check_swiglu(gate, up)
    return gate.new_empty(tuple(gate.shape)), *_empty_context(gate, 2, context)


@torch.library.register_fake("mxtrain::swiglu_backward")
def _(dh, high, low, scale, dtype):
    op = "swiglu_backward"
    check.check_matrix(op, "dh", dh)
    _check_context(op, high, low, scale, 2, dh)
    _check_dtype(op, "dtype", dtype, dh)
    return dh.new_empty((dh.shape[0], 2 * dh.shape[1]), dtype=dtype)
