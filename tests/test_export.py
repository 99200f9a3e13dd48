"""Exported models: evaluation is bitwise that of the trained model, from 4-bit weights alone."""

from __future__ import annotations

import copy

import pytest
import torch
from common import FLOATS, refuses
from torch import nn

import mxtrain
from mxtrain import MXLinear
from mxtrain.recipe import RECIPES

pytestmark = [
    pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm"),
    pytest.mark.usefixtures("one_thread"),
]
PACKED = [name for name, r in RECIPES.items() if r.fprop_w.format]


def build(recipe=None, device="cpu", dtype=torch.float32) -> nn.Module:
    """A convolution, a norm with buffers, layers with and without bias, and a head."""
    net = nn.Sequential(
        nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 2, 3, padding=1), nn.Flatten(),
        nn.Linear(128, 128), nn.BatchNorm1d(128), nn.GELU(), nn.Linear(128, 64, bias=False),
        nn.Linear(64, 5),
    ).to(device, dtype)  # fmt: skip
    if recipe is not None:
        mxtrain.convert(net, recipe, include=["3", "6"])
    return net


def trained(recipe, device="cpu", dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    net = build(recipe, device, dtype)
    optimizer = mxtrain.optim.AdamW(net.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        net(torch.randn(32, 64, device=device, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_are_bitwise_those_of_the_trained_model(recipe, device, tmp_path):
    net = trained(recipe, device)
    before = copy.deepcopy(net.state_dict())
    state = mxtrain.export_weights(net, tmp_path / "model.pt")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    packed = recipe in PACKED
    gone = {"3.weight_ema", "3.ema_updates", "3.ema_peak_lr"}
    assert not gone & set(state) and "7.weight" in state
    assert ("3.weight" in state) != packed == ("3.weight_packed" in state)
    assert not {"3.fallback_step", "3.fallback_counts"} & set(state)
    again = mxtrain.load_exported(build(device=device), tmp_path / "model.pt")
    x = torch.randn(7, 64, device=device)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
        with torch.autocast(device, torch.bfloat16):
            assert torch.equal(again(x), net(x))
    assert isinstance(again[3], mxtrain.FrozenLinear if packed else MXLinear)
    assert not again.training
    recipes = set() if packed else {"3.weight_recipe", "6.weight_recipe"}
    assert set(again.state_dict()) == set(state) - recipes
    converted = mxtrain.load_exported(build("tetrajet_ema", device), state)  # whatever it was
    with torch.no_grad():
        assert torch.equal(converted(x), net(x))


def test_a_model_after_the_switch_of_its_schedule(tmp_path):
    """All its layers are bf16 by then: no weight is packed."""
    net = build("tetrajet_ema")
    schedule = mxtrain.TargetPrecision(net, 2, 0.5)
    schedule.step()
    state = mxtrain.export_weights(net.eval(), tmp_path / "m.pt")
    assert torch.equal(state["3.weight"], net[3].weight)
    for target in (build(), build("mxfp8")):
        again = mxtrain.load_exported(target, tmp_path / "m.pt")
        for dtype in (torch.float32, torch.bfloat16):  # float32 weights take either
            x = torch.randn(7, 128, dtype=dtype)
            with torch.no_grad():
                assert torch.equal(again[3](x), net[3](x)) and again[3](x).dtype == dtype
    state = mxtrain.export_weights(MXLinear(8, 8, recipe="bf16"))
    single = mxtrain.load_exported(nn.Linear(8, 8), state)
    assert type(single) is MXLinear and single.recipe.name == "bf16"
    empty = nn.Sequential(MXLinear(0, 8, recipe="tetrajet_ema"))
    again = mxtrain.load_exported(nn.Sequential(nn.Linear(0, 8)), mxtrain.export_weights(empty))
    assert torch.equal(again(torch.ones(2, 0)), empty(torch.ones(2, 0)))


def test_bad_values_of_squares_and_thresholds_are_refused():
    net = trained("int8_fallback")
    state = mxtrain.export_weights(net)
    for value in (-1.0, 0.0, float("nan"), float("inf")):
        with refuses(ValueError, r"3.fallback_threshold must be positive and finite, got \["):
            mxtrain.load_exported(build(), {**state, "3.fallback_threshold": torch.tensor([value])})
    codes = state["6.weight_packed"].clone()
    codes[0, 0] = -128
    with refuses(ValueError, r"6.weight_packed must hold codes in \[-127, 127\]"):
        mxtrain.load_exported(build(), {**state, "6.weight_packed": codes})
    layer = MXLinear(40, 24, recipe="int8_block")
    state = mxtrain.export_weights(layer)
    beyond, negative = state["weight_packed"].clone(), -state["weight_scale"]
    beyond[3, 40] = 1
    for key, bad, match in (
        ("weight_packed", beyond, "zeros beyond in_features = 40"),
        ("weight_scale", negative, "weight_scale must be at least 0 or NaN, got -"),
    ):
        with refuses(ValueError, match):
            mxtrain.load_exported(nn.Linear(40, 24), {**state, key: bad})


def test_a_file_of_something_else(tmp_path):
    for name, text in (("a.pt", b"abc"), ("b.pt", b""), ("c.safetensors", b"\x00" * 20)):
        if name.endswith("safetensors"):
            pytest.importorskip("safetensors")
        path = tmp_path / name
        path.write_bytes(text)
        with refuses(ValueError, "path must be a file that export_weights wrote, got"):
            mxtrain.load_exported(build(), path)
    with pytest.raises(FileNotFoundError):
        mxtrain.load_exported(build(), tmp_path / "none.pt")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_and_target(dtype, device):
    net = trained("tetrajet_ema", device).to(dtype)
    state = mxtrain.export_weights(net)
    x = torch.randn(3, 64, device=device, dtype=dtype)
    for target in (build(device=device, dtype=dtype), build("mxfp8", device, dtype),
                   build(device="meta", dtype=dtype)):  # fmt: skip
        with torch.no_grad():
            assert torch.equal(mxtrain.load_exported(target, state)(x), net(x))


def test_the_average_is_in_the_codes():
    """Without Q-EMA's average the plain weight would give other codes."""
    net = trained(mxtrain.get_recipe("tetrajet_ema").replace(ema_at_half=None))
    layer = net[3]
    assert layer.ema_active
    frozen = mxtrain.export_weights(net)["3.weight_packed"]
    toward = mxtrain.quantize(layer.weight, "mxfp4", rounding="toward", toward=layer.weight_ema)
    assert torch.equal(frozen, toward.data)
    assert not torch.equal(frozen, mxtrain.quantize(layer.weight, "mxfp4").data)
    layer._count_ema(0)  # in its warm-up it rounds to nearest
    nearest = mxtrain.export_weights(net)["3.weight_packed"]
    assert torch.equal(nearest, mxtrain.quantize(layer.weight, "mxfp4").data)


def test_it_is_small_and_written_by_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    net = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    mxtrain.convert(net, "tetrajet_ema", include="*")
    net[1].bias = net[0].bias  # tied tensors
    path = tmp_path / "model.safetensors"
    mxtrain.export_weights(net, path)
    assert path.stat().st_size < 2 * (512 * 512 * (4.25 / 8) + 4 * 512 + 2500)
    again = mxtrain.load_exported(nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512)), path)
    x = torch.randn(4, 512)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert again[0].weight.nbytes == 512 * 512 * 17 // 32


def test_a_single_layer_and_more_axes():
    layer = MXLinear(40, 24, recipe="tetrajet")
    frozen = mxtrain.load_exported(nn.Linear(40, 24), mxtrain.export_weights(layer))
    for shape in ((40,), (3, 40), (2, 3, 40), (0, 40), (2, 0, 40)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert torch.equal(frozen(x), layer(x))
    assert "in_features=40, out_features=24, bias=True, recipe='tetrajet'" in repr(frozen)
    wider = frozen.to(torch.bfloat16)
    assert wider.bias.dtype == torch.bfloat16 and wider.weight_packed.dtype == torch.uint8


def test_the_tensor_scale_stays_float32():
    layer = MXLinear(64, 32, recipe="nvfp4")
    frozen = mxtrain.load_exported(nn.Linear(64, 32), mxtrain.export_weights(layer))
    scale = frozen.weight_tensor_scale.clone()
    frozen.to(torch.bfloat16)
    assert torch.equal(frozen.weight_tensor_scale, scale) and scale.dtype == torch.float32


def test_squares_keep_their_float32_scales_and_the_threshold():
    net = trained("int8_fallback")
    state = mxtrain.export_weights(net)
    assert state["3.weight_packed"].dtype == torch.int8 and state["3.weight_scale"].shape == (1, 1)
    assert torch.equal(state["3.fallback_threshold"], net[3].fallback_threshold)
    again = mxtrain.load_exported(build(), state).bfloat16()
    assert {again[3].weight_scale.dtype, again[3].fallback_threshold.dtype} == {torch.float32}
    untrained = build("int8_fallback").eval()
    state = mxtrain.export_weights(untrained)
    assert "3.fallback_threshold" not in state
    again, x = mxtrain.load_exported(build(), state), torch.randn(300, 64)
    with torch.no_grad():
        assert torch.equal(again(x), untrained(x))
    state["3.fallback_threshold"] = torch.ones(2)
    with refuses(ValueError, r"3.fallback_threshold must be float32 of shape \[1\]"):
        mxtrain.load_exported(build(), state)


def test_layers_that_quantize_nothing_forward_keep_their_weight():
    net = nn.Sequential(MXLinear(64, 64, recipe="mxfp4_backward"), MXLinear(64, 64))
    state = mxtrain.export_weights(net)
    assert torch.equal(state["0.weight"], net[0].weight) and "1.weight_packed" in state
    again = mxtrain.load_exported(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), state)
    x = torch.randn(4, 64)
    with torch.no_grad():
        assert torch.equal(again(x), net(x))


def test_an_exported_model_compiles():
    net = trained("tetrajet_ema")
    again = mxtrain.load_exported(build(), mxtrain.export_weights(net))
    x = torch.randn(7, 64)
    with torch.no_grad():
        compiled = torch.compile(again, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), again(x))


def test_random_forward_weights_are_refused():
    rounding = RECIPES["tetrajet"].fprop_w
    drawn = dict(hadamard=32, signs="drawn")
    changes = (
        ({"fprop_w": mxtrain.Quantizer("mxfp4", rounding="stochastic")}, "got stochastic rounding"),
        ({f: mxtrain.Quantizer("mxfp4", **drawn) for f in ("fprop_x", "fprop_w")},
         "got drawn signs"),
        ({"fprop_w": mxtrain.Quantizer()}, "got unquantized"),
    )  # fmt: skip
    assert rounding.rounding == "nearest"
    base = RECIPES["mxfp8"].replace(
        **{f: mxtrain.Quantizer("mxfp4") for f in ("fprop_x", "fprop_w", "dgrad_dy", "dgrad_w",
                                                   "wgrad_dy", "wgrad_x")}
    )  # fmt: skip
    for change, match in changes:
        net = nn.Sequential(MXLinear(64, 64, recipe=base.replace(**change)))
        with refuses(ValueError, match):
            mxtrain.export_weights(net)


def test_what_does_not_fit_is_refused_and_changes_nothing(tmp_path):
    net = trained("tetrajet")
    state = mxtrain.export_weights(net)
    target = build()
    kept, kinds = copy.deepcopy(target.state_dict()), [type(m) for m in target]

    def without(*keys):
        return {k: v for k, v in state.items() if k not in keys}

    bad = [
        ({}, "state must hold a weight_recipe, got none"),
        (net.state_dict(), "state must hold a weight_recipe, got none"),
        ({**state, "3.bias": state["3.bias"].long()}, "3.bias must be bfloat16, float16 or"),
        ({**state, "7.bias": state["7.bias"].long()}, "7.bias must be real, got int64"),
        (without("7.bias"), "state must have the names of the model"),
        ({**state, "9.weight": state["7.weight"]}, "state must have the names of the model"),
        ({**state, "7.weight": torch.ones(3)}, r"7.weight must have shape \[5, 64\]"),
        (without("3.weight_scale"), r"3.weight_scale must be uint8 of shape \[128, 4\], got None"),
        ({**state, "3.weight_packed": state["3.weight_packed"][:, :8]}, "3.weight_packed must be"),
        ({**state, "3.weight_packed": state["3.weight_packed"].int()}, "3.weight_packed must be"),
        ({**state, "3.weight_tensor_scale": torch.ones(1)}, "3.weight_tensor_scale must be"),
        (without("3.bias"), r"3.bias must be .* have shape \[128\], got None"),
        ({**state, "6.bias": torch.ones(64)}, "6.bias must be absent"),
        ({**state, "3.weight_recipe": torch.ones(4, dtype=torch.uint8)},
         "3.weight_recipe must describe a recipe"),
        ({**state, "2.weight_recipe": state["3.weight_recipe"]},
         "model must have the linear layers that were exported, got Flatten"),
        ({**state, "99.weight_recipe": state["3.weight_recipe"]}, "got NoneType"),
    ]  # fmt: skip
    for broken, match in bad:
        with refuses(ValueError, match):
            mxtrain.load_exported(target, broken)
        assert [type(m) for m in target] == kinds and target.training
        assert all(torch.equal(v, kept[k]) for k, v in target.state_dict().items())
    for call, match in (
        (lambda: mxtrain.load_exported(3, state), "model must be a torch.nn.Module"),
        (lambda: mxtrain.load_exported(target, 3), "state must be a dict of tensors or a path"),
        (lambda: mxtrain.export_weights(3), "model must be a torch.nn.Module"),
        (lambda: mxtrain.export_weights(net, 3), "path must be a path or None"),
    ):
        with refuses(TypeError, match):
            call()
    with refuses(ValueError, "model must have an MXLinear, got none"):
        mxtrain.export_weights(nn.Linear(4, 4))


def test_a_frozen_layer_is_for_inference():
    frozen = mxtrain.load_exported(nn.Linear(64, 64), mxtrain.export_weights(MXLinear(64, 64)))
    with refuses(RuntimeError, "x must not require a gradient"):
        frozen(torch.randn(3, 64, requires_grad=True))
    with refuses(ValueError, "x must have in_features = 64 as its last size"):
        frozen(torch.randn(3, 63))
    with refuses(TypeError, "x must be a tensor of bfloat16, float16 or float32"):
        frozen(torch.randn(3, 64).double())
