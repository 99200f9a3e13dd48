"""AdamW in one pass over memory, with what MXLinear needs in that pass.

A step of a parameter group is one op for each dtype and device: it reads and writes the weights and
both moments once, and in the same pass updates the averages of Q-EMA (which the hook of
mxtrain.ema then leaves alone), rounds bfloat16 weights stochastically and sums the changes that
`track_changes` asks for. docs/optimizers.md has the arithmetic, bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from ..checks import is_number, refusal
from ..ema import EmaLinear, average_weights, averaging_layers, see_learning_rates
from ..operand import draw_rng
from .arguments import capturing, check_options, check_saved, check_states, saved_states
from .oscillation import Changes, local

_ops = torch.ops.mxtrain

Key = tuple[Any, ...]

_FLOAT = (torch.float32,)
_MOMENTS = {"exp_avg": _FLOAT, "exp_avg_sq": _FLOAT}


@dataclass
class Batch:
    """The parameters of one op, and what belongs to them."""

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list)
    layers: list[EmaLinear] = field(default_factory=list)  # whose averages are updated here


def dense(t: Tensor) -> Tensor:
    """This rank's elements as a contiguous view, in the order of memory."""
    t = local(t)
    if t.is_contiguous():
        return t
    return t.as_strided((t.numel(),), (1,), t.storage_offset())


def dense_grad(p: Tensor) -> Tensor:
    """The gradient as `dense`, laid out as p."""
    grad, like = local(p.grad), local(p)
    if grad.stride() != like.stride() or not grad.is_contiguous():
        grad = torch.empty_like(like).copy_(grad)
    return dense(grad)


class AdamW(Optimizer):
    """AdamW for any model, with Q-EMA and BF16 weights in the same pass.

        optimizer = mxtrain.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1)

    The arguments and the state are those of `torch.optim.AdamW`, whose checkpoints load: `step`
    (float32, on the device), `exp_avg` and `exp_avg_sq` (float32 also for bfloat16 parameters).
    There is no amsgrad and no maximize: a group or a checkpoint that turns them on is refused.
    For float32 parameters the results are bitwise those of `torch.optim.AdamW` on CUDA (its
    foreach implementation, the default there), and the CPU computes the same bits.

    A step can be captured in a CUDA graph once one step was made outside (with `lr` a float64
    tensor on the device where it shall change). Sharded parameters (FSDP2) are updated shard by
    shard; their averages are updated after the step, as with any other optimizer.

    Args:
        params: as for every torch optimizer; float32 or bfloat16, dense.
        lr: a float, or a tensor of one element.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        stochastic_rounding: bfloat16 parameters are rounded stochastically, with one draw a step
            from torch's generator (False: to nearest, which loses small updates).

    Raises:
        ValueError, TypeError: for arguments out of range or of another kind; in `step`, also for
            parameters, gradients or states that cannot be updated, and in `load_state_dict` for
            what is no state of these parameters. Nothing is changed then.

    Source: arXiv 1711.05101, algorithm 2.
    """

    updates_weight_ema = True  # read by the hook of mxtrain.ema

    def __init__(
        self, params: Any, lr: float | Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8, weight_decay: float = 1e-2, *, stochastic_rounding: bool = True,
        _more: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.tracker: Changes | None = None
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "stochastic_rounding": stochastic_rounding, **(_more or {}),  # a subclass's options
        }  # fmt: skip
        self._check_group(type(self).__name__, defaults)
        super().__init__(params, {**defaults, "betas": tuple(betas)})

    def _check_group(self, what: str, group: dict[str, Any], read: bool = True) -> None:
        """Whether the options of a group are in range; a subclass has more of them."""
        check_options(what, group, read)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; options out of range are refused."""
        if isinstance(param_group, dict):  # else torch refuses it
            what = f"{type(self).__name__}.add_param_group"
            self._check_group(what, {**self.defaults, **param_group})
        super().add_param_group(param_group)

    # ---- state ----

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("tracker", None)
        for group in self.param_groups:  # a checkpoint of torch.optim.AdamW has fewer options
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own
                    group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As every optimizer's; of torch.optim.AdamW too. torch casts states to the parameters'
        dtype; here they keep their own, and are copies of what is loaded. All is checked first."""
        what, checked = f"{type(self).__name__}.load_state_dict", []

        def check(_: Optimizer, loaded: dict[str, Any]) -> None:
            for saved, p, state in saved_states(what, loaded, self.param_groups):
                self._check_saved(what, p, state)
                checked.append(({**self.defaults, **saved}, p, state))
            for saved in loaded["param_groups"]:
                self._check_group(what, {**self.defaults, **saved})

        def take(_: Optimizer) -> None:
            for group, p, state in checked:
                for name in state:
                    self.state[p][name] = self._loaded(group, p, name, state)

        if not isinstance(state_dict, dict):
            saved_states(what, state_dict, self.param_groups)  # which refuses it
        hooks = [  # after the hooks that may change what is taken, before those that see it
            self.register_load_state_dict_pre_hook(check),
            self.register_load_state_dict_post_hook(take, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _check_saved(self, what: str, p: Tensor, state: dict[str, Any]) -> None:
        check_saved(what, p, state, {"exp_avg": None, "exp_avg_sq": None})

    def _loaded(self, group: dict[str, Any], p: Tensor, name: str, saved: dict[str, Any]) -> Any:
        """A copy of a saved state for p: in its own dtype, on p's device, laid out as p."""
        value = saved[name]
        if name == "step" and is_number(value):  # of torch before 1.12
            value = torch.tensor(float(value))
        if not isinstance(value, Tensor):
            return value
        dtype = self._state_dtype(group, name, saved)
        value = value.to(local(p).device, dtype or value.dtype, copy=True)
        like = local(p.detach())
        if local(value) is value and value.shape == like.shape and value.stride() != like.stride():
            value = torch.empty_like(like, dtype=value.dtype).copy_(value)
        return value

    def _state_dtype(
        self, group: dict[str, Any], name: str, saved: dict[str, Any]
    ) -> torch.dtype | None:  # fmt: skip
        return torch.float32 if name in ("step", "exp_avg", "exp_avg_sq") else None

    def _start_state(self, group: dict[str, Any], p: Tensor) -> None:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), device=local(p).device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(p, dtype=torch.float32, requires_grad=False)

    # ---- the step ----

    @_disable_dynamo  # one op a group already; counts and hooks change with every step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averaging = averaging_layers(self)
        batches = self._plan(averaging)  # nothing changes before all was checked
        for batch in batches.values():
            for p in batch.params:
                self._start_state(batch.group, p)
        see_learning_rates(self, averaging)
        for key, batch in batches.items():
            self._run(key, batch)
        done = {id(layer) for batch in batches.values() for layer in batch.layers}
        average_weights(m for layers in averaging.values() for m in layers if id(m) not in done)
        return loss

    def _plan(self, averaging: dict[Tensor, list[EmaLinear]]) -> dict[Key, Batch]:
        batches: dict[Key, Batch] = {}
        what = f"{type(self).__name__}.step"
        for index, group in enumerate(self.param_groups):
            self._check_group(what, group, read=False)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self._check_param(group, p)
                layer = self._averaged_in_pass(p, averaging)
                if layer is not None and layer._ema_updates == 0 and capturing(p):
                    self._refuse_capture("the average of the weights", "start")
                key = (index, p.device, p.dtype, layer is not None, *self._kind(group, p))
                batch = batches.setdefault(key, Batch(group))
                batch.params.append(p)
                if layer is not None:
                    batch.layers.append(layer)
        return batches

    def _averaged_in_pass(
        self, p: Tensor, averaging: dict[Tensor, list[EmaLinear]]
    ) -> EmaLinear | None:  # fmt: skip
        """The layer whose average of p the op updates; others are updated after the step."""
        return next((m for m in averaging.get(p, ()) if _fusable(m)), None)

    def _kind(self, group: dict[str, Any], p: Tensor) -> Key:
        """What else parameters of one op have in common."""
        return ("plain",) if self.tracker is None or p not in self.tracker else (
            "tracked", *self.tracker.codes(p)
        )  # fmt: skip

    def _check_param(self, group: dict[str, Any], p: Tensor) -> None:
        what = f"{type(self).__name__}.step"
        shape = f"shape {list(p.shape)}"
        if p.dtype not in (torch.float32, torch.bfloat16):
            condition, advice = "be float32 or bfloat16", "Convert the model."
            raise TypeError(refusal(what, "parameters", condition, p.dtype, shape, advice))
        grad = p.grad
        if grad.layout is not torch.strided or grad.dtype != p.dtype:
            condition = "be dense, of the dtype of their parameters"
            got, advice = f"{grad.layout} {grad.dtype}", "Set sparse=False, or cast the gradient."
            raise TypeError(refusal(what, "gradients", condition, got, shape, advice))
        mine = local(p)
        if not mine.is_contiguous() and torch.empty_like(mine).stride() != mine.stride():
            condition, advice = "be dense", "Clone it before the optimizer takes it."
            got = f"strides {mine.stride()}"
            raise ValueError(refusal(what, "parameters", condition, got, shape, advice))
        if self.tracker is not None and p in self.tracker and not mine.is_contiguous():
            condition, advice = "be contiguous to be tracked", "Make the weight contiguous."
            got = f"strides {mine.stride()}"
            raise ValueError(refusal(what, "parameters", condition, got, shape, advice))
        self._check_states(what, p, self.state.get(p, {}))
        if capturing(mine):
            if "step" not in self.state.get(p, {}):
                self._refuse_capture("the state", "exist")
            if isinstance(group["lr"], Tensor) and not group["lr"].is_cuda:
                self._refuse_capture("a tensor lr", "be on the device")

    def _check_states(self, what: str, p: Tensor, state: dict[str, Any]) -> None:
        check_states(what, p, state, _MOMENTS)

    def _refuse_capture(self, argument: str, condition: str) -> None:
        what, advice = f"{type(self).__name__}.step", "Make a step outside the capture first."
        condition = f"{condition} before a CUDA graph is captured"
        context = "the replays would repeat its start"
        raise RuntimeError(refusal(what, argument, condition, "a capture", context, advice))

    def _run(self, key: Key, batch: Batch) -> None:
        emas = [dense(layer.weight_ema) for layer in batch.layers]
        weights = [layer.ema_step for layer in batch.layers]
        tracked = key[4] == "tracked"
        sums = [self.tracker[p] for p in batch.params] if tracked else []
        codes = key[5:] if tracked else ()
        _ops.adamw_(
            *self._arguments(batch), emas, weights,
            [moved for moved, _ in sums], [flipped for _, flipped in sums], *codes,
        )  # fmt: skip
        torch.autograd.graph.increment_version([*batch.params, *emas])
        for layer in batch.layers:
            layer.count_ema_update()

    def _arguments(self, batch: Batch) -> tuple[Any, ...]:
        """What both ops take, from params to rng."""
        group, params = batch.group, batch.params
        states = [self.state[p] for p in params]
        device, lr, lr_tensor = local(params[0]).device, group["lr"], None
        if isinstance(lr, Tensor) and lr.device == device:
            lr, lr_tensor = 0.0, lr.to(torch.float64)
        rng = None
        if params[0].dtype == torch.bfloat16 and group["stochastic_rounding"]:
            rng = draw_rng(len(params), device)
        return (
            [dense(p) for p in params], [dense_grad(p) for p in params],
            [dense(s["exp_avg"]) for s in states], [dense(s["exp_avg_sq"]) for s in states],
            [local(s["step"]) for s in states],
            float(lr), *map(float, group["betas"]), float(group["eps"]),
            float(group["weight_decay"]), lr_tensor, rng,
        )  # fmt: skip

    def track_changes(self, model: nn.Module) -> Changes:
        """Sum how far weights and their quantized values move, in the steps of a `with` block.

        with optimizer.track_changes(model) as changes:
            ...  # some steps
        for name, weight in changes.items():
            print(name, (changes.ratio(weight) > 16).float().mean())
        """
        return Changes(self, model)


def _fusable(layer: EmaLinear) -> bool:
    weight, ema = layer.weight, layer.weight_ema
    return (
        local(weight) is weight
        and ema.device == weight.device
        and ema.dtype == torch.float32
        and ema.stride() == weight.stride()
    )
