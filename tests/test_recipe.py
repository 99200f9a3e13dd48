"""Recipes: the table, validation and its messages, alpha, serialization, the fixed signs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from common import refuses
from scipy.linalg import hadamard

from mxtrain.formats import FORMATS, HADAMARD_GROUPS
from mxtrain.recipe import (
    GEMMS,
    RECIPES,
    Fallback,
    Quantizer,
    Recipe,
    fixed_signs,
    get_recipe,
)

MXFP4 = Quantizer("mxfp4")
ROTATED = Quantizer("mxfp4", hadamard=64, signs="drawn")


def fields(recipe: Recipe) -> list[Quantizer]:
    return [getattr(recipe, field) for pair in GEMMS.values() for field in pair]


# ---- the table ----


def test_names():
    assert list(RECIPES) == [
        "bf16", "mxfp4_baseline", "tetrajet", "tetrajet_ema", "mxfp4_backward",
        "mxfp4_backward_mxfp8", "mxfp4_backward_rht", "mxfp4_backward_sr", "mxfp4_backward_plain",
        "fp4_mixed_ffn", "mxfp4_hadamard", "quartet", "mxfp8", "nvfp4", "nvfp4_rht",
        "int8_block", "int8_fallback",
    ]  # fmt: skip
    assert all(name == recipe.name and recipe.reference for name, recipe in RECIPES.items())


def test_bf16_quantizes_nothing():
    assert all(q.format is None for q in fields(RECIPES["bf16"]))


def test_baseline_is_floor_and_nearest_from_the_originals():
    assert set(fields(RECIPES["mxfp4_baseline"])) == {Quantizer("mxfp4", "floor", "nearest")}


def test_tetrajet_double_quantizes_with_stochastic_rounding():
    recipe = RECIPES["tetrajet"]
    assert {(q.format, q.scale_rule, q.hadamard) for q in fields(recipe)} == {("mxfp4", "ceil", 0)}
    assert [q.rounding for q in fields(recipe)] == ["nearest"] * 2 + ["stochastic"] * 4
    assert [q.source for q in fields(recipe)] == ["original"] * 3 + [
        "forward",
        "original",
        "forward",
    ]


def test_tetrajet_ema_differs_from_tetrajet_in_the_weight_quantizer_only():
    recipe = RECIPES["tetrajet_ema"]
    ema = recipe.ema_beta, recipe.ema_fraction, recipe.ema_warmup
    assert recipe.fprop_w.rounding == "toward" and ema == (0.998, None, 10)
    assert recipe.ema_at_half == 0.03
    tetrajet = RECIPES["tetrajet"]
    assert tetrajet == recipe.replace(
        name="tetrajet", fprop_w=tetrajet.fprop_w, ema_beta=None, ema_fraction=None,
        ema_at_half=None, reference=tetrajet.reference,
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, forward", [("mxfp4_backward", None), ("mxfp4_backward_mxfp8", "mxfp8_e4m3")]
)
def test_mxfp4_backward(name, forward):
    recipe = RECIPES[name]
    expected = Quantizer("mxfp4", "floor", "stochastic", hadamard=64, signs="drawn", prescale=0.75)
    assert set(fields(recipe)[2:]) == {expected}
    assert set(fields(recipe)[:2]) == {Quantizer(forward)}
    assert (recipe.alpha("fprop"), recipe.alpha("dgrad"), recipe.alpha("wgrad")) == (
        1,
        16 / 9,
        16 / 9,
    )


@pytest.mark.parametrize(
    "name, fields_of_backward",
    [
        ("mxfp4_backward_rht", {"rounding": "nearest", "prescale": 1.0}),
        ("mxfp4_backward_sr", {"hadamard": 0, "signs": "none"}),
        (
            "mxfp4_backward_plain",
            {"rounding": "nearest", "prescale": 1.0, "hadamard": 0, "signs": "none"},
        ),
    ],
)
def test_the_ablations_of_mxfp4_backward_differ_in_these_fields(name, fields_of_backward):
    whole, recipe = RECIPES["mxfp4_backward"], RECIPES[name]
    ablated = whole.with_quantizers(name, ("dgrad", "wgrad"), **fields_of_backward)
    assert ablated.replace(reference=recipe.reference) == recipe
    alpha = 1 if "prescale" in fields_of_backward else 16 / 9
    assert [recipe.alpha(gemm) for gemm in GEMMS] == [1, alpha, alpha]


@pytest.mark.parametrize("forward", [None, "mxfp8_e4m3"])
@pytest.mark.parametrize("g", [32, 64, 128, 256])
def test_mxfp4_backward_in_groups_of_g_with_either_forward(g, forward):
    name = f"g = {g}, {forward}"
    recipe = RECIPES["mxfp4_backward"].with_quantizers(name, ("dgrad", "wgrad"), hadamard=g)
    recipe = recipe.with_quantizers(name, "fprop", format=forward)
    assert recipe.name == name and {q.format for q in fields(recipe)[:2]} == {forward}
    assert {(q.hadamard, q.prescale, q.rounding, q.signs) for q in fields(recipe)[2:]} == {
        (g, 0.75, "stochastic", "drawn")
    }
    assert recipe.misfit(64, g) is None
    if g > 32:
        assert f"must be a multiple of {g}" in recipe.misfit(64, g // 2)


def test_with_quantizers_refuses_what_a_quantizer_or_recipe_does():
    recipe = RECIPES["mxfp4_backward"]
    with refuses(TypeError, "changes must be fields of Quantizer"):
        recipe.with_quantizers("x", "dgrad", ema_beta=0.5)
    with refuses(ValueError, "gemms must be one of fprop, dgrad, wgrad"):
        recipe.with_quantizers("x", ("dgrad", "forward"), hadamard=32)
    with refuses(ValueError, "hadamard must be one of"):
        recipe.with_quantizers("x", "dgrad", hadamard=48)
    match = "signs must be 'none' without a Hadamard, got 'drawn' .*, or signs='none' with it"
    with refuses(ValueError, match):
        recipe.with_quantizers("x", "dgrad", hadamard=0)


def test_fp4_mixed_ffn_is_fp4_forward_and_fp8_backward_from_the_originals():
    recipe = RECIPES["fp4_mixed_ffn"]
    assert set(fields(recipe)[:2]) == {Quantizer("mxfp4", "ceil")}
    assert set(fields(recipe)[2:]) == {Quantizer("mxfp8_e4m3", "ceil")}


def test_nvfp4_rotates_wgrad_and_rounds_gradients_stochastically():
    recipe = RECIPES["nvfp4"]
    assert {(q.format, q.scale_rule, q.source) for q in fields(recipe)} == {
        ("nvfp4", "even", "original")
    }
    stochastic = [q.rounding == "stochastic" for q in fields(recipe)]
    assert stochastic == [False, False, True, False, True, False]
    assert [(q.hadamard, q.signs) for q in fields(recipe)] == [(0, "none")] * 4 + [
        (16, "fixed")
    ] * 2


def test_mxfp4_hadamard_rotates_wgrad_only_and_rounds_to_nearest():
    recipe = RECIPES["mxfp4_hadamard"]
    assert {(q.format, q.rounding, q.source) for q in fields(recipe)} == {
        ("mxfp4", "nearest", "original")
    }
    rotations = [(q.hadamard, q.signs) for q in fields(recipe)]
    assert rotations == [(0, "none")] * 4 + [(32, "none")] * 2
    assert not recipe.needs_rng


def test_nvfp4_rht_has_an_unbiased_backward_of_mxfp4():
    recipe = RECIPES["nvfp4_rht"]
    assert {q.format for q in recipe.pair("fprop")} == {"nvfp4"}
    for name in ("dgrad", "wgrad"):
        dy, other = recipe.pair(name)
        assert (dy.rounding, other.rounding) == ("stochastic", "nearest")
        for q in (dy, other):
            assert (q.format, q.hadamard, q.signs, q.source) == ("mxfp4", 64, "drawn", "original")
        assert recipe.alpha(name) == 1.0  # ceil does not clip


def test_quartet_rotates_everything_and_its_backward_is_unbiased():
    recipe = RECIPES["quartet"]
    assert {(q.format, q.hadamard, q.source) for q in fields(recipe)} == {("mxfp4", 32, "original")}
    assert [q.rounding for q in fields(recipe)] == ["nearest"] * 2 + ["stochastic"] * 4
    assert [q.signs for q in fields(recipe)] == ["none"] * 2 + ["drawn"] * 4
    assert recipe.alpha("fprop") == 1 and recipe.alpha("dgrad") == recipe.alpha("wgrad") == 16 / 9


def test_int8_quantizes_each_tensor_once_and_draws_for_gradients_alone():
    """1.4 of the method: no fallback for weights and gradients, the same X again in wgrad."""
    recipe, plain = RECIPES["int8_fallback"], RECIPES["int8_block"]
    assert {q.format for q in fields(recipe)} == {"int8_block"}
    drawn = [q.rounding == "stochastic" for q in fields(recipe)]
    assert drawn == [False, False, True, False, True, False]
    assert [q.fallback for q in fields(recipe)] == [True, False, False, False, False, True]
    # W^T again from W, which has the same codes, so that nothing of W need be kept.
    assert recipe.wgrad_x.source == "forward" and recipe.dgrad_w == recipe.fprop_w
    unfallen = [dataclasses.replace(q, fallback=False) for q in fields(recipe)]
    assert unfallen == fields(plain)
    assert recipe.fallback == Fallback(0.1, 0.3, 1.3, True)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=lambda r: r.name)
def test_needs_rng(recipe):
    assert recipe.needs_rng == any(q.format and q.rounding == "stochastic" for q in fields(recipe))
    assert not recipe.fprop_needs_rng


def test_forward_stochastic_needs_rng():
    q = Quantizer("mxfp4", rounding="stochastic")
    assert Recipe("x", fprop_x=q).fprop_needs_rng and Recipe("x", fprop_x=q).needs_rng
    assert not Recipe("x", fprop_x=Quantizer(rounding="stochastic")).needs_rng


def test_get_recipe():
    recipe = Recipe("mine")
    assert get_recipe(recipe) is recipe
    assert get_recipe("tetrajet") is RECIPES["tetrajet"]
    with refuses(
        ValueError,
        match=r"mxtrain::get_recipe: recipe must be one of bf16, .*nvfp4.*, got 'tetrajett'",
    ):
        get_recipe("tetrajett")
    with refuses(TypeError, match=r"must be a name or a Recipe, got int"):
        get_recipe(4)


# ---- validation ----


BAD_QUANTIZERS = [
    ({"format": "fp4"}, r"format must be one of mxfp4, .*nvfp4, int8_block, got 'fp4'"),
    ({"scale_rule": "up"}, r"scale_rule must be one of floor, ceil, even, got 'up'"),
    ({"rounding": "up"}, r"rounding must be one of nearest, stochastic, toward, got 'up'"),
    ({"hadamard": 48}, r"hadamard must be one of 0, 16, 32, 64, 128, 256, got 48"),
    ({"hadamard": 64, "signs": "random"}, r"signs must be one of none, fixed, drawn, got"),
    ({"signs": "drawn"}, r"signs must be 'none' without a Hadamard, got 'drawn' .*Set hadamard"),
    ({"source": "again"}, r"source must be one of original, forward, got 'again'"),
    ({"prescale": 0.0}, r"prescale must be positive and finite, got 0.0"),
    ({"prescale": -1.0}, r"prescale must be positive and finite, got -1.0"),
    ({"prescale": float("nan")}, r"prescale must be positive and finite, got nan"),
    ({"prescale": float("inf")}, r"prescale must be positive and finite, got inf"),
    ({"prescale": 1e-46}, r"prescale must be positive and finite, got 1e-46 .*it is a float32"),
    ({"prescale": 1e39}, r"prescale must be positive and finite, got 1e\+39"),
    ({"prescale": 10**400}, r"prescale must be positive and finite, got 1000"),
    (
        {"format": "int8_block", "hadamard": 64},
        r"be 0, 1 and 'nearest' or .*, got \(64, 1.0, 'near",
    ),
    ({"format": "int8_block", "prescale": 0.5}, r"be 0, 1 and 'nearest' or 'stochastic' for int8"),
    ({"format": "int8_block", "rounding": "toward"}, r"be 0, 1 and 'nearest' or 'stochastic'"),
    ({"format": "int8_block", "rounding": "stochastic", "source": "forward"}, r"be 'nearest' from"),
    (
        {"format": "int8_block", "rounding": "stochastic", "fallback": True},
        r"be False but for int8",
    ),
    ({"fallback": True}, r"fallback must be False but for int8_block to nearest, got True"),
    ({"format": "int8_block", "fallback": 1}, r"fallback must be True or False, got 1"),
    ({"format": None, "hadamard": 64}, r"without a format, got \(64, 1.0, .*use Quantizer\(\)"),
    ({"format": None, "prescale": 0.75}, r"must keep their defaults without a format"),
    ({"format": None, "source": "forward"}, r"must keep their defaults without a format"),
    ({"format": None, "rounding": "toward"}, r"must keep their defaults without a format"),
]


@pytest.mark.parametrize("kwargs, message", BAD_QUANTIZERS)
def test_quantizer_rejects(kwargs, message):
    with refuses(ValueError, match="^mxtrain::Quantizer: .*" + message):
        Quantizer(**{"format": "mxfp4", **kwargs})


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"low": 0.3}, r"low, high must be shares .*, got \(0.3, 0.3\)"),
        ({"high": "1"}, r"low, high must be shares"),
        ({"high": 1.5}, r"low, high must be shares"),
        ({"factor": 1.0}, r"factor must be above 1, got 1.0"),
        ({"factor": float("inf")}, r"factor must be above 1, got inf"),
        ({"damping": 1}, r"damping must be True or False, got 1"),
    ],
)
def test_fallback_rejects(kwargs, message):
    with refuses(ValueError, match=r"^mxtrain::Fallback: " + message):
        Fallback(**kwargs)


AGAIN = Quantizer("mxfp4", source="forward")
I8 = Quantizer("int8_block")
TOWARD = Quantizer("mxfp4", rounding="toward")
PRESCALED = Quantizer("mxfp4", prescale=0.75)
BAD_RECIPES = [
    ({"name": ""}, r": name must be a non-empty string, got ''"),
    ({"accumulate": "bf16"}, r": accumulate must be one of fp32, fast, exact, got 'bf16'"),
    ({"ema_warmup": -1}, r"ema_warmup must be an int >= 0, got -1"),
    ({"ema_warmup": 1.5}, r"ema_warmup must be an int >= 0, got 1.5"),
    ({"fprop_x": "mxfp4"}, r": fprop_x must be a Quantizer, got 'mxfp4' \(recipe 'x'\)"),
    # the two quantizers of a GEMM
    (
        {"fprop_x": MXFP4, "fprop_w": Quantizer("mxfp6_e3m2")},
        r"fprop must give fprop_x and fprop_w one format, got \('mxfp4', 'mxfp6_e3m2'\)",
    ),
    (
        {"dgrad_dy": ROTATED, "dgrad_w": MXFP4},
        r"dgrad must give dgrad_dy and dgrad_w the same hadamard and signs, got .* then cancels",
    ),
    (
        {"wgrad_dy": ROTATED, "wgrad_x": dataclasses.replace(ROTATED, signs="fixed")},
        r"wgrad must give wgrad_dy and wgrad_x the same hadamard and signs",
    ),
    ({"dgrad_dy": ROTATED}, r"dgrad must give dgrad_dy and dgrad_w the same hadamard"),
    (
        {"dgrad_dy": PRESCALED},
        r"dgrad_dy and dgrad_w at prescale 1 where one of them has no format, got \(0.75, 1.0\)",
    ),
    (
        dict.fromkeys(("dgrad_dy", "dgrad_w"), Quantizer("mxfp4", prescale=1e-30)),
        r"dgrad must give dgrad_dy and dgrad_w prescales that a float32 alpha can undo",
    ),
    # double quantization
    (
        {"dgrad_dy": AGAIN, "dgrad_w": MXFP4, "fprop_w": MXFP4},
        r"dgrad_dy.source must be 'original', got 'forward' .*Only dgrad_w and wgrad_x have",
    ),
    (
        {"dgrad_dy": MXFP4, "dgrad_w": AGAIN},
        r"dgrad_w.source must be 'original' where fprop_w has no format, got 'forward' .*Give",
    ),
    (
        {"wgrad_dy": MXFP4, "wgrad_x": AGAIN, "fprop_w": MXFP4},
        r"wgrad_x.source must be 'original' where fprop_x has no format",
    ),
    (
        {"fprop_x": ROTATED, "fprop_w": ROTATED, "wgrad_dy": MXFP4, "wgrad_x": AGAIN},
        r"wgrad_x.source must be 'original' where fprop_x is rotated or prescaled",
    ),
    (
        {"fprop_x": PRESCALED, "fprop_w": PRESCALED, "dgrad_dy": MXFP4, "dgrad_w": AGAIN},
        r"dgrad_w.source must be 'original' where fprop_w is rotated or prescaled",
    ),
    # int8_block
    (
        {"fprop_w": I8, "dgrad_dy": MXFP4, "dgrad_w": AGAIN},
        r"dgrad_w.source must be 'original' where one of dgrad_w and fprop_w is int8_block",
    ),
    (
        {"fprop_w": dataclasses.replace(I8, fallback=True)},
        r"fprop_w.fallback must be False but in fprop_x, and in wgrad_x from its forward",
    ),
    (
        {"fprop_x": I8, "wgrad_x": dataclasses.replace(I8, fallback=True, source="forward")},
        r"wgrad_x.fallback must be False but in fprop_x",
    ),
    ({"fallback": 0.1}, r": fallback must be a Fallback, got 0.1"),
    # Q-EMA
    (
        {"fprop_x": TOWARD, "fprop_w": MXFP4, "ema_beta": 0.9},
        r"fprop_x.rounding must be 'nearest' or 'stochastic', got 'toward' .*Only fprop_w",
    ),
    ({"fprop_w": TOWARD}, r"ema_beta must be set if and only if fprop_w rounds 'toward', got None"),
    (
        {"fprop_w": MXFP4, "ema_beta": 0.9},
        r"ema_beta must be set if and only if .* got 0.9 .*fprop_w.rounding is 'nearest'",
    ),
    ({"ema_fraction": 0.1}, r"ema_fraction must be None without ema_beta, got 0.1"),
    (
        {"fprop_w": TOWARD, "ema_beta": 0.9, "ema_fraction": 0.0},
        r"ema_fraction must lie in \(0, 1\], got 0.0",
    ),
    (
        {"fprop_w": TOWARD, "ema_beta": 0.9, "ema_fraction": 1.5},
        r"ema_fraction must lie in \(0, 1\], got 1.5",
    ),
    ({"ema_at_half": 1.0}, r"ema_at_half must be None without ema_beta, got 1.0"),
    (
        {"fprop_w": TOWARD, "ema_beta": 0.9, "ema_at_half": 0.0},
        r"ema_at_half must lie in \(0, inf\), got 0.0",
    ),
    ({"fprop_w": TOWARD, "ema_beta": 1.0}, r"ema_beta must lie in \(0, 1\), got 1.0"),
    ({"fprop_w": TOWARD, "ema_beta": 0.0}, r"ema_beta must lie in \(0, 1\), got 0.0"),
]


@pytest.mark.parametrize("kwargs, message", BAD_RECIPES)
def test_recipe_rejects(kwargs, message):
    with refuses(ValueError, match=r"^mxtrain::Recipe.*" + message):
        Recipe(**{"name": "x", **kwargs})


def test_one_quantizer_alone_is_a_recipe():
    assert Recipe("only X", fprop_x=MXFP4).fprop_w.format is None


def test_replace_validates_and_copies():
    recipe = RECIPES["tetrajet"]
    changed = recipe.replace(accumulate="fast")
    assert (changed.accumulate, recipe.accumulate) == ("fast", "fp32")
    assert changed.fprop_x is recipe.fprop_x
    with refuses(
        ValueError, match=r"wgrad_x.source must be 'original' where fprop_x has no format"
    ):
        recipe.replace(fprop_x=Quantizer())


def test_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["tetrajet"].name = "x"
    with pytest.raises(dataclasses.FrozenInstanceError):
        MXFP4.format = None
    assert len(set(RECIPES.values())) == len(RECIPES)


# ---- derived ----


def test_alpha_undoes_both_prescales():
    a, b = Quantizer("mxfp4", prescale=0.5), Quantizer("mxfp4", prescale=0.75)
    recipe = Recipe("x", dgrad_dy=a, dgrad_w=b)
    assert recipe.alpha("dgrad") == 1 / (0.5 * 0.75)
    assert recipe.alpha("wgrad") == 1.0
    with refuses(ValueError, match="gemm must be one of fprop, dgrad, wgrad, got 'bprop'"):
        recipe.alpha("bprop")


@pytest.mark.parametrize(
    "group, in_features, out_features, axis",
    [
        (64, 100, 128, None),  # only dgrad and wgrad are rotated: in_features is free
        (64, 128, 96, "out_features = 96, padded to 96, must be a multiple of 64"),
        (64, 128, 100, None),  # 100 is padded to 128
        (128, 128, 100, None),
        (256, 128, 100, "out_features = 100, padded to 128, must be a multiple of 256"),
        (32, 128, 1, None),
        (16, 128, 1, None),
    ],
)
def test_misfit(group, in_features, out_features, axis):
    q = Quantizer("mxfp4", hadamard=group)
    recipe = Recipe("rotated", dgrad_dy=q, dgrad_w=q, wgrad_dy=q, wgrad_x=q)
    reason = recipe.misfit(in_features, out_features)
    assert (reason is None) if axis is None else axis in reason
    forward = Recipe("rotated", fprop_x=q, fprop_w=q)
    swapped = forward.misfit(out_features, in_features)
    assert (swapped is None) if axis is None else axis.replace("out", "in") in swapped


def _sign(i: int) -> int:
    return -1 if (24 * i * i + 45 * i) % 251 > 125 else 1


@pytest.mark.parametrize("group", HADAMARD_GROUPS)
def test_fixed_signs_follow_their_formula_and_touch_no_generator(group):
    state = torch.get_rng_state()
    signs = fixed_signs(group)
    assert torch.equal(state, torch.get_rng_state())
    assert signs.dtype == torch.int8 and signs.tolist() == [_sign(i + 1) for i in range(group)]
    walsh = torch.from_numpy(hadamard(group)).float() @ signs.float()
    assert walsh.abs().max() < 2.3 * group**0.5


def test_fixed_signs_are_alike_on_every_device():
    for device in ["cuda"] if torch.cuda.is_available() else []:
        assert torch.equal(fixed_signs(64, device).cpu(), fixed_signs(64))
    assert fixed_signs(64, "meta").shape == (64,)
    with refuses(ValueError, match="fixed_signs: g must be one of 16, 32, 64, 128, 256, got 8"):
        fixed_signs(8)


def test_every_format_makes_a_recipe():
    for name in FORMATS:
        q = Quantizer(name)
        assert set(fields(Recipe(name, *[q] * 6))) == {q}
