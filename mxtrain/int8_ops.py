"""The fake kernels of the int8_* ops: the checks of csrc/ops/int8_checks.cpp, and shapes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import op_checks as check
from .checks import FLOATS
from .formats import INT8_LAYOUTS
from .op_checks import _differ, _dtype, _fail, _known, _shape

BLOCK = 128


def blocks(size: int) -> int:
    """Blocks along an axis."""
    return (size + BLOCK - 1) // BLOCK


# ---- checks ----


def _check_quantize(
    op: str, x: Tensor, rounding: int, rng: Tensor | None, layout: int,
    threshold: Tensor | None = None,
) -> None:  # fmt: skip
    check.check_matrix(op, "x", x)
    if any(_known(size) and size == 0 for size in x.shape):
        advice = "A product over no elements is zero; handle it before quantizing."
        _fail(op, "x", "have elements", "none", f"shape {_shape(x)}", advice)
    context = f"x has shape {_shape(x)}"
    if rounding not in (0, 1):
        condition, advice = "be 0 nearest or 1 stochastic", "Use the names in mxtrain.formats."
        _fail(op, "rounding", condition, rounding, context, advice)
    check.check_choice(op, "layout", layout, list(INT8_LAYOUTS))
    if rounding == 1:
        check.check_rng(op, rng, x)
    if threshold is None:
        return
    if threshold.dtype != torch.float32 or _differ(threshold.numel(), 1):
        got = f"{_dtype(threshold.dtype)} {_shape(threshold)}"
        advice = "It is compared with the largest magnitude of a block."
        _fail(op, "threshold", "be one float32", got, context, advice)
    check.check_same_device(op, "threshold", threshold, x)


def _check_codes(op: str, name: str, t: Tensor) -> None:
    advice = "Pass what int8_quantize returned."
    if t.dtype != torch.int8 or t.dim() != 2:
        context = f"shape {_shape(t)}"
        _fail(op, name, "be int8 with 2 dimensions", _dtype(t.dtype), context, advice)
    check.check_sizes(op, name, t)
    if _known(t.shape[1]) and (t.shape[1] == 0 or t.shape[1] % BLOCK):
        condition, got = "hold whole blocks of 128 codes", f"rows of {t.shape[1]}"
        _fail(op, name, condition, got, f"shape {_shape(t)}", advice)


def _check_grid(
    op: str, name: str, t: Tensor, dtype: torch.dtype, side: str, own: Tensor,
    made_by: str = "int8_quantize",
) -> None:  # fmt: skip
    size = (blocks(own.shape[0]), own.shape[1] // BLOCK)
    fits = t.dtype == dtype and t.dim() == 2
    sizes = zip(t.shape, size, strict=True) if fits else ()
    if not fits or any(_differ(have, want) for have, want in sizes):
        condition = f"be {_dtype(dtype)} of shape [{size[0]}, {size[1]}]"
        got = f"{_dtype(t.dtype)} {_shape(t)}"
        context = f"{side} {_shape(own)} in blocks of 128 x 128"
        _fail(op, name, condition, got, context, f"Pass what {made_by} returned.")
    check.check_same_device(op, name, t, own)


def _is_pool(t: Tensor) -> bool:
    """Of tiles of 128 x 128 codes."""
    return (
        t.dtype == torch.int8 and t.dim() == 3 and not any(_differ(n, BLOCK) for n in t.shape[1:])
    )


def _check_residual(
    op: str, data: Tensor | None, scale: Tensor | None, mask: Tensor | None, of_b: bool, own: Tensor
) -> None:  # fmt: skip
    side, advice = "b" if of_b else "a", "Pass what int8_quantize_fallback returned."
    given = sum(t is not None for t in (data, scale, mask))
    if given not in (0, 3):
        condition, context = "be given together", f"of {side}"
        name = "residual, residual_scale and mask"
        _fail(op, name, condition, f"{given} of them", context, advice)
    if data is None or scale is None or mask is None:
        return
    pool, fits = _is_pool(data), data.dtype == torch.int8 and data.dim() == 2
    if not pool and (
        not fits
        or any(_differ(have, want) for have, want in zip(data.shape, own.shape, strict=True))
    ):
        condition = f"be int8 of shape {_shape(own)} or [tiles, 128, 128]"
        got = f"{_dtype(data.dtype)} {_shape(data)}"
        advice = "Pass what int8_quantize_fallback or int8_pack_residual returned."
        _fail(op, "residual", condition, got, f"of {side}", advice)
    check.check_same_device(op, "residual", data, own)
    quantized = "int8_quantize_fallback"
    _check_grid(op, "residual_scale", scale, torch.float32, side, own, quantized)
    kind, made_by = (torch.int32, "int8_pack_residual") if pool else (torch.uint8, quantized)
    _check_grid(op, "mask", mask, kind, side, own, made_by)


def _check_gemm(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:  # fmt: skip
    op = "int8_gemm"
    _check_codes(op, "a", a)
    _check_codes(op, "b", b)
    if _differ(a.shape[1], b.shape[1]):
        context = f"padded; a {_shape(a)}, b {_shape(b)}"
        condition, got = "have the same K", f"{a.shape[1]} and {b.shape[1]}"
        advice = "Both have the contraction axis last: D = A B^T."
        _fail(op, "a and b", condition, got, context, advice)
    check.check_same_device(op, "b", b, a)
    _check_grid(op, "a_scale", a_scale, torch.float32, "a", a)
    _check_grid(op, "b_scale", b_scale, torch.float32, "b", b)
    check.check_float_dtype(op, "out_dtype", out_dtype, "a", a)


def _check_bias(bias: Tensor | None, a: Tensor, b: Tensor) -> None:
    op, n = "int8_gemm", b.shape[0]
    if bias is None:
        return
    if bias.dtype not in FLOATS or bias.dim() != 1 or _differ(bias.shape[0], n):
        condition = f"be bfloat16, float16 or float32 of shape [{n}]"
        got = f"{_dtype(bias.dtype)} {_shape(bias)}"
        _fail(op, "bias", condition, got, f"b has {n} rows", "Convert or reshape it.")
    check.check_same_device(op, "bias", bias, a)


def _check_pack(residual: Tensor, scale: Tensor, mask: Tensor, count: int) -> None:
    op = "int8_pack_residual"
    _check_codes(op, "residual", residual)
    _check_grid(op, "scale", scale, torch.float32, "residual", residual)
    _check_grid(op, "mask", mask, torch.uint8, "residual", residual, "int8_quantize_fallback")
    most = mask.shape[0] * mask.shape[1]
    if _known(count, most) and not 0 <= count <= most:
        context, advice = f"mask {_shape(mask)}", "No more blocks are there to be kept."
        _fail(op, "count", f"lie in [0, {most}]", count, context, advice)


def _check_unpack(pool: Tensor, slots: Tensor, rows: int, kp: int) -> None:
    op, as_made = "int8_unpack_residual", "Pass what int8_pack_residual returned."
    context = f"slots {_shape(slots)}"
    if not _is_pool(pool):
        got = f"{_dtype(pool.dtype)} {_shape(pool)}"
        _fail(op, "pool", "be int8 of shape [tiles, 128, 128]", got, context, as_made)
    if slots.dtype != torch.int32 or slots.dim() != 2:
        condition, got = "be int32 with 2 dimensions", _dtype(slots.dtype)
        _fail(op, "slots", condition, got, f"shape {_shape(slots)}", as_made)
    check.check_same_device(op, "slots", slots, pool)
    whole = not _known(kp) or (kp % BLOCK == 0 and not _differ(kp // BLOCK, slots.shape[1]))
    in_range = not _known(rows) or 0 <= rows <= check.MAX_SIZE
    if not (whole and in_range) or _differ(blocks(rows), slots.shape[0]):
        condition = "be those of the slots' blocks of 128 x 128"
        advice = "Pass the shape of the operand's codes."
        _fail(op, "rows and kp", condition, f"{rows} and {kp}", context, advice)


# ---- fake kernels ----


def _empty_codes(x: Tensor, layout: int) -> tuple[Tensor, Tensor]:
    """Both forms; [0, 0] where the layout leaves one out."""
    (r, k), name = x.shape, list(INT8_LAYOUTS)[layout]
    row = (r, blocks(k) * BLOCK) if name != "transposed" else (0, 0)
    transposed = (k, blocks(r) * BLOCK) if name != "row" else (0, 0)
    return x.new_empty(row, dtype=torch.int8), x.new_empty(transposed, dtype=torch.int8)


def _empty_grid(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((blocks(x.shape[0]), blocks(x.shape[1])), dtype=dtype)


@torch.library.register_fake("mxtrain::int8_quantize")
def _(x, rounding=0, rng=None, layout=0):
    _check_quantize("int8_quantize", x, rounding, rng, layout)
    check.check_devices("int8_quantize", x, rng=rng)
    return (*_empty_codes(x, layout), _empty_grid(x, torch.float32))


@torch.library.register_fake("mxtrain::int8_quantize_fallback")
def _(x, threshold, layout=0):
    _check_quantize("int8_quantize_fallback", x, 0, None, layout, threshold)
    scale, residual_scale = (_empty_grid(x, torch.float32) for _ in range(2))
    return (
        *_empty_codes(x, layout), scale, *_empty_codes(x, layout), residual_scale,
        _empty_grid(x, torch.uint8), x.new_empty((3,), dtype=torch.int64),
    )  # fmt: skip


@torch.library.register_fake("mxtrain::int8_gemm")
def _(
    a, a_scale, b, b_scale, bias, out_dtype, residual=None, residual_scale=None, mask=None,
    residual_of_b=False,
):  # fmt: skip
    _check_gemm(a, a_scale, b, b_scale, bias, out_dtype)
    own = b if residual_of_b else a
    _check_residual("int8_gemm", residual, residual_scale, mask, residual_of_b, own)
    _check_bias(bias, a, b)
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.register_fake("mxtrain::int8_pack_residual")
def _(residual, scale, mask, count):
    _check_pack(residual, scale, mask, count)
    pool, slots = (count, BLOCK, BLOCK), mask.new_empty(mask.shape, dtype=torch.int32)
    return residual.new_empty(pool), slots


@torch.library.register_fake("mxtrain::int8_unpack_residual")
def _(pool, slots, rows, kp):
    _check_unpack(pool, slots, rows, kp)
    return pool.new_empty((rows, kp))
