"""Checks of what Python functions are given, with one message everywhere:

    mxtrain::<op>: <argument> must <condition>, got <value> (<context>). <what to do>

The ops check the tensors themselves. Here is what an op's schema would refuse in torch's words: the
kinds of things, unknown names, integers beyond 64 bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import numpy
import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INT64_MAX = 2**63 - 1

_INTEGERS = (int, torch.SymInt, numpy.integer)
_NUMBERS = (*_INTEGERS, float, torch.SymFloat, numpy.floating)


def refusal(
    op: str, argument: str, condition: str, got: object, context: str, advice: str
) -> str:  # fmt: skip
    """The message."""
    return f"mxtrain::{op}: {argument} must {condition}, got {got} ({context}). {advice}"


def show(value: object) -> str:
    """A value in a message: on one line, and not long."""
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."


def kind(value: object) -> str:
    return f"type {type(value).__name__}"


def check_that(
    ok: bool, op: str, argument: str, condition: str, got: object, advice: str, context: str = ""
) -> None:  # fmt: skip
    """ValueError unless ok; the context is the kind of what was got unless given."""
    if not ok:
        context = context or kind(got)
        raise ValueError(refusal(op, argument, condition, show(got), context, advice))


def check_name(op: str, argument: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError, listing what is known, unless value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        condition = f"be one of {', '.join(known)}"
        raise ValueError(
            refusal(op, argument, condition, show(value), kind(value), "Choose one of these.")
        )


def check_tensor(op: str, argument: str, value: object, optional: bool = False) -> None:
    """TypeError unless value is a plain, strided tensor (or None where it is optional)."""
    if value is None and optional:
        return
    if not isinstance(value, Tensor):
        condition = "be a torch.Tensor or None" if optional else "be a torch.Tensor"
        got, advice = type(value).__name__, "Convert it first."
        if argument == "rng":
            advice = "Pass int64 [2] (seed, offset), such as torch.tensor([42, 0])."
        raise TypeError(refusal(op, argument, condition, got, show(value), advice))
    if torch.compiler.is_compiling():
        return  # a trace of an autograd function may not ask for the layout
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        form = "nested" if value.is_nested else "quantized" if value.is_quantized else value.layout
        advice = "Make it dense first: x.to_dense(), x.dequantize() or a padded tensor."
        shape = "nested" if value.is_nested else f"shape {list(value.shape)}"
        raise TypeError(refusal(op, argument, "be dense and strided", form, shape, advice))


def is_int(value: object) -> bool:
    return isinstance(value, _INTEGERS) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def check_int(op: str, argument: str, value: object, low: int = -INT64_MAX - 1) -> None:
    """TypeError unless value is an int; ValueError unless it lies in [low, 2^63)."""
    if not is_int(value):
        raise TypeError(refusal(op, argument, "be an int", show(value), kind(value), "Pass one."))
    if type(value) is int and not low <= value <= INT64_MAX:
        condition = "lie in [0, 2^63)" if low == 0 else "fit in 64 bits"
        advice = "Pass a smaller number." if value > 0 else "Pass a larger number."
        raise ValueError(refusal(op, argument, condition, show(value), kind(value), advice))


def check_number(op: str, argument: str, value: object) -> None:
    """TypeError unless value is a float or an int, ValueError where it overflows a float."""
    if not is_number(value):
        raise TypeError(refusal(op, argument, "be a float", show(value), kind(value), "Pass one."))
    if type(value) is int and not is_finite(value):
        advice = "Pass a smaller number."
        raise ValueError(refusal(op, argument, "be finite", show(value), kind(value), advice))


def is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def as_float32(value: Any) -> float:
    """What a number becomes as the float32 factor of an op: too large is inf, too small is 0."""
    try:
        return ctypes.c_float(value).value
    except OverflowError:  # an int beyond the largest float
        return math.inf


def check_bool(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        advice = "Pass one of the two."
        raise TypeError(refusal(op, argument, "be True or False", show(value), kind(value), advice))


def check_dtype(op: str, argument: str, value: object) -> None:
    if not isinstance(value, torch.dtype):
        advice = "Pass one such as torch.bfloat16."
        raise TypeError(refusal(op, argument, "be a torch.dtype", show(value), kind(value), advice))


def check_device(op: str, device: object) -> None:
    """TypeError or ValueError unless torch can make a tensor there."""
    if isinstance(device, torch.device):
        found = device
    else:
        advice = 'Pass a torch.device, or a name such as "cpu" or "cuda:0".'
        if isinstance(device, bool) or not isinstance(device, (str, int)):
            condition = "be a torch.device or a name"
            raise TypeError(refusal(op, "device", condition, show(device), kind(device), advice))
        try:
            found = torch.device(device)
        except RuntimeError:
            condition = "name a device"
            message = refusal(op, "device", condition, show(device), kind(device), advice)
            raise ValueError(message) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        advice = "Use the CPU, or a torch with CUDA on a machine with a GPU."
        context = "no GPU is visible to torch"
        raise ValueError(refusal(op, "device", "be available", found, context, advice))
