"""monitor and its CSV: what is in a row, when, that it changes nothing; the plot."""

from __future__ import annotations

import csv
import math
from collections import Counter

import pytest
import torch
from common import refuses
from test_convert import BLOCKS, Model
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks
from torch.utils._python_dispatch import TorchDispatchMode

import mxtrain
from mxtrain import MXLinear, Quantizer, convert, monitor, plot
from mxtrain.monitor import COLUMNS, QUANTIZERS, RATES
from mxtrain.oscillation import Oscillation, quantizer_statistics

pytestmark = [
    pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm"),
    pytest.mark.usefixtures("one_thread"),
]


def build(recipe, device="cpu"):
    torch.manual_seed(0)
    model = Model().to(device)
    convert(model, recipe)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model, optimizer, steps, seed=1):
    device = next(model.parameters()).device
    torch.manual_seed(seed)
    for _ in range(steps):
        model(torch.randn(16, 5, 16).to(device)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "recipe", ["tetrajet_ema", "mxfp4_backward", "fp4_mixed", "nvfp4", "quartet", "int8_fallback"]
)
def test_rows_and_columns(tmp_path, device, recipe):
    model, optimizer = build(recipe, device)
    with monitor(model, tmp_path / "run.csv", every=4):
        train(model, optimizer, 11)
    rows = rows_of(tmp_path / "run.csv")
    assert [(r["step"], r["layer"]) for r in rows] == [(s, n) for s in ("4", "8") for n in BLOCKS]
    assert list(rows[0]) == list(COLUMNS)
    layers = dict(model.named_modules())
    for row in rows:
        layer = layers[row["layer"]]
        assert row["recipe"] == layer.recipe.name
        for field in QUANTIZERS:
            q = getattr(layer.recipe, field)
            cells = [row[f"{field}.{rate}"] for rate in RATES]
            if q.format is None:
                assert cells == [""] * len(RATES)
                continue
            snr, underflow, clip, confidence, nonfinite = map(float, cells)
            assert nonfinite == 0 and 0 <= underflow < 1 and 0 <= confidence <= 1
            assert snr > 5 and (clip == 0 or q.scale_rule != "ceil")
        moving = [float(row[c]) for c in ("w_change", "q_change", "flips", "ratio")
                  if row[c]]  # fmt: skip
        assert len(moving) == (4 if layer.recipe.fprop_w.format in mxtrain.FORMATS else 0)
        assert all(0 <= value < math.inf for value in moving)
        bins = [float(row[c]) for c in COLUMNS if c.startswith("ratio<") and row[c]]
        assert not bins or sum(bins) == pytest.approx(1, abs=1e-5)
        assert row["y_change"] == ""
        fallback = [row[c] for c in ("fallback_rate", "fallback_threshold", "fallback_nonfinite")]
        if layer.recipe.fprop_x.fallback:
            assert 0 <= float(fallback[0]) <= 1 and float(fallback[1]) > 0
            assert float(fallback[2]) == 0
        else:
            assert fallback == ["", "", ""]


def test_what_int8_does(tmp_path):
    """Of squares: against what the operands hold. The second step shows in the SNR of X."""
    torch.manual_seed(0)
    x = torch.randn(300, 200)
    x[3, 4] = 100.0
    q = mxtrain.RECIPES["int8_fallback"].fprop_x
    plain = quantizer_statistics(x, q)
    op = mxtrain.int8_quantize(x)
    value, scale = op.dequantize(), op.scale.repeat_interleave(128, 0)[:300]
    place = x / scale.repeat_interleave(128, 1)[:, :200]
    noise = (x - value).double().square().sum()
    assert plain["snr"] == pytest.approx(10 * math.log10(x.double().square().sum() / noise))
    assert plain["underflow"] == pytest.approx((value == 0).double().mean().item())
    assert plain["clip"] == plain["nonfinite"] == 0
    sure = 1 - 2 * (place - place.round()).abs().double().mean().item()
    assert plain["confidence"] == pytest.approx(sure, rel=1e-5)
    assert quantizer_statistics(x, q, threshold=torch.tensor([10.0]))["snr"] > plain["snr"] + 3
    x[299, 199] = torch.nan
    last = 172 * 72 / 60000  # elements of the last block
    assert quantizer_statistics(x, q)["nonfinite"] == pytest.approx(44 * 72 / 60000) != last
    layer = MXLinear(200, 256, recipe="int8_fallback")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with monitor(layer, tmp_path / "run.csv", every=1):
        layer(x[:256]).square().mean().backward()
        limit = layer.fallback_threshold.clone()
        optimizer.step()
    (row,) = rows_of(tmp_path / "run.csv")
    wanted = quantizer_statistics(x[:256], q, threshold=limit)
    assert (
        float(row["fprop_x.snr"]) == pytest.approx(wanted["snr"]) and wanted["snr"] > plain["snr"]
    )
    assert row["wgrad_x.snr"] == row["fprop_x.snr"] and row["dgrad_w.snr"] == row["fprop_w.snr"]
    wanted = quantizer_statistics(layer.weight, layer.recipe.fprop_w)
    assert float(row["fprop_w.snr"]) == pytest.approx(wanted["snr"]) and row["ratio"] == ""


def two_optimizers(model):
    layers = [m for m in model.modules() if isinstance(m, MXLinear)]
    ours = {id(p) for m in layers[:3] for p in m.parameters()}
    split = [[p for p in model.parameters() if (id(p) in ours) == own] for own in (True, False)]
    return [torch.optim.AdamW(params, lr=1e-2) for params in split], layers[:3]


@pytest.mark.parametrize("recipe", ["mxfp4_baseline", "tetrajet"])
def test_two_optimizers(tmp_path, recipe):
    """Each layer by the steps of its own: X, dY and every column are those of one optimizer."""
    files = []
    for split in (False, True):
        model, optimizer = build(recipe)
        both = two_optimizers(model)[0] if split else [optimizer]
        torch.manual_seed(1)
        with monitor(model, tmp_path / "run.csv", every=2):
            for _ in range(6):
                model(torch.randn(16, 5, 16)).square().mean().backward()
                for one in both:
                    one.step()
                model.zero_grad()
        rows = sorted(rows_of(tmp_path / "run.csv"), key=lambda row: (row["step"], row["layer"]))
        files.append([{name: number(cell) for name, cell in row.items()} for row in rows])
    assert len(files[0]) == 3 * len(BLOCKS)
    for one, other in zip(*files, strict=True):  # float64 sums, of other parts where fewer share
        for name, cell in one.items():
            q = getattr(mxtrain.RECIPES[recipe], name.split(".")[0], None)
            if q is not None and q.rounding == "stochastic":
                continue  # its draws go by the place among others
            wanted = other[name]
            assert cell == (wanted if isinstance(wanted, str) else pytest.approx(wanted, rel=1e-6))


def number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def test_an_optimizer_that_steps_more_often(tmp_path):
    model, _ = build("tetrajet")
    (often, seldom), of_often = two_optimizers(model)
    model.blocks[1].mlp[2].requires_grad_(False)  # of the second: frozen, goes with the first
    with monitor(model, tmp_path / "run.csv", every=2):
        for step in range(8):
            model(torch.randn(4, 5, 16)).square().mean().backward()
            often.step()
            if step % 4 == 3:
                seldom.step()
            model.zero_grad()
    steps = {}
    for row in rows_of(tmp_path / "run.csv"):
        steps.setdefault(row["layer"], []).append(row["step"])
        assert row["fprop_x.snr"] != ""
    counts = [len(steps[name]) for name in BLOCKS]
    assert counts == [4, 4, 4, 1, 1, 1, 1, 4] and len(of_often) == 3
    assert steps[BLOCKS[0]] == ["2", "4", "6", "8"] and steps[BLOCKS[3]] == ["2"]


def test_a_calibration_is_not_seen(tmp_path):
    model, _ = build("tetrajet")
    optimizer = mxtrain.optim.QRamping(model.parameters(), model, max_period=4)

    def gradients():
        model(torch.randn(4, 5, 16)).square().mean().backward()

    with monitor(model, tmp_path / "run.csv", every=2):
        optimizer.calibrate(gradients, transitions=7)
        gradients()
        optimizer.step()
    assert rows_of(tmp_path / "run.csv") == []


def test_a_probe_that_does_not_fit_leaves_nothing(tmp_path):
    model, _ = build("tetrajet")
    path = tmp_path / "run.csv"
    path.write_text("of a run before")
    hooks = len(_global_optimizer_post_hooks)
    with pytest.raises((ValueError, RuntimeError)):
        monitor(model, path, probe=torch.randn(3, 5))
    assert path.read_text() == "of a run before" and model.training
    assert len(_global_optimizer_post_hooks) == hooks
    assert not any(m._forward_hooks for m in model.modules())


def test_a_probe_of_a_stochastic_forward(tmp_path, device):
    """It draws numbers of its own, the same every time: training's bits stay, and y_change is 0
    where the weights stay."""
    recipe = mxtrain.RECIPES["tetrajet"].with_quantizers("sr", "fprop", rounding="stochastic")
    probe, results = torch.randn(1, 5, 16).to(device), []
    for watched in (False, True):
        model, optimizer = build(recipe, device)
        if watched:
            with monitor(model, tmp_path / "run.csv", every=2, probe=probe):
                train(model, optimizer, 4)
        else:
            train(model, optimizer, 4)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with monitor(model, tmp_path / "run.csv", every=2, probe=probe):
        train(model, optimizer, 2)
    assert {row["y_change"] for row in rows_of(tmp_path / "run.csv")} == {"0.0"}


def test_values_are_those_of_the_definitions(tmp_path):
    """The row of one layer, against the tensors of the last step and the weights of all."""
    torch.manual_seed(0)
    layer = MXLinear(64, 96, recipe="tetrajet")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    watch, sums = Oscillation(layer.recipe.fprop_w), []
    with monitor(layer, tmp_path / "run.csv", every=3):
        for _ in range(3):
            x, dy = torch.randn(40, 64), torch.randn(40, 96)
            layer(x).backward(dy)
            optimizer.step()
            optimizer.zero_grad()
            sums.append(watch.update(layer.weight))
    (row,) = rows_of(tmp_path / "run.csv")
    recipe, w = layer.recipe, layer.weight
    qx, qw = (mxtrain.quantize(t.detach(), "mxfp4").dequantize() for t in (x, w))
    expected = {
        "fprop_x": quantizer_statistics(x, recipe.fprop_x),
        "fprop_w": quantizer_statistics(w, recipe.fprop_w),
        "dgrad_dy": quantizer_statistics(dy, recipe.dgrad_dy),
        "wgrad_dy": quantizer_statistics(dy, recipe.wgrad_dy, transpose=True),
        "dgrad_w": quantizer_statistics(qw, recipe.dgrad_w, transpose=True),
        "wgrad_x": quantizer_statistics(qx, recipe.wgrad_x, transpose=True),
    }
    for field, rates in expected.items():
        got = {rate: float(row[f"{field}.{rate}"]) for rate in RATES}
        assert got == pytest.approx(rates, rel=1e-6), field
    assert float(row["ratio"]) == pytest.approx(watch.ratio().mean().item(), rel=1e-5)
    moved = torch.stack(sums[1:])
    assert float(row["w_change"]) == pytest.approx((moved[:, 0] / moved[:, 1]).sqrt().mean().item())
    assert float(row["flips"]) == pytest.approx((moved[:, 4] / w.numel()).mean().item())


class Calls(TorchDispatchMode):
    """How often each op of mxtrain ran."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[str(func).removeprefix("mxtrain.").removesuffix(".default")] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recipe", ["tetrajet", "tetrajet_ema", "nvfp4"])
def test_layers_of_one_shape_share_their_ops(tmp_path, device, recipe):
    """13 of 64 x 32, as 8 + 4 + 1, and one of another shape: rows as each has by itself, before and
    after one of them is converted. nvfp4, whose scale is the tensor's, goes one by one."""
    torch.manual_seed(0)
    shapes = [(32, 64)] * 7 + [(48, 64)] + [(32, 64)] * 6
    model = nn.ModuleList(MXLinear(*s, device=device, recipe=recipe) for s in shapes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    alone = [Oscillation(layer.recipe.fprop_w) for layer in model]
    moves: list[list[torch.Tensor]] = [[] for _ in model]
    shared = recipe != "nvfp4"
    with monitor(model, tmp_path / "run.csv", every=4):
        for step in range(1, 9):
            if step == 6:
                model[3].recipe = mxtrain.get_recipe("mxfp4_baseline")
                alone[3] = Oscillation(model[3].recipe.fprop_w)
                moves[3].clear()
            if step == 7:  # other memory, of which the views that were kept know nothing
                model[0].weight.data = model[0].weight.data * 1.5
            for layer in model:
                layer(torch.randn(40, layer.in_features, device=device)).square().mean().backward()
            with Calls() as calls:
                optimizer.step()
            if step in (2, 7):  # of 8 + 4 + 1 and the other shape; of 8 + 4, the converted one too
                assert calls.count["oscillation_step_"] <= (5 if shared else len(model))
            if step in (3, 5):  # nothing layer by layer, and the row before has not changed that
                assert calls.count["aten.slice.Tensor"] == 0
                assert calls.count["aten.cat"] <= 4
            optimizer.zero_grad()
            if step == 5:  # a row was made at the fourth
                for a, m in zip(alone, moves, strict=True):
                    a.reset()
                    m.clear()
            for layer, a, m in zip(model, alone, moves, strict=True):
                moved = a.update(layer.weight, layer.weight_ema if layer.ema_active else None)
                if moved is not None:
                    m.append(moved)
            if step == 5:
                for a, m in zip(alone, moves, strict=True):
                    assert a.transitions == len(m) == 1
    rows = rows_of(tmp_path / "run.csv")[len(model) :]
    for row, layer, a, m in zip(rows, model, alone, moves, strict=True):
        assert row["layer"] == str(list(model).index(layer))
        assert float(row["ratio"]) == pytest.approx(a.summary()[1].item(), rel=1e-5)
        moved = torch.stack(m)
        expected = (moved[:, 0] / moved[:, 1]).sqrt().mean().item()
        assert float(row["w_change"]) == pytest.approx(expected)
        toward = layer.weight_ema if layer.ema_active else None
        wanted = quantizer_statistics(layer.weight, layer.recipe.fprop_w, toward=toward)
        assert float(row["fprop_w.snr"]) == pytest.approx(wanted["snr"], rel=1e-6)


@pytest.mark.parametrize("recipe", ["tetrajet", "mxfp4_backward"])
def test_watching_changes_nothing(tmp_path, device, recipe):
    results = []
    for watched in (False, True):
        model, optimizer = build(recipe, device)
        if watched:
            with monitor(
                model, tmp_path / "run.csv", every=2, probe=torch.randn(1, 5, 16).to(device)
            ):
                train(model, optimizer, 6)
        else:
            train(model, optimizer, 6)
        results.append([p.detach().clone() for p in model.parameters()])
        assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_probe_and_a_sample(tmp_path):
    """y_change is that of the outputs; a sample of few rows sees about the same shares."""
    model, optimizer = build("tetrajet")
    probe = torch.randn(2, 5, 16)
    seen = []
    hook = model.blocks[0].mlp[2].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    with monitor(model, tmp_path / "a.csv", every=5, probe=probe, elements=2048):
        first = seen[-1]
        train(model, optimizer, 5)
    hook.remove()
    row = next(r for r in rows_of(tmp_path / "a.csv") if r["layer"] == "blocks.0.mlp.2")
    model.eval()
    last = model.blocks[0].mlp[2]
    model(probe)
    expected = ((seen[-1] - first).norm() / first.norm()).item()
    assert float(row["y_change"]) == pytest.approx(expected, rel=1e-5)
    whole = quantizer_statistics(last.weight, Quantizer("mxfp4", "ceil"))
    assert float(row["fprop_w.snr"]) == pytest.approx(whole["snr"], abs=0.5)


def test_recipes_that_change_and_weights_that_do_not_move(tmp_path):
    """In BF16 a row has no quantizers. Steps of an optimizer of other weights are not counted."""
    model, optimizer = build("tetrajet")
    schedule = mxtrain.TargetPrecision(model, 6, 0.5)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with monitor(model, tmp_path / "run.csv", every=3) as watching:
        for _ in range(6):
            train(model, optimizer, 1)
            schedule.step()
            other.step()
        watching.step()
    rows = rows_of(tmp_path / "run.csv")
    assert {r["step"] for r in rows} == {"3", "6"}
    for row in rows:
        numbers = [v for k, v in row.items() if k not in ("step", "layer", "recipe") and v != ""]
        assert bool(numbers) == (row["step"] == "3")
    with refuses(RuntimeError, "monitor must be open, got closed"):
        watching.step()
    watching.close()


def test_under_compile_the_weights_are_seen(tmp_path, device):
    torch._dynamo.reset()
    model, optimizer = build("mxfp4_baseline", device)
    with monitor(model, tmp_path / "run.csv", every=2):
        train(torch.compile(model, fullgraph=True, backend="aot_eager"), optimizer, 4)
    rows = rows_of(tmp_path / "run.csv")
    assert len(rows) == 16
    assert all(r["fprop_x.snr"] == "" and float(r["fprop_w.snr"]) > 5 for r in rows)
    assert all(float(r["w_change"]) > 0 for r in rows)


def test_hooks_are_there_before_a_row_alone(tmp_path):
    model, optimizer = build("tetrajet")
    layers = [m for m in model.modules() if isinstance(m, MXLinear)]
    seen = []
    with monitor(model, tmp_path / "run.csv", every=3):
        for _ in range(7):
            seen.append({len(m._forward_hooks) for m in layers})
            train(model, optimizer, 1)
    assert seen == [{0}, {0}, {1}, {0}, {0}, {1}, {0}]
    assert all(float(row["fprop_x.snr"]) > 5 for row in rows_of(tmp_path / "run.csv"))


def test_errors(tmp_path):
    model = Model()
    with refuses(ValueError, "model must have an MXLinear"):
        monitor(model, tmp_path / "run.csv")
    convert(model, "mxfp8")
    with refuses(TypeError, "model must be a torch.nn.Module"):
        monitor(None, tmp_path / "run.csv")
    with refuses(ValueError, "every must be at least 1, got 0"):
        monitor(model, tmp_path / "run.csv", every=0)
    with refuses(TypeError, "elements must be an int"):
        monitor(model, tmp_path / "run.csv", elements="all")
    with refuses(TypeError, "probe must be a tensor, a tuple or None"):
        monitor(model, tmp_path / "run.csv", probe=[1])
    with refuses(TypeError, "path must be a path, got 5"):
        monitor(model, 5)
    with pytest.raises(OSError):
        monitor(model, tmp_path / "none" / "run.csv")
    assert not (tmp_path / "run.csv").exists()
    assert not any(m._forward_hooks for m in model.modules())


# ---- the plot ----


def test_plot_draws_and_names_the_worst_layer(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    model, optimizer = build("tetrajet")
    with torch.no_grad():
        model.blocks[1].mlp[2].weight[:, ::32] *= 100  # one outlier a block: the rest underflows
    with monitor(model, tmp_path / "run.csv", every=2):
        train(model, optimizer, 6)
    assert plot.main([str(tmp_path / "run.csv"), "--top", "2"]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert lines["fprop_w.confidence"][0].startswith("blocks.")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert plot.main([str(tmp_path / "run.csv"), "--columns", "fprop_w.underflow"]) == 0
    assert capsys.readouterr().out.split()[1] == "blocks.1.mlp.2"


def test_plot_shows_what_is_not_finite(tmp_path, capsys):
    model, optimizer = build("tetrajet")
    with monitor(model, tmp_path / "run.csv", every=2) as watching:
        train(model, optimizer, 2)
        with torch.no_grad():
            model.blocks[1].mlp[2].weight[0, 0] = torch.nan
        watching.step()
        watching.step()
    layers = plot.read(tmp_path / "run.csv")
    for column in ("oscillating", "ratio", "fprop_w.nonfinite"):
        (name, value), second = plot.worst(layers, column, 2)
        assert name == "blocks.1.mlp.2" and (math.isnan(value) or column.endswith("nonfinite"))
        assert not math.isnan(second[1])
    plot.main([str(tmp_path / "run.csv")])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "blocks.1.mlp.2 nan" in lines["oscillating"]
    assert "fprop_w.nonfinite" in lines and "fallback_nonfinite" not in lines
    model, optimizer = build("int8_fallback")
    with monitor(model, tmp_path / "run.csv", every=2):
        for _ in range(2):
            model(torch.full((4, 5, 16), torch.nan)).sum().backward()
            optimizer.step()
    plot.main([str(tmp_path / "run.csv"), "--columns", "fallback_nonfinite", "fallback_rate"])
    out = capsys.readouterr().out
    assert out.startswith("fallback_nonfinite  blocks.0.") and "fallback_rate " not in out


def test_plot_refuses_bad_input(tmp_path, capsys):
    bad = tmp_path / "bad.csv"
    assert plot.main([str(bad)]) == 2
    assert "No such file" in capsys.readouterr().err
    for text in ("", "a,b\n1,2\n", "\x00"):
        bad.write_text(text)
        assert plot.main([str(bad)]) == 2
        assert "csv must be what mxtrain.monitor wrote" in capsys.readouterr().err
    assert plot.main([str(bad), "--columns", "x"]) == 2
    assert "--columns must be among" in capsys.readouterr().err
    assert plot.main([str(bad), "--top", "0"]) == 2
    assert not (tmp_path / "bad.png").exists()
