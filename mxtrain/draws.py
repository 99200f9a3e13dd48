"""The random draws of a linear layer: one forward's, which its backward uses too."""

from __future__ import annotations

import torch
from torch import Tensor

from .operand import draw_rng, draw_signs
from .recipe import Recipe, fixed_signs

# Rows of the drawn rng ([3, 2]) and of the drawn signs ([3, largest group]).
X, W, DY = 0, 1, 2
SIGNS_ROW = {"fprop": 0, "dgrad": 1, "wgrad": 2}

_FIXED_SIGNS: dict[tuple[int, torch.device], Tensor] = {}


def _fixed_signs(g: int, device: torch.device) -> Tensor:
    """fixed_signs, made once a device; what a trace or a CUDA graph capture made is not kept."""
    if torch.compiler.is_compiling():
        return fixed_signs(g, device)
    signs = _FIXED_SIGNS.get((g, device))
    if signs is None:
        signs = fixed_signs(g, device)
        capturing = signs.is_cuda and torch.cuda.is_current_stream_capturing()
        if type(signs) is Tensor and not capturing:
            _FIXED_SIGNS[g, device] = signs
    return signs


def signs_of(
    recipe: Recipe, name: str, drawn: Tensor | None, device: torch.device
) -> Tensor | None:
    """The signs that both operands of a GEMM share."""
    q = recipe.pair(name)[0]
    if q.signs == "none":
        return None
    if q.signs == "fixed":
        return _fixed_signs(q.hadamard, device)
    return drawn[SIGNS_ROW[name], : q.hadamard]


@torch.library.custom_op("mxtrain_compile::keep_draws", mutates_args=())
def _keep_draws(draws: Tensor, x: Tensor) -> Tensor:
    """A copy of draws that the compiler saves for backward.

    Its partition of a traced forward and backward makes again in backward what depends on no input
    of the graph, random numbers too: the two operands of a GEMM were rotated by different signs.
    What an op that it does not know makes of an input, it saves. (No op for users: not in mxtrain's
    namespace.)
    """
    return draws.clone()


_keep_draws.register_fake(lambda draws, x: torch.empty_like(draws))


def draw(recipe: Recipe, backward: bool, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """rng [3, 2] and signs [3, g] for a forward, and its backward; None where none are needed."""
    rng = recipe.needs_rng if backward else recipe.fprop_needs_rng
    pairs = [recipe.pair(name) for name in (SIGNS_ROW if backward else ("fprop",))]
    group = max(q.hadamard if q.signs == "drawn" else 0 for q, _ in pairs)
    device = x.device
    drawn = draw_rng(3, device) if rng else None, draw_signs(group, 3, device) if group else None
    if torch.compiler.is_compiling():
        return tuple(None if t is None else _keep_draws(t, x) for t in drawn)
    return drawn
