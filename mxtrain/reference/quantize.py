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


def _check_group(name: str, group: int, signs: Tensor | None, cols: int) -> None:
    if group < 1 or group & (group - 1):
        raise ValueError(
            f"mxtrain::reference.{name}: hadamard must be a power of two, got {group}. "
            "Pass 16, 32, 64, 128 or 256."
        )
    if cols % group:
        raise ValueError(
            f"mxtrain::reference.{name}: hadamard must divide the padded row length, got {group} "
            f"(row length {cols}). Choose a smaller group or pad the input."
        )
    if signs is not None and signs.shape != (group,):
        raise ValueError(
            f"mxtrain::reference.{name}: signs must have shape [{group}], got {list(signs.shape)}."
        )


@torch.no_grad()
def hadamard(x: Tensor, group: int, signs: Tensor | None = None) -> Tensor:
    """Rotate groups of ``group`` elements of x's last axis; float32 inside, x's dtype out.

    x: bf16, fp16 or fp32, last axis a multiple of ``group`` (a power of two). signs: int8 [group]
    or None; a negative entry negates that element before the transform. ValueError where a shape
    does not fit, TypeError for other dtypes.
    """
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(
            f"mxtrain::reference.hadamard: x must be bfloat16, float16 or float32, got {x.dtype}."
        )
    _check_group("hadamard", group, signs, x.shape[-1])
    return _rotate(x.to(torch.float32), group, signs).to(x.dtype)


def _prepare(x: Tensor, block: int, transpose: bool, group: int, signs: Tensor | None) -> Tensor:
    """Steps 1 and 2: float32 [R, Kp], zero padded, rotated."""
    v = (x.t() if transpose else x).to(torch.float32)
    rows, cols = v.shape
    padded = torch.zeros(rows, -(-cols // block) * block, dtype=torch.float32, device=x.device)
    padded[:, :cols] = v
    v = padded
    if group:
        _check_group("quantize", group, signs, v.shape[1])
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
    name = "mxtrain::reference.quantize"
    if x.dtype not in INPUT_DTYPES:
        raise TypeError(f"{name}: x must be bfloat16, float16 or float32, got {x.dtype}.")
    if x.dim() != 2:
        raise ValueError(
            f"{name}: x must have 2 dimensions, got {list(x.shape)}. Flatten it first."
        )
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"{name}: scale_rule must be one of {SCALE_RULES}, got {scale_rule!r}.")
    if rounding not in ROUNDINGS:
        raise ValueError(f"{name}: rounding must be one of {ROUNDINGS}, got {rounding!r}.")
    if rounding == "stochastic" and rng is None:
        raise ValueError(f"{name}: rng must be given, got None (stochastic rounding).")
    if (rounding == "toward") != (toward is not None):
        raise ValueError(
            f"{name}: toward must be given exactly where rounding is 'toward', "
            f"got {'None' if toward is None else 'a tensor'} (rounding {rounding!r})."
        )
    if toward is not None and toward.shape != x.shape:
        raise ValueError(
            f"{name}: toward must have x's shape, got {list(toward.shape)} (x {list(x.shape)})."
        )
    if signs is not None and not hadamard:
        raise ValueError(f"{name}: signs must be None where hadamard is 0, got a tensor.")

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

    tensor_scale = None
    if fmt.scale == "e8m0":
        e = e8m0_exponent(maximum, element, scale_rule)
        scale = torch.where(maximum == 0, torch.zeros_like(e), e + 127)
        scale = torch.where(invalid, torch.full_like(scale, 255), scale)
        empty = maximum == 0
        inverse = pow2(-e)[..., None]
        u = (v * factor) * inverse
        z = None if target is None else (target * factor) * inverse
    else:
        # divisors are full tensors: a scalar divisor may become a multiplication by its reciprocal
        a = largest_finite.max() if largest_finite.numel() else torch.zeros((), device=x.device)
        a = a.reshape(1)
        tensor_scale = (a / torch.full_like(a, 2688.0)).clamp(min=2.0**-126)
        q = (maximum / torch.full_like(maximum, 6.0)) / tensor_scale.expand_as(maximum)
        scale = encode(q, E4M3, {"floor": "down", "ceil": "up", "even": "nearest"}[scale_rule])
        s = decode(scale, E4M3) * tensor_scale
        empty = s == 0
        s = torch.where(empty, torch.ones_like(s), s)[..., None].expand_as(v)
        u = (v * factor) / s
        z = None if target is None else (target * factor) / s
        scale = torch.where(invalid, torch.full_like(scale, 0x7F), scale)

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
        raise ValueError(
            f"mxtrain::reference.dequantize: data and scale must have shapes "
            f"{[rows, padded * element.bits // 8]} and {[rows, padded // block]}, "
            f"got {list(data.shape)} and {list(scale.shape)} ({format}, cols {cols}). "
            "Unswizzle a swizzled scale first."
        )
    if (fmt.scale == "e4m3") != (tensor_scale is not None):
        raise ValueError(
            f"mxtrain::reference.dequantize: tensor_scale must be given for nvfp4 only ({format})."
        )
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
        raise TypeError(f"mxtrain::reference.stochastic_round: x must be float32, got {x.dtype}.")
    # element, code of Inf, code of NaN, integer type of the bits
    table = {
        torch.bfloat16: (BFLOAT16, 0x7F80, 0x7FC0, torch.int16),
        torch.float8_e4m3fn: (E4M3, 0x7F, 0x7F, torch.uint8),
        torch.float8_e5m2: (E5M2, 0x7C, 0x7F, torch.uint8),
    }
    if dtype not in table:
        raise ValueError(
            "mxtrain::reference.stochastic_round: dtype must be bfloat16, float8_e4m3fn or "
            f"float8_e5m2, got {dtype}."
        )
    element, inf, nan, bits = table[dtype]
    flat = x.reshape(-1)
    noise = draws(rng.to(x.device), 1, -(-flat.numel() // 8) * 8, 0)[0, : flat.numel()]
    code = encode(
        torch.where(torch.isnan(flat), torch.zeros_like(flat), flat), element, "stochastic", noise
    )
    sign = (flat < 0).to(torch.int64) << (element.bits - 1)
    code = torch.where(torch.isinf(flat), sign + inf, code)
    code = torch.where(torch.isnan(flat), torch.full_like(code, nan), code)
    return code.to(bits).view(dtype).reshape(x.shape)
