"""The analytic cost of a recipe: arithmetic over speed, relative to all of it in 16 bits.

A token costs a linear layer 2 * in * out operations forward and as many again in dgrad and in
wgrad; each GEMM runs at the speed of its operands' format. The attention product, QK^T and PV, runs
in 16 bits: 4 * context * hidden operations a token and layer forward, twice that backward. Nothing
else is counted: no quantizers, no norms, no memory, no second products of blocks that fall back. So
this bounds a speedup; `python -m bench` measures one.

Source: arXiv 2502.11458 section on cost; its Table 2 does not follow from the speeds 1, 2, 4 that
its text names (57.1% for all FP4 is what linear layers at twice the speed give), so the speeds, the
precision of dgrad and the shares of the operations are parameters here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from .checks import check_bool, check_int, is_finite, is_int, is_number, kind, refusal, show
from .formats import element_bits
from .linear import MXLinear
from .recipe import GEMMS, Recipe, get_recipe

SPEEDS: dict[int, float] = {16: 1.0, 8: 2.0, 4: 4.0}
"""Operations a second by bits of the operands, relative to 16 bits: the peaks of tensor cores."""

CORE = "attention product"
"""The part of a cost that no recipe quantizes."""


# ---- operations ----


def block_shares(hidden: int, ffn: int, context: int, gated: bool = True) -> dict[str, float]:
    """The shares of a transformer block's operations, which sum to 1.

    Attention projections are 8 hidden^2 a token forward, feed-forward layers 6 hidden ffn where
    gated (SwiGLU) and 4 hidden ffn where not, the attention product 4 context hidden. (Grouped
    queries have smaller projections: pass shares of your own, or a model, to what takes them.)

    Returns:
        "attention", "ffn" and CORE.
    """
    for name, value in (("hidden", hidden), ("ffn", ffn), ("context", context)):
        check_int("block_shares", name, value, low=0)
    check_bool("block_shares", "gated", gated)
    flops = {
        "attention": 8 * hidden**2,
        "ffn": (6 if gated else 4) * hidden * ffn,
        CORE: 4 * context * hidden,
    }
    total = sum(flops.values())
    if total == 0:
        advice = "Pass the sizes of a block."
        message = refusal("block_shares", "hidden", "be positive", hidden, f"ffn {ffn}", advice)
        raise ValueError(message)
    return {name: value / total for name, value in flops.items()}


def gemm_bits(recipe: str | Recipe) -> dict[str, int]:
    """Bits of the operands of each GEMM: the wider one's, 16 where one is not quantized."""
    recipe = get_recipe(recipe)
    bits = {}
    for gemm in GEMMS:
        formats = [q.format for q in recipe.pair(gemm)]
        bits[gemm] = 16 if None in formats else max(map(element_bits, formats))
    return bits


# ---- cost ----


def relative_cost(
    shares: Mapping[str, float], recipes: Mapping[str, str | Recipe], *,
    speeds: Mapping[int, float] = SPEEDS, dgrad: int | None = None, tail: float = 0.0,
) -> float:  # fmt: skip
    """Percent of the time of the same arithmetic in 16 bits.

        shares = block_shares(4096, 11008, context=4096)
        relative_cost(shares, {"attention": "mxfp8", "ffn": "fp4_mixed_ffn"})  # 52.33
        relative_cost(shares, {...}, speeds={16: 1, 8: 1, 4: 1.8}, tail=0.1)

    Args:
        shares: of the operations, by part; any positive scale.
        recipes: by part; a part without one runs in 16 bits.
        speeds: by bits, relative or not; must have 16. Bits without a speed, as 6, take the next
            wider one's.
        dgrad: bits that dgrad runs in, whatever the recipe says.
        tail: share of the steps that run in 16 bits at the end (`TargetPrecision`), 0 to 1.

    Raises:
        TypeError: for recipes by no names.
        ValueError: for a recipe of no part, numbers that are not positive, and speeds so far apart
            that no cost comes of it.
    """
    what = "relative_cost"
    _check_numbers(what, "shares", shares)
    _check_speeds(what, speeds)
    if not isinstance(recipes, Mapping):
        condition, advice = "be recipes by part", "Pass a dict, {} for none."
        raise TypeError(refusal(what, "recipes", condition, show(recipes), kind(recipes), advice))
    for part in recipes:
        if part not in shares:
            condition, advice = f"be of parts among {', '.join(shares)}", "Name one of these."
            raise ValueError(refusal(what, "recipes", condition, part, "a part", advice))
    if dgrad is not None and (not is_int(dgrad) or dgrad not in (4, 6, 8, 16)):
        condition, advice = "be 4, 6, 8, 16 or None", "None takes what the recipe says."
        raise ValueError(refusal(what, "dgrad", condition, show(dgrad), kind(dgrad), advice))
    if not is_number(tail) or not 0 <= tail <= 1:
        condition, advice = "lie in [0, 1]", "Pass 1 - fraction of the TargetPrecision."
        raise ValueError(refusal(what, "tail", condition, show(tail), kind(tail), advice))
    time, largest = 0.0, max(shares.values())
    whole = {part: share / largest for part, share in shares.items()}  # any scale, also near inf
    for part, share in whole.items():
        bits = gemm_bits(recipes[part]) if part in recipes else dict.fromkeys(GEMMS, 16)
        if dgrad is not None and part in recipes:
            bits["dgrad"] = dgrad
        time += share * sum(speeds[16] / _speed(speeds, b) for b in bits.values()) / len(GEMMS)
    quantized = 100 * time / sum(whole.values())
    if not 0 < quantized < math.inf:
        condition, advice = "be of one order or a few", f"The default is {SPEEDS}."
        context = f"the cost would be {quantized:g}%"
        raise ValueError(refusal(what, "speeds", condition, show(speeds), context, advice))
    return (1 - tail) * quantized + 100 * tail


def _speed(speeds: Mapping[int, float], bits: int) -> float:
    return speeds[min(b for b in speeds if b >= bits)]


def _check_numbers(what: str, argument: str, numbers: object) -> None:
    ok = isinstance(numbers, Mapping) and len(numbers) > 0
    ok = ok and all(is_number(v) and is_finite(v) and v >= 0 for v in numbers.values())
    if not ok or max(numbers.values()) <= 0:
        condition, advice = "be numbers >= 0 by name, not all 0", "See block_shares."
        raise ValueError(refusal(what, argument, condition, show(numbers), kind(numbers), advice))


def _check_speeds(what: str, speeds: object) -> None:
    ok = isinstance(speeds, Mapping) and 16 in speeds and all(is_int(b) for b in speeds)
    ok = ok and all(is_number(v) and is_finite(v) and v > 0 for v in speeds.values())
    if not ok:
        condition, advice = "be positive numbers by bits, with 16", f"The default is {SPEEDS}."
        raise ValueError(refusal(what, "speeds", condition, show(speeds), kind(speeds), advice))


# ---- of a model ----


@dataclass(frozen=True)
class CostRow:
    """The linear layers of one recipe, or what runs in 16 bits.

    Attributes:
        name: the recipe, "linear layers left" or CORE.
        layers: how many.
        share: of the model's operations.
        bits: of fprop, dgrad and wgrad.
        cost: percent of the time of these operations in 16 bits.
    """

    name: str
    layers: int
    share: float
    bits: tuple[int, int, int]
    cost: float


@dataclass(frozen=True)
class CostReport:
    """What `model_cost` found. str() makes an aligned table of it."""

    rows: tuple[CostRow, ...]
    cost: float
    tail: float

    @property
    def speedup(self) -> float:
        """All in 16 bits over this: the most that the recipes can give at these speeds."""
        return 100 / self.cost

    def __str__(self) -> str:
        head = ("recipe", "layers", "share", "fprop/dgrad/wgrad bits", "cost")
        cells = [
            (r.name, str(r.layers), f"{100 * r.share:.1f}%", "/".join(map(str, r.bits)),
             f"{r.cost:.1f}%")
            for r in self.rows
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in [head, *cells]) for i in range(len(head))]
        lines = []
        for row in [head, *cells]:
            rest = (f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([f"{row[0]:<{widths[0]}}", *rest]))
        tail = f", {100 * self.tail:g}% of the steps in 16 bits" if self.tail else ""
        summary = f"{self.cost:.2f}% of the time in 16 bits{tail}: at most {self.speedup:.2f} times"
        return "\n".join([*lines, summary])


def model_cost(
    model: nn.Module, *, context: int = 0, hidden: int = 0, attention_layers: int = 0,
    speeds: Mapping[int, float] = SPEEDS, dgrad: int | None = None, tail: float = 0.0,
) -> CostReport:  # fmt: skip
    """The cost of a converted model's linear layers and attention products: print it.

        print(mxtrain.model_cost(model, context=4096, hidden=4096, attention_layers=32))

    Args:
        model: of which each linear layer is taken to see every token once (of experts, a token sees
            a few: their share is smaller than it says).
        context, hidden, attention_layers: of the attention products, which are no modules; none of
            them leaves these out.
        speeds, dgrad, tail: as for `relative_cost`.

    Raises:
        TypeError: for something else than a model.
        ValueError: for a model without linear layers, for some but not all of context, hidden and
            attention_layers, and as `relative_cost`.
    """
    what = "model_cost"
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "Pass the model."
        condition = "be a torch.nn.Module"
        raise TypeError(refusal(what, "model", condition, got, show(model), advice))
    sizes = {"context": context, "hidden": hidden, "attention_layers": attention_layers}
    for name, value in sizes.items():
        check_int(what, name, value, low=0)
    missing = [name for name, value in sizes.items() if value == 0]
    if 0 < len(missing) < len(sizes):
        given = ", ".join(f"{name} {value}" for name, value in sizes.items() if value)
        condition, advice = "be positive where others of the three are", "Pass all three, or none."
        raise ValueError(refusal(what, missing[0], condition, 0, given, advice))
    recipes: dict[str, Recipe] = {}
    flops: dict[str, float] = {}
    layers: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            part = "linear layers left"
            if isinstance(module, MXLinear):
                part = module.recipe.name
                while recipes.setdefault(part, module.recipe) != module.recipe:
                    part += "'"  # another recipe of the same name
            size = 2 * module.in_features * module.out_features
            flops[part] = flops.get(part, 0) + size
            layers[part] = layers.get(part, 0) + 1
    core = 4 * context * hidden * attention_layers
    if core:
        flops[CORE], layers[CORE] = core, attention_layers
    if sum(flops.values()) == 0:
        condition, advice = "have a linear layer", "Pass a model with some."
        got = type(model).__name__
        raise ValueError(refusal(what, "model", condition, got, "no operations", advice))
    options = {"speeds": speeds, "dgrad": dgrad}
    cost = relative_cost(flops, recipes, **options, tail=tail)
    rows = []
    for part, flop in flops.items():
        own = {part: recipes[part]} if part in recipes else {}
        bits = gemm_bits(recipes[part]) if own else dict.fromkeys(GEMMS, 16)
        if own and dgrad is not None:
            bits["dgrad"] = dgrad
        share = flop / sum(flops.values())
        part_cost = relative_cost({part: 1.0}, own, **options)
        rows.append(CostRow(part, layers[part], share, tuple(bits.values()), part_cost))
    return CostReport(tuple(rows), cost, float(tail))
