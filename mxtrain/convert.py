"""convert(model, recipe): make the linear layers of a model MXLinear, in place, with a report."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from .checks import FLOATS, check_bool, kind, refusal, show
from .linear import MXLinear
from .mix import MIXES, Mix, Pattern, Patterns, as_patterns, get_mix
from .mix import names as recipe_names
from .recipe import Recipe, get_recipe

log = logging.getLogger("mxtrain")


@dataclass(frozen=True)
class ReportedLayer:
    """One row of the report.

    Attributes:
        name: qualified name in the model, "" where the model itself is the layer.
        shape: (out_features, in_features).
        recipe: name of the recipe it was converted to, or None.
        reason: why it was left, or None.
    """

    name: str
    shape: tuple[int, int]
    recipe: str | None = None
    reason: str | None = None

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ConversionReport:
    """What convert did to each linear layer. str() makes an aligned table of it, and a summary."""

    layers: list[ReportedLayer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def converted(self) -> list[ReportedLayer]:
        """The layers that were converted."""
        return [layer for layer in self.layers if layer.recipe is not None]

    @property
    def left(self) -> list[ReportedLayer]:
        """The layers that were left, each with its reason."""
        return [layer for layer in self.layers if layer.recipe is None]

    @property
    def share(self) -> float:
        """Converted weights as a share of the weights of all linear layers, 0 to 1."""
        total = sum(layer.weights for layer in self.layers)
        return sum(layer.weights for layer in self.converted) / total if total else 0.0

    @property
    def summary(self) -> str:
        """One line: how many layers and what share of their weights were converted."""
        return (
            f"{len(self.converted)} of {len(self.layers)} linear layers converted, "
            f"{100 * self.share:.1f}% of their weights"
        )

    def __str__(self) -> str:
        rows = [("layer", "out x in", "recipe")]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            rows.append((layer.name or "(model)", shape, layer.recipe or f"- {layer.reason}"))
        wide, high = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = [f"{name:<{wide}}  {shape:>{high}}  {what}" for name, shape, what in rows]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), self.summary])


def convert(
    model: nn.Module,
    recipe: str | Recipe | Mix | Sequence[tuple[Pattern, str | Recipe]],
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    strict: bool = False,
) -> ConversionReport:
    """Turn the `nn.Linear` layers of a model into `MXLinear`, in place.

        print(mxtrain.convert(model, "tetrajet"))
        mxtrain.convert(model, [("blocks.*.mlp.*", "tetrajet"), ("*", "mxfp8")], exclude="*.gate")
        mxtrain.convert(model, "fp4_mixed")  # FP4 in the feed-forward layers, FP8 near attention

    Modules, parameters and hooks stay the objects that they are, so an optimizer that was built
    before works on. An MXLinear gets its new recipe.

    By default the first and the last layer of the model stay as they are: the first and last leaf
    module, in the order of definition, that own a parameter of two or more dimensions, where that
    is a linear layer. Naming such a layer converts it: by include, or by a pattern of the recipe
    list other than "*". A model that is itself a linear layer is converted.

    A mix (`mxtrain.MIXES`) gives each class of modules its recipe, by patterns that know how models
    call them; `get_mix("fp4_mixed").where(ffn=...)` names the layers otherwise. A class that
    matches no layer is an error, so that layers with other names are not left unseen.

    Never converted are subclasses of `nn.Linear`, which may use their weight without calling
    forward (the output projection of `nn.MultiheadAttention` does), parametrized and weight-normed
    layers, and weights that are not bfloat16, float16 or float32.

    A pattern is a shell glob for the qualified name, in which "*" also matches dots; "re:" and a
    regular expression for the whole name; or a callable (name, module) -> bool.

    Args:
        model: any module; layers on the meta device are fine.
        recipe: a name of a recipe or of a mix, a Recipe, a Mix, or (pattern, recipe) pairs of which
            the first that matches wins.
        include: convert only layers that match this pattern, or one of these.
        exclude: leave layers that match this pattern, or one of these. It wins over include.
        strict: raise, instead of leaving the layer, where a recipe does not fit its shape.

    Returns:
        A ConversionReport: print it.

    Raises:
        ValueError: for an unknown recipe, for a pattern that matches no linear layer, or with
            strict for a recipe that does not fit. The model is then unchanged.
        TypeError: for a model, recipe or pattern of another type.
    """
    if not isinstance(model, nn.Module):
        got, advice = type(model).__name__, "Pass the model; it is converted in place."
        condition = "be a torch.nn.Module"
        raise TypeError(refusal("convert", "model", condition, got, show(model), advice))
    check_bool("convert", "strict", strict)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    rules, included, excluded = _read_patterns(linears, recipe, include, exclude)
    plan = _plan(model, linears, rules, included, excluded, strict)
    report = ConversionReport()
    for name, module, chosen, reason in plan:
        if chosen is None:
            if isinstance(module, MXLinear):
                reason = f"{reason}; keeps {module.recipe.name}"
        elif isinstance(module, MXLinear):
            module.recipe = chosen
        else:
            MXLinear.from_linear(module, chosen)
        shape = (module.out_features, module.in_features)
        report.layers.append(ReportedLayer(name, shape, chosen.name if chosen else None, reason))
    report.notes.extend(_disable_fast_paths(model))
    # That nothing was converted is rarely what was meant, so it shows with logging as it comes.
    level = logging.INFO if report.converted else logging.WARNING
    log.log(level, "convert: %s", report.summary)
    return report


class _Rule(NamedTuple):
    """Layers that the pattern matches get the recipe; named: even the first and the last one."""

    pattern: Pattern
    recipe: Recipe | None
    named: bool


_NO_RULE = _Rule("*", None, False)


def _plan(
    model: nn.Module, linears: dict[str, nn.Linear], rules: list[_Rule],
    included: list[Pattern] | None, excluded: list[Pattern], strict: bool,
) -> list[tuple[str, nn.Linear, Recipe | None, str | None]]:  # fmt: skip
    """(name, layer, its recipe or None, why it is left or None), without changing anything."""
    ends = _ends(model)
    plan: list[tuple[str, nn.Linear, Recipe | None, str | None]] = []
    for name, module in linears.items():
        _, chosen, named = next(
            (rule for rule in rules if _matches([rule.pattern], name, module)), _NO_RULE
        )
        if _matches(excluded, name, module):
            reason = "excluded"
        elif included is not None and not _matches(included, name, module):
            reason = "not included"
        elif chosen is None:
            reason = "no pattern of the recipe matches"
        else:
            reason = _unsupported(module)
            if reason is None and name in ends and included is None and not named:
                reason = f"{ends[name]} layer of the model; name it to convert it"
            if reason is None:
                reason = chosen.misfit(module.in_features, module.out_features)
                if strict and reason is not None:
                    context = f"recipe {chosen.name!r}"
                    advice = "Exclude the layer, give it another recipe, or leave strict off."
                    condition = f"fit layer {name!r}"
                    raise ValueError(
                        refusal("convert", "recipe", condition, reason, context, advice)
                    )
        plan.append((name, module, chosen if reason is None else None, reason))
    return plan


# ---- what may be converted ----


def _unsupported(module: nn.Linear) -> str | None:
    """Why this linear layer cannot be an MXLinear, or None where it can."""
    if parametrize.is_parametrized(module) or "weight" not in module._parameters:
        return "its weight is parametrized"
    if isinstance(module.weight, UninitializedParameter):
        return "its weight is uninitialized; run a forward first"
    if type(module) not in (nn.Linear, MXLinear):
        return f"{type(module).__name__}, a subclass that may use its weight elsewhere"
    if module.weight.dtype not in FLOATS:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}"
    return None


def _ends(model: nn.Module) -> dict[str, str]:
    """Which linear layers are the "first" and the "last" leaf that owns a matrix."""
    leaves: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear)  # a leaf, parametrized or not
        matrix = any(map(_is_matrix, module.parameters(recurse=False)))
        if linear or (matrix and next(module.children(), None) is None):
            leaves.append((name, module))
    ends = {leaves[-1]: "last", leaves[0]: "first"} if leaves else {}
    return {name: end for (name, m), end in ends.items() if name and isinstance(m, nn.Linear)}


def _is_matrix(parameter: nn.Parameter) -> bool:
    return isinstance(parameter, UninitializedParameter) or parameter.dim() >= 2


def _disable_fast_paths(model: nn.Module) -> list[str]:
    """Stop nn.TransformerEncoderLayer from using converted weights behind their layers' backs.

    In evaluation it hands the weights of linear1 and linear2 to one fused op, unless, among other
    things, activation_relu_or_gelu is 0; and nn.TransformerEncoder feeds it nested tensors, which
    nothing but that op takes, unless use_nested_tensor is False.
    """
    notes = []
    for name, module in model.named_modules():
        if not any(isinstance(m, MXLinear) for m in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer) and module.activation_relu_or_gelu:
            module.activation_relu_or_gelu = 0
            notes.append(
                f"{name or '(model)'}: evaluation no longer takes the fast path of "
                f"{type(module).__name__}, which would bypass the converted layers"
            )
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return notes


# ---- patterns ----


def _read_patterns(
    linears: dict[str, nn.Linear],
    recipe: str | Recipe | Mix | Sequence[tuple[Pattern, str | Recipe]],
    include: Patterns | None,
    exclude: Patterns | None,
) -> tuple[list[_Rule], list[Pattern] | None, list[Pattern]]:
    """The rules, include and exclude as lists; each pattern matches some layer."""
    rules = _read_mix(linears, recipe) or _read_rules(linears, recipe)
    included = None if include is None else as_patterns(include)
    if included == []:
        condition = "name at least one pattern, or be left out"
        advice = "Without include, every linear layer but the first and the last is converted."
        raise ValueError(
            refusal("convert", "include", condition, show(include), kind(include), advice)
        )
    excluded = [] if exclude is None else as_patterns(exclude)
    _check_match("include", included or [], linears)
    _check_match("exclude", excluded, linears)
    return rules, included, excluded


def _read_rules(linears: dict[str, nn.Linear], recipe: object) -> list[_Rule]:
    if isinstance(recipe, (str, Recipe)):
        recipe = [("*", recipe)]
    pairs = isinstance(recipe, (list, tuple)) and len(recipe) > 0
    if not pairs or not all(isinstance(rule, (list, tuple)) and len(rule) == 2 for rule in recipe):
        condition = "be a name, a Recipe, a Mix, or a list of (pattern, recipe)"
        advice = f"The names: {', '.join(recipe_names())}."
        raise TypeError(refusal("convert", "recipe", condition, show(recipe), kind(recipe), advice))
    rules = [_Rule(pattern, get_recipe(r), pattern != "*") for pattern, r in recipe]
    _check_match("recipe", (rule.pattern for rule in rules if rule.named), linears)
    return rules


def _read_mix(linears: dict[str, nn.Linear], recipe: object) -> list[_Rule]:
    """The rules of a mix, of which every class that has patterns matches a layer; [] for others."""
    if not isinstance(recipe, Mix) and not (isinstance(recipe, str) and recipe in MIXES):
        return []
    mix = get_mix(recipe)
    rules = [_Rule(p, c.recipe, False) for c in mix.classes for p in c.patterns]
    for rule in rules:
        _check_pattern("recipe", rule.pattern)
    for c in mix.classes:
        hit = any(_matches(c.patterns, name, module) for name, module in linears.items())
        if c.patterns and not hit:
            condition = f"match some layer as {c.name} of {mix.name}"
            context = f"the linear layers: {', '.join(linears) or 'none'}"
            advice = f"Name them: get_mix({mix.name!r}).where({c.name}=...), [] for none."
            got = ", ".join(map(show, c.patterns))
            raise ValueError(refusal("convert", "recipe", condition, got, context, advice))
    return rules


def _matches(patterns: Iterable[Pattern], name: str, module: nn.Module) -> bool:
    for pattern in patterns:
        if callable(pattern):
            hit = pattern(name, module)
        elif pattern.startswith("re:"):
            hit = re.fullmatch(pattern[3:], name)
        else:
            hit = fnmatch.fnmatchcase(name, pattern)
        if hit:
            return True
    return False


def _check_pattern(what: str, pattern: object) -> None:
    advice = "A string is a shell glob, or a regular expression after 're:'."
    if not isinstance(pattern, str) and not callable(pattern):
        condition = "be made of strings or callables"
        raise TypeError(refusal("convert", what, condition, show(pattern), kind(pattern), advice))
    if isinstance(pattern, str) and pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            condition = "be a regular expression after 're:'"
            message = refusal("convert", what, condition, show(pattern), error, "Correct it.")
            raise ValueError(message) from None


def _check_match(what: str, patterns: Iterable[Pattern], linears: dict[str, nn.Linear]) -> None:
    for pattern in patterns:
        _check_pattern(what, pattern)
        if not any(_matches([pattern], name, module) for name, module in linears.items()):
            condition = "match a linear layer of the model"
            context = f"the linear layers: {', '.join(linears) or 'none'}"
            advice = "Correct the pattern, or leave it out."
            raise ValueError(refusal("convert", what, condition, show(pattern), context, advice))
