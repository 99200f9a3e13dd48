"""What the optimizers refuse: options of a group, states of a parameter, state_dicts.

Nothing here changes anything, so a step or a load that is refused leaves all as it was. Values on a
GPU are not read in a step, which would wait for the device: there a tensor lr and the states are
checked for what they are, not for what they hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, is_finite, is_number, kind, refusal, show
from .oscillation import local

Group = dict[str, Any]

# Options of torch.optim.AdamW that would change what a step computes.
UNKNOWN = ("amsgrad", "maximize")


def capturing(t: Tensor) -> bool:
    return t.is_cuda and torch.cuda.is_current_stream_capturing()


# ---- options ----


def check_options(what: str, group: Mapping[str, Any], read: bool = True) -> None:
    """The options of AdamW. With read, a tensor lr on a GPU is read, but in a capture."""
    _check_lr(what, group["lr"], read)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        condition, advice = "be two floats", "Try (0.9, 0.999)."
        raise ValueError(refusal(what, "betas", condition, show(betas), kind(betas), advice))
    for i, beta in enumerate(betas):
        check_range(what, f"betas[{i}]", beta, below=1.0)
    check_range(what, "eps", group["eps"])
    check_range(what, "weight_decay", group["weight_decay"])
    check_bool(what, "stochastic_rounding", group["stochastic_rounding"])
    for name in UNKNOWN:
        if group.get(name):  # torch.optim.AdamW saves it also where it is off
            condition, got = "be off", show(group[name])
            advice = "Turn it off, or use torch.optim.AdamW."
            raise ValueError(refusal(what, name, condition, got, "not implemented here", advice))


def _check_lr(what: str, lr: object, read: bool) -> None:
    if not isinstance(lr, Tensor):
        check_range(what, "lr", lr)
        return
    number = lr.numel() == 1 and not lr.is_complex() and lr.dtype != torch.bool
    if not number or lr.is_meta:
        condition, advice = "be a float or a tensor of one real number", "Pass a float."
        context = f"on {lr.device}"
        raise ValueError(refusal(what, "lr", condition, show(lr), context, advice))
    if lr.device.type == "cpu" or (read and not capturing(lr)):
        check_range(what, "lr", lr.item())


def check_range(what: str, argument: str, value: object, below: float = float("inf")) -> None:
    if not is_number(value) or not is_finite(value) or not 0.0 <= value < below:
        condition = f"lie in [0, {below:g})"
        advice = "Pass a number in this range."
        raise ValueError(refusal(what, argument, condition, show(value), kind(value), advice))


# ---- states ----

_RESTART = "Load what state_dict returned, or remove the parameter's state to start anew."


def check_states(what: str, p: Tensor, state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Whether a step can use what there is for p: nothing, or "step" and all of `like`.

    `like` has the dtypes that a tensor laid out as p may have, by its name.
    """
    if "step" not in state and not any(name in state for name in like):
        return
    mine = local(p)
    step = state.get("step")
    if not isinstance(step, Tensor) or step.dtype != torch.float32 or step.numel() != 1:
        _refuse_state(what, p, "step", "be one float32", state)
    if step.device != mine.device:
        _refuse_state(what, p, "step", f"be on {mine.device}", state)
    shape, stride, device = mine.shape, mine.stride(), mine.device
    for name, dtypes in like.items():
        t = state.get(name)
        if isinstance(t, Tensor):
            t = local(t)
            if (
                t.dtype in dtypes
                and t.shape == shape
                and t.device == device
                and (t.stride() == stride or (t.is_contiguous() and mine.is_contiguous()))
            ):
                continue
        condition = f"be {' or '.join(_name(d) for d in dtypes)}, laid out as its parameter"
        _refuse_state(what, p, name, condition, state)


def _refuse_state(what: str, p: Tensor, name: str, condition: str, state: Mapping) -> None:
    got = show(state[name]) if name in state else "none"
    if isinstance(state.get(name), Tensor):
        got += f" with strides {list(local(state[name]).stride())} on {state[name].device}"
    context = f"a parameter of shape {list(p.shape)} on {p.device}"
    raise ValueError(refusal(what, name, condition, got, context, _RESTART))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- state_dicts ----


def saved_states(
    what: str, state_dict: object, groups: list[Group]
) -> list[tuple[Group, Tensor, dict[str, Any]]]:
    """(saved group, parameter, its saved state) of every parameter that groups hold, in order.

    Raises TypeError or ValueError for something else than a state_dict of such groups.
    """
    advice = "Load what state_dict returned."
    ok = isinstance(state_dict, dict) and isinstance(state_dict.get("state"), dict)
    saved = state_dict.get("param_groups") if ok else None
    ok = isinstance(saved, (list, tuple)) and all(
        isinstance(g, dict) and isinstance(g.get("params"), (list, tuple)) for g in saved
    )
    if not ok:
        condition, got = "be a state_dict of an optimizer", show(state_dict)
        raise TypeError(refusal(what, "state_dict", condition, got, kind(state_dict), advice))
    mine, theirs = ([len(g["params"]) for g in gs] for gs in (groups, saved))
    if mine != theirs:
        condition = f"have groups of {_counts(mine)} parameters"
        context, advice = "those of the optimizer", "Make the optimizer as in the first run."
        message = refusal(what, "state_dict", condition, _counts(theirs), context, advice)
        raise ValueError(message)
    found = []
    for group, old in zip(groups, saved, strict=True):
        for p, key in zip(group["params"], old["params"], strict=True):
            state = state_dict["state"].get(key, {})
            if not isinstance(state, dict):
                condition, got = "have a dict of states for each parameter", show(state)
                raise TypeError(refusal(what, "state_dict", condition, got, kind(state), advice))
            found.append((old, p, state))
    return found


def _counts(lengths: list[int]) -> str:
    text = ", ".join(map(str, lengths[:8]))
    return f"[{text}, ...]" if len(lengths) > 8 else f"[{text}]"


def check_saved(what: str, p: Tensor, state: Mapping[str, Any], like: Mapping[str, Any]) -> None:
    """Whether states of a state_dict can be made those of p, of whatever dtype and device.

    `like` has, by the name of a tensor of p's shape, the (lowest, highest) of integers, or None for
    floats.
    """
    if not state:
        return
    if not _counts_steps(state.get("step")):
        _refuse_saved(what, p, "step", "be one finite number of at least 0", state)
    for name, span in like.items():
        t = state.get(name)
        if not isinstance(t, Tensor) or local(t).shape != local(p).shape:
            _refuse_saved(what, p, name, "be a tensor of the shape of its parameter", state)
        integer = not t.is_floating_point() and not t.is_complex() and t.dtype != torch.bool
        if integer != (span is not None) or t.is_complex():
            condition = "have floats" if span is None else "have integers"
            _refuse_saved(what, p, name, condition, state)
        if span is not None and not t.is_meta and local(t).numel():
            low, high = (int(x) for x in local(t).aminmax())
            if low < span[0] or high > span[1]:
                condition = f"lie in [{span[0]}, {span[1]}]"
                _refuse_saved(what, p, name, condition, state, f"{low} to {high}")


def _counts_steps(step: object) -> bool:
    if isinstance(step, Tensor):
        if step.numel() != 1 or step.is_complex() or step.dtype == torch.bool:
            return False
        step = 0 if step.is_meta else step.item()
    return is_number(step) and is_finite(step) and step >= 0


def _refuse_saved(
    what: str, p: Tensor, name: str, condition: str, state: Mapping[str, Any], got: str = ""
) -> None:
    step = name == "step" and isinstance(state.get(name), Tensor) and state[name].numel() == 1
    got = got or (
        "none" if name not in state else show(state[name].item() if step else state[name])
    )
    context = f"a parameter of shape {list(p.shape)}"
    raise ValueError(refusal(what, name, condition, got, context, _RESTART))
