"""convert: which layers and why, patterns, the fast path of nn.Transformer, the report."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from common import refuses
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from mxtrain.convert import ConversionReport, convert
from mxtrain.linear import MXLinear
from mxtrain.recipe import RECIPES, Quantizer, Recipe


class Block(nn.Module):
    def __init__(self, d=64):
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(d, 3 * d), "proj": nn.Linear(3 * d, d)})
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x):
        x = x + self.attn["proj"](self.attn["qkv"](self.norm(x)))
        return x + self.mlp(x)


class Model(nn.Module):
    """As a ViT: first a linear embedding, last a linear head, between them blocks."""

    def __init__(self, d=64):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(5, d))
        self.embed = nn.Linear(16, d)
        self.blocks = nn.Sequential(Block(d), Block(d))
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x) + self.position)))


BLOCKS = [
    f"blocks.{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")
]
EVERY = ["embed", *BLOCKS, "head"]


def recipes(model: nn.Module) -> dict[str, str]:
    """Names of the converted layers and their recipes."""
    return {n: m.recipe.name for n, m in model.named_modules() if isinstance(m, MXLinear)}


def names(layers) -> list[str]:
    return [layer.name for layer in layers]


# ---- which layers ----


@pytest.mark.parametrize("name", RECIPES)
def test_everything_but_the_first_and_the_last_layer(name):
    model = Model()
    report = convert(model, name)
    assert recipes(model) == dict.fromkeys(BLOCKS, name)
    assert names(report.converted) == BLOCKS and names(report.left) == ["embed", "head"]
    assert [layer.reason for layer in report.left] == [
        "first layer of the model; name it to convert it",
        "last layer of the model; name it to convert it",
    ]
    model(torch.randn(2, 5, 16)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_recipe_of_ones_own():
    model = Model()
    convert(model, RECIPES["mxfp8"].replace(name="mine"))
    assert recipes(model) == dict.fromkeys(BLOCKS, "mine")


def test_an_embedding_or_convolution_is_the_first_layer():
    for first in (nn.Embedding(10, 64), nn.Conv2d(3, 64, 2)):
        model = nn.Sequential(first, nn.Linear(64, 64), nn.Linear(64, 64))
        assert names(convert(model, "tetrajet").converted) == ["1"]
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU())
    assert names(convert(model, "tetrajet").converted) == []  # neither norm nor ReLU has a matrix


def test_a_model_that_is_a_linear_layer():
    model = nn.Linear(64, 32)
    weight = model.weight
    report = convert(model, "tetrajet")
    assert type(model) is MXLinear and model.weight is weight
    assert names(report.converted) == [""] and "(model)" in str(report)


def test_include_names_what_it_matches():
    model = Model()
    report = convert(model, "tetrajet", include=["blocks.*.mlp.*", "head"])
    chosen = ["blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2", "head"]
    assert list(recipes(model)) == chosen
    assert {layer.reason for layer in report.left} == {"not included"}
    model = Model()
    convert(model, "tetrajet", include="*")
    assert list(recipes(model)) == EVERY


def test_exclude_wins_over_include():
    model = Model()
    report = convert(model, "tetrajet", include="*", exclude=["*.qkv", "embed"])
    assert list(recipes(model)) == [n for n in EVERY if "qkv" not in n and n != "embed"]
    assert {layer.reason for layer in report.left} == {"excluded"}


def test_the_first_pattern_of_a_recipe_list_wins():
    model = Model()
    rules = [("blocks.0.mlp.*", "mxfp8"), ("re:blocks\\.\\d\\.mlp.*", "nvfp4"), ("*", "tetrajet")]
    convert(model, rules)
    assert recipes(model) == {
        n: "tetrajet" if "attn" in n else "mxfp8" if n.startswith("blocks.0") else "nvfp4"
        for n in BLOCKS
    }


def test_a_recipe_list_names_the_ends_unless_by_the_catch_all():
    model = Model()
    convert(model, [("head", "mxfp8"), ("*", "tetrajet")])
    assert recipes(model) == {**dict.fromkeys(BLOCKS, "tetrajet"), "head": "mxfp8"}
    model = Model()
    report = convert(model, [("blocks.*", "tetrajet")])
    assert recipes(model) == dict.fromkeys(BLOCKS, "tetrajet")
    assert {layer.reason for layer in report.left} == {"no pattern of the recipe matches"}


def test_patterns_are_globs_regular_expressions_or_callables():
    for pattern in (
        "*.mlp.[02]",
        "re:.*mlp.*",
        lambda name, module: module.out_features in (64, 128) and ".mlp." in name,
    ):
        model = Model()
        convert(model, "tetrajet", include=pattern)
        assert list(recipes(model)) == [n for n in BLOCKS if "mlp" in n]
    with refuses(ValueError, match="include must match"):
        convert(Model(), "tetrajet", include="re:mlp")  # matches the whole name or nothing
    with refuses(ValueError, match="include must match"):
        convert(Model(), "tetrajet", include="Blocks.*")  # case matters on every platform


def test_a_pattern_that_matches_nothing_is_an_error_that_lists_the_layers():
    model = Model()
    message = r"mxtrain::convert: {} must match a linear layer of the model, got '{}' \(the linear "
    for kwargs, what, pattern in (
        ({"include": "block.*"}, "include", r"block\.\*"),
        ({"exclude": ["head", "heads"]}, "exclude", "heads"),
        ({"recipe": [("mlp", "mxfp8"), ("*", "tetrajet")]}, "recipe", "mlp"),
    ):
        with refuses(ValueError, match=message.format(what, pattern) + "layers: embed, bl"):
            convert(model, **{"recipe": "tetrajet", **kwargs})
    with refuses(ValueError, match=r"include must name at least one pattern, or be left out, got"):
        convert(model, "tetrajet", include=[])
    with refuses(ValueError, match="include must match a linear layer"):
        convert(model, "tetrajet", include=lambda name, module: False)
    with refuses(ValueError, match="recipe must be one of bf16"):
        convert(model, [("head", "mxfp8"), ("*", "tetra")])
    assert recipes(model) == {}
    with refuses(ValueError, match="the linear layers: none"):
        convert(nn.ReLU(), "tetrajet", include="x")


# ---- identity ----


def test_objects_keep_their_identity():
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modules, parameters = list(model.modules()), list(model.parameters())
    calls = []
    model.blocks[0].mlp[0].register_forward_hook(lambda *_: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    convert(model, "tetrajet")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(torch.randn(2, 5, 16)).sum().backward()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(model.blocks[0].mlp[0].weight, before["blocks.0.mlp.0.weight"])
    Model().load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(before, strict=True)


def test_a_converted_model_may_be_converted_again():
    model = Model()
    convert(model, "tetrajet_ema", include="*")
    assert "head.weight_ema" in model.state_dict()
    report = convert(model, "mxfp8")
    assert recipes(model) == {
        n: "mxfp8" if n in BLOCKS else "tetrajet_ema" for n in EVERY
    }  # fmt: skip
    assert report.left[0].reason.endswith("name it to convert it; keeps tetrajet_ema")
    assert "blocks.0.mlp.0.weight_ema" not in model.state_dict()


def test_q_ema_of_a_converted_model_follows_its_optimizer():
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    convert(model, "tetrajet_ema")
    for _ in range(11):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 16)).square().sum().backward()
        optimizer.step()
    layers = [m for m in model.modules() if isinstance(m, MXLinear)]
    assert all(m._ema_updates == 11 and m.ema_active for m in layers)


def test_shared_modules_are_one_layer():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(nn.Linear(64, 64), shared, shared, nn.Linear(64, 64))
    assert names(convert(model, "tetrajet").layers) == ["0", "1", "3"]
    assert isinstance(model[2], MXLinear)


def test_meta():
    with torch.device("meta"):
        model = Model()
    convert(model, "tetrajet_ema")
    assert model(torch.empty(2, 5, 16, device="meta")).shape == (2, 5, 10)
    model.to_empty(device="cpu").load_state_dict(Model().state_dict(), strict=True)
    assert model(torch.randn(2, 5, 16)).isfinite().all()


# ---- what is never converted ----


def ends(*modules: nn.Module) -> nn.Sequential:
    """The modules between a first and a last layer."""
    return nn.Sequential(nn.Linear(64, 64), *modules, nn.Linear(64, 64))


class Subclass(nn.Linear):
    pass


@pytest.mark.parametrize(
    "module, reason",
    [
        (Subclass(64, 64), "Subclass, a subclass that may use its weight elsewhere"),
        (parametrizations.weight_norm(nn.Linear(64, 64)), "its weight is parametrized"),
        (parametrizations.orthogonal(nn.Linear(64, 64)), "its weight is parametrized"),
        (spectral_norm(nn.Linear(64, 64)), "its weight is parametrized"),
        (prune.random_unstructured(nn.Linear(64, 64), "weight", 0.5), "its weight is parametrized"),
        (nn.LazyLinear(64), "its weight is uninitialized; run a forward first"),
        (nn.Linear(64, 64, dtype=torch.float64), "its weight is float64"),
    ],
)
def test_what_is_left(module, reason):
    model = ends(module)
    kind = type(module)
    report = convert(model, "tetrajet", include="*")
    assert names(report.left) == ["1"] and report.left[0].reason == reason
    assert type(module) is kind and names(report.converted) == ["0", "2"]


def test_integer_weights_are_left():
    module = nn.Linear(64, 64)
    module.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)
    assert convert(ends(module), "tetrajet").left[1].reason == "its weight is int8"


def test_a_lazy_layer_is_converted_once_it_is_initialized():
    model = ends(nn.LazyLinear(64))
    model(torch.randn(2, 64))
    assert names(convert(model, "tetrajet").converted) == ["1"]


def test_a_parametrized_last_layer_still_is_the_last():
    model = nn.Sequential(nn.Linear(64, 64), parametrizations.weight_norm(nn.Linear(64, 64)))
    model.insert(1, nn.Linear(64, 64))
    assert names(convert(model, "tetrajet").converted) == ["1"]


def test_multihead_attention_keeps_its_projection():
    """It uses the weight of out_proj without calling it."""
    model = ends(nn.ModuleDict({"attn": nn.MultiheadAttention(64, 4)}))
    report = convert(model, "tetrajet", include="*")
    assert "NonDynamicallyQuantizableLinear" in report.left[0].reason
    assert names(report.left) == ["1.attn.out_proj"]


def test_a_recipe_that_does_not_fit_is_reported_or_raises():
    model = ends(nn.Linear(64, 96), nn.Linear(96, 100), nn.Linear(100, 64))
    reason = (
        "out_features = 96, padded to 96, must be a multiple of 64, the Hadamard group of dgrad"
    )
    with refuses(ValueError, match=f"recipe must fit layer '1', got {reason}.*Exclude the"):
        convert(model, "mxfp4_backward", strict=True)
    assert recipes(model) == {}
    report = convert(model, "mxfp4_backward")
    assert list(recipes(model)) == ["2", "3"]  # 100 is padded to 128
    assert report.left[1].name == "1" and report.left[1].reason.startswith(reason)
    convert(model, "mxfp4_backward", strict=True, exclude="1")
    rotated = Quantizer("mxfp4", hadamard=64)
    forward = Recipe("forward", fprop_x=rotated, fprop_w=rotated)
    reason = convert(ends(nn.Linear(96, 64)), forward).left[1].reason
    assert reason.startswith("in_features = 96, padded to 96, must be a multiple of 64")


# ---- nn.TransformerEncoderLayer ----


def encoder_layer(**kwargs) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(64, 4, 128, 0.0, batch_first=True, **kwargs)


def calls_of(model: nn.Module, x: torch.Tensor, **kwargs) -> tuple[list[str], torch.Tensor]:
    """Converted layers that a forward went through, found without hooks: they disable the path."""
    calls = []
    forward = MXLinear.forward

    def counted(self, x):
        calls.append(next(n for n, m in model.named_modules() if m is self))
        return forward(self, x)

    MXLinear.forward = counted
    try:
        with torch.no_grad():
            return calls, model.eval()(x, **kwargs)
    finally:
        MXLinear.forward = forward


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_evaluation_goes_through_the_converted_layers(activation):
    torch.manual_seed(0)
    layer = encoder_layer(activation=activation)
    x = torch.randn(2, 5, 64)
    plain = copy.deepcopy(layer)
    report = convert(layer, "tetrajet", include=["linear1", "linear2"])
    assert report.notes == [
        "(model): evaluation no longer takes the fast path of TransformerEncoderLayer, which would "
        "bypass the converted layers"
    ]
    calls, y = calls_of(layer, x)
    assert calls == ["linear1", "linear2"]
    with torch.no_grad():
        assert not torch.allclose(y, plain.eval()(x), atol=1e-3)  # quantized, so different
        layer.train()
        torch.testing.assert_close(y, layer(x))  # as in training
    assert convert(layer, "mxfp8", include="linear*").notes == []


def test_an_encoder_with_a_padding_mask_feeds_no_nested_tensor():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(encoder_layer(), num_layers=2)
    x = torch.randn(2, 5, 64)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    report = convert(encoder, "bf16", include=["*.linear1", "*.linear2"])
    assert len(report.notes) == 2 and report.notes[0].startswith("layers.0: evaluation no longer")
    calls, y = calls_of(encoder, x, src_key_padding_mask=mask)
    assert calls == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    encoder.train()
    torch.testing.assert_close(y, encoder(x, src_key_padding_mask=mask).detach())


def test_an_unconverted_encoder_layer_keeps_its_fast_path():
    model = nn.ModuleList([encoder_layer(), nn.Linear(64, 64)])
    report = convert(model, "tetrajet", include="1")
    assert report.notes == [] and model[0].activation_relu_or_gelu == 1


# ---- the report ----


def test_report():
    model = Model()
    report = convert(model, [("head", "mxfp8"), ("*", "tetrajet")], exclude="*.proj")
    assert isinstance(report, ConversionReport)
    lines = str(report).splitlines()
    assert lines[:4] == [
        "layer               out x in  recipe",
        "embed                64 x 16  - first layer of the model; name it to convert it",
        "blocks.0.attn.qkv   192 x 64  tetrajet",
        "blocks.0.attn.proj  64 x 192  - excluded",
    ]
    assert lines[-2] == "head                 10 x 64  mxfp8"
    assert len(lines) == 1 + len(EVERY) + 1
    total = 64 * 16 + 2 * (2 * 192 * 64 + 2 * 128 * 64) + 640
    share = 1 - (64 * 16 + 2 * 192 * 64) / total
    assert report.share == pytest.approx(share)
    assert lines[-1] == f"7 of 10 linear layers converted, {100 * share:.1f}% of their weights"


def test_report_prints_notes():
    assert "\nnote: (model): evaluation no longer" in str(
        convert(encoder_layer(), "bf16", include="linear1")
    )


def test_report_of_a_model_without_linear_layers():
    report = convert(nn.ReLU(), "tetrajet")
    assert report.share == 0 and str(report).endswith(
        "0 of 0 linear layers converted, 0.0% of their weights"
    )


def test_one_line_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="mxtrain"):
        report = convert(Model(), "tetrajet")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mxtrain", "INFO")
    assert record.getMessage() == f"convert: {report.summary}"
    caplog.clear()
    convert(ends(), "tetrajet")
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "0 of 2 linear layers" in record.getMessage()
