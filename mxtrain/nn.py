"""RMSNorm and SwiGLU that keep ten bits of their inputs for backward, not sixteen.

    norm = mxtrain.nn.RMSNorm(4096)                     # parameters and state_dict of nn.RMSNorm
    h = mxtrain.nn.SwiGLU()(gate_up(norm(x)))           # silu(gate) * up of one tensor, or of two

What is saved is the input in int10_group, 1.28 bytes an element, and for RMSNorm the 1 / std of
each row: no tensor of 16 bits. Forward computes with the input itself, backward with what was kept
of it, which errs by 0.16% on normal data, as rounding it to bfloat16 does. One fused kernel each
way (csrc/formats/context.h has the arithmetic); the CPU and CUDA give the same bytes.
Source: arXiv 2503.08040, its contexts of non-linear operators.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .checks import (
    FLOATS,
    check_bool,
    check_device,
    check_number,
    check_tensor,
    is_int,
    kind,
    refusal,
    show,
)
from .context_ops import MAX_COLS

_ops = torch.ops.mxtrain


def _check_input(what: str, name: str, x: object) -> None:
    check_tensor(what, name, x)
    if x.dtype not in FLOATS:
        condition, context = "be bfloat16, float16 or float32", f"shape {list(x.shape)}"
        raise TypeError(refusal(what, name, condition, x.dtype, context, "Cast it first."))


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _unflattened(y: Tensor, shape: torch.Size) -> Tensor:
    """y [R, C] with these leading sizes, as no view: an in-place op may follow a Function."""
    if len(shape) == 2:
        return y
    return torch.ops.aten._unsafe_view(y, [*shape[:-1], y.shape[-1]])


# ---- RMSNorm ----


def _check_eps(what: str, eps: object) -> None:
    check_number(what, "eps", eps)
    if not 0 <= eps <= torch.finfo(torch.float32).max:  # of which the kernels make a float32
        condition, advice = "be finite and at least 0", "Try 1e-6."
        raise ValueError(refusal(what, "eps", condition, show(eps), kind(eps), advice))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:  # fmt: skip
        y, *kept = _ops.rms_norm_forward(_rows(x), weight, eps, dtype)
        ctx.save_for_backward(*kept, weight)
        ctx.dtype = x.dtype
        return _unflattened(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *kept, weight = ctx.saved_tensors
        need_w = ctx.needs_input_grad[1]
        dx, dw = _ops.rms_norm_backward(_rows(dy), *kept, weight, ctx.dtype, need_w)
        dx = dx.reshape(dy.shape) if ctx.needs_input_grad[0] else None
        return dx, dw.to(weight.dtype) if need_w else None, None, None


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, x kept for backward in int10_group.

    Args:
        x: `[..., C]`, bfloat16, float16 or float32, C at most 16384.
        weight: `[C]` of any of these, or None.
        eps: None is that of x's dtype, as in torch.

    Returns:
        x's shape, in the autocast dtype where autocast is on for the device of x (what a linear
        layer would cast it to), else in the dtype of x. Differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: for other tensors, or another eps.
    """
    what = "rms_norm"
    _check_input(what, "x", x)
    check_tensor(what, "weight", weight, optional=True)
    if x.dim() == 0:
        condition, advice = "have at least one dimension", "Its last axis is normalized."
        raise ValueError(refusal(what, "x", condition, 0, "a scalar", advice))
    if eps is not None:
        _check_eps(what, eps)
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    device = x.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    if x.numel() == 0:
        return F.rms_norm(x, x.shape[-1:], weight, eps).to(dtype)
    needs = x.requires_grad or (weight is not None and weight.requires_grad)
    if torch.is_grad_enabled() and needs:
        return _RMSNorm.apply(x, weight, eps, dtype)
    y = _ops.rms_norm_forward(_rows(x), weight, eps, dtype, False)[0]
    return y.reshape(x.shape)


class RMSNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last axis, with a compressed context; checkpoints load both ways.

    Args:
        normalized_shape: the size of the last axis, at most 16384.
        eps, elementwise_affine, device, dtype: as in torch.
        compress: False computes as torch does, and keeps what torch keeps.

    Raises:
        TypeError, ValueError: for more than one axis, one that is too long, or another eps.
    """

    def __init__(
        self, normalized_shape: int, eps: float | None = None, elementwise_affine: bool = True,
        device: Any = None, dtype: torch.dtype | None = None, *, compress: bool = True,
    ) -> None:  # fmt: skip
        what = "RMSNorm"
        check_bool(what, "compress", compress)
        check_bool(what, "elementwise_affine", elementwise_affine)
        if eps is not None:
            _check_eps(what, eps)
        if device is not None:
            check_device(what, device)
        shape = [normalized_shape] if is_int(normalized_shape) else normalized_shape
        sizes = isinstance(shape, (list, tuple)) and all(is_int(n) and n >= 0 for n in shape)
        got, context = show(normalized_shape), kind(normalized_shape)
        if not sizes:
            condition, advice = "be a size", "Pass that of the last axis."
            error = ValueError if is_int(normalized_shape) else TypeError
            raise error(refusal(what, "normalized_shape", condition, got, context, advice))
        if compress and (len(shape) != 1 or not 0 < shape[0] <= MAX_COLS):
            condition, advice = f"be one size of 1 to {MAX_COLS}", "Pass compress=False."
            raise ValueError(refusal(what, "normalized_shape", condition, got, context, advice))
        if compress and dtype is not None and dtype not in FLOATS:
            condition, advice = "be bfloat16, float16 or float32, or None", "Choose one of these."
            raise TypeError(refusal(what, "dtype", condition, show(dtype), kind(dtype), advice))
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.compress = compress

    def forward(self, x: Tensor) -> Tensor:
        if not self.compress:
            return super().forward(x)
        check_tensor("RMSNorm", "x", x)
        if x.dim() == 0 or x.shape[-1] != self.normalized_shape[0]:
            condition = f"have {self.normalized_shape[0]} as its last size"
            got, advice = list(x.shape), "Pass what the layer was made for."
            raise ValueError(refusal("RMSNorm", "x", condition, got, "x's shape", advice))
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compress={self.compress}"


# ---- SwiGLU ----


class _SwiGLU(torch.autograd.Function):
    """gate and up [..., C] -> h [..., C]. In backward one matrix has both gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        h, *kept = _ops.swiglu_forward(_rows(gate), _rows(up))
        ctx.save_for_backward(*kept)
        ctx.dtype = gate.dtype
        return _unflattened(h, gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor]:
        both = _ops.swiglu_backward(_rows(dh), *ctx.saved_tensors, ctx.dtype)
        both = both.reshape(*dh.shape[:-1], 2 * dh.shape[-1])
        return both.chunk(2, -1)


class _FusedSwiGLU(torch.autograd.Function):
    """The same of one tensor [..., 2 C], whose gradient is that matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        h, *kept = _ops.swiglu_forward(*_rows(x).chunk(2, -1))
        ctx.save_for_backward(*kept)
        ctx.dtype = x.dtype
        return _unflattened(h, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        both = _ops.swiglu_backward(_rows(dh), *ctx.saved_tensors, ctx.dtype)
        return both.reshape(*dh.shape[:-1], 2 * dh.shape[-1])


def swiglu(x: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, both kept for backward in int10_group.

    Args:
        x: the gate `[..., C]`, or with up left out `[..., 2 C]`, the gate and then up, which is
            what one linear layer for both gives.
        up: `[..., C]`, of x's dtype.

    Returns:
        `[..., C]` in the dtype of x. Differentiable once.

    Raises:
        TypeError, ValueError: for other tensors.
    """
    what = "swiglu"
    _check_input(what, "x", x)
    check_tensor(what, "up", up, optional=True)
    if up is None and (x.dim() == 0 or x.shape[-1] % 2):
        condition, advice = "have an even last size without up", "It holds the gate and then up."
        raise ValueError(refusal(what, "x", condition, list(x.shape), "x's shape", advice))
    if up is not None and (x.dim() == 0 or up.shape != x.shape or up.dtype != x.dtype):
        condition, advice = "have the shape and dtype of x", "Or pass both in one tensor."
        got, context = f"{up.dtype} {list(up.shape)}", f"x is {x.dtype} {list(x.shape)}"
        raise ValueError(refusal(what, "up", condition, got, context, advice))
    if x.numel() == 0:
        gate, other = x.chunk(2, -1) if up is None else (x, up)
        return F.silu(gate) * other
    grad = torch.is_grad_enabled()
    if up is None:
        if grad and x.requires_grad:
            return _FusedSwiGLU.apply(x)
        gate, other = _rows(x).chunk(2, -1)
    else:
        if grad and (x.requires_grad or up.requires_grad):
            return _SwiGLU.apply(x, up)
        gate, other = _rows(x), _rows(up)
    h = _ops.swiglu_forward(gate, other, False)[0]
    return h.reshape(*x.shape[:-1], h.shape[-1])


class SwiGLU(nn.Module):
    """`swiglu` as a module, without parameters: of one tensor `[..., 2 C]`, or of gate and up.

    Args:
        compress: False is torch's silu(gate) * up, which keeps what torch keeps.
    """

    def __init__(self, *, compress: bool = True) -> None:
        check_bool("SwiGLU", "compress", compress)
        super().__init__()
        self.compress = compress

    def forward(self, x: Tensor, up: Tensor | None = None) -> Tensor:
        if self.compress:
            return swiglu(x, up)
        gate, up = x.chunk(2, -1) if up is None else (x, up)
        return F.silu(gate) * up

    def extra_repr(self) -> str:
        return f"compress={self.compress}"
