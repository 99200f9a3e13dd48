"""int10_group, and the RMSNorm and SwiGLU that keep their inputs in it.

Bit for bit what csrc/formats/context.h says, in plain PyTorch. A context is the tuple (high, low,
scale) of a matrix: int8 [R, Cp], uint8 [R, Cp / 4], float32 [R, Cp / 128].
Source: arXiv 2503.08040.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .optimizer import fma
from .quantize import column_sum

GROUP = 128
SMALLEST = 2.0**-126
Context = tuple[Tensor, Tensor, Tensor]


def _groups(x: Tensor) -> Tensor:
    """x [R, C] as float32 [R, C / 128, 128], the last group filled with zeros."""
    return F.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))


def _filled(n: Tensor, number: float) -> Tensor:
    """A number in a quotient: torch multiplies by the reciprocal of one that is no tensor."""
    return torch.full_like(n, number)


@torch.no_grad()
def int10_quantize(x: Tensor) -> Context:
    """The context of x [R, C]."""
    v = _groups(x)
    amax, finite = v.abs().amax(2), v.isfinite().all(2)
    scale = (amax / _filled(amax, 511.0)).clamp(min=SMALLEST)
    reciprocal = torch.where((amax == 0) | ~finite, 0.0, _filled(scale, 1.0) / scale)
    scale = torch.where(finite, torch.where(amax == 0, 0.0, scale), torch.nan)
    v = torch.where(finite[..., None], v, 0.0)
    return *int10_pack((v * reciprocal[..., None]).round().int().flatten(1)), scale


def int10_pack(codes: Tensor) -> tuple[Tensor, Tensor]:
    """high and low of codes [R, Cp] in [-511, 511]."""
    bits = (codes & 3).unflatten(1, (-1, 4)) << torch.tensor([0, 2, 4, 6])
    return (codes >> 2).to(torch.int8), bits.sum(2).to(torch.uint8)


def int10_unpack(high: Tensor, low: Tensor) -> Tensor:
    """The codes, int32, of high and low of any leading sizes."""
    bits = low.int()[..., None] >> torch.tensor([0, 2, 4, 6], device=low.device) & 3
    return high.int() * 4 + bits.flatten(-2)


def int10_dequantize(high: Tensor, low: Tensor, scale: Tensor, cols: int) -> Tensor:
    """float32 [..., cols]."""
    v = int10_unpack(high, low).unflatten(-1, (-1, GROUP)) * scale[..., None]
    return v.flatten(-2)[..., :cols]


def _row_sum(v: Tensor) -> Tensor:
    """float32 [R, 1] of v [R, C], in the order of the definition."""

    def one_by_one(t: Tensor) -> Tensor:
        total = torch.zeros_like(t[..., 0])
        for part in t.unbind(-1):
            total = total + part
        return total

    sums = one_by_one(_groups(v).unflatten(2, (16, 8)))
    while sums.shape[2] > 1:
        sums = sums[..., ::2] + sums[..., 1::2]
    return one_by_one(sums[..., 0])[:, None]


@torch.no_grad()
def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Context, Tensor]:  # fmt: skip
    """y [R, C], the context of x, and rstd [R]."""
    v = x.float()
    total = _row_sum(v * v)
    mean = total / _filled(total, x.shape[1])
    root = (mean + torch.tensor(eps, dtype=torch.float32)).double().sqrt().float()
    rstd = _filled(root, 1.0) / root
    y = v * rstd
    return (y if weight is None else y * weight.float()).to(dtype), int10_quantize(x), rstd[:, 0]


@torch.no_grad()
def rms_norm_backward(
    dy: Tensor, context: Context, rstd: Tensor, weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dx [R, C] of dtype, and float32 [C], the gradient of a weight."""
    d, cols, rstd = dy.float(), dy.shape[1], rstd[:, None]
    xn = int10_dequantize(*context, cols) * rstd
    wd = d if weight is None else d * weight.float()
    total = _row_sum(wd * xn)
    c = total / _filled(total, cols)
    return ((wd - xn * c) * rstd).to(dtype), column_sum(d * xn)


@torch.no_grad()
def sigmoid(x: Tensor) -> Tensor:
    """Of float32, by the polynomial of the definition."""

    def constant(text: str) -> Tensor:
        return torch.tensor(float.fromhex(text), dtype=torch.float32)

    magic = torch.tensor(12582912.0)
    a = (-x).clamp(-87.0, 87.0)
    n = fma(a, constant("0x1.715476p+0"), magic) - magic
    r = fma(n, -constant("0x1.62e430p-1"), a)
    r = fma(n, constant("0x1.05c610p-29"), r)
    p = constant("0x1.6a2256p-10").expand_as(r)
    for text in ("0x1.123b02p-7", "0x1.5558f8p-5", "0x1.555490p-3", "0x1.fffffcp-2", "0x1p0"):
        p = fma(p, r, constant(text))
    e = torch.ldexp(fma(p, r, torch.tensor(1.0)).double(), n.double()).float()
    return torch.where(x < -87.0, 0.0, _filled(e, 1.0) / (1.0 + e))


@torch.no_grad()
def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Context, Context]:
    """h [R, C] of the dtype of gate, and the contexts of both."""
    g, u = gate.float(), up.float()
    return (g * sigmoid(g) * u).to(gate.dtype), int10_quantize(gate), int10_quantize(up)


@torch.no_grad()
def swiglu_backward(dh: Tensor, gate: Context, up: Context, dtype: torch.dtype) -> Tensor:
    """[R, 2 C]: the gradient of the gate, and right of it that of up."""
    d, cols = dh.float(), dh.shape[1]
    g, u = (int10_dequantize(*context, cols) for context in (gate, up))
    s = sigmoid(g)
    silu = g * s
    return torch.cat([(d * u) * (s + silu * (1.0 - s)), d * silu], 1).to(dtype)
