"""What an optimizer sums of the changes of weights and of their quantized values."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..checks import kind, refusal, show
from ..formats import ROUNDINGS, SCALE_RULES
from ..linear import MXLinear
from ..recipe import Quantizer

EPSILON = 1e-8


def local(t: Tensor) -> Tensor:
    """This rank's part of a sharded tensor (FSDP2), else the tensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def quantized_layers(what: str, model: nn.Module) -> dict[Tensor, tuple[str, MXLinear]]:
    """(name, layer) of every weight that the forward pass quantizes to mxfp4, element by element.

    A rotated or prescaled weight is not: its codes do not belong to its elements.
    """
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "Pass the converted model."
        condition = "be a torch.nn.Module"
        raise TypeError(refusal(what, "model", condition, got, show(model), advice))
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, MXLinear) and _is_tracked(layer.recipe.fprop_w):
            layers.setdefault(layer.weight, (name, layer))
    return layers


def _is_tracked(q: Quantizer) -> bool:
    plain = q.hadamard == 0 and q.prescale == 1.0
    return q.format == "mxfp4" and plain and q.rounding != "stochastic"


class Changes:
    """Sums over steps of |w - w'| and |Q(w) - Q(w')|, an element of a weight each.

    `with optimizer.track_changes(model) as changes:` adds to them in every step of the block, in
    the pass that updates the weights. Q is the quantizer of the layer's forward pass.

    Raises:
        TypeError: for a model that is none.
        ValueError: where the optimizer holds no weight that the model quantizes to mxfp4.

    Source: arXiv 2502.20853, its oscillation ratio.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        what = f"{type(optimizer).__name__}.track_changes"
        held = {p for group in optimizer.param_groups for p in group["params"]}
        layers = quantized_layers(what, model)
        self._layers = {w: found for w, found in layers.items() if w in held}
        if not self._layers:
            condition, advice = (
                "have a weight that this optimizer holds",
                "Convert the model first.",
            )
            got, context = "none", f"{len(layers)} weights of the model are quantized to mxfp4"
            raise ValueError(refusal(what, "model", condition, got, context, advice))
        self._optimizer = optimizer
        self._sums = {w: self._zeros(w) for w in self._layers}

    @staticmethod
    def _zeros(weight: Tensor) -> tuple[Tensor, Tensor]:
        like = local(weight.detach())
        return tuple(torch.zeros(like.shape, device=like.device) for _ in range(2))

    def __enter__(self) -> Changes:
        if self._optimizer.tracker is not None:
            condition, got = "track one set of changes at a time", "two"
            what, advice = "track_changes", "Leave the other `with` block first."
            context = kind(self._optimizer)
            raise RuntimeError(refusal(what, "optimizer", condition, got, context, advice))
        self._optimizer.tracker = self
        return self

    def __exit__(self, *exception: object) -> None:
        self._optimizer.tracker = None

    def __contains__(self, weight: Tensor) -> bool:
        return weight in self._sums

    def __getitem__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """float32 sums of |w - w'| and |Q(w) - Q(w')|, of the shape of (this rank's) weight."""
        return self._sums[weight]

    def codes(self, weight: Tensor) -> tuple[int, int]:
        """scale_rule and rounding of Q now, as the ops take them."""
        layer = self._layers[weight][1]
        q = layer.recipe.fprop_w
        rounding = "toward" if q.rounding == "toward" and layer.ema_active else "nearest"
        return SCALE_RULES[q.scale_rule], ROUNDINGS[rounding]

    def ratio(self, weight: Tensor) -> Tensor:
        """The oscillation ratio R = sum |Q(w) - Q(w')| / (sum |w - w'| + 1e-8), float32."""
        moved, flipped = self._sums[weight]
        return flipped / (moved + EPSILON)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name of the layer, its weight)."""
        return ((name, weight) for weight, (name, _) in self._layers.items())
