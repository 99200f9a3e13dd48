"""int8_block: codes in [-127, 127], a float32 scale a square of 128 x 128, and the fallback.

Bit for bit what csrc/formats/int8.h says, in plain PyTorch. Source: arXiv 2503.08040.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .philox import draws

BLOCK = 128
SMALLEST = 2.0**-126


def _squares(x: Tensor) -> Tensor:
    """x [R, K] as float32 [R / 128, K / 128, 128, 128], ragged edges filled with zeros."""
    r, k = x.shape
    x = F.pad(x.float(), (0, -k % BLOCK, 0, -r % BLOCK))
    return x.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)


def _flat(squares: Tensor, rows: int) -> Tensor:
    """The inverse of _squares, with `rows` rows and whole blocks of columns."""
    return squares.transpose(1, 2).flatten(2, 3).flatten(0, 1)[:rows].contiguous()


def _scales(v: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and reciprocal of each square: NaN and 0 where one of its elements is not finite."""
    amax = v.abs().amax((2, 3))
    finite = v.isfinite().all(3).all(2)
    # As a float32 division: by a tensor, since torch multiplies by the reciprocal of a number.
    scale = (amax / torch.full_like(amax, 127.0)).clamp(min=SMALLEST)
    reciprocal = torch.ones_like(scale) / scale
    nothing = (amax == 0) | ~finite
    reciprocal = torch.where(nothing, 0.0, reciprocal)
    scale = torch.where(amax == 0, 0.0, scale)
    return torch.where(finite, scale, torch.nan), reciprocal


def _round(u: Tensor, draw: Tensor | None) -> Tensor:
    if draw is None:
        return u.round()  # ties to even
    a = u.abs()
    n = a.floor()
    up = (a - n) * 131072.0 > (2 * draw + 1).float()
    return torch.copysign((n + up).clamp(max=127.0), u)


def _step(v: Tensor, draw: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes as floats, scales and what is left of each square."""
    scale, reciprocal = _scales(v)
    v = torch.where(scale.isnan()[..., None, None], 0.0, v)
    q = _round(v * reciprocal[..., None, None], draw)
    left = v - scale.nan_to_num()[..., None, None] * q
    return q, scale, left


@torch.no_grad()
def int8_quantize(x: Tensor, rng: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes int8 [R, Kp] and scales float32 [ceil(R/128), Kp/128]; stochastic with rng."""
    v, r = _squares(x), x.shape[0]
    draw = None
    if rng is not None:
        kp = v.shape[1] * BLOCK
        draw = _squares(draws(rng.cpu(), r, kp, 0).to(torch.float32).to(x.device)).long()
    q, scale, _ = _step(v, draw)
    return _flat(q, r).to(torch.int8), scale


@torch.no_grad()
def int8_quantize_fallback(
    x: Tensor, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes, scales, residual codes and scales, mask uint8 like the scales, counts int64 [3].

    A block falls back where its largest magnitude exceeds the threshold. Where it does not, the
    residual is zero here; the op leaves it unwritten. counts: fallen back, not finite, not all
    zero.
    """
    v, r = _squares(x), x.shape[0]
    q, scale, left = _step(v, None)
    amax = v.abs().amax((2, 3))
    mask = scale.isfinite() & (amax > threshold)
    q2, scale2, _ = _step(torch.where(mask[..., None, None], left, 0.0), None)
    counts = torch.stack([mask.sum(), scale.isnan().sum(), (scale != 0).sum()])
    codes = (_flat(t, r).to(torch.int8) for t in (q, q2))
    data, residual = codes
    return data, scale, residual, scale2, mask.to(torch.uint8), counts


def int8_dequantize(data: Tensor, scale: Tensor, cols: int) -> Tensor:
    """float32 [R, cols] of codes and scales."""
    s = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return (data.float() * s[: data.shape[0]])[:, :cols]


@torch.no_grad()
def int8_gemm(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    residual: tuple[Tensor, Tensor, Tensor] | None = None,
    residual_of_b: bool = False,
) -> Tensor:
    """A B^T in float32 [M, N], in the order of the definition, each step rounded once.

    acc = fma(scale_a * scale_b, codes_a codes_b^T, acc) for K in blocks of 128; the residual of a
    block (data, scale, mask) follows it. The fused step is taken in float64: the integer product,
    below 2^22, times a scale of 24 bits is exact there.
    """

    def spread(grid: Tensor, k: int, rows: int) -> Tensor:
        return grid[:, k].repeat_interleave(BLOCK)[:rows]

    acc = torch.zeros(len(a), len(b), dtype=torch.float32, device=a.device)

    def add(x: Tensor, x_scale: Tensor, y: Tensor, y_scale: Tensor, where: Tensor) -> None:
        product = x.double() @ y.double().T
        scale = (x_scale[:, None] * y_scale[None]).double()
        acc.copy_(torch.where(where, (acc.double() + scale * product).float(), acc))

    everywhere = torch.ones(1, 1, dtype=torch.bool, device=a.device)
    for k in range(a.shape[1] // BLOCK):
        part = slice(k * BLOCK, (k + 1) * BLOCK)
        sa, sb = spread(a_scale, k, len(a)), spread(b_scale, k, len(b))
        add(a[:, part], sa, b[:, part], sb, everywhere)
        if residual is None:
            continue
        data, scale, mask = residual
        own = b if residual_of_b else a
        d, u = spread(scale, k, len(own)), spread(mask, k, len(own)).bool()
        if residual_of_b:
            add(a[:, part], sa, data[:, part], d, u[None])
        else:
            add(data[:, part], d, b[:, part], sb, u[:, None])
    return acc
