"""Recipes: what each of the six quantizers of a linear layer is. Data, which mxtrain.linear reads.

A linear layer has three GEMMs, each D = alpha * A B^T with blocks along the contraction axis, and
six quantizers:

    gemm    A, B             computes          blocks along   fields of Recipe
    fprop   X,    W          Y  = X W^T + b    in_features    fprop_x,  fprop_w
    dgrad   dY,   W^T        dX = dY W         out_features   dgrad_dy, dgrad_w
    wgrad   dY^T, X^T        dW = dY^T X       tokens         wgrad_dy, wgrad_x

A new recipe is one more entry of `RECIPES`, or a `Recipe` built anywhere and passed where a name is
accepted. docs/numerics.md defines what the fields do to the bits.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .checks import (
    as_float32,
    check_int,
    check_name,
    check_that,
    is_int,
    is_number,
    kind,
    refusal,
    show,
)
from .fallback_rule import DEFAULT, Fallback
from .formats import ACCUMULATE, FORMATS
from .quantizer import Quantizer as Quantizer
from .quantizer import fixed_signs as fixed_signs

GEMMS = {
    "fprop": ("fprop_x", "fprop_w"),
    "dgrad": ("dgrad_dy", "dgrad_w"),
    "wgrad": ("wgrad_dy", "wgrad_x"),
}
"""Each GEMM's two quantizers, the A side first."""

_TENSOR = {
    "fprop_x": "X", "fprop_w": "W",
    "dgrad_dy": "dY", "dgrad_w": "W^T",
    "wgrad_dy": "dY^T", "wgrad_x": "X^T",
}  # fmt: skip
_FORWARD_OF = {"dgrad_w": "fprop_w", "wgrad_x": "fprop_x"}


_NONE = Quantizer()


@dataclass(frozen=True)
class Recipe:
    """The six quantizers of a linear layer and what belongs to them. Immutable and hashable.

    Attributes:
        name: how reports call it.
        fprop_x, fprop_w, dgrad_dy, dgrad_w, wgrad_dy, wgrad_x: the quantizers. The two of a GEMM
            share format (unless one is None), hadamard and signs.
        ema_beta: decay of the average of the weights that fprop_w rounds toward; set if and only if
            it does.
        ema_warmup: optimizer steps during which fprop_w rounds to nearest instead.
        ema_fraction: of the updates so far that the average remembers at most: update n + 1 goes
            max(1 - ema_beta, 1 / (1 + ema_fraction * n)) of the way to the weight. 1 makes it their
            mean, less a shorter memory; None leaves ema_beta alone.
        ema_at_half: the steps that the average remembers at most where the learning rate is half
            its peak: ema_at_half * (peak / lr - 1) in general, so at the peak, and during a
            warm-up, it is the weight itself. None: the learning rate does not matter (the paper).
        accumulate: "fp32", or "fast" where a GEMM backend may accumulate in fewer bits.
        fallback: the rule of the threshold, where a quantizer has a fallback.
        reference: where the recipe was published.

    Raises:
        ValueError: where the quantizers contradict each other; the message says which and why.
    """

    name: str
    fprop_x: Quantizer = _NONE
    fprop_w: Quantizer = _NONE
    dgrad_dy: Quantizer = _NONE
    dgrad_w: Quantizer = _NONE
    wgrad_dy: Quantizer = _NONE
    wgrad_x: Quantizer = _NONE
    ema_beta: float | None = None
    ema_warmup: int = 10
    ema_fraction: float | None = None
    ema_at_half: float | None = None
    accumulate: str = "fp32"
    reference: str = ""
    fallback: Fallback = DEFAULT

    def __post_init__(self) -> None:
        ok = isinstance(self.name, str) and self.name != ""
        advice = "Reports call the recipe by it."
        check_that(ok, "Recipe", "name", "be a non-empty string", self.name, advice)
        check_name("Recipe", "accumulate", self.accumulate, ACCUMULATE)
        for field in _TENSOR:
            self._check_quantizer(field)
        for gemm, (a, b) in GEMMS.items():
            self._check_pair(gemm, a, b)
        ok = is_int(self.ema_warmup) and 0 <= self.ema_warmup < 2**63
        advice = "It counts optimizer steps."
        self._refuse_unless(ok, "ema_warmup", "be an int >= 0", self.ema_warmup, advice)
        beta, toward = self.ema_beta, self.fprop_w.rounding == "toward"
        if beta is not None:
            ok = is_number(beta) and 0.0 < beta < 1.0
            self._refuse_unless(ok, "ema_beta", "lie in (0, 1)", beta, "Try 0.998.")
        condition = "be set if and only if fprop_w rounds 'toward'"
        advice = f"Set both or neither: fprop_w.rounding is {self.fprop_w.rounding!r}."
        self._refuse_unless(toward == (beta is not None), "ema_beta", condition, beta, advice)
        for name, most, interval, advice in (
            ("ema_fraction", 1.0, "(0, 1]", "Try 0.02, or None for the memory of ema_beta alone."),
            ("ema_at_half", sys.float_info.max, "(0, inf)",
             "Try 0.03, or None: the learning rate does not bound the memory."),
        ):  # fmt: skip
            bound = getattr(self, name)
            if bound is not None:
                ok = is_number(bound) and 0.0 < bound <= most
                self._refuse_unless(ok, name, f"lie in {interval}", bound, advice)
                condition, advice = "be None without ema_beta", "There is no average to remember."
                self._refuse_unless(beta is not None, name, condition, bound, advice)
        advice = "Pass a mxtrain.recipe.Fallback."
        ok = isinstance(self.fallback, Fallback)
        self._refuse_unless(ok, "fallback", "be a Fallback", self.fallback, advice)
        ok = isinstance(self.reference, str)
        advice = "Say where the recipe was published, or leave it empty."
        self._refuse_unless(ok, "reference", "be a string", self.reference, advice)

    def _refuse_unless(
        self, ok: bool, argument: str, condition: str, got: Any, advice: str
    ) -> None:  # fmt: skip
        check_that(ok, "Recipe", argument, condition, got, advice, f"recipe {self.name!r}")

    def _check_quantizer(self, field: str) -> None:
        q, check = getattr(self, field), self._refuse_unless
        advice = 'Pass one such as mxtrain.Quantizer("mxfp4").'
        check(isinstance(q, Quantizer), field, "be a Quantizer", q, advice)
        ok = q.rounding != "toward" or field == "fprop_w"
        advice = "Only fprop_w rounds toward the average of the weights."
        check(ok, f"{field}.rounding", "be 'nearest' or 'stochastic'", q.rounding, advice)
        ok = not q.fallback or field == "fprop_x" or (field == "wgrad_x" and self._falls_back_again)
        condition = "be False but in fprop_x, and in wgrad_x from its forward operand"
        advice = "Give fprop_x the fallback, and wgrad_x source='forward'."
        check(ok, f"{field}.fallback", condition, q.fallback, advice)
        if q.source == "original":
            return
        source = f"{field}.source"
        advice = "Only dgrad_w and wgrad_x have a forward operand."
        check(field in _FORWARD_OF, source, "be 'original'", q.source, advice)
        forward = _FORWARD_OF[field]
        f = getattr(self, forward)
        condition = f"be 'original' where {forward} has no format"
        advice = f"Give {forward} a format, or quantize the original."
        check(f.format is not None, source, condition, q.source, advice)
        condition = f"be 'original' where one of {field} and {forward} is int8_block"
        advice = "Give both the same format."
        check(f.square == q.square, source, condition, q.source, advice)
        condition = f"be 'original' where {forward} is rotated or prescaled"
        advice = "Requantizing the forward operand would not undo that."
        check(f.hadamard == 0 and f.prescale == 1.0, source, condition, q.source, advice)

    @property
    def _falls_back_again(self) -> bool:
        x = self.fprop_x
        return isinstance(x, Quantizer) and x.fallback and self.wgrad_x.source == "forward"

    def _check_pair(self, gemm: str, a: str, b: str) -> None:
        qa, qb, check = getattr(self, a), getattr(self, b), self._refuse_unless
        formats = (qa.format, qb.format)
        both = None not in formats
        ok, condition = not both or qa.format == qb.format, f"give {a} and {b} one format"
        check(ok, gemm, condition, formats, "A GEMM multiplies operands of one format.")
        rotations = ((qa.hadamard, qa.signs), (qb.hadamard, qb.signs))
        condition = f"give {a} and {b} the same hadamard and signs"
        advice = "Both operands of a GEMM share the rotation, which then cancels."
        check(rotations[0] == rotations[1], gemm, condition, rotations, advice)
        prescales = (qa.prescale, qb.prescale)
        condition = f"leave {a} and {b} at prescale 1 where one of them has no format"
        advice = "Give both a format, or neither a prescale."
        check(both or prescales == (1.0, 1.0), gemm, condition, prescales, advice)
        product = float(qa.prescale) * float(qb.prescale)
        ok = product > 0 and 0 < as_float32(1.0 / product) < math.inf
        condition = f"give {a} and {b} prescales that a float32 alpha can undo"
        check(ok, gemm, condition, prescales, "Use factors nearer to 1.")

    def pair(self, gemm: str) -> tuple[Quantizer, Quantizer]:
        """The quantizers of A and B of "fprop", "dgrad" or "wgrad"."""
        check_name("Recipe.pair", "gemm", gemm, GEMMS)
        a, b = GEMMS[gemm]
        return getattr(self, a), getattr(self, b)

    def alpha(self, gemm: str) -> float:
        """The factor of the GEMM that undoes the prescales: 1 / (prescale_a * prescale_b)."""
        a, b = self.pair(gemm)
        return 1.0 / (a.factor * b.factor)

    @property
    def fprop_needs_rng(self) -> bool:
        """Whether the forward GEMM rounds stochastically; evaluation then draws numbers too."""
        return any(q.format and q.rounding == "stochastic" for q in self.pair("fprop"))

    @property
    def needs_rng(self) -> bool:
        """Whether any of the six quantizers rounds stochastically."""
        backward = self.pair("dgrad") + self.pair("wgrad")
        return self.fprop_needs_rng or any(
            q.format and q.rounding == "stochastic" for q in backward
        )

    def misfit(self, in_features: int, out_features: int) -> str | None:
        """Why a layer of this shape cannot run the recipe, or None where it can.

        A Hadamard group must divide the contraction axis, once that is padded to whole blocks. The
        axis of wgrad, the tokens, is padded further at run time, so it always fits.
        """
        check_int("Recipe.misfit", "in_features", in_features, low=0)
        check_int("Recipe.misfit", "out_features", out_features, low=0)
        axes = {"fprop": ("in_features", in_features), "dgrad": ("out_features", out_features)}
        for gemm, (axis, size) in axes.items():
            q = self.pair(gemm)[0]
            if q.hadamard and FORMATS[q.format].padded(size) % q.hadamard:
                return (
                    f"{axis} = {size}, padded to {FORMATS[q.format].padded(size)}, must be a "
                    f"multiple of {q.hadamard}, the Hadamard group of {gemm} in {self.name!r}"
                )
        return None

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed, validated again (`dataclasses.replace`)."""
        return dataclasses.replace(self, **changes)

    def with_quantizers(self, name: str, gemms: str | Sequence[str], **changes: Any) -> Recipe:
        """A copy called name in which both quantizers of these GEMMs have the changed fields.

            mxfp4_backward = get_recipe("mxfp4_backward")
            wide = mxfp4_backward.with_quantizers("g = 128", ("dgrad", "wgrad"), hadamard=128)
            both = wide.with_quantizers("g = 128, FP8 forward", "fprop", format="mxfp8_e4m3")
            none = wide.with_quantizers("no rotation", ("dgrad", "wgrad"), hadamard=0, signs="none")

        Raises ValueError for another GEMM, or where the recipe would not be valid; TypeError for a
        field that a Quantizer does not have.
        """
        known = [field.name for field in dataclasses.fields(Quantizer)]
        unknown = [key for key in changes if key not in known]
        what, condition = "Recipe.with_quantizers", "be fields of Quantizer: " + ", ".join(known)
        if unknown:
            advice = "Use Recipe.replace for a field of the recipe."
            message = refusal(what, "changes", condition, unknown, self.name, advice)
            raise TypeError(message)
        fields: dict[str, Quantizer] = {}
        for gemm in [gemms] if isinstance(gemms, str) else gemms:
            check_name(what, "gemms", gemm, GEMMS)
            for field in GEMMS[gemm]:
                fields[field] = dataclasses.replace(getattr(self, field), **changes)
        return self.replace(name=name, **fields)

    def describe(self) -> str:
        """One line a GEMM: both quantizers, and what applies to the GEMM as a whole."""
        return "\n".join(f"{gemm}  {self._describe(gemm, ' | ')}" for gemm in GEMMS)

    def _describe(self, gemm: str, separator: str) -> str:
        (name_a, name_b), (a, b) = (_TENSOR[field] for field in GEMMS[gemm]), self.pair(gemm)
        parts = [f"{name_a}, {name_b}: {a}"] if a == b else [f"{name_a}: {a}", f"{name_b}: {b}"]
        if self.alpha(gemm) != 1.0:
            parts.append(f"alpha {self.alpha(gemm):.6g}")
        if gemm == "fprop" and self.ema_beta is not None:
            memory = f"beta {self.ema_beta:g}"
            if self.ema_fraction is not None:
                memory += f", at most {self.ema_fraction:.3g} of the steps so far"
            if self.ema_at_half is not None:
                memory += f", at most {self.ema_at_half:g} (peak lr / lr - 1) steps"
            parts.append(f"EMA of W: {memory}, used after {self.ema_warmup} steps")
        return separator.join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of strings, numbers and None, ready for JSON; `from_dict` reads them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote; absent fields keep their defaults.

        Raises ValueError for a field that does not exist, or for a recipe that is not valid.
        """
        _reject_unknown("fields", fields, cls)
        fields = dict(fields)
        for field in _TENSOR:
            if isinstance(fields.get(field), dict):
                _reject_unknown(field, fields[field], Quantizer)
                fields[field] = Quantizer(**fields[field])
        if isinstance(fields.get("fallback"), dict):
            _reject_unknown("fallback", fields["fallback"], Fallback)
            fields["fallback"] = Fallback(**fields["fallback"])
        return cls(**{"name": "", **fields})  # without a name, __post_init__ refuses it


def _reject_unknown(argument: str, fields: dict[str, Any], cls: type) -> None:
    what = "Recipe.from_dict"
    if not isinstance(fields, dict):
        advice = "Pass what Recipe.to_dict returned."
        raise TypeError(refusal(what, argument, "be a dict", show(fields), kind(fields), advice))
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [key for key in fields if key not in known]
    condition = "be among " + ", ".join(known)
    check_that(not unknown, what, argument, condition, unknown, "Remove or rename what is not.")


# ---- the table ----

_FLOOR = Quantizer("mxfp4", "floor")
_CEIL = Quantizer("mxfp4", "ceil")
_CEIL_SR = Quantizer("mxfp4", "ceil", "stochastic")
_CEIL_SR_AGAIN = Quantizer("mxfp4", "ceil", "stochastic", source="forward")
_CEIL_EMA = Quantizer("mxfp4", "ceil", "toward")
_RHT_SR = Quantizer("mxfp4", "floor", "stochastic", hadamard=64, signs="drawn", prescale=0.75)
_RHT = Quantizer("mxfp4", "floor", hadamard=64, signs="drawn")
_SR = Quantizer("mxfp4", "floor", "stochastic", prescale=0.75)
_RHT32_SR = Quantizer("mxfp4", "floor", "stochastic", hadamard=32, signs="drawn", prescale=0.75)
_H32 = Quantizer("mxfp4", "ceil", hadamard=32)
_MXFP8 = Quantizer("mxfp8_e4m3", "ceil")
_I8 = Quantizer("int8_block")
_I8_SR = Quantizer("int8_block", rounding="stochastic")
_I8_AGAIN = Quantizer("int8_block", source="forward")
_I8_FB = Quantizer("int8_block", fallback=True)
_I8_FB_AGAIN = Quantizer("int8_block", source="forward", fallback=True)
_NV = Quantizer("nvfp4", "even")
_NV_SR = Quantizer("nvfp4", "even", "stochastic")
_CEIL_RHT = Quantizer("mxfp4", "ceil", hadamard=64, signs="drawn")
_CEIL_RHT_SR = Quantizer("mxfp4", "ceil", "stochastic", hadamard=64, signs="drawn")
_NV_RHT = Quantizer("nvfp4", "even", hadamard=16, signs="fixed")
_NV_RHT_SR = Quantizer("nvfp4", "even", "stochastic", hadamard=16, signs="fixed")

# name: (X, W of fprop, dY, W^T of dgrad, dY^T, X^T of wgrad), what else, reference
_TABLE: dict[str, tuple[tuple[Quantizer, ...], dict[str, Any], str]] = {
    "bf16": (
        (_NONE,) * 6, {},
        "torch.nn.Linear",
    ),
    "mxfp4_baseline": (
        (_FLOOR,) * 6, {},
        "Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv 2310.10537",
    ),
    "tetrajet": (
        (_CEIL, _CEIL, _CEIL_SR, _CEIL_SR_AGAIN, _CEIL_SR, _CEIL_SR_AGAIN), {},
        "Chen et al., Oscillation-Reduced MXFP4 Training for Vision Transformers, arXiv 2502.20853",
    ),
    "tetrajet_ema": (
        (_CEIL, _CEIL_EMA, _CEIL_SR, _CEIL_SR_AGAIN, _CEIL_SR, _CEIL_SR_AGAIN),
        {"ema_beta": 0.998, "ema_at_half": 0.03},
        "Chen et al., Q-EMA in the same paper, arXiv 2502.20853",
    ),
    "mxfp4_backward": (
        (_NONE, _NONE, _RHT_SR, _RHT_SR, _RHT_SR, _RHT_SR), {},
        "Tseng et al., Training LLMs with MXFP4, arXiv 2502.20586",
    ),
    "mxfp4_backward_mxfp8": (
        (_MXFP8, _MXFP8, _RHT_SR, _RHT_SR, _RHT_SR, _RHT_SR), {},
        "Tseng et al., with an FP8 forward, arXiv 2502.20586",
    ),
    "mxfp4_backward_rht": (
        (_NONE, _NONE, _RHT, _RHT, _RHT, _RHT), {},
        "Tseng et al., the ablation without SR (their mode 1), arXiv 2502.20586",
    ),
    "mxfp4_backward_sr": (
        (_NONE, _NONE, _SR, _SR, _SR, _SR), {},
        "Tseng et al., the ablation without RHT (their mode 4), arXiv 2502.20586",
    ),
    "mxfp4_backward_plain": (
        (_NONE, _NONE, _FLOOR, _FLOOR, _FLOOR, _FLOOR), {},
        "Tseng et al., the ablation without either (their mode 2), arXiv 2502.20586",
    ),
    "fp4_mixed_ffn": (
        (_CEIL, _CEIL, _MXFP8, _MXFP8, _MXFP8, _MXFP8), {},
        "Zhou et al., the feed-forward layers of `fp4_mixed`, arXiv 2502.11458",
    ),
    "mxfp4_hadamard": (
        (_CEIL, _CEIL, _CEIL, _CEIL, _H32, _H32), {},
        "AMD's MXFP4 recipe (fixed rotation of wgrad, nearest), arXiv 2605.09825",
    ),
    "quartet": (
        (_H32, _H32, _RHT32_SR, _RHT32_SR, _RHT32_SR, _RHT32_SR), {},
        "Castro et al., Quartet, arXiv 2505.14669 (without its clipping of the forward operands)",
    ),
    "mxfp8": (
        (_MXFP8,) * 6, {},
        "NVIDIA, Recipes for Pre-training LLMs with MXFP8, arXiv 2506.08027",
    ),
    "nvfp4": (
        (_NV, _NV, _NV_SR, _NV, _NV_RHT_SR, _NV_RHT), {},
        "NVIDIA, Pretraining Large Language Models with NVFP4, arXiv 2509.25149",
    ),
    "nvfp4_rht": (
        (_NV, _NV, _CEIL_RHT_SR, _CEIL_RHT, _CEIL_RHT_SR, _CEIL_RHT), {},
        "this package: of docs/results.md's mixtures with three 4-bit GEMMs, the least mean gap",
    ),
    # W^T by _I8, from the original, has the codes of W's forward operand: nothing of W is kept.
    "int8_block": (
        (_I8, _I8, _I8_SR, _I8, _I8_SR, _I8_AGAIN), {},
        "int8_fallback without its fallback: plain INT8 in squares of 128, after arXiv 2403.12422",
    ),
    "int8_fallback": (
        (_I8_FB, _I8, _I8_SR, _I8, _I8_SR, _I8_FB_AGAIN), {},
        "Accurate INT8 Training Through Dynamic Block-Level Fallback, arXiv 2503.08040",
    ),
}  # fmt: skip

RECIPES: dict[str, Recipe] = {
    name: Recipe(name, *quantizers, **others, reference=reference)
    for name, (quantizers, others, reference) in _TABLE.items()
}
"""Every named recipe."""


def get_recipe(recipe: str | Recipe) -> Recipe:
    """The recipe of that name; a Recipe is returned as it is.

    Raises ValueError, with the names, for an unknown one; TypeError for something else.
    """
    if isinstance(recipe, Recipe):
        return recipe
    what = "get_recipe"
    advice = "Pass a mxtrain.Recipe for one of your own; a name of mxtrain.MIXES goes to convert."
    if not isinstance(recipe, str):
        got = type(recipe).__name__
        condition = "be a name or a Recipe"
        raise TypeError(refusal(what, "recipe", condition, got, show(recipe), advice))
    condition = f"be one of {', '.join(RECIPES)}"
    check_that(recipe in RECIPES, what, "recipe", condition, recipe, advice)
    return RECIPES[recipe]


def table() -> str:
    """The named recipes as a markdown table, for the README and the documentation."""
    rows = [("recipe", *GEMMS, "reference"), ("---",) * (len(GEMMS) + 2)]
    for recipe in RECIPES.values():
        gemms = (recipe._describe(gemm, "; ") for gemm in GEMMS)
        rows.append((f"`{recipe.name}`", *gemms, recipe.reference))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
