"""A model's forward on a probe: what its layers put out, with everything else left as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SEED = 0x5EED  # of what the forward draws


def probed(
    model: nn.Module, probe: tuple[Any, ...], layers: Iterable[nn.Module], devices: list[int]
) -> dict[int, Tensor]:  # fmt: skip
    """The outputs of these layers in eval mode, copied, by the id of the layer. It draws the same
    numbers every time. devices: cuda_devices of the same."""
    found: dict[int, Tensor] = {}

    def keep(layer: nn.Module, args: Any, y: Tensor) -> None:
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
