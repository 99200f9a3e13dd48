"""The target-precision schedule: quantized training whose last steps run unquantized.

With T = total_steps and t_s = round(fraction * T), the steps 0 .. t_s - 1 run the recipes that the
layers had when the schedule was made, and the steps t_s .. T - 1 the target, in every MXLinear of
the model. Optimizer state, learning rate and data go on unbroken. Which it is follows from the step
alone, so a run that is resumed on either side of t_s computes what the unbroken one does.

Source: arXiv 2502.11458, its "target precision training schedule". The paper says "short period";
0.9 is the default here because its 30% saving follows from a last tenth, and because NVIDIA's NVFP4
report closes its gap so.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import nn

from .checks import check_int, is_int, is_number, kind, refusal, show
from .linear import MXLinear
from .recipe import Recipe, get_recipe

log = logging.getLogger("mxtrain")

# Parts of a qualified name that wrappers put in, and that a resumed run may have or not.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class TargetPrecision:
    """Switches the MXLinear of a model to a target recipe for the last steps of a run.

        mxtrain.convert(model, "fp4_mixed")
        schedule = mxtrain.TargetPrecision(model, total_steps=10_000)  # fraction=0.9, target="bf16"
        for x, y in batches:
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if schedule.step():  # the layers have changed
                graph = capture(model)  # only where you capture CUDA graphs by hand

    The recipes of its layers are the schedule's until the end: to change one of them, set it before
    you make the schedule. `step` refuses a layer that has got another meanwhile, which the next
    steps of a resumed run would not have.

    At the switch each layer takes the target as `layer.recipe = target` does: its packed weight is
    dropped, and with "bf16" it is bitwise an `nn.Linear`; the average of a Q-EMA recipe ends.
    `torch.compile` compiles the layers once more by itself, also in its CUDA-graph modes. A graph
    that was captured by hand holds the old kernels: `step` returns True, and says so in the log,
    where it must be captured again.

    To resume, make the model and the schedule as in the first run, then load the schedule's
    state_dict before the model's and the optimizer's.

    Args:
        model: has at least one MXLinear; wrapped or compiled is fine.
        total_steps: optimizer steps of the whole run, at least 1.
        fraction: of them that run as converted, 0 to 1; 1 never switches. The log has a warning
            where a smaller one leaves no step for the target (with 0.9, in a run of at most 5).
        target: a recipe, or its name.

    Raises:
        TypeError, ValueError: for other arguments, or a target that does not fit a layer. The model
            is then unchanged.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, fraction: float = 0.9,
        target: str | Recipe = "bf16",
    ) -> None:  # fmt: skip
        what = "TargetPrecision"
        if not isinstance(model, nn.Module):
            condition, advice = "be a torch.nn.Module", "Pass the converted model."
            got = type(model).__name__
            raise TypeError(refusal(what, "model", condition, got, show(model), advice))
        check_int(what, "total_steps", total_steps)
        if total_steps < 1:
            condition, advice = "be at least 1", "Pass the optimizer steps of the whole run."
            got, context = total_steps, kind(total_steps)
            raise ValueError(refusal(what, "total_steps", condition, got, context, advice))
        if not is_number(fraction) or not 0 <= fraction <= 1:
            condition, advice = "lie in [0, 1]", "Try 0.9; 1 never switches."
            got, context = show(fraction), kind(fraction)
            raise ValueError(refusal(what, "fraction", condition, got, context, advice))
        self._target = get_recipe(target)
        self._layers = _layers(model)
        self._check_target()
        self._sources = {name: layer.recipe for name, layer in self._layers.items()}
        self._total, self._fraction, self._step = int(total_steps), float(fraction), 0
        if fraction < 1 and self.switch_step == self._total:
            message = "TargetPrecision: no step of %d runs %s: round(%g * %d) is %d"
            rounded = fraction, total_steps, self.switch_step
            log.warning(message, total_steps, self._target.name, *rounded)
        self._apply(0)

    def _check_target(self) -> None:
        what, target = "TargetPrecision", self._target
        if not self._layers:
            condition, advice = "have an MXLinear", "Convert it first: mxtrain.convert."
            raise ValueError(refusal(what, "model", condition, "none", "no layers", advice))
        for name, layer in self._layers.items():
            misfit = target.misfit(layer.in_features, layer.out_features)
            if misfit is not None:
                condition, advice = f"fit layer {name!r}", "Choose another target."
                context = f"recipe {target.name!r}"
                raise ValueError(refusal(what, "target", condition, misfit, context, advice))

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self._total

    @property
    def switch_step(self) -> int:
        """The first step that runs the target; total_steps where none does."""
        return math.floor(self._fraction * self._total + 0.5)

    @property
    def current_step(self) -> int:
        """Steps done: the index of the step that comes next."""
        return self._step

    def is_target(self, step: int) -> bool:
        """Whether that step runs the target: a function of the step alone."""
        return self.switch_step <= min(step, self._total - 1)

    @torch.compiler.disable
    def step(self) -> bool:
        """One optimizer step is done. Returns whether the layers have changed for the next one.

        Raises RuntimeError past total_steps, where a layer has another recipe than the schedule
        gave it, and inside a CUDA graph capture, where it would happen once for all replays.
        Nothing has changed then.
        """
        what = "TargetPrecision.step"
        if self._step >= self._total:
            condition = f"be called at most total_steps = {self._total} times"
            advice = "Make the schedule with the steps of the whole run."
            context = f"switch at step {self.switch_step}"
            raise RuntimeError(refusal(what, "step", condition, "one more", context, advice))
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            condition, advice = "be outside of a CUDA graph", "Call it after each replay."
            context = "a replay does not repeat what Python does"
            message = refusal(what, "step", condition, "a stream that captures", context, advice)
            raise RuntimeError(message)
        for name, layer in self._layers.items():
            recipe = self._recipe(name, self._step)
            if layer.recipe != recipe:
                condition = f"have the recipe of the schedule, {recipe.name!r}"
                got, context = repr(layer.recipe.name), f"step {self._step} of {self._total}"
                advice = "Set recipes before you make the schedule."
                message = refusal(what, f"layer {name!r}", condition, got, context, advice)
                raise RuntimeError(message)
        self._step += 1
        return self._apply(self._step)

    def _recipe(self, name: str, step: int) -> Recipe:
        return self._target if self.is_target(step) else self._sources[name]

    def _apply(self, step: int) -> bool:
        """Give the layers what this step runs. Returns whether one of them has changed."""
        target = self.is_target(step)
        captured, changed = False, 0
        for name, layer in self._layers.items():
            recipe = self._recipe(name, step)
            if layer.recipe != recipe:
                captured |= layer.was_captured
                layer.recipe = recipe
                changed += 1
        if changed:
            what = f"to {self._target.name}" if target else "back to their own recipes"
            again = "torch.compile compiles them again"
            if captured:
                again += "; CUDA graphs that hold them must be captured again"
            level = logging.WARNING if captured else logging.INFO
            message = "TargetPrecision: step %d of %d, %d layers %s; %s"
            log.log(level, message, step, self._total, changed, what, again)
        return changed > 0

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """The step and the settings: dicts of strings, numbers and None."""
        return {"step": self._step, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {
            "total_steps": self._total,
            "fraction": self._fraction,
            "target": self._target.to_dict(),
            "recipes": {name: recipe.to_dict() for name, recipe in self._sources.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Go on from a state_dict: the layers get what its step runs. Returns whether any changed.

        Raises ValueError, and changes nothing, where the settings (total_steps, fraction, target,
        the layers and their recipes before the switch) are not those of this schedule; TypeError
        for something else than a state_dict.
        """
        what, advice = "TargetPrecision.load_state_dict", "Make the schedule as in the first run."
        mine = self._settings()
        if not isinstance(state, dict) or set(state) != {"step", *mine}:
            condition = "be a state_dict of TargetPrecision"
            message = refusal(what, "state", condition, show(state), kind(state), advice)
            raise TypeError(message)
        for key, value in mine.items():
            if not _same(value, state[key]):
                condition = f"have the {key} of this schedule, {_short(value, state[key])}"
                got = _short(state[key], value)
                raise ValueError(refusal(what, "state", condition, got, key, advice))
        step = state["step"]
        if not is_int(step) or not 0 <= step <= self._total:
            condition, context = f"have a step in [0, {self._total}]", kind(step)
            raise ValueError(refusal(what, "state", condition, show(step), context, advice))
        self._step = int(step)
        return self._apply(self._step)


def _layers(model: nn.Module) -> dict[str, MXLinear]:
    """The MXLinear by name, without what wrappers add to the names."""
    model = model.module if isinstance(model, _PARALLEL) else model
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, MXLinear):
            for wrapper in _WRAPPERS:
                name = f"{name}.".replace(wrapper, "")[:-1]
            layers[name] = module
    return layers


def _same(a: object, b: object) -> bool:
    """Whether two settings are equal: dicts, strings, numbers and None; nothing else is."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    plain = (x is None or isinstance(x, (str, bool)) or is_number(x) for x in (a, b))
    return all(plain) and bool(a == b)


def _short(value: object, other: object) -> str:
    """What differs of two settings, in one short line."""
    if isinstance(value, dict):
        other = other if isinstance(other, dict) else {}
        different = {k: v for k, v in value.items() if k not in other or not _same(v, other[k])}
        key, found = next(iter(different.items()), ("fewer entries", None))
        return f"{key} {_short(found, other.get(key))}" if found is not None else str(key)
    return show(value)
