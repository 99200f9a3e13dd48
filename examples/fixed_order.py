"""--deterministic: sums in one order, so that the same seed ends in the same bits.

On one kind of device, with the same software, options and text; compiled or not, but not one like
the other. mxtrain's own kernels always add in one order. Of torch's, the backward of attention has
none by default, torch.compile chooses some by timing, and cuBLAS may split sums as it has memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

# Read once, at the first product on a GPU: a process that multiplies before it comes here needs it
# outside. Where it is set already, it stays what it is.
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}

_CUDA = torch.backends.cuda


def _algorithms() -> tuple[bool, bool]:
    """Whether they are deterministic, and whether one that is not warns only."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns


def _set_algorithms(wanted: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(wanted[0], warn_only=wanted[1])


# How to set and to get each, and its value. With the last two, attention is the flash kernel, whose
# backward has an order where the first is set, or plain products: cuDNN's has none, and that of the
# kernel that saves memory raises an error.
_SWITCHES = (
    (_set_algorithms, _algorithms, (True, False)),
    (_CUDA.enable_cudnn_sdp, _CUDA.cudnn_sdp_enabled, False),
    (_CUDA.enable_mem_efficient_sdp, _CUDA.mem_efficient_sdp_enabled, False),
)


def _attributes() -> list[tuple[Any, str, Any]]:
    """Reductions of torch.compile that are not chosen by timing; convolutions neither. Filling what
    is not yet written, as torch does besides, would only cost time. Those that this torch has."""
    import torch._inductor.config as inductor  # two seconds

    wanted = (
        (inductor, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    )
    return [one for one in wanted if hasattr(*one[:2])]


@contextlib.contextmanager
def fixed_order(wanted: bool) -> Iterator[None]:
    """Within it sums have one order, if wanted; afterwards torch is as it was. ENVIRONMENT stays in
    os.environ, and cuBLAS with it: what has read it does not read it again."""
    if not wanted:
        yield
        return
    os.environ.update({**ENVIRONMENT, **os.environ})
    attributes = _attributes()
    switched = [(put, get()) for put, get, _ in _SWITCHES]
    changed = [(owner, name, getattr(owner, name)) for owner, name, _ in attributes]
    try:
        for put, _, value in _SWITCHES:
            put(value)
        for owner, name, value in attributes:
            setattr(owner, name, value)
        yield
    finally:
        for put, value in switched:
            put(value)
        for owner, name, value in changed:
            setattr(owner, name, value)
