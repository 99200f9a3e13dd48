"""Recipes as text: JSON, the description, the table."""

from __future__ import annotations

import json
import re

import pytest
from common import refuses

from mxtrain.recipe import (
    GEMMS,
    RECIPES,
    Recipe,
    table,
)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_json_round_trip(recipe):
    again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
    assert again == recipe and hash(again) == hash(recipe)


def test_from_dict_names_unknown_fields():
    with refuses(
        ValueError, match=r"Recipe.from_dict: fields must be among name, .*, got \['beta'\]"
    ):
        Recipe.from_dict({"name": "x", "beta": 1})
    with refuses(
        ValueError, match=r"Recipe.from_dict: fprop_x must be among format, .*, got \['fmt'\]"
    ):
        Recipe.from_dict({"name": "x", "fprop_x": {"fmt": "mxfp4"}})
    assert Recipe.from_dict({"name": "x"}) == Recipe("x")


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_describe_has_one_line_a_gemm(recipe):
    lines = recipe.describe().splitlines()
    assert [line.split()[0] for line in lines] == list(GEMMS)
    for line, gemm in zip(lines, GEMMS, strict=True):
        for q in recipe.pair(gemm):
            assert str(q) in line
        assert ("alpha" in line) == (recipe.alpha(gemm) != 1)
    assert ("beta 0.998" in lines[0]) == (recipe.ema_beta is not None)


def test_describe_names_what_differs():
    text = RECIPES["mxfp4_backward"].describe()
    assert "unquantized" in text and "x0.75, Hadamard 64 with drawn signs" in text
    assert text.count("alpha 1.77778") == 2
    assert "W^T: mxfp4 ceil stochastic, from the forward operand" in RECIPES["tetrajet"].describe()


def test_table_is_markdown_with_one_row_a_recipe():
    rows = table().splitlines()
    assert len(rows) == len(RECIPES) + 2
    assert len({row.count("|") for row in rows}) == 1
    assert re.fullmatch(r"\|( --- \|)+", rows[1])
    for row, recipe in zip(rows[2:], RECIPES.values(), strict=True):
        assert row.startswith(f"| `{recipe.name}` |") and recipe.reference in row


# ---- fixed signs ----
