"""What the linear layer refuses, before an op sees it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .checks import FLOATS, check_bool, check_device, check_int, check_tensor, kind, refusal, show
from .recipe import Recipe


def check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, ema: Tensor | None) -> None:
    what = "linear"
    for name, t in (("x", x), ("weight", weight), ("bias", bias), ("weight_ema", ema)):
        check_tensor(what, name, t, optional=name in ("bias", "weight_ema"))
        if t is not None and t.dtype not in FLOATS:
            condition, context = "be bfloat16, float16 or float32", f"shape {list(t.shape)}"
            raise TypeError(refusal(what, name, condition, t.dtype, context, "Cast it first."))
        if t is not None and t.device != x.device:
            condition, context = "be on the device of x", f"x is on {x.device}"
            advice = "Move the layer, or x."
            raise RuntimeError(refusal(what, name, condition, t.device, context, advice))
    shape = list(weight.shape)
    if len(shape) != 2:
        condition, advice = "be [out_features, in_features]", "Reshape it."
        context = f"{len(shape)} dimensions"
        raise ValueError(refusal(what, "weight", condition, shape, context, advice))
    out_features, in_features = shape
    context, advice = f"weight {shape}", "Pass tensors of one layer."
    if x.dim() == 0 or x.shape[-1] != in_features:
        condition = f"have in_features = {in_features} as its last size"
        raise ValueError(refusal(what, "x", condition, list(x.shape), context, advice))
    if bias is not None and bias.shape != (out_features,):
        condition = f"have out_features = {out_features} elements"
        raise ValueError(refusal(what, "bias", condition, list(bias.shape), context, advice))
    if ema is not None and ema.shape != weight.shape:
        condition = "have the shape of weight"
        raise ValueError(refusal(what, "weight_ema", condition, list(ema.shape), context, advice))


def check_fit(what: str, recipe: Recipe, in_features: int, out_features: int) -> None:
    misfit = recipe.misfit(in_features, out_features)
    if misfit is not None:
        context, advice = f"recipe {recipe.name!r}", "Choose a recipe with a smaller group."
        raise ValueError(refusal(what, "recipe", "fit the layer", misfit, context, advice))


def check_layer(
    in_features: object, out_features: object, bias: object, device: Any, dtype: object
) -> None:
    what = "MXLinear"
    check_int(what, "in_features", in_features, low=0)
    check_int(what, "out_features", out_features, low=0)
    if in_features * out_features >= 2**58:
        got, advice = f"{out_features} x {in_features}", "Choose a smaller layer."
        condition, context = "have fewer than 2^58 elements", "out_features x in_features"
        raise ValueError(refusal(what, "weight", condition, got, context, advice))
    check_bool(what, "bias", bias)
    if device is not None:
        check_device(what, device)
    if dtype is not None and dtype not in FLOATS:
        condition, advice = "be bfloat16, float16 or float32, or None", "Choose one of these."
        raise TypeError(refusal(what, "dtype", condition, show(dtype), kind(dtype), advice))
