"""monitor's `outputs`: how far what blocks put out has moved."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from common import refuses
from test_convert import BLOCKS
from test_monitor import build, rows_of, train
from torch import nn

from mxtrain import monitor
from mxtrain.probe import probed

pytestmark = [
    pytest.mark.ops("quantize", "quantize_dual", "requantize", "dequantize", "gemm"),
    pytest.mark.usefixtures("one_thread"),
]


def test_outputs_of_blocks(tmp_path):
    """A row each, of how far what a block puts out has moved; of a tuple, its first tensor."""
    model, optimizer = build("tetrajet")
    block, probe, seen = model.blocks[0], torch.randn(2, 5, 16), []
    block.mlp.register_forward_hook(lambda m, a, y: seen.append(y.detach()))
    names = ["blocks.0.mlp", "blocks.0.mlp.2"]  # the second is an MXLinear, which has a row
    with monitor(model, tmp_path / "a.csv", every=5, probe=probe, outputs=names):
        first = seen[-1]
        train(model, optimizer, 7)
    rows = rows_of(tmp_path / "a.csv")
    assert Counter(r["layer"] for r in rows) == Counter([*BLOCKS, "blocks.0.mlp"])
    cells = {c: v for c, v in rows[-1].items() if v}
    at_the_row = seen[-3]  # two steps follow it
    expected = ((at_the_row - first).norm() / first.norm()).item()
    assert cells.keys() == {"step", "layer", "y_change"} and cells["step"] == "5"
    assert float(cells["y_change"]) == pytest.approx(expected, rel=1e-5)


def test_an_output_that_is_a_tuple():
    """It is known by its first tensor; without one by nothing."""
    model = nn.Sequential(nn.LSTM(4, 3), nn.Identity())
    x = torch.randn(2, 4)
    found = probed(model, (x,), model, [])
    torch.testing.assert_close(found[id(model[0])], model[0](x)[0])
    assert probed(nn.Flatten(), (x,), [], []) == {}


def test_errors(tmp_path):
    model, _ = build("tetrajet")
    with refuses(ValueError, "outputs must name modules of the model, got 'blocks.9'"):
        monitor(model, tmp_path / "run.csv", probe=torch.randn(1, 5, 16), outputs=["blocks.9"])
    with refuses(ValueError, "outputs must come with a probe"):
        monitor(model, tmp_path / "run.csv", outputs=["blocks.0"])
    with refuses(TypeError, "outputs must be names of modules, got 'blocks.0'"):
        monitor(model, tmp_path / "run.csv", outputs="blocks.0")
    assert not (tmp_path / "run.csv").exists()
