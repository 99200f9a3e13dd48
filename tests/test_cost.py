"""The cost model: the paper's numbers (specs, Z4), its parameters, the table of a model."""

from __future__ import annotations

import itertools

import pytest
from common import refuses
from test_convert import Model
from torch import nn

from mxtrain import convert
from mxtrain.cost import CORE, block_shares, gemm_bits, model_cost, relative_cost
from mxtrain.recipe import Quantizer, Recipe

SHARES = block_shares(4096, 11008, 4096)  # LLaMA-7B
FORMAT = {4: "mxfp4", 8: "mxfp8_e4m3", 16: None}


def recipe(forward: int, backward: int) -> Recipe:
    f, b = Quantizer(FORMAT[forward]), Quantizer(FORMAT[backward])
    return Recipe(f"{forward}/{backward}", f, f, b, b, b, b)


def cost(attention: int, ffn: int, backward: int, **options) -> float:
    """Of a block with these bits forward, in both kinds of layers, and backward."""
    parts = {"attention": recipe(attention, backward), "ffn": recipe(ffn, backward)}
    return relative_cost(SHARES, parts, **options)


def test_z4_shares():
    expected = {"ffn": 0.5733, "attention": 0.2844, CORE: 0.1422}
    assert pytest.approx(expected, abs=5e-5) == SHARES
    assert pytest.approx({"ffn": 4 / 7, "attention": 2 / 7, CORE: 1 / 7}, abs=5e-3) == SHARES
    gelu = block_shares(1024, 4096, 1024, gated=False)
    assert gelu == pytest.approx({"attention": 8 / 28, "ffn": 16 / 28, CORE: 4 / 28})


SPEED_SETS = [{16: 1, 8: 2, 4: 4}, {16: 1, 8: 1.4, 4: 2}, {16: 1, 8: 1.5, 4: 2}]


@pytest.mark.parametrize(
    "bits, expected",
    [
        ((4, 4, 4), (35.67, 57.11, 57.11)), ((4, 4, 8), (49.96, 69.37, 66.64)),
        ((8, 4, 8), (52.33, 71.40, 68.22)), ((4, 8, 8), (54.74, 73.46, 69.83)),
        ((8, 8, 8), (57.11, 75.49, 71.41)), ((16, 16, 16), (100, 100, 100)),
    ],
)  # fmt: skip
def test_z4_costs(bits, expected):
    for speeds, value in zip(SPEED_SETS, expected, strict=True):
        assert cost(*bits, speeds=speeds) == pytest.approx(value, abs=6e-3)


def test_z4_order_and_exactness():
    rows = [(4, 4, 4), (4, 4, 8), (8, 4, 8), (4, 8, 8), (8, 8, 8), (16, 16, 16)]
    for speeds in SPEED_SETS:
        costs = [cost(*bits, speeds=speeds) for bits in rows]
        assert all(a < b for a, b in itertools.pairwise(costs))
        assert costs[-1] == 100
    parts = {"attention": "mxfp8", "ffn": "fp4_mixed_ffn"}
    assert relative_cost(SHARES, parts) == cost(8, 4, 8)


def test_z4_tail_dgrad_and_other_speeds():
    whole = cost(8, 4, 8)
    assert cost(8, 4, 8, tail=0.1) == pytest.approx(0.9 * whole + 10)
    assert cost(8, 4, 8, tail=1) == 100
    # the paper's 57.1 for all FP4, read as dgrad in 16 bits: exactly 4/7 of 3/3 and 3/7 of core
    assert cost(4, 4, 4, dgrad=16) == pytest.approx(
        100 * (1 - SHARES[CORE]) * (0.25 + 1 + 0.25) / 3 + 100 * SHARES[CORE]
    )
    assert cost(8, 4, 8, speeds={16: 500, 8: 500, 4: 900}) == pytest.approx(
        100 - SHARES["ffn"] * 100 / 3 * (1 - 5 / 9)
    )
    six = Recipe("fp6", *[Quantizer("mxfp6_e3m2")] * 6)
    assert relative_cost({"all": 1}, {"all": six}) == 50  # at the speed of 8 bits


def test_bits_of_a_gemm_are_those_of_its_wider_operand():
    one = Recipe("x only", fprop_x=Quantizer("mxfp4"))
    assert gemm_bits(one) == {"fprop": 16, "dgrad": 16, "wgrad": 16}
    assert gemm_bits("fp4_mixed_ffn") == {"fprop": 4, "dgrad": 8, "wgrad": 8}
    assert gemm_bits("mxfp4_backward") == {"fprop": 16, "dgrad": 4, "wgrad": 4}
    assert gemm_bits("int8_fallback") == {"fprop": 8, "dgrad": 8, "wgrad": 8}


def test_model_cost():
    model = Model(64)
    convert(model, "fp4_mixed")
    report = model_cost(model, context=5, hidden=64, attention_layers=2, tail=0.1)
    rows = {row.name: row for row in report.rows}
    assert {name: row.layers for name, row in rows.items()} == {
        "linear layers left": 2, "mxfp8": 4, "fp4_mixed_ffn": 4, CORE: 2,
    }  # fmt: skip
    flops = {"mxfp8": 2 * 2 * 6 * 64**2, "fp4_mixed_ffn": 2 * 2 * 4 * 64**2,
             "linear layers left": 2 * 26 * 64, CORE: 2 * 4 * 5 * 64}  # fmt: skip
    total = sum(flops.values())
    assert {name: row.share for name, row in rows.items()} == pytest.approx(
        {name: f / total for name, f in flops.items()}
    )
    assert rows["mxfp8"].bits == (8, 8, 8) and rows["mxfp8"].cost == 50
    assert rows["fp4_mixed_ffn"].bits == (4, 8, 8)
    assert rows["fp4_mixed_ffn"].cost == pytest.approx(125 / 3)
    assert rows[CORE].cost == rows["linear layers left"].cost == 100
    assert report.cost == pytest.approx(0.9 * sum(row.share * row.cost for row in report.rows) + 10)
    text = str(report)
    assert len({len(line) for line in text.splitlines()[:-1]}) == 1  # aligned
    assert text.splitlines()[-1] == (
        f"{report.cost:.2f}% of the time in 16 bits, 10% of the steps in 16 bits: "
        f"at most {report.speedup:.2f} times"
    )


def test_recipes_of_one_name_are_rows_of_their_own():
    model = Model()
    convert(model, [("*.attn.*", recipe(4, 4).replace(name="x")),
                    ("*.mlp.*", recipe(8, 8).replace(name="x"))])  # fmt: skip
    rows = {row.name: row.bits for row in model_cost(model).rows}
    assert rows["x"] == (4, 4, 4) and rows["x'"] == (8, 8, 8)


def test_shares_of_any_scale():
    """Of sums that no float holds, too."""
    recipes = {"a": "mxfp4_baseline"}
    for unit in (1e-320, 1.0, 1e308, 10**300):
        assert relative_cost({"a": unit, "b": unit}, recipes) == pytest.approx(62.5)


def test_errors():
    with refuses(ValueError, "recipes must be of parts among attention, ffn"):
        relative_cost(SHARES, {"mlp": "mxfp8"})
    with refuses(ValueError, "shares must be numbers >= 0"):
        relative_cost({"a": -1.0}, {})
    with refuses(ValueError, "speeds must be positive numbers by bits, with 16"):
        relative_cost(SHARES, {}, speeds={8: 2})
    for none in (None, ["ffn"], 5):
        with refuses(TypeError, "recipes must be recipes by part, got"):
            relative_cost({"ffn": 1}, none)
    for speeds in ({16: 1e308, 4: 1e-308}, {16: 1e-308, 4: 1e308}):
        with refuses(ValueError, "speeds must be of one order or a few"):
            relative_cost({"ffn": 1}, {"ffn": "mxfp4_baseline"}, speeds=speeds)
    with refuses(ValueError, "dgrad must be 4, 6, 8, 16 or None"):
        relative_cost(SHARES, {}, dgrad=5)
    with refuses(ValueError, r"tail must lie in \[0, 1\]"):
        relative_cost(SHARES, {}, tail=2)
    with refuses(ValueError, "hidden must be positive"):
        block_shares(0, 0, 5)
    with refuses(TypeError, "hidden must be an int"):
        block_shares(1.5, 0, 5)
    with refuses(TypeError, "model must be a torch.nn.Module"):
        model_cost("model")
    with refuses(ValueError, "model must have a linear layer"):
        model_cost(nn.ReLU())
    with refuses(ValueError, "hidden must be positive where others of the three are, got 0"):
        model_cost(nn.Linear(2, 2), context=128)
    with refuses(ValueError, "attention_layers must be positive where others of the three are"):
        model_cost(nn.Linear(2, 2), context=128, hidden=64)
