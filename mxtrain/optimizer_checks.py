"""What the fake kernels of the optimizer steps check: the checks of csrc/ops/optimizer.cpp."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .formats import ROUNDINGS, SCALE_RULES
from .op_checks import (
    _device,
    _differ,
    _dtype,
    _fail,
    _shape,
    check_choice,
    check_same_device,
)

FLOAT, BYTE, SHORT = torch.float32, torch.uint8, torch.int16


@dataclass
class AdamwCall:
    """The arguments of adamw_ and ramped_adamw_; what a call does not have stays empty."""

    op: str
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    beta1: float
    beta2: float
    eps: float
    lr_tensor: Tensor | None
    rng: Tensor | None
    emas: list[Tensor] = field(default_factory=list)
    ema_weights: list[float] = field(default_factory=list)
    weight_changes: list[Tensor] = field(default_factory=list)
    quantized_changes: list[Tensor] = field(default_factory=list)
    scale_rule: int = 1
    rounding: int = 0
    grad_sums: list[Tensor] = field(default_factory=list)
    counts: list[Tensor] = field(default_factory=list)
    periods: list[Tensor] = field(default_factory=list)
    ramped: bool = False


def _check_device_of(c: AdamwCall, name: str, i: int, t: Tensor) -> None:
    if t.device != c.params[0].device:
        condition, advice = "be on the device of params[0]", "Call once for each device."
        context = f"params[0] is on {_device(c.params[0])}"
        _fail(c.op, f"{name}[{i}]", condition, _device(t), context, advice)


def _check_length(c: AdamwCall, name: str, length: int) -> None:
    if length != len(c.params):
        condition, context = "have one entry for each parameter", f"{len(c.params)} parameters"
        _fail(c.op, name, condition, length, context, "Pass lists of one length.")


def _check_list(c: AdamwCall, name: str, tensors: list[Tensor], dtype: torch.dtype) -> None:
    _check_length(c, name, len(tensors))
    for i, (t, param) in enumerate(zip(tensors, c.params, strict=True)):
        same = t.dtype == dtype and t.is_contiguous()
        if not same or _differ(t.numel(), param.numel()):
            condition = f"be contiguous {_dtype(dtype)} with {param.numel()} elements"
            got = f"{_dtype(t.dtype)} {_shape(t)}{'' if t.is_contiguous() else ' strided'}"
            context = f"params[{i}] has shape {_shape(param)}"
            _fail(c.op, f"{name}[{i}]", condition, got, context, "Make it like its parameter.")
        _check_device_of(c, name, i, t)


def _check_params(c: AdamwCall) -> None:
    for i, t in enumerate(c.params):
        name, shape, first = f"params[{i}]", f"shape {_shape(t)}", _dtype(c.params[0].dtype)
        if t.dtype not in (torch.float32, torch.bfloat16):
            condition, advice = "be float32 or bfloat16", "Convert it first."
            _fail(c.op, name, condition, _dtype(t.dtype), shape, advice)
        if t.dtype != c.params[0].dtype:
            condition, advice = "have the dtype of params[0]", "Call once for each dtype."
            _fail(c.op, name, condition, _dtype(t.dtype), f"params[0] is {first}", advice)
        if not t.is_contiguous():
            advice = "Pass a view in the order of memory."
            _fail(c.op, name, "be contiguous", "strides", shape, advice)
        _check_device_of(c, "params", i, t)


def _check_options(c: AdamwCall) -> None:
    count = f"{len(c.params)} parameters"
    for name, below in (("beta1", 1.0), ("beta2", 1.0), ("eps", math.inf)):
        value = getattr(c, name)
        if not 0.0 <= value < below:
            _fail(c.op, name, f"lie in [0, {below:g})", f"{value:g}", count, "Correct it.")
    if (t := c.lr_tensor) is not None:
        if t.dtype != torch.float64 or _differ(t.numel(), 1):
            got, context = _dtype(t.dtype), f"shape {_shape(t)}"
            _fail(c.op, "lr_tensor", "be one float64", got, context, "Convert it first.")
        check_same_device(c.op, "lr_tensor", t, c.params[0])
    if (t := c.rng) is not None:
        shaped = t.dim() == 2 and t.is_contiguous() and tuple(t.shape) == (len(c.params), 2)
        if t.dtype != torch.int64 or not shaped:
            condition = f"be contiguous int64 of shape [{len(c.params)}, 2]"
            got, context = f"{_dtype(t.dtype)} {_shape(t)}", "a row for each parameter"
            _fail(c.op, "rng", condition, got, context, "See mxtrain.draw_rng.")
        check_same_device(c.op, "rng", t, c.params[0])


def _check_steps(c: AdamwCall) -> None:
    _check_length(c, "steps", len(c.steps))
    for i, t in enumerate(c.steps):
        if t.dtype != torch.float32 or _differ(t.numel(), 1):
            got, context = _dtype(t.dtype), f"shape {_shape(t)}"
            advice = f"It counts the steps of params[{i}]."
            _fail(c.op, f"steps[{i}]", "be one float32", got, context, advice)
        _check_device_of(c, "steps", i, t)


def _check_statistics(c: AdamwCall) -> None:
    _check_list(c, "weight_changes", c.weight_changes, FLOAT)
    _check_list(c, "quantized_changes", c.quantized_changes, FLOAT)
    for i, t in enumerate(c.params):
        if t.dim() != 2:
            condition = "have 2 dimensions where changes are summed"
            advice = "Only weights of linear layers are quantized."
            _fail(c.op, f"params[{i}]", condition, t.dim(), f"shape {_shape(t)}", advice)
    check_choice(c.op, "scale_rule", c.scale_rule, list(SCALE_RULES))
    check_choice(c.op, "rounding", c.rounding, list(ROUNDINGS))
    count = f"{len(c.params)} parameters"
    if c.rounding == ROUNDINGS["stochastic"]:
        advice = "Random flips say nothing of the weights."
        _fail(c.op, "rounding", "be nearest or toward", "stochastic", count, advice)
    if c.rounding == ROUNDINGS["toward"] and not c.emas:
        condition, advice = "be given with rounding toward", "Give them, or round to nearest."
        _fail(c.op, "emas", condition, "none", count, advice)


def check_adamw(c: AdamwCall) -> None:
    _check_params(c)
    _check_list(c, "grads", c.grads, c.params[0].dtype)
    _check_list(c, "exp_avgs", c.exp_avgs, FLOAT)
    _check_list(c, "exp_avg_sqs", c.exp_avg_sqs, FLOAT)
    _check_steps(c)
    _check_options(c)
    if c.emas:
        _check_list(c, "emas", c.emas, FLOAT)
    if len(c.ema_weights) != len(c.emas):
        condition, context = "have one entry for each of emas", f"{len(c.emas)} emas"
        advice = "Pass lists of one length."
        _fail(c.op, "ema_weights", condition, len(c.ema_weights), context, advice)
    for i, weight in enumerate(c.ema_weights):
        if not 0.0 <= weight <= 1.0:
            condition, context = "lie in [0, 1]", f"{len(c.params)} parameters"
            advice = "It is 1 - ema_beta, or 1 to copy."
            _fail(c.op, f"ema_weights[{i}]", condition, f"{weight:g}", context, advice)
    if c.weight_changes or c.quantized_changes:
        _check_statistics(c)
    if c.ramped:
        _check_list(c, "grad_sums", c.grad_sums, FLOAT)
        wide = len(c.counts) > 0 and c.counts[0].dtype == SHORT
        _check_list(c, "counts", c.counts, SHORT if wide else BYTE)
        _check_list(c, "periods", c.periods, SHORT if wide else BYTE)
