"""What monitor sees of X and dY: kept until the row, then quantized with that of layers alike."""

from __future__ import annotations

import copy
import gc
import importlib
import weakref

import pytest
import torch
from test_convert import BLOCKS
from test_monitor import Calls, build, number, rows_of, train, two_optimizers
from torch import nn

import mxtrain
from mxtrain import MXLinear, monitor, weight_watch
from mxtrain.monitor import RATES
from mxtrain.oscillation import quantizer_statistics

pytestmark = [
    pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm"),
    pytest.mark.usefixtures("one_thread"),
]
MODULE = importlib.import_module("mxtrain.monitor")  # mxtrain.monitor is its function


def test_no_more_is_held_than_may_be(tmp_path, monkeypatch):
    """What is more is quantized before the row, and the rows are the same; so in smaller pieces."""
    files = []
    for held, elements in ((1 << 28, 1 << 24), (2000, 1 << 24), (0, 1)):
        monkeypatch.setattr(MODULE, "MOST_HELD", held)
        monkeypatch.setattr(weight_watch, "MOST_ELEMENTS", elements)
        model, optimizer = build("mxfp4_baseline")
        with monitor(model, tmp_path / "run.csv", every=2):
            train(model, optimizer, 1)
            with Calls() as calls:
                model(torch.randn(16, 5, 16)).square().mean().backward()
            assert bool(calls.count["quantization_statistics"]) == (held < 1 << 28)
            optimizer.step()
            train(model, optimizer, 2)
        rows = rows_of(tmp_path / "run.csv")
        files.append([{name: number(cell) for name, cell in row.items()} for row in rows])
    assert len(files[0]) == 2 * len(BLOCKS)
    for others in files[1:]:
        for one, other in zip(files[0], others, strict=True):
            for name, cell in one.items():
                wanted = other[name]
                wanted = wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-6)
                assert cell == wanted, name


@pytest.mark.parametrize("recipe", ["tetrajet", "mxfp4_hadamard", "nvfp4"])
def test_x_and_dy_of_one_shape_share_their_ops(tmp_path, device, recipe):
    """Of 13 of one shape, as 8 + 4 + 1, and one of another: copied where they are seen, quantized
    where the row is made, and each what it is by itself. nvfp4 goes one by one."""
    recipe = mxtrain.RECIPES[recipe]  # without draws, which would go by the place among others
    recipe = recipe.with_quantizers("near", ("dgrad", "wgrad"), rounding="nearest")
    torch.manual_seed(0)
    shapes = [(32, 64)] * 7 + [(48, 64)] + [(32, 64)] * 6
    model = nn.ModuleList(MXLinear(*s, device=device, recipe=recipe) for s in shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with monitor(model, tmp_path / "run.csv", every=1):
        seen = []
        for layer in model:
            x = torch.randn(300, layer.in_features, device=device)
            dy = torch.randn(300, layer.out_features, device=device)
            seen.append((x.clone(), dy.clone()))
            with Calls() as calls:
                layer(x).backward(dy)
            assert calls.count["quantization_statistics"] == 0
            x.zero_(), dy.zero_()  # what was seen is kept, not where it was
        with Calls() as calls:
            optimizer.step()
    if recipe.fprop_x.format == "mxfp4":
        assert calls.count["quantization_statistics"] <= 6 * 4  # fields; 8, 4, 1 and the other
    for row, layer, (x, dy) in zip(rows_of(tmp_path / "run.csv"), model, seen, strict=True):
        for field in ("fprop_x", "wgrad_x", "dgrad_dy", "wgrad_dy"):
            q = getattr(recipe, field)
            t = x if field.endswith("x") else dy
            if q.source == "forward":
                t = mxtrain.quantize(t, "mxfp4", scale_rule="ceil").dequantize()
            wanted = quantizer_statistics(t, q, transpose=field.startswith("wgrad"))
            got = {rate: float(row[f"{field}.{rate}"]) for rate in RATES}
            assert got == pytest.approx(wanted, rel=1e-6), (layer, field)


def kept(watching) -> int:
    """Elements of the samples that are really there, each once."""
    asked = [one for w in watching._watched.values() for one in w.asked.values()]
    return sum({one.x.data_ptr(): one.x.numel() for one in asked}.values())


def test_a_micro_batch_replaces_the_one_before(tmp_path, monkeypatch):
    """So eight are held as one is, and nothing is quantized before the row."""
    model, optimizer = build("mxfp4_baseline")
    x = torch.randn(16, 5, 16)
    with monitor(model, tmp_path / "run.csv", every=1) as watching:
        model(x).square().mean().backward()
        once = watching._held
        assert once == kept(watching) > 0
        monkeypatch.setattr(MODULE, "MOST_HELD", once)
        with Calls() as calls:
            for _ in range(7):
                model(x).square().mean().backward()
                assert watching._held == kept(watching) == once
        assert calls.count["quantization_statistics"] == 0
        optimizer.step()
        assert watching._held == kept(watching) == 0


def test_what_the_second_optimizer_waits_for_is_still_held(tmp_path, monkeypatch):
    model, _ = build("mxfp4_baseline")
    (first, second), _ = two_optimizers(model)
    x = torch.randn(16, 5, 16)
    with monitor(model, tmp_path / "run.csv", every=1) as watching:
        model(x).square().mean().backward()
        both = watching._held
        first.step()
        assert 0 < watching._held == kept(watching) < both
        monkeypatch.setattr(MODULE, "MOST_HELD", both - 1)
        with Calls() as calls:  # those of the first come back, which is one too many
            model(x).square().mean().backward()
        assert calls.count["quantization_statistics"] and watching._held == kept(watching)
        second.step(), first.step()
        assert watching._held == kept(watching) == 0


def test_what_squares_take_at_once_is_not_held(tmp_path):
    model, _ = build("int8_block")
    with monitor(model, tmp_path / "run.csv", every=1) as watching:
        model(torch.randn(16, 5, 16)).square().mean().backward()
        assert watching._held == 0


def test_what_another_recipe_saw_is_forgotten(tmp_path):
    """Between the forward of a step and the step: its X and dY are of neither recipe's row."""
    layer = MXLinear(64, 128, recipe="tetrajet")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with monitor(layer, tmp_path / "run.csv", every=1) as watching:
        layer(torch.randn(40, 64)).square().mean().backward()
        assert watching._held
        layer.recipe = mxtrain.RECIPES["mxfp4_backward"]
        optimizer.step()
        assert watching._held == 0
        layer(torch.randn(40, 64)).square().mean().backward()
        optimizer.step()
        layer.recipe = mxtrain.RECIPES["mxfp4_baseline"]  # before the forward: all is the new one's
        layer(torch.randn(40, 64)).square().mean().backward()
        optimizer.step()
    first, second, third = rows_of(tmp_path / "run.csv")
    assert float(third["fprop_x.snr"]) > 5 and float(third["dgrad_dy.snr"]) > 5
    assert first["fprop_x.snr"] == first["dgrad_dy.snr"] == "" and second["fprop_x.snr"] == ""
    assert float(second["dgrad_dy.snr"]) > 5 and first["recipe"] == "mxfp4_backward"


@pytest.mark.parametrize("how", ["deepcopy", "save", "AveragedModel"])
def test_a_model_that_is_watched_is_copied_without_it(tmp_path, how):
    model, optimizer = build("mxfp4_baseline")
    with monitor(model, tmp_path / "run.csv", every=1) as watching:
        if how == "save":
            torch.save(model, tmp_path / "model.pt")
            copied = torch.load(tmp_path / "model.pt", weights_only=False)
        elif how == "AveragedModel":
            copied = torch.optim.swa_utils.AveragedModel(model).module
        else:
            copied = copy.deepcopy(model)
        copied.train()(torch.randn(16, 5, 16)).square().mean().backward()
        assert watching._held == 0
        model(torch.randn(16, 5, 16)).square().mean().backward()
        assert watching._held > 0
        optimizer.step()
    assert len(rows_of(tmp_path / "run.csv")) == len(BLOCKS)


def test_a_graph_that_outlives_the_monitor(tmp_path):
    """Keeps nothing of it, and its backward asks for nothing."""
    model, _ = build("mxfp4_baseline")
    watching = monitor(model, tmp_path / "run.csv", every=1)
    loss = model(torch.randn(16, 5, 16)).square().mean()
    watching.close()
    before = watching._held
    loss.backward(retain_graph=True)
    assert watching._held == before and model.blocks[0].attn.qkv.weight.grad is not None
    gone = weakref.ref(watching)
    del watching
    gc.collect()
    assert gone() is None
    loss.backward()
