"""The quantizers, dequantize, hadamard and stochastic_round, step by step as in docs/numerics.md.

All arithmetic is IEEE float32, one operation at a time. Zero blocks have scale code 0 and all codes
0; a block that holds NaN or Inf has the NaN scale and all codes 0, and leaves its neighbours alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .elements import (
    BFLOAT16,
    E4M3,
    E5M2,
    Element,
    decode,
    decode_e8m0,
    encode,
    float32_bits,
    format_named,
    pack,
    pow2,
    unpack,
)
from .errors import refusal
from .layout import swizzle as swizzle_scale
from .philox import draws

SCALE_RULES = ("floor", "ceil", "even")
ROUNDINGS = ("nearest", "stochastic", "toward")
INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Parts = tuple[Tensor, Tensor, "Tensor | None"]  # data, scale, tensor_scale


def _rotate(v: Tensor, group: int, signs: Tensor | None) -> Tensor:
    """Rotate groups of float32 ``v`` along the last axis: (v * signs) H / sqrt(group)."""
    shape = v.shape
    v = v.reshape(-1, group)
    if signs is not None:
        v = torch.where(signs < 0, -v, v)
    stride = 1
    while stride < group:
        pairs = v.reshape(-1, group // (2 * stride), 2, stride)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        v = torch.stack((a + b, a - b), dim=2).reshape(-1, group)
        stride *= 2
    constant = torch.full((1, 1), 1 / math.sqrt(group), dtype=torch.float32, device=v.device)
    return (v * constant).reshape(shape)


def _check_group(name: str, argument: str, group: int, signs: Tensor | None, cols: int) -> None:
    context = f"row length {cols}"
    if group < 1 or group & (group - 1):
        advice = "Pass 16, 32, 64, 128 or 256."
        raise ValueError(refusal(name, argument, "be a power of two", group, context, advice))
    if cols % group:
        condition = "divide the padded row length"
        advice = "Choose a smaller group or pad the input."
        raise ValueError(refusal(name, argument, condition, group, context, advice))
    if signs is not None and signs.shape != (group,):
        condition, got = f"have shape [{group}]", list(signs.shape)
        advice = "Pass a sign for each element of a group."
        raise ValueError(refusal(name, "signs", condition, got, f"{argument} {group}", advice))


@torch.no_grad()
def hadamard(x: Tensor, group: int, signs: Tensor | None = None) -> Tensor:
    """Rotate groups of ``group`` elements of x's last axis; float32 inside, x's dtype out.

    x: bf16, fp16 or fp32, last axis a multiple of ``group`` (a power of two). signs: int8 [group]
    or None; a negative entry negates that element before the transform. ValueError where a shape
    does not fit, TypeError for other dtypes.
    """
    if x.dtype not in INPUT_DTYPES:
        condition, context = "be bfloat16, float16 or float32", f"shape {list(x.shape)}"
        advice = "Convert it first."
        raise TypeError(refusal("hadamard", "x", condition, x.dtype, context, advice))
    _check_group("hadamard", "group", group, signs, x.shape[-1])
    return _rotate(x.to(torch.float32), group, signs).to(x.dtype)


@torch.no_grad()
def column_sum(dy: Tensor) -> Tensor:
    """Float32 `[C]`, the sum over the rows of dy `[N, C]`, in the order of docs/numerics.md."""
    sums = dy.to(torch.float32)
    for rows in (32, 8, max(1, -(-len(dy) // 256))):  # that become one, one after the other
        groups = -(-len(sums) // rows)
        columns = dy.shape[1]
        padded = sums.new_zeros(groups * rows, columns)
        padded[: len(sums)] = sums
        total = sums.new_zeros(groups, columns)
        for row in padded.view(groups, rows, columns).unbind(1):
            total = total + row
        sums = total
    return sums.sum(0)  # of the one row, or of none


def _prepare(x: Tensor, block: int, transpose: bool, group: int, signs: Tensor | None) -> Tensor:
    """Steps 1 and 2: float32 [R, Kp], zero padded, rotated."""
    v = (x.t() if transpose else x).to(torch.float32)
    rows, cols = v.shape
    padded = torch.zeros(rows, -(-cols // block) * block, dtype=torch.float32, device=x.device)
    padded[:, :cols] = v
    v = padded
    if group:
        _check_group("quantize", "hadamard", group, signs, v.shape[1])
        v = _rotate(v, group, signs)
    return v


def e8m0_exponent(maximum: Tensor, element: Element, scale_rule: str) -> Tensor:
    """The int64 exponent e of the scale 2^e of blocks whose largest magnitude is ``maximum``."""
    bits = float32_bits(maximum)
    if scale_rule == "even":
        bits = bits + (1 << (23 - element.mbits - 1))
    e = (bits >> 23) - 127 - element.emax
    if scale_rule == "ceil":
        largest = int(float32_bits(torch.tensor(element.max, dtype=torch.float32))) & 0x7FFFFF
        e = e + ((bits & 0x7FFFFF) > largest).to(torch.int64)
    return e.clamp(-127, 127)


def _check_quantize(
    x: Tensor, scale_rule: str, rounding: str, rng: Tensor | None, hadamard: int,
    signs: Tensor | None, toward: Tensor | None,
) -> None:  # fmt: skip
    def check(ok: bool, argument: str, condition: str, got: object, context: str, advice: str):
        if not ok:
            kind = TypeError if condition.startswith("be bfloat16") else ValueError
            raise kind(refusal("quantize", argument, condition, got, context, advice))

    shape, choose = f"shape {list(x.shape)}", "Choose one of these."
    condition = "be bfloat16, float16 or float32"
    check(x.dtype in INPUT_DTYPES, "x", condition, x.dtype, shape, "Convert it first.")
    check(x.dim() == 2, "x", "have 2 dimensions", x.dim(), shape, "Flatten it first.")
    for argument, value, known in (
        ("scale_rule", scale_rule, SCALE_RULES), ("rounding", rounding, ROUNDINGS),
    ):  # fmt: skip
        condition = f"be one of {', '.join(known)}"
        check(value in known, argument, condition, repr(value), f"x has {shape}", choose)
    context = f"rounding {rounding!r}"
    ok, advice = rounding != "stochastic" or rng is not None, "See mxtrain.draw_rng."
    check(ok, "rng", "be given", "None", context, advice)
    ok, got = (rounding == "toward") == (toward is not None), "None" if toward is None else "one"
    condition = "be given exactly where rounding is 'toward'"
    check(ok, "toward", condition, got, context, "Give both, or neither.")
    if toward is not None:
        ok, got, advice = toward.shape == x.shape, list(toward.shape), "Transposed, it lies as x."
        check(ok, "toward", "have x's shape", got, f"x has {shape}", advice)
    if signs is not None:
        condition, got, context = "be None where hadamard is 0", "a tensor", f"x has {shape}"
        check(hadamard != 0, "signs", condition, got, context, "Set hadamard too.")


def _e8m0_scaled(
    v: Tensor, maximum: Tensor, element: Element, scale_rule: str, factor: Tensor,
    target: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:  # fmt: skip
    """Scale codes, which blocks are empty, and v and target, times factor, over the scale."""
    e = e8m0_exponent(maximum, element, scale_rule)
    scale = torch.where(maximum == 0, torch.zeros_like(e), e + 127)
    inverse = pow2(-e)[..., None]
    z = None if target is None else (target * factor) * inverse
    return scale, maximum == 0, ((v * factor) * inverse, z)


def _tensor_scale(largest_finite: Tensor) -> Tensor:
    """nvfp4's float32 [1]."""
    device = largest_finite.device
    a = largest_finite.max() if largest_finite.numel() else torch.zeros((), device=device)
    a = a.reshape(1)
    # divisors are full tensors: a scalar divisor may become a multiplication by its reciprocal
    return (a / torch.full_like(a, 2688.0)).clamp(min=2.0**-126)


def _e4m3_scaled(
    v: Tensor, maximum: Tensor, tensor_scale: Tensor, scale_rule: str, factor: Tensor,
    target: Tensor | None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor | None]]:  # fmt: skip
    """As _e8m0_scaled."""
    q = (maximum / torch.full_like(maximum, 6.0)) / tensor_scale.expand_as(maximum)
    scale = encode(q, E4M3, {"floor": "down", "ceil": "up", "even": "nearest"}[scale_rule])
    s = decode(scale, E4M3) * tensor_scale
    empty = s == 0
    s = torch.where(empty, torch.ones_like(s), s)[..., None].expand_as(v)
    z = None if target is None else (target * factor) / s
    return scale, empty, ((v * factor) / s, z)


@torch.no_grad()
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
) -> Parts:
    """Quantize x [r, c] (bf16, fp16, fp32; any strides) to the operand of x, or of x.T.

    Returns (data uint8, scale uint8, tensor_scale float32 [1] or None). With (R, K) = (r, c), or
    (c, r) when transposed, and Kp = K rounded up to the block: data [R, Kp * bits / 8], scale [R,
    Kp / block], or [ceil(R/128), ceil(C/4), 512] with ``swizzle``.

    scale_rule: "floor", "ceil", "even". rounding: "nearest", "stochastic" (needs ``rng``, int64
    [2]; stream 1 when transposed, else 0) or "toward" (needs ``toward``, of x's shape, transposed,
    rotated and prescaled as x is). hadamard: 0 or the group length, which must divide Kp; signs:
    int8 [hadamard] or None. ``rng`` is ignored by the other roundings. Raises ValueError for a bad
    value or a missing or surplus argument, TypeError for a bad dtype.
    """
    fmt = format_named(format)
    _check_quantize(x, scale_rule, rounding, rng, hadamard, signs, toward)
    element, block = fmt.element, fmt.block
    v = _prepare(x, block, transpose, hadamard, signs)
    rows, cols = v.shape
    v = v.reshape(rows, cols // block, block)
    invalid = ~torch.isfinite(v).all(dim=-1)
    target = None
    if toward is not None:
        target = _prepare(toward, block, transpose, hadamard, signs).reshape(v.shape)
        invalid = invalid | ~torch.isfinite(target).all(dim=-1)
        target = torch.where(invalid[..., None], torch.zeros_like(target), target)
    largest_finite = torch.where(torch.isfinite(v), v, torch.zeros_like(v)).abs()
    v = torch.where(invalid[..., None], torch.zeros_like(v), v)
    maximum = v.abs().amax(dim=-1)
    factor = torch.full((1, 1, 1), prescale, dtype=torch.float32, device=x.device)

    if fmt.scale == "e8m0":
        tensor_scale = None
        scale, empty, divided = _e8m0_scaled(v, maximum, element, scale_rule, factor, target)
        nan = 255
    else:
        tensor_scale = _tensor_scale(largest_finite)
        scale, empty, divided = _e4m3_scaled(v, maximum, tensor_scale, scale_rule, factor, target)
        nan = 0x7F
    u, z = divided
    scale = torch.where(invalid, torch.full_like(scale, nan), scale)

    noise = None
    if rounding == "stochastic":
        noise = draws(rng.to(x.device), rows, cols, int(transpose)).reshape(v.shape)
    codes = encode(u, element, rounding, noise, z)
    codes = torch.where((empty | invalid)[..., None], torch.zeros_like(codes), codes)
    scale = scale.to(torch.uint8)
    data = pack(codes.reshape(rows, cols), element.bits)
    return data, swizzle_scale(scale) if swizzle else scale, tensor_scale


def quantize_dual(
    x: Tensor,
    row: Mapping[str, Any],
    col: Mapping[str, Any],
    *,
    rng: Tensor | None = None,
    swizzle: bool = False,
) -> tuple[Parts, Parts]:
    """(quantize(x, **row), quantize(x, **col, transpose=True)) with the same rng and swizzle.

    row, col: keyword arguments of `quantize` ("format" and any of scale_rule, rounding, hadamard,
    signs, prescale, toward). ``toward`` has x's shape in both.
    """
    return (
        quantize(x, **row, transpose=False, rng=rng, swizzle=swizzle),
        quantize(x, **col, transpose=True, rng=rng, swizzle=swizzle),
    )


@torch.no_grad()
def dequantize(
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    cols: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The values [R, cols] of an operand: float32(element) * float32(scale), cast to ``dtype``.

    scale must not be swizzled. ValueError where the shapes do not fit ``format`` and ``cols``.
    """
    fmt = format_named(format)
    element, block = fmt.element, fmt.block
    rows, padded = data.shape[0], -(-cols // block) * block
    if data.shape != (rows, padded * element.bits // 8) or scale.shape != (rows, padded // block):
        codes, scales = [rows, padded * element.bits // 8], [rows, padded // block]
        condition = f"have shapes {codes} and {scales}"
        got, context = f"{list(data.shape)} and {list(scale.shape)}", f"{format}, cols {cols}"
        advice = "Unswizzle a swizzled scale first."
        raise ValueError(refusal("dequantize", "data and scale", condition, got, context, advice))
    if (fmt.scale == "e4m3") != (tensor_scale is not None):
        got = "None" if tensor_scale is None else "a tensor"
        condition, advice = "be given for nvfp4 only", "Pass what quantize returned."
        context = f"format {format}"
        raise ValueError(refusal("dequantize", "tensor_scale", condition, got, context, advice))
    values = decode(unpack(data, element.bits), element).reshape(rows, padded // block, block)
    s = decode_e8m0(scale) if tensor_scale is None else decode(scale, E4M3) * tensor_scale
    return (values * s[..., None]).reshape(rows, padded)[:, :cols].to(dtype).contiguous()


def requantize(
    data: Tensor,
    scale: Tensor,
    tensor_scale: Tensor | None,
    format: str,
    cols: int,
    out_format: str | None = None,
    *,
    scale_rule: str = "ceil",
    rounding: str = "nearest",
    rng: Tensor | None = None,
    hadamard: int = 0,
    signs: Tensor | None = None,
    prescale: float = 1.0,
    swizzle: bool = False,
) -> Parts:
    """The operand of the transpose, [cols, R], of an operand [R, cols].

    Dequantizes to float32 and quantizes along R. out_format None keeps ``format``. The other
    arguments are those of `quantize` with transpose=True, so stochastic rounding reads stream 1.
    """
    return quantize(
        dequantize(data, scale, tensor_scale, format, cols),
        out_format or format,
        scale_rule=scale_rule,
        rounding=rounding,
        transpose=True,
        rng=rng,
        hadamard=hadamard,
        signs=signs,
        prescale=prescale,
        swizzle=swizzle,
    )


@torch.no_grad()
def stochastic_round(x: Tensor, dtype: torch.dtype, rng: Tensor) -> Tensor:
    """Round float32 x, of any shape, to bfloat16, float8_e4m3fn or float8_e5m2 stochastically.

    The draws are those of a contiguous row of numel(x) elements, stream 0. Finite values saturate
    at the largest finite value. Inf stays Inf (NaN in float8_e4m3fn) and NaN becomes the positive
    NaN 0x7FC0, 0x7F or 0x7F.
    """
    if x.dtype != torch.float32:
        context, advice = f"shape {list(x.shape)}", "Convert it first."
        raise TypeError(refusal("stochastic_round", "x", "be float32", x.dtype, context, advice))
    # element, code of Inf, code of NaN, integer type of the bits
    table = {
        torch.bfloat16: (BFLOAT16, 0x7F80, 0x7FC0, torch.int16),
        torch.float8_e4m3fn: (E4M3, 0x7F, 0x7F, torch.uint8),
        torch.float8_e5m2: (E5M2, 0x7C, 0x7F, torch.uint8),
    }
    if dtype not in table:
        condition, context = "be bfloat16, float8_e4m3fn or float8_e5m2", f"x {list(x.shape)}"
        advice = "Choose one of these."
        raise ValueError(refusal("stochastic_round", "dtype", condition, dtype, context, advice))
    element, inf, nan, bits = table[dtype]
    flat = x.reshape(-1)
    noise = draws(rng.to(x.device), 1, flat.numel(), 0)[0]
    code = encode(
        torch.where(torch.isnan(flat), torch.zeros_like(flat), flat), element, "stochastic", noise
    )
    sign = (flat < 0).to(torch.int64) << (element.bits - 1)
    code = torch.where(torch.isinf(flat), sign + inf, code)
    code = torch.where(torch.isnan(flat), torch.full_like(code, nan), code)
    return code.to(bits).view(dtype).reshape(x.shape)
