"""export_weights and load_exported: a trained model with its weights frozen to packed codes.

    mxtrain.export_weights(model, "model.safetensors")                 # after training
    model = mxtrain.load_exported(build_model(), "model.safetensors")  # where it is deployed

What an MXLinear saves of its weight is the operand that its forward pass multiplies, so no average
(Q-EMA) and no master weight is needed any more, and outputs in evaluation are bitwise those of the
trained model. An exported state is a flat dict of tensors; of a layer `name` it has, in place of
`name.weight`, `name.weight_ema` and `name.ema_updates`:

    name.weight_packed          uint8 [out_features, Kp * bits / 8], the codes (docs/numerics.md)
    name.weight_scale           uint8 [out_features, Kp / block]
    name.weight_tensor_scale    float32 [1], nvfp4 only
    name.fallback_threshold     float32 [1], where the recipe has a fallback, as training left it
    name.weight_recipe          uint8, JSON: the recipe and in_features

(of int8_block, weight_packed is int8 [out_features, Kp] and weight_scale float32, of each square).

An MXLinear that quantizes nothing forward (bf16, mxfp4_backward, any recipe after the switch of
TargetPrecision) keeps `name.weight` and has `name.weight_recipe` beside it. Everything else, the
bias of the layer too, is as in the model's state_dict.
"""

from __future__ import annotations

import importlib.util
import json
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .checks import FLOATS, check_int, kind, refusal, show
from .draws import draw, signs_of
from .ema import _whole
from .fallback import initial_threshold
from .formats import FORMATS
from .int8 import BLOCK, blocks
from .linear import MXLinear, _product, _quantize, _quantize_both
from .packed import PARTS, Packed, parts_of, restored
from .quantizer import Quantizer
from .recipe import Recipe

_PARTS = ("weight_packed", "weight_scale", "weight_tensor_scale")
_THRESHOLD = "fallback_threshold"
_OF_TRAINING = (  # the weight first
    "weight", "weight_ema", "ema_updates", "ema_peak_lr", _THRESHOLD, "fallback_step",
    "fallback_counts",
)  # fmt: skip
_RECIPE = "weight_recipe"


class FrozenLinear(nn.Module):
    """The forward pass of an MXLinear whose weight is an operand. For inference only.

    Made by `load_exported`, or from a layer by `freeze`. Buffers: `weight_packed`, `weight_scale`,
    `weight_tensor_scale` (nvfp4), `fallback_threshold` (of a layer that was trained with one) and
    `weight_recipe`, as in the exported state; parameter: `bias` or None. forward takes and returns
    what MXLinear does in evaluation, bitwise.
    """

    def __init__(
        self, weight: Packed, bias: Tensor | None, recipe: Recipe, threshold: Tensor | None = None
    ) -> None:  # fmt: skip
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.recipe = recipe
        values = (*parts_of(weight)[: len(_PARTS)], threshold)
        for name, value in zip((*_PARTS, _THRESHOLD), values, strict=True):
            if value is not None:
                self.register_buffer(name, value)
        self.register_buffer(_RECIPE, _encode(recipe, self.in_features).to(weight.data.device))
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> Packed:
        """The operand that forward multiplies."""
        parts = [getattr(self, name, None) for name in _PARTS]
        return _operand(parts, self.recipe.fprop_w, (self.out_features, self.in_features))

    def _apply(self, fn: Any, recurse: bool = True) -> FrozenLinear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            device = self._buffers[name].device
            if self._buffers[name].dtype != old.dtype:  # to(bfloat16) is for parameters
                self._buffers[name] = old.to(device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        what = "FrozenLinear"
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            condition, advice = "be a tensor of bfloat16, float16 or float32", "Convert it first."
            raise TypeError(refusal(what, "x", condition, show(x), kind(x), advice))
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            condition = f"have in_features = {self.in_features} as its last size"
            context, advice = f"weight {[self.out_features, self.in_features]}", "Reshape it."
            raise ValueError(refusal(what, "x", condition, list(x.shape), context, advice))
        if x.requires_grad and torch.is_grad_enabled():
            condition, context = "not require a gradient", "the weight is frozen for inference"
            advice = "Use torch.no_grad(), or train the model that was exported."
            raise RuntimeError(refusal(what, "x", condition, True, context, advice))
        device, recipe = x.device.type, self.recipe
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
        if x.numel() == 0:
            return x.new_zeros((*x.shape[:-1], self.out_features), dtype=dtype)
        rng, _ = draw(recipe, False, x)
        signs = signs_of(recipe, "fprop", None, x.device)
        rows = x.reshape(-1, self.in_features)
        row = recipe.fprop_x if recipe.fprop_x.format else None
        threshold = getattr(self, _THRESHOLD, None)
        if recipe.fprop_x.fallback and threshold is None:
            threshold = initial_threshold(rows, recipe)
        x_rng = None if rng is None else rng[0]
        x_row, _, _ = _quantize_both(rows, row, None, x_rng, signs, None, threshold)
        y = _product(
            rows if x_row is None else x_row, self.weight, self.bias, recipe.alpha("fprop"),
            dtype, dtype, recipe.accumulate,
        )  # fmt: skip
        return y.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        bias = f"bias={self.bias is not None}, recipe={self.recipe.name!r}"
        return f"in_features={self.in_features}, out_features={self.out_features}, {bias}"


@torch.no_grad()
def freeze(layer: MXLinear) -> FrozenLinear:
    """The FrozenLinear of a layer, with a weight of its own and the layer's bias.

    Raises ValueError where the recipe rounds or rotates the weight at random in the forward pass,
    or leaves it unquantized there.
    """
    recipe = layer.recipe
    problem = _unfreezable(recipe)
    if problem is not None:
        context, advice = f"recipe {recipe.name!r}", "Save model.state_dict() instead."
        condition = "quantize the weight the same way in every forward pass"
        raise ValueError(refusal("export_weights", "recipe", condition, problem, context, advice))
    weight = _whole(layer.weight)
    ema = layer.weight_ema if layer.ema_active else None
    signs = signs_of(recipe, "fprop", None, weight.device)
    operand = _quantize(weight, recipe.fprop_w, None, signs, toward=ema)
    bias = None if layer.bias is None else _whole(layer.bias)
    return FrozenLinear(operand, bias, recipe, layer.trained_threshold())


def export_weights(
    model: nn.Module, path: str | os.PathLike[str] | None = None
) -> dict[str, Tensor]:
    """The state of a model whose MXLinear weights are frozen as the forward pass uses them.

    A layer whose recipe leaves weight and activations unquantized in the forward pass, or that has
    no elements, keeps its `weight`. The model is unchanged.

    Args:
        model: a model with MXLinear layers, or one.
        path: where to write it: by safetensors where the name ends in .safetensors, else by
            torch.save. None: nowhere.

    Returns:
        The exported state: tensors of their own for the packed weights, the model's for the rest.

    Raises:
        TypeError: for a model that is none.
        ValueError: where there is no MXLinear, or a weight that is not quantized the same way in
            every forward pass; for .safetensors without that package.
    """
    what = "export_weights"
    layers = _layers(what, model)
    save = None if path is None else _writer(what, path)
    state = model.state_dict()
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        plain = _is_plain(layer.recipe) or layer.weight.numel() == 0
        for key in _OF_TRAINING[1:] if plain else _OF_TRAINING:
            state.pop(prefix + key, None)
        if plain:
            recipe = _encode(layer.recipe, layer.in_features)
            state[prefix + _RECIPE] = recipe.to(layer.weight.device)
        else:
            frozen = freeze(layer)
            state.update((prefix + key, value) for key, value in frozen.named_buffers())
    state = {key: value.detach() for key, value in state.items() if isinstance(value, Tensor)}
    if save is not None:
        save(state, path)
    return state


def load_exported(model: nn.Module, state: dict[str, Tensor] | str | os.PathLike[str]) -> nn.Module:
    """Load what export_weights made into a model of the same architecture, for inference.

    Every `nn.Linear` (or MXLinear) that was exported packed becomes a FrozenLinear, in place, and
    one that was exported with its weight an MXLinear of the recipe that it was trained by last; all
    else is loaded by load_state_dict. Layers keep their device (on meta they take that of the
    state). Hooks of frozen layers are lost. The model is put in evaluation.

    Args:
        model: the architecture, converted or not; its weights do not matter.
        state: what export_weights returned, or the file that it wrote.

    Returns:
        The model; where it is itself such a layer, its FrozenLinear.

    Raises:
        TypeError: for a model or state of another kind.
        ValueError: where names, shapes, dtypes or bytes do not fit. The model is then unchanged.
        OSError: where the file cannot be read.
    """
    what = "load_exported"
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "Build the architecture first."
        condition = "be a torch.nn.Module"
        raise TypeError(refusal(what, "model", condition, got, show(model), advice))
    if isinstance(state, (str, os.PathLike)):
        state = _read(what, state)
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        condition, advice = "be a dict of tensors or a path", "Pass what export_weights returned."
        raise TypeError(refusal(what, "state", condition, show(state), kind(state), advice))
    modules = dict(model.named_modules(remove_duplicate=False))
    exported = {
        key.removesuffix(_RECIPE).removesuffix(".")
        for key in state
        if key == _RECIPE or key.endswith("." + _RECIPE)
    }
    if not exported:
        condition, advice = "hold a weight_recipe", "Pass what export_weights returned."
        raise ValueError(refusal(what, "state", condition, "none", f"{len(state)} tensors", advice))
    frozen: dict[str, FrozenLinear] = {}
    plain: dict[str, Recipe] = {}
    for name in sorted(exported):
        module, prefix = modules.get(name), f"{name}." if name else ""
        recipe = _recipe_of(what, name, module, state)
        if prefix + "weight" in state:
            plain[name] = recipe
        else:
            frozen[name] = _thaw(what, name, module, recipe, state)
    rest = _check_rest(what, model, state, set(frozen), set(plain))
    for name, recipe in plain.items():
        module = modules[name]
        if isinstance(module, MXLinear):
            module.recipe = recipe
        elif type(module) is nn.Linear:
            MXLinear.from_linear(module, recipe)
    for name, layer in frozen.items():
        if name == "":
            return layer.eval()
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, layer)
    on_meta = any(t.is_meta for t in model.state_dict().values() if isinstance(t, Tensor))
    model.load_state_dict(rest, strict=False, assign=on_meta)
    return model.eval()


# ---- parts ----


def _is_plain(recipe: Recipe) -> bool:
    """Whether the forward pass is that of nn.Linear."""
    return recipe.fprop_w.format is None and recipe.fprop_x.format is None


def _unfreezable(recipe: Recipe) -> str | None:
    q = recipe.fprop_w
    if q.format is None:
        return "unquantized"
    if q.rounding == "stochastic":
        return "stochastic rounding"
    return "drawn signs" if q.signs == "drawn" else None


def _layers(what: str, model: nn.Module) -> dict[str, MXLinear]:
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "Pass the trained model."
        condition = "be a torch.nn.Module"
        raise TypeError(refusal(what, "model", condition, got, show(model), advice))
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: m for name, m in modules if isinstance(m, MXLinear)}
    if not layers:
        condition, got = "have an MXLinear", "none"
        advice = "Convert the model first: mxtrain.convert(model, recipe)."
        raise ValueError(refusal(what, "model", condition, got, type(model).__name__, advice))
    return layers


def _encode(recipe: Recipe, in_features: int) -> Tensor:
    text = json.dumps({"recipe": recipe.to_dict(), "in_features": in_features})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def _recipe_of(
    what: str, name: str, module: nn.Module | None, state: dict[str, Tensor]
) -> Recipe:  # fmt: skip
    """The recipe of the exported layer `name`, which fits the module."""
    prefix = f"{name}." if name else ""
    shown, plain = f"layer {name!r}", prefix + "weight" in state
    if not isinstance(module, nn.Linear):
        condition, got = "have the linear layers that were exported", type(module).__name__
        advice = "Build the architecture that was trained."
        raise ValueError(refusal(what, "model", condition, got, shown, advice))
    try:
        meta = json.loads(bytes(state[prefix + _RECIPE].cpu().flatten().tolist()))
        recipe = Recipe.from_dict(meta["recipe"])
        check_int(what, "in_features", meta["in_features"], low=0 if plain else 1)
        k = meta["in_features"]
        if not plain:
            _shapes(recipe.fprop_w, module.out_features, k)
    except (ValueError, KeyError, TypeError) as error:
        condition, advice = "describe a recipe", "Export the model again."
        context = f"{shown}: {show(str(error))}"
        raise ValueError(
            refusal(what, prefix + _RECIPE, condition, "other bytes", context, advice)
        ) from None
    if k != module.in_features or recipe.misfit(k, module.out_features) is not None:
        condition, got = f"have in_features {k} as it was exported", module.in_features
        advice = "Build the architecture that was trained."
        raise ValueError(refusal(what, shown, condition, got, f"recipe {recipe.name!r}", advice))
    return recipe


def _thaw(
    what: str, name: str, module: nn.Linear, recipe: Recipe, state: dict[str, Tensor]
) -> FrozenLinear:  # fmt: skip
    """The FrozenLinear of the exported layer `name`, on the device of the module it replaces."""
    prefix, shown = f"{name}." if name else "", f"layer {name!r}"
    q, k = recipe.fprop_w, module.in_features
    rows, device = module.out_features, module.weight.device
    shapes = _shapes(q, rows, k)
    optional = (_THRESHOLD,) if recipe.fprop_x.fallback else ()
    parts: list[Tensor | None] = []
    for part in (*_PARTS, _THRESHOLD):
        value = state.get(prefix + part)
        dtype, shape = shapes.get(part, (torch.float32, (1,)))
        if value is None or part not in (*shapes, *optional):
            fits = value is None and part not in shapes
        else:
            fits = value.dtype == dtype and tuple(value.shape) == shape
        if not fits:
            condition = f"be {str(dtype).removeprefix('torch.')} of shape {list(shape)}"
            context = f"{shown} is {[rows, module.in_features]}, format {q.format}"
            advice = "Build the architecture that was trained."
            raise ValueError(refusal(what, prefix + part, condition, show(value), context, advice))
        if value is not None and not value.is_meta:
            _check_values(what, prefix, part, value, q, k)
        parts.append(None if value is None else _copied(value, device))
    bias = state.get(prefix + "bias")
    good = bias is None or (bias.shape == (rows,) and bias.dtype in FLOATS)
    if (bias is None) != (module.bias is None) or not good:
        condition = f"be bfloat16, float16 or float32 and have shape [{rows}]"
        condition = "be absent" if module.bias is None else condition
        advice = "Build the architecture that was trained."
        raise ValueError(refusal(what, prefix + "bias", condition, show(bias), shown, advice))
    bias = None if bias is None else _copied(bias, device)
    *parts, threshold = parts
    return FrozenLinear(_operand(parts, q, (rows, k)), bias, recipe, threshold)


def _check_values(
    what: str, prefix: str, part: str, value: Tensor, q: Quantizer, k: int
) -> None:  # fmt: skip
    """What no export writes and the product on CUDA would not notice."""
    problem = None
    if part == _THRESHOLD:
        condition = "be positive and finite"
        if not (value > 0).all() or not value.isfinite().all():
            problem = value.tolist()
    elif q.square and part == "weight_scale":
        condition = "be at least 0 or NaN"
        if (value < 0).any():
            problem = float(value[value < 0][0])
    elif q.square:
        condition = f"hold codes in [-127, 127], and zeros beyond in_features = {k}"
        if (value == -128).any() or value[:, k:].any():
            problem = "others"
    if problem is not None:
        context, advice = show(value), "Export the model again."
        raise ValueError(refusal(what, prefix + part, condition, problem, context, advice))


def _operand(parts: list[Tensor | None], q: Quantizer, shape: tuple[int, int]) -> Packed:
    return restored((*parts, *[None] * (PARTS - len(parts))), q, shape)


def _shapes(q: Quantizer, rows: int, k: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What an operand by q of a [rows, k] weight is made of. KeyError where q has no format."""
    if q.square:
        grid = blocks(rows), blocks(k)
        return {
            "weight_packed": (torch.int8, (rows, grid[1] * BLOCK)),
            "weight_scale": (torch.float32, grid),
        }
    fmt = FORMATS[q.format]
    shapes = {
        "weight_packed": (torch.uint8, (rows, fmt.row_bytes(k))),
        "weight_scale": (torch.uint8, (rows, fmt.padded(k) // fmt.block)),
    }
    return shapes | ({"weight_tensor_scale": (torch.float32, (1,))} if fmt.two_level else {})


def _copied(value: Tensor, device: torch.device) -> Tensor:
    """value on the device, where it is not only the promise of one."""
    return value.to(value.device if device.type == "meta" else device, copy=True)


def _check_rest(
    what: str, model: nn.Module, state: dict[str, Tensor], frozen: set[str], plain: set[str]
) -> dict[str, Tensor]:
    """What load_state_dict takes of the state, which is all that the model needs."""

    def left(key: str) -> bool:
        name, _, own = key.rpartition(".")
        return name not in frozen and not (name in plain and own in (*_OF_TRAINING[1:], _RECIPE))

    needed = {key: v for key, v in model.state_dict().items() if left(key)}
    rest = {key: v for key, v in state.items() if left(key)}
    for title, keys in (("missing", needed.keys() - rest.keys()),
                        ("unexpected", rest.keys() - needed.keys())):  # fmt: skip
        if keys:
            condition, context = "have the names of the model", f"{title}: {len(keys)}"
            got, advice = show(sorted(keys)), "Build the architecture that was trained."
            raise ValueError(refusal(what, "state", condition, got, context, advice))
    for key, value in rest.items():
        if isinstance(needed[key], Tensor) and needed[key].shape != value.shape:
            condition, got = f"have shape {list(needed[key].shape)}", list(value.shape)
            advice = "Build the architecture that was trained."
            raise ValueError(refusal(what, key, condition, got, "as in the model", advice))
        if isinstance(needed[key], Tensor) and _sort(needed[key]) != _sort(value):
            condition, got = f"be {_sort(needed[key])}", str(value.dtype).removeprefix("torch.")
            advice = "Pass what export_weights returned."
            raise ValueError(refusal(what, key, condition, got, "as in the model", advice))
    return rest


def _sort(t: Tensor) -> str:
    return "real" if t.is_floating_point() else "complex" if t.is_complex() else "of integers"


def _is_safetensors(what: str, path: str | os.PathLike[str]) -> bool:
    if not os.fspath(path).endswith(".safetensors"):
        return False
    if importlib.util.find_spec("safetensors") is None:
        condition, advice = "be importable", "pip install safetensors, or use another file name."
        advice = advice[0].upper() + advice[1:]
        raise ValueError(refusal(what, "safetensors", condition, "nothing", f"{path}", advice))
    return True


def _writer(what: str, path: object) -> Any:
    if not isinstance(path, (str, os.PathLike)):
        condition, advice = "be a path or None", "Pass a file name."
        raise TypeError(refusal(what, "path", condition, show(path), kind(path), advice))
    if not _is_safetensors(what, path):
        return torch.save
    from safetensors.torch import save_file

    def save(state: dict[str, Tensor], path: str | os.PathLike[str]) -> None:
        # safetensors refuses tensors that share memory, as tied ones do.
        own, seen = {}, set()
        for key, value in state.items():
            value = value.contiguous()
            storage = value.untyped_storage().data_ptr()
            own[key] = value.clone() if storage in seen else value
            seen.add(storage)
        save_file(own, path, metadata={"format": "pt"})

    return save


def _read(what: str, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    if _is_safetensors(what, path):
        from safetensors.torch import load_file as load
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        return load(path)
    except OSError:
        raise
    except Exception as error:  # of many kinds, by what the bytes look like
        context, advice = f"{type(error).__name__}: {show(str(error))}", "Export the model again."
        condition, got = "be a file that export_weights wrote", os.fspath(path)
        raise ValueError(refusal(what, "path", condition, got, context, advice)) from error
