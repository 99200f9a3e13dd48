"""Element and scale codecs, by integer arithmetic on float32 bits and by table; packed codes.

An ExMy element is sign, ``ebits`` of exponent (bias 2^(ebits-1) - 1) and ``mbits`` of mantissa,
with subnormals. Around a magnitude a the grid is n * step, step = 2^(max(E(a), emin) - mbits). Zero
keeps its sign; magnitudes beyond the element's maximum saturate. Sources: OCP Microscaling Formats
(MX) v1.0, sections 5.2 to 5.4; docs/numerics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import refusal


@dataclass(frozen=True)
class Element:
    """An ExMy floating point element; ``max`` is its largest finite magnitude."""

    name: str
    ebits: int
    mbits: int
    max: float

    @property
    def bits(self) -> int:
        return 1 + self.ebits + self.mbits

    @property
    def bias(self) -> int:
        return 2 ** (self.ebits - 1) - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal."""
        return 1 - self.bias

    @property
    def emax(self) -> int:
        """Exponent of the largest finite magnitude."""
        return math.frexp(self.max)[1] - 1


E2M1 = Element("e2m1", 2, 1, 6.0)
E3M2 = Element("e3m2", 3, 2, 28.0)
E2M3 = Element("e2m3", 2, 3, 7.5)
E4M3 = Element("e4m3", 4, 3, 448.0)  # the OCP "fn" encoding: no Inf, 0x7F and 0xFF are NaN
E5M2 = Element("e5m2", 5, 2, 57344.0)  # as IEEE: 0x7C is Inf, 0x7D to 0x7F are NaN
BFLOAT16 = Element("bfloat16", 8, 7, math.ldexp(255, 120))  # as IEEE; for stochastic_round only


@dataclass(frozen=True)
class Format:
    """An operand format: element, block length along K, type of the block scale (e8m0 or e4m3)."""

    name: str
    element: Element
    block: int
    scale: str


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("mxfp4", E2M1, 32, "e8m0"),
        Format("mxfp6_e3m2", E3M2, 32, "e8m0"),
        Format("mxfp6_e2m3", E2M3, 32, "e8m0"),
        Format("mxfp8_e4m3", E4M3, 32, "e8m0"),
        Format("mxfp8_e5m2", E5M2, 32, "e8m0"),
        Format("nvfp4", E2M1, 16, "e4m3"),
    )
}


def format_named(name: str) -> Format:
    """The `Format` called ``name``; ValueError with the known names where there is none."""
    if not isinstance(name, str) or name not in FORMATS:
        condition, context = f"be one of {', '.join(FORMATS)}", f"type {type(name).__name__}"
        advice = "Pass a format by its name."
        raise ValueError(refusal("format_named", "format", condition, repr(name), context, advice))
    return FORMATS[name]


def pow2(e: Tensor) -> Tensor:
    """2^e as float32, exact for integer e in [-149, 127], built from bits."""
    e = e.to(torch.int64)
    normal = (e.clamp(min=-126) + 127) << 23
    subnormal = torch.ones_like(e) << (e + 149).clamp(0, 22)
    return torch.where(e >= -126, normal, subnormal).to(torch.int32).view(torch.float32)


def float32_bits(x: Tensor) -> Tensor:
    """The bits of float32 ``x`` without the sign, as int64."""
    return x.contiguous().view(torch.int32).to(torch.int64) & 0x7FFFFFFF


def encode(
    u: Tensor,
    element: Element,
    rounding: str = "nearest",
    draws: Tensor | None = None,
    toward: Tensor | None = None,
) -> Tensor:
    """Round float32 ``u`` to ``element`` and return the codes as int64, of u's shape.

    ``u`` must hold no NaN; Inf saturates. ``rounding`` is "nearest" (ties to even), "stochastic"
    (``draws``: int64 of u's shape, in [0, 2^16)), "toward" (``toward``: float32 of u's shape,
    already divided by the scale), "down" (toward zero) or "up" (away from zero).
    """
    if u.dtype != torch.float32:
        context, advice = f"shape {list(u.shape)}", "Convert it first."
        raise TypeError(refusal("encode", "u", "be float32", u.dtype, context, advice))
    sign = (u.contiguous().view(torch.int32) < 0).to(torch.int64)
    limit = int(float32_bits(torch.tensor(element.max, dtype=torch.float32)))
    magnitude = float32_bits(u).clamp(max=limit)

    # |u| = significand * 2^(exponent - 23), also below the smallest normal of float32
    field = magnitude >> 23
    exponent = field.clamp(min=1) - 127
    significand = (magnitude & 0x7FFFFF) + ((field > 0).to(torch.int64) << 23)

    # |u| / step = n + rest / 2^shift. A shift beyond 45 leaves n = 0 and rest / 2^shift < 2^-21
    # either way, and none of the rules below tells such fractions apart, so it is cut there to stay
    # inside 64 bits.
    top = exponent.clamp(min=element.emin)
    shift = (top - element.mbits - (exponent - 23)).clamp(max=45)
    n = significand >> shift
    rest = significand - (n << shift)

    if rounding == "nearest":
        half = torch.ones_like(shift) << (shift - 1)
        up = (rest > half) | ((rest == half) & (n % 2 == 1))
    elif rounding == "stochastic":
        up = (rest << 17) > ((2 * draws + 1) << shift)
    elif rounding == "toward":
        step = ((top - element.mbits + 1023) << 52).view(torch.float64)
        z = torch.where(sign == 1, -toward, toward).to(torch.float64)
        up = (rest > 0) & (z >= (n.to(torch.float64) + 0.5) * step)
    elif rounding == "down":
        up = torch.zeros_like(rest, dtype=torch.bool)
    elif rounding == "up":
        up = rest > 0
    else:
        condition = "be one of nearest, stochastic, toward, down, up"
        context, advice = f"element {element.name}", "Choose one of these."
        raise ValueError(refusal("encode", "rounding", condition, repr(rounding), context, advice))
    # n runs up to 2^(mbits+1), and the codes of consecutive binades are consecutive, so a carry
    # needs no special case
    code = ((top - element.emin) << element.mbits) + n + up.to(torch.int64)
    return code + (sign << (element.ebits + element.mbits))


def decode_table(element: Element) -> Tensor:
    """float32 [2^bits]: the value of every code, NaN and Inf included."""
    values = []
    for code in range(2**element.bits):
        sign = -1.0 if code >> (element.ebits + element.mbits) else 1.0
        field = (code >> element.mbits) & (2**element.ebits - 1)
        mantissa = code & (2**element.mbits - 1)
        significand = mantissa + (2**element.mbits if field else 0)
        value = math.ldexp(significand, max(field, 1) - element.bias - element.mbits)
        if value > element.max:
            value = math.inf if mantissa == 0 else math.nan
        values.append(math.copysign(value, sign))
    return torch.tensor(values, dtype=torch.float64).to(torch.float32)


def decode(codes: Tensor, element: Element) -> Tensor:
    """The float32 values of integer ``codes`` (one code an entry), of the same shape."""
    return decode_table(element).to(codes.device)[codes.to(torch.int64)]


def decode_e8m0(codes: Tensor) -> Tensor:
    """The float32 values 2^(code - 127) of E8M0 ``codes``; 255 is NaN."""
    codes = codes.to(torch.int64)
    values = pow2(codes.clamp(max=254) - 127)
    return torch.where(codes == 255, torch.full_like(values, math.nan), values)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integer codes [R, Kp] to uint8 [R, Kp * bits / 8]: a little-endian bit stream per row.

    Kp must be even for 4 bits and a multiple of 4 for 6 bits.
    """
    c = codes.to(torch.int64)
    if bits == 4:
        c = c.reshape(c.shape[0], c.shape[1] // 2, 2)
        out = [c[..., 0] | (c[..., 1] << 4)]
    elif bits == 6:
        c = c.reshape(c.shape[0], c.shape[1] // 4, 4)
        out = [
            c[..., 0] | ((c[..., 1] & 0x03) << 6),
            (c[..., 1] >> 2) | ((c[..., 2] & 0x0F) << 4),
            (c[..., 2] >> 4) | (c[..., 3] << 2),
        ]
    elif bits == 8:
        out = [c]
    else:
        context, advice = f"codes {list(codes.shape)}", "Pass the bits of an element."
        raise ValueError(refusal("pack", "bits", "be 4, 6 or 8", bits, context, advice))
    packed = torch.stack(out, dim=-1)
    rows, *rest = packed.shape
    return packed.reshape(rows, math.prod(rest)).to(torch.uint8)


def unpack(data: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`: uint8 [R, Kp * bits / 8] to int64 codes [R, Kp]."""
    d = data.to(torch.int64)
    if bits == 4:
        out = [d & 0x0F, d >> 4]
    elif bits == 6:
        d = d.reshape(d.shape[0], d.shape[1] // 3, 3)
        out = [
            d[..., 0] & 0x3F,
            (d[..., 0] >> 6) | ((d[..., 1] & 0x0F) << 2),
            (d[..., 1] >> 4) | ((d[..., 2] & 0x03) << 4),
            d[..., 2] >> 2,
        ]
    elif bits == 8:
        out = [d]
    else:
        context, advice = f"data {list(data.shape)}", "Pass the bits of an element."
        raise ValueError(refusal("unpack", "bits", "be 4, 6 or 8", bits, context, advice))
    codes = torch.stack(out, dim=-1)
    rows, *rest = codes.shape
    return codes.reshape(rows, math.prod(rest))
