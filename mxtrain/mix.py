"""Mixes: a recipe for each class of modules of a model. Data, which mxtrain.convert reads.

A mix is an ordered tuple of module classes; the first of whose patterns matches the name of a
linear layer gives it its recipe, and layers that none matches stay as they are. A new mix is one
more entry of `MIXES`, or a `Mix` built anywhere and passed to convert.

`fp4_mixed` is the map of arXiv 2502.11458: the feed-forward layers, which hold most of a block's
arithmetic, multiply FP4 forward; the projections next to the attention product FP8, because FP4
there flattens the attention scores; both backward GEMMs FP8 everywhere, from the high-precision
X, W and dY, because gradients underflow in FP4. The attention product itself, norms, embeddings and
the head stay in the compute dtype. The paper's scales are float32 for a group of 128; these are
E8M0 for a block of 32, which tensor cores take.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from .checks import check_name, kind, refusal, show
from .recipe import RECIPES, Recipe, get_recipe

Pattern = str | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]


def as_patterns(patterns: Patterns) -> list[Pattern]:
    """One pattern, or several, as a list."""
    many = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    return list(patterns) if many else [patterns]


@dataclass(frozen=True)
class ModuleClass:
    """The layers of one kind and their recipe.

    Attributes:
        name: how `Mix.where` calls the class; an identifier.
        recipe: a Recipe, or the name of one.
        patterns: what names its layers, as `convert` takes patterns; none: the model has no such
            layers.
    """

    name: str
    recipe: Recipe
    patterns: tuple[Pattern, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            condition, advice = "be an identifier", 'Choose one such as "ffn".'
            got, context = show(self.name), kind(self.name)
            raise ValueError(refusal("ModuleClass", "name", condition, got, context, advice))
        object.__setattr__(self, "recipe", get_recipe(self.recipe))
        object.__setattr__(self, "patterns", tuple(as_patterns(self.patterns)))


@dataclass(frozen=True)
class Mix:
    """A recipe for each class of modules. Immutable.

        convert(model, "fp4_mixed")
        convert(model, get_mix("fp4_mixed").where(ffn="*.experts.*", attention=["*.wq", "*.wo"]))

    Attributes:
        name: how reports call it.
        classes: the first that matches a layer wins.
        reference: where it was published.

    Raises:
        ValueError: for no classes, or two of one name.
    """

    name: str
    classes: tuple[ModuleClass, ...]
    reference: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        names = [c.name for c in self.classes]
        if not names or len(set(names)) < len(names):
            condition, advice = "be at least one, each of its own name", "Rename or add one."
            context = f"mix {self.name!r}"
            raise ValueError(refusal("Mix", "classes", condition, names, context, advice))

    def where(self, **patterns: Patterns) -> Mix:
        """A copy in which these patterns, one or several a class, name the layers of the classes.

        No patterns, `ffn=[]`, says that the model has no layers of that class. Raises ValueError
        for the name of another class.
        """
        names = [c.name for c in self.classes]
        for name in patterns:
            check_name("Mix.where", "class", name, names)
        classes = (
            dataclasses.replace(c, patterns=patterns.get(c.name, c.patterns)) for c in self.classes
        )
        return dataclasses.replace(self, classes=tuple(classes))

    def describe(self) -> str:
        """One line a class: its recipe and its patterns."""
        width = max(len(c.name) for c in self.classes)
        return "\n".join(
            f"{c.name:<{width}}  {c.recipe.name}: {', '.join(map(str, c.patterns)) or 'no layers'}"
            for c in self.classes
        )


# ---- the table ----

# What the projections next to an attention product are called: what is inside a module named after
# attention, unless in a feed-forward module in it, and query, key and value by their usual names.
# Then what feed-forward layers are called, inside a module of such a name or by themselves; not the
# router of experts, whose few outputs decide where tokens go. Matched in any case.
_FFN = r"(mlp|ffn?|\w*feed_?forward\w*|densereludense|experts?|shared_expert\w*|block_sparse_moe)"
_IN_ATTENTION = rf"re:(?i)(.*\.)?\w*(attn|attention)\w*(\.(?!(.*\.)?{_FFN}(\.|$)).*)?"
_PROJECTION = r"re:(?i)(.*\.)?([qkv]_proj|to_[qkv]|w[qkv]|w?qkv(_proj)?|query_key_value)"
_IN_FFN = rf"re:(?i)(.*\.)?{_FFN}(\.(?!(.*\.)?(gate|router|wg)$).*)?"
_FFN_LAYER = (
    r"re:(?i)(.*\.)?(fc[12]|linear[12]|(gate|up|down|gate_up)_proj|dense_4?h_to_4?h"
    r"|intermediate\.dense|layers?\.\d+\.output\.dense)"
)

MIXES: dict[str, Mix] = {
    "fp4_mixed": Mix(
        "fp4_mixed",
        (
            ModuleClass("attention", "mxfp8", (_IN_ATTENTION, _PROJECTION)),
            ModuleClass("ffn", "fp4_mixed_ffn", (_IN_FFN, _FFN_LAYER)),
        ),
        "Zhou et al., Towards Efficient Pre-training: Exploring FP4 Precision, arXiv 2502.11458",
    ),
}
"""Every named mix."""


def get_mix(mix: str | Mix) -> Mix:
    """The mix of that name; a Mix is returned as it is. ValueError, with the names, for another."""
    if isinstance(mix, Mix):
        return mix
    check_name("get_mix", "mix", mix, MIXES)
    return MIXES[mix]


def names() -> list[str]:
    """What `convert` takes by name: the recipes, then the mixes."""
    return [*RECIPES, *MIXES]


def table() -> str:
    """The named mixes as a markdown table, for the README."""
    rows = [("mix", "class", "recipe", "reference"), ("---",) * 4]
    for mix in MIXES.values():
        for c in mix.classes:
            rows.append((f"`{mix.name}`", c.name, f"`{c.recipe.name}`", mix.reference))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
