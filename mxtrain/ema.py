"""Q-EMA: the running average of a weight that its forward quantizer rounds toward.

- Formula, with W the weight after step t: A_1 = W_1, then A_t = A_(t-1).lerp(W_t, s) in float32,
  whatever the dtype of W, with s = max(1 - ema_beta, 1 / (1 + m)) and m the memory in steps that
  the recipe allows: at most ema_fraction (t - 1), and at most ema_at_half (peak / lr - 1), where lr
  is the learning rate of step t and peak the largest so far; a bound that the recipe has not (None)
  is infinite, and with neither s = 1 - ema_beta. Gradients taken at an average lag the weights, and
  a lag too long for the learning rate makes training unstable (results.md): with ema_at_half it
  shortens as the learning rate rises, and there is none at the peak, where A = W. Rounding "toward"
  takes, of the two grid values around an element of W, the one nearer to that of A (numerics.md).
- When: one update after every `step()` of an optimizer that holds the weight and trains it, from a
  hook on all optimizers that the first such layer installs; mxtrain.optim.AdamW does it within its
  step, to the same bits. `update_weight_ema` does one by hand. The learning rate is that of the
  weight's parameter group, an optimizer without one counts as always at its peak. (A tensor on the
  GPU is read, which waits for it; what a CUDA graph captures has the value that was read last.)
  The forward uses A from max(ema_warmup, 1) updates on; until then W rounds to nearest.
- Saved in the state_dict: A as `weight_ema` (float32) and the count as `ema_updates` (int64), only
  where the recipe has `ema_beta`, and with `ema_at_half` the peak as `ema_peak_lr` (float64). What
  is loaded with them goes on bitwise (without a peak, it is that of the steps to come); loading a
  weight without them, or `reset_parameters`, starts anew from that weight, with a count of 0.

Source: arXiv 2502.20853, its section on the EMA quantizer (Q-EMA).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .checks import is_number, kind, refusal, show
from .recipe import Recipe


class EmaLinear(nn.Linear):
    """An `nn.Linear` with the Q-EMA state that its recipe asks for. MXLinear is one."""

    weight_ema: Tensor
    ema_active: bool
    _ema_updates: int
    _ema_lr: float | None = None  # of the optimizer's step at hand; None counts as the peak
    _ema_peak_lr: float = 0.0
    _recipe: Recipe

    def _start_without_ema(self) -> None:
        self._ema_updates = 0
        self.ema_active = False

    def _begin_or_end_ema(self) -> None:
        """Have what _recipe needs: the state and its updates, or neither."""
        if self._recipe.ema_beta is None:
            if "weight_ema" in self._buffers:
                del self.weight_ema
            self._count_ema(0)
            self._ema_lr, self._ema_peak_lr = None, 0.0
            _EMA_LAYERS.discard(self)
        else:
            if "weight_ema" not in self._buffers:
                ema = _whole(self.weight).to(torch.float32, copy=True)
                self.register_buffer("weight_ema", ema)
            self._count_ema(self._ema_updates)
            _register(self)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "_recipe" in self.__dict__:  # not yet where nn.Linear.__init__ calls this
            self._restart_ema()

    def _count_ema(self, updates: int) -> None:
        # forward reads ema_active alone, so torch.compile guards on a bool that flips once.
        self._ema_updates = updates
        beta, warmup = self._recipe.ema_beta, self._recipe.ema_warmup
        self.ema_active = beta is not None and updates >= max(warmup, 1)

    @torch.no_grad()
    def _copy_to_ema(self, weight: Tensor) -> None:
        if self.weight_ema.device == weight.device:
            self.weight_ema.copy_(weight)
        else:  # the weight has left the meta device by assignment
            self.weight_ema = weight.to(torch.float32, copy=True)

    @property
    def ema_step(self) -> float:
        """How far the next update takes weight_ema toward the weight; the first, all the way.

        A CUDA graph that captures the optimizer's step repeats this number in its replays.
        """
        if self._ema_updates == 0:
            return 1.0
        beta, fraction = self._recipe.ema_beta, self._recipe.ema_fraction
        memory = math.inf if fraction is None else fraction * self._ema_updates
        if self._recipe.ema_at_half is not None:
            memory = min(memory, self._recipe.ema_at_half * self._cooled)
        return max(1.0 - beta, 1.0 / (1.0 + memory))

    @property
    def _cooled(self) -> float:
        """peak / lr - 1: 0 at the peak of the learning rate, 1 at half of it."""
        lr, peak = self._ema_lr, self._ema_peak_lr
        if lr is None or lr >= peak:
            return 0.0
        return peak / lr - 1.0 if lr > 0 else math.inf

    def see_lr(self, lr: float | Tensor | None) -> None:
        """Say at which learning rate the weight is trained, for the next update of its average.

        The hook on optimizers does it.
        """
        if isinstance(lr, Tensor) and lr.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._ema_lr = None if lr is None else float(lr)
        self._ema_peak_lr = max(self._ema_peak_lr, self._ema_lr or 0.0)

    def count_ema_update(self) -> None:
        """Say that weight_ema was updated, by whoever did it."""
        self._count_ema(self._ema_updates + 1)

    def _restart_ema(self) -> None:
        if "weight_ema" in self._buffers:
            self._copy_to_ema(_whole(self.weight))
            self._count_ema(0)
            self._ema_lr, self._ema_peak_lr = None, 0.0

    def _apply(self, fn: Any, recurse: bool = True) -> EmaLinear:
        before = self._buffers.get("weight_ema")
        super()._apply(fn, recurse)
        after = self._buffers.get("weight_ema")
        if after is not None and after.dtype != torch.float32:  # to(bfloat16) is for parameters
            self._buffers["weight_ema"] = before.to(after.device)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if "weight_ema" in self._buffers:
            updates = torch.tensor(self._ema_updates, dtype=torch.int64)
            destination[prefix + "ema_updates"] = updates
            if self._recipe.ema_at_half is not None:
                peak = torch.tensor(self._ema_peak_lr, dtype=torch.float64)
                destination[prefix + "ema_peak_lr"] = peak

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        keys = [prefix + "weight_ema", prefix + "ema_updates"]
        mine = "weight_ema" in self._buffers
        saved = mine and all(key in state_dict for key in keys)
        lr = state_dict.get(prefix + "ema_peak_lr", _NO_PEAK)
        problems = self._bad_saved(*(state_dict[key] for key in keys), lr) if saved else []
        if problems:  # load_state_dict raises, and lists them with what else is wrong
            error_msgs += problems
            return  # with the weight, average and count that belong together
        hidden = [*(keys[1:] if saved else keys), prefix + "ema_peak_lr"]
        super()._load_from_state_dict(
            {key: value for key, value in state_dict.items() if key not in hidden},
            prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs,
        )  # fmt: skip
        if saved:
            self._count_ema(int(state_dict[keys[1]]))
            self._ema_lr, self._ema_peak_lr = None, float(lr)
            self.weight_ema = self.weight_ema.to(torch.float32)  # where it was assigned
        elif mine:
            if keys[0] in missing_keys:
                missing_keys.remove(keys[0])
            if prefix + "weight" in state_dict:
                self._restart_ema()

    def _bad_saved(self, average: object, updates: object, lr: object) -> list[str]:
        """What is wrong with weight_ema, ema_updates and ema_peak_lr of a state_dict."""
        problems = [
            _bad_average(average, self.weight_ema.shape),
            _bad_count(updates),
            _bad_peak(lr),
        ]
        return [problem for problem in problems if problem is not None]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "weight_ema" in self._buffers:
            _register(self)


_NO_PEAK = torch.zeros((), dtype=torch.float64)
_EMA_LAYERS: weakref.WeakSet[EmaLinear] = weakref.WeakSet()
_HOOK: Any = None


def _register(layer: EmaLinear) -> None:
    """Have optimizers update the layer's average. The first layer installs the one hook."""
    global _HOOK
    _EMA_LAYERS.add(layer)
    if _HOOK is None:
        # Not traced, even where the optimizer's step is compiled: the counts change every step.
        _HOOK = register_optimizer_step_post_hook(torch.compiler.disable(_after_step))


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not getattr(optimizer, "updates_weight_ema", False):  # mxtrain.optim has done it
        held = averaging_layers(optimizer)
        see_learning_rates(optimizer, held)
        average_weights(layer for layers in held.values() for layer in layers)


def averaging_layers(optimizer: torch.optim.Optimizer) -> dict[Tensor, list[EmaLinear]]:
    """The layers that average a weight which the optimizer holds and trains, by that weight.

    In the order of the optimizer, which every rank shares.

    Raises RuntimeError for a weight that is not in its shape, as FullyShardedDataParallel keeps it.
    """
    layers: dict[int, list[EmaLinear]] = {}
    for layer in _EMA_LAYERS:
        layers.setdefault(id(layer.weight), []).append(layer)
    if not layers:
        return {}
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    held = {p: layers[id(p)] for p in params if id(p) in layers}
    for p, mine in held.items():
        if p.shape != mine[0].weight_ema.shape:
            _refuse_flat(mine[0], p)
    for p in params:
        for part in getattr(p, "_param_infos", ()):  # of its flat parameters
            if part.module in _EMA_LAYERS and part.param_name == "weight":
                _refuse_flat(part.module, p)
    return held


def _refuse_flat(layer: EmaLinear, p: Tensor) -> None:
    condition = f"be {list(layer.weight_ema.shape)} in the optimizer to be averaged"
    context = f"recipe {layer._recipe.name!r}"
    advice = "Shard by fully_shard (FSDP2); FullyShardedDataParallel flattens it."
    message = refusal("MXLinear", "weight", condition, list(p.shape), context, advice)
    raise RuntimeError(message)


def see_learning_rates(
    optimizer: torch.optim.Optimizer, held: dict[Tensor, list[EmaLinear]]
) -> None:
    """Tell these layers, found by averaging_layers, the learning rates of their weights."""
    for group in optimizer.param_groups if held else ():
        layers = [m for p in group["params"] for m in held.get(p, ())]
        if any(m._recipe.ema_at_half is not None for m in layers):
            lr = group.get("lr")
            on_device = isinstance(lr, Tensor) and lr.is_cuda
            if on_device and not torch.cuda.is_current_stream_capturing():
                lr = float(lr)  # once
            for layer in layers:
                layer.see_lr(lr)


def update_weight_ema(layers: Iterable[EmaLinear], lr: float | None = None) -> None:
    """One Q-EMA update of these layers, whose recipes have `ema_beta`. The optimizer hook calls it.

    The first update of a layer copies its weight, so what the weight was at construction leaves no
    trace; a later one is weight_ema <- weight_ema.lerp(weight, layer.ema_step) in float32.

    Args:
        layers: the layers, each once.
        lr: the learning rate of the step that was made; needed by recipes with `ema_at_half`.

    Raises:
        TypeError: for something else than MXLinear.
        ValueError: for one whose recipe has no average, or without the lr that it needs. None is
            updated then.
    """
    layers = _checked(layers)
    what, argument, context = "update_weight_ema", "lr", f"{len(layers)} layers"
    if lr is None:
        if any(layer._recipe.ema_at_half is not None for layer in layers):
            condition = "be given where a recipe has ema_at_half"
            advice = "Pass the learning rate of the step, or use a recipe with ema_at_half=None."
            raise ValueError(refusal(what, argument, condition, lr, context, advice))
    elif not (is_number(lr) and 0.0 <= lr < math.inf):
        condition, advice = "be a number of at least 0", "Pass the learning rate of the step."
        raise ValueError(refusal(what, argument, condition, show(lr), context, advice))
    else:
        for layer in layers:
            layer.see_lr(lr)
    average_weights(layers)


@torch.no_grad()
def average_weights(layers: Iterable[EmaLinear]) -> None:
    """update_weight_ema of layers that have seen their learning rates, unchecked."""
    grouped: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for layer in layers:
        weight = _whole(layer.weight)
        if layer._ema_updates == 0:
            layer._copy_to_ema(weight)
        else:
            emas, weights = grouped.setdefault(layer.ema_step, ([], []))
            emas.append(layer.weight_ema)
            weights.append(weight.to(torch.float32))
        layer.count_ema_update()
    for amount, (emas, weights) in grouped.items():
        torch._foreach_lerp_(emas, weights, amount)


def _bad_average(average: object, shape: torch.Size) -> str | None:
    """What is wrong with weight_ema of a state_dict, or None."""
    condition, got, context = f"be floats of shape {list(shape)}", show(average), kind(average)
    if isinstance(average, Tensor) and average.is_floating_point() and average.shape == shape:
        if average.is_meta or bool(_whole(average).isfinite().all()):
            return None
        condition, got, context = "be finite", "NaN or infinity", show(average)
    advice = "Load what state_dict returned, or remove the key and ema_updates to start anew."
    return refusal("load_state_dict", "weight_ema", condition, got, context, advice)


def _bad_peak(lr: object) -> str | None:
    """What is wrong with ema_peak_lr of a state_dict, or None."""
    real = isinstance(lr, Tensor) and lr.is_floating_point() and lr.numel() == 1
    if real and (lr.is_meta or 0.0 <= float(lr) < math.inf):
        return None
    got = float(lr) if real else show(lr)
    advice = "Load what state_dict returned, or remove the key."
    condition = "be one finite float of at least 0"
    return refusal("load_state_dict", "ema_peak_lr", condition, got, kind(lr), advice)


def _bad_count(updates: object) -> str | None:
    """What is wrong with ema_updates of a state_dict, or None."""
    integer = isinstance(updates, Tensor) and not updates.is_floating_point()
    integer = integer and not updates.is_complex() and updates.numel() == 1
    if integer and (updates.is_meta or int(updates) >= 0):
        return None
    got = int(updates) if integer else show(updates)
    advice = "Load what state_dict returned, or remove the key and weight_ema to start anew."
    condition = "be one integer of at least 0"
    return refusal("load_state_dict", "ema_updates", condition, got, kind(updates), advice)


def _checked(layers: Iterable[EmaLinear]) -> list[EmaLinear]:
    what, argument, advice = "update_weight_ema", "layers", "Pass a list of mxtrain.MXLinear."
    if not isinstance(layers, Iterable) or isinstance(layers, (str, Tensor)):
        got = type(layers).__name__
        raise TypeError(refusal(what, argument, "be a list", got, show(layers), advice))
    layers = list(layers)
    for layer in layers:
        if not isinstance(layer, EmaLinear):
            got = type(layer).__name__
            raise TypeError(
                refusal(what, argument, "be made of MXLinear", got, show(layer), advice)
            )
        if layer._recipe.ema_beta is None:
            condition, advice = "have an average", "Give the layer a recipe with ema_beta first."
            context = f"recipe {layer._recipe.name!r}"
            raise ValueError(refusal(what, argument, condition, "none", context, advice))
    return layers


def _whole(weight: Tensor) -> Tensor:
    """The weight without its graph; gathered where FSDP2 keeps a shard between steps."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight
