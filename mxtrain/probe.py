"""A model's forward on a probe: what its layers put out, with everything else left as it was.

A layer that puts out a tuple is known by the first tensor in it; one without a tensor by nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .checks import kind, refusal, show
from .linear import MXLinear
from .oscillation import output_change
from .rows import Row

_SEED = 0x5EED  # of what the forward draws


@dataclass(eq=False)
class Moves:
    """What a module puts out on a probe, and how far that has moved since it was last seen."""

    module: nn.Module
    output: Tensor | None = None
    moved: Tensor | None = None  # [], since the last look; taken by `take`

    def see(self, y: Tensor) -> None:
        if self.output is not None and self.output.shape == y.shape:
            self.moved = output_change(self.output, y)
        self.output = y

    def take(self) -> list[Row]:
        moved, self.moved = self.moved, None
        return [] if moved is None else [Row(moved.double().reshape(1, 1), 0)]


def named_outputs(
    what: str, model: nn.Module, names: Iterable[str], probe: Any
) -> dict[str, Moves]:
    """The modules of these names, for the argument `outputs` of `what`."""
    names = names if isinstance(names, str) else list(names)
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        condition, advice = "be names of modules", "Pass e.g. ['blocks.0', 'blocks.1']."
        raise TypeError(refusal(what, "outputs", condition, show(names), kind(names), advice))
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            condition, advice = "name modules of the model", "See model.named_modules()."
            raise ValueError(refusal(what, "outputs", condition, repr(name), kind(names), advice))
    if names and probe is None:
        condition, advice = "come with a probe", "Pass probe=, inputs of the model."
        raise ValueError(refusal(what, "outputs", condition, "none", "probe=None", advice))
    return {n: Moves(modules[n]) for n in names if not isinstance(modules[n], MXLinear)}  # has one


def probed(
    model: nn.Module, probe: tuple[Any, ...], layers: Iterable[nn.Module], devices: list[int]
) -> dict[int, Tensor]:  # fmt: skip
    """The outputs of these layers in eval mode, copied, by the id of the layer. It draws the same
    numbers every time. devices: cuda_devices of the same."""
    found: dict[int, Tensor] = {}

    def keep(layer: nn.Module, args: Any, y: Any) -> None:
        y = next((t for t in y if isinstance(t, Tensor)), None) if isinstance(y, tuple) else y
        if isinstance(y, Tensor):
            found[id(layer)] = y.detach().clone()

    hooks = [layer.register_forward_hook(keep) for layer in layers]
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with _own_draws(devices):
            model(*probe)
    finally:
        for hook in hooks:
            hook.remove()
        for m, training in modes:
            m.training = training
    return found


def cuda_devices(model: nn.Module, probe: tuple[Any, ...] | None) -> list[int]:
    given = [t for t in probe or () if isinstance(t, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *given]
    return sorted({t.device.index for t in tensors if t.is_cuda})


@contextlib.contextmanager
def _own_draws(devices: list[int]) -> Iterator[None]:
    """Random numbers from a fixed seed; torch's generators are afterwards as they were."""
    with torch.random.fork_rng(devices):
        generators = [torch.default_generator, *(torch.cuda.default_generators[i] for i in devices)]
        for generator in generators:
            generator.manual_seed(_SEED)
        yield
