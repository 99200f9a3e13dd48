"""D[M, N] = alpha * A B^T + bias from packed operands: in float64, and in float32 as the op does.

Tested elementwise before output rounding: |D - D64| <= K * 2^-24 * |A| |B|^T (docs/numerics.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elements import format_named
from .errors import refusal
from .quantize import dequantize

ACCUMULATE = ("fp32", "fast", "exact")


FOLD_BIAS = 127 + 13  # a folded element is E5M2 * 2^(row scale - FOLD_BIAS)


@torch.no_grad()
def fold(data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """mxfp4 as the fold backend multiplies it: E5M2 bytes uint8 `[R, Kp]`, E8M0 uint8 `[R]`.

    The row scale is the largest of the row's scales (255 if one is NaN). E2M1 has one mantissa bit,
    so element * 2^(13 - s), s binades below the largest, is exact in E5M2 for s = 0 .. 28; blocks
    further down become zero, signs kept.
    """
    codes = torch.stack([data & 0xF, data >> 4], -1).flatten(1)
    row_scale = scale.amax(1)
    below = (row_scale[:, None].int() - scale.int()).repeat_interleave(32, 1)
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=data.device)
    value = torch.ldexp(magnitudes[(codes & 7).long()], 13 - below.clamp(max=28))
    value = torch.where(below > 28, 0.0, value)
    value = torch.copysign(value, torch.where(codes >= 8, -1.0, 1.0))
    return value.to(torch.float8_e5m2).view(torch.uint8), row_scale


def _cols(data: Tensor, format: str) -> int:
    return data.shape[1] * 8 // format_named(format).element.bits


def _values(data: Tensor, scale: Tensor, tensor_scale: Tensor | None, format: str) -> Tensor:
    return dequantize(data, scale, tensor_scale, format, _cols(data, format)).to(torch.float64)


@torch.no_grad()
def gemm_float64(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor | None,
    format: str,
    bias: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """alpha * A B^T + bias as float64 [M, N], from the float32 values that `dequantize` gives."""
    d = (
        _values(a, a_scale, a_tensor_scale, format)
        @ _values(b, b_scale, b_tensor_scale, format).t()
    )
    d = d * alpha
    return d if bias is None else d + bias.to(torch.float64)


@torch.no_grad()
def gemm_magnitude(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor | None,
    format: str,
) -> Tensor:
    """|A| |B|^T as float64 [M, N]: what the error bound of a product multiplies."""
    left = _values(a, a_scale, a_tensor_scale, format).abs()
    return left @ _values(b, b_scale, b_tensor_scale, format).abs().t()


@torch.no_grad()
def gemm(
    a: Tensor,
    a_scale: Tensor,
    a_tensor_scale: Tensor | None,
    b: Tensor,
    b_scale: Tensor,
    b_tensor_scale: Tensor | None,
    format: str,
    bias: Tensor | None = None,
    alpha: float = 1.0,
    out_dtype: torch.dtype = torch.bfloat16,
    accumulate: str = "fp32",
) -> Tensor:
    """alpha * A B^T + bias as ``out_dtype`` [M, N], accumulated in float32 (order unspecified).

    For nvfp4 the operands are element * block scale; the sum is multiplied by a_tensor_scale, then
    by b_tensor_scale, then by alpha (float32 each), and the float32 bias is added, all before the
    one cast to ``out_dtype``. accumulate: one of ACCUMULATE, which the reference computes alike.
    scales must not be swizzled.
    """
    if accumulate not in ACCUMULATE:
        condition, advice = f"be one of {', '.join(ACCUMULATE)}", "Choose one of these."
        context = f"format {format}"
        raise ValueError(
            refusal("gemm", "accumulate", condition, repr(accumulate), context, advice)
        )
    one_scale = format_named(format).scale == "e4m3"
    operands = []
    for data, scale, tensor_scale in ((a, a_scale, a_tensor_scale), (b, b_scale, b_tensor_scale)):
        if one_scale and tensor_scale is None:
            context, advice = f"format {format}", "Pass what quantize returned."
            raise ValueError(refusal("gemm", "tensor scales", "be given", None, context, advice))
        unit = torch.ones_like(tensor_scale) if one_scale else tensor_scale
        operands.append(dequantize(data, scale, unit, format, _cols(data, format)))
    d = operands[0] @ operands[1].t()
    if one_scale:
        d = d * a_tensor_scale * b_tensor_scale
    d = d * torch.full((1, 1), alpha, dtype=torch.float32, device=d.device)
    if bias is not None:
        d = d + bias.to(torch.float32)
    return d.to(out_dtype)
