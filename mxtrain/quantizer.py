"""What happens to one operand of one GEMM: Quantizer, of which a recipe has six."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import as_float32, check_device, check_name, check_that, is_number
from .formats import FORMATS, HADAMARD_GROUPS, INT8_BLOCK, ROUNDINGS, SCALE_RULES

SIGNS = ("none", "fixed", "drawn")
SOURCES = ("original", "forward")


def _check_one_of(where: str, argument: str, value: Any, known: tuple[int, ...]) -> None:
    ok = type(value) is int and value in known
    condition = "be one of " + ", ".join(map(str, known))
    check_that(ok, where, argument, condition, value, "Choose one of these.")


@dataclass(frozen=True)
class Quantizer:
    """What happens to one operand of one GEMM. `format=None` leaves it in the compute dtype.

    Attributes:
        format: a name of `mxtrain.FORMATS`, "int8_block", or None.
        scale_rule: "floor", "ceil" or "even"; read for a format of `mxtrain.FORMATS` only.
        rounding: "nearest", "stochastic", or "toward" (to whichever neighbour is nearer to a second
            tensor: Q-EMA); not read where format is None.
        hadamard: group size of the rotation along the contraction axis, 0 for none.
        signs: of the rotation: "none", "fixed" (the constant vector `fixed_signs(hadamard)`) or
            "drawn" (anew for each GEMM of each forward).
        prescale: multiplies once the scale is chosen, before rounding; the GEMM's alpha undoes it.
        source: "original" quantizes the tensor itself, "forward" the dequantized operand of the
            forward GEMM (double quantization; dgrad_w and wgrad_x only). In int8_block that is the
            same codes, transposed.
        fallback: whether blocks above the layer's threshold take a second step
            (mxtrain/fallback.py; int8_block, fprop_x and wgrad_x only).

    Raises:
        ValueError: for an unknown name, or a combination that has no meaning.
    """

    format: str | None = None
    scale_rule: str = "ceil"
    rounding: str = "nearest"
    hadamard: int = 0
    signs: str = "none"
    prescale: float = 1.0
    source: str = "original"
    fallback: bool = False

    def __post_init__(self) -> None:
        what = "Quantizer"
        if self.format is not None:
            check_name(what, "format", self.format, (*FORMATS, INT8_BLOCK))
        check_name(what, "scale_rule", self.scale_rule, SCALE_RULES)
        check_name(what, "rounding", self.rounding, ROUNDINGS)
        _check_one_of(what, "hadamard", self.hadamard, (0, *HADAMARD_GROUPS))
        check_name(what, "signs", self.signs, SIGNS)
        check_name(what, "source", self.source, SOURCES)
        ok = is_number(self.prescale) and 0 < as_float32(self.prescale) < math.inf
        advice = "Use 1 for none; it is a float32."
        check_that(ok, what, "prescale", "be positive and finite", self.prescale, advice)
        ok = self.signs == "none" or self.hadamard > 0
        advice = "Set hadamard to the size of the groups that they flip, or signs='none' with it."
        condition = "be 'none' without a Hadamard"
        check_that(ok, what, "signs", condition, self.signs, advice, f"hadamard {self.hadamard}")
        if self.format is None:
            ok = (self.hadamard, self.prescale, self.source) == (0, 1.0, "original")
            ok = ok and self.rounding != "toward"
            argument = "hadamard, prescale, source and rounding"
            condition = "keep their defaults without a format"
            got = (self.hadamard, self.prescale, self.source, self.rounding)
            advice = "Set a format, or use Quantizer()."
            check_that(ok, what, argument, condition, got, advice, "format None")

        self._check_square()
        # Not a field: a string, which torch.compile takes for a constant where a float becomes a
        # symbol (dynamic=True), and one symbol in two layers is more than it can trace (2.13).
        object.__setattr__(self, "_prescale", repr(float(self.prescale)))

    @property
    def factor(self) -> float:
        """The prescale, for what is traced."""
        return float(self._prescale)

    @property
    def square(self) -> bool:
        """Whether it quantizes in squares, which are those of the transpose, too: int8_block."""
        return self.format == INT8_BLOCK

    def _check_square(self) -> None:
        what, advice = "Quantizer", "Use int8_block, nearest, or leave it False."
        ok = isinstance(self.fallback, bool)
        check_that(ok, what, "fallback", "be True or False", self.fallback, "Pass one of the two.")
        ok = not self.fallback or (self.square and self.rounding == "nearest")
        context = f"format {self.format}, {self.rounding}"
        condition = "be False but for int8_block to nearest"
        check_that(ok, what, "fallback", condition, self.fallback, advice, context)
        got = (self.hadamard, self.prescale, self.rounding)
        ok = not self.square or (got[:2] == (0, 1.0) and self.rounding != "toward")
        condition = "be 0, 1 and 'nearest' or 'stochastic' for int8_block"
        argument, advice = (
            "hadamard, prescale and rounding",
            "Its scale fits each square.",
        )
        check_that(ok, what, argument, condition, got, advice, "format int8_block")
        ok = not self.square or self.source == "original" or self.rounding == "nearest"
        condition, advice = "be 'nearest' from the forward operand", "Codes are moved, not rounded."
        check_that(ok, what, "rounding", condition, self.rounding, advice, "format int8_block")

    def __str__(self) -> str:
        if self.format is None:
            return "unquantized"
        rule = [] if self.square else [self.scale_rule]
        parts = [" ".join([self.format, *rule, self.rounding])]
        if self.fallback:
            parts.append("with fallback")
        if self.prescale != 1.0:
            parts.append(f"x{self.prescale:g}")
        if self.hadamard:
            signs = "" if self.signs == "none" else f" with {self.signs} signs"
            parts.append(f"Hadamard {self.hadamard}{signs}")
        if self.source == "forward":
            parts.append("from the forward operand")
        return ", ".join(parts)


def fixed_signs(g: int, device: torch.device | str = "cpu") -> Tensor:
    """The constant signs of a "fixed" rotation: int8 `[g]` of +-1, alike on every device.

    Integer arithmetic on the device, so it takes no generator and no copy from the host, and
    within 32 bits, so that compilers may narrow it: with i counted from 1, element i is negative
    where (24 i^2 + 45 i) mod 251 is above 125. No Walsh function is closer to it than 2.3 sqrt(g).
    """
    _check_one_of("fixed_signs", "g", g, HADAMARD_GROUPS)
    check_device("fixed_signs", device)
    i = torch.arange(1, g + 1, dtype=torch.int32, device=device)
    return torch.where((24 * i * i + 45 * i) % 251 > 125, -1, 1).to(torch.int8)
