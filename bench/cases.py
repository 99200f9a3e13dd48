"""What a row is: a `Case`, built from its name by the family that the name starts with.

A name is `family/arguments/shape`, such as `quantize/mxfp4/stochastic+h64/16384x8192`. To add a
family, write one function that returns a Case, register it with `@family("...")` (families.py,
int8.py, products.py and optimizers.py hold this package's ops, those of int8_block, GEMMs and
layers, and optimizer steps; context.py RMSNorm, SwiGLU and a block with them; training.py whole
steps, peers.py what they are compared with), and name its rows in suites.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mxtrain
from mxtrain.formats import HADAMARD_GROUPS, ROUNDINGS, SCALE_RULES, Format

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: of the row.
        make: inputs on a device, a tuple; tensors in it are copied for the rotation, other objects
            shared. Never zeros.
        call: what is timed; takes the inputs and returns the outputs.
        bytes, flops: read and written, or computed, by one call; 0 for "not counted".
        op: the op of torch.ops.mxtrain that must have a kernel on the device; None for a peer.
        check: error of the outputs for these inputs, on a slice of about `elements`; None where
            nothing is checked.
        tolerance: the largest error that is right.
        requires: module that must be importable.
        peers: rows to compare with, best first; the first that runs in the same suite gives
            vs_peer.
        bf16: the row that gives vs_bf16.
        tokens: that one call trains on; 0 for "none".
        saved: bytes of activations that autograd keeps for backward, of the inputs; None for "not
            counted".
        graph: whether to time the replays of a CUDA graph; else what a caller without one waits
            for.
    """

    name: str
    make: Callable[[torch.device], tuple]
    call: Callable[..., Any]
    bytes: int = 0
    flops: int = 0
    op: str | None = None
    check: Callable[[tuple, Any, int], float] | None = None
    tolerance: float = 0.0
    requires: str | None = None
    peers: tuple[str, ...] = ()
    bf16: str | None = None
    tokens: int = 0
    saved: Callable[..., int] | None = None
    graph: bool = True

    @property
    def baselines(self) -> tuple[str, ...]:
        """Names of the rows that this one is compared with."""
        return self.peers + ((self.bf16,) if self.bf16 else ())


class Unfit(ValueError):
    """A well-formed row that its shape does not allow, such as a Hadamard group that does not
    divide K.
    """


FAMILIES: dict[str, Callable[..., Case]] = {}


def family(name: str) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register the builder of the rows `name/...`. It is called with the parts of the name that
    follow.
    """

    def register(builder: Callable[..., Case]) -> Callable[..., Case]:
        FAMILIES[name] = builder
        return builder

    return register


def build(name: str) -> Case:
    """The case called `name`. Raises ValueError for a name that means nothing, Unfit for a shape
    that cannot be.
    """
    # They register the families, and import this module.
    from . import (  # noqa: F401
        context,
        diagnostics,
        families,
        int8,
        optimizers,
        peers,
        products,
        training,
    )

    head, *rest = name.split("/")
    if head not in FAMILIES:
        raise ValueError(f"no row family {head!r} (in {name!r}); there are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[head](name, *rest)
    except TypeError as error:  # too few or too many parts
        raise ValueError(f"the row name {name!r} does not fit its family: {error}") from None


# ---- parts of names ----


def parse_shape(text: str, dims: int = 2) -> tuple[int, ...]:
    """(4096, 1024) from "4096x1024". Raises ValueError unless there are `dims` positive sizes."""
    sizes = tuple(int(part) if part.isdecimal() else 0 for part in text.split("x"))
    if len(sizes) != dims or min(sizes) < 1:
        expected = "x".join("RC" if dims == 2 else "MNK")
        raise ValueError(f"a shape must be {expected} with positive sizes, got {text!r}")
    return sizes


@dataclass(frozen=True)
class Options:
    """What the middle part of a quantizer's name says: rounding, then in any order +hN, +transpose,
    +swizzle, a scale rule other than ceil, an input dtype other than bf16.
    """

    rounding: str = "nearest"
    hadamard: int = 0
    transpose: bool = False
    swizzle: bool = False
    scale_rule: str = "ceil"
    dtype: torch.dtype = torch.bfloat16

    @staticmethod
    def parse(text: str) -> Options:
        """The options of "stochastic+h64+transpose". Raises ValueError for an unknown word."""
        rounding, *words = text.split("+")
        if rounding not in ROUNDINGS:
            raise ValueError(f"a rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
        found: dict[str, Any] = {"rounding": rounding}
        for word in words:
            if word in ("transpose", "swizzle"):
                found[word] = True
            elif word in SCALE_RULES:
                found["scale_rule"] = word
            elif word in DTYPES:
                found["dtype"] = DTYPES[word]
            elif word[:1] == "h" and word[1:].isdecimal() and int(word[1:]) in HADAMARD_GROUPS:
                found["hadamard"] = int(word[1:])
            else:
                raise ValueError(f"unknown option {word!r} in {text!r}")
        return Options(**found)

    def keywords(self, rotate: bool = True) -> dict[str, Any]:
        """Keyword arguments of mxtrain.quantize and of its reference that need no tensor."""
        return {
            "scale_rule": self.scale_rule,
            "rounding": self.rounding,
            "hadamard": self.hadamard if rotate else 0,
        }

    def tensors(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """rng, signs and toward, where the options need them."""
        rng = mxtrain.draw_rng(device=x.device)[0] if self.rounding == "stochastic" else None
        signs = mxtrain.draw_signs(self.hadamard, device=x.device)[0] if self.hadamard else None
        toward = x + 0.1 * torch.randn_like(x) if self.rounding == "toward" else None
        return rng, signs, toward

    def require_fit(self, fmt: Format, k: int) -> None:
        """Raise Unfit where the Hadamard group does not divide the padded k."""
        if self.hadamard and fmt.padded(k) % self.hadamard:
            raise Unfit(f"Hadamard groups of {self.hadamard} do not divide K = {fmt.padded(k)}")
