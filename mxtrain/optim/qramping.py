"""Q-Ramping: AdamW in which weights that oscillate between two codes are updated less often.

- Detection (`calibrate`): over some ordinary AdamW steps, per element of a quantized weight,
  R = sum |Q(w) - Q(w')| / (sum |w - w'| + 1e-8), and from it the period
  n = min(k2 floor(R / k1) + 1, max_period). Then everything but the periods is put back.
- Step: an element of period n is updated in every n-th step, by the mean of the gradients since its
  last update, with as many times the learning rate; weight decay acts in every step.

Source: arXiv 2502.20853, its section on Q-Ramping.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number, kind, refusal, show
from ..ema import EmaLinear, averaging_layers
from ..linear import MXLinear
from .adamw import AdamW, Batch, Key, dense
from .arguments import capturing, check_saved, check_states
from .oscillation import Changes, local, quantized_layers

_ops = torch.ops.mxtrain

LARGEST_PERIOD = 2**14  # a count stays below twice the period, within int16

_COUNTERS = (torch.uint8, torch.int16)
_RAMP = {"grad_sum": (torch.float32,), "count": _COUNTERS, "period": _COUNTERS}
_SAVED_RAMP = {"grad_sum": None, "count": (0, 2**15 - 1), "period": (1, LARGEST_PERIOD)}


class QRamping(AdamW):
    """AdamW with adaptive periods for the oscillating elements of weights quantized to mxfp4.

        optimizer = mxtrain.optim.QRamping(model.parameters(), model, max_period=len(loader))
        for epoch in range(epochs):
            optimizer.calibrate(forward_backward)  # a function of no arguments
            for batch in loader:
                ...

    Until the first calibration, for the elements of period 1, and for parameters that no MXLinear
    of the model quantizes to mxfp4 in its forward pass, it is mxtrain.optim.AdamW. The state of a
    quantized weight has three more tensors: `grad_sum` (float32), `count` and `period` (uint8 where
    max_period is at most 128; int16 where it is more, or was).

    Which weights these are is read from the recipes of the layers in every step. A weight that its
    layers quantize no more, as after the switch of TargetPrecision, has a period of 1: what it has
    summed acts in the next step, and from then on it is AdamW.

    A gradient tensor that is not finite is not added; its elements count the step. Do not clip
    gradients: their mean over a period is what is used.

    Args:
        params, lr, betas, eps, weight_decay, stochastic_rounding: as in mxtrain.optim.AdamW.
        model: the converted model; its MXLinear layers say how the weights are quantized.
        max_period: the longest period, 1 to 16384; the paper takes the steps of an epoch.
        k1, k2: an element gets k2 more steps for every k1 of its oscillation ratio.

    Raises:
        ValueError: where params holds no weight to ramp, or one that is averaged too (Q-EMA: the
            paper does not combine the two; in `step` too, where a layer got such a recipe later),
            and for arguments out of range.
        TypeError: for arguments of another kind.
    """

    def __init__(
        self, params: Any, model: nn.Module, lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
        *, max_period: int, k1: float = 16.0, k2: int = 5, stochastic_rounding: bool = True,
    ) -> None:  # fmt: skip
        what = "QRamping"
        self._quantized = quantized_layers(what, model)
        self._model = model
        self._calibrating = self._calling = False
        self._ended: set[Tensor] = set()  # no longer quantized, and nothing summed is left
        super().__init__(
            params, lr, betas, eps, weight_decay, stochastic_rounding=stochastic_rounding,
            _more={"max_period": max_period, "k1": k1, "k2": k2},
        )  # fmt: skip
        self._check_weights()

    def _check_group(self, what: str, group: dict[str, Any], read: bool = True) -> None:
        limits = (
            ("max_period", LARGEST_PERIOD, "Pass the steps of an epoch, or fewer."),
            ("k2", 2**31, "The paper takes 5."),
        )
        for name, high, advice in limits:
            value = group[name]
            check_int(what, name, value)
            if not 1 <= value <= high:
                condition = f"lie in [1, {high}]"
                raise ValueError(refusal(what, name, condition, value, kind(value), advice))
        k1 = group["k1"]
        check_number(what, "k1", k1)
        if not 0.0 < k1 < float("inf"):
            condition, advice = "be positive and finite", "The paper takes 16."
            raise ValueError(refusal(what, "k1", condition, k1, kind(k1), advice))
        super()._check_group(what, group, read)

    def _check_weights(self) -> None:
        what = "QRamping"
        held = [p for group in self.param_groups for p in group["params"]]
        self._refuse_average(what, "params", held)
        if not any(p in self._quantized for p in held):
            condition, got = "hold a weight that an MXLinear quantizes to mxfp4", "none"
            context = f"the model has {len(self._quantized)} such weights"
            advice = "Convert the model first, and pass its parameters."
            raise ValueError(refusal(what, "params", condition, got, context, advice))

    def _refuse_average(self, what: str, argument: str, weights: list[Tensor]) -> None:
        """Refuse weights that a layer of the model averages."""
        averaged = {m.weight: name for name, m in self._model.named_modules()
                    if isinstance(m, MXLinear) and m.recipe.ema_beta is not None}  # fmt: skip
        for p in weights:
            if p in averaged:
                condition, got = "not be averaged too", f"the weight of {averaged[p]!r}"
                context, advice = "its recipe has ema_beta", "Use AdamW, or another recipe."
                raise ValueError(refusal(what, argument, condition, got, context, advice))

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_quantized", "_model", "_calibrating", "_calling", "tracker")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in mine}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._ended = set()

    # ---- state ----

    def _state_dtype(
        self, group: dict[str, Any], name: str, saved: dict[str, Any]
    ) -> torch.dtype | None:  # fmt: skip
        if name in ("count", "period"):
            return _counter_dtype(group, saved)
        return torch.float32 if name == "grad_sum" else super()._state_dtype(group, name, saved)

    def _start_state(self, group: dict[str, Any], p: Tensor) -> None:
        super()._start_state(group, p)
        state = self.state[p]
        if p in self._quantized and "period" not in state and not self._calibrating:
            dtype = _counter_dtype(group, {})
            state["period"] = torch.ones_like(p, dtype=dtype, requires_grad=False)
            state["count"] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            state["grad_sum"] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        super()._check_param(group, p)
        if self._ramps(p) and capturing(local(p)) and "period" not in self.state.get(p, {}):
            self._refuse_capture("the state", "exist")

    def _check_states(self, what: str, p: Tensor, state: dict[str, Any]) -> None:
        super()._check_states(what, p, state)
        if self._ramps(p) and any(name in state for name in _RAMP):
            period = state.get("period")  # checked before the count, which has its dtype
            count = (period.dtype,) if isinstance(period, Tensor) else _COUNTERS
            check_states(what, p, state, {**_RAMP, "count": count})

    def _check_saved(self, what: str, p: Tensor, state: dict[str, Any]) -> None:
        super()._check_saved(what, p, state)
        if any(name in state for name in _RAMP):
            check_saved(what, p, state, _SAVED_RAMP)

    # ---- the step ----

    def _ramps(self, p: Tensor) -> bool:
        """Whether periods rule p's step: it is quantized, or what it has summed is still to act."""
        if self._calibrating:
            return False
        return p in self._quantized or (
            p not in self._ended and "period" in self.state.get(p, {})
        )  # fmt: skip

    def _plan(self, averaging: dict[Tensor, list[EmaLinear]]) -> dict[Key, Batch]:
        what = "QRamping.step"
        if self._calling:
            condition, got = "be called outside of forward_backward", "a call in it"
            context, advice = "calibrate makes the steps", "Leave gradients, and do not step."
            raise RuntimeError(refusal(what, "step", condition, got, context, advice))
        self._quantized = quantized_layers(what, self._model)
        self._ended.difference_update(self._quantized)
        if both := [p for p in averaging if p in self._quantized]:
            self._refuse_average(what, "weights", both)
        return super()._plan(averaging)

    def _averaged_in_pass(
        self, p: Tensor, averaging: dict[Tensor, list[EmaLinear]]
    ) -> EmaLinear | None:  # fmt: skip
        return None if self._ramps(p) else super()._averaged_in_pass(p, averaging)

    def _kind(self, group: dict[str, Any], p: Tensor) -> Key:
        if self._ramps(p):
            if self.tracker is not None and p in self.tracker:
                what, condition = "QRamping.step", "not be tracked"
                got, advice = f"a weight of shape {list(p.shape)}", "Use calibrate."
                context = "the ramped step sums no changes"
                raise RuntimeError(refusal(what, "parameters", condition, got, context, advice))
            return ("ramped", _counter_dtype(group, self.state.get(p, {}), started=True))
        return super()._kind(group, p)

    def _run(self, key: Key, batch: Batch) -> None:
        if key[4] != "ramped":
            return super()._run(key, batch)
        ended = [p for p in batch.params if p not in self._quantized]
        for p in ended:
            local(self.state[p]["period"]).fill_(1)
        names = ("grad_sum", "count", "period")
        extra = [[dense(self.state[p][name]) for p in batch.params] for name in names]
        _ops.ramped_adamw_(*self._arguments(batch), *extra)
        torch.autograd.graph.increment_version(batch.params)
        # In a capture nothing has run yet: the replays go on with periods of 1, which is AdamW.
        self._ended.update(p for p in ended if not capturing(local(p)))

    # ---- detection ----

    def calibrate(
        self, forward_backward: Callable[[], Any], *, scaler: Any = None, transitions: int = 30
    ) -> dict[str, float]:
        """Find the period of every element of the quantized weights.

        Makes transitions + 1 steps of ordinary AdamW, then puts back, bitwise and in place, the
        parameters and buffers of the model, what its layers count, all gradients, the state of the
        optimizer and of the scaler, and torch's generators; only the periods are new. What
        forward_backward itself advances, such as an iterator over data, stays advanced. Needs
        memory for a copy of the model and of this optimizer's state, and for two float32 sums an
        element, meanwhile.

        Where no weight is quantized any more, as after the switch of TargetPrecision, there is
        nothing to find: it makes no steps and returns {}.

        Args:
            forward_backward: leaves fresh gradients in the parameters (scaled by the scaler where
                there is one); it does not step. Gradients are None when it is called.
            scaler: the `torch.amp.GradScaler` of the training loop, if it has one.
            transitions: steps over which changes are summed, T0 of the paper.

        Returns:
            The share of elements (of this rank's shard) with a period above 1, by layer name.

        Raises:
            RuntimeError: in a CUDA graph capture, within a calibration, or where forward_backward
                leaves no gradient in any quantized weight, or steps this optimizer.
            TypeError, ValueError: for other arguments, and options of a group out of range.
                Whatever forward_backward raises is passed on. Everything is put back then, the
                periods too.
        """
        what = "QRamping.calibrate"
        if not callable(forward_backward):
            condition, advice = "be callable", "Pass a function of no arguments."
            got = type(forward_backward).__name__
            raise TypeError(
                refusal(what, "forward_backward", condition, got, show(forward_backward), advice)
            )
        check_int(what, "transitions", transitions)
        if transitions < 1:
            condition, advice = "be at least 1", "The paper takes 30."
            context = "steps that are compared with the one before"
            raise ValueError(refusal(what, "transitions", condition, transitions, context, advice))
        self._refuse_nested(what)
        for group in self.param_groups:
            self._check_group(what, group)
        self._quantized = quantized_layers(what, self._model)
        held = [p for group in self.param_groups for p in group["params"]]
        weights = [p for p in held if p in self._quantized]
        if not weights:
            return {}
        if scaler is not None and not scaler.is_enabled():
            scaler = None  # one that is off has no state to put back
        with self._put_back(scaler):
            changes = self.track_changes(self._model)
            for i in range(transitions + 1):
                self.zero_grad(set_to_none=True)
                self._fresh_gradients(what, forward_backward, weights)
                with changes if i > 0 else contextlib.nullcontext():
                    self._scaled_step(scaler)
        return self._set_periods(changes)

    def _fresh_gradients(
        self, what: str, forward_backward: Callable[[], Any], weights: list[Tensor]
    ) -> None:  # fmt: skip
        self._calling = True
        try:
            with torch.enable_grad():
                forward_backward()
        finally:
            self._calling = False
        if all(p.grad is None for p in weights):
            condition, got = "leave gradients in quantized weights", "none"
            context, advice = f"{len(weights)} of them", "Call backward in it, and not zero_grad."
            raise RuntimeError(refusal(what, "forward_backward", condition, got, context, advice))

    def _refuse_nested(self, what: str) -> None:
        condition, advice = "be called outside", "Call it between two training steps."
        if self._calibrating or self.tracker is not None:
            context = "the steps in it are its own"
            got = "a call within another" if self._calibrating else "a call within track_changes"
            raise RuntimeError(refusal(what, "calibration", condition, got, context, advice))
        if any(capturing(local(p)) for group in self.param_groups for p in group["params"]):
            got, context = "a call in a CUDA graph capture", "it reads its results back"
            raise RuntimeError(refusal(what, "calibration", condition, got, context, advice))

    def _scaled_step(self, scaler: Any) -> None:
        if scaler is None:
            self.step()
        else:
            scaler.step(self)
            scaler.update()

    @contextlib.contextmanager
    def _put_back(self, scaler: Any) -> Iterator[None]:
        """Whatever the block does to model, gradients, optimizer, scaler and generators is undone.

        The block works on a copy of the state, so the tensors of the state stay the same objects.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        params = list(dict.fromkeys([*params, *self._model.parameters()]))
        averaging = (m for layers in averaging_layers(self).values() for m in layers)
        modules = list(dict.fromkeys([*self._model.modules(), *averaging]))
        buffers = [(m, name, b) for m in modules for name, b in m._buffers.items()]
        put_back = [m.remember() for m in modules if isinstance(m, MXLinear)]
        tensors = [t for t in (*params, *(b for _, _, b in buffers)) if t is not None]
        saved = [(t, t.detach().clone()) for t in dict.fromkeys(tensors)]
        grads = [(p, p.grad) for p in params]
        scaler_state = None if scaler is None else copy.deepcopy(scaler.state_dict())
        state = self.state
        devices = sorted({local(p).device.index for p in params if local(p).is_cuda})
        try:
            with torch.random.fork_rng(devices):
                for p in params:
                    p.grad = None
                self.state = defaultdict(dict)
                self.state.update((p, _copied(s)) for p, s in state.items())
                self._calibrating = True
                yield
        finally:
            self._calibrating = False
            self.state = state
            for module, name, buffer in buffers:
                module._buffers[name] = buffer
            with torch.no_grad():
                for t, value in saved:
                    t.copy_(value)
            for layer in put_back:
                layer()
            for p, grad in grads:
                p.grad = grad
            if scaler is not None:
                scaler.load_state_dict(scaler_state)
                scaler._per_optimizer_states.clear()

    @torch.no_grad()
    def _set_periods(self, changes: Changes) -> dict[str, float]:
        """All periods are found before the first is written."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        found = []
        for name, weight in changes.items():
            group = groups[weight]
            steps = (changes.ratio(weight) / group["k1"]).floor() * group["k2"] + 1
            period = steps.clamp(max=group["max_period"]).nan_to_num(1.0)
            found.append((name, group, weight, period.to(torch.int16)))
        shares = {}
        for name, group, weight, period in found:
            self._start_state(group, weight)
            state = self.state[weight]
            dtype = _counter_dtype(group, state)
            for counter in ("count", "period"):  # where max_period has grown
                state[counter] = state[counter].to(dtype)
            # A count that has missed its multiples for long fires before it leaves its type.
            late = local(state["count"]) > torch.iinfo(dtype).max - group["max_period"]
            local(state["period"]).copy_(period.masked_fill(late, 1))
            shares[name] = (period > 1).float().mean()
        return {name: float(share) for name, share in shares.items()}


def _counter_dtype(
    group: dict[str, Any], state: dict[str, Any], started: bool = False
) -> torch.dtype:  # fmt: skip
    """Of count and period: what they have where started, else wide enough for them and the group.

    count < 2 * max_period: it may pass a period that calibration has shortened.
    """
    have = [state[name].dtype for name in ("count", "period") if name in state]
    if started and have:
        return have[0]
    narrow = group["max_period"] <= 128 and all(dtype == torch.uint8 for dtype in have)
    return torch.uint8 if narrow else torch.int16


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A copy for calibration, which leaves the accumulated gradients alone."""
    kept = ("grad_sum", "count", "period")
    return {
        name: value.clone() if isinstance(value, Tensor) and name not in kept else value
        for name, value in state.items()
    }
