"""The hooks that a monitor puts on layers and on their outputs. They hold it weakly, and a model is
copied and pickled with them: the copy's do nothing."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Watcher(Protocol):
    """What a hook needs of a monitor."""

    def saw_forward(self, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None: ...

    def saw_backward(self, layer: int, dy: Tensor) -> None: ...


class ForwardHook:
    """After a layer's forward. Without a watcher it does nothing."""

    def __init__(self, watcher: Watcher | None = None) -> None:
        self.watcher = None if watcher is None else weakref.ref(watcher)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], y: Any) -> None:
        if torch.compiler.is_compiling() or self.watcher is None:
            return
        watcher = self.watcher()
        if watcher is not None:
            watcher.saw_forward(layer, args, y)

    def __reduce__(self) -> tuple[Any, ...]:  # copy, deepcopy, pickle
        return ForwardHook, ()


class BackwardHook:
    """On the output of a layer, by its id: a graph may outlive the monitor."""

    def __init__(self, watcher: Watcher, layer: int) -> None:
        self.watcher, self.layer = weakref.ref(watcher), layer

    def __call__(self, dy: Tensor) -> None:
        watcher = self.watcher()
        if watcher is not None:
            watcher.saw_backward(self.layer, dy)
